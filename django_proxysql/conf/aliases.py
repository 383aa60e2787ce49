"""Peers that are aliases of DATABASES: their engine, and whose test database they have."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import Any

from django.core.exceptions import ImproperlyConfigured
from django.db import DEFAULT_DB_ALIAS, connections
from django.db.backends.signals import connection_created

from .engines import PeerEngine, engine_path
from .keys import is_balancer, peers_of

#: Aliases that are tested as mirrors: what of, and the NAMEs of production.
mirrors: dict[str, tuple[str, list[Any]]] = {}


def mirrored(alias: str, databases: Mapping[str, Mapping[str, Any]]) -> str | None:
    """Return the alias whose test database ``alias`` has in the end: mostly its own.

    Django does not follow a chain of mirrors: met in the wrong order, the last
    would be given the name of the production database.

    :returns: None if the chain leads back to where it has been.
    """
    seen = [alias]
    while True:
        test = (databases.get(seen[-1]) or {}).get("TEST")
        link = test.get("MIRROR") if isinstance(test, Mapping) else None
        if not isinstance(link, str) or not link:
            return seen[-1]
        if link in seen:
            return None
        seen.append(link)


def introduce_peers() -> None:
    """Have Django see the peers that are aliases as peers, wherever it comes upon them.

    Their ENGINE becomes ours for peers, over their own
    (:mod:`django_proxysql.backends.peer`). Test runs take them for mirrors of
    their balancer, whose database they are: otherwise a run would make a test
    database for each of them, on the same servers, under the same name.
    """
    databases = connections.databases
    entries = [(alias, entry) for alias, entry in list(databases.items()) if is_balancer(entry)]
    for alias, entry in entries:
        if entry.get("NAME", "") == "":
            # Others ask for it, too: pytest-django makes the test database's name from it.
            entry["NAME"] = name_of_a_peer(entry, databases)
        for peer, theirs in alias_peers(entry):
            _give_engine(theirs, alias, peer)
    for alias, entry in entries:
        _make_mirrors(alias, entry)
    if mirrors:
        connection_created.connect(_refuse_production, dispatch_uid=__name__)


def _give_engine(theirs: dict[str, Any], alias: str, peer: str) -> None:
    engine = theirs.get("ENGINE")
    if not isinstance(engine, str) or not engine:
        return
    if isinstance(engine, PeerEngine) and engine.peer == peer:
        # A peer of several is the first's, for as long as that lists it.
        first = connections.databases.get(engine.balancer, {})
        if is_balancer(first) and any(peer == name for name, _ in alias_peers(first)):
            return
    theirs["ENGINE"] = PeerEngine(engine_path(engine), alias, peer)


def _make_mirrors(alias: str, entry: Mapping[str, Any]) -> None:
    databases = connections.databases
    target = mirrored(alias, databases)
    if target is None:
        # A ring of mirrors: the checks say so, and a test run is refused.
        return
    # Lists: a NAME that is wrong may be anything, and the checks say so.
    names = [
        entry.get("NAME"),
        name_of_a_peer(entry, databases),
        databases.get(target, {}).get("NAME"),
    ]
    if target != alias:
        mirrors.setdefault(alias, (target, names))
    for peer, theirs in alias_peers(entry):
        # The default alias is made before all others, which depend on it. As a
        # peer it shares its own with the balancer (test_db_signature). And a
        # balancer may be a mirror of one of its peers.
        if peer == target:
            continue
        test = theirs.setdefault("TEST", {})
        if not test.get("MIRROR"):
            if peer == DEFAULT_DB_ALIAS:
                continue
            test["MIRROR"] = target
        # Written by hand it is no less a mirror.
        of = mirrored(peer, databases) or target
        production = [*names, theirs.get("NAME"), databases.get(of, {}).get("NAME")]
        mirrors.setdefault(peer, (of, production))
        _depend_on(of, peer)


def _depend_on(target: str, mirror: str) -> None:
    """Have aliases that wait for a mirror's test database wait for that which it is.

    Django takes a dependency on a mirror for one that is never fulfilled.
    """
    for alias, entry in list(connections.databases.items()):
        test: Any = entry.get("TEST")
        given = test.get("DEPENDENCIES") if isinstance(test, dict) else None
        if isinstance(given, (list, tuple)) and mirror in given:
            others = [one for one in given if one not in (mirror, target)]
            test["DEPENDENCIES"] = others if alias == target else [*others, target]


def alias_peers(entry: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the peers that are aliases, and their entries."""
    for peer, theirs in peers_of(entry, connections.databases):
        if peer is not None and theirs and not is_balancer(theirs):
            yield peer, theirs


def is_testing() -> bool:
    """Return whether Django's test environment is set up: tests are being run."""
    testing: Any = sys.modules.get("django.test.utils")
    return testing is not None and hasattr(testing._TestState, "saved_data")


def _refuse_production(connection: Any, **kwargs: Any) -> None:
    """Let no test reach production through a mirror.

    A mirror gets the NAME of what it mirrors. Where no test asks for that,
    Django makes no test database, and that NAME is production's.
    """
    mirror = mirrors.get(connection.alias)
    if mirror is None or connection.settings_dict["NAME"] not in mirror[1] or not is_testing():
        return
    connection.close()
    raise ImproperlyConfigured(
        f"A test uses {connection.alias!r}, whose test database is that of {mirror[0]!r}, "
        f"which was not made. Add {mirror[0]!r} to the test's databases."
    )


def name_of_a_peer(entry: Mapping[str, Any], databases: Mapping[str, Any]) -> Any:
    found = (theirs["NAME"] for _, theirs in peers_of(entry, databases) if theirs.get("NAME"))
    return next(found, "")
