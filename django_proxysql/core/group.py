"""What is known of a balancer's peers, in one process.

Searches, trials, the sharing and the rebalance talk to the :class:`PeerGroup`; the faces
(:class:`~django_proxysql.core.balancer.LoadBalancer` and its asynchronous kin) connect. Several
faces may have one group. It opens no connection and imports nothing that does.

Longer than other files: drains, trials and changes of circuits share one view and one lock.
"""

from __future__ import annotations

import functools
import math
import random
import time
import weakref
from collections import deque
from collections.abc import Callable, Mapping
from typing import Protocol

from .affinity import Affinity
from .breaker import PeerBreaker
from .budget import LossMemory, ReplayBudget
from .circuit import CLOSED, HALF_OPEN, Circuit, Transition, trial_of
from .config import BalancerConfig
from .dispatch import Listeners
from .events import CircuitClosed, CircuitOpened, Event, PeerDrained, PeerUndrained
from .exceptions import DrainRefused, NoPeerAvailable, UnknownPeer
from .faults import Fault
from .logs import log_event
from .peer import Peer, PeerState, View
from .ready import ready_check_from
from .rebalance import Move, Rebalance
from .runtime import new_lock, renew_in_child, watch_uwsgi
from .strategies import strategy_from


class _Desired(Protocol):
    """What became of an operator's drain in other processes."""

    was_refused: bool


class Shares(Protocol):
    """What a group asks of :class:`~django_proxysql.core.sharing.Sharing`."""

    def start(self) -> None: ...
    def has_news(self) -> None: ...
    def settle(self) -> bool: ...
    def publish(self, peer: Peer, drained: bool, *, forced: bool) -> _Desired: ...
    def may_try(self, name: str, by_hand: bool) -> float: ...


