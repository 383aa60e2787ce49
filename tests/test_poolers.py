"""PgBouncer as a peer: it lets clients in whatever its server does, and has one SQLSTATE for all.

What pgcat, Odyssey and pgpool-II say is in ``tests/test_faults.py``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Callable

import psycopg
import pytest
from django.db import OperationalError, connections, transaction

from django_proxysql import CommitOutcomeUnknown, Fault, NoPeerAvailable, balancers
from tests.engine import (
    POSTGRESQL,
    Clock,
    added,
    make_outcome_table,
    mysql_peer,
    postgres_peer,
)
from tests.servers import DATABASE, PASSWORD, USER
from tests.servers.faultproxy import FaultProxy
from tests.servers.pgbouncer import PgBouncer
from tests.servers.postgresql import PostgreSQLNode
from tests.site import with_table
from tests.test_connecting import first_then_second, state

Start = Callable[..., PgBouncer]


@pytest.fixture
def server(postgres: PostgreSQLNode) -> Iterator[PostgreSQLNode]:
    """A server with an empty table ``app_token``."""
    plain = {"ENGINE": POSTGRESQL, **mysql_peer(postgres)}
    with added({"plain": plain}):
        with_table(connections["plain"])
        yield postgres


def written() -> list[str]:
    with connections["plain"].cursor() as cursor:
        cursor.execute("SELECT value FROM app_token ORDER BY id")
        return [value for (value,) in cursor.fetchall()]


def sql(connection: Any, statement: str) -> Any:
    with connection.cursor() as cursor:
        cursor.execute(statement)
        return cursor.fetchall() if cursor.description else None


def by_hand(pooler: PgBouncer) -> Any:
    return contextlib.closing(
        psycopg.connect(
            host=pooler.host, port=pooler.port, user=USER, password=PASSWORD, dbname=DATABASE
        )
    )


def two(first: Any, second: Any, **settings: Any) -> Any:
    peers = postgres_peer(first), postgres_peer(second)
    return first_then_second(*peers, PEER_ENGINE=POSTGRESQL, **settings)


def test_full(server: PostgreSQLNode, pgbouncer: Start) -> None:
    """max_client_conn is reached: the next peer, and no count; with room again it is used."""
    pooler = pgbouncer(server, max_client_conn=1)
    with two(pooler, server) as connection:
        with by_hand(pooler):
            for _ in range(3):
                connection.ensure_connection()
                assert connection.peer.name == "peer1"
                connection.close()
        assert (state().state, state().failures) == ("closed", 0)
        while connection.peer is None or connection.peer.name != "peer0":
            connection.close()
            connection.ensure_connection()


@pytest.mark.parametrize("in_block", [False, True], ids=["", "block"])
def test_no_server_to_spare(server: PostgreSQLNode, pgbouncer: Start, in_block: bool) -> None:
    """query_wait_timeout: the statement was sent to no server, and is run on the next peer."""
    pooler = pgbouncer(server, default_pool_size=1, query_wait_timeout=1)
    with two(pooler, server) as connection, by_hand(pooler) as other:
        other.execute("SELECT 1")
        connection.ensure_connection()
        assert connection.peer.name == "peer0"
        with transaction.atomic(connection.alias) if in_block else contextlib.nullcontext():
            sql(connection, "INSERT INTO app_token (value) VALUES ('one')")
        assert connection.peer.name == "peer1"
        assert (state().state, state().failures) == ("closed", 0)
    assert written() == ["one"]


def test_no_server_behind_it(
    server: PostgreSQLNode, pgbouncer: Start, fault_proxy: Callable[..., Any]
) -> None:
    """It goes on letting clients in: found by their statements, and asked before it is used."""
    link = fault_proxy(server)
    pooler = pgbouncer(link, query_wait_timeout=1, server_login_retry=1)
    clock = Clock()
    with two(pooler, server, clock=clock) as connection:
        sql(connection, "SELECT 1")
        assert connection.peer.name == "peer0"
        connection.close()
        link.refuse()
        link.drop_connections()
        with pytest.raises(psycopg.OperationalError), by_hand(pooler) as other:
            other.execute("SELECT 1")
        for number in range(3):
            connection.close()
            sql(connection, f"INSERT INTO app_token (value) VALUES ('{number}')")
            assert sql(connection, "SELECT count(*) FROM app_token") == [(number + 1,)]
        assert (state().state, state().fault) == ("open", Fault.NOT_READY)
        # A trial would be let in.
        clock.advance(60)
        connection.close()
        connection.ensure_connection()
        assert connection.peer.name == "peer1"
        assert state().state == "open"
        link.forward()
        while connection.peer.name != "peer0":
            clock.advance(60)
            connection.close()
            connection.ensure_connection()
        assert state().state == "closed"
    assert written() == ["0", "1", "2"]


def test_server_that_dies_in_a_statement(server: PostgreSQLNode, pgbouncer: Start) -> None:
    """Its server's connection is lost: the peer is suspect, a read is run again."""
    pooler = pgbouncer(server)
    with two(pooler, server) as connection:
        sql(connection, "SELECT 1")
        assert connection.peer.name == "peer0"
        (pid,) = sql(connection, "SELECT pg_backend_pid()")[0]
        with connections["plain"].cursor() as cursor:
            cursor.execute("SELECT pg_terminate_backend(%s)", [pid])
        assert sql(connection, "SELECT 42") == [(42,)]
        assert state().state == "closed"
        assert connection.peer.name == "peer1"


