"""``balancers["default"]``: one load balancer an alias and process.

Wrappers come and go, one a thread; what they know of the peers is here, under
the balancer's alias, which stands as a string in every copy of the settings.
A forked child goes on with what its parent knew, on locks of its own
(:mod:`django_proxysql.core.balancer`).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from django.core.exceptions import ImproperlyConfigured
from django.db import DEFAULT_DB_ALIAS, connections
from django.db.backends.signals import connection_created

from .conf import (
    ALIAS_KEY,
    NAME_KEY,
    PeerEngine,
    balancer_config,
    changed_keys,
    engine_path,
    first_reading,
    is_balancer,
    merged_settings,
    mirrored,
)
from .core import drivers, forks
from .core.balancer import Attempt, LoadBalancer
from .core.events import Listener
from .core.locks import new_lock
from .core.peer import Peer
from .core.trials import prober
from .errors import NoPeerAvailable

__all__ = ["Registered", "balancers", "introduce_peers", "is_testing", "register"]

#: Django's alias of connections to no database in particular.
NO_DB_ALIAS = "__no_db__"


class Registered(NamedTuple):
    """A balancer and the settings that this process first read for it."""

    balancer: LoadBalancer
    first_read: Mapping[str, Any]

    def is_changed(self, own: Mapping[str, Any]) -> bool:
        """Return whether ``own`` asks for another database, user or server than at first."""
        return bool(changed_keys(own, self.first_read))

    def settings_for(self, peer: Peer, own: Mapping[str, Any], alias: str) -> dict[str, Any]:
        """Return a copy of ``own`` as for ``peer``; a callable PASSWORD stays what it is."""
        merged = merged_settings(peer.config.params, own, self.first_read)
        if alias == NO_DB_ALIAS:
            merged["NAME"] = own.get("NAME")
        return merged

    def to_connect_with(self, peer: Peer, own: Mapping[str, Any], alias: str) -> dict[str, Any]:
        """Return what to connect to ``peer`` with now: a callable PASSWORD is called."""
        merged = self.settings_for(peer, own, alias)
        password = merged.get("PASSWORD")
        if callable(password):
            merged["PASSWORD"] = drivers.password_from(password)
        return merged


class Balancers(Mapping[str, LoadBalancer]):
    """The load balancers of this process by alias; made when first asked for."""

    def __init__(self) -> None:
        self._first_read: dict[str, Mapping[str, Any]] = {}
        self._entries: dict[str, Mapping[str, Any]] = {}
        self._listeners: tuple[tuple[Listener, bool], ...] = ()
        # A signal handler may make a balancer while its thread makes one.
        self._listeners_lock = new_lock()
        #: Those that have been asked for.
        self.known: dict[Any, Registered] = {}
        #: For tests: further arguments of LoadBalancer by alias, such as a clock.
        self._options: dict[str, dict[str, Any]] = {}
        #: Aliases that are tested as mirrors: what of, and the NAMEs of production.
        self._mirrors: dict[str, tuple[str, set[Any]]] = {}

    def __getitem__(self, alias: str) -> LoadBalancer:
        """Return the load balancer of ``alias``.

        :raises KeyError: ``alias`` is no load balancer's.
        :raises ImproperlyConfigured: its settings are wrong.
        """
        entry = connections.databases.get(alias, {})
        # A copy of a balancer's entry under another alias shares its circuits.
        alias = entry.get(ALIAS_KEY, alias)
        if alias not in self._entries:
            if not is_balancer(entry):
                raise KeyError(
                    f"{alias!r} is no load balancer. Load balancers in DATABASES: "
                    f"{', '.join(self) or 'none'}."
                )
            register(entry, alias)
        return self.registered(alias).balancer

    def __contains__(self, alias: object) -> bool:
        return alias in self._entries or is_balancer(connections.databases.get(str(alias), {}))

    def __iter__(self) -> Iterator[str]:
        # A list: an application may add aliases in another thread.
        entries = list(connections.databases.items())
        return (alias for alias, entry in entries if is_balancer(entry))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def registered(self, alias: str) -> Registered:
        """Return the balancer of ``alias`` and what was first read for it.

        :raises ImproperlyConfigured: its settings are wrong.
        """
        known = self.known.get(alias)
        if known is None:
            if alias not in self._entries:
                # Everything was forgotten; the wrapper is older.
                register(connections.databases[alias], alias)
            # Made outside any lock, for a strategy's module may be imported on
            # the way. Of two threads that come here at once, one's is kept.
            config = balancer_config(alias, self._entries[alias], connections.databases)
            balancer = LoadBalancer(config, **self._options.get(alias, {}))
            balancer.no_peer_error = NoPeerAvailable
            registered = Registered(balancer, self._first_read[alias])
            balancer.open_and_close = _BackgroundTrial(alias, registered.first_read)
            balancer.asks_for_another = balancer.open_and_close.is_changed
            # Together, so that a listener added just now is one of this balancer's.
            with self._listeners_lock:
                for listener, connects in self._listeners:
                    balancer.add_listener(listener, connects=connects)
                known = self.known.setdefault(alias, registered)
        return known

    def add_listener(self, listener: Listener, *, connects: bool = True) -> None:
        """Call ``listener`` with the events of all balancers: those that are there, and later ones.

        Adding it again changes nothing.

        :param listener: see :meth:`LoadBalancer.add_listener`.
        :param connects: as there.
        """
        with self._listeners_lock:
            if listener in [known for known, _ in self._listeners]:
                return
            self._listeners = (*self._listeners, (listener, connects))
            for registered in list(self.known.values()):
                registered.balancer.add_listener(listener, connects=connects)

    def remove_listener(self, listener: Listener) -> None:
        """Call ``listener`` no longer."""
        with self._listeners_lock:
            self._listeners = tuple(known for known in self._listeners if known[0] != listener)
            for registered in list(self.known.values()):
                registered.balancer.remove_listener(listener)

    def after_fork(self) -> None:
        """In the child: a lock that nobody holds."""
        self._listeners_lock = new_lock()

    def forget(self) -> None:
        """Drop everything, so that it is read anew. For tests that change DATABASES."""
        for entry in list(connections.databases.values()):
            entry.pop(NAME_KEY, None)
        self._first_read.clear()
        self._entries.clear()
        self._mirrors.clear()
        self.known.clear()


class _BackgroundTrial:
    """Connects for a trial off the request: all that the engine does, on a wrapper of its own."""

    def __init__(self, alias: str, first_read: Mapping[str, Any]) -> None:
        self._alias = alias
        self._first_read = first_read

    def is_changed(self) -> bool:
        """Return whether the alias asks for another database than at first."""
        own = connections.databases.get(self._alias, self._first_read)
        return bool(changed_keys(own, self._first_read))

    def __call__(self, attempt: Attempt) -> None:
        try:
            known: Any = connections[self._alias]
            # Its own even where the thread has a connection: a signal's
            # receiver may have made one.
            wrapper = type(known)(known.settings_dict, self._alias)
            wrapper.try_out(attempt)
        finally:
            if prober.is_here:
                # What receivers and checks have opened; the thread keeps nothing.
                connections.close_all()


balancers = Balancers()

forks.register(balancers.after_fork)


def register(settings: dict[str, Any], alias: str) -> None:
    """Note a balancer's settings as this process first sees them, under its alias.

    ``settings`` gets the alias written into it, so that whatever is made from
    a copy of it shares the circuits, and an empty NAME filled in from the first
    peer that has one, for Django derives the test database's name from it.
    """
    databases = connections.databases
    # An entry of DATABASES that names a user's subclass of the engine is a
    # balancer's, even if it lacks PEERS; a bare dict without them is not.
    if not is_balancer(settings) and databases.get(alias) is not settings:
        return
    alias = settings.setdefault(ALIAS_KEY, alias)
    if alias in balancers._first_read:
        return
    # The entry in DATABASES rather than a copy that somebody has changed.
    entry = databases.get(alias, settings)
    if not is_balancer(entry):
        entry = settings
    if entry.get("NAME", "") == "":
        entry["NAME"] = _name_of_a_peer(entry, databases)
    if settings.get("NAME", "") == "":
        settings["NAME"] = entry["NAME"]
    # A copy: with the dict itself a rewritten NAME would be its own first reading.
    balancers._entries.setdefault(alias, dict(entry))
    first_read = balancers._first_read.setdefault(alias, first_reading(entry))
    for copied in (entry, settings):
        copied.setdefault(NAME_KEY, first_read["NAME"])
    introduce_peers()


def introduce_peers() -> None:
    """Tell Django what the peers that are aliases are, wherever it comes upon them.

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
            entry["NAME"] = _name_of_a_peer(entry, databases)
        for peer, theirs in _alias_peers(entry):
            _give_engine(theirs, alias, peer)
    for alias, entry in entries:
        _make_mirrors(alias, entry)
    if balancers._mirrors:
        connection_created.connect(_refuse_production, dispatch_uid=__name__)


