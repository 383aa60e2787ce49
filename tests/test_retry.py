"""retrying_atomic: what is run again, and what never is."""

from __future__ import annotations

import threading
import unittest
from collections.abc import Iterator
from typing import Any

import pytest
from django.db import IntegrityError, OperationalError, connections, transaction
from django.db.transaction import TransactionManagementError
from django.test import TestCase
from django.test.utils import setup_test_environment, teardown_test_environment

from django_proxysql import CommitOutcomeUnknown, retrying_atomic
from tests.engine import SQLITE, engine, sqlite_peer
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


@pytest.mark.parametrize("attempts", [1, 2])
def test_gives_up(here: Site, attempts: int) -> None:
    runs: list[int] = []

    @retrying_atomic(here.connection.alias, attempts=attempts)
    def work() -> None:
        runs.append(1)
        here.write("one")
        here.kill()
        here.read()

    with pytest.raises(OperationalError):
        work()
    assert len(runs) == attempts
    assert here.written() == []


def test_deadlock(here: Site) -> None:
    """Two transactions that wait for each other: one is the victim, and is run again."""
    alias = here.connection.alias
    here.write("left")
    here.write("right")
    ids = dict(here.sql("SELECT value, id FROM app_token"))
    both = threading.Barrier(2)
    runs: list[str] = []
    failures: list[BaseException] = []

    def work(first: str, second: str) -> None:
        with connections[alias].cursor() as cursor:
            runs.append(first)
            cursor.execute(
                f"UPDATE app_token SET value = %s WHERE id = {ids[first]}", [first + "!"]
            )
            if len(runs) <= 2:
                both.wait(10)
            cursor.execute(
                f"UPDATE app_token SET value = %s WHERE id = {ids[second]}", [second + "!"]
            )

    def run(*args: str) -> None:
        try:
            retrying_atomic(alias)(work)(*args)
        except BaseException as exc:
            failures.append(exc)
        finally:
            connections[alias].close()

    threads = [
        threading.Thread(target=run, args=args, daemon=True)
        for args in (("left", "right"), ("right", "left"))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert failures == []
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


def test_conflict_at_commit(postgres: Any, fault_proxy: Any) -> None:
    """The answer to COMMIT is a CONFLICT: undone for certain, and so run again."""
    with site(postgres, fault_proxy) as here:
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

    result = unittest.TestResult()
    setup_test_environment()
    try:
        unittest.TestSuite([Case()]).run(result)
    finally:
        teardown_test_environment()
    assert result.wasSuccessful(), result.errors + result.failures
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
    assert retrying_atomic(lambda: connections["default"].in_atomic_block)() is True


def test_bad_use() -> None:
    async def coroutine() -> None: ...

    def generator() -> Iterator[int]:
        yield 1

    for function in (coroutine, generator):
        with pytest.raises(TypeError, match="after the block has ended"):
            retrying_atomic(function)
    for attempts in (0, -1, 1.5, True, "3"):
        with pytest.raises(ValueError, match="attempts must be an int of at least 1"):
            retrying_atomic(attempts=attempts)  # type: ignore[call-overload]
