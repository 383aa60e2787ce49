"""What stands beside the engine in people's projects, as it is installed, with peers that die.

One line says what each is promised. (django-prometheus as the peers' engine: test_engines.py.
psycopg's pools: test_pools.py.)
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator
from typing import Any, Callable
from unittest import mock

import pytest
from django.core.cache import caches
from django.core.management import call_command
from django.db import connections, models, transaction
from django.db.backends.signals import connection_created
from django.db.models.sql.compiler import SQLCompiler
from django.http import HttpResponse
from django.test import Client, TestCase, modify_settings, override_settings
from django.test.utils import CaptureQueriesContext
from django.urls import include, path

from django_proxysql.registry import balancers
from tests.app.models import Token
from tests.engine import engine, mysql_peer
from tests.servers.faultproxy import FaultProxy
from tests.servers.mariadb import Node
from tests.site import Site

# What the extra [test] brings on these Pythons only.
installed = pytest.mark.skipif(
    sys.version_info < (3, 11), reason="the neighbours are installed where Django is 4.2 or later"
)


def tokens(site: Site) -> models.QuerySet[Token]:
    return Token.objects.using(site.connection.alias)


def of_the_table(queries: list[dict[str, Any]]) -> list[str]:
    """The statements among ``queries`` on the site's table."""
    return [query["sql"] for query in queries if "app_token" in query["sql"]]


@contextlib.contextmanager
def with_apps(*names: str) -> Iterator[None]:
    """Install apps, and take them out again with all that they have told Django."""
    with modify_settings(INSTALLED_APPS={"append": [*names]}):
        yield


class Urls:
    """A URLconf."""

    def __init__(self, *patterns: Any) -> None:
        self.urlpatterns = patterns


def served(work: Callable[[], object], middleware: list[str], urls: Any = ()) -> HttpResponse:
    """Answer one request by a view that calls ``work``, behind ``middleware``."""

    def view(request: Any) -> HttpResponse:
        return HttpResponse(f"<body>{work()}</body>")

    with override_settings(
        ROOT_URLCONF=Urls(path("work/", view), *urls),
        MIDDLEWARE=middleware,
        ALLOWED_HOSTS=["*"],
        STATIC_URL="/static/",
    ):
        response = Client().get("/work/")
        assert response.status_code == 200
        return response  # type: ignore[return-value]


@installed
class TestDebugToolbar:
    """django-debug-toolbar: the SQL panel lists a statement once, with the balancer's alias."""

    @pytest.fixture(autouse=True)
    def _installed(self) -> Iterator[None]:
        templates = {
            "BACKEND": "django.template.backends.django.DjangoTemplates",
            "APP_DIRS": True,
        }
        with (
            override_settings(
                STATIC_URL="/static/",
                TEMPLATES=[templates],
                DEBUG_TOOLBAR_CONFIG={"SHOW_TOOLBAR_CALLBACK": lambda request: True},
                DEBUG_TOOLBAR_PANELS=["debug_toolbar.panels.sql.SQLPanel"],
            ),
            with_apps("django.contrib.staticfiles", "debug_toolbar"),
        ):
            yield

    def panel(self, work: Callable[[], object]) -> Any:
        """What the SQL panel of a request has to show."""
        from debug_toolbar.toolbar import DebugToolbar

        made: list[Any] = []

        def note(sender: Any, toolbar: Any, **kwargs: Any) -> None:
            made.append(toolbar)

        DebugToolbar._created.connect(note)
        try:
            served(
                work,
                ["debug_toolbar.middleware.DebugToolbarMiddleware"],
                [path("__debug__/", include("debug_toolbar.urls", namespace="djdt"))],
            )
        finally:
            DebugToolbar._created.disconnect(note)
        return made[0].get_panel_by_id("SQLPanel").get_stats()

    def test_run_again(self, here: Site) -> None:
        here.sql("SELECT 1")

        def work() -> None:
            tokens(here).create(value="one")
            here.cut("after")
            assert tokens(here).get(value="one")
            assert here.replayed()

        shown = self.panel(work)
        assert len(of_the_table(shown["queries"])) == 2
        assert {query["alias"] for query in shown["queries"]} == {"balanced"}
        assert {query["vendor"] for query in shown["queries"]} == {here.connection.vendor}

    def test_transactions(self, here: Site) -> None:
        here.sql("SELECT 1")

        def work() -> None:
            with transaction.atomic("balanced"):
                here.cut("after")
                assert tokens(here).count() == 0
                tokens(here).create(value="one")

        shown = self.panel(work)
        assert len(of_the_table(shown["queries"])) == 2
        assert here.replayed()
        assert here.plain_rows() == ["one"]

    def test_server_side_cursors(self, on_postgres: Site) -> None:
        """It wraps these, too; they stay what they are."""
        tokens(on_postgres).bulk_create(Token(value=str(number)) for number in range(5))
        open_ones = "SELECT count(*) FROM pg_cursors"

        def work() -> None:
            rows = tokens(on_postgres).iterator(chunk_size=2)
            next(rows)
            assert on_postgres.sql(open_ones) == [(1,)]
            assert len(on_postgres.session.server_side) == 1
            assert len(list(rows)) == 4
            assert on_postgres.sql(open_ones) == [(0,)]

        assert len(of_the_table(self.panel(work)["queries"])) == 1


