"""oracledb and cx_Oracle, by the number in the error's text (from Oracle's error manual)."""

from __future__ import annotations

import re

from ..faults import Fault
from .base import Driver

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


class Oracle(Driver):
    """oracledb and cx_Oracle. No option that both know bounds a connect."""

    MODULES = ("oracledb", "cx_Oracle")
    WATCHED = True

    def code_of(self, exc: BaseException) -> str | None:
        """Return the error's code without leading zeroes, such as ``ORA-1017``."""
        found = _CODE.search(str(exc))
        return f"{found.group(0).split('-')[0]}-{found.group(1)}" if found else None

    def fault(self, exc: BaseException, connecting: bool) -> Fault:
        code = self.code_of(exc)
        if code is None:
            return Fault.OTHER
        if connecting and code in _WHILE_CONNECTING:
            return _WHILE_CONNECTING[code]
        return _ALWAYS.get(code, Fault.OTHER)


oracle = Oracle()
