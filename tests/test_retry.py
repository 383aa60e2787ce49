"""retrying_atomic, retrying_request and its middleware: what is run again, and what never is."""

from __future__ import annotations

import contextlib
import importlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import tenacity
from django.db import IntegrityError, OperationalError, connections, transaction
from django.db.transaction import TransactionManagementError
from django.test import TestCase

from django_proxysql import CommitOutcomeUnknown, NoPeerAvailable, retrying_atomic, signals
from django_proxysql.core import drivers
from django_proxysql.core.events import BlockRetried, CommitResolved, PeersExhausted
from tests.engine import SQLITE, engine, make_outcome_table, mysql_peer, run_case, sqlite_peer
from tests.fakes import running
from tests.servers import DATABASE
from tests.site import Site, site
from tests.work import Work, run_by

EVERY_WAY = pytest.mark.parametrize("way", ["function", "decorator", "middleware"])


@pytest.fixture(params=["mariadb", "postgres"])
def here(request: pytest.FixtureRequest, fault_proxy: Callable[..., Any]) -> Iterator[Site]:
    server = request.getfixturevalue(request.param)
    with site(server, fault_proxy, ATOMIC_REQUESTS=True) as made:
        yield made


def conflict(here: Site, connection: Any = None) -> None:
    """Have the server answer as to a deadlock, or to a serialization failure."""
    statement = "SIGNAL SQLSTATE '40001' SET MYSQL_ERRNO = 1213"
    if not here.is_mysql:
        # A DO may end the transaction, as far as its text tells.
        statement = "SELECT conflicts()"
        here.plainly(
            "CREATE FUNCTION conflicts() RETURNS int LANGUAGE plpgsql"
            " AS $$ BEGIN RAISE EXCEPTION SQLSTATE '40001'; END $$"
        )
    try:
        with (connection or here.connection).cursor() as cursor:
            cursor.execute(statement)
    finally:
        if not here.is_mysql:
            here.plainly("DROP FUNCTION conflicts")


@EVERY_WAY
@pytest.mark.parametrize("how", ["before", "after", "reply", "socket dead at COMMIT"])
def test_work_is_run_again_after_a_loss_before_its_commit(
    here: Site, receive: Any, way: str, how: str
) -> None:
    """A socket that is dead before COMMIT is sent: known to be rolled back."""
    told = receive(signals.block_retried)
    is_at_end = how == "socket dead at COMMIT"
    work = Work(here, lose=here.kill if is_at_end else lambda: here.cut(how), at_end=is_at_end)
    assert run_by(way, work, here).content == b"result 2"
    work.stands_once(2)
    assert [(sent["alias"], sent["run"]) for sent in told] == [(here.connection.alias, 2)]
    assert told[0]["function"] == "tests.work.Work"


@pytest.mark.parametrize(
    ("how", "at_end", "stands"),
    [
        ("before", True, []),
        ("after", True, ["run 1", "run 1, again"]),
        ("after", False, ["run 2", "run 2, again"]),
    ],
    ids=["COMMIT not sent", "COMMIT sent", "before COMMIT"],
)
def test_a_loss_over_tls(
    mariadb_tls: Any, fault_proxy: Any, how: str, at_end: bool, stands: list[str]
) -> None:
    """The client's library has other words for it there."""
    with site(mariadb_tls, fault_proxy) as here:
        work = Work(here, lose=lambda: here.cut(how), at_end=at_end)
        with pytest.raises(CommitOutcomeUnknown) if at_end else contextlib.nullcontext():
            work.retrying()
        assert work.runs == 2 - at_end
        assert here.written() == stands


def hook_is_lost(here: Site) -> None:
    """Have a hook lose a transaction of its own before its COMMIT."""

    def hook() -> None:
        with transaction.atomic(here.connection.alias):
            here.write("hook")
            here.kill()
            here.read()

    transaction.on_commit(hook, here.connection.alias)


def other_error(here: Site) -> None:
    raise KeyError


def other_error_in_a_later_run(here: Site) -> None:
    if here.losses():
        raise KeyError
    here.kill()


WHOLE = ["run 1", "run 1, again"]

