"""manage.py of a real project with two MariaDB peers, one of them down."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import django
import pytest

from django_proxysql.conf.keys import ENGINE
from tests.engine import MYSQL, mysql_peer
from tests.project import ROOT, Project, get
from tests.servers import PASSWORD
from tests.servers.mariadb import Node
from tests.servers.ports import HOST, ports
from tests.test_checks import has_database_option

DATABASE = "shop"
TESTING = (ROOT / "docs" / "howto" / "testing.rst").read_text(encoding="utf-8")

FILES = {
    "settings.py": """
import django, json, pathlib
SECRET_KEY = "for tests only"
DEBUG = True
INSTALLED_APPS = ["django_proxysql", "shop"]
DATABASES = json.loads(pathlib.Path(__file__).with_name("databases.json").read_text())
# Before 3.2 makemigrations ends, on any engine, with the first alias that cannot be reached.
DATABASE_ROUTERS = ["routers.Peers"] if django.VERSION >= (3, 2) else []
DEFAULT_AUTO_FIELD = "django.db.models.AutoField"
ROOT_URLCONF = "urls"
STATIC_URL, MEDIA_URL = "/static/", "/media/"
USE_TZ = True
LOGGING = {
    "version": 1,
    "handlers": {"file": {"class": "logging.FileHandler", "filename": "log", "level": "INFO"}},
    "loggers": {"django_proxysql": {"handlers": ["file"], "level": "INFO"}},
}
""",
    "routers.py": """
class Peers:
    "With a router, whatever it says, makemigrations looks at every alias."
""",
    "urls.py": """
from django.db import connection
from django.http import JsonResponse
from django.urls import path
from shop.models import Item
def index(request):
    item = Item.objects.create(name="seen")
    items = Item.objects.count()
    return JsonResponse({"id": item.pk, "items": items, "peer": connection.peer.name})
urlpatterns = [path("", index)]
""",
    "shop/__init__.py": "",
    "shop/models.py": """
from django.db import models
class Item(models.Model):
    name = models.CharField(max_length=20, unique=False)
""",
    "shop/migrations/__init__.py": "",
    # As makemigrations writes it.
    "shop/migrations/0001_initial.py": """
from django.db import migrations, models
ID = {"auto_created": True, "primary_key": True, "serialize": False, "verbose_name": "ID"}
class Migration(migrations.Migration):
    initial = True
    dependencies = []
    operations = [
        migrations.CreateModel(
            name="Item",
            fields=[
                ("id", models.AutoField(**ID)),
                ("name", models.CharField(max_length=20)),
            ],
        ),
    ]
""",
    "shop/tests.py": """
from django.db import connection
from django.test import TestCase, TransactionTestCase
from .models import Item
class One(TestCase):
    def test_one(self):
        Item.objects.create(name="one")
        self.assertEqual(Item.objects.count(), 1)
        with connection.cursor() as cursor:
            cursor.execute("SELECT DATABASE() LIKE 'test_shop%'")
            self.assertEqual(cursor.fetchone(), (1,))
class Two(TransactionTestCase):
    def test_two(self):
        Item.objects.create(name="two")
        connection.close()
        self.assertEqual(Item.objects.count(), 1)
