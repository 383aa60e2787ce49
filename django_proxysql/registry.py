"""``balancers["default"]``: one load balancer an alias and process.

Wrappers come and go, one a thread; what they know of the peers is here, under
the balancer's alias, which stands as a string in every copy of the settings.
A forked child goes on with what its parent knew, on locks of its own
(:mod:`django_proxysql.core.runtime`).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from django.db import connections

from .conf.aliases import introduce_peers, name_of_a_peer
from .conf.engines import peer_engine
from .conf.keys import ALIAS_KEY, NAME_KEY, is_balancer
from .conf.merging import changed_keys, first_reading, merged_settings, options_of
from .conf.reading import balancer_config
from .core import drivers, runtime
from .core.balancer import Attempt, LoadBalancer
from .core.events import Listener
from .core.peer import Peer
from .core.runtime import new_lock
from .core.trials import trial_worker
from .errors import NoPeerAvailable

#: Django's alias of connections to no database in particular.
NO_DB_ALIAS = "__no_db__"


@contextlib.contextmanager
def apart_from_transactions() -> Iterator[None]:
    """Have a listener use connections of its own where this thread's transactions end or are lost.

    At the end a wrapper is in no block any more, and not in autocommit yet: a block that the
    listener opened would leave it so, and what it closed would take the on_commit hooks along. In
    a block whose connection is lost a model's save() marks the block as broken: what the engine
    would run again there fails.
    """
    mine: Any = connections._connections  # type: ignore[attr-defined]
    wrappers: list[tuple[str, Any]] = [
        (alias, getattr(mine, alias, None)) for alias in list(connections.databases)
    ]
    apart = [(alias, one) for alias, one in wrappers if getattr(one, "_is_apart", False)]
    try:
        for alias, _ in apart:
            del connections[alias]
        yield
    finally:
        theirs = [getattr(mine, alias, wrapper) for alias, wrapper in apart]
        for alias, wrapper in apart:
            connections[alias] = wrapper
        # Last: what closing raises keeps none of the thread's own from its place.
        with contextlib.ExitStack() as closing:
            for made, (_, wrapper) in zip(theirs, apart):
                if made is not wrapper:
                    closing.callback(made.close)


class Registered(NamedTuple):
    """A balancer and the settings that this process first read for it."""

    balancer: LoadBalancer
    first_read: Mapping[str, Any]
    #: The dotted path of the backend that the peers have.
    peer_engine: str
    #: By peer: the settings that were merged last, and the outcome.
    merged: dict[str, tuple[dict[str, Any], dict[str, Any]]]

    def __repr__(self) -> str:
        # Without the settings: there may be a password in them.
        return f"<Registered {self.balancer!r}>"

    def is_changed(self, own: Mapping[str, Any]) -> bool:
        """Return whether ``own`` asks for another database, user or server than at first."""
        return bool(changed_keys(own, self.first_read))

    def settings_for(self, peer: Peer, own: Mapping[str, Any], alias: str) -> dict[str, Any]:
        """Return a copy of ``own`` as for ``peer``; a callable PASSWORD stays what it is."""
        known = self.merged.get(peer.name)
        if known is None or known[0] != own:
            # A copy: settings are changed in place, too, by test runners.
            seen = {**own, "OPTIONS": options_of(own)}
            known = seen, merged_settings(peer.config.params, own, self.first_read)
            if "OPTIONS" in own:
                # One assignment: threads see a matching pair.
                self.merged[peer.name] = known
        merged = known[1].copy()
        merged["OPTIONS"] = merged["OPTIONS"].copy()
        if alias == NO_DB_ALIAS:
            merged["NAME"] = own.get("NAME")
        return merged

    def to_connect_with(self, peer: Peer, own: Mapping[str, Any], alias: str) -> dict[str, Any]:
        """Return what to connect to ``peer`` with now: a callable PASSWORD is called."""
        merged = self.settings_for(peer, own, alias)
        return drivers.with_password(merged) if callable(merged.get("PASSWORD")) else merged


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
        """Return the balancer of ``alias`` and what was first read for it."""
        known = self.known.get(alias)
        if known is None:
            if alias not in self._entries:
                # Everything was forgotten; the wrapper is older.
                register(connections.databases[alias], alias)
            # Made outside any lock, for a strategy's module may be imported on
            # the way. Of two threads that come here at once, one's is kept.
            config = balancer_config(alias, self._entries[alias], connections.databases)
            balancer = LoadBalancer(config)
            balancer.group.no_peer_error = NoPeerAvailable
            balancer.group.listeners.within(apart_from_transactions())
            engine = peer_engine(self._entries[alias], connections.databases)
            first_read = self._first_read[alias]
            registered = Registered(balancer, first_read, engine, {})
            balancer.opens = functools.partial(_open_for_trial, alias)
            balancer.asks_for_another = functools.partial(_is_changed, alias, first_read)
            # Together, so that a listener added just now is one of this balancer's.
            with self._listeners_lock:
                for listener, connects in self._listeners:
                    balancer.add_listener(listener, connects=connects)
                known = self.known.setdefault(alias, registered)
        return known

    def add_listener(self, listener: Listener, *, connects: bool = True) -> None:
        """Call ``listener`` with the events of all balancers: those that are there, and later ones.

        See :meth:`LoadBalancer.add_listener`.
        """
        # Guards the listeners, and that each balancer has the same ones.
        with self._listeners_lock:
            if listener in [known for known, _ in self._listeners]:
                return
            self._listeners = (*self._listeners, (listener, connects))
            for registered in list(self.known.values()):
                registered.balancer.add_listener(listener, connects=connects)

    def remove_listener(self, listener: Listener) -> None:
        """Call ``listener`` no longer."""
        # As above.
        with self._listeners_lock:
            self._listeners = tuple(known for known in self._listeners if known[0] != listener)
            for registered in list(self.known.values()):
                registered.balancer.remove_listener(listener)

    def after_fork(self) -> None:
        self._listeners_lock = new_lock()


def _is_changed(alias: str, first_read: Mapping[str, Any]) -> bool:
    """Return whether an alias asks for another database than at first."""
    return bool(changed_keys(connections.databases.get(alias, first_read), first_read))


def _open_for_trial(alias: str, attempt: Attempt) -> Any:
    """Connect for a trial off the request: all that the engine does, on a wrapper of its own."""
    try:
        known: Any = connections[alias]
        # Its own even where the thread has a connection: a signal's
        # receiver may have made one.
        wrapper = type(known)(known.settings_dict, alias)
        wrapper._open_one(balancers.registered(alias), attempt)
        return wrapper
    finally:
        if trial_worker.is_here:
            # What receivers and checks have opened; the thread keeps nothing.
            connections.close_all()


balancers = Balancers()

runtime.at_fork(balancers.after_fork)


def register(settings: dict[str, Any], alias: str) -> None:
    """Note a balancer's settings as this process first sees them, under its alias.

    ``settings`` gets the alias written into it, and an empty NAME filled in from the first
    peer that has one, for Django derives the test database's name from it.

    No other constructor changes what is not its own; a wrapper's does, by this: the house's page
    in the docs says why. A map beside the dict (by its id, by its values) knows no copy, and NAME
    changes in place. The app cannot write it: it need not be installed.
    """
    databases = connections.databases
    # An entry of DATABASES that names a user's subclass of the engine is a
    # balancer's, even if it lacks PEERS; a bare dict without them is not.
    if not is_balancer(settings) and databases.get(alias) is not settings:
        return
    alias = settings.setdefault(ALIAS_KEY, alias)
    if alias in balancers._entries:
        return
    # The entry in DATABASES rather than a copy that somebody has changed.
    entry = databases.get(alias, settings)
    if not is_balancer(entry):
        entry = settings
    if entry.get("NAME", "") == "":
        entry["NAME"] = name_of_a_peer(entry, databases)
    if settings.get("NAME", "") == "":
        settings["NAME"] = entry["NAME"]
    # A copy: with the dict itself a rewritten NAME would be its own first reading.
    as_written = dict(entry)
    first_read = balancers._first_read.setdefault(alias, first_reading(entry))
    for copied in (entry, settings):
        copied.setdefault(NAME_KEY, first_read["NAME"])
    introduce_peers()
    # Last: a thread that finds this finds all.
    balancers._entries.setdefault(alias, as_written)
