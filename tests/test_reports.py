"""One table says what each event becomes, the docs name all of it, and the log writes it."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from django.dispatch import Signal

from django_proxysql import Fault, signals
from django_proxysql.core import events, logger, logs
from django_proxysql.core.reports import REPORTS, Count, Line, Report, fits
from tests.fakes import Clock, event_kinds, raised_by
from tests.test_balancer import World

DOCS = Path(__file__).parent.parent / "docs"
ROWS = list(REPORTS.values())
LINES = [(row, line) for row in ROWS for line in row.lines]
COUNTS = [(row, count) for row in ROWS for count in row.counts]

#: Values for every field that an event may have; an event's last line is written for them.
VALUES: dict[str, Any] = {
    "balancer": "shop",
    "peer": "db1",
    "address": "10.0.0.1:3306",
    "seconds": 1.5,
    "trial": False,
    "fault": Fault.UNREACHABLE,
    "error": "(2002)",
    "count": 1,
    "opened": True,
    "trial_in": 30.0,
    "idle": False,
    "successor": "db2",
    "function": "shop.place",
    "run": 2,
    "forced": False,
    "connections": 3,
    "elsewhere": False,
    "outcome": "unknown",
}


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
def test_every_event_has_a_line_that_fits(row: Report) -> None:
    values: dict[str, set[Any]] = {}
    for line in row.lines:
        for name, value in line.when.items():
            values.setdefault(name, {VALUES[name]}).add(value)
    for given in itertools.product(*values.values()):
        event = made(row, **dict(zip(values, given)))
        assert any(fits(event, line.when) for line in row.lines), given


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


# The log


def of_line(row: Report, line: Line, **given: Any) -> tuple[Any, str]:
    """Return an event that a line is written for, and the line."""
    event = made(row, **line.when, **given)
    return event, line.text % logs._values(event, kept_back=0)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.event.__name__)
def test_a_record_has_what_structured_logging_wants(
    row: Report, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "django_proxysql")
    logs.log_event(made(row))
    (record,) = caplog.records
    names = {"balancer": "alias", "seconds": "duration"}
    names.update((name, name) for name in ("peer", "address", "successor", "fault"))
    wanted = {names[name]: VALUES[name] for name in names if name in fields(row)}
    if "fault" in wanted:
        wanted["fault"] = "unreachable"
    assert {name: vars(record)[name] for name in names.values() if name in vars(record)} == wanted


def test_circuit_opened_by_hand_has_no_fault(caplog: pytest.LogCaptureFixture) -> None:
    logs.log_event(events.CircuitOpened("shop", "db1", "", None, "", 30))
    assert vars(caplog.records[0])["fault"] is None


def test_exhaustion_says_how_long_it_looked(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "django_proxysql")
    world = World("db1", "db2")

    def slow() -> Any:
        world.clock.advance(2)
        raise ConnectionRefusedError(111, "Connection refused")

    world.driver.down.update(db1=slow, db2=slow)
    assert raised_by(world.db.connect) is not None
    record = caplog.records[-1]
    assert record.getMessage().startswith("No peer of 'default'")
    assert (vars(record)["alias"], vars(record)["duration"]) == ("default", 4)


def test_complaint_about_a_listener_says_whose_it_is(caplog: pytest.LogCaptureFixture) -> None:
    world = World("db1", "db2")

    def broken(event: object) -> None:
        raise LookupError

    world.db.add_listener(broken)
    world.db.connect()
    assert vars(caplog.records[-1])["alias"] == "default"


def test_no_line_hides_another(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever was logged right before, a line of another kind is written."""
    caplog.set_level(logging.DEBUG, "django_proxysql")
    for first, second in itertools.permutations(LINES, 2):
        monkeypatch.setattr(logs, "_limits", {})
        caplog.clear()
        pair = [of_line(*first), of_line(*second)]
        for event, _ in pair:
            logs.log_event(event)
        assert caplog.messages == [text for _, text in pair]


def test_only_lines_with_a_limit_are_kept_back(caplog: pytest.LogCaptureFixture) -> None:
    """One that is, is written at the level of the next that fits, if there is one."""
    caplog.set_level(logging.DEBUG, "django_proxysql")
    for row, line in LINES:
        caplog.clear()
        event, _ = of_line(row, line)
        for _ in range(2):
            logs.log_event(event)
        levels = [record.levelno for record in caplog.records]
        assert levels.count(line.level) == (1 if line.limited else 2), line


@pytest.mark.parametrize(
    ("row", "line"),
    [(row, line) for row, line in LINES if line.limited and line.limited.seconds == 1],
    ids=lambda one: getattr(one, "text", ""),
)
def test_limited_lines(
    row: Report, line: Line, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line a second of each alias and kind; the next one says how many were kept back."""
    clock = Clock(100.0)
    monkeypatch.setattr(logs, "time", SimpleNamespace(monotonic=clock))
    (event, text), (elsewhere, other) = of_line(row, line), of_line(row, line, balancer="reports")
    for error in ("(2002)", "(2006)", "(2013)", "(2055)"):
        logs.log_event(dataclasses.replace(event, error=error))
    logs.log_event(elsewhere)
    for seconds in (0.9, 0.1, 0, 1):
        clock.advance(seconds)
        logs.log_event(event)
    logs.log_event(elsewhere)
    more = [text.replace(": (2002)", f" (and {count} more): (2002)") for count in (4, 1)]
    assert caplog.messages == [text, other, *more, other]


def test_another_error_on_this_side_is_written_at_once(caplog: pytest.LogCaptureFixture) -> None:
    """The same one, apart from its numbers, once a minute."""
    row = REPORTS[events.ConnectFailed]
    for error in ("request 1 failed", "request 2 failed", "no such file"):
        logs.log_event(made(row, fault=Fault.LOCAL, error=error))
    assert [message.rpartition(": ")[2] for message in caplog.messages] == [
        "request 1 failed",
        "no such file",
    ]


def test_complaints_of_a_thread(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each kind of complaint has its own limit."""
    clock = Clock()
    monkeypatch.setattr(logger, "time", SimpleNamespace(monotonic=clock))
    complain = logger.Complaints()
    for _ in range(3):
        complain("The trial of shop/db1 raised")
        complain("The trial of shop/db2 raised")
    clock.advance(60)
    complain("The trial of shop/db1 raised")
    assert caplog.messages == [
        "The trial of shop/db1 raised",
        "The trial of shop/db2 raised",
        "The trial of shop/db1 raised (and 2 times more)",
    ]
