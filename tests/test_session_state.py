"""Session state that outlives a request, and answers that live in one connection."""

from __future__ import annotations

from typing import Any

import pytest
from django.db import OperationalError, close_old_connections, transaction
from django.db.utils import Error

from django_proxysql import retrying_atomic
from tests.site import Site

MYSQL = ["SELECT GET_LOCK('a', 0)", "BEGIN", "SET autocommit = 0", "LOCK TABLES app_token WRITE"]
POSTGRES = [
    "SELECT pg_advisory_lock(7)",
    "BEGIN",
    "LISTEN jobs",
    "SELECT pg_create_physical_replication_slot('of_a_test', true, true)",
]
DEADLOCK = "SIGNAL SQLSTATE '40001' SET MYSQL_ERRNO = 1213, MESSAGE_TEXT = 'Deadlock found'"


def take(site: Site, statement: str) -> None:
    if "slot" in statement:
        site.server.sql("ALTER ROLE app REPLICATION")
        site.connection.close()
    site.sql(statement)


def shows_its_loss_once(site: Site) -> None:
    with pytest.raises(Error):
        site.sql("SELECT 1")
    assert site.sql("SELECT 2") == [(2,)]


def params() -> list[Any]:
    return [("on_mariadb", one) for one in MYSQL] + [("on_postgres", one) for one in POSTGRES]


@pytest.fixture
def holding(request: pytest.FixtureRequest) -> Site:
    """A site on the server that the statement is for, whose connection has run it."""
    fixture, statement = request.param
    site: Site = request.getfixturevalue(fixture)
    take(site, statement)
    return site


@pytest.mark.parametrize("holding", params(), indirect=True, ids=str)
class TestBetweenRequests:
    """What was to live on after close_old_connections() is never lost without an error."""

    def test_a_loss_between_requests_is_shown_once(self, holding: Site) -> None:
        close_old_connections()
        holding.kill_idle()
        shows_its_loss_once(holding)
        assert not holding.replayed()

    def test_a_loss_found_at_the_end_of_a_request_is_shown(self, holding: Site) -> None:
        holding.kill()
        holding.session.dead = True
        close_old_connections()
        shows_its_loss_once(holding)

    def test_a_loss_found_by_django_is_shown(self, holding: Site) -> None:
        """After an error Django asks whether the connection is usable, and closes it if not."""
        holding.kill()
        holding.connection.errors_occurred = True
        close_old_connections()
        shows_its_loss_once(holding)

    def test_a_loss_found_by_the_health_check_is_shown(self, holding: Site) -> None:
        if not hasattr(holding.connection, "close_if_health_check_failed"):
            pytest.skip("Django before 4.1 has no CONN_HEALTH_CHECKS")
        holding.kill()
        holding.connection.health_check_enabled = True
        holding.connection.health_check_done = False
        shows_its_loss_once(holding)

    @pytest.mark.parametrize("how", ["drained", "opened"])
    def test_a_peer_that_is_out_is_not_left(self, holding: Site, how: str) -> None:
        before, peer = holding.connection.connection, holding.connection.peer
        close_old_connections()
        holding.balancer.drain(peer.name) if how == "drained" else peer.breaker.open()
        holding.sql("SELECT 1")
        close_old_connections()
        holding.sql("SELECT 1")
        assert holding.connection.connection is before

    def test_max_age_ends_the_connection_as_with_the_plain_engine(self, holding: Site) -> None:
        before = holding.connection.connection
        holding.connection.close_at = 0
        close_old_connections()
        assert holding.sql("SELECT 1") == [(1,)]
        assert holding.connection.connection is not before


