"""A child that is forked from a process with connections leaves them alone, and makes its own."""

from __future__ import annotations

import gc
import os
import sys
import threading
import types
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
from django.db import connections, transaction
from django.db.utils import Error

from django_proxysql import LoadBalancer
from django_proxysql.backends import sessions as inherited
from django_proxysql.core import runtime
from tests.children import in_child
from tests.fakes import in_thread, running
from tests.site import Site
from tests.test_connecting import sockets

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="fork is Unix's")


def number(connection: Any) -> int:
    """Return the server's own number of a connection."""
    driver = connection.connection
    if connection.vendor == "mysql":
        return int(driver.thread_id())
    return int(driver.info.backend_pid)


@pytest.fixture
def mine(here: Site) -> Iterator[int]:
    """The number of this process's connection, which stays the same and works."""
    assert here.sql("SELECT 1") == [(1,)]
    before = number(here.connection)
    yield before
    assert here.sql("SELECT 1") == [(1,)]
    assert number(here.connection) == before
    assert not here.losses()
    assert sum(peer.connections for peer in here.balancer.peers.values()) == 1


def test_connects_for_itself(here: Site, mine: int) -> None:
    """The child's first statement goes over a connection of its own, without a word of it."""

    def work() -> str:
        held = sum(peer.connections for peer in here.balancer.peers.values())
        peer = here.connection.peer
        rows = here.sql("SELECT 1")
        counted = sum(peer.connections for peer in here.balancer.peers.values())
        told = [type(event).__name__ for event in here.events]
        return f"{held} {peer} {rows} {counted} {told} {number(here.connection)}"

    said, _, other = in_child(work).rpartition(" ")
    assert said == "0 None [(1,)] 1 ['Connected']"
    assert int(other) != mine


def test_says_no_goodbye(here: Site, mine: int) -> None:
    """Whatever a child does to be rid of what it inherits, the parent's session goes on."""

    def work() -> str:
        connections.close_all()
        del connections[here.connection.alias]
        here.connection = here.balancer = None
        gc.collect()
        return "done"

    assert in_child(work) == "done"


def test_holds_no_socket_of_its_parents(here: Site, mine: int) -> None:
    its = os.readlink(f"/proc/self/fd/{here.connection.connection.fileno()}")
    assert its in sockets()
    assert in_child(lambda: its in sockets()) == "False"


def test_in_a_transaction(here: Site, mine: int) -> None:
    """A transaction is the parent's: a child in its middle gets an error, and harms nothing."""
    block = transaction.atomic(here.connection.alias)

    def work() -> str:
        try:
            here.write("child's")
        except Error as exc:
            # psycopg2's is no OperationalError.
            block.__exit__(type(exc), exc, exc.__traceback__)
            return f"error {here.read()} {number(here.connection) == mine}"
        return "written"

    with block:
        here.write("one")
        assert in_child(work) == "error [] False"
        here.write("two")
    assert here.written() == ["one", "two"]


def test_before_a_transactions_first_statement(here: Site, mine: int) -> None:
    """Nothing has happened in it: it is begun anew on the child's connection."""

    def work() -> str:
        here.write("child's")
        here.connection.set_rollback(True)
        return f"{number(here.connection) == mine}"

    with transaction.atomic(here.connection.alias):
        assert in_child(work) == "False"
        here.write("one")
    assert here.written() == ["one"]


def test_session_state_is_the_parents(here: Site) -> None:
    """What is held in the session is lost in the child: one error, then a new connection."""
    lock = "SELECT GET_LOCK('l', 0)" if here.is_mysql else "SELECT pg_advisory_lock(1)"
    here.sql(lock)

    def work() -> str:
        try:
            here.sql("SELECT 1")
        except Error:
            return f"error {here.sql('SELECT 2')}"
        return "no error"

    assert in_child(work) == "error [(2,)]"
    held = "SELECT IS_USED_LOCK('l') = CONNECTION_ID()"
    if not here.is_mysql:
        held = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'"
    assert here.sql(held) == [(1,)]


def test_peers_are_no_suspects(here: Site, mine: int) -> None:
    def work() -> str:
        with transaction.atomic(here.connection.alias):
            # The parent's transaction ended in the child.
            pass
        return str([(state.state, state.suspect) for state in here.balancer.snapshot()])

    here.sql("SELECT 1")
    assert in_child(work) == "[('closed', False), ('closed', False)]"


