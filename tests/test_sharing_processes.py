"""Real processes, real servers, a real Redis: what one finds out, the others know.

Clocks are the real ones: nothing here waits for a time to pass, but for something to happen.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from django_proxysql.core.sharing import link
from tests.servers import DATABASE, PASSWORD, USER
from tests.servers.faultproxy import FaultProxy
from tests.servers.mariadb import Node
from tests.servers.redis import RedisServer
from tests.shared_process import SharedProcess

Start = Callable[..., SharedProcess]


class Fleet:
    """Processes with two peers, which are fault proxies to MariaDB."""

    def __init__(self, stack: contextlib.ExitStack, peers: dict[str, FaultProxy], url: str) -> None:
        self.stack = stack
        self.peers = peers
        self.url = url

    def start(self, number: int, **options: Any) -> list[SharedProcess]:
        """Start that many, and have each share what it knows."""
        given = {
            name: {
                "host": proxy.host,
                "port": proxy.port,
                "user": USER,
                "password": PASSWORD,
                "database": DATABASE,
            }
            for name, proxy in self.peers.items()
        }
        options = {"strategy": "round_robin", "shared_state": self.url, **options}
        started = [
            self.stack.enter_context(SharedProcess(peers=given, **options)) for _ in range(number)
        ]
        for process in started:
            process.tell("settle")
        for process in started:
            process.answer()
        return started


@pytest.fixture
def fleet(
    mariadb_pair: tuple[Node, Node],
    redis_server: RedisServer,
    fault_proxy: Callable[..., FaultProxy],
) -> Iterator[Fleet]:
    peers = {name: fault_proxy(node) for name, node in zip(("db1", "db2"), mariadb_pair)}
    with contextlib.ExitStack() as stack:
        yield Fleet(stack, peers, redis_server.url)


def test_all_know_at_their_next_look(fleet: Fleet) -> None:
    """Openings and closings. They look once a second; what is found costs them nothing."""
    assert link.INTERVAL == 1
    one, *others = fleet.start(4)
    for turn in range(4):
        change, event = (("open", "CircuitOpened"), ("close", "CircuitClosed"))[turn % 2]
        one.do("breaker", "db1", change)
        assert one.do("settle")
        # By the host's clock, which all of them go by.
        published = time.monotonic()
        for other in others:
            told = other.do("wait", event, "db1", published)
            assert told["looks"] <= 1
            assert told["elsewhere"]
    fleet.peers["db1"].refuse()
    while one.do("state")["states"]["db1"] == "closed":
        one.do("connect")
    for other in others:
        other.do("wait", "CircuitOpened", "db1")
        for _ in range(4):
            other.do("connect")
        assert other.do("state")["failed"] == 0


def test_one_trial_at_a_time_over_all(fleet: Fleet) -> None:
    """However many processes and threads connect all the time, trials never overlap."""
    patient = {"connect_timeout": 30, "connect_deadline": 60, "patience": 30}
    processes = fleet.start(4, check_interval=0.5, trial_timeout=1, **patient)
    fleet.peers["db1"].accept_and_close()
    processes[0].do("connect")
    processes[0].do("connect")
    for process in processes:
        process.do("wait", "CircuitOpened", "db1")
    # From here on each attempt is a trial, and lasts a second.
    fleet.peers["db1"].accept_and_hang()

    def attempts() -> list[Any]:
        port = fleet.peers["db1"].port
        return [one for process in processes for one in process.do("attempts_at", port)]

    for process in processes:
        process.do("work", 3)
    found = attempts()
    while len(found) <= 5:
        accepted = fleet.peers["db1"].accepted
        found = attempts()
    found.sort()
    for (_, ended), (began, _) in zip(found, found[1:]):
        assert ended <= began
    # One may be under way, and not have ended.
    assert accepted - len(found) <= 1
    fleet.peers["db1"].forward()
    for process in processes:
        process.do("wait", "CircuitClosed", "db1")
    elsewhere = [process.do("state")["states"]["db1"] for process in processes]
    assert elsewhere == ["closed"] * 4


def test_drain_outlives_its_process(fleet: Fleet) -> None:
    """A command's process drains and ends; those that run, and those that start, keep to it."""
    (one,) = fleet.start(1)
    (command,) = fleet.start(1)
    command.do("drain", "db1")
    assert command.close() == 0
    assert one.do("wait", "PeerDrained", "db1")["elsewhere"]
    assert one.close() == 0
    (later,) = fleet.start(1)
    assert later.do("state")["drained"] == ["db1"]
    accepted = fleet.peers["db1"].accepted
    for _ in range(3):
        later.do("connect")
    assert fleet.peers["db1"].accepted == accepted
    later.do("undrain", "db1")
    later.do("connect")
    later.do("connect")
    assert fleet.peers["db1"].accepted == accepted + 1


def test_redis_dies_in_the_middle(fleet: Fleet, redis_server: RedisServer) -> None:
    """Each goes on with what it knows; when Redis is back, empty, each publishes it again."""
    one, other = fleet.start(2)
    one.do("drain", "db2")
    other.do("wait", "PeerDrained", "db2")
    redis_server.kill()
    for process in (one, other):
        assert process.do("settle") is False
        assert process.do("state")["drained"] == ["db2"]
        process.do("connect")
    redis_server.start()
    while not (one.do("settle") and other.do("settle")):
        pass
    (third,) = fleet.start(1)
    assert third.do("state")["drained"] == ["db2"]


def test_frozen_redis_holds_no_process_up(fleet: Fleet, redis_server: RedisServer) -> None:
    """A Redis that accepts and stays silent is as good as none."""
    one, other = fleet.start(2, check_interval=0.5, timeout=0.25)
    redis_server.freeze()
    while one.do("state")["answered"]:
        pass
    fleet.peers["db1"].refuse()
    for _ in range(4):
        one.do("connect")
    assert one.do("state")["states"] == {"db1": "open", "db2": "closed"}
    fleet.peers["db1"].forward()
    one.do("work", 1)
    one.do("wait", "CircuitClosed", "db1")
    redis_server.thaw()
    while not (one.do("settle") and other.do("settle")):
        pass
    assert other.do("state")["failed"] == 0


def test_fork(fleet: Fleet) -> None:
    """A child of a fork has a thread and a connection of its own, and knows what its parent did."""
    (one,) = fleet.start(1)
    one.do("drain", "db1")
    child = one.do("fork")
    assert child["settled"] is True
    assert child["fleet"] == 2
    assert child["drained"] == ["db1"]
    assert one.do("settle") is True
    assert one.do("state")["answered"] is True


def test_exit_is_not_held_up(fleet: Fleet, redis_server: RedisServer) -> None:
    """A process ends, whatever its thread waits for."""
    (one,) = fleet.start(1)
    redis_server.freeze()
    assert one.close() == 0
