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

#: Heights, in pixels: of a row, of the name in it, of the bar below that, of the axis.
ROW, NAME, BAR, AXIS = 42, 18, 14, 22

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


class Mark(NamedTuple):
    """A trial as it is drawn."""

    x: str
    succeeded: bool
    text: str


class Tick(NamedTuple):
    """A mark of the axis."""

    x: str
    text: str


class Row(NamedTuple):
    """One peer's."""

    name: str
    bars: Sequence[Bar]
    marks: Sequence[Mark]
    #: Pixels from the top: the name's baseline, the bar, the middle of the bar.
    name_y: int
    bar_y: int
    mark_y: int


class Timeline(NamedTuple):
    """A whole drawing."""

    rows: Sequence[Row]
    ticks: Sequence[Tick]
    height: int
    #: Pixels from the top: the end of the rows, and the baseline of the axis' text.
    axis_y: int
    tick_y: int


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


def ticks(start: float, end: float, local: Callable[[float], datetime]) -> list[Tick]:
    """Return the axis' marks, at full ten minutes of the local time.

    :param local: makes an aware datetime of a moment.
    """
    offset = local(start).utcoffset()
    shift = offset.total_seconds() if offset else 0.0
    found = []
    at = -(-(start + shift) // STEP) * STEP - shift
    while at <= end:
        percent = _percent(at, start, end)
        # Nearer to an edge its text would be cut off.
        if 5 <= percent <= 95:
            found.append(Tick(_text(percent), local(at).strftime("%H:%M")))
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
    drawn = []
    top = 0
    for name, its_spans, trials in rows:
        # What is wrong is drawn over what is well, which may be wider than it.
        ordered = sorted(its_spans, key=lambda span: span.state not in ("closed", UNKNOWN))
        drawn.append(
            Row(
                name,
                [_bar(name, span, start, end, local) for span in ordered],
                [_mark(trial, start, end, local) for trial in trials if start <= trial[0] <= end],
                top + NAME - 6,
                top + NAME,
                top + NAME + BAR // 2,
            )
        )
        top += ROW
    return Timeline(drawn, ticks(start, end, local), top + AXIS, top, top + AXIS - 6)


def _bar(
    name: str, span: Span, start: float, end: float, local: Callable[[float], datetime]
) -> Bar:
    x, width = _percent(span.start, start, end), _percent(span.end, start, end)
    width -= x
    if span.state not in ("closed", UNKNOWN) and width < NARROWEST:
        width = NARROWEST
        x = min(x, 100 - width)
    text = f"{name}: {span.state}, {local(span.start):%H:%M:%S} to {local(span.end):%H:%M:%S}"
    return Bar(_text(x), _text(width), span.state, text)


def _mark(
    trial: tuple[float, bool, str], start: float, end: float, local: Callable[[float], datetime]
) -> Mark:
    at, succeeded, error = trial
    outcome = "succeeded" if succeeded else f"failed: {error}"
    return Mark(
        _text(_percent(at, start, end)), succeeded, f"{local(at):%H:%M:%S}, a trial {outcome}"
    )


def _percent(at: float, start: float, end: float) -> float:
    return (at - start) / (end - start) * 100


def _text(percent: float) -> str:
    # Not left to a template, which would write a comma where the language has one.
    return f"{percent:.3f}%"
