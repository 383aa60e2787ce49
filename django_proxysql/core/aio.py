"""The load balancer under asyncio: the same peers, circuits and search, and every wait an await.

:meth:`AsyncLoadBalancer.connect` reads like :meth:`LoadBalancer.connect`. docs/howto/asyncio.rst
says what differs. An attempt that takes longer than it may is cancelled, whatever the driver: so no
trial needs a throw-away connection ahead of it.
"""

from __future__ import annotations

import _thread
import asyncio
import contextlib
import functools
import inspect
from collections.abc import Awaitable, Callable, Generator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import tenacity

from . import drivers
from .circuit import Lease
from .config import function
from .exceptions import ConfigError
from .face import Face, Waiting, carrying_on
from .group import PeerGroup
from .peer import Peer, count_while_alive
from .ready import Check, ServerCheck, begins_transaction, plain
from .runtime import LOOK_AGAIN
from .search import Ask, Attempt, Search, Wait
from .sqlalchemy_engine import async_sqlalchemy_engine
from .tasks import TrialTasks

if TYPE_CHECKING:
    import sqlalchemy.ext.asyncio

__all__ = ["AsyncLoadBalancer"]

_OpenOne = Callable[[Attempt], Awaitable[Any]]
_Step = TypeVar("_Step")


class AsyncLoadBalancer(Face):
    """Spreads connections over equivalent peers, under asyncio.

    Takes what :class:`LoadBalancer` takes. ``connect`` is a driver's coroutine function, such as
    ``psycopg.AsyncConnection.connect``, ``asyncpg.connect``, ``asyncmy.connect`` or
    ``aiomysql.connect``. ``ready_check``, ``sleep`` and a callable password may be coroutine
    functions. No connect() blocks the loop; listeners and strategies run in it.

    :raises ConfigError: a wrong argument; the message names it.
    """

    async def connect(
        self,
        open_one: _OpenOne | None = None,
        *,
        refusal_is_callers: bool | Callable[[], bool] = False,
        trials: str = "first",
        only: Peer | str | None = None,
    ) -> Any:
        """Return a connection to a peer that works.

        It takes and raises what :meth:`LoadBalancer.connect` does.

        :param open_one: a coroutine function that opens a connection as the :class:`Attempt`
            says, and closes what it opened if it fails or is cancelled.
        """
        if open_one is None:
            open_one = self._open_one
        elif not callable(open_one):
            function("open_one", open_one, "Give a coroutine function that takes an Attempt.")
        one = None if only is None else self.group.named(only, "only")
        search = Search(self.group, trials, one, refusal_is_callers, self._may_search_again)
        try:
            try:
                return await self._attempt(search, open_one)
            except Exception as exc:
                if not search.goes_on(exc):
                    raise
            return await self._carry_on(search, open_one)
        except BaseException as exc:
            if search.may_be_repeated(exc):
                return await self._wait_for_peer(Waiting(self, search, exc), open_one)
            search.raised(exc)
            raise

    async def _attempt(self, search: Search, open_one: _OpenOne) -> Any:
        """Make one attempt, after waiting for another caller's trial where that is next."""
        step: Attempt | Wait | Ask | None = None
        try:
            step = search.step()
            while not isinstance(step, Attempt):
                if isinstance(step, Wait):
                    await _first_to_end(step.leases, step.seconds)
                    step = search.step()
                else:
                    step = search.step(await _answer_of_others(step))
            with _Limit(step.timeout):
                connection = await open_one(step)
        except BaseException as exc:
            if isinstance(step, Attempt):
                search.failed(step, exc)
            raise
        else:
            search.succeeded(step)
            return connection
        finally:
            # As in LoadBalancer: however this is broken off, the attempt is over.
            connection = None
            attempt = search.attempt
            if attempt is not None:
                attempt.is_over = True
                if attempt.permit is not None and attempt.permit.lease is not None:
                    attempt.permit.lease.ended = True

    async def _carry_on(self, search: Search, open_one: _OpenOne) -> Any:
        retrying = tenacity.AsyncRetrying(sleep=_not_at_all, **carrying_on(search))
        return await retrying(self._attempt, search, open_one)

    async def _wait_for_peer(self, waiting: Waiting, open_one: _OpenOne) -> Any:
        async def search_again() -> Any:
            return await self._carry_on(waiting.next_search(), open_one)

        async def sleep(seconds: float) -> None:
            await _awaited((self._sleep or asyncio.sleep)(seconds))

        try:
            return await tenacity.AsyncRetrying(sleep=sleep, **waiting.options())(search_again)
        except BaseException as exc:
            waiting.search.raised(exc)
            raise

    def sqlalchemy_engine(self, url: Any, **options: Any) -> sqlalchemy.ext.asyncio.AsyncEngine:
        """Return an asynchronous SQLAlchemy engine whose connections lead to the peers.

        It takes SQLAlchemy 2.0.16 or later; see :meth:`LoadBalancer.sqlalchemy_engine`.
        ``create_async_engine(url, async_creator=db.connect)`` works as well, without what the
        dialect passes to the driver.

        :param url: names the dialect and the driver, which is that of the balancer's ``connect``.
        :param options: what ``create_async_engine`` takes, but for creators and ``pool``.
        :raises ConfigError: one of these was given, or a driver that is not for asyncio.
        """
        return async_sqlalchemy_engine(self, self._connect_function(), url, **options)

    async def _open_one(self, attempt: Attempt) -> Any:
        return await self.open_with(self._connect_function(), attempt, attempt.peer.params)

    async def open_with(
        self, connect: Callable[..., Any], attempt: Attempt, params: Mapping[str, Any]
    ) -> Any:
        """Open, check and count a connection; see :meth:`LoadBalancer.open_with`."""
        params = drivers.with_password(params)
        for key in ("password", "passwd"):
            if inspect.isawaitable(params.get(key)):
                params[key] = await params[key]
        connecting = connect(**params)
        if not inspect.isawaitable(connecting):
            connecting.close()
            raise ConfigError("connect", "is no coroutine function", "Use LoadBalancer.")
        connection = await connecting
        try:
            if self.group.ready_check is not None or attempt.is_trial:
                await self.check_ready(connection, attempt)
            attempt.settle()
            count_while_alive(connection, attempt.peer)
        except BaseException:
            await _abort(connection)
            raise
        return connection

    async def check_ready(self, connection: Any, attempt: Attempt) -> None:
        """Ask a new connection what it must pass; see :meth:`LoadBalancer.check_ready`."""
        await _run(self._questions(attempt), functools.partial(_answer, connection))

    # Trials

    async def try_out(self, peer: Peer | str, *, now: bool = False) -> bool:
        """Make the peer's trial if it is due, and keep no connection.

        It takes, returns and raises what :meth:`LoadBalancer.try_out` does.
        """
        peer = self.group.named(peer)
        if peer.breaker.is_available:
            # It has recovered just now.
            return True
        with self._trial(peer, now) as search:
            await self._attempt(search, self._open_and_close)
            return True
        return False

    def _make_trials_in_background(self, group: PeerGroup) -> None:
        tasks = TrialTasks(group, self.try_out)
        group.background = lambda group, news: tasks.schedule(news=news)

    async def _open_and_close(self, attempt: Attempt) -> None:
        connection = await (self.opens or self._open_one)(attempt)
        # aiomysql's close() says no goodbye.
        close = getattr(connection, "ensure_closed", None) or connection.close
        try:
            await _awaited(close())
        except Exception:
            await _abort(connection)
        except BaseException:
            await _abort(connection)
            raise


