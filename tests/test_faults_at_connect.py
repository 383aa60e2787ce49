"""What each kind of error says about a peer while Django connects to it.

``tests/test_connecting.py`` has the errors of servers that fail in the usual ways. Here are those
that take a special server, and those that none can be brought to say at will: these a driver says
that refuses one port, and is otherwise the real one.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import re
import signal
from collections.abc import Iterator
from typing import Any, Callable
from unittest import mock

import MySQLdb
import pymysql
import pytest
from django.db import (
    DatabaseError,
    IntegrityError,
    InterfaceError,
    NotSupportedError,
    OperationalError,
)

from django_proxysql import Fault, NoPeerAvailable, balancers
from tests.engine import POSTGRESQL, Clock, engine, mysql_peer, nodb_cursor, postgres_peer
from tests.servers import PASSWORD, USER
from tests.servers.mariadb import Node
from tests.servers.postgresql import PostgreSQLNode
from tests.test_connecting import (
    assert_nobodys_fault,
    assert_passed_by,
    first_then_second,
    sockets,
    state,
)

Pair = tuple[Node, Node]


# Errors of real servers


@pytest.mark.parametrize(
    ("wrong", "code"),
    [
        ({"HOST": "no-such-host.invalid"}, 2005),
        ({"HOST": "/nowhere/mysqld.sock"}, 2002),
        # TLS is asked of a server that has none.
        ({"OPTIONS": {"ssl_mode": "VERIFY_IDENTITY"}}, 2026),
    ],
)
def test_not_reached(mariadb_pair: Pair, wrong: dict[str, Any], code: int) -> None:
    """A name that is unknown, a socket that is missing and TLS that fails are UNREACHABLE."""
    bad, good = mysql_peer(mariadb_pair[0], **wrong), mysql_peer(mariadb_pair[1])
    with first_then_second(bad, good) as connection:
        before = sockets()
        assert_passed_by(connection, Fault.UNREACHABLE)
        assert state().error.startswith(f"({code}, ")
        connection.close()
        assert sockets() <= before


@pytest.mark.parametrize("byte", [None, 1, 40, 100])
def test_peer_that_hangs_up_at_once_or_in_its_handshake_is_unreachable(
    mariadb_pair: Pair, fault_proxy: Callable[..., Any], byte: int | None
) -> None:
    """The first as a proxy without servers does."""
    proxy = fault_proxy(mariadb_pair[0])
    if byte is None:
        proxy.accept_and_close()
    else:
        proxy.cut_handshake(byte)
    with first_then_second(mysql_peer(proxy), mysql_peer(mariadb_pair[1])) as connection:
        assert_passed_by(connection, Fault.UNREACHABLE)
        assert state().error.startswith("(2013, ")


def test_limit_of_a_user(mariadb_pair: Pair) -> None:
    """1226: the user has as many connections as it may; the peer is well."""
    full, alive = mariadb_pair
    full.sql(f"ALTER USER '{USER}'@'%' WITH MAX_USER_CONNECTIONS 1")
    try:
        with (
            first_then_second(mysql_peer(full), mysql_peer(alive)) as connection,
            contextlib.closing(
                MySQLdb.connect(host=full.host, port=full.port, user=USER, password=PASSWORD)
            ),
        ):
            for _ in range(3):
                connection.ensure_connection()
                assert connection.peer.name == "peer1"
                connection.close()
            assert (state().state, state().failures) == ("closed", 0)
            alive.kill()
            with pytest.raises(NoPeerAvailable, match=r"peer0 \(.*\(1226, .*tried just now"):
                connection.ensure_connection()
    finally:
        full.sql(f"ALTER USER '{USER}'@'%' WITH MAX_USER_CONNECTIONS 0")


def test_password_expired(mariadb_pair: Pair) -> None:
    """1862, or 1820: a password that has expired is a refusal."""
    expired, alive = mariadb_pair
    expired.set_global("disconnect_on_expired_password", 1)
    expired.sql(f"ALTER USER '{USER}'@'%' PASSWORD EXPIRE")
    try:
        with first_then_second(mysql_peer(expired), mysql_peer(alive)) as connection:
            assert_passed_by(connection, Fault.REFUSED)
    finally:
        expired.sql(f"SET PASSWORD FOR '{USER}'@'%' = PASSWORD('{PASSWORD}')")


def test_postgresql_shutting_down(postgres_pair: tuple[PostgreSQLNode, PostgreSQLNode]) -> None:
    """57P03: a PostgreSQL that is shutting down waits for its clients and takes no more."""
    leaving, alive = postgres_pair
    peers = postgres_peer(leaving), postgres_peer(alive)
    with first_then_second(*peers, PEER_ENGINE=POSTGRESQL) as connection:
        connection.ensure_connection()
        assert connection.peer.name == "peer0"
        leaving.process.send_signal(signal.SIGTERM)
        other = connection.copy()
        # It says so from the moment on at which it has read the signal.
        while other.connection is None or other.peer.name == "peer0":
            other.close()
            other.ensure_connection()
        assert (state().state, state().fault) == ("open", Fault.NOT_READY)
        assert "shutting down" in state().error
        other.close()
    # Still there, and of no use to the next test: gone, it is started again.
    leaving.stop()


# Errors of a driver


@contextlib.contextmanager
def either(pair: Pair, trial: bool) -> Iterator[Any]:
    """Yield a connection that asks the first of two peers next.

    :param trial: as a trial, a minute after it was not reached.
    """
    clock = Clock()
    with first_then_second(*map(mysql_peer, pair), clock=clock) as connection:
        connection.clock = clock
        if trial:
            with failing(connection, pair[0].port, mysql(2003)):
                connection.ensure_connection()
            connection.close()
            clock.advance(60)
        yield connection


@contextlib.contextmanager
def failing(connection: Any, port: int, error: BaseException) -> Iterator[list[int]]:
    """Let connecting to ``port`` raise ``error``; yield the ports that are connected to."""
    connect = connection.Database.connect
    ports: list[int] = []

    def fails_at_port(*args: Any, **params: Any) -> Any:
        ports.append(params["port"])
        if params["port"] == port:
            raise error
        return connect(*args, **params)

    with mock.patch.object(connection.Database, "connect", fails_at_port):
        yield ports


def mysql(code: int, text: str = "text") -> MySQLdb.OperationalError:
    return MySQLdb.OperationalError(code, text)


def name_of(value: Any) -> str | None:
    """Name an exception by its class and code."""
    if not isinstance(value, BaseException):
        return getattr(value, "__name__", None) or value.name
    return "-".join(map(str, (type(value).__name__, *value.args[:1])))


@pytest.mark.parametrize(
    ("error", "fault"),
    [
        # One of each fault: which code says which is in tests/test_faults.py.
        (mysql(2003), Fault.UNREACHABLE),
        # Where a wrapped driver raises another driver's errors, they are judged as that driver's.
        (pymysql.err.OperationalError(2003, "Can't connect (Errno 111)"), Fault.UNREACHABLE),
        (mysql(1049), Fault.REFUSED),
        (mysql(1047, "WSREP has not yet prepared node for application use"), Fault.NOT_READY),
        # Of a server behind a proxy: counted in a way of its own, for it may be busy.
        (mysql(9001, "Max connect timeout reached while reaching hostgroup 0"), Fault.NOT_READY),
        (MySQLdb.InterfaceError(0, ""), Fault.LOST),
    ],
    ids=name_of,
)
def test_counts(mariadb_pair: Pair, error: Exception, fault: Fault) -> None:
    """The peer's fault: the circuit opens, the next peer is connected to."""
    bad, good = mariadb_pair
    with first_then_second(mysql_peer(bad), mysql_peer(good)) as connection:
        with failing(connection, bad.port, error) as ports:
            connection.ensure_connection()
        assert ports == [bad.port, good.port]
        assert connection.peer.name == "peer1"
        assert (state().state, state().fault, state().failures) == ("open", fault, 1)


