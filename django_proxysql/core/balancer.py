"""The load balancer: owns equivalent peers and hands out connections to those that work.

``LoadBalancer.connect`` reads as the whole story: the first attempt is made
directly; after a failure tenacity carries on over the peers that are left;
when none is left and somebody else's trial is under way, its result is waited
for; then :class:`NoPeerAvailable` says what every peer last said.
"""

from __future__ import annotations

import contextlib
import contextvars
import itertools
import logging
import math
import random
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import tenacity

from . import drivers
from .breaker import (
    CLOSED,
    HALF_OPEN,
    OPEN,
    Circuit,
    Lease,
    PeerBreaker,
    Permit,
    Transition,
    trial_of,
)
from .budget import LossMemory, ReplayBudget
from .config import BalancerConfig, BreakerConfig, PeerConfig, function
from .dispatch import Dispatcher, must_not_wait
from .events import (
    CircuitClosed,
    CircuitOpened,
    Connected,
    ConnectFailed,
    Event,
    Listener,
    PeerDrained,
    PeersExhausted,
    PeerUndrained,
)
from .exceptions import ConfigError, DrainRefused, NoPeerAvailable, PoolBusy, UnknownPeer
from .faults import Count, Fault, Verdict, verdict_on
from .logger import Limit, logger
from .logs import due_in, log_event
from .peer import Hold, Peer
from .ready import (
    QUESTIONS,
    Unanswered,
    Writer,
    galera,
    is_unanswered,
    ready_check_from,
    throw_away,
    writable,
)
from .rebalance import Move, Rebalance
from .runtime import new_lock, renew_in_child, watch_uwsgi
from .sharing import Sharing
from .sqlalchemy_engine import sqlalchemy_engine
from .strategies import iterated, strategy_from
from .trials import trial_worker

if TYPE_CHECKING:
    import sqlalchemy.engine

__all__ = ["Attempt", "LoadBalancer", "PeerState"]

_T = TypeVar("_T")

#: Seconds between two looks for a peer: processes that wait do not look in step.
_WAIT = tenacity.wait_random_exponential(multiplier=0.1, max=2)

#: What ``connect()`` may be told of trials.
_TRIALS = ("first", "last", "never")

_PEERS_HINT = (
    "Give a dict of names and of what connect() takes, such as {'db1': {'host': '10.0.0.1'}}."
)


class Attempt(NamedTuple):
    """What the function that opens a connection is told."""

    #: The peer to connect to.
    peer: Peer
    #: Seconds that this attempt may take.
    timeout: float
    #: Whether it is the one attempt that an open or suspect circuit allows.
    is_trial: bool
    #: Whether to wait for our own pool of connections to that peer, where it
    #: has none to spare: False as long as other peers have not been asked.
    may_wait: bool = True
    #: The permit that the attempt is made with.
    permit: Permit | None = None


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
    #: Whether an operator wishes it to get no new connections.
    drained: bool
    #: Whether another process drained it and this one does not, whose last undrained peer it is.
    drain_refused: bool = False


