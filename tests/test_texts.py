"""What a text is for a replay: by a list for each dialect, and by random pieces."""

from __future__ import annotations

from typing import Any

import pytest
from django.db import models
from django.db.models import functions
from hypothesis import example, given, settings
from hypothesis import strategies as st

from django_proxysql.core.dialects import FUNCTIONS
from django_proxysql.core.statements import STATE, scan
from django_proxysql.core.texts import Text, is_of_transaction, names_in, tells_time, text_of

DIALECTS = ["mysql", "mariadb", "postgresql"]

READS = [
    *("SELECT 1", "select a from t", "  \n\tSELECT a\r\nFROM t", "((SELECT 1))"),
    "(SELECT 1) UNION (SELECT 2)",
    "SELECT `for`, `into`.`update` FROM `t`",
    'SELECT "for", "into"."update" FROM "t"',
    "SELECT 'FOR UPDATE', 'it''s DELETE' = 'x' FROM t",
    "SELECT 'a -- b', 'a # b', '$.a', 'a * b'",
    "SELECT * FROM t WHERE a = %s AND b IN (%s, %s) AND c = %(name)s",
    "SELECT * FROM t WHERE a LIKE '%%x' AND b %% 2 = 0",
    "SELECT COUNT(*), MAX(a), COALESCE(a, 1) FROM t GROUP BY b HAVING COUNT(*) > 1",
    "SELECT a FROM t ORDER BY a DESC LIMIT 3 OFFSET 2",
    "SELECT CASE WHEN (a = 1) THEN (b) ELSE (c) END FROM t",
    "SELECT REPLACE(a, 'x', 'y'), TRUNCATE(1.5, 1) FROM t",
    "SELECT CAST(a AS CHAR(10)), CAST(b AS DECIMAL(10, 2)), c::varchar(10), d::numeric(5,2) FROM t",
    "SELECT a::timestamp with time zone, b AT TIME ZONE 'UTC' FROM t",
    "SELECT ROW_NUMBER() OVER (PARTITION BY a ORDER BY b), SUM(a) FILTER (WHERE b) FROM t",
    "SELECT a -> %s, a ->> 'b', a #> %s, a #>> '{a}', a @> %s, a <@ %s, a ? %s FROM t",
    "SELECT MATCH (a, b) AGAINST (%s IN BOOLEAN MODE) FROM t",
    "SELECT a FROM t WHERE (a, b) IN ((1, 2), (3, 4)) AND NOT (c LIKE (%s)) AND EXISTS(SELECT 1)",
    "SELECT * FROM a INNER JOIN b USING (id) LEFT OUTER JOIN (SELECT 1) c ON (a.id = c.id)",
    "SELECT @@version, @@global.read_only",
    "SELECT a[1], a[1:2], ARRAY[1, 2], ARRAY(SELECT 1)",
    "SELECT .5, 1., 1.5e10, -1, 1-1, 0x1F, X'1F', N'a', _utf8mb4'a' COLLATE utf8mb4_bin",
    *("SHOW TABLES", "SHOW FULL COLUMNS FROM t LIKE 'a'", "DESCRIBE t", "EXPLAIN SELECT 1"),
    "EXPLAIN (FORMAT JSON) SELECT 1",
    # What sqlcommenter puts behind, and semicolons.
    *("SELECT 1;", "SELECT 1 ; \n", "SELECT 1 /* x */"),
    "SELECT a FROM t WHERE b = %s /*route='a%%2Fb',controller='c',db_driver='django.db'*/",
    "SELECT 1 /*traceparent='00-5bd66ef5095369c7b0d1f8f4bd33716a-c532cb4098ac3dd2-01'*/;",
    "SELECT 1 /* get_lock('a', 0) */ /* app/views.py:12, temp, a@b.c */",
    # Under READ ONLY.
    "WITH a AS (SELECT 1) SELECT * FROM a",
    "WITH RECURSIVE a (b) AS (SELECT 1 UNION ALL SELECT b + 1 FROM a WHERE b < 3) SELECT 1",
    "WITH a AS MATERIALIZED (SELECT 1), b AS NOT MATERIALIZED (SELECT 2) SELECT * FROM a, b",
    'SELECT * FROM (WITH "a" AS (SELECT 1) SELECT * FROM "a") b',
    "SELECT a FROM t FETCH FIRST 5 ROWS ONLY",
    # Long lists.
    f"SELECT a FROM t WHERE a IN ({', '.join(map(str, range(1_000, 4_000)))})",
    f"SELECT a FROM t WHERE a IN ({', '.join(['%s'] * 5_000)})",
]
#: Texts, by what they are to somebody who allows what any dialect has.
LISTED: dict[Text, list[str]] = {
    Text.READ: READS,
    Text.LOCKING: [
        *("SELECT a FROM t WHERE b = %s FOR UPDATE", "SELECT a FROM t for update"),
        *("SELECT a FROM t LIMIT 1 FOR SHARE", "SELECT a FROM t FOR KEY SHARE"),
        *(
            'SELECT a FROM t FOR UPDATE OF "t"',
            "SELECT a FROM t FOR UPDATE OF `t`, u.v SKIP LOCKED",
        ),
        *("SELECT a FROM t FOR NO KEY UPDATE NOWAIT", "SELECT a FROM t LOCK IN SHARE MODE"),
    ],
    Text.PLAIN: [
        "INSERT INTO t (a, b) VALUES (%s, %s), (%s, %s)",
        "INSERT INTO `t` (`a`) VALUES (%s) RETURNING `t`.`id`",
        'INSERT INTO "s"."t" ("a") VALUES (%s) ON CONFLICT DO NOTHING',
        'INSERT INTO "t" ("a") VALUES (%s) ON CONFLICT("a") DO UPDATE SET "a" = EXCLUDED."a"',
        "INSERT IGNORE INTO `t` (`a`) VALUES (%s)",
        "INSERT INTO `t` (`a`) VALUES (%s) ON DUPLICATE KEY UPDATE `a` = VALUES(`a`)",
        "INSERT INTO `t` (`a`) VALUES (%s) ON DUPLICATE KEY UPDATE `a` = VALUE(`a`)",
        *("INSERT INTO t VALUES (1)", "INSERT INTO t (a) SELECT a FROM u WHERE b = 1"),
        *("REPLACE INTO t (a) VALUES (1)", "DELETE FROM t WHERE a IN (SELECT b FROM u)"),
        *("UPDATE t SET a = 1 /* x */", "DELETE FROM t FOR UPDATE", "SELECT 1 FOR UPDATE WAIT 5"),
        "UPDATE t SET a = a + 1, b = REPLACE(b, 'x', 'y') WHERE c = %s",
        "INSERT INTO t (a, b) VALUES " + ", ".join(["(%s, %s)"] * 5_000),
    ],
    Text.OTHER: [
        *("INSERT INTO t VALUES (1); DELETE FROM z", "INSERT INTO t VALUES (f())", "INSERT"),
        *("INSERT INTO t VALUES (app.count(1))", "INSERT INTO t VALUES (nextval('s'))"),
        *("INSERT INTO app.2 SELECT a FROM t", "SELECT a FROM app.2", "UPDATE `a`.2 SET b = 1"),
        *("INSERT t (a) VALUES (1)", "UPDATE t SET a = f(1)", "UPDATE t SET a = (@x := 1)"),
        *("UPDATE t SET a = LAST_INSERT_ID(a + 1)", "DELETE FROM t -- x", "CALL p()", "DO f()"),
        *(r"DELETE FROM t WHERE a = '\'", "WITH a AS (SELECT 1) DELETE FROM t", "TRUNCATE t"),
        *("LOAD DATA INFILE 'x' INTO TABLE t", "SELECT a INTO b FROM t", "COPY t FROM STDIN"),
        *("SELECT 1 INTO OUTFILE 'x'", "INSERT INTO t SELECT 1 INTO OUTFILE 'x'", "COMMIT"),
        # More than locks.
        'SELECT a FROM t FOR UPDATE OF t INTO OUTFILE "x"',
        *("SELECT a FROM t FOR UPDATE INTO @x", "SELECT a INTO OUTFILE 'x' FROM t FOR UPDATE"),
        *("SELECT nextval('s') FROM t FOR UPDATE", "SELECT a FROM t FOR UPDATE; DELETE FROM z"),
        *("SELECT 'a FOR UPDATE", 'SELECT "a FOR UPDATE OF "b"', "SELECT NEXT VALUE FOR UPDATE"),
        *("SELECT f() FOR UPDATE", "SELECT a FROM t WHERE a IN (%s) AND f(%s, %s)"),
    ],
}
#: By dialect: what is built in there and nowhere else is anybody's elsewhere.
READS_OF_ONE = {
    "postgresql": [
        "SELECT TRUNC(a), STRPOS(a, 'b'), TO_CHAR(b, 'YYYY') FROM t",
        "SELECT DATE_TRUNC('day', a AT TIME ZONE 'UTC')::date, (a)::varchar(10) FROM t",
        "SELECT a FROM t WHERE b = ANY(%s) AND c ILIKE ('a') OFFSET (3)",
        "SELECT a FROM t, LATERAL (SELECT 1) b",
        "SELECT ARRAY_AGG(a ORDER BY b), STRING_AGG(a, ',') FILTER (WHERE a > 1) FROM t",
        "SELECT 'a' <-> b, c @@ to_tsquery('x') FROM t WHERE a && %s AND b ?| %s",
        "SELECT date '2020-01-01', interval '1 day', a LIKE 'b' ESCAPE 'c', N'x' FROM t",
        "SELECT CAST(a AS jsonb), CAST(b AS timestamp with time zone) FROM t",
        *("SELECT ARRAY(SELECT 1)", "SELECT a *-1, b=-1, c -> 'd' ->> 'e' FROM t"),
    ],
    "mysql": [
        "SELECT a FROM t WHERE b REGEXP ('x') AND c DIV (2) = 1 AND d XOR (1)",
        "SELECT MATCH (a, b) AGAINST (%s IN BOOLEAN MODE) FROM t",
        "SELECT TRUNCATE(a, 1), IF(a, b, c), GROUP_CONCAT(a SEPARATOR ','), a 'alias' FROM t",
        "SELECT a FROM t WHERE b = ANY (SELECT 1) AND REGEXP_LIKE(a, 'b', 'c')",
        "SELECT a FROM t, LATERAL (SELECT 1) b",
    ],
    "mariadb": [
        "SELECT a FROM t WHERE b RLIKE ('x') AND c MOD (2) = 1",
        "SELECT NVL(a, b), JSON_QUERY(a, '$.b') FROM t",
    ],
}
#: By dialect: what calls a function, an operator or a domain's check that is not the server's.
CALLS_ANYBODYS = {
    "postgresql": [
        *(f"SELECT {name}(1)" for name in "group_concat database curdate date_format".split()),
        *(f"SELECT {name}(1)" for name in "materialized truncate if sha1 crc32 char".split()),
        *(f"SELECT {name}(1)" for name in "by set explain match straight_join uuid".split()),
        *("SELECT a FROM t WHERE NOT materialized(1)", "SELECT 1 AS a, div(1)", "SELECT a mod (1)"),
        *("SELECT 1 FETCH FIRST xor(1) ROWS ONLY", "SELECT 1 FETCH FIRST like(1, 2) ROWS ONLY"),
        *("SELECT a rlike (1)", "SELECT a FROM t ORDER BY a, by(1)", "SELECT 1 ### 2"),
        *("SELECT a |> b", "SELECT !! 1", "SELECT a +* b", "SELECT 1 +@ 2", "SELECT a %%%% b"),
        *("SELECT 'x'::dom", "SELECT CAST('x' AS dom)", "SELECT 'x'::app.dom", 'SELECT a::"dom"'),
        *("SELECT dom 'x'", "SELECT dom'x'", "SELECT a FROM t WHERE b = dom 'x'"),
        *("SELECT CAST(CAST(1 AS dom) AS text)", 'SELECT CAST(a AS "dom")', "SELECT (a)::dom"),
        "SELECT a FROM t JOIN b ON conflict(1)",
    ],
    "mysql": [
        *(f"SELECT {name}(1)" for name in "to_char decode date_trunc gen_random_uuid".split()),
        *(f"SELECT {name}(1)" for name in "split_part unnest".split()),
        *(f"SELECT {name}(1)" for name in "materialized trunc strpos random to_json any".split()),
        *(f"SELECT {name}(1)" for name in "some offset returning array_agg digest nvl chr".split()),
        *("SELECT a LIKE escape(1)", "SELECT SQL_NO_CACHE escape(1)", "SELECT 1, array(SELECT 1)"),
        *("SELECT a FROM t JOIN b ON conflict(1)", "SELECT * FROM innodb_cmp_reset"),
        "SELECT * FROM information_schema.INNODB_CMPMEM_RESET",
    ],
    "mariadb": [
        *(f"SELECT {name}(1)" for name in "regexp_like any_value lateral trunc any".split()),
        *(f"SELECT {name}(1)" for name in "similarity string_agg st_isvalid".split()),
    ],
}
#: Each of them does more than read, may do so, or is not certain to be one statement, in any
#: dialect.
NOT_READS = [
    # Seen to fool a classifier.
    *("SELECT 1--1; DELETE FROM z", r"SELECT '\'; DELETE FROM z; --'"),
    "SELECT 1 /*! INTO OUTFILE '/tmp/x' */",
    "WITH d AS (DELETE FROM z RETURNING 1) SELECT * FROM d",
    *("EXPLAIN ANALYZE DELETE FROM z", "SELECT ARRAY [nextval('s')]"),
    """SELECT U&"next!0076al" UESCAPE '!' ('s')""",
    "SELECT 1 AS \u00b4, nextval(1), 2 AS \u00b4",
    *("SELECT `s`.`nextval`", "SELECT s.nextval"),
    # Other statements, and two.
    *("", " ", "INSERT INTO z VALUES (1)", "TABLE z", "VALUES (1)", "CALL p()", "DO 1"),
    *("SELECT 1; SELECT 2", "SELECT 1;;", "SELECT 1; /* x */ DELETE FROM z", "SELECT 1 ; -- done"),
    *("EXPLAIN DELETE FROM z", "EXPLAIN (ANALYZE) SELECT 1", "DESC ANALYZE SELECT 1"),
    *("EXPLAIN EXECUTE p", "EXPLAIN FOR CONNECTION 1"),
    # More than a read.
    *("SELECT 1 INTO OUTFILE 'x'", "SELECT 1 INTO DUMPFILE 'x'", "SELECT 1 INTO @x"),
    *("SELECT a INTO b FROM t", "SELECT * FROM t PROCEDURE ANALYSE()", "SELECT @x := 1"),
    *("SELECT @x", "SELECT @'x', @`x`", 'SELECT @"x"', "SELECT a FROM t FOR UPDATE"),
    *("SELECT a FROM t FOR SHARE", "SELECT a FROM t LOCK IN SHARE MODE"),
    *("SELECT a FROM t for\nupdate", "SELECT a FROM t FOR/**/UPDATE"),
    # Sequences.
    *("SELECT nextval('s')", "SELECT next value FOR s", "SELECT PREVIOUS VALUE FOR s"),
    *("SELECT setval('s', 1)", "SELECT lastval()", "SELECT currval('s')"),
    # Functions.
    *(f"SELECT {name}(1)" for name in "f app.f app.count `app`.`count` `count` over text".split()),
    *(f"SELECT {name}(1)" for name in "sleep pg_sleep benchmark load_file lo_create".split()),
    *(f"SELECT {name}(1)" for name in "pg_notify dblink txid_current uuid_short".split()),
    *(f"SELECT {name}(1)" for name in "get_lock pg_advisory_lock last_insert_id value".split()),
    *("SELECT f ()", "SELECT app . count(1)", 'SELECT "count"(1)', "SELECT count (1)"),
    *("SELECT 'x'(1)", "SELECT %s(1)", "SELECT like('a', 'b')", "SELECT a, xor(1)"),
    *("SELECT array((1))", "SELECT conflict(1)", "SELECT pg_try_advisory_xact_lock(1)"),
    *("SELECT LAST_INSERT_ID()", "SELECT FOUND_ROWS()", "SELECT ROW_COUNT()"),
    *("SELECT CONNECTION_ID()", "SELECT @@identity", "SELECT @@session . identity"),
    *("SELECT set_config('a', 'b', false)", "SELECT * FROM f() AS g"),
    *("SELECT * FROM t WHERE a = f(1)", "SELECT * FROM t PARTITION (p0)"),
    *("SHOW WARNINGS", "SHOW COUNT(*) ERRORS", "SHOW PROFILE", "SHOW SESSION STATUS"),
    "SHOW /* x */ WARNINGS",
    # Comments and escapes, which two servers or two modes read in two ways.
    *("SELECT 1 -- x", "SELECT 1 +-- x", "SELECT 1 +--1\n+ 2", "SELECT 1 +/* x */ 2"),
    *("SELECT 1 &#1", "SELECT 1 # x", "SELECT 1 #> '\n, f(), '", "SELECT 1 /* x */ /*! , f() */"),
    *("/* x */ SELECT 1", "/* /* */ SELECT */ DELETE FROM z", "SELECT 1 /*+ x */"),
    *("SELECT /*M! 1 */ 1", r"SELECT '\'", r"SELECT E'\''", r"SELECT '\\'"),
    *("SELECT $$ DELETE $$", "SELECT $a$ x $a$", "SELECT $1", "SELECT {d '2020-01-01'}"),
    *("SELECT `'`, f(), `'`", "SELECT `f()`", "SELECT '%s'", "SELECT 'a %(b)s'", 'SELECT "%s"'),
    *("SELECT `%s`", "SELECT '%%%s'", "SELECT '%b'", "SELECT '%%s, %s'", "SELECT '", "SELECT `"),
    *("SELECT ''' FROM t", 'SELECT "', "SELECT 1\0", "SELECT 1\x0bFROM t", "SELECT 1\xa0FROM t"),
    *("SELECT 1\u2003FROM t", "SELECT ä FROM t", "\u017fELECT 1", "SELECT 1 \u212a"),
    *("SELECT \u0661, \u0662", "SELECT 1FROM t", "SELECT 1e5a FROM t", "SELECT %sa FROM t"),
    *("SELECT 1FOR UPDATE", f"SELECT a FROM t WHERE a IN ({', '.join(['%s'] * 30_000)})"),
]
#: Settings and what is like them, in every dialect.
SETTINGS = {
    Text.SETTING: [
        *("SET work_mem = '5MB'", "SET SESSION a = 1", "SET NAMES 'utf8mb4'", "SET a TO b, c"),
        *("SET TIME ZONE 'UTC'", "SET @a = 1", "SET @@session.a = 1", "LISTEN a", 'UNLISTEN "a"'),
        *("PREPARE p FROM 'SELECT 1'", "PREPARE p (int) AS SELECT $1", "SET ROLE a;"),
    ],
    Text.OTHER: [
        *("SET GLOBAL a = 1", "SET @@global.a = 1", "SET PERSIST a = 1", "SET a = b()"),
        *("SET a = a + 1", "SET SESSION a = 1, GLOBAL b = 2", "SET autocommit = 0"),
        *("SET a = 1; DELETE FROM t", "SET PASSWORD = 'x'", "BEGIN", "EXECUTE p"),
        *("SET SESSION autocommit = 0", "SET a = (SELECT 1)", "SET a = '%s'"),
        *("PREPARE TRANSACTION 'a'", "LOCK TABLES t WRITE", ""),
    ],
}
OF_POSTGRESQL = {
    Text.SCHEMA: [
        *("CREATE TABLE t (a varchar(10) DEFAULT now())", "ALTER TABLE t ADD b int", "TRUNCATE t"),
        *("CREATE INDEX a ON t (b)", "DROP TABLE t", "COMMENT ON TABLE t IS 'x'"),
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


def pairs(table: dict[Any, list[str]]) -> list[tuple[Any, str]]:
    return [(key, sql) for key, several in table.items() for sql in several]


@pytest.mark.parametrize(("text", "sql"), pairs(LISTED))
def test_by_what_any_dialect_has(text: Text, sql: str) -> None:
    assert text_of(sql, None) is text


@pytest.mark.parametrize(("dialect", "sql"), pairs(READS_OF_ONE))
def test_what_one_dialect_has_is_a_read_there(dialect: str, sql: str) -> None:
    assert text_of(sql, dialect) is Text.READ


@pytest.mark.parametrize(("dialect", "sql"), pairs(CALLS_ANYBODYS))
def test_what_another_dialect_has_may_do_anything(dialect: str, sql: str) -> None:
    assert text_of(sql, dialect) is text_of(f"{sql} FOR UPDATE", dialect) is Text.OTHER


def test_what_postgresql_answers_for_the_transaction_that_asks() -> None:
    for sql in ("SHOW transaction_read_only", "show all", "SELECT * FROM pg_settings"):
        assert text_of(sql, "postgresql") is not Text.READ


@pytest.mark.parametrize("sql", NOT_READS)
def test_what_is_no_read_in_any_dialect(sql: str) -> None:
    for dialect in (None, *DIALECTS):
        assert text_of(sql, dialect) is not Text.READ


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize(("text", "sql"), pairs(SETTINGS))
def test_settings_in_every_dialect(text: Text, sql: str, dialect: str) -> None:
    assert text_of(sql, dialect) is text
    assert text_of(sql.swapcase().replace("%S", "%s"), dialect) is text


@pytest.mark.parametrize(("text", "sql"), pairs(OF_POSTGRESQL))
def test_of_postgresql(text: Text, sql: str) -> None:
    assert text_of(sql, "postgresql") is text
    assert text is not Text.SCHEMA or text_of(sql, "mysql") is Text.OTHER
    assert is_of_transaction(sql) is (text is Text.OF_TRANSACTION and sql.startswith("SET"))


@pytest.mark.parametrize("sql", [None, b"SELECT 1", 1, ["SELECT 1"], object()])
def test_anything_but_a_text(sql: object) -> None:
    assert text_of(sql, "postgresql") is Text.OTHER
    assert not is_of_transaction(sql)
    assert isinstance(sql, bytes) or scan(sql) & STATE


def test_whatever_the_lexer_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(sql: str) -> None:
        raise RecursionError

    monkeypatch.setattr("django_proxysql.core.texts._tokenize", fails)
    for sql in ("SELECT 1", "SELECT 1 FOR UPDATE", "DELETE FROM t"):
        assert text_of(sql, None) is Text.OTHER


def test_the_functions_of_django_are_known() -> None:
    """Each function that Django has an expression for is on some server's list."""
    import django.contrib.postgres.aggregates as of_aggregates
    import django.contrib.postgres.functions as of_functions
    import django.contrib.postgres.search as of_search

    missing = {
        value.function.upper()
        for module in (functions, of_aggregates, of_functions, of_search)
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, models.Func)
        and getattr(value, "function", None)
    } - FUNCTIONS[None]
    assert missing <= {"COLLATE"}


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
@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_percent_sign_without_parameters_is_itself(
    sql: str, params: Any, expected: Text, dialect: str
) -> None:
    assert text_of(sql, dialect, params) is expected


# Random statements

WORDS = [
    *("a", "t", "FROM", "WHERE", "AND", "1", "1.5", "%s", "%(a)s", ",", "(", ")", "=", "*", "AS"),
    *("'x'", "'DELETE'", "'it''s'", '"x"', '"INTO"', "`x`", "`FOR`", "COUNT(", "LOWER(", "UNION"),
    *("[1]", "ARRAY[", "]", "::", "date", "||", "->", "%%", "@@version", "ORDER BY", "OVER (", "."),
]
DML = [
    *("INSERT", "UPDATE", "DELETE", "REPLACE", "MERGE", "TRUNCATE", "CALL", "INTO", "SET", "DROP"),
    *("CREATE", "ALTER", "GRANT", "COPY", "LOAD", "EXECUTE", "LOCK", "HANDLER", "delete", "Update"),
]
#: What may go wrong when put together: half tokens and the servers' differences.
SHARDS = [
    *("'", "''", '"', "`", "\\", "--", "#", "/*", "*/", "/*!", ";", "$", "$$", "@", "@x", ":="),
    *("E'", "U&'", 'U&"', "\u00b4", "\0", "\n", "\r", "\x0b", "\xa0", "%", "%%s", "UESCAPE '!'"),
    *("N'", "_utf8'", "SELECT", "DELETE FROM z", "evil()", "evil ()", "app.count(1)", "count (1)"),
    *("other.count(1)", '"evil"()', "`evil`()", "nextval('s1')", "ARRAY [nextval('s1')]", "("),
    *("evil(), ", ", evil()", "GET_LOCK('x', 0)", "pg_advisory_lock(1)", "@x := 1", "INTO z", ")"),
    *("NEXT VALUE FOR s1", "s1.nextval", "`s1`.nextval", "OFFSET 0", "[evil()]", "{fn evil()}"),
    *("# '\n, evil() '", "-- \r", """U&"ev!0069l" UESCAPE '!' ()""", "/*! , evil() */", "1FOR"),
    *("xor(1)", "like(1)", "key(1)"),
]


@settings(max_examples=300)
@given(
    head=st.sampled_from(["SELECT", "select", "SHOW", "EXPLAIN", "(SELECT"]),
    before=st.lists(st.sampled_from(WORDS), max_size=6),
    word=st.sampled_from(DML),
    after=st.lists(st.sampled_from(WORDS), max_size=6),
)
def test_no_change_is_a_read(head: str, before: list[str], word: str, after: list[str]) -> None:
    text = text_of(" ".join([head, *before, word, *after]), None)
    assert text not in (Text.READ, Text.LOCKING)


@settings(max_examples=500)
@given(st.one_of(st.text(), st.lists(st.sampled_from(WORDS + SHARDS + DML)).map("".join)))
@example("SELECT")
@example("SELECT (")
@example("INSERT INTO")
@example("INSERT IGNORE INTO a.")
@example("EXPLAIN")
def test_never_raises(text: str) -> None:
    for sql in (text, f"SELECT {text}", f"INSERT INTO {text}"):
        scan(sql)
        scan(sql.encode("utf-8", "surrogatepass"))
        text_of(sql, None)
