"""What became of a COMMIT: tokens, and how long is asked, without a server."""

from __future__ import annotations

import itertools
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from django_proxysql.backends.decisions import writes_token
from django_proxysql.backends.state import Stage
from django_proxysql.core import outcome
from django_proxysql.core.outcome import Outcome, Refusal, Tokens
from django_proxysql.core.statements import ENDS, STATE, may_end, scan
from tests.fakes import running

DOCS = Path(__file__).parent.parent / "docs" / "explanation" / "exactly-once.rst"


class Clocks:
    """In the place of the module ``time``: clocks that stand, but for sleep()."""

    def __init__(self) -> None:
        self.now = 100.0
        self.times: Iterator[float] = itertools.repeat(100.0)
        self.slept: list[float] = []

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return next(self.times)

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


@pytest.fixture
def clocks(monkeypatch: pytest.MonkeyPatch) -> Clocks:
    made = Clocks()
    monkeypatch.setattr(outcome, "time", made)
    return made


class TestTokens:
    def test_each_is_a_uuid_of_version_7_and_tells_its_time(self, clocks: Clocks) -> None:
        clocks.times = iter([1_700_000_000.123])
        token = uuid.UUID(bytes=Tokens().next())
        assert (token.version, token.variant) == (7, uuid.RFC_4122)
        assert token.int >> 80 == 1_700_000_000_123

    @pytest.mark.parametrize("times", [[5.0] * 9000, [9.0, 3.0, 1.0, 8.0, 0.0, 9.5, 9.4]])
    def test_they_grow_also_when_the_clock_stands_or_goes_back(
        self, clocks: Clocks, times: list[float]
    ) -> None:
        clocks.times, tokens = iter(times), Tokens()
        made = [tokens.next() for _ in times]
        assert made == sorted(set(made))

    def test_threads_get_no_token_twice(self, clocks: Clocks) -> None:
        tokens, made = Tokens(), []
        with running(*[lambda: made.extend(tokens.next() for _ in range(500))] * 4):
            pass
        assert len(set(made)) == 2000

    def test_a_parent_and_its_child_differ_by_chance_alone(
        self, clocks: Clocks, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Both go on from one count, and the clock may stand."""
        assert Tokens().next() != Tokens().next()
        monkeypatch.setattr(outcome.os, "urandom", bytes)
        assert Tokens().next() == Tokens().next()


class TestWhenATokenIsWritten:
    @pytest.mark.parametrize("stage", Stage)
    def test_in_atomic_blocks_of_one_transaction_that_did_more_than_read(
        self, stage: Stage
    ) -> None:
        for by_hand, is_whole, only_read in itertools.product([False, True], repeat=3):
            expected = (by_hand, is_whole, only_read) == (False, True, False)
            written = writes_token(stage, by_hand, is_whole, only_read)
            assert written == (expected and stage is Stage.ACTIVE)

    @pytest.mark.parametrize(
        ("sql", "mysql", "postgresql"),
        [
            ("INSERT INTO a VALUES (1)", False, False),
            ("SAVEPOINT a", False, False),
            ("ROLLBACK TO SAVEPOINT a", False, False),
            ("rollback work to a", False, False),
            ("SET foreign_key_checks = 0", False, False),
            ("SET TRANSACTION READ ONLY", False, False),
            ("SET autocommit = 1", True, False),
            ("SET PASSWORD = 'x'", True, False),
            ("SET STATEMENT max_statement_time = 1 FOR DROP TABLE a", True, False),
            ("CREATE TABLE a (b int)", True, False),
            ("ALTER TABLE a ADD c int", True, False),
            ("CREATE TEMPORARY TABLE a (b int)", False, False),
            ("drop temporary table a", False, False),
            ("CREATE TABLE temporary_table (b int)", True, False),
            ("TRUNCATE a", True, False),
            ("LOCK TABLES a WRITE", True, False),
            ("ANALYZE TABLE a", True, False),
            ("GRANT SELECT ON a TO b", True, False),
            ("SET DEFAULT ROLE a", True, False),
            ("SET ROLE a", False, False),
            ("COMMIT", True, True),
            ("ROLLBACK", True, True),
            ("BEGIN", True, True),
            ("START TRANSACTION", True, True),
            ("CALL a()", True, True),
            ("PREPARE TRANSACTION 'a'", True, True),
            ("UPDATE a SET b = 1; COMMIT", True, True),
            (b"CREATE TABLE a (b int)", True, False),
            ("/*! COMMIT */", True, True),
            (object(), True, True),
        ],
    )
    def test_not_after_what_may_have_ended_the_transaction(
        self, sql: object, mysql: bool, postgresql: bool
    ) -> None:
        assert (may_end(sql, "mysql"), may_end(sql, "postgresql")) == (mysql, postgresql)
        if mysql or postgresql:
            # Else nothing asks.
            assert scan(sql) & (STATE | ENDS)


class Peers:
    """Peers that answer as a script says, while the clocks go by what the questions take."""

    def __init__(
        self, clocks: Clocks, *answers: Outcome | None, takes: float = 0.0, names: str = "ab"
    ) -> None:
        self.clocks, self.answers = clocks, iter(answers)
        self.takes, self.names = takes, names
        self.asked: list[tuple[str, float]] = []

    def ask(self, name: str, seconds: float) -> Outcome | None:
        self.asked.append((name, seconds))
        self.clocks.now += min(self.takes, seconds)
        return next(self.answers, None)

    def outcome(self) -> Outcome:
        return outcome.ask_until(lambda: self.names, self.ask, 10, (100.0, 100.0))


class TestAskUntil:
    @pytest.mark.parametrize("found", Outcome)
    def test_the_first_peer_that_can_tell_ends_it(self, clocks: Clocks, found: Outcome) -> None:
        peers = Peers(clocks, None, None, found)
        assert peers.outcome() is found
        assert [name for name, _ in peers.asked] == ["a", "b", "a"]
        assert len(clocks.slept) == 1

    def test_the_deadline_bounds_all_questions_together(self, clocks: Clocks) -> None:
        peers = Peers(clocks, takes=2)
        assert peers.outcome() is Outcome.UNKNOWN
        assert clocks.now <= 110
        assert all(seconds <= 2 for _, seconds in peers.asked)

    def test_with_no_peer_to_ask_it_waits_and_looks_again(self, clocks: Clocks) -> None:
        assert Peers(clocks, names="").outcome() is Outcome.UNKNOWN
        assert clocks.slept == sorted(clocks.slept)
        assert 9 < sum(clocks.slept) < 10

    def test_it_ends_though_the_clock_stands(self, clocks: Clocks) -> None:
        """As an application's tests have it stand."""
        clocks.sleep = clocks.slept.append  # type: ignore[method-assign]
        assert Peers(clocks).outcome() is Outcome.UNKNOWN
        assert 9 < sum(clocks.slept) <= 10

    def test_it_waits_as_gevent_has_it_wait_that_came_after_the_import(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As with gunicorn's ``--preload``: else each wait would stop all greenlets."""
        answers, slept = iter([None, Outcome.COMMITTED]), []
        monkeypatch.setattr("time.sleep", slept.append)
        sent = time.monotonic(), time.time()
        found = outcome.ask_until(lambda: "a", lambda *_: next(answers), 10, sent)
        assert found is Outcome.COMMITTED
        assert len(slept) == 1

    def test_a_process_that_was_stopped_for_long_knows_nothing(self, clocks: Clocks) -> None:
        """Its own clock may have stood with it; the time of day has not."""
        clocks.times = itertools.repeat(100 + outcome.LEAST_AGE)
        assert Peers(clocks, Outcome.ROLLED_BACK).outcome() is Outcome.UNKNOWN

    @pytest.mark.parametrize("found", [None, *Outcome])
    def test_a_token_that_may_have_been_deleted_proves_nothing(self, found: Outcome | None) -> None:
        age = outcome.LEAST_AGE / 2
        assert outcome.verdict(found, age) is Outcome.UNKNOWN
        assert outcome.verdict(found, age - 1) is found


class TestRefusals:
    @pytest.mark.parametrize(
        ("code", "text", "expected"),
        [
            (1062, "Duplicate entry '\\x01' for key 'PRIMARY'", Refusal.FENCED),
            (1146, "Table 'app.django_proxysql_commit' doesn't exist", Refusal.MISSING),
            (1146, "Table 'app.other' doesn't exist", None),
            (1142, "INSERT command denied … for table `django_proxysql_commit`", Refusal.DENIED),
            ("23505", 'unique constraint "django_proxysql_commit_pkey"', Refusal.FENCED),
            # A deferred constraint of the application's, checked at COMMIT.
            ("23505", 'unique constraint "app_token_value_key"', None),
            ("42P01", 'relation "public.django_proxysql_commit" does not exist', Refusal.MISSING),
            ("42501", "permission denied for table django_proxysql_commit", Refusal.DENIED),
            (2013, "Lost connection", None),
            (None, "django_proxysql_commit", None),
        ],
    )
    def test_what_an_error_says_of_the_token(
        self, code: object, text: str, expected: Refusal | None
    ) -> None:
        assert outcome.refusal(code, text) is expected


class TestDeleting:
    def test_a_token_that_may_be_in_doubt_is_kept(self) -> None:
        for seconds in (0, -1, outcome.LEAST_AGE - 1, float("nan")):
            with pytest.raises(ValueError, match="in doubt"):
                outcome.oldest_kept(1e9, seconds)

    def test_by_the_age_that_a_token_tells(self, clocks: Clocks) -> None:
        clocks.times, tokens = iter([1e9 - 7200, 1e9 - 7199.9, 1e9]), Tokens()
        old, young, new = tokens.next(), tokens.next(), tokens.next()
        bound = outcome.oldest_kept(1e9 + 0.05, 7200)
        assert old < bound <= young < new


@pytest.mark.skipif(not DOCS.exists(), reason="the docs are not here")
@pytest.mark.parametrize("vendor", ["mysql", "postgresql"])
def test_docs_show_the_table_as_it_is_made(vendor: str) -> None:
    shown = " ".join(DOCS.read_text(encoding="utf-8").split())
    assert outcome.creates(vendor).replace("IF NOT EXISTS ", "") + ";" in shown
