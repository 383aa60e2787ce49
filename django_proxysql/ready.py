"""READY_CHECK: is a peer that accepts connections able to do its work?

A check is called with the driver's own connection right after connecting and
raises :class:`NotReady` if the peer must not be used.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from . import drivers
from .exceptions import ConfigError, NotReady
from .strategies import imported

__all__ = ["QUESTIONS", "Check", "catch_up", "galera", "ready_check_from", "rows", "writable"]

Check = Callable[[Any], object]


def galera(connection: Any) -> None:
    """Raise :class:`NotReady` unless the node is a usable member of its cluster.

    A node that has lost its cluster goes on accepting connections and answers
    ``ping`` and ``SELECT 1``; only its own ``wsrep_*`` status tells. Galera's
    documentation: ready ON, component Primary, state 4 (Synced), and neither
    ``wsrep_reject_queries`` nor ``wsrep_desync`` set by an operator.
    """
    status = _pairs(
        connection,
        "SHOW GLOBAL STATUS WHERE Variable_name IN "
        "('wsrep_ready', 'wsrep_cluster_status', 'wsrep_local_state', 'wsrep_local_state_comment')",
    )
    if not status:
        raise NotReady("the server is not a Galera node: it has no wsrep status")
    if status.get("wsrep_ready") != "ON":
        raise NotReady("wsrep_ready is OFF")
    if status.get("wsrep_cluster_status") != "Primary":
        raise NotReady(f"wsrep_cluster_status is {status.get('wsrep_cluster_status')}")
    if status.get("wsrep_local_state") != "4":
        raise NotReady(f"wsrep_local_state is {status.get('wsrep_local_state_comment')}")
    settings = _pairs(
        connection,
        "SHOW GLOBAL VARIABLES WHERE Variable_name IN ('wsrep_reject_queries', 'wsrep_desync')",
    )
    if settings.get("wsrep_reject_queries", "NONE") != "NONE":
        raise NotReady(f"wsrep_reject_queries is {settings['wsrep_reject_queries']}")
    if settings.get("wsrep_desync", "OFF") != "OFF":
        raise NotReady("wsrep_desync is ON")


def writable(connection: Any) -> None:
    """Raise :class:`NotReady` if the server takes no writes (MySQL family, PostgreSQL)."""
    if drivers.postgresql.owns(connection):
        recovering, read_only = rows(
            connection,
            "SELECT pg_is_in_recovery(), current_setting('default_transaction_read_only')",
        )[0]
        if recovering:
            raise NotReady("the server is in recovery (a standby)")
        if read_only == "on":
            raise NotReady("default_transaction_read_only is on")
        return
    # MySQL's super_read_only implies read_only. MariaDB 12 names levels.
    (value,) = rows(connection, "SELECT @@global.read_only")[0]
    if str(value).upper() not in ("0", "OFF"):
        raise NotReady(f"@@global.read_only is {value}")


def backend(connection: Any) -> None:
    """Ask what a proxy cannot answer by itself: a statement that reaches its backend.

    ProxySQL answers pings, USE and SET whatever its backends do.
    """
    cursor = connection.cursor()
    try:
        cursor.execute("DO 1")
    finally:
        cursor.close()


#: What a circuit that a statement has opened makes its trials ask.
QUESTIONS: dict[str, Check] = {"galera": galera, "writable": writable, "backend": backend}


def catch_up(connection: Any) -> None:
    """Have a Galera node apply all that the cluster has committed; others are left alone.

    Galera's documentation of ``wsrep_sync_wait``: with 1, a read waits for it.
    """
    names = "('wsrep_on', 'wsrep_sync_wait')"
    session = _pairs(connection, f"SHOW SESSION VARIABLES WHERE Variable_name IN {names}")
    if session.get("wsrep_on") != "ON":
        return
    before = int(session.get("wsrep_sync_wait", "0"))
    cursor = connection.cursor()
    try:
        cursor.execute("SET SESSION wsrep_sync_wait = 1")
        cursor.execute("SELECT 1")
        cursor.fetchall()
        cursor.execute(f"SET SESSION wsrep_sync_wait = {before:d}")
    finally:
        cursor.close()


_BY_NAME: dict[str, Check] = {"galera": galera, "writable": writable}


def ready_check_from(setting: Any) -> Check | None:
    """Return the check that the READY_CHECK setting names.

    :raises ConfigError: it names none.
    """
    if isinstance(setting, str):
        setting = _BY_NAME.get(setting) or imported("READY_CHECK", setting, known=_BY_NAME)
    if setting is not None and not callable(setting):
        raise ConfigError(
            "READY_CHECK",
            f"is {setting!r}, which cannot be called",
            "Give 'galera', 'writable', or a dotted path to a function.",
        )
    return setting  # type: ignore[no-any-return]


def rows(connection: Any, statement: str) -> list[Any]:
    """Return what a statement returns on a driver's own connection."""
    cursor = connection.cursor()
    try:
        cursor.execute(statement)
        return list(cursor.fetchall())
    finally:
        cursor.close()


def _pairs(connection: Any, statement: str) -> dict[str, str]:
    return {str(name): str(value) for name, value in rows(connection, statement)}
