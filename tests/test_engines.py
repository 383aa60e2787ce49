"""Any Django backend may be the peers' engine, and stays what it is."""

from __future__ import annotations

import contextlib
import copy
import gc
import pathlib
import re
import sqlite3
import sys
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

import django
import pytest
from django.core.exceptions import ImproperlyConfigured
from django.db import connection as default_connection
from django.db import connections
from django.db.backends.base.base import NO_DB_ALIAS
from django.db.utils import load_backend
from django.test import modify_settings

from django_proxysql import balancers
from django_proxysql.backends.proxysql.base import DatabaseWrapper
from tests.app.models import Token
from tests.children import run_python
from tests.engine import (
    MYSQL,
    POSTGRESQL,
    SQLITE,
    engine,
    forget,
    mysql_peer,
    nodb_cursor,
    postgres_peer,
    sqlite_peer,
)
from tests.fakes import in_thread
from tests.servers import USER
from tests.servers.faultproxy import FaultProxy
from tests.servers.mariadb import Node
from tests.servers.postgresql import PostgreSQLNode

# What the extra [test] brings where its Djangos are tested.
without_prometheus = pytest.mark.skipif(
    sys.version_info[:2] != (3, 11), reason="django-prometheus knows Django 4.2 to 6.0 only"
)


loads_extensions = hasattr(sqlite3.Connection, "enable_load_extension")


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


@pytest.mark.server
@pytest.mark.parametrize(
    ("fixture", "path", "ask"),
    [
        ("mariadb", MYSQL, "SELECT @@port"),
        ("postgres", POSTGRESQL, "SELECT inet_server_port()"),
    ],
)
def test_a_server(fixture: str, path: str, ask: str, request: pytest.FixtureRequest) -> None:
    """MariaDB by mysqlclient, PostgreSQL by psycopg."""
    server = request.getfixturevalue(fixture)
    with engine([mysql_peer(server)], PEER_ENGINE=path) as connection:
        assert_is_like(connection, path)
        assert_works(connection)
        with connection.cursor() as cursor:
            cursor.execute(ask)
            assert cursor.fetchone() == (server.port,)


def test_psycopg2(postgres: PostgreSQLNode) -> None:
    """In a process that has no other driver for PostgreSQL."""
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
    # What is to be imported before Django stands before its own line "import tests…".
    before, middle, after = textwrap.dedent(script).partition("import tests.")
    return run_python(before + setup + middle + after).stdout


GIS = "django.contrib.gis.db.backends."


def test_connect_and_check_say_where_gdal_cannot_be_loaded() -> None:
    script = """
    import os
    from django.conf import settings
    settings.GDAL_LIBRARY_PATH = "/nonexistent/libgdal.so"
    import tests.engine
    from django.core.exceptions import ImproperlyConfigured
    from tests.engine import engine
    with engine([{"HOST": "127.0.0.1"}], PEER_ENGINE="django.contrib.gis.db.backends.mysql") as c:
        try:
            c.cursor()
        except ImproperlyConfigured as exc:
            print(exc)
    """
    assert re.search(r"'balanced'.*PEER_ENGINE.*gdal", run(script))


def assert_maps(connection: Any) -> None:
    """A geometry is one after it has been written and read."""
    from django.contrib.gis.db import models
    from django.contrib.gis.db.models.functions import Distance
    from django.contrib.gis.geos import Point
    from django.test.utils import isolate_apps

    with isolate_apps("tests.app"):

        class Place(models.Model):
            where = models.PointField(srid=4326)

            class Meta:
                app_label = "app"
                db_table = "place"

        places = Place._default_manager.using(connection.alias)
        with connection.schema_editor() as editor:
            editor.create_model(Place)
        try:
            places.create(where=Point(10.75, 59.91, srid=4326))
            near = Point(10.75, 59.91, srid=4326)
            assert places.get().where == near
            assert places.filter(where__equals=near).count() == 1
            # Where does MariaDB measure between points of the globe?
            if connection.vendor != "mysql":
                assert places.annotate(far=Distance("where", near)).get().far.m == 0
        finally:
            with connection.schema_editor() as editor:
                editor.delete_model(Place)


def test_gis_on_mariadb(mariadb_pair: tuple[Node, Node]) -> None:
    """Django's GIS engine for MySQL and MariaDB, and a peer that dies."""
    peers = [mysql_peer(node, PRIORITY=number) for number, node in enumerate(mariadb_pair)]
    with engine(peers, PEER_ENGINE=GIS + "mysql") as connection:
        assert_is_like(connection, GIS + "mysql")
        for name in ("peer0", "peer1"):
            assert_works(connection)
            assert_maps(connection)
            assert connection.peer.name == name
            connection.close()
            mariadb_pair[0].kill()


