"""What a statement's text is taken for: by a list, by random pieces, and by real servers."""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Iterator
from typing import Any

import django
import pytest
from django.db import connections, models, transaction
from django.db.models import Avg, Case, Count, Exists, F, Max, OuterRef, Q, Subquery, Sum, Value
from django.db.models import functions as f
from django.test.utils import isolate_apps
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from django_proxysql.core.dialects import PURE
from django_proxysql.core.statements import (
    IDS,
    READ,
    RESULT,
    SCOPED,
    STATE,
    is_plain,
    is_provable_read,
    kinds,
    scan,
    writes,
)
from tests.engine import MYSQL, POSTGRESQL, added
from tests.servers import DATABASE, PASSWORD, USER

READS = [
    "SELECT 1",
    "select a from t",
    "  \n\tSELECT a\r\nFROM t",
    "(SELECT 1) UNION (SELECT 2)",
    "((SELECT 1))",
    "SELECT `for`, `into`.`update` FROM `t`",
    'SELECT "for", "into"."update" FROM "t"',
    "SELECT 'FOR UPDATE', 'it''s; -- DELETE' = 'x' FROM t".replace("; --", " "),
    "SELECT 'a -- b', 'a # b', '$.a', 'a /* b'".replace(" /*", " *"),
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
    "SHOW TABLES",
    "SHOW FULL COLUMNS FROM t LIKE 'a'",
    "DESCRIBE t",
    "EXPLAIN SELECT 1",
    "EXPLAIN (FORMAT JSON) SELECT 1",
    # What sqlcommenter puts behind, and semicolons.
    "SELECT 1;",
    "SELECT 1 ; \n",
    "SELECT 1 /* x */",
    "SELECT a FROM t WHERE b = %s /*route='a%%2Fb',controller='c',db_driver='django.db'*/",
    "SELECT 1 /*traceparent='00-5bd66ef5095369c7b0d1f8f4bd33716a-c532cb4098ac3dd2-01'*/;",
    "SELECT 1 /* get_lock('a', 0) */ /* app/views.py:12, temp, a@b.c */",
    # Under READ ONLY.
    "WITH a AS (SELECT 1) SELECT * FROM a",
    "WITH RECURSIVE a (b) AS (SELECT 1 UNION ALL SELECT b + 1 FROM a WHERE b < 3) SELECT 1",
    "WITH a AS MATERIALIZED (SELECT 1), b AS NOT MATERIALIZED (SELECT 2) SELECT * FROM a, b",
    'SELECT * FROM (WITH "a" AS (SELECT 1) SELECT * FROM "a") b',
    "SELECT a FROM t FETCH FIRST 5 ROWS ONLY",
]

#: By dialect: what is built in there and nowhere else is anybody's elsewhere.
OF_ONE = {
    "postgresql": [
        "SELECT TRUNC(a), STRPOS(a, 'b'), TO_CHAR(b, 'YYYY') FROM t",
        "SELECT DATE_TRUNC('day', a AT TIME ZONE 'UTC')::date, (a)::varchar(10) FROM t",
        "SELECT a FROM t WHERE b = ANY(%s) AND c ILIKE ('a') OFFSET (3)",
        "SELECT a FROM t, LATERAL (SELECT 1) b",
        "SELECT ARRAY_AGG(a ORDER BY b), STRING_AGG(a, ',') FILTER (WHERE a > 1) FROM t",
        "SELECT 'a' <-> b, c @@ to_tsquery('x') FROM t WHERE a && %s AND b ?| %s",
        "SELECT date '2020-01-01', interval '1 day', a LIKE 'b' ESCAPE 'c', N'x' FROM t",
        "SELECT CAST(a AS jsonb), CAST(b AS timestamp with time zone) FROM t",
        "SELECT ARRAY(SELECT 1)",
        "SELECT a *-1, b=-1, c -> 'd' ->> 'e' FROM t",
        "SELECT REGR_AVGX(a, b) FROM t",
    ],
    "mysql": [
        "SELECT a FROM t WHERE b REGEXP ('x') AND c DIV (2) = 1 AND d XOR (1)",
        "SELECT MATCH (a, b) AGAINST (%s IN BOOLEAN MODE) FROM t",
        "SELECT TRUNCATE(a, 1), IF(a, b, c), GROUP_CONCAT(a SEPARATOR ','), a 'alias' FROM t",
        "SELECT a FROM t WHERE b = ANY (SELECT 1) AND REGEXP_LIKE(a, 'b', 'c')",
        "SELECT ANY_VALUE(a) FROM t",
    ],
    "mariadb": [
        "SELECT a FROM t WHERE b RLIKE ('x') AND c MOD (2) = 1",
        "SELECT NVL(a, b), JSON_QUERY(a, '$.b') FROM t",
    ],
}
#: By dialect: what calls a function that is not the server's.
OTHERS = {
    "postgresql": [
        *("SELECT materialized(1)", "SELECT a FROM t WHERE NOT materialized(1)"),
        *("SELECT truncate('x')", "SELECT if(1)", "SELECT sha1('a')", "SELECT crc32('a')"),
        *("SELECT by(1)", "SELECT set(1)", "SELECT explain(1)", "SELECT match(1)"),
        *("SELECT 1 AS a, div(1)", "SELECT 1 FETCH FIRST xor(1) ROWS ONLY", "SELECT a mod (1)"),
        *("SELECT a rlike (1)", "SELECT straight_join(1)", "SELECT a FROM t ORDER BY a, by(1)"),
        *("SELECT 1 ### 2", "SELECT a |> b", "SELECT !! 1", "SELECT a +* b"),
        *("SELECT 1 +@ 2", "SELECT a %%%% b", "SELECT @#@ 2"),
        *("SELECT 'x'::dom", "SELECT CAST('x' AS dom)", "SELECT 'x'::app.dom", 'SELECT a::"dom"'),
        *("SELECT dom 'x'", "SELECT dom'x'", "SELECT a FROM t WHERE b = dom 'x'"),
        *("SELECT CAST(CAST(1 AS dom) AS text)", 'SELECT CAST(a AS "dom")', "SELECT (a)::dom"),
        *("SELECT 1 FETCH FIRST like(1, 2) ROWS ONLY", "SELECT a FROM t JOIN b ON conflict(1)"),
        *(
            "SELECT group_concat(a) FROM t",
            "SELECT uuid()",
            "SELECT database()",
            "SELECT curdate()",
        ),
        *("SELECT a LIKE lower(1) AND date_format(b, 'c') FROM t", "SELECT char(1)"),
    ],
    "mysql": [
        *("SELECT a LIKE escape(1)", "SELECT SQL_NO_CACHE escape(1)", "SELECT materialized(1)"),
        *("SELECT trunc(1)", "SELECT strpos(1)", "SELECT random()", "SELECT to_json(1)"),
        *("SELECT any(1)", "SELECT some(1)", "SELECT offset(1)", "SELECT returning(1)"),
        *("SELECT 1, array(SELECT 1)", "SELECT array_agg(1)", "SELECT digest(1)"),
        *("SELECT nvl(1)", "SELECT chr(1)", "SELECT decode(1)", "SELECT date_trunc('a', b)"),
        *("SELECT gen_random_uuid()", "SELECT split_part(1)", "SELECT md5(a), unnest(b)"),
        *("SELECT a FROM t JOIN b ON conflict(1)", "SELECT * FROM innodb_cmp_reset"),
        *("SELECT * FROM information_schema.INNODB_CMPMEM_RESET", "SELECT to_char(1)"),
    ],
    "mariadb": [
        *("SELECT regexp_like(1)", "SELECT any_value(1)", "SELECT lateral(1)", "SELECT trunc(1)"),
        *("SELECT any(1)", "SELECT similarity(1)", "SELECT string_agg(1)", "SELECT st_isvalid(1)"),
    ],
}
DIALECTS = ["postgresql", "mysql", "mariadb"]

