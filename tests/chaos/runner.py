"""Run scenarios: a site, its load, what happens to it, and the judgement."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any, Callable

from django_proxysql.core.events import (
    BlockRetried,
    CommitResolved,
    ConnectionReplaced,
    StatementReplayed,
)
from django_proxysql.registry import balancers

from .judgement import Result, judge
from .load import Load
from .scenarios import Scenario, Stage
from .sites import ALIAS, Site

#: The engines, as the tables are headed.
ENGINES = {
    "retrying": 'django_proxysql.backends.proxysql, retrying_atomic, COMMIT_OUTCOME "record"',
    "ours": "django_proxysql.backends.proxysql",
    "plain": "django.db.backends.mysql behind HAProxy",
}


def run(
    scenario: Scenario,
    site: Site,
    engine: str = "ours",
    seconds: float = 0,
    patience: float = 1.5,
    say: Callable[[str], None] = lambda text: None,
) -> Result:
    """Put a site through a scenario, at least once, and for so many seconds.

    :param patience: seconds after an outage from which on an error is a failure again.
    """
    site.restore()
    site.empty()
    events: list[Any] = []
    with _variables(site, scenario), site.engine(engine, scenario.options):
        if engine != "plain":
            balancers[ALIAS].add_listener(events.append)
        load = Load(ALIAS, pace=scenario.pace, retries=engine == "retrying")
        stage = Stage(site, load, say, patience)
        try:
            with load:
                until = time.monotonic() + seconds
                while True:
                    scenario.run(stage)
                    if time.monotonic() >= until:
                        break
        finally:
            # Whatever a thread still waits for can come now.
            site.restore()
            load.join()
    result = judge(scenario, engine, load.ledgers, stage.faults, site.rows())
    kinds = Counter(type(event) for event in events)
    result.replaced, result.replayed = kinds[ConnectionReplaced], kinds[StatementReplayed]
    result.retried, result.resolved = kinds[BlockRetried], kinds[CommitResolved]
    return result


@contextlib.contextmanager
def _variables(site: Site, scenario: Scenario) -> Iterator[None]:
    before: list[tuple[Any, str, str]] = []
    try:
        for name, value in scenario.variables:
            for server in site.servers:
                before.append((server, name, server.globals()[name]))
                server.set_global(name, value)
        yield
    finally:
        for server, name, text in before:
            server.set_global(name, text)
