"""Django's signals for what happens to peers: what they say, and that receivers do no harm."""

from __future__ import annotations

import asyncio
import dataclasses
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import django
import pytest
from django.db import OperationalError, connections

from django_proxysql import Fault, NoPeerAvailable, balancers, signals
from django_proxysql.core import events
from django_proxysql.core.trials import trial_worker
from tests.children import run_python
from tests.engine import SQLITE, Clock, engine, rows_of, sqlite_peer
from tests.fakes import in_thread, lock_is_free, running, until
from tests.servers.faultproxy import FaultProxy
from tests.site import Site, site

ROOT = Path(__file__).parent.parent


class Peers:
    """A balancer over two SQLite files; a peer is down while its file's folder is missing."""

    def __init__(self, root: Path, stack: ExitStack, **options: Any) -> None:
        self.clock = Clock()
        self.folders = [root / "peer0", root / "peer1"]
        peers = [
            sqlite_peer(folder / "db", PRIORITY=priority)
            for priority, folder in enumerate(self.folders)
        ]
        self.connection = stack.enter_context(
            engine(
                peers, PEER_ENGINE=SQLITE, clock=self.clock, LAST_RESORT_INTERVAL=None, **options
            )
        )
        self.balancer = balancers["balanced"]
        for folder in self.folders:
            folder.mkdir()

    def fail(self, number: int) -> None:
        self.folders[number].rename(self.folders[number].with_suffix(".away"))

    def restore(self, number: int) -> None:
        self.folders[number].with_suffix(".away").rename(self.folders[number])

    def connect(self) -> str:
        """Return the name of the peer that a new connection of this thread leads to."""
        connection = connections["balanced"]
        connection.close()
        connection.ensure_connection()
        return str(connection.peer.name)


@pytest.fixture
def peers(tmp_path: Path) -> Iterator[Peers]:
    with ExitStack() as stack:
        yield Peers(tmp_path, stack)


# What they say


def test_circuits(peers: Peers, receive: Callable[..., Any]) -> None:
    """A peer that fails and recovers: each signal with its event's fields, and the event."""
    failed, opened, closed = map(
        receive, (signals.peer_failed, signals.peer_opened, signals.peer_closed)
    )
    peers.fail(0)
    assert peers.connect() == "peer1"
    (sent,) = failed
    assert isinstance(sent["event"], events.ConnectFailed)
    assert sent == {
        "signal": signals.peer_failed,
        "sender": peers.balancer,
        "alias": "balanced",
        "peer": "peer0",
        "address": str(peers.folders[0] / "db"),
        "seconds": 0.0,
        "trial": False,
        "fault": Fault.UNREACHABLE,
        "error": "unable to open database file",
        "count": 1,
        "opened": True,
        "event": sent["event"],
    }
    (sent,) = opened
    assert (sent["sender"], sent["alias"], sent["peer"]) == (peers.balancer, "balanced", "peer0")
    assert (sent["fault"], sent["error"]) == (Fault.UNREACHABLE, "unable to open database file")
    assert sent["trial_in"] == 30
    peers.restore(0)
    peers.clock.advance(31)
    assert peers.connect() == "peer0"
    (sent,) = closed
    assert (sent["peer"], sent["seconds"]) == ("peer0", 31)
    assert len(failed) == len(opened) == 1


def test_exhausted(peers: Peers, receive: Callable[..., Any]) -> None:
    """A connect() that finds no peer."""
    told = receive(signals.peers_exhausted)
    peers.fail(0)
    peers.fail(1)
    with pytest.raises(NoPeerAvailable) as raised:
        peers.connect()
    (sent,) = told
    assert (sent["alias"], sent["error"]) == ("balanced", str(raised.value))
    assert "peer" not in sent


def test_established(here: Site, receive: Callable[..., Any]) -> None:
    """A connection that is lost, and a statement that is run again."""
    lost, replayed = map(receive, (signals.connection_lost, signals.statement_replayed))
    name = here.connection.peer.name
    here.cut("after")
    here.read()
    (sent,) = lost
    assert (sent["alias"], sent["peer"], sent["idle"]) == ("balanced", name, False)
    assert sent["fault"] is Fault.LOST
    (sent,) = replayed
    assert (sent["peer"], sent["successor"]) == (name, here.connection.peer.name)
    assert sent["error"]


def test_no_field_hides_an_argument_of_a_signals_own() -> None:
    for kind in signals._SIGNALS:
        names = {field.name for field in dataclasses.fields(kind)}
        assert "balancer" in names
        assert names.isdisjoint({"alias", "event", "sender", "signal"})


PAGE = ROOT / "docs/reference/signals.rst"


