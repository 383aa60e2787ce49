"""A run that starts servers and waits to be interrupted; test_servers.py does that to it.

``python -m tests.servers.interrupted_run`` is a program that starts some by itself, and
``pytest tests/servers/interrupted_run.py`` is a test run that has them from the fixtures.
"""

from __future__ import annotations

import json
import time

from .mariadb import MariaDBNode, Node
from .postgresql import PostgreSQLNode
from .processes import ServerProcess, descendants
from .runs import current_run, exit_on_sigterm


def tell_and_wait(*servers: ServerProcess) -> None:
    """Print what must not be left: the ids of the processes, and the directory."""
    pids = [pid for server in servers for pid in (server.pid, *descendants(server.pid))]
    print("\nSTARTED", json.dumps([pids, str(current_run().workspace.path)]), flush=True)
    time.sleep(60)


def test_waits(mariadb_pair: tuple[Node, Node], postgres: PostgreSQLNode) -> None:
    mariadb_pair[1].freeze()
    tell_and_wait(*mariadb_pair, postgres)


if __name__ == "__main__":
    exit_on_sigterm()
    with MariaDBNode() as node, MariaDBNode() as frozen, PostgreSQLNode() as server:
        frozen.freeze()
        tell_and_wait(node, frozen, server)
