"""The comparison with Django's own test suite: what is a difference, and a short run of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import django
import pytest

from tests.django_suite.__main__ import FOLDER
from tests.django_suite.compare import EXPECTED, Outcome, compare, read
from tests.django_suite.engines import BALANCED, SQLITE, balanced
from tests.django_suite.suite import django_tests

ROOT = Path(__file__).parent.parent

PASSED = Outcome("passed", "")
FAILED = Outcome("failed", "AssertionError: 1 != 2")


def test_what_differs() -> None:
    """A test that fails here and passes there, or is skipped, or never runs."""
    plain = {
        "same": PASSED,
        "fails on both": FAILED,
        "fails": PASSED,
        "skipped": PASSED,
        "lost": PASSED,
        "known": PASSED,
        "skipped on both": Outcome("skipped", "why"),
    }
    ours = {**plain, "fails": FAILED, "skipped": Outcome("skipped", "no"), "known": FAILED}
    del ours["lost"]
    ours["setUpClass (its)"] = Outcome("error", "boom")
    found = compare(plain, ours, {"kno.n": "a reason"})
    assert set(found.differences) == {"fails", "skipped", "lost", "setUpClass (its)"}
    assert found.expected == {"known": "a reason"}
    assert (found.total, found.same, found.skipped, found.failing) == (8, 3, 1, 1)
    text = str(found)
    assert "fails: passed on the plain engine, failed on the balancer's\n    Assertion" in text
    assert "known: expected to differ: a reason" in text
    assert text.endswith(
        "8 tests: 3 the same (1 of them skipped and 1 failing on both), "
        "4 different, 1 expected to differ"
    )


def test_worst_outcome_counts(tmp_path: Path) -> None:
    """A sub-test's failure is its test's, whatever comes before or after."""
    lines = [
        ["a", "failed", "sub"],
        ["a", "passed", ""],
        ["b", "passed", ""],
        ["b", "error", ""],
    ]
    results = tmp_path / "results"
    results.write_text("".join(json.dumps([*line, 0]) + "\n" for line in lines))
    assert read(results) == {"a": Outcome("failed", "sub"), "b": Outcome("error", "")}


def test_addresses_in_names(tmp_path: Path) -> None:
    """A sub-test that is called by an object's address is the same test in both runs."""
    results = tmp_path / "results"
    results.write_text(json.dumps(["a.b (x=<object object at 0x7fb62968c2e0>)", "passed", "", 0]))
    assert list(read(results)) == ["a.b (x=<object object at 0x…>)"]


def test_balanced_entry() -> None:
    """Two peers inline at two addresses; TEST and the account stay the balancer's."""
    plain = {"ENGINE": SQLITE, "NAME": "/x", "USER": "me", "TEST": {"CHARSET": "utf8mb4"}}
    assert balanced(plain) == {
        "ENGINE": BALANCED,
        "PEER_ENGINE": SQLITE,
        "PEERS": [{"NAME": "/x"}, {"NAME": "/./x"}],
        "USER": "me",
        "TEST": {"CHARSET": "utf8mb4"},
    }


def test_expected_differences_have_a_reason() -> None:
    """… and name tests, not folders."""
    for pattern, reason in EXPECTED.items():
        assert reason
        assert r"\.test_" in pattern


@pytest.mark.slow
@pytest.mark.skipif(django.VERSION < (4, 2), reason="these sdists want older tools")
@pytest.mark.parametrize(
    ("engine", "labels"),
    [
        ("sqlite", ["backends", "transactions", "transaction_hooks", "servers"]),
        pytest.param(
            "mariadb",
            ["backends", "multiple_database", "select_for_update", "transactions"],
            marks=pytest.mark.server,
        ),
        pytest.param("postgresql", ["transactions", "backends"], marks=pytest.mark.server),
    ],
)
def test_what_passes_on_the_plain_engine_passes_here(
    engine: str, labels: list[str], tmp_path: Path
) -> None:
    # Results of its own: another run may be under way, or have left some that took an hour.
    sdist = django_tests(FOLDER).parent
    (tmp_path / sdist.name).symlink_to(sdist)
    own = ["--folder", str(tmp_path)]
    command = [sys.executable, "-m", "tests.django_suite", "--engine", engine, *own, *labels]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 different" in done.stdout
