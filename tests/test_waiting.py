"""Waiting for a database that is not there yet: WAIT_FOR_PEER, and ``manage.py peers --wait``."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import pty
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable

import pytest
import tenacity
from django.core.management import CommandError, call_command

from django_proxysql import NoPeerAvailable
from django_proxysql.core.events import PeersExhausted
from django_proxysql.management.commands import peers
from tests.engine import SQLITE, engine, sqlite_peer
from tests.fakes import bad_password, raised_by, refused_by_host
from tests.test_balancer import World


class Waiting(World):
    """A balancer whose waits move its clock; a peer comes back at a moment."""

    def __init__(self, *names: str, back_at: float = float("inf"), **options: Any) -> None:
        self.slept: list[float] = []
        super().__init__(*names, sleep=self.sleep, **options)
        self.back_at = back_at
        for name in names:
            self.driver.down[name] = refused_by_host

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.clock.advance(seconds)
        if self.clock() >= self.back_at:
            self.driver.down.clear()


@pytest.mark.parametrize(
    ("options", "fails", "trials"),
    [
        ({}, refused_by_host, "first"),
        # A wrong password does not become right by waiting.
        ({"wait_for_peer": 60}, bad_password, "first"),
        # A replacement that is not needed.
        ({"wait_for_peer": 60}, refused_by_host, "never"),
    ],
)
def test_no_connect_waits_in_vain(options: dict[str, Any], fails: Any, trials: str) -> None:
    world = Waiting("db1", "db2", **options)
    world.driver.down.update(db1=fails, db2=fails)
    error = raised_by(lambda: world.db.connect(trials=trials))
    assert isinstance(error, NoPeerAvailable) is (fails is refused_by_host)
    assert world.slept == []


def test_connect_waits_until_a_peer_is_back() -> None:
    world = Waiting("db1", "db2", back_at=20, wait_for_peer=60)
    assert world.connect() in ("db1", "db2")
    assert 20 <= world.clock() < 20 + 2 + 1
    assert world.told(PeersExhausted) == []


@pytest.mark.parametrize(
    ("options", "waited"),
    [
        # The last look comes when the time is over.
        ({"wait_for_peer": 10}, 10),
        # tenacity's own objects are taken.
        ({"wait": tenacity.wait_fixed(3), "stop": tenacity.stop_after_attempt(4)}, 9),
        # It ends before a second look: the first one's exhaustion is emitted.
        ({"stop": tenacity.stop_after_attempt(1)}, 0),
    ],
)
def test_a_wait_in_vain_ends_in_time_and_is_one_exhaustion(
    options: dict[str, Any], waited: float
) -> None:
    world = Waiting("db1", **options)
    with pytest.raises(NoPeerAvailable):
        world.connect()
    assert world.clock() == sum(world.slept) == pytest.approx(waited)
    assert len(world.told(PeersExhausted)) == 1


def test_a_peer_that_is_back_at_the_last_moment_is_found() -> None:
    world = Waiting("db1", wait_for_peer=10, back_at=10, last_resort_interval=0)
    assert world.connect() == "db1"


def test_pauses_are_random_grow_and_end_at_two_seconds() -> None:
    world = Waiting("db1", wait_for_peer=300)
    with pytest.raises(NoPeerAvailable):
        world.connect()
    assert max(world.slept[:3]) <= 0.4
    assert 1 < max(world.slept) <= 2
    assert len(set(world.slept)) > 10


def test_requests_that_wait_write_one_line_a_second(caplog: pytest.LogCaptureFixture) -> None:
    world = Waiting("db1", stop=tenacity.stop_after_attempt(1))
    for _ in range(5):
        with pytest.raises(NoPeerAvailable):
            world.connect()
    world.clock.advance(1)
    with pytest.raises(NoPeerAvailable):
        world.connect()
    first, second = [text for text in caplog.messages if "waiting for a peer" in text]
    assert "waiting for a peer: No peer" in first
    assert "waiting for a peer (and 4 more): No peer" in second


def test_ctrl_c_ends_the_wait_at_once() -> None:
    def interrupted(seconds: float) -> None:
        raise KeyboardInterrupt

    world = World("db1", wait_for_peer=60, sleep=interrupted)
    world.driver.down["db1"] = refused_by_host
    with pytest.raises(KeyboardInterrupt):
        world.connect()
    assert len(world.driver.calls) == 1
    world.driver.down.clear()
    assert world.db.peers["db1"].breaker.acquire(last_resort=0) is not None


def test_a_wait_is_logged_with_what_it_waits_for(caplog: pytest.LogCaptureFixture) -> None:
    world = Waiting("db1", wait_for_peer=60, back_at=5)
    with caplog.at_level(logging.WARNING, "django_proxysql"):
        world.connect()
    said = [r.getMessage() for r in caplog.records if "waiting for a peer" in r.getMessage()]
    assert len(said) == 1
    assert said[0].startswith("default: waiting for a peer, at most 60 s: No peer of 'default'")


# manage.py peers --wait


class Command:
    """``peers --wait``, on a clock that its own pauses move."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: float, then: Callable[[], Any]) -> None:
        self.now = 0.0
        self.at, self.then = at, then
        self.out, self.err = io.StringIO(), io.StringIO()
        monkeypatch.setattr(peers.Command, "clock", lambda command: self.now)
        monkeypatch.setattr(peers.Command, "sleep", lambda command, seconds: self.sleep(seconds))

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        if self.now >= self.at:
            self.then()

    def run(self, *args: str, **options: Any) -> int:
        """Run the command; return its exit code."""
        try:
            call_command("peers", *args, stdout=self.out, stderr=self.err, **options)
        except SystemExit as ended:
            return int(str(ended.code))
        return 0


