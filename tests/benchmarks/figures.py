"""What the benchmarks have in common: figures, and the statistics behind them."""

from __future__ import annotations

import functools
import gc
import itertools
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple


class Skipped(Exception):
    """What a benchmark needs is not on this machine."""


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

    @property
    def verdict(self) -> str:
        """Say whether the limit is kept, and by how much it is not."""
        if self.limit is None:
            return ""
        if self.is_met:
            return "met"
        over = f"MISSED by {number(self.value - self.limit)}"
        return f"{over} {self.unit}".rstrip()


class Measured(NamedTuple):
    """Seconds that one call took, in each round, for callables measured in turn."""

    rounds: tuple[tuple[float, ...], ...]

    def median(self, which: int) -> float:
        return statistics.median(seconds[which] for seconds in self.rounds)

    def added(self, one: int, other: int) -> float:
        """Return the median of what ``other`` took more than ``one`` in the same round."""
        return statistics.median(seconds[other] - seconds[one] for seconds in self.rounds)

    def ratio(self, one: int, other: int) -> float:
        """Return the median of what ``other`` took, in units of ``one`` in the same round."""
        return statistics.median(seconds[other] / seconds[one] for seconds in self.rounds)


def interleaved(
    *functions: Callable[[], Any],
    rounds: int,
    clock: Callable[[], float],
    batch: int = 1,
    before: Callable[[], Any] | None = None,
    after: Callable[[], Any] | None = None,
) -> Measured:
    """Measure callables in turn, in another order each round.

    :param batch: how many calls are measured together.
    :param before: called, unmeasured, before each round.
    :param after: called, unmeasured, after each batch.
    """
    orders = list(itertools.permutations(range(len(functions))))
    measured: list[tuple[float, ...]] = []
    with _without_collector():
        # The first rounds import, compile and cache; they do not count.
        for turn in range(-_WARM_UP, rounds):
            if before is not None:
                before()
            seconds = [0.0] * len(functions)
            for which in orders[turn % len(orders)]:
                function = functions[which]
                started = clock()
                for _ in range(batch):
                    function()
                seconds[which] = (clock() - started) / batch
                if after is not None:
                    after()
            if turn >= 0:
                measured.append(tuple(seconds))
    return Measured(tuple(measured))


_WARM_UP = 6

in_time = functools.partial(interleaved, clock=time.perf_counter)
#: All threads' of this process.
in_cpu_time = functools.partial(interleaved, clock=time.process_time)


@contextmanager
def _without_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def machine() -> str:
    """Return what the figures hang on, in two lines."""
    import django
    import MySQLdb.release

    return (
        f"Python {platform.python_version()}, Django {django.__version__}, "
        f"mysqlclient {MySQLdb.release.__version__} with Connector/C {MySQLdb.get_client_info()}\n"
        f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, "
        f"load {os.getloadavg()[0]:.1f}"
    )


def table(figures: Sequence[Figure]) -> str:
    """Return the figures, one a line, each with what it may be at most."""
    width = max(len(figure.name) for figure in figures)
    lines = []
    for figure in figures:
        line = f"  {figure.name:{width}}  {number(figure.value):>9} {figure.unit:<8}"
        if figure.limit is not None:
            line += f"  at most {number(figure.limit):>6}: {figure.verdict}"
        lines.append(line.rstrip())
    return "\n".join(lines)


def number(value: float) -> str:
    """Return a figure as it is printed: whole, or with as many digits as mean something."""
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.3f}" if abs(value) < 10 else f"{value:,.1f}"
