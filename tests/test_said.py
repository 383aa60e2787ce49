"""What is said of a connect that fails, and of when the next trial is, is what happened."""

from __future__ import annotations

import functools
import io
import itertools
import logging
import pickle
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import pytest
from django.core.checks import run_checks
from django.core.management import call_command

from django_proxysql import Fault, NoPeerAvailable
from django_proxysql.core import logs
from django_proxysql.core.circuit import CLOSED, opened_elsewhere
from django_proxysql.core.events import CircuitOpened, ConnectFailed, PeersExhausted
from django_proxysql.core.logs import due_in
from django_proxysql.core.trials import trial_worker
from django_proxysql.inspection import different_versions
from django_proxysql.monitoring.status import health
from django_proxysql.registry import balancers
from tests.engine import engine, mysql_peer
from tests.fakes import bad_password, raised_by, refused_by_host, too_many
from tests.servers import ADMIN, ADMIN_PASSWORD
from tests.servers.mariadb import Node
from tests.test_balancer import World


class TestPinned:
    """A connect that may use one peer alone, and fails, says so, and is no exhaustion."""

    def test_pinned_to_a_peer_that_is_down(self) -> None:
        """The error names the peer and quotes it; no PeersExhausted is emitted."""
        world = World("db1", "db2")
        world.driver.down["db2"] = refused_by_host
        with world.db.pinned(world.db.peers["db2"]):
            error = raised_by(world.connect)
        assert isinstance(error, NoPeerAvailable)
        assert str(error) == (
            "This connect() is pinned to 'db2' of 'default', which cannot be reached, and tries "
            f"no other peer. db2 (db2:3306): {refused_by_host()}, tried just now."
        )
        assert (error.balancer, error.pinned, len(error.peers)) == ("default", "db2", 1)
        assert not world.told(PeersExhausted)
        assert [event.peer for event in world.told(ConnectFailed)] == ["db2"]

    def test_error_can_be_pickled(self) -> None:
        """The error arrives whole in another process."""
        for error in (NoPeerAvailable("a", ["b: c"], "b"), NoPeerAvailable("a", ["b: c"])):
            again = pickle.loads(pickle.dumps(error))
            assert (str(again), again.pinned) == (str(error), error.pinned)

    @pytest.mark.parametrize("state", ["open", "suspect", "drained", "under trial"])
    @pytest.mark.parametrize("how", ["only", "pinned"])
    def test_every_state_of_the_peer(self, how: str, state: str) -> None:
        """Whatever keeps the one peer from being used is said of it, and nothing else is."""
        world = World("db1", "db2")
        peer = world.db.peers["db2"]
        world.driver.down["db2"] = refused_by_host
        if state == "open":
            world.open("db2")
        elif state == "suspect":
            peer.breaker.suspect("(2013, 'Lost connection')", Fault.LOST)
        elif state == "drained":
            world.db.drain("db2")
        else:
            world.open("db2")
            world.clock.advance(31)
            held = peer.breaker.acquire()
            assert held is not None
            if how == "pinned":
                # It is waited for, to the end of its lease or of the deadline.
                world.db.group.clock = lambda: next(ticks)
                ticks = itertools.count(world.clock.now, 10)
        if how == "only":
            error = raised_by(lambda: world.db.connect(only=peer))
        else:
            with world.db.pinned(peer):
                error = raised_by(world.connect)
        assert isinstance(error, NoPeerAvailable)
        assert error.pinned == "db2"
        assert "pinned to 'db2'" in str(error)
        assert "db1" not in str(error)
        assert "no time was left" not in str(error)
        expected = {
            "open": f"circuit open, last error {refused_by_host()}, next trial in 30 s",
            "suspect": "suspect, last error (2013, 'Lost connection')",
            "drained": "drained",
            "under trial": "being tried by another caller",
        }[state]
        if how == "pinned" and state != "under trial":
            # Nothing keeps a pinned connect from trying.
            expected = f"{refused_by_host()}, tried just now"
        assert expected in str(error)
        assert not world.told(PeersExhausted)

    def test_pinned_to_no_peer_yet(self) -> None:
        """Before the block has a peer all are tried, and none left is an exhaustion."""
        world = World("db1", "db2")
        world.driver.down.update(db1=refused_by_host, db2=refused_by_host)
        with world.db.pinned():
            error = raised_by(world.connect)
        assert isinstance(error, NoPeerAvailable)
        assert str(error).startswith("No peer of 'default' can be reached. db1 ")
        assert len(world.told(PeersExhausted)) == 1

    def test_replacement_that_is_not_needed(self) -> None:
        """A connect that only closed circuits may serve ends in no alarm: the old one works."""
        world = World("db1", "db2")
        world.driver.down.update(db1=refused_by_host, db2=too_many)
        error = raised_by(lambda: world.db.connect(trials="never"))
        assert isinstance(error, NoPeerAvailable)
        assert not world.told(PeersExhausted)

    def test_peer_that_recovers_meanwhile(self) -> None:
        """A peer that was not asked, though there was time, is not said to have lacked it."""
        world = World("db1", "db2")
        world.open("db2")

        def while_db1_fails() -> None:
            raise refused_by_host()

        world.driver.down["db1"] = while_db1_fails
        snapshot = world.db.group.snapshot

        def recovered() -> Any:
            world.db.peers["db2"].breaker.close()
            return snapshot()

        world.db.group.snapshot = recovered  # type: ignore[method-assign]
        error = raised_by(world.connect)
        assert "db2 (db2:3306): not tried, its circuit has closed just now" in str(error)

    def test_failed_trial_opens_no_circuit(self) -> None:
        """Only the failure that opened a closed circuit says that it did."""
        world = World("db1", "db2")
        world.driver.down["db1"] = refused_by_host
        world.connect()
        world.clock.advance(31)
        world.connect()
        assert [(e.trial, e.opened) for e in world.told(ConnectFailed)] == [
            (False, True),
            (True, False),
        ]


