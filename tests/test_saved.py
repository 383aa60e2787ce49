"""What is saved although it was lost: blocks that read, COMMIT, first writes, cursors, SET."""

from __future__ import annotations

from typing import Any

import pytest
from django.db import OperationalError, connections, transaction
from django.db.utils import Error

from django_proxysql.backends.state import NO_TRANSACTION
from django_proxysql.errors import CommitOutcomeUnknown
from tests.app.models import Token
from tests.site import Site, site

CUTS = ["before", "after", "reply"]
READ = "SELECT value FROM app_token"
ISOLATION = "default_transaction_isolation"


def executemany(here: Site, rows: Any) -> None:
    with here.connection.cursor() as cursor:
        cursor.executemany("INSERT INTO app_token (value) VALUES (%s)", rows)


class TestBlockThatReadSoFar:
    @pytest.mark.parametrize("kind", CUTS)
    def test_its_next_read_is_saved(self, here: Site, kind: str) -> None:
        here.write("one")
        with transaction.atomic(here.connection.alias):
            assert here.read() == ["one"]
            here.cut(kind)
            assert here.read() == ["one"]
            here.write("two")
        assert here.written() == ["one", "two"]
        assert len(here.replayed()) == 1

    @pytest.mark.parametrize("kind", CUTS)
    def test_its_first_write_is_saved_and_stands_once(self, here: Site, kind: str) -> None:
        with transaction.atomic(here.connection.alias):
            here.read()
            here.read()
            here.cut(kind)
            here.write("one")
            here.write("two")
        assert here.written() == ["one", "two"]

    def test_a_rollback_undoes_what_came_after(self, here: Site) -> None:
        with pytest.raises(KeyError), transaction.atomic(here.connection.alias):
            here.read()
            here.cut("after")
            here.write("one")
            raise KeyError
        assert here.written() == []

    def test_savepoints_are_made_again(self, here: Site) -> None:
        alias = here.connection.alias
        with transaction.atomic(alias):
            here.read()
            with pytest.raises(KeyError), transaction.atomic(alias):
                here.read()
                here.cut("after")
                here.write("one")
                raise KeyError
            here.write("two")
        assert here.written() == ["two"]
        assert here.replayed()

    @pytest.mark.parametrize("kind", CUTS)
    @pytest.mark.parametrize("before", ["write", "executemany", "lock", "function"])
    def test_what_did_more_than_read_is_not(self, here: Site, before: str, kind: str) -> None:
        with pytest.raises(OperationalError), transaction.atomic(here.connection.alias):
            if before == "write":
                here.write("one")
            elif before == "executemany":
                executemany(here, [["one"]])
            elif before == "lock":
                here.sql("SELECT value FROM app_token FOR UPDATE")
            else:
                here.sql("SELECT SLEEP(0)" if here.is_mysql else "SELECT pg_sleep(0)")
            here.cut(kind)
            here.read()
        assert not here.replayed()
        assert here.written() == []

    @pytest.mark.parametrize(
        ("server", "settings", "read"),
        [
            # The transaction's own time.
            ("postgres", {}, "SELECT now()"),
            # It must see what it has seen.
            ("mariadb", {"OPTIONS": {"isolation_level": "repeatable read"}}, READ),
            ("postgres", {"OPTIONS": {"options": rf"-c {ISOLATION}=repeatable\ read"}}, READ),
            # Peers may lag.
            ("mariadb", {"SYNCHRONOUS_PEERS": False}, READ),
        ],
    )
    def test_not_where_another_answer_would_contradict_the_first(
        self, request: Any, fault_proxy: Any, server: str, settings: dict[str, Any], read: str
    ) -> None:
        with site(request.getfixturevalue(server), fault_proxy, **settings) as here:
            with pytest.raises(OperationalError), transaction.atomic(here.connection.alias):
                here.sql(read)
                here.cut("after")
                here.read()
            assert not here.replayed()


