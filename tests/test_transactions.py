"""A block that ends without an error stands, wholly, and its hooks run once, after COMMIT.
A block that raises runs none. Whatever is lost, at each step of a block, with each driver.
"""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import os
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
from django.db import Error, close_old_connections, transaction
from django.db.backends.base.base import BaseDatabaseWrapper

from django_proxysql.core import sockets
from django_proxysql.errors import CommitOutcomeUnknown
from tests.other_driver import run_again
from tests.site import Site, site

#: How a connection is lost at a step: its packet does not arrive, its answer does not, or the
#: connection has been closed before the step.
LOSSES = ["before", "after", "idle"]


@pytest.fixture(params=["mariadb", "postgres"])
def here(request: pytest.FixtureRequest, fault_proxy: Callable[..., Any]) -> Iterator[Site]:
    driver = os.environ.get("TEST_DRIVER")
    if driver and (driver == "psycopg2") is not (request.param == "postgres"):
        pytest.skip(f"{driver} is not {request.param}'s")
    with site(request.getfixturevalue(request.param), fault_proxy) as made:
        yield made


@pytest.mark.server
@pytest.mark.parametrize(
    ("driver", "servers"), [("pymysql", ["mariadb_pair"]), ("psycopg2", ["postgres_pair"])]
)
@pytest.mark.skipif("TEST_DRIVER" in os.environ, reason="this is that run")
def test_all_of_this_with(driver: str, servers: list[str], request: pytest.FixtureRequest) -> None:
    pytest.importorskip(driver)
    run_again(__file__, driver, request, *servers)


# What is lost


def autocommit(here: Site) -> bytes:
    """What is in the packet that switches autocommit on."""
    return b"AUTOCOMMIT = 1" if os.environ.get("TEST_DRIVER") == "pymysql" else b"autocommit=1"


def arm(here: Site, how: str, packet: bytes = b"") -> None:
    """Have the connection lost at a step; "idle": now, before it."""
    if how == "idle":
        here.idle()
        if hasattr(here.connection.connection, "fileno"):
            here.cut_idle()
        else:
            # PyMySQL's socket cannot be looked at.
            here.here.drop_connections()
    else:
        arguments = (0,) if how == "reply" else ()
        getattr(here.here, f"cut_{how}")(*arguments, matching=packet)


def prepare(here: Site) -> None:
    """Empty the table, and forget what the last loss has left."""
    for proxy in here.proxies:
        proxy.disarm()
    here.connection.close()
    for peer in here.balancer.peers.values():
        peer.breaker.close()
    here.settle()
    here.plainly("DELETE FROM app_token")
    # The budget of replays is another test's.
    here.idle(100)
    here.sql("SELECT 1")
    close_old_connections()


def works_again(here: Site) -> None:
    """The next block stands, with its own hook and no other's."""
    for proxy in here.proxies:
        proxy.disarm()
    ran: list[str] = []
    for _ in range(2):
        # If session state was lost unseen, the first gets the error.
        with contextlib.suppress(Error), transaction.atomic("balanced"):
            transaction.on_commit(lambda: ran.append("next"), using="balanced")
            here.write("next")
        if ran:
            break
    assert ran == ["next"]
    assert here.connection.autocommit
    assert here.written()[-1] == "next"


# Each step of a block


def write(here: Site, value: str) -> None:
    here.write(value)


def read(here: Site, value: str) -> None:
    here.sql(f"SELECT '{value}'")


def driver_connection(here: Site, value: str) -> None:
    with contextlib.closing(here.connection.connection.cursor()) as cursor:
        cursor.execute(f"INSERT INTO app_token (value) VALUES ('{value}')")


def driver_cursor(here: Site, value: str) -> None:
    with here.connection.cursor() as cursor:
        cursor.cursor.execute(f"INSERT INTO app_token (value) VALUES ('{value}')")


def cursors_connection(here: Site, value: str) -> None:
    with here.connection.cursor() as cursor, contextlib.closing(cursor.connection.cursor()) as own:
        own.execute(f"INSERT INTO app_token (value) VALUES ('{value}')")


