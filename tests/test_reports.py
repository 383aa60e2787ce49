"""One table says what each event becomes, and the docs name all of it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from django.dispatch import Signal

from django_proxysql import signals
from django_proxysql.core import logs
from django_proxysql.core.reports import REPORTS, Count, Line, Report
from tests.fakes import event_kinds
from tests.test_logs import VALUES

DOCS = Path(__file__).parent.parent / "docs"
ROWS = list(REPORTS.values())
LINES = [(row, line) for row in ROWS for line in row.lines]
COUNTS = [(row, count) for row in ROWS for count in row.counts]


def page(name: str) -> str:
    """Return a page of the docs with single spaces."""
    return " ".join((DOCS / name).read_text(encoding="utf-8").split())


def fields(row: Report) -> list[str]:
    return [field.name for field in dataclasses.fields(row.event)]


def made(row: Report, **given: Any) -> Any:
    """Return an event of the row's class."""
    return row.event(**{name: VALUES[name] for name in fields(row)} | given)


def written(line: Line) -> str:
    """Return a line as the docs write it: each value as the name of it in capitals."""
    text = line.text.replace("%(because)s", ": %(error)s").replace("%(more)s", "")
    return re.sub(r"%\((\w+)\)[.\d]*[sf]", lambda match: str(match[1]).upper(), text)


def test_every_event_has_its_row() -> None:
    assert set(REPORTS) == set(event_kinds())
    assert all(event is row.event for event, row in REPORTS.items())


@pytest.mark.parametrize(("row", "line"), LINES, ids=lambda one: getattr(one, "text", ""))
def test_a_line_names_only_what_its_event_has(row: Report, line: Line) -> None:
    assert line.text % logs._values(made(row), kept_back=2)
    limited_by = line.limited.per if line.limited else ()
    assert set(line.when) | set(limited_by) <= set(fields(row))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.event.__name__)
def test_an_events_last_line_fits_whenever_no_other_does(row: Report) -> None:
    last = row.lines[-1]
    earlier = [line.when for line in row.lines[:-1]]
    assert last.when == {} or last.when in [
        {name: not value for name, value in when.items()} for when in earlier
    ]


@pytest.mark.parametrize(("row", "count"), COUNTS, ids=lambda one: getattr(one, "telemetry", ""))
def test_a_count_reads_only_what_its_event_has(row: Report, count: Count) -> None:
    event = made(row)
    assert len(count.label_of(event)) == bool(count.label)
    assert count.label_of(event) in count.labels()
    assert {*count.when, *count.attributes} <= set(fields(row))
    assert not count.is_duration or "seconds" in fields(row)


def test_each_signal_is_in_the_signals_module_and_has_one_event() -> None:
    names = [row.signal for row in ROWS if row.signal]
    assert sorted(names) == sorted(set(names)) == sorted(signals.__all__)
    assert all(isinstance(getattr(signals, name), Signal) for name in names)


def missing() -> Iterator[str]:
    """Yield what the docs leave out."""
    pages = {name: page(f"reference/{name}.rst") for name in ("events", "signals", "logging")}
    prometheus, telemetry = page("howto/prometheus.rst"), page("howto/opentelemetry.rst")
    for row in ROWS:
        if f"autoclass:: django_proxysql.core.events.{row.event.__name__}" not in pages["events"]:
            yield f"events.rst: {row.event.__name__}"
        if row.signal and f"``{row.signal}``" not in pages["signals"]:
            yield f"signals.rst: {row.signal}"
        for line in row.lines:
            if f"``{written(line)}``" not in pages["logging"]:
                yield f"logging.rst: {written(line)}"
        for count in row.counts:
            if f"``{count.name}" not in prometheus:
                yield f"prometheus.rst: {count.name}"
            if count.telemetry and f"``{count.telemetry}``" not in telemetry:
                yield f"opentelemetry.rst: {count.telemetry}"


def test_the_docs_name_every_event_signal_line_and_metric() -> None:
    assert list(missing()) == []
