"""What may be done to a connection and to a lost statement: pure functions of plain records.

No function here asks a server. ``tests/test_decisions.py`` tries every combination, and
``docs/explanation/established.rst`` lists the rules and where each is held.
"""

from __future__ import annotations

import enum
from typing import NamedTuple

from ..core.faults import Fault, Judgement
from ..core.texts import Text
from .state import ACTIVE, Stage


class After(NamedTuple):
    """What follows from an error for its connection and for its peer."""

    #: The connection has ended.
    ends: bool
    #: It was lost, which was not known: the peer's circuit and the listeners learn of it.
    is_loss: bool
    #: The error ended the connection, and not on purpose: what is begun once more may succeed.
    may_begin_again: bool
    #: No answer came: the socket is not trusted until the driver has asked.
    distrusts: bool
    #: The peer has no room and hangs up: the next connect goes elsewhere first.
    suspects: bool


def after_error(
    judgement: Judgement, *, is_closed: bool, was_dead: bool, is_explained: bool
) -> After:
    """Return what follows from an error that says nothing of the peer's readiness.

    :param is_closed: the driver knows that the connection is closed.
    :param was_dead: the connection was known to have ended.
    :param is_explained: and what ended it was known as well.
    """
    fault = judgement.fault
    # psycopg knows for certain; mysqlclient's error says it.
    is_lost = fault not in (Fault.KILLED, Fault.OVERLOADED) if is_closed else fault is Fault.LOST
    ends = is_lost or is_closed or judgement.is_killed or was_dead
    return After(
        ends,
        is_loss=is_lost and not (was_dead and is_explained),
        may_begin_again=ends and fault is not Fault.KILLED,
        distrusts=not ends and not judgement.is_answer,
        suspects=ends and fault is Fault.OVERLOADED,
    )


def loss_counts(
    *,
    served: bool,
    idle: bool,
    watched: bool,
    timed_out: bool,
    large: bool,
    elsewhere: bool,
    last: bool,
) -> bool:
    """Return whether a lost connection counts as a failed connect.

    It does if it was of no use to anybody, and nothing suggests that its statement is the cause.
    Every other loss makes the peer suspect: the next connect is a trial, and finds a dead peer.

    :param served: a statement has succeeded on it.
    :param idle: it was found lost before anything was sent: it may have been lost for long.
    :param watched: its socket could be looked at until then.
    :param timed_out: it was given up for its silence: the statement may be running still.
    :param large: the statement is so large that a server may refuse to read it, and hang up.
    :param elsewhere: the same statement or caller has lost a connection to another peer lately.
    :param last: no other peer's circuit is closed.
    """
    return watched and not (served or idle or timed_out or large or elsewhere or last)


class Why(enum.Enum):
    """Why a connection is to be replaced at a safe point."""

    LOST = "lost"
    #: It works. Its peer's circuit is open, or the peer is drained.
    LEAVING = "leaving"
    #: It works, and another peer has come back.
    REBALANCING = "rebalancing"


class Situation(NamedTuple):
    """What counts for whether a connection may be replaced, or its transaction begun anew."""

    #: The connection's loss was raised in the application.
    error_raised: bool
    #: The session holds something: ``SET``, a lock, a temporary table, ``foreign_key_checks=0``.
    holds: bool
    #: Django's own ``foreign_key_checks=0`` is in force.
    by_django: bool
    #: An earlier request left something that may still be there.
    earlier: bool
    #: Several threads share the wrapper.
    shared: bool
    #: Results are unread, or a server-side or unbuffered cursor is open.
    unread: bool
    #: An atomic block is open, autocommit is off, or a transaction was begun past Django.
    in_transaction: bool


def may_replace(why: Why, now: Situation, asks_connection: bool = False) -> bool:
    """Return whether the connection may be replaced: now is a safe point.

    :param asks_connection: the next statement asks for what this connection alone can answer:
        ``LAST_INSERT_ID()``. Another's answer would be wrong.
    """
    if now.in_transaction or now.shared:
        return False
    if asks_connection and not now.error_raised:
        return False
    if why is Why.LOST and now.error_raised:
        # What was in it is gone, and the application knows.
        return not now.by_django
    if why is Why.REBALANCING and now.earlier:
        return False
    return not (now.holds or now.unread)