def executemany(here: Site, value: str) -> None:
    with here.connection.cursor() as cursor:
        cursor.executemany("INSERT INTO app_token (value) VALUES (%s)", [[value]])


def copy(here: Site, value: str) -> None:
    statement = "COPY app_token (value) FROM STDIN"
    with here.connection.cursor() as cursor:
        if hasattr(cursor.cursor, "copy_expert"):
            cursor.copy_expert(statement, io.StringIO(f"{value}\n"))
        else:
            with cursor.copy(statement) as rows:
                rows.write_row([value])


def stream(here: Site, value: str) -> None:
    with here.connection.cursor() as cursor:
        statement = f"INSERT INTO app_token (value) VALUES ('{value}') RETURNING id"
        for _ in cursor.stream(statement):
            pass


FIRSTS: dict[str, list[Callable[[Site, str], None]]] = {
    "mysql": [write, read, driver_connection, driver_cursor, executemany],
    "postgresql": [
        *(write, read, driver_connection, driver_cursor, cursors_connection, executemany),
        *(copy, stream),
    ],
}

#: The steps, and what is in their packet.
STEPS = {
    "SAVEPOINT": b"SAVEPOINT",
    "first": b"one",
    "RELEASE": b"RELEASE",
    "second": b"two",
    "COMMIT": b"COMMIT",
    "ROLLBACK-TO": b"ROLLBACK TO",
    "ROLLBACK": b"ROLLBACK",
}


class Block:
    """One block, with another in it, that loses its connection at one of its steps.

    :param before: the outer block has written when the inner one begins.
    :param inner: how the inner block ends: "well", it "raises", or its loss is "swallowed".
    :param outer: how the outer one ends: "well", it "raises", or by "set_rollback".
    """

    def __init__(
        self,
        here: Site,
        at: str,
        how: str,
        first: Callable[[Site, str], None] = write,
        *,
        before: bool = False,
        inner: str = "well",
        outer: str = "well",
    ) -> None:
        self.here, self.at, self.how, self.first = here, at, how, first
        self.before, self.inner, self.outer = before, inner, outer
        #: What was in the table when the hook ran.
        self.hooks: list[list[str]] = []
        self.raised: Exception | None = None
        #: Whether it came to the step that the loss is at.
        self.is_armed = False
        prepare(here)
        try:
            with transaction.atomic("balanced"):
                self.run()
        except Exception as exc:
            self.raised = exc

    def step(self, name: str) -> None:
        assert name in STEPS
        if name == self.at:
            self.is_armed = True
            arm(self.here, self.how, STEPS[name])

    def run(self) -> None:
        seen = self.here.plain_rows
        transaction.on_commit(lambda: self.hooks.append(seen()), using="balanced")
        if self.before:
            self.here.write("zero")
        self.step("SAVEPOINT")
        swallowed = Error if self.inner == "swallowed" else LookupError
        with contextlib.suppress(swallowed), transaction.atomic("balanced"):
            self.step("first")
            self.first(self.here, "one")
            self.step("RELEASE")
            if self.inner == "raises":
                self.step("ROLLBACK-TO")
                raise LookupError
        self.step("second")
        self.here.write("two")
        self.step("ROLLBACK")
        if self.outer == "raises":
            raise LookupError
        transaction.set_rollback(self.outer == "set_rollback", "balanced")
        self.step("COMMIT")

    def holds(self, whole: list[str]) -> None:
        """What is whole stands if no error was raised; if one was, nothing does."""
        where = (self.first.__name__, self.at, self.how, self.raised)
        assert self.is_armed, where
        rows = self.here.written()
        if self.raised is None:
            assert rows == whole, where
            assert self.hooks == ([] if self.outer == "set_rollback" else [whole]), where
        else:
            assert self.hooks == [], where
            unknown = isinstance(self.raised, CommitOutcomeUnknown)
            assert rows in ([[], whole] if unknown else [[]]), where
        works_again(self.here)


@pytest.mark.parametrize("how", LOSSES)
def test_a_block_that_ends_well_stands_and_one_that_raises_does_not(here: Site, how: str) -> None:
    for first in FIRSTS[here.connection.vendor]:
        if first is stream and not hasattr(here.connection.Database, "rows"):
            continue
        for at in ("SAVEPOINT", "first", "RELEASE", "second", "COMMIT"):
            Block(here, at, how, first).holds(["two"] if first is read else ["one", "two"])


