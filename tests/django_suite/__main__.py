"""Run Django's test suite on the plain engine and on ours, and print what differs."""

from __future__ import annotations

import argparse
import pathlib
import platform
import sys
import tempfile
from collections.abc import Collection
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import django

from tests.servers.ports import ServerError
from tests.servers.runs import exit_on_sigterm

from .compare import EXPECTED, Outcome, compare, read
from .engines import ENGINES, balanced
from .suite import SuiteError, django_tests, progress, results_of, run, stop

#: How the two runs are called, the plain engine's and the balancer's.
RUNS = ("plain", "balanced")

#: Seconds between two lines on how far they are; on a terminal it is one line, drawn anew.
EVERY = 60

FOLDER = pathlib.Path(tempfile.gettempdir()) / "django-proxysql-suite"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.django_suite",
        description="Run Django's own test suite twice, on the plain peer engine and through the "
        "load balancer, and print the tests that differ. Fetches the sdist of the Django that is "
        "installed, and starts the servers that it needs. Exit status 1: something differs; 2: a "
        "run came to no end.",
    )
    parser.add_argument(
        "labels", nargs="*", help="folders of Django's tests/; all if none is given"
    )
    parser.add_argument(
        "--engine", choices=list(ENGINES), default="sqlite", help="the peers' engine"
    )
    parser.add_argument(
        "--folder",
        type=pathlib.Path,
        default=FOLDER,
        help="where sdist, results and logs are kept (default: %(default)s)",
    )
    parser.add_argument(
        "--only",
        choices=RUNS,
        help="run this half alone, and compare it with what the folder has of the other one: the "
        "plain engine's results do not change with our code",
    )
    options = parser.parse_args()
    exit_on_sigterm()
    tests = django_tests(options.folder)

    def stem(name: str) -> pathlib.Path:
        return options.folder / f"{tests.parent.name}-{options.engine}-{name}"

    def one(name: str) -> dict[str, Outcome]:
        with ENGINES[options.engine]() as databases:
            if name == "balanced":
                databases = {alias: balanced(entry) for alias, entry in databases.items()}
            return read(run(tests, databases, options.labels, stem(name)))

    try:
        with ThreadPoolExecutor() as pool:
            try:
                names = [options.only] if options.only else RUNS
                runs = {name: pool.submit(one, name) for name in names}
                show_progress(runs.values(), [stem(name) for name in names])
                plain, ours = (
                    runs[name].result() if name in runs else read(results_of(stem(name)))
                    for name in RUNS
                )
            except BaseException:
                stop()
                raise
    except (SuiteError, ServerError, FileNotFoundError) as exc:
        print(exc, file=sys.stderr)
        return 2
    comparison = compare(plain, ours, EXPECTED)
    print(f"Django {django.get_version()}, {options.engine}, Python {platform.python_version()}")
    print(comparison)
    return 1 if comparison.differences else 0


def show_progress(runs: Collection[Future[Any]], stems: Collection[pathlib.Path]) -> None:
    """Say on stderr how many tests have been run, until both runs are over or one has failed."""
    live = sys.stderr.isatty()
    while True:
        done, under_way = wait(runs, timeout=1 if live else EVERY, return_when="FIRST_EXCEPTION")
        if not under_way or any(run.exception() for run in done):
            print(end="\n" if live else "", file=sys.stderr)
            return
        counts = [f"{stem.name} {progress(stem)}" for stem in stems]
        print(*counts, sep=", ", end="\r" if live else "\n", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
