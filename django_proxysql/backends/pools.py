"""OPTIONS["pool"] of the PostgreSQL engine: a connection is taken out of its peer's pool.

Django keeps one psycopg_pool.ConnectionPool an alias; here each peer has one for its settings.
Nothing that asks for another database, another user or another server gets a connection out of it.
What is in a pool was good when it was put there: docs/howto/postgresql.rst says what follows. When
the peer's circuit opens, or it is drained, its pools are closed. What lies in them is of no use,
their workers no longer knock at a dead door, and threads that wait for them go on at once.

A forked child never touches its parent's pools: a goodbye on a shared socket would end the
parent's session, and their locks may be held for ever.
"""

from __future__ import annotations

import _thread
import contextlib
import copy
import functools
import operator
import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..conf.keys import CONNECTION_KEYS
from ..conf.merging import same
from ..core import drivers, runtime, sockets
from ..core.balancer import Attempt, LoadBalancer
from ..core.events import CircuitOpened, Event, PeerDrained
from ..core.exceptions import PoolBusy
from ..core.peer import Peer
from ..core.ready import throw_away
from ..registry import NO_DB_ALIAS, Registered
from .sessions import give_back, is_pooled

if TYPE_CHECKING:
    from .connecting import LoadBalancedMixin as _Base
else:
    _Base = object

#: What, besides what a connection is made with, is set up in it once.
_KEYS = (*CONNECTION_KEYS, "CONN_HEALTH_CHECKS", "CONN_MAX_AGE", "TIME_ZONE")

#: Seconds for which a pool is waited for while there are other peers to go to:
#: enough for it to grow by a connection, where the server is near.
_A_MOMENT = 0.05

#: Seconds after which a thread that waits for a pool looks whether it has been closed.
#: psycopg_pool wakes the threads that wait, but not one that queues up just after that: it
#: asks whether it is open before it takes its lock, and not there.
_LOOK_AGAIN = 1.0


@dataclass(eq=False)
class Pool:
    """One peer's pool, and the settings that it was made for."""

    peer: str
    key: Mapping[str, Any]
    pool: Any
    #: A connection out of it has worked, and none was found dead since.
    proven: bool = False
    #: Until then some thread is taken to be asking the peer. A time: that thread
    #: may be killed on the way.
    asked_until: float = 0.0


class Pools(runtime.Guarded):
    """The pools of one balancer. Nothing is waited for under its lock."""

    def __init__(self) -> None:
        super().__init__()
        #: Never changed, but replaced by another, under the lock: so it can be looked through
        #: without the lock.
        self._pools: tuple[Pool, ...] = ()

    def find(self, peer: str, settings: Mapping[str, Any], make: Callable[[], Any]) -> Pool:
        """Return the pool of ``peer`` for ``settings``, made if there is none."""
        key = {name: settings.get(name) for name in _KEYS}

        def found() -> Pool | None:
            of_peer = (known for known in self._pools if known.peer == peer)
            return next((known for known in of_peer if same(known.key, key)), None)

        known = found()
        if known is None:
            made = Pool(peer, key, make())
            with self._lock:
                # Of two threads that come here at once one's is kept; the
                # other's was never opened.
                known = found()
                if known is None:
                    known = made
                    self._pools = (*self._pools, made)
        return known

    def has(self, pool: Pool) -> bool:
        return pool in self._pools

    def take(self, which: Callable[[Pool], bool]) -> list[Pool]:
        """Forget those pools that ``which`` says; return them."""
        with self._lock:
            taken = [known for known in self._pools if which(known)]
            self._pools = tuple(known for known in self._pools if known not in taken)
        return taken

    def close(self) -> None:
        """Close all pools, and return when their workers are done."""
        _close_all(self.take(lambda known: True))

    def retire(self, peer: str) -> None:
        """Forget a peer's pools, and close them in a thread."""
        taken = self.take(lambda known: known.peer == peer)
        # No threading.Thread: a signal handler may come here while its thread starts one. Without
        # a thread the interpreter is at its end, and takes the pools along.
        with contextlib.suppress(RuntimeError):
            if taken:
                _thread.start_new_thread(_close_all, (taken,))

    def notify(self, event: Event) -> None:
        """Close the pools of a peer that goes out of use; a listener of the balancer."""
        if isinstance(event, (CircuitOpened, PeerDrained)):
            self.retire(event.peer)

    def after_fork(self) -> None:
        super().after_fork()
        pools, self._pools = self._pools, ()
        for one in pools:
            _of_parent.append(one.pool)
            # So that nothing, its destructor included, does anything with it but
            # close what comes back: what this process had out of it, and has
            # been parted from.
            one.pool._closed = True


def _close_all(pools: list[Pool]) -> None:
    for known in pools:
        # Nothing waits for it.
        with contextlib.suppress(Exception):
            known.pool.close()