@pytest.mark.parametrize(
    ("ends", "steps", "whole"),
    [
        ({"inner": "raises"}, "SAVEPOINT first ROLLBACK-TO RELEASE second COMMIT", "two"),
        # Django itself would end the outer block without an error, and nothing would stand.
        ({"before": True, "inner": "raises"}, "first ROLLBACK-TO RELEASE second", "zero two"),
        ({"before": True, "inner": "swallowed"}, "SAVEPOINT first RELEASE", "zero one two"),
        ({"outer": "raises"}, "SAVEPOINT first RELEASE second ROLLBACK", ""),
        ({"outer": "set_rollback"}, "first ROLLBACK", ""),
    ],
    ids=["inner raises", "inner raises after a write", "swallowed", "given up", "set_rollback"],
)
@pytest.mark.parametrize("how", [*LOSSES, "reply"])
def test_a_block_whose_inner_or_outer_part_is_given_up_ends_as_it_says(
    here: Site, how: str, ends: dict[str, Any], steps: str, whole: str
) -> None:
    for at in steps.split():
        block = Block(here, at, how, **ends)
        if (at, block.outer) == ("ROLLBACK", "raises"):
            assert isinstance(block.raised, LookupError)
        if (at, block.outer) == ("ROLLBACK", "set_rollback"):
            assert block.raised is None, (how, block.raised)
        block.holds(whole.split())


def nothing(here: Site, value: str) -> None:
    """An empty block."""


@pytest.mark.parametrize("how", LOSSES)
@pytest.mark.parametrize("inner_raises", [False, True])
def test_an_empty_inner_block_costs_nothing(here: Site, how: str, inner_raises: bool) -> None:
    """Nothing was sent but SAVEPOINTs: the block is begun anew with those that are left."""
    for at in ("SAVEPOINT", "RELEASE", "ROLLBACK-TO")[: 3 if inner_raises else 2]:
        if how == "idle" and not hasattr(here.connection.connection, "fileno"):
            # PyMySQL's socket cannot be looked at.
            continue
        block = Block(here, at, how, nothing, inner="raises" if inner_raises else "well")
        assert block.raised is None, (at, how, block.raised)
        block.holds(["two"])


def test_savepoints_by_hand_are_made_again(here: Site) -> None:
    prepare(here)
    with transaction.atomic("balanced"):
        sid = here.connection.savepoint()
        here.here.cut_before(b"SELECT 7")
        assert here.sql("SELECT 7") == [(7,)]
        here.write("one")
        here.connection.savepoint_rollback(sid)
        here.write("two")
    assert here.replayed()
    assert here.written() == ["two"]


@pytest.mark.parametrize("how", LOSSES)
@pytest.mark.parametrize("then", ["read", "COMMIT", "nothing", "SAVEPOINT"])
def test_what_is_not_seen_after_reads_is_not_nothing(here: Site, how: str, then: str) -> None:
    for unseen in (driver_connection, driver_cursor):
        prepare(here)
        hooks: list[int] = []
        with pytest.raises(Error), transaction.atomic("balanced"):
            transaction.on_commit(functools.partial(hooks.append, 1), using="balanced")
            here.sql("SELECT 1")
            unseen(here, "one")
            if then == "SAVEPOINT":
                with transaction.atomic("balanced"):
                    pass
            arm(here, how, b"COMMIT" if then == "COMMIT" else b"SELECT 2")
            if then != "COMMIT":
                here.sql("SELECT 2")
            if then == "read":
                here.write("two")
        assert here.written() in ([], ["one"] if (how, then) == ("after", "COMMIT") else [])
        assert not hooks
        works_again(here)


