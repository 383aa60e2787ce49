"""Management commands of a project with three peers: one is dead, one hangs, one lives.

The dead one and the one that hangs come first in DATABASES and are tried first: PRIORITY. A router
is there, so that makemigrations (from Django 3.2 on) looks at every alias; it denies nothing.
"""

from __future__ import annotations

import json
import re
import socket
import unittest
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import django
import pytest
from django.db import connections
from django.test import SimpleTestCase

from django_proxysql.conf.keys import ENGINE
from tests.engine import MYSQL, POSTGRESQL, engine, mysql_peer, postgres_peer
from tests.project import Project, get
from tests.servers import USER
from tests.servers.mariadb import Node
from tests.servers.ports import HOST, ports
from tests.servers.postgresql import PostgreSQLNode
from tests.test_checks import has_database_option
from tests.test_project import FILES

DATABASE = "commands"

#: Seconds for a command that looks at each alias; CONNECT_TIMEOUT is 1. Without it one took 45.
BOUND = 30

MIGRATION = """
from django.db import connection, migrations, models

PORTS = []

def look(apps, schema_editor):
    # As an application may: a new connection, which must be one to the same peer.
    connection.close()
    with connection.cursor() as cursor:
        cursor.execute("SELECT @@port")
        PORTS.append(cursor.fetchone()[0])
    apps.get_model("shop", "Item").objects.create(name="by a migration")

def say(apps, schema_editor):
    look(apps, schema_editor)
    print("ports", PORTS)

class Migration(migrations.Migration):
    atomic = False
    dependencies = [("shop", "0001_initial")]
    operations = [
        migrations.RunPython(look, migrations.RunPython.noop),
        migrations.AddField("item", "price", models.IntegerField(null=True)),
        migrations.RunPython(look, migrations.RunPython.noop),
        migrations.AddField("item", "stock", models.IntegerField(null=True)),
        migrations.RunPython(look, migrations.RunPython.noop),
        migrations.RunPython(say, migrations.RunPython.noop),
    ]
"""


class Shop(Project):
    """The project, and what stands in its DATABASES."""

    def __init__(
        self,
        root: Path,
        alive: Node | PostgreSQLNode,
        peers: list[dict[str, Any]],
        engine: str = MYSQL,
    ) -> None:
        super().__init__(root, FILES)
        self.alive = alive
        self.peers = peers
        self.engine = engine

    def configure(self, aliases: bool, **settings: Any) -> None:
        """Write DATABASES: the peers as aliases, before their balancer, or inline."""
        names = {f"peer{n}": {"ENGINE": self.engine, **peer} for n, peer in enumerate(self.peers)}
        databases: dict[str, Any] = names if aliases else {}
        databases["default"] = {
            "ENGINE": ENGINE,
            "PEER_ENGINE": self.engine,
            "PEERS": list(names) if aliases else self.peers,
            # libpq takes no less than 2.
            "CONNECT_TIMEOUT": 1 if self.engine == MYSQL else 2,
            **settings,
        }
        self.write({"databases.json": json.dumps(databases)})


@pytest.fixture
def dead() -> Iterator[int]:
    """A port that refuses connections, as a dead server's does."""
    port = ports.reserve()
    yield port
    ports.release(port)


@pytest.fixture(params=["mysql inline", "mysql aliases", "postgresql inline", "postgresql aliases"])
def shop(request: pytest.FixtureRequest, dead: int, tmp_path: Path) -> Iterator[Shop]:
    """A project whose tables are made while all peers but one are out."""
    kind, how = request.param.split()
    server: Any
    if kind == "mysql":
        server, peer, backend = request.getfixturevalue("mariadb"), mysql_peer, MYSQL
        server.create_database(DATABASE)
    else:
        server, peer, backend = request.getfixturevalue("postgres"), postgres_peer, POSTGRESQL
        server.create_database(DATABASE, USER)
    # It takes connections, and says nothing, as a frozen server does.
    with socket.create_server((HOST, 0)) as hangs:
        peers = [peer(server, NAME=DATABASE, PORT=port) for port in (dead, hangs.getsockname()[1])]
        peers.append(peer(server, NAME=DATABASE, PRIORITY=1))
        made = Shop(tmp_path, server, peers, backend)
        made.configure(how == "aliases")
        assert "Applying shop.0001_initial... OK" in made.manage("migrate")
        yield made
    server.sql(f"DROP DATABASE {DATABASE}")


