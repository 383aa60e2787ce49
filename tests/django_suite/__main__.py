"""Run Django's test suite on the plain engine and on ours, and print what differs."""

from __future__ import annotations

import argparse
import pathlib
import platform
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor

import django

from django_proxysql.demo.servers import ServerError, exit_on_sigterm

from .compare import EXPECTED, Outcome, compare, read
from .engines import ENGINES, balanced
from .suite import SuiteError, django_tests, run, stop

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
    options = parser.parse_args()
    exit_on_sigterm()
    tests = django_tests(options.folder)

    def one(name: str) -> dict[str, Outcome]:
        with ENGINES[options.engine]() as databases:
            if name == "balanced":
                databases = {alias: balanced(entry) for alias, entry in databases.items()}
            stem = options.folder / f"{tests.parent.name}-{options.engine}-{name}"
            return read(run(tests, databases, options.labels, stem))

    try:
        with ThreadPoolExecutor() as pool:
            try:
                plain, ours = pool.map(one, ("plain", "balanced"))
            except BaseException:
                stop()
                raise
    except (SuiteError, ServerError) as exc:
        print(exc, file=sys.stderr)
        return 2
    comparison = compare(plain, ours, EXPECTED)
    print(f"Django {django.get_version()}, {options.engine}, Python {platform.python_version()}")
    print(comparison)
    return 1 if comparison.differences else 0


if __name__ == "__main__":
    sys.exit(main())
