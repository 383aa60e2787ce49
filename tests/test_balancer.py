"""What LoadBalancer promises, with a driver that fails as told and a clock that stands."""

from __future__ import annotations

import ast
import asyncio
import contextlib
import gc
import logging
import random
import re
import threading
import time
import weakref
from typing import Any, Callable
from unittest import mock

import psycopg
import pybreaker
import pytest
import tenacity

from django_proxysql import (
    AsyncLoadBalancer,
    Fault,
    LoadBalancer,
    NoPeerAvailable,
    NotReady,
    PeerBreaker,
)
from django_proxysql.core import search
from django_proxysql.core.balancer import Attempt
from django_proxysql.core.events import (
    CircuitClosed,
    CircuitOpened,
    Connected,
    ConnectFailed,
    PeersExhausted,
)
from django_proxysql.core.exceptions import ConfigError, PoolBusy
from tests.fakes import (
    Clock,
    Connection,
    Driver,
    OperationalError,
    bad_password,
    carried_on_by_tenacity,
    even,
    holding,
    in_thread,
    lock_is_free,
    peers,
    raised_by,
    refused_by_host,
    running,
    too_many,
)

SECRET = "s3cr3t-of-the-peer"


class InOrder:
    """A strategy that takes the peers as they are written."""

    def order(self, peers: Any) -> Any:
        return peers


class World:
    """A balancer, its driver, its clock and what it told."""

    face: Any = LoadBalancer
    drivers: Any = Driver

    def __init__(self, *names: str, **options: Any) -> None:
        self.clock = Clock()
        self.driver = self.drivers()
        options.setdefault("strategy", InOrder)
        endpoints = options.pop("peers", None) or peers(*names)
        self.db = self.face(
            endpoints, self.driver.connect, clock=self.clock, jitter=even, **options
        )
        self.permits: list[Any] = []
        #: What the last connect() of hosts() has raised.
        self.error: BaseException | None = None
        self.events: list[Any] = []
        self.db.add_listener(self.events.append)

    def connect(self, **how: Any) -> Any:
        """Return the host that a new connection leads to."""
        return str(self.db.connect(**how).host)

    def hosts(self, **how: Any) -> list[str]:
        """The hosts that one more connect() tries, in turn."""
        self.driver.calls.clear()
        self.error = raised_by(lambda: self.connect(**how))
        return self.driver.hosts

    def states(self) -> str:
        return " ".join(peer.breaker.current_state for peer in self.db.peers.values())

    def open(self, *names: str) -> None:
        for name in names:
            self.db.peers[name].breaker.acquire().failed(refused_by_host(), Fault.UNREACHABLE)

    def due(self, *names: str) -> None:
        """Open circuits, and let the time pass until their trials are due."""
        self.open(*names)
        self.clock.advance(30)

    def trial(self, name: str) -> Any:
        """Begin the trial that is due."""
        permit = self.db.peers[name].breaker.acquire()
        assert permit.is_trial
        # Kept: a trial whose permit is gone is over.
        self.permits.append(permit)
        return permit

    def exhausted(self) -> NoPeerAvailable:
        """Return the error of a connect() that gets no connection."""
        with pytest.raises(NoPeerAvailable) as caught:
            self.db.connect()
        return caught.value

    def told(self, kind: type) -> list[Any]:
        return [event for event in self.events if type(event) is kind]


class Stubborn:
    """A strategy that names one peer again and again."""

    def order(self, peers: Any) -> Any:
        yield from [peers[0]] * 5


#: What is promised, and below it a balancer (its peers as :func:`world_of` reads them) and what
#: happens. ``tries`` names the hosts that one connect() tries, in turn; see :func:`play`.
CONNECTS = """
a peer that cannot be reached costs an attempt
    db1 db2 db3; down db1 db2; tries db1 db2 db3; circuits open open closed; tries db3
a bad trial costs its caller an attempt
    db1 db2; down db1; open db1; after 30; tries db1 db2; tries db2
a trial that is due goes first, and closes the circuit
    db1 db2; open db1; tries db2; after 30; tries db1; closed 1
a worse tier is used when no better peer is available
    spare:1 db1 db2 last:7; tries db1; down db1 db2 spare; tries db1 db2 spare last; tries last
no trial of a worse tier is made while a better one is in use
    db1 spare:1; open spare; after 1000; tries db1; down db1; tries db1 spare
a better tier is tried while a worse one is in use
    db1 spare:1; open db1; tries spare; after 30; tries db1; tries db1
a suspect comes after all others of every tier
    db1 db2 spare:1; suspect db1; tries db2; down db2 spare; tries db2 spare db1
    circuits closed open open
where all are suspect it is as if none were
    db1 db2; suspect db1 db2; tries db1; circuits closed suspect; opened 0; closed 0
a suspect whose trial fails opens whatever fail_max says
    db1 fail_max=5; suspect db1; down db1; tries db1; circuits open; opened 1
a full suspect gets one trial a second, not one a connect
    db1 db2; full db1; suspect db1; after 1; tries db1 db2; tries db2; tries db2
    after 1; up db1; tries db1; tries db1; circuits closed closed
a peer is in use below fail_max and out with it
    db1 db2 fail_max=3; down db1; tries db1 db2; tries db1 db2; opened 0
    tries db1 db2; opened 1; failed 1 2 3; tries db2
success_threshold 2 takes two good trials
    db1 success_threshold=2; open db1; after 30; tries db1; circuits half-open; tries db1
    circuits closed
a full peer is passed by and stays in use: its load must not go to the others
    db1 db2; full db1; tries db1 db2; tries db1 db2; circuits closed closed; failed 0 0
a trial that meets a full peer neither closes the circuit nor opens it anew
    db1 db2; open db1; full db1; after 30; tries db1 db2; tries db2; after 1; up db1; tries db1
    opened 1
trials hurry while no circuit is closed
    db1 db2 last_resort_interval=2; down db1 db2; tries db1 db2; tries; after 1.9; tries
    after 0.1; tries db1 db2; after 2; up db2; tries db1 db2; circuits open closed
last_resort_interval None leaves an open circuit alone for its check_interval
    db1 last_resort_interval=None; down db1; tries db1; after 29; tries; after 1; tries db1
last_resort_interval 0 tries at each connect
    db1 last_resort_interval=0; down db1; tries db1; tries db1; tries db1
no trial comes early while a circuit is closed
    db1 db2; full db2; open db1; after 10; tries db2
where the last peer in use fails, those out are tried in the same connect
    db1 db2; open db1; after 1; down db2; tries db2 db1
no peer is attempted twice however often a strategy names it; what it leaves out comes last
    db1 db2 strategy='tests.test_balancer.Stubborn'; down db1 db2; tries db1 db2
an error that no table lists counts for its peer once another one lets us in
    db1 db2; odd db1; tries db1 db2; circuits open closed; failed 1
it counts for none where all peers say it
    db1 db2; odd db1 db2; tries db1 db2; circuits closed closed; failed 0 0
nor where the others are gone
    db1 db2; odd db1; down db2; tries db1 db2; circuits closed open
nor where the caller asks for another database
    db1 db2; odd db1; callers db1 db2; circuits closed closed
a refusal that is the caller's counts nothing, and no other peer is asked
    db1 db2; refuses db1; callers db1; circuits closed closed
so it is with a trial
    db1 db2; open db1; refuses db1; after 30; callers db1; circuits open closed
a peer that cannot be reached counts for such a caller too
    db1 db2; down db1; callers db1 db2; circuits open closed
where no peer is available it is one error, and one event
    db1 db2; down db1; refuses db2; tries db1 db2; raises NoPeerAvailable; exhausted 1
where every peer refuses it is the driver's own error, and an exhaustion between trials
    db1 db2; refuses db1 db2; tries db1 db2; raises OperationalError; circuits open open
    exhausted 0; tries; raises NoPeerAvailable; exhausted 1; after 1; tries db1 db2
    raises OperationalError
so it is where all others are drained
    db1 db2; drain db1; refuses db2; tries db2; raises OperationalError
a drained peer gets no connections until it is undrained
    db1 db2; drain db1; tries db2; tries db2; undrain db1; tries db1
a drained peer's trial is not made, due or not, and not as a last resort
    db1 db2; open db1; drain db1; after 30; tries db2; down db2; after 30; tries db2
a drained suspect's trial is not made either
    db1 db2; suspect db1; drain db1; after 30; tries db2; down db2; after 30; tries db2
"""
#: The scripts by their promises.
SCRIPTS = {
    promise: "; ".join(line.strip() for line in script.splitlines())
    for promise, script in re.findall(r"^(\w.*)\n((?: +.*\n)+)", CONNECTS, re.M)
}


