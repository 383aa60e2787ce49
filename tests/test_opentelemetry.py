"""OpenTelemetry: metrics by its conventions for databases, and events on the current span."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from django_proxysql import Fault, NoPeerAvailable
from django_proxysql.core.events import (
    CircuitClosed,
    CommitResolved,
    ConnectionLost,
    ConnectionReplaced,
    StatementReplayed,
)
from django_proxysql.core.reports import REPORTS
from tests.children import run_python
from tests.fakes import refused_by_host
from tests.test_balancer import World

sdk = pytest.importorskip("opentelemetry.sdk.metrics", reason="the SDK is not installed")

from opentelemetry.sdk.metrics.export import InMemoryMetricReader  # noqa: E402
from opentelemetry.sdk.trace import TracerProvider  # noqa: E402
from opentelemetry.sdk.trace.export import SimpleSpanProcessor  # noqa: E402
from opentelemetry.sdk.trace.export.in_memory_span_exporter import (  # noqa: E402
    InMemorySpanExporter,
)

from django_proxysql.monitoring.opentelemetry import (  # noqa: E402
    _ATTRIBUTES,
    _POOL,
    Telemetry,
    _attributes,
)


class Watched(World):
    """A balancer whose telemetry goes to an SDK in memory."""

    def __init__(self, *names: str, times: int = 1, **options: Any) -> None:
        super().__init__(*names, **options)
        self.reader = InMemoryMetricReader()
        self.provider = sdk.MeterProvider([self.reader])
        self.telemetry = Telemetry(*[self.db] * times, meter_provider=self.provider)

    def points(self, name: str) -> dict[tuple[tuple[str, Any], ...], Any]:
        """Return a metric's data points by their attributes."""
        data = self.reader.get_metrics_data()
        return {
            tuple(sorted(point.attributes.items())): point
            for resource in (data.resource_metrics if data else [])
            for scope in resource.scope_metrics
            for metric in scope.metrics
            if metric.name == name
            for point in metric.data.data_points
        }

    def value(self, name: str, peer: str | None, **more: Any) -> Any:
        pool = "default" if peer is None else f"default/{peer}"
        key = {"db.client.connection.pool.name": pool, **more}
        point = self.points(name).get(tuple(sorted(key.items())))
        return None if point is None else getattr(point, "value", getattr(point, "count", None))


