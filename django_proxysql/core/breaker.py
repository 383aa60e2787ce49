"""A circuit breaker for one peer, with pybreaker's interface.

docs/reference/breaker.rst lists what it does otherwise than pybreaker's. What the circuit is
stands in :mod:`.circuit`; how it holds, in :mod:`.permits`.
"""

from __future__ import annotations

import contextlib
import inspect
import random
import time
import types
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Callable,
    Generator,
    Iterable,
    Iterator,
    Sequence,
)
from datetime import datetime, timezone
from functools import partial
from typing import Any, TypeVar

import pybreaker

from . import circuit as events
from . import drivers
from .circuit import CLOSED, HALF_OPEN, OPEN, Circuit, Transition
from .config import function, number
from .dispatch import Dispatcher
from .exceptions import ConfigError
from .faults import Fault
from .logger import complain
from .permits import Keeper, Permit, Subscriber

CircuitBreakerError = pybreaker.CircuitBreakerError

_T = TypeVar("_T")

_COMPLAINT = "A listener of the circuit of %s raised"

_STATES = {
    CLOSED: pybreaker.CircuitClosedState,
    OPEN: pybreaker.CircuitOpenState,
    HALF_OPEN: pybreaker.CircuitHalfOpenState,
}


class PeerBreaker(Keeper, pybreaker.CircuitBreaker):
    """A ``pybreaker.CircuitBreaker`` that holds under threads, forks and asynchronous exceptions.

    It takes pybreaker's arguments, in their order, and keyword arguments of its own.

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
        on_transition: Callable[[Transition], object] | Subscriber | None = None,
    ) -> None:
        number("fail_max", fail_max, minimum=1, whole=True)
        number("success_threshold", success_threshold, minimum=1, whole=True)
        number("reset_timeout", reset_timeout)
        number("release_interval", release_interval)
        number("lease", lease)
        function("clock", clock, "Give a function that returns seconds.")
        function("jitter", jitter, "Give a function that returns [0, 1).")
        if throw_new_error_on_trip:
            raise ConfigError(
                "throw_new_error_on_trip",
                "cannot be True: the call that opens the circuit raises what its function raised",
                "Leave it out. An open circuit's calls raise CircuitBreakerError.",
            )
        own: Any = on_transition
        if own is not None and not all(hasattr(own, name) for name in ("put", "notify", "leave")):
            function("on_transition", own, "Give a function.")
            own = Dispatcher(own, name or "", "The on_transition of the circuit of %s raised")
        #: Follows the changes first.
        self._on_transition: Subscriber | None = own
        #: One for each of pybreaker's listeners.
        self._dispatchers: dict[int, Dispatcher] = {}
        pybreaker.CircuitBreaker.__init__(
            self,
            fail_max=fail_max,
            reset_timeout=reset_timeout,
            success_threshold=success_threshold,
            exclude=exclude,
            listeners=list(listeners or ()),
            name=name,
            throw_new_error_on_trip=False,
        )
        # pybreaker's own, which would lie: the record says what is.
        del self._state_storage, self._state
        self.circuit = _stored(state_storage, clock(), reset_timeout)
        self.release_interval = release_interval
        self._lease_seconds = lease
        self._clock = clock
        self._jitter = jitter
        Keeper.__init__(self)

    def __repr__(self) -> str:
        circuit = self.circuit
        return (
            f"<PeerBreaker {self._name!r} {circuit.state}"
            f"{', suspect' if circuit.suspect else ''}"
            f"{', trial under way' if self.trial else ''}>"
        )

    # Guarded calls

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
            if isinstance(result, types.GeneratorType):
                return _run_through(result, permit)  # type: ignore[return-value]
        except BaseException as exc:
            permit.judge(exc)
            raise
        permit.succeeded()
        return result

    @contextlib.contextmanager
    def calling(self) -> Iterator[None]:
        """Guard a ``with`` block. What is raised in it is judged, and raised as it is.

        :raises pybreaker.CircuitBreakerError: as :meth:`call`; the block is not entered.
        """
        with self._enter(self.calling):
            yield

    async def call_async(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Await ``func``'s result if the circuit allows the call, as :meth:`call` does.

        An asynchronous generator that ``func`` returns is guarded while it is run through. A
        cancelled call counts for nothing.
        """
        permit = self._enter(func, *args, **kwargs)
        try:
            result = func(*args, **kwargs)
            if inspect.isawaitable(result):
                result = await result
            if inspect.isasyncgen(result):
                return _run_through_async(result, permit)
        except BaseException as exc:
            permit.judge(exc)
            raise
        permit.succeeded()
        return result

    @contextlib.asynccontextmanager
    async def calling_async(self) -> AsyncIterator[None]:
        """Guard an ``async with`` block, as :meth:`calling` does a ``with`` block."""
        with self.calling():
            yield

    def _enter(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Permit:
        permit = self.acquire()
        if permit is None:
            circuit = self.circuit
            under_way = self.trial is not None
            raise CircuitBreakerError(
                f"The circuit of {self._name or 'this breaker'} is "
                + ("being tried by another caller" if under_way else circuit.state)
                + (f": {circuit.error}" if circuit.error else "")
            )
        if self._listeners:
            try:
                self._call_listeners("before_call", func, *args, **kwargs)
            except BaseException:
                # Its traceback holds this frame, and with it the permit.
                permit.released()
                raise
        return permit

    # By hand

    def open(self) -> bool:
        """Open the circuit by hand; the first trial is due after ``reset_timeout``."""
        now = self._clock()
        self.apply(partial(events.opened_by_hand, due=now + self._spread_timeout()), now)
        return False

    def half_open(self) -> None:
        """Make a trial due now, or once the trial under way is over."""
        self.apply(events.half_opened_by_hand, self._clock())

    def close(self) -> None:
        """Close the circuit by hand."""
        self.apply(events.closed_by_hand, self._clock())

    # What established connections say

    def trip(
        self,
        exc: BaseException,
        fault: Fault,
        question: str = "",
        failures: int = 0,
        *,
        notify: bool = True,
    ) -> None:
        """Open a closed circuit at once, whatever ``fail_max`` says.

        For a statement's answer on an established connection. A burst of
        it, from however many threads, opens the circuit once.

        :param exc: the statement's error; its text is kept, not itself.
        :param fault: what that says about the peer.
        :param question: what the trials must ask, until one is answered well.
        :param failures: how many failures in a row these were, if they were counted.
        :param notify: False: the caller holds a lock, and calls :meth:`notify_pending` after it.
        """
        now = self._clock()
        event = partial(
            events.tripped,
            due=now + self._spread_timeout(),
            error=drivers.describe(exc),
            fault=fault,
            question=question,
            failures=failures,
        )
        (self.apply if notify else self.replace)(event, now)

    # pybreaker's properties

    @property
    def fail_counter(self) -> int:
        """How many failures in a row there were."""
        return self.circuit.failures

    @property
    def success_counter(self) -> int:
        """How many good trials in a row there were."""
        return self.circuit.successes

    @property
    def current_state(self) -> str:
        """``closed``, ``open`` or ``half-open``."""
        return self.circuit.state

    @property
    def reset_timeout(self) -> float:
        """Seconds for which the circuit stays open before a trial, ±10 %.

        Another ``timeout`` holds for a circuit that is open already, too.
        """
        return self._reset_timeout

    @reset_timeout.setter
    def reset_timeout(self, timeout: float) -> None:
        self._reset_timeout = timeout
        self.replace(partial(events.rescheduled, seconds=self._spread_timeout()), self._clock())

    @property
    def state(self) -> Any:
        """pybreaker's state object of the current state.

        ``"closed"``, ``"open"`` or ``"half-open"`` may be assigned, as with pybreaker.

        :raises ValueError: something else was.
        """
        return self._state_of(self.circuit.state)

    @state.setter
    def state(self, state: str) -> None:
        changes = {CLOSED: self.close, OPEN: self.open, HALF_OPEN: self.half_open}
        if state not in changes:
            raise ValueError(f"Unknown state {state!r}, valid states: {', '.join(changes)}")
        changes[state]()

    def _state_of(self, name: str) -> Any:
        return _STATES[name](self, None, notify=False)

    # Listeners

    def _is_excluded(self, exc: Exception) -> bool:
        try:
            return not self.is_system_error(exc)
        except Exception:
            # The caller is to see ``exc``, not a predicate's mistake.
            complain("An exclude predicate of the circuit of %s raised", self._name)
            return False

    def _subscribers(self) -> Sequence[Subscriber]:
        own = () if self._on_transition is None else (self._on_transition,)
        if not self._listeners and not self._dispatchers:
            return own
        known = self._dispatchers
        # A dispatcher refers to its listener: no other one has that id meanwhile.
        self._dispatchers = dispatchers = {
            id(listener): known.get(id(listener))
            or Dispatcher(partial(self._call_at, listener), self._name or "", _COMPLAINT)
            for listener in self._listeners
        }
        return (*own, *dispatchers.values())

    def _call_at(self, listener: pybreaker.CircuitBreakerListener, change: Transition) -> None:
        if change.before != change.after:
            listener.state_change(self, self._state_of(change.before), self._state_of(change.after))

    def _call_listeners(self, method: str, *args: Any, **kwargs: Any) -> None:
        for listener in self.listeners:
            try:
                getattr(listener, method)(self, *args, **kwargs)
            except Exception:
                complain(_COMPLAINT, self._name)


def _run_through(generator: Generator[Any, Any, Any], permit: Permit) -> Generator[Any, Any, Any]:
    """Yield from ``generator``; its end is the permit's."""
    with permit:
        return (yield from generator)


async def _run_through_async(
    generator: AsyncGenerator[Any, Any], permit: Permit
) -> AsyncGenerator[Any, Any]:
    """Do for an asynchronous generator what ``yield from`` does for another."""
    with permit, contextlib.suppress(StopAsyncIteration):
        item = await generator.__anext__()
        while True:
            try:
                sent = yield item
            except GeneratorExit:
                await generator.aclose()
                raise
            except BaseException as exc:
                item = await generator.athrow(exc)
            else:
                item = await generator.asend(sent)


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
    # As with pybreaker, an opening whose time is unknown is over.
    opened_at = storage.opened_at
    age = reset_timeout
    if opened_at is not None and storage.state == OPEN:
        age = (datetime.now(timezone.utc) - opened_at.astimezone(timezone.utc)).total_seconds()
    tried = now - age
    return circuit._replace(
        state=storage.state, out_since=tried, tried=tried, due=tried + reset_timeout
    )
