"""Thousands of processes on one simulated clock, with the real balancers, circuits and Redis.

A discrete-event loop: what happens next is taken off a heap, and the clock is set to when it
happens. Each process is a real ``LoadBalancer`` with real circuits; where circuits are shared,
each has a real ``Sharing``, whose script a real Redis runs, on the simulated clock. What is left
out is the time that things take: connects, refusals and round trips take none.

So that thousands of round trips a simulated second can be made in little real time, those that
fall into one fiftieth of a second travel together: each runs in a greenlet, which is switched out
of where it would wait for Redis.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import greenlet

from django_proxysql import LoadBalancer
from django_proxysql.core.events import CircuitClosed, ConnectFailed
from django_proxysql.core.sharing import Link, Sharing
from django_proxysql.core.sharing.link import SCRIPT
from django_proxysql.core.strategies import Random
from tests.fakes import Clock, even, refused_by_host
from tests.servers.redis import on_clock, on_the_clock

#: The peer that fails, and the others.
FAILING = "db1"
PEERS = (FAILING, "db2", "db3")

#: Seconds within which round trips travel together.
SLOT = 0.02


@dataclass(frozen=True)
class Scenario:
    """What is simulated. Times are in seconds."""

    processes: int
    sharing: bool
    jitter: bool = True
    seed: int = 1
    check_interval: float = 30
    #: How many connects a second each process makes, at random moments.
    rate: float = 0.5
    #: When the peer fails, when it is well again, and when all is over.
    fails_at: float = 5
    well_at: float = 80
    ends_at: float = 115

    @property
    def name(self) -> str:
        return (
            f"{'shared' if self.sharing else 'each for itself'}, "
            f"{'with' if self.jitter else 'without'} jitter"
        )


@dataclass
class Outcome:
    """What happened, by the second of the simulated clock."""

    scenario: Scenario
    #: Failed connects that were no trials: a request met the dead peer.
    failed: Counter[int] = field(default_factory=Counter)
    #: Trials that failed.
    trials: Counter[int] = field(default_factory=Counter)
    #: Connects that the peer has had, while it was well.
    connects: Counter[int] = field(default_factory=Counter)
    #: When each process had the peer back.
    closed: list[float] = field(default_factory=list)
    round_trips: int = 0

    @property
    def cost(self) -> int:
        """Failed connects, trials aside."""
        return sum(self.failed.values())

    @property
    def trials_an_interval(self) -> float:
        """Trials of all processes together, by the interval."""
        scenario = self.scenario
        seconds = scenario.well_at - scenario.fails_at
        return sum(self.trials.values()) / (seconds / scenario.check_interval)

    @property
    def most_trials_a_second(self) -> int:
        return max(self.trials.values(), default=0)

    def recovery(self, share: float) -> float:
        """Seconds from the peer's return until that share of the processes use it again."""
        closed = sorted(self.closed)
        index = max(0, round(share * len(closed)) - 1)
        return closed[index] - self.scenario.well_at

    @property
    def fair_share(self) -> float:
        """Connects a second that the peer gets where all is well."""
        return self.scenario.processes * self.scenario.rate / len(PEERS)

    @property
    def herd(self) -> float:
        """The most connects in a second that the peer got after its return, by its fair share."""
        after = [
            number
            for second, number in self.connects.items()
            if self.scenario.well_at <= second < self.scenario.ends_at
        ]
        return max(after, default=0) / self.fair_share


class _SimulatedLink(Link):
    """A link whose thread is the event loop."""

    process: _Process
    trips = 0

    def join(self, member: Sharing) -> None:
        self._members.add(member)

    def wake(self) -> None:
        self.process.woken()

    def ask(self, question: Any, seconds: float) -> Any:
        self._asked.append(question)
        self.step(self.process.fleet.clock())
        return question.answer

    def _exchange(self, calls: Any) -> list[Any]:
        self.trips += 1
        hub = greenlet.getcurrent().parent
        if hub is not None:
            answers: list[Any] = hub.switch(calls)
            return answers
        return self.process.fleet.exchange(calls)


class _Process:
    def __init__(self, fleet: Fleet, number: int) -> None:
        self.fleet = fleet
        self.number = number
        scenario = fleet.scenario
        self.db = LoadBalancer(
            {name: {"host": name} for name in PEERS},
            fleet.connect,
            check_interval=scenario.check_interval,
            strategy=Random(fleet.chance.random),
            clock=fleet.clock,
            jitter=fleet.chance.random if scenario.jitter else even,
        )
        self.db.add_listener(fleet.note, connects=False)
        self.slot: int | None = None
        if scenario.sharing:
            self.link = _SimulatedLink(fleet.url)
            self.link.process = self
            self.db.group.share(Sharing(self.db.group, self.link))

    def woken(self) -> None:
        self.fleet.plan_step(self, self.fleet.clock())


