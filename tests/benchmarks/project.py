"""The Django project of the benchmarks, and what all of them do with it.

It has settings without a settings module, and entries of DATABASES under aliases of their own.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from django.db import connections, transaction

from tests.servers import DATABASE, PASSWORD, USER, Address
from tests.servers.mariadb import Node
from tests.servers.processes import start_together

ENGINE = "django_proxysql.backends.proxysql"
MYSQL = "django.db.backends.mysql"
POSTGRESQL = "django.db.backends.postgresql"

READ = "SELECT 1"
WRITE = "UPDATE t SET n = n + 1 WHERE id = 1"

_numbers = itertools.count()


def configure(apps: Sequence[str] = ()) -> None:
    """Set Django up with no database yet, and with production's level of logging.

    What is logged goes nowhere: circuits that open on purpose would stand among the figures.
    """
    import django
    from django.conf import settings

    settings.configure(
        DATABASES={"default": {"ENGINE": "django.db.backends.dummy"}},
        DEFAULT_AUTO_FIELD="django.db.models.BigAutoField",
        USE_TZ=True,
        INSTALLED_APPS=list(apps),
        LOGGING={
            "version": 1,
            "handlers": {"nowhere": {"class": "logging.NullHandler"}},
            "loggers": {"django_proxysql": {"level": "WARNING", "handlers": ["nowhere"]}},
        },
    )
    django.setup()


# Servers


@contextlib.contextmanager
def mariadb(number: int = 1) -> Iterator[list[Node]]:
    """Start so many servers with the database, its user and the table that WRITE is for."""
    nodes = [Node(f"benchmark{one}") for one in range(number)]
    try:
        start_together(*nodes)
        for node in nodes:
            node.set_up().sql(
                "CREATE TABLE t (id int PRIMARY KEY, n int) ENGINE=InnoDB;"
                "INSERT INTO t VALUES (1, 0)",
                database=DATABASE,
            )
        yield nodes
    finally:
        for node in nodes:
            node.close()


# Entries of DATABASES


def account() -> dict[str, Any]:
    """Return what all entries of servers have in common."""
    return {"NAME": DATABASE, "USER": USER, "PASSWORD": PASSWORD}


def plain(server: Address, engine: str = MYSQL) -> dict[str, Any]:
    """Return the entry of one server, through Django's own engine."""
    return {"ENGINE": engine, "HOST": server.host, "PORT": server.port, **account()}


def balanced(servers: Sequence[Address], **more: Any) -> dict[str, Any]:
    """Return the entry of a load balancer over servers."""
    peers = [{"HOST": server.host, "PORT": server.port} for server in servers]
    return {"ENGINE": ENGINE, "PEERS": peers, **account(), **more}


def null(peers: int, **more: Any) -> dict[str, Any]:
    """Return the entry of a load balancer over peers without a server (:mod:`.null.base`)."""
    return {
        "ENGINE": ENGINE,
        "PEER_ENGINE": "tests.benchmarks.null",
        "PEERS": [{"HOST": f"nowhere{number}"} for number in range(peers)],
        **more,
    }


def add(**entry: Any) -> str:
    """Add an entry to DATABASES, with the keys that Django fills in; return its alias."""
    defaults: dict[str, Any] = {
        **dict.fromkeys(("NAME", "USER", "PASSWORD", "HOST", "PORT"), ""),
        "ATOMIC_REQUESTS": False,
        "AUTOCOMMIT": True,
        "CONN_MAX_AGE": 0,
        "CONN_HEALTH_CHECKS": False,
        "OPTIONS": {},
        "TIME_ZONE": None,
        "TEST": {"MIRROR": None, "NAME": None, "CHARSET": None, "COLLATION": None},
    }
    alias = f"benchmark{next(_numbers)}"
    connections.databases[alias] = {**defaults, **entry}
    return alias


def wrapper(**entry: Any) -> Any:
    """Add an entry to DATABASES and return this thread's wrapper for it."""
    return connections[add(**entry)]


def knowing_all(connection: Any) -> Any:
    """Have each peer known as it is once a process has connected to all of them."""
    from django_proxysql import balancers

    connection.connect()
    connection.close()
    registered = balancers.registered(connection.alias)
    peers = registered.balancer.peers.values()
    known = next(peer.server_facts for peer in peers if peer.server_facts is not None)
    for peer in peers:
        peer.server_facts = known
        registered.settings_for(peer, connection.settings_dict, connection.alias)
    return connection


# What is measured


def connect_and_close(connection: Any) -> None:
    connection.connect()
    connection.close()


def execute(connection: Any, sql: str) -> None:
    """Run a statement as the ORM does: with a cursor of its own."""
    with connection.cursor() as cursor:
        cursor.execute(sql)
        if sql == READ:
            cursor.fetchall()


def block(connection: Any, sql: str) -> None:
    """Run one statement in an atomic block."""
    with transaction.atomic(using=connection.alias):
        execute(connection, sql)
