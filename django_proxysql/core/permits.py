"""Permits on a circuit's record: who may use a peer, and what became of it.

How it holds
------------

The record (:class:`~.circuit.Circuit`) is read without the lock and replaced, under the lock, by
one assignment. So no reader sees half a transition. A thread that an asynchronous exception strikes
between two lines leaves either the old record or the new one, and so does a fork. Nothing that
waits, calls out or notifies happens under the lock.

A change leaves the record when all its subscribers have it in their queues. A thread that is
interrupted on the way, or by a listener, puts it there once more, which changes nothing, and leaves
the delivery to the listeners' own threads.

Locks of C are the only ones used: ``threading.Event`` and its kin take theirs in Python code, and
an asynchronous exception there leaves it held.

Longer than other files: a permit and what it reports to are one mechanism.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

from . import circuit as events
from . import drivers
from .circuit import CLOSED, Circuit, CircuitEvent, Lease, Transition, is_late, is_usable, trial_of
from .faults import Fault
from .logger import complain
from .runtime import Guarded

#: A fleet that saw a peer fail at one moment must not try it again at one moment.
JITTER = 0.1


class Subscriber(Protocol):
    """What follows a circuit's changes, in their order."""

    def put(self, change: Transition, /) -> None:
        """Note the change, once: it is put again where a thread was interrupted at it.

        Called within the circuit's lock: never blocks, calls no one.
        """

    def notify(self) -> None:
        """Do what the noted changes demand. Called without a lock."""

    def leave(self) -> None:
        """Have done elsewhere what notify() has left undone: it, or its thread, was interrupted."""


class Permit:
    """The right to use a peer once. End it by exactly one of its methods.

    What is called after the first end is ignored. However a trial's end is broken off, the
    trial is over: its lease is marked without a call, which the recursion limit might refuse.
    """

    __slots__ = ("_ended", "_keeper", "generation", "is_trial", "lease")

    #: Whether others are to be asked first: :meth:`Keeper.ask` and :meth:`Keeper.answered`.
    must_ask = False

    def __init__(self, keeper: Keeper, generation: int, lease: Lease | None) -> None:
        self._keeper = keeper
        #: The circuit's generation that what was made with the permit belongs to. A trial that
        #: closes the circuit belongs to the generation that it begins.
        self.generation = generation
        #: The trial's; None where this is none.
        self.lease = lease
        #: Whether this is the one attempt that a half-open or suspect circuit allows.
        self.is_trial = lease is not None
        self._ended = False

    def succeeded(self) -> None:
        """The peer did what it was asked to do."""
        keeper, lease = self._keeper, self.lease
        # The healthy peer's way, hundreds of times a second: nothing to
        # write, so no lock to take.
        if lease is None and not keeper.circuit.failures:
            if self._ended:
                return
            self._ended = True
            if keeper._listeners:
                keeper._call_listeners("success")
            return
        try:
            if self._end():
                event = partial(events.succeeded, success_threshold=keeper._success_threshold)
                after = self._record(event, keeper._clock(), "success")
                if after is not None:
                    self.generation = after.generation
        finally:
            if lease is not None:
                lease.ended = True

    def failed(self, exc: BaseException, fault: Fault | None = None) -> int:
        """The peer failed, by ``exc``.

        :returns: which failure in a row this was; 0 when it came too late to count.
        """
        keeper, lease = self._keeper, self.lease
        try:
            if not self._end():
                return 0
            now = keeper._clock()
            event = partial(
                events.failed,
                fail_max=keeper._fail_max,
                due=now + keeper._spread_timeout(),
                error=drivers.describe(exc),
                fault=fault,
            )
            after = self._record(event, now, "failure", exc)
            return 0 if after is None else after.failures
        finally:
            if lease is not None:
                lease.ended = True

    def released(self) -> None:
        """What happened says nothing about the peer. A trial becomes due again soon."""
        lease = self.lease
        try:
            if self._end() and lease is not None:
                keeper, now = self._keeper, self._keeper._clock()
                due = now + keeper.release_interval
                event = partial(events.released, generation=self.generation, lease=lease, due=due)
                keeper.apply(event, now, ends=lease)
        finally:
            if lease is not None:
                lease.ended = True

    def judge(self, exc: BaseException) -> None:
        """End the permit as ``exc``, raised by the guarded call, demands."""
        lease = self.lease
        try:
            if not isinstance(exc, Exception) or self._keeper._is_excluded(exc):
                self.released()
            elif drivers.is_driver_error(exc):
                # A guarded call may be a connect or anything else.
                fault = drivers.judge(exc, connecting=True).fault
                if fault.counts:
                    self.failed(exc, fault)
                else:
                    self.released()
            else:
                self.failed(exc)
        finally:
            # A predicate of the user's may be what raises.
            if lease is not None:
                lease.ended = True

    def __enter__(self) -> Permit:
        return self

    def __exit__(self, cls: object, exc: BaseException | None, traceback: object) -> None:
        """End the permit as what the block raised demands."""
        if exc is None:
            self.succeeded()
        else:
            self.judge(exc)

    def _end(self) -> bool:
        if self._ended:
            return False
        self._ended = True
        return True

    def _record(
        self, event: Callable[..., Circuit], now: float, method: str, *arguments: Any
    ) -> Circuit | None:
        """Record a result, calling ``method`` of each of pybreaker's listeners.

        :returns: the record after it; None: it came too late.
        """
        keeper, generation, lease = self._keeper, self.generation, self.lease
        result = partial(event, generation=generation, lease=lease)
        try:
            before, after = keeper.replace(result, now, ends=lease)
            if keeper._listeners:
                keeper._call_listeners(method, *arguments)
        finally:
            keeper.notify_pending()
        return None if is_late(before, generation, lease) else after


