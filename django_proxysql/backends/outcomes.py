"""Write tokens, and find out what became of a COMMIT whose answer is lost (:mod:`.core.outcome`).

Three steps: :func:`token_for` says before COMMIT what is written with it,
:func:`commit_with` sends both in one packet, and :func:`stands` asks the peers
when the answer is lost.
"""

from __future__ import annotations

import contextlib
import functools
import time
import weakref
from typing import Any, NamedTuple

from django.db import Error, OperationalError
from django.db.backends import utils

from ..core import drivers, outcome, ready
from ..core.circuit import CLOSED
from ..core.events import CommitResolved
from ..core.exceptions import NotReady
from ..core.faults import Fault, Proof
from ..core.group import PeerGroup
from ..core.outcome import Outcome, Refusal, Tokens
from ..core.parameters import VALUES
from ..core.peer import Peer
from ..core.texts import Text, text_of
from ..errors import CommitOutcomeUnknown, NoPeerAvailable
from .decisions import may_count_as_committed, writes_token
from .losses import is_of_server, is_of_the_call, throw_away
from .replacing import replace
from .replays import are_sendable, dialect_of, has_only_read, rehearse
from .sessions import Session
from .state import ACTIVE, NOT_DONE, ROLLED_BACK, UNKNOWN
from .tokens import begin, delete_some

#: Django before 4.2 logs no COMMIT.
_logged: Any = getattr(utils, "debug_transaction", None) or (
    lambda connection, sql: contextlib.nullcontext()
)
#: Longer texts have values in them, and would fill the memo.
_LONGEST_PROVEN = 5000
_SEQUENCES = frozenset({tuple, list})


@functools.lru_cache(maxsize=2000)
def _proven(sql: str, is_bare: bool, dialect: str) -> bool:
    return text_of(sql, dialect, None if is_bare else ()) is Text.READ


#: psycopg 3's names, psycopg2's numbers.
_NOT_SERIALIZABLE = ("READ_UNCOMMITTED", "READ_COMMITTED", "REPEATABLE_READ", "1", "2", "4")
#: Held by a session that writes to locked tables alone (LOCK TABLES), or on its Galera node alone.
_NO_TOKEN = frozenset({"tables", "wsrep_on"})
#: Of a peer that may be there again, or of another one's turn.
_GONE = (Fault.UNREACHABLE, Fault.NOT_READY, Fault.OVERLOADED, Fault.LOST)
#: The MySQL family's ER_PARSE_ERROR.
_SYNTAX_ERROR = 1064

_tokens = Tokens()

#: Where a balancer's connections find the table, by what they connect with.
_schemas: weakref.WeakKeyDictionary[PeerGroup, dict[Any, str]] = weakref.WeakKeyDictionary()


class Token(NamedTuple):
    """What a transaction writes before COMMIT."""

    value: bytes
    #: The table's name, with its schema.
    table: str
    #: When COMMIT was sent, on a clock that stops while the host sleeps and on one that does not.
    sent: tuple[float, float]


def token_for(db: Any, session: Session) -> Token | None:
    """Return what the transaction is to write before COMMIT; None: nothing.

    Called where the alias has COMMIT_OUTCOME.

    :raises OperationalError: the table is not there. Nothing was committed.
    """
    transaction = db._transaction
    reads = transaction.reads
    only_read = bool(reads) and _needs_none(db, session, reads)
    if not writes_token(transaction.stage, transaction.by_hand, transaction.is_whole, only_read):
        return None
    with db.wrap_database_errors:
        if not db._driver.may_write(session.connection, transaction.may_be_read_only):
            return None
    if not _NO_TOKEN.isdisjoint(session.holds.for_life):
        return None
    table = _table(db, session)
    return Token(_tokens.next(), table, (time.monotonic(), time.time()))


