"""What an error at connect says about a peer, with the real errors of real servers, in Django."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from operator import methodcaller
from pathlib import Path
from typing import Any

import MySQLdb
import pytest
from django.core.exceptions import ImproperlyConfigured
from django.db import OperationalError
from django.db.backends.signals import connection_created

import django_proxysql
from django_proxysql import Fault, NotReady, balancers
from django_proxysql.core.balancer import PeerState
from django_proxysql.registry import NoPeerAvailable
from tests.children import run_python
from tests.engine import POSTGRESQL, SQLITE, Clock, engine, mysql_peer, postgres_peer, sqlite_peer
from tests.servers import ADMIN, ADMIN_PASSWORD, DATABASE, PASSWORD, USER
from tests.servers.faultproxy import FaultProxy
from tests.servers.galera import GaleraCluster
from tests.servers.mariadb import Node
from tests.servers.postgresql import PostgreSQLNode

Pair = tuple[Node, Node]


def state(name: str = "peer0") -> PeerState:
    return {s.name: s for s in balancers["balanced"].snapshot()}[name]


def sockets() -> set[str]:
    """Return this process's open sockets.

    Of those that were open before, one of another test's may end at any time.
    """
    found = set()
    for descriptor in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            link = os.readlink(f"/proc/self/fd/{descriptor}")
            if link.startswith("socket:"):
                found.add(link)
    return found


def first_then_second(first: Any, second: Any, **settings: Any) -> Any:
    """Return an engine that tries ``first`` before ``second``, by their priorities.

    :param first: a peer's dict, or a server.
    """
    one, two = (peer if isinstance(peer, dict) else mysql_peer(peer) for peer in (first, second))
    return engine([one, {**two, "PRIORITY": 1}], **settings)


def connected_to(connection: Any) -> str:
    """Return the name of the peer that a new connection leads to."""
    connection.close()
    connection.ensure_connection()
    return str(connection.peer.name)


def assert_passed_by(connection: Any, fault: Fault | None) -> None:
    """Connect, to the next peer; the first one's circuit opens for ``fault``, or not for None."""
    connection.ensure_connection()
    assert connection.peer.name == "peer1"
    if fault is None:
        assert (state().state, state().failures) == ("closed", 0)
    else:
        assert (state().state, state().fault) == ("open", fault)


# One row after the other of what an error means


DEAD = methodcaller("kill"), methodcaller("start")
SILENT = methodcaller("freeze"), methodcaller("thaw")
FULL = [methodcaller("sql", f"ALTER ROLE {USER} CONNECTION LIMIT {number}") for number in (0, -1)]
READ_ONLY = [methodcaller("set_global", "read_only", value) for value in (1, 0)]
READS = [methodcaller("set_global", f"default_transaction_read_only = {v}") for v in ("on", "off")]
WRITABLE = {"READY_CHECK": "writable"}
#: The servers; what happens to one, and what mends it; settings; what its circuit opens for, and
#: words of its error.
TROUBLE: dict[str, tuple[str, Sequence[Any], dict[str, Any], Fault | None, str]] = {
    "dead": ("mariadb_pair", DEAD, {}, Fault.UNREACHABLE, "(2002, "),
    "silent": ("mariadb_pair", SILENT, {}, Fault.UNREACHABLE, "(2013, "),
    "read only": ("mariadb_pair", READ_ONLY, WRITABLE, Fault.NOT_READY, "read_only"),
    "PostgreSQL, dead": ("postgres_pair", DEAD, {}, Fault.UNREACHABLE, "refused"),
    "PostgreSQL, silent": ("postgres_pair", SILENT, {}, Fault.UNREACHABLE, "timeout expired"),
    "PostgreSQL, read only": ("postgres_pair", READS, WRITABLE, Fault.NOT_READY, "read_only"),
    "PostgreSQL, full": ("postgres_pair", FULL, {}, None, ""),
}


