"""The engine of an alias that serves as a peer, for connections straight to that one server.

It is the peer's own engine, but for two things. What Django asks a database
without having a connection (its features, its version) it is told by the load
balancer, which asks a server that works: commands look at every alias, and
would end, or hang, with a peer that is down. And connecting takes no longer
than ``CONNECT_TIMEOUT``. Queries go to the peer and nowhere else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from django.core.exceptions import ImproperlyConfigured
from django.db import DEFAULT_DB_ALIAS, connections
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.utils import load_backend
from django.utils.functional import cached_property

from ... import drivers
from ...balancer import LoadBalancer
from ...conf import PEER_ALIAS_ENGINE, PeerEngine, is_balancer
from ...registry import balancers
from ..engines import made_over
from ..shims import mirror_class, peer_validation_class

if TYPE_CHECKING:
    _Base = BaseDatabaseWrapper
else:
    _Base = object

__all__ = ["DatabaseWrapper"]

#: What wrappers ask a server for, and keep, in one Django or another.
FACTS = (
    "mysql_server_data",
    "mysql_server_info",
    "pg_version",
    "oracle_version",
    "cockroachdb_server_info",
)


class DatabaseWrapper(_Base):
    """A connection to one peer: an instance of this and of the peer's own engine's class."""

    #: The driver's module, and what is known of it; set in the class made.
    Database: Any
    _driver: drivers.Driver
    #: The peer's own engine's class.
    _real: type[BaseDatabaseWrapper]

    _own_features: Any = None
    _is_connecting = False

    def __new__(
        cls,
        settings_dict: dict[str, Any] | None = None,
        alias: str = DEFAULT_DB_ALIAS,
        *args: Any,
        **kwargs: Any,
    ) -> DatabaseWrapper:
        # copy.copy() calls the finished class without arguments.
        if not issubclass(cls, BaseDatabaseWrapper):
            engine = (settings_dict or {}).get("ENGINE")
            if not isinstance(engine, PeerEngine):
                raise ImproperlyConfigured(
                    f"{PEER_ALIAS_ENGINE!r} is no ENGINE to name in DATABASES. Name the peer's "
                    "own: ours is laid over that where a load balancer lists the alias."
                )
            cls = made_over(load_backend(engine.path).DatabaseWrapper, cls, _namespace)
        return super().__new__(cls)

    # Asked without a connection

    @property
    def features(self) -> Any:
        """The balancer's, until there is a connection to this peer."""
        other = self._balanced()
        return self._own_features if other is None else other.features

    @features.setter
    def features(self, features: Any) -> None:
        self._own_features = features

    def _balanced(self) -> Any:
        """Return this thread's connection to the balancer, if it is to be asked."""
        if self.connection is not None or self._is_connecting:
            return None
        alias = getattr(self.settings_dict.get("ENGINE"), "balancer", None)
        if alias is None or not is_balancer(connections.databases.get(alias, {})):
            return None
        other = connections[alias]
        # Where the balancer's settings are wrong it is of no engine that we know.
        if not isinstance(other, self._real):
            return None
        # In a transaction that has failed nothing can be asked.
        if other.needs_rollback or (other.in_atomic_block and other.errors_occurred):
            return None
        return other

    # Connecting

    def connect(self) -> None:
        """Connect to this peer, whatever its circuit says."""
        self._is_connecting = True
        try:
            super().connect()
        finally:
            self._is_connecting = False

    def get_connection_params(self) -> dict[str, Any]:
        """Return the engine's own, with CONNECT_TIMEOUT, and a callable PASSWORD called."""
        params: dict[str, Any] = super().get_connection_params()
        for key in ("password", "passwd"):
            if key in params:
                params[key] = drivers.password_from(params[key])
        balancer = self._balancer()
        if balancer is not None:
            seconds = balancer.config.connect_timeout
            params.update(self._driver.connect_options(params, seconds))
        return params

    def get_new_connection(self, conn_params: dict[str, Any]) -> Any:
        """Open the driver's connection; to a peer in doubt a throw-away one goes ahead."""
        balancer = self._balancer()
        if balancer is not None:
            peer = balancer.peers.get(self.settings_dict["ENGINE"].peer)
            if peer is not None and not peer.breaker.is_available:
                # As a trial's: it may freeze when it has let us in.
                config = balancer.config
                seconds = config.trial_timeout or config.connect_timeout
                bounds = self._driver.trial_options(conn_params, seconds)
                if bounds:
                    self.Database.connect(**{**conn_params, **bounds}).close()
        return super().get_new_connection(conn_params)

    def _balancer(self) -> LoadBalancer | None:
        alias = getattr(self.settings_dict.get("ENGINE"), "balancer", None)
        try:
            return None if alias is None else balancers[alias]
        except (KeyError, ImproperlyConfigured):
            # It is there no longer, or says itself what is wrong with it.
            return None


def _namespace(real: type[Any]) -> dict[str, Any]:
    """Return what the class over ``real`` has besides."""
    return {
        "_real": real,
        "creation_class": mirror_class(real.creation_class),
        "validation_class": peer_validation_class(real.validation_class),
        **{name: _fact(name, getattr(real, name)) for name in FACTS if hasattr(real, name)},
    }


def _fact(name: str, own: Any) -> Any:
    """Return a cached property: what the balancer says, or ``own`` where it is not asked."""

    def fact(self: DatabaseWrapper) -> Any:
        other = self._balanced()
        return own.__get__(self, type(self)) if other is None else getattr(other, name)

    fact.__name__ = name
    fact.__doc__ = own.__doc__
    return cached_property(fact)
