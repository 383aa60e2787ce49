"""Locks, forks and background threads: what a process is, and what may happen to it.

*Locks.* An asynchronous exception (Ctrl-C, Celery's time limits, ``PyThreadState_SetAsyncExc``) is
raised between any two instructions. In Python 3.11 and 3.12 ``with lock:`` holds against that:
nothing is raised between ``__enter__`` and the block, or between the block's end and ``__exit__``.
In Python 3.9 and 3.10 it may be after the block. 3.13 raises it where a loop of the block jumps
back, too, and has that for outside the block. From 3.14 on it may be before the block, where
``__enter__`` is an ordinary call. (All seen.) The lock stays held, and the next thread would wait
for ever.

*Forks.* ``os.register_at_fork`` is for forks by Python. uWSGI forks in C, and has Python's
preparations made in its workers only if a setting says so (``py-call-uwsgi-fork-hooks``).
Otherwise it calls ``uwsgi.post_fork_hook``, and that does what is ours.

*Threads.* A :class:`Worker` has one background thread at most, which exists only while there is
work. What it promises:

* *No work is left without a thread.* A thread that finds nothing left says first that it is over,
  and looks once more after that: work that was brought before is found now, and work that comes
  later starts another thread.
* *An asynchronous exception* ends the thread at any line. On its way out it says that it is over,
  and starts another if there is need. Struck there again, it is over all the same: its life ends
  with the frame that alone refers to it, and the next :meth:`Worker.wake` starts another.
* *No thread can be started*: the log has one line, and nothing stays marked as running.
* *A fork*: the child has no thread. A child that is made within the work ends its copy of the
  thread with that step.
* *The interpreter's end* cuts threads off wherever they are: see :func:`finish`.

No lock is held while a step runs. The thread waits on a lock of C that is released to wake it;
released early, it does not wait. It is no ``threading.Thread``, whose ``start()`` waits with locks
held that a signal handler, starting another, would wait for forever.
"""

from __future__ import annotations

import _thread
import atexit
import math
import os
import sys
import threading
import time
import types
import weakref
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from .logger import Complaints, complain

#: Seconds after which what waits looks by itself: who was to wake it may have been killed before.
LOOK_AGAIN = 1.0
#: Seconds for which the process's end waits for work that must not be cut off.
AT_EXIT = 5.0

_T = TypeVar("_T")


class RecoveringLock:
    """A re-entrant lock that is taken from a holder that never releases it.

    For sections that take microseconds and wait for nothing.

    :param patience: seconds after which the holder counts as dead.
    """

    def __init__(self, patience: float = 1) -> None:
        self._first = threading.RLock()
        #: By a lock that was taken from its holder: the one in its place. Threads that do so at
        #: once get the same, for the dictionary's own methods are atomic.
        self._successors: dict[Any, Any] = {}
        self._patience = patience

    @property
    def _lock(self) -> Any:
        lock: Any = self._first
        while lock in self._successors:
            lock = self._successors[lock]
        return lock

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        """Take the lock, as ``threading.RLock`` does; after ``patience`` in any case."""
        if not blocking or 0 <= timeout < self._patience:
            return bool(self._lock.acquire(blocking, timeout if blocking else -1))
        while True:
            lock = self._lock
            if lock.acquire(timeout=self._patience):
                return True
            self._successors.setdefault(lock, threading.RLock())

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
    return threading.RLock() if (3, 11) <= sys.version_info < (3, 13) else RecoveringLock()


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

    def __contains__(self, thing: object) -> bool:
        return weakref.ref(thing) in self._references

    def all(self) -> list[_T]:
        """Return those that live."""
        # The copy is made in one step, whichever threads add and discard.
        found = [reference() for reference in self._references.copy()]
        return [thing for thing in found if thing is not None]


#: What a child of a fork must renew: its locks, and what belongs to threads.
_forkable: Living[Any] = Living()


def renew_in_child(thing: Any) -> None:
    """Have ``thing.after_fork()`` called in each child, for as long as it lives."""
    _forkable.add(thing)


class Guarded:
    """What has a lock of its own, which a forked child gets anew."""

    def __init__(self) -> None:
        # Re-entrant: a signal handler may come here while its thread is here.
        self._lock = new_lock()
        renew_in_child(self)

    def after_fork(self) -> None:
        """In the child: a lock that no thread holds, for the parent's thread may hold it."""
        self._lock = new_lock()


def at_fork(after_in_child: Callable[[], object], **others: Callable[[], object]) -> None:
    """Have functions called at each fork, as by ``os.register_at_fork``.

    :param after_in_child: must do without ``before``, which C's forks do not have.
    """
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=after_in_child, **others)
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
    for do in _in_child.copy():
        try:
            do()
        except Exception:
            complain("After a fork something could not be renewed")


def _is_home() -> None:
    global _home
    _home = os.getpid()
    # The thread that forks may be a worker's in the parent.
    _here.worker = None


def _renew() -> None:
    for thing in _forkable.all():
        try:
            thing.after_fork()
        except Exception:
            complain("After a fork %r could not be renewed", thing)


at_fork(_is_home)
at_fork(_renew)
watch_uwsgi()


