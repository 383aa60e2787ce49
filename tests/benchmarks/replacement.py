"""What a statement costs whose connection is replaced first: one connect, and nothing else."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from django_proxysql import balancers
from tests.servers import USER
from tests.servers.faultproxy import FaultProxy
from tests.servers.mariadb import Node

from . import project
from .figures import Figure, interleaved

READ = "SELECT 1"
#: Sent by close(), and not answered.
QUIT = b"\x01\x00\x00\x00\x01"


class Traffic(NamedTuple):
    """What the peers have seen: connections, and packets that the client waits for an answer to."""

    connects: int
    packets: int

    @classmethod
    def of(cls, proxies: Sequence[FaultProxy]) -> Traffic:
        packets = [packet for proxy in proxies for packet in list(proxy.packets)]
        return cls(
            sum(proxy.accepted for proxy in proxies),
            sum(packet != QUIT for packet in packets),
        )

    def since(self, before: Traffic) -> Traffic:
        return Traffic(self.connects - before.connects, self.packets - before.packets)


REPLAYED = "its connection was killed, the read shows it"
#: A read that is run again is run READ ONLY: START TRANSACTION READ ONLY, and COMMIT.
FRAME = 2


def run(quick: bool = False) -> list[Figure]:
    """Count at a replacement that is forced, then compare its time with a connect's."""
    with Node("mariadb") as node:
        node.set_up()
        return counted(node) + _timed(node, 10 if quick else 1000)


def counted(node: Node) -> list[Figure]:
    """Count what a read costs: on a new connection, and after each reason for a replacement."""
    with contextlib.ExitStack() as stack:
        proxies = [stack.enter_context(FaultProxy(node)) for _ in range(2)]

        def connected(alias: str, **more: Any) -> Any:
            connection = project.wrapper(alias, **project.balanced(proxies, **more))
            stack.callback(connection.close)
            # The first of a process to each peer asks the server for its version.
            _read(project.knowing_all(connection))
            return connection

        def cost(connection: Any) -> Traffic:
            before = Traffic.of(proxies)
            _read(connection)
            return Traffic.of(proxies).since(before)

        def kill() -> None:
            node.kill_connections(USER)
            for proxy in proxies:
                proxy.wait_until_idle()

        connection = connected("replacement_open")
        connection.close()
        fresh = cost(connection)
        connection.peer.breaker.open()
        costs = {"its peer's circuit has opened": cost(connection)}
        connection.close()

        connection = connected("replacement_idle", IDLE_CHECK=0)
        kill()
        costs["its connection was killed, a look shows it"] = cost(connection)
        connection.close()

        connection = connected("replacement_lost", IDLE_CHECK=None)
        kill()
        costs[REPLAYED] = cost(connection)
    return [
        Figure("a read and its connect: connects", fresh.connects),
        Figure("a read and its connect: packets sent", fresh.packets),
        *(
            figure
            for reason, seen in costs.items()
            for figure in (
                Figure(f"{reason}: connects", seen.connects, "", 1),
                Figure(
                    f"{reason}: packets sent",
                    seen.packets,
                    "",
                    fresh.packets + (FRAME if reason == REPLAYED else 0),
                ),
            )
        ),
    ]


def _timed(node: Node, rounds: int) -> list[Figure]:
    anew = project.wrapper("read_anew", **project.balanced([node] * 2))
    replaced = project.wrapper("read_replaced", **project.balanced([node] * 2))
    peers = list(balancers["read_replaced"].peers.values())

    def before() -> None:
        anew.close()
        for peer in peers:
            peer.breaker.close()
        _read(replaced)
        replaced.peer.breaker.open()

    wall = interleaved(
        lambda: _read(anew),
        lambda: _read(replaced),
        rounds=rounds,
        clock=time.perf_counter,
        before=before,
    )
    anew.close()
    replaced.close()
    return [
        Figure("a read and its connect", wall.median(0) * 1e6, "us"),
        Figure("a read and its replacement", wall.median(1) * 1e6, "us"),
        Figure("replacement / connect", wall.ratio(0, 1)),
    ]


def _read(connection: Any) -> None:
    with connection.cursor() as cursor:
        cursor.execute(READ)
        cursor.fetchall()
