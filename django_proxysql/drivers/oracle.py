"""oracledb and cx_Oracle, by the number in the error's text (from Oracle's error manual)."""

from __future__ import annotations

import re
from typing import Any

from ..faults import Fault
from .generic import (
    LEAVES,
    SPLITS,
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

MODULES = ("oracledb", "cx_Oracle")

#: Whether established connections are looked after: there is a server to lose.
WATCHED = True

_CODE = re.compile(r"\b(?:ORA|DPY|DPI)-0*(\d+)\b")

_WHILE_CONNECTING = {
    **dict.fromkeys(
        ("DPY-6005", "ORA-12541", "ORA-12514", "ORA-12170", "ORA-1033", "ORA-1034"),
        Fault.UNREACHABLE,
    ),
    "ORA-1017": Fault.REFUSED,
}
_ALWAYS = {
    **dict.fromkeys(("ORA-28", "ORA-3113", "ORA-3114", "ORA-3135", "DPY-4011"), Fault.LOST),
    **dict.fromkeys(("ORA-60", "ORA-8177"), Fault.CONFLICT),
}


def code_of(exc: BaseException) -> str | None:
    """Return the error's code without leading zeroes, such as ``ORA-1017``."""
    found = _CODE.search(str(exc))
    return f"{found.group(0).split('-')[0]}-{found.group(1)}" if found else None


def fault(exc: BaseException, connecting: bool) -> Fault:
    """Return what ``exc``, an error of this driver, says about the peer."""
    code = code_of(exc)
    if code is None:
        return Fault.OTHER
    if connecting and code in _WHILE_CONNECTING:
        return _WHILE_CONNECTING[code]
    return _ALWAYS.get(code, Fault.OTHER)


def connect_options(params: Any, seconds: float) -> dict[str, Any]:
    """Return what limits one attempt to ``seconds``: nothing that cx_Oracle knows too."""
    return {}


def trial_options(params: Any, seconds: float) -> dict[str, Any]:
    """Return nothing."""
    return {}
