"""What became of a COMMIT whose answer is lost: the token, the SQL and the verdict, without I/O.

A transaction writes a token as the last thing before COMMIT. If the answer to
COMMIT is lost, the engine writes the same token in a transaction of its own, the
*fence*. The table has the token as its primary key, so only one of the two can
stand. A row says which of the two wrote it: a fence whose own answer is lost must
not be read as the transaction.
"""
# Statements are put together of names and tokens of our own.
# ruff: noqa: S608

from __future__ import annotations

import enum
import functools
import os
import time
from collections.abc import Callable, Iterable
from typing import TypeVar

from .runtime import Guarded

_Peer = TypeVar("_Peer")

#: The table's name, as in Django's own tables: the app's label, and what a row is.
TABLE = "django_proxysql_commit"

#: Seconds: the least age at which a token is deleted. A token is asked about while it is younger
#: than half of that, and OUTCOME_DEADLINE is shorter still: none in doubt is deleted.
LEAST_AGE = 3600


class Outcome(enum.Enum):
    """What became of a COMMIT."""

    COMMITTED = "committed"
    ROLLED_BACK = "rolled_back"
    UNKNOWN = "unknown"


def verdict(found: Outcome | None, age: float) -> Outcome | None:
    """Return what a peer's answer proves; None: nothing, ask again.

    :param found: what it proves of a token that was not deleted.
    :param age: seconds since COMMIT was sent, by whichever clock says more. A process that
        was stopped for an hour may find that the token has been deleted meanwhile.
    """
    return Outcome.UNKNOWN if age >= LEAST_AGE / 2 else found


#: Seconds that one question may take: a lock wait of one, and the network.
_ONE_QUESTION = 2.0
#: Seconds between two rounds of questions: at first, and at most.
_FIRST_WAIT, _LONGEST_WAIT = 0.02, 0.5


def ask_until(
    peers: Callable[[], Iterable[_Peer]],
    ask: Callable[[_Peer, float], Outcome | None],
    seconds: float,
    sent: tuple[float, float],
) -> Outcome:
    """Ask one peer after the other until one knows.

    :param peers: returns those to ask, in order: anew for each round.
    :param ask: asks one of them, for that many seconds at most; None: it cannot tell now.
    :param seconds: for all questions together.
    :param sent: when COMMIT was sent, by the monotonic clock and by the time of day.
    """
    deadline = time.monotonic() + seconds
    wait, slept = _FIRST_WAIT, 0.0
    while True:
        for peer in peers():
            left = deadline - time.monotonic()
            if left <= 0:
                return Outcome.UNKNOWN
            found = ask(peer, min(left, _ONE_QUESTION))
            found = verdict(found, max(time.monotonic() - sent[0], time.time() - sent[1]))
            if found is not None:
                return found
        # An application's test may have had the clock stand still.
        if time.monotonic() + wait >= deadline or slept + wait >= seconds:
            return Outcome.UNKNOWN
        # By its name, and late: gevent may have put its own there.
        time.sleep(wait)
        slept += wait
        wait = min(2 * wait, _LONGEST_WAIT)


class Tokens(Guarded):
    """Gives out UUIDv7s (RFC 9562) that grow, also when the clock goes back.

    Time first, so that the table's index grows at its end; 62 random bits last, so that no
    two processes have one token, a parent and its forked child included.
    """

    #: 48 bits of milliseconds and 12 bits of a counter, of the last token.
    _last = 0

    def next(self) -> bytes:
        """Return a new token: 16 bytes."""
        now = int(time.time() * 1000) << 12
        # Guards the last token's time and count.
        with self._lock:
            self._last = last = max(now, self._last + 1)
        head = (last >> 12) << 16 | 0x7000 | last & 0xFFF
        tail = int.from_bytes(os.urandom(8), "big") & (1 << 62) - 1 | 1 << 63
        return (head << 64 | tail).to_bytes(16, "big")


# What is sent. "mysql" and "postgresql" are Django's vendors.


@functools.lru_cache(maxsize=100)
def qualified(vendor: str, place: str) -> str:
    """Return the table's name with its place: a session's USE or search_path changes nothing.

    :param place: what :func:`where_is` has told.
    """
    return f"{place if vendor == 'postgresql' else quoted(vendor, place)}.{TABLE}"


def quoted(vendor: str, name: str) -> str:
    """Return a name as it stands in a statement."""
    mark = '"' if vendor == "postgresql" else "`"
    return f"{mark}{name.replace(mark, mark * 2)}{mark}"


def where_is(vendor: str) -> str:
    """Return the question in which schema a session finds the table: one value, or NULL.

    PostgreSQL's is quoted, and has its database: no other one takes a statement with that name.
    """
    if vendor == "postgresql":
        return (
            "SELECT (SELECT quote_ident(current_database()) || '.' || quote_ident(n.nspname)"
            " FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace"
            f" WHERE c.oid = to_regclass('{TABLE}'))"
        )
    return (
        "SELECT (SELECT TABLE_SCHEMA FROM information_schema.TABLES"
        f" WHERE TABLE_SCHEMA = DATABASE() AND TABLE_NAME = '{TABLE}')"
    )


def _literal(vendor: str, token: bytes) -> str:
    return f"'{token.hex()}'" if vendor == "postgresql" else f"0x{token.hex()}"


