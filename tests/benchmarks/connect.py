"""What the engine adds to a connect."""

from __future__ import annotations

import time
from typing import Any

from tests.servers.mariadb import Node

from . import project
from .figures import Figure, interleaved

ROUNDS = 3000
BATCHES = 200


def run() -> list[Figure]:
    """Compare connects to one MariaDB server, then to nothing at all."""
    with Node("mariadb") as node:
        node.set_up()
        figures = list(_to_mariadb(node))
    return figures + list(_to_nothing())


def _to_mariadb(node: Node) -> Any:
    plain = project.wrapper("plain", **project.plain(node))
    two = project.wrapper("two", **project.balanced([node] * 2))
    thousand = project.wrapper("thousand", **project.balanced([node] * 1000))

    def close() -> None:
        for connection in (plain, two, thousand):
            connection.close()

    wall = interleaved(
        plain.connect, two.connect, rounds=ROUNDS, clock=time.perf_counter, after=close
    )
    yield Figure("MariaDB: plain engine", wall.one * 1e6, "us")
    yield Figure("MariaDB: engine, 2 peers", wall.other * 1e6, "us")
    yield Figure("MariaDB: engine / plain engine", wall.ratio, "", 1.05)
    for connection, peers, limit in ((two, "2 peers", 30), (thousand, "1,000 peers", 80)):
        cpu = interleaved(
            plain.connect, connection.connect, rounds=ROUNDS, clock=time.process_time, after=close
        )
        yield Figure(f"MariaDB: CPU added, {peers}", cpu.difference * 1e6, "us", limit)


def _to_nothing() -> Any:
    """The same without a server, whose work puts noise on the figures."""
    plain = project.wrapper("null", ENGINE="tests.benchmarks.null")
    for number, limit in ((2, 30), (1000, 80)):
        balanced = project.wrapper(f"null{number}", **project.null(number))

        def engine(connection: Any = balanced) -> None:
            connection.connect()
            connection.close()

        def without() -> None:
            plain.connect()
            plain.close()

        cpu = interleaved(without, engine, rounds=BATCHES, batch=100, clock=time.process_time)
        yield Figure(
            f"no server: CPU added, {number:,} peers, with close()",
            cpu.difference * 1e6,
            "us",
            limit,
        )
