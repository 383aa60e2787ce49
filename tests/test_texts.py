"""What a text is for a replay: by a list for each dialect."""

from __future__ import annotations

from typing import Any

import pytest

from django_proxysql.core.texts import (
    Text,
    is_of_transaction,
    names_in,
    tells_time,
    text_of,
    with_parameters,
)

DIALECTS = ["mysql", "mariadb", "postgresql"]
EVERYWHERE = {
    Text.READ: ["SELECT a FROM t WHERE b = %s", "WITH a AS (SELECT 1) SELECT * FROM a"],
    Text.LOCKING: ["SELECT a FROM t FOR UPDATE", "SELECT a FROM t FOR UPDATE; "],
    Text.PLAIN: ["INSERT INTO t (a) VALUES (%s)", "UPDATE t SET a = 1 /* x */", "DELETE FROM t"],
    Text.SETTING: [
        *("SET work_mem = '5MB'", "SET SESSION a = 1", "SET NAMES 'utf8mb4'", "SET a TO b, c"),
        *("SET TIME ZONE 'UTC'", "SET @a = 1", "SET @@session.a = 1", "LISTEN a", 'UNLISTEN "a"'),
        *("PREPARE p FROM 'SELECT 1'", "PREPARE p (int) AS SELECT $1", "SET ROLE a;"),
    ],
    Text.OTHER: [
        *("SET GLOBAL a = 1", "SET @@global.a = 1", "SET PERSIST a = 1", "SET a = b()"),
        *("SET a = a + 1", "SET SESSION a = 1, GLOBAL b = 2", "SET autocommit = 0"),
        *("SET a = 1; DELETE FROM t", "SET PASSWORD = 'x'", "BEGIN", "CALL p()", "SELECT f()"),
        *("EXECUTE p", "SET SESSION autocommit = 0", "SET a = (SELECT 1)", "SET a = '%s'"),
        *("PREPARE TRANSACTION 'a'", "COPY t FROM STDIN", "LOCK TABLES t WRITE", ""),
    ],
}
OF_POSTGRESQL = {
    Text.SCHEMA: [
        *(
            "CREATE TABLE t (a varchar(10) DEFAULT now())",
            "ALTER TABLE t ADD b int",
            "DROP TABLE t",
        ),
        *("CREATE INDEX a ON t (b)", "TRUNCATE t", "COMMENT ON TABLE t IS 'x'"),
    ],
    Text.OF_TRANSACTION: [
        *("SELECT pg_advisory_xact_lock(%s)", "SELECT pg_try_advisory_xact_lock(1, 2)"),
        *("SET TRANSACTION ISOLATION LEVEL SERIALIZABLE", "SET LOCAL work_mem = '5MB'"),
        *("SET CONSTRAINTS ALL IMMEDIATE", "SET LOCAL search_path TO a, b"),
    ],
    Text.OTHER: [
        *("CREATE INDEX CONCURRENTLY a ON t (b)", "DROP DATABASE a", "CREATE SUBSCRIPTION a"),
        *("CREATE EXTENSION dblink", "CREATE FOREIGN TABLE t (a int) SERVER s", "VACUUM"),
        *("CREATE TABLE t (a int); DROP TABLE u", "SELECT pg_advisory_xact_lock(f())"),
        *("SELECT pg_advisory_lock(1)", "ALTER SYSTEM SET a = 1"),
    ],
}


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize(
    ("text", "sql"), [(text, sql) for text, several in EVERYWHERE.items() for sql in several]
)
def test_in_every_dialect(text: Text, sql: str, dialect: str) -> None:
    assert text_of(sql, dialect) is text
    assert text_of(sql.swapcase().replace("%S", "%s"), dialect) is text


@pytest.mark.parametrize(
    ("text", "sql"), [(text, sql) for text, several in OF_POSTGRESQL.items() for sql in several]
)
def test_of_postgresql(text: Text, sql: str) -> None:
    assert text_of(sql, "postgresql") is text
    assert text is not Text.SCHEMA or text_of(sql, "mysql") is Text.OTHER
    assert is_of_transaction(sql) is (text is Text.OF_TRANSACTION and sql.startswith("SET"))


@pytest.mark.parametrize("sql", [None, b"SELECT 1", 1, ["SELECT 1"]])
def test_anything_but_a_text(sql: object) -> None:
    assert text_of(sql, "postgresql") is Text.OTHER
    assert not is_of_transaction(sql)


def test_names() -> None:
    names = names_in('INSERT INTO "My ""Own" (`a b`, c) SELECT D FROM x.y')
    assert {'My "Own', "a b", "c", "D", "d", "x", "y"} <= names


@pytest.mark.parametrize("sql", ["SELECT now()", "SELECT CURRENT_DATE", "SELECT 'today'::date"])
def test_time_of_the_transaction(sql: str) -> None:
    assert tells_time(sql)
    assert not tells_time("SELECT a, clock_timestamp() FROM known")


@pytest.mark.parametrize(
    ("sql", "params", "expected"),
    [
        ("SELECT a FROM t WHERE b LIKE 'x%'", None, Text.READ),
        ("SELECT a FROM t WHERE b LIKE '%s%'", None, Text.READ),
        ("SELECT 7 % 4", None, Text.READ),
        ("DELETE FROM t WHERE b LIKE 'x%'", None, Text.PLAIN),
        # Here a parameter may end the quotes.
        ("SELECT a FROM t WHERE b LIKE '%s'", ["x"], Text.OTHER),
        ("SELECT a FROM t WHERE b LIKE 'x%'", [], Text.OTHER),
        ("SELECT a FROM t WHERE b LIKE 'x%%'", [], Text.READ),
    ],
)
@pytest.mark.parametrize("dialect", ["mysql", "mariadb", "postgresql"])
def test_a_percent_sign_without_parameters_is_itself(
    sql: str, params: Any, expected: Text, dialect: str
) -> None:
    assert text_of(with_parameters(sql, params), dialect) is expected
