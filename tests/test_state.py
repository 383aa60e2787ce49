"""The records of a connection's health and of a transaction: every transition from every state."""

from __future__ import annotations

import ast
import itertools
from pathlib import Path

import pytest

from django_proxysql.backends.state import NO_TRANSACTION, Health, Life, Stage, Transaction
from django_proxysql.core.holdings import Holdings

TRANSITIONS = ["statement_sent", "only_savepoints_sent", *list(Stage)[1:]]

#: Where a transition leads, where it does not lead to the same stage from everywhere.
LEADS_TO = {
    ("statement_sent", Stage.BEGUN): Stage.ACTIVE,
    ("only_savepoints_sent", Stage.ACTIVE): Stage.BEGUN,
    **{
        (Stage.ROLLED_BACK, stage): Stage.ROLLED_BACK
        for stage in (Stage.BEGUN, Stage.ACTIVE, Stage.COMMITTING, Stage.ROLLED_BACK)
    },
}
ALWAYS = {stage: stage for stage in Stage if stage is not Stage.ROLLED_BACK}


def take(transaction: Transaction, transition: str | Stage) -> None:
    if isinstance(transition, Stage):
        transaction.to(transition)
    else:
        getattr(transaction, transition)()


@pytest.mark.parametrize("transition", TRANSITIONS)
@pytest.mark.parametrize("stage", Stage)
def test_every_transition_from_every_stage(transition: str | Stage, stage: Stage) -> None:
    expected = stage
    if stage is not Stage.NONE:
        expected = ALWAYS.get(transition, LEADS_TO.get((transition, stage), stage))
    transaction = Transaction(by_hand=False, stage=stage)
    take(transaction, transition)
    assert transaction.stage is expected


def test_what_is_in_a_transactions_place_never_changes() -> None:
    for transition in TRANSITIONS:
        take(NO_TRANSACTION, transition)
    NO_TRANSACTION.savepoint_made("a")
    NO_TRANSACTION.savepoint_restored("a")
    assert NO_TRANSACTION.stage is Stage.NONE
    assert not NO_TRANSACTION.savepoints
    assert not NO_TRANSACTION.undone


@pytest.mark.parametrize(("by_hand", "stage"), [*itertools.product([False, True], Stage)])
def test_what_a_stage_says_of_its_transaction(by_hand: bool, stage: Stage) -> None:
    """An atomic block begins again before anything was sent; a COMMIT that was may stand."""
    transaction = Transaction(by_hand, stage)
    assert transaction.is_pending is (stage is Stage.BEGUN and not by_hand)
    assert transaction.is_of_atomic is (stage is not Stage.NONE and not by_hand)
    assert transaction.may_stand is (stage in (Stage.COMMITTING, Stage.COMMITTED, Stage.UNKNOWN))
    assert transaction.has_ended is (
        stage in (Stage.COMMITTED, Stage.ROLLED_BACK, Stage.NOT_DONE, Stage.UNKNOWN)
    )


def test_a_transaction_that_was_split_may_stand_in_part() -> None:
    transaction = Transaction(by_hand=False)
    assert not transaction.may_stand
    transaction.is_whole = False
    transaction.to(Stage.NOT_DONE)
    assert transaction.may_stand


def test_a_rollback_does_not_make_an_unknown_commit_known() -> None:
    transaction = Transaction(by_hand=False)
    for stage in (Stage.ACTIVE, Stage.COMMITTING, Stage.UNKNOWN, Stage.ROLLED_BACK):
        transaction.to(stage)
    assert transaction.may_stand


def test_a_new_record_knows_nothing_of_the_one_before() -> None:
    before = Transaction(by_hand=True, hooks=3)
    before.savepoint_made("a")
    before.statement_sent()
    before.mark = 7
    after = Transaction(by_hand=True)
    assert (after.stage, after.hooks, after.mark) == (Stage.BEGUN, 0, None)
    assert not after.savepoints


@pytest.mark.parametrize(
    ("done", "left"),
    [
        (["made a", "made b"], ["a", "b"]),
        (["made a", "made b", "released b"], ["a"]),
        (["made a", "made b", "released a"], []),
        (["made a", "made b", "restored a"], ["a"]),
        (["made a", "made b", "restored b", "released b"], ["a"]),
        (["released a"], []),
        (["restored a"], []),
    ],
)
def test_a_transaction_begun_anew_makes_the_savepoints_that_are_left(
    done: list[str], left: list[str]
) -> None:
    transaction = Transaction(by_hand=False)
    for step in done:
        what, sid = step.split()
        getattr(transaction, f"savepoint_{what}")(sid)
    assert transaction.savepoints == left


def healths() -> list[Health]:
    """One record in each state that transitions lead to."""
    ways = itertools.product(
        (False, True), (False, True), ("works", "leaving", "lost", "error raised")
    )
    made = []
    for distrusted, doubted, life in ways:
        health = Health(poll=bool)
        if distrusted:
            health.distrust()
        if doubted:
            health.doubt()
        if life == "leaving":
            health.leave("not ready")
        elif life != "works":
            health.lose("gone")
            if life == "error raised":
                health.raised()
        made.append(health)
    return made


STEPS = {
    "leave": ("later",),
    "lose": ("later",),
    "raised": (),
    "not_raised": (),
    "doubt": (),
    "distrust": (),
    "trust": (bool,),
}


@pytest.mark.parametrize("step", STEPS)
def test_no_transition_leads_to_an_illegal_health(step: str) -> None:
    for health in healths():
        before = health.life
        getattr(health, step)(*STEPS[step])
        assert health.dead is (health.life in (Life.LOST, Life.ERROR_RAISED))
        if health.dead:
            assert health.poll is None, "its number may be another connection's by now"
            assert not health.unsure
            assert not health.doubted
        if before in (Life.LOST, Life.ERROR_RAISED):
            assert health.dead, "what is lost stays lost"
            assert health.error == "gone", "what ended it is said, and nothing that came later"


def test_only_a_loss_is_raised() -> None:
    for health in healths():
        was_dead = health.dead
        health.raised()
        assert health.error_raised is was_dead
        health.not_raised()
        assert not health.error_raised
        assert health.dead is was_dead


def test_health_and_holdings_are_written_by_their_own_transitions_alone() -> None:
    """No other code of the engine assigns to what these records keep."""
    backends = Path(__file__).parent.parent / "django_proxysql" / "backends"
    for path in backends.rglob("*.py"):
        if path.name == "state.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                kept = (*Health.__slots__, *Holdings.__slots__)
                assert node.attr not in kept, f"{path.name}:{node.lineno}"
