"""How many statements may be run again: a bound on what replays can cost.

A statement that kills the server it runs on must not be handed from peer to
peer, and a storm of losses must not double the load on who is left.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

__all__ = ["ReplayBudget"]

#: Replays are at most this share of the statements of the last minute …
SHARE = 0.1
#: … but so many are always allowed.
ALWAYS = 10
WINDOW = 60.0
#: Seconds between two notes of how many statements there have been.
NOTE_EVERY = 5.0


class ReplayBudget:
    """Counts one balancer's statements and replays in this process.

    :param clock: a monotonic clock, in seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        #: Added to by every thread without a lock: an addition that is lost to
        #: a race makes the budget a little smaller, never larger.
        self.statements = 0
        #: When the next note is due; compared before it is asked for.
        self.next_note = clock() + NOTE_EVERY
        self._notes: deque[tuple[float, int]] = deque([(clock(), 0)])
        self._replays: deque[float] = deque()
        self._barred: dict[str, float] = {}

    def note(self, now: float) -> None:
        """Remember how many statements there have been, for the last minute's share."""
        with self._lock:
            if now < self.next_note:
                return
            self.next_note = now + NOTE_EVERY
            self._notes.append((now, self.statements))
            while len(self._notes) > 2 and self._notes[1][0] <= now - WINDOW:
                self._notes.popleft()

    def spend(self, sql: str) -> bool:
        """Return whether ``sql`` may be run again, and count it as done."""
        now = self._clock()
        with self._lock:
            while self._replays and self._replays[0] <= now - WINDOW:
                self._replays.popleft()
            for text, until in list(self._barred.items()):
                if until <= now:
                    del self._barred[text]
            if sql in self._barred:
                return False
            begun, count = self._notes[0]
            for then, so_far in self._notes:
                if then <= now - WINDOW:
                    begun, count = then, so_far
            recent = self.statements - count
            if now - begun > WINDOW:
                # The note is older than a minute: take the even share of it.
                recent = int(recent * WINDOW / (now - begun))
            if len(self._replays) >= max(ALWAYS, SHARE * recent):
                return False
            self._replays.append(now)
            return True

    def bar(self, sql: str) -> None:
        """Allow no replay of ``sql`` for a minute: it was lost twice."""
        with self._lock:
            self._barred[sql] = self._clock() + WINDOW
            while len(self._barred) > 1_000:
                del self._barred[next(iter(self._barred))]

    def after_fork(self) -> None:
        """In the child: a lock that nobody holds."""
        self._lock = threading.Lock()