def _now(vendor: str) -> str:
    # Not now(), which in PostgreSQL is the moment at which the transaction began.
    return "clock_timestamp()" if vendor == "postgresql" else "UTC_TIMESTAMP(6)"


def insert(vendor: str, table: str, token: bytes, is_fence: bool = False) -> str:
    """Return what a transaction writes before COMMIT, or the engine when its answer is lost."""
    return (
        f"INSERT INTO {table} (token, fence, created)"
        f" VALUES ({_literal(vendor, token)}, {'TRUE' if is_fence else 'FALSE'}, {_now(vendor)})"
    )


def reads_row(vendor: str, table: str, token: bytes) -> str:
    """Return the question who wrote a token: one row if it is there, true for a fence."""
    # FOR UPDATE: the row as it is now, from where writes go.
    return f"SELECT fence FROM {table} WHERE token = {_literal(vendor, token)} FOR UPDATE"


def is_fit(vendor: str, table: str) -> str:
    """Return the question whether the table proves anything: one row, true or false.

    A rollback must undo its rows, a crash of the server must keep them, and no token may be
    there twice.
    """
    if vendor == "postgresql":
        table = table.replace("'", "''")
        return (
            "SELECT c.relpersistence = 'p' AND EXISTS (SELECT 1 FROM pg_index i"
            " JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum = i.indkey[0]"
            " WHERE i.indrelid = c.oid AND i.indisunique AND i.indisvalid AND i.indimmediate"
            " AND i.indnatts = 1 AND i.indpred IS NULL AND a.attname = 'token')"
            f" FROM pg_class c WHERE c.oid = '{table}'::regclass"
        )
    schema = table.rpartition(".")[0][1:-1].replace("``", "`").replace("'", "''")
    of_it = f"TABLE_SCHEMA = '{schema}' AND TABLE_NAME = '{TABLE}'"
    return (
        "SELECT ENGINE = 'InnoDB' AND (SELECT GROUP_CONCAT(COLUMN_NAME)"
        f" FROM information_schema.STATISTICS WHERE {of_it} AND INDEX_NAME = 'PRIMARY') = 'token'"
        f" FROM information_schema.TABLES WHERE {of_it}"
    )


def creates(vendor: str) -> str:
    """Return what makes the table, where it is not there, in the session's own schema."""
    if vendor == "postgresql":
        return (
            f"CREATE TABLE IF NOT EXISTS {TABLE} (token uuid NOT NULL PRIMARY KEY,"
            " fence boolean NOT NULL, created timestamptz NOT NULL)"
        )
    return (
        f"CREATE TABLE IF NOT EXISTS {TABLE} (token binary(16) NOT NULL PRIMARY KEY,"
        " fence boolean NOT NULL, created datetime(6) NOT NULL) ENGINE = InnoDB"
    )


def oldest_kept(now: float, seconds: float) -> bytes:
    """Return the least token that is not older than ``seconds``.

    :param now: seconds since the epoch.
    :raises ValueError: ``seconds`` is less than :data:`LEAST_AGE`.
    """
    if not seconds >= LEAST_AGE:
        raise ValueError(f"tokens younger than {LEAST_AGE} s may be in doubt, and are kept")
    return (max(0, int((now - seconds) * 1000)) << 80).to_bytes(16, "big")


def deletes(vendor: str, table: str, before: bytes, seconds: float, most: int) -> str:
    """Return what deletes the oldest tokens. Two clocks must agree that they are old.

    :param before: see :func:`oldest_kept`: by this host's clock.
    :param seconds: their age by the server's clock.
    """
    is_postgres = vendor == "postgresql"
    ago = f"interval '{seconds:.0f} seconds'" if is_postgres else f"INTERVAL {seconds:.0f} SECOND"
    chosen = (
        f"WHERE token < {_literal(vendor, before)} AND created < {_now(vendor)} - {ago}"
        f" ORDER BY token LIMIT {most:d}"
    )
    if is_postgres:
        chosen = f"WHERE token IN (SELECT token FROM {table} {chosen} FOR UPDATE SKIP LOCKED)"
    return f"DELETE FROM {table} {chosen}"


# What servers answer


class Refusal(enum.Enum):
    """Why a server does not take a transaction's token. COMMIT was not run then."""

    #: It is there already: a fence has it, or the transaction's own row stands.
    FENCED = "fenced"
    #: There is no such table.
    MISSING = "missing"
    #: The user may not write to it.
    DENIED = "denied"


_REFUSALS = {
    # The MySQL family's numbers, PostgreSQL's SQLSTATEs.
    **dict.fromkeys((1062, 1586, "23505"), Refusal.FENCED),
    **dict.fromkeys((1146, 1051, 1049, "42P01", "3F000"), Refusal.MISSING),
    **dict.fromkeys((1142, 1143, 1044, 1370, "42501"), Refusal.DENIED),
}


def refusal(code: object, text: str) -> Refusal | None:
    """Return what an error says about the token; None: it is not about the token.

    :param code: the driver's number or SQLSTATE.
    :param text: the table's name, or the error's text. COMMIT may answer PostgreSQL's deferred
        constraints with the same codes: these errors name other tables.
    """
    found = _REFUSALS.get(code) if isinstance(code, (int, str)) else None
    if found is Refusal.FENCED and isinstance(code, int):
        # MySQL's text names a key only, and its COMMIT checks no keys.
        return found
    return found if TABLE in text else None
