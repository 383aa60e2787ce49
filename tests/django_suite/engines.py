"""What the suite runs on: for each engine the plain entry of DATABASES, and the balanced one."""

from __future__ import annotations

import contextlib
import functools
import tempfile
from collections.abc import Iterator
from typing import Any

from tests.servers import ADMIN, ADMIN_PASSWORD
from tests.servers.mariadb import Node
from tests.servers.postgresql import PostgreSQLNode

Databases = dict[str, dict[str, Any]]

BALANCED = "django_proxysql.backends.proxysql"
SQLITE = "django.db.backends.sqlite3"
MYSQL = "django.db.backends.mysql"
POSTGRESQL = "django.db.backends.postgresql"
SPATIALITE = "django.contrib.gis.db.backends.spatialite"
POSTGIS = "django.contrib.gis.db.backends.postgis"

#: Keys of DATABASES that are each peer's own.
OF_THE_PEER = ("NAME", "HOST", "PORT")


def balanced(entry: dict[str, Any]) -> dict[str, Any]:
    """Return the entry of a load balancer over two peers, both being ``entry``'s server.

    Its address is spelt in two ways: peers of one address are a warning of our checks.
    """
    peer = {key: value for key, value in entry.items() if key in OF_THE_PEER}
    rest = {key: value for key, value in entry.items() if key not in OF_THE_PEER}
    if "HOST" in peer:
        again = {**peer, "HOST": peer["HOST"].replace("127.0.0.1", "127.1")}
    else:
        again = {**peer, "NAME": peer["NAME"].replace("/", "/./", 1)}
    return {
        **rest,
        "ENGINE": BALANCED,
        "PEER_ENGINE": entry["ENGINE"],
        "PEERS": [peer, again],
    }


@contextlib.contextmanager
def files(engine: str) -> Iterator[Databases]:
    """Two files; Django makes its test databases in memory."""
    with tempfile.TemporaryDirectory() as folder:
        yield {
            alias: {"ENGINE": engine, "NAME": f"{folder}/{alias}.sqlite3"}
            for alias in ("default", "other")
        }


@contextlib.contextmanager
def server(
    kind: type[Node] | type[PostgreSQLNode], engine: str, **settings: Any
) -> Iterator[Databases]:
    """One server of the run's own."""
    with contextlib.closing(kind("suite")) as node:
        node.start()
        node.set_up()
        yield {
            alias: {
                "ENGINE": engine,
                "NAME": f"suite_{alias}",
                "HOST": node.host,
                "PORT": node.port,
                "USER": ADMIN,
                "PASSWORD": ADMIN_PASSWORD,
                **settings,
            }
            for alias in ("default", "other")
        }


UTF8 = {"CHARSET": "utf8mb4", "COLLATION": "utf8mb4_general_ci"}
ENGINES = {
    "sqlite": functools.partial(files, SQLITE),
    "mariadb": functools.partial(server, Node, MYSQL, TEST=UTF8),
    "postgresql": functools.partial(server, PostgreSQLNode, POSTGRESQL),
    # For gis_tests, where GDAL, GEOS and the databases' extensions are.
    "spatialite": functools.partial(files, SPATIALITE),
    "postgis": functools.partial(server, PostgreSQLNode, POSTGIS),
}