@pytest.mark.server
@pytest.mark.parametrize(
    ("pair", "trouble", "settings", "fault", "words"), TROUBLE.values(), ids=TROUBLE
)
def test_peer_in_trouble_is_passed_by_and_back_by_its_trial(
    pair: str,
    trouble: Sequence[Any],
    settings: dict[str, Any],
    fault: Fault | None,
    words: str,
    request: pytest.FixtureRequest,
) -> None:
    (bad, good), (hurt, mend) = request.getfixturevalue(pair), trouble
    clock = Clock()
    settings = {"CONNECT_TIMEOUT": 2, "CHECK_INTERVAL": 30, "clock": clock, **settings}
    if pair == "postgres_pair":
        settings["PEER_ENGINE"] = POSTGRESQL
    with first_then_second(bad, good, **settings) as connection:
        assert connected_to(connection) == "peer0"
        connection.close()
        hurt(bad)
        try:
            assert_passed_by(connection, fault)
            assert words in (state().error or "")
        finally:
            mend(bad)
        clock.advance(29)
        assert connected_to(connection) == ("peer0" if fault is None else "peer1")
        clock.advance(2)
        assert connected_to(connection) == "peer0"
        assert state().state == "closed"


def test_full(mariadb_pair: Pair) -> None:
    """A full peer is passed over and its circuit stays closed; all full, each says 1040."""
    full, alive = mariadb_pair
    address = {"host": full.host, "user": USER, "password": PASSWORD, "database": DATABASE}
    full.set_global("max_connections", 10)
    held = []
    with pytest.raises(MySQLdb.OperationalError, match="1040"):
        while True:
            held.append(MySQLdb.connect(port=full.port, **address))
    with first_then_second(full, alive) as connection:
        assert_passed_by(connection, None)
        connection.close()
        alive.kill()
        with pytest.raises(NoPeerAvailable, match=r"peer0 \(.*1040.*tried just now; peer1.*2002"):
            connection.ensure_connection()
        for connection_held in held:
            connection_held.close()


@pytest.mark.parametrize(
    ("wrong", "code"),
    [
        ({"PASSWORD": "not-" + PASSWORD}, 1045),
        ({"NAME": "nonesuch", "USER": ADMIN, "PASSWORD": ADMIN_PASSWORD}, 1049),
        ({"NAME": "mysql", "USER": "narrow", "PASSWORD": "narrow"}, 1044),
    ],
)
def test_refusing(
    mariadb_pair: Pair, wrong: dict[str, Any], code: int, caplog: pytest.LogCaptureFixture
) -> None:
    """A peer that refuses us is an ERROR in the log, counts, and the next is used."""
    refusing, alive = mariadb_pair
    refusing.create_user("narrow", "narrow", grants=f"SELECT ON {DATABASE}.*")
    with first_then_second(mysql_peer(refusing, **wrong), alive) as connection:
        assert_passed_by(connection, Fault.REFUSED)
        assert state().error.startswith(f"({code}, ")
    (record,) = [r for r in caplog.records if r.levelno >= logging.INFO]
    assert record.levelno == logging.ERROR
    assert "refuses us" in record.getMessage()


@pytest.mark.parametrize("wrong", [{"PASSWORD": "no"}, {"NAME": "nonesuch"}])
def test_refusals_of_postgres_are_raised(postgres: PostgreSQLNode, wrong: dict[str, Any]) -> None:
    with engine([postgres_peer(postgres, **wrong)], PEER_ENGINE=POSTGRESQL) as connection:
        with pytest.raises(OperationalError) as raised:
            connection.ensure_connection()
        assert not isinstance(raised.value, NoPeerAvailable)
        assert (state().state, state().fault) == ("open", Fault.REFUSED)