#: Each of them does more than read, may do so, or is not certain to be one statement.
NOT_READS = [
    # Seen to fool a classifier.
    "SELECT 1--1; DELETE FROM z",
    r"SELECT '\'; DELETE FROM z; --'",
    "SELECT 1 /*! INTO OUTFILE '/tmp/x' */",
    "WITH d AS (DELETE FROM z RETURNING 1) SELECT * FROM d",
    "EXPLAIN ANALYZE DELETE FROM z",
    "SELECT ARRAY [nextval('s')]",
    """SELECT U&"next!0076al" UESCAPE '!' ('s')""",
    "SELECT 1 AS \u00b4, nextval(1), 2 AS \u00b4",
    "SELECT `s`.`nextval`",
    "SELECT s.nextval",
    # Other statements, and two.
    "",
    " ",
    "INSERT INTO z VALUES (1)",
    "TABLE z",
    "VALUES (1)",
    "CALL p()",
    "DO 1",
    "SELECT 1; SELECT 2",
    "SELECT 1;;",
    "SELECT 1; /* x */ DELETE FROM z",
    "SELECT 1 ; -- done",
    "EXPLAIN DELETE FROM z",
    "EXPLAIN (ANALYZE) SELECT 1",
    "DESC ANALYZE SELECT 1",
    "EXPLAIN EXECUTE p",
    "EXPLAIN FOR CONNECTION 1",
    # More than a read.
    "SELECT 1 INTO OUTFILE 'x'",
    "SELECT 1 INTO DUMPFILE 'x'",
    "SELECT 1 INTO @x",
    "SELECT a INTO b FROM t",
    "SELECT * FROM t PROCEDURE ANALYSE()",
    "SELECT @x := 1",
    "SELECT @x",
    "SELECT @'x', @`x`",
    'SELECT @"x"',
    "SELECT a FROM t FOR UPDATE",
    "SELECT a FROM t FOR SHARE",
    "SELECT a FROM t LOCK IN SHARE MODE",
    "SELECT a FROM t for\nupdate",
    "SELECT a FROM t FOR/**/UPDATE",
    # Sequences.
    "SELECT nextval('s')",
    "SELECT NEXT VALUE FOR s",
    "SELECT next value FOR s",
    "SELECT PREVIOUS VALUE FOR s",
    "SELECT setval('s', 1)",
    "SELECT lastval()",
    "SELECT currval('s')",
    # Functions.
    "SELECT f()",
    "SELECT f ()",
    "SELECT app.f()",
    "SELECT app.count(1)",
    "SELECT app . count(1)",
    "SELECT `app`.`count`(1)",
    'SELECT "count"(1)',
    "SELECT `count`(1)",
    "SELECT count (1)",
    "SELECT 'x'(1)",
    "SELECT %s(1)",
    "SELECT like('a', 'b')",
    "SELECT over(1)",
    "SELECT a, xor(1)",
    "SELECT array((1))",
    "SELECT value(1)",
    "SELECT conflict(1)",
    "SELECT text(a) FROM t",
    "SELECT GET_LOCK('a', 0)",
    "SELECT RELEASE_ALL_LOCKS()",
    "SELECT pg_advisory_lock(1)",
    "SELECT pg_try_advisory_xact_lock(1)",
    "SELECT SLEEP(1)",
    "SELECT pg_sleep(1)",
    "SELECT BENCHMARK(1, 1)",
    "SELECT LOAD_FILE('x')",
    "SELECT LAST_INSERT_ID()",
    "SELECT LAST_INSERT_ID(5)",
    "SELECT FOUND_ROWS()",
    "SELECT ROW_COUNT()",
    "SELECT CONNECTION_ID()",
    "SELECT pg_backend_pid()",
    "SELECT @@identity",
    "SELECT @@session . identity",
    "SELECT UUID_SHORT()",
    "SELECT pg_notify('a', 'b')",
    "SELECT pg_terminate_backend(1)",
    "SELECT set_config('a', 'b', false)",
    "SELECT lo_create(0)",
    "SELECT dblink('', 'DELETE FROM z')",
    "SELECT txid_current()",
    "SELECT * FROM f() AS g",
    "SELECT * FROM t WHERE a = f(1)",
    "SELECT * FROM t PARTITION (p0)",
    "SHOW WARNINGS",
    "SHOW COUNT(*) ERRORS",
    "SHOW PROFILE",
    "SHOW SESSION STATUS",
    "SHOW /* x */ WARNINGS",
    # Comments and escapes, which two servers or two modes read in two ways.
    "SELECT 1 -- x",
    "SELECT 1 +-- x",
    "SELECT 1 +--1\n+ 2",
    "SELECT 1 +/* x */ 2",
    "SELECT 1 &#1",
    "SELECT 1 # x",
    "SELECT 1 #> '\n, f(), '",
    "SELECT 1 /* x */ /*! , f() */",
    "/* x */ SELECT 1",
    "/* /* */ SELECT */ DELETE FROM z",
    "SELECT 1 /*+ x */",
    "SELECT /*M! 1 */ 1",
    r"SELECT '\'",
    r"SELECT E'\''",
    r"SELECT '\\'",
    "SELECT $$ DELETE $$",
    "SELECT $a$ x $a$",
    "SELECT $1",
    "SELECT {d '2020-01-01'}",
    "SELECT `'`, f(), `'`",
    "SELECT `f()`",
    "SELECT '%s'",
    "SELECT 'a %(b)s'",
    'SELECT "%s"',
    "SELECT `%s`",
    "SELECT '%%%s'",
    "SELECT '%b'",
    "SELECT '%%s, %s'",
    "SELECT '",
    "SELECT ''' FROM t",
    'SELECT "',
    "SELECT `",
    "SELECT 1\0",
    "SELECT 1\x0bFROM t",
    "SELECT 1\xa0FROM t",
    "SELECT 1\u2003FROM t",
    "SELECT ä FROM t",
    "\u017fELECT 1",
    "SELECT 1 \u212a",
    "SELECT \u0661, \u0662",
    "SELECT 1FROM t",
    "SELECT 1e5a FROM t",
    "SELECT %sa FROM t",
    "SELECT 1FOR UPDATE",
    "SELECT a FROM t WHERE a IN (" + ", ".join(["%s"] * 30_000) + ")",
]