@pytest.mark.parametrize("code", [1040, 1203, 1226])
def test_counts_nothing(mariadb_pair: Pair, code: int) -> None:
    """A full peer: the next is connected to, and it is the first to be asked the next time."""
    bad, good = mariadb_pair
    with first_then_second(mysql_peer(bad), mysql_peer(good)) as connection:
        with failing(connection, bad.port, mysql(code)) as ports:
            for _ in range(3):
                connection.ensure_connection()
                assert connection.peer.name == "peer1"
                connection.close()
        assert ports == [bad.port, good.port] * 3
        assert (state().state, state().failures) == ("closed", 0)
        connection.ensure_connection()
        assert connection.peer.name == "peer0"


class SoftTimeLimitExceeded(Exception):
    """As Celery's."""


class Timeout(BaseException):
    """As gevent's."""


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (mysql(2002, "Can't create TCP/IP socket (24)"), OperationalError),
        (mysql(2001, "Can't create UNIX socket (23)"), OperationalError),
        (mysql(1213, "Deadlock found"), OperationalError),
        (MySQLdb.IntegrityError(1062, "Duplicate entry"), IntegrityError),
        (OSError(24, "Too many open files"), OSError),
        (SoftTimeLimitExceeded(), SoftTimeLimitExceeded),
        (Timeout(), Timeout),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
    ids=name_of,
)
@pytest.mark.parametrize("trial", [False, True], ids=["", "trial"])
def test_what_is_no_peers_fault_is_raised_at_once(
    mariadb_pair: Pair, error: BaseException, raised: type[BaseException], trial: bool
) -> None:
    bad, _ = mariadb_pair
    with either(mariadb_pair, trial) as connection:
        with failing(connection, bad.port, error) as ports, pytest.raises(raised) as caught:
            connection.ensure_connection()
        assert ports == [bad.port]
        assert error in (caught.value, caught.value.__cause__)
        assert connection.connection is None
        if trial:
            # It is as it was: open, and its trial, which proved nothing, is due again.
            assert (state().state, state().fault) == ("open", Fault.UNREACHABLE)
            connection.clock.advance(1.5)
        else:
            assert (state().state, state().failures) == ("closed", 0)
        connection.ensure_connection()
        assert connection.peer.name == "peer0"
        assert state().state == "closed"


