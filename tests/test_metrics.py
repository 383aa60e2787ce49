"""What Prometheus gets: each thing that happens once, and gauges that say what is so."""

from __future__ import annotations

import contextlib
import functools
import re
import shutil
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Counter, generate_latest

from django_proxysql import Fault, LoadBalancer, balancers
from django_proxysql.core.circuit import closed_elsewhere, opened_elsewhere
from django_proxysql.core.events import (
    CommitResolved,
    ConnectionLost,
    ConnectionReplaced,
    Event,
    StatementReplayed,
)
from django_proxysql.monitoring.metrics import Metrics, MultiProcessCollector
from tests.children import run_python
from tests.fakes import (
    bad_password,
    in_thread,
    raised_by,
    refused_by_host,
    running,
    too_many,
)
from tests.servers import PASSWORD
from tests.servers.ports import find_program
from tests.site import Site
from tests.test_balancer import World
from tests.test_docs import blocks
from tests.test_floors import without_django

ROOT = Path(__file__).parent.parent


class Watched(World):
    """A balancer whose metrics are in a registry of their own."""

    def __init__(self, *names: str, **options: Any) -> None:
        super().__init__(*names, **options)
        self.registry = CollectorRegistry()
        self.metrics = Metrics(self.db, registry=self.registry)

    def value(self, name: str, **labels: str) -> float | None:
        return value(self.registry, name, **{"alias": "default", **labels})

    def states(self) -> str:
        """The states that the gauge names, of each peer."""
        return " ".join(
            state
            for peer in self.db.peers
            for state in ("closed", "open", "half-open")
            if self.value("circuit_state", peer=peer, state=state)
        )


def value(registry: CollectorRegistry, name: str, **labels: str) -> float | None:
    """Return a sample of ours, or None if there is none."""
    found: float | None = registry.get_sample_value(f"django_proxysql_{name}", labels)
    return found


def check(text: bytes) -> str:
    """Return what promtool complains about."""
    done = subprocess.run(
        [find_program("promtool", package="prometheus"), "check", "metrics"],
        input=text,
        capture_output=True,
        timeout=60,
    )
    assert done.returncode in (0, 3), done
    return (done.stdout + done.stderr).decode()


# What is counted


