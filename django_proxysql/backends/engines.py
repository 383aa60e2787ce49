"""The engine class is made once a peer engine: our mixin over its own DatabaseWrapper.

So vendor, features, ops, introspection and schema editor are the real ones,
and ``isinstance(connection, TheRealDatabaseWrapper)`` holds. What ENGINE names is the
class that they are made from. Its metaclass lets it answer as one of them, for code that
asks a backend's class and not a connection.
"""

from __future__ import annotations

import copyreg
import sys
from collections.abc import Callable
from typing import Any

from django.apps import apps
from django.core.exceptions import ImproperlyConfigured
from django.db import connections, utils
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.backends.dummy.base import DatabaseWrapper as DummyWrapper

from ..conf.engines import engine_path, load_wrapper, peer_engine
from ..conf.keys import ALIAS_KEY, is_balancer
from ..conf.reading import in_words, problems, stops_connections
from ..core import drivers
from ..core.exceptions import ConfigError
from ..registry import balancers
from .connecting import LoadBalancedMixin
from .origins import OriginsMixin, is_of_another_package
from .pools import has_pools
from .shims import client_class, creation_class, schema_editor_class, validation_class
from .types_of_peers import GeometriesOfPeersMixin, TypesOfPeersMixin, has_geometries, has_types


class EngineUnknown(ImproperlyConfigured, AttributeError):
    """The class that ENGINE names was asked for something that no settings say."""


class EngineType(type):
    """The type of an ENGINE's DatabaseWrapper, before and after it is made over a peer engine.

    A class that is not made yet has its own attributes (patched ones are that) and those of
    our mixins. All others it has from the class that is made for the settings: vendor,
    SchemaEditorClass, data_types and whatever else a backend's class is asked for.
    """

    _is_made: bool
    _made_of: tuple[Any, ...]
    _class_for_settings: Callable[[], type]

    def __getattribute__(cls, name: str) -> Any:
        plain = super().__getattribute__
        if name.startswith("__") or plain("_is_made"):
            return plain(name)
        for base in plain("__mro__"):
            if base is BaseDatabaseWrapper:
                break
            if name in vars(base):
                return plain(name)
        return getattr(plain("_class_for_settings")(), name)


def _reduced(cls: EngineType) -> Any:
    """Return how to pickle a class: one that is made is known by no name."""
    return (made_over, cls._made_of) if cls._is_made else cls.__qualname__


copyreg.pickle(EngineType, _reduced)


def first_class(cls: type) -> type:
    """Return what ``cls`` is made to for the first balancer whose ENGINE it is, else for the first.

    :raises EngineUnknown: there is none, or what its peers' engine is cannot be said.
    """
    try:
        entries = {
            a: entry for a, entry in list(connections.databases.items()) if is_balancer(entry)
        }
    except ImproperlyConfigured as exc:
        raise EngineUnknown(f"The engine of the peers is not known: {exc}") from exc
    if not entries:
        raise EngineUnknown("The engine of the peers is not known: DATABASES has no load balancer.")
    own = (alias for alias, entry in entries.items() if _engine_of(entry) is cls)
    alias = next(own, next(iter(entries)))
    entry = entries[alias]
    made = engine_class(cls, entry, alias)
    if issubclass(made, _Unknown):
        said = next(map(in_words, problems(alias, entry, connections.databases)), "")
        raise EngineUnknown(f"The engine of the peers of {alias!r} is not known. {said}".rstrip())
    return made


class _Unknown(DummyWrapper):
    """Stands for the backend where settings are wrong, until connect() says so.

    Django's checks ask a connection for its features, of which many depend on
    the server: those of the real backend would connect, and what that raises
    would stand in the place of the checks' messages.
    """

    #: PEP 249's exceptions, which wrap_database_errors asks for.
    Database = utils
    # Django's own complain of missing settings; connect() has more to say.
    ensure_connection = BaseDatabaseWrapper.ensure_connection
    _cursor = getattr(BaseDatabaseWrapper, "_cursor")  # noqa: B009 - unknown to the stubs


