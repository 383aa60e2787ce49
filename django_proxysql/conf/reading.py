"""Reads a balancer's entry in one pass: the config it makes, and all that is wrong with it.

A value that breaks a rule of :mod:`..core.config` is a problem; the others are the config's.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from django.core.checks import CheckMessage, Error, Warning
from django.core.exceptions import ImproperlyConfigured
from django.db import connections

from ..core.config import BalancerConfig, BreakerConfig, PeerConfig, check_field
from ..core.exceptions import ConfigError
from ..core.ready import ready_check_from
from ..core.strategies import strategy_from
from . import driver_settings
from .aliases import mirrored
from .engines import load_wrapper
from .entry import Entry, Problem, given_name
from .keys import (
    BALANCER_FIELDS,
    BALANCER_KEYS,
    CONNECTION_KEYS,
    NO_ENGINE,
    PEER_FIELDS,
    PEER_KEYS,
    is_balancer,
)
from .merging import address
from .spelling import misplaced, misspelt, named_twice

#: Packages whose backends take connections out of a pool that they keep by alias. These are
#: known before they connect. Of others backends.origins finds it out when they connect.
_POOLS_BY_ALIAS = frozenset(
    {
        "dj_db_conn_pool",
        "django_db_geventpool",
        "django_mongodb_backend",
        "django_mysql_geventpool",
    }
)


class Reading(NamedTuple):
    """What an entry says."""

    #: None: it has a problem that stops connections.
    config: BalancerConfig | None
    #: Errors first.
    problems: list[Problem]


def read(
    alias: str, settings: Mapping[str, Any], databases: Mapping[str, Mapping[str, Any]]
) -> Reading:
    """Return what a balancer's entry says, and everything that is wrong with it."""
    return _Reader(Entry(alias, settings, databases)).read()


def problems(
    alias: str, settings: Mapping[str, Any], databases: Mapping[str, Mapping[str, Any]]
) -> list[Problem]:
    """Return everything that is wrong with a balancer's entry, errors first."""
    return read(alias, settings, databases).problems


def balancer_config(
    alias: str, settings: Mapping[str, Any], databases: Mapping[str, Mapping[str, Any]]
) -> BalancerConfig:
    """Return the config that an entry makes.

    :raises ImproperlyConfigured: the entry has an error; the message names the
        alias, the setting and a remedy.
    """
    config, found = read(alias, settings, databases)
    if config is None:
        raise ImproperlyConfigured(str(next(one for one in found if one.stops_connections)))
    return config


def messages(alias: str) -> list[CheckMessage]:
    """Return the messages for one alias of DATABASES; none if it is no balancer."""
    databases = connections.databases
    entry = databases.get(alias, {})
    if not is_balancer(entry):
        return []
    return [
        (Error if problem.is_error else Warning)(
            f"DATABASES[{alias!r}]: {problem.message}",
            hint=problem.hint,
            id=f"django_proxysql.{problem.id}",
        )
        for problem in problems(alias, entry, databases)
    ]


