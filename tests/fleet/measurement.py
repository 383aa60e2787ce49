"""Real processes of the core on this machine, one Redis, and three trivial peers."""

from __future__ import annotations

import json
import os
import random
import selectors
import signal
import socket
import statistics
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from django_proxysql import LoadBalancer, NoPeerAvailable
from tests.fakes import refused_by_host
from tests.servers.ports import HOST, ports
from tests.servers.redis import RedisServer

#: Seconds: a circuit stays open, the peer is dead, and it is watched afterwards.
INTERVAL, DEAD, AFTER = 10, 35, 15


class _Peers:
    """Three listening sockets in a process of their own; the first one can be dead."""

    def __init__(self) -> None:
        self.ports = [ports.reserve() for _ in range(3)]
        self.listeners = []
        for port in self.ports:
            listener = socket.socket()
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((HOST, port))
            listener.listen(1024)
            self.listeners.append(listener)

    def serve(self, seconds: float, dead: tuple[float, float]) -> list[float]:
        """Greet each client; while dead, close on them. Return when those came."""
        selector = selectors.DefaultSelector()
        for listener in self.listeners:
            selector.register(listener, selectors.EVENT_READ)
        met = []
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            for key, _ in selector.select(0.1):
                connection, _ = key.fileobj.accept()  # type: ignore[union-attr]
                now = time.monotonic()
                if key.fileobj is self.listeners[0] and dead[0] <= now < dead[1]:
                    met.append(now)
                else:
                    # Its client may have ended.
                    with suppress(OSError):
                        connection.sendall(b"!")
                connection.close()
        selector.close()
        return met

    def close(self) -> None:
        for listener in self.listeners:
            listener.close()
        for port in self.ports:
            ports.release(port)


def _connect(host: str, port: int) -> socket.socket:
    try:
        connection = socket.create_connection((host, port), timeout=5)
        if connection.recv(1):
            return connection
        connection.close()
    except OSError:
        pass
    raise refused_by_host()


def _work(peers: _Peers, url: str | None, seconds: float, rate: float) -> dict[str, Any]:
    """Connect at random moments; return what happened to the first peer."""
    chance = random.Random(os.getpid())
    happened: dict[str, list[Any]] = {"trials": [], "failed": [], "closed": [], "without": []}

    def note(event: Any) -> None:
        kind = type(event).__name__
        if kind == "ConnectFailed":
            happened["trials" if event.trial else "failed"].append(time.monotonic())
        elif kind == "CircuitClosed":
            happened["closed"].append(time.monotonic())

    db = LoadBalancer(
        {f"db{n}": {"host": HOST, "port": port} for n, port in enumerate(peers.ports, 1)},
        _connect,
        check_interval=INTERVAL,
        shared_state=url,
    )
    db.add_listener(note, connects=False)
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            db.connect().close()
        except NoPeerAvailable:
            happened["without"].append(time.monotonic())
        # Paces the load: connects at random moments, on the real clock of a real process.
        time.sleep(chance.expovariate(rate))
    return happened


def _in_child(function: Any, *arguments: Any) -> tuple[int, Any]:
    """Run a function in a forked child; return its pid, and the pipe its result comes by."""
    reading, writing = os.pipe()
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.close(reading)
            with open(writing, "w") as pipe:
                json.dump(function(*arguments), pipe)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(writing)
    return child, open(reading)


