"""Cursors that know where a statement may be sent, and what to do when it is lost.

Each is a subclass of whatever cursor wrapper Django or the peer engine made
(PostgreSQL has its own), so that nothing of theirs is lost. The hook is ``_execute``, below
``execute_wrapper`` and the query log: a statement that is
run again is one statement to both.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

from django.db.backends.utils import CursorWrapper
from django.db.utils import Error

from ..core import drivers
from ..core.statements import CALLS, ENDS, FOUND, READ, SCOPED, STATE, kinds, scan
from .losses import mark, note, notice_unseen
from .replacing import at_safe_point, before_first, note_named
from .replays import Statement, kind_of_params, run_again
from .sessions import Session, current
from .state import BEGUN, NO_TRANSACTION
from .statements import (
    after_statement,
    before_statement,
    declare,
    fetch_first,
    note_answered,
    note_end,
    run_many,
    unseen,
)

_SEQUENCES = frozenset({tuple, list})


@functools.cache
def cursor_class(base: type) -> type:
    """Return ``base`` with our hooks laid over it; ``base`` itself if it has no place for them."""
    if not issubclass(base, CursorWrapper) or issubclass(base, _Hooks):
        return base
    own = {
        "__module__": base.__module__,
        "__getattr__": _getattr_over(base.__getattr__),
        "_execute": _execute_over(base._execute),  # type: ignore[attr-defined]
        **{name: _fetching(name) for name in _FETCHES if not hasattr(base, name)},
    }
    return type(base.__name__, (_Hooks, base), own)


def _execute_over(plain: Callable[..., Any]) -> Callable[..., Any]:
    """Return the hook over ``plain``, the ``_execute`` of a cursor wrapper's class.

    A function over a function rather than a method: ``super()`` costs what the rest of it does.
    """

    def execute(self: Any, sql: Any, params: Any, many: Any = False, context: Any = None) -> Any:
        db: Any = self.db
        session: Any = db._session
        own = self._session
        # No function is called on the way of a read, or of a statement inside
        # a transaction: what they cost is what this method costs.
        if (
            session is None
            or session.connection is not db.connection
            or (own is None and self._server_side is not None)
        ):
            if session is not None and self._server_side is not None:
                return declare(db, self, session, sql, params, plain)
            if db._transaction is not NO_TRANSACTION:
                # What is not looked after: such a driver, and the application's while it connects.
                note_end(db, scan(sql), sql)
            return plain(self, sql, params, many, context)
        try:
            kind = kinds[sql]
        except (KeyError, TypeError):
            kind = scan(sql)
        if params and not (
            params.__class__ in _SEQUENCES and session.known_types.issuperset(map(type, params))
        ):
            kind |= kind_of_params(db, session, params)
        now = session.clock()
        budget = session.budget
        budget.statements += 1
        if now > budget.next_note:
            budget.note(now)
        if (
            own is not session
            or (kind != READ and kind & (STATE | SCOPED | ENDS))
            or (
                (db._transaction.reads is not None or session.dead)
                if db.in_atomic_block
                else (
                    kind != READ
                    or session.dead
                    or session.version is not session.balancer.version
                    or now - session.used > session.idle
                    or (session.status is not None and session.status())
                )
            )
        ):
            session = before_statement(db, self, kind, now, sql, params)
        session.used = now
        session.sending = (sql, params)
        # As writes(), without the call.
        if kind != READ and (not kind & READ or kind & CALLS):
            session.wrote = session.results = True
        try:
            result = plain(self, sql, params, many, context)
        except BaseException as exc:
            run = functools.partial(plain, self, sql, params, many, context)
            done = run_again(db, self, session, exc, Statement(sql, params, kind, run))
            if done is None:
                raise
            session, result = done
        session.served = True
        session.peer.served = now
        session.sending = None
        if db._transaction.reads is not None:
            note_answered(db, session, kind, sql, params)
        lost = session.lost_results
        if lost & FOUND or (kind != READ and (lost or session.holds.for_life)):
            after_statement(self, session, kind, sql, params)
        return result

    return execute


def _getattr_over(plain: Callable[..., Any]) -> Callable[..., Any]:
    """Return the hook over ``plain``, the ``__getattr__`` of a cursor wrapper's class."""

    def getattribute(self: Any, attr: str) -> Any:
        if attr not in _HARMLESS:
            # copy(), stream(), the driver's own connection: what is done with it passes by us.
            unseen(self.__dict__["db"])
        return plain(self, attr)

    return getattribute


