"""Looks at sockets, and what is set on them: on bare ones, on the drivers', on those to a host
that vanishes."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from django.db import OperationalError, connections, transaction

from django_proxysql.core.drivers.postgresql import PostgreSQL, _keepalive_parameters
from django_proxysql.core.events import ConnectFailed
from django_proxysql.core.sockets import keepalive, keepalive_options, limited, watch
from django_proxysql.registry import balancers
from tests.engine import MYSQL, POSTGRESQL, added, engine, mysql_peer
from tests.fakes import running, until
from tests.servers import DATABASE, PASSWORD, USER
from tests.servers.namespace import Host, host_for, why_not
from tests.site import until_seen, with_table

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux's options")
Pair = tuple[socket.socket, socket.socket]
OF_TCP = ("TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT", "TCP_USER_TIMEOUT")


@pytest.fixture(params=[socket.AF_INET, socket.AF_INET6])
def pair(request: Any) -> Iterator[Pair]:
    """Two ends of a TCP connection."""
    with socket.socket(request.param) as listening:
        listening.bind(("127.0.0.1" if request.param == socket.AF_INET else "::1", 0))
        listening.listen()
        with socket.create_connection(listening.getsockname()[:2]) as here:
            there, _ = listening.accept()
            with there:
                yield here, there


@contextlib.contextmanager
def default_timeout(seconds: float | None) -> Iterator[None]:
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(None)


def options_of(descriptor: int) -> dict[str, int]:
    """What is set on a socket, by Linux's names."""
    blocking = os.get_blocking(descriptor)
    with socket.socket(fileno=os.dup(descriptor)) as sock:
        os.set_blocking(descriptor, blocking)
        found = {"SO_KEEPALIVE": sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)}
        if sock.family != socket.AF_UNIX:
            for name in OF_TCP:
                found[name] = sock.getsockopt(socket.IPPROTO_TCP, getattr(socket, name))
        return found


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd" if os.path.isdir("/proc/self/fd") else "/dev/fd"))


