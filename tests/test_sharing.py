"""What one process finds out, the others know.

The circuits, the scripts and Redis are real; "processes" are balancers with a link each, whose
round trips the test makes by hand, on a clock that Redis goes by as well. Real processes are in
test_sharing_processes.py.
"""

from __future__ import annotations

import _thread
import ctypes
import functools
import gc
import itertools
import json
import logging
import secrets
import socket
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import django_proxysql
from django_proxysql import LoadBalancer
from django_proxysql.core.events import CircuitClosed, CircuitOpened, PeerDrained, PeerUndrained
from django_proxysql.core.exceptions import ConfigError, DrainRefused, NoPeerAvailable
from django_proxysql.core.sharing import Fleet, Link, Moment, Sharing, checked_url
from django_proxysql.core.sharing.link import SCRIPT
from django_proxysql.core.sharing.records import Question, names_for_others
from tests.children import run_python
from tests.fakes import (
    Clock,
    Driver,
    bad_password,
    even,
    peers,
    raised_by,
    refused_by_host,
    until,
)
from tests.servers.faultproxy import FaultProxy
from tests.servers.mariadb import Node
from tests.servers.redis import RedisServer, on_clock, on_the_clock
from tests.test_balancer import InOrder


class SteppedLink(Link):
    """A link without a thread: what it is asked, it answers by a round trip there and then.

    :param now: the time in seconds that takes the place of Redis's own.
    """

    trips = 0
    #: Answers come when who has asked no longer waits.
    is_slow = False
    #: Called with the answers before they are applied; returns what is.
    meanwhile: Callable[[list[bytes]], list[bytes]] = staticmethod(lambda answers: answers)

    def __init__(self, url: str, now: Callable[[], float] | None = None) -> None:
        super().__init__(url)
        self._now = now

    def start(self) -> None:
        pass

    def ask(self, question: Any, seconds: float) -> Any:
        self._asked.append(question)
        self.step(self._now() if self._now else 0.0)
        return None if self.is_slow else question.answer

    def _exchange(self, calls: Any) -> list[Any]:
        self.trips += 1
        return self.meanwhile(super()._exchange(calls))

    def _send(self, command: str, script: str, calls: Any) -> list[Any]:
        if self._now is None:
            return super()._send(command, script, calls)
        pipeline = self._client.pipeline(transaction=False)
        for keys, text in calls:
            pipeline.eval(on_clock(SCRIPT), len(keys), *keys, text, *on_the_clock(self._now()))
        answers: list[Any] = pipeline.execute(raise_on_error=False)
        return answers


class Process:
    """One process of the fleet."""

    def __init__(
        self,
        fleet: World,
        names: tuple[str, ...],
        host: str = "",
        **options: Any,
    ) -> None:
        self.fleet = fleet
        self.driver = Driver()
        self.driver.down = fleet.down
        options.setdefault("strategy", InOrder)
        self.db = LoadBalancer(
            options.pop("peers", None) or peers(*names),
            self.driver.connect,
            clock=fleet.clock,
            jitter=even,
            **options,
        )
        self.link = SteppedLink(fleet.url, now=fleet.redis_clock)
        if host:
            self.link.host = host
        self.sharing = Sharing(self.db.group, self.link)
        self.db.group.share(self.sharing)
        self.events: list[Any] = []
        self.db.add_listener(self.events.append, connects=False)
        self.step()

    def step(self) -> None:
        self.sharing.start()
        self.link.step(self.fleet.clock())

    def connect(self) -> str:
        return str(self.db.connect().host)

    def finds_dead(self, name: str) -> None:
        """Meet a peer that is down from now on, and publish it."""
        self.fleet.down[name] = refused_by_host
        self.connect()
        self.step()

    @property
    def hosts(self) -> list[str]:
        """Which hosts were connected to since this was last asked, in turn."""
        hosts = self.driver.hosts
        self.driver.calls.clear()
        return hosts

    @property
    def states(self) -> list[str]:
        return [peer.state for peer in self.db.snapshot()]

    def due_in(self, name: str) -> float:
        return self.db.peers[name].breaker.circuit.due - self.fleet.clock()


class World:
    """A Redis, a clock, and processes."""

    def __init__(self, url: str) -> None:
        self.url = url
        # Redis's own durations run by its own clock: far from both.
        self.clock = Clock(1_700_000_000.0)
        self.down: dict[str, Any] = {}
        #: How many seconds Redis's clock has jumped.
        self.jump = 0.0

    def redis_clock(self) -> float:
        return self.clock() + self.jump

    def process(self, *names: str, **options: Any) -> Process:
        return Process(self, names or ("db1", "db2"), **options)

    def processes(self, number: int, *names: str, **options: Any) -> list[Process]:
        return [self.process(*names, **options) for _ in range(number)]

    def processes_without_db1(self, number: int, **options: Any) -> list[Process]:
        """Processes of which the first has found db1 dead, and the others know it."""
        fleet = self.processes(number, **options)
        fleet[0].finds_dead("db1")
        step(*fleet)
        return fleet


def step(*processes: Process) -> None:
    """Have each make its round trip, in turn."""
    for process in processes:
        process.step()


@pytest.fixture
def world(redis_server: RedisServer, caplog: pytest.LogCaptureFixture) -> Iterator[World]:
    mine = threading.get_ident()

    def is_mine(record: logging.LogRecord) -> bool:
        # Another test's thread may still run, and tell what it sees of this Redis.
        return record.thread == mine

    caplog.handler.addFilter(is_mine)
    yield World(redis_server.url)
    caplog.handler.removeFilter(is_mine)


