"""What the driver cannot take in the peers' settings, and what it would take amiss."""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Mapping
from typing import Any

from ..core import config, drivers
from .entry import Entry, Peer, did_you_mean, of_peer
from .merging import address

#: What is written in a settings file in place of a string.
_NO_TEXT = (int, float, list, tuple, dict, set)

#: What Django's engine for MySQL takes.
_ISOLATION_LEVELS = frozenset(
    ("read uncommitted", "read committed", "repeatable read", "serializable")
)


def options(entry: Entry, where: str, settings: Mapping[str, Any]) -> None:
    """Note OPTIONS that are no dict, and a pool in them that does not work here."""
    given = settings.get("OPTIONS")
    if given is not None and not isinstance(given, Mapping):
        entry.add(
            "E012",
            f"OPTIONS{of_peer(where)} is a {type(given).__name__}.",
            "Give a dict of what the driver's connect() takes.",
        )
    elif given and given.get("pool"):
        _pool(entry, given["pool"], of_peer(where))


def _pool(entry: Entry, pool: Any, of: str) -> None:
    def refuse(problem: str, hint: str, within: str = "") -> None:
        entry.add("E014", f"OPTIONS['pool']{within}{of} {problem}.", hint)

    wrapper = entry.wrapper
    if wrapper is None:
        return
    if wrapper.vendor != "postgresql":
        refuse(
            "would keep connections to one peer for all of them",
            "Leave it out; CONN_MAX_AGE keeps connections, each to its own peer.",
        )
        return
    if not hasattr(wrapper, "close_pool"):
        refuse("is none of this Django's", "Leave it out: pools came with Django 5.1.")
        return
    if pool is True:
        pool = {}
    if not isinstance(pool, Mapping):
        refuse(
            f"is a {type(pool).__name__}",
            "Give True or a dict of what psycopg_pool.ConnectionPool takes: "
            "each peer has a pool of its own, made from that.",
        )
        return
    takes = _pool_takes()
    for key in pool:
        if key in ("conninfo", "kwargs", "configure", "open"):
            refuse(
                "would be the same for every peer",
                "Leave it out: what a peer's pool connects with is the peer's settings.",
                f"[{key!r}]",
            )
        elif takes and key not in takes:
            hint = did_you_mean(key, takes) or "Leave it out."
            refuse("is nothing that psycopg's pool takes", hint, f"[{key!r}]")
    check = pool.get("check")
    if check is not None and not callable(check):
        refuse(
            f"is a {type(check).__name__}",
            "Give a function that raises if the connection must not be used.",
            "['check']",
        )
    if entry.settings.get("CONN_MAX_AGE", 0) != 0:
        refuse(
            "and CONN_MAX_AGE keep connections, both of them",
            "Leave CONN_MAX_AGE out: a connection goes back to its pool when a request ends.",
        )


def _pool_takes() -> list[str]:
    """Return the names of what psycopg's pool takes; none where it is not installed."""
    try:
        from psycopg_pool import ConnectionPool
    except ImportError:
        return []
    return list(inspect.signature(ConnectionPool.__init__).parameters)


# One peer


def of_one_peer(entry: Entry, peer: Peer) -> None:
    """Note what the driver cannot take in a peer's settings, the balancer's below them."""
    merged, options, is_mysql = peer.merged, peer.merged["OPTIONS"], entry.is_mysql
    # Django before 4.1 fills in an entry's defaults later.
    hosts = {"HOST": merged.get("HOST", ""), "OPTIONS['host']": options.get("host")}
    for key, host in hosts.items():
        if "," in str(host or ""):
            entry.add(
                "E009",
                f"{key} of peer {peer.where} has a comma in it.",
                "The driver would take it for a list of its own and go round the circuits: "
                "make each host a peer.",
            )
        entry.read("E009", peer.where, config.host, key, host)
    # What is no host is a name: of a URL its scheme aside, for a path may look like the rest.
    entry.read("E009", peer.where, config.host, "NAME", str(merged.get("NAME")).partition("://")[2])
    # Of other engines the settings are not known.
    if is_mysql or entry.is_postgresql:
        _not_for_the_driver(entry, peer, hosts)
    _unknown_options(entry, peer)
    for key in ("connect_timeout", "connection_timeout"):
        given = options.get(key)
        bound = entry.driver.connect_options
        if given is None or not bound({}, 1) or bound({key: given}, 1):
            # Not given, or none of this driver's.
            continue
        # libpq takes digits, as from an environment variable.
        if isinstance(given, str) and given.isdigit() and entry.is_postgresql:
            given = int(given)
        if isinstance(given, bool) or not isinstance(given, int) or given < 1:
            entry.add(
                "E010",
                f"OPTIONS[{key!r}] of peer {peer.where} is {given!r}.",
                "The driver takes whole seconds, at least 1.",
            )


