"""Connections of Django's threads and processes, spread over peers and watched by circuits."""

from __future__ import annotations

import collections
import gc
import logging
import pathlib
import sys
import threading
from collections.abc import Callable
from typing import Any
from unittest import mock

import MySQLdb
import pybreaker
import pytest
from django.core.exceptions import ImproperlyConfigured
from django.db import OperationalError, connections, transaction

from django_proxysql import Fault, balancers
from tests.children import in_child
from tests.engine import SQLITE, Clock, engine, mysql_peer, sqlite_peer
from tests.fakes import until
from tests.servers.mariadb import Node
from tests.test_connecting import first_then_second, state

Pair = tuple[Node, Node]


def threads(count: int, work: Callable[[], Any]) -> list[Any]:
    """Run ``work`` in ``count`` threads at once; return what each returned or raised."""
    results: list[Any] = []
    together = threading.Barrier(count)

    def run() -> None:
        together.wait(30)
        try:
            results.append(work())
        except BaseException as exc:
            results.append(exc)
        finally:
            connections.close_all()

    started = [threading.Thread(target=run) for _ in range(count)]
    for thread in started:
        thread.start()
    for thread in started:
        thread.join(60)
    return results


def connected_to() -> str:
    """Connect anew; return the peer's name."""
    connection: Any = connections["balanced"]
    connection.close()
    connection.ensure_connection()
    return str(connection.peer.name)


