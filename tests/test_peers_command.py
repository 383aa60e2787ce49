"""``manage.py peers``: what it prints, how it ends, what it refuses."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import signal
import socket
import subprocess
import textwrap
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from django.core.management import CommandError, call_command
from django.db import close_old_connections

from django_proxysql import balancers
from django_proxysql.conf.keys import ENGINE
from django_proxysql.inspection import Inspection
from tests.engine import MYSQL, SQLITE, added, engine, mysql_peer, sqlite_peer
from tests.project import ROOT, Project
from tests.servers import PASSWORD
from tests.servers.mariadb import Node
from tests.servers.redis import RedisServer


def peers(*args: str, status: int = 0, **options: Any) -> str:
    """Return what the command prints, if it ends with ``status``."""
    out = io.StringIO()
    if status:
        with pytest.raises(SystemExit) as ended:
            call_command("peers", *args, stdout=out, **options)
        assert ended.value.code == status
    else:
        call_command("peers", *args, stdout=out, **options)
    return out.getvalue()


def refused(*args: str, **options: Any) -> str:
    """Return what the command complains of."""
    with pytest.raises(CommandError) as complaint:
        call_command("peers", *args, stdout=io.StringIO(), **options)
    return str(complaint.value)


def sqlite_peers(folder: Path, *names: str) -> list[dict[str, Any]]:
    return [sqlite_peer(folder / name) for name in names]


DOWN = "nowhere/at/all"


@contextmanager
def balanced(folder: Path, *names: str, beside: Sequence[str] = ()) -> Iterator[None]:
    """A balancer over these files; and one named ``reports`` over those ``beside``."""
    entry = {"ENGINE": ENGINE, "PEER_ENGINE": SQLITE, "PEERS": sqlite_peers(folder, *beside)}
    with (
        engine(sqlite_peers(folder, *names), PEER_ENGINE=SQLITE),
        added({"reports": entry} if beside else {}),
    ):
        yield


# What it shows


def test_table(mariadb_pair: tuple[Node, Node]) -> None:
    """A verdict, a line a peer within 80 columns, and what is wrong; no password."""
    mariadb_pair[1].kill()
    with engine([mysql_peer(node) for node in mariadb_pair], alias="default"):
        printed = peers(status=1)
    verdict, heading, alive, dead, why = printed.splitlines()
    assert verdict == "WARNING: default: peer1 down"
    assert heading.split() == ["ALIAS", "PEER", "ADDRESS", "UP", "LATENCY", "SERVER", "READY"]
    port = mariadb_pair[0].port
    assert re.fullmatch(
        rf"default  peer0  127\.0\.0\.1:{port} +yes  [\d.]+ ms +MariaDB [\d.]+  yes",
        alive,
    )
    assert dead.split() == [
        *("default", "peer1", f"127.0.0.1:{mariadb_pair[1].port}", "no", "-", "-", "no")
    ]
    assert why.startswith("default: peer1: (2002, ")
    assert max(map(len, (verdict, heading, alive, dead))) <= 80
    assert PASSWORD not in printed


def test_none_left(tmp_path: Path) -> None:
    """One balancer without a peer outweighs all that is well."""
    with balanced(tmp_path, "a", "b", beside=[DOWN]):
        printed = peers(status=2)
        assert printed.startswith("CRITICAL: balanced: all well; reports: no peer can be used\n")
        assert peers("balanced").startswith("OK: balanced: all well\n")
        assert peers("balanced", "balanced").count("peer0") == 1


def test_json(tmp_path: Path) -> None:
    """The form that is promised."""
    with balanced(tmp_path, "a", DOWN):
        seen = json.loads(peers("--json", status=1))
    assert time.time() - 3600 < seen.pop("time") <= time.time()
    one, other = seen["balancers"][0].pop("peers")
    assert seen == {
        "status": "warning",
        "exit_code": 1,
        "balancers": [
            {
                "alias": "balanced",
                "status": "warning",
                "shared": False,
                "processes": None,
                "warnings": [],
            }
        ],
    }
    assert 0 < one.pop("latency") < 60
    assert one.pop("version").startswith("SQLite 3.")
    both = {"notes": [], "circuit": None, "drained": None, "connections": None}
    assert one == {
        **both,
        "peer": "peer0",
        "address": str(tmp_path / "a"),
        "reachable": True,
        "ready": True,
        "error": "",
        "fault": None,
    }
    assert other == {
        **both,
        "peer": "peer1",
        "address": str(tmp_path / DOWN),
        "reachable": False,
        "latency": None,
        "version": "",
        "ready": False,
        "error": "unable to open database file",
        "fault": "unreachable",
    }


def test_timeout(mariadb: Node, fault_proxy: Any) -> None:
    """--timeout bounds a peer that says nothing."""
    silent = fault_proxy(mariadb)
    silent.accept_and_hang()
    with engine([mysql_peer(silent)], CONNECT_TIMEOUT=600):
        assert "down" not in peers("--timeout", "1", status=2)


def in_the_docs(alias: str, number: int, version: str = "MariaDB 10.11.14", **given: Any) -> Any:
    """Return what a peer of the pages' examples answers."""
    fields = {"reachable": True, "latency": 0.0031, "ready": True, "notes": (), "error": ""}
    where = f"10.0.0.{number + 1}:3306"
    return Inspection(
        alias=alias,
        version=version,
        fault=None,
        **{"peer": f"peer{number}", "address": where, **fields, **given},
    )