# Waiting


#: Whether tasks count the requests to cancel them: from Python 3.11 on.
_TASKS_COUNT = hasattr(asyncio.Task, "uncancel")


class _Limit:
    """Cancels the block after ``seconds``, and raises TimeoutError in its place.

    Where somebody else cancels the task as well, that is what counts.
    """

    __slots__ = ("_by_others", "_handle", "_is_over", "_outer", "_requests", "_seconds", "_task")

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._is_over = self._by_others = False

    def __enter__(self) -> None:
        task: Any = asyncio.current_task()
        self._task = task
        if _TASKS_COUNT:
            self._requests = task.cancelling()
        else:
            # Its own, or another limit's: a password may come over another balancer's connection.
            self._outer = task.cancel
            task.cancel = self._note
        self._handle = asyncio.get_running_loop().call_later(self._seconds, self._cancel)

    def _note(self, *args: Any, **kwargs: Any) -> Any:
        self._by_others = True
        return self._outer(*args, **kwargs)

    def _cancel(self) -> None:
        self._is_over = True
        type(self._task).cancel(self._task)

    def __exit__(self, cls: object, exc: BaseException | None, traceback: object) -> None:
        self._handle.cancel()
        if not _TASKS_COUNT:
            del self._task.cancel
            if getattr(self._outer, "__self__", None) is not self._task:
                self._task.cancel = self._outer
        elif self._is_over:
            self._by_others = self._task.uncancel() > self._requests
        if self._is_over and not self._by_others and isinstance(exc, asyncio.CancelledError):
            raise TimeoutError(f"timed out: no connection within {self._seconds:g} s") from exc


