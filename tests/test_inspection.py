"""What each kind of peer is found to be when it is asked, past the circuits."""

from __future__ import annotations

import _thread
import contextlib
import gc
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import django
import pytest
from django.db import connections

from django_proxysql import Fault, NotReady, balancers
from django_proxysql.inspection import Inspection, inspect, rows_or_none
from tests.engine import MYSQL, POSTGRESQL, SQLITE, engine, mysql_peer, postgres_peer, sqlite_peer
from tests.fakes import raised_by, running
from tests.servers import PASSWORD
from tests.servers.faultproxy import FaultProxy
from tests.servers.galera import GaleraCluster
from tests.servers.mariadb import Node
from tests.servers.postgresql import PostgreSQLNode
from tests.servers.scripted import ProxySQL, Rows, ScriptedServer

#: What the READY_CHECK below does with the driver's connection.
checks: list[Callable[[Any], object]] = []


def check(connection: Any) -> None:
    for each in checks:
        each(connection)


@pytest.fixture
def checking() -> Iterator[list[Callable[[Any], object]]]:
    """What is put into this list is the READY_CHECK of balancers with ``READY_CHECK=CHECK``."""
    yield checks
    checks.clear()


CHECK = f"{__name__}.check"


def found(**options: Any) -> list[Inspection]:
    """Ask the peers of the one balancer that is there."""
    return list(inspect(["balanced"], **options)["balanced"])


def rows_of(connection: Any, statement: str) -> Any:
    with contextlib.closing(connection.cursor()) as cursor:
        cursor.execute(statement)
        return cursor.fetchall()


def inspecting_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if "inspects" in thread.name]


# Each kind of server


def test_wrong_password_is_said_and_not_shown(mariadb: Node) -> None:
    with engine([mysql_peer(mariadb, PASSWORD="not-the-one")]):
        (one,) = found()
    assert not one.reachable
    assert one.fault is Fault.REFUSED
    assert "Access denied" in one.error
    assert "not-the-one" not in repr(one)


def test_changes_nothing(mariadb_pair: tuple[Node, Node]) -> None:
    """The circuits know as much as before, and no connection of the application's is touched."""
    mariadb_pair[1].kill()
    with engine([mysql_peer(node) for node in mariadb_pair]) as connection:
        events: list[Any] = []
        balancers.add_listener(events.append)
        try:
            before = balancers["balanced"].snapshot()
            found()
            assert balancers["balanced"].snapshot() == before
            assert connection.connection is None
            assert events == []
        finally:
            balancers.remove_listener(events.append)


def test_read_only_server_is_ready_unless_a_setting_asks_for_a_writer(mariadb: Node) -> None:
    mariadb.set_global("read_only", "ON")
    with engine([mysql_peer(mariadb)]):
        (one,) = found()
        assert (one.ready, one.notes) == (True, ("read-only",))
    with engine([mysql_peer(mariadb)], READY_CHECK="writable"):
        (one,) = found()
        assert (one.reachable, one.ready, one.notes) == (True, False, ("read-only",))
        assert one.error == "@@global.read_only is 1"
        assert one.fault is Fault.NOT_READY


def test_galera(galera: GaleraCluster) -> None:
    """A node that was cut off lets us in; only its own status tells, READY_CHECK or not."""
    first, second, third = galera.nodes
    galera.isolate(third)
    with engine([mysql_peer(node) for node in (first, second, third)]):
        *members, outsider = found()
    assert [(one.ready, one.notes) for one in members] == [(True, ("Galera: Synced",))] * 2
    assert (outsider.reachable, outsider.ready) == (True, False)
    assert outsider.version.startswith("MariaDB 1")
    assert outsider.notes[0].startswith("Galera: ")
    assert outsider.error == "wsrep_ready is OFF"


def test_postgresql(postgres_pair: tuple[PostgreSQLNode, PostgreSQLNode]) -> None:
    """A server, and one that is read-only by default."""
    postgres_pair[1].set_global("default_transaction_read_only = on")
    with engine([postgres_peer(node) for node in postgres_pair], PEER_ENGINE=POSTGRESQL):
        writer, reader = found()
    assert (writer.ready, writer.notes) == (True, ())
    assert writer.version.startswith("PostgreSQL 1")
    assert (reader.ready, reader.notes) == (True, ("read-only",))


