"""The site under the servers that people run: gunicorn with each of its workers, uWSGI, uvicorn.

Whatever serves it, a peer that dies fails no request, its circuit opens in each worker, and it is
used again when it is back. No worker uses a socket of its parent's.
"""

from __future__ import annotations

import signal
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import django
import gunicorn
import pytest

from tests.engine import mysql_peer
from tests.fakes import until
from tests.servers import DATABASE, PASSWORD, USER
from tests.servers.faultproxy import FaultProxy
from tests.servers.mariadb import Node
from tests.servers.ports import HOST
from tests.servers.postgresql import PostgreSQLNode
from tests.web import Answer, Client, Web, serving, sessions

Pair = tuple[Node, Node]

GUNICORN = ("-m", "gunicorn", "wsgi", "--bind", "ADDRESS", "--workers", "2")
#: gevent's worker patches its process; what a preloaded application imports comes before that.
PATCHED = {"gunicorn.conf.py": "from gevent import monkey\nmonkey.patch_all()\n"}


class Model(NamedTuple):
    """A way to run the site."""

    command: tuple[str, ...]
    path: str = "/"
    is_preloaded: bool = False
    files: dict[str, str] = {}
    environment: dict[str, str] = {}
    settings: dict[str, Any] = {}

    def preloaded(self, **files: str) -> Model:
        """The same, with the application loaded before the workers are forked."""
        return self._replace(
            command=(*self.command, "--preload"), is_preloaded=True, files=files or self.files
        )

    def pymysql(self) -> Model:
        """The same with PyMySQL."""
        return self._replace(environment={"PYMYSQL": "1"})


SYNC = Model((*GUNICORN, "--worker-class", "sync"))
GTHREAD = Model((*GUNICORN, "--worker-class", "gthread", "--threads", "4"))
GEVENT = Model((*GUNICORN, "--worker-class", "gevent"))
#: Loads the application before it forks its workers, unless an option says otherwise.
UWSGI = Model(
    (
        "-c",
        "import sys, pyuwsgi; pyuwsgi.run(sys.argv[1:])",
        *("--http-socket", "ADDRESS", "--module", "wsgi", "--need-app"),
        *("--master", "--die-on-term", "--processes", "2"),
    ),
    is_preloaded=True,
)
LAZY = UWSGI._replace(command=(*UWSGI.command, "--lazy-apps"), is_preloaded=False)
UVICORN = ("-m", "uvicorn", "asgi:application", "--port", "PORT", "--lifespan", "off")

GUNICORNS = {
    "sync": SYNC,
    "sync, preload": SYNC.preloaded(),
    "gthread": GTHREAD,
    "gthread, preload": GTHREAD.preloaded(),
    "gthread, preload, background": GTHREAD.preloaded()._replace(settings={"TRIALS": "background"}),
    "gevent": GEVENT,
    "gevent, preload": GEVENT.preloaded(**PATCHED),
    "gevent, PyMySQL": GEVENT.pymysql(),
    "gevent, PyMySQL, preload": GEVENT.preloaded(**PATCHED).pymysql(),
}
MODELS = {
    **GUNICORNS,
    "uWSGI": UWSGI,
    "uWSGI, Python's hooks": UWSGI._replace(command=(*UWSGI.command, "--py-call-uwsgi-fork-hooks")),
    "uWSGI, decorators": UWSGI._replace(files={"site_/__init__.py": "import uwsgidecorators\n"}),
    "uWSGI, background": UWSGI._replace(settings={"TRIALS": "background"}),
    "uWSGI, lazy-apps, threads": LAZY._replace(command=(*LAZY.command, "--threads", "4")),
    "uvicorn": Model(UVICORN, "/async"),
    "uvicorn, a synchronous view": Model(UVICORN),
    "uvicorn, 2 workers": Model((*UVICORN, "--workers", "2"), "/async"),
}
has_async_orm = pytest.mark.skipif(
    django.VERSION < (4, 1), reason="the asynchronous ORM came with Django 4.1"
)


has_psycopg_3 = pytest.mark.skipif(django.VERSION < (4, 2), reason="psycopg 3 came with Django 4.2")


def pids(answers: list[Answer]) -> set[int]:
    return {answer["pid"] for answer in answers}


