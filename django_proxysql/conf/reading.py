"""Reads a balancer's entry: what is wrong with it, and what it says."""

from __future__ import annotations

import difflib
import functools
import inspect
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from django.core.exceptions import ImproperlyConfigured

from ..core import drivers
from ..core.config import BalancerConfig, BreakerConfig, PeerConfig
from ..core.exceptions import ConfigError
from ..core.ready import ready_check_from
from ..core.sharing import checked_url
from ..core.strategies import strategy_from
from .aliases import mirrored
from .engines import load_wrapper, peer_engine
from .keys import (
    ALIAS_KEY,
    BALANCER_FIELDS,
    BALANCER_KEYS,
    CONNECTION_KEYS,
    DJANGO_KEYS,
    NAME_KEY,
    NO_ENGINE,
    PEER_FIELDS,
    PEER_KEYS,
    is_balancer,
    listed,
)
from .merging import address, merged_settings

__all__ = ["Problem", "balancer_config", "problems"]

#: What a name may hold: it stands in logs, in metrics and on a command line.
_PEER_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:-]*", re.ASCII)
#: Packages whose backends take connections out of a pool that they keep by alias.
#: (Known before they connect. Of others it is found out where they do: backends.origins.)
_POOLS_BY_ALIAS = frozenset(
    {
        "dj_db_conn_pool",
        "django_db_geventpool",
        "django_mongodb_backend",
        "django_mysql_geventpool",
    }
)
#: The id of what a driver cannot take in one peer's settings.
_OF_ONE_PEER = "E018"

#: A host, and a port behind one colon; an IPv6 address has more of them, or brackets.
_HOST_AND_PORT = re.compile(r"(?:[^:\[\]/]+|\[[^\]/]*\]):\d+")


#: What is written in a settings file in place of a string.
_NO_TEXT = (int, float, list, tuple, dict, set)

#: What Django's engine for MySQL takes.
_ISOLATION_LEVELS = frozenset(
    ("read uncommitted", "read committed", "repeatable read", "serializable")
)


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with an entry of DATABASES."""

    #: The system check's id without its prefix: E… for errors, W… for warnings.
    id: str
    alias: str
    setting: str
    message: str
    hint: str

    @property
    def is_error(self) -> bool:
        """Whether the checks call it an error."""
        return self.id.startswith("E")

    @property
    def stops_connections(self) -> bool:
        """Whether no connection is made with it. One peer's typo does not stop the others."""
        return self.is_error and self.id != _OF_ONE_PEER

    def __str__(self) -> str:
        return f"DATABASES[{self.alias!r}]: {self.message} {self.hint}".rstrip()


def problems(
    alias: str, entry: Mapping[str, Any], databases: Mapping[str, Mapping[str, Any]]
) -> list[Problem]:
    """Return everything that is wrong with a balancer's entry, errors first."""
    found = list(_Reader(alias, entry, databases).problems())
    return sorted(found, key=lambda problem: not problem.is_error)


def balancer_config(
    alias: str, entry: Mapping[str, Any], databases: Mapping[str, Mapping[str, Any]]
) -> BalancerConfig:
    """Return what the entry tells its load balancer.

    :raises ImproperlyConfigured: the entry has an error; the message names the
        alias, the setting and a remedy.
    """
    for problem in problems(alias, entry, databases):
        if problem.stops_connections:
            raise ImproperlyConfigured(str(problem))
    return _Reader(alias, entry, databases).config()


