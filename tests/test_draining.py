"""A peer that is drained gets no new connections, and loses those it has at their safe points."""

from __future__ import annotations

import logging
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from django.db import close_old_connections

from django_proxysql import NoPeerAvailable, balancers
from django_proxysql.core import group
from django_proxysql.core.events import PeerDrained, PeerUndrained
from django_proxysql.core.exceptions import DrainRefused
from tests.engine import SQLITE, engine, sqlite_peer
from tests.fakes import raised_by, refused_by_host
from tests.site import Site
from tests.stories import tell, told
from tests.test_balancer import World


class TestBalancer:
    def test_signal_handler_that_drains_another_peer_leaves_one(self) -> None:
        """Wherever it comes in, while the thread drains the one: of the last two one is refused."""
        step, there = 0, True
        while there:
            step += 1
            world = World("db1", "db2")
            refused: list[BaseException | None] = []
            left, there = step, False

            def trace(frame: Any, event: str, arg: Any) -> None:
                nonlocal left, there
                if frame.f_code.co_filename == group.__file__:
                    # As signals do: where functions are called.
                    left -= 1
                    if left == 0:
                        there = True
                        sys.settrace(None)
                        refused.append(raised_by(lambda: world.db.drain("db2")))  # noqa: B023

            sys.settrace(trace)
            try:
                refused.append(raised_by(lambda: world.db.drain("db1")))  # noqa: B023
            finally:
                sys.settrace(None)
            drained = [peer.drained for peer in world.db.peers.values()]
            assert sorted(drained) == [False, True], step
            assert [type(error) for error in refused].count(DrainRefused) == len(refused) - 1, step
        assert step > 5

    def test_peer_undrained_as_its_refused_drain_is_applied_takes_connections(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The thread that closes the other circuit has seen the refusal, and comes too late."""
        world = World("db1", "db2")
        world.open("db1")
        peers = world.db.group
        apply = peers.apply_drained
        assert apply(world.db.peers["db2"], True, elsewhere=True)

        def late(*arguments: Any, **how: Any) -> bool:
            world.db.undrain("db2")
            return apply(*arguments, **how)

        monkeypatch.setattr(peers, "apply_drained", late)
        world.db.peers["db1"].breaker.close()
        assert not world.db.peers["db2"].drained

    def test_last_peer_is_refused(self) -> None:
        world = World("db1", "db2")
        world.open("db2")
        with pytest.raises(DrainRefused, match="'db1' is the last peer of 'default'"):
            world.db.drain("db1")
        assert not world.db.peers["db1"].drained
        assert world.events[1:] == []

    def test_of_two_threads_that_drain_the_last_two_one_is_refused(self) -> None:
        for _ in range(50):
            world = World("db1", "db2")
            together = threading.Barrier(2)

            def drain(name: str, world: World = world, together: Any = together) -> Any:
                together.wait(60)
                return raised_by(lambda: world.db.drain(name))

            with ThreadPoolExecutor() as pool:
                raised = list(pool.map(drain, ["db1", "db2"]))
            assert sum(isinstance(error, DrainRefused) for error in raised) == 1
            assert sum(peer.drained for peer in world.db.peers.values()) == 1

    def test_force(self) -> None:
        """… unless it is meant; the error then says that peers are drained."""
        world = World("db1", "db2")
        world.db.drain("db2")
        with pytest.raises(DrainRefused):
            world.db.drain("db1")
        world.db.drain("db1", force=True)
        error = raised_by(world.db.connect)
        assert isinstance(error, NoPeerAvailable)
        assert error.peers == ("db1 (db1:3306): drained", "db2 (db2:3306): drained")
        assert world.driver.calls == []

    def test_drained_twice_is_no_error_and_no_event(self) -> None:
        world = World("db1", "db2")
        world.db.drain("db1")
        world.db.drain("db1")
        world.db.undrain("db1")
        world.db.undrain("db1")
        assert [type(event) for event in world.events] == [PeerDrained, PeerUndrained]

    def test_peer_drained_during_a_connect_is_neither_tried_nor_waited_for(self) -> None:
        world = World("db1", "db2")

        def drained_meanwhile() -> Any:
            world.db.drain("db2", force=True)
            raise refused_by_host()

        world.driver.down["db1"] = drained_meanwhile
        assert isinstance(raised_by(world.db.connect), NoPeerAvailable)
        assert world.driver.hosts == ["db1"]

    def test_only_moves_no_pin(self) -> None:
        """What is asked of one peer inside a block does not make the block stay there."""
        world = World("db1", "db2")
        with world.db.pinned("db1"):
            world.connect()
            world.db.connect(only="db2")
            assert world.connect() == "db1"

    def test_snapshot(self) -> None:
        """It says so, beside the circuit's state."""
        world = World("db1", "db2")
        world.db.drain("db1")
        assert [(peer.state, peer.drained) for peer in world.db.snapshot()] == [
            ("closed", True),
            ("closed", False),
        ]
        assert repr(world.db.peers["db1"]) == "<Peer 'db1' db1:3306 closed, drained>"

    def test_log(self, caplog: pytest.LogCaptureFixture) -> None:
        """A line for each, with what structured logging wants."""
        caplog.set_level(logging.INFO, "django_proxysql")
        world = World("db1", "db2")
        held = world.db.connect()
        world.db.drain("db1")
        world.db.undrain("db1")
        assert caplog.messages == [
            "default: db1 (db1:3306) is drained, 1 connections are to leave it",
            "default: db1 (db1:3306) is drained no longer",
        ]
        assert vars(caplog.records[0])["peer"] == "db1"
        assert not held.closed


STORIES = {
    "the next statement outside a block goes elsewhere": (
        "all: read; drain; read; left; replaced 1 unforced"
    ),
    "so it does where the circuit opens": "all: read; open; read; left; replaced 1 unforced",
    "a block ends where it began, and so does a request that has written": (
        "all: { write one; drain; write two }; read one two; stays; request_ends; other; "
        "read one two; left; lost 0"
    ),
    "a block that is pinned to it keeps it to its end": (
        "all: pinned { write one; drain; request_ends; write two; stays }; request_ends; "
        "write three; left"
    ),
}


@told(STORIES)
def test_story(request: Any, server: str, settings: dict[str, Any], text: str) -> None:
    tell(request, server, settings, text)


class TestEngine:
    @pytest.mark.parametrize("how", ["drained", "opened"])
    def test_while_it_connects(self, here: Site, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """One to a peer that is taken out as it is made leaves, too, before its first use."""
        here.connection.close()
        plain = here.connection.init_connection_state
        out = []

        def meanwhile() -> None:
            plain()
            if not out:
                peer = here.connection._attempt.peer
                out.append(peer)
                here.balancer.drain(peer.name) if how == "drained" else peer.breaker.open()

        monkeypatch.setattr(here.connection, "init_connection_state", meanwhile)
        assert here.read() == []
        assert [here.connection.peer] != out

    def test_stays_while_somebody_uses_it(self, here: Site) -> None:
        """Other threads, a cursor that is being read, foreign keys that are off keep it."""
        here.write("one")
        name = here.connection.peer.name
        here.connection.inc_thread_sharing()
        here.balancer.drain(name)
        close_old_connections()
        assert here.connection.connection is not None
        here.connection.dec_thread_sharing()
        here.session.holds.by_django = True
        close_old_connections()
        assert here.connection.connection is not None
        here.session.holds.by_django = False
        if not here.is_mysql:
            rows = here.connection.chunked_cursor()
            rows.execute("SELECT generate_series(1, 9)")
            assert rows.fetchone() == (1,)
            close_old_connections()
            assert rows.fetchone() == (2,)
            rows.close()
        close_old_connections()
        assert here.read() == ["one"]
        assert here.connection.peer.name != name

    def test_stays_where_no_other_is_available(self, here: Site) -> None:
        here.write("one")
        name = here.connection.peer.name
        for peer in here.balancer.peers.values():
            here.balancer.drain(peer.name, force=True)
        close_old_connections()
        assert here.read() == ["one"]
        assert here.connection.peer.name == name

    def test_engine_without_a_look_at_sockets(self, tmp_path: Path) -> None:
        """There, a connection leaves between two requests."""
        peers = [sqlite_peer(tmp_path / name) for name in "ab"]
        with engine(peers, PEER_ENGINE=SQLITE, CONN_MAX_AGE=None) as connection:
            connection.ensure_connection()
            name = connection.peer.name
            close_old_connections()
            assert connection.connection is not None
            connection.cursor().close()
            balancers[connection.alias].drain(name)
            close_old_connections()
            connection.ensure_connection()
            assert connection.peer.name != name
