"""The engine of an alias that serves as a peer, for connections straight to that one server.

It is the peer's own engine, but for three things. What Django asks a database without having a
connection (its features, its version) the load balancer answers, from a server that works: commands
look at every alias, and would end, or hang, with a peer that is down. Connecting takes no longer
than ``CONNECT_TIMEOUT``. And a forked child leaves the connection to its parent.
Queries go to the peer and nowhere else.
"""

from __future__ import annotations

import copy
import os
from typing import TYPE_CHECKING, Any

from django.core.exceptions import ImproperlyConfigured
from django.db import connections
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.utils import OperationalError, load_backend
from django.utils.functional import cached_property

from ...conf.engines import PeerEngine
from ...conf.keys import PEER_ALIAS_ENGINE, is_balancer
from ...core import drivers
from ...core.balancer import LoadBalancer
from ...core.ready import throw_away
from ...registry import balancers
from ..connecting import forget_cached
from ..engines import EngineType, EngineUnknown, has_pools, made_over
from ..sessions import close_in_child, remember
from ..shims import ClientMixin, Helper, PeerCreationMixin, PeerValidationMixin

#: What wrappers ask a server for, and keep, in one Django or another.
FACTS = (
    "mysql_server_data",
    "mysql_server_info",
    "pg_version",
    "oracle_version",
    "cockroachdb_server_info",
)


class DatabaseWrapper(BaseDatabaseWrapper, metaclass=EngineType):
    """A connection to one peer: an instance of this and of the peer's own engine's class.

    As a class it has the attributes of the engine of the first alias that is a peer.
    """

    #: Whether the peer's own engine is mixed in.
    _is_made = False

    #: The driver's module, and what is known of it; set in the class made.
    Database: Any
    _driver: drivers.Driver
    #: The peer's own engine's class is the first.
    _made_of: tuple[type[BaseDatabaseWrapper], type]

    _own_features: Any = None
    _is_connecting = False
    #: Something that the balancer has said may be kept here.
    _has_borrowed = False
    #: Tells the present connection's socket from whatever has its number later.
    _socket: tuple[int, int, int] | None = None

    @classmethod
    def _made_for(cls, settings_dict: dict[str, Any], *args: Any, **kwargs: Any) -> EngineType:
        engine = settings_dict.get("ENGINE")
        if not isinstance(engine, PeerEngine):
            raise ImproperlyConfigured(
                f"{PEER_ALIAS_ENGINE!r} is no ENGINE to name in DATABASES. Name the peer's "
                "own: ours is laid over that where a load balancer lists the alias."
            )
        return made_over(load_backend(engine.path).DatabaseWrapper, cls)

    @classmethod
    def _class_for_settings(cls) -> type:
        for entry in list(connections.databases.values()):
            engine = entry.get("ENGINE")
            if isinstance(engine, PeerEngine):
                return made_over(load_backend(engine.path).DatabaseWrapper, cls)
        raise EngineUnknown("The engine of the peers is not known: no alias is a peer.")

    @staticmethod
    def _namespace(real: Any) -> dict[str, Any]:
        return {
            "client_class": Helper(ClientMixin),
            "creation_class": Helper(PeerCreationMixin),
            "validation_class": Helper(PeerValidationMixin),
            # A connection straight to the peer is one that is made now, within
            # CONNECT_TIMEOUT and with the PASSWORD of now.
            **({"pool": None} if has_pools(real) else {}),
            **{name: _fact(name, getattr(real, name)) for name in FACTS if hasattr(real, name)},
        }

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        remember(self)

    # Asked without a connection

    @property
    def features(self) -> Any:
        """The balancer's, until there is a connection to this peer."""
        other = self._balanced()
        return self._own_features if other is None else _Features(other, self._own_features)

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
        if not isinstance(other, self._made_of[0]):
            return None
        # In a transaction that has failed nothing can be asked.
        if other.needs_rollback or (other.in_atomic_block and other.errors_occurred):
            return None
        self._has_borrowed = True
        return other

    # Connecting

    def connect(self) -> None:
        """Connect to this peer, whatever its circuit says."""
        self._is_connecting = True
        try:
            if self._has_borrowed:
                # Forget what the balancer has said, and what was concluded from it. Before Django
                # connects, for it asks for features meanwhile.
                self._has_borrowed = False
                forget_cached(self, type(self))
            super().connect()
        finally:
            self._is_connecting = False

    def get_connection_params(self) -> dict[str, Any]:
        """Return the engine's own, with CONNECT_TIMEOUT.

        A callable PASSWORD is called where something is being connected, and stays what it
        is for code that only asks, as tracing does at each query.
        """
        params: dict[str, Any] = super().get_connection_params()
        if self._is_connecting:
            params = drivers.with_password(params)
        balancer = self._balancer()
        if balancer is not None:
            seconds = balancer.config.connect_timeout
            params.update(self._driver.connect_options(params, seconds))
        return params

    def get_new_connection(self, conn_params: dict[str, Any]) -> Any:
        """Open the driver's connection; to a peer in doubt a throw-away one goes ahead."""
        conn_params = drivers.with_password(conn_params)
        balancer = self._balancer()
        if balancer is not None:
            peer = balancer.peers.get(self.settings_dict["ENGINE"].peer)
            if peer is not None and not peer.breaker.is_available:
                # As a trial's: it may freeze when it has let us in.
                config = balancer.config
                seconds = config.trial_timeout or config.connect_timeout
                if self._driver.trial_options(conn_params, seconds):
                    with throw_away(self._driver, self.Database.connect, conn_params, seconds):
                        pass
        connection = super().get_new_connection(conn_params)
        self._socket = _socket_at(self._driver.fileno(connection))
        return connection

    def _balancer(self) -> LoadBalancer | None:
        alias = getattr(self.settings_dict.get("ENGINE"), "balancer", None)
        try:
            return None if alias is None else balancers[alias]
        except (KeyError, ImproperlyConfigured):
            # It is there no longer, or says itself what is wrong with it.
            return None

    def on_a_live_peer(self) -> DatabaseWrapper:
        """Return a copy of this wrapper, without a connection, whose PASSWORD is no callable."""
        stand_in = copy.copy(self)
        stand_in.connection = None
        stand_in.settings_dict = drivers.with_password(self.settings_dict)
        return stand_in

    # Forked

    def _after_fork(self) -> None:
        """In a forked child: leave the connection to the parent, whose it is.

        Outside a transaction the wrapper is as one that has not connected yet.
        Inside, the transaction is the parent's: the next statement fails.
        """
        connection = self.connection
        if connection is None or not self._driver.LEAVES:
            return
        if self._socket is not None and _socket_at(self._socket[0]) != self._socket:
            # The driver has lost it, and its number may be another's now.
            return
        self._driver.leave(connection)
        if self._is_connecting or self.in_atomic_block or not self.autocommit:
            return
        self.connection = None
        close_in_child(connection, self._driver)