def must_raise_loss(is_lost: bool, now: Situation) -> bool:
    """Return whether a loss that cannot be mended is raised in the application, once."""
    return is_lost and now.holds and not now.error_raised


def may_restart(is_pending: bool, now: Situation, asks_connection: bool = False) -> bool:
    """Return whether the transaction may be begun anew on another connection.

    :param is_pending: nothing was sent in it but Django's own SAVEPOINTs.
    :param asks_connection: the next statement asks for what this connection alone can answer,
        or takes session state.
    """
    if not is_pending or now.error_raised or asks_connection:
        return False
    return not (now.shared or now.holds or now.unread)


class Pinned(enum.Enum):
    """Whether the thread or task is pinned to one peer: ``pinned()``."""

    NO = "no"
    HERE = "here"
    ELSEWHERE = "elsewhere"


class Leave(enum.Enum):
    """Whether a connection that works leaves its peer at a safe point."""

    #: The next statement asks again.
    STAYS = "stays"
    #: It stays until a circuit changes.
    SETTLES = "settles"
    #: It goes if a closed circuit lets it in.
    GOES = "goes"
    #: It goes, by a trial if nothing else is left.
    GOES_BY_TRIAL = "goes, by a trial too"
    #: It goes, and the error is raised if it cannot.
    MUST_GO = "must go"


def may_leave(pinned: Pinned, *, is_out: bool, not_ready: bool, wrote: bool, can_go: bool) -> Leave:
    """Return whether a connection that works leaves its peer.

    :param is_out: the peer's circuit is not closed, or the peer is drained.
    :param not_ready: the peer has refused this connection its service.
    :param can_go: another peer's circuit is closed.
    """
    if pinned is Pinned.HERE:
        return Leave.STAYS
    if pinned is Pinned.ELSEWHERE:
        return Leave.MUST_GO
    if not_ready:
        return Leave.GOES_BY_TRIAL
    if not is_out:
        return Leave.SETTLES
    if wrote:
        # What it wrote may not be seen elsewhere yet: at the request's end.
        return Leave.STAYS
    return Leave.GOES if can_go else Leave.SETTLES


def must_catch_up(is_mysql: bool, *, has_written: bool, has_not_caught_up: bool) -> bool:
    """Return whether a connection waits for what the cluster has committed before it is used."""
    return is_mysql and (has_written or has_not_caught_up)


class Place(enum.Enum):
    """Where a statement was when it was lost."""

    AUTOCOMMIT = "autocommit"
    FIRST = "first statement of an atomic block"
    #: In an atomic block in which nothing was sent before it but reads.
    AFTER_READS = "after reads of a block"
    #: Anywhere else: the transaction had done something, or is not an atomic block's.
    LATER = "later"


class Cause(enum.Enum):
    """What the error says of the statement."""

    #: It was never sent, or the server refused it.
    NOT_RUN = "not run"
    #: The connection was closed: it may have run.
    CLOSED = "closed"
    #: The peer gave no service, and the connection lives: it may have run.
    NO_SERVICE = "no service"
    #: It took as long as a time-out: it may be running still.
    TIMED_OUT = "timed out"
    ANSWERED = "answered"


class How(enum.Enum):
    """How a statement is run again."""

    NEVER = "never"
    AS_IT_IS = "as it is"
    #: In a READ ONLY transaction, in which the server refuses what only looks like a read.
    READ_ONLY = "read only"


class Lost(NamedTuple):
    """A statement that was lost, and all that counts for what may be done about it."""

    place: Place
    cause: Cause
    text: Text
    #: "mysql", "mariadb" or "postgresql".
    dialect: str
    #: REPLAY is not None.
    enabled: bool
    #: The session holds something, results may be unread, or others use the connection.
    holds_state: bool
    #: The parameters are plain values, and not too many.
    sendable: bool
    #: It is one execute(), and not executemany(), which sends several.
    single: bool
    #: The request has written, and other peers may not show it yet.
    may_be_stale: bool


class Replay(NamedTuple):
    """How the statement is run again, and what the new peer is asked before.

    A no to any question, or no answer, means that the loss is raised.
    """

    how: How
    #: Run it in a READ ONLY transaction of its own before, where a write shows. (For what
    #: cannot run READ ONLY, for its locks or for what follows.)
    rehearse: bool = False
    #: Ask whether all that it may change is undone by a rollback.
    is_undone: bool = False
    #: Ask whether each statement of the transaction reads anew (READ COMMITTED).
    reads_anew: bool = False


