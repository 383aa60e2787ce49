"""Established connections: find what is lost before it is used, and save what can be saved.

Three questions are asked here, each with one rule:

* *May this connection be replaced now?* (:meth:`SafePointsMixin._is_safe`)
  Only at a safe point: in autocommit, outside every block, with no result
  unread and no state held in the session. A connection found lost elsewhere
  is marked and stays in place: replacing it inside a transaction would commit
  one half of it and lose the other.
* *Is it lost?* (:meth:`_is_lost`) The socket is looked at, without a round
  trip, before what cannot be repeated once it is sent.
* *May this statement be run again?* (:meth:`_run_again`) Only if the error
  proves that it did not run, or the text proves that running it twice changes
  nothing. COMMIT is never repeated.

One seam, ``wrap_database_errors``, sees every driver error.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import itertools
import math
import time
from collections.abc import Callable
from typing import Any

from django.db.utils import DatabaseErrorWrapper, Error, OperationalError
from django.utils.functional import cached_property

from ..core import drivers, ready, sockets
from ..core.balancer import Attempt
from ..core.breaker import CLOSED
from ..core.events import ConnectionLost, ConnectionReplaced, StatementReplayed
from ..core.exceptions import NotReady
from ..core.faults import Fault, Loss, loss_counts
from ..core.holdings import Holdings, Replacing, asks_for_a_lock
from ..core.parameters import VALUES, are_small, are_values, may_be_sql
from ..core.statements import (
    IDS,
    READ,
    RESULT,
    SCOPED,
    STATE,
    is_provable_read,
    makes_ids,
    scan,
    without_lock,
    writes,
)
from ..core.texts import Text, is_of_transaction, tells_time, text_of
from ..errors import CommitOutcomeUnknown
from ..registry import Registered
from .connecting import LoadBalancedMixin
from .cursors import cursor_class, note_named
from .decisions import Cause, How, Lost, Place, Replay, leaves_no_trace, may_replay
from .pools import close_for_good, close_in_child, give_back, is_pooled
from .refusals import Answer, after_read_only
from .replays import ReadOnly, Refused, is_undone, reads_anew, refuses
from .sessions import Session
from .state import BEGUN, NO_TRANSACTION, Stage, Transaction

__all__ = ["SafePointsMixin"]

#: What Django's connect() resets, and what a transaction that is started anew
#: on another connection must keep.
_OF_THE_TRANSACTION = (
    "in_atomic_block",
    "savepoint_ids",
    "savepoint_state",
    "atomic_blocks",
    "needs_rollback",
    "rollback_exc",
    "commit_on_exit",
    "run_on_commit",
    "run_commit_hooks_on_set_autocommit_on",
)
#: What else connect() changes, to be put back if the new connection fails.
_OF_THE_CONNECTION = (
    "autocommit",
    "close_at",
    "closed_in_transaction",
    "errors_occurred",
    "health_check_done",
    "health_check_enabled",
    "isolation_level",
)

#: Rows of an executemany() that are sent again, and the most that each may hold.
_MOST_ROWS = 10_000

#: psycopg 3's names, psycopg2's numbers.
_NOT_SERIALIZABLE = ("READ_UNCOMMITTED", "READ_COMMITTED", "REPEATABLE_READ", "1", "2", "4")

#: A statement with more than this may be over the server's max_allowed_packet (MySQL's least
#: default is 1 MB, and what is escaped grows): its connection's end may be its own doing.
_LARGE_PACKET = 250_000


#: What a driver, or what it calls, raises of the arguments it was given. All else that is no
#: error of a driver comes from elsewhere: Ctrl-C, a task's time limit, a greenlet's end.
_OF_THE_CALL = (
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


class _ErrorSeam(DatabaseErrorWrapper):
    wrapper: Any

    def __exit__(self, exc_type: Any, exc_value: Any, traceback: Any) -> None:
        if exc_type is None:
            # Each statement comes by here.
            return
        if isinstance(exc_value, self.wrapper.Database.Error):
            self.wrapper._saw(exc_value)
        elif exc_type is not GeneratorExit:
            self.wrapper._interrupted(exc_value)
        super().__exit__(exc_type, exc_value, traceback)


class SafePointsMixin(LoadBalancedMixin):
    """Looks after the connection between connect() and close()."""

    #: The present connection's; None where nothing is looked after (SQLite).
    _session: Session | None = None
    #: Statements of our own are under way: nothing is to be seen.
    _quiet = False
    #: A statement is run again in a READ ONLY transaction of our own.
    _read_only = False
    #: A statement of Django's own is under way, which leaves no state that it does not look after.
    _of_ours = False
    #: The transaction that is open, by an atomic block or by hand.
    _transaction = NO_TRANSACTION
    #: The log of queries, while another is in its place.
    _own_log: Any = None
    #: close_old_connections() is called for this wrapper: it ends units of work.
    _has_units = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Have an engine over this one send for each cursor what it sends."""
        super().__init_subclass__(**kwargs)
        theirs = cls._cursor
        if theirs is not SafePointsMixin._cursor and not hasattr(theirs, "sets_cursors_up"):
            cls._cursor = _setting_up(theirs)  # type: ignore[method-assign]

    #: Numbers for wrappers, each of which is one thread's or task's.
    _callers = itertools.count()

    @cached_property
    def _caller(self) -> int:
        """Tell this wrapper's thread or task from all others of the process."""
        return next(self._callers)

    # Made

    def _open_one(self, registered: Registered, attempt: Attempt) -> Any:
        connection = super()._open_one(registered, attempt)
        session = None
        if self._driver.WATCHED:
            session = self._new_session(registered, attempt, connection)
            # Out of a pool: it has been one for a while, and is lost like any other.
            session.served = is_pooled(connection)
            if self._session is not None:
                self._follow(self._session, session)
        self._session = session
        # Without autocommit in the settings there is one at once, and what is in it not known.
        self._transaction = (
            NO_TRANSACTION if self.autocommit else Transaction(by_hand=True, stage=Stage.ACTIVE)
        )
        return connection

    def _follow(self, before: Session, session: Session) -> None:
        """Take over from this request's last connection what the new one must know of it.

        Each way from one connection to the next comes by here: a replacement, a replay,
        and Django's own connecting after a block that was lost, or after close().

        A read on another Galera node right after a write was stale in a
        quarter of all tries (seen); once the node has caught up it is not.

        :raises Exception: the driver's: the node was lost meanwhile, or could not catch up
            in time. The attempt to connect has failed then.
        """
        session.wrote = before.wrote
        session.lost_results = IDS | RESULT if before.results else before.lost_results
        if (before.results or before.lost_results) and self.vendor == "mysql":
            try:
                ready.catch_up(session.connection)
            except BaseException:
                self._discard()
                raise

    def get_new_connection(self, conn_params: dict[str, Any]) -> Any:
        """Open the driver's connection, and have the kernel notice its host's death."""
        connection = super().get_new_connection(conn_params)
        try:
            self._watch_over(connection, conn_params)
        except BaseException:
            give_back(connection)
            raise
        return connection

    def _watch_over(self, connection: Any, conn_params: dict[str, Any]) -> None:
        registered = self._registered()
        if registered is not None and self._driver.WATCHED:
            seconds = registered.balancer.config.tcp_user_timeout
            self._read_timeout = min(
                math.inf if seconds is None else float(seconds),
                sockets.harden(
                    self._driver.fileno(connection),
                    seconds,
                    self._driver.socket_options(connection, conn_params),
                ),
            )
            for option in ("read_timeout", "write_timeout"):
                if conn_params.get(option) is not None:
                    self._read_timeout = min(self._read_timeout, float(conn_params[option]))
            self._unbuffered = self._driver.is_unbuffered(conn_params)

    _read_timeout = math.inf
    _unbuffered = False

    def _new_session(self, registered: Registered, attempt: Attempt, connection: Any) -> Session:
        return Session(
            connection,
            attempt.peer,
            registered.balancer,
            attempt.permit,
            sockets.watch(self._driver.fileno(connection)),
            self._read_timeout,
            self._unbuffered,
            self._driver.status(connection),
        )

    def _current(self) -> Session | None:
        """Return the session of the connection that is in place, if it is ours to look after."""
        session = self._session
        if session is None or self._quiet or session.connection is not self.connection:
            return None
        return None if self._attempt is not None else session

    # Seen

    @cached_property
    def wrap_database_errors(self) -> DatabaseErrorWrapper:
        """Django's translation of driver errors, with our ears on it."""
        return _ErrorSeam(self)

    def _saw(self, exc: BaseException) -> None:
        """Take note of a driver error on the established connection. Never raises."""
        session = self._current()
        if session is not None:
            with contextlib.suppress(Exception):
                self._judge(session, exc)
            session.sending = None
            if session.dead:
                session.told = True

    def _interrupted(self, exc: BaseException) -> None:
        """Take note of an exception out of a driver's method that is no error of the driver's."""
        session = self._current()
        if session is None:
            return
        if isinstance(exc, _OF_THE_CALL) and self._driver.is_in_step(session.connection, exc):
            return
        self._abandon(session, exc)

    def _abandon(self, session: Session, exc: BaseException) -> None:
        """Never use a connection again: its next answer may be an interrupted statement's.

        It is closed at once, so that no statement can be sent over it, and
        replaced at the next safe point. If it held session state, the next
        statement is an error: nobody has said so far that the state is gone.
        """
        self._transaction.statement_sent()
        session.poll = None
        session.error = session.error or f"interrupted by {drivers.describe(exc)}"
        session.dead = True
        close_for_good(session.connection)

    def _judge(self, session: Session, exc: BaseException, idle: bool = False) -> None:
        driver = self._driver
        fault = drivers.judge(exc, connecting=False)
        breaker = session.peer.breaker
        known_dead = session.dead
        if fault is Fault.NOT_READY:
            if self._read_only and driver.is_read_only_refusal(exc):
                # What is run again as a read was none: that says nothing of the peer.
                return
            if driver.is_closed(session.connection):
                # A pooler without a server says so, and hangs up.
                session.dead, session.poll = True, None
                session.error = drivers.describe(exc)
                _mark_as_end(exc)
            if self._is_given_up(session, exc):
                session.dropped = True
                session.error = drivers.describe(exc)
                _mark_as_end(exc)
            elif session.dead:
                # It may be busy: the next connect goes elsewhere first.
                breaker.suspect(drivers.describe(exc), fault)
            return
        # psycopg knows for certain; mysqlclient's error says it.
        lost = fault is Fault.LOST
        if driver.is_closed(session.connection):
            lost = fault not in (Fault.KILLED, Fault.OVERLOADED)
            session.dead = True
        if fault is Fault.KILLED and driver.is_killed_connection(exc):
            session.dead = True
        is_news = lost and not (session.dead and session.error)
        is_failed_connect = is_news and loss_counts(self._loss(session, idle))
        session.dead = session.dead or lost
        if session.dead:
            if fault is not Fault.KILLED:
                _mark_as_end(exc)
            session.error = session.error or drivers.describe(exc)
            session.poll = None
            if not known_dead:
                # What is raised of it later says nothing of how it ended.
                session.timed_out = not idle and session.has_timed_out()
        elif not driver.is_answer(exc):
            # The number of its socket may belong to another connection by now.
            session.unsure = True
            session.poll = None
        if fault is Fault.OVERLOADED and session.dead:
            # A pooler without a server to spare hangs up: the next connect goes elsewhere.
            breaker.suspect(drivers.describe(exc), fault)
        if is_news:
            # Last: who is told may ask the database, and is to find the connection dead.
            if is_failed_connect and session.permit is not None:
                breaker.count_failure(exc, Fault.LOST, session.permit.generation)
            else:
                breaker.suspect(drivers.describe(exc), Fault.LOST)
            self._emit(
                session,
                ConnectionLost(
                    session.balancer.name,
                    session.peer.name,
                    session.peer.address,
                    fault,
                    drivers.describe(exc),
                    idle,
                ),
            )

    def _is_given_up(self, session: Session, exc: BaseException) -> bool:
        """Judge a peer that is not ready by what it says when asked; return whether the
        connection is to be replaced."""
        breaker = session.peer.breaker
        question = self._driver.question_of(exc)
        if self._driver.may_be_busy(exc):
            return breaker.circuit.state != CLOSED or self._has_no_server(session, exc)
        # Before the circuit opens, for what is known of the peer is forgotten then.
        asks = question == "writable" or (self._driver.SPLITS and self._driver.proves_not_run(exc))
        writer = self._ask(session) if asks else None
        if question == "writable":
            if not session.balancer.needs_writer:
                # Elsewhere it is the application's own affair.
                return False
            own = _answer_of(writer)
            new = Answer.UNKNOWN if own is Answer.WRITABLE else self._ask_anew(session)
            verdict = after_read_only(own, new)
            session.doubted = verdict.asks_later
            if not verdict.opens:
                return verdict.drops
        breaker.trip(exc, Fault.NOT_READY, question)
        return True

    def _loss(self, session: Session, idle: bool) -> Loss:
        """Return what is known of a connection that is lost now."""
        peer, balancer = session.peer, session.balancer
        sql, params = session.sending or (None, None)
        timed_out = not idle and session.has_timed_out()
        elsewhere = False
        if not (idle or timed_out):
            elsewhere = balancer.losses.note(peer.name, sql, self._caller)
        return Loss(
            served=session.served,
            idle=idle,
            watched=session.poll is not None,
            timed_out=timed_out,
            large=not are_small(params, _LARGE_PACKET) or not are_small((sql,), _LARGE_PACKET),
            elsewhere=elsewhere,
            last=not balancer.can_spare(peer),
        )

    def _ask(self, session: Session) -> ready.Writer | None:
        """Ask the connection itself what takes its writes; None if it does not answer now."""
        if session.dead or session.unbuffered or self._driver.is_busy(session.connection):
            return None
        try:
            writer = ready.writer_of(session.connection)
        except BaseException as exc:
            session.is_server = session.peer.is_server
            if drivers.is_driver_error(exc):
                return None
            # A time limit, say: the answer that comes next may be this question's.
            self._interrupted(exc)
            raise
        session.peer.note_server(writer.is_server)
        session.is_server = session.peer.is_server
        return writer

    def _ask_anew(self, session: Session) -> Answer:
        """Ask a new connection to the same peer whether it takes writes."""
        circuit = session.peer.breaker.circuit
        if circuit.state != CLOSED and circuit.question == "writable":
            # Another thread has asked just now.
            return Answer.READ_ONLY
        try:
            with self._throw_away(session) as connection:
                ready.writable(connection)
        except NotReady:
            return Answer.READ_ONLY
        except Exception:
            return Answer.UNKNOWN
        return Answer.WRITABLE

    def _has_no_server(self, session: Session, exc: BaseException) -> bool:
        """Ask a proxy, on a new connection, whether a server behind it answers.

        It says the same where all its connections to them are in use. The last
        peer is not asked: it is kept whatever it says.

        :returns: whether the circuit is open now.
        """
        balancer, peer = session.balancer, session.peer
        now = session.clock()
        # One thread at a time: each who asks takes one more connection.
        if now < peer.asked_until or not balancer.can_spare(peer):
            return False
        since = session.used
        if peer.has_served(since):
            # Others are being served, and this one was unlucky.
            peer.unanswered = 0
            return False
        peer.asked_until = now + 2 * balancer.config.connect_timeout
        try:
            with self._throw_away(session) as connection:
                ready.backend(connection)
        except Exception as error:
            if not drivers.judge(error, connecting=True).counts:
                # Full, or the trouble is on this side.
                return False
        else:
            peer.unanswered = 0
            return False
        finally:
            peer.asked_until = -math.inf
        return balancer.count_unanswered(peer, exc, since)

    def _settle_doubt(self, session: Session) -> None:
        """Ask a connection that could not be asked when a write was refused on it."""
        session.doubted = False
        if _answer_of(self._ask(session)) is Answer.READ_ONLY:
            session.dropped = True
            session.error = session.error or "the server takes no writes"

    def _throw_away(self, session: Session) -> contextlib.AbstractContextManager[Any]:
        registered = self._registered()
        assert registered is not None
        own = self.settings_dict
        settings = registered.to_connect_with(session.peer, own, self.alias)
        before = self._peer_settings
        try:
            self._peer_settings = settings
            params = self.get_connection_params()
        finally:
            self._peer_settings = before
        config = session.balancer.config
        seconds = config.trial_timeout or config.connect_timeout
        return ready.throw_away(self._driver, self.Database.connect, params, seconds)

    def is_usable(self) -> bool:
        """Ask the driver; what it says counts for the peer, too."""
        session = self._current()
        if session is not None:
            self._notice_unseen(session)
        usable: bool = super().is_usable()
        session = self._current()
        if session is None or usable or session.dead:
            return usable
        # PostgreSQL answers nothing in a transaction that has failed: that is no loss, and the
        # driver's own ping knows of it.
        try:
            self._driver.ping(session.connection)
        except Exception:
            session.dead = True
            session.poll = None
            session.peer.breaker.suspect("the connection was found unusable", Fault.LOST)
        return usable

    # Asked

    def _is_safe(self, session: Session, why: Replacing | None = None) -> bool:
        """Return whether the connection may be replaced and nobody could tell.

        :param why: None: because it is dead, or because its peer is to be left.
        """
        if self.in_atomic_block or not self.autocommit or self._transaction.is_of_atomic:
            return False
        if self._thread_sharing_count > 0:  # type: ignore[attr-defined]
            return False
        why = why or (Replacing.LOST if session.dead else Replacing.LEAVING)
        if not session.holds.may_go(why, session.told):
            return False
        if session.dead and session.told:
            # What was in it is gone, and the application knows.
            return True
        return not (
            session.unbuffered
            or session.server_side
            or self._driver.is_busy(session.connection)
            or not (session.dead or self._driver.is_at_rest(session.connection))
        )

    def _notice_unseen(self, session: Session) -> None:
        """Take note of what was sent in a transaction and is not known to be nothing.

        The driver's own cursor and connection, and psycopg's, are anybody's:
        nothing that is done by them passes here. To be asked before the loss
        of a connection is noticed.
        """
        transaction = self._transaction
        if transaction.reads is None or session.dead:
            return
        if transaction.reads:
            mark = transaction.mark
            untouched = mark is not None and mark == self._driver.sent(session.connection)
        else:
            untouched = self._is_untouched(session, transaction)
        if not untouched:
            transaction.statement_sent()

    def _is_untouched(self, session: Session, transaction: Transaction) -> bool:
        """Return whether nothing was sent in a transaction but Django's own SAVEPOINTs."""
        driver, connection = self._driver, session.connection
        if driver.is_closed(connection):
            return False
        if transaction.mark is None:
            return driver.in_transaction(connection) is False
        return bool(transaction.mark == driver.sent(connection))

    def _mark(self, session: Session) -> None:
        """Take note of what has been sent, unless the driver can tell that nothing was."""
        driver, connection = self._driver, session.connection
        knows = driver.in_transaction(connection) is False
        self._transaction.mark = None if knows else driver.sent(connection)

    def _is_lost(self, session: Session) -> bool:
        """Look at the socket, and ask the driver if there is something to be read."""
        if session.dead:
            return True
        poll = session.poll
        if poll is None:
            if not session.unsure:
                return False
        elif not poll(0):
            return False
        try:
            self._driver.ping(session.connection)
        except BaseException as exc:
            if not isinstance(exc, (self.Database.Error, ConnectionError, *_OF_THE_CALL)):
                # Its answer may come yet.
                self._abandon(session, exc)
                raise
            if drivers.judge(exc, connecting=False) is Fault.OTHER and self._driver.is_answer(exc):
                return False
            if self._driver.code_of(exc) == 2014:
                # Results that nobody has read: the connection is healthy.
                session.sticky = True
                return False
            with contextlib.suppress(Exception):
                self._judge(session, exc, idle=True)
            session.dead = True
            # Kept to be raised, if need be; its frames are nobody's to keep.
            session.loss = exc.with_traceback(None)
            session.poll = None
            return True
        if self._transaction.stage is Stage.BEGUN:
            self._mark(session)
        elif self._transaction.reads:
            self._transaction.mark = self._driver.sent(session.connection)
        if session.unsure:
            session.unsure = False
            session.poll = sockets.watch(self._driver.fileno(session.connection))
        return False

    # Safe points

    def _cursor(self, name: str | None = None) -> Any:
        if self._attempt is not None:
            # Django's own, while it sets the connection up.
            return super()._cursor(name)  # type: ignore[misc]
        session = self._current()
        if session is not None and (session.dead or name is not None):
            # psycopg makes no cursor on a closed connection; and what a named
            # cursor reads cannot follow it to another one.
            self._before_cursor(session)
        told = session is not None and session.told
        pending = None
        if self._transaction.stage is BEGUN:
            pending = self._pending(session)
        try:
            cursor = super()._cursor(name)  # type: ignore[misc]
        except Error:
            # The first that is heard of it: COPY's errors pass by every seam.
            if session is None or session is not self._session or not session.dead:
                raise
            session.told = False
            self._before_cursor(session)
            if session is self._session:
                session.told = True
                raise
            cursor = super()._cursor(name)  # type: ignore[misc]
        if session is not None and session is self._session:
            # What the peer engine sends for each cursor may have met the loss, and the
            # engine kept it to itself: django-tenants does.
            session.told = told
        if pending is not None:
            self._was_set_up(pending)
        session = self._session
        if session is None or self._quiet:
            return cursor
        cls = cursor.__class__
        ours = cursor_class(cls)
        if ours is not cls:
            cursor.__class__ = ours
        cursor._session = session
        if name is not None:
            note_named(cursor, session)
        return cursor

    def _pending(self, session: Session | None) -> Transaction | None:
        """Return the transaction that has only begun, if making a cursor may send something."""
        if session is None or not _sets_up(self.__class__):  # type: ignore[arg-type]
            return None
        self._notice_unseen(session)
        return self._transaction if self._transaction.stage is BEGUN else None

    def _was_set_up(self, pending: Transaction) -> None:
        """Note that what was sent for a cursor is no statement: it is sent for each one."""
        session = self._current()
        if pending is self._transaction and session is not None and not session.dead:
            pending.only_savepoints_sent()
            self._mark(session)

    def _before_cursor(self, session: Session) -> None:
        now = session.clock()
        if self.in_atomic_block:
            self._before_first(session, READ, now)
        else:
            self._at_safe_point(session, READ, now)

    def _before_statement(
        self, cursor: Any, kind: int, now: float, sql: Any, params: Any
    ) -> Session:
        """Have ``cursor`` on a connection that is as good as can be known.

        :raises OperationalError: what the statement asks for went with an earlier connection.
        """
        session = self._session
        assert session is not None
        if self._read_only:
            self._give_up()
        if self.in_atomic_block:
            self._before_first(session, kind, now)
        else:
            if (
                session.status is not None
                and self.autocommit
                and not session.dead
                and not self._driver.is_at_rest(session.connection)
            ):
                # A transaction that was begun past us is state like a raw BEGIN's.
                # Once the connection is lost the driver knows no longer.
                session.sticky = True
            self._at_safe_point(session, kind, now)
        session = self._session
        assert session is not None
        if kind & session.lost_results:
            self._raise_lost_results(session)
        if cursor._session is not session:
            session = self._bind(cursor)
        if kind & STATE:
            self._takes(session, sql, params)
        return session

    def _raise_lost_results(self, session: Session) -> None:
        raise OperationalError(
            f"{session.balancer.name}: what this statement asks for went with a connection "
            "that was replaced. LAST_INSERT_ID(), lastval(), ROW_COUNT() and the like "
            "answer for one connection only, and the new one would answer for itself."
        )

    def _takes(self, session: Session, sql: Any, params: Any) -> None:
        """Take note, before it is sent, of a statement that leaves something in the session."""
        # For a replay of it, alone.
        self._held_before = bool(session.holds)
        if not self._of_ours and not self._ends_with_block(sql):
            session.holds.sent(sql, params)

    #: Whether the session held anything when the last statement that takes something was sent.
    _held_before = True

    def _ends_with_block(self, sql: Any) -> bool:
        """Return whether what a statement sets ends with the atomic block: SET TRANSACTION."""
        in_block = self._transaction.is_of_atomic and self.vendor == "postgresql"
        return in_block and is_of_transaction(sql)

    def _note_answered(self, session: Session, kind: int, sql: Any, params: Any) -> None:
        """Take note of a statement that was answered in a block that has only read so far."""
        transaction = self._transaction
        if kind != READ:
            transaction.statement_sent()
            return
        transaction.read_answered(sql, params)
        transaction.mark = self._driver.sent(session.connection)

    def _after_statement(
        self, cursor: Any, session: Session, kind: int, sql: Any, params: Any
    ) -> None:
        """Take note of what a statement that succeeded, and is no plain read, has changed."""
        if session.holds.for_life:
            session.holds.answered(sql, params)
            if kind & STATE and asks_for_a_lock(sql) and _answers_no(cursor.cursor):
                session.holds.refused(sql, params)
        if writes(kind):
            _has_results(session, sql)

    def _before_other(self, cursor: Any, sql: Any, params: Any) -> Session | None:
        """Before what is never run again: callproc.

        :returns: the session that it is sent on, where that is looked after.
        """
        session = self._before_many(cursor, sql, params)
        if session is not None:
            self._unseen()
        return session

    def _before_many(self, cursor: Any, sql: Any, params: Any) -> Session | None:
        session = self._current()
        if session is None or cursor._named:
            return None
        kind = scan(sql) & ~READ
        now = session.clock()
        session = self._before_statement(cursor, kind, now, sql, None)
        session.used = now
        session.sending = (sql, params)
        session.wrote = session.results = True
        return session

    def _unseen(self) -> None:
        """Take note of what may be sent and will not be seen: it counts as a write."""
        self._transaction.statement_sent()
        session = self._session
        if session is not None:
            session.wrote = session.results = True

    def _bind(self, cursor: Any, name: str | None = None) -> Session:
        """Give ``cursor`` a driver's cursor on the present connection; return its session.

        It is made as the peer engine makes one: what the engine sends for each cursor
        (a tenant's schema, a role) is sent for this one.
        """
        made = self._cursor(name)
        if name is not None:
            # psycopg complains about a server-side cursor that nobody has closed.
            with contextlib.suppress(Exception):
                cursor.cursor.close()
        cursor.cursor = made.cursor
        cursor._session = self._session
        if name is not None:
            note_named(cursor, cursor._session)
        return cursor._session  # type: ignore[no-any-return]

    def settle(self) -> None:
        """Leave a lost connection, and a peer that is out, if nobody can tell.

        For whoever is about to stay with this connection's peer.

        :raises Exception: what connect() raised, as Django translates it: nobody can be had.
        """
        session = self._current()
        if session is not None and not self.in_atomic_block:
            self._at_safe_point(session, 0, session.clock())

    def _at_safe_point(self, session: Session, kind: int, now: float) -> None:
        """In autocommit, before something is sent: replace what is lost or to be left."""
        if not self._is_safe(session):
            if session.dead and not session.told and session.holds:
                self._raise_loss(session)
            return
        if kind & SCOPED and not session.told:
            # LAST_INSERT_ID() of another connection is an answer, and wrong.
            return
        if session.doubted:
            self._settle_doubt(session)
        idle = now - session.used > session.idle
        if idle and not self._has_units:
            session.wrote = False
        if session.dead or ((idle or kind != READ) and self._is_lost(session)):
            self._replace(session, "last")
        elif session.dropped or session.version is not session.balancer.version:
            self._leave_if_out(session)

    def _raise_loss(self, session: Session) -> None:
        """Raise, once, that a connection is lost and what its session held with it.

        :raises OperationalError: always.
        """
        session.told = True
        held = ", ".join(session.holds.for_life) or "SET, a temporary table or the like"
        raise OperationalError(
            f"{session.balancer.name}: the connection to {session.peer.name} is lost "
            f"({session.error or 'it was closed'}), and with it what its session held: {held}. "
            "The next statement gets a new connection, which holds nothing."
        ) from session.loss

    def _before_first(self, session: Session, kind: int, now: float) -> None:
        """Inside a block: only before its first statement can anything be mended."""
        self._notice_unseen(session)
        if not self._may_restart(session) or kind & (SCOPED | STATE):
            return
        if session.dead or (now - session.used > session.idle and self._is_lost(session)):
            self._restart(session)

    def _may_restart(self, session: Session) -> bool:
        return (
            self._transaction.is_pending
            and not session.sticky
            and not session.held
            and not session.unbuffered
            and not session.server_side
            and not session.told
            and self._thread_sharing_count == 0  # type: ignore[attr-defined]
            and not self._driver.is_busy(session.connection)
        )

    def _leave_if_out(self, session: Session) -> None:
        """Leave a peer whose circuit has opened, or that is drained, if another can be had."""
        balancer = session.balancer
        version = balancer.version
        stay = balancer.pinned_to(session.peer)
        if stay is session.peer:
            return
        if stay is not None:
            self._replace(session, "last")
            return
        peer = session.peer
        if peer.breaker.circuit.state == "closed" and not (peer.drained or session.dropped):
            session.version = version
            return
        if session.wrote and not session.dropped:
            # What it wrote may not be seen elsewhere yet: at the unit's end.
            return
        if not session.dropped and not balancer.has_usable():
            session.version = version
            return
        try:
            self._replace(session, "last" if session.dropped else "never")
        except Exception:
            # It works, after a fashion; no other try until a circuit changes.
            session.version = balancer.version

    # Replaced

    def _replace(
        self, session: Session, trials: str, resume: Callable[[], object] | None = None
    ) -> None:
        """Put a new connection into the place of the present one.

        The new one is had before the old one is given up. If it cannot be had
        the old one stays, dead or not, with all that Django knows of it.

        :param resume: begins the transaction anew on the new connection.
        :raises Exception: what connect() raised, as Django translates it.
        """
        present = self._current()
        if present is not None and present is not session and not present.dead:
            # Who was told of the loss has asked the database: it is replaced already.
            return
        old, hold = self.connection, self._hold
        state = vars(self)
        kept = {k: state[k] for k in _OF_THE_TRANSACTION + _OF_THE_CONNECTION if k in state}
        transaction = self._transaction
        try:
            # Out of the way before connect(), which lets go of a hold. What sets
            # the new connection up is no query of the application's.
            self._restore_log()
            self._own_log, self.queries_log = self.queries_log, collections.deque()
            self._hold = None
            self.connection = None
            # As Django does before it connects anew. It closes nothing here, but an engine
            # may keep what it has set in the session, and forgets it in close().
            self.close()
            # connect() switches autocommit on, and Django runs hooks there.
            self.run_commit_hooks_on_set_autocommit_on = False
            with self.wrap_database_errors:
                self._connect(trials)
            for name in _OF_THE_TRANSACTION:
                if name in kept:
                    state[name] = kept[name]
            if resume is not None:
                self._transaction = transaction
                self._quietly(resume)
        except BaseException:
            new = self.connection
            if new is not None and new is not old:
                give_back(new)
                self._let_go()
            self.connection, self._session, self._hold = old, session, hold
            state.update(kept)
            self._transaction = transaction
            raise
        finally:
            self._restore_log()
        if hold is not None:
            hold.let_go()
        self._close_old(session)
        successor = self._session
        assert successor is not None
        self._emit(
            successor,
            ConnectionReplaced(
                session.balancer.name,
                session.peer.name,
                successor.peer.name,
                forced=session.dead,
                error=session.error,
            ),
        )

    def _restore_log(self) -> None:
        log, self._own_log = self._own_log, None
        if log is not None:
            self.queries_log = log

    def _connect(self, trials: str) -> None:
        self._trials = trials
        try:
            self.connect()
        finally:
            self._trials = "first"

    def _close_old(self, session: Session) -> None:
        """Close the connection that was replaced."""
        if self._driver.ends_its_cursors(session.connection) and not session.dead:
            # psycopg2 lets no cursor of a closed connection be read to its
            # end; it closes with the last of them.
            return
        give_back(session.connection)

    def _restart(
        self,
        session: Session,
        replay: Replay | None = None,
        sql: Any = None,
        params: Any = None,
    ) -> None:
        """Begin the transaction, in which nothing has changed yet, on another connection.

        :param replay: what must be known there before ``sql`` is run again.
        """

        def resume() -> None:
            if replay is not None:
                self._prove(replay, sql, params)
            self._begin_anew()
            if replay is None or not replay.reads_anew:
                return
            if not reads_anew(self.connection, self.vendor):
                raise NotReady("the transaction must see what it has read before")

        self._replace(session, "last", resume=resume)

    def _begin_anew(self) -> None:
        super()._set_autocommit(False)  # type: ignore[misc]
        self.autocommit = False
        for sid in self._transaction.savepoints:
            super()._savepoint(sid)  # type: ignore[misc]
        assert self._session is not None
        self._mark(self._session)

    def _quietly(self, work: Callable[..., Any], *args: Any) -> Any:
        """Run statements of our own or of Django's, which mean nothing to the session."""
        before = self._quiet
        try:
            self._quiet = True
            return work(*args)
        finally:
            self._quiet = before

    # Run again

    def _run_again(
        self,
        cursor: Any,
        session: Session,
        exc: Error,
        sql: Any,
        params: Any,
        kind: int,
        started: float,
        run: Callable[[], Any],
        single: bool = True,
    ) -> tuple[Session, Any] | None:
        """Run a lost statement again, if it may be; None if ``exc`` is to be raised.

        ``cursor`` is then bound to another connection, and the transaction, if
        there is one, begun anew.

        :param run: runs the statement on what ``cursor`` is bound to.
        :param single: it is not executemany().
        :raises Error: what became of the second run, unless it was refused.
        """
        cause = exc.__cause__
        if not (session.dead or session.dropped) or cause is None:
            return None
        lost = self._lost(cursor, session, cause, sql, params, kind, started, single)
        replay = may_replay(lost)
        if replay.how is How.NEVER or not session.budget.spend(sql):
            return None
        name = cursor.cursor.name if cursor._named else None
        told, session.told = session.told, False
        try:
            if self.in_atomic_block:
                self._restart(session, replay, sql, params)
            else:
                self._replace(session, "last")
            successor = self._bind(cursor, name)
            if kind & STATE and not self._of_ours and not self._ends_with_block(sql):
                successor.holds.sent(sql, params)
        except Exception:
            # What the application is raised is what happened to its statement.
            session.told = told
            return None
        successor.used = started
        successor.sending = (sql, params)
        balancer = session.balancer
        names = balancer.name, session.peer.name, successor.peer.name
        event = StatementReplayed(*names, drivers.describe(cause))
        try:
            result = run() if replay.how is How.AS_IT_IS else self._run_read_only(run)
        except Refused:
            # It was no read: what was lost is raised, and not what it is.
            if self.in_atomic_block:
                self._give_up()
            return None
        except Error:
            self._transaction.statement_sent()
            session.budget.bar(sql)
            self._emit(successor, event)
            raise
        self._emit(successor, event)
        return successor, result

    def _run_read_only(self, run: Callable[[], Any]) -> Any:
        """Run a statement within a READ ONLY transaction of its own, and end that.

        :raises Refused: the server does not take it for a read.
        """
        session = self._session
        assert session is not None
        frame = ReadOnly(self.connection, self.in_atomic_block)
        begun = is_well = False
        try:
            self._read_only = True
            # An interrupt may come at any line: until all is well the next statement asks.
            version, session.version = session.version, None
            with self.wrap_database_errors:
                frame.begin()
            begun = True
            result = run()
            is_well = self._ends(session, frame, answered=True)
            return result
        except Error as exc:
            refused = not session.dead and (not begun or refuses(exc.__cause__ or exc))
            is_well = session.dead or self._ends(session, frame, answered=False)
            if refused:
                raise Refused from exc
            raise
        finally:
            if is_well:
                session.version = version
                self._read_only = False
            else:
                self._give_up()

    def _ends(self, session: Session, frame: ReadOnly, answered: bool) -> bool:
        """End a READ ONLY transaction; return whether that was answered, or the connection lost."""
        if not session.dead:
            try:
                frame.end(answered)
            except Exception:
                # The rows are there. What follows must not be read only.
                return False
        return True

    def _give_up(self) -> None:
        """Close the connection for good; what follows in a block fails, as on a lost one."""
        self._read_only = False
        session = self._session
        if session is not None and session.connection is self.connection:
            session.dead = session.told = True
            session.poll = None
            close_for_good(session.connection)

    def _prove(self, replay: Replay, sql: str, params: Any) -> None:
        """Ask the new peer what must be known before a statement is run again there.

        :raises Exception: what the answer was, or what kept it from coming.
        """
        connection = self.connection
        if replay.reads_anew and self.vendor == "mysql":
            # What the block has read is not older here.
            ready.catch_up(connection)
        if replay.is_undone and not is_undone(connection, self.vendor, sql):
            raise NotReady("not all that the statement may change is undone by a rollback")
        reads = list(self._transaction.reads or ()) if replay.reads_anew else []
        if replay.rehearse:
            reads.append((without_lock(sql), params))
        if reads:
            self._rehearse(reads)

    def _rehearse(self, reads: list[tuple[Any, Any]]) -> None:
        """Run what looks like reads READ ONLY on the new connection: writes show there.

        What they wrote in a transaction that is lost would be gone with it, and nobody told.

        :raises Exception: the driver's error.
        """
        frame = ReadOnly(self.connection, in_block=False)
        frame.begin()
        for sql, params in reads:
            cursor = self.create_cursor()
            try:
                cursor.execute(sql, params)
            finally:
                cursor.close()
        frame.end(answered=True)

    def _lost(
        self,
        cursor: Any,
        session: Session,
        cause: BaseException,
        sql: Any,
        params: Any,
        kind: int,
        started: float,
        single: bool,
    ) -> Lost:
        """Return what counts for whether a lost statement may be run again."""
        config = session.balancer.config
        text = text_of(sql, self._dialect())
        holds = bool(kind & STATE or session.holds)
        if kind & STATE and text is Text.SETTING:
            # What it sets is all that was held, and is set again.
            holds = self._held_before
        elif text is Text.OF_TRANSACTION and self.in_atomic_block:
            holds = bool(session.holds)
        return Lost(
            place=self._place(session),
            cause=self._cause_of(session, cause, started),
            text=text,
            dialect=self._dialect(),
            enabled=config.replay is not None,
            holds_state=bool(
                holds
                or kind & SCOPED
                or session.unbuffered
                or any(other is not cursor for other in session.server_side)
                or self._thread_sharing_count > 0  # type: ignore[attr-defined]
                # psycopg's executemany() is busy itself; see _run_many().
                or (single and self._driver.is_busy(session.connection))
                or (self.autocommit and not self._driver.is_at_rest(session.connection))
            ),
            sendable=self._are_sendable(session, params, single),
            single=single,
            may_be_stale=(
                (session.wrote or self._transaction.has_only_read) and not config.synchronous_peers
            ),
        )

    def _place(self, session: Session) -> Place:
        if not self.in_atomic_block:
            return Place.AUTOCOMMIT if self.autocommit else Place.LATER
        if self._transaction.is_pending:
            return Place.FIRST
        return Place.AFTER_READS if self._has_only_read(session, anew=True) else Place.LATER

    def _has_only_read(self, session: Session, anew: bool) -> bool:
        """Return whether all that the transaction has done is proven to be reads without locks.

        :param anew: it is to begin anew: then what it was told of its own time counts, too.
        """
        transaction = self._transaction
        if not transaction.has_only_read:
            return False
        dialect = self._dialect()
        return all(
            is_provable_read(sql, dialect=dialect)
            and self._are_sendable(session, params, single=True)
            and not (anew and dialect == "postgresql" and tells_time(sql))
            for sql, params in transaction.reads or ()
        )

    def _cause_of(self, session: Session, cause: BaseException, started: float) -> Cause:
        if self._proves_not_run(session, cause):
            return Cause.NOT_RUN
        # The same words for a closed socket and for a time-out, after which
        # the statement may be running still. (mysqlclient)
        if session.dead and session.clock() - started >= session.read_timeout * 0.98:
            return Cause.TIMED_OUT
        if session.dead:
            return Cause.CLOSED
        fault = drivers.judge(cause, connecting=False)
        return Cause.NO_SERVICE if fault in (Fault.LOST, Fault.NOT_READY) else Cause.ANSWERED

    @cached_property
    def _known_types(self) -> set[type]:
        """Types of parameters that are quoted by the driver: no SQL of its own is in them."""
        return set(VALUES)

    def _kind_of_params(self, session: Session, params: Any) -> int:
        """Return STATE if what the parameters put into the statement cannot be known."""
        connection = drivers.unwrapped(session.connection)
        try:
            hidden = may_be_sql(
                params, self._known_types, lambda cls: self._driver.is_usual(connection, cls)
            )
        except Exception:
            # The driver will not know it either.
            hidden = True
        return STATE if hidden else 0

    def _are_sendable(self, session: Session, params: Any, single: bool) -> bool:
        """Return whether the parameters are there still, are plain values, and not too many."""
        connection = drivers.unwrapped(session.connection)

        def is_usual(cls: type) -> bool:
            return self._driver.is_usual(connection, cls)

        try:
            if single:
                return are_small(params) and are_values(params, is_usual)
            return (
                isinstance(params, (list, tuple))
                and len(params) <= _MOST_ROWS
                and all(are_values(row, is_usual) and are_small(row, _MOST_ROWS) for row in params)
            )
        except Exception:
            # A type that the driver does not know, an object that answers with an error.
            return False

    def _run_many(self, cursor: Any, sql: Any, param_list: Any, run: Callable[[], Any]) -> Any:
        """Run executemany(); again from its beginning, if it is the first of a block and lost."""
        session = self._before_many(cursor, sql, param_list)
        if session is None or self._driver.is_busy(session.connection):
            try:
                return run()
            finally:
                self._transaction.statement_sent()
        started = session.used
        try:
            result = run()
        except Error as exc:
            kind = scan(sql) & ~READ
            done = self._run_again(
                cursor, session, exc, sql, param_list, kind, started, run, single=False
            )
            if done is None:
                raise
            session, result = done
        finally:
            self._unseen()
        session.sending = None
        _has_results(session, sql)
        return result

    # Server-side cursors

    def _declare(
        self,
        cursor: Any,
        session: Session,
        sql: Any,
        params: Any,
        plain: Callable[..., Any],
        ignored: Any,
    ) -> Any:
        """Run the statement of a server-side cursor, which sends DECLARE."""
        run = functools.partial(plain, cursor, sql, params, *ignored)
        if self._quiet or session.connection is not self.connection:
            self._transaction.statement_sent()
            return run()
        kind, started = scan(sql), session.clock()
        if params:
            kind |= self._kind_of_params(session, params)
        if kind & session.lost_results:
            self._raise_lost_results(session)
        if kind & STATE:
            self._takes(session, sql, params)
        session.used, session.sending = started, (sql, params)
        if writes(kind):
            session.wrote = session.results = True
        try:
            result = run()
        except Error as exc:
            done = self._run_again(cursor, session, exc, sql, params, kind, started, run)
            if done is None:
                self._transaction.statement_sent()
                raise
            session, result = done
        except BaseException:
            self._transaction.statement_sent()
            raise
        session.sending = None
        if self._transaction.reads is not None:
            self._note_answered(session, kind, sql, params)
        # Without what Django gives besides: it holds the cursor.
        cursor._declared = (session, sql, params, kind, plain)
        return result

    def _fetch_first(self, cursor: Any, declared: Any, fetch: Callable[[], Any]) -> Any:
        """Fetch the first rows of a server-side cursor: if they are lost, none was given out."""
        session: Session
        session, sql, params, kind, plain = declared
        if session is not self._current():
            return fetch()
        started = session.clock()

        def run_and_fetch() -> Any:
            plain(cursor, sql, params)
            return fetch()

        try:
            return fetch()
        except Error as exc:
            done = self._run_again(cursor, session, exc, sql, params, kind, started, run_and_fetch)
            if done is None:
                raise
            return done[1]

    def _is_end_of(self, session: Session, exc: BaseException) -> bool:
        """Return whether closing a cursor has found its connection lost: nothing is, with it."""
        if session is self._current():
            with contextlib.suppress(Exception):
                self._judge(session, exc)
        return session.dead

    def _dialect(self) -> str:
        if self.vendor != "mysql":
            return str(self.vendor)
        # Django has asked for it when it set the connection up.
        data = vars(self).get("mysql_server_data") or {}
        return "mariadb" if "mariadb" in str(data.get("version", "")).lower() else "mysql"

    def _proves_not_run(self, session: Session | None, cause: BaseException) -> bool:
        """Return whether an error proves that its statement did not run.

        What a server refuses has not run. A proxy in front of it may say so of
        what has, and is known by the thread id of its greeting.
        """
        driver = self._driver
        if not driver.proves_not_run(cause):
            return False
        if session is None or not driver.SPLITS or not driver.is_answer(cause):
            return True
        if session.is_server is None:
            self._ask(session)
        return bool(session.is_server)

    # Transactions

    def set_autocommit(
        self, autocommit: bool, force_begin_transaction_with_broken_autocommit: bool = False
    ) -> None:
        """Begin or end a transaction; see Django."""
        if self._quiet or self._attempt is not None:
            super().set_autocommit(autocommit, force_begin_transaction_with_broken_autocommit)
            return
        try:
            self._change_autocommit(autocommit, force_begin_transaction_with_broken_autocommit)
        except BaseException as exc:
            if self.autocommit is not autocommit and not isinstance(exc, Error):
                # Ctrl-C, or a task's time limit: what the server has done of it
                # is not known, and what follows must not depend on it.
                session = self._session
                if session is not None and session.connection is self.connection:
                    self._abandon(session, exc)
                    self._leave(hooks=0)
            raise

    def _change_autocommit(self, autocommit: bool, begins: bool) -> None:
        if autocommit:
            self._switch_on(begins)
            return
        if self.autocommit:
            # A hook that raised leaves the mark behind by which the next connect() runs hooks.
            self.run_on_commit = []
            self.run_commit_hooks_on_set_autocommit_on = False
        super().set_autocommit(autocommit, begins)
        if self._transaction is NO_TRANSACTION:
            self._open(Transaction(by_hand=not begins))

    def _open(self, transaction: Transaction) -> None:
        """Put a transaction's record in place, in which nothing was sent yet."""
        self._transaction = transaction
        session = self._current()
        if session is not None:
            session.used = session.clock()
            if not session.dead:
                self._mark(session)

    def _switch_on(self, begins: bool) -> None:
        transaction, session = self._transaction, self._session
        is_dead = self.connection is None or (
            session is not None and session.connection is self.connection and session.dead
        )
        if is_dead and (transaction.is_of_atomic or transaction.stage is Stage.BEGUN):
            # Leaving a transaction with nothing to leave it on. Django would connect
            # anew, only to raise another error than the one that ended it.
            is_committed = transaction.stage is Stage.COMMITTED or transaction.by_hand
            self._leave(hooks=len(self.run_on_commit) if is_committed else 0)
            if not is_committed and (session is None or session.told or not session.holds):
                # As Django does where ROLLBACK fails.
                self.close()
            if self.run_commit_hooks_on_set_autocommit_on:
                self.run_and_clear_commit_hooks()
                self.run_commit_hooks_on_set_autocommit_on = False
            return
        super().set_autocommit(True, begins)

    def _leave(self, hooks: int) -> None:
        """Be in autocommit again, without the server's doing.

        :param hooks: how many of the on_commit hooks were earned by a COMMIT.
        """
        self.autocommit = True
        self._read_only = False
        self._transaction = NO_TRANSACTION
        self.run_on_commit = self.run_on_commit[:hooks]

    def _set_autocommit(self, autocommit: bool) -> None:
        session = self._current()
        if session is None:
            super()._set_autocommit(autocommit)  # type: ignore[misc]
        elif autocommit:
            self._end(session)
        else:
            self._begin(session)
        if autocommit:
            # By now, for what is run on_commit next has transactions of its own.
            self._transaction = NO_TRANSACTION

    def _begin(self, session: Session) -> None:
        # What happens here has not happened before it is answered.
        self._at_safe_point(session, 0, session.clock())
        session = self._session or session
        try:
            super()._set_autocommit(False)  # type: ignore[misc]
        except Error:
            if not (session.dead or session.dropped) or session.sticky or session.held:
                raise
            session.told = False
            if not self._is_safe(session):
                session.told = True
                raise
            try:
                self._replace(session, "last")
            except Exception:
                session.told = True
            else:
                super()._set_autocommit(False)  # type: ignore[misc]
                return
            raise

    def _end(self, session: Session) -> None:
        switch_on = functools.partial(super()._set_autocommit, True)  # type: ignore[misc]
        transaction, told = self._transaction, session.told
        self._notice_unseen(session)
        try:
            if transaction.by_hand and transaction.stage is Stage.ACTIVE and self.vendor == "mysql":
                # What is open is committed by it.
                self._sent(switch_on)
            else:
                switch_on()
        except Error:
            # After COMMIT or ROLLBACK was answered nothing hangs on it.
            ends_nothing = (
                transaction.has_ended
                if not transaction.by_hand
                else (transaction.stage is Stage.BEGUN)
            )
            if not (ends_nothing and (session.dead or session.dropped)):
                if session.dead or transaction.has_ended:
                    self._ended_by_hand()
                raise
            if not session.dead:
                # It lives, without autocommit: nothing more must be written there.
                close_for_good(session.connection)
                session.dead = True
                session.poll = None
            self._passed_over(session, told)
        if transaction.by_hand and self.run_on_commit:
            # Django has seen no commit().
            self.run_commit_hooks_on_set_autocommit_on = True

    def _passed_over(self, session: Session, told: bool) -> None:
        """An error that the application is not raised has told it nothing: what else the
        connection held is announced by the next statement's."""
        session.told = told or not (session.sticky or session.held)

    def _commit(self) -> Any:
        session = self._current()
        commit = super()._commit  # type: ignore[misc]
        if session is None:
            # A driver we do not look after; for retrying_atomic a COMMIT it is.
            return self._sent(commit)
        if self._transaction is NO_TRANSACTION:
            return self._end_of_nothing(session, self._sent, commit)
        self._notice_unseen(session)
        nothing_sent = self._transaction.stage is Stage.BEGUN
        told = session.told
        try:
            # Nothing happened in this transaction: nothing is lost with it. As after
            # any COMMIT that was answered its hooks run, and nothing again.
            result = None
            if not (self._is_lost(session) and nothing_sent):
                if session.dead and session.loss is not None and not session.told:
                    with self.wrap_database_errors:
                        raise session.loss
                result = self._sent(commit)
        except Error:
            if not (session.dead and (nothing_sent or self._leaves_no_trace(session))):
                if session.dead or self._transaction.has_ended:
                    self._ended_by_hand()
                raise
            result = None
            self._passed_over(session, told)
        self._transaction.committed()
        self._ended_by_hand()
        return result

    def _end_of_nothing(
        self, session: Session, send: Callable[..., Any], end: Callable[[], Any]
    ) -> Any:
        """COMMIT or ROLLBACK in autocommit, as beat's scheduler does: a safe point."""
        self._at_safe_point(session, 0, session.clock())
        session = self._session or session
        is_safe, told = self._is_safe(session), session.told
        try:
            return send(end)
        except Error:
            if not (is_safe and session.dead):
                raise
            self._passed_over(session, told)
            return None

    def _ended_by_hand(self) -> None:
        """After COMMIT or ROLLBACK by hand the next transaction begins by itself."""
        transaction = self._transaction
        if transaction.by_hand and not self.in_atomic_block:
            if transaction.stage is not Stage.COMMITTED:
                self.run_on_commit = self.run_on_commit[: transaction.hooks]
            self._open(Transaction(by_hand=True, hooks=len(self.run_on_commit)))

    def _sent(self, commit: Callable[[], Any]) -> Any:
        """Send COMMIT. What cannot be known of it is said as that, and nothing is repeated."""
        driver = self._driver
        session = self._session
        known_dead = session is not None and session.dead
        # Only this COMMIT's: one that an on_commit hook sends is another's.
        transaction = self._transaction
        try:
            transaction.commit_sent()
            result = commit()
            self._note_end_of_transaction()
        except Error as exc:
            cause = exc.__cause__ or exc
            if known_dead or self._proves_not_run(session, cause):
                # It never left: rolled back.
                transaction.commit_not_sent()
            elif drivers.judge(cause, connecting=False) is Fault.CONFLICT:
                transaction.conflicted()
            elif driver.outcome_is_unknown(cause) or driver.proves_not_run(cause):
                transaction.outcome_unknown()
                raise CommitOutcomeUnknown(*exc.args) from cause
            raise
        transaction.committed()
        return result

    def _leaves_no_trace(self, session: Session) -> bool:
        """Return whether the transaction, whose end is lost, is as good as committed.

        If it is, the connection was replaced.
        """
        if not self._transaction.reads or not self._has_only_read(session, anew=False):
            return False
        try:
            serializable = self._is_serializable(session)
        except Exception:
            serializable = None
        if not leaves_no_trace(only_read=True, serializable=serializable):
            return False
        if session.holds or self._thread_sharing_count > 0:  # type: ignore[attr-defined]
            return False
        if session.balancer.config.replay is None:
            return False
        # Any peer can tell whether what looks like reads has written.
        rehearse = functools.partial(self._rehearse, list(self._transaction.reads))
        try:
            if not session.budget.spend("COMMIT"):
                return False
            self._replace(session, "last", resume=rehearse)
        except Exception:
            return False
        return True

    def _is_serializable(self, session: Session) -> bool:
        """Ask, on a connection of its own, whether COMMIT may find a conflict of reads alone."""
        if self.vendor == "mysql":
            # Its reads take locks, then: a conflict is found before.
            return False
        level = getattr(session.connection, "isolation_level", None)
        if level is not None:
            # psycopg's: 4 in version 3, 3 in psycopg2's first releases still.
            return getattr(level, "name", str(level)) not in _NOT_SERIALIZABLE
        with self._throw_away(session) as connection:
            [(name,)] = ready.rows(connection, "SHOW default_transaction_isolation")
        return str(name) == "serializable"

    def now_holding(self) -> tuple[Session, Holdings] | None:
        """Return what the session holds, for :meth:`still_holds`; None if it holds nothing."""
        session = self._current()
        if session is None or not session.holds or (session.dead and session.told):
            return None
        return session, session.holds.copy()

    def still_holds(self, held: tuple[Session, Holdings] | None) -> bool:
        """Return whether all that :meth:`now_holding` has seen is held now."""
        if held is None:
            return True
        session, holdings = held
        return session is self._current() and not session.dead and session.holds.include(holdings)

    def _note_end_of_transaction(self) -> None:
        session = self._current()
        if session is not None:
            session.holds.transaction_ended()

    def begins_again(self, exc: BaseException, transaction: Transaction) -> bool:
        """Return whether a transaction that ended by ``exc`` stands for certain not, and may
        come to its end if it is begun once more."""
        if transaction.stage is Stage.CONFLICT:
            return True
        if transaction.may_stand:
            return False
        cause = exc.__cause__
        if cause is None:
            return False
        fault = drivers.judge(cause, connecting=False)
        if fault is Fault.CONFLICT:
            return True
        session = self._session
        if session is not None and session.doubted:
            # The transaction in which it could not be asked has ended.
            self._settle_doubt(session)
            if session.dropped:
                return True
        # After a time-out the server may be at it still, and in the way.
        return session is not None and _is_end(cause) and not session.timed_out

    def _rollback(self) -> Any:
        session = self._current()
        rollback = super()._rollback  # type: ignore[misc]
        if session is None:
            result = rollback()
        elif self._transaction is NO_TRANSACTION:
            result = self._end_of_nothing(session, lambda end: end(), rollback)
        elif self._transaction.by_hand:
            try:
                result = rollback()
            except Error:
                if session.dead:
                    self._ended_by_hand()
                raise
            # As Django does next.
            self.run_on_commit = []
        else:
            result = self._lost_is_rolled_back(session, rollback)
        self._note_end_of_transaction()
        self._transaction.rolled_back()
        self._ended_by_hand()
        return result

    def _lost_is_rolled_back(self, session: Session, rollback: Callable[[], Any]) -> Any:
        """Run a ROLLBACK, TO SAVEPOINT too. A connection that is lost has done it by that.

        Were it an error, Django would give the whole block up without one: a
        failed ROLLBACK TO is an outer block that ends well, and nothing stands.
        """
        told = session.told
        if session.dead:
            return None
        try:
            return rollback()
        except Error:
            session = self._session or session
            if not session.dead:
                raise
            self._passed_over(session, told)
            return None

    def _savepoint(self, sid: str) -> None:
        self._transaction.savepoint_made(sid)
        self._of_django(super()._savepoint, sid)  # type: ignore[misc]

    def _savepoint_rollback(self, sid: str) -> None:
        transaction, session = self._transaction, self._current()
        transaction.savepoint_restored(sid)
        restore = functools.partial(self._of_django, super()._savepoint_rollback, sid)  # type: ignore[misc]
        if session is None:
            restore()
            return
        self._lost_is_rolled_back(session, restore)
        session = self._session
        if session is not None and session.dead:
            transaction.savepoint_gone(sid)

    def _savepoint_commit(self, sid: str) -> None:
        if sid in self._transaction.undone:
            # Django releases what it has rolled back to, and it is gone with the connection.
            return
        self._transaction.savepoint_released(sid)
        self._of_django(super()._savepoint_commit, sid)  # type: ignore[misc]

    def _of_django(self, method: Callable[[str], object], sid: str) -> None:
        """Run SAVEPOINT and the like: made again with the transaction, they use up no first.

        The record says which there are to be afterwards: where the transaction
        is begun anew, they are made by that.
        """
        session = self._current()
        if session is None or not self._transaction.is_pending:
            transaction = self._transaction
            if session is not None:
                self._notice_unseen(session)
            reads = transaction.reads
            method(sid)
            if session is not None and reads:
                transaction.only_savepoints_sent(reads)
                transaction.mark = self._driver.sent(session.connection)
            return
        try:
            self._before_first(session, READ, session.clock())
            if self._session is session:
                self._of_ours = True
                self._quietly_heard(session, method, sid)
        finally:
            self._of_ours = False

    def _quietly_heard(self, session: Session, method: Callable[[str], object], sid: str) -> None:
        transaction = self._transaction
        is_pending = transaction.is_pending
        try:
            method(sid)
        except Error:
            if not (is_pending and session.dead):
                raise
            # The statement's own handling took it for the application's first.
            session.told = False
            transaction.only_savepoints_sent()
            if self._may_restart(session):
                with contextlib.suppress(Exception):
                    self._restart(session)
            if self._session is session:
                session.told = True
                transaction.statement_sent()
                raise
            return
        if is_pending:
            transaction.only_savepoints_sent()
            self._mark(session)

    # Forked

    def _after_fork(self) -> None:
        """In a forked child: leave the connection to the parent, whose it is.

        At a safe point the wrapper is as one that has not connected yet.
        Elsewhere what the child thinks it is in the middle of is the parent's:
        for the child the connection is lost.
        """
        connection = self.connection
        if connection is None or not self._driver.LEAVES:
            return
        if self._hold is None and self._attempt is None:
            # Made without a balancer.
            return
        session = self._session if self._attempt is None else None
        if session is None or session.connection is not connection:
            # The very thread that is at connect() has forked: out of a receiver.
            self._driver.leave(connection)
            return
        is_safe = self._is_safe(session)
        try:
            # After an error the number of its socket may be another's.
            if not session.dead and not session.unsure:
                self._driver.leave(connection)
        finally:
            if is_safe:
                self.connection = self._session = None
                self._let_go()
                close_in_child(connection, self._driver)
            else:
                session.dead = True
                session.poll = None
                session.error = session.error or "the connection is the parent process's"

    # Ended

    def _recover(self) -> None:
        super()._recover()
        if self._read_only:
            # An interrupt has left it so.
            self._give_up()
        self._quiet = self._of_ours = False
        self._trials = "first"
        self._only = None
        self._restore_log()

    def close_if_unusable_or_obsolete(self) -> None:
        """End a request or task: close what is not to be kept."""
        if not self.in_atomic_block:
            self._recover()
            if self._session is not None:
                # Of a connection that is closed by now, too: the next one follows it.
                self._session.wrote = self._session.results = False
                self._session.lost_results = 0
                self._has_units = True
        session = self._current()
        if session is not None and not self.in_atomic_block:
            if self.autocommit and not self._transaction.is_of_atomic:
                session.holds.end_request()
            if self._is_unannounced(session, self.errors_occurred):
                if self.close_at is None or time.monotonic() < self.close_at:
                    # The next statement shows the loss.
                    return
            elif session.dead and self.autocommit and not self._transaction.is_of_atomic:
                self.close()
        if self._is_to_leave():
            self.close()
        super().close_if_unusable_or_obsolete()
        if session is not None and session.balancer.rebalance.returns:
            self._move(session)

    def close_if_health_check_failed(self) -> None:
        """Close a connection that is found unusable, as Django does; see CONN_HEALTH_CHECKS."""
        session = self._current()
        asks = self.health_check_enabled and not self.health_check_done  # type: ignore[attr-defined,has-type]
        if session is not None and asks and session.holds and not session.told:
            # If it is not usable it is marked, and the statement that is to come shows the loss.
            self.is_usable()
            self.health_check_done = True
        super().close_if_health_check_failed()

    def _is_unannounced(self, session: Session, ask: bool) -> bool:
        """Return whether session state is lost, and the application does not know it.

        :param ask: ask the driver whether the connection is usable, if it is not known dead.
        """
        if not session.holds or session.told or session.connection is not self.connection:
            return False
        return session.dead or (ask and not self.is_usable())

    def _move(self, session: Session) -> None:
        """Between two units of work, go to a peer that has come back, if it is our turn."""
        balancer = session.balancer
        # What an earlier request has left may be there still, and so is the peer it is on.
        if session is not self._current() or session.dead:
            return
        if not self._is_safe(session, Replacing.REBALANCING):
            return
        if balancer.pinned_to(session.peer) is not None:
            return
        move = balancer.claim_move(session.peer)
        if move is None:
            return
        try:
            self._only = move.peer
            self._replace(session, "never")
        except Exception:  # noqa: S110 - the connection that is there works
            pass
        finally:
            self._only = None

    def _is_to_leave(self) -> bool:
        """Return whether the connection, between two units of work, leads to a drained peer."""
        peer = self.peer
        if peer is None or not peer.drained or self.in_atomic_block or not self.autocommit:
            return False
        if self._thread_sharing_count > 0:  # type: ignore[attr-defined]
            return False
        session = self._current()
        if session is not None and (
            session.holds or session.server_side or self._driver.is_busy(session.connection)
        ):
            # Somebody is in the middle of something that would end with it.
            return False
        registered = self._registered()
        if registered is None:
            return False
        balancer = registered.balancer
        # As with a circuit that has opened: a connection that works is better than none.
        return balancer.has_usable() and balancer.pinned_to(peer) is not peer

    def _close(self) -> Any:
        session = self._session
        if session is not None and session.connection is self.connection:
            if session.dead and is_pooled(self.connection):
                # The driver need not know of it: nobody is to have it out of the pool.
                close_for_good(self.connection)
            was_dead = session.dead
            session.dead = session.told = True
            session.poll = None
            if was_dead:
                # It may be closed already, which mysqlclient and PyMySQL complain of.
                with contextlib.suppress(Error):
                    return super()._close()
                return None
        return super()._close()

    # Django's own session state

    def disable_constraint_checking(self) -> bool:
        """Switch foreign keys off; until they are on again the connection stays."""
        disabled: bool = self._unscanned(super().disable_constraint_checking)
        if self._session is not None and disabled:
            self._session.held = True
        return disabled

    def enable_constraint_checking(self) -> None:
        """Switch foreign keys on again."""
        try:
            self._unscanned(super().enable_constraint_checking)
        finally:
            if self._session is not None:
                self._session.held = False

    def _unscanned(self, method: Callable[[], Any]) -> Any:
        try:
            self._of_ours = True
            return method()
        finally:
            self._of_ours = False

    def _emit(self, session: Session, event: Any) -> None:
        session.balancer.emit(event)


