"""How a listener is told elsewhere: in order, one event at a time, in a thread of its own."""

from __future__ import annotations

import os
import sys
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest

from django_proxysql import LoadBalancer
from django_proxysql import teller as module
from django_proxysql.events import PeersExhausted
from django_proxysql.teller import MOST, Teller
from tests.children import in_child
from tests.fakes import until
from tests.test_breaker_threads import TestExceptionsOutOfNowhere, hurried  # noqa: F401

interrupted_at = TestExceptionsOutOfNowhere.interrupted_at
# Not to be collected here again.
del TestExceptionsOutOfNowhere


def event(number: int) -> PeersExhausted:
    return PeersExhausted("default", str(number), 0.0)


class Heard:
    """Notes what it is told, and can wait for it."""

    def __init__(self) -> None:
        self.told: list[int] = []
        self.threads: set[int] = set()
        self.inside: list[int] = []
        self.most = 0
        self.go_on = threading.Event()
        self.go_on.set()
        self.called = threading.Semaphore(0)

    def __call__(self, told: Any) -> None:
        self.inside.append(1)
        self.most = max(self.most, len(self.inside))
        self.threads.add(threading.get_ident())
        self.called.release()
        self.go_on.wait(30)
        self.told.append(int(told.error))
        self.inside.pop()
        if told.error == "13":
            raise SystemExit

    def wait(self, count: int) -> None:
        for _ in range(count):
            assert self.called.acquire(timeout=30)


@pytest.fixture
def heard() -> Heard:
    return Heard()


@pytest.fixture
def teller(heard: Heard) -> Teller:
    return Teller(heard, "default")


def test_elsewhere_and_in_order(teller: Teller, heard: Heard) -> None:
    """Each event once, in turn, whatever a listener raises; never in the thread that tells."""
    for number in range(20):
        teller.tell(event(number))
    until(lambda: len(heard.told) == 20)
    assert heard.told == list(range(20))
    assert threading.get_ident() not in heard.threads


def test_one_that_hangs(teller: Teller, heard: Heard) -> None:
    """It keeps the latest of what comes after it, and nobody."""
    heard.go_on.clear()
    teller.tell(event(0))
    heard.wait(1)
    for number in range(1, MOST + 101):
        teller.tell(event(number))
    assert len(teller.waiting) == MOST
    heard.go_on.set()
    until(lambda: len(heard.told) == MOST + 1)
    assert heard.told == [0, *range(101, MOST + 101)]
    assert len(heard.threads) == 1


def test_behind_what_waits(heard: Heard) -> None:
    """What happens in any thread, while something waits to be told, is told after that."""
    db = LoadBalancer({"db1": {"host": "db1"}})
    numbers: list[Any] = []
    db.add_listener(heard)
    db.add_listener(lambda told: numbers.append((told.error, threading.get_ident())))
    heard.go_on.clear()
    (teller,) = (teller for teller in db._tellers if teller.listener is heard)
    teller.tell(event(0))
    heard.wait(1)
    teller.tell(event(1))
    db.emit(event(2))
    # Its own thread, for those who are not behind.
    assert numbers == [("2", threading.get_ident())]
    assert heard.told == []
    heard.go_on.set()
    until(lambda: len(heard.told) == 3)
    db.emit(event(3))
    assert heard.told == [0, 1, 2, 3]
    assert heard.most == 1


@pytest.mark.usefixtures("hurried")
def test_many_who_tell(teller: Teller, heard: Heard) -> None:
    """No event is left behind by a thread that is about to end, and no two are told at once."""

    def tell() -> None:
        for _ in range(100):
            teller.tell(event(1))
            until(lambda: not teller.waiting)

    threads = [threading.Thread(target=tell) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    until(lambda: len(heard.told) == 400)
    assert heard.most == 1


def test_told_as_its_thread_ends(teller: Teller, heard: Heard) -> None:
    """Whoever finds it over starts another, which tells alone what comes from then on."""

    class Late(deque[Any]):
        def __bool__(self) -> bool:
            # The thread has said that it is over, and looks once more.
            if late:
                late.pop()()
            return len(self) > 0

    def tell_two() -> None:
        heard.go_on.clear()
        teller.tell(event(2))
        teller.tell(event(3))
        heard.wait(2)

    late: list[Callable[[], None]] = [tell_two]
    teller.waiting = Late(maxlen=MOST)
    teller.tell(event(1))
    first = teller._life
    assert first is not None
    until(lambda: not late and first() is None)
    assert heard.told == [1]
    heard.go_on.set()
    until(lambda: len(heard.told) == 3)
    assert heard.told == [1, 2, 3]
    assert heard.most == 1


def test_no_thread_to_be_had(teller: Teller, heard: Heard, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is said in the log, raises nothing, and the next event makes up for it."""

    def refuse(*_: Any) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(module._thread, "start_new_thread", refuse)
        teller.tell(event(1))
    teller.tell(event(2))
    until(lambda: len(heard.told) == 2)
    assert heard.told == [1, 2]


def test_killed_at_every_line(heard: Heard, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that is killed leaves to another what it had not begun to tell."""
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: None)
    start = module._thread.start_new_thread
    step, there = 0, True
    while there:
        step += 1
        teller = Teller(heard, "default")
        heard.told.clear()
        struck: list[tuple[bool, str]] = []

        def doomed(run: Any, args: Any) -> int:
            monkeypatch.undo()
            return start(
                lambda: struck.append(  # noqa: B023
                    interrupted_at(step, lambda: run(*args), [module.__file__])  # noqa: B023
                ),
                (),
            )

        teller.waiting.extend([event(1), event(2)])
        monkeypatch.setattr(module._thread, "start_new_thread", doomed)
        teller.tell(event(3))
        until(lambda: struck)  # noqa: B023
        there, where = struck[0]
        # Before its first line or on its way out nobody can start another.
        teller.tell(event(4))
        until(lambda: 4 in heard.told)
        # The one that it was killed over may be lost.
        assert len(heard.told) >= 3, where
        assert heard.told == sorted(set(heard.told)), where
    assert step > 10
    assert heard.most == 1


@pytest.mark.parametrize("step", range(1, 20))
def test_whoever_tells_is_killed(teller: Teller, heard: Heard, step: int) -> None:
    """The next event takes along the one that was left."""
    interrupted_at(step, lambda: teller.tell(event(1)), [module.__file__])
    teller.tell(event(2))
    until(lambda: heard.told[-1:] == [2])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
@pytest.mark.parametrize("where", ["elsewhere", "in a listener"])
def test_fork(where: str) -> None:
    """The child tells of its own, and of nothing that its parent has yet to tell."""
    db = LoadBalancer({"db1": {"host": "db1"}})
    told: list[str] = []
    reached, go_on = threading.Event(), threading.Event()
    results: list[str] = []

    def child() -> str:
        go_on.set()
        told.clear()
        teller.tell(event(3))
        until(lambda: told)
        return f"{told} {len(teller.waiting)}"

    def listen(heard: Any) -> None:
        told.append(heard.error)
        if heard.error == "1":
            reached.set()
            go_on.wait(30)
            if where == "in a listener":
                results.append(in_child(child))

    db.add_listener(listen)
    teller = db._tellers[-1]
    teller.tell(event(1))
    assert reached.wait(30)
    teller.tell(event(2))
    if where == "elsewhere":
        results.append(in_child(child))
    go_on.set()
    until(lambda: results and "2" in told)
    assert results == ["['3'] 0"]
