"""Which psycopg_pool.ConnectionPools a balancer has: one a peer and settings.

Nothing that asks for another database, another user or another server gets a connection out of
one. :mod:`.pooled` takes connections out of them.

A forked child never touches its parent's pools: a goodbye on a shared socket would end the
parent's session, and their locks may be held for ever.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Mapping
from typing import Any

from ..conf.keys import CONNECTION_KEYS
from ..conf.merging import same
from ..core import drivers, runtime
from ..core.balancer import LoadBalancer
from ..core.events import CircuitOpened, Event, PeerDrained

#: What, besides what a connection is made with, is set up in it once.
_KEYS = (*CONNECTION_KEYS, "CONN_HEALTH_CHECKS", "CONN_MAX_AGE", "TIME_ZONE")


def has_pools(wrapper: type) -> bool:
    """Return whether the peer engine ``wrapper`` keeps pools that we know how to keep apart."""
    return getattr(wrapper, "vendor", "") == "postgresql" and hasattr(wrapper, "close_pool")


def is_pooled(connection: Any) -> bool:
    """Return whether a driver's connection has been taken out of a pool."""
    return getattr(connection, "_pool", None) is not None


def close_for_good(connection: Any) -> None:
    """Close a driver's connection, and not into its pool. Never raises."""
    pool = getattr(connection, "_pool", None)
    try:
        if pool is not None:
            # With close_returns, close() would put it back.
            connection._pool = None
        connection.close()
    except Exception:  # noqa: S110 - it is thrown away
        pass
    finally:
        if pool is not None:
            connection._pool = pool


def close_in_child(connection: Any, driver: drivers.Driver) -> None:
    """Close, in a forked child, what has been left to the parent (:meth:`Driver.leave`)."""
    # psycopg2's close() would wait for the thread that was at a statement when the process forked.
    if not driver.ends_its_cursors(connection):
        close_for_good(connection)


def give_back(connection: Any) -> None:
    """Close a driver's connection for good; its pool, if it has one, makes another."""
    pool = getattr(connection, "_pool", None)
    close_for_good(connection)
    if pool is not None:
        try:
            pool.putconn(connection)
        except Exception:  # noqa: S110 - not its any more
            pass


class Pool:
    """One peer's pool, and the settings that it was made for."""

    def __init__(self, key: Mapping[str, Any], pool: Any) -> None:
        self.key = key
        self.pool = pool
        #: A connection out of it has worked, and none was found dead since.
        self.proven = False
        #: Until then some thread is taken to be asking the peer. A time: that thread
        #: may be killed on the way.
        self.asked_until = 0.0


class Pools(runtime.Guarded):
    """The pools of one balancer. Nothing is waited for under its lock."""

    def __init__(self) -> None:
        super().__init__()
        #: Never changed, but replaced by another, under the lock: so it can be looked through
        #: without the lock.
        self._pools: Mapping[str, tuple[Pool, ...]] = {}

    def find(self, peer: str, settings: Mapping[str, Any], make: Callable[[], Any]) -> Pool:
        """Return the pool of ``peer`` for ``settings``, made if there is none."""
        key = {name: settings.get(name) for name in _KEYS}
        found = self._find(peer, key)
        if found is None:
            made = Pool(key, make())
            with self._lock:
                # Of two threads that come here at once one's is kept; the
                # other's was never opened.
                found = self._find(peer, key)
                if found is None:
                    found = made
                    self._replace(peer, (*self._pools.get(peer, ()), made))
        return found

    def _find(self, peer: str, key: Mapping[str, Any]) -> Pool | None:
        for known in self._pools.get(peer, ()):
            if same(known.key, key):
                return known
        return None

    def has(self, pool: Pool) -> bool:
        """Return whether ``pool`` is still one of them."""
        return any(pool in pools for pools in self._pools.values())

    def discard(self, peer: str, pool: Pool) -> None:
        """Forget a pool that was closed elsewhere."""
        with self._lock:
            known = self._pools.get(peer, ())
            self._replace(peer, tuple(one for one in known if one is not pool))

    def _replace(self, peer: str, pools: tuple[Pool, ...]) -> None:
        others = {name: known for name, known in self._pools.items() if name != peer}
        self._pools = {**others, peer: pools} if pools else others

    def close(self) -> None:
        """Close all pools, and return when their workers are done."""
        with self._lock:
            pools, self._pools = self._pools, {}
        for known in pools.values():
            _close_all(known)

    def retire(self, peer: str) -> None:
        """Forget a peer's pools, and close them in a thread."""
        with self._lock:
            known = self._pools.get(peer, ())
            self._replace(peer, ())
        if known:
            try:
                threading.Thread(
                    target=_close_all, args=(known,), name="django-proxysql-pools", daemon=True
                ).start()
            except RuntimeError:
                # The interpreter is at its end, and takes them along.
                pass

    def notify(self, event: Event) -> None:
        """Close the pools of a peer that goes out of use; a listener of the balancer."""
        if isinstance(event, (CircuitOpened, PeerDrained)):
            self.retire(event.peer)


def _close_all(pools: tuple[Pool, ...]) -> None:
    for known in pools:
        try:
            known.pool.close()
        except Exception:  # noqa: S110 - nothing waits for it
            pass


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


def _after_fork_in_child() -> None:
    for pools in list(_known.values()):
        for known in pools._pools.values():
            for one in known:
                _of_parent.append(one.pool)
                # So that nothing, its destructor included, does anything with it but
                # close what comes back: what this process had out of it, and has
                # been parted from (:mod:`.forked`).
                one.pool._closed = True
        pools._pools = {}


runtime.at_fork(_after_fork_in_child)