def test_drivers_own_error_where_all_refuse_and_quoted_between_trials(mariadb_pair: Pair) -> None:
    clock = Clock()
    peers = [mysql_peer(node, PASSWORD="no") for node in mariadb_pair]
    with engine(peers, clock=clock, LAST_RESORT_INTERVAL=5) as connection:
        with pytest.raises(OperationalError) as raised:
            connection.ensure_connection()
        assert type(raised.value) is OperationalError
        assert raised.value.args[0] == 1045
        assert isinstance(raised.value.__cause__, MySQLdb.OperationalError)
        with pytest.raises(NoPeerAvailable) as between:
            connection.ensure_connection()
        assert str(between.value).count("circuit open, last error (1045, ") == 2
        assert str(between.value).count("next trial in 5 s") == 2
        clock.advance(5.1)
        with pytest.raises(OperationalError) as again:
            connection.ensure_connection()
        assert again.value.args[0] == 1045


def test_refused_while_name_was_changed(mariadb_pair: Pair) -> None:
    """Refused for a database that the caller asked for: raised at once, counted for nothing."""
    peers = [mysql_peer(node, USER=ADMIN, PASSWORD=ADMIN_PASSWORD) for node in mariadb_pair]
    with engine(peers) as connection:
        connection.settings_dict["NAME"] = "tenant_without_a_database"
        for _ in range(5):
            with pytest.raises(OperationalError) as raised:
                connection.ensure_connection()
            assert raised.value.args[0] == 1049
        connection.settings_dict["NAME"] = DATABASE
        for name in ("peer0", "peer1"):
            assert (state(name).state, state(name).failures) == ("closed", 0)
        # Nor does a peer that cannot be reached gain anything by the changed name.
        mariadb_pair[0].kill()
        mariadb_pair[1].kill()
        connection.settings_dict["NAME"] = "tenant_without_a_database"
        with pytest.raises(NoPeerAvailable):
            connection.ensure_connection()
        assert state().state == "open"


# READY_CHECK


@pytest.mark.slow
def test_galera_node_cut_off(galera: GaleraCluster) -> None:
    """READY_CHECK galera: a node cut off from its cluster accepts connections and gets none."""
    cut, alive = galera[0], galera[1]
    clock = Clock()
    settings = {"READY_CHECK": "galera", "clock": clock}
    with first_then_second(cut, alive, **settings) as connection:
        assert connected_to(connection) == "peer0"
        connection.close()
        galera.isolate(cut)
        before = sockets()
        assert_passed_by(connection, Fault.NOT_READY)
        assert "wsrep" in state().error
        connection.close()
        assert sockets() <= before
        # Without READY_CHECK it is found out by the first statement on a table, here a receiver's.
        galera[0].sql("SELECT 1")
    peer = mysql_peer(cut, OPTIONS={"init_command": "SELECT 1 FROM app.nonesuch LIMIT 0"})
    with first_then_second(peer, alive) as connection:
        assert_passed_by(connection, Fault.NOT_READY)
        assert state().error.startswith("(1047, 'WSREP")


@contextlib.contextmanager
def as_standby(node: PostgreSQLNode) -> Iterator[None]:
    """Have a PostgreSQL server in recovery, until it is promoted."""
    signal_file = node.datadir / "standby.signal"
    node.stop()
    signal_file.touch()
    node.give(signal_file)
    try:
        node.start()
        yield
    finally:
        if signal_file.exists():
            node.stop()
            signal_file.unlink()


def test_postgresql_standby_is_passed_by_until_it_is_promoted(
    postgres_pair: tuple[PostgreSQLNode, PostgreSQLNode],
) -> None:
    standby, writer = postgres_pair
    clock = Clock()
    settings = {"READY_CHECK": "writable", "PEER_ENGINE": POSTGRESQL, "clock": clock}
    with as_standby(standby), first_then_second(standby, writer, **settings) as connection:
        assert_passed_by(connection, Fault.NOT_READY)
        assert "in recovery" in state().error
        standby.sql("SELECT pg_promote()")
        clock.advance(60)
        assert connected_to(connection) == "peer0"


