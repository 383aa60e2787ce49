"""What is run again as a read and is none: nothing is done twice, and the loss is raised."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from django.db import transaction
from django.db.utils import Error, OperationalError

from tests.site import Site, site

#: What leaves a mark in ``effect`` (a row) or in the sequence ``effects``.
ON_POSTGRESQL = [
    "CREATE TABLE effect (n int)",
    "CREATE SEQUENCE effects",
    "SELECT nextval('effects')",
    """CREATE FUNCTION evil(a int) RETURNS int LANGUAGE plpgsql AS
    $$ BEGIN INSERT INTO effect VALUES (a); RETURN a; END $$""",
    "CREATE FUNCTION count_up() RETURNS bigint LANGUAGE sql AS $$ SELECT nextval('effects') $$",
    "CREATE TABLE things (a int)",
    "INSERT INTO things VALUES (1)",
    "CREATE VIEW writes AS SELECT evil(1) AS a",
    "CREATE VIEW counts AS SELECT count_up() AS a",
    "CREATE FUNCTION af(things) RETURNS int LANGUAGE sql AS $$ SELECT evil(2) $$",
    "CREATE FUNCTION lower(int) RETURNS int LANGUAGE sql AS $$ SELECT evil($1) $$",
    "CREATE FUNCTION digest(int) RETURNS int LANGUAGE sql AS $$ SELECT evil($1) $$",
    "CREATE FUNCTION truncate(int, int) RETURNS int LANGUAGE sql AS $$ SELECT evil($1) $$",
    "CREATE FUNCTION int4_evil(int, int) RETURNS int LANGUAGE sql AS $$ SELECT evil($1) $$",
    "CREATE OPERATOR ### (FUNCTION = int4_evil, LEFTARG = int, RIGHTARG = int)",
    "CREATE DOMAIN dom AS int CHECK (evil(value) > 0)",
]
OFF_POSTGRESQL = [
    "DROP DOMAIN IF EXISTS dom",
    "DROP VIEW IF EXISTS writes, counts",
    "DROP OPERATOR IF EXISTS ### (int, int)",
    "DROP FUNCTION IF EXISTS evil, count_up, lower(int), digest, int4_evil, truncate(int, int)",
    "DROP TABLE IF EXISTS things, effect CASCADE",
    "DROP SEQUENCE IF EXISTS effects",
]
ON_MARIADB = [
    "CREATE TABLE effect (n int) ENGINE = MyISAM",
    "CREATE SEQUENCE effects NOCACHE",
    "CREATE FUNCTION evil(a int) RETURNS int BEGIN INSERT INTO effect VALUES (a); RETURN a; END",
    "CREATE TABLE things (a int)",
    "INSERT INTO things VALUES (1)",
    "CREATE VIEW writes AS SELECT evil(1) AS a",
    "CREATE VIEW counts AS SELECT NEXT VALUE FOR effects AS a",
    "CREATE FUNCTION digest(a int) RETURNS int RETURN evil(a)",
    "CREATE FUNCTION strpos(a int) RETURNS int RETURN evil(a)",
    "CREATE FUNCTION any_value(a int) RETURNS int RETURN evil(a)",
]
OFF_MARIADB = [
    *(f"DROP FUNCTION IF EXISTS {name}" for name in ("evil", "digest", "strpos", "any_value")),
    "DROP VIEW IF EXISTS writes, counts",
    "DROP TABLE IF EXISTS things, effect",
    "DROP SEQUENCE IF EXISTS effects",
]
STATEMENTS = {
    "postgresql": [
        *("SELECT a FROM writes", "SELECT a FROM counts", "SELECT t.af FROM things t"),
        *("SELECT (t).af FROM things t", "SELECT lower(1)", "SELECT digest(1)"),
        *("SELECT truncate(1, 2)", "SELECT 1 ### 2", "SELECT 1::dom", "SELECT CAST(1 AS dom)"),
        *(
            "SELECT evil(1)",
            "SELECT public.evil(1)",
            'SELECT "evil"(1)',
            "SELECT nextval('effects')",
        ),
        *("WITH x AS (SELECT a FROM writes) SELECT * FROM x", "SELECT count_up() /* x */"),
        *("SELECT a FROM writes /*route='x'*/", "SELECT a FROM counts;"),
        *("WITH x AS (INSERT INTO effect VALUES (1) RETURNING n) SELECT * FROM x",),
        *("SELECT a FROM things WHERE lower(a) > 0", "SELECT max(lower(a)) FROM things"),
        *("SELECT t.af FROM things t WHERE t.af = 2", "EXPLAIN ANALYZE SELECT evil(1)"),
    ],
    "mysql": [
        *("SELECT a FROM writes", "SELECT a FROM counts", "SELECT digest(1)", "SELECT strpos(1)"),
        *("SELECT any_value(1)", "SELECT evil(1)", "SELECT `evil`(1)", "SELECT evil (1)"),
        *(
            "SELECT NEXT VALUE FOR effects",
            "SELECT nextval(effects)",
            "EXPLAIN SELECT * FROM writes",
        ),
        *("WITH x AS (SELECT a FROM writes) SELECT * FROM x", "SELECT a FROM writes /* x */"),
        *("SELECT a FROM counts;", "SELECT a FROM things WHERE (SELECT a FROM writes) > 0"),
    ],
}


@pytest.fixture
def evil(here: Site) -> Iterator[Site]:
    """A site whose database has functions that write, and views that call them."""
    make, drop = (ON_MARIADB, OFF_MARIADB) if here.is_mysql else (ON_POSTGRESQL, OFF_POSTGRESQL)
    here.plainly(*drop, *make)
    yield here
    here.plainly(*drop)


def effects(here: Site) -> int:
    """How much has been left behind so far."""
    here.settle()
    counter = "next_not_cached_value" if here.is_mysql else "last_value"
    ((rows,),) = here.plainly("SELECT count(*) FROM effect")
    ((count,),) = here.plainly(f"SELECT {counter} FROM effects")
    return int(rows) + int(count)


def effect_of(here: Site, statement: str) -> int:
    before = effects(here)
    here.plainly(statement)
    return effects(here) - before


def lose(here: Site, statement: str, in_block: bool) -> bool:
    """Run a statement whose answer is lost; return whether it was saved."""
    # Each is a minute of its own: the budget of replays is not what is looked at.
    here.idle(70)
    here.sql("SELECT 1")
    # After what begins the transaction, where that is sent for itself.
    here.cut("after", 2 if in_block else 1)
    raised: BaseException | None = None
    try:
        with transaction.atomic(here.connection.alias) if in_block else contextlib.nullcontext():
            here.sql(statement)
    except Error as exc:
        raised = exc.__cause__
    # What was lost is raised, and not what the server has said of the second run.
    assert raised is None or here.connection._driver.code_of(raised) not in (1792, "25006")
    return raised is None


class TestNothingTwice:
    @pytest.mark.parametrize("in_block", [False, True])
    def test_whatever_is_lost(self, evil: Site, in_block: bool) -> None:
        """A row that a rollback undoes is none; what it does not undo is not done twice."""
        for statement in STATEMENTS[evil.connection.vendor]:
            once = effect_of(evil, statement)
            before = effects(evil)
            saved = lose(evil, statement, in_block)
            done = effects(evil) - before
            assert done <= once, statement
            assert not saved or (done == once and (in_block or not once)), statement
            evil.sql("DELETE FROM effect WHERE n = -1")
        # A server that refuses is as well as any other.
        assert {p.breaker.circuit.state for p in evil.balancer.peers.values()} == {"closed"}

    def test_the_loss_is_raised_in_a_block_and_nothing_follows(self, evil: Site) -> None:
        evil.sql("SELECT 1")
        evil.cut("after", 2)
        with pytest.raises(Error), transaction.atomic(evil.connection.alias):
            with pytest.raises(OperationalError):
                evil.sql("SELECT a FROM writes")
            # The block is lost as a whole: no half of it is written on another connection.
            evil.write("half")
        assert evil.written() == []
        evil.write("after")
        assert evil.written() == ["after"]

    @pytest.mark.parametrize("is_lost", [False, True])
    def test_a_serializable_block_whose_first_read_is_replayed_meets_its_conflict(
        self, postgres: Any, fault_proxy: Any, is_lost: bool
    ) -> None:
        """PostgreSQL does not watch a transaction that is READ ONLY when it gets its snapshot."""
        level = {"isolation_level": psycopg.IsolationLevel.SERIALIZABLE}
        with site(postgres, fault_proxy, OPTIONS=level) as here, contextlib.ExitStack() as stack:
            here.write("one")
            here.write("two")
            other = stack.enter_context(contextlib.closing(here.connection.copy()))

            def take(connection: Any, value: str) -> None:
                """Delete a value, while there is another beside it."""
                with connection.cursor() as cursor:
                    cursor.execute("SELECT count(*) FROM app_token")
                    assert cursor.fetchall() == [(2,)]
                    cursor.execute("DELETE FROM app_token WHERE value = %s", [value])

            if is_lost:
                here.here.cut_after(b"count")
            with pytest.raises(OperationalError), transaction.atomic(here.connection.alias):
                take(here.connection, "one")
                other.set_autocommit(False)
                take(other, "two")
                other.commit()
            assert len(here.replayed()) == is_lost
            assert here.plain_rows() == ["one"]

    @pytest.mark.parametrize("in_block", [False, True])
    @pytest.mark.parametrize(
        "sql",
        [
            "SHOW transaction_read_only",
            "SELECT setting FROM pg_settings WHERE name = 'transaction_read_only'",
        ],
    )
    def test_whether_the_transaction_is_read_only_is_answered_for_the_applications(
        self, on_postgres: Site, sql: str, in_block: bool
    ) -> None:
        """A read that is run again is run in another."""
        connection = on_postgres.connection
        on_postgres.cut("after", 2 if in_block else 1)
        block = transaction.atomic(connection.alias) if in_block else contextlib.nullcontext()
        with contextlib.suppress(OperationalError), block:
            assert on_postgres.sql(sql) == [("off",)]
        assert on_postgres.losses()

    def test_a_locking_read_is_replayed_with_its_lock(self, here: Site) -> None:
        here.write("one")
        here.cut("after", 2)
        with transaction.atomic(here.connection.alias):
            here.sql("SELECT value FROM app_token FOR UPDATE")
            with here.plain.cursor() as cursor, pytest.raises(Error):
                cursor.execute("SELECT value FROM app_token FOR UPDATE NOWAIT")
            here.write("two")
        assert here.written() == ["one", "two"]

    def test_an_answer_to_the_replay_is_raised_as_it_is(self, here: Site) -> None:
        here.sql("SELECT 1")
        here.cut("before")
        with pytest.raises(Error) as caught:
            here.sql("SELECT nothing FROM app_token")
        assert type(caught.value) is not OperationalError or "1054" in str(caught.value)
        here.write("one")
        assert here.written() == ["one"]


class TestWhatABlockHasWrittenByReads:
    """A block whose reads have written is not begun anew, or taken for committed, without that."""

    @pytest.mark.parametrize("commits", [False, True])
    def test_it_stands_or_the_loss_is_raised(self, evil: Site, commits: bool) -> None:
        if evil.is_mysql:
            evil.sql("ALTER TABLE effect ENGINE = InnoDB")
        saved = True
        try:
            with transaction.atomic(evil.connection.alias):
                evil.sql("SELECT a FROM writes")
                evil.cut("before")
                if not commits:
                    evil.read()
        except Error:
            saved = False
        evil.settle()
        assert evil.plainly("SELECT count(*) FROM effect") == [(saved,)]
