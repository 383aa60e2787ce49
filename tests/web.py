"""A small site on MariaDB or PostgreSQL, served by real web servers, under steady requests."""

from __future__ import annotations

import http.client
import itertools
import json
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from django_proxysql.conf.keys import ENGINE
from tests.engine import MYSQL, POSTGRESQL, mysql_peer
from tests.fakes import until
from tests.project import Project
from tests.servers import DATABASE, USER
from tests.servers.mariadb import Node
from tests.servers.ports import HOST, ports
from tests.servers.postgresql import PostgreSQLNode

#: The longest that anything is waited for, in seconds; a test that waits that long fails.
PATIENCE = 60

FILES = {
    "settings.py": """
import json, os, pathlib
DATABASES = json.loads(pathlib.Path(__file__).with_name("databases.json").read_text())
if "PYMYSQL" in os.environ:
    import pymysql
    pymysql.version_info = (2, 2, 8, "final", 0)
    pymysql.install_as_MySQLdb()
SECRET_KEY = "for tests only"
ALLOWED_HOSTS = ["*"]
INSTALLED_APPS = ["django_proxysql", "site_"]
DEFAULT_AUTO_FIELD = "django.db.models.AutoField"
MIDDLEWARE = []
ROOT_URLCONF = "urls"
USE_TZ = True
""",
    "site_/__init__.py": "",
    "site_/models.py": """
from django.db import models
class Item(models.Model):
    name = models.CharField(max_length=20)
""",
    # What a preloaded application may have done before the workers are forked.
    "wsgi.py": """
import os
from django.core.wsgi import get_wsgi_application
application = get_wsgi_application()
import urls
urls.LOADED = [os.getpid(), *urls.place()]
""",
    "asgi.py": """
from django.core.asgi import get_asgi_application
application = get_asgi_application()
""",
    "urls.py": """
import asyncio, os, threading
from django.db import close_old_connections, connection, transaction
from django.http import JsonResponse
from django.urls import path
from django_proxysql import balancers
from site_.models import Item

LOADED = None

# The server's port, and how one waits for a gate.
PORT, *GATE = {
    "mysql": ("@@port", "SELECT GET_LOCK('gate', 60)", "SELECT RELEASE_LOCK('gate')"),
    "postgresql": (
        "inet_server_port()", "SELECT pg_advisory_lock(1)", "SELECT pg_advisory_unlock(1)",
    ),
}[connection.vendor]

def session():
    # The driver is asked: what asks the server for its session is never run again.
    its = connection.connection
    return its.thread_id() if connection.vendor == "mysql" else its.info.backend_pid

def place():
    port = ask("")["port"]
    return port, session()

def ask(token):
    with connection.cursor() as cursor:
        # A read that may be run again: the server may be killed in the midst of it.
        cursor.execute("SELECT %s", [token])
        (said,) = cursor.fetchone()
    port = int(connection.peer.address.rpartition(":")[2])
    return {"token": said, "port": port, "session": session()}

def worker():
    states = {peer.name: peer.state for peer in balancers["default"].snapshot()}
    return {"pid": os.getpid(), "states": states, "loaded": LOADED}

def index(request):
    token = request.GET["token"]
    return JsonResponse({**ask(token), "items": Item.objects.count(), **worker()})

def lock(request):
    with connection.cursor() as cursor:
        for statement in GATE:
            cursor.execute(statement)
    return index(request)

async def asynchronous(request):
    from asgiref.sync import sync_to_async
    token = request.GET["token"]
    def elsewhere():
        # A thread of the pool's, to which no request is known to begin or end.
        try:
            return ask(token + " elsewhere")
        finally:
            close_old_connections()
    items = [item.name async for item in Item.objects.order_by("pk")]
    items_too = await Item.objects.acount()
    there, here = await asyncio.gather(
        sync_to_async(elsewhere, thread_sensitive=False)(), sync_to_async(ask)(token)
    )
    mixed = there["token"] != token + " elsewhere" or len(items) != items_too
    return JsonResponse({**here, "items": -1 if mixed else items_too, **worker()})

async def writing(request):
    from asgiref.sync import sync_to_async
    token = request.GET["token"]
    @transaction.atomic
    def in_one_transaction(fails):
        items = Item.objects.filter(name=token)
        Item.objects.create(name=token)
        if fails:
            raise LookupError(items.count())
        # By its key each: by name, MariaDB would lock what others write.
        return items.count(), sum(item.delete()[0] for item in items)
    await Item.objects.acreate(name=token)
    try:
        await sync_to_async(in_one_transaction)(True)
    except LookupError as exc:
        seen = exc.args
    seen += await sync_to_async(in_one_transaction)(False)
    here = await sync_to_async(ask)(token)
    # What others write meanwhile is none of this one's.
    return JsonResponse({**here, "items": 3 if seen == (2, 2, 2) else seen, **worker()})

async def cancelled(request):
    try:
        return await asynchronous(request)
    except asyncio.CancelledError:
        print("the view was cancelled", flush=True)
        raise

urlpatterns = [
    path("", index), path("lock", lock), path("async", asynchronous), path("write", writing),
    path("cancelled", cancelled),
]
""",
}


