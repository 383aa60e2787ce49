"""One connect(), without any I/O: which peer to attempt next, and what an attempt's end means.

A face asks :meth:`Search.step` what to do. The answer is an :class:`Attempt` to make, a
:class:`Wait` for another caller's trial, an :class:`Ask` to other processes that share the
circuits, or :class:`NoPeerAvailable`. The face does it, and says how an attempt ended:
:meth:`Search.succeeded` or :meth:`Search.failed`. Nothing here calls a driver or sleeps, and no
lock is held between two steps. So a synchronous and an asynchronous face are one small loop each.

The order of the candidates: peers whose trial is due, closed circuits tier by tier as the strategy
orders them, suspects, and at last every peer that is out. Each is attempted once.

Longer than other files: one connect() is one class, so that its rules are read in one place.
"""

from __future__ import annotations

import itertools
import logging
import math
import weakref
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import NamedTuple, Union

from . import drivers
from .affinity import Pin
from .circuit import CLOSED, OPEN, Circuit, Lease
from .config import BalancerConfig
from .events import Connected, ConnectFailed, PeersExhausted
from .exceptions import ConfigError, NoPeerAvailable, PinnedElsewhere, PoolBusy
from .faults import Count, Fault, Judgement, Verdict, verdict_on
from .group import PeerGroup
from .logger import logger
from .logs import due_in
from .peer import Peer, PeerState, View
from .permits import Permit
from .ready import Unanswered
from .strategies import iterated

#: When a connect() makes trials.
_TRIALS = ("first", "last", "never")


class Attempt:
    """One try to connect to one peer: what the function that opens a connection is given.

    :param peer: the peer to connect to.
    :param config: its balancer's settings.
    """

    #: Seconds that it may take.
    timeout: float
    #: Whether it is the one attempt that an open or suspect circuit allows.
    is_trial: bool
    #: Whether to wait for our own pool of connections to that peer, where it has none to spare:
    #: False as long as other peers have not been asked.
    may_wait: bool

    __slots__ = (
        "__weakref__",
        "config",
        "is_over",
        "is_trial",
        "may_wait",
        "peer",
        "permit",
        "pin",
        "started",
        "timeout",
    )

    def __init__(self, peer: Peer, config: BalancerConfig) -> None:
        self.peer = peer
        self.config = config
        self.timeout = config.connect_timeout
        self.is_trial = False
        self.may_wait = True
        #: The permit that it is made with.
        self.permit: Permit | None = None
        #: The pinned() block that it is made in, if the block chooses the peer.
        self.pin: Pin | None = None
        #: When it began, on the balancer's clock.
        self.started = 0.0
        #: Whether it has ended, in whatever way.
        self.is_over = False

    def settle(self) -> None:
        """Have the pinned() block stay with this peer, if it has none yet.

        :raises PinnedElsewhere: another connect of the block was first.
        """
        pin = self.pin
        if pin is not None and not pin.is_over and pin.settle(self.peer) is not self.peer:
            raise PinnedElsewhere


class Wait(NamedTuple):
    """Another caller has a trial under way; its result decides whether there is a peer."""

    #: The trials; wait until one of them has ended.
    leases: tuple[Lease, ...]
    #: How long to wait at most.
    seconds: float


class Ask(NamedTuple):
    """Other processes are to be asked first: hand what they say to :meth:`Search.step`."""

    #: Its :meth:`~.permits.Keeper.ask` asks, and waits for them.
    peer: Peer
    #: What that takes: an operator demands the trial.
    by_hand: bool


#: A peer to try; whether the view has it for out or suspect (None: no view was looked at); and
#: after how many seconds without a trial it may be tried as a last resort.
_Candidate = tuple[Peer, Union[bool, None], Union[float, None]]

#: What follows where our own pool has no connection to spare, or the peer is not the block's.
_BUSY = Verdict(True, Count.NO, Fault.OVERLOADED)


