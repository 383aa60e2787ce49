"""``python -m tests.fleet``: see the package."""

from __future__ import annotations

import argparse
import logging
import platform
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from tests.servers.redis import RedisServer

from . import measurement, plots
from .simulation import Outcome, Scenario, simulate

DOCS = Path(__file__).resolve().parents[2] / "docs" / "explanation"


def table(outcomes: Sequence[Outcome]) -> str:
    """Return the outcomes, one a column."""
    names = [outcome.scenario.name for outcome in outcomes]
    rows = [
        ("requests that met the dead peer", [f"{o.cost:,}" for o in outcomes]),
        ("trials an interval", [f"{o.trials_an_interval:,.1f}" for o in outcomes]),
        ("most trials in a second", [f"{o.most_trials_a_second:,}" for o in outcomes]),
        ("half have it back after", [f"{o.recovery(0.5):.1f} s" for o in outcomes]),
        ("all have it back after", [f"{o.recovery(1):.1f} s" for o in outcomes]),
        ("from the first to the last", [f"{_spread(o):.1f} s" for o in outcomes]),
        ("most connects to it in a second, by its share", [f"{o.herd:.2f}" for o in outcomes]),
        (
            "round trips to Redis a second and process",
            [f"{o.round_trips / o.scenario.processes / o.scenario.ends_at:.2f}" for o in outcomes],
        ),
    ]
    width = max(len(name) for name, _ in rows)
    columns = [max(len(name), 12) for name in names]
    lines = [" " * width + "".join(f"  {n:>{w}}" for n, w in zip(names, columns))]
    for name, values in rows:
        lines.append(f"{name:{width}}" + "".join(f"  {v:>{w}}" for v, w in zip(values, columns)))
    return "\n".join(lines)


def _spread(outcome: Outcome) -> float:
    return max(outcome.closed) - min(outcome.closed)


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(prog="python -m tests.fleet", description=__doc__)
    parser.add_argument("what", choices=["simulate", "measure", "redis"])
    parser.add_argument("--processes", type=int, help="5000 simulated, 200 real")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--plots", type=Path, help="a folder to draw the plots into")
    options = parser.parse_args()
    if options.plots and find_spec("matplotlib") is None:
        parser.error("--plots needs matplotlib: pip install matplotlib")
    logging.getLogger("django_proxysql").setLevel(logging.CRITICAL)
    print(f"Python {platform.python_version()}, {platform.system()} {platform.machine()}")
    with RedisServer() as redis:
        if options.what == "measure":
            measurement.measure(options.processes or 200, redis)
        elif options.what == "redis":
            measurement.redis_in_trouble(redis)
        else:
            processes = options.processes or 5000
            outcomes = []
            for sharing, jitter in ((False, False), (False, True), (True, False), (True, True)):
                scenario = Scenario(processes, sharing, jitter, options.seed)
                print(scenario.name, file=sys.stderr)
                outcomes.append(simulate(scenario, redis.url))
            print(f"{processes:,} simulated processes, seed {options.seed}")
            print(table(outcomes))
            if options.plots:
                for path in plots.draw(outcomes, options.plots):
                    print(path)


if __name__ == "__main__":
    main()