def _needs_none(db: Any, session: Session, reads: list[tuple[Any, Any]]) -> bool:
    """Return whether a block is proven to be reads, and ends well whatever becomes of COMMIT.

    See :func:`is_as_good_as_committed`.
    """
    # The server's own default is asked for once COMMIT is lost: here it is a round trip.
    serializable = bool(is_serializable(db, isolation_of(session)))
    if not counts_as_committed(db, session, only_read=True, serializable=serializable):
        return False
    dialect = dialect_of(db)
    # No generator: each block of reads comes by here.
    for sql, params in reads:
        if not isinstance(sql, str) or len(sql) > _LONGEST_PROVEN:
            return False
        if not _proven(sql, params is None, dialect):
            return False
        # Whether the driver quotes plain values in its own way is asked once COMMIT is lost:
        # here it would cost more than the rest.
        if not (
            params is None
            or (params.__class__ in _SEQUENCES and VALUES.issuperset(map(type, params)))
            or are_sendable(db, session, params, single=True, any_size=True)
        ):
            return False
    return True


def counts_as_committed(
    db: Any, session: Session, *, only_read: bool, serializable: bool | None
) -> bool:
    """Return whether the transaction counts as committed if its COMMIT is lost."""
    return may_count_as_committed(
        only_read=only_read,
        holds=bool(session.holds),
        shared=db._thread_sharing_count > 0,
        enabled=session.balancer.config.replay is not None,
        serializable=serializable,
    )


def is_as_good_as_committed(db: Any, session: Session) -> bool:
    """Return whether the transaction, whose end is lost, is as good as committed.

    If it is, the connection was replaced.
    """
    only_read = has_only_read(db, session, anew=False)
    may_count = functools.partial(counts_as_committed, db, session, only_read=only_read)
    if not may_count(serializable=False):
        return False
    reads = list(db._transaction.reads)
    level, config = isolation_of(session), session.balancer.config

    def resume() -> None:
        # Any peer can tell, and the old one may be dead.
        if not may_count(serializable=is_serializable(db, level, db.connection)):
            raise NotReady("COMMIT might have found a conflict of reads")
        rehearse(db, reads)

    def ask(_any_peer: None, _seconds: float) -> Outcome | None:
        try:
            replace(db, session, resume=resume)
        except Exception as exc:
            return None if _is_of_peers(db, exc) else Outcome.UNKNOWN
        return Outcome.COMMITTED

    if config.commit_outcome is None:
        return session.budget.spend("COMMIT", len(reads)) and ask(None, 0) is Outcome.COMMITTED
    # Where outcomes are found out, each is: it costs no budget, and peers may come back.
    now = time.monotonic(), time.time()
    found = outcome.ask_until(lambda: [None], ask, config.outcome_deadline, now)
    return found is Outcome.COMMITTED


def _is_of_peers(db: Any, exc: Exception) -> bool:
    """Return whether no peer could be reached, or the one that was is gone again."""
    if isinstance(exc, NotReady):
        return False
    fault = drivers.judgement_of(exc.__cause__ or exc, db._driver).fault
    return isinstance(exc, NoPeerAvailable) or fault in _GONE


def isolation_of(session: Session) -> Any:
    """Return the isolation level that psycopg keeps for the connection; None: the server's."""
    try:
        return getattr(session.connection, "isolation_level", None)
    except Exception:
        # The driver does not say of a connection that is closed: it may be SERIALIZABLE.
        return "unknown"


def is_serializable(db: Any, level: Any, connection: Any = None) -> bool | None:
    """Return whether COMMIT may find a conflict of reads alone; None: that is not known.

    :param level: as of :func:`isolation_of`.
    :param connection: is asked for its server's default; None: no server is asked.
    """
    if db.vendor == "mysql":
        # Its reads take locks, then: a conflict is found before.
        return False
    if level is not None:
        # psycopg's: 4 in version 3, 3 in psycopg2's first releases still.
        return getattr(level, "name", str(level)) not in _NOT_SERIALIZABLE
    if connection is None:
        return None
    [(name,)] = ready.rows(connection, "SHOW default_transaction_isolation")
    return str(name) == "serializable"


