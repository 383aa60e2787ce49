"""Fixtures that start the servers that the tests ask for.

Each server is started once, by the first test that wants it, and a test gets it through a fixture
that afterwards thaws, restarts and sets back what the test has hurt (keeping.py).
A run that one of our tests starts and waits for may borrow our servers (lending.py).
What is in the tables is left as it is.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Callable

import django
import hypothesis
import pytest
from django.dispatch import Signal

from django_proxysql.core import logs
from tests.servers import Address
from tests.servers.faultproxy import FaultProxy
from tests.servers.galera import GaleraCluster
from tests.servers.haproxy import HAProxy
from tests.servers.keeping import Keeper
from tests.servers.lending import borrowed
from tests.servers.mariadb import Node
from tests.servers.pgbouncer import PgBouncer
from tests.servers.postgresql import PostgreSQLNode
from tests.servers.processes import start_together
from tests.servers.redis import RedisServer
from tests.servers.runs import current_run

if TYPE_CHECKING:
    from tests.site import Site

#: The fixtures that start a server, or the browser.
SERVERS = frozenset(
    "servers_session haproxy pgbouncer mariadb mariadb_pair mariadb_tls galera "
    "postgres postgres_pair postgres_tls redis_server chromium_session".split()
)


def pytest_configure(config: pytest.Config) -> None:
    """Let SIGTERM end the run as Ctrl-C does. (SystemExit would end but the test under way.)"""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda *_: pytest.exit("SIGTERM", returncode=143))
        if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
            # A shell's job in the background ignores it, and so would all that tests start.
            signal.signal(signal.SIGINT, signal.default_int_handler)
    # What hypothesis notes of the code goes nowhere near the code.
    os.environ.setdefault(
        "HYPOTHESIS_STORAGE_DIRECTORY", os.path.join(tempfile.gettempdir(), "hypothesis-of-tests")
    )
    # A busy machine is none of its business.
    hypothesis.settings.register_profile(
        "unhurried", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
    )
    hypothesis.settings.load_profile("unhurried")
    if getattr(config.option, "numprocesses", None):
        # What servers are copied from is made once for all processes.
        current_run()
    os.environ["DJANGO_SETTINGS_MODULE"] = "tests.django_settings"
    django.setup()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark the tests that need a server, for ``-m "not server"``; several processes: slow first."""
    for item in items:
        if not SERVERS.isdisjoint(needed_by(item)):
            item.add_marker(pytest.mark.server)
    if hasattr(config, "workerinput"):
        # A process that is done takes tests from another's end, and not the one that that is at.
        items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture
def receive() -> Iterator[Callable[..., Any]]:
    """Connect receivers until the test's end; without one, return a list of what is sent."""
    with ExitStack() as stack:

        def connect(signal: Signal, receiver: Any = None, sender: Any = None) -> Any:
            told: list[dict[str, Any]] = []

            def note(**named: Any) -> None:
                told.append(named)

            connected = receiver or note
            signal.connect(connected, sender=sender, weak=False)
            stack.callback(signal.disconnect, connected, sender=sender)
            return told

        yield connect


@pytest.fixture(autouse=True)
def no_line_is_kept_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Log each test's lines, whatever another test has logged less than a minute ago."""
    monkeypatch.setattr(logs, "_limits", {})


@pytest.fixture
def hurried() -> Iterator[None]:
    """Have the interpreter change threads as often as it can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.fixture
def strikes_are_silent() -> Iterator[None]:
    """Let Python drop an exception that strikes where it cannot be raised.

    That is in a finalizer, or on a thread's first or last line. (pytest's own hooks may be struck
    as well, while they write it down.)
    """
    before = sys.unraisablehook, threading.excepthook
    sys.unraisablehook = threading.excepthook = lambda _: None
    yield
    sys.unraisablehook, threading.excepthook = before


def needed_by(item: pytest.Item) -> set[str]:
    """Return the fixtures that a test asks for, among other names."""
    needed = set(getattr(item, "fixturenames", ()))
    # A test may be given a fixture's name, for request.getfixturevalue().
    params = item.callspec.params if hasattr(item, "callspec") else {}
    needed.update(value for value in params.values() if isinstance(value, str))
    return needed


def pytest_runtest_logstart() -> None:
    """Forget what an earlier test left "being handled": it would be the context of each failure.

    CPython leaves it so where a trace function or a signal strikes at the very end of an
    ``except`` block, as our tests of asynchronous exceptions do.
    """
    if sys.exc_info()[1] is not None:
        ctypes.pythonapi.PyErr_SetExcInfo(None, None, None)


@pytest.fixture(scope="session")
def servers_session() -> Iterator[Keeper]:
    """Starts servers at their first use, and ends them."""
    with Keeper() as keeper:
        yield keeper


def start_mariadb_pair(stack: ExitStack) -> tuple[Node, Node]:
    if lent := borrowed("mariadb_pair"):
        return lent
    return set_up_together(stack, Node("mariadb-1"), Node("mariadb-2"))


def set_up_together(stack: ExitStack, *nodes: Any) -> Any:
    for node in nodes:
        stack.callback(node.close)
    start_together(*nodes)
    for node in nodes:
        node.set_up()
    return nodes


@pytest.fixture
def mariadb_pair(servers_session: Keeper) -> Iterator[tuple[Node, Node]]:
    """Two MariaDB servers that know nothing of each other, with the same database and users."""
    with servers_session.use(start_mariadb_pair) as pair:
        yield pair


@pytest.fixture
def mariadb(mariadb_pair: tuple[Node, Node]) -> Node:
    """One MariaDB server: the first of the pair."""
    return mariadb_pair[0]


def start_mariadb_tls(stack: ExitStack) -> Node:
    return stack.enter_context(Node("mariadb-tls", tls=True)).set_up()


@pytest.fixture
def mariadb_tls(servers_session: Keeper) -> Iterator[Node]:
    """A MariaDB server with a certificate; ``ca`` is the authority's."""
    with servers_session.use(start_mariadb_tls) as node:
        yield node


