"""Load balancers that exist for one test, in ``django.db.connections``.

::

    with engine([mysql_peer(node) for node in mariadb_pair], CHECK_INTERVAL=5) as connection:
        connection.cursor().execute("SELECT 1")

``connection`` is this thread's wrapper; other threads get theirs by
``connections[connection.alias]``, and models by ``.using(connection.alias)``.
"""

from __future__ import annotations

import contextlib
import os
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from unittest import TestCase, TestResult, TestSuite, mock

from django.db import connections
from django.test.utils import setup_test_environment, teardown_test_environment

from django_proxysql import LoadBalancer, registry
from django_proxysql.backends.connecting import LoadBalancedMixin
from django_proxysql.conf.aliases import mirrors
from django_proxysql.conf.keys import ENGINE, NAME_KEY
from django_proxysql.core import outcome
from django_proxysql.core.config import BalancerConfig
from django_proxysql.core.trials import trial_worker
from django_proxysql.registry import balancers
from tests.fakes import until
from tests.servers import DATABASE, PASSWORD, USER, Address

MYSQL = "django.db.backends.mysql"
POSTGRESQL = "django.db.backends.postgresql"
SQLITE = "django.db.backends.sqlite3"


class Clock:
    """A clock that goes only when a test moves it."""

    def __init__(self) -> None:
        self.now = 1000.0
        self._began: float | None = None

    def __call__(self) -> float:
        return self.now if self._began is None else self.now + time.monotonic() - self._began

    def advance(self, seconds: float) -> None:
        self.now += seconds

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Go as time goes, for the block: a driver's time-out takes the seconds that it takes."""
        self._began = time.monotonic()
        yield
        self.now, self._began = self(), None


def rows_of(connection: Any, *statements: str, params: Any = None) -> Any:
    """Run statements; return the last one's rows, if it has any."""
    with connection.cursor() as cursor:
        for statement in statements:
            cursor.execute(statement, params)
        return [tuple(row) for row in cursor.fetchall()] if cursor.description else None


def sessions_beside(connection: Any) -> int:
    """Return how many other connections of the tests' user the server of this one has."""
    every, its_user, own = (
        ("pg_stat_activity", "usename", "pid <> pg_backend_pid()")
        if connection.vendor == "postgresql"
        else ("information_schema.processlist", "user", "id <> CONNECTION_ID()")
    )
    query = f"SELECT count(*) FROM {every} WHERE {its_user} = %s AND {own}"
    ((count,),) = rows_of(connection, query, params=[USER])
    return int(count)


def wait_until_alone(connection: Any) -> None:
    """Return when the server of ``connection`` has no other client that is connected."""
    # A server has no event for the end of another's connection.
    until(lambda: not sessions_beside(connection))


@contextlib.contextmanager
def engine(
    peers: Sequence[Any],
    *,
    alias: str = "balanced",
    databases: Mapping[str, dict[str, Any]] | None = None,
    clock: Callable[[], float] | None = None,
    **settings: Any,
) -> Iterator[Any]:
    """Add a load balancer over ``peers`` to DATABASES; yield this thread's connection to it.

    :param peers: the setting PEERS: dicts, or names of entries in ``databases``.
    :param databases: further entries of DATABASES that exist meanwhile.
    :param clock: the balancer's clock, in place of the real one; without jitter.
    :param settings: the rest of the balancer's entry.
    """
    entry = {"ENGINE": ENGINE, "PEERS": list(peers), **settings}
    with added({**(databases or {}), alias: entry}):
        plain = registry.LoadBalancer

        def with_clock(config: BalancerConfig, **given: Any) -> LoadBalancer:
            if clock is not None and config.name == alias:
                given.update(clock=clock, jitter=lambda: 0.5)
            return plain(config, **given)

        with mock.patch.object(registry, "LoadBalancer", with_clock):
            yield connections[alias]


