"""multiprocessing in each of its ways, a PASSWORD that is a callable, and pickled settings."""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import django
import pytest

from django_proxysql.conf.keys import ENGINE
from tests.engine import POSTGRESQL, engine, mysql_peer
from tests.project import Project
from tests.servers import PASSWORD, USER, Address
from tests.servers.mariadb import Node
from tests.servers.postgresql import PostgreSQLNode
from tests.test_project import DATABASE, FILES

RUN = """
import json, multiprocessing, os, sys, django
django.setup()
from django.db import connection
from django_proxysql import balancers

def states():
    return [peer.state for peer in balancers["default"].snapshot()]

SESSION = {"mysql": "CONNECTION_ID()", "postgresql": "pg_backend_pid()"}[connection.vendor]

def work(number):
    known = states()
    with connection.cursor() as cursor:
        cursor.execute(f"SELECT %s + 0, {SESSION}", [number])
        ((said, session),) = cursor.fetchall()
    return {
        "right": said == number, "pid": os.getpid(), "peer": connection.peer.name,
        "session": session, "known": known, "found": states(),
        "driver": type(connection.connection).__module__,
    }

if __name__ == "__main__":
    method, copies = sys.argv[1:]
    parent = work(0)
    with multiprocessing.get_context(method).Pool(2) as pool:
        children = pool.map(work, range(int(copies)), chunksize=1)
    again = work(1)
    print(json.dumps({"parent": parent, "children": children, "again": again}))
"""
SECRETS = f"""
import threading

def password():
    return {PASSWORD!r}

class Locked:
    def __init__(self):
        self.lock = threading.Lock()

    def password(self):
        return {PASSWORD!r}
"""
#: Ways to write PASSWORD, and what ends of it where settings are pickled.
CALLABLES = {
    "a function": ("secrets_.password", ""),
    "a lambda": ("lambda: secrets_.password()", "<lambda>"),
    "with a lock": ("secrets_.Locked().password", "cannot pickle '_thread.lock' object"),
}


spawns = pytest.mark.skipif(
    django.VERSION < (4, 1), reason="spawn came to test runs with Django 4.1"
)
serves_forks = pytest.mark.skipif(
    django.VERSION < (6,), reason="forkserver came to test runs with Django 6.0"
)


class Shop(Project):
    def __init__(self, root: Path, pair: Sequence[Address], password: str, **balancer: Any) -> None:
        peers = [
            mysql_peer(node, NAME=DATABASE, PRIORITY=number) for number, node in enumerate(pair)
        ]
        for peer in peers:
            del peer["PASSWORD"]
        settings = (
            "import os\nif 'PYMYSQL' in os.environ:\n"
            "    import pymysql\n"
            "    pymysql.version_info = (2, 2, 8, 'final', 0)\n"
            "    pymysql.install_as_MySQLdb()\n" + FILES["settings.py"].lstrip()
        ) + (f'import secrets_\nDATABASES["default"]["PASSWORD"] = {password}\n')
        databases = {"default": {"ENGINE": ENGINE, "PEERS": peers, **balancer}}
        files = {
            **FILES,
            "settings.py": settings,
            "secrets_.py": SECRETS,
            "run.py": RUN,
            "databases.json": json.dumps(databases),
        }
        super().__init__(root, files)

    def run_with(self, *args: str, **environment: str) -> Any:
        process = self.run(
            "run.py",
            *args,
            environment=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        return json.loads(self.output_of(process, 0))

    def test_in_parallel(self, method: str, status: int) -> str:
        """Run the project's tests in two processes that are started by ``method``."""
        manage = (self.root / "manage.py").read_text()
        (self.root / "manage.py").write_text(
            manage.replace(
                '"__main__":\n',
                '"__main__":\n    import multiprocessing\n'
                f"    multiprocessing.set_start_method({method!r})\n",
            )
        )
        return self.manage("test", "--parallel", "2", status=status)


@pytest.fixture
def pair(mariadb_pair: tuple[Node, Node]) -> Iterator[tuple[Node, Node]]:
    """Two servers of which the second, which is asked last, lives."""
    dead, alive = mariadb_pair
    dead.kill()
    alive.create_database(DATABASE)
    yield mariadb_pair
    alive.sql(f"DROP DATABASE {DATABASE}")


@pytest.mark.parametrize(
    ("method", "driver"),
    [
        ("fork", "mysqlclient"),
        pytest.param(
            "fork",
            "PyMySQL",
            marks=pytest.mark.skipif(
                django.VERSION < (3,), reason="Django 2.2 itself fails with today's PyMySQL"
            ),
        ),
        ("forkserver", "mysqlclient"),
        ("spawn", "mysqlclient"),
    ],
)
def test_children_connect_for_themselves(
    method: str, driver: str, pair: tuple[Node, Node], tmp_path: Path
) -> None:
    """A forked child starts from what its parent knew of the peers, any other from nothing."""
    environment = {"PYMYSQL": "1"} if driver == "PyMySQL" else {}
    said = Shop(tmp_path, pair, "secrets_.password").run_with(method, "40", **environment)
    assert said["parent"]["driver"].startswith("pymysql" if environment else "MySQLdb")
    assert_of_their_own(said, method)


@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param(
            {"pool": {"min_size": 2}},
            marks=pytest.mark.skipif(
                django.VERSION < (5, 1), reason="Django's pools came with Django 5.1"
            ),
        ),
    ],
)
def test_children_of_postgresql(
    options: dict[str, Any],
    postgres_pair: tuple[PostgreSQLNode, PostgreSQLNode],
    tmp_path: Path,
) -> None:
    """A forked child leaves its parent's connections, and those in its pool, alone."""
    dead, alive = postgres_pair
    dead.kill()
    alive.create_database(DATABASE, USER)
    settings = {"PEER_ENGINE": POSTGRESQL, "OPTIONS": options}
    shop = Shop(tmp_path, postgres_pair, "secrets_.password", **settings)
    try:
        assert_of_their_own(shop.run_with("fork", "40"), "fork")
    finally:
        alive.terminate_connections(USER)
        alive.sql(f"DROP DATABASE {DATABASE}")


