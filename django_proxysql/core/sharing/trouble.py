"""What is wrong with a Redis, in words that say what to do about it: a pure function."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator
from typing import NamedTuple


class Trouble(NamedTuple):
    """Why a Redis is of no use."""

    #: What it does or does not do, as a sentence without its subject. Holds no secret.
    says: str
    #: The error's own words; "" where there are none.
    detail: str = ""

    def __str__(self) -> str:
        return f"it {self.says} ({self.detail})" if self.detail else f"it {self.says}"


NO_ANSWER = Trouble("does not answer")

#: redis-py's names for what only a node of a Redis Cluster answers.
_OF_A_CLUSTER = {"AskError", "ClusterCrossSlotError", "ClusterDownError", "MovedError"}


def trouble_from(
    exc: BaseException,
    *,
    database: object = 0,
    has_password: bool = True,
    uses_tls: bool = False,
    was_answered: bool = False,
) -> Trouble:
    """Return what an error of redis-py's says about a Redis and about SHARED_STATE.

    :param database: the number of the database that SHARED_STATE names.
    :param was_answered: this Redis has answered this process before.
    """
    detail = f"{type(exc).__name__}: {' '.join(str(exc).split())}"
    causes = list(_causes(exc))
    said = " ".join(str(cause) for cause in causes).lower()
    names = {cls.__name__ for cause in causes for cls in type(cause).__mro__}
    if "NoPermissionError" in names or "noperm" in said:
        says = "does not let our user run its scripts; see SHARED_STATE, and the user's ACL"
    elif "AuthenticationError" in names or _any(said, "noauth", "wrongpass", "invalid password"):
        says = "refused our password"
        if not has_password:
            says += ", for SHARED_STATE has none"
        says += "; see SHARED_STATE"
    elif "hello" in said and "unknown command" in said:
        says = (
            "is older than Redis 6, which protocol=3 takes; see SHARED_STATE: protocol=2 is the "
            "default"
        )
    elif names & _OF_A_CLUSTER:
        says = "is a Redis Cluster, which SHARED_STATE cannot use; name a Redis that is none"
    elif "unknown command" in said and "eval" in said:
        says = "runs no scripts, as a Redis Sentinel does not; see SHARED_STATE"
    elif "db index is out of range" in said or "invalid db index" in said:
        says = f"has no database {database}; see SHARED_STATE"
    elif any(isinstance(cause, ssl.SSLCertVerificationError) for cause in causes):
        says = "shows a TLS certificate that is not trusted; see ssl_ca_certs in SHARED_STATE"
    elif any(isinstance(cause, ssl.SSLError) for cause in causes) or "handshake" in said:
        says = "does not speak TLS as rediss:// in SHARED_STATE demands"
    elif any(isinstance(cause, socket.gaierror) for cause in causes):
        says = "has a host name that cannot be resolved; see SHARED_STATE"
    elif any(isinstance(cause, FileNotFoundError) for cause in causes):
        says = "cannot be connected to: a file that SHARED_STATE names does not exist"
    elif uses_tls is was_answered is False and _any(said, "reset by peer", "closed by server"):
        says = "ends connections at once; a port for TLS does so: then SHARED_STATE is rediss://…"
    elif "InvalidResponse" in names:
        says = "answers as no Redis does; see SHARED_STATE"
    elif "ResponseError" in names:
        says = "refused a command"
    else:
        says = NO_ANSWER.says
    return Trouble(says, detail)


def _causes(exc: BaseException) -> Iterator[BaseException]:
    """Yield an error and what it was raised from."""
    seen: set[int] = set()
    cause: BaseException | None = exc
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        yield cause
        cause = cause.__cause__ or cause.__context__


def _any(text: str, *parts: str) -> bool:
    return any(part in text for part in parts)