class _Reader:
    """One pass over one entry."""

    def __init__(self, entry: Entry) -> None:
        self._entry = entry
        self._found: list[Problem] = []
        self._breaker = BreakerConfig()

    def read(self) -> Reading:
        entry = self._entry
        self._found += misspelt(entry, entry.alias, entry.settings, BALANCER_KEYS)
        self._found += misplaced(entry)
        given = self._balancer()
        self._found += _engine(entry)
        self._found += _mirror(entry)
        peers = self._peers()
        for rule in (
            named_twice,
            driver_settings.timeouts,
            driver_settings.one_address,
            driver_settings.shared_pools,
            driver_settings.tokens,
        ):
            self._found += rule(entry)
        self._found.sort(key=lambda problem: not problem.is_error)
        if any(problem.stops_connections for problem in self._found):
            return Reading(None, self._found)
        return Reading(BalancerConfig(entry.alias, peers, **given), self._found)

    def _balancer(self) -> dict[str, Any]:
        """Return the fields that the balancer's own settings give."""
        entry, settings = self._entry, self._entry.settings
        given = self._fields(BALANCER_FIELDS, settings, BalancerConfig)
        self._fields({"CHECK_INTERVAL": "check_interval"}, settings, PeerConfig)
        self._breaker = self._thresholds(settings, BreakerConfig())
        for id_, key, checked in (
            ("E007", "STRATEGY", strategy_from),
            ("E008", "READY_CHECK", ready_check_from),
            ("E015", "SHARED_STATE", _redis_url),
        ):
            value = settings.get(key)
            if value is not None or (key == "STRATEGY" and key in settings):
                given[key.lower()] = value
                self._checked(id_, lambda check=checked, value=value: check(value))  # type: ignore[misc]
        self._found += driver_settings.options(entry, entry.alias, settings)
        age = settings.get("CONN_MAX_AGE", 0)
        if age is not None and not driver_settings.is_number(age):
            self._add(
                "E005",
                "CONN_MAX_AGE",
                f"CONN_MAX_AGE is {age!r}, not a number.",
                "Give seconds, 0 or None.",
            )
        return given

    def _peers(self) -> tuple[PeerConfig, ...]:
        entry = self._entry
        if not entry.peers:
            # Never its value: that of a dict in place of a list has a password.
            value = entry.settings.get("PEERS")
            empty = value is None or isinstance(value, (list, tuple))
            self._add(
                "E001",
                "PEERS",
                "PEERS is empty." if empty else f"PEERS is a {type(value).__name__}.",
                "Give a list of at least one alias or dict, such as [{'HOST': '10.0.0.1'}].",
            )
        named = iter(entry.named)
        made = []
        for position, peer in enumerate(entry.peers):
            if isinstance(peer, str) and peer not in entry.databases:
                self._found += _no_alias(entry, peer)
            elif isinstance(peer, str):
                name, settings = next(named)
                made.append(self._alias(name, settings))
            elif isinstance(peer, Mapping):
                name, settings = next(named)
                made.append(self._inline(f"PEERS[{position}]", name, settings))
            else:
                self._add(
                    "E001",
                    "PEERS",
                    f"PEERS[{position}] is a {type(peer).__name__}.",
                    "Each peer is the alias of another entry, or a dict.",
                )
        return tuple(made)

    def _alias(self, peer: str, settings: Mapping[str, Any]) -> PeerConfig:
        """Read a peer that is another entry of DATABASES."""
        entry = self._entry
        if is_balancer(settings):
            self._add(
                "E003",
                "PEERS",
                f"PEERS names {peer!r}, which is a load balancer itself.",
                "Name the databases behind it instead.",
            )
            return PeerConfig(peer)
        engine = settings.get("ENGINE") or NO_ENGINE
        if engine != entry.engine:
            self._add(
                "E004",
                "PEERS",
                f"PEERS mixes engines: {peer!r} has the ENGINE {engine!r}, not {entry.engine!r}.",
                "All peers of a load balancer have one engine.",
            )
        self._found += misspelt(entry, peer, settings, PEER_KEYS)
        config = self._peer(peer, peer, settings)
        if "PEER_NAME" in settings:
            self._add(
                "W004",
                "PEER_NAME",
                f"PEER_NAME of peer {peer!r} has no effect: its alias is its name.",
                "Leave it out.",
            )
        self._found += _of_tests_and_requests(entry, peer, settings)
        return config

    def _inline(self, where: str, name: str, settings: Mapping[str, Any]) -> PeerConfig:
        """Read a peer that is a dict in PEERS."""
        entry = self._entry
        self._found += misspelt(entry, where, settings, (*PEER_KEYS, *CONNECTION_KEYS))
        given = settings.get("PEER_NAME")
        if given is not None and given_name(settings) is None:
            self._add(
                "E005",
                "PEER_NAME",
                f"PEER_NAME of peer {where} is {given!r}.",
                "Give a name of letters, digits and the marks _ . : -",
            )
        engine = settings.get("ENGINE", entry.engine)
        if engine != entry.engine:
            self._add(
                "E004",
                "PEERS",
                f"PEERS mixes engines: {where} has the ENGINE {engine!r}, not {entry.engine!r}.",
                "All peers of a load balancer have one engine; set PEER_ENGINE for all.",
            )
        return self._peer(where, name, settings)

    def _peer(self, where: str, name: str, settings: Mapping[str, Any]) -> PeerConfig:
        entry = self._entry
        given = self._fields(PEER_FIELDS, settings, PeerConfig, where)
        if "CHECK_INTERVAL" in entry.settings:
            given.setdefault("check_interval", entry.settings["CHECK_INTERVAL"])
        breaker = self._thresholds(settings, self._breaker, where)
        self._found += driver_settings.options(entry, where, settings)
        self._found += driver_settings.of_peer(entry, where, settings)
        if any(problem.stops_connections for problem in self._found):
            # No config is made.
            return PeerConfig(name)
        return PeerConfig(
            name=name,
            address=address(entry.merged(settings)),
            breaker=breaker,
            params={key: settings[key] for key in CONNECTION_KEYS if key in settings},
            **given,
        )

    # One value

    def _fields(
        self,
        fields: Mapping[str, str],
        settings: Mapping[str, Any],
        config: type,
        where: str = "",
    ) -> dict[str, Any]:
        """Return the fields that ``settings`` give, each tried by itself in a config."""
        given = {name: settings[key] for key, name in fields.items() if key in settings}
        for name, value in given.items():
            self._checked(
                "E005",
                lambda name=name, value=value: check_field(config, name, value),  # type: ignore[misc]
                where,
            )
        return given

    def _thresholds(
        self, settings: Mapping[str, Any], over: BreakerConfig, where: str = ""
    ) -> BreakerConfig:
        made: BreakerConfig = self._checked(
            "E005", lambda: BreakerConfig.of(settings.get("BREAKER"), over), where, over
        )
        return made

    def _checked(
        self, id_: str, read: Callable[[], Any], where: str = "", otherwise: Any = None
    ) -> Any:
        """Return what ``read`` does; note what is wrong with it."""
        try:
            return read()
        except ConfigError as exc:
            of = f" of peer {where}" if where else ""
            self._add(id_, exc.setting, f"{exc.setting}{of} {exc.problem}.", exc.hint)
            return otherwise

    def _add(self, id_: str, setting: str, message: str, hint: str) -> None:
        self._found.append(self._entry.problem(id_, setting, message, hint))