@installed
class TestSilk:
    """django-silk: a request's SQL is stored once a statement."""

    @pytest.fixture(autouse=True)
    def _installed(self) -> Iterator[None]:
        apps = ["django.contrib.contenttypes", "django.contrib.auth", "silk"]
        with with_apps(*apps):
            call_command("migrate", "silk", verbosity=0)
            plain = SQLCompiler.execute_sql
            yield
            SQLCompiler.execute_sql = plain  # type: ignore[method-assign]
            if hasattr(SQLCompiler, "_execute_sql"):
                del SQLCompiler._execute_sql
            call_command("migrate", "silk", "zero", verbosity=0)

    def test_run_again(self, here: Site) -> None:
        from silk.models import Request

        here.sql("SELECT 1")

        def work() -> None:
            assert tokens(here).count() == 0
            here.cut("after")
            assert not tokens(here).filter(value="one").exists()
            assert here.replayed()

        served(
            work,
            ["silk.middleware.SilkyMiddleware"],
            [path("silk/", include("silk.urls", namespace="silk"))],
        )
        stored = Request.objects.get(path="/work/")
        sql = [query.query for query in stored.queries.all() if "app_token" in query.query]
        assert len(sql) == 2
        # It has each explained by the peer.
        assert all(query.analysis for query in stored.queries.all())


class TestDatabaseCache:
    """Django's cache in the database: a peer that dies between two calls is nobody's error."""

    @pytest.fixture
    def cache(self, here: Site) -> Iterator[Any]:
        location = {
            "BACKEND": "django.core.cache.backends.db.DatabaseCache",
            "LOCATION": "cache_table",
            "OPTIONS": {"MAX_ENTRIES": 10, "CULL_FREQUENCY": 2},
        }
        with override_settings(CACHES={"default": location}, DATABASE_ROUTERS=[ToBalanced()]):
            call_command("createcachetable", database="balanced", verbosity=0)
            yield caches["default"]
            here.sql("DROP TABLE cache_table")

    def test_cache(self, here: Site, cache: Any) -> None:
        cache.set("key", "value")
        here.kill()
        assert cache.get("key") == "value"
        here.kill()
        cache.set("key", "other")
        here.cut("after")
        assert cache.get("key") == "other"
        assert cache.get_many(["key", "none"]) == {"key": "other"}
        here.kill()
        cache.set_many({str(number): number for number in range(30)})
        here.kill()
        assert cache.add("key", "more") == (cache.get("key") == "more")
        here.kill()
        assert cache.delete("key")
        assert len(here.sql("SELECT 1 FROM cache_table")) <= 10
        here.kill()
        cache.clear()
        assert here.sql("SELECT count(*) FROM cache_table") == [(0,)]


class ToBalanced:
    """A router that sends everything to the balancer."""

    def db_for_read(self, model: Any, **hints: Any) -> str:
        return "balanced"

    db_for_write = db_for_read


class TestSessions:
    """Sessions in the database, cached and not: a peer that dies between two requests is nobody's
    error, and nobody is logged out."""

    @pytest.mark.parametrize("backend", ["db", "cached_db"])
    def test_between_requests(self, here: Site, backend: str) -> None:
        memory = {"BACKEND": "django.core.cache.backends.locmem.LocMemCache"}
        with (
            with_apps("django.contrib.sessions"),
            override_settings(
                SESSION_ENGINE=f"django.contrib.sessions.backends.{backend}",
                CACHES={"default": memory},
                DATABASE_ROUTERS=[ToBalanced()],
                ROOT_URLCONF=Urls(path("count/", count)),
                MIDDLEWARE=["django.contrib.sessions.middleware.SessionMiddleware"],
                ALLOWED_HOSTS=["*"],
            ),
        ):
            from django.contrib.sessions.models import Session as StoredSession

            with here.connection.schema_editor() as editor:
                editor.create_model(StoredSession)
            try:
                client = Client()
                for expected in (b"1", b"2", b"3"):
                    assert client.get("/count/").content == expected
                    here.kill()
                caches["default"].clear()
                here.cut("after")
                assert client.get("/count/").content == b"4"
                assert here.sql("SELECT count(*) FROM django_session") == [(1,)]
            finally:
                with here.connection.schema_editor() as editor:
                    editor.delete_model(StoredSession)


def count(request: Any) -> HttpResponse:
    request.session["count"] = request.session.get("count", 0) + 1
    return HttpResponse(str(request.session["count"]))


