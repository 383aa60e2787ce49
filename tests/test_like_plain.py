"""Test runs of a project are as they are on the plain engine, and never touch production."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import django
import pytest
from django.core.exceptions import ImproperlyConfigured
from django.db import connections

from django_proxysql.conf import ENGINE
from tests.engine import MYSQL, POSTGRESQL, SQLITE, added, mysql_peer
from tests.servers.mariadb import Node
from tests.test_project import FILES, Project

DATABASE = "likeplain"

TESTS = """
from django.db import connections
from django.test import TestCase, TransactionTestCase
from .models import Item
class Base:
    databases = %(databases)s
    def test_it(self):
        for alias in self.databases:
            with connections[alias].cursor() as cursor:
                cursor.execute("SELECT DATABASE() LIKE 'test_%(name)s%%%%'")
                assert cursor.fetchone() == (1,), alias
            assert Item.objects.using(alias).count() == 0
            Item.objects.using(alias).create(name="test")
            assert Item.objects.using(alias).count() == 1
            Item.objects.using(alias).all().delete()
class One(Base, %(case)s):
    pass
class Two(Base, TransactionTestCase):
    serialized_rollback = True
class Three(Base, TransactionTestCase):
    def test_reconnected(self):
        connections["default"].close()
        self.test_it()
"""


SPAWNING = """
import multiprocessing, os, sys
from django.core.management import execute_from_command_line
os.environ["DJANGO_SETTINGS_MODULE"] = "settings"
if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    execute_from_command_line(sys.argv)
"""


def entry(**settings: Any) -> dict[str, Any]:
    return {"ENGINE": ENGINE, **settings}


def peer(host: str, **settings: Any) -> dict[str, Any]:
    return {"HOST": host, "NAME": "app", **settings}


def signatures(databases: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What tells Django which aliases have one test database."""
    with added(databases):
        return {alias: connections[alias].creation.test_db_signature() for alias in databases}


def test_balancers_over_the_same_peers_share_a_test_database() -> None:
    """In whichever order, and whatever else they have."""
    found = signatures(
        {
            "one": entry(PEERS=[peer("b"), peer("a")]),
            "two": entry(PEERS=[peer("a", WEIGHT=3), peer("b")], STRATEGY="round_robin"),
            "plain": {"ENGINE": MYSQL, **peer("a")},
        }
    )
    assert found["one"] == found["two"] == found["plain"] == ("a", "", MYSQL, "test_app")


@pytest.mark.parametrize(
    "other",
    [
        {"PEERS": [peer("c"), peer("d")]},
        {"PEERS": [peer("a", PORT=3307), peer("b", PORT=3307)]},
        {"PEERS": [peer("a"), peer("b")], "TEST": {"NAME": "another"}},
        {"PEERS": [peer("a"), peer("b")], "NAME": "another"},
        {"PEERS": [peer("a"), peer("b")], "PEER_ENGINE": POSTGRESQL},
    ],
)
def test_others_have_one_of_their_own(other: dict[str, Any]) -> None:
    """Other servers, another port, another name, another engine: another test database."""
    found = signatures({"one": entry(PEERS=[peer("a"), peer("b")]), "two": entry(**other)})
    assert found["one"] != found["two"]


def test_signature_of_files() -> None:
    """SQLite's own rules: a file is its name, a database in memory is its alias's."""
    files = entry(PEER_ENGINE=SQLITE, PEERS=[{"NAME": "/one"}, {"NAME": "/one"}])
    found = signatures(
        {"memory": files, "file": {**files, "TEST": {"NAME": "/test"}}},
    )
    # Django 2.2 has no word on the test database's own name.
    file = ("/one", "/test") if django.VERSION >= (3,) else ("/one",)
    assert found == {"memory": ("/one", "memory"), "file": file}