@pytest.mark.parametrize("how", LOSSES)
@pytest.mark.parametrize("unseen", [driver_connection, driver_cursor])
@pytest.mark.parametrize("step", [b"DECLARE", b"FETCH"])
def test_what_is_not_seen_before_a_server_side_cursors_step_is_not_nothing(
    on_postgres: Site, how: str, unseen: Callable[[Site, str], None], step: bytes
) -> None:
    here = on_postgres
    prepare(here)
    with contextlib.ExitStack() as stack:
        stack.enter_context(pytest.raises(Error))
        stack.enter_context(transaction.atomic(here.connection.alias))
        here.sql("SELECT 1")
        cursor = stack.enter_context(here.connection.chunked_cursor())
        if step == b"FETCH":
            cursor.execute("SELECT 1")
        unseen(here, "one")
        arm(here, how, step)
        cursor.execute("SELECT 1") if step == b"DECLARE" else cursor.fetchmany(1)
    assert here.written() == []
    works_again(here)


def test_a_block_of_one_read_asks_the_kernel_four_times_at_most(here: Site) -> None:
    """At its beginning (libpq knows by itself), before and after the read, and before COMMIT."""
    prepare(here)
    asks = sockets.Counter.sent
    with mock.patch.object(sockets.Counter, "sent", autospec=True, side_effect=asks) as asked:
        with transaction.atomic("balanced"):
            here.sql("SELECT 1")
        assert asked.call_count == {"mysql": 4, "postgresql": 2}[here.connection.vendor]


# Hooks


def broken() -> None:
    raise ZeroDivisionError


def test_a_hook_that_raises_leaves_nothing_to_the_next_block(here: Site) -> None:
    ran: list[str] = []
    prepare(here)
    with pytest.raises(ZeroDivisionError), transaction.atomic("balanced"):
        transaction.on_commit(broken, using="balanced")
        transaction.on_commit(lambda: ran.append("behind it"), using="balanced")
    here.here.cut_after(b"SELECT 42")
    with pytest.raises(LookupError), transaction.atomic("balanced"):
        transaction.on_commit(lambda: ran.append("paid"), using="balanced")
        here.sql("SELECT 42")
        assert here.replayed()
        assert not ran
        raise LookupError
    assert not ran
    works_again(here)


@pytest.mark.parametrize("end", ["_commit", "_rollback"])
@pytest.mark.parametrize("earlier_hook_raised", [False, True])
def test_a_block_whose_end_is_interrupted_leaves_nothing_and_runs_no_hook(
    here: Site, end: str, earlier_hook_raised: bool
) -> None:
    """Neither then nor with the next block. What is to end it was never sent."""
    ran: list[str] = []
    prepare(here)
    if earlier_hook_raised:
        with pytest.raises(ZeroDivisionError), transaction.atomic("balanced"):
            transaction.on_commit(broken, using="balanced")
    interrupted = mock.patch.object(BaseDatabaseWrapper, end, side_effect=KeyboardInterrupt)
    with interrupted, pytest.raises(KeyboardInterrupt), transaction.atomic("balanced"):
        transaction.on_commit(lambda: ran.append("paid"), using="balanced")
        here.write("one")
        if end == "_rollback":
            raise LookupError
    assert here.written() == []
    works_again(here)
    assert not ran


def test_a_block_inside_a_hook_runs_its_own_hook_after_its_own_commit(here: Site) -> None:
    prepare(here)
    seen: list[list[str]] = []

    def hook() -> None:
        with transaction.atomic("balanced"):
            transaction.on_commit(lambda: seen.append(here.plain_rows()), using="balanced")
            here.here.cut_after(b"SELECT 42")
            here.sql("SELECT 42")
            assert not seen
            here.write("two")

    with transaction.atomic("balanced"):
        transaction.on_commit(hook, using="balanced")
        here.write("one")
    assert here.replayed()
    assert seen == [["one", "two"]]


@pytest.mark.parametrize("what", [b"SELECT 42", b"two"])
@pytest.mark.parametrize("how", ["before", "after"])
def test_a_failed_blocks_hook_does_not_run_with_the_next(here: Site, how: str, what: bytes) -> None:
    """The application swallowed the loss: COMMIT does not leave, and that is certain."""
    prepare(here)
    ran: list[str] = []
    with pytest.raises(Error) as caught, transaction.atomic("balanced"):
        here.write("one")
        transaction.on_commit(lambda: ran.append("one"), using="balanced")
        arm(here, how, what)
        with contextlib.suppress(Error):
            here.write("two") if what == b"two" else here.sql("SELECT 42")
    assert not isinstance(caught.value, CommitOutcomeUnknown)
    works_again(here)
    assert not ran
    assert here.written() == ["next"]