class TestWatch:
    def test_quiet(self, pair: Pair) -> None:
        poll = watch(pair[0].fileno())
        assert not poll(0)
        pair[0].sendall(b"a question")
        assert not poll(0)

    @pytest.mark.parametrize("how", ["says", "close", "shutdown", "reset", "closed here"])
    def test_something_to_say(self, pair: Pair, how: str) -> None:
        here, there = pair
        poll = watch(here.fileno())
        if how == "says":
            there.sendall(b"farewell")
        elif how == "shutdown":
            there.shutdown(socket.SHUT_WR)
        elif how == "closed here":
            here.close()
        else:
            linger = struct.pack("ii", how == "reset", 0)
            there.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            there.close()
        assert poll(5_000)
        assert poll(0)

    def test_where_there_is_no_poll_or_no_descriptor(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert watch(None) is watch(-1) is None
        monkeypatch.setattr("django_proxysql.core.sockets._EVENTS", 0)
        with socket.socket() as sock:
            assert watch(sock.fileno()) is None


class TestKeepalive:
    @linux
    @pytest.mark.parametrize(
        ("seconds", "idle", "interval", "count", "timeout"),
        [
            (0.0004, 1, 1, 1, 1),
            (0.25, 1, 1, 1, 250),
            (1, 1, 1, 1, 1_000),
            (2, 1, 1, 1, 2_000),
            (2.5, 1, 1, 2, 2_500),
            (20, 10, 1, 10, 20_000),
            (300, 150, 15, 10, 300_000),
            (1e7, 32_767, 32_767, 127, 2**31 - 1),
        ],
    )
    def test_values(
        self, pair: Pair, seconds: float, idle: int, interval: int, count: int, timeout: int
    ) -> None:
        keepalive(pair[0].fileno(), seconds)
        assert options_of(pair[0].fileno()) == {
            "SO_KEEPALIVE": 1,
            "TCP_KEEPIDLE": idle,
            "TCP_KEEPINTVL": interval,
            "TCP_KEEPCNT": count,
            "TCP_USER_TIMEOUT": timeout,
        }

    @linux
    def test_a_probe_is_due_when_the_time_is_over(self, pair: Pair) -> None:
        """Linux gives a silent host up when a probe is due, one is unanswered, and
        TCP_USER_TIMEOUT is over."""
        for seconds in [*range(1, 130), 299.5, 600, 3_600, 7_200]:
            keepalive(pair[0].fileno(), seconds)
            found = options_of(pair[0].fileno())
            due, probes = found["TCP_KEEPIDLE"], 0
            while not probes or due * 1_000 < found["TCP_USER_TIMEOUT"]:
                due += found["TCP_KEEPINTVL"]
                probes += 1
            assert seconds <= due <= max(2, seconds * 1.05 + 1)
            # Where there is no TCP_USER_TIMEOUT, the number of probes says when.
            others = found["TCP_KEEPIDLE"] + found["TCP_KEEPCNT"] * found["TCP_KEEPINTVL"]
            assert seconds <= others <= max(2, seconds * 1.05 + 1)

    @linux
    @pytest.mark.parametrize("name", ["SO_KEEPALIVE", *OF_TCP])
    def test_what_the_driver_s_own_settings_say_stays(self, pair: Pair, name: str) -> None:
        before = options_of(pair[0].fileno())[name]
        keepalive(pair[0].fileno(), 30, frozenset({name}))
        found = options_of(pair[0].fileno())
        assert found.pop(name) == before
        assert all(found.values())

    @linux
    def test_says_when_silence_ends_it(self, pair: Pair) -> None:
        """The limit in force, whatever has set it; infinity where there is none."""
        descriptor = pair[0].fileno()
        before = options_of(descriptor)
        assert keepalive(descriptor, None) == float("inf")
        assert options_of(descriptor) == before
        assert keepalive(descriptor, 7) == 7
        pair[0].setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 2_500)
        assert keepalive(descriptor, 7, frozenset({"TCP_USER_TIMEOUT"})) == 2.5
        assert keepalive(descriptor, None) == 2.5

    @pytest.mark.parametrize("default", [None, 0, 5])
    @pytest.mark.parametrize("blocking", [True, False])
    def test_the_mode_stays_and_nothing_is_left_open_nor_closed(
        self, pair: Pair, default: float | None, blocking: bool
    ) -> None:
        pair[0].setblocking(blocking)
        before = open_descriptors()
        with default_timeout(default):
            keepalive(pair[0].fileno(), 20)
        assert os.get_blocking(pair[0].fileno()) is blocking
        assert open_descriptors() == before
        pair[0].sendall(b"x")
        assert pair[1].recv(1) == b"x"

    def test_the_mode_is_not_asked_for_where_nothing_changes_it(
        self, pair: Pair, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Each connect comes by here."""
        monkeypatch.delattr(os, "get_blocking")
        monkeypatch.delattr(os, "set_blocking")
        assert keepalive(pair[0].fileno(), 20) == 20

    @pytest.mark.parametrize("default", [None, 5])
    def test_unix_sockets(self, default: float | None) -> None:
        here, there = socket.socketpair(socket.AF_UNIX)
        with here, there:
            with default_timeout(default):
                keepalive(here.fileno(), 20)
            assert os.get_blocking(here.fileno())
            assert not here.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            poll = watch(here.fileno())
            assert not poll(0)

    def test_no_socket(self) -> None:
        reading, writing = os.pipe()
        before = open_descriptors()
        keepalive(reading, 20)
        assert open_descriptors() == before
        assert os.get_blocking(reading)
        os.close(reading)
        os.close(writing)
        for number in (reading, None, -1):
            keepalive(number, 20)

    def test_no_descriptor_left(self, pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
        """The connection works; it is not to fail for want of another number."""

        def fails(descriptor: int) -> int:
            raise OSError(errno.EMFILE, "Too many open files")

        monkeypatch.setattr(os, "dup", fails)
        keepalive(pair[0].fileno(), 20)

    @pytest.mark.parametrize("are_missing", [False, True])
    def test_options_that_are_refused(
        self, pair: Pair, monkeypatch: pytest.MonkeyPatch, are_missing: bool
    ) -> None:
        """Where the kernel knows none of them the connection works all the same."""
        for name in OF_TCP:
            if are_missing:
                monkeypatch.delattr(socket, name, raising=False)
            else:
                monkeypatch.setattr(socket, name, 9_999, raising=False)
        # It keeps what the platform has: here another one, and only for this test.
        keepalive_options.cache_clear()
        try:
            keepalive(pair[0].fileno(), 20)
        finally:
            keepalive_options.cache_clear()
        assert pair[0].getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)


# The drivers'

WAYS = ["mariadb", "mariadb_tls", "mariadb_unix", "postgres", "postgres_tls", "postgres_unix"]


@pytest.fixture(params=WAYS)
def way(request: Any) -> dict[str, Any]:
    """An entry of DATABASES that leads to a server in one of the ways there are."""
    name, _, kind = request.param.partition("_")
    server = request.getfixturevalue(request.param if kind == "tls" else name)
    entry = {**mysql_peer(server), "ENGINE": MYSQL if name == "mariadb" else POSTGRESQL}
    if kind == "tls":
        entry["OPTIONS"] = (
            {"ssl": {"ca": server.ca}}
            if name == "mariadb"
            else {"sslmode": "verify-ca", "sslrootcert": server.ca}
        )
    elif kind == "unix":
        entry["HOST"] = str(server.socket if name == "mariadb" else server.directory)
    return entry


@contextlib.contextmanager
def through_the_engine(entry: dict[str, Any], **settings: Any) -> Iterator[Any]:
    peer = {key: entry[key] for key in entry if key not in ("ENGINE", "OPTIONS")}
    settings = {"OPTIONS": entry.get("OPTIONS", {}), **settings}
    with engine([peer], PEER_ENGINE=entry["ENGINE"], **settings) as connection:
        connection.ensure_connection()
        yield connection


def answer(connection: Any, sql: str) -> Any:
    with connection.cursor() as cursor:
        cursor.execute(sql)
        return cursor.fetchone()[0]


def plainly(entry: dict[str, Any]) -> tuple[dict[str, int], bool]:
    """What is set on a connection of Django's own engine, and whether it blocks."""
    with added({"plain": entry}):
        connections["plain"].ensure_connection()
        descriptor = connections["plain"].connection.fileno()
        return options_of(descriptor), os.get_blocking(descriptor)


@linux
@pytest.mark.server
class TestDrivers:
    @pytest.mark.parametrize("seconds", [20, 2.5, 0.5])
    def test_values(self, way: dict[str, Any], seconds: float) -> None:
        settings = {"TCP_USER_TIMEOUT": seconds} if seconds != 20 else {}
        with through_the_engine(way, **settings) as connection:
            found = options_of(connection.connection.fileno())
            assert answer(connection, "SELECT 1") == 1
        if way["HOST"].startswith("/"):
            assert found == plainly(way)[0]
        else:
            assert found["SO_KEEPALIVE"] == 1
            assert found["TCP_USER_TIMEOUT"] == seconds * 1_000
            assert found["TCP_KEEPIDLE"] == {20: 10, 2.5: 1, 0.5: 1}[seconds]
            assert found["TCP_KEEPINTVL"] == 1
            assert found["TCP_KEEPCNT"] == {20: 10, 2.5: 2, 0.5: 1}[seconds]

    def test_none_leaves_it_alone(self, way: dict[str, Any]) -> None:
        with through_the_engine(way, TCP_USER_TIMEOUT=None) as connection:
            found = options_of(connection.connection.fileno())
        assert found == plainly(way)[0]
        assert not found.get("TCP_USER_TIMEOUT")

    @pytest.mark.parametrize("default", [None, 0.2])
    def test_the_mode_stays(self, way: dict[str, Any], default: float | None) -> None:
        blocking = plainly(way)[1]
        with default_timeout(default), through_the_engine(way) as connection:
            assert os.get_blocking(connection.connection.fileno()) is blocking
            sleep = "SLEEP" if connection.vendor == "mysql" else "pg_sleep"
            answer(connection, f"SELECT {sleep}(0.3)")
            assert answer(connection, f"SELECT REPEAT('x', {2**22})") == "x" * 2**22

    def test_idle_it_is_quiet_and_closed_it_is_gone(self, way: dict[str, Any]) -> None:
        with through_the_engine(way) as connection:
            poll = watch(connection.connection.fileno())
            assert answer(connection, "SELECT 1") == 1
            assert not poll(50)
            connection.close()
            before = open_descriptors()
            for _ in range(3):
                connection.ensure_connection()
                connection.close()
            assert open_descriptors() == before


# A host that vanishes

TIMEOUT = 2
#: Seconds until the host is back, which is before a loss is seen by TCP_USER_TIMEOUT's default.
AWAY_FOR = 15


class Away:
    """A balancer: the first peer's host can vanish, the second leads to the same server."""

    def __init__(self, server: Any, host: Host, connection: Any, plain: Any) -> None:
        self.server = server
        self.host = host
        self.connection = connection
        self.plain = plain
        balancer = balancers[connection.alias]
        self.first, self.second = balancer.peers.values()
        self.is_mysql = connection.vendor == "mysql"
        self.events: list[Any] = []
        balancer.add_listener(self.events.append)
        self.is_back = threading.Event()
        self.rescue = threading.Timer(AWAY_FOR, self.come_back)

    def vanish(self) -> None:
        """Have the first peer's host vanish, until a driver must have noticed.

        One that waits in vain cannot be interrupted, but by the answer.
        """
        self.host.vanish()
        self.rescue.start()

    def come_back(self) -> None:
        self.is_back.set()
        self.host.come_back()

    def sleep(self, connection: Any, seconds: int) -> Any:
        return answer(connection, f"SELECT {'SLEEP' if self.is_mysql else 'pg_sleep'}({seconds})")

    def sleepers(self) -> int:
        """How many sessions of the server's are asleep."""
        query = "information_schema.processlist WHERE info LIKE 'SELECT SLEEP%'"
        if not self.is_mysql:
            query = "pg_stat_activity WHERE wait_event = 'PgSleep'"
        return int(self.server.sql(f"SELECT count(*) FROM {query}"))

    def write(self) -> None:
        with self.connection.cursor() as cursor:
            cursor.execute("INSERT INTO app_token (value) VALUES (%s)", [str(time.monotonic())])

    def is_at_first(self) -> bool:
        return bool(self.connection.peer.address == self.first.address)

    def is_suspect(self) -> bool:
        circuit = self.first.breaker.circuit
        return circuit.state == "closed" and circuit.suspect

    def assert_none_was_tried_in_vain(self) -> None:
        assert not [event for event in self.events if type(event) is ConnectFailed]
        assert not self.is_back.is_set()


@pytest.fixture(params=["mariadb", "postgres"])
def away(request: Any) -> Iterator[Away]:
    reason = why_not()
    if reason:
        pytest.skip(reason)
    server = request.getfixturevalue(request.param)
    is_mysql = request.param == "mariadb"
    unix_socket = server.socket if is_mysql else Path(server.directory) / f".s.PGSQL.{server.port}"
    with contextlib.ExitStack() as stack:
        host = stack.enter_context(host_for(str(unix_socket)))
        kind = MYSQL if is_mysql else POSTGRESQL
        stack.enter_context(added({"plain": {**mysql_peer(host), "ENGINE": kind}}))
        connection = stack.enter_context(
            engine(
                [mysql_peer(host), mysql_peer(server, PRIORITY=1)],
                PEER_ENGINE=kind,
                TCP_USER_TIMEOUT=TIMEOUT,
                CONN_MAX_AGE=None,
            )
        )
        with_table(connections["plain"])
        connection.ensure_connection()
        made = Away(server, host, connection, connections["plain"])
        # What is lost before it was of any use counts as a failed connect.
        assert answer(connection, "SELECT 1") == 1
        assert made.is_at_first()
        yield made
        made.rescue.cancel()
        if made.rescue.ident is not None:
            made.rescue.join()
        host.come_back()


@contextlib.contextmanager
def fails_while_it_is_away(away: Away, since: Callable[[], float]) -> Iterator[None]:
    with pytest.raises(OperationalError):
        yield
    assert time.monotonic() - since() > TIMEOUT - 1
    assert not away.is_back.is_set()


@pytest.mark.server
class TestVanishedHost:
    def test_a_waiting_statement_fails(self, away: Away) -> None:
        """Nothing of it is left to be acknowledged: keepalive it is that notices."""
        control: list[Any] = []
        vanished = [0.0]

        def wait_plainly() -> None:
            # Django's own engine waits on, until its host is back.
            try:
                control.append(away.sleep(connections["plain"], TIMEOUT + 4))
            except Exception as exc:
                control.append(exc)
            connections["plain"].close()

        def vanish() -> None:
            until(lambda: away.sleepers() == 2)
            vanished[0] = time.monotonic()
            away.vanish()

        with running(wait_plainly):
            with running(vanish), fails_while_it_is_away(away, lambda: vanished[0]):
                away.sleep(away.connection, AWAY_FOR)
            assert away.is_suspect()
            assert not control
            # The next one goes to the peer that is not suspect, at once.
            assert answer(away.connection, "SELECT 1") == 1
            assert not away.is_at_first()
            away.assert_none_was_tried_in_vain()
            away.come_back()
        assert control in ([0], [""])

    @pytest.mark.parametrize("what", ["read", "write"])
    def test_a_statement_that_is_sent_into_the_void_fails(self, away: Away, what: str) -> None:
        """It is not run again: the server may be at it still."""
        away.vanish()
        begun = time.monotonic()
        with fails_while_it_is_away(away, lambda: begun):
            answer(away.connection, "SELECT 1") if what == "read" else away.write()
        assert away.is_suspect()
        away.write()
        assert not away.is_at_first()

    def test_a_transaction(self, away: Away) -> None:
        """Where its beginning is a statement of its own, it begins anew; elsewhere it fails."""
        away.vanish()
        begun = time.monotonic()
        fails = (
            contextlib.nullcontext()
            if away.is_mysql
            else fails_while_it_is_away(away, lambda: begun)
        )
        with fails, transaction.atomic(away.connection.alias):
            away.write()
            away.write()
        assert not away.is_back.is_set()
        assert away.is_suspect()
        away.write()
        assert not away.is_at_first()
        assert answer(away.connection, "SELECT COUNT(*) FROM app_token") == 1 + 2 * away.is_mysql

    def test_an_idle_connection_is_replaced(self, away: Away) -> None:
        away.vanish()
        until_seen(away.connection.connection)
        away.write()
        assert not away.is_at_first()
        assert away.is_suspect()
        away.assert_none_was_tried_in_vain()


@linux
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"tcp_user_timeout": 5_000}, {"TCP_USER_TIMEOUT": 5_000, "TCP_KEEPIDLE": 10}),
        ({"tcp_user_timeout": "60000"}, {"TCP_USER_TIMEOUT": 60_000, "TCP_KEEPIDLE": 10}),
        ({"keepalives_idle": 77}, {"TCP_USER_TIMEOUT": 20_000, "TCP_KEEPIDLE": 77}),
        ({"keepalives_interval": 9}, {"TCP_KEEPINTVL": 9, "TCP_KEEPIDLE": 10}),
        ({"keepalives_count": 3}, {"TCP_KEEPCNT": 3, "TCP_KEEPIDLE": 10}),
        ({"keepalives": 0}, {"SO_KEEPALIVE": 0, "TCP_USER_TIMEOUT": 20_000}),
        ({"keepalives": 1}, {"SO_KEEPALIVE": 1, "TCP_USER_TIMEOUT": 20_000}),
    ],
)
@pytest.mark.parametrize("from_a_file", [False, True])
def test_libpq_s_own_options_go_first(
    postgres: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    expected: dict[str, int],
    from_a_file: bool,
) -> None:
    """What OPTIONS, or a service file, say of libpq's socket is not overridden by us."""
    if from_a_file:
        lines = [f"{name}={value}" for name, value in options.items()]
        (tmp_path / "services").write_text("\n".join(["[shop]", *lines, ""]))
        monkeypatch.setenv("PGSERVICEFILE", str(tmp_path / "services"))
        options = {"service": "shop"}
    with engine([mysql_peer(postgres, OPTIONS=options)], PEER_ENGINE=POSTGRESQL) as connection:
        connection.ensure_connection()
        found = options_of(connection.connection.fileno())
        assert {name: found[name] for name in expected} == expected
        limit = expected.get("TCP_USER_TIMEOUT", 20_000) / 1_000
        assert connection._session.read_timeout == min(limit, 20)