class Answer(dict[str, Any]):
    """What a request was answered with."""

    #: Whether what came back is what was asked for.
    right = True


class Client:
    """Sends requests, from several threads, until it is stopped."""

    def __init__(self, port: int, path: str = "/", threads: int = 6) -> None:
        self.port = port
        self.path = path
        self.answers: list[Answer] = []
        self.failures: list[str] = []
        self._numbers = itertools.count()
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run) for _ in range(threads)]

    def __enter__(self) -> Client:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def get(self) -> Answer:
        """Send one request. What fails raises."""
        token = f"token {next(self._numbers)}"
        connection = http.client.HTTPConnection(HOST, self.port, timeout=PATIENCE)
        try:
            connection.request("GET", f"{self.path}?token={token.replace(' ', '+')}")
            answer = connection.getresponse()
            body = answer.read()
        finally:
            connection.close()
        assert answer.status == 200, body.decode(errors="replace")[:300]
        read = Answer(json.loads(body))
        assert read["token"] == token, read
        assert read["items"] == 3, read
        return read

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self.answers.append(self.get())
            except Exception as exc:
                self.failures.append(repr(exc))
            # The server's processes need the time more.
            self._stop.wait(0.02)

    def until(self, what: Callable[[list[Answer]], object]) -> list[Answer]:
        """Go on until ``what`` holds of the answers from now on; return these."""
        start = len(self.answers)
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            since = self.answers[start:]
            if what(since):
                return since
            time.sleep(0.02)
        raise AssertionError(f"not in {PATIENCE} s; last: {self.answers[-3:]} {self.failures[-3:]}")


class Web:
    """A web server that serves the site; a process with workers."""

    def __init__(self, project: Project, *command: str, **environment: str) -> None:
        self.port = ports.reserve()
        self.log = project.root / "server.log"
        with self.log.open("w") as output:
            self.process = project.run(
                *(
                    part.replace("ADDRESS", f"{HOST}:{self.port}").replace("PORT", str(self.port))
                    for part in command
                ),
                stdout=output,
                stderr=subprocess.STDOUT,
                environment=environment,
            )

    def wait(self, path: str = "/") -> Web:
        """Return once it answers."""
        client = Client(self.port, path)

        def answers() -> bool:
            assert self.process.poll() is None, self.log.read_text()
            try:
                return bool(client.get())
            except OSError:
                return False

        until(answers, PATIENCE, pause=0.05)
        return self

    def stop(self) -> int:
        """Send SIGTERM; return the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise AssertionError(self.log.read_text()) from None


@contextmanager
def serving(
    root: Path,
    nodes: Sequence[Node | PostgreSQLNode],
    *command: str,
    path: str = "/",
    peers: Sequence[dict[str, Any]] = (),
    **settings: Any,
) -> Iterator[Web]:
    """Yield a server of the site whose peers are ``nodes``, each with three rows in its table.

    :param peers: the peers' own dicts, where these are not just the nodes'.
    """
    for node in nodes:
        create, key = (
            (f"SET ROLE {USER}; CREATE", "serial")
            if isinstance(node, PostgreSQLNode)
            else ("CREATE", "int AUTO_INCREMENT")
        )
        node.sql(
            f"{create} TABLE IF NOT EXISTS site__item"
            f" (id {key} PRIMARY KEY, name varchar(20));"
            "DELETE FROM site__item; INSERT INTO site__item (name) VALUES ('a'), ('b'), ('c')",
            DATABASE,
        )
    environment = settings.pop("environment", {})
    if "PYMYSQL" in environment:
        # It would read the system's certificates at each connect, which takes it 20 ms.
        settings["OPTIONS"] = {"ssl_disabled": True}
    files = settings.pop("files", {})
    entry = {
        "ENGINE": ENGINE,
        "PEER_ENGINE": POSTGRESQL if isinstance(nodes[0], PostgreSQLNode) else MYSQL,
        "PEERS": list(peers) or [mysql_peer(node) for node in nodes],
        "CHECK_INTERVAL": 1,
        **settings,
    }
    databases = json.dumps({"default": entry})
    project = Project(root, {**FILES, **files, "databases.json": databases})
    web = Web(project, *command, **environment)
    try:
        yield web.wait(path)
    finally:
        web.stop()


def sessions(node: Node | PostgreSQLNode) -> set[int]:
    """The server's numbers of the site's connections to it."""
    if isinstance(node, PostgreSQLNode):
        rows = node.sql(f"SELECT pid FROM pg_stat_activity WHERE usename = '{USER}'")
    else:
        rows = node.sql(f"SELECT id FROM information_schema.processlist WHERE user = '{USER}'")
    return {int(row) for row in rows.split()}
