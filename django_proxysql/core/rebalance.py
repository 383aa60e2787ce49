"""Coming back: which kept connections move to a peer that is in use again, and when.

docs/explanation/connecting.rst ("Coming back") says how many move, and when. What
is left over of a whole connection is rounded once for each return.

How it holds: what is decided is decided under a lock, under which nothing
waits. A move that is under way counts as done; the thread that makes it may be
killed, and it is over with the :class:`Move`. The child of a fork has no
connections, and nothing to move.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Sequence

from .peer import Peer
from .runtime import Guarded

#: What sums of weights may be off by.
_HAIR = 1e-9


class Move:
    """Leave to move one connection; it is under way for as long as somebody has this."""

    __slots__ = ("__weakref__", "peer")

    def __init__(self, peer: Peer) -> None:
        #: Where to.
        self.peer = peer


class _Return:
    """A peer's coming back, in one process."""

    def __init__(self, peer: Peer, since: float, rounding: float, phase: float) -> None:
        self.peer = peer
        #: When the last move was begun; at first, when the circuit closed.
        self.last = since
        self.rounding = rounding
        #: Where in the first interval the first move comes.
        self.wait = 1 - phase
        #: How many were allowed.
        self.moved = 0
        self.under_way: weakref.WeakSet[Move] = weakref.WeakSet()


class Rebalance(Guarded):
    """Lets the connections of one process move to peers that have come back.

    :param seconds: how long it takes at least; None: none is moved.
    :param clock: a monotonic clock, in seconds.
    :param draw: draws from [0, 1).
    """

    def __init__(
        self, seconds: float | None, clock: Callable[[], float], draw: Callable[[], float]
    ) -> None:
        super().__init__()
        self._seconds = seconds
        self._clock = clock
        self._draw = draw
        #: The peers that are coming back. Replaced as a whole; read without the lock.
        self.returns: tuple[_Return, ...] = ()

    def begin(self, peer: Peer) -> None:
        """Take note that a peer is in use again."""
        if self._seconds is None:
            return
        back = _Return(peer, self._clock(), self._draw(), self._draw())
        # Guards the tuple: of two peers that come back at once both are kept.
        with self._lock:
            self.returns = (*(other for other in self.returns if other.peer is not peer), back)

    def claim(self, peer: Peer, peers: Iterable[Peer], tier: Sequence[Peer]) -> Move | None:
        """Return where a connection to ``peer`` is to move now, if it is; once for each move."""
        seconds = self._seconds or 0
        now = self._clock()
        total = sum(other.connections for other in peers)
        weight = sum(other.weight for other in tier)
        # Guards the count of moves: of two threads that ask at once one has the move.
        with self._lock:
            for back in self.returns:
                if back.peer not in tier:
                    # It has gone again, or peers of a better tier have come. A doubt
                    # is mostly unfounded: after that it goes on.
                    if not back.peer.breaker.circuit.suspect:
                        self._end(back)
                    continue
                share = total * back.peer.weight / weight
                has = back.peer.connections + len(back.under_way)
                missing = math.floor(share + back.rounding + _HAIR) - has
                if missing < 1:
                    if not back.under_way:
                        self._end(back)
                    continue
                if peer is back.peer:
                    continue
                if peer in tier and peer.connections <= total * peer.weight / weight + _HAIR:
                    continue
                interval = seconds / (back.moved + missing)
                if now < back.last + interval * (1 if back.moved else back.wait):
                    continue
                move = Move(back.peer)
                back.under_way.add(move)
                back.last = now
                back.moved += 1
                return move
        return None

    def _end(self, back: _Return) -> None:
        self.returns = tuple(other for other in self.returns if other is not back)

    def after_fork(self) -> None:
        super().after_fork()
        self.returns = ()
