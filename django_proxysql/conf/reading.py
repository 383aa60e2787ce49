"""Reads a balancer's entry in one pass: the config it makes, and all that is wrong with it.

A value that breaks a rule of :mod:`..core.config` is a problem; the others are the config's.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from django.core.checks import CheckMessage
from django.core.exceptions import ImproperlyConfigured
from django.db import connections

from ..core.config import BalancerConfig, BreakerConfig, PeerConfig, check_field
from ..core.ready import ready_check_from
from ..core.strategies import strategy_from
from . import driver_settings
from .aliases import mirrored
from .engines import engine_path
from .entry import Entry, Peer, did_you_mean, given_name, of_peer
from .keys import (
    ALIAS_KEY,
    BALANCER_FIELDS,
    BALANCER_KEYS,
    CONNECTION_KEYS,
    DJANGO_KEYS,
    ENGINE,
    NAME_KEY,
    NO_ENGINE,
    PEER_FIELDS,
    PEER_KEYS,
    is_balancer,
)
from .merging import address, options_of

#: Packages whose backends take connections out of a pool that they keep by alias. These are
#: known before they connect. Of others backends.engines finds it out when they connect.
_POOLS_BY_ALIAS = frozenset(
    {
        "dj_db_conn_pool",
        "django_db_geventpool",
        "django_mongodb_backend",
        "django_mysql_geventpool",
    }
)

#: What Django asks a connection's own entry for, and what it takes where there is nothing. To 0.8
#: the peer's entry was the connection's.
_OF_CONNECTIONS = {
    "AUTOCOMMIT": True,
    "CONN_HEALTH_CHECKS": False,
    "CONN_MAX_AGE": 0,
    "DISABLE_SERVER_SIDE_CURSORS": False,
    "TIME_ZONE": None,
}


def problems(
    alias: str, settings: Mapping[str, Any], databases: Mapping[str, Mapping[str, Any]]
) -> list[CheckMessage]:
    """Return everything that is wrong with a balancer's entry, errors first."""
    return _read(Entry(alias, settings, databases))[1]


def balancer_config(
    alias: str, settings: Mapping[str, Any], databases: Mapping[str, Mapping[str, Any]]
) -> BalancerConfig:
    """Return the config that an entry makes.

    :raises ImproperlyConfigured: the entry has an error; the message names the
        alias, the setting and a remedy.
    """
    config, found = _read(Entry(alias, settings, databases))
    if config is None:
        raise ImproperlyConfigured(in_words(next(filter(stops_connections, found))))
    return config


def messages(alias: str) -> list[CheckMessage]:
    """Return what is wrong with one alias of DATABASES; nothing if it is no balancer."""
    databases = connections.databases
    entry = databases.get(alias, {})
    if is_balancer(entry):
        return problems(alias, entry, databases)
    if "PEERS" not in entry:
        return []
    plain, engine = Entry(alias, entry, databases), engine_path(entry["ENGINE"])
    plain.add(
        "W004",
        f"PEERS has no effect with the ENGINE {engine!r}.",
        f"Give {ENGINE!r} as ENGINE, and the peers' own as PEER_ENGINE.",
    )
    return plain.problems


def stops_connections(problem: CheckMessage) -> bool:
    """Return whether no connection is made with it. One peer's typo does not stop the others."""
    return problem.is_serious() and problem.id != "django_proxysql.E018"


def in_words(problem: CheckMessage) -> str:
    """Return a problem and its remedy, as an error and the log name it."""
    return f"{problem.msg} {problem.hint}".rstrip()


def _read(entry: Entry) -> tuple[BalancerConfig | None, list[CheckMessage]]:
    """Return the config, unless a problem stops connections, and the problems, errors first."""
    _keys_of_balancer(entry)
    given = _balancer(entry)
    _pool_of_engine(entry)
    _mirror(entry)
    _listed(entry)
    breaker = _thresholds(entry, "", entry.settings, BreakerConfig())
    peers = [_peer(entry, peer, breaker) for peer in entry.peers]
    for rule in (
        _named_twice,
        driver_settings.timeouts,
        driver_settings.one_address,
        driver_settings.shared_pools,
        driver_settings.ready_check,
        driver_settings.tokens,
    ):
        rule(entry)
    found = sorted(entry.problems, key=lambda problem: not problem.is_serious())
    if any(map(stops_connections, found)):
        return None, found
    made = tuple(PeerConfig(**peer) for peer in peers)
    return BalancerConfig(entry.alias, made, **given), found


def _balancer(entry: Entry) -> dict[str, Any]:
    """Return the fields of the config that the balancer's own settings give."""
    settings = entry.settings
    given = _fields(entry, "", settings, BALANCER_FIELDS, BalancerConfig)
    _fields(entry, "", settings, {"CHECK_INTERVAL": "check_interval"}, PeerConfig)
    for id_, key, reader in (
        ("E007", "STRATEGY", strategy_from),
        ("E008", "READY_CHECK", ready_check_from),
        ("E015", "SHARED_STATE", _redis_url),
    ):
        if key in settings:
            entry.read(id_, "", reader, settings[key])
    driver_settings.options(entry, "", settings)
    age = settings.get("CONN_MAX_AGE", 0)
    if age is not None and not driver_settings.is_number(age):
        entry.add("E005", f"CONN_MAX_AGE is {age!r}, not a number.", "Give seconds, 0 or None.")
    return given