class TestCommitOfReads:
    @pytest.mark.parametrize("kind", ["before", "after"])
    def test_is_saved_and_its_hooks_run_once(self, here: Site, kind: str) -> None:
        alias = here.connection.alias
        ran: list[str] = []
        with transaction.atomic(alias):
            transaction.on_commit(lambda: ran.append("hook"), alias)
            here.read()
            here.cut(kind)
        assert ran == ["hook"]
        here.write("one")
        assert here.written() == ["one"]

    @pytest.mark.parametrize("kind", ["before", "after"])
    def test_of_many_kinds_and_sizes_is_saved(self, here: Site, kind: str) -> None:
        alias = here.connection.alias
        with transaction.atomic(alias):
            assert here.sql("SELECT length(%s)", ["x" * 2_000_000]) == [(2_000_000,)]
            with transaction.atomic(alias):
                here.sql("SELECT value FROM app_token WHERE value LIKE 'a%'")
            here.cut(kind)

    @pytest.mark.parametrize("kind", ["before", "after"])
    @pytest.mark.parametrize("statement", ["SELECT writes()", "SELECT a FROM writing"])
    def test_of_a_read_that_writes_is_unknown(
        self, on_postgres: Site, statement: str, kind: str
    ) -> None:
        """PostgreSQL's answer to it is a SELECT's, and names no transaction id."""
        here = on_postgres
        here.plainly(
            "CREATE FUNCTION writes() RETURNS int LANGUAGE sql VOLATILE"
            " AS $$ INSERT INTO app_token (value) VALUES ('by a read') RETURNING 1 $$",
            "CREATE VIEW writing AS SELECT writes() AS a",
        )
        try:
            with pytest.raises(CommitOutcomeUnknown), transaction.atomic(here.connection.alias):
                assert here.sql(statement) == [(1,)]
                here.cut(kind)
            assert here.written() == (["by a read"] if kind == "after" else [])
        finally:
            here.plainly("DROP FUNCTION writes() CASCADE")

    def test_found_dead_before_it_is_saved(self, here: Site) -> None:
        with transaction.atomic(here.connection.alias):
            here.read()
            here.kill()
        here.write("one")
        assert here.written() == ["one"]

    def test_of_a_write_is_unknown(self, here: Site) -> None:
        with pytest.raises(CommitOutcomeUnknown), transaction.atomic(here.connection.alias):
            here.read()
            here.write("one")
            here.cut("after")

    def test_of_a_locking_read_is_raised(self, here: Site) -> None:
        """Its lock was lost before the block's end: what it guarded may have changed."""
        with pytest.raises(OperationalError), transaction.atomic(here.connection.alias):
            here.sql("SELECT value FROM app_token FOR UPDATE")
            here.kill()

    def test_is_raised_where_nothing_is_run_again(self, mariadb: Any, fault_proxy: Any) -> None:
        with site(mariadb, fault_proxy, REPLAY=None) as here:
            with pytest.raises(Error), transaction.atomic(here.connection.alias):
                here.read()
                here.cut("after")
            assert here.read() == []

    def test_where_the_session_holds_something_is_raised(self, on_postgres: Site) -> None:
        here = on_postgres
        here.sql("SELECT pg_advisory_lock(7)")
        with pytest.raises(Error), transaction.atomic(here.connection.alias):
            here.read()
            here.cut("after")

    def test_of_serializable_reads_is_unknown(self, postgres: Any, fault_proxy: Any) -> None:
        options = {"options": "-c default_transaction_isolation=serializable"}
        with (
            site(postgres, fault_proxy, OPTIONS=options) as here,
            pytest.raises(CommitOutcomeUnknown),
            transaction.atomic(here.connection.alias),
        ):
            here.read()
            here.cut("after")

    def test_asks_nothing_of_the_peer_that_lost_it(self, on_postgres: Site) -> None:
        """It may be dead, and a connect to it takes as long as a time-out."""
        lost = on_postgres.here
        with transaction.atomic(on_postgres.connection.alias):
            on_postgres.read()
            accepted = lost.accepted
            on_postgres.cut("after")
        assert lost.accepted == accepted

    def test_costs_as_much_of_the_budget_as_it_sends(self, here: Site) -> None:
        before = len(here.session.budget._replays)
        with transaction.atomic(here.connection.alias):
            for _ in range(4):
                here.read()
            here.cut("after")
        assert len(here.session.budget._replays) == before + 4


