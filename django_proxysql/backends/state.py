"""A connection's health, and where its transaction stands: records with named transitions.

What a session holds is the third record: :class:`~django_proxysql.core.holdings.Holdings`.

Nothing of a transaction is kept but in its record, so that nothing of it outlives it. The engine
makes a record when autocommit is switched off, another after each COMMIT and ROLLBACK by hand,
and puts :data:`NO_TRANSACTION` in its place when autocommit is on again.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Any

from ..core.sockets import Counter


class Life(enum.Enum):
    """Whether a connection can be used."""

    WORKS = "works"
    #: It works, but its peer is not ready: replaced at the next safe point.
    LEAVING = "leaving"
    #: It is lost, and the application does not know. It stays in place until the next safe point.
    LOST = "lost"
    #: It is lost, and its error was raised in the application.
    ERROR_RAISED = "error raised"


# By these names: up to Python 3.11 each look at an enum's member is a call.
WORKS, LEAVING, LOST, ERROR_RAISED = Life


class Health:
    """One connection's health. Each method is one transition; nothing else writes it."""

    __slots__ = ("dead", "doubted", "error", "life", "loss", "poll", "timed_out", "unsure")

    def __init__(self, poll: Callable[[int], object] | None) -> None:
        self.life = WORKS
        #: Whether :attr:`life` is LOST or ERROR_RAISED, for code that asks at each statement.
        self.dead = False
        #: Looks at the socket; None where that cannot be done, or no longer.
        self.poll = poll
        #: The driver raised something that was no answer: ask before trusting the socket.
        self.unsure = False
        #: A write was refused, and the connection could not be asked why: asked at the next
        #: safe point.
        self.doubted = False
        #: It was given up for its silence, which may not have been its end.
        self.timed_out = False
        #: What the driver said when it ended, or refused its peer's service.
        self.error = ""
        #: What the ping of a dead socket raised, to be raised in COMMIT's place.
        self.loss: BaseException | None = None

    @property
    def is_leaving(self) -> bool:
        return self.life is LEAVING

    @property
    def error_raised(self) -> bool:
        return self.life is ERROR_RAISED

    def leave(self, error: str) -> None:
        """Note that its peer refuses its service."""
        if not self.dead:
            self.life, self.doubted = LEAVING, False
            self.error = error

    def lose(
        self, error: str = "", *, timed_out: bool = False, loss: BaseException | None = None
    ) -> None:
        """Note that the connection has ended. What is learned of it later says nothing of how."""
        if not self.dead:
            # First: what an asynchronous exception leaves behind is not used again.
            self.dead = True
            self.life, self.timed_out = LOST, timed_out
        # The number of its socket may belong to another connection by now.
        self.poll = None
        self.unsure = self.doubted = False
        self.error = self.error or error
        self.loss = self.loss or loss

    def raised(self) -> None:
        """Note that an error that was met on the connection goes to the application."""
        if self.dead:
            self.life = ERROR_RAISED

    def not_raised(self) -> None:
        """Note that the error that was met last has not reached the application."""
        if self.dead:
            self.life = LOST

    def doubt(self) -> None:
        """Note that a write was refused, and that the connection could not be asked why."""
        self.doubted = not self.dead

    def settle_doubt(self) -> None:
        """Note that the connection is being asked."""
        self.doubted = False

    def distrust(self) -> None:
        """Note that the driver raised what is no answer of the server's."""
        if not self.dead:
            self.unsure, self.poll = True, None

    def trust(self, poll: Callable[[int], object] | None) -> None:
        """Note that the server has answered, after the driver was not trusted."""
        if self.unsure:
            self.unsure, self.poll = False, poll


class Stage(enum.Enum):
    """How far a transaction has come."""

    #: There is none: each statement is a transaction of its own.
    NONE = "none"
    #: Nothing was sent in it yet but Django's own SAVEPOINTs. It may begin again elsewhere.
    BEGUN = "begun"
    #: Something was sent in it.
    ACTIVE = "active"
    #: COMMIT was sent, and not answered: it may stand.
    COMMITTING = "committing"
    #: COMMIT was answered: it stands.
    COMMITTED = "committed"
    #: ROLLBACK was answered, or the connection ended before COMMIT: it does not stand.
    ROLLED_BACK = "rolled back"
    #: COMMIT was sent and not done, and never will be: it met a conflict, or the peers were asked.
    #: The transaction may be run once more.
    NOT_DONE = "not done"
    #: COMMIT was sent, and its answer was lost or says nothing.
    UNKNOWN = "unknown"


NONE, BEGUN, ACTIVE, COMMITTING, COMMITTED, ROLLED_BACK, NOT_DONE, UNKNOWN = Stage

#: How many are kept, and how many may be run again where the block goes on: each is proven to be
#: a read before it counts, while the application waits.
_MOST_READS, MOST_BEGUN_ANEW = 200, 20

