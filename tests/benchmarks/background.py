"""One of two peers hangs, trials are made in the background: what requests notice of it."""

from __future__ import annotations

import statistics
import threading
import time
from typing import Any

from django_proxysql import balancers
from tests.servers.mariadb import Node
from tests.servers.processes import start_together

from . import project
from .figures import Figure

THREADS = 2
#: Short, so that for most of the time there is a trial that hangs.
CHECK_INTERVAL = 1
CONNECT_TIMEOUT = 2
#: Seconds between two requests of a thread.
PAUSE = 0.002


def run(quick: bool = False) -> list[Figure]:
    """Take in turn a pair that is well, and one of which half hangs."""
    rounds, requests = (1, 150) if quick else (7, 700)
    hanging, healthy = Node("hanging"), Node("healthy")
    try:
        start_together(hanging, healthy)
        for node in (hanging, healthy):
            node.set_up()
        settings = {"CHECK_INTERVAL": CHECK_INTERVAL, "CONNECT_TIMEOUT": CONNECT_TIMEOUT}
        alias = project.add(
            "tried", **project.balanced([hanging, healthy], TRIALS="background", **settings)
        )
        inline = project.add("unprobed", **project.balanced([hanging, healthy], **settings))
        return _figures(alias, inline, hanging, rounds, requests)
    finally:
        hanging.close()
        healthy.close()


def _figures(alias: str, inline: str, hanging: Node, rounds: int, requests: int) -> list[Figure]:
    well: list[list[float]] = []
    again: list[list[float]] = []
    half: list[list[float]] = []
    without: list[list[float]] = []
    _served(alias, requests)
    for turn in range(rounds):
        for which in (0, 1) if turn % 2 else (1, 0):
            if which:
                well.append(_served(alias, requests))
                again.append(_served(alias, requests))
            else:
                half.append(_while_hanging(alias, hanging, requests))
        if turn % 4 == 0:
            without.append(_while_hanging(inline, hanging, requests))
    ratio = statistics.median(_p99(one) / _p99(other) for one, other in zip(half, well))
    control = statistics.median(_p99(one) / _p99(other) for one, other in zip(again, well))
    return [
        Figure("requests, in each part", len(well[0])),
        Figure("pair that is well: p99", statistics.median(map(_p99, well)) * 1e3, "ms"),
        Figure("one of two hangs: p99", statistics.median(map(_p99, half)) * 1e3, "ms"),
        Figure("well / well: p99", control),
        Figure("one hangs / well: p99", ratio, "", 1.1),
        Figure("pair that is well: longest request", max(map(max, well)), "s"),
        Figure("one of two hangs: longest request", max(map(max, half)), "s", CONNECT_TIMEOUT / 2),
        Figure("the same, TRIALS inline", max(map(max, without)), "s"),
    ]


def _while_hanging(alias: str, hanging: Node, requests: int) -> list[float]:
    """Serve requests from the moment on at which the peer's circuit is open."""
    breaker = balancers[alias].peers["peer0"].breaker
    hanging.freeze()
    try:
        while breaker.current_state == "closed":
            # The first to come by waits. It is none of those that count.
            _request(alias)
        return _served(alias, requests)
    finally:
        hanging.thaw()
        end = time.monotonic() + 30
        while not breaker.is_available:
            if time.monotonic() > end:
                raise RuntimeError("the peer did not come back")
            # Without the thread it is a request that makes the trial.
            _request(alias)
            time.sleep(PAUSE)


def _served(alias: str, requests: int) -> list[float]:
    """Serve requests in some threads; return the seconds that each took."""
    found: list[float] = []

    def work() -> None:
        for _ in range(requests):
            found.append(_request(alias))
            time.sleep(PAUSE)

    threads = [threading.Thread(target=work) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def _request(alias: str) -> float:
    """Do what a request does with CONN_MAX_AGE 0: connect, ask, close."""
    from django.db import connections

    began = time.perf_counter()
    connection: Any = connections[alias]
    with connection.cursor() as cursor:
        cursor.execute("SELECT 1")
        cursor.fetchall()
    connection.close_if_unusable_or_obsolete()
    return time.perf_counter() - began


def _p99(seconds: list[float]) -> float:
    return statistics.quantiles(seconds, n=100)[98]
