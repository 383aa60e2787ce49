"""A request reads what it wrote, whichever way it came to its next connection.

On Galera the next node is made to catch up. That it does so is tested on a cluster in
test_safety_rules.py; here each way is gone, and it is counted how often it would.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from typing import Any

import pytest
from django.db import Error, OperationalError, close_old_connections, transaction

from django_proxysql import CommitOutcomeUnknown, retrying_atomic
from django_proxysql.core import ready
from tests.site import Site


@pytest.fixture
def caught_up(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The connections that were made to catch up."""
    found: list[Any] = []
    monkeypatch.setattr(ready, "catch_up", found.append)
    return found


def idle_loss(here: Site) -> None:
    here.write("one")
    here.kill()


def idle_loss_before_a_block(here: Site) -> None:
    here.write("one")
    here.kill()
    with transaction.atomic(here.connection.alias):
        here.read()


def replayed_read(here: Site) -> None:
    here.write("one")
    here.cut("after")
    here.read()
    assert here.replayed()


def lost_block(here: Site) -> None:
    here.write("one")
    with pytest.raises(Error), transaction.atomic(here.connection.alias):
        here.sql("SELECT value FROM app_token FOR UPDATE")
        here.kill()
        here.read()


def lost_block_that_wrote(here: Site) -> None:
    with pytest.raises(Error), transaction.atomic(here.connection.alias):
        here.write("one")
        here.kill()
        here.read()


def unknown_commit(here: Site) -> None:
    with pytest.raises(CommitOutcomeUnknown), transaction.atomic(here.connection.alias):
        here.write("one")
        here.cut("after")


def lost_write(here: Site) -> None:
    here.cut("after")
    with pytest.raises(OperationalError):
        here.write("one")


def lost_write_of_many(here: Site) -> None:
    here.cut("after")
    with pytest.raises(OperationalError), here.connection.cursor() as cursor:
        cursor.executemany("INSERT INTO app_token (value) VALUES (%s)", [["one"], ["two"]])


def closed_by_the_application(here: Site) -> None:
    here.write("one")
    here.connection.close()


def closed_and_lost_again(here: Site) -> None:
    here.write("one")
    here.connection.close()
    here.read()
    here.kill()


def function_that_may_write(here: Site) -> None:
    with pytest.raises(Error):
        here.sql("SELECT app.pays(1)")
    here.kill()


def function_in_a_block(here: Site) -> None:
    with pytest.raises(Error), transaction.atomic(here.connection.alias):
        here.sql("SELECT VERSION(), app.pays(1)")
    here.kill()


def past_the_engine(here: Site) -> None:
    """By what a driver's cursor has of its own."""
    with here.connection.cursor() as cursor, closing(cursor.connection.cursor()) as own:
        own.execute("INSERT INTO app_token (value) VALUES ('one')")
    here.kill()


def explained_and_run(here: Site) -> None:
    here.sql("ANALYZE SELECT 1")
    here.kill()


def idle_for_long(here: Site) -> None:
    """No close_old_connections() has ended the request, however long it takes."""
    here.connection._ends_requests = False
    here.write("one")
    here.idle(100)
    here.read()
    here.idle(100)
    here.kill()


def unannounced_lock(here: Site) -> None:
    here.write("one")
    here.sql("SELECT GET_LOCK('a', 0)")
    here.kill()
    here.idle(0.1)
    with pytest.raises(OperationalError):
        here.write("two")


def retried(here: Site) -> None:
    attempts = []

    @retrying_atomic(using=here.connection.alias)
    def work() -> None:
        attempts.append(1)
        here.write("one")
        if len(attempts) == 1:
            here.kill()
        here.read()

    work()
    assert len(attempts) == 2


WAYS = [
    *(idle_loss, idle_loss_before_a_block, replayed_read, lost_block, lost_block_that_wrote),
    *(unknown_commit, lost_write, lost_write_of_many, closed_by_the_application),
    *(closed_and_lost_again, function_that_may_write, function_in_a_block, explained_and_run),
    *(idle_for_long, unannounced_lock, retried, past_the_engine),
]


def only_read(here: Site) -> None:
    here.read()
    here.sql("SELECT COUNT(*), COALESCE(MAX(id), 0) FROM app_token WHERE (id IN (1, 2))")
    here.kill()


def wrote_in_an_earlier_request(here: Site) -> None:
    here.write("one")
    close_old_connections()
    here.kill()


def closed_in_an_earlier_request(here: Site) -> None:
    here.write("one")
    here.connection.close()
    close_old_connections()


def lost_in_an_earlier_request(here: Site) -> None:
    lost_write(here)
    close_old_connections()


OTHERS = [
    *(only_read, wrote_in_an_earlier_request, closed_in_an_earlier_request),
    lost_in_an_earlier_request,
]


@pytest.mark.parametrize("way", WAYS)
def test_catches_up_on_every_way(
    on_mariadb: Site, caught_up: list[Any], way: Callable[[Site], None]
) -> None:
    close_old_connections()
    before = on_mariadb.connection.connection
    way(on_mariadb)
    on_mariadb.idle()
    on_mariadb.read()
    now = on_mariadb.connection.connection
    assert now is not before
    assert caught_up
    assert caught_up[-1] is now


@pytest.mark.parametrize("way", OTHERS)
def test_does_not_wait_where_nothing_was_written(
    on_mariadb: Site, caught_up: list[Any], way: Callable[[Site], None]
) -> None:
    close_old_connections()
    way(on_mariadb)
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
