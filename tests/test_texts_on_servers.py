"""What real servers make of what a text is taken for, and what Django's own texts are taken for."""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from django.db import connections, models, transaction
from django.db.models import Avg, Case, Count, Exists, F, Max, OuterRef, Q, Subquery, Sum, Value
from django.db.models import functions as f
from django.test.utils import isolate_apps
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from django_proxysql.core.statements import READ, SCOPED, STATE, scan
from django_proxysql.core.texts import Text, text_of
from tests.engine import MYSQL, POSTGRESQL, added, mysql_peer
from tests.test_texts import NOT_READS, READS, SHARDS, WORDS


@contextlib.contextmanager
def plainly(server: Any, alias: str) -> Iterator[Any]:
    """Django's own connection to a server."""
    path = POSTGRESQL if alias == "postgres" else MYSQL
    with added({alias: {"ENGINE": path, **mysql_peer(server)}}):
        yield connections[alias]
        connections[alias].close()


@dataclass
class Victim:
    """A server on which a statement shows if it does more than read."""

    connection: Any
    modes: list[str]
    questions: list[str]

    def run(self, sql: str) -> list[str]:
        """Run the statement twice in every mode; return what it ended with in each."""
        return [self._run_twice(sql, mode) for mode in self.modes]

    def _run_twice(self, sql: str, mode: str) -> str:
        outcome = "done"
        with self.connection.cursor() as cursor:
            cursor.execute(mode)
        for _ in range(2):
            driver = self.connection.connection.cursor()
            try:
                driver.execute(sql)
                with contextlib.suppress(self.connection.Database.Error):
                    driver.fetchall()
                while getattr(driver, "nextset", lambda: None)():
                    outcome = "several results"
            except Exception as exc:
                outcome = str(exc)
            finally:
                driver.close()
        return outcome

    def state(self) -> list[Any]:
        questions = ["SELECT COUNT(*), MAX(a) FROM z", "SELECT COUNT(*) FROM written"]
        rows: list[Any] = []
        with self.connection.cursor() as cursor:
            if self.connection.vendor == "mysql":
                cursor.execute("SET sql_mode = ''")
            for question in [*questions, *self.questions]:
                cursor.execute(question)
                rows += cursor.fetchall()
        return rows


#: Functions that write, under names that a careless reader takes for others.
EVIL = ["evil", "count", "xor", "like", "key", "array", "value", "text", "over"]


@pytest.fixture
def maria(mariadb: Any) -> Iterator[Victim]:
    with plainly(mariadb, "mariadb") as connection, connection.cursor() as cursor:
        for sql in (
            *("CREATE OR REPLACE TABLE t (a int, b int)", "CREATE OR REPLACE TABLE z (a int)"),
            *("CREATE OR REPLACE TABLE written (a int)", "CREATE OR REPLACE SEQUENCE s1 NOCACHE"),
            *("INSERT INTO t VALUES (1, 2)", "INSERT INTO z VALUES (1)"),
        ):
            cursor.execute(sql)
        for name in EVIL:
            cursor.execute(
                f"CREATE OR REPLACE FUNCTION `{name}` ({'' if name == 'evil' else 'a int'})"
                " RETURNS int BEGIN INSERT INTO written VALUES (1); RETURN 1; END"
            )
        modes = ("", "ANSI_QUOTES", "NO_BACKSLASH_ESCAPES", "ORACLE", "IGNORE_SPACE")
        yield Victim(
            connection,
            [f"SET sql_mode = '{mode}'" for mode in modes],
            [
                "SELECT next_not_cached_value FROM s1",
                "SELECT IS_USED_LOCK('x'), @x",
                "SELECT COUNT(*) FROM information_schema.tables WHERE table_schema = DATABASE()",
            ],
        )
        for name in EVIL:
            cursor.execute(f"DROP FUNCTION IF EXISTS `{name}`")
        cursor.execute("DROP TABLE t, z, written")
        cursor.execute("DROP SEQUENCE s1")


@pytest.fixture
def postgresql(postgres: Any) -> Iterator[Victim]:
    with plainly(postgres, "postgres") as connection, connection.cursor() as cursor:
        cursor.execute(
            "DROP SCHEMA IF EXISTS other CASCADE; CREATE SCHEMA other;"
            "CREATE TABLE t (a int, b int); CREATE TABLE z (a int); CREATE TABLE written (a int);"
            "CREATE SEQUENCE s1; INSERT INTO t VALUES (1, 2); INSERT INTO z VALUES (1);"
        )
        for name in EVIL:
            # One of the name and the arguments of a server's own would be taken for it.
            for schema in ("other",) if name == "count" else ("public", "other"):
                cursor.execute(
                    f'CREATE FUNCTION {schema}."{name}"(a int DEFAULT 1) RETURNS int'
                    " LANGUAGE sql AS 'INSERT INTO written VALUES (1); SELECT 1'"
                )
        way = "SET standard_conforming_strings"
        yield Victim(
            connection,
            [f"{way} = on; SET backslash_quote = on", f"{way} = off; SET backslash_quote = on"],
            [
                "SELECT last_value, is_called FROM s1",
                "SELECT COUNT(*) FROM pg_locks WHERE locktype = 'advisory'",
                "SELECT COUNT(*) FROM pg_class",
            ],
        )
        for name in EVIL:
            cursor.execute(f'DROP FUNCTION IF EXISTS public."{name}"(int)')
        cursor.execute("DROP SCHEMA other CASCADE; DROP TABLE t, z, written; DROP SEQUENCE s1")


