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
from django.utils.safestring import SafeString

from django_proxysql.core.parameters import VALUES, are_small, are_values, may_be_sql
from tests.test_replay import run_script


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


def test_psycopg2s_sql_in_a_parameter(postgres: Any) -> None:
    """AsIs and a registered adapter: never run again, and what they may have taken is state."""
    script = f"""
import sys
sys.modules["psycopg"] = None
import django; django.setup()
from django.db.utils import Error
from psycopg2.extensions import AsIs, register_adapter
from tests.engine import POSTGRESQL, engine, mysql_peer
class Server:
    host, port = {postgres.host!r}, {postgres.port!r}
class Own(str): pass
register_adapter(Own, lambda value: AsIs(str(value)))
with engine([mysql_peer(Server)], PEER_ENGINE=POSTGRESQL, CONN_MAX_AGE=None) as connection:
    def sql(text, params=None):
        with connection.cursor() as cursor:
            cursor.execute(text, params)
            return cursor.fetchall()
    for parameter in (AsIs("pg_terminate_backend(pg_backend_pid())"),
                      Own("pg_terminate_backend(pg_backend_pid())")):
        connection.close()
        try:
            sql("SELECT %s", [parameter]); print("saved")
        except Error:
            print("raised")
    connection.close()
    for parameter in (AsIs("pg_advisory_lock(7)"), Own("pg_advisory_lock(7)")):
        sql("SELECT %s", [parameter])
        print("held" if connection._session.holds else "free")
        connection.close()
    sql("SELECT %s, %s, %s", ["a", 1, [1, 2]])
    print("held" if connection._session.holds else "free")
    with connection.cursor() as cursor:
        cursor.executemany("SELECT %s", [["a"], ["b"]])
        print("held" if connection._session.holds else "free")
        cursor.executemany("SELECT %s", [["a"], [AsIs("pg_advisory_lock(7)")]])
        print("held" if connection._session.holds else "free")
    connection.close()
    # A type that is given an adapter later is another one to the next connection.
    class Later(str): pass
    sql("SELECT %s", [Later("a")])
    print("held" if connection._session.holds else "free")
    connection.close()
    register_adapter(Later, lambda value: AsIs(str(value)))
    sql("SELECT %s", [Later("pg_advisory_lock(7)")])
    print("held" if connection._session.holds else "free")
"""
    done = run_script(script)
    found = done.stdout.split()
    assert found[:5] == ["raised", "raised", "held", "held", "free"], done.stderr
    assert found[5:] == ["free", "held", "free", "held"], done.stderr
