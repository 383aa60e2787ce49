"""Run scenarios: a site, its load, what happens to it, and the judgement."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Iterator, Sequence
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
from .sites import Site

#: The engines, as the tables are headed.
ENGINES = {
    "retrying": 'django_proxysql.backends.proxysql, retrying_atomic, COMMIT_OUTCOME "record"',
    "ours": "django_proxysql.backends.proxysql",
    "plain": "django.db.backends.mysql behind HAProxy",
}


def run(
    scenario: Scenario,
    site: Site,
    engines: Sequence[str] = ("ours",),
    seconds: float = 0,
    patience: float = 1.5,
    say: Callable[[str], None] = lambda text: None,
) -> list[Result]:
    """Put a site through a scenario, at least once, and for so many seconds.

    :param engines: the same blows strike all of these; there is a result for each.
    :param patience: seconds after an outage from which on an error is a failure again.
    """
    site.restore()
    site.empty()
    events: dict[str, list[Any]] = {engine: [] for engine in engines}
    with contextlib.ExitStack() as stack:
        stack.enter_context(_variables(site, scenario))
        for engine in engines:
            stack.enter_context(site.engine(engine, scenario.options))
        for engine in engines:
            if engine != "plain":
                balancers[engine].add_listener(events[engine].append)
        loads = [
            Load(engine, pace=scenario.pace, retries=engine == "retrying") for engine in engines
        ]
        stage = Stage(site, loads, say, patience)
        try:
            with contextlib.ExitStack() as at_work:
                for load in loads:
                    at_work.enter_context(load)
                until = time.monotonic() + seconds
                while True:
                    scenario.run(stage)
                    if time.monotonic() >= until:
                        break
        finally:
            # Whatever a thread still waits for can come now.
            site.restore()
            for load in loads:
                load.join()
    rows = site.rows()
    results = []
    for load in loads:
        engine = load.alias
        its = Counter({token: n for token, n in rows.items() if token.startswith(f"{engine}-")})
        result = judge(scenario, engine, load.ledgers, stage.faults, its)
        kinds = Counter(type(event) for event in events[engine])
        result.replaced, result.replayed = kinds[ConnectionReplaced], kinds[StatementReplayed]
        result.retried, result.resolved = kinds[BlockRetried], kinds[CommitResolved]
        results.append(result)
    return results


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