class _Bell:
    """Wakes a task as a lock wakes a thread that waits for a lease."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.rung = self._loop.create_future()

    def release(self) -> None:
        """Wake the task. A loop that is closed raises a RuntimeError, which is ignored."""
        self._loop.call_soon_threadsafe(self._ring)

    def _ring(self) -> None:
        if not self.rung.done():
            self.rung.set_result(None)


async def _first_to_end(leases: Sequence[Lease], seconds: float) -> None:
    """Wait until one of the trials has ended, at most ``seconds``."""
    bell = _Bell()
    try:
        for lease in leases:
            lease.bells.append(bell)
        # A trial that ended before its bell was hung up does not ring it, and one whose end is
        # interrupted may not either.
        while seconds > 0 and all(lease.is_pending for lease in leases):
            await asyncio.wait([bell.rung], timeout=min(seconds, LOOK_AGAIN))
            if bell.rung.done():
                return
            seconds -= LOOK_AGAIN
    finally:
        for lease in leases:
            with contextlib.suppress(ValueError):
                lease.bells.remove(bell)


async def _answer_of_others(ask: Ask) -> float:
    """Return what the other processes say of a trial. They are asked in a thread, which waits.

    It is none of the loop's executor: all of those may wait for this very connect().
    """
    bell = _Bell()
    answers: list[float] = []

    def asking() -> None:
        seconds = 0.0
        try:
            seconds = ask.peer.breaker.ask(ask.by_hand)
        finally:
            answers.append(seconds)
            with contextlib.suppress(RuntimeError):
                bell.release()

    try:
        _thread.start_new_thread(asking, ())
    except RuntimeError:
        # No thread can be started: as where no process answers.
        return 0.0
    # Where its ring is interrupted the bell does not wake us. No answer takes as long as this.
    for _ in range(3):
        if not answers:
            await asyncio.wait([bell.rung], timeout=LOOK_AGAIN)
    return answers[0] if answers else 0.0


async def _not_at_all(seconds: float) -> None:
    """Between two peers there is nothing to wait for."""


# Asking a driver's connection


async def _run(script: Generator[_Step, Any, Any], do: Callable[[_Step], Awaitable[Any]]) -> Any:
    """Do what a script yields, and send it what comes of that; see :func:`.ready.run`."""
    try:
        step = next(script)
        while True:
            try:
                answer = await do(step)
            except Exception as exc:
                step = script.throw(exc)
            else:
                step = script.send(answer)
    except StopIteration as end:
        return end.value


async def _answer(connection: Any, check: Check) -> Any:
    """Return what a check says, whether it is ours, a function or a coroutine function."""
    if isinstance(check, ServerCheck):
        begins_one = begins_transaction(connection)
        answer = await _run(check.script(connection), functools.partial(_rows, connection))
        if begins_one():
            await connection.rollback()
        return answer
    return await _awaited(check(connection))


async def _rows(connection: Any, statement: str) -> list[Any]:
    """Return what a statement returns on a driver's own connection."""
    fetch = getattr(connection, "fetch", None)
    if fetch is not None:
        # asyncpg
        return [tuple(row) for row in await fetch(statement)]
    cursor = await _awaited(connection.cursor())
    try:
        await _awaited(cursor.execute(statement))
        if cursor.description is None:
            return []
        return plain(await _awaited(cursor.fetchall()))
    finally:
        await _awaited(cursor.close())


async def _awaited(result: Any) -> Any:
    return await result if inspect.isawaitable(result) else result


async def _abort(connection: Any) -> None:
    """Close a connection that is not wanted, also while the task is being cancelled.

    asyncpg's close() waits for the server, its terminate() does not; others' close() does not.
    """
    close = getattr(connection, "terminate", None) or connection.close
    with contextlib.suppress(Exception):
        await _awaited(close())