def test_connections_of_other_threads(here: Site, mine: int) -> None:
    """Python clears other threads' connections away in the child: no server notices."""
    ready, over = threading.Event(), threading.Event()
    said: list[Any] = []

    def ask() -> Any:
        with connections[here.connection.alias].cursor() as cursor:
            cursor.execute("SELECT 1")
            return cursor.fetchone(), number(connections[here.connection.alias])

    def hold() -> None:
        # No frame of the thread's has the connection meanwhile: frames are not cleared away.
        before = ask()
        ready.set()
        assert over.wait(60)
        said.append(ask() == before)
        connections[here.connection.alias].close()

    def work() -> str:
        gc.collect()
        return "done"

    with running(hold):
        assert ready.wait(60)
        assert in_child(work) == "done"
        assert in_child(work) == "done"
        over.set()
    assert said == [True]
    assert not here.losses()


def test_child_waits_for_no_other_threads_statement(here: Site, mine: int) -> None:
    said: list[Any] = []
    lock, unlock = "SELECT GET_LOCK('gate', 20)", "SELECT RELEASE_LOCK('gate')"
    is_waiting = "SELECT count(*) FROM information_schema.processlist WHERE state = 'User lock'"
    if not here.is_mysql:
        lock, unlock = "SELECT pg_advisory_lock(7)", "SELECT pg_advisory_unlock(7)"
        is_waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted"

    def ask() -> None:
        connection = connections[here.connection.alias]
        with connection.cursor() as cursor:
            cursor.execute(lock)
            said.extend(cursor.fetchall())
        connection.close()

    def work() -> str:
        gc.collect()
        return f"{here.sql('SELECT 1')}"

    with here.plain.cursor() as cursor:
        cursor.execute(lock)
        with running(ask):
            waiting = 0
            while not waiting:
                cursor.execute(is_waiting)
                ((waiting,),) = cursor.fetchall()
            try:
                assert in_child(work) == "[(1,)]"
            finally:
                cursor.execute(unlock)
    assert said == [(1 if here.is_mysql else "",)]
    assert not here.losses()


def test_child_finds_out_afterwards(here: Site, mine: int) -> None:
    """uWSGI forks in C and calls Python only afterwards, in the child."""
    held = inherited._held

    def work() -> str:
        held.clear()
        inherited._in_child()
        return f"{here.sql('SELECT 1')} {number(here.connection) == mine}"

    assert in_child(work) == "[(1,)] False"


def test_nothing_is_kept_in_the_parent(here: Site, mine: int) -> None:
    """Wrappers are forgotten with their threads, and not held on to after a fork."""
    other = in_thread(lambda: weakref.ref(connections[here.connection.alias]))
    assert in_child(lambda: "done") == "done"
    gc.collect()
    assert inherited._held == {}
    assert other() is None
    assert here.connection in inherited._wrappers.all()


def test_uwsgi_calls_the_hook(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """In a worker, once, and what was there before; tests/test_web_servers.py has the real one."""
    called: list[str] = []
    uwsgi: Any = types.SimpleNamespace(post_fork_hook=lambda: called.append("theirs"))
    monkeypatch.setitem(sys.modules, "uwsgi", uwsgi)
    monkeypatch.setattr(runtime, "_before_us", None)
    ours = [runtime._is_home, lambda: 1 / 0, lambda: called.append("ours")]
    monkeypatch.setattr(runtime, "_in_child", ours)
    runtime.watch_uwsgi()
    runtime.watch_uwsgi()
    # Nothing has forked since.
    uwsgi.post_fork_hook()
    assert called == ["theirs"]
    monkeypatch.setattr(runtime, "_home", 0)
    uwsgi.post_fork_hook()
    uwsgi.post_fork_hook()
    assert called == ["theirs", "ours", "theirs", "theirs"]
    assert caplog.messages == ["After a fork something could not be renewed"]
    # Code that takes the hook later has a chain for others.
    decorators: Any = types.SimpleNamespace(postfork_chain=[lambda: called.append("chained")])
    monkeypatch.setitem(sys.modules, "uwsgidecorators", decorators)
    LoadBalancer({"db1": {"host": "db1"}})
    LoadBalancer({"db1": {"host": "db1"}})
    assert len(decorators.postfork_chain) == 2


def test_python_calls_the_child_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Python has called in the child is not called there again."""
    called: list[str] = []
    monkeypatch.setattr(runtime, "_in_child", [lambda: called.append("ours")])

    def work() -> str:
        runtime._hook()
        return str(called)

    assert in_child(work) == "[]"
