"""Which peer the next connection goes to."""

from __future__ import annotations

import contextlib
import functools
import gc
import random
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from django_proxysql import LoadBalancer, Peer
from django_proxysql.core import balancer as balancer_module
from django_proxysql.core import peer as peer_module
from django_proxysql.core import search as search_module
from django_proxysql.core.exceptions import ConfigError
from django_proxysql.core.peer import Checkout, _ThreadEnd
from django_proxysql.core.strategies import (
    LeastConnections,
    Random,
    RoundRobin,
    strategy_from,
)
from tests.fakes import (
    Clock,
    Connection,
    Driver,
    in_thread,
    peers,
    refused_by_host,
    running,
    until,
)
from tests.strikes import strikes

MANY = 10_000


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    """Draw the same numbers in each run."""
    before = random.getstate()
    random.seed(20)
    yield
    random.setstate(before)


class Forgetful(list):  # type: ignore[type-arg]
    """Keeps nothing."""

    def append(self, thing: object) -> None:
        pass


def balancer(
    strategy: Any = None, weights: Sequence[float] = (1, 1, 1), **options: Any
) -> tuple[LoadBalancer, Driver]:
    """Return a balancer over db1, db2 … of these weights, and its driver."""
    names = [f"db{number}" for number in range(1, len(weights) + 1)]
    endpoints = peers(*names)
    for name, weight in zip(names, weights):
        endpoints[name]["weight"] = weight
    if strategy is not None:
        options["strategy"] = strategy
    driver = Driver()
    # Connections are held by who asked for them, and by no other.
    driver.made = Forgetful()
    return LoadBalancer(endpoints, driver.connect, clock=Clock(), **options), driver


def shares(db: LoadBalancer, count: int = MANY) -> dict[str, int]:
    return Counter(db.connect().host for _ in range(count))


def held(db: LoadBalancer) -> list[int]:
    """How many connections to each peer are counted."""
    return [state.connections for state in db.snapshot()]


def assert_within_three_deviations(got: dict[str, int], weights: Sequence[float]) -> None:
    """Assert that the counts are those of a draw by weight: binomial, within 3 deviations."""
    total = sum(got.values())
    assert set(got) == {f"db{number}" for number in range(1, len(weights) + 1)}
    for number, weight in enumerate(weights, 1):
        share = weight / sum(weights)
        deviation = (total * share * (1 - share)) ** 0.5
        assert abs(got[f"db{number}"] - total * share) <= 3 * deviation, (number, got)


@pytest.mark.parametrize(
    "weights", [(1, 1, 1), (1, 2, 3), (0.5, 0.25, 0.25), (100, 1, 1), (7, 7, 7)]
)
@pytest.mark.parametrize("strategy", ["random", "round_robin"])
def test_shares_go_by_weight(strategy: str, weights: Sequence[float]) -> None:
    """Of 10,000 connects: within 3 standard deviations, and in turn they are exact to a cycle."""
    db, _ = balancer(strategy, weights)
    got = shares(db)
    assert_within_three_deviations(got, weights)
    if strategy == "round_robin":
        for number, weight in enumerate(weights, 1):
            assert abs(got[f"db{number}"] - MANY * weight / sum(weights)) <= 10


