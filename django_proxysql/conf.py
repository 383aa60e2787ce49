"""A DATABASES entry, read into what the core needs, with errors that name the setting.

:func:`read` collects every problem of an entry at once: the system checks show
them all, and making a connection raises the first that is an error. Nothing
here connects to anything.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from django.core.exceptions import ImproperlyConfigured

from . import drivers
from .config import BalancerConfig, BreakerConfig, PeerConfig, number
from .exceptions import ConfigError
from .ready import ready_check_from
from .strategies import strategy_from

__all__ = [
    "ENGINE",
    "Problem",
    "balancer_config",
    "changed_keys",
    "is_balancer",
    "merged_settings",
    "peer_engine",
    "problems",
]

ENGINE = "django_proxysql.backends.proxysql"
DEFAULT_PEER_ENGINE = "django.db.backends.mysql"

#: The key under which a balancer's alias stands in its settings dict. A string:
#: Django copies, deep-copies and pickles that dict, and every wrapper made from
#: it must find the same circuits.
ALIAS_KEY = "LOAD_BALANCER"

#: What a connection is made with; a peer's own is laid over the balancer's.
CONNECTION_KEYS = ("NAME", "USER", "PASSWORD", "HOST", "PORT", "OPTIONS")

_PEER_KEYS = ("WEIGHT", "PRIORITY", "BREAKER", "CHECK_INTERVAL")
_BALANCER_KEYS = (
    "PEERS",
    "PEER_ENGINE",
    "CHECK_INTERVAL",
    "BREAKER",
    "STRATEGY",
    "CONNECT_TIMEOUT",
    "TRIAL_TIMEOUT",
    "CONNECT_DEADLINE",
    "LAST_RESORT_INTERVAL",
    "READY_CHECK",
)
_DJANGO_KEYS = (
    "ATOMIC_REQUESTS",
    "AUTOCOMMIT",
    "CONN_HEALTH_CHECKS",
    "CONN_MAX_AGE",
    "DISABLE_SERVER_SIDE_CURSORS",
    "ENGINE",
    "TEST",
    "TIME_ZONE",
)


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with an entry of DATABASES."""

    #: The system check's id without its prefix; E… stops connections, W… does not.
    id: str
    alias: str
    setting: str
    message: str
    hint: str

    @property
    def is_error(self) -> bool:
        """Whether no connection can be made with it."""
        return self.id.startswith("E")

    def __str__(self) -> str:
        return f"DATABASES[{self.alias!r}]: {self.message} {self.hint}".rstrip()


def is_balancer(entry: Mapping[str, Any]) -> bool:
    """Return whether an entry of DATABASES is a load balancer's."""
    return entry.get("ENGINE") == ENGINE or "PEERS" in entry