def assert_of_their_own(said: Any, method: str) -> None:
    """Each process has a session of its own, and the parent's goes on."""
    parent, children = said["parent"], said["children"]
    assert (said["again"]["session"], said["again"]["right"]) == (parent["session"], True)
    assert parent["found"] == ["open", "closed"]
    first = {child["pid"]: child for child in reversed(children)}
    assert parent["pid"] not in first
    for child in children:
        assert child["right"]
        assert child["peer"] == "peer1"
        assert child["found"] == ["open", "closed"]
        assert child["session"] == first[child["pid"]]["session"]
    assert len({one["session"] for one in [parent, *first.values()]}) == 1 + len(first)
    known = ["open", "closed"] if method == "fork" else ["closed", "closed"]
    assert [child["known"] for child in first.values()] == [known] * len(first)


@pytest.mark.parametrize(
    ("method", "name"),
    [
        *(pytest.param("spawn", name, marks=spawns) for name in CALLABLES),
        *(pytest.param("forkserver", name, marks=serves_forks) for name in CALLABLES),
    ],
)
def test_test_runs_that_pickle_the_settings(
    method: str, name: str, pair: tuple[Node, Node], tmp_path: Path
) -> None:
    """test --parallel hands the settings on; a PASSWORD goes along that can be pickled."""
    password, error = CALLABLES[name]
    shop = Shop(tmp_path, pair, password)
    output = shop.test_in_parallel(method, status=1 if error else 0)
    assert error in output
    assert ("Ran 2 tests" in output) is not bool(error)
    for database in pair[1].sql("SHOW DATABASES LIKE 'test_shop%'").split():
        pair[1].sql(f"DROP DATABASE {database}")


def password() -> str:
    return PASSWORD


def test_settings_survive_copies() -> None:
    """Django deep-copies and pickles settings; what finds the circuits goes along."""
    with engine([{"HOST": "127.0.0.1"}], NAME="x", PASSWORD=password) as connection:
        settings = connection.settings_dict
        assert b"breaker" not in pickle.dumps(settings).lower()
        for made in (copy.deepcopy(settings), pickle.loads(pickle.dumps(settings))):
            assert made == settings
            other = type(connection)(made, "another")
            assert other._registered() is connection._registered()
            assert connection.copy().settings_dict["PASSWORD"] is password


EARLY = """
import gc, os, sys, threading
# Before ours, which is registered later: a library's that has much to do after a fork.
os.register_at_fork(after_in_child=gc.collect)
import django
django.setup()
from django.db import connection

def ask():
    with connection.cursor() as cursor:
        cursor.execute("SELECT 1")
        cursor.fetchall()
    return connection.connection.thread_id()

def hold():
    before = ask()
    ready.set()
    over.wait()
    print(ask() == before)

ready, over = threading.Event(), threading.Event()
thread = threading.Thread(target=hold)
thread.start()
ready.wait()
child = os.fork()
if not child:
    os._exit(0)
os.waitpid(child, 0)
over.set()
thread.join()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="fork is Unix's")
def test_what_is_collected_before_we_are_called(pair: tuple[Node, Node], tmp_path: Path) -> None:
    """A child's garbage collection says no goodbye for the parent's threads either."""
    script = "import warnings\nwarnings.simplefilter('ignore')\n" + EARLY
    assert Shop(tmp_path, pair, "secrets_.password").python(script).split() == ["True"]


def test_a_password_that_cannot_be_copied(pair: tuple[Node, Node], tmp_path: Path) -> None:
    """A method of an object that holds a lock: every command works that pickles no settings."""
    password, _ = CALLABLES["with a lock"]
    shop = Shop(tmp_path, pair, password)
    shop.manage("migrate")
    if django.VERSION >= (3, 1):
        assert "no issues" in shop.manage("check", "--database", "default")
    assert "Ran 2 tests" in shop.manage("test")
