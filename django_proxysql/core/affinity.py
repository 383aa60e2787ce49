"""A thread or task that is pinned to one peer."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator

from .peer import Peer


class Pin:
    """One ``pinned()`` block; its peer is known once the block has connected."""

    __slots__ = ("_first", "is_over")

    def __init__(self, peer: Peer | None) -> None:
        self._first: dict[str, Peer] = {} if peer is None else {"peer": peer}
        self.is_over = False

    @property
    def peer(self) -> Peer | None:
        return self._first.get("peer")

    def settle(self, peer: Peer) -> Peer:
        """Return the block's peer: ``peer``, unless another connect of the block was first."""
        # One step: threads that connect at once may share the block.
        return self._first.setdefault("peer", peer)


class Affinity:
    """Which peer each thread, greenlet or asyncio task is pinned to."""

    def __init__(self) -> None:
        # A context variable: greenlets and asyncio's tasks have their own, and
        # what sync_to_async() runs in a thread has its task's.
        self.pins: contextvars.ContextVar[Pin | None] = contextvars.ContextVar(
            "django_proxysql.pin", default=None
        )

    def pin(self) -> Pin | None:
        """Return the block that the caller is in."""
        pin = self.pins.get()
        return None if pin is None or pin.is_over else pin

    @contextlib.contextmanager
    def pinned(self, peer: Peer | None, begun: Callable[[], object]) -> Iterator[None]:
        """Pin the thread or task to one peer for the block; inside another such block do nothing.

        :param peer: None: the first one that the block connects to.
        :param begun: called once the block has its pin.
        """
        if self.pin() is not None:
            yield
            return
        pin = Pin(peer)
        try:
            self.pins.set(pin)
            begun()
            yield
        finally:
            # Tasks that were begun in the block have a copy of their own.
            pin.is_over = True
            # A generator's block may be closed by another thread or task, which has its own.
            if self.pins.get() is pin:
                self.pins.set(None)

    def pinned_to(self, peer: Peer) -> Peer | None:
        """Return the peer that the caller is pinned to; None: it is not pinned.

        :param peer: the caller's own. The first call in a block pins it, if it is available.
        """
        pin = self.pin()
        if pin is None:
            return None
        return pin.settle(peer) if peer.is_available else pin.peer
