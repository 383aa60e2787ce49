"""A circuit's transitions: every record with every event, beside rules written from the docs.

The oracle below shares no line with the code. It says, event by event, whether anything happens,
what state follows, and what the record then knows; docs/explanation/connecting.rst has the words.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Iterator
from typing import Any

import pytest

from django_proxysql import Fault
from django_proxysql.core import circuit as module
from django_proxysql.core.circuit import (
    Circuit,
    Transition,
    inherited,
    is_usable,
    transition,
    trial_of,
)
from django_proxysql.core.leases import Lease

NOW = 1000.0
LONG_AGO = float("-inf")
#: What the events say of the next trial, each in its own way.
LATER = NOW + 30

KINDS = ["closed", "suspect", "open", "half-open"]


def lease(*, expires: float = NOW + 60, ended: bool = False) -> Lease:
    made = Lease(expires)
    made.ended = ended
    # Its permit lives.
    made.holder = lambda: made
    return made


MINE = lease()
#: Whose trial the record has: none, the event's, another's, one that is over in some way.
LEASES = {
    "none": None,
    "mine": MINE,
    "another's": lease(),
    "ended": lease(ended=True),
    "expired": lease(expires=NOW),
    "permit gone": Lease(NOW + 60),
}


def records() -> Iterator[Circuit]:
    """Every kind of record, with all that an event looks at."""
    for kind, held, failures, successes, due in itertools.product(
        KINDS, LEASES.values(), (0, 2), (0, 1), (NOW - 1, NOW, NOW + 20)
    ):
        is_out = kind in ("open", "half-open")
        yield Circuit(
            state=kind if is_out else "closed",
            suspect=kind == "suspect",
            generation=7,
            failures=failures,
            successes=successes,
            out_since=NOW - 100 if is_out else None,
            tried=NOW - 2,
            due=due,
            lease=held,
            error="gone away" if kind != "closed" else "",
            fault=Fault.LOST if kind != "closed" else None,
            question="galera" if kind == "open" and failures else "",
            pending=(Transition("half-open", "open"),) if failures else (),
        )


def events() -> Iterator[Any]:
    def event(name: str, **said: Any) -> Any:
        return functools.partial(getattr(module, name), **said)

    for last_resort, asks_gate in itertools.product((None, 0.0, 2.0, 5.0), (False, True)):
        yield event("asked", lease=MINE, last_resort=last_resort, asks_gate=asks_gate)
    for generation in (6, 7):
        now = {"generation": generation}
        for held_back, due in itertools.product((0.0, 4.0), (NOW - 9, NOW + 9)):
            yield event("answered", **now, lease=MINE, held_back=held_back, due=due)
        for own in (None, MINE):
            for threshold in (1, 2):
                yield event("succeeded", **now, lease=own, success_threshold=threshold)
            refused = {"due": LATER, "error": "refused", "fault": Fault.UNREACHABLE}
            for fail_max in (1, 3, 4):
                yield event("failed", **now, lease=own, fail_max=fail_max, **refused)
        yield event("released", **now, lease=MINE, due=NOW + 1)
        theirs = {"error": "theirs", "fault": Fault.REFUSED, "question": "backend"}
        yield event("opened_elsewhere", **now, due=LATER, out_for=12.0, **theirs)
        yield event("closed_elsewhere", **now)
        yield from (event("put_off", **now, due=moment) for moment in (NOW + 5, NOW + 50))
    yield event("abandoned", lease=MINE, due=NOW + 1)
    yield event("opened_by_hand", due=LATER)
    yield from (event("half_opened_by_hand"), event("closed_by_hand"))
    yield event("rescheduled", seconds=8.0)
    yield event("suspected", error="lost", fault=Fault.LOST)
    says = {"error": "WSREP", "fault": Fault.NOT_READY, "question": "galera"}
    yield from (event("tripped", due=LATER, **says, failures=failures) for failures in (0, 5))


# The oracle


def kind_of(record: Circuit) -> str:
    return "suspect" if record.suspect else record.state


def opening(was: Circuit, **knows: Any) -> dict[str, Any]:
    """What each opening does to a record."""
    since = was.out_since if kind_of(was) in ("open", "half-open") else NOW
    fresh = {"state": "open", "suspect": False, "generation": 8, "successes": 0, "tried": NOW}
    return {**fresh, "out_since": since, **knows}


#: What each closing leaves: nothing but its own moment.
CLOSING: dict[str, Any] = {
    **Circuit()._asdict(),
    "generation": 8,
    "tried": NOW,
}
CLOSING.pop("pending")


def goes_on(was: Circuit) -> bool:
    """Whether a trial is under way."""
    return was.lease in (MINE, LEASES["another's"])


def expected(was: Circuit, event: Any) -> dict[str, Any]:
    """Return the fields that ``event`` changes, ``pending`` aside."""
    kind, name, said = kind_of(was), event.func.__name__, event.keywords
    of_now = said.get("generation", 7) == 7
    mine = was.lease is MINE
    # Whatever else is said, the trial that ends is over.
    over = {"lease": None} if mine and said.get("lease") is MINE else {}
    trial = "suspect" if kind == "suspect" else "half-open"

    if name == "asked":
        resort = said["last_resort"] is not None and said["last_resort"] <= 2
        if kind == "closed" or goes_on(was) or not (was.due <= NOW or resort):
            return {}
        begun = {"lease": MINE}
        return begun if said["asks_gate"] or trial == "suspect" else {**begun, "state": "half-open"}
    if name == "answered":
        if not mine or not of_now or was.state == "closed":
            return over
        if said["held_back"]:
            return {"lease": None, "state": "open", "due": max(NOW + 4, said["due"])}
        return {"state": "half-open"}

    if name in ("succeeded", "failed", "released"):
        is_trial = said["lease"] is not None
        if not of_now or (is_trial and not mine):
            return over
    if name == "succeeded":
        if not is_trial:
            return {"failures": 0}
        if was.state == "closed":
            return {**over, "suspect": False, "failures": 0, "error": "", "fault": None}
        if was.successes + 1 >= said["success_threshold"]:
            return CLOSING
        return {**over, "successes": was.successes + 1, "due": NOW, "tried": NOW}
    if name == "failed":
        says = {"error": "refused", "fault": Fault.UNREACHABLE, "failures": was.failures + 1}
        if is_trial or kind == "half-open" or was.failures + 1 >= said["fail_max"]:
            return {**over, **opening(was, due=LATER, **says)}
        return {**over, "tried": NOW, **says}
    if name == "released":
        if was.state == "closed":
            return {**over, "tried": NOW}
        return {**over, "state": "open", "tried": NOW, "due": NOW + 1}
    if name == "abandoned":
        return {**over, "state": "open", "due": NOW + 1} if over and kind == "half-open" else over

    if name == "opened_by_hand":
        return opening(was, due=LATER, error="opened by hand", fault=None)
    if name == "closed_by_hand":
        return {**CLOSING, "lease": was.lease}
    if name == "half_opened_by_hand":
        was_closed = was.state == "closed"
        since = {"out_since": NOW, "generation": 8} if was_closed else {}
        return {"state": "half-open", "suspect": False, "successes": 0, "due": NOW, **since}
    if name == "suspected":
        doubt = {"suspect": True, "tried": NOW, "due": LONG_AGO}
        return {**doubt, "error": "lost", "fault": Fault.LOST} if kind == "closed" else {}
    if name == "tripped":
        if kind in ("open", "half-open"):
            return {"question": "galera"}
        says = {"error": "WSREP", "fault": Fault.NOT_READY, "question": "galera"}
        return opening(was, due=LATER, failures=max(was.failures, said["failures"]), **says)
    if name == "rescheduled":
        return {"due": was.tried + 8} if kind == "open" else {}

    if not of_now:
        return {}
    if name == "closed_elsewhere":
        return {} if was.state == "closed" else {**CLOSING, "lease": was.lease}
    if name == "put_off":
        return {"due": max(was.due, said["due"])} if kind == "open" else {}
    assert name == "opened_elsewhere"
    says = {"error": "theirs", "fault": Fault.REFUSED, "due": LATER}
    if was.state == "closed":
        news = {"out_since": NOW - 12, "tried": LONG_AGO, "question": "backend"}
        return {**opening(was, **says), **news}
    if goes_on(was):
        return {}
    return {"state": "open", "successes": 0, "question": was.question or "backend", **says}


# The comparison


@pytest.mark.parametrize("elsewhere", [False, True])
def test_every_record_with_every_event(elsewhere: bool) -> None:
    """State, counts, times, lease and what is notified: all as the rules say."""
    combinations = 0
    for was, event in itertools.product(records(), events()):
        combinations += 1
        copy = was._asdict()
        now = transition(was, event, NOW, elsewhere)
        wanted = was._replace(**expected(was, event))
        if kind_of(wanted) != kind_of(was):
            seconds = {"open": wanted.due - NOW, "half-open": 0.0}.get(
                wanted.state, 0.0 if was.out_since is None else NOW - was.out_since
            )
            change = Transition(
                was.state, wanted.state, wanted.fault, wanted.error, seconds, elsewhere
            )
            wanted = wanted._replace(pending=(*was.pending, change))
        assert now == wanted, (was, event)
        # A record is never changed, and an event that changes nothing makes no new one.
        assert was._asdict() == copy
        assert now == was or now is not was
    assert combinations > 15_000


def test_a_suspect_is_closed_and_a_peer_is_out_while_its_circuit_is_not_closed() -> None:
    for was, event in itertools.product(records(), events()):
        now = transition(was, event, NOW)
        assert not now.suspect or now.state == "closed", (was, event)
        assert (now.out_since is None) == (now.state == "closed"), (was, event)


def test_every_event_is_tried() -> None:
    known = {
        name
        for name, thing in vars(module).items()
        if inspect.isfunction(thing)
        and thing.__annotations__.get("return") == "Circuit"
        and not name.startswith("_")
    }
    assert {event.func.__name__ for event in events()} == known - {"inherited", "transition"}


def test_generation_grows_with_each_opening_and_closing_alone() -> None:
    """Results of an older time are known for what they are, and no others."""
    for was, event in itertools.product(records(), events()):
        now = transition(was, event, NOW)
        grown = now.generation - was.generation
        assert grown in (0, 1)
        if (was.state == "closed") != (now.state == "closed"):
            assert grown == 1, (was, event)


def test_a_trial_under_way_is_alone_whatever_happens() -> None:
    for was, event in itertools.product(records(), events()):
        if trial_of(was, NOW) is not None and was.lease is not MINE:
            assert transition(was, event, NOW).lease is was.lease, (was, event)


def test_child_of_a_fork_begins_without_trial_and_news() -> None:
    """It keeps what is known of the peer."""
    for was in records():
        now = inherited(was)
        assert trial_of(now, NOW) is None
        assert now.pending == ()
        had_trial = was.lease is not None and was.state == "half-open"
        wanted = was._replace(lease=None, pending=(), state="open" if had_trial else was.state)
        assert now == wanted


def test_only_a_closed_circuit_without_doubts_is_usable() -> None:
    for was in records():
        assert is_usable(was) == (kind_of(was) == "closed")
