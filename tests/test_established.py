"""What becomes of a connection that is lost, at the byte where it is lost."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from django.db import OperationalError, close_old_connections, transaction
from django.db.utils import Error

from django_proxysql.errors import CommitOutcomeUnknown
from tests.site import Site

CUTS = ["before", "after", "reply"]


class TestFoundBeforeSending:
    """A socket that has something to say before it was asked: the connection is replaced."""

    @pytest.mark.parametrize("how", ["cut_idle", "kill"])
    def test_write(self, here: Site, how: str) -> None:
        here.write("before")
        getattr(here, how)()
        here.write("after")
        assert here.written() == ["before", "after"]
        assert [event.forced for event in here.replaced()] == [True]
        assert not here.replayed()

    @pytest.mark.parametrize("how", ["cut_idle", "kill"])
    def test_read_after_idleness(self, here: Site, how: str) -> None:
        here.write("before")
        close_old_connections()
        getattr(here, how)()
        here.idle()
        assert here.read() == ["before"]
        assert here.replaced()
        assert not here.replayed()

    def test_transaction(self, here: Site) -> None:
        here.kill()
        with transaction.atomic(here.connection.alias):
            here.write("one")
            here.write("two")
        assert here.written() == ["one", "two"]
        assert not here.replayed()

    @pytest.mark.parametrize("how", ["dead", "drained"])
    def test_schema_change(self, here: Site, how: str) -> None:
        """It uses one peer from start to end: not one that is gone before the start."""
        here.read()
        lost = here.connection.peer
        if how == "dead":
            here.here.refuse()
            here.cut_idle()
        else:
            here.balancer.drain(lost.name)
        with here.connection.schema_editor() as editor:
            editor.execute("CREATE TABLE app_made (id integer)")
            editor.execute("DROP TABLE app_made")
            assert here.connection.peer is not lost

    def test_first_statement_after_idleness(self, here: Site) -> None:
        """Between BEGIN and the first statement, too: nothing has happened in it yet."""
        with transaction.atomic(here.connection.alias):
            if not here.is_mysql:
                # psycopg sends BEGIN with the first statement.
                here.connection.ensure_connection()
            here.kill()
            here.idle()
            here.write("one")
            here.write("two")
        assert here.written() == ["one", "two"]
        assert here.replaced()
        assert not here.replayed()

    def test_commit(self, here: Site) -> None:
        """The socket is dead before COMMIT: known to be rolled back, and said so."""
        ran: list[int] = []
        with pytest.raises(OperationalError) as caught, transaction.atomic(here.connection.alias):
            here.write("one")
            transaction.on_commit(lambda: ran.append(1), here.connection.alias)
            here.kill()
        assert not isinstance(caught.value, CommitOutcomeUnknown)
        assert here.written() == []
        assert ran == []
        here.write("two")
        assert here.written() == ["two"]
        assert ran == []

    def test_costs_no_round_trip(self, here: Site) -> None:
        proxy = here.here
        here.read()
        sent = proxy.client_packets
        here.idle()
        here.read()
        here.idle()
        here.write("one")
        assert proxy.client_packets - sent == 2


class TestStatements:
    @pytest.mark.parametrize("kind", CUTS)
    def test_read(self, here: Site, kind: str) -> None:
        here.sql("SELECT 1")
        here.cut(kind)
        assert here.sql("SELECT 42") == [(42,)]
        assert len(here.replayed()) == 1
        assert len(here.losses()) == 1

    def test_percent_sign_of_a_read_is_no_placeholder(self, here: Site) -> None:
        here.write("one")
        here.write("two")
        close_old_connections()
        here.cut("before")
        found = here.sql("SELECT value FROM app_token WHERE value LIKE 'o%' AND 7 % 4 = 3")
        assert found == [("one",)]
        assert len(here.replayed()) == 1

    @pytest.mark.parametrize("kind", CUTS)
    def test_write(self, here: Site, kind: str) -> None:
        """It may have run: the error is raised, once, and the next statement is fine."""
        here.sql("SELECT 1")
        here.cut(kind)
        with pytest.raises(OperationalError):
            here.write("one")
        assert here.written() == ([] if kind == "before" else ["one"])
        here.write("two")
        assert here.written()[-1:] == ["two"]
        assert not here.replayed()

    @pytest.mark.parametrize("kind", CUTS)
    def test_caught_inside_the_block(self, here: Site, kind: str) -> None:
        """The application goes on in the block: on nothing, to no effect, until it has left it."""
        here.sql("SELECT 1")
        here.cut(kind, 3)
        with pytest.raises(Error), transaction.atomic(here.connection.alias):
            here.write("one")
            with pytest.raises(OperationalError):
                here.write("two")
            here.write("three")
        assert here.written() == []
        here.write("four")
        assert here.written() == ["four"]


def two_writes(here: Site) -> None:
    here.write("one")
    here.write("two")


def write_and_read(here: Site) -> None:
    here.write("one")
    here.read()


def read_first(here: Site) -> None:
    here.read()
    write_and_block(here)


def write_and_block(here: Site) -> None:
    here.write("one")
    with transaction.atomic(here.connection.alias):
        here.write("two")


def block_first(here: Site) -> None:
    with transaction.atomic(here.connection.alias):
        here.write("one")
    here.write("two")


def read_in_a_nested_block(here: Site) -> None:
    with transaction.atomic(here.connection.alias):
        with transaction.atomic(here.connection.alias):
            here.read()
            here.write("one")
        with pytest.raises(KeyError), transaction.atomic(here.connection.alias):
            here.write("never")
            raise KeyError
    here.write("two")


@pytest.mark.parametrize("kind", CUTS)
class TestTransactions:
    @pytest.mark.parametrize(
        ("work", "nth", "lost"),
        [
            # psycopg sends it with the first statement.
            (two_writes, 1, "BEGIN"),
            (two_writes, 2, "statement"),
            (read_first, 2, "statement"),
            # Django's own savepoints use up no first statement; they are made again.
            (block_first, 2, "SAVEPOINT"),
            (read_in_a_nested_block, 4, "statement"),
        ],
    )
    def test_one_in_which_nothing_has_happened_goes_on(
        self, here: Site, kind: str, work: Callable[[Site], None], nth: int, lost: str
    ) -> None:
        here.sql("SELECT 1")
        here.cut(kind, nth)
        with transaction.atomic(here.connection.alias):
            work(here)
        assert here.written() == ["one", "two"]
        is_statement = lost == "statement" or (lost == "BEGIN" and not here.is_mysql)
        assert len(here.replayed()) == is_statement
        here.write("three")
        assert here.written() == ["one", "two", "three"]

    @pytest.mark.parametrize("work", [two_writes, write_and_read, write_and_block])
    def test_after_its_first_write_it_fails(
        self, here: Site, kind: str, work: Callable[[Site], None]
    ) -> None:
        here.sql("SELECT 1")
        ran: list[int] = []
        here.cut(kind, 3)
        with pytest.raises(OperationalError), transaction.atomic(here.connection.alias):
            transaction.on_commit(lambda: ran.append(1), here.connection.alias)
            work(here)
        assert here.written() == []
        assert here.connection.in_atomic_block is False
        here.write("three")
        assert here.written() == ["three"]
        assert ran == []
        assert not here.replayed()

    def test_commit(self, here: Site, kind: str) -> None:
        ran: list[int] = []
        here.sql("SELECT 1")
        here.cut(kind, 3)
        with pytest.raises(CommitOutcomeUnknown), transaction.atomic(here.connection.alias):
            transaction.on_commit(lambda: ran.append(1), here.connection.alias)
            here.write("one")
        assert here.written() == ([] if kind == "before" else ["one"])
        assert ran == []
        here.write("two")
        assert here.written()[-1:] == ["two"]
        assert ran == []

    # psycopg sends nothing there.
    @pytest.mark.parametrize("here", ["mariadb", "mariadb_tls"], indirect=True)
    def test_after_commit(self, here: Site, kind: str) -> None:
        """COMMIT was answered: what comes after it is no error, and the hooks run once."""
        ran: list[int] = []
        here.sql("SELECT 1")
        here.cut(kind, 4)
        with transaction.atomic(here.connection.alias):
            transaction.on_commit(lambda: ran.append(1), here.connection.alias)
            here.write("one")
        assert ran == [1]
        assert here.written() == ["one"]
        here.write("two")
        assert here.written() == ["one", "two"]
        assert ran == [1]

    def test_rollback(self, here: Site, kind: str) -> None:
        """The application's own exception comes out, and nothing was written."""
        here.sql("SELECT 1")
        here.cut(kind, 3)
        with pytest.raises(KeyError), transaction.atomic(here.connection.alias):
            here.write("one")
            raise KeyError
        assert here.written() == []
        here.write("two")
        assert here.written() == ["two"]
