"""What happens to peers, as frozen records for listeners.

The core only emits. Logging (:mod:`django_proxysql.core.logs`) is one listener;
:meth:`LoadBalancer.add_listener` adds others, which :mod:`django_proxysql.core.dispatch` calls.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .faults import Fault

Listener = Callable[["Event"], object]


@dataclass(frozen=True)
class Event:
    """Something that happened."""

    balancer: str


@dataclass(frozen=True)
class _OfPeer(Event):
    """Something that happened to one peer."""

    peer: str
    address: str


@dataclass(frozen=True)
class Connected(_OfPeer):
    """A connection was made."""

    #: How long the attempt took, in seconds.
    seconds: float
    trial: bool


@dataclass(frozen=True)
class ConnectFailed(_OfPeer):
    """An attempt to connect failed."""

    #: How long the attempt took, in seconds.
    seconds: float
    trial: bool
    fault: Fault
    #: The error's text. Drivers put no password there.
    error: str
    #: Which failure in a row this was; 0 when it did not count.
    count: int
    #: Whether the circuit opened over it.
    opened: bool


@dataclass(frozen=True)
class CircuitOpened(_OfPeer):
    """A closed circuit opened. A trial that fails opens no circuit anew."""

    fault: Fault | None
    error: str
    #: Seconds until the first trial, as things stand: it comes sooner if the last other peer
    #: fails meanwhile. None: the peer is drained, and gets no trial.
    trial_in: float | None
    #: Another process found it out, and this one applied it (``SHARED_STATE``).
    elsewhere: bool = False


@dataclass(frozen=True)
class CircuitClosed(_OfPeer):
    """A circuit that was open closed: the peer is in use again."""

    #: For how many seconds the peer was out.
    seconds: float
    #: Another process's trial closed it, and this one applied it (``SHARED_STATE``).
    elsewhere: bool = False


@dataclass(frozen=True)
class PeersExhausted(Event):
    """A connect() found no peer.

    Not emitted for a connect() that may use one peer alone (``pinned()``, ``only=``), for other
    peers may be well; nor for a replacement that failed while the old connection still works.
    """

    error: str
    #: How long it looked for one, in seconds.
    seconds: float


@dataclass(frozen=True)
class ConnectionLost(_OfPeer):
    """An established connection was found lost."""

    fault: Fault
    error: str
    #: Found by a look at the socket, before anything was sent.
    idle: bool


@dataclass(frozen=True)
class ConnectionReplaced(Event):
    """A connection was replaced at a safe point."""

    #: The peer that the replaced connection led to.
    peer: str
    #: The peer that the new one leads to.
    successor: str
    #: It was lost; otherwise it was left because of its peer's circuit.
    forced: bool
    error: str


@dataclass(frozen=True)
class StatementReplayed(Event):
    """A statement was run again on another connection."""

    peer: str
    successor: str
    #: What its first run met.
    error: str


@dataclass(frozen=True)
class BlockRetried(Event):
    """An atomic block was begun again: its function or view is run again from its beginning."""

    #: The dotted name of the function or view.
    function: str
    #: Which run begins: 2 is the second.
    run: int
    #: What ended the run before.
    error: str


@dataclass(frozen=True)
class CommitResolved(_OfPeer):
    """The answer to a COMMIT to this peer was lost, and the engine has asked what became of it."""

    #: "committed", "rolled_back", or "unknown": no peer knew in time.
    outcome: str
    #: How long the asking took, in seconds.
    seconds: float
    #: What COMMIT met.
    error: str


@dataclass(frozen=True)
class PeerDrained(_OfPeer):
    """A peer is to get no new connections, and to lose those it has at their safe points."""

    #: How many connections to it this process held at that moment.
    connections: int
    #: The desired state came from another process (``SHARED_STATE``).
    elsewhere: bool = False


@dataclass(frozen=True)
class PeerUndrained(_OfPeer):
    """A peer that was drained takes connections again."""

    #: The desired state came from another process (``SHARED_STATE``).
    elsewhere: bool = False
