"""The chaos suite in its short form: each scenario once, on real servers."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from django.db import IntegrityError, OperationalError

from tests.chaos.judgement import Result, judge
from tests.chaos.load import Failure, HarnessError, Ledger
from tests.chaos.own_writes import measure
from tests.chaos.runner import run
from tests.chaos.scenarios import SCENARIOS, Fault, Scenario, Stage
from tests.chaos.sites import SITES, Site, admin


@pytest.fixture(scope="module")
def sites() -> Iterator[Callable[[str, Any], Any]]:
    """``sites(kind, server)`` makes a site, once."""
    made: dict[Any, Any] = {}
    with contextlib.ExitStack() as stack:

        def site_of(kind: str, server: Any) -> Any:
            if (kind, server) not in made:
                made[kind, server] = stack.enter_context(SITES[kind][0](server))
            return made[kind, server]

        yield site_of


@pytest.fixture
def site(request: pytest.FixtureRequest, sites: Callable[[str, Any], Any]) -> Any:
    server = request.getfixturevalue("galera" if SITES[request.param][1] else "mariadb")
    return sites(request.param, server)


@pytest.mark.slow
@pytest.mark.server
@pytest.mark.parametrize(
    ("scenario", "site"),
    [(scenario, scenario.site) for scenario in SCENARIOS.values()],
    indirect=["site"],
    ids=list(SCENARIOS),
)
def test_endured(scenario: Any, site: Site) -> None:
    # How soon work goes on after an outage is for the command to say.
    ours, retrying = run(scenario, site, ("ours", "retrying"), patience=10)
    for result in (ours, retrying):
        assert not result.violations, "\n".join(result.violations)
        assert (result.lost, result.doubled, result.failed_reads) == (0, 0, 0)
        assert result.requests > 50
    assert (retrying.failed_writes, retrying.failed_blocks) == (0, 0)


@pytest.mark.slow
@pytest.mark.server
@pytest.mark.parametrize("site", ["galera"], indirect=True)
def test_own_writes(site: Any) -> None:
    found = measure(site, tries=60)
    assert not found.violations, "\n".join(found.violations)
    assert found.elsewhere == 60


class TestJudgement:
    """The suite sees what it is there to see."""

    scenario = SCENARIOS["peer-killed"]

    def judge(
        self,
        rows: Sequence[str] = (),
        *,
        faults: Sequence[Fault] = (),
        scenario: Any = None,
        engine: str = "ours",
        **ledger: Any,
    ) -> Result:
        ledgers = [Ledger(0, **ledger)]
        return judge(scenario or self.scenario, engine, ledgers, list(faults), Counter(rows))

    def failure(
        self, kind: str, stage: str, error: Any = None, started: float = 9.0, ended: float = 10.1
    ) -> Failure:
        return Failure(kind, stage, 0, started, ended, error or OperationalError(2013, "lost"))

    def test_all_is_well(self) -> None:
        result = self.judge(
            ["a", "b"], done=["a", "b"], failed=["c"], blocks_done=["b"], hooks=Counter("b")
        )
        assert not result.violations

    def test_lost(self) -> None:
        result = self.judge([], done=["a"])
        assert result.lost == 1
        assert result.violations

    @pytest.mark.parametrize("told", ["done", "failed"])
    def test_doubled(self, told: str) -> None:
        result = self.judge(["a", "a"], **{told: ["a"]})
        assert result.doubled == 1
        assert result.violations

    def test_failed_and_stands(self) -> None:
        assert not self.judge(["a"], failed=["a"]).violations

    def test_lost_write_that_was_acknowledged(self) -> None:
        assert self.judge(["a"]).violations

    @pytest.mark.parametrize(
        "hooks",
        [
            {"done": ["a"], "blocks_done": ["a"]},
            {"done": ["a"], "blocks_done": ["a"], "hooks": Counter("aa")},
            {"failed": ["a"], "hooks": Counter("a")},
        ],
    )
    def test_hooks(self, hooks: Any) -> None:
        assert self.judge(["a"], **hooks).violations

    @pytest.mark.parametrize(
        ("kind", "stage"), [("read", "read"), ("block", "begin"), ("block", "read")]
    )
    def test_could_have_been_mended(self, kind: str, stage: str) -> None:
        fault = Fault("a blow", began=10.0, over=10.05)
        assert self.judge(failures=[self.failure(kind, stage)], faults=[fault]).violations

    @pytest.mark.parametrize(
        ("kind", "stage"), [("write", "write"), ("block", "write"), ("block", "commit")]
    )
    def test_in_flight(self, kind: str, stage: str) -> None:
        fault = Fault("a blow", began=10.0, over=10.05)
        failure = self.failure(kind, stage)
        assert not self.judge(failures=[failure], faults=[fault]).violations
        assert self.judge(failures=[failure, failure], faults=[fault]).violations
        assert self.judge(failures=[failure]).violations
        later = self.failure(kind, stage, started=11, ended=12)
        assert self.judge(failures=[later], faults=[fault]).violations

    def test_no_write_may_fail_that_is_run_again(self) -> None:
        fault = Fault("a blow", began=10.0, over=10.05)
        failure = self.failure("block", "commit")
        assert self.judge(failures=[failure], faults=[fault], engine="retrying").violations

    def test_another_error(self) -> None:
        fault = Fault("a blow", began=10.0, over=10.05)
        failure = self.failure("write", "write", IntegrityError(1062, "twice"))
        assert self.judge(failures=[failure], faults=[fault]).violations

    def test_galera(self) -> None:
        fault = Fault("a blow", began=10.0, over=10.05)
        for code, bad in ((1180, False), (1213, False), (2013, True)):
            failure = self.failure("write", "write", OperationalError(code, "…"))
            cut_off = SCENARIOS["galera-cut-off"]
            result = self.judge(failures=[failure], faults=[fault], scenario=cut_off)
            assert bool(result.violations) is bad

    def test_a_loss_and_a_conflict_of_one_fault_are_two(self) -> None:
        fault = Fault("a node is killed", began=10.0, over=10.05)
        lost = self.failure("block", "commit")
        conflict = self.failure("block", "commit", OperationalError(1213, "Deadlock found"))
        for failures, bad in (([lost, conflict], False), ([conflict] * 2, True)):
            result = self.judge(
                failures=failures, faults=[fault], scenario=SCENARIOS["galera-killed"]
            )
            assert bool(result.violations) is bad

    def test_timed_out(self) -> None:
        fault = Fault("it freezes", began=10.0, over=13.0)
        failure = self.failure("read", "read", started=10.0, ended=13.0)
        hanging = SCENARIOS["peer-hanging"]
        result = self.judge(failures=[failure], faults=[fault], scenario=hanging)
        assert not result.violations
        assert (result.timed_out, result.failed_reads) == (1, 0)
        assert self.judge(failures=[failure], faults=[fault]).violations

    def test_outage(self) -> None:
        fault = Fault("all are gone", began=10.0, over=14.5, outage=True, returned=13.0)
        meanwhile = self.failure("read", "read")
        later = self.failure("read", "read", started=15.0, ended=15.1)
        result = self.judge(failures=[meanwhile], faults=[fault], served=[13.5])
        assert not result.violations
        assert (result.in_outage, result.resumed_after) == (1, 0.5)
        assert self.judge(failures=[later], faults=[fault], served=[13.5]).violations
        assert self.judge(failures=[meanwhile], faults=[fault], served=[15.0]).violations


@pytest.mark.server
@pytest.mark.parametrize("site", ["ways"], indirect=True)
def test_a_thread_that_dies(site: Any) -> None:
    """The suite does not go on with fewer threads than it says."""

    def drop(stage: Stage) -> None:
        with admin(site.server) as cursor:
            cursor.execute("UPDATE chaos_row SET value = 'x'")
        stage.wait(5)

    scenario = Scenario("a wrong answer", "ways", "a row changes", drop)
    with pytest.raises(HarnessError, match=r"a thread died of .*a read returned"):
        run(scenario, site)