LOCKING = [
    "SELECT a FROM t WHERE b = %s FOR UPDATE",
    "SELECT a FROM t for update",
    'SELECT a FROM t FOR UPDATE OF "t"',
    "SELECT a FROM t FOR UPDATE OF `t`, u.v SKIP LOCKED",
    "SELECT a FROM t FOR NO KEY UPDATE NOWAIT",
    "SELECT a FROM t LIMIT 1 FOR SHARE",
    "SELECT a FROM t FOR KEY SHARE",
    "SELECT a FROM t LOCK IN SHARE MODE",
]
NOT_EVEN_LOCKING = [
    'SELECT a FROM t FOR UPDATE OF t INTO OUTFILE "x"',
    "SELECT a FROM t FOR UPDATE INTO @x",
    "SELECT a INTO OUTFILE 'x' FROM t FOR UPDATE",
    "SELECT nextval('s') FROM t FOR UPDATE",
    "SELECT a FROM t FOR UPDATE; DELETE FROM z",
    "SELECT a FROM t FOR UPDATE WAIT 5",
    "DELETE FROM t FOR UPDATE",
    "SELECT 'a FOR UPDATE",
    'SELECT "a FOR UPDATE OF "b"',
    "SELECT NEXT VALUE FOR UPDATE",
    "SELECT f() FOR UPDATE",
]


class TestDialects:
    @pytest.mark.parametrize(
        ("dialect", "sql"), [(d, sql) for d, several in OF_ONE.items() for sql in several]
    )
    def test_what_one_dialect_has_is_a_read_there(self, dialect: str, sql: str) -> None:
        assert is_provable_read(sql, dialect=dialect)

    @pytest.mark.parametrize(
        ("dialect", "sql"), [(d, sql) for d, several in OTHERS.items() for sql in several]
    )
    def test_what_another_dialect_has_is_no_read(self, dialect: str, sql: str) -> None:
        assert not is_provable_read(sql, dialect=dialect)
        assert not is_provable_read(f"{sql} FOR UPDATE", may_lock=True, dialect=dialect)
        assert not is_plain(sql, dialect=dialect)

    @pytest.mark.parametrize("dialect", [None, *DIALECTS])
    @pytest.mark.parametrize("sql", NOT_READS)
    def test_what_is_no_read_in_any_dialect(self, sql: str, dialect: str | None) -> None:
        assert not is_provable_read(sql, dialect=dialect)

    def test_the_functions_of_django_are_known(self) -> None:
        """Each function that Django has an expression for is on some server's list."""
        import django.contrib.postgres.aggregates as of_aggregates
        import django.contrib.postgres.functions as of_functions
        import django.contrib.postgres.search as of_search

        missing = {
            value.function.upper()
            for module in (f, of_aggregates, of_functions, of_search)
            for value in vars(module).values()
            if isinstance(value, type)
            and issubclass(value, models.Func)
            and getattr(value, "function", None)
        } - PURE
        assert missing <= {"COLLATE"}


