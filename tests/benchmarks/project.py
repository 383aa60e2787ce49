"""The Django project of the benchmarks: settings, without a settings module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tests.servers import DATABASE, PASSWORD, USER, Address

ENGINE = "django_proxysql.backends.proxysql"
MYSQL = "django.db.backends.mysql"


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


def add(alias: str, **entry: Any) -> str:
    """Add an entry to DATABASES, with the keys that Django fills in; return its alias.

    :raises ValueError: there is such an alias, and a wrapper may be kept for what it was.
    """
    from django.db import connections

    if alias in connections.databases:
        raise ValueError(f"two benchmarks have the alias {alias!r}")
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
    connections.databases[alias] = {**defaults, **entry}
    return alias


def wrapper(alias: str, **entry: Any) -> Any:
    """Add an entry to DATABASES and return this thread's wrapper for it."""
    from django.db import connections

    return connections[add(alias, **entry)]


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


def plain(server: Address) -> dict[str, Any]:
    """Return the entry of one MariaDB server, through Django's own engine."""
    return {"ENGINE": MYSQL, "HOST": server.host, "PORT": server.port, **account()}


def balanced(servers: Sequence[Address], **more: Any) -> dict[str, Any]:
    """Return the entry of a load balancer over MariaDB servers."""
    peers = [{"HOST": server.host, "PORT": server.port} for server in servers]
    return {"ENGINE": ENGINE, "PEERS": peers, **account(), **more}


def account() -> dict[str, Any]:
    """Return what all entries of MariaDB servers have in common."""
    return {"NAME": DATABASE, "USER": USER, "PASSWORD": PASSWORD}


def null(peers: int, **more: Any) -> dict[str, Any]:
    """Return the entry of a load balancer over peers without a server (:mod:`.null.base`)."""
    return {
        "ENGINE": ENGINE,
        "PEER_ENGINE": "tests.benchmarks.null",
        "PEERS": [{"HOST": f"nowhere{number}"} for number in range(peers)],
        **more,
    }
