"""The exceptions that django-proxysql raises itself.

Under Django, :class:`NoPeerAvailable` is at the same time a
``django.db.utils.OperationalError``: the Django floor derives its own class
from both, so that ``except OperationalError`` catches it and code that knows
no Django catches it by the name here.

A driver's own errors are never wrapped, and no exception of pybreaker or
tenacity leaves :meth:`LoadBalancer.connect`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


class ConfigError(ValueError):
    """A setting that cannot work.

    :param setting: the setting's name, as the user writes it.
    :param problem: what is wrong with it, as a sentence without its subject.
    :param hint: what to write instead.
    """

    def __init__(self, setting: str, problem: str, hint: str = "") -> None:
        super().__init__(setting, problem, hint)
        self.setting = setting
        self.problem = problem
        self.hint = hint

    def __str__(self) -> str:
        text = f"{self.setting} {self.problem}."
        return f"{text} {self.hint}" if self.hint else text


class UnknownPeer(ConfigError, KeyError):
    """A peer that the load balancer does not have; a ``KeyError`` as well."""


class DrainRefused(ValueError):
    """Raised by :meth:`LoadBalancer.drain`: the peer is the last that takes connections."""


class NotReady(Exception):
    """Raised by a READY_CHECK: the peer accepts connections but cannot do its work."""


class PoolBusy(Exception):
    """Raised by what opens a connection, out of a pool that has none to spare just now.

    Nothing is known of the peer, and nothing is counted: the search goes on to
    the others and comes back, with :attr:`Attempt.may_wait` set, when none of
    them is available. It never leaves :meth:`LoadBalancer.connect`.
    """


class PinnedElsewhere(Exception):
    """Raised by what opens a connection, where another connect of its ``pinned()`` block was first.

    Nothing has failed: the search goes on to that one's peer. It never leaves
    :meth:`LoadBalancer.connect`.
    """


class NoPeerAvailable(Exception):
    """No peer of a load balancer could be connected to.

    :param balancer: the load balancer's name (under Django: the alias).
    :param peers: one line a peer, saying its address, what it last said, and
        when it is tried next.
    :param pinned: the name of the one peer that this connect() was allowed to
        use (``pinned()``, ``only=``); "": all of them.
    """

    def __init__(self, balancer: str, peers: Sequence[str] = (), pinned: str = "") -> None:
        if isinstance(peers, str):
            peers = (peers,)
        super().__init__(balancer, tuple(peers), *([pinned] if pinned else []))
        self.balancer = balancer
        self.peers = tuple(peers)
        self.pinned = pinned

    def __str__(self) -> str:
        said = "; ".join(self.peers)
        if self.pinned:
            return (
                f"This connect() is pinned to {self.pinned!r} of {self.balancer!r}, which cannot "
                f"be reached, and tries no other peer. {said}."
            )
        return f"No peer of {self.balancer!r} can be reached. {said}."