# Session state


@pytest.mark.parametrize("end", ["COMMIT", "ROLLBACK", "ROLLBACK TO"])
def test_state_that_went_where_no_error_was_raised_is_an_error(here: Site, end: str) -> None:
    prepare(here)
    here.sql("SET @held = 1" if here.is_mysql else "SET work_mem = '5MB'")
    if end == "COMMIT":
        if not here.is_mysql:
            pytest.skip("nothing is sent after COMMIT")
        here.here.cut_before(autocommit(here))
    else:
        here.here.cut_before(end.encode())
    with contextlib.suppress(LookupError, Error), transaction.atomic("balanced"):
        here.write("one")
        if end == "ROLLBACK TO":
            with contextlib.suppress(LookupError), transaction.atomic("balanced"):
                raise LookupError
        if end != "COMMIT":
            raise LookupError
    with pytest.raises(Error):
        here.sql("SELECT @held" if here.is_mysql else "SHOW work_mem")
    works_again(here)


# By hand


@pytest.mark.parametrize("how", ["before", "after"])
def test_by_hand_in_every_order(here: Site, how: str) -> None:
    """What commit() said to stand, stands, and nothing else."""
    for steps in itertools.product(["write", "commit", "rollback"], repeat=2):
        program = ["off", "write", *steps, "on"]
        for lost_at in range(1, len(program)):
            by_hand(here, program, lost_at, how)


def by_hand(here: Site, program: list[str], lost_at: int, how: str) -> None:
    prepare(here)
    connection = here.connection
    pending: list[str] = []
    stands: list[str] = []
    maybe: list[str] = []
    packet = {"write": b"", "commit": b"COMMIT", "rollback": b"ROLLBACK", "on": autocommit(here)}
    for number, step in enumerate(program):
        if number == lost_at:
            for proxy in here.proxies:
                (proxy.cut_before if how == "before" else proxy.cut_after)(packet[step])
        try:
            if step == "write":
                here.write(f"{number}")
                pending.append(f"{number}")
            elif step == "commit":
                connection.commit()
                stands += pending
                pending = []
            elif step == "rollback":
                connection.rollback()
                pending = []
            elif step == "off":
                connection.set_autocommit(False)
            else:
                if pending and not here.is_mysql:
                    # It refuses to be switched on within a transaction.
                    connection.rollback()
                    pending = []
                connection.set_autocommit(True)
                stands += pending
                pending = []
        except CommitOutcomeUnknown:
            maybe, pending = stands + pending, []
        except Error:
            # What was open is lost, and its error raised.
            pending = []
    for proxy in here.proxies:
        proxy.disarm()
    if not connection.autocommit:
        connection.close()
    rows = here.written()
    assert rows in [stands, maybe or stands], (program, lost_at, how)
    works_again(here)


@pytest.mark.parametrize("end", [transaction.commit, transaction.rollback])
@pytest.mark.parametrize("how", ["before", "after", "idle"])
def test_ending_nothing_by_hand_is_no_error(
    here: Site, end: Callable[[str], None], how: str
) -> None:
    """django-celery-beat commits in autocommit, on a connection that has idled."""
    prepare(here)
    arm(here, how)
    end("balanced")
    for proxy in here.proxies:
        proxy.disarm()
    assert here.sql("SELECT 3") == [(3,)]
    works_again(here)


@pytest.mark.parametrize("how", LOSSES)
def test_autocommit_after_a_lost_transaction_by_hand_waits_for_no_rollback(
    here: Site, how: str
) -> None:
    """Django refuses each statement until a rollback, and no ROLLBACK is answered there."""
    prepare(here)
    connection = here.connection
    connection.set_autocommit(False)
    with pytest.raises(Error), transaction.atomic(connection.alias, savepoint=False):
        here.write("one")
        arm(here, how)
        here.write("two")
    with pytest.raises(Error):
        connection.rollback()
    connection.set_autocommit(True)
    assert here.sql("SELECT 3") == [(3,)]
    assert here.written() == []
    works_again(here)


