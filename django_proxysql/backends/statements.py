"""What is done before and after each statement that is no plain read."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from django.db.utils import OperationalError

from ..core import ready
from ..core.holdings import asks_for_a_lock
from ..core.statements import (
    ENDS,
    FOUND,
    IDS,
    READ,
    RESULT,
    STATE,
    UNSURE,
    UNTAKEN,
    asks_for_inserted,
    asks_for_taken,
    head_of,
    makes_ids,
    may_end,
    may_make_read_only,
    scan,
    takes_next,
    text_in,
    writes,
)
from .losses import notice_unseen, sent
from .replacing import at_safe_point, before_first, bind
from .replays import Statement, give_up, kind_of_params, run_again, takes, text_for
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
            and "transaction" not in session.holds.for_life
            and not db._driver.is_at_rest(session.connection)
        ):
            # A transaction that was begun past us is state like a raw BEGIN's, but of no known end.
            # Once the connection is lost the driver knows no longer.
            session.holds.takes_unknown()
        at_safe_point(db, session, kind, now)
    session = db._session
    raise_lost_results(db, session, kind, sql)
    if cursor._session is not session:
        session = bind(db, cursor)
    if kind & STATE:
        takes(db, session, sql, params)
    note_end(db, kind, sql)
    return session


def note_end(db: Any, kind: int, sql: Any) -> None:
    """Take note, before it is sent, of a statement that may end the atomic block's transaction."""
    transaction = db._transaction
    if kind & (STATE | ENDS) and transaction.is_of_atomic:
        text = text_for(db, sql)
        transaction.is_whole &= not may_end(text, db.vendor)
        transaction.may_be_read_only |= may_make_read_only(text)


def raise_lost_results(db: Any, session: Session, kind: int, sql: Any) -> None:
    """Raise an error if the connection that a statement asks about was replaced.

    :raises OperationalError: it was.
    """
    is_lost = bool(kind & session.lost_results)
    if kind & IDS and session.lost_results & UNTAKEN:
        # MariaDB would answer NULL.
        is_lost |= asks_for_taken(sql)
    if not is_lost and kind & IDS and session.lost_results & UNSURE and asks_for_inserted(sql):
        # ROW_COUNT() and FOUND_ROWS() would answer for the question.
        is_lost = bool(kind & (RESULT | FOUND)) or not has_inserted_id(db, session)
    if is_lost:
        raise OperationalError(
            f"{session.balancer.name}: what this statement asks for went with a connection "
            "that was replaced. LAST_INSERT_ID(), lastval(), ROW_COUNT() and the like "
            "answer for one connection only, and the new one would answer for itself."
        )


def has_inserted_id(db: Any, session: Session) -> bool:
    """Ask a session of MySQL's whether an INSERT has made an id in it."""
    with db.wrap_database_errors:
        [(number,)] = ready.rows(session.connection, "SELECT LAST_INSERT_ID()")
    # A SELECT of our own was the last one.
    session.lost_results |= FOUND
    if number:
        session.lost_results &= ~UNSURE
    return bool(number)


def note_answered(db: Any, session: Session, kind: int, sql: Any, params: Any) -> None:
    """Take note of a statement that was answered in a block that has only read so far."""
    transaction = db._transaction
    if kind != READ:
        transaction.statement_sent()
        return
    transaction.read_answered(sql, params)
    transaction.mark = sent(db, session)


def after_statement(cursor: Any, session: Session, kind: int, sql: Any, params: Any) -> None:
    """Take note of what a statement that succeeded has changed, or has left to be asked for."""
    if session.holds.for_life:
        db = cursor.db
        text = text_for(db, sql)
        session.holds.answered(text, params, db.in_atomic_block or not db.autocommit)
        # What an unbuffered cursor has read it does not give again.
        is_kept = kind & STATE and not session.unbuffered
        if is_kept and asks_for_a_lock(text) and answers_no(cursor.cursor):
            session.holds.refused(text, params)
    if session.lost_results & FOUND and head_of(text_in(sql) or "") == "SELECT":
        session.lost_results &= ~FOUND
    if writes(kind):
        has_results(cursor.db, session, sql)