class _TrialPermit(Permit):
    """A trial's permit: its own end cancels a trial that has no result."""

    __slots__ = ("__weakref__", "due", "must_ask")

    def __init__(self, keeper: Keeper, circuit: Circuit, lease: Lease) -> None:
        super().__init__(keeper, circuit.generation, lease)
        self.must_ask = False
        #: When the trial was due before the caller asked for it.
        self.due = circuit.due

    def __del__(self) -> None:
        lease = getattr(self, "lease", None)
        # No caller has ended it, or its end was interrupted: the record has it still.
        if lease is not None and (not lease.ended or self._keeper.circuit.lease is lease):
            self._keeper._abandon(lease)


class _Life:
    """Ends with the frame that alone refers to it, whatever that is killed by."""

    __slots__ = ("__weakref__",)


class Keeper(Guarded):
    """Keeps a circuit's record and gives out permits to use the peer.

    :class:`~.breaker.PeerBreaker` is one; the settings are its arguments.
    """

    #: The circuit's present record; replaced by one assignment, and read without the lock.
    circuit = Circuit()
    #: Asked, outside the lock, before an open circuit's trial is made: for how many
    #: seconds it is to be left to others, and 0 to go ahead. Not asked for a last resort.
    #: Its argument says whether an operator demands the trial, due or not.
    gate: Callable[[bool], float] | None = None
    #: Seconds after which a trial that said nothing may be made again.
    release_interval: float
    _lease_seconds: float
    _clock: Callable[[], float]
    _jitter: Callable[[], float]
    #: Alive while a thread hands out the record's pending changes.
    _handing: weakref.ref[_Life] | None = None
    #: pybreaker's own.
    _name: str | None
    _fail_max: int
    _reset_timeout: float
    _success_threshold: int
    _listeners: list[Any]
    # The breaker's: who follows the circuit's changes, how a method of each of pybreaker's
    # listeners is called, and whether an exception counts for nothing.
    _subscribers: Callable[[], Sequence[Subscriber]]
    _call_listeners: Callable[..., None]
    _is_excluded: Callable[[Exception], bool]

    # Knowing

    @property
    def is_available(self) -> bool:
        """Whether the circuit is closed and not suspect: anyone may use the peer."""
        return is_usable(self.circuit)

    @property
    def trial(self) -> Lease | None:
        """The trial under way, if there is one."""
        return trial_of(self.circuit, self._clock())

    # Admission

    def acquire(
        self,
        *,
        last_resort: float | None = None,
        trial: bool = True,
        by_hand: bool = False,
        asks: bool = True,
    ) -> Permit | None:
        """Ask for the right to use the peer, without waiting for any other caller.

        Where circuits are shared between processes, one whose trial is due
        asks the others first, for 50 ms at most, once a second at most.

        :param last_resort: if given, an open circuit's trial is due already
            this many seconds after the peer was last tried.
        :param trial: False: the caller will not make a trial.
        :param by_hand: an operator demands the trial, which is due for that. It is not urgent:
            one that another process has under way goes before it.
        :param asks: False: the caller asks the others by itself, where the permit
            :attr:`~Permit.must_ask`.
        :returns: None while the circuit is open or another caller holds the trial.
        """
        circuit = self.circuit
        # As is_usable(), without the call: each connect comes by here.
        if circuit.state == CLOSED and not circuit.suspect:
            return Permit(self, circuit.generation, None)
        if not trial:
            return None
        now = self._clock()
        if by_hand:
            last_resort = 0
        if not events.trial_due(circuit, now, last_resort):
            return None
        lease = Lease(now + self._lease_seconds)
        permit = _TrialPermit(self, circuit, lease)
        lease.holder = weakref.ref(permit)
        asks_gate = self.gate is not None and (last_resort is None or by_hand)
        try:
            asked = partial(events.asked, lease=lease, last_resort=last_resort, asks_gate=asks_gate)
            before, after = self.replace(asked, now)
            permit.generation, permit.due = before.generation, before.due
            if after.lease is not lease or after.suspect or not asks_gate:
                return self._admitted(permit, after)
            permit.must_ask = True
            return self.answered(permit, self.ask(by_hand)) if asks else permit
        except BaseException:
            # Interrupted before the caller had it: no other code would end it.
            lease.ended = True
            self._abandon(lease)
            raise

    def ask(self, by_hand: bool) -> float:
        """Return for how many seconds others want the trial left to them; 0: go ahead.

        Waits for them, in whichever thread.
        """
        gate = self.gate
        try:
            return 0.0 if gate is None else gate(by_hand)
        except Exception:
            complain("The gate of the circuit of %s raised", self._name)
            return 0.0

    def answered(self, permit: Permit, held_back: float) -> Permit | None:
        """Go on with :meth:`acquire`, whose permit had to ask first.

        :param held_back: what :meth:`ask` has returned.
        :returns: as :meth:`acquire`.
        """
        assert isinstance(permit, _TrialPermit)
        lease: Any = permit.lease
        try:
            permit.must_ask = False
            event = partial(
                events.answered,
                lease=lease,
                generation=permit.generation,
                held_back=held_back,
                due=permit.due,
            )
            return self._admitted(permit, self.replace(event, self._clock())[1])
        except BaseException:
            lease.ended = True
            self._abandon(lease)
            raise

    def _admitted(self, permit: _TrialPermit, after: Circuit) -> Permit | None:
        """Return the permit that a caller has in ``after``, if it has one."""
        self.notify_pending()
        permit.generation = after.generation
        lease: Any = permit.lease
        if after.lease is lease:
            return permit
        lease.end()
        return Permit(self, after.generation, None) if is_usable(after) else None

    # What established connections say

    def suspect(self, error: str = "", fault: Fault | None = None) -> None:
        """Make the next use of a closed circuit a trial. Open ones stay as they are."""
        self.apply(partial(events.suspected, error=error, fault=fault), self._clock())

    def count_failure(self, exc: BaseException, fault: Fault, generation: int) -> None:
        """Count a connection lost before it was of any use as a failed connect.

        :param generation: the circuit's, when the connection was made. Later
            openings and closings make this result a late one, which changes nothing.
        """
        Permit(self, generation, None).failed(exc, fault)

    def _abandon(self, lease: Lease) -> None:
        """Cancel a trial that no thread will report on. Never blocks."""
        # Where another thread has the lock, the next caller finds a lease that has ended.
        lease.ended = True
        now = self._clock()
        lock = self._lock
        try:
            # Struck right after acquire() we have the lock and do not know it: it
            # is released in any case. Where we have not got it, that raises.
            try:
                if lock.acquire(blocking=False):
                    due = now + self.release_interval
                    self.replace(partial(events.abandoned, lease=lease, due=due), now)
            finally:
                lock.release()
        except RuntimeError:
            pass
        lease.end()

    # The record

    def replace(
        self, event: CircuitEvent, now: float, *, elsewhere: bool = False, ends: Lease | None = None
    ) -> tuple[Circuit, Circuit]:
        """Replace the record by what ``event`` makes of it; return both. Notifies no one yet.

        :param now: the time, on the breaker's clock.
        :param elsewhere: another process found it out.
        :param ends: the trial that is over with it; threads that wait for it are woken.
        """
        try:
            # Guards the record from its being read to its being replaced.
            with self._lock:
                while True:
                    before = self.circuit
                    after = events.transition(before, event, now, elsewhere)
                    if self.circuit is before:
                        self.circuit = after
                        break
                    # This very thread has changed it, in a signal handler or finalizer.
        finally:
            if ends is not None:
                ends.end()
        return before, after

    def apply(
        self, event: CircuitEvent, now: float, *, elsewhere: bool = False, ends: Lease | None = None
    ) -> tuple[Circuit, Circuit]:
        """Replace the record as :meth:`replace` does, and notify those who follow it."""
        try:
            return self.replace(event, now, elsewhere=elsewhere, ends=ends)
        finally:
            self.notify_pending()

    def _spread_timeout(self) -> float:
        return self._reset_timeout * (1 + JITTER * (2 * self._jitter() - 1))

    def after_fork(self) -> None:
        super().after_fork()
        self._handing = None
        self.circuit = events.inherited(self.circuit)

    # Notifying

    def notify_pending(self) -> None:
        """Notify of the changes that are pending in the record, whichever thread made them."""
        if self.circuit.pending:
            try:
                for subscriber in self._hand_out():
                    subscriber.notify()
            except BaseException:
                # A listener's own, or one from outside: the others are notified all the same.
                for subscriber in self._hand_out():
                    subscriber.leave()
                raise

    def _hand_out(self) -> Sequence[Subscriber]:
        """Put the changes into the subscribers' queues, in order; return who is to be notified."""
        # Guards the order of the queues. It appends to them; nothing in it waits or calls out.
        with self._lock:
            handing = self._handing
            # A signal handler or finalizer within the loop leaves its change to that.
            if handing is not None and handing() is not None:
                return ()
            # In a function of its own: an exception at a ``try`` within the block would leave the
            # lock held (seen on CPython 3.11).
            self._hand_out_in_order()
            return self._subscribers()

    def _hand_out_in_order(self) -> None:
        life = _Life()
        try:
            self._handing = weakref.ref(life)
            while self.circuit.pending:
                before = self.circuit
                for subscriber in self._subscribers():
                    subscriber.put(before.pending[0])
                # Last: a change whose thread is interrupted above is put once more.
                after = before._replace(pending=before.pending[1:])
                if self.circuit is before:
                    self.circuit = after
        finally:
            self._handing = None
