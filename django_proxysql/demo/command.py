"""``python -m django_proxysql demo``: the time line, signals, exit codes.

====  =============================================================
exit  when
====  =============================================================
0     every request was answered well
1     a request was not
2     the demo cannot run, or has bad arguments
130   ended by Ctrl-C; 143 by SIGTERM, 129 by SIGHUP
141   what the output was piped into has ended
====  =============================================================
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Callable

from ..registry import balancers
from . import site
from .load import CLIENTS, Load
from .peers import CannotRun, Peers
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

SHORTEST = 2.0


class Interrupted(BaseException):
    """A signal asks us to end."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.exit_code = 128 + signum


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    options = _parser().parse_args(argv)
    screen = Screen(sys.stdout, os.environ)
    try:
        with _signals_raise():
            return _Demo(screen, options.seconds).run()
    except CannotRun as error:
        print(f"django_proxysql demo: {error}", file=sys.stderr)
        return 2
    except Interrupted as interrupted:
        return interrupted.exit_code
    except BrokenPipeError:
        # Or the interpreter would fail once more at its end, when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + 13


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m django_proxysql")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    demo = commands.add_parser(
        "demo",
        help="run a small site under load while a peer fails and recovers",
        description="Run a small Django site on three SQLite peers, drive load at it, and show "
        "how the load balancer copes with a peer that fails and recovers. Leaves nothing behind.",
    )
    demo.add_argument(
        "--seconds",
        type=_seconds,
        default=20.0,
        metavar="N",
        help="how long it runs (default: 20)",
    )
    return parser


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds") from None
    if not math.isfinite(seconds) or seconds < SHORTEST:
        raise argparse.ArgumentTypeError(f"{text} is not a number of at least {SHORTEST:g} seconds")
    return seconds


@contextmanager
def _signals_raise() -> Iterator[None]:
    """Let the first signal that asks us to end raise Interrupted; ignore those after it.

    Then nothing disturbs the cleaning up.
    """
    numbers = [
        getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
    ]

    def handler(signum: int, frame: FrameType | None) -> None:
        for number in numbers:
            signal.signal(number, signal.SIG_IGN)
        raise Interrupted(signum)

    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


class _Demo:
    """One run."""

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
        screen.say(f"django-proxysql: a Django site on three SQLite peers, for {self._seconds:g} s")
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