@pytest.mark.parametrize("outcome", [None, "record"])
def test_answer_to_commit_that_ends_in_its_middle(
    server: PostgreSQLNode,
    pgbouncer: Start,
    fault_proxy: Callable[..., FaultProxy],
    outcome: str | None,
) -> None:
    """It has passed on a part of the server's answer, and its own words come after that."""
    make_outcome_table(connections["plain"])
    proxy = fault_proxy(server)
    with two(pgbouncer(proxy), server, COMMIT_OUTCOME=outcome) as connection:
        sql(connection, "SELECT 1")
        assert connection.peer.name == "peer0"
        unknown = pytest.raises(CommitOutcomeUnknown) if outcome is None else None
        with unknown or contextlib.nullcontext(), transaction.atomic(connection.alias):
            sql(connection, "INSERT INTO app_token (value) VALUES ('one')")
            proxy.cut_reply(5, matching=b"COMMIT")
        assert sql(connection, "SELECT value FROM app_token") == [("one",)]
    assert proxy.cuts == 1


def test_unknown_database_of_one_peer(server: PostgreSQLNode, pgbouncer: Start) -> None:
    pooler = pgbouncer(server)
    peers = postgres_peer(pooler, NAME="nonesuch"), postgres_peer(server)
    with first_then_second(*peers, PEER_ENGINE=POSTGRESQL) as connection:
        connection.ensure_connection()
        assert connection.peer.name == "peer1"
        assert (state().state, state().fault) == ("open", Fault.REFUSED)
        assert "no such database" in state().error


def test_database_that_the_caller_asks_for(server: PostgreSQLNode, pgbouncer: Start) -> None:
    """A tenant without a database takes no pooler out."""
    with two(pgbouncer(server), pgbouncer(server)) as connection:
        connection.settings_dict["NAME"] = "tenant_without_a_database"
        for _ in range(3):
            with pytest.raises(OperationalError, match="no such database") as raised:
                connection.ensure_connection()
            assert not isinstance(raised.value, NoPeerAvailable)
        connection.settings_dict["NAME"] = DATABASE
        connection.ensure_connection()
        assert [s.failures for s in balancers["balanced"].snapshot()] == [0, 0]


@pytest.mark.parametrize(
    "wrong", [{"PASSWORD": "no"}, {"USER": "nonesuch"}], ids=["PASSWORD", "USER"]
)
def test_refused_by_all(server: PostgreSQLNode, pgbouncer: Start, wrong: dict[str, str]) -> None:
    peers = [postgres_peer(pgbouncer(server), **wrong)] * 2
    with first_then_second(*peers, PEER_ENGINE=POSTGRESQL) as connection:
        with pytest.raises(OperationalError, match="authentication failed") as raised:
            connection.ensure_connection()
        assert not isinstance(raised.value, NoPeerAvailable)
        assert (state().state, state().fault) == ("open", Fault.REFUSED)
