"""What the driver cannot take in the peers' settings, and what it would take amiss."""

from __future__ import annotations

import difflib
import inspect
import math
import os
from collections.abc import Iterator, Mapping
from typing import Any

from ..core.config import host_and_port
from ..core.exceptions import ConfigError
from .engines import load_wrapper
from .entry import Entry, Problem
from .merging import address

#: What is written in a settings file in place of a string.
_NO_TEXT = (int, float, list, tuple, dict, set)

#: What Django's engine for MySQL takes.
_ISOLATION_LEVELS = frozenset(
    ("read uncommitted", "read committed", "repeatable read", "serializable")
)


def options(entry: Entry, where: str, settings: Mapping[str, Any]) -> Iterator[Problem]:
    of = "" if where == entry.alias else f" of peer {where}"
    given = settings.get("OPTIONS")
    if given is not None and not isinstance(given, Mapping):
        yield entry.problem(
            "E012",
            "OPTIONS",
            f"OPTIONS{of} is a {type(given).__name__}.",
            "Give a dict of what the driver's connect() takes.",
        )
    elif given and given.get("pool"):
        for message, hint in _pool(entry, given["pool"], of):
            yield entry.problem("E014", "OPTIONS", message, hint)


def _pool(entry: Entry, pool: Any, of: str) -> Iterator[tuple[str, str]]:
    """Yield what is wrong with a pool in OPTIONS, and a remedy."""
    try:
        wrapper = load_wrapper(entry.engine)
    except ConfigError:
        # Has been said.
        return
    if wrapper.vendor != "postgresql":
        yield (
            f"OPTIONS['pool']{of} would keep connections to one peer for all of them.",
            "Leave it out; CONN_MAX_AGE keeps connections, each to its own peer.",
        )
    elif not hasattr(wrapper, "close_pool"):
        yield (
            f"OPTIONS['pool']{of} is none of this Django's.",
            "Leave it out: pools came with Django 5.1.",
        )
    elif pool is not True and not isinstance(pool, Mapping):
        yield (
            f"OPTIONS['pool']{of} is a {type(pool).__name__}.",
            "Give True or a dict of what psycopg_pool.ConnectionPool takes: "
            "each peer has a pool of its own, made from that.",
        )
    else:
        known = () if pool is True else pool
        for key in ("conninfo", "kwargs", "configure", "open"):
            if key in known:
                yield (
                    f"OPTIONS['pool']['{key}']{of} would be the same for every peer.",
                    "Leave it out: what a peer's pool connects with is the peer's settings.",
                )
        takes = _pool_takes()
        for key in known:
            if takes and key not in takes:
                close = difflib.get_close_matches(str(key), takes, n=1)
                yield (
                    f"OPTIONS['pool'][{key!r}]{of} is nothing that psycopg's pool takes.",
                    f"Did you mean {close[0]!r}?" if close else "Leave it out.",
                )
        check = None if pool is True else pool.get("check")
        if check is not None and not callable(check):
            yield (
                f"OPTIONS['pool']['check']{of} is a {type(check).__name__}.",
                "Give a function that raises if the connection must not be used.",
            )
        if entry.settings.get("CONN_MAX_AGE", 0) != 0:
            yield (
                f"OPTIONS['pool']{of} and CONN_MAX_AGE keep connections, both of them.",
                "Leave CONN_MAX_AGE out: a connection goes back to its pool when a request ends.",
            )


def shared_pools(entry: Entry) -> Iterator[Problem]:
    """Yield pools by name, a driver's own, that several peers would take connections from."""
    seen: dict[str, str] = {}
    for name, peer in entry.named:
        pool = entry.merged(peer)["OPTIONS"].get("pool_name")
        if pool and seen.setdefault(str(pool), name) != name:
            yield entry.problem(
                "E014",
                "OPTIONS",
                f"OPTIONS['pool_name'] is {pool!r} for {seen[str(pool)]!r} and {name!r}: one "
                "pool, whose connections all lead to one of them.",
                "Give each peer a name of its own, or none.",
            )


