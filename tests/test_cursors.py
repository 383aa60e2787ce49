"""Cursors, iterators and their neighbours over a connection that is lost."""

from __future__ import annotations

import gc
from typing import Any

import pytest
from django.db import OperationalError, connection, reset_queries, transaction
from django.test import override_settings
from django.test.utils import CaptureQueriesContext

from tests.app.models import Token
from tests.site import Site


def tokens(here: Site) -> Any:
    return Token.objects.using(here.connection.alias)


def fill(here: Site, number: int) -> None:
    tokens(here).bulk_create(Token(value=f"{i:05}") for i in range(number))


class TestCursors:
    def test_one_cursor_for_long(self, here: Site) -> None:
        """A cursor that is kept is bound to the connection at each execute."""
        with here.connection.cursor() as cursor:
            cursor.execute("INSERT INTO app_token (value) VALUES ('one')")
            for value in ("two", "three"):
                here.kill()
                cursor.execute("INSERT INTO app_token (value) VALUES (%s)", [value])
                assert cursor.rowcount == 1
            here.kill()
            here.idle()
            cursor.execute("SELECT value FROM app_token ORDER BY id")
            assert [row[0] for row in cursor] == ["one", "two", "three"]
        assert len(here.replaced()) == 3

    def test_rows_that_were_fetched_already(self, here: Site) -> None:
        """A replacement by one cursor leaves another's buffered rows alone."""
        fill(here, 10)
        with here.connection.cursor() as first, here.connection.cursor() as second:
            first.execute("SELECT value FROM app_token ORDER BY id")
            assert first.fetchone() == ("00000",)
            here.connection.peer.breaker.open()
            here.session.wrote = False
            second.execute("SELECT 1")
            assert here.replaced()
            assert first.fetchone() == ("00001",)
            assert len(first.fetchall()) == 8

    def test_lastrowid(self, here: Site) -> None:
        here.write("one")
        here.kill()
        created = tokens(here).create(value="two")
        assert tokens(here).get(pk=created.pk).value == "two"

    def test_a_statement_is_one_to_its_onlookers(self, here: Site) -> None:
        """execute_wrapper and the query log see a statement that was run twice as one.

        (And what Django sends on each new connection, as with any connect.)
        """
        here.sql("SELECT 1")
        seen: list[str] = []

        def onlooker(execute: Any, sql: str, params: Any, many: bool, context: Any) -> Any:
            seen.append(sql)
            return execute(sql, params, many, context)

        here.cut("after")
        with here.connection.execute_wrapper(onlooker):
            assert here.sql("SELECT 42") == [(42,)]
        assert seen.count("SELECT 42") == 1
        assert here.replayed()
        here.cut("after")
        with CaptureQueriesContext(here.connection) as captured:
            assert here.sql("SELECT 42") == [(42,)]
        assert [query["sql"] for query in captured].count("SELECT 42") == 1
        assert len(here.replayed()) == 2

    @override_settings(DEBUG=True)
    def test_debug_cursor(self, here: Site) -> None:
        reset_queries()
        here.kill()
        here.write("one")
        here.cut("after")
        assert here.read() == ["one"]
        sent = [query["sql"] for query in here.connection.queries]
        assert len([sql for sql in sent if "app_token" in sql]) == 2
        assert connection.queries == []

    def test_many_rows(self, here: Site) -> None:
        """Cut in the middle of a long reply: run again from its beginning, not from there."""
        fill(here, 5000)
        here.here.cut_reply(20_000)
        assert len(here.read()) == 5000
        assert here.here.cuts == 0 or here.replayed()

    def test_params_that_are_used_up_are_not_sent_twice(self, on_mariadb: Site) -> None:
        with on_mariadb.connection.cursor() as cursor:
            on_mariadb.cut("after")
            with pytest.raises(OperationalError):
                cursor.execute("SELECT %s", iter(["one"]))
            cursor.execute("SELECT %s", ["two"])
            assert cursor.fetchall() == (("two",),)


