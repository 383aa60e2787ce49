"""Who tells listeners of what was learnt: in order, and in a thread of its own."""

from __future__ import annotations

import os
import threading
from typing import Any

import pytest

from django_proxysql import teller as module
from django_proxysql.events import PeersExhausted
from django_proxysql.teller import MOST, Teller


def event(number: int) -> PeersExhausted:
    return PeersExhausted("default", str(number), 0.0)


class Heard:
    """Notes what it is told, and can wait for it."""

    def __init__(self) -> None:
        self.told: list[int] = []
        self.threads: set[int] = set()
        self.go_on = threading.Event()
        self.go_on.set()
        self.called = threading.Semaphore(0)

    def __call__(self, told: Any) -> None:
        self.threads.add(threading.get_ident())
        self.called.release()
        self.go_on.wait(30)
        self.told.append(int(told.error))
        if told.error == "13":
            raise SystemExit

    def wait(self, count: int) -> None:
        for _ in range(count):
            assert self.called.acquire(timeout=30)


def test_elsewhere_and_in_order() -> None:
    """Each event once, in turn, whatever a listener raises; never in the thread that tells."""
    teller, heard = Teller(), Heard()
    for number in range(20):
        teller.tell(heard, event(number))
    heard.wait(20)
    while teller._waiting or len(heard.told) < 20:
        pass
    assert heard.told == list(range(20))
    assert threading.get_ident() not in heard.threads


def test_one_that_hangs() -> None:
    """It keeps the latest of what comes after it, and nobody."""
    teller, heard = Teller(), Heard()
    heard.go_on.clear()
    teller.tell(heard, event(0))
    heard.wait(1)
    for number in range(1, MOST + 101):
        teller.tell(heard, event(number))
    assert len(teller._waiting) == MOST
    heard.go_on.set()
    heard.wait(MOST)
    while len(heard.told) < MOST + 1:
        pass
    assert heard.told == [0, *range(101, MOST + 101)]
    assert len(heard.threads) == 1


def test_many_who_tell() -> None:
    """No event is left behind by a thread that is about to end."""
    teller, heard = Teller(), Heard()

    def tell() -> None:
        for _ in range(500):
            teller.tell(heard, event(1))

    threads = [threading.Thread(target=tell) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    heard.wait(min(MOST, 1))
    while teller._waiting:
        pass
    assert set(heard.told) == {1}


def test_no_thread_to_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is said in the log, raises nothing, and the next event makes up for it."""
    teller, heard = Teller(), Heard()

    def refuse(*_: Any) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(module._thread, "start_new_thread", refuse)
        teller.tell(heard, event(1))
    teller.tell(heard, event(2))
    heard.wait(2)
    while len(heard.told) < 2:
        pass
    assert heard.told == [1, 2]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_fork() -> None:
    """The child tells of its own, and of nothing that its parent has yet to tell."""
    teller, heard = module.teller, Heard()
    heard.go_on.clear()
    teller.tell(heard, event(1))
    heard.wait(1)
    teller.tell(heard, event(2))
    child = os.fork()
    if child == 0:
        own = Heard()
        teller.tell(own, event(3))
        good = own.called.acquire(timeout=30) and not teller._waiting
        os._exit(0 if good else 1)
    heard.go_on.set()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    heard.wait(1)