@contextlib.contextmanager
def added(databases: Mapping[str, dict[str, Any]]) -> Iterator[None]:
    """Add entries to DATABASES; afterwards close what was connected, and forget them."""
    hidden = {alias: connections[alias] for alias in databases if alias in connections.databases}
    entries = {alias: connections.databases[alias] for alias in hidden}
    for alias in databases:
        # Also one that a test left behind without its entry.
        with contextlib.suppress(AttributeError):
            del connections[alias]
    connections.databases.update(configured(databases))
    forget()
    with contextlib.ExitStack() as stack:
        # Whatever one of these raises, no other test finds the entries.
        stack.callback(forget)
        for alias, connection in hidden.items():
            stack.callback(connections.__setitem__, alias, connection)
        stack.callback(connections.databases.update, entries)
        for alias in databases:
            stack.callback(connections.databases.pop, alias)
            stack.callback(_end, alias)
        stack.enter_context(_all_closed())
        yield


def _end(alias: str) -> None:
    """Close this thread's connection of an alias, and forget it."""
    try:
        with contextlib.suppress(AttributeError):
            connections[alias].close()
            if hasattr(connections[alias], "close_pool"):
                connections[alias].close_pool()
    finally:
        with contextlib.suppress(AttributeError):
            del connections[alias]


def forget() -> None:
    """Have each balancer of DATABASES read and made again."""
    for entry in list(connections.databases.values()):
        entry.pop(NAME_KEY, None)
    # A trial of the test before may be under way in its thread, and reads an entry anew: it sees
    # first that this is done (_entries, which comes last), and so leaves no half of one.
    for known in (trial_worker._scheduled, balancers.known, balancers._first_read, mirrors):
        known.clear()
    balancers._entries.clear()


def configured(databases: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the entries as they stand in ``connections.databases``: Django fills in defaults."""
    entries = dict(databases)
    if hasattr(connections, "configure_settings"):
        connections.configure_settings({"default": {}, **entries})
    else:
        # Django before 4.1 does so when a connection is made; NAME among the
        # defaults is what we read before that.
        for entry in entries.values():
            for key in ("NAME", "USER", "PASSWORD", "HOST", "PORT"):
                entry.setdefault(key, "")
    return entries


@contextlib.contextmanager
def _all_closed() -> Iterator[None]:
    """Close the connections of all wrappers made meanwhile, whichever thread made them."""
    made: weakref.WeakSet[Any] = weakref.WeakSet()
    init = LoadBalancedMixin.__init__

    def noted(self: Any, *args: Any, **kwargs: Any) -> None:
        made.add(self)
        init(self, *args, **kwargs)

    with mock.patch.object(LoadBalancedMixin, "__init__", noted):
        try:
            yield
        finally:
            for wrapper in list(made):
                if getattr(wrapper, "connection", None) is not None:
                    wrapper.inc_thread_sharing()
                    wrapper.close()


def mysql_peer(server: Address, **settings: Any) -> dict[str, Any]:
    """Return a peer's dict for a MariaDB node or a proxy in front of one."""
    return {
        "HOST": server.host,
        "PORT": server.port,
        "USER": USER,
        "PASSWORD": PASSWORD,
        "NAME": DATABASE,
        **settings,
    }


#: PostgreSQL's peers have the same keys; the balancer needs ``PEER_ENGINE=POSTGRESQL``.
postgres_peer = mysql_peer


def sqlite_peer(path: str | os.PathLike[str], **settings: Any) -> dict[str, Any]:
    """Return a peer's dict for a file; the balancer needs ``PEER_ENGINE=SQLITE``."""
    return {"NAME": os.fspath(path), **settings}


def make_outcome_table(connection: Any) -> None:
    """Make the table of ``COMMIT_OUTCOME: "record"`` there, empty."""
    with connection.cursor() as cursor:
        cursor.execute(f"DROP TABLE IF EXISTS {outcome.TABLE}")
        cursor.execute(outcome.creates(connection.vendor))


@contextlib.contextmanager
def nodb_cursor(connection: Any) -> Iterator[Any]:
    """Yield a cursor on Django's connection to no database in particular."""
    if hasattr(connection, "_nodb_cursor"):
        with connection._nodb_cursor() as cursor:
            yield cursor
    else:  # Django before 3.1
        with contextlib.closing(connection._nodb_connection) as wrapper, wrapper.cursor() as cursor:
            yield cursor


def run_case(case: type[TestCase]) -> None:
    """Run a TestCase with a ``runTest()`` as Django's runner does; fail where it fails."""
    result = TestResult()
    setup_test_environment()
    try:
        TestSuite([case()]).run(result)
    finally:
        teardown_test_environment()
    assert result.wasSuccessful(), result.errors + result.failures
