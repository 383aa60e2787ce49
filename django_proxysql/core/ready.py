"""READY_CHECK: is a peer that accepts connections able to do its work?

A check is called with the driver's own connection right after connecting and
raises :class:`NotReady` if the peer must not be used. Our own are scripts without I/O: they yield
statements and are sent the rows, so that drivers for asyncio can be asked the same.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from typing import Any, Generic, NamedTuple, TypeVar

from . import drivers, sockets
from .config import imported
from .exceptions import ConfigError, NotReady

Check = Callable[[Any], object]
_T = TypeVar("_T")
_Step = TypeVar("_Step")
#: Yields statements, is sent the rows of each, and returns what they come to.
Script = Generator[str, "list[Any]", _T]


class ServerCheck(Generic[_T]):
    """A check of ours: a script, run on a driver's connection when it is called."""

    def __init__(self, script: Callable[[Any], Script[_T]]) -> None:
        self.script = script
        functools.update_wrapper(self, script)

    def __call__(self, connection: Any) -> _T:
        """Ask, and return what the answers come to. A transaction that began by it is ended."""
        begins_one = begins_transaction(connection)
        answer = run(self.script(connection), functools.partial(rows, connection))
        if begins_one():
            connection.rollback()
        return answer


def begins_transaction(connection: Any) -> Callable[[], bool]:
    """Return a function that tells whether a transaction has begun since this call.

    A driver of PostgreSQL's begins one with the first statement, unless autocommit is on.
    """
    is_open = functools.partial(drivers.driver_of(connection).in_transaction, connection)
    was_open = is_open()
    return lambda: was_open is False and bool(is_open())


def run(script: Generator[_Step, Any, _T], do: Callable[[_Step], Any]) -> _T:
    """Do what a script yields, and send it what comes of that."""
    try:
        step = next(script)
        while True:
            try:
                answer = do(step)
            except Exception as exc:
                step = script.throw(exc)
            else:
                step = script.send(answer)
    except StopIteration as end:
        result: _T = end.value
        return result


@ServerCheck
def galera(connection: Any) -> Script[None]:
    """Raise :class:`NotReady` unless the node is a usable member of its cluster.

    A node that has lost its cluster goes on accepting connections and answers
    ``ping`` and ``SELECT 1``; only its own ``wsrep_*`` status shows it. Galera's
    documentation: ready ON, component Primary, state 4 (Synced), and neither
    ``wsrep_reject_queries`` nor ``wsrep_desync`` set by an operator.
    """
    status = _pairs(
        (
            yield "SHOW GLOBAL STATUS WHERE Variable_name IN ('wsrep_ready', "
            "'wsrep_cluster_status', 'wsrep_local_state', 'wsrep_local_state_comment')"
        )
    )
    if not status:
        raise NotReady("the server is not a Galera node: it has no wsrep status")
    if status.get("wsrep_ready") != "ON":
        raise NotReady("wsrep_ready is OFF")
    if status.get("wsrep_cluster_status") != "Primary":
        raise NotReady(f"wsrep_cluster_status is {status.get('wsrep_cluster_status')}")
    if status.get("wsrep_local_state") != "4":
        raise NotReady(f"wsrep_local_state is {status.get('wsrep_local_state_comment')}")
    settings = _pairs(
        (
            yield "SHOW GLOBAL VARIABLES WHERE Variable_name IN "
            "('wsrep_reject_queries', 'wsrep_desync')"
        )
    )
    if settings.get("wsrep_reject_queries", "NONE") != "NONE":
        raise NotReady(f"wsrep_reject_queries is {settings['wsrep_reject_queries']}")
    if settings.get("wsrep_desync", "OFF") != "OFF":
        raise NotReady("wsrep_desync is ON")


class Writer(NamedTuple):
    """What answers where a connection's writes go."""

    #: Why it takes no writes; "" if it takes them.
    refusal: str
    #: Whether it is the server that greeted us. A proxy greets with a thread id of its own.
    is_server: bool


@ServerCheck
def writer_of(connection: Any) -> Script[Writer]:
    """Ask what takes this connection's writes whether it does. Changes no state of the session.

    ``FOR UPDATE`` has proxies that split reads from writes send the question
    where writes go; without a table it locks nothing.

    :raises Exception: the driver's own error, if it does not answer.
    """
    if drivers.postgresql.owns(connection):
        # What the application has SET is not the server's doing: reset_val is.
        [(recovering, read_only)] = yield (
            "SELECT pg_is_in_recovery(), (SELECT reset_val FROM pg_settings"
            " WHERE name = 'default_transaction_read_only') FOR UPDATE"
        )
        if recovering:
            return Writer("the server is in recovery (a standby)", True)
        return Writer("default_transaction_read_only is on" if read_only == "on" else "", True)
    [(value, answers)] = yield "SELECT @@global.read_only, CONNECTION_ID() FOR UPDATE"
    # MySQL's super_read_only implies read_only. MariaDB 12 names levels.
    is_read_only = str(value).upper() not in ("0", "OFF")
    greeted = greeting_id(connection)
    # The greeting has room for four bytes.
    is_server = greeted is not None and greeted % 2**32 == int(answers) % 2**32
    return Writer(f"@@global.read_only is {value}" if is_read_only else "", is_server)


def greeting_id(connection: Any) -> int | None:
    """Return the thread id of the server's greeting (MySQL family); None if it is not known."""
    number = getattr(connection, "thread_id", None)
    if callable(number):
        number = number()
    elif number is None:
        # MySQL Connector/Python.
        number = getattr(connection, "connection_id", None)
    return number if isinstance(number, int) else None


