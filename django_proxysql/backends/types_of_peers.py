"""What the types of a PostgreSQL database are numbered, each peer's own.

An extension's types have numbers that differ from one server to the next,
unless one is the other's copy, block by block. Django remembers them by alias:
hstore's and citext's, and PostGIS's. A second peer's values would be read as
text, and written as something else.
"""

from __future__ import annotations

import sys
import weakref
from typing import TYPE_CHECKING, Any

from ..core.peer import Peer

if TYPE_CHECKING:
    from .connecting import LoadBalancedMixin as _Base
else:
    _Base = object


def has_types(wrapper: type) -> bool:
    """Return whether the peer engine ``wrapper`` is one of databases with types of their own."""
    return getattr(wrapper, "vendor", "") == "postgresql"


class TypesOfPeersMixin(_Base):
    """Lies between our engine and PostgreSQL's own DatabaseWrapper."""

    def connect(self) -> None:
        """Connect, with django.contrib.postgres asking for this peer's types."""
        attempt, settings = self._attempt, self._peer_settings
        if attempt is None or settings is None or _RECEIVERS not in sys.modules:
            super().connect()
            return
        alias = str(self.alias)
        try:
            self.alias = _AliasOfPeer(alias, (attempt.peer.name, settings["NAME"]))
            super().connect()
        finally:
            self.alias = alias


#: Its receivers of connection_created ask for types by ``connection.alias``, and keep the answers.
_RECEIVERS = "django.contrib.postgres.signals"


class _AliasOfPeer(str):
    """A balancer's alias, equal to it, of which that of another peer is another one."""

    __slots__ = ("_of",)

    def __new__(cls, alias: str, of: tuple[Any, ...]) -> _AliasOfPeer:
        made = super().__new__(cls, alias)
        made._of = of
        return made

    _of: tuple[Any, ...]

    def __eq__(self, other: object) -> bool:
        if isinstance(other, _AliasOfPeer) and other._of != self._of:
            return False
        return super().__eq__(other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = str.__hash__


#: PostGIS's, by peer, then by database.
_geometries: weakref.WeakKeyDictionary[Peer, dict[Any, dict[str, dict[str, Any]]]] = (
    weakref.WeakKeyDictionary()
)


def has_geometries(wrapper: type) -> bool:
    """Return whether the peer engine ``wrapper`` remembers PostGIS's types by alias."""
    return isinstance(getattr(wrapper, "_type_infos", None), dict)


class GeometriesOfPeersMixin(_Base):
    """Lies between our engine and PostGIS's own DatabaseWrapper."""

    @property
    def _type_infos(self) -> dict[str, dict[str, Any]]:
        plain: dict[str, dict[str, Any]] = super()._type_infos  # type: ignore[misc]
        peer = self.peer
        if peer is None:
            return plain
        if self.connection is not None:
            database = self.connection.info.dbname
        else:
            # While Django opens a connection it sees the peer's settings.
            database = self.settings_dict["NAME"]
        of_peer = _geometries.setdefault(peer, {})
        return of_peer.setdefault(database, {name: {} for name in plain})
