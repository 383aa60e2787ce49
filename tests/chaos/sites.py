"""What the site runs on: servers, and for Django's own engine an HAProxy in front of them.

The engine under test has all peers in its settings. Django's own engine has one HAProxy that
balances over the same peers, as such a site would have it: with health checks, retries on another
server, and connections to a server that is found dead closed at once.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

import django
import MySQLdb

from django_proxysql.core import outcome
from tests.engine import MYSQL, added, engine, mysql_peer
from tests.servers import ADMIN, ADMIN_PASSWORD, DATABASE, PASSWORD, USER, Address
from tests.servers.faultproxy import FaultProxy
from tests.servers.galera import GaleraCluster, GaleraNode
from tests.servers.haproxy import HAProxy
from tests.servers.mariadb import Node

from .load import TABLE, HarnessError

#: How often the peers of both are looked at: by trials here, by health checks there.
CHECK_INTERVAL = 1.0
FRONT = "front"
WAY = "way"


class Front(HAProxy):
    """One port in front of all peers, with what HAProxy has to offer for this."""

    def __init__(self, peers: Sequence[Address]) -> None:
        super().__init__({FRONT: peers}, check_interval=CHECK_INTERVAL / 2)

    def prepare(self) -> None:
        super().prepare()
        path = self.directory / "haproxy.cfg"
        lines = []
        for line in path.read_text().splitlines():
            if line == "  retries 0":
                lines += ["  retries 3", "  option redispatch 1"]
            elif line.endswith(" fall 1 rise 1"):
                lines.append(line + " on-marked-down shutdown-sessions")
            else:
                lines.append(line)
        path.write_text("\n".join(lines) + "\n")


Self = TypeVar("Self", bound="Site")


class Site:
    """Peers, and the servers behind them that hold the rows."""

    #: What the peers are, for the balancer.
    peers: Sequence[Any]
    #: Those whose rows are compared; each must have all of them.
    servers: Sequence[Node]

    front: Front

    def __init__(self, server: Any) -> None:
        #: The one server, or the Galera cluster.
        self.server = server
        self.servers = list(server) if isinstance(server, GaleraCluster) else [server]

    def __enter__(self: Self) -> Self:
        with contextlib.ExitStack() as stack:
            self.peers = self.start_peers(stack)
            self.front = stack.enter_context(Front(self.peers))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def start_peers(self, stack: contextlib.ExitStack) -> Sequence[Any]:
        """Start the peers, which ``stack`` ends."""
        raise NotImplementedError

    @contextlib.contextmanager
    def engine(self, name: str, options: dict[str, Any]) -> Iterator[None]:
        """Have ``connections[name]`` lead here; ``name`` is one of the runner's ENGINES."""
        settings: dict[str, Any] = {"CONN_MAX_AGE": 60, "OPTIONS": dict(options)}
        if name != "plain":
            peers = [mysql_peer(peer) for peer in self.peers]
            settings["CHECK_INTERVAL"] = CHECK_INTERVAL
            if name == "retrying":
                settings["COMMIT_OUTCOME"] = "record"
            with engine(peers, alias=name, **settings):
                yield
            return
        entry = {"ENGINE": MYSQL, **mysql_peer(self.front), **settings}
        if django.VERSION >= (4, 1):
            # The best that Django offers by itself.
            entry["CONN_HEALTH_CHECKS"] = True
        with added({name: entry}):
            yield

    def empty(self) -> None:
        """Leave nothing but the seed in the table."""
        make_tables(
            self.servers,
            [*TABLE, f"DROP TABLE IF EXISTS {outcome.TABLE}", outcome.creates("mysql")],
        )

    def rows(self) -> Counter[str]:
        """What is in the table once the servers have done all that they were sent.

        :raises HarnessError: the servers disagree, or are not done.
        """
        self.settle()
        found = []
        for server in self.servers:
            with admin(server) as cursor:
                if isinstance(server, GaleraNode):
                    cursor.execute("SET SESSION wsrep_sync_wait = 1")
                cursor.execute("SELECT value FROM chaos_row WHERE id <> 1")
                found.append(Counter(value for (value,) in cursor.fetchall()))
        if any(rows != found[0] for rows in found):
            raise HarnessError("the servers of the cluster have different rows")
        return found[0]

    def settle(self, timeout: float = 20) -> None:
        """Return when no client is connected any more."""
        deadline = time.monotonic() + timeout
        for server in self.servers:
            with admin(server) as cursor:
                while True:
                    left = connected(cursor)
                    if not left:
                        break
                    if time.monotonic() > deadline:
                        raise HarnessError(f"{len(left)} connections are left on {server.name}")
                    time.sleep(0.02)

    def busiest(self) -> Any:
        """The peer with most connections."""
        raise NotImplementedError

    def mend(self) -> None:
        """Mend what was hurt."""
        raise NotImplementedError

    def restore(self) -> None:
        """Mend all that was hurt; return once HAProxy has found all of its servers up."""
        self.mend()
        self.front.start()
        _up(self.front)