""",
}


class Shop(Project):
    """A project with one table, and two peers of which one lives."""

    def __init__(self, root: Path, alive: Node, databases: dict[str, Any]) -> None:
        super().__init__(root, {**FILES, "databases.json": json.dumps(databases)})
        self.alive = alive

    def items(self) -> str:
        return self.alive.sql("SELECT name FROM shop_item", DATABASE).strip()


@pytest.fixture(params=["inline", "aliases"])
def project(
    request: pytest.FixtureRequest, mariadb_pair: tuple[Node, Node], tmp_path: Path
) -> Iterator[Shop]:
    """A project whose tables are made, whose first peer is dead, and is always tried first."""
    dead, alive = mariadb_pair
    dead.kill()
    alive.create_database(DATABASE)
    alive.create_user("shop", PASSWORD, "ALL PRIVILEGES ON shop.*")
    peers: list[Any] = [
        mysql_peer(dead, NAME=DATABASE, USER="shop"),
        mysql_peer(alive, NAME=DATABASE, USER="shop", PRIORITY=1),
    ]
    databases: dict[str, Any] = {"default": {"ENGINE": ENGINE, "PEERS": peers}}
    if request.param == "aliases":
        for number, peer in enumerate(peers):
            databases[f"peer{number}"] = {"ENGINE": MYSQL, **peer}
        databases["default"]["PEERS"] = ["peer0", "peer1"]
    made = Shop(tmp_path, alive, databases)
    assert "Applying shop.0001_initial... OK" in made.manage("migrate")
    made.log()
    yield made
    alive.sql(f"DROP DATABASE {DATABASE}; DROP USER shop")


def assert_one_line_of_the_dead_peer(project: Shop) -> None:
    """However often a process connects, the dead peer is one line in its log."""
    (line,) = project.log()
    assert re.match(r"default: circuit of peer0 \(127\.0\.0\.1:\d+\) opened, .*: \(2002, ", line)


def test_migrate(project: Shop) -> None:
    """makemigrations; migrate, again and back: on the peer that is left, with one line on the
    other."""
    (project.root / "shop/migrations/0001_initial.py").unlink()
    assert "Create model Item" in project.manage("makemigrations", "shop")
    project.log()
    assert "No migrations to apply" in project.manage("migrate")
    assert_one_line_of_the_dead_peer(project)
    assert "[X] 0001_initial" in project.manage("showmigrations", "shop")
    project.manage("migrate", "shop", "zero")
    assert "shop_item" not in project.alive.sql("SHOW TABLES", DATABASE)
    assert "class ShopItem" not in project.manage("inspectdb")


def test_shell(project: Shop) -> None:
    """shell: models read and write."""
    script = (
        "from shop.models import Item; Item.objects.create(name='x'); print(Item.objects.get())"
    )
    assert "Item object (1)" in project.manage("shell", "-c", script)
    assert_one_line_of_the_dead_peer(project)
    assert project.items() == "x"


def test_test(project: Shop) -> None:
    """test: on a test database of the living peer's, which is gone afterwards.

    The user may do what the docs grant.
    """
    (grant,) = re.findall(r"^ +(GRANT .*;)$", TESTING, re.MULTILINE)
    project.alive.sql(grant)
    assert "Ran 2 tests" in project.manage("test")
    assert_one_line_of_the_dead_peer(project)
    # Each process of a parallel run has a clone of the test database.
    project.manage("test", "--parallel", "2")
    assert project.items() == ""
    assert "test_shop" not in project.alive.sql("SHOW DATABASES")


@pytest.mark.parametrize("project", ["aliases"], indirect=True)
def test_test_of_a_mirror_alone_is_refused(project: Shop) -> None:
    """It would be on production's database. The docs show the error."""
    project.write(
        {
            "shop/alone.py": """
from django.db import connections
from django.test import TransactionTestCase
class Alone(TransactionTestCase):
    databases = {"peer1"}
    def test_alone(self):
        connections["peer1"].cursor()
"""
        }
    )
    (error,) = re.findall(r"^ +(A test uses 'peer0'.*)$", TESTING, re.MULTILINE)
    assert error.replace("peer0", "peer1") in project.manage("test", "shop.alone", status=1)


@pytest.mark.parametrize(
    "args", [(), pytest.param(("--database", "default"), marks=has_database_option)]
)
def test_check(project: Shop, args: tuple[str, ...]) -> None:
    """check finds nothing, for a peer that is down is no mistake."""
    assert "no issues" in project.manage("check", *args)


@pytest.mark.skipif(django.VERSION < (3, 1), reason="dbshell's arguments came with Django 3.1")
def test_dbshell(project: Shop) -> None:
    """dbshell: the server's client is connected to a peer that lives."""
    output = project.manage("dbshell", "--", "--skip-ssl", "-N", "-e", "SELECT @@port, DATABASE()")
    assert output.split() == [str(project.alive.port), DATABASE]


def test_runserver(project: Shop) -> None:
    """runserver: every request is served by the peer that lives."""
    address = f"{HOST}:{ports.reserve()}"
    server = project.start("runserver", "--noreload", address)
    try:
        for number in (1, 2, 3):
            answer = json.loads(get(f"http://{address}/", server))
            assert answer == {"id": number, "items": number, "peer": "peer1"}
    finally:
        server.terminate()
        server.communicate(timeout=120)
    assert_one_line_of_the_dead_peer(project)


def test_down_altogether(project: Shop) -> None:
    """With no peer left a command ends with the error that names each of them."""
    project.alive.kill()
    output = project.manage("migrate", status=1)
    last = output.strip().splitlines()[-1]
    assert "No peer of 'default' can be reached. peer0 (127.0.0.1:" in last
    assert last.count("(2002, ") == 2
    project.alive.start()