#: What ends the work for good, in its middle or AT_END: what happens, the error, how often it was
#: run, and what stands.
AT_END = True
ENDS: dict[str, tuple[bool, Callable[[Site], object], type[Exception], int, list[str]]] = {
    "COMMIT that has not arrived": (
        *(AT_END, lambda here: here.cut("before"), CommitOutcomeUnknown, 1, []),
    ),
    "COMMIT that was not answered": (
        *(AT_END, lambda here: here.cut("after"), CommitOutcomeUnknown, 1, WHOLE),
    ),
    "COMMIT that was half answered": (
        *(AT_END, lambda here: here.cut("reply"), CommitOutcomeUnknown, 1, WHOLE),
    ),
    "a hook's own loss": (AT_END, hook_is_lost, OperationalError, 1, WHOLE),
    "what would come again": (False, lambda here: here.write("run 1"), IntegrityError, 1, []),
    "another error": (False, other_error, KeyError, 1, []),
    "another error of a later run": (False, other_error_in_a_later_run, KeyError, 2, []),
    "the last attempt": (False, Site.kill, OperationalError, 3, []),
}


@EVERY_WAY
@pytest.mark.parametrize("end", ENDS)
def test_work_is_not_run_again_after(here: Site, way: str, end: str) -> None:
    """Whatever became of a COMMIT, nothing is done twice."""
    at_end, lose, error, runs, stands = ENDS[end]
    work = Work(here, losses=9, lose=lambda: lose(here), at_end=at_end)
    with pytest.raises(error):
        run_by(way, work, here)
    assert (work.runs, here.written()) == (runs, stands)
    assert work.hooks == ([1] if lose is hook_is_lost else [])


@EVERY_WAY
@pytest.mark.parametrize(
    "statement",
    ["SELECT 1", "COMMIT", "CREATE TABLE split (a int)", "CREATE TEMPORARY TABLE split (a int)"],
)
@pytest.mark.parametrize("how", ["loss", "conflict"])
def test_work_of_which_a_part_may_stand_is_not_run_again(
    here: Site, how: str, statement: str, way: str
) -> None:
    """What came before MySQL's DDL, or a COMMIT by hand, would stand twice."""
    splits = statement == "COMMIT" or (here.is_mysql and statement.startswith("CREATE TABLE"))

    def lose() -> None:
        here.sql(statement)
        if how == "loss":
            here.kill()
        else:
            conflict(here)

    work = Work(here, lose=lose)
    try:
        if splits:
            with pytest.raises(OperationalError):
                run_by(way, work, here)
            assert (work.runs, here.written()) == (1, ["run 1"])
        else:
            run_by(way, work, here)
            work.stands_once(2)
    finally:
        here.connection.close()
        here.plainly("DROP TABLE IF EXISTS split")


def test_a_composed_statement_is_no_reason_against_another_run(on_postgres: Site) -> None:
    database: Any = on_postgres.connection.Database
    sql = importlib.import_module(f"{database.__name__}.sql")
    composed = sql.SQL("INSERT INTO {} (value) VALUES ('x')").format(sql.Identifier("app_token"))

    def lose() -> None:
        on_postgres.sql(composed)
        conflict(on_postgres)

    work = Work(on_postgres, lose=lose)
    work.retrying()
    work.stands_once(2)


@pytest.mark.parametrize(
    ("statement", "runs"),
    [("SELECT 1", 2), ("COMMIT", 1), ("CREATE TABLE split (a int)", 1), ("CALL", 1)],
)
def test_with_a_driver_that_is_not_looked_after_a_part_that_may_stand_is_seen(
    on_mariadb: Site, monkeypatch: pytest.MonkeyPatch, statement: str, runs: int
) -> None:
    """MySQL Connector/Python's connections are not; a conflict is one all the same."""
    monkeypatch.setattr(drivers.mysql, "WATCHED", False)
    on_mariadb.connection.close()
    on_mariadb.server.sql("CREATE OR REPLACE PROCEDURE commits() COMMIT", database=DATABASE)

    def lose() -> None:
        if statement == "CALL":
            with on_mariadb.connection.cursor() as cursor:
                cursor.callproc("commits")
        else:
            on_mariadb.sql(statement)
        conflict(on_mariadb)

    work = Work(on_mariadb, lose=lose)
    try:
        with pytest.raises(OperationalError) if runs == 1 else contextlib.nullcontext():
            work.retrying()
        assert work.runs == runs
        assert on_mariadb.plain_rows() == (["run 1"] if runs == 1 else ["run 2", "run 2, again"])
    finally:
        on_mariadb.connection.close()
        on_mariadb.plainly("DROP TABLE IF EXISTS split")
        on_mariadb.plainly("DROP PROCEDURE commits")


