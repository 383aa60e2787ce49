"""What an established connection's errors tell the circuits."""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from django.db import OperationalError, close_old_connections, connections, transaction
from django.db.utils import DataError, Error

from django_proxysql import balancers, retrying_atomic
from django_proxysql.core.events import CircuitClosed, CircuitOpened
from tests.engine import POSTGRESQL, Clock, engine, mysql_peer
from tests.fakes import in_thread, running, until
from tests.site import Site, site, with_table
from tests.stories import tell, told


def reconnect(connection: Any) -> None:
    connection.close()
    connection.ensure_connection()


def refused_by(here: Site, dead: Any) -> None:
    """Connect to a peer that refuses: its circuit opens."""
    here.connection.close()
    with here.balancer.pinned(dead), pytest.raises(OperationalError):
        here.connection.ensure_connection()
    assert dead.breaker.current_state == "open"


def opened(here: Site) -> list[CircuitOpened]:
    return [event for event in here.events if type(event) is CircuitOpened]


SLEEP = "running { !SELECT SLEEP(3) FROM (SELECT 1) AS t }"

STORIES = {
    "one kill in flight opens no circuit": (
        "all: read; cut after; !write one; circuit suspect; opened 0; write two"
    ),
    # A suspect peer comes last, and is never excluded.
    "single peer stays in use": (
        "mariadb: kill; write one; kill; write two; kill; write three; written one two three; "
        "opened 0",
        {"number": 1},
    ),
    # Whether it is dead the next connect finds out.
    "single peer that drops a first statement stays in use": (
        "mariadb: connect; cut before; !write one; opened 0; write two; written two",
        {"number": 1},
    ),
    "peer that drops connections at their first statement fails": (
        "all: connect; cut before; SELECT 1; circuit open"
    ),
    # The trial has closed the circuit; its own connection is of no use: that counts.
    "trial whose connection is lost at once opens its circuit again": (
        "all: open; idle 60; connect; circuit closed; cut before; !write one; circuit open"
    ),
    # CONN_HEALTH_CHECKS asks is_usable().
    "what is_usable() finds counts for the peer": (
        "all: read; usable; kill; unusable; circuit suspect; SELECT 1"
    ),
    "health check is replaced by the look at the socket": (
        "mariadb: write one; request_ends; kill; write two; written one two",
        {"CONN_HEALTH_CHECKS": True},
    ),
    # Silence is no loss: the statement may be running still. It counts for nothing.
    "time-out is raised": (
        f"mariadb: SELECT 1; {SLEEP}; replayed 0; circuit suspect; opened 0; SELECT 1",
        {"OPTIONS": {"read_timeout": 1}},
    ),
    "time-out of a read that could be run again is raised": (
        "mariadb: SELECT 1; freeze; running { !SELECT 42 }; replayed 0",
        {"OPTIONS": {"read_timeout": 1}},
    ),
    **{
        f"slow report is no loss, wherever it is run first: {option}": (
            f"mariadb: connect; {SLEEP}; connect; {SLEEP}; opened 0",
            {"OPTIONS": {"read_timeout": 1, option: 1}},
        )
        for option in ("read_timeout", "write_timeout")
    },
}


@told(STORIES)
def test_story(request: Any, server: str, settings: dict[str, Any], text: str) -> None:
    tell(request, server, settings, text)


class TestSuspects:
    def test_one_kill(self, here: Site, caplog: pytest.LogCaptureFixture) -> None:
        """One connection that was killed takes no healthy peer out, and leaves no trace."""
        here.read()
        peer = here.connection.peer
        here.kill()
        here.idle()
        here.read()
        assert peer.breaker.circuit.suspect
        assert peer.breaker.current_state == "closed"
        assert here.connection.peer is not peer
        # The next new connection there is a trial, and clears it.
        caplog.set_level(logging.INFO, "django_proxysql")
        caplog.clear()
        with here.balancer.pinned(peer):
            here.connection.close()
            here.read()
        assert not peer.breaker.circuit.suspect
        assert not opened(here)
        assert caplog.records == []

    def test_dead_after_one_refused_connect(self, here: Site) -> None:
        here.read()
        dead = here.connection.peer
        proxy = here.here
        proxy.refuse()
        here.cut_idle()
        here.idle()
        here.read()
        assert here.connection.peer is not dead
        assert dead.breaker.circuit.suspect
        refused_by(here, dead)
        assert len(opened(here)) == 1


