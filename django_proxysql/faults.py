"""What an exception says about a peer, and what follows from it.

A driver's table (:mod:`django_proxysql.drivers`) turns an exception into one
:class:`Fault`; the load balancer acts on the fault alone and never looks at
an error code itself.
"""

from __future__ import annotations

import enum

__all__ = ["Fault"]


class Fault(enum.Enum):
    """The kinds of failure that a load balancer tells apart."""

    #: Nothing listens, the name does not resolve, time ran out, TLS failed.
    UNREACHABLE = "unreachable"
    #: The peer is there and does not want us: password, database, host.
    REFUSED = "refused"
    #: The peer accepts connections but cannot do its work.
    NOT_READY = "not_ready"
    #: The peer works and has no connection to spare.
    OVERLOADED = "overloaded"
    #: An established connection is gone.
    LOST = "lost"
    #: A statement or connection was ended on purpose.
    KILLED = "killed"
    #: The trouble is on this side: no file descriptors, bad OPTIONS.
    LOCAL = "local"
    #: Two transactions met: deadlock, certification failure, serialization failure.
    CONFLICT = "conflict"
    #: Anything else; the application's own business.
    OTHER = "other"

    @property
    def counts(self) -> bool:
        """Whether a failed connect of this kind counts against the peer's circuit.

        OVERLOADED does not: opening the circuit of a full peer would push its
        load onto the others, and fill them next.
        """
        return self in _COUNTS

    @property
    def tries_next(self) -> bool:
        """Whether ``connect()`` goes on to the next peer after this fault."""
        return self in _TRIES_NEXT


_COUNTS = frozenset({Fault.UNREACHABLE, Fault.REFUSED, Fault.NOT_READY, Fault.LOST})
_TRIES_NEXT = _COUNTS | {Fault.OVERLOADED, Fault.KILLED}
