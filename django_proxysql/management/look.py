"""One look at all peers of each balancer, and how ``manage.py peers`` prints it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ..core.balancer import LoadBalancer, PeerState
from ..core.comparison import warnings
from ..inspection import Inspection, inspect

#: Exit codes, in the words of Nagios, which knows the same four.
OK, WARNING, CRITICAL, UNKNOWN = range(4)
_WORDS = ("OK", "WARNING", "CRITICAL", "UNKNOWN")


class Row(NamedTuple):
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


class Look(NamedTuple):
    """All peers of one balancer, asked once."""

    rows: Sequence[Row]
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


def ask(chosen: Mapping[str, LoadBalancer], timeout: float | None) -> dict[str, Look]:
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
            Row(one, states.get(one.peer), fleet.connections[one.peer] if fleet else None)
            for one in found[alias]
        ]
        looks[alias] = Look(
            rows,
            balancer.sharing is not None,
            fleet.processes - 1 if fleet else None,
            balancer.sharing.trouble if balancer.sharing and not fleet else "",
            warnings(balancer.config, [row.found.facts for row in rows if row.found.facts]),
        )
    return looks


def worst(looks: Mapping[str, Look]) -> int:
    return max(look.status for look in looks.values())


#: What ``--json`` prints of an inspection as it is.
_AS_FOUND = ("peer", "address", "reachable", "latency", "version", "ready")


def as_json(looks: Mapping[str, Look], exit_code: int) -> dict[str, Any]:
    """Return what ``--json`` prints; its form is promised in docs/reference/commands.rst."""
    status = worst(looks)
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
                        **{name: getattr(row.found, name) for name in _AS_FOUND},
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


def table(
    looks: Mapping[str, Look], paint: Callable[[int, str], str], verbosity: int
) -> Iterator[str]:
    """Yield the lines to print, painted by a status: the verdict first, as Nagios wants it."""
    status = worst(looks)
    said = "; ".join(f"{alias}: {look.summary}" for alias, look in looks.items())
    yield paint(status, f"{_WORDS[status]}: {said}")
    if verbosity == 0:
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
                    "not: no other peer here takes connections"
                )
        for warning in look.warnings:
            yield paint(WARNING, f"{alias}: {warning}")
        if look.shares and look.processes is None:
            yield f"{alias}: what the other processes know is unknown: Redis {look.trouble}"


def _aligned(cells: Sequence[str], widths: Sequence[int]) -> str:
    return "  ".join(cell.ljust(width) for cell, width in zip(cells, widths)).rstrip()


def _drained(known: PeerState | None) -> str:
    if known is None:
        return "-"
    return "refused" if known.drain_refused else _yes(known.drained)


def _yes(value: bool) -> str:
    return "yes" if value else "no"