def _listed(entry: Entry) -> None:
    """Note what stands in PEERS and is no peer."""
    if not entry.listed:
        # Never its value: that of a dict in place of a list has a password.
        value = entry.settings.get("PEERS")
        empty = value is None or isinstance(value, (list, tuple))
        entry.add(
            "E001",
            "PEERS is empty." if empty else f"PEERS is a {type(value).__name__}.",
            "Give a list of at least one alias or dict, such as [{'HOST': '10.0.0.1'}].",
        )
    for position, peer in enumerate(entry.listed):
        if isinstance(peer, str):
            if peer not in entry.databases:
                entry.add(
                    "E002",
                    f"PEERS names {peer!r}, which is no alias in DATABASES.",
                    did_you_mean(peer, entry.databases) or "Add it, or write the peer as a dict.",
                )
        elif not isinstance(peer, Mapping):
            entry.add(
                "E001",
                f"PEERS[{position}] is a {type(peer).__name__}.",
                "Each peer is the alias of another entry, or a dict.",
            )


def _peer(entry: Entry, peer: Peer, breaker: BreakerConfig) -> dict[str, Any]:
    """Return the fields of a peer's config."""
    settings, where = peer.settings, peer.where
    if peer.is_alias and is_balancer(settings):
        entry.add(
            "E003",
            f"PEERS names {where!r}, which is a load balancer itself.",
            "Name the databases behind it instead.",
        )
        return {}
    if peer.is_alias:
        engine, named, remedy = settings.get("ENGINE") or NO_ENGINE, repr(where), ""
        _keys_of_alias(entry, where, settings)
        _of_tests_and_requests(entry, where, settings)
    else:
        engine, named = settings.get("ENGINE", entry.engine), where
        remedy = "; set PEER_ENGINE for all"
        _keys_of_inline(entry, where, settings)
        name = settings.get("PEER_NAME")
        if name is not None and given_name(settings) is None:
            entry.add(
                "E005",
                f"PEER_NAME of peer {where} is {name!r}.",
                "Give a name of letters, digits and the marks _ . : -",
            )
    if engine != entry.engine:
        entry.add(
            "E004",
            f"PEERS mixes engines: {named} has the ENGINE {engine!r}, not {entry.engine!r}.",
            f"All peers of a load balancer have one engine{remedy}.",
        )
    given = _fields(entry, where, settings, PEER_FIELDS, PeerConfig)
    if "CHECK_INTERVAL" in entry.settings:
        given.setdefault("check_interval", entry.settings["CHECK_INTERVAL"])
    given["breaker"] = _thresholds(entry, where, settings, breaker)
    driver_settings.options(entry, where, settings)
    driver_settings.of_one_peer(entry, peer)
    return {
        **given,
        "name": peer.name,
        "address": address(peer.merged),
        "params": {key: settings[key] for key in CONNECTION_KEYS if key in settings},
    }


def _fields(
    entry: Entry, where: str, settings: Mapping[str, Any], fields: Mapping[str, str], config: type
) -> dict[str, Any]:
    """Return the fields that ``settings`` give, each tried by itself in a config."""
    given = {name: settings[key] for key, name in fields.items() if key in settings}
    for name, value in given.items():
        entry.read("E005", where, check_field, config, name, value)
    return given


def _thresholds(
    entry: Entry, where: str, settings: Mapping[str, Any], over: BreakerConfig
) -> BreakerConfig:
    return entry.read("E005", where, BreakerConfig.of, settings.get("BREAKER"), over) or over


def _redis_url(url: object) -> None:
    """Check SHARED_STATE. Without it nothing of the sharing is imported."""
    if url is not None:
        from ..core.sharing import checked_url

        checked_url(url)


def _pool_of_engine(entry: Entry) -> None:
    """Note a backend that is known to keep a pool by alias."""
    packages = {cls.__module__.partition(".")[0] for cls in getattr(entry.wrapper, "__mro__", ())}
    if packages & _POOLS_BY_ALIAS:
        entry.add(
            "E014",
            f"PEER_ENGINE is {entry.engine!r}, which keeps one pool for each alias: all "
            "its connections would lead to one of the peers.",
            "Give the backend that it builds on; CONN_MAX_AGE keeps connections, each to "
            "its own peer.",
        )


def _mirror(entry: Entry) -> None:
    target = mirrored(entry.alias, entry.databases)
    if target not in entry.databases and target != entry.alias:
        says = (
            "leads back to where it began" if target is None else f"leads to {target!r}, no alias"
        )
        entry.add(
            "W006",
            f"TEST['MIRROR'] {says}.",
            "A test run is refused. Name the alias whose test database this one has.",
        )


