"""What each event becomes: log lines, a signal, metrics. A new event is one new row of REPORTS.

The log (:mod:`.logs`), Django's signals, the metrics for Prometheus and for OpenTelemetry and the
status page's history read this table. It is plain data and imports nothing optional.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from . import events
from .faults import Fault


@dataclass(frozen=True)
class Limited:
    """How often a line is written; the next line that fits is written in its place."""

    #: At most one line in so many seconds, …
    seconds: float
    #: … for each value of these fields.
    per: tuple[str, ...]
    #: A line with another error than the last one's is written at once.
    new_error_passes: bool = False


@dataclass(frozen=True)
class Line:
    """A log line: the first of an event's lines that fits is written."""

    level: int
    #: It names the event's fields, and what :mod:`.logs` makes of them.
    text: str
    #: Values that the event's fields must have.
    when: Mapping[str, Any] = field(default_factory=dict)
    limited: Limited | None = None


@dataclass(frozen=True)
class Count:
    """What one event adds to a counter or a histogram of its peer, or else of its balancer."""

    #: Prometheus' name between ``django_proxysql_`` and a counter's ``_total``.
    name: str
    about: str
    #: Prometheus' label besides ``alias`` and ``peer``.
    label: str = ""
    #: OpenTelemetry's unit. ``s``: the event's ``seconds`` are what is measured.
    unit: str = "{event}"
    #: The label's values by the event's field ``by``; one value alone without such a field.
    words: Mapping[Any, str] = field(default_factory=dict)
    by: str = ""
    #: Values that the event's fields must have.
    when: Mapping[str, Any] = field(default_factory=dict)
    #: OpenTelemetry's name for it. Empty: OpenTelemetry is not given it.
    telemetry: str = ""
    #: The fields that OpenTelemetry gets as attributes.
    attributes: tuple[str, ...] = ()

    @property
    def is_duration(self) -> bool:
        """Whether it is a histogram."""
        return self.unit == "s"

    def label_of(self, event: Any) -> tuple[str, ...]:
        """Return the value of the label; nothing if it has none."""
        return (self.words[getattr(event, self.by, None)],) if self.label else ()

    def labels(self) -> list[tuple[str, ...]]:
        """Return all values that the label may have."""
        return [(word,) for word in self.words.values()] if self.label else [()]


@dataclass(frozen=True)
class Report:
    """What one class of event becomes."""

    event: type
    lines: tuple[Line, ...]
    #: Its name in :mod:`django_proxysql.signals`. Empty: it has none.
    signal: str = ""
    counts: tuple[Count, ...] = ()
    #: What the status page calls those of the last hour. Empty: it does not count them.
    recent: str = ""

    def word_of(self, event: Any) -> str:
        """Return what the event is counted as: its first count's label, in words."""
        return " ".join(self.counts[0].label_of(event)).replace("_", " ")


def fits(event: object, when: Mapping[str, Any]) -> bool:
    """Return whether the event's fields have these values."""
    return not when or all(getattr(event, name) == value for name, value in when.items())


_IS_TRIAL = {"trial": True}


def _attempts(outcome: str, telemetry: str = "") -> tuple[Count, ...]:
    """Return how attempts to connect that ended so are counted."""
    words = {None: outcome}
    connects = "Attempts to connect to a peer."
    seconds = "How long attempts to connect to a peer took."
    trials = "Attempts to connect that were the trial of an open or suspect circuit."
    return (
        Count("connects", connects, "outcome", words=words),
        Count("connect_duration_seconds", seconds, "outcome", "s", words, telemetry=telemetry),
        Count("trials", trials, "outcome", words=words, when=_IS_TRIAL),
    )


_FAULTS = {fault: fault.value for fault in Fault}

_PEER = "%(peer)s (%(address)s)"
_CONNECTED = f"%(balancer)s: connected to {_PEER} in %(milliseconds).1f ms"
_FAILED = f"%(balancer)s: connecting to {_PEER} failed (%(kind)s): %(error)s"
_OPENED = f"%(balancer)s: circuit of {_PEER} opened"
_CLOSED = f"%(balancer)s: circuit of {_PEER} closed"
_OUT = "the peer was out for %(seconds).1f s"
_RESCUED = "from %(peer)s to %(successor)s%(more)s: %(error)s"
_ASKED = f"%(balancer)s: COMMIT sent to {_PEER} was not answered"
_ASKED_IN = ", found out in %(seconds).3f s%(more)s: %(error)s"
#: A dying peer has many connections, and each has such a line.
_ONCE_A_SECOND = Limited(1, per=("balancer",))