def _give_engine(theirs: dict[str, Any], alias: str, peer: str) -> None:
    engine = theirs.get("ENGINE")
    if not isinstance(engine, str) or not engine:
        return
    if isinstance(engine, PeerEngine) and engine.peer == peer:
        # A peer of several is the first's, for as long as that lists it.
        first = connections.databases.get(engine.balancer, {})
        if is_balancer(first) and any(peer == name for name, _ in _alias_peers(first)):
            return
    theirs["ENGINE"] = PeerEngine(engine_path(engine), alias, peer)


def _make_mirrors(alias: str, entry: Mapping[str, Any]) -> None:
    databases = connections.databases
    target = mirrored(alias, databases)
    if target is None:
        # A ring of mirrors: the checks say so, and a test run is refused.
        return
    names = {entry.get("NAME"), _name_of_a_peer(entry, databases)}
    names.add(databases.get(target, {}).get("NAME"))
    if target != alias:
        balancers._mirrors.setdefault(alias, (target, names))
    for peer, theirs in _alias_peers(entry):
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
        production = {*names, theirs.get("NAME"), databases.get(of, {}).get("NAME")}
        balancers._mirrors.setdefault(peer, (of, production))
        _depend_on(of, peer)


def _depend_on(target: str, mirror: str) -> None:
    """Have whoever waits for a mirror's test database wait for that which it is.

    Django takes a dependency on a mirror for one that is never fulfilled.
    """
    for alias, entry in list(connections.databases.items()):
        test: Any = entry.get("TEST")
        given = test.get("DEPENDENCIES") if isinstance(test, dict) else None
        if isinstance(given, (list, tuple)) and mirror in given:
            others = [one for one in given if one not in (mirror, target)]
            test["DEPENDENCIES"] = others if alias == target else [*others, target]


def _alias_peers(entry: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the peers that are aliases, and their entries."""
    peers = entry.get("PEERS")
    for peer in peers if isinstance(peers, (list, tuple)) else ():
        theirs = connections.databases.get(peer) if isinstance(peer, str) else None
        if theirs and not is_balancer(theirs):
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
    mirror = balancers._mirrors.get(connection.alias)
    if mirror is None or connection.settings_dict["NAME"] not in mirror[1] or not is_testing():
        return
    connection.close()
    raise ImproperlyConfigured(
        f"A test uses {connection.alias!r}, whose test database is that of {mirror[0]!r}, "
        f"which was not made. Add {mirror[0]!r} to the test's databases."
    )


def _name_of_a_peer(entry: Mapping[str, Any], databases: Mapping[str, Any]) -> Any:
    peers = entry.get("PEERS")
    for peer in peers if isinstance(peers, (list, tuple)) else ():
        if isinstance(peer, str):
            peer = databases.get(peer)
        if isinstance(peer, Mapping) and peer.get("NAME"):
            return peer["NAME"]
    return ""
