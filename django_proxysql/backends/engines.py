"""The engine class is made once a peer engine: our mixin over its own DatabaseWrapper.

So vendor, features, ops, introspection and schema editor are the real ones,
and ``isinstance(connection, TheRealDatabaseWrapper)`` holds. What ENGINE names is the
class that they are made from. Its metaclass lets it answer as one of them, for code that
asks a backend's class and not a connection.
"""

from __future__ import annotations

import copyreg
import sys
import weakref
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from django.apps import apps
from django.core.exceptions import ImproperlyConfigured
from django.db import connections, utils
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.backends.dummy.base import DatabaseWrapper as DummyWrapper

from ..conf.engines import engine_path, load_wrapper, peer_engine
from ..conf.keys import ALIAS_KEY, is_balancer
from ..conf.reading import in_words, problems, stops_connections
from ..core import drivers
from ..core.balancer import LoadBalancer
from ..core.exceptions import ConfigError
from ..core.peer import Peer
from ..registry import balancers
from .connecting import LoadBalancedMixin

if TYPE_CHECKING:
    _Base = LoadBalancedMixin
else:
    _Base = object


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
    _made_for: Callable[..., EngineType]

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        """Make an instance of the class that is made for the settings that it is given."""
        # Past our own __getattribute__: each new thread makes an instance.
        plain = super().__getattribute__
        made: Any = cls if plain("_is_made") else plain("_made_for")(*args, **kwargs)
        return super(EngineType, made).__call__(*args, **kwargs)

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


_made: dict[tuple[type, type], EngineType] = {}


def has_pools(wrapper: Any) -> bool:
    """Return whether the peer engine ``wrapper`` keeps pools that we know how to keep apart."""
    return wrapper.vendor == "postgresql" and hasattr(wrapper, "close_pool")


def engine_class(base: type, settings: dict[str, Any], alias: str) -> EngineType:
    """Return the class of wrappers for the balancer whose settings these are.

    :param base: the engine's DatabaseWrapper, or a user's subclass of it.
    """
    wrapper: Any = _Unknown
    # What is wrong is said by the checks and at connect; never where a wrapper is made.
    if not _is_misconfigured(settings, alias):
        try:
            known = balancers.known.get(settings.get(ALIAS_KEY))
            # Of a thousand peers each may have to be asked.
            path = known.peer_engine if known else peer_engine(settings, connections.databases)
            wrapper = load_wrapper(path)
        except ConfigError:
            pass
    return made_over(wrapper, base)


def _engine_of(entry: dict[str, Any]) -> object:
    """Return the class that an entry's ENGINE names, if its module has been imported."""
    module = sys.modules.get(f"{engine_path(entry.get('ENGINE'))}.base")
    return getattr(module, "DatabaseWrapper", None)


def made_over(wrapper: Any, base: Any) -> EngineType:
    """Return the class that is ``base`` over the DatabaseWrapper of a real backend.

    :param wrapper: that backend's class.
    :param base: one of our engines' classes, or a user's subclass of it. Its ``_namespace()`` gives
        what the class has besides.
    """
    key = (base, wrapper)
    made = _made.get(key)
    if made is None:
        bases: list[Any] = [base, wrapper]
        # What an engine keeps by alias is kept apart where there is a peer to do it by.
        if issubclass(base, LoadBalancedMixin):
            packages = {cls.__module__.partition(".")[0] for cls in wrapper.__mro__}
            if not packages <= {"django", "builtins"} and wrapper is not _Unknown:
                bases.insert(1, OriginsMixin)
            if isinstance(getattr(wrapper, "_type_infos", None), dict):
                bases.insert(1, GeometriesOfPeersMixin)
            if wrapper.vendor == "postgresql":
                bases.insert(1, TypesOfPeersMixin)
            if has_pools(wrapper):
                from .pools import PooledMixin

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
                    "_made_of": (wrapper, base),
                    "_driver": drivers.driver_of_engine(wrapper),
                    **base._namespace(wrapper),
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


# Laid between our engine and some DatabaseWrappers


#: Where each peer's connections were last seen to lead, by the peer's name.
_seen: weakref.WeakKeyDictionary[LoadBalancer, dict[str, tuple[str, str]]] = (
    weakref.WeakKeyDictionary()
)
#: What is wrong, once it has been found out.
_wrong: weakref.WeakKeyDictionary[LoadBalancer, str] = weakref.WeakKeyDictionary()


class OriginsMixin(_Base):
    """For a backend of another package, which may keep connections of its own, by alias.

    Such a backend would give one peer's to all of them: each circuit would count another server's
    faults. No list names all such backends. Their connections say where they lead.
    """

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
                if seen.get(other.name) == found or (
                    _given(theirs, "HOST") and _leads_to(theirs, found)
                ):
                    wrong = _wrong[registered.balancer] = (
                        f"DATABASES[{registered.balancer.name!r}]: PEER_ENGINE gave for peer "
                        f"{name!r} a connection to {other.name!r} ({':'.join(found)}): "
                        f"{self._made_of[0].__module__} keeps connections that it does not tell "
                        "apart by peer. Give the backend that it builds on; CONN_MAX_AGE keeps "
                        "connections, each to its own peer."
                    )
                    raise ImproperlyConfigured(wrong)
        seen[name] = found


def _leads_to(settings: Mapping[str, Any], found: tuple[str, str]) -> bool:
    """Return whether a peer's settings lead to a host and port, as far as they say where."""
    host, port = found
    hosts, ports = _given(settings, "HOST"), _given(settings, "PORT")
    return (not hosts or host.lower() in hosts) and (not ports or port in ports)


def _given(settings: Mapping[str, Any], key: str) -> set[str]:
    given = settings.get(key), settings["OPTIONS"].get(key.lower())
    return {str(value).lower() for value in given if value}


class TypesOfPeersMixin(_Base):
    """For PostgreSQL, where an extension's types have numbers of each server's own.

    They differ from one server to the next, unless one is the other's copy, block by block. Django
    remembers them by alias: hstore's and citext's, and PostGIS's. A second peer's values would be
    read as text, and written as something else.
    """

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


class GeometriesOfPeersMixin(_Base):
    """For PostGIS, whose backend remembers its types by alias."""

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
