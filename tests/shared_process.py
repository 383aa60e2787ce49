"""A process that shares its circuits, for the tests: told what to do line by line.

``python -m tests.shared_process '{"peers": …, "shared_state": …}'`` reads commands from its
standard input, each a JSON list of a name and arguments, and answers each by one line of JSON.
"""

from __future__ import annotations

import functools
import json
import os
import queue
import subprocess
import sys
import threading
import time
from typing import Any

import MySQLdb

from django_proxysql import LoadBalancer
from django_proxysql.core import sharing
from django_proxysql.core.sharing import link, url


class Commands:
    """What a process can be asked to do."""

    def __init__(self, options: dict[str, Any]) -> None:
        # The machine may be so busy that Redis takes its time.
        url.TIMEOUT = options.pop("timeout", 30)
        link.PATIENCE = sharing.PATIENCE = options.pop("patience", link.PATIENCE)
        self.db = LoadBalancer(connect=self._noting(MySQLdb.connect), **options)
        self.events: queue.Queue[tuple[float, Any]] = queue.Queue()
        #: The port, the beginning and the end of each attempt to connect that has ended.
        self.attempts: list[tuple[int, float, float]] = []
        self.failed = 0
        self.looks: list[float] = []
        look = link.Link._round_trip

        def noted(*args: Any) -> float:
            self.looks.append(time.monotonic())
            return look(*args)

        link.Link._round_trip = noted  # type: ignore[method-assign]
        self.db.add_listener(self.note)
        self.busy = False

    def note(self, event: Any) -> None:
        now = time.monotonic()
        if type(event).__name__ == "ConnectFailed":
            self.failed += 1
        self.events.put((now, event))

    def _noting(self, connect: Any) -> Any:
        """Return a driver's function that notes when it was called, and when it ended.

        That is within the attempt, whatever holds a thread up before and after it.
        """

        @functools.wraps(connect)
        def noted(**params: Any) -> Any:
            began = time.monotonic()
            try:
                return connect(**params)
            finally:
                self.attempts.append((params["port"], began, time.monotonic()))

        return noted

    def connect(self) -> str:
        """Connect and close; return the port that it led to."""
        connection = self.db.connect()
        cursor = connection.cursor()
        cursor.execute("SELECT @@port")
        port = str(cursor.fetchone()[0])
        connection.close()
        return port

    def settle(self) -> bool:
        return self.db.sharing.settle(60)  # type: ignore[union-attr]

    def wait(self, kind: str, peer: str, since: float = 0) -> dict[str, Any]:
        """Wait for an event; return it, and how many looks at Redis began before it."""
        while True:
            when, event = self.events.get(timeout=60)
            if type(event).__name__ == kind and event.peer == peer:
                looks = [look for look in self.looks.copy() if since < look < when]
                return {"looks": len(looks), "elsewhere": event.elsewhere}

    def breaker(self, peer: str, change: str) -> None:
        getattr(self.db.peers[peer].breaker, change)()

    def drain(self, peer: str) -> None:
        self.db.drain(peer)

    def undrain(self, peer: str) -> None:
        self.db.undrain(peer)

    def state(self) -> dict[str, Any]:
        return {
            "states": {peer.name: peer.state for peer in self.db.snapshot()},
            "drained": [peer.name for peer in self.db.snapshot() if peer.drained],
            "failed": self.failed,
            "answered": self.db.sharing.is_answered,  # type: ignore[union-attr]
        }

    def attempts_at(self, port: int) -> list[tuple[float, float]]:
        """Return when each attempt at this port began and ended, by the host's clock."""
        return [(began, ended) for at, began, ended in self.attempts.copy() if at == port]

    def fleet(self) -> int | None:
        fleet = self.db.sharing.fleet(60)  # type: ignore[union-attr]
        return None if fleet is None else fleet.processes

    def work(self, threads: int) -> None:
        """Connect all the time from now on."""
        for _ in range(threads):
            threading.Thread(target=self._work, daemon=True).start()

    def _work(self) -> None:
        while True:
            self.connect()

    def fork(self) -> dict[str, Any]:
        """Return what a forked child says of itself and its sharing."""
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            try:
                self.connect()
                said = {"settled": self.settle(), "fleet": self.fleet(), **self.state()}
                os.write(writing, json.dumps(said).encode())
            finally:
                os._exit(0)
        os.close(writing)
        with open(reading, "rb") as pipe:
            said = json.loads(pipe.read() or b"{}")
        os.waitpid(child, 0)
        return said


class SharedProcess:
    """Such a process, from the test's side."""

    def __init__(self, **options: Any) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.shared_process", json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def tell(self, *command: Any) -> None:
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()

    def answer(self) -> Any:
        line = self.process.stdout.readline()
        assert line, "the process has ended"
        return json.loads(line)

    def do(self, *command: Any) -> Any:
        self.tell(*command)
        return self.answer()

    def close(self) -> int:
        """Let it end by itself; return its exit status."""
        assert self.process.stdout is not None
        self.process.stdin.close()
        try:
            return self.process.wait(60)
        finally:
            self.process.kill()
            self.process.wait()
            self.process.stdout.close()

    def __enter__(self) -> SharedProcess:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.close()
        # Of one that has ended by itself, too: another test would be warned of its pipes.
        for pipe in (self.process.stdin, self.process.stdout):
            pipe.close()


def main() -> None:
    commands = Commands(json.loads(sys.argv[1]))
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        print(json.dumps(getattr(commands, name)(*arguments)), flush=True)


if __name__ == "__main__":
    main()
