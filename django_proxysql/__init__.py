"""django-proxysql: a software load balancer for a Django database.

The names below marked as the core's import no Django and work without it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .core.balancer import LoadBalancer
from .core.breaker import PeerBreaker
from .core.exceptions import NoPeerAvailable, NotReady
from .core.faults import Fault
from .core.peer import Peer
from .core.url import from_url

if TYPE_CHECKING:
    from . import signals
    from .core.aio import AsyncLoadBalancer
    from .errors import CommitOutcomeUnknown
    from .registry import balancers
    from .request import retrying_request
    from .retry import retrying_atomic

__version__ = "1.0.0.dev0"

__all__ = [
    "AsyncLoadBalancer",
    "CommitOutcomeUnknown",
    "Fault",
    "LoadBalancer",
    "NoPeerAvailable",
    "NotReady",
    "Peer",
    "PeerBreaker",
    "balancers",
    "from_url",
    "retrying_atomic",
    "retrying_request",
    "signals",
]

#: What is imported when it is asked for: Django's side, and asyncio's.
_ON_DEMAND = {
    "AsyncLoadBalancer": "core.aio",
    "CommitOutcomeUnknown": "errors",
    "balancers": "registry",
    "retrying_atomic": "retry",
    "retrying_request": "request",
}


def __getattr__(name: str) -> Any:
    # PEP 562.
    if name == "signals":
        return import_module(f".{name}", __name__)
    if name in _ON_DEMAND:
        return getattr(import_module(f".{_ON_DEMAND[name]}", __name__), name)
    if name == "default_app_config" and import_module("django").VERSION < (3, 2):
        # A later Django finds the app by itself, and warns of this.
        return f"{__name__}.apps.DjangoProxySQLConfig"
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
