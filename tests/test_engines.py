"""Any Django backend may be the peers' engine, and stays what it is."""

from __future__ import annotations

import copy
import ctypes.util
import os
import pathlib
import subprocess
import sys
import textwrap
import threading
from typing import Any

import pytest
from django.core.exceptions import ImproperlyConfigured
from django.db import connection as default_connection
from django.db import connections
from django.db.backends.base.base import NO_DB_ALIAS
from django.db.utils import load_backend

from django_proxysql import balancers
from django_proxysql.backends.proxysql.base import DatabaseWrapper
from django_proxysql.conf import ENGINE
from tests.app.models import Token
from tests.engine import (
    MYSQL,
    POSTGRESQL,
    SQLITE,
    engine,
    mysql_peer,
    nodb_cursor,
    postgres_peer,
    sqlite_peer,
)
from tests.servers.mariadb import Node
from tests.servers.postgresql import PostgreSQLNode

ROOT = pathlib.Path(__file__).parent.parent


class Subclassed(DatabaseWrapper):
    """A user's own subclass of the engine."""

    def init_connection_state(self) -> None:
        super().init_connection_state()
        self.initialized = True


def assert_is_like(connection: Any, path: str) -> None:
    """Everything that SQL depends on is the peer engine's own."""
    real = load_backend(path).DatabaseWrapper
    assert isinstance(connection, real)
    assert isinstance(connection, DatabaseWrapper)
    assert connection.vendor == real.vendor
    assert issubclass(connection.SchemaEditorClass, real.SchemaEditorClass)
    assert connection.Database is real.Database
    # Some make theirs in the constructor, past the class's attribute.
    plain = real(dict(connection.settings_dict), "plain")
    assert type(connection.features) is type(plain.features)
    assert type(connection.ops) is type(plain.ops)
    assert type(connection.introspection) is type(plain.introspection)
    assert isinstance(connection.creation, real.creation_class)
    assert isinstance(connection.client, real.client_class)
    assert isinstance(connection.validation, real.validation_class)
    assert connection.ops.connection is connection


def assert_works(connection: Any) -> None:
    """Models, schema editor, introspection, transactions: on whichever engine."""
    tokens = Token.objects.using(connection.alias)
    with connection.schema_editor() as editor:
        if Token._meta.db_table in connection.introspection.table_names():
            editor.delete_model(Token)
        editor.create_model(Token)
    try:
        tokens.create(value="one")
        assert tokens.get().value == "one"
        assert [t.value for t in tokens.iterator()] == ["one"]
        with connection.cursor() as cursor:
            assert Token._meta.db_table in connection.introspection.table_names(cursor)
    finally:
        with connection.schema_editor() as editor:
            editor.delete_model(Token)


def test_mysqlclient(mariadb_pair: tuple[Node, Node]) -> None:
    """MariaDB by mysqlclient."""
    with engine([mysql_peer(mariadb_pair[0])]) as connection:
        assert_is_like(connection, MYSQL)
        assert connection.mysql_is_mariadb
        assert_works(connection)


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2"])
def test_postgresql(postgres: PostgreSQLNode, driver: str) -> None:
    """PostgreSQL by psycopg 3, and by psycopg2 in a process that has no other."""
    if driver == "psycopg":
        with engine([postgres_peer(postgres)], PEER_ENGINE=POSTGRESQL) as connection:
            assert_is_like(connection, POSTGRESQL)
            assert_works(connection)
            assert connection.connection.info.port == postgres.port
        return
    script = """
        import sys
        sys.modules["psycopg"] = None
        import tests.test_engines as these
        from tests.engine import POSTGRESQL, engine
        with engine([{peer!r}], PEER_ENGINE=POSTGRESQL) as connection:
            these.assert_is_like(connection, POSTGRESQL)
            these.assert_works(connection)
            print(connection.Database.__name__, connection.peer.name)
    """
    assert run(script.format(peer=postgres_peer(postgres))) == "psycopg2 peer0\n"


