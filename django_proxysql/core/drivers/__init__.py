"""What each database driver's errors mean.

One file a driver, each a plain table. :func:`judge` finds the right one by
the exception's own module, so that no driver needs to be installed to be
known, and none is imported here.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import socket
import types
from collections.abc import Iterator, Mapping
from typing import Any

from ..exceptions import NoPeerAvailable, NotReady, PoolBusy
from ..faults import Fault, Judgement
from .base import Driver, generic, is_a, is_marked, mark
from .mysql import mysql
from .mysql_connector import mysql_connector
from .oracle import oracle
from .postgresql import postgresql
from .sqlite import sqlite

__all__ = ["Driver", "generic", "is_marked", "mark", "mysql", "mysql_connector", "postgresql"]


_BY_MODULE: dict[str, Driver] = {
    module: driver
    for driver in (mysql, mysql_connector, postgresql, sqlite, oracle)
    for module in driver.MODULES
}

#: Exceptions of frameworks that say: the settings or the caller are wrong.
_LOCAL_CLASSES = ("ImproperlyConfigured", "ConfigError")
_LOCAL_ERRNOS = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS})
#: What drivers, and Django's engines, raise about a setting that they cannot take.
_OF_SETTINGS = (TypeError, ValueError, AttributeError, LookupError, OSError)


def _layers(thing: object) -> Iterator[object]:
    """Yield ``thing``, and what it wraps: of partials, decorated functions and tracing proxies.

    The last is the driver's own. ``__wrapped__`` is the name that ``functools.wraps``
    and wrapt give it; OpenTelemetry, Datadog, Elastic and New Relic build on wrapt.
    """
    # A proxy that answers every attribute has no last one.
    for _ in range(20):
        yield thing
        inner = thing.func if isinstance(thing, functools.partial) else _wrapped(thing)
        if inner is None or inner is thing:
            return
        thing = inner


def _wrapped(thing: object) -> object:
    try:
        return getattr(thing, "__wrapped__", None)
    except Exception:
        # A lazy object that cannot be made now.
        return None


def unwrapped(thing: object) -> object:
    """Return what is behind every proxy that ``thing`` may be wrapped in."""
    *_, last = _layers(thing)
    return last


def driver_of(thing: object) -> Driver:
    """Return the driver that ``thing`` comes from.

    :param thing: a module or its name, a class, a function or a connection; also behind
        proxies and decorators.
    """
    found = (_named(name) for layer in _layers(thing) for name in _origins(layer))
    return next((driver for driver in found if driver is not None), generic)


def _named(module: str) -> Driver | None:
    """Return the driver whose package a module is in."""
    top, _, rest = module.partition(".")
    return _BY_MODULE.get(top) or _BY_MODULE.get(f"{top}.{rest.partition('.')[0]}")


def _origins(thing: object) -> Iterator[str]:
    """Yield the names of the modules that ``thing`` may come from."""
    if isinstance(thing, str):
        yield thing
        return
    if isinstance(thing, types.ModuleType):
        yield thing.__name__
        # A module of the application's that hands a driver's names on.
        thing = getattr(thing, "OperationalError", None)
    owner = getattr(thing, "__self__", None)
    # A connection may be of a subclass, a bound method of one, too.
    for cls in (thing, type(thing), owner, type(owner)):
        for base in cls.__mro__ if isinstance(cls, type) else (cls,):
            name = getattr(base, "__module__", None)
            if isinstance(name, str):
                yield name


def driver_of_engine(wrapper: object) -> Driver:
    """Return the driver that a Django backend's DatabaseWrapper connects with."""
    return driver_of(getattr(wrapper, "Database", None))


def root_error(exc: BaseException) -> BaseException:
    """Return the driver's error inside Django's or SQLAlchemy's, or ``exc`` itself."""
    module = type(exc).__module__
    if module == "django.db.utils" and exc.__cause__ is not None:
        return exc.__cause__
    if module.startswith("sqlalchemy"):
        original: BaseException | None = getattr(exc, "orig", None)
        return exc if original is None else original
    return exc


def describe(exc: BaseException) -> str:
    """Return what ``exc`` says, on one line. Drivers put no password into it."""
    exc = root_error(exc)
    judgement = getattr(exc, "_django_proxysql_judgement", None)
    if judgement:
        return str(judgement.text)
    try:
        text = " ".join(str(exc).split())
    except Exception:
        # A listener is to get the error, not its __str__'s mistake.
        text = ""
    return (text[:300] + "…" if len(text) > 300 else text) or type(exc).__name__


def password_from(source: Any) -> Any:
    """Return what a callable password gives for this attempt, or ``source`` itself.

    What the callable raises is marked as ours: a token service that cannot be
    reached says nothing about the peer, whatever its exception looks like.
    """
    if not callable(source):
        return source
    try:
        return source()
    except Exception as exc:
        mark(exc, "is_ours")
        raise