EXAMPLES = {
    "README.rst": {
        "default": [
            in_the_docs("default", 0, address="10.0.0.1"),
            in_the_docs(
                "default",
                1,
                address="10.0.0.2",
                version="",
                reachable=False,
                latency=None,
                ready=False,
                error="(2002, \"Can't connect to server on '10.0.0.2' (115)\")",
            ),
        ]
    },
    "docs/reference/commands.rst": {
        "default": [
            in_the_docs("default", 0, notes=("Galera: Synced",)),
            in_the_docs(
                "default",
                1,
                latency=0.0029,
                ready=False,
                notes=("Galera: Initialized",),
                error="wsrep_ready is OFF",
            ),
            in_the_docs("default", 2, latency=0.0034, notes=("Galera: Synced",)),
        ],
        "reports": [
            in_the_docs("reports", 0, address="10.0.0.9:3306", latency=0.0038, notes=("read-only",))
        ],
    },
}


@pytest.mark.skipif(not (ROOT / "docs").exists(), reason="the docs are not here")
@pytest.mark.parametrize("page", EXAMPLES)
def test_examples_in_the_docs(page: str) -> None:
    """What the pages show is what is printed, to the letter."""
    text = (ROOT / page).read_text(encoding="utf-8")
    (shown,) = re.findall(r"^    \$ python manage.py peers\n((?:    .+\n)+)", text, re.M)
    answers = EXAMPLES[page]
    entries = {alias: {"ENGINE": ENGINE, "PEERS": [{"HOST": "x"}]} for alias in answers}
    with (
        added(entries),
        mock.patch("django_proxysql.management.look.inspect", return_value=answers),
    ):
        assert peers(status=1) == textwrap.dedent(shown)


# What it refuses


NO_PEER = "%r is no peer. Nothing was changed. Peers: balanced: peer0, peer1."
NO_DRAIN = "--force is for --drain, which is not given. Nothing was changed."
LOOKING = "are for looking"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nonesuch"], "'nonesuch' is no alias. Load balancers: balanced."),
        # Another entry of DATABASES.
        (["default"], "'default' is no load balancer. Load balancers: balanced."),
        (["--drain", "peer7"], NO_PEER % "peer7"),
        # A variable that is not set: ``peers --drain "$PEER" && stop`` stops nothing.
        *((["--drain", ""], NO_PEER % ""), (["--drain="], NO_PEER % "")),
        *((["--undrain", ""], NO_PEER % ""), (["--undrain="], NO_PEER % "")),
        # An operator who forces something is to know that nothing was drained.
        *((["--force"], NO_DRAIN), (["--force", "--undrain", "peer0"], NO_DRAIN)),
        # One thing at a time.
        (["--drain", "peer0", "--json"], LOOKING),
        (["--drain", "peer0", "--watch", "1"], LOOKING),
    ],
)
def test_what_is_refused(tmp_path: Path, arguments: list[str], says: str) -> None:
    """With what there is to choose from."""
    with balanced(tmp_path, "a", "b"):
        said = refused(*arguments)
    assert says in said if says is LOOKING else says == said


