"""Transactions that are run again when the database gave them up.

A deadlock, a certification conflict of Galera's, a serialization failure and a
connection lost before COMMIT have one thing in common: nothing of the
transaction stands, and the same function would do the same again, this time
perhaps to the end. A COMMIT whose answer was lost is another matter, and never
repeated.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any, Callable, TypeVar, overload

import tenacity
from django.db import DEFAULT_DB_ALIAS, Error, connections, transaction
from django.db.transaction import TransactionManagementError

from .backends.state import NO_TRANSACTION
from .backends.wrapper import SafePointsMixin
from .conf import is_testing

__all__ = ["retrying_atomic"]

_F = TypeVar("_F", bound=Callable[..., Any])

#: Seconds: the first wait is drawn from up to the first, no wait is longer than
#: the second. Two transactions that met must not meet again in step.
_FIRST_WAIT = 0.05
_LONGEST_WAIT = 2.0


@overload
def retrying_atomic(using: _F) -> _F: ...


@overload
def retrying_atomic(using: str | None = None, attempts: int = 3) -> Callable[[_F], _F]: ...


def retrying_atomic(using: Any = None, attempts: int = 3) -> Any:
    """Run a function in an atomic block, and again if the database gave the block up.

    ::

        @retrying_atomic
        def transfer(source, target, amount): ...

        @retrying_atomic(using="orders", attempts=5)
        def place(order): ...

        retrying_atomic(transfer)(source, target, amount)

    It is not run again without what the session held when it was first run: a lock, a
    ``SET``, a temporary table. Then the loss is raised.

    It is run again after a CONFLICT (deadlock, lock wait timeout, Galera
    certification, serialization failure) and after a connection lost before
    COMMIT was sent; never after a COMMIT whose outcome is unknown, nor because
    an ``on_commit`` hook raised. Between attempts it waits a random time, up
    to 0.05 s at first, doubled each time, at most 2 s.

    The function must not do what a rollback does not undo (send mail, change
    objects that outlive it, write to another database): put that into
    ``transaction.on_commit``, or after the call. It must let the database's
    errors out.

    On an alias of another engine nobody can tell whether COMMIT was sent: there
    this is ``transaction.atomic``.

    :param using: the alias; the default one if None.
    :param attempts: how many times the function is run at most.
    :raises TransactionManagementError: called inside another atomic block, or
        while autocommit is off: only a part of the transaction would be run
        again. (Inside the blocks of Django's TestCase it runs once, in a
        savepoint.)
    :raises ValueError: ``attempts`` is no int of at least 1.
    :raises TypeError: ``using`` is no alias; or the function is none, or is a
        coroutine function or a generator function, which would run after its
        block has ended.
    :raises Exception: what the function or the last attempt's COMMIT raised:
        the database's own errors, and :class:`CommitOutcomeUnknown`.
    """
    if not (using is None or isinstance(using, str) or callable(using)):
        raise TypeError(
            f"retrying_atomic: using must be an alias of DATABASES, or the function, not {using!r}"
        )
    if isinstance(attempts, bool) or not isinstance(attempts, int) or attempts < 1:
        raise ValueError(
            f"retrying_atomic: attempts must be an int of at least 1, not {attempts!r}"
        )
    if callable(using):
        return _retrying(using, None, attempts)
    return functools.partial(_retrying, using=using, attempts=attempts)


def _retrying(function: _F, using: str | None, attempts: int) -> _F:
    if not callable(function):
        raise TypeError(f"retrying_atomic: {function!r} is no function. Give it the one to run.")
    if (
        inspect.iscoroutinefunction(function)
        or inspect.isgeneratorfunction(function)
        or inspect.isasyncgenfunction(function)
    ):
        raise TypeError(
            f"retrying_atomic: {function!r} would run after the block has ended. "
            "Give it a function that does its work before it returns; "
            "from async code, call that by sync_to_async."
        )
    alias = using or DEFAULT_DB_ALIAS

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        connection: Any = connections[alias]
        if connection.in_atomic_block:
            _refuse_unless_in_tests(connection)
            with transaction.atomic(using=alias):
                return function(*args, **kwargs)
        if not isinstance(connection, SafePointsMixin):
            with transaction.atomic(using=alias):
                return function(*args, **kwargs)
        if not connection.get_autocommit():
            raise TransactionManagementError(
                f"retrying_atomic was called on {alias!r} while autocommit is off: a transaction "
                "that was begun by hand would be given up with the block, and only the block be "
                "run again. Switch autocommit on, or use transaction.atomic here."
            )
        begun = NO_TRANSACTION
        held = connection.now_holding()

        def once() -> Any:
            nonlocal begun
            begun = NO_TRANSACTION
            with transaction.atomic(using=alias):
                begun = connection._transaction
                return function(*args, **kwargs)

        return tenacity.Retrying(
            stop=tenacity.stop_after_attempt(attempts),
            wait=tenacity.wait_random_exponential(multiplier=_FIRST_WAIT, max=_LONGEST_WAIT),
            retry=tenacity.retry_if_exception(
                lambda exc: (
                    isinstance(exc, Error)
                    and connection.begins_again(exc, begun)
                    and connection.still_holds(held)
                )
            ),
            reraise=True,
        )(once)

    return run  # type: ignore[return-value]


def _refuse_unless_in_tests(connection: Any) -> None:
    blocks = getattr(connection, "atomic_blocks", None)
    if blocks is None:
        # Django before 4.1 does not say whose a block is. TestCase has two around each test:
        # where tests are run, these are taken for its own.
        if is_testing() and len(connection.savepoint_ids) == 1:
            return
    elif blocks and all(getattr(block, "_from_testcase", False) for block in blocks):
        return
    raise TransactionManagementError(
        f"retrying_atomic was called inside an atomic block on {connection.alias!r}: only the "
        "outermost block can be run again. Call it outside (with ATOMIC_REQUESTS, mark the view "
        "with transaction.non_atomic_requests), or use transaction.atomic here."
    )
