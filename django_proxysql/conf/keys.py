"""The keys of a DATABASES entry, and which fields of a config they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..core.config import BalancerConfig, PeerConfig, settings_of

ENGINE = "django_proxysql.backends.proxysql"
#: What takes the place of an alias's own ENGINE once it is known to be a peer's.
PEER_ALIAS_ENGINE = "django_proxysql.backends.peer"
DEFAULT_PEER_ENGINE = "django.db.backends.mysql"
NO_ENGINE = "django.db.backends.dummy"

#: The key under which a balancer's alias stands in its settings dict. A string:
#: Django copies, deep-copies and pickles that dict, and every wrapper made from
#: it must find the same circuits.
ALIAS_KEY = "LOAD_BALANCER"

#: The key under which the NAME that was first read stands there. Settings of a
#: process under test that are handed to another one, written out as Python,
#: have the test database's NAME, and that must not be taken for production's.
NAME_KEY = "LOAD_BALANCER_NAME"

#: What a connection is made with; a peer's own is laid over the balancer's.
CONNECTION_KEYS = ("NAME", "USER", "PASSWORD", "HOST", "PORT", "OPTIONS")

#: Settings that are fields of a config, and those.
PEER_FIELDS = {key: field.name for key, field in settings_of(PeerConfig).items()}
BALANCER_FIELDS = {key: field.name for key, field in settings_of(BalancerConfig).items()}
PEER_KEYS = (*PEER_FIELDS, "BREAKER", "PEER_NAME")
BALANCER_KEYS = (*BALANCER_FIELDS, "BREAKER", "CHECK_INTERVAL", "PEERS", "PEER_ENGINE")
DJANGO_KEYS = (
    "ATOMIC_REQUESTS",
    "AUTOCOMMIT",
    "CONN_HEALTH_CHECKS",
    "CONN_MAX_AGE",
    "DISABLE_SERVER_SIDE_CURSORS",
    "ENGINE",
    "TEST",
    "TIME_ZONE",
)


def is_balancer(entry: Mapping[str, Any]) -> bool:
    """Return whether an entry of DATABASES is a load balancer's."""
    engine = entry.get("ENGINE")
    # A user's subclass of the engine has a path of its own. Django's own engines read no PEERS.
    is_djangos = isinstance(engine, str) and engine.startswith("django.")
    return engine == ENGINE or ALIAS_KEY in entry or ("PEERS" in entry and not is_djangos)


def listed(peers: Any) -> list[Any]:
    # A bare string would be read as a list of its letters.
    return list(peers) if isinstance(peers, (list, tuple)) else []


def peers_of(
    entry: Mapping[str, Any], databases: Mapping[str, Any]
) -> Iterator[tuple[str | None, Any]]:
    """Yield the alias (None: it is inline) and the settings of each peer that has any."""
    for peer in listed(entry.get("PEERS")):
        alias = peer if isinstance(peer, str) else None
        settings = peer if alias is None else databases.get(alias)
        if isinstance(settings, Mapping):
            yield alias, settings