@pytest.mark.parametrize("down", [0, 1])
def test_commands_with_one_of_two_peers_down(mariadb_pair: tuple[Node, Node], down: int) -> None:
    """What looks at every peer, or stays with one, raises no alarm while another works."""
    mariadb_pair[down].kill()
    admin = {"USER": ADMIN, "PASSWORD": ADMIN_PASSWORD}
    peers = [mysql_peer(node, **admin) for node in mariadb_pair]
    with engine(peers, CONNECT_TIMEOUT=2, STRATEGY="round_robin") as connection:
        told: list[Any] = []
        balancer = balancers["balanced"]
        balancer.add_listener(told.append)
        assert different_versions("balanced") == []
        for _ in peers:
            connection.close()
            connection.ensure_connection()
        run_checks(tags=["database"], databases=["balanced"])
        connection.close()
        with connection.schema_editor() as editor:
            editor.execute("SELECT 1")
        assert health()[0]
        with pytest.raises(SystemExit) as ended:
            call_command("peers", "balanced", stdout=io.StringIO())
        assert ended.value.code == 1
        name = connection.creation.create_test_db(verbosity=0, autoclobber=True, serialize=False)
        connection.creation.destroy_test_db(name, verbosity=0)
    assert [event for event in told if type(event) is CircuitOpened]
    assert not [event for event in told if type(event) is PeersExhausted]