class TestFirstWrite:
    def lose(self, here: Site, statement: str) -> bool:
        here.idle(70)
        here.sql("SELECT 1")
        here.cut("after", 2)
        try:
            with transaction.atomic(here.connection.alias):
                here.sql(statement)
        except Error:
            return False
        return True

    def count(self, here: Site, table: str) -> int:
        here.settle()
        ((count,),) = here.plainly(f"SELECT count(*) FROM {table}")
        return int(count)

    def test_of_a_table_without_transactions_is_raised(
        self, on_mariadb: Site, mariadb: Any
    ) -> None:
        on_mariadb.sql("DROP TABLE IF EXISTS rough")
        on_mariadb.sql("CREATE TABLE rough (a int) ENGINE = MyISAM")
        assert not self.lose(on_mariadb, "INSERT INTO rough (a) VALUES (1)")
        assert self.count(on_mariadb, "rough") <= 1
        assert not on_mariadb.replayed()
        on_mariadb.sql("DROP TABLE rough")

    def test_of_a_table_with_a_trigger_is_raised(self, on_mariadb: Site) -> None:
        on_mariadb.sql("DROP TABLE IF EXISTS watched, rough")
        on_mariadb.sql("CREATE TABLE rough (a int) ENGINE = MyISAM")
        on_mariadb.sql("CREATE TABLE watched (a int)")
        on_mariadb.sql(
            "CREATE TRIGGER watch BEFORE INSERT ON watched"
            " FOR EACH ROW INSERT INTO rough VALUES (1)"
        )
        assert not self.lose(on_mariadb, "INSERT INTO watched (a) VALUES (1)")
        assert self.count(on_mariadb, "rough") <= 1
        assert not on_mariadb.replayed()
        on_mariadb.sql("DROP TABLE watched, rough")

    def test_through_a_view_is_raised(self, on_mariadb: Site) -> None:
        on_mariadb.sql("CREATE OR REPLACE VIEW seen AS SELECT value FROM app_token")
        assert not self.lose(on_mariadb, "INSERT INTO seen (value) VALUES ('one')")
        on_mariadb.sql("DROP VIEW seen")
        assert on_mariadb.written() == []

    def test_whose_trigger_writes_elsewhere_is_raised(
        self, on_postgres: Site, postgres: Any
    ) -> None:
        """dblink commits on its own: no rollback undoes it."""
        here = on_postgres
        postgres.sql("CREATE EXTENSION IF NOT EXISTS dblink")
        try:
            here.sql("DROP TABLE IF EXISTS watched, elsewhere")
            here.sql("CREATE TABLE elsewhere (a int)")
            here.sql("CREATE TABLE watched (a int)")
            here.sql(
                "CREATE OR REPLACE FUNCTION watch() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
                " INSERT INTO elsewhere VALUES (1); RETURN NEW; END $$"
            )
            here.sql(
                "CREATE TRIGGER watch BEFORE INSERT ON watched FOR EACH ROW"
                " EXECUTE FUNCTION watch()"
            )
            assert not self.lose(here, "INSERT INTO watched (a) VALUES (1)")
            assert not here.replayed()
            # A table that nothing hangs on is well, extension or not.
            assert self.lose(here, "INSERT INTO app_token (value) VALUES ('one')")
            assert here.written() == ["one"]
        finally:
            postgres.sql("DROP EXTENSION dblink")
        # Triggers in PL/pgSQL do nothing that a rollback does not undo.
        assert self.lose(here, "INSERT INTO watched (a) VALUES (1)")
        assert self.count(here, "elsewhere") == 1
        here.sql("DROP TABLE watched, elsewhere")

    @pytest.mark.parametrize(
        "body",
        [
            "PERFORM setval('counted', 5)",
            "EXECUTE 'SELECT set' || 'val(''counted'', 5)'",
            "COPY app_token TO PROGRAM 'true'",
        ],
    )
    def test_whose_trigger_may_reach_outside_of_the_transaction_is_raised(
        self, on_postgres: Site, body: str
    ) -> None:
        """PL/pgSQL can set a sequence, run a program, write a file: no rollback undoes that."""
        here = on_postgres
        here.plainly(
            "DROP TABLE IF EXISTS watched; CREATE TABLE watched (a int);"
            "CREATE SEQUENCE IF NOT EXISTS counted;"
            "CREATE OR REPLACE FUNCTION reach() RETURNS trigger LANGUAGE plpgsql AS"
            f" $$ BEGIN {body}; RETURN NEW; END $$;"
            "CREATE TRIGGER r AFTER DELETE ON watched FOR EACH ROW EXECUTE FUNCTION reach()"
        )
        try:
            assert not self.lose(here, "INSERT INTO watched (a) VALUES (1)")
            assert not here.replayed()
            # A table without a trigger is well all the same.
            assert self.lose(here, "INSERT INTO app_token (value) VALUES ('one')")
        finally:
            here.sql("DROP TABLE watched; DROP FUNCTION reach(); DROP SEQUENCE counted")

    def test_change_of_the_schema_is_saved(self, on_postgres: Site) -> None:
        on_postgres.sql("DROP TABLE IF EXISTS fresh")
        assert self.lose(on_postgres, "CREATE TABLE fresh (a varchar(10) DEFAULT 'x')")
        assert self.count(on_postgres, "fresh") == 0
        assert self.lose(on_postgres, "ALTER TABLE fresh ADD COLUMN b int")
        assert self.lose(on_postgres, "DROP TABLE fresh")

    @pytest.mark.parametrize("reads", [0, 1])
    def test_executemany_is_saved_as_a_whole(self, here: Site, reads: int) -> None:
        here.sql("SELECT 1")
        rows = [[f"value{number}"] for number in range(5)]
        if not reads:
            here.cut("after", 2)
        with transaction.atomic(here.connection.alias):
            for _ in range(reads):
                here.read()
            if reads:
                here.cut("after")
            executemany(here, rows)
        assert here.written() == [value for [value] in rows]
        assert here.replayed()

    def test_executemany_of_an_iterator_is_raised(self, here: Site) -> None:
        here.sql("SELECT 1")
        here.cut("after", 2)
        rows = iter([["one"], ["two"]])
        with pytest.raises(Error), transaction.atomic(here.connection.alias):
            executemany(here, rows)
        assert here.written() == []

    def test_executemany_in_autocommit_is_raised(self, here: Site) -> None:
        here.sql("SELECT 1")
        here.cut("after")
        with pytest.raises(Error):
            executemany(here, [["one"]])
        assert len(here.written()) <= 1
        assert not here.replayed()

    @pytest.mark.parametrize(
        "statement",
        [
            "SELECT pg_advisory_xact_lock(5)",
            "SET TRANSACTION ISOLATION LEVEL SERIALIZABLE",
            "SET LOCAL work_mem = '5MB'",
        ],
    )
    def test_what_ends_with_the_transaction_is_saved(
        self, on_postgres: Site, statement: str
    ) -> None:
        here = on_postgres
        here.sql("SELECT 1")
        here.cut("after")
        with transaction.atomic(here.connection.alias):
            here.sql(statement)
            if "ISOLATION" in statement:
                assert here.sql("SHOW transaction_isolation") == [("serializable",)]
            here.write("one")
        assert here.replayed()
        # And nothing of it is held after the block.
        here.cut("after")
        assert here.read() == ["one"]


