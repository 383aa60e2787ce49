"""A driver that nobody has told us about: PEP 249's names, and nothing more."""

from __future__ import annotations

from typing import Any

from ..faults import Fault


def fault(exc: BaseException, connecting: bool) -> Fault:
    """Return what ``exc`` says about the peer.

    While connecting, PEP 249's OperationalError and InterfaceError mean that
    the peer was not reached. Afterwards nothing is assumed.
    """
    names = {cls.__name__ for cls in type(exc).__mro__}
    if connecting and names & {"OperationalError", "InterfaceError"}:
        return Fault.UNREACHABLE
    return Fault.OTHER


def connect_options(params: Any, seconds: float) -> dict[str, Any]:
    """Return nothing: whether such an option exists is not known."""
    return {}


def trial_options(params: Any, seconds: float) -> dict[str, Any]:
    """Return nothing."""
    return {}
