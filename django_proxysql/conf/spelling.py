"""Keys that are no settings, or stand where they have no effect; peers that are named twice."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from .entry import Entry, Problem, given_name
from .keys import (
    ALIAS_KEY,
    BALANCER_KEYS,
    CONNECTION_KEYS,
    DJANGO_KEYS,
    NAME_KEY,
    PEER_KEYS,
)


def misspelt(
    entry: Entry, where: str, settings: Mapping[str, Any], own: Iterable[str]
) -> Iterator[Problem]:
    known = {*own, *CONNECTION_KEYS, *DJANGO_KEYS, ALIAS_KEY, NAME_KEY}
    for key in settings:
        if not isinstance(key, str) or key in known:
            continue
        # Entries carry keys of other packages too: only what looks like
        # one of ours is taken for a slip. An inline peer is all ours.
        inline = where != entry.alias and where not in entry.databases
        close = difflib.get_close_matches(
            key.upper(), sorted(own), n=1, cutoff=0.7 if inline else 0.8
        ) or [name for name in sorted(own) if len(name) > 8 and name in key.upper()]
        at = "" if where == entry.alias else f" of peer {where}"
        if close:
            yield entry.problem(
                "E006",
                key,
                f"{key}{at} is not a setting.",
                f"Did you mean {close[0]}?",
            )
        elif key.lower() in ("fail_max", "success_threshold"):
            yield entry.problem(
                "E006",
                key,
                f"{key}{at} is not a setting.",
                f'Give BREAKER: {{"{key.lower()}": …}}.',
            )
        elif inline and key not in BALANCER_KEYS:
            yield entry.problem(
                "W004",
                key,
                f"{key}{at} is not a setting, and has no effect.",
                "Leave it out.",
            )


def misplaced(entry: Entry) -> Iterator[Problem]:
    for key in ("WEIGHT", "PRIORITY", "PEER_NAME"):
        if key in entry.settings:
            yield entry.problem(
                "W004",
                key,
                f"{key} is a peer's setting, and has no effect here.",
                f"Move {key} into the peers.",
            )
    named = entry.named
    # Not NAME: the test database's is made from it.
    for key in ("HOST", "PORT", "USER", "PASSWORD"):
        own = entry.settings.get(key)
        if own in ("", None) or not named:
            continue
        if all(peer.get(key) not in ("", None) for _, peer in named):
            yield entry.problem(
                "W004",
                key,
                f"{key} has no effect here: every peer has its own.",
                f"Remove {key} here, or leave it out of the peers that are to have this one.",
            )
    for position, peer in enumerate(entry.peers):
        if not isinstance(peer, Mapping):
            continue
        for key in peer:
            known = (*PEER_KEYS, *CONNECTION_KEYS, "ENGINE")
            if key in (*BALANCER_KEYS, *DJANGO_KEYS) and key not in known:
                yield entry.problem(
                    "W004",
                    key,
                    f"{key} of peer PEERS[{position}] has no effect there.",
                    f"Move {key} to {entry.alias!r}.",
                )


def named_twice(entry: Entry) -> Iterator[Problem]:
    aliases = [peer for peer in entry.peers if isinstance(peer, str)]
    for alias in sorted({alias for alias in aliases if aliases.count(alias) > 1}):
        yield entry.problem(
            "E011",
            "PEERS",
            f"PEERS names {alias!r} more than once.",
            "Name it once, and give it a WEIGHT.",
        )
    names = [name for peer in entry.peers if (name := given_name(peer)) is not None]
    for name in sorted({name for name in names if (aliases + names).count(name) > 1}):
        yield entry.problem(
            "E011",
            "PEER_NAME",
            f"PEER_NAME {name!r} is not the only peer's of that name.",
            "Give each peer a name of its own.",
        )