def _engine(entry: Entry) -> Iterator[Problem]:
    """Yield what is wrong with the backend of the peers."""
    if is_balancer({"ENGINE": entry.engine}):
        yield entry.problem(
            "E003",
            "PEER_ENGINE",
            "PEER_ENGINE is a load balancer itself.",
            "Give the backend of the databases, such as 'django.db.backends.mysql'.",
        )
        return
    try:
        wrapper = load_wrapper(entry.engine)
    except ConfigError as exc:
        setting = "PEER_ENGINE" if entry.settings.get("PEER_ENGINE") else "ENGINE of the peers"
        yield entry.problem(
            "E013",
            setting,
            f"{setting} {exc.problem}.",
            "Give the backend of the databases, and install its driver.",
        )
        return
    if any(cls.__module__.partition(".")[0] in _POOLS_BY_ALIAS for cls in wrapper.__mro__):
        yield entry.problem(
            "E014",
            "PEER_ENGINE",
            f"PEER_ENGINE is {entry.engine!r}, which keeps one pool for each alias: all "
            "its connections would lead to one of the peers.",
            "Give the backend that it builds on; CONN_MAX_AGE keeps connections, each to "
            "its own peer.",
        )


def _mirror(entry: Entry) -> Iterator[Problem]:
    target = mirrored(entry.alias, entry.databases)
    if target in entry.databases or target == entry.alias:
        return
    says = "leads back to where it began"
    yield entry.problem(
        "W006",
        "TEST",
        f"TEST['MIRROR'] {says if target is None else f'leads to {target!r}, no alias'}.",
        "A test run is refused. Name the alias whose test database this one has.",
    )


def _no_alias(entry: Entry, peer: str) -> Iterator[Problem]:
    close = difflib.get_close_matches(peer, list(entry.databases), n=1)
    yield entry.problem(
        "E002",
        "PEERS",
        f"PEERS names {peer!r}, which is no alias in DATABASES.",
        f"Did you mean {close[0]!r}?" if close else "Add it, or write the peer as a dict.",
    )


def _of_tests_and_requests(
    entry: Entry, peer: str, settings: Mapping[str, Any]
) -> Iterator[Problem]:
    """Yield settings of an alias that belong to its balancer."""
    for key, surprise in (
        ("ATOMIC_REQUESTS", "It opens a transaction on the peer itself for every request."),
        ("TEST", "A test database is made for the load balancer, by its own TEST."),
    ):
        value = settings.get(key)
        given = any(value.values()) if isinstance(value, Mapping) else value
        if key == "TEST" and isinstance(value, Mapping):
            # Django fills in the defaults of TEST, MIGRATE among them.
            given = any(v not in (None, True) for k, v in value.items() if k != "MIRROR")
            # The one whose test database the balancer has is made by its own.
            given = given and mirrored(entry.alias, entry.databases) != peer
        if given:
            yield entry.problem(
                "W002",
                key,
                f"Peer {peer!r} has {key}. {surprise}",
                f"Move {key} to {entry.alias!r}.",
            )


def _redis_url(url: object) -> object:
    """Check SHARED_STATE. Without it nothing of the sharing is imported."""
    from ..core.sharing import checked_url

    return checked_url(url)
