"""Threads that connect at once to a slow peer wait side by side."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pybreaker
from django.db import connections

from tests.servers.faultproxy import FaultProxy

from . import project
from .figures import Figure
from .null.base import connect

THREADS = 32
SECONDS = 0.2


def run(quick: bool = False) -> list[Figure]:
    """Let all threads connect at once: through the engine, then as pybreaker's call() has it."""
    null = project.add(**project.null(1, OPTIONS={"seconds": SECONDS}))
    without_server = at_once(functools.partial(_connect_and_close, null))
    with project.mariadb() as [node], FaultProxy(node) as proxy:
        proxy.delay(SECONDS)
        mariadb = project.add(**project.balanced([proxy]))
        through_proxy = at_once(functools.partial(_connect_and_close, mariadb))
    # Its lock makes the threads wait for one another: 32 times 0.2 s.
    breaker = pybreaker.CircuitBreaker()
    seconds = SECONDS / 10 if quick else SECONDS
    guarded = at_once(functools.partial(breaker.call, connect, seconds=seconds))
    return [
        Figure("engine, a driver that sleeps", without_server, "s", 0.35),
        Figure("engine, MariaDB behind a slow proxy", through_proxy, "s", 0.35),
        Figure("pybreaker's call()", guarded, "s"),
    ]


def at_once(function: Callable[[], Any]) -> float:
    """Return how long it takes until all threads have called ``function``."""
    barrier = threading.Barrier(THREADS + 1)

    def work() -> None:
        barrier.wait()
        function()

    with ThreadPoolExecutor(THREADS) as pool:
        calls = [pool.submit(work) for _ in range(THREADS)]
        barrier.wait()
        started = time.perf_counter()
        for call in calls:
            call.result()
        return time.perf_counter() - started


def _connect_and_close(alias: str) -> None:
    # A thread has wrappers of its own.
    project.connect_and_close(connections[alias])
