"""A statement costs what it costs without the engine, in Python function calls."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from tests.servers.mariadb import Node

from . import project
from .figures import Figure

SQLITE = "django.db.backends.sqlite3"


def run() -> list[Figure]:
    """Count on SQLite and on MariaDB."""
    figures = sqlite()
    with Node("mariadb") as node:
        node.set_up()
        return figures + _counted(
            "MariaDB",
            project.wrapper("plain_mariadb", **project.plain(node)),
            project.wrapper("mariadb", **project.balanced([node] * 2)),
        )


def sqlite() -> list[Figure]:
    """Count on SQLite alone, which needs no server."""
    peers = [{"NAME": ":memory:"}] * 2
    return _counted(
        "SQLite",
        project.wrapper("plain_sqlite", ENGINE=SQLITE, NAME=":memory:"),
        project.wrapper("sqlite", ENGINE=project.ENGINE, PEER_ENGINE=SQLITE, PEERS=peers),
    )


def _counted(name: str, plain: Any, engine: Any) -> list[Figure]:
    without, through = calls_of_a_statement(plain), calls_of_a_statement(engine)
    return [
        Figure(f"{name}: plain engine", without, "calls"),
        Figure(f"{name}: engine", through, "calls"),
        Figure(f"{name}: added", through - without, "calls", 2),
    ]


def calls_of_a_statement(connection: Any) -> int:
    """Return how many Python functions ``cursor.execute("SELECT 1")`` calls."""
    with connection.cursor() as cursor:
        # The first time something may be imported, compiled or cached.
        for _ in range(3):
            cursor.execute("SELECT 1")
            cursor.fetchall()
        calls = python_calls(lambda: cursor.execute("SELECT 1"))
        cursor.fetchall()
    connection.close()
    return calls


def python_calls(function: Callable[[], Any]) -> int:
    """Return how many Python functions ``function`` calls, itself not counted."""
    calls = -1

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event == "call"

    sys.setprofile(count)
    try:
        function()
    finally:
        sys.setprofile(None)
    return calls
