"""Keys that are no settings, or stand where they have no effect; peers that are named twice."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from .entry import Entry, given_name, of_peer
from .keys import (
    ALIAS_KEY,
    BALANCER_KEYS,
    CONNECTION_KEYS,
    DJANGO_KEYS,
    NAME_KEY,
    PEER_KEYS,
)


def balancers_keys(entry: Entry) -> None:
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


def alias_keys(entry: Entry, where: str, settings: Mapping[str, Any]) -> None:
    """Note what is wrong with the keys of a peer that is another entry of DATABASES."""
    _misspelt(entry, where, settings, PEER_KEYS)
    if "PEER_NAME" in settings:
        entry.add(
            "W004",
            f"PEER_NAME of peer {where!r} has no effect: its alias is its name.",
            "Leave it out.",
        )


def inline_keys(entry: Entry, where: str, settings: Mapping[str, Any]) -> None:
    """Note what is wrong with the keys of a peer that is a dict."""
    # All of it is ours. In other entries only what looks like a key of ours is a slip.
    own = (*PEER_KEYS, *CONNECTION_KEYS)
    for key in _misspelt(entry, where, settings, own, cutoff=0.7):
        if key not in BALANCER_KEYS:
            entry.add(
                "W004",
                f"{key} of peer {where} is not a setting, and has no effect.",
                "Leave it out.",
            )
    for key in settings:
        if key in (*BALANCER_KEYS, *DJANGO_KEYS) and key not in (*own, "ENGINE"):
            entry.add(
                "W004",
                f"{key} of peer {where} has no effect there.",
                f"Move {key} to {entry.alias!r}.",
            )


def _misspelt(
    entry: Entry, where: str, settings: Mapping[str, Any], own: tuple[str, ...], cutoff: float = 0.8
) -> list[str]:
    """Note the keys that look like one of ``own``; return those that look like none."""
    known = {*own, *CONNECTION_KEYS, *DJANGO_KEYS, ALIAS_KEY, NAME_KEY}
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


def named_twice(entry: Entry) -> None:
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
