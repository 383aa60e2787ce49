"""TRIALS "background": trials are made off the request, by one thread a process."""

from __future__ import annotations

import _thread
import functools
import gc
import logging
import os
import threading
import weakref
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
from django.db import connections
from django.db.backends.signals import connection_created

from django_proxysql import Fault, LoadBalancer, NotReady, balancers
from django_proxysql.core import runtime, trials
from django_proxysql.core.events import CircuitClosed, Connected, ConnectFailed
from django_proxysql.core.exceptions import ConfigError
from django_proxysql.core.logs import log_event
from django_proxysql.core.trials import TrialWorker, trial_worker
from tests.children import in_child
from tests.engine import POSTGRESQL, engine, mysql_peer
from tests.engine import Clock as EngineClock
from tests.fakes import (
    Clock,
    Driver,
    bad_password,
    even,
    peers,
    refused_by_host,
    running,
    too_many,
    until,
)
from tests.servers.mariadb import Node
from tests.strikes import Injected, Strike, strikes
from tests.test_balancer import World

Pair = tuple[Node, Node]


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Iterator[TrialWorker]:
    """A worker of the test's own; its thread has ended when the test has."""
    made = TrialWorker()
    monkeypatch.setattr("django_proxysql.core.balancer.trial_worker", made)
    monkeypatch.setattr("django_proxysql.registry.trial_worker", made)
    yield made
    for db in list(made._scheduled):
        for peer in db.peers.values():
            peer.breaker.close()
    until(lambda: not made.is_running)


@pytest.fixture
def stalled(worker: TrialWorker, monkeypatch: pytest.MonkeyPatch) -> Iterator[TrialWorker]:
    """The same, whose threads never get to run, as in uWSGI without threads."""
    never: list[Any] = []
    monkeypatch.setattr(_thread, "start_new_thread", lambda *args: never.append(args))
    yield worker
    worker._life = None
    monkeypatch.setattr(worker, "start", lambda: None)


def background(*names: str, **options: Any) -> World:
    return World(*names, trials="background", **options)


def with_due_trial(*names: str, **options: Any) -> World:
    """Return such a balancer whose first peer is out, and its trial due."""
    world = background(*(names or ("db1", "db2")), **options)
    world.open(next(iter(world.db.peers)))
    world.clock.advance(30)
    return world


def silent(endpoints: dict[str, Any], connect: Any, clock: Clock) -> LoadBalancer:
    """Return a balancer whose many openings are not logged."""
    db = LoadBalancer(endpoints, connect, clock=clock, jitter=even, trials="background")
    db.remove_listener(log_event)
    return db