def _not_for_the_driver(entry: Entry, peer: Peer, hosts: Mapping[str, Any]) -> None:
    def refuse(setting: str, problem: str, hint: str) -> None:
        entry.add("E018", f"{setting} of peer {peer.where} {problem}.", hint)

    merged, options, is_mysql = peer.merged, peer.merged["OPTIONS"], entry.is_mysql
    host = hosts["HOST"]
    if not isinstance(host, str if is_mysql else (str, os.PathLike)) and (is_mysql or host):
        refuse("HOST", f"is a {type(host).__name__}", "Give the host's name as a string.")
    for setting, value in hosts.items():
        if isinstance(value, str) and config.host_and_port(value.strip())[1] is not None:
            refuse(setting, f"is {value!r}, with a port in it", "Move the port into PORT.")
    for setting, value, or_text in (
        ("PORT", merged.get("PORT"), True),
        ("OPTIONS['port']", options.get("port"), not is_mysql),
    ):
        if value and not _is_port(value, or_text):
            refuse(setting, f"is {value!r}", "Give a number from 1 to 65535.")
    for setting in ("USER", "PASSWORD", "NAME") if is_mysql else ("NAME",):
        value = merged.get(setting)
        if value and isinstance(value, _NO_TEXT):
            # Never its value.
            refuse(setting, f"is a {type(value).__name__}", "Put it in quotes: a string.")
    level = options.get("isolation_level")
    if level and not _is_isolation_level(level, is_mysql):
        refuse(
            "OPTIONS['isolation_level']",
            f"is {level!r}",
            "Give 'read committed' or another of MySQL's levels."
            if is_mysql
            else "Give one of psycopg.IsolationLevel.",
        )
    for option in ("read_timeout", "write_timeout") if is_mysql else ():
        value = options.get(option)
        if value is not None and not is_number(value):
            refuse(f"OPTIONS[{option!r}]", f"is {value!r}", "Give seconds as a number.")


def _unknown_options(entry: Entry, peer: Peer) -> None:
    """Note keys of OPTIONS that the driver is not known to take."""
    known = entry.driver.OPTIONS
    if known is None:
        return
    # Another package's engine may have options of its own: only what looks like a slip.
    is_djangos = entry.engine.startswith("django.")
    for key in peer.merged["OPTIONS"]:
        # Of pools more is said elsewhere.
        if not isinstance(key, str) or key in known or key.startswith("pool"):
            continue
        hint = did_you_mean(key.lower(), sorted(known), 0.75)
        if hint or is_djangos:
            entry.add(
                "W008",
                f"OPTIONS[{key!r}] of peer {peer.where} is none that the driver is known to take.",
                hint or "Leave it out, or see the driver's documentation.",
            )


# All peers


def shared_pools(entry: Entry) -> None:
    """Note pools by name, a driver's own, that several peers would take connections from."""
    seen: dict[str, str] = {}
    for peer in entry.peers:
        pool = peer.merged["OPTIONS"].get("pool_name")
        if pool and seen.setdefault(str(pool), peer.name) != peer.name:
            entry.add(
                "E014",
                f"OPTIONS['pool_name'] is {pool!r} for {seen[str(pool)]!r} and {peer.name!r}: one "
                "pool, whose connections all lead to one of them.",
                "Give each peer a name of its own, or none.",
            )