#: For what the engines have in common, or what costs much.
on_mysql = pytest.mark.parametrize("shop", ["mysql inline", "mysql aliases"], indirect=True)


def items(shop: Shop) -> list[str]:
    return shop.alive.sql("SELECT name FROM shop_item", DATABASE).splitlines()


def tables(shop: Shop) -> list[str]:
    return shop.alive.sql("SELECT table_name FROM information_schema.tables", DATABASE).split()


def test_migrations(shop: Shop) -> None:
    """makemigrations (it looks at every alias), migrate, showmigrations, sqlmigrate, inspectdb."""
    output = shop.manage("makemigrations", "--check", "--dry-run", timeout=BOUND)
    assert "No changes detected" in output
    (shop.root / "shop/migrations/0001_initial.py").unlink()
    assert "Create model Item" in shop.manage("makemigrations", "shop", timeout=BOUND)
    aliases = "peer0" in json.loads((shop.root / "databases.json").read_text())
    aliases = aliases and django.VERSION >= (3, 2)
    assert ("performed for database connection 'peer1'" in output) is aliases
    assert "[X] 0001_initial" in shop.manage("showmigrations", "shop")
    assert "CREATE TABLE" in shop.manage("sqlmigrate", "shop", "0001")
    assert "class ShopItem" in shop.manage("inspectdb")
    shop.manage("migrate", "shop", "zero")
    assert "shop_item" not in tables(shop)


def test_data(shop: Shop) -> None:
    """dumpdata, sqlflush, flush, loaddata, createcachetable."""
    shop.alive.sql("INSERT INTO shop_item (name) VALUES ('x')", DATABASE)
    shop.manage("dumpdata", "shop", "-o", "dump.json")
    assert "shop_item" in shop.manage("sqlflush")
    assert items(shop) == ["x"]
    shop.manage("flush", "--noinput")
    assert items(shop) == []
    assert "Installed 1 object" in shop.manage("loaddata", "dump.json")
    assert items(shop) == ["x"]
    with (shop.root / "settings.py").open("a") as settings:
        backend = "django.core.cache.backends.db.DatabaseCache"
        settings.write(f"CACHES = {{'default': {{'BACKEND': {backend!r}, 'LOCATION': 'cache'}}}}\n")
    shop.manage("createcachetable")
    assert tables(shop).count("cache") == 1


@on_mysql
def test_check(shop: Shop) -> None:
    """check: nothing is wrong; of a peer that is out, asked for by its alias, a warning."""
    assert "no issues" in shop.manage("check")
    assert "no issues" in shop.manage("check", "--deploy", "--tag", "models")


@has_database_option
@on_mysql
def test_check_of_databases(shop: Shop) -> None:
    """check --database: the balancer's has nothing to say; a peer that is out is passed by."""
    assert "no issues" in shop.manage("check", "--database", "default")
    if "peer0" in json.loads((shop.root / "databases.json").read_text()):
        output = shop.manage("check", *(f"--database=peer{n}" for n in range(3)))
        assert re.findall(r"Peer '(\w+)' cannot be reached", output) == ["peer0", "peer1"]


#: How a client is asked which server it is on, and who it is there.
CLIENTS = {
    MYSQL: ("--skip-ssl", "-N", "-e", "SELECT @@port, DATABASE(), SUBSTRING_INDEX(USER(), '@', 1)"),
    POSTGRESQL: (
        *("-X", "-A", "-t", "-F", " ", "-c"),
        "SELECT inet_server_port(), current_database(), current_user",
    ),
}


@pytest.mark.skipif(django.VERSION < (3, 1), reason="dbshell's arguments came with Django 3.1")
def test_dbshell_opens_on_the_peer_that_lives(shop: Shop) -> None:
    """Logged in by the peer's own entry."""
    output = shop.manage("dbshell", "--", *CLIENTS[shop.engine], timeout=BOUND)
    assert output.split() == [str(shop.alive.port), DATABASE, USER]


