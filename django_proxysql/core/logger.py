"""The library's logger, and how to complain through it where nothing may be raised."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any

logger = logging.getLogger("django_proxysql")

#: Seconds between two complaints of one kind: what goes wrong may do so at each step.
COMPLAINTS_APART = 60.0


def log(level: int, message: str, *args: object, **options: Any) -> None:
    """Write a line, and raise nothing: the log handler itself may be what is broken.

    That must cost no connection, and end no thread.
    """
    try:
        logger.log(level, message, *args, **options)
    except Exception:  # noqa: S110
        pass


def complain(message: str, *args: object, extra: Mapping[str, object] | None = None) -> None:
    """Log the exception that is being handled, such as a listener's, and raise nothing."""
    log(logging.ERROR, message, *args, exc_info=True, extra=extra)


class Limit:
    """Lets one line of a kind through in a while, and counts those that it keeps back.

    Give each kind of line a limit of its own, or one kind hides the other.

    :param seconds: how far two lines lie apart at least.
    """

    __slots__ = ("_kept_back", "_last", "_seconds")

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._last = float("-inf")
        self._kept_back = 0

    def passes(self, now: float) -> int | None:
        """Return how many lines were kept back before this one; None: keep this one back, too."""
        if now - self._last < self._seconds:
            # Two threads may both come through, or lose a count: it is a log line.
            self._kept_back += 1
            return None
        kept_back, self._kept_back, self._last = self._kept_back, 0, now
        return kept_back


class Complaints:
    """Logs exceptions that are being handled, each message once a minute; raises nothing."""

    def __init__(self) -> None:
        self._limits: dict[str, Limit] = {}

    def __call__(self, message: str) -> None:
        limit = self._limits.setdefault(message, Limit(COMPLAINTS_APART))
        kept_back = limit.passes(time.monotonic())
        if kept_back is not None:
            complain("%s%s", message, f" (and {kept_back} times more)" if kept_back else "")
