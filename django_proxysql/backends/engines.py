"""The engine class is made once a peer engine: our mixin over its own DatabaseWrapper.

So vendor, features, ops, introspection and schema editor are the real ones,
and ``isinstance(connection, TheRealDatabaseWrapper)`` holds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from django.apps import apps
from django.db import connections, utils
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.backends.dummy.base import DatabaseWrapper as DummyWrapper

from .. import drivers
from ..conf import ALIAS_KEY, is_balancer, load_wrapper, peer_engine, problems
from ..exceptions import ConfigError
from ..registry import balancers
from .mixin import LoadBalancedMixin
from .pools import PooledMixin, has_pools
from .shims import client_class, creation_class, schema_editor_class, validation_class
from .types_of_peers import (
    GeometriesOfPeersMixin,
    TypesOfPeersMixin,
    has_geometries,
    has_types,
)

__all__ = ["engine_class", "made_over"]


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


def _helpers(wrapper: Any) -> dict[str, Any]:
    editor = wrapper.SchemaEditorClass
    return {
        "client_class": client_class(wrapper.client_class),
        "creation_class": creation_class(wrapper.creation_class),
        "validation_class": validation_class(wrapper.validation_class),
        "SchemaEditorClass": None if editor is None else schema_editor_class(editor),
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
            if has_geometries(wrapper):
                bases.insert(1, GeometriesOfPeersMixin)
            if has_types(wrapper):
                bases.insert(1, TypesOfPeersMixin)
            if has_pools(wrapper):
                bases.insert(1, PooledMixin)
        # Of two threads that come here at once, one's class is kept.
        made = _made.setdefault(
            key,
            type(
                base.__name__,
                tuple(bases),
                {
                    "__module__": base.__module__,
                    "__doc__": base.__doc__,
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
    return any(problem.is_error for problem in problems(alias, settings, connections.databases))
