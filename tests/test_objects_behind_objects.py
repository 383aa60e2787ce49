"""Connections behind proxies, and those who ask a wrapper what it would connect with.

Tracing (OpenTelemetry, Datadog, Elastic APM, New Relic) puts the driver's connection into a
proxy, by wrapt or by hand. Sentry asks at each query for the connection's parameters.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import MySQLdb
import psycopg
import psycopg2
import pymysql
import pymysql.cursors
import pytest
from django.db import OperationalError, connections, transaction
from django.db.utils import load_backend
from django.test import SimpleTestCase

from django_proxysql import LoadBalancer
from django_proxysql.conf.aliases import introduce_peers
from django_proxysql.conf.reading import problems
from django_proxysql.core import drivers, ready
from django_proxysql.core.exceptions import NotReady
from tests.engine import (
    MYSQL,
    POSTGRESQL,
    SQLITE,
    added,
    engine,
    mysql_peer,
    run_case,
)
from tests.servers import DATABASE, PASSWORD, USER, Address
from tests.servers.mariadb import Node
from tests.servers.postgresql import PostgreSQLNode


class Wrapt:
    """A proxy as wrapt's: ``__wrapped__`` is what it wraps, ``__class__`` that one's."""

    def __init__(self, wrapped: Any) -> None:
        object.__setattr__(self, "__wrapped__", wrapped)

    __class__ = property(lambda self: type(self.__wrapped__))  # type: ignore[assignment]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__wrapped__, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.__wrapped__, name, value)


class ByHand:
    """A proxy that somebody wrote: it has no ``__wrapped__``, and hands attributes on."""

    def __init__(self, wrapped: Any) -> None:
        self.__dict__["_inner"] = wrapped

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._inner, name, value)


PROXIES = [Wrapt, ByHand]
ENGINES = {"mariadb": MYSQL, "postgres": POSTGRESQL}


@contextlib.contextmanager
def traced(module: Any, proxy: Callable[[Any], Any]) -> Iterator[None]:
    """Have the driver's connect() return a proxy, as tracing does."""
    plain = module.connect

    @functools.wraps(plain)
    def connect(*args: Any, **kwargs: Any) -> Any:
        return proxy(plain(*args, **kwargs))

    with mock.patch.object(module, "connect", connect):
        yield


class TestWhichDriver:
    @pytest.mark.parametrize("module", [MySQLdb, pymysql, psycopg, psycopg2])
    def test_of_a_connect_function(self, module: Any) -> None:
        """connect() tells its driver, bare, decorated, partial, or behind a proxy."""
        known = drivers.driver_of(module.__name__)
        assert known is not drivers.generic

        @functools.wraps(module.connect)
        def decorated(*args: Any, **kwargs: Any) -> Any:
            return module.connect(*args, **kwargs)

        partial = functools.partial(module.connect, host="db1")
        for thing in (
            module,
            module.connect,
            decorated,
            partial,
            functools.partial(decorated),
            Wrapt(module.connect),
            Wrapt(partial),
            module.OperationalError,
        ):
            assert drivers.driver_of(thing) is known

    def test_of_a_class_method(self) -> None:
        """psycopg.Connection.connect, and that of a subclass, are psycopg's."""

        class Mine(psycopg.Connection[Any]):
            pass

        for thing in (psycopg.Connection.connect, Mine.connect, Mine):
            assert drivers.driver_of(thing) is drivers.postgresql

    def test_of_a_module_that_hands_names_on(self) -> None:
        """A driver module of somebody's own is known by whose errors it has."""
        shim = type(os)("shop_driver")
        shim.OperationalError = pymysql.OperationalError  # type: ignore[attr-defined]
        assert drivers.driver_of_engine(SimpleNamespace(Database=shim)) is drivers.mysql
        assert drivers.driver_of_engine(SimpleNamespace()) is drivers.generic

    @pytest.mark.parametrize("thing", [None, "", "os", lambda: None, mock.Mock(), 7, object()])
    def test_of_nothing_known(self, thing: Any) -> None:
        assert drivers.driver_of(thing) is drivers.generic

    def test_a_proxy_without_an_end(self) -> None:
        """What answers every attribute by itself is given up."""

        class Endless:
            @property
            def __wrapped__(self) -> Endless:
                return Endless()

        assert drivers.driver_of(Endless()) is drivers.generic

    @pytest.mark.parametrize(
        ("cls", "unbuffered"),
        [
            (pymysql.cursors.SSCursor, True),
            (pymysql.cursors.SSDictCursor, True),
            (type("Streaming", (pymysql.cursors.SSCursor,), {}), True),
            (type("SSLAwareCursor", (pymysql.cursors.Cursor,), {}), False),
            (pymysql.cursors.DictCursor, False),
        ],
    )
    def test_unbuffered_cursors_by_what_they_are(self, cls: type, unbuffered: bool) -> None:
        assert drivers.mysql.is_unbuffered({"cursorclass": cls}) is unbuffered


