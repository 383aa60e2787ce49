"""Run a lost statement again, where :func:`.decisions.may_replay` allows it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from django.db.utils import Error

from ..core import drivers, ready
from ..core.events import StatementReplayed
from ..core.exceptions import NotReady
from ..core.faults import Fault, Judgement
from ..core.parameters import are_small, are_values, may_be_sql
from ..core.statements import RESULT, SCOPED, STATE, writes
from ..core.texts import Text, is_of_transaction, tells_time, text_of, without_lock
from .decisions import Cause, How, Lost, Place, Replay, may_replay
from .losses import did_not_run
from .proofs import is_undone, reads_anew
from .replacing import begin_anew, bind, replace
from .sessions import Session, close_for_good
from .state import MOST_BEGUN_ANEW

#: MySQL's refusal of a write in a READ ONLY transaction, and PostgreSQL's.
_REFUSALS = (1792, "25006")
_SAVEPOINT = "django_proxysql_replay"
#: Rows of an executemany() that are sent again, and the most that each may hold.
_MOST_ROWS = 10_000


class Refused(Exception):
    """The server does not run READ ONLY what was to be run again as a read."""


class Statement(NamedTuple):
    """A statement that is under way."""

    sql: Any
    params: Any
    #: What :func:`.core.statements.scan` says of it.
    kind: int
    #: Runs it on what its cursor is bound to.
    run: Callable[[], Any]
    #: It is not executemany().
    single: bool = True


def run_again(
    db: Any, cursor: Any, session: Session, exc: BaseException, statement: Statement
) -> tuple[Session, Any] | None:
    """Run a statement that has failed again, if it may be; None if ``exc`` is to be raised.

    ``cursor`` is then bound to another connection, and the transaction, if
    there is one, begun anew.

    :raises Error: what became of the second run, unless it was refused.
    """
    done = None
    try:
        cause = exc.__cause__
        if isinstance(exc, Error) and cause is not None and (session.dead or session.is_leaving):
            judgement = drivers.judgement_of(cause, db._driver)
            done = _replay(db, cursor, session, judgement, statement)
        return done
    finally:
        if done is None:
            db._transaction.statement_sent()


def _replay(
    db: Any, cursor: Any, session: Session, judgement: Judgement, statement: Statement
) -> tuple[Session, Any] | None:
    sql, params, kind, run, _single = statement
    replay = may_replay(lost_statement(db, cursor, session, judgement, statement))
    reads = len(db._transaction.reads or ()) if replay.reads_anew else 0
    # What is rehearsed is run again, too.
    if replay.how is How.NEVER or not session.budget.spend(sql, 1 + reads + replay.rehearse):
        return None
    name = None if cursor._server_side is None else cursor.cursor.name
    session.not_raised()
    try:
        begin = functools.partial(prove_and_begin, db, replay, sql, params)
        replace(db, session, resume=begin if db.in_atomic_block else None)
        successor = bind(db, cursor, name)
        if kind & STATE:
            takes(db, successor, sql, params)
        # What it writes, it writes there.
        successor.results |= writes(kind)
    except BaseException as error:
        session.raised()
        if not isinstance(error, Exception):
            raise
        # What the application is raised is what happened to its statement.
        return None
    successor.used = session.used
    successor.sending = (sql, params)
    names = session.balancer.name, session.peer.name, successor.peer.name
    event = StatementReplayed(*names, judgement.text)
    try:
        result = run() if replay.how is How.AS_IT_IS else run_read_only(db, run)
    except Refused:
        # It was no read: what was lost is raised, and not what it is.
        if db.in_atomic_block:
            give_up(db)
        return None
    except Error:
        session.budget.bar(sql)
        successor.balancer.emit(event)
        raise
    successor.balancer.emit(event)
    return successor, result


def run_read_only(db: Any, run: Callable[[], Any]) -> Any:
    """Run a statement READ ONLY, in which a server refuses every write, also a view's function's.

    That is a transaction around it, or a part of PostgreSQL's transaction, which is what it was
    at the savepoint's end (seen). ``SET TRANSACTION READ ONLY`` before one statement of autocommit
    would be one round trip less, but outlives a SELECT of no table on MariaDB (seen).

    :raises Refused: the server does not take it for a read.
    """
    session, in_block = db._session, db.in_atomic_block
    # SELECT: under SERIALIZABLE the server does not watch a transaction for conflicts that is
    # READ ONLY when it gets its snapshot, whatever it writes later (seen).
    begins = f"SELECT 1; SAVEPOINT {_SAVEPOINT}; SET TRANSACTION READ ONLY"
    begun = is_well = False
    try:
        db._read_only = True
        # An interrupt may come at any line: until all is well the next statement asks.
        version, session.version = session.version, None
        with db.wrap_database_errors:
            ready.rows(session.connection, begins if in_block else "START TRANSACTION READ ONLY")
        begun = True
        result = run()
        is_well = ends(session, f"RELEASE SAVEPOINT {_SAVEPOINT}" if in_block else "COMMIT")
        # It has taken the statement's warnings.
        session.lost_results |= RESULT
        return result
    except Error as exc:
        code = db._driver.code_of(exc.__cause__ or exc)
        refused = not session.dead and (not begun or code in _REFUSALS)
        # In a block the application's transaction has failed, as it would have without a savepoint.
        is_well = in_block or ends(session, "ROLLBACK")
        if refused:
            raise Refused from exc
        raise
    finally:
        if is_well:
            session.version = version
            db._read_only = False
        else:
            give_up(db)


def ends(session: Session, statement: str) -> bool:
    """End a READ ONLY transaction; return whether that was answered, or the connection lost."""
    if not session.dead:
        try:
            ready.rows(session.connection, statement)
        except Exception:
            # The rows are there. What follows must not be read only.
            return False
    return True


def prove_and_begin(db: Any, replay: Replay, sql: Any, params: Any) -> None:
    """Ask the new peer what must be known before a statement is run again there, and begin the
    transaction in which it is.

    :raises Exception: what the answer was, or what kept it from coming.
    """
    connection = db.connection
    if replay.reads_anew and db.vendor == "mysql":
        # What the block has read is not older here.
        ready.catch_up(connection)
    if replay.is_undone and not is_undone(connection, db.vendor, sql):
        raise NotReady("not all that the statement may change is undone by a rollback")
    reads = list(db._transaction.reads or ()) if replay.reads_anew else []
    if replay.rehearse:
        reads.append((without_lock(sql), params))
    if reads:
        rehearse(db, reads)
    begin_anew(db)
    if replay.reads_anew and not reads_anew(connection, db.vendor):
        raise NotReady("the transaction must see what it has read before")


def rehearse(db: Any, reads: list[tuple[Any, Any]]) -> None:
    """Run what looks like reads READ ONLY on the new connection: writes show there.

    What they wrote in a transaction that is lost would be gone with it, without an error.

    :raises Exception: the driver's error.
    """
    ready.rows(db.connection, "START TRANSACTION READ ONLY")
    for sql, params in reads:
        cursor = db.create_cursor()
        try:
            cursor.execute(sql, params)
        finally:
            cursor.close()
    ready.rows(db.connection, "COMMIT")


def give_up(db: Any) -> None:
    """Close the connection for good; what follows in a block fails, as on a lost one."""
    db._read_only = False
    session = db._session
    if session is not None and session.connection is db.connection:
        session.lose()
        session.raised()
        close_for_good(session.connection)


def lost_statement(
    db: Any, cursor: Any, session: Session, judgement: Judgement, statement: Statement
) -> Lost:
    """Return what counts for whether a lost statement may be run again."""
    sql, params, kind, _run, single = statement
    config = session.balancer.config
    text = text_of(sql, dialect_of(db), params)
    holds = bool(kind & STATE or session.holds)
    if kind & STATE and text is Text.SETTING:
        # What it sets is all that was held, and is set again.
        holds = session.holds.before
    elif text is Text.OF_TRANSACTION and db.in_atomic_block:
        holds = bool(session.holds)
    return Lost(
        place=place(db, session),
        cause=cause_of(db, session, judgement),
        text=text,
        dialect=dialect_of(db),
        enabled=config.replay is not None,
        holds_state=bool(
            holds
            or kind & SCOPED
            or session.unbuffered
            or any(other is not cursor for other in session.server_side)
            or db._thread_sharing_count > 0
            # psycopg's executemany() is busy itself; see :func:`.statements.run_many`.
            or (single and db._driver.is_busy(session.connection))
            or (db.autocommit and not db._driver.is_at_rest(session.connection))
        ),
        sendable=are_sendable(db, session, params, single),
        single=single,
        may_be_stale=(
            not config.synchronous_peers and (session.wrote or db._transaction.has_only_read)
        ),
    )


def place(db: Any, session: Session) -> Place:
    if not db.in_atomic_block:
        return Place.AUTOCOMMIT if db.autocommit else Place.LATER
    if db._transaction.is_pending:
        return Place.FIRST
    return Place.AFTER_READS if has_only_read(db, session, anew=True) else Place.LATER


def has_only_read(db: Any, session: Session, anew: bool) -> bool:
    """Return whether all that the transaction has done is proven to be reads without locks.

    :param anew: it is to begin anew: then an answer about its own time counts, too.
    """
    transaction = db._transaction
    if not transaction.has_only_read or (anew and len(transaction.reads or ()) > MOST_BEGUN_ANEW):
        return False
    dialect = dialect_of(db)
    return all(
        text_of(sql, dialect, params) is Text.READ
        # All of it was answered before: what is lost is COMMIT, and no packet was too large.
        and are_sendable(db, session, params, single=True, any_size=not anew)
        and not (anew and dialect == "postgresql" and tells_time(sql))
        for sql, params in transaction.reads or ()
    )


def cause_of(db: Any, session: Session, judgement: Judgement) -> Cause:
    if did_not_run(db, session, judgement):
        return Cause.NOT_RUN
    # The same words for a closed socket and for a time-out, after which
    # the statement may be running still. (mysqlclient)
    if session.dead and session.has_timed_out():
        return Cause.TIMED_OUT
    if session.dead:
        return Cause.CLOSED
    is_service = judgement.fault not in (Fault.LOST, Fault.NOT_READY)
    return Cause.ANSWERED if is_service else Cause.NO_SERVICE


def kind_of_params(db: Any, session: Session, params: Any) -> int:
    """Return STATE if what the parameters put into the statement cannot be known."""
    try:
        return STATE if may_be_sql(params, session.known_types, usual(db, session)) else 0
    except Exception:
        # The driver will not know it either.
        return STATE


def usual(db: Any, session: Session) -> Callable[[type], bool]:
    """Return what says whether the driver's own way or Django's makes SQL of a type's values."""
    return functools.partial(db._driver.is_usual, drivers.unwrapped(session.connection))