class TestConnecting:
    def test_series_begin_at_zero(self) -> None:
        """Those of each peer are there before anything happens: increase() sees the first time."""
        world = Watched("db1", "db2")
        for peer in ("db1", "db2"):
            assert world.value("connects_total", peer=peer, outcome="failure") == 0
            assert world.value("connections_lost_total", peer=peer, found="in_use") == 0
            assert world.value("connections", peer=peer) == 0
            for fault in Fault:
                assert world.value("connect_failures_total", peer=peer, fault=fault.value) == 0
        assert world.value("peers_exhausted_total") == 0

    def test_connects(self) -> None:
        """By peer and outcome, with the seconds they took."""
        world = Watched("db1", "db2")

        def takes_three_seconds() -> None:
            world.clock.advance(3)

        world.driver.down["db1"] = refused_by_host
        world.driver.down["db2"] = takes_three_seconds
        for _ in range(2):
            world.connect()
        assert world.value("connects_total", peer="db1", outcome="failure") == 1
        assert world.value("connects_total", peer="db1", outcome="success") == 0
        assert world.value("connects_total", peer="db2", outcome="success") == 2
        seconds = {"peer": "db2", "outcome": "success"}
        assert world.value("connect_duration_seconds_count", **seconds) == 2
        assert world.value("connect_duration_seconds_sum", **seconds) == 6
        assert world.value("connect_duration_seconds_bucket", **seconds, le="2.5") == 0
        assert world.value("connect_duration_seconds_bucket", **seconds, le="5.0") == 2

    @pytest.mark.parametrize(
        ("error", "fault"),
        [
            (refused_by_host, "unreachable"),
            (bad_password, "refused"),
            (too_many, "overloaded"),
            (OSError(24, "Too many open files"), "local"),
            (KeyboardInterrupt, "other"),
        ],
    )
    def test_failures_by_fault(self, error: Any, fault: str) -> None:
        world = Watched("db1")
        world.driver.down["db1"] = error
        raised_by(world.db.connect)
        counted = {
            other.value: world.value("connect_failures_total", peer="db1", fault=other.value)
            for other in Fault
        }
        assert counted.pop(fault) == 1
        assert not any(counted.values())

    def test_circuit_and_trials(self) -> None:
        """The state is one of three; trials and openings are counted."""
        world = Watched("db1", "db2")
        assert world.states() == "closed closed"
        world.driver.down["db1"] = refused_by_host
        world.connect()
        assert world.states() == "open closed"
        world.clock.advance(30)
        world.connect()
        assert world.states() == "open closed"
        assert world.value("trials_total", peer="db1", outcome="failure") == 1

        def look() -> None:
            assert world.states() == "half-open closed"

        world.driver.down["db1"] = look
        world.clock.advance(30)
        world.connect()
        assert world.states() == "closed closed"
        assert world.value("trials_total", peer="db1", outcome="success") == 1
        assert world.value("circuit_openings_total", peer="db1") == 1
        assert world.value("trials_total", peer="db2", outcome="success") == 0

    def test_applied(self) -> None:
        """A process that applies another's circuit or drain shows it as if it had found it out."""
        world = Watched("db1", "db2")
        peer = world.db.peers["db1"]
        breaker, now = peer.breaker, world.clock()
        says = {"error": "", "fault": Fault.UNREACHABLE, "question": ""}
        opened = functools.partial(opened_elsewhere, generation=0, due=now + 30, out_for=1, **says)
        breaker.apply(opened, now, elsewhere=True)
        assert world.states() == "open closed"
        assert world.value("circuit_openings_total", peer="db1") == 1
        closed = functools.partial(closed_elsewhere, generation=breaker.circuit.generation)
        breaker.apply(closed, now, elsewhere=True)
        assert world.states() == "closed closed"
        world.db.group.apply_drained(peer, True, elsewhere=True)
        assert world.value("peer_drained", peer="db1") == 1

    def test_exhausted(self) -> None:
        world = Watched("db1")
        world.driver.down["db1"] = refused_by_host
        for _ in range(2):
            raised_by(world.db.connect)
        assert world.value("peers_exhausted_total") == 2

    def test_drained(self) -> None:
        world = Watched("db1", "db2")
        world.db.drain("db1")
        assert world.value("peer_drained", peer="db1") == 1
        assert world.value("peer_drained", peer="db2") == 0
        world.db.undrain("db1")
        assert world.value("peer_drained", peer="db1") == 0

    def test_connections(self) -> None:
        """Each scrape says how many there are: closed ones, collected ones are not."""
        world = Watched("db1")
        kept = [world.db.connect() for _ in range(3)]
        assert world.value("connections", peer="db1") == 3
        world.driver.made.clear()
        kept.pop()
        assert world.value("connections", peer="db1") == 2
        in_thread(lambda: kept.append(world.db.connect()))
        # Its thread has ended, and it is kept: a pool's connections outlive threads.
        assert world.value("connections", peer="db1") == 3


PEER = ("default", "db1", "db1:3306")
MOVE = ("default", "db1", "db2")


@pytest.mark.parametrize(
    ("event", "name", "labels"),
    [
        (ConnectionLost(*PEER, Fault.LOST, "", True), "connections_lost", {"found": "idle"}),
        (ConnectionLost(*PEER, Fault.LOST, "", False), "connections_lost", {"found": "in_use"}),
        (ConnectionReplaced(*MOVE, True, ""), "connections_replaced", {"reason": "lost"}),
        (ConnectionReplaced(*MOVE, False, ""), "connections_replaced", {"reason": "left"}),
        (StatementReplayed(*MOVE, ""), "statements_replayed", {}),
        (CommitResolved(*PEER, "unknown", 1.0, ""), "commits_resolved", {"outcome": "unknown"}),
    ],
)
def test_what_happens_to_a_connection_is_counted_of_the_peer_that_it_was_to(
    event: Event, name: str, labels: dict[str, str]
) -> None:
    world = Watched("db1", "db2")
    world.db.group.emit(event)
    assert world.value(f"{name}_total", peer="db1", **labels) == 1
    text = generate_latest(world.registry).decode()
    counted = re.findall(rf"^django_proxysql_{name}_total{{.*}} (\S+)$", text, re.MULTILINE)
    assert sum(map(float, counted)) == 1


