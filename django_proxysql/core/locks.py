"""Locks that an exception out of nowhere does not leave locked for ever.

Ctrl-C, Celery's time limits and ``PyThreadState_SetAsyncExc`` strike between any
two instructions. In Python 3.11 to 3.13 ``with lock:`` holds against that: nothing
is raised between ``__enter__`` and the block, or between the block's end and
``__exit__``. In Python 3.9 and 3.10 it may be after the block, and from 3.14 on
before it, where ``__enter__`` is an ordinary call (both seen); whoever comes next
would wait for ever.
"""

from __future__ import annotations

import sys
import threading
from typing import Any

__all__ = ["RecoveringLock", "new_lock"]


class RecoveringLock:
    """A re-entrant lock that is taken from a holder who never lets go.

    For sections that take microseconds and wait for nothing.

    :param patience: seconds after which the holder is taken for dead.
    """

    def __init__(self, patience: float = 1) -> None:
        self._lock = threading.RLock()
        self._patience = patience

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        """Take the lock, as ``threading.RLock`` does; after ``patience`` in any case."""
        if not blocking or 0 <= timeout < self._patience:
            return self._lock.acquire(blocking, timeout if blocking else -1)
        while True:
            lock = self._lock
            if lock.acquire(timeout=self._patience):
                return True
            if self._lock is lock:
                self._lock = threading.RLock()

    def release(self) -> None:
        """Let go, if it has not been taken away."""
        try:
            self._lock.release()
        except RuntimeError:
            pass

    def __enter__(self) -> RecoveringLock:
        self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def new_lock() -> Any:
    """Return a re-entrant lock that holds where threads are struck."""
    return threading.RLock() if (3, 11) <= sys.version_info < (3, 14) else RecoveringLock()
