"""Random programs with faults, for seconds; ``python -m tests.programs`` runs them for hours."""

from __future__ import annotations

import os
import random
from collections import Counter
from typing import Any

import pytest

from tests.programs import Generator, Ledger, Violation, World, run_programs

#: Another one each time. A failure names it.
SEED = int(os.environ.get("PROGRAMS_SEED") or random.SystemRandom().randrange(10**6))
PROGRAMS = 30


@pytest.mark.slow
@pytest.mark.parametrize("outcome", ["none", "record"])
@pytest.mark.parametrize("kind", ["mariadb", "postgres", "galera"])
def test_acknowledged_once_refused_never_unknown_at_most_once(
    request: pytest.FixtureRequest, kind: str, outcome: str
) -> None:
    server: Any = request.getfixturevalue(kind)
    servers = list(server) if kind == "galera" else [server]
    with World(servers, records=outcome == "record") as world:
        tally = run_programs(world, SEED, most=PROGRAMS)
    assert tally.programs == PROGRAMS
    assert tally.cuts > 0


class TestOracle:
    """It sees what it is there to see, without a server."""

    ledger = Ledger(stands=["a", "b"], may_stand={"c"}, all_or_none=[["d", "e"]])

    @pytest.mark.parametrize("rows", ["ab", "abc", "abde", "abcde"])
    def test_what_may_be_is_let_pass(self, rows: str) -> None:
        self.ledger.judge(Counter(rows))

    @pytest.mark.parametrize(
        ("rows", "complaint"),
        [
            ("a", "b was acknowledged, and is lost"),
            ("aab", "a stands 2 times"),
            ("abcc", "c stands 2 times"),
            ("abx", "x was refused, and stands"),
            ("abd", "a part stands"),
        ],
    )
    def test_what_must_not_be_is_found(self, rows: str, complaint: str) -> None:
        with pytest.raises(Violation, match=complaint):
            self.ledger.judge(Counter(rows))

    def test_a_seed_makes_the_same_program_again(self) -> None:
        first, again, other = (Generator(seed, True).program() for seed in ("1-1", "1-1", "1-2"))
        assert first == again != other
