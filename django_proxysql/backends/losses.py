"""Take note of errors on an established connection, and find out that it is lost.

Decides what an error, or a socket that has become readable, says of the connection; acts
on the record of the connection (``Session``), on the peer's circuit, and on listeners.
"""

from __future__ import annotations

import contextlib
from typing import Any

from django.db.utils import DatabaseErrorWrapper

from ..core import drivers, sockets
from ..core.events import ConnectionLost
from ..core.faults import Fault, Judgement, Loss, loss_counts
from ..core.texts import are_small
from .asking import is_given_up
from .decisions import after_error
from .sessions import OF_THE_CALL, Session, abandon, current, interrupted
from .state import Stage, Transaction

#: A statement with more than this may be over the server's max_allowed_packet (MySQL's least
#: default is 1 MB, and what is escaped grows): its connection's end may be its own doing.
_LARGE_PACKET = 250_000


class ErrorHook(DatabaseErrorWrapper):
    wrapper: Any

    def __exit__(self, exc_type: Any, exc_value: Any, traceback: Any) -> None:
        if exc_type is None:
            # Each statement comes by here.
            return
        if isinstance(exc_value, self.wrapper.Database.Error):
            saw(self.wrapper, exc_value)
        elif exc_type is not GeneratorExit:
            interrupted(self.wrapper, exc_value)
        super().__exit__(exc_type, exc_value, traceback)


def saw(db: Any, exc: BaseException) -> None:
    """Take note of a driver error on the established connection. Never raises."""
    session = current(db)
    if session is not None:
        note(db, session, exc)
        session.sending = None
        session.raised()


def note(db: Any, session: Session, exc: BaseException) -> None:
    """Judge a driver error, and act on the judgement. Never raises an Exception."""
    with contextlib.suppress(Exception):
        act_on(db, session, exc, drivers.judgement_of(exc, db._driver))


def act_on(
    db: Any, session: Session, exc: BaseException, judgement: Judgement, idle: bool = False
) -> None:
    """Note what an error says of the connection; notify the peer's circuit and listeners.

    :param idle: a ping met it, before anything was sent.
    """
    fault, text = judgement.fault, judgement.text
    is_closed = db._driver.is_closed(session.connection)
    breaker = session.peer.breaker
    if fault is Fault.NOT_READY:
        if db._read_only and judgement.question == "writable":
            # What is run again as a read was none: that says nothing of the peer.
            return
        if is_closed:
            # A pooler without a server says so, and hangs up.
            session.lose(text)
            drivers.mark(exc, "end")
        if is_given_up(db, session, exc, judgement):
            session.leave(text)
            drivers.mark(exc, "end")
        elif session.dead:
            # It may be busy: the next connect goes elsewhere first.
            breaker.suspect(text, fault)
        return
    after = after_error(
        judgement, is_closed=is_closed, was_dead=session.dead, is_explained=bool(session.error)
    )
    is_failed_connect = after.is_loss and loss_counts(loss_of(db, session, idle))
    if after.ends:
        session.lose(text, timed_out=not idle and session.has_timed_out())
    if after.may_begin_again:
        drivers.mark(exc, "end")
    if after.distrusts:
        session.distrust()
    if after.suspects:
        breaker.suspect(text, fault)
    if after.is_loss:
        # Last: a listener may ask the database, and must find the connection dead.
        if is_failed_connect and session.permit is not None:
            breaker.count_failure(exc, Fault.LOST, session.permit.generation)
        else:
            breaker.suspect(text, Fault.LOST)
        balancer, peer = session.balancer, session.peer
        balancer.emit(ConnectionLost(balancer.name, peer.name, peer.address, fault, text, idle))


def loss_of(db: Any, session: Session, idle: bool) -> Loss:
    """Return what is known of a connection that is lost now."""
    peer, balancer = session.peer, session.balancer
    sql, params = session.sending or (None, None)
    timed_out = not idle and session.has_timed_out()
    elsewhere = False
    if not (idle or timed_out):
        elsewhere = balancer.losses.note(peer.name, sql, db._caller)
    return Loss(
        served=session.served,
        idle=idle,
        watched=session.poll is not None,
        timed_out=timed_out,
        large=not are_small(params, _LARGE_PACKET) or not are_small((sql,), _LARGE_PACKET),
        elsewhere=elsewhere,
        last=not balancer.can_spare(peer),
    )


def is_usable(db: Any) -> bool:
    """Ask the driver; what it says counts for the peer, too."""
    session = current(db)
    if session is not None:
        notice_unseen(db, session)
    usable: bool = db._plain("is_usable")()
    session = current(db)
    if session is None or usable or session.dead:
        return usable
    # PostgreSQL answers nothing in a transaction that has failed: that is no loss, and the
    # driver's own ping knows of it.
    try:
        db._driver.ping(session.connection)
    except Exception:
        session.lose()
        session.peer.breaker.suspect("the connection was found unusable", Fault.LOST)
    return usable


def is_lost(db: Any, session: Session) -> bool:
    """Look at the socket, and ask the driver if there is something to be read."""
    if session.dead:
        return True
    poll = session.poll
    if poll is None:
        if not session.unsure:
            return False
    elif not poll(0):
        return False
    try:
        db._driver.ping(session.connection)
    except BaseException as exc:
        if not isinstance(exc, (db.Database.Error, ConnectionError, *OF_THE_CALL)):
            # Its answer may come yet.
            abandon(db, session, exc)
            raise
        judgement = drivers.judgement_of(exc, db._driver)
        if judgement.fault is Fault.OTHER and judgement.is_answer:
            return False
        if db._driver.code_of(exc) == 2014:
            # Results are unread: the connection is healthy.
            session.holds.takes_unknown()
            return False
        with contextlib.suppress(Exception):
            act_on(db, session, exc, judgement, idle=True)
        # Kept to be raised in COMMIT's place, without the frames.
        session.lose(loss=exc.with_traceback(None))
        return True
    if db._transaction.stage is Stage.BEGUN:
        mark(db, session)
    elif db._transaction.reads:
        db._transaction.mark = db._driver.sent(session.connection)
    if session.unsure:
        session.trust(sockets.watch(db._driver.fileno(session.connection)))
    return False


def notice_unseen(db: Any, session: Session) -> None:
    """Take note of what was sent in a transaction and is not known to be nothing.

    What the application sends by the driver's own cursor or connection does not pass here.
    Call it before the loss of a connection is noticed.
    """
    transaction = db._transaction
    if transaction.reads is None or session.dead:
        return
    if transaction.reads:
        mark = transaction.mark
        untouched = mark is not None and mark == db._driver.sent(session.connection)
    else:
        untouched = is_untouched(db, session, transaction)
    if not untouched:
        transaction.statement_sent()


def is_untouched(db: Any, session: Session, transaction: Transaction) -> bool:
    """Return whether nothing was sent in a transaction but Django's own SAVEPOINTs."""
    driver, connection = db._driver, session.connection
    if driver.is_closed(connection):
        return False
    if transaction.mark is None:
        return driver.in_transaction(connection) is False
    return bool(transaction.mark == driver.sent(connection))


def mark(db: Any, session: Session) -> None:
    """Take note of what has been sent, unless the driver can tell that nothing was."""
    driver, connection = db._driver, session.connection
    knows = driver.in_transaction(connection) is False
    db._transaction.mark = None if knows else driver.sent(connection)


def is_end_of(db: Any, session: Session, exc: BaseException) -> bool:
    """Return whether closing a cursor has found its connection lost: nothing is, with it."""
    if session is current(db):
        note(db, session, exc)
    return session.dead