class TestPasswordThatRaises:
    """A PASSWORD that raises is this side's trouble, whatever the exception looks like."""

    @pytest.mark.parametrize(
        "error",
        [
            ConnectionRefusedError(111, "the token service is down"),
            TimeoutError("timed out"),
            refused_by_host(),
            bad_password(),
            LookupError("no such secret"),
        ],
        ids=lambda error: type(error).__name__,
    )
    @pytest.mark.parametrize("key", ["password", "passwd"])
    def test_raised_as_it_is(
        self, key: str, error: Exception, caplog: pytest.LogCaptureFixture
    ) -> None:
        """It is raised at once, counts for nothing, and the next peer is not tried."""
        caplog.set_level(logging.DEBUG, "django_proxysql")

        def password() -> str:
            raise error

        world = World(peers={"db1": {"host": "db1", key: password}, "db2": {"host": "db2"}})
        assert raised_by(world.connect) is error
        assert world.driver.calls == []
        assert world.states() == "closed closed"
        (event,) = world.events
        assert (type(event), event.fault, event.count) == (ConnectFailed, Fault.LOCAL, 0)
        (record,) = caplog.records
        assert record.levelno == logging.ERROR
        assert "connecting to db1 (db1) failed (settings, or this process)" in record.getMessage()

    def test_errors_with_numbers_of_their_own_fill_no_log(
        self, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A token service's error names the request: one line a minute for each peer."""
        now = [0.0]
        monkeypatch.setattr(logs, "time", SimpleNamespace(monotonic=lambda: now[0]))
        requests = (f"{number} ({uuid4()})" for number in itertools.count(1))

        def password() -> str:
            raise LookupError(f"request {next(requests)} failed")

        world = World(peers={"db1": {"host": "db1", "password": password}})
        for moment in (0.0, 0.1, 59.9, 60.0, 61.0):
            now[0] = moment
            raised_by(world.connect)
        said = [record.getMessage().partition(" request ")[2][:2] for record in caplog.records]
        assert said == ["1 ", "4 "]

    def test_in_a_trial(self) -> None:
        """A trial that it ends is due again soon; the peer is as it was."""
        tokens: list[Any] = [LookupError("no such secret"), "right"]

        def password() -> str:
            token = tokens.pop(0)
            if isinstance(token, Exception):
                raise token
            return str(token)

        world = World(peers={"db1": {"host": "db1", "password": password}})
        world.open("db1")
        world.clock.advance(30)
        assert isinstance(raised_by(world.connect), LookupError)
        assert world.db.snapshot()[0].trial_in == 1
        world.clock.advance(1)
        assert world.connect() == "db1"
        assert world.states() == "closed"


class TestNextTrial:
    """Every place that says when the next trial is says when it is made."""

    def test_last_peer_to_fail(self, caplog: pytest.LogCaptureFixture) -> None:
        """With no circuit closed the event, the line, the error and the state say 1 s."""
        caplog.set_level(logging.WARNING, "django_proxysql")
        world = World("db1", "db2", check_interval=28)
        world.driver.down.update(db1=refused_by_host, db2=refused_by_host)
        raised_by(world.connect)
        assert [event.trial_in for event in world.told(CircuitOpened)] == [28, 1]
        assert "opened, first trial in 1 s: " in caplog.messages[1]
        assert [state.trial_in for state in world.db.snapshot()] == [1, 1]
        assert str(raised_by(world.connect)).count("next trial in 1 s") == 2

    @pytest.mark.parametrize("interval", [1, 5, 60, None])
    @pytest.mark.parametrize("others", ["closed", "suspect", "open", "drained"])
    @pytest.mark.parametrize("trials", ["inline", "background"])
    def test_it_is_made_then(
        self, trials: str, others: str, interval: float | None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """No trial is made before the time that the state names, and one is made at that time."""
        monkeypatch.setattr(trial_worker, "schedule", lambda *a, **k: None)
        world = World("db1", "db2", trials=trials, last_resort_interval=interval, check_interval=28)
        other = world.db.peers["db2"]
        if others == "suspect":
            other.breaker.suspect()
        elif others == "open":
            world.open("db2")
        elif others == "drained":
            world.db.drain("db2")
        world.open("db1")
        breaker = world.db.peers["db1"].breaker
        said = world.db.snapshot()[0].trial_in
        assert said is not None
        assert world.told(CircuitOpened)[-1].trial_in == said
        hurried = interval is not None and others in ("open", "drained")
        assert said == (min(28, interval) if hurried else 28)
        world.clock.advance(said - 0.01)
        assert not world.db.try_out(world.db.peers["db1"])
        assert breaker.current_state != CLOSED
        world.clock.advance(0.02)
        assert world.db.snapshot()[0].trial_in == 0
        assert world.db.try_out(world.db.peers["db1"])

    def test_drained(self, caplog: pytest.LogCaptureFixture) -> None:
        """A drained peer gets no trial, and no time of one is named."""
        caplog.set_level(logging.WARNING, "django_proxysql")
        world = World("db1", "db2")
        world.db.drain("db1")
        world.open("db1")
        assert world.db.snapshot()[0].trial_in is None
        assert world.told(CircuitOpened)[0].trial_in is None
        assert "opened, no trial while it is drained: " in caplog.messages[0]
        world.db.undrain("db1")
        assert world.db.snapshot()[0].trial_in == 30

    def test_under_way(self) -> None:
        """While a trial is under way its time is now, also one made before its interval."""
        world = World("db1")
        world.open("db1")
        world.clock.advance(2)
        permit = world.db.peers["db1"].breaker.acquire(last_resort=1)
        assert permit is not None
        assert world.db.snapshot()[0].trial_in == 0

    def test_found_by_another_process(self) -> None:
        """Where nothing was tried here and no peer is left, the next connect() makes the trial."""
        world = World("db1", last_resort_interval=None)
        breaker = world.db.peers["db1"].breaker
        now = world.clock()
        says = {"error": "", "fault": Fault.UNREACHABLE, "question": ""}
        opened = functools.partial(opened_elsewhere, generation=0, due=now + 20, out_for=1, **says)
        breaker.apply(opened, now, elsewhere=True)
        assert world.db.snapshot()[0].trial_in == 0
        assert world.connect() == "db1"

    def test_in_words(self) -> None:
        """A time is said as exactly as it matters."""
        said = {0: "now", 0.01: "now", 0.4: "in 0.4 s", 1: "in 1 s", 27.6: "in 28 s"}
        assert {seconds: due_in(seconds) for seconds in said} == said

    def test_by_hand(self, caplog: pytest.LogCaptureFixture) -> None:
        """A circuit that somebody opens or half-opens by hand says so, and when its trial is."""
        caplog.set_level(logging.WARNING, "django_proxysql")
        world = World("db1", "db2")
        world.db.peers["db1"].breaker.open()
        world.db.peers["db2"].breaker.half_open()
        assert caplog.messages == [
            "default: circuit of db1 (db1:3306) opened, first trial in 30 s: opened by hand",
            "default: circuit of db2 (db2:3306) opened, first trial now",
        ]
