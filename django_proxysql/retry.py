"""Blocks that are run again when the database gave them up: :func:`retrying_atomic`.

:class:`Call` decides. What runs the function asks it after each error: this, and :mod:`.request`
for views.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Callable, TypeVar, overload

import tenacity
from django.db import DEFAULT_DB_ALIAS, Error, connections, transaction
from django.db.transaction import TransactionManagementError

from .backends.losses import settle_doubt
from .backends.sessions import now_holding, still_holds
from .backends.state import NO_TRANSACTION, NOT_DONE, Transaction
from .backends.wrapper import SafePointsMixin
from .conf.aliases import is_testing
from .core import drivers
from .core.events import BlockRetried
from .core.faults import Proof
from .errors import NoPeerAvailable
from .registry import balancers

_F = TypeVar("_F", bound=Callable[..., Any])
_T = TypeVar("_T")
#: A wait strategy of tenacity's, or a function like one. It returns seconds.
Wait = Callable[[tenacity.RetryCallState], float]

#: Two transactions that met must not meet again in step.
_WAIT = tenacity.wait_random_exponential(multiplier=0.05, max=2)
#: While no peer can be reached. The balancer makes at most one trial a peer in
#: ``LAST_RESORT_INTERVAL``, however many threads ask.
_WAIT_FOR_PEER = tenacity.wait_random_exponential(multiplier=0.1, max=1)


@dataclass(frozen=True)
class Rules:
    """How often a function is run, and what is waited for in between.

    :param caller: the decorator, for messages.
    :param wait: the wait strategy; None: exponential, with jitter.
    :param wait_for_peer: seconds.
    :raises ValueError: ``attempts`` is no int of at least 1, or ``wait_for_peer`` is negative.
    :raises TypeError: ``wait`` cannot be called, or ``wait_for_peer`` is no number.
    """

    caller: str
    attempts: int = 3
    wait: Wait | None = None
    wait_for_peer: float = 10.0

    def __post_init__(self) -> None:
        attempts, seconds = self.attempts, self.wait_for_peer
        if isinstance(attempts, bool) or not isinstance(attempts, int) or attempts < 1:
            raise ValueError(
                f"{self.caller}: attempts must be an int of at least 1, not {attempts!r}"
            )
        if self.wait is not None and not callable(self.wait):
            raise TypeError(
                f"{self.caller}: wait must be a wait strategy of tenacity's, like "
                f"tenacity.wait_fixed(1), not {self.wait!r}"
            )
        if isinstance(seconds, bool) or not isinstance(seconds, (int, float)):
            raise TypeError(f"{self.caller}: wait_for_peer must be seconds, not {seconds!r}")
        if not seconds >= 0:
            raise ValueError(f"{self.caller}: wait_for_peer must not be negative: {seconds!r}")


class Call:
    """One call of a function, which may be run several times in atomic blocks.

    As a context manager it is one run: the blocks on all aliases. It belongs to one
    thread; where it is used, so are the connections.

    :param aliases: where the blocks are.
    :raises TransactionManagementError: an alias is in an atomic block, or its autocommit is off.
    """

    def __init__(self, rules: Rules, function: Callable[..., Any], aliases: Iterable[str]) -> None:
        wrappers = [connections[alias] for alias in aliases]
        self._rules = rules
        self._function = function
        #: Another engine's block commits last: it is unknown whether its COMMIT was sent.
        self._wrappers = sorted(wrappers, key=lambda one: isinstance(one, SafePointsMixin))
        #: The blocks that may be run again.
        self.ours: list[Any] = [one for one in wrappers if isinstance(one, SafePointsMixin)]
        #: Django's own blocks commit in the order of the aliases: those of another engine last.
        self.fits_django = wrappers[: len(self.ours)] == self.ours
        #: It runs once, in savepoints: all around it are TestCase's blocks.
        self.is_in_test = False
        for wrapper in wrappers:
            if wrapper.in_atomic_block:
                _refuse_unless_in_tests(rules.caller, wrapper)
                self.is_in_test = True
        for wrapper in self.ours:
            is_on = wrapper.settings_dict["AUTOCOMMIT"]
            if wrapper.connection is not None:
                is_on = wrapper.autocommit
            if not is_on and not wrapper.in_atomic_block:
                raise TransactionManagementError(
                    f"{rules.caller} was called on {wrapper.alias!r} while autocommit is off: a "
                    "transaction that was begun by hand would be given up with the block, and only "
                    "the block be run again. Switch autocommit on, or use transaction.atomic here."
                )
        self._held = [(wrapper, now_holding(wrapper)) for wrapper in self.ours]
        #: The records of the last run's blocks; NO_TRANSACTION where none began.
        self._begun = [NO_TRANSACTION] * len(self.ours)
        #: How often the function was run.
        self.runs = 0
        #: What a wait strategy is asked with.
        self._state = tenacity.RetryCallState(None, function, (), {})  # type: ignore[arg-type]
        self._no_peer_since: float | None = None
        self._no_peer = 0
        #: Runs that use up no attempt, and since when there are such.
        self._uncounted = 0
        self._lost_since: float | None = None
        #: Which alias's error ended the last run, and what it said.
        self._error: tuple[str, str] | None = None

    # One run

    def __enter__(self) -> None:
        self._begun = [NO_TRANSACTION] * len(self.ours)
        if self._error is not None and self.runs:
            alias, error = self._error
            # Before the blocks begin: a receiver of the signal may use the database.
            name = _name_of(self._function)
            balancers[alias].group.emit(BlockRetried(alias, name, self.runs + 1, error))
        self._stack = contextlib.ExitStack()
        try:
            for wrapper in self._wrappers:
                self._stack.enter_context(transaction.atomic(using=wrapper.alias))
            self._begun = [wrapper._transaction for wrapper in self.ours]
            self.runs += 1
            self._no_peer_since, self._no_peer = None, 0
        except BaseException:
            self._stack.__exit__(*sys.exc_info())
            raise

    def __exit__(self, *exc_info: Any) -> Any:
        return self._stack.__exit__(*exc_info)

    def adopt(self, begun: list[Transaction]) -> None:
        """Count a run that the caller has made as the first.

        :param begun: the records of its blocks; NO_TRANSACTION where none began.
        """
        self._begun = begun
        self.runs += self._has_begun()

    def repeat(self, run: Callable[[], _T], again: Callable[[], object] = lambda: None) -> _T:
        """Run ``run`` in the blocks until it ends well, or its error is to be raised.

        :param again: called before each run but the first.
        """
        while True:
            try:
                if self.runs:
                    again()
                with self:
                    return self._done(run())
            except Error as exc:
                seconds = self.seconds_to_wait(exc)
                if seconds is None:
                    raise
            # Outside of the except block: the error keeps the frames of what it ended.
            time.sleep(seconds)

    def _done(self, result: _T) -> _T:
        """Return a run's result.

        :raises TypeError: it is a coroutine, which would run after the block has ended.
        """
        if inspect.iscoroutine(result):
            result.close()
            raise TypeError(
                f"{self._rules.caller}: {self._function!r} returns a coroutine, which would run "
                "after the block has ended. Give it a function that does its work before it "
                "returns. Decorate an async view itself by retrying_request, or what as_view() "
                "returns; from other async code, call a function that is not async by "
                "sync_to_async."
            )
        return result

    # After an error

    def seconds_to_wait(self, exc: BaseException) -> float | None:
        """Return the seconds to wait before the next run; None if the error is to be raised."""
        now = time.monotonic()
        if any(one.stage is NOT_DONE for one in self._begun) and (
            drivers.judgement_of(exc).proof is not Proof.ROLLED_BACK
        ):
            # Its COMMIT was lost, and does not stand. That says nothing against the run. A
            # conflict does: another one may meet it again.
            self._lost_since = self._lost_since or now
            self._uncounted += now < self._lost_since + self._rules.wait_for_peer
        is_last = self.runs - self._uncounted >= self._rules.attempts
        if self.is_in_test or is_last or not self._begins_again(exc):
            return None
        if isinstance(exc, NoPeerAvailable) or not self._has_begun():
            # No attempt is used up by what the function has not seen.
            self._no_peer_since = self._no_peer_since or now
            self._no_peer += 1
            left = self._no_peer_since + self._rules.wait_for_peer - now
            return min(left, self._wait(_WAIT_FOR_PEER, self._no_peer, exc)) if left > 0 else None
        seconds = self._wait(self._rules.wait or _WAIT, self.runs, exc)
        self._state.idle_for += seconds
        return seconds

    def _has_begun(self) -> bool:
        """Return whether the last run's blocks had begun."""
        return any(one is not NO_TRANSACTION for one in self._begun)

    def _begins_again(self, exc: BaseException) -> bool:
        """Return whether nothing stands of the last run, and another may come to its end."""
        if any(begun.may_stand for begun in self._begun):
            return False
        if not all(still_holds(wrapper, held) for wrapper, held in self._held):
            return False
        for wrapper, begun in zip(self.ours, self._begun):
            if isinstance(exc, NoPeerAvailable):
                may_begin = exc.balancer == wrapper.alias
            else:
                may_begin = isinstance(exc, Error) and begins_again(wrapper, exc, begun)
            if may_begin:
                self._error = wrapper.alias, drivers.describe(exc.__cause__ or exc)
                return True
        return False

    def _wait(self, strategy: Wait, number: int, exc: BaseException) -> float:
        state = self._state
        state.attempt_number = number
        state.set_exception((type(exc), exc, exc.__traceback__))
        try:
            return float(strategy(state))
        finally:
            # A strategy may keep the state. It is not to keep the error's frames.
            state.outcome = None


