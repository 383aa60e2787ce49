"""Settings that bound what is run again, and what is said of it."""

from __future__ import annotations

import functools
import logging
import os
import re
import threading
from types import SimpleNamespace
from typing import Any

import pytest
from django.db import OperationalError, connections, transaction
from django.db.backends.signals import connection_created

from django_proxysql.core import logs
from tests.engine import engine, mysql_peer
from tests.fakes import running
from tests.other_driver import run_again
from tests.servers import PASSWORD
from tests.site import Site, site, with_table
from tests.stories import tell, told

SYNCHRONOUS, LAGGING = {"SYNCHRONOUS_PEERS": True}, {"SYNCHRONOUS_PEERS": False}

STORIES = {
    # What is found before sending is still replaced.
    "nothing is run again with REPLAY None": (
        "mariadb: read; cut before; !read; read; kill; write one; kill_idle; read one; replayed 0",
        {"REPLAY": None},
    ),
    "no look precedes a read with IDLE_CHECK None, however long the connection idled": (
        "mariadb: write one; kill; idle 1000; !read; read; kill; write two; written one two",
        {"IDLE_CHECK": None, "REPLAY": None},
    ),
    "read that is run again leaves nothing read only, and no transaction open": (
        "all: write one; CUT; read one; write two; written one two; replayed 1"
    ),
    "IDLE_CHECK says when a look precedes a read": (
        "mariadb: read; idle 11; kill; read; kill; idle 9; !read",
        {"IDLE_CHECK": 10, "REPLAY": None},
    ),
    # Where peers may lag, no read is run again elsewhere after a write of the same request.
    **{
        f"read after the request's write: {first}, {settings}": (
            f"mariadb: request_ends; write one; {first}; request_ends; read; {second}",
            settings,
        )
        for first, second, settings in (
            ("cut after; read one", "cut after; read one", SYNCHRONOUS),
            ("{ cut after; read one }", "{ cut after; read one }", SYNCHRONOUS),
            ("cut after; !read one", "cut after; read one", LAGGING),
            ("!{ cut after; read one }", "{ cut after; read one }", LAGGING),
        )
    },
}


@told(STORIES)
def test_story(request: Any, server: str, settings: dict[str, Any], text: str) -> None:
    tell(request, server, settings, text)


#: What another driver of the server's makes of the same.
OTHER_DRIVERS = {
    # PyMySQL has no public fileno(): no look is taken, and what is provable is run again.
    "without looks": "mariadb: SELECT 1; kill; SELECT 42; replayed 1; kill; !write one; write two",
    "with looks": (
        "postgres: kill; write one; kill; read one; "
        "!{ SELECT 1; kill; SELECT 2; SELECT value FROM app_token FOR UPDATE; kill; SELECT 3 }; "
        "replayed 2; write two; written one two"
    ),
}


@pytest.mark.skipif("TEST_DRIVER" not in os.environ, reason="of other drivers")
@told(OTHER_DRIVERS)
def test_other_driver(request: Any, server: str, settings: dict[str, Any], text: str) -> None:
    tell(request, server, settings, text)


@pytest.mark.server
@pytest.mark.parametrize(
    ("driver", "servers"), [("pymysql", "mariadb_pair"), ("psycopg2", "postgres_pair")]
)
def test_lost_statements_with(driver: str, servers: str, request: pytest.FixtureRequest) -> None:
    pytest.importorskip(driver)
    run_again(f"{__file__}::test_other_driver", driver, request, servers)


class TestDrivers:
    def test_unix_socket(self, mariadb: Any) -> None:
        """Looked at as any other socket is."""
        peer = {**mysql_peer(mariadb), "HOST": str(mariadb.socket), "PORT": ""}
        with engine([peer], CONN_MAX_AGE=None) as connection:
            with_table(connection)
            kill(mariadb, connection.connection.thread_id())
            with connection.cursor() as cursor:
                cursor.execute("INSERT INTO app_token (value) VALUES ('one')")
                cursor.execute("SELECT value FROM app_token")
                assert cursor.fetchall() == (("one",),)

    def test_multiple_results(self, mariadb: Any, fault_proxy: Any) -> None:
        """While results are unread the socket is rightly readable, and not to be pinged."""
        with site(mariadb, fault_proxy) as here:
            with here.connection.cursor() as cursor:
                cursor.execute("SELECT 1; SELECT 2")
                here.idle()
                before = here.connection.connection
                assert cursor.fetchall() == ((1,),)
                assert cursor.nextset()
                assert cursor.fetchall() == ((2,),)
                assert not cursor.nextset()
            here.idle()
            here.sql("SELECT 3")
            assert here.connection.connection is before


