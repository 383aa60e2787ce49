"""``manage.py peers``: each peer of each balancer, as it is now; and draining them.

The process that runs this is not one that serves requests. It asks the peers
itself; what the others know of them it learns, and can change, only where they
share it (SHARED_STATE).
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import tenacity
from django.core.exceptions import ImproperlyConfigured
from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.core.management.color import no_style
from django.db import connections

from ...core.balancer import LoadBalancer, PeerState
from ...core.comparison import warnings
from ...core.exceptions import DrainRefused
from ...inspection import Inspection, inspect
from ...registry import balancers

__all__ = ["Command"]

#: Exit codes, in the words of Nagios, which knows the same four.
OK, WARNING, CRITICAL, UNKNOWN = range(4)
#: A shell's for Ctrl-C.
INTERRUPTED = 130
#: Seconds between two looks of --wait.
_WAIT = tenacity.wait_random_exponential(multiplier=0.25, max=2)
_WORDS = ("OK", "WARNING", "CRITICAL", "UNKNOWN")


class _Row(NamedTuple):
    """A peer as it answered, and as the processes know it where they share that."""

    found: Inspection
    known: PeerState | None
    #: How many connections all processes hold to it.
    connections: int | None

    @property
    def is_drained(self) -> bool:
        return self.known is not None and self.known.drained

    @property
    def is_usable(self) -> bool:
        return self.found.ready and not self.is_drained


class _Look(NamedTuple):
    """All peers of one balancer, asked once."""

    rows: Sequence[_Row]
    shares: bool
    #: How many processes share its state, this one aside; None if that is unknown.
    processes: int | None
    #: What is wrong with Redis then, as a sentence without its subject.
    trouble: str = ""
    #: What is wrong with the peers together, each with its remedy.
    warnings: Sequence[str] = ()

    @property
    def status(self) -> int:
        if not any(row.is_usable for row in self.rows):
            return CRITICAL
        well = all(row.found.ready or row.is_drained for row in self.rows)
        return OK if well and not self.warnings else WARNING

    @property
    def summary(self) -> str:
        down = [row.found.peer for row in self.rows if not row.found.ready and not row.is_drained]
        drained = [row.found.peer for row in self.rows if row.is_drained]
        if self.status == CRITICAL:
            said = "no peer can be used"
        else:
            said = f"{', '.join(down)} down" if down else "all up" if self.warnings else "all well"
        if self.warnings:
            count = len(self.warnings)
            said += f", {count} warning{'' if count == 1 else 's'}"
        return f"{said}, {', '.join(drained)} drained" if drained else said


class Command(BaseCommand):
    """Shows the peers, or drains one."""

    help = (
        "Connects to each peer of each load balancer now and shows what it is. Ends with 0 if all "
        "peers are well, 1 if some peer is down, 2 if no peer of a load balancer can be used, and "
        "3 if that cannot be told. A peer that is drained is not down, and cannot be used."
    )
    # It is for when something is wrong: nothing may have to be well first.
    requires_system_checks: Any = ()

    _verdict: SystemExit | None = None

    #: How --wait tells the time and waits, in seconds.
    clock = staticmethod(time.monotonic)
    sleep = staticmethod(time.sleep)

    def add_arguments(self, parser: CommandParser) -> None:
        """Declare the arguments."""
        parser.add_argument(
            "aliases",
            nargs="*",
            metavar="alias",
            help="The load balancers to look at. Default: all.",
        )
        parser.add_argument("--json", action="store_true", help="Print JSON.")
        parser.add_argument(
            "--watch",
            type=_seconds,
            metavar="N",
            help="Look again every N seconds until Ctrl-C.",
        )
        parser.add_argument(
            "--wait",
            type=_seconds,
            metavar="S",
            help="Wait until each load balancer has a peer that can be used, S seconds at most. "
            "Ends with 0 then, even if other peers are down, and with 2 if there is none.",
        )
        parser.add_argument(
            "--timeout",
            type=_seconds,
            metavar="S",
            help="Seconds that a peer has to answer. Default: its balancer's CONNECT_TIMEOUT.",
        )
        wish = parser.add_mutually_exclusive_group()
        wish.add_argument(
            "--drain",
            metavar="PEER",
            help="Give a peer no new connections, in all processes; those that they have leave "
            "it where nobody can tell. Needs SHARED_STATE.",
        )
        wish.add_argument("--undrain", metavar="PEER", help="Let it have connections again.")
        parser.add_argument(
            "--force",
            action="store_true",
            help="Drain the peer even if no other can be used.",
        )

    def run_from_argv(self, argv: list[str]) -> None:
        """End with UNKNOWN for whatever is no verdict on the peers, such as a wrong argument."""
        try:
            super().run_from_argv(argv)
        except SystemExit as exc:
            if exc.code and exc is not self._verdict:
                raise SystemExit(UNKNOWN) from None
            raise
        except Exception:
            # Python itself would end with 1.
            traceback.print_exc()
            raise SystemExit(UNKNOWN) from None

    def handle(self, *aliases: str, **options: Any) -> None:
        """Show the peers, or do what is wished with one.

        :raises SystemExit: with the exit code, unless that is 0.
        :raises CommandError: it cannot be done; nothing has been changed.
        """
        if "NO_COLOR" in os.environ and not options.get("force_color"):
            self.style = no_style()
        chosen = self._chosen(options["aliases"] or aliases)
        if options["wait"] is not None and (options["watch"] is not None or _wishes(options)):
            raise CommandError("--wait goes with neither --watch nor --drain. Nothing was changed.")
        if options["force"] and options["drain"] is None:
            raise CommandError("--force is for --drain, which is not given. Nothing was changed.")
        # "" is no peer either: a script's variable that is not set must not look like success.
        if _wishes(options):
            self._wish(chosen, options)
            return
        self._last: int | None = None
        try:
            self._look(chosen, options)
        except KeyboardInterrupt:
            if options["wait"] is not None:
                self._end(INTERRUPTED)
            if options["watch"] is None or self._last is None:
                raise
        except BrokenPipeError:
            # Whoever read has seen enough. Python would complain once more, at its end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if self._last:
            self._end(self._last)

    def _end(self, code: int) -> None:
        self._verdict = SystemExit(code)
        raise self._verdict

    def _chosen(self, aliases: Sequence[str]) -> dict[str, LoadBalancer]:
        """Return the load balancers that are asked for, by alias.

        :raises CommandError: there are none, one is none, or its settings are wrong.
        """
        known = list(balancers)
        if not known:
            raise CommandError(
                "No entry of DATABASES is a load balancer: none has PEERS or django-proxysql's "
                "ENGINE."
            )
        for alias in aliases:
            if alias not in known:
                there = "is no load balancer" if alias in connections.databases else "is no alias"
                raise CommandError(f"{alias!r} {there}. Load balancers: {', '.join(known)}.")
        try:
            # Each once, however often it is named.
            return {alias: balancers[alias] for alias in aliases or known}
        except ImproperlyConfigured as exc:
            raise CommandError(str(exc)) from exc

    # Draining

    def _wish(self, chosen: Mapping[str, LoadBalancer], options: Mapping[str, Any]) -> None:
        """Drain a peer in all processes, or take that back.

        :raises CommandError: it cannot be done; nothing has been changed.
        """
        if options["json"] or options["watch"] is not None:
            raise CommandError("--json and --watch are for looking; leave them out to drain.")
        drain = options["drain"] is not None
        name = options["drain" if drain else "undrain"]
        balancer = _owner_of(name, chosen, "--drain" if drain else "--undrain")
        if balancer.sharing is None:
            raise CommandError(
                f"{balancer.name!r} shares no state (it has no SHARED_STATE): what this command "
                f"told it of {name!r} would end with this command's own process, and reach none "
                "that serves requests. Nothing was changed. Set SHARED_STATE; or call "
                f"balancers[{balancer.name!r}].drain({name!r}) in each process; or have the peer "
                "itself refuse new connections, as PROXYSQL PAUSE does."
            )
        if not balancer.sharing.settle():
            raise CommandError(
                f"Redis at {balancer.sharing.link.address} {balancer.sharing.trouble}: the "
                "processes cannot be told. Nothing was changed."
            )
        if not drain:
            balancer.undrain(name)
            said = f"{name} is drained no longer."
        else:
            self._drain(balancer, name, options)
            fleet = balancer.sharing.fleet(1.0)
            said = f"{name} is drained."
            if fleet is not None:
                said += f" Connections that are to leave it: {fleet.connections[name]}."
        if not balancer.sharing.settle():
            raise CommandError(
                f"Redis at {balancer.sharing.link.address} has not confirmed it, for it "
                f"{balancer.sharing.trouble}: look with manage.py peers, and say it again."
            )
        self.stdout.write(f"{balancer.name}: {said}")

    def _drain(self, balancer: LoadBalancer, name: str, options: Mapping[str, Any]) -> None:
        if not options["force"] and not balancer.peers[name].drained:
            # The circuits may be of the same opinion as a moment ago: ask the peers themselves.
            others = [
                row
                for row in _ask({balancer.name: balancer}, options["timeout"])[balancer.name].rows
                if row.found.peer != name
            ]
            if not any(row.is_usable for row in others):
                why = [
                    f"{row.found.peer} is {'drained' if row.is_drained else 'down'}"
                    for row in others
                ]
                raise CommandError(
                    f"{name!r} is the last peer of {balancer.name!r} that can be used"
                    + (f": {', '.join(why)}" if why else "")
                    + ". Nothing was changed. --force drains it all the same."
                )
        try:
            balancer.drain(name, force=options["force"])
        except DrainRefused as exc:
            raise CommandError(f"{exc} Nothing was changed; --force drains it.") from exc

    # Showing

    def _look(self, chosen: Mapping[str, LoadBalancer], options: Mapping[str, Any]) -> None:
        """Show the peers, again and again if that is wished; note each look's exit code."""
        interval = options["watch"]
        redraw = interval is not None and self.stdout.isatty() and not options["json"]
        while True:
            if options["wait"] is not None:
                looks = self._waited(chosen, options)
            else:
                looks = _ask(chosen, options["timeout"])
            # First: whoever has seen a look, and ends it, is to get its exit code.
            self._last = _worst(looks)
            if options["wait"] is not None and self._last == WARNING:
                # What was waited for is there.
                self._last = OK
            if options["json"]:
                indent = 2 if interval is None else None
                self.stdout.write(json.dumps(_as_json(looks, self._last), indent=indent))
            else:
                if redraw:
                    # To the top left corner, and nothing of the last look below.
                    self.stdout.write("\x1b[H\x1b[J", ending="")
                when = "" if interval is None else time.strftime("%H:%M:%S ")
                for line in self._table(looks, options):
                    self.stdout.write(when + line)
                    when = ""
            self.stdout.flush()
            if interval is None:
                return
            time.sleep(interval)

    def _waited(
        self, chosen: Mapping[str, LoadBalancer], options: Mapping[str, Any]
    ) -> dict[str, _Look]:
        """Return the first look in which each load balancer can be used, or the last one."""
        seconds = options["wait"]
        until = self.clock() + seconds
        progress = _Progress(self.stderr, options["verbosity"])

        def look() -> dict[str, _Look]:
            # A first look has the time that a peer needs, however short the wait is.
            looks = _ask(chosen, options["timeout"])
            if _worst(looks) == CRITICAL:
                waits = [alias for alias, one in looks.items() if one.status == CRITICAL]
                errors = "; ".join(
                    f"{row.found.peer}: {row.found.error or 'drained'}"
                    for row in looks[waits[0]].rows
                )
                left = max(0.0, until - self.clock())
                progress.say(f"waiting for {', '.join(waits)}, {{left}}: {errors}", left)
            return looks

        try:
            found: dict[str, _Look] = tenacity.Retrying(
                retry=tenacity.retry_if_result(lambda looks: _worst(looks) == CRITICAL),
                wait=lambda state: min(float(_WAIT(state)), max(0.0, until - self.clock())),
                stop=lambda state: self.clock() >= until,
                sleep=self.sleep,
                # Time is over: the last look says how things are.
                retry_error_callback=lambda state: state.outcome.result(),  # type: ignore[union-attr]
            )(look)
            return found
        finally:
            progress.end()

    def _table(self, looks: Mapping[str, _Look], options: Mapping[str, Any]) -> Iterator[str]:
        """Yield the lines: the verdict first, as Nagios wants it."""
        paint = self._paints(options)
        status = _worst(looks)
        said = "; ".join(f"{alias}: {look.summary}" for alias, look in looks.items())
        yield paint(status, f"{_WORDS[status]}: {said}")
        if options["verbosity"] == 0:
            return
        rows = [row for look in looks.values() for row in look.rows]
        shared = any(look.shares for look in looks.values())
        noted = any(row.found.notes for row in rows)
        heading = ["ALIAS", "PEER", "ADDRESS", "UP", "LATENCY", "SERVER", "READY"]
        heading += ["CIRCUIT", "DRAINED", "CONNS"] * shared + ["NOTES"] * noted
        cells = [
            [
                row.found.alias,
                row.found.peer,
                row.found.address,
                _yes(row.found.reachable),
                "-" if row.found.latency is None else f"{row.found.latency * 1000:.1f} ms",
                row.found.version or "-",
                _yes(row.found.ready),
                *[
                    row.known.state if row.known else "-",
                    _drained(row.known),
                    "-" if row.connections is None else str(row.connections),
                ]
                * shared,
                *[", ".join(row.found.notes)] * noted,
            ]
            for row in rows
        ]
        widths = [max(map(len, column)) for column in zip(heading, *cells)]
        yield _aligned(heading, widths)
        for row, line in zip(rows, cells):
            colour = OK if row.is_usable else WARNING if row.is_drained else CRITICAL
            yield paint(colour, _aligned(line, widths))
        for alias, look in looks.items():
            for row in look.rows:
                if row.found.error:
                    yield f"{alias}: {row.found.peer}: {row.found.error}"
                if row.known is not None and row.known.drain_refused:
                    yield (
                        f"{alias}: {row.found.peer}: another process drained it, this one does "
                        "not: it is the last peer here that is not drained"
                    )
            for warning in look.warnings:
                yield paint(WARNING, f"{alias}: {warning}")
            if look.shares and look.processes is None:
                yield f"{alias}: what the processes know is not to be had: Redis {look.trouble}"

    def _paints(self, options: Mapping[str, Any]) -> Any:
        if not (self.stdout.isatty() or options.get("force_color")):
            return lambda status, text: text
        painters = (self.style.SUCCESS, self.style.WARNING, self.style.ERROR)
        return lambda status, text: painters[status](text)


