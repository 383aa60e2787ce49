"""What the engine adds to a connect."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

from tests.servers.mariadb import Node

from . import project
from .figures import Figure, interleaved

#: The most CPU that may be added, by how many peers there are, in microseconds.
LIMITS = {2: 30, 1000: 80}


def run(quick: bool = False) -> list[Figure]:
    """Compare connects to one MariaDB server, then to nothing at all."""
    rounds = 20 if quick else 2000
    with Node("mariadb") as node:
        node.set_up()
        figures = list(_to_mariadb(node, rounds))
    return figures + list(_to_nothing(rounds // 10))


def _to_mariadb(node: Node, rounds: int) -> Iterator[Figure]:
    plain = project.wrapper("plain", **project.plain(node))
    control = project.wrapper("control", **project.plain(node))
    engines = {
        peers: project.wrapper(f"engine{peers}", **project.balanced([node] * peers))
        for peers in LIMITS
    }
    bare = project.wrapper("bare", **project.balanced([node] * 2, TCP_USER_TIMEOUT=None))
    wrappers = [plain, control, engines[2], bare]

    def close() -> None:
        for connection in (*wrappers, *engines.values()):
            connection.close()

    wall = interleaved(
        *(connection.connect for connection in wrappers),
        rounds=rounds,
        clock=time.perf_counter,
        after=close,
    )
    yield Figure("MariaDB: plain engine", wall.median(0) * 1e6, "us")
    yield Figure("MariaDB: engine, 2 peers", wall.median(2) * 1e6, "us")
    yield Figure("MariaDB: plain engine / plain engine", wall.ratio(0, 1))
    yield Figure("MariaDB: engine / plain engine", wall.ratio(0, 2), "", 1.05)
    yield Figure("MariaDB: the same, TCP_USER_TIMEOUT None", wall.ratio(0, 3))
    for peers, limit in LIMITS.items():
        cpu = interleaved(
            plain.connect,
            engines[peers].connect,
            rounds=rounds,
            clock=time.process_time,
            after=close,
        )
        yield Figure(f"MariaDB: CPU added, {peers:,} peers", cpu.added(0, 1) * 1e6, "us", limit)


def _to_nothing(rounds: int) -> Iterator[Figure]:
    """The same without a server, whose work puts noise on the figures."""
    plain = project.wrapper("null", ENGINE="tests.benchmarks.null")
    for peers, limit in LIMITS.items():
        cpu = interleaved(
            _connect_and_close(plain),
            _connect_and_close(project.wrapper(f"null{peers}", **project.null(peers))),
            rounds=rounds,
            batch=50,
            clock=time.process_time,
        )
        yield Figure(
            f"no server: CPU added, {peers:,} peers, with close()",
            cpu.added(0, 1) * 1e6,
            "us",
            limit,
        )


def _connect_and_close(connection: Any) -> Callable[[], None]:
    def connect_and_close() -> None:
        connection.connect()
        connection.close()

    return connect_and_close
