"""How a listener is called elsewhere: in order, one event at a time, in a thread of its own."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest

from django_proxysql import LoadBalancer, PeerBreaker
from django_proxysql.core import dispatch, group, runtime
from django_proxysql.core.dispatch import MOST, Dispatcher, Listeners
from django_proxysql.core.events import CircuitClosed, CircuitOpened, Connected, PeersExhausted
from django_proxysql.core.logs import log_event
from tests.children import in_child, run_python
from tests.fakes import Clock, Recorder, in_thread, raised_by, running, until
from tests.strikes import CIRCUITS, strikes


def event(number: int) -> PeersExhausted:
    return PeersExhausted("default", str(number), 0.0)


def deliver(dispatcher: Dispatcher, event: Any) -> None:
    """Have a listener notified of one event, in its own thread."""
    dispatcher.put(event)
    dispatcher.start()


class Listening:
    """Notes the events that it is called with, and hangs at some of them until it may go on.

    :param notes: what it notes of an event; None: nothing.
    :param hangs_at: at what of these it hangs.
    """

    def __init__(self, notes: Callable[[Any], Any], *hangs_at: Any) -> None:
        self.notes = notes
        self.hangs_at = hangs_at
        self.began: list[Any] = []
        self.ended: list[Any] = []
        self.threads: set[int] = set()
        self.most = 0
        self.hangs = threading.Event()
        self.go_on = threading.Event()

    def __call__(self, told: Any) -> None:
        noted = self.notes(told)
        if noted is None:
            return
        self.began.append(noted)
        self.most = max(self.most, len(self.began) - len(self.ended))
        self.threads.add(threading.get_ident())
        if noted in self.hangs_at:
            self.hangs.set()
            assert self.go_on.wait(60)
        self.ended.append(noted)
        if noted in (7, 13):
            raise {7: ValueError, 13: SystemExit}[noted]

    def has_ended(self, noted: Any) -> bool:
        return noted in self.ended


def number_of(told: Any) -> int:
    return int(told.error)


def change_of(told: Any) -> type | None:
    return type(told) if type(told) in (CircuitOpened, CircuitClosed) else None


@pytest.fixture
def listening() -> Listening:
    return Listening(number_of)


@pytest.fixture
def dispatcher(listening: Listening) -> Dispatcher:
    return Dispatcher(listening, "default")


def test_elsewhere_and_in_order(
    dispatcher: Dispatcher, listening: Listening, caplog: pytest.LogCaptureFixture
) -> None:
    """Each event once, in turn, whatever a listener raises; never in the thread that tells."""
    for number in range(20):
        deliver(dispatcher, event(number))
    until(lambda: len(listening.ended) == 20)
    assert listening.ended == list(range(20))
    assert caplog.messages == ["A listener of 'default' raised"] * 2
    assert threading.get_ident() not in listening.threads


def test_listener_that_hangs_holds_up_itself(dispatcher: Dispatcher, listening: Listening) -> None:
    listening.hangs_at = (0,)
    deliver(dispatcher, event(0))
    assert listening.hangs.wait(60)
    for number in range(1, MOST + 101):
        deliver(dispatcher, event(number))
    assert len(dispatcher.waiting) == MOST
    listening.go_on.set()
    until(lambda: len(listening.ended) == MOST + 1)
    assert listening.ended == [0, *range(101, MOST + 101)]
    assert len(listening.threads) == 1


def test_behind_what_waits(listening: Listening) -> None:
    """What happens in any thread, while an event waits, comes after that."""
    db = LoadBalancer({"db1": {"host": "db1"}})
    numbers: list[Any] = []
    db.add_listener(listening)
    db.add_listener(lambda told: numbers.append((told.error, threading.get_ident())))
    listening.hangs_at = (0,)
    dispatcher = db.group.listeners.dispatchers[-2]
    assert dispatcher.listener is listening
    deliver(dispatcher, event(0))
    assert listening.hangs.wait(60)
    deliver(dispatcher, event(1))
    db.group.emit(event(2))
    # Its own thread, for those who are not behind.
    assert numbers == [("2", threading.get_ident())]
    assert listening.ended == []
    listening.go_on.set()
    until(lambda: len(listening.ended) == 3)
    db.group.emit(event(3))
    assert listening.ended == [0, 1, 2, 3]
    assert listening.most == 1


@pytest.mark.usefixtures("hurried")
def test_no_event_is_left_and_no_two_at_once(dispatcher: Dispatcher, listening: Listening) -> None:
    def tell() -> None:
        for _ in range(100):
            deliver(dispatcher, event(1))
            until(lambda: not dispatcher.waiting)

    with running(*[tell] * 4):
        pass
    until(lambda: len(listening.ended) == 400)
    assert listening.most == 1


@pytest.mark.usefixtures("strikes_are_silent")
def test_killed_at_every_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that is killed leaves to another what it had not begun to tell."""
    monkeypatch.setattr(runtime, "LOOK_AGAIN", 0.01)
    for strike in strikes([dispatch.__file__, runtime.__file__], least=10):
        listening = Listening(number_of)
        dispatcher = Dispatcher(listening, "default")
        dispatcher.waiting.extend([event(1), event(2)])
        strike.dooms_next_thread(monkeypatch)
        deliver(dispatcher, event(3))
        strike.wait()
        # Before its first line or on its way out nothing can start another.
        deliver(dispatcher, event(4))
        until(functools.partial(listening.has_ended, 4))
        # The one that it was killed over may be lost.
        assert len(listening.ended) >= 3, strike.where
        assert listening.ended == sorted(set(listening.ended)), strike.where
        assert listening.most == 1, strike.where


