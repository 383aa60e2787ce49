"""A peer that is in use again gets its share of the connections that are kept."""

from __future__ import annotations

import gc
import math
import random
import statistics
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from django.db import close_old_connections, connections, transaction

from django_proxysql import balancers
from django_proxysql.core import rebalance
from django_proxysql.core.balancer import LoadBalancer
from django_proxysql.core.config import BalancerConfig, PeerConfig
from django_proxysql.core.events import ConnectionReplaced, PeersExhausted
from django_proxysql.core.peer import Checkout, Peer
from tests import stories
from tests.children import in_child
from tests.engine import SQLITE, engine, mysql_peer, sqlite_peer
from tests.engine import Clock as EngineClock
from tests.fakes import Clock, in_thread, running, until
from tests.servers.mariadb import Node
from tests.strikes import strikes
from tests.test_balancer import InOrder

SECONDS = 30.0


class Process:
    """A process with connections that are kept, and what becomes of them."""

    def __init__(
        self,
        clock: Clock,
        draw: random.Random,
        connections: int,
        weights: dict[str, float],
        tiers: dict[str, int] | None = None,
        **settings: Any,
    ) -> None:
        self.clock = clock
        self.draw = draw
        peers = tuple(
            PeerConfig(name, weight=weight, priority=(tiers or {}).get(name, 0))
            for name, weight in weights.items()
        )
        config = BalancerConfig("default", peers, **{"rebalance": SECONDS, **settings})
        self.db = LoadBalancer(config, clock=clock, jitter=draw.random)
        self.moments: list[float] = []
        # One is out, and the others have them all.
        self.back, *others = self.db.peers.values()
        self.back.breaker.open()
        self.holds = [Checkout(self.first(others)) for _ in range(connections)]

    def first(self, peers: list[Peer]) -> Peer:
        weights = [peer.weight for peer in peers]
        return self.draw.choices(peers, weights)[0]

    def claim(self, name: str = "a") -> Any:
        """Claim a move for a connection to that peer."""
        return self.db.group.claim_move(self.db.peers[name])

    def unit_ends(self) -> None:
        """One of its connections is between two requests."""
        number = self.draw.randrange(len(self.holds))
        hold = self.holds[number]
        move = self.claim(hold.peer.name)
        if move is not None:
            hold.release()
            self.holds[number] = Checkout(move.peer)
            self.moments.append(self.clock())

    @property
    def share(self) -> float:
        total = sum(peer.weight for peer in self.db.peers.values())
        return len(self.holds) * self.back.weight / total


FLEETS = [
    (120, 1, {"back": 1.0, "a": 1.0}),
    (120, 1, {"back": 1.0, "a": 1.0, "b": 1.0}),
    (40, 4, {"back": 1.0, "a": 1.0, "b": 1.0}),
    (30, 5, {"back": 3.0, "a": 1.0, "b": 2.0}),
    (2, 60, {"back": 1.0, "a": 1.0}),
    (1, 32, {"back": 1.0, "a": 1.0, "b": 2.0}),
]