def _of_tests_and_requests(entry: Entry, peer: str, settings: Mapping[str, Any]) -> None:
    """Note settings of an alias that belong to its balancer."""
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
            entry.add(
                "W002",
                f"Peer {peer!r} has {key}. {surprise}",
                f"Move {key} to {entry.alias!r}.",
            )
    for key, default in _OF_CONNECTIONS.items():
        if key == "CONN_MAX_AGE" and options_of(entry.settings).get("pool"):
            # The pool keeps them.
            continue
        if entry.settings.get(key, default) == default != settings.get(key, default):
            entry.add(
                "W002",
                f"Peer {peer!r} has {key}. Only connections straight to the peer have it.",
                f"Give {key} to {entry.alias!r}, too, or leave it out of the peer.",
            )


# Keys that are no settings, or stand where they have no effect; peers that are named twice


def _keys_of_balancer(entry: Entry) -> None:
    """Note what is wrong with the keys of the entry itself."""
    _misspelt(entry, "", entry.settings, BALANCER_KEYS)
    for key in ("WEIGHT", "PRIORITY", "PEER_NAME"):
        if key in entry.settings:
            entry.add(
                "W004",
                f"{key} is a peer's setting, and has no effect here.",
                f"Move {key} into the peers.",
            )
    # Not NAME: the test database's is made from it.
    for key in ("HOST", "PORT", "USER", "PASSWORD"):
        values = [entry.settings.get(key), *(peer.settings.get(key) for peer in entry.peers)]
        if entry.peers and all(value not in ("", None) for value in values):
            entry.add(
                "W004",
                f"{key} has no effect here: every peer has its own.",
                f"Remove {key} here, or leave it out of the peers that are to have this one.",
            )


def _keys_of_alias(entry: Entry, where: str, settings: Mapping[str, Any]) -> None:
    """Note what is wrong with the keys of a peer that is another entry of DATABASES."""
    _misspelt(entry, where, settings, PEER_KEYS)
    # Django's own settings hold for a connection straight to the peer; messages() reports PEERS.
    keys = tuple(key for key in BALANCER_KEYS if key != "PEERS")
    _of_the_balancer(entry, where, settings, keys)
    if "PEER_NAME" in settings:
        entry.add(
            "W004",
            f"PEER_NAME of peer {where!r} has no effect: its alias is its name.",
            "Leave it out.",
        )


def _keys_of_inline(entry: Entry, where: str, settings: Mapping[str, Any]) -> None:
    """Note what is wrong with the keys of a peer that is a dict."""
    # All of it is ours. In other entries only what looks like a key of ours is a slip.
    for key in _misspelt(entry, where, settings, (*PEER_KEYS, *CONNECTION_KEYS), cutoff=0.7):
        entry.add(
            "W004",
            f"{key} of peer {where} is not a setting, and has no effect.",
            "Leave it out.",
        )
    _of_the_balancer(entry, where, settings, (*BALANCER_KEYS, *DJANGO_KEYS))


def _of_the_balancer(
    entry: Entry, where: str, settings: Mapping[str, Any], keys: tuple[str, ...]
) -> None:
    """Note which of ``keys`` a peer has: it is the balancer that has them."""
    for key in settings:
        if key in keys and key not in (*PEER_KEYS, "ENGINE"):
            entry.add(
                "W004",
                f"{key} of peer {where} has no effect there.",
                f"Move {key} to {entry.alias!r}.",
            )


def _misspelt(
    entry: Entry, where: str, settings: Mapping[str, Any], own: tuple[str, ...], cutoff: float = 0.8
) -> list[str]:
    """Note the keys that look like one of ``own``; return those that look like none."""
    known = {*BALANCER_KEYS, *PEER_KEYS, *CONNECTION_KEYS, *DJANGO_KEYS, ALIAS_KEY, NAME_KEY}
    strange = []
    for key in settings:
        if not isinstance(key, str) or key in known:
            continue
        close = difflib.get_close_matches(key.upper(), sorted(own), n=1, cutoff=cutoff) or [
            name for name in sorted(own) if len(name) > 8 and name in key.upper()
        ]
        if close:
            hint = f"Did you mean {close[0]}?"
        elif key.lower() in ("fail_max", "success_threshold"):
            hint = f'Give BREAKER: {{"{key.lower()}": …}}.'
        else:
            strange.append(key)
            continue
        entry.add("E006", f"{key}{of_peer(where)} is not a setting.", hint)
    return strange


def _named_twice(entry: Entry) -> None:
    """Note names that several peers have."""
    aliases = [peer for peer in entry.listed if isinstance(peer, str)]
    for alias in sorted({alias for alias in aliases if aliases.count(alias) > 1}):
        entry.add(
            "E011", f"PEERS names {alias!r} more than once.", "Name it once, and give it a WEIGHT."
        )
    names = [name for peer in entry.listed if (name := given_name(peer)) is not None]
    for name in sorted({name for name in names if (aliases + names).count(name) > 1}):
        entry.add(
            "E011",
            f"PEER_NAME {name!r} is not the only peer's of that name.",
            "Give each peer a name of its own.",
        )
