"""What PeerBreaker promises one caller; tests/test_breaker_threads.py has the crowds.

What each event does to a circuit, in whatever order, is in tests/test_circuit.py, and what every
way to guard a call has in common with pybreaker in tests/test_like_pybreaker.py.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import threading
from collections import Counter
from functools import partial
from typing import Any

import MySQLdb
import psycopg
import psycopg2
import pybreaker
import pymysql
import pytest

from django_proxysql import Fault, NotReady, PeerBreaker
from django_proxysql.core.breaker import CircuitBreakerError
from django_proxysql.core.circuit import Transition, closed_elsewhere
from tests.fakes import (
    Clock,
    Recorder,
    even,
    holding,
    in_thread,
    lock_is_free,
    raised_by,
    refused_by_host,
    running,
)
from tests.test_like_pybreaker import WAYS


class Boom(Exception):
    """An exception of no driver's."""


class GreenletTimeout(BaseException):
    """As gevent.Timeout: no Exception."""


def fail(exc: BaseException | None = None) -> None:
    raise exc or Boom("no")


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def breaker(clock: Clock) -> PeerBreaker:
    return PeerBreaker(fail_max=3, reset_timeout=30, clock=clock, jitter=even, name="db1")


def opened(breaker: PeerBreaker) -> PeerBreaker:
    while breaker.current_state != "open":
        breaker.acquire().failed(refused_by_host(), Fault.UNREACHABLE)
    return breaker


def due_for_trial(breaker: PeerBreaker, clock: Clock) -> None:
    opened(breaker)
    clock.advance(30)


class TestOpening:
    @pytest.mark.parametrize(
        ("draw", "due"),
        [(0.0, 27.0), (0.5, 30.0), (1 - 1e-12, 33.0)],
        ids=["early", "even", "late"],
    )
    def test_trial_is_due_after_reset_timeout_give_or_take_a_tenth(
        self, clock: Clock, draw: float, due: float
    ) -> None:
        breaker = opened(PeerBreaker(reset_timeout=30, clock=clock, jitter=lambda: draw))
        clock.now = due - 1e-6
        assert breaker.acquire() is None
        clock.now = due + 1e-6
        permit = breaker.acquire()
        assert permit.is_trial

    def test_default_jitter_spreads_a_fleet(self, clock: Clock) -> None:
        """Breakers that opened at one moment do not all try at one moment."""
        dues = [opened(PeerBreaker(reset_timeout=30, clock=clock)).circuit.due for _ in range(50)]
        assert len(set(dues)) > 40
        assert 27 <= min(dues) < 29 < 31 < max(dues) <= 33


