"""Telling listeners what a thread of our own has learnt, in another thread.

What other processes have found out is heard by the one thread that speaks with
them. A listener that hangs there would end the sharing, and one that raises
SystemExit would, too. So they are told in a thread that does nothing else, and
exists while there is something to tell: one event after the other, in their order.

How it holds: the thread says first that it is over and looks once more after
that, so that whoever added an event before saw it alive and is found, and whoever
adds one later starts another. A thread that was killed is not alive: the next
event starts another. No lock is held by anybody. A listener that never returns keeps
the later events, of which the last :data:`MOST` are kept, and nothing else.
"""

from __future__ import annotations

import _thread
import os
import weakref
from collections import deque
from collections.abc import Callable

from .events import Event
from .logger import complain

__all__ = ["Teller", "teller"]

#: How many events may wait for a listener that hangs.
MOST = 1000


class _Life:
    """One thread's: it ends with the thread, whatever that is killed by."""

    __slots__ = ("__weakref__", "over")

    def __init__(self) -> None:
        self.over = False


class Teller:
    """Hands events on, in a thread of its own."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[Callable[[Event], object], Event]] = deque(maxlen=MOST)
        self._life: weakref.ref[_Life] | None = None

    def tell(self, emit: Callable[[Event], object], event: Event) -> None:
        """Have ``emit(event)`` called, soon and elsewhere. Waits for nothing."""
        self._waiting.append((emit, event))
        running = None if self._life is None else self._life()
        if running is not None and not running.over:
            return
        life = _Life()
        self._life = weakref.ref(life)
        try:
            _thread.start_new_thread(self._run, (life,))
        except RuntimeError:
            # Whoever keeps the exception keeps this frame, and with it the life.
            life.over = True
            complain("No thread could be started to tell of what other processes have found")

    def _run(self, life: _Life) -> None:
        while self._waiting:
            self._tell_all()
            life.over = True
            if self._waiting:
                # Added by somebody who may have seen us alive.
                life.over = False

    def _tell_all(self) -> None:
        while True:
            try:
                emit, event = self._waiting.popleft()
            except IndexError:
                return
            try:
                emit(event)
            except BaseException:
                complain("A listener raised")

    def after_fork(self) -> None:
        """In the child: no thread, and nothing of what the parent's has to tell."""
        self._waiting.clear()
        self._life = None


#: This process's.
teller = Teller()

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=teller.after_fork)