def test_sqlite(tmp_path: pathlib.Path) -> None:
    """SQLite: peers that are paths to one file."""
    (tmp_path / "link").symlink_to(tmp_path / "db")
    peers = [sqlite_peer(tmp_path / "db"), sqlite_peer(tmp_path / "link")]
    with engine(peers, PEER_ENGINE=SQLITE, STRATEGY="round_robin") as connection:
        assert_is_like(connection, SQLITE)
        assert_works(connection)
        names = set()
        for _ in range(2):
            connection.ensure_connection()
            names.add(connection.peer.name)
            connection.close()
        assert names == {"peer0", "peer1"}


def test_pymysql_in_the_place_of_mysqlclient(mariadb_pair: tuple[Node, Node]) -> None:
    """PyMySQL stands in for mysqlclient: circuits judge its errors, trials are bounded too."""
    mariadb_pair[0].kill()
    script = """
        import pymysql
        pymysql.version_info = (2, 2, 1, "final", 0)
        pymysql.install_as_MySQLdb()
        import tests.test_engines as these
        from django_proxysql import balancers
        from tests.engine import MYSQL, Clock, engine
        clock = Clock()
        with engine({peers!r}, STRATEGY="round_robin", clock=clock) as connection:
            these.assert_is_like(connection, MYSQL)
            these.assert_works(connection)
            connection.close()
            connection.ensure_connection()
            print(connection.Database.__name__, connection.peer.name)
            state = balancers["balanced"].snapshot()[0]
            print(state.state, state.fault.name, state.error[:5])
            clock.advance(60)
            connection.close()
            connection.ensure_connection()
            print(connection.peer.name)
    """
    peers = [mysql_peer(node) for node in mariadb_pair]
    lines = run(script.format(peers=peers)).splitlines()
    assert lines == ["pymysql peer1", "open UNREACHABLE (2003", "peer1"]
    mariadb_pair[0].start()


