"""The core without Django: drivers' own connections, SQLAlchemy, and guards of other calls."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import socket
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import MySQLdb
import psycopg
import psycopg2
import pymysql
import pytest

from django_proxysql import Fault, LoadBalancer, NoPeerAvailable, NotReady
from django_proxysql.core.breaker import CircuitBreakerError
from tests.fakes import Clock, even, raised_by, running, until
from tests.servers import DATABASE, PASSWORD, USER
from tests.servers.galera import GaleraCluster
from tests.servers.mariadb import Node
from tests.test_breaker import GUARDS, Boom, fail
from tests.test_floors import without_django


class Driver:
    """A driver, and what it takes to connect with it."""

    def __init__(self, module: Any, url: str, fixture: str, database: str, port: str) -> None:
        self.module = module
        self.name = module.__name__
        #: SQLAlchemy's.
        self.url = url
        self.fixture = fixture
        self.database = database
        #: A query that names the server's port.
        self.port = port

    def params(self, node: Any, **more: Any) -> dict[str, Any]:
        params = {"host": node.host, "port": node.port, "user": USER}
        return {**params, "password": PASSWORD, self.database: DATABASE, **more}

    def port_of(self, connection: Any) -> int:
        with contextlib.closing(connection.cursor()) as cursor:
            cursor.execute(self.port)
            return int(cursor.fetchone()[0])


MARIADB = ("mariadb_pair", "database", "SELECT @@port")
POSTGRES = ("postgres_pair", "dbname", "SELECT current_setting('port')")
DRIVERS = {
    "mysqlclient": Driver(MySQLdb, "mysql+mysqldb://", *MARIADB),
    "PyMySQL": Driver(pymysql, "mysql+pymysql://", *MARIADB),
    "psycopg": Driver(psycopg, "postgresql+psycopg://", *POSTGRES),
    "psycopg2": Driver(psycopg2, "postgresql+psycopg2://", *POSTGRES),
}


class Site:
    """Servers behind a balancer whose clock is passed in."""

    def __init__(self, driver: Driver, nodes: Any) -> None:
        self.driver = driver
        self.nodes = {f"db{number}": node for number, node in enumerate(nodes, 1)}
        self.clock = Clock()
        self.opened: list[Any] = []

    def balancer(
        self, more: dict[str, Any] | None = None, connect: Any = ..., **options: Any
    ) -> LoadBalancer:
        return LoadBalancer(
            {name: self.driver.params(node, **(more or {})) for name, node in self.nodes.items()},
            connect=self.driver.module.connect if connect is ... else connect,
            clock=self.clock,
            jitter=even,
            **{"strategy": "round_robin", **options},
        )

    def connect(self, db: LoadBalancer) -> Any:
        connection = db.connect()
        self.opened.append(connection)
        return connection

    def ports(self, db: LoadBalancer, count: int = 6) -> set[str]:
        """The names of the servers that so many connections lead to."""
        by_port = {node.port: name for name, node in self.nodes.items()}
        return {by_port[self.driver.port_of(self.connect(db))] for _ in range(count)}

    def close(self) -> None:
        for connection in self.opened:
            with contextlib.suppress(Exception):
                connection.close()


def fixtures(made: type[Site], drivers: dict[str, Driver]) -> tuple[Any, Any]:
    """Return the fixtures ``driver``, which is one's name, and ``site``, which uses it."""

    @pytest.fixture(params=list(drivers))
    def driver(request: pytest.FixtureRequest) -> str:
        return str(request.param)

    @pytest.fixture
    def site(driver: str, request: pytest.FixtureRequest) -> Iterator[Any]:
        found = drivers[driver]
        with contextlib.closing(made(found, request.getfixturevalue(found.fixture))) as site:
            yield site

    return driver, site


driver, site = fixtures(Site, DRIVERS)