#: What scripts count.
COUNTED = {"opened": CircuitOpened, "closed": CircuitClosed, "exhausted": PeersExhausted}


def world_of(words: str, face: Any = None) -> Any:
    """Return a world: ``db1 spare:1 fail_max=3`` are two peers, a PRIORITY and an argument."""
    endpoints: dict[str, Any] = {}
    options: dict[str, Any] = {"breaker": {}}
    for word in words.split():
        argument, equals, value = word.partition("=")
        name, _, tier = word.partition(":")
        if not equals:
            endpoints[name] = {"host": name, "port": 3306, "priority": int(tier or 0)}
        elif argument in ("fail_max", "success_threshold"):
            options["breaker"][argument] = int(value)
        else:
            options[argument] = ast.literal_eval(value)
    return (face or World)(peers=endpoints, **options)


def play(script: str, face: Any = None) -> Any:
    """Have happen what a script of :data:`CONNECTS` says, and look whether it is true."""
    peers_of_it, *lines = script.split("; ")
    world = world_of(peers_of_it, face)
    fails = {
        "down": refused_by_host,
        "refuses": bad_password,
        "full": too_many,
        "odd": lambda: of_driver("MySQLdb", "OperationalError", 4999, "text"),
        "up": None,
    }
    for line in lines:
        word, *names = line.split()
        circuits = [peer.breaker.circuit for peer in world.db.peers.values()]
        if word in fails:
            world.driver.down.update(dict.fromkeys(names, fails[word]))
        elif word == "open":
            world.open(*names)
        elif word == "suspect":
            for name in names:
                world.db.peers[name].breaker.suspect("lost", Fault.LOST)
        elif word in ("drain", "undrain"):
            getattr(world.db, word)(*names)
        elif word == "after":
            world.clock.advance(float(*names))
        elif word == "tries":
            assert world.hosts() == names, line
        elif word == "callers":
            assert world.hosts(refusal_is_callers=True) == names, line
        elif word == "raises":
            assert type(world.error).__name__ == names[0], line
        elif word == "circuits":
            assert ["suspect" if one.suspect else one.state for one in circuits] == names, line
        elif word == "failed":
            assert [str(event.count) for event in world.told(ConnectFailed)] == names, line
        else:
            assert len(world.told(COUNTED[word])) == int(*names), line
    return world


@pytest.mark.parametrize("promise", SCRIPTS)
def test_which_peers_a_connect_tries(promise: str) -> None:
    play(SCRIPTS[promise])


def test_error_of_another_balancer_is_not_named_after_this_one() -> None:
    """It names its own peers."""
    inner, outer = World("inner"), World("outer")
    inner.driver.down["inner"] = refused_by_host
    outer.driver.down["outer"] = inner.connect
    assert not getattr(outer.exhausted(), "__notes__", ())


class TestOrder:
    def test_connects_to_a_peer(self) -> None:
        """connect() returns the driver's own connection, made with the peer's arguments."""
        world = World("db1")
        connection = world.db.connect()
        assert connection is world.driver.made[0]
        assert world.driver.calls == [{"host": "db1", "port": 3306}]

    @pytest.mark.parametrize("is_trial_due", [False, True])
    def test_an_order_that_returns_nothing_is_named(self, is_trial_due: bool) -> None:
        """A strategy without its ``return`` is a setting to mend, and no peer's fault."""

        class Forgetful:
            def order(self, peers: Any) -> Any:
                sorted(peers, key=lambda peer: peer.name)

        world = World("db1", "db2", "db3", strategy=Forgetful)
        if is_trial_due:
            world.due("db3")
        with pytest.raises(ConfigError, match=r"STRATEGY has an order\(\) that returned NoneType"):
            world.db.connect(trials="last")
        assert world.states().startswith("closed closed")

    def test_peers_own_settings_stand_before_the_balancers(self) -> None:
        world = World(
            peers={
                "db1": {"host": "db1", "breaker": {"fail_max": 2}, "check_interval": 5},
                "db2": {"host": "db2"},
            },
            breaker={"success_threshold": 2},
        )
        first, second = (peer.breaker for peer in world.db.peers.values())
        assert (first.fail_max, first.success_threshold, first.reset_timeout) == (2, 2, 5)
        assert (second.fail_max, second.success_threshold, second.reset_timeout) == (1, 2, 30)
        world.db.connect()
        assert "breaker" not in world.driver.calls[0]

    def test_balancers_share_nothing(self) -> None:
        one, other = World("db1", "db2"), World("db1", "db2")
        one.open("db1")
        assert other.states() == "closed closed"