@pytest.fixture(params=["maria", "postgresql"])
def victim(request: Any) -> Any:
    return request.getfixturevalue(request.param)


@pytest.mark.server
class TestOnServers:
    def test_the_victim_notices(self, victim: Victim) -> None:
        sequence = "s1" if victim.connection.vendor == "mysql" else "'s1'"
        for sql in (
            *("SELECT evil()", "SELECT 1; DELETE FROM z WHERE 1 = 1"),
            *("INSERT INTO z VALUES (7)", f"SELECT nextval({sequence})"),
        ):
            before = victim.state()
            victim.run(sql)
            assert victim.state() != before, sql

    def test_what_is_said_to_read_only_reads(self, victim: Victim) -> None:
        before = victim.state()
        done = 0
        for sql in [*READS, *NOT_READS]:
            if text_of(sql, None) is Text.READ and "%" not in sql:
                done += "done" in victim.run(sql)
                assert victim.state() == before, sql
        assert done >= 8

    def test_random_statements_that_are_said_to_read_only_read(self, victim: Victim) -> None:
        before = victim.state()
        outcomes: dict[str, int] = {}

        any_pieces = st.tuples(st.sampled_from(WORDS + SHARDS), st.sampled_from(["", " "]))
        heads = ["SELECT ", "SELECT 1, ", "SELECT a FROM t WHERE 1 = ", "EXPLAIN SELECT "]

        unhurried = {"deadline": None, "suppress_health_check": list(HealthCheck)}

        @settings(max_examples=800, database=None, **unhurried)
        @given(st.lists(any_pieces, max_size=5), st.sampled_from(heads))
        def tried(pieces: list[tuple[str, str]], head: str) -> None:
            sql = head + "".join(piece + space for piece, space in pieces)
            if text_of(sql, None) is Text.READ and "%s" not in sql:
                for outcome in victim.run(sql):
                    outcomes[outcome[:4]] = outcomes.get(outcome[:4], 0) + 1
                    assert outcome != "several results", sql
                assert victim.state() == before, sql

        tried()
        assert outcomes["done"] > 10


# What Django writes


def made_models() -> tuple[Any, Any]:
    with isolate_apps("tests.app"):

        class Author(models.Model):
            name = models.CharField(max_length=100)
            born = models.DateField()
            joined = models.DateTimeField()

            class Meta:
                app_label = "app"
                db_table = "statements_author"

        class Book(models.Model):
            author = models.ForeignKey(Author, models.CASCADE, related_name="books")
            title = models.CharField(max_length=100, unique=True)
            price = models.DecimalField(max_digits=8, decimal_places=2)
            published = models.DateTimeField()
            pages = models.IntegerField(null=True)
            data = models.JSONField(default=dict)

            class Meta:
                app_label = "app"
                db_table = "statements_book"

    return Author, Book


class Library:
    def __init__(self, connection: Any) -> None:
        self.connection = connection
        self.alias = connection.alias
        self.author, self.book = made_models()
        self.authors = self.author._default_manager.using(self.alias)
        self.books = self.book._default_manager.using(self.alias)

    def texts_of(self, work: Any) -> list[str]:
        """Return the statements, as the cursor gets them, of a queryset or of a function."""
        texts: list[str] = []

        def noted(execute: Any, sql: str, params: Any, many: bool, context: Any) -> Any:
            texts.append(sql)
            return execute(sql, params, many, context)

        with self.connection.execute_wrapper(noted):
            work() if callable(work) and not hasattr(work, "query") else list(work)
        return [sql for sql in texts if "SAVEPOINT" not in sql]


@pytest.fixture(params=["mariadb", "postgres"])
def library(request: Any) -> Iterator[Library]:
    server = request.getfixturevalue(request.param)
    with plainly(server, request.param) as connection:
        here = Library(connection)
        with connection.schema_editor() as editor:
            editor.create_model(here.author)
            editor.create_model(here.book)
        now = datetime.datetime(2024, 2, 29, 12, 30, tzinfo=datetime.timezone.utc)
        author = here.authors.create(name="Ada", born=now.date(), joined=now)
        for number in range(3):
            here.books.create(
                author=author, title=f"Book {number}", price=number, published=now, pages=number
            )
        yield here
        with connection.schema_editor() as editor:
            editor.delete_model(here.book)
            editor.delete_model(here.author)


