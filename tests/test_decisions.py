"""What may be run again: every combination of what counts, against the rules in words."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from django_proxysql.backends.decisions import (
    Cause,
    How,
    Lost,
    Place,
    Replay,
    leaves_no_trace,
    may_replay,
)
from django_proxysql.core.texts import Text

DIALECTS = ("mysql", "mariadb", "postgresql")
EVERY = [
    Lost(*combination)
    for combination in itertools.product(Place, Cause, Text, DIALECTS, *[(True, False)] * 5)
]
NEVER = Replay(How.NEVER)


def allowed(**known: object) -> list[Lost]:
    """The combinations with these values in which something is run again."""
    return [
        lost
        for lost in EVERY
        if all(
            getattr(lost, name) is value or getattr(lost, name) == value
            for name, value in known.items()
        )
        and may_replay(lost) != NEVER
    ]


class TestEveryCombination:
    @pytest.mark.parametrize(
        "known",
        [
            {"enabled": False},
            {"holds_state": True},
            {"sendable": False},
            {"place": Place.LATER},
            # executemany() has sent some of its rows, whatever the error says of the last.
            *(
                {"single": False, "place": Place.AUTOCOMMIT},
                {"single": False, "text": Text.READ},
                {"single": False, "text": Text.SETTING},
            ),
            {"cause": Cause.TIMED_OUT},
            {"cause": Cause.ANSWERED},
            {"text": Text.OTHER},
            # In autocommit a write that was lost may stand.
            *(
                {"place": Place.AUTOCOMMIT, "cause": cause, "text": text}
                for cause in (Cause.CLOSED, Cause.NO_SERVICE)
                for text in (Text.PLAIN, Text.LOCKING, Text.SCHEMA, Text.OF_TRANSACTION)
            ),
            # A write whose connection lives may be running there.
            {"cause": Cause.NO_SERVICE, "text": Text.PLAIN},
            # MySQL commits before and after a change of the schema.
            {"dialect": "mysql", "text": Text.SCHEMA},
            {"dialect": "mariadb", "text": Text.SCHEMA},
            # What a block, or a request, has seen is not on every peer yet.
            {"place": Place.AFTER_READS, "may_be_stale": True},
            *(
                {"cause": cause, "text": Text.READ, "may_be_stale": True}
                for cause in (Cause.CLOSED, Cause.NO_SERVICE)
            ),
        ],
    )
    def test_never_run_again(self, known: dict[str, object]) -> None:
        assert allowed(**known) == []

    def test_a_lost_read_runs_read_only_or_is_rehearsed(self) -> None:
        for lost in allowed(text=Text.READ):
            replay = may_replay(lost)
            if lost.cause is not Cause.NOT_RUN:
                assert replay.how is How.READ_ONLY or replay.rehearse

    def test_a_lost_write_is_asked_about(self) -> None:
        for text in (Text.PLAIN, Text.SCHEMA):
            for lost in allowed(text=text):
                if lost.cause is not Cause.NOT_RUN or not lost.single:
                    assert may_replay(lost).is_undone
                    assert lost.place is not Place.AUTOCOMMIT

    def test_after_reads_the_isolation_is_asked_about(self) -> None:
        for lost in EVERY:
            replay = may_replay(lost)
            assert replay == NEVER or replay.reads_anew is (lost.place is Place.AFTER_READS)

    def test_what_did_not_run_is_run_as_it_is(self) -> None:
        for lost in allowed(cause=Cause.NOT_RUN):
            if lost.single and lost.text in (Text.READ, Text.LOCKING, Text.PLAIN):
                assert may_replay(lost).how is How.AS_IT_IS

    def test_less_known_never_allows_more(self) -> None:
        """Whatever is turned to its worse side, no replay comes of it."""
        worse = {"enabled": False, "holds_state": True, "sendable": False, "single": False}
        worse["may_be_stale"] = True
        for lost in EVERY:
            for name, value in worse.items():
                if may_replay(lost) == NEVER:
                    assert may_replay(replace(lost, **{name: value})) == NEVER  # type: ignore[arg-type]

    def test_the_rules_leave_something(self) -> None:
        assert {lost.text for lost in allowed(cause=Cause.CLOSED)} == set(Text) - {Text.OTHER}

    def test_a_lost_commit_of_reads_alone_leaves_no_trace(self) -> None:
        combinations = itertools.product((True, False), (True, False, None))
        assert [known for known in combinations if leaves_no_trace(*known)] == [(True, False)]
