"""What is laid over a peer engine's helpers, for those that must know of peers.

``dbshell`` and the cloning of test databases start programs of their own,
with a host and a password on their command line: a live peer's. Test databases
and schema changes are made on one peer from start to end.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from typing import TYPE_CHECKING, Any

from django.apps import apps
from django.core.checks import Warning
from django.core.exceptions import ImproperlyConfigured
from django.db import DEFAULT_DB_ALIAS, connections
from django.db.utils import OperationalError

from ..conf.aliases import alias_peers, mirrored
from ..conf.engines import peer_engine
from ..conf.keys import ALIAS_KEY
from ..conf.reading import messages
from ..core import drivers
from ..core.peer import Peer
from ..registry import balancers
from .tokens import problems

if TYPE_CHECKING:
    from django.db.backends.base.client import BaseDatabaseClient as _Client
    from django.db.backends.base.creation import BaseDatabaseCreation as _Creation
    from django.db.backends.base.schema import BaseDatabaseSchemaEditor as _SchemaEditor
    from django.db.backends.base.validation import BaseDatabaseValidation as _Validation
else:
    _Client = _Creation = _SchemaEditor = _Validation = object


class Helper:
    """A helper class of the peer engine's, with what knows of peers laid over it.

    Looked up when it is asked for: apps put their own in its place (django-pgtrigger), on
    ENGINE's class or the peer engine's, and so does a subclass of the engine.
    """

    def __init__(self, mixin: type) -> None:
        self._mixin = mixin

    def __set_name__(self, owner: type, name: str) -> None:
        self._owner = owner
        self._name = name

    def __get__(self, instance: object, owner: type) -> Any:
        plain = getattr(super(self._owner, owner), self._name)
        # Theirs may be made of one of ours.
        if plain is None or issubclass(plain, self._mixin):
            return plain
        return _laid_over(self._mixin, plain)


@functools.cache
def _laid_over(mixin: Any, plain: Any) -> type:
    """Return the class that is ``mixin`` over ``plain``."""
    return type(plain.__name__, (mixin, plain), {"_plain": plain})


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


class ClientMixin(_Client):
    """Opens the engine's shell on a live peer."""

    _plain: Any
    connection: Any

    def runshell(self, *args: Any, **kwargs: Any) -> Any:
        return self._plain(self.connection.on_a_live_peer()).runshell(*args, **kwargs)


class PeerCreationMixin(_Creation):
    """Takes a mirror for that of the chain's end, and clones on a live peer."""

    _plain: Any
    connection: Any
    _get_test_db_name: Any

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
        # MySQL's, which asks for it; the others' have none.
        return self._plain(self.connection.on_a_live_peer())._clone_db(*args, **kwargs)

    def _has_name_of(self, other: Any) -> bool:
        return bool(other._get_test_db_name() == self._get_test_db_name())


class CreationMixin(PeerCreationMixin):
    """Makes and clones test databases on one live peer."""

    #: Where the test database was made.
    _peer: Peer | None = None

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
            found[name] = _signature(self.connection, self._plain, merged)
        return found

    def create_test_db(self, *args: Any, **kwargs: Any) -> Any:
        if self._peer is None:
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
        for peer, theirs in alias_peers(self.connection.settings_dict):
            creation: Any = connections[peer].creation
            is_made = theirs.get("NAME") == self._get_test_db_name()
            # So may one be that is to be made after us, by its DEPENDENCIES.
            is_to_be = (
                peer != DEFAULT_DB_ALIAS
                and not isinstance(creation, PeerCreationMixin)
                and self._has_name_of(creation)
            )
            if is_made or is_to_be:
                makes, there = ("has made", "is to be") if is_made else ("would make", "is")
                _refuse(
                    creation,
                    is_made,
                    f"{peer!r} {makes} a test database of its own where that of "
                    f"{self.connection.alias!r} {there}. "
                    "Add 'django_proxysql' to INSTALLED_APPS.",
                )

    def _refuse_an_overlap(self) -> None:
        # Aliases of one signature have one test database, which is made once.
        # These have two, on servers of which one at least is the other's.
        own = self.connection.settings_dict
        if own.get(ALIAS_KEY) is None:
            return
        name = self._get_test_db_name()
        plain = {"NAME": name, "TEST": {**own["TEST"], "NAME": None}}
        ours = self._signatures(**plain).values()
        databases = connections.databases
        for alias in connections:
            theirs = databases[alias]
            if alias == self.connection.alias or mirrored(alias, databases) != alias:
                continue
            creation: Any = connections[alias].creation
            is_made = theirs.get("NAME") == name
            is_plain = theirs.get(ALIAS_KEY) is None
            if not is_made:
                # Another balancer, to be made after us, will see this itself.
                if not is_plain or not self._has_name_of(creation):
                    continue
                if creation.test_db_signature() == self.test_db_signature():
                    continue
            if is_plain:
                found = [_signature(creation.connection, type(creation), {**theirs, **plain})]
            else:
                found = list(creation._signatures(**plain).values())
            if any(signature in ours for signature in found):
                _refuse(
                    creation,
                    is_made,
                    f"{alias!r} and {self.connection.alias!r} would each make a test database "
                    f"{name!r}, and have a server in common. Give one of them a TEST['NAME'] of "
                    "its own, or TEST['MIRROR'] if they are to share one.",
                )


def _signature(connection: Any, plain: Any, settings: dict[str, Any]) -> Any:
    """Return the signature that ``connection`` would have by ``plain`` with other settings."""
    stand_in = copy.copy(connection)
    stand_in.settings_dict = settings
    return plain(stand_in).test_db_signature()


def _refuse(creation: Any, is_made: bool, message: str) -> None:
    """Refuse our test database where the other's is there; else the other's, once it is asked for.

    :raises ImproperlyConfigured: it is there.
    """

    def refused(*args: Any, **kwargs: Any) -> None:
        raise ImproperlyConfigured(message)

    if is_made:
        refused()
    creation.create_test_db = refused


class SchemaEditorMixin(_SchemaEditor):
    """Stays on one peer while it is open.

    A migration is one such block, with all its operations. What one of them
    makes the next one needs, and another peer may be a moment behind, or have
    half of it, where the DDL of the lost one was not finished.
    """

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


class ValidationMixin(_Validation):
    """Adds the balancer's own problems.

    ``check --database`` asks it. Where the app is installed, its check has
    said them already.
    """

    def check(self, **kwargs: Any) -> list[Any]:
        # Not before: it is a command's business, and no connection's.
        from ..inspection import different_versions

        found = [] if apps.is_installed("django_proxysql") else messages(self.connection.alias)
        alias = self.connection.settings_dict.get(ALIAS_KEY)
        with contextlib.suppress(ImproperlyConfigured):
            # Otherwise the settings' own messages say what is wrong.
            found += [] if alias is None else different_versions(alias)
        return [*found, *problems(self.connection), *super().check(**kwargs)]


class PeerValidationMixin(_Validation):
    """Checks this peer; one that is down is passed by."""

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