@pytest.mark.skipif(not PAGE.exists(), reason="the docs are not here")
def test_arguments_are_documented() -> None:
    """Each signal's row on the page has all of its arguments, and no other."""
    rows = re.split(r"^(?=``\w+`` +an? )", PAGE.read_text(encoding="utf-8"), flags=re.M)
    told = {}
    for row in rows[1:]:
        name, *arguments = re.findall(r"``(\w+)``", row.partition("\n=")[0])
        told[name] = set(arguments)
    for kind, signal in signals._SIGNALS.items():
        (name,) = (n for n in signals.__all__ if getattr(signals, n) is signal)
        fields = {field.name for field in dataclasses.fields(kind)} - {"balancer"}
        assert told.pop(name) == fields
    assert told == {}


def test_sender(peers: Peers, receive: Callable[..., Any], tmp_path: Path) -> None:
    """One balancer's signals alone, by its object."""
    with engine([sqlite_peer(tmp_path / "no/db")], alias="reports", PEER_ENGINE=SQLITE) as other:
        theirs = receive(signals.peer_opened, sender=balancers["reports"])
        everybodys = receive(signals.peer_opened)
        with pytest.raises(NoPeerAvailable):
            other.ensure_connection()
        balancers["balanced"]
        peers.fail(0)
        peers.connect()
        assert [sent["alias"] for sent in theirs] == ["reports"]
        assert [sent["alias"] for sent in everybodys] == ["reports", "balanced"]


def test_costs_nothing_before() -> None:
    """Nothing listens before the first receiver; connects that succeed send no signal."""
    program = """
        import tests.django_settings
        import os
        os.environ["DJANGO_SETTINGS_MODULE"] = "tests.django_settings"
        import django
        django.setup()
        from django_proxysql import balancers, signals
        assert balancers._listeners == ()
        for _ in range(2):
            signals.peer_opened.connect(print)
            signals.peer_closed.connect(print)
        assert [connects for _, connects in balancers._listeners] == [False]
    """
    run_python(program)


@pytest.mark.skipif(django.VERSION < (5, 0), reason="receivers may be async from Django 5.0 on")
def test_async_receiver(peers: Peers, receive: Callable[..., Any]) -> None:
    """A receiver may be a coroutine function."""
    told: list[str] = []

    async def note(peer: str, **kwargs: Any) -> None:
        told.append(peer)

    receive(signals.peer_opened, note)
    peers.fail(0)
    assert peers.connect() == "peer1"
    assert told == ["peer0"]


def test_of_an_event_loop_is_sent_by_a_thread(peers: Peers, receive: Callable[..., Any]) -> None:
    """There a receiver may use the database, and may be a coroutine function."""
    told: list[Any] = []
    breaker = peers.balancer.peers["peer0"].breaker

    def note(peer: str, **kwargs: Any) -> None:
        told.append((peer, rows_of(connections["balanced"], "SELECT 1")))

    async def note_later(peer: str, **kwargs: Any) -> None:
        told.append(peer)

    async def scene() -> None:
        with pytest.raises(ConnectionRefusedError):
            async with breaker.calling_async():
                raise ConnectionRefusedError

    receive(signals.peer_opened, note)
    if django.VERSION >= (5, 0):
        receive(signals.peer_opened, note_later)
    asyncio.run(scene())
    until(lambda: len(told) == 1 + (django.VERSION >= (5, 0)))
    assert told[0] == ("peer0", [(1,)])


# Receivers that misbehave


