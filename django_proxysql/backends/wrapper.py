"""Django's hooks on an established connection, handed to the parts that answer them.

May the connection be replaced now (:mod:`.replacing`)? Is it lost (:mod:`.losses`)? May this
statement be run again (:mod:`.replays`)? What of a COMMIT (:mod:`.transactions`)?
``docs/explanation/established.rst`` has the answers.

One hook, ``wrap_database_errors``, sees every driver error. The parts are
functions of the wrapper: a copy of a wrapper (``copy.copy``) is then a wrapper
of its own.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable
from typing import Any

from django.db.utils import DatabaseErrorWrapper, Error
from django.utils.functional import cached_property

from ..core import drivers, ready, sockets
from ..core.balancer import Attempt
from ..core.statements import FOUND, IDS, RESULT
from ..registry import Registered
from . import cursors, losses, replacing, transactions
from .connecting import LoadBalancedMixin
from .cursors import PlainCursor, made_cursor
from .decisions import Why, may_replace, must_catch_up, must_raise_loss
from .replacing import replace, situation_of
from .replays import give_up
from .sessions import (
    Session,
    close_for_good,
    close_in_child,
    current,
    give_back,
    is_pooled,
)
from .state import ACTIVE, BEGUN, NO_TRANSACTION, Transaction


class ErrorHook(DatabaseErrorWrapper):
    wrapper: Any

    def __exit__(self, exc_type: Any, exc_value: Any, traceback: Any) -> None:
        if exc_type is None:
            # Each statement comes by here.
            return
        if isinstance(exc_value, self.wrapper.Database.Error):
            drivers.mark(exc_value, "caller", self.wrapper._caller)
            session = current(self.wrapper)
            if session is not None:
                losses.note(self.wrapper, session, exc_value)
                session.sending = None
                # PostgreSQL rolls back by COMMIT, too, where a statement has failed.
                session.holds.at_commit.clear()
                session.raised()
        elif exc_type is not GeneratorExit:
            losses.interrupted(self.wrapper, exc_value)
        super().__exit__(exc_type, exc_value, traceback)


class SafePointsMixin(LoadBalancedMixin):
    """Looks after the connection between connect() and close()."""

    #: The present connection's; None where nothing is looked after: on SQLite, while a connection
    #: is being made, and while statements of our own are under way.
    _session: Session | None = None
    #: A statement is run again in a READ ONLY transaction of our own. An interrupt may leave it so:
    #: apart from the next flag, whose end does not end this.
    _read_only = False
    #: A statement of Django's own is under way, which leaves no state that it does not look after.
    _of_ours = False
    #: The transaction that is open, by an atomic block or by hand.
    _transaction = NO_TRANSACTION
    #: NO_TRANSACTION, put there by who wants to know, becomes the record of the next transaction.
    next_block: Transaction | None = None
    #: close_old_connections() is called for this wrapper: it ends requests or tasks.
    _ends_requests = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Have an engine over this one send for each cursor what it sends."""
        super().__init_subclass__(**kwargs)
        theirs = cls._cursor
        if theirs is not SafePointsMixin._cursor and not hasattr(theirs, "sets_cursors_up"):
            cls._cursor = cursors.setting_up(theirs)  # type: ignore[method-assign]

    #: Numbers for wrappers, each of which is one thread's or task's.
    _callers = itertools.count()

    @cached_property
    def _caller(self) -> int:
        """Tell this wrapper's thread or task from all others of the process."""
        return next(self._callers)

    # Made

    def _open_one(self, registered: Registered, attempt: Attempt) -> Any:
        before, session = self._session, None
        try:
            self._session = None
            connection = super()._open_one(registered, attempt)
            if self._driver.WATCHED:
                session = Session(
                    connection,
                    attempt.peer,
                    registered.balancer.group,
                    attempt.permit,
                    self._driver.status(connection),
                    **self._made_with,
                )
                # Out of a pool: it has been one for a while, and is lost like any other.
                session.served = is_pooled(connection)
                if before is not None:
                    follow(self, before, session)
            self._session = session
        except BaseException:
            self._session = before
            raise
        # Without autocommit in the settings there is one at once, and what is in it not known.
        self._transaction = (
            NO_TRANSACTION if self.autocommit else Transaction(by_hand=True, stage=ACTIVE)
        )
        return connection

    def get_new_connection(self, conn_params: dict[str, Any]) -> Any:
        """Open the driver's connection, and have the kernel notice its host's death."""
        connection = super().get_new_connection(conn_params)
        try:
            driver, registered, asked = self._driver, self._registered(), conn_params.get
            if registered is None or not driver.WATCHED:
                return connection
            descriptor = driver.fileno(connection)
            seconds = registered.balancer.config.tcp_user_timeout
            already = driver.socket_options(connection, conn_params)
            patience = sockets.keepalive(descriptor, seconds, already)
            for limit in (seconds, asked("read_timeout"), asked("write_timeout")):
                if limit is not None and limit < patience:
                    patience = float(limit)
            self._made_with = {
                "poll": sockets.watch(descriptor),
                "read_timeout": patience,
                "unbuffered": driver.is_unbuffered(conn_params),
                "database": asked("database") or asked("db") or asked("dbname") or "",
                "takes_two": driver.takes_two(conn_params),
                "role": (self.settings_dict.get("OPTIONS") or {}).get("assume_role") or "",
            }
        except BaseException:
            give_back(connection)
            raise
        return connection

    #: What the next session must know of how its connection was made.
    _made_with: dict[str, Any] = {}  # noqa: RUF012 - replaced as a whole

    def _plain(self, name: str) -> Any:
        """Return one of the peer engine's own methods, without ours over it."""
        return getattr(super(), name)

    #: Django's translation of driver errors, with our hook on it.
    wrap_database_errors = cached_property(ErrorHook)
    is_usable = losses.is_usable
    settle = replacing.settle
    _commit = transactions.commit
    _rollback = transactions.rollback
    _savepoint = transactions.savepoint
    _savepoint_rollback = transactions.savepoint_rollback
    _savepoint_commit = transactions.savepoint_commit

    def set_autocommit(
        self, autocommit: bool, force_begin_transaction_with_broken_autocommit: bool = False
    ) -> None:
        if self._attempt is not None:
            super().set_autocommit(autocommit, force_begin_transaction_with_broken_autocommit)
            return
        transactions.set_autocommit(
            self, autocommit, force_begin_transaction_with_broken_autocommit
        )

    def _set_autocommit(self, autocommit: bool) -> None:
        session = None if self._attempt is not None else current(self)
        if session is None:
            super()._set_autocommit(autocommit)  # type: ignore[misc]
        elif autocommit:
            transactions.end(self, session)
        else:
            transactions.begin(self, session)
        if autocommit and self._attempt is None:
            # By now, for what is run on_commit next has transactions of its own.
            self._transaction = NO_TRANSACTION

    # Cursors

    def _cursor(self, name: str | None = None) -> Any:
        session = self._session
        if (
            name is not None
            or session is None
            or session.dead
            or session.connection is not self.connection
            or (self._transaction.stage is BEGUN and cursors.sets_up(self.__class__))  # type: ignore[arg-type]
        ):
            return cursors.make_cursor(self, name)
        try:
            cursor = super()._cursor()  # type: ignore[misc]
        except Error:
            # The first sign of the loss: COPY's errors pass by every hook.
            if not session.dead:
                raise
            session.not_raised()
            return cursors.make_cursor(self)
        if session.dead:
            # What the engine sends for each cursor has met the loss, and kept it to itself.
            session.not_raised()
        return cursor if cursor.__class__ is PlainCursor else cursors.look_after(self, cursor)

    def make_cursor(self, cursor: Any) -> Any:
        """Make what Django's own method makes, with our hooks; an engine's own makes its own."""
        session = self._session
        if (
            session is None
            or session.connection is not self.connection
            or cursors.sets_up(self.__class__)  # type: ignore[arg-type]
        ):
            return super().make_cursor(cursor)
        return made_cursor(cursor, self, session)

    @property
    def _is_apart(self) -> bool:
        """Whether a listener that is called now uses another connection.

        A transaction ends: in no block any more, and not in autocommit yet. Or its connection is
        lost, or is to be left, and the engine may begin it anew.
        """
        if self.autocommit:
            return False
        if not self.in_atomic_block and self._transaction.is_of_atomic:
            return True
        session = self._session
        return session is not None and (session.dead or session.is_leaving)

    # The end of a request or task, of a connection, and a fork

    def close_if_unusable_or_obsolete(self) -> None:
        """End a request or task: close what is not to be kept."""
        if not self.in_atomic_block:
            self._recover()
            if self._session is not None:
                # Of a connection that is closed by now, too: the next one follows it.
                self._session.wrote = self._session.results = False
                self._session.lost_results = 0
                self._ends_requests = True
        session = current(self)
        if session is not None and not self.in_atomic_block:
            if self.autocommit and not self._transaction.is_of_atomic:
                session.holds.end_request()
            if is_unannounced(self, session, self.errors_occurred):
                if self.close_at is None or time.monotonic() < self.close_at:
                    # The next statement shows the loss.
                    return
            elif session.dead and self.autocommit and not self._transaction.is_of_atomic:
                self.close()
        if is_to_leave(self):
            self.close()
        super().close_if_unusable_or_obsolete()
        if session is not None and session.balancer.rebalance.returns:
            move(self, session)

    def close_if_health_check_failed(self) -> None:
        """Close a connection that is found unusable, unless its loss would go unnoticed."""
        if not self.health_check_enabled or self.health_check_done:  # type: ignore[attr-defined, has-type]
            return
        session = current(self)
        if session is not None and session.holds and not session.error_raised:
            # If it is not usable it is marked, and the statement that is to come shows the loss.
            self.is_usable()
            self.health_check_done = True
        super().close_if_health_check_failed()

    def _close(self) -> Any:
        session = self._session
        if session is not None and session.connection is self.connection:
            if session.dead and is_pooled(self.connection):
                # The driver need not know of it: the pool must not hand it out again.
                close_for_good(self.connection)
            was_dead = session.dead
            session.lose()
            session.raised()
            if was_dead:
                # It may be closed already, which mysqlclient and PyMySQL complain of.
                with contextlib.suppress(Error):
                    return super()._close()
                return None
        return super()._close()

    def _after_fork(self) -> None:
        """In a forked child: leave the connection to the parent, whose it is.

        At a safe point the wrapper is as one that has not connected yet. Elsewhere what it is in
        the middle of is the parent's: for the child the connection is lost.
        """
        connection = self.connection
        if connection is None or not self._driver.LEAVES:
            return
        if self._counted is None and self._attempt is None:
            # Made without a balancer.
            return
        session = self._session
        if session is None or session.connection is not connection:
            # The very thread that is at connect() has forked: out of a receiver.
            self._driver.leave(connection)
            return
        safe = replacing.is_safe(self, session)
        try:
            # After an error the number of its socket may be another's.
            if not session.dead and not session.unsure:
                self._driver.leave(connection)
        finally:
            if safe:
                self.connection = self._session = None
                self._release()
                close_in_child(connection, self._driver)
            else:
                session.lose("the connection is the parent process's")

    def _recover(self) -> None:
        super()._recover()
        if self._read_only:
            # An interrupt has left it so.
            give_up(self)
        self._of_ours = False
        self._terms = self._ANY_PEER

    # Django's own session state

    def disable_constraint_checking(self) -> bool:
        """Switch foreign keys off; until they are on again the connection stays."""
        disabled: bool = self._unscanned(super().disable_constraint_checking)
        if self._session is not None and disabled:
            self._session.holds.switch_checks(off=True)
        return disabled

    def enable_constraint_checking(self) -> None:
        """Switch foreign keys on again."""
        try:
            self._unscanned(super().enable_constraint_checking)
        finally:
            if self._session is not None:
                self._session.holds.switch_checks(off=False)

    def _unscanned(self, method: Callable[[], Any]) -> Any:
        try:
            self._of_ours = True
            return method()
        finally:
            self._of_ours = False


