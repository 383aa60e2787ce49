"""SAVEPOINTs of Django's own, which are made again with their transaction.

Decides which of them are there still; acts on the record of the transaction.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

from django.db.utils import Error

from ..core.statements import (
    READ,
)
from .losses import mark, notice_unseen
from .replacing import before_first, may_restart, restart
from .sessions import Session, current

__all__ = [
    "lost_is_rolled_back",
    "of_django",
    "passed_over",
    "quietly_heard",
    "savepoint",
    "savepoint_commit",
    "savepoint_rollback",
]


def passed_over(db: Any, session: Session, told: bool) -> None:
    """An error that the application is not raised has told it nothing: what else the
    connection held is announced by the next statement's."""
    session.told = told or not (session.sticky or session.held)


def lost_is_rolled_back(db: Any, session: Session, rollback: Callable[[], Any]) -> Any:
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
        session = db._session or session
        if not session.dead:
            raise
        passed_over(db, session, told)
        return None


def savepoint(db: Any, sid: str) -> None:
    db._transaction.savepoint_made(sid)
    of_django(db, db._plain("_savepoint"), sid)


def savepoint_rollback(db: Any, sid: str) -> None:
    transaction, session = db._transaction, current(db)
    transaction.savepoint_restored(sid)
    restore = functools.partial(of_django, db, db._plain("_savepoint_rollback"), sid)
    if session is None:
        restore()
        return
    lost_is_rolled_back(db, session, restore)
    session = db._session
    if session is not None and session.dead:
        transaction.savepoint_gone(sid)


def savepoint_commit(db: Any, sid: str) -> None:
    if sid in db._transaction.undone:
        # Django releases what it has rolled back to, and it is gone with the connection.
        return
    db._transaction.savepoint_released(sid)
    of_django(db, db._plain("_savepoint_commit"), sid)


def of_django(db: Any, method: Callable[[str], object], sid: str) -> None:
    """Run SAVEPOINT and the like: made again with the transaction, they use up no first.

    The record says which there are to be afterwards: where the transaction
    is begun anew, they are made by that.
    """
    session = current(db)
    if session is None or not db._transaction.is_pending:
        transaction = db._transaction
        if session is not None:
            notice_unseen(db, session)
        reads = transaction.reads
        method(sid)
        if session is not None and reads:
            transaction.only_savepoints_sent(reads)
            transaction.mark = db._driver.sent(session.connection)
        return
    try:
        before_first(db, session, READ, session.clock())
        if db._session is session:
            db._of_ours = True
            quietly_heard(db, session, method, sid)
    finally:
        db._of_ours = False


def quietly_heard(db: Any, session: Session, method: Callable[[str], object], sid: str) -> None:
    transaction = db._transaction
    is_pending = transaction.is_pending
    try:
        method(sid)
    except Error:
        if not (is_pending and session.dead):
            raise
        # The statement's own handling took it for the application's first.
        session.told = False
        transaction.only_savepoints_sent()
        if may_restart(db, session):
            with contextlib.suppress(Exception):
                restart(db, session)
        if db._session is session:
            session.told = True
            transaction.statement_sent()
            raise
        return
    if is_pending:
        transaction.only_savepoints_sent()
        mark(db, session)
