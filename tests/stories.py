"""Stories of a connection: what the application does, what happens to it, what is seen of it.

A story is a line of steps::

    HOLD; kill_idle; !{ read; write one }; written; { write two }; written two

``{ … }`` is an atomic block, and ``undone { … }`` one that the application leaves by an exception.
``!`` before a step or a block: it raises the loss, an ``OperationalError``; ``!!``: a
``CommitOutcomeUnknown``. What begins with a capital is SQL; the other steps are methods of
:class:`Narrator`, or of the :class:`~tests.site.Site`. A story with ``CUT`` runs for each moment
at which a statement can be lost.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Iterator, Mapping
from typing import Any
from unittest import mock

import pytest
from django.db import OperationalError, close_old_connections, transaction
from django.db.utils import Error

from django_proxysql import CommitOutcomeUnknown, NoPeerAvailable, retrying_atomic
from django_proxysql.core.events import CircuitOpened
from tests.app.models import Token
from tests.servers import DATABASE
from tests.site import KINDS, Site, site

#: Names for several servers.
SERVERS = {"all": KINDS, "mysql": ["mariadb", "mariadb_tls"]}
CUTS = ["before", "after", "reply"]

#: Statements that each server has its own words for: MySQL's and MariaDB's, PostgreSQL's.
WORDS = {
    "HOLD": ("SET @held = 1", "SELECT pg_advisory_lock(5)"),
    "LOCK": ("SELECT GET_LOCK('a', 0)", "SELECT pg_advisory_lock(5)"),
    "ASK": ("SELECT LAST_INSERT_ID()", "SELECT lastval()"),
    "WHO": ("SELECT CONNECTION_ID()", "SELECT pg_backend_pid()"),
    "WAIT": ("SELECT SLEEP(0)", "SELECT pg_sleep(0)"),
}
WSREP = "WSREP has not yet prepared node for application use"
#: What servers say, by errno.
REFUSALS = {
    1047: WSREP,
    1053: "Server shutdown in progress",
    1105: "Unknown error",
    1180: "Got error 6 during COMMIT: Not connected to Primary Component",
    1927: "Connection was killed",
    1317: "Query execution was interrupted",
    1205: "Lock wait timeout exceeded",
    1226: "User has exceeded a resource",
}
Steps = list[tuple[str, Any]]


def told(table: Mapping[str, Any]) -> Any:
    """Parametrize a test over ``server``, ``settings`` and ``text`` of the stories of a table.

    :param table: the promise, and ``servers: story``, or that and the balancer's settings.
    """
    rows = []
    for promise, given in table.items():
        story, settings = (given, {}) if isinstance(given, str) else given
        servers, _, text = story.partition(": ")
        for server in SERVERS.get(servers, [servers]):
            for kind in CUTS if "CUT" in text else [""]:
                row = server, settings, text.replace("CUT", f"cut {kind}")
                name = "-".join(filter(None, (promise, server, kind)))
                rows.append(pytest.param(*row, id=name))
    return pytest.mark.parametrize(("server", "settings", "text"), rows)


def tell(
    request: Any, server: str, settings: dict[str, Any], text: str, narrator: Any = None
) -> None:
    """Tell a story on a new site on ``server``; ``number`` among the settings: its peers;
    ``reset``: the proxies end connections by RST; ``unbuffered``: so are its cursors."""
    settings = dict(settings)
    if settings.pop("unbuffered", False):
        from MySQLdb.cursors import SSCursor

        settings["OPTIONS"] = {"cursorclass": SSCursor}
    fault_proxy = functools.partial(
        request.getfixturevalue("fault_proxy"), reset=settings.pop("reset", False)
    )
    with site(request.getfixturevalue(server), fault_proxy, **settings) as here:
        (narrator or Narrator)(here).tell(text)


def attempts(here: Site, *stories: str) -> int:
    """Have ``retrying_atomic`` run a function whose attempts are stories; return how many."""
    left, narrator = list(stories), Narrator(here)
    retrying_atomic(using=here.connection.alias)(lambda: narrator.tell(left.pop(0)))()
    return len(stories) - len(left)


@contextlib.contextmanager
def refusing(here: Site, errno: int, text: str, table: str = "app_token") -> Iterator[None]:
    """Have the server answer the present connection's INSERTs of some values with an error."""
    thread = here.connection.connection.thread_id()
    run = functools.partial(here.server.sql, database=DATABASE)
    signal = f"SIGNAL SQLSTATE 'HY000' SET MYSQL_ERRNO = {errno}, MESSAGE_TEXT = '{text}'"
    run(
        f"CREATE OR REPLACE TRIGGER refusing BEFORE INSERT ON {table} FOR EACH ROW"
        f" IF CONNECTION_ID() = {thread} AND NEW.value <> 'well' THEN {signal}; END IF"
    )
    try:
        yield
    finally:
        run("DROP TRIGGER refusing")


