"""Trials off the request: one thread a process tries the peers that are out, while any is.

:meth:`TrialWorker.step` decides and tries, and says when it is to be called again. Its thread
exists while some balancer with ``trials="background"`` has a peer whose circuit is not closed, or
that is suspect, and makes one trial after the other: a peer that hangs holds up the others' trials
for as long as an attempt may take (TRIAL_TIMEOUT), and no request. A drained peer is not tried.

How it holds
------------

*No open circuit is left alone.* A thread that changes a circuit calls
:meth:`TrialWorker.schedule`. Where it is killed before that, where a child of a fork has the
circuits and no thread, and where the thread was killed as it left, the next connect() calls it.

*It does not get to run* (uWSGI without threads, no thread can be started, a trial that never ends):
requests make the trials that are overdue by two intervals.
"""

from __future__ import annotations

import math
import weakref

from .group import PeerGroup
from .peer import Peer
from .runtime import Worker

#: Seconds that lie between two trials of one peer at least, whatever is set.
_SHORTEST_PAUSE = 0.1


class TrialWorker(Worker):
    """Makes the trials of all balancers of a process that want that, in a thread of its own."""

    def __init__(self) -> None:
        super().__init__("for trials", "; requests make them")
        #: The balancers that have had trouble, and when each of their peers may be tried again.
        self._scheduled: weakref.WeakKeyDictionary[PeerGroup, dict[str, float]] = (
            weakref.WeakKeyDictionary()
        )

    def schedule(self, balancer: PeerGroup, *, news: bool = True) -> None:
        """Have the thread look after a balancer's peers, now if there are ``news``."""
        if balancer not in self._scheduled:
            self._scheduled.setdefault(balancer, {})
        if news or not self.is_running:
            self.wake()

    def is_needed(self) -> bool:
        return any(
            balancer.next_trial(peer) is not None
            for balancer in self._balancers()
            for peer in balancer.undrained()
        )

    def step(self) -> float | None:
        """Make the trials that are due, one after the other.

        :returns: seconds until the next is due; None while no peer needs one.
        """
        pause = math.inf
        for balancer in self._balancers():
            not_before = self._scheduled.setdefault(balancer, {})
            for moment, peer in due(balancer, not_before):
                if moment <= balancer.clock():
                    self._try(balancer, peer, not_before)
            for moment, _ in due(balancer, not_before):
                pause = min(pause, max(0.0, moment - balancer.clock()))
        return None if pause == math.inf else pause

    def _balancers(self) -> list[PeerGroup]:
        # A list of references is made at one go, whichever threads add to it meanwhile.
        found = [reference() for reference in self._scheduled.keyrefs()]
        return [balancer for balancer in found if balancer is not None]

    def _try(self, balancer: PeerGroup, peer: Peer, not_before: dict[str, float]) -> None:
        succeeded = False
        try:
            succeeded = balancer.try_out(peer)
        except BaseException:
            # SystemExit from somebody's check, too, ends this trial and no more.
            self.complain(f"The trial of {balancer.name}/{peer.name} raised")
        finally:
            if not succeeded:
                not_before[peer.name] = balancer.clock() + pause_after_failure(peer)


def pause_after_failure(peer: Peer) -> float:
    """Return the seconds between a trial that has not succeeded and the next, at least."""
    # Its trial is another's, or says nothing, or its interval is 0: not at once again.
    return max(peer.breaker.release_interval, _SHORTEST_PAUSE)


def due(balancer: PeerGroup, not_before: dict[str, float]) -> list[tuple[float, Peer]]:
    """Return the peers that need a trial and when, the first first; by name, each not before."""
    moments = []
    for peer in balancer.undrained():
        moment = balancer.next_trial(peer)
        if moment is not None:
            lease = peer.breaker.trial
            if lease is not None:
                # It is being tried; the end of that is news.
                moment = max(moment, lease.expires)
            moments.append((max(moment, not_before.get(peer.name, -math.inf)), peer))
    return sorted(moments, key=lambda moment: moment[0])


#: This process's.
trial_worker = TrialWorker()