@pytest.mark.parametrize("option", ["--watch", "--wait", "--timeout"])
@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf", "1e10", "soon"])
def test_seconds_that_no_clock_has(tmp_path: Path, option: str, seconds: str) -> None:
    with balanced(tmp_path, "a"):
        assert f"argument {option}: invalid number of seconds" in refused(f"{option}={seconds}")


def test_a_time_out_longer_than_any_wait(tmp_path: Path) -> None:
    with engine(sqlite_peers(tmp_path, "a"), PEER_ENGINE=SQLITE, CONNECT_TIMEOUT=1e10):
        assert peers().startswith("OK: ")


def test_no_balancers() -> None:
    """A project without any gets an error that says so."""
    assert refused().startswith("No entry of DATABASES is a load balancer")


def test_wrong_settings() -> None:
    """The message that the checks have, too."""
    with engine([{"HOST": "a,b", "PASSWORD": PASSWORD}]):
        said = refused()
    assert said.startswith("DATABASES['balanced']: HOST of peer PEERS[0] has a comma in it.")


@pytest.mark.parametrize("option", ["--drain", "--undrain"])
def test_drain_unshared(tmp_path: Path, option: str) -> None:
    """Without shared state it would reach no process: that is said, and nothing is done."""
    with balanced(tmp_path, "a", "b"):
        said = refused(option, "peer0")
        assert "'balanced' shares no state (it has no SHARED_STATE)" in said
        assert "Nothing was changed." in said
        assert not balancers["balanced"].peers["peer0"].drained
    if option == "--drain":
        page = ROOT / "docs" / "howto" / "upgrade.rst"
        (shown,) = re.findall(r"CommandError: (.*)", page.read_text(encoding="utf-8"))
        assert said.replace("balanced", "default") == shown


def test_drain_of_whose(tmp_path: Path) -> None:
    """A name that two balancers have is asked about."""
    with balanced(tmp_path, "a", "b", beside=["a"]):
        said = refused("--drain", "peer0")
        assert said == (
            "'peer0' is a peer of 'balanced' and of 'reports'. Nothing was changed. "
            "Say whose you mean: peers balanced --drain peer0"
        )
        assert "shares no state" in refused("reports", "--drain", "peer0")


# As a process


#: The machine may be so busy that Redis takes its time.
PATIENT = """
from django_proxysql.core.sharing import Sharing, url
url.TIMEOUT = 30
Sharing.settle.__defaults__ = (30,)
"""


class Command(Project):
    """``manage.py peers`` of a project with nothing but a balancer."""

    def __init__(self, root: Path, entry: dict[str, Any], alias: str = "default") -> None:
        databases = {"default": {"ENGINE": SQLITE, "NAME": ":memory:"}, alias: entry}
        settings = (
            "SECRET_KEY = 'for tests only'\n"
            "USE_TZ = True\n"
            "INSTALLED_APPS = ['django_proxysql']\n"
            f"DATABASES = {databases!r}\n"
            f"{PATIENT if 'SHARED_STATE' in entry else ''}"
        )
        super().__init__(root, {"settings.py": settings})

    def start(self, *args: str, **kwargs: Any) -> subprocess.Popen[str]:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **kwargs}
        return self.run("-W", "error", "manage.py", "peers", *args, **pipes)

    def ended(self, *args: str) -> tuple[int, str, str]:
        """Return its exit code, and what it has printed."""
        process = self.start(*args)
        out, err = process.communicate(timeout=60)
        assert PASSWORD not in out + err
        return process.returncode, out, err


@pytest.fixture
def project(tmp_path: Path) -> Command:
    """One peer of two is down."""
    entry = {
        "ENGINE": ENGINE,
        "PEER_ENGINE": SQLITE,
        "PASSWORD": PASSWORD,
        "PEERS": sqlite_peers(tmp_path, "a", DOWN),
    }
    return Command(tmp_path, entry)


