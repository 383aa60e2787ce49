"""What LoadBalancer promises, with a driver that fails as told and a clock that stands."""

from __future__ import annotations

import asyncio
import gc
import logging
import random
import threading
import time
import weakref
from typing import Any
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
    until,
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
        self.events: list[Any] = []
        self.db.add_listener(self.events.append)

    def connect(self) -> str:
        """Return the host that a new connection leads to."""
        return str(self.db.connect().host)

    def hosts(self) -> list[str]:
        """The hosts that one more connect() tries, in turn."""
        self.driver.calls.clear()
        raised_by(self.db.connect)
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


def test_trial_that_was_given_up_and_is_not_due() -> None:
    """No caller waits for the result of a trial that has none, nor looks for it again and again."""
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


class TestOrder:
    def test_connects_to_a_peer(self) -> None:
        """connect() returns the driver's own connection, made with the peer's arguments."""
        world = World("db1")
        connection = world.db.connect()
        assert connection is world.driver.made[0]
        assert world.driver.calls == [{"host": "db1", "port": 3306}]

    def test_peer_that_cannot_be_reached_costs_an_attempt(self) -> None:
        world = World("db1", "db2", "db3")
        world.driver.down.update(db1=refused_by_host, db2=refused_by_host)
        assert world.connect() == "db3"
        assert world.driver.hosts == ["db1", "db2", "db3"]
        assert world.states() == "open open closed"

    def test_no_peer_is_attempted_twice_however_often_a_strategy_names_it(self) -> None:
        class Stubborn:
            def order(self, peers: Any) -> Any:
                yield from [peers[0]] * 5

        world = World("db1", "db2", strategy=Stubborn, breaker={"fail_max": 10})
        world.driver.down.update(db1=refused_by_host, db2=refused_by_host)
        assert world.hosts() == ["db1", "db2"]

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

    def test_one_caller_makes_the_trial_and_no_other_waits(self) -> None:
        world = World("db1", "db2")
        world.due("db1")
        others: list[str] = []

        def during() -> None:
            world.driver.down.clear()
            others.extend(in_thread(world.connect) for _ in range(3))

        world.driver.down["db1"] = during
        assert world.connect() == "db1"
        assert others == ["db2"] * 3
        assert world.states() == "closed closed"

    def test_bad_trial_costs_its_caller_an_attempt(self) -> None:
        world = World("db1", "db2")
        world.driver.down["db1"] = refused_by_host
        world.due("db1")
        assert world.hosts() == ["db1", "db2"]
        assert world.hosts() == ["db2"]

    def test_worse_tier_is_used_when_no_better_peer_is_available(self) -> None:
        world = World(
            peers={
                "spare": {"host": "spare", "priority": 1},
                "db1": {"host": "db1"},
                "db2": {"host": "db2"},
                "last": {"host": "last", "priority": 7},
            }
        )
        assert world.hosts() == ["db1"]
        world.driver.down.update(dict.fromkeys(["db1", "db2", "spare"], refused_by_host))
        assert world.hosts() == ["db1", "db2", "spare", "last"]
        assert world.hosts() == ["last"]

    def test_no_trial_of_a_worse_tier_while_a_better_one_is_in_use(self) -> None:
        world = World(peers={"db1": {"host": "db1"}, "spare": {"host": "spare", "priority": 1}})
        world.open("spare")
        world.clock.advance(1000)
        assert world.hosts() == ["db1"]
        world.driver.down["db1"] = refused_by_host
        assert world.hosts() == ["db1", "spare"]

    def test_better_tier_is_tried_while_a_worse_one_is_in_use(self) -> None:
        world = World(peers={"db1": {"host": "db1"}, "spare": {"host": "spare", "priority": 1}})
        world.open("db1")
        assert world.hosts() == ["spare"]
        world.clock.advance(30)
        assert world.hosts() == ["db1"]
        assert world.hosts() == ["db1"]

    def test_suspect_is_attempted_after_all_others_of_every_tier(self) -> None:
        world = World(
            peers={
                "db1": {"host": "db1"},
                "db2": {"host": "db2"},
                "spare": {"host": "spare", "priority": 1},
            }
        )
        world.db.peers["db1"].breaker.suspect()
        assert world.hosts() == ["db2"]
        world.driver.down.update(db2=refused_by_host, spare=refused_by_host)
        assert world.hosts() == ["db2", "spare", "db1"]
        assert world.states() == "closed open open"
        assert world.db.peers["db1"].breaker.is_available

    def test_where_all_are_suspect_connect_works_as_if_none_were(self) -> None:
        world = World("db1", "db2")
        for peer in world.db.peers.values():
            peer.breaker.suspect("(2013, 'Lost connection')", Fault.LOST)
        assert world.connect() == "db1"
        assert not world.told(CircuitOpened)
        assert not world.told(CircuitClosed)

    def test_suspect_whose_trial_fails_opens_whatever_fail_max_says(self) -> None:
        world = World("db1", breaker={"fail_max": 5})
        world.db.peers["db1"].breaker.suspect()
        world.driver.down["db1"] = refused_by_host
        world.exhausted()
        assert world.states() == "open"
        assert len(world.told(CircuitOpened)) == 1

    def test_peer_is_in_use_below_fail_max_and_out_with_it(self) -> None:
        world = World("db1", "db2", breaker={"fail_max": 3})
        world.driver.down["db1"] = refused_by_host
        assert [world.hosts() for _ in range(3)] == [["db1", "db2"]] * 3
        assert world.hosts() == ["db2"]

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

    def test_success_threshold_of_2_takes_two_good_trials(self) -> None:
        world = World("db1", breaker={"success_threshold": 2})
        world.due("db1")
        world.connect()
        assert world.states() == "half-open"
        world.connect()
        assert world.states() == "closed"


