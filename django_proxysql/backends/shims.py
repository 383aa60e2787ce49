"""Subclasses of a peer engine's helpers, for those that must know of peers.

``dbshell`` and the cloning of test databases start programs of their own,
with a host and a password on their command line: a live peer's. Test databases
and schema changes are made on one peer from start to end.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from typing import Any

from django.apps import apps
from django.core.checks import Warning
from django.core.exceptions import ImproperlyConfigured
from django.db import DEFAULT_DB_ALIAS, connections
from django.db.utils import OperationalError

from ..conf.aliases import mirrored
from ..conf.engines import peer_engine
from ..conf.keys import ALIAS_KEY
from ..conf.reading import messages
from ..core import drivers
from ..core.peer import Peer
from ..registry import balancers
from .tokens import problems


def on_one_peer(
    connection: Any, peer: Peer | None = None
) -> contextlib.AbstractContextManager[None]:
    """Keep this thread on the peer that ``connection`` leads to, for a block.

    :param connection: a balancer's wrapper; of a bare dict's there is nothing to keep.
    :param peer: where to go if it has no connection; if that is out, to whichever works.
    """
    alias = connection.settings_dict.get(ALIAS_KEY)
    if alias is None:
        return contextlib.nullcontext()
    # A connection that idled may be lost, and with the peer that it leads to the block would be.
    connection.settle()
    peer = connection.peer or peer
    if peer is not None and not peer.is_available:
        peer = None
    return balancers.registered(alias).balancer.pinned(peer)


@functools.cache
def client_class(base: type) -> type:
    """Return an engine's client, opening its shell on a live peer."""

    class DatabaseClient(base):  # type: ignore[misc]
        def runshell(self, *args: Any, **kwargs: Any) -> Any:
            return base(self.connection.on_a_live_peer()).runshell(*args, **kwargs)

    return DatabaseClient


@functools.cache
def creation_class(base: type) -> type:
    """Return the peer engine's creation, making and cloning test databases on one live peer."""

    class DatabaseCreation(peer_creation_class(base)):  # type: ignore[misc]
        def test_db_signature(self) -> Any:
            # Aliases with equal signatures share one test database. A balancer
            # has no HOST: its signature is the least that one of its peers
            # would have alone, whatever their order. Balancers over the same
            # peers share one, and do so with a peer that is the default alias.
            if self.connection.settings_dict.get(ALIAS_KEY) is None:
                return super().test_db_signature()
            signatures = self._signatures()
            if DEFAULT_DB_ALIAS in signatures:
                return signatures[DEFAULT_DB_ALIAS]
            return min(signatures.values(), key=repr)

        def _signatures(self, **settings: Any) -> dict[str, Any]:
            """Return what the peers' signatures would be without us, with ``settings``."""
            own = self.connection.settings_dict
            engine = peer_engine(own, connections.databases)
            registered = balancers.registered(own[ALIAS_KEY])
            found = {}
            for name, peer in registered.balancer.peers.items():
                merged = registered.settings_for(peer, own, self.connection.alias)
                merged.update({"NAME": own.get("NAME"), "ENGINE": engine}, **settings)
                found[name] = _signature(self.connection, base, merged)
            return found

        #: Where the test database was made.
        _peer: Peer | None = None

        def create_test_db(self, *args: Any, **kwargs: Any) -> Any:
            self._refuse_a_second()
            self._refuse_an_overlap()
            # What one statement makes the next one needs: CREATE DATABASE, the
            # tables, mysqldump. Other peers may be a moment behind.
            with on_one_peer(self.connection, self._peer):
                made = super().create_test_db(*args, **kwargs)
            self._peer = self.connection.peer
            return made

        def clone_test_db(self, *args: Any, **kwargs: Any) -> Any:
            with on_one_peer(self.connection, self._peer):
                return super().clone_test_db(*args, **kwargs)

        def destroy_test_db(self, *args: Any, **kwargs: Any) -> Any:
            # What a test has connected to is not where it was made. (A database
            # in memory is not closed, and is where it is.)
            self.connection.close()
            with on_one_peer(self.connection, self._peer):
                return super().destroy_test_db(*args, **kwargs)

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
                if theirs and peer != DEFAULT_DB_ALIAS:
                    creation: Any = connections[peer].creation
                    # So may one be that is to be made after us, by its DEPENDENCIES.
                    if not isinstance(creation, _Mirror) and self._has_name_of(creation):
                        creation.create_test_db = functools.partial(
                            _refuse,
                            f"{peer!r} would make a test database of its own where that of "
                            f"{self.connection.alias!r} is. "
                            "Add 'django_proxysql' to INSTALLED_APPS.",
                        )

        def _has_name_of(self, creation: Any) -> bool:
            return bool(creation._get_test_db_name() == self._get_test_db_name())

        def _refuse_an_overlap(self) -> None:
            # Aliases of one signature have one test database, which is made once.
            # These have two, on servers of which one at least is the other's.
            own = self.connection.settings_dict
            if self._peer or own.get(ALIAS_KEY) is None:
                return
            name = self._get_test_db_name()
            plain = {"NAME": name, "TEST": {**own["TEST"], "NAME": None}}
            ours = list(self._signatures(**plain).values())
            databases = connections.databases
            for alias in connections:
                theirs = databases[alias]
                if alias == self.connection.alias or mirrored(alias, databases) != alias:
                    continue
                creation: Any = connections[alias].creation
                is_made = theirs.get("NAME") == name
                is_plain = theirs.get(ALIAS_KEY) is None
                if not is_made and not (is_plain and self._has_name_of(creation)):
                    # Another balancer, to be made after us, will see this itself.
                    continue
                if not is_made and creation.test_db_signature() == self.test_db_signature():
                    continue
                if is_plain:
                    found = [_signature(creation.connection, type(creation), {**theirs, **plain})]
                else:
                    found = list(creation._signatures(**plain).values())
                if not any(signature in ours for signature in found):
                    continue
                message = (
                    f"{alias!r} and {self.connection.alias!r} would each make a test database "
                    f"{name!r}, and have a server in common. Give one of them a TEST['NAME'] of "
                    "its own, or TEST['MIRROR'] if they are to share one."
                )
                if is_made:
                    raise ImproperlyConfigured(message)
                creation.create_test_db = functools.partial(_refuse, message)

    return DatabaseCreation


