"""What becomes of a connection that is lost, at the byte where it is lost."""

from __future__ import annotations

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
    def test_first_read_of_a_transaction(self, here: Site, kind: str) -> None:
        here.sql("SELECT 1")
        here.cut(kind, 2)
        with transaction.atomic(here.connection.alias):
            here.read()
            here.write("one")
            with transaction.atomic(here.connection.alias):
                here.write("two")
        assert here.written() == ["one", "two"]
        assert len(here.replayed()) == 1

    @pytest.mark.parametrize("kind", CUTS)
    def test_first_write_of_a_transaction(self, here: Site, kind: str) -> None:
        here.sql("SELECT 1")
        here.cut(kind, 2)

        def work() -> None:
            with transaction.atomic(here.connection.alias):
                here.write("one")
                here.write("two")

        work()
        assert here.written() == ["one", "two"]
        assert len(here.replayed()) == 1
        here.write("three")
        assert here.written()[-1:] == ["three"]

    @pytest.mark.parametrize("kind", CUTS)
    @pytest.mark.parametrize("second", ["read", "write"])
    def test_second_statement_of_a_transaction(self, here: Site, kind: str, second: str) -> None:
        here.sql("SELECT 1")
        ran: list[int] = []
        here.cut(kind, 3)
        with pytest.raises(OperationalError), transaction.atomic(here.connection.alias):
            transaction.on_commit(lambda: ran.append(1), here.connection.alias)
            here.write("one")
            if second == "read":
                here.read()
            else:
                here.write("two")
        assert here.written() == []
        assert here.connection.in_atomic_block is False
        here.write("three")
        assert here.written() == ["three"]
        assert ran == []
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


class TestTransactions:
    @pytest.mark.parametrize("kind", CUTS)
    def test_begin(self, here: Site, kind: str) -> None:
        here.sql("SELECT 1")
        here.cut(kind, 1)
        with transaction.atomic(here.connection.alias):
            here.write("one")
            here.write("two")
        assert here.written() == ["one", "two"]

    @pytest.mark.parametrize("kind", CUTS)
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
    @pytest.mark.parametrize("kind", CUTS)
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

    @pytest.mark.parametrize("kind", CUTS)
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

    @pytest.mark.parametrize("kind", CUTS)
    def test_savepoint_before_anything_else(self, here: Site, kind: str) -> None:
        here.sql("SELECT 1")
        here.cut(kind, 2)
        with transaction.atomic(here.connection.alias):
            with transaction.atomic(here.connection.alias):
                here.write("one")
            here.write("two")
        assert here.written() == ["one", "two"]

    @pytest.mark.parametrize("kind", CUTS)
    def test_read_in_a_nested_block(self, here: Site, kind: str) -> None:
        """Django's own savepoints use up no first statement; they are made again."""
        here.sql("SELECT 1")
        here.cut(kind, 4)
        with transaction.atomic(here.connection.alias):
            with transaction.atomic(here.connection.alias):
                with transaction.atomic(here.connection.alias):
                    here.read()
                    here.write("one")
                with pytest.raises(KeyError), transaction.atomic(here.connection.alias):
                    here.write("never")
                    raise KeyError
            here.write("two")
        assert here.written() == ["one", "two"]

    @pytest.mark.parametrize("kind", CUTS)
    def test_savepoint_after_a_write(self, here: Site, kind: str) -> None:
        here.sql("SELECT 1")
        here.cut(kind, 3)
        with pytest.raises(OperationalError), transaction.atomic(here.connection.alias):
            here.write("one")
            with transaction.atomic(here.connection.alias):
                here.write("two")
        assert here.written() == []
        here.write("three")
        assert here.written() == ["three"]
