"""What the engine adds to a statement: Python function calls, CPU time, time."""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from django.db import transaction

from tests.servers import Address
from tests.servers.mariadb import Node

from . import project
from .figures import Figure, Measured, in_cpu_time, in_time
from .project import READ, WRITE

SQLITE = "django.db.backends.sqlite3"
NULL = "tests.benchmarks.null"


def run(quick: bool = False) -> list[Figure]:
    """Count, then measure without a server, then on MariaDB."""
    figures = [*without_server(), *_cpu(20 if quick else 400)]
    with project.mariadb() as [node]:
        figures += counted_on_mariadb(node)
        figures += _on_mariadb(node, *((2, 6) if quick else (150, 18)))
    return figures


# Python function calls


def without_server() -> list[Figure]:
    """Count on SQLite and on the null driver, which need no server."""
    memory = {"NAME": ":memory:"}
    return [
        *_counted(
            "SQLite",
            {"ENGINE": SQLITE, **memory},
            {"ENGINE": project.ENGINE, "PEER_ENGINE": SQLITE, "PEERS": [memory] * 2},
        ),
        *_counted("no server", {"ENGINE": NULL}, project.null(2)),
    ]


def counted_on_mariadb(node: Address) -> list[Figure]:
    """Count on a server, through mysqlclient."""
    return _counted("MariaDB", project.plain(node), project.balanced([node] * 2))


def _counted(name: str, plain: dict[str, Any], engine: dict[str, Any]) -> list[Figure]:
    without, through = (calls_of_a_statement(project.wrapper(**one)) for one in (plain, engine))
    return [
        Figure(f"{name}: calls, plain engine", without),
        Figure(f"{name}: calls, engine", through),
        Figure(f"{name}: calls added", through - without, "", 2),
    ]


def calls_of_a_statement(connection: Any) -> int:
    """Return how many Python functions ``cursor.execute("SELECT 1")`` calls."""
    with connection.cursor() as cursor:
        # The first time something may be imported, compiled or cached.
        for _ in range(3):
            cursor.execute(READ)
            cursor.fetchall()
        calls = python_calls(lambda: cursor.execute(READ))
        cursor.fetchall()
    connection.close()
    return calls


def python_calls(function: Callable[[], Any]) -> int:
    """Return how many Python functions ``function`` calls, itself not counted."""
    calls = -1

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event == "call"

    before, collects = sys.getprofile(), gc.isenabled()
    # The finalizers of others' garbage are functions, too.
    gc.disable()
    sys.setprofile(count)
    try:
        function()
    finally:
        sys.setprofile(before)
        if collects:
            gc.enable()
    return calls


# CPU time


def _cpu(rounds: int) -> Iterator[Figure]:
    plain, engine = project.wrapper(ENGINE=NULL), project.wrapper(**project.null(2))
    for name, sql, limit in (("a read", READ, 1), ("an autocommit write", WRITE, 4)):
        yield from _added(name, plain, engine, sql, rounds, limit)
    with in_transaction(plain), in_transaction(engine):
        yield from _added("in a transaction", plain, engine, WRITE, rounds, 1)
    plain.close()
    engine.close()


def _added(
    name: str, plain: Any, engine: Any, sql: str, rounds: int, limit: float
) -> Iterator[Figure]:
    name = f"no server: CPU added, {name}"
    with plain.cursor() as one, engine.cursor() as other:
        kept = [functools.partial(cursor.execute, sql) for cursor in (one, other)]
        cpu = in_cpu_time(*kept, rounds=rounds, batch=200)
    yield Figure(name, cpu.added(0, 1) * 1e6, "us", limit)
    # As the ORM does it: a cursor is made for each statement, and closed.
    made = [functools.partial(project.execute, one, sql) for one in (plain, engine)]
    cpu = in_cpu_time(*made, rounds=rounds, batch=100)
    yield Figure(f"{name}, with its cursor", cpu.added(0, 1) * 1e6, "us")


@contextlib.contextmanager
def in_transaction(connection: Any) -> Iterator[None]:
    """Yield inside a transaction whose first statement is over: that one may be run again."""
    with transaction.atomic(using=connection.alias):
        project.execute(connection, WRITE)
        yield


# Time


def _on_mariadb(node: Node, rounds: int, turns: int) -> Iterator[Figure]:
    plain = project.plain(node)
    wrappers = [project.wrapper(**entry) for entry in (plain, plain, project.balanced([node] * 2))]
    with one_core_each(node):
        for name, sql, limit in (("a read", READ, 1.01), ("an autocommit write", WRITE, None)):
            wall = Measured(
                tuple(_round_on_new_connections(wrappers, sql, turns) for _ in range(rounds))
            )
            yield Figure(f"MariaDB: {name}, plain engine", wall.median(0) * 1e6, "us")
            yield Figure(f"MariaDB: {name}, plain engine / plain engine", wall.ratio(0, 1))
            yield Figure(f"MariaDB: {name}, engine / plain engine", wall.ratio(0, 2), "", limit)
    for connection in wrappers:
        connection.close()


def _round_on_new_connections(wrappers: Sequence[Any], sql: str, turns: int) -> tuple[float, ...]:
    """Return each wrapper's median. Connections differ among themselves: hence many rounds."""

    def statement(cursor: Any) -> None:
        cursor.execute(sql)
        cursor.fetchall()

    with contextlib.ExitStack() as stack:
        for connection in wrappers:
            # As a request ends: a connection after it has no writes to follow.
            connection.close_if_unusable_or_obsolete()
        cursors = [stack.enter_context(connection.cursor()) for connection in wrappers]
        statements = [functools.partial(statement, cursor) for cursor in cursors]
        wall = in_time(*statements, rounds=turns, batch=10)
    return tuple(wall.median(which) for which in range(len(wrappers)))


@contextlib.contextmanager
def one_core_each(node: Any) -> Iterator[None]:
    """Keep this thread on one core and the server on another, where there are two."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_setaffinity") else []
    if len(cores) < 2:
        yield
        return
    os.sched_setaffinity(0, cores[:1])
    try:
        # The server's threads to come take after the one that starts them.
        for thread in Path(f"/proc/{node.pid}/task").iterdir():
            with contextlib.suppress(OSError):
                os.sched_setaffinity(int(thread.name), cores[1:2])
        yield
    finally:
        os.sched_setaffinity(0, cores)