_ROWS = (
    Report(
        events.Connected,
        lines=(
            Line(logging.DEBUG, f"{_CONNECTED} (trial)", _IS_TRIAL),
            Line(logging.DEBUG, _CONNECTED),
        ),
        counts=_attempts("success", "db.client.connection.create_time"),
    ),
    Report(
        events.ConnectFailed,
        lines=(
            # Below fail_max no circuit opens to speak of it, and a password that
            # is wrong does not get better by being tried again.
            Line(logging.ERROR, _FAILED, {"fault": Fault.REFUSED, "count": 1, "opened": False}),
            # Every connect may meet what is wrong on this side.
            Line(
                logging.ERROR,
                _FAILED,
                {"fault": Fault.LOCAL},
                Limited(60, per=("balancer", "peer"), new_error_passes=True),
            ),
            Line(logging.DEBUG, _FAILED),
        ),
        signal="peer_failed",
        counts=(
            *_attempts("failure"),
            Count(
                "connect_failures",
                "Failed attempts to connect, by what the error says about the peer.",
                "fault",
                "{attempt}",
                by="fault",
                words=_FAULTS,
                telemetry="django_proxysql.connect.failures",
                attributes=("fault",),
            ),
        ),
    ),
    Report(
        events.CircuitOpened,
        lines=(
            # The process that found it out has warned.
            Line(
                logging.INFO,
                f"{_OPENED}, another process found, %(first_trial)s%(because)s",
                {"elsewhere": True},
            ),
            Line(
                logging.ERROR,
                f"{_OPENED}, %(first_trial)s: the peer refuses us, %(error)s",
                {"fault": Fault.REFUSED},
            ),
            Line(logging.WARNING, f"{_OPENED}, %(first_trial)s%(because)s"),
        ),
        signal="peer_opened",
        counts=(
            Count(
                "circuit_openings",
                "How often a peer's circuit opened, in any process.",
                unit="{opening}",
                telemetry="django_proxysql.circuit.openings",
            ),
        ),
    ),
    Report(
        events.CircuitClosed,
        lines=(
            Line(logging.INFO, f"{_CLOSED}, another process found, {_OUT}", {"elsewhere": True}),
            Line(logging.INFO, f"{_CLOSED}, {_OUT}"),
        ),
        signal="peer_closed",
    ),
    Report(
        events.PeersExhausted,
        lines=(Line(logging.DEBUG, "%(error)s"),),
        signal="peers_exhausted",
        counts=(
            Count(
                "peers_exhausted",
                "Calls of connect() that may use all peers and found none.",
                unit="{timeout}",
                telemetry="db.client.connection.timeouts",
            ),
        ),
    ),
    Report(
        events.ConnectionLost,
        lines=(
            Line(
                logging.DEBUG,
                f"%(balancer)s: a connection to {_PEER} is lost (idle): %(error)s",
                {"idle": True},
            ),
            Line(logging.DEBUG, f"%(balancer)s: a connection to {_PEER} is lost: %(error)s"),
        ),
        signal="connection_lost",
        counts=(
            Count(
                "connections_lost",
                "Established connections found lost: idle, before anything was sent, or in use.",
                "found",
                "{connection}",
                by="idle",
                words={True: "idle", False: "in_use"},
                telemetry="django_proxysql.connection.losses",
                attributes=("fault",),
            ),
        ),
    ),
    Report(
        events.ConnectionReplaced,
        lines=(
            Line(
                logging.WARNING,
                f"%(balancer)s: replaced a lost connection, {_RESCUED}",
                {"forced": True},
                _ONCE_A_SECOND,
            ),
            Line(logging.DEBUG, "%(balancer)s: left %(peer)s for %(successor)s", {"forced": False}),
        ),
        counts=(
            Count(
                "connections_replaced",
                "Connections replaced at a safe point: because they were lost, or to leave a "
                "peer that is out or drained.",
                "reason",
                "{connection}",
                by="forced",
                words={True: "lost", False: "left"},
                telemetry="django_proxysql.connection.replacements",
            ),
        ),
    ),
    Report(
        events.StatementReplayed,
        lines=(
            Line(
                logging.WARNING,
                f"%(balancer)s: ran a statement again, {_RESCUED}",
                limited=_ONCE_A_SECOND,
            ),
        ),
        signal="statement_replayed",
        counts=(
            Count(
                "statements_replayed",
                "Statements run again on another connection, by the peer that lost them.",
                unit="{statement}",
                telemetry="django_proxysql.statement.replays",
            ),
        ),
    ),
    Report(
        events.BlockRetried,
        lines=(
            Line(
                logging.WARNING,
                "%(balancer)s: ran %(function)s again from its beginning, run %(run)s%(more)s: "
                "%(error)s",
                limited=_ONCE_A_SECOND,
            ),
        ),
        signal="block_retried",
        counts=(
            Count(
                "blocks_retried",
                "Functions of retrying_atomic, and views, that were run again.",
                unit="{block}",
                telemetry="django_proxysql.block.retries",
            ),
        ),
        recent="Blocks and views that were run again",
    ),
    Report(
        events.CommitResolved,
        lines=(
            Line(
                logging.WARNING,
                f"{_ASKED} and stands{_ASKED_IN}",
                {"outcome": "committed"},
                _ONCE_A_SECOND,
            ),
            Line(
                logging.WARNING,
                f"{_ASKED} and was rolled back{_ASKED_IN}",
                {"outcome": "rolled_back"},
                _ONCE_A_SECOND,
            ),
            Line(
                logging.ERROR, f"{_ASKED} and may stand or not{_ASKED_IN}", {"outcome": "unknown"}
            ),
        ),
        signal="commit_resolved",
        counts=(
            Count(
                "commits_resolved",
                "COMMITs whose answer was lost, by what the engine found out about them.",
                "outcome",
                "{commit}",
                by="outcome",
                words={word: word for word in ("committed", "rolled_back", "unknown")},
                telemetry="django_proxysql.commit.outcomes",
                attributes=("outcome",),
            ),
        ),
        recent="COMMITs that were not answered, and what the engine found out",
    ),
    Report(
        events.PeerDrained,
        lines=(
            Line(
                logging.INFO,
                f"%(balancer)s: {_PEER} is drained, %(connections)s connections are to leave it",
            ),
        ),
    ),
    Report(
        events.PeerUndrained,
        lines=(Line(logging.INFO, f"%(balancer)s: {_PEER} is drained no longer"),),
    ),
)

#: Every event's row.
REPORTS: Mapping[type, Report] = {row.event: row for row in _ROWS}
