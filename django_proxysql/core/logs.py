"""Events as log lines of the logger ``django_proxysql``.

One line for what an operator must know, however many threads saw it: the
event of a circuit that opens is emitted once, by the thread that opened it.
Every record carries ``alias``, ``peer``, ``fault``, ``duration`` (seconds) and
the like as attributes where they apply, for structured logging.
"""

from __future__ import annotations

import logging
import re
import time

from .events import (
    CircuitClosed,
    CircuitOpened,
    Connected,
    ConnectFailed,
    ConnectionLost,
    ConnectionReplaced,
    Event,
    PeerDrained,
    PeersExhausted,
    PeerUndrained,
    StatementReplayed,
)
from .faults import Fault
from .logger import Limit, logger

__all__ = ["due_in", "log_event"]


def log_event(event: Event) -> None:
    """Write ``event`` to the logger ``django_proxysql``; a :class:`Listener`."""
    if isinstance(event, Connected):
        # Each connect comes by here: ask before building anything.
        if logger.isEnabledFor(logging.DEBUG):
            _log(
                logging.DEBUG,
                event,
                "%s: connected to %s (%s) in %.1f ms%s",
                event.balancer,
                event.peer,
                event.address,
                event.seconds * 1000,
                " (trial)" if event.trial else "",
            )
    elif isinstance(event, CircuitOpened):
        refused = event.fault is Fault.REFUSED
        level = logging.ERROR if refused else logging.WARNING
        said = ("the peer refuses us, " if refused else "") + event.error
        _log(
            # The process that found it out has warned.
            logging.INFO if event.learnt else level,
            event,
            "%s: circuit of %s (%s) opened%s, %s%s",
            event.balancer,
            event.peer,
            event.address,
            ", another process found" if event.learnt else "",
            "no trial while it is drained"
            if event.trial_in is None
            else f"first trial {due_in(event.trial_in)}",
            # Half-opened by hand, it has none.
            f": {said}" if said else "",
        )
    elif isinstance(event, CircuitClosed):
        _log(
            logging.INFO,
            event,
            "%s: circuit of %s (%s) closed%s, the peer was out for %.1f s",
            event.balancer,
            event.peer,
            event.address,
            ", another process found" if event.learnt else "",
            event.seconds,
        )
    elif isinstance(event, ConnectFailed):
        # Below fail_max no circuit opens to speak of it, and a password that
        # is wrong does not get better by being tried again.
        first_refusal = event.fault is Fault.REFUSED and event.count == 1 and not event.opened
        ours = event.fault is Fault.LOCAL and _is_new(event)
        _log(
            logging.ERROR if first_refusal or ours else logging.DEBUG,
            event,
            "%s: connecting to %s (%s) failed (%s%s): %s",
            event.balancer,
            event.peer,
            event.address,
            "settings, or this process" if event.fault is Fault.LOCAL else event.fault.value,
            ", trial" if event.trial else "",
            event.error,
        )
    elif isinstance(event, (ConnectionReplaced, StatementReplayed)):
        _log_rescue(event)
    elif isinstance(event, ConnectionLost):
        _log(
            logging.DEBUG,
            event,
            "%s: a connection to %s (%s) is lost%s: %s",
            event.balancer,
            event.peer,
            event.address,
            " (idle)" if event.idle else "",
            event.error,
        )
    elif isinstance(event, (PeerDrained, PeerUndrained)):
        _log(
            logging.INFO,
            event,
            "%s: %s (%s) is drained%s",
            event.balancer,
            event.peer,
            event.address,
            f", {event.connections} connections are to leave it"
            if isinstance(event, PeerDrained)
            else " no longer",
        )
    elif isinstance(event, PeersExhausted):
        _log(logging.DEBUG, event, "%s", event.error)


#: One limit for each alias and kind of line: one kind never hides another.
_rescues: dict[tuple[str, type], Limit] = {}
#: What was wrong on this side for each peer, and one limit for each: every connect may meet it.
_ours: dict[tuple[str, str], tuple[str, Limit]] = {}
#: Numbers, and ids of hexadecimal digits: each request to a token service may have one of its own.
_NUMBERS = re.compile(r"\b[0-9a-fA-F-]{8,}\b|\d+")


def _is_new(event: ConnectFailed) -> bool:
    """Return whether the last minute's log does not say so already."""
    key = (event.balancer, event.peer)
    said = _NUMBERS.sub("#", event.error)
    error, limit = _ours.get(key, ("", None))
    if limit is None or error != said:
        limit = Limit(60)
        _ours[key] = (said, limit)
    return limit.passes(time.monotonic()) is not None


def _log_rescue(event: ConnectionReplaced | StatementReplayed) -> None:
    """Say that something was saved; at most once a second, for a dying peer saves many."""
    if isinstance(event, ConnectionReplaced) and not event.forced:
        _log(
            logging.DEBUG,
            event,
            "%s: left %s for %s",
            event.balancer,
            event.peer,
            event.successor,
        )
        return
    limit = _rescues.setdefault((event.balancer, type(event)), Limit(1))
    kept_back = limit.passes(time.monotonic())
    if kept_back is None:
        return
    replayed = isinstance(event, StatementReplayed)
    _log(
        logging.WARNING,
        event,
        "%s: %s from %s to %s%s: %s",
        event.balancer,
        "ran a statement again," if replayed else "replaced a lost connection,",
        event.peer,
        event.successor,
        f" (and {kept_back} more)" if kept_back else "",
        event.error,
    )


def due_in(seconds: float) -> str:
    """Return in words when something is due: ``now``, ``in 0.4 s``, ``in 28 s``."""
    if seconds < 0.05:
        return "now"
    return f"in {seconds:.1f} s" if seconds < 1 else f"in {seconds:.0f} s"


#: What structured logging gets of an event: the record's attribute, the event's field.
_EXTRA = (
    ("alias", "balancer"),
    ("peer", "peer"),
    ("address", "address"),
    ("successor", "successor"),
    ("fault", "fault"),
    ("duration", "seconds"),
)


def _log(level: int, event: Event, message: str, *args: object) -> None:
    extra = {name: getattr(event, field) for name, field in _EXTRA if hasattr(event, field)}
    fault = extra.get("fault")
    if isinstance(fault, Fault):
        extra["fault"] = fault.value
    logger.log(level, message, *args, extra=extra)
