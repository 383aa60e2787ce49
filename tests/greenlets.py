"""What is tested under gevent, each in a process of its own: ``python -m tests.greenlets NAME``."""

# Imports follow the patching.
# ruff: noqa: E402

from __future__ import annotations

import sys

EARLY = sys.argv[1:2] == ["patched_late"]

if not EARLY:
    from gevent import monkey

    monkey.patch_all()

import _socket
import contextlib
import gc
import os
import socket
import threading
from typing import Any

import gevent
import gevent.event
import pymysql

from django_proxysql import LoadBalancer
from django_proxysql.core import sockets
from django_proxysql.core.trials import trial_worker
from tests.fakes import Clock, raised_by

if EARLY:
    #: Made by an application that is loaded before gunicorn's worker patches its process.
    PRELOADED = LoadBalancer({"db1": {}, "db2": {}}, connect=lambda: object())
    PRELOADED.connect()


class Silent:
    """A server that accepts, and says nothing."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.accepted: list[socket.socket] = []

    def await_client(self) -> None:
        self.accepted.append(self.listener.accept()[0])

    def has_been_left(self) -> bool:
        return self.accepted[-1].recv(1) == b""


def balancer(server: Silent, clock: Any) -> LoadBalancer:
    peer = {"host": "127.0.0.1", "port": server.port, "user": "u", "password": "p"}
    return LoadBalancer({"db1": peer}, connect=pymysql.connect, clock=clock)


def struck_in_connect() -> None:
    """A greenlet that is struck while its peer is silent: nothing is counted, nothing held."""
    for exc in (gevent.Timeout(1), gevent.GreenletExit(), SystemExit(), KeyboardInterrupt()):
        server = Silent()
        db = balancer(server, Clock())
        greenlet = gevent.spawn(raised_by, db.connect)
        server.await_client()
        gevent.kill(greenlet, exc)
        assert greenlet.get() is exc
        assert server.has_been_left()
        peer = db.peers["db1"]
        assert peer.breaker.is_available, exc
        assert peer.breaker.fail_counter == peer.connections == 0


def struck_in_a_trial() -> None:
    """The trial that is struck is over: who waits for it is woken, and makes the next one."""
    server, clock = Silent(), Clock()
    db = balancer(server, clock)
    breaker = db.peers["db1"].breaker
    breaker.open()
    clock.now += 40
    first = gevent.spawn(raised_by, db.connect)
    server.await_client()
    assert breaker.trial is not None
    second = gevent.spawn(raised_by, db.connect)
    gevent.sleep(0)
    assert len(server.accepted) == 1
    # It waits for a result that never comes; the deadline is the clock's, which stands still.
    assert not second.ready()
    clock.now += 2
    gevent.kill(first, gevent.Timeout(1))
    second.join(timeout=60)
    assert second.ready()
    assert "circuit open" in str(second.get())
    assert breaker.trial is None
    clock.now += 2
    third = gevent.spawn(raised_by, db.connect)
    server.await_client()
    assert breaker.trial is not None
    gevent.kill(third, gevent.GreenletExit())
    assert isinstance(third.get(), gevent.GreenletExit)
    assert breaker.trial is None


def tried_in_the_background() -> None:
    """The thread that makes trials is a greenlet, and waits for patched sockets as such."""
    server, seen = Silent(), []

    def connect(port: int) -> socket.socket:
        seen.append(threading.get_ident())
        client = socket.create_connection(("127.0.0.1", port), timeout=60)
        assert client.recv(2) == b"ok"
        return client

    peer = {"port": server.port}
    db = LoadBalancer({"db1": peer, "db2": peer}, connect, trials="background")
    breaker = db.peers["db1"].breaker
    breaker.open()
    breaker.half_open()
    server.await_client()
    # Others run while its trial waits for the network.
    gevent.sleep(0.05)
    assert breaker.trial is not None
    server.accepted[0].sendall(b"ok")
    while breaker.current_state != "closed" or trial_worker.is_running:
        gevent.sleep(0.01)
    assert len(seen) == 1
    assert seen[0] != threading.get_ident()


class Connection:
    """Something that can be referred to weakly."""


def counts_end_with_connections() -> None:
    """A connection that outlives its greenlet is counted for as long as it lives."""
    db = LoadBalancer({"db1": {}}, connect=Connection)
    kept = []
    over = gevent.event.Event()

    def hold() -> None:
        connection = db.connect()
        over.wait()
        del connection

    def drop() -> None:
        kept.append(db.connect())

    holder, dropper = gevent.spawn(hold), gevent.spawn(drop)
    dropper.join()
    del dropper
    # Its locals end with a turn of the loop.
    gevent.sleep(0)
    gc.collect()
    assert db.peers["db1"].connections == 2
    kept.clear()
    gc.collect()
    assert db.peers["db1"].connections == 1
    over.set()
    holder.join()
    del holder
    gevent.sleep(0)
    gc.collect()
    assert db.peers["db1"].connections == 0


def pinned(db: LoadBalancer | None = None) -> None:
    """pinned() holds for the greenlet that says so, while others go where they like."""
    if db is None:
        db = LoadBalancer({"db1": {}, "db2": {}}, connect=Connection)
    db1, db2 = db.peers.values()
    inside = gevent.event.Event()

    def used() -> set[str]:
        return {db.connect(lambda attempt: attempt.peer.name) for _ in range(50)}

    def stay(peer: Any) -> set[str]:
        with db.pinned(peer):
            inside.set()
            gevent.sleep(0)
            seen = used()
            gevent.sleep(0)
            return seen | used()

    first, second = gevent.spawn(stay, db1), gevent.spawn(stay, db2)
    inside.wait()
    assert used() == {"db1", "db2"}
    assert first.get() == {"db1"}
    assert second.get() == {"db2"}


def mode_stays() -> None:
    """A C driver's socket blocks as before, though gevent's own sockets never do."""
    server = Silent()
    with contextlib.closing(_socket.socket(_socket.AF_INET, _socket.SOCK_STREAM)) as sock:
        sock.connect(("127.0.0.1", server.port))
        assert os.get_blocking(sock.fileno())
        assert sockets.keepalive(sock.fileno(), 20) == 20
        assert os.get_blocking(sock.fileno())
        with sockets.limited(sock.fileno(), 20):
            assert os.get_blocking(sock.fileno())
        assert os.get_blocking(sock.fileno())


def patched_late() -> None:
    """A balancer that is older than the patching: its locks and pins hold for greenlets."""
    from gevent import monkey

    monkey.patch_all()
    pinned(PRELOADED)
    turns = [gevent.spawn(hammer, PRELOADED) for _ in range(20)]
    gevent.joinall(turns, raise_error=True)
    for peer in PRELOADED.peers.values():
        assert peer.breaker.is_available


def hammer(db: LoadBalancer) -> None:
    """Fail and recover, with switches wherever something is waited for."""

    def open_one(attempt: Any) -> str:
        gevent.sleep(0)
        if gate.pop():
            raise ConnectionRefusedError(111, "refused")
        return str(attempt.peer.name)

    gate = [False, True] * 40
    while gate:
        raised_by(lambda: db.connect(open_one))
        for peer in db.peers.values():
            peer.breaker.close()


if __name__ == "__main__":
    globals()[sys.argv[1]]()
