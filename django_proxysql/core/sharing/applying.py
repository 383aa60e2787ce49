"""What other processes found out, applied to this process's circuits."""

from __future__ import annotations

from ..breaker import PeerBreaker
from ..circuit import Circuit, ClosedElsewhere, OpenedElsewhere, PutOff
from ..faults import Fault
from ..permits import JITTER


def apply_open(
    breaker: PeerBreaker,
    generation: int,
    *,
    due_in: float,
    out_for: float,
    error: str,
    fault: Fault | None,
    question: str = "",
) -> Circuit | None:
    """Open the circuit, or put off its next trial, as another process has found.

    It is not this process's failure, and counts as none. A trial under way here is
    left to its own result.

    :param generation: of the record that was compared with what the others know.
        Where the circuit has opened or closed since, their word is a late one.
    :param due_in: seconds until the fleet's next trial. This process's own comes a
        little later, spread as widely as ever, and only if the fleet is silent.
    :param out_for: seconds for which the peer has been out.
    :param error: what it said last.
    :param fault: what that says about it.
    :param question: what its trials must ask.
    :returns: the record as it is now; None if nothing was changed.
    """
    now = breaker._clock()
    due = now + due_in + breaker.reset_timeout * 2 * JITTER * breaker._jitter()
    event = OpenedElsewhere(generation, due, out_for, error, fault, question)
    before, after = breaker.apply(event, now, elsewhere=True)
    return None if after is before else after


def apply_closed(breaker: PeerBreaker, generation: int) -> Circuit | None:
    """Close the circuit as another process has, whose trial went well.

    :param generation: as for :func:`apply_open`.
    :returns: as there.
    """
    before, after = breaker.apply(ClosedElsewhere(generation), breaker._clock(), elsewhere=True)
    return None if after is before else after


def put_off(breaker: PeerBreaker, generation: int, seconds: float) -> None:
    """Leave an open circuit's trial to another process that is about to make it.

    :param generation: as for :func:`apply_open`.
    :param seconds: for how long at least.
    """
    now = breaker._clock()
    breaker.replace(PutOff(generation, now + seconds), now)
