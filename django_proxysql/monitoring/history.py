"""What became of each peer in the last hour, as this process saw it.

A listener of all balancers. At each event it looks at the peer's state and
notes it if it is another than before: so the circuits decide what is noted,
and not the order in which two threads report it.

Look and note are one step under the lock, which is held for no more than that.
A state that came and went between two events (a trial under way, a doubt) is
noted only if somebody looked meanwhile; trials have a record of their own.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable
from typing import NamedTuple

from ..core.balancer import LoadBalancer, PeerState
from ..core.circuit import Circuit
from ..core.events import Connected, Event
from ..core.peer import Peer
from ..core.reports import REPORTS
from ..core.runtime import Guarded
from ..registry import balancers

#: How far back it goes, in seconds.
SPAN = 3600.0

#: How much is kept of one peer, however often it comes and goes.
MOST_CHANGES, MOST_TRIALS = 500, 200
#: … and of one balancer.
MOST_COUNTED = 1000

#: What a peer can be, beside the three states of its circuit.
SUSPECT, DRAINED = "suspect", "drained"


class Change(NamedTuple):
    """From this moment, on the history's clock, a peer was in this state."""

    at: float
    state: str


class Trial(NamedTuple):
    """A trial that ended at this moment, on the history's clock."""

    at: float
    succeeded: bool
    error: str


def state_of(drained: bool, circuit: Circuit | PeerState) -> str:
    """Return what a peer is, in one word: a drain goes before what its circuit says."""
    return DRAINED if drained else SUSPECT if circuit.suspect else circuit.state


class _Row:
    """One peer's."""

    def __init__(self) -> None:
        self.changes: deque[Change] = deque(maxlen=MOST_CHANGES)
        self.trials: deque[Trial] = deque(maxlen=MOST_TRIALS)


class History(Guarded):
    """Keeps the peers' changes of the last hour.

    :param clock: a monotonic clock, in seconds: the time of day may be set while we look.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        # A signal handler may cause an event while its thread notes one: the lock is re-entrant.
        super().__init__()
        self.clock = clock
        #: When it began to look, on its clock.
        self.began = clock()
        self._rows: dict[tuple[str, str], _Row] = {}
        #: By balancer and kind of event: when there was one, and what it is counted as.
        self._counted: dict[tuple[str, type], deque[tuple[float, str]]] = {}

    def __call__(self, event: Event) -> None:
        """Note what ``event`` is about; a :class:`Listener`."""
        registered = balancers.known.get(event.balancer)
        if registered is None:
            return
        report = REPORTS[type(event)]
        peer = registered.balancer.peers.get(getattr(event, "peer", ""))
        # Guards the rows: look and note are one step.
        with self._lock:
            if report.recent:
                kind = event.balancer, report.event
                known = self._counted.setdefault(kind, deque(maxlen=MOST_COUNTED))
                known.append((self.clock(), report.word_of(event)))
            if peer is None:
                return
            row = self._note(registered.balancer, peer)
            if getattr(event, "trial", False):
                error = getattr(event, "error", "")
                row.trials.append(Trial(self.clock(), isinstance(event, Connected), error))

    def count(self, balancer: str, kind: type) -> Counter[str]:
        """Return how many events of a kind there were in the last hour, by their words."""
        since = self.clock() - SPAN
        # Guards the deque, which a thread may add to.
        with self._lock:
            known = list(self._counted.get((balancer, kind), ()))
        return Counter(word for at, word in known if at >= since)

    def look_at(self, balancer: LoadBalancer) -> None:
        for peer in balancer.peers.values():
            # Guards the rows, as above.
            with self._lock:
                self._note(balancer, peer)

    def of(self, balancer: str, peer: str) -> tuple[list[Change], list[Trial]]:
        """Return a peer's changes and trials of the last hour, oldest first.

        Its first change may lie before that; what was earlier still is not known.
        """
        since = self.clock() - SPAN
        # Guards the row's deques, which a thread may add to. (A signal handler of its own, too.)
        with self._lock:
            row = self._rows.get((balancer, peer))
            if row is None:
                return [], []
            return list(row.changes), [trial for trial in row.trials.copy() if trial.at >= since]

    def _note(self, balancer: LoadBalancer, peer: Peer) -> _Row:
        now, state = self.clock(), state_of(peer.drained, peer.breaker.circuit)
        row = self._rows.setdefault((balancer.name, peer.name), _Row())
        changes = row.changes
        if not changes:
            changes.extend(self._before(balancer, peer, now))
        if not changes or changes[-1].state != state:
            changes.append(Change(now, state))
        while len(changes) > 1 and changes[1].at <= now - SPAN:
            changes.popleft()
        return row

    def _before(self, balancer: LoadBalancer, peer: Peer, now: float) -> list[Change]:
        """Return what is known of the time before the first look at a peer."""
        circuit = peer.breaker.circuit
        if circuit.out_since is None:
            return [Change(self.began, "closed")]
        # The circuit's clock may be another.
        out_since = min(now, now - balancer.clock() + circuit.out_since)
        known = [] if out_since <= self.began else [Change(self.began, "closed")]
        return [*known, Change(out_since, "open")]


#: This process's.
history = History()


def watch() -> None:
    """Begin to listen; to call it again changes nothing."""
    # The everyday connects say nothing of a state, and are spared the call.
    balancers.add_listener(history, connects=False)
