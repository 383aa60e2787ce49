"""The engine's behaviour, laid over a peer engine's own DatabaseWrapper.

Only what touches peers is here. Everything else (cursors, transactions,
features, SQL) is the peer engine's, untouched.

Longer than other classes: the hooks of one connect follow one another, in Django's order.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import sys
from typing import TYPE_CHECKING, Any

from django.db import DEFAULT_DB_ALIAS
from django.db.backends.base.base import BaseDatabaseWrapper
from django.utils.functional import cached_property

from ..conf.keys import ALIAS_KEY
from ..core import drivers
from ..core.balancer import Attempt
from ..core.peer import Checkout, Peer, ServerFacts
from ..core.permits import JITTER
from ..registry import Registered, balancers, register
from .sessions import give_back, remember

if TYPE_CHECKING:
    _Base = BaseDatabaseWrapper
else:
    _Base = object

#: What Django's MySQL backend asks a server once for each wrapper, which is each thread: its
#: version, sql_mode and the like. That of PostgreSQL asks nothing.
_FACTS = "mysql_server_data"
#: Where that backend is, and what all of Django's have in common.
_DJANGOS, _BASE = "django.db.backends.mysql.base", "django.db.backends.base.base"
_OURS = "django_proxysql."
#: What may set an isolation level between opening and Django's own, or see that set.
_HOOKS = frozenset(
    "get_new_connection set_autocommit _set_autocommit init_connection_state "
    "cursor _cursor make_cursor make_debug_cursor create_cursor".split()
)
#: Seconds for which they are believed: SET GLOBAL may change them on a server that goes on.
_FACTS_HOLD = 600


class LoadBalancedMixin(_Base):
    """Connects to a peer of its load balancer that works."""

    #: The peer engine's driver module.
    Database: Any
    #: What is known of that driver; set in the class made for the peer engine.
    _driver: drivers.Driver
    #: Django's, of the engines that set one.
    isolation_level: Any
    #: The peer engine's own class is the first; set in the class made for it.
    _made_of: tuple[Any, ...]

    #: What the next connect() asks of :meth:`LoadBalancer.connect`: ``trials`` and ``only``.
    _ANY_PEER: tuple[str, Peer | None] = ("first", None)
    _terms = _ANY_PEER
    #: The attempt under way, while connect() runs.
    _attempt: Attempt | None = None
    #: Whether a throw-away connection has been asked what a trial must ask.
    _asked = False
    #: What a connection to that attempt's peer is made with.
    _peer_settings: dict[str, Any] | None = None
    #: This wrapper's own settings, while the peer's are in their place.
    _own_settings: dict[str, Any] | None = None
    #: The new connection whose isolation level the driver has set, so that Django need not.
    _with_level: Any = None
    #: A connection taken out of its pool that Django does not have yet.
    _taken: Any = None
    #: The present connection's place in its peer's count.
    _counted: Checkout | None = None

    def __init__(
        self, settings_dict: dict[str, Any], alias: str = DEFAULT_DB_ALIAS, *args: Any, **kw: Any
    ) -> None:
        register(settings_dict, alias)
        super().__init__(settings_dict, alias, *args, **kw)
        remember(self)

    # What a user may ask

    @property
    def peer(self) -> Peer | None:
        """The peer that the present connection leads to, if there is one."""
        if self._attempt is not None:
            return self._attempt.peer
        if self.connection is None or self._counted is None:
            return None
        return self._counted.peer

    # Connecting

    def connect(self) -> None:
        """Connect to a peer that works; see :meth:`LoadBalancer.connect`."""
        if self._attempt is not None or self._own_settings is not None:
            self._recover()
        registered = self._registered()
        if registered is None:
            # Made from a bare dict, as Django's own tests do: no peers, no balancer.
            super().connect()
            return
        if self._counted is not None:
            # Connected, and asked to connect all the same. As with the plain engine
            # the old connection belongs to the code that has a reference to it: closed here,
            # it would take a database in memory along.
            self._release()
        # For this once: the caller may be interrupted before it could take them back.
        (trials, only), self._terms = self._terms, self._ANY_PEER
        registered.balancer.connect(
            functools.partial(self._open_one, registered),
            refusal_is_callers=lambda: registered.is_changed(self.settings_dict),
            trials=trials,
            only=only,
        )

    def _open_one(self, registered: Registered, attempt: Attempt) -> Any:
        """One attempt covers the whole of Django's connect(): SETs, signal, READY_CHECK."""
        if self._counted is not None:
            # Connected meanwhile: by a listener, say, that got the last attempt and asked the
            # database. There is a place for one only.
            self._discard()
        self._asked = False
        try:
            self._attempt = attempt
            self._peer_settings = registered.to_connect_with(
                attempt.peer, self.settings_dict, self.alias
            )
            super().connect()
            if self._own_settings is not None:
                # An engine with a set-up of its own.
                self._put_own_settings_back()
            self._note_facts(registered, attempt)
            if attempt.is_trial or registered.balancer.config.ready_check is not None:
                registered.balancer.check_ready(self.connection, attempt, asked=self._asked)
            max_age = self.settings_dict["CONN_MAX_AGE"]
            if max_age:
                # Those that were made at one moment are not to end at one moment.
                self.close_at += max_age * JITTER * (2 * registered.balancer.group.draw() - 1)
            self._counted = Checkout(attempt.peer)
        except BaseException as exc:
            if self._own_settings is not None:
                self._put_own_settings_back()
                if isinstance(exc, Exception):
                    drivers.mark(exc, "of_settings")
            self._discard()
            raise
        finally:
            self._with_level = self._peer_settings = None
            # Last: as long as there is one, the next connect() puts back what is left.
            self._attempt = None
        return self.connection

    def get_connection_params(self) -> dict[str, Any]:
        """Return what the driver's connect() is called with, for the peer at hand.

        A caller that asks while nothing is being connected (tracing does, at each query) gets
        those of the present connection's peer, else of the first. Nothing changes by that, and a
        callable PASSWORD stays what it is: only an attempt to connect calls it.
        """
        attempt, settings = self._attempt, self._peer_settings
        if settings is None and self.connection is not None:
            # Engines note what they find in the settings (an isolation level), on the wrapper.
            stand_in: Any = copy.copy(self)
            stand_in.settings_dict = self.peer_settings()
            params: dict[str, Any] = super(LoadBalancedMixin, stand_in).get_connection_params()
            return params
        if attempt is None or settings is None:
            return self._as_peer(super().get_connection_params)  # type: ignore[no-any-return]
        if self.connection is None:
            # The peer's until init_connection_state() is over, which is Django's next but one.
            if settings is not self.settings_dict:
                self._own_settings = self.settings_dict
                self.settings_dict = settings
            params = super().get_connection_params()
        else:
            params = self._as_peer(super().get_connection_params)
        driver = self._driver
        params.update(driver.connect_options(params, attempt.timeout))
        params.update(driver.session_options(params, settings["AUTOCOMMIT"]))
        if attempt.config.tcp_user_timeout is not None:
            params.update(driver.keepalive_options(params, attempt.config.tcp_user_timeout))
        if attempt.config.commit_outcome is not None:
            params.update(driver.recording_options(params))
        return params

    def _opener(self, attempt: Attempt, params: dict[str, Any]) -> Any:
        """Return what opens a connection with Django's isolation level; None: Django is to set it.

        That spares a packet, and Django's cursor, which is a fifth of the client's work.
        """
        level: str | None = getattr(self, "isolation_level", None)
        facts = attempt.peer.server_facts
        known = self.__dict__.get(_FACTS) if facts is None else facts.facts
        if (
            not level
            or known is None
            # Django sends both in one packet.
            or known.get("sql_auto_is_null", True)
            or not _is_djangos(self.__class__)  # type: ignore[arg-type]
            # What logs or wraps statements sees this one, too.
            or self.execute_wrappers
            or self.queries_logged
            or not self.__dict__.keys().isdisjoint(_HOOKS)
        ):
            return None
        connect = sys.modules[_DJANGOS].Database.connect
        return self._driver.opener(connect, params, level.upper(), known["version"])

    def get_new_connection(self, conn_params: dict[str, Any]) -> Any:
        """Open the driver's connection; a trial sends a throw-away one ahead."""
        attempt = self._attempt
        if attempt is None:
            # For code that calls it, and not connect().
            return self._as_peer(super().get_new_connection, drivers.with_password(conn_params))
        if attempt.is_trial:
            registered = self._registered()
            assert registered is not None
            self._asked = self._as_peer(
                registered.balancer.send_ahead,
                attempt,
                self._driver,
                self.Database.connect,
                conn_params,
            )
        opener = self._opener(attempt, conn_params)
        try:
            if opener is not None:
                connection = opener(**conn_params)
            elif self._peer_settings is self.settings_dict:
                connection = super().get_new_connection(conn_params)
            else:
                connection = self._as_peer(super().get_new_connection, conn_params)
            self._with_level = None if opener is None else connection
            self._recall_facts(attempt, connection)
            self._taken = None
        except BaseException:
            taken, self._taken = self._taken, None
            # A place in a pool is lost for ever with a connection that is not given back.
            if taken is not None:
                give_back(taken)
            raise
        return connection

    def _recall_facts(self, attempt: Attempt, connection: Any) -> None:
        """Hand Django what another wrapper has found out about this very server.

        What it knows of another peer, and of what this one was, does not hold here.
        """
        own, known = self.__dict__.get(_FACTS), attempt.peer.server_facts
        if known is not None and known.greeting != self._driver.greeting(connection):
            # Another server by now: what was known of it does not hold.
            known = None
        facts = None if known is None else known.facts
        if own is facts:
            return
        registered = self._registered()
        # Other OPTIONS may have other answers.
        if registered is None or registered.is_changed(self._own_settings or self.settings_dict):
            return
        if known is None or (own is None and attempt.started >= known.asked + _FACTS_HOLD):
            facts = None
        if own is not None and own != facts:
            forget_cached(self, self._made_of[0])
            forget_cached(self.features, type(self.features))
        if facts is not None:
            self.__dict__[_FACTS] = facts

    def _note_facts(self, registered: Registered, attempt: Attempt) -> None:
        """Note what Django has asked the server just now, for the wrappers of other threads.

        What it asks hangs on OPTIONS as well, which may have been changed for this wrapper.
        """
        facts, known = self.__dict__.get(_FACTS), attempt.peer.server_facts
        if facts is None or (known is not None and facts is known.facts):
            return
        if not registered.is_changed(self.settings_dict):
            # Equal servers share one object: a connect to another one sees that at a glance.
            peers = registered.balancer.peers.values()
            noted = [peer.server_facts for peer in peers]
            facts = next((one.facts for one in noted if one and one.facts == facts), facts)
            self.__dict__[_FACTS] = facts
            greeting = self._driver.greeting(self.connection)
            attempt.peer.server_facts = ServerFacts(greeting, facts, attempt.started)

    def init_connection_state(self) -> None:
        """Set the session up, by the peer's OPTIONS."""
        level = None
        try:
            if self._with_level is not None and self._with_level is self.connection:
                level, self.isolation_level = self.isolation_level, None
            if self._peer_settings is not self.settings_dict:
                self._as_peer(super().init_connection_state)
                return
            super().init_connection_state()
        finally:
            if level is not None:
                self.isolation_level = level
        # Receivers of connection_created are to see what stands in ``connections``.
        self._put_own_settings_back()

    def _close(self) -> Any:
        try:
            return super()._close()  # type: ignore[misc]
        finally:
            self._release()

    # Helpers

    def _recover(self) -> None:
        """Put back what an asynchronous exception (Ctrl-C, a task's time-out) left behind.

        It may strike before the first line of a ``finally``, too.
        """
        self._with_level = self._peer_settings = None
        self._attempt = None
        self._put_own_settings_back()

    def _put_own_settings_back(self) -> None:
        if self._own_settings is not None:
            self.settings_dict = self._own_settings
            self._own_settings = None

    def _registered(self) -> Registered | None:
        alias = self.settings_dict.get(ALIAS_KEY)
        known = balancers.known.get(alias)
        if known is not None or alias is None:
            return known
        return balancers.registered(alias)

    def _as_peer(self, method: Any, *args: Any) -> Any:
        """Call one of the peer engine's own methods on the peer's settings.

        Three methods read ``self.settings_dict`` to connect. From the first of
        them to the end of the last this wrapper's attribute is the peer's
        merged copy; the dict in ``connections`` is never touched, and
        ``connection_created`` receivers see it as it is.
        """
        own, settings = self.settings_dict, self._peer_settings
        if settings is own:
            return method(*args)
        if settings is None:
            settings = self.peer_settings()
        try:
            self._own_settings = own
            self.settings_dict = settings
            return method(*args)
        except Exception as exc:
            drivers.mark(exc, "of_settings")
            raise
        finally:
            self.settings_dict = own
            self._own_settings = None

    def peer_settings(self) -> dict[str, Any]:
        """Return a copy of the settings as for the present peer, else the first.

        For code that needs an address outside connect(): dbshell, mysqldump.
        """
        registered = self._registered()
        if registered is None:
            return self.settings_dict
        peer = self.peer or next(iter(registered.balancer.peers.values()))
        return registered.settings_for(peer, self.settings_dict, self.alias)

    def on_a_live_peer(self) -> Any:
        """Return a copy of this wrapper, without a connection, whose settings are a live peer's.

        Where connecting is forbidden, as Django's SimpleTestCase does, they are the first peer's:
        the plain engine's shell makes no connection of Django's.

        :raises NoPeerAvailable: there is none.
        """
        with contextlib.suppress(AssertionError):
            self.ensure_connection()
        stand_in = copy.copy(self)
        stand_in.connection = None
        stand_in._counted = None
        stand_in.settings_dict = drivers.with_password(self.peer_settings())
        return stand_in

    def _discard(self) -> None:
        """Leave nothing of a failed attempt behind, or of a connection that is not wanted."""
        if self.connection is not None:
            try:
                self._close()
            except Exception:  # noqa: S110 - it is broken, and thrown away
                pass
            self.connection = None
        self._release()

    def _release(self) -> None:
        hold, self._counted = self._counted, None
        if hold is not None:
            hold.release()


def forget_cached(kept: Any, cls: Any) -> None:
    """Have ``kept`` work out anew what ``cls`` keeps, but for what all wrappers keep."""
    for name in _cached_by(cls):
        kept.__dict__.pop(name, None)


@functools.cache
def _cached_by(cls: type) -> frozenset[str]:
    return frozenset(
        name
        for base in cls.__mro__
        if base is not BaseDatabaseWrapper
        for name, value in vars(base).items()
        if isinstance(value, (cached_property, functools.cached_property))
    )


@functools.cache
def _is_djangos(cls: type) -> bool:
    """Return whether, but for us, Django's own MySQL backend alone opens and sets up."""
    theirs = [base for base in cls.__mro__ if not base.__module__.startswith(_OURS)]
    return all(
        next((base.__module__ for base in theirs if name in vars(base)), "") in (_DJANGOS, _BASE)
        for name in _HOOKS
    )
