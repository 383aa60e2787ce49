"""The load balancer: hands out connections to those of its equivalent peers that work.

``LoadBalancer.connect`` reads as the whole story: the first attempt is made
directly; after a failure tenacity carries on over the peers that are left;
when none is left and another caller's trial is under way, it waits for the
result; then :class:`NoPeerAvailable` says what every peer last said. Which peer
comes next is the search's business (:mod:`~django_proxysql.core.search`).
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import tenacity

from . import drivers
from .circuit import Lease
from .config import function
from .exceptions import ConfigError
from .face import Face, Waiting, carrying_on
from .group import PeerGroup
from .peer import Peer, PeerState, count_while_alive
from .ready import Check, galera, run, throw_away, writable
from .runtime import LOOK_AGAIN
from .search import Ask, Attempt, Search, Wait
from .sqlalchemy_engine import sqlalchemy_engine
from .trials import trial_worker

if TYPE_CHECKING:
    import sqlalchemy.engine

__all__ = ["Attempt", "LoadBalancer", "PeerState"]


class LoadBalancer(Face):
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
        ``"background"``: a thread does (:mod:`django_proxysql.core.trials`), under asyncio a
        task (:mod:`django_proxysql.core.tasks`).
    :param clock: a monotonic clock, in seconds.
    :param jitter: draws from [0, 1).
    :raises ConfigError: a wrong argument; the message names it.
    """

    @functools.cached_property
    def _driver(self) -> drivers.Driver:
        return drivers.driver_of(self._connect)

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
        :raises NoPeerAvailable: no peer was available within the deadline.
        :raises ConfigError: an argument is wrong, the balancer was made without ``connect``, or
            the strategy yields what is no peer.
        :raises Exception: the driver's own error, where it is not the peer's
            fault, or where every peer was attempted and refused us.
        """
        if open_one is None:
            open_one = self._open_one
        elif not callable(open_one):
            function("open_one", open_one, "Give a function that takes an Attempt.")
        one = None if only is None else self.group.named(only, "only")
        search = Search(self.group, trials, one, refusal_is_callers, self._may_search_again)
        try:
            try:
                return self._attempt(search, open_one)
            except Exception as exc:
                if not search.goes_on(exc):
                    raise
            return self._carry_on(search, open_one)
        except BaseException as exc:
            if search.may_be_repeated(exc):
                return self._wait_for_peer(Waiting(self, search, exc), open_one)
            search.raised(exc)
            raise

    def _attempt(self, search: Search, open_one: Callable[[Attempt], Any]) -> Any:
        """Make one attempt, after waiting for another caller's trial where that is next."""
        step: Attempt | Wait | Ask | None = None
        try:
            step = search.step()
            while not isinstance(step, Attempt):
                if isinstance(step, Wait):
                    wait_for_any(step.leases, step.seconds)
                    step = search.step()
                else:
                    step = search.step(step.peer.breaker.ask(step.by_hand))
            connection = open_one(step)
        except BaseException as exc:
            if isinstance(step, Attempt):
                search.failed(step, exc)
            raise
        else:
            search.succeeded(step)
            return connection
        finally:
            # Without a call, which the recursion limit might refuse: however this is broken off,
            # the attempt is over. tenacity keeps the exception, and with it all these frames: a
            # listener's Ctrl-C after the connect is not to keep the socket.
            connection = None
            attempt = search.attempt
            if attempt is not None:
                attempt.is_over = True
                if attempt.permit is not None and attempt.permit.lease is not None:
                    attempt.permit.lease.ended = True

    def _carry_on(self, search: Search, open_one: Callable[[Attempt], Any]) -> Any:
        retrying = tenacity.Retrying(sleep=_not_at_all, **carrying_on(search))
        return retrying(self._attempt, search, open_one)

    def _wait_for_peer(self, waiting: Waiting, open_one: Callable[[Attempt], Any]) -> Any:
        try:
            return tenacity.Retrying(sleep=self._sleep or time.sleep, **waiting.options())(
                lambda: self._carry_on(waiting.next_search(), open_one)
            )
        except BaseException as exc:
            waiting.search.raised(exc)
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
        return sqlalchemy_engine(self, self._connect, url, **options)

    def _open_one(self, attempt: Attempt) -> Any:
        return self.open_with(self._connect_function(), attempt, attempt.peer.params)

    def open_with(
        self, connect: Callable[..., Any], attempt: Attempt, params: Mapping[str, Any]
    ) -> Any:
        """Open and check a connection as ``attempt`` says, and count it for its peer.

        :param connect: a driver's connect function.
        :param attempt: what the connection is for.
        :param params: what to call it with; a callable password is called.
        :raises Exception: what connecting, or READY_CHECK, raised; nothing stays open.
        """
        driver = self._driver if connect is self._connect else drivers.driver_of(connect)
        params = drivers.with_password(params)
        asked = attempt.is_trial and self.send_ahead(attempt, driver, connect, params)
        params.update(driver.connect_options(params, attempt.timeout))
        connection = connect(**params)
        try:
            if hasattr(type(connection), "__await__"):
                raise ConfigError("connect", "is a coroutine function", "Use AsyncLoadBalancer.")
            self.check_ready(connection, attempt, asked=asked)
            attempt.settle()
            count_while_alive(connection, attempt.peer)
        except BaseException:
            # The traceback would keep the socket open for as long as it lives.
            connection.close()
            raise
        return connection

    # Trials

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
        peer = self.group.named(peer)
        if peer.breaker.is_available:
            # It has recovered just now.
            return True
        with self._trial(peer, now) as search:
            self._attempt(search, self._open_and_close)
            return True
        return False

    def _make_trials_in_background(self, group: PeerGroup) -> None:
        group.try_out = self.try_out
        group.background = lambda group, news: trial_worker.schedule(group, news=news)

    def _open_and_close(self, attempt: Attempt) -> None:
        connection = (self.opens or self._open_one)(attempt)
        with contextlib.suppress(Exception):
            connection.close()

    def send_ahead(
        self,
        attempt: Attempt,
        driver: drivers.Driver,
        connect: Callable[..., Any],
        params: Mapping[str, Any],
    ) -> bool:
        """Make a trial on a throw-away connection, which is bounded, and ask what it must ask.

        The caller's connection must not be bounded, for its statements may take their
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
        checks = self.group.ready_check in (galera, writable)
        asks = driver.WATCHED and (checks or attempt.peer.breaker.circuit.question)
        if not asks and not driver.trial_options(params, attempt.timeout):
            return False
        with throw_away(driver, connect, params, attempt.timeout) as connection:
            run(self._questions(attempt, checks=checks), functools.partial(_answer, connection))
        return True

    def check_ready(self, connection: Any, attempt: Attempt, *, asked: bool = False) -> None:
        """Run READY_CHECK on a driver's connection, and what a trial must ask besides.

        :param connection: the driver's own, just made.
        :param attempt: what it was made for.
        :param asked: a throw-away connection has been asked already.
        :raises NotReady: the peer must not be used.
        """
        run(self._questions(attempt, asks=not asked), functools.partial(_answer, connection))


def _answer(connection: Any, check: Check) -> Any:
    answer = check(connection)
    if inspect.iscoroutine(answer):
        answer.close()
        raise ConfigError(
            "READY_CHECK", "is a coroutine function", "Give a function, or use AsyncLoadBalancer."
        )
    return answer


def wait_for_any(leases: Sequence[Lease], seconds: float) -> None:
    """Wait until one of the trials has ended, at most ``seconds``."""
    bell = threading.Lock()
    bell.acquire()
    for lease in leases:
        lease.bells.append(bell)
    # A trial that ended before its bell was hung up does not ring it, and one whose end is
    # interrupted may not either.
    while seconds > 0 and all(lease.is_pending for lease in leases):
        if bell.acquire(timeout=min(seconds, LOOK_AGAIN)):
            return
        seconds -= LOOK_AGAIN


def _not_at_all(seconds: float) -> None:
    """Between two peers there is nothing to wait for."""
