"""retrying_atomic: what is run again, and what never is."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import tenacity
from django.db import IntegrityError, OperationalError, connections, transaction
from django.db.transaction import TransactionManagementError
from django.test import TestCase

from django_proxysql import CommitOutcomeUnknown, NoPeerAvailable, retrying_atomic, signals
from django_proxysql.core.events import BlockRetried, CommitResolved, PeersExhausted
from tests.engine import SQLITE, engine, make_outcome_table, mysql_peer, run_case, sqlite_peer
from tests.fakes import running
from tests.site import Site, site

CUTS = ["before", "after", "reply"]


class Writer:
    """Writes a token at each run, and counts its runs and its hook's."""

    def __init__(self, here: Site) -> None:
        self.here = here
        self.runs = 0
        self.hooks = 0

    def __call__(self) -> str:
        self.runs += 1
        transaction.on_commit(self.hook, self.here.connection.alias)
        self.here.write(f"run {self.runs}")
        self.here.write(f"run {self.runs}, again")
        return f"result {self.runs}"

    def hook(self) -> None:
        self.hooks += 1

    def retrying(self, **options: Any) -> Any:
        return retrying_atomic(self.here.connection.alias, **options)(self)


@pytest.mark.parametrize("kind", CUTS)
def test_lost_before_commit(here: Site, kind: str) -> None:
    writer = Writer(here)
    here.sql("SELECT 1")
    here.cut(kind, 3)
    assert writer.retrying()() == "result 2"
    assert here.written() == ["run 2", "run 2, again"]
    assert writer.hooks == 1


@pytest.mark.parametrize("kind", CUTS)
def test_lost_with_commit(here: Site, kind: str) -> None:
    """The outcome is unknown: whatever became of it, it is not done twice."""
    writer = Writer(here)
    here.sql("SELECT 1")
    here.cut(kind, 4)
    with pytest.raises(CommitOutcomeUnknown):
        writer.retrying()()
    assert writer.runs == 1
    assert here.written() == ([] if kind == "before" else ["run 1", "run 1, again"])
    assert writer.hooks == 0


def test_socket_dead_before_commit(here: Site) -> None:
    """COMMIT was never sent: known to be rolled back, and so run again."""
    writer = Writer(here)
    deaths = iter([here.kill])

    @retrying_atomic(using=here.connection.alias)
    def work() -> None:
        writer()
        next(deaths, lambda: None)()

    work()
    assert here.written() == ["run 2", "run 2, again"]
    assert writer.hooks == 1


class Loser:
    """Writes, and loses its connection at each run."""

    def __init__(self, here: Site) -> None:
        self.here = here
        self.runs = 0

    def __call__(self) -> None:
        self.runs += 1
        self.here.write("one")
        self.here.kill()
        self.here.read()


@pytest.mark.parametrize("attempts", [1, 2])
def test_gives_up(here: Site, attempts: int) -> None:
    loser = Loser(here)
    with pytest.raises(OperationalError):
        retrying_atomic(here.connection.alias, attempts=attempts)(loser)()
    assert loser.runs == attempts
    assert here.written() == []