class TestFaults:
    @pytest.mark.parametrize(
        "error",
        [
            OperationalError(2004, "Can't create TCP/IP socket (24)"),
            OSError(24, "Too many open files"),
            ConfigError("OPTIONS", "is wrong"),
            TypeError("connect() got an unexpected keyword argument 'hots'"),
            ValueError("anything else"),
            KeyboardInterrupt(),
            SystemExit(1),
            type("Timeout", (BaseException,), {})("gevent's"),
            OperationalError(1213, "Deadlock found"),
        ],
        ids=lambda error: type(error).__name__ + str(error)[:10],
    )
    @pytest.mark.parametrize("where", ["first attempt", "later attempt", "trial"])
    def test_what_is_no_peers_fault_is_raised_at_once(
        self, error: BaseException, where: str
    ) -> None:
        world = World("db1", "db2", "db3")
        hosts = ["db1", "db2"] if where == "later attempt" else ["db1"]
        world.driver.down.update({"db1": refused_by_host, hosts[-1]: error})
        if where == "trial":
            world.due("db1")
        assert raised_by(world.connect) is error
        assert world.driver.hosts == hosts
        assert world.states() == f"{'closed' if where == 'first attempt' else 'open'} closed closed"
        assert world.db.peers[hosts[-1]].breaker.fail_counter == (where == "trial")

    def test_failing_strategy_is_not_taken_for_a_peers_fault(self) -> None:
        class Broken:
            def order(self, peers: Any) -> Any:
                yield peers[0]
                raise RuntimeError("strategy")

        world = World("db1", "db2", strategy=Broken, breaker={"fail_max": 2})
        world.driver.down["db1"] = refused_by_host
        with pytest.raises(RuntimeError, match="strategy"):
            world.connect()

    def test_tenacity_carries_on_after_the_first_failure(self) -> None:
        """The first attempt of a connect that succeeds at once does without it."""
        assert carried_on_by_tenacity(World("db1", "db2", "db3")) == [False, True, True]

    def test_no_exception_of_our_tools(self) -> None:
        """Whatever peers do, neither pybreaker's nor tenacity's exceptions reach the caller."""
        draw = random.Random(7)
        world = World("db1", "db2", "db3", breaker={"fail_max": 2})
        kinds = [None, refused_by_host, too_many, ValueError, KeyboardInterrupt]
        kinds += [bad_password] * 5
        seen: set[str] = set()
        for _ in range(2000):
            world.driver.down[draw.choice(["db1", "db2", "db3"])] = draw.choice(kinds)
            world.clock.advance(draw.choice([0, 0.5, 10]))
            error = raised_by(world.connect)
            seen.add(type(error).__name__)
            assert not isinstance(error, (pybreaker.CircuitBreakerError, tenacity.RetryError))
        assert seen == {
            "NoneType",
            "OperationalError",
            "NoPeerAvailable",
            "ValueError",
            "KeyboardInterrupt",
        }


def of_driver(module: str, name: str, *args: Any, **attributes: Any) -> Exception:
    """Return an error as a driver raises it, whether that is installed or not."""
    error: Exception = type(name, (Exception,), {"__module__": module})(*args)
    for key, value in attributes.items():
        setattr(error, key, value)
    return error


#: Two transactions met: of a connect's own, the application's.
CONFLICTS = {1020, 1205, 1213, 1614, 3101}


class TestEveryError:
    """Whatever a driver says of one peer while connecting, the next peer is tried."""

    def test_mysql(self) -> None:
        world = World("db1", "db2")
        for code in range(1000, 5000):
            error = of_driver("MySQLdb", "OperationalError", code, "text")
            world.driver.down["db1"] = error
            if code in CONFLICTS:
                assert raised_by(world.connect) is error
            else:
                assert world.connect() == "db2", code
            world.db.peers["db1"].breaker.close()

    def test_error_of_all_peers_alike_is_raised_and_names_its_peer(self) -> None:
        world = World("db1", "db2")
        errors = [of_driver("MySQLdb", "OperationalError", 1064, "text") for _ in range(2)]
        world.driver.down.update(db1=errors[0], db2=errors[1])
        assert raised_by(world.connect) is errors[1]
        assert errors[1].args[0] == 1064
        assert "to db2 (db2:3306) of 'default'" in str(errors[1])
        assert not world.told(PeersExhausted)

    @pytest.mark.parametrize(
        "cls",
        [
            cls
            for cls in vars(psycopg.errors).values()
            if isinstance(cls, type) and issubclass(cls, psycopg.Error) and cls.sqlstate
        ],
        ids=lambda cls: cls.sqlstate,
    )
    def test_postgresql(self, cls: Any) -> None:
        world = World("db1", "db2")
        world.driver.down["db1"] = cls("FATAL: text")
        is_applications = issubclass(cls, psycopg.IntegrityError)
        if is_applications or cls.sqlstate in ("40001", "40P01"):
            assert isinstance(raised_by(world.connect), cls)
        else:
            assert world.connect() == "db2"

    @pytest.mark.parametrize(
        "error",
        [
            of_driver("psycopg2", "OperationalError", "something without a code"),
            of_driver("psycopg", "InterfaceError", "something without a code"),
            of_driver("psycopg", "ProgrammingError", 'invalid connection option "hots"'),
            of_driver("psycopg2", "OperationalError", 'invalid integer value "abc" for "port"'),
            of_driver("MySQLdb", "OperationalError", "something without a code"),
            of_driver("MySQLdb", "NotSupportedError", 1235, "not supported"),
            of_driver("pymysql.err", "InternalError", "Packet sequence number wrong"),
            of_driver("sqlite3", "OperationalError", "near SELEKT: syntax error"),
            of_driver("sqlite3", "DatabaseError", "file is not a database"),
            of_driver("oracledb", "DatabaseError", "ORA-28000: the account is locked"),
            of_driver("oracledb", "OperationalError", "DPY-9999: of another kind"),
            of_driver("somedriver", "InternalError", "of another kind"),
            of_driver("somedriver", "OperationalError", "of another kind"),
        ],
        ids=str,
    )
    def test_others(self, error: Exception) -> None:
        world = World("db1", "db2")
        world.driver.down["db1"] = error
        assert world.connect() == "db2"


