"""Telling a listener what has happened, in a thread of its own where need be.

What other processes have found out is heard by the one thread that speaks with
them, and what a trial in the background has shown by the one that makes them. A
listener that hangs there would end the sharing, or the trials, and one that raises
SystemExit would, too. So each listener is told of that in a thread that does
nothing else, and exists while there is something to tell it: one event after the
other, in their order. What happens elsewhere meanwhile waits behind them, or a
listener would hear of a circuit that opened before it hears that it had closed.

How it holds: the thread says first that it is over, tells nothing after that, and
looks once more: whoever added an event before saw it alive and is found, and
whoever adds one later starts another. Of those who would start one, one does: that is
all the lock is for. A thread that was killed starts another on its way out; killed
there again, it is not alive, and the next event does. A listener that never returns
keeps its later events, of which the last :data:`MOST` are kept, and nobody else's.
"""

from __future__ import annotations

import _thread
import threading
import weakref
from collections import deque

from .events import Event, Listener
from .locks import new_lock
from .logger import complain

__all__ = ["Teller", "is_here"]

#: How many events may wait for a listener that hangs.
MOST = 1000


class _Life:
    """One thread's: it ends with the thread, whatever that is killed by."""

    __slots__ = ("__weakref__", "over")

    def __init__(self) -> None:
        self.over = False


class _Thread(threading.local):
    """What the caller's thread is."""

    tells = False


_thread_here = _Thread()


def is_here() -> bool:
    """Return whether the caller's thread is a teller's, which keeps nothing when it ends."""
    return _thread_here.tells


class Teller:
    """A listener of one balancer's, and what it has yet to be told.

    :param listener: may hang, and raise what it likes.
    :param name: the balancer's.
    """

    def __init__(self, listener: Listener, name: str) -> None:
        self.listener = listener
        self._name = name
        #: What is to be told in the thread, and has not been begun.
        self.waiting: deque[Event] = deque(maxlen=MOST)
        # Re-entrant: a signal handler may come here while its thread is here.
        self._lock = new_lock()
        self._life: weakref.ref[_Life] | None = None

    def tell(self, event: Event) -> None:
        """Have the listener called, soon and elsewhere. Waits for nothing."""
        self.waiting.append(event)
        self._start()

    def complain(self) -> None:
        """Log what the listener raises, and raise nothing."""
        complain("A listener of %r raised", self._name, extra={"alias": self._name})

    @property
    def _running(self) -> _Life | None:
        return None if self._life is None else self._life()

    def _start(self) -> None:
        life = _Life()
        try:
            with self._lock:
                running = self._running
                if running is not None and not running.over:
                    return
                self._life = weakref.ref(life)
            _thread.start_new_thread(self._run, (life,))
        except RuntimeError:
            # Whoever keeps the exception keeps this frame, and with it the life.
            life.over = True
            complain("No thread could be started to tell a listener of %r", self._name)
        except BaseException:
            life.over = True
            raise

    def _run(self, life: _Life) -> None:
        try:
            _thread_here.tells = True
            # After a fork within a listener this may be the child, which has another.
            while self._running is life:
                try:
                    event = self.waiting.popleft()
                except IndexError:
                    break
                try:
                    self.listener(event)
                except BaseException:
                    self.complain()
        finally:
            life.over = True
            if self.waiting:
                # Added by somebody who may have seen us alive.
                self._start()

    def after_fork(self) -> None:
        """In the child: no thread, and nothing of what the parent's has to tell."""
        self._lock = new_lock()
        self.waiting.clear()
        self._life = None
