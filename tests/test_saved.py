"""What is saved although it was lost: blocks that read, COMMIT, first writes, cursors, SET."""

from __future__ import annotations

from typing import Any

import pytest
from django.db import transaction
from django.db.utils import Error

from django_proxysql.backends.state import NO_TRANSACTION
from django_proxysql.errors import CommitOutcomeUnknown
from tests.app.models import Token
from tests.site import Site
from tests.stories import tell, told

LOCKING = "SELECT value FROM app_token FOR UPDATE"
ISOLATION = "default_transaction_isolation"
#: Leave state in the session, each alone.
SETTINGS = {
    "mariadb": ["SET SESSION sort_buffer_size = 300000", "SET @a = 1", "SET NAMES utf8mb4"],
    "postgres": ["SET work_mem = '5MB'", "LISTEN channel", "PREPARE p AS SELECT 1"],
}
#: Where another answer would contradict the first: a block's read, and what is set.
CONTRADICTED = [
    # The transaction's own time.
    ("postgres", "SELECT now()", {}),
    # It must see what it has seen.
    ("mariadb", "read", {"OPTIONS": {"isolation_level": "repeatable read"}}),
    ("postgres", "read", {"OPTIONS": {"options": rf"-c {ISOLATION}=repeatable\ read"}}),
    # Peers may lag.
    ("mariadb", "read", {"SYNCHRONOUS_PEERS": False}),
]

STORIES = {
    # A block that has only read so far.
    "its next read is saved": (
        "all: write one; { read one; CUT; read one; write two }; written one two; replayed 1"
    ),
    "its first write is saved and stands once": (
        "all: { read; read; CUT; write one; write two }; written one two"
    ),
    "a rollback undoes what came after": "all: undone { read; cut after; write one }; written",
    "savepoints are made again": (
        "all: { read; undone { read; cut after; write one }; write two }; written two; replayed 1"
    ),
    **{
        f"what did more than read is not saved: {before}": (
            f"all: !{{ {before}; CUT; read }}; replayed 0; written"
        )
        for before in ("write one", "many one", LOCKING, "WAIT")
    },
    **{
        f"another answer would contradict the first: {read} {settings}": (
            f"{server}: !{{ {read}; cut after; read }}; replayed 0",
            settings,
        )
        for server, read, settings in CONTRADICTED
    },
    # COMMIT of reads.
    **{
        f"commit of reads is saved and its hooks run once: {kind}": (
            f"all: {{ hook one; read; cut {kind} }}; ran one; write one; written one"
        )
        for kind in ("before", "after")
    },
    "commit of reads that is found dead before is saved": (
        "all: { read; kill }; write one; written one"
    ),
    "commit of a write is unknown": "all: !!{ read; write one; cut after }",
    # Its lock was lost before the block's end: what it guarded may have changed.
    "commit of a locking read is raised": f"all: !{{ {LOCKING}; kill }}",
    "commit of reads is unknown where nothing is run again": (
        "mariadb: !!{ read; cut after }; read",
        {"REPLAY": None},
    ),
    "commit of reads is unknown where the session holds something": (
        "postgres: HOLD; !!{ read; cut after }"
    ),
    "commit of serializable reads is unknown": (
        "postgres: !!{ read; cut after }",
        {"OPTIONS": {"options": f"-c {ISOLATION}=serializable"}},
    ),
    # First writes.
    "executemany is saved as a whole": (
        "all: SELECT 1; cut after 2; { many a b c }; written a b c; replayed 1"
    ),
    "executemany after reads is saved as a whole": (
        "all: { read; cut after; many a b c }; written a b c; replayed 1"
    ),
    "executemany in autocommit is raised": "all: SELECT 1; cut after; !many one; replayed 0",
    **{
        f"what ends with the transaction is saved, and not held after it: {statement}": (
            f"postgres: SELECT 1; cut after; {{ {statement}; write one }}; replayed 1; cut after; "
            "read one"
        )
        for statement in (
            "SELECT pg_advisory_xact_lock(5)",
            "SET TRANSACTION ISOLATION LEVEL SERIALIZABLE; SHOW transaction_isolation;"
            " answer serializable",
            "SET LOCAL work_mem = '5MB'",
        )
    },
    # DECLARE, its description or the first FETCH is lost: no row was given out yet.
    **{
        f"first rows of a server-side cursor are saved: {nth}, {story}": (
            f"postgres: many a b c d e; {story.format(nth)}; replayed 1; write f"
        )
        for nth in (1, 2, 3)
        for story in (
            "SELECT 1; cut after {}; iterate a b c d e",
            "{{ read; cut after {}; iterate a b c d e }}",
        )
    },
    # It is state from here on: its loss is an error.
    **{
        f"setting alone on its connection is saved, and held: {statement}": (
            f"{server}: SELECT 1; cut after; {statement}; held; replayed 1; kill_idle; !SELECT 1"
        )
        for server, statements in SETTINGS.items()
        for statement in statements
    },
    **{
        f"setting beside other state is raised: {first}": (
            f"{server}: {second}; cut after; !{first}; replayed 0"
        )
        for server, (first, second, _) in SETTINGS.items()
    },
    "setting of the server is raised": (
        "mariadb: SELECT 1; cut after; !SET GLOBAL sort_buffer_size = 300000; replayed 0"
    ),
}


@told(STORIES)
def test_story(request: Any, server: str, settings: dict[str, Any], text: str) -> None:
    tell(request, server, settings, text)


class TestCommitOfReads:
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

    @pytest.mark.parametrize(
        ("changed", "made", "statement"),
        [
            (
                "rough",
                ["CREATE TABLE rough (a int) ENGINE = MyISAM"],
                "INSERT INTO rough VALUES (1)",
            ),
            (
                "rough",
                [
                    "CREATE TABLE rough (a int) ENGINE = MyISAM",
                    "CREATE TABLE watched (a int)",
                    "CREATE TRIGGER watch BEFORE INSERT ON watched"
                    " FOR EACH ROW INSERT INTO rough VALUES (1)",
                ],
                "INSERT INTO watched (a) VALUES (1)",
            ),
            (
                "app.2",
                ["CREATE TABLE app.2 (a int) ENGINE = MyISAM"],
                "INSERT INTO app.2 SELECT COUNT(*) FROM app_token",
            ),
            (
                "app_token",
                ["CREATE OR REPLACE VIEW seen AS SELECT value FROM app_token"],
                "INSERT INTO seen (value) VALUES ('one')",
            ),
        ],
        ids=["a table without transactions", "a trigger", "a number for a name", "a view"],
    )
    def test_of_what_a_rollback_may_not_undo_is_raised(
        self, on_mariadb: Site, changed: str, made: list[str], statement: str
    ) -> None:
        drops = "DROP TABLE IF EXISTS watched, rough, app.2", "DROP VIEW IF EXISTS seen"
        on_mariadb.plainly(*drops, *made)
        assert not self.lose(on_mariadb, statement)
        assert self.count(on_mariadb, changed) <= 1
        assert not on_mariadb.replayed()
        on_mariadb.plainly(*drops)

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

    def test_executemany_of_an_iterator_is_raised(self, here: Site) -> None:
        here.sql("SELECT 1")
        here.cut("after", 2)
        rows = iter([["one"], ["two"]])
        block, cursor = transaction.atomic(here.connection.alias), here.connection.cursor()
        with pytest.raises(Error), block, cursor:
            cursor.executemany("INSERT INTO app_token (value) VALUES (%s)", rows)
        assert here.written() == []


class TestServerSideCursors:
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
