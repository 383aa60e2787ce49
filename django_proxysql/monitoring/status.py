"""What the status page and the health endpoint say, gathered without asking any database."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime, timezone
from itertools import groupby
from typing import Any, NamedTuple

from django.core.exceptions import ImproperlyConfigured
from django.db import connections
from django.utils.timezone import localtime

from ..core.balancer import LoadBalancer, PeerState
from ..core.circuit import CLOSED, HALF_OPEN, OPEN
from ..core.events import CommitResolved
from ..core.logs import due_in
from ..core.reports import REPORTS
from ..core.sharing import Fleet
from ..core.sharing.records import MOMENTS
from ..registry import balancers
from .history import DRAINED, SPAN, SUSPECT, History, history, state_of
from .timeline import Span, Timeline, draw, spans

#: Seconds within which all know what one has found, and some for clocks and a busy machine.
LAG = 3.0

#: What is shown where a peer is more than one of these.
_WORST_FIRST = (DRAINED, OPEN, HALF_OPEN, SUSPECT)

#: A state in a person's words, and what there is to say of it.
_LABELS = {
    CLOSED: ("In use", "closed"),
    SUSPECT: ("In doubt", "suspect: the next connection is a trial"),
    OPEN: ("Left alone", "open"),
    HALF_OPEN: ("On trial", "half-open: a trial is under way or due"),
    DRAINED: ("Drained", "no new connections"),
}

#: What stands where there is nothing to say.
NONE = "–"  # noqa: RUF001 - a dash, for people


class PeerStatus(NamedTuple):
    """A peer's line on the page."""

    known: PeerState
    #: Since when; None: for longer than anybody has looked.
    since: datetime | None
    connections: str
    #: Of the balancer's connections, but for the one that serves this page.
    share: str
    #: The timeline in words, latest first.
    story: Sequence[tuple[datetime | None, str]]

    @property
    def state(self) -> str:
        """The word for it in code and metrics."""
        return state_of(self.known.drained, self.known)

    @property
    def label(self) -> str:
        """The same in a person's words."""
        return _LABELS[self.state][0]

    @property
    def meaning(self) -> str:
        """More about it."""
        meaning, known = _LABELS[self.state][1], self.known
        if known.drained and known.state != CLOSED:
            return f"{meaning}; its circuit is {known.state}"
        if self.state == OPEN and known.trial_in is not None:
            return f"{meaning}, next trial due {due_in(known.trial_in)}"
        return meaning

    @property
    def weight(self) -> str:
        """As text, which no language writes in its own way; and so for the other numbers."""
        return f"{self.known.weight:g}"

    @property
    def priority(self) -> str:
        """As text."""
        return str(self.known.priority)

    @property
    def can_retry(self) -> bool:
        """Whether there is a trial that a person may ask for."""
        return self.known.state != CLOSED and not self.known.drained


class BalancerStatus(NamedTuple):
    """A balancer's part of the page."""

    alias: str
    #: Why there is no more to say: its settings are wrong.
    problem: str = ""
    #: Whether it shares its state with other processes (SHARED_STATE).
    is_shared: bool = False
    #: How many processes this speaks for; "" where the others cannot be asked.
    processes: str = ""
    #: Why they cannot: what is wrong with Redis, as a sentence without its subject.
    trouble: str = ""
    peers: Sequence[PeerStatus] = ()
    usable: int = 0
    timeline: Timeline | None = None
    #: What this process did in the last hour besides, as sentences.
    recent: Sequence[str] = ()
    has_weights: bool = False
    has_priorities: bool = False

    @property
    def headline(self) -> str:
        """How things stand, in a sentence."""
        if self.usable == len(self.peers):
            return (
                f"All {len(self.peers)} peers usable" if self.usable > 1 else "The peer is usable"
            )
        if not self.usable:
            return "No peer usable"
        return f"{self.usable} of {len(self.peers)} peers usable"

    @property
    def level(self) -> str:
        """How bad that is: "good", "warning" or "bad"."""
        if self.problem or not self.usable:
            return "bad"
        return "good" if self.usable == len(self.peers) else "warning"


