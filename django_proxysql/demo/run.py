"""The demo's time line: a site starts, is put under load, loses a peer and gets it back.

The load is clients that ask for pages over real sockets, and look at the answers.
"""

from __future__ import annotations

import json
import logging
import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from http.client import HTTPConnection, HTTPException
from typing import Any

from django.core.handlers.wsgi import WSGIHandler

from ..core.events import CircuitClosed, CircuitOpened, Connected, ConnectFailed
from ..registry import balancers
from . import site
from .peers import NAMES, Peers
from .screen import Screen, ScreenHandler, Tally

CLIENTS = 8

#: Seconds after which a client gives a page up: more than any connect() may take.
PATIENCE = 30

#: The peer that fails.
VICTIM = "peer1"

#: When it fails and when it is restored, in parts of the demo's time.
FAILS_AT, RESTORED_AT = 0.25, 0.6

#: A circuit stays open for this part of the time, so that some trials fail.
CHECK_INTERVAL = 0.1

#: Seconds that the end waits, at most, for the victim's circuit to close.
GRACE = 15.0

_COUNTED = {
    Connected: "connects",
    ConnectFailed: "failed",
    CircuitOpened: "opened",
    CircuitClosed: "closed",
}


class Demo:
    """One run; a listener of the balancer, whose own log lines report circuits.

    :param screen: where it writes.
    :param seconds: how long it runs.
    """

    def __init__(self, screen: Screen, seconds: float) -> None:
        self._screen = screen
        self._peers = Peers()
        self._seconds = seconds
        self._tally = Tally(NAMES)

    def run(self) -> int:
        """Run to the end; return the exit code."""
        screen, tally, took = self._screen, self._tally, 0.0
        try:
            with ExitStack() as stack:
                databases = self._peers.start(stack)
                check_interval = self._seconds * CHECK_INTERVAL
                site.set_up(databases, check_interval)
                site.fill(next(iter(databases)))
                self._listen(stack)
                port = stack.enter_context(site.serving(WSGIHandler()))
                screen.say(
                    f"{CLIENTS} clients ask it for pages on http://{site.HOST}:{port}/, "
                    f"CHECK_INTERVAL is {check_interval:g} s"
                )
                screen.say(f"status page: http://{site.HOST}:{port}/status/")
                screen.start_clock()
                stack.enter_context(asking(port, tally))
                try:
                    self._watch()
                finally:
                    took = screen.elapsed
        finally:
            if took:
                screen.end(tally, took)
        return 1 if tally.errors else 0

    def __call__(self, event: Any) -> None:
        """Count an event, and say how a trial ended; a listener."""
        what = _COUNTED.get(type(event))
        if what is None:
            return
        is_trial = getattr(event, "trial", False)
        out = event.seconds if isinstance(event, CircuitClosed) else 0
        self._tally.happened(event.peer, **{what: 1, "trials": int(is_trial), "out": out})
        if is_trial:
            outcome = f"failed: {event.error}" if isinstance(event, ConnectFailed) else "succeeded"
            line = f"the trial of {event.peer}, its circuit half-open, {outcome}"
            self._screen.say(line, "yellow")

    def _listen(self, stack: ExitStack) -> None:
        balancer = balancers["default"]
        balancer.add_listener(self)
        stack.callback(balancer.remove_listener, self)
        handler = ScreenHandler(self._screen)
        for name, level in (("django_proxysql", logging.INFO), ("django.request", logging.ERROR)):
            logger = logging.getLogger(name)
            logger.setLevel(level)
            logger.propagate = False
            logger.addHandler(handler)
            stack.callback(logger.removeHandler, handler)

    def _watch(self) -> None:
        screen, peers = self._screen, self._peers
        steps = [
            (FAILS_AT, f"now {VICTIM} fails: its path is taken away", peers.fail),
            (RESTORED_AT, f"now {VICTIM} is restored: its path is there again", peers.restore),
        ]
        while True:
            elapsed = screen.elapsed
            if steps and elapsed >= steps[0][0] * self._seconds:
                _, line, step = steps.pop(0)
                screen.say(line, "bold")
                step(VICTIM)
            states = balancers["default"].snapshot()
            screen.show(self._tally, states, self._seconds)
            is_out = any(state.state != "closed" for state in states)
            if elapsed >= self._seconds + (GRACE if is_out else 0):
                return
            time.sleep(0.1)


# Clients


@contextmanager
def asking(port: int, tally: Tally) -> Iterator[None]:
    """Have the clients ask the site on this port while the block runs."""
    ended = threading.Event()

    def client() -> None:
        while not ended.is_set():
            tally.answered(_ask(port))

    with ThreadPoolExecutor(CLIENTS, "client") as clients:
        try:
            for _ in range(CLIENTS):
                clients.submit(client)
            yield
        finally:
            ended.set()


def _ask(port: int) -> str:
    """Ask for one page; return what is wrong with the answer, or nothing."""
    number = random.randrange(site.PRODUCTS)
    client = HTTPConnection(site.HOST, port, timeout=PATIENCE)
    try:
        client.request("GET", f"/products/{number}/")
        answer = client.getresponse()
        body = answer.read()
        if answer.status != 200:
            return f"HTTP {answer.status} {answer.reason}"
        name = json.loads(body)["name"]
        return "" if name == site.name_of(number) else f"not what was asked for: {name!r}"
    except (OSError, HTTPException, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        client.close()