def served_by(answers: list[Answer], node: Node | PostgreSQLNode) -> set[int]:
    """The workers that have had a connection to ``node``."""
    return {answer["pid"] for answer in answers if answer["port"] == node.port}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=has_async_orm if name.startswith("uvicorn") else ())
        for name in MODELS
    ],
)
def test_a_peer_dies_and_comes_back(name: str, mariadb_pair: Pair, tmp_path: Path) -> None:
    model = MODELS[name]
    first, second = mariadb_pair
    number = 2 if "2" in model.command else 1
    with serving(
        tmp_path,
        mariadb_pair,
        *model.command,
        path=model.path,
        files=model.files,
        environment=model.environment,
        **model.settings,
    ) as web:
        with Client(web.port, model.path) as client:
            # Connections spread, in each worker.
            client.until(
                lambda answers: (
                    len(served_by(answers, first) & served_by(answers, second)) == number
                )
            )
            workers = pids(client.answers)
            if model.is_preloaded:
                assert_of_their_own(client.answers, mariadb_pair)
            # Death, found by each worker for itself.
            first.kill()
            client.until(
                lambda answers: (
                    workers == {one["pid"] for one in answers if one["states"]["peer0"] != "closed"}
                )
            )
            # And its return.
            first.start()
            client.until(lambda answers: served_by(answers, first) == workers)
            assert pids(client.answers) == workers
        assert client.failures == []
        assert web.stop() in (0, -signal.SIGTERM)
    assert "Traceback" not in web.log.read_text()
    assert_none_left(mariadb_pair)


def assert_of_their_own(answers: list[Answer], pair: Pair) -> None:
    """The parent's connection is used by none of the workers, and lives."""
    loaded = {tuple(answer["loaded"]) for answer in answers}
    # Each server has numbers of its own: one alone may be a session's on either.
    ((parent, port, session),) = loaded
    assert parent not in pids(answers)
    (home,) = [node for node in pair if node.port == port]
    assert session in sessions(home)
    used = {answer["session"] for answer in answers if answer["port"] == home.port}
    assert session not in used
    # Workers that keep a connection each may all have it on the other node: those are there, then.
    assert used or all(
        answer["session"] in sessions(node)
        for answer in answers[-20:]
        for node in pair
        if node.port == answer["port"]
    )


def assert_none_left(nodes: Sequence[Node | PostgreSQLNode]) -> None:
    """The servers forget connections as soon as they have read the goodbye."""
    until(lambda: not any(map(sessions, nodes)))


@pytest.mark.parametrize("name", ["sync", "gthread", "gevent"])
def test_preloaded_with_kept_connections(name: str, mariadb_pair: Pair, tmp_path: Path) -> None:
    """Connections that are kept are each worker's own, too, and not the parent's."""
    model = GUNICORNS[f"{name}, preload"]
    with serving(
        tmp_path, mariadb_pair, *model.command, files=model.files, CONN_MAX_AGE=None
    ) as web:
        with Client(web.port) as client:
            client.until(lambda answers: len(answers) > 200 and len(pids(answers)) == 2)
        assert client.failures == []
        assert_of_their_own(client.answers, mariadb_pair)
        by_worker = {
            (answer["pid"], answer["port"], answer["session"]) for answer in client.answers
        }
        sessions_used = {key[1:] for key in by_worker}
        assert len(sessions_used) == len(by_worker)


@pytest.mark.parametrize(
    "name",
    [
        "sync",
        pytest.param(
            "gthread",
            marks=pytest.mark.skipif(
                gunicorn.version_info < (24,), reason="gunicorn 23 resets connections at HUP"
            ),
        ),
        "gevent",
    ],
)
def test_graceful_reload(name: str, mariadb_pair: Pair, tmp_path: Path) -> None:
    """HUP: new workers take the old ones' places, and no request fails."""
    with serving(tmp_path, mariadb_pair, *GUNICORNS[name].command) as web:
        with Client(web.port) as client:
            old = pids(client.until(lambda answers: len(pids(answers)) == 2))
            web.process.send_signal(signal.SIGHUP)
            client.until(
                lambda answers: len(pids(answers) - old) == 2 and not pids(answers[-50:]) & old
            )
        assert client.failures == []
        assert web.stop() == 0
    assert_none_left(mariadb_pair)


def assert_statements_wait_together(web: Web, holder: Any, waiting: Callable[[], int]) -> None:
    """Six requests of one worker wait for the holder's lock at once; then go on, unmixed."""
    with Client(web.port, "/lock", threads=6) as client:
        while waiting() != 6:
            assert not client.failures
            time.sleep(0.02)
        holder.close()
        client.until(lambda answers: len(answers) > 20)
    assert client.failures == []
    assert len(pids(client.answers)) == 1


