"""Which parameters are values, and which may be SQL: by the drivers' own rules."""

from __future__ import annotations

import datetime
import decimal
import enum
import ipaddress
import uuid
from typing import Any

import pytest
from django.db.models import TextChoices
from django.db.utils import Error
from django.utils.safestring import SafeString

from django_proxysql.core.parameters import VALUES, are_small, are_values, may_be_sql
from tests.other_driver import DRIVER, run_again
from tests.site import Site


class Status(TextChoices):
    OPEN = "open"


class Number(enum.IntEnum):
    ONE = 1


class Own(str):
    """A text whose adapter may be anybody's."""


class Conforming(str):
    def __conform__(self, protocol: Any) -> Any:
        return self


def usual(cls: type) -> bool:
    return True


def unusual(cls: type) -> bool:
    return False


VALUE = [
    *(None, True, 1, 1.5, "a", b"a", bytearray(b"a"), memoryview(b"a"), decimal.Decimal("1.5")),
    *(datetime.datetime(2020, 1, 1), datetime.date(2020, 1, 1), datetime.time(1)),
    *(datetime.timedelta(1), uuid.UUID(int=1), [1, "a", [2]], (1, None), Status.OPEN, Number.ONE),
    *(SafeString("a"), ipaddress.ip_address("10.0.0.1")),
]
NO_VALUE = [object(), Own("a"), Conforming("a"), {"a": 1}, {1}, iter([1]), [object()], (Own("a"),)]


def named(value: Any) -> str:
    """Return an id for a test that is the same in each process: no address."""
    return type(value).__name__


class TestValues:
    @pytest.mark.parametrize("value", VALUE, ids=named)
    def test_values_are_sent_again(self, value: Any) -> None:
        assert are_values([value], usual)
        assert are_values({"name": value}, usual)

    @pytest.mark.parametrize("value", NO_VALUE, ids=named)
    def test_whatever_may_be_sql_is_not(self, value: Any) -> None:
        assert not are_values([value], usual)
        assert not are_values({"name": value}, usual)

    @pytest.mark.parametrize("value", [*VALUE[:5], Status.OPEN, [1]], ids=named)
    def test_an_adapter_of_the_applications_own_is_anything(self, value: Any) -> None:
        assert not are_values([value], unusual)

    def test_an_iterator_is_used_up(self) -> None:
        assert not are_values(iter([1]), usual)
        assert not are_small(iter([1]))
        assert are_values(None, usual)

    def test_what_never_ends(self) -> None:
        endless: list[Any] = []
        endless.append(endless)
        assert not are_values(endless, usual)

    def test_psycopgs_own(self) -> None:
        pytest.importorskip("psycopg")
        from psycopg import sql
        from psycopg.types.json import Jsonb
        from psycopg.types.numeric import Int4
        from psycopg.types.range import Range

        assert are_values([Jsonb({"a": [1, None]}), Int4(1), Range(1, 2)], usual)
        assert not are_values([Jsonb(object())], usual)
        assert not are_values([Range(sql.SQL("pay()"), 2)], usual)
        for composed in (sql.SQL("pay()"), sql.Identifier("a"), sql.SQL("a").format()):
            assert not are_values([composed], usual)
            assert may_be_sql([composed], set(VALUES), usual)


class TestState:
    def test_values_hide_no_sql(self) -> None:
        for value in VALUE:
            assert not may_be_sql([value], set(VALUES), usual)
            assert not may_be_sql({"a": value}, set(VALUES), usual)

    def test_what_the_driver_does_not_quote_may(self) -> None:
        assert may_be_sql([Own("a")], set(VALUES), unusual)
        assert may_be_sql([[1, Own("a")]], set(VALUES), unusual)
        assert may_be_sql(iter([1]), set(VALUES), usual)

    def test_a_type_is_asked_about_once(self) -> None:
        known, asked = set(VALUES), []

        def is_usual(cls: type) -> bool:
            asked.append(cls)
            return True

        for _ in range(3):
            assert not may_be_sql([Own("a"), 1], known, is_usual)
        assert asked == [Own]


@pytest.mark.server
def test_sql_in_parameters_of_psycopg2(request: pytest.FixtureRequest) -> None:
    pytest.importorskip("psycopg2")
    run_again(f"{__file__}::test_of_psycopg2", "psycopg2", request, "postgres_pair")


@pytest.mark.skipif(DRIVER != "psycopg2", reason="of that driver")
def test_of_psycopg2(on_postgres: Site) -> None:
    """AsIs and a registered adapter: never run again, and what they may have taken is state."""
    from psycopg2.extensions import AsIs, register_adapter

    here = on_postgres

    def adapt(cls: type) -> None:
        register_adapter(cls, lambda value: AsIs(str(value)))

    def holds(statement: str, *rows: list[Any]) -> bool:
        with here.connection.cursor() as cursor:
            if len(rows) == 1:
                cursor.execute(statement, rows[0])
            else:
                cursor.executemany(statement, rows)
        return bool(here.session.holds)

    adapt(Own)
    lock, ends_itself = "pg_advisory_lock(7)", "pg_terminate_backend(pg_backend_pid())"
    for made in (AsIs, Own):
        here.connection.close()
        with pytest.raises(Error):
            here.sql("SELECT %s", [made(ends_itself)])
        here.connection.close()
        assert holds("SELECT %s", [made(lock)])
    assert not here.replayed()
    here.connection.close()
    assert not holds("SELECT %s, %s, %s", ["a", 1, [1, 2]])
    assert not holds("SELECT %s", ["a"], ["b"])
    assert holds("SELECT %s", ["a"], [AsIs(lock)])

    class Later(str):
        """A type that is given an adapter later is another one to the next connection."""

    here.connection.close()
    assert not holds("SELECT %s", [Later("a")])
    here.connection.close()
    adapt(Later)
    assert holds("SELECT %s", [Later(lock)])