@ServerCheck
def writable(connection: Any) -> Script[Writer]:
    """Raise :class:`NotReady` if the server takes no writes (MySQL family, PostgreSQL).

    Before a proxy is refused it is asked once more inside a transaction, which
    MaxScale's readwritesplit and ProxySQL send to the writers. ``FOR UPDATE``
    alone takes a query rule.

    :returns: what answered.
    """
    writer = yield from writer_of.script(connection)
    if not drivers.postgresql.owns(connection) and (writer.refusal or not writer.is_server):
        within = yield from _writer_in_transaction(connection)
        # A proxy's id may once be its server's by chance.
        writer = within._replace(is_server=within.is_server and writer.is_server)
    if writer.refusal:
        raise NotReady(writer.refusal)
    return writer


class Unanswered(NotReady):
    """A proxy lets us in, and none of the servers behind it has answered.

    They may be gone, or all of the proxy's connections to them be in use.
    """


@ServerCheck
def backend(connection: Any) -> Script[None]:
    """Ask what a proxy cannot answer by itself: a read, and what goes where writes go.

    ProxySQL answers pings, USE and SET whatever its servers do, and with query
    rules that split the readers may be gone while the writers are there.

    :raises NotReady: one of the two was not answered. It is :class:`Unanswered` unless the
        proxy would say so if it were only full, as most poolers of PostgreSQL do.
    """
    is_postgresql = drivers.postgresql.owns(connection)
    write_side = "SELECT 1 FOR UPDATE" if is_postgresql else "DO 1"
    for statement in ("SELECT 1", write_side):
        try:
            yield statement
        except Exception as exc:
            judgement = drivers.judge(exc, connecting=True)
            if judgement.fault.counts:
                is_clear = is_postgresql and not judgement.may_be_busy
                error = NotReady if is_clear else Unanswered
                raise error(
                    f"no server behind the proxy answers {statement}: {judgement.text}"
                ) from exc
            raise


@contextlib.contextmanager
def throw_away(
    driver: drivers.Driver, connect: Callable[..., Any], params: Mapping[str, Any], seconds: float
) -> Iterator[Any]:
    """Yield a connection that is there to be asked, and close it.

    :param seconds: for connecting, and then for all answers together.
    """
    connection = connect(
        **{
            **params,
            **driver.connect_options(params, seconds),
            **driver.trial_options(params, seconds),
        }
    )
    try:
        with sockets.limited(driver.fileno(connection), seconds):
            yield connection
    finally:
        # It has served its purpose.
        with contextlib.suppress(Exception):
            connection.close()


_BY_NAME: dict[str, Check] = {"galera": galera, "writable": writable}
#: What a circuit that a statement has opened makes its trials ask.
QUESTIONS: dict[str, Check] = {**_BY_NAME, "backend": backend}


def catch_up(connection: Any) -> None:
    """Have a Galera node apply all that the cluster has committed; others are left alone.

    Galera's documentation of ``wsrep_sync_wait``: with 1, a read waits for it. The node
    bounds the wait by its ``repl.causal_read_timeout`` (30 s by default).

    :raises Exception: the driver's own error: 1205 if the node could not in that time.
    """
    names = "('wsrep_on', 'wsrep_sync_wait')"
    session = _pairs(rows(connection, f"SHOW SESSION VARIABLES WHERE Variable_name IN {names}"))
    if session.get("wsrep_on") != "ON":
        return
    before = int(session.get("wsrep_sync_wait", "0"))
    rows(connection, "SET SESSION wsrep_sync_wait = 1")
    rows(connection, "SELECT 1")
    rows(connection, f"SET SESSION wsrep_sync_wait = {before:d}")


def ready_check_from(setting: Any) -> Check | None:
    """Return the check that the READY_CHECK setting names; or raise a ConfigError."""
    if isinstance(setting, str):
        setting = _BY_NAME.get(setting) or imported("READY_CHECK", setting, known=_BY_NAME)
    if setting is not None and not callable(setting):
        raise ConfigError(
            "READY_CHECK",
            f"is {setting!r}, which cannot be called",
            "Give 'galera', 'writable', or a dotted path to a function.",
        )
    return setting  # type: ignore[no-any-return]


def rows(connection: Any, statement: str, *parameters: Any) -> list[Any]:
    """Return what a statement returns on a driver's own connection."""
    with contextlib.closing(connection.cursor()) as cursor:
        cursor.execute(statement, *parameters)
        return [] if cursor.description is None else plain(cursor.fetchall())


def plain(found: Iterable[Any]) -> list[Any]:
    """Return rows as tuples: cursors of the user's own class may give dicts."""
    return [tuple(row.values()) if isinstance(row, dict) else row for row in found]


def _writer_in_transaction(connection: Any) -> Script[Writer]:
    """Ask as :func:`writer_of` does, inside a transaction that is then undone."""
    yield "START TRANSACTION"
    try:
        writer = yield from writer_of.script(connection)
    except Exception:
        # The error that ends the question is the one to be raised.
        with contextlib.suppress(Exception):
            yield "ROLLBACK"
        raise
    with contextlib.suppress(Exception):
        yield "ROLLBACK"
    return writer


def _pairs(found: list[Any]) -> dict[str, str]:
    return {str(name): str(value) for name, value in found}