def test_exit_codes(project: Command) -> None:
    """Verdicts have 0 to 2; whatever is none has 3."""
    code, out, err = project.ended("-v", "3", "--traceback")
    assert (code, err) == (1, "")
    assert out.startswith("WARNING: default: peer1 down\n")
    for args in ("nonesuch", "nonesuch --traceback", "--no-such-option", "--watch soon"):
        code, out, err = project.ended(*args.split())
        assert (code, out) == (3, "")
        assert err
    assert project.ended("--help")[0] == 0


def test_all_down(tmp_path: Path) -> None:
    """It needs no peer that is up, and works where checks would fail."""
    peer = {"HOST": "127.0.0.1", "PORT": 1, "USER": "app", "PASSWORD": PASSWORD}
    entry = {"ENGINE": ENGINE, "PEER_ENGINE": MYSQL, "PEERS": [peer]}
    code, out, err = Command(tmp_path, entry).ended("-v", "3", "--traceback")
    assert (code, err) == (2, "")
    assert "default: peer0: (2002, " in out


def pipe_without_reader() -> int:
    """Return the end that is written to."""
    reader, writer = os.pipe()
    os.close(reader)
    return writer


@pytest.mark.parametrize("watch", [[], ["--watch", "0.01"]])
def test_broken_pipe(project: Command, watch: list[str]) -> None:
    """A reader that stops gets no complaint."""
    writer = pipe_without_reader()
    process = project.start(*watch, stdout=writer)
    os.close(writer)
    _, err = process.communicate(timeout=60)
    assert err == ""


def test_what_the_terminal_cannot_write_is_escaped(tmp_path: Path) -> None:
    """An address or an error in another character set is no reason for having no verdict."""
    entry = {"ENGINE": ENGINE, "PEER_ENGINE": SQLITE, "PEERS": sqlite_peers(tmp_path, "caf\u00e9")}
    process = Command(tmp_path, entry).start(environment={"PYTHONIOENCODING": "ascii"})
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    assert "/caf\\xe9  yes" in out


@pytest.mark.parametrize(("command", "status"), [("--wait 0.01", 2), ("nonesuch", 3)])
@pytest.mark.parametrize("full", [False, True], ids=["reader has left", "disk is full"])
def test_errors_that_cannot_be_written_are_no_verdict(
    tmp_path: Path, command: str, status: int, full: bool
) -> None:
    """``peers --wait 60 && manage.py migrate`` goes on only if there is a peer."""
    if full and not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    entry = {"ENGINE": ENGINE, "PEER_ENGINE": SQLITE, "PEERS": sqlite_peers(tmp_path, DOWN)}
    writer = os.open("/dev/full", os.O_WRONLY) if full else pipe_without_reader()
    process = Command(tmp_path, entry).start(*command.split(), stderr=writer)
    os.close(writer)
    process.communicate(timeout=60)
    assert process.returncode == status


# Processes that share what they know


class Serving:
    """This process as one that serves requests, and a project whose command it applies."""

    def __init__(self, root: Path, url: str, stack: ExitStack) -> None:
        settings = {"PEER_ENGINE": SQLITE, "SHARED_STATE": url}
        peers = sqlite_peers(root, "a", DOWN)
        # The first is chosen before the second.
        peers[1]["PRIORITY"] = 1
        self.down = root / DOWN
        self.connection = stack.enter_context(engine(peers, **settings))
        self.balancer = balancers["balanced"]
        self.project = Command(root, {"ENGINE": ENGINE, "PEERS": peers, **settings}, "balanced")

    def command(self, *args: str) -> tuple[int, str, str]:
        """Run it; afterwards this process knows what it has told."""
        done = self.project.ended(*args)
        self.balancer.sharing.settle(20)
        return done

    def drained(self) -> list[str]:
        return [state.name for state in self.balancer.snapshot() if state.drained]


@pytest.fixture
def serving(tmp_path: Path, redis_server: RedisServer) -> Iterator[Serving]:
    with ExitStack() as stack:
        yield Serving(tmp_path, redis_server.url, stack)


