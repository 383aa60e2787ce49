"""Instructions that the client runs, counted by valgrind: the same in each run, whatever else runs.

The programs are run by callgrind, and a call of ``getpgrp()`` ends one part of its count.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import re
import shutil
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from django.db import connections

from tests.servers import Address

from . import project
from .figures import Figure, Skipped
from .project import READ, WRITE, block, execute

#: What each part does, and the most that the engine may take for it.
LIMITS = {
    "a connect": 440_000,
    "a connect, 1,000 peers": None,
    "a read": 134_000,
    "an autocommit write": None,
    "a statement in a block": None,
    "an atomic block": None,
}
#: And the most that it may add.
ADDED = {"an autocommit write": 25_000, "an atomic block": 115_000}


def run(quick: bool = False) -> list[Figure]:
    """Count what a connect and statements take, by the plain engine and by ours."""
    if shutil.which("valgrind") is None:
        raise Skipped("valgrind is not installed (apt-get install valgrind)")
    with project.mariadb() as [node]:
        # Under valgrind each connect takes its time.
        names = ["a read"] if quick else list(LIMITS)
        return list(figures(node, names, 3 if quick else 20))


def figures(node: Address, names: Sequence[str], times: int) -> Iterator[Figure]:
    """Count under valgrind in a process of its own, which connects to ``node``."""
    counted = iter(counts(node, names, times))
    for name in names:
        plain, engine = round(next(counted) / times), round(next(counted) / times)
        yield Figure(f"{name}, plain engine", plain)
        yield Figure(f"{name}, engine", engine, "", LIMITS[name])
        yield Figure(f"{name}, added", engine - plain, "", ADDED.get(name))


def counts(node: Address, names: Sequence[str], times: int) -> Sequence[int]:
    """Return the instructions of each part, of all its times."""
    with tempfile.TemporaryDirectory() as directory:
        subprocess.run(
            [
                "valgrind",
                "--tool=callgrind",
                f"--callgrind-out-file={directory}/out",
                "--dump-before=getpgrp",
                sys.executable,
                "-m",
                __name__,
                node.host,
                str(node.port),
                str(times),
                *names,
            ],
            check=True,
            capture_output=True,
            # Where a set's items lie would change the count.
            env={**os.environ, "PYTHONHASHSEED": "0"},
        )
        # out.1 is what comes before the first mark; then one of two is a part.
        dumps = sorted(Path(directory).glob("out.*"), key=lambda path: int(path.suffix[1:]))
        return [_total(dump) for dump in dumps[1::2]]


def _total(dump: Path) -> int:
    found = re.search(r"^(?:totals|summary): (\d+)", dump.read_text(), re.MULTILINE)
    return int(found[1])


# In the process that is counted


def main() -> None:
    """Do each part some times, between two marks."""
    host, port, times, *names = sys.argv[1:]
    project.configure()
    server = types.SimpleNamespace(host=host, port=int(port))
    for name in names:
        peers = [server] * (1000 if "1,000" in name else 2)
        # A look at a connection that has idled is another thing.
        for entry in (project.plain(server), project.balanced(peers, IDLE_CHECK=3600)):
            first = project.wrapper(**entry)
            if "PEERS" in entry:
                project.knowing_all(first)
            # As Django makes them, for so many threads.
            wrappers = [connections.create_connection(first.alias) for _ in range(int(times))]
            for connection in wrappers:
                # Whatever is imported, compiled and cached is so by now.
                for _ in range(10):
                    connection.connect()
                    execute(connection, READ)
                    if "write" in name or "block" in name:
                        execute(connection, WRITE)
                        _block(connection)
                    # As a request ends: a connection after it has no writes to follow.
                    connection.close_if_unusable_or_obsolete()
            with contextlib.ExitStack() as stack:
                parts = [_part(name, connection, stack) for connection in wrappers]
                gc.collect()
                gc.disable()
                os.getpgrp()
                for part in parts:
                    part()
                os.getpgrp()
                gc.enable()
            for connection in wrappers:
                connection.close()


def _part(name: str, connection: Any, stack: contextlib.ExitStack) -> Callable[[], None]:
    if "connect" in name:
        connect: Callable[[], None] = connection.connect
        return connect
    connection.connect()
    execute(connection, READ)
    if name == "an atomic block":
        return functools.partial(_block, connection)
    if "block" in name:
        # By the wrapper: an alias has one block a thread.
        connection.set_autocommit(False)
        stack.callback(connection.close)
        execute(connection, READ)
    return functools.partial(execute, connection, WRITE if "write" in name else READ)


def _block(connection: Any) -> None:
    # Each of the alias's wrappers in turn is the one that a block finds.
    connections[connection.alias] = connection
    block(connection, WRITE)


if __name__ == "__main__":
    main()
