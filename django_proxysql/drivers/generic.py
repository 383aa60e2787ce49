"""A driver that nobody has told us about: PEP 249's names, and nothing more."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..faults import Fault

#: Whether established connections are looked after: there is a server to lose.
WATCHED = False

#: Whether :func:`leave` parts a process from a connection.
LEAVES = False

#: Whether a proxy may answer for a server.
SPLITS = False


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


def session_options(params: Any, autocommit: bool) -> dict[str, Any]:
    """Return nothing: whether such an option exists is not known."""
    return {}


def greeting(connection: Any) -> str:
    """Return "": nothing is assumed."""
    return ""


def trial_options(params: Any, seconds: float) -> dict[str, Any]:
    """Return nothing."""
    return {}


def known_options() -> frozenset[str] | None:
    """Return None: nothing is assumed."""
    return None


def is_option_error(exc: BaseException) -> bool:
    """Return False: nothing is assumed."""
    return False


def is_killed_connection(exc: BaseException) -> bool:
    """Return False: nothing is assumed."""
    return False


def is_answer(exc: BaseException) -> bool:
    """Return True: nothing is looked at, so nothing is looked at wrongly."""
    return True


def is_read_only_refusal(exc: BaseException) -> bool:
    """Return False: nothing is assumed."""
    return False


def proves_not_run(exc: BaseException) -> bool:
    """Return False: nothing is assumed."""
    return False


def outcome_is_unknown(exc: BaseException) -> bool:
    """Return whether ``exc``, of a COMMIT that was sent, leaves open what came of it."""
    return fault(exc, connecting=False) is Fault.LOST


def question_of(exc: BaseException) -> str:
    """Return nothing to ask."""
    return ""


def may_be_busy(exc: BaseException) -> bool:
    """Return False: nothing is assumed."""
    return False


def fileno(connection: Any) -> int | None:
    """Return None: there is no socket to look at that we know of."""
    return None


def leave(connection: Any) -> None:
    """Do nothing: nothing is assumed."""


def ping(connection: Any) -> None:
    """Take the connection for alive."""


def is_busy(connection: Any) -> bool:
    """Return False: nothing is assumed."""
    return False


def leads_to(connection: Any) -> tuple[str, str] | None:
    """Return None: nothing is assumed."""
    return None


def socket_options(connection: Any, params: Any) -> frozenset[str]:
    """Return none: there is no argument that sets one."""
    return frozenset()


def ends_its_cursors(connection: Any) -> bool:
    """Return False: nothing is assumed."""
    return False


def is_unbuffered(params: Any) -> bool:
    """Return False."""
    return False


def status(connection: Any) -> Callable[[], object] | None:
    """Return None: nothing is assumed."""
    return None


def in_transaction(connection: Any) -> bool | None:
    """Return None: nothing is assumed."""
    return None


def is_at_rest(connection: Any) -> bool:
    """Return True: nothing is assumed."""
    return True


def sent(connection: Any) -> object:
    """Return None: there is no socket that we know of."""
    return None


def is_in_step(connection: Any, exc: BaseException) -> bool:
    """Return True: nothing is assumed."""
    return True


def is_closed(connection: Any) -> bool:
    """Return False: nothing is assumed."""
    return False


def code_of(exc: BaseException) -> Any:
    """Return None: nothing is assumed."""
    return None


def is_usual(connection: Any, cls: type) -> bool:
    """Return False: nothing is assumed."""
    return False