class Status(NamedTuple):
    """The whole page."""

    host: str
    pid: str
    #: When this was so, and since when anybody has looked.
    now: datetime
    since: datetime
    balancers: Sequence[BalancerStatus]


def status(seen: History = history) -> Status:
    """Return how things stand in this process."""
    now, at = time.time(), seen.clock()
    return Status(
        host=socket.gethostname(),
        pid=str(os.getpid()),
        now=_local(now),
        # The time of day as it is now: it may have been set since.
        since=_local(now - at + seen.began),
        balancers=[
            BalancerStatus(alias, problem=str(found))
            if isinstance(found, Exception)
            else balancer_status(found, seen, now, at)
            for alias, found in _all()
        ],
    )


def health(*, detailed: bool = False) -> tuple[bool, dict[str, Any]]:
    """Return whether every balancer has a usable peer, and that in detail; more for staff."""
    every, said = True, {}
    for alias, found in _all():
        # One whose settings are wrong has no peers.
        states = [] if isinstance(found, Exception) else found.snapshot()
        usable = sum(map(_is_usable, states))
        every = every and usable > 0
        about: dict[str, Any] = {"usable": usable, "peers": len(states)}
        if detailed and states:
            about["states"] = [
                {
                    "peer": state.name,
                    "address": state.address,
                    "circuit": state.state,
                    "suspect": state.suspect,
                    "drained": state.drained,
                    "connections": state.connections,
                    "error": state.error,
                }
                for state in states
            ]
        said[alias] = about
    answer: dict[str, Any] = {"status": "ok" if every else "unavailable", "balancers": said}
    if detailed:
        answer["process"] = process_name()
    return every, answer


def process_name() -> str:
    """Return which process this is, for a sentence."""
    return f"process {os.getpid()} on {socket.gethostname()}"


def _all() -> Iterator[tuple[str, LoadBalancer | ImproperlyConfigured]]:
    """Yield each balancer once, or what is wrong with its settings."""
    seen = set()
    for alias in list(balancers):
        try:
            balancer = balancers[alias]
        except ImproperlyConfigured as exc:
            yield alias, exc
            continue
        # A copy of an entry under another alias shares its balancer.
        if balancer.name not in seen:
            seen.add(balancer.name)
            yield balancer.name, balancer


def _is_usable(state: PeerState) -> bool:
    # A peer in doubt can be connected to, and its doubts are mostly unfounded.
    return state.state == "closed" and not state.drained


def balancer_status(balancer: LoadBalancer, seen: History, now: float, at: float) -> BalancerStatus:
    """Return how things stand with one balancer, ``now`` and ``at`` on the clock of ``seen``."""
    seen.look_at(balancer)
    states = balancer.snapshot()
    # What all processes know together; None where they share nothing, or Redis is silent.
    fleet = balancer.sharing.fleet() if balancer.sharing else None
    held = {state.name: state.connections for state in states}
    if fleet is not None:
        held.update(fleet.connections)
    shares = dict(held)
    # The one that serves this page is none of the site's load.
    own = getattr(connections[balancer.name], "peer", None)
    if own is not None and shares.get(own.name):
        shares[own.name] -= 1
    total = sum(shares.values())
    # From the clock of ``seen`` to the time of day.
    shift = now - at
    peers, rows = [], []
    for state in states:
        name = state.name
        changes, trials = seen.of(balancer.name, name)
        found = [(shift + change.at, change.state) for change in changes]
        began = shift + seen.began
        if fleet is not None:
            # Redis's clock may be another than this host's.
            shared = [(when - fleet.now + now, word) for when, word in fleet_changes(fleet, name)]
            found = laid_over(shared, found, now)
            began = found[0][0]
        its_spans = spans(found, now - SPAN, now)
        peers.append(
            PeerStatus(
                known=state,
                since=_local(found[-1][0]) if found[-1][0] > began else None,
                connections=str(held[name]),
                share=f"{shares[name] / total:.0%}" if total else NONE,
                story=[
                    (None if span.start <= now - SPAN else _local(span.start), span.state)
                    for span in reversed(its_spans)
                ],
            )
        )
        marks = [(shift + trial.at, trial.succeeded, trial.error) for trial in trials]
        rows.append((name, its_spans, marks))
    return BalancerStatus(
        balancer.name,
        is_shared=balancer.sharing is not None,
        processes="" if fleet is None else str(fleet.processes),
        trouble=balancer.sharing.trouble if balancer.sharing and fleet is None else "",
        peers=peers,
        usable=sum(map(_is_usable, states)),
        timeline=draw(rows, now - SPAN, now, _local),
        recent=_recent(balancer, seen),
        has_weights=len({state.weight for state in states}) > 1,
        has_priorities=len({state.priority for state in states}) > 1,
    )