class _Life:
    """One run of a worker. It ends with the frame that alone refers to it."""

    __slots__ = ("__weakref__", "_bell", "ident", "over", "steps")

    def __init__(self, steps: float) -> None:
        #: How many steps it may yet make.
        self.steps = steps
        #: Its thread; 0 before that has begun.
        self.ident = 0
        #: It makes no more steps, or was never begun.
        self.over = False
        self._bell = threading.Lock()
        self._bell.acquire()

    def ring(self) -> None:
        """Have it look once more, now or as soon as its step is done."""
        try:
            self._bell.release()
        except RuntimeError:
            # It has yet to take the last one.
            pass

    def wait(self, seconds: float) -> None:
        """Wait until somebody rings, at most ``seconds``."""
        self._bell.acquire(timeout=min(seconds, LOOK_AGAIN))


_here = threading.local()
_exit = types.SimpleNamespace(is_over=False)


def current_worker() -> Worker | None:
    """Return the worker whose background thread the caller is, if it is one."""
    return getattr(_here, "worker", None)


class Worker(Guarded):
    """A piece of work, :meth:`step` by step, that a background thread does while there is some.

    :param purpose: what the thread is for, for the log: ``for trials``.
    :param otherwise: what becomes of its work while no thread can be started.
    """

    #: Whether the process's end waits for a step that has begun.
    finishes = False

    def __init__(self, purpose: str, otherwise: str = "") -> None:
        super().__init__()
        self._purpose, self._otherwise = purpose, otherwise
        self._life: weakref.ref[_Life] | None = None
        #: Logs the exception that is handled, once a minute for each message; raises nothing.
        self.complain = Complaints()
        _workers.add(self)

    def step(self) -> float | None:
        """Do what is due; return the seconds until there is more, None if nothing is left."""
        raise NotImplementedError

    def is_needed(self) -> bool:
        """Return whether there is work, now or later. Never blocks."""
        raise NotImplementedError

    @property
    def is_running(self) -> bool:
        """Whether a thread does the work."""
        return self._running is not None

    @property
    def is_here(self) -> bool:
        """Whether the caller's thread does the work."""
        life = self._running
        # A thread that has ended leaves its number to another.
        return life is not None and life.ident == _thread.get_ident()

    def wake(self) -> None:
        """Have the thread look now; start it if there is need of one. Never blocks."""
        life = self._running
        if life is not None:
            life.ring()
        elif self.is_needed():
            self.start()

    def start(self) -> None:
        """Start a thread; wake the one that runs, if one does. Never blocks."""
        life = _Life(math.inf)
        try:
            if self._claim(life):
                _thread.start_new_thread(self._run, (life,))
        except RuntimeError:
            # "can't start new thread", or the interpreter is on its way out.
            life.over = True
            self.complain(f"No thread could be started {self._purpose}{self._otherwise}")
        except BaseException:
            life.over = True
            raise

    def after_fork(self) -> None:
        super().after_fork()
        self._life = None

    @property
    def _running(self) -> _Life | None:
        life = None if self._life is None else self._life()
        return None if life is None or life.over else life

    def _claim(self, life: _Life) -> bool:
        """Make ``life`` the one that runs; if there is one already, wake that."""
        # Guards who runs: of those that come at once, one does.
        with self._lock:
            running = self._running
            if running is None:
                self._life = weakref.ref(life)
                return True
        # It may have looked before our work was there.
        running.ring()
        return False

    def _work_here(self, steps: float) -> None:
        """Do so many steps here, if no thread does the work; leave the rest to a thread."""
        life = _Life(steps)
        try:
            life.ident = _thread.get_ident()
            if self._claim(life):
                self._go_on(life, self.step)
        finally:
            # Code that keeps an exception keeps this frame, and with it the life.
            life.over = True

    def _run(self, life: _Life) -> None:
        try:
            _here.worker = self
            life.ident = _thread.get_ident()
            self._go_on(life, self._guarded_step)
        finally:
            life.over = True

    def _go_on(self, life: _Life, step: Callable[[], float | None]) -> None:
        try:
            # After a fork within a step this may be the child, which has no life.
            while life.steps > 0 and self._running is life and _may_begin():
                life.steps -= 1
                pause = step()
                if pause is None:
                    break
                if pause > 0:
                    life.wait(pause)
        finally:
            life.over = True
            # Work that came before that line was left to this thread.
            known = self._life
            if known is not None and known() is life and self.is_needed() and _may_begin():
                self.start()

    def _guarded_step(self) -> float | None:
        try:
            return self.step()
        except BaseException:
            # SystemExit from somebody's code, too, ends this step and no more.
            self.complain(f"The thread {self._purpose} met an error and goes on")
            return LOOK_AGAIN


_workers: Living[Worker] = Living()


def _may_begin() -> bool:
    # The main thread is not cut off.
    return not _exit.is_over or threading.current_thread() is threading.main_thread()


@atexit.register
def finish() -> None:
    """Wait until no step runs that must not be cut off, and let no thread make another.

    At the process's end, :data:`AT_EXIT` at most. Work in the main thread goes on.
    """
    until = time.monotonic() + AT_EXIT
    # Twice: a thread may begin between the look at it and the mark.
    for _ in range(2):
        for worker in _workers.all():
            while worker.finishes and worker.is_running and time.monotonic() < until:
                time.sleep(0.002)
        _exit.is_over = True
