"""What circuits promise a crowd: threads, forks, and asynchronous exceptions."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from django_proxysql import Fault, LoadBalancer, NoPeerAvailable, PeerBreaker
from django_proxysql.core import search
from django_proxysql.core.events import CircuitOpened
from django_proxysql.core.logs import log_event
from django_proxysql.core.runtime import new_lock
from tests.children import in_child
from tests.fakes import (
    Clock,
    Connection,
    Driver,
    RunningClock,
    even,
    holding,
    in_thread,
    lock_is_free,
    peers,
    raised_by,
    refused_by_host,
    running,
)
from tests.strikes import CIRCUITS, CONNECTING, Injected, strikes
from tests.test_balancer import InOrder


class Gate:
    """A driver's connect() that counts how many trials are inside at once."""

    def __init__(self, works: Callable[[], bool]) -> None:
        self.works = works
        # A thread that is interrupted here is not to keep it either.
        self.lock = new_lock()
        self.trials = 0
        self.most_trials = 0
        self.trials_made = 0

    def open_one(self, attempt: Any) -> Connection:
        if attempt.is_trial:
            with self.lock:
                self.trials += 1
                self.trials_made += 1
                self.most_trials = max(self.most_trials, self.trials)
            # Give the others every chance to come in as well.
            for _ in range(3):
                time.sleep(0)
        try:
            if not self.works():
                raise refused_by_host()
            return Connection(attempt.peer.name)
        finally:
            if attempt.is_trial:
                with self.lock:
                    self.trials -= 1


def openings(db: LoadBalancer) -> list[CircuitOpened]:
    """Return a list that gets each opening."""
    told: list[CircuitOpened] = []
    db.add_listener(lambda event: told.append(event) if type(event) is CircuitOpened else None)
    return told


@pytest.mark.usefixtures("hurried")
class TestHammering:
    @pytest.mark.parametrize("success_threshold", [1, 3])
    @pytest.mark.parametrize("suspicions", [False, True], ids=["", "suspicions"])
    def test_never_two_trials_at_once(self, success_threshold: int, suspicions: bool) -> None:
        clock = RunningClock()
        turn = random.Random(3)
        gate = Gate(lambda: turn.random() < 0.5)
        db = LoadBalancer(
            peers("flapping"),
            breaker={"success_threshold": success_threshold},
            clock=clock,
            # A trial's lease is as long: longer than all threads together let the clock jump,
            # while the one that makes the trial does not get to run.
            connect_deadline=20_000,
        )
        circuit = db.peers["flapping"].breaker
        opened = openings(db)
        rounds = iter(range(100_000))

        def hammer() -> None:
            for number in rounds:
                if number >= 2500 and gate.trials_made > 50 and len(opened) > 5:
                    # How many trials come about is the scheduler's: until it is enough.
                    return
                raised_by(lambda: db.connect(gate.open_one))
                if suspicions and number % 7 == 0:
                    circuit.suspect("lost", Fault.LOST)
                if number % 5 == 0:
                    clock.advance(1)

        with running(*[hammer] * 64):
            pass
        assert gate.most_trials == 1
        assert gate.trials_made > 50
        assert len(opened) > 5
        assert lock_is_free(circuit)

    def test_burst_of_failures_opens_once(self, caplog: pytest.LogCaptureFixture) -> None:
        """64 threads connect and fail at once: the circuit opens once, and the log has one line."""
        barrier = threading.Barrier(64)

        def open_one(attempt: Any) -> Connection:
            if attempt.peer.name == "db1":
                barrier.wait(60)
                raise refused_by_host()
            return Connection(attempt.peer.name)

        db = LoadBalancer(peers("db1", "db2"), strategy=InOrder, clock=Clock())
        told = openings(db)
        got: list[str] = []
        with running(*[lambda: got.append(db.connect(open_one).host)] * 64):
            pass
        assert got == ["db2"] * 64
        assert len(told) == 1
        assert db.peers["db1"].breaker.fail_counter == 1
        assert [record.levelname for record in caplog.records] == ["WARNING"]

    def test_burst_over_fail_max(self) -> None:
        """With fail_max 10, 64 failures at once count to ten, each number once, and no further."""
        circuit = PeerBreaker(fail_max=10, clock=Clock())
        permits = [circuit.acquire() for _ in range(64)]
        counts: list[int] = []
        with running(
            *[lambda permit=permit: counts.append(permit.failed(OSError())) for permit in permits]
        ):
            pass
        assert sorted(counts) == [0] * 54 + list(range(1, 11))

    def test_view_is_never_left_behind(self) -> None:
        db = LoadBalancer(peers("db1", "db2", "db3"), clock=Clock())
        circuits = [peer.breaker for peer in db.peers.values()]

        def change(seed: int) -> None:
            draw = random.Random(seed)
            for _ in range(150):
                one = draw.choice(circuits)
                draw.choice([one.open, one.close, one.half_open, one.suspect, db.group.view])()

        for attempt in range(4):
            with running(*[lambda seed=attempt * 8 + n: change(seed) for n in range(8)]):
                pass
            view = db.group.view()
            in_use = {peer.name for tier in view.tiers for peer in tier}
            assert in_use == {p.name for p in db.peers.values() if p.breaker.is_available}
            assert {p.name for p in view.suspects} == {
                p.name for p in db.peers.values() if p.breaker.circuit.suspect
            }