def test_the_notifying_thread_is_killed() -> None:
    """The next event takes along the one that was left."""
    for strike in strikes([dispatch.__file__, runtime.__file__], least=15):
        listening = Listening(number_of)
        dispatcher = Dispatcher(listening, "default")
        strike.hits(functools.partial(deliver, dispatcher, event(1)))
        deliver(dispatcher, event(2))
        until(functools.partial(listening.has_ended, 2))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
@pytest.mark.parametrize("where", ["elsewhere", "in a listener"])
def test_fork(where: str) -> None:
    """The child tells of its own, and of nothing that its parent has yet to tell."""
    db = LoadBalancer({"db1": {"host": "db1"}})
    told: list[str] = []
    reached, go_on = threading.Event(), threading.Event()
    results: list[str] = []

    def child() -> str:
        told.clear()
        deliver(dispatcher, event(3))
        until(lambda: told)
        return f"{told} {len(dispatcher.waiting)}"

    def listen(listening: Any) -> None:
        told.append(listening.error)
        if listening.error == "1":
            reached.set()
            go_on.wait(60)
            if where == "in a listener":
                results.append(in_child(child))

    db.add_listener(listen)
    dispatcher = db.group.listeners.dispatchers[-1]
    deliver(dispatcher, event(1))
    assert reached.wait(60)
    deliver(dispatcher, event(2))
    if where == "elsewhere":
        results.append(in_child(child))
    go_on.set()
    until(lambda: results and "2" in told)
    assert results == ["['3'] 0"]


# Changes of circuits, in their order


def paged(*hangs_at: type) -> tuple[LoadBalancer, PeerBreaker, Listening]:
    """Return a balancer, the circuit of its peer, and a listener of its changes."""
    db = LoadBalancer({"db1": {"host": "db1"}})
    pager = Listening(change_of, *hangs_at)
    db.add_listener(pager)
    return db, db.peers["db1"].breaker, pager


def assert_in_turn(pager: Listening, circuit: PeerBreaker) -> None:
    turn = [CircuitOpened, CircuitClosed]
    assert pager.ended == [turn[number % 2] for number in range(len(pager.ended))]
    assert pager.ended[-1] is turn[circuit.current_state == "closed"]


def test_change_waits_for_the_one_before_it() -> None:
    """A change that is made while the thread delivers an older one comes after that."""
    db, circuit, pager = paged(CircuitClosed)
    closed = CircuitClosed("default", "db1", "db1", 1.0, True)
    deliver(db.group.listeners.dispatchers[-1], closed)
    assert pager.hangs.wait(60)
    in_thread(circuit.open)
    pager.go_on.set()
    until(lambda: len(pager.ended) == 2)
    assert pager.ended == [CircuitClosed, CircuitOpened]


def test_an_event_waits_behind_a_change_that_is_not_delivered_yet() -> None:
    """The thread that made the change may stand between its lock and the delivery."""
    listeners = LoadBalancer({"db1": {"host": "db1"}}).group.listeners
    ended: list[type] = []
    listeners.add(lambda told: ended.append(type(told)), True)
    listeners.put(CircuitClosed("default", "db1", "db1", 1.0, False))
    listeners.emit(event(1))
    assert ended == [CircuitClosed, PeersExhausted]