# From one connection to the next


def follow(db: Any, before: Session, session: Session) -> None:
    """Take over from this request's last connection what the new one must know of it.

    Each way from one connection to the next comes by here: a replacement, a replay,
    and Django's own connecting after a block that was lost, or after close().

    :raises Exception: the driver's: the node was lost meanwhile, or could not catch up
        in time. The attempt to connect has failed then.
    """
    session.wrote = before.wrote
    is_mysql = db.vendor == "mysql"
    session.lost_results = IDS | RESULT if before.results else before.lost_results
    if is_mysql:
        session.lost_results |= FOUND
    if must_catch_up(
        is_mysql,
        has_written=before.results,
        has_not_caught_up=bool(before.lost_results & IDS),
    ):
        try:
            ready.catch_up(session.connection)
        except BaseException:
            db._discard()
            raise


def is_unannounced(db: Any, session: Session, ask: bool) -> bool:
    """Return whether session state is lost, and the application does not know it.

    :param ask: whether the driver is asked, too.
    """
    if session.connection is not db.connection or not (session.dead or ask):
        return False
    if not must_raise_loss(True, situation_of(db, session)):
        return False
    if session.dead or not db.is_usable():
        return True
    # As Django does. Were it to ask once more, and find a loss, it would close the connection.
    db.errors_occurred = False
    return False