refused_ports: set[int] = set()


def not_these_ports(connection: Any) -> None:
    """Raise NotReady for the ports in ``refused_ports``: a READY_CHECK of a user's own."""
    cursor = connection.cursor()
    cursor.execute("SELECT @@port")
    if cursor.fetchone()[0] in refused_ports:
        raise NotReady("not this one")


def test_ready_check_of_ones_own(mariadb_pair: Pair) -> None:
    """READY_CHECK as a dotted path is called with the driver's connection; NotReady counts."""
    refused_ports.add(mariadb_pair[0].port)
    settings = {"READY_CHECK": f"{__name__}.not_these_ports"}
    try:
        with first_then_second(*mariadb_pair, **settings) as connection:
            assert connected_to(connection) == "peer1"
            assert state().error == "not this one"
            refused_ports.add(mariadb_pair[1].port)
            connection.close()
            with pytest.raises(NoPeerAvailable, match=r"peer1 .*: not this one, tried just now"):
                connection.ensure_connection()
    finally:
        refused_ports.clear()


def breaks(connection: Any) -> None:
    """Raise what is not NotReady: a READY_CHECK with a mistake."""
    connection.cursor().execute("SELECT @@port")
    raise LookupError("a mistake")


def test_ready_check_that_breaks_is_raised_and_leaves_nothing_open(mariadb_pair: Pair) -> None:
    settings = {"READY_CHECK": f"{__name__}.breaks"}
    with engine([mysql_peer(node) for node in mariadb_pair], **settings) as connection:
        before = sockets()
        with pytest.raises(LookupError, match="a mistake"):
            connection.ensure_connection()
        assert_nobodys_fault(connection, before)


# Not the peer's fault


def assert_nobodys_fault(connection: Any, before: set[str]) -> None:
    assert connection.connection is None
    assert connection.peer is None
    assert sockets() <= before
    for peer in balancers["balanced"].peers.values():
        assert peer.connections == 0
        assert (state(peer.name).state, state(peer.name).failures) == ("closed", 0)


@pytest.mark.parametrize(
    "error",
    [ImproperlyConfigured("no"), ValueError("no"), KeyboardInterrupt(), SystemExit(1)],
    ids=lambda error: type(error).__name__,
)
def test_error_of_the_applications_own_is_raised_and_no_other_peer_is_tried(
    mariadb_pair: Pair, receive: Any, error: BaseException
) -> None:
    tried = []

    def receiver(connection: Any, **kwargs: Any) -> None:
        # Others may hold it: it is closed all the same.
        tried.append(connection.connection)
        raise error

    receive(connection_created, receiver)
    with engine([mysql_peer(node) for node in mariadb_pair]) as connection:
        before = sockets()
        with pytest.raises(type(error)) as raised:
            connection.ensure_connection()
        assert raised.value is error
        assert [bool(driver.open) for driver in tried] == [False]
        assert_nobodys_fault(connection, before)
        connection_created.disconnect(receiver)
        connection.ensure_connection()


def test_bad_options_of_postgresql_are_local(postgres: PostgreSQLNode) -> None:
    """So are libpq's, which it calls a ProgrammingError or an OperationalError."""
    peers = [postgres_peer(postgres)] * 2
    settings = {"PEER_ENGINE": POSTGRESQL, "OPTIONS": {"nonesuch": "1"}}
    with engine(peers, **settings) as connection:
        before = sockets()
        with pytest.raises(Exception, match="nonesuch"):
            connection.ensure_connection()
        assert_nobodys_fault(connection, before)


