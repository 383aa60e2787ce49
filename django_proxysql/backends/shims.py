"""Subclasses of a peer engine's helpers, for those that need one peer's address.

``dbshell`` and the cloning of test databases start programs of their own,
with a host and a password on their command line: a live peer's.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from typing import Any

from django.apps import apps
from django.core.exceptions import ImproperlyConfigured
from django.db import DEFAULT_DB_ALIAS, connections

from ..conf import ALIAS_KEY, merged_settings, peer_engine
from ..messages import messages
from ..peer import Peer
from ..registry import balancers

__all__ = ["client_class", "creation_class", "validation_class"]


@functools.cache
def client_class(base: type) -> type:
    """Return the peer engine's client, opening its shell on a live peer."""

    class DatabaseClient(base):  # type: ignore[misc]
        def runshell(self, *args: Any, **kwargs: Any) -> Any:
            return base(self.connection.on_a_live_peer()).runshell(*args, **kwargs)

    return DatabaseClient


@functools.cache
def creation_class(base: type) -> type:
    """Return the peer engine's creation, making and cloning test databases on one live peer."""

    class DatabaseCreation(base):  # type: ignore[misc]
        def test_db_signature(self) -> Any:
            # Aliases with equal signatures share one test database. A balancer
            # has no HOST: its signature is the least that one of its peers
            # would have alone, whatever their order. Balancers over the same
            # peers share one, and do so with a peer that is the default alias.
            own = self.connection.settings_dict
            alias = own.get(ALIAS_KEY)
            if alias is None:
                return super().test_db_signature()
            engine = peer_engine(own, connections.databases)
            registered = balancers.registered(alias)
            stand_in = copy.copy(self.connection)
            signatures = {}
            for name, peer in registered.balancer.peers.items():
                merged = merged_settings(peer.config.params, own, registered.first_read)
                stand_in.settings_dict = {**merged, "NAME": own.get("NAME"), "ENGINE": engine}
                signatures[name] = base(stand_in).test_db_signature()
            if DEFAULT_DB_ALIAS in signatures:
                return signatures[DEFAULT_DB_ALIAS]
            return min(signatures.values(), key=repr)

        #: Where the test database was made.
        _peer: Peer | None = None

        def create_test_db(self, *args: Any, **kwargs: Any) -> Any:
            self._refuse_a_second()
            with self._on_one_peer():
                made = super().create_test_db(*args, **kwargs)
            self._peer = self.connection.peer
            return made

        def clone_test_db(self, *args: Any, **kwargs: Any) -> Any:
            with self._on_one_peer():
                return super().clone_test_db(*args, **kwargs)

        def _refuse_a_second(self) -> None:
            # Where the app is not installed and the peers stand before their
            # balancer, Django has met them before they were made its mirrors.
            # (After a run of ours that NAME is the mirror's.)
            peers = () if self._peer else self.connection.settings_dict.get("PEERS") or ()
            for peer in peers:
                theirs = connections.databases.get(peer) if isinstance(peer, str) else None
                if theirs and theirs.get("NAME") == self._get_test_db_name():
                    raise ImproperlyConfigured(
                        f"{peer!r} has made a test database of its own where that of "
                        f"{self.connection.alias!r} is to be. "
                        "Add 'django_proxysql' to INSTALLED_APPS."
                    )

        def _on_one_peer(self) -> contextlib.AbstractContextManager[None]:
            # What one statement makes the next one needs: CREATE DATABASE, the
            # tables, mysqldump. Other peers may be a moment behind.
            alias = self.connection.settings_dict.get(ALIAS_KEY)
            if alias is None:
                return contextlib.nullcontext()
            peer = self.connection.peer or self._peer
            if peer is not None and not peer.is_available:
                peer = None
            return balancers.registered(alias).balancer.pinned(peer)

        def _clone_db(self, *args: Any, **kwargs: Any) -> Any:
            return base(self.connection.on_a_live_peer())._clone_db(*args, **kwargs)

    if not hasattr(base, "_clone_db"):
        del DatabaseCreation._clone_db
    return DatabaseCreation


@functools.cache
def validation_class(base: type) -> type:
    """Return the peer engine's validation, with the balancer's own problems added.

    ``check --database`` asks it. Where the app is installed, its check has
    said them already.
    """

    class DatabaseValidation(base):  # type: ignore[misc]
        def check(self, **kwargs: Any) -> list[Any]:
            found = [] if apps.is_installed("django_proxysql") else messages(self.connection.alias)
            return [*found, *super().check(**kwargs)]

    return DatabaseValidation