def with_password(params: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of settings, or of connect()'s arguments, with a callable password called."""
    return {
        key: password_from(value) if key in ("password", "passwd", "PASSWORD") else value
        for key, value in params.items()
    }


def _is_of_settings(exc: BaseException) -> bool:
    """Return whether ``exc`` says that a peer's settings are such as the driver cannot take."""
    by_settings = is_marked(exc, "of_settings")
    table = _table_of(exc)
    if table is not None:
        # mysqlclient's of an ssl_mode that it does not know: it asked no server.
        is_drivers_own = by_settings and table.code_of(exc) is None
        return table.is_option_error(exc) or (
            is_drivers_own and is_a(exc, "NotSupportedError", "ProgrammingError")
        )
    # Ours: a token service that cannot be reached.
    if is_marked(exc, "is_ours") or not by_settings:
        return False
    # A bare TimeoutError may be an alarm of the application's own.
    return is_a(exc, *_LOCAL_CLASSES) or (
        isinstance(exc, _OF_SETTINGS)
        and not isinstance(exc, (TimeoutError, socket.timeout))
        and getattr(exc, "errno", None) not in _LOCAL_ERRNOS
    )


def _is_by_server(exc: BaseException) -> bool:
    """Return whether ``exc``, raised while connecting, is what a driver reports of its server.

    A broken constraint is not: an application's own statement broke it.
    """
    if is_a(exc, "IntegrityError") or isinstance(exc, NoPeerAvailable):
        return False
    if is_a(exc, "OperationalError", "InternalError", "InterfaceError"):
        return True
    if not is_a(exc, "DatabaseError", "ProgrammingError", "NotSupportedError", "DataError"):
        return False
    if type(exc).__module__ == "django.db.utils":
        # Django's own: the server's version is too old.
        return True
    table = _table_of(exc)
    return table is not None and table.code_of(exc) is not None


def name_peer(exc: BaseException, where: str) -> None:
    """Name the peer, as ``where`` says, in an error that names none; keep its class and code.

    An application's own exception gets a note, where Python has notes (3.11).
    """
    if not isinstance(exc, Exception) or is_marked(exc, "is_named"):
        return
    said = f" [while connecting {where}]"
    root = root_error(exc)
    for error in (exc,) if root is exc else (exc, root):
        with contextlib.suppress(Exception):
            mark(error, "is_named")
            error._django_proxysql_judgement = None  # type: ignore[attr-defined]
            if not (
                is_driver_error(error) or _is_by_server(error) or is_marked(root, "of_settings")
            ):
                error.add_note(said.strip())  # type: ignore[attr-defined]
            elif isinstance(error, OSError) and isinstance(error.strerror, str):
                error.strerror += said
            elif error.args and isinstance(error.args[-1], str):
                error.args = (*error.args[:-1], error.args[-1].rstrip() + said)


def is_driver_error(exc: BaseException) -> bool:
    """Return whether ``exc`` is an error of a driver that has a table here."""
    return _table_of(root_error(exc)) is not None


def judge(exc: BaseException, connecting: bool, driver: Driver = generic) -> Judgement:
    """Judge ``exc``, once: what it says of its peer, its connection and its statement.

    The judgement stays with the error, for :func:`judgement_of`.

    :param connecting: whether it was raised before the connection was handed out.
    :param driver: the connection's, for an error of no driver's.
    """
    exc = root_error(exc)
    table = _table_of(exc) or driver
    fault = _fault_of(exc, connecting)
    found = Judgement(
        fault,
        describe(exc),
        table.proof(exc, fault),
        table.question_of(exc),
        table.is_answer(exc),
        fault is Fault.KILLED and table.code_of(exc) in table.ENDS_CONNECTION,
        table.may_be_busy(exc),
        connecting,
        connecting and _is_by_server(exc),
        connecting and _is_of_settings(exc),
    )
    with contextlib.suppress(AttributeError, TypeError):
        exc._django_proxysql_judgement = found  # type: ignore[attr-defined]
    return found


def judgement_of(exc: BaseException, driver: Driver = generic) -> Judgement:
    """Return what an error of an established connection was judged to be."""
    found: Judgement | None = getattr(root_error(exc), "_django_proxysql_judgement", None)
    if not found or found.connecting:
        return judge(exc, connecting=False, driver=driver)
    return found


def _fault_of(exc: BaseException, connecting: bool) -> Fault:
    if not isinstance(exc, Exception):
        # KeyboardInterrupt, SystemExit, gevent's Timeout: no peer's fault.
        return Fault.OTHER
    if isinstance(exc, NotReady):
        return Fault.NOT_READY
    if isinstance(exc, PoolBusy):
        return Fault.OVERLOADED
    if isinstance(exc, NoPeerAvailable):
        # Another balancer's, that a receiver of ours has asked.
        return Fault.OTHER
    if is_marked(exc, "is_ours") or is_a(exc, *_LOCAL_CLASSES):
        return Fault.LOCAL
    table = _table_of(exc)
    if table is not None:
        return table.fault(exc, connecting)
    if isinstance(exc, OSError):
        return _fault_of_oserror(exc, connecting)
    return generic.fault(exc, connecting)


def _table_of(exc: BaseException) -> Driver | None:
    # A driver's error may be subclassed by an application: look at the bases.
    found = (_named(cls.__module__) for cls in type(exc).__mro__)
    return next((driver for driver in found if driver is not None), None)


def _fault_of_oserror(exc: OSError, connecting: bool) -> Fault:
    if exc.errno in _LOCAL_ERRNOS:
        return Fault.LOCAL
    if not connecting:
        return Fault.LOST if isinstance(exc, ConnectionError) else Fault.OTHER
    is_unreachable = (
        isinstance(exc, (ConnectionError, socket.gaierror))
        # A bare TimeoutError() may be an alarm of the application's own; the
        # socket module's says "timed out" or carries its errno.
        or (isinstance(exc, (TimeoutError, socket.timeout)) and exc.args)
        # asyncio's, of a name with several addresses.
        or (exc.errno is None and str(exc).startswith("Multiple exceptions: "))
        or exc.errno in (errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EHOSTDOWN)
    )
    return Fault.UNREACHABLE if is_unreachable else Fault.OTHER
