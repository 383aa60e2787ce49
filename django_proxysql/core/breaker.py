"""A circuit breaker for one peer, safe for every thread that uses it.

:class:`PeerBreaker` is a ``pybreaker.CircuitBreaker``: its thresholds,
listeners, ``call``, ``calling``, decorator and states are pybreaker's. What it
mends (seen in pybreaker 1.4.1):

* ``call()`` holds the breaker's lock while the guarded function runs, so that
  32 threads connecting to a slow server queue up behind each other;
* ``calling()`` lets every caller into a half-open circuit;
* an excluded exception counts as a success, KeyboardInterrupt as a failure;
* the call that trips the breaker raises ``CircuitBreakerError`` and hides the
  driver's error.

How it holds
------------

The whole state is one immutable record, :class:`Circuit`. It is read without
the lock and replaced, under the lock, by one assignment. So no reader ever
sees half a transition, a thread killed between two lines leaves either the old
record or the new one, and a child forked in between inherits one of the two
and needs nothing but a fresh lock. Nothing that waits, calls out or notifies
happens under the lock. A signal handler or finalizer that uses the circuit
while its own thread is replacing the record is let in by the lock; the
replacement then begins anew from what it left (``PeerBreaker._swap``).

Locks of C are the only ones used: ``threading.Event`` and its kin take theirs
in Python code, and a thread that is killed there keeps it for ever. (Python before 3.11:
:mod:`django_proxysql.core.runtime`.)

Each use of the peer takes a :class:`Permit` first and ends it with exactly one
of *succeeded*, *failed* or *released* (the error was not the peer's). A permit
remembers the circuit's generation; opening and closing start a new one, and a
result from an older generation changes nothing. A trial's permit holds a
lease: until it is ended or the lease runs out, nobody else is admitted. That
holds for a trial whose result has become late, too: the circuit moves on, and
the next trial begins when this one is over.
"""

from __future__ import annotations

import contextlib
import inspect
import random
import threading
import time
import types
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from datetime import datetime, timezone
from typing import Any, NamedTuple, Protocol, TypeVar

import pybreaker

from . import drivers
from .config import function, number
from .dispatch import Teller
from .exceptions import ConfigError
from .faults import Fault
from .logger import complain
from .runtime import new_lock, renew_in_child

__all__ = [
    "Circuit",
    "CircuitBreakerError",
    "Hearer",
    "Lease",
    "PeerBreaker",
    "Permit",
    "Transition",
    "trial_of",
]

CircuitBreakerError = pybreaker.CircuitBreakerError

_T = TypeVar("_T")

CLOSED = pybreaker.STATE_CLOSED
OPEN = pybreaker.STATE_OPEN
HALF_OPEN = pybreaker.STATE_HALF_OPEN

#: Seconds after which a thread that waits for a trial's end looks whether it has missed it.
_LOOK_AGAIN = 1.0

#: A fleet that saw a peer fail at one moment must not try it again at one moment.
JITTER = 0.1

_STATES = {
    CLOSED: pybreaker.CircuitClosedState,
    OPEN: pybreaker.CircuitOpenState,
    HALF_OPEN: pybreaker.CircuitHalfOpenState,
}


class Hearer(Protocol):
    """Who hears of a circuit's changes, in their order: a :class:`~.teller.Teller`, or as one."""

    def put(self, change: Transition, /) -> None:
        """Note the change. Called within the circuit's lock: waits for nothing, calls nobody."""

    def go(self) -> None:
        """Do what the noted changes demand. Called without a lock."""


def _nobody() -> None:
    """Hold a lease that no permit has."""


class Lease:
    """A trial. :func:`trial_of` says whether it is under way.

    :param expires: the moment, on the breaker's clock, from which it counts as abandoned.
    """

    __slots__ = ("_bells", "ended", "expires", "holder")

    def __init__(self, expires: float) -> None:
        self.expires = expires
        #: Whether the trial is over.
        self.ended = False
        #: The permit of the trial. When that is gone, no thread can report a result. No code has
        #: to run for this: at the recursion limit a finalizer does not.
        self.holder: Callable[[], Permit | None] = _nobody
        #: A lock for each who waits for the trial's result, released to wake them.
        self._bells: list[threading.Lock] = []

    def end(self) -> None:
        """Wake those who wait for the trial's result."""
        self.ended = True
        for bell in self._bells.copy():
            try:
                bell.release()
            except RuntimeError:
                # Another trial's end woke them already.
                pass

    @staticmethod
    def wait_for_any(leases: Sequence[Lease], seconds: float) -> None:
        """Wait until one of the trials has ended, at most ``seconds``."""
        bell = threading.Lock()
        bell.acquire()
        for lease in leases:
            lease._bells.append(bell)
        # A trial that ended before its bell was hung up does not ring it, and one whose end is
        # interrupted may not either.
        while seconds > 0 and not any(lease.ended or lease.holder() is None for lease in leases):
            if bell.acquire(timeout=min(seconds, _LOOK_AGAIN)):
                return
            seconds -= _LOOK_AGAIN


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
    tried: float = float("-inf")
    #: When the next trial may begin.
    due: float = float("-inf")
    lease: Lease | None = None
    #: What the peer said last, as text: an exception would keep its
    #: traceback alive, and with that the failed attempt's socket.
    error: str = ""
    fault: Fault | None = None
    #: What its trials must ask beyond connecting (:mod:`django_proxysql.core.ready`):
    #: a peer that failed a statement may well connect and answer SET.
    question: str = ""
    #: Wall-clock time, for pybreaker's ``opened_at``.
    opened_at: datetime | None = None
    #: The changes that no listener's queue holds yet, in their order. A part of the record: a
    #: change and its place in the order are one assignment.
    untold: tuple[Transition, ...] = ()


