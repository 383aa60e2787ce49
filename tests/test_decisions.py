"""Every rule of safety, beside the line that holds it; every combination, against an oracle.

The oracles here say the rules in their own words. None of them imports the code's constants or
looks at how it decides.
"""

from __future__ import annotations

import importlib
import inspect
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from django_proxysql.backends.decisions import (
    After,
    Answer,
    Cause,
    How,
    Leave,
    Lost,
    Pinned,
    Place,
    Replay,
    Situation,
    Verdict,
    Why,
    after_error,
    after_read_only,
    loss_counts,
    may_count_as_committed,
    may_leave,
    may_replace,
    may_replay,
    may_restart,
    must_catch_up,
    must_raise_loss,
)
from django_proxysql.core.faults import Fault, Judgement
from django_proxysql.core.texts import Text

#: Each rule's number on the page, and what holds it.
RULES = {
    "1": ["backends.decisions:may_replace", "backends.decisions:may_leave"],
    "2": ["core.holdings:Holdings", "backends.decisions:must_raise_loss"],
    "3": ["backends.losses:is_lost", "backends.state:Health"],
    "4": ["core.faults:Proof", "backends.losses:did_not_run"],
    "5": ["core.texts:text_of"],
    "6": ["backends.decisions:may_replace", "backends.statements:raise_lost_results"],
    "7": ["backends.state:Transaction.is_pending", "backends.decisions:may_restart"],
    "8": ["backends.replays:cause_of"],
    "9": ["backends.transactions:send_commit", "backends.decisions:may_count_as_committed"],
    "10": ["backends.state:Transaction.may_stand", "retry:begins_again"],
    "11": ["backends.replacing:bind", "backends.wrapper:ErrorHook"],
    "12": ["backends.decisions:must_catch_up", "core.ready:catch_up"],
    "13": ["core.budget:ReplayBudget"],
    "14": ["backends.decisions:may_leave"],
    "15a": ["backends.losses:notice_unseen", "backends.statements:unseen"],
    "15b": ["backends.wrapper:follow"],
    "15c": ["backends.replays:run_read_only", "backends.decisions:may_replay"],
    "15d": ["backends.decisions:loss_counts", "core.budget:LossMemory"],
}
PAGE = Path(__file__).parent.parent / "docs" / "explanation" / "established.rst"


@pytest.mark.parametrize("rule", RULES)
def test_each_rule_names_the_code_that_holds_it(rule: str) -> None:
    for place in RULES[rule]:
        module, _, name = place.partition(":")
        thing: Any = importlib.import_module(f"django_proxysql.{module}")
        for part in name.split("."):
            thing = getattr(thing, part)


def test_the_page_lists_every_rule_beside_its_code() -> None:
    text = PAGE.read_text()
    table = text[text.index("Safety rules\n") : text.index("Which statements are run again\n")]
    rows = table.split("   * - ")[2:]
    listed = {row.split("\n")[0]: re.findall("``([a-z_.]+:[A-Za-z_.]+)``", row) for row in rows}
    assert listed == RULES


def every(cls: Any, *choices: Any) -> Iterator[Any]:
    """Yield every record of ``cls`` that the choices make."""
    return (cls(*combination) for combination in itertools.product(*choices))


BOTH = (False, True)
SITUATIONS = list(every(Situation, *[BOTH] * len(Situation._fields)))