class TestOnAServer:
    @pytest.fixture
    def registry(self, on_mariadb: Site) -> Iterator[CollectorRegistry]:
        registry = CollectorRegistry()
        metrics = Metrics(balancers, registry=registry)
        yield registry
        balancers.remove_listener(metrics)

    def test_labels_are_bounded(self, on_mariadb: Site, registry: CollectorRegistry) -> None:
        """Labels are names of the settings and words of ours: no address, error or password."""
        peer = on_mariadb.connection.peer.name
        on_mariadb.cut("after")
        on_mariadb.read()
        lost = {"alias": "balanced", "peer": peer, "found": "in_use"}
        assert value(registry, "connections_lost_total", **lost) == 1
        for proxy in on_mariadb.proxies:
            proxy.stop()
        on_mariadb.connection.close()
        raised_by(on_mariadb.connection.connect)
        text = generate_latest(registry).decode()
        found: dict[str, set[str]] = {}
        for name, word in re.findall(r'(\w+)="([^"]*)"', text):
            found.setdefault(name, set()).add(word)
        del found["le"]
        assert found == {
            "alias": {"balanced"},
            "peer": {"peer0", "peer1"},
            "outcome": {"success", "failure", "committed", "rolled_back", "unknown"},
            "fault": {fault.value for fault in Fault},
            "found": {"idle", "in_use"},
            "reason": {"lost", "left"},
            "state": {"closed", "open", "half-open"},
        }
        assert PASSWORD not in text
        assert on_mariadb.server.host not in text


# Names


def test_names_are_as_prometheus_would_have_them() -> None:
    """promtool has nothing to say of names, units and help texts."""
    world = Watched("db1")
    world.connect()
    assert check(generate_latest(world.registry)) == ""


def test_registry_has_it_once() -> None:
    """Two of them in a registry would be the same series twice."""
    world = Watched("db1")
    with pytest.raises(ValueError, match="Duplicated"):
        Metrics(LoadBalancer({"db": {}}, print, name="other"), registry=world.registry)


def test_balancers_need_names_of_their_own() -> None:
    dbs = [LoadBalancer({"db": {}}, print) for _ in range(2)]
    with pytest.raises(ValueError, match="different names"):
        Metrics(*dbs, registry=None)


def test_several_balancers() -> None:
    registry = CollectorRegistry()
    worlds = {name: World("db1", name=name) for name in ("shop", "stock")}
    Metrics(*(world.db for world in worlds.values()), registry=registry)
    worlds["stock"].connect()
    counted = {
        name: value(registry, "connects_total", alias=name, peer="db1", outcome="success")
        for name in worlds
    }
    assert counted == {"shop": 0, "stock": 1}


# In the middle of anything


@contextlib.contextmanager
def in_the_middle(counter: Counter, function: Any) -> Iterator[None]:
    """Have ``function`` called while the value's lock is held, as by a finalizer or a signal."""
    lock = counter._value._lock  # type: ignore[attr-defined]

    class Lock:
        def __enter__(self) -> None:
            lock.acquire()
            function()

        def __exit__(self, *exc: object) -> None:
            lock.release()

    counter._value._lock = Lock()  # type: ignore[attr-defined]
    try:
        yield
    finally:
        counter._value._lock = lock  # type: ignore[attr-defined]


def successes(world: Watched) -> Any:
    return world.metrics._counted["connects"].labels("default", "db1", "success")


