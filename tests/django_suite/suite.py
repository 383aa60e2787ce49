"""Fetching Django's tests, and running them."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[2]


running: set[subprocess.Popen[bytes]] = set()


class SuiteError(Exception):
    """A run came to no end: there is nothing to compare."""


def django_tests(folder: pathlib.Path) -> pathlib.Path:
    """Return the tests/ of the Django that is installed, from its sdist."""
    import django

    version = django.get_version()
    folder.mkdir(parents=True, exist_ok=True)
    found = folder / f"django-{version}" / "tests"
    if not found.is_dir():
        what = ["--no-deps", "--no-binary", ":all:", f"Django=={version}"]
        pip = [sys.executable, "-m", "pip", "download", "-q", *what]
        subprocess.run([*pip, "-d", os.fspath(folder)], check=True)
        (sdist,) = (
            p for p in folder.glob("*.tar.gz") if p.name.lower() == f"django-{version}.tar.gz"
        )
        with tempfile.TemporaryDirectory(dir=folder) as whole, tarfile.open(sdist) as archive:
            # Early patch releases of Python 3.9 to 3.11 take no filter.
            safely: Any = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
            archive.extractall(whole, **safely)
            # Another process may have come first.
            with contextlib.suppress(OSError):
                os.rename(os.path.join(whole, found.parent.name), found.parent)
    return found


def results_of(stem: pathlib.Path) -> pathlib.Path:
    """Return where a run writes a line for each outcome."""
    return stem.with_name(stem.name + ".jsonl")


def progress(stem: pathlib.Path) -> int:
    """Return how many outcomes a run has written."""
    try:
        with open(results_of(stem), "rb") as lines:
            return sum(1 for _ in lines)
    except FileNotFoundError:
        return 0


def run(
    tests: pathlib.Path,
    databases: Mapping[str, Mapping[str, Any]],
    labels: Sequence[str],
    stem: pathlib.Path,
) -> pathlib.Path:
    """Run ``runtests.py`` once; return the file with a line for each outcome.

    :param stem: of the names of that file and of the log.
    """
    results = results_of(stem)
    results.unlink(missing_ok=True)
    extra = filter(None, [os.environ.get("PYTHONPATH")])
    command = [sys.executable, "-W", "ignore", "runtests.py", "--noinput", "--parallel=1"]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([os.fspath(ROOT), *extra]),
        "DJANGO_SUITE_DATABASES": json.dumps(databases),
        "DJANGO_SUITE_RESULTS": os.fspath(results),
    }
    log = stem.with_name(stem.name + ".log")
    with open(log, "wb") as output:
        process = subprocess.Popen(
            [*command, "--settings=tests.django_suite.settings", *labels],
            cwd=tests,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    running.add(process)
    try:
        status = process.wait()
    finally:
        running.discard(process)
    ending = log.read_text(errors="replace")[-2000:]
    if "\nRan " not in ending:
        raise SuiteError(f"{log}: exit status {status}\n{ending}")
    return results


def stop() -> None:
    """End the runs that are under way."""
    for process in list(running):
        process.terminate()