class Ways(Site):
    """One MariaDB server, and three proxies in front of it that are the peers.

    Whatever was written is in one place, then, whichever way it took.
    """

    def start_peers(self, stack: contextlib.ExitStack) -> list[HAProxy]:
        ways = [HAProxy({WAY: self.server}, name=f"way-{n}") for n in (1, 2, 3)]
        return [stack.enter_context(way) for way in ways]

    def busiest(self) -> HAProxy:
        return max(self.peers, key=lambda way: way.sessions(WAY))

    def mend(self) -> None:
        for way in self.peers:
            if way.frozen:
                way.thaw()
            way.start()
            way.ask(f"enable frontend {WAY}")
            way.ask(f"enable server {WAY}-servers/s0")


class Cuts(Site):
    """One MariaDB server, and three fault proxies in front of it that are the peers."""

    def start_peers(self, stack: contextlib.ExitStack) -> list[FaultProxy]:
        # Connections end by FIN, and by RST.
        return [stack.enter_context(FaultProxy(self.server, reset=n == 1)) for n in range(3)]

    def mend(self) -> None:
        for proxy in self.peers:
            proxy.disarm()


class Galera(Site):
    """A Galera cluster, whose nodes are the peers."""

    def start_peers(self, stack: contextlib.ExitStack) -> list[GaleraNode]:
        return list(self.server)

    def busiest(self) -> GaleraNode:
        def load(node: GaleraNode) -> int:
            with admin(node) as cursor:
                return len(connected(cursor))

        return max(self.peers, key=load)

    def mend(self) -> None:
        self.server.restore()


class Stack(Site):
    """A Galera cluster, and a proxy in front of each node: the proxies are the peers."""

    def start_peers(self, stack: contextlib.ExitStack) -> list[HAProxy]:
        ways = [HAProxy({WAY: node}, name=f"way-to-{node.name}") for node in self.server]
        return [stack.enter_context(way) for way in ways]

    def mend(self) -> None:
        self.server.restore()
        for way in self.peers:
            way.start()


#: How a site is made of servers, and whether these are a Galera cluster.
SITES: dict[str, tuple[type[Any], bool]] = {
    "ways": (Ways, False),
    "cuts": (Cuts, False),
    "galera": (Galera, True),
    "stack": (Stack, True),
}


def make_tables(servers: Sequence[Address], statements: Iterable[str] = TABLE) -> None:
    """Make the table by the first server; return once the cluster's others have it too."""
    with admin(servers[0]) as cursor:
        for statement in statements:
            cursor.execute(statement)
    for server in servers[1:]:
        with admin(server) as cursor:
            cursor.execute("SET SESSION wsrep_sync_wait = 1")
            cursor.execute("SELECT 1 FROM chaos_row")


@contextlib.contextmanager
def straight(server: Address, user: str = USER, password: str = PASSWORD) -> Iterator[Any]:
    """A connection straight to a server."""
    connection = MySQLdb.connect(
        host=server.host,
        port=server.port,
        user=user,
        password=password,
        database=DATABASE,
        autocommit=True,
        read_timeout=30,
    )
    with contextlib.closing(connection):
        yield connection


@contextlib.contextmanager
def admin(server: Address) -> Iterator[Any]:
    """A cursor straight to a server, with all rights."""
    with straight(server, ADMIN, ADMIN_PASSWORD) as connection:
        yield connection.cursor()


def connected(cursor: Any) -> list[int]:
    """The ids of the site's connections to a server, of those too that are just being made.

    A trigger's work goes by the name of the user who made it: where it comes from says what is
    not the site's. Administrators come by the server's socket, ``cursor`` apart.
    """
    cursor.execute(
        "SELECT id FROM information_schema.processlist"
        " WHERE id <> CONNECTION_ID() AND host LIKE '%:%'"
    )
    return [number for (number,) in cursor.fetchall()]


def _up(front: Front, timeout: float = 20) -> None:
    """Return when HAProxy has found all of its servers up."""
    deadline = time.monotonic() + timeout
    while True:
        rows = [row.split(",") for row in front.ask("show stat").splitlines()]
        states = [row[17] for row in rows if len(row) > 17 and row[1].startswith("s")]
        servers = [state for state in states if state != "status"]
        if servers and all(state.startswith("UP") for state in servers):
            return
        if time.monotonic() > deadline:
            raise HarnessError(f"{front.name} does not find its servers up: {servers}")
        time.sleep(0.05)
