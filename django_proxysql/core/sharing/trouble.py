"""What is wrong with a Redis, in words that say what to do about it: a pure function."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


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


def trouble_from(exc: BaseException, options: Mapping[str, Any], *, was_answered: bool) -> Trouble:
    """Return what an error of redis-py's says about a Redis and about SHARED_STATE.

    :param options: what SHARED_STATE has redis-py connect with.
    :param was_answered: this Redis has answered this process before.
    """
    causes = [exc]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) and cause not in causes:
        causes.append(cause)
    said = " ".join(map(str, causes)).lower()
    names = {cls.__name__ for cause in causes for cls in type(cause).__mro__}
    uses_tls = "SSL" in getattr(options.get("connection_class"), "__name__", "")

    def holds(*parts: str) -> bool:
        return any(part in said for part in parts)

    if "NoPermissionError" in names or holds("noperm"):
        says = "does not let our user run its scripts; see SHARED_STATE, and the user's ACL"
    elif "AuthenticationError" in names or holds("noauth", "wrongpass", "invalid password"):
        lacking = "" if options.get("password") else ", for SHARED_STATE has none"
        says = f"refused our password{lacking}; see SHARED_STATE"
    elif "hello" in said and "unknown command" in said:
        says = (
            "is older than Redis 6, which protocol=3 takes; see SHARED_STATE: protocol=2 is the "
            "default"
        )
    elif names & _OF_A_CLUSTER:
        says = "is a Redis Cluster, which SHARED_STATE cannot use; name a Redis that is none"
    elif "unknown command" in said and "eval" in said:
        says = "runs no scripts, as a Redis Sentinel does not; see SHARED_STATE"
    elif holds("db index is out of range", "invalid db index"):
        says = f"has no database {options.get('db', 0)}; see SHARED_STATE"
    elif "SSLCertVerificationError" in names:
        says = "shows a TLS certificate that is not trusted; see ssl_ca_certs in SHARED_STATE"
    elif "SSLError" in names or holds("handshake"):
        says = "does not speak TLS as rediss:// in SHARED_STATE demands"
    elif "gaierror" in names:
        says = "has a host name that cannot be resolved; see SHARED_STATE"
    elif "FileNotFoundError" in names:
        says = "cannot be connected to: a file that SHARED_STATE names does not exist"
    elif not uses_tls and not was_answered and holds("reset by peer", "closed by server"):
        says = "ends connections at once; a port for TLS does so: then SHARED_STATE is rediss://…"
    elif "InvalidResponse" in names:
        says = "answers as no Redis does; see SHARED_STATE"
    elif "ResponseError" in names:
        says = "refused a command"
    else:
        says = NO_ANSWER.says
    return Trouble(says, f"{type(exc).__name__}: {' '.join(str(exc).split())}")