class TestBusyPools:
    """Where connections come out of pools: one that is empty is asked again after the others."""

    def search(self, world: World, busy: str, **options: Any) -> list[tuple[str, bool]]:
        """The attempts of one connect(): whose, and whether a pool was to be waited for."""
        attempts = []

        def open_one(attempt: Attempt) -> str:
            attempts.append((attempt.peer.name, attempt.may_wait))
            if attempt.peer.name in busy.split() and not attempt.may_wait:
                raise PoolBusy("empty")
            if attempt.peer.name in world.driver.down:
                raise world.driver.down[attempt.peer.name]()
            return attempt.peer.name

        raised_by(lambda: world.db.connect(open_one, **options))
        return attempts

    @pytest.mark.parametrize(
        ("script", "busy", "attempts"),
        [
            ("db1 db2", "db1", "db1 db2"),
            # Nothing else is left: in the same order again, and not a third time.
            ("db1 db2; down db2", "db1 db2", "db1 db2 db1+"),
            ("db1 db2; full db1 db2", "db1 db2", "db1 db2 db1+ db2+"),
            # As with a server that is full, the next tier goes before a wait.
            ("db1 db2 db3:1", "db1 db2", "db1 db2 db3"),
            # A trial may wait.
            ("db1 db2; open db1; after 40", "db1", "db1+"),
        ],
    )
    def test_is_waited_for_after_all_others(self, script: str, busy: str, attempts: str) -> None:
        world = play(script)
        found = self.search(world, busy)
        assert [f"{name}{'+' if may_wait else ''}" for name, may_wait in found] == attempts.split()
        is_full = "full" in script
        assert len(world.told(ConnectFailed)) == (2 if is_full else 0)
        assert not is_full or world.states() == "closed closed"

    def test_pinned(self) -> None:
        world = World("db1", "db2")
        with world.db.pinned(world.db.peers["db1"]):
            assert self.search(world, "db1") == [("db1", False), ("db1", True)]

    def test_pinned_peer_that_refuses_raises_what_it_said(self) -> None:
        world = World("db1", "db2")
        world.driver.down["db1"] = bad_password
        with world.db.pinned("db1"), pytest.raises(Exception, match="Access denied") as raised:
            world.connect()
        assert not isinstance(raised.value, NoPeerAvailable)

    @pytest.mark.parametrize("is_down", [False, True])
    def test_a_connect_that_another_one_of_its_pinned_block_overtakes(self, is_down: bool) -> None:
        """It goes to the other's peer, and to no further one if that fails."""
        world = World("db1", "db2", "db3", strategy="round_robin")
        others: list[str] = []

        def overtake() -> None:
            if not others:
                others.append("")
                others[0] = world.connect()
                if is_down:
                    world.driver.down[others[0]] = refused_by_host

        world.driver.down.update(dict.fromkeys(world.db.peers, overtake))
        with world.db.pinned():
            error = raised_by(world.connect)
        assert isinstance(error, NoPeerAvailable) is is_down
        assert [one.host for one in world.driver.made if not one.closed] == others * (2 - is_down)

    def test_a_connect_is_overtaken_by_one_to_the_peer_that_has_just_failed(self) -> None:
        """That peer is there again: it is asked once more."""
        world = play("db1 db2:1")
        world.driver.down["db1"] = too_many

        def overtake() -> None:
            world.driver.down.clear()
            assert world.connect() == "db1"

        world.driver.down["db2"] = overtake
        with world.db.pinned():
            assert world.connect() == "db1"
        assert [one.host for one in world.driver.made if not one.closed] == ["db1"] * 2
        assert world.states() == "closed closed"

    def test_a_connect_that_outlives_its_pinned_block_goes_where_it_likes(self) -> None:
        world = World("db1", "db2", strategy="round_robin")
        block = world.db.pinned()

        def overtake() -> None:
            first = world.driver.hosts[-1]
            world.driver.down.clear()
            other = world.connect()
            assert other != first
            world.driver.down[other] = refused_by_host
            block.__exit__(None, None, None)

        world.driver.down.update(dict.fromkeys(world.db.peers, overtake))
        block.__enter__()
        first = world.connect()
        assert [one.host for one in world.driver.made if not one.closed][-1] == first

    def test_replacement_that_need_not_be_waits_for_no_pool(self) -> None:
        assert self.search(World("db1"), "db1", trials="never") == [("db1", False)]

    def test_empty_pool_is_a_full_peer_counted_for_nothing(self) -> None:
        def open_one(attempt: Attempt) -> None:
            raise PoolBusy("empty")

        world = World("db1")
        error = raised_by(lambda: world.db.connect(open_one))
        assert isinstance(error, NoPeerAvailable)
        assert "db1:3306): empty, tried just now" in str(error)
        assert [event.fault for event in world.told(ConnectFailed)] == [Fault.OVERLOADED]
        assert world.states() == "closed"