@contextlib.contextmanager
def no_autocommit(here: Site, value: int, errno: int) -> Iterator[None]:
    """Have ``SET autocommit`` to a value answered with an error, on the present connection."""
    connection = here.connection.connection
    plain = type(connection).autocommit

    def refuse(self: Any, on: bool) -> None:
        if self is connection and on is bool(value):
            raise here.connection.Database.OperationalError(errno, REFUSALS[errno])
        plain(self, on)

    with mock.patch.object(type(connection), "autocommit", refuse):
        yield


def _parsed(tokens: Iterator[str]) -> Steps:
    steps: Steps = []
    for token in tokens:
        if token == "}":
            break
        steps.append((token.rstrip("{").strip(), _parsed(tokens) if token[-1] == "{" else None))
    return steps


class Narrator:
    """Tells the stories of one site."""

    def __init__(self, here: Site) -> None:
        self.here = here
        self.rows: Any = None
        self.hooks: list[str] = []
        self.first: Error | None = None
        self.note()

    def tell(self, text: str) -> None:
        found = re.findall(r"\}|[^{};]*\{|[^{};]+", text)
        self._take(_parsed(token.strip() for token in found if token.strip()))

    def _take(self, steps: Steps) -> None:
        for step, inner in steps:
            bare = step.lstrip("! ")
            with self._raised(step.count("!")):
                if inner is not None:
                    name, *arguments = (bare or "block").split()
                    with getattr(self, f"in_{name}")(*arguments):
                        self._take(inner)
                else:
                    with self._noted():
                        self._step(bare)

    def _step(self, step: str) -> None:
        if step[0].isupper():
            self.sql(WORDS.get(step, (step, step))[not self.here.is_mysql])
        else:
            method, *arguments = step.split()
            getattr(self if hasattr(self, method) else self.here, method)(*arguments)

    @contextlib.contextmanager
    def _noted(self) -> Iterator[None]:
        try:
            yield
        except Error as exc:
            self.first = self.first or exc
            raise

    @contextlib.contextmanager
    def _raised(self, marks: int) -> Iterator[None]:
        if not marks:
            yield
            return
        self.first = None
        with pytest.raises(Error if marks == 1 else CommitOutcomeUnknown) as caught:
            yield
        assert not isinstance(caught.value, NoPeerAvailable)
        assert isinstance(caught.value, CommitOutcomeUnknown) is (marks == 2)
        # What a block raises is what happened to its statement.
        assert self.first in (None, caught.value)
        self.first = None

    # Blocks

    def in_block(self) -> Any:
        return transaction.atomic(self.here.connection.alias)

    def in_pinned(self) -> Any:
        return self.here.balancer.pinned()

    @contextlib.contextmanager
    def in_undone(self) -> Iterator[None]:
        with pytest.raises(KeyError), self.in_block():
            yield
            raise KeyError

    @contextlib.contextmanager
    def in_shared(self) -> Iterator[None]:
        """Several threads may use the connection meanwhile."""
        self.here.connection.inc_thread_sharing()
        try:
            yield
        finally:
            self.here.connection.dec_thread_sharing()

    @contextlib.contextmanager
    def in_unchecked(self) -> Iterator[None]:
        """Django has switched the checks of foreign keys off meanwhile."""
        try:
            with self.here.connection.constraint_checks_disabled():
                yield
        finally:
            # To switch them on again fails, too.
            self.first = None

    def in_running(self) -> Any:
        """The clock goes as time goes meanwhile: a driver's time-out takes its seconds."""
        return self.here.clock.running()

    def in_refusing(self, errno: str) -> Any:
        return refusing(self.here, int(errno), REFUSALS[int(errno)])

    def in_no_autocommit(self, value: str, errno: str) -> Any:
        return no_autocommit(self.here, int(value), int(errno))

    # What the application does

    def sql(self, statement: str) -> None:
        self.rows = self.here.sql(statement)
        number = re.fullmatch(r"SELECT (\d+)", statement)
        assert number is None or self.rows == [(int(number[1]),)]

    def many(self, *values: str) -> None:
        with self.here.connection.cursor() as cursor:
            rows = [[value] for value in values]
            cursor.executemany("INSERT INTO app_token (value) VALUES (%s)", rows)

    def named(self, *lock: str) -> None:
        """Read by a server-side cursor."""
        with self.here.connection.chunked_cursor() as cursor:
            cursor.execute(f"SELECT value FROM app_token {' '.join(lock)}")
            assert cursor.fetchall() == [("one",)]

    def iterate(self, *values: str) -> None:
        """Read by the ORM's server-side cursor, two rows at a time."""
        tokens = Token.objects.using(self.here.connection.alias).order_by("id")
        assert [token.value for token in tokens.iterator(2)] == list(values)

    def one_by_one(self, *values: str) -> None:
        """Have executemany() send each row by itself: mysqlclient sees no VALUES here."""
        with self.here.connection.cursor() as cursor:
            rows = [[value] for value in values]
            cursor.executemany("INSERT INTO app_token SET value = %s", rows)

    def large(self) -> None:
        """Write by a statement that may be over the server's max_allowed_packet."""
        statement = "INSERT INTO app_token (value) SELECT 'one' FROM (SELECT %s AS x) AS t"
        self.here.sql(statement, ["x" * 1_000_001])

    def call(self, procedure: str) -> None:
        with self.here.connection.cursor() as cursor:
            cursor.callproc(procedure)

    def misuse(self) -> None:
        """Have the driver complain of its own."""
        self.here.sql("SELECT %s, %s", [1])

    def hook(self, name: str) -> None:
        transaction.on_commit(lambda: self.hooks.append(name), self.here.connection.alias)

    def read(self, *values: str) -> None:
        found = self.here.read()
        assert not values or found == list(values)

    def answer(self, *values: str) -> None:
        assert [str(field) for row in self.rows for field in row] == list(values)

    def rollback(self) -> None:
        self.here.connection.rollback()

    def request_ends(self) -> None:
        close_old_connections()

    def unanswered(self) -> None:
        """What only the connection that is gone could answer is refused, and not sent."""
        with pytest.raises(OperationalError, match="replaced"):
            self.sql(WORDS["ASK"][not self.here.is_mysql])

    def asks(self) -> None:
        """Ask what one connection can answer: an error, until the new one has written itself."""
        of_mysql = ["SELECT LAST_INSERT_ID()", "SELECT @@identity", "SELECT ROW_COUNT()"]
        questions = of_mysql if self.here.is_mysql else ["SELECT lastval()"]
        for question in questions:
            with pytest.raises(OperationalError, match="replaced"):
                self.here.sql(question)
        self.here.write("newest")
        newest = self.here.sql("SELECT MAX(id) FROM app_token")
        # Of this connection's own write.
        self.here.write("newer")
        assert self.here.sql(questions[0]) > newest

    # What happens to it

    def cut(self, kind: str, nth: str = "1") -> None:
        self.here.cut(kind, int(nth))

    def idle(self, seconds: str = "1") -> None:
        self.here.idle(float(seconds))

    def unlooked(self) -> None:
        """Have the socket not be looked at, as PyMySQL's is not."""
        self.here.session.poll = None

    def dead(self) -> None:
        self.here.session.dead = True

    def erred(self) -> None:
        self.here.connection.errors_occurred = True

    def health_check(self) -> None:
        if not hasattr(self.here.connection, "close_if_health_check_failed"):
            pytest.skip("Django before 4.1 has no CONN_HEALTH_CHECKS")
        self.here.connection.health_check_enabled = True
        self.here.connection.health_check_done = False

    def aged(self) -> None:
        self.note()
        self.here.connection.close_at = 0

    def open(self) -> None:
        """Have another thread find the peer gone."""
        self.note()
        self.peer.breaker.open()

    def recover(self) -> None:
        self.peer.breaker.close()

    def others(self) -> list[Any]:
        return [peer for peer in self.here.balancer.peers.values() if peer is not self.peer]

    def open_others(self) -> None:
        for peer in self.others():
            peer.breaker.open()

    def open_another(self) -> None:
        self.others()[0].breaker.open()

    def another_is_open(self) -> None:
        """It was not tried, which would have closed it."""
        assert self.others()[0].breaker.current_state == "open"

    def recover_another(self) -> None:
        self.others()[0].breaker.close()

    def drain(self) -> None:
        self.note()
        self.here.balancer.drain(self.peer.name)

    def note(self) -> None:
        self.peer, self.connection = self.here.connection.peer, self.here.connection.connection
        self.accepted = [proxy.accepted for proxy in self.here.proxies]

    def refuse(self) -> None:
        for proxy in self.here.proxies:
            proxy.refuse()

    def forward(self) -> None:
        for proxy in self.here.proxies:
            proxy.forward()

    def freeze(self) -> None:
        self.here.here.freeze()

    def connect(self) -> None:
        self.here.connection.close()
        self.here.connection.ensure_connection()
        self.note()

    def ensure(self) -> None:
        self.here.connection.ensure_connection()

    # What is so

    def ran(self, *hooks: str) -> None:
        assert self.hooks == list(hooks)

    def written(self, *values: str) -> None:
        assert self.here.written() == list(values)

    def replayed(self, number: str) -> None:
        assert len(self.here.replayed()) == int(number)

    def replaced(self, number: str, how: str = "") -> None:
        """So many connections so far, and all ``forced`` or ``unforced``, if that is said."""
        forced = [event.forced for event in self.here.replaced()]
        assert len(forced) == int(number)
        assert not how or set(forced) == {how == "forced"}

    def lost(self, number: str) -> None:
        assert len(self.here.losses()) == int(number)

    def opened(self, number: str) -> None:
        """So many circuits have opened so far."""
        assert len([e for e in self.here.events if type(e) is CircuitOpened]) == int(number)

    def unconnected(self) -> None:
        assert [proxy.accepted for proxy in self.here.proxies] == self.accepted

    def stays(self) -> None:
        assert self.here.connection.connection is self.connection

    def other(self) -> None:
        assert self.here.connection.connection is not self.connection

    def left(self) -> None:
        assert self.here.connection.peer is not self.peer

    def usable(self) -> None:
        assert self.here.connection.is_usable()

    def unusable(self) -> None:
        assert not self.here.connection.is_usable()

    def held(self) -> None:
        assert self.here.session.holds

    def free(self) -> None:
        assert not self.here.session.holds

    def circuit(self, state: str, question: str = "") -> None:
        """The noted peer is closed, open, or closed and suspect; what its trials ask."""
        assert not question or self.peer.breaker.circuit.question == question
        assert self.peer.breaker.current_state == ("open" if state == "open" else "closed")
        assert self.peer.breaker.circuit.suspect is (state == "suspect")