class TestReplacing:
    @pytest.mark.parametrize("why", Why)
    @pytest.mark.parametrize("asks", BOTH)
    def test_only_at_a_safe_point(self, why: Why, asks: bool) -> None:
        for now in SITUATIONS:
            # Rule 1: never in the middle of something that others could see broken.
            in_the_middle = now.in_transaction or now.shared or now.unread
            # Rule 2: nothing that is held goes without an error, and what an earlier request has
            # left does not go for the sake of an even spread.
            would_lose = now.holds or (why is Why.REBALANCING and now.earlier)
            if why is Why.LOST and now.error_raised:
                # Once its error was raised, the state is gone and known to be. Django's own is
                # not the application's: it is switched on again on the same connection.
                in_the_middle, would_lose = now.in_transaction or now.shared, now.by_django
            # Rule 6: another connection would answer, and wrongly.
            misleads = asks and not now.error_raised
            expected = not (in_the_middle or would_lose or misleads)
            assert may_replace(why, now, asks) is expected, (why, now, asks)

    def test_loss_of_what_was_held_is_one_error(self) -> None:
        for lost, now in itertools.product(BOTH, SITUATIONS):
            if lost and now.holds:
                assert must_raise_loss(lost, now) is (not now.error_raised)
            else:
                assert not must_raise_loss(lost, now)

    @pytest.mark.parametrize("asks", BOTH)
    def test_transaction_restarts_only_before_its_first_statement(self, asks: bool) -> None:
        for pending, now in itertools.product(BOTH, SITUATIONS):
            # Rule 7: an error that was raised in a block ends all mending in it.
            if not pending or now.error_raised:
                expected = False
            else:
                expected = not (asks or now.shared or now.holds or now.unread)
            assert may_restart(pending, now, asks) is expected

    def test_working_connection_is_left_only_where_it_pays(self) -> None:
        for pinned, out, not_ready, wrote, can_go in itertools.product(Pinned, *[BOTH] * 4):
            done = may_leave(pinned, is_out=out, not_ready=not_ready, wrote=wrote, can_go=can_go)
            if pinned is not Pinned.NO:
                # Rule 14: one peer for the whole block.
                assert done is (Leave.STAYS if pinned is Pinned.HERE else Leave.MUST_GO)
            elif not_ready:
                # Its peer does not serve it: a trial is made when nothing else is left.
                assert done is Leave.GOES_BY_TRIAL
            elif out and wrote:
                # Rule 12: what was written is read where it was written.
                assert done is Leave.STAYS
            elif out and can_go:
                assert done is Leave.GOES
            else:
                # Rule 1: no other try until a circuit changes.
                assert done is Leave.SETTLES

    def test_own_writes_are_waited_for(self) -> None:
        for mysql, written, behind in itertools.product(*[BOTH] * 3):
            waits = must_catch_up(mysql, has_written=written, has_not_caught_up=behind)
            assert waits is (mysql and (written or behind))


def test_one_kind_of_loss_counts_of_no_use_and_with_no_other_cause() -> None:
    names = inspect.signature(loss_counts).parameters
    every = [dict(zip(names, values)) for values in itertools.product(BOTH, repeat=7)]
    (counting,) = (loss for loss in every if loss_counts(**loss))
    assert [name for name, value in counting.items() if value] == ["watched"]


def test_what_follows_from_an_error() -> None:
    """Only a loss that was not known counts for the peer, and nothing that was done on purpose."""
    for fault, answer, killed, closed, dead, explained in itertools.product(Fault, *[BOTH] * 5):
        judgement = Judgement(fault, "said", is_answer=answer, is_killed=killed)
        on_purpose = fault in (Fault.KILLED, Fault.OVERLOADED)
        gone = (closed and not on_purpose) or (fault is Fault.LOST)
        known = dead and explained
        over = gone or closed or killed or dead
        assert after_error(
            judgement, is_closed=closed, was_dead=dead, is_explained=explained
        ) == After(
            ends=over,
            is_loss=gone and not known,
            may_begin_again=over and fault is not Fault.KILLED,
            distrusts=not over and not answer,
            suspects=over and fault is Fault.OVERLOADED,
        )


DIALECTS = ("mysql", "mariadb", "postgresql")
EVERY = list(every(Lost, Place, Cause, Text, DIALECTS, *[BOTH] * 5))
NEVER = Replay(How.NEVER)