def _fetching(method: str) -> Callable[..., Any]:
    """Return one of the methods that fetch, which Django's wrapper looks up at each call."""

    def fetch(self: Any, *args: Any, **kwargs: Any) -> Any:
        db = self.db
        if self._declared is not None:
            # Its first rows may be fetched again, and no others.
            declared, self._declared = self._declared, None
            return fetch_first(db, self, declared, functools.partial(fetch, self, *args, **kwargs))
        with db.wrap_database_errors:
            return getattr(self.cursor, method)(*args, **kwargs)

    fetch.__name__ = method
    return fetch


_FETCHES = ("fetchone", "fetchmany", "fetchall")

#: A driver's cursor's attributes that send nothing, or read on in a result that was asked for.
_HARMLESS = frozenset(
    # PEP 249.
    "arraysize description fetchall fetchmany fetchone lastrowid messages nextset next "
    "rowcount rownumber scroll setinputsizes setoutputsize setoutputsizes "
    # mysqlclient and PyMySQL.
    "_executed _last_executed _result _rows description_flags max_stmt_length mogrify "
    "warning_count "
    # psycopg and psycopg2.
    "_last_query _query adapters binary_types cast closed format itersize name pgresult query "
    "results row_factory scrollable set_result statusmessage string_types timestamp "
    "tzinfo_factory withhold".split()
)


class _Hooks(CursorWrapper):
    #: The session whose driver cursor this wrapper holds; None of a server-side one.
    _session: Any = None
    #: The session that a server-side cursor, one with a name, is declared on.
    _server_side: Any = None
    #: What a server-side cursor was declared with, until its first rows are there.
    _declared: Any = None

    def __init__(self, cursor: Any, db: Any, *args: Any) -> None:
        # Others make wrappers of our cursors' class over the driver's cursor that
        # one of ours has: django-debug-toolbar does. (Ours come by no __init__.)
        super().__init__(cursor, db, *args)
        session = getattr(db, "_session", None)
        if session is None:
            return
        # A tracing proxy's cursors are the driver's, and know of no proxy.
        theirs = drivers.unwrapped(getattr(cursor, "connection", None))
        if theirs is not drivers.unwrapped(session.connection):
            return
        self._session = session
        if getattr(cursor, "name", None):
            note_named(self, session)

    def close(self) -> None:
        if self._server_side is not None and self._server_side.server_side:
            self._server_side.server_side.discard(self)
        try:
            self.cursor.close()
        except self.db.Database.Error as exc:
            # mysqlclient asks the server for more results, there, too, where
            # there is no server any more: what could be read has been read.
            session = self._session or self._server_side
            if session is None:
                raise
            present = current(self.db)
            if present is session and not present.dead:
                note(self.db, present, exc)
                if not present.dead:
                    raise

    def _executemany(self, sql: Any, param_list: Any, *ignored: Any) -> Any:
        run = functools.partial(super()._executemany, sql, param_list, *ignored)  # type: ignore[misc]
        return run_many(self.db, self, sql, param_list, run)

    def callproc(self, procname: Any, params: Any = None, kparams: Any = None) -> Any:
        """Call a stored procedure, or a function of PostgreSQL's.

        What it does in the session is unknown.
        """
        # Django 2.2's takes no third argument.
        arguments = (params,) if kparams is None else (params, kparams)
        run = functools.partial(super().callproc, procname, *arguments)
        given = params if isinstance(params, (list, tuple)) else ()
        called = f"CALL {procname}({', '.join(['%s'] * len(given))})"
        return run_many(self.db, self, called, params, run, given)


