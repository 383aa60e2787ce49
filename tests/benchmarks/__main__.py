"""Run the benchmarks and print their figures: ``python -m tests.benchmarks [--only NAME]``."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time

from tests.servers.ports import ServerError
from tests.servers.runs import exit_on_sigterm

from . import project
from .figures import Figure, Skipped, machine, table

NAMES = {
    "asynchronous": "a connect under asyncio, and connects that are cancelled",
    "background": "requests while one of two peers hangs, trials in the background",
    "connect": "a connect through the engine and through the plain engine",
    "handshake": "32 threads connect at once to a peer that takes 200 ms",
    "hanging": "8 threads, and one of two peers hangs",
    "instructions": "what the client runs for a connect and for statements, counted",
    "metrics": "what metrics add to a connect, and to a request",
    "outcome": "what COMMIT_OUTCOME adds to a block",
    "shares": "10,000 connects over 3 peers",
    "statement": "a statement through the engine and through the plain engine",
    "replacement": "what a statement costs whose connection is replaced first",
}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks",
        description="Measure what the engine costs. Starts the servers that it needs. A figure "
        "that misses its target is printed as such; the exit status stays 0.",
        epilog="Benchmarks: " + "; ".join(f"{name}: {what}" for name, what in NAMES.items()) + ".",
    )
    parser.add_argument(
        "--only",
        action="append",
        choices=list(NAMES),
        metavar="NAME",
        help="run this benchmark (may be given more than once)",
    )
    parser.add_argument(
        "--quick", action="store_true", help="few rounds: shows that it runs, not what it costs"
    )
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    options = parser.parse_args()
    exit_on_sigterm()
    project.configure()
    sections: dict[str, list[Figure]] = {}
    if not options.json:
        print(machine())
    for name in options.only or NAMES:
        started = time.monotonic()
        try:
            figures = importlib.import_module(f"{__package__}.{name}").run(quick=options.quick)
        except Skipped as exc:
            print(f"{name}: skipped, {exc}", file=sys.stderr)
            continue
        except ServerError as exc:
            print(f"{name}: {exc}", file=sys.stderr)
            return 2
        sections[name] = figures
        if not options.json:
            print(f"\n{name}: {NAMES[name]} ({time.monotonic() - started:.0f} s)\n")
            print(table(figures), flush=True)
    if options.json:
        print(json.dumps({name: [f._asdict() for f in found] for name, found in sections.items()}))
        return 0
    every = [figure for figures in sections.values() for figure in figures]
    missed = [figure for figure in every if not figure.is_met]
    targets = sum(figure.limit is not None for figure in every)
    print(f"\n{targets - len(missed)} of {targets} targets met")
    return 0


if __name__ == "__main__":
    try:
        status = main()
    except KeyboardInterrupt:
        status = 130
    except BrokenPipeError:
        # The reader of the figures has seen enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 141
    sys.exit(status)