def reads(here: Library) -> dict[str, Any]:
    authors, books = here.authors, here.books
    of_author = books.filter(author=OuterRef("pk"))
    found: dict[str, Any] = {
        "all": books.all(),
        "join": books.select_related("author").filter(author__name="Ada"),
        "outer join": authors.filter(Q(books__title="x") | Q(name="Ada")).distinct(),
        "exclude": authors.exclude(books__title="x"),
        "annotate": authors.annotate(n=Count("books"), most=Max("books__price")).filter(n__gt=1),
        "distinct count": authors.annotate(n=Count("books__title", distinct=True)),
        "filtered": authors.annotate(n=Sum("books__price", filter=Q(books__pages__gt=1))),
        "aggregate": lambda: books.aggregate(Sum("price"), Avg("pages"), n=Count("*")),
        "count": books.filter(pages__gt=1).count,
        "exists": books.filter(pages__gt=1).exists,
        "explain": books.explain,
        "first": books.order_by("-price").first,
        "in_bulk": lambda: books.in_bulk([1, 2]),
        "prefetch": authors.prefetch_related("books"),
        "case": books.annotate(
            kind=Case(
                *(
                    models.When(pages__lt=100, then=Value("short")),
                    models.When(Q(pages__gte=100) & ~Q(title=""), then=Value("long")),
                ),
                default=Value("none"),
                output_field=models.CharField(),
            )
        ),
        "Exists": authors.annotate(has=Exists(of_author)).filter(has=True),
        "Subquery": authors.annotate(last=Subquery(of_author.order_by("-pk").values("title")[:1])),
        "in subquery": books.filter(author__in=authors.filter(name="Ada")),
        "values": books.values("author").annotate(n=Count("pk")).order_by("-n"),
        "values_list": books.values_list("title", flat=True).distinct(),
        "union": books.filter(pages=1).union(books.filter(pages=2), all=True).order_by("title"),
        "F": books.annotate(x=(F("price") + 1) * 2 - F("pages") / 3, y=F("pages") % 2),
        "range": books.filter(price__range=(1, 2), pages__isnull=False),
        "5,000 values": books.filter(pages__in=list(range(5_000))),
        "slice": books.order_by("title")[1:3],
        "iterator": lambda: list(books.order_by("pk").iterator()),
        "strings": books.annotate(
            a=f.Lower("title"), b=f.Concat("title", Value("FOR; --"), "author__name")
        ).filter(a__startswith="b"),
        "more strings": books.annotate(
            a=f.Substr("title", 2, 3), b=f.Length("title"), c=f.StrIndex("title", Value("o"))
        ),
        "numbers": books.annotate(a=f.Greatest("pages", 3), b=f.Coalesce("pages", 0)),
        "cast": books.annotate(
            a=f.Cast("pages", models.CharField(max_length=10)),
            b=f.Cast("price", models.IntegerField()),
            c=f.Cast("published", models.DateField()),
            e=f.Cast("pages", models.DecimalField(max_digits=5, decimal_places=2)),
            g=f.Cast("published", models.DateTimeField()),
        ),
        "window": books.annotate(
            r=models.Window(f.RowNumber(), partition_by=[F("author")], order_by=F("price").desc())
        ),
        "dates": books.filter(
            published__year=2024,
            published__month=2,
            published__week_day=5,
            published__date=datetime.date(2024, 2, 29),
            published__hour__gte=1,
            published__quarter=1,
        ),
        "extract": books.annotate(
            a=f.ExtractWeek("published"),
            b=f.ExtractIsoYear("published"),
            c=f.ExtractDay("published"),
        ),
        "now": books.filter(published__lt=f.Now()),
        "interval": books.annotate(a=F("published") + datetime.timedelta(days=2, hours=3)),
        "durations": books.annotate(
            a=models.ExpressionWrapper(
                F("published") - F("author__joined"), output_field=models.DurationField()
            )
        ),
        "random": books.order_by("?"),
        "dates()": books.datetimes("published", "month"),
        "hash": books.annotate(a=f.MD5("title"), b=f.Left("title", 2), c=f.Repeat("title", 2)),
        "replace": books.annotate(a=f.Replace("title", Value("Book"), Value("Buch"))),
        "round": books.annotate(a=f.Round("price"), b=f.Sqrt("price"), c=f.Mod("pages", 2)),
        "json": books.filter(
            data__a="b", data__c__0__d=1, data__has_key="e", data__has_any_keys=["f", "g"]
        ),
        "json values": books.values("data__a__b").order_by("data__a"),
        "json isnull": books.filter(data__a__isnull=True),
        "json in": books.filter(data__a__in=[1, "x"]),
        "json text": books.filter(data__a__icontains="x", data__n__gt=3),
        "collate": books.order_by(
            f.Collate("title", "utf8mb4_bin" if here.alias == "mariadb" else "C")
        ),
        "alias": books.alias(n=F("pages")).filter(n__gt=0),
        "xor": books.filter(Q(pages=1) ^ Q(price=2) ^ Q(title="a")),
        "none of many": books.filter(~Q(title__in=["a", "b"]), ~Q(pages=1) | Q(price__gt=3)),
    }
    for lookup in ("exact", "iexact", "contains", "icontains", "startswith", "iendswith", "regex"):
        found[lookup] = books.filter(**{f"title__{lookup}": "Book%_'; DELETE --"})
    for kind in ("year", "quarter", "month", "week", "day", "hour", "minute"):
        found[f"trunc {kind}"] = books.annotate(a=f.Trunc("published", kind))
    found["trunc time"] = books.annotate(a=f.TruncTime("published"), b=f.TruncDate("published"))
    if here.alias == "postgres":
        found |= _of_postgresql(books)
    return found