def run(script: str) -> str:
    """Return what ``script`` prints in a process of its own, where Django is set up."""
    setup = "import django\ndjango.setup()\n"
    environment = {**os.environ, "DJANGO_SETTINGS_MODULE": "tests.django_settings"}
    script = textwrap.dedent(script)
    # What is to be imported before Django stands before its own line "import tests…".
    before, middle, after = script.partition("import tests.")
    process = subprocess.run(
        [sys.executable, "-c", before + setup + middle + after],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


@pytest.mark.parametrize(
    "path",
    [
        pytest.param("django.contrib.gis.db.backends.mysql", marks=pytest.mark.server),
        "django.contrib.gis.db.backends.postgis",
        "django.contrib.gis.db.backends.spatialite",
    ],
)
def test_gis(path: str, request: pytest.FixtureRequest, tmp_path: pathlib.Path) -> None:
    """GIS engines are mixed in like others; where GDAL is missing, connect and check say so."""
    if ctypes.util.find_library("gdal") is None:
        with (
            engine([{"HOST": "127.0.0.1", "PORT": 1}], PEER_ENGINE=path) as connection,
            pytest.raises(ImproperlyConfigured, match=r"'balanced'.*PEER_ENGINE.*GDAL"),
        ):
            connection.cursor()
        return
    if "mysql" in path:
        peer = mysql_peer(request.getfixturevalue("mariadb"))
    elif "postgis" in path:
        peer = {"HOST": "127.0.0.1", "PORT": 1, "NAME": "x"}
    else:
        peer = sqlite_peer(tmp_path / "db")
    with engine([peer], PEER_ENGINE=path) as connection:
        assert_is_like(connection, path)
        if "mysql" in path:
            assert_works(connection)


@pytest.mark.parametrize(
    "base",
    [
        pytest.param("mysql", marks=pytest.mark.server),
        pytest.param("postgresql", marks=pytest.mark.server),
        "sqlite3",
    ],
)
def test_django_prometheus(
    base: str, request: pytest.FixtureRequest, tmp_path: pathlib.Path
) -> None:
    """Wrappers of backends, as django-prometheus's: they count what they always count."""
    # What the extra [test] brings on this Python only.
    metrics = pytest.importorskip("django_prometheus.db").metrics
    if base == "mysql":
        peer = mysql_peer(request.getfixturevalue("mariadb"))
    elif base == "postgresql":
        peer = postgres_peer(request.getfixturevalue("postgres"))
    else:
        peer = sqlite_peer(tmp_path / "db")
    path = f"django_prometheus.db.backends.{base}"
    with engine([peer], PEER_ENGINE=path) as connection:
        assert_is_like(connection, path)
        assert isinstance(connection, load_backend(f"django.db.backends.{base}").DatabaseWrapper)
        assert_works(connection)
        labels = metrics.connections_total.labels("balanced", connection.vendor)
        assert labels._value.get() >= 1


# One alias, one set of circuits


def test_copies_share_circuits(mariadb: Node) -> None:
    """copy.copy, connection.copy, _nodb_cursor's wrapper and each thread's: one balancer's all."""
    with engine([mysql_peer(mariadb)]) as connection:
        peer = balancers["balanced"].peers["peer0"]
        connection.ensure_connection()
        assert connection.peer is peer
        connection.close()
        made = [
            copy.copy(connection),
            connection.copy(),
            connection.copy("another"),
            type(connection)({**connection.settings_dict, "NAME": None}, alias=NO_DB_ALIAS),
            type(connection)(copy.deepcopy(connection.settings_dict)),
            connections["balanced"],
        ]
        thread = threading.Thread(target=lambda: made.append(connections["balanced"]))
        thread.start()
        thread.join()
        made[-1].inc_thread_sharing()
        for wrapper in made:
            assert type(wrapper) is type(connection)
            wrapper.ensure_connection()
            assert wrapper.peer is peer
            wrapper.close()
        assert [wrapper.alias for wrapper in made[2:5]] == ["another", NO_DB_ALIAS, "default"]
        assert made[-1] is not connection
        assert peer.connections == 0


def test_connections_are_counted_with_their_copies(mariadb: Node) -> None:
    """A copied wrapper's connection is its own, and each is counted once while it is open."""
    with engine([mysql_peer(mariadb)]) as connection:
        peer = balancers["balanced"].peers["peer0"]
        connection.ensure_connection()
        other = connection.copy()
        assert other.connection is None
        assert other.peer is None
        other.ensure_connection()
        assert peer.connections == 2
        other.close()
        assert peer.connections == 1
        with nodb_cursor(connection):
            assert peer.connections == 2
        assert peer.connections == 1
        connection.close()
        assert peer.connections == 0


def test_subclass_of_the_engine(mariadb: Node) -> None:
    """A user's subclass of the engine is an ENGINE like any other, by a path of its own."""
    settings = {"ENGINE": __name__, "PEERS": [mysql_peer(mariadb)]}
    with engine([mysql_peer(mariadb)]) as connection:
        balanced = connection.settings_dict
        wrapper = Subclassed(balanced, "balanced")
        assert_is_like(wrapper, MYSQL)
        assert isinstance(wrapper, Subclassed)
        assert type(wrapper.copy()) is type(wrapper)
        wrapper.ensure_connection()
        assert wrapper.initialized
        assert wrapper.peer is balancers["balanced"].peers["peer0"]
        wrapper.close()
    assert settings["ENGINE"] != ENGINE


def test_wrapper_of_a_bare_dict() -> None:
    """A wrapper can be made of any dict, as Django's own tests do, and connects as it says."""
    for settings in ({}, {"NAME": ":memory:"}, {"PEERS": None}, {"PEERS": ["nonesuch"]}):
        wrapper: Any = DatabaseWrapper(dict(settings), "strange")
        assert wrapper.alias == "strange"
    bare = {**default_connection.settings_dict, "PEER_ENGINE": SQLITE}
    wrapper = DatabaseWrapper(bare, "bare")
    assert_is_like(wrapper, SQLITE)
    wrapper.ensure_connection()
    wrapper.connection.close()
    wrapper.connection = None
    assert "bare" not in balancers
    balancers.forget()


def test_engine_without_peers_is_misconfigured() -> None:
    """An entry of DATABASES without PEERS is never taken for a plain database."""
    with engine([{"HOST": "127.0.0.1"}]):
        entry = connections.databases["balanced"]
        balancers.forget()
        for key in ("PEERS", "LOAD_BALANCER", "ENGINE"):
            entry.pop(key, None)
        wrapper: Any = Subclassed(entry, "balanced")
        with pytest.raises(ImproperlyConfigured, match=r"'balanced'.*PEERS is empty"):
            wrapper.ensure_connection()
