"""What is known of an unknown driver, and what others say of themselves.

PEP 249's names, and nothing more. A driver's own file overrides what differs. A
method there says what it does where that is more than what is said here.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any, Literal

from ..faults import Fault, Proof
from ..sockets import Counter

#: What may be noted on an exception: a callable password raised it; a driver did that was given one
#: peer's settings; its text names the peer; it was raised before COMMIT was run, or even before it
#: was sent; it ended its connection's use; who has met it.
Mark = Literal["is_ours", "of_settings", "is_named", "of_first", "alone", "end", "caller"]


def mark(exc: BaseException, what: Mark, value: object = True) -> None:
    """Note something on an exception."""
    with contextlib.suppress(AttributeError, TypeError):
        setattr(exc, f"_django_proxysql_{what}", value)


def is_marked(exc: BaseException, what: Mark, value: object = True) -> bool:
    """Return whether that is noted on an exception."""
    return bool(getattr(exc, f"_django_proxysql_{what}", None) == value)


def is_a(exc: BaseException, *names: str) -> bool:
    """Return whether an exception's class has one of these names, or is derived from one that has:
    an application may have subclassed the driver's."""
    return any(cls.__name__ in names for cls in type(exc).__mro__)


class Driver:
    """A driver: what its errors mean, what its connections know and can do."""

    #: The packages that are this driver.
    MODULES: tuple[str, ...] = ()
    #: Whether established connections are looked after: there is a server to lose.
    WATCHED = False
    #: Whether :meth:`leave` parts a process from a connection.
    LEAVES = False
    #: Whether a proxy may answer for a server.
    SPLITS = False
    #: What connect() takes by name, and Django's engine in OPTIONS; None: not known.
    OPTIONS: frozenset[str] | None = None
    #: The names of connect()'s argument that bounds an attempt, and the least that it does.
    TIMEOUTS: tuple[str, ...] = ()
    LEAST_TIMEOUT = 1
    #: Of errors that were raised on purpose: the codes of those that end the connection itself.
    ENDS_CONNECTION: tuple[Any, ...] = ()

    def fault(self, exc: BaseException, connecting: bool) -> Fault:
        """Return what ``exc`` says about the peer."""
        if connecting and is_a(exc, "OperationalError", "InterfaceError"):
            return Fault.UNREACHABLE
        return Fault.OTHER

    def connect_options(self, params: Any, seconds: float) -> dict[str, Any]:
        """Return connect() arguments that bound one attempt to ``seconds``, unless ``params`` does.

        Whole seconds: the drivers take no fractions.
        """
        if not self.TIMEOUTS or not params.keys().isdisjoint(self.TIMEOUTS):
            return {}
        return {self.TIMEOUTS[0]: max(self.LEAST_TIMEOUT, math.ceil(seconds))}

    def session_options(self, params: Any, autocommit: bool) -> dict[str, Any]:
        """Return connect() arguments that spare the session a round trip later."""
        return {}

    def opener(
        self, connect: Callable[..., Any], params: Any, level: str, version: str
    ) -> Callable[..., Any] | None:
        """Return what opens a connection as ``connect`` does, and sets its isolation level.

        :param connect: the driver's own function, or what stands in its place.
        :param level: as in SQL, in capitals.
        :param version: what the server says it is.
        :returns: None where that would cost a packet more, or is not sure to be the last word.
        """
        return None

    def greeting(self, connection: Any) -> str:
        """Return the version that the server has greeted with; "" if none is known."""
        return ""

    def trial_options(self, params: Any, seconds: float) -> dict[str, Any]:
        """Return connect() arguments that bound a throw-away connection too."""
        return {}

    def recording_options(self, params: Any) -> dict[str, Any]:
        """Return connect() arguments by which a packet may hold two statements."""
        return {}

    def takes_two(self, params: Any) -> bool:
        """Return whether a packet may hold two statements on connections made with ``params``."""
        return False

    def may_write(self, connection: Any, asks: bool) -> bool:
        """Return whether, as far as the driver knows, the open transaction takes a write.

        :param asks: ask the server, if its refusal of a write would end the transaction.
        :raises Exception: the driver's error: it may ask the server.
        """
        return True

    def goes_on_without(self, exc: BaseException, by_server: bool) -> bool:
        """Return whether a transaction in which ``exc`` refused a write takes none, and is open.

        :param by_server: a server itself refused it, and no proxy in its place.
        """
        return False

    def commit_after(self, connection: Any, statement: str, together: bool) -> None:
        """Run ``statement`` and COMMIT.

        What ``statement`` met is marked (:func:`is_marked`), where the driver knows that it
        was not COMMIT.

        :param together: in one packet.
        :raises Exception: the driver's error.
        """
        try:
            with contextlib.closing(connection.cursor()) as cursor:
                cursor.execute(statement)
        except Exception as exc:
            mark(exc, "of_first")
            mark(exc, "alone")
            raise
        connection.commit()

    def code_of(self, exc: BaseException) -> Any:
        """Return the error's code, if it has one."""
        return None

    def about(self, exc: BaseException) -> str:
        """Return what ``exc`` is about: its table's name, or a text that may have it."""
        return str(exc)

    def is_option_error(self, exc: BaseException) -> bool:
        """Return whether the driver says that it cannot take an option."""
        return False

    def is_closed(self, connection: Any) -> bool:
        """Return whether the driver knows that the connection is gone."""
        return False

    def is_answer(self, exc: BaseException) -> bool:
        """Return whether ``exc`` is the server's answer: the socket is what it was."""
        return True

    def proves_not_run(self, exc: BaseException) -> bool:
        """Return whether one plain statement that a server answered with ``exc`` did not run."""
        return False

    def outcome_is_unknown(self, exc: BaseException) -> bool:
        """Return whether a COMMIT that was sent and met ``exc`` may stand or not.

        It is no conflict, and does not prove that nothing ran: :meth:`proof` has seen that.
        """
        return self.fault(exc, connecting=False) is Fault.LOST

    def proof(self, exc: BaseException, fault: Fault) -> Proof:
        """Return what ``exc`` proves of the statement, or of the COMMIT, that met it."""
        if self.proves_not_run(exc):
            return Proof.NOT_RUN
        if fault is Fault.CONFLICT:
            return Proof.ROLLED_BACK
        return Proof.UNDECIDED if self.outcome_is_unknown(exc) else Proof.ANSWERED

    def question_of(self, exc: BaseException) -> str:
        """Return what a trial must ask a peer that answered with ``exc``."""
        return ""

    def may_be_busy(self, exc: BaseException) -> bool:
        """Return whether a proxy says ``exc`` both without a server and when all its
        connections are in use."""
        return False

    def fileno(self, connection: Any) -> int | None:
        """Return the descriptor of the connection's socket, where it is public."""
        return None

    def leave(self, connection: Any) -> None:
        """Part this process from a connection that is another's, without a word to the server."""

    def ping(self, connection: Any) -> None:
        """Raise the driver's error if the connection is lost."""

    def is_busy(self, connection: Any) -> bool:
        """Return whether statements have been sent whose results are still unread."""
        return False

    def leads_to(self, connection: Any) -> tuple[str, str] | None:
        """Return the host and port that a connection was opened to, where it knows them."""
        return None

    def keepalive_options(self, params: Any, seconds: float) -> dict[str, Any]:
        """Return arguments that have the driver do what :func:`.sockets.keepalive` does."""
        return {}

    def socket_options(self, connection: Any, params: Any) -> frozenset[str]:
        """Return the names of the socket's options that the driver's own arguments set."""
        return frozenset()

    def ends_its_cursors(self, connection: Any) -> bool:
        """Return whether closing a connection ends its cursors, and waits for its statements."""
        return False

    def is_unbuffered(self, params: Any) -> bool:
        """Return whether cursors made with these arguments leave rows on the wire."""
        return False

    def as_text(self, connection: Any, sql: Any) -> Any:
        """Return the text that the driver makes of a statement; as it is if that is not known."""
        return sql

    def is_usual(self, connection: Any, cls: type) -> bool:
        """Return whether values of type ``cls`` become SQL in the driver's own way or Django's."""
        return False

    def status(self, connection: Any) -> Callable[[], object] | None:
        """Return what says, without a round trip, whether a transaction is open; None where
        the driver still knows that after the loss of the connection, or never does."""
        return None

    def in_transaction(self, connection: Any) -> bool | None:
        """Return whether something was sent in an open transaction, as of the last answer; None:
        the driver does not know."""
        return None

    def is_at_rest(self, connection: Any) -> bool:
        """Return whether, as far as the driver knows, autocommit is on and no transaction open."""
        return True

    def counter(self, connection: Any) -> Counter | None:
        """Return what counts what is sent over the connection; None where nothing is known."""
        return None

    def is_in_step(self, connection: Any, exc: BaseException) -> bool:
        """Return whether no answer is outstanding after ``exc``, which is no error of the
        driver's, came out of one of its methods."""
        return True


#: Any other driver.
generic = Driver()
