"""The life of a background thread: started, woken, killed, forked, ended; whatever its work is."""

from __future__ import annotations

import _thread
import functools
import os
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest

from django_proxysql.core import runtime
from django_proxysql.core.runtime import Worker, current_worker
from tests.children import in_child, run_python
from tests.fakes import holding, in_thread, running, until
from tests.strikes import Injected, strikes
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
        #: Seconds that the thread waits for more, each time that it finds nothing; then it ends.
        self.pauses: list[float] = []

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
            return self.pauses.pop() if self.pauses else None
        self.done.append(what)
        return 0

    def do(self, *things: int) -> None:
        self.todo.extend(things)
        self.wake()

    def await_end(self) -> list[int]:
        """Return what was done when nothing is left, and no thread."""
        until(lambda: not (self.todo or self.is_running))
        return self.done


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
        desk.await_end()
    assert desk.done == [0, 1, 2, 3, 4, 5]


def test_knows_its_own_thread(desk: Desk) -> None:
    """Code that the work calls can ask where it runs."""
    seen: list[Any] = []
    desk.during = lambda what: seen.append((desk.is_here, current_worker() is desk))
    desk.do(1)
    desk.await_end()
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
    assert sorted(desk.await_end()) == list(range(800))
    assert desk.most == 1


@pytest.mark.usefixtures("patient")
def test_second_of_two_starts_wakes_the_first(desk: Desk) -> None:
    """The one that is late may bring work that the other's thread has looked past."""
    desk.pauses = [60]
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
    assert desk.await_end() == [1]
    assert desk.most == 1


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("pauses", [[60.0], []], ids=["sleep", "end"])
def test_work_between_last_look_and_what_follows_is_done(desk: Desk, pauses: list[float]) -> None:
    """The caller that brought it saw the thread alive, and started none."""
    desk.pauses = pauses

    def bring(what: int | None) -> None:
        # It has found nothing.
        if what is None and not desk.done:
            in_thread(lambda: desk.do(1))

    desk.during = bring
    desk.start()
    assert desk.await_end() == [1]


def test_looks_by_itself(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work whose caller is killed before it can wake the thread is found within a second."""
    monkeypatch.setattr(runtime, "LOOK_AGAIN", 0.01)
    desk.pauses = [60] * 10
    desk.start()
    desk.todo.append(1)
    assert desk.await_end() == [1]


# What goes wrong


def test_failed_start_is_no_running_thread(
    desk: Desk, refused: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    """It is said once, and made up for."""
    for number in range(3):
        desk.do(number)
        assert not desk.is_running
    # As some error trackers do, caplog keeps what was raised, and with it the frames.
    assert [record.exc_info is not None for record in caplog.records] == [True]
    assert caplog.messages == ["No thread could be started for a test"]
    refused.clear()
    desk.wake()
    assert desk.await_end() == [0, 1, 2]


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
    assert desk.await_end() == [0, 3]
    assert caplog.messages == ["The thread for a test met an error and goes on"]


@pytest.mark.parametrize("waits", [0, 3])
def test_thread_killed_at_every_line(waits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All is done in turn, by one thread at a time, by the next to wake it at the latest."""
    monkeypatch.setattr(runtime, "LOOK_AGAIN", 0.001)
    for strike in strikes([runtime.__file__], least=25):
        desk = Desk()
        desk.pauses = [60] * waits
        strike.dooms_next_thread(monkeypatch)
        desk.do(1, 2, 3)
        strike.wait()
        # Before its first line, or as it left, it could start no other.
        desk.do(4)
        assert desk.await_end() == [1, 2, 3, 4], strike.where
        assert desk.most == 1, strike.where


@pytest.mark.parametrize("how", ["start", "here"])
def test_caller_killed_at_every_line(how: str) -> None:
    """It starts the thread, or does the work itself: the next caller makes up for it."""
    # The exception is kept, and with its traceback all frames.
    for strike in strikes([runtime.__file__], least=10, kept=[]):
        desk = Desk()
        desk.todo.extend([1, 2])
        strike.hits(desk.wake if how == "start" else functools.partial(desk._work_here, 5))
        desk.do(3)
        assert desk.await_end() == [1, 2, 3], strike.where
        assert desk.most == 1, strike.where


def test_signal_handlers_at_every_line(desk: Desk) -> None:
    """One that brings work, wherever it strikes, waits for nothing, and its work is done."""
    numbers = iter(range(1000))
    times = at_every_line(lambda: desk.do(next(numbers)), runtime.__file__)
    assert times > 5
    assert len(desk.await_end()) == times + 1
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
    assert desk.await_end() == [1, 2, 3]
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
    assert desk.await_end() == [2]


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
            return f"{before} {desk.await_end()}"

        desk.during = hang
        desk.do(1)
        assert inside.wait(60)
        with holding(desk._lock):
            assert in_child(child) == "False [7]"
        go_on.set()
        assert desk.await_end() == [1]

    def test_child_made_within_a_step_is_no_workers_thread(self, desk: Desk) -> None:
        """Such as a process of multiprocessing's, which a listener starts."""
        found: list[str] = []

        def fork(what: int | None) -> None:
            if what == 1:
                found.append(in_child(lambda: (current_worker(), desk.is_here)))

        desk.during = fork
        desk.do(1)
        assert desk.await_end() == [1]
        assert found == ["(None, False)"]

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
        assert desk.await_end() == [1, 2]
        os.close(write)
        # Its end of the pipe closes with it: it has ended, and written nothing.
        assert os.read(read, 5) == b""
        os.close(read)
        assert os.waitpid(children[0], 0)[1] == 0


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


@pytest.mark.parametrize(
    ("finishes", "work", "seconds", "steps"),
    [
        pytest.param(True, "time.sleep(0.1)", 60, 3, id="all that there is to do"),
        pytest.param(True, "threading.Event().wait()", 0.1, 0, id="within the time that is given"),
        pytest.param(False, "threading.Event().wait()", 60, 0, id="not for other work"),
    ],
)
def test_exit_waits_for_work_that_must_be_finished(
    finishes: bool, work: str, seconds: float, steps: int
) -> None:
    program = PROGRAM
    for name, value in {"finishes": finishes, "work": work, "seconds": seconds}.items():
        program = program.replace(f"{{{name}}}", str(value))
    done = run_python(program)
    assert (done.stdout, done.stderr) == ("step\n" * steps, "")


def test_no_thread_begins_after_the_end(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is started then makes no step."""
    monkeypatch.setattr(runtime._exit, "is_over", True)
    desk.do(1)
    until(lambda: not desk.is_running)
    assert desk.done == []
