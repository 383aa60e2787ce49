"""The demo's time line: a site starts, is put under load, loses a peer and gets it back."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from contextlib import ExitStack
from typing import Any, Callable

from ..core.events import CircuitClosed, CircuitOpened, Connected, ConnectFailed
from ..registry import balancers
from . import site
from .load import CLIENTS, Load
from .peers import NAMES, Peers
from .screen import Sample, Screen, ScreenHandler

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
        self._load = Load()
        self._handler = ScreenHandler(screen)
        #: By peer how often each thing happened, and for how many seconds it was "out".
        self._counts: dict[str, Any] = {name: Counter() for name in NAMES}
        # Events come in the threads to which the things happen.
        self._lock = threading.Lock()

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
                screen.summarize(self._load.requests, self._load.errors, self._counts, took)
        return 1 if self._load.errors else 0

    def __call__(self, event: Any) -> None:
        """Count an event, and say how a trial ended; a listener."""
        what = _COUNTED.get(type(event))
        if what is None:
            return
        is_trial = getattr(event, "trial", False)
        with self._lock:
            counts = self._counts[event.peer]
            counts[what] += 1
            counts["trials"] += is_trial
            if isinstance(event, CircuitClosed):
                counts["out"] += event.seconds
        if is_trial:
            outcome = f"failed: {event.error}" if isinstance(event, ConnectFailed) else "succeeded"
            line = f"the trial of {event.peer}, its circuit half-open, {outcome}"
            self._screen.say(line, "yellow")

    def _listen(self, stack: ExitStack) -> None:
        balancer = balancers["default"]
        balancer.add_listener(self)
        stack.callback(balancer.remove_listener, self)
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
            with self._lock:
                counts = {name: counts.copy() for name, counts in self._counts.items()}
            states = balancers["default"].snapshot()
            requests, errors = self._load.requests, sum(self._load.errors.values())
            screen.show(Sample(elapsed, self._seconds, requests, errors, counts, states))
            is_out = any(state.state != "closed" for state in states)
            if elapsed >= self._seconds + (GRACE if is_out else 0):
                return
            time.sleep(0.1)
