"""What stands beside the engine in people's projects, as it is installed, with peers that die.

One line says what each is promised. (django-prometheus as the peers' engine: test_engines.py.
psycopg's pools: test_pools.py.)
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Callable
from unittest import mock

import django
import pytest
from django.core.cache import caches
from django.core.checks.registry import registry
from django.core.management import call_command
from django.db import OperationalError, connections, models
from django.db.backends.signals import connection_created
from django.db.models.sql.compiler import SQLCompiler
from django.http import HttpResponse
from django.test import Client, TestCase, modify_settings, override_settings
from django.test.utils import CaptureQueriesContext
from django.urls import include, path

from django_proxysql.backends.proxysql.base import DatabaseWrapper
from django_proxysql.conf.keys import ENGINE
from tests import test_project
from tests.app.models import Token
from tests.engine import MYSQL, POSTGRESQL, engine, mysql_peer
from tests.fakes import running
from tests.project import Project
from tests.servers import PASSWORD
from tests.servers.faultproxy import FaultProxy
from tests.servers.mariadb import Node
from tests.servers.redis import RedisServer
from tests.site import Site, site

# What the extra [test] brings on these Pythons only.
installed = pytest.mark.skipif(
    sys.version_info < (3, 11), reason="the neighbours are installed where Django is 4.2 or later"
)
with_pools = pytest.mark.skipif(
    django.VERSION < (5, 1), reason="Django's pools came with Django 5.1"
)


def tokens(site: Site) -> models.QuerySet[Token]:
    return Token.objects.using(site.connection.alias)


def of_the_table(queries: list[dict[str, Any]]) -> list[str]:
    """The statements among ``queries`` on the site's table."""
    return [query["sql"] for query in queries if "app_token" in query["sql"]]


@contextlib.contextmanager
def with_apps(*names: str) -> Iterator[None]:
    """Install apps, and take them out again with all that they have told Django."""
    before = registry.registered_checks.copy()
    try:
        with modify_settings(INSTALLED_APPS={"append": [*names]}):
            yield
    finally:
        registry.registered_checks = before


class Urls:
    """A URLconf."""

    def __init__(self, *patterns: Any) -> None:
        self.urlpatterns = patterns


def served(work: Callable[[], object], middleware: list[str], urls: Any = ()) -> HttpResponse:
    """Answer one request by a view that calls ``work``, behind ``middleware``."""

    def view(request: Any) -> HttpResponse:
        return HttpResponse(f"<body>{work()}</body>")

    with override_settings(
        ROOT_URLCONF=Urls(path("page/", view), *urls),
        MIDDLEWARE=middleware,
        ALLOWED_HOSTS=["*"],
        STATIC_URL="/static/",
    ):
        response = Client().get("/page/")
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

    @pytest.fixture
    def panel(self, receive: Any) -> Callable[..., Any]:
        """What the SQL panel of a request has to show."""
        from debug_toolbar.toolbar import DebugToolbar

        def of_a_request(work: Callable[[], object]) -> Any:
            made = receive(DebugToolbar._created)
            served(
                work,
                ["debug_toolbar.middleware.DebugToolbarMiddleware"],
                [path("__debug__/", include("debug_toolbar.urls", namespace="djdt"))],
            )
            return made[0]["toolbar"].get_panel_by_id("SQLPanel").get_stats()

        return of_a_request

    def test_run_again(self, here: Site, panel: Callable[..., Any]) -> None:
        here.sql("SELECT 1")

        def work() -> None:
            tokens(here).create(value="one")
            here.cut("after")
            assert tokens(here).get(value="one")
            assert here.replayed()

        shown = panel(work)
        assert len(of_the_table(shown["queries"])) == 2
        assert {query["alias"] for query in shown["queries"]} == {"balanced"}
        assert {query["vendor"] for query in shown["queries"]} == {here.connection.vendor}

    def test_server_side_cursors(self, on_postgres: Site, panel: Callable[..., Any]) -> None:
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

        assert len(of_the_table(panel(work)["queries"])) == 1


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
        stored = Request.objects.get(path="/page/")
        sql = [query.query for query in stored.queries.all() if "app_token" in query.query]
        assert len(sql) == 2
        # It has each explained by the peer.
        assert all(query.analysis for query in stored.queries.all())


