"""What a statement's text is taken for before it is sent: by lists, each in many disguises."""

from __future__ import annotations

import pytest

from django_proxysql.core.statements import (
    FOUND,
    IDS,
    READ,
    RESULT,
    SCOPED,
    STATE,
    kinds,
    scan,
    writes,
)
from tests.test_texts import READS

LEAVES_STATE = [
    *("/*!50000 BEGIN */", "SELECT @a := 1", "SELECT 1 INTO @a", "DO GET_LOCK('a', 0)"),
    *("SET autocommit = 0", "SET LOCAL sql_mode = ''", "CREATE TEMP VIEW v AS SELECT 1"),
    *('UPDATE "pg_settings" SET setting = 1', "SELECT set_limit(0.9)"),
    *("BEGIN", "BEGIN WORK", "START TRANSACTION", "XA START 'x'", "END", "USE app", "CALL p()"),
    *("SET a = 1", "SET NAMES utf8", "SET ROLE a", "SET TRANSACTION READ ONLY", "SET @a = 1"),
    *("SET LOCAL sort_buffer_size = 1", "SET LOCAL a = 1, b.c = 2", "RESET ALL", "DISCARD ALL"),
    *("SELECT GET_LOCK('a', 0)", "SELECT RELEASE_LOCK('a')", "SELECT RELEASE_ALL_LOCKS()"),
    *("SELECT service_get_write_locks('a', 'b', 0)", "SELECT `GET_LOCK`('a', 0)"),
    *("SELECT pg_try_advisory_lock(1)", "SELECT pg_advisory_unlock(1)"),
    *("SELECT pg_catalog.pg_advisory_lock(1)", 'SELECT "pg_advisory_lock"(1)'),
    *("""SELECT U&"pg\\005fadvisory_lock"(1)""", "LOCK TABLES t WRITE", "UNLOCK TABLES"),
    *("LOCK TABLE t", "FLUSH TABLES WITH READ LOCK", "SELECT get_lock/* x */('a', 0)"),
    *("SELECT get_lock ('a', 0)", "SELECT get_lock -- x\n('a', 0)"),
    *("CREATE TEMPORARY TABLE t (a int)", "CREATE TEMP TABLE t (a int)", "DROP TEMPORARY TABLE t"),
    *("CREATE/**/TEMPORARY TABLE t (a int)", "CREATE LOCAL TEMP TABLE t (a int)"),
    *("CREATE OR REPLACE TEMPORARY TABLE t (a int)", "SELECT 1 INTO TEMP t"),
    *("CREATE TABLE pg_temp.t (a int)", "SELECT 1 INTO TEMP TABLE t"),
    *("HANDLER t OPEN", "PREPARE p FROM 'SELECT 1'", "EXECUTE p", "DEALLOCATE PREPARE p"),
    *("SELECT set_config('a', 'b', false)", "SELECT setseed(0.5)", "LISTEN a", "UNLISTEN a"),
    *("DECLARE c CURSOR WITH HOLD FOR SELECT 1", "FETCH c", "CLOSE c", "COPY t FROM STDIN"),
    *("SELECT @a", "SELECT a := 1", "SELECT @`a`", "SELECT @'a'", 'SELECT @"a"'),
    *("INSERT INTO t VALUES (@a)", "SELECT dblink_connect('a')", "DO $$ BEGIN END $$"),
    *("SELECT 1; SELECT 2", "SELECT 1;\n\nSET a = 1", "/*! SET a = 1 */", "/*M! BEGIN */"),
    *("SELECT 1 /*!, GET_LOCK('a', 0) */", "COMMIT AND CHAIN", "ROLLBACK AND CHAIN"),
    *("/* /* */ SELECT */ BEGIN", "-- x\rBEGIN\nSELECT 1", "SELECT app.set_tenant(1)"),
    *("SELECT pg_backup_start('a')", "SELECT pg_stop_backup()", "UPDATE pg_settings SET a = 1"),
    "EXPLAIN ANALYZE UPDATE pg_settings SET a = 1",
    *("SELECT pg_create_physical_replication_slot('a')", "SELECT pg_replication_origin_create(1)"),
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
#: What lives in the connection, by which flag says it.
IN_THE_CONNECTION = {
    IDS: [
        *("SELECT LAST_INSERT_ID()", "SELECT @@last_insert_id", "SELECT @@identity"),
        *("SELECT @@session . identity", "SELECT @@`identity`", "SELECT s.currval"),
        *("SELECT lastval()", "SELECT currval('s')", "SELECT PREVIOUS VALUE FOR s"),
        "SELECT WSREP_LAST_WRITTEN_GTID()",
    ],
    RESULT: [
        *("SELECT ROW_COUNT ()", "SELECT row_count/**/()", "SHOW WARNINGS"),
        *("SHOW ERRORS", "show\n count(*) warnings", "SHOW PROFILE", "SHOW SESSION STATUS"),
        *("SHOW /* x */ WARNINGS", "SHOW -- x\nERRORS", "SHOW STATUS LIKE 'a'"),
        *("SELECT @@warning_count", "SELECT @@error_count", "GET DIAGNOSTICS @a = ROW_COUNT"),
    ],
    FOUND: ["SELECT FOUND_ROWS()", "SELECT found_rows/**/ ()"],
    0: [
        *("SELECT CONNECTION_ID()", "SELECT pg_backend_pid()", "SELECT last_insert_id(5)"),
        *("UPDATE t SET a = LAST_INSERT_ID(a + 1)", "SELECT @@pseudo_thread_id"),
    ],
}
NOT_IN_THE_CONNECTION = [
    *("SELECT row_count FROM t", "SHOW TABLES", "SHOW GLOBAL STATUS", "SHOW TABLE STATUS"),
    *("SELECT warnings, errors FROM t", "SELECT previous FROM t", "SELECT @@version"),
    *("SELECT connection_id, last_insert_id FROM t", "SELECT t.found_rows FROM t"),
]


def disguised(sql: str) -> list[str]:
    """The statement in other letters, and behind what may stand before it."""
    return [
        *(sql, sql.lower(), sql.swapcase(), f"{sql} ", f"\r\n\t {sql}"),
        *(f"/* x */{sql}", f"-- x\n{sql}", f"# x\r\n{sql}", f"/*+ x */ -- y\n /**/ {sql}"),
    ]


@pytest.mark.parametrize("sql", LEAVES_STATE)
def test_state(sql: str) -> None:
    for text in disguised(sql):
        assert scan(text) & STATE, text
        assert scan(text.encode("utf-8")) & STATE, text
    assert scan(f"({sql})") & STATE


@pytest.mark.parametrize("sql", LEAVES_NONE)
def test_no_state(sql: str) -> None:
    for text in (sql, sql.swapcase(), f"\n {sql} "):
        assert not scan(text) & STATE, text


@pytest.mark.parametrize(
    ("sql", "flag"), [(sql, flag) for flag, several in IN_THE_CONNECTION.items() for sql in several]
)
def test_what_is_asked_of_a_connection(sql: str, flag: int) -> None:
    for text in disguised(sql):
        assert scan(text) & (SCOPED | IDS | RESULT | FOUND) == SCOPED | flag, text
    # Asking writes nothing.
    assert sql.startswith(("GET", "UPDATE")) or not writes(scan(sql))


@pytest.mark.parametrize("sql", [*NOT_IN_THE_CONNECTION, *LEAVES_NONE])
def test_what_is_asked_of_no_connection(sql: str) -> None:
    for text in disguised(sql):
        assert not scan(text) & SCOPED, text


@pytest.mark.parametrize(
    ("sql", "kind"),
    [
        *((sql, READ) for sql in ("SELECT 1", "SHOW TABLES", "EXPLAIN SELECT 1", "TABLE t")),
        ("DELETE FROM t", 0),
        ("WITH a AS (SELECT 1) DELETE FROM t", 0),
        ("EXPLAIN ANALYZE DELETE FROM t", 0),
    ],
)
def test_what_looks_like_a_read(sql: str, kind: int) -> None:
    for text in [*disguised(sql), f"(({sql}))"]:
        assert scan(text) == kind, text


@pytest.mark.parametrize(
    "sql",
    [
        *("SELECT f(1)", "SELECT app.count(1)", 'SELECT "count"(1)', "SELECT nextval('s')"),
        *("SELECT a FROM t WHERE f (a) = 1", "SELECT f/* x */(1)", "TABLE t WHERE f()"),
        *("SELECT 1 AS a INTO t", "SELECT * INTO TABLE u FROM t", 'SELECT a INTO"u" FROM t'),
    ],
)
def test_a_read_that_calls_what_is_not_known_or_makes_a_table_may_write(sql: str) -> None:
    for text in disguised(sql):
        assert writes(scan(text)), text


@pytest.mark.parametrize("sql", [one for one in READS if one.startswith("SELECT")])
def test_a_read_writes_nothing(sql: str) -> None:
    assert not writes(scan(sql))


@pytest.mark.parametrize("length", [10, 5_000, 20_000, 100_000, 1_000_000])
def test_state_in_the_middle_of_a_long_text(length: int) -> None:
    values = "(%s)," * (length // 5)
    assert scan(f"INSERT INTO t VALUES {values}(GET_LOCK('a', 0)),{values}(%s)") & STATE
    assert scan(f"INSERT INTO t VALUES {values}(%s); SET a = 1; INSERT {values}") & STATE
    assert scan(f"INSERT INTO t VALUES {values}(LAST_INSERT_ID()),{values}(%s)") & SCOPED
    assert scan(f"INSERT INTO t VALUES {values}(%s)") == 0


def test_the_memo_is_bounded() -> None:
    kinds.clear()
    for number in range(3_000):
        scan(f"SELECT {number}, {'x' * 4_000}")
    assert sum(len(sql) for sql in kinds) <= 10_000_000
    kinds.clear()
    scan("SELECT " + "x" * 10_000)
    assert not kinds


def test_the_memo_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    assert scan("SELECT 'memo'") == scan(b"SELECT 'memo'") == READ
    monkeypatch.setattr("django_proxysql.core.statements.scan_text", None)
    assert scan("SELECT 'memo'") == scan(b"SELECT 'memo'") == READ


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
        ("SELECT get_lock|('a', 0)", STATE),
        ("CREATE| TEMP TABLE t (a int)", STATE),
        ("SELECT 1 INTO| TEMP t", STATE),
        ("SELECT last_insert_id|()", IDS),
        ("SELECT last_insert_id|(/**/)", IDS),
        ("SELECT row_count|()", RESULT),
        ("SELECT PREVIOUS| VALUE FOR s", IDS),
    ],
)
@pytest.mark.parametrize(
    "gap",
    [f"/*{'x' * 3_000}*/", "/**/" * 300, f"--{'x' * 3_000}\n", f" /**/ /*{'x' * 3_000}*/ -- x\n"],
)
def test_a_long_gap_hides_nothing(sql: str, flag: int, gap: str) -> None:
    assert scan(sql.replace("|", gap)) & flag


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