#: What Django's own ``make_cursor()`` makes, looked after.
PlainCursor = cursor_class(CursorWrapper)


def made_cursor(cursor: Any, db: Any, session: Any) -> Any:
    """Return what Django's own ``make_cursor()`` would make, looked after from the start.

    To give an object another class afterwards costs CPython more than to make it.
    """
    made: Any = object.__new__(PlainCursor)
    made.cursor = cursor
    made.db = db
    made._session = session
    return made


# Making cursors


def make_cursor(db: Any, name: str | None = None) -> Any:
    session = current(db)
    if session is not None and (session.dead or name is not None):
        # psycopg makes no cursor on a closed connection; and what a named
        # cursor reads cannot follow it to another one.
        before_cursor(db, session)
    with engines_own(db, session):
        try:
            cursor = db._plain("_cursor")(name)
        except Error:
            # The first sign of the loss: COPY's errors pass by every hook.
            if session is None or session is not db._session or not session.dead:
                raise
            session.not_raised()
            before_cursor(db, session)
            if session is db._session:
                session.raised()
                raise
            cursor = db._plain("_cursor")(name)
    return look_after(db, cursor, name)


@contextlib.contextmanager
def engines_own(db: Any, session: Session | None) -> Iterator[None]:
    """Take what a peer engine sends for a cursor for no statement.

    It is sent for each cursor, and so for one that moves to a new connection.
    """
    was_raised = session is not None and session.error_raised
    pending = None
    if session is not None and db._transaction.stage is BEGUN and sets_up(db.__class__):
        notice_unseen(db, session)
        pending = db._transaction if db._transaction.stage is BEGUN else None
    yield
    if session is not None and session is db._session and not was_raised:
        # It may have met the loss, and the engine kept it to itself: django-tenants does.
        session.not_raised()
    session = current(db)
    if pending is not None and pending is db._transaction and session and not session.dead:
        pending.only_savepoints_sent()
        mark(db, session)


def look_after(db: Any, cursor: Any, name: str | None = None) -> Any:
    """Lay our hooks over a cursor that the peer engine has made, and bind it to its session."""
    session = db._session
    if session is None and db._driver.WATCHED:
        # While a connection is made.
        return cursor
    cls = cursor.__class__
    ours = cursor_class(cls)
    if ours is not cls:
        cursor.__class__ = ours
    cursor._session = session
    if name is not None and session is not None:
        note_named(cursor, session)
    return cursor


def before_cursor(db: Any, session: Session) -> None:
    now = session.clock()
    if db.in_atomic_block:
        before_first(db, session, READ, now)
    else:
        at_safe_point(db, session, READ, now)


def setting_up(theirs: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``theirs``, an engine's ``_cursor()`` over ours, whose statements are no state."""

    @functools.wraps(theirs)
    def _cursor(db: Any, *args: Any, **kwargs: Any) -> Any:
        before = db._of_ours
        with engines_own(db, current(db)):
            try:
                db._of_ours = True
                return theirs(db, *args, **kwargs)
            finally:
                db._of_ours = before

    _cursor.sets_cursors_up = True  # type: ignore[attr-defined]
    return _cursor


@functools.cache
def sets_up(cls: type) -> bool:
    """Return whether an engine other than Django's own has a hand in how cursors are made."""
    ours = ("django.db.backends.", "django.contrib.gis.", "django_proxysql.")
    return any(
        not {"_cursor", "create_cursor", "make_cursor"}.isdisjoint(vars(base))
        for base in cls.__mro__
        if not base.__module__.startswith(ours)
    )