@contextlib.contextmanager
def poisoned(here: Site, matching: bytes) -> Iterator[None]:
    """Have each statement that contains ``matching`` end its connection, wherever it runs."""
    for proxy in here.proxies:
        for _ in range(20):
            proxy.cut_before(matching)
    yield
    for proxy in here.proxies:
        proxy.disarm()


def states(here: Site) -> list[str]:
    return sorted(peer.breaker.current_state for peer in here.balancer.peers.values())


class TestStatementsOwnFault:
    """One statement, or one caller, never takes out a second peer."""

    @pytest.fixture(params=["mariadb", "postgres"])
    def here(self, request: pytest.FixtureRequest, fault_proxy: Any) -> Iterator[Site]:
        """Without TLS: a proxy can read its packets. It has three peers: the last stays."""
        with site(request.getfixturevalue(request.param), fault_proxy, number=3) as made:
            yield made

    @pytest.mark.parametrize("served", [False, True], ids=["first", "served"])
    @pytest.mark.parametrize("in_block", [False, True], ids=["", "block"])
    def test_read_that_ends_its_connection(self, here: Site, served: bool, in_block: bool) -> None:
        """Run again on the other peer it is lost again; the others are served all the same."""
        with poisoned(here, b"poison"):
            for _ in range(4):
                reconnect(here.connection)
                if served:
                    here.sql("SELECT 1")
                with (
                    pytest.raises(OperationalError),
                    transaction.atomic(here.connection.alias)
                    if in_block
                    else contextlib.nullcontext(),
                ):
                    here.sql("SELECT 'poison'")
                assert states(here).count("closed") >= 1
                assert here.sql("SELECT 1") == [(1,)]
        assert len(opened(here)) <= 1

    @pytest.mark.parametrize("many", [False, True], ids=["execute", "executemany"])
    def test_tasks_with_one_statement(self, here: Site, many: bool) -> None:
        """Each task has a thread and a connection of its own, and rows of its own."""
        alias = here.connection.alias

        def task() -> None:
            rows = [(f"poison {number}",) for number in range(3)]
            try:
                with connections[alias].cursor() as cursor, pytest.raises(OperationalError):
                    run = cursor.executemany if many else cursor.execute
                    run("INSERT INTO app_token (value) VALUES (%s)", rows if many else rows[0])
            finally:
                connections[alias].close()

        with poisoned(here, b"poison"):
            for _ in range(6):
                in_thread(task)
                # Both peers are asked in turn, a suspect one too.
                here.idle(2)
        assert len(opened(here)) == 1
        assert here.written() == []

    @pytest.mark.parametrize(
        ("value", "rows", "circuits"),
        [
            # A loop of one thread that tries again and again, with another text each time.
            ("poison {}", 1, 1),
            # It may be over max_allowed_packet: the loss counts against no peer.
            ("poison {}" + 300_000 * "x", 1, 0),
            # The rows together are the packet.
            ("poison {}" + 100 * "x", 4000, 0),
        ],
        ids=["many statements", "large ones", "large executemany()"],
    )
    def test_one_caller(self, here: Site, value: str, rows: int, circuits: int) -> None:
        with poisoned(here, b"poison"):
            for number in range(5):
                close_old_connections()
                here.connection.close()
                text = f"INSERT INTO app_token (value) VALUES (concat('{number}', %s))"
                with (
                    here.connection.cursor() as cursor,
                    pytest.raises((OperationalError, DataError)),
                ):
                    if rows == 1:
                        cursor.execute(text, [value.format(number)])
                    else:
                        cursor.executemany(text, [(value.format(number),)] * rows)
                here.idle(2)
        assert len(opened(here)) == circuits

    def test_retrying_atomic(self, here: Site) -> None:

        @retrying_atomic(using=here.connection.alias, attempts=4)
        def block() -> None:
            here.sql("SELECT 'poison' FOR UPDATE")

        here.connection.close()
        with poisoned(here, b"poison"), pytest.raises(OperationalError):
            block()
        assert len(opened(here)) <= 1
        assert here.sql("SELECT 1") == [(1,)]

    def test_packet_over_the_limit(self, mariadb: Any, fault_proxy: Any) -> None:
        """1153, 2006 or 2013, as it happens: the server hangs up, and is well."""
        before = mariadb.sql("SELECT @@global.max_allowed_packet").strip()
        mariadb.set_global("max_allowed_packet", 1024 * 1024)
        try:
            with site(mariadb, fault_proxy) as here:
                for size in (1_100_000, 1_500_000, 5_000_000):
                    for served in (False, True):
                        reconnect(here.connection)
                        if served:
                            here.sql("SELECT 1")
                        with pytest.raises(OperationalError):
                            here.sql("SELECT length(%s)", ["x" * size])
                        assert here.sql("SELECT 1") == [(1,)]
                assert not opened(here)
        finally:
            mariadb.set_global("max_allowed_packet", before)

    def test_refused_packet_ends_the_connection(self, mariadb: Any, fault_proxy: Any) -> None:
        with site(mariadb, fault_proxy) as here:
            driver = here.connection.connection
            theirs = here.connection.Database.OperationalError(1153, "Got a packet")
            with pytest.raises(OperationalError), here.connection.wrap_database_errors:
                raise theirs
            assert here.session.dead
            here.write("one")
            assert here.connection.connection is not driver
            assert not here.losses()
            assert not here.session.peer.breaker.circuit.suspect

    def test_error_of_the_application_before(self, here: Site) -> None:
        """A statement that has failed is not the one that loses its connection later."""
        reconnect(here.connection)
        with pytest.raises(Error):
            here.sql("SELECT nonesuch")
        assert here.session.sending is None
        here.sql("SELECT 1")
        assert here.session.sending is None

    def test_peer_that_dies_under_its_first_statement(self, here: Site) -> None:
        """Whatever the statement has done before: a peer that is dead is found at once."""
        dead = here.connection.peer
        here.balancer.group.losses.note("another", "SELECT 1", -1)
        here.connection.close()
        with here.balancer.pinned(dead):
            here.connection.ensure_connection()
        proxy = here.here
        proxy.cut_before(b"SELECT 1")
        proxy.refuse()
        assert here.sql("SELECT 1") == [(1,)]
        assert here.connection.peer is not dead
        refused_by(here, dead)


