"""How the next peer is chosen.

A strategy is asked once a connect and runs outside every lock; what it yields is taken
lazily, so that the first choice costs no more than itself. Peers that it leaves out come
after those it names: it expresses a preference, and does not take peers out of use.
"""

from __future__ import annotations

import bisect
import itertools
import operator
import random
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from .config import function, imported
from .exceptions import ConfigError
from .runtime import renew_in_child

if TYPE_CHECKING:
    from .peer import Peer


class Strategy(Protocol):
    """What the load balancer asks of a strategy."""

    def order(self, peers: Sequence[Peer]) -> Iterable[Peer]:
        """Return or yield ``peers`` in the order in which to try them.

        :param peers: one tier's usable peers, and the same tuple as long as nothing has changed.
        """


class Random:
    """Each connection goes to a peer drawn by weight.

    :param draw: returns a float in [0, 1). The default is the :mod:`random`
        module's own, which Python seeds anew in a forked child: a private
        generator would let all children of one parent draw alike.
    """

    #: Whether peers get connections by their weights, and are to have them back
    #: after they were out. One's own strategy may have other ends.
    by_weight = True

    def __init__(self, draw: Callable[[], float] | None = None) -> None:
        self._draw = random.random
        if draw is not None:
            self._draw = function("draw", draw, "Give a function that returns [0, 1).")
        # Peers and their running sum of weights (None: all weights equal).
        # One attribute, replaced whole, so that threads see a matching pair.
        self._sums: tuple[Sequence[Peer], list[float] | None] = ((), None)

    def order(self, peers: Sequence[Peer]) -> Iterator[Peer]:
        known, sums = self._sums
        if known is not peers:
            sums = _running_sums(peers)
            self._sums = (peers, sums)
        if sums is None:
            yield peers[int(self._draw() * len(peers))]
        else:
            yield peers[self._pick(len(peers), sums)]
        # Only after a failure does anyone come back for more.
        rest = list(peers)
        while rest:
            yield rest.pop(self._pick(len(rest), _running_sums(rest)))

    def _pick(self, count: int, sums: list[float] | None) -> int:
        if sums is None:
            return int(self._draw() * count)
        return min(bisect.bisect(sums, self._draw() * sums[-1]), count - 1)


class RoundRobin:
    """Connections go to the peers in turn, weights by smooth interleaving."""

    by_weight = True

    def __init__(self) -> None:
        self._schedule: tuple[Sequence[Peer], Sequence[Peer]] = ((), ())
        self.after_fork()
        renew_in_child(self)

    def after_fork(self) -> None:
        """Begin anywhere: the processes of a site are not to walk over the peers in step."""
        # itertools.count is atomic. Python may seed its random numbers anew only after this.
        self._turn = itertools.count(secrets.randbelow(1 << 16))

    def order(self, peers: Sequence[Peer]) -> Iterator[Peer]:
        known, schedule = self._schedule
        if known is not peers:
            schedule = _interleaved(peers)
            self._schedule = (peers, schedule)
        first = schedule[next(self._turn) % len(schedule)]
        yield first
        at = peers.index(first)
        yield from peers[at + 1 :]
        yield from peers[:at]


class LeastConnections:
    """A connection goes to the peer that has fewest of this process's, by weight.

    Those that are being made count: a peer that is slow to accept would get all of them.
    """

    by_weight = True

    def order(self, peers: Sequence[Peer]) -> Iterable[Peer]:
        # Counts move while others connect: read each once, break ties by
        # chance, or a fresh process would send everything to the first.
        keyed = [
            ((peer.connections + peer.connecting) / peer.weight, random.random(), peer)
            for peer in peers
        ]
        yield min(keyed, key=_load_and_chance)[2]
        for _load, _chance, peer in sorted(keyed, key=_load_and_chance):
            yield peer


#: Peers themselves cannot be compared.
_load_and_chance = operator.itemgetter(0, 1)


_BY_NAME: dict[str, Callable[[], Strategy]] = {
    "random": Random,
    "round_robin": RoundRobin,
    "least_connections": LeastConnections,
}


def iterated(order: Iterable[Peer]) -> Iterator[Peer]:
    """Return an iterator over what order() returned; a ``return`` may be missing there."""
    try:
        return iter(order)
    except TypeError:
        raise ConfigError(
            "STRATEGY",
            f"has an order() that returned {type(order).__name__}, and no peers",
            "Yield the peers that order() was given, or return them.",
        ) from None


def strategy_from(setting: Any) -> Strategy:
    """Return the strategy that the STRATEGY setting names.

    :param setting: a name, a dotted path to a class without arguments, such a
        class, or an object with an ``order`` method.
    """
    if isinstance(setting, str):
        setting = _BY_NAME.get(setting) or imported("STRATEGY", setting, known=_BY_NAME)
    try:
        strategy = setting() if isinstance(setting, type) else setting
    except TypeError as exc:
        raise ConfigError(
            "STRATEGY",
            f"is {setting!r}, which cannot be made ({exc})",
            "Give a class without arguments, or an object made from it.",
        ) from exc
    if not callable(getattr(strategy, "order", None)):
        raise ConfigError(
            "STRATEGY",
            f"is {setting!r}, which has no order() method",
            "Give a class with a method order(self, peers) that yields peers.",
        )
    return strategy  # type: ignore[no-any-return]


def _running_sums(peers: Sequence[Peer]) -> list[float] | None:
    if len({peer.weight for peer in peers}) == 1:
        return None
    return list(itertools.accumulate(peer.weight for peer in peers))


def _interleaved(peers: Sequence[Peer]) -> Sequence[Peer]:
    """Return a cycle in which each peer stands by its weight, spread evenly."""
    if len({peer.weight for peer in peers}) == 1:
        return peers
    least = min(peer.weight for peer in peers)
    # Fractions are honoured to a tenth of the smallest weight; a bound keeps
    # weights such as 1 and 1,000,000 from making a cycle of a million.
    places = [max(1, min(10_000, round(10 * peer.weight / least))) for peer in peers]
    slots = [
        ((turn + 0.5) / count, number)
        for number, count in enumerate(places)
        for turn in range(count)
    ]
    return [peers[number] for _when, number in sorted(slots)]