def ready_check(entry: Entry) -> None:
    """Note a check of ours that the peers' servers have no answer to."""
    name = entry.settings.get("READY_CHECK")
    is_known = entry.is_mysql or (name == "writable" and entry.is_postgresql)
    # Of another driver nothing is known.
    if name in ("galera", "writable") and not is_known and entry.driver is not drivers.generic:
        servers = "MySQL and MariaDB" if name == "galera" else "MySQL, MariaDB and PostgreSQL"
        entry.add(
            "E008",
            f"READY_CHECK is {name!r}, which is not for {entry.engine!r}.",
            f"Leave it out, or write a check of your own: it is for {servers}.",
        )


def tokens(entry: Entry) -> None:
    """Note where COMMIT_OUTCOME has no effect, or costs more than it need."""
    if entry.settings.get("COMMIT_OUTCOME") is None or entry.wrapper is None:
        return
    if not entry.driver.WATCHED:
        entry.add(
            "W009",
            f"COMMIT_OUTCOME has no effect with {entry.engine!r}.",
            "Leave it out: it is for mysqlclient, PyMySQL, psycopg and psycopg2.",
        )
        return
    for peer in entry.peers:
        if not entry.driver.takes_two(peer.merged["OPTIONS"]):
            entry.add(
                "W009",
                f"OPTIONS['multi_statements'] of peer {peer.name} is off: COMMIT_OUTCOME takes a "
                "round trip more for each transaction that writes.",
                "Leave it out: then a token is sent in the packet of COMMIT.",
            )


def timeouts(entry: Entry) -> None:
    """Note timeouts that the driver rounds."""
    driver = entry.driver
    own = [peer.merged["OPTIONS"] for peer in entry.peers] or [{}]
    if not any(driver.connect_options(given, 1) for given in own):
        return
    for setting in ("CONNECT_TIMEOUT", "TRIAL_TIMEOUT"):
        seconds: Any = entry.settings.get(setting)
        if not is_number(seconds) or not 0 < seconds < math.inf:
            continue
        (taken,) = driver.connect_options({}, seconds).values()
        if taken != seconds:
            entry.add(
                "W003",
                f"{setting} is {seconds!r}, which the driver cannot take.",
                f"It becomes {taken}: the driver takes whole seconds.",
            )


def one_address(entry: Entry) -> None:
    """Note peers that lead to one server."""
    # An address may have a password in it, then.
    is_quoted = not any(problem.id == "django_proxysql.E009" for problem in entry.problems)
    seen: dict[Any, str] = {}
    default_port = "5432" if entry.is_postgresql else "3306" if entry.is_mysql else ""
    for peer in entry.peers:
        settings, options = peer.merged, peer.merged["OPTIONS"]
        host = settings.get("HOST") or options.get("host") or options.get("unix_socket")
        port = settings.get("PORT") or options.get("port") or default_port
        where = [str(host or "").lower(), str(port)]
        if not host:
            # What else tells one server from another.
            where.append(str(settings.get("NAME")))
            for key in ("read_default_file", "read_default_group", "service", "hostaddr"):
                where.append(str(options.get(key) or ""))
        first = seen.get(tuple(where), peer.name)
        if first != peer.name:
            entry.add(
                "W001",
                f"PEERS has {first!r} and {peer.name!r} at one address"
                + (f", {address(settings)}." if is_quoted else "."),
                "One failure will be met twice, and one server gets two shares.",
            )
        seen[tuple(where)] = peer.name


# One value


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == value


def _is_isolation_level(value: Any, is_mysql: bool) -> bool:
    if is_mysql:
        return isinstance(value, str) and value.lower() in _ISOLATION_LEVELS
    # psycopg's enumeration, and psycopg2's numbers.
    return isinstance(value, int) and 1 <= value <= 4


def _is_port(value: Any, or_text: bool) -> bool:
    """Return whether a driver takes it for a port; digits in a text only where ``or_text``."""
    if or_text and isinstance(value, str):
        try:
            value = int(value)
        except ValueError:
            return False
    return type(value) is int and 0 < value < 65536
