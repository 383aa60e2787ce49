"""A load balancer whose two peers are fault proxies in front of one server.

Whatever was written is in one place, then, whichever peer it went through.
"""

from __future__ import annotations

import contextlib
import select
from collections.abc import Callable, Iterator
from typing import Any

from django.db import connections
from django.db.backends.base.base import BaseDatabaseWrapper

from django_proxysql.core.events import ConnectionLost, ConnectionReplaced, StatementReplayed
from django_proxysql.registry import balancers
from tests.app.models import Token
from tests.engine import (
    MYSQL,
    POSTGRESQL,
    Clock,
    added,
    engine,
    mysql_peer,
    rows_of,
    sessions_beside,
)
from tests.fakes import until
from tests.other_driver import DRIVER
from tests.servers import DATABASE, PASSWORD, USER
from tests.servers.faultproxy import FaultProxy

KINDS = ["mariadb", "mariadb_tls", "postgres"]


class Site:
    """What a test of established connections works with."""

    def __init__(
        self, server: Any, proxies: list[FaultProxy], connection: Any, clock: Clock, plain: Any
    ) -> None:
        self.server = server
        self.proxies = proxies
        self.connection = connection
        self.clock = clock
        #: A connection straight to the server, by Django's own engine.
        self.plain = plain
        self.balancer = balancers[connection.alias]
        self.events: list[Any] = []
        self.balancer.add_listener(self.events.append)
        self.is_mysql = connection.vendor == "mysql"

    # What the test does

    def sql(self, statement: str, params: Any = None) -> Any:
        """Run a statement through the engine; return its rows, if it has any."""
        return rows_of(self.connection, statement, params=params)

    def plainly(self, *statements: str) -> Any:
        """Run statements by Django's own engine; return the last one's rows, if it has any."""
        return rows_of(self.plain, *statements)

    def write(self, value: str) -> None:
        self.sql("INSERT INTO app_token (value) VALUES (%s)", [value])

    def read(self) -> Any:
        return [value for (value,) in self.sql("SELECT value FROM app_token ORDER BY id")]

    # Where it stands

    @property
    def here(self) -> FaultProxy:
        """The proxy that the present connection goes through."""
        port = self.connection.peer.address.rpartition(":")[2]
        return next(proxy for proxy in self.proxies if str(proxy.port) == port)

    @property
    def session(self) -> Any:
        return self.connection._session

    def written(self) -> list[str]:
        """What is in the table, once the server has done all that it was sent."""
        self.settle()
        return self.plain_rows()

    def plain_rows(self) -> list[str]:
        """What is in the table now."""
        return [value for (value,) in self.plainly("SELECT value FROM app_token ORDER BY id")]

    def settle(self) -> None:
        """Return when the server is done with connections that are gone."""
        # A dead connection stays in place until the next safe point: its session is gone, or going.
        mine = 1 if self.connection.connection is not None and not self.session.dead else 0
        until(lambda: self.sessions() <= mine, pause=0.005)

    def sessions(self) -> int:
        """How many connections the server has, but for the test's own."""
        return sessions_beside(self.plain)

    def losses(self) -> list[ConnectionLost]:
        return [event for event in self.events if type(event) is ConnectionLost]

    def replaced(self) -> list[ConnectionReplaced]:
        return [event for event in self.events if type(event) is ConnectionReplaced]

    def replayed(self) -> list[StatementReplayed]:
        return [event for event in self.events if type(event) is StatementReplayed]

    # What happens to it

    def cut_idle(self) -> None:
        """Have the connection closed by the other side, and its socket know."""
        self.here.drop_connections()
        until_seen(self.connection.connection)

    def kill(self) -> None:
        """Have the server end the session, as KILL does, and its socket know."""
        driver = self.connection.connection
        self.plainly(
            f"KILL {driver.thread_id()}"
            if self.is_mysql
            else f"SELECT pg_terminate_backend({driver.info.backend_pid})"
        )
        until_seen(driver)

    def kill_idle(self) -> None:
        """Have the session ended while it is idle: the next statement looks first."""
        self.kill()
        self.idle()

    def cut(self, kind: str, nth: int = 1) -> None:
        """Lose the connection at the nth packet from now.

        :param kind: "before" it left, "after" it left, or in the middle of the "reply".
        """
        if kind == "reply":
            self.here.cut_reply(3, nth=nth)
        else:
            getattr(self.here, f"cut_{kind}")(nth=nth)

    def idle(self, seconds: float = 1.0) -> None:
        self.clock.advance(seconds)


def until_seen(connection: Any) -> None:
    """Wait until what befell a driver's connection has reached its socket."""
    # PyMySQL's has no other name.
    owner = connection if hasattr(connection, "fileno") else connection._sock
    assert select.select([owner], [], [], 60)[0]


@contextlib.contextmanager
def site(
    server: Any, fault_proxy: Callable[..., FaultProxy], number: int = 2, **settings: Any
) -> Iterator[Site]:
    """Yield a connected :class:`Site` with an empty table ``app_token``."""
    proxies = [fault_proxy(server) for _ in range(number)]
    clock = Clock()
    is_mysql = not type(server).__name__.startswith("Postgre")
    options: dict[str, Any] = dict(settings.pop("OPTIONS", {}))
    if getattr(server, "ca", None):
        options.update(
            {"ssl": {"ca": str(server.ca)}}
            if is_mysql
            else {"sslmode": "verify-ca", "sslrootcert": str(server.ca)}
        )
    elif DRIVER == "pymysql":
        # It would read the system's certificates at each connect, which takes it 20 ms.
        options["ssl_disabled"] = True
    plain = {
        "ENGINE": MYSQL if is_mysql else POSTGRESQL,
        "NAME": DATABASE,
        "USER": USER,
        "PASSWORD": PASSWORD,
        "HOST": server.host,
        "PORT": server.port,
        "OPTIONS": options,
    }
    settings = {
        "PEER_ENGINE": plain["ENGINE"],
        "OPTIONS": options,
        "CONN_MAX_AGE": None,
        **settings,
    }
    peers = [mysql_peer(proxy) for proxy in proxies]
    with added({"plain": plain}), engine(peers, clock=clock, **settings) as connection:
        with_table(connections["plain"])
        connection.ensure_connection()
        yield Site(server, proxies, connection, clock, connections["plain"])


def with_table(connection: BaseDatabaseWrapper) -> None:
    """Leave an empty table ``app_token`` there."""
    if Token._meta.db_table in connection.introspection.table_names():
        with connection.cursor() as cursor:
            cursor.execute("DELETE FROM app_token")
    else:
        with connection.schema_editor() as editor:
            editor.create_model(Token)