def test_greenlets_switch_in_the_driver(mariadb_pair: Pair, tmp_path: Path) -> None:
    """gevent with PyMySQL: one worker waits for several statements at once, each with its own
    connection, and mixes none of them up."""
    command = (*GEVENT.command, "--workers", "1")
    node = mariadb_pair[0]
    query = "SELECT count(*) FROM information_schema.processlist WHERE state='User lock'"
    with serving(tmp_path, [node], *command, environment={"PYMYSQL": "1"}) as web:
        assert_statements_wait_together(web, lock_holder(node), lambda: int(node.sql(query)))


@has_psycopg_3
def test_greenlets_switch_in_psycopg(postgres: PostgreSQLNode, tmp_path: Path) -> None:
    """gevent with psycopg 3, which waits as gevent does."""
    import psycopg

    command = (*GEVENT.command, "--workers", "1")
    query = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
    with serving(tmp_path, [postgres], *command) as web:
        holder = psycopg.connect(
            host=postgres.host, port=postgres.port, user=USER, password=PASSWORD, dbname=DATABASE
        )
        holder.execute("SELECT pg_advisory_lock(1)")
        assert_statements_wait_together(web, holder, lambda: int(postgres.sql(query)))


def lock_holder(node: Node) -> Any:
    import MySQLdb

    connection = MySQLdb.connect(
        host=node.host, port=node.port, user=USER, password=PASSWORD, database=DATABASE
    )
    connection.cursor().execute("SELECT GET_LOCK('gate', 0)")
    return connection


@has_async_orm
@pytest.mark.parametrize(
    "servers", ["mariadb_pair", pytest.param("postgres_pair", marks=has_psycopg_3)]
)
def test_asynchronous_writes(servers: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """acreate() and atomic() in sync_to_async(), while a peer is out: nothing is lost or mixed."""
    first, second = pair = request.getfixturevalue(servers)
    with serving(tmp_path, pair, *UVICORN, path="/write", CHECK_INTERVAL=3600) as web:
        with Client(web.port, "/write") as client:
            client.until(lambda answers: served_by(answers, first) and served_by(answers, second))
        assert client.failures == []
        first.kill()
        with Client(web.port, "/write") as client:
            client.until(lambda answers: len(answers) > 40)
        assert client.failures == []
        assert not served_by(client.answers, first)
        assert client.answers[-1]["states"]["peer0"] == "open"
        assert web.stop() in (0, -signal.SIGTERM)
    assert second.sql("SELECT name FROM site__item ORDER BY 1", DATABASE).split() == ["a", "b", "c"]
    assert_none_left([second])


@pytest.mark.skipif(django.VERSION < (5,), reason="views are cancelled since Django 5.0")
def test_a_view_that_is_cancelled_as_it_connects(
    mariadb: Node, fault_proxy: Callable[..., FaultProxy], tmp_path: Path
) -> None:
    """The client goes away: the view's thread finishes the connect, and what it finds counts."""
    hangs, other = fault_proxy(mariadb), fault_proxy(mariadb)
    peers = [mysql_peer(hangs), mysql_peer(other, PRIORITY=1)]
    with serving(
        tmp_path,
        [mariadb],
        *UVICORN,
        path="/async",
        peers=peers,
        CONNECT_TIMEOUT=60,
        CHECK_INTERVAL=3600,
    ) as web:
        hangs.accept_and_hang()
        before = hangs.accepted
        leaver = socket.create_connection((HOST, web.port))
        leaver.sendall(f"GET /cancelled?token=x HTTP/1.1\r\nHost: {HOST}\r\n\r\n".encode())
        until(lambda: hangs.accepted > before)
        leaver.close()
        until(lambda: "was cancelled" in web.log.read_text(), pause=0.02)
        assert "circuit of peer0" not in web.log.read_text()
        hangs.drop_connections()
        until(lambda: "circuit of peer0" in web.log.read_text(), pause=0.02)
        with Client(web.port, "/async") as client:
            client.until(lambda answers: len(answers) > 40)
        assert client.failures == []
        assert client.answers[-1]["states"] == {"peer0": "open", "peer1": "closed"}
        assert hangs.accepted == before + 1
        assert web.stop() in (0, -signal.SIGTERM)
    assert "Traceback" not in web.log.read_text()
    assert_none_left([mariadb])