def test_thread_that_comes_by_again_does_not_wait_for_itself() -> None:
    """What happens while it is counted, in the same thread, is counted as well."""
    world = Watched("db1")
    depth: list[None] = []

    def once() -> None:
        if not depth:
            depth.append(None)
            world.connect()

    with in_the_middle(successes(world), once):
        world.connect()
    assert world.value("connects_total", peer="db1", outcome="success") == 2


def test_no_thread_waits_for_another() -> None:
    """A connect does not wait until another thread has counted."""
    world = Watched("db1")
    inside, go_on = threading.Event(), threading.Event()

    def stay() -> None:
        inside.set()
        assert go_on.wait(60)

    with in_the_middle(successes(world), stay), running(world.connect):
        assert inside.wait(60)
        world.connect()
        assert len(world.driver.made) == 2
        go_on.set()
    assert world.value("connects_total", peer="db1", outcome="success") == 2


def test_error_while_counting_is_not_the_connects() -> None:
    """It is logged; what comes next is counted."""
    world = Watched("db1")

    def fail() -> None:
        raise OSError(28, "No space left on device")

    lock = successes(world)._value._lock
    with in_the_middle(successes(world), fail):
        world.connect()
    lock.release()
    world.connect()
    assert world.value("connects_total", peer="db1", outcome="success") == 1


def test_counting_goes_on_though_somebody_was_killed_at_it(monkeypatch: Any) -> None:
    """A thread that is killed with the right to count does not keep it for ever."""
    monkeypatch.setattr("django_proxysql.monitoring.metrics._STUCK", 3)
    world = Watched("db1")
    assert world.metrics._counting.acquire()
    for _ in range(5):
        world.connect()
    assert world.value("connects_total", peer="db1", outcome="success") == 5


def test_threads_lose_no_count() -> None:
    world = Watched("db1")
    with running(*[lambda: [world.connect() for _ in range(200)]] * 8):
        pass
    assert world.value("connects_total", peer="db1", outcome="success") == 1600


FORK = """
    import os, signal, sys, threading
    from tests.test_metrics import Watched, in_the_middle, successes

    world = Watched("db1")
    inside, forking = threading.Event(), threading.Event()

    def stay():
        inside.set()
        assert forking.wait(60)

    # Runs before what was registered earlier.
    os.register_at_fork(before=forking.set)
    lock = successes(world)
    with in_the_middle(lock, stay):
        thread = threading.Thread(target=world.connect)
        thread.start()
        assert inside.wait(60)
        pid = os.fork()
    if not pid:
        signal.alarm(20)
        world.connect()
        kept = world.db.connect()
        print(world.value("connects_total", peer="db1", outcome="success"), end=" ")
        print(world.value("connections", peer="db1"), flush=True)
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0, "the child hangs"
    thread.join()
"""


def run(program: str, *, errors: bool = False, **environment: str) -> str:
    """Return what a program prints, in a process of its own; with ``errors`` on stderr as well."""
    environment["DJANGO_SETTINGS_MODULE"] = "tests.django_settings"
    done = run_python(program, PYTHONWARNINGS="ignore::DeprecationWarning", **environment)
    return done.stderr + done.stdout if errors else done.stdout


def test_fork_while_another_thread_counts() -> None:
    """The child inherits no lock that is held, and none of the parent's connections."""
    assert run("import django; django.setup()\n" + textwrap.dedent(FORK)) == "3.0 2.0\n"


# Processes


MULTIPROCESS = """
    import os, sys
    from prometheus_client import CollectorRegistry, generate_latest, multiprocess
    from tests.test_metrics import Watched

    def show():
        registry = CollectorRegistry()
        multiprocess.MultiProcessCollector(registry)
        def value(name, **labels):
            labels = {"alias": "default", "peer": "db1", **labels}
            return registry.get_sample_value(f"django_proxysql_{name}", labels)
        print(
            value("connects_total", outcome="success"),
            value("connections"),
            value("circuit_state", state="closed"),
            flush=True,
        )
    world = Watched("db1")
    kept = [world.db.connect() for _ in range(3)]
"""