def with_tables(connection: Any) -> None:
    """Leave an empty table ``app_token`` on each peer."""
    balancer = balancers[connection.alias]
    for peer in balancer.peers.values():
        with balancer.pinned(peer):
            connection.close()
            with_table(connection)


class TestReadOnly:
    """A server that has become read-only (a failover's old writer)."""

    @pytest.fixture(params=["mariadb_pair"])
    def pair(self, request: pytest.FixtureRequest) -> Iterator[Any]:
        nodes, clock = request.getfixturevalue(request.param), Clock()
        settings = {"clock": clock, "READY_CHECK": "writable", "CONN_MAX_AGE": None}
        if request.param == "postgres_pair":
            settings["PEER_ENGINE"] = POSTGRESQL
        with engine([mysql_peer(node) for node in nodes], **settings) as connection:  # type: ignore[arg-type]
            with_tables(connection)
            reconnect(connection)
            yield connection, clock, dict(zip(("peer0", "peer1"), nodes))

    def make_read_only(self, connection: Any, nodes: Any) -> None:
        node, driver = nodes[connection.peer.name], connection.connection
        if connection.vendor == "mysql":
            node.set_global("read_only", 1)
            return
        node.set_global("default_transaction_read_only = on")
        # Told to reload its settings, each session does so in its own time.
        said = "SHOW default_transaction_read_only"
        until(lambda: driver.execute(said).fetchone() == ("on",))

    @pytest.mark.parametrize("pair", ["mariadb_pair", "postgres_pair"], indirect=True)
    @pytest.mark.parametrize("in_block", [False, True])
    def test_write_goes_elsewhere(self, pair: Any, in_block: bool) -> None:
        """The refusal proves that it did not run: it is run where it can be."""
        connection, clock, nodes = pair
        old = connection.peer
        self.make_read_only(connection, nodes)
        with transaction.atomic(connection.alias) if in_block else contextlib.nullcontext():
            self.write(connection, "one")
            self.write(connection, "two")
        assert connection.peer is not old
        assert old.breaker.current_state == "open"
        assert old.breaker.circuit.question == "writable"
        with connection.cursor() as cursor:
            cursor.execute("SELECT value FROM app_token ORDER BY id")
            assert [value for (value,) in cursor.fetchall()] == ["one", "two"]
        if connection.vendor == "mysql":
            # Its trials ask the same question, and are answered the same.
            clock.advance(31)
            reconnect(connection)
            assert old.breaker.current_state == "open"
            nodes[old.name].set_global("read_only", 0)
            clock.advance(62)
            reconnect(connection)
            assert old.breaker.current_state == "closed"

    def write(self, connection: Any, value: str) -> None:
        with connection.cursor() as cursor:
            cursor.execute("INSERT INTO app_token (value) VALUES (%s)", [value])

    def test_second_statement_is_raised(self, pair: Any) -> None:
        connection, _, nodes = pair
        old = connection.peer
        with pytest.raises(Error), transaction.atomic(connection.alias):
            self.write(connection, "one")
            nodes[old.name].set_global("read_only", 1)
            self.write(connection, "two")
        assert old.breaker.current_state == "open"
        self.write(connection, "three")
        assert connection.peer is not old

    @pytest.mark.parametrize("pair", ["mariadb_pair", "postgres_pair"], indirect=True)
    def test_the_applications_own(self, pair: Any) -> None:
        """SET TRANSACTION READ ONLY is refused by 1792 and 25006; no peer's fault."""
        connection, _, _ = pair
        old = connection.peer
        is_mysql = connection.vendor == "mysql"
        with connection.cursor() as cursor:
            cursor.execute(
                "SET SESSION TRANSACTION READ ONLY"
                if is_mysql
                else "SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY"
            )
        with pytest.raises(Error), transaction.atomic(connection.alias):
            self.write(connection, "one")
        assert old.breaker.current_state == "closed"

    def test_without_the_ready_check(self, mariadb_pair: Any) -> None:
        """Peers that were never asked to be writable: the refusal is the application's."""
        with engine([mysql_peer(node) for node in mariadb_pair]) as connection:
            with_tables(connection)
            node = mariadb_pair[int(connection.peer.name[-1])]
            node.set_global("read_only", 1)
            with pytest.raises(OperationalError, match="read-only"):
                self.write(connection, "one")
            assert connection.peer.breaker.current_state == "closed"


