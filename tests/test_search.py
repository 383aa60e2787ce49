"""One connect() without I/O: every order of steps, without a thread, a socket or a clock that runs.

A face is played by the test: it asks for a step and says how that ended.
"""

from __future__ import annotations

import gc
import itertools
from collections.abc import Iterator
from typing import Any

import pytest

from django_proxysql import Fault, LoadBalancer
from django_proxysql.core.config import config_from
from django_proxysql.core.exceptions import ConfigError
from django_proxysql.core.group import PeerGroup
from django_proxysql.core.search import Attempt, Search, Wait
from tests.benchmarks.statement import python_calls
from tests.fakes import Clock, even, peers, refused_by_host, too_many
from tests.test_balancer import InOrder

NAMES = ("db1", "db2")
#: What a peer may be when the search begins, and how an attempt on it may end.
CIRCUITS = ("closed", "suspect", "open", "due", "under trial", "drained")
ENDS = (None, refused_by_host, too_many, ValueError)
TRIALS = ("first", "last", "never")


def group_of(*circuits: str, **settings: Any) -> tuple[PeerGroup, Clock, list[Any]]:
    """Return a group whose circuits are as said, and the permits of trials under way."""
    clock = Clock()
    config = config_from(peers(*NAMES[: len(circuits)]), strategy=InOrder, **settings)
    group = PeerGroup(config, clock=clock, jitter=even)
    held = []
    for name, circuit in zip(NAMES, circuits):
        breaker = group.peers[name].breaker
        if circuit in ("open", "due", "under trial"):
            clock.now = 0.0 if circuit != "open" else clock.now
            permit = breaker.acquire()
            permit.failed(refused_by_host(), Fault.UNREACHABLE)
    clock.advance(40)
    for name, circuit in zip(NAMES, circuits):
        breaker = group.peers[name].breaker
        if circuit == "open":
            breaker.close()
            permit = breaker.acquire()
            permit.failed(refused_by_host(), Fault.UNREACHABLE)
        elif circuit == "under trial":
            held.append(breaker.acquire())
        elif circuit == "suspect":
            breaker.suspect("lost", Fault.LOST)
        elif circuit == "drained":
            group.drain(group.peers[name], force=True)
    return group, clock, held


def run(search: Search, ends: dict[str, Any], clock: Clock) -> Iterator[str]:
    """Play a face to the end, and yield what the search has it do."""
    for _ in range(20):
        try:
            step = search.step()
        except Exception as exc:
            yield type(exc).__name__
            return
        if isinstance(step, Wait):
            assert step.seconds > 0
            clock.advance(step.seconds)
            yield "wait"
            continue
        assert isinstance(step, Attempt)
        assert step.timeout > 0
        assert step.permit.is_trial is step.is_trial
        yield f"{step.peer.name}{'?' if step.is_trial else ''}"
        error = ends[step.peer.name]
        if error is None:
            search.succeeded(step)
            yield "connected"
            return
        exc = error()
        search.failed(step, exc)
        if not search.goes_on(exc):
            yield "raised"
            return
    raise AssertionError("it goes round and round")


@pytest.mark.parametrize("trials", TRIALS)
def test_every_search_ends_and_leaves_no_permit(trials: str) -> None:
    """For all circuits of two peers and all ends of their attempts, whatever the order is."""
    seen = set()
    for circuits in itertools.product(CIRCUITS, repeat=2):
        for ends in itertools.product(ENDS, repeat=2):
            group, clock, held = group_of(*circuits)
            search = Search(group, trials)
            steps = list(run(search, dict(zip(NAMES, ends)), clock))
            seen.add(steps[-1])
            attempted = [step.rstrip("?") for step in steps if step.startswith("db")]
            # Each peer is attempted once at most, and a drained one never.
            assert len(set(attempted)) == len(attempted), (circuits, ends, steps)
            assert "drained" not in [circuits[NAMES.index(name)] for name in attempted]
            if trials == "never":
                assert {circuits[NAMES.index(name)] for name in attempted} <= {"closed"}
                assert "wait" not in steps
            # A search ends without a peer only after it has asked all that it may ask.
            if steps[-1] == "NoPeerAvailable" and trials != "never":
                usable = {
                    name for name, at in zip(NAMES, circuits) if at in ("closed", "suspect", "due")
                }
                assert usable <= set(attempted), (circuits, ends, steps)
            # No trial of this search is left.
            search.raised(ValueError())
            others = [permit.lease for permit in held]
            for peer in group.peers.values():
                assert peer.breaker.trial in (None, *others), (circuits, ends)
                assert peer.connecting == 0
    assert seen == {"connected", "raised", "NoPeerAvailable"}


@pytest.mark.parametrize(
    ("circuits", "trials", "expected"),
    [
        (("closed", "closed"), "first", "db1 db2 NoPeerAvailable"),
        (("closed", "due"), "first", "db2? db1 NoPeerAvailable"),
        (("closed", "due"), "last", "db1 db2? NoPeerAvailable"),
        (("closed", "due"), "never", "db1 NoPeerAvailable"),
        (("suspect", "closed"), "last", "db2 db1? NoPeerAvailable"),
        # As a last resort, once no peer is left.
        (("open", "due"), "first", "db2? NoPeerAvailable"),
        (("under trial", "closed"), "first", "db2 wait NoPeerAvailable"),
        (("drained", "closed"), "first", "db2 NoPeerAvailable"),
        (("drained", "drained"), "first", "NoPeerAvailable"),
    ],
)
def test_order_of_the_steps(circuits: Any, trials: str, expected: str) -> None:
    group, clock, held = group_of(*circuits)
    ends = dict.fromkeys(NAMES, refused_by_host)
    assert " ".join(run(Search(group, trials), ends, clock)) == expected
    assert len(held) == circuits.count("under trial")


def test_search_for_one_peer_takes_no_other() -> None:
    group, clock, _ = group_of("closed", "closed")
    search = Search(group, only=group.peers["db2"])
    assert list(run(search, dict.fromkeys(NAMES, refused_by_host), clock)) == ["db2", "raised"]


@pytest.mark.parametrize(
    ("circuit", "by_hand", "expected"),
    [
        ("due", False, ["db1?", "connected"]),
        ("due", True, ["db1?", "connected"]),
        ("open", True, ["db1?", "connected"]),
        ("open", False, ["NoPeerAvailable"]),
        ("under trial", True, ["NoPeerAvailable"]),
    ],
)
def test_search_for_a_trial(circuit: str, by_hand: bool, expected: list[str]) -> None:
    # Another peer is in use, so that the trial is no last resort.
    group, clock, held = group_of(circuit, "closed")
    search = Search(group, "never", group.peers["db1"], by_hand=by_hand)
    assert list(run(search, dict.fromkeys(NAMES), clock)) == expected
    assert len(held) == (circuit == "under trial")


def test_wrong_word_for_trials_is_refused() -> None:
    group, _, _ = group_of("closed")
    with pytest.raises(ConfigError, match="trials is 'sometimes'"):
        Search(group, "sometimes")


# What it costs


def test_ordinary_way_calls_few_functions_and_leaves_no_garbage() -> None:
    """The first candidate works: no search waits for the garbage collector."""
    db = LoadBalancer(peers(*NAMES))

    def connect() -> None:
        db.connect(str)

    gc.disable()
    try:
        connect()
        assert python_calls(connect) <= 16
        assert [
            one for one in gc.get_objects() if type(one) is Search and one._group is db.group
        ] == []
    finally:
        gc.enable()
