"""A circuit's transitions: every record with every event, beside rules written from the docs.

The oracle below shares no line with the code. It says, event by event, whether anything happens,
what state follows, and what the record then knows; docs/explanation/connecting.rst has the words.
A breaker goes through the events beside it, in whatever order they come.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from django_proxysql import Fault, PeerBreaker
from django_proxysql.core import circuit as module
from django_proxysql.core.circuit import (
    Circuit,
    Lease,
    Transition,
    inherited,
    is_usable,
    transition,
    trial_of,
)
from tests.fakes import Clock, even, lock_is_free, refused_by_host

NOW = 1000.0
LONG_AGO = float("-inf")
#: What the events say of the next trial, each in its own way.
LATER = NOW + 30

KINDS = ["closed", "suspect", "open", "half-open"]


def lease(*, expires: float = NOW + 60, ended: bool = False) -> Lease:
    made = Lease(expires)
    made.ended = ended
    # Its permit lives.
    made.holder = lambda: made
    return made


MINE = lease()
#: Whose trial the record has: none, the event's, another's, one that is over in some way.
LEASES = {
    "none": None,
    "mine": MINE,
    "another's": lease(),
    "ended": lease(ended=True),
    "expired": lease(expires=NOW),
    "permit gone": Lease(NOW + 60),
}


def records() -> Iterator[Circuit]:
    """Every kind of record, with all that an event looks at."""
    for kind, held, failures, successes, due in itertools.product(
        KINDS, LEASES.values(), (0, 2), (0, 1), (NOW - 1, NOW, NOW + 20)
    ):
        is_out = kind in ("open", "half-open")
        yield Circuit(
            state=kind if is_out else "closed",
            suspect=kind == "suspect",
            generation=7,
            failures=failures,
            successes=successes,
            out_since=NOW - 100 if is_out else None,
            tried=NOW - 2,
            due=due,
            lease=held,
            error="gone away" if kind != "closed" else "",
            fault=Fault.LOST if kind != "closed" else None,
            question="writable" if kind == "open" and failures else "",
            pending=(Transition("half-open", "open"),) if failures else (),
        )


def event(name: str, **said: Any) -> Any:
    return functools.partial(getattr(module, name), **said)


def events() -> Iterator[Any]:
    for last_resort, asks_gate in itertools.product((None, 0.0, 2.0, 5.0), (False, True)):
        yield event("asked", lease=MINE, last_resort=last_resort, asks_gate=asks_gate)
    for generation in (6, 7):
        now = {"generation": generation}
        for held_back, due in itertools.product((0.0, 4.0), (NOW - 9, NOW + 9)):
            yield event("answered", **now, lease=MINE, held_back=held_back, due=due)
        for own in (None, MINE):
            for threshold in (1, 2):
                yield event("succeeded", **now, lease=own, success_threshold=threshold)
            refused = {"due": LATER, "error": "refused", "fault": Fault.UNREACHABLE}
            for fail_max in (1, 3, 4):
                yield event("failed", **now, lease=own, fail_max=fail_max, **refused)
        yield event("released", **now, lease=MINE, due=NOW + 1)
        theirs = {"error": "theirs", "fault": Fault.REFUSED, "question": "backend"}
        yield event("opened_elsewhere", **now, due=LATER, out_for=12.0, **theirs)
        yield event("closed_elsewhere", **now)
        yield from (event("put_off", **now, due=moment) for moment in (NOW + 5, NOW + 50))
    yield event("abandoned", lease=MINE, due=NOW + 1)
    yield event("opened_by_hand", due=LATER)
    yield from (event("half_opened_by_hand"), event("closed_by_hand"))
    yield event("rescheduled", seconds=8.0)
    yield event("suspected", error="lost", fault=Fault.LOST)
    says = {"error": "WSREP", "fault": Fault.NOT_READY, "question": "galera"}
    yield from (event("tripped", due=LATER, **says, failures=failures) for failures in (0, 5))


# The oracle


def kind_of(record: Circuit) -> str:
    return "suspect" if record.suspect else record.state


def opening(was: Circuit, now: float, **knows: Any) -> dict[str, Any]:
    """What each opening does to a record."""
    since = was.out_since if kind_of(was) in ("open", "half-open") else now
    fresh = {"state": "open", "suspect": False, "generation": was.generation + 1, "successes": 0}
    return {**fresh, "tried": now, "out_since": since, **knows}


def closing(was: Circuit, now: float, lease: Lease | None) -> dict[str, Any]:
    """What each closing leaves: nothing but its own moment."""
    fresh = {**Circuit()._asdict(), "generation": was.generation + 1, "tried": now, "lease": lease}
    del fresh["pending"]
    return fresh


def goes_on(was: Circuit, now: float) -> bool:
    """Whether a trial is under way: it has not ended, not run out, and its permit lives."""
    lease = was.lease
    return lease is not None and not (lease.ended or lease.expires <= now or not lease.holder())


def expected(was: Circuit, event: Any, now: float) -> dict[str, Any]:
    """Return the fields that ``event`` changes, ``pending`` aside."""
    kind, name, said = kind_of(was), event.func.__name__, event.keywords
    of_now = said.get("generation", was.generation) == was.generation
    is_trial = said.get("lease") is not None
    mine = is_trial and was.lease is said["lease"]
    # Whatever else is said, the trial that ends is over.
    over = {"lease": None} if mine else {}

    if name == "asked":
        resort = said["last_resort"] is not None and was.tried + said["last_resort"] <= now
        if kind == "closed" or goes_on(was, now) or not (was.due <= now or resort):
            return {}
        begun = {"lease": said["lease"]}
        return begun if said["asks_gate"] or kind == "suspect" else {**begun, "state": "half-open"}
    if name == "answered":
        if not mine or not of_now or was.state == "closed":
            return over
        if said["held_back"]:
            return {"lease": None, "state": "open", "due": max(now + 4, said["due"])}
        return {"state": "half-open"}

    if name in ("succeeded", "failed", "released") and (not of_now or (is_trial and not mine)):
        return over
    if name == "succeeded":
        if not is_trial:
            return {"failures": 0}
        if was.state == "closed":
            return {**over, "suspect": False, "failures": 0, "error": "", "fault": None}
        if was.successes + 1 >= said["success_threshold"]:
            return closing(was, now, None)
        return {**over, "successes": was.successes + 1, "due": now, "tried": now}
    if name == "failed":
        says = {"error": said["error"], "fault": said["fault"], "failures": was.failures + 1}
        if is_trial or kind == "half-open" or was.failures + 1 >= said["fail_max"]:
            return {**over, **opening(was, now, due=said["due"], **says)}
        return {**over, "tried": now, **says}
    if name == "released":
        if was.state == "closed":
            return {**over, "tried": now}
        return {**over, "state": "open", "tried": now, "due": said["due"]}
    if name == "abandoned":
        return {**over, "state": "open", "due": said["due"]} if mine and kind[0] == "h" else over

    if name == "opened_by_hand":
        return opening(was, now, due=said["due"], error="opened by hand", fault=None)
    if name == "closed_by_hand":
        return closing(was, now, was.lease)
    if name == "half_opened_by_hand":
        begins = {"out_since": now, "generation": was.generation + 1}
        reset = {"state": "half-open", "suspect": False, "successes": 0, "due": now}
        return {**reset, **begins} if was.state == "closed" else reset
    if name == "suspected":
        doubt = {"suspect": True, "tried": now, "due": LONG_AGO}
        return {**doubt, "error": said["error"], "fault": said["fault"]} if kind == "closed" else {}
    if name == "tripped":
        if kind in ("open", "half-open"):
            return {"question": was.question or said["question"]}
        says = {key: said[key] for key in ("due", "error", "fault", "question")}
        return opening(was, now, failures=max(was.failures, said["failures"]), **says)
    if name == "rescheduled":
        return {"due": was.tried + 8} if kind == "open" else {}

    if not of_now:
        return {}
    if name == "closed_elsewhere":
        return {} if was.state == "closed" else closing(was, now, was.lease)
    if name == "put_off":
        return {"due": max(was.due, said["due"])} if kind == "open" else {}
    assert name == "opened_elsewhere"
    says = {key: said[key] for key in ("due", "error", "fault")}
    if was.state == "closed":
        news = {"out_since": now - 12, "tried": LONG_AGO, "question": said["question"]}
        return {**opening(was, now, **says), **news}
    if goes_on(was, now):
        return {}
    return {"state": "open", "successes": 0, "question": was.question or "backend", **says}


# The comparison


@pytest.mark.parametrize("elsewhere", [False, True])
def test_every_record_with_every_event(elsewhere: bool) -> None:
    """State, counts, times, lease and what is notified: all as the rules say."""
    combinations = 0
    for was, event in itertools.product(records(), events()):
        combinations += 1
        copy = was._asdict()
        now = transition(was, event, NOW, elsewhere)
        wanted = was._replace(**expected(was, event, NOW))
        if kind_of(wanted) != kind_of(was):
            seconds = {"open": wanted.due - NOW, "half-open": 0.0}.get(
                wanted.state, 0.0 if was.out_since is None else NOW - was.out_since
            )
            change = Transition(
                was.state, wanted.state, wanted.fault, wanted.error, seconds, elsewhere
            )
            wanted = wanted._replace(pending=(*was.pending, change))
        assert now == wanted, (was, event)
        # A record is never changed, and an event that changes nothing makes no new one.
        assert was._asdict() == copy
        assert now == was or now is not was
    assert combinations > 15_000


def test_what_holds_whatever_happens() -> None:
    """A suspect is closed, a peer is out while its circuit is not, and a trial is alone.

    The generation grows with each opening and closing: results of an older time are known for it.
    """
    for was, event in itertools.product(records(), events()):
        now = transition(was, event, NOW)
        assert not now.suspect or now.state == "closed", (was, event)
        assert (now.out_since is None) == (now.state == "closed"), (was, event)
        is_change = (was.state == "closed") != (now.state == "closed")
        assert now.generation - was.generation in ((1,) if is_change else (0, 1)), (was, event)
        if trial_of(was, NOW) is not None and was.lease is not MINE:
            assert now.lease is was.lease, (was, event)


def test_every_event_is_tried() -> None:
    known = {
        name
        for name, thing in vars(module).items()
        if inspect.isfunction(thing)
        and thing.__annotations__.get("return") == "Circuit"
        and not name.startswith("_")
    }
    assert {event.func.__name__ for event in events()} == known - {"inherited", "transition"}


def test_child_of_a_fork_begins_without_trial_and_news() -> None:
    """It keeps what is known of the peer."""
    for was in records():
        now = inherited(was)
        assert trial_of(now, NOW) is None
        had_trial = was.lease is not None and was.state == "half-open"
        wanted = was._replace(lease=None, pending=(), state="open" if had_trial else was.state)
        assert now == wanted


def test_only_a_closed_circuit_without_doubts_is_usable() -> None:
    for was in records():
        assert is_usable(was) == (kind_of(was) == "closed")


# A breaker beside it

INTERVAL, LEASE, RELEASE = 30.0, 31.0, 1.0


class BreakerMachine(RuleBasedStateMachine):
    """Has a breaker's permits end in whatever way and order; its record is what the rules say."""

    @initialize(fail_max=st.integers(1, 3), success_threshold=st.integers(1, 3))
    def begin(self, fail_max: int, success_threshold: int) -> None:
        self.clock = Clock()
        self.told: list[tuple[str, str]] = []
        self.breaker = PeerBreaker(
            fail_max,
            INTERVAL,
            success_threshold,
            clock=self.clock,
            jitter=even,
            lease=LEASE,
            release_interval=RELEASE,
            on_transition=lambda t: self.told.append((t.before, t.after)),
        )
        self.record = Circuit()
        self.permits: list[Any] = []
        #: The generation that the last connection belongs to.
        self.made = 0

    def happens(self, name: str, **said: Any) -> None:
        """Note what the rules say of an event that the breaker has had."""
        changes = expected(self.record, event(name, **said), self.clock.now)
        self.record = self.record._replace(**changes)

    @rule(seconds=st.sampled_from([0.5, RELEASE, INTERVAL, LEASE]))
    def time_passes(self, seconds: float) -> None:
        self.clock.advance(seconds)

    @rule()
    def try_it(self) -> None:
        """Ask for a trial at the moment at which it is due."""
        self.clock.now = max(self.clock.now, self.record.due)
        self.acquire(None)

    @rule(last_resort=st.sampled_from([None, None, 0.0, 1.0]))
    def acquire(self, last_resort: float | None) -> None:
        permit = self.breaker.acquire(last_resort=last_resort)
        asked = permit.lease if permit is not None and permit.is_trial else Lease(0)
        self.happens("asked", lease=asked, last_resort=last_resort, asks_gate=False)
        # A caller without the trial uses a circuit that is closed, or is turned away.
        is_mine = self.record.lease is asked
        assert (permit is not None) == (is_mine or kind_of(self.record) == "closed")
        if permit is not None:
            assert permit.is_trial == is_mine
            self.permits.append(permit)

    def fails(self, generation: int, lease: Lease | None) -> None:
        due = self.clock.now + INTERVAL
        of = {"generation": generation, "lease": lease, "fail_max": self.breaker.fail_max}
        says = {"error": str(refused_by_host()), "fault": Fault.UNREACHABLE}
        self.happens("failed", **of, due=due, **says)

    @precondition(lambda self: self.permits)
    @rule(which=st.integers(0, 99), end=st.sampled_from(["succeeded", "failed", "released", ""]))
    def end(self, which: int, end: str) -> None:
        """End a permit, or lose it."""
        permit = self.permits.pop(which % len(self.permits))
        lease, now, before = permit.lease, self.clock.now, self.record
        of = {"generation": permit.generation, "lease": lease}
        is_late = before.generation != permit.generation or lease not in (None, before.lease)
        if end == "succeeded":
            permit.succeeded()
            self.happens(end, **of, success_threshold=self.breaker.success_threshold)
            # What was made with it belongs to the circuit that it has closed.
            made = of["generation"] if is_late else self.record.generation
            assert permit.generation == made
            self.made = made
        elif end == "failed":
            count = permit.failed(refused_by_host(), Fault.UNREACHABLE)
            self.fails(**of)
            assert count == (0 if is_late else self.record.failures)
        elif end:
            permit.released()
        else:
            del permit
        if end in ("released", "") and lease is not None:
            lost = {"lease": lease} if end == "" else of
            self.happens(end or "abandoned", **lost, due=now + RELEASE)
        if end:
            # What is called after the first end is ignored.
            permit.failed(refused_by_host())
            permit.released()
            permit.succeeded()
        # Threads that wait for it are woken.
        assert lease is None or lease.ended

    @rule()
    def connection_is_lost(self) -> None:
        """The last one that was made is of no use: that is a failure, unless it is an old one."""
        self.breaker.count_failure(refused_by_host(), Fault.UNREACHABLE, self.made)
        self.fails(self.made, None)

    @rule(what=st.sampled_from(["suspect", "trip", "open", "close", "half_open", "fork"]))
    def from_outside(self, what: str) -> None:
        due = self.clock.now + INTERVAL
        if what == "suspect":
            self.breaker.suspect("(2013, 'Lost connection')", Fault.LOST)
            self.happens("suspected", error="(2013, 'Lost connection')", fault=Fault.LOST)
        elif what == "trip":
            self.breaker.trip(refused_by_host(), Fault.NOT_READY, "galera")
            says = {"error": str(refused_by_host()), "fault": Fault.NOT_READY}
            self.happens("tripped", due=due, question="galera", failures=0, **says)
        elif what == "open":
            self.breaker.open()
            self.happens("opened_by_hand", due=due)
        elif what == "close":
            self.breaker.close()
            self.happens("closed_by_hand")
        elif what == "half_open":
            self.breaker.half_open()
            self.happens("half_opened_by_hand")
        else:
            self.breaker.after_fork()
            self.record = inherited(self.record)

    @invariant()
    def they_agree(self) -> None:
        # A finalizer that cancels a lost trial leaves the news to the next event.
        assert self.breaker.circuit._replace(pending=()) == self.record
        assert (self.breaker.trial is not None) == goes_on(self.record, self.clock.now)
        assert self.breaker.is_available == (kind_of(self.record) == "closed")
        assert self.record.state != "closed" or self.record.failures < self.breaker.fail_max

    @invariant()
    def each_transition_begins_where_the_last_one_ended(self) -> None:
        at = "closed"
        for before, after in self.told:
            # A child of a fork gets no event of what the fork has changed.
            assert before == at or (at, before) == ("half-open", "open")
            at = after

    def teardown(self) -> None:
        """Whatever was done, the peer is available once everything has run out."""
        if hasattr(self, "breaker"):
            assert lock_is_free(self.breaker)
            self.clock.advance(LEASE + INTERVAL)
            for _ in range(self.breaker.success_threshold):
                self.breaker.acquire().succeeded()
            assert self.breaker.is_available


TestBreaker = BreakerMachine.TestCase
TestBreaker.settings = settings(
    max_examples=250,
    stateful_step_count=40,
    derandomize=True,
    database=None,
)
