"""The status page's timeline: what is kept of the peers, and where it is drawn."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

from django_proxysql.core.circuit import CLOSED, HALF_OPEN, OPEN
from django_proxysql.core.events import Connected, ConnectFailed, PeerDrained
from django_proxysql.core.faults import Fault
from django_proxysql.monitoring import history
from django_proxysql.monitoring.history import (
    DRAINED,
    MOST_CHANGES,
    SPAN,
    SUSPECT,
    Change,
    History,
)
from django_proxysql.monitoring.timeline import NARROWEST, UNKNOWN, draw, spans, ticks
from django_proxysql.registry import balancers
from tests.children import in_child
from tests.engine import SQLITE, Clock, engine, sqlite_peer
from tests.fakes import holding, running, until
from tests.test_locks import at_every_line


class World:
    """A balancer of two peers, its clock, and a history that began just now."""

    def __init__(self, balancer: Any, clock: Clock) -> None:
        self.balancer = balancer
        self.clock = clock
        self.history = History(clock)
        self.began = clock.now
        balancer.add_listener(self.history, connects=False)

    def changes(self, peer: str = "peer0") -> list[tuple[float, str]]:
        """What is kept of a peer, in seconds since the history began."""
        return [(at - self.began, state) for at, state in self.history.of("balanced", peer)[0]]


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    clock = Clock()
    peers = [sqlite_peer(tmp_path / name) for name in "ab"]
    with engine(peers, PEER_ENGINE=SQLITE, clock=clock):
        yield World(balancers["balanced"], clock)


class TestHistory:
    def test_life_of_a_peer(self, world: World) -> None:
        """Each change is kept, with the moment of its event."""
        breaker = world.balancer.peers["peer0"].breaker
        world.clock.advance(10)
        breaker.open()
        world.clock.advance(30)
        breaker.close()
        world.clock.advance(5)
        world.balancer.drain("peer0")
        world.clock.advance(5)
        world.balancer.undrain("peer0")
        assert world.changes() == [
            (0, CLOSED),
            (10, OPEN),
            (40, CLOSED),
            (45, DRAINED),
            (50, CLOSED),
        ]
        assert world.changes("peer1") == []

    def test_what_happened_before_it_looked(self, world: World) -> None:
        """A peer that is out when it is first looked at is known to have been so since."""
        world.balancer.remove_listener(world.history)
        world.clock.advance(10)
        world.balancer.peers["peer0"].breaker.open()
        world.clock.advance(20)
        world.history.look_at(world.balancer)
        assert world.changes() == [(0, CLOSED), (10, OPEN)]
        assert world.changes("peer1") == [(0, CLOSED)]
        late = History(world.clock)
        late.look_at(world.balancer)
        assert late.of("balanced", "peer0")[0] == [Change(world.began + 10, OPEN)]

    def test_states_that_no_event_tells_of(self, world: World) -> None:
        """A look finds them, and the trial that ends a doubt has its event."""
        breaker = world.balancer.peers["peer0"].breaker
        breaker.suspect("lost")
        world.history.look_at(world.balancer)
        world.clock.advance(1)
        permit = breaker.acquire()
        permit.succeeded()
        world.history(Connected("balanced", "peer0", "", 0.1, True))
        breaker.half_open()
        assert [state for _, state in world.changes()] == [CLOSED, SUSPECT, CLOSED, HALF_OPEN]

    def test_trials(self, world: World) -> None:
        """Those that were made in the last hour, and what the peer said."""
        for error in ("gone", ""):
            event: Any = Connected("balanced", "peer0", "", 0.1, True)
            if error:
                event = ConnectFailed(
                    "balanced", "peer0", "", 0.1, True, Fault.UNREACHABLE, error, 1, False
                )
            world.history(event)
            world.clock.advance(SPAN / 2 + 1)
        world.history(ConnectFailed("balanced", "peer0", "", 1, False, Fault.LOST, "x", 1, False))
        assert [trial[1:] for trial in world.history.of("balanced", "peer0")[1]] == [(True, "")]

    def test_forgets_what_is_older_than_an_hour(self, world: World) -> None:
        """But for what a peer was at the beginning of that hour."""
        breaker = world.balancer.peers["peer0"].breaker
        breaker.open()
        world.clock.advance(10)
        breaker.close()
        world.clock.advance(SPAN)
        world.balancer.drain("peer0")
        assert world.changes() == [(10, CLOSED), (10 + SPAN, DRAINED)]

    def test_is_bounded(self, world: World) -> None:
        """However often a peer comes and goes."""
        for _ in range(MOST_CHANGES):
            world.balancer.drain("peer0")
            world.balancer.undrain("peer0")
            world.history(Connected("balanced", "peer0", "", 0.1, True))
        assert len(world.changes()) == MOST_CHANGES
        assert len(world.history.of("balanced", "peer0")[1]) < MOST_CHANGES

    def test_strangers(self, world: World) -> None:
        """Events of a balancer or a peer that is not there, or of no peer, are none of its."""
        world.history(PeerDrained("another", "peer0", "", 0))
        world.history(PeerDrained("balanced", "peer9", "", 0))
        assert world.changes("peer0") == world.changes("peer9") == []

    def test_listeners_threads_that_overtake_one_another(self, world: World) -> None:
        """The state is read from the circuit: the last note is right, whichever thread makes it."""
        breaker = world.balancer.peers["peer0"].breaker
        world.balancer.remove_listener(world.history)
        breaker.open()
        breaker.close()
        late = PeerDrained("balanced", "peer0", "", 0)
        world.history(late)
        assert world.changes()[-1][1] == CLOSED

    def test_threads(self, world: World) -> None:
        """Many at once leave a history in the order of time, with no state twice in a row."""
        end = threading.Event()

        def flap() -> None:
            while not end.is_set():
                world.clock.advance(0.001)
                world.balancer.drain("peer0", force=True)
                world.balancer.undrain("peer0")

        with running(*[flap] * 4):
            until(lambda: len(world.changes()) >= 200)
            end.set()
        world.history.look_at(world.balancer)
        states = [state for _, state in world.changes()]
        assert all(one != other for one, other in zip(states, states[1:]))
        assert states[-1] == CLOSED

    def test_signal_handlers_at_every_line(self, world: World) -> None:
        """One that causes an event while its thread looks, or notes another."""
        trial = ConnectFailed("balanced", "peer0", "", 0.1, True, Fault.LOST, "lost", 1, False)

        def note_and_look() -> None:
            world.history(trial)
            world.history.of("balanced", "peer0")
            world.history.count("balanced", ConnectFailed)

        assert at_every_line(note_and_look, history.__file__) > 20

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
    @pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
    def test_fork_while_another_thread_is_at_it(self) -> None:
        """The child's history goes on from its parent's, on a free lock."""
        lock = history.history._lock
        with holding(lock):
            assert in_child(lambda: history.history._lock.acquire(blocking=False)) == "True"


def utc(moment: float) -> datetime:
    return datetime.fromtimestamp(moment, tz=timezone.utc)


@pytest.mark.parametrize(
    ("changes", "shown"),
    [
        pytest.param(
            [(50, CLOSED), (120, OPEN), (150, CLOSED)],
            [(100, 120, CLOSED), (120, 150, OPEN), (150, 200, CLOSED)],
            id="without a gap",
        ),
        pytest.param(
            [(150, CLOSED)],
            [(100, 150, UNKNOWN), (150, 200, CLOSED)],
            id="unknown before the first",
        ),
        pytest.param([], [(100, 200, UNKNOWN)], id="nothing known"),
        pytest.param([(100, CLOSED), (200, OPEN)], [(100, 200, CLOSED)], id="at the edges"),
        pytest.param(
            [(90, OPEN), (90, CLOSED), (250, OPEN)], [(100, 200, CLOSED)], id="beyond the edges"
        ),
        # Neither it nor what it parted leaves a trace.
        pytest.param(
            [(0, CLOSED), (150, OPEN), (150, CLOSED)], [(100, 200, CLOSED)], id="lasted no time"
        ),
    ],
)
def test_spans_cover_the_time(changes: Any, shown: Any) -> None:
    assert spans(changes, 100, 200) == shown


class TestDraw:
    def test_places(self) -> None:
        """In percent of the width, written with a point in whatever language."""
        timeline = draw([("db1", spans([(900.0, OPEN)], 0, 3600), [])], 0, 3600, utc)
        (row,) = timeline.rows
        assert [(bar.x, bar.width, bar.state) for bar in row.bars] == [
            ("0.000%", "25.000%", UNKNOWN),
            ("25.000%", "75.000%", OPEN),
        ]
        assert row.bars[1].text == "db1: open, 00:15:00 to 01:00:00"

    @pytest.mark.parametrize("at", [0.0, 1800.0, 3599.0])
    def test_a_blip_is_to_be_seen(self, at: float) -> None:
        """It is drawn last, wide enough, and within the drawing."""
        changes = [(0.0, CLOSED), (at, OPEN), (at + 0.5, CLOSED)]
        timeline = draw([("db1", spans(changes, 0, 3600), [])], 0, 3600, utc)
        bar = timeline.rows[0].bars[-1]
        assert bar.state == OPEN
        assert float(bar.width[:-1]) == NARROWEST
        assert float(bar.x[:-1]) + float(bar.width[:-1]) <= 100

    def test_rows_are_below_one_another(self) -> None:
        timeline = draw([(name, [], []) for name in "abc"], 0, 3600, utc)
        assert [row.y for row in timeline.rows] == [0, 42, 84]
        assert timeline.axis_y == 126

    def test_trials(self) -> None:
        """Dots that say when, and what the peer said; those of before are left out."""
        trials = [(-1.0, False, "old"), (1800.0, False, "gone"), (3600.0, True, "")]
        marks = draw([("db1", [], trials)], 0, 3600, utc).rows[0].marks
        assert marks == [
            ("50.000%", False, "00:30:00, a trial failed: gone"),
            ("100.000%", True, "01:00:00, a trial succeeded"),
        ]

    @pytest.mark.parametrize("minutes", [0, 330, 345, -570])
    def test_ticks_are_at_full_ten_minutes_of_the_local_time(self, minutes: int) -> None:
        """In zones that are no whole hours away, too; and none where its text would be cut off."""
        zone = timezone(timedelta(minutes=minutes))
        found = ticks(1000.0, 4600.0, lambda at: datetime.fromtimestamp(at, tz=zone))
        assert len(found) >= 5
        assert all(text.endswith("0") for _, text in found)
        assert all(5 <= float(x[:-1]) <= 95 for x, _ in found)