class TestServerSideCursors:
    """DISABLE_SERVER_SIDE_CURSORS, for pgbouncer and its like: iterator() with them and without."""

    @pytest.mark.parametrize("disabled", [True, False])
    def test_iterator(
        self, postgres: Any, fault_proxy: Callable[..., FaultProxy], disabled: bool
    ) -> None:
        from tests.site import site

        with site(postgres, fault_proxy, DISABLE_SERVER_SIDE_CURSORS=disabled) as here:
            tokens(here).bulk_create(Token(value=str(number)) for number in range(5))
            rows = tokens(here).order_by("id").iterator(chunk_size=2)
            assert next(rows).value == "0"
            assert here.sql("SELECT count(*) FROM pg_cursors") == [(0 if disabled else 1,)]
            if disabled:
                # What has been read needs no connection: nothing is lost with it.
                here.kill()
                tokens(here).create(value="between")
            assert [token.value for token in rows] == ["1", "2", "3", "4"]


class TestOnlookers:
    """execute_wrapper, connection.queries and assertNumQueries count a statement once, run again
    or not."""

    def test_assert_num_queries(self, here: Site) -> None:
        here.sql("SELECT 1")
        case = TestCase()
        here.cut("after")
        with case.assertNumQueries(1, using="balanced"):
            assert tokens(here).count() == 0
        assert len(here.replayed()) == 1

    def test_what_sets_a_connection_up(self, on_mariadb: Site) -> None:
        """Django logs it where the application connects, and not where a connection is replaced."""
        here = on_mariadb
        with CaptureQueriesContext(here.connection) as captured:
            here.sql("SELECT 1")
            here.kill()
            here.write("one")
            assert len(captured) == 2
            here.connection.close()
            here.sql("SELECT 1")
        assert len(captured) == 4
        assert "ISOLATION LEVEL" in captured[2]["sql"]

    def test_execute_wrapper_that_changes_the_statement(self, here: Site) -> None:
        """What it has made of the statement is what is run again."""
        here.sql("SELECT 1")
        seen = []

        def answer(execute: Any, sql: str, params: Any, many: bool, context: Any) -> Any:
            seen.append((sql, context["connection"] is here.connection))
            return execute(sql.replace("41", "42"), params, many, context)

        here.cut("after")
        with here.connection.execute_wrapper(answer):
            assert here.sql("SELECT 41") == [(42,)]
        assert seen.count(("SELECT 41", True)) == 1
        assert here.replayed()


class TestReceivers:
    """connection_created: sent for every new connection, replacements included, by the wrapper
    with the balancer's alias and settings."""

    def test_each_connection(self, here: Site) -> None:
        seen: list[Any] = []

        def note(sender: Any, connection: Any, **kwargs: Any) -> None:
            if connection.alias == "balanced":
                seen.append((sender, connection, connection.peer, connection.connection))
                assert connection.settings_dict is connections.databases["balanced"]

        connection_created.connect(note)
        try:
            connection = here.connection
            connection.close()
            for lose in (here.kill, lambda: here.cut("after"), here.cut_idle):
                here.sql("SELECT 1")
                lose()
                if lose is here.cut_idle:
                    here.idle()
                here.sql("SELECT 1")
            here.sql("SELECT 1")
        finally:
            connection_created.disconnect(note)
        assert [one[:2] for one in seen] == [(type(connection), connection)] * 4
        assert len({id(one[3]) for one in seen}) == 4
        assert seen[-1][2] is connection.peer


class TestSettingsDict:
    """One settings_dict serves all threads and is never a peer's, not even while one connects."""

    def test_from_another_thread(
        self, mariadb: Node, fault_proxy: Callable[..., FaultProxy]
    ) -> None:
        proxy = fault_proxy(mariadb)
        with engine([mysql_peer(proxy, NAME="mysql")], NAME="app") as connection:
            own = connections.databases["balanced"]
            before = dict(own)
            connecting, checked = threading.Event(), threading.Event()
            opened = connection.Database.connect

            def connect(**kwargs: Any) -> Any:
                # In the middle of it, where the peer's settings are in use.
                connecting.set()
                assert checked.wait(20)
                return opened(**kwargs)

            def work() -> None:
                wrapper = connections["balanced"]
                wrapper.ensure_connection()
                wrapper.close()

            with mock.patch.object(connection.Database, "connect", connect):
                thread = threading.Thread(target=work)
                thread.start()
                assert connecting.wait(20)
                assert connection.settings_dict is own
                assert dict(own) == before
                assert (own["HOST"], own["NAME"], own["USER"]) == ("", "app", "")
                assert connection.copy().settings_dict["HOST"] == ""
                checked.set()
                thread.join()
            assert dict(own) == before

    def test_who_wants_to_know(self, here: Site) -> None:
        """connection.peer: which one it is; its address is nowhere else."""
        connection = here.connection
        assert connection.peer is balancers["balanced"].peers[connection.peer.name]
        assert connection.settings_dict["HOST"] == ""
        assert connection.peer.address == f"127.0.0.1:{here.here.port}"
        connection.close()
        assert connection.peer is None