class TestDatabaseCache:
    """Django's cache in the database: a peer that dies between two calls causes no error."""

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
    """Sessions in the database, cached and not: a peer that dies between two requests causes no
    error and logs no user out."""

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

    def test_each_connection(self, here: Site, receive: Any) -> None:
        seen: list[Any] = []

        def note(sender: Any, connection: Any, **kwargs: Any) -> None:
            if connection.alias == "balanced":
                seen.append((sender, connection, connection.peer, connection.connection))
                assert connection.settings_dict is connections.databases["balanced"]

        receive(connection_created, note)
        connection = here.connection
        connection.close()
        for lose in (here.kill, lambda: here.cut("after"), here.cut_idle):
            here.sql("SELECT 1")
            lose()
            if lose is here.cut_idle:
                here.idle()
            here.sql("SELECT 1")
        here.sql("SELECT 1")
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
                assert checked.wait(60)
                return opened(**kwargs)

            def work() -> None:
                wrapper = connections["balanced"]
                wrapper.ensure_connection()
                wrapper.close()

            with mock.patch.object(connection.Database, "connect", connect), running(work):
                assert connecting.wait(60)
                assert connection.settings_dict is own
                assert dict(own) == before
                assert (own["HOST"], own["NAME"], own["USER"]) == ("", "app", "")
                assert connection.copy().settings_dict["HOST"] == ""
                checked.set()
            assert dict(own) == before


SETTINGS = """
import json, pathlib
SECRET_KEY = "for tests only"
INSTALLED_APPS = ["django_proxysql", "tests.app"]
DATABASES = {"default": json.loads(pathlib.Path(__file__).with_name("default.json").read_text())}
DEFAULT_AUTO_FIELD = "django.db.models.AutoField"
USE_TZ = True
"""

TASKS = """
import os, pathlib
import django
django.setup()
from celery import Celery, signals
from django.db import connection
from tests import test_project
from tests.app.models import Token

url = pathlib.Path(__file__).with_name("redis").read_text()
app = Celery("tasks", broker=url, backend=url)


@signals.worker_init.connect
def warm(**kwargs):
    # In the parent: what its children inherit.
    Token.objects.count()


@app.task
def write(value):
    Token.objects.create(value=value)
    driver = connection.connection
    number = driver.thread_id() if connection.vendor == "mysql" else driver.info.backend_pid
    return os.getpid(), number, connection.peer.name


@app.task
def count():
    return Token.objects.count()
"""

CALLER = """
import json, sys, tasks
for line in sys.stdin:
    name, calls = json.loads(line)
    results = [getattr(tasks, name).delay(*call) for call in calls]
    print(json.dumps([result.get(timeout=100) for result in results]))
"""


@installed
class TestCelery:
    """Celery's worker, with its Django fixup: connections end between tasks, and a peer that dies
    fails no task."""

    @pytest.fixture
    def project(
        self,
        request: pytest.FixtureRequest,
        fault_proxy: Callable[..., FaultProxy],
        redis_server: RedisServer,
        tmp_path: Path,
    ) -> Iterator[Workers]:
        kind = request.param
        server = request.getfixturevalue("mariadb" if kind == "mariadb" else "postgres")
        proxies = [fault_proxy(server) for _ in range(2)]
        entry: dict[str, Any] = {
            "ENGINE": ENGINE,
            "PEERS": [mysql_peer(proxy, PRIORITY=at) for at, proxy in enumerate(proxies)],
            "PEER_ENGINE": MYSQL if kind == "mariadb" else POSTGRESQL,
            "CHECK_INTERVAL": 0.2,
        }
        if kind == "pool":
            entry["OPTIONS"] = {"pool": {"min_size": 1, "max_size": 2}}
        files = {
            "settings.py": SETTINGS,
            "tasks.py": TASKS,
            "default.json": json.dumps(entry),
            "redis": redis_server.url,
        }
        with site(server, fault_proxy) as here:
            here.connection.close()
            with Workers(Project(tmp_path, files), proxies, here) as workers:
                yield workers

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("project", "kind"),
        [
            ("mariadb", "solo"),
            ("mariadb", "prefork"),
            ("postgres", "prefork"),
            pytest.param("pool", "prefork", marks=with_pools),
        ],
        indirect=["project"],
    )
    def test_worker(self, project: Workers, kind: str) -> None:
        project.start("--pool", kind, "--concurrency", "2")
        answers = project.call("write", [f"before-{n}" for n in range(6)])
        assert {peer for _, _, peer in answers} == {"peer0"}
        processes = {process for process, _, _ in answers}
        # How many of the pool's processes get one of the tasks is the scheduler's affair.
        assert (project.worker.pid in processes) is (kind == "solo")
        if not project.is_pooled:
            # None is used for two tasks.
            assert len({number for _, number, _ in answers}) == 6
        # Between two tasks.
        die(project.proxies[0])
        answers = project.call("write", [f"after-{n}" for n in range(6)])
        assert {peer for _, _, peer in answers} == {"peer1"}
        # In the middle of one, on the peer that is back.
        project.proxies[0].forward()
        project.proxies[0].cut_after(b"COUNT")
        while not project.proxies[0].cuts:
            assert project.call("count") == [12]
        log = project.stop()
        assert "succeeded" in log
        assert "ERROR" not in log
        assert "Traceback" not in log
        assert PASSWORD not in log
        assert len(project.site.written()) == 12


