"""The servers that the other tests rely on do what is said of them."""

from __future__ import annotations

import contextlib
import ctypes
import inspect
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Callable

import MySQLdb
import psycopg
import pytest

from tests.conftest import pytest_runtest_logstart
from tests.fakes import in_thread, until
from tests.servers import DATABASE, PASSWORD, USER
from tests.servers.galera import GaleraCluster
from tests.servers.haproxy import HAProxy
from tests.servers.keeping import Keeper
from tests.servers.lending import borrowed, lend
from tests.servers.mariadb import MariaDBNode, Node
from tests.servers.ports import MissingProgram, PortPool, ServerError, find_program
from tests.servers.postgresql import PostgreSQLNode
from tests.servers.processes import ServerProcess, alive, descendants
from tests.servers.redis import RedisServer
from tests.servers.runs import current_run


def connect(node: Node, **options: Any) -> Any:
    settings = {
        "host": node.host,
        "port": node.port,
        "user": USER,
        "password": PASSWORD,
        "database": DATABASE,
        "connect_timeout": 5,
    }
    return MySQLdb.connect(**{**settings, **options})


def test_killed_node_refuses_and_keeps_its_data(mariadb: Node) -> None:
    """A killed node refuses connections; restarted it has its port and each answered write."""
    mariadb.sql("CREATE OR REPLACE TABLE kept (n INT)", DATABASE)
    connection = connect(mariadb)
    cursor = connection.cursor()
    for n in range(100):
        cursor.execute("INSERT INTO kept VALUES (%s)", [n])
        connection.commit()
    mariadb.kill()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((mariadb.host, mariadb.port), timeout=5)
    mariadb.start()
    assert mariadb.sql("SELECT COUNT(*) FROM kept", DATABASE) == "100\n"
    connection.close()


def test_hurt_node_is_restored(mariadb_pair: tuple[Node, Node]) -> None:
    """Whatever a test does to a node, the next test finds it as it was."""
    first, second = mariadb_pair
    before = first.globals()
    first.set_global("max_connections", 10)
    first.set_global("init_connect", "SET @x = 1")
    second.options.append("--max-connections=20")
    second.restart()
    second.freeze()
    for node in mariadb_pair:
        node.restore()
    assert first.globals() == before
    assert second.globals()["max_connections"] == before["max_connections"]
    second.kill()
    second.restore()
    connect(second).close()


def test_mariadb_tls(mariadb_tls: Node) -> None:
    """The node's certificate stands up to a client that checks it; TLS is not forced."""
    options: dict[str, Any] = {"ssl_mode": "VERIFY_IDENTITY", "ssl": {"ca": mariadb_tls.ca}}
    for given, encrypted in ((options, True), ({"ssl_mode": "DISABLED"}, False)):
        connection = connect(mariadb_tls, **given)
        connection.query("SHOW STATUS LIKE 'Ssl_cipher'")
        ((_, cipher),) = connection.store_result().fetch_row()
        assert bool(cipher) is encrypted
        connection.close()


def test_galera_isolated_node(galera: GaleraCluster) -> None:
    """A node cut off answers SELECT 1 and fails table accesses by 1047; rejoined it catches up."""
    first, second, third = galera
    first.sql("CREATE OR REPLACE TABLE isolated (n INT PRIMARY KEY)", DATABASE)
    second.sql("SET wsrep_sync_wait = 1; SELECT * FROM isolated", DATABASE)
    galera.isolate(second)
    assert second.sql("SELECT 1") == "1\n"
    with pytest.raises(ServerError, match=r"1047.*WSREP"):
        second.sql("SELECT * FROM isolated", DATABASE)
    first.sql("INSERT INTO isolated VALUES (1)", DATABASE)
    galera.rejoin(second)
    for node in galera:
        statement = "SET wsrep_sync_wait = 1; SELECT * FROM isolated"
        assert node.sql(statement, DATABASE) == "1\n"
    assert third.status()["cluster_size"] == "3"


@pytest.mark.slow
def test_galera_restored_after_majority_died(galera: GaleraCluster) -> None:
    """With two of three nodes killed the last is of no use; restore() makes a cluster of them."""
    first, second, _ = galera
    first.sql("CREATE OR REPLACE TABLE majority (n INT PRIMARY KEY)", DATABASE)
    first.kill()
    second.kill()
    galera.restore()
    for node in galera:
        assert node.synced()
        assert node.sql("SELECT COUNT(*) FROM majority", DATABASE) == "0\n"


def test_haproxy_frontend(mariadb: Node, haproxy: Callable[..., HAProxy]) -> None:
    """A disabled frontend refuses and leaves connections alone; shutdown sessions cuts them."""
    proxy = haproxy(one=mariadb, two=mariadb)
    port = proxy.ports["one"]
    connection = connect(mariadb, port=port)
    other = connect(mariadb, port=proxy.ports["two"])
    assert proxy.sessions("one") == 1
    proxy.disable("one")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((proxy.host, port), timeout=5)
    connection.ping()
    proxy.shutdown_sessions("one")
    with pytest.raises(MySQLdb.OperationalError):
        connection.ping()
    other.ping()
    proxy.enable("one")
    connect(mariadb, port=port).close()
    connection.close()
    other.close()


