"""Subclasses of a peer engine's helpers, for those that need one peer's address.

``dbshell`` and the cloning of test databases start programs of their own,
with a host and a password on their command line: a live peer's.
"""

from __future__ import annotations

import functools
from typing import Any

from django.apps import apps

from ..conf import ALIAS_KEY
from ..messages import messages
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
    """Return the peer engine's creation, cloning test databases on a live peer."""

    class DatabaseCreation(base):  # type: ignore[misc]
        def test_db_signature(self) -> Any:
            # Aliases with equal signatures share one test database. Two
            # balancers have no HOST to tell them apart: their peers do.
            alias = self.connection.settings_dict.get(ALIAS_KEY)
            peers = () if alias is None else balancers[alias].peers.values()
            return (*super().test_db_signature(), *sorted(peer.address for peer in peers))

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