@pytest.mark.parametrize(
    ("host", "afterwards"), [("127.0.0.1", "peer"), ("no-such-host.invalid", "(2005, ")]
)
def test_no_descriptors_left(mariadb_pair: Pair, host: str, afterwards: str) -> None:
    """A process out of file descriptors blames no peer, nor when it cannot even ask for its name.

    When it has descriptors again it connects, or finds out that there is no such name.
    """
    script = """
        import os, resource, socket, sys
        import django, MySQLdb.connections
        # What is loaded from files when it is first asked for, as any process has it by then.
        try:
            socket.getaddrinfo({host!r}, None)
        except OSError:
            pass
        django.setup()
        from django.db import OperationalError
        from django_proxysql import balancers
        from tests.engine import engine
        with engine({peers!r}) as connection:
            balancers["balanced"]
            hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
            resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
            held = []
            try:
                while True:
                    held.append(os.open("/dev/null", os.O_RDONLY))
            except OSError:
                pass
            try:
                connection.ensure_connection()
            except OperationalError as exc:
                print(type(exc).__name__, exc.args[0])
            for descriptor in held:
                os.close(descriptor)
            print([(s.state, s.failures) for s in balancers["balanced"].snapshot()])
            try:
                connection.ensure_connection()
                print(connection.peer.name)
            except OperationalError as exc:
                print(exc)
    """
    peers = [mysql_peer(node, HOST=host) for node in mariadb_pair]
    lines = run_python(script.format(peers=peers, host=host)).stdout.splitlines()
    assert lines[0].split()[0] == "OperationalError"
    assert lines[1] == "[('closed', 0), ('closed', 0)]"
    assert afterwards in lines[2]


# Failures after the handshake


@pytest.mark.parametrize(
    ("pair", "packet"),
    [
        ("mariadb_pair", b"SET"),
        ("mariadb_pair", b"TRANSACTION"),
        ("mariadb_pair", b"SELECT 42"),
        ("postgres_pair", b"SELECT 42"),
    ],
)
def test_peer_that_dies_half_way_is_passed_by(
    pair: str,
    packet: bytes,
    request: pytest.FixtureRequest,
    fault_proxy: Callable[..., FaultProxy],
    receive: Any,
) -> None:
    def receiver(connection: Any, **kwargs: Any) -> None:
        with connection.cursor() as cursor:
            cursor.execute("SELECT 42")

    receive(connection_created, receiver)
    bad, good = request.getfixturevalue(pair)
    proxy = fault_proxy(bad)
    settings: dict[str, Any] = {"OPTIONS": {"isolation_level": "repeatable read"}}
    if pair == "postgres_pair":
        settings = {"PEER_ENGINE": POSTGRESQL}
    with first_then_second(proxy, good, **settings) as connection:
        before = sockets()
        proxy.cut_before(packet)
        assert connected_to(connection) == "peer1"
        assert (state().state, state().connections) == ("open", 0)
        assert state().fault in (Fault.UNREACHABLE, Fault.LOST)
        connection.close()
        # The proxy's own are in this process too.
        proxy.wait_until_idle()
        assert sockets() <= before


@pytest.mark.parametrize("error", [None, NotReady("no")], ids=["the driver's", "NotReady"])
def test_failing_receiver_of_the_only_peer(
    mariadb: Node, receive: Any, error: Exception | None
) -> None:
    """It leaves connection None, no socket, no count, and nothing open to those that hold it."""
    kept: list[Any] = []

    def receiver(connection: Any, **kwargs: Any) -> None:
        kept.append(connection.connection)
        if error is not None:
            raise error
        mariadb.kill()
        with connection.cursor() as cursor:
            cursor.execute("SELECT 42")

    receive(connection_created, receiver)
    with engine([mysql_peer(mariadb)]) as connection:
        before = sockets()
        with pytest.raises(NoPeerAvailable):
            connection.ensure_connection()
        assert connection.connection is None
        assert sockets() <= before
        assert [bool(driver.open) for driver in kept] == [False]
        assert (state().state, state().connections) == ("open", 0)


# What is said