def _socket_at(descriptor: int | None) -> tuple[int, int, int] | None:
    """Return a descriptor, and which socket it is; None where there is none."""
    if descriptor is None:
        return None
    try:
        found = os.fstat(descriptor)
    except OSError:
        return None
    return descriptor, found.st_dev, found.st_ino


class _Features:
    """The balancer's features; of each that the balancer cannot tell, this peer's own.

    Many are asked of the server, when they are asked for.
    """

    __slots__ = ("_other", "_own")

    if not TYPE_CHECKING:
        #: For isinstance().
        __class__ = property(lambda self: type(self._own))

    def __init__(self, other: Any, own: Any) -> None:
        object.__setattr__(self, "_other", other)
        object.__setattr__(self, "_own", own)

    def __getattr__(self, name: str) -> Any:
        try:
            return getattr(self._other.features, name)
        except OperationalError:
            # No peer is ready, say; this one may be up all the same.
            return getattr(self._own, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._other.features, name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self._other.features, name)


def _fact(name: str, own: Any) -> Any:
    """Return a cached property: what the balancer says, or ``own`` where it is not asked."""

    def fact(self: DatabaseWrapper) -> Any:
        other = self._balanced()
        if other is not None:
            try:
                return getattr(other, name)
            except OperationalError:
                # It has no peer to ask; this one may be up all the same.
                pass
        return own.__get__(self, type(self))

    fact.__name__ = name
    fact.__doc__ = own.__doc__
    return cached_property(fact)