class LoadBalancer:
    """Spreads connections over equivalent peers and leaves those alone that fail.

    :param peers: names and what ``connect`` is called with for each, or a
        finished :class:`BalancerConfig`. The keys ``weight``, ``priority``,
        ``breaker`` and ``check_interval`` are the peer's own settings; a
        callable ``password`` or ``passwd`` is called at each attempt.
    :param connect: the driver's ``connect``; called with a peer's arguments.
    :param name: for logs and errors.
    :param check_interval: seconds for which a circuit stays open before a trial.
    :param breaker: thresholds, as ``{"fail_max": 3, "success_threshold": 2}``.
    :param strategy: ``"random"``, ``"round_robin"``, ``"least_connections"``,
        a dotted path, a class or an object (:mod:`django_proxysql.core.strategies`).
    :param connect_timeout: seconds for one attempt, handed to drivers that we know.
    :param trial_timeout: seconds for one attempt that is a trial.
    :param connect_deadline: seconds for a whole :meth:`connect`.
    :param wait_for_peer: seconds for which :meth:`connect` waits for a peer when there is
        none, 0 for not at all. It looks again after a random, growing time, at most 2 s.
        The last look begins when that time is over, and takes ``connect_deadline`` at most.
    :param wait: one of tenacity's ``wait_…`` objects, in place of these times.
    :param stop: one of tenacity's ``stop_…`` objects, in place of ``wait_for_peer``.
    :param sleep: how it waits; called with seconds.
    :param last_resort_interval: seconds between trials of a peer while no
        circuit is closed; None: the check interval.
    :param ready_check: ``"galera"``, ``"writable"``, a dotted path or a callable.
    :param shared_state: ``"redis://…"``: circuits and drains are shared with all
        processes that name the same Redis (:mod:`django_proxysql.core.sharing`).
    :param trials: ``"inline"``: callers of :meth:`connect` make the trials;
        ``"background"``: a thread does (:mod:`django_proxysql.core.trials`).
    :param clock: a monotonic clock, in seconds.
    :param jitter: draws from [0, 1).
    :raises ConfigError: a wrong argument; the message names it.
    """

    #: What connect() raises when it finds no peer. Django's floor sets its own.
    no_peer_error: type[NoPeerAvailable] = NoPeerAvailable

    def __init__(
        self,
        peers: Mapping[str, Mapping[str, Any]] | BalancerConfig,
        connect: Callable[..., Any] | None = None,
        *,
        name: str = "default",
        check_interval: float = 30,
        breaker: Mapping[str, Any] | None = None,
        strategy: Any = "random",
        connect_timeout: float = 5,
        trial_timeout: float | None = None,
        connect_deadline: float = 15,
        wait_for_peer: float = 0,
        wait: Any = None,
        stop: Any = None,
        sleep: Callable[[float], None] = time.sleep,
        last_resort_interval: float | None = 1,
        ready_check: Any = None,
        shared_state: str | None = None,
        trials: str = "inline",
        clock: Callable[[], float] = time.monotonic,
        jitter: Callable[[], float] | None = None,
    ) -> None:
        function("connect", connect, "Give the driver's connect function.", optional=True)
        function("clock", clock, "Give a function that returns seconds.")
        function("jitter", jitter, "Give a function that returns [0, 1).", optional=True)
        function("wait", wait, "Give one of tenacity's wait_… objects.", optional=True)
        function("stop", stop, "Give one of tenacity's stop_… objects.", optional=True)
        function("sleep", sleep, "Give a function that takes seconds.")
        if isinstance(peers, BalancerConfig):
            config = peers
        else:
            if not isinstance(name, str):
                raise ConfigError("name", f"is a {type(name).__name__}", "Give a str.")
            if not isinstance(peers, Mapping):
                raise ConfigError("peers", f"is a {type(peers).__name__}", _PEERS_HINT)
            thresholds = BreakerConfig.of(breaker, over=BreakerConfig())
            config = BalancerConfig(
                name=name,
                peers=tuple(
                    _peer_config(peer, params, check_interval, thresholds)
                    for peer, params in peers.items()
                ),
                strategy=strategy,
                connect_timeout=connect_timeout,
                trial_timeout=trial_timeout,
                connect_deadline=connect_deadline,
                wait_for_peer=wait_for_peer,
                last_resort_interval=last_resort_interval,
                ready_check=ready_check,
                shared_state=shared_state,
                trials=trials,
            )
        self.config = config
        self.name = config.name
        self._connect = connect
        self._in_background = config.trials == "background"
        self._waits = config.wait_for_peer > 0 or stop is not None
        self._wait, self._stop, self._sleep = wait, stop, sleep
        self._waiting_line = Limit(1)
        #: How a background trial connects, if not by ``connect``: opens a
        #: connection as the :class:`Attempt` says, and closes it again.
        self.open_and_close: Callable[[Attempt], object] | None = None
        #: Whether a refusal of a background trial is due to what we ask for.
        self.asks_for_another: Callable[[], bool] | bool = False
        #: The clock that everything about this balancer is timed by, in seconds.
        self.clock = clock
        self.budget = ReplayBudget(clock)
        #: Which statements and callers have lost connections.
        self.losses = LossMemory(clock)
        # Of a context, so that greenlets and asyncio's tasks have their own, and
        # what sync_to_async() runs in a thread has its task's.
        self._pins: contextvars.ContextVar[_Pin | None] = contextvars.ContextVar(
            "django_proxysql.pin", default=None
        )
        self._strategy = strategy_from(config.strategy)
        self._ready_check = ready_check_from(config.ready_check)
        #: Draws from [0, 1).
        self.draw = random.random if jitter is None else jitter
        by_weight = getattr(self._strategy, "by_weight", False)
        #: Moves kept connections to peers that have come back.
        self.rebalance = Rebalance(config.rebalance if by_weight else None, clock, self.draw)
        self._log = Dispatcher(log_event, self.name)
        self._dispatchers: tuple[Dispatcher, ...] = (self._log,)
        #: Those of them, logging aside, that want to hear of each connection made.
        self._hear_connects: tuple[Dispatcher, ...] = ()
        # Re-entrant: a signal handler may come here while its thread is here.
        self._listeners_lock = new_lock()
        self._drains_lock = new_lock()
        #: Changes of circuits that were noted, and not seen to yet.
        self._changes: deque[tuple[str, Transition]] = deque()
        self._view: _View | None = None
        #: Another object whenever a circuit changes.
        self.version = object()
        draws = {} if jitter is None else {"jitter": jitter}
        #: The peers by name.
        self.peers: Mapping[str, Peer] = {
            peer.name: Peer(
                peer,
                PeerBreaker(
                    fail_max=peer.breaker.fail_max,
                    success_threshold=peer.breaker.success_threshold,
                    reset_timeout=peer.check_interval,
                    name=f"{config.name}/{peer.name}",
                    release_interval=(
                        peer.check_interval
                        if config.last_resort_interval is None
                        else config.last_resort_interval
                    ),
                    # A trial is one attempt and at most one throw-away
                    # connection before it, each within the deadline.
                    lease=2 * config.connect_deadline + 1,
                    clock=clock,
                    on_transition=_Transitions(self, peer.name),
                    **draws,  # type: ignore[arg-type]
                ),
            )
            for peer in config.peers
        }
        #: What it shares with other processes; None where that is not asked for.
        self.sharing: Sharing | None = None
        if config.shared_state is not None:
            self.sharing = Sharing(self)
        renew_in_child(self)
        watch_uwsgi()

    def __repr__(self) -> str:
        peers = ", ".join(
            f"{peer.name} {peer.breaker.current_state}" for peer in self.peers.values()
        )
        return f"<LoadBalancer {self.name!r}: {peers}>"

    # Connecting

    def connect(
        self,
        open_one: Callable[[Attempt], Any] | None = None,
        *,
        refusal_is_callers: bool | Callable[[], bool] = False,
        trials: str = "first",
        only: Peer | str | None = None,
    ) -> Any:
        """Return a connection to a peer that works.

        :param open_one: opens a connection as the :class:`Attempt` says and
            closes what it opened if it fails. Default: the ``connect`` that
            the balancer was made with. Where it takes connections out of pools
            it may raise :class:`~django_proxysql.core.exceptions.PoolBusy`.
        :param refusal_is_callers: a peer that refuses us does so because of
            what the caller asks for (another database): raise, count nothing.
            A function is asked when a peer has refused us.
        :param trials: ``"first"``: a peer whose trial is due goes before the
            others; ``"last"``: it is tried when nothing else is left;
            ``"never"``: only closed circuits are used.
        :param only: connect to this peer, or the one of this name, if its circuit is closed,
            or not at all.
        :raises NoPeerAvailable: no peer could be had within the deadline.
        :raises ConfigError: an argument is wrong, the balancer was made without ``connect``, or
            a strategy of one's own yields what is no peer.
        :raises Exception: the driver's own error, where it is not the peer's
            fault, or where every peer was attempted and refused us.
        """
        if trials not in _TRIALS:
            raise ConfigError("trials", f"is {trials!r}", f"Give one of {', '.join(_TRIALS)}.")
        if open_one is None:
            open_one = self._open_one
        elif not callable(open_one):
            function("open_one", open_one, "Give a function that takes an Attempt.")
        search = _Search(self, open_one, refusal_is_callers, trials)
        try:
            if only is not None:
                return search.connect_to(self.named(only, "only"))
            try:
                return search.first_attempt()
            except Exception as exc:
                if not search.goes_on(exc):
                    raise
            return self._carry_on(search)
        except NoPeerAvailable as exc:
            if only is not None:
                raise
            if self._waits and trials != "never" and search.is_over:
                return self._wait_for_peer(search, exc, open_one, refusal_is_callers, trials)
            search.tell_exhausted()
            raise
        except BaseException as exc:
            search.failed(exc)
            raise

    def _carry_on(self, search: _Search) -> Any:
        """Try the peers that are left. That is tenacity's work: it costs 35 µs a run, which a
        connect that succeeds at once need not pay."""
        try:
            return tenacity.Retrying(
                retry=tenacity.retry_if_exception(search.goes_on),
                # Candidates run out, the deadline passes: attempt() itself says so.
                stop=tenacity.stop_never,
                wait=tenacity.wait_none(),
                sleep=lambda seconds: None,
                reraise=True,
            )(search.attempt)
        except BaseException as exc:
            search.failed(exc)
            raise

    def _wait_for_peer(self, search: _Search, error: NoPeerAvailable, *how: Any) -> Any:
        """Look again, after a random and growing time, until a peer works or time is over.

        :param search: the first look.
        :param error: what it came to.
        :param how: what each search is made with.
        :raises NoPeerAvailable: what the last look came to.
        """
        until = self.clock() + self.config.wait_for_peer
        first: NoPeerAvailable | None = error

        def look() -> Any:
            nonlocal first, search
            if first is not None:
                error, first = first, None
                raise error
            open_one, refusal_is_callers, trials = how
            search = _Search(self, open_one or self._open_one, refusal_is_callers, trials)
            return self._carry_on(search)

        def pause(state: tenacity.RetryCallState) -> float:
            seconds = float((self._wait or _WAIT)(state))
            # The last look comes when the time is over.
            return seconds if self._stop else min(seconds, max(0.0, until - self.clock()))

        # Each request of a busy site may wait.
        kept_back = self._waiting_line.passes(self.clock())
        if kept_back is not None:
            logger.warning(
                "%s: waiting for a peer%s%s: %s",
                self.name,
                "" if self._stop else f", at most {self.config.wait_for_peer:g} s",
                f" (and {kept_back} more)" if kept_back else "",
                error,
                extra={"alias": self.name},
            )
        try:
            return tenacity.Retrying(
                retry=tenacity.retry_if_exception_type(NoPeerAvailable),
                stop=self._stop or (lambda state: self.clock() >= until),
                wait=pause,
                sleep=self._sleep,
                reraise=True,
            )(look)
        except NoPeerAvailable:
            search.tell_exhausted()
            raise

    def sqlalchemy_engine(self, url: Any, **options: Any) -> sqlalchemy.engine.Engine:
        """Return a SQLAlchemy engine whose connections lead to the peers.

        It takes SQLAlchemy 1.4 or 2. What its dialect passes to the driver is kept, and a
        peer's arguments are laid over it. :class:`NoPeerAvailable` comes as SQLAlchemy's
        ``OperationalError``, whose ``orig`` it is.

        :param url: names the dialect and the driver, which is that of the balancer's
            ``connect``; what else it says holds for all peers.
        :param options: what ``sqlalchemy.create_engine`` takes, but for ``creator`` and ``pool``.
        :raises ConfigError: one of these two was given, or a driver for asyncio.
        """
        return sqlalchemy_engine(self, url, **options)

    @property
    def connect_function(self) -> Callable[..., Any] | None:
        """The driver's ``connect`` that the balancer was made with."""
        return self._connect

    def _open_one(self, attempt: Attempt) -> Any:
        if self._connect is None:
            raise ConfigError("connect", "was not given", "Pass the driver's connect function.")
        return self.open_with(self._connect, attempt, attempt.peer.params)

    def open_with(
        self, connect: Callable[..., Any], attempt: Attempt, params: Mapping[str, Any]
    ) -> Any:
        """Open and check a connection as ``attempt`` says, and count it for its peer.

        :param connect: a driver's connect function.
        :param attempt: what the connection is for.
        :param params: what to call it with; a callable password is called.
        :raises Exception: what connecting, or READY_CHECK, raised; nothing stays open.
        """
        driver = drivers.driver_of(connect)
        params = drivers.with_password(params)
        asked = attempt.is_trial and self.send_ahead(attempt, driver, connect, params)
        params.update(driver.connect_options(params, attempt.timeout))
        connection = connect(**params)
        try:
            self.check_ready(connection, attempt, asked=asked)
            _count_while_alive(connection, attempt.peer)
        except BaseException:
            # The traceback would keep the socket open for as long as it lives.
            connection.close()
            raise
        return connection

    # Trials

    def next_trial(self, peer: Peer | str) -> float | None:
        """Return when the peer's next trial may begin, on :attr:`clock`.

        :param peer: one of :attr:`peers`, or its name.
        :returns: None while it needs none; minus infinity if it needs one at once.
        :raises UnknownPeer: it is none of this balancer's.
        """
        peer = self.named(peer)
        circuit = peer.breaker.circuit
        if circuit.state == CLOSED:
            return circuit.due if circuit.suspect else None
        interval = self._hurried()
        return circuit.due if interval is None else min(circuit.due, circuit.tried + interval)

    def try_out(self, peer: Peer | str, *, now: bool = False) -> bool:
        """Make the peer's trial if it is due, and keep no connection.

        For the thread in the background, and for operators.

        :param peer: one of :attr:`peers`, or its name.
        :param now: make it also if it is not due yet, unless one is under way, here or, as far
            as Redis says within a second, in another process that shares the circuit.
        :returns: whether one was made, and succeeded.
        :raises UnknownPeer: it is none of this balancer's.
        :raises BaseException: what was raised and says nothing about the peer.
        """
        peer = self.named(peer)
        permit = peer.breaker.acquire(last_resort=self._hurried(), by_hand=now)
        if permit is None:
            return False
        if not permit.is_trial:
            # It has recovered just now.
            permit.released()
            return True
        search = _Search(self, self._open_and_close, self.asks_for_another, "never")
        try:
            search.try_out(peer, permit)
        except Exception as exc:
            if search.is_of_the_peer(exc):
                return False
            search.failed(exc)
            raise
        finally:
            # As long as the two hold each other, so does the failed attempt's socket.
            search.forget()
        return True

    def _open_and_close(self, attempt: Attempt) -> None:
        if self.open_and_close is not None:
            self.open_and_close(attempt)
            return
        connection = self._open_one(attempt)
        with contextlib.suppress(Exception):
            connection.close()

    def _turn(self, peer: Peer) -> float:
        """Return when a caller of connect() makes the peer's trial, others or not."""
        circuit = peer.breaker.circuit
        interval = peer.breaker.reset_timeout
        due = circuit.due
        if circuit.suspect:
            # One that nobody has had to fall back on is tried in its turn: it
            # may have been well all the time, and new connections pass it by.
            hurried = self.config.last_resort_interval
            due = circuit.tried + (interval if hurried is None else hurried)
        # The thread makes it, unless that does not get to run.
        return due + 2 * interval if self._in_background else due

    def _hurried(self) -> float | None:
        """Return the seconds between trials of a peer while nobody can be had; else None."""
        view = self.view()
        return None if view.tiers or view.suspects else self.config.last_resort_interval

    def _tend(self, news: bool = True) -> None:
        if self._in_background:
            trial_worker.schedule(self, news=news)

    def send_ahead(
        self,
        attempt: Attempt,
        driver: drivers.Driver,
        connect: Callable[..., Any],
        params: Mapping[str, Any],
    ) -> bool:
        """Make a trial on a throw-away connection, which is bounded, and ask what is to be asked.

        The caller's connection must have none, for its statements may take their
        time: a peer that freezes after the handshake would hold it for ever, and a
        proxy without servers for as long as that waits for one.

        :param attempt: a trial.
        :param driver: the driver's.
        :param connect: the driver's ``connect``.
        :param params: what the caller's connection is made with.
        :returns: whether it was made. Not where there is nothing to ask, with drivers whose
            ``connect_timeout`` bounds all of a connect.
        :raises NotReady: the peer must not be used.
        :raises Exception: the driver's own error.
        """
        # A check of the user's own is made for the caller's connection.
        checks = self._ready_check in (galera, writable)
        asks = driver.WATCHED and (checks or attempt.peer.breaker.circuit.question)
        if not asks and not driver.trial_options(params, attempt.timeout):
            return False
        with throw_away(driver, connect, params, attempt.timeout) as connection:
            if checks:
                self._check(connection, attempt.peer)
            self._ask_unless_last(connection, attempt.peer)
        return True

    def check_ready(self, connection: Any, attempt: Attempt, *, asked: bool = False) -> None:
        """Run READY_CHECK on a driver's connection, and what a trial must ask besides.

        :param connection: the driver's own, just made.
        :param attempt: what it was made for.
        :param asked: a throw-away connection has been asked already.
        :raises NotReady: the peer must not be used.
        """
        self._check(connection, attempt.peer)
        if attempt.is_trial and not asked:
            self._ask_unless_last(connection, attempt.peer)

    def ask(self, connection: Any, peer: Peer) -> None:
        """Ask what the peer was taken out for: a statement's error, if it was one.

        Such a peer connects as well as ever. Each trial would put it back into use.

        :param connection: a driver's own to the peer.
        :param peer: one of :attr:`peers`.
        :raises NotReady: it is as it was.
        """
        question = QUESTIONS.get(peer.breaker.circuit.question)
        if question is not None:
            question(connection)

    def _check(self, connection: Any, peer: Peer) -> None:
        if self._ready_check is not None:
            answer = self._ready_check(connection)
            if isinstance(answer, Writer):
                peer.note_server(answer.is_server)

    def _ask_unless_last(self, connection: Any, peer: Peer) -> None:
        try:
            self.ask(connection, peer)
        except Unanswered:
            # A proxy that may only be busy is better than none.
            if self.can_spare(peer):
                raise

    @property
    def needs_writer(self) -> bool:
        """Whether READY_CHECK asks that a peer takes writes."""
        return self._ready_check is writable

    def can_spare(self, peer: Peer) -> bool:
        """Return whether another peer's circuit is closed, and that peer is not drained.

        :param peer: one of :attr:`peers`.
        """
        return any(
            other.breaker.circuit.state == CLOSED and not other.drained
            for other in self.peers.values()
            if other is not peer
        )

    def count_unanswered(self, peer: Peer, exc: BaseException, since: float = -math.inf) -> bool:
        """Count a question that no server behind a proxy has answered; at ``fail_max`` the
        circuit opens, unless it is the last.

        A proxy says the same whether its servers are gone or all connections to
        them are in use. One that is busy is never given up for none.

        :param peer: one of :attr:`peers`.
        :param exc: what it said.
        :param since: when the statement was begun, on :attr:`clock`. If another was answered
            that was begun later, the servers are there.
        :returns: whether its circuit is open now.
        """
        if peer.has_served(since):
            peer.unanswered = 0
            return False
        # Of two threads that give up the last two peers one does not.
        with self._drains_lock:
            if not self.can_spare(peer):
                return peer.breaker.circuit.state != CLOSED
            peer.unanswered += 1
            if peer.unanswered < peer.breaker.fail_max:
                return False
            has_tripped = peer.breaker.trip_silently(
                exc, Fault.NOT_READY, "backend", peer.unanswered
            )
        peer.breaker.tell(has_tripped)
        return True

    # Knowing

    def snapshot(self) -> list[PeerState]:
        """Return what this process knows of each peer, without asking any.

        :returns: a :class:`PeerState` for each, in the order of :attr:`peers`.
        """
        now = self.clock()
        states = []
        for peer in self.peers.values():
            circuit = peer.breaker.circuit
            out = circuit.state != CLOSED
            states.append(
                PeerState(
                    name=peer.name,
                    address=peer.address,
                    state=circuit.state,
                    suspect=circuit.suspect,
                    trial_in=self._trial_in(peer, circuit, now),
                    out_for=now - circuit.out_since
                    if out and circuit.out_since is not None
                    else None,
                    failures=circuit.failures,
                    error=circuit.error,
                    fault=circuit.fault,
                    connections=peer.connections,
                    weight=peer.weight,
                    priority=peer.priority,
                    drained=peer.drained,
                    drain_refused=peer.drain_refused,
                )
            )
        return states

    def _trial_in(self, peer: Peer, circuit: Circuit, now: float) -> float | None:
        """Return :attr:`PeerState.trial_in` of a peer whose circuit is ``circuit``."""
        if circuit.state == CLOSED or peer.drained:
            return None
        if trial_of(circuit, now) is not None:
            return 0.0
        due, view = circuit.due, self.view()
        if not view.tiers and not view.suspects:
            interval = self.config.last_resort_interval
            if interval is not None:
                due = min(due, circuit.tried + interval)
            elif circuit.tried == -math.inf:
                # Another process opened it. The next connect() here tries it at once.
                due = now
        return max(0.0, due - now)

    def add_listener(self, listener: Listener, *, connects: bool = True) -> None:
        """Call ``listener`` with every event from now on, outside all locks.

        Adding it again changes nothing.

        :param listener: called in the thread to which the thing happened. Of what other
            processes have found, of what a trial in the background has shown, and of
            what happens while one of these waits to be told, in a thread of its own.
        :param connects: False spares it each :class:`~django_proxysql.core.events.Connected`
            that is no trial, and each connect the cost of telling it.
        :raises ConfigError: ``listener`` cannot be called.
        """
        function("listener", listener, "Give a function that takes an event.")
        dispatcher = Dispatcher(listener, self.name)
        with self._listeners_lock:
            if any(known.listener == listener for known in self._dispatchers):
                return
            self._dispatchers = (*self._dispatchers, dispatcher)
            if connects:
                self._hear_connects = (*self._hear_connects, dispatcher)

    def remove_listener(self, listener: Listener) -> None:
        """Call ``listener`` no longer."""
        with self._listeners_lock:
            self._dispatchers = _without(self._dispatchers, listener)
            self._hear_connects = _without(self._hear_connects, listener)

    def emit(self, event: Event) -> None:
        """Tell the listeners of ``event``. One that raises or hangs harms no circuit."""
        dispatchers = self._dispatchers
        if type(event) is Connected and not event.trial:
            dispatchers = (self._log, *self._hear_connects)
        # One that hangs is to end neither the trials nor the sharing.
        elsewhere = must_not_wait()
        for dispatcher in dispatchers:
            if dispatcher.is_free and not elsewhere:
                try:
                    dispatcher.listener(event)
                except Exception:
                    dispatcher.complain_of_listener()
            else:
                dispatcher.put(event)
                dispatcher.notify()

    def _put(self, event: Event) -> None:
        """Have the listeners told of a change, in its place: call it in the change's lock."""
        for dispatcher in self._dispatchers:
            dispatcher.put(event)

    def _tell_changes(self) -> None:
        """Tell the listeners of the changes that were put, by any thread. Needs no lock."""
        dispatchers = self._dispatchers
        try:
            for dispatcher in dispatchers:
                dispatcher.notify()
        except BaseException:
            for dispatcher in dispatchers:
                if dispatcher.waiting:
                    dispatcher.start()
            raise

    # Draining

    def drain(self, name: str | Peer, *, force: bool = False) -> None:
        """Give a peer no new connections; those it has leave at their safe points.

        For an upgrade of its server, say. In this process only, unless the
        balancer shares its state: then in all that share it, at once here and
        within a second there, and in those that start later.
        :meth:`Sharing.settle <django_proxysql.core.sharing.Sharing.settle>` says
        whether they have been told. What its circuit knows stays known.
        Draining a drained peer changes nothing.

        :param name: the peer's, as in :attr:`peers`, or the peer.
        :param force: drain it even if no other takes connections.
        :raises UnknownPeer: a KeyError: the balancer has no such peer.
        :raises DrainRefused: no other peer takes connections: its circuit is
            open, or it is drained itself, or another process drains it just now.
        """
        peer = self.named(name, "name")
        name = peer.name
        if self.sharing is not None:
            # A process that has just begun is to know what the others do.
            self.sharing.settle()
        # Of two threads that drain the last two peers one is refused.
        with self._drains_lock:
            others = [other for other in self.peers.values() if other is not peer]
            if not (force or peer.drained or any(other.is_available for other in others)):
                raise DrainRefused(
                    f"{name!r} is the last peer of {self.name!r} that takes connections: none "
                    "could be made after it is drained."
                )
            changed = self._set_drained(peer, True, learnt=False)
        if self._wish_drained(peer, True, changed, force):
            raise DrainRefused(
                f"{name!r} is the last peer of {self.name!r} that takes connections: another "
                "process has drained the others just now."
            )

    def undrain(self, name: str | Peer) -> None:
        """Let a peer have new connections again.

        :param name: the peer's, as in :attr:`peers`, or the peer.
        :raises UnknownPeer: a KeyError: the balancer has no such peer.
        """
        peer = self.named(name, "name")
        with self._drains_lock:
            changed = self._set_drained(peer, False, learnt=False)
        self._wish_drained(peer, False, changed)

    def _wish_drained(self, peer: Peer, drained: bool, changed: bool, force: bool = False) -> bool:
        """Tell of what an operator wishes; return whether it was refused, and taken back."""
        self._drain_changed(peer, drained, changed)
        if self.sharing is None:
            return False
        wish = self.sharing.wish(peer, drained, forced=force)
        # A command's process may end right after this.
        self.sharing.settle()
        return wish.was_refused

    def learn_drained(
        self, peer: Peer, drained: bool, *, learnt: bool, forced: bool = False
    ) -> bool:
        """Take over what another process, or this one, has wished for.

        Another process never drains the last peer that is not drained here: this process may have
        fewer peers than that one. The peer is drained as soon as another is not.

        :param peer: one of :attr:`peers`.
        :param drained: whether it is to get no new connections.
        :param learnt: it was another.
        :param forced: an operator wishes it, though it leaves no peer.
        :returns: whether that is refused from now on.
        """
        with self._drains_lock:
            others = [other for other in self.undrained() if other is not peer]
            refused = drained and learnt and not (peer.drained or forced or others)
            was_refused = peer.drain_refused
            changed = not refused and self._set_drained(peer, drained, learnt=learnt)
            peer.drain_refused = refused
        self._drain_changed(peer, drained, changed)
        return refused and not was_refused

    def _set_drained(self, peer: Peer, drained: bool, *, learnt: bool) -> bool:
        """Drain or undrain a peer, within the drains' lock; return whether that is a change."""
        peer.drain_refused = False
        if peer.drained is drained:
            return False
        peer.drained = drained
        where = (self.name, peer.name, peer.address)
        self._put(
            PeerDrained(*where, peer.connections, learnt)
            if drained
            else PeerUndrained(*where, learnt)
        )
        return True

    def _drain_changed(self, peer: Peer, drained: bool, changed: bool) -> None:
        # Even if nothing has changed: who did it before may have been killed
        # on the way from one line to the other.
        self.look_anew()
        self._tend()
        if changed and not drained:
            self.rebalance.begin(peer)
            self._drain_refused()
        self._tell_changes()

    def _drain_refused(self) -> None:
        """Drain what others have drained, where it is not the last peer any more."""
        for peer in self.peers.values():
            if peer.drain_refused:
                self.learn_drained(peer, True, learnt=True)

    # Staying with one peer

    @contextlib.contextmanager
    def pinned(self, peer: Peer | str | None = None) -> Iterator[None]:
        """Stay with one peer for the block, whichever is connected to first.

        It holds for the thread, greenlet or asyncio task that enters the block,
        and for what it runs by way of ``sync_to_async()``.

        For what must not be spread: migrations, test databases, reading one's
        own writes where peers lag. If the peer is lost inside the block,
        connecting fails rather than going elsewhere. Inside another such block
        it changes nothing.

        :param peer: the peer to stay with, such as ``connection.peer``, or its name.
        :raises UnknownPeer: it is none of this balancer's.
        :raises NoPeerAvailable: out of whatever connects in the block, when the
            peer cannot be had.
        """
        known = None if peer is None else self.named(peer)
        if self._pin is not None:
            yield
            return
        pin = _Pin(known)
        try:
            self._pins.set(pin)
            # Connections that are there already are to see that something is new.
            self.look_anew()
            yield
        finally:
            # Tasks that were begun in the block have a copy of their own.
            pin._over = True
            self._pins.set(None)

    @property
    def _pin(self) -> _Pin | None:
        pin = self._pins.get()
        return None if pin is None or pin._over else pin

    def pinned_to(self, peer: Peer) -> Peer | None:
        """Return the peer that the caller is to stay with, if there is one.

        :param peer: where it has a connection. Used inside :meth:`pinned`, that
            decides where to stay, if nothing has before.
        """
        pin = self._pin
        if pin is None:
            return None
        if pin.peer is None and peer.is_available:
            pin.peer = peer
        return pin.peer

    def claim_move(self, peer: Peer) -> Move | None:
        """Return where a kept connection is to move between two units of work, if it is.

        :param peer: where it leads to.
        """
        view = self.view()
        tier = view.tiers[0] if view.tiers else ()
        return self.rebalance.claim(peer, self.peers.values(), tier)

    def has_usable(self) -> bool:
        """Return whether any circuit is closed, and its peer no suspect."""
        return bool(self.view().tiers)

    def named(self, peer: Peer | str, argument: str = "peer") -> Peer:
        """Return one of this balancer's peers.

        :param peer: the peer, or its name.
        :param argument: what the caller calls it, for the error.
        :raises UnknownPeer: it is none of this balancer's.
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

    # What the search asks

    def undrained(self) -> list[Peer]:
        """Return the peers that may be connected to, whatever their circuits say."""
        return [peer for peer in self.peers.values() if not peer.drained]

    def view(self) -> _View:
        """Return the peers sorted by what their circuits say; cached until one changes."""
        view = self._view
        if view is None or view.version is not self.version or view.is_behind():
            # Read the version first: a circuit that changes while we look
            # leaves a new one behind, and this view is then built again.
            version = self.version
            if self.sharing is not None:
                # The first connect comes by here, and the first one of a forked child.
                self.sharing.start()
            view = self._view = _View.of(self, version)
        return view

    def look_anew(self) -> None:
        """Have the next :meth:`view` built from the circuits as they are then."""
        # A fresh object rather than a counter: assigning it is atomic.
        self.version = object()

    def _note_change(self, name: str, change: Transition) -> None:
        """Note that a circuit has changed. Within its lock: waits for nothing, calls nobody."""
        self.look_anew()
        self._changes.append((name, change))
        peer = self.peers[name]
        if change.before != change.after and change.after != HALF_OPEN:
            peer.forget_answers()
        if change.before == CLOSED and change.after != CLOSED:
            self._put(
                CircuitOpened(
                    self.name,
                    name,
                    peer.address,
                    change.fault,
                    change.error,
                    self._first_trial_in(peer, change),
                    change.learnt,
                )
            )
        elif change.after == CLOSED and change.before != CLOSED:
            self._put(CircuitClosed(self.name, name, peer.address, change.seconds, change.learnt))

    def _first_trial_in(self, peer: Peer, opened: Transition) -> float | None:
        """Return the seconds until the first trial of a peer whose circuit opens just now."""
        if peer.drained:
            return None
        if any(other.breaker.circuit.state == CLOSED for other in self.undrained()):
            return opened.seconds
        # With no other peer left the trial comes sooner than the breaker alone can tell; and
        # what another process found was not tried here.
        interval = 0.0 if opened.learnt else self.config.last_resort_interval
        return opened.seconds if interval is None else min(opened.seconds, interval)

    def _circuits_changed(self) -> None:
        """Do what the noted changes demand, by any thread. Needs no lock."""
        while self._changes:
            try:
                name, change = self._changes.popleft()
            except IndexError:
                break
            self._tend()
            told = change.learnt or change.after == HALF_OPEN
            if self.sharing is not None and not told:
                self.sharing.has_news()
            if change.after == CLOSED and change.before != CLOSED:
                self.rebalance.begin(self.peers[name])
        self._tell_changes()

    def after_fork(self) -> None:
        """In the child: no connections, and locks that nobody holds."""
        # The circuits see to themselves.
        self._listeners_lock = new_lock()
        self._drains_lock = new_lock()
        self._changes.clear()
        for peer in self.peers.values():
            peer.forget_connections()
        self.budget.after_fork()
        self.losses.after_fork()
        self.rebalance.after_fork()
        self.look_anew()


class _Pin:
    """Where a block stays; the peer is known once it has connected."""

    def __init__(self, peer: Peer | None) -> None:
        self.peer = peer
        self._over = False


class _View(NamedTuple):
    """The peers by what can be done with them, the drained left out; immutable."""

    version: object
    #: Closed circuits, tier by tier, best tier first.
    tiers: tuple[tuple[Peer, ...], ...]
    suspects: tuple[Peer, ...]
    out: tuple[Peer, ...]
    #: Until when it goes without saying that no trial comes before the use of the first tier.
    turn: float

    @classmethod
    def of(cls, balancer: LoadBalancer, version: object) -> _View:
        tiers: dict[int, list[Peer]] = {}
        suspects = []
        out = []
        for peer in balancer.peers.values():
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
            # A thread's trials are never due sooner without a word; others may be.
            min((balancer._turn(peer) for peer in out + suspects), default=math.inf)
            if balancer._in_background or not (out or suspects)
            else -math.inf,
        )

    def is_behind(self) -> bool:
        """Return whether a peer is to be had that the view has for out or suspect.

        Whoever changes a circuit has the view renewed, unless it is killed on the
        way. The other peers are found out when they are chosen; these might
        never be.
        """
        for peer in self.out:
            if peer.breaker.circuit.state == CLOSED:
                return True
        return any(not peer.breaker.circuit.suspect for peer in self.suspects)


#: What follows where our own pool has no connection to spare.
_BUSY = Verdict(True, Count.NO, Fault.OVERLOADED)


class _Undecided(NamedTuple):
    """A failed attempt that another peer's success makes the peer's fault."""

    peer: Peer
    permit: Permit
    exc: BaseException
    seconds: float


class _Search:
    """One connect(): which peers were attempted, and what is left."""

    # Most of it is asked for only after a failure: a default in the class costs
    # a connect that succeeds at once nothing.
    _candidates: Iterator[tuple[Peer, Permit]] | None = None
    #: What a strategy yields for a tier, and has not been asked for yet.
    _order: tuple[tuple[Peer, ...], Iterator[Peer]] | None = None
    _faults: Mapping[str, Fault] = MappingProxyType({})
    _errors: Mapping[str, str] = MappingProxyType({})
    #: Whose pool had no connection to spare: asked again after all others.
    _busy: frozenset[str] = frozenset()
    _last_error: BaseException | None = None
    #: What a proxy said that may be busy, and no more than that.
    _plain_error: BaseException | None = None
    #: No candidate is left, or no time.
    is_over = False
    #: What is to be told of that.
    _exhaustion: PeersExhausted | None = None
    _verdict = Verdict(False, Count.NO, Fault.OTHER)
    #: Where the last error was met.
    _peer_of_last: Peer | None = None
    #: Failed attempts that count if another peer lets us in.
    _undecided: tuple[_Undecided, ...] = ()
    #: Peers that refuse us, or that the driver cannot be asked to connect to.
    _refused: frozenset[str] = frozenset()
    #: The one peer that it may connect to: it is pinned, or was asked for that one.
    _pinned: Peer | None = None

    def __init__(
        self,
        balancer: LoadBalancer,
        open_one: Callable[[Attempt], Any],
        refusal_is_callers: bool | Callable[[], bool],
        trials: str,
    ) -> None:
        self._balancer = balancer
        self._trials = trials
        self._pin = balancer._pin
        self._open_one = open_one
        self._refusal_is_callers = refusal_is_callers
        self._clock = clock = balancer.clock
        self._started = started = clock()
        self._deadline = started + balancer.config.connect_deadline

    def first_attempt(self) -> Any:
        """Connect to the first candidate.

        Where all is well that is the strategy's first choice: nearly every
        connect ends here, and is spared the layers of generators.

        :raises NoPeerAvailable: there is none, or no time.
        """
        balancer = self._balancer
        view = balancer._view
        if view is None or view.out or view.suspects or view.version is not balancer.version:
            view = balancer.view()
            if view.out or view.suspects:
                balancer._tend(news=False)
        if view.tiers and self._pin is None and self._started < view.turn:
            tier = view.tiers[0]
            peer = tier[0]
            if len(tier) > 1:
                order = iterated(balancer._strategy.order(tier))
                self._order = (tier, order)
                peer = next(order, peer)
                if type(peer) is not Peer or balancer.peers.get(peer.name) is not peer:
                    peer = self._known(peer)
            permit = peer.breaker.acquire(trial=False)
            if permit is not None:
                return self._attempt(peer, permit, self._started)
            # The view is older than the circuit.
            balancer.look_anew()
        return self.attempt()

    def connect_to(self, peer: Peer) -> Any:
        """Connect to this peer, and to no other.

        :raises NoPeerAvailable: its circuit is not closed.
        """
        self._pinned = peer
        permit = None if peer.drained else peer.breaker.acquire(trial=False)
        if permit is None:
            raise self._nobody()
        return self._attempt(peer, permit, self._started)

    def attempt(self) -> Any:
        """Connect to the next candidate.

        :raises NoPeerAvailable: there is none, or no time.
        """
        if self._candidates is None:
            self._pinned = self._pin.peer if self._pin is not None else None
            self._candidates = self._in_order(self._pinned)
        chosen = None
        try:
            if self._clock() < self._deadline:
                chosen = next(self._candidates, None)
            if chosen is None:
                raise self._exhausted()
            return self._attempt(*chosen, self._clock())
        finally:
            # tenacity keeps the exception, and with it the frames, until the garbage collector
            # comes by: however this is broken off, the trial is over.
            if chosen is not None and chosen[1]._lease is not None:
                chosen[1]._lease.ended = True

    def _attempt(self, peer: Peer, permit: Permit, started: float) -> Any:
        balancer = self._balancer
        is_trial, lease = permit.is_trial, permit._lease
        serial = next(_serials)
        try:
            timeout = balancer.config.connect_timeout
            if is_trial and balancer.config.trial_timeout is not None:
                timeout = balancer.config.trial_timeout
            remaining = self._deadline - started
            attempt = Attempt(
                peer,
                timeout if timeout < remaining else remaining,
                is_trial,
                is_trial or peer.name in self._busy,
                permit,
            )
            try:
                peer._connecting[serial] = weakref.ref(self)
                connection = self._open_one(attempt)
            except BaseException as exc:
                self._failed(peer, permit, exc, self._clock() - started)
                raise
            finally:
                peer._connecting.pop(serial, None)
            # It and its traceback's frames, this search among them, hold each other.
            self._last_error = self._plain_error = None
            permit.succeeded()
        finally:
            # Once more, and without a call: an asynchronous exception may have struck above, or
            # the recursion limit. The connect is counted no longer, and the trial is over.
            if serial in peer._connecting:
                del peer._connecting[serial]
            if lease is not None:
                lease.ended = True
        if self._undecided:
            self._decide(alone=True)
        if self._pin is not None and self._pin.peer is None:
            self._pin.peer = peer
        # Each connect comes by here: see first that somebody would hear of it.
        if balancer._hear_connects or is_trial or logger.isEnabledFor(logging.DEBUG):
            balancer.emit(
                Connected(balancer.name, peer.name, peer.address, self._clock() - started, is_trial)
            )
        return connection

    def try_out(self, peer: Peer, permit: Permit) -> None:
        """Use ``permit`` for one attempt, and no other after it."""
        self._attempt(peer, permit, self._started)

    def forget(self) -> None:
        """Let go of the last error."""
        self._last_error = self._plain_error = None

    def is_of_the_peer(self, exc: BaseException) -> bool:
        """Return whether ``exc``, which an attempt raised, says something about the peer."""
        return exc is self._last_error and self._verdict.goes_on

    def goes_on(self, exc: BaseException) -> bool:
        """Return whether the next candidate may do what this one could not."""
        # Anything but the last attempt's own error is no peer's: Ctrl-C while
        # waiting for a trial, a strategy that raises.
        return exc is self._last_error and not self.is_over and self._verdict.goes_on

    def failed(self, exc: BaseException) -> None:
        """Take note of what the whole search raises: name the peer, where that names none."""
        self._decide(alone=False)
        peer, verdict = self._peer_of_last, self._verdict
        if exc is not self._last_error or peer is None:
            return
        if verdict.counts is Count.IF_ALONE or verdict.fault is not Fault.REFUSED:
            drivers.name_peer(exc, f"to {self._said_of(peer)} of {self._balancer.name!r}")

    def _is_callers(self) -> bool:
        callers = self._refusal_is_callers
        return callers() if callable(callers) else callers

    def _failed(self, peer: Peer, permit: Permit, exc: BaseException, seconds: float) -> None:
        self._peer_of_last = peer
        if isinstance(exc, PoolBusy) and not (permit.is_trial or peer.name in self._busy):
            # It was not asked, and nothing has failed: it stays among the candidates.
            permit.released()
            self._busy |= {peer.name}
            self._errors = {**self._errors, peer.name: drivers.describe(exc)}
            self._last_error, self._verdict = exc, _BUSY
            return
        fault = drivers.judge(exc, connecting=True)
        refused = fault in (Fault.REFUSED, Fault.OTHER)
        verdict = self._verdict = verdict_on(
            fault,
            by_server=refused and drivers.is_by_server(exc),
            of_settings=not fault.tries_next and drivers.is_of_settings(exc),
            is_callers=refused and self._is_callers(),
            is_trial=permit.is_trial,
        )
        self._faults = {**self._faults, peer.name: verdict.fault}
        self._errors = {**self._errors, peer.name: drivers.describe(exc)}
        self._last_error = exc
        if drivers.may_be_busy(exc):
            self._plain_error = exc
        if verdict.fault in (Fault.REFUSED, Fault.LOCAL):
            self._refused |= {peer.name}
        attempt = _Undecided(peer, permit, exc, seconds)
        if verdict.counts is Count.IF_ALONE:
            self._undecided = (*self._undecided, attempt)
        else:
            self._report(attempt, counts=verdict.counts is Count.NOW)

    def _decide(self, alone: bool) -> None:
        """Count the attempts that were undecided, if another peer has let us in."""
        undecided, self._undecided = self._undecided, ()
        for attempt in undecided:
            self._report(attempt, counts=alone)

    def _report(self, attempt: _Undecided, counts: bool) -> None:
        """End a failed attempt's permit, and tell of the failure."""
        peer, permit, exc, seconds = attempt
        fault = self._faults[peer.name]
        count = 0
        balancer = self._balancer
        # A trial that fails leaves an open circuit as it is.
        was_closed = peer.breaker.circuit.state == CLOSED
        if counts and was_closed and is_unanswered(exc):
            # It let us in: each good connect would reset the circuit's own count.
            permit.released()
            if balancer.count_unanswered(peer, exc, self._clock() - seconds):
                count = peer.breaker.circuit.failures
        elif counts:
            count = permit.failed(exc, fault)
        else:
            permit.released()
        balancer.emit(
            ConnectFailed(
                balancer.name,
                peer.name,
                peer.address,
                seconds,
                permit.is_trial,
                fault,
                self._errors[peer.name],
                count,
                opened=was_closed
                and count > 0
                and (permit.is_trial or count >= peer.breaker.fail_max),
            )
        )

    # Whom to try

    def _in_order(self, pinned: Peer | None) -> Iterator[tuple[Peer, Permit]]:
        """Yield each peer that can be had, once, with the permit to try it.

        :param pinned: the one peer to try, also if it is drained; None: all.
        """
        # Whatever befalls a peer that the thread stays with: no other is looked at.
        # One that is drained, too: the block comes to its end first.
        balancer = self._balancer
        disappointed: set[str] = set()
        while True:
            peers = balancer.undrained() if pinned is None else [pinned]
            before = {peer.name: _seen(peer) for peer in peers}
            if pinned is None:
                yield from self._once_over()
                if self._trials == "never":
                    return
            elif pinned.name not in self._faults:
                yield from self._permitted(pinned, out=None, last_resort=0)
            peers = balancer.undrained() if pinned is None else [pinned]
            if not self._await_a_trial(peers, before, disappointed):
                return
            if self._clock() >= self._deadline:
                return

    def _once_over(self) -> Iterator[tuple[Peer, Permit]]:
        balancer = self._balancer
        view = balancer.view()
        if view.out or view.suspects:
            balancer._tend(news=False)
            if self._trials == "first":
                for peer in self._due(view):
                    yield from self._permitted(peer, out=True)
        for tier in view.tiers:
            for peer in self._ordered(tier):
                yield from self._permitted(peer)
        if self._trials == "never":
            return
        for peer in view.suspects:
            yield from self._permitted(peer, out=True)
        # Everything that was in use has now been tried. Look anew: with no
        # circuit closed, peers may be tried before their interval is over.
        view = balancer.view()
        nobody = not view.tiers and not view.suspects
        interval = balancer.config.last_resort_interval if nobody else None
        for peer in view.out:
            if nobody and interval is None and peer.breaker.circuit.tried == -math.inf:
                # That it is out is what the others say: nothing was tried here.
                yield from self._permitted(peer, out=True, last_resort=0)
            else:
                yield from self._permitted(peer, out=True, last_resort=interval)
        for tier in view.tiers:
            for peer in tier:
                yield from self._permitted(peer)
        for peer in view.suspects:
            yield from self._permitted(peer, out=True)

    def _due(self, view: _View) -> Iterator[Peer]:
        """Yield the peers whose trial goes before the use of others."""
        balancer = self._balancer
        # Peers of a worse tier than those in use are left alone: a trial
        # that succeeds would send them a connection they are not to have.
        best = view.tiers[0][0].priority if view.tiers else math.inf
        now = self._clock()
        for peer in view.out + view.suspects:
            if balancer._turn(peer) <= now and peer.priority <= best:
                yield peer

    def _ordered(self, tier: tuple[Peer, ...]) -> Iterator[Peer]:
        if len(tier) > 1:
            begun, self._order = self._order, None
            if begun is not None and begun[0] is tier:
                order = begun[1]
            else:
                order = iterated(self._balancer._strategy.order(tier))
            for peer in order:
                yield self._known(peer)
        # What a strategy leaves out is still a peer; each is tried once. A busy
        # one has been: its turn comes again when nothing else is left.
        for peer in tier:
            if peer.name not in self._busy:
                yield peer

    def _known(self, peer: Peer) -> Peer:
        balancer = self._balancer
        if balancer.peers.get(getattr(peer, "name", "")) is not peer:
            raise ConfigError(
                "STRATEGY",
                f"named {peer!r}, which is no peer of {balancer.name!r}",
                "Yield the peers that order() was given.",
            )
        return peer

    def _permitted(
        self, peer: Peer, *, out: bool | None = False, last_resort: float | None = None
    ) -> Iterator[tuple[Peer, Permit]]:
        """Yield the peer and the permit to try it, if it can be had.

        :param out: whether the view has the peer for out or suspect; None: no view was looked at.
        """
        if peer.name in self._faults:
            return
        # This search and its generators hold each other, and an exception's traceback holds its
        # frames. A permit is to go at once when nobody uses it any more: none is kept here.
        permits: list[Permit | None] = []
        try:
            # A peer that has become suspect since we looked comes last all the same.
            permits.append(peer.breaker.acquire(last_resort=last_resort, trial=out is not False))
            if out is not None and out is not (permits[0] is None or permits[0].is_trial):
                # The view is older than the circuit. It is renewed by whoever
                # changes a circuit, unless that thread was killed on the way.
                self._balancer.look_anew()
            if permits[0] is not None:
                yield peer, permits.pop()  # type: ignore[misc]
        finally:
            permits.clear()

    def _await_a_trial(
        self,
        peers: Sequence[Peer],
        before: Mapping[str, tuple[Circuit, Lease | None]],
        disappointed: set[str],
    ) -> bool:
        """Wait for the result of somebody else's trial of one of ``peers``, within the deadline.

        :param before: by the peer's name, what there was before the look at the peers.
        :returns: whether there was one, so that another look is worth it. A
            peer whose trial failed is not waited for a second time.
        """
        leases: dict[str, Lease] = {}
        for peer in peers:
            if peer.name in self._faults or peer.name in disappointed:
                continue
            circuit, lease = now = _seen(peer)
            if lease is not None:
                leases[peer.name] = lease
            elif peer.breaker.is_available or (
                circuit.state != OPEN and now != before.get(peer.name)
            ):
                # The trial ended between our look at the peers and now. Where nothing has
                # changed, another look would find nothing else.
                return True
        if not leases:
            return False
        until = min(self._deadline, *(lease.expires for lease in leases.values()))
        # Whichever ends first: one peer's trial may hang while another's is over.
        Lease.wait_for_any(list(leases.values()), until - self._clock())
        for name, lease in leases.items():
            circuit = self._balancer.peers[name].breaker.circuit
            if lease.ended and circuit.state == OPEN:
                disappointed.add(name)
        return True

    # Nobody left

    def _exhausted(self) -> BaseException:
        self.is_over = True
        self._decide(alone=False)
        balancer = self._balancer
        candidates = balancer.undrained() if self._pinned is None else [self._pinned]
        if self._last_error is not None and len(self._refused) == len(candidates):
            return self._last_error
        if self._plain_error is not None and not balancer._waits:
            # The proxy is there: its error is the application's.
            return self._plain_error
        error = self._nobody()
        error.__cause__ = self._last_error
        # One peer that fails, or a replacement that was not needed, is no exhaustion: other
        # peers may be well, and the application may still have its connection.
        if self._pinned is None and self._trials != "never":
            self._exhaustion = PeersExhausted(
                balancer.name, str(error), self._clock() - self._started
            )
        return error

    def tell_exhausted(self) -> None:
        """Tell of the exhaustion that this search has come to, if it has."""
        event, self._exhaustion = self._exhaustion, None
        if event is not None:
            self._balancer.emit(event)

    def _nobody(self) -> NoPeerAvailable:
        balancer, pinned = self._balancer, self._pinned
        said = {state.name: self._said(state) for state in balancer.snapshot()}
        if pinned is None:
            return balancer.no_peer_error(balancer.name, list(said.values()))
        return balancer.no_peer_error(balancer.name, [said[pinned.name]], pinned.name)

    @staticmethod
    def _said_of(peer: Peer | PeerState) -> str:
        return f"{peer.name} ({peer.address})" if peer.address else peer.name

    def _said(self, state: PeerState) -> str:
        where = self._said_of(state)
        if state.name in self._errors:
            return f"{where}: {self._errors[state.name]}, tried just now"
        if state.drained:
            return f"{where}: drained"
        if state.state == CLOSED and not state.suspect:
            if self._clock() >= self._deadline:
                return f"{where}: no time was left to try it"
            return f"{where}: not tried, its circuit has closed just now"
        trial = self._balancer.peers[state.name].breaker.trial
        text = "suspect" if state.suspect else "circuit open"
        if trial is not None:
            text = "being tried by another caller"
        if state.error:
            text += f", last error {state.error}"
        if state.trial_in is not None and trial is None:
            text += f", next trial {due_in(state.trial_in)}"
        return f"{where}: {text}"