class TestCircuits:
    @pytest.mark.parametrize("error", ["refused", "caf\udce9 \x00 \u2028"])
    def test_opening_is_applied_and_counts_for_nothing(self, world: World, error: str) -> None:
        """Who has not tried a peer that another found dead leaves it alone.

        An error's bytes that are no text keep no process from it.
        """
        one, other = world.processes(2, breaker={"fail_max": 2})
        world.down["db1"] = type(refused_by_host())(2002, error)
        one.connect()
        one.connect()
        step(one, other)
        assert other.states == ["open", "closed"]
        assert other.connect() == "db2"
        assert other.hosts == ["db2"]
        (event,) = other.events
        assert isinstance(event, CircuitOpened)
        assert event.elsewhere
        assert event.error == one.db.snapshot()[0].error.encode(errors="replace").decode()
        assert [peer.failures for peer in other.db.snapshot()] == [0, 0]

    def test_closing_is_applied(self, world: World) -> None:
        """One process's trial takes the peer back for all."""
        one, other = world.processes_without_db1(2)
        world.down.clear()
        world.clock.advance(30)
        assert one.connect() == "db1"
        step(one, other)
        assert other.states == ["closed", "closed"]
        closed = other.events[-1]
        assert isinstance(closed, CircuitClosed)
        assert closed.elsewhere

    def test_one_trial_at_a_time(self, world: World) -> None:
        """While one process makes the trial, the others pass the peer by."""
        one, *others = world.processes_without_db1(5)
        world.clock.advance(36)
        tried: list[list[str]] = []

        def meanwhile() -> Any:
            for process in others:
                assert process.connect() == "db2"
                tried.append(process.hosts)
            raise refused_by_host()

        world.down["db1"] = meanwhile
        assert one.connect() == "db2"
        assert tried == [["db2"]] * 4

    def test_holder_dies(self, world: World) -> None:
        """The lease of a process that is gone runs out, and no sooner."""
        one, other = world.processes_without_db1(2)
        world.clock.advance(36)
        assert one.sharing.may_try("db1") == 0
        assert other.sharing.may_try("db1") > 0
        world.clock.advance(10)
        assert other.sharing.may_try("db1") > 0
        world.clock.advance(1)
        assert other.sharing.may_try("db1") == 0

    def test_long_trial(self, world: World) -> None:
        """A lease is renewed for as long as its trial takes, and given back after it."""
        one, other = world.processes_without_db1(2)
        world.clock.advance(36)
        answers = []

        def slowly() -> Any:
            for _ in range(3):
                one.step()
                world.clock.advance(8)
                answers.append(other.sharing.may_try("db1"))
            raise SystemExit

        world.down["db1"] = slowly
        with pytest.raises(SystemExit):
            one.connect()
        assert min(answers) > 0
        one.step()
        assert other.sharing.may_try("db1") == 0

    def test_late_word(self, world: World) -> None:
        """What was reported in ignorance of something newer is dropped, and that adopted."""
        one, other = world.processes(2)
        world.down["db1"] = refused_by_host
        one.connect()
        other.connect()
        one.step()
        world.down.clear()
        world.clock.advance(30)
        assert one.connect() == "db1"
        one.step()
        # Only now does the other one get to say that the peer failed it, half a minute ago.
        other.step()
        assert other.states == ["closed", "closed"]
        one.step()
        assert one.states == ["closed", "closed"]

    @pytest.mark.parametrize("meanwhile", ["open", "close"])
    def test_word_that_comes_late(self, world: World, meanwhile: str) -> None:
        """What happened here while the answer was under way is younger than the answer."""
        one, other = world.processes(2)
        breaker = other.db.peers["db1"].breaker
        told = one.db.peers["db1"].breaker
        if meanwhile == "open":
            told.open()
            step(one, other)
            told.close()
        else:
            told.open()
        one.step()

        def changes(answers: list[bytes]) -> list[bytes]:
            breaker.open()
            if meanwhile == "close":
                breaker.close()
            return answers

        other.link.meanwhile = changes
        other.step()
        assert other.states[0] == ("open" if meanwhile == "open" else "closed")
        del other.link.meanwhile
        # Both are of one mind again after that.
        step(other, one, other)
        assert one.states == other.states

    def test_closing_that_comes_late(self, world: World) -> None:
        """A trial that failed since is younger than a success that was published too late."""
        one, other = world.processes_without_db1(2)
        other.db.peers["db1"].breaker.close()
        world.clock.advance(36)
        one.connect()
        step(one, other, one)
        assert one.states == other.states == ["open", "closed"]

    def test_trial_that_another_has_made(self, world: World) -> None:
        """Who asks for a trial that has failed elsewhere just now waits for the next."""
        one, other = world.processes_without_db1(2)
        world.clock.advance(36)
        one.connect()
        one.step()
        assert 27 < other.sharing.may_try("db1") < 34

    def test_by_hand(self, world: World) -> None:
        """An operator's trial need not be due, and is one of the one at a time all the same."""
        one, other = world.processes_without_db1(2)
        for process in (one, other):
            process.driver.calls.clear()

        def meanwhile() -> Any:
            due = other.due_in("db1")
            assert not other.db.try_out(other.db.peers["db1"], now=True)
            assert other.hosts == []
            # Its turn has not come any sooner for that.
            assert other.due_in("db1") == due
            assert other.states == ["open", "closed"]
            raise refused_by_host()

        one.driver.down = {"db1": meanwhile}
        assert not one.db.try_out(one.db.peers["db1"], now=True)
        assert one.hosts == ["db1"]
        # It has failed, and the next one is due in half a minute; but not for an operator.
        step(one, other)
        world.down.clear()
        assert other.db.try_out(other.db.peers["db1"], now=True)
        assert other.hosts == ["db1"]
        step(other, one)
        assert one.states == ["closed", "closed"]

    def test_by_hand_while_redis_is_away(self, world: World, redis_server: RedisServer) -> None:
        """Nothing says no."""
        (one,) = world.processes_without_db1(1)
        world.down.clear()
        redis_server.kill()
        assert one.db.try_out(one.db.peers["db1"], now=True)

    def test_last_resort_asks_no_process(self, world: World) -> None:
        """Who has no other peer left connects, whichever process has the trial."""
        one, other = world.processes_without_db1(2)
        world.clock.advance(36)
        assert one.sharing.may_try("db1") == 0
        assert other.sharing.may_try("db1") > 0
        other.driver.down = {"db2": refused_by_host}
        assert other.connect() == "db1"
        assert other.hosts == ["db2", "db1"]

    @pytest.mark.parametrize("lie", [1e15, -1e15, "soon", None, True, [], {}])
    def test_answer_that_lies(self, world: World, lie: Any) -> None:
        """Durations are believed as far as this process's own settings go."""
        one, other = world.processes(2)
        one.db.peers["db1"].breaker.open()
        one.step()

        def lies(answers: list[bytes]) -> list[bytes]:
            said = json.loads(answers[0])
            for circuit in said["circuits"].values():
                circuit.update(due=lie, out=lie, held=lie, err=lie, fault=lie, q=lie)
            return [json.dumps(said).encode()]

        other.link.meanwhile = lies
        other.step()
        assert other.states == ["open", "closed"]
        assert 0 <= other.due_in("db1") <= 66
        assert other.connect() == "db2"

    def test_refusals_are_ones_own(self, world: World) -> None:
        """A peer that refuses this process may well take the others' password."""
        one, other = world.processes(2)
        world.down["db1"] = bad_password
        one.connect()
        step(one, other)
        assert one.states[0] == "open"
        assert other.states[0] == "closed"

    @pytest.mark.parametrize("published", [False, True])
    def test_process_that_has_lost_all_its_peers_keeps_that_to_itself(
        self, world: World, published: bool
    ) -> None:
        """It withdraws what it had published of its first one: the others have lost none."""
        one, other = world.processes(2)
        one.driver.down = {"db1": refused_by_host}
        if published:
            one.connect()
            step(one, other)
            assert other.states == ["open", "closed"]
        one.driver.down["db2"] = refused_by_host
        assert isinstance(raised_by(one.connect), NoPeerAvailable)
        step(one, other, one)
        assert one.states == ["open", "open"]
        assert other.states == ["closed", "closed"]

    def test_a_host_that_alone_cannot_reach_it(self, world: World) -> None:
        """It takes the peer from the others once, and not again and again."""
        cut, *others = [world.process(host=host) for host in ("cut", "one", "two")]
        cut.driver.down = {"db1": refused_by_host}
        for turn in range(4):
            cut.db.connect()
            step(cut, *others)
            world.clock.advance(36)
            for process in others:
                assert process.connect() == "db1"
                process.step()
                others[-1].step()
            cut.step()
            assert cut.states[0] == ("closed" if turn == 0 else "open")
        # From the second time on it has kept it to itself.
        kinds = [type(event) for process in others for event in process.events]
        assert kinds.count(CircuitOpened) == 2
        # When another host finds the same, all apply it.
        others[0].driver.down = {"db1": refused_by_host}
        others[0].connect()
        others[0].step()
        others[1].step()
        assert others[1].states[0] == "open"

    def test_flapping_on_one_host(self, world: World) -> None:
        """Where there is but one host, its processes are believed every time."""
        one, other = world.processes(2)
        for _ in range(4):
            world.down["db1"] = refused_by_host
            one.connect()
            step(one, other)
            assert other.states[0] == "open"
            world.down.clear()
            world.clock.advance(36)
            assert other.connect() == "db1"
            step(other, one)
            assert one.states[0] == "closed"

    def test_all_the_same_at_once(self, world: World) -> None:
        """Two that found it in the same second agree on one due time."""
        one, other = world.processes(2)
        world.down["db1"] = refused_by_host
        one.connect()
        world.clock.advance(0.5)
        other.connect()
        step(one, other)
        assert one.due_in("db1") == pytest.approx(29.5)
        # What Redis says, and a little later: the fleet's trial is somebody's, not everybody's.
        assert other.due_in("db1") == pytest.approx(29.5 + 3, abs=0.01)