# By balancer. The values must not refer to their keys.
_known: weakref.WeakKeyDictionary[LoadBalancer, Pools] = weakref.WeakKeyDictionary()
#: Pools of the process that we were forked from. Kept for ever: psycopg's own
#: destructor would wait for locks that no thread releases.
_of_parent: list[Any] = []


def pools_of(balancer: LoadBalancer) -> Pools:
    pools = _known.get(balancer)
    if pools is None:
        made = Pools()
        # Before any thread has them and may be interrupted: each opening closes its pools.
        balancer.add_listener(made.notify, connects=False)
        # Of two threads that come here at once, one's are kept. The other's stay empty.
        pools = _known.setdefault(balancer, made)
    return pools


class PooledMixin(_Base):
    """Lies between our engine and the peer engine's own DatabaseWrapper, if that has pools."""

    #: The pool that the attempt under way takes its connection out of.
    _checkout: Checkout | None = None

    @property
    def pool(self) -> Any:
        """The pool that the present connection belongs to; while there is none, the first peer's.

        None where there is no pool: OPTIONS ask for none, or the connection
        was made without one.
        """
        connection = self.connection
        if connection is not None:
            return getattr(connection, "_pool", None)
        if self._attempt is not None:
            # Django's get_new_connection() asks, and opens it, and takes a connection.
            return self._checkout
        registered = self._registered()
        if registered is None:
            return super().pool  # type: ignore[misc]
        if self.alias == NO_DB_ALIAS:
            return None
        known = self._pool_of(registered, next(iter(registered.balancer.peers.values())))
        return None if known is None else known.pool

    def _pool_of(self, registered: Registered, peer: Peer) -> Pool | None:
        """Return the peer's pool for this wrapper's own settings; None: OPTIONS ask for none."""
        own = self._own_settings or self.settings_dict
        settings = registered.settings_for(peer, own, self.alias)
        if not settings["OPTIONS"].get("pool"):
            return None
        make = functools.partial(self._make_pool, registered, peer, settings)
        return pools_of(registered.balancer).find(peer.name, settings, make)

    def close_pool(self) -> None:
        """Close every pool of the balancer, whichever peer's, as Django does before it drops,
        clones or reconfigures a database. The next connect makes new ones."""
        registered = self._registered()
        if registered is None:
            super().close_pool()  # type: ignore[misc]
        else:
            pools_of(registered.balancer).close()

    def close_if_health_check_failed(self) -> None:
        """Do what the peer engine does; what comes out of a pool has been looked at."""
        if self.connection is not None and not is_pooled(self.connection):
            super().close_if_health_check_failed()

    def get_new_connection(self, conn_params: dict[str, Any]) -> Any:
        """Open the driver's connection, or take one out of the peer's pool."""
        registered = self._registered()
        if (
            self._attempt is None
            or registered is None
            or self.alias == NO_DB_ALIAS
            or not self.settings_dict["OPTIONS"].get("pool")
        ):
            self._checkout = None
            return super().get_new_connection(conn_params)
        self._checkout = Checkout(self, registered, conn_params)
        try:
            return super().get_new_connection(conn_params)
        finally:
            self._checkout = None

    def _make_pool(self, registered: Registered, peer: Peer, settings: dict[str, Any]) -> Any:
        """Have Django make a pool for ``peer``, not opened yet.

        Its workers configure new connections by the wrapper that it was made
        with, in threads of their own: one that nothing else uses, and that stays as it is.
        """
        wrapper: Any = copy.copy(self)
        wrapper.__dict__.pop("wrap_database_errors", None)
        wrapper.connection = wrapper._counted = wrapper._session = None
        wrapper._checkout = wrapper._own_settings = None
        options = dict(settings["OPTIONS"])
        given = options["pool"]
        pool_options: dict[str, Any] = {"name": f"{registered.balancer.name}/{peer.name}"}
        pool_options.update({} if given is True else given)
        if callable(settings.get("PASSWORD")):
            pool_options["connection_class"] = _rotating(pool_options.get("connection_class"))
        # Called by us, whatever CONN_HEALTH_CHECKS says: Django gives the pool one of its own.
        pool_options.pop("check", None)
        options["pool"] = pool_options
        # The health check is made here: psycopg's pool waits a second after
        # each connection that fails it, and they are dead all at once.
        wrapper.settings_dict = {**settings, "OPTIONS": options, "CONN_HEALTH_CHECKS": False}
        wrapper._peer_settings = wrapper.settings_dict
        # Not this attempt's time, which may be what is left of a deadline.
        wrapper._attempt = Attempt(peer, registered.balancer.config)
        # Django keeps pools by alias, in a dictionary of the class's.
        wrapper._connection_pools = {}
        return super(PooledMixin, type(wrapper)).pool.fget(wrapper)  # type: ignore[misc]


