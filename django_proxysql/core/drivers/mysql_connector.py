"""MySQL Connector/Python, whose connections are not looked after: only connecting is bounded.

Its errors have the server's codes, and others than mysqlclient for what it finds out itself.
"""

from __future__ import annotations

from typing import Any

from ..faults import Fault
from .base import Driver, is_a
from .mysql import mysql


def _as_of_mysqlclient(exc: BaseException) -> BaseException:
    # Its text is the second argument, mysqlclient's the last.
    return Exception(*exc.args[:2])


class MySQLConnector(Driver):
    """MySQL Connector/Python."""

    MODULES = ("mysql.connector",)
    SPLITS = True
    #: It covers the handshake, and each wait for an answer of it.
    TIMEOUTS = ("connection_timeout", "connect_timeout")

    def fault(self, exc: BaseException, connecting: bool) -> Fault:
        if is_a(exc, "ConnectionTimeoutError", "ReadTimeoutError", "WriteTimeoutError"):
            # Its own, with a code of the server's for a statement that took too long.
            return Fault.UNREACHABLE if connecting else Fault.OTHER
        meaning = mysql.fault(_as_of_mysqlclient(exc), connecting)
        return super().fault(exc, connecting) if meaning is Fault.OTHER else meaning

    def code_of(self, exc: BaseException) -> int | None:
        return mysql.code_of(exc)

    def may_be_busy(self, exc: BaseException) -> bool:
        return mysql.may_be_busy(_as_of_mysqlclient(exc))

    def leads_to(self, connection: Any) -> tuple[str, str] | None:
        if getattr(connection, "unix_socket", None):
            return None
        host = getattr(connection, "server_host", None)
        return (host, str(connection.server_port)) if isinstance(host, str) and host else None


mysql_connector = MySQLConnector()