def test_peers_are_mirrors() -> None:
    """Aliases that serve as peers; but for what the user has said, and the default alias."""
    with added(
        {
            "a": {"ENGINE": MYSQL, **peer("a")},
            "b": {"ENGINE": MYSQL, **peer("b"), "TEST": {"MIRROR": "a"}},
            "c": {"ENGINE": MYSQL, **peer("c"), "TEST": {"NAME": "theirs"}},
            "other": {"ENGINE": MYSQL, **peer("other")},
            "one": entry(PEERS=["a", "b", "c"]),
            "two": entry(PEERS=["a"]),
        }
    ):
        assert connections["one"].alias == "one"
        mirrors = {
            alias: connections[alias].settings_dict["TEST"]["MIRROR"]
            for alias in ("a", "b", "c", "other", "one")
        }
    assert mirrors == {"a": "one", "b": "a", "c": "one", "other": None, "one": None}


def test_peers_mirror_what_their_balancer_mirrors() -> None:
    """A chain of mirrors is one that Django does not follow."""
    with added(
        {
            "a": {"ENGINE": MYSQL, **peer("a")},
            "one": entry(PEERS=["a"], TEST={"MIRROR": "default"}),
        }
    ):
        assert connections["one"].alias == "one"
        assert connections["a"].settings_dict["TEST"]["MIRROR"] == "default"


def test_a_peer_with_a_test_database_of_its_own() -> None:
    """Django met it before its balancer: the balancer's would be made over it."""
    with added({"a": {"ENGINE": MYSQL, **peer("a")}, "one": entry(PEERS=["a"])}):
        creation = connections["one"].creation
        connections.databases["a"]["NAME"] = "test_app"
        with pytest.raises(ImproperlyConfigured, match="Add 'django_proxysql' to INSTALLED_APPS"):
            creation.create_test_db(verbosity=0, autoclobber=True)


def test_default_alias_as_a_peer() -> None:
    """It is no mirror, for the other aliases wait for it: the balancer shares its database."""
    found = signatures(
        {
            "a": {"ENGINE": MYSQL, **peer("a")},
            "default": {"ENGINE": MYSQL, **peer("b")},
            "one": entry(PEERS=["a", "default"]),
        }
    )
    assert found["one"] == found["default"] != found["a"]


class Production:
    """A project whose production database has a row, beside a peer that is dead."""

    def __init__(self, root: Path, dead: Node, alive: Node) -> None:
        self.project = Project(root, alive)
        self.node = alive
        self.peers = [
            mysql_peer(dead, NAME=DATABASE),
            mysql_peer(alive, NAME=DATABASE, PRIORITY=1),
        ]
        self.databases: dict[str, Any] = {"default": entry(PEERS=self.peers)}
        self.write(**FILES)
        self.configure()
        self.use_tests('{"default"}')

    def write(self, **files: str) -> None:
        for name, text in files.items():
            path = self.project.root / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(text.lstrip())

    def configure(self) -> None:
        self.write(**{"databases.json": json.dumps(self.databases)})

    def use_aliases(self) -> None:
        """Make each peer an alias of its own, before the balancer's."""
        aliases = {f"peer{n}": {"ENGINE": MYSQL, **peer} for n, peer in enumerate(self.peers)}
        self.databases = {**aliases, "default": entry(PEERS=list(aliases))}
        self.configure()

    def use_tests(self, databases: str) -> None:
        # What a TestCase writes through one alias has not been committed for another.
        case = "TestCase" if "," not in databases else "TransactionTestCase"
        text = TESTS % {"databases": databases, "name": DATABASE, "case": case}
        self.write(**{"shop/tests.py": text})

    def contents(self) -> str:
        """Everything in the production database, and which databases there are."""
        tables = self.node.sql("SHOW TABLES", DATABASE).split()
        rows = [self.node.sql(f"SELECT * FROM {table}", DATABASE) for table in tables]
        return "\n".join([*tables, *rows])

    def test_databases(self) -> list[str]:
        return self.node.sql("SHOW DATABASES LIKE 'test%'").split()