def multiprocess(program: str, directory: Path) -> list[str]:
    text = textwrap.dedent(MULTIPROCESS) + textwrap.dedent(program)
    return run(
        "import django; django.setup()\n" + text, PROMETHEUS_MULTIPROC_DIR=str(directory)
    ).splitlines()


def test_processes_add_up(tmp_path: Path) -> None:
    """A forked child counts its own; the parent's connections stay the parent's."""
    assert multiprocess(
        """
        show()
        pid = os.fork()
        if not pid:
            more = world.db.connect()
            show()
            os._exit(0)
        os.waitpid(pid, 0)
        multiprocess.mark_process_dead(pid)
        show()
        """,
        tmp_path,
    ) == ["3.0 3.0 1.0", "4.0 4.0 2.0", "4.0 3.0 1.0"]


def test_closed_connections_are_seen_when_asked_for(tmp_path: Path) -> None:
    """A worker that serves no requests says when to look: Metrics.refresh()."""
    work = "world.driver.made.clear()\nkept.pop()\nshow()\nworld.metrics.refresh()\nshow()"
    assert multiprocess(work, tmp_path) == ["3.0 3.0 1.0", "3.0 2.0 1.0"]


def test_process_that_ends_takes_its_gauges_along(tmp_path: Path) -> None:
    """A command that ends leaves its counts; nothing has to mark it dead."""
    multiprocess("", tmp_path)
    assert multiprocess("show()", tmp_path) == ["6.0 3.0 1.0"]


def test_directory_that_is_not_there(monkeypatch: Any) -> None:
    """… is said at the start, and not by an error at each connect."""
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", "/nowhere/at/all")
    with pytest.raises(NotADirectoryError, match="/nowhere/at/all"):
        Watched("db1")


# Who asked for it


def from_the_docs(word: str) -> str:
    """Return the one block of Python on the docs' page that has the word in it."""
    page = ROOT / "docs" / "howto" / "prometheus.rst"
    (block,) = (block for block in blocks(page, "python") if word in block)
    return block


def test_example_without_django() -> None:
    """The docs' example runs as it is written, but for the servers, where there is no Django."""
    stand_ins = """
        import sqlite3
        import MySQLdb, prometheus_client
        MySQLdb.connect = lambda **params: sqlite3.connect(":memory:")
        prometheus_client.start_http_server = lambda port: None
        """
    look = """
        db.connect().close()
        print(prometheus_client.generate_latest().decode())
        """
    example = textwrap.dedent(stand_ins) + from_the_docs("Metrics(db)") + textwrap.dedent(look)
    made = r'django_proxysql_connects_total{alias="orders",outcome="success",peer="db."} 1\.0'
    assert re.search(made, without_django(example))


DJANGO = """
    import sys
    import django
    from django.conf import settings
    settings.configure(INSTALLED_APPS=["django_proxysql.monitoring.metrics"], DATABASES={
        "default": {
            "ENGINE": "django_proxysql.backends.proxysql",
            "PEER_ENGINE": "django.db.backends.sqlite3",
            "PEERS": [{"NAME": ":memory:"}],
        },
        "wrong": {"ENGINE": "django_proxysql.backends.proxysql", "PEERS": []},
    })
    django.setup()
"""


def with_app(program: str, **options: Any) -> str:
    """Return what a program prints whose Django has a load balancer, and the app."""
    return run(textwrap.dedent(DJANGO) + textwrap.dedent(program), **options)


def test_app() -> None:
    """One line in INSTALLED_APPS: all balancers are in prometheus_client's registry.

    One whose settings are wrong is no reason that the others are not.
    """
    text = with_app(
        """
        from django.db import connection
        import prometheus_client
        connection.ensure_connection()
        print(prometheus_client.generate_latest().decode())
        """
    )
    labels = '{alias="default",outcome="success",peer="peer0"}'
    assert f"django_proxysql_connects_total{labels} 1.0" in text
    assert 'django_proxysql_connections{alias="default",peer="peer0"} 1.0' in text