class PeerGroup:
    """The peers of one balancer: circuits, drains, tiers and their listeners.

    :param config: the peers and their settings.
    :param clock: a monotonic clock, in seconds.
    :param jitter: draws from [0, 1).
    """

    #: What a connect() raises when it finds no peer. The Django engine sets its own.
    no_peer_error: type[NoPeerAvailable] = NoPeerAvailable
    #: What the group shares with other processes, by :meth:`share`; None: nothing.
    sharing: Shares | None = None
    #: Has the background thread look after the peers, given whether something has changed;
    #: None: callers of connect() make the trials.
    background: Callable[[PeerGroup, bool], object] | None = None
    #: Makes a peer's trial if it is due; returns whether it was made, and succeeded.
    try_out: Callable[[Peer], bool]

    def __init__(
        self,
        config: BalancerConfig,
        *,
        clock: Callable[[], float] = time.monotonic,
        jitter: Callable[[], float] | None = None,
    ) -> None:
        self.config = config
        self.name = config.name
        #: The clock that everything about these peers is timed by, in seconds.
        self.clock = clock
        #: Draws from [0, 1).
        self.draw = random.random if jitter is None else jitter
        self.strategy = strategy_from(config.strategy)
        #: What a new connection must pass, READY_CHECK; None: nothing.
        self.ready_check = ready_check_from(config.ready_check)
        self.affinity = Affinity()
        #: Returns the peer that the caller is pinned to.
        self.pinned_to = self.affinity.pinned_to
        self.budget = ReplayBudget(clock)
        #: Which statements and callers have lost connections.
        self.losses = LossMemory(clock)
        by_weight = getattr(self.strategy, "by_weight", False)
        #: Moves kept connections to peers that have come back.
        self.rebalance = Rebalance(config.rebalance if by_weight else None, clock, self.draw)
        self.listeners = Listeners(config.name, log_event)
        #: Calls the listeners with an event.
        self.emit = self.listeners.emit
        self._drains_lock = new_lock()
        #: Another object whenever a peer is drained or undrained.
        self._drains = object()
        #: Changes of circuits whose consequences are still to be seen to.
        self._changes: deque[tuple[str, Transition]] = deque()
        self._view: View | None = None
        #: Another object whenever a circuit or drain changes.
        self.version = object()
        interval = config.last_resort_interval
        #: The peers by name.
        self.peers: Mapping[str, Peer] = {
            peer.name: Peer(
                peer,
                PeerBreaker(
                    fail_max=peer.breaker.fail_max,
                    success_threshold=peer.breaker.success_threshold,
                    reset_timeout=peer.check_interval,
                    name=f"{config.name}/{peer.name}",
                    release_interval=peer.check_interval if interval is None else interval,
                    # A trial is one attempt and at most one throw-away
                    # connection before it, each within the deadline.
                    lease=2 * config.connect_deadline + 1,
                    clock=clock,
                    on_transition=_Transitions(self, peer.name),
                    jitter=self.draw,
                ),
            )
            for peer in config.peers
        }
        renew_in_child(self)
        watch_uwsgi()

    def __repr__(self) -> str:
        return f"<PeerGroup {self}>"

    def __str__(self) -> str:
        peers = [f"{peer.name} {peer.breaker.current_state}" for peer in self.peers.values()]
        return f"{self.name!r}: {', '.join(peers)}"

    # The peers

    def named(self, peer: Peer | str, argument: str = "peer") -> Peer:
        """Return the peer, or the one of that name.

        :param argument: what the caller calls it, for the error.
        :raises UnknownPeer: it is none of this group's.
        """
        if isinstance(peer, Peer):
            if self.peers.get(peer.name) is peer:
                return peer
        elif isinstance(peer, str) and peer in self.peers:
            return self.peers[peer]
        said = repr(peer) if isinstance(peer, (str, Peer)) else f"a {type(peer).__name__}"
        raise UnknownPeer(
            argument,
            f"is {said}, which is no peer of {self.name!r}",
            f"Give one of its peers or their names: {', '.join(self.peers)}.",
        )

    def share(self, sharing: Shares) -> None:
        """Have circuits, trials and drains shared with other processes."""
        self.sharing = sharing
        for name, peer in self.peers.items():
            peer.breaker.gate = functools.partial(sharing.may_try, name)

    def undrained(self) -> list[Peer]:
        """Return the peers that may be connected to, whatever their circuits say."""
        return [peer for peer in self.peers.values() if not peer.drained]

    def view(self) -> View:
        """Return the peers sorted by what their circuits say; cached until one changes."""
        if self.sharing is not None:
            # The first connect comes by here, the first one of a forked child, and the next one
            # where no thread could be started.
            self.sharing.start()
        view = self._view
        if (
            view is None
            or view.version is not self.version
            or ((view.out or view.suspects) and view.is_stale())
        ):
            # Read the version first: a circuit that changes while we look
            # leaves a new one behind, and this view is then built again.
            version = self.version
            view = self._view = View.of(self.peers.values(), version)
        return view

    def invalidate(self) -> None:
        """Make the cached view stale, and have kept connections look where they lead."""
        # A fresh object rather than a counter: assigning it is atomic.
        self.version = object()

    def has_usable(self) -> bool:
        """Return whether any circuit is closed, and its peer no suspect."""
        return bool(self.view().tiers)

    def can_spare(self, peer: Peer) -> bool:
        """Return whether another peer's circuit is closed, and that peer is not drained."""
        return any(
            other.breaker.circuit.state == CLOSED and not other.drained
            for other in self.peers.values()
            if other is not peer
        )

    def snapshot(self) -> list[PeerState]:
        """Return what this process knows of each peer, without asking any."""
        now = self.clock()
        seen = [(peer, peer.breaker.circuit) for peer in self.peers.values()]
        return [PeerState.of(*one, now, self._trial_in(*one, now)) for one in seen]

    def claim_move(self, peer: Peer) -> Move | None:
        """Return where a kept connection to ``peer`` moves between two requests, if it does."""
        view = self.view()
        tier = view.tiers[0] if view.tiers else ()
        return self.rebalance.claim(peer, self.peers.values(), tier)

    # Trials

    def next_trial(self, peer: Peer) -> float | None:
        """Return when the peer's next trial may begin, on :attr:`clock`.

        :returns: None: it needs none; minus infinity: at once.
        """
        circuit = peer.breaker.circuit
        if circuit.state == CLOSED:
            return circuit.due if circuit.suspect else None
        return self._due(peer, circuit)

    def due_inline(self, peer: Peer) -> float:
        """Return when a caller of connect() makes the peer's trial before it uses other peers."""
        circuit = peer.breaker.circuit
        interval = peer.breaker.reset_timeout
        due = circuit.due
        if circuit.suspect:
            # A suspect that no caller had to fall back on is tried in its turn: it
            # may have been well all the time, and new connections pass it by.
            hurried = self.config.last_resort_interval
            due = circuit.tried + (interval if hurried is None else hurried)
        # The thread makes it, unless that does not get to run.
        return due if self.background is None else due + 2 * interval

    def last_resort(self, peer: Peer) -> float | None:
        """Return the seconds between trials of a peer while no circuit is closed; else None."""
        view = self.view()
        if view.tiers or view.suspects:
            return None
        interval = self.config.last_resort_interval
        # Another process opened its circuit; this process has not tried it.
        is_untried = peer.breaker.circuit.tried == -math.inf
        return 0 if interval is None and is_untried else interval

    def _due(self, peer: Peer, circuit: Circuit) -> float:
        interval = self.last_resort(peer)
        return circuit.due if interval is None else min(circuit.due, circuit.tried + interval)

    def _trial_in(self, peer: Peer, circuit: Circuit, now: float) -> float | None:
        """Return :attr:`PeerState.trial_in` of a peer whose circuit is ``circuit``."""
        if circuit.state == CLOSED or peer.drained:
            return None
        if trial_of(circuit, now) is not None:
            return 0.0
        return max(0.0, self._due(peer, circuit) - now)

    def schedule(self, *, news: bool) -> None:
        """Have the background thread, where there is one, look: now, where there are ``news``."""
        if self.background is not None:
            self.background(self, news)

    def count_unanswered(self, peer: Peer, exc: BaseException, since: float = -math.inf) -> bool:
        """Count a question that no server behind a proxy has answered; at ``fail_max`` the
        circuit opens, unless it is the last.

        A proxy says the same whether its servers are gone or all connections to
        them are in use. One that is busy is never given up for none.

        :param exc: what it said.
        :param since: when the statement was begun, on :attr:`clock`. If another was answered
            that was begun later, the servers are there.
        :returns: whether its circuit is open now.
        """
        if peer.has_served(since):
            peer.unanswered = 0
            return False
        # The lock guards the count of what is left: of two threads that give up the last two
        # peers one does not.
        with self._drains_lock:
            if not self.can_spare(peer):
                return peer.breaker.circuit.state != CLOSED
            peer.unanswered += 1
            if peer.unanswered < peer.breaker.fail_max:
                return False
            peer.breaker.trip(exc, Fault.NOT_READY, "backend", peer.unanswered, notify=False)
        peer.breaker.notify_pending()
        return True

    # Drains

    def drain(self, peer: Peer, *, force: bool) -> None:
        """Give a peer no new connections; see :meth:`LoadBalancer.drain`."""
        if self.sharing is not None:
            # A process that has just begun is to know what the others do.
            self.sharing.settle()
        # The lock guards what is left: of two threads that drain the last two peers one is refused.
        with self._drains_lock:
            others = [other for other in self.peers.values() if other is not peer]
            changed: bool | None = None
            # This very thread may drain another one meanwhile, in a signal handler.
            while changed is None:
                seen = self._drains
                if not (force or peer.drained or any(other.is_available for other in others)):
                    raise DrainRefused(
                        f"{peer.name!r} is the last peer of {self.name!r} that takes connections: "
                        "none could be made after it is drained."
                    )
                changed = self._set_drained(peer, True, elsewhere=False, seen=seen)
        if self._ask_for(peer, True, changed, force):
            raise DrainRefused(
                f"{peer.name!r} is the last peer of {self.name!r} that takes connections: another "
                "process has drained the others just now."
            )

    def undrain(self, peer: Peer) -> None:
        """Let a peer have new connections again."""
        # The lock guards the desired state, and the order of its events.
        with self._drains_lock:
            changed = bool(self._set_drained(peer, False, elsewhere=False))
        self._ask_for(peer, False, changed)

    def _ask_for(self, peer: Peer, drained: bool, changed: bool, force: bool = False) -> bool:
        """Share the desired state; return whether it was refused, and taken back."""
        self._drain_changed(peer, drained, changed)
        if self.sharing is None:
            return False
        desired = self.sharing.publish(peer, drained, forced=force)
        # A command's process may end right after this.
        self.sharing.settle()
        return desired.was_refused

    def apply_drained(
        self, peer: Peer, drained: bool, *, elsewhere: bool, again: bool = False
    ) -> bool:
        """Take over the desired state that another process, or this one, has shared.

        Another process never drains the last peer that may work here, forced or not: this process
        may have fewer peers than that one, or have found the others out of order. The peer is
        drained as soon as another one works.

        :param again: it was refused before; nothing is done if that does not hold any more.
        :returns: whether that is refused from now on.
        """
        # The lock guards what is left: of two threads that apply the last two drains one refuses.
        with self._drains_lock:
            if again and not peer.drain_refused:
                return False
            others = [other for other in self.undrained() if other is not peer]
            # One that has not been tried here is out because another process says so.
            spared = any(
                other.is_available or other.breaker.circuit.tried == -math.inf for other in others
            )
            refused = drained and elsewhere and not (peer.drained or spared)
            was_refused = peer.drain_refused
            changed = not refused and bool(self._set_drained(peer, drained, elsewhere=elsewhere))
            peer.drain_refused = refused
        self._drain_changed(peer, drained, changed)
        return refused and not was_refused

    def _set_drained(
        self, peer: Peer, drained: bool, *, elsewhere: bool, seen: object = None
    ) -> bool | None:
        """Drain or undrain a peer, within the drains' lock; return whether that is a change.

        :param seen: the drains that the caller looked at; None: it does so whatever they are.
        :returns: None: they are others by now, and nothing is done.
        """
        peer.drain_refused = False
        if peer.drained is drained:
            return False
        if seen is not None and self._drains is not seen:
            return None
        peer.drained = drained
        self._drains = object()
        # It is drained to be upgraded, say: what is there by now is asked anew.
        peer.forget_answers()
        where = (self.name, peer.name, peer.address)
        self.listeners.put(
            PeerDrained(*where, peer.connections, elsewhere)
            if drained
            else PeerUndrained(*where, elsewhere)
        )
        return True

    def _drain_changed(self, peer: Peer, drained: bool, changed: bool) -> None:
        # Even if nothing has changed: the thread that did it before may have been killed
        # on the way from one line to the other.
        self.invalidate()
        self.schedule(news=True)
        if changed and not drained:
            self.rebalance.begin(peer)
            self._apply_refused()
        self.listeners.notify()

    def _apply_refused(self) -> None:
        """Apply the drains that were refused, where another peer works by now."""
        for peer in self.peers.values():
            if peer.drain_refused:
                self.apply_drained(peer, True, elsewhere=True, again=True)

    # Changes

    def event_of(self, name: str, change: Transition) -> Event | None:
        """Return what the listeners are to know of a change of a circuit, if anything."""
        peer = self.peers[name]
        where = (self.name, name, peer.address)
        if change.before == CLOSED and change.after != CLOSED:
            first_trial = self._first_trial_in(peer, change)
            return CircuitOpened(*where, change.fault, change.error, first_trial, change.elsewhere)
        if change.after == CLOSED and change.before != CLOSED:
            return CircuitClosed(*where, change.seconds, change.elsewhere)
        return None

    def note_change(self, name: str, change: Transition, event: Event | None) -> None:
        """Note that a circuit has changed. Within its lock: never blocks, calls no listener.

        :param event: its :meth:`event_of`.
        """
        self.invalidate()
        if change.before != change.after and change.after != HALF_OPEN:
            self.peers[name].forget_answers()
        if event is not None:
            self.listeners.put(event)
        self._changes.append((name, change))

    def _first_trial_in(self, peer: Peer, opened: Transition) -> float | None:
        """Return the seconds until the first trial of a peer whose circuit opens just now."""
        if peer.drained:
            return None
        if any(other.breaker.circuit.state == CLOSED for other in self.undrained()):
            return opened.seconds
        # With no other peer left the trial comes sooner than the breaker alone can know; and
        # what another process found was not tried here.
        interval = 0.0 if opened.elsewhere else self.config.last_resort_interval
        return opened.seconds if interval is None else min(opened.seconds, interval)

    def see_to_changes(self) -> None:
        """Do what the noted changes demand, whichever thread made them. Needs no lock."""
        while self._changes:
            try:
                name, change = self._changes.popleft()
            except IndexError:
                break
            self.schedule(news=True)
            is_known = change.elsewhere or change.after == HALF_OPEN
            if self.sharing is not None and not is_known:
                self.sharing.has_news()
            if change.after == CLOSED:
                self._apply_refused()
                if change.before != CLOSED:
                    self.rebalance.begin(self.peers[name])

    def after_fork(self) -> None:
        """In the child: locks that no thread holds, and no connection of the parent's."""
        # Circuits, listeners, budgets and the like renew their own.
        self._drains_lock = new_lock()
        self._changes.clear()
        for peer in self.peers.values():
            peer.forget_connections()
        self.invalidate()


class _Transitions:
    """Hands a breaker's transitions to its group, without keeping that alive."""

    def __init__(self, group: PeerGroup, peer: str) -> None:
        self._group = weakref.ref(group)
        self._peer = peer
        #: The last change, and its event: a change that is put again has the same.
        self._last: tuple[Transition | None, Event | None] = (None, None)

    def put(self, change: Transition) -> None:
        group = self._group()
        if group is not None:
            if self._last[0] is not change:
                self._last = (change, group.event_of(self._peer, change))
            group.note_change(self._peer, change, self._last[1])

    def notify(self) -> None:
        group = self._group()
        if group is not None:
            group.see_to_changes()
            group.listeners.notify()

    def leave(self) -> None:
        group = self._group()
        if group is not None:
            group.see_to_changes()
            # The thread was interrupted: the listeners' own threads notify them.
            group.listeners.leave()
