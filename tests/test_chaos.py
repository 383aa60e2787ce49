"""The chaos suite in its short form: each scenario once, on real servers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.chaos.runner import run
from tests.chaos.scenarios import SCENARIOS
from tests.chaos.sites import Galera, Site, Ways

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ways_session(mariadb_pair_session: Any) -> Iterator[Ways]:
    with Ways(mariadb_pair_session[0]) as site:
        yield site


@pytest.fixture
def ways(ways_session: Ways, mariadb: Any) -> Ways:
    return ways_session


@pytest.fixture(scope="module")
def galera_site_session(galera_session: Any) -> Iterator[Galera]:
    with Galera(galera_session) as site:
        yield site


@pytest.fixture
def galera_site(galera_site_session: Galera, galera: Any) -> Galera:
    return galera_site_session


@pytest.fixture
def site(request: Any) -> Site:
    return request.getfixturevalue({"ways": "ways", "galera": "galera_site"}[request.param])


@pytest.mark.parametrize(
    ("scenario", "site"),
    [(scenario, scenario.site) for scenario in SCENARIOS.values()],
    indirect=["site"],
    ids=list(SCENARIOS),
)
def test_endured(scenario: Any, site: Site) -> None:
    # How soon work goes on after an outage is for the command to say.
    result = run(scenario, site, patience=10)
    assert not result.violations, "\n".join(result.violations)
    assert (result.lost, result.doubled, result.failed_reads) == (0, 0, 0)
    assert result.requests > 50
