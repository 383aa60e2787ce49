"""The servers that the other tests rely on do what is said of them."""

from __future__ import annotations

import socket

import MySQLdb
import pytest

from tests.servers import DATABASE, PASSWORD, USER
from tests.servers.mariadb import Node


def connect(node: Node, timeout: int = 5) -> MySQLdb.Connection:
    return MySQLdb.connect(
        host=node.host,
        port=node.port,
        user=USER,
        password=PASSWORD,
        database=DATABASE,
        connect_timeout=timeout,
    )


def test_mariadb_pair(mariadb_pair: tuple[Node, Node]) -> None:
    """Both nodes of the pair let the application's user in and have time zones."""
    first, second = mariadb_pair
    assert first.port != second.port
    for node in mariadb_pair:
        connect(node).close()
        assert node.has_time_zones()


def test_killed_node_refuses_and_keeps_its_data(mariadb: Node) -> None:
    """A killed node refuses connections; restarted it has its port and each answered write."""
    mariadb.sql("CREATE OR REPLACE TABLE kept (n INT)", DATABASE)
    connection = connect(mariadb)
    cursor = connection.cursor()
    for n in range(100):
        cursor.execute("INSERT INTO kept VALUES (%s)", [n])
        connection.commit()
    mariadb.kill()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((mariadb.host, mariadb.port), timeout=5)
    mariadb.start()
    assert mariadb.sql("SELECT COUNT(*) FROM kept", DATABASE) == "100\n"
    connection.close()


def test_frozen_node_accepts_and_is_silent(mariadb: Node) -> None:
    """A frozen node accepts and says nothing; thawed it works, and frozen it can be killed."""
    mariadb.freeze()
    with socket.create_connection((mariadb.host, mariadb.port), timeout=5) as client:
        client.settimeout(0.2)
        with pytest.raises(socket.timeout):
            client.recv(1)
    mariadb.thaw()
    connect(mariadb).close()
    mariadb.freeze()
    mariadb.kill()
    assert not mariadb.running


def test_hurt_node_is_restored(mariadb_pair: tuple[Node, Node]) -> None:
    """Whatever a test does to a node, the next test finds it as it was."""
    first, second = mariadb_pair
    before = first.globals()
    first.set_global("max_connections", 10)
    first.set_global("init_connect", "SET @x = 1")
    second.options.append("--max-connections=20")
    second.restart()
    second.freeze()
    for node in mariadb_pair:
        node.restore()
    assert first.globals() == before
    assert second.globals()["max_connections"] == before["max_connections"]
    second.kill()
    second.restore()
    connect(second).close()
