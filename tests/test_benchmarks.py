"""What the benchmarks can count; and that each of them runs. No test here looks at a clock."""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from django.db import connections
from django.db.backends.signals import connection_created

from tests.benchmarks import connect, project, replacement, shares, statement
from tests.benchmarks.__main__ import NAMES
from tests.benchmarks.figures import Figure, interleaved, table
from tests.engine import forget
from tests.servers.mariadb import Node

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def no_aliases_left() -> Iterator[None]:
    """Forget the aliases that a benchmark has added to DATABASES."""
    before = set(connections.databases)
    yield
    for alias in set(connections.databases) - before:
        connections[alias].close()
        if connections[alias].connection is not None:
            # Django's close() keeps an SQLite database that is in memory.
            connections[alias].connection.close()
        del connections[alias]
        del connections.databases[alias]
    forget()


def assert_met(figures: list[Figure]) -> None:
    assert any(figure.limit is not None for figure in figures)
    assert [figure for figure in figures if not figure.is_met] == []


# What a statement costs


def test_statement_calls_two_python_functions_more_at_most_without_a_server() -> None:
    assert_met(statement.without_server())


def test_statement_calls_two_python_functions_more_at_most_on_mariadb(mariadb: Node) -> None:
    assert_met(statement.counted_on_mariadb(mariadb))


def pair() -> list[Any]:
    """Return a wrapper of the plain engine and one of ours, without a server."""
    return [project.wrapper(ENGINE=statement.NULL), project.wrapper(**project.null(2))]


@pytest.mark.parametrize("sql", [project.READ, project.WRITE])
def test_statement_in_a_transaction_calls_two_python_functions_more_at_most(sql: str) -> None:
    calls = []
    for connection in pair():
        with statement.in_transaction(connection), connection.cursor() as cursor:
            cursor.execute(sql)
            calls.append(statement.python_calls(lambda: cursor.execute(sql)))
    assert calls[1] <= calls[0] + 2


@pytest.mark.parametrize(("work", "most"), [(project.execute, 6), (project.block, 55)])
def test_write_and_block_call_few_python_functions_more(
    work: Callable[[Any, str], None], most: int
) -> None:
    calls = []
    for connection in pair():
        write = functools.partial(work, connection, project.WRITE)
        # The first time something may be imported, compiled or cached.
        for _ in range(3):
            write()
        calls.append(statement.python_calls(write))
    assert calls[1] <= calls[0] + most


def test_python_calls_are_counted() -> None:
    def outer() -> None:
        inner()
        inner()

    def inner() -> int:
        return len("C functions are not counted")

    assert statement.python_calls(outer) == 2


# What a connect costs


def test_connect_calls_no_more_python_functions_than_it_is_known_for(
    mariadb: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A receiver that another test has left is called by Django, and counts for no engine.
    monkeypatch.setattr(connection_created, "receivers", [])
    assert_met(connect.counted(mariadb))


# What a replacement costs


def test_replacement_costs_one_connect_and_nothing_else(mariadb: Node) -> None:
    assert_met(replacement.counted(mariadb))


# Shares


@pytest.mark.parametrize("weights", [shares.EQUAL, shares.WEIGHTED])
@pytest.mark.parametrize("strategy", ["random", "round_robin", "least_connections"])
def test_shares_are_within_three_standard_deviations(
    strategy: Any, weights: dict[str, float]
) -> None:
    if strategy == "random":
        # With other draws each time one run in some hundred would miss, rightly.
        strategy = shares.seeded(1)
    counts = shares.spread(strategy, weights)
    assert sum(counts.values()) == shares.CONNECTS
    assert shares.deviation(counts, weights) <= 3


# How it is measured and shown


def test_each_is_measured_first_equally_often() -> None:
    first: list[str] = []
    order: list[str] = []
    clock = iter(range(10_000))

    def before() -> None:
        first.extend(order[:1])
        order.clear()

    interleaved(
        lambda: order.append("one"),
        lambda: order.append("other"),
        rounds=10,
        clock=lambda: next(clock),
        before=before,
    )
    assert set(first[:2]) == {"one", "other"}
    assert abs(first.count("one") - first.count("other")) <= 1


def test_comparison_is_by_medians_within_a_round() -> None:
    now = 0.0

    def takes(seconds: float) -> Any:
        def function() -> None:
            nonlocal now
            now += seconds

        return function

    measured = interleaved(takes(2), takes(3), rounds=5, clock=lambda: now, batch=10)
    assert measured.median(0) == pytest.approx(2)
    assert measured.ratio(0, 1) == pytest.approx(1.5)
    assert measured.added(0, 1) == pytest.approx(1)


def test_miss_is_shown_with_how_much_is_missing() -> None:
    lines = table(
        [
            Figure("measured", 12.5, "us"),
            Figure("kept", 12.5, "us", 30),
            Figure("missed", 42.5, "us", 30),
        ]
    ).splitlines()
    assert lines[0].split() == ["measured", "12.5", "us"]
    assert lines[1].endswith("at most     30: met")
    assert lines[2].endswith("at most     30: MISSED by 12.5 us")


# Each runs


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.benchmarks", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.mark.server
def test_quick_form_of_each_runs() -> None:
    done = run("--quick", "--json")
    assert done.returncode == 0, done.stderr
    skipped = [] if shutil.which("valgrind") else ["instructions"]
    assert [line.partition(":")[0] for line in done.stderr.splitlines()] == skipped
    sections = {
        name: [Figure(**figure) for figure in figures]
        for name, figures in json.loads(done.stdout).items()
    }
    assert list(sections) == [name for name in NAMES if name not in skipped]
    for figures in sections.values():
        assert any(figure.limit is not None for figure in figures)
    counts = [figure for figure in sections["hanging"] if isinstance(figure.value, int)]
    assert_met(counts)


def test_only_one_is_run_and_a_miss_is_no_failure() -> None:
    done = run("--only", "shares")
    assert done.returncode == 0, done.stderr
    assert "10,000 connects over 3 peers" in done.stdout
    assert "handshake" not in done.stdout
    assert done.stdout.rstrip().endswith("of 6 targets met")