def test_drain(serving: Serving) -> None:
    """All processes apply it, and its end; connections leave at their safe points."""
    serving.down.parent.mkdir(parents=True)
    serving.connection.ensure_connection()
    assert serving.connection.peer.name == "peer0"
    serving.balancer.sharing.settle(20)
    said = "balanced: peer0 is drained. Connections that are to leave it: 1.\n"
    assert serving.command("--drain", "peer0") == (0, said, "")
    assert serving.drained() == ["peer0"]
    close_old_connections()
    serving.connection.ensure_connection()
    assert serving.connection.peer.name == "peer1"
    said = "balanced: peer0 is drained no longer.\n"
    assert serving.command("--undrain", "peer0") == (0, said, "")
    assert serving.drained() == []


def test_drain_whose_reader_has_left(serving: Serving) -> None:
    """It is done, and no complaint says otherwise."""
    for command, drained in (("--drain", ["peer1"]), ("--undrain", [])):
        writer = pipe_without_reader()
        buffered = {"PYTHONUNBUFFERED": "" if drained else "1"}
        process = serving.project.start(command, "peer1", stdout=writer, environment=buffered)
        os.close(writer)
        _, err = process.communicate(timeout=60)
        assert (process.returncode, err) == (0, "")
        serving.balancer.sharing.settle(20)
        assert serving.drained() == drained


def test_last_usable_peer(serving: Serving) -> None:
    """It is asked who else there is; the last is drained by force only."""
    said = (
        "CommandError: 'peer0' is the last peer of 'balanced' that can be used: peer1 is down. "
        "Nothing was changed. --force drains it all the same.\n"
    )
    assert serving.command("--drain", "peer0") == (3, "", said)
    assert serving.drained() == []
    assert serving.command("--drain", "peer0", "--force")[0] == 0
    assert serving.drained() == ["peer0"]
    # What is drained already is drained.
    assert serving.command("--drain", "peer0")[0] == 0


def test_look_at_what_is_shared(serving: Serving) -> None:
    """The table has what the processes know: circuits, drains, connections."""
    serving.down.parent.mkdir(parents=True)
    serving.connection.ensure_connection()
    serving.balancer.peers["peer0"].breaker.open()
    serving.balancer.drain("peer1", force=True)
    code, out, err = serving.command()
    # The circuit is open, and yet the peer is well, as far as the command can see.
    assert (code, err) == (0, "")
    verdict, heading, first, second = out.splitlines()
    assert verdict == "OK: balanced: all well, peer1 drained"
    assert heading.split()[-3:] == ["CIRCUIT", "DRAINED", "CONNS"]
    assert first.split()[-3:] == ["open", "no", "1"]
    assert second.split()[-3:] == ["closed", "yes", "0"]
    (seen,) = json.loads(serving.command("--json")[1])["balancers"]
    assert seen["shared"]
    # A process that has ended is counted for five seconds: the command before.
    assert seen["processes"] in (1, 2)
    assert [(p["circuit"], p["drained"], p["connections"]) for p in seen["peers"]] == [
        ("open", False, 1),
        ("closed", True, 0),
    ]


def test_drained_peer_is_not_down(serving: Serving) -> None:
    """What an operator has taken out is no alarm, but cannot be used either.

    A process refuses another's drain of its last peer: there peer1 counts as down.
    """
    serving.balancer.drain("peer1", force=True)
    verdict = "OK: balanced: all well, peer1 drained\n"
    assert serving.command("-v", "0")[:2] == (0, verdict)
    serving.balancer.drain("peer0", force=True)
    verdict = "CRITICAL: balanced: no peer can be used, peer0 drained\n"
    assert serving.command("-v", "0")[:2] == (2, verdict)


def test_redis_down(serving: Serving, redis_server: RedisServer) -> None:
    """Peers are looked at all the same; a drain is refused, for no process would apply it."""
    redis_server.kill()
    code, out, _ = serving.project.ended()
    assert code == 1
    assert "balanced: what the other processes know is unknown: Redis does not answer\n" in out
    code, out, err = serving.project.ended("--drain", "peer0")
    assert (code, out) == (3, "")
    assert "does not answer: the processes cannot be reached. Nothing was changed." in err
    assert serving.drained() == []