def test_change_that_is_delivered_here_holds_up_no_other_thread() -> None:
    """A second thread's change waits behind a listener that hangs in the first; it does not."""
    db, circuit, pager = paged(CircuitOpened)
    listening = Listening(change_of)
    db.add_listener(listening)
    with running(circuit.open):
        assert pager.hangs.wait(60)
        circuit.close()
        assert pager.began == [CircuitOpened]
        pager.go_on.set()
    until(lambda: len(pager.ended) == 2 and len(listening.ended) == 2)
    assert pager.ended == listening.ended == [CircuitOpened, CircuitClosed]


@pytest.mark.usefixtures("hurried")
def test_threads_that_open_and_close_at_once(caplog: pytest.LogCaptureFixture) -> None:
    """Each listener, the log and pybreaker's listeners get the changes in turn."""
    caplog.set_level("INFO", "django_proxysql")
    db, circuit, pager = paged()
    recorder = Recorder()
    circuit.add_listener(recorder)

    def flap() -> None:
        for number in range(50):
            (circuit.open, circuit.close)[number % 2]()

    with running(*[flap] * 4):
        pass
    dispatchers = [*db.group.listeners.dispatchers, *circuit._dispatchers.values()]
    until(
        lambda: not any(dispatcher.waiting or dispatcher.is_running for dispatcher in dispatchers)
    )
    assert_in_turn(pager, circuit)
    words = [re.search("opened|closed", line)[0] for line in caplog.messages]  # type: ignore[index]
    assert words == [("opened", "closed")[number % 2] for number in range(len(pager.ended))]
    states = [told for told in recorder.told if isinstance(told, tuple)]
    assert len(states) == len(pager.ended)
    assert all(one[1] == other[0] for one, other in zip(states, states[1:]))


def test_listener_that_changes_the_circuit() -> None:
    """What a listener itself leads to comes after its present event; in the same thread."""
    db = LoadBalancer({"db1": {"host": "db1"}})
    circuit = db.peers["db1"].breaker
    pager = Listening(change_of)
    threads: list[int] = []

    def close(told: Any) -> None:
        threads.append(threading.get_ident())
        if type(told) is CircuitOpened:
            circuit.close()

    db.add_listener(close)
    db.add_listener(pager)
    circuit.open()
    assert pager.ended == [CircuitOpened, CircuitClosed]
    assert threads == [threading.get_ident()] * 2


@pytest.mark.parametrize("method", ["failure", "state_change"])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_listener_of_a_circuit_that_raises_keeps_nothing_from_the_others(
    method: str, error: type[BaseException]
) -> None:
    """Ctrl-C in one of them: each later listener is notified of the change, without another one."""

    def fail(*_: Any) -> None:
        raise error

    db = LoadBalancer({"db1": {"host": "db1"}})
    circuit = db.peers["db1"].breaker
    pager, bad, recorder = Listening(change_of), Recorder(), Recorder()
    setattr(bad, method, fail)
    db.add_listener(pager)
    circuit.add_listeners(bad, recorder)
    permit: Any = circuit.acquire()
    raised = raised_by(lambda: permit.failed(OSError()))
    assert type(raised) is (error if error is KeyboardInterrupt else type(None))
    until(lambda: pager.ended == [CircuitOpened])
    until(lambda: ("closed", "open") in recorder.told)


@pytest.mark.parametrize("end", ["succeeded", "failed"])
def test_thread_that_is_killed_at_a_change_has_it_delivered(end: str) -> None:
    """At whichever line, and once. It is the last change: none follows that takes it along."""
    told = 0
    #: The event of the state that the end of the permit brings.
    kinds = {"closed": CircuitClosed} if end == "succeeded" else {"open": CircuitOpened}
    files = [*CIRCUITS, group.__file__, dispatch.__file__]
    for strike in strikes(files, least=20):
        clock = Clock()
        db = LoadBalancer({"db1": {"host": "db1"}}, clock=clock)
        db.remove_listener(log_event)
        circuit = db.peers["db1"].breaker
        pager = Listening(change_of)
        db.add_listener(pager)
        if end == "failed":
            permit: Any = circuit.acquire()
        else:
            circuit.open()
            clock.advance(40)
            permit = circuit.acquire()
        pager.ended.clear()
        arguments = [OSError()] if end == "failed" else []
        strike.hits(functools.partial(getattr(permit, end), *arguments))
        # One whose delivery had begun is lost. Before notify_pending() has begun, and where it
        # ends, where nothing asks for signals, it waits for the next change.
        waits = (".notify_pending()", ".circuit.pending:", "try:", "self._handing = None")
        is_lost = strike.where.startswith("step:") or strike.where.endswith(waits)
        if circuit.current_state in kinds and not is_lost:
            told += 1
            until(lambda: pager.ended == [kinds[circuit.current_state]])  # noqa: B023
    assert told > 20