class _Connection:
    __slots__ = ("__weakref__",)

    def close(self) -> None:
        pass


class Fleet:
    """All processes, and the loop.

    :param url: of a Redis that nothing else uses.
    :param client: a connection to it, for all processes.
    """

    def __init__(self, scenario: Scenario, url: str = "", client: Any = None) -> None:
        self.scenario = scenario
        self.url = url
        self.client = client
        #: What Redis knows the script by, on the simulated clock.
        self.sha = client.script_load(on_clock(SCRIPT)) if client else ""
        self.clock = Clock()
        # Redis's record of a time must be after 1970.
        self.start = self.clock.now = 1_000_000.0
        self.chance = random.Random(scenario.seed)
        self.outcome = Outcome(scenario)
        self.down = False
        self._serial = itertools.count()
        #: Whose round trips are due, by slot.
        self._steps: dict[int, list[_Process]] = {}
        self._heap: list[tuple[float, int, str, _Process | None]] = []
        self.processes = [_Process(self, number) for number in range(scenario.processes)]

    @property
    def second(self) -> int:
        return int(self.clock.now - self.start)

    def connect(self, host: str) -> _Connection:
        if host == FAILING:
            if self.down:
                raise refused_by_host()
            self.outcome.connects[self.second] += 1
        return _Connection()

    def note(self, event: Any) -> None:
        if isinstance(event, ConnectFailed):
            (self.outcome.trials if event.trial else self.outcome.failed)[self.second] += 1
        elif isinstance(event, CircuitClosed):
            self.outcome.closed.append(self.clock.now - self.start)

    def plan(self, when: float, what: str, process: _Process | None = None) -> None:
        heapq.heappush(self._heap, (when, next(self._serial), what, process))

    def plan_step(self, process: _Process, when: float) -> None:
        slot = math.ceil(when / SLOT)
        if process.slot == slot:
            return
        process.slot = slot
        if slot not in self._steps:
            self._steps[slot] = []
            self.plan(slot * SLOT, "steps")
        self._steps[slot].append(process)

    def exchange(self, calls: Any) -> list[Any]:
        """Run the script in Redis for each of them, in one round trip."""
        pipeline = self.client.pipeline(transaction=False)
        for keys, text in calls:
            pipeline.evalsha(self.sha, len(keys), *keys, text, *on_the_clock(self.clock()))
        answers: list[Any] = pipeline.execute()
        return answers

    def step_all(self, slot: int) -> None:
        """Do the round trips of a slot, all in one."""
        now = self.clock.now
        waiting = []
        for process in self._steps.pop(slot):
            # Those that had news since have been planned for a later slot, or an earlier one.
            if process.slot == slot:
                stepper = greenlet.greenlet(process.link.step)
                waiting.append((process, stepper, stepper.switch(now)))
        while waiting:
            calls = [call for _, _, theirs in waiting for call in theirs]
            answers = iter(self.exchange(calls))
            still = []
            for process, stepper, theirs in waiting:
                result = stepper.switch([next(answers) for _ in theirs])
                if stepper.dead:
                    process.slot = None
                    self.plan_step(process, now + result)
                else:
                    still.append((process, stepper, result))
            waiting = still

    def run(self) -> Outcome:
        """Let everything happen; return what did."""
        scenario, start = self.scenario, self.start
        self.plan(start + scenario.fails_at, "fail")
        self.plan(start + scenario.well_at, "well")
        for process in self.processes:
            self.plan(start + self.chance.expovariate(scenario.rate), "connect", process)
            if scenario.sharing:
                process.db.group.view()
                self.plan_step(process, start + self.chance.random())
        while self._heap:
            when, _, what, process = heapq.heappop(self._heap)
            if when > start + scenario.ends_at:
                break
            self.clock.now = when
            if what == "steps":
                self.step_all(round(when / SLOT))
            elif process is None:
                self.down = what == "fail"
            else:
                process.db.connect()
                self.plan(when + self.chance.expovariate(scenario.rate), what, process)
        if scenario.sharing:
            self.outcome.round_trips = sum(process.link.trips for process in self.processes)
        return self.outcome


def simulate(scenario: Scenario, url: str = "") -> Outcome:
    """Run one scenario.

    :param url: of a Redis, where circuits are shared. It is emptied.
    """
    client = None
    if scenario.sharing:
        import redis

        client = redis.Redis.from_url(url)
        client.flushall()
    try:
        return Fleet(scenario, url, client).run()
    finally:
        if client is not None:
            client.close()
