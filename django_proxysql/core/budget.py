"""How many statements may be run again: a bound on what replays can cost.

A statement that kills the server it runs on must not be handed from peer to
peer, and a storm of losses must not double the load on who is left.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from .runtime import Guarded

#: Replays are at most this share of the statements of the last minute …
SHARE = 0.1
#: … but so many are always allowed.
ALWAYS = 10
WINDOW = 60.0
#: Seconds between two notes of how many statements there have been.
NOTE_EVERY = 5.0

#: Seconds for which a statement that has lost its connection is remembered …
STATEMENT_REMEMBERED = 600.0
#: … and for which a caller is, whatever its next statement.
CALLER_REMEMBERED = 60.0
_MOST_REMEMBERED = 1_000


class _Memory(dict[int, tuple[str, float]]):
    """What is remembered by a number, and the end of its time; the oldest come first."""

    def note(self, key: int, known: str, now: float, seconds: float) -> str:
        """Remember ``known``, or what is remembered already; return it."""
        first, until = self.pop(key, (known, now))
        if until <= now:
            first = known
        self[key] = first, now + seconds
        while len(self) > _MOST_REMEMBERED or self[next(iter(self))][1] <= now:
            del self[next(iter(self))]
        return first


class ReplayBudget(Guarded):
    """Counts one balancer's statements and replays in this process.

    :param clock: a monotonic clock, in seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        super().__init__()
        self._clock = clock
        #: Added to by every thread without a lock: an addition that is lost to
        #: a race makes the budget a little smaller, never larger.
        self.statements = 0
        now = clock()
        #: When the next note is due; compared before it is asked for.
        self.next_note = now + NOTE_EVERY
        #: How many statements there had been, and when; the oldest of a minute ago.
        self._notes: deque[tuple[float, int]] = deque([(now, 0)])
        self._replays: deque[float] = deque()
        #: By the texts' hashes: a text may be long.
        self._barred = _Memory()

    def note(self, now: float) -> None:
        """Remember how many statements there have been, for the last minute's share."""
        # Guards the notes: of two threads that come at once one adds to them.
        with self._lock:
            self._note(now)

    def _note(self, now: float) -> None:
        if now <= self.next_note:
            return
        # After a pause: all but the statement that asks were before it.
        if now > self.next_note + NOTE_EVERY:
            self._notes.append((self.next_note, max(self._notes[-1][1], self.statements - 1)))
        self._notes.append((now, self.statements))
        self.next_note = now + NOTE_EVERY
        while len(self._notes) > 2 and self._notes[1][0] <= now - WINDOW:
            self._notes.popleft()

    def spend(self, sql: str, cost: int = 1) -> bool:
        """Return whether ``sql`` may be run again, and count it as done.

        :param cost: how many statements are sent for it. A replay that costs more than is
            left is allowed while anything is left, and none after it.
        """
        # Guards the count of replays: of two threads that ask for the last one, one has it.
        with self._lock:
            now = self._clock()
            self._note(now)
            while self._replays and self._replays[0] <= now - WINDOW:
                self._replays.popleft()
            if self._barred.get(hash(sql), ("", now))[1] > now:
                return False
            if len(self._replays) >= max(ALWAYS, int(SHARE * self._recent(now))):
                return False
            self._replays.extend([now] * cost)
            return True

    def _recent(self, now: float) -> float:
        """How many statements there have been in the last minute, to a few seconds."""
        begun, count = self._notes[0]
        for then, so_far in self._notes:
            if then > now - WINDOW:
                break
            begun, count = then, so_far
        recent = self.statements - count
        # The note may be a little older than a minute: take the even share.
        return recent * min(1.0, WINDOW / max(now - begun, 1e-9))

    def bar(self, sql: str) -> None:
        """Allow no replay of ``sql`` for a minute: it was lost twice."""
        # Guards the dict, whose oldest are looked for and removed.
        with self._lock:
            self._barred.note(hash(sql), "barred", self._clock(), WINDOW)


class LossMemory(Guarded):
    """Remembers which statements and which callers have lost a connection, and to which peer.

    A statement that ends its connection wherever it runs takes out one peer at most, and so does
    a caller that runs several such statements. The memory is this process's, and bounded.

    :param clock: a monotonic clock, in seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        super().__init__()
        self._clock = clock
        #: The first peer, by a statement's hash and by a caller's number.
        self._statements, self._callers = _Memory(), _Memory()

    def note(self, peer: str, statement: Any, caller: int) -> bool:
        """Remember a loss; return whether the statement, or the caller, had one elsewhere.

        :param peer: the name of the peer that the connection led to.
        :param statement: the statement's text; None where it is not known.
        :param caller: a number that one thread or task has, and no other.
        """
        # critical section: two dicts, nothing that waits
        with self._lock:
            now = self._clock()
            memories = [(self._callers, caller, CALLER_REMEMBERED)]
            if statement is not None:
                text = statement if isinstance(statement, (str, bytes)) else repr(statement)
                memories.append((self._statements, hash(text), STATEMENT_REMEMBERED))
            elsewhere = False
            for memory, key, seconds in memories:
                elsewhere |= memory.note(key, peer, now, seconds) != peer
            return elsewhere
