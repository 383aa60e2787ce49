"""Test runs of a project are as they are on the plain engine, and never touch production."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import django
import pytest
from django.core.exceptions import ImproperlyConfigured
from django.db import connections
from django.test.utils import get_unique_databases_and_mirrors

from django_proxysql.conf.keys import ENGINE
from tests.engine import MYSQL, POSTGRESQL, SQLITE, added, mysql_peer
from tests.project import Project
from tests.servers import USER
from tests.servers.mariadb import Node
from tests.servers.postgresql import PostgreSQLNode
from tests.test_project import FILES

DATABASE = "likeplain"

TESTS = """
import urllib.request
from django.db import connections
from django.test.utils import get_unique_databases_and_mirrors
from django.test import LiveServerTestCase, TestCase, TransactionTestCase
from .models import Item
HERE = {
    "mysql": "SELECT DATABASE()",
    "postgresql": "SELECT current_database()",
    # A database in memory has no name.
    "sqlite": "SELECT 'test_%(name)s' || file FROM pragma_database_list",
}
def assert_under_test(alias):
    with connections[alias].cursor() as cursor:
        cursor.execute(HERE[connections[alias].vendor])
        name = cursor.fetchone()[0]
    assert name.startswith("test_%(name)s"), (alias, name)
class Base:
    databases = %(databases)s
    def test_it(self):
        for alias in self.databases:
            assert_under_test(alias)
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
class Four(LiveServerTestCase):
    databases = %(databases)s
    def test_served(self):
        # The view makes one, on a connection of the server's thread.
        for number in (1, 2):
            with urllib.request.urlopen(self.live_server_url) as answer:
                assert answer.status == 200
            alias = "default" if "default" in self.databases else min(self.databases)
            assert_under_test(alias)
            assert Item.objects.using(alias).count() == number
"""


SPAWNING = """
import multiprocessing, os, sys
from django.core.management import execute_from_command_line
os.environ["DJANGO_SETTINGS_MODULE"] = "settings"
if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    execute_from_command_line(sys.argv)
"""

# A row that a migration makes, which is what serialized_rollback is for.
ROW = """
from django.db import migrations
def make(apps, schema_editor):
    apps.get_model("shop", "Item").objects.create(name="by a migration")
class Migration(migrations.Migration):
    dependencies = [("shop", "0001_initial")]
    operations = [migrations.RunPython(make, migrations.RunPython.noop)]
"""

SERIALIZED = """
from django.test import TransactionTestCase
from .models import Item
class Serialized(TransactionTestCase):
    databases = %s
    serialized_rollback = True
    def assert_migrated(self):
        for alias in self.databases:
            items = Item.objects.using(alias)
            assert [item.name for item in items.all()] == ["by a migration"]
        items.create(name="test")
    def test_one(self):
        self.assert_migrated()
    def test_two(self):
        self.assert_migrated()
"""

# The tables have been made by one connection, the row is made by the next one.
RECEIVER = """
from django.apps import apps
from django.db import connections
from django.test.utils import get_unique_databases_and_mirrors
from django.db.models.signals import post_migrate
def fill(using, **kwargs):
    connections[using].close()
    Item.objects.using(using).create(name="by a receiver")
post_migrate.connect(fill, sender=apps.app_configs["shop"])
"""

# Nothing is looked up, emptied or restored. Of two classes each may have a process of its own.
UNTOUCHED = """
import unittest
class Base:
    databases = {"default"}
    def test_it(self):
        pass
class One(Base, unittest.TestCase):
    pass
class Two(Base, unittest.TestCase):
    pass
"""


def entry(**settings: Any) -> dict[str, Any]:
    return {"ENGINE": ENGINE, **settings}


def peer(host: str, **settings: Any) -> dict[str, Any]:
    return {"HOST": host, "NAME": "app", **settings}


def signatures(databases: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What tells Django which aliases have one test database."""
    with added(databases):
        return {alias: connections[alias].creation.test_db_signature() for alias in databases}


