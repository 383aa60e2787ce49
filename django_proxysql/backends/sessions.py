"""What is known of one established connection, and how it is given up."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from django.db.utils import Error

from ..core import drivers
from ..core.circuit import CLOSED
from ..core.group import PeerGroup
from ..core.holdings import Holdings
from ..core.peer import Peer
from ..core.permits import Permit
from ..core.texts import VALUES
from .pools import close_for_good
from .state import Health

#: What a driver, or what it calls, raises of the arguments it was given. All else that is no
#: error of a driver comes from elsewhere: Ctrl-C, a task's time limit, a greenlet's end.
OF_THE_CALL = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NameError,
    NotImplementedError,
    StopIteration,
    TypeError,
    ValueError,
    Warning,
    Error,
)


class MadeWith(NamedTuple):
    """What a connection was made with, where that counts afterwards."""

    #: Looks at the socket; None where that cannot be done.
    poll: Callable[[int], object] | None = None
    #: Seconds after which a loss may be a time-out: the two read alike.
    read_timeout: float = math.inf
    #: Rows may lie on the wire between two statements.
    unbuffered: bool = False
    #: The database; "" if the parameters name none.
    database: str = ""
    #: A packet may hold two statements. False, too, once something in between took none.
    takes_two: bool = False


class Session(Health):
    """One driver connection's state, from the moment it was handed out.

    Belongs to one wrapper, and so to one thread at a time. Its health is the
    :class:`~.state.Health` that it is; what it holds is :attr:`holds`.
    """

    __slots__ = (
        "__weakref__",
        "balancer",
        "budget",
        "clock",
        "connection",
        "database",
        "holds",
        "idle",
        "is_server",
        "known_types",
        "lost_results",
        "peer",
        "permit",
        "read_timeout",
        "results",
        "sending",
        "served",
        "server_side",
        "status",
        "takes_two",
        "unbuffered",
        "used",
        "version",
        "wrote",
    )

    def __init__(
        self,
        connection: Any,
        peer: Peer,
        balancer: PeerGroup,
        permit: Permit | None,
        made_with: MadeWith,
        status: Callable[[], object] | None = None,
    ) -> None:
        super().__init__(made_with.poll)
        self.connection = connection
        self.peer = peer
        self.balancer = balancer
        self.budget = balancer.budget
        self.clock = balancer.clock
        #: What the connection was made with: it knows the circuit's generation.
        self.permit = permit
        #: The statement and its parameters that are under way; None between two statements.
        self.sending: tuple[Any, Any] | None = None
        _, self.read_timeout, self.unbuffered, self.database, self.takes_two = made_with
        #: Asks the driver whether a transaction is open, where it knows only before a loss.
        self.status = status
        idle = balancer.config.idle_check
        #: Seconds of idleness after which a read, too, looks first.
        self.idle = math.inf if idle is None else idle
        #: Whether it leads to the server that greeted it, and not to one behind a proxy (MySQL
        #: family); None if it has not been asked.
        self.is_server: bool | None = None
        #: Types of parameters that this connection quotes: no SQL of its own is in them.
        self.known_types: set[type] = set(VALUES)
        #: Its session state: never lost without the application's knowledge.
        self.holds = Holdings()
        #: It may have written in this request, and so left something to ask for: LAST_INSERT_ID().
        #: Unlike :attr:`wrote`, idleness does not end this.
        self.results = False
        #: IDS, RESULT: what is asked for by these went with an earlier connection.
        self.lost_results = 0
        #: It may have written in this request or task.
        self.wrote = False
        #: A statement has succeeded on it.
        self.served = False
        #: Named cursors that are open on it: a WeakSet, once there is one.
        self.server_side: Any = ()
        #: When a statement was last begun on it.
        self.used = self.clock()
        #: The balancer's version at which the peer's circuit was found closed,
        #: or leaving it found impossible. None if it was not: the peer was drained,
        #: or given up, while the connection was being made. (Read before we look:
        #: a change that comes between leaves a new version behind.)
        self.version: object = balancer.version
        if peer.drained or peer.breaker.circuit.state != CLOSED:
            self.version = None

    def has_timed_out(self) -> bool:
        """Return whether a loss now may be a time-out: the two read alike."""
        return self.clock() - self.used >= self.read_timeout * 0.98


def current(db: Any) -> Session | None:
    """Return the session of the connection that is in place, if it is ours to look after."""
    session = db._session
    if session is None or db._quiet or session.connection is not db.connection:
        return None
    return None if db._attempt is not None else session


def abandon(db: Any, session: Session, exc: BaseException) -> None:
    """Never use a connection again: its next answer may be an interrupted statement's.

    It is closed at once, so that no statement can be sent over it, and
    replaced at the next safe point. If it held session state, the next
    statement is an error: the application does not know yet that the state is gone.
    """
    db._transaction.statement_sent()
    session.lose(f"interrupted by {drivers.describe(exc)}")
    close_for_good(session.connection)


def interrupted(db: Any, exc: BaseException) -> None:
    """Take note of an exception out of a driver's method that is no error of the driver's."""
    session = current(db)
    if session is None:
        return
    if isinstance(exc, OF_THE_CALL) and db._driver.is_in_step(session.connection, exc):
        return
    abandon(db, session, exc)
