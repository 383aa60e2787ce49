"""MySQL Connector/Python, whose connections are not looked after: only connecting is bounded.

Its errors have the server's codes, and others than mysqlclient for what it finds out itself.
"""

from __future__ import annotations

import math
from typing import Any

from ..faults import Fault
from .base import Driver
from .mysql import mysql

#: Its option, and the name that it takes for the same.
_TIMEOUTS = ("connection_timeout", "connect_timeout")


def _as_of_mysqlclient(exc: BaseException) -> BaseException:
    # Its text is the second argument, mysqlclient's the last.
    return Exception(*exc.args[:2])


class MySQLConnector(Driver):
    """MySQL Connector/Python."""

    MODULES = ("mysql.connector",)
    SPLITS = True

    def fault(self, exc: BaseException, connecting: bool) -> Fault:
        names = {cls.__name__ for cls in type(exc).__mro__}
        if names & {"ConnectionTimeoutError", "ReadTimeoutError", "WriteTimeoutError"}:
            # Its own, with a code of the server's for a statement that took too long.
            return Fault.UNREACHABLE if connecting else Fault.OTHER
        meaning = mysql.fault(_as_of_mysqlclient(exc), connecting)
        return super().fault(exc, connecting) if meaning is Fault.OTHER else meaning

    def code_of(self, exc: BaseException) -> int | None:
        return mysql.code_of(exc)

    def may_be_busy(self, exc: BaseException) -> bool:
        return mysql.may_be_busy(_as_of_mysqlclient(exc))

    def connect_options(self, params: Any, seconds: float) -> dict[str, Any]:
        """Return what limits one attempt to ``seconds``, where ``params`` does not.

        Whole seconds, at least one. It covers the handshake, and each wait for an answer of it.
        """
        if any(name in params for name in _TIMEOUTS):
            return {}
        return {"connection_timeout": max(1, math.ceil(seconds))}

    def leads_to(self, connection: Any) -> tuple[str, str] | None:
        """Return the host and port that a connection was opened to; None for a unix socket."""
        if getattr(connection, "unix_socket", None):
            return None
        host = getattr(connection, "server_host", None)
        return (host, str(connection.server_port)) if isinstance(host, str) and host else None


mysql_connector = MySQLConnector()