class TestFaults:
    def test_overloaded_counts_nothing(self) -> None:
        """A full peer is passed by and stays in use: its load must not go to the others."""
        world = World("db1", "db2")
        world.driver.down["db1"] = too_many
        assert [world.hosts() for _ in range(3)] == [["db1", "db2"]] * 3
        assert world.states() == "closed closed"
        assert [event.count for event in world.told(ConnectFailed)] == [0] * 3

    def test_overloaded_trial_is_due_again_soon(self) -> None:
        """A trial that meets a full peer neither closes the circuit nor opens it anew."""
        world = World("db1", "db2")
        world.open("db1")
        world.driver.down["db1"] = too_many
        world.clock.advance(30)
        assert world.hosts() == ["db1", "db2"]
        assert world.hosts() == ["db2"]
        world.clock.advance(1)
        world.driver.down.clear()
        assert world.hosts() == ["db1"]
        assert len(world.told(CircuitOpened)) == 1

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
    @pytest.mark.parametrize("trial", [False, True], ids=["", "trial"])
    def test_what_is_no_peers_fault_is_raised(self, error: BaseException, trial: bool) -> None:
        world = World("db1", "db2", "db3")
        world.driver.down["db1"] = error
        if trial:
            world.due("db1")
        assert raised_by(world.connect) is error
        assert world.driver.hosts == ["db1"]
        assert world.states() == ("open closed closed" if trial else "closed closed closed")
        assert world.db.peers["db1"].breaker.fail_counter == trial

    @pytest.mark.parametrize(
        "error", [KeyboardInterrupt(), ValueError("other"), OSError(24, "Too many open files")]
    )
    def test_raised_at_once_from_a_later_attempt_too(self, error: BaseException) -> None:
        world = World("db1", "db2", "db3")
        world.driver.down.update(db1=refused_by_host, db2=error)
        assert raised_by(world.connect) is error
        assert world.driver.hosts == ["db1", "db2"]
        assert world.states() == "open closed closed"

    def test_failing_strategy_is_not_taken_for_a_peers_fault(self) -> None:
        class Broken:
            def order(self, peers: Any) -> Any:
                yield peers[0]
                raise RuntimeError("strategy")

        world = World("db1", "db2", strategy=Broken, breaker={"fail_max": 2})
        world.driver.down["db1"] = refused_by_host
        with pytest.raises(RuntimeError, match="strategy"):
            world.connect()

    def test_interrupt_while_waiting_for_a_trial(self, monkeypatch: pytest.MonkeyPatch) -> None:
        world = World("db1", "db2")
        world.driver.down["db1"] = refused_by_host
        world.due("db2")
        world.trial("db2")

        def interrupt(*args: Any) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr("django_proxysql.core.leases.Lease.wait_for_any", interrupt)
        with pytest.raises(KeyboardInterrupt):
            world.connect()
        assert world.driver.hosts == ["db1"]

    def test_drivers_own_error_is_raised_where_every_peer_refuses(self) -> None:
        world = World("db1", "db2")
        errors = {"db1": bad_password(), "db2": OperationalError(1049, "Unknown database 'x'")}
        world.driver.down.update(errors)
        assert raised_by(world.connect) is errors["db2"]
        assert world.states() == "open open"
        assert not world.told(PeersExhausted)

    def test_between_trials_the_refusal_is_quoted(self) -> None:
        """Between trials NoPeerAvailable quotes the refusal; after the interval it is raised."""
        world = World("db1", "db2")
        world.driver.down.update(db1=bad_password, db2=bad_password)
        raised_by(world.connect)
        error = world.exhausted()
        assert str(error).count("last error (1045, ") == 2
        world.clock.advance(1)
        assert isinstance(raised_by(world.connect), OperationalError)

    def test_error_names_all_where_not_every_peer_refuses(self) -> None:
        world = World("db1", "db2")
        world.driver.down.update(db1=refused_by_host, db2=bad_password)
        error = world.exhausted()
        assert isinstance(error.__cause__, OperationalError)

    @pytest.mark.parametrize("trial", [False, True], ids=["", "trial"])
    def test_refusal_that_is_the_callers_counts_nothing(self, trial: bool) -> None:
        world = World("db1", "db2")
        if trial:
            world.due("db1")
        error = OperationalError(1049, "Unknown database 'test_shop'")
        world.driver.down["db1"] = error
        with pytest.raises(OperationalError) as caught:
            world.db.connect(refusal_is_callers=True)
        assert caught.value is error
        assert world.states() == ("open closed" if trial else "closed closed")
        assert world.driver.hosts == ["db1"]

    def test_unreachable_counts_for_such_a_caller_too(self) -> None:
        world = World("db1", "db2")
        world.driver.down["db1"] = refused_by_host
        assert world.db.connect(refusal_is_callers=True).host == "db2"
        assert world.states() == "open closed"

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

    @pytest.mark.parametrize("name", ["OperationalError", "InternalError", "InterfaceError"])
    def test_mysql(self, name: str) -> None:
        world = World("db1", "db2")
        for code in range(1000, 5000):
            error = of_driver("MySQLdb", name, code, "text")
            world.driver.down["db1"] = error
            if code in CONFLICTS:
                assert raised_by(world.connect) is error
            else:
                assert world.connect() == "db2", code
            world.db.peers["db1"].breaker.close()

    def test_mysql_counts_what_no_table_lists(self) -> None:
        world = World("db1", "db2")
        world.driver.down["db1"] = of_driver("pymysql.err", "OperationalError", 4999, "text")
        assert world.connect() == "db2"
        assert world.states() == "open closed"
        (opened,) = world.told(CircuitOpened)
        assert (opened.peer, opened.fault) == ("db1", Fault.REFUSED)

    def test_mysql_error_of_all_peers_alike_is_raised_and_counts_for_none(self) -> None:
        for code in (*range(1054, 1129), *range(3300, 3400)):
            world = World("db1", "db2")
            errors = [of_driver("MySQLdb", "OperationalError", code, "text") for _ in range(2)]
            world.driver.down.update(db1=errors[0], db2=errors[1])
            raised = raised_by(world.connect)
            assert raised in errors, code
            assert raised.args[0] == code
            assert "of 'default'" in str(raised)
            assert world.states() == "closed closed"
            assert not world.told(PeersExhausted)
            assert [event.count for event in world.told(ConnectFailed)] == [0, 0]

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

    @pytest.mark.parametrize("fail_max", [1, 3])
    def test_log(self, fail_max: int, caplog: pytest.LogCaptureFixture) -> None:
        """The first one is an ERROR that names alias and peer, whether the circuit opens or not."""
        world = World("db1", "db2", breaker={"fail_max": fail_max})
        world.driver.down["db1"] = of_driver("MySQLdb", "OperationalError", 4999, "text")
        for _ in range(3):
            assert world.connect() == "db2"
        first, *others = [r for r in caplog.records if r.levelno == logging.ERROR]
        assert "default: " in first.getMessage()
        assert "db1 (db1:3306)" in first.getMessage()
        assert len(others) == (1 if fail_max == 3 else 0)

    def test_trial_that_ends_so_has_failed(self) -> None:
        world = World("db1", "db2")
        world.open("db1")
        world.driver.down["db1"] = of_driver("MySQLdb", "OperationalError", 4999, "text")
        assert not world.db.try_out(world.db.peers["db1"], now=True)
        assert world.states() == "open closed"

    def test_with_another_peer_down(self) -> None:
        """Where the others do not refuse but are gone, each is named, and counted as it is."""
        world = World("db1", "db2")
        world.driver.down.update(
            db1=of_driver("MySQLdb", "OperationalError", 4999, "text"), db2=refused_by_host
        )
        error = world.exhausted()
        assert "4999" in str(error)
        assert world.states() == "closed open"

    def test_another_database_of_the_callers_blames_no_peer(self) -> None:
        world = World("db1", "db2")
        world.driver.down["db1"] = of_driver("MySQLdb", "OperationalError", 4999, "text")
        assert world.db.connect(refusal_is_callers=True).host == "db2"
        assert world.states() == "closed closed"


