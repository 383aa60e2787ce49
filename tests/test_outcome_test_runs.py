"""``COMMIT_OUTCOME: "record"`` under Django's own test runner, on test databases of servers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from django_proxysql.conf.keys import ENGINE
from tests.engine import MYSQL, POSTGRESQL, mysql_peer
from tests.project import Project
from tests.servers import USER
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
