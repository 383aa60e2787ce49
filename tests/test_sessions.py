"""A session that holds state is never replaced; one that holds none may be."""

from __future__ import annotations

from typing import Any

import pytest
from django.db import OperationalError, close_old_connections, connection, connections, transaction
from django.db.backends.signals import connection_created
from django.db.utils import Error

from tests.fakes import running
from tests.site import Site

MYSQL_STATE = [
    "SELECT GET_LOCK('a', 0)",
    "SET @a = 1",
    "SELECT @a := 1",
    "SET SESSION sort_buffer_size = 262144",
    "SET NAMES utf8mb4",
    "LOCK TABLES app_token WRITE",
    "FLUSH TABLES WITH READ LOCK",
    "CREATE TEMPORARY TABLE t (id int)",
    "HANDLER app_token OPEN",
    "PREPARE p FROM 'SELECT 1'",
    "BEGIN",
    "START TRANSACTION",
    "XA START 'x'",
    "USE app",
]
POSTGRES_STATE = [
    "SELECT pg_advisory_lock(1)",
    "SELECT set_config('work_mem', '8MB', false)",
    "SET work_mem = '8MB'",
    "SET ROLE app",
    "LISTEN a",
    "CREATE TEMPORARY TABLE t (id int)",
    "CREATE TEMP TABLE t (id int)",
    "PREPARE p AS SELECT 1",
    "BEGIN",
]


def shows_its_loss(here: Site) -> None:
    """One error, however safe the statement; then a new connection."""
    here.kill_idle()
    with pytest.raises(Error):
        here.sql("SELECT 1")
    assert here.sql("SELECT 2") == [(2,)]
    here.write("after")
    assert "after" in here.read()
    assert not here.replayed()
    # What is new holds nothing: its loss is mended.
    here.kill_idle()
    assert here.sql("SELECT 3") == [(3,)]


class TestSessionState:
    @pytest.mark.parametrize("statement", MYSQL_STATE)
    def test_on_mariadb(self, on_mariadb: Site, statement: str) -> None:
        if "FLUSH" in statement:
            on_mariadb.server.sql("GRANT RELOAD ON *.* TO 'app'@'%'")
            on_mariadb.connection.close()
        if "USE" in statement:
            statement = f"USE {on_mariadb.plain.settings_dict['NAME']}"
        on_mariadb.sql(statement)
        shows_its_loss(on_mariadb)

    @pytest.mark.parametrize("statement", POSTGRES_STATE)
    def test_on_postgresql(self, on_postgres: Site, statement: str) -> None:
        if "ROLE" in statement:
            statement = f"SET ROLE {on_postgres.plain.settings_dict['USER']}"
        on_postgres.sql(statement)
        shows_its_loss(on_postgres)

    def test_transaction_after_a_lock(self, on_mariadb: Site) -> None:
        on_mariadb.sql("SELECT GET_LOCK('a', 0)")
        on_mariadb.kill()
        with pytest.raises(OperationalError), transaction.atomic(on_mariadb.connection.alias):
            on_mariadb.write("under the lock")
        assert on_mariadb.written() == []
        with transaction.atomic(on_mariadb.connection.alias):
            on_mariadb.write("without")
        assert on_mariadb.written() == ["without"]

    def test_until_the_request_ends(self, on_mariadb: Site) -> None:
        on_mariadb.sql("SET @a = 1")
        close_old_connections()
        on_mariadb.kill_idle()
        assert on_mariadb.sql("SELECT 1") == [(1,)]

    def test_found_dead_at_the_units_end(self, on_mariadb: Site) -> None:
        """Its holder has gone: no caller is left for the error."""
        on_mariadb.sql("SET @a = 1")
        on_mariadb.kill()
        close_old_connections()
        on_mariadb.idle()
        assert on_mariadb.sql("SELECT 1") == [(1,)]

    def test_procedure(self, on_mariadb: Site) -> None:
        on_mariadb.server.sql(
            "CREATE OR REPLACE PROCEDURE nothing() SELECT 1",
            database=on_mariadb.plain.settings_dict["NAME"],
        )
        on_mariadb.server.sql("GRANT EXECUTE ON *.* TO 'app'@'%'")
        with on_mariadb.connection.cursor() as cursor:
            cursor.callproc("nothing")
            cursor.fetchall()
            while cursor.nextset():
                pass
        shows_its_loss(on_mariadb)

    def test_constraint_checks_off(self, on_mariadb: Site) -> None:
        with pytest.raises(OperationalError), on_mariadb.connection.constraint_checks_disabled():
            on_mariadb.kill()
            on_mariadb.write("one")
        assert on_mariadb.written() == []
        on_mariadb.write("two")
        on_mariadb.kill()
        with on_mariadb.connection.constraint_checks_disabled():
            on_mariadb.write("three")
        on_mariadb.kill()
        on_mariadb.write("four")
        assert on_mariadb.written() == ["two", "three", "four"]

    def test_shared_between_threads(self, on_mariadb: Site) -> None:
        on_mariadb.connection.inc_thread_sharing()
        try:
            on_mariadb.kill_idle()
            with pytest.raises(OperationalError):
                on_mariadb.sql("SELECT 1")
        finally:
            on_mariadb.connection.dec_thread_sharing()
        assert on_mariadb.sql("SELECT 1") == [(1,)]

    def test_what_receivers_set_is_no_state(self, on_mariadb: Site, receive: Any) -> None:
        """What is set up at each connect is set up again on the next one."""

        def set_up(sender: Any, connection: Any, **_: Any) -> None:
            if connection is on_mariadb.connection:
                with connection.cursor() as cursor:
                    cursor.execute("SET @receiver = 5")

        receive(connection_created, set_up)
        on_mariadb.connection.close()
        on_mariadb.sql("SELECT 1")
        on_mariadb.kill_idle()
        assert on_mariadb.sql("SELECT 1") == [(1,)]
        assert on_mariadb.sql("SELECT @receiver") == [(5,)]


