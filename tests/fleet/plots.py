"""The plots of docs/explanation/fleet.rst, as small SVGs that a diff can be read of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .simulation import Outcome

#: By whether circuits are shared, and whether there is jitter.
STYLES = {
    (False, False): ("#d95f02", ":"),
    (False, True): ("#d95f02", "-"),
    (True, False): ("#1b7f79", ":"),
    (True, True): ("#1b7f79", "-"),
}


def draw(outcomes: Sequence[Outcome], folder: Path) -> list[Path]:
    """Draw what happened; return the files."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot

    # Text stays text, and the same outcome is the same file.
    pyplot.rcParams.update(
        {"svg.fonttype": "none", "svg.hashsalt": "fleet", "font.size": 9, "axes.grid": True}
    )
    files = []
    scenario = outcomes[0].scenario
    figure, axes = pyplot.subplots(figsize=(7.2, 3))
    for outcome in outcomes:
        _line(axes, outcome, outcome.failed + outcome.trials, 0, scenario.well_at)
    axes.set_yscale("symlog", linthresh=1)
    axes.set_ylim(0, scenario.processes * 2)
    axes.set_xlabel("seconds; the peer fails at 5")
    axes.set_ylabel("failed connects a second")
    files.append(_save(figure, axes, folder / "fleet-outage.svg"))
    figure, axes = pyplot.subplots(figsize=(7.2, 3))
    for outcome in outcomes:
        _line(axes, outcome, outcome.connects, scenario.well_at - 5, scenario.ends_at)
    axes.set_ylim(0)
    axes.set_xlabel(f"seconds; the peer is well again at {scenario.well_at:.0f}")
    axes.set_ylabel("connects to it a second")
    files.append(_save(figure, axes, folder / "fleet-return.svg"))
    return files


def _line(axes: Any, outcome: Outcome, counted: Counter[int], first: float, last: float) -> None:
    scenario = outcome.scenario
    colour, dashes = STYLES[scenario.sharing, scenario.jitter]
    seconds = range(int(first), int(last))
    axes.plot(
        list(seconds),
        [counted[second] for second in seconds],
        color=colour,
        linestyle=dashes,
        linewidth=1.2,
        label=scenario.name,
    )


def _save(figure: Any, axes: Any, path: Path) -> Path:
    axes.legend(loc="best", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    return path
