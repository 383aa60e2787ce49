"""A circuit beside a plain model of it: whatever is done in whatever order, they agree."""

from __future__ import annotations

from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from django_proxysql import Fault, PeerBreaker
from tests.fakes import Clock, even, lock_is_free, refused_by_host

INTERVAL = 30.0
LEASE = 31.0
RELEASE = 1.0
LONG_AGO = float("-inf")


class Ticket:
    """A permit, and what the model knows of it."""

    def __init__(self, permit: Any, generation: int, lease: Any) -> None:
        self.permit = permit
        self.generation = generation
        self.lease = lease


class CircuitMachine(RuleBasedStateMachine):
    """The circuit as one would write it down on one sheet, without threads in mind."""

    @initialize(
        fail_max=st.integers(1, 3),
        success_threshold=st.integers(1, 3),
    )
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
        self.fail_max = fail_max
        self.success_threshold = success_threshold
        self.state = "closed"
        self.suspect = False
        self.generation = 0
        self.failures = self.successes = 0
        self.due = self.tried = LONG_AGO
        #: The trial's own mark and when it counts as abandoned, of the trial under way.
        self.lease: tuple[object, float] | None = None
        self.tickets: list[Ticket] = []

    # The model

    def trial_under_way(self) -> bool:
        return self.lease is not None and self.clock.now < self.lease[1]

    def is_late(self, ticket: Ticket) -> bool:
        if ticket.generation != self.generation:
            return True
        return ticket.lease is not None and self.lease is not ticket.lease

    def ends(self, ticket: Ticket) -> None:
        if ticket.lease is not None and self.lease is ticket.lease:
            self.lease = None

    def opens(self) -> None:
        self.state = "open"
        self.suspect = False
        self.generation += 1
        self.successes = 0
        self.tried = self.clock.now
        self.due = self.clock.now + INTERVAL

    def closes(self) -> None:
        self.state = "closed"
        self.suspect = False
        self.generation += 1
        self.failures = self.successes = 0
        self.tried = self.clock.now
        self.due = LONG_AGO

    # What is done to both

    @rule(seconds=st.sampled_from([0.5, RELEASE, INTERVAL, LEASE]))
    def time_passes(self, seconds: float) -> None:
        self.clock.advance(seconds)

    @rule()
    def try_it(self) -> None:
        """Ask for a trial at the moment at which it is due."""
        self.clock.now = max(self.clock.now, self.due)
        self.acquire(None)

    @rule(last_resort=st.sampled_from([None, None, 0.0, 1.0]))
    def acquire(self, last_resort: float | None) -> None:
        permit = self.breaker.acquire(last_resort=last_resort)
        if self.state == "closed" and not self.suspect:
            assert not permit.is_trial
            self.tickets.append(Ticket(permit, self.generation, None))
            return
        now = self.clock.now
        due = now >= self.due or (last_resort is not None and now >= self.tried + last_resort)
        if self.trial_under_way() or not due:
            assert permit is None
            return
        assert permit.is_trial
        self.lease = (object(), now + LEASE)
        if not self.suspect:
            self.state = "half-open"
        self.tickets.append(Ticket(permit, self.generation, self.lease))

    def one(self, data: Any) -> Ticket:
        return self.tickets.pop(data.draw(st.integers(0, len(self.tickets) - 1)))

    @precondition(lambda self: self.tickets)
    @rule(data=st.data())
    def succeed(self, data: Any) -> None:
        ticket = self.one(data)
        ticket.permit.succeeded()
        late = self.is_late(ticket)
        self.ends(ticket)
        if late:
            return
        if ticket.lease is None:
            self.failures = 0
        elif self.suspect:
            self.suspect = False
            self.failures = 0
        else:
            self.successes += 1
            self.due = self.tried = self.clock.now
            if self.successes >= self.success_threshold:
                self.closes()

    @precondition(lambda self: self.tickets)
    @rule(data=st.data())
    def fail(self, data: Any) -> None:
        ticket = self.one(data)
        count = ticket.permit.failed(refused_by_host(), Fault.UNREACHABLE)
        late = self.is_late(ticket)
        self.ends(ticket)
        if late:
            assert count == 0
            return
        self.failures += 1
        assert count == self.failures
        self.tried = self.clock.now
        if ticket.lease is not None or self.failures >= self.fail_max:
            self.opens()

    @precondition(lambda self: self.tickets)
    @rule(data=st.data(), lost=st.booleans())
    def release(self, data: Any, lost: bool) -> None:
        """Release a permit, or lose it."""
        ticket = self.one(data)
        late = self.is_late(ticket)
        # A trial that was lost is one to take back, whatever became of the circuit since.
        if lost:
            del ticket.permit
        else:
            ticket.permit.released()
        mine = ticket.lease is not None and self.lease is ticket.lease
        self.ends(ticket)
        if ticket.lease is None or not mine:
            return
        if self.suspect:
            if not late and not lost:
                self.tried = self.clock.now
            return
        if self.state == "half-open" and not (late and not lost):
            self.state = "open"
            self.due = self.clock.now + RELEASE
            if not lost:
                self.tried = self.clock.now

    @precondition(lambda self: self.tickets)
    @rule(data=st.data())
    def end_twice(self, data: Any) -> None:
        """What is called after the first end is ignored."""
        ticket = self.tickets[data.draw(st.integers(0, len(self.tickets) - 1))]
        self.tickets.remove(ticket)
        self.tickets.append(ticket)
        permit = ticket.permit
        self.succeed_last()
        permit.failed(refused_by_host())
        permit.released()
        permit.succeeded()

    def succeed_last(self) -> None:
        class Last:
            @staticmethod
            def draw(_: Any) -> int:
                return len(self.tickets) - 1

        self.succeed(Last)

    @rule(
        what=st.sampled_from(
            ["suspicion", "trip", "open_by_hand", "close_by_hand", "half_open_by_hand", "fork"]
        )
    )
    def from_outside(self, what: str) -> None:
        getattr(self, what)()

    def suspicion(self) -> None:
        self.breaker.suspect("(2013, 'Lost connection')", Fault.LOST)
        if self.state == "closed" and not self.suspect:
            self.suspect = True
            self.due = LONG_AGO
            self.tried = self.clock.now

    def trip(self) -> None:
        self.breaker.trip(refused_by_host(), Fault.NOT_READY)
        if self.state == "closed":
            self.opens()

    def open_by_hand(self) -> None:
        self.breaker.open()
        self.opens()

    def close_by_hand(self) -> None:
        self.breaker.close()
        self.closes()

    def half_open_by_hand(self) -> None:
        self.breaker.half_open()
        if self.state == "closed":
            self.generation += 1
        self.state = "half-open"
        self.suspect = False
        self.successes = 0
        self.due = self.clock.now

    def fork(self) -> None:
        """What becomes of it in the child of a fork."""
        self.breaker.after_fork()
        if self.lease is not None:
            self.lease = None
            if self.state == "half-open":
                self.state = "open"

    # What always holds

    @invariant()
    def they_agree(self) -> None:
        circuit = self.breaker.circuit
        assert (circuit.state, circuit.suspect) == (self.state, self.suspect)
        assert (circuit.failures, circuit.successes) == (self.failures, self.successes)
        assert (circuit.due, circuit.tried) == (self.due, self.tried)
        assert (self.breaker.trial is not None) == self.trial_under_way()
        assert self.breaker.current_state == self.state
        assert self.breaker.is_available == (self.state == "closed" and not self.suspect)

    @invariant()
    def one_trial_at_most(self) -> None:
        under_way = [
            ticket
            for ticket in self.tickets
            if ticket.lease is not None
            and ticket.lease is self.lease
            and self.clock.now < ticket.lease[1]
        ]
        assert len(under_way) <= 1

    @invariant()
    def closed_means_below_fail_max(self) -> None:
        if self.state == "closed":
            assert self.failures < self.fail_max
            assert self.breaker.circuit.out_since is None
        else:
            assert self.breaker.circuit.out_since is not None

    @invariant()
    def transitions_follow_one_another(self) -> None:
        """The transitions are a path: each transition begins where the last one ended."""
        at = "closed"
        for before, after in self.told:
            # A child of a fork gets no event of what the fork has changed.
            assert before == at or (at, before) == ("half-open", "open")
            at = after

    def teardown(self) -> None:
        """Whatever was done, the peer is available once everything has run out."""
        if not hasattr(self, "breaker"):
            return
        assert lock_is_free(self.breaker)
        self.clock.advance(LEASE + INTERVAL)
        for _ in range(self.success_threshold):
            permit = self.breaker.acquire()
            permit.succeeded()
        assert self.breaker.is_available


TestModel = CircuitMachine.TestCase
TestModel.settings = settings(
    max_examples=250,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