class TestRandom:
    def test_is_the_default(self) -> None:
        """Without a STRATEGY connections are spread at random."""
        db, _ = balancer()
        assert type(db.group.strategy) is Random
        first = [db.connect().host for _ in range(60)]
        assert first != [db.connect().host for _ in range(60)]

    @pytest.mark.parametrize("weights", [(1, 1, 1), (1, 2, 4)])
    def test_after_a_failure_the_rest_is_drawn_by_weight_too(
        self, weights: Sequence[float]
    ) -> None:
        """What would have gone to a peer that is down is spread over the others by weight."""
        db, driver = balancer("random", weights, breaker={"fail_max": MANY})
        driver.down["db1"] = refused_by_host
        got = shares(db)
        fell = len(driver.hosts) - MANY
        assert fell > 1000
        total = sum(weights[1:])
        for number in (2, 3):
            share = weights[number - 1] / total
            assert abs(got[f"db{number}"] - MANY * share) <= 3 * (MANY * share * (1 - share)) ** 0.5

    def test_every_peer_once(self) -> None:
        """The order names each peer once, whatever is drawn."""
        strategy = Random(iter([0.0, 0.999999999, 0.5, 0.0]).__next__)
        tier = tuple(balancer(weights=(1, 2, 3, 4))[0].peers.values())
        first, *rest = strategy.order(tier[:3])
        assert sorted(peer.name for peer in rest) == ["db1", "db2", "db3"]
        assert first is tier[0]

    @pytest.mark.parametrize("draw", [0.0, 0.5, 1 - 2**-53])
    @pytest.mark.parametrize("weights", [(1, 1, 1), (1e-9, 1e9, 1e-9), (0.1, 0.2, 0.3)])
    def test_edges_of_the_draw(self, draw: float, weights: Sequence[float]) -> None:
        """The ends of the range that is drawn from are peers like any other."""
        tier = tuple(balancer(weights=weights)[0].peers.values())
        assert {peer.name for peer in Random(lambda: draw).order(tier)} == {"db1", "db2", "db3"}

    def test_from_many_threads(self) -> None:
        """Threads that draw for different tiers at once never get another tier's peer."""
        tiers = [
            tuple(balancer(weights=weights)[0].peers.values())
            for weights in ((1, 2), (3, 1, 1, 5), (1, 1, 1), (9, 1))
        ]
        strategy = Random()

        def draw(tier: tuple[Peer, ...]) -> None:
            for _ in range(400):
                assert next(iter(strategy.order(tier))) in tier

        with running(*[lambda tier=tier: draw(tier) for tier in tiers * 2]):
            pass


class TestRoundRobin:
    def test_in_turn(self) -> None:
        """Connections go to the peers in turn."""
        db, _ = balancer("round_robin")
        hosts = [db.connect().host for _ in range(9)]
        assert sorted(hosts[:3]) == ["db1", "db2", "db3"]
        assert hosts == hosts[:3] * 3

    def test_weights_are_interleaved(self) -> None:
        """A heavy peer's turns are spread over the cycle, not one after another."""
        db, _ = balancer("round_robin", (2, 1))
        hosts = [db.connect().host for _ in range(300)]
        assert "db1db1db1db1" not in "".join(hosts)
        assert "db2db2" not in "".join(hosts)

    def test_uneven_weights_make_no_endless_cycle(self) -> None:
        """Weights a million apart are bounded, and the light peer still gets its turns."""
        db, _ = balancer("round_robin", (1, 1_000_000))
        got = shares(db, 30_000)
        assert 1 <= got["db1"] <= 100

    def test_goes_on_with_the_next(self) -> None:
        """After a failure the peers that follow are tried in their order, each once."""
        db, driver = balancer("round_robin", (1, 1, 1, 1), breaker={"fail_max": 100})
        driver.down.update(db2=refused_by_host, db3=refused_by_host)
        for _ in range(4):
            driver.calls.clear()
            assert db.connect().host in ("db1", "db4")
            if driver.hosts[0] == "db2":
                assert driver.hosts == ["db2", "db3", "db4"]

    def test_exact_with_threads(self) -> None:
        """Eight threads that connect at once share the turns exactly."""
        db, driver = balancer("round_robin")
        with running(*[lambda: shares(db, 300)] * 8):
            pass
        assert Counter(driver.hosts) == {"db1": 800, "db2": 800, "db3": 800}


