"""Put a new connection into the place of one that is lost or to be left, at a safe point.

A connection that is found lost elsewhere stays in place: replacing it inside a
transaction would commit one half of it and lose the other.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import weakref
from collections.abc import Callable
from typing import Any

from django.db.utils import OperationalError

from ..core.circuit import CLOSED
from ..core.events import ConnectionReplaced
from ..core.peer import Peer
from ..core.statements import READ, SCOPED, STATE
from .decisions import (
    Leave,
    Pinned,
    Situation,
    Why,
    may_leave,
    may_replace,
    may_restart,
    must_raise_loss,
)
from .losses import is_lost, mark, notice_unseen, settle_doubt
from .sessions import Session, current, give_back, is_pooled
from .state import WORKS

#: What Django's connect() resets, and what a transaction that is started anew
#: on another connection must keep.
_OF_THE_TRANSACTION = (
    "in_atomic_block",
    "savepoint_ids",
    "savepoint_state",
    "atomic_blocks",
    "needs_rollback",
    "rollback_exc",
    "commit_on_exit",
    "run_on_commit",
    "run_commit_hooks_on_set_autocommit_on",
    "queries_log",
)


def situation_of(db: Any, session: Session) -> Situation:
    """Return what counts for whether the connection may be replaced now."""
    driver, connection = db._driver, session.connection
    raised, holds = session.error_raised, session.holds
    # Of a connection whose loss was raised nothing more is asked.
    return Situation(
        raised,
        bool(holds),
        holds.by_django,
        holds.earlier,
        db._thread_sharing_count > 0,
        not raised
        and bool(session.unbuffered or session.server_side or driver.is_busy(connection)),
        db.in_atomic_block
        or not db.autocommit
        or db._transaction.is_of_atomic
        or not (session.dead or driver.is_at_rest(connection)),
    )


def is_safe(db: Any, session: Session) -> bool:
    """Return whether the connection may be replaced and the application could not tell."""
    why = Why.LOST if session.dead else Why.LEAVING
    return may_replace(why, situation_of(db, session))


def is_restartable(db: Any, session: Session, kind: int = READ) -> bool:
    """Return whether the transaction may be begun anew before a statement of ``kind``."""
    return may_restart(
        db._transaction.is_pending, situation_of(db, session), bool(kind & (SCOPED | STATE))
    )


def settle(db: Any) -> None:
    """Leave a lost connection, and a peer that is out, if the application cannot tell.

    For code that is about to stay with this connection's peer.

    :raises Exception: what connect() raised, as Django translates it: no peer is left.
    """
    session = current(db)
    if session is not None and not db.in_atomic_block:
        at_safe_point(db, session, 0, session.clock())


def at_safe_point(db: Any, session: Session, kind: int, now: float) -> None:
    """Replace what is lost or to be left, before something is sent in autocommit."""
    if (
        session.life is WORKS
        and session.version is session.balancer.version
        and now - session.used <= session.idle
        and not (session.unsure or session.doubted)
        and (kind == READ or session.poll is None or not session.poll(0))
    ):
        # Nothing says that it is lost, or to be left: whether it may be makes no difference.
        return
    why, situation = Why.LOST if session.dead else Why.LEAVING, situation_of(db, session)
    if not may_replace(why, situation, bool(kind & SCOPED)):
        if must_raise_loss(session.dead, situation):
            raise_loss(session)
        return
    if session.doubted:
        settle_doubt(db, session)
    idle = now - session.used > session.idle
    if idle and not db._ends_requests:
        session.wrote = False
    if session.dead or ((idle or kind != READ) and is_lost(db, session)):
        replace(db, session)
    elif session.is_leaving or session.version is not session.balancer.version:
        leave_if_out(db, session)


def raise_loss(session: Session) -> None:
    """Raise, once, that a connection is lost and what its session held with it.

    :raises OperationalError: always.
    """
    session.raised()
    held = ", ".join(session.holds.for_life) or "SET, a temporary table or the like"
    raise OperationalError(
        f"{session.balancer.name}: the connection to {session.peer.name} is lost "
        f"({session.error or 'it was closed'}), and with it what its session held: {held}. "
        "The next statement gets a new connection, which holds nothing."
    ) from session.loss


def before_first(db: Any, session: Session, kind: int, now: float) -> None:
    """Begin a lost block anew, before its first statement is sent."""
    notice_unseen(db, session)
    if not session.dead and now - session.used <= session.idle:
        return
    if is_restartable(db, session, kind) and is_lost(db, session):
        restart(db, session)


def leave_if_out(db: Any, session: Session) -> None:
    """Leave a peer whose circuit has opened, or that is drained, if another peer lets it in."""
    balancer, peer = session.balancer, session.peer
    version = balancer.version
    pin = balancer.pinned_to(peer)
    leave = may_leave(
        Pinned.NO if pin is None else Pinned.HERE if pin is peer else Pinned.ELSEWHERE,
        is_out=peer.drained or peer.breaker.circuit.state != CLOSED,
        not_ready=session.is_leaving,
        wrote=session.wrote,
        can_go=balancer.has_usable(),
    )
    if leave is Leave.MUST_GO:
        replace(db, session)
    elif leave is Leave.SETTLES:
        session.version = version
    elif leave is not Leave.STAYS:
        try:
            replace(db, session, "last" if leave is Leave.GOES_BY_TRIAL else "never")
        except Exception:
            # It works, after a fashion; no other try until a circuit changes.
            session.version = balancer.version


def replace(
    db: Any,
    session: Session,
    trials: str = "last",
    resume: Callable[[], object] | None = None,
    only: Peer | None = None,
) -> None:
    """Put a new connection into the place of the present one.

    The new one is opened before the old one is given up, but for a lost one out of a pool. If
    that fails, the old one stays, dead or not, with all that Django knows of it.

    :param trials: see :meth:`LoadBalancer.connect`.
    :param resume: begins the transaction anew on the new connection.
    :param only: the peer to connect to; None: any.
    :raises Exception: what connect() raised, as Django translates it.
    """
    present = current(db)
    if present is not None and present is not session and not present.dead:
        # A listener to the loss has asked the database: it is replaced already.
        return
    if session.dead and is_pooled(session.connection):
        # First: where all of a pool's connections are lost, each would wait for another's place.
        give_back(session.connection)
    state = vars(db)
    before = dict(state)
    old, hold, transaction = db.connection, db._counted, db._transaction
    try:
        # What sets the new connection up is no query of the application's.
        db.queries_log = collections.deque()
        # Out of the way before connect(), which releases a hold.
        db._counted = None
        db.connection = None
        # As Django does before it connects anew. It closes nothing here, but an engine
        # may keep what it has set in the session, and forgets it in close().
        db.close()
        # connect() switches autocommit on, and Django runs hooks there.
        db.run_commit_hooks_on_set_autocommit_on = False
        with db.wrap_database_errors:
            db._terms = trials, only
            db.connect()
        for name in _OF_THE_TRANSACTION:
            if name in before:
                state[name] = before[name]
        if resume is not None:
            db._transaction = transaction
            new_session = db._session
            try:
                # What is sent now means nothing to the session.
                db._session = None
                resume()
            finally:
                db._session = new_session
            mark(db, new_session)
    except BaseException:
        new = db.connection
        if new is not None and new is not old:
            give_back(new)
            db._release()
        # All that connect() has changed: autocommit, close_at and the like, too.
        state.update(before)
        raise
    finally:
        db._terms = db._ANY_PEER
    if hold is not None:
        hold.release()
    # psycopg2 lets no cursor of a closed connection be read to its end; it closes with the last.
    if session.dead or not db._driver.ends_its_cursors(session.connection):
        give_back(session.connection)
    successor = db._session
    assert successor is not None
    successor.balancer.emit(
        ConnectionReplaced(
            session.balancer.name,
            session.peer.name,
            successor.peer.name,
            forced=session.dead,
            error=session.error,
        ),
    )


def restart(db: Any, session: Session) -> None:
    """Begin the transaction, in which nothing has changed yet, on another connection."""
    replace(db, session, resume=functools.partial(begin_anew, db))


def begin_anew(db: Any) -> None:
    db._plain("_set_autocommit")(False)
    db.autocommit = False
    for sid in db._transaction.savepoints:
        db._plain("_savepoint")(sid)


# Cursors on the present connection


def bind(db: Any, cursor: Any, name: str | None = None) -> Session:
    """Give ``cursor`` a driver's cursor on the present connection; return its session.

    It is made as the peer engine makes one: what the engine sends for each cursor
    (a tenant's schema, a role) is sent for this one.
    """
    made = db._cursor(name)
    if name is not None:
        # psycopg complains about a server-side cursor that is still open.
        with contextlib.suppress(Exception):
            cursor.cursor.close()
    session: Session = db._session
    cursor.cursor = made.cursor
    cursor._session = session
    if name is not None:
        note_named(cursor, session)
    return session


def note_named(cursor: Any, session: Any) -> None:
    """Take note that ``cursor`` is a server-side one: what it reads is on this connection only."""
    cursor._session = None
    cursor._server_side = session
    if not session.server_side:
        session.server_side = weakref.WeakSet()
    session.server_side.add(cursor)