class TestGivenBack:
    def test_a_connection_without_its_lock_is_as_any_other(self, on_mariadb: Site) -> None:
        on_mariadb.sql("SELECT GET_LOCK(%s, 0)", ["a"])
        on_mariadb.sql("SELECT RELEASE_LOCK(%s)", ["a"])
        on_mariadb.kill_idle()
        assert on_mariadb.sql("SELECT 1") == [(1,)]

    def test_a_transaction_by_hand_ends_with_rollback(self, here: Site) -> None:
        here.sql("BEGIN")
        here.connection.rollback()
        here.kill_idle()
        assert here.sql("SELECT 1") == [(1,)]

    @pytest.mark.parametrize("ends", ["commit", "rollback", "savepoint"])
    def test_an_unlisten_is_part_of_its_block(self, on_postgres: Site, ends: str) -> None:
        """A channel that a rollback has the session listen to again is not lost in silence."""
        alias = on_postgres.connection.alias
        on_postgres.sql("LISTEN jobs")
        with transaction.atomic(alias), transaction.atomic(alias, savepoint=ends == "savepoint"):
            on_postgres.sql("UNLISTEN jobs")
            if ends != "commit":
                transaction.set_rollback(True, alias)
        listens = on_postgres.sql("SELECT pg_listening_channels()") == [("jobs",)]
        assert listens is (ends != "commit")
        assert bool(on_postgres.session.holds) is listens

    def test_a_transactions_own_lock_is_no_state(self, on_postgres: Site) -> None:
        with transaction.atomic(on_postgres.connection.alias):
            on_postgres.sql("SELECT pg_advisory_xact_lock(7)")
        on_postgres.kill_idle()
        assert on_postgres.sql("SELECT 1") == [(1,)]

    @pytest.mark.parametrize("alone", [True, False])
    def test_a_lock_that_was_not_granted_is_not_held(self, here: Site, alone: bool) -> None:
        """One who asks for a lock again and again, in vain, stays free to leave a peer."""
        lock = "GET_LOCK('a', 0)" if here.is_mysql else "pg_try_advisory_lock(7)"
        with here.plain.cursor() as cursor:
            cursor.execute(f"SELECT {lock}")
            cursor.fetchall()
        try:
            ((granted, *_),) = here.sql(f"SELECT {lock}" if alone else f"SELECT {lock}, 1")
            assert not granted
            assert bool(here.session.holds) is not alone
        finally:
            here.plain.close()

    def test_a_lock_that_was_granted_is_held(self, here: Site) -> None:
        lock = "GET_LOCK(%s, 0)" if here.is_mysql else "pg_try_advisory_lock(%s)"
        name: Any = "7" if here.is_mysql else 7
        assert here.sql(f"SELECT {lock} AS granted", [name]) in ([(1,)], [(True,)])
        assert here.session.holds

    @pytest.mark.parametrize("column", ["temp", "connection_id", "get_lock"])
    def test_a_column_is_no_state(self, here: Site, column: str) -> None:
        here.sql(f"SELECT {column} FROM (SELECT 1 AS {column}) AS t")
        here.kill_idle()
        assert here.sql(f"SELECT {column} FROM (SELECT 1 AS {column}) AS t") == [(1,)]


class TestServerSideCursor:
    """What ``iterator()`` runs is a statement like any other."""

    def test_a_lock_that_it_takes_is_held(self, on_postgres: Site) -> None:
        here = on_postgres
        with transaction.atomic(here.connection.alias), here.connection.chunked_cursor() as cursor:
            cursor.execute("SELECT pg_advisory_lock(%s)", [7])
            cursor.fetchall()
        close_old_connections()
        here.kill_idle()
        shows_its_loss_once(here)

    def test_it_asks_no_other_connection(self, on_postgres: Site) -> None:
        here = on_postgres
        here.write("one")
        here.kill_idle()
        here.read()
        cursor = here.connection.chunked_cursor()
        with pytest.raises(OperationalError, match="replaced"):
            cursor.execute("SELECT lastval()")
        cursor.close()


