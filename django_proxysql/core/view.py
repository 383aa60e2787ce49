"""What is known of a balancer's peers at one moment: sorted for connecting, and in words."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from .circuit import CLOSED, Circuit
from .faults import Fault
from .peer import Peer

__all__ = ["PeerState", "View"]


@dataclass(frozen=True)
class PeerState:
    """What is known of one peer, at one moment, in this process."""

    name: str
    #: Where it is: ``10.0.0.1:3306`` or a socket's path.
    address: str
    #: ``closed``, ``open`` or ``half-open``.
    state: str
    #: Whether it is closed, and the next connection is made as a trial.
    suspect: bool
    #: Seconds until the next trial; 0 while one is under way or due. None while the circuit is
    #: closed, and while the peer is drained: there are no trials then.
    trial_in: float | None
    #: Seconds for which the peer has been out; None while the circuit is closed.
    out_for: float | None
    #: Failed connects in a row.
    failures: int
    #: What it said last, and "" while all is well; never a password.
    error: str
    #: What that error says about the peer.
    fault: Fault | None
    #: How many connections to it this process holds.
    connections: int
    weight: float
    priority: int
    #: Whether an operator has drained it: it gets no new connections.
    drained: bool
    #: Whether another process drained it and this one does not, whose last undrained peer it is.
    drain_refused: bool = False

    @classmethod
    def of(cls, peer: Peer, circuit: Circuit, now: float, trial_in: float | None) -> PeerState:
        """Return the state of a peer whose circuit is ``circuit``."""
        since = circuit.out_since if circuit.state != CLOSED else None
        return cls(
            name=peer.name,
            address=peer.address,
            state=circuit.state,
            suspect=circuit.suspect,
            trial_in=trial_in,
            out_for=None if since is None else now - since,
            failures=circuit.failures,
            error=circuit.error,
            fault=circuit.fault,
            connections=peer.connections,
            weight=peer.weight,
            priority=peer.priority,
            drained=peer.drained,
            drain_refused=peer.drain_refused,
        )


class View(NamedTuple):
    """The peers by what can be done with them, the drained left out; immutable."""

    version: object
    #: Closed circuits, tier by tier, best tier first.
    tiers: tuple[tuple[Peer, ...], ...]
    suspects: tuple[Peer, ...]
    out: tuple[Peer, ...]

    @classmethod
    def of(cls, peers: Iterable[Peer], version: object) -> View:
        """Sort ``peers`` by what their circuits say."""
        tiers: dict[int, list[Peer]] = {}
        suspects = []
        out = []
        for peer in peers:
            circuit = peer.breaker.circuit
            if peer.drained:
                continue
            if circuit.state != CLOSED:
                out.append(peer)
            elif circuit.suspect:
                suspects.append(peer)
            else:
                tiers.setdefault(peer.priority, []).append(peer)
        return cls(
            version,
            tuple(tuple(tiers[priority]) for priority in sorted(tiers)),
            # The one whose doubts are oldest is the likeliest to be well.
            tuple(sorted(suspects, key=lambda peer: peer.breaker.circuit.tried)),
            tuple(sorted(out, key=lambda peer: peer.priority)),
        )

    @property
    def all_are_out(self) -> bool:
        """Whether no circuit is closed."""
        return not self.tiers and not self.suspects

    def is_stale(self) -> bool:
        """Return whether a peer that is out or suspect in it has recovered since.

        Every change of a circuit invalidates the view, unless its thread is killed on the way.
        A peer in a tier that has failed is found out when it is chosen. One that has recovered
        would never be.
        """
        for peer in self.out:
            if peer.breaker.circuit.state == CLOSED:
                return True
        return any(not peer.breaker.circuit.suspect for peer in self.suspects)