def test_raises(
    peers: Peers, receive: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    """It is logged, and that is all: others are called, the circuit opens, the connect goes on."""

    def broken(**kwargs: Any) -> None:
        raise LookupError("a receiver's mistake")

    receive(signals.peer_opened, broken)
    told = receive(signals.peer_opened)
    peers.fail(0)
    assert peers.connect() == "peer1"
    assert [sent["peer"] for sent in told] == ["peer0"]
    assert peers.balancer.snapshot()[0].state == "open"
    assert "a receiver's mistake" in caplog.text


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_is_interrupted(
    peers: Peers, receive: Callable[..., Any], error: type[BaseException]
) -> None:
    """Ctrl-C in a receiver is the caller's; the circuit has been opened before."""

    def interrupted(**kwargs: Any) -> None:
        raise error

    receive(signals.peer_opened, interrupted)
    told = receive(signals.peer_failed)
    peers.fail(0)
    with pytest.raises(error):
        peers.connect()
    assert peers.balancer.snapshot()[0].state == "open"
    assert lock_is_free(peers.balancer.peers["peer0"].breaker)
    assert peers.connect() == "peer1"
    assert told == []


class Hanging:
    """A receiver that hangs until it is released."""

    def __init__(self) -> None:
        self.reached, self.released = threading.Event(), threading.Event()

    def __call__(self, **kwargs: Any) -> None:
        self.reached.set()
        assert self.released.wait(60)


@pytest.mark.parametrize(
    ("signal", "state", "name"),
    [
        ("peer_failed", "open", "peer1"),
        ("peer_opened", "open", "peer1"),
        ("peer_closed", "closed", "peer0"),
    ],
)
def test_hangs(
    peers: Peers, receive: Callable[..., Any], signal: str, state: str, name: str
) -> None:
    """Its own thread waits; the circuit has changed, no lock is held, and all others go on."""
    peers.fail(0)
    if signal == "peer_closed":
        peers.connect()
        peers.restore(0)
        peers.clock.advance(31)
    hang = Hanging()
    receive(getattr(signals, signal), hang)
    names: list[str] = []
    with running(lambda: names.append(peers.connect())):
        assert hang.reached.wait(60)
        try:
            assert peers.balancer.snapshot()[0].state == state
            assert lock_is_free(peers.balancer.peers["peer0"].breaker)
            assert in_thread(peers.connect) == name
            # Others may come and go, too.
            receive(signals.peers_exhausted)
            assert names == []
        finally:
            hang.released.set()
    assert names == [name]


def test_hangs_over_what_the_background_finds(
    tmp_path: Path, receive: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    """The thread that makes the trials goes on with them, and the log says what they show."""
    caplog.set_level("INFO", "django_proxysql")
    hang = Hanging()
    with ExitStack() as stack:
        peers = Peers(tmp_path, stack, TRIALS="background")
        receive(signals.peer_closed, hang)
        stack.callback(hang.released.set)
        for number in (0, 1):
            peers.fail(number)
        with pytest.raises(NoPeerAvailable):
            peers.connect()
        assert [state.state for state in peers.balancer.snapshot()] == ["open", "open"]
        peers.restore(0)

        def later() -> None:
            peers.clock.advance(34)
            trial_worker.schedule(peers.balancer.group)

        until(lambda: later() or hang.reached.is_set())
        peers.restore(1)
        until(lambda: later() or peers.balancer.peers["peer1"].breaker.is_available)
        until(lambda: not trial_worker.is_running)
        until(lambda: len([line for line in caplog.messages if " closed, " in line]) == 2)


def test_keeps_no_connection_of_a_thread_that_only_tells(
    tmp_path: Path, receive: Callable[..., Any]
) -> None:
    """What a receiver opens there is closed after it, not left to the thread's collection."""
    opened: list[Any] = []

    def ask(alias: str, **kwargs: Any) -> None:
        connection = connections[alias]
        connection.ensure_connection()
        opened.append((threading.get_ident(), connection, connection.connection))

    with ExitStack() as stack:
        peers = Peers(tmp_path, stack, TRIALS="background")
        receive(signals.peer_closed, ask)
        peers.fail(0)
        assert peers.connect() == "peer1"
        peers.restore(0)
        until(
            lambda: peers.clock.advance(34) or trial_worker.schedule(peers.balancer.group) or opened
        )
        (there, connection, made), *_ = opened
        assert there != threading.get_ident()
        assert made is not None
        until(lambda: connection.connection is None)


def test_asks_a_database_that_is_gone(peers: Peers, receive: Callable[..., Any]) -> None:
    """A receiver that connects where no peer is left is not told of that, and so on for ever."""
    told: list[str] = []

    def ask(alias: str, **kwargs: Any) -> None:
        told.append(alias)
        with pytest.raises(OperationalError):
            connections[alias].ensure_connection()

    receive(signals.peers_exhausted, ask)
    peers.fail(0)
    peers.fail(1)
    for _ in range(2):
        with pytest.raises(NoPeerAvailable):
            peers.connect()
    assert told == ["balanced", "balanced"]


@pytest.mark.parametrize("kind", ["mariadb", "postgres"])
@pytest.mark.parametrize("signal", ["peer_failed", "peer_opened"])
def test_writes_to_the_same_database(
    kind: str,
    signal: str,
    request: pytest.FixtureRequest,
    fault_proxy: Callable[..., FaultProxy],
    receive: Callable[..., Any],
) -> None:
    """In the middle of a connect(): its row is there, once, and so is the caller's."""
    server = request.getfixturevalue(kind)
    with site(server, fault_proxy, STRATEGY="round_robin") as here:
        present = here.here
        here.connection.close()
        (proxy,) = (proxy for proxy in here.proxies if proxy is not present)
        proxy.refuse()
        told: list[str] = []

        def write(address: str, **kwargs: Any) -> None:
            told.append(address)
            here.write("the receiver's")

        receive(getattr(signals, signal), write)
        here.write("the caller's")
        assert told == [f"127.0.0.1:{proxy.port}"]
        assert here.written() == ["the receiver's", "the caller's"]
        assert here.balancer.peers[here.connection.peer.name].connections == 1
        assert present.established == 1
