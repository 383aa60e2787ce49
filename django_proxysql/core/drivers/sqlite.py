"""sqlite3: no server, but files can be missing, foreign or read-only all the same."""

from __future__ import annotations

import re

from ..faults import Fault
from .base import Driver

_BY_TEXT = (
    (re.compile("unable to open database file|disk I/O error"), Fault.UNREACHABLE),
    (re.compile("file is not a database|file is encrypted"), Fault.REFUSED),
    (re.compile("readonly"), Fault.NOT_READY),
    (re.compile("(?:database|table).* is locked"), Fault.CONFLICT),
)


class SQLite(Driver):
    """sqlite3. Its ``timeout`` is the wait for locks, and bounds no connect."""

    MODULES = ("sqlite3", "pysqlite3")

    def fault(self, exc: BaseException, connecting: bool) -> Fault:
        text = str(exc)
        for pattern, meaning in _BY_TEXT:
            if pattern.search(text):
                return meaning
        return Fault.OTHER


sqlite = SQLite()
