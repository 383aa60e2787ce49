"""``python -m django_proxysql demo``: arguments, signals, exit codes.

What it shows is in :mod:`~django_proxysql.demo.run`. That is imported once the first line is
written: Django takes a second on a busy machine.

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
import math
import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType

from .peers import CannotRun

SHORTEST = 2.0

#: What asks us to end. Windows has no SIGHUP.
_SIGNALS = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    options = _parser().parse_args(argv)
    for number in _SIGNALS:
        signal.signal(number, _end)
    try:
        print(
            f"django-proxysql: a Django site on three SQLite peers, for {options.seconds:g} s",
            flush=True,
        )
        from .run import Demo
        from .screen import Screen

        return Demo(Screen(sys.stdout, os.environ), options.seconds).run()
    except CannotRun as error:
        print(f"django_proxysql demo: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # Or the interpreter would fail once more at its end, when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + 13


def _end(signum: int, frame: FrameType | None) -> None:
    """End as a shell's commands do. Later signals do not disturb the cleaning up."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    raise SystemExit(128 + signum)


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
