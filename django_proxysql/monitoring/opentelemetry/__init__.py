"""What happens to peers, for OpenTelemetry. Needs the extra ``[opentelemetry]``.

In a Django project ``"django_proxysql.monitoring.opentelemetry"`` in INSTALLED_APPS switches it on.
Without Django it listens to the balancers at hand::

    db = LoadBalancer(...)
    Telemetry(db)

Metrics follow OpenTelemetry's semantic conventions for database clients where these have a name:
each peer is one connection pool. What the conventions have no name for begins with
``django_proxysql``. What happens to a request is also an event on the span that is current.
"""

from __future__ import annotations

import dataclasses
import enum
import re
from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any, Union

try:
    from opentelemetry import metrics, trace
except ImportError as exc:
    raise ImportError(
        'Telemetry needs OpenTelemetry: pip install "django-proxysql[opentelemetry]"'
    ) from exc

from ... import __version__
from ...core.balancer import LoadBalancer
from ...core.events import (
    CircuitOpened,
    Connected,
    ConnectFailed,
    ConnectionLost,
    ConnectionReplaced,
    Event,
    PeersExhausted,
    StatementReplayed,
)

if TYPE_CHECKING:
    from ...core.peer import Peer
    from ...registry import Balancers

    Source = Union[LoadBalancer, Balancers]

__all__ = ["Telemetry"]

_NAME = "django_proxysql"
_POOL = "db.client.connection.pool.name"

#: The conventions' advice for durations, in seconds.
_BUCKETS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 10)

_ADDRESS = re.compile(r"(?P<host>.+):(?P<port>\d+)")
_CAPITAL = re.compile(r"(?<!^)(?=[A-Z])")

#: What an event's field is called on a span, where the conventions have a word for it.
_ATTRIBUTES = {"error": "exception.message", "fault": "error.type"}


class Telemetry:
    """Hands what load balancers tell to OpenTelemetry; a listener.

    :param sources: the :class:`LoadBalancer` s, or Django's ``balancers``: all of them, present
        and future.
    :param meter_provider: where the metrics go; None: to the global provider.
    :raises TypeError: a source is neither.
    """

    def __init__(
        self, *sources: Source, meter_provider: metrics.MeterProvider | None = None
    ) -> None:
        for source in sources:
            if not hasattr(source, "add_listener"):
                raise TypeError(
                    "Telemetry takes load balancers, or Django's balancers, and not a "
                    f"{type(source).__name__}."
                )
        self._sources = sources
        meter = metrics.get_meter(_NAME, __version__, meter_provider)
        self._create_time = meter.create_histogram(
            "db.client.connection.create_time",
            unit="s",
            description="The time it took to create a new connection.",
            explicit_bucket_boundaries_advisory=_BUCKETS,
        )
        self._timeouts = meter.create_counter(
            "db.client.connection.timeouts",
            unit="{timeout}",
            description="Calls of connect() that found no peer within CONNECT_DEADLINE.",
        )
        self._failures = meter.create_counter(
            f"{_NAME}.connect.failures",
            unit="{attempt}",
            description="Failed attempts to connect, by what the error says about the peer.",
        )
        self._openings = meter.create_counter(
            f"{_NAME}.circuit.openings",
            unit="{opening}",
            description="How often a peer's circuit opened.",
        )
        self._losses = meter.create_counter(
            f"{_NAME}.connection.losses",
            unit="{connection}",
            description="Established connections that were found lost.",
        )
        self._replacements = meter.create_counter(
            f"{_NAME}.connection.replacements",
            unit="{connection}",
            description="Connections replaced at a safe point.",
        )
        self._replays = meter.create_counter(
            f"{_NAME}.statement.replays",
            unit="{statement}",
            description="Statements run again on another connection.",
        )
        meter.create_observable_up_down_counter(
            "db.client.connection.count",
            [self._connections],
            unit="{connection}",
            description="The connections that the process holds.",
        )
        meter.create_observable_gauge(
            f"{_NAME}.circuit.open",
            [self._circuits],
            description="1 while the peer's circuit is not closed, else 0.",
        )
        for source in sources:
            source.add_listener(self)

    def __call__(self, event: Event, /) -> None:
        """Count ``event``, and note it on the current span; a listener."""
        pool = {_POOL: _pool(event)}
        if type(event) is Connected:
            self._create_time.record(event.seconds, pool)
        elif type(event) is ConnectFailed:
            self._failures.add(1, {**pool, "error.type": event.fault.value})
        elif type(event) is CircuitOpened:
            self._openings.add(1, pool)
        elif type(event) is ConnectionLost:
            self._losses.add(1, {**pool, "error.type": event.fault.value})
        elif type(event) is ConnectionReplaced:
            self._replacements.add(1, pool)
        elif type(event) is StatementReplayed:
            self._replays.add(1, pool)
        elif type(event) is PeersExhausted:
            self._timeouts.add(1, pool)
        span = trace.get_current_span()
        if span.is_recording():
            span.add_event(_name(event), _attributes(event))

    def _connections(self, options: metrics.CallbackOptions) -> Iterator[metrics.Observation]:
        for pool, peer in self._peers():
            yield metrics.Observation(
                peer.connections, {_POOL: pool, "db.client.connection.state": "used"}
            )

    def _circuits(self, options: metrics.CallbackOptions) -> Iterator[metrics.Observation]:
        for pool, peer in self._peers():
            yield metrics.Observation(int(peer.breaker.circuit.state != "closed"), {_POOL: pool})

    def _peers(self) -> Iterator[tuple[str, Peer]]:
        for source in self._sources:
            if isinstance(source, LoadBalancer):
                balancers = [source]
            else:
                # Those that were used: one whose settings are wrong is none of ours.
                balancers = [registered.balancer for registered in list(source.known.values())]
            for balancer in balancers:
                for name, peer in balancer.peers.items():
                    yield f"{balancer.name}/{name}", peer


def _pool(event: Event) -> str:
    peer = getattr(event, "peer", None)
    return event.balancer if peer is None else f"{event.balancer}/{peer}"


def _name(event: Event) -> str:
    return f"{_NAME}.{_CAPITAL.sub('_', type(event).__name__).lower()}"


def _attributes(event: Event) -> Mapping[str, Any]:
    """Return an event's fields as a span has them; the address as the conventions write it."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(event):
        value = getattr(event, field.name)
        if value is None:
            continue
        if field.name == "address":
            match = _ADDRESS.fullmatch(value)
            found["server.address"] = match["host"] if match else value
            if match:
                found["server.port"] = int(match["port"])
            continue
        value = value.value if isinstance(value, enum.Enum) else value
        found[_ATTRIBUTES.get(field.name, f"{_NAME}.{field.name}")] = value
    return found


def __getattr__(name: str) -> str:
    # As in the package's own __init__.
    if name == "default_app_config" and import_module("django").VERSION < (3, 2):
        return f"{__name__}.apps.TelemetryConfig"
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
