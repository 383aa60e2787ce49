"""The life of a background thread: started, woken, killed, forked, ended; whatever its work is."""

from __future__ import annotations

import _thread
import logging
import os
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest

from django_proxysql.core import runtime
from django_proxysql.core.runtime import Worker, current_worker, new_lock
from tests.children import in_child, run_python
from tests.fakes import holding, in_thread, running, struck_at, until
from tests.test_breaker_threads import Injected, doomed_thread
from tests.test_locks import at_every_line

pytestmark = pytest.mark.usefixtures("strikes_are_silent")


class Desk(Worker):
    """Does one thing after the other, and notes which."""

    def __init__(self) -> None:
        super().__init__("for a test")
        self.todo: deque[int] = deque()
        self.done: list[int] = []
        self.inside: list[int] = []
        self.most = 0
        #: Called in each step, with what is done.
        self.during: Callable[[int | None], object] = lambda what: None
        #: Seconds that the thread waits for more; None: it ends.
        self.pause: float | None = None

    def is_needed(self) -> bool:
        return bool(self.todo)

    def step(self) -> float | None:
        what = self.todo.popleft() if self.todo else None
        self.inside.append(1)
        self.most = max(self.most, len(self.inside))
        try:
            self.during(what)
        finally:
            self.inside.pop()
        if what is None:
            return self.pause
        self.done.append(what)
        return 0

    def do(self, *things: int) -> None:
        self.todo.extend(things)
        self.wake()


@pytest.fixture
def desk() -> Desk:
    return Desk()


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that waits looks when it is woken, and not by itself."""
    monkeypatch.setattr(runtime, "LOOK_AGAIN", 60)


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """No thread can be started, as long as the list has an item."""
    left = [1]
    start = _thread.start_new_thread

    def start_new_thread(*args: Any) -> int:
        if left:
            raise RuntimeError("can't start new thread")
        return start(*args)

    monkeypatch.setattr(_thread, "start_new_thread", start_new_thread)
    return left


# Starting and ending


def test_thread_is_there_while_there_is_work(desk: Desk) -> None:
    """It begins with the first thing to do, does all in turn, and ends; and again."""
    desk.wake()
    assert not desk.is_running
    for first in (0, 3):
        desk.do(first, first + 1, first + 2)
        until(lambda: not desk.is_running)
    assert desk.done == [0, 1, 2, 3, 4, 5]


def test_knows_its_own_thread(desk: Desk) -> None:
    """Code that the work calls can ask where it runs."""
    seen: list[Any] = []
    desk.during = lambda what: seen.append((desk.is_here, current_worker() is desk))
    desk.do(1)
    until(lambda: not desk.is_running)
    assert set(seen) == {(True, True)}
    assert (desk.is_here, current_worker()) == (False, None)


@pytest.mark.usefixtures("hurried")
def test_one_thread_however_many_wake_it(desk: Desk) -> None:
    """Of those that find no thread at one moment, one starts it; nothing is done twice."""
    barrier = threading.Barrier(8)

    def ask(first: int) -> None:
        barrier.wait(60)
        for number in range(first, first + 100):
            desk.do(number)

    with running(*[lambda first=first: ask(first) for first in range(0, 800, 100)]):
        pass
    until(lambda: len(desk.done) == 800)
    assert sorted(desk.done) == list(range(800))
    assert desk.most == 1


@pytest.mark.usefixtures("patient")
def test_second_of_two_starts_wakes_the_first(desk: Desk) -> None:
    """The one that is late may bring work that the other's thread has looked past."""
    desk.pause = 60
    lock = desk._lock
    looked = threading.Event()
    desk.during = lambda what: looked.set()

    class Beaten:
        """Is taken by the second only after the first has started, and looked."""

        def __enter__(self) -> None:
            desk._lock = lock
            in_thread(desk.start)
            assert looked.wait(60)
            desk.todo.append(1)
            lock.acquire()

        def __exit__(self, *_: object) -> None:
            lock.release()

    desk._lock = Beaten()
    desk.start()
    until(lambda: desk.done == [1])
    desk.pause = None
    desk.start()
    until(lambda: not desk.is_running)
    assert desk.most == 1


@pytest.mark.usefixtures("patient")
def test_wake_between_look_and_sleep_is_noticed(desk: Desk) -> None:
    """A thread that has looked, and does not wait yet, looks once more."""
    desk.pause = 60

    def wake(what: int | None) -> None:
        if what is None and not desk.done:
            # It has found nothing.
            in_thread(lambda: desk.do(1))

    desk.during = wake
    desk.start()
    until(lambda: desk.done == [1])
    desk.pause = None
    desk.wake() if desk.todo else desk.start()
    until(lambda: not desk.is_running)