AB = entry(PEERS=[peer("a"), peer("b")])
#: What stands beside a balancer over a and b: it has the same test database, one of its own, or
#: one of the same name on a server of both, which is refused.
BESIDE: list[tuple[dict[str, Any], str]] = [
    # In whichever order, and whatever else they have.
    (entry(PEERS=[peer("b"), peer("a")]), "the same"),
    (entry(PEERS=[peer("a", WEIGHT=3), peer("b")], STRATEGY="round_robin"), "the same"),
    ({"ENGINE": MYSQL, **peer("a")}, "the same"),
    (entry(PEERS=[peer("c"), peer("d")]), "its own"),
    (entry(PEERS=[peer("a", PORT=3307), peer("b", PORT=3307)]), "its own"),
    ({**AB, "TEST": {"NAME": "another"}}, "its own"),
    ({**AB, "NAME": "another"}, "its own"),
    ({**AB, "PEER_ENGINE": POSTGRESQL}, "its own"),
    (entry(PEERS=[peer("b")], TEST={"MIRROR": "one"}), "its own"),
    (entry(PEERS=[peer("b")], PEER_ENGINE=POSTGRESQL), "its own"),
    ({"ENGINE": MYSQL, **peer("c")}, "its own"),
    (entry(PEERS=[peer("b"), peer("c")]), "refused"),
    (entry(PEERS=[peer("c"), peer("b")], NAME="else", TEST={"NAME": "test_app"}), "refused"),
    ({"ENGINE": MYSQL, **peer("b")}, "refused"),
]


@pytest.mark.parametrize(("other", "has"), BESIDE)
def test_test_databases_are_shared_by_servers_and_name_and_none_is_made_over_another(
    other: dict[str, Any], has: str
) -> None:
    with added({"one": {**AB}, "two": other}):
        one, two = (connections[alias].creation for alias in ("one", "two"))
        assert (one.test_db_signature() == two.test_db_signature()) is (has == "the same")
        one._refuse_an_overlap()
        # Django's own engine does not know: the balancer whose peer is there refuses for it.
        learns = has == "refused" and "PEERS" not in other
        assert ("create_test_db" in vars(two)) is learns
        if learns:
            with pytest.raises(ImproperlyConfigured, match="'two' and 'one' would each make"):
                two.create_test_db(verbosity=0, autoclobber=True)
        if has != "the same":
            # It has been made.
            connections.databases["two"]["NAME"] = two._get_test_db_name()
        if has == "refused":
            with pytest.raises(ImproperlyConfigured, match="'two' and 'one' would each make"):
                one.create_test_db(verbosity=0, autoclobber=True)
        else:
            one._refuse_an_overlap()


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


def test_a_peer_with_a_test_database_of_its_own() -> None:
    """Django met it before its balancer: the balancer's would be made over it."""
    with added({"a": {"ENGINE": MYSQL, **peer("a")}, "one": entry(PEERS=["a"])}):
        creation = connections["one"].creation
        connections.databases["a"]["NAME"] = "test_app"
        with pytest.raises(ImproperlyConfigured, match="Add 'django_proxysql' to INSTALLED_APPS"):
            creation.create_test_db(verbosity=0, autoclobber=True)