def _table(db: Any, session: Session) -> str:
    vendor = db.vendor
    if vendor == "mysql" and session.database:
        return outcome.qualified(vendor, session.database)
    known = _schemas.setdefault(session.balancer, {})
    # Not of the settings as they are by now: an application may choose its database there.
    settings = db.settings_dict
    key = session.database or settings["NAME"], settings["USER"]
    schema = known.get(key)
    if schema is None:
        # Once a process, on the session itself: what it has set counts.
        question = outcome.where_is(vendor)
        with db.wrap_database_errors:
            if not db._driver.is_busy(session.connection):
                [(schema,)] = ready.rows(session.connection, question)
            if schema is None:
                # The block may have set a search_path of its own, or not have had its answers yet.
                with throw_away(db, session.peer) as connection:
                    begin(vendor, connection, session.role)
                    [(schema,)] = ready.rows(connection, question)
        if schema is None:
            raise _missing(session)
        known[key] = schema
    return outcome.qualified(vendor, schema)


def commit_with(db: Any, session: Any, token: Token) -> bool:
    """Write the token and COMMIT, in one packet where that can be done; see Django's _commit().

    :returns: False: the transaction takes no writes, and is still open. Nothing was committed.
    """
    driver, connection = db._driver, session.connection
    statement = outcome.insert(db.vendor, token.table, token.value)
    with _logged(db, "COMMIT"), db.wrap_database_errors:
        try:
            try:
                driver.commit_after(connection, statement, session.takes_two)
            except Exception as exc:
                if not session.takes_two or driver.code_of(exc) != _SYNTAX_ERROR:
                    raise
                # Something in between takes no two statements. MySQL's transaction is still open.
                session.takes_two = False
                driver.commit_after(connection, statement, together=False)
        except Exception as exc:
            if (
                drivers.is_marked(exc, "of_first")
                and driver.is_answer(exc)
                and driver.goes_on_without(exc, is_of_server(db, session))
            ):
                return False
            raise
    # COMMIT was answered: whatever this raises is no error of it.
    with contextlib.suppress(Exception):
        delete_some(db, session, token.table, token.value)
    return True


def stands(db: Any, session: Session, token: Token, cause: BaseException) -> bool:
    """Return True if a transaction whose COMMIT met an error stands all the same.

    Its record says what is known of it afterwards.

    :param cause: the driver's error; no conflict, and not one that proves that nothing was sent.
    :raises Error: it does not stand, or that is unknown. None: the error is the application's.
    """
    driver, transaction = db._driver, db._transaction
    refused = _refusal(db, cause)
    if refused in (Refusal.MISSING, Refusal.DENIED):
        # It may be in another schema by now.
        _schemas.pop(session.balancer, None)
        transaction.to(ROLLED_BACK)
        missing = refused is Refusal.MISSING
        raise (_missing(session) if missing else _denied(session, cause)) from cause
    if refused is None:
        if drivers.is_marked(cause, "of_first") and (
            drivers.is_marked(cause, "alone")
            or (driver.is_answer(cause) and is_of_server(db, session))
        ):
            # COMMIT was not sent, or the server has not come to it.
            transaction.to(ACTIVE)
            return False
        if drivers.judgement_of(cause, driver).proof is Proof.ANSWERED:
            return False
    # Where the token is there already: a fence wrote it while this process was stopped, or the
    # transaction itself did, and something in between has sent its end once more.
    found = _find_out(db, session, token, cause)
    if found is Outcome.UNKNOWN:
        transaction.to(UNKNOWN)
        raise CommitOutcomeUnknown(*cause.args) from cause
    if found is Outcome.ROLLED_BACK:
        transaction.to(NOT_DONE)
        raise _rolled_back(session, cause) from cause
    return True