class _Reader:
    """Reads one balancer's entry."""

    def __init__(
        self,
        alias: str,
        entry: Mapping[str, Any],
        databases: Mapping[str, Mapping[str, Any]],
    ) -> None:
        self.alias = alias
        self.entry = entry
        self.databases = databases
        self.peers = listed(entry.get("PEERS"))
        self.engine = peer_engine(entry, databases)

    # What is wrong

    def problems(self) -> Iterator[Problem]:
        yield from self._misspelt(self.alias, self.entry, BALANCER_KEYS)
        yield from self._misplaced()
        yield from self._values()
        yield from self._engine()
        yield from self._mirror()
        if not self.peers:
            # Never its value: that of a dict in place of a list has a password.
            value = self.entry.get("PEERS")
            empty = value is None or isinstance(value, (list, tuple))
            yield self._problem(
                "E001",
                "PEERS",
                "PEERS is empty." if empty else f"PEERS is a {type(value).__name__}.",
                "Give a list of at least one alias or dict, such as [{'HOST': '10.0.0.1'}].",
            )
        for position, peer in enumerate(self.peers):
            if isinstance(peer, str):
                yield from self._alias_peer(peer)
            elif isinstance(peer, Mapping):
                yield from self._inline_peer(position, peer)
            else:
                yield self._problem(
                    "E001",
                    "PEERS",
                    f"PEERS[{position}] is a {type(peer).__name__}.",
                    "Each peer is the alias of another entry, or a dict.",
                )
        yield from self._twice()
        yield from self._timeouts()
        yield from self._addresses()
        yield from self._shared_pools()

    def _problem(self, id_: str, setting: str, message: str, hint: str) -> Problem:
        return Problem(id_, self.alias, setting, message, hint)

    def _misspelt(
        self, where: str, entry: Mapping[str, Any], own: Iterable[str]
    ) -> Iterator[Problem]:
        known = {*own, *CONNECTION_KEYS, *DJANGO_KEYS, ALIAS_KEY, NAME_KEY}
        for key in entry:
            if not isinstance(key, str) or key in known:
                continue
            # Entries carry keys of other packages too: only what looks like
            # one of ours is taken for a slip. An inline peer is all ours.
            inline = where != self.alias and where not in self.databases
            close = difflib.get_close_matches(
                key.upper(), sorted(own), n=1, cutoff=0.7 if inline else 0.8
            ) or [name for name in sorted(own) if len(name) > 8 and name in key.upper()]
            at = "" if where == self.alias else f" of peer {where}"
            if close:
                yield self._problem(
                    "E006",
                    key,
                    f"{key}{at} is not a setting.",
                    f"Did you mean {close[0]}?",
                )
            elif key.lower() in ("fail_max", "success_threshold"):
                yield self._problem(
                    "E006",
                    key,
                    f"{key}{at} is not a setting.",
                    f'Give BREAKER: {{"{key.lower()}": …}}.',
                )
            elif inline and key not in BALANCER_KEYS:
                yield self._problem(
                    "W004",
                    key,
                    f"{key}{at} is not a setting, and has no effect.",
                    "Leave it out.",
                )

    def _misplaced(self) -> Iterator[Problem]:
        for key in ("WEIGHT", "PRIORITY", "PEER_NAME"):
            if key in self.entry:
                yield self._problem(
                    "W004",
                    key,
                    f"{key} is a peer's setting, and has no effect here.",
                    f"Move {key} into the peers.",
                )
        named = self._named()
        # Not NAME: the test database's is made from it.
        for key in ("HOST", "PORT", "USER", "PASSWORD"):
            own = self.entry.get(key)
            if own in ("", None) or not named:
                continue
            if all(peer.get(key) not in ("", None) for _, peer in named):
                yield self._problem(
                    "W004",
                    key,
                    f"{key} has no effect here: every peer has its own.",
                    f"Remove {key} here, or leave it out of the peers that are to have this one.",
                )
        for position, peer in enumerate(self.peers):
            if not isinstance(peer, Mapping):
                continue
            for key in peer:
                known = (*PEER_KEYS, *CONNECTION_KEYS, "ENGINE")
                if key in (*BALANCER_KEYS, *DJANGO_KEYS) and key not in known:
                    yield self._problem(
                        "W004",
                        key,
                        f"{key} of peer PEERS[{position}] has no effect there.",
                        f"Move {key} to {self.alias!r}.",
                    )

    def _values(self) -> Iterator[Problem]:
        entry = self.entry
        yield from self._numbers(entry, BALANCER_FIELDS, self._some_balancer)
        yield from self._numbers(entry, {"CHECK_INTERVAL": "check_interval"}, _some_peer)
        yield from self._caught("E005", lambda: _breaker(entry))
        yield from self._caught("E007", lambda: strategy_from(entry.get("STRATEGY", "random")))
        yield from self._caught("E008", lambda: ready_check_from(entry.get("READY_CHECK")))
        if entry.get("SHARED_STATE") is not None:
            yield from self._caught("E015", lambda: checked_url(entry["SHARED_STATE"]))
        yield from self._driver_options(self.alias, entry)
        age = entry.get("CONN_MAX_AGE", 0)
        if age is not None and not _is_number(age):
            yield self._problem(
                "E005",
                "CONN_MAX_AGE",
                f"CONN_MAX_AGE is {age!r}, not a number.",
                "Give seconds, 0 or None.",
            )

    def _numbers(
        self,
        entry: Mapping[str, Any],
        known: Mapping[str, str],
        config: Callable[..., object],
        where: str = "",
    ) -> Iterator[Problem]:
        for key, name in known.items():
            if key in entry:
                # Each by itself: all that is wrong is to be shown at once.
                reading = functools.partial(config, **{name: entry[key]})
                yield from self._caught("E005", reading, where)

    def _some_balancer(self, **given: Any) -> BalancerConfig:
        return BalancerConfig(self.alias, (PeerConfig("peer0"),), **given)

    def _engine(self) -> Iterator[Problem]:
        if is_balancer({"ENGINE": self.engine}):
            yield self._problem(
                "E003",
                "PEER_ENGINE",
                "PEER_ENGINE is a load balancer itself.",
                "Give the backend of the databases, such as 'django.db.backends.mysql'.",
            )
            return
        try:
            wrapper = load_wrapper(self.engine)
        except ConfigError as exc:
            setting = "PEER_ENGINE" if self.entry.get("PEER_ENGINE") else "ENGINE of the peers"
            yield self._problem(
                "E013",
                setting,
                f"{setting} {exc.problem}.",
                "Give the backend of the databases, and install its driver.",
            )
            return
        for cls in wrapper.__mro__:
            if cls.__module__.partition(".")[0] in _POOLS_BY_ALIAS:
                yield self._problem(
                    "E014",
                    "PEER_ENGINE",
                    f"PEER_ENGINE is {self.engine!r}, which keeps one pool for each alias: all "
                    "its connections would lead to one of the peers.",
                    "Give the backend that it builds on; CONN_MAX_AGE keeps connections, each to "
                    "its own peer.",
                )
                return

    def _mirror(self) -> Iterator[Problem]:
        target = mirrored(self.alias, self.databases)
        if target in self.databases or target == self.alias:
            return
        says = "leads back to where it began"
        yield self._problem(
            "W006",
            "TEST",
            f"TEST['MIRROR'] {says if target is None else f'leads to {target!r}, no alias'}.",
            "A test run is refused. Name the alias whose test database this one has.",
        )

    def _twice(self) -> Iterator[Problem]:
        aliases = [peer for peer in self.peers if isinstance(peer, str)]
        for alias in sorted({alias for alias in aliases if aliases.count(alias) > 1}):
            yield self._problem(
                "E011",
                "PEERS",
                f"PEERS names {alias!r} more than once.",
                "Name it once, and give it a WEIGHT.",
            )
        names = [name for peer in self.peers if (name := _given_name(peer)) is not None]
        for name in sorted({name for name in names if (aliases + names).count(name) > 1}):
            yield self._problem(
                "E011",
                "PEER_NAME",
                f"PEER_NAME {name!r} is not the only peer's of that name.",
                "Give each peer a name of its own.",
            )

    def _peer_name(self, where: str, peer: Mapping[str, Any]) -> Iterator[Problem]:
        given = peer.get("PEER_NAME")
        if given is not None and _given_name(peer) is None:
            yield self._problem(
                "E005",
                "PEER_NAME",
                f"PEER_NAME of peer {where} is {given!r}.",
                "Give a name of letters, digits and the marks _ . : -",
            )

    def _driver_options(self, where: str, entry: Mapping[str, Any]) -> Iterator[Problem]:
        of = "" if where == self.alias else f" of peer {where}"
        options = entry.get("OPTIONS")
        if options is not None and not isinstance(options, Mapping):
            yield self._problem(
                "E012",
                "OPTIONS",
                f"OPTIONS{of} is a {type(options).__name__}.",
                "Give a dict of what the driver's connect() takes.",
            )
        elif options and options.get("pool"):
            for message, hint in self._pool(options["pool"], of):
                yield self._problem("E014", "OPTIONS", message, hint)

    def _pool(self, pool: Any, of: str) -> Iterator[tuple[str, str]]:
        """Yield what is wrong with a pool in OPTIONS, and a remedy."""
        try:
            wrapper = load_wrapper(self.engine)
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
            if self.entry.get("CONN_MAX_AGE", 0) != 0:
                yield (
                    f"OPTIONS['pool']{of} and CONN_MAX_AGE keep connections, both of them.",
                    "Leave CONN_MAX_AGE out: a connection goes back to its pool when a request "
                    "ends.",
                )

    def _shared_pools(self) -> Iterator[Problem]:
        """Yield pools by name, a driver's own, that several peers would take connections from."""
        seen: dict[str, str] = {}
        for name, entry in self._named():
            pool = merged_settings(entry, self.entry, self.entry)["OPTIONS"].get("pool_name")
            if pool and seen.setdefault(str(pool), name) != name:
                yield self._problem(
                    "E014",
                    "OPTIONS",
                    f"OPTIONS['pool_name'] is {pool!r} for {seen[str(pool)]!r} and {name!r}: one "
                    "pool, whose connections all lead to one of them.",
                    "Give each peer a name of its own, or none.",
                )

    def _caught(self, id_: str, read: Callable[[], object], where: str = "") -> Iterator[Problem]:
        try:
            read()
        except ConfigError as exc:
            of = f" of peer {where}" if where else ""
            yield self._problem(id_, exc.setting, f"{exc.setting}{of} {exc.problem}.", exc.hint)

    def _alias_peer(self, peer: str) -> Iterator[Problem]:
        entry = self.databases.get(peer)
        if entry is None:
            close = difflib.get_close_matches(peer, list(self.databases), n=1)
            yield self._problem(
                "E002",
                "PEERS",
                f"PEERS names {peer!r}, which is no alias in DATABASES.",
                f"Did you mean {close[0]!r}?" if close else "Add it, or write the peer as a dict.",
            )
            return
        if is_balancer(entry):
            yield self._problem(
                "E003",
                "PEERS",
                f"PEERS names {peer!r}, which is a load balancer itself.",
                "Name the databases behind it instead.",
            )
            return
        engine = entry.get("ENGINE") or NO_ENGINE
        if engine != self.engine:
            yield self._problem(
                "E004",
                "PEERS",
                f"PEERS mixes engines: {peer!r} has the ENGINE {engine!r}, not {self.engine!r}.",
                "All peers of a load balancer have one engine.",
            )
        yield from self._misspelt(peer, entry, PEER_KEYS)
        yield from self._peer(peer, entry)
        if "PEER_NAME" in entry:
            yield self._problem(
                "W004",
                "PEER_NAME",
                f"PEER_NAME of peer {peer!r} has no effect: its alias is its name.",
                "Leave it out.",
            )
        for key, surprise in (
            ("ATOMIC_REQUESTS", "It opens a transaction on the peer itself for every request."),
            ("TEST", "A test database is made for the load balancer, by its own TEST."),
        ):
            value = entry.get(key)
            given = any(value.values()) if isinstance(value, Mapping) else value
            if key == "TEST" and isinstance(value, Mapping):
                # Django fills in the defaults of TEST, MIGRATE among them.
                given = any(v not in (None, True) for k, v in value.items() if k != "MIRROR")
                # The one whose test database the balancer has is made by its own.
                given = given and mirrored(self.alias, self.databases) != peer
            if given:
                yield self._problem(
                    "W002",
                    key,
                    f"Peer {peer!r} has {key}. {surprise}",
                    f"Move {key} to {self.alias!r}.",
                )

    def _inline_peer(self, position: int, peer: Mapping[str, Any]) -> Iterator[Problem]:
        name = f"PEERS[{position}]"
        yield from self._misspelt(name, peer, (*PEER_KEYS, *CONNECTION_KEYS))
        yield from self._peer_name(name, peer)
        engine = peer.get("ENGINE", self.engine)
        if engine != self.engine:
            yield self._problem(
                "E004",
                "PEERS",
                f"PEERS mixes engines: {name} has the ENGINE {engine!r}, not {self.engine!r}.",
                "All peers of a load balancer have one engine; set PEER_ENGINE for all.",
            )
        yield from self._peer(name, peer)

    def _peer(self, name: str, entry: Mapping[str, Any]) -> Iterator[Problem]:
        yield from self._numbers(entry, PEER_FIELDS, _some_peer, name)
        yield from self._caught("E005", lambda: _breaker(entry), name)
        yield from self._driver_options(name, entry)
        merged = merged_settings(entry, self.entry, self.entry)
        options = merged["OPTIONS"]
        for key, host in (("HOST", merged.get("HOST")), ("OPTIONS['host']", options.get("host"))):
            if "," in str(host or ""):
                yield self._problem(
                    "E009",
                    key,
                    f"{key} of peer {name} has a comma in it.",
                    "The driver would take it for a list of its own and go round the circuits: "
                    "make each host a peer.",
                )
        for setting, message, hint in self._not_for_the_driver(merged):
            yield self._problem(_OF_ONE_PEER, setting, f"{setting} of peer {name} {message}.", hint)
        yield from self._unknown_options(name, options)
        for key in ("connect_timeout", "connection_timeout"):
            given = options.get(key)
            bound = self._driver.connect_options
            if given is None or not bound({}, 1) or bound({key: given}, 1):
                # Not given, or none of this driver's.
                continue
            # libpq takes digits, as from an environment variable.
            if isinstance(given, str) and given.isdigit() and self._is_postgresql:
                given = int(given)
            if isinstance(given, bool) or not isinstance(given, int) or given < 1:
                yield self._problem(
                    "E010",
                    "OPTIONS",
                    f"OPTIONS[{key!r}] of peer {name} is {given!r}.",
                    "The driver takes whole seconds, at least 1.",
                )

    @functools.cached_property
    def _driver(self) -> drivers.Driver:
        """The driver of the peers' engine; a guess by its name if it cannot be loaded."""
        try:
            return drivers.driver_of_engine(load_wrapper(self.engine))
        except ConfigError:
            named = {"mysql": drivers.mysql, "postg": drivers.postgresql}
            known = (driver for name, driver in named.items() if name in self.engine)
            return next(known, drivers.generic)

    def _not_for_the_driver(self, merged: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
        """Yield the settings that the driver cannot take, what they are, and a remedy."""
        is_mysql = self._driver in (drivers.mysql, drivers.mysql_connector)
        if not (is_mysql or self._is_postgresql):
            # An engine whose settings we do not know.
            return
        options = merged["OPTIONS"]
        host = merged.get("HOST")
        takes = (str,) if is_mysql else (str, os.PathLike)
        if not isinstance(host, takes) and (is_mysql or host):
            yield "HOST", f"is a {type(host).__name__}", "Give the host's name as a string."
        for setting, value in (("HOST", host), ("OPTIONS['host']", options.get("host"))):
            if isinstance(value, str) and _HOST_AND_PORT.fullmatch(value.strip()):
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
                if value is not None and not _is_number(value):
                    yield f"OPTIONS[{option!r}]", f"is {value!r}", "Give seconds as a number."

    def _unknown_options(self, name: str, options: Mapping[str, Any]) -> Iterator[Problem]:
        """Yield keys of OPTIONS that the driver is not known to take."""
        known = self._driver.known_options()
        if known is None:
            return
        # Another package's engine may have options of its own: only what looks like a slip.
        is_djangos = self.engine.startswith("django.")
        for key in options:
            # Of pools more is said elsewhere.
            if not isinstance(key, str) or key in known or key.startswith("pool"):
                continue
            close = difflib.get_close_matches(key.lower(), sorted(known), n=1, cutoff=0.75)
            if close or is_djangos:
                yield self._problem(
                    "W008",
                    "OPTIONS",
                    f"OPTIONS[{key!r}] of peer {name} is none that the driver is known to take.",
                    f"Did you mean {close[0]!r}?"
                    if close
                    else "Leave it out, or see the driver's documentation.",
                )

    @property
    def _default_port(self) -> str:
        if self._is_postgresql:
            return "5432"
        return "3306" if self._driver in (drivers.mysql, drivers.mysql_connector) else ""

    @property
    def _is_postgresql(self) -> bool:
        return self._driver is drivers.postgresql

    def _timeouts(self) -> Iterator[Problem]:
        named = self._named()
        own = [merged_settings(entry, self.entry, self.entry)["OPTIONS"] for _name, entry in named]
        driver = self._driver
        if not any(driver.connect_options(given, 1) for given in own or [{}]):
            return
        for setting in ("CONNECT_TIMEOUT", "TRIAL_TIMEOUT"):
            seconds = self.entry.get(setting)
            if isinstance(seconds, bool) or not isinstance(seconds, (int, float)):
                continue
            if not 0 < seconds < math.inf:
                continue
            (taken,) = driver.connect_options({}, seconds).values()
            if taken != seconds:
                yield self._problem(
                    "W003",
                    setting,
                    f"{setting} is {seconds!r}, which the driver cannot take.",
                    f"It becomes {taken}: the driver takes whole seconds.",
                )

    def _addresses(self) -> Iterator[Problem]:
        seen: dict[Any, str] = {}
        for name, entry in self._named():
            settings = merged_settings(entry, self.entry, self.entry)
            options = settings["OPTIONS"]
            host = settings.get("HOST") or options.get("host") or options.get("unix_socket")
            port = settings.get("PORT") or options.get("port") or self._default_port
            where = (
                str(host or "").lower(),
                str(port),
                # Without a host these tell one server from another.
                *(("",) if host else (str(settings.get("NAME")), *_elsewhere(options))),
            )
            if seen.get(where, name) != name:
                yield self._problem(
                    "W001",
                    "PEERS",
                    f"PEERS has {seen[where]!r} and {name!r} at one address, {address(settings)}.",
                    "One failure will be met twice, and one server gets two shares.",
                )
            seen[where] = name

    # What it says

    def _named(self) -> list[tuple[str, Mapping[str, Any]]]:
        """Return each usable peer with its name: alias, PEER_NAME, or peer0, peer1 … by place."""
        taken = {peer if isinstance(peer, str) else _given_name(peer) for peer in self.peers}
        named: list[tuple[str, Mapping[str, Any]]] = []
        for position, peer in enumerate(self.peers):
            if isinstance(peer, str):
                if peer in self.databases:
                    named.append((peer, self.databases[peer]))
            elif isinstance(peer, Mapping):
                name = _given_name(peer)
                if name is None:
                    name = f"peer{position}"
                    while name in taken:
                        position += len(self.peers)
                        name = f"peer{position}"
                    taken.add(name)
                named.append((name, peer))
        return named

    def config(self) -> BalancerConfig:
        entry = self.entry
        return BalancerConfig(
            self.alias,
            tuple(self._peer_config(name, peer) for name, peer in self._named()),
            strategy=entry.get("STRATEGY", "random"),
            ready_check=entry.get("READY_CHECK"),
            shared_state=entry.get("SHARED_STATE"),
            **{name: entry[key] for key, name in BALANCER_FIELDS.items() if key in entry},
        )

    def _peer_config(self, name: str, peer: Mapping[str, Any]) -> PeerConfig:
        entry = self.entry
        given = {"CHECK_INTERVAL": entry["CHECK_INTERVAL"]} if "CHECK_INTERVAL" in entry else {}
        given.update(peer)
        return PeerConfig(
            name=name,
            address=address(merged_settings(peer, entry, entry)),
            breaker=_breaker(peer, over=_breaker(entry)),
            params={key: peer[key] for key in CONNECTION_KEYS if key in peer},
            **{field: given[key] for key, field in PEER_FIELDS.items() if key in given},
        )


def _given_name(peer: Any) -> str | None:
    """Return an inline peer's PEER_NAME, if it is one."""
    name = peer.get("PEER_NAME") if isinstance(peer, Mapping) else None
    return name if isinstance(name, str) and _PEER_NAME.fullmatch(name) else None


def _is_number(value: Any) -> bool:
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


def _some_peer(**given: Any) -> PeerConfig:
    return PeerConfig("peer0", **given)


def _breaker(entry: Mapping[str, Any], over: BreakerConfig | None = None) -> BreakerConfig:
    return BreakerConfig.of(entry.get("BREAKER"), over=over or BreakerConfig())


def _elsewhere(options: Mapping[str, Any]) -> Iterator[str]:
    """Yield what OPTIONS say of where an address is to be found."""
    for key in ("read_default_file", "read_default_group", "service", "hostaddr"):
        yield str(options.get(key) or "")