def test_dependencies_on_peers() -> None:
    """What waits for a peer waits for its balancer: nothing is made for a mirror."""
    with added(
        {
            "a": {"ENGINE": MYSQL, **peer("a")},
            "b": {"ENGINE": MYSQL, **peer("b")},
            "other": {"ENGINE": MYSQL, **peer("o"), "TEST": {"DEPENDENCIES": ["a", "b", "third"]}},
            "third": {"ENGINE": MYSQL, **peer("t"), "TEST": {"DEPENDENCIES": []}},
            "one": entry(PEERS=["a", "b"], TEST={"DEPENDENCIES": ["b", "third"]}),
        }
    ):
        # The first that asks.
        assert connections["one"].alias == "one"
        found = {
            alias: connections[alias].settings_dict["TEST"]["DEPENDENCIES"]
            for alias in ("other", "third", "one")
        }
        made, mirrors = get_unique_databases_and_mirrors({"other", "third", "one"})
    assert found == {"other": ["third", "one"], "third": [], "one": ["third"]}
    assert [list(aliases) for _, aliases in made.values()] == [["third"], ["one"], ["other"]]
    assert mirrors["a"] == mirrors["b"] == "one"


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

    engine = MYSQL

    def __init__(self, root: Path, dead: Any, alive: Any) -> None:
        self.project = Project(root, FILES)
        self.node = alive
        self.peers = [
            self.peer(dead),
            {**self.peer(alive), "PRIORITY": 1},
        ]
        self.databases: dict[str, Any] = {"default": self.balancer()}
        self.configure()
        self.use_tests('{"default"}')

    def peer(self, node: Any) -> dict[str, Any]:
        return mysql_peer(node, NAME=DATABASE)

    def balancer(self, **settings: Any) -> dict[str, Any]:
        return entry(**{"PEERS": self.peers, "PEER_ENGINE": self.engine, **settings})

    def configure(self) -> None:
        self.project.write({"databases.json": json.dumps(self.databases)})

    def use_aliases(self) -> None:
        """Make each peer an alias of its own, before the balancer's; test two of them."""
        aliases = {f"peer{n}": {"ENGINE": self.engine, **p} for n, p in enumerate(self.peers)}
        self.databases = {**aliases, "default": self.balancer(PEERS=list(aliases))}
        self.configure()
        self.use_tests('{"default", "peer1"}')

    def use_tests(self, databases: str) -> None:
        self.tested_aliases = databases
        # What a TestCase writes through one alias has not been committed for another.
        case = "TestCase" if "," not in databases else "TransactionTestCase"
        text = TESTS % {"databases": databases, "name": DATABASE, "case": case}
        if "default" not in databases and django.VERSION < (5, 2):
            # There, Django itself lets the live server's threads into any database.
            text = text.partition("class Four")[0]
        self.project.write({"shop/tests.py": text})

    def run(self, peers: str | None) -> Iterator[Production]:
        """Make the tables and a row; when the test is over see that there is nothing else.

        :param peers: "aliases": the peers are aliases of their own.
        """
        if peers == "aliases":
            self.use_aliases()
        # Some other test may have failed.
        self.drop(*self.test_databases())
        self.project.manage("migrate")
        self.sql("INSERT INTO shop_item (name) VALUES ('production')")
        before = self.contents()
        assert "production" in before
        yield self
        after = self.contents()
        self.drop(DATABASE, *self.test_databases())
        assert after == before

    def drop(self, *databases: str) -> None:
        for name in databases:
            self.node.sql(f"DROP DATABASE {name}")

    def tested(self, *arguments: str, **options: Any) -> str:
        """Run the five tests, by ``manage.py test``; return what it prints."""
        output = self.project.manage("test", *arguments, **options)
        assert "Ran 5 tests" in output
        return output

    def sql(self, statement: str) -> str:
        return str(self.node.sql(statement, DATABASE))

    def contents(self) -> str:
        """Everything in the production database."""
        tables = self.tables()
        return "\n".join([*tables, *(self.sql(f"SELECT * FROM {table}") for table in tables)])

    def tables(self) -> list[str]:
        return self.sql("SHOW TABLES").split()

    def test_databases(self) -> list[str]:
        return str(self.node.sql("SHOW DATABASES LIKE 'test%'")).split()


