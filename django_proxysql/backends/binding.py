"""Make cursors, and bind each to the present connection.

Decides nothing; acts on Django's cursor wrappers and on the driver's cursors in them.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

from django.db.utils import Error

from ..core.statements import READ
from .cursors import cursor_class, note_named
from .losses import mark, notice_unseen
from .replacing import at_safe_point, before_first
from .sessions import Session, current
from .state import BEGUN, Transaction

__all__ = [
    "before_cursor",
    "bind",
    "look_after",
    "make_cursor",
    "only_begun",
    "sets_up",
    "setting_up",
    "was_set_up",
]


def make_cursor(db: Any, name: str | None = None) -> Any:
    session = current(db)
    if session is not None and (session.dead or name is not None):
        # psycopg makes no cursor on a closed connection; and what a named
        # cursor reads cannot follow it to another one.
        before_cursor(db, session)
    was_raised = session is not None and session.error_raised
    pending = None
    if db._transaction.stage is BEGUN:
        pending = only_begun(db, session)
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
    if session is not None and session is db._session and not was_raised:
        # What the peer engine sends for each cursor may have met the loss, and the
        # engine kept it to itself: django-tenants does.
        session.not_raised()
    if pending is not None:
        was_set_up(db, pending)
    return cursor if db._quiet else look_after(db, cursor, name)


def look_after(db: Any, cursor: Any, name: str | None = None) -> Any:
    """Lay our hooks over a cursor that the peer engine has made, and bind it to its session."""
    session = db._session
    if session is None:
        return cursor
    cls = cursor.__class__
    ours = cursor_class(cls)
    if ours is not cls:
        cursor.__class__ = ours
    cursor._session = session
    if name is not None:
        note_named(cursor, session)
    return cursor


def only_begun(db: Any, session: Session | None) -> Transaction | None:
    """Return the transaction that has only begun, if making a cursor may send something."""
    if session is None or not sets_up(db.__class__):
        return None
    notice_unseen(db, session)
    return db._transaction if db._transaction.stage is BEGUN else None


def was_set_up(db: Any, pending: Transaction) -> None:
    """Note that what was sent for a cursor is no statement: it is sent for each one."""
    session = current(db)
    if pending is db._transaction and session is not None and not session.dead:
        pending.only_savepoints_sent()
        mark(db, session)


def before_cursor(db: Any, session: Session) -> None:
    now = session.clock()
    if db.in_atomic_block:
        before_first(db, session, READ, now)
    else:
        at_safe_point(db, session, READ, now)


def bind(db: Any, cursor: Any, name: str | None = None) -> Session:
    """Give ``cursor`` a driver's cursor on the present connection; return its session.

    It is made as the peer engine makes one: what the engine sends for each cursor
    (a tenant's schema, a role) is sent for this one.
    """
    made = db._cursor(name)
    if name is not None:
        # psycopg complains about a server-side cursor that is still open.
        with contextlib.suppress(Exception):
            cursor.cursor.close()
    session: Session = db._session
    cursor.cursor = made.cursor
    cursor._session = session
    if name is not None:
        note_named(cursor, session)
    return session


def setting_up(theirs: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``theirs``, the ``_cursor()`` of an engine over ours, whose statements are no state.

    They are sent again for each cursor, and so for one that moves to a new connection.
    """

    @functools.wraps(theirs)
    def _cursor(db: Any, *args: Any, **kwargs: Any) -> Any:
        session, before = db._session, db._of_ours
        pending = only_begun(db, current(db))
        was_raised = session is not None and session.error_raised
        try:
            db._of_ours = True
            cursor = theirs(db, *args, **kwargs)
        finally:
            db._of_ours = before
        if pending is not None:
            was_set_up(db, pending)
        if session is not None and session is db._session and not was_raised:
            session.not_raised()
        return cursor

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