class Checkout:
    """What Django's get_new_connection() takes for the pool: takes one connection out of it."""

    def __init__(self, db: Any, registered: Registered, conn_params: dict[str, Any]) -> None:
        self._db = db
        self._attempt: Attempt = db._attempt
        self._registered = registered
        self._pools = pools_of(registered.balancer)
        self._conn_params = conn_params
        pool = db.settings_dict["OPTIONS"]["pool"]
        #: The site's own, of what comes out of a pool. A peer is well if it passes on a
        #: connection that was made just now.
        self._check: Callable[[Any], object] | None = (
            pool.get("check") if isinstance(pool, Mapping) else None
        )
        self._asked = False

    def open(self) -> None:
        """Do nothing: it is opened when it is known that the peer lives."""

    def getconn(self) -> Any:
        """Return a connection to the peer that works, as far as can be seen.

        :raises PoolBusy: there is none just now, and other peers may be asked.
        :raises PoolTimeout: there is none; the peer is well.
        :raises Exception: what connecting to the peer directly raised.
        """
        from psycopg_pool import PoolClosed, PoolTimeout

        attempt = self._attempt
        began = time.monotonic()
        ends = began + attempt.timeout
        while True:
            known = self._db._pool_of(self._registered, attempt.peer)
            pool = known.pool
            if attempt.is_trial or not known.proven:
                self._ask(known)
            impatient = known.proven and not attempt.may_wait
            until = min(ends, began + pool.timeout)
            seconds = min(max(until - time.monotonic(), 0.001), _LOOK_AGAIN)
            try:
                if pool.closed:
                    try:
                        pool.open()
                    except Exception as exc:
                        if not pool.closed:
                            raise
                        # Closed for good since it was found. psycopg_pool before 3.3 says so
                        # by an error that reads like the server's.
                        self._pools.take(functools.partial(operator.is_, known))
                        raise PoolClosed(str(exc)) from None
                    if not self._pools.has(known):
                        # Given up by another thread before it was open.
                        pool.close()
                connection = self._db._taken = pool.getconn(
                    timeout=min(seconds, _A_MOMENT) if impatient else seconds
                )
            except PoolClosed:
                # The application called close_pool(), or the peer is out of use by now.
                if time.monotonic() >= ends or not (attempt.is_trial or attempt.peer.is_available):
                    raise
                continue
            except PoolTimeout:
                now = time.monotonic()
                if now < until and (pool.closed or not impatient):
                    continue
                if impatient:
                    raise PoolBusy("its pool has no connection to spare") from None
                self._ask(known)
                raise PoolTimeout(
                    f"couldn't get a connection after {now - began:.2f} sec"
                ) from None
            if self._is_alive(connection):
                known.proven = True
                return connection
            known.proven = False
            give_back(connection)
            self._db._taken = None
            if time.monotonic() >= ends:
                raise PoolTimeout("none of its connections is fit for use")

    def _ask(self, known: Pool) -> None:
        """Connect straight to the peer, once an attempt: what that raises is the peer's answer.

        Of many threads one at a time does so, or a pool would be none. The
        others wait for the pool, which is closed to them if the answer is bad.
        """
        now = time.monotonic()
        if self._asked or (now < known.asked_until and not self._attempt.is_trial):
            return
        db, seconds = self._db, self._attempt.timeout
        known.asked_until = now + 2 * seconds
        params = {**self._conn_params, "autocommit": True}
        try:
            with throw_away(db._driver, db.Database.connect, params, seconds) as connection:
                if self._check is not None:
                    self._check(connection)
        except Exception as exc:
            if drivers.judge(exc, connecting=True).fault.counts:
                self._pools.retire(self._attempt.peer.name)
            raise
        finally:
            known.asked_until = 0.0
        self._asked = True

    def _is_alive(self, connection: Any) -> bool:
        if connection.closed:
            return False
        poll = sockets.watch(self._db._driver.fileno(connection))
        try:
            if self._db.settings_dict.get("CONN_HEALTH_CHECKS") or (poll is not None and poll(0)):
                connection._pool.check_connection(connection)
            if self._check is not None:
                self._check(connection)
        except Exception:
            return False
        return True


@functools.cache
def _rotating(base: type | None) -> type:
    """Return a class of connections that call a callable PASSWORD at each connect."""
    if base is None:
        from psycopg import Connection as base

    class RotatingConnection(base):  # type: ignore[misc, valid-type]
        @classmethod
        def connect(cls, conninfo: str = "", **kwargs: Any) -> Any:
            if "password" in kwargs:
                kwargs["password"] = drivers.password_from(kwargs["password"])
            return super().connect(conninfo, **kwargs)

    return RotatingConnection