class TestInterrupted:
    @pytest.mark.parametrize("where", ["before", "within"])
    def test_pinned_leaves_no_pin(self, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
        world = World("db1", "db2")

        def interrupt() -> None:
            raise KeyboardInterrupt

        if where == "before":
            monkeypatch.setattr(world.db.group, "invalidate", interrupt)
        with pytest.raises(KeyboardInterrupt), world.db.pinned():
            interrupt()
        assert world.db.group.affinity.pin() is None

    @pytest.mark.usefixtures("hurried")
    def test_no_listener_of_many_threads_is_lost(self) -> None:
        world = World("db1")
        before = len(world.db.group.listeners.dispatchers)
        stay = [lambda event: None for _ in range(200)]
        share = [stay[n::8] for n in range(8)]

        def work(mine: Any) -> None:
            for listener in mine:
                passing = lambda event: None  # noqa: E731
                world.db.add_listener(listener)
                world.db.add_listener(passing)
                world.db.remove_listener(passing)

        with running(*[lambda mine=mine: work(mine) for mine in share]):
            pass
        assert len(world.db.group.listeners.dispatchers) == before + 200

    def test_error_whose_str_raises_is_raised_and_counted(self) -> None:
        class Mute(OperationalError):
            def __str__(self) -> str:
                raise RuntimeError("no words")

        Mute.__module__ = "MySQLdb"
        world = World("db1")
        error = Mute(2002)
        world.driver.down["db1"] = error
        with pytest.raises(NoPeerAvailable, match="Mute") as caught:
            world.connect()
        assert caught.value.__cause__ is error
        assert world.states() == "open"


class TestViewLeftBehind:
    """A change of a circuit renews the view, unless its thread is killed on the way there."""

    @pytest.fixture(autouse=True)
    def killed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Have no subscriber notified of a change."""
        monkeypatch.setattr(PeerBreaker, "_subscribers", lambda self: ())

    @pytest.mark.parametrize("trials", ["first", "last", "never"])
    @pytest.mark.parametrize("before", ["suspect", "open"])
    def test_peer_that_is_available_again(self, before: str, trials: str) -> None:
        world = World("db1", "db2")
        circuit = world.db.peers["db1"].breaker
        getattr(circuit, before)()
        world.db.group.invalidate()
        assert [p.name for tier in world.db.group.view().tiers for p in tier] == ["db2"]
        if before == "suspect":
            circuit.acquire().succeeded()
        else:
            circuit.close()
        world.driver.down["db2"] = refused_by_host
        assert {world.db.connect(trials=trials).host for _ in range(3)} == {"db1"}
        assert world.driver.hosts.count("db2") <= 1

    @pytest.mark.parametrize("trials", ["first", "last", "never"])
    def test_suspect_since_the_middle_of_a_connect_comes_last(self, trials: str) -> None:
        world = World("db1", "db2", "db3")

        def fail() -> None:
            world.db.peers["db2"].breaker.suspect()
            raise refused_by_host()

        world.driver.down["db1"] = fail
        assert world.db.connect(trials=trials).host == "db3"
        assert world.driver.hosts == ["db1", "db3"]

    def test_suspect_alone_is_tried_by_a_caller_that_makes_trials(self) -> None:
        world = World("db1")
        world.db.group.view()
        world.db.peers["db1"].breaker.suspect()
        with pytest.raises(NoPeerAvailable):
            world.db.connect(trials="never")
        assert world.driver.hosts == []
        assert world.db.connect(trials="last").host == "db1"

    @pytest.mark.parametrize("trials", ["first", "last", "never"])
    @pytest.mark.parametrize("after", ["suspect", "open"])
    def test_peer_that_is_no_longer_available(self, after: str, trials: str) -> None:
        world = World("db1", "db2")
        assert len(world.db.group.view().tiers[0]) == 2
        getattr(world.db.peers["db1"].breaker, after)()
        assert {world.connect(trials=trials) for _ in range(50)} == {"db2"}
        assert world.driver.hosts == ["db2"] * 50
        if trials != "never":
            assert [p.name for tier in world.db.group.view().tiers for p in tier] == ["db2"]


OnWait = Callable[..., Any]


class TestWaitingForATrial:
    """No candidate is left but a trial is under way: wait for it, look once more."""

    @pytest.fixture
    def on_wait(self, monkeypatch: pytest.MonkeyPatch) -> OnWait:
        """``on_wait(*steps)``: each wait for a trial does the next; returns what is waited for."""

        def prepare(*steps: Any) -> list[Any]:
            waits: list[Any] = []
            left = list(steps)

            def wait(leases: Any, seconds: float) -> None:
                waits.append((len(leases), seconds))
                left.pop(0)()

            monkeypatch.setattr("django_proxysql.core.balancer.wait_for_any", wait)
            return waits

        return prepare

    @pytest.mark.parametrize(
        ("script", "end", "is_pinned"),
        [
            ("db1; open db1; after 30", "succeeded", False),
            ("db1; suspect db1", "succeeded", False),
            # The one with the trial pressed Ctrl-C: the one who waited makes the trial.
            ("db1; suspect db1", "released", False),
            ("db1 db2; suspect db1", "succeeded", True),
        ],
    )
    def test_trial_that_has_not_failed_leads_who_waited_to_its_peer(
        self, on_wait: OnWait, script: str, end: str, is_pinned: bool
    ) -> None:
        world = play(script)
        waits = on_wait(getattr(world.trial("db1"), end))
        with world.db.pinned("db1") if is_pinned else contextlib.nullcontext():
            assert world.connect() == "db1"
        assert waits == [(1, 15)]

    def test_bad_trial(self, on_wait: OnWait) -> None:
        """Somebody's trial ends badly: those who waited get its error, and do not wait again."""
        world = World("db1")
        world.due("db1")
        trial = world.trial("db1")
        waits = on_wait(lambda: trial.failed(bad_password(), Fault.REFUSED))
        error = world.exhausted()
        assert "(1045, " in str(error)
        assert len(waits) == 1
        assert world.driver.hosts == []

    def test_next_trial_of_the_same_peer(
        self, on_wait: OnWait, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A peer whose trial has failed is not waited for again, though it is tried again."""
        world = World("db1")
        world.due("db1")
        breaker = world.db.peers["db1"].breaker
        trial = breaker.acquire()
        waits = on_wait(lambda: trial.failed(refused_by_host()))
        view, others = world.db.group.view, []

        def while_another_begins() -> Any:
            if waits and not others:
                others.append(breaker.acquire(last_resort=0))
            return view()

        monkeypatch.setattr(world.db.group, "view", while_another_begins)
        error = world.exhausted()
        assert "being tried by another caller" in str(error)
        assert (len(waits), others[0].is_trial) == (1, True)

    def test_suspects_trial_released_just_before_we_look(self) -> None:
        world = World("db1")
        breaker = world.db.peers["db1"].breaker
        breaker.suspect()
        trial = breaker.acquire()
        real = breaker.acquire

        def acquire(**options: Any) -> Any:
            permit = real(**options)
            trial.released()
            return permit

        breaker.acquire = acquire  # the moment between our look and our wait
        assert world.connect() == "db1"

    def test_second_trial_is_waited_for_too(self, on_wait: OnWait) -> None:
        world = World("db1", breaker={"success_threshold": 2})
        breaker = world.db.peers["db1"].breaker
        world.due("db1")
        trials = [breaker.acquire()]

        def first() -> None:
            trials[0].succeeded()
            trials.append(breaker.acquire())

        waits = on_wait(first, lambda: trials[1].succeeded())
        assert world.connect() == "db1"
        assert len(waits) == 2

    def test_the_trial_that_ends_first_frees_those_who_wait(self) -> None:
        # So long that a thread that waits for the other one would be stuck.
        world = World("db1", "db2", connect_deadline=1000)
        world.due("db1", "db2")
        hanging, good = (peer.breaker.acquire() for peer in world.db.peers.values())
        lease = world.db.peers["db2"].breaker.trial
        waiting = Bell(lease)
        got: list[str] = []
        with running(lambda: got.append(world.connect())):
            assert waiting.wait(60)
            good.succeeded()
        assert got == ["db2"]
        hanging.released()

    def test_one_fails_the_other_is_waited_for(self, on_wait: OnWait) -> None:
        world = World("db1", "db2")
        world.due("db1", "db2")
        bad, good = (peer.breaker.acquire() for peer in world.db.peers.values())
        waits = on_wait(lambda: bad.failed(refused_by_host()), good.succeeded)
        assert world.connect() == "db2"
        assert [count for count, _ in waits] == [2, 1]

    def test_up_to_the_deadline(self, on_wait: OnWait) -> None:
        """A trial is waited for up to connect_deadline, and the error says who has it."""
        world = World("db1", connect_deadline=3)
        world.due("db1")
        world.trial("db1")
        waits = on_wait(lambda: world.clock.advance(3))
        error = world.exhausted()
        assert "db1 (db1:3306): being tried by another caller, last error (2002, " in str(error)
        assert waits == [(1, 3)]

    def test_abandoned_trial_is_taken_over(self, on_wait: OnWait) -> None:
        world = World("db1", connect_deadline=10)
        world.due("db1")
        world.trial("db1")
        world.clock.advance(20)
        waits = on_wait(lambda: world.clock.advance(1))
        assert world.connect() == "db1"
        assert waits == [(1, 1)]

    def test_of_the_peer_one_stays_with_in_vain(self, on_wait: OnWait) -> None:
        """If it fails the peer is tried once more for the one who stays, and then it is over."""
        world = World("db1", "db2")
        db1 = world.db.peers["db1"]
        world.driver.down["db1"] = refused_by_host
        db1.breaker.suspect()
        trial = db1.breaker.acquire()
        on_wait(lambda: trial.failed(refused_by_host()))
        with world.db.pinned(db1), pytest.raises(NoPeerAvailable):
            world.connect()
        assert world.driver.hosts == ["db1"]

    def test_interrupt_ends_the_wait(self, on_wait: OnWait) -> None:
        world = World("db1", "db2")
        world.driver.down["db1"] = refused_by_host
        world.due("db2")
        world.trial("db2")
        on_wait(mock.Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            world.connect()
        assert world.driver.hosts == ["db1"]

    def test_no_caller_waits_while_another_peer_is_usable(self, on_wait: OnWait) -> None:
        world = World("db1", "db2")
        world.due("db1")
        world.trial("db1")
        waits = on_wait()
        assert world.connect() == "db2"
        assert waits == []

    def test_trial_that_was_given_up_and_is_not_due(self) -> None:
        """No caller waits for a trial that has no result, nor looks for it again and again."""
        world = World("db1", "db2", "db3")
        world.open("db1", "db2", "db3")
        world.clock.advance(2)
        breaker = world.db.peers["db3"].breaker
        # As a last resort; its thread is killed while another one has the lock.
        lost = breaker.acquire(last_resort=1)
        assert lost is not None
        with holding(breaker._lock):
            breaker._abandon(lost.lease)
        lost._ended = True
        assert breaker.current_state == "half-open"
        world.db.peers["db1"].breaker.close()
        world.db.peers["db2"].breaker.close()
        world.driver.down.update(db1=too_many, db2=too_many)
        looks: list[int] = []
        once_over = search.Search._left_over

        def counted(search: Any, view: Any) -> Any:
            looks.append(1)
            assert len(looks) < 10, "it goes round and round"
            return once_over(search, view)

        with mock.patch.object(search.Search, "_left_over", counted):
            assert isinstance(raised_by(world.db.connect), NoPeerAvailable)


class Bell(threading.Event):
    """Set once somebody waits for the lease's trial."""

    def __init__(self, lease: Any) -> None:
        super().__init__()
        bells = lease.bells
        told = self.set

        class Told(list):  # type: ignore[type-arg]
            def append(self, bell: Any) -> None:
                super().append(bell)
                told()

        lease.bells = Told(bells)


class TestTime:
    def attempts(self, world: World) -> list[Attempt]:
        seen: list[Attempt] = []

        def open_one(attempt: Attempt) -> Connection:
            seen.append(attempt)
            world.clock.advance(attempt.timeout)
            raise refused_by_host()

        error = raised_by(lambda: world.db.connect(open_one))
        assert isinstance(error, NoPeerAvailable)
        return seen

    def test_attempts_are_cut_to_the_deadline(self) -> None:
        world = World("db1", "db2", "db3", "db4", connect_timeout=5, connect_deadline=12)
        assert [attempt.timeout for attempt in self.attempts(world)] == [5, 5, 2]
        assert world.states() == "open open open closed"

    def test_no_caller_sleeps_between_peers(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def sleep(seconds: float) -> None:
            raise AssertionError(f"slept for {seconds} s")

        monkeypatch.setattr(time, "sleep", sleep)
        assert len(self.attempts(World("db1", "db2", "db3"))) == 3

    def test_peers_not_reached_in_time_are_named(self) -> None:
        world = World("db1", "db2", connect_timeout=5, connect_deadline=5)
        error = raised_by(lambda: self.attempts(world) and world.db.connect(lambda _: 1 / 0))
        assert isinstance(error, ZeroDivisionError)
        assert "db2 (db2:3306): no time was left to try it" in world.told(PeersExhausted)[0].error

    def test_trial_gets_trial_timeout_and_another_attempt_connect_timeout(self) -> None:
        world = World("db1", "db2", trial_timeout=1)
        world.due("db1")
        seen = self.attempts(world)
        assert [(a.peer.name, a.timeout, a.is_trial) for a in seen] == [
            ("db1", 1, True),
            ("db2", 5, False),
        ]

    def test_drivers_that_we_know_are_bounded(self) -> None:
        """A known driver gets whole seconds, and its trial a bounded connection first."""
        world = World("db1", connect_timeout=2.5)
        world.db._connect = as_mysqlclient(world.driver)
        world.db.connect()
        assert world.driver.calls.pop()["connect_timeout"] == 3
        world.due("db1")
        connection = world.db.connect()
        first, second = world.driver.calls
        assert (first["read_timeout"], first["write_timeout"]) == (3, 3)
        assert "read_timeout" not in second
        assert world.driver.made[-2].closed
        assert not connection.closed

    def test_connect_timeout_of_the_peers_arguments_stands(self) -> None:
        world = World(peers=peers("db1", connect_timeout=9))
        world.db._connect = as_mysqlclient(world.driver)
        world.db.connect()
        assert world.driver.calls[0]["connect_timeout"] == 9


def as_mysqlclient(driver: Driver) -> Any:
    def connect(**params: Any) -> Connection:
        return driver.connect(**params)

    connect.__module__ = "MySQLdb"
    return connect


class TestWhatIsSaid:
    def test_error_names_each_peer_what_it_said_and_when_it_is_tried_next(self) -> None:
        world = World(
            peers={
                "peer0": {"host": "10.0.0.1", "port": 3306},
                "peer1": {"host": "10.0.0.2", "port": 3306},
            },
            last_resort_interval=None,
        )
        world.db.peers["peer1"].breaker.acquire().failed(
            OperationalError(2013, "Lost connection"), Fault.UNREACHABLE
        )
        world.clock.advance(18)
        world.driver.down["10.0.0.1"] = OperationalError(2002, "Can't connect")
        error = raised_by(world.connect)
        assert str(error) == (
            "No peer of 'default' can be reached. "
            'peer0 (10.0.0.1:3306): (2002, "Can\'t connect"), tried just now; '
            "peer1 (10.0.0.2:3306): circuit open, last error (2013, 'Lost connection'), "
            "next trial in 12 s."
        )
        assert error.balancer == "default"
        assert len(error.peers) == 2

    def test_no_password_anywhere(self, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.DEBUG, "django_proxysql")
        world = World(
            peers={
                "db1": {"host": "db1", "port": 3306, "password": SECRET},
                "db2": {"host": "db2", "unix_socket": "/run/db.sock", "passwd": SECRET},
                "db3": {"host": "db3", "database": "shop", "password": lambda: SECRET},
            }
        )
        world.db.connect()
        world.driver.down.update(db1=bad_password, db2=refused_by_host, db3=too_many)
        errors = [raised_by(world.connect) for _ in range(3)]
        seen: list[Attempt] = []
        raised_by(lambda: world.db.connect(seen.append))
        shown = [world.db, world.db.config, world.events, world.db.snapshot(), errors, seen]
        shown += world.db.peers.values()
        shown += [peer.breaker for peer in world.db.peers.values()]
        shown += [peer.breaker.circuit for peer in world.db.peers.values()]
        text = caplog.text + "".join(f"{thing!r} {thing}" for thing in shown)
        assert SECRET not in text
        assert "/run/db.sock" in text
        assert len(caplog.records) > 5

    def test_snapshot_says_what_is_known_and_asks_no_peer(self) -> None:
        world = World(
            peers={
                "db1": {"host": "db1", "port": 1, "weight": 2, "priority": 3},
                "db2": {"host": "db2"},
                # PyMySQL takes the socket, whatever the host is.
                "db3": {"unix_socket": "/s", "host": "x"},
                "db4": {"database": "/srv/db.sqlite3"},
            },
            breaker={"fail_max": 2},
        )
        world.open("db1")
        world.open("db1")
        world.db.peers["db2"].breaker.suspect("(2013, 'Lost')", Fault.LOST)
        world.clock.advance(10)
        one, two, three, four = world.db.snapshot()
        assert (one.name, one.address, one.state) == ("db1", "db1:1", "open")
        assert (one.trial_in, one.out_for, one.failures, one.fault) == (
            20,
            10,
            2,
            Fault.UNREACHABLE,
        )
        assert (one.weight, one.priority) == (2, 3)
        assert (two.state, two.suspect, two.trial_in, two.error) == (
            "closed",
            True,
            None,
            "(2013, 'Lost')",
        )
        assert (three.address, three.state, three.out_for) == ("/s", "closed", None)
        assert four.address == "/srv/db.sqlite3"
        assert world.driver.calls == []

    def test_repr_names_peers_and_their_states(self) -> None:
        world = World("db1", "db2")
        world.open("db2")
        assert repr(world.db) == "<LoadBalancer 'default': db1 closed, db2 open>"
        assert repr(world.db.peers["db2"]) == "<Peer 'db2' db2:3306 open>"


class TestLogging:
    @pytest.mark.parametrize(
        ("script", "expected"),
        [
            # Bad trials are quiet.
            (
                "db1 db2; down db1; tries db1 db2; after 30; tries db1 db2; after 30; up db1; "
                "tries db1",
                [
                    "WARNING default: circuit of db1 (db1:3306) opened, first trial in 30 s: "
                    f"{refused_by_host()}",
                    "INFO default: circuit of db1 (db1:3306) closed, the peer was out for 60.0 s",
                ],
            ),
            (
                "db1 db2; refuses db1; tries db1 db2; after 30; tries db1 db2; after 30",
                [
                    "ERROR default: circuit of db1 (db1:3306) opened, first trial in 30 s: "
                    f"the peer refuses us, {bad_password()}"
                ],
            ),
            # No circuit speaks of it yet.
            (
                "db1 db2 fail_max=5; refuses db1; tries db1 db2; tries db1 db2",
                [f"ERROR default: connecting to db1 (db1:3306) failed (refused): {bad_password()}"],
            ),
            ("db1; suspect db1; tries db1", []),
        ],
        ids=["out and back", "refusal", "refusal below fail_max", "suspect that is well"],
    )
    def test_what_happens_to_a_peer_is_a_line(
        self, script: str, expected: list[str], caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.INFO, "django_proxysql")
        play(script)
        found = [f"{record.levelname} {record.getMessage()}" for record in caplog.records]
        assert found == expected
        for record in caplog.records[:1]:
            assert (record.alias, record.peer) == ("default", "db1")  # type: ignore[attr-defined]

    def test_each_connection_is_a_debug_line(self, caplog: pytest.LogCaptureFixture) -> None:
        world = World("db1", "db2")
        world.driver.down["db1"] = lambda: world.clock.advance(0.25)
        with caplog.at_level(logging.DEBUG, "django_proxysql"):
            world.connect()
            world.due("db1")
            world.connect()
        assert [r.getMessage() for r in caplog.records if r.levelno == logging.DEBUG] == [
            "default: connected to db1 (db1:3306) in 250.0 ms",
            "default: connected to db1 (db1:3306) in 250.0 ms (trial)",
        ]

    def test_log_handler_that_raises_keeps_no_caller_from_a_connection(self) -> None:
        class Broken(logging.Handler):
            def emit(self, record: logging.LogRecord) -> None:
                raise RuntimeError("disk full")

        logger = logging.getLogger("django_proxysql")
        handler = Broken()
        logger.addHandler(handler)
        try:
            world = World("db1", "db2")
            world.driver.down["db1"] = refused_by_host
            error = raised_by(world.connect)
        finally:
            logger.removeHandler(handler)
        assert error is None
        assert world.states() == "open closed"


class TestEvents:
    def test_listeners_get_attempts_openings_closings_and_exhaustion(self) -> None:
        world = World("db1")
        world.driver.down["db1"] = refused_by_host
        raised_by(world.connect)
        world.clock.advance(30)
        world.driver.down.clear()
        world.connect()
        text = str(refused_by_host())
        assert world.events == [
            # With no other peer its trial is due as a last resort, after a second.
            CircuitOpened("default", "db1", "db1:3306", Fault.UNREACHABLE, text, 1),
            ConnectFailed(
                "default", "db1", "db1:3306", 0, False, Fault.UNREACHABLE, text, 1, opened=True
            ),
            PeersExhausted("default", world.events[2].error, 0.0),
            CircuitClosed("default", "db1", "db1:3306", 30),
            Connected("default", "db1", "db1:3306", 0, trial=True),
        ]

    def test_listeners_run_outside_the_lock(self) -> None:
        """A listener may wait for another thread that connects: no deadlock."""
        world = World("db1", "db2")
        seen: list[Any] = []

        def nosy(event: Any) -> None:
            if type(event) in (CircuitOpened, CircuitClosed):
                seen.append(all(lock_is_free(peer.breaker) for peer in world.db.peers.values()))
                seen.append(in_thread(world.connect))

        world.db.add_listener(nosy)
        world.driver.down["db1"] = refused_by_host
        world.connect()
        world.driver.down.clear()
        world.clock.advance(30)
        world.connect()
        assert seen == [True, "db2", True, "db1"]

    @pytest.mark.parametrize("face", [LoadBalancer, AsyncLoadBalancer])
    def test_connection_is_not_kept_where_a_listener_is_interrupted(self, face: Any) -> None:
        """The exception is, and with its traceback all frames."""

        async def coroutine(**params: Any) -> Any:
            return connect(**params)

        def connect(**params: Any) -> Connection:
            connection = Connection("db1")
            made.append(weakref.ref(connection))
            return connection

        def interrupt(event: Any) -> None:
            raise KeyboardInterrupt

        made: list[Any] = []
        db = face(peers("db1"), connect if face is LoadBalancer else coroutine)
        db.add_listener(interrupt)
        kept = raised_by(db.connect if face is LoadBalancer else lambda: asyncio.run(db.connect()))
        assert type(kept) is KeyboardInterrupt
        assert [reference() for reference in made] == [None]


class TestOpeningOne:
    @pytest.mark.parametrize("error", [NotReady("it lags"), KeyboardInterrupt(), ValueError()])
    def test_check_that_raises_anything_closes_the_connection(self, error: BaseException) -> None:
        world = World("db1", "db2", ready_check=mock.Mock(side_effect=[error, None]))
        is_of_the_peer = isinstance(error, NotReady)
        assert raised_by(world.connect) is (None if is_of_the_peer else error)
        assert [connection.closed for connection in world.driver.made][:2] == (
            [True, False] if is_of_the_peer else [True]
        )
        circuit = world.db.peers["db1"].breaker.circuit
        assert circuit.fault is (Fault.NOT_READY if is_of_the_peer else None)
        assert circuit.error == ("it lags" if is_of_the_peer else "")

    def test_open_one_gets_the_peer_and_its_result_is_returned(self) -> None:
        world = World("db1")
        world.db._connect = None
        assert world.db.connect(lambda attempt: attempt.peer.address) == "db1:3306"
        with pytest.raises(ConfigError, match="connect was not given"):
            world.db.connect()

    def test_failed_attempts_leave_no_cycle(self) -> None:
        """What a failed attempt opened goes with it, not with the next garbage collection."""

        class Socket:
            pass

        world = World("db1", "db2")
        sockets: list[Any] = []

        def open_one(attempt: Attempt) -> str:
            socket = Socket()
            sockets.append(weakref.ref(socket))
            if attempt.peer.name == "db1":
                raise refused_by_host()
            return "connected"

        gc.disable()
        try:
            assert world.db.connect(open_one) == "connected"
            assert sockets[0]() is None
        finally:
            gc.enable()

    def test_unused_balancer_is_collected_and_its_kept_circuit_goes_on(self) -> None:
        world = World("db1")
        breaker = world.db.peers["db1"].breaker
        gone = weakref.ref(world.db)
        del world.db
        gc.collect()
        assert gone() is None
        breaker.acquire().failed(refused_by_host())
        assert breaker.current_state == "open"