@overload
def retrying_atomic(using: _F) -> _F: ...


@overload
def retrying_atomic(
    using: str | None = None,
    attempts: int = 3,
    wait: Wait | None = None,
    wait_for_peer: float = 10.0,
) -> Callable[[_F], _F]: ...


def retrying_atomic(
    using: Any = None,
    attempts: int = 3,
    wait: Wait | None = None,
    wait_for_peer: float = 10.0,
) -> Any:
    """Run a function in an atomic block, and again if the database gave the block up.

    ::

        @retrying_atomic
        def transfer(source, target, amount): ...

        @retrying_atomic(using="orders", attempts=5)
        def place(order): ...

        retrying_atomic(transfer)(source, target, amount)

    It is run again after a CONFLICT (deadlock, lock wait timeout, Galera
    certification, serialization failure), after a connection lost before
    COMMIT was sent, and after a COMMIT whose answer was lost if the transaction
    is known not to stand (``COMMIT_OUTCOME``). It is never run again after a
    COMMIT whose outcome is unknown, nor because an ``on_commit`` hook raised, nor after an
    error of another alias, nor after a statement that may have ended the transaction, like
    MySQL's DDL.

    It is not run again without what the session held when it was first run: a lock, a
    ``SET``, a temporary table. Then the loss is raised.

    The function must not do what a rollback does not undo (send mail, change
    objects that outlive it, write to another database): put that into
    ``transaction.on_commit``, or after the call. It must let the database's
    errors out.

    On an alias of another engine it is unknown whether COMMIT was sent: there this is
    ``transaction.atomic``.

    :param using: the alias; the default one if None.
    :param attempts: how many times the function is run at most. A run whose COMMIT was lost and
        is known not to stand uses up no attempt, until ``wait_for_peer`` seconds after the first
        such run.
    :param wait: how long it waits between two runs: a wait strategy of tenacity's. By
        default a random time of up to 0.05 s, doubled each time, at most 2 s.
    :param wait_for_peer: for how many seconds it waits for a peer when none can be
        reached, or each is lost as the block begins. That uses up no attempt. A connect
        under way is not cut short.
    :raises TransactionManagementError: called inside another atomic block, or
        while autocommit is off: only a part of the transaction would be run
        again. (Inside the blocks of Django's TestCase it runs once, in a
        savepoint.)
    :raises ValueError: ``attempts`` is no int of at least 1; ``wait_for_peer`` is negative.
    :raises TypeError: ``using`` is no alias; or the function is none, or is a
        coroutine function or a generator function, which would run after its
        block has ended; or ``wait`` is no wait strategy. At a call: it returns a coroutine.
    :raises Exception: what the function or the last attempt's COMMIT raised:
        the database's own errors, and :class:`CommitOutcomeUnknown`.
    """
    if not (using is None or isinstance(using, str) or callable(using)):
        raise TypeError(
            f"retrying_atomic: using must be an alias of DATABASES, or the function, not {using!r}"
        )
    rules = Rules("retrying_atomic", attempts, wait, wait_for_peer)
    if callable(using):
        return _retrying(using, None, rules)
    return functools.partial(_retrying, using=using, rules=rules)


