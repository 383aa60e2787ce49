"""The live table, the lines that stay, the summary.

On a terminal the table is drawn anew at its place below the lines that stay;
elsewhere each second is a line of its own. Only the thread that shows the
table writes; the others leave their lines to it.
"""

from __future__ import annotations

import logging
import shutil
import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TextIO

from ..core.balancer import PeerState

#: Seconds over which rates and shares are taken.
WINDOW = 1.0

BAR = 20

TUTORIAL = "docs/tutorial/index.rst"

_COLOURS = {"red": 31, "green": 32, "yellow": 33, "bold": 1, "dim": 2}
_STATE_COLOURS = {"closed": "green", "half-open": "yellow", "open": "red"}


class Tally:
    """What has happened since the start, as any thread counts it."""

    def __init__(self, peers: Iterable[str]) -> None:
        self.requests = self.errors = 0
        #: The requests that were not answered well, by what was wrong.
        self.problems: Counter[str] = Counter()
        #: By peer how often each thing happened, and for how many seconds it was "out".
        self.peers: dict[str, Any] = {name: Counter() for name in peers}
        self._lock = threading.Lock()

    def answered(self, problem: str) -> None:
        """Count a request; ``problem`` is what was wrong with its answer, if anything."""
        with self._lock:
            self.requests += 1
            if problem:
                self.errors += 1
                self.problems[problem] += 1

    def happened(self, peer: str, **counts: float) -> None:
        with self._lock:
            self.peers[peer].update(counts)


class Screen:
    """Where the demo writes."""

    def __init__(self, stream: TextIO, environ: Mapping[str, str]) -> None:
        self._stream = stream
        #: Whether the table can be drawn in place.
        self._live = stream.isatty() and environ.get("TERM", "dumb") != "dumb"
        self._coloured = self._live and not environ.get("NO_COLOR")
        self._said: deque[str] = deque()
        #: In the last second: when somebody looked, the requests and each peer's connects by then.
        self._window: deque[tuple[float, int, dict[str, int]]] = deque()
        self._drawn = 0
        self._next_line = 1.0
        self._started: float | None = None

    # --- lines that stay: from any thread ---------------------------------------------------------

    def start_clock(self) -> None:
        """Say from now on when a line was said."""
        self._started = time.monotonic()

    @property
    def elapsed(self) -> float:
        return 0.0 if self._started is None else time.monotonic() - self._started

    def say(self, line: str, colour: str = "") -> None:
        """Write a line that stays; at once, or above the table when that is drawn next."""
        when = "" if self._started is None else f"{self.elapsed:5.1f} s  "
        self._said.append(self._paint(when + line.replace("\n", " "), colour))
        if self._started is None:
            self._flush()

    # --- the table: from one thread ---------------------------------------------------------------

    def show(self, tally: Tally, states: Sequence[PeerState], seconds: float) -> None:
        """Draw the table; it is drawn for so many seconds in all."""
        now, requests = self.elapsed, tally.requests
        made = {name: counts["connects"] for name, counts in tally.peers.items()}
        window = self._window
        window.append((now, requests, made))
        while len(window) > 2 and window[1][0] <= now - WINDOW:
            window.popleft()
        began, requests_then, made_then = window[0]
        rate = (requests - requests_then) / (now - began) if now > began else 0
        of_all = sum(made.values()) - sum(made_then.values())
        shares = {name: (made[name] - made_then[name]) / (of_all or 1) for name in made}
        sums = f"{requests} requests, {rate:.0f}/s, {tally.errors} errors"
        if not self._live:
            if now >= self._next_line:
                self._next_line = int(now) + 1
                parts = [f"{now:5.1f} s  {sums}"]
                for state in states:
                    name = state.name
                    parts.append(
                        f"{name} {state.state}, holds {state.connections}, "
                        f"made {made[name]} connects, {shares[name]:.0%} of the last second's"
                    )
                self._said.append(" | ".join(parts))
            self._flush()
            return
        heading = (
            f"{'peer':8}{'circuit':20}{'held':>6}{'connects':>10}{'failed':>8}"
            "  last second's connects"
        )
        lines = [("", ""), (heading, "bold")]
        for state in states:
            share = shares[state.name]
            text = (
                f"{state.name:8}{_circuit(state):20}{state.connections:6}{made[state.name]:10}"
                f"{tally.peers[state.name]['failed']:8}  {share:4.0%} {'#' * round(share * BAR)}"
            )
            lines.append((text, _STATE_COLOURS[state.state]))
        lines += [
            ("", ""),
            (sums, "red" if tally.errors else "bold"),
            (f"{now:.1f} s of {seconds:g} s; Ctrl-C ends it", "dim"),
        ]
        # A line that wraps would put the next drawing at the wrong place.
        width = shutil.get_terminal_size().columns - 1
        self._flush([self._paint(text[:width], colour) for text, colour in lines])

    def _flush(self, table: Sequence[str] = ()) -> None:
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

    def end(self, tally: Tally, seconds: float) -> None:
        """Put the summary of so many seconds in the table's place."""
        self._flush()
        self._started = None
        self.say("")
        self.say(
            f"{tally.requests} requests in {seconds:.1f} s ({tally.requests / seconds:.0f}/s), "
            f"{tally.errors} errors",
            "red" if tally.errors else "green",
        )
        for problem, count in tally.problems.most_common(5):
            self.say(f"  {count} x {problem}", "red")
        self.say("")
        self.say("peer    connects  of all  failed  trials  opened  closed     out", "bold")
        total = max(sum(counts["connects"] for counts in tally.peers.values()), 1)
        for name, counts in tally.peers.items():
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
