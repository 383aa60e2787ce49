"""Connections of mysqlclient and PyMySQL whose sessions begin with an isolation level.

The driver sends ``SET NAMES`` while it connects, and Django the level by a cursor of its own. One
statement does both: a round trip less, and no cursor. ProxySQL's parser and MaxScale's take it (by
their sources), as they take what Rails sends at each connect.
"""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Callable
from typing import Any

#: Django's own; what it is in Python is "utf8".
_CHARSET = "utf8mb4"


def opener(
    connect: Any,
    params: Any,
    level: str,
    is_mariadb: bool,
    is_answer: Callable[[BaseException], bool],
) -> type | None:
    """Return a class that connects as ``connect`` does, and sets the level.

    :param is_answer: whether an error is the server's answer.
    :returns: None for what stands before the driver: a pool's connections are connected already,
        and a tracer is to see the statement.
    """
    if (
        not _is_of_driver(connect, params)
        or params.get("charset") != _CHARSET
        or params.get("collation")
        # Before mysqlclient 2.1 Django takes this out of what it has opened.
        or params.get("conv", {}).get(bytes) is bytes
    ):
        return None
    return _opening(connect, level, is_mariadb, is_answer)


def _is_of_driver(connect: Any, params: Any) -> bool:
    if type(connect) is types.FunctionType:
        # A decorated one has the driver's name in __module__.
        return bool(connect.__globals__.get("__name__") == "MySQLdb")
    # PyMySQL's is a class. It runs an init_command after SET NAMES; before 1.1 it sends no such.
    return (
        type(connect) is type
        and connect.__module__ == "pymysql.connections"
        and hasattr(connect, "set_character_set")
        and "init_command" not in params
    )


@functools.cache
def _opening(
    connect: Any, level: str, is_mariadb: bool, is_answer: Callable[[BaseException], bool]
) -> type:
    theirs: Any = connect
    if type(connect) is types.FunctionType:
        from MySQLdb import connections

        theirs = connections.Connection
    # MariaDB has the other name since 11.1, and this one still.
    variable = "tx_isolation" if is_mariadb else "transaction_isolation"
    both = f"SET NAMES {_CHARSET}, @@SESSION.{variable} = '{level.replace(' ', '-')}'"

    class Connection(theirs):  # type: ignore[misc]
        __module__, __qualname__ = theirs.__module__, theirs.__qualname__

        #: Of no pool. To look for what is not there takes longer than to find it.
        _pool = None
        _is_set_up = False

        def set_character_set(self, *args: Any) -> None:
            """Set both when the driver calls it, while it connects; later what the caller says."""
            if self._is_set_up:
                super().set_character_set(*args)
                return
            self._is_set_up = True
            try:
                if not self._takes_both():
                    super().set_character_set(*args)
                    self.query(f"SET SESSION TRANSACTION ISOLATION LEVEL {level}")
            except BaseException:
                # The error's traceback holds us, and with us the socket.
                with contextlib.suppress(Exception):
                    self.close()
                raise

        def _takes_both(self) -> bool:
            """Set both by one statement, where the driver and the server take that."""
            # The driver has told the server in the handshake, and quotes texts by it?
            if self.character_set_name() != _CHARSET:
                return False
            try:
                self.query(both)
            except Exception as exc:
                if not is_answer(exc):
                    raise
                # Something in between does not know the statement: one by one, as Django does.
                return False
            self.encoding = "utf8"
            return True

    return Connection
