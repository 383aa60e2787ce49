"""The backends of the peers: which one an entry means, and how it is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from django.core.exceptions import ImproperlyConfigured
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.backends.dummy.base import DatabaseWrapper as DummyWrapper
from django.db.utils import load_backend

from ..core.exceptions import ConfigError
from .keys import DEFAULT_PEER_ENGINE, NO_ENGINE, PEER_ALIAS_ENGINE, is_balancer, peers_of


class PeerEngine(str):
    """The ENGINE of an alias that serves as a peer: what the user wrote, and whose peer it is.

    It compares, hashes and is stored as the dotted path that the user wrote,
    for that is what others ask an ENGINE for: Django's test runner,
    pytest-django, backup tools. Only written out, as :func:`load_backend` does
    to import it, does it name our engine for peers. Should a future Django
    import it in another way, the peer has its plain engine, as before.

    :param path: the backend's dotted path.
    :param balancer: the load balancer's alias.
    :param peer: the peer's alias.
    """

    __slots__ = ("balancer", "peer")

    balancer: str
    peer: str

    def __new__(cls, path: str, balancer: str, peer: str) -> PeerEngine:
        made = super().__new__(cls, path)
        made.balancer = balancer
        made.peer = peer
        return made

    def __str__(self) -> str:
        return PEER_ALIAS_ENGINE

    def __reduce__(self) -> tuple[Any, ...]:
        # Settings are copied, and pickled for processes of a test run.
        return PeerEngine, (self.path, self.balancer, self.peer)

    @property
    def path(self) -> str:
        """The dotted path that the user wrote, as a plain string."""
        return super().__str__()


def engine_path(engine: Any) -> str:
    """Return the dotted path of an ENGINE as the user wrote it."""
    return engine.path if isinstance(engine, PeerEngine) else str(engine)


def peer_engine(entry: Mapping[str, Any], databases: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the dotted path of the backend that an entry's peers have."""
    explicit = entry.get("PEER_ENGINE")
    if explicit:
        return str(explicit)
    for alias, settings in peers_of(entry, databases):
        if alias is not None and not is_balancer(settings):
            return engine_path(settings.get("ENGINE") or NO_ENGINE)
        if alias is None and settings.get("ENGINE"):
            return str(settings["ENGINE"])
    return DEFAULT_PEER_ENGINE


def load_wrapper(path: str) -> type[BaseDatabaseWrapper]:
    """Return the DatabaseWrapper of the backend at ``path``.

    :raises ConfigError: there is none that a peer can have, or its driver is missing.
    """
    try:
        wrapper: type[BaseDatabaseWrapper] = load_backend(path).DatabaseWrapper
    except (ImproperlyConfigured, ImportError, AttributeError, OSError, TypeError) as exc:
        # OSError: a library, such as GDAL, that is named in the settings and cannot be loaded.
        # TypeError: a relative path.
        said = " ".join(str(exc).split()).rstrip(".")
        raise ConfigError("PEER_ENGINE", f"is {path!r}, which cannot be loaded: {said}") from exc
    # Our own engine has a peer's below it; it is none to be below one.
    is_ours = not getattr(wrapper, "_is_made", True)
    if is_ours or not issubclass(wrapper, BaseDatabaseWrapper) or issubclass(wrapper, DummyWrapper):
        raise ConfigError("PEER_ENGINE", f"is {path!r}, which is no database's")
    return wrapper
