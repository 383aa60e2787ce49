"""Was it endured? What the site saw, beside what is in the tables and what happened to it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from django.db import OperationalError

from .load import Failure, Ledger
from .scenarios import READ_TIMEOUT, Fault, Scenario

#: Seconds for the news of a blow to travel.
GRACE = 0.25
#: Galera's answer to a transaction that another one, or a change of the cluster, came before.
_CONFLICT = 1213


@dataclass
class Result:
    """One scenario with one engine; a line of the table."""

    scenario: str
    engine: str
    faults: int
    requests: int
    failed_reads: int = 0
    failed_writes: int = 0
    failed_blocks: int = 0
    #: Operations that took as long as they may.
    timed_out: int = 0
    #: Operations that failed while there was no peer.
    in_outage: int = 0
    lost: int = 0
    doubled: int = 0
    longest: float = 0.0
    #: Connections that the engine replaced, and statements that it ran again.
    replaced: int = 0
    replayed: int = 0
    #: Blocks that were run again, and COMMITs that were asked about.
    retried: int = 0
    resolved: int = 0
    #: After an outage: seconds from the first peer's return to the first request served.
    resumed_after: float | None = None
    #: The same, to the last error.
    quiet_after: float | None = None
    violations: list[str] = field(default_factory=list)


def judge(
    scenario: Scenario,
    engine: str,
    ledgers: list[Ledger],
    faults: list[Fault],
    rows: Counter[str],
) -> Result:
    """Say what came of it, and what must not have."""
    result = Result(scenario.name, engine, len(faults), sum(ledger.requests for ledger in ledgers))
    result.longest = max(ledger.longest for ledger in ledgers)
    _count_rows(result, ledgers, rows)
    spent: Counter[tuple[int, int | None, bool]] = Counter()
    for ledger in ledgers:
        for failure in ledger.failures:
            _count_failure(result, failure, scenario, faults, spent, engine)
    outages = [fault for fault in faults if fault.returned is not None]
    for fault in outages:
        _time_outage(result, fault, ledgers)
    return result


def _count_rows(result: Result, ledgers: list[Ledger], rows: Counter[str]) -> None:
    told: set[str] = set()
    for ledger in ledgers:
        told.update(ledger.done, ledger.failed)
        for token in ledger.done:
            if not rows[token]:
                result.lost += 1
                result.violations.append(f"the write {token} was reported done, and is lost")
        blocks = set(ledger.blocks_done)
        for token in blocks | set(ledger.hooks):
            wanted = 1 if token in blocks else 0
            if ledger.hooks[token] != wanted:
                result.violations.append(
                    f"the on_commit hook of {token} ran {ledger.hooks[token]} times, not {wanted}"
                )
    for token, count in rows.items():
        if count > 1:
            result.doubled += 1
            result.violations.append(f"the write {token} stands {count} times")
        if token not in told:
            result.violations.append(f"the write {token} stands, and the site never learned of it")


def _count_failure(
    result: Result,
    failure: Failure,
    scenario: Scenario,
    faults: list[Fault],
    spent: Counter[tuple[int, int | None, bool]],
    engine: str,
) -> None:
    if not isinstance(failure.error, OperationalError):
        result.violations.append(f"{failure}: not what a loss is")
    number = _fault_of(failure, faults)
    fault = None if number is None else faults[number]
    if fault is not None and fault.outage:
        result.in_outage += 1
        return
    timed_out = scenario.hangs and failure.code == 2013 and failure.seconds >= READ_TIMEOUT * 0.95
    if timed_out:
        result.timed_out += 1
    elif failure.kind == "read":
        result.failed_reads += 1
    elif failure.kind == "write":
        result.failed_writes += 1
    else:
        result.failed_blocks += 1
    if engine == "retrying" and not timed_out:
        result.violations.append(f"{failure}: it is run again, or asked about")
    elif scenario.codes is not None and failure.code not in scenario.codes:
        result.violations.append(f"{failure}: no error of a write that was being certified")
    elif not timed_out and failure.stage in ("begin", "read"):
        result.violations.append(f"{failure}: it could have been mended")
    elif fault is None or number is None:
        begun = max((f.began for f in faults if f.began <= failure.ended), default=None)
        when = "before any" if begun is None else f"{failure.ended - begun:.2f} s after the last"
        result.violations.append(f"{failure}: it was struck by no fault, {when} began")
    else:
        thread = None if fault.at_most is not None else failure.thread
        # Nodes that agree anew on who is there may refuse a transaction besides: a conflict.
        spent[number, thread, failure.code == _CONFLICT] += 1
        if spent[number, thread, failure.code == _CONFLICT] > (fault.at_most or 1):
            result.violations.append(f"{failure}: one too many over “{fault.what}”")


def _fault_of(failure: Failure, faults: list[Fault]) -> int | None:
    """The last fault that the operation was in flight at."""
    for number in reversed(range(len(faults))):
        fault = faults[number]
        if failure.ended >= fault.began and failure.started <= fault.over + GRACE:
            return number
    return None


def _time_outage(result: Result, fault: Fault, ledgers: list[Ledger]) -> None:
    assert fault.returned is not None
    served = [t for ledger in ledgers for t in ledger.served if t >= fault.returned]
    errors = [
        failure.ended
        for ledger in ledgers
        for failure in ledger.failures
        if fault.returned <= failure.ended <= fault.over
    ]
    resumed = min(served, default=float("inf")) - fault.returned
    quiet = max(errors, default=fault.returned) - fault.returned
    result.resumed_after = max(resumed, result.resumed_after or 0.0)
    result.quiet_after = max(quiet, result.quiet_after or 0.0)
    if fault.returned + resumed > fault.over:
        result.violations.append("no request was served when a peer was there again")
