"""Trials off the request: one thread a process tries the peers that are out, while any is.

:meth:`Prober.step` decides and tries, and says when it wants to be called
again; the thread only calls it and waits. It exists while some balancer with
``trials="background"`` has a peer whose circuit is not closed, or that is
suspect, and makes one trial after the other: a peer that hangs holds up the
others' trials for as long as an attempt may take (TRIAL_TIMEOUT), and no
request. A drained peer is not tried.

How it holds
------------

*Nobody looks after an open circuit.* Whoever changes a circuit calls
:meth:`Prober.tend`. A thread that finds nothing left to do says first that it
is over, and looks once more after that: whoever came before saw it alive and
is found now, whoever comes later starts another. Whoever is killed between a
circuit's change and that call leaves an open circuit that the next connect()
finds, which calls it, too; and so it is after a fork, whose child has the
circuits and no thread.

*The thread is killed.* It says on its way out that it is over and starts
another if there is need. Should it be killed there again, the next connect()
does that.

*It does not get to run* (uWSGI without threads, no thread to be had, a trial
that never ends): requests make the trials that are overdue by two intervals.

*Locks.* None is held during a trial. The thread waits on a lock of C that is
released to wake it; released early, it does not wait. It is no
``threading.Thread``, whose ``start()`` waits with locks held that a signal
handler, starting another, would wait for for ever.
"""

from __future__ import annotations

import _thread
import math
import threading
import time
import weakref
from typing import TYPE_CHECKING

from .dispatch import spare_this_thread
from .logger import Limit, complain
from .runtime import new_lock, renew_in_child

if TYPE_CHECKING:
    from .balancer import LoadBalancer
    from .peer import Peer

__all__ = ["Prober", "prober"]

#: Seconds after which the thread looks by itself: whoever changed a circuit or
#: an interval may have been killed before it could say so.
_LOOK_AGAIN = 1.0
#: Seconds that lie between two trials of one peer at least, whatever is set.
_SHORTEST_PAUSE = 0.1
#: Seconds between two complaints of one kind: what goes wrong in here may do so at each trial.
_COMPLAINTS_APART = 60.0


class _Runner:
    """One thread's life."""

    def __init__(self) -> None:
        #: Its thread does nothing more, or was never started.
        self.over = False
        self.ident = 0
        self._bell = threading.Lock()
        self._bell.acquire()

    def ring(self) -> None:
        """Have the thread look anew, now or as soon as it is done."""
        try:
            self._bell.release()
        except RuntimeError:
            # It is still to hear the last one.
            pass

    def wait(self, seconds: float) -> None:
        """Wait until somebody rings, at most ``seconds``."""
        self._bell.acquire(timeout=max(0.0, min(seconds, _LOOK_AGAIN)))


class _End:
    """Dies with its thread, also with one that is killed before its first line."""

    def __init__(self, runner: _Runner) -> None:
        self._runner = runner

    def __del__(self) -> None:
        # Whoever connects next starts another. Not from here: this may be the
        # failure to start one.
        runner = getattr(self, "_runner", None)
        if runner is not None:
            runner.over = True