@pytest.mark.parametrize("state", ["08006", "57P01", "57P03"])
def test_a_foreign_server_that_is_down_takes_no_peer_out(postgres_pair: Any, state: str) -> None:
    """postgres_fdw and dblink raise these, of a session that is another one."""
    peers = [mysql_peer(node) for node in postgres_pair]
    with engine(peers, PEER_ENGINE=POSTGRESQL) as connection, connection.cursor() as cursor:
        session = connection.connection.info.backend_pid
        with pytest.raises(OperationalError, match="foreign"):
            cursor.execute(f"DO $$ BEGIN RAISE 'foreign' USING ERRCODE = '{state}'; END $$")
        cursor.execute("SELECT pg_backend_pid()")
        assert cursor.fetchone() == (session,)
        assert connection.peer.breaker.is_available


class TestGalera:
    """A node cut off from its cluster connects, answers pings, and can do nothing."""

    @pytest.fixture(params=[None, "galera"], ids=["", "ready_check"])
    def cluster(self, galera: Any, request: Any) -> Iterator[Any]:
        clock = Clock()
        peers = [mysql_peer(node) for node in galera]
        settings = {"clock": clock, "CHECK_INTERVAL": 30, "CONN_MAX_AGE": None}
        with engine(peers, READY_CHECK=request.param, **settings) as connection:  # type: ignore[arg-type]
            with_table(connection)
            yield connection, clock, galera

    def test_cut_off(self, cluster: Any, caplog: pytest.LogCaptureFixture) -> None:
        """A burst from many threads opens the circuit once; no caller sees an error."""
        connection, clock, galera = cluster
        alias = connection.alias
        with connection.cursor() as cursor:
            cursor.execute("INSERT INTO app_token (value) VALUES ('one')")
        balancer = connection._registered().balancer
        bad = balancer.peers["peer2"]
        events: list[Any] = []
        balancer.add_listener(events.append)
        ready, go = threading.Barrier(9), threading.Event()
        led_to: list[Any] = []

        def work(number: int) -> None:
            wrapper = connections[alias]
            try:
                with balancer.pinned(bad):
                    wrapper.ensure_connection()
                ready.wait(60)
                assert go.wait(60)
                with wrapper.cursor() as cursor:
                    if number % 2:
                        cursor.execute("SELECT count(*) FROM app_token")
                    else:
                        with transaction.atomic(alias):
                            cursor.execute(f"INSERT INTO app_token (value) VALUES ('w{number}')")
                led_to.append(wrapper.peer)
            finally:
                wrapper.close()

        with running(*[functools.partial(work, number) for number in range(8)]):
            ready.wait(60)
            galera.isolate(galera[2])
            caplog.set_level(logging.WARNING, "django_proxysql")
            go.set()
        assert len(led_to) == 8
        assert bad not in led_to
        assert len([event for event in events if type(event) is CircuitOpened]) == 1
        lines = [record.getMessage() for record in caplog.records]
        assert len([line for line in lines if "opened" in line]) == 1
        # It connects, and would answer SELECT 1: a trial asks what it failed at.
        clock.advance(40)
        reconnect(connection)
        assert bad.breaker.current_state == "open"
        galera.rejoin(galera[2])
        clock.advance(40)
        reconnect(connection)
        assert bad.breaker.current_state == "closed"
        assert [type(event) for event in events].count(CircuitClosed) == 1
        with connection.cursor() as cursor:
            cursor.execute("SELECT value FROM app_token ORDER BY value")
            written = [value for (value,) in cursor.fetchall()]
        assert written == ["one", "w0", "w2", "w4", "w6"]