@EVERY_WAY
def test_in_a_test_case_work_runs_once_in_a_savepoint(here: Site, way: str) -> None:
    work = Work(here, losses=0)

    class Case(TestCase):
        databases = frozenset({here.connection.alias})

        def runTest(self) -> None:
            run_by(way, work, here)
            with pytest.raises(IntegrityError):
                run_by(way, lambda *_: here.write("run 1"), here)
            # Only the savepoint was rolled back.
            assert here.read() == WHOLE

    run_case(Case)
    assert (work.runs, here.written()) == (1, [])


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
            Work(on_mariadb, losses=3).retrying(wait=wait)
    assert asked == [(1, OperationalError, 0), (2, OperationalError, 10)]
    assert slept == [10, 10, 1, 2]
    assert on_mariadb.written() == []


class TestWithoutPeers:
    """What it does while no peer can be reached."""

    def gone(self, here: Site) -> None:
        for proxy in here.proxies:
            proxy.refuse()
            proxy.drop_connections()

    def back(self, here: Site) -> None:
        for proxy in here.proxies:
            proxy.forward()

    def test_it_waits_for_a_peer(self, here: Site, monkeypatch: pytest.MonkeyPatch) -> None:
        work, waits = Work(here, losses=0), iter(range(6))

        def sleep(seconds: float) -> None:
            assert 0 <= seconds <= 1
            if next(waits) == 5:
                self.back(here)
            here.clock.advance(31)

        monkeypatch.setattr("django_proxysql.retry.time.sleep", sleep)
        self.gone(here)
        assert work.retrying(attempts=1) == "result 1"
        assert list(waits) == []
        work.stands_once(1)

    def test_peers_that_go_during_a_run_use_up_one_attempt(
        self, here: Site, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def sleep(seconds: float) -> None:
            here.clock.advance(31)
            if here.events and type(here.events[-1]) is PeersExhausted:
                self.back(here)

        monkeypatch.setattr("django_proxysql.retry.time.sleep", sleep)
        work = Work(here, lose=lambda: self.gone(here))
        work.retrying(attempts=2)
        work.stands_once(2)

    @pytest.mark.parametrize("how", ["refuse", "lose each block as it begins"])
    @pytest.mark.parametrize("bound", [5, 0])
    def test_it_gives_up_at_its_bound(
        self, on_mariadb: Site, monkeypatch: pytest.MonkeyPatch, how: str, bound: int
    ) -> None:
        """Also where peers let the client in: the function never runs, which uses up no attempt."""
        now = [100.0]
        monkeypatch.setattr("django_proxysql.retry.time.monotonic", lambda: now[0])

        def lose() -> None:
            if how == "refuse":
                self.gone(on_mariadb)
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
        alias = on_mariadb.connection.alias
        with pytest.raises(NoPeerAvailable if how == "refuse" else OperationalError):
            retrying_atomic(alias, wait_for_peer=bound)(pytest.fail)("it ran")
        assert bound - 0.1 < now[0] - 100 < bound + 0.1

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
    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("django_proxysql.retry.time.sleep", interrupt)
    work = Work(on_mariadb, lose=interrupt if when == "in the function" else None)
    with pytest.raises(KeyboardInterrupt):
        work.retrying()
    assert work.runs == 1
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
        Work(here, losses=3).retrying()
    assert [event.run for event in told] == [2, 3]
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

    def work(*names: str) -> None:
        runs.append(names[0])
        is_first_run = len(runs) <= 2
        for name in names:
            with connections[alias].cursor() as cursor:
                cursor.execute(f"UPDATE app_token SET value = '{name}!' WHERE id = {ids[name]}")
            if is_first_run and name is names[0]:
                both.wait(60)

    def run(*names: str) -> None:
        try:
            retrying_atomic(alias)(work)(*names)
        finally:
            connections[alias].close()

    with running(lambda: run("left", "right"), lambda: run("right", "left")):
        pass
    assert len(runs) == 3
    assert here.read() == ["left!", "right!"]


@pytest.mark.parametrize("outcome", [None, "record"])
def test_conflict_at_commit(postgres: Any, fault_proxy: Any, outcome: str | None) -> None:
    """The answer to COMMIT is a CONFLICT: undone for certain, and so run again, without asking."""
    with site(postgres, fault_proxy, COMMIT_OUTCOME=outcome) as here:
        make_outcome_table(here.plain)
        runs: list[int] = []

        def meets(connection: Any, value: str) -> None:
            with connection.cursor() as cursor:
                cursor.execute("SET TRANSACTION ISOLATION LEVEL SERIALIZABLE")
                cursor.execute("SELECT count(*) FROM app_token")
                cursor.execute("INSERT INTO app_token (value) VALUES (%s)", [value])

        @retrying_atomic(using=here.connection.alias)
        def work() -> None:
            runs.append(1)
            meets(here.connection, "mine")
            if len(runs) == 1:
                with transaction.atomic("plain"):
                    meets(here.plain, "other")

        work()
        assert len(runs) == 2
        assert sorted(here.written()) == ["mine", "other"]
        assert not [event for event in here.events if type(event) is CommitResolved]


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
                say("INSERT INTO app_token (value) VALUES ('theirs')")
                conflict(here, other)
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


@pytest.mark.parametrize("way", ["function", "decorator"])
@pytest.mark.parametrize(
    ("begun", "told"),
    [
        ("block", r"called inside an atomic block on 'balanced'.*ATOMIC_REQUESTS"),
        ("by hand", "called on 'balanced' while autocommit is off"),
    ],
)
def test_in_another_transaction_it_is_refused(here: Site, way: str, begun: str, told: str) -> None:
    work = Work(here)
    with contextlib.ExitStack() as stack:
        if begun == "block":
            stack.enter_context(transaction.atomic(here.connection.alias))
        else:
            here.connection.set_autocommit(False)
        with pytest.raises(TransactionManagementError, match=told):
            run_by(way, work, here)
    assert work.runs == 0


def test_ways_to_write_it(tmp_path: Any) -> None:
    path = tmp_path / "db"
    with engine([sqlite_peer(path)], alias="default", PEER_ENGINE=SQLITE) as connection:

        def in_block(number: int) -> tuple[int, bool]:
            """Say so."""
            return number, connection.in_atomic_block

        for decorate in (retrying_atomic, retrying_atomic(attempts=2), retrying_atomic("default")):
            decorated = decorate(in_block)
            assert decorated(number=1) == (1, True)
            assert decorated.__doc__ == "Say so."


def test_another_engine() -> None:
    """With a plain engine it is atomic()."""
    runs: list[bool] = []

    def work() -> None:
        runs.append(connections["default"].in_atomic_block)
        raise OperationalError("database is locked")

    with pytest.raises(OperationalError, match="locked"):
        retrying_atomic(work)()
    assert runs == [True]


async def coroutine() -> None: ...


async def asynchronous_generator() -> Any:
    yield 1


def generator() -> Iterator[int]:
    yield 1


@pytest.mark.parametrize("function", [coroutine, asynchronous_generator, generator])
def test_what_runs_after_its_block_has_ended_is_refused(function: Any) -> None:
    with pytest.raises(TypeError, match="after the block has ended"):
        retrying_atomic(function)


class Asynchronous:
    async def __call__(self) -> None: ...


@pytest.mark.parametrize("function", [Asynchronous(), lambda: coroutine()])
def test_a_coroutine_that_a_function_returns_is_refused(function: Any) -> None:
    with pytest.raises(TypeError, match="after the block has ended"):
        retrying_atomic(function)()


@pytest.mark.parametrize(
    ("wrong", "error", "match"),
    [
        ({"using": 1}, TypeError, "using must be an alias"),
        ({"wait": 1}, TypeError, "wait must be a wait strategy of tenacity's"),
        ({"wait_for_peer": "1"}, TypeError, "wait_for_peer must be seconds"),
        ({"wait_for_peer": True}, TypeError, "wait_for_peer must be seconds"),
        ({"wait_for_peer": -1}, ValueError, "wait_for_peer must not be negative"),
        ({"wait_for_peer": float("nan")}, ValueError, "wait_for_peer must not be negative"),
        *[
            ({"attempts": attempts}, ValueError, "attempts must be an int of at least 1")
            for attempts in (0, -1, 1.5, True, "3")
        ],
    ],
)
def test_bad_use(wrong: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        retrying_atomic(**wrong)