class _Progress:
    """What is waited for, on the error stream: one line that is renewed on a terminal, elsewhere
    a line whenever something else is waited for."""

    def __init__(self, stream: Any, verbosity: int) -> None:
        self._stream = stream
        self._quiet = verbosity == 0
        self._live = bool(stream.isatty())
        self._said = ""

    def say(self, text: str, left: float) -> None:
        """Say it; ``{left}`` in the text is the time that is left, in seconds."""
        if self._quiet:
            return
        if self._live:
            width = shutil.get_terminal_size().columns - 1
            line = text.replace("{left}", f"{left:.0f} s left")[:width]
            self._stream.write(f"\r\x1b[K{line}", lambda line: line, ending="")
            self._stream.flush()
        elif text != self._said:
            line = text.replace("{left}", f"at most {left:.0f} s")
            self._stream.write(line, lambda line: line)
            self._stream.flush()
        self._said = text

    def end(self) -> None:
        """Take the line away."""
        if self._live and self._said:
            self._stream.write("\r\x1b[K", lambda line: line, ending="")
            self._stream.flush()


def _wishes(options: Mapping[str, Any]) -> bool:
    """Return whether a peer is to be drained or taken back."""
    return options["drain"] is not None or options["undrain"] is not None


def _owner_of(name: str, chosen: Mapping[str, LoadBalancer], option: str) -> LoadBalancer:
    """Return the one load balancer that has a peer of that name.

    :raises CommandError: none has, or several have.
    """
    owners = {alias: balancer for alias, balancer in chosen.items() if name in balancer.peers}
    if not owners:
        there = "; ".join(f"{alias}: {', '.join(b.peers)}" for alias, b in chosen.items())
        raise CommandError(f"{name!r} is no peer. Nothing was changed. Peers: {there}.")
    if len(owners) > 1:
        raise CommandError(
            f"{name!r} is a peer of {' and of '.join(map(repr, owners))}. Nothing was changed. "
            f"Say whose you mean: peers {next(iter(owners))} {option} {name}"
        )
    return next(iter(owners.values()))