class TestProvableReads:
    @pytest.mark.parametrize("sql", READS)
    def test_reads(self, sql: str) -> None:
        assert is_provable_read(sql)
        assert is_provable_read(sql, may_lock=True)

    @pytest.mark.parametrize("sql", LOCKING)
    def test_locking_reads(self, sql: str) -> None:
        assert is_provable_read(sql, may_lock=True)
        assert not is_provable_read(sql)

    @pytest.mark.parametrize("sql", NOT_EVEN_LOCKING)
    def test_more_than_locking(self, sql: str) -> None:
        assert not is_provable_read(sql, may_lock=True)

    @pytest.mark.parametrize("sql", [None, b"SELECT 1", 1, ["SELECT 1"], object()])
    def test_anything_but_text(self, sql: Any) -> None:
        assert not is_provable_read(sql)
        assert not is_plain(sql)
        assert scan(sql) & STATE or isinstance(sql, bytes)

    def test_whatever_the_lexer_raises(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fails(sql: str) -> None:
            raise RecursionError

        monkeypatch.setattr("django_proxysql.core.statements._tokenize", fails)
        assert not is_provable_read("SELECT 1")
        assert not is_plain("SELECT 1")

    def test_long(self) -> None:
        numbers = ", ".join(str(number) for number in range(1_000, 4_000))
        assert is_provable_read(f"SELECT a FROM t WHERE a IN ({numbers})")
        placeholders = ", ".join(["%s"] * 5_000)
        assert is_provable_read(f"SELECT a FROM t WHERE a IN ({placeholders})")
        assert not is_provable_read(f"SELECT a FROM t WHERE a IN ({placeholders}) AND f(%s, %s)")


PLAIN = [
    "INSERT INTO t (a, b) VALUES (%s, %s), (%s, %s)",
    "INSERT INTO `t` (`a`) VALUES (%s) RETURNING `t`.`id`",
    'INSERT INTO "s"."t" ("a") VALUES (%s) ON CONFLICT DO NOTHING',
    'INSERT INTO "t" ("a") VALUES (%s) ON CONFLICT("a") DO UPDATE SET "a" = EXCLUDED."a"',
    "INSERT IGNORE INTO `t` (`a`) VALUES (%s)",
    "INSERT INTO `t` (`a`) VALUES (%s) ON DUPLICATE KEY UPDATE `a` = VALUES(`a`)",
    "INSERT INTO `t` (`a`) VALUES (%s) ON DUPLICATE KEY UPDATE `a` = VALUE(`a`)",
    "INSERT INTO t VALUES (1)",
    "INSERT INTO t (a) SELECT a FROM u WHERE b = 1",
    "REPLACE INTO t (a) VALUES (1)",
    "UPDATE t SET a = a + 1, b = REPLACE(b, 'x', 'y') WHERE c = %s",
    "DELETE FROM t WHERE a IN (SELECT b FROM u)",
    "SELECT a FROM t FOR UPDATE",
    "INSERT INTO t (a, b) VALUES " + ", ".join(["(%s, %s)"] * 5_000),
]
NOT_PLAIN = [
    "INSERT INTO t VALUES (1); DELETE FROM z",
    "INSERT INTO t VALUES (f())",
    "INSERT INTO t VALUES (app.count(1))",
    "INSERT INTO t VALUES (nextval('s'))",
    "INSERT t (a) VALUES (1)",
    "UPDATE t SET a = f(1)",
    "UPDATE t SET a = (@x := 1)",
    "UPDATE t SET a = LAST_INSERT_ID(a + 1)",
    "DELETE FROM t -- x",
    r"DELETE FROM t WHERE a = '\'",
    "CALL p()",
    "DO f()",
    "WITH a AS (SELECT 1) DELETE FROM t",
    "LOAD DATA INFILE 'x' INTO TABLE t",
    "TRUNCATE t",
    "SELECT a INTO b FROM t",
    "SELECT 1 INTO OUTFILE 'x'",
    "INSERT INTO t SELECT 1 INTO OUTFILE 'x'",
    "COPY t FROM STDIN",
    "COMMIT",
    "CREATE TABLE t (a int)",
    "INSERT",
]


@pytest.mark.parametrize("sql", PLAIN)
def test_plain(sql: str) -> None:
    assert is_plain(sql)
    assert sql.startswith("SELECT") or not is_provable_read(sql)


@pytest.mark.parametrize("sql", NOT_PLAIN)
def test_not_plain(sql: str) -> None:
    assert not is_plain(sql)


# The scan

LEAVES_STATE = [
    *("BEGIN", "BEGIN WORK", "START TRANSACTION", "XA START 'x'", "END"),
    *("SET a = 1", "SET SESSION a = 1", "SET NAMES utf8", "SET autocommit = 0", "SET ROLE a"),
    *("SET LOCAL sort_buffer_size = 1", "SET LOCAL sql_mode = ''", "SET TRANSACTION READ ONLY"),
    *("SET @a = 1", "SET @@session.a = 1", "SET LOCAL a = 1, b.c = 2", "RESET ALL", "DISCARD ALL"),
    *("USE app", "SELECT GET_LOCK('a', 0)", "DO GET_LOCK('a', 0)", "SELECT RELEASE_LOCK('a')"),
    *("SELECT RELEASE_ALL_LOCKS()", "SELECT service_get_write_locks('a', 'b', 0)"),
    *(
        "SELECT pg_advisory_lock(1)",
        "SELECT pg_try_advisory_lock(1)",
        "SELECT pg_advisory_unlock(1)",
    ),
    *("SELECT pg_catalog.pg_advisory_lock(1)", 'SELECT "pg_advisory_lock"(1)'),
    *("""SELECT U&"pg\\005fadvisory_lock"(1)""", "SELECT `GET_LOCK`('a', 0)"),
    *("LOCK TABLES t WRITE", "UNLOCK TABLES", "LOCK TABLE t", "FLUSH TABLES WITH READ LOCK"),
    *("CREATE TEMPORARY TABLE t (a int)", "CREATE TEMP TABLE t (a int)", "DROP TEMPORARY TABLE t"),
    *("CREATE/**/TEMPORARY TABLE t (a int)", "CREATE LOCAL TEMP TABLE t (a int)"),
    *("CREATE OR REPLACE TEMPORARY TABLE t (a int)", "SELECT 1 INTO TEMP t"),
    *("CREATE TABLE pg_temp.t (a int)", "CREATE TEMP VIEW v AS SELECT 1"),
    *("HANDLER t OPEN", "PREPARE p FROM 'SELECT 1'", "EXECUTE p", "DEALLOCATE PREPARE p"),
    *("SELECT set_config('a', 'b', false)", "SELECT setseed(0.5)", "LISTEN a", "UNLISTEN a"),
    *("DECLARE c CURSOR WITH HOLD FOR SELECT 1", "FETCH c", "CLOSE c", "CALL p()"),
    *(
        "SELECT @a",
        "SELECT @a := 1",
        "SELECT 1 INTO @a",
        "SELECT @`a`",
        "SELECT @'a'",
        'SELECT @"a"',
    ),
    *("INSERT INTO t VALUES (@a)", "SELECT dblink_connect('a')", "DO $$ BEGIN END $$"),
    *("SELECT 1; SELECT 2", "SELECT 1;\n\nSET a = 1", "/*! SET a = 1 */", "/*M! BEGIN */"),
    *("SELECT 1 /*!, GET_LOCK('a', 0) */", "/*!50000 BEGIN */", "COMMIT AND CHAIN"),
    *(
        "ROLLBACK AND CHAIN",
        "/* /* */ SELECT */ BEGIN",
        "-- x\rBEGIN\nSELECT 1",
        "COPY t FROM STDIN",
    ),
    *("SELECT set_limit(0.9)", "SELECT app.set_tenant(1)", "SELECT pg_backup_start('a')"),
    *("UPDATE pg_settings SET setting = 'off'", 'UPDATE "pg_settings" SET setting = 1'),
    *("SELECT pg_create_physical_replication_slot('a', true, true)", "SELECT get_lock ('a', 0)"),
    *(
        "SELECT get_lock/* x */('a', 0)",
        "SELECT get_lock -- x\n('a', 0)",
        "SELECT 1 INTO TEMP TABLE t",
    ),
    *("", "%s", ";", "LOAD 'x'", "WHATEVER"),
]
LEAVES_NONE = [
    *("SELECT 1", "INSERT INTO t VALUES (1)", "UPDATE t SET a = 1", "DELETE FROM t", "REPLACE t"),
    *("WITH a AS (SELECT 1) SELECT 1", "CREATE TABLE t (a int)", "ALTER TABLE t ADD b int"),
    *("SAVEPOINT a", "RELEASE SAVEPOINT a", "ROLLBACK TO SAVEPOINT a", "COMMIT", "ROLLBACK"),
    *("SHOW TABLES", "EXPLAIN SELECT 1", "NOTIFY a", "SELECT 1;", "SELECT 1; ", "TRUNCATE t"),
    *("SET CONSTRAINTS ALL IMMEDIATE", "SET LOCAL statement_timeout = 1", "SET LOCAL a.b = 'c'"),
    *("SET LOCAL search_path TO a, b", " set local work_mem to '8MB'"),
    *("SELECT a @> b, a <@ b, @@version, a @@ b FROM t", "SELECT clock, temperature FROM t"),
    *("SELECT a FROM t WHERE b = %s AND c = %(name)s", "SELECT 1 /* x */ /*+ y */"),
    # Names, and not what they name elsewhere.
    *("SELECT temp, t.temporary, `temp` FROM t", "INSERT INTO temp (a) VALUES (1)"),
    *("INSERT INTO temp SELECT 1", "CREATE TABLE temp (a int)", "UPDATE t SET temp = 1"),
    *("SELECT get_lock, set_limit FROM t", "SELECT * FROM pg_settings", "SELECT set_config FROM t"),
    # Of the transaction.
    *("SELECT pg_advisory_xact_lock(1)", "SELECT pg_try_advisory_xact_lock(1)"),
    *("LOCK TABLE t IN SHARE MODE", "LOCK a, b IN ACCESS EXCLUSIVE MODE"),
]
IN_THE_CONNECTION = [
    *("SELECT LAST_INSERT_ID()", "SELECT last_insert_id(5)", "SELECT @@last_insert_id"),
    *("SELECT FOUND_ROWS()", "SELECT ROW_COUNT()", "SELECT ROW_COUNT ()", "SELECT row_count/**/()"),
    *("SHOW WARNINGS", "SHOW ERRORS", "show\n count(*) warnings", "SHOW PROFILE", "SHOW PROFILES"),
    *("SHOW /* x */ WARNINGS", "SHOW -- x\nERRORS", "SHOW SESSION STATUS", "SHOW STATUS LIKE 'a'"),
    *(
        "SELECT @@identity",
        "SELECT @@session.identity",
        "SELECT @@ session . identity"[:9] + "warning_count",
    ),
    *("SELECT @@`identity`", "SELECT @@session . identity", "SELECT @@error_count"),
    *("SELECT lastval()", "SELECT currval('s')", "SELECT PREVIOUS VALUE FOR s", "SELECT s.currval"),
    *("SELECT CONNECTION_ID()", "SELECT pg_backend_pid()", "SELECT WSREP_LAST_WRITTEN_GTID()"),
]
NOT_IN_THE_CONNECTION = [
    *("SELECT row_count FROM t", "SHOW TABLES", "SHOW GLOBAL STATUS", "SHOW TABLE STATUS"),
    *("SELECT warnings, errors FROM t", "SELECT previous FROM t", "SELECT @@version"),
    *("SELECT connection_id, last_insert_id FROM t", "SELECT t.found_rows FROM t"),
]


def disguised(sql: str) -> list[str]:
    """The statement in other letters, and behind what may stand before it."""
    return [
        sql,
        sql.lower(),
        sql.swapcase(),
        f"\r\n\t {sql}",
        f"/* x */{sql}",
        f"-- x\n{sql}",
        f"# x\r\n{sql}",
        f"/*+ x */ -- y\n /**/ {sql}",
        f"{sql} ",
    ]


class TestScan:
    @pytest.mark.parametrize("sql", LEAVES_STATE)
    def test_state(self, sql: str) -> None:
        for text in disguised(sql):
            assert scan(text) & STATE, text
            assert scan(text.encode("utf-8")) & STATE, text
        assert scan(f"({sql})") & STATE

    @pytest.mark.parametrize("sql", LEAVES_NONE)
    def test_no_state(self, sql: str) -> None:
        assert not scan(sql) & STATE
        assert not scan(sql.swapcase()) & STATE
        assert not scan(f"\n {sql} ") & STATE

    @pytest.mark.parametrize("sql", IN_THE_CONNECTION)
    def test_scoped(self, sql: str) -> None:
        for text in disguised(sql):
            assert scan(text) & SCOPED, text

    @pytest.mark.parametrize("sql", [*NOT_IN_THE_CONNECTION, *LEAVES_NONE])
    def test_not_scoped(self, sql: str) -> None:
        for text in disguised(sql):
            assert not scan(text) & SCOPED, text

    @pytest.mark.parametrize("sql", ["SELECT 1", "SHOW TABLES", "EXPLAIN SELECT 1", "TABLE t"])
    def test_read(self, sql: str) -> None:
        for text in [*disguised(sql), f"(({sql}))"]:
            assert scan(text) == READ, text

    @pytest.mark.parametrize(
        "sql",
        ["DELETE FROM t", "WITH a AS (SELECT 1) DELETE FROM t", "EXPLAIN ANALYZE DELETE FROM t"],
    )
    def test_no_read(self, sql: str) -> None:
        for text in disguised(sql):
            assert scan(text) == 0, text

    @pytest.mark.parametrize(
        ("sql", "flag"),
        [
            ("SELECT LAST_INSERT_ID()", IDS),
            ("SELECT currval('s')", IDS),
            ("SELECT ROW_COUNT()", RESULT),
            ("SHOW WARNINGS", RESULT),
            ("GET DIAGNOSTICS @a = ROW_COUNT", RESULT),
            ("SELECT CONNECTION_ID()", 0),
            ("UPDATE t SET a = LAST_INSERT_ID(a + 1)", 0),
        ],
    )
    def test_what_is_asked_of_a_connection(self, sql: str, flag: int) -> None:
        for text in disguised(sql):
            assert scan(text) & SCOPED, text
            assert scan(text) & (IDS | RESULT) == flag, text

    @pytest.mark.parametrize(
        "sql",
        [
            *("SELECT f(1)", "SELECT app.count(1)", 'SELECT "count"(1)', "SELECT nextval('s')"),
            *("SELECT a FROM t WHERE f (a) = 1", "SELECT f/* x */(1)", "TABLE t WHERE f()"),
        ],
    )
    def test_a_read_that_calls_what_is_not_known_may_write(self, sql: str) -> None:
        for text in disguised(sql):
            assert writes(scan(text)), text

    @pytest.mark.parametrize("sql", [one for one in READS if one.startswith("SELECT")])
    def test_a_read_writes_nothing(self, sql: str) -> None:
        assert not writes(scan(sql))

    @pytest.mark.parametrize("length", [10, 5_000, 20_000, 100_000, 1_000_000])
    def test_state_in_the_middle_of_a_long_text(self, length: int) -> None:
        values = "(%s)," * (length // 5)
        assert scan(f"INSERT INTO t VALUES {values}(GET_LOCK('a', 0)),{values}(%s)") & STATE
        assert scan(f"INSERT INTO t VALUES {values}(%s); SET a = 1; INSERT {values}") & STATE
        assert scan(f"INSERT INTO t VALUES {values}(LAST_INSERT_ID()),{values}(%s)") & SCOPED
        assert scan(f"INSERT INTO t VALUES {values}(%s)") == 0

    def test_the_memo_is_bounded(self) -> None:
        kinds.clear()
        for number in range(3_000):
            scan(f"SELECT {number}, {'x' * 4_000}")
        assert sum(len(sql) for sql in kinds) <= 10_000_000
        kinds.clear()
        scan("SELECT " + "x" * 10_000)
        assert not kinds

    def test_the_memo_is_asked(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert scan("SELECT 'memo'") == scan(b"SELECT 'memo'") == READ
        monkeypatch.setattr("django_proxysql.core.statements._scan", None)
        assert scan("SELECT 'memo'") == scan(b"SELECT 'memo'") == READ


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
    *(
        "'",
        "''",
        '"',
        "`",
        "\\",
        "--",
        "#",
        "/*",
        "*/",
        "/*!",
        ";",
        "$",
        "$$",
        "@",
        "@x",
        ":=",
        "E'",
    ),
    *(
        "U&'",
        'U&"',
        "\u00b4",
        "\0",
        "\n",
        "\r",
        "\x0b",
        "\xa0",
        "%",
        "%%s",
        "UESCAPE '!'",
        "N'",
        "_utf8'",
    ),
    *(
        "SELECT",
        "DELETE FROM z",
        "evil()",
        "evil ()",
        "app.count(1)",
        "count (1)",
        "other.count(1)",
    ),
    *(
        '"evil"()',
        "`evil`()",
        "nextval('s1')",
        "ARRAY [nextval('s1')]",
        "evil(), ",
        ", evil()",
        "(",
    ),
    *("GET_LOCK('x', 0)", "pg_advisory_lock(1)", "@x := 1", "NEXT VALUE FOR s1", "INTO z", ")"),
    *(
        "s1.nextval",
        "`s1`.nextval",
        "OFFSET 0",
        "[evil()]",
        "{fn evil()}",
        "# '\n, evil() '",
        "-- \r",
    ),
    *("""U&"ev!0069l" UESCAPE '!' ()""", "/*! , evil() */", "1FOR", "xor(1)", "like(1)", "key(1)"),
]


@settings(max_examples=300, deadline=None)
@given(
    head=st.sampled_from(["SELECT", "select", "SHOW", "EXPLAIN", "(SELECT"]),
    before=st.lists(st.sampled_from(WORDS), max_size=6),
    word=st.sampled_from(DML),
    after=st.lists(st.sampled_from(WORDS), max_size=6),
    may_lock=st.booleans(),
)
def test_no_change_is_a_read(
    head: str, before: list[str], word: str, after: list[str], may_lock: bool
) -> None:
    assert not is_provable_read(" ".join([head, *before, word, *after]), may_lock=may_lock)


@settings(max_examples=500, deadline=None)
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
        assert is_provable_read(sql) in (True, False)
        assert is_plain(sql) in (True, False)


# On servers


@contextlib.contextmanager
def plainly(server: Any, alias: str) -> Iterator[Any]:
    """Django's own connection to a server."""
    entry = {
        "ENGINE": POSTGRESQL if alias == "postgres" else MYSQL,
        "NAME": DATABASE,
        "USER": USER,
        "PASSWORD": PASSWORD,
        "HOST": server.host,
        "PORT": server.port,
    }
    with added({alias: entry}):
        yield connections[alias]
        connections[alias].close()


class Victim:
    """A server on which a statement shows if it does more than read."""

    def __init__(self, connection: Any, modes: list[str]) -> None:
        self.connection = connection
        self.modes = modes

    def run(self, sql: str) -> list[str]:
        """Run the statement in every mode; return what it ended with in each."""
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
        vendor = self.connection.vendor
        questions = ["SELECT COUNT(*), MAX(a) FROM z", "SELECT COUNT(*) FROM written"]
        if vendor == "mysql":
            questions += [
                "SELECT next_not_cached_value FROM s1",
                "SELECT IS_USED_LOCK('x'), @x",
                "SELECT COUNT(*) FROM information_schema.tables WHERE table_schema = DATABASE()",
            ]
        else:
            questions += [
                "SELECT last_value, is_called FROM s1",
                "SELECT COUNT(*) FROM pg_locks WHERE locktype = 'advisory'",
                "SELECT COUNT(*) FROM pg_class",
            ]
        rows: list[Any] = []
        with self.connection.cursor() as cursor:
            if vendor == "mysql":
                cursor.execute("SET sql_mode = ''")
            for question in questions:
                cursor.execute(question)
                rows += cursor.fetchall()
        return rows


#: Functions that write, under names that a careless reader takes for others.
EVIL = ["evil", "count", "xor", "like", "key", "array", "value", "text", "over"]


@pytest.fixture
def maria(mariadb: Any) -> Iterator[Victim]:
    with plainly(mariadb, "mariadb") as connection, connection.cursor() as cursor:
        for sql in (
            "CREATE OR REPLACE TABLE t (a int, b int)",
            "CREATE OR REPLACE TABLE z (a int)",
            "CREATE OR REPLACE TABLE written (a int)",
            "CREATE OR REPLACE SEQUENCE s1 NOCACHE",
            "INSERT INTO t VALUES (1, 2)",
            "INSERT INTO z VALUES (1)",
        ):
            cursor.execute(sql)
        for name in EVIL:
            for parameters in ("", "a int"):
                cursor.execute(f"DROP FUNCTION IF EXISTS `{name}`")
                cursor.execute(
                    f"CREATE FUNCTION `{name}` ({parameters}) RETURNS int"
                    " BEGIN INSERT INTO written VALUES (1); RETURN 1; END"
                )
                if name == "evil":
                    break
        yield Victim(
            connection,
            [
                f"SET sql_mode = '{mode}'"
                for mode in ("", "ANSI_QUOTES", "NO_BACKSLASH_ESCAPES", "ORACLE", "IGNORE_SPACE")
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
        yield Victim(
            connection,
            [
                f"SET standard_conforming_strings = {mode}; SET backslash_quote = on"
                for mode in ("on", "off")
            ],
        )
        for name in EVIL:
            cursor.execute(f'DROP FUNCTION IF EXISTS public."{name}"(int)')
        cursor.execute("DROP SCHEMA other CASCADE; DROP TABLE t, z, written; DROP SEQUENCE s1")


@pytest.fixture(params=["maria", "postgresql"])
def victim(request: Any) -> Victim:
    made: Victim = request.getfixturevalue(request.param)
    return made


@pytest.mark.server
class TestOnServers:
    def test_the_victim_notices(self, victim: Victim) -> None:
        before = victim.state()
        for sql in (
            "SELECT evil()",
            "DELETE FROM z",
            "SELECT 1; DELETE FROM z WHERE 1 = 1",
            "SELECT nextval('s1')" if victim.connection.vendor != "mysql" else "SELECT nextval(s1)",
        ):
            victim.run(sql)
            assert victim.state() != before, sql
            before = victim.state()
            with victim.connection.cursor() as cursor:
                cursor.execute("INSERT INTO z VALUES (7)")
            before = victim.state()

    def test_what_is_said_to_read_only_reads(self, victim: Victim) -> None:
        before = victim.state()
        done = 0
        for sql in [*READS, *NOT_READS]:
            if is_provable_read(sql) and "%" not in sql:
                done += "done" in victim.run(sql)
                assert victim.state() == before, sql
        assert done >= 8

    def test_random_statements_that_are_said_to_read_only_read(self, victim: Victim) -> None:
        before = victim.state()
        outcomes: dict[str, int] = {}

        @settings(
            max_examples=800,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(
            st.lists(
                st.tuples(st.sampled_from(WORDS + SHARDS), st.sampled_from(["", " "])), max_size=5
            ),
            st.sampled_from(
                ["SELECT ", "SELECT 1, ", "SELECT a FROM t WHERE 1 = ", "EXPLAIN SELECT "]
            ),
        )
        def tried(pieces: list[tuple[str, str]], head: str) -> None:
            sql = head + "".join(piece + space for piece, space in pieces)
            if is_provable_read(sql) and "%s" not in sql:
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
            rating = models.FloatField(default=0)
            wakes = models.TimeField(default=datetime.time(7))

            class Meta:
                app_label = "app"
                db_table = "statements_author"

        class Book(models.Model):
            author = models.ForeignKey(Author, models.CASCADE, related_name="books")
            title = models.CharField(max_length=100, unique=True)
            price = models.DecimalField(max_digits=8, decimal_places=2)
            published = models.DateTimeField()
            length = models.DurationField(default=datetime.timedelta(hours=1))
            pages = models.IntegerField(null=True)
            if hasattr(models, "JSONField"):
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
        self.texts: list[str] = []

    @property
    def authors(self) -> Any:
        return self.author._default_manager.using(self.alias)

    @property
    def books(self) -> Any:
        return self.book._default_manager.using(self.alias)

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
        author = here.authors.create(name="Ada", born=now.date(), joined=now, rating=1.5)
        for number in range(3):
            here.books.create(
                author=author, title=f"Book {number}", price=number, published=now, pages=number
            )
        try:
            yield here
        finally:
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
        )
        if _has_windows(here)
        else books.all(),
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
        "none of many": books.filter(~Q(title__in=["a", "b"]), ~Q(pages=1) | Q(price__gt=3)),
    }
    for lookup in ("exact", "iexact", "contains", "icontains", "startswith", "iendswith", "regex"):
        found[lookup] = books.filter(**{f"title__{lookup}": "Book%_'; DELETE --"})
    for kind in ("year", "quarter", "month", "week", "day", "hour", "minute"):
        found[f"trunc {kind}"] = books.annotate(a=f.Trunc("published", kind))
    found["trunc time"] = books.annotate(a=f.TruncTime("published"), b=f.TruncDate("published"))
    if django.VERSION >= (3, 0):
        found |= {
            "hash": books.annotate(a=f.MD5("title"), b=f.Left("title", 2), c=f.Repeat("title", 2)),
            "replace": books.annotate(a=f.Replace("title", Value("Book"), Value("Buch"))),
            "round": books.annotate(a=f.Round("price"), b=f.Sqrt("price"), c=f.Mod("pages", 2)),
        }
    if django.VERSION >= (3, 2):
        found |= {
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
        }
    if django.VERSION >= (4, 1):
        found["xor"] = books.filter(Q(pages=1) ^ Q(price=2) ^ Q(title="a"))
    if here.alias == "postgres":
        found |= _of_postgresql(books)
    return found


def _has_windows(here: Library) -> bool:
    return bool(here.connection.features.supports_over_clause)


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
        )
        if django.VERSION >= (3, 0)
        else books.values("author").annotate(a=ArrayAgg("title")),
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
                if not is_provable_read(sql):
                    refused[name] = sql[:2_000]
        assert number > 60
        # What Django writes with backslashes is read differently in the modes of sql_mode.
        assert not {name: sql for name, sql in refused.items() if "\\" not in sql}

    def test_locking_reads(self, library: Library) -> None:
        books = library.books
        works = [books.select_for_update()]
        if library.connection.features.has_select_for_update_of:
            works += [books.select_related("author").select_for_update(of=("self",))]
        if library.connection.features.has_select_for_update_skip_locked:
            works += [books.filter(pages=1).select_for_update(skip_locked=True)]
        for work in works:
            with transaction.atomic(library.alias):
                (sql,) = library.texts_of(work)
            assert "FOR UPDATE" in sql
            assert not is_provable_read(sql)
            assert is_provable_read(sql, may_lock=True)
            assert scan(sql) == READ

    def test_explain(self, library: Library) -> None:
        (sql,) = library.texts_of(library.books.explain)
        assert is_provable_read(sql)

    def test_writes(self, library: Library) -> None:
        book, books = library.books.first(), library.books
        now = book.published

        def new(title: str) -> Any:
            return library.book(author=book.author, title=title, price=1, published=now)

        works: list[Any] = [
            lambda: new("a").save(using=library.alias),
            lambda: book.save(using=library.alias),
            lambda: books.bulk_create([new("b"), new("c")]),
            lambda: books.bulk_update([book], ["title", "pages"]),
            lambda: books.update(pages=F("pages") + 1),
            lambda: books.filter(title="a").update(title=f.Concat("title", Value("b"))),
            lambda: books.filter(author__name="x").update(pages=2),
            lambda: books.filter(title="ab").delete(),
            lambda: books.get_or_create(title="z", defaults=vars_of(new("z"))),
            lambda: books.update_or_create(title="z", defaults={"pages": 5}),
        ]
        if django.VERSION >= (4, 1):
            works += [
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
                assert is_plain(sql), sql
                if not sql.startswith("SELECT"):
                    written += 1
                    assert not is_provable_read(sql, may_lock=True), sql
        assert written >= 10


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize(
    "head", ["SELECT set_id", "SELECT last_insert_id", "CREATE", "INSERT INTO temp", "SELECT 1;"]
)
def test_lines_of_comments_are_read_at_once(head: str, end: str) -> None:
    """Were there two ways to read each, the time would double with every line."""
    lines = f"-- a note{end}" * 60
    scan(f"{head}{end}{lines}FROM t")
    assert scan(f"SELECT set_tenant{end}{lines}(7)") & STATE


@pytest.mark.parametrize(
    "piece",
    [
        *("last_insert_id/*", "get_lock/*", "set_a/*", "into/*", "pg_temp/*", "previous/*"),
        *("dblink", "service_", "pg_advisory_", "pg_create_", "pg_replication_origin_"),
        *("get_lock -- x\r", "last_insert_id -- x\r", "create --", "/*", "a /* ", "-- x\r"),
    ],
)
@pytest.mark.parametrize("head", ["SELECT ", "SHOW ", ""])
def test_any_text_is_scanned_at_once(head: str, piece: str) -> None:
    """Were a text read to its end for each name in it, this test would take minutes."""
    scan(f"{head}{piece * (48_000 // len(piece))}")
    scan(f"{head}lock replication_ {piece * (45_000 // len(piece))}*/")


@pytest.mark.parametrize(
    ("sql", "flag"),
    [
        ("SELECT get_lock('a', 0)", STATE),
        ("CREATE TEMP TABLE t (a int)", STATE),
        ("SELECT 1 INTO TEMP t", STATE),
        ("SELECT last_insert_id()", IDS),
        ("SELECT last_insert_id(/**/)", IDS),
        ("SELECT row_count()", RESULT),
        ("SELECT PREVIOUS VALUE FOR s", IDS),
    ],
)
@pytest.mark.parametrize(
    "gap",
    [f"/*{'x' * 3_000}*/", "/**/" * 300, f"--{'x' * 3_000}\n", f" /**/ /*{'x' * 3_000}*/ -- x\n"],
)
def test_a_long_gap_hides_nothing(sql: str, flag: int, gap: str) -> None:
    before, mark, after = sql.partition("(") if "(" in sql else sql.partition(" TEMP")
    if not mark:
        before, mark, after = sql.partition(" VALUE")
    assert scan(f"{before}{gap}{mark}{after}") & flag


@pytest.mark.parametrize(
    ("sql", "flags"),
    [
        ("-- x\rBEGIN\nSELECT 1", STATE),
        ("-- x\rSELECT 1", STATE),
        ("SELECT 1 -- x\r, get_lock('a', 0)\n", STATE | READ),
        ("SELECT get_lock -- x\r, y\n('a', 0)", STATE | READ),
        ("SELECT 1\rFROM t", READ),
        ("SELECT 1\r\nFROM t -- x\r\n", READ),
        ("-- x\rSELECT 1\nDELETE FROM t", 0),
    ],
)
def test_each_server_ends_a_line_in_its_own_way(sql: str, flags: int) -> None:
    assert scan(sql) & (STATE | READ) == flags


@pytest.mark.parametrize("sql", IN_THE_CONNECTION)
def test_asking_a_connection_writes_nothing(sql: str) -> None:
    assert not writes(scan(sql))


def vars_of(book: Any) -> dict[str, Any]:
    return {
        field.attname: getattr(book, field.attname)
        for field in book._meta.fields
        if not field.primary_key
    }
