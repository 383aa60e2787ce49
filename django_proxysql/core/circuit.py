"""A peer's circuit: one immutable record, and what each event makes of it.

The whole state is one record, :class:`Circuit`. Each event is a function of the record and the time
that returns the next record, or the same one if it changes nothing. :func:`transition` adds the
change that listeners have yet to be notified of. No event waits, calls out or takes a lock;
:mod:`.permits` replaces the record by one assignment under a lock.

Each use of the peer belongs to the circuit's *generation*. Opening and closing begin a new one, and
a result from an older generation changes nothing. A trial has a :class:`Lease`: until it ends or
runs out, no other caller is admitted. That holds for a trial whose result has become late, too: the
circuit moves on, and the next trial begins when this one is over.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from .faults import Fault

#: pybreaker's words for the states.
CLOSED, OPEN, HALF_OPEN = "closed", "open", "half-open"

_LONG_AGO = float("-inf")


class Lease:
    """A trial; :func:`trial_of` says whether it is under way.

    :param expires: the moment, on the breaker's clock, from which it counts as abandoned.
    """

    __slots__ = ("bells", "ended", "expires", "holder")

    def __init__(self, expires: float) -> None:
        self.expires = expires
        #: Whether the trial is over.
        self.ended = False
        #: Returns the trial's permit. When that is gone, no thread can report a result. No code
        #: has to run for this: at the recursion limit a finalizer does not.
        self.holder: Callable[[], object | None] = lambda: None
        #: One for each thread or task that waits for the trial's result, which its release() wakes.
        #: A RuntimeError, where that cannot be, is ignored.
        self.bells: list[Any] = []

    @property
    def is_pending(self) -> bool:
        """Whether a thread can still report the trial's result."""
        return not self.ended and self.holder() is not None

    def end(self) -> None:
        """Wake the threads and tasks that wait for the trial's result."""
        self.ended = True
        for bell in self.bells.copy():
            try:
                bell.release()
            except RuntimeError:
                # Another trial's end woke that thread already.
                pass


class Transition(NamedTuple):
    """A change of a circuit, as ``on_transition`` is called with it, outside the lock."""

    before: str
    after: str
    fault: Fault | None = None
    error: str = ""
    #: Opened: seconds until the first trial. Closed: seconds it was out.
    seconds: float = 0.0
    #: Another process found it out (:mod:`django_proxysql.core.sharing`).
    elsewhere: bool = False


class Circuit(NamedTuple):
    """All that is known of a circuit, at one moment. Times are the breaker's clock's."""

    state: str = CLOSED
    #: Grows by one whenever the circuit opens or closes.
    generation: int = 0
    failures: int = 0
    successes: int = 0
    #: Closed, but the next use is a trial.
    suspect: bool = False
    #: Since when the peer has been out; None while closed.
    out_since: float | None = None
    #: When the last failure or trial ended, or the peer became suspect.
    tried: float = _LONG_AGO
    #: When the next trial may begin.
    due: float = _LONG_AGO
    lease: Lease | None = None
    #: What the peer said last, as text: an exception would keep its traceback alive, and with
    #: that the failed attempt's socket.
    error: str = ""
    fault: Fault | None = None
    #: What its trials must ask beyond connecting (:mod:`django_proxysql.core.ready`):
    #: a peer that failed a statement may well connect and answer SET.
    question: str = ""
    #: The changes that are in no listener's queue yet, in their order. A part of the record: a
    #: change and its place in the order are one assignment.
    pending: tuple[Transition, ...] = ()


#: An event, with all that is to be said of it.
CircuitEvent = Callable[[Circuit, float], Circuit]


def transition(
    before: Circuit, event: CircuitEvent, now: float, elsewhere: bool = False
) -> Circuit:
    """Return the record after ``event``, with the change of state, if it is one, in ``pending``.

    :param now: the time, on the breaker's clock.
    :param elsewhere: another process found it out.
    """
    after = event(before, now)
    if (before.state, before.suspect) == (after.state, after.suspect):
        return after
    seconds = 0.0
    if after.state == OPEN:
        seconds = after.due - now
    elif after.state == CLOSED and before.out_since is not None:
        seconds = now - before.out_since
    change = Transition(before.state, after.state, after.fault, after.error, seconds, elsewhere)
    return after._replace(pending=(*before.pending, change))


def is_usable(circuit: Circuit) -> bool:
    """Return whether it is closed and no suspect: anyone may use the peer."""
    return circuit.state == CLOSED and not circuit.suspect