_NEVER = Replay(How.NEVER)


def may_replay(lost: Lost) -> Replay:
    """Return how a lost statement may be run again."""
    text, place, cause = lost.text, lost.place, lost.cause
    after_reads = place is Place.AFTER_READS
    in_block = after_reads or place is Place.FIRST
    if not lost.enabled or lost.holds_state or not lost.sendable or place is Place.LATER:
        return _NEVER
    if cause in (Cause.TIMED_OUT, Cause.ANSWERED):
        return _NEVER
    # What the block has read must not be older on another peer.
    if after_reads and lost.may_be_stale:
        return _NEVER
    # COMMIT was never sent: what a rollback undoes has not happened.
    undone = Replay(How.AS_IT_IS, is_undone=True, reads_anew=after_reads)
    if not lost.single:
        # Some of its statements may have run, whatever the last answer was.
        may_be_undone = text is Text.PLAIN and in_block and cause is not Cause.NO_SERVICE
        return undone if may_be_undone else _NEVER
    if cause is Cause.NOT_RUN and text in (Text.READ, Text.LOCKING, Text.PLAIN):
        return Replay(How.AS_IT_IS, reads_anew=after_reads)
    if not lost.may_be_stale and (text is Text.READ or (text is Text.LOCKING and in_block)):
        # MySQL's transaction cannot be READ ONLY for one statement alone.
        if text is Text.READ and (not in_block or lost.dialect == "postgresql"):
            return Replay(How.READ_ONLY, reads_anew=after_reads)
        return Replay(How.AS_IT_IS, rehearse=True, reads_anew=after_reads)
    if cause is not Cause.CLOSED:
        return _NEVER
    if in_block and (text is Text.PLAIN or (text is Text.SCHEMA and lost.dialect == "postgresql")):
        return undone
    # What it set went with the transaction, or with the session, which held nothing but this.
    is_first = text is Text.OF_TRANSACTION and place is Place.FIRST
    return Replay(How.AS_IT_IS) if is_first or (text is Text.SETTING and not in_block) else _NEVER


def may_count_as_committed(
    *, only_read: bool, holds: bool, shared: bool, enabled: bool, serializable: bool | None
) -> bool:
    """Return whether a transaction whose COMMIT is lost is as good as committed.

    :param only_read: all that was answered in it is proven to be reads without locks.
    :param serializable: COMMIT itself may find that what was read never was so; None: that is
        not known.
    """
    return only_read and enabled and serializable is False and not (holds or shared)


def writes_token(stage: Stage, by_hand: bool, is_whole: bool, only_read: bool) -> bool:
    """Return whether a transaction writes a token before COMMIT, where the setting says so.

    :param is_whole: nothing has ended it in between. A token says what became of the last part.
    :param only_read: all that was sent in it is proven to be reads: it has nothing to lose.
    """
    return stage is ACTIVE and not by_hand and is_whole and not only_read


class Answer(enum.Enum):
    """What one connection says of the writes that are sent over it.

    A server that was made read-only keeps its connections, and a proxy sends new ones to the new
    primary. So the connection that was refused is asked, and a new one too: each for itself.
    """

    WRITABLE = "writable"
    READ_ONLY = "read-only"
    #: It could not be asked: PostgreSQL answers nothing in a transaction that has failed.
    UNKNOWN = "unknown"


class Verdict(enum.Enum):
    """What follows from a refused write for its connection and for its peer."""

    NOTHING = "nothing"
    #: The connection is asked again at its next safe point.
    ASKS_LATER = "asks later"
    #: The connection is replaced at its next safe point.
    DROPS = "drops"
    #: That, and the peer's circuit opens.
    OPENS = "opens"


def after_read_only(own: Answer, new: Answer) -> Verdict:
    """Judge a statement that was refused for being a write, where peers are to be writable.

    :param own: what the connection says that it was refused on.
    :param new: what a new connection to the same peer says. Not asked where ``own`` takes
        writes: the refusal was the application's own doing (``SET TRANSACTION READ ONLY``).
    """
    if own is Answer.WRITABLE:
        return Verdict.NOTHING
    if new is Answer.READ_ONLY:
        return Verdict.OPENS
    return Verdict.DROPS if own is Answer.READ_ONLY else Verdict.ASKS_LATER