@pytest.fixture
def production(mariadb_pair: tuple[Node, Node], tmp_path: Path) -> Iterator[Production]:
    """Fails if the test leaves anything else in production than it found."""
    dead, alive = mariadb_pair
    dead.kill()
    alive.create_database(DATABASE)
    made = Production(tmp_path, dead, alive)
    made.project.manage("makemigrations", "shop")
    made.project.manage("migrate")
    alive.sql("INSERT INTO shop_item (name) VALUES ('production')", DATABASE)
    before = made.contents()
    assert "production" in before
    yield made
    after = made.contents()
    for name in (DATABASE, *made.test_databases()):
        alive.sql(f"DROP DATABASE {name}")
    assert after == before


def test_manage_test(production: Production) -> None:
    """One test database, on the peer that lives; nothing of it is left."""
    assert "Ran 4 tests" in production.project.manage("test")
    assert production.test_databases() == []


def test_keepdb(production: Production) -> None:
    """--keepdb: made once, found again."""
    assert "Creating" in production.project.manage("test", "--keepdb", "--noinput", "-v2")
    assert production.test_databases() == [f"test_{DATABASE}"]
    assert "No migrations to apply" in production.project.manage("test", "--keepdb", "-v2")
    assert production.test_databases() == [f"test_{DATABASE}"]


def test_parallel(production: Production) -> None:
    """--parallel: each process has its clone; with --keepdb they are found again."""
    args = ("test", "--parallel", "2", "--keepdb", "-v2")
    assert "Ran 4 tests" in production.project.manage(*args)
    assert production.test_databases() == [f"test_{DATABASE}{n}" for n in ("", "_1", "_2")]
    assert "Ran 4 tests" in production.project.manage(*args)
    assert "Ran 4 tests" in production.project.manage("test", "--parallel", "2", "--noinput")
    assert production.test_databases() == []


@pytest.mark.skipif(django.VERSION < (4, 2), reason="spawn came with Django 4.1")
def test_parallel_spawned(production: Production) -> None:
    """Processes that start from nothing read production's settings, and use their clones."""
    production.write(**{"manage.py": SPAWNING})
    output = production.project.manage("test", "--parallel", "2", "--noinput")
    assert output.count("Cloning test database") == 2
    assert "Ran 4 tests" in output
    assert production.test_databases() == []


def test_mirrors_and_names(production: Production) -> None:
    """TEST: NAME, MIRROR and DEPENDENCIES of balancers are read as of any other alias."""
    peers = production.databases["default"]["PEERS"]
    production.databases = {
        "default": entry(PEERS=peers, TEST={"NAME": f"test_{DATABASE}_first"}),
        "mirror": entry(PEERS=peers, TEST={"MIRROR": "default"}),
        "same": entry(PEERS=peers[::-1], TEST={"NAME": f"test_{DATABASE}_first"}),
        "other": entry(
            PEERS=peers, TEST={"NAME": f"test_{DATABASE}_other", "DEPENDENCIES": ["default"]}
        ),
    }
    production.configure()
    production.use_tests('{"default", "mirror", "same", "other"}')
    output = production.project.manage("test", "-v2", "--keepdb")
    assert "Ran 4 tests" in output
    names = [f"test_{DATABASE}_first", f"test_{DATABASE}_other"]
    assert production.test_databases() == names
    assert output.count("Using existing test database") == 2


def test_reverse(production: Production) -> None:
    """--reverse."""
    assert "Ran 4 tests" in production.project.manage("test", "--reverse")


def test_aliases_as_peers_share_the_test_database(production: Production) -> None:
    """Tests that ask for all aliases: one test database, and no connection to the dead peer."""
    production.use_aliases()
    production.use_tests('{"default", "peer1"}')
    output = production.project.manage("test", "-v2")
    assert "Ran 4 tests" in output
    assert output.count("Creating test database") == 1
    assert "Ran 4 tests" in production.project.manage("test", "--parallel", "2")
    assert production.test_databases() == []


def test_peer_without_its_balancer(production: Production) -> None:
    """Nothing is made that a test of a peer alone could mirror: it is refused."""
    production.use_aliases()
    production.use_tests('{"peer1"}')
    output = production.project.manage("test", status=1)
    assert "Add 'default' to the test's databases" in output
