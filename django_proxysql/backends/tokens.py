"""The table of tokens: make it, check it, and delete old tokens from it."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from typing import Any

from django.core.checks import Warning
from django.db import DEFAULT_DB_ALIAS, Error, connections, transaction

from ..core import drivers, outcome, ready
from ..core.runtime import Worker
from .losses import throw_away
from .sessions import Session

#: Seconds.
DAY = 86_400.0

#: One transaction in so many has old tokens deleted, …
_ONE_IN = 1000
#: … twice as many as have been written since: in this many statements of so many rows.
_STATEMENTS, _ROWS = 2, 1000
#: Seconds for connecting, and for deleting.
_DELETING = 5.0


def records(alias: str) -> bool:
    """Return whether what commits there writes tokens, without reading the rest of its settings."""
    if connections.databases.get(alias, {}).get("COMMIT_OUTCOME") is None:
        return False
    # In development the alias may be SQLite's.
    driver = getattr(connections[alias], "_driver", drivers.generic)
    return bool(driver.WATCHED)


def has_table(connection: Any) -> bool:
    with connection.cursor() as cursor:
        cursor.execute(outcome.where_is(connection.vendor))
        return cursor.fetchone()[0] is not None


def make_table(using: str = DEFAULT_DB_ALIAS, **kwargs: Any) -> None:
    """Make the table where tokens are written; a receiver of ``pre_migrate``.

    Before all migrations: what they write is written in blocks, which take the table.
    No migration of the app's own makes it: one that was applied before the alias had the setting
    would not be applied again.
    """
    if records(using):
        connection = connections[using]
        if not has_table(connection):
            with connection.cursor() as cursor:
                cursor.execute(outcome.creates(connection.vendor))


def problems(connection: Any) -> list[Any]:
    """Return a warning if a token could not be written, for ``check --database``."""
    alias = connection.alias
    if not records(alias):
        return []
    try:
        with transaction.atomic(using=alias), connection.cursor() as cursor:
            said = _what_is_wrong(cursor, connection.vendor)
            transaction.set_rollback(True, using=alias)
    except Error as exc:
        said = f"a token cannot be written to {outcome.TABLE}: {drivers.describe(exc)}"
    except AssertionError:
        # A test that does not name the alias: Django's TestCase allows it no connection.
        return []
    if not said:
        return []
    return [
        Warning(
            f"DATABASES[{alias!r}]: COMMIT_OUTCOME is 'record', and {said}.",
            hint=f"Run manage.py migrate --database {alias}. The user needs SELECT, INSERT, UPDATE "
            "and DELETE on the table.",
            id="django_proxysql.W010",
        )
    ]


def _what_is_wrong(cursor: Any, vendor: str) -> str:
    cursor.execute(outcome.where_is(vendor))
    schema = cursor.fetchone()[0]
    if schema is None:
        return f"there is no table {outcome.TABLE}"
    table = outcome.qualified(vendor, schema)
    cursor.execute(outcome.is_fit(vendor, table))
    if not cursor.fetchone()[0]:
        return (
            f"the rows of {outcome.TABLE} prove nothing: it must be an InnoDB table, or one of "
            "PostgreSQL's that is logged, with token as its primary key"
        )
    cursor.execute(outcome.insert(vendor, table, outcome.oldest_kept(time.time(), DAY)))
    return ""


def delete_old(connection: Any, seconds: float) -> int:
    """Delete tokens that are older than ``seconds``, in small batches; return how many.

    :raises ValueError: that is less than an hour: a token may be in doubt.
    """
    before = outcome.oldest_kept(time.time(), seconds)
    statement = outcome.deletes(connection.vendor, outcome.TABLE, before, seconds, _ROWS)
    deleted = 0
    while True:
        # Each batch is a transaction of its own.
        with connection.cursor() as cursor:
            cursor.execute(statement)
            count: int = cursor.rowcount
        deleted += max(0, count)
        if count < _ROWS:
            return deleted


def delete_some(db: Any, session: Session, table: str, token: bytes) -> None:
    """Have some old tokens deleted in a thread, once in a thousand tokens. Waits for nothing.

    :param token: one that was just written: its random bits say whether it is time.
    """
    if int.from_bytes(token[8:], "big") % _ONE_IN:
        return
    vendor = db.vendor
    statement = outcome.deletes(vendor, table, outcome.oldest_kept(time.time(), DAY), DAY, _ROWS)
    # The connection is made by the thread that enters it.
    made = throw_away(db, session.peer, _DELETING)
    _cleaner.jobs.append((vendor, session.role, statement, made))
    _cleaner.start()


class _Cleaner(Worker):
    """Deletes old tokens in a thread, on a connection of its own."""

    def __init__(self) -> None:
        #: Vendor, role, statement, and what makes the connection.
        self.jobs: deque[tuple[str, str, str, Any]] = deque(maxlen=10)
        super().__init__("to delete old tokens")

    def is_needed(self) -> bool:
        return bool(self.jobs)

    def step(self) -> float | None:
        if not self.jobs:
            return None
        vendor, role, statement, connecting = self.jobs.popleft()
        # Another process may be at it, or the peer be gone: what is left is for the next time.
        with contextlib.suppress(Exception), connecting as connection:
            for _ in range(_STATEMENTS):
                begin(vendor, connection, role)
                ready.rows(connection, statement)
                connection.commit()
        return 0.0

    def after_fork(self) -> None:
        super().after_fork()
        self.jobs.clear()


_cleaner = _Cleaner()


def begin(vendor: str, connection: Any, role: str) -> None:
    """Begin a transaction of our own, which waits a second at most for a lock, and for no other
    node.

    :param role: that of the application's sessions.
    """
    if vendor == "postgresql":
        # LOCAL: a pooler gives the server's session to others.
        ready.rows(connection, "SET LOCAL lock_timeout = '1s'")
        if role:
            ready.rows(connection, f"SET LOCAL ROLE {outcome.quoted(vendor, role)}")
        return
    ready.rows(connection, "SET SESSION innodb_lock_wait_timeout = 1")
    with contextlib.suppress(Exception):
        # MySQL has none.
        ready.rows(connection, "SET SESSION wsrep_sync_wait = 0")
