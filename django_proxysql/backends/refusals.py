"""What a refusal says about its connection and about its peer, once they have been asked.

A server that was made read-only keeps its connections, and new ones may lead
elsewhere: a proxy sends them to the new primary. So the connection that was
refused is asked, and a new one too. Each answers for itself.
"""

from __future__ import annotations

import enum
from typing import NamedTuple

__all__ = ["Answer", "Verdict", "after_read_only"]


class Answer(enum.Enum):
    """What one connection says of the writes that are sent over it."""

    WRITABLE = "writable"
    READ_ONLY = "read-only"
    #: It could not be asked: PostgreSQL answers nothing in a transaction that has failed.
    UNKNOWN = "unknown"


class Verdict(NamedTuple):
    """What follows."""

    #: The connection is replaced at its next safe point.
    drops: bool = False
    #: The peer's circuit opens.
    opens: bool = False
    #: The connection is asked again at its next safe point.
    asks_later: bool = False


def after_read_only(own: Answer, new: Answer) -> Verdict:
    """Judge a statement that was refused for being a write, where peers are to be writable.

    :param own: what the connection says that it was refused on.
    :param new: what a new connection to the same peer says. Not asked where ``own`` takes
        writes: the refusal was the application's own doing (``SET TRANSACTION READ ONLY``).
    """
    if own is Answer.WRITABLE:
        return Verdict()
    opens = new is Answer.READ_ONLY
    drops = opens or own is Answer.READ_ONLY
    return Verdict(drops, opens, asks_later=not drops)
