"""What a connect under asyncio adds to the driver's own, and what many cancelled ones leave."""

from __future__ import annotations

import asyncio
import gc
import sys
from typing import Any

from django_proxysql import AsyncLoadBalancer

from .figures import Figure, in_cpu_time

#: The most CPU that may be added to the driver's own connect, in microseconds.
LIMIT = 30
#: How often a connect that is cancelled awaits something in the driver, and again in READY_CHECK.
AWAITS = 3


class _Connection:
    """A connection to nothing."""

    def terminate(self) -> None:
        _Server.sockets -= 1


class _Server:
    sockets = 0


async def _connect(**params: Any) -> _Connection:
    return _Connection()


async def _awaits(connection: object = None) -> None:
    for _ in range(AWAITS):
        await asyncio.sleep(0)


async def _connect_slowly(**params: Any) -> _Connection:
    connection = _Connection()
    _Server.sockets += 1
    try:
        await _awaits()
    except BaseException:
        connection.terminate()
        raise
    return connection


def run(quick: bool = False) -> list[Figure]:
    """Compare connects without a server, and cancel many."""
    params = {"host": "nowhere", "port": 3306}
    db = AsyncLoadBalancer({"db1": params, "db2": params}, _connect)
    loop = asyncio.new_event_loop()
    try:
        cpu = in_cpu_time(
            lambda: loop.run_until_complete(_connect(**params)),
            lambda: loop.run_until_complete(db.connect()),
            rounds=20 if quick else 500,
            batch=50,
        )
    finally:
        loop.close()
    left = cancelled(500 if quick else 10_000)
    return [
        Figure(
            "no server: CPU added to the driver's own connect", cpu.added(0, 1) * 1e6, "us", LIMIT
        ),
        Figure("left by cancelled connects: permits, leases, sockets", sum(left), "", 0),
    ]


def cancelled(count: int) -> tuple[int, int, int]:
    """Cancel connects, each at another await; return the permits, leases and sockets left."""
    params = {"host": "nowhere", "port": 3306}
    db = AsyncLoadBalancer(
        {"db1": params, "db2": params}, _connect_slowly, check_interval=0.001, ready_check=_awaits
    )
    breaker = db.peers["db1"].breaker
    _Server.sockets = 0

    async def scene() -> None:
        for number in range(count):
            if number % 3 == 0:
                # The next one is a trial.
                breaker.half_open()
            task = asyncio.ensure_future(db.connect())
            for _ in range(number % (2 * AWAITS + 1)):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task])
            tasks.append(task)

    # They are kept, and with them what their connects held when they were cancelled.
    tasks: list[asyncio.Future[object]] = []
    asyncio.run(scene())
    # Before objects that hold each other are collected, and what they hold with them.
    permits = sum(peer.connecting for peer in db.peers.values())
    leases = sum(peer.breaker.trial is not None for peer in db.peers.values())
    gc.collect()
    permits += sum(peer.connections for peer in db.peers.values())
    return permits, leases, _Server.sockets


if __name__ == "__main__":
    print(cancelled(int(sys.argv[1]) if len(sys.argv) > 1 else 10_000))
