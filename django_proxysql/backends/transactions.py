"""Begin and end transactions. COMMIT is never repeated.

Decides what an error of COMMIT proves; acts on the record of the transaction and on Django's
on_commit hooks.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

from django.db.utils import Error

from ..core import drivers
from ..core.faults import Proof
from ..core.statements import READ
from ..errors import CommitOutcomeUnknown
from .losses import abandon, did_not_run, is_lost, mark, notice_unseen, sent
from .outcomes import Token, commit_with, is_as_good_as_committed, stands, token_for
from .replacing import at_safe_point, before_first, is_restartable, is_safe, replace, restart
from .sessions import Session, close_for_good, current
from .state import (
    ACTIVE,
    BEGUN,
    COMMITTED,
    COMMITTING,
    NO_TRANSACTION,
    NOT_DONE,
    ROLLED_BACK,
    UNKNOWN,
    Transaction,
)


def set_autocommit(
    db: Any, autocommit: bool, force_begin_transaction_with_broken_autocommit: bool = False
) -> None:
    try:
        if autocommit:
            switch_on(db, force_begin_transaction_with_broken_autocommit)
        else:
            switch_off(db, force_begin_transaction_with_broken_autocommit)
    except BaseException as exc:
        if db.autocommit is not autocommit and not isinstance(exc, Error):
            # Ctrl-C, or a task's time limit: what the server has done of it
            # is not known, and what follows must not depend on it.
            session = db._session
            if session is not None and session.connection is db.connection:
                abandon(db, session, exc)
                leave(db, hooks=0)
        raise


def switch_off(db: Any, begins: bool) -> None:
    if db.autocommit:
        # A hook that raised leaves the mark behind by which the next connect() runs hooks.
        db.run_on_commit = []
        db.run_commit_hooks_on_set_autocommit_on = False
    db._plain("set_autocommit")(False, begins)
    if db._transaction is NO_TRANSACTION:
        transaction, session = Transaction(by_hand=not begins), current(db)
        if session is not None and session.holds.transaction:
            # What SQL has begun goes on in it, and ends with it.
            transaction.statement_sent()
        open_transaction(db, transaction)


def open_transaction(db: Any, transaction: Transaction) -> None:
    """Put a transaction's record in place, in which nothing was sent yet."""
    db._transaction = transaction
    if db.next_block is NO_TRANSACTION:
        db.next_block = transaction
    session = current(db)
    if session is not None:
        session.used = session.clock()
        if not session.dead:
            mark(db, session)


def switch_on(db: Any, begins: bool) -> None:
    transaction, session = db._transaction, db._session
    if transaction.is_of_atomic and transaction.stage in (ACTIVE, COMMITTING):
        session = current(db)
        if session is not None and not session.dead:
            # Ctrl-C, or a task's time limit, between Django's lines: neither COMMIT nor ROLLBACK
            # was answered. MySQL would commit here, and psycopg refuses.
            abandon(db, session, InterruptedError("the block's end was interrupted"))
    is_dead = db.connection is None or (
        session is not None and session.connection is db.connection and session.dead
    )
    if is_dead and (transaction.is_of_atomic or transaction.stage is BEGUN):
        # Leaving a transaction with nothing to leave it on. Django would connect
        # anew, only to raise another error than the one that ended it.
        is_committed = transaction.stage is COMMITTED or transaction.by_hand
        leave(db, hooks=len(db.run_on_commit) if is_committed else 0)
        if not is_committed and (session is None or session.error_raised or not session.holds):
            # As Django does where ROLLBACK fails.
            db.close()
        if db.run_commit_hooks_on_set_autocommit_on:
            db.run_and_clear_commit_hooks()
            db.run_commit_hooks_on_set_autocommit_on = False
        return
    db._plain("set_autocommit")(True, begins)


def leave(db: Any, hooks: int) -> None:
    """Return to autocommit, without the server's doing.

    :param hooks: how many of the on_commit hooks were earned by a COMMIT.
    """
    db.autocommit = True
    # There is nothing left to roll back. Django waits for a ROLLBACK, or a connect().
    db.needs_rollback = False
    db._read_only = False
    db._transaction = NO_TRANSACTION
    db.run_on_commit = db.run_on_commit[:hooks]


def begin(db: Any, session: Session) -> None:
    # What happens here has not happened before it is answered.
    at_safe_point(db, session, 0, session.clock())
    session = db._session or session
    try:
        db._plain("_set_autocommit")(False)
    except Error:
        if not (session.dead or session.is_leaving):
            raise
        session.not_raised()
        if is_safe(db, session):
            with contextlib.suppress(Exception):
                replace(db, session)
        if db._session is session:
            session.raised()
            raise
        db._plain("_set_autocommit")(False)


def end(db: Any, session: Session) -> None:
    send = functools.partial(db._plain("_set_autocommit"), True)
    transaction, was_raised = db._transaction, session.error_raised
    if transaction.has_ended:
        # What was sent in it no longer counts: the kernel is not asked.
        transaction.statement_sent()
    else:
        notice_unseen(db, session)
    try:
        if transaction.by_hand and transaction.stage is ACTIVE and db.vendor == "mysql":
            # What is open is committed by it.
            send_commit(db, send)
        else:
            send()
    except Error:
        # After COMMIT or ROLLBACK was answered nothing hangs on it.
        ends_nothing = (
            transaction.has_ended if not transaction.by_hand else (transaction.stage is BEGUN)
        )
        if not (ends_nothing and (session.dead or session.is_leaving)):
            if session.dead or transaction.has_ended:
                ended_by_hand(db)
            raise
        if not session.dead:
            # It lives, without autocommit: nothing more must be written there.
            close_for_good(session.connection)
            session.lose()
        passed_over(session, was_raised)
    if transaction.by_hand and db.run_on_commit:
        # Django has seen no commit().
        db.run_commit_hooks_on_set_autocommit_on = True


