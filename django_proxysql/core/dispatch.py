"""Telling a listener what has happened: one event after the other, in their order.

A thread that has an event puts it into the listener's queue (:meth:`Teller.put`), and then has the
queue told (:meth:`Teller.go`). A change of a circuit is put within the circuit's lock: the queue
has the order of the changes. One thread at a time tells: the first to come, and only what is there
when it comes. What others put meanwhile waits behind that, and a thread of the listener's own tells
it, which exists while there is something to tell. So no thread pays for the events of others. A
listener that hangs keeps its later events, the last :data:`MOST` of them, and no other listener's.

What other processes have found out is heard by the one thread that speaks with them, and what a
trial in the background has shown by the one that makes them (:func:`spare_this_thread`). A listener
that hangs there would end the sharing, or the trials. So those leave all telling to the listener's
own thread.

How it holds: whoever tells says first that it is over, tells nothing after that, and looks once
more: whoever added an event before saw it alive and is found, and whoever adds one later tells it.
Of those who would tell, one does: that is all the lock is for. A thread that was killed starts
another on its way out; killed there again, it is not alive, and the next event does.

At the interpreter's end the threads are cut off wherever they are. :func:`finish` waits for those
that are telling, five seconds at most, and lets none begin after that: what a listener has begun to
write is written.
"""

from __future__ import annotations

import _thread
import atexit
import math
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

from .logger import complain
from .runtime import new_lock

__all__ = ["Teller", "finish", "is_here", "is_spared", "spare_this_thread"]

#: How many events may wait for a listener that hangs.
MOST = 1000
#: Seconds for which the process's end waits for listeners that are being told something.
AT_EXIT = 5.0


class _Life:
    """Who tells: it ends with the frame that tells, whatever that is killed by."""

    __slots__ = ("__weakref__", "ident", "left", "over")

    def __init__(self, left: float) -> None:
        self.over = False
        #: How many events it has yet to tell.
        self.left = left
        self.ident = 0


class _Thread(threading.local):
    """What the caller's thread is."""

    tells = False
    is_spared = False


_thread_here = _Thread()


def is_here() -> bool:
    """Return whether the caller's thread is a teller's, which keeps nothing when it ends."""
    return _thread_here.tells


def spare_this_thread() -> None:
    """Have no listener told in the caller's thread, which others wait for."""
    _thread_here.is_spared = True


def is_spared() -> bool:
    """Return whether no listener is told in the caller's thread."""
    return _thread_here.is_spared


class Teller:
    """A listener, and what it has yet to be told.

    :param listener: may hang, and raise what it likes.
    :param name: whose events they are, for the log.
    :param complaint: what the log says where the listener raises, with a place for the name.
    """

    def __init__(
        self,
        listener: Callable[[Any], object],
        name: str,
        complaint: str = "A listener of %r raised",
    ) -> None:
        self.listener = listener
        self._name = name
        self._complaint = complaint
        #: What is to be told, and has not been begun.
        self.waiting: deque[Any] = deque(maxlen=MOST)
        # Re-entrant: a signal handler may come here while its thread is here.
        self._lock = new_lock()
        self._life: weakref.ref[_Life] | None = None
        _all.add(weakref.ref(self, _all.discard))

    @property
    def is_running(self) -> bool:
        """Whether the listener is being told something, in whichever thread."""
        running = self._running
        return running is not None and not running.over

    @property
    def is_free(self) -> bool:
        """Whether an event that has no place in the order of changes may be told at once.

        It waits behind what its own thread tells the listener, and behind changes that wait.
        """
        running = self._running
        if running is not None and not running.over:
            if running.ident == _thread.get_ident():
                # What a listener's own doing leads to.
                return True
            if running.left == math.inf:
                return False
        return not self.waiting

    def put(self, event: Any) -> None:
        """Have the listener told, when somebody calls :meth:`go`. Waits for nothing."""
        self.waiting.append(event)

    def go(self) -> None:
        """Have the listener told what waits: here, or where this thread is spared, in its own."""
        if not self.waiting:
            return
        if _thread_here.is_spared:
            self.leave()
            return
        life = self._claim(0)
        if life is not None:
            life.left = len(self.waiting)
            self._tell_waiting(life, Exception)

    def tell(self, event: Any) -> None:
        """Have the listener told of one event, soon and elsewhere. Waits for nothing."""
        self.put(event)
        self.leave()

    def complain(self) -> None:
        """Log what the listener raises, and raise nothing."""
        complain(self._complaint, self._name, extra={"alias": self._name})

    @property
    def _running(self) -> _Life | None:
        return None if self._life is None else self._life()

    def _claim(self, left: float) -> _Life | None:
        """Return the life of whoever tells from now on; None: somebody tells already."""
        life = _Life(left)
        try:
            with self._lock:
                running = self._running
                if running is not None and not running.over:
                    if running.ident == _thread.get_ident():
                        # What a listener's own doing leads to is told by who tells that.
                        running.left = max(running.left, len(self.waiting))
                    return None
                life.ident = _thread.get_ident()
                self._life = weakref.ref(life)
        except BaseException:
            # Code that keeps the exception keeps this frame, and with it the life.
            life.over = True
            raise
        return life

    def leave(self) -> None:
        """Have the listener told what waits, soon and elsewhere. Waits for nothing."""
        life = self._claim(math.inf)
        if life is None:
            return
        try:
            # Not the thread that starts it.
            life.ident = 0
            _thread.start_new_thread(self._run, (life,))
        except RuntimeError:
            life.over = True
            complain("No thread could be started to tell a listener of %r", self._name)
        except BaseException:
            life.over = True
            raise

    def _run(self, life: _Life) -> None:
        try:
            _thread_here.tells = True
            life.ident = _thread.get_ident()
            self._tell_waiting(life, BaseException)
        finally:
            life.over = True

    def _tell_waiting(self, life: _Life, swallowed: type[BaseException]) -> None:
        try:
            # After a fork within a listener this may be the child, which has another.
            while life.left > 0 and self._running is life and _may_begin():
                life.left -= 1
                try:
                    event = self.waiting.popleft()
                except IndexError:
                    break
                try:
                    self.listener(event)
                except swallowed:
                    self.complain()
        finally:
            life.over = True
            if self.waiting and _may_begin():
                # Added by somebody who may have seen us alive.
                self.leave()

    def after_fork(self) -> None:
        """In the child: no thread, and nothing of what the parent's has to tell."""
        self._lock = new_lock()
        self.waiting.clear()
        self._life = None


class _Exit:
    """How far the process's end is."""

    is_over = False


def _may_begin() -> bool:
    # The main thread is not cut off.
    return not _exit.is_over or threading.current_thread() is threading.main_thread()


_exit = _Exit()
_all: set[weakref.ref[Teller]] = set()


@atexit.register
def finish(seconds: float | None = None) -> None:
    """Wait until no listener is being told anything, and let none begin after that.

    At the process's end. Telling in the main thread goes on.

    :param seconds: how long to wait at most, for all of them together; None: :data:`AT_EXIT`.
    """
    until = time.monotonic() + (AT_EXIT if seconds is None else seconds)
    _wait_for_tellers(until)
    _exit.is_over = True
    # A thread that began between the two lines.
    _wait_for_tellers(until)


def _wait_for_tellers(until: float) -> None:
    for reference in _all.copy():
        teller = reference()
        while teller is not None and teller.is_running and time.monotonic() < until:
            time.sleep(0.002)