@contextlib.contextmanager
def differently_numbered(
    nodes: tuple[PostgreSQLNode, PostgreSQLNode], name: str, *extensions: str
) -> Iterator[Any]:
    """Have a database ``maps`` on each, where the type ``name`` of an extension has two numbers."""
    numbers = set()
    for node in nodes:
        node.create_database("maps", USER)
        while True:
            node.sql("; ".join(f"CREATE EXTENSION {one}" for one in extensions), "maps")
            number = node.sql(f"SELECT '{name}'::regtype::oid", "maps")
            if number not in numbers:
                break
            node.sql("; ".join(f"DROP EXTENSION {one} CASCADE" for one in extensions[::-1]), "maps")
        numbers.add(number)
    try:
        yield [postgres_peer(node, NAME="maps") for node in nodes]
    finally:
        # One of them has been killed.
        nodes[0].start()
        for node in nodes:
            node.terminate_connections(USER)
            node.sql("DROP DATABASE maps")


@pytest.mark.skipif(django.VERSION < (4, 2), reason="psycopg 3 came with Django 4.2")
def test_types_of_extensions(postgres_pair: tuple[PostgreSQLNode, PostgreSQLNode]) -> None:
    """django.contrib.postgres: hstore and citext, on peers where they have different numbers."""
    with (
        differently_numbered(postgres_pair, "hstore", "citext", "hstore") as peers,
        modify_settings(INSTALLED_APPS={"append": ["django.contrib.postgres"]}),
        engine(peers, PEER_ENGINE=POSTGRESQL) as connection,
    ):
        for name in ("peer0", "peer1", "peer0"):
            connection.close()
            with balancers["balanced"].pinned(name), connection.cursor() as cursor:
                cursor.execute("SELECT 'a=>1'::hstore, ARRAY['x']::citext[]")
                assert cursor.fetchone() == ({"a": "1"}, ["x"])
                assert connection.peer.name == name
        assert type(connection.alias) is str


@pytest.mark.parametrize(
    "options",
    [
        {},
        # Parameters are sent with the numbers of their types.
        {"server_side_binding": True},
        pytest.param(
            {"server_side_binding": True, "pool": {"min_size": 1}},
            marks=pytest.mark.skipif(
                django.VERSION < (5, 1), reason="Django's pools came with Django 5.1"
            ),
        ),
    ],
)
def test_postgis(
    postgres_pair: tuple[PostgreSQLNode, PostgreSQLNode], options: dict[str, Any]
) -> None:
    """PostGIS, on peers whose types have different numbers, and of which one dies."""
    if "server_side_binding" in options and django.VERSION < (4, 2):
        pytest.skip("psycopg 3, and its option, came with Django 4.2")
    with (
        differently_numbered(postgres_pair, "geometry", "postgis", "postgis_raster") as peers,
        engine(peers, PEER_ENGINE=GIS + "postgis", OPTIONS=options) as connection,
    ):
        assert_is_like(connection, GIS + "postgis")
        for name in ("peer0", "peer1", "peer0"):
            connection.close()
            with balancers["balanced"].pinned(name):
                assert_works(connection)
                assert_maps(connection)
                assert connection.peer.name == name
        connection.close()
        postgres_pair[0].kill()
        assert_works(connection)
        assert_maps(connection)
        assert connection.peer.name == "peer1"


@pytest.mark.skipif(
    not loads_extensions, reason="this Python's sqlite3 was built without loading of extensions"
)
def test_spatialite(tmp_path: pathlib.Path) -> None:
    """SpatiaLite, on peers that are paths to one file, and one that leads nowhere."""
    (tmp_path / "link").symlink_to(tmp_path / "db")
    peers = [
        sqlite_peer(tmp_path / "missing" / "db"),
        sqlite_peer(tmp_path / "db", PRIORITY=1),
        sqlite_peer(tmp_path / "link", PRIORITY=1),
    ]
    with engine(peers, PEER_ENGINE=GIS + "spatialite", STRATEGY="round_robin") as connection:
        assert_is_like(connection, GIS + "spatialite")
        connection.prepare_database()
        names = set()
        for _ in range(2):
            assert_works(connection)
            assert_maps(connection)
            names.add(connection.peer.name)
            connection.close()
        assert names == {"peer1", "peer2"}