def _seen(peer: Peer) -> tuple[Circuit, Lease | None]:
    """Return a peer's circuit, and the trial of it that is under way."""
    lease = peer.breaker.trial
    return peer.breaker.circuit, lease


class _Transitions:
    """Hands a breaker's transitions to its balancer, without keeping that alive."""

    def __init__(self, balancer: LoadBalancer, peer: str) -> None:
        self._balancer = weakref.ref(balancer)
        self._peer = peer

    def put(self, change: Transition) -> None:
        balancer = self._balancer()
        if balancer is not None:
            balancer._note_change(self._peer, change)

    def notify(self) -> None:
        balancer = self._balancer()
        if balancer is not None:
            balancer._circuits_changed()


def _without(dispatchers: tuple[Dispatcher, ...], listener: Listener) -> tuple[Dispatcher, ...]:
    return tuple(dispatcher for dispatcher in dispatchers if dispatcher.listener != listener)


def _peer_config(
    name: str, params: Mapping[str, Any], check_interval: float, thresholds: BreakerConfig
) -> PeerConfig:
    if not isinstance(name, str):
        raise ConfigError("peers", f"has a name that is a {type(name).__name__}", _PEERS_HINT)
    if not isinstance(params, Mapping):
        raise ConfigError(f"peers[{name!r}]", f"is a {type(params).__name__}", _PEERS_HINT)
    rest = dict(params)
    weight = rest.pop("weight", 1)
    priority = rest.pop("priority", 0)
    interval = rest.pop("check_interval", check_interval)
    breaker = BreakerConfig.of(rest.pop("breaker", None), over=thresholds)
    return PeerConfig(
        name=name,
        address=address_of(rest),
        weight=weight,
        priority=priority,
        check_interval=interval,
        breaker=breaker,
        params=rest,
    )


def address_of(params: Mapping[str, Any]) -> str:
    """Return where connect() arguments lead, as people write it; never a password."""
    socket = params.get("unix_socket")
    if socket:
        return str(socket)
    host = params.get("host") or ""
    port = params.get("port")
    if host:
        return f"{host}:{port}" if port else str(host)
    return str(params.get("database") or "") if not port else f"localhost:{port}"


def _count_while_alive(connection: Any, peer: Peer) -> None:
    """Count ``connection`` as held until it is collected, whichever threads come and go."""
    hold = peer.hold(of_thread=False)
    try:
        weakref.finalize(connection, Hold.let_go, hold).atexit = False
    except TypeError:
        # sqlite3's connections take no weak references; such a connection
        # cannot be followed, so it is not counted.
        hold.let_go()


#: Numbers for the connects under way.
_serials = itertools.count()