def connect_postgres(node: PostgreSQLNode, **options: Any) -> psycopg.Connection[Any]:
    settings = {
        "host": node.host,
        "port": node.port,
        "user": USER,
        "password": PASSWORD,
        "dbname": DATABASE,
    }
    return psycopg.connect(**{**settings, **options})


def test_postgres_keeps_its_data(postgres_pair: tuple[PostgreSQLNode, PostgreSQLNode]) -> None:
    """Killed, with all its processes, and restarted: no acknowledged write is lost."""
    node = postgres_pair[0]
    with contextlib.closing(connect_postgres(node, autocommit=True)) as connection:
        connection.execute("CREATE TABLE IF NOT EXISTS kept (n INT)")
        connection.execute("TRUNCATE kept")
        for n in range(100):
            connection.execute("INSERT INTO kept VALUES (%s)", [n])
        children = descendants(node.pid)
        node.kill()
        with pytest.raises(psycopg.OperationalError):
            connection.execute("SELECT 1")
    assert len(children) >= 4
    assert not [pid for pid in children if alive(pid)]
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((node.host, node.port), timeout=5)
    node.start()
    with contextlib.closing(connect_postgres(node)) as connection:
        assert connection.execute("SELECT COUNT(*) FROM kept").fetchone() == (100,)


def test_postgres_options_and_settings(postgres: PostgreSQLNode) -> None:
    """Options and settings are as given, and the test's changes are undone."""
    assert postgres.sql("SHOW max_prepared_transactions") == "10\n"
    postgres.set_global("work_mem = '5MB'")
    postgres.options.append("max_prepared_transactions=0")
    postgres.restart()
    assert postgres.sql("SHOW max_prepared_transactions; SHOW work_mem") == "0\n5MB\n"
    postgres.restore()
    assert postgres.sql("SHOW max_prepared_transactions; SHOW work_mem") == "10\n4MB\n"


def test_a_failure_shows_no_exception_that_another_test_left() -> None:
    """What was "being handled" when an exception struck stays so, in CPython: see conftest."""
    left = ValueError("of another test")
    given = ctypes.py_object(type(left)), ctypes.py_object(left), ctypes.py_object(None)
    for stolen in given:
        ctypes.pythonapi.Py_IncRef(stolen)
    ctypes.pythonapi.PyErr_SetExcInfo(*given)
    assert sys.exc_info()[1] is left
    pytest_runtest_logstart()
    with pytest.raises(KeyError) as caught:
        raise KeyError("of this test")
    assert caught.value.__context__ is None


def test_missing_program_names_the_package() -> None:
    """What is not installed is named together with the Debian package that has it."""
    with pytest.raises(MissingProgram, match=r"no-such-server is not.*install no-such-pk"):
        find_program("no-such-server", package="no-such-pk")


@pytest.mark.server
def test_server_that_cannot_start_says_why() -> None:
    """A server that ends by itself is reported at once, with the end of its log."""
    node = MariaDBNode(options=["--no-such-option"])
    try:
        with pytest.raises(ServerError, match=r"(?s)ended by itself.*no-such-option"):
            node.start()
    finally:
        node.close()


def test_started_by_a_thread_that_ends(mariadb: Node) -> None:
    """A server outlives the thread that started it."""
    mariadb.kill()
    in_thread(mariadb.start)
    time.sleep(0.2)
    assert mariadb.running


def test_forked_child_leaves_the_servers_alone(mariadb: Node) -> None:
    """What a child does at its end, by atexit and `with`, does not end its parent's servers."""
    run = current_run()
    child = os.fork()
    if not child:
        with contextlib.suppress(BaseException):
            run.end()
            mariadb.close()
        os._exit(0)
    os.waitpid(child, 0)
    assert mariadb.running
    assert mariadb.sql("SELECT 1") == "1\n"


class Forking(ServerProcess):
    """A process that begins a child every ten milliseconds, each of which writes down its id."""

    def command(self) -> list[str]:
        code = """
        import os, time
        for _ in range(1000):
            if not os.fork():
                with open("children", "a") as children:
                    children.write(f"{os.getpid()}\\n")
                time.sleep(20)
                os._exit(0)
            time.sleep(0.01)
        """
        return [sys.executable, "-c", inspect.cleandoc(code)]

    def ready(self) -> bool:
        return len(self.children()) >= 20

    def children(self) -> list[int]:
        written = self.directory / "children"
        return [int(line) for line in written.read_text().splitlines()] if written.exists() else []


def test_killed_server_leaves_no_child() -> None:
    """A child that begins while its server is killed goes too: it may wait for a lock for ever."""
    for _ in range(3):
        with Forking() as server:
            server.kill()
            assert not [pid for pid in server.children() if alive(pid)]


