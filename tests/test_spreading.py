"""Connections of Django's threads and processes, spread over peers and watched by circuits."""

from __future__ import annotations

import collections
import contextvars
import functools
import gc
import logging
import pathlib
import threading
from collections.abc import Callable
from typing import Any
from unittest import mock

import MySQLdb
import pytest
from django.core.exceptions import ImproperlyConfigured
from django.db import OperationalError, connections, transaction

from django_proxysql import Fault, balancers
from django_proxysql.core.affinity import Pin
from tests.children import in_child
from tests.engine import SQLITE, Clock, engine, mysql_peer, sqlite_peer
from tests.fakes import holding, in_thread, running, until
from tests.servers.mariadb import Node
from tests.strikes import Injected
from tests.test_connecting import first_then_second, state

Pair = tuple[Node, Node]


def threads(count: int, work: Callable[[], Any]) -> list[Any]:
    """Run ``work`` in ``count`` threads at once; return what each returned or raised."""
    results: list[Any] = []
    together = threading.Barrier(count)

    def run() -> None:
        together.wait(60)
        try:
            results.append(work())
        except BaseException as exc:
            results.append(exc)
        finally:
            connections.close_all()

    with running(*[run] * count):
        pass
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


class Last:
    """A strategy of a user's own: the last peer first."""

    def order(self, peers: Any) -> Any:
        return reversed(peers)


TIER = {"PRIORITY": 1}


@pytest.mark.parametrize(
    ("strategy", "peers", "counts"),
    [
        ("round_robin", [{}, {}, {}], {"peer0": 100, "peer1": 100, "peer2": 100}),
        ("round_robin", [{}, {"WEIGHT": 2}], {"peer0": 100, "peer1": 200}),
        # A tier is used only when no peer of a lower number is available.
        (
            "round_robin",
            [{"PRIORITY": 2}, TIER, {"NAME": "/nowhere/db"}, TIER],
            {"peer1": 150, "peer3": 150},
        ),
        (f"{__name__}.Last", [{}, {}], {"peer1": 300}),
    ],
)
def test_strategy_weights_and_priorities(
    shares: Callable[..., dict[str, int]], strategy: str, peers: Any, counts: dict[str, int]
) -> None:
    assert shares(peers, STRATEGY=strategy) == counts


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
            in_thread(connect_and_die)
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
            assert go_on.wait(60)
        return connect(**params)

    with first_then_second(mysql_peer(first), mysql_peer(second), clock=clock) as connection:
        balancers["balanced"].peers["peer0"].breaker.open()
        clock.advance(60)
        with mock.patch.object(connection.Database, "connect", connect_or_hang):
            trial: list[str] = []
            with running(lambda: trial.extend(threads(1, connected_to))):
                assert hanging.wait(60)
                tried.clear()
                assert threads(16, connected_to) == ["peer1"] * 16
                assert tried == [second.port] * 16
                assert state().state == "half-open"
                go_on.set()
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


# Forks


def test_fork_while_locks_are_held(mariadb_pair: Pair) -> None:
    """A child made while the parent's threads hold locks connects at once, and counts anew."""
    peers = [mysql_peer(node) for node in mariadb_pair]
    with engine(peers, STRATEGY="least_connections") as connection:
        balancer = balancers["balanced"]
        circuits = [peer.breaker for peer in balancer.peers.values()]
        wrapper = connection.copy()
        wrapper.ensure_connection()

        def work() -> str:
            before = [peer.connections for peer in balancer.peers.values()]
            name = connected_to()
            connection.close()
            return f"{before} {name[:4]} {[s.state for s in balancer.snapshot()]}"

        with holding(circuits[0]._lock), holding(circuits[1]._lock):
            assert in_child(work) == "[0, 0] peer ['closed', 'closed']"
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

    with engine(peers, CHECK_INTERVAL=0.01), running(*[busy] * 4):
        try:
            assert [in_child(connected_to) for _ in range(20)] == ["peer1"] * 20
        finally:
            ended.set()


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
    # Of those that are there another test's may end at any time.
    before = set(threading.enumerate())
    with engine([{"HOST": "127.0.0.1", "PORT": 1}], CHECK_INTERVALL=1) as connection:
        assert not balancers.known
        assert connection.connection is None
        assert connection.peer is None
        assert set(threading.enumerate()) <= before
        with pytest.raises(ImproperlyConfigured, match=r"'balanced'.*CHECK_INTERVALL"):
            connection.ensure_connection()
        with pytest.raises(ImproperlyConfigured, match=r"'balanced'.*CHECK_INTERVALL"):
            balancers["balanced"]


def test_the_first_of_a_pinned_blocks_connects_says_its_peer_once_and_for_all() -> None:
    pin, first, other = Pin(None), mock.Mock(), mock.Mock()
    assert [pin.settle(first), pin.settle(other), pin.peer] == [first, first, first]


def test_connects_of_one_pinned_block_at_once_come_to_one_peer(mariadb_pair: Pair) -> None:
    """Threads that run in the block's context, as sync_to_async()'s do, before it has its peer."""
    both = threading.Barrier(2)

    def connect_and_ask() -> int:
        wrapper: Any = connections["balanced"]
        with mock.patch.object(wrapper, "init_connection_state", together(wrapper)):
            wrapper.ensure_connection()
        with wrapper.cursor() as cursor:
            cursor.execute("SELECT @@port")
            return int(cursor.fetchone()[0])

    def together(wrapper: Any) -> Callable[[], None]:
        plain = wrapper.init_connection_state

        def wait() -> None:
            both.wait(60)
            plain()

        return wait

    peers = [mysql_peer(node) for node in mariadb_pair]
    with engine(peers, STRATEGY="round_robin"), balancers["balanced"].pinned():
        context = contextvars.copy_context()
        asked = threads(2, lambda: context.copy().run(connect_and_ask))
        assert len(set(asked)) == 1, asked


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


def test_listener_whose_connection_does_not_close_takes_none_of_the_threads_along(
    tmp_path: pathlib.Path,
) -> None:
    peers = {name: {"ENGINE": SQLITE, **sqlite_peer(tmp_path / name)} for name in ("one", "two")}
    closed: list[str] = []

    def listen(event: Any) -> None:
        for alias in peers:
            connections[alias].close = functools.partial(fail, alias)  # type: ignore[method-assign]

    def fail(alias: str) -> None:
        closed.append(alias)
        raise Injected

    with engine(["one"], databases=peers, PEER_ENGINE=SQLITE):
        before = [connections[alias] for alias in peers]
        for wrapper in before:
            # As where a block ends.
            wrapper._is_apart = True  # type: ignore[attr-defined]
        balancers["balanced"].add_listener(listen)
        with pytest.raises(Injected):
            balancers["balanced"].drain("one", force=True)
        assert [connections[alias] for alias in peers] == before
    assert closed == ["two", "one"]


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