def are_sendable(
    db: Any, session: Session, params: Any, single: bool, any_size: bool = False
) -> bool:
    """Return whether the parameters are there still, are plain values, and not too many.

    :param any_size: whether they may be of any size.
    """
    is_usual = usual(db, session)
    try:
        if single:
            return (any_size or are_small(params)) and are_values(params, is_usual)
        return (
            isinstance(params, (list, tuple))
            and len(params) <= _MOST_ROWS
            and all(are_values(row, is_usual) and are_small(row, _MOST_ROWS) for row in params)
        )
    except Exception:
        # A type that the driver does not know, an object that answers with an error.
        return False


def takes(db: Any, session: Session, sql: Any, params: Any) -> None:
    """Take note, before it is sent, of a statement that leaves something in the session."""
    session.holds.note_before()
    text = text_for(db, sql)
    if not db._of_ours and not ends_with_block(db, text):
        session.holds.sent(text, params)


def text_for(db: Any, sql: Any) -> Any:
    """Return a statement's text, which the driver may make of what the application composes."""
    return db._driver.as_text(drivers.unwrapped(db.connection), sql)


def ends_with_block(db: Any, sql: Any) -> bool:
    """Return whether what a statement sets ends with the atomic block: SET TRANSACTION."""
    in_block = db._transaction.is_of_atomic and db.vendor == "postgresql"
    return in_block and is_of_transaction(sql)


def dialect_of(db: Any) -> str:
    if db.vendor != "mysql":
        return str(db.vendor)
    # Django has asked for it when it set the connection up.
    data = vars(db).get("mysql_server_data")
    return "mariadb" if data and "mariadb" in str(data.get("version")).lower() else "mysql"
