"""``COMMIT_OUTCOME: "record"``: a COMMIT whose answer is lost is asked about, on real servers."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import django
import pytest
from django.apps import apps
from django.core.management import CommandError, call_command
from django.db import (
    DatabaseError,
    IntegrityError,
    InterfaceError,
    OperationalError,
    close_old_connections,
    connections,
    transaction,
)
from django.db.models.signals import pre_migrate

from django_proxysql import backends, retrying_atomic, signals
from django_proxysql.backends import outcomes
from django_proxysql.backends.tokens import _cleaner, delete_old, problems
from django_proxysql.conf.keys import ENGINE
from django_proxysql.core import outcome
from django_proxysql.core.events import (
    CommitResolved,
    ConnectionLost,
    PeersExhausted,
    StatementReplayed,
)
from django_proxysql.core.outcome import Outcome, Tokens
from django_proxysql.errors import CommitOutcomeUnknown
from tests.app.models import Token
from tests.engine import SQLITE, added, engine, make_outcome_table, mysql_peer
from tests.fakes import until
from tests.other_driver import run_again
from tests.outcomes.cutter import Cutter
from tests.outcomes.trial import Trial
from tests.servers import DATABASE, USER
from tests.servers.mariadb import Node
from tests.servers.scripted import READ_ONLY, MaxScale, Refusal, ScriptedServer
from tests.site import Site, site
from tests.work import Work, run_by

#: What is in the packet of COMMIT, and in no AUTOCOMMIT. psycopg2 sends the token ahead.
COMMIT = b"COMMIT" if os.environ.get("TEST_DRIVER") == "psycopg2" else b"; COMMIT"
#: Hooks of a kind that Django 4.2 brought.
ROBUST = {"robust": True} if django.VERSION >= (4, 2) else {}


def run(connection: Any, *statements: str) -> list[Any]:
    """Run statements by Django's cursor; return the last one's rows."""
    with connection.cursor() as cursor:
        for statement in statements:
            cursor.execute(statement)
        return list(cursor.fetchall()) if cursor.description else []


@contextlib.contextmanager
def recording(server: Any, fault_proxy: Callable[..., Any], **settings: Any) -> Iterator[Site]:
    driver = os.environ.get("TEST_DRIVER")
    is_postgres = type(server).__name__.startswith("Postgre")
    if driver and (driver == "psycopg2") is not is_postgres:
        pytest.skip(f"{driver} is another server's")
    with site(server, fault_proxy, **{"COMMIT_OUTCOME": "record", **settings}) as here:
        make_outcome_table(here.plain)
        yield here


@pytest.fixture(params=["mariadb", "postgres"])
def here(request: pytest.FixtureRequest, fault_proxy: Callable[..., Any]) -> Iterator[Site]:
    with recording(request.getfixturevalue(request.param), fault_proxy) as made:
        yield made


ON_MARIADB = pytest.mark.parametrize("here", ["mariadb"], indirect=True)
ON_POSTGRES = pytest.mark.parametrize("here", ["postgres"], indirect=True)


def tokens(here: Site) -> list[bool]:
    """Who wrote each token that is there: True for a fence."""
    return [bool(fence) for (fence,) in run(here.plain, f"SELECT fence FROM {outcome.TABLE}")]


def inserts(here: Site, token: bytes, is_fence: bool = False) -> str:
    """What a transaction, or a fence, writes."""
    return outcome.insert(here.plain.vendor, outcome.TABLE, token, is_fence)


def resolved(here: Site) -> list[str]:
    return [event.outcome for event in here.events if type(event) is CommitResolved]


def block(here: Site, value: str, **kind: bool) -> list[str]:
    """Write in a block; return what its hook saw, once for each time it ran."""
    ran: list[str] = []
    with transaction.atomic("balanced"):
        transaction.on_commit(lambda: ran.append(value), using="balanced", **kind)
        here.write(value)
    return ran


def rolled_back(here: Site, value: str = "one") -> None:
    """Write in a block whose error says that nothing of it stands."""
    with pytest.raises(OperationalError, match="was rolled back") as raised:
        block(here, value)
    assert not isinstance(raised.value, CommitOutcomeUnknown)


def ends_as_it_was_cut(here: Site, how: str, value: str = "one") -> None:
    """Write in a block whose COMMIT was answered, or did not arrive."""
    if how == "reply":
        assert block(here, value) == [value]
    else:
        rolled_back(here, value)


def change_setting(here: Site, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    """Have the balancer's settings changed for this test."""
    group = here.session.balancer
    monkeypatch.setattr(group, "config", dataclasses.replace(group.config, **changes))


def cut_at_commit(here: Site, how: str, matching: bytes = COMMIT) -> None:
    """Lose the next COMMIT before it arrives, or its reply."""
    if how == "reply":
        here.here.cut_reply(0, matching)
    else:
        here.here.cut_before(matching)