class TestScoped:
    """Answers that only the connection knows that the question is about."""

    @pytest.mark.parametrize(
        "statement",
        [
            *("SELECT LAST_INSERT_ID()", "SELECT FOUND_ROWS()", "SELECT ROW_COUNT()"),
            *("SHOW WARNINGS", "SHOW ERRORS", "SELECT @@identity", "SELECT CONNECTION_ID()"),
        ],
    )
    def test_on_mariadb(self, on_mariadb: Site, statement: str) -> None:
        on_mariadb.write("one")
        on_mariadb.kill_idle()
        with pytest.raises(OperationalError):
            on_mariadb.sql(statement)
        assert on_mariadb.sql("SELECT 1") == [(1,)]

    def test_on_postgresql(self, on_postgres: Site) -> None:
        on_postgres.write("one")
        on_postgres.kill_idle()
        with pytest.raises(OperationalError):
            on_postgres.sql("SELECT lastval()")
        assert on_postgres.sql("SELECT 1") == [(1,)]

    def test_lost_on_the_way(self, on_mariadb: Site) -> None:
        on_mariadb.write("one")
        on_mariadb.cut("after")
        with pytest.raises(OperationalError):
            on_mariadb.sql("SELECT LAST_INSERT_ID()")
        assert not on_mariadb.replayed()


class TestLeaving:
    """A peer whose circuit another thread has opened is left where that can do no harm."""

    def other(self, here: Site) -> Any:
        return next(p for p in here.balancer.peers.values() if p is not here.connection.peer)

    def away(self, here: Site) -> str:
        name = here.connection.peer.name
        here.connection.peer.breaker.open()
        return str(name)

    def test_before_a_transaction(self, here: Site) -> None:
        name = self.away(here)
        with transaction.atomic(here.connection.alias):
            assert here.connection.peer.name != name
            here.write("one")
        assert here.written() == ["one"]

    def test_not_inside_a_transaction(self, here: Site) -> None:
        with transaction.atomic(here.connection.alias):
            here.write("one")
            name = self.away(here)
            here.write("two")
            assert here.connection.peer.name == name
        assert here.written() == ["one", "two"]

    def test_after_a_write_with_no_units(self, here: Site) -> None:
        """Code that never calls close_old_connections(): idleness ends a request."""
        here.write("one")
        name = self.away(here)
        here.read()
        assert here.connection.peer.name == name
        here.idle()
        here.read()
        assert here.connection.peer.name != name

    def test_not_with_session_state(self, on_mariadb: Site) -> None:
        on_mariadb.sql("SET @a = 1")
        name = self.away(on_mariadb)
        assert on_mariadb.sql("SELECT @a") == [(1,)]
        assert on_mariadb.connection.peer.name == name

    def test_pinned(self, here: Site) -> None:
        with here.balancer.pinned():
            here.read()
            name = self.away(here)
            here.read()
            assert here.connection.peer.name == name
            here.connection.close()
            here.read()
            assert here.connection.peer.name == name

    def test_pinned_elsewhere(self, here: Site) -> None:
        other = self.other(here)
        with here.balancer.pinned(other):
            here.read()
            assert here.connection.peer is other

    def test_pinned_by_the_first_that_works(self, here: Site) -> None:
        """A connection to a peer that is out, unused in the block, decides nothing."""
        other = self.other(here)
        self.away(here)
        with here.balancer.pinned():
            here.read()
            assert here.connection.peer is other

    def test_another_thread_finds_out(self, here: Site) -> None:
        """A peer that is gone is asked once, by one thread; the others do not ask it."""
        here.read()
        mine = here.connection.peer

        def other() -> None:
            wrapper = connections[here.connection.alias]
            try:
                with here.balancer.pinned(mine):
                    wrapper.ensure_connection()
                    here.here.refuse()
                    wrapper.close()
                    with pytest.raises(OperationalError):
                        wrapper.ensure_connection()
            finally:
                wrapper.close()

        with running(other):
            pass
        here.read()
        assert here.connection.peer is not mine


def test_hold_counts_follow(here: Site) -> None:
    """A replaced connection is counted where it leads, and nowhere else."""
    here.read()
    for _ in range(3):
        here.kill_idle()
        here.read()
    counts = {name: peer.connections for name, peer in here.balancer.peers.items()}
    assert sum(counts.values()) == 1
    assert counts[here.connection.peer.name] == 1
    assert connection.alias == "default"


def test_nothing_is_left_open(here: Site) -> None:
    for _ in range(5):
        here.cut_idle()
        here.write(f"{len(here.replaced())}")
    here.settle()
    assert here.sessions() == 1
