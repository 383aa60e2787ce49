"""What a balancer's faces share: how they are made, what users ask of the peers and change.

:class:`~django_proxysql.core.balancer.LoadBalancer` connects in the caller's thread,
:class:`~django_proxysql.core.aio.AsyncLoadBalancer` under asyncio. Both run the same search.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, TypeVar

import tenacity

from .config import BalancerConfig, config_from, function
from .events import Listener
from .exceptions import ConfigError, NoPeerAvailable
from .group import PeerGroup
from .logger import Limit, logger
from .peer import Peer, PeerState
from .ready import QUESTIONS, Check, Unanswered, Writer
from .search import Attempt, Search

if TYPE_CHECKING:
    from .sharing import Sharing

_Face = TypeVar("_Face", bound="Face")

#: Seconds between two searches for a peer: processes that wait do not search in step.
_WAIT = tenacity.wait_random_exponential(multiplier=0.1, max=2)


class Face:
    """A balancer as its users see it.

    :class:`~django_proxysql.core.balancer.LoadBalancer` says what the arguments are.
    """

    #: Whether a refusal of a trial that no connect() makes is due to what we ask for.
    asks_for_another: Callable[[], bool] | bool = False
    #: How such a trial connects, if not by ``connect``: as Django's engine does, or as a SQLAlchemy
    #: engine has done last, whose URL may say what no peer says. What it returns is closed.
    opens: Callable[[Attempt], Any] | None = None

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
        sleep: Callable[[float], Any] | None = None,
        last_resort_interval: float | None = 1,
        ready_check: Any = None,
        shared_state: str | None = None,
        trials: str = "inline",
        clock: Callable[[], float] = time.monotonic,
        jitter: Callable[[], float] | None = None,
    ) -> None:
        function("clock", clock, "Give a function that returns seconds.")
        function("jitter", jitter, "Give a function that returns [0, 1).", optional=True)
        config = config_from(
            peers,
            name=name,
            check_interval=check_interval,
            breaker=breaker,
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
        group = PeerGroup(config, clock=clock, jitter=jitter)
        # The face that makes the group makes its background trials, too.
        if config.trials == "background":
            self._make_trials_in_background(group)
        if config.shared_state is not None:
            from .sharing import Sharing

            group.share(Sharing(group))
        self._set_up(group, connect, wait, stop, sleep)

    @classmethod
    def from_group(
        cls: type[_Face],
        group: PeerGroup,
        connect: Callable[..., Any] | None = None,
        *,
        wait: Any = None,
        stop: Any = None,
        sleep: Callable[[float], Any] | None = None,
    ) -> _Face:
        """Return another face of a balancer: it shares peers, circuits, drains and listeners.

        :param group: the other face's :attr:`group`.
        :param connect: the driver's ``connect`` for this face.
        :param wait: as for :class:`LoadBalancer`, like ``stop`` and ``sleep``.
        :raises ConfigError: a wrong argument.
        """
        if not isinstance(group, PeerGroup):
            raise ConfigError("group", f"is a {type(group).__name__}", "Give a balancer's group.")
        face = cls.__new__(cls)
        face._set_up(group, connect, wait, stop, sleep)
        return face

    def _set_up(
        self, group: PeerGroup, connect: Callable[..., Any] | None, wait: Any, stop: Any, sleep: Any
    ) -> None:
        function("connect", connect, "Give the driver's connect function.", optional=True)
        function("wait", wait, "Give one of tenacity's wait_… objects.", optional=True)
        function("stop", stop, "Give one of tenacity's stop_… objects.", optional=True)
        function("sleep", sleep, "Give a function that takes seconds.", optional=True)
        #: What is known of the peers; another face may share it.
        self.group = group
        self.name = group.name
        self.config = group.config
        #: The peers by name.
        self.peers: Mapping[str, Peer] = group.peers
        #: The clock that everything about this balancer is timed by, in seconds.
        self.clock = group.clock
        self._connect = connect
        self._wait, self._stop, self._sleep = wait, stop, sleep
        self._waiting_line = Limit(1)
        self._may_search_again = group.config.wait_for_peer > 0 or stop is not None

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.group}>"

    @property
    def sharing(self) -> Sharing | None:
        """What it shares with other processes; None where that is not asked for."""
        return self.group.sharing  # type: ignore[return-value]

    def _connect_function(self) -> Callable[..., Any]:
        """Return the driver's ``connect`` that the balancer was made with.

        :raises ConfigError: it was made without.
        """
        if self._connect is None:
            raise ConfigError("connect", "was not given", "Pass the driver's connect function.")
        return self._connect

    def _make_trials_in_background(self, group: PeerGroup) -> None:
        raise NotImplementedError

    @contextlib.contextmanager
    def _trial(self, peer: Peer, now: bool) -> Iterator[Search]:
        """Yield the search for a peer's trial; an error that is the peer's ends the block."""
        search = Search(self.group, "never", peer, self.asks_for_another, by_hand=now)
        try:
            yield search
        except Exception as exc:
            if not (search.is_over or search.is_of_the_peer(exc)):
                search.raised(exc)
                raise
        finally:
            search.forget()

    def _questions(
        self, attempt: Attempt, *, checks: bool = True, asks: bool = True
    ) -> Generator[Check, Any, None]:
        """Yield what a new connection must pass, and take the answers.

        :param checks: READY_CHECK, where there is one.
        :param asks: what a trial must ask besides.
        :raises NotReady: the peer must not be used.
        """
        peer = attempt.peer
        if checks and self.group.ready_check is not None:
            answer = yield self.group.ready_check
            if isinstance(answer, Writer):
                peer.note_server(answer.is_server)
        question = QUESTIONS.get(peer.breaker.circuit.question)
        if asks and attempt.is_trial and question is not None:
            try:
                yield question
            except Unanswered:
                # A proxy that may only be busy is better than none.
                if self.group.can_spare(peer):
                    raise

    # Knowing

    def snapshot(self) -> list[PeerState]:
        """Return what this process knows of each peer, without asking any.

        :returns: a :class:`PeerState` for each, in the order of :attr:`peers`.
        """
        return self.group.snapshot()

    def next_trial(self, peer: Peer | str) -> float | None:
        """Return when the peer's next trial may begin, on :attr:`clock`.

        :param peer: one of :attr:`peers`, or its name.
        :returns: None: it needs none; minus infinity: at once.
        :raises UnknownPeer: it is none of this balancer's.
        """
        return self.group.next_trial(self.group.named(peer))

    def add_listener(self, listener: Listener, *, connects: bool = True) -> None:
        """Call ``listener`` with every event from now on, outside all locks.

        Adding it again changes nothing.

        :param listener: called in the thread to which the thing happened. Of what other
            processes have found, of what a trial in the background has shown, and of
            what happens while one of these waits its turn, in a thread of its own.
        :param connects: False spares it each :class:`~django_proxysql.core.events.Connected`
            that is no trial, and each connect the cost of that call.
        :raises ConfigError: ``listener`` cannot be called.
        """
        self.group.listeners.add(listener, connects)

    def remove_listener(self, listener: Listener) -> None:
        """Call ``listener`` no longer."""
        self.group.listeners.remove(listener)

    # Changing

    def drain(self, name: str | Peer, *, force: bool = False) -> None:
        """Give a peer no new connections; those it has leave at their safe points.

        For an upgrade of its server, say. In this process only, unless the
        balancer shares its state: then in all that share it, at once here and
        within a second there, and in those that start later.
        :meth:`Sharing.settle <django_proxysql.core.sharing.Sharing.settle>` says whether Redis
        has it. What its circuit knows stays known.
        Draining a drained peer changes nothing.

        :param name: the peer's, as in :attr:`peers`, or the peer.
        :param force: drain it even if no other takes connections.
        :raises UnknownPeer: a KeyError: the balancer has no such peer.
        :raises DrainRefused: no other peer takes connections: its circuit is
            open, or it is drained itself, or another process drains it just now.
        """
        self.group.drain(self.group.named(name, "name"), force=force)

    def undrain(self, name: str | Peer) -> None:
        """Let a peer have new connections again.

        :param name: the peer's, as in :attr:`peers`, or the peer.
        :raises UnknownPeer: a KeyError: the balancer has no such peer.
        """
        self.group.undrain(self.group.named(name, "name"))

    def pinned(self, peer: Peer | str | None = None) -> AbstractContextManager[None]:
        """Pin the thread or task to one peer for a ``with`` block: the first that it connects to.

        It holds for the thread, greenlet or asyncio task that enters the block,
        and for what it runs by way of ``sync_to_async()``. Tasks that it begins share the peer.
        Where connects begin at once, the first to succeed says which. The others then connect to
        that one. Django's connections, and those of your own ``open_one``, do so at their next use.

        For what must not be spread: migrations, test databases, reading one's
        own writes where peers lag. If the peer is lost inside the block,
        connecting fails rather than going elsewhere. Inside another such block
        it changes nothing.

        :param peer: the peer to stay with, such as ``connection.peer``, or its name.
        :raises UnknownPeer: it is none of this balancer's.
        :raises NoPeerAvailable: in the block, out of a connect, when the peer fails.
        """
        group = self.group
        known = None if peer is None else group.named(peer)
        # Connections that are there already are to see that something is new.
        return group.affinity.pinned(known, group.invalidate)


def carrying_on(search: Search) -> dict[str, Any]:
    """Return how tenacity carries on after the first failure: over the peers that are left.

    That costs 35 µs a run, which a connect that succeeds at once need not pay.
    """
    return {
        "retry": tenacity.retry_if_exception(search.goes_on),
        # Candidates run out, the deadline passes: the search itself says so.
        "stop": tenacity.stop_never,
        "wait": tenacity.wait_none(),
        "reraise": True,
    }


class Waiting:
    """Searches again, after a random and growing time, until a peer works or time is over.

    :param face: whose ``wait_for_peer``, ``wait`` and ``stop`` hold.
    :param first: the search that found none.
    :param error: what it came to.
    """

    def __init__(self, face: Face, first: Search, error: BaseException) -> None:
        self._face = face
        self._until = face.clock() + face.config.wait_for_peer
        self._error: BaseException | None = error
        #: The search under way.
        self.search = first
        # Each request of a busy site may wait.
        kept_back = face._waiting_line.passes(face.clock())
        if kept_back is not None:
            logger.warning(
                "%s: waiting for a peer%s%s: %s",
                face.name,
                "" if face._stop else f", at most {face.config.wait_for_peer:g} s",
                f" (and {kept_back} more)" if kept_back else "",
                error,
                extra={"alias": face.name},
            )

    def next_search(self) -> Search:
        """Return the next search.

        :raises NoPeerAvailable: the first one's, for tenacity to wait after it.
        """
        error, self._error = self._error, None
        if error is not None:
            raise error
        self.search = self.search.again()
        return self.search

    def options(self) -> dict[str, Any]:
        return {
            "retry": tenacity.retry_if_exception_type(NoPeerAvailable),
            "stop": self._face._stop or self._is_over,
            "wait": self._pause,
            "reraise": True,
        }

    def _is_over(self, state: tenacity.RetryCallState) -> bool:
        return self._face.clock() >= self._until

    def _pause(self, state: tenacity.RetryCallState) -> float:
        seconds = float((self._face._wait or _WAIT)(state))
        # The last search comes when the time is over.
        if self._face._stop:
            return seconds
        return min(seconds, max(0.0, self._until - self._face.clock()))
