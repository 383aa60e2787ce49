"""What the engine adds to a statement: Python function calls, CPU time, time."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.servers.mariadb import Node

from . import project
from .figures import Figure, Measured, interleaved

SQLITE = "django.db.backends.sqlite3"
NULL = "tests.benchmarks.null"
READ = "SELECT 1"
WRITE = "UPDATE t SET n = n + 1 WHERE id = 1"


def run(quick: bool = False) -> list[Figure]:
    """Count, then measure without a server, then on MariaDB."""
    figures = [*without_server(), *_cpu(20 if quick else 400)]
    with Node("mariadb") as node:
        node.set_up()
        figures += counted_on_mariadb(node)
        figures += _on_mariadb(node, *((2, 6) if quick else (150, 18)))
    return figures


# Python function calls


def without_server() -> list[Figure]:
    """Count on SQLite and on the null driver, which need no server."""
    peers = [{"NAME": ":memory:"}] * 2
    return _counted(
        "SQLite",
        project.wrapper("plain_sqlite", ENGINE=SQLITE, NAME=":memory:"),
        project.wrapper("sqlite", ENGINE=project.ENGINE, PEER_ENGINE=SQLITE, PEERS=peers),
    ) + _counted(
        "no server",
        project.wrapper("plain_counted", ENGINE=NULL),
        project.wrapper("counted", **project.null(2)),
    )


def counted_on_mariadb(node: Node) -> list[Figure]:
    """Count on a server, through mysqlclient."""
    return _counted(
        "MariaDB",
        project.wrapper("plain_mariadb", **project.plain(node)),
        project.wrapper("mariadb", **project.balanced([node] * 2)),
    )


def _counted(name: str, plain: Any, engine: Any) -> list[Figure]:
    without, through = calls_of_a_statement(plain), calls_of_a_statement(engine)
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
    plain = project.wrapper("plain_cpu", ENGINE=NULL)
    engine = project.wrapper("cpu", **project.null(2))
    for name, sql, limit in (("a read", READ, 1), ("an autocommit write", WRITE, 4)):
        yield _added(f"no server: CPU added, {name}", plain, engine, sql, rounds, limit)
        yield _added_with_cursor(f"{name}, with its cursor", plain, engine, sql, rounds)
    with in_transaction(plain), in_transaction(engine):
        name = "in a transaction"
        yield _added(f"no server: CPU added, {name}", plain, engine, WRITE, rounds, 1)
        yield _added_with_cursor(f"{name}, with its cursor", plain, engine, WRITE, rounds)
    plain.close()
    engine.close()


def _added(
    name: str, plain: Any, engine: Any, sql: str, rounds: int, limit: float | None
) -> Figure:
    """``cursor.execute()`` alone, on a cursor that is kept."""
    with plain.cursor() as one, engine.cursor() as other:
        cpu = interleaved(
            lambda: one.execute(sql),
            lambda: other.execute(sql),
            rounds=rounds,
            batch=200,
            clock=time.process_time,
        )
    return Figure(name, cpu.added(0, 1) * 1e6, "us", limit)


def _added_with_cursor(name: str, plain: Any, engine: Any, sql: str, rounds: int) -> Figure:
    """As the ORM does it: a cursor is made for each statement, and closed."""
    cpu = interleaved(
        lambda: _run(plain, sql),
        lambda: _run(engine, sql),
        rounds=rounds,
        batch=100,
        clock=time.process_time,
    )
    return Figure(f"no server: CPU added, {name}", cpu.added(0, 1) * 1e6, "us")


def _run(connection: Any, sql: str) -> None:
    with connection.cursor() as cursor:
        cursor.execute(sql)


@contextlib.contextmanager
def in_transaction(connection: Any) -> Iterator[None]:
    """Yield inside a transaction whose first statement is over: that one may be run again."""
    from django.db import transaction

    with transaction.atomic(using=connection.alias):
        _run(connection, WRITE)
        yield


# Time


def _on_mariadb(node: Node, rounds: int, turns: int) -> Iterator[Figure]:
    node.sql(
        "CREATE TABLE t (id int PRIMARY KEY, n int) ENGINE=InnoDB; INSERT INTO t VALUES (1, 0)",
        database=project.account()["NAME"],
    )
    plain = project.wrapper("plain_time", **project.plain(node))
    control = project.wrapper("control_time", **project.plain(node))
    engine = project.wrapper("time", **project.balanced([node] * 2))
    wrappers = (plain, control, engine)
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

    def execute(cursor: Any) -> Callable[[], None]:
        def statement() -> None:
            cursor.execute(sql)
            cursor.fetchall()

        return statement

    with contextlib.ExitStack() as stack:
        for connection in wrappers:
            # As a request ends: a connection after it has no writes to follow.
            connection.close_if_unusable_or_obsolete()
        cursors = [stack.enter_context(connection.cursor()) for connection in wrappers]
        wall = interleaved(
            *(execute(cursor) for cursor in cursors),
            rounds=turns,
            batch=10,
            clock=time.perf_counter,
        )
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