class TestLeastConnections:
    @pytest.mark.parametrize(("weights", "counts"), [((1, 1, 1), [10, 10, 10]), ((3, 1), [30, 10])])
    def test_evens_out(self, weights: Sequence[float], counts: list[int]) -> None:
        """Connections that are kept are spread by weight."""
        db, _ = balancer("least_connections", weights)
        kept = [db.connect() for _ in range(sum(counts))]
        assert held(db) == counts
        assert len(kept) == sum(counts)

    def test_goes_where_connections_were_closed(self) -> None:
        """The peer that lost most of its connections gets the next ones."""
        db, _ = balancer("least_connections")
        kept = [db.connect() for _ in range(30)]
        kept = [connection for connection in kept if connection.host != "db2"]
        gc.collect()
        until(lambda: held(db) == [10, 0, 10])
        assert [db.connect().host for _ in range(5)] == ["db2"] * 5
        kept += [db.connect() for _ in range(10)]
        assert held(db) == [10, 10, 10]

    @pytest.mark.parametrize("weights", [(1, 1, 1), (1, 2, 3)])
    def test_ties_are_drawn(self, weights: Sequence[float]) -> None:
        """With nothing kept no peer is preferred: a fresh process begins anywhere."""
        db, _ = balancer("least_connections", weights)
        assert_within_three_deviations(shares(db), (1, 1, 1))

    def test_pooled_connection_outlives_its_thread(self) -> None:
        """A connection that a pool keeps counts, though the thread that made it has ended."""
        db, _ = balancer("least_connections")
        kept: list[Connection] = []
        in_thread(lambda: kept.extend(db.connect() for _ in range(30)))
        assert held(db) == [10, 10, 10]
        del kept[:10]
        gc.collect()
        until(lambda: sum(held(db)) == 20)

    def test_thread_that_dies_without_closing(self) -> None:
        """Connections of a thread that has ended are not counted, where the thread kept them."""
        db, _ = balancer("least_connections")
        local = threading.local()
        kept: list[Checkout] = []

        def work() -> None:
            local.connections = [db.connect() for _ in range(30)]
            # What the engine counts is its thread's, even if somebody keeps the wrapper.
            kept.extend(peer.check_out() for peer in db.peers.values())

        in_thread(work)
        gc.collect()
        until(lambda: held(db) == [0, 0, 0])
        mine = [db.connect() for _ in range(6)]
        assert Counter(connection.host for connection in mine) == {"db1": 2, "db2": 2, "db3": 2}
        # What is closed late is not counted off a second time.
        kept.clear()
        gc.collect()
        until(lambda: held(db) == [2, 2, 2])

    def test_closed_by_another_thread(self) -> None:
        """A connection may end in another thread than it began in, and before or after it."""
        db, _ = balancer("least_connections", (1, 1))
        kept: list[Connection] = []
        go, made = threading.Event(), threading.Event()

        def work() -> None:
            kept.extend(db.connect() for _ in range(4))
            made.set()
            assert go.wait(60)

        with running(work):
            assert made.wait(60)
            assert held(db) == [2, 2]
            del kept[:2]
            gc.collect()
            until(lambda: sum(held(db)) == 2)
            go.set()
        assert sum(held(db)) == 2
        kept.clear()
        gc.collect()
        until(lambda: held(db) == [0, 0])

    def test_connects_under_way_count(self) -> None:
        """A peer that is slow to accept gets no more connects than the others."""
        db, _ = balancer("least_connections", (1, 2))
        began = threading.Semaphore(0)
        go = threading.Event()

        def slowly(attempt: Any) -> str:
            began.release()
            assert go.wait(60)
            return str(attempt.peer.name)

        got: list[str] = []
        with contextlib.ExitStack() as stack:
            stack.callback(go.set)
            for _ in range(9):
                # One after the other: each sees those before it.
                stack.enter_context(running(lambda: got.append(db.connect(slowly))))
                assert began.acquire(timeout=60)
            assert [peer.connecting for peer in db.peers.values()] == [3, 6]
            go.set()
        assert [peer.connecting for peer in db.peers.values()] == [0, 0]

    @pytest.mark.parametrize("error", [KeyboardInterrupt, RecursionError, MemoryError])
    def test_killed_connect_counts_no_longer(self, error: type[BaseException]) -> None:
        """A connect that ends at any line is not under way, even if somebody keeps the error."""
        kept: list[BaseException] = []
        files = [balancer_module.__file__, search_module.__file__]
        for strike in strikes(files, error, least=20, kept=kept):
            db, _ = balancer("least_connections", (1, 1))
            strike.hits(functools.partial(db.connect, lambda _: "connected"))
            assert [peer.connecting for peer in db.peers.values()] == [0, 0], strike.where

    def test_failed_connects_are_not_counted(self) -> None:
        """Only connections that were made are held."""
        db, driver = balancer("least_connections", (1, 1), breaker={"fail_max": 100})
        driver.down["db1"] = refused_by_host
        kept = [db.connect() for _ in range(5)]
        assert held(db) == [0, 5]
        assert len(kept) == 5


