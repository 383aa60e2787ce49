"""One of two peers hangs, trials are made in the background: what requests notice of it."""

from __future__ import annotations

import statistics
import time
from concurrent.futures import ThreadPoolExecutor

from django.db import connections

from django_proxysql import balancers
from tests.servers.mariadb import Node

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
    settings = {"CHECK_INTERVAL": CHECK_INTERVAL, "CONNECT_TIMEOUT": CONNECT_TIMEOUT}
    with project.mariadb(2) as nodes:
        background = project.add(**project.balanced(nodes, TRIALS="background", **settings))
        inline = project.add(**project.balanced(nodes, **settings))
        return _figures(background, inline, nodes[0], rounds, requests)


def _figures(alias: str, inline: str, hanging: Node, rounds: int, requests: int) -> list[Figure]:
    well: list[list[float]] = []
    again: list[list[float]] = []
    half: list[list[float]] = []
    without: list[list[float]] = []
    _served(alias, requests)
    for turn in range(rounds):
        for is_well in (False, True) if turn % 2 else (True, False):
            if is_well:
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

    def work(_: int) -> list[float]:
        found = []
        for _ in range(requests):
            found.append(_request(alias))
            time.sleep(PAUSE)
        return found

    with ThreadPoolExecutor(THREADS) as pool:
        return [seconds for found in pool.map(work, range(THREADS)) for seconds in found]


def _request(alias: str) -> float:
    """Do what a request does with CONN_MAX_AGE 0: connect, ask, close."""
    began = time.perf_counter()
    connection = connections[alias]
    project.execute(connection, project.READ)
    connection.close_if_unusable_or_obsolete()
    return time.perf_counter() - began


def _p99(seconds: list[float]) -> float:
    return statistics.quantiles(seconds, n=100)[98]
