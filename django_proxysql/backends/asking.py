"""What a peer is asked when an error leaves open what is wrong with it.

Decides what a refusal says of its peer and its connection, by the answers; opens circuits
and marks the connection.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any

from ..core import drivers, ready
from ..core.circuit import CLOSED
from ..core.exceptions import NotReady
from ..core.faults import Fault, Judgement
from ..core.peer import Peer
from .decisions import Answer, after_read_only
from .sessions import Session, interrupted

#: psycopg 3's names, psycopg2's numbers.
_NOT_SERIALIZABLE = ("READ_UNCOMMITTED", "READ_COMMITTED", "REPEATABLE_READ", "1", "2", "4")


def is_given_up(db: Any, session: Session, exc: BaseException, judgement: Judgement) -> bool:
    """Judge a peer that is not ready by what it says when asked; return whether the
    connection is to be replaced."""
    breaker = session.peer.breaker
    question = judgement.question
    if judgement.may_be_busy:
        return breaker.circuit.state != CLOSED or has_no_server(db, session, exc)
    # Before the circuit opens, for what is known of the peer is forgotten then.
    asks = question == "writable" or (db._driver.SPLITS and judgement.did_not_run)
    writer = ask(db, session) if asks else None
    if question == "writable":
        if not session.balancer.needs_writer:
            # Elsewhere it is the application's own affair.
            return False
        own = answer_of(writer)
        new = Answer.UNKNOWN if own is Answer.WRITABLE else ask_anew(db, session)
        verdict = after_read_only(own, new)
        if verdict.asks_later:
            session.doubt()
        if not verdict.opens:
            return verdict.drops
    breaker.trip(exc, Fault.NOT_READY, question)
    return True


def ask(db: Any, session: Session) -> ready.Writer | None:
    """Ask the connection itself what takes its writes; None if it does not answer now."""
    if session.dead or session.unbuffered or db._driver.is_busy(session.connection):
        return None
    try:
        writer = ready.writer_of(session.connection)
    except BaseException as exc:
        session.is_server = session.peer.is_server
        if drivers.is_driver_error(exc):
            return None
        # A time limit, say: the answer that comes next may be this question's.
        interrupted(db, exc)
        raise
    session.peer.note_server(writer.is_server)
    session.is_server = session.peer.is_server
    return writer


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
    """Ask a proxy, on a new connection, whether a server behind it answers.

    It says the same where all its connections to them are in use. The last
    peer is not asked: it is kept whatever it says.

    :returns: whether the circuit is open now.
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
        with throw_away(db, session.peer) as connection:
            ready.backend(connection)
    except Exception as error:
        if not drivers.judge(error, connecting=True).fault.counts:
            # Full, or the trouble is on this side.
            return False
    else:
        peer.unanswered = 0
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
    own = db.settings_dict
    settings = registered.to_connect_with(peer, own, db.alias)
    before = db._peer_settings
    try:
        db._peer_settings = settings
        params = db.get_connection_params()
    finally:
        db._peer_settings = before
    config = registered.balancer.config
    seconds = seconds or config.trial_timeout or config.connect_timeout
    return ready.throw_away(db._driver, db.Database.connect, params, seconds)


def did_not_run(db: Any, session: Session | None, judgement: Judgement) -> bool:
    """Return whether an error proves that its statement did not run.

    What a server refuses has not run. A proxy in front of it may say so of
    what has, and is known by the thread id of its greeting.
    """
    if not judgement.did_not_run:
        return False
    return session is None or not judgement.is_answer or is_of_server(db, session)


def is_of_server(db: Any, session: Session) -> bool:
    """Return whether the server itself answers, and no proxy in its place."""
    if db._driver.SPLITS and session.is_server is None:
        ask(db, session)
    return not db._driver.SPLITS or bool(session.is_server)


def isolation_of(session: Session) -> Any:
    """Return the isolation level that psycopg keeps for the connection; None: the server's."""
    try:
        return getattr(session.connection, "isolation_level", None)
    except Exception:
        # The driver does not say of a connection that is closed: it may be SERIALIZABLE.
        return "unknown"


def is_serializable(db: Any, level: Any, connection: Any = None) -> bool | None:
    """Return whether COMMIT may find a conflict of reads alone; None: that is not known.

    :param level: as of :func:`isolation_of`.
    :param connection: is asked for its server's default; None: no server is asked.
    """
    if db.vendor == "mysql":
        # Its reads take locks, then: a conflict is found before.
        return False
    if level is not None:
        # psycopg's: 4 in version 3, 3 in psycopg2's first releases still.
        return getattr(level, "name", str(level)) not in _NOT_SERIALIZABLE
    if connection is None:
        return None
    [(name,)] = ready.rows(connection, "SHOW default_transaction_isolation")
    return str(name) == "serializable"


def answer_of(writer: ready.Writer | None) -> Answer:
    """Return what a connection has said of itself.

    What a proxy's servers say is not of this connection: what the proxy said, it said of it.
    """
    if writer is None:
        return Answer.UNKNOWN
    return Answer.READ_ONLY if writer.refusal or not writer.is_server else Answer.WRITABLE
