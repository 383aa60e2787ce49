"""Lose COMMITs, and print what the engine found out about them: ``python -m tests.outcomes``."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import logging
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import django

from tests.servers.ports import ServerError
from tests.servers.runs import exit_on_sigterm

SERVERS = ("mariadb", "postgresql", "galera")
#: That have a COMMIT under way when a node is cut off or killed.
THREADS = 32


def main() -> int:
    os.environ["DJANGO_SETTINGS_MODULE"] = "tests.django_settings"
    django.setup()
    logging.getLogger("django_proxysql").setLevel(logging.CRITICAL)
    parser = argparse.ArgumentParser(
        prog="python -m tests.outcomes",
        description="Lose the answers of COMMITs at random places, and compare what the engine "
        "found out with what stands. Starts the servers that it needs.",
    )
    parser.add_argument("--only", nargs="+", choices=SERVERS, default=SERVERS, metavar="SERVER")
    parser.add_argument(
        "--number",
        type=int,
        default=10_000,
        help="COMMITs; on Galera a third of them while a node is cut off or killed "
        "(default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    options = parser.parse_args()
    exit_on_sigterm()
    print(f"seed {options.seed}")
    print(f"{'servers':<34} {'lost':>6} {'stood':>6} {'wrong':>6} {'unknown':>8}  found out in")
    is_well = True
    try:
        for name in options.only:
            for label, found, seconds in runs(name, options):
                print(
                    f"{label:<34} {found.lost:>6,} {found.stood:>6,} {found.wrong:>6} "
                    f"{found.unknown:>8}  median {found.median * 1000:.1f} ms, "
                    f"at most {found.longest:.2f} s (ran {seconds:.0f} s)",
                    flush=True,
                )
                is_well = is_well and not (found.wrong or found.unknown)
    except ServerError as exc:
        print(exc, file=sys.stderr)
        return 2
    return 0 if is_well else 1


def runs(name: str, options: Any) -> Any:
    """Yield what was run on one kind of server, what came of it, and how long it took."""
    from tests.servers.galera import GaleraCluster
    from tests.servers.mariadb import Node
    from tests.servers.postgresql import PostgreSQLNode

    from .cutter import Cutter
    from .trial import Trial

    with contextlib.ExitStack() as stack:
        nodes: list[Any]
        if name == "galera":
            nodes = list(stack.enter_context(GaleraCluster()))
        elif name == "mariadb":
            nodes = [stack.enter_context(Node("outcomes")).set_up()]
        else:
            nodes = [stack.enter_context(PostgreSQLNode("outcomes")).set_up()]
        targets = nodes if len(nodes) > 1 else nodes * 2
        cutters = [
            stack.enter_context(Cutter(node, options.seed + number))
            for number, node in enumerate(targets)
        ]
        check = {"READY_CHECK": "galera"} if name == "galera" else {}
        struck = options.number // 3 if name == "galera" else 0
        started = time.monotonic()
        trial = Trial(cutters, nodes[0], is_mysql=name != "postgresql")
        with trial.running(**check):
            trial.lose(options.number - struck)
            yield f"{name}, packets cut", trial.found(), time.monotonic() - started
        if not struck:
            return
        for cutter in cutters:
            cutter.is_on = False
        # Until the node knows that it is alone, and the others that it is gone.
        cutters[0].delays = (*cutters[0].delays, 0.02, 0.1, 0.5, 2.0)
        started = time.monotonic()
        trial = Trial(cutters, nodes[1], is_mysql=True)
        with trial.running(in_order=True, **check):
            for hurt in itertools.cycle((cut_off, kill)):
                with hurt(nodes[0]) as strike:
                    trial.strike(strike, THREADS)
                nodes[0].cluster.restore()
                if len(trial.resolved) >= struck:
                    break
            yield f"{name}, a node cut off or killed", trial.found(), time.monotonic() - started


@contextlib.contextmanager
def cut_off(node: Any) -> Iterator[Callable[[], None]]:
    """Cut a node off from its cluster. Unlike its own method, this does not wait until it knows."""
    from tests.chaos.sites import admin

    with admin(node) as cursor:
        yield lambda: cursor.execute("SET GLOBAL wsrep_provider_options = 'gmcast.isolate=1'")
    node.isolated = True


@contextlib.contextmanager
def kill(node: Any) -> Iterator[Callable[[], None]]:
    """Kill a node."""
    yield node.kill


if __name__ == "__main__":
    sys.exit(main())