class TestServerSideCursors:
    @pytest.mark.parametrize("in_block", [False, True])
    @pytest.mark.parametrize("nth", [1, 2, 3], ids=["DECLARE", "its description", "FETCH"])
    def test_the_first_rows_are_saved(self, on_postgres: Site, nth: int, in_block: bool) -> None:
        """DECLARE or the first FETCH is lost: no row was given out yet."""
        here = on_postgres
        for value in "abcde":
            here.write(value)

        def values() -> list[str]:
            tokens = Token.objects.using(here.connection.alias).order_by("id")
            return [token.value for token in tokens.iterator(2)]

        here.sql("SELECT 1")
        if in_block:
            with transaction.atomic(here.connection.alias):
                here.read()
                here.cut("after", nth)
                assert values() == list("abcde")
        else:
            here.cut("after", nth)
            assert values() == list("abcde")
        assert here.replayed()
        here.write("f")

    def test_counts_for_the_budget_and_is_remembered(self, on_postgres: Site) -> None:
        """DECLARE and the first FETCH are statements like others."""
        here = on_postgres
        counted, sent = here.session.budget.statements, []
        here.sql("SELECT 1")
        rows = Token.objects.using(here.connection.alias).iterator(2)

        def note(peer: str, statement: str, caller: int) -> bool:
            sent.append(statement)
            return False

        here.session.balancer.losses.note = note  # type: ignore[method-assign]
        here.cut("after", 2)
        list(rows)
        assert [statement[:6] for statement in sent] == ["SELECT"]
        assert here.session.budget.statements == counted + 3

    def test_in_autocommit_notes_nothing_on_what_all_threads_share(self, on_postgres: Site) -> None:
        list(Token.objects.using(on_postgres.connection.alias).iterator(2))
        assert NO_TRANSACTION.mark is None

    def test_later_rows_are_raised(self, on_postgres: Site) -> None:
        here = on_postgres
        for value in "abcde":
            here.write(value)
        got = []
        rows = Token.objects.using(here.connection.alias).order_by("id").iterator(2)
        with pytest.raises(Error):
            for token in rows:
                got.append(token.value)
                if len(got) == 2:
                    here.cut("after")
        assert got == ["a", "b"]
        assert not here.replayed()