def _of_postgresql(books: Any) -> dict[str, Any]:
    from django.contrib.postgres.aggregates import ArrayAgg, BoolAnd
    from django.contrib.postgres.search import SearchQuery, SearchRank, SearchVector

    if hasattr(models, "StringAgg"):
        StringAgg = models.StringAgg
    else:
        from django.contrib.postgres.aggregates import StringAgg
    vector, query = SearchVector("title", weight="A"), SearchQuery("book")
    return {
        "search": books.annotate(s=vector).filter(s=query),
        "search config": books.annotate(s=SearchVector("title", config="english")).filter(
            s=SearchQuery("book", config="english")
        ),
        "rank": books.annotate(r=SearchRank(vector, query)).order_by("-r"),
        "distinct on": books.order_by("author", "title").distinct("author"),
        "array_agg": books.values("author").annotate(
            a=ArrayAgg("title"), b=StringAgg("title", Value(", ")), c=BoolAnd(Q(pages__gt=1))
        ),
    }


@pytest.mark.server
class TestWhatDjangoWrites:
    def test_reads(self, library: Library) -> None:
        refused = {}
        number = 0
        for name, work in reads(library).items():
            texts = library.texts_of(work)
            assert texts, name
            number += len(texts)
            for sql in texts:
                assert scan(sql) == READ, sql
                if text_of(sql, None) is not Text.READ:
                    refused[name] = sql[:2_000]
        assert number > 60
        # What Django writes with backslashes is read differently in the modes of sql_mode.
        assert not {name: sql for name, sql in refused.items() if "\\" not in sql}

    def test_locking_reads(self, library: Library) -> None:
        books = library.books
        works = [books.select_for_update(), books.select_for_update(skip_locked=True)]
        if library.connection.features.has_select_for_update_of:
            works += [books.select_related("author").select_for_update(of=("self",))]
        for work in works:
            with transaction.atomic(library.alias):
                (sql,) = library.texts_of(work)
            assert "FOR UPDATE" in sql
            assert text_of(sql, None) is Text.LOCKING
            assert scan(sql) == READ

    def test_writes(self, library: Library) -> None:
        book, books = library.books.first(), library.books
        values = {"author": book.author, "price": 1, "published": book.published}

        def new(title: str) -> Any:
            return library.book(title=title, **values)

        works: list[Any] = [
            lambda: new("a").save(using=library.alias),
            lambda: book.save(using=library.alias),
            lambda: books.bulk_create([new("b"), new("c")]),
            lambda: books.bulk_update([book], ["title", "pages"]),
            lambda: books.update(pages=F("pages") + 1),
            lambda: books.filter(title="a").update(title=f.Concat("title", Value("b"))),
            lambda: books.filter(author__name="x").update(pages=2),
            lambda: books.filter(title="ab").delete(),
            lambda: books.get_or_create(title="z", defaults=values),
            lambda: books.update_or_create(title="z", defaults={"pages": 5}),
            lambda: books.bulk_create([new("b")], ignore_conflicts=True),
            lambda: books.bulk_create(
                [new("b")],
                update_conflicts=True,
                update_fields=["pages"],
                unique_fields=["title"] if library.alias == "postgres" else None,
            ),
        ]
        written = 0
        for work in works:
            for sql in library.texts_of(work):
                assert not scan(sql) & (STATE | SCOPED), sql
                if not sql.startswith("SELECT"):
                    written += 1
                    assert text_of(sql, None) is Text.PLAIN, sql
        assert written >= 10
