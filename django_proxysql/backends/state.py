"""Where a transaction stands: one small record, made when it begins and replaced as a whole.

Nothing of a transaction is kept anywhere else, so that nothing of it outlives it.
The engine makes a record when autocommit is switched off, another after each
COMMIT and ROLLBACK by hand, and puts :data:`NO_TRANSACTION` in its place when
autocommit is on again.
"""

from __future__ import annotations

import enum
from typing import Any

__all__ = ["BEGUN", "MOST_BEGUN_ANEW", "NO_TRANSACTION", "Stage", "Transaction"]


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
    #: COMMIT was sent, and its answer was lost or says nothing: nobody knows.
    UNKNOWN = "unknown"


#: How many are kept, and how many may be run again where the block goes on: each is proven to be
#: a read before it counts, while somebody waits.
_MOST_READS, MOST_BEGUN_ANEW = 200, 20

#: For code that asks at each statement.
BEGUN = Stage.BEGUN

_ENDED = frozenset({Stage.COMMITTED, Stage.ROLLED_BACK, Stage.NOT_DONE, Stage.UNKNOWN})
_SENT = frozenset({Stage.ACTIVE, Stage.COMMITTING, Stage.UNKNOWN})
_MAY_STAND = frozenset({Stage.COMMITTING, Stage.COMMITTED, Stage.UNKNOWN})


class Transaction:
    """One transaction, from its beginning to the answer that ends it.

    Each method is one transition. A record that has ended stays as it is, for
    :func:`~django_proxysql.retrying_atomic`, which asks afterwards.

    :param by_hand: ``set_autocommit(False)`` began it, or AUTOCOMMIT in the
        settings, not an atomic block.
    :param hooks: how many of the wrapper's on_commit hooks belong to earlier
        transactions by hand, whose COMMIT was answered.
    """

    __slots__ = ("by_hand", "hooks", "is_whole", "mark", "reads", "savepoints", "stage", "undone")

    def __init__(self, by_hand: bool, stage: Stage = Stage.BEGUN, hooks: int = 0) -> None:
        self.by_hand = by_hand
        self.stage = stage
        self.hooks = hooks
        #: Nothing was sent in it that may have ended it, as MySQL's DDL does: what COMMIT
        #: commits is all of it.
        self.is_whole = True
        #: What the socket had sent when the transaction was last known to hold nothing;
        #: None where the driver knows that by itself, or nobody can.
        self.mark: object = None
        #: What was answered in it, texts and parameters, as long as all of it looks like
        #: reads; None once anything else was sent.
        self.reads: list[tuple[Any, Any]] | None = None if stage is Stage.NONE else []
        #: SAVEPOINTs in it, while it holds nothing else but reads: made again with it.
        self.savepoints: list[str] = []
        #: SAVEPOINTs that went with the connection when Django rolled back to them.
        self.undone: set[str] = set()

    # Statements

    def statement_sent(self) -> None:
        """A statement was sent, or something that may have been one."""
        if self.stage is Stage.BEGUN:
            self.stage = Stage.ACTIVE
        self.reads = None

    def read_answered(self, sql: Any, params: Any) -> None:
        """A statement that looks like a read was answered."""
        if self.reads is None or self.by_hand or len(self.reads) >= _MOST_READS:
            self.statement_sent()
            return
        if self.stage is Stage.BEGUN:
            self.stage = Stage.ACTIVE
        self.reads.append((sql, params))

    def only_savepoints_sent(self, reads: list[tuple[Any, Any]] | None = None) -> None:
        """What was sent last was a SAVEPOINT of Django's own, which can be made again.

        :param reads: what had been answered before.
        """
        if self.stage is Stage.ACTIVE:
            self.reads = reads or []
            if not reads:
                self.stage = Stage.BEGUN

    def savepoint_made(self, sid: str) -> None:
        """Django is about to make a SAVEPOINT."""
        self.undone.discard(sid)
        if self.reads is not None:
            self.savepoints.append(sid)

    def savepoint_released(self, sid: str) -> None:
        """Django is about to release a SAVEPOINT, and those made after it."""
        if sid in self.savepoints:
            del self.savepoints[self.savepoints.index(sid) :]

    def savepoint_restored(self, sid: str) -> None:
        """Django is about to roll back to a SAVEPOINT, which ends those made after it."""
        if sid in self.savepoints:
            del self.savepoints[self.savepoints.index(sid) + 1 :]

    def savepoint_gone(self, sid: str) -> None:
        """Django has rolled back to a SAVEPOINT on a connection that is lost."""
        if self.stage is not Stage.NONE:
            self.undone.add(sid)

    # Its end

    def commit_sent(self) -> None:
        """COMMIT is about to be sent: from here on it may stand."""
        self._to(Stage.COMMITTING)

    def committed(self) -> None:
        """COMMIT was answered."""
        self._to(Stage.COMMITTED)

    def rolled_back(self) -> None:
        """ROLLBACK was answered. What is known of a COMMIT before it stays known."""
        if not self.has_ended:
            self._to(Stage.ROLLED_BACK)

    def commit_not_sent(self) -> None:
        """COMMIT is known never to have left, or to have been refused."""
        self._to(Stage.ACTIVE)

    def commit_not_done(self) -> None:
        """COMMIT was answered with a conflict, or found not to be done."""
        self._to(Stage.NOT_DONE)

    def outcome_unknown(self) -> None:
        """The answer to COMMIT was lost, or leaves open what became of it."""
        self._to(Stage.UNKNOWN)

    def _to(self, stage: Stage) -> None:
        if self.stage is not Stage.NONE:
            self.stage = stage

    # Asked

    @property
    def is_of_atomic(self) -> bool:
        """Whether an atomic block began it, and it has not been left yet."""
        return self.stage is not Stage.NONE and not self.by_hand

    @property
    def is_pending(self) -> bool:
        """Whether nothing was sent in a transaction that an atomic block began."""
        return self.stage is Stage.BEGUN and not self.by_hand

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
        """Whether COMMIT was sent, and not answered with a refusal."""
        return self.stage in _MAY_STAND


#: What is in a record's place while there is no transaction. It never changes.
NO_TRANSACTION = Transaction(by_hand=False, stage=Stage.NONE)