def test_good_trial_of_a_suspect_leaves_no_trace(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    recorder = Recorder()
    breaker = PeerBreaker(clock=clock, listeners=[recorder])
    under_way = breaker.acquire()
    breaker.suspect("(2013, 'Lost connection')", Fault.LOST)
    breaker.acquire().succeeded()
    assert breaker.is_available
    assert not caplog.records
    assert recorder.told == ["success"]
    # No new generation either.
    assert under_way.failed(Boom()) == 1


def test_lost_trial_is_cancelled_while_another_thread_is_at_the_record(
    breaker: PeerBreaker, clock: Clock
) -> None:
    """A finalizer waits for no lock; the next caller gets the trial at once."""
    due_for_trial(breaker, clock)
    permits = [breaker.acquire()]
    with holding(breaker._lock):
        # Here, where it was made: elsewhere free-threaded Python leaves its end to this thread.
        permits.clear()
        assert breaker.trial is None
    assert breaker.acquire().is_trial


class TestFromWithin:
    """Signal handlers and finalizers use the circuit while their thread is replacing its record."""

    class Struck(PeerBreaker):
        """Calls ``handler`` once in the middle of the next change, as a signal would be handled."""

        handler: Any = None

        def replace(self, event: Any, *args: Any, **options: Any) -> Any:
            def interrupted(circuit: Any, now: float) -> Any:
                after = event(circuit, now)
                handler, self.handler = self.handler, None
                if handler is not None:
                    handler()
                return after

            return super().replace(interrupted, *args, **options)

    def test_two_failures_are_both_counted(self, clock: Clock) -> None:
        breaker = self.Struck(fail_max=3, clock=clock)
        one, other = breaker.acquire(), breaker.acquire()
        breaker.handler = lambda: other.failed(Boom())
        assert one.failed(Boom()) == 2
        assert breaker.fail_counter == 2

    def test_trial_during_admission(self, clock: Clock) -> None:
        """The handler has the trial; the interrupted caller is passed by."""
        breaker = opened(self.Struck(clock=clock, jitter=even))
        clock.advance(30)
        got: list[Any] = []
        breaker.handler = lambda: got.append(breaker.acquire())
        assert breaker.acquire() is None
        assert got[0].is_trial
        got[0].succeeded()
        assert breaker.is_available


#: The ways to guard a function that has one result.
GUARDS = {name: way for name, way in WAYS.items() if name != "generator"}


class TestCalls:
    """call, calling, the decorator and call_async: pybreaker's interface."""

    @pytest.mark.parametrize(
        "exclude", [LookupError, lambda exc: "fine" in str(exc)], ids=["its base", "predicate"]
    )
    def test_excluded_exceptions_count_for_nothing(self, clock: Clock, exclude: Any) -> None:
        breaker = PeerBreaker(exclude=[exclude], clock=clock, jitter=even)
        error = KeyError("fine")
        assert raised_by(partial(breaker.call, fail, error)) is error
        assert breaker.current_state == "closed"
        breaker.remove_excluded_exception(exclude)
        raised_by(partial(breaker.call, fail, error))
        assert breaker.current_state == "open"

    @pytest.fixture(params=GUARDS)
    def guard(self, request: pytest.FixtureRequest, breaker: PeerBreaker) -> Any:
        return partial(GUARDS[request.param], breaker)

    def test_refuses_while_open(self, guard: Any, breaker: PeerBreaker) -> None:
        """An open circuit refuses with pybreaker's error, which says why it is open."""
        opened(breaker)
        called: list[int] = []
        with pytest.raises(pybreaker.CircuitBreakerError, match=r"db1 is open: \(2002, ") as caught:
            guard(lambda: called.append(1))
        assert caught.type is CircuitBreakerError
        assert not called

    def test_trial_is_the_only_way_in(self, guard: Any, breaker: PeerBreaker, clock: Clock) -> None:
        due_for_trial(breaker, clock)
        refused: list[Any] = []

        def during() -> None:
            for other in GUARDS.values():
                call = partial(other, breaker, int)
                refused.append(in_thread(lambda call=call: raised_by(call)))

        guard(during)
        assert [type(error) for error in refused] == [CircuitBreakerError] * len(GUARDS)
        why = "The circuit of db1 is being tried by another caller: (2002, "
        assert all(str(error).startswith(why) for error in refused)
        assert breaker.current_state == "closed"

    def test_no_lock_is_held_and_no_caller_is_kept_waiting(
        self, guard: Any, breaker: PeerBreaker, clock: Clock
    ) -> None:
        """While a guarded call runs, others run as well and the lock is free."""
        meeting = threading.Barrier(4)

        def work() -> None:
            meeting.wait(60)
            assert lock_is_free(breaker)
            meeting.wait(60)

        with running(*[lambda: guard(work)] * 4):
            pass
        due_for_trial(breaker, clock)
        assert guard(lambda: lock_is_free(breaker))

    @pytest.mark.parametrize("way", ["call_async", "calling_async", "generator"])
    @pytest.mark.parametrize("turns", range(4))
    def test_task_cancelled_at_any_await_gives_the_trial_back(
        self, breaker: PeerBreaker, clock: Clock, way: str, turns: int
    ) -> None:
        """It counts for nothing; the circuit is half-open for one task alone meanwhile."""
        due_for_trial(breaker, clock)
        begun: list[int] = []

        async def waits() -> None:
            for _ in range(10):
                begun.append(1)
                await asyncio.sleep(0)

        async def items() -> Any:
            await waits()
            yield 1

        async def guarded() -> None:
            if way == "call_async":
                await breaker.call_async(waits)
            elif way == "calling_async":
                async with breaker.calling_async():
                    await waits()
            else:
                async for _ in await breaker.call_async(items):
                    pass

        async def main() -> None:
            task = asyncio.ensure_future(guarded())
            for _ in range(turns):
                await asyncio.sleep(0)
            if begun:
                assert lock_is_free(breaker)
                with pytest.raises(CircuitBreakerError):
                    await breaker.call_async(waits)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

        asyncio.run(main())
        assert breaker.trial is None
        assert breaker.fail_counter == 3
        clock.advance(1)
        assert breaker.acquire().is_trial

    def test_async_generator_yields_and_takes_what_its_own_does(self, breaker: PeerBreaker) -> None:
        """What is sent and thrown goes to the function's generator; its end ends the call."""
        breaker.acquire().failed(Boom())

        async def echo() -> Any:
            try:
                sent = yield "first"
            except KeyError:
                sent = yield "caught"
            yield sent * 2

        async def main() -> list[Any]:
            run = await breaker.call_async(echo)
            taken = [await run.asend(None), await run.athrow(KeyError()), await run.asend(4)]
            assert breaker.fail_counter == 1
            return [*taken, *[item async for item in run]]

        assert asyncio.run(main()) == ["first", "caught", 8]
        assert breaker.fail_counter == 0

    def test_async_generator_that_is_left_early_gives_the_trial_back(
        self, breaker: PeerBreaker, clock: Clock
    ) -> None:
        """And its own clean-up runs."""
        due_for_trial(breaker, clock)
        closed: list[int] = []

        async def items() -> Any:
            try:
                yield 1
            finally:
                closed.append(1)

        async def main() -> None:
            run = await breaker.call_async(items)
            assert await run.asend(None) == 1
            await run.aclose()

        asyncio.run(main())
        assert closed == [1]
        assert breaker.trial is None

    def test_predicate_that_raises_hides_nothing(
        self, clock: Clock, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A predicate's own mistake is logged; the call's error counts and is raised."""
        breaker = PeerBreaker(exclude=[lambda exc: exc.code == 1], clock=clock, jitter=even)
        with pytest.raises(Boom):
            breaker.call(fail)
        assert breaker.current_state == "open"
        assert "exclude predicate" in caplog.text
        clock.advance(30)
        with pytest.raises(Boom):
            breaker.call(fail)
        assert breaker.trial is None

    @pytest.mark.parametrize(
        ("error", "counts"),
        [
            (MySQLdb.OperationalError(2003, "Can't connect"), True),
            (MySQLdb.OperationalError(1045, "Access denied"), True),
            (pymysql.err.OperationalError(1040, "Too many connections"), False),
            (MySQLdb.ProgrammingError(1146, "Table 'app.t' doesn't exist"), False),
            (psycopg.errors.AdminShutdown("terminating connection"), True),
            (psycopg.errors.UniqueViolation("duplicate key"), False),
            (psycopg2.OperationalError("could not connect: Connection refused"), True),
            (sqlite3.OperationalError("unable to open database file"), True),
            (NotReady("read-only"), True),
            (Boom("no driver's"), True),
            (ValueError("no driver's"), True),
            (KeyError("excluded"), False),
            (KeyboardInterrupt(), False),
            (GreenletTimeout(), False),
        ],
        ids=lambda value: repr(value)[:36] if isinstance(value, BaseException) else "",
    )
    def test_what_counts(self, guard: Any, error: BaseException, counts: bool) -> None:
        """A driver's error counts by its fault, any other unless excluded, no BaseException."""
        breaker = guard.args[0]
        breaker.fail_max = 1
        breaker.add_excluded_exception(KeyError)
        assert raised_by(lambda: guard(lambda: fail(error))) is error
        assert breaker.current_state == ("open" if counts else "closed")

    def test_generator_is_guarded_while_it_is_run_through(self, breaker: PeerBreaker) -> None:
        """Items and sent values pass; it is a generator still, and refused when it is called."""

        @breaker
        def echo() -> Any:
            got = yield "first"
            while got is not None:
                got = yield got * 2

        assert echo.__name__ == "echo"
        breaker.acquire().failed(Boom())
        run = echo()
        assert [next(run), run.send(4), run.send("ab")] == ["first", 8, "abab"]
        assert breaker.fail_counter == 1
        with pytest.raises(StopIteration):
            run.send(None)
        assert breaker.fail_counter == 0
        breaker.open()
        with pytest.raises(CircuitBreakerError):
            echo()


class TestListeners:
    def test_that_was_removed_is_not_notified_any_more(self, breaker: PeerBreaker) -> None:
        first, second = Recorder(), Recorder()
        breaker.add_listeners(first, second)
        breaker.open()
        breaker.remove_listener(first)
        breaker.close()
        assert breaker.listeners == (second,)
        assert (first.told, len(second.told)) == ([("closed", "open")], 2)

    def test_run_outside_the_lock(self, clock: Clock) -> None:
        free: list[bool] = []

        class Nosy(pybreaker.CircuitBreakerListener):
            def look(self, cb: Any, *args: Any, **kwargs: Any) -> None:
                free.append(lock_is_free(cb))

            before_call = success = failure = state_change = look

        breaker = PeerBreaker(
            clock=clock,
            jitter=even,
            listeners=[Nosy()],
            on_transition=lambda _: free.append(lock_is_free(breaker)),
        )
        breaker.call(int)
        raised_by(lambda: breaker.call(fail))
        clock.advance(30)
        raised_by(lambda: breaker.call(fail, KeyboardInterrupt()))
        clock.advance(1)
        breaker.call(int)
        breaker.suspect()
        breaker.call(int)
        breaker.open()
        breaker.half_open()
        breaker.close()
        assert len(free) >= 25
        assert all(free)

    @pytest.mark.parametrize("who", ["before_call", "success", "failure", "exclude"])
    @pytest.mark.parametrize("how", WAYS)
    def test_trial_that_is_interrupted_in_one_of_them_is_over(
        self, who: str, how: str, clock: Clock
    ) -> None:
        """Although the exception is kept, and with its traceback all frames."""

        def interrupt(*_: Any, **__: Any) -> bool:
            if armed:
                raise KeyboardInterrupt
            return False

        armed: list[int] = []
        listener = Recorder()
        if who != "exclude":
            setattr(listener, who, interrupt)
        exclude = [interrupt] if who == "exclude" else []
        breaker = PeerBreaker(clock=clock, listeners=[listener], exclude=exclude)
        breaker.open()
        clock.advance(40)
        armed.append(1)

        def work() -> None:
            if who in ("failure", "exclude"):
                raise Boom

        kept = raised_by(lambda: WAYS[how](breaker, work))
        assert type(kept) is KeyboardInterrupt
        assert breaker.trial is None

    def test_that_raise_do_no_harm(self, clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
        """Whatever a listener raises is logged; the call, the circuit and the others go on."""

        class Bad(pybreaker.CircuitBreakerListener):
            def spoil(self, cb: Any, *args: Any, **kwargs: Any) -> None:
                raise RuntimeError("listener")

            before_call = success = failure = state_change = spoil

        def bad_transition(transition: Transition) -> None:
            raise RuntimeError("on_transition")

        recorder = Recorder()
        breaker = PeerBreaker(
            clock=clock,
            jitter=even,
            listeners=[Bad(), recorder],
            on_transition=bad_transition,
            name="db1",
        )
        assert breaker.call(int) == 0
        with pytest.raises(Boom):
            breaker.call(fail)
        assert breaker.current_state == "open"
        clock.advance(30)
        assert breaker.call(int) == 0
        assert breaker.current_state == "closed"
        assert ("half-open", "closed") in recorder.told
        assert {record.levelno for record in caplog.records} == {logging.ERROR}
        assert Counter(caplog.messages) == {
            "A listener of the circuit of db1 raised": 9,
            "The on_transition of the circuit of db1 raised": 3,
        }

    def test_that_are_interrupted_give_the_trial_back(self, clock: Clock) -> None:
        def interrupted(transition: Transition) -> None:
            if transition.after == "half-open":
                raise KeyboardInterrupt

        breaker = opened(PeerBreaker(clock=clock, jitter=even, on_transition=interrupted))
        clock.advance(30)
        with pytest.raises(KeyboardInterrupt):
            breaker.acquire()
        assert breaker.trial is None
        assert breaker.current_state == "open"


class TestPybreakersOwnInterface:
    def test_thresholds_that_are_set_hold_from_the_next_result(self, clock: Clock) -> None:
        breaker = PeerBreaker(fail_max=5, clock=clock, jitter=even)
        breaker.acquire().failed(Boom())
        breaker.fail_max = 2
        breaker.success_threshold = 2
        breaker.acquire().failed(Boom())
        assert breaker.current_state == "open"
        clock.advance(30)
        breaker.acquire().succeeded()
        assert breaker.current_state == "half-open"

    def test_new_reset_timeout_holds_at_once(self, breaker: PeerBreaker, clock: Clock) -> None:
        opened(breaker)
        clock.advance(5)
        breaker.reset_timeout = 5
        assert breaker.reset_timeout == 5
        assert breaker.acquire().is_trial

    @pytest.mark.parametrize("state", ["open", "half-open", "closed"])
    def test_state_can_be_set(self, breaker: PeerBreaker, state: str) -> None:
        breaker.state = state
        assert breaker.current_state == state
        with pytest.raises(ValueError, match="Unknown state 'ajar'"):
            breaker.state = "ajar"

    @pytest.mark.parametrize("state", ["closed", "open", "suspect", "half-open"])
    def test_repr_says_name_and_state(self, breaker: PeerBreaker, clock: Clock, state: str) -> None:
        if state == "suspect":
            breaker.suspect()
        elif state == "open":
            breaker.open()
        elif state == "half-open":
            due_for_trial(breaker, clock)
            trial = breaker.acquire()  # noqa: F841  (It lives.)
            assert "trial under way" in repr(breaker)
        assert repr(breaker).startswith("<PeerBreaker 'db1' ")
        assert state in repr(breaker)


class TestGate:
    """Who is asked before a trial, while others change the circuit."""

    @pytest.fixture
    def told(self) -> Recorder:
        return Recorder()

    @pytest.fixture
    def due(self, clock: Clock, told: Recorder) -> PeerBreaker:
        breaker = PeerBreaker(clock=clock, jitter=even, listeners=[told], reset_timeout=30)
        breaker.open()
        clock.advance(30)
        return breaker

    @pytest.mark.parametrize("held_back", [0.0, 5.0])
    def test_circuit_that_closes_meanwhile_is_not_tried(
        self, due: PeerBreaker, told: Recorder, clock: Clock, held_back: float
    ) -> None:
        """What another process's trial has closed is used, and not tried."""

        def gate(by_hand: bool) -> float:
            assert due.trial is not None
            closed = partial(closed_elsewhere, generation=due.circuit.generation)
            due.apply(closed, clock(), elsewhere=True)
            return held_back

        due.gate = gate
        permit = due.acquire()
        assert not permit.is_trial
        assert due.trial is None
        permit.succeeded()
        assert told.told == [("closed", "open"), ("open", "closed"), "success"]

    @pytest.mark.parametrize("held_back", [0.0, 5.0])
    @pytest.mark.parametrize("doubt", ["open", "suspect"])
    def test_circuit_that_is_in_doubt_anew_is_not_tried(
        self, due: PeerBreaker, held_back: float, doubt: str
    ) -> None:
        """One that has become suspect while the gate was asked gets a trial of its own."""

        def gate(by_hand: bool) -> float:
            due.close()
            getattr(due, doubt)()
            return held_back

        due.gate = gate
        assert due.acquire() is None
        assert due.trial is None
        assert (due.acquire() is None) == (doubt == "open")

    def test_listeners_are_not_notified_of_a_trial_that_is_held_back(
        self, due: PeerBreaker, told: Recorder, clock: Clock
    ) -> None:
        """The circuit is open until the gate lets the caller through."""
        due.gate = lambda by_hand: 5.0
        assert due.acquire() is None
        assert told.told == [("closed", "open")]
        clock.advance(5)
        due.gate = lambda by_hand: 0.0
        assert due.acquire() is not None
        assert told.told == [("closed", "open"), ("open", "half-open")]