class TestLastResort:
    def test_hurries_while_no_circuit_is_closed(self) -> None:
        world = World("db1", "db2", last_resort_interval=2)
        world.driver.down.update(db1=refused_by_host, db2=refused_by_host)
        assert world.hosts() == ["db1", "db2"]
        assert world.hosts() == []
        world.clock.advance(1.9)
        assert world.hosts() == []
        world.clock.advance(0.1)
        assert world.hosts() == ["db1", "db2"]
        world.clock.advance(2)
        del world.driver.down["db2"]
        assert world.connect() == "db2"

    @pytest.mark.parametrize(("interval", "due"), [(None, 30), (0, 0)])
    def test_without_an_interval(self, interval: float | None, due: float) -> None:
        """None leaves an open circuit alone for its check_interval, 0 tries at each connect()."""
        world = World("db1", last_resort_interval=interval)
        world.driver.down["db1"] = refused_by_host
        assert world.hosts() == ["db1"]
        world.clock.advance(max(0, due - 1))
        assert world.hosts() == ([] if due else ["db1"])
        world.clock.advance(1)
        assert world.hosts() == ["db1"]

    def test_no_trial_comes_early_while_a_circuit_is_closed(self) -> None:
        world = World("db1", "db2")
        world.driver.down["db2"] = too_many
        world.open("db1")
        world.clock.advance(10)
        assert world.hosts() == ["db2"]

    def test_the_last_peer_fails_in_this_very_connect(self) -> None:
        """The peer that fails now was the last in use: those out are tried in the same connect."""
        world = World("db1", "db2")
        world.open("db1")
        world.clock.advance(1)
        world.driver.down["db2"] = refused_by_host
        assert world.connect() == "db1"
        assert world.driver.hosts == ["db2", "db1"]