def test_the_command_waits_until_a_peer_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = tmp_path / "late"
    command = Command(monkeypatch, 5, lambda: late.mkdir(exist_ok=True))
    with engine([sqlite_peer(late / "db"), sqlite_peer(late / "db")], PEER_ENGINE=SQLITE):
        assert command.run("--wait", "60") == 0
    assert 5 <= command.now < 7
    assert command.out.getvalue().startswith("OK: balanced: all well\n")
    # Nothing else is waited for meanwhile: no line is said twice.
    (line,) = command.err.getvalue().splitlines()
    assert line.startswith("waiting for balanced, at most 60 s: peer0: unable to open")


@pytest.mark.parametrize("option", [(), ("--json",)], ids=str)
def test_one_usable_peer_is_enough_for_exit_code_0(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: tuple[str, ...]
) -> None:
    command = Command(monkeypatch, 0, lambda: None)
    with engine(
        [sqlite_peer(tmp_path / "a"), sqlite_peer(tmp_path / "no" / "b")], PEER_ENGINE=SQLITE
    ):
        assert command.run("--wait", "60", *option) == 0
    assert command.now == 0
    if option:
        said = json.loads(command.out.getvalue())
        assert (said["status"], said["exit_code"]) == ("warning", 0)
    else:
        assert command.out.getvalue().startswith("WARNING: balanced: peer1 down\n")


def test_the_command_ends_with_2_when_the_time_is_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = Command(monkeypatch, 1e9, lambda: None)
    with engine([sqlite_peer(tmp_path / "no" / "a")], PEER_ENGINE=SQLITE):
        assert command.run("--wait", "10", verbosity=0) == 2
    assert command.now == 10
    assert command.out.getvalue() == "CRITICAL: balanced: no peer can be used\n"
    assert command.err.getvalue() == ""


@pytest.mark.parametrize("other", [("--watch", "1"), ("--drain", "peer0"), ("--undrain", "peer0")])
def test_waiting_goes_with_neither_watching_nor_draining(
    tmp_path: Path, other: tuple[str, ...]
) -> None:
    with (
        engine([sqlite_peer(tmp_path / "a")], PEER_ENGINE=SQLITE),
        pytest.raises(CommandError, match="--wait goes with neither"),
    ):
        call_command("peers", "--wait", "5", *other)


SITE = """
from django.conf import settings
settings.configure(INSTALLED_APPS=["django_proxysql"], DATABASES={"default": {
    "ENGINE": "django_proxysql.backends.proxysql", "PEER_ENGINE": "django.db.backends.sqlite3",
    "PEERS": [{"NAME": "/no/such/folder/db"}]}})
import django
django.setup()
from django.core.management import execute_from_command_line
execute_from_command_line(["manage.py", "peers", "--wait", "60"])
"""


def test_ctrl_c_ends_the_command_with_130_and_no_traceback() -> None:
    """On a terminal, where one line is renewed."""
    terminal, end = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", SITE],
        cwd=Path(__file__).parent.parent,
        stdout=end,
        stderr=end,
        start_new_session=True,
    )
    os.close(end)
    seen = ""
    with contextlib.suppress(OSError):
        while seen.count("s left") < 2:
            seen += os.read(terminal, 1000).decode()
        process.send_signal(signal.SIGINT)
        while text := os.read(terminal, 1000).decode():
            seen += text
    os.close(terminal)
    assert process.wait(60) == 130
    assert re.search(r"\r\x1b\[Kwaiting for default, \d+ s left: peer0: unable to open", seen)
    assert "Traceback" not in seen
    assert seen.endswith("\r\x1b[K")
