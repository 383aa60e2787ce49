"""Threads that connect at once to a slow peer wait side by side."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pybreaker

from tests.servers.faultproxy import FaultProxy
from tests.servers.mariadb import Node

from . import project
from .figures import Figure
from .null.base import connect

THREADS = 32
SECONDS = 0.2


def run(quick: bool = False) -> list[Figure]:
    """Let all threads connect at once: through the engine, then as pybreaker's call() has it."""
    null = project.add("slow", **project.null(1, OPTIONS={"seconds": SECONDS}))
    breaker = pybreaker.CircuitBreaker()
    # Its lock makes the threads wait for one another: 32 times 0.2 s.
    seconds = SECONDS / 10 if quick else SECONDS
    with Node("mariadb") as node:
        node.set_up()
        with FaultProxy(node) as proxy:
            proxy.delay(SECONDS)
            mariadb = project.add("delayed", **project.balanced([proxy]))
            through_proxy = at_once(lambda: _connect_and_close(mariadb))
    return [
        Figure(
            "engine, a driver that sleeps", at_once(lambda: _connect_and_close(null)), "s", 0.35
        ),
        Figure("engine, MariaDB behind a slow proxy", through_proxy, "s", 0.35),
        Figure("pybreaker's call()", at_once(lambda: breaker.call(connect, seconds=seconds)), "s"),
    ]


def at_once(function: Callable[[], Any]) -> float:
    """Return how long it takes until all threads have called ``function``."""
    errors: list[BaseException] = []
    barrier = threading.Barrier(THREADS + 1)

    def work() -> None:
        barrier.wait()
        try:
            function()
        except BaseException as exc:
            errors.append(exc)

    threads = [threading.Thread(target=work) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    barrier.wait()
    started = time.perf_counter()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - started
    if errors:
        raise errors[0]
    return seconds


def _connect_and_close(alias: str) -> None:
    from django.db import connections

    # A thread has wrappers of its own.
    connections[alias].connect()
    connections[alias].close()