@pytest.mark.skipif(not hasattr(os, "fork"), reason="fork is Unix's")
class TestFork:
    def test_while_another_thread_holds_the_lock(self) -> None:
        """A child made while the parent holds a circuit's lock connects, by a trial even."""
        clock = Clock()
        driver = Driver()
        db = LoadBalancer(peers("db1"), driver.connect, clock=clock, jitter=even)
        circuit = db.peers["db1"].breaker
        circuit.open()
        clock.advance(30)
        with holding(circuit._lock):
            assert in_child(lambda: db.connect().host + circuit.current_state) == "db1closed"
        assert circuit.current_state == "open"

    @pytest.mark.parametrize("suspect", [False, True])
    def test_while_a_trial_is_under_way(self, suspect: bool) -> None:
        """The parent's trial is none of the child's: the child makes its own at once."""
        clock = Clock()
        db = LoadBalancer(peers("db1"), Driver().connect, clock=clock, jitter=even)
        circuit = db.peers["db1"].breaker
        circuit.suspect() if suspect else circuit.open()
        clock.advance(30)
        trial = circuit.acquire()
        assert trial.is_trial

        def work() -> str:
            before = circuit.current_state
            host = db.connect().host
            # The parent's; the child has no part in it.
            trial.failed(OSError())
            return f"{before} {host} {circuit.current_state}"

        assert in_child(work) == f"{'closed' if suspect else 'open'} db1 closed"
        assert circuit.trial is not None
        trial.succeeded()
        assert circuit.current_state == "closed"

    def test_child_keeps_what_is_known_and_no_connections(self) -> None:
        db = LoadBalancer(peers("db1", "db2"), Driver().connect, clock=Clock())
        connection = db.connect()
        db.peers["db1"].breaker.open()

        def work() -> str:
            states = " ".join(state.state for state in db.snapshot())
            return states + str([peer.connections for peer in db.peers.values()])

        assert in_child(work) == "open closed[0, 0]"
        assert sum(peer.connections for peer in db.peers.values()) == 1
        assert connection

    @pytest.mark.parametrize("strategy", ["random", "round_robin", "least_connections"])
    def test_children_do_not_choose_their_peers_alike(self, strategy: str) -> None:
        """Each makes a connection or two: all would lead to one peer."""
        names = [f"db{number}" for number in range(1000)]
        db = LoadBalancer(peers(*names), Driver().connect, strategy=strategy)
        # By chance, three are alike once in a million.
        assert len({in_child(lambda: db.connect().host) for _ in range(3)}) > 1


#: What a test does with a balancer.
Scene = Callable[[LoadBalancer], object]


def failing_at_times(seed: int) -> tuple[RunningClock, Gate, LoadBalancer]:
    clock, turn = RunningClock(), random.Random(seed)
    db = LoadBalancer(peers("db1", "db2"), clock=clock, connect_deadline=0.01)
    # A thread that is killed where logging has just taken a handler's lock keeps it
    # for ever, whichever thread writes the line.
    db.remove_listener(log_event)
    return clock, Gate(lambda: turn.random() < 0.6), db


def works_again(db: LoadBalancer, clock: Clock, after: float = 1000) -> None:
    """Assert that nothing is stuck: locks free, each peer available ``after`` so many seconds.

    1000 is beyond every lease and every interval.
    """
    for peer in db.peers.values():
        assert lock_is_free(peer.breaker)
    clock.advance(after)
    for _ in range(3):
        assert in_thread(lambda: db.connect(lambda attempt: attempt.peer.name)) in db.peers

    def connect_to(peer: Any) -> Any:
        # A suspect peer comes last: no caller would come by while another one works.
        with db.pinned(peer):
            return db.connect(lambda attempt: attempt.peer.name)

    for name, peer in db.peers.items():
        assert in_thread(lambda: connect_to(peer)) == name  # noqa: B023
        assert peer.breaker.is_available, name
        assert peer.breaker.trial is None
    view = db.group.view()
    assert {peer.name for tier in view.tiers for peer in tier} == set(db.peers)


def connecting(*down: str) -> Scene:
    def open_one(attempt: Any) -> str:
        if attempt.peer.name in down:
            raise refused_by_host()
        return str(attempt.peer.name)

    return lambda db: db.connect(open_one)