def start_galera(stack: ExitStack) -> GaleraCluster:
    return borrowed("galera") or stack.enter_context(GaleraCluster())


@pytest.fixture
def galera(servers_session: Keeper) -> Iterator[GaleraCluster]:
    """A Galera cluster of three nodes."""
    with servers_session.use(start_galera) as cluster:
        yield cluster


def start_postgres_pair(stack: ExitStack) -> tuple[PostgreSQLNode, PostgreSQLNode]:
    if lent := borrowed("postgres_pair"):
        return lent
    return set_up_together(stack, PostgreSQLNode("postgres-1"), PostgreSQLNode("postgres-2"))


@pytest.fixture
def postgres_pair(servers_session: Keeper) -> Iterator[tuple[PostgreSQLNode, PostgreSQLNode]]:
    """Two PostgreSQL servers that know nothing of each other."""
    with servers_session.use(start_postgres_pair) as pair:
        yield pair


@pytest.fixture
def postgres(postgres_pair: tuple[PostgreSQLNode, PostgreSQLNode]) -> PostgreSQLNode:
    """One PostgreSQL server: the first of the pair."""
    return postgres_pair[0]


def start_postgres_tls(stack: ExitStack) -> PostgreSQLNode:
    return stack.enter_context(PostgreSQLNode("postgres-tls", tls=True)).set_up()


@pytest.fixture
def postgres_tls(servers_session: Keeper) -> Iterator[PostgreSQLNode]:
    """A PostgreSQL server with a certificate; ``ca`` is the authority's."""
    with servers_session.use(start_postgres_tls) as node:
        yield node


def start_redis(stack: ExitStack) -> RedisServer:
    return stack.enter_context(RedisServer())


@pytest.fixture
def patient_with_redis(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a Redis take its time, on a busy machine."""
    monkeypatch.setattr("django_proxysql.core.sharing.url.TIMEOUT", 30)


@pytest.fixture
def redis_server(servers_session: Keeper, patient_with_redis: None) -> Iterator[RedisServer]:
    """A Redis server; empty again after the test."""
    with servers_session.use(start_redis) as server:
        yield server


@pytest.fixture
def haproxy() -> Iterator[Callable[..., HAProxy]]:
    """``haproxy(db1=node, db2=[node, other])`` starts an HAProxy with these frontends."""
    with ExitStack() as stack:

        def start(**targets: Address | Sequence[Address]) -> HAProxy:
            return stack.enter_context(HAProxy(targets))

        yield start


@pytest.fixture
def pgbouncer() -> Iterator[Callable[..., PgBouncer]]:
    """``pgbouncer(node, max_client_conn=3)`` starts a pooler in front of a server."""
    with ExitStack() as stack:

        def start(target: Address, **options: object) -> PgBouncer:
            return stack.enter_context(PgBouncer(target, **options))

        yield start


@pytest.fixture
def fault_proxy() -> Iterator[Callable[..., FaultProxy]]:
    """``fault_proxy(node)`` starts a proxy in front of a server; ``reset=True``: with RSTs."""
    with ExitStack() as stack:

        def start(target: Address, reset: bool = False) -> FaultProxy:
            return stack.enter_context(FaultProxy(target, reset))

        yield start


# Established connections: a balancer whose two peers are fault proxies to one server. What is in
# tests/site.py can be imported once Django is set up, and not before.


@pytest.fixture(params=["mariadb", "mariadb_tls", "postgres"])
def here(request: pytest.FixtureRequest, fault_proxy: Callable[..., FaultProxy]) -> Iterator[Site]:
    """A :class:`~tests.site.Site` on each kind of server in turn."""
    from tests.site import site

    with site(request.getfixturevalue(request.param), fault_proxy) as made:
        yield made


@pytest.fixture
def on_mariadb(mariadb: Node, fault_proxy: Callable[..., FaultProxy]) -> Iterator[Site]:
    """A :class:`~tests.site.Site` on MariaDB."""
    from tests.site import site

    with site(mariadb, fault_proxy) as made:
        yield made


@pytest.fixture
def on_postgres(postgres: PostgreSQLNode, fault_proxy: Callable[..., FaultProxy]) -> Iterator[Site]:
    """A :class:`~tests.site.Site` on PostgreSQL."""
    from tests.site import site

    with site(postgres, fault_proxy) as made:
        yield made
