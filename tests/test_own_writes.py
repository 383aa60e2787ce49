"""A request reads what it wrote, whichever way it came to its next connection.

On Galera the next node is made to catch up. That it does so is tested on a cluster in
test_safety_rules.py; here each way is gone, and it is counted how often it would.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import closing, nullcontext
from typing import Any

import pytest
from django.db import Error, OperationalError, close_old_connections, transaction

from django_proxysql.core import ready
from tests.site import Site
from tests.work import Work


@pytest.fixture
def caught_up(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The connections that were made to catch up."""
    found: list[Any] = []
    monkeypatch.setattr(ready, "catch_up", found.append)
    return found


def past_the_engine(here: Site) -> None:
    """By what a driver's cursor has of its own."""
    with here.connection.cursor() as cursor, closing(cursor.connection.cursor()) as own:
        own.execute("INSERT INTO app_token (value) VALUES ('one')")


def many(here: Site) -> None:
    with here.connection.cursor() as cursor:
        cursor.executemany("INSERT INTO app_token (value) VALUES (%s)", [["one"], ["two"]])


def never_ends(here: Site) -> None:
    """No close_old_connections() has ended the request, however long it takes."""
    here.connection._ends_requests = False


STEPS: dict[str, Callable[[Site], object]] = {
    "write": lambda here: here.write("one"),
    "write-two": lambda here: here.write("two"),
    "read": Site.read,
    "read-more": lambda here: here.sql("SELECT COUNT(*), MAX(id) FROM app_token WHERE (id IN (1))"),
    "read-and-lock": lambda here: here.sql("SELECT value FROM app_token FOR UPDATE"),
    "explain-and-run": lambda here: here.sql("ANALYZE SELECT 1"),
    "function": lambda here: here.sql("SELECT VERSION(), app.pays(1)"),
    "lock": lambda here: here.sql("SELECT GET_LOCK('a', 0)"),
    "kill": Site.kill,
    "cut": lambda here: here.cut("after"),
    "was-replayed": lambda here: here.replayed() or pytest.fail("it was not"),
    "close": lambda here: here.connection.close(),
    "idle": lambda here: here.idle(0.1),
    "idle-for-long": lambda here: here.idle(100),
    "request-ends": lambda here: close_old_connections(),
    "retried": lambda here: Work(here).retrying(),
    **{do.__name__.replace("_", "-"): do for do in (past_the_engine, many, never_ends)},
}


def go(here: Site, way: str) -> None:
    """Go step by step. A block is in brackets, and "!" stands after what raises an error."""
    for block, step, raises in re.findall(r"(?:\(([^)]+)\)|([\w-]+))(!?)", way):
        with pytest.raises(Error) if raises else nullcontext():
            if block:
                with transaction.atomic(here.connection.alias):
                    go(here, block)
            else:
                STEPS[step](here)


@pytest.mark.parametrize(
    "way",
    [
        "write kill",
        "write kill (read)",
        "write cut read was-replayed",
        "write (read-and-lock kill read)!",
        "(write kill read)!",
        "(write cut)!",
        "cut write!",
        "(cut write was-replayed) kill",
        "cut many!",
        "write close",
        "write close read kill",
        "function! kill",
        "(function)! kill",
        "explain-and-run kill",
        "never-ends write idle-for-long read idle-for-long kill",
        "write lock kill idle write-two!",
        "retried",
        "past-the-engine kill",
    ],
)
def test_catches_up_on_every_way(on_mariadb: Site, caught_up: list[Any], way: str) -> None:
    close_old_connections()
    before = on_mariadb.connection.connection
    go(on_mariadb, way)
    on_mariadb.idle()
    on_mariadb.read()
    now = on_mariadb.connection.connection
    assert now is not before
    assert caught_up
    assert caught_up[-1] is now


@pytest.mark.parametrize(
    "way",
    [
        "read read-more kill",
        "write request-ends kill",
        "write close request-ends",
        "cut write! request-ends",
        "cut read was-replayed kill",
    ],
)
def test_does_not_wait_where_nothing_was_written(
    on_mariadb: Site, caught_up: list[Any], way: str
) -> None:
    close_old_connections()
    go(on_mariadb, way)
    on_mariadb.idle()
    on_mariadb.read()
    assert not caught_up


@pytest.mark.parametrize("way", ["idle", "in flight", "block"])
def test_a_node_that_cannot_catch_up_is_djangos_error(
    on_mariadb: Site, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """Never the driver's own; the peer is not judged by it, and the next statement goes on."""
    on_mariadb.write("one")

    def too_late(connection: Any) -> None:
        raise on_mariadb.connection.Database.OperationalError(1205, "Lock wait timeout exceeded")

    with monkeypatch.context() as patch:
        patch.setattr(ready, "catch_up", too_late)
        if way == "in flight":
            on_mariadb.cut("after")
        else:
            on_mariadb.kill()
        with pytest.raises(OperationalError):
            if way == "block":
                with transaction.atomic(on_mariadb.connection.alias):
                    on_mariadb.read()
            elif way == "idle":
                on_mariadb.write("two")
            else:
                on_mariadb.read()
    states = {peer.breaker.current_state for peer in on_mariadb.balancer.peers.values()}
    assert states == {"closed"}
    assert on_mariadb.read() == ["one"]
