"""A SQLAlchemy engine over a load balancer: pool and dialect are SQLAlchemy's, the peer is ours.

``creator=`` hides from the driver what SQLAlchemy's dialect passes to it (MySQL's
``client_flag``, without which its ORM takes an UPDATE that changes nothing for one that
found no row), and what a creator raises is an error of no driver's to it. A listener to
``do_connect`` would keep the application's own, which comes after it, from being called. What
stands in the place of the dialect's ``connect()`` has none of these faults.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from .exceptions import ConfigError, NoPeerAvailable
from .search import Attempt

if TYPE_CHECKING:
    import sqlalchemy.engine
    import sqlalchemy.ext.asyncio

#: Names that drivers take for the same argument.
_SAME = (
    frozenset({"passwd", "password"}),
    frozenset({"database", "db", "dbname"}),
    frozenset({"user", "username"}),
)


def sqlalchemy_engine(
    db: Any, driver: Callable[..., Any] | None, url: Any, **options: Any
) -> sqlalchemy.engine.Engine:
    """Return an engine for ``db``; see :meth:`LoadBalancer.sqlalchemy_engine`.

    :param driver: the driver's ``connect``, which may hold more arguments; None: the dialect's.
    """
    from sqlalchemy import create_engine

    _refuse_creators(options)
    engine = create_engine(url, **options)
    if getattr(engine.dialect, "is_async", False):
        raise ConfigError(
            "url", "names a driver for asyncio", "Name one that is not, such as mysql+pymysql://."
        )
    dbapi: Any = getattr(engine.dialect, "loaded_dbapi", None) or engine.dialect.dbapi

    def connect(*args: Any, **params: Any) -> Any:
        def open_one(attempt: Attempt) -> Any:
            opens = functools.partial(driver or dbapi.connect, *args)
            return db.open_with(opens, attempt, _laid_over(params, attempt.peer.params))

        # Before the first has succeeded, trials go by what there is.
        db.opens = db.opens or open_one
        try:
            connection = db.connect(open_one)
        except NoPeerAvailable as exc:
            raise _of_driver(dbapi, exc) from exc.__cause__
        db.opens = open_one
        return connection

    engine.dialect.connect = connect  # type: ignore[method-assign]
    return engine


def async_sqlalchemy_engine(
    db: Any, driver: Callable[..., Any], url: Any, **options: Any
) -> sqlalchemy.ext.asyncio.AsyncEngine:
    """Return an engine for ``db``; see :meth:`AsyncLoadBalancer.sqlalchemy_engine`."""
    from sqlalchemy.ext.asyncio import create_async_engine

    _refuse_creators(options)
    engine = create_async_engine(url, **options)

    async def create(*args: Any, **params: Any) -> Any:
        def open_one(attempt: Attempt) -> Any:
            opens = functools.partial(driver, *args)
            return db.open_with(opens, attempt, _laid_over(params, attempt.peer.params))

        db.opens = db.opens or open_one
        connection = await db.connect(open_one)
        db.opens = open_one
        return connection

    dbapi: Any = engine.dialect.loaded_dbapi

    def connect(*args: Any, **params: Any) -> Any:
        try:
            return dbapi.connect(*args, **params, async_creator_fn=create)
        except NoPeerAvailable as exc:
            raise _of_driver(dbapi, exc) from exc.__cause__

    engine.dialect.connect = connect  # type: ignore[method-assign]
    return engine


def _refuse_creators(options: Mapping[str, Any]) -> None:
    for name in ("creator", "async_creator", "pool"):
        if options.get(name) is not None:
            raise ConfigError(
                name,
                "would connect past the load balancer",
                "Leave it out; poolclass= says which pool to make.",
            )


def _laid_over(params: Mapping[str, Any], peer: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the dialect connects with, the peer's own arguments laid over it."""
    said = {name for names in _SAME if names & peer.keys() for name in names}
    merged = {key: value for key, value in params.items() if key not in said}
    merged.update(peer)
    theirs, ours = params.get("client_flag"), peer.get("client_flag")
    if isinstance(theirs, int) and isinstance(ours, int):
        # A set of bits, of which the dialect cannot do without its own.
        merged["client_flag"] = theirs | ours
    return merged


def _of_driver(dbapi: Any, exc: Any) -> NoPeerAvailable:
    """Return ``exc`` as an OperationalError of the driver's, which SQLAlchemy takes for its own."""
    base: Any = type(exc)
    made: NoPeerAvailable = _class_over(base, dbapi.OperationalError)(
        exc.balancer, exc.peers, exc.pinned
    )
    return made


@functools.cache
def _class_over(base: Any, error: Any) -> Any:
    def reduced(exc: Any) -> Any:
        # To another process, which may not have the driver, it goes as what it is to us.
        return base, (exc.balancer, exc.peers, exc.pinned)

    namespace = {"__module__": base.__module__, "__reduce__": reduced}
    return type(base.__name__, (base, error), namespace)