class Search:
    """One connect(): which peers were attempted, and what is left.

    :param group: the peers.
    :param trials: ``"first"``, ``"last"`` or ``"never"``; see :meth:`LoadBalancer.connect`.
    :param only: the one peer to attempt, if its circuit is closed.
    :param by_hand: make the trial of that peer: if it is due (False), or now (True).
    :param refusal_is_callers: a peer that refuses us does so because of what the caller asks for.
    :param may_search_again: the caller waits for a peer where this search finds none.
    :raises ConfigError: ``trials`` is none of these.
    """

    # Most of it is needed only after a failure: a default in the class costs
    # a connect that succeeds at once nothing.
    _plan: Iterator[_Candidate | Wait] | None = None
    #: The candidate that they are asked about.
    _asked: tuple[_Candidate, ...] = ()
    #: The attempt under way. Whatever breaks it off, the face marks it as over.
    attempt: Attempt | None = None
    _faults: Mapping[str, Fault] = MappingProxyType({})
    _errors: Mapping[str, str] = MappingProxyType({})
    #: What was seen of peers before they were asked for the permit of a trial.
    _seen: dict[str, tuple[Circuit, Lease | None]]
    #: Whose pool had no connection to spare: asked again after all others.
    _busy: frozenset[str] = frozenset()
    _last_error: BaseException | None = None
    #: What a proxy said that may be busy, and no more than that.
    _plain_error: BaseException | None = None
    #: No candidate is left, or no time.
    is_over = False
    _exhaustion: PeersExhausted | None = None
    _verdict = Verdict(False, Count.NO, Fault.OTHER)
    #: Where the last error was met.
    _peer_of_last: Peer | None = None
    #: Failed attempts that count if another peer lets us in.
    _undecided: tuple[tuple[Attempt, BaseException, Judgement], ...] = ()

    def __init__(
        self,
        group: PeerGroup,
        trials: str = "first",
        only: Peer | None = None,
        refusal_is_callers: bool | Callable[[], bool] = False,
        may_search_again: bool = False,
        by_hand: bool | None = None,
    ) -> None:
        if trials not in _TRIALS:
            raise ConfigError("trials", f"is {trials!r}", f"Give one of {', '.join(_TRIALS)}.")
        self._group = group
        self._trials = trials
        self._only = only
        self._by_hand = by_hand
        self._refusal_is_callers = refusal_is_callers
        self._may_search_again = may_search_again
        # As Affinity.pin(), without the call: each connect comes by here.
        pin = group.affinity.pins.get()
        self._pin = pin = None if pin is None or pin.is_over else pin
        #: The one peer that may be connected to: it is pinned, or was asked for.
        self._pinned = only if only is not None or pin is None else pin.peer
        self._clock = clock = group.clock
        self._started = clock()
        self._deadline = self._started + group.config.connect_deadline

    # What to do next

    def step(self, held_back: float | None = None) -> Attempt | Wait | Ask:
        """Return what to do next.

        :param held_back: after an :class:`Ask`: what the peer's breaker has returned.
        :raises NoPeerAvailable: no candidate is left, or no time.
        :raises Exception: the driver's last error, where every peer refused us.
        """
        plan = self._plan
        if plan is None:
            plan = self._plan = self._candidates()
        now, config = self._clock(), self._group.config
        if now < self._deadline or held_back is not None:
            for candidate in plan if held_back is None else itertools.chain(self._asked, plan):
                if isinstance(candidate, Wait):
                    return candidate
                peer, out, last_resort = candidate
                # No frame but the attempt refers to the permit: an exception's traceback would
                # hold it, and with it the trial.
                if held_back is not None:
                    attempt: Attempt = self.attempt  # type: ignore[assignment]
                    attempt.permit = peer.breaker.answered(attempt.permit, held_back)  # type: ignore[arg-type]
                    held_back = None
                elif peer.name in self._faults or (peer.drained and peer is not self._pinned):
                    # Attempted already, or drained since we looked.
                    continue
                else:
                    if out is not False:
                        self._seen[peer.name] = _seen(peer)
                    attempt = self.attempt = Attempt(peer, config)
                    attempt.pin = self._pin if self._only is None else None
                    attempt.permit = peer.breaker.acquire(
                        # A peer that has become suspect since we looked comes last all the same.
                        last_resort=last_resort,
                        trial=out is not False,
                        by_hand=self._by_hand is True,
                        asks=False,
                    )
                    if attempt.permit is not None and attempt.permit.must_ask:
                        self._asked = (candidate,)
                        return Ask(peer, self._by_hand is True)
                is_trial = attempt.permit is None or attempt.permit.is_trial
                if out is not None and out is not is_trial:
                    # The view is older than the circuit. Every change of a circuit
                    # invalidates it, unless that thread was killed on the way.
                    self._group.invalidate()
                if attempt.permit is not None:
                    if is_trial:
                        attempt.is_trial = True
                        if config.trial_timeout is not None:
                            attempt.timeout = config.trial_timeout
                        # Other processes were asked first.
                        now = self._clock()
                    attempt.may_wait = is_trial or peer.name in self._busy
                    remaining = self._deadline - now
                    if remaining < attempt.timeout:
                        attempt.timeout = remaining
                    attempt.started = now
                    peer._connecting[id(attempt)] = weakref.ref(attempt)
                    return attempt
        raise self._exhausted()

    def _candidates(self) -> Iterator[_Candidate | Wait]:
        group, pinned, trials = self._group, self._pinned, self._trials
        disappointed: frozenset[str] = frozenset()
        while True:
            self._seen = {}
            if pinned is not None and self._by_hand is not None:
                yield pinned, None, group.last_resort(pinned)
                return
            if self._only is not None:
                if not self._only.drained:
                    yield self._only, False, None
                return
            if pinned is None:
                view = group.view()
                if view.out or view.suspects:
                    group.schedule(news=False)
                    if trials == "first":
                        for peer in self._due(view):
                            yield peer, True, None
                for tier in view.tiers:
                    if len(tier) > 1:
                        for peer in iterated(group.strategy.order(tier)):
                            if group.peers.get(getattr(peer, "name", "")) is not peer:
                                raise ConfigError(
                                    "STRATEGY",
                                    f"named {peer!r}, which is no peer of {group.name!r}",
                                    "Yield the peers that order() was given.",
                                )
                            yield peer, False, None
                    # What a strategy leaves out is still a peer; each is tried once. A busy
                    # one has been: its turn comes again when nothing else is left.
                    for peer in tier:
                        if peer.name not in self._busy:
                            yield peer, False, None
                if trials == "never":
                    return
                yield from self._left_over(view)
            elif pinned.name not in self._faults:
                # A pinned thread never falls back to another peer, nor does it leave a drained
                # one: the block comes to its end first.
                yield pinned, None, 0
            peers = group.undrained() if pinned is None else [pinned]
            leases = self._trials_under_way(peers, disappointed)
            if leases is None:
                return
            if leases:
                until = min(self._deadline, *(lease.expires for lease in leases.values()))
                # Whichever ends first: one peer's trial may hang while another's is over.
                yield Wait(tuple(leases.values()), until - self._clock())
                for name, lease in leases.items():
                    circuit = group.peers[name].breaker.circuit
                    if lease.ended and circuit.state == OPEN:
                        disappointed |= {name}
            if self._clock() >= self._deadline:
                return

    def _left_over(self, view: View) -> Iterator[_Candidate]:
        """Yield what is left after the peers in use, or one of them has changed meanwhile."""
        for peer in view.suspects:
            yield peer, True, None
        # Everything that was in use has now been tried. Look again: with no
        # circuit closed, peers may be tried before their interval is over.
        view = self._group.view()
        for peer, last_resort in [(peer, self._group.last_resort(peer)) for peer in view.out]:
            yield peer, True, last_resort
        for tier in view.tiers:
            for peer in tier:
                yield peer, False, None
        for peer in view.suspects:
            yield peer, True, None

    def _due(self, view: View) -> Iterator[Peer]:
        """Yield the peers whose trial goes before the use of others."""
        # Peers of a worse tier than those in use are left alone: a trial
        # that succeeds would send them a connection they are not to have.
        best = view.tiers[0][0].priority if view.tiers else math.inf
        now = self._clock()
        for peer in view.out + view.suspects:
            if self._group.due_inline(peer) <= now and peer.priority <= best:
                yield peer

    def _trials_under_way(
        self, peers: list[Peer], disappointed: frozenset[str]
    ) -> dict[str, Lease] | None:
        """Return other callers' trials that are worth waiting for, by the peer's name.

        :param disappointed: peers whose trial failed while this search waited for it.
        :returns: {}: another look is worth it at once; None: it is not.
        """
        leases: dict[str, Lease] = {}
        for peer in peers:
            if peer.name in self._faults or peer.name in disappointed:
                continue
            circuit, lease = now = _seen(peer)
            if lease is not None:
                leases[peer.name] = lease
            elif peer.breaker.is_available or (
                circuit.state != OPEN and now != self._seen.get(peer.name)
            ):
                # The trial ended between our look at the peers and now. Where nothing has
                # changed, another look would find nothing else.
                return {}
        return leases or None

    # How it ended

    def succeeded(self, attempt: Attempt) -> None:
        """Note that an attempt has connected."""
        peer, group = attempt.peer, self._group
        peer._connecting.pop(id(attempt), None)
        # The plan and this search hold each other; so do an error and its traceback's frames.
        self._plan = self._last_error = self._plain_error = None
        attempt.permit.succeeded()  # type: ignore[union-attr]
        if self._undecided:
            self._decide(alone=True)
        pin = self._pin
        if pin is not None and pin.settle(peer) is not peer and self._only is None:
            # Another connect of the block was first: kept connections look where they lead.
            group.invalidate()
        # Each connect comes by here: see first that a listener would get it.
        is_trial = attempt.is_trial
        if group.listeners.of_connects or is_trial or logger.isEnabledFor(logging.DEBUG):
            seconds = self._clock() - attempt.started
            group.emit(Connected(group.name, peer.name, peer.address, seconds, is_trial))

    def failed(self, attempt: Attempt, exc: BaseException) -> None:
        """Note that an attempt has raised ``exc``: judge it, count it, emit the failure."""
        peer, permit = attempt.peer, attempt.permit
        assert permit is not None
        peer._connecting.pop(id(attempt), None)
        self._peer_of_last = peer
        if isinstance(exc, PoolBusy) and not (attempt.is_trial or peer.name in self._busy):
            # It was not asked, and nothing has failed: it stays among the candidates.
            permit.released()
            self._busy |= {peer.name}
            self._errors = {**self._errors, peer.name: drivers.describe(exc)}
            self._last_error, self._verdict = exc, _BUSY
            return
        if isinstance(exc, PinnedElsewhere):
            # The peer has let us in, and the block's has let the other in: it is asked once more,
            # whatever it said before.
            permit.succeeded()
            self._decide(alone=True)
            self._pinned, self._plan = self._pin.peer, None  # type: ignore[union-attr]
            self._faults = {}
            self._last_error, self._verdict = exc, _BUSY
            return
        judgement = drivers.judge(exc, connecting=True)
        callers = self._refusal_is_callers
        if callable(callers):
            callers = judgement.fault in (Fault.REFUSED, Fault.OTHER) and callers()
        verdict = verdict_on(judgement, is_callers=callers, is_trial=permit.is_trial)
        self._verdict = verdict
        self._faults = {**self._faults, peer.name: verdict.fault}
        self._errors = {**self._errors, peer.name: judgement.text}
        self._last_error = exc
        if judgement.may_be_busy:
            self._plain_error = exc
        if verdict.counts is Count.IF_ALONE:
            self._undecided = (*self._undecided, (attempt, exc, judgement))
        else:
            self._report(attempt, exc, judgement, counts=verdict.counts is Count.NOW)

    def goes_on(self, exc: BaseException) -> bool:
        """Return whether the next candidate may do what this one could not."""
        return self._only is None and not self.is_over and self.is_of_the_peer(exc)

    def is_of_the_peer(self, exc: BaseException) -> bool:
        """Return whether ``exc``, which an attempt raised, says something about the peer."""
        # Anything but the last attempt's own error is no peer's: Ctrl-C while
        # waiting for a trial, a strategy that raises.
        return exc is self._last_error and self._verdict.goes_on

    def raised(self, exc: BaseException) -> None:
        """Note what the whole connect() raises: emit an exhaustion, or name the peer in it."""
        self._plan = None
        self._decide(alone=False)
        if self._exhaustion is not None and isinstance(exc, NoPeerAvailable):
            event, self._exhaustion = self._exhaustion, None
            self._group.emit(event)
        peer, verdict = self._peer_of_last, self._verdict
        # Another balancer's names its own peers.
        if exc is not self._last_error or peer is None or isinstance(exc, NoPeerAvailable):
            return
        if verdict.counts is Count.IF_ALONE or verdict.fault is not Fault.REFUSED:
            drivers.name_peer(exc, f"to {_said_of(peer)} of {self._group.name!r}")

    def may_be_repeated(self, exc: BaseException) -> bool:
        """Return whether it found no peer, a later one may, and the caller waits for that."""
        waits = self._may_search_again and self._trials != "never" and self._only is None
        return waits and self.is_over and isinstance(exc, NoPeerAvailable)

    def again(self) -> Search:
        """Return a new search for the same."""
        callers = self._refusal_is_callers
        return type(self)(self._group, self._trials, self._only, callers, self._may_search_again)

    def forget(self) -> None:
        """Drop the last error: with its traceback's frames it holds the failed socket."""
        self._plan = self._last_error = self._plain_error = None

    def _decide(self, alone: bool) -> None:
        """Count the attempts that were undecided, if another peer has let us in."""
        undecided, self._undecided = self._undecided, ()
        for failure in undecided:
            self._report(*failure, counts=alone)

    def _report(
        self, attempt: Attempt, exc: BaseException, judgement: Judgement, counts: bool
    ) -> None:
        """End a failed attempt's permit, and emit the failure."""
        group, peer, permit = self._group, attempt.peer, attempt.permit
        assert permit is not None
        fault = self._faults[peer.name]
        count = 0
        # A trial that fails leaves an open circuit as it is.
        was_closed = peer.breaker.circuit.state == CLOSED
        # A proxy let us in, and found no server, or no connection to one.
        is_unanswered = judgement.may_be_busy or isinstance(exc, Unanswered)
        if counts and was_closed and is_unanswered:
            # Each good connect would reset the circuit's own count.
            permit.released()
            if group.count_unanswered(peer, exc, attempt.started):
                count = peer.breaker.circuit.failures
        elif counts:
            count = permit.failed(exc, fault)
        else:
            permit.released()
        group.emit(
            ConnectFailed(
                group.name,
                peer.name,
                peer.address,
                self._clock() - attempt.started,
                permit.is_trial,
                fault,
                judgement.text,
                count,
                opened=was_closed
                and count > 0
                and (permit.is_trial or count >= peer.breaker.fail_max),
            )
        )

    # No peer left

    def _exhausted(self) -> BaseException:
        self.is_over = True
        self._plan = None
        self._decide(alone=False)
        group = self._group
        candidates = group.undrained() if self._pinned is None else [self._pinned]
        # Peers that refuse us, or that the driver cannot be asked to connect to.
        refused = [one for one in self._faults.values() if one in (Fault.REFUSED, Fault.LOCAL)]
        if self._last_error is not None and len(refused) == len(candidates):
            return self._last_error
        if self._plain_error is not None and not self._may_search_again:
            # The proxy is there: its error is the application's.
            return self._plain_error
        said = {state.name: self._said(state) for state in group.snapshot()}
        pinned = self._pinned
        lines, name = list(said.values()), ""
        if pinned is not None:
            lines, name = [said[pinned.name]], pinned.name
        error = group.no_peer_error(group.name, lines, name)
        error.__cause__ = self._last_error
        # One peer that fails, or a replacement that was not needed, is no exhaustion: other
        # peers may be well, and the application may still have its connection.
        if pinned is None and self._trials != "never":
            seconds = self._clock() - self._started
            self._exhaustion = PeersExhausted(group.name, str(error), seconds)
        return error

    def _said(self, state: PeerState) -> str:
        where = _said_of(state)
        if state.name in self._errors:
            return f"{where}: {self._errors[state.name]}, tried just now"
        if state.drained:
            return f"{where}: drained"
        if state.state == CLOSED and not state.suspect:
            if self._clock() >= self._deadline:
                return f"{where}: no time was left to try it"
            return f"{where}: not tried, its circuit has closed just now"
        trial = self._group.peers[state.name].breaker.trial
        text = "suspect" if state.suspect else "circuit open"
        if trial is not None:
            text = "being tried by another caller"
        if state.error:
            text += f", last error {state.error}"
        if state.trial_in is not None and trial is None:
            text += f", next trial {due_in(state.trial_in)}"
        return f"{where}: {text}"


def _said_of(peer: Peer | PeerState) -> str:
    return f"{peer.name} ({peer.address})" if peer.address else peer.name


def _seen(peer: Peer) -> tuple[Circuit, Lease | None]:
    """Return a peer's circuit, and the trial of it that is under way."""
    # The trial first: one that ends in between leaves a changed circuit behind.
    lease = peer.breaker.trial
    return peer.breaker.circuit, lease
