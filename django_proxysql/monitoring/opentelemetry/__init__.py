"""What happens to peers, for OpenTelemetry. Needs the extra ``[opentelemetry]``.

docs/howto/opentelemetry.rst says how it is switched on, with Django (:mod:`.apps`) and without.

Metrics follow OpenTelemetry's semantic conventions for database clients where these have a name:
each peer is one connection pool. What the conventions have no name for begins with
``django_proxysql``. What happens to a request is also an event on the span that is current.
"""

from __future__ import annotations

import dataclasses
import enum
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

try:
    from opentelemetry import metrics, trace
except ImportError as exc:
    raise ImportError(
        'Telemetry needs OpenTelemetry: pip install "django-proxysql[opentelemetry]"'
    ) from exc

from ... import __version__
from ...core.config import host_and_port
from ...core.events import Event
from ...core.reports import REPORTS, Count, fits
from .. import check_sources, in_use

if TYPE_CHECKING:
    from ...core.peer import Peer
    from .. import Source

_NAME = "django_proxysql"
_POOL = "db.client.connection.pool.name"

#: The conventions' advice for durations, in seconds.
_BUCKETS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 10)

_CAPITAL = re.compile(r"(?<!^)(?=[A-Z])")

#: What an event's field is called on a span, where the conventions have a word for it.
_ATTRIBUTES = {"error": "exception.message", "fault": "error.type"}


class Telemetry:
    """Hands the events of load balancers to OpenTelemetry; a listener.

    :param sources: the :class:`LoadBalancer` s and :class:`AsyncLoadBalancer` s, or Django's
        ``balancers``: all of them, present and future.
    :param meter_provider: where the metrics go; None: to the global provider.
    :raises TypeError: a source is neither.
    """

    #: The database is not touched: see Listeners.add().
    _counts_only = True

    def __init__(
        self, *sources: Source, meter_provider: metrics.MeterProvider | None = None
    ) -> None:
        check_sources("Telemetry", sources)
        self._sources = sources
        meter = metrics.get_meter(_NAME, __version__, meter_provider)
        self._counted = {
            count.telemetry: _made(meter, count)
            for row in REPORTS.values()
            for count in row.counts
            if count.telemetry
        }
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
        for count in REPORTS[type(event)].counts:
            if count.telemetry and fits(event, count.when):
                amount = event.seconds if count.is_duration else 1  # type: ignore[attr-defined]
                attributes = {_POOL: _pool(event), **_attributes(event, count.attributes)}
                self._counted[count.telemetry](amount, attributes)
        span = trace.get_current_span()
        if span.is_recording():
            span.add_event(
                _name(event), _attributes(event, [f.name for f in dataclasses.fields(event)])
            )

    def _connections(self, options: metrics.CallbackOptions) -> Iterator[metrics.Observation]:
        for pool, peer in self._peers():
            yield metrics.Observation(
                peer.connections, {_POOL: pool, "db.client.connection.state": "used"}
            )

    def _circuits(self, options: metrics.CallbackOptions) -> Iterator[metrics.Observation]:
        for pool, peer in self._peers():
            yield metrics.Observation(int(peer.breaker.circuit.state != "closed"), {_POOL: pool})

    def _peers(self) -> Iterator[tuple[str, Peer]]:
        for balancer in in_use(self._sources):
            for name, peer in balancer.peers.items():
                yield f"{balancer.name}/{name}", peer


def _pool(event: Event) -> str:
    peer = getattr(event, "peer", None)
    return event.balancer if peer is None else f"{event.balancer}/{peer}"


def _name(event: Event) -> str:
    return f"{_NAME}.{_CAPITAL.sub('_', type(event).__name__).lower()}"


def _made(meter: metrics.Meter, count: Count) -> Callable[[float, Mapping[str, Any]], None]:
    """Return what adds to OpenTelemetry's instrument for one of the table's."""
    if count.is_duration:
        return meter.create_histogram(
            count.telemetry,
            unit=count.unit,
            description=count.about,
            explicit_bucket_boundaries_advisory=_BUCKETS,
        ).record
    return meter.create_counter(count.telemetry, unit=count.unit, description=count.about).add


def _attributes(event: Event, names: Iterable[str]) -> dict[str, Any]:
    """Return an event's fields as a span has them; the address as the conventions write it."""
    found: dict[str, Any] = {}
    for name in names:
        value = getattr(event, name)
        if value is None:
            continue
        if name == "address":
            found["server.address"], port = host_and_port(value)
            if port is not None:
                found["server.port"] = port
            continue
        value = value.value if isinstance(value, enum.Enum) else value
        found[_ATTRIBUTES.get(name, f"{_NAME}.{name}")] = value
    return found


def __getattr__(name: str) -> str:
    # As in the package's own __init__.
    if name == "default_app_config" and import_module("django").VERSION < (3, 2):
        return f"{__name__}.apps.TelemetryConfig"
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
