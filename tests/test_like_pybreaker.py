"""PeerBreaker in the place of ``pybreaker.CircuitBreaker``: the same calls, the same outcomes.

Each test compares the two. Where they differ on purpose the class says so, and so does
docs/reference/breaker.rst.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from typing import Any

import pybreaker
import pytest

from django_proxysql import PeerBreaker
from django_proxysql.core.exceptions import ConfigError
from tests.fakes import Clock, Recorder, even

TIMEOUT = 60


class Boom(Exception):
    """The guarded function's own."""


class Pair:
    """One breaker of each kind, that get the same calls."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.clock = Clock()
        self.listeners = Recorder(), Recorder()
        theirs = pybreaker.CircuitBreaker(
            *args, listeners=[self.listeners[0]], throw_new_error_on_trip=False, **kwargs
        )
        ours = PeerBreaker(
            *args, listeners=[self.listeners[1]], clock=self.clock, jitter=even, **kwargs
        )
        self.both = theirs, ours

    def wait(self) -> None:
        """Let the time-out pass."""
        self.clock.advance(TIMEOUT)
        storage = self.both[0]._state_storage
        if storage.opened_at is not None:
            storage.opened_at -= timedelta(seconds=TIMEOUT)

    def same(self, do: Callable[[Any], Any]) -> None:
        """Do it to both, and compare what came of it, and what is known afterwards."""
        outcomes = [outcome(lambda breaker=breaker: do(breaker)) for breaker in self.both]
        assert outcomes[0] == outcomes[1]
        theirs, ours = self.both
        assert theirs.current_state == ours.current_state
        assert theirs.state.name == ours.state.name
        if theirs.current_state == "closed":
            assert theirs.fail_counter == ours.fail_counter
        if theirs.current_state == "half-open":
            assert theirs.success_counter == ours.success_counter


def outcome(do: Callable[[], Any]) -> Any:
    try:
        return do()
    except Exception as exc:
        return type(exc)


def fails() -> None:
    raise Boom


def in_a_block(breaker: Any, work: Callable[[], Any]) -> Any:
    with breaker.calling():
        return work()


def as_a_generator(breaker: Any, work: Callable[[], Any]) -> Any:
    def rows() -> Any:
        yield 1
        yield work()

    return list(breaker.call(rows))


async def in_an_async_block(breaker: PeerBreaker, work: Callable[[], Any]) -> Any:
    async with breaker.calling_async():
        return work()


async def awaited(breaker: PeerBreaker, work: Callable[[], Any]) -> Any:
    async def working() -> Any:
        return work()

    return await breaker.call_async(working)


async def as_an_async_generator(breaker: PeerBreaker, work: Callable[[], Any]) -> Any:
    async def items() -> Any:
        yield work()

    (item,) = [item async for item in await breaker.call_async(items)]
    return item


def beside_call(way: Callable[[PeerBreaker, Callable[[], Any]], Any]) -> Callable[..., Any]:
    """Return a way that pybreaker's breaker has not: it does what its ``call`` does."""

    def guard(breaker: Any, work: Callable[[], Any]) -> Any:
        if not isinstance(breaker, PeerBreaker):
            return breaker.call(work)
        # Nothing in it waits.
        with pytest.raises(StopIteration) as ended:
            way(breaker, work).send(None)
        return ended.value.value

    return guard


#: The ways to guard a function.
WAYS: dict[str, Callable[[Any, Callable[[], Any]], Any]] = {
    "call": lambda breaker, work: breaker.call(work),
    "decorator": lambda breaker, work: breaker(work)(),
    "decorator with ()": lambda breaker, work: breaker()(work)(),
    "calling": in_a_block,
    "generator": as_a_generator,
    "call_async": beside_call(awaited),
    "call_async, plain function": beside_call(lambda breaker, work: breaker.call_async(work)),
    "call_async, generator": beside_call(as_an_async_generator),
    "calling_async": beside_call(in_an_async_block),
}


def do(way: Any, step: str) -> Callable[[Any], Any] | None:
    return {
        "good": lambda breaker: way(breaker, lambda: 42),
        "bad": lambda breaker: way(breaker, fails),
        "open": lambda breaker: breaker.open() and None,
        "close": lambda breaker: breaker.close(),
        "half": lambda breaker: breaker.half_open(),
    }.get(step)


@pytest.mark.parametrize("way", list(WAYS))
@pytest.mark.parametrize(("fail_max", "threshold"), [(1, 1), (2, 1), (3, 2)])
def test_every_sequence(way: str, fail_max: int, threshold: int) -> None:
    """Whatever happens, in whatever order: outcome, state and counts are pybreaker's."""
    steps = ["good", "bad", "wait", "open", "close", "half"]
    for sequence in itertools.product(steps, repeat=4):
        pair = Pair(fail_max, TIMEOUT, threshold)
        for step in sequence:
            doing = do(WAYS[way], step)
            pair.wait() if doing is None else pair.same(doing)