class TestVerdicts:
    def test_answered_commit_leaves_a_token_and_takes_no_round_trip_more(
        self, here: Site, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """psycopg2 alone takes one: it sends no COMMIT but its own."""
        # One token in a thousand has old ones deleted, on another connection.
        monkeypatch.setattr("django_proxysql.backends.tokens._ONE_IN", 1 << 64)
        assert block(here, "first") == ["first"]
        packets = []
        for setting in ("record", None):
            change_setting(here, monkeypatch, commit_outcome=setting)
            before = here.here.client_packets
            block(here, str(setting))
            packets.append(here.here.client_packets - before)
        assert packets[0] - packets[1] == (os.environ.get("TEST_DRIVER") == "psycopg2")
        assert here.written() == ["first", "record", "None"]
        assert (tokens(here), resolved(here)) == ([False, False], [])

    @pytest.mark.parametrize("kind", [{}, ROBUST], ids=["", "robust"])
    def test_committed_block_ends_well_and_runs_its_hooks_once(
        self, here: Site, kind: dict[str, bool]
    ) -> None:
        here.read()
        cut_at_commit(here, "reply")
        assert block(here, "one", **kind) == ["one"]
        assert (here.written(), tokens(here), resolved(here)) == (["one"], [False], ["committed"])
        assert block(here, "two") == ["two"]

    def test_rolled_back_block_says_so(self, here: Site) -> None:
        here.read()
        cut_at_commit(here, "before")
        rolled_back(here)
        assert (here.written(), tokens(here), resolved(here)) == ([], [True], ["rolled_back"])
        assert block(here, "two") == ["two"]


WRITE, READ = "INSERT INTO app_token (value) VALUES ('one')", "SELECT value FROM app_token"
#: Whose words they are; what is said before the block, and in it; whether it has a token.
SAID: list[tuple[str, str | None, list[Any], bool]] = [
    ("both", None, ["SET TRANSACTION READ ONLY", READ], False),
    ("both", None, ["SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY", READ], False),
    ("both", None, ["START TRANSACTION READ ONLY", READ], False),
    ("both", None, ["SET TRANSACTION READ /* and no more */ ONLY", READ], False),
    ("postgresql", None, [b"SET TRANSACTION READ ONLY", READ], False),
    ("postgresql", None, [("SELECT set_config(%s, 'on', true)", ["transaction_read_only"])], False),
    # What the next ones are says nothing of the one that is open.
    ("postgresql", None, [WRITE, "SET default_transaction_read_only = on"], True),
    (
        *("postgresql", "SET default_transaction_read_only = on"),
        *(["SET TRANSACTION READ WRITE", WRITE], True),
    ),
    # The server takes writes to the tables that are locked alone.
    ("mysql", "LOCK TABLES app_token WRITE", [WRITE], False),
]


class TestBlocksWithoutAToken:
    @ON_MARIADB
    def test_that_come_after_unlock_tables_have_one_again(self, here: Site) -> None:
        here.sql("LOCK TABLES app_token WRITE")
        assert block(here, "one") == ["one"]
        here.sql("UNLOCK TABLES")
        assert block(here, "two") == ["two"]
        assert tokens(here) == [False]

    @pytest.mark.parametrize("number", [1, 30])
    def test_of_reads_alone_sends_nothing_more_and_ends_well(self, here: Site, number: int) -> None:
        for cut in (False, True):
            before = here.here.client_packets
            with transaction.atomic("balanced"):
                for _ in range(number):
                    here.read()
                if cut:
                    here.here.cut_after(b"COMMIT")
            if not cut:
                packets = list(here.here.packets)[before - here.here.client_packets :]
                assert not any(b"INSERT" in packet for packet in packets)
                sent = here.here.client_packets - before
                assert sent == number + (3 if here.is_mysql else 2)
        assert (tokens(here), resolved(here)) == ([], [])

    @pytest.mark.parametrize("cut", ["before", "after"])
    def test_of_reads_of_any_size_ends_well(self, here: Site, cut: str) -> None:
        with transaction.atomic("balanced"):
            assert here.sql("SELECT length(%s)", ["x" * 2_000_000]) == [(2_000_000,)]
            getattr(here.here, f"cut_{cut}")(b"COMMIT")
        assert (tokens(here), resolved(here)) == ([], [])

    @pytest.mark.parametrize("comes_back", [True, False])
    def test_of_reads_alone_ends_well_once_a_peer_is_back(
        self, here: Site, monkeypatch: pytest.MonkeyPatch, comes_back: bool
    ) -> None:
        """It is unknown where none is back in time."""

        def exhausted(event: Any) -> None:
            if type(event) is PeersExhausted:
                here.clock.advance(31)
                for proxy in here.proxies:
                    proxy.forward()

        here.read()
        if comes_back:
            here.balancer.add_listener(exhausted)
        else:
            change_setting(here, monkeypatch, outcome_deadline=0.3)
        ends = contextlib.nullcontext() if comes_back else pytest.raises(CommitOutcomeUnknown)
        with ends, transaction.atomic("balanced"):
            here.read()
            here.here.cut_after(b"COMMIT")
            for proxy in here.proxies:
                proxy.refuse()
        assert PeersExhausted in map(type, here.events)
        assert (tokens(here), resolved(here)) == ([], [])

    @ON_POSTGRES
    def test_of_a_view_that_writes_is_unknown_and_of_a_function_is_not(self, here: Site) -> None:
        """The view's text is a read's. A function's name is one that may write: it has a token."""
        run(
            here.plain,
            "CREATE FUNCTION writes() RETURNS int LANGUAGE sql VOLATILE"
            " AS $$ INSERT INTO app_token (value) VALUES ('by a read') RETURNING 1 $$",
            "CREATE VIEW writing AS SELECT writes() AS a",
        )
        try:
            with transaction.atomic("balanced"):
                here.sql("SELECT writes()")
                cut_at_commit(here, "reply")
            assert (tokens(here), resolved(here)) == ([False], ["committed"])
            prepare(here)
            with pytest.raises(CommitOutcomeUnknown), transaction.atomic("balanced"):
                here.sql("SELECT a FROM writing")
                here.here.cut_after(b"COMMIT")
        finally:
            run(here.plain, "DROP FUNCTION writes() CASCADE")

    @pytest.mark.parametrize("cut", [None, "before", "after"])
    def test_that_was_begun_by_hand_has_none(self, here: Site, cut: str | None) -> None:
        here.read()
        here.connection.set_autocommit(False)
        here.write("one")
        if cut:
            getattr(here.here, f"cut_{cut}")(b"COMMIT")
        with pytest.raises(CommitOutcomeUnknown) if cut else contextlib.nullcontext():
            here.connection.commit()
        assert (tokens(here), resolved(here)) == ([], [])

    def test_that_a_change_of_the_schema_has_split_is_unknown(self, here: Site) -> None:
        """What came before MySQL's DDL stands whatever becomes of COMMIT."""
        try:
            with pytest.raises(OperationalError) as raised, transaction.atomic("balanced"):
                here.write("one")
                here.sql("CREATE TABLE split (a int)")
                here.write("two")
                here.here.cut_before(COMMIT if not here.is_mysql else b"COMMIT")
            assert isinstance(raised.value, CommitOutcomeUnknown) is here.is_mysql
            assert here.written() == (["one"] if here.is_mysql else [])
            is_there = "split" in here.plain.introspection.table_names()
            assert is_there is here.is_mysql
        finally:
            run(here.plain, "DROP TABLE IF EXISTS split")

    @ON_POSTGRES
    def test_that_failed_on_the_way_ends_as_with_the_plain_engine(self, here: Site) -> None:
        """PostgreSQL answers its COMMIT with a rollback, and takes no token."""
        with transaction.atomic("balanced"):
            here.write("one")
            with contextlib.suppress(DatabaseError):
                here.sql("SELECT 1 / 0")
        assert (here.written(), tokens(here)) == ([], [])

    @ON_POSTGRES
    @pytest.mark.parametrize("ends", ["released", "rolled back", "never was"])
    def test_that_is_not_read_only_at_its_end_has_one(self, here: Site, ends: str) -> None:
        """PostgreSQL's SET TRANSACTION ends with the savepoint that it was sent in."""
        here.read()
        cut_at_commit(here, "reply")
        with transaction.atomic("balanced"):
            with contextlib.suppress(KeyError), transaction.atomic("balanced"):
                here.read()
                is_not = ends == "never was"
                here.sql(f"SET transaction_read_only TO {'off' if is_not else 'on'}")
                if ends == "rolled back":
                    raise KeyError
            here.write("one")
        assert (here.written(), tokens(here), resolved(here)) == (["one"], [False], ["committed"])

    @ON_MARIADB
    def test_of_a_session_that_writes_on_its_galera_node_alone_has_none(self, here: Site) -> None:
        """Another node could only say that nothing of it is there."""
        here.server.sql(f"GRANT SUPER ON *.* TO '{USER}'@'%'")
        try:
            here.connection.close()
            here.sql("SET SESSION wsrep_on = OFF")
            cut_at_commit(here, "reply", b"\x03COMMIT")
            with pytest.raises(CommitOutcomeUnknown):
                block(here, "one")
        finally:
            here.server.sql(f"REVOKE SUPER ON *.* FROM '{USER}'@'%'")
        assert (here.written(), tokens(here), resolved(here)) == (["one"], [], [])

    @pytest.mark.parametrize("what", ["session", "next transaction", "server"])
    def test_whose_server_takes_no_writes_ends_well_without_one(
        self, here: Site, what: str
    ) -> None:
        """A function's name is one that may write. Without the setting such a block ends well."""
        if what == "next transaction" and not here.is_mysql:
            pytest.skip("what MySQL's SET TRANSACTION is, outside of a transaction")
        how = "RETURN 7" if here.is_mysql else "LANGUAGE sql AS 'SELECT 7'"
        run(here.plain, f"CREATE FUNCTION seven() RETURNS int {how}")
        said = {
            "session": "SET SESSION TRANSACTION READ ONLY",
            "next transaction": "SET TRANSACTION READ ONLY",
        }
        if not here.is_mysql:
            said["session"] = "SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY"
        ran: list[int] = []
        try:
            with no_writes(here) if what == "server" else contextlib.nullcontext():
                here.connection.close()
                if what in said:
                    here.sql(said[what])
                with transaction.atomic("balanced"):
                    transaction.on_commit(lambda: ran.append(1), using="balanced")
                    assert here.sql("SELECT seven()") == [(7,)]
        finally:
            run(here.plain, "DROP FUNCTION seven")
        assert (ran, tokens(here)) == ([1], [])
        here.connection.close()
        assert block(here, "one") == ["one"]
        assert tokens(here) == [False]

    @pytest.mark.skipif(django.VERSION < (4, 2), reason="assume_role came with Django 4.2")
    @pytest.mark.parametrize("how", ["before", "reply"])
    def test_a_role_that_django_assumes_is_the_fences_too(
        self, postgres: Any, fault_proxy: Callable[..., Any], how: str
    ) -> None:
        """The table belongs to the role, of which the user inherits nothing."""
        granted = (
            f"CREATE ROLE owner; GRANT owner TO {USER}; ALTER ROLE {USER} NOINHERIT;"
            " GRANT ALL ON app_token, app_token_id_seq TO owner;"
            f" ALTER TABLE {outcome.TABLE} OWNER TO owner"
        )
        taken = f"ALTER ROLE {USER} INHERIT; DROP OWNED BY owner; DROP ROLE owner"
        with recording(postgres, fault_proxy) as here:
            postgres.sql(granted, DATABASE)
            try:
                here.connection.close()
                options = {**here.connection.settings_dict["OPTIONS"], "assume_role": "owner"}
                here.connection.settings_dict["OPTIONS"] = options
                here.sql("SELECT 1")
                cut_at_commit(here, how)
                ends_as_it_was_cut(here, how)
            finally:
                here.connection.close()
                postgres.sql(taken, DATABASE)

    @pytest.mark.parametrize(("servers", "before", "statements", "has_one"), SAID, ids=str)
    def test_that_the_application_has_made_read_only_has_none(
        self,
        here: Site,
        servers: str,
        before: str | None,
        statements: list[Any],
        has_one: bool,
    ) -> None:
        """The server takes none there. Without the setting such a block ends well."""
        if servers not in ("both", here.connection.vendor):
            pytest.skip(f"{servers}'s words")
        here.sql(before or "SELECT 1")
        with transaction.atomic("balanced"):
            for statement in statements:
                here.sql(*statement) if isinstance(statement, tuple) else here.sql(statement)
        # It may have tables locked.
        here.connection.close()
        assert here.written() == (["one"] if WRITE in statements else [])
        assert tokens(here) == ([False] if has_one else [])

    def test_without_the_setting_nothing_is_asked(
        self, here: Site, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """No function of this is called, and nothing of it is sent."""
        change_setting(here, monkeypatch, commit_outcome=None)
        called: list[str] = []

        def profile(frame: Any, event: str, _: Any) -> None:
            if event == "call" and frame.f_code.co_filename.endswith(
                ("outcome.py", "outcomes.py", "tokens.py")
            ):
                called.append(frame.f_code.co_name)

        here.read()
        here.connection.close()
        before = sys.getprofile()
        sys.setprofile(profile)
        try:
            block(here, "one")
        finally:
            sys.setprofile(before)
        assert called == []
        assert (here.written(), tokens(here)) == (["one"], [])


def unfit(here: Site) -> str:
    """What has the table prove nothing."""
    return "ENGINE = MyISAM" if here.is_mysql else "SET UNLOGGED"


class TestTable:
    """What is wrong with the table is an error that says so, and commits nothing."""

    def refused(self, here: Site, match: str) -> Exception:
        here.read()
        with pytest.raises(DatabaseError, match=match) as raised:
            block(here, "one")
        assert not isinstance(raised.value, CommitOutcomeUnknown)
        assert here.written() == []
        assert resolved(here) == []
        return raised.value

    @pytest.mark.parametrize("known", [False, True], ids=["", "it was there before"])
    def test_missing(self, here: Site, known: bool) -> None:
        if known:
            block(here, "one")
            run(here.plain, "DELETE FROM app_token")
        run(here.plain, f"DROP TABLE {outcome.TABLE}")
        said = str(self.refused(here, "balanced: COMMIT_OUTCOME is 'record', and there is no"))
        assert "manage.py migrate --database balanced" in said
        make_outcome_table(here.plain)
        assert block(here, "two") == ["two"]

    @ON_POSTGRES
    def test_is_found_whatever_the_first_block_sets(self, here: Site) -> None:
        with transaction.atomic("balanced"):
            here.write("one")
            here.sql("SET LOCAL search_path = pg_catalog")
        assert tokens(here) == [False]

    @ON_POSTGRES
    def test_that_has_moved_is_found_again(self, here: Site) -> None:
        block(here, "one")
        run(here.plain, "DELETE FROM app_token")
        here.server.sql(f"CREATE SCHEMA {USER} AUTHORIZATION {USER}", DATABASE)
        try:
            run(here.plain, f"ALTER TABLE {outcome.TABLE} SET SCHEMA {USER}")
            self.refused(here, "there is no table")
            assert block(here, "two") == ["two"]
            assert tokens(here) == [False, False]
        finally:
            here.server.sql(f"DROP SCHEMA {USER} CASCADE", DATABASE)

    @pytest.mark.parametrize("how", ["before", "reply"])
    def test_of_another_database_says_nothing_of_a_transaction(
        self, here: Site, monkeypatch: pytest.MonkeyPatch, how: str
    ) -> None:
        """An application may choose each tenant's database in the settings, for all its threads."""
        rights = {True: f"GRANT ALL ON other.* TO '{USER}'@'%'", False: f"SET ROLE {USER}"}
        here.server.sql("CREATE DATABASE other")
        try:
            if not here.is_mysql:
                here.server.sql(f"GRANT ALL ON SCHEMA public TO {USER}", "other")
            made = f"{rights[here.is_mysql]}; {outcome.creates(here.plain.vendor)}"
            here.server.sql(made, "other")
            change_setting(here, monkeypatch, outcome_deadline=1.0)
            here.read()
            with monkeypatch.context() as patch:
                cut_at_commit(here, how)
                expected: Any = contextlib.nullcontext()
                if not here.is_mysql or how == "before":
                    expected = pytest.raises(OperationalError)
                with expected as raised, transaction.atomic("balanced"):
                    here.write("one")
                    patch.setitem(here.connection.settings_dict, "NAME", "other")
            # MySQL's session reaches each database of its server. PostgreSQL's reaches its own.
            if raised:
                assert isinstance(raised.value, CommitOutcomeUnknown) is not here.is_mysql
            assert here.written() == (["one"] if how == "reply" else [])
            prepare(here)
            assert block(here, "two") == ["two"]
        finally:
            here.connection.close()
            here.server.sql("DROP DATABASE other")

    @ON_POSTGRES
    @pytest.mark.skipif("TEST_DRIVER" in os.environ, reason="a mode of psycopg 3's")
    @pytest.mark.parametrize("is_lost", [False, True])
    def test_is_found_in_pipeline_mode(self, here: Site, is_lost: bool) -> None:
        """Where statements are answered later."""
        here.read()
        raises: Any = contextlib.nullcontext()
        if is_lost:
            here.here.cut_before(b"COMMIT")
            raises = pytest.raises(OperationalError, match="rolled back")
        with raises, here.connection.connection.pipeline():
            assert block(here, "one") == ["one"]
        assert (here.written(), tokens(here)) == ([] if is_lost else ["one"], [is_lost])

    def test_no_rights_on_it(self, here: Site) -> None:
        with no_rights(here):
            self.refused(here, "may not write to django_proxysql_commit")
        assert block(here, "two") == ["two"]

    @pytest.mark.parametrize("key", [True, False], ids=["", "no key"])
    @pytest.mark.parametrize("how", ["before", "reply"])
    def test_rows_that_prove_nothing_leave_the_outcome_unknown(
        self, here: Site, how: str, key: bool
    ) -> None:
        """MyISAM keeps what a rollback undoes, and a crash empties an UNLOGGED table.

        Without the key both rows can stand.
        """
        change = unfit(here)
        if not key:
            named = "PRIMARY KEY" if here.is_mysql else f"CONSTRAINT {outcome.TABLE}_pkey"
            change = f"DROP {named}"
        run(here.plain, f"ALTER TABLE {outcome.TABLE} {change}")
        here.read()
        cut_at_commit(here, how)
        with pytest.raises(CommitOutcomeUnknown):
            block(here, "one")
        assert resolved(here) == ["unknown"]

    def test_the_check_says_what_is_wrong(self, here: Site) -> None:
        assert problems(here.connection) == []
        assert tokens(here) == []
        run(here.plain, f"ALTER TABLE {outcome.TABLE} {unfit(here)}")
        assert "prove nothing" in problems(here.connection)[0].msg
        run(here.plain, f"DROP TABLE {outcome.TABLE}")
        (found,) = problems(here.connection)
        assert "there is no table" in found.msg
        assert "manage.py migrate --database balanced" in found.hint
        make_outcome_table(here.plain)
        with no_rights(here):
            assert "cannot be written" in problems(here.connection)[0].msg

    def test_migrate_makes_it_where_the_setting_is_and_nowhere_else(self, here: Site) -> None:
        config = apps.get_app_config("django_proxysql")
        for alias, is_there in (("plain", False), ("balanced", True), ("balanced", True)):
            run(here.plain, f"DROP TABLE IF EXISTS {outcome.TABLE}")
            pre_migrate.send(config, app_config=config, using=alias, verbosity=0)
            assert (outcome.TABLE in here.plain.introspection.table_names()) is is_there
        # It is there: nothing is done, and nothing of it is lost.
        assert block(here, "one") == ["one"]
        pre_migrate.send(config, app_config=config, using="balanced", verbosity=0)
        assert tokens(here) == [False]

    @pytest.mark.parametrize(
        "entry",
        [{"ENGINE": ENGINE, "PEER_ENGINE": SQLITE, "PEERS": [{}]}, {"ENGINE": SQLITE}],
        ids=["balancer", "plain"],
    )
    def test_an_engine_without_tokens_migrates_without_it(
        self, tmp_path: Path, entry: dict[str, Any]
    ) -> None:
        """The setting has no effect there, as its check says: production's settings on SQLite."""
        own = {"NAME": str(tmp_path / "shop"), "COMMIT_OUTCOME": "record"}
        with added({"shop": {**entry, **own}}):
            call_command("migrate", database="shop", verbosity=0)
            assert outcome.TABLE not in connections["shop"].introspection.table_names()
            said = io.StringIO()
            call_command("prune_commits", stdout=said)
            assert said.getvalue().startswith("There is no load balancer")
            with pytest.raises(CommandError, match=r"^'shop' is no load .* Leave --database out"):
                call_command("prune_commits", database="shop")


TOKEN = Tokens().next()


@pytest.fixture
def known_token(monkeypatch: pytest.MonkeyPatch) -> bytes:
    """Have every transaction write this token."""
    monkeypatch.setattr(outcomes._tokens, "next", lambda: TOKEN)
    return TOKEN


def elsewhere(here: Site) -> list[Any]:
    """The proxies that the present connection does not go through."""
    return [proxy for proxy in here.proxies if proxy is not here.here]


class TestFaults:
    """Each ends in the right verdict or in none."""

    def test_the_peer_that_lost_it_is_asked_after_the_others(self, here: Site) -> None:
        here.read()
        (other,), mine = elsewhere(here), here.here
        before = mine.accepted, other.accepted
        cut_at_commit(here, "reply")
        assert block(here, "one") == ["one"]
        assert mine.accepted == before[0]
        assert other.accepted > before[1]

    def test_a_fence_that_is_there_already_ends_the_block(
        self, here: Site, known_token: bytes
    ) -> None:
        """This process was stopped while another fenced it."""
        run(
            here.plain, outcome.insert(here.plain.vendor, outcome.TABLE, known_token, is_fence=True)
        )
        here.read()
        rolled_back(here)
        assert (here.written(), resolved(here)) == ([], ["rolled_back"])

    def test_its_own_row_that_is_there_already_says_that_the_transaction_stands(
        self, here: Site, known_token: bytes
    ) -> None:
        """Something in between ran it twice, as MaxScale's ``transaction_replay`` does."""
        own = inserts(here, known_token)
        run(here.plain, "INSERT INTO app_token (value) VALUES ('one')", own)
        here.read()
        work = Work(here, losses=0)
        work.retrying()
        assert (work.runs, work.hooks, here.written()) == (1, [1], ["one"])
        assert (tokens(here), resolved(here)) == ([False], ["committed"])

    @ON_POSTGRES
    def test_a_token_is_known_by_its_table_whatever_its_key_is_named(self, here: Site) -> None:
        """As after a rebuild of the key: ``ADD PRIMARY KEY USING INDEX``."""
        table, key = f"ALTER TABLE {outcome.TABLE}", f"{outcome.TABLE}_pkey"
        run(here.plain, f"{table} RENAME CONSTRAINT {key} TO rebuilt")
        try:
            here.read()
            cut_at_commit(here, "reply")
            assert block(here, "one") == ["one"]
        finally:
            run(here.plain, f"{table} RENAME CONSTRAINT rebuilt TO {key}")

    @ON_POSTGRES
    def test_a_value_that_is_named_like_the_table_is_no_token(self, here: Site) -> None:
        """COMMIT checks a deferred constraint, and its error quotes the value."""
        named = f"INSERT INTO once VALUES ('{outcome.TABLE}')"
        unique = "UNIQUE DEFERRABLE INITIALLY DEFERRED"
        run(here.plain, f"CREATE TABLE once (value text {unique})", named)
        try:
            with pytest.raises(IntegrityError), transaction.atomic("balanced"):
                here.sql(named)
        finally:
            run(here.plain, "DROP TABLE once")
        assert (tokens(here), resolved(here)) == ([], [])

    @pytest.mark.parametrize("cut", ["before", "reply"])
    def test_a_loss_of_the_token_ahead_of_commit_is_not_asked_about(
        self, request: pytest.FixtureRequest, fault_proxy: Callable[..., Any], cut: str
    ) -> None:
        """COMMIT was never sent: that is a loss in the block."""
        driver = os.environ.get("TEST_DRIVER")
        if driver == "pymysql":
            pytest.skip("an option of mysqlclient's")
        server = request.getfixturevalue("postgres" if driver else "mariadb")
        options = {} if driver else {"multi_statements": False}
        with recording(server, fault_proxy, OPTIONS=options) as here:
            token = outcome.TABLE.encode()
            work = Work(here, lose=lambda: cut_at_commit(here, cut, token))
            work.retrying()
            work.stands_once(2)
            assert resolved(here) == []

    def test_a_fence_whose_answer_is_lost_is_not_taken_for_the_transaction(
        self, here: Site
    ) -> None:
        here.read()
        cut_at_commit(here, "before")
        for proxy in elsewhere(here):
            proxy.cut_after(b"COMMIT")
        rolled_back(here)
        assert (here.written(), tokens(here), resolved(here)) == ([], [True], ["rolled_back"])

    @pytest.mark.parametrize("limit", [Exception, TimeoutError, KeyboardInterrupt])
    def test_a_time_limit_while_the_peers_are_asked_is_raised(
        self, here: Site, monkeypatch: pytest.MonkeyPatch, limit: type[BaseException]
    ) -> None:
        """The block may stand, and its hooks do not run."""

        class TimeLimit(limit):  # type: ignore[misc]
            pass

        here.read()
        cut_at_commit(here, "reply")
        ran: list[str] = []
        with monkeypatch.context() as patch, pytest.raises(TimeLimit):
            patch.setattr(outcomes, "_fence", mock.Mock(side_effect=TimeLimit))
            with transaction.atomic("balanced"):
                transaction.on_commit(lambda: ran.append("one"), using="balanced")
                here.write("one")
        assert (here.written(), ran) == (["one"], [])
        assert block(here, "two") == ["two"]

    @pytest.mark.parametrize("how", ["before", "reply"])
    @pytest.mark.parametrize("way", ["signal", "listener", "log"])
    def test_a_receiver_may_use_the_database_meanwhile(
        self, here: Site, receive: Any, monkeypatch: pytest.MonkeyPatch, way: str, how: str
    ) -> None:
        """The wrapper is in no block any more, and not in autocommit yet."""

        def note(*_args: Any, **_named: Any) -> None:
            with transaction.atomic("balanced"):
                run(connections["balanced"], "INSERT INTO app_token (value) VALUES ('noted')")
            close_old_connections()

        handler = logging.Handler()
        handler.emit = note  # type: ignore[method-assign]
        handler.addFilter(lambda record: "COMMIT" in record.getMessage())
        if way == "signal":
            receive(signals.commit_resolved, note)
        elif way == "log":
            monkeypatch.setattr(logging.getLogger("django_proxysql"), "handlers", [handler])
        else:
            here.balancer.add_listener(lambda one: type(one) is CommitResolved and note())
        here.read()
        cut_at_commit(here, how)
        ends_as_it_was_cut(here, how)
        assert here.written() == [*(["one"] if how == "reply" else []), "noted"]
        assert here.connection is connections["balanced"]
        here.write("two")
        assert here.written()[-1] == "two"

    @pytest.mark.parametrize("kind", [ConnectionLost, StatementReplayed])
    @pytest.mark.parametrize("is_first", [True, False])
    def test_a_listener_to_a_loss_that_is_made_good_gives_no_block_up(
        self, here: Site, is_first: bool, kind: type
    ) -> None:
        """A model's save() that fails in a block marks it: what is run again there fails."""

        def note(event: Any) -> None:
            if type(event) is kind:
                Token(value="noted").save(using="balanced")

        here.balancer.add_listener(note)
        here.read()
        hooks: list[int] = []
        with transaction.atomic("balanced"):
            transaction.on_commit(lambda: hooks.append(1), using="balanced")
            if not is_first:
                here.read()
            here.cut("before")
            here.write("one")
        assert hooks == [1]
        assert len(here.replayed()) == 1
        assert sorted(here.written()) == ["noted", "one"]

    @pytest.mark.parametrize("end", ["rollback", "by hand"])
    def test_what_a_listener_to_the_loss_does_harms_no_later_block(
        self, here: Site, end: str
    ) -> None:
        def disturb(event: Any) -> None:
            if type(event) is ConnectionLost:
                with transaction.atomic("balanced"):
                    run(connections["balanced"], "SELECT 1")

        here.balancer.add_listener(disturb)
        if end == "rollback":
            with pytest.raises(KeyError), transaction.atomic("balanced"):
                here.write("one")
                here.kill()
                raise KeyError
        else:
            here.connection.set_autocommit(False)
            here.write("one")
            here.here.cut_before(b"COMMIT")
            with pytest.raises(CommitOutcomeUnknown):
                here.connection.commit()
            with pytest.raises((OperationalError, InterfaceError)):
                here.connection.rollback()
            here.connection.close()
        assert here.connection.get_autocommit()
        assert not here.connection.in_atomic_block
        here.write("two")
        assert here.written() == ["two"]

    @pytest.mark.skipif(
        os.environ.get("TEST_DRIVER") == "psycopg2",
        reason="its token goes ahead of COMMIT, and would wait for this thread's own lock",
    )
    def test_a_lock_that_is_held_for_longer_than_the_deadline_leaves_it_unknown(
        self, here: Site, known_token: bytes, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        change_setting(here, monkeypatch, outcome_deadline=1.5)
        here.read()
        cut_at_commit(here, "before")
        with pytest.raises(CommitOutcomeUnknown), transaction.atomic("plain"):
            run(here.plain, inserts(here, known_token))
            block(here, "one")
        assert resolved(here) == ["unknown"]

    @pytest.mark.parametrize("how", ["before", "reply"])
    def test_a_peer_that_takes_no_writes_is_asked_again(
        self, here: Site, monkeypatch: pytest.MonkeyPatch, how: str
    ) -> None:
        plain_ask, asked = outcomes._ask, []

        def ask(*arguments: Any) -> Any:
            with no_writes(here) if len(asked) < 2 else contextlib.nullcontext():
                asked.append(plain_ask(*arguments))
            return asked[-1]

        monkeypatch.setattr(outcomes, "_ask", ask)
        here.read()
        cut_at_commit(here, how)
        ends_as_it_was_cut(here, how)
        told = Outcome.COMMITTED if how == "reply" else Outcome.ROLLED_BACK
        assert asked == [None, None, told]

    @ON_MARIADB
    def test_a_server_that_takes_no_writes_any_more_commits_nothing(self, here: Site) -> None:
        with (
            contextlib.ExitStack() as stack,
            pytest.raises(DatabaseError, match="read-only") as raised,
            transaction.atomic("balanced"),
        ):
            here.write("one")
            stack.enter_context(no_writes(here))
        assert not isinstance(raised.value, CommitOutcomeUnknown)
        assert (here.written(), tokens(here), resolved(here)) == ([], [], [])

    def test_a_full_disk_at_the_token_commits_nothing_and_asks_no_peer(self, here: Site) -> None:
        here.read()
        with full_disk(here, fences=False), pytest.raises(DatabaseError, match=FULL) as raised:
            block(here, "one")
        assert not isinstance(raised.value, CommitOutcomeUnknown)
        assert (here.written(), tokens(here), resolved(here)) == ([], [], [])
        assert block(here, "two") == ["two"]

    @pytest.mark.parametrize("how", ["before", "reply"])
    @pytest.mark.parametrize("why", ["full disk at the fence", "no peer"])
    def test_it_stays_unknown_where_no_peer_can_tell_in_time(
        self, here: Site, monkeypatch: pytest.MonkeyPatch, how: str, why: str
    ) -> None:
        change_setting(here, monkeypatch, outcome_deadline=0.4)
        here.read()
        cut_at_commit(here, how)
        if why == "no peer":
            for proxy in here.proxies:
                proxy.refuse()
        full = full_disk(here, fences=True) if why != "no peer" else contextlib.nullcontext()
        with full, pytest.raises(CommitOutcomeUnknown):
            block(here, "one")
        assert resolved(here) == ["unknown"]
        assert here.written() == (["one"] if how == "reply" else [])

    def test_a_peer_whose_circuit_is_open_is_asked_where_no_other_answers(self, here: Site) -> None:
        """It has come back, and the one that COMMIT was sent to is gone."""
        here.read()
        (other,) = elsewhere(here)
        for peer in here.balancer.peers.values():
            if peer is not here.connection.peer:
                peer.breaker.open()
        cut_at_commit(here, "reply")
        assert block(here, "one") == ["one"]
        assert other.accepted == 0
        here.read()
        here.here.cut_before(COMMIT)
        here.here.refuse()
        rolled_back(here, "two")
        assert other.accepted == 1

    def test_where_peers_may_lag_only_the_transactions_own_is_asked(
        self, here: Site, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        change_setting(here, monkeypatch, synchronous_peers=False)
        here.read()
        others = {proxy: proxy.accepted for proxy in elsewhere(here)}
        cut_at_commit(here, "reply")
        assert block(here, "one") == ["one"]
        assert {proxy: proxy.accepted for proxy in others} == others

    @pytest.mark.skipif("TEST_DRIVER" in os.environ, reason="an option of mysqlclient's")
    @pytest.mark.parametrize("how", ["before", "reply"])
    def test_without_multi_statements_it_takes_two_packets(
        self, mariadb: Any, fault_proxy: Callable[..., Any], how: str
    ) -> None:
        with recording(mariadb, fault_proxy, OPTIONS={"multi_statements": False}) as here:
            assert block(here, "one") == ["one"]
            packets = list(here.here.packets)
            assert not any(b"; COMMIT" in packet for packet in packets)
            cut_at_commit(here, how, b"COMMIT")
            ends_as_it_was_cut(here, how, "two")
            assert here.written() == ["one", *(["two"] if how == "reply" else [])]

    @pytest.mark.parametrize("how", ["before", "reply"])
    def test_behind_pgbouncer_in_transaction_mode(
        self,
        postgres: Any,
        pgbouncer: Callable[..., Any],
        fault_proxy: Callable[..., Any],
        how: str,
    ) -> None:
        pooler = pgbouncer(postgres, pool_mode="transaction")
        known = type("PostgreSQL behind it", (), {"host": pooler.host, "port": pooler.port})
        with recording(known(), fault_proxy) as here:
            here.read()
            cut_at_commit(here, how)
            ends_as_it_was_cut(here, how)
            assert here.plain_rows() == (["one"] if how == "reply" else [])
            # What was set for one question stays with no server's session.
            assert run(here.plain, "SHOW lock_timeout") == [("0",)]

    @pytest.mark.skipif("TEST_DRIVER" in os.environ, reason="of the proxies alone")
    @pytest.mark.parametrize("refusal", [1064, None], ids=["refuses", "runs the first"])
    def test_a_proxy_that_takes_no_two_statements_gets_them_one_by_one(
        self, refusal: int | None
    ) -> None:
        with ScriptedServer() as server, behind(server) as connection:
            if refusal:
                server.refusals["; COMMIT"] = Refusal(refusal, "You have an error near '; COMMIT'")
            for value in ("one", "two"):
                with transaction.atomic("balanced"):
                    run(connection, f"INSERT INTO a VALUES ('{value}')")
            ends = [said for said in server.statements("COMMIT") if "AUTO" not in said.upper()]
            assert sum(said.endswith("; COMMIT") for said in ends) == (1 if refusal else 2)
            assert ends.count("COMMIT") == 2

    @pytest.mark.skipif("TEST_DRIVER" in os.environ, reason="of the proxies alone")
    @pytest.mark.parametrize("is_proxy", [False, True], ids=["server", "proxy"])
    def test_commit_alone_follows_a_servers_own_refusal_of_the_token_and_no_proxys(
        self, is_proxy: bool
    ) -> None:
        """A proxy may say so of a transaction that went with its server."""
        server = MaxScale() if is_proxy else ScriptedServer()
        with server, behind(server) as connection:
            server.refusals["; COMMIT"] = Refusal(1290, READ_ONLY + " statement")
            raises: Any = contextlib.nullcontext()
            if is_proxy:
                raises = pytest.raises(OperationalError, match="was rolled back")
            with raises, transaction.atomic("balanced"):
                run(connection, "INSERT INTO a VALUES ('one')")
            mine = next(thread for thread, said in server.said if said.endswith("; COMMIT"))
            assert ((mine, "COMMIT") in server.said) is not is_proxy


@contextlib.contextmanager
def changed(here: Site, on: str, off: str, *database: str) -> Iterator[None]:
    """Have the server's administrator change something meanwhile."""
    here.server.sql(on, *database)
    try:
        yield
    finally:
        here.server.sql(off, *database)


def no_writes(here: Site) -> Any:
    """Have the server take no writes: PostgreSQL those of new sessions, MariaDB any."""
    if here.is_mysql:
        return changed(here, "SET GLOBAL read_only = 1", "SET GLOBAL read_only = 0")
    # Not off: a database's own setting goes before the server's, in every later test.
    alter, name = f"ALTER DATABASE {DATABASE}", "default_transaction_read_only"
    return changed(here, f"{alter} SET {name} = on", f"{alter} RESET {name}")


FULL = "No space left"


def full_disk(here: Site, fences: bool) -> Any:
    """Have the server answer as on a full disk where a fence, or a transaction, writes a token."""
    trigger = f"CREATE TRIGGER full_disk BEFORE INSERT ON {outcome.TABLE} FOR EACH ROW"
    which = "NEW.fence" if fences else "NOT NEW.fence"
    if here.is_mysql:
        raises = f"SIGNAL SQLSTATE 'HY000' SET MYSQL_ERRNO = 1021, MESSAGE_TEXT = '{FULL}'"
        on = f"{trigger} BEGIN IF {which} THEN {raises}; END IF; END"
        return changed(here, on, "DROP TRIGGER full_disk", DATABASE)
    raises = f"RAISE EXCEPTION '{FULL}' USING ERRCODE = 'disk_full'"
    on = (
        "CREATE FUNCTION full_disk() RETURNS trigger LANGUAGE plpgsql"
        f" AS $$ BEGIN {raises}; END $$;"
        f"{trigger} WHEN ({which}) EXECUTE FUNCTION full_disk()"
    )
    return changed(here, on, "DROP FUNCTION full_disk CASCADE", DATABASE)


@contextlib.contextmanager
def no_rights(here: Site) -> Iterator[None]:
    """Take the user's rights on the table away."""
    account, table = f"'{USER}'@'%'", f"{DATABASE}.app_token"
    taken = f"REVOKE INSERT ON *.* FROM {account}; GRANT INSERT ON {table} TO {account}"
    given = f"REVOKE INSERT ON {table} FROM {account}; GRANT INSERT ON *.* TO {account}"
    if not here.is_mysql:
        taken, given = (f"ALTER TABLE {outcome.TABLE} OWNER TO {who}" for who in ("postgres", USER))
    with changed(here, taken, given, DATABASE):
        here.connection.close()
        yield
    here.connection.close()


@contextlib.contextmanager
def behind(server: Any) -> Iterator[Any]:
    """Yield a connection to a scripted server, of a balancer that records."""
    peer = {"HOST": server.host, "PORT": server.port, "USER": "app", "NAME": "app"}
    with engine([peer], COMMIT_OUTCOME="record", CONN_MAX_AGE=None) as connection:
        yield connection


class TestOldTokens:
    def old(self, here: Site, hours: float, by: str) -> None:
        """Write a token that is old by its own time, by the server's, or by both."""
        made = time.time() - hours * 3600 if by != "server" else time.time()
        with mock.patch.object(outcome.time, "time", return_value=made):
            statement = inserts(here, Tokens().next())
        if by != "token":
            now, ago = "clock_timestamp()", f"interval '{hours} hours'"
            if here.is_mysql:
                now, ago = "UTC_TIMESTAMP(6)", f"INTERVAL {hours} HOUR"
            assert now in statement
            statement = statement.replace(now, f"{now} - {ago}")
        run(here.plain, statement)

    def test_are_deleted_where_two_clocks_agree(
        self, here: Site, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(backends.tokens, "_ROWS", 1)
        for hours in (2, 26, 50):
            for by in ("token", "server", "both"):
                self.old(here, hours, by)
        assert delete_old(here.connection, 86_400) == 2
        assert delete_old(here.connection, 3600) == 1
        assert len(tokens(here)) == 6

    def test_none_that_may_be_in_doubt_is_deleted(self, here: Site) -> None:
        block(here, "one")
        with pytest.raises(ValueError, match="in doubt"):
            delete_old(here.connection, 3599)
        assert delete_old(here.connection, 3600) == 0
        assert tokens(here) == [False]

    def test_the_command(self, here: Site) -> None:
        self.old(here, 26, "both")
        self.old(here, 3, "both")
        for wrong in ("59m", "0h", "1", "-1d", "1.5d"):
            with pytest.raises(CommandError, match="at least 1h"):
                call_command("prune_commits", f"--older-than={wrong}")
        with pytest.raises(CommandError, match=r"'plain' is no load balancer .* has COMMIT"):
            call_command("prune_commits", database="plain")
        run(here.plain, f"ALTER TABLE {outcome.TABLE} RENAME TO moved")
        with pytest.raises(CommandError, match=r"no table .* migrate --database balanced"):
            call_command("prune_commits")
        run(here.plain, f"ALTER TABLE moved RENAME TO {outcome.TABLE}")
        said = io.StringIO()
        call_command("prune_commits", stdout=said)
        call_command("prune_commits", "--older-than=2h", "--database=balanced", stdout=said)
        assert said.getvalue() == "balanced: 1 tokens deleted\n" * 2
        assert tokens(here) == []

    @pytest.mark.skipif("TEST_DRIVER" in os.environ, reason="the driver makes no difference")
    def test_a_database_without_the_table_keeps_no_other_from_being_pruned(
        self, mariadb_pair: tuple[Node, Node]
    ) -> None:
        first, second = ([mysql_peer(node)] for node in mariadb_pair)
        with (
            engine(first, alias="first", COMMIT_OUTCOME="record") as without,
            engine(second, alias="second", COMMIT_OUTCOME="record") as connection,
        ):
            make_outcome_table(connection)
            with without.cursor() as cursor:
                cursor.execute(f"DROP TABLE IF EXISTS {outcome.TABLE}")
            said = io.StringIO()
            with pytest.raises(CommandError, match=r"^first: there is no table"):
                call_command("prune_commits", stdout=said)
        assert said.getvalue() == "second: 0 tokens deleted\n"

    def test_one_transaction_in_a_thousand_has_some_deleted(
        self, here: Site, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(backends.tokens, "_ROWS", 1)
        for _ in range(4):
            self.old(here, 26, "both")
        self.old(here, 3, "both")
        token = TOKEN[:8] + (1 << 63 | 1000 - (1 << 63) % 1000).to_bytes(8, "big")
        monkeypatch.setattr(outcomes._tokens, "next", lambda: token)
        assert block(here, "one") == ["one"]
        until(lambda: not _cleaner.is_running)
        # Two statements of one row each: what is left is for the next time.
        assert len(tokens(here)) == 4
        monkeypatch.setattr(outcomes._tokens, "next", lambda: TOKEN)
        block(here, "two")
        assert not _cleaner.is_running


def prepare(here: Site) -> None:
    """Be connected again, with an empty table and peers that are in use."""
    here.connection.close()
    for peer in here.balancer.peers.values():
        peer.breaker.close()
    here.settle()
    run(here.plain, "DELETE FROM app_token")
    here.read()


@pytest.mark.parametrize("server", ["mariadb", "postgres", "galera"])
def test_commits_that_are_cut_at_random_places_are_resolved_rightly(
    request: pytest.FixtureRequest, server: str
) -> None:
    """A small run of ``python -m tests.outcomes``; on Galera another node may be asked."""
    driver = os.environ.get("TEST_DRIVER")
    if driver and server != {"pymysql": "mariadb", "psycopg2": "postgres"}[driver]:
        pytest.skip(f"{driver} has its own server")
    started = request.getfixturevalue(server)
    nodes = list(started) if server == "galera" else [started] * 2
    with contextlib.ExitStack() as stack:
        cutters = [
            stack.enter_context(Cutter(node, seed=number)) for number, node in enumerate(nodes)
        ]
        trial = Trial(cutters, nodes[0], is_mysql=server != "postgres")
        with trial.running():
            trial.lose(40)
            found = trial.found()
    assert found.lost >= 40
    assert (found.wrong, found.unknown) == (0, 0)


@pytest.mark.server
@pytest.mark.parametrize(
    ("driver", "servers"),
    [("pymysql", ["mariadb_pair", "galera"]), ("psycopg2", ["postgres_pair"])],
)
@pytest.mark.skipif("TEST_DRIVER" in os.environ, reason="this is that run")
def test_all_of_this_with(driver: str, servers: list[str], request: pytest.FixtureRequest) -> None:
    pytest.importorskip(driver)
    run_again(__file__, driver, request, *servers)


class TestRunAgain:
    """retrying_atomic after a COMMIT whose answer is lost."""

    @pytest.mark.parametrize("way", ["function", "decorator"])
    @pytest.mark.parametrize("how", ["before", "within", "after", "reply"])
    def test_work_stands_once_and_its_hooks_run_once(
        self, here: Site, how: str, way: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        here.read()
        monkeypatch.setitem(connections.databases["balanced"], "ATOMIC_REQUESTS", True)
        work = Work(here, losses=0)
        arguments = {"within": (20,), "reply": (0,)}.get(how, ())
        getattr(here.here, f"cut_{how}")(*arguments, matching=COMMIT)
        run_by(way, work, here)
        # "after": the fence and the COMMIT are on their way at once, and either may be first.
        assert work.runs in {"after": (1, 2), "reply": (1,)}.get(how, (2,))
        work.stands_once(work.runs)

    @pytest.mark.parametrize(("seconds", "runs"), [(10.0, 5), (0.0, 3)])
    def test_a_run_whose_commit_is_known_not_to_stand_uses_up_no_attempt_for_some_seconds(
        self, here: Site, monkeypatch: pytest.MonkeyPatch, seconds: float, runs: int
    ) -> None:
        """The block did its work: how often its COMMIT meets a fault is chance."""
        here.read()
        monkeypatch.setattr("django_proxysql.retry.time.sleep", lambda seconds: here.settle())
        work = Work(here, losses=4, lose=lambda: here.here.cut_before(COMMIT))
        with contextlib.nullcontext() if seconds else pytest.raises(OperationalError):
            work.retrying(wait_for_peer=seconds)
        assert work.runs == runs
        assert here.written() == (["run 5", "run 5, again"] if seconds else [])

    def test_a_conflict_of_galeras_at_commit_is_run_again_and_not_asked_about(
        self, galera: Any, fault_proxy: Callable[..., Any]
    ) -> None:
        node, other = galera[0], galera[1]
        with recording(node, fault_proxy) as here:
            here.write("one")
            until(lambda: "one" in other.sql("SELECT value FROM app_token", DATABASE))
            runs: list[int] = []

            @retrying_atomic(here.connection.alias)
            def work() -> None:
                runs.append(1)
                here.sql("UPDATE app_token SET value = CONCAT(value, ', mine')")
                if len(runs) == 1:
                    other.sql("UPDATE app_token SET value = 'other'", DATABASE)

            work()
            assert runs == [1, 1]
            assert (here.written(), resolved(here)) == (["other, mine"], [])

    def test_a_commit_that_timed_out_and_was_not_done_is_run_again(
        self, mariadb: Any, fault_proxy: Callable[..., Any]
    ) -> None:
        """Its packet does nothing when it is thawed, after the verdict."""
        with recording(mariadb, fault_proxy, OPTIONS={"read_timeout": 1}) as here:
            here.read()
            frozen = here.here
            runs: list[str] = []

            @retrying_atomic(here.connection.alias)
            def work() -> None:
                # Values that no test has used: beside a row that is deleted and not purged yet, the
                # open transaction's INSERT has the gap locked.
                runs.append("other" if runs else "frozen")
                here.write(runs[-1])
                if len(runs) == 1:
                    frozen.freeze()

            work()
            frozen.thaw()
            frozen.wait_until_idle()
            assert (runs, here.written()) == (["frozen", "other"], ["other"])
            assert tokens(here) == [True, False]
