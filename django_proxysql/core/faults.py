"""What an exception says about a peer, and what follows from it.

A driver's table (:mod:`django_proxysql.core.drivers`) turns each exception into one
:class:`Judgement`, once. The circuit, the events, the log lines and the replay act on
the judgement and never look at an error code themselves.
"""

from __future__ import annotations

import enum
from typing import NamedTuple


class Fault(enum.Enum):
    """The kinds of failure that a load balancer distinguishes."""

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
        return self in (Fault.UNREACHABLE, Fault.REFUSED, Fault.NOT_READY, Fault.LOST)

    @property
    def tries_next(self) -> bool:
        """Whether ``connect()`` goes on to the next peer after this fault."""
        return self.counts or self in (Fault.OVERLOADED, Fault.KILLED)


class Proof(enum.Enum):
    """What an error proves of the statement, or of the COMMIT, that met it."""

    #: The server refused it, or it was never sent: it did not run. This holds for one plain
    #: statement alone, and for COMMIT.
    NOT_RUN = "not run"
    #: The transaction does not stand. It may succeed if it is begun once more.
    ROLLED_BACK = "rolled back"
    #: A COMMIT that met it may stand or not.
    UNDECIDED = "undecided"
    #: It is an answer like any other.
    ANSWERED = "answered"


class Judgement(NamedTuple):
    """All that one error says. Each error is judged once, and the judgement handed on."""

    fault: Fault
    #: What it says, on one line.
    text: str
    proof: Proof = Proof.ANSWERED
    #: What a trial must ask a peer that answered so: "galera", "writable", "backend" or "".
    question: str = ""
    #: It is the server's answer: the session goes on, and the socket is what it was.
    is_answer: bool = True
    #: The connection itself was ended on purpose.
    is_killed: bool = False
    #: A proxy says so without a server and when all its connections are in use alike.
    may_be_busy: bool = False
    #: It was met while connecting.
    connecting: bool = False
    #: While connecting: a driver reports what its server said, whether a table lists it or not.
    by_server: bool = False
    #: While connecting: the driver cannot take the peer's settings.
    of_settings: bool = False

    def __reduce__(self) -> tuple[type[bool], tuple[()]]:
        """Pickle as False: the process that reads an error may not have this package."""
        return bool, ()


class Count(enum.Enum):
    """Whether, and when, a failed attempt counts against its peer's circuit."""

    NO = "no"
    NOW = "now"
    #: Once another peer has let the same search in: then the trouble is this peer's alone.
    IF_ALONE = "if alone"


class Verdict(NamedTuple):
    """What a failed attempt means for the search, and for its peer's circuit."""

    #: Whether ``connect()`` tries the next peer; otherwise the error is raised.
    goes_on: bool
    counts: Count
    #: The fault that the circuit, the events and the logs show.
    fault: Fault


def verdict_on(judgement: Judgement, *, is_callers: bool, is_trial: bool) -> Verdict:
    """Return what follows from a failed attempt to connect.

    :param is_callers: the caller asks for another database than the settings name.
    """
    fault = judgement.fault
    if fault is Fault.REFUSED and is_callers:
        return Verdict(False, Count.NO, fault)
    if fault.tries_next:
        return Verdict(True, Count.NOW if fault.counts else Count.NO, fault)
    if judgement.of_settings:
        # One peer's typo fails no connect that another peer can serve. It says nothing about
        # the server, so its circuit stays as it is.
        return Verdict(True, Count.NO, Fault.LOCAL)
    if fault is Fault.OTHER and judgement.by_server:
        # No list names all that servers say to a client. If every peer says the same, what we
        # ask for is wrong; if another peer lets us in, this one is.
        if is_callers:
            return Verdict(True, Count.NO, Fault.REFUSED)
        return Verdict(True, Count.NOW if is_trial else Count.IF_ALONE, Fault.REFUSED)
    return Verdict(False, Count.NO, fault)