class TestSlowRedis:
    """Answers that come, but too late for the caller."""

    def fleet(self, world: World) -> list[Process]:
        """Two processes that know of a peer that is out, whose trial is due now, Redis slow."""
        processes = world.processes_without_db1(2)
        world.clock.advance(36)
        for process in processes:
            process.driver.calls.clear()
            process.link.is_slow = True
        return processes

    def test_keeps_no_peer_out(self, world: World) -> None:
        """A lease that was granted too late is used a second later: one trial, by one process."""
        one, other = self.fleet(world)
        world.down.clear()
        assert (one.connect(), other.connect()) == ("db2", "db2")
        step(one, other)
        world.clock.advance(1)
        tried = []

        def meanwhile() -> None:
            # … and by no other, however long it takes.
            for _ in range(3):
                one.step()
                tried.append(other.connect())
                world.clock.advance(8)

        one.driver.down = {"db1": meanwhile}
        assert one.connect() == "db1"
        assert tried == ["db2"] * 3
        assert one.hosts == ["db2", "db1"]
        assert "db1" not in other.hosts
        step(one, other)
        assert one.states == other.states == ["closed", "closed"]

    def test_lease_that_no_process_uses(self, world: World) -> None:
        """It runs out, and the other process has its trial; the first one has waited enough."""
        one, other = self.fleet(world)
        one.connect()
        world.clock.advance(12)
        step(one, other)
        other.link.is_slow = False
        assert other.sharing.may_try("db1") == 0
        one, _ = self.fleet(world)
        one.connect()
        world.clock.advance(12)
        one.step()
        assert one.sharing.may_try("db1") == 0

    def test_child_of_a_fork_has_none_of_it(self, world: World) -> None:
        """A lease is its parent's."""
        one, _ = self.fleet(world)
        one.connect()
        one.link.after_fork()
        one.step()
        assert one.sharing.may_try("db1") > 0

    def test_no_answer_at_all(self, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
        """A thread that does not get to run is waited for once, and then no more."""
        one, _ = self.fleet(world)
        monkeypatch.setattr(one.link, "ask", lambda question, seconds: None)
        assert one.sharing.may_try("db1") == 1
        assert one.sharing.may_try("db1") == 0

    def test_is_said_once(self, world: World, caplog: pytest.LogCaptureFixture) -> None:
        """One line when it has been slow for a while, and one when it is no longer."""
        caplog.set_level(logging.INFO, "django_proxysql")
        process = world.process()
        link = process.link
        clocked = link._clocked
        for seconds in [0.1] * 4 + [0.01] + [0.1] * 20 + [0.01] * 5:
            # What this machine took is of no interest.
            link._clocked = lambda _, took=seconds: clocked(took)  # type: ignore[misc]
            world.clock.advance(1)
            link.step(world.clock())
        assert ["is slow: it took more than 50 ms" in line for line in caplog.messages] == [
            True,
            False,
        ]
        assert "is of use again" in caplog.messages[1]


class TestRedis:
    def test_flushed(self, world: World, redis_server: RedisServer) -> None:
        """What a process knows is written again."""
        one, other = world.processes(2)
        one.finds_dead("db1")
        one.db.drain("db2", force=True)
        redis_server.ask("FLUSHALL")
        step(one, other)
        assert other.states == ["open", "closed"]
        assert other.db.peers["db2"].drained

    def test_keys_expire_carry_the_prefix_and_hold_no_password(
        self, world: World, redis_server: RedisServer
    ) -> None:
        """Nothing of ours is left in a Redis for ever, nor how a peer is connected to."""
        world.url += "?prefix=shop"
        one = world.process(peers=peers("db1", "db2", user="u5er", password="s3cr3t"))
        one.finds_dead("db1")
        one.db.drain("db2", force=True)
        keys = redis_server.ask("KEYS", "*").split()
        # Another test's thread may still run.
        keys = [key for key in keys if not key.startswith("test-")]
        assert len(keys) == 5
        for key in keys:
            assert key.startswith("shop:{default}:")
            assert int(redis_server.ask("TTL", key)) > 0
            stored = redis_server.ask("HGETALL", key) + redis_server.ask("LRANGE", key, "0", "-1")
            assert "s3cr3t" not in stored
            assert "u5er" not in stored

    @pytest.mark.parametrize("hours", [-100, -1, 1, 100])
    def test_clock_jumps(self, world: World, hours: int) -> None:
        """Redis's own: no process is kept from a trial for longer than an interval or two."""
        one, other = world.processes_without_db1(2)
        world.jump = hours * 3600
        other.db.drain("db2", force=True)
        other.db.undrain("db2")
        world.down.clear()
        world.clock.advance(66)
        assert other.connect() == "db1"
        step(other, one)
        assert one.states == ["closed", "closed"]
        assert one.sharing.fleet().processes == 2

    @pytest.mark.parametrize("out", [False, True])
    def test_one_round_trip(self, world: World, out: bool) -> None:
        """A connect asks no Redis, also while a peer is out; a second costs one round trip."""
        one = world.process()
        if out:
            one.finds_dead("db1")
        before = one.link.trips
        for _ in range(10):
            one.connect()
        assert one.link.trips == before
        assert one.link.step(world.clock()) == 1
        assert one.link.trips == before + 1

    @pytest.mark.parametrize(
        "garbage",
        [
            "",
            "null",
            "[]",
            "{",
            '{"v": "abc"}',
            '{"v": 1e300, "s": "open"}',
            '{"v": "nan", "s": "open"}',
            '{"v": {}, "s": []}',
            '{"v": "1700000000000001", "s": "open", "due": "x", "out": [], "hu": {}, "h": 7}',
            '{"v": "1700000000000001", "s": "open", "due": 1e17, "err": 5, "fault": 6, "q": {}}',
            '{"v": "1700000000000001", "s": 7, "on": "yes"}',
            "\\xff\\xfe",
        ],
    )
    def test_lying(self, world: World, redis_server: RedisServer, garbage: str) -> None:
        """What cannot be read is left out; what can does no harm that lasts."""
        one, other = world.processes(2)
        for key in ("circuits", "drains"):
            for field in ("db1:3306", "db2:3306"):
                redis_server.ask("HSET", f"django-proxysql:{{default}}:{key}", field, garbage)
        for process in (one, other):
            process.step()
            assert process.connect() in ("db1", "db2")
            assert all(process.due_in(name) <= 66 for name in ("db1", "db2"))
            assert not any(peer.drained for peer in process.db.peers.values())

    @pytest.mark.parametrize("held", ["1e999", "-1e999", '"x"', "[]"])
    def test_lying_of_connections(self, world: World, redis_server: RedisServer, held: str) -> None:
        """A sum that is no number costs no more than that answer."""
        one = world.process()
        redis_server.ask("HSET", one.sharing.keys[3], "liar", f'{{"db1:3306": {held}}}')
        redis_server.ask("ZADD", one.sharing.keys[2], str(int(world.redis_clock() * 1000)), "liar")
        one.finds_dead("db1")
        one.sharing.fleet()
        assert one.link.answers
        assert one.sharing.settle()

    @pytest.mark.parametrize("interval", [1, None])
    def test_everything_is_said_to_be_out(
        self, world: World, redis_server: RedisServer, interval: int | None
    ) -> None:
        """No caller is refused a connection for what was not tried here; none hurries after it."""
        one = world.process(last_resort_interval=interval)
        lie = {"v": "1700000000000001", "s": "open", "due": 1_700_000_060_000, "err": "x"}
        for field in ("db1:3306", "db2:3306"):
            redis_server.ask("HSET", "django-proxysql:{default}:circuits", field, json.dumps(lie))
        one.step()
        assert one.states == ["open", "open"]
        world.down["db1"] = refused_by_host
        assert one.connect() == "db2"
        assert one.hosts == ["db1", "db2"]
        one.step()
        assert one.states == ["open", "closed"]
        world.down["db2"] = refused_by_host
        one.db.peers["db2"].breaker.open()
        assert isinstance(raised_by(one.connect), NoPeerAvailable)
        assert one.hosts == []

    @pytest.mark.parametrize("key", ["circuits", "drains", "processes", "connections", "timeline"])
    def test_wrong_type(
        self, world: World, redis_server: RedisServer, key: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A key that is something else is left alone; that is said once."""
        one, other = world.processes(2)
        for name in redis_server.ask("KEYS", f"*:{key}*").split() or [
            f"django-proxysql:{{default}}:{key}"
        ]:
            redis_server.ask("SET", name, "something else")
        world.down["db1"] = refused_by_host
        one.connect()
        for _ in range(3):
            step(one, other)
        assert one.connect() == other.connect() == "db2"
        warnings = [r for r in caplog.records if "is of no use" in r.getMessage()]
        # What happens is noted by the process that it happens to.
        assert len(warnings) == (1 if key == "timeline" else 2)

    @pytest.mark.parametrize("fault", ["full", "replica"])
    def test_no_writes(
        self, world: World, redis_server: RedisServer, fault: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        """What is stored is still read; what is found out is published as soon as that can be."""
        caplog.set_level(logging.INFO, "django_proxysql")
        one, other, third = world.processes(3, "db1", "db2", "db3")
        one.finds_dead("db1")
        spoil, mend = {
            "full": (("CONFIG", "SET", "maxmemory", "1"), ("CONFIG", "SET", "maxmemory", "0")),
            "replica": (("REPLICAOF", "127.0.0.1", "1"), ("REPLICAOF", "NO", "ONE")),
        }[fault]
        redis_server.ask(*spoil)
        try:
            other.step()
            assert other.states == ["open", "closed", "closed"]
            world.down["db2"] = refused_by_host
            assert other.connect() == "db3"
            for _ in range(3):
                other.step()
            third.step()
            assert third.states == ["open", "closed", "closed"]
            # No process can be kept from a trial: each goes on with what it knows.
            world.clock.advance(36)
            assert other.sharing.may_try("db1") == third.sharing.may_try("db1") == 0
        finally:
            redis_server.ask(*mend)
        step(other, third)
        assert third.states == ["open", "open", "closed"]
        third.step()
        told = [record.getMessage() for record in caplog.records if "Redis" in record.getMessage()]
        assert [("of no use" in line, "of use again" in line) for line in told] == [
            (True, False),
            (True, False),
            (False, True),
            (False, True),
        ]
        assert ("OOM" if fault == "full" else "READONLY") in told[0]

    def test_not_a_redis(
        self, world: World, mariadb: Node, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Something else answers at the address."""
        world.url = f"redis://{mariadb.host}:{mariadb.port}/0"
        one = world.process()
        assert one.connect() == "db1"
        assert not one.sharing.is_answered
        (line,) = caplog.messages
        assert "is of no use" in line

    @pytest.mark.parametrize("cut", ["before", "reply", "reply in the middle"])
    def test_cut(
        self,
        world: World,
        redis_server: RedisServer,
        fault_proxy: Callable[..., FaultProxy],
        cut: str,
    ) -> None:
        """Whether what was published has arrived or not: the next round trip finds out."""
        proxy = fault_proxy(redis_server)
        (other,) = world.processes(1)
        world.url = f"redis://{proxy.host}:{proxy.port}/0"
        one = world.process()
        world.down["db1"] = refused_by_host
        one.connect()
        one.db.group.apply_drained(one.db.peers["db2"], True, elsewhere=False)
        one.sharing.publish(one.db.peers["db2"], True)
        if cut == "before":
            proxy.cut_before(b"EVAL")
        else:
            proxy.cut_reply(20 if cut == "reply in the middle" else 0, b"EVAL")
        one.step()
        assert not one.sharing.is_answered
        assert proxy.cuts == 1
        world.clock.advance(2)
        one.step()
        assert one.sharing.is_answered
        other.step()
        for process in (one, other):
            assert process.states == ["open", "closed"]
            assert process.db.peers["db2"].drained
        one.db.undrain("db2")
        other.step()
        assert not other.db.peers["db2"].drained

    def test_user_with_few_rights(self, world: World, redis_server: RedisServer) -> None:
        """The rights that the docs name are enough, and each is needed for something."""
        page = Path(django_proxysql.__file__).parents[1] / "docs" / "howto" / "redis.rst"
        rule = next(line for line in page.read_text().splitlines() if "ACL SETUSER" in line)
        redis_server.ask(*rule.split())
        try:
            world.url = world.url.replace("redis://", "redis://shop:password@")
            one, other = world.processes(2)
            one.finds_dead("db1")
            one.db.drain("db2", force=True)
            other.step()
            assert other.states == ["open", "closed"]
            assert other.db.peers["db2"].drained
            assert len(other.sharing.fleet().timeline) == 2
            assert one.sharing.settle()
        finally:
            redis_server.ask("ACL", "DELUSER", "shop")

    @pytest.mark.parametrize("whose", ["its own", "another's"])
    def test_killed_between_any_two_lines(self, world: World, whose: str) -> None:
        """Wherever a round trip is broken off, the next ones put it right."""
        one, other = world.processes(2)
        killed = one if whose == "its own" else other
        reached = 0
        peer1, peer2 = one.db.peers.values()
        for turn in itertools.count():
            # Open, drain, close and undrain in turn, each told by a round trip that is killed.
            begins = turn % 4 < 2
            if turn % 2:
                one.db.group.apply_drained(peer2, begins, elsewhere=False)
                one.sharing.publish(peer2, begins)
            else:
                (peer1.breaker.open if begins else peer1.breaker.close)()
            if killed is other:
                one.step()
            if not killed_at(reached, lambda: killed.link.step(world.clock())):
                break
            world.clock.advance(2)
            step(one, other, one)
            for process in (one, other):
                assert process.states[0] == ("open" if begins else "closed"), reached
                assert process.db.peers["db2"].drained is (turn % 4 in (1, 2)), reached
            if turn % 4 == 3:
                reached += 1
        assert reached > 50


@pytest.fixture
def own_url(redis_server: RedisServer) -> str:
    """A prefix that no other test's thread, which may still run, writes to."""
    return f"{redis_server.url}?prefix=test-{secrets.token_hex(4)}"


def sharing_at(url: str, *names: str, **options: Any) -> Any:
    """A balancer with a link of the real kind."""
    return LoadBalancer(peers(*names or ("db1",)), Driver().connect, shared_state=url, **options)


def as_another_process(db: Any, url: str) -> None:
    """Give it a link of its own: it is another process, as far as Redis knows."""
    db.group.share(Sharing(db.group, SteppedLink(url)))
    db.sharing.start()


class Bell:
    """An answer that does not come, and how long it was waited for each time."""

    def __init__(self) -> None:
        self.waits: list[float] = []

    def acquire(self, timeout: float) -> bool:
        self.waits.append(timeout)
        return False

    def release(self) -> None:
        pass


class TestThread:
    """What the thread does by itself; nothing here looks at a clock."""

    def test_begins_at_the_first_connect(self, own_url: str) -> None:
        """… and not before; the next ones make no other. It ends when none is left."""
        db = sharing_at(own_url)
        assert not db.sharing.link.is_running
        db.connect()
        life = db.sharing.link._running
        assert life is not None
        db.sharing.link.wake = lambda: pytest.fail("it is woken for nothing")
        db.group.invalidate()
        db.connect()
        assert db.sharing.link._running is life

    def test_begins_at_the_next_connect_where_none_could_be_started(
        self, own_url: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Nothing has changed meanwhile: the process would learn of no drain."""

        def refuse(*_: Any) -> None:
            raise RuntimeError("can't start new thread")

        db = sharing_at(own_url)
        with monkeypatch.context() as patched:
            patched.setattr(_thread, "start_new_thread", refuse)
            db.connect()
        assert not db.sharing.link.is_running
        db.connect()
        assert db.sharing.link.is_running

    def test_is_not_what_keeps_a_balancer(self, own_url: str) -> None:
        """One that is dropped is gone."""
        db = sharing_at(own_url)
        assert db.sharing.settle(10)
        gone = weakref.ref(db)
        link = db.sharing.link
        del db
        link.wake()
        while gone() is not None:
            gc.collect()

    def test_one_thread_for_all_balancers(self, own_url: str, redis_server: RedisServer) -> None:
        """They share the connection and the round trip."""
        one, two = (sharing_at(own_url, name=name) for name in ("one", "two"))
        assert one.sharing.settle(10)
        assert two.sharing.settle(10)
        assert one.sharing.link is two.sharing.link
        assert redis_server.ask("KEYS", "*{one}:processes*")
        assert redis_server.ask("KEYS", "*{two}:processes*")

    @pytest.mark.parametrize("how", ["hangs", "exits"])
    def test_listener_holds_up_nothing_but_its_own_later_events(
        self, own_url: str, caplog: pytest.LogCaptureFixture, how: str
    ) -> None:
        """One that hangs over what others have found, or ends its thread, ends no sharing."""
        caplog.set_level("INFO", "django_proxysql")
        db, other = (sharing_at(own_url, "db1", "db2", "db3") for _ in range(2))
        go_on = threading.Event()
        told: list[Any] = []
        events: list[Any] = []

        def listen(event: Any) -> None:
            told.append(event)
            if how == "exits":
                raise SystemExit
            go_on.wait(60)

        db.add_listener(listen, connects=False)
        db.add_listener(events.append, connects=False)
        assert db.sharing.settle(10)
        life = db.sharing.link._running
        as_another_process(other, own_url)
        try:
            for name in ("db1", "db2"):
                other.peers[name].breaker.open()
                assert other.sharing.settle(10)
            until(lambda: [event.peer for event in events] == ["db1", "db2"])
            until(lambda: sum("another process found" in line for line in caplog.messages) == 2)
            until(lambda: told == (events[:1] if how == "hangs" else events))
            assert db.sharing.settle(10)
            assert db.sharing.link._running is life
        finally:
            go_on.set()
        until(lambda: told == events)

    @pytest.mark.usefixtures("strikes_are_silent")
    def test_killed(self, own_url: str) -> None:
        """A thread that an asynchronous exception strikes goes on, or another takes its place."""
        db = sharing_at(own_url)
        assert db.sharing.settle(10)
        link = db.sharing.link
        throw = ctypes.pythonapi.PyThreadState_SetAsyncExc
        for _ in range(20):
            life = link._running
            if life is not None:
                throw(ctypes.c_ulong(life.ident), ctypes.py_object(SystemExit))
            link.wake()
        until(lambda: db.sharing.settle(10))
        assert link.is_running

    def test_asks_no_longer_than_it_may(self, own_url: str, redis_server: RedisServer) -> None:
        """A connect whose peer's trial is due waits 50 ms once, and the next one not at all."""
        db = sharing_at(own_url, "db1", "db2", strategy=InOrder)
        db.peers["db1"].breaker.open()
        assert db.sharing.settle(10)
        redis_server.freeze()
        bell, ask = Bell(), db.sharing.link.ask

        def noted(question: Any, seconds: float) -> Any:
            question.bell = bell
            return ask(question, seconds)

        db.sharing.link.ask = noted  # type: ignore[method-assign]
        db.peers["db1"].breaker.half_open()
        db.connect()
        assert bell.waits == [0.05]
        db.peers["db1"].breaker.half_open()
        db.connect()
        # The second one is not waited for; nor asked, where Redis is known to be silent.
        assert sum(bell.waits) == 0.05

    @pytest.mark.parametrize("trials", ["inline", "background"])
    def test_slow_redis_keeps_no_peer_out(
        self,
        own_url: str,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
        trials: str,
    ) -> None:
        """The link's own thread, 120 ms away from Redis: a peer that is well is taken back."""
        driver = Driver()
        driver.down["db1"] = refused_by_host
        db = LoadBalancer(
            peers("db1", "db2"),
            driver.connect,
            strategy=InOrder,
            check_interval=1,
            shared_state=own_url,
            trials=trials,
        )
        exchange = Link._exchange

        def far(link: Link, calls: Any) -> list[Any]:
            threading.Event().wait(0.12)
            return exchange(link, calls)

        monkeypatch.setattr(Link, "_exchange", far)
        assert db.connect().host == "db2"
        assert db.sharing.settle(10)
        assert db.sharing._shared["db1"].agreed.is_open
        driver.down.clear()
        until(lambda: db.connect().host == "db1")
        until(lambda: any("is slow" in line for line in caplog.messages))

    def test_operator_has_more_patience(self, own_url: str) -> None:
        """A drain waits for Redis, although a connect has given up just now; the next one not."""
        link = Link(own_url)
        sharing = sharing_at(own_url).sharing
        bell = Bell()
        for peer, seconds in (("db1", 0.05), ("", 0.05), ("", 1.0), ("", 1.0), ("db1", 0.05)):
            question = Question(sharing, peer=peer)
            question.bell = bell  # type: ignore[assignment]
            assert link.ask(question, seconds) is None
        assert bell.waits == [0.05, 1.0, 0.0]

    def test_gevent(self, own_url: str) -> None:
        """Under gevent it is a greenlet, and holds no other up."""
        program = """
            from gevent import monkey
            monkey.patch_all()
            import sys
            import gevent
            from django_proxysql import LoadBalancer
            from tests.fakes import Driver, peers

            db = LoadBalancer(peers("db1", "db2"), Driver().connect, shared_state=sys.argv[1])
            db.connect()
            turns = []
            other = gevent.spawn(lambda: [turns.append(gevent.sleep(0)) for _ in range(1000)])
            print(db.sharing.settle(10), db.sharing.fleet().processes > 0)
            db.peers["db1"].breaker.open()
            print(db.sharing.settle(10))
            other.join()
            print(len(turns))
        """
        assert run_python(program, own_url).stdout == "True True\nTrue\n1000\n"


def killed_at(line: int, function: Callable[[], object]) -> bool:
    """Kill ``function`` at its n-th line in the package; return whether it came there."""
    left = line
    here = str(Path(django_proxysql.__file__).parent / "core" / "sharing")

    def tracer(frame: Any, event: str, argument: Any) -> Any:
        nonlocal left
        if not frame.f_code.co_filename.startswith(here):
            return None
        if event == "line":
            left -= 1
            if left < 0:
                sys.settrace(None)
                raise SystemExit
        return tracer

    outer = sys.gettrace()
    sys.settrace(tracer)
    try:
        function()
    except SystemExit:
        return True
    finally:
        sys.settrace(outer)
    return False


class TestDrains:
    def test_reaches_all(self, world: World) -> None:
        """Those that run, and those that start later; any of them may take it back."""
        one, other = world.processes(2)
        one.db.drain("db1")
        other.step()
        later = world.process()
        assert other.connect() == later.connect() == "db2"
        assert [type(event) for event in other.events] == [PeerDrained]
        assert other.events[0].elsewhere
        assert not one.events[0].elsewhere
        with pytest.raises(DrainRefused):
            other.db.drain("db2")
        command = world.process()
        command.db.undrain("db1")
        del command
        one.step()
        assert not one.db.peers["db1"].drained
        assert isinstance(one.events[-1], PeerUndrained)

    @pytest.mark.parametrize("force", [False, True])
    def test_the_last_two_at_once(
        self, world: World, caplog: pytest.LogCaptureFixture, force: bool
    ) -> None:
        """Neither knew of the other's drain: one is refused, and takes its own back."""
        one, other = world.processes(2)
        settle, turn = other.sharing.settle, []

        def first(seconds: float = 1.0) -> bool:
            # Right after the other one has looked whether another is left.
            turn.append(len(turn))
            if turn == [0, 1]:
                one.db.drain("db1")
            return settle(seconds)

        other.sharing.settle = first  # type: ignore[method-assign]
        drained = functools.partial(other.db.drain, "db2", force=force)
        error = raised_by(drained)
        for process in (one, other):
            process.step()
            states = [peer.drained for peer in process.db.snapshot()]
            # Each keeps a peer, whatever the other forces.
            assert states == ([False, True] if force and process is other else [True, False])
        if force:
            assert error is None
            return
        assert isinstance(error, DrainRefused)
        assert "another process" in str(error)
        (line,) = [line for line in caplog.messages if "is not drained" in line]
        assert line.startswith("default: db2")
        assert other.connect() == "db2"

    def test_refused_when_redis_is_back(self, world: World, redis_server: RedisServer) -> None:
        """A drain that Redis gets later than the other peer's is taken back then."""
        one, other = world.processes(2)
        redis_server.kill()
        step(one, other)
        one.db.drain("db1")
        other.db.drain("db2")
        redis_server.start()
        world.clock.advance(2)
        step(one, other, one)
        for process in (one, other):
            assert [peer.drained for peer in process.db.snapshot()] == [True, False]

    @pytest.mark.parametrize("order", [(0, 1), (1, 0)])
    @pytest.mark.parametrize("last", [False, True])
    def test_younger_desired_state_counts(
        self, world: World, redis_server: RedisServer, last: bool, order: tuple[int, int]
    ) -> None:
        """… of two that were made while Redis was away, whichever it gets first."""
        fleet = world.processes(2)
        fleet[0].db.drain("db1")
        fleet[1].step()
        if last:
            fleet[0].db.undrain("db1")
            fleet[1].step()
        redis_server.kill()
        step(*fleet)
        for process, drained in zip(fleet, (not last, last)):
            (process.db.drain if drained else process.db.undrain)("db1")
            world.clock.advance(0.2)
        redis_server.start()
        world.clock.advance(100)
        for number in (*order, *order):
            fleet[number].step()
        for process in fleet:
            assert process.db.peers["db1"].drained is last
            assert process.sharing.has_published_all

    def test_age_outlives_redis(self, world: World, redis_server: RedisServer) -> None:
        """What is written again, for it was lost, is as old as it was."""
        one, other = world.processes(2)
        redis_server.kill()
        other.step()
        other.db.drain("db1")
        redis_server.start()
        world.clock.advance(60)
        one.step()
        one.db.undrain("db1")
        redis_server.ask("FLUSHALL")
        world.clock.advance(60)
        step(one, other, one)
        for process in (one, other):
            assert not process.db.peers["db1"].drained

    def test_last_desired_state_counts(self, world: World) -> None:
        """Any operator's."""
        one, other = world.processes(2)
        one.db.drain("db1")
        other.db.undrain("db1")
        one.db.drain("db2")
        other.step()
        for process in (one, other):
            assert [peer.drained for peer in process.db.snapshot()] == [False, True]


class TestLastPeer:
    """Another process never drains the last peer of this one."""

    @pytest.fixture(autouse=True)
    def logged(self, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level("INFO", "django_proxysql")

    def refusals(self, caplog: pytest.LogCaptureFixture) -> list[str]:
        return [line for line in caplog.messages if "this one does not" in line]

    def test_of_a_process_with_fewer_peers(
        self, world: World, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Half of the fleet was restarted with a peer more; the other half keeps its only one."""
        old, new = world.process("db1"), world.process("db1", "db2")
        new.db.drain("db1")
        for _ in range(3):
            old.step()
        assert old.connect() == "db1"
        assert new.connect() == "db2"
        (state,) = old.db.snapshot()
        assert state.drain_refused
        assert not state.drained
        assert len(self.refusals(caplog)) == 1
        assert not [event for event in old.events if isinstance(event, PeerDrained)]
        with pytest.raises(DrainRefused):
            old.db.drain("db1")
        new.db.undrain("db1")
        old.step()
        assert not old.db.snapshot()[0].drain_refused

    def test_is_drained_as_soon_as_another_is_not(self, world: World) -> None:
        """What was refused is not forgotten."""
        one = world.process("db1", "db2")
        fewer = world.process("db2", "db3")
        three = world.process("db1", "db2", "db3")
        one.db.drain("db1")
        fewer.step()
        fewer.db.drain("db3")
        three.step()
        three.db.undrain("db3")
        three.db.drain("db2")
        one.step()
        assert [state.drained for state in one.db.snapshot()] == [True, False]
        assert [state.drain_refused for state in one.db.snapshot()] == [False, True]
        one.db.undrain("db1")
        assert [state.drained for state in one.db.snapshot()] == [False, True]
        assert isinstance(one.events[-1], PeerDrained)

    def test_is_not_undone_for_the_others(self, world: World, redis_server: RedisServer) -> None:
        """A process that refuses a drain does not take it back when Redis has lost it."""
        old, new = world.process("db1"), world.process("db1", "db2")
        new.db.drain("db1")
        old.step()
        redis_server.ask("FLUSHALL")
        step(old, new)
        later = world.process("db1", "db2")
        assert [state.drained for state in new.db.snapshot()] == [True, False]
        assert [state.drained for state in later.db.snapshot()] == [True, False]

    @pytest.mark.parametrize("names", [("db1",), ("db1", "db2"), ("db1", "db2", "db3")])
    def test_redis_says_that_all_are_drained(
        self, world: World, redis_server: RedisServer, names: tuple[str, ...]
    ) -> None:
        """Or any other nonsense: one connects all the same."""
        one = world.process(*names)
        drains = next(key for key in one.sharing.keys if key.endswith(":drains"))
        lies = '{"v":7,"on":true}', '{"v":8,"on":true,"at":"x"}', '{"v":9,"on":true,"f":true}'
        for value in (*lies, "[]", "{", '{"v":10}'):
            for name in names:
                redis_server.ask("HSET", drains, f"{name}:3306", value)
            world.clock.advance(2)
            one.step()
            assert one.connect() in names
        assert sum(state.drained for state in one.db.snapshot()) == len(names) - 1

    def test_force_takes_the_last_peer_of_its_own_process_alone(self, world: World) -> None:
        """An operator who insists has all peers drained where he says so; the others keep one."""
        one, other, fewer = world.process(), world.process(), world.process("db1")
        one.db.drain("db1", force=True)
        one.db.drain("db2", force=True)
        other.step()
        fewer.step()
        assert [state.drained for state in one.db.snapshot()] == [True, True]
        assert [state.drained for state in other.db.snapshot()] == [True, False]
        assert (other.connect(), fewer.connect()) == ("db2", "db1")

    @pytest.mark.parametrize("force", [False, True])
    @pytest.mark.parametrize("trouble", ["open", "suspect"])
    def test_peer_without_another_that_works_is_drained_once_one_does(
        self, world: World, trouble: str, force: bool, caplog: pytest.LogCaptureFixture
    ) -> None:
        """What counts as another is one that takes connections here: its circuit is closed."""
        one, other = world.processes(2)
        circuit = other.db.peers["db1"].breaker
        one.db.drain("db2", force=force)
        getattr(circuit, trouble)()
        other.step()
        assert [state.drain_refused for state in other.db.snapshot()] == [False, True]
        assert other.db.connect(trials="never").host == "db2"
        assert len(self.refusals(caplog)) == 1
        if trouble == "open":
            circuit.close()
        else:
            circuit.acquire().succeeded()
        assert [state.drained for state in other.db.snapshot()] == [False, True]
        assert isinstance(other.events[-1], PeerDrained)
        assert other.connect() == "db1"

    def test_drain_that_was_taken_over_holds_when_the_other_peer_fails(self, world: World) -> None:
        """An operator has a reason for a drain: a failed connect is better than such a peer."""
        one, other = world.processes(2)
        one.db.drain("db2")
        other.step()
        world.down["db1"] = refused_by_host
        with pytest.raises(NoPeerAvailable):
            other.connect()
        assert "db2" not in other.hosts


class TestFleet:
    def test_view(self, world: World) -> None:
        """How many there are, what they hold, and what has happened."""
        one, other = world.processes(2)
        held = [one.db.connect(), other.db.connect(), other.db.connect()]
        step(other, one)
        one.finds_dead("db1")
        one.db.drain("db1", force=True)
        fleet = other.sharing.fleet()
        assert isinstance(fleet, Fleet)
        assert fleet.processes == 2
        assert dict(fleet.connections) == {"db1": 3, "db2": 1}
        error = one.db.snapshot()[0].error
        assert fleet.timeline == (
            Moment("db1", "open", world.clock(), error),
            Moment("db1", "drained", world.clock(), ""),
        )
        assert len(held) == 3
        # A process without heartbeat does not count.
        world.clock.advance(6)
        assert other.sharing.fleet().processes == 1


class TestURL:
    @pytest.mark.parametrize(
        "url",
        [
            "",
            "redis",
            "http://host:6379/0",
            "redis://",
            "redis://host:port/0",
            "redis://host:99999/0",
            "redis://user:s3cr3t@/0",
            "redis://user:s3cr3t/x@host:6379/0",
            "redis://user:s3c#r3t@host:6379/0",
            "redis://user:12?s3cr3t@host/0",
            "redis://host/shop",
            "redis://host/0?prefix=",
            "redis://host/0?s3cr3t=1&",
            "redis://host/0?ssl_ca_certs=/ca.pem",
            "rediss://host/0?ssl_ca_cert=/ca.pem",
            "unix://",
            7,
            {"host": "s3cr3t"},
        ],
    )
    def test_none(self, url: Any) -> None:
        """A clear message, without what may be a password."""
        with pytest.raises(ConfigError) as caught:
            checked_url(url)
        assert caught.value.setting == "SHARED_STATE"
        if "/0?" not in str(url):
            assert "s3cr3t" not in f"{caught.value} {caught.value.hint}"
            assert caught.value.__cause__ is None

    @pytest.mark.parametrize(
        ("url", "kind"),
        [
            ("sentinel://user:s3cr3t@a:26379/0", "Redis Sentinel"),
            ("redis+sentinel://a:26379,b:26379/mymaster/0", "Redis Sentinel"),
            ("rediss+sentinel://a:26379/mymaster/0", "Redis Sentinel"),
            ("redis+cluster://a:7000/0", "a Redis Cluster"),
            ("redis-cluster://user:s3cr3t@a:7000", "a Redis Cluster"),
            ("redis://:s3cr3t@a:26379,b:26379/0", "Redis Sentinel or a Redis Cluster"),
        ],
    )
    def test_sentinel_and_cluster_are_refused_by_name(self, url: str, kind: str) -> None:
        """With the setting and a remedy, and without the password."""
        with pytest.raises(ConfigError) as caught:
            checked_url(url)
        said = str(caught.value)
        assert said.startswith(f"SHARED_STATE is a URL for {kind}, which cannot be used. Give one")
        assert "s3cr3t" not in said

    @pytest.mark.parametrize(
        ("url", "known"),
        [
            ("redis://host", {"prefix": "django-proxysql"}),
            ("redis://:p%40ss@host:6380/3?prefix=shop", {"prefix": "shop", "password": "p@ss"}),
            ("redis://:p,ss@host/0", {"password": "p,ss"}),
            ("rediss://user:pass@host/0?ssl_cert_reqs=none", {"ssl_cert_reqs": "none"}),
            ("unix:///run/redis.sock?db=2", {"db": 2}),
            ("unix://user:p%40ss@/run/redis.sock", {"path": "/run/redis.sock"}),
            ("redis://host?db=3&username=user&password=p%40ss&protocol=2", {"protocol": 2}),
        ],
    )
    def test_good(self, url: str, known: dict[str, Any]) -> None:
        assert known.items() <= checked_url(url).items()

    def test_ways_to_a_redis(self) -> None:
        """Those that the docs name lead there: TLS, a socket, a password and another database."""
        server = RedisServer(tls=True)
        socket = server.directory / "redis.sock"
        server.options += ["--unixsocket", str(socket)]
        with server:
            server.ask("ACL", "SETUSER", "shop", "on", ">p@ss", "~*", "+@all")
            plain = f"redis://{server.host}:{server.port}?"
            urls = [
                f"rediss://shop:p%40ss@{server.host}:{server.tls_port}/1?ssl_ca_certs={server.ca}",
                f"unix://shop:p%40ss@{socket}?db=2",
                f"{plain}db=3&username=shop&password=p%40ss&protocol=2",
            ]
            for number, url in enumerate(urls, start=1):
                one = World(url).process()
                assert one.sharing.is_answered, url
                assert f"db{number}:keys=" in server.ask("INFO", "keyspace")
            # … and a certificate of somebody else's does not.
            wrong = World(f"rediss://{server.host}:{server.tls_port}/1").process()
            assert not wrong.sharing.is_answered

    def test_hidden(self) -> None:
        """No repr shows it."""
        url = "redis://user:s3cr3t@127.0.0.1:1/0"
        db = LoadBalancer(peers("db1"), Driver().connect, shared_state=url)
        for thing in (db, db.config, db.sharing, db.sharing.link):  # type: ignore[union-attr]
            assert "s3cr3t" not in repr(thing)


def test_nothing_to_connect_to(caplog: pytest.LogCaptureFixture) -> None:
    """Without a Redis each goes on with what it knows, and says so once, and not the password."""
    caplog.set_level(logging.INFO, "django_proxysql")
    world = World("redis://user:s3cr3t@127.0.0.1:1/0")
    one = world.process()
    for _ in range(3):
        world.clock.advance(2)
        one.step()
    world.down["db1"] = refused_by_host
    assert one.connect() == "db2"
    world.clock.advance(30)
    world.down.clear()
    assert one.connect() == "db1"
    (line,) = [record for record in caplog.records if "Redis" in record.getMessage()]
    assert line.levelno == logging.WARNING
    assert "s3cr3t" not in line.getMessage()
    assert one.sharing.fleet() is None
    assert not one.sharing.settle()


@pytest.mark.parametrize(
    ("address", "is_of_its_host"),
    [
        ("10.0.0.1:3306", False),
        ("db1", False),
        ("2001:db8::7", False),
        ("[2001:db8::1]:3306", False),
        ("localhost:3306", True),
        ("127.0.0.2:3306", True),
        ("::1", True),
        ("[::1]:3306", True),
        ("/run/mysqld.sock", True),
    ],
)
def test_address_of_another_server_on_each_host_goes_with_the_hosts_name(
    address: str, is_of_its_host: bool
) -> None:
    peer = LoadBalancer({"db1": {}}).peers["db1"]
    peer.address = address
    name = names_for_others([peer])["db1"]
    assert name == (f"{address} on {socket.gethostname()}" if is_of_its_host else address)


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("redis://10.0.0.1", "10.0.0.1:6379"),
        ("redis://[2001:db8::7]:7000", "[2001:db8::7]:7000"),
        ("unix:///run/redis.sock", "/run/redis.sock"),
    ],
)
def test_redis_is_named_as_people_write_its_address(url: str, address: str) -> None:
    assert Link(url).address == address