def test_a_commit_by_hand_of_what_sql_began_is_not_taken_for_nothing(here: Site) -> None:
    if os.environ.get("TEST_DRIVER") == "psycopg2":
        pytest.skip("psycopg2 sends no COMMIT in autocommit")
    prepare(here)
    here.sql("BEGIN")
    here.write("one")
    here.here.cut_before(b"COMMIT")
    with pytest.raises(Error):
        transaction.commit("balanced")
    assert here.written() == []
    works_again(here)


def test_a_transaction_by_hand_goes_on_with_what_sql_began(on_mariadb: Site) -> None:
    connection = on_mariadb.connection
    on_mariadb.sql("BEGIN")
    on_mariadb.write("one")
    connection.set_autocommit(False)
    on_mariadb.kill()
    with pytest.raises(Error):
        connection.set_autocommit(True)
    connection.close()
    assert on_mariadb.written() == []
    works_again(on_mariadb)


def test_a_transaction_that_the_driver_began_is_not_halved(here: Site) -> None:
    """By psycopg's own transaction(), or by the driver's cursor: its first half is gone."""
    if here.is_mysql and not hasattr(here.connection.connection, "server_status"):
        pytest.skip("mysqlclient tells of no transaction but by autocommit")
    for second in ("write", "read"):
        prepare(here)
        with contextlib.closing(here.connection.connection.cursor()) as own:
            own.execute("BEGIN")
        here.write("one")
        if hasattr(here.connection.connection, "fileno"):
            here.cut_idle()
        else:
            here.here.cut_before()
        if second == "write":
            here.idle()
        with pytest.raises(Error):
            here.write("two") if second == "write" else here.sql("SELECT 42")
        assert here.written() == []
        works_again(here)


def test_autocommit_that_was_switched_off_at_the_driver_is_not_lost(here: Site) -> None:
    prepare(here)
    own = here.connection.connection
    if here.is_mysql:
        own.autocommit(False)
    else:
        own.autocommit = False
    here.write("one")
    here.idle()
    if hasattr(own, "fileno"):
        here.cut_idle()
    else:
        here.here.cut_before()
    with pytest.raises(Error):
        here.write("two")
    assert here.written() == []
    works_again(here)


# Interrupted


class Limit(Exception):
    """What a task's soft time limit raises."""


@contextlib.contextmanager
def striking(here: Site, exc: BaseException) -> Iterator[None]:
    """Raise ``exc`` in the driver once a statement was sent, before its answer is read."""
    name = here.connection.Database.__name__
    struck: list[int] = []

    def strike(*_: Any, **__: Any) -> None:
        raise exc

    if name == "psycopg":
        import psycopg

        def wait(self: Any, generator: Any, *args: Any, **kwargs: Any) -> Any:
            if not struck:
                struck.append(1)
                next(generator)
                raise exc
            return plain(self, generator, *args, **kwargs)

        plain = psycopg.Connection.wait
        with mock.patch.object(psycopg.Connection, "wait", wait):
            yield
    elif name == "pymysql" or here.connection.Database.__package__ == "pymysql":
        import pymysql

        with mock.patch.object(pymysql.connections.Connection, "_read_query_result", strike):
            yield
    elif name == "MySQLdb":
        from MySQLdb import cursors

        with mock.patch.object(cursors.BaseCursor, "_do_get_result", strike):
            yield
    else:
        pytest.skip("psycopg2's C code reads its answer before Python sees a signal")


@pytest.mark.parametrize("exc", [Limit(), KeyboardInterrupt(), TimeoutError(), ValueError()])
def test_an_interrupted_statements_answer_is_no_others(here: Site, exc: BaseException) -> None:
    prepare(here)
    before = here.connection.connection
    with pytest.raises(type(exc)), striking(here, exc):
        here.sql("SELECT 1")
    assert here.sql("SELECT 2") == [(2,)]
    assert here.connection.connection is not before
    works_again(here)


