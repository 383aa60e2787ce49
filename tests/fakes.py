"""What the tests of the core pass in: a clock that stands still, and a driver without servers."""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable

import pybreaker
import tenacity

from django_proxysql.core import events


class Clock:
    """A monotonic clock that moves when a test moves it."""

    def __init__(self, now: float = 0.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


class RunningClock(Clock):
    """A clock that runs, and jumps ahead when a test says so.

    For threads that wait for one another's trials: on a clock that stands still
    no deadline comes.
    """

    def __call__(self) -> float:
        return self.now + time.monotonic()


def even() -> float:
    """A jitter that leaves every interval as long as it is set."""
    return 0.5


class OperationalError(Exception):
    """As mysqlclient's: judged by its code."""


class InterfaceError(Exception):
    """As mysqlclient's."""


class ProgrammingError(Exception):
    """As mysqlclient's: an error in the application's SQL."""


# An error's driver is known by its class's module, so these are the driver's own to the core.
for _error in (OperationalError, InterfaceError, ProgrammingError):
    _error.__module__ = "MySQLdb"


def refused_by_host() -> OperationalError:
    return OperationalError(2002, "Can't connect to server on '10.0.0.1' (115)")


def bad_password() -> OperationalError:
    return OperationalError(1045, "Access denied for user 'app'@'10.0.0.9' (using password: YES)")


def too_many() -> OperationalError:
    return OperationalError(1040, "Too many connections")


class Connection:
    """What the fake driver's connect() returns."""

    def __init__(self, host: str) -> None:
        self.host = host
        self.closed = False

    def close(self) -> None:
        self.closed = True


class Driver:
    """A driver whose servers fail as told: ``driver.down["db1"] = exception or its maker``.

    What stands in ``down`` may also be a function that is called in the middle of connect() and
    returns None: the connection is then made.
    """

    def __init__(self) -> None:
        self.down: dict[str, Any] = {}
        #: The arguments of each connect().
        self.calls: list[dict[str, Any]] = []
        self.made: list[Connection] = []

    @property
    def hosts(self) -> list[str]:
        """The hosts that were connected to, in turn."""
        return [call["host"] for call in self.calls]

    def connect(self, **params: Any) -> Connection:
        self.calls.append(params)
        error = self.down.get(params["host"])
        if callable(error) or (isinstance(error, type) and issubclass(error, BaseException)):
            error = error()
        if error is not None:
            raise error
        connection = Connection(params["host"])
        self.made.append(connection)
        return connection


def carried_on_by_tenacity(world: Any) -> list[bool]:
    """Connect where db1 and db2 are down; return whether tenacity made each attempt."""
    folder, made = str(Path(tenacity.__file__).parent), []

    def attempt(error: Any) -> Any:
        made.append(any(frame.filename.startswith(folder) for frame in inspect.stack(0)))
        return error() if error else None

    for host, error in (("db1", refused_by_host), ("db2", refused_by_host), ("db3", None)):
        world.driver.down[host] = functools.partial(attempt, error)
    world.connect()
    return made


def peers(*names: str, **common: Any) -> dict[str, dict[str, Any]]:
    """connect() arguments of peers whose hosts are called as they are."""
    return {name: {"host": name, "port": 3306, **common} for name in names}


class Recorder(pybreaker.CircuitBreakerListener):
    """Notes what a breaker tells its listeners."""

    def __init__(self) -> None:
        self.told: list[Any] = []

    def before_call(self, cb: Any, func: Any, *args: Any, **kwargs: Any) -> None:
        self.told.append("before_call")

    def success(self, cb: Any) -> None:
        self.told.append("success")

    def failure(self, cb: Any, exc: BaseException) -> None:
        self.told.append(("failure", type(exc).__name__))

    def state_change(self, cb: Any, old_state: Any, new_state: Any) -> None:
        self.told.append((old_state.name if old_state else None, new_state.name))


@contextlib.contextmanager
def running(
    *targets: Callable[[], object], seconds: float = 120
) -> Iterator[list[threading.Thread]]:
    """Run ``targets`` in threads; at the end of the block all have to end in time."""
    errors: list[BaseException] = []

    def guarded(target: Callable[[], object]) -> None:
        try:
            target()
        except BaseException as exc:
            errors.append(exc)

    threads = [threading.Thread(target=guarded, args=(target,), daemon=True) for target in targets]
    for thread in threads:
        thread.start()
    yield threads
    for thread in threads:
        thread.join(seconds)
        assert not thread.is_alive(), "a thread is stuck"
    if errors:
        raise errors[0]


def until(condition: Callable[[], object], seconds: float = 60, pause: float = 0.001) -> None:
    """Wait for another thread to have done something.

    It looks again and again: what it waits for has no event, and only bounds how long it looks.
    """
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it has not happened"
        time.sleep(pause)


def in_thread(target: Callable[[], Any], seconds: float = 120) -> Any:
    """Return what ``target`` returns in a thread of its own; fail if it does not end in time."""
    result: list[Any] = []
    with running(lambda: result.append(target()), seconds=seconds):
        pass
    return result[0]


@contextlib.contextmanager
def holding(lock: Any) -> Iterator[None]:
    """Have another thread hold a lock for the block."""
    held, over = threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            held.set()
            over.wait(60)

    with running(hold):
        assert held.wait(60)
        yield
        over.set()


def lock_is_free(breaker: Any) -> bool:
    """Whether another thread gets the breaker's lock."""

    def take() -> bool:
        taken = breaker._lock.acquire(timeout=1)
        if taken:
            breaker._lock.release()
        return bool(taken)

    return bool(in_thread(take))


def raised_by(function: Callable[[], object]) -> BaseException | None:
    """Return what ``function`` raises, or None."""
    try:
        function()
    except BaseException as exc:
        return exc
    return None


def event_kinds() -> list[type]:
    """Every class of event that there is."""
    classes = [kind for kind in vars(events).values() if isinstance(kind, type)]
    return [
        kind for kind in classes if issubclass(kind, events.Event) and not kind.__subclasses__()
    ]
