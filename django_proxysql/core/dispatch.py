"""The dispatcher: each listener is notified of one event after the other, in their order.

A thread that has an event puts it into the listener's queue (:meth:`Dispatcher.put`), and then has
the queue delivered (:meth:`Dispatcher.notify`). A change of a circuit is put within the circuit's
lock: the queue has the order of the changes. One thread at a time delivers: the first to come, and
only what is there when it comes. What others put meanwhile is delivered by a thread of the
listener's own, so no thread pays for the events of others. A listener that hangs keeps its later
events, the last :data:`MOST` of them, and no other listener's.

The thread that speaks with other processes, and the one that makes trials, deliver nothing: a
listener that hangs there would end the sharing, or the trials.
"""

from __future__ import annotations

import _thread
import math
from collections import deque
from collections.abc import Callable
from contextlib import ContextDecorator
from typing import Any

from .config import function
from .events import Connected, Event, Listener
from .logger import complain
from .runtime import Guarded, Worker, current_worker

#: How many events may wait for a listener that hangs.
MOST = 1000


def must_not_wait() -> bool:
    """Return whether others wait for the caller's thread: it calls no listener."""
    worker = current_worker()
    return worker is not None and not isinstance(worker, Dispatcher)


class Dispatcher(Worker):
    """A listener, and the events that it has yet to be called with.

    :param listener: may hang, and raise what it likes.
    :param name: whose events they are, for the log.
    :param complaint: what the log says where the listener raises, with a place for the name.
    """

    #: What a listener has begun to write is written.
    finishes = True

    def __init__(
        self,
        listener: Callable[[Any], object],
        name: str,
        complaint: str = "A listener of %r raised",
    ) -> None:
        self.listener = listener
        #: Calls it, within whatever its calls need.
        self.call = listener
        self._avoids: Any = getattr(listener, "_avoids", None)
        self._name = name
        self._complaint = complaint
        #: The events whose delivery has not begun.
        self.waiting: deque[Any] = deque(maxlen=MOST)
        super().__init__(f"to notify a listener of {name!r}")

    def avoids(self) -> bool:
        """Return whether the listener is not to be called in this thread."""
        # An object that has every attribute avoids nothing.
        return self._avoids is not None and self._avoids() is True

    @property
    def is_free(self) -> bool:
        """Whether an event that has no place in the order of changes may be delivered at once.

        It waits behind what the listener's own thread delivers, and behind changes that wait.
        """
        running = self._running
        if running is not None:
            if running.ident == _thread.get_ident():
                # The listener's own doing leads to it.
                return True
            if running.steps == math.inf:
                return False
        return not self.waiting

    def put(self, event: Any) -> None:
        """Queue an event, once, until somebody calls :meth:`notify`. Never blocks."""
        if not any(known is event for known in self.waiting.copy()):
            self.waiting.append(event)

    def notify(self) -> None:
        """Deliver what waits: here, or in the listener's thread where this one must not wait."""
        if not self.waiting:
            return
        running = self._running
        if running is not None and running.ident == _thread.get_ident():
            # The listener's own doing leads to it: who delivers that delivers this.
            running.steps = max(running.steps, len(self.waiting))
        elif must_not_wait() or self.avoids():
            self.start()
        else:
            self._work_here(len(self.waiting))

    def leave(self) -> None:
        """Have what waits delivered by the listener's own thread."""
        if self.waiting:
            self.start()

    def is_needed(self) -> bool:
        return bool(self.waiting)

    def step(self) -> float | None:
        try:
            event = self.waiting.popleft()
        except IndexError:
            return None
        try:
            self.call(event)
        except Exception:
            self.complain_of_listener()
        except BaseException:
            if current_worker() is not self:
                # The caller's: it is interrupted.
                raise
            self.complain_of_listener()
        return 0.0

    def complain_of_listener(self) -> None:
        """Log what the listener raises, and raise nothing."""
        complain(self._complaint, self._name, extra={"alias": self._name})

    def after_fork(self) -> None:
        super().after_fork()
        self.waiting.clear()


class Listeners(Guarded):
    """The listeners of one balancer, logging among them.

    :param name: the balancer's, for the log.
    :param log: the one that writes the log.
    """

    def __init__(self, name: str, log: Listener) -> None:
        super().__init__()
        self._name = name
        self._log = Dispatcher(log, name)
        self.dispatchers: tuple[Dispatcher, ...] = (self._log,)
        #: Those, logging aside, that get each connection made.
        self.of_connects: tuple[Dispatcher, ...] = ()
        self._around: ContextDecorator | None = None

    def within(self, around: ContextDecorator) -> None:
        """Have each call of a listener within ``around``.

        Logging is a listener: its handlers may do what others do.
        """
        self._around = around
        self._log.call = around(self._log.listener)

    def add(self, listener: Listener, connects: bool) -> None:
        """Call ``listener`` with each event from now on. Adding it again changes nothing.

        :param connects: False: not with a :class:`~.events.Connected` that is no trial.
        """
        function("listener", listener, "Give a function that takes an event.")
        # Ours that only count say so. Each connect comes by there, and the look at all of the
        # thread's wrappers costs more than the counting.
        dispatcher = Dispatcher(listener, self._name)
        if self._around is not None and getattr(listener, "_counts_only", False) is not True:
            dispatcher.call = self._around(listener)
        # The lock guards the two tuples: of two threads that add, both are kept.
        with self._lock:
            if any(known.listener == listener for known in self.dispatchers):
                return
            self.dispatchers = (*self.dispatchers, dispatcher)
            if connects:
                self.of_connects = (*self.of_connects, dispatcher)

    def remove(self, listener: Listener) -> None:
        """Call ``listener`` no longer."""
        # The lock guards the two tuples, as in add().
        with self._lock:
            self.dispatchers = tuple(one for one in self.dispatchers if one.listener != listener)
            self.of_connects = tuple(one for one in self.of_connects if one.listener != listener)

    def emit(self, event: Event) -> None:
        """Call the listeners with ``event``. One that raises or hangs harms no circuit."""
        dispatchers = self.dispatchers
        is_usual = type(event) is Connected and not event.trial
        if is_usual:
            dispatchers = (self._log, *self.of_connects)
        # A listener that hangs must stop neither the trials nor the sharing.
        elsewhere = must_not_wait()
        for dispatcher in dispatchers:
            if dispatcher.is_free and not (elsewhere or dispatcher.avoids()):
                try:
                    if is_usual and dispatcher is self._log:
                        # Each connect comes by here, and mostly writes no line.
                        dispatcher.listener(event)
                    else:
                        dispatcher.call(event)
                except Exception:
                    dispatcher.complain_of_listener()
            else:
                dispatcher.put(event)
                dispatcher.notify()

    def put(self, event: Event) -> None:
        """Queue a change for the listeners, in its place: call it in the change's lock."""
        for dispatcher in self.dispatchers:
            dispatcher.put(event)

    def notify(self) -> None:
        """Call the listeners with the queued changes, whichever thread put them. Needs no lock."""
        try:
            for dispatcher in self.dispatchers:
                dispatcher.notify()
        except BaseException:
            self.leave()
            raise

    def leave(self) -> None:
        """Have what waits delivered by the listeners' own threads."""
        for dispatcher in self.dispatchers:
            dispatcher.leave()
