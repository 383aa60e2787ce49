"""Blocks whose COMMITs are lost, and the comparison of what was raised with what stands."""

from __future__ import annotations

import contextlib
import itertools
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from django.db import DatabaseError, OperationalError, connections, transaction

from django_proxysql.core.events import CommitResolved
from django_proxysql.errors import CommitOutcomeUnknown
from django_proxysql.registry import balancers
from tests.engine import (
    MYSQL,
    POSTGRESQL,
    added,
    engine,
    make_outcome_table,
    mysql_peer,
    wait_until_alone,
)
from tests.servers import Address
from tests.site import with_table

from .cutter import Cutter

THREADS = 4


class Found(NamedTuple):
    """What came of it."""

    lost: int
    stood: int
    #: Blocks that ended well and do not stand, or the other way round; hooks that ran not once.
    wrong: int
    unknown: int
    #: Seconds that finding out took.
    median: float
    longest: float


class Trial:
    """Runs blocks in threads until enough COMMITs were lost.

    :param peers: where the blocks run.
    :param ledger: a server on which all that stands can be read.
    """

    def __init__(self, peers: Sequence[Cutter], ledger: Address, is_mysql: bool) -> None:
        self._peers, self._ledger = peers, ledger
        self._targets = list(dict.fromkeys(peer.target for peer in peers))
        self._engine = MYSQL if is_mysql else POSTGRESQL
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._random = random.Random(peers[0].seed)
        #: What each block ended with.
        self.ends: dict[str, str] = {}
        self.hooks: Counter[str] = Counter()
        self.resolved: list[CommitResolved] = []

    @contextlib.contextmanager
    def running(self, in_order: bool = False, **settings: Any) -> Iterator[None]:
        """Have the tables, and the balancer.

        :param in_order: use the first peer while it is there.
        """
        plain = {"plain": {"ENGINE": self._engine, **mysql_peer(self._ledger)}}
        for number, target in enumerate(self._targets):
            plain[f"plain{number}"] = {"ENGINE": self._engine, **mysql_peer(target)}
        peers = [
            mysql_peer(peer, PRIORITY=number if in_order else 0)
            for number, peer in enumerate(self._peers)
        ]
        settings = {
            "PEER_ENGINE": self._engine,
            "COMMIT_OUTCOME": "record",
            "OUTCOME_DEADLINE": 30,
            "CONN_MAX_AGE": None,
            "REBALANCE": None,
            "WAIT_FOR_PEER": 30,
            "LAST_RESORT_INTERVAL": 0.2,
            "CHECK_INTERVAL": 0.5,
            **settings,
        }
        with added(plain), engine(peers, **settings):
            with_table(connections["plain"])
            make_outcome_table(connections["plain"])
            balancers["balanced"].add_listener(self._notified, connects=False)
            yield

    def _notified(self, event: Any) -> None:
        if isinstance(event, CommitResolved):
            self.resolved.append(event)

    def lose(self, number: int, threads: int = THREADS) -> None:
        """Run blocks until so many COMMITs more were lost."""
        enough = len(self.resolved) + number
        self._in_threads(lambda: len(self.resolved) < enough, threads)

    def strike(self, hurt: Callable[[], None], threads: int) -> None:
        """Hurt the first peer's server while blocks run there, and lose all of their COMMITs.

        Each connection is cut some time after its COMMIT was passed on, if the server has not
        answered with an error or died before.
        """
        first = self._peers[0]
        for peer in balancers["balanced"].peers.values():
            peer.breaker.close()
        struck = threading.Event()

        def cut() -> None:
            first.is_on = True

        def strike() -> None:
            steps = [cut, hurt]
            self._random.shuffle(steps)
            # Paces the load, in a command: threads that write are all at work by then.
            time.sleep(0.5)
            for step in steps:
                step()
                time.sleep(self._random.uniform(0, 0.01))
            struck.set()

        striking = threading.Thread(target=strike)
        striking.start()
        self._in_threads(lambda: not struck.is_set(), threads)
        striking.join()
        first.is_on = False

    def _in_threads(self, goes_on: Callable[[], bool], threads: int) -> None:
        def work() -> None:
            try:
                while goes_on():
                    self.block()
            finally:
                connections.close_all()

        running = [threading.Thread(target=work) for _ in range(threads)]
        for thread in running:
            thread.start()
        for thread in running:
            thread.join()

    def block(self) -> None:
        """Write a row of its own in a block, and note how that ended."""
        with self._lock:
            value = f"{next(self._numbers)}"
        try:
            with transaction.atomic("balanced"):
                transaction.on_commit(lambda: self.hooks.update([value]), using="balanced")
                with connections["balanced"].cursor() as cursor:
                    cursor.execute("INSERT INTO app_token (value) VALUES (%s)", [value])
        except CommitOutcomeUnknown:
            self.ends[value] = "unknown"
        except (OperationalError, DatabaseError):
            # Lost before COMMIT, or found out to be rolled back.
            self.ends[value] = "raised"
        else:
            self.ends[value] = "well"

    def found(self) -> Found:
        """Compare with what stands, once no server has a COMMIT left to run."""
        standing = self._standing()
        wrong = 0
        for value, end in self.ends.items():
            is_right = end == "unknown" or (end == "well") == (value in standing)
            wrong += not (is_right and self.hooks[value] == (end == "well"))
        seconds = sorted(event.seconds for event in self.resolved)
        outcomes = Counter(event.outcome for event in self.resolved)
        return Found(
            lost=len(self.resolved),
            stood=outcomes["committed"],
            wrong=wrong,
            unknown=outcomes["unknown"],
            median=seconds[len(seconds) // 2] if seconds else 0.0,
            longest=seconds[-1] if seconds else 0.0,
        )

    def _standing(self) -> set[str]:
        plain = connections["plain"]
        plain.close()
        for number in range(len(self._targets)):
            wait_until_alone(connections[f"plain{number}"])
            connections[f"plain{number}"].close()
        with plain.cursor() as cursor:
            if len(self._targets) > 1:
                cursor.execute("SET SESSION wsrep_sync_wait = 1")
            cursor.execute("SELECT value FROM app_token")
            return {value for (value,) in cursor.fetchall()}