def trial_of(circuit: Circuit, now: float) -> Lease | None:
    """Return the trial that is under way, if there is one.

    The one place that decides: a lease that has ended, has run out or lost its permit is none,
    though the record still has it.
    """
    lease = circuit.lease
    if lease is None or not lease.is_pending or now >= lease.expires:
        return None
    return lease


def trial_due(circuit: Circuit, now: float, last_resort: float | None = None) -> bool:
    """Return whether a trial may begin; as a last resort so many seconds after the last try."""
    if trial_of(circuit, now) is not None:
        return False
    if now >= circuit.due:
        return True
    return last_resort is not None and now >= circuit.tried + last_resort


def is_late(circuit: Circuit, generation: int, lease: Lease | None) -> bool:
    """Return whether a result is of another time: the circuit has opened or closed since, or the
    trial's lease ran out and another has taken its place."""
    return circuit.generation != generation or (lease is not None and circuit.lease is not lease)


def inherited(circuit: Circuit) -> Circuit:
    """Return the record in the child of a fork: neither the parent's trial nor its news."""
    if circuit.lease is not None and circuit.state == HALF_OPEN:
        circuit = circuit._replace(state=OPEN)
    return circuit._replace(lease=None, pending=())


def _opened(circuit: Circuit, now: float, due: float, error: str, fault: Fault | None) -> Circuit:
    # A trial under way goes on: its lease stays, and no other begins until it is over.
    return circuit._replace(
        state=OPEN,
        generation=circuit.generation + 1,
        successes=0,
        suspect=False,
        out_since=now if circuit.out_since is None else circuit.out_since,
        tried=now,
        due=due,
        error=error,
        fault=fault,
    )


def _closed(circuit: Circuit, now: float, lease: Lease | None) -> Circuit:
    return Circuit(
        generation=circuit.generation + 1, tried=now, lease=lease, pending=circuit.pending
    )


def _without(circuit: Circuit, lease: Lease | None) -> Circuit:
    return circuit._replace(lease=None) if lease is not None and circuit.lease is lease else circuit


# Admission


def asked(
    circuit: Circuit, now: float, lease: Lease, last_resort: float | None, asks_gate: bool
) -> Circuit:
    """Begin a trial if one is due: a caller that makes trials asks for the right to use the peer.

    :param asks_gate: the breaker's gate is asked next, and the circuit stays open until it has
        answered.
    """
    if is_usable(circuit) or not trial_due(circuit, now, last_resort):
        return circuit
    if circuit.suspect or asks_gate:
        return circuit._replace(lease=lease)
    return circuit._replace(lease=lease, state=HALF_OPEN)


def answered(
    circuit: Circuit, now: float, lease: Lease, generation: int, held_back: float, due: float
) -> Circuit:
    """Begin the trial or put it off, as the breaker's gate has answered.

    :param generation: the circuit's, when the gate was asked.
    :param held_back: seconds for which the trial is left to other processes; 0: go ahead.
    :param due: when the trial was due before the caller asked.
    """
    if (circuit.lease, circuit.generation) != (lease, generation) or circuit.state == CLOSED:
        # It has closed, or opened anew, while the gate was asked.
        return _without(circuit, lease)
    if held_back > 0:
        # An operator asked, and it was not due yet: then it is no sooner for that.
        return circuit._replace(lease=None, state=OPEN, due=max(now + held_back, due))
    return circuit._replace(state=HALF_OPEN)


# Results


def succeeded(
    circuit: Circuit, now: float, generation: int, lease: Lease | None, success_threshold: int
) -> Circuit:
    """Count a trial's success; end the row of failures."""
    if is_late(circuit, generation, lease):
        return _without(circuit, lease)
    if lease is None:
        return circuit._replace(failures=0)
    if circuit.state == CLOSED:
        # A suspect is well. Nothing has happened: no log line, no new generation.
        return circuit._replace(suspect=False, lease=None, failures=0, error="", fault=None)
    if circuit.successes + 1 >= success_threshold:
        return _closed(circuit, now, None)
    return circuit._replace(successes=circuit.successes + 1, lease=None, due=now, tried=now)


def failed(
    circuit: Circuit,
    now: float,
    generation: int,
    lease: Lease | None,
    fail_max: int,
    due: float,
    error: str,
    fault: Fault | None,
) -> Circuit:
    """Count a failure; open the circuit at ``fail_max`` of them, or if it was a trial's.

    :param due: when the next trial may begin, if the circuit opens.
    """
    late = is_late(circuit, generation, lease)
    circuit = _without(circuit, lease)
    if late:
        return circuit
    circuit = circuit._replace(failures=circuit.failures + 1)
    # Half-open: the connection of a good trial, one of several that are asked for.
    if lease is not None or circuit.state == HALF_OPEN or circuit.failures >= fail_max:
        return _opened(circuit, now, due, error, fault)
    return circuit._replace(tried=now, error=error, fault=fault)