@pytest.mark.server
class TestDrivers:
    def test_spreads_the_drivers_own_connections(self, site: Site) -> None:
        """connect() returns the driver's own connections, spread over the peers and counted."""
        db = site.balancer()
        assert site.ports(db, 4) == {"db1", "db2"}
        assert [state.connections for state in db.snapshot()] == [2, 2]
        site.opened.append(site.driver.module.connect(**site.driver.params(site.nodes["db1"])))
        assert len({type(connection) for connection in site.opened}) == 1

    def test_server_that_dies_and_comes_back(
        self, site: Site, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A server that is killed is left alone, and taken back by a trial once it is up again."""
        db = site.balancer()
        site.nodes["db1"].kill()
        assert site.ports(db) == {"db2"}
        circuit = db.peers["db1"].breaker.circuit
        assert (circuit.state, circuit.fault) == ("open", Fault.UNREACHABLE)
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        site.nodes["db1"].start()
        site.clock.advance(29)
        assert site.ports(db) == {"db2"}
        site.clock.advance(2)
        assert site.ports(db) == {"db1", "db2"}
        assert db.peers["db1"].breaker.is_available

    def test_exhaustion_names_each_server_and_no_password(self, site: Site) -> None:
        """With all servers gone NoPeerAvailable names each, what it said, and no password."""
        db = site.balancer()
        for node in site.nodes.values():
            node.kill()
        error = raised_by(db.connect)
        assert type(error) is NoPeerAvailable
        assert type(error.__cause__).__module__.partition(".")[0] == site.driver.name
        for name, node in site.nodes.items():
            assert f"{name} ({node.host}:{node.port})" in str(error)
        assert PASSWORD not in str(error) + repr(error) + repr(db) + repr(db.config)

    def test_everyone_refuses(self, site: Site, caplog: pytest.LogCaptureFixture) -> None:
        """Where every peer refuses the password the driver's own error is raised."""
        caplog.set_level(logging.ERROR)
        db = site.balancer({"password": "wrong"})
        error = raised_by(db.connect)
        assert isinstance(error, site.driver.module.OperationalError)
        assert {state.fault for state in db.snapshot()} == {Fault.REFUSED}
        assert [record.levelname for record in caplog.records] == ["ERROR"] * 2
        assert "wrong" not in caplog.text

    def test_password_from_a_function(self, site: Site) -> None:
        """A password may be a function, called at each attempt."""
        calls: list[int] = []

        def token() -> str:
            calls.append(1)
            return PASSWORD

        db = site.balancer({"password": token})
        assert site.ports(db, 3) == {"db1", "db2"}
        assert len(calls) == 3

    def test_trial_of_a_frozen_server_is_bounded(self, site: Site) -> None:
        """A trial of a server that accepts and then says nothing ends in time; others go on."""
        db = site.balancer(trial_timeout=1)
        db.peers["db1"].breaker.open()
        site.clock.advance(30)
        site.nodes["db1"].freeze()
        with running(lambda: site.connect(db)):
            pass
        assert db.peers["db1"].breaker.current_state == "open"
        assert db.peers["db1"].breaker.circuit.fault in (Fault.UNREACHABLE, Fault.LOST)
        assert site.ports(db, 3) == {"db2"}

    def test_threads(self, site: Site) -> None:
        """Sixteen threads that connect while a server dies all get a connection."""
        db = site.balancer()
        killed = threading.Event()

        def work() -> None:
            site.connect(db)
            assert killed.wait(60)
            connection = site.connect(db)
            assert site.driver.port_of(connection) == site.nodes["db2"].port

        with running(*[work] * 16):
            site.nodes["db1"].kill()
            killed.set()


@pytest.mark.server
@pytest.mark.parametrize("name", list(DRIVERS))
def test_where_django_cannot_be_imported(name: str, request: pytest.FixtureRequest) -> None:
    """All of it works in a process that has no Django."""
    driver = DRIVERS[name]
    nodes = request.getfixturevalue(driver.fixture)
    nodes[0].kill()
    printed = without_django(
        """
        import importlib
        import json
        from django_proxysql import LoadBalancer, NoPeerAvailable

        module, peers, query, url = sys.argv[1:]
        connect = importlib.import_module(module).connect
        db = LoadBalancer(json.loads(peers), connect=connect, strategy="round_robin")
        for _ in range(5):
            cursor = db.connect().cursor()
            cursor.execute(query)
            print(cursor.fetchone()[0], end=" ")

        import sqlalchemy
        engine = sqlalchemy.create_engine(url, creator=db.connect)
        with engine.connect() as connection:
            print(connection.execute(sqlalchemy.text(query)).scalar_one(), end=" ")
        print(db.peers["db1"].breaker.current_state)
        assert not [name for name in sys.modules if name.partition(".")[0] == "django"]
        """,
        driver.name,
        json.dumps({f"db{n}": driver.params(node) for n, node in enumerate(nodes, 1)}),
        driver.port,
        driver.url,
    )
    assert printed == f"{nodes[1].port} " * 6 + "open\n"


# READY_CHECK without Django


@pytest.mark.server
class TestReadyChecks:
    @pytest.mark.parametrize("driver", ["mysqlclient", "PyMySQL"])
    @pytest.mark.parametrize(
        "statements",
        [
            ["SET GLOBAL wsrep_reject_queries = ALL", "SET GLOBAL wsrep_reject_queries = NONE"],
            "docs/howto/galera.rst",
        ],
    )
    def test_galera_taken_out_by_its_operator(
        self, galera: GaleraCluster, driver: str, statements: str | list[str]
    ) -> None:
        """A node that its operator has taken out gets no connections until it is put back."""
        with contextlib.closing(Site(DRIVERS[driver], galera)) as site:
            out, names = site.nodes["db1"], set(site.nodes)
            db = site.balancer(ready_check="galera")
            assert site.ports(db, 3) == names
            if isinstance(statements, str):
                page = (Path(__file__).parents[1] / statements).read_text(encoding="utf-8")
                statements = re.findall(
                    r"^ +(SET GLOBAL wsrep_desync .*|SELECT COUNT.*);$", page, re.M
                )
                assert out.sql(statements.pop(1).replace("'shop'", f"'{USER}'")) == "1\n"
            take_out, put_back = statements
            out.sql(take_out)
            try:
                assert site.ports(db) == names - {"db1"}
                state = db.snapshot()[0]
                assert (state.state, state.fault) == ("open", Fault.NOT_READY)
                assert state.error
            finally:
                out.sql(put_back)
            until(out.synced, pause=0.05)
            site.clock.advance(31)
            assert site.ports(db) == names

    def test_galera_asked_of_a_server_that_is_none(self, mariadb: Node) -> None:
        """A server that is in no cluster is not ready, and says why."""
        db = Site(DRIVERS["mysqlclient"], [mariadb]).balancer(ready_check="galera")
        with pytest.raises(NoPeerAvailable, match="wsrep_ready is OFF"):
            db.connect()

    def test_writable(self, site: Site) -> None:
        """A server whose transactions are read-only gets no connections until it takes writes."""
        one = site.nodes["db1"]
        db = site.balancer(ready_check="writable")
        if site.driver.fixture == "mariadb_pair":
            out, back = "SET GLOBAL read_only = 1", "SET GLOBAL read_only = 0"
        else:
            role = f"ALTER ROLE {USER}"
            out = f"{role} SET default_transaction_read_only = on"
            back = f"{role} RESET default_transaction_read_only"
        one.sql(out)
        try:
            assert site.ports(db) == {"db2"}
            assert "read_only" in db.snapshot()[0].error
        finally:
            one.sql(back)
        site.clock.advance(31)
        assert site.ports(db) == {"db1", "db2"}

    @pytest.mark.parametrize("driver", ["psycopg", "psycopg2"])
    def test_ours_leave_no_transaction_behind(self, site: Site) -> None:
        """In one, autocommit and the isolation level cannot be set, and now() is a past one."""
        connection = site.connect(site.balancer(ready_check="writable"))
        assert connection.info.transaction_status == 0
        connection.autocommit = True

    @pytest.mark.parametrize("driver", ["mysqlclient"])
    def test_dotted_path(self, site: Site) -> None:
        """One's own check gets the driver's connection and says no by raising NotReady."""
        db = site.balancer(ready_check="tests.test_outside_django.is_not_avoided")
        avoided.add(site.nodes["db1"].port)
        try:
            assert site.ports(db) == {"db2"}
        finally:
            avoided.clear()
        assert db.snapshot()[0].error == "this port is to be avoided"


avoided: set[int] = set()


def is_not_avoided(connection: MySQLdb.Connection) -> None:
    """A user's own check."""
    if DRIVERS["mysqlclient"].port_of(connection) in avoided:
        raise NotReady("this port is to be avoided")


# The breaker as a guard of other calls


@pytest.mark.parametrize("guard", list(GUARDS.values()), ids=list(GUARDS))
class TestGuarding:
    """``db.peers["db1"].breaker`` around calls to the same host that are no connects."""

    @pytest.fixture
    def clock(self) -> Clock:
        return Clock()

    @pytest.fixture
    def db(self, clock: Clock) -> LoadBalancer:
        return LoadBalancer(
            {"db1": {"database": ":memory:"}, "db2": {"database": ":memory:"}},
            sqlite3.connect,
            clock=clock,
            jitter=even,
        )

    def test_shares_the_circuit_with_connects(
        self, guard: Any, db: LoadBalancer, clock: Clock
    ) -> None:
        """A failing call takes the peer out for connect() too, and a good one puts it back."""
        circuit = db.peers["db1"].breaker
        boom = Boom("the host's HTTP side")
        assert raised_by(lambda: guard(circuit, lambda: fail(boom))) is boom
        assert [state.state for state in db.snapshot()] == ["open", "closed"]
        assert "HTTP side" in db.snapshot()[0].error
        with pytest.raises(CircuitBreakerError):
            guard(circuit, lambda: None)
        clock.advance(30)
        assert guard(circuit, lambda: 42) == 42
        assert [state.state for state in db.snapshot()] == ["closed", "closed"]
        assert len(db.group.view().tiers[0]) == 2

    def test_connect_passes_by_while_its_trial_runs(
        self, guard: Any, db: LoadBalancer, clock: Clock
    ) -> None:
        circuit = db.peers["db1"].breaker
        circuit.open()
        clock.advance(30)
        inside: list[str] = []
        guard(circuit, lambda: db.connect(lambda attempt: inside.append(attempt.peer.name)))
        assert inside == ["db2"]
        assert circuit.is_available

    def test_with_a_real_socket(self, guard: Any, db: LoadBalancer) -> None:
        """A plain socket to a host that is not there opens the circuit with its own error."""
        with socket.socket() as closed:
            closed.bind(("127.0.0.1", 0))
            address = closed.getsockname()
            with pytest.raises(ConnectionRefusedError):
                guard(db.peers["db1"].breaker, lambda: socket.create_connection(address, timeout=5))
        assert db.peers["db1"].breaker.current_state == "open"