@pytest.fixture
def spans() -> Iterator[InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    with provider.get_tracer("test").start_as_current_span("request"):
        yield exporter


def events_of(spans: InMemorySpanExporter) -> list[tuple[str, dict[str, Any]]]:
    """End the current span; return its events."""
    from opentelemetry import trace

    trace.get_current_span().end()
    (span,) = spans.get_finished_spans()
    return [(event.name, dict(event.attributes or {})) for event in span.events]


def test_names_units_and_instruments_are_the_conventions() -> None:
    """What begins with ``db.`` is as OpenTelemetry's own package makes it."""
    theirs = pytest.importorskip("opentelemetry.semconv._incubating.metrics.db_metrics")

    def made(reader: InMemoryMetricReader) -> dict[str, Any]:
        data = reader.get_metrics_data()
        metrics = data.resource_metrics[0].scope_metrics[0].metrics
        return {
            metric.name: (
                metric.unit,
                type(metric.data),
                getattr(metric.data, "is_monotonic", None),
            )
            for metric in metrics
            if metric.name.startswith("db.")
        }

    world = Watched("db1")
    connection = world.db.connect()
    world.driver.down["db1"] = refused_by_host
    with pytest.raises(NoPeerAvailable):
        world.db.connect()
    ours = made(world.reader)
    del connection
    assert len(ours) == 3

    reader = InMemoryMetricReader()
    meter = sdk.MeterProvider([reader]).get_meter("theirs")
    for name in ours:
        instrument = getattr(theirs, f"create_{name.replace('.', '_')}")(meter)
        getattr(instrument, "record", getattr(instrument, "add", None))(1)
    assert ours == made(reader)


def test_each_attribute_that_is_not_ours_is_the_conventions() -> None:
    known: set[object] = set()
    for kind in ("db", "error", "exception", "server"):
        module = pytest.importorskip(
            f"opentelemetry.semconv._incubating.attributes.{kind}_attributes"
        )
        known.update(word for word in vars(module).values() if isinstance(word, str))
    used = {_POOL, "db.client.connection.state", *_ATTRIBUTES.values()}
    used.update(_attributes(SimpleNamespace(address="db1:3306"), ["address"]))  # type: ignore[arg-type]
    assert used <= known


def test_a_connect_is_timed_by_peer_and_the_connection_counted() -> None:
    world = Watched("db1")
    connection = world.db.connect()
    assert world.value("db.client.connection.create_time", "db1") == 1
    state = {"db.client.connection.state": "used"}
    assert world.value("db.client.connection.count", "db1", **state) == 1
    del connection
    world.driver.made.clear()
    assert world.value("db.client.connection.count", "db1", **state) == 0


@pytest.mark.parametrize("source", ["db1", None, {}])
def test_what_is_no_balancer_is_refused_by_its_type(source: Any) -> None:
    with pytest.raises(TypeError, match=f"and not a {type(source).__name__}"):
        Telemetry(source)


def test_a_balancer_that_is_named_twice_is_counted_once() -> None:
    world = Watched("db1", times=2)
    connection = world.connect()
    assert world.value("db.client.connection.create_time", "db1") == 1
    state = {"db.client.connection.state": "used"}
    assert world.value("db.client.connection.count", "db1", **state) == 1
    del connection


def test_a_balancer_under_asyncio_is_counted_as_well() -> None:
    from tests.test_aio import World as AsyncWorld

    world, reader = AsyncWorld("db1", "db2"), InMemoryMetricReader()
    Telemetry(world.db, meter_provider=sdk.MeterProvider([reader]))
    world.driver.down["db1"] = refused_by_host
    connection = world.connect()
    said = str(reader.get_metrics_data())
    for name in ("db.client.connection.count", "django_proxysql.circuit.open", "default/db2"):
        assert name in said
    connection.terminate()


def test_a_failed_attempt_is_counted_by_its_fault_and_opens_the_circuit_once() -> None:
    world = Watched("db1")
    world.driver.down["db1"] = refused_by_host
    for _ in range(2):
        with pytest.raises(NoPeerAvailable):
            world.db.connect()
    unreachable = {"error.type": Fault.UNREACHABLE.value}
    assert world.value("django_proxysql.connect.failures", "db1", **unreachable) == 1
    assert world.value("django_proxysql.circuit.openings", "db1") == 1
    assert world.value("django_proxysql.circuit.open", "db1") == 1
    assert world.value("db.client.connection.timeouts", None) == 2


def test_losses_replacements_replays_and_outcomes_are_counted() -> None:
    world = Watched("db1", "db2")
    for event in (
        ConnectionLost("default", "db1", "db1:3306", Fault.LOST, "gone", False),
        ConnectionReplaced("default", "db1", "db2", True, "gone"),
        StatementReplayed("default", "db1", "db2", "gone"),
        CommitResolved("default", "db1", "db1:3306", "committed", 0.02, "gone"),
    ):
        world.db.group.emit(event)
    lost, committed = {"error.type": "lost"}, {"django_proxysql.outcome": "committed"}
    assert world.value("django_proxysql.connection.losses", "db1", **lost) == 1
    assert world.value("django_proxysql.connection.replacements", "db1") == 1
    assert world.value("django_proxysql.statement.replays", "db1") == 1
    assert world.value("django_proxysql.commit.outcomes", "db1", **committed) == 1


def test_a_failover_stands_on_the_span_of_its_request(spans: InMemorySpanExporter) -> None:
    world = Watched("db1", "db2")
    world.driver.down["db1"] = refused_by_host
    world.db.connect()
    names = [name for name, _ in events_of(spans)]
    assert names == [
        "django_proxysql.circuit_opened",
        "django_proxysql.connect_failed",
        "django_proxysql.connected",
    ]


def test_an_event_on_a_span_has_the_conventions_words(spans: InMemorySpanExporter) -> None:
    world = Watched("db1")
    world.db.group.emit(ConnectionLost("default", "db1", "10.0.0.1:3306", Fault.LOST, "gone", True))
    world.db.group.emit(CircuitClosed("default", "db1", "/run/db.sock", 3.0))
    assert events_of(spans) == [
        (
            "django_proxysql.connection_lost",
            {
                "django_proxysql.balancer": "default",
                "django_proxysql.peer": "db1",
                "django_proxysql.idle": True,
                "server.address": "10.0.0.1",
                "server.port": 3306,
                "error.type": "lost",
                "exception.message": "gone",
            },
        ),
        (
            "django_proxysql.circuit_closed",
            {
                "django_proxysql.balancer": "default",
                "django_proxysql.peer": "db1",
                "django_proxysql.seconds": 3.0,
                "django_proxysql.elsewhere": False,
                "server.address": "/run/db.sock",
            },
        ),
    ]


@pytest.mark.parametrize("event", REPORTS)
def test_each_event_on_a_span_is_named_in_the_docs(event: type) -> None:
    page = Path(__file__).parents[1].joinpath("docs", "howto", "opentelemetry.rst").read_text()
    name = re.sub(r"(?<!^)(?=[A-Z])", "_", event.__name__).lower()
    assert f"``django_proxysql.{name}``" in page


SITE = """
import django
from django.conf import settings
settings.configure(
    INSTALLED_APPS=["django_proxysql", "django_proxysql.monitoring.opentelemetry"],
    DATABASES={{"default": {{
        "ENGINE": "django_proxysql.backends.proxysql", "PEER_ENGINE": "django.db.backends.sqlite3",
        "PEERS": [{{"NAME": {path!r}}}]}}}},
)
django.setup()
from django.db import connection
from opentelemetry.metrics import set_meter_provider
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
connection.cursor().execute("SELECT 1")
# The global provider may be set before or after.
reader = InMemoryMetricReader()
set_meter_provider(MeterProvider([reader]))
connection.close()
connection.cursor().execute("SELECT 1")
print("connection.create_time" in reader.get_metrics_data().to_json())
"""


def test_one_line_in_installed_apps_switches_it_on(tmp_path: Path) -> None:
    assert run_python(SITE.format(path=str(tmp_path / "db.sqlite3"))).stdout == "True\n"
