"""What is done before and after each statement that is no plain read.

Decides which connection it is sent on; acts on what is known of the session and of the
transaction.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from django.db.utils import Error, OperationalError

from ..core.holdings import asks_for_a_lock
from ..core.statements import ENDS, READ, RESULT, STATE, makes_ids, scan, writes
from ..core.texts import may_end, may_make_read_only
from .losses import sent
from .replacing import at_safe_point, before_first, bind
from .replays import ends_with_block, give_up, kind_of_params, run_again
from .sessions import Session, current


def before_statement(db: Any, cursor: Any, kind: int, now: float, sql: Any, params: Any) -> Session:
    """Have ``cursor`` on a connection that is as good as can be known.

    :raises OperationalError: what the statement asks for went with an earlier connection.
    """
    session: Session = db._session
    if db._read_only:
        give_up(db)
    if db.in_atomic_block:
        before_first(db, session, kind, now)
    else:
        if (
            session.status is not None
            and db.autocommit
            and not session.dead
            and not db._driver.is_at_rest(session.connection)
        ):
            # A transaction that was begun past us is state like a raw BEGIN's.
            # Once the connection is lost the driver knows no longer.
            session.holds.takes_unknown()
        at_safe_point(db, session, kind, now)
    session = db._session
    if kind & session.lost_results:
        raise_lost_results(session)
    if cursor._session is not session:
        session = bind(db, cursor)
    if kind & STATE:
        takes(db, session, sql, params)
    transaction = db._transaction
    if kind & (STATE | ENDS) and transaction.is_of_atomic:
        transaction.is_whole &= not may_end(sql, db.vendor)
        transaction.may_be_read_only |= may_make_read_only(sql)
    return session


def raise_lost_results(session: Session) -> None:
    raise OperationalError(
        f"{session.balancer.name}: what this statement asks for went with a connection "
        "that was replaced. LAST_INSERT_ID(), lastval(), ROW_COUNT() and the like "
        "answer for one connection only, and the new one would answer for itself."
    )


def takes(db: Any, session: Session, sql: Any, params: Any) -> None:
    """Take note, before it is sent, of a statement that leaves something in the session."""
    session.holds.note_before()
    if not db._of_ours and not ends_with_block(db, sql):
        session.holds.sent(sql, params)


def note_answered(db: Any, session: Session, kind: int, sql: Any, params: Any) -> None:
    """Take note of a statement that was answered in a block that has only read so far."""
    transaction = db._transaction
    if kind != READ:
        transaction.statement_sent()
        return
    transaction.read_answered(sql, params)
    transaction.mark = sent(db, session)


def after_statement(cursor: Any, session: Session, kind: int, sql: Any, params: Any) -> None:
    """Take note of what a statement that succeeded, and is no plain read, has changed."""
    if session.holds.for_life:
        db = cursor.db
        session.holds.answered(sql, params, db.in_atomic_block or not db.autocommit)
        if kind & STATE and asks_for_a_lock(sql) and answers_no(cursor.cursor):
            session.holds.refused(sql, params)
    if writes(kind):
        has_results(session, sql)


def before_many(db: Any, cursor: Any, sql: Any, params: Any) -> Session | None:
    session = current(db)
    if session is None or cursor._server_side is not None:
        return None
    kind = kind_of_many(db, session, sql, params)
    now = session.clock()
    session = before_statement(db, cursor, kind, now, sql, None)
    sends(session, now, sql, params)
    session.wrote = session.results = True
    return session


def kind_of_many(db: Any, session: Session, sql: Any, params: Any) -> int:
    """Return what a statement is that is sent with many parameters, or calls a procedure."""
    return (scan(sql) & ~READ) | kind_of_params(db, session, params or ())


def sends(session: Session, now: float, sql: Any, params: Any) -> None:
    """Take note of a statement that is about to be sent, as cursors do of plain ones."""
    budget = session.budget
    budget.statements += 1
    if now > budget.next_note:
        budget.note(now)
    session.used, session.sending = now, (sql, params)


def unseen(db: Any) -> None:
    """Take note of what may be sent and will not be seen: it counts as a write."""
    db._transaction.statement_sent()
    session = db._session
    if session is not None:
        session.wrote = session.results = True


def run_many(db: Any, cursor: Any, sql: Any, param_list: Any, run: Callable[[], Any]) -> Any:
    """Run executemany(); again from its beginning, if it is the first of a block and lost.

    Or callproc(), which no replay is allowed for.
    """
    session = before_many(db, cursor, sql, param_list)
    if session is None or db._driver.is_busy(session.connection):
        try:
            return run()
        finally:
            db._transaction.statement_sent()
    try:
        result = run()
    except Error as exc:
        kind = kind_of_many(db, session, sql, param_list)
        done = run_again(db, cursor, session, exc, sql, param_list, kind, run, single=False)
        if done is None:
            raise
        session, result = done
    finally:
        unseen(db)
    session.sending = None
    has_results(session, sql)
    return result


def declare(
    db: Any, cursor: Any, session: Session, sql: Any, params: Any, plain: Callable[..., Any]
) -> Any:
    """Run the statement of a server-side cursor, which sends DECLARE."""
    run = functools.partial(plain, cursor, sql, params)
    if session.connection is not db.connection:
        db._transaction.statement_sent()
        return run()
    kind = scan(sql)
    if params:
        kind |= kind_of_params(db, session, params)
    if kind & session.lost_results:
        raise_lost_results(session)
    if kind & STATE:
        takes(db, session, sql, params)
    sends(session, session.clock(), sql, params)
    if writes(kind):
        session.wrote = session.results = True
    try:
        result = run()
    except Error as exc:
        done = run_again(db, cursor, session, exc, sql, params, kind, run)
        if done is None:
            db._transaction.statement_sent()
            raise
        session, result = done
    except BaseException:
        db._transaction.statement_sent()
        raise
    session.sending = None
    if db._transaction.reads is not None:
        note_answered(db, session, kind, sql, params)
    cursor._declared = (session, sql, params, kind, plain)
    return result


def fetch_first(db: Any, cursor: Any, declared: Any, fetch: Callable[[], Any]) -> Any:
    """Fetch the first rows of a server-side cursor: if they are lost, none was given out."""
    session: Session
    session, sql, params, kind, plain = declared
    if session is not current(db):
        return fetch()
    sends(session, session.clock(), sql, params)

    def run_and_fetch() -> Any:
        plain(cursor, sql, params)
        return fetch()

    try:
        result = fetch()
    except Error as exc:
        done = run_again(db, cursor, session, exc, sql, params, kind, run_and_fetch)
        if done is None:
            raise
        session, result = done
    session.sending = None
    return result


def has_results(session: Session, sql: Any) -> None:
    """Take note that a session has answers of its own to tell: of a write that was answered."""
    if session.lost_results:
        session.lost_results &= 0 if makes_ids(sql) else ~RESULT


def answers_no(cursor: Any) -> bool:
    """Return whether a driver's cursor has one value, which is false, and put it back."""
    try:
        row = cursor.fetchone()
        cursor.scroll(0, mode="absolute")
        return len(row) == 1 and not row[0]
    except Exception:
        # Not all cursors go back. Their users will see what there is.
        return False