def test_work_between_last_look_and_end_is_done(desk: Desk) -> None:
    """The caller that brought it saw the thread alive, and started none."""

    def bring(what: int | None) -> None:
        if what is None and not desk.done:
            in_thread(lambda: desk.do(1))

    desk.during = bring
    desk.start()
    until(lambda: desk.done == [1] and not desk.is_running)


def test_looks_by_itself(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work whose caller is killed before it can wake the thread is found within a second."""
    monkeypatch.setattr(runtime, "LOOK_AGAIN", 0.01)
    desk.pause = 60
    desk.start()
    desk.todo.append(1)
    until(lambda: desk.done == [1])
    desk.pause = None
    until(lambda: not desk.is_running)


# What goes wrong


class Keeper(logging.Handler):
    """Keeps records, as some error trackers do: exception, traceback, frames."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.kept.append(record)


def test_failed_start_is_no_running_thread(
    desk: Desk, refused: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    """Also where a log handler keeps what was raised; it is said once, and made up for."""
    keeper = Keeper()
    logger = logging.getLogger("django_proxysql")
    logger.addHandler(keeper)
    try:
        for number in range(3):
            desk.do(number)
            assert not desk.is_running
    finally:
        logger.removeHandler(keeper)
    assert [record.exc_info is not None for record in keeper.kept] == [True]
    assert caplog.messages == ["No thread could be started for a test"]
    refused.clear()
    desk.wake()
    until(lambda: desk.done == [0, 1, 2] and not desk.is_running)


@pytest.mark.parametrize("error", [ValueError, SystemExit, Injected])
def test_error_of_a_step_ends_that_step_alone(
    desk: Desk,
    error: type[BaseException],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The thread goes on, and says so once a minute."""
    monkeypatch.setattr(runtime, "LOOK_AGAIN", 0.001)

    def fail(what: int | None) -> None:
        if what in (1, 2):
            raise error

    desk.during = fail
    desk.do(0, 1, 2, 3)
    until(lambda: desk.done == [0, 3] and not desk.is_running)
    assert caplog.messages == ["The thread for a test met an error and goes on"]


def test_thread_killed_at_every_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """All is done in turn, by one thread at a time, by the next to wake it at the latest."""
    step, there = 0, True
    while there:
        step += 1
        desk = Desk()
        struck = doomed_thread(step, monkeypatch, [runtime.__file__])
        desk.do(1, 2, 3)
        until(lambda: struck)  # noqa: B023
        there, where = struck[0]
        # Before its first line, or as it left, it could start no other.
        desk.do(4)
        until(lambda: 4 in desk.done)  # noqa: B023
        assert desk.done == [1, 2, 3, 4], where
        assert desk.most == 1, where
        until(lambda: not desk.is_running)  # noqa: B023
    assert step > 25


def test_waiting_thread_killed_at_every_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same for one that waits between two steps."""
    monkeypatch.setattr(runtime, "LOOK_AGAIN", 0.001)
    step, there = 0, True
    while there:
        step += 1
        desk = Desk()
        desk.pause = 60
        struck = doomed_thread(step, monkeypatch, [runtime.__file__])

        def once_more(what: int | None, desk: Desk = desk) -> None:
            # Long enough to have come by each line.
            if len(struck) or desk.todo:  # noqa: B023
                return
            desk.looks = getattr(desk, "looks", 0) + 1  # type: ignore[attr-defined]
            if desk.looks > 3:
                desk.pause = None

        desk.during = once_more
        desk.start()
        until(lambda: struck)  # noqa: B023
        there, where = struck[0]
        desk.pause = None
        desk.do(1)
        until(lambda: desk.done == [1] and not desk.is_running)  # noqa: B023
        assert desk.most == 1, where
    assert step > 15


@pytest.mark.parametrize("how", ["start", "here"])
def test_caller_killed_at_every_line(how: str) -> None:
    """It starts the thread, or does the work itself: the next caller makes up for it."""
    step, there = 0, True
    kept: list[BaseException] = []
    while there:
        step += 1
        desk = Desk()
        desk.todo.extend([1, 2])
        work = desk.wake if how == "start" else lambda: desk._work_here(5)  # noqa: B023
        # The exception is kept, and with its traceback all frames.
        there, where = struck_at(step, work, Injected, kept, [runtime.__file__])
        desk.do(3)
        until(lambda: 3 in desk.done)  # noqa: B023
        assert desk.done == [1, 2, 3], where
        assert desk.most == 1, where
        until(lambda: not desk.is_running)  # noqa: B023
    assert step > 10


def test_signal_handlers_at_every_line(desk: Desk) -> None:
    """One that brings work, wherever it strikes, waits for nothing, and its work is done."""
    numbers = iter(range(1000))
    times = at_every_line(lambda: desk.do(next(numbers)), runtime.__file__)
    assert times > 5
    until(lambda: len(desk.done) == times + 1)
    assert desk.most == 1


# Work in the caller's thread


def test_caller_works_for_a_while_and_leaves_the_rest(desk: Desk) -> None:
    """So many steps, and what came meanwhile is a thread's."""
    threads: list[tuple[int | None, bool]] = []

    def note(what: int | None) -> None:
        threads.append((what, current_worker() is desk))
        if what == 1:
            desk.todo.append(3)

    desk.during = note
    desk.todo.extend([1, 2])
    desk._work_here(2)
    until(lambda: desk.done == [1, 2, 3])
    assert threads[:3] == [(1, False), (2, False), (3, True)]


def test_caller_is_interrupted_and_a_thread_goes_on(desk: Desk) -> None:
    """Ctrl-C is the caller's; what was left is done all the same."""

    def interrupt(what: int | None) -> None:
        if what == 1:
            raise KeyboardInterrupt

    desk.during = interrupt
    desk.todo.extend([1, 2])
    with pytest.raises(KeyboardInterrupt):
        desk._work_here(2)
    until(lambda: desk.done == [2])


# Forks


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
class TestFork:
    def test_child_has_no_thread_and_starts_its_own(self, desk: Desk) -> None:
        """Also where another thread of the parent held the lock, and one was at work."""
        inside, go_on = threading.Event(), threading.Event()

        def hang(what: int | None) -> None:
            inside.set()
            assert go_on.wait(60)

        def child() -> str:
            # (Not by go_on: the parent's thread may just have its lock.)
            desk.during = lambda what: None
            before = desk.is_running
            desk.todo.clear()
            desk.do(7)
            until(lambda: desk.done == [7] and not desk.is_running)
            return f"{before} {desk.done}"

        desk.during = hang
        desk.do(1)
        assert inside.wait(60)
        with holding(desk._lock):
            assert in_child(child) == "False [7]"
        go_on.set()
        until(lambda: desk.done == [1] and not desk.is_running)

    def test_child_made_within_a_step_ends_with_it(self, desk: Desk) -> None:
        """It does not go on with the parent's work."""
        read, write = os.pipe()
        children: list[int] = []

        def fork(what: int | None) -> None:
            if what == 1:
                child = os.fork()
                if child:
                    children.append(child)
                else:
                    os.close(read)
            elif what is not None and os.getpid() != home:
                os.write(write, b"child")

        home = os.getpid()
        desk.during = fork
        desk.do(1, 2)
        until(lambda: desk.done == [1, 2])
        os.close(write)
        # Its end of the pipe closes with it: it has ended, and written nothing.
        assert os.read(read, 5) == b""
        os.close(read)
        assert os.waitpid(children[0], 0)[1] == 0

    def test_lock_is_a_new_one(self, desk: Desk) -> None:
        """``new_lock`` gives a lock that is free."""
        assert in_child(lambda: str(desk._lock.acquire(blocking=False))) == "True"
        assert new_lock().acquire(blocking=False)


# The interpreter's end


PROGRAM = """
import threading, time
from django_proxysql.core import runtime
from django_proxysql.core.runtime import Worker

class Work(Worker):
    finishes = {finishes}
    left = 3
    def is_needed(self):
        return self.left > 0
    def step(self):
        self.left -= 1
        begun.set()
        {work}
        print("step", flush=True)
        return 0 if self.left else None

begun = threading.Event()
worker = Work("for a test")
worker.start()
begun.wait(60)
runtime.AT_EXIT = {seconds}
"""


def at_exit(work: str, *, finishes: bool = True, seconds: float = 60) -> str:
    program = PROGRAM.replace("{work}", work).replace("{seconds}", str(seconds))
    done = run_python(program.replace("{finishes}", str(finishes)))
    assert done.stderr == ""
    return done.stdout


def test_exit_waits_for_work_that_must_be_finished() -> None:
    """All that there is to do, within the time that is given."""
    assert at_exit("time.sleep(0.1)") == "step\n" * 3


def test_exit_does_not_wait_for_work_that_hangs() -> None:
    assert at_exit("threading.Event().wait()", seconds=0.1) == ""


def test_exit_does_not_wait_for_other_work() -> None:
    assert at_exit("threading.Event().wait()", finishes=False) == ""


def test_no_thread_begins_after_the_end(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is started then makes no step."""
    monkeypatch.setattr(runtime._exit, "is_over", True)
    desk.do(1)
    until(lambda: not desk.is_running)
    assert desk.done == []
