"""Every event's log record carries what structured logging wants of it."""

from __future__ import annotations

import dataclasses
import logging
from types import SimpleNamespace
from typing import Any

import pytest

from django_proxysql import Fault
from django_proxysql.core import events, logger, logs
from django_proxysql.core.trials import TrialWorker
from tests.fakes import Clock, event_kinds, raised_by
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
    "function": "shop.place",
    "run": 2,
    "forced": True,
    "connections": 3,
    "elsewhere": True,
    "outcome": "committed",
}

#: The record's attribute for a field; the same name unless it is here.
NAMES = {"balancer": "alias", "seconds": "duration"}
WANTED = ("balancer", "peer", "address", "successor", "fault", "seconds")


@pytest.mark.parametrize("kind", event_kinds(), ids=lambda kind: str(kind.__name__))
def test_record(kind: Any, caplog: pytest.LogCaptureFixture) -> None:
    """One record an event, with everything that the event knows."""
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


#: Every kind of line, as the event that it is written for; each has fixed words of its own.
LINES: dict[str, events.Event] = {
    "connected to db1": events.Connected("shop", "db1", "a", 0.1, trial=False),
    "connecting to db1 (a) failed (unreachable)": events.ConnectFailed(
        "shop", "db1", "a", 0.1, False, Fault.UNREACHABLE, "(2002)", 1, opened=True
    ),
    "connecting to db1 (a) failed (refused)": events.ConnectFailed(
        "shop", "db1", "a", 0.1, False, Fault.REFUSED, "(1045)", 1, opened=False
    ),
    "circuit of db1 (a) opened, first trial": events.CircuitOpened(
        "shop", "db1", "a", Fault.UNREACHABLE, "(2002)", 30
    ),
    "circuit of db1 (a) opened, another process found": events.CircuitOpened(
        "shop", "db1", "a", Fault.UNREACHABLE, "(2002)", 30, elsewhere=True
    ),
    "circuit of db1 (a) closed": events.CircuitClosed("shop", "db1", "a", 3.0),
    "circuit of db1 (a) closed, another process found": events.CircuitClosed(
        "shop", "db1", "a", 3.0, elsewhere=True
    ),
    "No peer of 'shop'": events.PeersExhausted("shop", "No peer of 'shop' can be reached.", 1.0),
    "a connection to db1 (a) is lost": events.ConnectionLost(
        "shop", "db1", "a", Fault.LOST, "(2013)", idle=False
    ),
    "replaced a lost connection": events.ConnectionReplaced("shop", "db1", "db2", True, "(2013)"),
    "left db1 for db2": events.ConnectionReplaced("shop", "db1", "db2", False, ""),
    "ran a statement again": events.StatementReplayed("shop", "db1", "db2", "(2013)"),
    "ran shop.place again from its beginning, run 2": events.BlockRetried(
        "shop", "shop.place", 2, "(1213)"
    ),
    "not answered and stands": events.CommitResolved(
        "shop", "db1", "a", "committed", 0.01, "(2013)"
    ),
    "not answered and was rolled back": events.CommitResolved(
        "shop", "db1", "a", "rolled_back", 0.01, "(2013)"
    ),
    "not answered and may stand or not": events.CommitResolved(
        "shop", "db1", "a", "unknown", 10.0, "(2013)"
    ),
    "db1 (a) is drained, 3": events.PeerDrained("shop", "db1", "a", 3),
    "db1 (a) is drained no longer": events.PeerUndrained("shop", "db1", "a"),
}


def test_no_event_is_without_a_line() -> None:
    assert {type(event) for event in LINES.values()} == set(event_kinds())


@pytest.mark.parametrize("second", LINES)
@pytest.mark.parametrize("first", LINES)
def test_no_kind_hides_another(first: str, second: str, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever was logged right before, a line of another kind is written."""
    caplog.set_level(logging.DEBUG, "django_proxysql")
    logs.log_event(LINES[first])
    logs.log_event(LINES[second])
    assert first in caplog.messages[0]
    if first == second:
        assert len(caplog.messages) in (1, 2)
    else:
        assert second in caplog.messages[1]


LIMITED = (
    "replaced a lost connection",
    "ran a statement again",
    "ran shop.place again from its beginning, run 2",
)


@pytest.mark.parametrize("words", LIMITED)
def test_limited_lines(
    words: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line a second of each alias and kind; the next one says how many were kept back."""
    clock = Clock(100.0)
    monkeypatch.setattr(logs, "time", SimpleNamespace(monotonic=clock))
    event = LINES[words]
    elsewhere = dataclasses.replace(event, balancer="reports")
    for _ in range(4):
        logs.log_event(event)
    logs.log_event(elsewhere)
    clock.advance(0.9)
    logs.log_event(event)
    clock.advance(0.1)
    logs.log_event(event)
    logs.log_event(event)
    clock.advance(1)
    logs.log_event(event)
    logs.log_event(elsewhere)
    assert [line.partition(" ")[0] for line in caplog.messages] == [
        "shop:",
        "reports:",
        "shop:",
        "shop:",
        "reports:",
    ]
    assert all(words in line for line in caplog.messages)
    assert ["more)" in line for line in caplog.messages] == [False, False, True, True, False]
    assert "(and 4 more): " in caplog.messages[2]
    assert "(and 1 more): " in caplog.messages[3]


def test_other_lines_have_no_limit(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "django_proxysql")
    for words, event in LINES.items():
        if words not in LIMITED:
            caplog.clear()
            logs.log_event(event)
            logs.log_event(event)
            assert len(caplog.messages) == 2


def test_complaints_of_the_trials_thread(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each kind of complaint of the thread that makes trials has its own limit."""
    clock = Clock()
    monkeypatch.setattr(logger, "time", SimpleNamespace(monotonic=clock))
    worker = TrialWorker()
    for _ in range(3):
        worker.complain("The trial of shop/db1 raised")
        worker.complain("The trial of shop/db2 raised")
    clock.advance(60)
    worker.complain("The trial of shop/db1 raised")
    assert caplog.messages == [
        "The trial of shop/db1 raised",
        "The trial of shop/db2 raised",
        "The trial of shop/db1 raised (and 2 times more)",
    ]
