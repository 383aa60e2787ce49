"""The timeline of the status page: where each thing is drawn, as plain functions.

Nothing here knows of Django or of balancers. Times are seconds since the epoch;
places along the time are percentages of the drawing's width, as text, because
an SVG that is measured so can be as wide as its page and keep its letters' size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from typing import NamedTuple

#: What a peer was before anybody looked.
UNKNOWN = "unknown"

#: Pixels from one row to the next; where things are in a row, the template says.
ROW = 42

#: The narrowest that anything but "all is well" is drawn, in percent: a blip is to be seen.
NARROWEST = 0.5

#: Seconds between two marks of the axis.
STEP = 600


class Span(NamedTuple):
    """A peer was in this state from ``start`` to ``end``."""

    start: float
    end: float
    state: str


class Bar(NamedTuple):
    """A span as it is drawn."""

    x: str
    width: str
    state: str
    #: In words.
    text: str


class Row(NamedTuple):
    """One peer's."""

    name: str
    #: Pixels from the top.
    y: int
    bars: Sequence[Bar]
    #: The trials: where, whether they succeeded, and in words.
    marks: Sequence[tuple[str, bool, str]]


class Timeline(NamedTuple):
    """A whole drawing."""

    rows: Sequence[Row]
    #: The marks of the axis: where, and its time.
    ticks: Sequence[tuple[str, str]]
    #: Pixels from the top to the axis.
    axis_y: int


def spans(changes: Iterable[tuple[float, str]], start: float, end: float) -> list[Span]:
    """Return what lies between ``start`` and ``end``, without a gap.

    :param changes: when a peer came into which state, oldest first.
    """
    found: list[Span] = []
    at, state = start, UNKNOWN
    for moment, after in [*changes, (end, "")]:
        moment = min(max(moment, at), end)
        if moment > at:
            if found and found[-1].state == state:
                found[-1] = found[-1]._replace(end=moment)
            else:
                found.append(Span(at, moment, state))
            at = moment
        state = after
    return found


def ticks(start: float, end: float, local: Callable[[float], datetime]) -> list[tuple[str, str]]:
    """Return the axis' marks, at full ten minutes of the local time."""
    offset = local(start).utcoffset()
    shift = offset.total_seconds() if offset else 0.0
    found = []
    at = -(-(start + shift) // STEP) * STEP - shift
    while at <= end:
        percent = (at - start) / (end - start) * 100
        # Nearer to an edge its text would be cut off.
        if 5 <= percent <= 95:
            found.append((_text(percent), local(at).strftime("%H:%M")))
        at += STEP
    return found


def draw(
    rows: Iterable[tuple[str, Sequence[Span], Sequence[tuple[float, bool, str]]]],
    start: float,
    end: float,
    local: Callable[[float], datetime],
) -> Timeline:
    """Return where everything is drawn.

    :param rows: a peer's name, its spans, and its trials: when, whether they succeeded, what
        the peer said.
    """

    def place(at: float) -> float:
        return (at - start) / (end - start) * 100

    def clock(at: float) -> str:
        return f"{local(at):%H:%M:%S}"

    drawn: list[Row] = []
    for name, its_spans, trials in rows:
        bars = []
        # What is wrong is drawn over what is well, which may be wider than it.
        for span in sorted(its_spans, key=_is_wrong):
            x = place(span.start)
            width = place(span.end) - x
            if _is_wrong(span) and width < NARROWEST:
                width = NARROWEST
                x = min(x, 100 - width)
            text = f"{name}: {span.state}, {clock(span.start)} to {clock(span.end)}"
            bars.append(Bar(_text(x), _text(width), span.state, text))
        marks = [
            (
                _text(place(at)),
                succeeded,
                f"{clock(at)}, a trial {'succeeded' if succeeded else f'failed: {error}'}",
            )
            for at, succeeded, error in trials
            if start <= at <= end
        ]
        drawn.append(Row(name, ROW * len(drawn), bars, marks))
    return Timeline(drawn, ticks(start, end, local), ROW * len(drawn))


def _is_wrong(span: Span) -> bool:
    return span.state not in ("closed", UNKNOWN)


def _text(percent: float) -> str:
    # Not left to a template, which would write a comma where the language has one.
    return f"{percent:.3f}%"
