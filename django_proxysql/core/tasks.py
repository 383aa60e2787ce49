"""Trials off the caller's connect(), under asyncio: a task for each, on the loop that connects.

With ``trials="background"`` a connect() that finds a peer out has :class:`TrialTasks` look after
the peers, on its loop: docs/howto/asyncio.rst says why.

How it holds
------------

*While no peer is due* there is no task, only a timer of the loop. A trial that is under way when
the loop ends is cancelled with its tasks, and its lease ends. Where a loop stops in the middle of
one, the lease expires.

*One loop at a time* makes the trials. The next loop that connects takes over from one that runs no
longer. Another thread's news, such as a circuit that opens there, is handed to the loop.

*No loop runs, or something blocks it*: requests make the trials that are overdue by two intervals.
"""

from __future__ import annotations

import asyncio
import contextvars
import math
import weakref
from collections.abc import Awaitable, Callable

from .group import PeerGroup
from .logger import Complaints
from .peer import Peer
from .runtime import LOOK_AGAIN, renew_in_child
from .trials import due, pause_after_failure


class TrialTasks:
    """Makes the trials of one group's peers.

    :param group: the peers.
    :param try_out: makes a peer's trial; returns whether it was made, and succeeded.
    """

    def __init__(self, group: PeerGroup, try_out: Callable[[Peer], Awaitable[bool]]) -> None:
        self._group, self._try_out = group, try_out
        #: Whose tasks make the trials; None: no peer needs one, as far as is known.
        self._loop: asyncio.AbstractEventLoop | None = None
        self._timer: asyncio.TimerHandle | None = None
        #: The trials under way, by the peer's name. A loop refers to its tasks weakly.
        self._tasks: dict[str, asyncio.Task[bool]] = {}
        self._not_before: dict[str, float] = {}
        self._complain = Complaints()
        renew_in_child(self)

    def schedule(self, *, news: bool) -> None:
        """Have the loop look after the peers, now if there are ``news``. Any thread may call it."""
        loop = self._loop
        if loop is None or not loop.is_running():
            try:
                loop = asyncio.get_running_loop()
            except RuntimeError:
                # The next connect() under a loop comes here again.
                return
            self._loop, self._timer, self._tasks = loop, None, {}
        elif not news:
            # The timer is set, or a trial's end sets it.
            return
        try:
            # The caller's context may pin it to a peer.
            context = contextvars.Context()
            loop.call_soon_threadsafe(_look, weakref.ref(self), loop, context=context)
        except RuntimeError:
            # It has been closed just now.
            pass

    def after_fork(self) -> None:
        """In the child: the loop is the parent's."""
        self._loop, self._timer, self._tasks = None, None, {}

    def look(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begin the trials that are due, and set the timer for the next. In the loop's thread."""
        if self._loop is not loop:
            return
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        pause = math.inf
        for moment, peer in due(self._group, self._not_before):
            if peer.name in self._tasks:
                continue
            seconds = moment - self._group.clock()
            if seconds > 0:
                pause = min(pause, seconds)
            else:
                task = loop.create_task(self._try(peer))
                self._tasks[peer.name] = task
                task.add_done_callback(lambda task, peer=peer: self._ended(task, peer, loop))  # type: ignore[misc]
        if pause < math.inf:
            self._timer = loop.call_later(min(pause, LOOK_AGAIN), _look, weakref.ref(self), loop)
        elif not self._tasks:
            self._loop = None

    async def _try(self, peer: Peer) -> bool:
        try:
            return await self._try_out(peer)
        except (asyncio.CancelledError, GeneratorExit, KeyboardInterrupt):
            raise
        except BaseException:
            # SystemExit from somebody's check, too, ends this trial and no more.
            self._complain(f"The trial of {self._group.name}/{peer.name} raised")
            return False

    def _ended(self, task: asyncio.Task[bool], peer: Peer, loop: asyncio.AbstractEventLoop) -> None:
        if self._loop is not loop:
            return
        self._tasks.pop(peer.name, None)
        if task.cancelled():
            # The loop comes to its end. The next connect() begins anew.
            self._loop = None
            return
        # KeyboardInterrupt has ended the loop, and is not to end its next run as well.
        if task.exception() is not None or not task.result():
            self._not_before[peer.name] = self._group.clock() + pause_after_failure(peer)
        self.look(loop)


def _look(tasks: weakref.ref[TrialTasks], loop: asyncio.AbstractEventLoop) -> None:
    found = tasks()
    if found is not None:
        found.look(loop)