def test_site_is_served_though_nothing_can_be_counted() -> None:
    """Where the directory is missing, that is logged, and all else works."""
    said = with_app(
        """
        from django.apps import apps
        from django.core.signals import request_started
        from django.db import connection
        request_started.send(None)
        connection.ensure_connection()
        print(apps.get_app_config('django_proxysql_metrics').metrics)
        """,
        PROMETHEUS_MULTIPROC_DIR="/nowhere/at/all",
        errors=True,
    )
    assert "Nothing is counted for Prometheus: PROMETHEUS_MULTIPROC_DIR='/nowhere/at/all'" in said
    assert said.endswith("None\n")


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Celery is tested on Python 3.11 and later")
def test_example_of_a_celery_worker() -> None:
    """After a task the gauges are written, as the docs' receiver does it."""
    program = """
        from django.db import connection
        from prometheus_client import REGISTRY
        metrics = apps.get_app_config("django_proxysql_metrics").metrics
        connection.ensure_connection()
        connection._release()
        gauge = metrics._connections.labels("default", "peer0")
        print(gauge._value.get(), end=" ")
        task_postrun.send(None)
        print(gauge._value.get())
        """
    printed = with_app(from_the_docs("task_postrun") + textwrap.dedent(program))
    assert printed.endswith("1.0 0.0\n")


def test_app_that_is_made_ready_twice() -> None:
    """Tests that change INSTALLED_APPS do that to all apps."""
    printed = with_app(
        """
        from django.apps import apps
        from django.test import override_settings
        first = apps.get_app_config('django_proxysql_metrics')
        with override_settings(INSTALLED_APPS=settings.INSTALLED_APPS):
            second = apps.get_app_config('django_proxysql_metrics')
            print(second is first, second.metrics is first.metrics)
        """
    )
    assert printed.endswith("False True\n")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a process's metrics, to be copied."""
    folder = tmp_path_factory.mktemp("written")
    multiprocess("", folder)
    return folder


@pytest.mark.parametrize(
    "content", [b"", b"\0\0", b"\xff" * 16, b"\x40\0\0\0\0\0\0\0\x20\0\0\0cut"]
)
@pytest.mark.parametrize("kind", ["gauge_livesum", "counter", "histogram"])
def test_broken_file_is_left_out(
    tmp_path: Path, written: Path, caplog: pytest.LogCaptureFixture, content: bytes, kind: str
) -> None:
    """A file that a killed process has left empty, or a full disk cut off, harms no page."""
    shutil.copytree(written, tmp_path, dirs_exist_ok=True)
    broken = tmp_path / f"{kind}_1234567.db"
    broken.write_bytes(content)
    registry = CollectorRegistry()
    MultiProcessCollector(registry, path=str(tmp_path))
    for _ in range(3):
        page = generate_latest(registry).decode()
        assert "django_proxysql_connects_total" in page
    # What can be read as an empty file that is whole is read as that.
    lines = [line for line in caplog.messages if str(broken) in line]
    assert len(lines) <= 1
    if not content:
        assert len(lines) == 1
    broken.unlink()
    assert generate_latest(registry).decode() == page


def test_what_a_thread_has_begun_to_write_is_written(tmp_path: Path) -> None:
    """A process ends after that, and begins to write nothing more: it leaves no half of a file."""
    run(
        """
        import django, os, threading, time
        django.setup()
        from prometheus_client import values
        from tests.test_metrics import Watched

        class Slow(values.MmapedDict):
            def __init__(self, filename, *args):
                # A process that is cut off between open() and truncate() leaves this.
                open(filename, "ab").close()
                begun.set()
                time.sleep(0.3)
                super().__init__(filename, *args)

        begun = threading.Event()
        values.MmapedDict = Slow
        world = Watched("db1")
        threading.Thread(target=world.db.connect, daemon=True).start()
        assert begun.wait(60)
        """,
        PROMETHEUS_MULTIPROC_DIR=str(tmp_path),
    )
    sizes = {file.name: file.stat().st_size for file in tmp_path.iterdir()}
    assert sizes
    assert all(sizes.values()), sizes