class TestFullSuspect:
    def test_gets_one_trial_a_second_not_one_a_connect(self) -> None:
        world = World("db1", "db2")
        world.driver.down["db1"] = too_many
        world.db.peers["db1"].breaker.suspect()
        world.clock.advance(1)
        assert [world.connect() for _ in range(5)] == ["db2"] * 5
        assert world.driver.hosts == ["db1"] + ["db2"] * 5
        world.clock.advance(1)
        world.driver.down.clear()
        world.driver.calls.clear()
        assert [world.connect() for _ in range(2)] == ["db1"] * 2
        assert world.db.peers["db1"].breaker.is_available


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

    def test_others_first(self) -> None:
        world = World("db1", "db2")
        assert self.search(world, "db1") == [("db1", False), ("db2", False)]
        assert world.told(ConnectFailed) == []

    def test_then_waited_for(self) -> None:
        """Nothing else is left: in the same order again, and not a third time."""
        world = World("db1", "db2")
        world.driver.down["db2"] = refused_by_host
        assert self.search(world, "db1 db2") == [
            ("db1", False),
            ("db2", False),
            ("db1", True),
        ]
        world = World("db1", "db2")
        world.driver.down.update(db1=too_many, db2=too_many)
        assert self.search(world, "db1 db2") == [
            ("db1", False),
            ("db2", False),
            ("db1", True),
            ("db2", True),
        ]
        assert len(world.told(ConnectFailed)) == 2
        assert world.states() == "closed closed"

    def test_next_tier_first(self) -> None:
        """As with a server that is full, the next tier goes before a wait."""
        endpoints = peers("db1", "db2", "db3")
        endpoints["db3"]["priority"] = 1
        world = World(peers=endpoints)
        assert self.search(world, "db1 db2") == [("db1", False), ("db2", False), ("db3", False)]

    def test_a_trial_may_wait(self) -> None:
        world = World("db1", "db2")
        world.open("db1")
        world.clock.advance(40)
        assert self.search(world, "db1") == [("db1", True)]

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
    def test_interrupt_before_pinned_leaves_no_pin(self, monkeypatch: pytest.MonkeyPatch) -> None:
        world = World("db1", "db2")

        def interrupt() -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(world.db.group, "invalidate", interrupt)
        with pytest.raises(KeyboardInterrupt), world.db.pinned():
            pass
        assert world.db.group.affinity.pin() is None

    def test_interrupt_within_pinned_leaves_no_pin(self) -> None:
        world = World("db1", "db2")
        with pytest.raises(KeyboardInterrupt), world.db.pinned():
            raise KeyboardInterrupt
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
    def test_suspect_comes_last_all_the_same(self, trials: str) -> None:
        world = World("db1", "db2")
        world.db.group.view()
        world.db.peers["db1"].breaker.suspect()
        assert world.db.connect(trials=trials).host == "db2"
        assert world.driver.hosts == ["db2"]

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

    @pytest.mark.parametrize("after", ["suspect", "open"])
    def test_peer_that_is_no_longer_available(self, after: str) -> None:
        world = World("db1", "db2")
        assert len(world.db.group.view().tiers[0]) == 2
        getattr(world.db.peers["db1"].breaker, after)()
        assert {world.db.connect(trials="last").host for _ in range(50)} == {"db2"}
        assert [p.name for tier in world.db.group.view().tiers for p in tier] == ["db2"]