def suspected(db: LoadBalancer) -> object:
    for peer in db.peers.values():
        peer.breaker.suspect("lost", Fault.LOST)
    return connecting("db1")(db)


def released(db: LoadBalancer) -> object:
    return raised_by(lambda: db.connect(lambda attempt: 1 / 0))


def guarded(db: LoadBalancer) -> object:
    with db.peers["db1"].breaker.calling():
        pass
    return db.peers["db1"].breaker.call(lambda: 1 / 0)


#: What is done, and whether the peers are out and their trials due.
SCENES: dict[str, tuple[Scene, bool]] = {
    "connecting": (connecting(), False),
    "failing over": (connecting("db1"), False),
    "all down": (connecting("db1", "db2"), False),
    "trials, good": (connecting(), True),
    "trials, bad": (connecting("db1", "db2"), True),
    "suspects": (suspected, False),
    "trial released": (released, True),
    "guarded calls": (guarded, False),
    "guarded trial": (guarded, True),
}


def prepared(name: str) -> tuple[LoadBalancer, Clock, Callable[[], object]]:
    """Return a balancer as the scene begins, its clock, and what is done."""
    scene, out = SCENES[name]
    clock = Clock()
    db = LoadBalancer(peers("db1", "db2"), clock=clock, jitter=even)
    db.remove_listener(log_event)
    if out:
        for peer in db.peers.values():
            peer.breaker.open()
        clock.advance(30)
    return db, clock, lambda: scene(db)


