"""The engine class is made once a peer engine: our mixin over its own DatabaseWrapper.

So vendor, features, ops, introspection and schema editor are the real ones,
and ``isinstance(connection, TheRealDatabaseWrapper)`` holds.
"""

from __future__ import annotations

from typing import Any

from django.db import connections
from django.db.utils import load_backend

from ..conf import is_balancer, peer_engine
from .shims import client_class, creation_class, validation_class

__all__ = ["engine_class"]

_made: dict[tuple[type, type], type] = {}


def engine_class(base: type, settings: dict[str, Any]) -> type:
    """Return the class of wrappers for the balancer whose settings these are.

    :param base: the engine's DatabaseWrapper, or a user's subclass of it.
    :raises ImproperlyConfigured: the peers' backend cannot be imported.
    """
    databases = connections.databases
    path = peer_engine(settings, databases)
    if is_balancer({"ENGINE": path}):
        # Reported by the checks and at connect; until then the wrapper must
        # be made of something.
        path = "django.db.backends.dummy"
    wrapper = load_backend(path).DatabaseWrapper
    key = (base, wrapper)
    made = _made.get(key)
    if made is None:
        # Of two threads that come here at once, one's class is kept.
        made = _made.setdefault(
            key,
            type(
                base.__name__,
                (base, wrapper),
                {
                    "__module__": base.__module__,
                    "__doc__": base.__doc__,
                    "client_class": client_class(wrapper.client_class),
                    "creation_class": creation_class(wrapper.creation_class),
                    "validation_class": validation_class(wrapper.validation_class),
                },
            ),
        )
    return made
