"""How many statements are run again, by a clock that the test turns."""

from __future__ import annotations

import itertools
import os
import threading
import time
from functools import partial
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from django_proxysql.core.budget import (
    ALWAYS,
    CALLER_REMEMBERED,
    NOTE_EVERY,
    SHARE,
    STATEMENT_REMEMBERED,
    WINDOW,
    LossMemory,
    ReplayBudget,
)
from django_proxysql.registry import balancers
from tests.children import in_child
from tests.engine import SQLITE, Clock, engine, sqlite_peer
from tests.fakes import holding, running


class Used:
    """A budget, used as a cursor uses it."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.budget = ReplayBudget(self.clock)

    def run(self, number: int = 1, over: float = 0.0) -> None:
        """Run statements, evenly spread over some seconds."""
        for _ in range(number):
            self.clock.advance(over / number)
            self.budget.statements += 1
            if self.clock.now > self.budget.next_note:
                self.budget.note(self.clock.now)

    def spend_all(self) -> int:
        """Return how many replays are allowed now."""
        spent = 0
        while self.budget.spend(f"SELECT {spent}"):
            spent += 1
            assert spent < 1_000_000
        return spent


@pytest.fixture
def used() -> Used:
    return Used()


def test_replay_that_sends_several_costs_as_many(used: Used) -> None:
    assert used.budget.spend("SELECT 1", cost=9)
    assert used.budget.spend("SELECT 2", cost=5), "while anything is left"
    assert not used.budget.spend("SELECT 3")


@pytest.mark.parametrize(
    "steps",
    [
        # (statements, the seconds over which they are run, replays that are allowed then)
        pytest.param([(0, 0, 10), (0, 59, 0), (0, 1, 10)], id="ten are always allowed"),
        pytest.param(
            [(100, 0, 10), (100, 0, 10), (9, 0, 0), (1, 0, 1)], id="ten percent of the statements"
        ),
        # Replays and statements leave the minute together.
        pytest.param(
            [(10_000, 100, 600), (3_000, 30, 0), (3_000, 31, 600)],
            id="ten percent of the last minute",
        ),
        *(
            pytest.param([(10_000, 4, None), (0, NOTE_EVERY + pause, None), (1, 0, 10)], id=name)
            for name, pause in {
                "a pause leaves no share of what was before": WINDOW + 0.1,
                "nor does a longer one": 100,
                "nor one of hours": 10_000,
            }.items()
        ),
        # The statement that is lost was begun before the pause: it waited through it.
        pytest.param([(10_000, 4, None), (0, 66, 10)], id="a pause without a note at its end"),
        pytest.param([(1_000, 4, None), (0, 30, None), (1, 0, 100)], id="a short pause"),
    ],
)
def test_how_many_replays_are_allowed(
    used: Used, steps: list[tuple[int, float, int | None]]
) -> None:
    for statements, seconds, allowed in steps:
        if statements:
            used.run(statements, over=seconds)
        else:
            used.clock.advance(seconds)
        if allowed is not None:
            assert used.spend_all() == pytest.approx(allowed, rel=0.1 if allowed > 100 else 0)


def test_ten_a_minute_however_they_lie(used: Used) -> None:
    for _ in range(5):
        assert used.budget.spend("SELECT 1")
    used.clock.advance(40)
    assert used.spend_all() == 5
    used.clock.advance(20)
    assert used.spend_all() == 5


@settings(max_examples=200)
@given(
    st.lists(
        st.tuples(st.integers(min_value=1, max_value=300), st.floats(min_value=0.01, max_value=40)),
        max_size=30,
    )
)
def test_never_more_than_the_share(steps: list[tuple[int, float]]) -> None:
    used = Used()
    ran: list[float] = []
    replayed: list[float] = []
    for number, seconds in steps:
        for _ in range(number):
            used.run(1, over=seconds / number)
            ran.append(used.clock.now)
            if used.budget.spend("SELECT 1"):
                replayed.append(used.clock.now)
        now = used.clock.now
        last = [then for then in replayed if then > now - WINDOW]
        # What is allowed at one moment stays allowed; what it was allowed for may be a
        # minute older than the replay, and a note's distance.
        possible = [then for then in ran if then > now - 2 * WINDOW - 2 * NOTE_EVERY]
        assert len(last) <= max(ALWAYS, SHARE * len(possible))
        assert len(used.budget._notes) <= 2 * WINDOW / NOTE_EVERY + 3


class TestBarred:
    def test_for_a_minute_from_the_last_loss_on(self, used: Used) -> None:
        used.budget.bar("SELECT kills()")
        used.clock.advance(40)
        used.budget.bar("SELECT kills()")
        used.clock.advance(59.9)
        assert not used.budget.spend("SELECT kills()")
        assert used.budget.spend("SELECT 1")
        used.clock.advance(0.2)
        assert used.budget.spend("SELECT kills()")

    def test_costs_nothing(self, used: Used) -> None:
        used.budget.bar("SELECT kills()")
        for _ in range(20):
            used.budget.spend("SELECT kills()")
        assert used.spend_all() == 10

    def test_memory_is_bounded(self, used: Used) -> None:
        for number in range(5_000):
            used.budget.bar(f"SELECT {number}" + " " * 90_000)
        assert len(used.budget._barred) == 1_000
        assert not any(isinstance(key, str) for key in used.budget._barred)
        assert not used.budget.spend("SELECT 4999" + " " * 90_000)
        assert used.budget.spend("SELECT 3999" + " " * 90_000)

    def test_what_is_over_is_forgotten_in_its_turn(self, used: Used) -> None:
        used.budget.bar("SELECT 'again'")
        used.clock.advance(40)
        used.budget.bar("SELECT 'once'")
        used.clock.advance(10)
        used.budget.bar("SELECT 'again'")
        used.clock.advance(51)
        used.budget.bar("SELECT 'last'")
        assert len(used.budget._barred) == 2
        assert not used.budget.spend("SELECT 'again'")


def test_replays_are_bounded_by_the_share(used: Used) -> None:
    for _ in range(10):
        used.run(2_000, over=20)
        used.spend_all()
    assert len(used.budget._replays) <= 700


def test_threads_share_it(used: Used) -> None:
    used.run(1_000)
    barrier = threading.Barrier(8)
    allowed: list[int] = []

    def spend() -> None:
        barrier.wait()
        allowed.append(sum(used.budget.spend(f"SELECT {n}") for n in range(100)))

    with running(*[spend] * 8):
        pass
    assert sum(allowed) == 100


def test_barring_spending_and_noting_at_once_raise_nothing(used: Used) -> None:
    until = time.monotonic() + 0.5

    def use(mine: int) -> None:
        number = 0
        while time.monotonic() < until:
            number += 1
            used.budget.bar(f"SELECT {mine}, {number}")
            used.budget.spend(f"SELECT {mine}, {number - 1}")
            used.clock.advance(0.1)
            used.run()

    with running(*[partial(use, mine) for mine in range(4)]):
        pass


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform has no fork()")
def test_a_fork_while_it_is_held(tmp_path: Any) -> None:
    with engine([sqlite_peer(tmp_path / "db")], PEER_ENGINE=SQLITE) as connection:
        budget = balancers[connection.alias].group.budget
        budget.spend("SELECT 1")

        def child() -> int:
            allowed = sum(budget.spend("SELECT 1") for _ in range(20))
            budget.bar("SELECT 1")
            return allowed

        with holding(budget._lock):
            assert in_child(child) == "9"
        assert sum(budget.spend("SELECT 1") for _ in range(20)) == 9


#: Numbers of callers that no other has.
someone = itertools.count()


class TestLosses:
    """Which statements and callers have lost connections."""

    def test_a_statement_elsewhere(self) -> None:
        """Whichever thread runs it: the first peer that it was lost on stays its own."""
        losses = LossMemory(Clock())
        assert not losses.note("one", "SELECT 1", next(someone))
        assert not losses.note("one", "SELECT 1", next(someone))
        assert losses.note("two", "SELECT 1", next(someone))
        assert losses.note("two", "SELECT 1", next(someone))
        assert not losses.note("one", "SELECT 1", next(someone))
        assert not losses.note("two", "SELECT 2", next(someone))

    def test_a_caller_elsewhere(self) -> None:
        """Whatever it runs, and whether that is known or not."""
        losses, caller = LossMemory(Clock()), next(someone)
        assert not losses.note("one", "SELECT 1", caller)
        assert losses.note("two", "SELECT 2", caller)
        assert losses.note("two", None, caller)
        assert not losses.note("one", None, caller)

    def test_forgets_in_time(self) -> None:
        """A caller is forgotten sooner than a statement; each loss renews it."""
        clock = Clock()
        losses, caller = LossMemory(clock), next(someone)
        losses.note("one", "SELECT 1", caller)
        clock.advance(CALLER_REMEMBERED + 1)
        assert not losses.note("two", "SELECT 2", caller)
        clock.advance(STATEMENT_REMEMBERED - CALLER_REMEMBERED - 2)
        assert losses.note("two", "SELECT 1", next(someone))
        clock.advance(STATEMENT_REMEMBERED - 1)
        assert losses.note("two", "SELECT 1", next(someone))
        clock.advance(STATEMENT_REMEMBERED + 1)
        assert not losses.note("two", "SELECT 1", next(someone))

    def test_memory_is_bounded(self) -> None:
        clock = Clock()
        losses = LossMemory(clock)
        for number in range(3000):
            losses.note("one", f"SELECT {number}", next(someone))
        assert len(losses._statements) == len(losses._callers) == 1000
        assert losses.note("two", "SELECT 2999", next(someone))
        assert not losses.note("two", "SELECT 0", next(someone))
        clock.advance(STATEMENT_REMEMBERED + 1)
        losses.note("one", "SELECT 1", next(someone))
        assert len(losses._statements) == len(losses._callers) == 1

    @pytest.mark.parametrize("statement", [b"SELECT 1", ["SELECT 1"], {"SELECT": 1}])
    def test_statements_that_are_no_text(self, statement: Any) -> None:
        """psycopg's are objects, some of which have no hash."""
        losses = LossMemory(Clock())
        assert not losses.note("one", statement, next(someone))
        assert losses.note("two", statement, next(someone))

    def test_under_threads(self) -> None:
        losses = LossMemory(Clock())
        seen: list[bool] = []

        def lose() -> None:
            seen.extend(losses.note("one", f"SELECT {n % 7}", next(someone)) for n in range(2000))

        with running(*[lose] * 4):
            pass
        assert seen == [False] * 8000