def _retrying(function: _F, using: str | None, rules: Rules) -> _F:
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
    aliases = (using or DEFAULT_DB_ALIAS,)

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        return Call(rules, function, aliases).repeat(lambda: function(*args, **kwargs))

    return run  # type: ignore[return-value]


def begins_again(db: Any, exc: BaseException, transaction: Transaction) -> bool:
    """Return whether a transaction that ended by ``exc`` stands for certain not, and may
    come to its end if it is begun once more.

    Another alias's error says nothing of that, and what was sent there may stand.
    """
    if transaction.stage is NOT_DONE:
        return True
    if transaction.may_stand:
        return False
    if exc.__cause__ is None:
        return False
    cause = drivers.root_error(exc.__cause__)
    if not drivers.is_marked(cause, "caller", db._caller):
        return False
    if drivers.judgement_of(cause, db._driver).proof is Proof.ROLLED_BACK:
        return True
    session = db._session
    if session is not None and session.doubted:
        # The transaction in which it could not be asked has ended.
        settle_doubt(db, session)
        if session.is_leaving:
            return True
    # After a time-out the server may be at it still, and in the way.
    return session is not None and drivers.is_marked(cause, "end") and not session.timed_out


def _refuse_unless_in_tests(caller: str, connection: Any) -> None:
    blocks = getattr(connection, "atomic_blocks", None)
    if blocks is None:
        # Django before 4.1 does not say whose a block is. TestCase has two around each test:
        # where tests are run, these are taken for its own.
        if is_testing() and len(connection.savepoint_ids) == 1:
            return
    elif blocks and all(getattr(block, "_from_testcase", False) for block in blocks):
        return
    raise TransactionManagementError(
        f"{caller} was called inside an atomic block on {connection.alias!r}: only the "
        "outermost block can be run again. Call it outside, or use transaction.atomic here. "
        "With ATOMIC_REQUESTS, mark the view with retrying_request."
    )


def _name_of(function: Callable[..., Any]) -> str:
    # A view made of a class: its own name is that of a function in Django's as_view().
    function = getattr(function, "view_class", None) or inspect.unwrap(function)
    name = getattr(function, "__qualname__", None) or type(function).__qualname__
    return f"{getattr(function, '__module__', None) or ''}.{name}"
