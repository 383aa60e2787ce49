"""The demo's time line: a site starts, is put under load, loses a peer and gets it back."""

from __future__ import annotations

import logging
import time
from collections import deque
from contextlib import ExitStack
from typing import Callable

from ..registry import balancers
from . import site
from .load import CLIENTS, Load
from .peers import Peers
from .screen import Screen, ScreenHandler
from .tally import Sample, Tally

#: The peer that fails.
VICTIM = "peer1"

#: When it fails and when it is restored, in parts of the demo's time.
FAILS_AT, RESTORED_AT = 0.25, 0.6

#: A circuit stays open for this part of the time, so that some trials fail.
CHECK_INTERVAL = 0.1

#: Seconds that the end waits, at most, for the victim's circuit to close.
GRACE = 15.0


class Demo:
    """One run.

    :param screen: where it writes.
    :param seconds: how long it runs.
    """

    def __init__(self, screen: Screen, seconds: float) -> None:
        self._screen = screen
        self._peers = Peers()
        self._seconds = seconds
        self._load = Load()
        self._tally = Tally(lambda line: screen.say(line, "yellow"))
        self._handler = ScreenHandler(screen)

    def run(self) -> int:
        """Run to the end; return the exit code."""
        screen, took = self._screen, 0.0
        try:
            with ExitStack() as stack:
                databases = self._peers.start(stack)
                check_interval = self._seconds * CHECK_INTERVAL
                site.set_up(databases, check_interval)
                site.fill(next(iter(databases)))
                self._listen(stack)
                port = stack.enter_context(site.serving())
                screen.say(
                    f"{CLIENTS} clients ask it for pages on http://{site.HOST}:{port}/, "
                    f"CHECK_INTERVAL is {check_interval:g} s"
                )
                screen.say(f"status page: http://{site.HOST}:{port}/status/")
                screen.start_clock()
                stack.enter_context(self._load.on(port))
                try:
                    self._watch()
                finally:
                    took = screen.elapsed
        finally:
            if took:
                screen.end_table()
                screen.summarize(self._load, self._tally, took)
        return 1 if self._load.errors else 0

    def _listen(self, stack: ExitStack) -> None:
        balancer = balancers["default"]
        balancer.add_listener(self._tally)
        stack.callback(balancer.remove_listener, self._tally)
        for name, level in (("django_proxysql", logging.INFO), ("django.request", logging.ERROR)):
            logger = logging.getLogger(name)
            logger.setLevel(level)
            logger.propagate = False
            logger.addHandler(self._handler)
            stack.callback(logger.removeHandler, self._handler)

    def _watch(self) -> None:
        screen, peers = self._screen, self._peers
        steps: deque[tuple[float, str, Callable[[str], None]]] = deque(
            [
                (FAILS_AT, f"now {VICTIM} fails: its path is taken away", peers.fail),
                (RESTORED_AT, f"now {VICTIM} is restored: its path is there again", peers.restore),
            ]
        )
        while True:
            elapsed = screen.elapsed
            if steps and elapsed >= steps[0][0] * self._seconds:
                _, line, step = steps.popleft()
                screen.say(line, "bold")
                step(VICTIM)
            sample = self._sample(elapsed)
            screen.show(sample)
            is_out = any(state.state != "closed" for state in sample.states)
            if elapsed >= self._seconds + (GRACE if is_out else 0):
                return
            time.sleep(0.1)

    def _sample(self, elapsed: float) -> Sample:
        connects, failed = self._tally.counts()
        return Sample(
            elapsed=elapsed,
            seconds=self._seconds,
            requests=self._load.requests,
            errors=sum(self._load.errors.values()),
            connects=connects,
            failed=failed,
            states=balancers["default"].snapshot(),
        )