def tokens(entry: Entry) -> Iterator[Problem]:
    """Yield where COMMIT_OUTCOME has no effect, or costs more than it need."""
    if entry.settings.get("COMMIT_OUTCOME") is None:
        return
    if not entry.driver.WATCHED:
        yield entry.problem(
            "W009",
            "COMMIT_OUTCOME",
            f"COMMIT_OUTCOME has no effect with {entry.engine!r}.",
            "Leave it out: it is for mysqlclient, PyMySQL, psycopg and psycopg2.",
        )
        return
    for name, peer in entry.named:
        if not entry.driver.takes_two(entry.merged(peer)["OPTIONS"]):
            yield entry.problem(
                "W009",
                "OPTIONS",
                f"OPTIONS['multi_statements'] of peer {name} is off: COMMIT_OUTCOME takes a round "
                "trip more for each transaction that writes.",
                "Leave it out: then a token is sent in the packet of COMMIT.",
            )


def of_peer(entry: Entry, name: str, peer: Mapping[str, Any]) -> Iterator[Problem]:
    """Yield what the driver cannot take in a peer's settings, the balancer's below them."""
    merged = entry.merged(peer)
    options = merged["OPTIONS"]
    for key, host in (("HOST", merged.get("HOST")), ("OPTIONS['host']", options.get("host"))):
        if "," in str(host or ""):
            yield entry.problem(
                "E009",
                key,
                f"{key} of peer {name} has a comma in it.",
                "The driver would take it for a list of its own and go round the circuits: "
                "make each host a peer.",
            )
    for setting, message, hint in _not_for_the_driver(entry, merged):
        yield entry.problem("E018", setting, f"{setting} of peer {name} {message}.", hint)
    yield from _unknown_options(entry, name, options)
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
            yield entry.problem(
                "E010",
                "OPTIONS",
                f"OPTIONS[{key!r}] of peer {name} is {given!r}.",
                "The driver takes whole seconds, at least 1.",
            )


