"""Connects to nothing, at once or after ``OPTIONS["seconds"]``, and answers every statement.

Everything above the driver is Django's own for MySQL, and the engine takes the driver for
mysqlclient. Each connection shows the same quiet TCP socket, so that a look at it costs what it
costs on a real connection.
"""

from __future__ import annotations

import functools
import socket
import threading
import time
import types
from typing import Any

import MySQLdb
from django.db.backends.mysql import base

_making = threading.Lock()


def quiet_socket() -> tuple[socket.socket, socket.socket]:
    """Return two ends of a TCP connection on which nothing is ever said."""
    # Threads that come at once must not each make one, of which all but the
    # last are closed again.
    with _making:
        return _quiet_socket()


@functools.cache
def _quiet_socket() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        here = socket.create_connection(listener.getsockname())
        return here, listener.accept()[0]


class Cursor:
    """Runs any statement at once, with one row."""

    rowcount = 1
    lastrowid = None

    def execute(self, query: Any, args: Any = None) -> int:
        """Do nothing."""
        return 1

    def fetchall(self) -> tuple[tuple[int]]:
        """Return the row."""
        return ((1,),)

    def close(self) -> None:
        """Do nothing."""


class Connection:
    """What the null driver's connect() returns."""

    def __init__(self) -> None:
        self._descriptor = quiet_socket()[0].fileno()

    def fileno(self) -> int:
        """Return the quiet socket's descriptor."""
        return self._descriptor

    def cursor(self) -> Cursor:
        """Return a cursor."""
        return Cursor()

    def autocommit(self, on: bool) -> None:
        """Do nothing, and so for the rest."""

    commit = rollback = ping = close = lambda self: None


def connect(host: str = "", seconds: float = 0.0, **ignored: Any) -> Connection:
    """Return a connection to nothing, after ``seconds`` of waiting."""
    if seconds:
        time.sleep(seconds)
    return Connection()


class Database(types.ModuleType):
    """The null driver's module: mysqlclient's name and errors, another connect()."""

    connect = staticmethod(connect)

    def __getattr__(self, name: str) -> Any:
        return getattr(MySQLdb, name)


class DatabaseWrapper(base.DatabaseWrapper):
    """Django's wrapper for MySQL, to the null driver."""

    Database = Database("MySQLdb")

    def get_connection_params(self) -> dict[str, Any]:
        settings = self.settings_dict
        return {"host": settings["HOST"], **settings["OPTIONS"]}

    def get_new_connection(self, conn_params: dict[str, Any]) -> Any:
        return self.Database.connect(**conn_params)

    def init_connection_state(self) -> None:
        # What Django sends to a server, without asking it for its version first.
        with self.cursor() as cursor:
            cursor.execute("SET SQL_AUTO_IS_NULL = 0")