def read_until(descriptor: int, pattern: str) -> str:
    """Return what comes, up to and with what matches."""
    text = ""
    while not re.search(pattern, text):
        assert select.select([descriptor], [], [], 60)[0], text
        try:
            text += os.read(descriptor, 65536).decode()
        except OSError:  # Linux's way of saying that the other end is closed
            raise AssertionError(text) from None
    return text


def test_watch(project: Command) -> None:
    """Look after look, each with its time; Ctrl-C ends it with the last look's exit code."""
    process = project.start("--watch", "0.05")
    text = read_until(process.stdout.fileno(), r"(?s)(WARNING.*){3}")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (1, "")
    assert re.match(r"\d\d:\d\d:\d\d WARNING: default: peer1 down\nALIAS ", text)
    assert "\x1b" not in text + out


@pytest.mark.parametrize("watch", [[], ["--watch", "0.05"]])
def test_ctrl_c_before_there_is_a_verdict(tmp_path: Path, watch: list[str]) -> None:
    """130, as a shell has it, and no traceback: the peer that is silent is no mistake of ours."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        peer = {"HOST": "127.0.0.1", "PORT": silent.getsockname()[1]}
        entry = {"ENGINE": ENGINE, "PEER_ENGINE": MYSQL, "PEERS": [peer], "CONNECT_TIMEOUT": 60}
        process = Command(tmp_path, entry).start(*watch)
        with silent.accept()[0]:
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, "", "")


def test_watch_sees_a_recovery(project: Command) -> None:
    """The next look is a new one; JSON comes a line a look."""
    process = project.start("--watch", "0.05", "--json")
    read_until(process.stdout.fileno(), "\n")
    (project.root / DOWN).parent.mkdir(parents=True)
    read_until(process.stdout.fileno(), '"exit_code": 0')
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 0


def on_a_terminal(project: Command, *args: str, **environment: str) -> str:
    """Return what the command writes to a terminal."""
    ours, theirs = pty.openpty()
    variables = {"TERM": "xterm", **environment}
    process = project.start(*args, stdout=theirs, stderr=theirs, environment=variables)
    os.close(theirs)
    try:
        if "--watch" in args:
            text = read_until(ours, r"(?s)(READY.*){2}")
            process.send_signal(signal.SIGINT)
        else:
            text = read_until(ours, "unable to open database file")
        process.wait(60)
    finally:
        os.close(ours)
    return text


def test_colours(project: Command) -> None:
    """On a terminal, unless NO_COLOR or --no-color say otherwise; in a pipe if they are asked for.

    On a terminal each look takes the last one's place.
    """
    assert re.search(r"\x1b\[[\d;]*mWARNING: default: peer1 down", on_a_terminal(project))
    assert "\x1b" not in on_a_terminal(project, NO_COLOR="1")
    # https://no-color.org: an empty one says nothing.
    assert "\x1b" in on_a_terminal(project, NO_COLOR="")
    assert "\x1b" not in on_a_terminal(project, "--no-color")
    assert on_a_terminal(project, "--watch", "0.05").count("\x1b[H\x1b[J") >= 2
    assert "\x1b" not in project.ended()[1]
    assert "\x1b" in project.ended("--force-color")[1]


def test_drain_that_this_process_refuses_is_shown(
    serving: Serving, redis_server: RedisServer
) -> None:
    """Where all peers are drained by the word of others, the last one is not."""
    serving.down.parent.mkdir(parents=True)
    sharing = serving.balancer.sharing
    sharing.settle(20)
    drains = next(key for key in sharing.keys if key.endswith(":drains"))
    for field in sharing._fields.values():
        redis_server.ask("HSET", drains, field, '{"v":7,"on":true}')
    code, out, err = serving.command()
    assert code == 0
    # The log's warning.
    assert err.startswith("balanced: another process drained peer1")
    verdict, _, first, second, said = out.splitlines()
    assert verdict == "OK: balanced: all well, peer0 drained"
    assert [first.split()[-2], second.split()[-2]] == ["yes", "refused"]
    assert said.startswith("balanced: peer1: another process drained it, this one does not")
    assert serving.drained() == ["peer0"]
    (seen,) = json.loads(serving.command("--json")[1])["balancers"]
    assert [peer["notes"] for peer in seen["peers"]] == [[], ["drain refused"]]
