"""The live table, the lines that stay, the summary.

On a terminal the table is drawn anew at its place below the lines that stay;
elsewhere each second is a line of its own. Only the thread that shows the
table writes; the others leave their lines to it.
"""

from __future__ import annotations

import logging
import shutil
import time
import traceback
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TextIO

from ..core.balancer import PeerState

#: Seconds over which rates and shares are taken.
WINDOW = 1.0

BAR = 20

TUTORIAL = "docs/tutorial/index.rst"

_COLOURS = {"red": 31, "green": 32, "yellow": 33, "bold": 1, "dim": 2}
_STATE_COLOURS = {"closed": "green", "half-open": "yellow", "open": "red"}


class Sample(NamedTuple):
    """How things stand at one moment."""

    #: Seconds since the start, and the planned end.
    elapsed: float
    seconds: float
    requests: int
    errors: int
    #: By peer what has happened since the start, and how often.
    counts: Mapping[str, Any]
    states: Sequence[PeerState]


class Screen:
    """Where the demo writes."""

    def __init__(self, stream: TextIO, environ: Mapping[str, str]) -> None:
        self._stream = stream
        #: Whether the table can be drawn in place.
        self.live = stream.isatty() and environ.get("TERM", "dumb") != "dumb"
        self._coloured = self.live and not environ.get("NO_COLOR")
        self._said: deque[str] = deque()
        self._window: deque[Sample] = deque()
        self._drawn = 0
        self._next_line = 1.0
        self._started: float | None = None

    # --- lines that stay: from any thread ---------------------------------------------------------

    def start_clock(self) -> None:
        """Say from now on when a line was said."""
        self._started = time.monotonic()

    @property
    def elapsed(self) -> float:
        """Seconds since the clock was started."""
        return 0.0 if self._started is None else time.monotonic() - self._started

    def say(self, line: str, colour: str = "") -> None:
        """Write a line that stays; at once, or above the table when that is drawn next."""
        when = "" if self._started is None else f"{self.elapsed:5.1f} s  "
        self._said.append(self._paint(when + line.replace("\n", " "), colour))
        if self._started is None:
            self.flush()

    # --- the table: from one thread ---------------------------------------------------------------

    def show(self, sample: Sample) -> None:
        """Draw the table."""
        window = self._window
        window.append(sample)
        while len(window) > 2 and window[1].elapsed <= sample.elapsed - WINDOW:
            window.popleft()
        if self.live:
            self.flush(self._table(sample))
            return
        if sample.elapsed >= self._next_line:
            self._next_line = int(sample.elapsed) + 1
            self._said.append(self._line(sample))
        self.flush()

    def flush(self, table: Sequence[str] = ()) -> None:
        """Write the lines that wait, and the table below them."""
        # Not by iterating: other threads append.
        lines = [self._said.popleft() for _ in range(len(self._said))]
        text = f"\x1b[{self._drawn}A\r\x1b[J" if self._drawn else ""
        text += "".join(f"{line}\n" for line in (*lines, *table))
        self._drawn = len(table)
        # What a peer says may be more than the terminal can write.
        encoding = self._stream.encoding or "ascii"
        self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        self._stream.flush()

    def end_table(self) -> None:
        """Take the table away; lines are said without the time from now on."""
        self.flush()
        self._started = None

    def _table(self, sample: Sample) -> list[str]:
        width = shutil.get_terminal_size().columns - 1
        heading = (
            f"{'peer':8}{'circuit':20}{'held':>6}{'connects':>10}{'failed':>8}"
            "  last second's connects"
        )
        lines = [("", ""), (heading, "bold")]
        for state, counts, share in self._rows(sample):
            text = (
                f"{state.name:8}{_circuit(state):20}{state.connections:6}"
                f"{counts['connects']:10}{counts['failed']:8}  "
                f"{share:4.0%} {'#' * round(share * BAR)}"
            )
            lines.append((text, _STATE_COLOURS[state.state]))
        lines += [
            ("", ""),
            (self._requests(sample), "red" if sample.errors else "bold"),
            (f"{sample.elapsed:.1f} s of {sample.seconds:g} s; Ctrl-C ends it", "dim"),
        ]
        # A line that wraps would put the next drawing at the wrong place.
        return [self._paint(text[:width], colour) for text, colour in lines]

    def _line(self, sample: Sample) -> str:
        parts = [f"{sample.elapsed:5.1f} s  {self._requests(sample)}"]
        for state, counts, share in self._rows(sample):
            parts.append(
                f"{state.name} {state.state}, holds {state.connections}, "
                f"made {counts['connects']} connects, {share:.0%} of the last second's"
            )
        return " | ".join(parts)

    def _requests(self, sample: Sample) -> str:
        first = self._window[0]
        seconds = sample.elapsed - first.elapsed
        rate = (sample.requests - first.requests) / seconds if seconds else 0
        return f"{sample.requests} requests, {rate:.0f}/s, {sample.errors} errors"

    def _rows(self, sample: Sample) -> Iterator[tuple[PeerState, Counter[str], float]]:
        """Yield each peer, its counts, and its share of the last second's connects."""
        before = self._window[0].counts
        made = {
            name: counts["connects"] - before[name]["connects"]
            for name, counts in sample.counts.items()
        }
        total = sum(made.values())
        for state in sample.states:
            yield state, sample.counts[state.name], made[state.name] / total if total else 0

    # --- the end ----------------------------------------------------------------------------------

    def summarize(
        self, requests: int, problems: Counter[str], peers: Mapping[str, Any], seconds: float
    ) -> None:
        """Write the summary."""
        errors = sum(problems.values())
        self.say("")
        self.say(
            f"{requests} requests in {seconds:.1f} s ({requests / seconds:.0f}/s), {errors} errors",
            "red" if errors else "green",
        )
        for problem, count in problems.most_common(5):
            self.say(f"  {count} x {problem}", "red")
        self.say("")
        self.say("peer    connects  of all  failed  trials  opened  closed     out", "bold")
        total = max(sum(counts["connects"] for counts in peers.values()), 1)
        for name, counts in peers.items():
            columns = "".join(
                f"{counts[what]:8}" for what in ("failed", "trials", "opened", "closed")
            )
            self.say(
                f"{name:8}{counts['connects']:8}{counts['connects'] / total:8.0%}{columns}"
                f"{counts['out']:6.1f} s"
            )
        self.say("")
        self.say(f"Next, use it in a project of yours: {TUTORIAL}")

    def _paint(self, text: str, colour: str) -> str:
        if not (self._coloured and colour and text):
            return text
        return f"\x1b[{_COLOURS[colour]}m{text}\x1b[0m"


def _circuit(state: PeerState) -> str:
    if state.state == "open" and state.trial_in is not None:
        return f"open, trial in {max(state.trial_in, 0):.1f} s"
    return state.state + (", suspect" if state.suspect else "")


class ScreenHandler(logging.Handler):
    """Log records as lines that stay; of the site's own errors only the first few."""

    SITE_ERRORS = 5

    def __init__(self, screen: Screen) -> None:
        super().__init__(logging.INFO)
        self._screen = screen
        self._site_errors = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Say the record's message, and its exception in a line."""
        try:
            of_circuits = record.name == "django_proxysql"
            if not of_circuits:
                self._site_errors += 1
                if self._site_errors > self.SITE_ERRORS:
                    return
            line = f"{record.levelname} {record.getMessage()}"
            if record.exc_info and record.exc_info[1]:
                line += ": " + traceback.format_exception_only(*record.exc_info[:2])[-1].strip()
            bad, good = record.levelno >= logging.WARNING, record.levelno == logging.INFO
            self._screen.say(line, "red" if bad else "green" if good else "")
        except Exception:
            self.handleError(record)
