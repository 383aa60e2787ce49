"""What COMMIT_OUTCOME adds to a block: of one INSERT, near and far, and of reads."""

from __future__ import annotations

import contextlib
import time
from typing import Any

from django.db import transaction

from django_proxysql.core import outcome
from tests.servers import Address
from tests.servers.faultproxy import FaultProxy
from tests.servers.mariadb import Node

from . import project
from .delay import Delay
from .figures import Figure, interleaved
from .statement import one_core_each

#: Milliseconds each way: a packet and its answer take twice that longer.
DELAY = 0.5
READ, WRITE = "SELECT 1", "INSERT INTO written VALUES (NULL)"


def run(quick: bool = False) -> list[Figure]:
    """Measure the ratios, and count the packets."""
    with Node("mariadb") as node:
        node.set_up()
        with Delay(node, DELAY) as distant:
            pairs = {where: both(where, at) for where, at in (("near", node), ("far", distant))}
            prepare(pairs["near"][0])
            figures = []
            for where, limit in (("near", 1.25), ("far", 1.05)):
                without, with_it = pairs[where]
                rounds = 20 if quick else 3000 if where == "near" else 500
                # Left alone, both are on one core at times: there a block takes half as long until
                # an answer of two packets wakes the client on the other core, which sleeps.
                with one_core_each(node) if where == "near" else contextlib.nullcontext():
                    measured = interleaved(
                        lambda one=without: block(one, WRITE),
                        lambda one=with_it: block(one, WRITE),
                        rounds=rounds,
                        clock=time.perf_counter,
                    )
                name = "loopback" if where == "near" else "1 ms of delay"
                figures += [
                    Figure(f"{name}: a block of one INSERT", measured.median(0) * 1e6, "us"),
                    Figure(f"{name}: added", measured.added(0, 1) * 1e6, "us"),
                    Figure(f"{name}: with / without", measured.ratio(0, 1), "", limit),
                ]
            for one in [one for pair in pairs.values() for one in pair]:
                one.close()
        with FaultProxy(node) as proxy:
            figures += packets(*both("counted", proxy), proxy)
        return [*figures, reads(100 if quick else 3000)]


def both(name: str, server: Address) -> tuple[Any, Any]:
    """Return a wrapper without the setting, and one with it."""
    entry = project.balanced([server] * 2, CONN_MAX_AGE=None)
    return (
        project.wrapper(f"{name}_without", **entry),
        project.wrapper(f"{name}_with", **entry, COMMIT_OUTCOME="record"),
    )


def prepare(connection: Any) -> None:
    """Make the tables."""
    with connection.cursor() as cursor:
        cursor.execute("CREATE TABLE written (id int AUTO_INCREMENT PRIMARY KEY)")
        cursor.execute(outcome.creates("mysql"))


def block(connection: Any, statement: str) -> None:
    """Run one statement in a block."""
    with transaction.atomic(connection.alias), connection.cursor() as cursor:
        cursor.execute(statement)


def packets(without: Any, with_it: Any, proxy: FaultProxy) -> list[Figure]:
    """Count what a block adds."""
    figures = []
    for name, statement in (("one INSERT", WRITE), ("reads", READ)):
        counts = []
        for connection in (without, with_it):
            block(connection, statement)
            before = proxy.client_packets
            block(connection, statement)
            counts.append(proxy.client_packets - before)
        figures.append(Figure(f"packets added to a block of {name}", counts[1] - counts[0], "", 0))
    without.close()
    with_it.close()
    return figures


def reads(rounds: int) -> Figure:
    """Measure the CPU time that a block of reads takes more, on a driver that answers at once."""
    without = project.wrapper("reads_without", **project.null(2))
    with_it = project.wrapper("reads_with", **project.null(2, COMMIT_OUTCOME="record"))
    measured = interleaved(
        lambda: block(without, READ),
        lambda: block(with_it, READ),
        rounds=rounds,
        clock=time.thread_time,
        batch=10,
    )
    return Figure(
        "no server: CPU added to a block of one read", measured.added(0, 1) * 1e6, "us", 2
    )
