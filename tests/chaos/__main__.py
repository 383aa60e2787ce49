"""Put a site through chaos and print what came of it: ``python -m tests.chaos``."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import sys
import time
from dataclasses import asdict
from typing import Any, Callable

import django

from tests.servers.ports import ServerError
from tests.servers.runs import exit_on_sigterm

OWN_WRITES = "own-writes"


def main() -> int:
    os.environ["DJANGO_SETTINGS_MODULE"] = "tests.django_settings"
    django.setup()
    # What the engine logs of all this is not to be read here.
    logging.getLogger("django_proxysql").setLevel(logging.CRITICAL)

    from .load import HarnessError
    from .report import table
    from .runner import ENGINES
    from .scenarios import SCENARIOS

    parser = argparse.ArgumentParser(
        prog="python -m tests.chaos",
        description="Put a web site's load through chaos. Starts the servers that it needs.",
        epilog="Scenarios: "
        + "; ".join(f"{s.name}: {s.what}" for s in SCENARIOS.values())
        + f"; {OWN_WRITES}: a session reads its own writes on Galera.",
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=[*SCENARIOS, OWN_WRITES],
        default=[*SCENARIOS, OWN_WRITES],
        metavar="SCENARIO",
        help="run these scenarios",
    )
    parser.add_argument(
        "--seconds", type=float, default=30, help="for how long each (default: %(default)s)"
    )
    parser.add_argument(
        "--engine", choices=[*ENGINES, "all"], default="all", help="default: %(default)s"
    )
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    options = parser.parse_args()
    exit_on_sigterm()
    say = _Progress()
    engines = tuple(ENGINES) if options.engine == "all" else (options.engine,)
    try:
        with contextlib.ExitStack() as stack:
            results, own_writes = _run(options.only, engines, options.seconds, say, stack)
    except (HarnessError, ServerError) as exc:
        print(f"{type(exc).__name__}: {exc}", file=sys.stderr)
        return 2
    if options.json:
        found: dict[str, Any] = {"results": [asdict(result) for result in results]}
        if own_writes is not None:
            found["own_writes"] = asdict(own_writes)
        print(json.dumps(found))
    else:
        for engine in engines:
            lines = [result for result in results if result.engine == engine]
            if lines:
                print(f"\n{ENGINES[engine]}\n")
                print(table(lines))
        if own_writes is not None:
            print(f"\n{own_writes}")
    violations = [
        f"{r.scenario}: {v}" for r in results for v in r.violations if r.engine != "plain"
    ]
    if own_writes is not None:
        violations += own_writes.violations
    for violation in violations:
        print(f"violated: {violation}", file=sys.stderr)
    return 1 if violations else 0


def _run(
    names: list[str],
    engines: Any,
    seconds: float,
    say: Callable[[str], None],
    stack: contextlib.ExitStack,
) -> tuple[list[Any], Any]:
    from tests.servers.galera import GaleraCluster
    from tests.servers.mariadb import Node

    from .own_writes import measure
    from .runner import run
    from .scenarios import SCENARIOS
    from .sites import SITES, Galera, Site

    sites: dict[str, Site] = {}
    servers: dict[bool, Any] = {}

    def site_of(kind: str) -> Site:
        if kind not in sites:
            say(f"starting {kind}")
            make, is_cluster = SITES[kind]
            if is_cluster not in servers:
                server = stack.enter_context(GaleraCluster() if is_cluster else Node())
                servers[is_cluster] = server if is_cluster else server.set_up()
            sites[kind] = stack.enter_context(make(servers[is_cluster]))
        return sites[kind]

    results = []
    own_writes = None
    for name in names:
        if name == OWN_WRITES:
            site = site_of("galera")
            assert isinstance(site, Galera)
            say("own writes")
            own_writes = measure(site, say=lambda text: say(f"  {text}"))
            continue
        scenario = SCENARIOS[name]
        for engine in engines:
            site = site_of(scenario.site)
            say(f"{name}, {engine}")
            results += run(scenario, site, (engine,), seconds, say=lambda text: say(f"  {text}"))
    return results, own_writes


class _Progress:
    """Says on stderr what goes on, and when."""

    def __init__(self) -> None:
        self._started = time.monotonic()

    def __call__(self, text: str) -> None:
        print(f"{time.monotonic() - self._started:6.1f} {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    try:
        status = main()
    except KeyboardInterrupt:
        status = 130
    except BrokenPipeError:
        # The reader of the table has seen enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 141
    sys.exit(status)