def peer_engine(entry: Mapping[str, Any], databases: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the dotted path of the backend that an entry's peers have."""
    explicit = entry.get("PEER_ENGINE")
    if explicit:
        return str(explicit)
    for peer in _listed(entry.get("PEERS")):
        if isinstance(peer, str) and not is_balancer(databases.get(peer, {"PEERS": ()})):
            return str(databases[peer].get("ENGINE") or DEFAULT_PEER_ENGINE)
    return DEFAULT_PEER_ENGINE


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
        if problem.is_error:
            raise ImproperlyConfigured(str(problem))
    return _Reader(alias, entry, databases).config()


def changed_keys(own: Mapping[str, Any], first_read: Mapping[str, Any]) -> list[str]:
    """Return which of a balancer's connection settings are not what this process first read.

    The test runner rewrites NAME in place, ``_nodb_cursor`` asks for none:
    what was changed on purpose goes before what the peers have.
    """
    return [key for key in CONNECTION_KEYS if not _same(own.get(key), first_read.get(key))]


def merged_settings(
    peer: Mapping[str, Any], own: Mapping[str, Any], first_read: Mapping[str, Any]
) -> dict[str, Any]:
    """Return a copy of the balancer's settings ``own`` with the peer's laid over it.

    Each key, and OPTIONS key by key, is the peer's, unless the balancer's has
    changed since this process first read it. The test runner's database is
    thereby the one that is used, on whichever peer, and never the peer's own.
    """
    changed = changed_keys(own, first_read)
    merged = dict(own)
    for key in CONNECTION_KEYS:
        theirs = peer.get(key)
        if key != "OPTIONS" and key not in changed and theirs not in (None, ""):
            merged[key] = theirs
    options = dict(own.get("OPTIONS") or {})
    before = first_read.get("OPTIONS") or {}
    for key, value in (peer.get("OPTIONS") or {}).items():
        if _same(options.get(key), before.get(key)):
            options[key] = value
    merged["OPTIONS"] = options
    return merged


def first_reading(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of the connection settings, to compare later ones with."""
    reading = {key: settings.get(key) for key in CONNECTION_KEYS}
    reading["OPTIONS"] = dict(reading["OPTIONS"] or {})
    return reading


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
        self.peers = _listed(entry.get("PEERS"))
        self.engine = peer_engine(entry, databases)

    # What is wrong

    def problems(self) -> Iterator[Problem]:
        yield from self._misspelt(self.alias, self.entry, _BALANCER_KEYS)
        yield from self._numbers()
        if not self.peers:
            value = self.entry.get("PEERS")
            says = "is empty" if value in ([], (), None) else f"is {value!r}"
            yield self._problem(
                "E001",
                "PEERS",
                f"PEERS {says}.",
                "Give a list of at least one alias or dict, such as [{'HOST': '10.0.0.1'}].",
            )
        if is_balancer({"ENGINE": self.engine}):
            yield self._problem(
                "E003",
                "PEER_ENGINE",
                "PEER_ENGINE is a load balancer itself.",
                "Give the backend of the databases, such as 'django.db.backends.mysql'.",
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
                    f"PEERS[{position}] is {peer!r}.",
                    "Each peer is the alias of another entry, or a dict.",
                )
        yield from self._addresses()

    def _problem(self, id_: str, setting: str, message: str, hint: str) -> Problem:
        return Problem(id_, self.alias, setting, message, hint)

    def _misspelt(
        self, where: str, entry: Mapping[str, Any], own: Iterable[str]
    ) -> Iterator[Problem]:
        known = {*own, *CONNECTION_KEYS, *_DJANGO_KEYS, ALIAS_KEY}
        for key in entry:
            if not isinstance(key, str) or key in known:
                continue
            # Entries carry keys of other packages too: only what looks like
            # one of ours is taken for a slip.
            close = difflib.get_close_matches(key.upper(), sorted(own), n=1, cutoff=0.8)
            if close:
                at = "" if where == self.alias else f" of peer {where}"
                yield self._problem(
                    "E006",
                    key,
                    f"{key}{at} is not a setting.",
                    f"Did you mean {close[0]}?",
                )

    def _numbers(self) -> Iterator[Problem]:
        yield from self._caught("E005", lambda: self._balancer(()))
        yield from self._caught("E007", lambda: strategy_from(self.entry.get("STRATEGY", "random")))
        yield from self._caught("E008", lambda: ready_check_from(self.entry.get("READY_CHECK")))

    def _caught(self, id_: str, read: Any, where: str = "") -> Iterator[Problem]:
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
        engine = entry.get("ENGINE")
        if engine != self.engine:
            yield self._problem(
                "E004",
                "PEERS",
                f"Peer {peer!r} has the engine {engine!r}, others have {self.engine!r}.",
                "All peers of a load balancer have one engine.",
            )
        yield from self._peer(peer, entry)
        for key, surprise in (
            ("ATOMIC_REQUESTS", "It opens a transaction on the peer itself for every request."),
            ("TEST", "A test database is made for the load balancer, by its own TEST."),
        ):
            value = entry.get(key)
            given = any(value.values()) if isinstance(value, Mapping) else value
            if key == "TEST" and isinstance(value, Mapping):
                # Django fills in the defaults of TEST, MIGRATE among them.
                given = any(v not in (None, True) for k, v in value.items() if k != "MIRROR")
            if given:
                yield self._problem(
                    "W002",
                    key,
                    f"Peer {peer!r} has {key}. {surprise}",
                    f"Move {key} to {self.alias!r}.",
                )

    def _inline_peer(self, position: int, peer: Mapping[str, Any]) -> Iterator[Problem]:
        name = f"PEERS[{position}]"
        yield from self._misspelt(name, peer, (*_PEER_KEYS, *CONNECTION_KEYS))
        engine = peer.get("ENGINE", self.engine)
        if engine != self.engine:
            yield self._problem(
                "E004",
                "PEERS",
                f"{name} has the engine {engine!r}, others have {self.engine!r}.",
                "All peers of a load balancer have one engine; set PEER_ENGINE for all.",
            )
        yield from self._peer(name, peer)

    def _peer(self, name: str, entry: Mapping[str, Any]) -> Iterator[Problem]:
        yield from self._caught("E005", lambda: self._peer_config(name, entry), where=name)
        host = entry.get("HOST") or self.entry.get("HOST") or ""
        if "," in str(host):
            yield self._problem(
                "E009",
                "HOST",
                f"HOST of peer {name} has a comma in it.",
                "The driver would take it for a list of its own and go round the circuits: "
                "make each host a peer.",
            )
        options = {**(self.entry.get("OPTIONS") or {}), **(entry.get("OPTIONS") or {})}
        yield from self._timeout_of(name, options)

    def _timeout_of(self, name: str, options: Mapping[str, Any]) -> Iterator[Problem]:
        whole = any(word in self.engine for word in ("mysql", "postg"))
        given = options.get("connect_timeout")
        if given is not None and whole:
            if isinstance(given, bool) or not isinstance(given, int) or given < 1:
                yield self._problem(
                    "E010",
                    "OPTIONS",
                    f"OPTIONS['connect_timeout'] of peer {name} is {given!r}.",
                    "The driver takes whole seconds, at least 1.",
                )
            return
        for setting in ("CONNECT_TIMEOUT", "TRIAL_TIMEOUT"):
            seconds = self.entry.get(setting)
            if not whole or not isinstance(seconds, (int, float)) or isinstance(seconds, bool):
                continue
            taken = drivers.driver_of(
                "psycopg" if "postg" in self.engine else "MySQLdb"
            ).connect_options({}, seconds)
            if 0 < seconds < math.inf and taken["connect_timeout"] != seconds:
                yield self._problem(
                    "W003",
                    setting,
                    f"{setting} is {seconds!r}, which the driver cannot take.",
                    f"It becomes {taken['connect_timeout']}: the driver takes whole seconds.",
                )

    def _addresses(self) -> Iterator[Problem]:
        seen: dict[Any, str] = {}
        for name, entry in self._named():
            settings = merged_settings(entry, self.entry, self.entry)
            options = settings["OPTIONS"]
            where = (
                settings.get("HOST") or options.get("host") or options.get("unix_socket"),
                str(settings.get("PORT") or ""),
                None if settings.get("HOST") else settings.get("NAME"),
            )
            if where in seen:
                yield self._problem(
                    "W001",
                    "PEERS",
                    f"Peers {seen[where]!r} and {name!r} have one address, {_address(settings)}.",
                    "One failure will be met twice, and one server gets two shares.",
                )
            seen.setdefault(where, name)

    # What it says

    def _named(self) -> list[tuple[str, Mapping[str, Any]]]:
        """Return each usable peer with its name: its alias, or peer0, peer1 … by place."""
        taken = {peer for peer in self.peers if isinstance(peer, str)}
        named: list[tuple[str, Mapping[str, Any]]] = []
        for position, peer in enumerate(self.peers):
            if isinstance(peer, str):
                if peer in self.databases:
                    named.append((peer, self.databases[peer]))
            elif isinstance(peer, Mapping):
                name = f"peer{position}"
                while name in taken:
                    position += len(self.peers)
                    name = f"peer{position}"
                taken.add(name)
                named.append((name, peer))
        return named

    def config(self) -> BalancerConfig:
        return self._balancer(
            tuple(self._peer_config(name, entry) for name, entry in self._named())
        )

    def _balancer(self, peers: tuple[PeerConfig, ...]) -> BalancerConfig:
        entry = self.entry
        number("CHECK_INTERVAL", entry.get("CHECK_INTERVAL", 30), exclusive=True)
        BreakerConfig.of(entry.get("BREAKER"), over=BreakerConfig())
        given = {
            field: entry[key]
            for key, field in (
                ("STRATEGY", "strategy"),
                ("CONNECT_TIMEOUT", "connect_timeout"),
                ("TRIAL_TIMEOUT", "trial_timeout"),
                ("CONNECT_DEADLINE", "connect_deadline"),
                ("LAST_RESORT_INTERVAL", "last_resort_interval"),
                ("READY_CHECK", "ready_check"),
            )
            if key in entry
        }
        # Without peers it is only asked whether the numbers are right.
        return BalancerConfig(self.alias, peers or (PeerConfig("peer0"),), **given)

    def _peer_config(self, name: str, entry: Mapping[str, Any]) -> PeerConfig:
        balancer = self.entry
        return PeerConfig(
            name=name,
            address=_address(merged_settings(entry, balancer, balancer)),
            weight=entry.get("WEIGHT", 1),
            priority=entry.get("PRIORITY", 0),
            check_interval=entry.get("CHECK_INTERVAL", balancer.get("CHECK_INTERVAL", 30)),
            breaker=BreakerConfig.of(
                entry.get("BREAKER"),
                over=BreakerConfig.of(balancer.get("BREAKER"), over=BreakerConfig()),
            ),
            params={key: entry[key] for key in CONNECTION_KEYS if key in entry},
        )


def _listed(peers: Any) -> list[Any]:
    # A bare string would be read as a list of its letters.
    return list(peers) if isinstance(peers, (list, tuple)) else []


def _address(settings: Mapping[str, Any]) -> str:
    host = settings.get("HOST") or settings["OPTIONS"].get("unix_socket") or ""
    port = settings.get("PORT")
    if host.startswith("/") if isinstance(host, str) else False:
        return str(host)
    if host or port:
        return f"{host or 'localhost'}:{port}" if port else str(host)
    return str(settings.get("NAME") or "")


def _same(one: Any, other: Any) -> bool:
    if one is other or one == other:
        return True
    # Django deep-copies settings: a callable PASSWORD or an object in OPTIONS
    # is then another object, and says the same.
    plain = (str, bytes, int, float, bool, type(None), list, tuple, dict, set)
    return type(one) is type(other) and not isinstance(one, plain)
