"""What COMMIT_OUTCOME adds to a block: of one INSERT, near and far, and of reads."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

from django_proxysql.core import outcome
from tests.servers import Address
from tests.servers.faultproxy import FaultProxy

from . import project
from .delay import Delay
from .figures import Figure, in_cpu_time, in_time
from .statement import one_core_each

#: Milliseconds each way: a packet and its answer take twice that longer.
DELAY = 0.5
WRITE = "INSERT INTO written VALUES (NULL)"


def run(quick: bool = False) -> list[Figure]:
    """Measure the ratios, and count the packets."""
    with project.mariadb() as [node]:
        figures = []
        with Delay(node, DELAY) as distant:
            near, far = both(node), both(distant)
            project.execute(near[0], "CREATE TABLE written (id int AUTO_INCREMENT PRIMARY KEY)")
            project.execute(near[0], outcome.creates("mysql"))
            # Left alone, both are on one core at times: there a block takes half as long until an
            # answer of two packets wakes the client on the other core, which sleeps.
            with one_core_each(node):
                figures += inserts("loopback", near, 20 if quick else 3000, 1.25)
            figures += inserts("1 ms of delay", far, 20 if quick else 500, 1.05)
        with FaultProxy(node) as proxy:
            pair = both(proxy)
            figures += [
                packets_added("one INSERT", pair, proxy, WRITE),
                packets_added("reads", pair, proxy, project.READ),
            ]
            for connection in pair:
                connection.close()
    nowhere = [
        project.wrapper(**project.null(2)),
        project.wrapper(**project.null(2, COMMIT_OUTCOME="record")),
    ]
    reads = [functools.partial(project.block, one, project.READ) for one in nowhere]
    cpu = in_cpu_time(*reads, rounds=100 if quick else 3000, batch=10)
    added = cpu.added(0, 1) * 1e6
    return [*figures, Figure("no server: CPU added to a block of one read", added, "us", 2)]


def both(server: Address) -> list[Any]:
    """Return a wrapper without the setting, and one with it."""
    entry = project.balanced([server] * 2, CONN_MAX_AGE=None)
    return [project.wrapper(**entry), project.wrapper(**entry, COMMIT_OUTCOME="record")]


def inserts(name: str, pair: list[Any], rounds: int, limit: float) -> list[Figure]:
    """Measure what a block of one INSERT takes without the setting, and with it."""
    with contextlib.ExitStack() as stack:
        for one in pair:
            stack.callback(one.close)
        blocks = [functools.partial(project.block, one, WRITE) for one in pair]
        wall = in_time(*blocks, rounds=rounds)
    return [
        Figure(f"{name}: a block of one INSERT", wall.median(0) * 1e6, "us"),
        Figure(f"{name}: added", wall.added(0, 1) * 1e6, "us"),
        Figure(f"{name}: with / without", wall.ratio(0, 1), "", limit),
    ]


def packets_added(name: str, pair: list[Any], proxy: FaultProxy, sql: str) -> Figure:
    """Count what a block sends more with the setting."""
    counts = []
    for connection in pair:
        project.block(connection, sql)
        before = proxy.client_packets
        project.block(connection, sql)
        counts.append(proxy.client_packets - before)
    return Figure(f"packets added to a block of {name}", counts[1] - counts[0], "", 0)
