"""Packets that the client sends: the engine never sends more than Django's own, a connect fewer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import django
import pytest
from django.db import connections, transaction

from tests.engine import MYSQL, POSTGRESQL, added, engine, mysql_peer
from tests.other_driver import run_again
from tests.servers.faultproxy import FaultProxy
from tests.servers.mariadb import Node
from tests.servers.postgresql import PostgreSQLNode

#: Packets fewer of a connect, and of a new thread's first one. Django asks PostgreSQL nothing, and
#: keeps what it has asked MySQL since 3.2.
FEWER = {MYSQL: (3, 4) if django.VERSION >= (3, 2) else (2, 2), POSTGRESQL: (0, 0)}


def execute(alias: str, sql: str) -> None:
    with connections[alias].cursor() as cursor:
        cursor.execute(sql)


def read(alias: str) -> None:
    execute(alias, "SELECT 1")


def write(alias: str) -> None:
    execute(alias, "INSERT INTO packets VALUES (1)")


def block(alias: str) -> None:
    with transaction.atomic(using=alias):
        read(alias)
        write(alias)


def nested_block(alias: str) -> None:
    with transaction.atomic(using=alias), transaction.atomic(using=alias):
        write(alias)


def failed_block(alias: str) -> None:
    with pytest.raises(ZeroDivisionError), transaction.atomic(using=alias):
        write(alias)
        _ = 1 / 0


STATEMENTS = (read, write, block, nested_block, failed_block)


def packets(proxy: FaultProxy, alias: str) -> dict[str, int]:
    """Return how many packets each thing sends on ``alias``, which has connected before."""

    def sent(work: Callable[[], Any]) -> int:
        before = proxy.client_packets
        work()
        return proxy.client_packets - before

    found = {}
    connection: Any = connections[alias]
    connection.connect()
    connection.close()
    proxy.wait_until_idle()
    found["connect"] = sent(connection.connect)
    for work in STATEMENTS:
        found[work.__name__] = sent(lambda work=work: work(alias))  # type: ignore[misc]
    connection.close()
    # What a new thread has: a wrapper that has asked no server yet.
    connections[alias] = connection.copy()
    proxy.wait_until_idle()
    found["first connect"] = sent(connections[alias].connect)
    connections[alias].close()
    return found


def compare(peer_engine: str, proxy: FaultProxy) -> None:
    peer = mysql_peer(proxy)
    plain = added({"plain": {"ENGINE": peer_engine, **peer}})
    with plain, engine([peer], PEER_ENGINE=peer_engine):
        execute("plain", "CREATE TABLE packets (n int)")
        connections["plain"].close()
        try:
            theirs, ours = packets(proxy, "plain"), packets(proxy, "balanced")
        finally:
            execute("plain", "DROP TABLE packets")
    fewer = {name: theirs[name] - ours[name] for name in theirs}
    expected = dict(zip(("connect", "first connect"), FEWER[peer_engine]))
    assert fewer == {**dict.fromkeys(theirs, 0), **expected}


def test_mysql(mariadb: Node, fault_proxy: Callable[..., FaultProxy]) -> None:
    compare(MYSQL, fault_proxy(mariadb))


def test_postgresql(postgres: PostgreSQLNode, fault_proxy: Callable[..., FaultProxy]) -> None:
    compare(POSTGRESQL, fault_proxy(postgres))


@pytest.mark.server
@pytest.mark.parametrize(
    ("driver", "test", "servers"),
    [("pymysql", "test_mysql", "mariadb_pair"), ("psycopg2", "test_postgresql", "postgres_pair")],
)
def test_other_drivers(
    driver: str, test: str, servers: str, request: pytest.FixtureRequest
) -> None:
    run_again(f"{__file__}::{test}", driver, request, servers)