def test_weights_count_within_a_tier() -> None:
    endpoints = peers("db1", "db2", "spare")
    endpoints["db2"]["weight"] = 3
    endpoints["spare"].update(weight=1000, priority=1)
    db = LoadBalancer(endpoints, Driver().connect, clock=Clock())
    assert_within_three_deviations(shares(db), (1, 3))


class Alphabetical:
    """A user's own."""

    made = 0

    def __init__(self) -> None:
        type(self).made += 1

    def order(self, peers: Sequence[Peer]) -> Sequence[Peer]:
        return sorted(peers, key=lambda peer: peer.name)


def not_a_strategy() -> None: ...


class TestOnesOwn:
    @pytest.mark.parametrize(
        "setting", [f"{__name__}.Alphabetical", Alphabetical, Alphabetical()], ids=type
    )
    def test_is_made_once_and_asked_for_each_connect(self, setting: Any) -> None:
        """STRATEGY may be a dotted path; code may give the class or an object, too."""
        before = Alphabetical.made
        driver = Driver()
        db = LoadBalancer(
            peers("c", "a", "b"),
            driver.connect,
            strategy=setting,
            breaker={"fail_max": 10},
            clock=Clock(),
        )
        assert [db.connect().host for _ in range(3)] == ["a"] * 3
        driver.down.update(a=refused_by_host, b=refused_by_host)
        driver.calls.clear()
        assert db.connect().host == "c"
        assert driver.hosts == ["a", "b", "c"]
        assert Alphabetical.made == before + (not isinstance(setting, Alphabetical))

    @pytest.mark.parametrize(
        ("setting", "complaint"),
        [
            ("fastest", "STRATEGY is 'fastest', which is not known"),
            ("no.such.module", "which cannot be imported"),
            ("tests.test_strategies.NoSuch", "which cannot be imported"),
            ("tests.test_strategies.not_a_strategy", "has no order"),
            (42, "has no order"),
            (None, "has no order"),
        ],
    )
    def test_wrong_settings(self, setting: Any, complaint: str) -> None:
        """A STRATEGY that is none is a ConfigError that names the setting and the choices."""
        with pytest.raises(ConfigError, match="STRATEGY") as caught:
            strategy_from(setting)
        assert complaint in str(caught.value)

    def test_names(self) -> None:
        """Each name is its class."""
        assert type(strategy_from("random")) is Random
        assert type(strategy_from("round_robin")) is RoundRobin
        assert type(strategy_from("least_connections")) is LeastConnections


@pytest.mark.parametrize("kind", [Checkout, _ThreadEnd])
def test_finalizer_of_what_was_never_made_is_silent(
    kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An asynchronous exception may strike before the first line of __init__."""
    complaints: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", complaints.append)
    kind.__new__(kind)
    gc.collect()
    assert complaints == []


def test_hold_that_is_struck_is_not_counted() -> None:
    """At any line of its making; and nothing is said on stderr."""
    for strike in strikes([peer_module.__file__], least=5):
        db, _ = balancer(weights=(1,))
        (peer,) = db.peers.values()
        is_struck = strike.hits(lambda: setattr(peer, "kept", peer.check_out()))  # noqa: B023
        assert peer.connections == (0 if is_struck else 1), strike.where
