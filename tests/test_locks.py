"""Locks whose holder is killed."""

from __future__ import annotations

import sys
import threading

import pytest

from django_proxysql.locks import RecoveringLock, new_lock
from tests.fakes import in_thread


def test_one_at_a_time() -> None:
    """It keeps others out, and lets its holder in again."""
    lock = RecoveringLock()
    with lock, lock:
        assert not in_thread(lambda: lock.acquire(blocking=False))
        assert not in_thread(lambda: lock.acquire(timeout=0.01))
    assert in_thread(lambda: lock.acquire(blocking=False))


def test_holder_who_never_lets_go() -> None:
    """Whoever waits gets the lock; of several, one at a time."""
    lock = RecoveringLock(patience=0.01)
    in_thread(lock.acquire)
    inside = []

    def work() -> None:
        with lock:
            inside.append(1)
            assert inside == [1]
            inside.pop()

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()


def test_holder_who_is_late() -> None:
    """What has been taken away is let go of without a word, and another's is not touched."""
    lock = RecoveringLock(patience=0.01)
    lock.acquire()
    taken, over = threading.Event(), threading.Event()

    def take() -> None:
        with lock:
            taken.set()
            over.wait(10)

    thread = threading.Thread(target=take)
    thread.start()
    assert taken.wait(10)
    lock.release()
    assert not lock.acquire(blocking=False)
    over.set()
    thread.join()
    assert lock.acquire(blocking=False)


@pytest.mark.parametrize("version", [(3, 10, 18), (3, 11, 0)])
def test_where_it_is_needed(monkeypatch: pytest.MonkeyPatch, version: tuple[int, ...]) -> None:
    """Python before 3.11 raises between a with block and its __exit__."""
    monkeypatch.setattr(sys, "version_info", version)
    assert isinstance(new_lock(), RecoveringLock) is (version < (3, 11))