@pytest.mark.usefixtures("strikes_are_silent")
class TestAsynchronousExceptions:
    @pytest.mark.usefixtures("hurried")
    def test_thrown_into_threads_that_hammer(self) -> None:
        """Threads that are hit anywhere leave circuits that work: no lock lost, no trial stuck."""
        clock, gate, db = failing_at_times(5)
        stop = threading.Event()

        def hammer() -> None:
            while not stop.is_set():
                try:
                    while not stop.is_set():
                        try:
                            db.connect(gate.open_one)
                        except (Exception, Injected):
                            clock.advance(0.5)
                        db.peers["db1"].breaker.suspect()
                except Injected:
                    pass

        def victim() -> None:
            with contextlib.suppress(Injected):
                hammer()

        threads = [threading.Thread(target=victim, daemon=True) for _ in range(8)]
        for thread in threads:
            thread.start()
        throw = ctypes.pythonapi.PyThreadState_SetAsyncExc
        aim = random.Random(6)
        for _ in range(1500):
            number = aim.randrange(8)
            if not threads[number].is_alive():
                threads[number] = threading.Thread(target=victim, daemon=True)
                threads[number].start()
            throw(ctypes.c_ulong(threads[number].ident or 0), ctypes.py_object(Injected))
            time.sleep(aim.random() / 5000)
        stop.set()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()
        works_again(db, clock)

    def test_by_a_signal(self) -> None:
        """The same for a signal handler that raises, as Ctrl-C's and alarm's do."""
        clock, gate, db = failing_at_times(7)
        armed = False

        def strike(*args: Any) -> None:
            nonlocal armed
            if armed:
                armed = False
                raise Injected

        # Of its own time, which is what the timer goes by.
        until = time.process_time() + 20

        def hammer() -> None:
            """Connect until struck. (A function: where a loop jumps back no ``try`` may hold.)"""
            nonlocal armed
            while time.process_time() < until:
                armed = True
                try:
                    db.connect(gate.open_one)
                except Exception as exc:
                    if isinstance(exc, NoPeerAvailable):
                        clock.advance(0.5)
                db.peers["db2"].breaker.suspect()
            raise AssertionError("not struck 250 times in 20 seconds")

        # Not SIGALRM, which is pytest-timeout's.
        before = signal.signal(signal.SIGVTALRM, strike)
        try:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0.0005, 0.00037)
            for _ in range(250):
                with contextlib.suppress(Injected):
                    hammer()
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            signal.signal(signal.SIGVTALRM, before)
        works_again(db, clock)

    @pytest.mark.parametrize("name", list(SCENES))
    def test_circuits_work_after_one_at_any_line_of_the_core(self, name: str) -> None:
        gc.disable()
        try:
            for strike in strikes(CONNECTING, least=25):
                db, clock, scene = prepared(name)
                strike.hits(scene)
                try:
                    # The failures of a scene count: those peers are left alone for longer.
                    works_again(db, clock, after=33 if "bad" in name or "down" in name else 1)
                except AssertionError as exc:
                    raise AssertionError(f"after an exception at {strike.where}") from exc
        finally:
            gc.enable()

    @pytest.mark.parametrize("error", [Injected, RecursionError, MemoryError])
    @pytest.mark.parametrize("end", ["succeeded", "failed", "released"])
    @pytest.mark.parametrize("suspect", [False, True])
    def test_trial_whose_end_is_interrupted_is_over(
        self, end: str, error: type[BaseException], suspect: bool
    ) -> None:
        """At whichever line: the next trial is made at once or after release_interval.

        The traceback is kept, and the permit with it: nothing is left to the garbage collector.
        """
        kept: list[BaseException] = []
        for strike in strikes(CIRCUITS, error, least=10, kept=kept):
            clock = Clock()
            circuit = PeerBreaker(clock=clock, jitter=even, lease=31, reset_timeout=30)
            if suspect:
                circuit.suspect()
            else:
                circuit.open()
                clock.advance(30)
            permit = circuit.acquire()
            assert permit is not None
            arguments = [refused_by_host()] if end == "failed" else []
            strike.hits(functools.partial(getattr(permit, end), *arguments))
            if not permit._ended:
                # Before it had begun to end.
                kept.clear()
                del permit
            assert circuit.trial is None, strike.where
            clock.advance(31 if circuit.circuit.failures else 1)
            assert circuit.acquire() is not None, strike.where

    @pytest.mark.parametrize("works", [True, False])
    def test_interrupted_connect_leaves_no_trial_and_no_caller_spins(
        self, works: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The next connect is made after a second, within two looks at the peers."""
        looks: list[int] = []
        once_over = search.Search._left_over

        def counted(self: Any, view: Any) -> Any:
            looks.append(1)
            return once_over(self, view)

        monkeypatch.setattr(search.Search, "_left_over", counted)
        kept: list[BaseException] = []
        for strike in strikes(CONNECTING, least=50, kept=kept):
            clock = Clock()
            db = LoadBalancer(peers("db1"), clock=clock, jitter=even)
            db.remove_listener(log_event)
            db.peers["db1"].breaker.open()
            clock.advance(30)
            strike.hits(functools.partial(db.connect, lambda _: works or fail_as_host()))
            # What was struck before anybody had the permit is the garbage collector's.
            kept.clear()
            clock.advance(1)
            looks.clear()
            assert db.connect(lambda _: "connected") == "connected", strike.where
            assert len(looks) <= 2, strike.where

    def test_connect_after_one_that_hit_the_recursion_limit_is_made(
        self, request: pytest.FixtureRequest
    ) -> None:
        def nested(depth: int, function: Callable[[], object]) -> object:
            return function() if depth == 0 else nested(depth - 1, function)

        left: list[tuple[bool, int]] = []
        # Each of the collections below goes through what is made from here on.
        gc.collect()
        request.addfinalizer(gc.unfreeze)
        gc.freeze()
        frame, here = sys._getframe(), 0
        while frame is not None:
            here, frame = here + 1, frame.f_back  # type: ignore[assignment]
        limit = sys.getrecursionlimit()
        for works in (True, False):
            for room in range(5, 60):
                clock = Clock()
                db = LoadBalancer(
                    peers("db1"),
                    lambda works=works, **_: Connection("db1") if works else fail_as_host(),
                    clock=clock,
                )
                db.peers["db1"].breaker.open()
                clock.advance(40)
                sys.setrecursionlimit(here + 100)
                try:
                    nested(100 - room, db.connect)
                except (RecursionError, NoPeerAvailable):
                    pass
                finally:
                    sys.setrecursionlimit(limit)
                gc.collect()
                if db.peers["db1"].breaker.trial is not None:
                    left.append((works, room))
        assert left == []

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="fork is Unix's")
    @pytest.mark.parametrize("name", ["trials, bad", "suspects"])
    def test_child_made_at_any_line_connects_at_once(self, name: str) -> None:
        db, clock, scene = prepared(name)
        files = set(CONNECTING)
        made: dict[tuple[str, int], str] = {}

        def work() -> str:
            sys.settrace(None)
            # Beyond every interval, but not beyond a lease: the parent's are none of the child's.
            clock.advance(30)
            with db.pinned(db.peers["db1"]):
                first = db.connect(lambda attempt: attempt.peer.name)
            with db.pinned(db.peers["db2"]):
                second = db.connect(lambda attempt: attempt.peer.name)
            usable = [peer.breaker.is_available for peer in db.peers.values()]
            return f"{first} {second} {all(usable)}"

        def trace(frame: Any, event: str, arg: Any) -> Any:
            if frame.f_code.co_filename not in files:
                return None
            at = frame.f_code.co_name, frame.f_lineno
            if event == "line" and at not in made:
                sys.settrace(None)
                made[at] = in_child(work)
                assert made[at] == "db1 db2 True", at
                sys.settrace(trace)
            return trace

        gc.collect()
        sys.settrace(trace)
        try:
            raised = raised_by(scene)
        finally:
            sys.settrace(None)
        assert not isinstance(raised, AssertionError), raised
        assert len(made) > 50


def fail_as_host() -> None:
    raise refused_by_host()