def _not_for_the_driver(entry: Entry, merged: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Yield the settings that the driver cannot take, what they are, and a remedy."""
    is_mysql = entry.is_mysql
    if not (is_mysql or entry.is_postgresql):
        # An engine whose settings we do not know.
        return
    options = merged["OPTIONS"]
    host = merged.get("HOST")
    takes = (str,) if is_mysql else (str, os.PathLike)
    if not isinstance(host, takes) and (is_mysql or host):
        yield "HOST", f"is a {type(host).__name__}", "Give the host's name as a string."
    for setting, value in (("HOST", host), ("OPTIONS['host']", options.get("host"))):
        if isinstance(value, str) and host_and_port(value.strip())[1] is not None:
            yield setting, f"is {value!r}, with a port in it", "Move the port into PORT."
    for setting, value in (
        ("PORT", merged.get("PORT")),
        ("OPTIONS['port']", options.get("port")),
    ):
        if value and not _is_port(value, or_text=setting == "PORT" or not is_mysql):
            yield setting, f"is {value!r}", "Give a number from 1 to 65535."
    for setting in ("USER", "PASSWORD", "NAME"):
        value = merged.get(setting)
        if (is_mysql or setting == "NAME") and value and isinstance(value, _NO_TEXT):
            # Never its value.
            yield setting, f"is a {type(value).__name__}", "Put it in quotes: a string."
    level = options.get("isolation_level")
    if level and not _is_isolation_level(level, is_mysql):
        yield (
            "OPTIONS['isolation_level']",
            f"is {level!r}",
            "Give 'read committed' or another of MySQL's levels."
            if is_mysql
            else "Give one of psycopg.IsolationLevel.",
        )
    if is_mysql:
        for option in ("read_timeout", "write_timeout"):
            value = options.get(option)
            if value is not None and not is_number(value):
                yield f"OPTIONS[{option!r}]", f"is {value!r}", "Give seconds as a number."


def _unknown_options(entry: Entry, name: str, options: Mapping[str, Any]) -> Iterator[Problem]:
    """Yield keys of OPTIONS that the driver is not known to take."""
    known = entry.driver.known_options()
    if known is None:
        return
    # Another package's engine may have options of its own: only what looks like a slip.
    is_djangos = entry.engine.startswith("django.")
    for key in options:
        # Of pools more is said elsewhere.
        if not isinstance(key, str) or key in known or key.startswith("pool"):
            continue
        close = difflib.get_close_matches(key.lower(), sorted(known), n=1, cutoff=0.75)
        if close or is_djangos:
            yield entry.problem(
                "W008",
                "OPTIONS",
                f"OPTIONS[{key!r}] of peer {name} is none that the driver is known to take.",
                f"Did you mean {close[0]!r}?"
                if close
                else "Leave it out, or see the driver's documentation.",
            )


def timeouts(entry: Entry) -> Iterator[Problem]:
    own = [entry.merged(peer)["OPTIONS"] for _name, peer in entry.named]
    driver = entry.driver
    if not any(driver.connect_options(given, 1) for given in own or [{}]):
        return
    for setting in ("CONNECT_TIMEOUT", "TRIAL_TIMEOUT"):
        seconds = entry.settings.get(setting)
        if isinstance(seconds, bool) or not isinstance(seconds, (int, float)):
            continue
        if not 0 < seconds < math.inf:
            continue
        (taken,) = driver.connect_options({}, seconds).values()
        if taken != seconds:
            yield entry.problem(
                "W003",
                setting,
                f"{setting} is {seconds!r}, which the driver cannot take.",
                f"It becomes {taken}: the driver takes whole seconds.",
            )


def one_address(entry: Entry) -> Iterator[Problem]:
    seen: dict[Any, str] = {}
    default_port = "5432" if entry.is_postgresql else "3306" if entry.is_mysql else ""
    for name, peer in entry.named:
        settings = entry.merged(peer)
        options = settings["OPTIONS"]
        host = settings.get("HOST") or options.get("host") or options.get("unix_socket")
        port = settings.get("PORT") or options.get("port") or default_port
        where = (
            str(host or "").lower(),
            str(port),
            # Without a host these tell one server from another.
            *(("",) if host else (str(settings.get("NAME")), *_elsewhere(options))),
        )
        if seen.get(where, name) != name:
            yield entry.problem(
                "W001",
                "PEERS",
                f"PEERS has {seen[where]!r} and {name!r} at one address, {address(settings)}.",
                "One failure will be met twice, and one server gets two shares.",
            )
        seen[where] = name


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == value


def _is_isolation_level(value: Any, is_mysql: bool) -> bool:
    if is_mysql:
        return isinstance(value, str) and value.lower() in _ISOLATION_LEVELS
    # psycopg's enumeration, and psycopg2's numbers.
    return isinstance(value, int) and 1 <= value <= 4


def _is_port(value: Any, or_text: bool) -> bool:
    """Return whether a driver takes it for a port.

    :param or_text: digits will do, as from an environment variable.
    """
    if or_text and isinstance(value, str):
        try:
            value = int(value)
        except ValueError:
            return False
    return type(value) is int and 0 < value < 65536


def _pool_takes() -> list[str]:
    """Return the names of what psycopg's pool takes; none where it is not installed."""
    try:
        from psycopg_pool import ConnectionPool
    except ImportError:
        return []
    return list(inspect.signature(ConnectionPool.__init__).parameters)


def _elsewhere(options: Mapping[str, Any]) -> Iterator[str]:
    """Yield what OPTIONS say of where an address is to be found."""
    for key in ("read_default_file", "read_default_group", "service", "hostaddr"):
        yield str(options.get(key) or "")