@linux
@pytest.mark.server
@pytest.mark.parametrize("driver", ["psycopg", "psycopg2"])
def test_libpq_does_the_same_by_its_parameters(postgres: Any, driver: str) -> None:
    connect = pytest.importorskip(driver).connect
    params = {"host": postgres.host, "port": postgres.port, "dbname": DATABASE}
    params.update(user=USER, password=PASSWORD)
    with contextlib.closing(connect(**params)) as plain:
        keepalive(plain.fileno(), 20)
        given = PostgreSQL().keepalive_options(params, 20)
        with contextlib.closing(connect(**params, **given)) as connection:
            assert options_of(connection.fileno()) == options_of(plain.fileno())


@linux
@pytest.mark.server
def test_libpq_sets_them_and_nothing_is_set_by_hand(postgres: Any) -> None:
    """Each of the socket's options is left to libpq, which has them as parameters of a connect."""
    by_hand = mock.patch("django_proxysql.core.sockets.keepalive", side_effect=keepalive)
    peers = [mysql_peer(postgres)]
    with engine(peers, PEER_ENGINE=POSTGRESQL) as connection, by_hand as called:
        connection.ensure_connection()
    ((_, seconds, left), _) = called.call_args
    assert seconds == 20
    assert left >= {name for name, *_ in keepalive_options(20)}


