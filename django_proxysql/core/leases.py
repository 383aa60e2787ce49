"""A trial under way, and how other threads wait for its end."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

__all__ = ["Lease"]

#: Seconds after which a thread that waits for a trial's end looks whether it has missed it.
_LOOK_AGAIN = 1.0


def _no_holder() -> None:
    """Hold a lease that no permit has."""


class Lease:
    """A trial. :func:`.circuit.trial_of` says whether it is under way.

    :param expires: the moment, on the breaker's clock, from which it counts as abandoned.
    """

    __slots__ = ("_bells", "ended", "expires", "holder")

    def __init__(self, expires: float) -> None:
        self.expires = expires
        #: Whether the trial is over.
        self.ended = False
        #: Returns the trial's permit. When that is gone, no thread can report a result. No code
        #: has to run for this: at the recursion limit a finalizer does not.
        self.holder: Callable[[], object | None] = _no_holder
        #: A lock for each thread that waits for the trial's result, released to wake it.
        self._bells: list[threading.Lock] = []

    def end(self) -> None:
        """Wake the threads that wait for the trial's result."""
        self.ended = True
        for bell in self._bells.copy():
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
            lease._bells.append(bell)
        # A trial that ended before its bell was hung up does not ring it, and one whose end is
        # interrupted may not either.
        while seconds > 0 and not any(lease.ended or lease.holder() is None for lease in leases):
            if bell.acquire(timeout=min(seconds, _LOOK_AGAIN)):
                return
            seconds -= _LOOK_AGAIN
