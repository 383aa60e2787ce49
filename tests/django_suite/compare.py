"""Comparing two runs, test by test."""

from __future__ import annotations

import json
import pathlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

#: Tests that differ for a good reason: a pattern of their names, and the reason.
EXPECTED = {
    r"test_runner\.tests\.SetupDatabasesTests\.test_destroy_test_db_restores_db_name": (
        "it makes a wrapper of nothing but ENGINE and NAME: a balancer without PEERS, which has no "
        "test database to destroy"
    ),
    r"backends\.base\.test_creation\.TestDbCreationTests\.test_serialize_deprecation": (
        "the deprecation warning names the caller of create_test_db(): ours, which keeps it on "
        "one peer"
    ),
    r"serializers\.test_deserialization\.TestDeserializer\.test_crafted_xml_performance": (
        "it measures how long parsing takes, without a database, on a machine that has more to do"
    ),
    r"backends\.postgresql\.tests\.Tests\.test_pooling_health_checks": (
        "it looks into the pool for psycopg's own health check, by which a caller that finds "
        "several dead connections waits for seconds: here the engine makes it, "
        "with what the pool gives it"
    ),
    r"backends\.postgresql\.tests\.Tests\.test_pool_check_can_be_overridden": (
        "it looks into the pool for the check of OPTIONS: here the engine calls it, with what the "
        "pool gives it"
    ),
    r"backends\.postgresql\.tests\.Tests\.test_connect_pool": (
        "it fills the pool of its one server, and then asks for another connection: here the "
        "balancer has two peers with a pool each, and one that neither has is "
        "NoPeerAvailable, an OperationalError of Django's"
    ),
    r"gis_tests\.inspectapp\.tests\.OGRInspectTest\.test_time_field": (
        "it is skipped: GDAL is to connect by what stands in settings_dict, where a balancer has "
        "no HOST"
    ),
}

#: Of several outcomes of one test (its sub-tests', its tearDown's) the worst counts.
BADNESS = ["passed", "skipped", "expected failure", "unexpected success", "failed", "error"]
GOOD = ("passed", "skipped", "expected failure")


class Outcome(NamedTuple):
    """What became of a test."""

    what: str
    reason: str


@dataclass
class Comparison:
    """How the same tests came out on two engines."""

    total: int
    same: int
    #: How many of the same are skipped, and how many fail: on both engines.
    skipped: int
    failing: int
    differences: dict[str, tuple[Outcome, Outcome]]
    #: Differences for a reason, and that reason.
    expected: dict[str, str]

    def __str__(self) -> str:
        lines = []
        for name, (plain, ours) in sorted(self.differences.items()):
            lines.append(f"{name}: {plain.what} on the plain engine, {ours.what} on the balancer's")
            told = ours if ours.what not in GOOD or plain.what in GOOD else plain
            lines += [f"    {line}" for line in told.reason.strip().splitlines()[-15:]]
        for name, reason in sorted(self.expected.items()):
            lines.append(f"{name}: expected to differ: {reason}")
        lines.append(
            f"{self.total} tests: {self.same} the same ({self.skipped} of them skipped and "
            f"{self.failing} failing on both), {len(self.differences)} different, "
            f"{len(self.expected)} expected to differ"
        )
        return "\n".join(lines)


NONE = Outcome("not run", "")


def read(results: pathlib.Path) -> dict[str, Outcome]:
    """Return the worst outcome of each test in a file of results."""
    found: dict[str, Outcome] = {}
    with open(results, encoding="utf-8") as lines:
        for line in lines:
            name, what, reason, _ = json.loads(line)
            # Sub-tests are called by their parameters, some of which have but an address.
            name = re.sub(r"\b0x[0-9a-f]+", "0x…", name)
            before = found.get(name)
            if before is None or BADNESS.index(what) > BADNESS.index(before.what):
                found[name] = Outcome(what, reason)
    return found


def compare(
    plain: Mapping[str, Outcome], ours: Mapping[str, Outcome], expected: Mapping[str, str]
) -> Comparison:
    """Compare two runs, test by test; a test that one of them lacks differs."""
    names = [*plain, *(name for name in ours if name not in plain)]
    result = Comparison(len(names), 0, 0, 0, {}, {})
    for name in names:
        before, after = plain.get(name, NONE), ours.get(name, NONE)
        if before.what == after.what:
            result.same += 1
            result.skipped += before.what == "skipped"
            result.failing += before.what not in GOOD
            continue
        reason = next((why for what, why in expected.items() if re.fullmatch(what, name)), None)
        if reason is None:
            result.differences[name] = before, after
        else:
            result.expected[name] = reason
    return result