def _recent(balancer: LoadBalancer, seen: History) -> list[str]:
    said = []
    for report in REPORTS.values():
        if not report.recent:
            continue
        found = seen.count(balancer.name, report.event)
        if found:
            counts = ", ".join(f"{count} {word}".rstrip() for word, count in sorted(found.items()))
            said.append(f"{report.recent}: {counts}.")
        elif report.event is CommitResolved and balancer.config.commit_outcome is not None:
            said.append("No COMMIT was left unanswered.")
    return said


def fleet_changes(fleet: Fleet, peer: str) -> list[tuple[float, str]]:
    """Return when a peer came into which state, as all processes found it, oldest first.

    Only changes are on record. What a peer was before its first one is seen from that, and
    one that has none has been for all that time what all know it to be now.
    """
    # Where the record is full, what was before it is not known.
    full = len(fleet.timeline) >= MOMENTS
    start = fleet.timeline[0].when if full else 0.0
    so = {DRAINED: peer in fleet.drained, OPEN: peer in fleet.out}
    # Backwards from now.
    changes = []
    for moment in reversed(fleet.timeline):
        if moment.peer == peer:
            track = OPEN if moment.state in (OPEN, CLOSED) else DRAINED
            so[track] = moment.state == track
            changes.append((moment.when, next(filter(so.get, so), CLOSED)))
            so[track] = not so[track]
    changes.append((start, next(filter(so.get, so), CLOSED)))
    return _without_repeats(reversed(changes))


def laid_over(
    changes: Sequence[tuple[float, str]], own: Sequence[tuple[float, str]], now: float
) -> list[tuple[float, str]]:
    """Return what all processes know of a peer, with what this one alone has found laid over it.

    A process keeps to itself that a peer refuses it, or that it has lost all peers; and where
    all of them have lost all, none has reported it.

    :param changes: what all know, oldest first: when a peer came into which state.
    :param own: the same, as this process found it; its last state is what the peer is here now.
    :param now: when the two end, on the clock of both.
    """
    theirs = _out(changes, now)
    # What lies in one of theirs, but for the time that the word takes, is known to all.
    known = _out([(when, state if state == CLOSED else OPEN) for when, state in changes], now)
    alone = [
        (start, end, state)
        for start, end, state in _out(own, now)
        if not any(first - LAG <= start and end <= last + LAG for first, last, _ in known)
    ]
    every = theirs + alone
    begin = changes[0][0]
    edges = [edge for span in every for edge in span[:2] if edge < now]
    moments = {begin, *(max(begin, edge) for edge in edges)}

    def states_at(moment: float) -> list[str]:
        return [state for start, end, state in every if start <= moment < end]

    found = _without_repeats(
        (moment, min(states_at(moment), key=_WORST_FIRST.index, default=CLOSED))
        for moment in sorted(moments)
    )
    last = own[-1][1]
    if found[-1][1] != last and (found[-1][1], last) != (OPEN, HALF_OPEN):
        # The others do not know it yet.
        found.append((max(found[-1][0], own[-1][0]), last))
    return found


def _without_repeats(changes: Iterable[tuple[float, str]]) -> list[tuple[float, str]]:
    return [next(equal) for _, equal in groupby(changes, key=lambda change: change[1])]


def _out(changes: Sequence[tuple[float, str]], now: float) -> list[Span]:
    """Return from when to when a peer was anything but in use, and what."""
    return [span for span in spans(changes, changes[0][0], now) if span.state != CLOSED]


def _local(moment: float) -> datetime:
    return localtime(datetime.fromtimestamp(moment, tz=timezone.utc))