@pytest.mark.skipif(django.VERSION < (5, 1), reason="pools came with Django 5.1")
def test_pool(postgres: PostgreSQLNode) -> None:
    """A peer that has a pool is asked past it: what is in a pool may date from better days."""
    pool = {"min_size": 1, "max_size": 1}
    peers = [postgres_peer(postgres, OPTIONS={"pool": pool})]
    with engine(peers, PEER_ENGINE=POSTGRESQL, CONN_MAX_AGE=0) as connection:
        connection.ensure_connection()
        # The pool's only connection is in use.
        (one,) = found(timeout=20)
        assert one.ready
        connection.close()
        postgres.kill()
        (one,) = found(timeout=20)
        assert not one.reachable


def test_refused_question_is_left_out_and_the_next_are_asked(postgres: PostgreSQLNode) -> None:
    real = {"SHOW server_version": "SELECT no_such_function()"}

    def asked(connection: Any, statement: str) -> Any:
        return rows_or_none(connection, real.get(statement, statement))

    postgres.set_global("default_transaction_read_only = on")
    with (
        engine([postgres_peer(postgres)], PEER_ENGINE=POSTGRESQL),
        mock.patch("django_proxysql.inspection.rows_or_none", asked),
    ):
        (one,) = found()
    assert (one.ready, one.version, one.notes) == (True, "", ("read-only",))


# Django's engine does not close what fails in its first PRAGMA, as newer versions of SQLite do.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_sqlite(tmp_path: Path) -> None:
    """A file, a file that is no database, and one that cannot be there."""
    (tmp_path / "foreign").write_text("not a database at all, but long enough to have a header" * 9)
    names = ["good", "foreign", "nowhere/at/all"]
    with engine([sqlite_peer(tmp_path / name) for name in names], PEER_ENGINE=SQLITE):
        good, foreign, missing = found()
    assert (good.ready, good.error) == (True, "")
    assert good.version.startswith("SQLite 3.")
    # (Some versions of SQLite look into a file as they connect, and some later.)
    assert (foreign.ready, foreign.error) == (False, "file is not a database")
    assert (missing.reachable, missing.fault) == (False, Fault.UNREACHABLE)
    gc.collect()


# Proxies: tests/test_proxies.py has the present ones


class OldMaxScale(ScriptedServer):
    """Has a variable of its own."""

    def answer(self, client: Any, statement: str) -> Any:
        if statement == "SELECT @@maxscale_version":
            return Rows(["@@maxscale_version"], [["23.08.5"]])
        return super().answer(client, statement)


@pytest.mark.parametrize(
    ("kind", "greeting"),
    [(ScriptedServer, "5.5.5-10.2.12 2.5.21-maxscale"), (OldMaxScale, "11.4.2-MariaDB-log")],
)
def test_maxscale(kind: type[ScriptedServer], greeting: str) -> None:
    """MaxScale names itself in its greeting; where that is switched off, by a variable."""
    with kind(greeting) as proxy, engine([mysql_peer(proxy)]):
        (one,) = found()
    assert (one.ready, one.notes) == (True, ("MaxScale",))


@pytest.mark.parametrize("gone", ["reader", "writer"])
def test_proxy_without_a_server_has_no_latency_and_says_why(gone: str) -> None:
    """It lets us in all the same."""
    with ProxySQL() as proxy, engine([mysql_peer(proxy)]):
        setattr(proxy, gone, None)
        (one,) = found()
    assert (one.reachable, one.fault) == (True, Fault.NOT_READY)
    assert (one.latency is None) is (gone == "reader")
    assert "while reaching hostgroup" in one.error


# READY_CHECK, time


def refuses(connection: Any) -> None:
    raise NotReady(f"number {rows_of(connection, 'SELECT 42')[0][0]}: not today")


@pytest.mark.parametrize(
    ("does", "error", "fault"),
    [
        (refuses, "number 42: not today", Fault.NOT_READY),
        (lambda connection: 1 / 0, "division by zero", Fault.OTHER),
        (lambda connection: sys.exit("not here"), "not here", Fault.OTHER),
    ],
    ids=["refuses", "breaks", "exits"],
)
def test_ready_check_of_ones_own_has_a_say(
    mariadb: Node,
    checking: list[Callable[[Any], object]],
    does: Callable[[Any], object],
    error: str,
    fault: Fault,
) -> None:
    """One that breaks or exits is one peer's line, and is not taken for a peer that is silent."""
    checking.append(does)
    with engine([mysql_peer(mariadb)], READY_CHECK=CHECK):
        (one,) = found()
    assert (one.reachable, one.ready) == (True, False)
    assert (one.error, one.fault) == (error, fault)