_made: dict[tuple[type, type], type] = {}


def engine_class(base: type, settings: dict[str, Any], alias: str) -> type:
    """Return the class of wrappers for the balancer whose settings these are.

    :param base: the engine's DatabaseWrapper, or a user's subclass of it.
    """
    wrapper: Any = _Unknown
    # What is wrong is said by the checks and at connect; never where a wrapper is made.
    if not _is_misconfigured(settings, alias):
        try:
            wrapper = load_wrapper(peer_engine(settings, connections.databases))
        except ConfigError:
            pass
    return made_over(wrapper, base, _helpers)


def _engine_of(entry: dict[str, Any]) -> object:
    """Return the class that an entry's ENGINE names, if its module has been imported."""
    module = sys.modules.get(f"{engine_path(entry.get('ENGINE'))}.base")
    return getattr(module, "DatabaseWrapper", None)


class _Helper:
    """A helper class of the peer engine's, made to know of peers.

    Looked up when it is asked for: apps put their own in its place (django-pgtrigger), on
    ENGINE's class or the peer engine's, and so does a subclass of the engine.
    """

    def __init__(self, with_peers: Callable[[type], type]) -> None:
        self._with_peers = with_peers

    def __set_name__(self, owner: type, name: str) -> None:
        self._owner = owner
        self._name = name

    def __get__(self, instance: object, owner: type) -> type | None:
        plain = getattr(super(self._owner, owner), self._name)
        if plain is None or getattr(plain, "_knows_of_peers", False):
            return plain  # type: ignore[no-any-return]
        made = self._with_peers(plain)
        made._knows_of_peers = True  # type: ignore[attr-defined]
        return made


def _helpers(wrapper: Any) -> dict[str, Any]:
    return {
        "client_class": _Helper(client_class),
        "creation_class": _Helper(creation_class),
        "validation_class": _Helper(validation_class),
        "SchemaEditorClass": _Helper(schema_editor_class),
    }


def made_over(wrapper: Any, base: type, namespace: Callable[[Any], dict[str, Any]]) -> type:
    """Return the class that is ``base`` over the DatabaseWrapper of a real backend.

    :param wrapper: that backend's class.
    :param base: one of our engines' classes, or a user's subclass of it.
    :param namespace: gives what the class has besides, when it is first made.
    """
    key = (base, wrapper)
    made = _made.get(key)
    if made is None:
        bases: list[Any] = [base, wrapper]
        # What an engine keeps by alias is kept apart where there is a peer to do it by.
        if issubclass(base, LoadBalancedMixin):
            if is_of_another_package(wrapper) and wrapper is not _Unknown:
                bases.insert(1, OriginsMixin)
            if has_geometries(wrapper):
                bases.insert(1, GeometriesOfPeersMixin)
            if has_types(wrapper):
                bases.insert(1, TypesOfPeersMixin)
            if has_pools(wrapper):
                from .pooled import PooledMixin

                bases.insert(1, PooledMixin)
        # Of two threads that come here at once, one's class is kept.
        made = _made.setdefault(
            key,
            EngineType(
                base.__name__,
                tuple(bases),
                {
                    "__module__": base.__module__,
                    "__doc__": base.__doc__,
                    "_is_made": True,
                    "_made_of": (wrapper, base, namespace),
                    "_driver": drivers.driver_of_engine(wrapper),
                    **namespace(wrapper),
                },
            ),
        )
    return made


def _is_misconfigured(settings: dict[str, Any], alias: str) -> bool:
    # A balancer that is at work has passed. Before all apps are loaded, what
    # cannot be imported now may be a moment later.
    if settings.get(ALIAS_KEY) in balancers.known or not apps.ready or not is_balancer(settings):
        return False
    return any(map(stops_connections, problems(alias, settings, connections.databases)))