def test_change_within_a_change() -> None:
    """A signal handler that closes a circuit, at any line of its opening: both in their order."""
    step, there = 0, True
    while there:
        step += 1
        db, circuit, pager = paged()
        db.remove_listener(log_event)
        left, there = step, False

        def trace(frame: Any, event: str, arg: Any) -> Any:
            nonlocal left, there
            if frame.f_code.co_filename not in CIRCUITS:
                return None
            # As signals do: where functions are called, and not between a test and what follows.
            if event == "call":
                left -= 1
                if left == 0:
                    there = True
                    sys.settrace(None)
                    circuit.open()  # noqa: B023
                    circuit.close()  # noqa: B023
            return trace

        sys.settrace(trace)
        try:
            circuit.open()
        finally:
            sys.settrace(None)
        assert_in_turn(pager, circuit)
    assert step > 5


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_fork_while_a_change_is_delivered() -> None:
    """The child delivers its own changes, in their order, and none of its parent's."""
    _, circuit, pager = paged(CircuitOpened)

    def child() -> str:
        pager.ended.clear()
        # (Not by go_on: the parent's thread may just have its lock.)
        pager.hangs_at = ()
        circuit.close()
        circuit.open()
        return str([kind.__name__ for kind in pager.ended])

    with running(circuit.open):
        assert pager.hangs.wait(60)
        try:
            assert in_child(child) == "['CircuitClosed', 'CircuitOpened']"
        finally:
            pager.go_on.set()


# The process's end


EXIT = """
import threading, time
from django_proxysql import LoadBalancer
from django_proxysql.core.events import CircuitClosed

db = LoadBalancer({"db1": {"host": "db1"}})
begun = threading.Event()

def write(event):
    begun.set()
    time.sleep(0.3)
    print("written", type(event).__name__, flush=True)

db.add_listener(write)
(mine,) = (one for one in db.group.listeners.dispatchers if one.listener is write)
mine.put(CircuitClosed("default", "db1", "db1", 1.0, True))
mine.start()
begun.wait(60)
"""


def test_process_ends_when_what_was_begun_is_written() -> None:
    """A listener in the middle of its work, in a thread, is not cut off."""
    assert run_python(EXIT).stdout == "written CircuitClosed\n"


def test_a_listener_that_is_added_twice_gets_each_event_once() -> None:
    listening: list[object] = []
    db = LoadBalancer({"db1": {}, "db2": {}})
    for _ in range(2):
        db.add_listener(listening.append)
    db.drain("db1")
    assert len(listening) == 1


def test_an_object_that_has_every_attribute_is_called_in_the_thread_itself() -> None:
    threads: list[int] = []
    listener = mock.Mock(side_effect=lambda event: threads.append(threading.get_ident()))
    db = LoadBalancer({"db1": {}, "db2": {}})
    db.add_listener(listener)
    db.drain("db1")
    assert threads == [threading.get_ident()]


def test_what_only_counts_is_called_at_once_and_all_else_within_what_is_set_up() -> None:
    """A look at the thread's transactions costs more than metrics do."""
    listeners = Listeners("default", lambda event: None)
    within: list[bool] = []
    seen: list[tuple[Any, ...]] = []

    @contextlib.contextmanager
    def around() -> Iterator[None]:
        within.append(True)
        yield
        within.pop()

    class Counting:
        _counts_only = True

        def __call__(self, event: Any) -> None:
            seen.append(("counting", *within))

    listeners.within(around())
    listeners.add(Counting(), connects=True)
    listeners.add(lambda event: seen.append(("other", *within)), connects=True)
    for trial in (False, True):
        listeners.emit(Connected("default", "db1", "10.0.0.1", 0.1, trial))
    assert seen == [("counting",), ("other", True)] * 2