# Tuples: a set asks each member for its hash, by a function in Python.
_ENDED = (COMMITTED, ROLLED_BACK, NOT_DONE, UNKNOWN)
_SENT = (ACTIVE, COMMITTING, UNKNOWN)
_MAY_STAND = (COMMITTING, COMMITTED, UNKNOWN)


class Transaction:
    """One transaction, from its beginning to the answer that ends it.

    Each method is one transition. A record that has ended stays as it is, for
    :func:`~django_proxysql.retrying_atomic`, which asks afterwards.

    :param by_hand: ``set_autocommit(False)`` began it, or AUTOCOMMIT in the
        settings, not an atomic block.
    :param hooks: how many of the wrapper's on_commit hooks belong to earlier
        transactions by hand, whose COMMIT was answered.
    """

    __slots__ = (
        *("by_hand", "hooks", "is_void", "is_whole", "mark", "may_be_read_only", "reads"),
        *("savepoints", "stage", "undone"),
    )

    def __init__(self, by_hand: bool, stage: Stage = BEGUN, hooks: int = 0) -> None:
        self.by_hand = by_hand
        self.stage = stage
        self.hooks = hooks
        #: Nothing was sent in it that may have ended it, as MySQL's DDL does: what COMMIT
        #: commits is all of it.
        self.is_whole = True
        #: It has ended, nothing was sent in it, and no hook waited for its COMMIT.
        self.is_void = False
        #: The application may have made it READ ONLY, in which it takes no token: the server is
        #: asked, for a part that is rolled back, or another statement, takes that back.
        self.may_be_read_only = False
        #: What counts what is sent, and its count when the transaction was last known to hold
        #: nothing else; None where the driver knows that by itself, or it cannot be known.
        self.mark: tuple[Counter, int] | None = None
        #: What was answered in it, texts and parameters, as long as all of it looks like
        #: reads; None once anything else was sent.
        self.reads: list[tuple[Any, Any]] | None = None if stage is NONE else []
        #: SAVEPOINTs in it, while it holds nothing else but reads: made again with it.
        self.savepoints: list[str] = []
        #: SAVEPOINTs that Django has rolled back to: a loss of their RELEASE loses nothing more.
        self.undone: set[str] = set()

    # Statements

    def statement_sent(self) -> None:
        """A statement was sent, or something that may have been one."""
        if self.stage is BEGUN:
            self.stage = ACTIVE
        self.reads = None

    def read_answered(self, sql: Any, params: Any) -> None:
        """A statement that looks like a read was answered."""
        if self.reads is None or self.by_hand or len(self.reads) >= _MOST_READS:
            self.statement_sent()
            return
        if self.stage is BEGUN:
            self.stage = ACTIVE
        self.reads.append((sql, params))

    def only_savepoints_sent(self, reads: list[tuple[Any, Any]] | None = None) -> None:
        """What was sent last was a SAVEPOINT of Django's own, which can be made again.

        :param reads: what had been answered before.
        """
        if self.stage is ACTIVE:
            self.reads = reads or []
            if not reads:
                self.stage = BEGUN

    # Django is about to send these

    def savepoint_made(self, sid: str) -> None:
        self.undone.discard(sid)
        if self.reads is not None:
            self.savepoints.append(sid)

    def savepoint_released(self, sid: str) -> None:
        """Those made after it go with it."""
        if sid in self.savepoints:
            del self.savepoints[self.savepoints.index(sid) :]

    def savepoint_restored(self, sid: str) -> None:
        """Those made after it end."""
        if sid in self.savepoints:
            del self.savepoints[self.savepoints.index(sid) + 1 :]
        if self.stage is not NONE:
            self.undone.add(sid)

    def to(self, stage: Stage) -> None:
        """Note that COMMIT is about to be sent, or how COMMIT or ROLLBACK has ended.

        What is known of a COMMIT stays known if a ROLLBACK comes after it.
        """
        if self.stage is NONE or (stage is ROLLED_BACK and self.has_ended):
            return
        self.stage = stage

    # Asked

    @property
    def is_of_atomic(self) -> bool:
        """Whether an atomic block began it, and it has not been left yet."""
        return self.stage is not NONE and not self.by_hand

    @property
    def is_pending(self) -> bool:
        """Whether nothing was sent in a transaction that an atomic block began."""
        return self.stage is BEGUN and not self.by_hand

    @property
    def has_only_read(self) -> bool:
        """Whether an atomic block began it, and all that was answered in it looks like reads."""
        return self.stage in _SENT and not self.by_hand and bool(self.reads)

    @property
    def has_ended(self) -> bool:
        """Whether nothing hangs on what is sent from here on."""
        return self.stage in _ENDED

    @property
    def may_stand(self) -> bool:
        """Whether COMMIT was sent, and not answered with a refusal, or a part may stand alone.

        An empty transaction leaves nothing.
        """
        return (self.stage in _MAY_STAND and not self.is_void) or not self.is_whole


#: What is in a record's place while there is no transaction. It never changes.
NO_TRANSACTION = Transaction(by_hand=False, stage=NONE)
