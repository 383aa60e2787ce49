"""What processes exchange through Redis, and what each remembers of it: plain records."""

from __future__ import annotations

import socket
import threading
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from ..circuit import CLOSED, Circuit
from ..config import host_and_port
from ..faults import Fault
from ..peer import Peer

if TYPE_CHECKING:
    from . import Sharing

#: Seconds for which the fleet's record of what happened goes back.
HISTORY = 3600

#: How many moments of the fleet's history are kept.
MOMENTS = 500

#: Seconds for which a drain is remembered while no process shares it.
KEEP_DRAINS = 7 * 86400


@dataclass(frozen=True)
class Moment:
    """Something that happened to a peer, as one of the processes found it."""

    peer: str
    #: ``open``, ``closed``, ``drained`` or ``undrained``.
    state: str
    #: When, in seconds since 1970, on Redis's clock.
    when: float
    #: Why a circuit opened, and "" otherwise; never a password.
    error: str


@dataclass(frozen=True)
class Fleet:
    """What all processes that share this balancer's state know together."""

    #: How many of them were there within the last five seconds, this one included.
    processes: int
    #: The connections that they hold, by the peer's name.
    connections: Mapping[str, int]
    #: What has happened within the last hour, the oldest first; 500 moments at most.
    timeline: tuple[Moment, ...]
    #: The peers whose circuits are open, and those that are drained, as all know it. What one
    #: process keeps to itself is not in it.
    out: frozenset[str] = frozenset()
    drained: frozenset[str] = frozenset()
    #: When this was so, in seconds since 1970, on Redis's clock.
    now: float = 0.0


class Agreed(NamedTuple):
    """What was last agreed on with Redis about a peer's circuit."""

    #: The record's version; 0: there is none.
    version: int = 0
    #: Whether it says that the circuit is open.
    is_open: bool = False
    #: The local circuit's generation at that time.
    generation: int = 0


@dataclass(eq=False)
class DesiredState:
    """What an operator has said of a peer."""

    drained: bool
    #: Whether it holds even if it leaves no peer undrained.
    forced: bool
    #: When, on the balancer's clock.
    made: float
    #: Whether Redis has refused it: the others have drained all other peers.
    was_refused: bool = False


@dataclass(eq=False)
class SharedPeer:
    """One peer's part. All but ``desired`` is the thread's own, and replaced by one assignment."""

    agreed: Agreed = field(default_factory=Agreed)
    #: Seconds for which a trial that was asked for is to be left to others.
    left_to_others: float = 0.0
    #: When the lease runs out, on the balancer's clock, that was given to a thread that may not
    #: have waited for the answer. In Redis it runs out then, or later.
    kept_until: float = float("-inf")
    #: Whether a trial was put off for an answer that is late, and has not come.
    waited: bool = False
    drain_version: int = 0
    #: Whether Redis says that it is drained.
    drain_on: bool = False
    #: When an operator asked for what Redis says of the drain, on the balancer's clock.
    drain_at: float = float("-inf")
    #: Desired states that Redis does not have yet. Other threads add, the link's removes.
    desired: deque[DesiredState] = field(default_factory=deque)

    def forget_lease(self) -> None:
        """Let the next one who is to make the trial ask for it."""
        self.kept_until, self.waited = float("-inf"), False


class Question:
    """Something to be asked in the thread's next round trip."""

    __slots__ = ("answer", "bell", "by_hand", "fleet", "of", "peer")

    def __init__(
        self, of: Sharing, *, peer: str = "", by_hand: bool = False, fleet: bool = False
    ) -> None:
        self.of = of
        #: Whose trial somebody here is ready to make; and whether that is due or not.
        self.peer = peer
        self.by_hand = by_hand
        self.fleet = fleet
        self.answer: Any = None
        self.bell = threading.Lock()
        self.bell.acquire()


class Request(NamedTuple):
    """What one balancer sends to Redis in one round trip, and what that was made from."""

    #: When it was made, on the balancer's clock.
    at: float
    #: What is asked with it.
    asked: Sequence[Question]
    #: By peer: the record that was looked at.
    seen: Mapping[str, Circuit]
    #: By peer: the desired states that are sent; the last one counts.
    desired: Mapping[str, list[DesiredState]]
    #: What the script is given.
    text: str


def change_of(circuit: Circuit, agreed: Agreed, cut_off: bool) -> str:
    """Return what has happened to a circuit since something was agreed on."""
    if circuit.state == CLOSED:
        return "close" if agreed.is_open else ""
    if cut_off:
        # Only what this process alone has found is taken back, which Redis knows.
        return "withdraw" if agreed.is_open else ""
    if circuit.generation == agreed.generation:
        return ""
    # A trial that failed, for whatever reason, puts off the next one. A peer that refuses us
    # may well take the others' word for who they are.
    return "open" if agreed.is_open or circuit.fault is not Fault.REFUSED else ""


def names_for_others(peers: Iterable[Peer]) -> dict[str, str]:
    """Return under what each peer is known to the other processes, by its name.

    Its address is: names go by position, and differ where a peer was added. An address that means
    another server on each host goes with the host's name.
    """
    fields: dict[str, str] = {}
    for peer in peers:
        field = peer.address or peer.name
        if _is_local(peer.address):
            field += f" on {socket.gethostname()}"
        while field in fields.values():
            field += "'"
        fields[peer.name] = field
    return fields


def _is_local(address: str) -> bool:
    host = host_and_port(address)[0].lower()
    # A name without a port is a host's, or a database's on no host in particular.
    return (
        host in ("localhost", "::1", "")
        or host.startswith(("127.", "/", "@", ":memory:"))
        or host.endswith((".sock", ".sqlite3"))
        or "/" in host
    )


def milliseconds(seconds: float, most: float = 86400.0) -> int:
    return int(max(0.0, min(seconds, most)) * 1000)


def seconds_of(milliseconds: Any, most: float) -> float:
    """Return a duration of Redis's in seconds, as far as it is to be believed."""
    if isinstance(milliseconds, bool) or not isinstance(milliseconds, (int, float)):
        return 0.0
    return max(0.0, min(milliseconds / 1000, most))


def fault_of(value: Any) -> Fault | None:
    try:
        return Fault(value)
    except ValueError:
        return None