def test_no_peer_available_under_django(mariadb_pair: Pair) -> None:
    """NoPeerAvailable names each peer, its address, error and trial, and is an OperationalError."""
    first, second = mariadb_pair
    clock = Clock()
    with first_then_second(*mariadb_pair, clock=clock, LAST_RESORT_INTERVAL=None) as connection:
        first.kill()
        connection.ensure_connection()
        connection.close()
        second.kill()
        clock.advance(18)
        with pytest.raises(OperationalError) as raised:
            connection.cursor()
        error = raised.value
        assert isinstance(error, django_proxysql.NoPeerAvailable)
        refused = "(2002, \"Can't connect to server on '127.0.0.1' (115)\")"
        assert str(error) == (
            "No peer of 'balanced' can be reached. "
            f"peer0 (127.0.0.1:{first.port}): circuit open, last error {refused}, "
            "next trial in 12 s; "
            f"peer1 (127.0.0.1:{second.port}): {refused}, tried just now."
        )
        again = pickle.loads(pickle.dumps(error))
        assert type(again) is type(error)
        assert str(again) == str(error)
        assert again.balancer == "balanced"


def test_passwords_are_nowhere(mariadb_pair: Pair, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    wrong = "tell-no-one"
    refusing = mysql_peer(mariadb_pair[0], PASSWORD=wrong)
    with first_then_second(refusing, mariadb_pair[1], PASSWORD="nor-this") as connection:
        connection.ensure_connection()
        connection.close()
        mariadb_pair[1].kill()
        with pytest.raises(OperationalError) as raised:
            connection.ensure_connection()
        balancer = balancers["balanced"]
        said = [
            caplog.text,
            str(raised.value),
            repr(raised.value),
            pickle.dumps(raised.value).decode("latin1"),
            repr(balancer),
            repr(balancer.config),
            repr(balancer.snapshot()),
            repr(balancers),
            repr(connection),
            *(repr((p, p.config, p.breaker, p.breaker.circuit)) for p in balancer.peers.values()),
        ]
    assert caplog.text
    for secret in (wrong, PASSWORD, "nor-this"):
        assert not [text for text in said if secret in text]


# Django's engine does not close what fails in its first PRAGMA, as newer versions of SQLite do.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_sqlite_peer_whose_path_is_gone(tmp_path: Path) -> None:
    """SQLite: a path that cannot be opened is UNREACHABLE; a file that is no database REFUSED."""
    good = sqlite_peer(tmp_path / "db")
    gone = sqlite_peer(tmp_path / "no" / "db")
    with first_then_second(gone, good, PEER_ENGINE=SQLITE) as connection:
        assert connected_to(connection) == "peer1"
        assert state().fault is Fault.UNREACHABLE
    (tmp_path / "text").write_text("no database, but long enough to be read as one " * 100)
    settings = {"PEER_ENGINE": SQLITE, "OPTIONS": {}}
    broken = sqlite_peer(tmp_path / "text")
    with first_then_second(broken, good, READY_CHECK=f"{__name__}.reads", **settings) as connection:
        assert connected_to(connection) == "peer1"
        assert state().fault is Fault.REFUSED
    gc.collect()


def reads(connection: Any) -> None:
    """Read something: a READY_CHECK for SQLite, which opens anything."""
    connection.execute("SELECT * FROM sqlite_master").fetchall()


def test_connect_while_connected(tmp_path: Path) -> None:
    """The old connection is left to its holder, as by the plain engine; it counts no more."""
    with engine([sqlite_peer(tmp_path / name) for name in "ab"], PEER_ENGINE=SQLITE) as connection:
        connection.ensure_connection()
        old = connection.connection
        connection.connect()
        try:
            assert connection.connection is not old
            assert old.execute("SELECT 42").fetchone() == (42,)
            peers = balancers[connection.alias].peers.values()
            assert sum(peer.connections for peer in peers) == 1
        finally:
            old.close()