def test_an_interrupt_that_ends_no_wait_is_heeded(
    tmp_path: Path, checking: list[Callable[[Any], object]]
) -> None:
    """A signal that comes right before a wait for a lock leaves it waiting, as this one does."""
    asked, heeded, released = threading.Event(), threading.Event(), threading.Event()
    was_heeded: list[bool] = []

    def hang(_connection: Any) -> None:
        asked.set()
        assert released.wait(60)

    def interrupt() -> None:
        assert asked.wait(60)
        _thread.interrupt_main()
        was_heeded.append(heeded.wait(15))
        released.set()

    checking.append(hang)
    peers = [sqlite_peer(tmp_path / "a")]
    with engine(peers, PEER_ENGINE=SQLITE, READY_CHECK=CHECK), running(interrupt):
        try:
            assert isinstance(raised_by(lambda: found(timeout=120)), KeyboardInterrupt)
        finally:
            heeded.set()
    assert was_heeded == [True]


ENGINES = {"mariadb": MYSQL, "postgres": POSTGRESQL}


@pytest.mark.parametrize("kind", ENGINES)
def test_hangs_while_connecting(
    kind: str, request: pytest.FixtureRequest, fault_proxy: Callable[..., FaultProxy]
) -> None:
    """A peer that accepts and says nothing costs its time-out, and the others nothing."""
    server = request.getfixturevalue(kind)
    silent = fault_proxy(server)
    silent.accept_and_hang()
    with engine([mysql_peer(silent), mysql_peer(server)], PEER_ENGINE=ENGINES[kind]):
        hung, well = found(timeout=3)
    assert (hung.reachable, hung.fault) == (False, Fault.UNREACHABLE)
    assert well.ready


@pytest.mark.parametrize("kind", ENGINES)
def test_freezes_afterwards(
    kind: str,
    request: pytest.FixtureRequest,
    fault_proxy: Callable[..., FaultProxy],
    checking: list[Callable[[Any], object]],
) -> None:
    """A peer that freezes after it has let us in is given up in time, and its thread ends."""
    proxy = fault_proxy(request.getfixturevalue(kind))

    def freeze(connection: Any) -> None:
        proxy.freeze()
        rows_of(connection, "SELECT 42")

    checking.append(freeze)
    with engine([mysql_peer(proxy)], READY_CHECK=CHECK, PEER_ENGINE=ENGINES[kind]):
        (one,) = found(timeout=2)
    assert (one.reachable, one.ready) == (True, False)
    assert one.latency is not None
    assert one.error.startswith("(2013, " if kind == "mariadb" else "no answer within 2 s")
    for thread in inspecting_threads():
        thread.join(60)
        assert not thread.is_alive()


def test_callable_password_that_fails_is_its_peers_line(mariadb: Node) -> None:
    def broken() -> str:
        raise RuntimeError("the token service is away")

    peers = [mysql_peer(mariadb, PASSWORD=lambda: PASSWORD), mysql_peer(mariadb, PASSWORD=broken)]
    with engine(peers):
        called, failed = found()
    assert called.ready
    assert (failed.reachable, failed.fault) == (False, Fault.LOCAL)
    assert failed.error == "the token service is away"


def test_as_the_settings_are_now(mariadb: Node, checking: list[Callable[[Any], object]]) -> None:
    """Like any connection, it goes to the test runner's database, not to production's."""
    seen: list[Any] = []
    checking.append(lambda connection: seen.extend(rows_of(connection, "SELECT DATABASE()")))
    mariadb.create_database("test_app")
    try:
        with engine([mysql_peer(mariadb)], READY_CHECK=CHECK):
            balancers["balanced"]
            connections["balanced"].settings_dict["NAME"] = "test_app"
            found()
            assert seen == [("test_app",)]
    finally:
        mariadb.sql("DROP DATABASE test_app")


def test_unknown_alias_is_the_callers_mistake() -> None:
    with pytest.raises(KeyError):
        inspect(["nonesuch"])


def test_peers_that_are_aliases_are_asked(mariadb_pair: tuple[Node, Node]) -> None:
    mariadb_pair[1].kill()
    databases = {
        f"shop{n}": {"ENGINE": MYSQL, **mysql_peer(node)} for n, node in enumerate(mariadb_pair)
    }
    with engine(list(databases), databases=databases):
        alive, dead = found()
    assert (alive.peer, alive.ready, alive.error, alive.fault) == ("shop0", True, "", None)
    assert (dead.peer, dead.reachable, dead.fault) == ("shop1", False, Fault.UNREACHABLE)
