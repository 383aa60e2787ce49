"""Does a connection lead to the peer that it was asked for?

A backend of another package may keep connections of its own, by alias, and give one
peer's to all of them: each circuit would count another server's faults. No list names all such
backends. Their connections say where they lead.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from django.core.exceptions import ImproperlyConfigured

from ..core.balancer import LoadBalancer

if TYPE_CHECKING:
    from .connecting import LoadBalancedMixin as _Base
else:
    _Base = object

_Endpoint = tuple[str, str]

#: Where each peer's connections were last seen to lead, by the peer's name.
_seen: weakref.WeakKeyDictionary[LoadBalancer, dict[str, _Endpoint]] = weakref.WeakKeyDictionary()
#: What is wrong, once it has been found out.
_wrong: weakref.WeakKeyDictionary[LoadBalancer, str] = weakref.WeakKeyDictionary()


def is_of_another_package(wrapper: type) -> bool:
    """Return whether a backend's class has code of others than Django."""
    return any(
        cls is not object and cls.__module__.partition(".")[0] != "django"
        for cls in wrapper.__mro__
    )


class OriginsMixin(_Base):
    """Lies between our engine and a DatabaseWrapper of another package."""

    def connect(self) -> None:
        """Connect, and look where that leads.

        :raises ImproperlyConfigured: it leads to another peer, or has done so: the next peer's
            connections are no better.
        """
        registered = self._registered()
        wrong = None if registered is None else _wrong.get(registered.balancer)
        if wrong is not None:
            raise ImproperlyConfigured(wrong)
        super().connect()
        # Where get_new_connection() is not called.
        self._look_where(self.connection)

    def get_new_connection(self, conn_params: dict[str, Any]) -> Any:
        """Open the driver's connection, or what the backend has for one; look where it leads."""
        connection = super().get_new_connection(conn_params)
        try:
            self._look_where(connection)
        except BaseException:
            # The backend's, to do with it what it does.
            self.connection = connection
            raise
        return connection

    def _look_where(self, connection: Any) -> None:
        attempt, settings = self._attempt, self._peer_settings
        registered = self._registered()
        if attempt is None or settings is None or registered is None:
            return
        try:
            found = self._driver.leads_to(connection)
        except Exception:
            # Something that is no driver's connection.
            return
        if found is None:
            return
        seen = _seen.setdefault(registered.balancer, {})
        name = attempt.peer.name
        if not _leads_to(settings, found):
            # An engine may go another way than its settings say (by a tunnel), but not to
            # another peer, nor the same way for two.
            own = self._own_settings or self.settings_dict
            for other in registered.balancer.peers.values():
                if other is attempt.peer:
                    continue
                theirs = registered.settings_for(other, own, self.alias)
                if seen.get(other.name) == found or (_hosts(theirs) and _leads_to(theirs, found)):
                    wrong = _wrong[registered.balancer] = (
                        f"DATABASES[{registered.balancer.name!r}]: PEER_ENGINE gave for peer "
                        f"{name!r} a connection to {other.name!r} ({':'.join(found)}): "
                        f"{_backend_of(type(self))} keeps connections that it does not tell apart "
                        "by peer. Give the backend that it builds on; CONN_MAX_AGE keeps "
                        "connections, each to its own peer."
                    )
                    raise ImproperlyConfigured(wrong)
        seen[name] = found


def _leads_to(settings: Mapping[str, Any], found: _Endpoint) -> bool:
    """Return whether a peer's settings lead to an endpoint, as far as they say where."""
    host, port = found
    hosts, ports = _hosts(settings), _given(settings, "PORT", "port")
    return (not hosts or host.lower() in hosts) and (not ports or port in ports)


def _hosts(settings: Mapping[str, Any]) -> set[str]:
    return _given(settings, "HOST", "host")


def _given(settings: Mapping[str, Any], key: str, option: str) -> set[str]:
    given = settings.get(key), settings["OPTIONS"].get(option)
    return {str(value).lower() for value in given if value}


def _backend_of(made: type) -> str:
    real: type = made._made_of[0]  # type: ignore[attr-defined]
    return real.__module__