def _signature(connection: Any, base: Any, settings: dict[str, Any]) -> Any:
    """Return the signature that ``connection`` would have by ``base`` with other settings."""
    stand_in = copy.copy(connection)
    stand_in.settings_dict = settings
    return base(stand_in).test_db_signature()


def _refuse(message: str, *args: Any, **kwargs: Any) -> None:
    raise ImproperlyConfigured(message)


class _Mirror:
    """Marks the creations that know of mirrors."""


@functools.cache
def peer_creation_class(base: type) -> type:
    """Return an engine's creation, taking a mirror for that of the chain's end, and cloning on a
    live peer."""

    class DatabaseCreation(_Mirror, base):  # type: ignore[misc]
        def set_as_test_mirror(self, primary_settings_dict: dict[str, Any]) -> None:
            # Django would give the last of a chain the name of production, if it
            # met that before the others, and so an alias that mirrors itself.
            alias = self.connection.alias
            target = mirrored(alias, connections.databases)
            if target is None:
                raise ImproperlyConfigured(
                    f"DATABASES[{alias!r}]: TEST['MIRROR'] leads back to where it began. "
                    "Name the alias whose test database this one has."
                )
            if target != alias:
                primary_settings_dict = connections[target].settings_dict
            super().set_as_test_mirror(primary_settings_dict)
            if not hasattr(self.connection, "_test_serialized_contents"):
                # Where the processes of a parallel run are not forked, Django asks each alias
                # of a serialized_rollback for its rows. A mirror has none of its own.
                self.connection._test_serialized_contents = None

        def deserialize_db_from_string(self, data: str | None) -> None:
            if data is not None:
                super().deserialize_db_from_string(data)

        def _clone_db(self, *args: Any, **kwargs: Any) -> Any:
            return base(self.connection.on_a_live_peer())._clone_db(*args, **kwargs)

    if not hasattr(base, "_clone_db"):
        del DatabaseCreation._clone_db
    return DatabaseCreation


@functools.cache
def schema_editor_class(base: type) -> type:
    """Return the peer engine's schema editor, staying on one peer while it is open.

    A migration is one such block, with all its operations. What one of them
    makes the next one needs, and another peer may be a moment behind, or have
    half of it, where the DDL of the lost one was not finished.
    """

    class DatabaseSchemaEditor(base):  # type: ignore[misc]
        def __enter__(self) -> Any:
            # Held by this object alone: if neither __exit__ nor the next line
            # is ever reached, the block ends with it.
            self._stay = on_one_peer(self.connection)
            self._stay.__enter__()
            try:
                return super().__enter__()
            except BaseException:
                self._stay.__exit__(None, None, None)
                raise

        def __exit__(self, *exc_info: Any) -> Any:
            try:
                return super().__exit__(*exc_info)
            finally:
                self._stay.__exit__(None, None, None)

    return DatabaseSchemaEditor


@functools.cache
def validation_class(base: type) -> type:
    """Return the peer engine's validation, with the balancer's own problems added.

    ``check --database`` asks it. Where the app is installed, its check has
    said them already.
    """

    class DatabaseValidation(base):  # type: ignore[misc]
        def check(self, **kwargs: Any) -> list[Any]:
            # Not before: it is a command's business, and no connection's.
            from ..inspection import different_versions

            found = [] if apps.is_installed("django_proxysql") else messages(self.connection.alias)
            alias = self.connection.settings_dict.get(ALIAS_KEY)
            with contextlib.suppress(ImproperlyConfigured):
                # Otherwise the settings' own messages say what is wrong.
                found += [] if alias is None else different_versions(alias)
            return [
                *found,
                *problems(self.connection),
                *super().check(**kwargs),
            ]

    return DatabaseValidation


@functools.cache
def peer_validation_class(base: type) -> type:
    """Return the peer's own engine's validation, of this peer; one that is down is passed by."""

    class DatabaseValidation(base):  # type: ignore[misc]
        def check(self, **kwargs: Any) -> list[Any]:
            connection = self.connection
            if connection.connection is not None:
                return list(super().check(**kwargs))
            try:
                connection.ensure_connection()
            except AssertionError:
                # A test that does not name the alias: Django's TestCase allows it no connection.
                return []
            except OperationalError as exc:
                return [
                    Warning(
                        f"Peer {connection.alias!r} cannot be reached, and was not checked: "
                        f"{drivers.describe(exc)}",
                        hint="Its load balancer does without it.",
                        id="django_proxysql.W007",
                    )
                ]
            try:
                return list(super().check(**kwargs))
            finally:
                connection.close()

    return DatabaseValidation
