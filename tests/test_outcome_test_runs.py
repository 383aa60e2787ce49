"""``COMMIT_OUTCOME: "record"`` under Django's own test runner, on test databases of servers."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from django.core.management import CommandError, call_command
from django.db import connections

from django_proxysql.conf.keys import ENGINE
from tests.engine import MYSQL, POSTGRESQL, SQLITE, added, engine, make_outcome_table, mysql_peer
from tests.project import Project
from tests.servers import USER
from tests.servers.mariadb import Node
from tests.test_project import DATABASE, FILES

TESTS = """
from unittest import skipUnless
from django.db import connection, transaction
from django.test import TestCase, TransactionTestCase
from django_proxysql import retrying_atomic
from .models import Item

def tokens():
    with connection.cursor() as cursor:
        cursor.execute("SELECT COUNT(*) FROM django_proxysql_commit")
        return cursor.fetchone()[0]

class Base:
    def test_name(self):
        assert connection.settings_dict["NAME"].startswith("test_shop")

    def write(self):
        hooks = []
        with transaction.atomic():
            Item.objects.create(name="one")
            transaction.on_commit(lambda: hooks.append("one"))
        retrying_atomic(lambda: Item.objects.create(name="two"))()
        self.assertEqual(Item.objects.count(), 2)
        return hooks

class InBlocks(Base, TestCase):
    @classmethod
    def setUpTestData(cls):
        cls.before = tokens()

    def test_blocks_write_no_token(self):
        self.assertEqual(self.write(), [])
        self.assertEqual(tokens(), self.before)

    @skipUnless(hasattr(TestCase, "captureOnCommitCallbacks"), "it came with Django 3.2")
    def test_nor_do_those_whose_hooks_are_run(self):
        with self.captureOnCommitCallbacks(execute=True) as callbacks:
            self.write()
        self.assertEqual(len(callbacks), 1)
        self.assertEqual(tokens(), self.before)

class Committed(Base, TransactionTestCase):
    def test_each_block_writes_one(self):
        before = tokens()
        self.assertEqual(self.write(), ["one"])
        self.assertEqual(tokens(), before + 2)

    def test_it_finds_no_rows_of_another_test(self):
        self.assertEqual(Item.objects.count(), 0)
        self.write()

class CommittedToo(Committed):
    serialized_rollback = True
"""


@pytest.fixture(params=["mariadb", "postgres"])
def project(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Project]:
    """A project whose alias has the setting. Its own database has no tables: no test needs them."""
    server: Any = request.getfixturevalue(request.param)
    is_postgres = request.param == "postgres"
    server.create_database(DATABASE, *([USER] if is_postgres else []))
    entry = {
        "ENGINE": ENGINE,
        "PEER_ENGINE": POSTGRESQL if is_postgres else MYSQL,
        "COMMIT_OUTCOME": "record",
        "PEERS": [mysql_peer(server, NAME=DATABASE)],
    }
    files = {"databases.json": json.dumps({"default": entry}), "shop/tests.py": TESTS}
    yield Project(tmp_path, {**FILES, **files})
    server.sql(f"DROP DATABASE {DATABASE}")


@pytest.mark.parametrize("arguments", [(), ("--parallel", "2")], ids=["", "parallel"])
def test_its_databases_have_the_table(project: Project, arguments: tuple[str, ...]) -> None:
    """TestCase's blocks write nothing, TransactionTestCase's write tokens; clones have it too."""
    said = project.manage("test", *arguments)
    assert "Ran 9 tests" in said
    assert "W010" not in said


@pytest.mark.parametrize(
    "entry",
    [{"ENGINE": ENGINE, "PEER_ENGINE": SQLITE, "PEERS": [{}]}, {"ENGINE": SQLITE}],
    ids=["balancer", "plain"],
)
def test_an_engine_without_tokens_migrates_without_the_table(
    tmp_path: Path, entry: dict[str, Any]
) -> None:
    """The setting has no effect there, as its check says: settings of production run on SQLite."""
    own = {"NAME": str(tmp_path / "shop"), "COMMIT_OUTCOME": "record"}
    with added({"shop": {**entry, **own}}):
        call_command("migrate", database="shop", verbosity=0)
        assert "django_proxysql_commit" not in connections["shop"].introspection.table_names()
        said = io.StringIO()
        call_command("prune_commits", stdout=said)
        assert said.getvalue().startswith("There is no load balancer")
        with pytest.raises(CommandError, match=r"^'shop' is no load .* Leave --database out"):
            call_command("prune_commits", database="shop")


def test_a_database_without_the_table_keeps_no_other_from_being_pruned(
    mariadb_pair: tuple[Node, Node],
) -> None:
    first, second = ([mysql_peer(node)] for node in mariadb_pair)
    with (
        engine(first, alias="first", COMMIT_OUTCOME="record") as without,
        engine(second, alias="second", COMMIT_OUTCOME="record") as connection,
    ):
        make_outcome_table(connection)
        with without.cursor() as cursor:
            cursor.execute("DROP TABLE IF EXISTS django_proxysql_commit")
        said = io.StringIO()
        with pytest.raises(CommandError, match=r"^first: there is no table"):
            call_command("prune_commits", stdout=said)
    assert said.getvalue() == "second: 0 tokens deleted\n"