def test_listeners_get_the_same() -> None:
    """Only the order of a trial's success and the closing that it leads to is another one."""
    pair = Pair(2, TIMEOUT, 1)
    for step in "good bad good bad bad good wait bad wait good good".split():
        doing = do(WAYS["call"], step)
        pair.wait() if doing is None else pair.same(doing)
    theirs, ours = (" ".join(map(str, listener.told)) for listener in pair.listeners)
    closing = ("half-open", "closed")
    assert theirs.replace(f"{closing} success", f"success {closing}") == ours


# Arguments


def test_arguments_stand_where_pybreaker_s_do() -> None:
    listener = Recorder()
    storage = pybreaker.CircuitMemoryStorage("closed")
    breaker = PeerBreaker(4, 9, 2, [KeyError], [listener], storage, "mine", False)
    assert (breaker.fail_max, breaker.reset_timeout, breaker.success_threshold) == (4, 9, 2)
    assert breaker.excluded_exceptions == (KeyError,)
    assert breaker.listeners == (listener,)
    assert breaker.name == "mine"
    assert PeerBreaker(listeners=None, exclude=None, state_storage=None).listeners == ()


@pytest.mark.parametrize("state", ["closed", "open", "half-open"])
@pytest.mark.parametrize("age", [None, 10, TIMEOUT + 1])
def test_memory_storage(state: str, age: float | None) -> None:
    """A circuit begins in the storage's state, as with pybreaker, and no listener is called."""
    storages = [pybreaker.CircuitMemoryStorage(state) for _ in range(2)]
    for storage in storages:
        storage.increment_counter()
        if age is not None:
            storage.opened_at = datetime.now(timezone.utc) - timedelta(seconds=age)
    listener = Recorder()
    theirs = pybreaker.CircuitBreaker(
        3, TIMEOUT, state_storage=storages[0], throw_new_error_on_trip=False
    )
    ours = PeerBreaker(3, TIMEOUT, listeners=[listener], state_storage=storages[1])
    assert not listener.told
    assert theirs.current_state == ours.current_state == state
    for step in ["good", "bad", "good"]:
        doing = do(WAYS["call"], step)
        assert doing is not None
        assert outcome(lambda: doing(theirs)) == outcome(lambda: doing(ours))  # noqa: B023
        assert theirs.current_state == ours.current_state


class Shared(pybreaker.CircuitMemoryStorage):
    """Somebody's own."""


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("state_storage", Shared("closed"), "Shared, which cannot hold.* shared_state= "),
        ("throw_new_error_on_trip", True, "raises what its function raised"),
    ],
)
def test_what_cannot_hold_is_refused_by_name(name: str, value: Any, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason) as caught:
        PeerBreaker(**{name: value})
    assert caught.value.setting == name


# What differs, and is meant to


class TestDifferences:
    def test_defaults(self) -> None:
        """One failed connect is enough here, and half the time."""
        theirs, ours = pybreaker.CircuitBreaker(), PeerBreaker()
        assert (theirs.fail_max, theirs.reset_timeout, theirs.success_threshold) == (5, 60, 1)
        assert (ours.fail_max, ours.reset_timeout, ours.success_threshold) == (1, 30, 1)

    def test_the_call_that_trips_raises_its_own_error(self) -> None:
        assert outcome(lambda: pybreaker.CircuitBreaker(1).call(fails)) is not Boom
        assert outcome(lambda: PeerBreaker(1).call(fails)) is Boom

    @pytest.mark.parametrize(("circuit", "theirs"), [("closed", 0), ("half-open", "closed")])
    def test_an_excluded_exception_is_no_success(self, circuit: str, theirs: Any) -> None:
        pair = Pair(3, TIMEOUT, exclude=[KeyError])
        pair.same(do(WAYS["call"], "bad" if circuit == "closed" else "half"))  # type: ignore[arg-type]
        for breaker in pair.both:
            assert outcome(lambda breaker=breaker: breaker.call({}.__getitem__, 1)) is KeyError
        if circuit == "closed":
            assert [breaker.fail_counter for breaker in pair.both] == [theirs, 1]
        else:
            assert [breaker.current_state for breaker in pair.both] == [theirs, "open"]

    def test_an_interrupt_is_no_failure(self) -> None:
        def interrupted() -> None:
            raise KeyboardInterrupt

        pair = Pair(1, TIMEOUT)
        for breaker in pair.both:
            with pytest.raises(KeyboardInterrupt):
                breaker.call(interrupted)
        assert [breaker.current_state for breaker in pair.both] == ["open", "closed"]

    def test_one_caller_has_the_trial(self) -> None:
        """Others are turned away until it is over; pybreaker's calling() lets all of them in."""
        inside: list[list[Any]] = []
        for breaker in Pair(1, TIMEOUT).both:
            breaker.half_open()
            with breaker.calling():
                others = [outcome(lambda b=breaker: in_a_block(b, lambda: 42)) for _ in range(2)]
            inside.append(others)
        assert inside == [[42, 42], [pybreaker.CircuitBreakerError] * 2]