@contextmanager
def _children() -> Iterator[list[tuple[int, Any]]]:
    children: list[tuple[int, Any]] = []
    try:
        yield children
    finally:
        for child, pipe in children:
            pipe.close()
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def _run(processes: int, url: str | None, rate: float = 1) -> dict[str, Any]:
    peers = _Peers()
    try:
        with _children() as children:
            # The last of them is to have begun before the peer dies.
            settle = 3 + processes / 50
            began = time.monotonic()
            dead = (began + settle, began + settle + DEAD)
            seconds = settle + DEAD + AFTER
            children.append(_in_child(peers.serve, seconds + 2, dead))
            for _ in range(processes):
                left = seconds - (time.monotonic() - began)
                children.append(_in_child(_work, peers, url, left, rate))
            met, *all_happened = [json.load(pipe) for _, pipe in children]
    finally:
        peers.close()
    trials = sorted(when for happened in all_happened for when in happened["trials"])
    closed = sorted(happened["closed"][-1] for happened in all_happened if happened["closed"])
    by_second = [int(when - dead[0]) for when in trials]
    return {
        "met": len(met),
        "failed": sum(len(happened["failed"]) for happened in all_happened),
        "trials": len(trials) / (DEAD / INTERVAL),
        "most": max((by_second.count(second) for second in set(by_second)), default=0),
        "back": len(closed),
        "without": sum(len(happened["without"]) for happened in all_happened),
        "half": statistics.median(closed) - dead[1] if closed else float("nan"),
        "all": closed[-1] - dead[1] if closed else float("nan"),
        "spread": closed[-1] - closed[0] if closed else float("nan"),
    }


def measure(processes: int, redis: RedisServer) -> None:
    """Kill a peer under so many real processes, and print what that costs."""
    print(
        f"{processes} processes, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; "
        f"a connect a second each, CHECK_INTERVAL {INTERVAL}, the peer is dead for {DEAD} s"
    )
    runs = {}
    for name, url in (("each for itself", None), ("shared", redis.url)):
        before = _scripts(redis)
        began = time.monotonic()
        runs[name] = _run(processes, url)
        runs[name]["redis"] = (_scripts(redis) - before) / processes / (time.monotonic() - began)
    print(" " * 42 + "".join(f"{name:>18}" for name in runs))
    for key, what in (
        ("met", "connects that the dead peer saw"),
        ("failed", "requests that met it, trials aside"),
        ("trials", "trials an interval, of all together"),
        ("most", "most trials in a second"),
        ("without", "connects that got none"),
        ("back", "processes that have it back"),
        ("half", "half of them after (s)"),
        ("all", "all of them after (s)"),
        ("spread", "from the first to the last (s)"),
        ("redis", "scripts run in Redis a second and process"),
    ):
        values = [f"{run[key]:,.2f}".removesuffix(".00") for run in runs.values()]
        print(f"{what:42}" + "".join(f"{value:>18}" for value in values))


def _scripts(redis: RedisServer) -> int:
    calls = 0
    for line in redis.ask("INFO", "commandstats").splitlines():
        if line.startswith("cmdstat_eval"):
            calls += int(line.partition("calls=")[2].partition(",")[0])
    return calls


def redis_in_trouble(redis: RedisServer, connects: int = 3000) -> None:
    """Print how long connects take while a trial is always due, and Redis is well, or not."""
    with ExitStack() as stack:
        for trouble in ("none", "well", "frozen", "dead"):
            url = None if trouble == "none" else redis.url
            db = LoadBalancer(
                {name: {"name": name} for name in ("db1", "db2")},
                _either,
                check_interval=0.05,
                shared_state=url,
            )
            db.connect()
            if db.sharing is not None:
                db.sharing.settle(5)
            if trouble == "frozen":
                redis.freeze()
                stack.callback(redis.restore)
            elif trouble == "dead":
                redis.kill()
            times = []
            for _ in range(connects):
                began = time.perf_counter()
                db.connect()
                times.append((time.perf_counter() - began) * 1000)
                # Paces the load, so that circuits that are open for 50 ms come to their trials.
                time.sleep(0.001)
            if trouble == "frozen":
                redis.thaw()
            times.sort()
            print(
                f"Redis {trouble:7} median {times[len(times) // 2]:7.3f} ms   "
                f"99 % {times[int(len(times) * 0.99)]:7.3f} ms   worst {times[-1]:7.3f} ms   "
                f"over 10 ms: {sum(t > 10 for t in times)} of {connects}"
            )


class _Made:
    __slots__ = ("__weakref__",)


def _either(name: str) -> _Made:
    if name == "db1":
        raise refused_by_host()
    return _Made()