def forked(work: Callable[[], object]) -> str:
    """What ``work`` returns in a forked child."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            said = str(work())
        except BaseException as exc:
            said = repr(exc)
        os.write(writing, said.encode())
        os._exit(0)
    os.waitpid(pid, 0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        return pipe.read()


def session_id(connection: Any) -> int:
    asks = "CONNECTION_ID()" if connection.vendor == "mysql" else "pg_backend_pid()"
    with connection.cursor() as cursor:
        cursor.execute(f"SELECT {asks}")
        return int(cursor.fetchone()[0])


@pytest.mark.parametrize("proxy", PROXIES)
class TestTraced:
    """The engine over a traced driver."""

    @pytest.mark.parametrize("kind", ["mariadb", "postgres"])
    def test_a_fork_leaves_the_parent_its_session(
        self, proxy: Any, kind: str, request: pytest.FixtureRequest
    ) -> None:
        if proxy is ByHand and kind == "postgres":
            pytest.skip("psycopg itself takes no connection that is none of its class")
        peers = [mysql_peer(request.getfixturevalue(kind))]
        module = MySQLdb if kind == "mariadb" else psycopg
        with traced(module, proxy), engine(peers, PEER_ENGINE=ENGINES[kind]) as connection:
            mine = session_id(connection)
            assert int(forked(lambda: session_id(connection))) != mine
            assert session_id(connection) == mine

    def test_a_fork_with_pymysql(self, proxy: Any, mariadb: Node) -> None:
        """PyMySQL has no fileno(): it is left by its own means, behind a proxy too."""
        connection = proxy(pymysql.connect(**params(mariadb)))
        try:
            forked(lambda: drivers.mysql.leave(connection))
            drivers.mysql.ping(connection)
            with connection.cursor() as cursor:
                cursor.execute("SELECT 1")
        finally:
            connection.close()

    def test_pymysql_never_reconnects_by_itself(self, proxy: Any, mariadb: Node) -> None:
        """A ping of a lost connection raises: reconnected, it would have lost its state."""
        connection = proxy(pymysql.connect(**params(mariadb)))
        mariadb.kill_connections(USER)
        with pytest.raises(pymysql.Error):
            drivers.mysql.ping(connection)

    def test_a_wrapper_of_another_package_knows_its_session(
        self, proxy: Any, mariadb: Node
    ) -> None:
        """A cursor class of ours over the driver's cursor finds its session behind the proxy."""
        if proxy is ByHand:
            pytest.skip("what it wraps is unknown")
        with (
            traced(MySQLdb, proxy),
            engine([mysql_peer(mariadb)]) as connection,
            connection.cursor() as cursor,
        ):
            again = type(cursor)(cursor.cursor, connection)
            assert again._session is connection._session

    @pytest.mark.parametrize("driver", ["psycopg", "psycopg2"])
    def test_writable_asks_in_the_server_s_own_words(
        self, proxy: Any, driver: str, postgres: PostgreSQLNode
    ) -> None:
        module = {"psycopg": psycopg, "psycopg2": psycopg2}[driver]
        arguments = {**params(postgres), "dbname": DATABASE}
        del arguments["database"]
        for options, fails in (
            ("", contextlib.nullcontext()),
            ("-c default_transaction_read_only=on", pytest.raises(NotReady)),
        ):
            plain = module.connect(**arguments, options=options)
            with contextlib.closing(plain), fails:
                ready.writable(proxy(plain))

    def test_the_core_s_time_outs(self, proxy: Any) -> None:
        """LoadBalancer bounds an attempt of a traced connect(), too."""
        seen: dict[str, Any] = {}

        def connect(**kwargs: Any) -> Any:
            seen.update(kwargs)
            return mock.Mock()

        connect.__module__ = "MySQLdb"
        if proxy is ByHand:
            connect = functools.wraps(connect)(lambda **kwargs: connect.__wrapped__(**kwargs))  # type: ignore[attr-defined]
        LoadBalancer({"db1": {"host": "db1"}}, connect, connect_timeout=3).connect()
        assert seen == {"host": "db1", "connect_timeout": 3}


