"""What a statement costs whose connection is replaced first: one connect, and nothing else."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

from django_proxysql import balancers
from tests.servers import USER
from tests.servers.faultproxy import FaultProxy
from tests.servers.mariadb import Node

from . import project
from .figures import Figure, in_time

_read = functools.partial(project.execute, sql=project.READ)
#: Sent by close(), and not answered.
QUIT = b"\x01\x00\x00\x00\x01"


class Traffic(NamedTuple):
    """What the peers have seen: connections, and packets that the client waits for an answer to."""

    connects: int
    packets: int

    @classmethod
    def at(cls, proxies: Sequence[FaultProxy]) -> Traffic:
        packets = [packet for proxy in proxies for packet in list(proxy.packets)]
        return cls(
            sum(proxy.accepted for proxy in proxies),
            sum(packet != QUIT for packet in packets),
        )


#: A read that is run again is run READ ONLY: START TRANSACTION READ ONLY, and COMMIT.
FRAME = 2


def run(quick: bool = False) -> list[Figure]:
    """Count at a replacement that is forced, then compare its time with a connect's."""
    with project.mariadb() as [node]:
        return counted(node) + _timed(node, 10 if quick else 1000)


def counted(node: Node) -> list[Figure]:
    """Count what a read costs: on a new connection, and after each reason for a replacement."""
    with contextlib.ExitStack() as stack:
        proxies = [stack.enter_context(FaultProxy(node)) for _ in range(2)]

        def connected(**more: Any) -> Any:
            connection = project.wrapper(**project.balanced(proxies, **more))
            stack.callback(connection.close)
            # The first of a process to each peer asks the server for its version.
            _read(project.knowing_all(connection))
            return connection

        def cost(connection: Any) -> Traffic:
            before = Traffic.at(proxies)
            _read(connection)
            return Traffic(*(now - then for now, then in zip(Traffic.at(proxies), before)))

        def kill() -> None:
            node.kill_connections(USER)
            for proxy in proxies:
                proxy.wait_until_idle()

        connection = connected()
        connection.close()
        fresh = cost(connection)
        connection.close()
        figures = [
            Figure("a read and its connect: connects", fresh.connects),
            Figure("a read and its connect: packets sent", fresh.packets),
        ]
        reasons: list[tuple[str, dict[str, Any], int]] = [
            ("its peer's circuit has opened", {}, 0),
            ("its connection was killed, a look shows it", {"IDLE_CHECK": 0}, 0),
            ("its connection was killed, the read shows it", {"IDLE_CHECK": None}, FRAME),
        ]
        for reason, settings, frame in reasons:
            connection = connected(**settings)
            if settings:
                kill()
            else:
                connection.peer.breaker.open()
            seen = cost(connection)
            connection.close()
            figures += [
                Figure(f"{reason}: connects", seen.connects, "", 1),
                Figure(f"{reason}: packets sent", seen.packets, "", fresh.packets + frame),
            ]
        return figures


def _timed(node: Node, rounds: int) -> list[Figure]:
    anew, replaced = (project.wrapper(**project.balanced([node] * 2)) for _ in range(2))
    peers = list(balancers[replaced.alias].peers.values())

    def before() -> None:
        anew.close()
        for peer in peers:
            peer.breaker.close()
        _read(replaced)
        replaced.peer.breaker.open()

    reads = [functools.partial(_read, connection) for connection in (anew, replaced)]
    wall = in_time(*reads, rounds=rounds, before=before)
    anew.close()
    replaced.close()
    return [
        Figure("a read and its connect", wall.median(0) * 1e6, "us"),
        Figure("a read and its replacement", wall.median(1) * 1e6, "us"),
        Figure("replacement / connect", wall.ratio(0, 1)),
    ]