#: Errors that no table lists, made anew for each test: they get the peer's name.
ODD: dict[str, Callable[[], Exception]] = {
    **{
        str(code): functools.partial(mysql, code, "text")
        for code in (1047, 1064, 1184, 1193, 1231, 1815, 2014, 3118, 4031, 4151)
    },
    "ProgrammingError": lambda: MySQLdb.ProgrammingError(1064, "You have an error in your SQL"),
    "NotSupportedError": lambda: MySQLdb.NotSupportedError(1235, "not supported"),
    "InternalError": lambda: pymysql.err.InternalError("Packet sequence number wrong"),
    "InterfaceError": lambda: MySQLdb.InterfaceError(-1, "of another kind"),
    "Django's": lambda: NotSupportedError("MySQL 8.0.11 or later is required (found 5.7)."),
}


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("trial", [False, True], ids=["", "trial"])
def test_error_that_no_table_lists(mariadb_pair: Pair, kind: str, trial: bool) -> None:
    """What a driver says of its server is this peer's, once the next peer has let us in."""
    with either(mariadb_pair, trial) as connection:
        with failing(connection, mariadb_pair[0].port, ODD[kind]()):
            connection.ensure_connection()
        assert connection.peer.name == "peer1"
        assert (state().state, state().failures) == ("open", 1 + trial)
        assert state().fault in (Fault.REFUSED, Fault.UNREACHABLE)
        assert connection.peer.breaker.circuit.failures == 0


@pytest.mark.parametrize("kind", [kind for kind in ODD if kind != "InternalError"])
def test_error_that_all_peers_say_alike(mariadb_pair: Pair, kind: str) -> None:
    error = ODD[kind]()
    code = error.args[0]
    with (
        engine([mysql_peer(node) for node in mariadb_pair]) as connection,
        mock.patch.object(connection.Database, "connect", side_effect=error) as connect,
        pytest.raises(DatabaseError if kind != "InterfaceError" else InterfaceError) as raised,
    ):
        connection.ensure_connection()
    assert connect.call_count == 2
    assert not isinstance(raised.value, NoPeerAvailable)
    assert error in (raised.value, raised.value.__cause__)
    assert str(raised.value.args[0]).startswith(str(code).rstrip())


#: One peer's settings that its driver cannot take, or its server.
TYPOS: list[dict[str, Any]] = [
    {"OPTIONS": {"nonesuch": 1}},
    {"OPTIONS": {"isolation_level": "repeatable"}},
    {"OPTIONS": {"ssl_mode": "WRONG"}},
    {"OPTIONS": {"charset": "nonesuch"}},
    {"PORT": "abc"},
    {"HOST": 1},
    {"OPTIONS": {"init_command": "SET nonesuch = 1"}},
    {"OPTIONS": {"init_command": "SELEKT 1"}},
    {"USER": 1},
]


