"""django-proxysql: a software load balancer for a Django database.

The names below marked as the core's import no Django and work without it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .balancer import LoadBalancer
from .breaker import PeerBreaker
from .exceptions import NoPeerAvailable, NotReady
from .faults import Fault
from .peer import Peer

if TYPE_CHECKING:
    from .registry import balancers

__version__ = "1.0.0.dev0"

__all__ = [
    "Fault",
    "LoadBalancer",
    "NoPeerAvailable",
    "NotReady",
    "Peer",
    "PeerBreaker",
    "balancers",
]


def __getattr__(name: str) -> Any:
    # Django's side is imported when it is asked for (PEP 562), never before.
    if name == "balancers":
        from .registry import balancers

        return balancers
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