class OnPostgreSQL(Production):
    engine = POSTGRESQL

    def tables(self) -> list[str]:
        return self.sql(
            "SELECT tablename FROM pg_tables WHERE schemaname = 'public' ORDER BY 1"
        ).split()

    def test_databases(self) -> list[str]:
        return str(
            self.node.sql("SELECT datname FROM pg_database WHERE datname LIKE 'test%' ORDER BY 1")
        ).split()


class OnSQLite(Production):
    engine = SQLITE

    def peer(self, node: Any) -> dict[str, Any]:
        return {"NAME": str(node)}


@pytest.fixture
def production(
    mariadb_pair: tuple[Node, Node], tmp_path: Path, request: pytest.FixtureRequest
) -> Iterator[Production]:
    """Fails if the test leaves anything else in production than it found."""
    dead, alive = mariadb_pair
    dead.kill()
    alive.create_database(DATABASE)
    yield from Production(tmp_path, dead, alive).run(getattr(request, "param", None))


@pytest.fixture
def on_postgresql(
    postgres_pair: tuple[PostgreSQLNode, PostgreSQLNode],
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> Iterator[Production]:
    """The same on PostgreSQL."""
    dead, alive = postgres_pair
    dead.kill()
    alive.create_database(DATABASE, USER)
    yield from OnPostgreSQL(tmp_path, dead, alive).run(getattr(request, "param", None))


PEERS = ["inline", "aliases"]
inline_and_aliases = pytest.mark.parametrize("production", PEERS, indirect=True)


def names(*suffixes: str) -> list[str]:
    return [f"test_{DATABASE}{suffix}" for suffix in suffixes]


def test_parallel_and_keepdb(production: Production) -> None:
    """Each process has its clone; with --keepdb all of them are found again."""
    args = ("--parallel", "2", "--keepdb", "-v2")
    assert "Creating" in production.tested(*args)
    assert production.test_databases() == names("", "_1", "_2")
    assert "No migrations to apply" in production.tested(*args)
    assert production.test_databases() == names("", "_1", "_2")
    production.tested("--parallel", "2", "--noinput")
    assert production.test_databases() == []


class TwoAlive:
    """Two servers that know nothing of each other, and a balancer that takes them in turn.

    The tests connect to nothing: the other server has no test database.
    """

    def __init__(self, root: Path, nodes: tuple[Node, Node]) -> None:
        self.nodes = nodes
        made = Production(root, *nodes)
        made.peers = [made.peer(node) for node in nodes]
        made.databases = {"default": made.balancer(STRATEGY="round_robin")}
        made.configure()
        self.project = made.project
        self.project.write({"shop/tests.py": UNTOUCHED})

    def on_each(self, statement: str, database: str = "") -> list[list[str]]:
        """The rows that a statement gives, on each node."""
        return [node.sql(statement, database).split() for node in self.nodes]


@pytest.fixture
def two_alive(mariadb_pair: tuple[Node, Node], tmp_path: Path) -> Iterator[TwoAlive]:
    for node in mariadb_pair:
        node.create_database(DATABASE)
    made = TwoAlive(tmp_path, mariadb_pair)
    yield made
    for node, names in zip(mariadb_pair, made.on_each("SHOW DATABASES LIKE 'test%'")):
        for name in (DATABASE, *names):
            node.sql(f"DROP DATABASE {name}")


def test_made_and_cloned_on_one_peer(two_alive: TwoAlive) -> None:
    """Whichever is next in turn: the test database and its clones are on one of two peers."""
    output = two_alive.project.manage("test", "--parallel", "2", "--keepdb")
    assert "Ran 2 tests" in output
    assert output.count("existing clone") == 2
    found = two_alive.on_each("SHOW DATABASES LIKE 'test%'")
    assert sorted(found) == [[], [f"test_{DATABASE}{suffix}" for suffix in ("", "_1", "_2")]]


def test_made_on_one_peer_where_each_has_one(two_alive: TwoAlive) -> None:
    """Test databases of earlier runs: no peer refuses a run that should be on the other."""
    two_alive.project.write({"shop/models.py": FILES["shop/models.py"] + RECEIVER})
    for node in two_alive.nodes:
        node.create_database(f"test_{DATABASE}")
    assert "Ran 2 tests" in two_alive.project.manage("test", "--keepdb")
    found = two_alive.on_each("SHOW TABLES", f"test_{DATABASE}")
    assert sorted(found) == [[], ["django_migrations", "shop_item"]]
    node = two_alive.nodes[found.index(max(found))]
    assert node.sql("SELECT name FROM shop_item", f"test_{DATABASE}") == "by a receiver\n"


@inline_and_aliases
def test_peer_that_hangs(production: Production, mariadb_pair: tuple[Node, Node]) -> None:
    """A peer that takes connections and stays silent costs CONNECT_TIMEOUT, in each process."""
    hangs, _ = mariadb_pair
    hangs.start()
    hangs.freeze()
    production.databases["default"]["CONNECT_TIMEOUT"] = 1
    production.configure()
    production.tested("--parallel", "2", timeout=60)
    assert production.test_databases() == []


@inline_and_aliases
def test_serialized_rollback(production: Production) -> None:
    """What migrations put there is there for each test, though each empties the tables."""
    tests = SERIALIZED % production.tested_aliases
    production.project.write({"shop/migrations/0002_row.py": ROW, "shop/tests.py": tests})
    assert "Ran 2 tests" in production.project.manage("test")
    assert production.test_databases() == []


@pytest.mark.skipif(django.VERSION < (4, 2), reason="spawn came with Django 4.1")
@inline_and_aliases
def test_parallel_spawned(production: Production) -> None:
    """Processes that start from nothing read production's settings, and use their clones.

    They are given what serialized_rollback puts back.
    """
    production.project.write({"manage.py": SPAWNING})
    output = production.tested("--parallel", "2", "--noinput")
    assert output.count("Cloning test database") == 2
    assert production.test_databases() == []


def test_pytest_django(production: Production) -> None:
    """pytest-django, and with --reuse-db: one test database, found again."""
    assert "5 passed" in production.project.pytest("shop/tests.py")
    assert production.test_databases() == []
    for _ in range(2):
        assert "5 passed" in production.project.pytest("shop/tests.py", "--reuse-db")
        assert production.test_databases() == names("")


@inline_and_aliases
def test_pytest_xdist(production: Production) -> None:
    """pytest-xdist: each process has a test database of its own, named by the peers' NAME."""
    args = ("-n", "2", "--dist", "each")
    assert "10 passed" in production.project.pytest("shop/tests.py", *args)
    assert production.test_databases() == []
    for _ in range(2):
        assert "10 passed" in production.project.pytest("shop/tests.py", *args, "--reuse-db")
        assert production.test_databases() == names("_gw0", "_gw1")


@pytest.mark.parametrize("on_postgresql", PEERS, indirect=True)
def test_postgresql(on_postgresql: Production) -> None:
    """PostgreSQL: manage.py test, in parallel on clones, kept; pytest-django with xdist."""
    project = on_postgresql.project
    on_postgresql.tested("--reverse")
    for _ in range(2):
        on_postgresql.tested("--parallel", "2", "--keepdb")
        assert on_postgresql.test_databases() == names("", "_1", "_2")
    on_postgresql.tested("--parallel", "2", "--noinput")
    assert on_postgresql.test_databases() == []
    assert "10 passed" in project.pytest("shop/tests.py", "-n", "2", "--dist", "each")
    assert on_postgresql.test_databases() == []


def test_sqlite(tmp_path: Path) -> None:
    """SQLite: in memory, shared with the live server's thread and cloned; or in a file by NAME."""
    made = OnSQLite(tmp_path, tmp_path / "missing" / "db", tmp_path / DATABASE)
    made.project.manage("migrate")
    before = (tmp_path / DATABASE).read_bytes()
    made.tested()
    made.tested("--parallel", "2")
    assert "5 passed" in made.project.pytest("shop/tests.py")
    made.databases["default"]["TEST"] = {"NAME": str(tmp_path / "test")}
    made.configure()
    assert "10 passed" in made.project.pytest(
        "shop/tests.py", "-n", "2", "--dist", "each", "--reuse-db"
    )
    assert sorted(path.name for path in tmp_path.glob("test_*")) == ["test_gw0", "test_gw1"]
    assert (tmp_path / DATABASE).read_bytes() == before


@pytest.mark.parametrize("alone", ["mirror", "peer1", "peer1, a mirror by hand"])
def test_mirror_whose_database_is_not_made(production: Production, alone: str) -> None:
    """Tests that ask for a mirror alone are refused: Django would send them to production."""
    if alone == "mirror":
        production.databases["mirror"] = production.balancer(TEST={"MIRROR": "default"})
    else:
        production.use_aliases()
        if "by hand" in alone:
            production.databases["peer1"]["TEST"] = {"MIRROR": "default"}
    production.configure()
    production.use_tests(f'{{"{alone.partition(",")[0]}"}}')
    output = production.project.manage("test", status=1)
    assert "Add 'default' to the test's databases" in output


def test_mirror_of_one_of_its_peers(production: Production) -> None:
    """The test database is made on that peer, by its own alias, and is the balancer's too."""
    production.use_aliases()
    production.databases["default"]["TEST"] = {"MIRROR": "peer1"}
    # Django makes no default alias's database first that is a mirror itself.
    production.databases["peer1"]["TEST"] = {"DEPENDENCIES": []}
    production.configure()
    output = production.tested("-v2")
    assert output.count("Creating test database") == 1
    assert production.test_databases() == []


def test_ring_of_mirrors_is_refused_before_anything_is_made(production: Production) -> None:
    production.databases["default"] = production.balancer(TEST={"MIRROR": "default"})
    production.configure()
    assert "leads back to where it began" in production.project.manage("test", status=1)


def test_mirrors_names_and_dependencies_are_read(production: Production) -> None:
    peers = production.databases["default"]["PEERS"]
    production.databases = {
        "default": entry(
            PEERS=peers, TEST={"NAME": f"test_{DATABASE}_first", "DEPENDENCIES": ["other"]}
        ),
        "mirror": entry(PEERS=peers, TEST={"MIRROR": "default"}),
        "same": entry(PEERS=peers[::-1], TEST={"NAME": f"test_{DATABASE}_first"}),
        "other": entry(PEERS=peers, TEST={"NAME": f"test_{DATABASE}_other", "DEPENDENCIES": []}),
    }
    production.configure()
    production.use_tests('{"default", "mirror", "same", "other"}')
    output = production.tested("-v2", "--keepdb")
    assert production.test_databases() == names("_first", "_other")
    # The default alias comes first but for what it depends on.
    assert re.findall(r"Using existing test database for alias '(\w+)'", output) == [
        "other",
        "default",
    ]


def test_reverse_runs_the_last_of_each_kind_first(production: Production) -> None:
    orders = []
    for args in ((), ("--reverse",)):
        output = production.tested("-v2", *args)
        orders.append(re.findall(r"^test_\w+ \(shop\.tests\.(\w+)", output, re.MULTILINE))
        assert production.test_databases() == []
    (case, *others), backwards = orders
    assert case == "One"
    assert backwards == [case, *reversed(others)]


def test_default_alias_under_another_balancer(production: Production) -> None:
    """A plain default alias that serves as a peer has the one test database, by its own name."""
    dead, alive = production.peers
    production.databases = {
        "balanced": production.balancer(PEERS=["dead", "default"]),
        "dead": {"ENGINE": MYSQL, **dead},
        "default": {"ENGINE": MYSQL, **alive},
    }
    production.configure()
    # The plain engine's connection, which serves the view, knows no peer.
    production.project.write({"urls.py": FILES["urls.py"].replace("connection.peer.name", "None")})
    production.use_tests('{"default", "balanced"}')
    output = production.tested("-v2")
    assert re.findall(r"Creating test database for alias '(\w+)'", output) == ["default"]
    production.tested("--parallel", "2")
    assert production.test_databases() == []


def test_aliases_as_peers_share_the_test_database(production: Production) -> None:
    """Tests that ask for all aliases: one test database, and no connection to the dead peer."""
    production.use_aliases()
    output = production.tested("-v2")
    assert output.count("Creating test database") == 1
    production.tested("--parallel", "2")
    assert production.test_databases() == []


def test_settings_handed_to_another_process(production: Production) -> None:
    """A process that a test starts with a copy of its settings uses the test database, too."""
    text = """
import subprocess, sys
from django.conf import settings
from django.db import connection
from django.test import TransactionTestCase
class Handed(TransactionTestCase):
    def test_it(self):
        assert connection.peer is not None
        script = (
            "from django.conf import settings; from django.db import connection;"
            f"settings.configure(DATABASES={settings.DATABASES!r});"
            "cursor = connection.cursor(); cursor.execute('SELECT DATABASE()');"
            "print(cursor.fetchone())"
        )
        said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        assert said.stdout == "('test_%s',)\\n", said
"""
    production.project.write({"shop/tests.py": text % DATABASE})
    assert "Ran 1 test" in production.project.manage("test")


def test_dropped_where_it_was_made(two_alive: TwoAlive) -> None:
    output = two_alive.project.manage("test", "--parallel", "2", "--noinput")
    assert "Ran 2 tests" in output
    assert two_alive.on_each("SHOW DATABASES LIKE 'test%'") == [[], []]


def test_overlap(production: Production) -> None:
    """A balancer over some of another's peers: refused, or a test database of its own."""
    first, alive = production.peers
    # Its signature is the least.
    production.peers[0] = {**first, "PORT": 1}
    production.databases = {
        "default": production.balancer(),
        "reports": production.balancer(PEERS=[alive]),
    }
    production.configure()
    production.use_tests('{"default", "reports"}')
    output = production.project.manage("test", "--noinput", status=1)
    assert "'default' and 'reports' would each make a test database" in output
    # Nothing has been made over it.
    assert production.test_databases() == [f"test_{DATABASE}"]
    production.databases["reports"]["TEST"] = {"NAME": f"test_{DATABASE}_reports"}
    production.configure()
    output = production.tested("--noinput", "-v2")
    assert output.count("Creating test database") == 2


def test_peer_that_is_made_after_its_balancer(production: Production) -> None:
    """Without the app, and met before its balancer: its plain engine would clobber."""
    # Its signature is the least, and that of peer1 another.
    production.peers[0] = {**production.peers[0], "PORT": 1}
    production.use_aliases()
    aliases = production.databases
    balanced = {**aliases.pop("default"), "TEST": {"DEPENDENCIES": []}}
    for one in aliases.values():
        one["TEST"] = {"DEPENDENCIES": ["balanced"]}
    memory = {"ENGINE": SQLITE, "NAME": ":memory:"}
    production.databases = {**aliases, "balanced": balanced, "default": memory}
    production.configure()
    production.use_tests('{"balanced", "peer1"}')
    without = FILES["settings.py"].replace('"django_proxysql", ', "")
    production.project.write({"settings.py": without})
    output = production.project.manage("test", "--noinput", status=1)
    assert "'peer1' would make a test database of its own where that of 'balanced' is" in output
    assert "Add 'django_proxysql' to INSTALLED_APPS" in output
    # Tests that do not ask for it run.
    production.project.write({"shop/tests.py": UNTOUCHED.replace("default", "balanced")})
    assert "Ran 2 tests" in production.project.manage("test", "--noinput")
