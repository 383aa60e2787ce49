"""What is known of one established connection, and how the driver's is closed.

A forked child has a copy of every descriptor. Two processes that talk over one
connection get each other's answers, and a child that closes one ends the parent's session.
So in the child /dev/null is laid over each inherited descriptor
(:func:`django_proxysql.core.sockets.detach`), and the child connects for itself.

Of drivers whose descriptor is not known (Oracle's, MySQL Connector/Python's)
the connections stay as they are, as with Django's own engines.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Any

from ..core import drivers, runtime
from ..core.circuit import CLOSED
from ..core.group import PeerGroup
from ..core.holdings import Holdings
from ..core.logger import complain
from ..core.parameters import VALUES
from ..core.peer import Peer
from ..core.permits import Permit
from .state import Health

#: Not every connection has a transaction, and none needs a counter before its first.
NOT_MADE = object()


class Session(Health):
    """One driver connection's state. Belongs to one wrapper, and so to one thread at a time."""

    def __init__(
        self,
        connection: Any,
        peer: Peer,
        balancer: PeerGroup,
        permit: Permit | None,
        status: Callable[[], object] | None,
        *,
        poll: Callable[[int], object] | None = None,
        read_timeout: float = math.inf,
        unbuffered: bool = False,
        database: str = "",
        takes_two: bool = False,
        role: str = "",
    ) -> None:
        super().__init__(poll)
        self.connection = connection
        self.peer = peer
        self.balancer = balancer
        self.budget = balancer.budget
        self.clock = balancer.clock
        #: What the connection was made with: it knows the circuit's generation.
        self.permit = permit
        #: The statement and its parameters that are under way; None between two statements.
        self.sending: tuple[Any, Any] | None = None
        #: Seconds after which a loss may be a time-out: the two read alike.
        self.read_timeout = read_timeout
        #: Rows may lie on the wire between two statements.
        self.unbuffered = unbuffered
        #: The database; "" if the parameters name none.
        self.database = database
        #: A packet may hold two statements. False, too, once something in between took none.
        self.takes_two = takes_two
        #: The role that Django has PostgreSQL's session take: OPTIONS["assume_role"]; "" for none.
        self.role = role
        #: Counts what is sent over it; None where that is not known, NOT_MADE before the first use.
        self.counter: Any = NOT_MADE
        #: Asks the driver whether a transaction is open, where it knows only before a loss.
        self.status = status
        idle = balancer.config.idle_check
        #: Seconds of idleness after which a read, too, looks first.
        self.idle = math.inf if idle is None else idle
        #: Whether it leads to the server that greeted it, and not to one behind a proxy (MySQL
        #: family); None if it has not been asked.
        self.is_server: bool | None = None
        #: Types of parameters that this connection quotes: no SQL of its own is in them.
        self.known_types: set[type] = set(VALUES)
        self.holds = Holdings()
        #: It may have written in this request, and so left something to ask for: LAST_INSERT_ID().
        #: Unlike :attr:`wrote`, idleness does not end this.
        self.results = False
        #: IDS, RESULT, FOUND: what is asked for by these went with an earlier connection. UNSURE:
        #: the ids may have. UNTAKEN: so have the values of sequences.
        self.lost_results = 0
        #: It may have written in this request or task.
        self.wrote = False
        #: A statement has succeeded on it.
        self.served = False
        #: Named cursors that are open on it: a WeakSet, once there is one.
        self.server_side: Any = ()
        #: When a statement was last begun on it.
        self.used = self.clock()
        #: The balancer's version at which the peer's circuit was found closed,
        #: or leaving it found impossible. None if it was not: the peer was drained,
        #: or given up, while the connection was being made. (Read before we look:
        #: a change that comes between leaves a new version behind.)
        self.version: object = balancer.version
        if peer.drained or peer.breaker.circuit.state != CLOSED:
            self.version = None

    def has_timed_out(self) -> bool:
        """Return whether a loss now may be a time-out: the two read alike."""
        return self.clock() - self.used >= self.read_timeout * 0.98


def current(db: Any) -> Session | None:
    """Return the session of the connection that is in place, if it is ours to look after."""
    session: Session | None = db._session
    return session if session is not None and session.connection is db.connection else None


def now_holding(db: Any) -> tuple[Session, dict[str, int]] | None:
    """Return what the session holds, for :func:`still_holds`; None if it holds nothing."""
    session = current(db)
    if session is None or not session.holds or session.error_raised:
        return None
    return session, session.holds.all()


def still_holds(db: Any, held: tuple[Session, dict[str, int]] | None) -> bool:
    """Return whether all that :func:`now_holding` has seen is held now."""
    if held is None:
        return True
    session, holdings = held
    return session is current(db) and not session.dead and session.holds.include(holdings)


# Closing a driver's connection


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
        # Given back twice, it would have its pool make two others. Not in a finally: interrupted
        # before the pool has it, its place would be lost.
        connection._pool = None


# Forks

_wrappers: runtime.Living[Any] = runtime.Living()

#: What is held across a fork, by the forking thread: two may be at it at once. Python clears the
#: other threads' thread-locals in the child, connections among them, before it calls any hook.
#: (Where nothing is called before the fork, as in uWSGI, which forks in C, it is the forking
#: thread's connections alone that are left to the parent.)
_held: dict[int, list[Any]] = {}


def remember(wrapper: Any) -> None:
    """Have ``wrapper._after_fork()`` called in whichever child it is inherited by."""
    _wrappers.add(wrapper)


def _before() -> None:
    _held[threading.get_ident()] = [(wrapper, wrapper.connection) for wrapper in _wrappers.all()]


def _in_parent() -> None:
    _held.pop(threading.get_ident(), None)


def _in_child() -> None:
    for wrapper in _wrappers.all():
        try:
            wrapper._after_fork()
        except Exception:
            complain("A connection of the parent's could not be left to it")
    _held.clear()


runtime.at_fork(_in_child, before=_before, after_in_parent=_in_parent)
