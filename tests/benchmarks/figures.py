"""What the benchmarks have in common: figures, and the statistics behind them."""

from __future__ import annotations

import gc
import os
import platform
import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple


class Figure(NamedTuple):
    """One line of a table."""

    name: str
    value: float
    unit: str = ""
    #: The most that it may be; None: it stands beside others for comparison.
    limit: float | None = None

    @property
    def is_met(self) -> bool:
        return self.limit is None or self.value <= self.limit


class Comparison(NamedTuple):
    """Two callables, measured in turn: medians over all rounds, in seconds a call."""

    one: float
    other: float
    #: The median of the differences within a round.
    difference: float

    @property
    def ratio(self) -> float:
        return self.other / self.one


def interleaved(
    one: Callable[[], Any],
    other: Callable[[], Any],
    *,
    rounds: int,
    clock: Callable[[], float],
    batch: int = 1,
    after: Callable[[], Any] | None = None,
) -> Comparison:
    """Measure two callables in turn, each first in every other round.

    :param batch: how many calls are measured together.
    :param after: called, unmeasured, after each batch.
    """
    durations: dict[Callable[[], Any], list[float]] = {one: [], other: []}

    def measure(function: Callable[[], Any]) -> None:
        started = clock()
        for _ in range(batch):
            function()
        durations[function].append((clock() - started) / batch)
        if after is not None:
            after()

    for _ in range(20):
        for warm_up in (one, other):
            warm_up()
            if after is not None:
                after()
    gc.collect()
    gc.disable()
    try:
        for turn in range(rounds):
            for function in (one, other) if turn % 2 else (other, one):
                measure(function)
    finally:
        gc.enable()
    return Comparison(
        statistics.median(durations[one]),
        statistics.median(durations[other]),
        statistics.median(b - a for a, b in zip(durations[one], durations[other])),
    )


def machine() -> str:
    """Return what the figures hang on, in one line."""
    import django

    return (
        f"Python {platform.python_version()}, Django {django.__version__}, "
        f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    )


def table(figures: Sequence[Figure]) -> str:
    """Return the figures, one a line, each with what it may be at most."""
    width = max(len(figure.name) for figure in figures)
    lines = []
    for figure in figures:
        line = f"  {figure.name:{width}}  {_number(figure.value):>9} {figure.unit:<8}"
        if figure.limit is not None:
            verdict = "met" if figure.is_met else "MISSED"
            line += f" at most {_number(figure.limit)}: {verdict}"
        lines.append(line.rstrip())
    return "\n".join(lines)


def _number(value: float) -> str:
    return (
        f"{value:,}"
        if isinstance(value, int)
        else f"{value:,.3f}"
        if value < 10
        else f"{value:,.1f}"
    )
