"""Take note of errors on an established connection, and find out that it is lost.

Acts on the record of the connection (``Session``), on the peer's circuit, and on listeners. Where
an error leaves open what is wrong, the connection or its peer is asked.
"""

from __future__ import annotations

import contextlib
import copy
import math
from typing import Any

from django.db.utils import Error

from ..core import drivers, ready, sockets
from ..core.circuit import CLOSED
from ..core.events import ConnectionLost
from ..core.exceptions import NotReady
from ..core.faults import Fault, Judgement, Proof
from ..core.parameters import are_small
from ..core.peer import Peer
from .decisions import Answer, Verdict, after_error, after_read_only, loss_counts
from .sessions import NOT_MADE, Session, close_for_good, current
from .state import BEGUN

#: What a driver, or what it calls, raises of the arguments it was given, besides its own errors.
_OF_THE_CALL = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NameError,
    NotImplementedError,
    StopIteration,
    TypeError,
    ValueError,
    Warning,
    Error,
)

#: A statement with more than this may be over the server's max_allowed_packet (MySQL's least
#: default is 1 MB, and what is escaped grows): its connection's end may be its own doing.
_LARGE_PACKET = 250_000


def note(db: Any, session: Session, exc: BaseException) -> None:
    """Judge a driver error on the connection, act on it, and never raise an Exception."""
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
    timed_out = not idle and session.has_timed_out()
    is_failed_connect = after.is_loss and was_of_no_use(db, session, idle, timed_out)
    if after.ends:
        session.lose(text, timed_out=timed_out)
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


def abandon(db: Any, session: Session, exc: BaseException) -> None:
    """Close a connection at once: its next answer may be an interrupted statement's.

    If it held session state, the next statement is an error: the application does not know yet
    that the state is gone.
    """
    db._transaction.statement_sent()
    session.lose(f"interrupted by {drivers.describe(exc)}")
    close_for_good(session.connection)


def is_of_the_call(exc: BaseException) -> bool:
    """Return whether a driver, or what it calls, raised ``exc`` of the arguments it was given.

    All else comes from elsewhere: Ctrl-C, a task's time limit, a greenlet's end.
    """
    # PyMySQL in mysqlclient's place is loaded twice: what it raises of a parameter may be no
    # Error of the module that Django connects with.
    return isinstance(exc, _OF_THE_CALL) or drivers.is_driver_error(exc)


def interrupted(db: Any, exc: BaseException) -> None:
    """Take note of an exception out of a driver's method that is no error of Django's driver."""
    session = current(db)
    if session is None:
        return
    if is_of_the_call(exc) and db._driver.is_in_step(session.connection, exc):
        return
    abandon(db, session, exc)


