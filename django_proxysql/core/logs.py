"""Events as log lines of the logger ``django_proxysql``, by the table of :mod:`.reports`.

One line for what an operator must know, however many threads saw it: the
event of a circuit that opens is emitted once, by the thread that opened it.
Every record carries ``alias``, ``peer``, ``fault``, ``duration`` (seconds) and
the like as attributes where they apply, for structured logging.
"""

from __future__ import annotations

import re
import time
from typing import Any

from .events import Event
from .faults import Fault
from .logger import Limit, logger
from .reports import REPORTS, Limited, Line, fits

#: What structured logging gets of an event: the record's attribute, the event's field.
_EXTRA = (
    ("alias", "balancer"),
    ("peer", "peer"),
    ("address", "address"),
    ("successor", "successor"),
    ("fault", "fault"),
    ("duration", "seconds"),
)

#: Numbers, and ids of hexadecimal digits: each request to a token service may have one of its own.
_NUMBERS = re.compile(r"\b[0-9a-fA-F-]{8,}\b|\d+")

#: A limit for each line of the table and what it is limited by, with the last line's error:
#: one kind of line never hides another.
_limits: dict[tuple[object, ...], tuple[str, Limit]] = {}


def log_event(event: Event) -> None:
    """Write ``event`` to the logger ``django_proxysql``; a :class:`Listener`."""
    for line in REPORTS[type(event)].lines:
        if fits(event, line.when):
            # Each connect comes by here: ask before building anything.
            if not logger.isEnabledFor(line.level):
                return
            kept_back = 0 if line.limited is None else _kept_back(event, line, line.limited)
            if kept_back is not None:
                logger.log(line.level, line.text, _values(event, kept_back), extra=_extra(event))
                return


def _kept_back(event: Any, line: Line, limited: Limited) -> int | None:
    """Return how many such lines were kept back before this one; None: so is this one."""
    key = (line.text, *(getattr(event, field) for field in limited.per))
    error = _NUMBERS.sub("#", event.error) if limited.new_error_passes else ""
    last, limit = _limits.get(key, ("", None))
    if limit is None or last != error:
        limit = Limit(limited.seconds)
        _limits[key] = (error, limit)
    return limit.passes(time.monotonic())


def _values(event: Any, kept_back: int) -> dict[str, Any]:
    """Return what a line's text may name: the event's fields, and words made of them."""
    values = dict(vars(event))
    if "seconds" in values:
        values["milliseconds"] = values["seconds"] * 1000
    if "error" in values:
        # Half-opened by hand, a circuit has none.
        values["because"] = f": {values['error']}" if values["error"] else ""
    if "trial_in" in values:
        trial_in = values["trial_in"]
        values["first_trial"] = (
            "no trial while it is drained"
            if trial_in is None
            else f"first trial {due_in(trial_in)}"
        )
    fault = values.get("fault")
    if isinstance(fault, Fault):
        kind = "settings, or this process" if fault is Fault.LOCAL else fault.value
        values["kind"] = f"{kind}, trial" if values.get("trial") else kind
    values["more"] = f" (and {kept_back} more)" if kept_back else ""
    return values


def _extra(event: Any) -> dict[str, Any]:
    extra = {name: getattr(event, field) for name, field in _EXTRA if hasattr(event, field)}
    fault = extra.get("fault")
    if isinstance(fault, Fault):
        extra["fault"] = fault.value
    return extra


def due_in(seconds: float) -> str:
    """Return in words when something is due: ``now``, ``in 0.4 s``, ``in 28 s``."""
    if seconds < 0.05:
        return "now"
    return f"in {seconds:.1f} s" if seconds < 1 else f"in {seconds:.0f} s"