class Prober:
    """Makes the trials of all balancers of a process that want that, in a thread of its own."""

    def __init__(self) -> None:
        # Re-entrant: a signal handler may come here while its thread is here.
        self._lock = new_lock()
        self._runner: _Runner | None = None
        #: The balancers that have had trouble, and when each of their peers may be tried again.
        self._tended: weakref.WeakKeyDictionary[LoadBalancer, dict[str, float]] = (
            weakref.WeakKeyDictionary()
        )
        #: One limit for each complaint: one peer's trouble does not hide another's.
        self._limits: dict[str, Limit] = {}

    @property
    def is_running(self) -> bool:
        """Whether there is a thread."""
        runner = self._runner
        return runner is not None and not runner.over

    @property
    def is_here(self) -> bool:
        """Whether the caller's thread is the one."""
        runner = self._runner
        # A thread that has ended leaves its number to another.
        return runner is not None and not runner.over and runner.ident == _thread.get_ident()

    def tend(self, balancer: LoadBalancer, *, news: bool = True) -> None:
        """Have the thread look after a balancer's peers, if any needs it. Waits for nothing.

        :param news: something has changed, and the thread is to look now.
        """
        if balancer not in self._tended:
            self._tended.setdefault(balancer, {})
        runner = self._runner
        if runner is None or runner.over:
            if _is_needed(balancer):
                self._start()
        elif news:
            runner.ring()

    def step(self) -> float | None:
        """Make the trials that are due, one after the other.

        :returns: seconds until the next is due; None while no peer needs one.
        """
        pause = math.inf
        # A list of references is made at one go, whoever adds to it meanwhile.
        for reference in self._tended.keyrefs():
            balancer = reference()
            if balancer is not None:
                not_before = self._tended.setdefault(balancer, {})
                for moment, peer in _due(balancer, not_before):
                    if moment <= balancer.clock():
                        self._try(balancer, peer, not_before)
                for moment, _ in _due(balancer, not_before):
                    pause = min(pause, max(0.0, moment - balancer.clock()))
        return None if pause == math.inf else pause

    def _try(self, balancer: LoadBalancer, peer: Peer, not_before: dict[str, float]) -> None:
        succeeded = False
        try:
            succeeded = balancer.try_out(peer)
        except BaseException:
            # SystemExit from somebody's check, too, ends this trial and no more.
            self._complain(f"The trial of {balancer.name}/{peer.name} raised")
        finally:
            if not succeeded:
                # Its trial is another's (permit refused), or says nothing, or its
                # interval is 0: whatever it is, not at once again.
                pause = peer.breaker.release_interval
                not_before[peer.name] = balancer.clock() + max(pause, _SHORTEST_PAUSE)

    def _complain(self, message: str) -> None:
        limit = self._limits.setdefault(message, Limit(_COMPLAINTS_APART))
        kept_back = limit.passes(time.monotonic())
        if kept_back is not None:
            complain("%s%s", message, f" (and {kept_back} times more)" if kept_back else "")

    # The thread

    def _start(self) -> None:
        runner = _Runner()
        try:
            with self._lock:
                running = self._runner
                if running is not None and not running.over:
                    # Another thread has started it: it may have looked before our news.
                    running.ring()
                    return
                self._runner = runner
            _thread.start_new_thread(self._run, (runner, _End(runner)))
        except RuntimeError:
            # No thread is to be had, or the interpreter is on its way out.
            runner.over = True
            self._complain("No thread could be started for trials; requests make them")
        except BaseException:
            runner.over = True
            raise

    def _run(self, runner: _Runner, end: _End) -> None:
        try:
            runner.ident = _thread.get_ident()
            spare_this_thread()
            # After a fork within a trial this may be the child.
            while self._runner is runner and not runner.over:
                pause = self._guarded_step()
                if pause is None:
                    break
                runner.wait(pause)
        finally:
            runner.over = True
            # What happened before that line was left to this thread.
            if self._runner is runner:
                for reference in self._tended.keyrefs():
                    balancer = reference()
                    if balancer is not None:
                        self.tend(balancer)

    def _guarded_step(self) -> float | None:
        try:
            return self.step()
        except BaseException:
            self._complain("Looking for peers to try raised")
            return _LOOK_AGAIN

    def after_fork(self) -> None:
        """In the child: no thread, and a lock that nobody holds."""
        self._lock = new_lock()
        self._runner = None


def _due(balancer: LoadBalancer, not_before: dict[str, float]) -> list[tuple[float, Peer]]:
    """Return the peers that need a trial and when, on the balancer's clock, the first first."""
    moments = []
    for peer in balancer.undrained():
        due = balancer.next_trial(peer)
        if due is not None:
            lease = peer.breaker.trial
            if lease is not None:
                # Somebody is at it; the end of that rings.
                due = max(due, lease.expires)
            moments.append((max(due, not_before.get(peer.name, -math.inf)), peer))
    return sorted(moments, key=lambda moment: moment[0])


def _is_needed(balancer: LoadBalancer) -> bool:
    return any(balancer.next_trial(peer) is not None for peer in balancer.undrained())


#: This process's.
prober = Prober()

renew_in_child(prober)