class TestSuspectsComeBack:
    def test_after_a_second(self, here: Site) -> None:
        """Where others take all new connections a suspect is still tried, in its turn."""
        here.read()
        doubted = here.connection.peer
        here.kill()
        here.idle()
        here.read()
        assert doubted.breaker.circuit.suspect
        reconnect(here.connection)
        assert here.connection.peer is not doubted
        here.clock.advance(1.1)
        reconnect(here.connection)
        assert here.connection.peer is doubted
        assert not doubted.breaker.circuit.suspect

    def test_the_oldest_doubt_first(self, here: Site) -> None:
        """The peer that was lost just now is the likeliest to be dead."""
        first, second = here.balancer.peers.values()
        for older, newer in ((first, second), (second, first)):
            older.breaker.suspect("then")
            here.clock.advance(0.1)
            newer.breaker.suspect("now")
            reconnect(here.connection)
            assert here.connection.peer is older
            newer.breaker.close()


class TestListeners:
    """A listener may ask the database that its event is about."""

    @pytest.mark.parametrize("when", ["answer lost", "idle"])
    @pytest.mark.parametrize("in_block", [False, True])
    def test_that_asks_leaves_no_connection_behind(
        self, here: Site, when: str, in_block: bool
    ) -> None:
        """Told of a loss, of a replacement, of a circuit: whatever it asks, one session is left."""
        here.sql("SELECT 1")
        before = here.sessions()
        busy: list[bool] = []
        answers: list[Any] = []

        def listen(event: Any) -> None:
            if not busy:
                busy.append(True)
                try:
                    answers.append(here.sql("SELECT 7"))
                finally:
                    busy.clear()

        here.balancer.add_listener(listen)
        try:
            with transaction.atomic("balanced") if in_block else contextlib.nullcontext():
                if when == "idle":
                    here.idle()
                    here.cut_idle()
                else:
                    here.cut("after")
                with contextlib.suppress(OperationalError):
                    here.sql("SELECT 42")
        except OperationalError:
            pass
        finally:
            here.balancer.remove_listener(listen)
        assert [(7,)] in answers
        assert here.sql("SELECT 43") == [(43,)]
        until(lambda: here.sessions() == before)
        here.connection.close()
        until(lambda: here.sessions() == before - 1)
        assert sum(state.connections for state in here.balancer.snapshot()) == 0