class TestAnswersOfOneConnection:
    """After a write they are not asked of a connection that has not made it."""

    QUESTIONS = {
        True: ["SELECT LAST_INSERT_ID()", "SELECT @@identity", "SELECT ROW_COUNT()"],
        False: ["SELECT lastval()"],
    }

    def asks(self, here: Site) -> None:
        """Each question is an error, until the new connection has an answer of its own."""
        for question in self.QUESTIONS[here.is_mysql]:
            with pytest.raises(OperationalError, match="replaced"):
                here.sql(question)
        here.write("two")
        newest = here.sql("SELECT MAX(id) FROM app_token")
        # Of this connection's own write.
        here.write("three")
        ((answer,),) = here.sql(self.QUESTIONS[here.is_mysql][0])
        assert answer > newest[0][0]

    def test_after_a_replayed_read(self, here: Site) -> None:
        here.write("one")
        here.cut("after")
        assert here.read() == ["one"]
        self.asks(here)

    def test_after_a_replaced_connection(self, here: Site) -> None:
        here.write("one")
        here.kill_idle()
        assert here.read() == ["one"]
        self.asks(here)

    def test_after_a_drain(self, here: Site) -> None:
        here.write("one")
        here.idle()
        here.balancer.drain(here.connection.peer.name)
        assert here.read() == ["one"]
        self.asks(here)

    def test_after_a_loss_that_was_raised(self, here: Site) -> None:
        here.write("one")
        with pytest.raises(Error), transaction.atomic(here.connection.alias):
            here.sql("SELECT value FROM app_token FOR UPDATE")
            here.kill()
            here.read()
        here.read()
        self.asks(here)

    def test_inside_a_block(self, here: Site) -> None:
        here.write("one")
        here.kill_idle()
        with transaction.atomic(here.connection.alias):
            here.read()
            with pytest.raises(OperationalError, match="replaced"):
                here.sql(self.QUESTIONS[here.is_mysql][0])

    def test_an_update_answers_for_its_rows_only(self, on_mariadb: Site) -> None:
        on_mariadb.write("one")
        on_mariadb.kill_idle()
        on_mariadb.sql("UPDATE app_token SET value = 'two'")
        assert on_mariadb.sql("SELECT ROW_COUNT()") == [(1,)]
        with pytest.raises(OperationalError, match="replaced"):
            on_mariadb.sql("SELECT LAST_INSERT_ID()")

    def test_many_updates_answer_for_their_rows_only(self, on_mariadb: Site) -> None:
        on_mariadb.write("one")
        on_mariadb.kill_idle()
        with on_mariadb.connection.cursor() as cursor:
            cursor.executemany("UPDATE app_token SET value = %s", [["two"]])
        assert on_mariadb.sql("SELECT ROW_COUNT()") == [(1,)]
        with pytest.raises(OperationalError, match="replaced"):
            on_mariadb.sql("SELECT LAST_INSERT_ID()")
        with on_mariadb.connection.cursor() as cursor:
            cursor.executemany("INSERT INTO app_token (value) VALUES (%s)", [["three"]])
        assert on_mariadb.sql("SELECT LAST_INSERT_ID()") != [(0,)]

    def test_in_the_next_request_nothing_was_written(self, on_mariadb: Site) -> None:
        on_mariadb.write("one")
        on_mariadb.kill_idle()
        on_mariadb.read()
        close_old_connections()
        assert on_mariadb.sql("SELECT LAST_INSERT_ID()") == [(0,)]

    def test_who_am_i_is_answered(self, here: Site) -> None:
        here.write("one")
        here.kill_idle()
        here.read()
        assert here.sql("SELECT CONNECTION_ID()" if here.is_mysql else "SELECT pg_backend_pid()")


class TestRetryingAtomic:
    """It does not run again without what was held when the first attempt began."""

    LOCKS = {
        True: ["SELECT GET_LOCK('a', 0)", "SET @a = 1", "CREATE TEMPORARY TABLE x (a int)"],
        False: [
            "SELECT pg_advisory_lock(7)",
            "SET work_mem = '8MB'",
            "CREATE TEMP TABLE x (a int)",
        ],
    }

    @pytest.mark.parametrize("nth", [0, 1, 2])
    def test_not_without_its_state(self, here: Site, nth: int) -> None:
        here.sql(self.LOCKS[here.is_mysql][nth])
        attempts = []

        @retrying_atomic(using=here.connection.alias)
        def work() -> None:
            attempts.append(1)
            here.write("one")
            if len(attempts) == 1:
                here.kill()
            here.write("two")

        with pytest.raises(Error):
            work()
        assert len(attempts) == 1
        assert here.written() == []

    def test_with_what_the_function_takes_itself(self, here: Site) -> None:
        attempts = []

        @retrying_atomic(using=here.connection.alias)
        def work() -> None:
            attempts.append(1)
            here.sql(self.LOCKS[here.is_mysql][0])
            here.write("one")
            if len(attempts) == 1:
                here.kill()
            here.write("two")

        work()
        assert len(attempts) == 2
        assert here.written() == ["one", "two"]

    def test_after_a_conflict_the_lock_is_held_still(self, on_mariadb: Site) -> None:
        on_mariadb.sql("SELECT GET_LOCK('a', 0)")
        attempts = []

        @retrying_atomic(using=on_mariadb.connection.alias)
        def work() -> None:
            attempts.append(1)
            if len(attempts) == 1:
                on_mariadb.sql(DEADLOCK)
            on_mariadb.write("one")

        work()
        assert len(attempts) == 2

    def test_not_once_the_function_has_given_the_lock_back(self, on_mariadb: Site) -> None:
        on_mariadb.sql("SELECT GET_LOCK('a', 0)")
        attempts = []

        @retrying_atomic(using=on_mariadb.connection.alias)
        def work() -> None:
            attempts.append(1)
            on_mariadb.sql("SELECT RELEASE_LOCK('a')")
            on_mariadb.sql(DEADLOCK)

        with pytest.raises(OperationalError):
            work()
        assert len(attempts) == 1