@pytest.mark.parametrize("exc", [Limit(), KeyboardInterrupt()])
@pytest.mark.parametrize("is_first", [True, False])
def test_a_block_that_was_interrupted_ends_in_an_error(
    here: Site, exc: BaseException, is_first: bool
) -> None:
    prepare(here)
    hooks: list[int] = []
    with pytest.raises(Error), transaction.atomic("balanced"):
        transaction.on_commit(lambda: hooks.append(1), using="balanced")
        if not is_first:
            here.write("one")
        with contextlib.suppress(type(exc)), striking(here, exc):
            here.sql("SELECT 1")
        with contextlib.suppress(Error):
            here.write("two")
    assert here.written() == []
    assert not hooks
    works_again(here)


def test_an_interrupted_statement_tells_of_the_state_that_went_with_it(here: Site) -> None:
    prepare(here)
    here.sql("SET @held = 1" if here.is_mysql else "SET work_mem = '5MB'")
    with pytest.raises(Limit), striking(here, Limit()):
        here.sql("SELECT 1")
    with pytest.raises(Error):
        here.sql("SELECT 2")
    assert here.sql("SELECT 3") == [(3,)]


def test_a_limit_within_the_ping_is_raised(here: Site) -> None:
    if not hasattr(here.connection.connection, "fileno"):
        pytest.skip("PyMySQL's socket cannot be looked at")
    prepare(here)
    here.cut_idle()
    ping = mock.patch.object(here.connection._driver, "ping", mock.Mock(side_effect=Limit))
    with pytest.raises(Limit), ping:
        here.write("one")
    works_again(here)


def wrong_arguments(here: Site) -> None:
    with pytest.raises((TypeError, IndexError, ValueError, Error)):
        here.sql("SELECT %s, %s", [1])


def refused_parameter(here: Site) -> None:
    """With PyMySQL in mysqlclient's place the error is none of the module Django connects with."""
    if here.is_mysql:
        # PostgreSQL has NaN.
        with pytest.raises(Exception, match="nan can not be used"):
            here.sql("SELECT %s", [float("nan")])


def rows_left_early(here: Site) -> None:
    with here.connection.cursor() as cursor:
        cursor.execute("SELECT 1 UNION SELECT 2")
        for _ in cursor:
            break


@pytest.mark.parametrize("what", [wrong_arguments, refused_parameter, rows_left_early])
def test_what_is_no_loss_leaves_the_connection_and_the_block(
    here: Site, what: Callable[[Site], None]
) -> None:
    prepare(here)
    before = here.connection.connection
    what(here)
    with transaction.atomic("balanced"):
        here.write("one")
        what(here)
        here.write("two")
    assert here.written() == ["one", "two"]
    assert here.connection.connection is before


@pytest.mark.parametrize("sqlstate", ["57P01", "08006"])
def test_error_that_a_function_raises_at_commit_is_no_unknown_outcome(
    on_postgres: Site, sqlstate: str
) -> None:
    """PostgreSQL says ERROR, and not FATAL: the transaction is rolled back, the session goes on."""
    here = on_postgres
    here.plainly(
        "DROP TABLE IF EXISTS checked; CREATE TABLE checked (a int);"
        "CREATE OR REPLACE FUNCTION complain() RETURNS trigger LANGUAGE plpgsql AS"
        f" $$ BEGIN RAISE 'as if lost' USING ERRCODE = '{sqlstate}'; END $$;"
        "CREATE CONSTRAINT TRIGGER c AFTER INSERT ON checked DEFERRABLE INITIALLY DEFERRED"
        " FOR EACH ROW EXECUTE FUNCTION complain()"
    )
    before = here.connection.connection
    with (
        pytest.raises(Error, match="as if lost") as raised,
        transaction.atomic(here.connection.alias),
    ):
        here.sql("INSERT INTO checked (a) VALUES (1)")
    assert not isinstance(raised.value, CommitOutcomeUnknown)
    assert here.sql("SELECT count(*) FROM checked") == [(0,)]
    assert here.connection.connection is before
    assert not here.losses()
    here.plainly("DROP TABLE checked; DROP FUNCTION complain()")
