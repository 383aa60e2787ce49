"""A trial under way, and how other threads wait for its end."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

#: Seconds after which what waits for a trial's end looks whether it has missed it.
LOOK_AGAIN = 1.0


class Lease:
    """A trial. :func:`.circuit.trial_of` says whether it is under way.

    :param expires: the moment, on the breaker's clock, from which it counts as abandoned.
    """

    __slots__ = ("bells", "ended", "expires", "holder")

    def __init__(self, expires: float) -> None:
        self.expires = expires
        #: Whether the trial is over.
        self.ended = False
        #: Returns the trial's permit. When that is gone, no thread can report a result. No code
        #: has to run for this: at the recursion limit a finalizer does not.
        self.holder: Callable[[], object | None] = lambda: None
        #: One for each thread or task that waits for the trial's result, which its release() wakes.
        #: A RuntimeError, where that cannot be, is ignored.
        self.bells: list[Any] = []

    @property
    def is_pending(self) -> bool:
        """Whether a thread can still report the trial's result."""
        return not self.ended and self.holder() is not None

    def end(self) -> None:
        """Wake the threads and tasks that wait for the trial's result."""
        self.ended = True
        for bell in self.bells.copy():
            try:
                bell.release()
            except RuntimeError:
                # Another trial's end woke that thread already.
                pass

    @staticmethod
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
