"""What sharing is for: a peer that fails costs a fleet little, and its return no rush.

Forty simulated processes; docs/explanation/fleet.rst has five thousand, and real ones.
"""

from __future__ import annotations

import logging
import os

import pytest

from tests.fleet import measurement
from tests.fleet.__main__ import table
from tests.fleet.simulation import Outcome, Scenario, simulate
from tests.servers.redis import RedisServer

PROCESSES = 40


def outcome(redis: RedisServer, sharing: bool, jitter: bool = True) -> Outcome:
    return simulate(Scenario(PROCESSES, sharing, jitter, rate=3), redis.url)


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "django_proxysql")


@pytest.mark.parametrize("jitter", [True, False])
def test_shared(redis_server: RedisServer, jitter: bool) -> None:
    """One failed connect a process at most, and then one trial an interval for all."""
    shared = outcome(redis_server, True, jitter)
    scenario = shared.scenario
    # All in the second or two in which the word went round, and in none after it.
    assert 0 < shared.cost < PROCESSES
    assert set(shared.failed) <= {5, 6}
    assert shared.most_trials_a_second == 1
    trials = sorted(shared.trials)
    for one, other in zip(trials, trials[1:]):
        assert other - one >= scenario.check_interval * 0.9 - 1
    assert len(trials) == 2
    # … and all have it back within two seconds of the one trial that succeeded.
    assert len(shared.closed) == PROCESSES
    assert max(shared.closed) - min(shared.closed) < 2
    # A connect is spread as ever: what comes back gets its share, not everybody.
    assert shared.herd < 2
    assert shared.round_trips / PROCESSES / scenario.ends_at < 1.1
    assert "requests that met the dead peer" in table([shared])


def test_each_for_itself(redis_server: RedisServer) -> None:
    """Without sharing each process meets it, and each tries it every interval."""
    alone = outcome(redis_server, False)
    assert alone.cost == PROCESSES
    assert sum(alone.trials.values()) > 1.5 * PROCESSES
    assert alone.most_trials_a_second > 5
    assert alone.round_trips == 0


def test_same_seed_same_outcome(redis_server: RedisServer) -> None:
    one, other = (outcome(redis_server, False) for _ in range(2))
    assert (one.failed, one.trials, one.connects, one.closed) == (
        other.failed,
        other.trials,
        other.connects,
        other.closed,
    )


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("sharing", [True, False])
def test_real_processes(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch, sharing: bool
) -> None:
    """The measurement itself, with fewer processes and shorter times."""
    interval, dead, processes = 3, 12, 20
    monkeypatch.setattr(measurement, "INTERVAL", interval)
    monkeypatch.setattr(measurement, "DEAD", dead)
    monkeypatch.setattr(measurement, "AFTER", 8)
    run = measurement._run(processes, redis_server.url if sharing else None)
    trials = run["trials"] * dead / interval
    assert run["without"] == 0
    # What the dead peer saw, its clients have counted.
    assert run["met"] == run["failed"] + trials
    assert 0 < run["failed"] <= processes
    if sharing:
        # One an interval, of all together: no sooner than 10 % before its end.
        assert 1 <= trials <= dead / (0.9 * interval) + 1
        assert run["back"] == processes
    else:
        assert trials > processes