def _find_out(db: Any, session: Session, token: Token, cause: BaseException) -> Outcome:
    """Ask the peers what became of a COMMIT, for OUTCOME_DEADLINE at most."""
    balancer, config = session.balancer, session.balancer.config
    if not session.dead:
        # What is still open there has the token locked, and would have the fence wait.
        with contextlib.suppress(Error), db.wrap_database_errors:
            session.connection.rollback()

    def peers() -> list[Peer]:
        # Where peers may lag, absence proves something on the transaction's own alone.
        known = balancer.peers.values() if config.synchronous_peers else [session.peer]
        return sorted(known, key=_doubt)

    began = time.monotonic()
    ask = functools.partial(_ask, db, session, token)
    found = outcome.ask_until(peers, ask, config.outcome_deadline, token.sent)
    peer, seconds = session.peer, time.monotonic() - began
    balancer.emit(
        CommitResolved(
            balancer.name, peer.name, peer.address, found.value, seconds, drivers.describe(cause)
        )
    )
    return found


def _doubt(peer: Peer) -> tuple[bool, bool]:
    """Return what puts a peer last: its circuit is open, or it has lost a connection.

    It is asked all the same: it may have come back, and the others may be gone.
    """
    circuit = peer.breaker.circuit
    return circuit.state != CLOSED, circuit.suspect


def _ask(db: Any, session: Session, token: Token, peer: Peer, seconds: float) -> Outcome | None:
    """Ask one peer, on a connection of its own that is closed afterwards.

    :returns: None: a lock wait, a conflict, a loss, a refusal.
    """
    try:
        with throw_away(db, peer, seconds) as connection:
            return _fence(db, connection, token, session.role)
    except Exception as exc:
        is_of_the_machine = isinstance(exc, OSError) and not isinstance(exc, TimeoutError)
        if not (is_of_the_call(exc) or is_of_the_machine or drivers.is_marked(exc, "is_ours")):
            # A task's time limit, say: the task must end by it.
            raise
        return None


def _fence(db: Any, connection: Any, token: Token, role: str) -> Outcome | None:
    vendor, table, value = db.vendor, token.table, token.value
    begin(vendor, connection, role)
    if not _is_true(ready.rows(connection, outcome.is_fit(vendor, table))):
        # The table keeps rows that a rollback undoes, or takes a token twice.
        return Outcome.UNKNOWN
    try:
        ready.rows(connection, outcome.insert(vendor, table, value, is_fence=True))
        connection.commit()
    except Exception as exc:
        if _refusal(db, exc) is not Refusal.FENCED:
            raise
    else:
        # The fence stands: the transaction does not, and cannot any more.
        return Outcome.ROLLED_BACK
    connection.rollback()
    begin(vendor, connection, role)
    rows = ready.rows(connection, outcome.reads_row(vendor, table, value))
    if not rows:
        return None
    # An earlier fence's own answer was lost, or another process asked as well.
    return Outcome.ROLLED_BACK if _is_true(rows) else Outcome.COMMITTED


def _refusal(db: Any, exc: BaseException) -> Refusal | None:
    return outcome.refusal(db._driver.code_of(exc), db._driver.about(exc))


def _is_true(rows: list[Any]) -> bool:
    return bool(rows) and bool(rows[0][0])


# What is raised


def _missing(session: Session) -> OperationalError:
    return OperationalError(
        f"{session.balancer.name}: COMMIT_OUTCOME is 'record', and there is no table "
        f"{outcome.TABLE}. Nothing was committed. Run: manage.py migrate "
        f"--database {session.balancer.name}"
    )


def _denied(session: Session, cause: BaseException) -> OperationalError:
    return OperationalError(
        f"{session.balancer.name}: COMMIT_OUTCOME is 'record', and the user may not write to "
        f"{outcome.TABLE} ({drivers.describe(cause)}). Nothing was committed. Grant SELECT, "
        "INSERT, UPDATE and DELETE on it."
    )


def _rolled_back(session: Session, cause: BaseException) -> OperationalError:
    return OperationalError(
        f"{session.balancer.name}: the transaction was rolled back. COMMIT was sent to "
        f"{session.peer.name} and not answered ({drivers.describe(cause)}). The engine has asked "
        "the database: nothing of the transaction stands, and nothing can any more."
    )