def oracle(lost: Lost) -> Replay:
    """Say in the rules' words how a lost statement is run again."""
    in_block = lost.place in (Place.FIRST, Place.AFTER_READS)
    anew = lost.place is Place.AFTER_READS
    # Rules 2, 6 and 7, and the setting.
    if not lost.enabled or lost.holds_state or not lost.sendable:
        return NEVER
    if lost.place is Place.LATER:
        return NEVER
    # Rule 8: the server may be at it still. And an answer is an answer.
    if lost.cause in (Cause.TIMED_OUT, Cause.ANSWERED):
        return NEVER
    # Rule 12: what the block has read is not older elsewhere.
    if anew and lost.may_be_stale:
        return NEVER
    plain = lost.text in (Text.READ, Text.LOCKING, Text.PLAIN)
    if not lost.single:
        # Rule 4: some of executemany()'s statements may have run, whatever the last answer was.
        # Rule 7: as a block's first it is undone with the block.
        closed = lost.cause in (Cause.CLOSED, Cause.NOT_RUN)
        if lost.text is Text.PLAIN and in_block and closed:
            return Replay(How.AS_IT_IS, is_undone=True, reads_anew=anew)
        return NEVER
    # Rule 4: it did not run, so it runs once.
    if lost.cause is Cause.NOT_RUN and plain:
        return Replay(How.AS_IT_IS, reads_anew=anew)
    fresh = not lost.may_be_stale
    # Rules 5 and 15c: a read runs where the server refuses what is none.
    if lost.text is Text.READ and fresh:
        if in_block and lost.dialect in ("mysql", "mariadb"):
            return Replay(How.AS_IT_IS, rehearse=True, reads_anew=anew)
        return Replay(How.READ_ONLY, reads_anew=anew)
    # Rule 5: a block's first may also lock what it reads.
    if lost.text is Text.LOCKING and in_block and fresh:
        return Replay(How.AS_IT_IS, rehearse=True, reads_anew=anew)
    if lost.cause is not Cause.CLOSED:
        return NEVER
    # Rule 7: a first write, where all that it may have done is undone.
    if lost.text is Text.PLAIN and in_block:
        return Replay(How.AS_IT_IS, is_undone=True, reads_anew=anew)
    if lost.text is Text.SCHEMA and in_block and lost.dialect == "postgresql":
        return Replay(How.AS_IT_IS, is_undone=True, reads_anew=anew)
    # What it set went with the transaction, or with the session.
    first = lost.text is Text.OF_TRANSACTION and lost.place is Place.FIRST
    setting = lost.text is Text.SETTING and lost.place is Place.AUTOCOMMIT
    return Replay(How.AS_IT_IS) if first or setting else NEVER


class TestReplays:
    def test_every_combination_is_as_the_rules_say(self) -> None:
        wrong = [lost for lost in EVERY if may_replay(lost) != oracle(lost)]
        assert not wrong, (wrong[0], may_replay(wrong[0]), oracle(wrong[0]))

    def test_lost_write_in_autocommit_never_runs_again(self) -> None:
        """Nothing is doubled: it may stand."""
        for lost in EVERY:
            may_have_run = lost.cause is not Cause.NOT_RUN
            writes = lost.text in (Text.PLAIN, Text.SCHEMA, Text.OTHER, Text.LOCKING)
            if lost.place is Place.AUTOCOMMIT and may_have_run and writes:
                assert may_replay(lost) == NEVER

    def test_less_known_never_allows_more(self) -> None:
        """Whatever is turned to its worse side, no replay comes of it."""
        worse = {"enabled": False, "holds_state": True, "sendable": False, "single": False}
        worse["may_be_stale"] = True
        for lost in EVERY:
            if may_replay(lost) == NEVER:
                for name, value in worse.items():
                    assert may_replay(lost._replace(**{name: value})) == NEVER

    def test_the_rules_leave_something(self) -> None:
        run = {lost.text for lost in EVERY if may_replay(lost) != NEVER}
        assert run == set(Text) - {Text.OTHER}


def test_only_a_lost_commit_of_reads_alone_counts_as_committed() -> None:
    """Rule 9: a COMMIT is never repeated, and nothing that was written is taken for committed."""
    for known in itertools.product(BOTH, BOTH, BOTH, BOTH, (False, True, None)):
        only_read, holds, shared, enabled, serializable = known
        counts = may_count_as_committed(
            only_read=only_read,
            holds=holds,
            shared=shared,
            enabled=enabled,
            serializable=serializable,
        )
        assert counts is (known == (True, False, False, True, False))


# A write that was refused

WRITABLE, READ_ONLY, UNKNOWN = Answer.WRITABLE, Answer.READ_ONLY, Answer.UNKNOWN

#: (the refused connection, a new one): what follows.
AFTER_REFUSAL = {
    (WRITABLE, WRITABLE): Verdict.NOTHING,
    (WRITABLE, READ_ONLY): Verdict.NOTHING,
    (WRITABLE, UNKNOWN): Verdict.NOTHING,
    (READ_ONLY, WRITABLE): Verdict.DROPS,
    (READ_ONLY, READ_ONLY): Verdict.OPENS,
    (READ_ONLY, UNKNOWN): Verdict.DROPS,
    (UNKNOWN, WRITABLE): Verdict.ASKS_LATER,
    (UNKNOWN, READ_ONLY): Verdict.OPENS,
    (UNKNOWN, UNKNOWN): Verdict.ASKS_LATER,
}


@pytest.mark.parametrize(("own", "new"), list(itertools.product(Answer, Answer)))
def test_refused_write_is_judged_by_what_both_connections_say(own: Answer, new: Answer) -> None:
    assert after_read_only(own, new) == AFTER_REFUSAL[own, new]