def attempt(
    db: Any,
    cursor: Any,
    session: Session,
    statement: Statement,
    again: Callable[[], Any] | None = None,
) -> tuple[Session, Any]:
    """Send a statement, as the hook of cursors does; return its session and its result.

    :param again: what is run on another connection if it is lost; None: the same.
    """
    # The driver's own may have sent something since the cursor was made, or since DECLARE.
    notice_unseen(db, session)
    budget, now = session.budget, session.clock()
    budget.statements += 1
    if now > budget.next_note:
        budget.note(now)
    session.used, session.sending = now, (statement.sql, statement.params)
    try:
        result = statement.run()
    except BaseException as exc:
        if again is not None:
            statement = statement._replace(run=again)
        done = run_again(db, cursor, session, exc, statement)
        if done is None:
            raise
        session, result = done
    session.sending = None
    return session, result


def unseen(db: Any) -> None:
    """Take note of what may be sent and will not be seen: it counts as a write."""
    db._transaction.statement_sent()
    session = db._session
    if session is not None:
        session.wrote = session.results = True


def run_many(
    db: Any,
    cursor: Any,
    sql: Any,
    param_list: Any,
    run: Callable[[], Any],
    params: Any = None,
) -> Any:
    """Run executemany(); again from its beginning, if it is the first of a block and lost.

    Or callproc(), which no replay is allowed for.

    :param params: what callproc() is given; None: it is executemany().
    """
    session = current(db)
    if session is None or cursor._server_side is not None:
        note_end(db, scan(sql), sql)
        try:
            return run()
        finally:
            db._transaction.statement_sent()
    kind = (scan(sql) & ~READ) | kind_of_params(db, session, param_list or ())
    session = before_statement(db, cursor, kind, session.clock(), sql, params)
    session.wrote = session.results = True
    if db._driver.is_busy(session.connection):
        # In a pipeline: an error may be an earlier statement's.
        kind |= STATE
    statement = Statement(sql, param_list, kind, run, single=False)
    try:
        session, result = attempt(db, cursor, session, statement)
    finally:
        unseen(db)
    if params is None:
        has_results(db, session, sql)
    else:
        after_statement(cursor, session, kind, sql, params)
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
    raise_lost_results(db, session, kind, sql)
    if kind & STATE:
        takes(db, session, sql, params)
    if writes(kind):
        session.wrote = session.results = True
    session, result = attempt(db, cursor, session, Statement(sql, params, kind, run))
    if db._transaction.reads is not None:
        note_answered(db, session, kind, sql, params)
    # Without what runs it, which refers to the cursor.
    cursor._declared = (session, sql, params, kind, plain)
    return result


def fetch_first(db: Any, cursor: Any, declared: Any, fetch: Callable[[], Any]) -> Any:
    """Fetch the first rows of a server-side cursor: if they are lost, none was given out."""
    session: Session
    session, sql, params, kind, plain = declared
    if session is not current(db):
        return fetch()

    def run_and_fetch() -> Any:
        plain(cursor, sql, params)
        return fetch()

    statement = Statement(sql, params, kind, fetch)
    return attempt(db, cursor, session, statement, run_and_fetch)[1]


def has_results(db: Any, session: Session, sql: Any) -> None:
    """Take note that a session has answers of its own to tell: of a write that was answered."""
    session.lost_results &= ~RESULT
    if session.lost_results & IDS and makes_ids(sql):
        # PostgreSQL itself knows that a session has made none.
        session.lost_results &= FOUND
        session.lost_results |= UNSURE | UNTAKEN if db.vendor == "mysql" else 0
    if session.lost_results & UNTAKEN and takes_next(sql):
        session.lost_results &= ~UNTAKEN


def answers_no(cursor: Any) -> bool:
    """Return whether a driver's cursor has one value, which is false, and put it back."""
    try:
        # Before its row is read, for not all cursors go back.
        go_to = cursor.scroll
        row = cursor.fetchone()
        go_to(0, mode="absolute")
        return len(row) == 1 and not row[0]
    except Exception:
        return False