@pytest.mark.parametrize("typo", TYPOS, ids=str)
def test_typo_of_one_peer(
    mariadb_pair: Pair, typo: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """A typo in one peer's settings fails no connect, and is an ERROR that names the peer."""
    wrong, good = mariadb_pair
    with first_then_second(mysql_peer(wrong, **typo), mysql_peer(good)) as connection:
        for _ in range(5):
            connection.ensure_connection()
            assert connection.peer.name == "peer1"
            connection.close()
    errors = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert len(errors) == 1
    assert re.search(r"balanced.*peer0 \(", errors[0])


def test_libpqs_answer_that_no_table_lists(
    postgres_pair: tuple[PostgreSQLNode, PostgreSQLNode], caplog: pytest.LogCaptureFixture
) -> None:
    """libpq shows no code of a failed connect: one peer's, or, said by all, raised as it is."""
    wrong = {"OPTIONS": {"options": "-c nonesuch=1"}}
    peers = postgres_peer(postgres_pair[0], **wrong), postgres_peer(postgres_pair[1])
    with first_then_second(*peers, PEER_ENGINE=POSTGRESQL) as connection:
        assert_passed_by(connection, Fault.REFUSED)
    assert [r.levelname for r in caplog.records if r.levelno >= logging.WARNING] == ["ERROR"]
    peers = tuple(postgres_peer(node, **wrong) for node in postgres_pair)
    with first_then_second(*peers, PEER_ENGINE=POSTGRESQL) as connection:
        with pytest.raises(OperationalError, match=r"nonesuch.* of 'balanced'") as raised:
            connection.ensure_connection()
        assert not isinstance(raised.value, NoPeerAvailable)
        assert state().state == "closed"


def test_tenant_that_may_not_connect_takes_no_peer_out(
    postgres_pair: tuple[PostgreSQLNode, PostgreSQLNode],
) -> None:
    for node in postgres_pair:
        node.sql("CREATE DATABASE closed_shop; REVOKE CONNECT ON DATABASE closed_shop FROM PUBLIC")
    try:
        peers = tuple(postgres_peer(node) for node in postgres_pair)
        with first_then_second(*peers, PEER_ENGINE=POSTGRESQL) as connection:
            connection.settings_dict["NAME"] = "closed_shop"
            for _ in range(3):
                with pytest.raises(OperationalError, match="permission denied for database"):
                    connection.ensure_connection()
            assert [s.state for s in balancers["balanced"].snapshot()] == ["closed"] * 2
    finally:
        for node in postgres_pair:
            node.sql("DROP DATABASE closed_shop")


@pytest.mark.parametrize("typo", TYPOS, ids=str)
def test_typo_of_all_peers(mariadb_pair: Pair, typo: dict[str, Any]) -> None:
    """The same typo in all of them is raised as the driver says it, with alias and peer named."""
    with engine([mysql_peer(node, **typo) for node in mariadb_pair]) as connection:
        before = sockets()
        for _ in range(3):
            with pytest.raises(Exception, match=r"to peer[01] \(.*\) of 'balanced'") as raised:
                connection.ensure_connection()
            assert not isinstance(raised.value, NoPeerAvailable)
            assert_nobodys_fault(connection, before)


@pytest.mark.parametrize("error", [FileNotFoundError(2, "No such file"), PermissionError(13, "no")])
def test_file_of_one_peer(mariadb_pair: Pair, error: OSError) -> None:
    """A certificate that is missing on this machine for one peer: the other is used."""
    bad, good = mariadb_pair
    with (
        first_then_second(mysql_peer(bad), mysql_peer(good)) as connection,
        failing(connection, bad.port, error),
    ):
        assert_passed_by(connection, None)


def test_refused_without_a_database(mariadb_pair: Pair) -> None:
    """Refused in _nodb_cursor, which asks for another database: raised, counted for nothing."""
    bad, good = mariadb_pair
    with first_then_second(mysql_peer(bad), mysql_peer(good)) as connection:
        with failing(connection, bad.port, mysql(1045, "Access denied")) as ports:
            for _ in range(3):
                with pytest.raises(OperationalError, match="1045"), nodb_cursor(connection):
                    pass
            assert ports == [bad.port] * 3
            assert (state().state, state().failures) == ("closed", 0)
        # A peer that is not there is passed by as ever.
        with (
            failing(connection, bad.port, mysql(2003)),
            nodb_cursor(connection) as cursor,
        ):
            cursor.execute("SELECT @@port")
            assert cursor.fetchone() == (good.port,)
        assert state().state == "open"


def test_postgresql_without_a_database(
    postgres_pair: tuple[PostgreSQLNode, PostgreSQLNode],
) -> None:
    """PostgreSQL's _nodb_cursor goes to the database postgres; refused there counts nothing."""
    bad, good = postgres_pair
    peers = postgres_peer(bad), postgres_peer(good)
    with first_then_second(*peers, PEER_ENGINE=POSTGRESQL) as connection:
        with nodb_cursor(connection) as cursor:
            cursor.execute("SELECT current_database()")
            assert cursor.fetchone() == ("postgres",)
        connection.settings_dict["NAME"] = "tenant_without_a_database"
        for _ in range(3):
            with pytest.raises(OperationalError, match="tenant_without_a_database") as raised:
                connection.ensure_connection()
            assert not isinstance(raised.value, NoPeerAvailable)
        for name in ("peer0", "peer1"):
            assert (state(name).state, state(name).failures) == ("closed", 0)
