"""Django's hooks on an established connection, handed to the parts that answer them.

Three questions are asked of a connection, each with one rule:

* *May it be replaced now?* (:mod:`.replacing`) Only at a safe point: in
  autocommit, outside every block, with no result unread and no state held in
  the session.
* *Is it lost?* (:mod:`.losses`) The socket is looked at, without a round
  trip, before what cannot be repeated once it is sent.
* *May this statement be run again?* (:mod:`.replays`) Only if the error
  proves that it did not run, or the text proves that running it twice changes
  nothing. COMMIT is never repeated (:mod:`.transactions`).

One hook, ``wrap_database_errors``, sees every driver error. The parts are
functions of the wrapper: a copy of a wrapper (``copy.copy``) is then a wrapper
of its own.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

from django.db.utils import DatabaseErrorWrapper, Error
from django.utils.functional import cached_property

from ..core import sockets
from ..core.balancer import Attempt
from ..registry import Registered
from . import cursors, losses, replacing, replays, requests, savepoints, statements, transactions
from .connecting import LoadBalancedMixin
from .cursors import PlainCursor, made_cursor
from .sessions import MadeWith, Session, give_back, is_pooled
from .state import BEGUN, NO_TRANSACTION, Stage, Transaction


class SafePointsMixin(LoadBalancedMixin):
    """Looks after the connection between connect() and close()."""

    #: The present connection's; None where nothing is looked after (SQLite).
    _session: Session | None = None
    #: Statements of our own are under way: nothing is to be seen. (Each statement asks, and
    #: CPython finds a class's attribute by a longer way than an instance's.)
    _quiet: bool
    #: A statement is run again in a READ ONLY transaction of our own. An interrupt may leave it so:
    #: apart from the next flag, whose end does not end this.
    _read_only = False
    #: A statement of Django's own is under way, which leaves no state that it does not look after.
    _of_ours = False
    #: The transaction that is open, by an atomic block or by hand.
    _transaction = NO_TRANSACTION
    #: NO_TRANSACTION, put there by who wants to know, becomes the record of the next transaction.
    next_block: Transaction | None = None
    #: The log of queries, while another is in its place.
    _own_log: Any = None
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

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._quiet = False

    def _open_one(self, registered: Registered, attempt: Attempt) -> Any:
        connection = super()._open_one(registered, attempt)
        session = None
        if self._driver.WATCHED:
            session = self._new_session(registered, attempt, connection)
            # Out of a pool: it has been one for a while, and is lost like any other.
            session.served = is_pooled(connection)
            if self._session is not None:
                replacing.follow(self, self._session, session)
        self._session = session
        # Without autocommit in the settings there is one at once, and what is in it not known.
        self._transaction = (
            NO_TRANSACTION if self.autocommit else Transaction(by_hand=True, stage=Stage.ACTIVE)
        )
        return connection

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
        driver, attempt = self._driver, self._attempt
        if attempt is not None:
            config = attempt.config
        else:
            registered = self._registered()
            if registered is None:
                return
            config = registered.balancer.config
        if not driver.WATCHED:
            return
        descriptor, seconds = driver.fileno(connection), config.tcp_user_timeout
        patience = sockets.keepalive(
            descriptor, seconds, driver.socket_options(connection, conn_params)
        )
        for limit in (
            seconds,
            conn_params.get("read_timeout"),
            conn_params.get("write_timeout"),
        ):
            if limit is not None and limit < patience:
                patience = float(limit)
        self._made_with = MadeWith(
            sockets.watch(descriptor),
            patience,
            driver.is_unbuffered(conn_params),
            conn_params.get("database") or conn_params.get("db") or "",
            driver.takes_two(conn_params),
        )

    #: What the present connection was made with.
    _made_with = MadeWith()

    def _new_session(self, registered: Registered, attempt: Attempt, connection: Any) -> Session:
        return Session(
            connection,
            attempt.peer,
            registered.balancer.group,
            attempt.permit,
            self._made_with,
            self._driver.status(connection),
        )

    def _plain(self, name: str) -> Any:
        """Return one of the peer engine's own methods, without ours over it."""
        return getattr(super(), name)

    # What is seen of errors

    @cached_property
    def wrap_database_errors(self) -> DatabaseErrorWrapper:
        """Django's translation of driver errors, with our hook on it."""
        return losses.ErrorHook(self)

    _is_end_of = losses.is_end_of

    def is_usable(self) -> bool:
        """Ask the driver; what it says counts for the peer, too."""
        return losses.is_usable(self)

    # Statements; cursors.py calls these

    def _cursor(self, name: str | None = None) -> Any:
        session = self._session
        if (
            name is not None
            or session is None
            or session.dead
            or session.connection is not self.connection
            or self._transaction.stage is BEGUN
            # A pool may hand out the very object that the last session was about.
            or self._attempt is not None
        ):
            if self._attempt is not None:
                # Django's own, while it sets the connection up.
                return super()._cursor(name)  # type: ignore[misc]
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
            or self._attempt is not None
            or cursors.sets_up(self.__class__)  # type: ignore[arg-type]
        ):
            return super().make_cursor(cursor)
        return made_cursor(cursor, self, session)

    _before_statement = statements.before_statement
    _after_statement = statements.after_statement
    _note_answered = statements.note_answered
    _before_other = statements.before_other
    _unseen = statements.unseen
    _run_many = statements.run_many
    _declare = statements.declare
    _fetch_first = statements.fetch_first
    _run_again = replays.run_again
    _kind_of_params = replays.kind_of_params

    def settle(self) -> None:
        """Leave a lost connection, and a peer that is out, if the application cannot tell.

        For code that is about to stay with this connection's peer.

        :raises Exception: what connect() raised, as Django translates it: no peer is left.
        """
        replacing.settle(self)

    # Transactions

    def set_autocommit(
        self, autocommit: bool, force_begin_transaction_with_broken_autocommit: bool = False
    ) -> None:
        """Begin or end a transaction; see Django."""
        if self._quiet or self._attempt is not None:
            super().set_autocommit(autocommit, force_begin_transaction_with_broken_autocommit)
            return
        transactions.set_autocommit(
            self, autocommit, force_begin_transaction_with_broken_autocommit
        )

    def _set_autocommit(self, autocommit: bool) -> None:
        if self._attempt is not None:
            super()._set_autocommit(autocommit)  # type: ignore[misc]
            return
        transactions.switch_autocommit(self, autocommit)

    def _commit(self) -> Any:
        return transactions.commit(self)

    def _rollback(self) -> Any:
        return transactions.rollback(self)

    def _savepoint(self, sid: str) -> None:
        savepoints.savepoint(self, sid)

    def _savepoint_rollback(self, sid: str) -> None:
        savepoints.savepoint_rollback(self, sid)

    def _savepoint_commit(self, sid: str) -> None:
        savepoints.savepoint_commit(self, sid)

    # For retrying_atomic

    begins_again = transactions.begins_again
    now_holding = transactions.now_holding
    still_holds = transactions.still_holds

    # The end of a request, of a connection, and a fork

    def _after_fork(self) -> None:
        requests.after_fork(self)

    def _recover(self) -> None:
        requests.recover(self)

    def close_if_unusable_or_obsolete(self) -> None:
        """End a request or task: close what is not to be kept."""
        requests.close_if_unusable_or_obsolete(self)

    def close_if_health_check_failed(self) -> None:
        """Close a connection that is found unusable, as Django does; see CONN_HEALTH_CHECKS."""
        if self.health_check_enabled and not self.health_check_done:  # type: ignore[attr-defined]
            requests.close_if_health_check_failed(self)

    def _close(self) -> Any:
        return requests.close(self)

    # Django's own session state

    def disable_constraint_checking(self) -> bool:
        """Switch foreign keys off; until they are on again the connection stays."""
        disabled: bool = self._unscanned(super().disable_constraint_checking)
        if self._session is not None and disabled:
            self._session.holds.checks_off()
        return disabled

    def enable_constraint_checking(self) -> None:
        """Switch foreign keys on again."""
        try:
            self._unscanned(super().enable_constraint_checking)
        finally:
            if self._session is not None:
                self._session.holds.checks_on()

    def _unscanned(self, method: Callable[[], Any]) -> Any:
        try:
            self._of_ours = True
            return method()
        finally:
            self._of_ours = False