class Workers:
    """A project with a Celery worker."""

    def __init__(self, project: Project, proxies: list[FaultProxy], site: Site) -> None:
        self.project = project
        self.proxies = proxies
        self.site = site
        self.is_pooled = "pool" in (project.root / "default.json").read_text()

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *exc: object) -> None:
        for process in (self.worker, self.caller):
            if process is not None:
                process.kill()
                # Closes its pipes, too.
                process.communicate()

    worker: Any = None
    caller: Any = None

    def start(self, *args: str) -> None:
        quiet = ("--without-gossip", "--without-mingle", "--without-heartbeat")
        with open(self.project.root / "worker.log", "w") as log:
            self.worker = self.project.run(
                *("-m", "celery", "-A", "tasks", "worker", "--loglevel", "INFO", *quiet, *args),
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self.caller = self.project.run("-c", CALLER, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def call(self, task: str, values: Sequence[str] = ()) -> list[Any]:
        """What a task returns, called with each of ``values``, or once."""
        self.caller.stdin.write(json.dumps([task, [[value] for value in values] or [[]]]) + "\n")
        self.caller.stdin.flush()
        answers: list[Any] = json.loads(self.caller.stdout.readline() or "[]")
        assert answers, self.log()
        return answers

    def stop(self) -> str:
        """End the worker as an operator does, once its task is done; return what it has said."""
        self.worker.terminate()
        assert self.worker.wait(60) == 0, self.log()
        return self.log()

    def log(self) -> str:
        return (self.project.root / "worker.log").read_text()


def die(proxy: FaultProxy) -> None:
    """End all of a peer's connections, and take no more."""
    proxy.refuse()
    proxy.drop_connections()


shop = test_project.project


@installed
class TestDjangoExtensions:
    """django-extensions: its commands run while a peer is down. Some judge by the ENGINE's name."""

    @pytest.fixture(autouse=True)
    def _installed(self, shop: test_project.Shop) -> None:
        path = shop.root / "settings.py"
        path.write_text(path.read_text() + 'INSTALLED_APPS += ["django_extensions"]\n')

    def test_commands(self, shop: test_project.Shop) -> None:
        assert "urls.index" in shop.manage("show_urls")
        assert "Item" in shop.manage("list_model_info", "--model", "shop.Item")
        script = "from shop.models import Item; Item.objects.create(name='x')"
        (shop.root / "scripts").mkdir()
        (shop.root / "scripts" / "__init__.py").write_text("")
        (shop.root / "scripts" / "fill.py").write_text(f"def run():\n    {script}\n")
        shop.manage("runscript", "fill")
        show = "print([item.name for item in Item.objects.all()])"
        assert "['x']" in shop.manage("shell_plus", "--plain", "-c", show)

    def test_sqldiff(self, shop: test_project.Shop) -> None:
        """It tells engines apart by the last part of their name: ours has one of the user's own."""
        folder = shop.root / "databases" / "mysql"
        folder.mkdir(parents=True)
        (folder / "base.py").write_text(
            "from django_proxysql.backends.proxysql.base import DatabaseWrapper\n"
        )
        path = shop.root / "databases.json"
        databases = json.loads(path.read_text())
        databases["default"]["ENGINE"] = "databases.mysql"
        path.write_text(json.dumps(databases))
        assert shop.manage("sqldiff", "shop").strip() == "-- No differences"

    def test_dsn(self, shop: test_project.Shop) -> None:
        """A peer that is an alias has an address; the balancer has none."""
        assert "Unknown database" in shop.manage("sqldsn")
        databases = json.loads((shop.root / "databases.json").read_text())
        if "peer1" in databases:
            process = shop.start("sqldsn", "--database", "peer1", "--style", "uri")
            said, _ = process.communicate(timeout=60)
            assert f"@127.0.0.1:{databases['peer1']['PORT']}/shop" in said


@installed
class TestDjangoMySQL:
    """django-mysql: its checks, hints, status, locks and cache, on a peer that may die."""

    @pytest.fixture(autouse=True)
    def _installed(self) -> Iterator[None]:
        with override_settings(DJANGO_MYSQL_REWRITE_QUERIES=True), with_apps("django_mysql"):
            yield
        connection_created.disconnect(self.hook())

    def hook(self) -> Any:
        from django_mysql.apps import install_rewrite_hook

        return install_rewrite_hook

    def test_what_it_asks(self, on_mariadb: Site) -> None:
        from django_mysql.checks import check_variables
        from django_mysql.status import GlobalStatus

        on_mariadb.kill()
        assert check_variables(databases=["balanced"]) == []
        on_mariadb.kill_idle()
        assert GlobalStatus(using="balanced").get("Max_used_connections") > 0
        on_mariadb.cut("after")
        assert on_mariadb.connection.mysql_is_mariadb

    def test_hints(self, on_mariadb: Site) -> None:
        """The server gets what its hook makes of a statement; a comment is never run again."""
        from django_mysql.models import add_QuerySetMixin

        here = on_mariadb
        tokens(here).create(value="one")
        hinted = add_QuerySetMixin(tokens(here)).sql_no_cache()
        here.kill_idle()
        assert hinted.get().value == "one"
        assert b"SELECT SQL_NO_CACHE" in here.here.packets[-1]
        labelled = add_QuerySetMixin(tokens(here)).label("of a test")
        here.cut("after")
        with pytest.raises(OperationalError):
            labelled.get()
        assert labelled.get().value == "one"
        assert here.connection.execute_wrappers.count(here.connection.execute_wrappers[0]) == 1

    def test_locks(self, on_mariadb: Site) -> None:
        """The holder of a lock learns of its loss by one error."""
        from django_mysql.locks import Lock

        lock = Lock("of a test", using="balanced")
        with lock:
            assert lock.is_held()
            assert lock.holding_connection_id() == on_mariadb.connection.connection.thread_id()
        assert not lock.is_held()
        lock.acquire()
        on_mariadb.kill()
        with pytest.raises(OperationalError):
            on_mariadb.write("one")
        assert not lock.is_held()
        assert on_mariadb.written() == []

    def test_cache(self, on_mariadb: Site) -> None:
        """Its numbers come back in the answer to what changed them: none is counted twice."""
        here = on_mariadb
        location = {"BACKEND": "django_mysql.cache.MySQLCache", "LOCATION": "cache_table"}
        with override_settings(CACHES={"default": location}, DATABASE_ROUTERS=[ToBalanced()]):
            cache = caches["default"]
            here.sql(cache.create_table_sql.format(table_name="cache_table"))
            try:
                here.kill()
                cache.set("number", 1)
                here.kill()
                # LAST_INSERT_ID() in the statement: never on another connection than before.
                with pytest.raises(OperationalError):
                    cache.incr("number")
                assert cache.incr("number") == 2
                here.cut("after")
                with pytest.raises(OperationalError):
                    cache.incr("number")
                # It may have been done, and was, once.
                here.cut("after")
                assert cache.get("number") == 3
                assert cache.add("number", 7) is False
                # It did that with a variable of the session's.
                assert here.session.holds
                here.connection.close_if_unusable_or_obsolete()
                here.kill()
                cache.set("number", 4)
                assert cache.incr("number", 4) == 8
            finally:
                here.sql("DROP TABLE cache_table")


@pytest.mark.skipif(
    sys.version_info[:2] != (3, 11), reason="django-prometheus knows Django 4.2 to 6.0 only"
)
def test_under_django_prometheus(mariadb: Node, fault_proxy: Callable[..., FaultProxy]) -> None:
    """django-prometheus's mixin over our engine: it counts attempts, and what is sent."""
    from django.db.backends.mysql.base import CursorWrapper
    from django_prometheus.db import metrics
    from django_prometheus.db.common import DatabaseWrapperMixin, ExportingCursorWrapper

    class Counted(DatabaseWrapperMixin, DatabaseWrapper):  # type: ignore[misc]
        def create_cursor(self, name: Any = None) -> Any:
            counting = ExportingCursorWrapper(CursorWrapper, self.alias, self.vendor)
            return counting(self.connection.cursor())

    labels = ("counted", "mysql")
    counters = (
        metrics.connections_total,
        metrics.connection_errors_total,
        metrics.execute_total,
    )

    def counted() -> list[float]:
        return [counter.labels(*labels)._value.get() for counter in counters]

    proxies = [fault_proxy(mariadb) for _ in range(3)]
    peers = [mysql_peer(proxy, PRIORITY=at) for at, proxy in enumerate(proxies)]
    with engine(peers, alias="counted") as connection:
        wrapper: Any = Counted(connection.settings_dict, "counted")
        proxies[0].refuse()
        wrapper.ensure_connection()
        attempts, errors, executed = counted()
        assert (attempts, errors) == (2, 1)
        with wrapper.cursor() as cursor:
            cursor.execute("SELECT 1")
            assert counted()[2] == executed + 1
            proxies[1].cut_after(b"SELECT 2")
            # Sent twice, beside what sets up the new connection.
            cursor.execute("SELECT 2")
            assert cursor.fetchone() == (2,)
        assert counted() == [3, 1, executed + 1 + 2 + 2]
        wrapper.close()
