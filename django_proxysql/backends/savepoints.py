"""SAVEPOINTs of Django's own, which are made again with their transaction.

Decides which of them are there still; acts on the record of the transaction.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

from django.db.utils import Error

from ..core.statements import READ
from .losses import mark, notice_unseen
from .replacing import before_first, is_restartable, restart
from .sessions import Session, current


def passed_over(session: Session, was_raised: bool) -> None:
    """Note that an error that ends nothing is not raised. If the connection held session
    state, the next statement raises its loss.

    :param was_raised: the loss was raised before.
    """
    if session.holds and not was_raised:
        session.not_raised()
    else:
        session.raised()


def lost_is_rolled_back(db: Any, session: Session, rollback: Callable[[], Any]) -> Any:
    """Run a ROLLBACK, TO SAVEPOINT and its RELEASE too. A connection that is lost has done it.

    Were it an error, Django would give the whole block up without one: a failed ROLLBACK TO
    or RELEASE after it is an outer block that ends well, and nothing stands.
    """
    was_raised = session.error_raised
    if session.dead:
        return None
    try:
        return rollback()
    except Error:
        session = db._session or session
        if not session.dead:
            raise
        passed_over(session, was_raised)
        return None


def savepoint(db: Any, sid: str) -> None:
    db._transaction.savepoint_made(sid)
    of_django(db, db._plain("_savepoint"), sid)


def savepoint_rollback(db: Any, sid: str) -> None:
    session = current(db)
    db._transaction.savepoint_restored(sid)
    restore = functools.partial(of_django, db, db._plain("_savepoint_rollback"), sid)
    if session is None:
        restore()
    else:
        lost_is_rolled_back(db, session, restore)


def savepoint_commit(db: Any, sid: str) -> None:
    transaction, session = db._transaction, current(db)
    transaction.savepoint_released(sid)
    release = functools.partial(of_django, db, db._plain("_savepoint_commit"), sid)
    if session is None or sid not in transaction.undone:
        release()
    else:
        # Django releases what it has rolled back to.
        lost_is_rolled_back(db, session, release)


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
            send_of_django(db, session, method, sid)
    finally:
        db._of_ours = False


def send_of_django(db: Any, session: Session, method: Callable[[str], object], sid: str) -> None:
    transaction = db._transaction
    is_pending = transaction.is_pending
    try:
        method(sid)
    except Error:
        if not (is_pending and session.dead):
            raise
        # The statement's own handling took it for the application's first.
        session.not_raised()
        transaction.only_savepoints_sent()
        if is_restartable(db, session):
            with contextlib.suppress(Exception):
                restart(db, session)
        if db._session is session:
            session.raised()
            transaction.statement_sent()
            raise
        return
    if is_pending:
        transaction.only_savepoints_sent()
        mark(db, session)
