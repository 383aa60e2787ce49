"""A peer's settings laid over its balancer's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..core.config import address_in_words
from .keys import CONNECTION_KEYS, NAME_KEY

#: What Django takes a key for that is not given. Before 4.1 it fills them in when the first
#: connection of an entry is made: an entry that is read earlier is to be the same one.
_DEFAULTS: dict[str, Any] = {**dict.fromkeys(CONNECTION_KEYS, ""), "OPTIONS": {}}

_PLAIN_KEYS = tuple(key for key in CONNECTION_KEYS if key != "OPTIONS")


def changed_keys(own: Mapping[str, Any], first_read: Mapping[str, Any]) -> list[str]:
    """Return which of a balancer's connection settings are not what this process first read.

    The test runner rewrites NAME in place, ``_nodb_cursor`` asks for none:
    what was changed on purpose goes before what the peers have.
    """
    return [
        key
        for key, default in _DEFAULTS.items()
        if not same(own.get(key, default), first_read.get(key, default))
    ]


def merged_settings(
    peer: Mapping[str, Any], own: Mapping[str, Any], first_read: Mapping[str, Any]
) -> dict[str, Any]:
    """Return a copy of the balancer's settings ``own`` with the peer's laid over it.

    Each key, and OPTIONS key by key, is the peer's, unless the balancer's has
    changed since this process first read it. So the test runner's database is used, on whichever
    peer, and never the peer's own.
    """
    changed = changed_keys(own, first_read)
    merged = dict(own)
    for key in _PLAIN_KEYS:
        if key in peer and key not in changed:
            theirs = peer[key]
            if theirs is not None and theirs != "":
                merged[key] = theirs
    options = options_of(own)
    if peer.get("OPTIONS"):
        before = options_of(first_read)
        for key, value in options_of(peer).items():
            if same(options.get(key), before.get(key)):
                options[key] = value
    merged["OPTIONS"] = options
    return merged


def first_reading(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of the connection settings, to compare later ones with."""
    reading = {key: settings.get(key, default) for key, default in _DEFAULTS.items()}
    reading["NAME"] = settings.get(NAME_KEY, reading["NAME"])
    reading["OPTIONS"] = options_of(settings)
    return reading


def options_of(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of an entry's OPTIONS; nothing of what is no dict: :func:`problems` says so."""
    options = entry.get("OPTIONS")
    return dict(options) if isinstance(options, Mapping) else {}


def address(settings: Mapping[str, Any]) -> str:
    """Return where settings with an OPTIONS dict lead, as people write it."""
    options = settings["OPTIONS"]
    return address_in_words(
        settings.get("HOST") or options.get("host") or options.get("hostaddr"),
        settings.get("PORT") or options.get("port"),
        options.get("unix_socket"),
        settings.get("NAME"),
    )


def same(one: Any, other: Any) -> bool:
    """Return whether two settings say the same."""
    if one is other or one == other:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    # Django deep-copies settings: a callable PASSWORD or an SSL context in
    # OPTIONS is then another object, and says the same.
    kind: Any = type(one)
    return callable(one) or kind.__eq__ is object.__eq__