def released(circuit: Circuit, now: float, generation: int, lease: Lease, due: float) -> Circuit:
    """End a trial that says nothing about the peer; the next one is ``due`` then."""
    late = is_late(circuit, generation, lease)
    circuit = _without(circuit, lease)
    if late:
        return circuit
    if circuit.state == CLOSED:
        # A suspect is never excluded: a caller that has no other peer may try at once.
        return circuit._replace(tried=now)
    return circuit._replace(state=OPEN, tried=now, due=due)


def abandoned(circuit: Circuit, now: float, lease: Lease, due: float) -> Circuit:
    """Cancel a trial whose permit is gone; what is known of the peer is as old as it was."""
    if circuit.lease is lease and circuit.state == HALF_OPEN:
        return circuit._replace(lease=None, state=OPEN, due=due)
    return _without(circuit, lease)


# What operators and established connections say


def opened_by_hand(circuit: Circuit, now: float, due: float) -> Circuit:
    """Open the circuit, whatever it was."""
    return _opened(circuit, now, due, "opened by hand", None)


def half_opened_by_hand(circuit: Circuit, now: float) -> Circuit:
    """Make a trial due now, or once the trial under way is over."""
    # What was begun while the circuit was closed is of another time.
    generation = circuit.generation + (circuit.state == CLOSED)
    return circuit._replace(
        state=HALF_OPEN,
        generation=generation,
        suspect=False,
        successes=0,
        due=now,
        out_since=now if circuit.out_since is None else circuit.out_since,
    )


def closed_by_hand(circuit: Circuit, now: float) -> Circuit:
    """Close the circuit. A trial under way is not over for that."""
    return _closed(circuit, now, circuit.lease)


def suspected(circuit: Circuit, now: float, error: str, fault: Fault | None) -> Circuit:
    """Make the next use of a closed circuit a trial: a connection was lost, for whatever reason."""
    if not is_usable(circuit):
        return circuit
    return circuit._replace(suspect=True, tried=now, due=_LONG_AGO, error=error, fault=fault)


def tripped(
    circuit: Circuit,
    now: float,
    due: float,
    error: str,
    fault: Fault,
    question: str,
    failures: int = 0,
) -> Circuit:
    """Open a closed circuit at once: a statement's answer says that the peer must not be used.

    :param question: what its trials must ask.
    :param failures: how many failures in a row these were, if they were counted.
    """
    if circuit.state != CLOSED:
        # A failed connect opened it: what a statement was answered is still to be asked.
        return circuit._replace(question=circuit.question or question)
    opened = _opened(circuit, now, due, error, fault)
    return opened._replace(question=question, failures=max(circuit.failures, failures))


def rescheduled(circuit: Circuit, now: float, seconds: float) -> Circuit:
    """Apply another time-out to the present opening, as pybreaker does."""
    return circuit._replace(due=circuit.tried + seconds) if circuit.state == OPEN else circuit


# What other processes found out. The generation is that of the record that was compared.


def opened_elsewhere(
    circuit: Circuit,
    now: float,
    generation: int,
    due: float,
    out_for: float,
    error: str,
    fault: Fault | None,
    question: str,
) -> Circuit:
    """Open the circuit or put off its trial. It counts as no failure of this process."""
    if circuit.generation != generation:
        return circuit
    if circuit.state == CLOSED:
        opened = _opened(circuit, now, due, error, fault)
        # This process has not tried the peer: if it has no other left it may do so at once.
        return opened._replace(out_since=now - out_for, tried=_LONG_AGO, question=question)
    if trial_of(circuit, now) is not None:
        # It is left to its own result.
        return circuit
    return circuit._replace(
        state=OPEN,
        successes=0,
        due=due,
        error=error,
        fault=fault,
        question=circuit.question or question,
    )


def closed_elsewhere(circuit: Circuit, now: float, generation: int) -> Circuit:
    """Close the circuit: another process's trial did. A trial under way is not over for that."""
    if circuit.generation != generation or circuit.state == CLOSED:
        return circuit
    return _closed(circuit, now, circuit.lease)


def put_off(circuit: Circuit, now: float, generation: int, due: float) -> Circuit:
    """Put the trial off, never forward: another process is about to make it."""
    if (circuit.generation, circuit.state) != (generation, OPEN):
        return circuit
    return circuit._replace(due=max(circuit.due, due))
