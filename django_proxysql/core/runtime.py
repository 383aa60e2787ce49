"""Locks, forks and background threads: what a process is, and what may happen to it.

*Locks.* An asynchronous exception (Ctrl-C, Celery's time limits, ``PyThreadState_SetAsyncExc``) is
raised between any two instructions. In Python 3.11 to 3.13 ``with lock:`` holds against that:
nothing is raised between ``__enter__`` and the block, or between the block's end and ``__exit__``.
In Python 3.9 and 3.10 it may be after the block, and from 3.14 on before it, where ``__enter__`` is
an ordinary call (both seen): the lock stays held, and the next thread would wait for ever.

*Forks.* ``os.register_at_fork`` is for forks by Python. uWSGI forks in C, and has Python's
preparations made in its workers only if a setting says so (``py-call-uwsgi-fork-hooks``).
Otherwise it calls ``uwsgi.post_fork_hook`` there, and that does what is ours.
"""

from __future__ import annotations

import os
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar

from .logger import complain

__all__ = ["Living", "RecoveringLock", "at_fork", "new_lock", "renew_in_child", "watch_uwsgi"]

_T = TypeVar("_T")


class RecoveringLock:
    """A re-entrant lock that is taken from a holder that never releases it.

    For sections that take microseconds and wait for nothing.

    :param patience: seconds after which the holder counts as dead.
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
        """Release it, if it has not been taken away."""
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
    """Return a re-entrant lock that an asynchronous exception does not leave held."""
    return threading.RLock() if (3, 11) <= sys.version_info < (3, 14) else RecoveringLock()


# Forks

_in_child: list[Callable[[], object]] = []
#: The process in which all that has been done.
_home = os.getpid()
#: What uWSGI would have called without us.
_before_us: Callable[[], object] | None = None


class Living(Generic[_T]):
    """A list of objects that keeps none of them alive.

    Not a WeakSet: to list that runs Python code, and fails where another thread adds meanwhile.
    """

    def __init__(self) -> None:
        self._references: set[weakref.ref[_T]] = set()

    def add(self, thing: _T) -> None:
        """List ``thing`` for as long as it lives."""
        self._references.add(weakref.ref(thing, self._references.discard))

    def all(self) -> list[_T]:
        """Return those that live."""
        # The copy is made in one step, whichever threads add and discard.
        found = [reference() for reference in self._references.copy()]
        return [thing for thing in found if thing is not None]


class Forkable(Protocol):
    """What a child of a fork must renew: its locks, and what belongs to threads."""

    def after_fork(self) -> None:
        """Begin anew in the child, where no lock is held and no other thread runs."""


_forkable: Living[Forkable] = Living()


def renew_in_child(thing: Forkable) -> None:
    """Have ``thing.after_fork()`` called in each child, for as long as it lives."""
    _forkable.add(thing)


def at_fork(
    after_in_child: Callable[[], object],
    *,
    before: Callable[[], object] | None = None,
    after_in_parent: Callable[[], object] | None = None,
) -> None:
    """Have functions called at each fork, as by ``os.register_at_fork``.

    :param after_in_child: must do without ``before``, which C's forks do not have.
    """
    named = {
        "after_in_child": after_in_child,
        "before": before,
        "after_in_parent": after_in_parent,
    }
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(**{name: do for name, do in named.items() if do is not None})
    _in_child.append(after_in_child)


def watch_uwsgi() -> None:
    """Take uWSGI's hook for forks, if this is uWSGI. May be called again at any time."""
    global _before_us
    uwsgi: Any = sys.modules.get("uwsgi")
    if uwsgi is None:
        return
    chain = getattr(sys.modules.get("uwsgidecorators"), "postfork_chain", None)
    if chain is not None:
        # It has taken the hook for itself.
        if _unless_done not in chain:
            chain.insert(0, _unless_done)
        return
    known = getattr(uwsgi, "post_fork_hook", None)
    if known is not _hook:
        _before_us = known
        uwsgi.post_fork_hook = _hook


def _hook() -> None:
    _unless_done()
    if _before_us is not None:
        _before_us()


def _unless_done() -> None:
    if _home == os.getpid():
        # Python did it; or this process has loaded the application for itself.
        return
    _is_home()
    for do in _in_child.copy():
        try:
            do()
        except Exception:
            complain("After a fork something could not be renewed")


def _is_home() -> None:
    global _home
    _home = os.getpid()


def _renew() -> None:
    for thing in _forkable.all():
        try:
            thing.after_fork()
        except Exception:
            complain("After a fork %r could not be renewed", thing)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_is_home)

at_fork(_renew)
watch_uwsgi()
