"""What became of a COMMIT: tokens, verdicts and which peers to ask, without a server."""

from __future__ import annotations

import itertools
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from django_proxysql.backends.decisions import writes_token
from django_proxysql.backends.state import Stage
from django_proxysql.core import outcome
from django_proxysql.core.outcome import Answer, Candidate, Outcome, Refusal, Tokens
from django_proxysql.core.statements import ENDS, STATE, scan
from django_proxysql.core.texts import may_end
from tests.fakes import running

DOCS = Path(__file__).parent.parent / "docs" / "explanation" / "exactly-once.rst"


class TestTokens:
    def test_each_is_a_uuid_of_version_7_and_tells_its_time(self) -> None:
        token = uuid.UUID(bytes=Tokens(clock=lambda: 1_700_000_000.123).next())
        assert (token.version, token.variant) == (7, uuid.RFC_4122)
        assert token.int >> 80 == 1_700_000_000_123

    @pytest.mark.parametrize("times", [[5.0] * 9000, [9.0, 3.0, 1.0, 8.0, 0.0, 9.5, 9.4]])
    def test_they_grow_also_when_the_clock_stands_or_goes_back(self, times: list[float]) -> None:
        tokens = Tokens(clock=iter(times).__next__)
        made = [tokens.next() for _ in times]
        assert made == sorted(set(made))

    def test_threads_get_no_token_twice(self) -> None:
        tokens, made = Tokens(clock=lambda: 1.0), []
        with running(*[lambda: made.extend(tokens.next() for _ in range(500))] * 4):
            pass
        assert len(set(made)) == 2000

    def test_a_parent_and_its_child_differ_by_chance_alone(self) -> None:
        """Both go on from one count, and the clock may stand."""
        parent, child = Tokens(clock=lambda: 1.0), Tokens(clock=lambda: 1.0)
        assert parent.next() != child.next()
        same = Tokens(clock=lambda: 1.0, random=bytes), Tokens(clock=lambda: 1.0, random=bytes)
        assert same[0].next() == same[1].next()


class TestWhenATokenIsWritten:
    @pytest.mark.parametrize("stage", Stage)
    def test_in_atomic_blocks_of_one_transaction_that_did_more_than_read(
        self, stage: Stage
    ) -> None:
        for enabled, by_hand, is_whole, only_read in itertools.product([False, True], repeat=4):
            written = writes_token(
                enabled=enabled,
                stage=stage,
                by_hand=by_hand,
                is_whole=is_whole,
                only_read=only_read,
            )
            expected = (enabled, by_hand, is_whole, only_read) == (True, False, True, False)
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


class TestVerdict:
    @pytest.mark.parametrize(
        ("answer", "expected"),
        [
            (Answer.INSERTED, Outcome.ROLLED_BACK),
            # A fence's own answer may be lost, and another process may have asked as well.
            (Answer.FENCE_STANDS, Outcome.ROLLED_BACK),
            (Answer.COMMIT_STANDS, Outcome.COMMITTED),
            (Answer.UNFIT, Outcome.UNKNOWN),
            (Answer.NONE, None),
        ],
    )
    def test_by_the_answer(self, answer: Answer, expected: Outcome | None) -> None:
        assert outcome.verdict(answer, age=20) is expected

    @pytest.mark.parametrize("answer", Answer)
    def test_a_token_that_may_have_been_deleted_proves_nothing(self, answer: Answer) -> None:
        assert outcome.verdict(answer, age=outcome.LEAST_AGE / 2) is Outcome.UNKNOWN


class TestWhoIsAsked:
    def test_every_combination(self) -> None:
        circuits = [(True, False), (True, True), (False, False)]
        for states in itertools.product(circuits, repeat=3):
            peers = [Candidate(name, *state) for name, state in zip("abc", states)]
            for ran_on in "abc":
                assert outcome.peers_to_ask(peers, ran_on, synchronous=False) == [ran_on]
            asked = outcome.peers_to_ask(peers, "a", synchronous=True)
            assert sorted(asked) == list("abc")
            # Where another peer knows the answer, one whose circuit is open is left alone.
            doubts = [
                (not peer.closed, peer.suspect)
                for name in asked
                for peer in peers
                if peer.name == name
            ]
            assert doubts == sorted(doubts)


class Peers:
    """Peers that answer as a script says, and clocks that go by what the questions take."""

    def __init__(self, *answers: Answer, takes: float = 0.0, names: str = "ab") -> None:
        self.answers: Iterator[Answer] = iter(answers)
        self.takes, self.names = takes, names
        self.now = 100.0
        self.asked: list[tuple[str, float]] = []
        self.slept: list[float] = []

    def ask(self, name: str, seconds: float) -> Answer:
        self.asked.append((name, seconds))
        self.now += min(self.takes, seconds)
        return next(self.answers, Answer.NONE)

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds

    def outcome(self, seconds: float = 10, wall: Callable[[], float] = lambda: 100.0) -> Outcome:
        return outcome.ask_until(
            lambda: list(self.names),
            self.ask,
            seconds,
            (100.0, 100.0),
            clock=lambda: self.now,
            wall=wall,
            sleep=self.sleep,
        )


class TestAskUntil:
    def test_the_first_peer_that_can_tell_ends_it(self) -> None:
        peers = Peers(Answer.NONE, Answer.NONE, Answer.COMMIT_STANDS)
        assert peers.outcome() is Outcome.COMMITTED
        assert [name for name, _ in peers.asked] == ["a", "b", "a"]
        assert len(peers.slept) == 1

    def test_the_deadline_bounds_all_questions_together(self) -> None:
        peers = Peers(takes=2)
        assert peers.outcome() is Outcome.UNKNOWN
        assert peers.now <= 110
        assert all(seconds <= 2 for _, seconds in peers.asked)

    def test_with_no_peer_to_ask_it_waits_and_looks_again(self) -> None:
        peers = Peers(names="")
        assert peers.outcome() is Outcome.UNKNOWN
        assert peers.slept == sorted(peers.slept)
        assert 9 < sum(peers.slept) < 10

    def test_it_waits_as_gevent_has_it_wait_that_came_after_the_import(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As with gunicorn's ``--preload``: else each wait would stop all greenlets."""
        peers = Peers(Answer.NONE, Answer.COMMIT_STANDS, names="a")
        monkeypatch.setattr("time.sleep", peers.sleep)
        sent = time.monotonic(), time.time()
        found = outcome.ask_until(lambda: ["a"], peers.ask, 10, sent)
        assert found is Outcome.COMMITTED
        assert len(peers.slept) == 1

    def test_a_process_that_was_stopped_for_long_knows_nothing(self) -> None:
        """Its own clock may have stood with it; the time of day has not."""
        peers = Peers(Answer.INSERTED)
        assert peers.outcome(wall=lambda: 100 + outcome.LEAST_AGE) is Outcome.UNKNOWN


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

    def test_by_the_age_that_a_token_tells(self) -> None:
        tokens = Tokens(clock=iter([1e9 - 7200, 1e9 - 7199.9, 1e9]).__next__)
        old, young, new = tokens.next(), tokens.next(), tokens.next()
        bound = outcome.oldest_kept(1e9 + 0.05, 7200)
        assert old < bound <= young < new


@pytest.mark.skipif(not DOCS.exists(), reason="the docs are not here")
@pytest.mark.parametrize("vendor", ["mysql", "postgresql"])
def test_docs_show_the_table_as_it_is_made(vendor: str) -> None:
    shown = " ".join(DOCS.read_text(encoding="utf-8").split())
    assert outcome.creates(vendor).replace("IF NOT EXISTS ", "") + ";" in shown
