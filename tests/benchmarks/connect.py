"""What the engine adds to a connect."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from django.db import connections

from tests.servers import Address
from tests.servers.mariadb import Node
from tests.servers.postgresql import PostgreSQLNode

from . import project
from .delay import Delay
from .figures import Figure, Measured, in_cpu_time, in_time
from .statement import one_core_each, python_calls

#: How many there are.
PEERS = (2, 1000)
#: Python functions that a connect may call besides the plain engine's.
MOST_CALLS = 12


def run(quick: bool = False) -> list[Figure]:
    """Compare connects to one MariaDB server, then to nothing at all."""
    rounds = 40 if quick else 2000
    with project.mariadb() as [node]:
        figures = counted(node)
        with one_core_each(node):
            figures += _to_mariadb(node, rounds)
            figures += _of_new_threads(node, rounds // 4)
        with Delay(node, milliseconds=1) as proxy:
            figures += _beside_plain(
                "1 ms each way", proxy, project.MYSQL, rounds // 10, (1e3, "ms"), 0.85
            )
    with PostgreSQLNode("postgresql") as postgresql:
        postgresql.set_up()
        with one_core_each(postgresql):
            figures += _beside_plain(
                "PostgreSQL", postgresql, project.POSTGRESQL, rounds // 5, (1e6, "us"), 1.02
            )
    return figures + list(_to_nothing(rounds // 10))


def counted(node: Address) -> list[Figure]:
    """Count the Python functions that a connect calls."""
    calls = []
    for entry in (project.plain(node), project.balanced([node] * 2)):
        connection = project.wrapper(**entry)
        counts = []
        for _ in range(6):
            # The first time something is imported, compiled, cached, asked.
            counts.append(python_calls(connection.connect))
            connection.close()
        calls.append(min(counts))
    return [
        Figure("Python calls of a connect, plain engine", calls[0]),
        Figure("Python calls of a connect, added", calls[1] - calls[0], "", MOST_CALLS),
    ]


def _of_new_threads(node: Address, rounds: int) -> Iterator[Figure]:
    """The first connect of each wrapper, of which each thread has its own."""
    aliases = [
        project.add(**entry) for entry in (project.plain(node), project.balanced([node] * 2))
    ]
    made: list[Any] = []

    def connect(alias: str) -> None:
        # As Django makes one for a thread that has none.
        made.append(connections.create_connection(alias))
        made[-1].connect()

    def close() -> None:
        while made:
            made.pop().close()

    anew = [functools.partial(connect, alias) for alias in aliases]
    wall = in_time(*anew, rounds=rounds, after=close)
    yield Figure("MariaDB: a new thread's first, plain engine", wall.median(0) * 1e6, "us")
    yield Figure("MariaDB: a new thread's first, engine / plain engine", wall.ratio(0, 1), "", 0.75)


def _beside_plain(
    name: str, server: Address, engine: str, rounds: int, unit: tuple[float, str], limit: float
) -> Iterator[Figure]:
    """Compare connects by Django's own engine with those by ours, to two peers at one place."""
    entries = project.plain(server, engine), project.balanced([server] * 2, PEER_ENGINE=engine)
    wall = _connects([project.wrapper(**entry) for entry in entries], rounds)
    yield Figure(f"{name}: plain engine", wall.median(0) * unit[0], unit[1])
    yield Figure(f"{name}: engine / plain engine", wall.ratio(0, 1), "", limit)


def _to_mariadb(node: Node, rounds: int) -> Iterator[Figure]:
    plain, control = (project.wrapper(**project.plain(node)) for _ in range(2))
    engines = [
        project.knowing_all(project.wrapper(**project.balanced([node] * peers))) for peers in PEERS
    ]
    bare = project.wrapper(**project.balanced([node] * 2, TCP_USER_TIMEOUT=None))
    wall = _connects([plain, control, engines[0], bare], rounds)
    yield Figure("MariaDB: plain engine", wall.median(0) * 1e6, "us")
    yield Figure("MariaDB: engine, 2 peers", wall.median(2) * 1e6, "us")
    yield Figure("MariaDB: plain engine / plain engine", wall.ratio(0, 1))
    yield Figure("MariaDB: engine / plain engine", wall.ratio(0, 2), "", 0.90)
    yield Figure("MariaDB: the same, TCP_USER_TIMEOUT None", wall.ratio(0, 3))
    cpu = _connects([plain, *engines], rounds, in_cpu_time)
    yield from _cpu_figures("MariaDB: CPU added{}", cpu)


def _to_nothing(rounds: int) -> Iterator[Figure]:
    """The same without a server, whose work puts noise on the figures."""
    entries = [{"ENGINE": "tests.benchmarks.null"}, *map(project.null, PEERS)]
    works = [
        functools.partial(project.connect_and_close, project.wrapper(**entry)) for entry in entries
    ]
    cpu = in_cpu_time(*works, rounds=rounds, batch=50)
    yield from _cpu_figures("no server: CPU added{}, with close()", cpu)


def _connects(
    wrappers: Sequence[Any], rounds: int, measure: Callable[..., Measured] = in_time
) -> Measured:
    """Measure what each wrapper's connect takes; all are closed after it."""

    def close() -> None:
        for connection in wrappers:
            connection.close()

    connects = [connection.connect for connection in wrappers]
    return measure(*connects, rounds=rounds, after=close)


def _cpu_figures(name: str, cpu: Measured) -> Iterator[Figure]:
    yield Figure(name.format(", 2 peers"), cpu.added(0, 1) * 1e6, "us", 30)
    yield Figure(name.format(" by 1,000 peers to that"), cpu.added(1, 2) * 1e6, "us", 10)