def move(db: Any, session: Session) -> None:
    """Between two requests or tasks, go to a peer that has come back, if it is our turn."""
    balancer = session.balancer
    if session is not current(db) or session.dead:
        return
    if not may_replace(Why.REBALANCING, situation_of(db, session)):
        return
    is_pinned = balancer.pinned_to(session.peer) is not None
    move = None if is_pinned else balancer.claim_move(session.peer)
    if move is not None:
        # If it cannot: the connection that is there works.
        with contextlib.suppress(Exception):
            replace(db, session, "never", only=move.peer)


def is_to_leave(db: Any) -> bool:
    """Return whether the connection, between two requests or tasks, leads to a drained peer."""
    peer = db.peer
    if peer is None or not peer.drained or db.in_atomic_block or not db.autocommit:
        return False
    if db._thread_sharing_count > 0:
        return False
    session = current(db)
    if session is not None:
        # Unbuffered cursors end with the request, unless one is in the middle of its rows.
        is_read = not (session.server_side or db._driver.is_busy(session.connection))
        now = situation_of(db, session)._replace(unread=not is_read)
        if not may_replace(Why.LEAVING, now):
            return False
    registered = db._registered()
    if registered is None:
        return False
    balancer = registered.balancer.group
    # As with a circuit that has opened: a connection that works is better than none.
    return balancer.has_usable() and balancer.pinned_to(peer) is not peer