class TestWaitingForATrial:
    """No candidate is left but a trial is under way: wait for it, look once more."""

    @staticmethod
    def on_wait(world: World, monkeypatch: pytest.MonkeyPatch, *steps: Any) -> list[Any]:
        """Make each wait for a trial do the next of ``steps``; note what was waited for."""
        waits: list[Any] = []
        left = list(steps)

        def wait(leases: Any, seconds: float) -> None:
            waits.append((len(leases), seconds))
            left.pop(0)()

        monkeypatch.setattr("django_proxysql.core.leases.Lease.wait_for_any", wait)
        return waits

    @pytest.mark.parametrize("how", ["open", "suspect"])
    def test_good_trial(self, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """Somebody's trial ends well: those who waited connect, and no caller sees an error."""
        world = World("db1")
        if how == "open":
            world.due("db1")
        else:
            world.db.peers["db1"].breaker.suspect()
        trial = world.trial("db1")
        waits = self.on_wait(world, monkeypatch, trial.succeeded)
        assert world.connect() == "db1"
        assert waits == [(1, 15)]

    def test_bad_trial(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Somebody's trial ends badly: those who waited get its error, and do not wait again."""
        world = World("db1")
        world.due("db1")
        trial = world.trial("db1")
        waits = self.on_wait(
            world, monkeypatch, lambda: trial.failed(bad_password(), Fault.REFUSED)
        )
        error = world.exhausted()
        assert "(1045, " in str(error)
        assert len(waits) == 1
        assert world.driver.hosts == []

    def test_next_trial_of_the_same_peer(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A peer whose trial has failed is not waited for again, though it is tried again."""
        world = World("db1")
        world.due("db1")
        breaker = world.db.peers["db1"].breaker
        trial = breaker.acquire()
        waits = self.on_wait(world, monkeypatch, lambda: trial.failed(refused_by_host()))
        view, others = world.db.group.view, []

        def while_another_begins() -> Any:
            if waits and not others:
                others.append(breaker.acquire(last_resort=0))
            return view()

        monkeypatch.setattr(world.db.group, "view", while_another_begins)
        error = world.exhausted()
        assert "being tried by another caller" in str(error)
        assert (len(waits), others[0].is_trial) == (1, True)

    def test_suspects_trial_released(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The one with the trial pressed Ctrl-C: the one who waited makes the trial, none loses."""
        world = World("db1")
        world.db.peers["db1"].breaker.suspect()
        trial = world.trial("db1")
        self.on_wait(world, monkeypatch, trial.released)
        assert world.connect() == "db1"

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

    def test_second_trial_is_waited_for_too(self, monkeypatch: pytest.MonkeyPatch) -> None:
        world = World("db1", breaker={"success_threshold": 2})
        breaker = world.db.peers["db1"].breaker
        world.due("db1")
        trials = [breaker.acquire()]

        def first() -> None:
            trials[0].succeeded()
            trials.append(breaker.acquire())

        waits = self.on_wait(world, monkeypatch, first, lambda: trials[1].succeeded())
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

    def test_one_fails_the_other_is_waited_for(self, monkeypatch: pytest.MonkeyPatch) -> None:
        world = World("db1", "db2")
        world.due("db1", "db2")
        bad, good = (peer.breaker.acquire() for peer in world.db.peers.values())
        waits = self.on_wait(
            world, monkeypatch, lambda: bad.failed(refused_by_host()), good.succeeded
        )
        assert world.connect() == "db2"
        assert [count for count, _ in waits] == [2, 1]

    def test_up_to_the_deadline(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A trial is waited for up to connect_deadline, and the error says who has it."""
        world = World("db1", connect_deadline=3)
        world.due("db1")
        world.trial("db1")
        waits = self.on_wait(world, monkeypatch, lambda: world.clock.advance(3))
        error = world.exhausted()
        assert "db1 (db1:3306): being tried by another caller, last error (2002, " in str(error)
        assert waits == [(1, 3)]

    def test_abandoned_trial_is_taken_over(self, monkeypatch: pytest.MonkeyPatch) -> None:
        world = World("db1", connect_deadline=10)
        world.due("db1")
        world.trial("db1")
        world.clock.advance(20)
        waits = self.on_wait(world, monkeypatch, lambda: world.clock.advance(1))
        assert world.connect() == "db1"
        assert waits == [(1, 1)]

    def test_16_callers_of_one_suspect_get_one_trial_and_no_error(self) -> None:
        world = World("db1")
        breaker = world.db.peers["db1"].breaker
        breaker.suspect()
        go = threading.Event()

        def first() -> None:
            world.driver.down.clear()
            assert go.wait(60)

        world.driver.down["db1"] = first
        got: list[str] = []
        with running(*[lambda: got.append(world.connect())] * 16):
            until(lambda: breaker.trial is not None and len(breaker.trial.bells) == 15)
            go.set()
        assert got == ["db1"] * 16

    def test_pinned_caller_waits_for_a_trial(self, monkeypatch: pytest.MonkeyPatch) -> None:
        world = World("db1", "db2")
        db1 = world.db.peers["db1"]
        db1.breaker.suspect()
        trial = db1.breaker.acquire()
        waits = self.on_wait(world, monkeypatch, trial.succeeded)
        with world.db.pinned(db1):
            assert world.connect() == "db1"
        assert len(waits) == 1

    def test_of_the_peer_one_stays_with_in_vain(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """If it fails the peer is tried once more for the one who stays, and then it is over."""
        world = World("db1", "db2")
        db1 = world.db.peers["db1"]
        world.driver.down["db1"] = refused_by_host
        db1.breaker.suspect()
        trial = db1.breaker.acquire()
        self.on_wait(world, monkeypatch, lambda: trial.failed(refused_by_host()))
        with world.db.pinned(db1), pytest.raises(NoPeerAvailable):
            world.connect()
        assert world.driver.hosts == ["db1"]

    def test_no_caller_waits_while_another_peer_is_usable(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        world = World("db1", "db2")
        world.due("db1")
        world.trial("db1")
        assert not self.on_wait(world, monkeypatch)
        assert world.connect() == "db2"


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

    def test_frozen_throw_away_connection_is_the_trial(self) -> None:
        world = World("db1")
        world.db._connect = as_mysqlclient(world.driver)
        world.open("db1")
        world.driver.down["db1"] = OperationalError(2013, "Lost connection")
        world.clock.advance(30)
        world.exhausted()
        assert len(world.driver.calls) == 1


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

    def test_all_circuits_open(self) -> None:
        """The time that is named is the time at which the peer is tried: the last resort's."""
        world = World("db1", name="reports", last_resort_interval=4)
        world.open("db1")
        world.clock.advance(1)
        assert str(raised_by(world.connect)) == (
            "No peer of 'reports' can be reached. db1 (db1:3306): circuit open, "
            f"last error {refused_by_host()}, next trial in 3 s."
        )

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

    def test_password_that_is_a_callable_is_called_at_each_attempt(self) -> None:
        passwords = iter("abc")
        world = World(peers={"db1": {"host": "db1", "password": lambda: next(passwords)}})
        world.db.connect()
        world.db.connect()
        assert [call["password"] for call in world.driver.calls] == ["a", "b"]

    def test_snapshot_says_what_is_known_and_asks_no_peer(self) -> None:
        world = World(
            peers={
                "db1": {"host": "db1", "port": 1, "weight": 2, "priority": 3},
                "db2": {"host": "db2"},
                "db3": {"unix_socket": "/s"},
            },
            breaker={"fail_max": 2},
        )
        world.open("db1")
        world.open("db1")
        world.db.peers["db2"].breaker.suspect("(2013, 'Lost')", Fault.LOST)
        world.clock.advance(10)
        one, two, three = world.db.snapshot()
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
        assert world.driver.calls == []

    def test_repr_names_peers_and_their_states(self) -> None:
        world = World("db1", "db2")
        world.open("db2")
        assert repr(world.db) == "<LoadBalancer 'default': db1 closed, db2 open>"
        assert repr(world.db.peers["db2"]) == "<Peer 'db2' db2:3306 open>"


class TestLogging:
    @pytest.fixture
    def lines(self, caplog: pytest.LogCaptureFixture) -> Any:
        caplog.set_level(logging.DEBUG, "django_proxysql")
        return lambda level: [
            record.getMessage() for record in caplog.records if record.levelno == level
        ]

    def test_opens_and_closes(self, lines: Any, caplog: pytest.LogCaptureFixture) -> None:
        """One WARNING when a circuit opens, one INFO when it closes; bad trials are quiet."""
        world = World("db1", "db2")
        world.driver.down["db1"] = refused_by_host
        world.connect()
        world.clock.advance(30)
        world.connect()
        world.clock.advance(30)
        world.driver.down.clear()
        world.connect()
        assert lines(logging.WARNING) == [
            f"default: circuit of db1 (db1:3306) opened, first trial in 30 s: {refused_by_host()}"
        ]
        assert lines(logging.INFO) == [
            "default: circuit of db1 (db1:3306) closed, the peer was out for 60.0 s"
        ]
        assert lines(logging.ERROR) == []
        opened = next(r for r in caplog.records if r.levelno == logging.WARNING)
        assert (opened.alias, opened.peer, opened.fault) == ("default", "db1", "unreachable")

    def test_each_connection_is_a_debug_line(self, lines: Any) -> None:
        world = World("db1", "db2")
        world.driver.down["db1"] = lambda: world.clock.advance(0.25)
        world.connect()
        world.due("db1")
        world.connect()
        assert lines(logging.DEBUG) == [
            "default: connected to db1 (db1:3306) in 250.0 ms",
            "default: connected to db1 (db1:3306) in 250.0 ms (trial)",
        ]

    def test_wrong_password_is_an_error_when_the_circuit_opens(self, lines: Any) -> None:
        world = World("db1", "db2")
        world.driver.down["db1"] = bad_password
        for _ in range(3):
            world.connect()
            world.clock.advance(30)
        (line,) = lines(logging.ERROR)
        assert line.startswith("default: circuit of db1 (db1:3306) opened, ")
        assert "the peer refuses us, (1045, " in line
        assert lines(logging.WARNING) == []

    def test_refusal_below_fail_max(self, lines: Any) -> None:
        """Below fail_max the first refusal is an ERROR too, for no circuit speaks of it yet."""
        world = World("db1", "db2", breaker={"fail_max": 5})
        world.driver.down["db1"] = bad_password
        for _ in range(3):
            world.connect()
        (line,) = lines(logging.ERROR)
        assert line.startswith("default: connecting to db1 (db1:3306) failed (refused): (1045, ")

    def test_a_suspect_that_is_well_is_no_line(self, lines: Any) -> None:
        world = World("db1")
        world.db.peers["db1"].breaker.suspect("lost", Fault.LOST)
        world.connect()
        assert len(lines(logging.DEBUG)) == 1
        assert not lines(logging.INFO) + lines(logging.WARNING) + lines(logging.ERROR)

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

    def test_below_fail_max(self) -> None:
        """A failed attempt says which in a row it was and whether it opened the circuit."""
        world = World("db1", "db2", breaker={"fail_max": 3})
        world.driver.down["db1"] = refused_by_host
        for _ in range(3):
            world.connect()
        failed = world.told(ConnectFailed)
        assert [(event.count, event.opened) for event in failed] == [
            (1, False),
            (2, False),
            (3, True),
        ]

    def test_listener_that_raises(self, caplog: pytest.LogCaptureFixture) -> None:
        """A listener that raises is logged; connect() and the other listeners go on."""
        world = World("db1", "db2")
        told: list[Any] = []

        def bad(event: Any) -> None:
            raise RuntimeError("listener")

        world.db.add_listener(bad)
        world.db.add_listener(told.append)
        world.driver.down["db1"] = refused_by_host
        assert world.connect() == "db2"
        assert told == world.events
        assert "A listener of 'default' raised" in caplog.text

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

    def test_listener_can_be_removed(self) -> None:
        world = World("db1")
        world.db.remove_listener(world.events.append)
        world.connect()
        assert world.events == []


class TestOpeningOne:
    def test_failing_check_closes_the_connection(self) -> None:
        def check(connection: Connection) -> None:
            if connection.host == "db1":
                raise NotReady("wsrep_ready is OFF")

        world = World("db1", "db2", ready_check=check)
        assert world.connect() == "db2"
        assert [connection.closed for connection in world.driver.made] == [True, False]
        assert world.db.peers["db1"].breaker.circuit.fault is Fault.NOT_READY
        assert world.db.peers["db1"].breaker.circuit.error == "wsrep_ready is OFF"

    @pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError()])
    def test_check_that_raises_anything_closes_the_connection(self, error: BaseException) -> None:
        def check(connection: Connection) -> None:
            raise error

        world = World("db1", ready_check=check)
        assert raised_by(world.connect) is error
        assert world.driver.made[0].closed

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


class TestConfiguration:
    @pytest.mark.parametrize(
        ("params", "address"),
        [
            ({"host": "10.0.0.1", "port": 3306}, "10.0.0.1:3306"),
            ({"host": "db"}, "db"),
            ({"port": 3307}, "localhost:3307"),
            ({"unix_socket": "/run/my.sock", "host": "x"}, "/run/my.sock"),
            ({"database": "/srv/db.sqlite3"}, "/srv/db.sqlite3"),
            ({}, ""),
        ],
        ids=str,
    )
    def test_address_is_as_people_write_it(self, params: dict[str, Any], address: str) -> None:
        db = LoadBalancer({"a": params}, Driver().connect)
        assert db.peers["a"].address == address