@pytest.mark.skipif(loads_extensions, reason="this Python's sqlite3 can load SpatiaLite")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_spatialite_that_cannot_be_loaded(tmp_path: pathlib.Path) -> None:
    """Django says so, and it is no fault of the peer's."""
    peer = sqlite_peer(tmp_path / "db")
    with engine([peer], PEER_ENGINE=GIS + "spatialite") as connection:
        assert_is_like(connection, GIS + "spatialite")
        with pytest.raises(ImproperlyConfigured, match="extension loading"):
            connection.ensure_connection()
        # It leaves SQLite's connection to the collector, which complains of that.
        gc.collect()
        assert balancers["balanced"].peers["peer0"].breaker.current_state == "closed"


@without_prometheus
@pytest.mark.server
@pytest.mark.parametrize(
    ("base", "fixture"), [("mysql", "mariadb"), ("postgresql", "postgres"), ("sqlite3", "tmp_path")]
)
def test_django_prometheus(
    base: str,
    fixture: str,
    request: pytest.FixtureRequest,
    fault_proxy: Callable[..., FaultProxy],
) -> None:
    """Wrappers of backends, as django-prometheus's: they count what they always count.

    The next peer is connected to, a read that is lost is run again: all of it is counted.
    """
    from django_prometheus.db import metrics

    where, path = request.getfixturevalue(fixture), f"django_prometheus.db.backends.{base}"
    counters = (
        metrics.connections_total,
        metrics.connection_errors_total,
        metrics.execute_total,
    )
    if base == "sqlite3":
        peers = [sqlite_peer(where / "no" / "db"), sqlite_peer(where / "db", PRIORITY=1)]
    else:
        first, second = fault_proxy(where), fault_proxy(where)
        first.refuse()
        peers = [mysql_peer(first), mysql_peer(second, PRIORITY=1)]

    with engine(peers, PEER_ENGINE=path) as connection:
        vendor = connection.vendor

        def counted() -> list[float]:
            return [counter.labels("balanced", vendor)._value.get() for counter in counters]

        def since(before: list[float]) -> list[float]:
            return [now - then for now, then in zip(counted(), before)]

        before = counted()
        assert_is_like(connection, path)
        assert isinstance(connection, load_backend(f"django.db.backends.{base}").DatabaseWrapper)
        connection.ensure_connection()
        assert connection.peer.name == "peer1"
        assert since(before)[:2] == [2, 1]
        assert_works(connection)
        if base == "sqlite3":
            return
        before = counted()
        second.cut_after(b"SELECT 2")
        with connection.cursor() as cursor:
            cursor.execute("SELECT 2")
            assert cursor.fetchone() == (2,)
        assert second.cuts == 1
        assert since(before)[2] >= 2


# One alias, one set of circuits


def test_copies_share_circuits(mariadb: Node) -> None:
    """A copied wrapper's connection is its own, and each is counted once while it is open."""
    with engine([mysql_peer(mariadb)]) as connection:
        peer = balancers["balanced"].peers["peer0"]
        made = [
            copy.copy(connection),
            connection.copy(),
            connection.copy("another"),
            type(connection)({**connection.settings_dict, "NAME": None}, alias=NO_DB_ALIAS),
            type(connection)(copy.deepcopy(connection.settings_dict)),
            in_thread(lambda: connections["balanced"]),
        ]
        made[-1].inc_thread_sharing()
        assert made[-1] is not connection
        connection.ensure_connection()
        assert connection.peer is peer
        for wrapper in (*made, connection.copy()):
            assert type(wrapper) is type(connection)
            assert (wrapper.connection, wrapper.peer) == (None, None)
            wrapper.ensure_connection()
            assert wrapper.peer is peer
            assert peer.connections == 2
            wrapper.close()
        assert [wrapper.alias for wrapper in made[2:5]] == ["another", NO_DB_ALIAS, "default"]
        with nodb_cursor(connection):
            assert peer.connections == 2
        connection.close()
        assert peer.connections == 0


def test_users_subclass_is_an_engine_like_any_other(mariadb: Node) -> None:
    with engine([mysql_peer(mariadb)]) as connection:
        wrapper: Any = Subclassed(connection.settings_dict, "balanced")
        assert_is_like(wrapper, MYSQL)
        assert isinstance(wrapper, Subclassed)
        assert type(wrapper.copy()) is type(wrapper)
        wrapper.ensure_connection()
        assert wrapper.initialized
        assert wrapper.peer is balancers["balanced"].peers["peer0"]
        wrapper.close()


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
    forget()


def test_engine_without_peers_is_misconfigured() -> None:
    with engine([{"HOST": "127.0.0.1"}]):
        entry = connections.databases["balanced"]
        forget()
        for key in ("PEERS", "LOAD_BALANCER", "ENGINE"):
            entry.pop(key, None)
        wrapper: Any = Subclassed(entry, "balanced")
        with pytest.raises(ImproperlyConfigured, match=r"'balanced'.*PEERS is empty"):
            wrapper.ensure_connection()
