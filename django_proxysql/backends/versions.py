"""Are the peers' servers equals? Asked by ``check --database``, of those that can be reached."""

from __future__ import annotations

from typing import Any

from django.core.checks import Warning

from ..conf import ALIAS_KEY
from ..registry import balancers


def different_versions(connection: Any) -> list[Any]:
    """Return a warning if the peers are not all of one kind and version.

    Each peer whose circuit is closed is connected to as by any other caller:
    one that is down or hangs costs one attempt, opens its circuit, and is
    passed by. All together take no longer than ``CONNECT_DEADLINE``, give or
    take one attempt.

    :param connection: a balancer's wrapper.
    """
    alias = connection.settings_dict.get(ALIAS_KEY)
    if alias is None or connection.vendor not in ("mysql", "postgresql", "oracle"):
        return []
    try:
        balancer = balancers.registered(alias).balancer
    except Exception:
        # The settings' own messages say what is wrong.
        return []
    until = balancer.clock() + balancer.config.connect_deadline
    found: dict[str, list[str]] = {}
    for peer in balancer.peers.values():
        if balancer.clock() >= until or not peer.is_available:
            continue
        other = _another(connection)
        try:
            with balancer.pinned(peer):
                other.ensure_connection()
                if other.peer is peer:
                    found.setdefault(_server(other), []).append(peer.name)
        except Exception:  # noqa: S110 - its own trouble, which its users will see
            pass
        finally:
            other.close()
    if len(found) < 2:
        return []
    servers = "; ".join(f"{', '.join(names)}: {server}" for server, names in found.items())
    return [
        Warning(
            f"DATABASES[{alias!r}]: the peers are different servers ({servers}).",
            hint="Django asks the first that it meets what SQL to write for all of them. "
            "Give all peers one version.",
            id="django_proxysql.W005",
        )
    ]


def _another(connection: Any) -> Any:
    """Return a wrapper of its own, for one keeps what the first server told it.

    Not ``copy()``, which deep-copies the settings: a PASSWORD that is a method of
    an object that holds a lock cannot be.
    """
    return type(connection)(connection.settings_dict, connection.alias)


def _server(connection: Any) -> str:
    """Return what is behind a connection, as precisely as Django tells servers apart."""
    if connection.vendor == "mysql":
        name = "MariaDB" if connection.mysql_is_mariadb else "MySQL"
        return "{} {}.{}".format(name, *connection.mysql_version)
    if connection.vendor == "postgresql":
        return f"PostgreSQL {connection.pg_version // 10000}"
    return f"Oracle {connection.oracle_version[0]}"