class TestOrm:
    def test_iterator_with_saves(self, here: Site) -> None:
        fill(here, 10)
        for number, token in enumerate(tokens(here).order_by("pk").iterator(chunk_size=3)):
            if number == 5 and here.is_mysql:
                # The rows are here already: what follows is a statement of its own.
                here.kill()
            token.value = f"{token.value}!"
            token.save()
        assert len(here.written()) == 10
        assert all(value.endswith("!") for value in here.written())

    def test_iterator_that_is_cut(self, here: Site) -> None:
        """A server-side cursor cannot go on elsewhere: an error, then a good connection."""
        fill(here, 100)
        rows = tokens(here).order_by("pk").iterator(chunk_size=10)
        assert next(rows).value == "00000"
        here.kill()
        if here.is_mysql:
            assert len(list(rows)) == 99
        else:
            with pytest.raises(OperationalError):
                list(rows)
            assert not here.replayed()
        assert tokens(here).count() == 100
        here.write("after")
        assert len(here.written()) == 101

    def test_named_cursor_keeps_its_connection(self, on_postgres: Site) -> None:
        """Nor is what it reads left for another peer because a circuit has opened."""
        here = on_postgres
        fill(here, 100)
        here.session.wrote = False
        rows = tokens(here).order_by("pk").iterator(chunk_size=10)
        assert next(rows).value == "00000"
        name = here.connection.peer.name
        here.connection.peer.breaker.open()
        tokens(here).count()
        assert here.connection.peer.name == name
        assert len(list(rows)) == 99
        del rows
        tokens(here).count()
        assert here.connection.peer.name != name

    def test_what_comes_after_a_loss_is_done_once(self, here: Site) -> None:
        for _ in range(2):
            here.kill_idle()
            tokens(here).get_or_create(value="one")
        assert here.written() == ["one"]
        here.kill()
        tokens(here).update_or_create(value="one", defaults={"value": "two"})
        assert here.written() == ["two"]
        here.kill()
        assert tokens(here).filter(value="two").delete()[0] == 1


class TestPsycopg:
    def test_copy_is_never_run_again(self, on_postgres: Site) -> None:
        here = on_postgres
        here.kill()
        here.idle()
        with here.connection.cursor() as cursor, pytest.raises(Exception, match=r"closed|terminat"):  # noqa: SIM117
            with cursor.copy("COPY app_token (value) FROM STDIN") as copy:
                copy.write_row(["one"])
        assert here.written() == []
        here.write("two")
        assert here.written() == ["two"]

    @pytest.mark.parametrize("in_block", [False, True])
    def test_pipeline(self, on_postgres: Site, in_block: bool) -> None:
        """An error there may be an earlier statement's: a read hides no lost write."""
        here = on_postgres

        def work() -> None:
            with here.connection.connection.pipeline():
                here.cut("before")
                here.write("one")
                # Noticed here, or at the pipeline's end.
                here.sql("SELECT 42")

        here.sql("SELECT 1")
        with pytest.raises(Exception, match=r"connection"):
            if in_block:
                with transaction.atomic(here.connection.alias):
                    work()
            else:
                work()
        assert here.written() == []
        assert not here.replayed()
        try:
            here.write("two")
        except OperationalError:
            # The pipeline's end may raise the loss past every hook: then it is raised here.
            here.write("two")
        assert here.written() == ["two"]


@pytest.mark.filterwarnings("ignore:.*was deleted while still open:ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_server_side_cursor_goes_with_its_last_reference(on_postgres: Site) -> None:
    """No cycle keeps it, and with it the connection, until the garbage collector comes."""
    with transaction.atomic(on_postgres.connection.alias):
        cursor = on_postgres.connection.chunked_cursor()
        cursor.execute("SELECT 1")
        assert on_postgres.session.server_side
        gc.disable()
        try:
            del cursor
            assert not on_postgres.session.server_side
        finally:
            gc.enable()