def _ask(chosen: Mapping[str, LoadBalancer], timeout: float | None) -> dict[str, _Look]:
    """Ask all peers now; add what the processes know of them, where they share that."""
    found = inspect(chosen, timeout)
    looks = {}
    for alias, balancer in chosen.items():
        states: dict[str, PeerState] = {}
        fleet = None
        if balancer.sharing is not None and balancer.sharing.settle():
            states = {state.name: state for state in balancer.snapshot()}
            fleet = balancer.sharing.fleet(1.0)
        rows = [
            _Row(one, states.get(one.peer), fleet.connections[one.peer] if fleet else None)
            for one in found[alias]
        ]
        looks[alias] = _Look(
            rows,
            balancer.sharing is not None,
            fleet.processes - 1 if fleet else None,
            balancer.sharing.trouble if balancer.sharing and not fleet else "",
            warnings(balancer.config, [row.found.facts for row in rows if row.found.facts]),
        )
    return looks


def _worst(looks: Mapping[str, _Look]) -> int:
    return max(look.status for look in looks.values())


def _as_json(looks: Mapping[str, _Look], exit_code: int) -> dict[str, Any]:
    """Return what ``--json`` prints; its form is promised in docs/reference/commands.rst."""
    status = _worst(looks)
    return {
        "time": time.time(),
        "status": _WORDS[status].lower(),
        "exit_code": exit_code,
        "balancers": [
            {
                "alias": alias,
                "status": _WORDS[look.status].lower(),
                "shared": look.shares,
                "processes": look.processes,
                "warnings": list(look.warnings),
                "peers": [
                    {
                        "peer": row.found.peer,
                        "address": row.found.address,
                        "reachable": row.found.reachable,
                        "latency": row.found.latency,
                        "version": row.found.version,
                        "ready": row.found.ready,
                        "notes": [
                            *row.found.notes,
                            *(["drain refused"] if row.known and row.known.drain_refused else []),
                        ],
                        "error": row.found.error,
                        "fault": row.found.fault.value if row.found.fault else None,
                        "circuit": row.known.state if row.known else None,
                        "drained": row.known.drained if row.known else None,
                        "connections": row.connections,
                    }
                    for row in look.rows
                ],
            }
            for alias, look in looks.items()
        ],
    }


def _aligned(cells: Sequence[str], widths: Sequence[int]) -> str:
    return "  ".join(cell.ljust(width) for cell, width in zip(cells, widths)).rstrip()


def _drained(known: PeerState | None) -> str:
    if known is None:
        return "-"
    return "refused" if known.drain_refused else _yes(known.drained)


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _seconds(text: str) -> float:
    """Read a duration; argparse quotes this function's name."""
    seconds = float(text)
    if not 0 < seconds < float("inf"):
        raise ValueError(text)
    return seconds


_seconds.__name__ = "number of seconds"
