"""Django signals for what happens to the peers; docs/reference/signals.rst says what each is.

The sender is the load balancer, ``balancers["default"]``. The arguments are the
fields of an event (:mod:`django_proxysql.core.events`), with the balancer's name as
``alias``, and the event itself as ``event``. Until the first receiver is connected nothing listens.
"""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from typing import TYPE_CHECKING, Any

import django
from django.db import connections
from django.dispatch import Signal

from .core.dispatch import Dispatcher
from .core.events import Event
from .core.logger import logger
from .core.reports import REPORTS
from .core.runtime import current_worker
from .registry import balancers

__all__ = [row.signal for row in REPORTS.values() if row.signal]


class _PeerSignal(Signal):
    """Has the balancers' events sent from its first receiver on."""

    def connect(self, *args: Any, **kwargs: Any) -> None:
        """Connect a receiver; see :meth:`django.dispatch.Signal.connect`."""
        super().connect(*args, **kwargs)
        # Again each time: it changes nothing where that has been done.
        balancers.add_listener(_send, connects=False)


#: The signal of each class of event that has one, under its name in this module.
_SIGNALS = {row.event: _PeerSignal() for row in REPORTS.values() if row.signal}
globals().update({REPORTS[event].signal: signal for event, signal in _SIGNALS.items()})

if TYPE_CHECKING:
    # Their names stand in the table alone.
    def __getattr__(name: str) -> Signal: ...


class _Sending(threading.local):
    """Which signals the thread is in the middle of sending."""

    def __init__(self) -> None:
        self.signals: list[Signal] = []


_sending = _Sending()


def _send(event: Event) -> None:
    """Send the signal of an event, if it has one; a :class:`Listener`."""
    signal = _SIGNALS.get(type(event))
    # A receiver of peers_exhausted that asks the database finds no peer either:
    # to send it that would go on for ever.
    if signal is None or not signal.receivers or signal in _sending.signals:
        return
    # Not asdict(), which copies deeply.
    values = {field.name: getattr(event, field.name) for field in dataclasses.fields(event)}
    alias = values.pop("balancer")
    registered = balancers.known.get(alias)
    sender = registered.balancer if registered is not None else None
    _sending.signals.append(signal)
    try:
        responses = signal.send_robust(sender, alias=alias, event=event, **values)
    finally:
        _sending.signals.remove(signal)
        if isinstance(current_worker(), Dispatcher) and not _sending.signals:
            # What receivers have opened; a listener's own thread keeps nothing.
            connections.close_all()
    if django.VERSION < (4, 2):
        # Later ones log it themselves, to django.dispatch.
        for receiver, response in responses:
            if isinstance(response, Exception):
                logger.error("Receiver %r of a signal raised", receiver, exc_info=response)


def _runs_loop() -> bool:
    """Return whether the thread runs an event loop.

    There Django's ORM refuses, and an async receiver cannot be waited for.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


#: See :class:`~.core.dispatch.Dispatcher`.
_send._avoids = _runs_loop  # type: ignore[attr-defined]
