"""Locks whose holder is killed."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import sys
import threading
from collections.abc import Callable
from types import FrameType, SimpleNamespace
from typing import Any

import pytest

from django_proxysql import LoadBalancer, registry
from django_proxysql.backends import pools
from django_proxysql.core import dispatch, runtime
from django_proxysql.core.runtime import RecoveringLock, new_lock
from tests.fakes import holding, in_thread, running, until
from tests.strikes import Injected


def test_one_at_a_time() -> None:
    """It keeps others out, and lets its holder in again."""
    lock = RecoveringLock()
    with lock, lock:
        assert not in_thread(lambda: lock.acquire(blocking=False))
        assert not in_thread(lambda: lock.acquire(timeout=0.01))
    assert in_thread(lambda: lock.acquire(blocking=False))


def test_holder_that_never_releases() -> None:
    """A thread that waits gets the lock; of several, one at a time."""
    lock = RecoveringLock(patience=0.01)
    in_thread(lock.acquire)
    inside = []

    def work() -> None:
        with lock:
            inside.append(1)
            assert inside == [1]
            inside.pop()

    with running(*[work] * 8):
        pass


def test_holder_who_is_late() -> None:
    """A release of what has been taken away does nothing, and another's is not touched."""
    lock = RecoveringLock(patience=0.01)
    lock.acquire()
    with holding(lock):
        lock.release()
        assert not lock.acquire(blocking=False)
    assert lock.acquire(blocking=False)


def test_thread_that_is_killed_in_a_loop_within_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next one gets the lock, whichever it is in this version of Python."""
    monkeypatch.setattr(runtime, "RecoveringLock", functools.partial(RecoveringLock, patience=0.01))
    lock = new_lock()
    # (No event: it has a lock of its own.)
    rounds: list[int] = []

    def go_round() -> None:
        while True:
            turns = 0
            with lock:
                while turns < 100:
                    turns += 1
            rounds.append(turns)

    def work() -> None:
        # Around the call: within the loop it would not hold either.
        with contextlib.suppress(Injected):
            go_round()

    throw = ctypes.pythonapi.PyThreadState_SetAsyncExc
    for _ in range(50):
        rounds.clear()
        with running(work) as (thread,):
            until(lambda: rounds)
            throw(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(Injected))
        assert in_thread(lambda: lock.acquire(timeout=60) and not lock.release())


class Inner:
    """An RLock that notes who asks for it."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.asked: list[int] = []

    def acquire(self, *args: Any, **how: Any) -> bool:
        self.asked.append(threading.get_ident())
        return self.lock.acquire(*args, **how)

    def release(self) -> None:
        self.lock.release()


def test_two_threads_that_take_it_away_at_once_put_one_lock_in_its_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The other one, which has it, comes in between the first one's look and its replacement."""
    made: list[Inner] = []
    others: list[Any] = []

    def take() -> None:
        lock.acquire()
        others.append(lock._lock)

    def make() -> Inner:
        made.append(Inner())
        here = made[-1]
        if len(made) == 2:
            in_thread(take)
        return here

    monkeypatch.setattr(runtime, "threading", SimpleNamespace(RLock=make))
    lock = RecoveringLock(patience=0.01)
    with holding(lock):
        lock.acquire()
    assert threading.get_ident() in others[0].asked


@pytest.mark.parametrize(
    ("version", "needed"),
    [
        ((3, 10, 18), True),
        ((3, 11, 0), False),
        ((3, 12, 9), False),
        ((3, 13, 0), True),
        ((3, 14, 0), True),
    ],
)
def test_where_it_is_needed(
    monkeypatch: pytest.MonkeyPatch, version: tuple[int, ...], needed: bool
) -> None:
    """Python before 3.11 raises between a with block and its __exit__, 3.13 where a loop in the
    block turns round, 3.14 after its __enter__."""
    monkeypatch.setattr(sys, "version_info", version)
    assert isinstance(new_lock(), RecoveringLock) is needed


def at_every_line(work: Callable[[], object], module: str) -> int:
    """Do ``work`` once more, in the same thread, before each line of ``module`` that it runs.

    As a signal handler does, or a finalizer.

    :returns: at how many lines that was.
    """
    times = 0
    inside = False

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal times, inside
        if frame.f_code.co_filename != module or inside:
            return None
        if event == "line":
            times += 1
            inside = True
            work()
            inside = False
        return trace

    def traced() -> None:
        sys.settrace(trace)
        try:
            work()
        finally:
            sys.settrace(None)

    with running(traced):
        pass
    return times


def test_signal_handlers_do_not_wait_for_their_own_thread() -> None:
    """Whatever it is in the middle of, and whatever listens."""

    def another() -> LoadBalancer:
        return LoadBalancer({"db1": {"host": "db1"}})

    db = another()

    def listen() -> None:
        def listener(event: object) -> None:
            pass

        db.add_listener(listener)
        db.remove_listener(listener)

    assert at_every_line(listen, dispatch.__file__) > 5
    assert at_every_line(lambda: pools.pools_of(another()), pools.__file__) > 5
    assert at_every_line(lambda: pools.pools_of(db).retire("db1"), pools.__file__) > 3

    # … in the middle of starting a thread of its own, too.
    closed = threading.Event()
    made = pools.Pools()
    made.find("db1", {}, lambda: SimpleNamespace(close=closed.set))

    def interrupted() -> bool:
        with threading._active_limbo_lock:  # type: ignore[attr-defined]
            made.retire("db1")
            return closed.wait(60)

    assert in_thread(interrupted)

    def listen_to_all() -> None:
        registry.balancers.add_listener(listen_to_all)
        registry.balancers.remove_listener(listen_to_all)

    assert at_every_line(listen_to_all, registry.__file__) > 5
