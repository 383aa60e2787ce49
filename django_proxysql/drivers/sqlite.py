"""sqlite3: no server, but files can be missing, foreign or read-only all the same."""

from __future__ import annotations

import re
from typing import Any

from ..faults import Fault
from .generic import (
    LEAVES,
    SPLITS,
    code_of,
    ends_its_cursors,
    fileno,
    greeting,
    in_transaction,
    is_answer,
    is_at_rest,
    is_busy,
    is_closed,
    is_in_step,
    is_killed_connection,
    is_option_error,
    is_read_only_refusal,
    is_unbuffered,
    is_usual,
    known_options,
    leads_to,
    leave,
    may_be_busy,
    outcome_is_unknown,
    ping,
    proves_not_run,
    question_of,
    sent,
    session_options,
    socket_options,
    status,
)

__all__ = [
    "LEAVES",
    "SPLITS",
    "WATCHED",
    "code_of",
    "connect_options",
    "ends_its_cursors",
    "fault",
    "fileno",
    "greeting",
    "in_transaction",
    "is_answer",
    "is_at_rest",
    "is_busy",
    "is_closed",
    "is_in_step",
    "is_killed_connection",
    "is_option_error",
    "is_read_only_refusal",
    "is_unbuffered",
    "is_usual",
    "known_options",
    "leads_to",
    "leave",
    "may_be_busy",
    "outcome_is_unknown",
    "ping",
    "proves_not_run",
    "question_of",
    "sent",
    "session_options",
    "socket_options",
    "status",
    "trial_options",
]

MODULES = ("sqlite3", "pysqlite3")

#: Whether established connections are looked after: there is a server to lose.
WATCHED = False

_BY_TEXT = (
    (re.compile("unable to open database file|disk I/O error"), Fault.UNREACHABLE),
    (re.compile("file is not a database|file is encrypted"), Fault.REFUSED),
    (re.compile("readonly"), Fault.NOT_READY),
    (re.compile("(?:database|table).* is locked"), Fault.CONFLICT),
)


def fault(exc: BaseException, connecting: bool) -> Fault:
    """Return what ``exc``, an error of this driver, says about the peer."""
    text = str(exc)
    for pattern, meaning in _BY_TEXT:
        if pattern.search(text):
            return meaning
    return Fault.OTHER


def connect_options(params: Any, seconds: float) -> dict[str, Any]:
    """Return nothing: sqlite3's ``timeout`` is the wait for locks, another matter."""
    return {}


def trial_options(params: Any, seconds: float) -> dict[str, Any]:
    """Return nothing."""
    return {}