def _setting_up(theirs: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``theirs``, the ``_cursor()`` of an engine over ours, whose statements are no state.

    They are sent again for each cursor, and so for one that moves to a new connection.
    """

    @functools.wraps(theirs)
    def _cursor(self: SafePointsMixin, *args: Any, **kwargs: Any) -> Any:
        session, before = self._session, self._of_ours
        pending = self._pending(self._current())
        told = session is not None and session.told
        try:
            self._of_ours = True
            cursor = theirs(self, *args, **kwargs)
        finally:
            self._of_ours = before
        if pending is not None:
            self._was_set_up(pending)
        if session is not None and session is self._session:
            session.told = told
        return cursor

    _cursor.sets_cursors_up = True  # type: ignore[attr-defined]
    return _cursor


@functools.cache
def _sets_up(cls: type) -> bool:
    """Return whether an engine other than Django's own has a hand in how cursors are made."""
    ours = ("django.db.backends.", "django.contrib.gis.", "django_proxysql.")
    return any(
        not {"_cursor", "create_cursor", "make_cursor"}.isdisjoint(vars(base))
        for base in cls.__mro__
        if not base.__module__.startswith(ours)
    )


def _has_results(session: Session, sql: Any) -> None:
    """Take note that a session has answers of its own to tell: of a write that was answered."""
    if session.lost_results:
        session.lost_results &= 0 if makes_ids(sql) else ~RESULT


def _answers_no(cursor: Any) -> bool:
    """Return whether a driver's cursor has one value, which is false, and put it back."""
    try:
        row = cursor.fetchone()
        cursor.scroll(0, mode="absolute")
        return len(row) == 1 and not row[0]
    except Exception:
        # Not all cursors go back. Their users will see what there is.
        return False


def _mark_as_end(exc: BaseException) -> None:
    """Note on a driver's error that it ended its connection's use."""
    with contextlib.suppress(AttributeError, TypeError):
        exc._django_proxysql_end = True  # type: ignore[attr-defined]


def _answer_of(writer: ready.Writer | None) -> Answer:
    """Return what a connection has said of itself.

    What a proxy's servers say is not of this connection: what the proxy said, it said of it.
    """
    if writer is None:
        return Answer.UNKNOWN
    return Answer.READ_ONLY if writer.refusal or not writer.is_server else Answer.WRITABLE


def _is_end(exc: BaseException) -> bool:
    return getattr(exc, "_django_proxysql_end", False)
