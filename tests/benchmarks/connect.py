"""What the engine adds to a connect."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

from tests.servers import Address
from tests.servers.mariadb import Node
from tests.servers.postgresql import PostgreSQLNode

from . import project
from .delay import Delay
from .figures import Figure, Measured, interleaved
from .statement import one_core_each, python_calls

#: How many there are.
PEERS = (2, 1000)
#: Python functions that a connect may call besides the plain engine's.
MOST_CALLS = 12
POSTGRESQL = "django.db.backends.postgresql"


def run(quick: bool = False) -> list[Figure]:
    """Compare connects to one MariaDB server, then to nothing at all."""
    rounds = 40 if quick else 2000
    with Node("mariadb") as node:
        node.set_up()
        figures = counted(node)
        with one_core_each(node):
            figures += _to_mariadb(node, rounds)
            figures += _of_new_threads(node, rounds // 4)
        with Delay(node, milliseconds=1) as proxy:
            figures += _delayed(proxy, rounds // 10)
    with PostgreSQLNode("postgresql") as postgresql:
        postgresql.set_up()
        with one_core_each(postgresql):
            figures += _to_postgresql(postgresql, rounds // 5)
    return figures + list(_to_nothing(rounds // 10))


def counted(node: Address) -> list[Figure]:
    """Count the Python functions that a connect calls."""
    calls = []
    for entry in (project.plain(node), project.balanced([node] * 2)):
        connection = project.wrapper(f"calls{len(calls)}", **entry)
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
    plain = project.wrapper("plain_new", **project.plain(node))
    engine = project.wrapper("engine_new", **project.balanced([node] * 2))
    made: list[Any] = []
    from django.db import connections

    def anew(connection: Any) -> Callable[[], None]:
        def connect() -> None:
            # As Django makes one for a thread that has none.
            made.append(connections.create_connection(connection.alias))
            made[-1].connect()

        return connect

    def close() -> None:
        while made:
            made.pop().close()

    wall = interleaved(
        anew(plain), anew(engine), rounds=rounds, clock=time.perf_counter, after=close
    )
    yield Figure("MariaDB: a new thread's first, plain engine", wall.median(0) * 1e6, "us")
    yield Figure("MariaDB: a new thread's first, engine / plain engine", wall.ratio(0, 1), "", 0.75)


def _delayed(proxy: Address, rounds: int) -> Iterator[Figure]:
    wall = _compared("distant", project.plain(proxy), project.balanced([proxy] * 2), rounds)
    yield Figure("1 ms each way: plain engine", wall.median(0) * 1e3, "ms")
    yield Figure("1 ms each way: engine / plain engine", wall.ratio(0, 1), "", 0.85)


def _to_postgresql(node: PostgreSQLNode, rounds: int) -> Iterator[Figure]:
    server = {"HOST": node.host, "PORT": node.port}
    plain = {"ENGINE": POSTGRESQL, **server, **project.account()}
    engine = {**plain, "ENGINE": project.ENGINE, "PEER_ENGINE": POSTGRESQL, "PEERS": [server] * 2}
    wall = _compared("postgresql", plain, engine, rounds)
    yield Figure("PostgreSQL: plain engine", wall.median(0) * 1e6, "us")
    yield Figure("PostgreSQL: engine / plain engine", wall.ratio(0, 1), "", 1.02)


def _compared(name: str, plain: dict[str, Any], engine: dict[str, Any], rounds: int) -> Measured:
    wrappers = project.wrapper(f"plain_{name}", **plain), project.wrapper(name, **engine)

    def close() -> None:
        for connection in wrappers:
            connection.close()

    return interleaved(
        *(connection.connect for connection in wrappers),
        rounds=rounds,
        clock=time.perf_counter,
        after=close,
    )


def _to_mariadb(node: Node, rounds: int) -> Iterator[Figure]:
    plain = project.wrapper("plain", **project.plain(node))
    control = project.wrapper("control", **project.plain(node))
    engines = {
        peers: project.knowing_all(
            project.wrapper(f"engine{peers}", **project.balanced([node] * peers))
        )
        for peers in PEERS
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
    yield Figure("MariaDB: engine / plain engine", wall.ratio(0, 2), "", 0.90)
    yield Figure("MariaDB: the same, TCP_USER_TIMEOUT None", wall.ratio(0, 3))
    cpu = interleaved(
        *(connection.connect for connection in (plain, *engines.values())),
        rounds=rounds,
        clock=time.process_time,
        after=close,
    )
    yield from _cpu_figures("MariaDB: CPU added{}", cpu)


def _to_nothing(rounds: int) -> Iterator[Figure]:
    """The same without a server, whose work puts noise on the figures."""
    plain = project.wrapper("null", ENGINE="tests.benchmarks.null")
    engines = [project.wrapper(f"null{peers}", **project.null(peers)) for peers in PEERS]
    cpu = interleaved(
        *(_connect_and_close(connection) for connection in (plain, *engines)),
        rounds=rounds,
        batch=50,
        clock=time.process_time,
    )
    yield from _cpu_figures("no server: CPU added{}, with close()", cpu)


def _cpu_figures(name: str, cpu: Measured) -> Iterator[Figure]:
    yield Figure(name.format(", 2 peers"), cpu.added(0, 1) * 1e6, "us", 30)
    yield Figure(name.format(" by 1,000 peers to that"), cpu.added(1, 2) * 1e6, "us", 10)


def _connect_and_close(connection: Any) -> Callable[[], None]:
    def connect_and_close() -> None:
        connection.connect()
        connection.close()

    return connect_and_close
