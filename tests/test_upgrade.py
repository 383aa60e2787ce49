"""docs/howto/upgrade.rst, step by step: a rolling upgrade under load, without a single error.

HAProxy stands for ProxySQL: ``disable frontend`` is what PROXYSQL PAUSE does. Nothing here waits
for a time to pass, but for connections to leave or to come.
"""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from django.db import close_old_connections, connections, transaction

from django_proxysql import balancers
from django_proxysql.conf.keys import ENGINE
from tests.chaos.load import Load, Pace
from tests.chaos.sites import admin, connected, make_tables
from tests.engine import engine, mysql_peer
from tests.servers.galera import GaleraCluster
from tests.servers.haproxy import HAProxy
from tests.servers.mariadb import Node
from tests.servers.redis import RedisServer
from tests.test_peers_command import Command

ALIAS = "site"
DB = "db"

#: Threads that are idle now and then for a moment.
PACE = Pace(idle_every=20, idle=0.1)


@contextlib.contextmanager
def under_load(
    servers: Sequence[Node], peers: list[Any], retries: bool = False, **settings: Any
) -> Iterator[Load]:
    """Have threads read and write all the time; afterwards nothing may have gone wrong."""
    make_tables(servers)
    with engine(peers, alias=ALIAS, **settings):
        balancers[ALIAS]
        load = Load(ALIAS, threads=4, pace=PACE, retries=retries)
        with load:
            # Each thread has its connection, if it keeps one.
            until(load, lambda: min(ledger.requests for ledger in load.ledgers) >= 5)
            yield load
            requests = load.requests
            until(load, lambda: load.requests >= requests + 20)
        with admin(servers[0]) as cursor:
            cursor.execute("SELECT value FROM chaos_row WHERE id <> 1")
            rows = Counter(value for (value,) in cursor.fetchall())
    assert [str(failure) for ledger in load.ledgers for failure in ledger.failures] == []
    # What was reported done is there, once, and nothing else is.
    assert rows == Counter(token for ledger in load.ledgers for token in ledger.done)


def until(load: Load, condition: Callable[[], bool]) -> None:
    """Let the site work until something has come about; the test's time-out bounds it."""
    while not condition():
        load.wait(0.02)


@pytest.fixture
def proxies(mariadb: Node, haproxy: Callable[..., HAProxy]) -> list[HAProxy]:
    return [haproxy(**{DB: mariadb}) for _ in range(2)]


@pytest.fixture
def peers(mariadb: Node, proxies: list[HAProxy]) -> list[Any]:
    return [mysql_peer(mariadb, PORT=proxy.ports[DB]) for proxy in proxies]


def test_drain_and_pause(
    mariadb: Node,
    proxies: list[HAProxy],
    peers: list[Any],
    redis_server: RedisServer,
    tmp_path: Path,
) -> None:
    """Drain, wait until it is empty, pause, upgrade, start, undrain; connections that last."""
    settings = {"SHARED_STATE": redis_server.url, "CONN_MAX_AGE": None}
    project = Command(tmp_path, {"ENGINE": ENGINE, "PEERS": peers, **settings}, ALIAS)
    with under_load([mariadb], peers, **settings) as load:
        for number, proxy in enumerate(proxies):
            code, out, err = project.ended("--drain", f"peer{number}")
            assert (code, err) == (0, "")
            assert out.startswith(f"site: peer{number} is drained. ")
            until(load, lambda proxy=proxy: proxy.sessions(DB) == 0)
            proxy.disable(DB)
            proxy.restart()
            code, out, err = project.ended("--undrain", f"peer{number}")
            assert (code, err) == (0, "")
        # All of them have been where they are now anew.
        assert proxies[0].sessions(DB) == 4


def read() -> None:
    with connections[ALIAS].cursor() as cursor:
        cursor.execute("SELECT value FROM chaos_row WHERE id = 1")
        assert len(cursor.fetchall()) == 1


def write() -> None:
    with connections[ALIAS].cursor() as cursor:
        cursor.execute("UPDATE chaos_row SET value = value WHERE id = 1")


def block() -> None:
    with transaction.atomic(using=ALIAS):
        read()
        write()


def sleep_and(work: Callable[[], None], asleep: list[str], wake: threading.Event) -> None:
    """Use a connection, keep it, and ``work`` with it when a test says so."""
    connection: Any = connections[ALIAS]
    try:
        read()
        # Its request is over.
        close_old_connections()
        asleep.append(connection.peer.name)
        assert wake.wait(120)
        work()
    finally:
        connection.close()


def test_stopped_with_idle_connections_left(
    mariadb: Node,
    proxies: list[HAProxy],
    peers: list[Any],
    redis_server: RedisServer,
    tmp_path: Path,
) -> None:
    """What is idle need not be waited for: found dead before it is used, it is replaced."""
    settings = {
        "SHARED_STATE": redis_server.url,
        "CONN_MAX_AGE": None,
        "STRATEGY": "round_robin",
    }
    project = Command(tmp_path, {"ENGINE": ENGINE, "PEERS": peers, **settings}, ALIAS)
    asleep: list[str] = []
    wake = threading.Event()
    with ThreadPoolExecutor(6) as pool, under_load([mariadb], peers, **settings) as load:
        try:
            sleepers = []
            for number, work in enumerate(2 * (read, write, block)):
                sleepers.append(pool.submit(sleep_and, work, asleep, wake))
                # One after the other.
                until(load, lambda number=number: len(asleep) > number or sleepers[-1].done())
            assert Counter(asleep) == {"peer0": 3, "peer1": 3}
            for number, proxy in enumerate(proxies):
                assert project.ended("--drain", f"peer{number}")[0] == 0
                # The threads at work have left. The others do not know of it.
                until(load, lambda proxy=proxy: proxy.sessions(DB) == 3)
                proxy.disable(DB)
                proxy.restart()
                assert project.ended("--undrain", f"peer{number}")[0] == 0
        finally:
            wake.set()
        for sleeper in sleepers:
            sleeper.result(60)


def test_pause_alone(mariadb: Node, proxies: list[HAProxy], peers: list[Any]) -> None:
    """Where each request connects anew a pause is enough: it opens the circuit."""
    with under_load([mariadb], peers, CONN_MAX_AGE=0, CHECK_INTERVAL=0.2) as load:
        for proxy in proxies:
            proxy.disable(DB)
            until(load, lambda proxy=proxy: proxy.sessions(DB) == 0)
            proxy.restart()
            until(load, lambda proxy=proxy: proxy.sessions(DB) > 0)


@pytest.mark.slow
def test_galera(galera: GaleraCluster) -> None:
    """The nodes themselves, one after the other, drained by a call in the serving process.

    Nodes that leave and join change the steps that the others' ids go in: two may hand out one id
    then, and one of the two transactions is turned away at its COMMIT.
    """
    peers = [mysql_peer(node) for node in galera.nodes]
    settings: dict[str, Any] = {
        "CONN_MAX_AGE": None,
        "READY_CHECK": "galera",
        "CHECK_INTERVAL": 0.5,
    }
    with under_load(galera.nodes, peers, retries=True, **settings) as load:
        for number, node in enumerate(galera.nodes):
            balancers[ALIAS].drain(f"peer{number}")
            with admin(node) as cursor:
                until(load, lambda cursor=cursor: not connected(cursor))
            node.restart()
            until(load, node.synced)
            balancers[ALIAS].undrain(f"peer{number}")