def test_a_wait_strategy_is_asked_after_each_run(
    on_mariadb: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It knows which run it was, what ended it, and how long was waited before."""
    asked: list[Any] = []
    slept: list[float] = []
    monkeypatch.setattr("django_proxysql.retry.time.sleep", slept.append)

    def strategy(state: tenacity.RetryCallState) -> float:
        asked.append((state.attempt_number, type(state.outcome.exception()), state.idle_for))
        return 10.0

    for wait in (strategy, tenacity.wait_incrementing(1, 1)):
        with pytest.raises(OperationalError):
            retrying_atomic(on_mariadb.connection.alias, wait=wait)(Loser(on_mariadb))()
    assert asked == [(1, OperationalError, 0), (2, OperationalError, 10)]
    assert slept == [10, 10, 1, 2]
    assert on_mariadb.written() == []


class TestWithoutPeers:
    """What it does while no peer can be reached."""

    def gone(self, here: Site) -> None:
        for proxy in here.proxies:
            proxy.refuse()
            proxy.drop_connections()

    def test_it_waits_for_a_peer(self, here: Site, monkeypatch: pytest.MonkeyPatch) -> None:
        writer, waits = Writer(here), iter(range(6))

        def sleep(seconds: float) -> None:
            assert 0 <= seconds <= 1
            if next(waits) == 5:
                for proxy in here.proxies:
                    proxy.forward()
            here.clock.advance(31)

        monkeypatch.setattr("django_proxysql.retry.time.sleep", sleep)
        self.gone(here)
        assert writer.retrying(attempts=1)() == "result 1"
        assert list(waits) == []
        assert here.written() == ["run 1", "run 1, again"]

    def test_peers_that_go_during_a_run_use_up_one_attempt(
        self, here: Site, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def sleep(seconds: float) -> None:
            here.clock.advance(31)
            if here.events and type(here.events[-1]) is PeersExhausted:
                for proxy in here.proxies:
                    proxy.forward()

        monkeypatch.setattr("django_proxysql.retry.time.sleep", sleep)
        writer = Writer(here)
        falls = iter([lambda: self.gone(here)])

        @retrying_atomic(here.connection.alias, attempts=2)
        def work() -> None:
            writer()
            next(falls, lambda: None)()
            here.read()

        work()
        assert (writer.runs, writer.hooks) == (2, 1)
        assert here.written() == ["run 2", "run 2, again"]

    def test_it_gives_up_at_its_bound(
        self, on_mariadb: Site, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        now = [100.0]
        monkeypatch.setattr("django_proxysql.retry.time.monotonic", lambda: now[0])
        slept: list[float] = []

        def sleep(seconds: float) -> None:
            slept.append(seconds)
            now[0] += seconds

        monkeypatch.setattr("django_proxysql.retry.time.sleep", sleep)
        self.gone(on_mariadb)
        alias = on_mariadb.connection.alias
        with pytest.raises(NoPeerAvailable):
            retrying_atomic(alias, wait_for_peer=5)(pytest.fail)("it ran")
        assert 4.9 < sum(slept) < 5.1
        with pytest.raises(NoPeerAvailable):
            retrying_atomic(alias, wait_for_peer=0)(pytest.fail)("it ran")

    def test_peers_that_lose_each_block_as_it_begins_are_no_longer_waited_for(
        self, on_mariadb: Site, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """They let the client in, and the function never runs: that uses up no attempt."""
        now = [100.0]
        monkeypatch.setattr("django_proxysql.retry.time.monotonic", lambda: now[0])

        def lose() -> None:
            for proxy in on_mariadb.proxies:
                proxy.disarm()
                for _ in range(4):
                    proxy.cut_before(b"autocommit=0")

        def sleep(seconds: float) -> None:
            assert now[0] < 105, "it goes on for ever"
            now[0] += seconds
            on_mariadb.clock.advance(31)
            lose()

        monkeypatch.setattr("django_proxysql.retry.time.sleep", sleep)
        lose()
        with pytest.raises(OperationalError):
            retrying_atomic(on_mariadb.connection.alias, wait_for_peer=5)(pytest.fail)("it ran")
        assert now[0] > 104.9

    def test_a_refusal_is_raised_at_once(self, on_mariadb: Site) -> None:
        """A wrong password does not get better by waiting."""
        on_mariadb.connection.close()
        on_mariadb.connection.settings_dict["PASSWORD"] = "wrong"
        with pytest.raises(OperationalError, match="Access denied"):
            retrying_atomic(on_mariadb.connection.alias)(pytest.fail)("it ran")


@pytest.mark.parametrize("when", ["in the function", "while it waits"])
def test_ctrl_c_ends_it_at_once(
    on_mariadb: Site, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    loser = Loser(on_mariadb)

    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    if when == "while it waits":
        monkeypatch.setattr("django_proxysql.retry.time.sleep", interrupt)
    else:
        monkeypatch.setattr(on_mariadb, "kill", interrupt)
    with pytest.raises(KeyboardInterrupt):
        retrying_atomic(on_mariadb.connection.alias)(loser)()
    assert loser.runs == 1
    assert not on_mariadb.connection.in_atomic_block
    assert on_mariadb.written() == []


def test_each_run_after_the_first_is_an_event(here: Site, receive: Any) -> None:
    """It is called before the run's block begins: a receiver may write to the database."""
    told: list[BlockRetried] = []

    def note(event: Any, **kwargs: Any) -> None:
        told.append(event)
        here.write(f"told of run {event.run}")

    receive(signals.block_retried, note)
    with pytest.raises(OperationalError):
        retrying_atomic(here.connection.alias)(Loser(here))()
    assert [(event.function, event.run) for event in told] == [
        ("tests.test_retry.Loser", 2),
        ("tests.test_retry.Loser", 3),
    ]
    assert all(event.error for event in told)
    assert here.written() == ["told of run 2", "told of run 3"]


def test_deadlock(here: Site) -> None:
    """Two transactions that wait for each other: one is the victim, and is run again."""
    alias = here.connection.alias
    here.write("left")
    here.write("right")
    ids = dict(here.sql("SELECT value, id FROM app_token"))
    both = threading.Barrier(2)
    runs: list[str] = []

    def work(first: str, second: str) -> None:
        with connections[alias].cursor() as cursor:
            runs.append(first)
            cursor.execute(
                f"UPDATE app_token SET value = %s WHERE id = {ids[first]}", [first + "!"]
            )
            if len(runs) <= 2:
                both.wait(60)
            cursor.execute(
                f"UPDATE app_token SET value = %s WHERE id = {ids[second]}", [second + "!"]
            )

    def run(*args: str) -> None:
        try:
            retrying_atomic(alias)(work)(*args)
        finally:
            connections[alias].close()

    with running(lambda: run("left", "right"), lambda: run("right", "left")):
        pass
    assert len(runs) == 3
    assert here.read() == ["left!", "right!"]


def test_serialization_failure(postgres: Any, fault_proxy: Any) -> None:
    """PostgreSQL says 40001, at the statement or at COMMIT; both are run again."""
    with site(postgres, fault_proxy) as here:
        here.write("one")
        runs: list[int] = []

        @retrying_atomic(using=here.connection.alias)
        def work() -> None:
            runs.append(1)
            with here.connection.cursor() as cursor:
                cursor.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
                cursor.execute("SELECT count(*) FROM app_token")
                if len(runs) == 1:
                    with here.plain.cursor() as other:
                        other.execute("UPDATE app_token SET value = 'other'")
                cursor.execute("UPDATE app_token SET value = value || '!'")

        work()
        assert len(runs) == 2
        assert here.written() == ["other!"]


@pytest.mark.parametrize("outcome", [None, "record"])
def test_conflict_at_commit(postgres: Any, fault_proxy: Any, outcome: str | None) -> None:
    """The answer to COMMIT is a CONFLICT: undone for certain, and so run again, without asking."""
    with site(postgres, fault_proxy, COMMIT_OUTCOME=outcome) as here:
        make_outcome_table(here.plain)
        runs: list[int] = []
        alias = here.connection.alias

        @retrying_atomic(using=alias)
        def work() -> None:
            runs.append(1)
            with here.connection.cursor() as cursor:
                cursor.execute("SET TRANSACTION ISOLATION LEVEL SERIALIZABLE")
                cursor.execute("SELECT count(*) FROM app_token")
                cursor.execute("INSERT INTO app_token (value) VALUES ('mine')")
                if len(runs) == 1:
                    with transaction.atomic("plain"), here.plain.cursor() as other:
                        other.execute("SET TRANSACTION ISOLATION LEVEL SERIALIZABLE")
                        other.execute("SELECT count(*) FROM app_token")
                        other.execute("INSERT INTO app_token (value) VALUES ('other')")

        work()
        assert len(runs) == 2
        assert sorted(here.written()) == ["mine", "other"]
        assert not [event for event in here.events if type(event) is CommitResolved]


@pytest.mark.parametrize("statement", ["COMMIT", "CREATE TABLE IF NOT EXISTS split (a int)"])
@pytest.mark.parametrize("how", ["loss", "conflict"])
def test_a_block_of_which_a_part_may_stand_is_not_run_again(
    here: Site, how: str, statement: str
) -> None:
    """What came before MySQL's DDL, or a COMMIT by hand, would stand twice."""
    splits = here.is_mysql or statement == "COMMIT"
    runs: list[int] = []

    @retrying_atomic(here.connection.alias)
    def work() -> None:
        runs.append(1)
        here.write(f"run {len(runs)}")
        here.sql(statement)
        here.write(f"run {len(runs)}, again")
        if len(runs) > 1:
            return
        if how == "loss":
            here.kill()
            here.read()
        elif here.is_mysql:
            here.sql("SIGNAL SQLSTATE '40001' SET MYSQL_ERRNO = 1213")
        else:
            here.sql("SELECT conflicts()")

    if not here.is_mysql:
        here.plainly(
            "CREATE OR REPLACE FUNCTION conflicts() RETURNS int LANGUAGE plpgsql"
            " AS $$ BEGIN RAISE EXCEPTION SQLSTATE '40001'; END $$"
        )
    with pytest.raises(OperationalError) if splits else contextlib.nullcontext():
        work()
    here.connection.close()
    here.plainly("DROP TABLE IF EXISTS split")
    if not here.is_mysql:
        here.plainly("DROP FUNCTION conflicts")
    assert here.written() == (["run 1"] if splits else ["run 2", "run 2, again"])


def test_a_block_with_a_temporary_table_is_run_again(on_mariadb: Site) -> None:
    """MySQL commits nothing there."""
    here, runs = on_mariadb, []

    @retrying_atomic(here.connection.alias)
    def work() -> None:
        runs.append(1)
        here.write(f"run {len(runs)}")
        here.sql("CREATE TEMPORARY TABLE passing (a int)")
        if len(runs) == 1:
            here.kill()
        here.sql("DROP TEMPORARY TABLE passing")

    work()
    assert here.written() == ["run 2"]


@pytest.mark.parametrize("how", ["loss", "loss of COMMIT", "conflict"])
def test_an_error_of_another_alias_is_raised(here: Site, how: str) -> None:
    """What was sent there may stand."""
    second = "a second balancer of the same server"
    settings = {"PEER_ENGINE": here.connection.settings_dict["PEER_ENGINE"]}
    peers = [mysql_peer(proxy) for proxy in here.proxies]
    with engine(peers, alias=second, CONN_MAX_AGE=None, **settings) as other:
        runs: list[int] = []

        def say(statement: str) -> None:
            with other.cursor() as cursor:
                cursor.execute(statement)

        @retrying_atomic(here.connection.alias)
        def work() -> None:
            runs.append(1)
            here.write("mine")
            if how == "conflict":
                raises = (
                    "SIGNAL SQLSTATE '40001' SET MYSQL_ERRNO = 1213"
                    if here.is_mysql
                    else "DO $$ BEGIN RAISE SQLSTATE '40001'; END $$"
                )
                say("INSERT INTO app_token (value) VALUES ('theirs')")
                say(raises)
            say("SELECT 1")
            with contextlib.nullcontext() if how == "loss" else transaction.atomic(second):
                say("SELECT 2")
                proxy = next(one for one in here.proxies if str(one.port) in other.peer.address)
                if how == "loss":
                    proxy.cut_after()
                say("INSERT INTO app_token (value) VALUES ('theirs')")
                # What is sent after it is COMMIT.
                proxy.cut_after()

        with pytest.raises(OperationalError):
            work()
        assert runs == [1]
        other.close()
        assert here.written() == ["theirs"]


def test_other_errors(here: Site) -> None:
    """What would happen again is not tried again."""
    here.write("run 1, again")
    writer = Writer(here)
    with pytest.raises(IntegrityError):
        writer.retrying()()
    assert writer.runs == 1
    with pytest.raises(KeyError):
        retrying_atomic(here.connection.alias)(lambda: {}["nonesuch"])()


def test_a_hook_that_raises_a_conflict(here: Site) -> None:
    """COMMIT succeeded: the same class of exception out of a hook repeats nothing."""
    alias = here.connection.alias
    runs: list[int] = []

    def hook() -> None:
        # A transaction of its own, which is lost before its COMMIT.
        with transaction.atomic(alias):
            here.write("hook")
            here.kill()
            here.read()

    @retrying_atomic(using=alias)
    def work() -> None:
        runs.append(1)
        here.write("one")
        transaction.on_commit(hook, alias)

    with pytest.raises(OperationalError):
        work()
    assert runs == [1]
    assert here.written() == ["one"]


def test_inside_another_block(on_mariadb: Site) -> None:
    writer = Writer(on_mariadb)
    told = pytest.raises(TransactionManagementError, match=r"on 'balanced'.*ATOMIC_REQUESTS")
    with transaction.atomic(on_mariadb.connection.alias), told:
        writer.retrying()()
    assert writer.runs == 0


def test_inside_a_test_case(on_mariadb: Site) -> None:
    """In the blocks of a TestCase it runs once, in a savepoint."""
    writer = Writer(on_mariadb)

    class Case(TestCase):
        databases = frozenset({on_mariadb.connection.alias})

        def runTest(self) -> None:
            assert writer.retrying()() == "result 1"
            with pytest.raises(IntegrityError):
                retrying_atomic(on_mariadb.connection.alias)(on_mariadb.write)("run 1")
            # Only the savepoint was rolled back.
            assert on_mariadb.read() == ["run 1", "run 1, again"]

    run_case(Case)
    assert on_mariadb.written() == []


def test_ways_to_write_it(tmp_path: Any) -> None:
    path = tmp_path / "db"
    with engine([sqlite_peer(path)], alias="default", PEER_ENGINE=SQLITE) as connection:

        @retrying_atomic
        def plainly(number: int) -> int:
            """Say so."""
            assert connection.in_atomic_block
            return number

        @retrying_atomic(attempts=2)
        def with_options(number: int) -> int:
            assert connection.in_atomic_block
            return number

        assert plainly(1) == 1
        assert plainly.__doc__ == "Say so."
        assert with_options(number=2) == 2
        assert retrying_atomic(lambda: connection.in_atomic_block)() is True


def test_another_engine() -> None:
    """With a plain engine it is atomic()."""
    runs: list[bool] = []

    def work() -> None:
        runs.append(connections["default"].in_atomic_block)
        raise OperationalError("database is locked")

    with pytest.raises(OperationalError, match="locked"):
        retrying_atomic(work)()
    assert runs == [True]


def test_bad_use() -> None:
    async def coroutine() -> None: ...

    async def asynchronous_generator() -> Any:
        yield 1

    def generator() -> Iterator[int]:
        yield 1

    for function in (coroutine, asynchronous_generator, generator):
        with pytest.raises(TypeError, match="after the block has ended"):
            retrying_atomic(function)
    with pytest.raises(TypeError, match="wait must be a wait strategy of tenacity's"):
        retrying_atomic(wait=1)  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="wait_for_peer must be seconds"):
        retrying_atomic(wait_for_peer="1")  # type: ignore[call-overload]
    for seconds in (-1, float("nan")):
        with pytest.raises(ValueError, match="wait_for_peer must not be negative"):
            retrying_atomic(wait_for_peer=seconds)
    for attempts in (0, -1, 1.5, True, "3"):
        with pytest.raises(ValueError, match="attempts must be an int of at least 1"):
            retrying_atomic(attempts=attempts)  # type: ignore[call-overload]