@pytest.mark.usefixtures("stalled")
class TestStep:
    """What is tried and when, on a clock that stands still."""

    def test_trial_is_the_threads(self, stalled: TrialWorker) -> None:
        """A request passes by a peer whose trial is due; the thread makes it, and says when."""
        world = background("db1", "db2")
        world.open("db1")
        assert stalled.step() == 30
        world.clock.advance(29)
        assert stalled.step() == 1
        world.clock.advance(1)
        assert world.hosts() == ["db2"]
        assert stalled.step() is None
        assert world.driver.hosts == ["db2", "db1"]
        assert world.states() == "closed closed"
        # What it opens is closed again, and reported as a trial.
        assert [made.closed for made in world.driver.made] == [False, True]
        assert [event.trial for event in world.told(Connected)] == [False, True]
        assert len(world.told(CircuitClosed)) == 1

    def test_fails_to_close(self, stalled: TrialWorker) -> None:
        """What closing the trial's connection raises says nothing about the peer."""

        class Stubborn:
            def close(self) -> None:
                raise OSError("closed already")

        world = with_due_trial()
        world.db._connect = lambda **params: Stubborn()
        assert stalled.step() is None

    def test_fails_again(self, stalled: TrialWorker) -> None:
        """A trial that fails opens the circuit for another interval."""
        world = with_due_trial()
        world.driver.down["db1"] = refused_by_host
        assert stalled.step() == 30
        assert world.driver.hosts == ["db1"]
        assert [event.trial for event in world.told(ConnectFailed)] == [True]
        assert stalled.step() == 30
        assert world.driver.hosts == ["db1"]

    def test_suspect(self, stalled: TrialWorker) -> None:
        """A doubt is cleared at once; no request does it while there are others."""
        world = background("db1", "db2")
        world.db.peers["db1"].breaker.suspect("lost", Fault.LOST)
        world.clock.advance(5)
        assert world.hosts() == ["db2"]
        assert stalled.step() is None
        assert world.hosts() == ["db1"]
        assert world.told(CircuitClosed) == []

    def test_success_threshold(self, stalled: TrialWorker) -> None:
        """As many good trials as are wanted are made one after the other."""
        world = with_due_trial(breaker={"success_threshold": 3})
        assert stalled.step() == 0
        assert stalled.step() == 0
        assert stalled.step() is None
        assert world.driver.hosts == ["db1"] * 3

    def test_question(self, stalled: TrialWorker) -> None:
        """READY_CHECK is asked in the trial."""
        asked: list[str] = []

        def check(connection: Any) -> None:
            asked.append(connection.host)
            raise NotReady("not yet")

        world = with_due_trial(ready_check=check)
        assert stalled.step() == 30
        assert asked == ["db1"]
        assert world.db.peers["db1"].breaker.circuit.fault is Fault.NOT_READY

    def test_drained(self, stalled: TrialWorker) -> None:
        """A drained peer is left alone, until it is undrained."""
        world = background("db1", "db2", "db3")
        world.open("db1")
        world.db.peers["db2"].breaker.suspect()
        world.db.drain("db1")
        world.db.drain("db2")
        world.clock.advance(30)
        assert stalled.step() is None
        assert world.driver.hosts == []
        world.db.undrain("db1")
        world.db.undrain("db2")
        assert stalled.is_running
        assert stalled.step() is None
        assert sorted(world.driver.hosts) == ["db1", "db2"]

    def test_no_circuit_closed(self, stalled: TrialWorker) -> None:
        """With no circuit closed, peers are tried each LAST_RESORT_INTERVAL."""
        world = background("db1", "db2", last_resort_interval=2)
        world.driver.down.update(db1=refused_by_host, db2=refused_by_host)
        world.open("db1", "db2")
        assert stalled.step() == 2
        world.clock.advance(2)
        assert stalled.step() == 2
        assert world.driver.hosts == ["db1", "db2"]
        world.clock.advance(2)
        world.driver.down.pop("db2")
        # With one of them back the other's interval holds again.
        assert stalled.step() == 30

    def test_no_last_resort(self, stalled: TrialWorker) -> None:
        """LAST_RESORT_INTERVAL None: the whole interval, and 0: not in a spin."""
        world = background("db1", last_resort_interval=None)
        world.open("db1")
        assert stalled.step() == 30
        world = background("db1", last_resort_interval=0)
        world.driver.down["db1"] = refused_by_host
        world.open("db1")
        assert stalled.step() == 0.1
        assert world.driver.hosts == ["db1"]

    def test_worse_tier(self, stalled: TrialWorker) -> None:
        """A peer of a worse tier is tried, too: no request is sent there by that."""
        world = background(peers={"db1": {"host": "db1"}, "db2": {"host": "db2", "priority": 1}})
        world.open("db2")
        world.clock.advance(30)
        assert stalled.step() is None
        assert world.driver.hosts == ["db2"]

    def test_somebody_elses_trial(self, stalled: TrialWorker) -> None:
        """While a caller of calling() has the trial it is left alone, however long it takes."""
        world = with_due_trial()
        with world.db.peers["db1"].breaker.calling():
            assert stalled.step() == 31  # when its lease runs out
            assert world.driver.hosts == []
        assert stalled.step() is None

    def test_left_to_others(self, stalled: TrialWorker) -> None:
        """Where another process is to make the trial, this one comes back when it is due."""
        world = with_due_trial()
        world.db.peers["db1"].breaker.gate = lambda by_hand: 5
        assert stalled.step() == 5
        assert stalled.step() == 5
        assert world.driver.hosts == []
        world.db.peers["db1"].breaker.gate = lambda by_hand: 0
        world.clock.advance(5)
        assert stalled.step() is None
        assert world.driver.hosts == ["db1"]

    def test_each_balancers(self, stalled: TrialWorker) -> None:
        """One worker for all balancers that want one, each on its own clock and interval."""
        one = background("db1", "db2", name="one", check_interval=20)
        other = background("db1", "db2", name="other")
        inline = World("db1", "db2")
        for world in (one, other, inline):
            world.open("db1")
        assert stalled.step() == 20
        other.clock.advance(30)
        assert stalled.step() == 20
        assert other.driver.hosts == ["db1"]
        assert inline.driver.hosts == []

    def test_balancer_is_gone(self, stalled: TrialWorker) -> None:
        """A balancer that is not used any more is not kept for its peers' sake."""
        world = background("db1", "db2")
        world.open("db1")
        db = weakref.ref(world.db)
        del world
        gc.collect()
        assert db() is None
        assert stalled.step() is None

    @pytest.mark.parametrize(
        "error", [SystemExit(1), KeyboardInterrupt(), TypeError("a bug"), Injected()]
    )
    def test_own_bug(
        self, stalled: TrialWorker, error: BaseException, caplog: pytest.LogCaptureFixture
    ) -> None:
        """What a check raises that is no driver's error ends its trial; logged once a minute."""

        def check(connection: Any) -> None:
            raise error

        world = background("db1", "db2", ready_check=check)
        world.driver.down["db2"] = refused_by_host
        world.open("db1", "db2")
        world.clock.advance(30)
        caplog.set_level(logging.ERROR, "django_proxysql")
        caplog.clear()
        assert stalled.step() == 1
        assert world.driver.hosts == ["db1", "db2"]
        assert all(made.closed for made in world.driver.made)
        for _ in range(5):
            world.clock.advance(1)
            stalled.step()
        assert world.driver.hosts == ["db1", "db2"] * 6
        assert caplog.messages == ["The trial of default/db1 raised"]

    def test_not_the_peers_fault(self, stalled: TrialWorker) -> None:
        """A peer that is full is tried again soon, without a complaint."""
        world = with_due_trial()
        world.driver.down["db1"] = too_many
        assert stalled.step() == 1
        assert world.states() == "open closed"

    def test_refused_as_another(self, stalled: TrialWorker) -> None:
        """A refusal where another database is asked for than at first counts for nothing."""
        world = background("db1", "db2")
        world.driver.down["db1"] = bad_password
        world.db.asks_for_another = lambda: True
        world.db.peers["db1"].breaker.suspect()
        assert stalled.step() == 1
        assert world.states() == "closed closed"
        world.db.asks_for_another = False
        world.clock.advance(1)
        assert stalled.step() == 30
        assert world.states() == "open closed"