@pytest.mark.skipif(django.VERSION < (3, 2), reason="runshell() calls something else there")
def test_dbshell_where_no_connection_is_to_be_made() -> None:
    """In a SimpleTestCase the shell is opened on the first peer, as the plain engine's is."""

    class Shells(SimpleTestCase):
        def test_shell(self) -> None:
            with mock.patch("subprocess.run") as run:
                connections["balanced"].client.runshell([])
            assert "--host=10.0.0.1" in run.call_args[0][0]

    peers = [{"HOST": "10.0.0.1"}, {"HOST": "10.0.0.2"}]
    with engine(peers, CONNECT_TIMEOUT=1):
        result = unittest.TestResult()
        unittest.TestSuite([Shells("test_shell")]).run(result)
    assert (result.testsRun, result.failures, result.errors) == (1, [], [])


@on_mysql
def test_testserver(shop: Shop) -> None:
    """testserver: a test database with a fixture in it, served, on the peer that lives."""
    row = {"model": "shop.item", "pk": 7, "fields": {"name": "from a fixture"}}
    shop.write(
        {
            "data.json": json.dumps([row]),
            "settings.py": FILES["settings.py"] + "ALLOWED_HOSTS = ['*']\n",
        }
    )
    address = f"{HOST}:{ports.reserve()}"
    server = shop.start("testserver", "--noinput", "--addrport", address, "data.json")
    try:
        answer = json.loads(get(f"http://{address}/", server))
    finally:
        server.terminate()
        server.communicate(timeout=120)
        shop.alive.sql(f"DROP DATABASE IF EXISTS test_{DATABASE}")
    assert answer == {"id": 8, "items": 2, "peer": "peer2"}
    assert items(shop) == []


def test_a_migration_stays_on_one_peer(mariadb_pair: tuple[Node, Node], tmp_path: Path) -> None:
    """Several operations, and functions that connect anew: all of one migration on one peer."""
    for node in mariadb_pair:
        node.create_database(DATABASE)
    peers = [mysql_peer(node, NAME=DATABASE) for node in mariadb_pair]
    shop = Shop(tmp_path, mariadb_pair[0], peers)
    # In turn: each connection but for the pin is one to the other peer.
    shop.configure(False, STRATEGY="round_robin")
    shop.write({"shop/migrations/0002_more.py": MIGRATION})
    for number in range(2):
        # The first migration's tables are on both, as if they had been replicated.
        shop.configure(False, STRATEGY="round_robin", PEERS=[peers[number]])
        shop.manage("migrate", "shop", "0001")
    shop.configure(False, STRATEGY="round_robin")
    output = shop.manage("migrate", "shop", "0002")
    said = re.search(r"ports \[(\d+), \1, \1, \1\]", output)
    assert said, output
    counts = {
        node.port: node.sql("SELECT COUNT(*) FROM shop_item", DATABASE).strip()
        for node in mariadb_pair
    }
    assert counts.pop(int(said[1])) == "4"
    assert list(counts.values()) == ["0"]
    for node in mariadb_pair:
        node.sql(f"DROP DATABASE {DATABASE}")


@pytest.mark.skipif(django.VERSION < (3, 1), reason="dbshell's arguments came with Django 3.1")
@pytest.mark.parametrize("shop", ["mysql aliases"], indirect=True)
def test_dbshell_of_a_peer(shop: Shop) -> None:
    """dbshell of an alias peer opens on that server, with a PASSWORD that is a callable."""
    with (shop.root / "settings.py").open("a") as settings:
        settings.write(
            "PASSWORD = DATABASES['peer2']['PASSWORD']\n"
            "DATABASES['peer2']['PASSWORD'] = lambda: PASSWORD\n"
        )
    output = shop.manage("dbshell", "--database", "peer2", "--", *CLIENTS[MYSQL])
    assert output.split() == [str(shop.alive.port), DATABASE, USER]