class Thing:
    """What a test uses; ``breaks`` says when it raises next."""

    def __init__(self, breaks: list[str], ended: list[Thing]) -> None:
        self.breaks = breaks
        self.ended = ended
        self.does("start")

    def does(self, what: str) -> None:
        if what in self.breaks:
            self.breaks.remove(what)
            raise ServerError(what)

    def restore(self) -> None:
        self.does("restore")

    def close(self) -> None:
        self.ended.append(self)


@pytest.mark.parametrize("broken", ["start", "restore"])
def test_what_fails_one_test_is_started_anew_for_the_next(broken: str) -> None:
    """A server that once gives no answer is no error of each test that comes later."""
    breaks, ended = [broken], list[Thing]()

    def start(stack: contextlib.ExitStack) -> tuple[Thing]:
        thing = Thing(breaks, ended)
        stack.callback(thing.close)
        return (thing,)

    with Keeper() as keeper:
        with pytest.raises(ServerError, match=broken), keeper.use(start):
            pass
        assert len(ended) == (broken == "restore")
        with keeper.use(start) as (one,):
            assert one not in ended
        with keeper.use(start) as (same,):
            assert same is one
        assert one not in ended
    assert ended[-1] is one


def test_server_that_cannot_be_set_back_is_started_anew() -> None:
    def start(stack: contextlib.ExitStack) -> RedisServer:
        return stack.enter_context(RedisServer())

    with Keeper() as keeper:
        with pytest.raises(ServerError, match="ended by itself"), keeper.use(start) as one:
            one.options.append("--no-such-option yes")
            one.kill()
        with keeper.use(start) as other:
            assert other.ask("PING") == "PONG\n"
        assert (one.closed, other.closed) == (True, False)
    assert other.closed


def test_database_that_a_failed_test_has_left_is_made_anew(
    mariadb: Node, postgres: PostgreSQLNode
) -> None:
    for _ in range(2):
        mariadb.create_database("left_over")
        postgres.create_database("left_over", USER)
        for server in (mariadb, postgres):
            server.sql("CREATE TABLE one (n INT)", "left_over")
    # A connection to it holds up no other test.
    with contextlib.closing(connect_postgres(postgres, dbname="left_over")):
        postgres.create_database("left_over", USER)
    for server in (mariadb, postgres):
        server.sql("DROP DATABASE left_over")


@pytest.mark.parametrize("kind", ["mariadb_pair", "postgres_pair", "galera"])
def test_borrowed_servers_are_used_and_never_stopped(
    kind: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run that borrows a server sets back what it changes, and leaves the process alone."""
    ours = request.getfixturevalue(kind)
    for name, value in lend(**{kind: ours}).items():
        monkeypatch.setenv(name, value)
    assert borrowed("redis_server") is None
    for our, their in zip(ours, borrowed(kind)):
        pid = our.pid
        their.freeze()
        their.restore()
        assert their.sql("SELECT 1") == "1\n"
        for end in (their.stop, their.kill, their.restart):
            with pytest.raises(ServerError, match="is lent"):
                end()
        assert (our.running, our.pid) == (True, pid)
        assert our.sql("SELECT 1") == "1\n"


def test_ports_are_kept_and_outside_the_ephemeral_range() -> None:
    """A reserved port is given to no other server, and never to an outgoing connection."""
    pool, other_process = PortPool(), PortPool()
    first = pool.reserve(3)
    for port in range(first, first + 3):
        assert not other_process._try([port])
        assert port < 32768
    pool.release(first)
    notes = other_process._try([first])
    assert len(notes) == 1
    notes[0].close()


PROGRAM = ["-m", "tests.servers.interrupted_run"]
TEST_RUN = "-m pytest -q -s -p no:cacheprovider tests/servers/interrupted_run.py".split()


@pytest.mark.server
@pytest.mark.parametrize(
    ("command", "number", "exit_code"),
    [
        (PROGRAM, signal.SIGINT, -signal.SIGINT),
        (PROGRAM, signal.SIGTERM, 143),
        (PROGRAM, signal.SIGKILL, -signal.SIGKILL),
        (TEST_RUN, signal.SIGINT, pytest.ExitCode.INTERRUPTED),
        (TEST_RUN, signal.SIGTERM, 143),
    ],
)
def test_interrupted_run_leaves_nothing(
    command: list[str], number: signal.Signals, exit_code: int
) -> None:
    """However a run ends: no process (not even a frozen one) and no file is left behind."""
    root = Path(__file__).parent.parent
    with subprocess.Popen(
        [sys.executable, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=root,
        text=True,
    ) as run:
        assert run.stdout is not None
        output = []
        for line in run.stdout:
            output.append(line)
            if line.startswith("STARTED"):
                break
        else:
            pytest.fail("".join(output))
        pids, workspace = json.loads(line.partition(" ")[2])
        assert len(pids) >= 6
        run.send_signal(number)
        run.communicate(timeout=120)
    assert run.returncode == exit_code
    until(lambda: not any(map(alive, pids)) and not Path(workspace).exists(), pause=0.1)
