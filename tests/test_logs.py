"""Every event's log record carries what structured logging wants of it."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any, get_args

import pytest

from django_proxysql import Fault, events, logs
from tests.fakes import raised_by
from tests.test_balancer import World

#: Values for every field that an event may have.
VALUES: dict[str, Any] = {
    "balancer": "shop",
    "peer": "db1",
    "address": "10.0.0.1:3306",
    "seconds": 1.5,
    "trial": True,
    "fault": Fault.REFUSED,
    "error": "(1045, 'Access denied')",
    "count": 1,
    "opened": True,
    "trial_in": 30.0,
    "idle": True,
    "successor": "db2",
    "forced": True,
    "connections": 3,
    "learnt": True,
}

#: The record's attribute for a field; the same name unless it is here.
NAMES = {"balancer": "alias", "seconds": "duration"}
WANTED = ("balancer", "peer", "address", "successor", "fault", "seconds")


@pytest.mark.parametrize("kind", get_args(events.Event), ids=lambda kind: str(kind.__name__))
def test_record(kind: Any, caplog: pytest.LogCaptureFixture, monkeypatch: Any) -> None:
    """One record an event, with everything that the event knows."""
    monkeypatch.setitem(logs._rescues, "last", float("-inf"))
    caplog.set_level(logging.DEBUG, "django_proxysql")
    fields = [field.name for field in dataclasses.fields(kind)]
    logs.log_event(kind(**{name: VALUES[name] for name in fields}))
    (record,) = caplog.records
    expected = {NAMES.get(name, name): VALUES[name] for name in WANTED if name in fields}
    if "fault" in expected:
        expected["fault"] = "refused"
    assert {name: vars(record)[name] for name in expected} == expected
    assert "alias" in expected
    others = {NAMES.get(name, name) for name in WANTED} - set(expected)
    assert others.isdisjoint(vars(record))


def test_no_fault_known(caplog: pytest.LogCaptureFixture) -> None:
    """A circuit that was opened by hand has none."""
    logs.log_event(events.CircuitOpened("shop", "db1", "", None, "", 30))
    assert vars(caplog.records[0])["fault"] is None


def test_search(caplog: pytest.LogCaptureFixture) -> None:
    """A connect() that found no peer says how long it looked."""
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


def test_listener_that_raises(caplog: pytest.LogCaptureFixture) -> None:
    """The complaint about a listener says whose it is."""
    world = World("db1", "db2")

    def broken(event: object) -> None:
        raise LookupError

    world.db.add_listener(broken)
    world.db.connect()
    assert vars(caplog.records[-1])["alias"] == "default"
