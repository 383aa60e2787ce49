"""What happened to each peer, counted from the balancer's events."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Callable

from ..core.balancer import PeerState
from ..core.events import CircuitClosed, CircuitOpened, Connected, ConnectFailed, Event


@dataclass
class PeerTally:
    """One peer's counts since the start."""

    connects: int = 0
    failed: int = 0
    trials: int = 0
    opened: int = 0
    closed: int = 0
    #: Seconds, by the circuits that have closed.
    out_for: float = 0


class Tally:
    """A listener of the balancer that counts, and reports trials.

    The balancer's own log lines report circuits that open and close.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.peers: dict[str, PeerTally] = {}
        self._say = say
        # Events come in the threads to which the things happen.
        self._lock = threading.Lock()

    def __call__(self, event: Event) -> None:
        with self._lock:
            self._count(event)
        if isinstance(event, (Connected, ConnectFailed)) and event.trial:
            outcome = "succeeded" if isinstance(event, Connected) else f"failed: {event.error}"
            self._say(f"the trial of {event.peer}, its circuit half-open, {outcome}")

    def _count(self, event: Event) -> None:
        if not isinstance(event, (Connected, ConnectFailed, CircuitOpened, CircuitClosed)):
            return
        peer = self.peers.setdefault(event.peer, PeerTally())
        if isinstance(event, CircuitOpened):
            peer.opened += 1
        elif isinstance(event, CircuitClosed):
            peer.closed += 1
            peer.out_for += event.seconds
        else:
            peer.trials += event.trial
            if isinstance(event, Connected):
                peer.connects += 1
            else:
                peer.failed += 1

    def counts(self) -> tuple[Counter[str], Counter[str]]:
        """Return how many connections to each peer were made, and how many attempts failed."""
        with self._lock:
            peers = self.peers.items()
            return (
                Counter({name: peer.connects for name, peer in peers}),
                Counter({name: peer.failed for name, peer in peers}),
            )


@dataclass(frozen=True)
class Sample:
    """How things stand at one moment."""

    #: Seconds since the start, and the planned end.
    elapsed: float
    seconds: float
    requests: int
    errors: int
    #: Connections made to each peer since the start, and attempts that failed.
    connects: Counter[str]
    failed: Counter[str]
    states: Sequence[PeerState]
