"""A session reads its own writes on Galera, where the connection is lost in between.

A node that did not take the write shows it a moment later: that is Galera's way, and the engine has
to wait for it when it goes on elsewhere. Beside it the same with plain connections to two nodes.
"""

from __future__ import annotations

import contextlib
import os
import random
import socket
from dataclasses import dataclass, field
from typing import Any, Callable

from django.db import Error, close_old_connections, connections

from django_proxysql.registry import balancers
from tests.engine import engine, mysql_peer

from .load import Load, Pace, Row
from .sites import Galera, straight

OWN = "own"


@dataclass
class OwnWrites:
    """How many reads did not show what had been written just before."""

    tries: int
    #: Tries in which the read went to another node than the write.
    elsewhere: int = 0
    stale: int = 0
    #: The same by plain connections, always to another node.
    control_stale: int = 0
    violations: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return (
            f"Own writes on Galera, read after the connection was lost: {self.stale} of"
            f" {self.tries} reads were stale ({self.elsewhere} were made on another node).\n"
            f"The same with plain connections to two nodes: {self.control_stale} of {self.tries}."
        )


def measure(
    site: Galera, tries: int = 500, say: Callable[[str], None] = lambda text: None
) -> OwnWrites:
    """Write, lose the connection, read; under load."""
    site.restore()
    site.empty()
    found = OwnWrites(tries)
    # A balancer of its own: the load's takes no notice of the connections that are cut. It finds
    # them lost before it reads, for so many statements would not be run again in a minute.
    peers = [mysql_peer(peer) for peer in site.peers]
    with (
        site.engine("ours", {}),
        engine(peers, alias=OWN, IDLE_CHECK=0),
        contextlib.ExitStack() as stack,
    ):
        plain = [stack.enter_context(straight(node)) for node in site.peers]
        with Load("ours", pace=Pace(pause=0.001, idle_every=10_000)) as load:
            load.wait(0.5)
            for number in range(tries):
                load.check()
                _try_ours(found, number)
                _try_plain(found, number, plain)
                if number % 100 == 99:
                    say(f"{number + 1} of {tries}")
    return found


def _try_ours(found: OwnWrites, number: int) -> None:
    connection = connections[OWN]
    token = f"own-{number}"
    close_old_connections()
    balancer = balancers[OWN]
    for peer in random.sample(list(balancer.peers.values()), len(balancer.peers)):
        # The connect takes back the doubts that an earlier try has raised about this node.
        with balancer.pinned(peer):
            connection.close()
            connection.ensure_connection()
    try:
        Row.objects.using(OWN).create(value=token)
        node = connection.peer
        _cut(connection.connection)
        seen = Row.objects.using(OWN).filter(value=token).exists()
    except Error as exc:
        found.violations.append(f"{token}: {exc!r}")
        return
    if connection.peer is not node:
        found.elsewhere += 1
    if not seen:
        found.stale += 1
        found.violations.append(f"{token} was written, and not there")


def _cut(connection: Any) -> None:
    """End a connection at once, as a broken wire would."""
    with socket.socket(fileno=os.dup(connection.fileno())) as duplicate:
        duplicate.shutdown(socket.SHUT_RDWR)


def _try_plain(found: OwnWrites, number: int, plain: list[Any]) -> None:
    here, there = random.sample(plain, 2)
    token = f"plain-{number}"
    with contextlib.closing(here.cursor()) as cursor:
        cursor.execute("INSERT INTO chaos_row (value) VALUES (%s)", [token])
    with contextlib.closing(there.cursor()) as cursor:
        cursor.execute("SELECT 1 FROM chaos_row WHERE value = %s", [token])
        found.control_stale += not cursor.fetchall()
