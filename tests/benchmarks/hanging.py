"""A peer that hangs is waited for by the caller with the trial, and by no other."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from django.db import connections

from django_proxysql import balancers
from django_proxysql.core.events import CircuitOpened, Connected, ConnectFailed, Event
from tests.servers.mariadb import Node

from . import project
from .figures import Figure

THREADS = 8
CONNECT_TIMEOUT = 2


class Connect(NamedTuple):
    """One connect()."""

    began: float
    seconds: float
    #: Whether it made a trial on the way.
    tried: bool
    #: Whether it waited for a peer in vain, and that was no trial.
    waited: bool


def run(quick: bool = False) -> list[Figure]:
    """Hang one of two peers while threads connect and close as fast as they can."""
    check_interval, seconds = (1, 3.5) if quick else (5, 17.0)
    with project.mariadb(2) as [hanging, healthy]:
        entry = project.balanced(
            [hanging, healthy], CHECK_INTERVAL=check_interval, CONNECT_TIMEOUT=CONNECT_TIMEOUT
        )
        return _figures(project.add(**entry), hanging, seconds)


def _figures(alias: str, hanging: Node, seconds: float) -> list[Figure]:
    here = threading.local()
    opened: list[float] = []
    connects: list[Connect] = []
    errors: list[Exception] = []
    stop = threading.Event()

    def listen(event: Event) -> None:
        # In the thread to which it happened.
        if isinstance(event, (Connected, ConnectFailed)) and event.trial:
            here.tried = True
        elif isinstance(event, ConnectFailed):
            here.waited = True
        elif isinstance(event, CircuitOpened):
            opened.append(time.perf_counter())

    def work() -> None:
        connection = connections[alias]
        while not stop.is_set():
            here.tried = here.waited = False
            began = time.perf_counter()
            try:
                connection.connect()
            except Exception as exc:
                errors.append(exc)
            else:
                seconds = time.perf_counter() - began
                connects.append(Connect(began, seconds, here.tried, here.waited))
                connection.close()

    balancers[alias].add_listener(listen)
    with ThreadPoolExecutor(THREADS) as pool:
        for _ in range(THREADS):
            pool.submit(work)
        try:
            time.sleep(1)
            hanging.freeze()
            stop.wait(seconds)
        finally:
            stop.set()
            # A caller between the server's greeting and the end of Django's set-up has no time-out.
            hanging.thaw()
    if not opened:
        raise RuntimeError("the peer hung, and its circuit did not open")
    before = [connect for connect in connects if connect.began < opened[0]]
    after = [connect for connect in connects if connect.began >= opened[0]]
    tried = [connect.seconds for connect in after if connect.tried]
    others = [connect.seconds for connect in after if not connect.tried]
    return [
        Figure("connects that failed", len(errors), "", 0),
        Figure(
            "that were caught by the freeze",
            sum(connect.seconds >= CONNECT_TIMEOUT / 2 for connect in before),
            "",
            THREADS,
        ),
        Figure("connects begun after the circuit opened", len(after)),
        Figure("of these, with a trial", len(tried)),
        Figure("that waited without a trial", sum(connect.waited for connect in after), "", 0),
        Figure("longest connect with a trial", max(tried, default=0.0), "s"),
        Figure("longest connect without one", max(others), "s", CONNECT_TIMEOUT / 2),
    ]