def kill(server: Any, thread: int) -> None:
    server.sql(f"KILL {thread}")


class TestSaid:
    def test_log(
        self, here: Site, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Each rescue is counted, and told at WARNING, one line a second of each kind."""
        monkeypatch.setattr(logs, "time", SimpleNamespace(monotonic=here.clock))
        caplog.set_level(logging.WARNING, "django_proxysql")
        here.read()
        for _ in range(3):
            here.cut("after")
            here.read()
            here.sql("SELECT 1")
        rescues = [r for r in caplog.records if r.levelno == logging.WARNING]
        assert len(here.replayed()) == 3
        assert len(rescues) == 2
        here.idle(2)
        here.cut("after")
        here.read()
        lines = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
        assert len(lines) == 4
        assert re.match("balanced: replaced a lost connection, from peer[01] to peer[01]", lines[0])
        assert re.match("balanced: ran a statement again, from peer[01] to peer[01]", lines[1])
        for line in lines[2:]:
            kept_back = 2 if "ran a statement again" in line else 3
            assert f"(and {kept_back} more)" in line or f"(and {kept_back - 1} more)" in line
        assert PASSWORD not in "".join(lines)

    def test_error_is_djangos(self, here: Site) -> None:
        """What is raised is what Django would raise, with the driver's error as its cause."""
        here.read()
        here.cut("after")
        with pytest.raises(OperationalError) as caught:
            here.write("one")
        assert type(caught.value) is OperationalError
        assert isinstance(caught.value.__cause__, here.connection.Database.OperationalError)
        assert caught.value.args == caught.value.__cause__.args


class TestBudget:
    def test_a_statement_that_is_lost_again(self, here: Site) -> None:
        """A statement that kills what it runs on is not handed from peer to peer."""
        here.sql("SELECT 1")
        first, second = here.here, next(p for p in here.proxies if p is not here.here)
        first.cut_after()
        arm_at_connect(here, second)
        with pytest.raises(OperationalError):
            here.sql("SELECT 42")
        assert first.cuts == second.cuts == 1
        assert len(here.replayed()) == 1
        # The same text has no other try for a minute; others have.
        here.sql("SELECT 1")
        here.cut("after")
        with pytest.raises(OperationalError):
            here.sql("SELECT 42")
        here.sql("SELECT 1")
        here.cut("after")
        assert here.sql("SELECT 43") == [(43,)]
        here.idle(61)
        here.sql("SELECT 1")
        here.cut("after")
        assert here.sql("SELECT 42") == [(42,)]

    def test_at_most_so_many(self, here: Site) -> None:
        replays = 0
        for number in range(15):
            here.sql("SELECT 1")
            here.cut("after")
            try:
                here.sql(f"SELECT {number}")
                replays += 1
            except OperationalError:
                pass
        assert replays == 10
        here.idle(61)
        here.sql("SELECT 1")
        here.cut("after")
        here.sql("SELECT 99")


def arm_at_connect(here: Site, proxy: Any) -> None:
    """Cut the first statement on the next connection: after all that connecting sends."""

    def armed(connection: Any, **_: Any) -> None:
        if connection is here.connection and here.here is proxy:
            connection_created.disconnect(armed)
            proxy.cut_after()

    connection_created.connect(armed, weak=False)


class TestThreads:
    def test_each_has_its_own(self, here: Site) -> None:
        """Eight threads whose connections are all cut at once lose nothing."""
        alias = here.connection.alias
        ready, go = threading.Barrier(9), threading.Event()

        def work(number: int) -> None:
            wrapper = connections[alias]
            try:
                with wrapper.cursor() as cursor:
                    cursor.execute("SELECT 1")
                    ready.wait(60)
                    assert go.wait(60)
                    cursor.execute("INSERT INTO app_token (value) VALUES (%s)", [f"a{number}"])
                    with transaction.atomic(alias):
                        cursor.execute("INSERT INTO app_token (value) VALUES (%s)", [f"b{number}"])
            finally:
                wrapper.close()

        with running(*[functools.partial(work, number) for number in range(8)]):
            ready.wait(60)
            for proxy in here.proxies:
                proxy.drop_connections()
            go.set()
        assert len(here.written()) == 16
