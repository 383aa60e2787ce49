"""``manage.py peers``: each peer of each balancer, as it is now; and draining them.

The process that runs this is not one that serves requests. It asks the peers
itself. What the others know of them it can ask and change only where they share
it (SHARED_STATE).
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

import tenacity
from django.core.exceptions import ImproperlyConfigured
from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.core.management.color import no_style
from django.db import connections

from ...core.balancer import LoadBalancer
from ...core.exceptions import DrainRefused
from ...registry import balancers
from ..look import CRITICAL, OK, UNKNOWN, WARNING, Look, as_json, ask, table, worst

#: A shell's for Ctrl-C.
INTERRUPTED = 130
#: Seconds between two looks of --wait.
_WAIT = tenacity.wait_random_exponential(multiplier=0.25, max=2)


class _Verdict(SystemExit):
    """Ends the command with the code that says how the peers are."""


class Command(BaseCommand):
    """Shows the peers, or drains one."""

    help = (
        "Connects to each peer of each load balancer now and shows what it is. Ends with 0 if all "
        "peers are well, 1 if some peer is down, 2 if no peer of a load balancer can be used, and "
        "3 if the command cannot find out. A drained peer is not down, and cannot be used."
    )
    # It is for when something is wrong: nothing may have to be well first.
    requires_system_checks: Any = ()

    #: The clock and the sleep of --wait, in seconds.
    clock = staticmethod(time.monotonic)
    sleep = staticmethod(time.sleep)

    def add_arguments(self, parser: CommandParser) -> None:
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
        drains = parser.add_mutually_exclusive_group()
        drains.add_argument(
            "--drain",
            metavar="PEER",
            help="Give a peer no new connections, in all processes; the connections that they "
            "have leave it at their safe points. Needs SHARED_STATE.",
        )
        drains.add_argument("--undrain", metavar="PEER", help="Let it have connections again.")
        parser.add_argument(
            "--force",
            action="store_true",
            help="Drain the peer even if no other can be used.",
        )

    def run_from_argv(self, argv: list[str]) -> None:
        """End with UNKNOWN where there is no verdict on the peers, as for a wrong argument."""
        stdout: Any = sys.stdout
        if hasattr(stdout, "reconfigure"):
            # What a peer says may be more than the terminal can write.
            stdout.reconfigure(errors="backslashreplace")
        try:
            super().run_from_argv(argv)
        except _Verdict:
            raise
        except SystemExit as exc:
            raise SystemExit(exc.code and UNKNOWN) from None
        except KeyboardInterrupt:
            raise SystemExit(INTERRUPTED) from None
        except Exception:
            # Python itself would end with 1, also where errors cannot be written.
            with contextlib.suppress(OSError):
                traceback.print_exc()
            raise SystemExit(UNKNOWN) from None

    def handle(self, *aliases: str, **options: Any) -> None:
        """Show the peers, or drain or undrain one; exit with the code that says how they are."""
        if os.environ.get("NO_COLOR") and not options.get("force_color"):
            self.style = no_style()
        chosen = self._chosen(options["aliases"] or aliases)
        # "" is no peer either: a script's variable that is not set must not look like success.
        is_drain = options["drain"] is not None or options["undrain"] is not None
        if options["wait"] is not None and (options["watch"] is not None or is_drain):
            raise CommandError("--wait goes with neither --watch nor --drain. Nothing was changed.")
        if options["force"] and options["drain"] is None:
            raise CommandError("--force is for --drain, which is not given. Nothing was changed.")
        self._last: int | None = None
        try:
            if is_drain:
                self._set_drain(chosen, options)
            else:
                self._look(chosen, options)
        except KeyboardInterrupt:
            if options["watch"] is None or self._last is None:
                raise
        except BrokenPipeError:
            # The reader has seen enough. Python would complain once more, at its end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if self._last:
            raise _Verdict(self._last)

    def _chosen(self, aliases: Sequence[str]) -> dict[str, LoadBalancer]:
        """Return the load balancers that are asked for, by alias."""
        known = list(balancers)
        if not known:
            raise CommandError(
                "No entry of DATABASES is a load balancer: none has django-proxysql's ENGINE."
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

    def _set_drain(self, chosen: Mapping[str, LoadBalancer], options: Mapping[str, Any]) -> None:
        """Drain a peer in all processes, or take that back."""
        if options["json"] or options["watch"] is not None:
            raise CommandError("--json and --watch are for looking; leave them out to drain.")
        option = "undrain" if options["drain"] is None else "drain"
        name = options[option]
        balancer = _owner_of(name, chosen, option)
        if balancer.sharing is None:
            raise CommandError(
                f"{balancer.name!r} shares no state (it has no SHARED_STATE): a drain of "
                f"{name!r} would end with this command's own process, and reach none that serves "
                "requests. Nothing was changed. Set SHARED_STATE; or call "
                f"balancers[{balancer.name!r}].drain({name!r}) in each process; or have the peer "
                "itself refuse new connections, as PROXYSQL PAUSE does."
            )
        if not balancer.sharing.settle():
            raise CommandError(
                f"Redis at {balancer.sharing.link.address} {balancer.sharing.trouble}: the "
                "processes cannot be reached. Nothing was changed."
            )
        if option == "undrain":
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
        self.stdout.flush()

    def _drain(self, balancer: LoadBalancer, name: str, options: Mapping[str, Any]) -> None:
        if not options["force"] and not balancer.peers[name].drained:
            # The circuits may be of the same opinion as a moment ago: ask the peers themselves.
            others = [
                row
                for row in ask({balancer.name: balancer}, options["timeout"])[balancer.name].rows
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
        """Show the peers, with --watch again and again; note each look's exit code."""
        interval = options["watch"]
        redraw = interval is not None and self.stdout.isatty() and not options["json"]
        while True:
            if options["wait"] is not None:
                looks = self._waited(chosen, options)
            else:
                looks = ask(chosen, options["timeout"])
            # First: a user who has seen a look, and ends it, gets its exit code.
            self._last = worst(looks)
            if options["wait"] is not None and self._last == WARNING:
                # What was waited for is there.
                self._last = OK
            if options["json"]:
                indent = 2 if interval is None else None
                self.stdout.write(json.dumps(as_json(looks, self._last), indent=indent))
            else:
                if redraw:
                    # To the top left corner, and nothing of the last look below.
                    self.stdout.write("\x1b[H\x1b[J", ending="")
                when = "" if interval is None else time.strftime("%H:%M:%S ")
                for line in table(looks, self._paints(options), options["verbosity"]):
                    self.stdout.write(when + line)
                    when = ""
            self.stdout.flush()
            if interval is None:
                return
            time.sleep(interval)

    def _waited(
        self, chosen: Mapping[str, LoadBalancer], options: Mapping[str, Any]
    ) -> dict[str, Look]:
        """Return the first look in which each load balancer can be used, or the last one."""
        seconds = options["wait"]
        until = self.clock() + seconds
        progress = _Progress(self.stderr, options["verbosity"])

        def look() -> dict[str, Look]:
            # A first look has the time that a peer needs, however short the wait is.
            looks = ask(chosen, options["timeout"])
            if worst(looks) == CRITICAL:
                waits = [alias for alias, one in looks.items() if one.status == CRITICAL]
                errors = "; ".join(
                    f"{row.found.peer}: {row.found.error or 'drained'}"
                    for row in looks[waits[0]].rows
                )
                left = max(0.0, until - self.clock())
                progress.say(f"waiting for {', '.join(waits)}", left, errors)
            return looks

        try:
            found: dict[str, Look] = tenacity.Retrying(
                retry=tenacity.retry_if_result(lambda looks: worst(looks) == CRITICAL),
                wait=lambda state: min(float(_WAIT(state)), max(0.0, until - self.clock())),
                stop=lambda state: self.clock() >= until,
                sleep=self.sleep,
                # Time is over: the last look says how things are.
                retry_error_callback=lambda state: state.outcome.result(),  # type: ignore[union-attr]
            )(look)
            return found
        finally:
            progress.end()

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
        self._said = ("", "")

    def say(self, what: str, left: float, why: str) -> None:
        """Say what is waited for and why, and how many seconds are left."""
        if self._quiet:
            return
        if self._live:
            line = f"{what}, {left:.0f} s left: {why}"
            self._write(f"\r\x1b[K{line[: shutil.get_terminal_size().columns - 1]}", "")
        elif (what, why) != self._said:
            self._write(f"{what}, at most {left:.0f} s: {why}")
        self._said = what, why

    def end(self) -> None:
        """Take the line away."""
        if self._live and any(self._said):
            self._write("\r\x1b[K", "")

    def _write(self, text: str, ending: str = "\n") -> None:
        try:
            self._stream.write(text, lambda line: line, ending=ending)
            self._stream.flush()
        except OSError:
            # The reader has left, or a disk is full: that is no verdict on the peers.
            self._quiet = True


def _owner_of(name: str, chosen: Mapping[str, LoadBalancer], option: str) -> LoadBalancer:
    """Return the one load balancer that has a peer of that name."""
    owners = {alias: balancer for alias, balancer in chosen.items() if name in balancer.peers}
    if not owners:
        there = "; ".join(f"{alias}: {', '.join(b.peers)}" for alias, b in chosen.items())
        raise CommandError(f"{name!r} is no peer. Nothing was changed. Peers: {there}.")
    if len(owners) > 1:
        raise CommandError(
            f"{name!r} is a peer of {' and of '.join(map(repr, owners))}. Nothing was changed. "
            f"Say whose you mean: peers {next(iter(owners))} --{option} {name}"
        )
    return next(iter(owners.values()))


def _seconds(text: str) -> float:
    """Read a duration; argparse quotes this function's name."""
    seconds = float(text)
    # The most that Python's own waits take.
    if not 0 < seconds < threading.TIMEOUT_MAX:
        raise ValueError(text)
    return seconds


_seconds.__name__ = "number of seconds"