class TestSettings:
    STATEMENTS = {
        "mysql": ["SET SESSION sort_buffer_size = 300000", "SET @a = 1", "SET NAMES utf8mb4"],
        "postgresql": ["SET work_mem = '5MB'", "LISTEN channel", "PREPARE p AS SELECT 1"],
    }

    def test_alone_on_its_connection_is_saved_and_held(self, here: Site) -> None:
        for statement in self.STATEMENTS[here.connection.vendor]:
            connections[here.connection.alias].close()
            here.idle(70)
            here.sql("SELECT 1")
            here.cut("after")
            here.sql(statement)
            assert here.session.holds, statement
            # It is state from here on: its loss is an error.
            here.kill_idle()
            with pytest.raises(Error):
                here.sql("SELECT 1")

    def test_beside_other_state_is_raised(self, here: Site) -> None:
        first, second, *_ = self.STATEMENTS[here.connection.vendor]
        here.sql(second)
        here.cut("after")
        with pytest.raises(Error):
            here.sql(first)
        assert not here.replayed()

    def test_of_the_server_is_raised(self, on_mariadb: Site) -> None:
        on_mariadb.sql("SELECT 1")
        on_mariadb.cut("after")
        with pytest.raises(Error):
            on_mariadb.sql("SET GLOBAL sort_buffer_size = 300000")
        assert not on_mariadb.replayed()
