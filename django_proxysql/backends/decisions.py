"""What may be done after a loss: pure functions of plain records.

Nothing here asks a server or changes anything. Each rule is a line, and
``tests/test_decisions.py`` tries every combination.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from ..core.texts import Text
from .state import Stage

__all__ = [
    "Cause",
    "How",
    "Lost",
    "Place",
    "Replay",
    "leaves_no_trace",
    "may_replay",
    "writes_token",
]


class Place(enum.Enum):
    """Where a statement was when it was lost."""

    #: Outside of every transaction: it is one of its own.
    AUTOCOMMIT = "autocommit"
    #: The first statement of an atomic block.
    FIRST = "first statement of a block"
    #: In an atomic block in which nothing was sent before it but reads.
    AFTER_READS = "after reads of a block"
    #: Anywhere else: the transaction had done something, or is not an atomic block's.
    LATER = "later"


class Cause(enum.Enum):
    """What the error says of the statement."""

    #: It did not run: it was never sent, or the server refused it.
    NOT_RUN = "not run"
    #: The connection was closed: it may have run.
    CLOSED = "closed"
    #: The peer gave no service, and the connection lives: it may have run.
    NO_SERVICE = "no service"
    #: It took as long as a time-out: it may be running still.
    TIMED_OUT = "timed out"
    #: An answer like any other.
    ANSWERED = "answered"


class How(enum.Enum):
    """How a statement is run again."""

    NEVER = "never"
    #: As it was run the first time.
    AS_IT_IS = "as it is"
    #: In a READ ONLY transaction, in which the server refuses what only looks like a read.
    READ_ONLY = "read only"


@dataclass(frozen=True)
class Lost:
    """A statement that was lost, and all that counts for what may be done about it."""

    place: Place
    cause: Cause
    text: Text
    #: "mysql", "mariadb" or "postgresql".
    dialect: str
    #: The REPLAY setting.
    enabled: bool
    #: The session holds something, results may be unread, or others use the connection.
    holds_state: bool
    #: The parameters are plain values, and not too many.
    sendable: bool
    #: It is one execute(), and not executemany(), which sends several.
    single: bool
    #: The request has written, and other peers may not show it yet.
    may_be_stale: bool


@dataclass(frozen=True)
class Replay:
    """What may be done: how the statement is run again, and what is asked before.

    Each question goes to the new peer, before the transaction begins there. A
    no to any of them, or no answer, means that the loss is raised.
    """

    how: How
    #: Run it in a READ ONLY transaction of its own before: what it changes for good
    #: shows there. (For what cannot run READ ONLY, for its locks or for what follows.)
    rehearse: bool = False
    #: Ask whether all that it may change is undone by a rollback.
    is_undone: bool = False
    #: Ask whether each statement of the transaction reads anew (READ COMMITTED).
    reads_anew: bool = False


_NEVER = Replay(How.NEVER)


def may_replay(lost: Lost) -> Replay:
    """Return how a lost statement may be run again."""
    if not lost.enabled or lost.holds_state or not lost.sendable or lost.place is Place.LATER:
        return _NEVER
    if lost.cause in (Cause.TIMED_OUT, Cause.ANSWERED):
        return _NEVER
    if not lost.single and lost.text is not Text.PLAIN:
        return _NEVER
    in_block = lost.place is not Place.AUTOCOMMIT
    after_reads = lost.place is Place.AFTER_READS
    # What the block has read must not be older on another peer.
    if after_reads and lost.may_be_stale:
        return _NEVER
    if (
        lost.cause is Cause.NOT_RUN
        and lost.single
        and lost.text in (Text.READ, Text.LOCKING, Text.PLAIN)
    ):
        return Replay(How.AS_IT_IS, reads_anew=after_reads)
    if lost.text is Text.READ and not lost.may_be_stale:
        if in_block and lost.dialect != "postgresql":
            # MySQL's transaction cannot be READ ONLY for one statement alone.
            return Replay(How.AS_IT_IS, rehearse=True, reads_anew=after_reads)
        return Replay(How.READ_ONLY, reads_anew=after_reads)
    if lost.text is Text.LOCKING and in_block and not lost.may_be_stale:
        return Replay(How.AS_IT_IS, rehearse=True, reads_anew=after_reads)
    if lost.cause is not Cause.CLOSED and not (lost.cause is Cause.NOT_RUN and not lost.single):
        return _NEVER
    # COMMIT was never sent: what a rollback undoes has not happened.
    if lost.text is Text.PLAIN and in_block:
        return Replay(How.AS_IT_IS, is_undone=True, reads_anew=after_reads)
    if lost.text is Text.SCHEMA and in_block and lost.dialect == "postgresql":
        return Replay(How.AS_IT_IS, is_undone=True, reads_anew=after_reads)
    # Of the transaction, and gone with it.
    if lost.text is Text.OF_TRANSACTION and lost.place is Place.FIRST:
        return Replay(How.AS_IT_IS)
    # Of the session, which held nothing but this, and is gone.
    if lost.text is Text.SETTING and not in_block:
        return Replay(How.AS_IT_IS)
    return _NEVER


def leaves_no_trace(only_read: bool, serializable: bool | None) -> bool:
    """Return whether a transaction whose COMMIT is lost is as good as committed.

    :param only_read: all that was answered in it is proven to be reads without locks.
    :param serializable: COMMIT itself may find that what was read never was so; None if
        that is not known.
    """
    return only_read and serializable is False


def writes_token(
    *, enabled: bool, stage: Stage, by_hand: bool, is_whole: bool, only_read: bool
) -> bool:
    """Return whether a transaction writes a token before COMMIT.

    :param enabled: the setting COMMIT_OUTCOME.
    :param stage: how far it has come.
    :param by_hand: no atomic block began it.
    :param is_whole: nothing has ended it in between. A token says what became of the last part.
    :param only_read: all that was sent in it is proven to be reads: it has nothing to lose.
    """
    return enabled and stage is Stage.ACTIVE and not by_hand and is_whole and not only_read