def commit(db: Any) -> None:
    session = current(db)
    send = db._plain("_commit")
    if session is None:
        # A driver we do not look after; for retrying_atomic a COMMIT it is.
        send_commit(db, send)
        return
    if db._transaction is NO_TRANSACTION:
        end_of_nothing(db, session, functools.partial(send_commit, db, send))
        return
    notice_unseen(db, session)
    nothing_sent = db._transaction.stage is BEGUN
    was_raised = session.error_raised
    try:
        # Nothing happened in this transaction: nothing is lost with it. As after
        # any COMMIT that was answered its hooks run, and nothing again.
        if not (is_lost(db, session) and nothing_sent):
            if session.dead and session.loss is not None and not session.error_raised:
                with db.wrap_database_errors:
                    raise session.loss
            token = None
            if session.balancer.config.commit_outcome is not None:
                token = token_for(db, session)
            send_commit(db, send, token)
    except Error:
        if not (session.dead and (nothing_sent or is_as_good_as_committed(db, session))):
            if session.dead or db._transaction.has_ended:
                ended_by_hand(db)
            raise
        passed_over(session, was_raised)
    db._transaction.is_void = nothing_sent and not db.run_on_commit
    db._transaction.to(COMMITTED)
    ended_by_hand(db)


def end_of_nothing(db: Any, session: Session, send: Callable[[], object]) -> None:
    """Send COMMIT or ROLLBACK in autocommit, as beat's scheduler does: a safe point."""
    at_safe_point(db, session, 0, session.clock())
    session = db._session or session
    safe, was_raised = is_safe(db, session), session.error_raised
    try:
        send()
    except Error:
        if not (safe and session.dead):
            raise
        passed_over(session, was_raised)


def ended_by_hand(db: Any) -> None:
    """Open the record of the next transaction, which begins by itself after one by hand."""
    transaction = db._transaction
    if transaction.by_hand and not db.in_atomic_block:
        if transaction.stage is not COMMITTED:
            db.run_on_commit = db.run_on_commit[: transaction.hooks]
        open_transaction(db, Transaction(by_hand=True, hooks=len(db.run_on_commit)))


def send_commit(db: Any, commit: Callable[[], object], token: Token | None = None) -> None:
    """Send COMMIT. What cannot be known of it is said as that, and nothing is repeated.

    :param token: what is written with it. Then it is found out what became of it.
    """
    session = db._session
    known_dead = session is not None and session.dead
    # Only this COMMIT's: one that an on_commit hook sends is another's.
    transaction = db._transaction
    try:
        transaction.to(COMMITTING)
        if token is None or not commit_with(db, session, token):
            # Where it was refused, what becomes of this COMMIT it cannot tell.
            token = None
            commit()
        note_end_of_transaction(db, stands=True)
    except Error as exc:
        cause = exc.__cause__ or exc
        judgement = drivers.judgement_of(cause, db._driver)
        if known_dead or did_not_run(db, session, judgement):
            # It never left: rolled back.
            transaction.to(ACTIVE)
        elif judgement.proof is Proof.ROLLED_BACK:
            transaction.to(NOT_DONE)
        elif token is not None:
            if not stands(db, session, token, cause):
                raise
            note_end_of_transaction(db, stands=True)
            passed_over(session, was_raised=False)
            transaction.to(COMMITTED)
            return
        elif judgement.proof is not Proof.ANSWERED:
            # A proxy may say of what has run that it has not.
            transaction.to(UNKNOWN)
            raise CommitOutcomeUnknown(*exc.args) from cause
        raise
    transaction.to(COMMITTED)


def note_end_of_transaction(db: Any, stands: bool) -> None:
    session = current(db)
    if session is not None:
        session.holds.transaction_ended(stands)


def rollback(db: Any) -> None:
    session = current(db)
    send = db._plain("_rollback")
    if session is None:
        send()
    elif db._transaction is NO_TRANSACTION:
        end_of_nothing(db, session, send)
    elif db._transaction.by_hand:
        try:
            send()
        except Error:
            if session.dead:
                ended_by_hand(db)
            raise
        # As Django does next.
        db.run_on_commit = []
    else:
        lost_is_rolled_back(db, session, send)
    note_end_of_transaction(db, stands=False)
    db._transaction.to(ROLLED_BACK)
    ended_by_hand(db)


# SAVEPOINTs of Django's own, which are made again with their transaction


def passed_over(session: Session, was_raised: bool) -> None:
    """Note that an error that ends nothing is not raised. If the connection held session
    state, the next statement raises its loss.

    :param was_raised: the loss was raised before.
    """
    if session.holds and not was_raised:
        session.not_raised()
    else:
        session.raised()


def lost_is_rolled_back(db: Any, session: Session, rollback: Callable[[], object]) -> None:
    """Run a ROLLBACK, TO SAVEPOINT and its RELEASE too. A connection that is lost has done it.

    Were it an error, Django would give the whole block up without one: a failed ROLLBACK TO
    or RELEASE after it is an outer block that ends well, and nothing stands.
    """
    if session.dead:
        return
    try:
        rollback()
    except Error:
        session = db._session or session
        if not session.dead:
            raise
        passed_over(session, was_raised=False)


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
        session.holds.at_commit.clear()


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
            transaction.mark = sent(db, session)
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
