"""One database endpoint: its address, its circuit, its connections, and what is known of it."""

from __future__ import annotations

import itertools
import math
import threading
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from .circuit import CLOSED, Circuit
from .faults import Fault

if TYPE_CHECKING:
    from .breaker import PeerBreaker
    from .config import PeerConfig


class ServerFacts(NamedTuple):
    """What Django asked a server about itself: its version, its ``sql_mode`` and the like."""

    #: The version that the server greeted with.
    greeting: str
    #: What it answered.
    facts: Any
    #: When it was asked, on the balancer's clock.
    asked: float


class Peer:
    """One of a load balancer's equivalent endpoints.

    Made by its :class:`LoadBalancer`, and found in ``balancer.peers`` by its name.

    :param config: its settings (:class:`django_proxysql.core.config.PeerConfig`).
    :param breaker: its circuit.
    """

    def __init__(self, config: PeerConfig, breaker: PeerBreaker) -> None:
        self.config = config
        #: As in logs, errors and ``balancer.peers``.
        self.name = config.name
        #: Where it is: ``10.0.0.1:3306`` or a socket's path; never a password.
        self.address = config.address
        #: Its share of the connections, relative to its tier's other peers.
        self.weight = config.weight
        #: Its tier; lower numbers are used first.
        self.priority = config.priority
        #: The peer's circuit; guard any other call to the same host with it.
        self.breaker = breaker
        #: The desired state: whether it gets no new connections; see
        #: :meth:`LoadBalancer.drain`. Changed by one assignment, and read without a lock.
        self.drained = False
        #: Whether statements are answered by the server that greets us; None while that is
        #: not known, and again when the circuit opens. One look that says no is believed.
        self.is_server: bool | None = None
        #: What Django asked the server about itself.
        self.server_facts: ServerFacts | None = None
        #: When the last statement that was answered here was begun, on the balancer's clock.
        self.served = -math.inf
        #: How many questions in a row no server behind this proxy has answered.
        self.unanswered = 0
        #: The end of the time, on the balancer's clock, in which a thread asks whether a server
        #: answers.
        self.asked_until = -math.inf
        #: Whether another process drained it and this one does not, whose last undrained peer it
        #: is. It is drained as soon as another one is not.
        self.drain_refused = False
        # Adding to and discarding from a set is atomic: no lock is needed,
        # and a finalizer that runs in the middle of anything may discard.
        self._checkouts: set[int] = set()
        #: The attempts to connect that are under way.
        self._connecting: dict[int, weakref.ref[Any]] = {}

    def __repr__(self) -> str:
        drained = ", drained" if self.drained else ""
        return f"<Peer {self.name!r} {self.address} {self.breaker.current_state}{drained}>"

    @property
    def is_available(self) -> bool:
        """Whether anyone may connect to it: its circuit is closed, and it is not drained."""
        return not self.drained and self.breaker.is_available

    @property
    def params(self) -> Mapping[str, Any]:
        """What a connection to the peer is made with. May hold a password."""
        return self.config.params

    @property
    def connections(self) -> int:
        """How many connections to the peer this process holds."""
        return len(self._checkouts)

    def note_server(self, is_server: bool) -> None:
        """Take note of who has answered: the server that greeted us, or one behind a proxy."""
        self.is_server = is_server and self.is_server is not False

    def has_served(self, since: float) -> bool:
        """Return whether a statement was answered that was begun after ``since``."""
        return since > -math.inf and self.served > since

    def forget_answers(self) -> None:
        """Forget what was found out by asking; the address may lead elsewhere by now."""
        self.is_server = None
        self.server_facts = None
        self.unanswered = 0

    @property
    def connecting(self) -> int:
        """How many connects to the peer are under way in this process."""
        if not self._connecting:
            return 0
        # An attempt that was killed at the wrong line is over or gone, and still in the dictionary.
        attempts = [reference() for reference in self._connecting.copy().values()]
        return sum(attempt is not None and not attempt.is_over for attempt in attempts)

    def forget_connections(self) -> None:
        """Start counting anew: in a forked child, whose parent holds the others."""
        self._checkouts = set()
        # The thread that asked is the parent's.
        self.asked_until = -math.inf
        self._connecting = {}

    def check_out(self, *, of_thread: bool = True) -> Checkout:
        """Count one connection as held, until it is released.

        :param of_thread: the calling thread holds it, and its end releases it. False: it may
            outlive the thread, in a pool.
        :returns: what lets it go; its end does so too.
        """
        return Checkout(self, of_thread=of_thread)


class Checkout:
    """One connection's place in its peer's count.

    It ends with :meth:`release`, with its own destruction, or, ``of_thread``, with the thread
    that made it: a thread that dies without closing is not counted on.
    """

    __slots__ = ("_of_thread", "_serial", "peer")

    def __init__(self, peer: Peer, *, of_thread: bool = True) -> None:
        #: The peer that the connection leads to.
        self.peer = peer
        self._serial = serial = next(_serials)
        self._of_thread: dict[int, Peer] = {}
        if of_thread:
            try:
                end = _local.end
            except AttributeError:
                end = _local.end = _ThreadEnd()
            self._of_thread = end.holds
            self._of_thread[serial] = peer
        # Last: it is counted only where release() finds all that it needs.
        peer._checkouts.add(serial)

    def release(self) -> None:
        """Count the connection no longer. May be called again, and by any thread."""
        self.peer._checkouts.discard(self._serial)
        self._of_thread.pop(self._serial, None)

    def __del__(self) -> None:
        try:
            self.release()
        except AttributeError:
            # Interrupted in __init__, before it was counted.
            pass


def count_while_alive(connection: Any, peer: Peer) -> None:
    """Count ``connection`` as checked out until it is collected, whichever threads come and go."""
    hold = peer.check_out(of_thread=False)
    try:
        weakref.finalize(connection, Checkout.release, hold).atexit = False
    except TypeError:
        # sqlite3's connections take no weak references; such a connection
        # cannot be followed, so it is not counted.
        hold.release()


class _ThreadEnd:
    """Dies with its thread, whose thread-local dictionary has the only reference."""

    def __init__(self) -> None:
        self.holds: dict[int, Peer] = {}

    def __del__(self) -> None:
        holds: dict[int, Peer] = getattr(self, "holds", {})
        while holds:
            # Other threads may release these at the same time: popitem is
            # atomic where iteration is not.
            try:
                serial, peer = holds.popitem()
            except KeyError:
                return
            peer._checkouts.discard(serial)


# Serial numbers rather than id(): an id is used again after its object's end.
_serials = itertools.count()
_local = threading.local()


# What is known at one moment


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