def params(node: Address) -> dict[str, Any]:
    server = {"host": node.host, "port": node.port}
    return {**server, "user": USER, "password": PASSWORD, "database": DATABASE}


class Token:
    """A PASSWORD that is called, and counts its calls."""

    def __init__(self) -> None:
        self.calls = 0
        self.fails = False

    def __call__(self) -> str:
        self.calls += 1
        if self.fails:
            raise OSError("the token service is away")
        return PASSWORD


@pytest.mark.parametrize("kind", list(ENGINES))
class TestConnectionParameters:
    """get_connection_params(): anybody may ask, at any time, and nothing happens."""

    def test_only_an_attempt_calls_the_password(
        self, kind: str, request: pytest.FixtureRequest
    ) -> None:
        nodes = request.getfixturevalue(f"{kind}_pair")
        token = Token()
        peers = [mysql_peer(node, PASSWORD=token) for node in nodes]
        options: dict[str, Any] = {"PEER_ENGINE": ENGINES[kind], "STRATEGY": "round_robin"}
        with engine(peers, **options) as connection:
            before = connection.get_connection_params()
            assert (token.calls, before["port"]) == (0, nodes[0].port)
            assert connection.connection is None
            for number in range(1, 3):
                connection.ensure_connection()
                token.fails = True
                state = dict(vars(connection))
                asked = [connection.get_connection_params() for _ in range(3)]
                assert vars(connection) == state
                assert {one["port"] for one in asked} == {
                    int(connection.peer.address.rpartition(":")[2])
                }
                assert token.calls == number
                token.fails = False
                connection.close()
            connection.get_new_connection(connection.get_connection_params()).close()
            assert token.calls == 3

    def test_of_an_alias_that_is_a_peer(self, kind: str, request: pytest.FixtureRequest) -> None:
        node = request.getfixturevalue(kind)
        token = Token()
        peer = {"ENGINE": ENGINES[kind], **mysql_peer(node, PASSWORD=token)}
        entries = {"own": peer}
        with engine(["own"], databases=entries):
            introduce_peers()
            own: Any = connections["own"]
            assert own.get_connection_params()["port"] == node.port
            assert token.calls == 0
            own.ensure_connection()
            assert token.calls == 1
            token.fails = True
            assert own.get_connection_params()["port"] == node.port
            token.fails = False
            opened = own.get_new_connection(own.get_connection_params())
            opened.close()
            assert token.calls == 2

    def test_a_shell_s_settings_have_the_password(
        self, kind: str, request: pytest.FixtureRequest
    ) -> None:
        """dbshell and mysqldump write it on their command line."""
        peers = [mysql_peer(request.getfixturevalue(kind), PASSWORD=Token())]
        with engine(peers, PEER_ENGINE=ENGINES[kind]) as connection:
            assert connection.on_a_live_peer().settings_dict["PASSWORD"] == PASSWORD


def test_without_a_balancer() -> None:
    """A wrapper made from a bare dict says what its own settings are."""
    with added({}), engine([{"HOST": "db1"}]) as connection:
        assert connection.get_connection_params()["host"] == "db1"