class TestRequests:
    """What connect() does beside it."""

    @pytest.mark.usefixtures("stalled")
    @pytest.mark.parametrize(("trouble", "overdue"), [("open", 90), ("suspect", 61)])
    def test_thread_does_not_run(self, trouble: str, overdue: int) -> None:
        """Trials that are overdue by two intervals are made by the callers that connect."""
        world = background("db1", "db2")
        getattr(world.db.peers["db1"].breaker, trouble)()
        world.clock.advance(overdue - 1)
        assert world.hosts() == ["db2"]
        world.clock.advance(1)
        assert world.hosts() == ["db1"]
        assert world.states() == "closed closed"

    def test_no_thread_can_be_started(
        self,
        worker: TrialWorker,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        monkeypatch.setattr(_thread, "start_new_thread", mock.Mock(side_effect=RuntimeError))
        background("db1", "db2").open("db1")
        assert not worker.is_running
        said = "No thread could be started for trials; requests make them"
        assert said in caplog.messages

    @pytest.mark.usefixtures("stalled")
    def test_last_resort(self) -> None:
        """A request that has no peer left tries those that are due, as without the thread."""
        world = with_due_trial()
        world.driver.down["db2"] = refused_by_host
        assert world.hosts() == ["db2", "db1"]
        assert world.states() == "closed open"

    @pytest.mark.parametrize("trials", ["inline", "background"])
    def test_no_request_waits_for_a_hanging_peer(self, worker: TrialWorker, trials: str) -> None:
        """While its trial hangs, requests connect elsewhere, and none makes it."""
        world = World("hangs", "db2", trials=trials)
        inside, go = threading.Event(), threading.Event()

        def hang() -> None:
            inside.set()
            assert go.wait(60)

        world.driver.down["hangs"] = hang
        world.open("hangs")
        world.clock.advance(30)
        if trials == "background":
            worker.schedule(world.db.group)
        with running(*[world.connect] if trials == "inline" else []):
            assert inside.wait(60)
            with running(*[lambda: [world.connect() for _ in range(50)]] * 7):
                pass
            assert world.driver.hosts == ["hangs"] + ["db2"] * 350
            go.set()
        until(lambda: world.states() == "closed closed")

    def test_wrong_setting(self) -> None:
        """Anything but the two words."""
        with pytest.raises(ConfigError, match="TRIALS is 'backgruond'"):
            LoadBalancer(peers("db1"), trials="backgruond")


@pytest.mark.usefixtures("strikes_are_silent")
class TestThread:
    def test_no_process_waits_for_it_at_its_end(self) -> None:
        # tests/test_worker.py has what follows from it.
        assert not TrialWorker.finishes

    def test_is_there_while_there_is_need(self, worker: TrialWorker) -> None:
        """It starts when the first circuit opens, and is gone when all are closed."""
        world = background("db1", "db2", "db3")
        assert not worker.is_running
        world.open("db1")
        world.open("db2")
        assert worker.is_running
        world.db.peers["db2"].breaker.close()
        assert worker.is_running
        world.clock.advance(30)
        worker.schedule(world.db.group)
        until(lambda: not worker.is_running)
        assert world.states() == "closed closed closed"
        world.open("db3")
        assert worker.is_running

    def test_inline_has_none(self, worker: TrialWorker) -> None:
        """Without the setting there is no thread."""
        world = World("db1", "db2")
        world.open("db1")
        world.hosts()
        assert worker._life is None

    @pytest.mark.usefixtures("hurried")
    def test_ends_while_circuits_open(self, worker: TrialWorker) -> None:
        """However its end meets the opening of a circuit, an open circuit has a thread."""
        db = silent(peers("db1", "db2", "db3"), Driver().connect, Clock())

        def open_and_await(name: str) -> None:
            circuit = db.peers[name].breaker
            for _ in range(150):
                circuit.open()
                # Its trial is due at once: without a thread, it would stay open.
                circuit.half_open()
                until(lambda: circuit.current_state == "closed")

        with running(*[lambda name=name: open_and_await(name) for name in db.peers]):
            pass
        until(lambda: not worker.is_running)

    @pytest.mark.parametrize("name", ["waits", "tries"])
    def test_killed_at_every_line(
        self, worker: TrialWorker, name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A thread that is killed at any line leaves no open circuit without a thread."""
        monkeypatch.setattr(runtime, "LOOK_AGAIN", 0.01)
        for strike in strikes([trials.__file__, runtime.__file__], least=30):
            clock = Clock()
            db = silent(peers("db1", "db2"), Driver().connect, clock)
            circuits = [peer.breaker for peer in db.peers.values()]
            strike.dooms_next_thread(monkeypatch)
            if name == "waits":
                circuits[0].open()
                # It may be killed between two looks at it.
                until(lambda: strike.where or getattr(worker._running, "ident", 0))  # noqa: B023
            else:
                circuits[0].suspect()
            # In trouble or not, what is out now is tried.
            circuits[1].open()
            clock.advance(30)
            db.connect(lambda attempt: attempt.peer.name)
            worker.schedule(db.group)
            until(functools.partial(all_tried, db, clock, strike))
            until(lambda: not worker.is_running)
            strike.wait()
            # It lives until the garbage is collected; the next thread would look after it, too.
            del worker._scheduled[db.group]


def all_tried(db: LoadBalancer, clock: Clock, strike: Strike) -> bool:
    # A trial that was killed is due again a second later.
    clock.advance(1)
    if strike.where.startswith(("_run", "_go_on")):
        # Before it could do anything, or as it left: who connects makes up for it.
        db.connect(lambda attempt: attempt.peer.name)
    return all(peer.breaker.is_available for peer in db.peers.values())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="fork is Unix's")
class TestForked:
    def test_child_starts_its_own(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A child has its parent's open circuits and no thread, until it connects."""
        world = background("db1", "db2")
        world.open("db1")
        assert trial_worker.is_running

        def work() -> str:
            before = trial_worker.is_running
            world.hosts()
            after = trial_worker.is_running
            world.clock.advance(30)
            until(lambda: world.states() == "closed closed")
            until(lambda: not trial_worker.is_running)
            return f"{before} {after} {world.driver.hosts}"

        assert in_child(work) == "False True ['db2', 'db1']"
        assert world.states() == "open closed"
        assert trial_worker.is_running
        world.db.peers["db1"].breaker.close()
        until(lambda: not trial_worker.is_running)


def await_trial(worker: TrialWorker, clock: EngineClock, peer: Any) -> None:
    """Return when a trial has taken the peer back.

    The time goes on and on: the thread may not be done with the trial before, and only then says
    when the next one is due.
    """

    def later() -> None:
        clock.advance(34)
        worker.schedule(balancers["balanced"].group)

    until(lambda: later() or peer.breaker.is_available)


class TestEngine:
    """Under Django, on real servers."""

    def test_hanging_peer(self, mariadb_pair: Pair, worker: TrialWorker, receive: Any) -> None:
        """Requests go on while the thread waits for a peer that is silent, and it comes back."""
        frozen, alive = mariadb_pair
        clock = EngineClock()
        made: list[tuple[int, str]] = []

        def receiver(connection: Any, **kwargs: Any) -> None:
            made.append((_thread.get_ident(), connection.peer.name))

        receive(connection_created, receiver)
        with engine(
            [mysql_peer(frozen), {**mysql_peer(alive), "PRIORITY": 1}],
            clock=clock,
            TRIALS="background",
            CONNECT_TIMEOUT=2,
            READY_CHECK="writable",
        ) as connection:
            peer = balancers["balanced"].peers["peer0"]
            frozen.freeze()
            peer.breaker.open()
            clock.advance(30)
            worker.schedule(balancers["balanced"].group)
            until(lambda: peer.breaker.trial is not None)
            while peer.breaker.trial is not None:
                connection.close()
                connection.ensure_connection()
            assert set(made) == {(_thread.get_ident(), "peer1")}
            assert peer.breaker.current_state == "open"
            thread = worker._running.ident
            frozen.thaw()
            await_trial(worker, clock, peer)
            assert made[-1] == (thread, "peer0")
            until(lambda: not worker.is_running)
            assert peer.connections == 0
            connection.close()
            connection.ensure_connection()
            assert connection.peer.name == "peer0"

    @pytest.mark.parametrize("kind", ["mariadb_pair", "postgres_pair"])
    def test_keeps_nothing(
        self, kind: str, request: pytest.FixtureRequest, worker: TrialWorker, receive: Any
    ) -> None:
        """What a receiver opens in its thread, under any alias, is closed with the trial."""
        nodes = [mysql_peer(node) for node in request.getfixturevalue(kind)]
        options = {} if kind == "mariadb_pair" else {"PEER_ENGINE": POSTGRESQL}
        seen: list[Any] = []

        def receiver(connection: Any, **kwargs: Any) -> None:
            if worker.is_here and not seen:
                other = connections["balanced"]
                seen.append(other)
                other.ensure_connection()
                seen.append(other.connection)

        receive(connection_created, receiver)
        with engine(nodes, clock=EngineClock(), TRIALS="background", **options):
            balancers["balanced"].peers["peer0"].breaker.suspect()
            until(lambda: balancers["balanced"].peers["peer0"].breaker.is_available)
            until(lambda: not worker.is_running)
            assert seen[1] is not None
            assert seen[0].connection is None

    def test_database_of_the_callers(self, mariadb_pair: Pair, worker: TrialWorker) -> None:
        """While tests have renamed the database, a peer that lacks it is not to blame."""
        clock = EngineClock()
        with engine(
            [mysql_peer(node) for node in mariadb_pair], clock=clock, TRIALS="background"
        ) as connection:
            peer = balancers["balanced"].peers["peer0"]
            told: list[Any] = []
            balancers["balanced"].add_listener(told.append)
            connection.settings_dict["NAME"] = "nonesuch"
            peer.breaker.suspect()
            until(lambda: [event for event in told if isinstance(event, ConnectFailed)])
            until(lambda: peer.breaker.trial is None)
            assert peer.breaker.current_state == "closed"
            assert [event.fault for event in told] == [Fault.REFUSED]

    def test_every_wrappers_own(self, mariadb_pair: Pair, worker: TrialWorker) -> None:
        """A step in a thread that has a connection leaves that alone."""
        with engine(
            [mysql_peer(node) for node in mariadb_pair],
            clock=EngineClock(),
            TRIALS="background",
            CONN_MAX_AGE=None,
        ) as connection:
            connection.ensure_connection()
            before = connection.connection
            balancers["balanced"].try_out(balancers["balanced"].peers["peer0"])
            peer = balancers["balanced"].peers["peer1"]
            _stalled = worker.start
            worker.start = lambda: None  # type: ignore[method-assign]
            try:
                peer.breaker.suspect()
                assert worker.step() is None
            finally:
                worker.start = _stalled  # type: ignore[method-assign]
            assert peer.breaker.is_available
            assert connection.connection is before
            connection.cursor().execute("SELECT 1")