class Transition(NamedTuple):
    """A change of a circuit, told to ``on_transition`` outside the lock."""

    before: str
    after: str
    fault: Fault | None = None
    error: str = ""
    #: Opened: seconds until the first trial. Closed: seconds it was out.
    seconds: float = 0.0
    #: Another process found it out (:mod:`django_proxysql.core.sharing`).
    learnt: bool = False


class _CircuitView(pybreaker.CircuitBreakerStorage):
    """pybreaker's storage interface onto the record, so that there is one truth.

    A plain ``pybreaker.CircuitBreaker`` may have it for its ``state_storage``
    as well: it then works on this circuit, with its own thresholds.
    """

    def __init__(self, breaker: PeerBreaker) -> None:
        super().__init__("django_proxysql")
        self._breaker = breaker

    @property
    def state(self) -> str:
        return self._breaker._circuit.state

    @state.setter
    def state(self, state: str) -> None:
        self._breaker.state = state

    @property
    def counter(self) -> int:
        return self._breaker._circuit.failures

    @property
    def success_counter(self) -> int:
        return self._breaker._circuit.successes

    @property
    def opened_at(self) -> datetime | None:
        return self._breaker._circuit.opened_at

    @opened_at.setter
    def opened_at(self, moment: datetime) -> None:
        """Ignored: the circuit notes the moment itself."""

    # PeerBreaker counts on its own; these are what a plain breaker calls.

    def increment_counter(self) -> None:
        self._breaker._swap(lambda circuit: circuit._replace(failures=circuit.failures + 1))

    def reset_counter(self) -> None:
        self._breaker._swap(lambda circuit: circuit._replace(failures=0))

    def increment_success_counter(self) -> None:
        self._breaker._swap(lambda circuit: circuit._replace(successes=circuit.successes + 1))

    def reset_success_counter(self) -> None:
        self._breaker._swap(lambda circuit: circuit._replace(successes=0))


class Permit:
    """The right to use a peer once. End it by exactly one of its methods.

    What is called after the first end is ignored. However a trial's end is broken off, the
    trial is over: its lease is marked without a call, which the recursion limit might refuse.
    """

    __slots__ = ("_breaker", "_ended", "_lease", "generation", "is_trial")

    def __init__(self, breaker: PeerBreaker, generation: int, lease: Lease | None) -> None:
        self._breaker = breaker
        #: The circuit's generation that what was made with the permit belongs to. A trial that
        #: closes the circuit belongs to the generation that it begins.
        self.generation = generation
        #: The trial's; None where this is none.
        self._lease = lease
        #: Whether this is the one attempt that a half-open or suspect circuit allows.
        self.is_trial = lease is not None
        self._ended = False

    def succeeded(self) -> None:
        """The peer did what it was asked to do."""
        breaker, lease = self._breaker, self._lease
        # The healthy peer's way, hundreds of times a second: nothing to
        # write, so no lock to take.
        if lease is None and not breaker._circuit.failures:
            if self._ended:
                return
            self._ended = True
            if breaker._listeners:
                breaker._tell("success")
            return
        try:
            if self._end():
                self.generation = breaker._record_success(self.generation, lease)
        finally:
            if lease is not None:
                lease.ended = True

    def failed(self, exc: BaseException, fault: Fault | None = None) -> int:
        """The peer failed, by ``exc``.

        :returns: which failure in a row this was; 0 when it came too late to count.
        """
        lease = self._lease
        try:
            if not self._end():
                return 0
            return self._breaker._record_failure(self.generation, lease, exc, fault)
        finally:
            if lease is not None:
                lease.ended = True

    def released(self) -> None:
        """What happened says nothing about the peer. A trial becomes due again soon."""
        lease = self._lease
        try:
            if self._end() and lease is not None:
                self._breaker._record_release(self.generation, lease)
        finally:
            if lease is not None:
                lease.ended = True

    def judge(self, exc: BaseException) -> None:
        """End the permit as ``exc``, raised by the guarded call, demands."""
        breaker = self._breaker
        if not isinstance(exc, Exception) or breaker._is_excluded(exc):
            self.released()
        elif drivers.is_driver_error(exc):
            # A guarded call may be a connect or anything else.
            fault = drivers.judge(exc, connecting=True)
            if fault.counts:
                self.failed(exc, fault)
            else:
                self.released()
        else:
            self.failed(exc)

    def _end(self) -> bool:
        if self._ended:
            return False
        self._ended = True
        return True


