"""A web site: threads that serve requests, and remember what they saw.

A request reads in autocommit, writes in autocommit, and reads and writes in an atomic block. Every
write is a fresh token, in a table that would take it twice.
"""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Callable, NamedTuple

from django.db import Error, close_old_connections, connections, models, transaction

from django_proxysql import retrying_atomic

SEED = 1
SEED_VALUE = "what every read reads"


class Row(models.Model):
    """One write. Nothing keeps a value from being there twice: that would show."""

    value = models.CharField(max_length=64)

    class Meta:
        app_label = "chaos"
        db_table = "chaos_row"
        managed = False

    def __str__(self) -> str:
        return self.value


#: No unique key. A write takes its time, so that it is often under way when something happens.
TABLE = (
    "DROP TABLE IF EXISTS chaos_row",
    "CREATE TABLE chaos_row (id integer AUTO_INCREMENT PRIMARY KEY, value varchar(64) NOT NULL)"
    " ENGINE=InnoDB",
    f"INSERT INTO chaos_row (id, value) VALUES ({SEED}, '{SEED_VALUE}')",
    "CREATE TRIGGER chaos_row_slow BEFORE INSERT ON chaos_row FOR EACH ROW DO SLEEP(0.003)",
)


class HarnessError(Exception):
    """The suite itself went wrong: nothing was measured."""


class Failure(NamedTuple):
    """One operation that raised an error."""

    #: ``read``, ``write`` or ``block``.
    kind: str
    #: What was under way: ``begin``, ``read``, ``write``, ``commit``.
    stage: str
    thread: int
    started: float
    ended: float
    error: Error

    @property
    def seconds(self) -> float:
        return self.ended - self.started

    @property
    def code(self) -> object:
        return self.error.args[0] if self.error.args else None

    def __str__(self) -> str:
        return (
            f"{self.kind} failed at {self.stage} in thread {self.thread} after"
            f" {self.seconds:.3f} s: {type(self.error).__name__}: {self.error}"
        )


@dataclass
class Pace:
    """How a thread spends the time between two requests."""

    #: Seconds, on average.
    pause: float = 0.003
    #: Every so many requests …
    idle_every: int = 100
    #: … it idles for so long.
    idle: float = 0.7


@dataclass
class Ledger:
    """What one thread did, and saw."""

    thread: int
    requests: int = 0
    #: Tokens whose write was reported done.
    done: list[str] = field(default_factory=list)
    #: Tokens whose write was reported failed, or unknown.
    failed: list[str] = field(default_factory=list)
    #: Tokens of blocks whose on_commit hook ran.
    hooks: Counter[str] = field(default_factory=Counter)
    blocks_done: list[str] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    longest: float = 0.0
    #: When each request was served that was.
    served: list[float] = field(default_factory=list)


class Load:
    """Threads that serve requests while the ``with`` block lasts; ``ledgers`` tell of them.

    :param retries: all writes are in blocks, which ``retrying_atomic`` runs.
    """

    def __init__(
        self,
        alias: str,
        threads: int = 8,
        pace: Pace | None = None,
        retries: bool = False,
    ) -> None:
        self.alias = alias
        self.pace = pace or Pace()
        self.retries = retries
        self.atomic: Callable[..., Any] = retrying_atomic if retries else transaction.atomic
        self.ledgers = [Ledger(number) for number in range(threads)]
        self._stopping = threading.Event()
        self._broken: list[BaseException] = []
        self._something_broke = threading.Event()
        self._threads = [
            threading.Thread(
                target=self._work, args=(ledger,), name=f"{alias}-{ledger.thread}", daemon=True
            )
            for ledger in self.ledgers
        ]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        self._stopping.set()
        if kind is None:
            self.join()

    def join(self, timeout: float = 60) -> None:
        """Let each thread finish its request.

        :raises HarnessError: one had died, or does not end.
        """
        self._stopping.set()
        deadline = time.monotonic() + timeout
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        stuck = [thread.name for thread in self._threads if thread.is_alive()]
        if stuck:
            raise HarnessError(f"still at work after {timeout} s: {', '.join(stuck)}")
        self.check()

    def wait(self, seconds: float) -> None:
        """Let the site work for some time."""
        self._something_broke.wait(seconds)
        self.check()

    def check(self) -> None:
        """Raise HarnessError if a thread has died of what it should not."""
        if self._broken:
            raise HarnessError(f"a thread died of {self._broken[0]!r}") from self._broken[0]

    @property
    def requests(self) -> int:
        return sum(ledger.requests for ledger in self.ledgers)

    # One thread

    def _work(self, ledger: Ledger) -> None:
        chance = random.Random(ledger.thread)
        try:
            while not self._stopping.is_set():
                close_old_connections()
                started = time.monotonic()
                served = self._serve(ledger)
                ended = time.monotonic()
                close_old_connections()
                ledger.requests += 1
                ledger.longest = max(ledger.longest, ended - started)
                if served:
                    ledger.served.append(ended)
                pause = chance.expovariate(1 / self.pace.pause)
                if chance.randrange(self.pace.idle_every) == 0:
                    pause += self.pace.idle
                self._stopping.wait(pause)
        except BaseException as exc:
            self._broken.append(exc)
            self._something_broke.set()
        finally:
            with contextlib.suppress(Exception):
                connections[self.alias].close()

    def _serve(self, ledger: Ledger) -> bool:
        """Serve one request; the first error ends it, as it would a view."""
        token = f"{self.alias}-{ledger.thread}-{ledger.requests}"
        return (
            self._does(ledger, "read", self._read)
            and self._does(ledger, "write", self._write, f"{token}-w")
            and self._does(ledger, "block", self._block, f"{token}-b")
        )

    def _does(
        self, ledger: Ledger, kind: str, operation: Callable[..., None], token: str = ""
    ) -> bool:
        """Do it; return whether it raised no error."""
        stages: list[str] = []
        started = time.monotonic()
        try:
            operation(ledger, stages.append, token)
        except Error as exc:
            ended = time.monotonic()
            # Its traceback would keep cursors alive.
            exc.__traceback__ = None
            failure = Failure(kind, stages[-1], ledger.thread, started, ended, exc)
            ledger.failures.append(failure)
            told = ledger.failed
        else:
            told = ledger.done
        if token:
            told.append(token)
        return told is ledger.done

    def _read(self, ledger: Ledger, reach: Callable[[str], None], token: str) -> None:
        reach("read")
        values = list(Row.objects.using(self.alias).filter(pk=SEED).values_list("value", flat=True))
        if values != [SEED_VALUE]:
            raise HarnessError(f"a read returned {values!r}")

    def _write(self, ledger: Ledger, reach: Callable[[str], None], token: str) -> None:
        reach("write")
        write = Row.objects.using(self.alias).create
        if self.retries:
            write = self.atomic(using=self.alias)(write)
        write(value=token)

    def _block(self, ledger: Ledger, reach: Callable[[str], None], token: str) -> None:
        def block() -> None:
            transaction.on_commit(lambda: ledger.hooks.update([token]), using=self.alias)
            self._read(ledger, reach, token)
            reach("write")
            Row.objects.using(self.alias).create(value=token)
            reach("commit")

        reach("begin")
        self.atomic(using=self.alias)(block)()
        ledger.blocks_done.append(token)