def was_of_no_use(db: Any, session: Session, idle: bool, timed_out: bool) -> bool:
    """Return whether a connection that is lost now counts as a failed connect."""
    peer, balancer = session.peer, session.balancer
    sql, params = session.sending or (None, None)
    is_news = not (idle or timed_out)
    return loss_counts(
        served=session.served,
        idle=idle,
        watched=session.poll is not None,
        timed_out=timed_out,
        large=not are_small(params, _LARGE_PACKET) or not are_small((sql,), _LARGE_PACKET),
        elsewhere=is_news and balancer.losses.note(peer.name, sql, db._caller),
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
        if not (is_of_the_call(exc) or isinstance(exc, (db.Database.Error, ConnectionError))):
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
    if db._transaction.stage is BEGUN:
        mark(db, session)
    elif db._transaction.reads:
        db._transaction.mark = sent(db, session)
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
    if transaction.mark is not None:
        counter, sent_by_then = transaction.mark
        is_untouched = counter is session.counter and counter.is_still(sent_by_then)
    else:
        # The driver knows by itself, as long as nothing was read either.
        driver, connection = db._driver, session.connection
        is_untouched = (
            not transaction.reads
            and not driver.is_closed(connection)
            and driver.in_transaction(connection) is False
        )
    if not is_untouched:
        transaction.statement_sent()


def mark(db: Any, session: Session) -> None:
    """Take note of what has been sent, unless the driver can tell that nothing was."""
    # A driver without a status never can.
    knows = session.status is not None and db._driver.in_transaction(session.connection) is False
    db._transaction.mark = None if knows else sent(db, session)


def sent(db: Any, session: Session) -> tuple[sockets.Counter, int] | None:
    """Return how much was sent over a connection that was answered just now, and what counted
    it; None: unknown."""
    counter = session.counter
    if counter is NOT_MADE:
        counter = session.counter = db._driver.counter(session.connection)
    if counter is None:
        return None
    now = counter.sent()
    return None if now is None else (counter, now)


# What the connection, or its peer, is asked


def is_given_up(db: Any, session: Session, exc: BaseException, judgement: Judgement) -> bool:
    """Judge a peer that is not ready by what it says when asked; return whether the
    connection is to be replaced."""
    breaker = session.peer.breaker
    question = judgement.question
    if judgement.may_be_busy:
        return breaker.circuit.state != CLOSED or has_no_server(db, session, exc)
    # Before the circuit opens, for what is known of the peer is forgotten then.
    asks = question == "writable" or (db._driver.SPLITS and judgement.proof is Proof.NOT_RUN)
    writer = ask(db, session) if asks else None
    if question == "writable":
        if session.balancer.ready_check is not ready.writable:
            # Elsewhere it is the application's own affair.
            return False
        own = answer_of(writer)
        new = Answer.UNKNOWN if own is Answer.WRITABLE else ask_anew(db, session)
        verdict = after_read_only(own, new)
        if verdict is Verdict.ASKS_LATER:
            session.doubt()
        if verdict is not Verdict.OPENS:
            return verdict is Verdict.DROPS
    breaker.trip(exc, Fault.NOT_READY, question)
    return True


def ask(db: Any, session: Session) -> ready.Writer | None:
    """Ask the connection itself what takes its writes; None if it does not answer now."""
    if session.dead or session.unbuffered or db._driver.is_busy(session.connection):
        return None
    try:
        writer = ready.writer_of(session.connection)
        session.peer.note_server(writer.is_server)
        return writer
    except BaseException as exc:
        if drivers.is_driver_error(exc):
            return None
        # A time limit, say: the answer that comes next may be this question's.
        interrupted(db, exc)
        raise
    finally:
        session.is_server = session.peer.is_server


def ask_anew(db: Any, session: Session) -> Answer:
    """Ask a new connection to the same peer whether it takes writes."""
    circuit = session.peer.breaker.circuit
    if circuit.state != CLOSED and circuit.question == "writable":
        # Another thread has asked just now.
        return Answer.READ_ONLY
    try:
        with throw_away(db, session.peer) as connection:
            ready.writable(connection)
    except NotReady:
        return Answer.READ_ONLY
    except Exception:
        return Answer.UNKNOWN
    return Answer.WRITABLE


def has_no_server(db: Any, session: Session, exc: BaseException) -> bool:
    """Ask a proxy, on a new connection, whether a server behind it answers; return whether the
    circuit is open now.

    It says the same where all its connections to them are in use. The last
    peer is not asked: it is kept whatever it says.
    """
    balancer, peer = session.balancer, session.peer
    now = session.clock()
    # One thread at a time: each who asks takes one more connection.
    if now < peer.asked_until or not balancer.can_spare(peer):
        return False
    since = session.used
    if peer.has_served(since):
        # Others are being served, and this one was unlucky.
        peer.unanswered = 0
        return False
    peer.asked_until = now + 2 * balancer.config.connect_timeout
    try:
        with throw_away(db, peer) as connection:
            ready.backend(connection)
        peer.unanswered = 0
        return False
    except Exception as error:
        if not drivers.judge(error, connecting=True).fault.counts:
            # Full, or the trouble is on this side.
            return False
    finally:
        peer.asked_until = -math.inf
    return balancer.count_unanswered(peer, exc, since)


def settle_doubt(db: Any, session: Session) -> None:
    """Ask a connection that could not be asked when a write was refused on it."""
    session.settle_doubt()
    if answer_of(ask(db, session)) is Answer.READ_ONLY:
        session.leave(session.error or "the server takes no writes")


def throw_away(
    db: Any, peer: Peer, seconds: float | None = None
) -> contextlib.AbstractContextManager[Any]:
    """Return a connection to ``peer`` for a few questions; see :func:`.ready.throw_away`.

    :param seconds: for connecting, and then for all answers; None: as the settings say.
    """
    registered = db._registered()
    assert registered is not None
    stand_in = copy.copy(db)
    stand_in._peer_settings = registered.to_connect_with(peer, db.settings_dict, db.alias)
    params = stand_in.get_connection_params()
    config = registered.balancer.config
    seconds = seconds or config.trial_timeout or config.connect_timeout
    return ready.throw_away(db._driver, db.Database.connect, params, seconds)


def did_not_run(db: Any, session: Session | None, judgement: Judgement) -> bool:
    """Return whether an error proves that its statement did not run.

    What a server refuses has not run. A proxy in front of it may say so of
    what has, and is known by the thread id of its greeting.
    """
    if judgement.proof is not Proof.NOT_RUN:
        return False
    return session is None or not judgement.is_answer or is_of_server(db, session)


def is_of_server(db: Any, session: Session) -> bool:
    """Return whether the server itself answers, and no proxy in its place."""
    if db._driver.SPLITS and session.is_server is None:
        ask(db, session)
    return not db._driver.SPLITS or bool(session.is_server)


def answer_of(writer: ready.Writer | None) -> Answer:
    """Return what a connection has said of itself.

    What a proxy's servers say is not of this connection: what the proxy said, it said of it.
    """
    if writer is None:
        return Answer.UNKNOWN
    return Answer.READ_ONLY if writer.refusal or not writer.is_server else Answer.WRITABLE