def sqlite_peers(folder: pathlib.Path, *settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Return peers that are paths to one database, each with its own settings."""
    for number in range(1, len(settings)):
        (folder / str(number)).symlink_to(folder / "0")
    return [sqlite_peer(folder / str(n), **given) for n, given in enumerate(settings)]


# Strategies


@pytest.fixture
def shares(tmp_path: pathlib.Path) -> Callable[..., dict[str, int]]:
    """``shares([{}, {"WEIGHT": 2}], count=300, STRATEGY=…)`` counts connections to each peer."""

    def count_them(
        peers: list[dict[str, Any]], count: int = 300, **settings: Any
    ) -> dict[str, int]:
        with engine(sqlite_peers(tmp_path, *peers), PEER_ENGINE=SQLITE, **settings):
            return dict(collections.Counter(connected_to() for _ in range(count)))

    return count_them


def test_random_is_the_default(shares: Callable[..., dict[str, int]]) -> None:
    """Connections go to peers by chance, within five standard deviations of their weights."""
    counts = shares([{}, {}, {"WEIGHT": 2}], 1000)
    for name, share in (("peer0", 0.25), ("peer1", 0.25), ("peer2", 0.5)):
        deviation = (1000 * share * (1 - share)) ** 0.5
        assert abs(counts[name] - 1000 * share) < 5 * deviation


def test_round_robin(shares: Callable[..., dict[str, int]]) -> None:
    """In turn, exactly."""
    assert shares([{}, {}, {}], STRATEGY="round_robin") == dict.fromkeys(
        ("peer0", "peer1", "peer2"), 100
    )


def test_round_robin_by_weight(shares: Callable[..., dict[str, int]]) -> None:
    """In turn, by weight."""
    counts = shares([{}, {"WEIGHT": 2}], STRATEGY="round_robin")
    assert counts == {"peer0": 100, "peer1": 200}


def test_tiers(shares: Callable[..., dict[str, int]]) -> None:
    """A tier is used only when no peer of a lower number is available."""
    tier = {"PRIORITY": 1}
    counts = shares([{"PRIORITY": 2}, tier, {"NAME": "/nowhere/db"}, tier], STRATEGY="round_robin")
    assert counts == {"peer1": 150, "peer3": 150}


class Last:
    """A strategy of a user's own: the last peer first."""

    def order(self, peers: Any) -> Any:
        return reversed(peers)


def test_strategy_of_ones_own(shares: Callable[..., dict[str, int]]) -> None:
    """STRATEGY as a dotted path to a class."""
    assert shares([{}, {}], 5, STRATEGY=f"{__name__}.Last") == {"peer1": 5}


def test_least_connections(mariadb_pair: Pair) -> None:
    """Connections go where this process holds fewest, whatever became of their threads."""
    peers = [mysql_peer(node) for node in mariadb_pair]
    with engine(peers, STRATEGY="least_connections") as connection:
        balancer = balancers["balanced"]

        def held() -> list[int]:
            return [peer.connections for peer in balancer.peers.values()]

        # Kept alive with their connections by what outlives their threads.
        kept: list[Any] = []

        def connect_and_die() -> None:
            wrapper: Any = connections["balanced"]
            wrapper.ensure_connection()
            kept.append(wrapper)
            assert sum(held()) == 1

        for _ in range(10):
            thread = threading.Thread(target=connect_and_die)
            thread.start()
            thread.join()
            until(lambda: held() == [0, 0])
        assert len(kept) == 10
        # Those that live are counted, and spread evenly.
        wrappers = [connection.copy() for _ in range(10)]
        for wrapper in wrappers:
            wrapper.ensure_connection()
        assert held() == [5, 5]
        for wrapper in wrappers:
            if wrapper.peer.name == "peer0":
                wrapper.close()
        assert held() == [0, 5]
        assert [connected_to() for _ in range(5)] == ["peer0"] * 5
        # One that is dropped without close() counts no longer either.
        del wrappers, wrapper
        connection.close()
        gc.collect()
        # In a thread of the interpreter's choice.
        until(lambda: held() == [0, 0])
        for wrapper in kept:
            wrapper.inc_thread_sharing()


# Crowds


def test_burst_of_failures_is_one_line(
    mariadb_pair: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    """However many threads meet a peer's failure at once, it is one line; each is served."""
    caplog.set_level(logging.INFO, "django_proxysql")
    mariadb_pair[0].kill()
    peers = [mysql_peer(node) for node in mariadb_pair]
    with first_then_second(*peers):
        assert threads(32, connected_to) == ["peer1"] * 32
    (record,) = caplog.records
    assert (record.levelname, record.peer) == ("WARNING", "peer0")  # type: ignore[attr-defined]


def test_burst_of_refusals_is_one_line(
    mariadb_pair: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    """So is a burst of refusals, an ERROR; and each gets the driver's error, or one naming it."""
    caplog.set_level(logging.INFO, "django_proxysql")
    with engine([mysql_peer(mariadb_pair[0], PASSWORD="no")]):
        results = threads(16, connected_to)
    assert all(isinstance(result, OperationalError) for result in results)
    assert all("1045" in str(result) for result in results)
    (record,) = caplog.records
    assert record.levelname == "ERROR"


def test_one_caller_makes_the_trial(mariadb_pair: Pair) -> None:
    """While one caller's trial hangs, all others connect elsewhere without waiting for it."""
    first, second = mariadb_pair
    clock = Clock()
    hanging, go_on = threading.Event(), threading.Event()
    connect = MySQLdb.connect
    tried: list[int] = []

    def connect_or_hang(**params: Any) -> Any:
        tried.append(params["port"])
        if params["port"] == first.port and not hanging.is_set():
            hanging.set()
            assert go_on.wait(30)
        return connect(**params)

    with first_then_second(mysql_peer(first), mysql_peer(second), clock=clock) as connection:
        balancers["balanced"].peers["peer0"].breaker.open()
        clock.advance(60)
        with mock.patch.object(connection.Database, "connect", connect_or_hang):
            trial: list[str] = []
            thread = threading.Thread(target=lambda: trial.extend(threads(1, connected_to)))
            thread.start()
            assert hanging.wait(30)
            tried.clear()
            assert threads(16, connected_to) == ["peer1"] * 16
            assert tried == [second.port] * 16
            assert state().state == "half-open"
            go_on.set()
            thread.join(30)
            assert trial == ["peer0"]
        assert state().state == "closed"


def test_trial_is_made_by_a_connection_that_ends(mariadb_pair: Pair) -> None:
    """A trial is sent ahead with read and write timeouts; the real connection has none."""
    clock = Clock()
    made: list[dict[str, Any]] = []
    connect = MySQLdb.connect

    def noted(**params: Any) -> Any:
        made.append(params)
        return connect(**params)

    settings: dict[str, Any] = {"CONNECT_TIMEOUT": 4, "TRIAL_TIMEOUT": 2, "clock": clock}
    with engine([mysql_peer(mariadb_pair[0])], **settings) as connection:
        balancers["balanced"].peers["peer0"].breaker.open()
        clock.advance(60)
        with mock.patch.object(connection.Database, "connect", noted):
            connection.ensure_connection()
            connection.close()
            connection.ensure_connection()
    timeouts = [
        tuple(params.get(f"{what}_timeout") for what in ("connect", "read", "write"))
        for params in made
    ]
    assert timeouts == [(2, 2, 2), (2, None, None), (4, None, None)]


def test_trial_of_a_peer_that_freezes_after_its_handshake(mariadb_pair: Pair) -> None:
    """A peer that lets us in and then says nothing holds its trial for TRIAL_TIMEOUT, no longer."""
    frozen, alive = mariadb_pair
    # What a server runs after it has let a client in, and before the client's first statement.
    frozen.set_global("init_connect", "DO SLEEP(20)")
    clock = Clock()
    settings: dict[str, Any] = {"TRIAL_TIMEOUT": 1, "clock": clock}
    with first_then_second(mysql_peer(frozen), mysql_peer(alive), **settings) as connection:
        balancers["balanced"].peers["peer0"].breaker.open()
        clock.advance(60)
        connection.ensure_connection()
        assert connection.peer.name == "peer1"
        assert (state().state, state().fault) == ("open", Fault.UNREACHABLE)
        assert state().error.startswith("(2013, ")
        assert state().trial_in == 30


def test_thresholds(mariadb_pair: Pair) -> None:
    """fail_max failed connects in a row open a circuit, success_threshold good trials close it."""
    first, second = mariadb_pair
    clock = Clock()
    settings = {"BREAKER": {"fail_max": 3, "success_threshold": 2}, "clock": clock}
    with first_then_second(mysql_peer(first), mysql_peer(second), **settings):

        def told() -> tuple[str, str, int]:
            return connected_to(), state().state, state().failures

        first.kill()
        assert [told() for _ in range(2)] == [("peer1", "closed", 1), ("peer1", "closed", 2)]
        first.start()
        # A good connect ends the row.
        assert told() == ("peer0", "closed", 0)
        first.kill()
        assert [told()[1] for _ in range(4)] == ["closed", "closed", "open", "open"]
        first.start()
        assert told()[:2] == ("peer1", "open")
        clock.advance(31)
        assert told()[:2] == ("peer0", "half-open")
        # A bad trial starts anew, whatever fail_max says, and for the whole interval.
        first.kill()
        assert told()[:2] == ("peer1", "open")
        first.start()
        clock.advance(29)
        assert told()[:2] == ("peer1", "open")
        clock.advance(2)
        assert [told()[:2] for _ in range(2)] == [("peer0", "half-open"), ("peer0", "closed")]


def test_no_caller_is_turned_away_for_one_killed_connection(mariadb: Node) -> None:
    """With a single peer that is suspect, all who come at once wait for the one trial."""
    with engine([mysql_peer(mariadb)]) as connection:
        for _ in range(5):
            with (
                pytest.raises(OperationalError),
                transaction.atomic(connection.alias),
                connection.cursor() as cursor,
            ):
                cursor.execute("SELECT CONNECTION_ID()")
                mariadb.sql(f"KILL CONNECTION {cursor.fetchone()[0]}")
                cursor.execute("SELECT 1")
            connection.close()
            assert (state().state, state().suspect) == ("closed", True)
            assert threads(16, connected_to) == ["peer0"] * 16
            assert (state().state, state().suspect) == ("closed", False)


# The circuits are anybody's


def test_circuit_guards_other_calls(mariadb_pair: Pair) -> None:
    """The engine's circuit is a pybreaker.CircuitBreaker that guards whatever goes to that host."""
    with engine([mysql_peer(node) for node in mariadb_pair], STRATEGY="round_robin"):
        breaker = balancers["balanced"].peers["peer0"].breaker
        assert isinstance(breaker, pybreaker.CircuitBreaker)
        with pytest.raises(MySQLdb.ProgrammingError), breaker.calling():
            raise MySQLdb.ProgrammingError(1064, "the caller's own mistake")
        assert breaker.current_state == "closed"
        with pytest.raises(MySQLdb.OperationalError) as raised, breaker.calling():
            raise MySQLdb.OperationalError(2003, "no route")
        assert type(raised.value) is MySQLdb.OperationalError
        assert (state().state, state().fault) == ("open", Fault.UNREACHABLE)
        assert {connected_to() for _ in range(4)} == {"peer1"}
        with pytest.raises(pybreaker.CircuitBreakerError), breaker.calling():
            pass


# Forks


def test_fork_while_locks_are_held(mariadb_pair: Pair) -> None:
    """A child made while the parent's threads hold locks connects at once, and counts anew."""
    peers = [mysql_peer(node) for node in mariadb_pair]
    with engine(peers, STRATEGY="least_connections") as connection:
        balancer = balancers["balanced"]
        circuits = [peer.breaker for peer in balancer.peers.values()]
        held, release = threading.Event(), threading.Event()
        wrapper = connection.copy()
        wrapper.ensure_connection()

        def hold() -> None:
            with circuits[0]._lock, circuits[1]._lock:
                held.set()
                release.wait(60)

        thread = threading.Thread(target=hold)
        thread.start()
        try:
            assert held.wait(10)

            def work() -> str:
                before = [peer.connections for peer in balancer.peers.values()]
                name = connected_to()
                connection.close()
                return f"{before} {name[:4]} {[s.state for s in balancer.snapshot()]}"

            assert in_child(work) == "[0, 0] peer ['closed', 'closed']"
        finally:
            release.set()
            thread.join()
        # The parent's connection is the parent's still.
        with wrapper.cursor() as cursor:
            cursor.execute("SELECT 1")
        assert sum(peer.connections for peer in balancer.peers.values()) == 1
        wrapper.close()


def test_forks_of_a_busy_parent(mariadb_pair: Pair) -> None:
    """Children made at any moment of a busy parent connect: no lock of any kind is inherited."""
    mariadb_pair[0].kill()
    peers = [mysql_peer(node) for node in mariadb_pair]
    ended = threading.Event()

    def busy() -> None:
        while not ended.is_set():
            connected_to()
        connections.close_all()

    with engine(peers, CHECK_INTERVAL=0.01):
        hammering = [threading.Thread(target=busy) for _ in range(4)]
        for thread in hammering:
            thread.start()
        try:
            assert [in_child(connected_to) for _ in range(20)] == ["peer1"] * 20
        finally:
            ended.set()
            for thread in hammering:
                thread.join()


def test_child_goes_on_with_what_was_known(mariadb_pair: Pair) -> None:
    """What the parent knew of a dead peer the child knows; what it learns is its own."""
    mariadb_pair[0].kill()
    with first_then_second(*(mysql_peer(node) for node in mariadb_pair)) as connection:
        connected_to()
        connection.close()

        def work() -> str:
            before = state().state
            balancers["balanced"].peers["peer1"].breaker.open()
            return f"{before} {state('peer1').state}"

        assert in_child(work) == "open open"
        assert state("peer1").state == "closed"


# At import and in the constructor


def test_nothing_happens_before_the_first_connection() -> None:
    """Making wrappers makes no balancer, thread or connection, and no mistake is raised."""
    before = threading.active_count(), set(sys.modules)
    with engine([{"HOST": "127.0.0.1", "PORT": 1}], CHECK_INTERVALL=1) as connection:
        assert not balancers.known
        assert connection.connection is None
        assert connection.peer is None
        assert threading.active_count() == before[0]
        with pytest.raises(ImproperlyConfigured, match=r"'balanced'.*CHECK_INTERVALL"):
            connection.ensure_connection()
        with pytest.raises(ImproperlyConfigured, match=r"'balanced'.*CHECK_INTERVALL"):
            balancers["balanced"]


# Listeners


def test_listener_of_all_balancers(tmp_path: pathlib.Path) -> None:
    """It gets the events of balancers that are there and of later ones, until it is removed."""
    events: list[Any] = []

    def listen(event: Any) -> None:
        events.append((event.balancer, type(event).__name__))

    peers = sqlite_peers(tmp_path, {}, {})
    with engine(peers, PEER_ENGINE=SQLITE) as connection:
        there = balancers["balanced"]
        balancers.add_listener(listen)
        balancers.add_listener(listen)
        try:
            connection.ensure_connection()
            assert events == [("balanced", "Connected")]
            connection.close()
            balancers.known.clear()
            connection.ensure_connection()
            assert balancers["balanced"] is not there
            assert events == [("balanced", "Connected")] * 2
        finally:
            balancers.remove_listener(listen)
        balancers["balanced"].drain("peer0")
        assert len(events) == 2


def test_listener_that_is_spared_connects(tmp_path: pathlib.Path) -> None:
    """It gets everything but the connections that are made every day."""
    events: list[Any] = []
    peers = sqlite_peers(tmp_path, {}, {})
    clock = Clock()
    with engine(peers, PEER_ENGINE=SQLITE, clock=clock, CHECK_INTERVAL=5) as connection:
        balancers["balanced"].add_listener(events.append, connects=False)
        connection.ensure_connection()
        assert events == []
        for peer in balancers["balanced"].peers.values():
            peer.breaker.open()
        clock.advance(6)
        connection.close()
        connection.ensure_connection()
        assert [type(event).__name__ for event in events] == [
            *["CircuitOpened"] * 2,
            "CircuitClosed",
            "Connected",
        ]