class _TrialPermit(Permit):
    """A trial's permit: released when it is lost, by a thread killed at the wrong line."""

    __slots__ = ("__weakref__",)

    def __del__(self) -> None:
        lease = getattr(self, "_lease", None)
        # Nobody has ended it, or its end was interrupted: the record has it still.
        if lease is not None and (not lease.ended or self._breaker._circuit.lease is lease):
            self._breaker._forsake(lease)


class PeerBreaker(pybreaker.CircuitBreaker):
    """A ``pybreaker.CircuitBreaker`` that holds under threads, forks and kills.

    It takes what pybreaker's takes, in the same order, and keyword arguments of its own.

    :param fail_max: failures in a row after which the circuit opens.
    :param reset_timeout: seconds for which it stays open before a trial, ±10 %.
    :param success_threshold: good trials in a row after which it closes.
    :param exclude: exception classes, or predicates, that count for nothing.
    :param listeners: ``pybreaker.CircuitBreakerListener`` objects; called outside the lock.
    :param state_storage: a fresh ``pybreaker.CircuitMemoryStorage``, whose state the circuit
        begins in. No other can hold: the circuit is one record of this process.
    :param name: for logs and ``repr``.
    :param throw_new_error_on_trip: False. What the guarded call raised is always raised as it is.
    :param release_interval: seconds after which a trial that ended in neither
        success nor failure may be made again.
    :param lease: seconds after which a trial that never reported back is given
        up; must be longer than any trial takes.
    :param clock: a monotonic clock, in seconds.
    :param jitter: draws from [0, 1).
    :param on_transition: called with each :class:`Transition`, outside the lock.
    :raises ConfigError: a number or function that is none, or an argument of pybreaker's
        that cannot hold; the message names the argument.
    """

    def __init__(
        self,
        fail_max: int = 1,
        reset_timeout: float = 30,
        success_threshold: int = 1,
        exclude: Iterable[Any] | None = None,
        listeners: Iterable[pybreaker.CircuitBreakerListener] | None = None,
        state_storage: pybreaker.CircuitBreakerStorage | None = None,
        name: str | None = None,
        throw_new_error_on_trip: bool = False,
        *,
        release_interval: float = 1,
        lease: float = 60,
        clock: Callable[[], float] = time.monotonic,
        jitter: Callable[[], float] = random.random,
        on_transition: Callable[[Transition], object] | Hearer | None = None,
    ) -> None:
        number("fail_max", fail_max, minimum=1, whole=True)
        number("success_threshold", success_threshold, minimum=1, whole=True)
        number("reset_timeout", reset_timeout)
        number("release_interval", release_interval)
        number("lease", lease)
        function("clock", clock, "Give a function that returns seconds.")
        function("jitter", jitter, "Give a function that returns [0, 1).")
        hears = hasattr(on_transition, "put") and hasattr(on_transition, "go")
        if not hears:
            function("on_transition", on_transition, "Give a function.", optional=True)
        if throw_new_error_on_trip:
            raise ConfigError(
                "throw_new_error_on_trip",
                "cannot be True: the call that opens the circuit raises what its function raised",
                "Leave it out. An open circuit's calls raise CircuitBreakerError.",
            )
        self._circuit = _stored(state_storage, clock(), reset_timeout)
        #: Seconds after which a trial that said nothing may be made again.
        self.release_interval = release_interval
        self._lease_seconds = lease
        self._clock = clock
        self._jitter = jitter
        #: Who hears of changes first.
        self._on_transition: Hearer | None = None
        if on_transition is not None:
            hearer: Any = on_transition
            if not hears:
                what = "What was to be told of the circuit of %s raised"
                hearer = Teller(hearer, name or "", what)
            self._on_transition = hearer
        #: One for each of pybreaker's listeners.
        self._tellers: tuple[Teller, ...] = ()
        #: Alive while a thread hands out what the record has to tell.
        self._handing: weakref.ref[_Life] | None = None
        #: Asked, outside the lock, before an open circuit's trial is made: for how many
        #: seconds it is to be left to others, and 0 to go ahead. Not asked for a last resort.
        #: It is told whether an operator wishes for the trial, due or not.
        self.gate: Callable[[bool], float] | None = None
        super().__init__(
            fail_max=fail_max,
            reset_timeout=reset_timeout,
            success_threshold=success_threshold,
            exclude=exclude,
            listeners=list(listeners or ()),
            state_storage=_CircuitView(self),
            name=name,
            throw_new_error_on_trip=False,
        )
        self._lock = new_lock()
        renew_in_child(self)

    def __repr__(self) -> str:
        circuit = self._circuit
        return (
            f"<PeerBreaker {self._name!r} {circuit.state}"
            f"{', suspect' if circuit.suspect else ''}"
            f"{', trial under way' if self.trial else ''}>"
        )

    # Admission

    def acquire(
        self, *, last_resort: float | None = None, trial: bool = True, by_hand: bool = False
    ) -> Permit | None:
        """Ask for the right to use the peer, without waiting for any other caller.

        Where circuits are shared between processes, one whose trial is due
        asks the others first, for 50 ms at most, once a second at most.

        :param last_resort: if given, an open circuit's trial is due already
            this many seconds after the peer was last tried.
        :param trial: False: the caller will not make a trial.
        :param by_hand: an operator wishes for the trial, which is due for that. Nobody is in
            need of it: one that another process has under way goes before it.
        :returns: a permit, or None while the circuit is open or another
            caller holds the trial.
        """
        circuit = self._circuit
        # As _is_usable(), without the call: each connect comes by here.
        if circuit.state == CLOSED and not circuit.suspect:
            return Permit(self, circuit.generation, None)
        if not trial:
            return None
        now = self._clock()
        if by_hand:
            last_resort = 0
        if not _is_usable(circuit) and not _trial_due(circuit, now, last_resort):
            return None
        lease = Lease(now + self._lease_seconds)
        permit = _TrialPermit(self, circuit.generation, lease)
        lease.holder = weakref.ref(permit)
        gate = self.gate if last_resort is None or by_hand else None

        def admitted(circuit: Circuit) -> Circuit:
            if _is_usable(circuit) or not _trial_due(circuit, now, last_resort):
                return circuit
            asks_first = gate is not None and not circuit.suspect
            return circuit._replace(lease=lease) if asks_first else _begun(circuit, lease)

        try:
            before, after = self._swap(admitted, now=now)
            if after.lease is lease and gate is not None and not after.suspect:
                held_back = self._ask_gate(gate, by_hand)
                asked = self._clock()

                def answered(circuit: Circuit) -> Circuit:
                    # The circuit may have closed, or opened anew, while the gate was asked.
                    if circuit.lease is not lease or circuit.generation != before.generation:
                        return _without(circuit, lease)
                    if held_back > 0:
                        # Wished for by hand, it was not due yet.
                        due = max(asked + held_back, before.due)
                        return circuit._replace(lease=None, state=OPEN, due=due)
                    return _begun(circuit, lease)

                _, after = self._swap(answered, now=asked)
            self._tell_untold()
            permit.generation = after.generation
            if after.lease is lease:
                return permit
            lease.end()
            return Permit(self, after.generation, None) if _is_usable(after) else None
        except BaseException:
            # Interrupted before the caller had it: nobody else would end it.
            lease.ended = True
            self._forsake(lease)
            raise

    def _ask_gate(self, gate: Callable[[bool], float], by_hand: bool) -> float:
        try:
            return gate(by_hand)
        except Exception:
            complain("The gate of the circuit of %s raised", self._name)
            return 0.0

    @property
    def storage(self) -> pybreaker.CircuitBreakerStorage:
        """The circuit as pybreaker's storage interface has it, for a plain breaker to use."""
        return self._state_storage

    @property
    def circuit(self) -> Circuit:
        """The circuit's present record."""
        return self._circuit

    @property
    def is_available(self) -> bool:
        """Whether the circuit is closed and not suspect: anyone may use the peer."""
        return _is_usable(self._circuit)

    @property
    def trial(self) -> Lease | None:
        """The trial under way, if there is one."""
        return trial_of(self._circuit, self._clock())

    # pybreaker's own interface, with the guarantees of this class

    def call(self, func: Callable[..., _T], *args: Any, **kwargs: Any) -> _T:
        """Call ``func`` if the circuit allows it; no lock is held meanwhile.

        A generator that ``func`` returns is guarded while it is run through,
        as pybreaker does it.

        :raises pybreaker.CircuitBreakerError: the circuit is open, or another
            caller has the trial; ``func`` was not called.
        :raises BaseException: what ``func`` raised, as it is.
        """
        permit = self._enter(func, *args, **kwargs)
        try:
            result = func(*args, **kwargs)
        except BaseException as exc:
            permit.judge(exc)
            raise
        if isinstance(result, types.GeneratorType):
            return self._run_through(result, permit)  # type: ignore[return-value]
        permit.succeeded()
        return result

    @contextlib.contextmanager
    def calling(self) -> Iterator[None]:
        """Guard a ``with`` block. What is raised in it is judged, and raised as it is.

        :raises pybreaker.CircuitBreakerError: the circuit is open, or another
            caller has the trial; the block is not entered.
        """
        permit = self._enter(self.calling)
        try:
            yield
        except BaseException as exc:
            permit.judge(exc)
            raise
        permit.succeeded()

    async def call_async(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Await ``func``'s result if the circuit allows the call.

        :raises pybreaker.CircuitBreakerError: the circuit is open, or another
            caller has the trial; ``func`` was not called.
        :raises BaseException: what ``func`` raised, as it is.
        """
        permit = self._enter(func, *args, **kwargs)
        try:
            result = func(*args, **kwargs)
            if inspect.isawaitable(result):
                result = await result
        except BaseException as exc:
            permit.judge(exc)
            raise
        permit.succeeded()
        return result

    def open(self) -> bool:
        """Open the circuit by hand; the first trial is due after ``reset_timeout``."""
        now = self._clock()
        due = now + self._spread_timeout()
        self._change(now, lambda circuit: _opened(circuit, now, due, "opened by hand", None))
        return False

    def half_open(self) -> None:
        """Make a trial due now, or once the trial under way is over."""
        now = self._clock()

        def ajar(circuit: Circuit) -> Circuit:
            out_since = now if circuit.out_since is None else circuit.out_since
            ajar = circuit._replace(
                state=HALF_OPEN, suspect=False, successes=0, due=now, out_since=out_since
            )
            # What was begun while the circuit was closed is of another time.
            grown = circuit.state == CLOSED
            return ajar._replace(generation=circuit.generation + 1) if grown else ajar

        self._change(now, ajar)

    def close(self) -> None:
        """Close the circuit by hand."""
        now = self._clock()
        # A trial under way is not over for that.
        self._change(now, lambda circuit: _closed(circuit, now)._replace(lease=circuit.lease))

    def suspect(self, error: str = "", fault: Fault | None = None) -> None:
        """Make the next use of a closed circuit a trial. Open ones stay as they are.

        :param error: what gave rise to the doubt, as text.
        :param fault: what that says about the peer.
        """
        now = self._clock()
        self._change(
            now,
            lambda circuit: (
                circuit._replace(
                    suspect=True, tried=now, due=float("-inf"), error=error, fault=fault
                )
                if _is_usable(circuit)
                else circuit
            ),
        )

    def trip(self, exc: BaseException, fault: Fault, question: str = "") -> None:
        """Open a closed circuit at once, whatever ``fail_max`` says.

        For what a statement was told on an established connection. A burst of
        it, from however many threads, opens the circuit once.

        :param exc: what the statement was told; its text is kept, not itself.
        :param fault: what that says about the peer.
        :param question: what the trials must ask, until one is answered well.
        """
        self.tell(self.trip_silently(exc, fault, question))

    def trip_silently(
        self, exc: BaseException, fault: Fault, question: str, failures: int = 0
    ) -> bool:
        """Open a closed circuit as :meth:`trip` does, and tell nobody.

        For a caller that holds a lock. It calls :meth:`tell` once it does no longer.

        :param exc: what the peer said.
        :param fault: what that says about the peer.
        :param question: what the trials must ask, until one is answered well.
        :param failures: how many failures in a row these were, if they were counted.
        :returns: whether there is something to tell: the circuit was closed.
        """
        now = self._clock()
        due = now + self._spread_timeout()
        error = drivers.describe(exc)

        def tripped(circuit: Circuit) -> Circuit:
            if circuit.state != CLOSED:
                # Opened by a failed connect: what a statement was told is still to be asked.
                return circuit._replace(question=circuit.question or question)
            opened = _opened(circuit, now, due, error, fault)
            return opened._replace(question=question, failures=max(circuit.failures, failures))

        before, _ = self._swap(tripped, now=now)
        return before.state == CLOSED

    def tell(self, has_tripped: bool) -> None:
        """Tell of what :meth:`trip_silently` has done.

        :param has_tripped: what it returned.
        """
        if has_tripped:
            self._tell_untold()

    def count_failure(self, exc: BaseException, fault: Fault, generation: int) -> None:
        """Count a connection lost before it was of any use as a failed connect.

        :param exc: what it was lost by.
        :param fault: what that says about the peer.
        :param generation: the circuit's, when the connection was made. Later
            openings and closings make this result a late one, which changes nothing.
        """
        self._record_failure(generation, None, exc, fault)

    # What other processes found out

    def learn_open(
        self,
        generation: int,
        *,
        due_in: float,
        out_for: float,
        error: str,
        fault: Fault | None,
        question: str = "",
    ) -> Circuit | None:
        """Open the circuit, or put off its next trial, as another process has found.

        It is not this process's failure, and counts as none. A trial under way here is
        left to its own result.

        :param generation: of the record that was compared with what the others know.
            Where the circuit has opened or closed since, their word is a late one.
        :param due_in: seconds until the fleet's next trial. This process's own comes a
            little later, spread as widely as ever, and only if the fleet is not heard of.
        :param out_for: seconds for which the peer has been out.
        :param error: what it said last.
        :param fault: what that says about it.
        :param question: what its trials must ask.
        :returns: the record as it is now; None if nothing was changed.
        """
        now = self._clock()
        due = now + due_in + self._reset_timeout * 2 * JITTER * self._jitter()

        def learnt(circuit: Circuit) -> Circuit:
            trying = trial_of(circuit, now) is not None
            if circuit.generation != generation or (trying and circuit.state != CLOSED):
                return circuit
            if circuit.state == CLOSED:
                opened = _opened(circuit, now, due, error, fault)
                # Nothing was tried here: whoever has no other peer left may do so at once.
                return opened._replace(
                    out_since=now - out_for, tried=float("-inf"), question=question
                )
            return circuit._replace(
                state=OPEN,
                successes=0,
                due=due,
                error=error,
                fault=fault,
                question=circuit.question or question,
            )

        return self._learn(now, learnt)

    def learn_closed(self, generation: int) -> Circuit | None:
        """Close the circuit as another process has, whose trial went well.

        :param generation: as for :meth:`learn_open`.
        :returns: as there.
        """
        now = self._clock()
        return self._learn(
            now,
            lambda circuit: (
                _closed(circuit, now)._replace(lease=circuit.lease)
                if circuit.generation == generation and circuit.state != CLOSED
                else circuit
            ),
        )

    def put_off(self, generation: int, seconds: float) -> None:
        """Leave an open circuit's trial to another process that is about to make it.

        :param generation: as for :meth:`learn_open`.
        :param seconds: for how long at least.
        """
        due = self._clock() + seconds
        self._swap(
            lambda circuit: (
                circuit._replace(due=due)
                if circuit.generation == generation and circuit.state == OPEN and circuit.due < due
                else circuit
            )
        )

    def _learn(self, now: float, change: Callable[[Circuit], Circuit]) -> Circuit | None:
        before, after = self._change(now, change, learnt=True)
        return None if after is before else after

    @property
    def reset_timeout(self) -> float:
        """Seconds for which the circuit stays open before a trial, ±10 %.

        Another ``timeout`` holds for a circuit that is open already, too.
        """
        return self._reset_timeout

    @reset_timeout.setter
    def reset_timeout(self, timeout: float) -> None:
        self._reset_timeout = timeout
        spread = self._spread_timeout()
        # As with pybreaker, the new time-out holds for the present opening.
        self._swap(
            lambda circuit: (
                circuit._replace(due=circuit.tried + spread) if circuit.state == OPEN else circuit
            )
        )

    @property
    def state(self) -> Any:
        """pybreaker's state object of the current state.

        ``"closed"``, ``"open"`` or ``"half-open"`` may be assigned, as with pybreaker.

        :raises ValueError: something else was.
        """
        return _STATES[self._circuit.state](self, None, notify=False)

    @state.setter
    def state(self, state: str) -> None:
        changes = {CLOSED: self.close, OPEN: self.open, HALF_OPEN: self.half_open}
        if state not in changes:
            raise ValueError(f"Unknown state {state!r}, valid states: {', '.join(changes)}")
        changes[state]()

    # What permits report

    def _record_success(self, generation: int, lease: Lease | None) -> int:
        """Record it; return the generation that the success belongs to."""
        now = self._clock()

        def succeeded(circuit: Circuit) -> Circuit:
            if _is_late(circuit, generation, lease):
                return _without(circuit, lease)
            if lease is None:
                return circuit._replace(failures=0)
            if circuit.suspect:
                # Nothing has happened: no log line, no new generation.
                return circuit._replace(suspect=False, lease=None, failures=0, error="", fault=None)
            if circuit.successes + 1 >= self._success_threshold:
                return _closed(circuit, now)
            return circuit._replace(successes=circuit.successes + 1, lease=None, due=now, tried=now)

        before, after = self._swap(succeeded, now=now, ends=lease)
        if self._listeners:
            self._tell("success")
        self._tell_untold()
        return generation if _is_late(before, generation, lease) else after.generation

    def _record_failure(
        self,
        generation: int,
        lease: Lease | None,
        exc: BaseException,
        fault: Fault | None,
    ) -> int:
        now = self._clock()
        due = now + self._spread_timeout()
        error = drivers.describe(exc)

        def failed(circuit: Circuit) -> Circuit:
            late = _is_late(circuit, generation, lease)
            circuit = _without(circuit, lease)
            if late:
                return circuit
            circuit = circuit._replace(failures=circuit.failures + 1)
            # Half-open: the connection of a good trial, one of several that are asked for.
            is_trials = lease is not None or circuit.state == HALF_OPEN
            if is_trials or circuit.failures >= self._fail_max:
                return _opened(circuit, now, due, error, fault)
            return circuit._replace(tried=now, error=error, fault=fault)

        before, after = self._swap(failed, now=now, ends=lease)
        if self._listeners:
            self._tell("failure", exc)
        self._tell_untold()
        return 0 if _is_late(before, generation, lease) else after.failures

    def _record_release(self, generation: int, lease: Lease) -> None:
        now = self._clock()
        due = now + self.release_interval

        def released(circuit: Circuit) -> Circuit:
            late = _is_late(circuit, generation, lease)
            circuit = _without(circuit, lease)
            if late:
                return circuit
            if circuit.suspect:
                # Never excluded: whoever has no other may try at once.
                return circuit._replace(tried=now)
            return circuit._replace(state=OPEN, tried=now, due=due)

        self._swap(released, now=now, ends=lease)
        self._tell_untold()

    def _forsake(self, lease: Lease) -> None:
        """Take back a trial of which nobody will report. Waits for nothing."""
        # Should another thread be at the record just now: the next caller finds
        # a lease that has ended.
        lease.ended = True
        now = self._clock()
        lock = self._lock
        try:
            # Struck right after acquire() we have the lock and do not know it: it
            # is let go of in any case. Where we have not got it, that raises.
            try:
                if lock.acquire(blocking=False):
                    self._swap(
                        lambda circuit: _forsaken(circuit, lease, now + self.release_interval),
                        now=now,
                    )
            finally:
                lock.release()
        except RuntimeError:
            pass
        lease.end()

    def _swap(
        self,
        change: Callable[[Circuit], Circuit],
        *,
        now: float = 0.0,
        learnt: bool = False,
        ends: Lease | None = None,
    ) -> tuple[Circuit, Circuit]:
        """Replace the record by what ``change`` makes of it; return both. Tells nobody yet.

        :param now: the time, on the breaker's clock, where the circuit may open or close.
        :param learnt: another process found it out.
        :param ends: the trial that is over with it; those who wait for it are woken.
        """
        try:
            with self._lock:
                while True:
                    before = self._circuit
                    after = _telling(before, change(before), now, learnt)
                    if self._circuit is before:
                        self._circuit = after
                        break
                    # This very thread has changed it, in a signal handler or finalizer.
        finally:
            if ends is not None:
                ends.end()
        return before, after

    def _change(
        self, now: float, change: Callable[[Circuit], Circuit], *, learnt: bool = False
    ) -> tuple[Circuit, Circuit]:
        changed = self._swap(change, now=now, learnt=learnt)
        self._tell_untold()
        return changed

    def _spread_timeout(self) -> float:
        return self._reset_timeout * (1 + JITTER * (2 * self._jitter() - 1))

    def _is_excluded(self, exc: Exception) -> bool:
        try:
            return not self.is_system_error(exc)
        except Exception:
            # The caller is to see ``exc``, not a predicate's mistake.
            complain("An exclude predicate of the circuit of %s raised", self._name)
            return False

    # Telling

    def _enter(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Permit:
        permit = self.acquire()
        if permit is None:
            circuit = self._circuit
            under_way = self.trial is not None
            raise CircuitBreakerError(
                f"The circuit of {self._name or 'this breaker'} is "
                + ("being tried by another caller" if under_way else circuit.state)
                + (f": {circuit.error}" if circuit.error else "")
            )
        if self._listeners:
            self._tell("before_call", func, *args, **kwargs)
        return permit

    def _run_through(
        self, generator: Generator[Any, Any, Any], permit: Permit
    ) -> Generator[Any, Any, Any]:
        try:
            result = yield from generator
        except BaseException as exc:
            permit.judge(exc)
            raise
        permit.succeeded()
        return result

    def _tell_untold(self) -> None:
        """Tell of the changes that the record holds for that, whichever thread made them."""
        if self._circuit.untold:
            hearers = self._hand_out()
            for hearer in hearers:
                hearer.go()

    def _hand_out(self) -> Sequence[Hearer]:
        """Put each change into the queues of those who hear of it, in the order of the changes.

        The critical section appends to queues; nothing in it waits or calls out.

        :returns: those who are to :meth:`Hearer.go`.
        """
        with self._lock:
            handing = self._handing
            # A signal handler or finalizer within the loop leaves its change to that.
            if handing is not None and handing() is not None:
                return ()
            self._hand_out_in_order()
            return self._hearers()

    def _hand_out_in_order(self) -> None:
        life = _Life()
        try:
            self._handing = weakref.ref(life)
            while self._circuit.untold:
                before = self._circuit
                after = before._replace(untold=before.untold[1:])
                if self._circuit is before:
                    self._circuit = after
                    self._tell_transition(before.untold[0])
        finally:
            self._handing = None

    def _tell_transition(self, change: Transition) -> None:
        for hearer in self._hearers():
            hearer.put(change)

    def _hearers(self) -> Sequence[Hearer]:
        """Return whom changes are told: ``on_transition``, and pybreaker's listeners."""
        own = () if self._on_transition is None else (self._on_transition,)
        if not self._listeners and not self._tellers:
            return own
        known = {id(teller.listener.of): teller for teller in self._tellers}  # type: ignore[attr-defined]
        self._tellers = tuple(
            known.get(id(listener))
            or Teller(
                _StateChange(self, listener),
                self._name or "",
                "A listener of the circuit of %s raised",
            )
            for listener in self._listeners
        )
        return (*own, *self._tellers)

    def _tell(self, method: str, *args: Any, **kwargs: Any) -> None:
        for listener in self.listeners:
            try:
                getattr(listener, method)(self, *args, **kwargs)
            except Exception:
                complain("A listener of the circuit of %s raised", self._name)

    def after_fork(self) -> None:
        """In the child: a lock that nobody holds, and no trial of the parent's."""
        self._lock = new_lock()
        self._handing = None
        for teller in (self._on_transition, *self._tellers):
            if isinstance(teller, Teller):
                teller.after_fork()
        # What its parent has to tell is none of the child's.
        circuit = self._circuit = self._circuit._replace(untold=())
        if circuit.lease is not None:
            state = OPEN if circuit.state == HALF_OPEN else circuit.state
            self._circuit = circuit._replace(state=state, lease=None)


def _stored(
    storage: pybreaker.CircuitBreakerStorage | None, now: float, reset_timeout: float
) -> Circuit:
    """Return the circuit that begins as ``storage`` says."""
    if storage is None:
        return Circuit()
    if type(storage) is not pybreaker.CircuitMemoryStorage:
        raise ConfigError(
            "state_storage",
            f"is a {type(storage).__name__}, which cannot hold the circuit: it is one record of "
            "this process, replaced at once",
            "Leave it out. A load balancer's shared_state= shares circuits between processes.",
        )
    circuit = Circuit(failures=storage.counter, successes=storage.success_counter)
    if storage.state == CLOSED:
        return circuit
    # As with pybreaker, an opening that nobody has noted the time of is over.
    opened_at = storage.opened_at
    age = reset_timeout
    if opened_at is not None and storage.state == OPEN:
        age = (datetime.now(timezone.utc) - opened_at.astimezone(timezone.utc)).total_seconds()
    return circuit._replace(
        state=storage.state,
        out_since=now - age,
        tried=now - age,
        due=now - age + reset_timeout,
        opened_at=opened_at,
    )


class _Life:
    """Ends with the frame that alone refers to it, whatever that is killed by."""

    __slots__ = ("__weakref__",)


class _StateChange:
    """Tells one of pybreaker's listeners of a circuit's changes of state."""

    def __init__(self, breaker: PeerBreaker, listener: pybreaker.CircuitBreakerListener) -> None:
        self._breaker = breaker
        self.of = listener

    def __call__(self, transition: Transition) -> None:
        if transition.before != transition.after:
            before = _STATES[transition.before](self._breaker, None, notify=False)
            after = _STATES[transition.after](self._breaker, None, notify=False)
            self.of.state_change(self._breaker, before, after)


def trial_of(circuit: Circuit, now: float) -> Lease | None:
    """Return the trial of ``circuit`` that is under way, if there is one.

    The one place that decides: a lease that has ended, has run out or lost its permit is none,
    though the record still has it.

    :param now: the time, on the breaker's clock.
    """
    lease = circuit.lease
    if lease is None or lease.ended or now >= lease.expires or lease.holder() is None:
        return None
    return lease


def _telling(before: Circuit, after: Circuit, now: float, learnt: bool) -> Circuit:
    """Return ``after`` with what is to be told: what was, and the change from ``before``."""
    if after is before:
        return after
    untold = before.untold
    if before.state != after.state or before.suspect != after.suspect:
        seconds = 0.0
        if after.state == OPEN:
            seconds = after.due - now
        elif after.state == CLOSED and before.out_since is not None:
            seconds = now - before.out_since
        change = Transition(before.state, after.state, after.fault, after.error, seconds, learnt)
        untold = (*untold, change)
    return after if after.untold is untold else after._replace(untold=untold)


def _begun(circuit: Circuit, lease: Lease) -> Circuit:
    """Return the record with ``lease`` for its trial."""
    return circuit._replace(lease=lease, state=circuit.state if circuit.suspect else HALF_OPEN)


def _is_usable(circuit: Circuit) -> bool:
    return circuit.state == CLOSED and not circuit.suspect


def _trial_due(circuit: Circuit, now: float, last_resort: float | None) -> bool:
    if trial_of(circuit, now) is not None:
        return False
    if now >= circuit.due:
        return True
    return last_resort is not None and now >= circuit.tried + last_resort


def _is_late(circuit: Circuit, generation: int, lease: Lease | None) -> bool:
    """Whether a result is of another time: the circuit has opened or closed since,
    or the trial's lease ran out and passed to someone else."""
    return circuit.generation != generation or (lease is not None and circuit.lease is not lease)


def _without(circuit: Circuit, lease: Lease | None) -> Circuit:
    return circuit._replace(lease=None) if lease is not None and circuit.lease is lease else circuit


def _forsaken(circuit: Circuit, lease: Lease, due: float) -> Circuit:
    if circuit.lease is not lease:
        return circuit
    if circuit.state == HALF_OPEN:
        # Due again soon; what is known of the peer is as old as it was.
        return circuit._replace(lease=None, state=OPEN, due=due)
    return circuit._replace(lease=None)


def _opened(circuit: Circuit, now: float, due: float, error: str, fault: Fault | None) -> Circuit:
    # A trial under way goes on: its lease stays, and there is no other trial
    # until it is over.
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
        opened_at=datetime.now(timezone.utc),
    )


def _closed(circuit: Circuit, now: float) -> Circuit:
    return Circuit(generation=circuit.generation + 1, tried=now)
