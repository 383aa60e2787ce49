"""Which listeners get a balancer's events, in which order."""

from __future__ import annotations

from .config import function
from .dispatch import Dispatcher, must_not_wait
from .events import Connected, Event, Listener
from .logs import log_event
from .runtime import new_lock

__all__ = ["Listeners"]


class Listeners:
    """The listeners of one balancer, logging among them.

    :param name: the balancer's, for the log.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._log = Dispatcher(log_event, name)
        self.dispatchers: tuple[Dispatcher, ...] = (self._log,)
        #: Those, logging aside, that get each connection made.
        self.of_connects: tuple[Dispatcher, ...] = ()
        # Re-entrant: a signal handler may come here while its thread is here.
        self._lock = new_lock()

    def add(self, listener: Listener, connects: bool) -> None:
        """Call ``listener`` with each event from now on. Adding it again changes nothing.

        :param connects: False: not with a :class:`~.events.Connected` that is no trial.
        :raises ConfigError: ``listener`` cannot be called.
        """
        function("listener", listener, "Give a function that takes an event.")
        dispatcher = Dispatcher(listener, self._name)
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
        if type(event) is Connected and not event.trial:
            dispatchers = (self._log, *self.of_connects)
        # A listener that hangs must stop neither the trials nor the sharing.
        elsewhere = must_not_wait()
        for dispatcher in dispatchers:
            if dispatcher.is_free and not elsewhere:
                try:
                    dispatcher.listener(event)
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
        dispatchers = self.dispatchers
        try:
            for dispatcher in dispatchers:
                dispatcher.notify()
        except BaseException:
            for dispatcher in dispatchers:
                if dispatcher.waiting:
                    dispatcher.start()
            raise

    def after_fork(self) -> None:
        """In the child: a lock that no thread holds, for the parent's thread may hold it."""
        self._lock = new_lock()