class TestMocked:
    """A test that puts a mock into the driver's place sees its mock, and no error of ours."""

    def mocked(self, kind: type[mock.Mock]) -> Any:
        connection = kind(name="a driver's connection")
        row = ("8.4.3", "", 1, 0, 1, "utf8mb4", 0, "")
        connection.cursor.return_value = mock.MagicMock()
        connection.cursor.return_value.fetchone.return_value = row
        connection.cursor.return_value.fetchall.return_value = [row]
        connection.info.server_version = 150_000
        connection.pgconn.pipeline_status = 0
        connection.closed = False
        return connection

    @pytest.mark.parametrize("kind", [mock.Mock, mock.MagicMock])
    @pytest.mark.parametrize("alias", ["balanced", "own"])
    def test_through_django(self, kind: type[mock.Mock], alias: str) -> None:
        made = self.mocked(kind)
        entries = {"own": {"ENGINE": MYSQL, "NAME": "x", "HOST": "db1"}}
        with mock.patch("MySQLdb.connect", return_value=made), engine(["own"], databases=entries):
            introduce_peers()
            connection: Any = connections[alias]
            for _ in range(2):
                with connection.cursor() as cursor:
                    cursor.execute("SELECT 1")
                    assert cursor.fetchone()[0] == "8.4.3"
                with transaction.atomic(alias), connection.cursor() as cursor:
                    cursor.execute("INSERT INTO t VALUES (1)")
                assert connection.connection is made
                connection.close_if_unusable_or_obsolete()
        assert made.close.called

    @pytest.mark.parametrize("kind", [mock.Mock, mock.MagicMock])
    def test_an_error_on_it(self, kind: type[mock.Mock]) -> None:
        """A mock that raises the driver's error is judged like a connection that does."""
        made = self.mocked(kind)
        entries = {"own": {"ENGINE": MYSQL, "NAME": "x", "HOST": "db1"}}
        lost = MySQLdb.OperationalError(2013, "Lost connection")
        with mock.patch("MySQLdb.connect", return_value=made), engine(["own"], databases=entries):
            connection = connections["balanced"]
            with connection.cursor() as cursor:
                made.cursor.return_value.execute.side_effect = lost
                with pytest.raises(OperationalError):
                    cursor.execute("INSERT INTO t VALUES (1)")

    @pytest.mark.parametrize("kind", [mock.Mock, mock.MagicMock])
    def test_in_the_core(self, kind: type[mock.Mock]) -> None:
        connect = kind()
        db = LoadBalancer({"db1": {"host": "db1"}}, connect)
        assert db.connect() is connect.return_value

    @pytest.mark.parametrize("number", [None, -1, "7", 7.5, True, mock.Mock(), mock.MagicMock()])
    def test_what_is_no_descriptor(self, number: Any) -> None:
        connection = mock.Mock()
        connection.fileno.return_value = number
        for driver in (drivers.mysql, drivers.postgresql):
            assert driver.fileno(connection) is None


@pytest.mark.parametrize("kind", list(ENGINES))
def test_a_check_of_all_aliases_in_a_test_that_names_one(
    kind: str, request: pytest.FixtureRequest
) -> None:
    """``check --database`` passes an alias by that is a peer and that a test does not name."""
    peer = {"ENGINE": ENGINES[kind], **mysql_peer(request.getfixturevalue(kind))}

    class OnlyTheBalancer(SimpleTestCase):
        databases = {"balanced"}

        def runTest(self) -> None:
            found = [
                message.id
                for alias in ("own", "balanced")
                for message in connections[alias].validation.check()
            ]
            assert "django_proxysql.W007" not in found
            for connection in connections.all():
                assert connection.features.supports_transactions in (True, False)

    with engine(["own"], databases={"own": peer}):
        introduce_peers()
        run_case(OnlyTheBalancer)


@pytest.mark.parametrize("path", [MYSQL, POSTGRESQL, SQLITE])
def test_checks_know_an_engine_s_driver_whatever_it_is_called(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Time-outs and default ports are the driver's, and not those of the engine's name."""
    named = "shop.mysql" if path == SQLITE else "shop.databases"
    module = type(os)(f"{named}.base")
    real: Any = load_backend(path).DatabaseWrapper
    module.DatabaseWrapper = type("DatabaseWrapper", (real,), {})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, f"{named}.base", module)
    port = {MYSQL: 3306, POSTGRESQL: 5432, SQLITE: 3306}[path]
    entry = {
        "PEERS": [{"HOST": "db1"}, {"HOST": "db1", "PORT": port}],
        "PEER_ENGINE": named,
        "CONNECT_TIMEOUT": 2.5,
        "OPTIONS": {"connect_timeout": 2.5},
    }
    known = {str(p.id)[-4:] for p in problems("balanced", entry, {"balanced": entry})}
    assert known == (set() if path == SQLITE else {"E010", "W001"})
    del entry["OPTIONS"]
    known = {str(p.id)[-4:] for p in problems("balanced", entry, {"balanced": entry})}
    assert known == (set() if path == SQLITE else {"W001", "W003"})
