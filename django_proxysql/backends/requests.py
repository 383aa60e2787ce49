"""What becomes of a connection between two requests or tasks, after a fork, and when it is closed.

Decides whether it is kept; acts on the wrapper's connection.
"""

from __future__ import annotations

import contextlib
import time
from typing import Any

from django.db.utils import Error

from .decisions import Why, may_replace, must_raise_loss
from .replacing import is_safe, replace, restore_log, situation_of
from .replays import give_up
from .sessions import Session, close_for_good, close_in_child, current, is_pooled


def close_if_unusable_or_obsolete(db: Any) -> None:
    """End a request or task: close what is not to be kept."""
    if not db.in_atomic_block:
        recover(db)
        if db._session is not None:
            # Of a connection that is closed by now, too: the next one follows it.
            db._session.wrote = db._session.results = False
            db._session.lost_results = 0
            db._ends_requests = True
    session = current(db)
    if session is not None and not db.in_atomic_block:
        if db.autocommit and not db._transaction.is_of_atomic:
            session.holds.end_request()
        if is_unannounced(db, session, db.errors_occurred):
            if db.close_at is None or time.monotonic() < db.close_at:
                # The next statement shows the loss.
                return
        elif session.dead and db.autocommit and not db._transaction.is_of_atomic:
            db.close()
    if is_to_leave(db):
        db.close()
    db._plain("close_if_unusable_or_obsolete")()
    if session is not None and session.balancer.rebalance.returns:
        move(db, session)


def close_if_health_check_failed(db: Any) -> None:
    """Close a connection that is found unusable, unless its loss would go unnoticed.

    Called once a request, where CONN_HEALTH_CHECKS asks for it.
    """
    session = current(db)
    if session is not None and session.holds and not session.error_raised:
        # If it is not usable it is marked, and the statement that is to come shows the loss.
        db.is_usable()
        db.health_check_done = True
    db._plain("close_if_health_check_failed")()


def is_unannounced(db: Any, session: Session, ask: bool) -> bool:
    """Return whether session state is lost, and the application does not know it.

    :param ask: ask the driver whether the connection is usable, if it is not known dead.
    """
    if session.connection is not db.connection or not (session.dead or ask):
        return False
    may_be_news = must_raise_loss(True, situation_of(db, session))
    return may_be_news and (session.dead or not db.is_usable())


def move(db: Any, session: Session) -> None:
    """Between two requests or tasks, go to a peer that has come back, if it is our turn."""
    balancer = session.balancer
    # What an earlier request has left may be there still, and so is the peer it is on.
    if session is not current(db) or session.dead:
        return
    if not may_replace(Why.REBALANCING, situation_of(db, session)):
        return
    if balancer.pinned_to(session.peer) is not None:
        return
    move = balancer.claim_move(session.peer)
    if move is None:
        return
    try:
        db._only = move.peer
        replace(db, session, "never")
    except Exception:  # noqa: S110 - the connection that is there works
        pass
    finally:
        db._only = None


def is_to_leave(db: Any) -> bool:
    """Return whether the connection, between two requests or tasks, leads to a drained peer."""
    peer = db.peer
    if peer is None or not peer.drained or db.in_atomic_block or not db.autocommit:
        return False
    if db._thread_sharing_count > 0:
        return False
    session = current(db)
    if session is not None:
        # Unbuffered cursors end with the request, unless one is in the middle of its rows.
        is_read = not (session.server_side or db._driver.is_busy(session.connection))
        now = situation_of(db, session)._replace(unread=not is_read)
        if not may_replace(Why.LEAVING, now):
            return False
    registered = db._registered()
    if registered is None:
        return False
    balancer = registered.balancer.group
    # As with a circuit that has opened: a connection that works is better than none.
    return balancer.has_usable() and balancer.pinned_to(peer) is not peer


def close(db: Any) -> Any:
    session = db._session
    if session is not None and session.connection is db.connection:
        if session.dead and is_pooled(db.connection):
            # The driver need not know of it: the pool must not hand it out again.
            close_for_good(db.connection)
        was_dead = session.dead
        session.lose()
        session.raised()
        if was_dead:
            # It may be closed already, which mysqlclient and PyMySQL complain of.
            with contextlib.suppress(Error):
                return db._plain("_close")()
            return None
    return db._plain("_close")()


def after_fork(db: Any) -> None:
    """In a forked child: leave the connection to the parent, whose it is.

    At a safe point the wrapper is as one that has not connected yet.
    Elsewhere what the child thinks it is in the middle of is the parent's:
    for the child the connection is lost.
    """
    connection = db.connection
    if connection is None or not db._driver.LEAVES:
        return
    if db._counted is None and db._attempt is None:
        # Made without a balancer.
        return
    session = db._session if db._attempt is None else None
    if session is None or session.connection is not connection:
        # The very thread that is at connect() has forked: out of a receiver.
        db._driver.leave(connection)
        return
    safe = is_safe(db, session)
    try:
        # After an error the number of its socket may be another's.
        if not session.dead and not session.unsure:
            db._driver.leave(connection)
    finally:
        if safe:
            db.connection = db._session = None
            db._release()
            close_in_child(connection, db._driver)
        else:
            session.lose("the connection is the parent process's")


def recover(db: Any) -> None:
    db._plain("_recover")()
    if db._read_only:
        # An interrupt has left it so.
        give_up(db)
    db._quiet = db._of_ours = False
    db._trials = "first"
    db._only = None
    restore_log(db)