def test_libpq_before_12_is_given_what_it_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules[PostgreSQL.__module__]
    monkeypatch.setattr(module, "_libpq_version", lambda: 110_022)
    _keepalive_parameters.cache_clear()
    try:
        known = PostgreSQL().keepalive_options({"keepalives_count": 3}, 20)
    finally:
        _keepalive_parameters.cache_clear()
    assert known == {"keepalives_idle": 10, "keepalives_interval": 1}


class TestLimited:
    """A block that waits for an answer, and for how long."""

    @pytest.mark.parametrize("seconds", [0.05, 0, -0.5, -1])
    def test_wait_ends_with_the_time(self, pair: Pair, seconds: float) -> None:
        """Also where none is left."""
        here, _ = pair
        here.settimeout(5)
        with limited(here.fileno(), seconds):
            assert here.recv(1) == b""

    @pytest.mark.parametrize("default", [None, 5.0])
    def test_block_that_ends_in_time_leaves_the_socket_as_it_is(
        self, pair: Pair, default: float | None
    ) -> None:
        here, there = pair
        blocking = os.get_blocking(here.fileno())
        with default_timeout(default), limited(here.fileno(), 60):
            pass
        there.sendall(b"x")
        assert here.recv(1) == b"x"
        assert os.get_blocking(here.fileno()) is blocking

    def test_number_that_is_anothers_by_then_is_left_alone(self, pair: Pair) -> None:
        """The driver closes its descriptor, and another connection gets the number."""
        here, there = pair
        number = here.fileno()
        bystander, other = socket.socketpair()
        with other, bystander, limited(number, 0.05):
            os.dup2(bystander.fileno(), number)
            # The connection itself is shut down.
            assert there.recv(1) == b""
            other.sendall(b"x")
            assert bystander.recv(1) == b"x"

    def test_without_a_descriptor(self) -> None:
        with limited(None, 0):
            pass

    def test_without_a_thread(self, pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
        def start(*args: Any) -> None:
            raise RuntimeError("can't start new thread")

        monkeypatch.setattr("_thread.start_new_thread", start)
        here, there = pair
        with limited(here.fileno(), 0):
            there.sendall(b"x")
            assert here.recv(1) == b"x"