class TestFleet:
    """Many processes that know nothing of one another, on one clock, with a seed."""

    @pytest.mark.parametrize("seed", range(2))
    @pytest.mark.parametrize(
        ("processes", "each", "weights"), FLEETS, ids=lambda value: str(value)[:20]
    )
    def test_even_again_and_no_faster(
        self, processes: int, each: int, weights: dict[str, float], seed: int
    ) -> None:
        """Shares are even again soon after REBALANCE, and at no time does it go faster."""
        clock = Clock()
        draw = random.Random(seed)
        fleet = [Process(clock, draw, each, weights) for _ in range(processes)]
        for process in fleet:
            process.back.breaker.close()
        step = 0.1
        moved: list[tuple[float, int]] = []
        while clock.now < 1.6 * SECONDS:
            clock.advance(step)
            for process in fleet:
                for _ in range(1 + each // 4):
                    process.unit_ends()
            moved.append((clock.now, sum(len(process.moments) for process in fleet)))
        for process in fleet:
            # As even as whole connections can be, and it is over.
            assert abs(process.back.connections - process.share) < 1
            assert process.db.group.rebalance.returns == ()
            self.check_pace(process)
        have = sum(process.back.connections for process in fleet)
        fair = sum(process.share for process in fleet)
        # Rounding is by chance: what it may be off by is chance's, too.
        odd = fair / processes % 1
        assert abs(have - fair) <= 4 * math.sqrt(processes * odd * (1 - odd)) + 1e-9
        # None waits for the end, nor do all begin at the start.
        for now, count in moved:
            even = have * min(1.0, now / SECONDS)
            assert count <= even + 4 * math.sqrt(max(1, have) / 4) + 1
        assert moved[-1][1] == have

    @staticmethod
    def check_pace(process: Process) -> None:
        """So many moves take so long at least; two of them never come together."""
        moments = process.moments
        if len(moments) > 1:
            interval = SECONDS / math.ceil(process.share)
            gaps = [later - earlier for earlier, later in zip(moments, moments[1:])]
            assert min(gaps) >= interval - 1e-6
        assert all(moment > 0 for moment in moments)

    def test_first_moves_are_spread(self) -> None:
        """Of many processes with a connection each, as many move in each part of REBALANCE."""
        clock = Clock()
        draw = random.Random(11)
        fleet = [Process(clock, draw, 1, {"back": 1.0, "a": 1.0}) for _ in range(400)]
        for process in fleet:
            process.back.breaker.close()
        while clock.now < SECONDS:
            clock.advance(0.25)
            for process in fleet:
                process.unit_ends()
        moments = [moment for process in fleet for moment in process.moments]
        assert 160 < len(moments) < 240
        assert abs(statistics.mean(moments) - SECONDS / 2) < 2
        for part in range(6):
            begin = part * SECONDS / 6
            assert 15 < sum(begin < moment <= begin + SECONDS / 6 for moment in moments) < 55

    def test_idleness_is_no_credit(self) -> None:
        """A process that had nothing to move for a while does not make up for it at once."""
        clock = Clock()
        process = Process(clock, random.Random(1), 32, {"back": 1.0, "a": 1.0})
        process.back.breaker.close()
        clock.advance(SECONDS * 5)
        for _ in range(100):
            process.unit_ends()
        assert len(process.moments) == 1


class ByWeight(InOrder):
    """A strategy of a user's own that asks for moves."""

    by_weight = True


class TestClaim:
    def process(self, connections: int = 4, **more: Any) -> Process:
        """A process whose draws are all 0.5, a peer of which has just come back."""
        weights = {"back": 1.0, "a": 1.0, **more.pop("weights", {})}
        made = Process(Clock(), random.Random(0), connections, weights, **more)
        made.db.group.rebalance._draw = lambda: 0.5
        made.back.breaker.close()
        return made

    @pytest.mark.parametrize("how", ["open", "drained", "suspect"])
    def test_peer_that_is_gone_again_gets_none_until_it_is_back(self, how: str) -> None:
        """It begins anew then; only a doubt, once it is cleared, has changed nothing."""
        process = self.process()
        breaker = process.back.breaker
        away, back = {
            "open": (breaker.open, breaker.close),
            "drained": (lambda: process.db.drain("back"), lambda: process.db.undrain("back")),
            "suspect": (breaker.suspect, lambda: breaker.acquire().succeeded()),
        }[how]
        away()
        process.clock.advance(SECONDS)
        assert process.claim() is None
        assert len(process.db.group.rebalance.returns) == (how == "suspect")
        back()
        if how != "suspect":
            assert process.claim() is None
            process.clock.advance(SECONDS)
        assert process.claim().peer is process.back

    def test_move_under_way_counts(self) -> None:
        """A move that is not done yet, or has failed, is neither allowed twice nor for ever."""
        process = self.process(2)
        process.clock.advance(SECONDS)
        move = process.claim()
        process.clock.advance(SECONDS)
        assert process.claim() is None
        del move
        gc.collect()
        assert process.claim() is not None

    def test_no_more_than_is_left_over(self) -> None:
        """Who holds no more than its share gives none."""
        process = self.process(3, weights={"b": 1.0})
        for hold in process.holds:
            hold.release()
        a, b = process.db.peers["a"], process.db.peers["b"]
        process.holds = [Checkout(a), Checkout(a), Checkout(b)]
        process.clock.advance(SECONDS)
        assert process.claim("b") is None
        assert process.claim("a") is not None

    def test_better_tier(self) -> None:
        """All go to a better tier that is in use again, and none to a worse one."""
        process = self.process(3, tiers={"a": 1})
        for number in range(3):
            process.clock.advance(SECONDS)
            assert process.claim().peer is process.back
            process.holds[number].release()
            process.holds[number] = Checkout(process.back)
        assert process.claim() is None
        worse = process.db.peers["a"].breaker
        worse.open()
        worse.close()
        process.clock.advance(SECONDS)
        assert process.claim("back") is None
        assert process.db.group.rebalance.returns == ()

    @pytest.mark.parametrize(
        ("settings", "moves"),
        [
            ({"rebalance": 0}, 3),
            ({"rebalance": None}, 0),
            # One's own may have other ends than weights, unless it asks.
            ({"rebalance": 0, "strategy": InOrder}, 0),
            ({"rebalance": 0, "strategy": ByWeight}, 3),
        ],
    )
    def test_at_once_or_never(self, settings: dict[str, Any], moves: int) -> None:
        process = self.process(6, **settings)
        begun = [process.claim() for _ in process.holds]
        assert sum(move is not None for move in begun) == moves

    @pytest.mark.usefixtures("hurried")
    def test_threads_race(self) -> None:
        """However many threads ask at once, as many get leave as the time allows."""
        process = self.process(40)
        for number in range(1, 11):
            process.clock.advance(SECONDS / 10)
            got: list[Any] = []
            barrier = threading.Barrier(8)

            def ask() -> None:
                barrier.wait(60)  # noqa: B023
                move = process.claim()
                if move is not None:
                    got.append(move)  # noqa: B023

            with running(*[ask] * 8):
                pass
            assert len(got) == 1, number
            process.holds.pop().release()
            process.holds.insert(0, Checkout(process.back))

    def test_killed_at_every_line(self) -> None:
        """A thread that is killed while it asks takes no turn for ever, nor a lock."""
        for strike in strikes([rebalance.__file__], least=10):
            process = self.process(2)
            process.clock.advance(SECONDS)
            strike.hits(process.claim)
            gc.collect()
            process.clock.advance(SECONDS)
            assert in_thread(process.claim) is not None

    def test_child(self) -> None:
        """A child of a fork has nothing to move, and a free lock."""
        process = self.process(2)

        def work() -> str:
            returns = process.db.group.rebalance.returns
            process.back.breaker.open()
            process.back.breaker.close()
            return f"{returns} {len(process.db.group.rebalance.returns)}"

        with process.db.group.rebalance._lock:
            assert in_child(work) == "() 1"


class Narrator(stories.Narrator):
    def twice(self) -> None:
        """Let the connection count for two, of which one is to move."""
        self.second = Checkout(self.here.connection.peer)

    def come_back(self, seconds: str = "60") -> None:
        """Have the other peer come back, and time go on."""
        peers = self.here.balancer.peers.values()
        (self.back,) = [peer for peer in peers if peer is not self.here.connection.peer]
        self.back.breaker.open()
        self.here.read()
        self.back.breaker.close()
        self.here.clock.advance(float(seconds))
        self.note()

    def moved(self) -> None:
        assert self.here.connection.peer is self.back
        assert self.here.connection.connection is not None

    def over(self) -> None:
        assert self.here.balancer.group.rebalance.returns == ()

    def refuse_back(self) -> None:
        here = self.here
        here.proxies[list(here.balancer.peers.values()).index(self.back)].refuse()

    def given_up(self) -> None:
        assert self.back.breaker.current_state == "open"
        assert not [one for one in self.here.events if type(one) is PeersExhausted]


STORIES = {
    "a connection moves between requests, unnoticed": (
        "all: write one; twice; come_back; read; stays; request_ends; moved; read one; "
        "replaced 1 unforced; lost 0; request_ends; over"
    ),
    "it stays while REBALANCE does not allow it": (
        "all: read; twice; come_back 0; request_ends; stays"
    ),
    # In a block, and without autocommit, Django closes it at the end of a request.
    "nor does it move when pinned, or while it is shared between threads": (
        "all: read; twice; come_back; pinned { request_ends; stays }; "
        "shared { request_ends; stays }"
    ),
    # It may hold it still, whatever has ended.
    "one that has held state of the session stays": (
        "all: HOLD; twice; request_ends; come_back; request_ends; stays"
    ),
    "a move that fails costs nothing but the attempt": (
        "all: write one; twice; come_back; refuse_back; request_ends; stays; read one; given_up"
    ),
}


@stories.told(STORIES)
def test_story(request: Any, server: str, settings: dict[str, Any], text: str) -> None:
    stories.tell(request, server, settings, text, Narrator)


class TestEngine:
    def test_sqlite_stays(self, tmp_path: Path) -> None:
        """Where sockets are not looked at connections stay, until they are made anew."""
        clock = EngineClock()
        peers = [sqlite_peer(tmp_path / name) for name in "ab"]
        with engine(peers, PEER_ENGINE=SQLITE, CONN_MAX_AGE=None, clock=clock) as connection:
            connection.ensure_connection()
            (other,) = [
                peer for peer in balancers["balanced"].peers.values() if peer is not connection.peer
            ]
            other.breaker.open()
            other.breaker.close()
            clock.advance(60)
            close_old_connections()
            assert connection.connection is not None
            assert connection.peer is not other

    def test_threads_on_real_servers(self, mariadb_pair: tuple[Node, Node]) -> None:
        """Eight threads under load are spread evenly again after an outage, without an error."""
        clock = EngineClock()
        with engine(
            [mysql_peer(node) for node in mariadb_pair],
            clock=clock,
            CONN_MAX_AGE=None,
            TRIALS="background",
        ):
            db = balancers["balanced"]
            one, other = db.peers.values()
            told: list[Any] = []
            db.add_listener(told.append)
            stop = threading.Event()
            turns = [0] * 8
            evenly = threading.Barrier(9)

            def requests(number: int) -> None:
                connection = connections["balanced"]
                evenly.wait(60)
                while not stop.is_set():
                    with transaction.atomic("balanced"), connection.cursor() as cursor:
                        cursor.execute("SELECT 1")
                        assert cursor.fetchone() == (1,)
                    close_old_connections()
                    turns[number] += 1
                connection.close()

            mariadb_pair[1].kill()
            other.breaker.open()
            with running(*[lambda n=n: requests(n) for n in range(8)]):
                try:
                    evenly.wait(60)
                    until(lambda: one.connections == 8 and min(turns) > 3)
                    mariadb_pair[1].start()
                    begun = clock()
                    other.breaker.close()
                    for _ in range(12):
                        before = other.connections
                        clock.advance(7.5)
                        seen = list(turns)
                        until(lambda: all(now > n + 2 for now, n in zip(turns, seen)))  # noqa: B023
                        # One each REBALANCE / 4, and no more.
                        assert other.connections - before <= 1
                        if not db.group.rebalance.returns:
                            break
                    assert (one.connections, other.connections) == (4, 4)
                    assert clock() - begun >= 30
                finally:
                    stop.set()
            moves = [event for event in told if isinstance(event, ConnectionReplaced)]
            assert len(moves) == 4
            assert {(event.successor, event.forced) for event in moves} == {("peer1", False)}


class TestAge:
    """CONN_MAX_AGE, give or take a tenth."""

    @pytest.mark.parametrize(
        ("age", "draws", "expected"),
        [
            # Connections made at one moment do not end at one moment.
            (1000, [0.0, 0.5, 1.0], [900, 1000, 1100]),
            # For ever stays for ever, and at once at once.
            (None, [0.0], [None]),
            (0, [1.0], [0]),
        ],
    )
    def test_spread(
        self, mariadb_pair: tuple[Node, Node], age: Any, draws: list[float], expected: list[Any]
    ) -> None:
        with engine([mysql_peer(node) for node in mariadb_pair], CONN_MAX_AGE=age) as connection:
            left = list(draws)
            balancers["balanced"].group.draw = lambda: left.pop(0)
            for seconds in expected:
                connection.close()
                before = time.monotonic()
                connection.ensure_connection()
                if seconds is None:
                    assert connection.close_at is None
                else:
                    assert before + seconds <= connection.close_at <= time.monotonic() + seconds

    def test_ends(self, mariadb_pair: tuple[Node, Node]) -> None:
        """A connection that is older than it may become is closed, as Django does it."""
        with engine([mysql_peer(node) for node in mariadb_pair], CONN_MAX_AGE=1000) as connection:
            connection.ensure_connection()
            close_old_connections()
            assert connection.connection is not None
            connection.close_at = time.monotonic() - 1
            close_old_connections()
            assert connection.connection is None
