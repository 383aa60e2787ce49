"""PostGIS: what the types of a database are numbered, each peer's own.

An extension's types have numbers that differ from one server to the next,
unless one is the other's copy, block by block. Django remembers them by alias:
a second peer's geometries would be read as text, and written as something else.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from ..peer import Peer

if TYPE_CHECKING:
    from .mixin import LoadBalancedMixin as _Base
else:
    _Base = object

__all__ = ["TypesOfPeersMixin", "has_types"]

#: By peer, then by database.
_types: weakref.WeakKeyDictionary[Peer, dict[Any, dict[str, dict[str, Any]]]] = (
    weakref.WeakKeyDictionary()
)


def has_types(wrapper: type) -> bool:
    """Return whether the peer engine ``wrapper`` remembers types by alias."""
    return isinstance(getattr(wrapper, "_type_infos", None), dict)


class TypesOfPeersMixin(_Base):
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
        of_peer = _types.setdefault(peer, {})
        return of_peer.setdefault(database, {name: {} for name in plain})
