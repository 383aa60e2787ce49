"""What a session holds: which statement takes it, which gives it back, and what follows."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from django_proxysql.core.holdings import Holdings, changes
from django_proxysql.core.statements import STATE, scan

ON = ["SET LOCAL autocommit = 1", "SET @@local.autocommit = 1", "SET `autocommit` = 'ON'"]
#: What autocommit may be set to that is 0, or may be.
OFF = ['"0"', "NOT 1", "(0)", "DEFAULT", "@before", "@@global.autocommit", "1 - 1"]
#: PostgreSQL's comments nest, and its DO runs a block of any statements.
LISTENS = [
    *("/* /* x */ y */ LISTEN jobs", "/* /* x */ y; */ SELECT 1; LISTEN jobs"),
    *("DO $$ BEGIN LISTEN jobs; END $$", "DO $$ BEGIN IF true THEN LISTEN jobs; END IF; END $$"),
    *("do 'begin null; if true then execute ''listen jobs''; end if; end'",),
    "/* /* x */ y */ DO $$ BEGIN EXECUTE format('LISTEN %I', 'jobs'); END $$",
]
#: What lives on after close_old_connections(), and how it is given back: SQL, or that and its
#: parameters.
PAIRS: list[tuple[Any, Any]] = [
    ("SELECT GET_LOCK('a', 0)", "SELECT RELEASE_LOCK('a')"),
    (("SELECT GET_LOCK(%s, %s)", ["a", 0]), ("SELECT RELEASE_LOCK(%s)", ["a"])),
    (("SELECT GET_LOCK(%s, 0)", ("a",)), "DO RELEASE_LOCK('a')"),
    ("SELECT COALESCE(GET_LOCK('a', 0), 0) AS b FROM DUAL", "DO RELEASE_LOCK('a')"),
    ("SELECT GET_LOCK('a', 0) = 1 /* from a view */", "DO RELEASE_LOCK('a')"),
    ('SELECT GET_LOCK("a", 0)', "SELECT RELEASE_LOCK('a')"),
    ("DO GET_LOCK('a', 0), GET_LOCK('b', 0)", "DO RELEASE_LOCK('b'), RELEASE_LOCK('a')"),
    ("SELECT GET_LOCK('a', 0)", "/* x */ SELECT RELEASE_LOCK('a') AS given FROM DUAL;"),
    ("SELECT pg_advisory_lock(7)", 'SELECT pg_catalog."pg_advisory_unlock"(7)::int AS "given"'),
    (("SELECT GET_LOCK(CONCAT('a', %s), 0)", [1]), ("DO RELEASE_LOCK(CONCAT('a', %s))", [1])),
    (("SELECT GET_LOCK(%(n)s, 0)", {"n": "a"}), ("SELECT RELEASE_LOCK(%(n)s)", {"n": "a"})),
    ("SELECT GET_LOCK('a', 0)", "SELECT RELEASE_ALL_LOCKS()"),
    ("SELECT id, GET_LOCK(name, 0) FROM t", "SELECT RELEASE_ALL_LOCKS()"),
    ("SELECT pg_advisory_lock(7)", "SELECT pg_advisory_unlock(7)"),
    (("SELECT pg_advisory_lock(%s, %s)", [1, 2]), ("SELECT pg_advisory_unlock(%s, %s)", [1, 2])),
    (
        "SELECT pg_try_advisory_lock(hashtext('a')::bigint)",
        "SELECT pg_advisory_unlock(hashtext('a')::bigint)",
    ),
    (
        "SELECT pg_advisory_lock(abs(hashtext('a')))",
        "SELECT pg_advisory_unlock(abs(hashtext('a')))",
    ),
    (
        "SELECT GET_LOCK(MD5(CONCAT(DATABASE(), '.a')), 0)",
        "DO RELEASE_LOCK(MD5(CONCAT(DATABASE(), '.a')))",
    ),
    ("SELECT pg_advisory_lock_shared(7)", "SELECT pg_advisory_unlock_shared(7)"),
    ("SELECT pg_advisory_lock(7)", "SELECT pg_advisory_unlock_all()"),
    ("SELECT pg_advisory_lock(7)", "SELECT pg_advisory_unlock(7), pg_advisory_unlock(8) b;"),
    ("SELECT service_get_write_locks('a', 'b', 0)", "SELECT service_release_locks('a')"),
    ("SELECT pg_advisory_lock(7)", "DISCARD ALL"),
    ("LISTEN jobs", "UNLISTEN jobs"),
    ("LISTEN jobs", "UNLISTEN *"),
    (("LISTEN %s", ["jobs"]), "UNLISTEN *"),
    ('LISTEN "jobs"', 'UNLISTEN "jobs"'),
    ("BEGIN", "COMMIT"),
    ("begin", "rollback;"),
    ("/* x */ START TRANSACTION", "ROLLBACK"),
    ("BEGIN", "END"),
    ("XA START 'x'", "XA COMMIT 'x' ONE PHASE"),
    ("COMMIT AND CHAIN", "COMMIT AND NO CHAIN"),
    ("SET autocommit = 0", "SET autocommit=1"),
    (("SET autocommit = %s", [0]), "SET @@session.autocommit = TRUE;"),
    *((f"SET autocommit = {off}", "SET autocommit = on") for off in OFF),
    ("SET SESSION autocommit = OFF", "SET autocommit = ON"),
    *(("SET autocommit = 0", on) for on in ON),
    ("SET SESSION wsrep_on = OFF", "SET SESSION wsrep_on = ON"),
    ("SET wsrep_on = 0", "SET @@session.wsrep_on=1;"),
    ("LOCK TABLES t WRITE", "UNLOCK TABLES"),
    ("LOCK TABLE t READ", "UNLOCK TABLES"),
    ("FLUSH TABLES WITH READ LOCK", "UNLOCK TABLES"),
    ("FLUSH TABLES t FOR EXPORT", "UNLOCK TABLES"),
    ("BACKUP STAGE START", "BACKUP STAGE END"),
    (
        "SELECT pg_create_physical_replication_slot('s', true, true)",
        "SELECT pg_drop_replication_slot('s')",
    ),
    ("SELECT pg_backup_start('x')", "SELECT * FROM pg_backup_stop()"),
]
#: Calls that may be run or not.
MAYBE = [
    *("SELECT RELEASE_LOCK('a') FROM t", "SELECT RELEASE_LOCK('a') WHERE 1 = 0"),
    *("SELECT IF(b, RELEASE_LOCK('a'), 0)", "SELECT 0 AND RELEASE_LOCK('a')"),
    *("DO CASE WHEN @b THEN RELEASE_LOCK('a') END", "SELECT RELEASE_LOCK('a') LIMIT 0"),
    *("SELECT 1 FROM t WHERE RELEASE_LOCK('a')", "SELECT IF(0, RELEASE_ALL_LOCKS(), 1)"),
    "UPDATE t SET a = RELEASE_LOCK('a') WHERE b = 1",
]
#: One call takes a lock as often as there are rows.
FOR_EACH_ROW = [
    *("SELECT GET_LOCK('a', 0) FROM t", "SELECT id FROM t WHERE GET_LOCK('a', 0)"),
    *("UPDATE t SET b = GET_LOCK('a', 0)", "INSERT INTO t SELECT GET_LOCK('a', 0) FROM u"),
]
FOR_EACH_ROW_OF_POSTGRESQL = [
    *("SELECT pg_advisory_lock(7) FROM t", "SELECT pg_advisory_lock(7), generate_series(1, 3)"),
    "DO $$ BEGIN FOR i IN 1..3 LOOP PERFORM pg_advisory_lock(7); END LOOP; END $$",
]
#: Something else is given back, or nothing is sure to be.
NO_PAIRS: list[tuple[Any, Any]] = [
    ("SELECT GET_LOCK('a', 0)", "SELECT RELEASE_LOCK('b')"),
    (("SELECT GET_LOCK(%s, 0)", ["a"]), ("SELECT RELEASE_LOCK(%s)", ["b"])),
    ("SELECT GET_LOCK(name, 0) FROM t", "SELECT RELEASE_LOCK(name) FROM t"),
    *((takes, "SELECT RELEASE_LOCK('a')") for takes in FOR_EACH_ROW),
    *((takes, "SELECT pg_advisory_unlock(7)") for takes in FOR_EACH_ROW_OF_POSTGRESQL),
    *(("SELECT GET_LOCK('a', 0)", gives) for gives in MAYBE),
    ("SELECT pg_advisory_lock(7)", "SELECT pg_advisory_unlock(7) FROM t WHERE a = 1"),
    ("SELECT GET_LOCK('a', 0)", "COMMIT"),
    ("SELECT GET_LOCK('a', 0)", "SELECT 'RELEASE_LOCK'"),
    ("SELECT GET_LOCK('a', 0)", "SELECT 1; SELECT RELEASE_LOCK('a')"),
    ("SELECT pg_advisory_lock(id) FROM t", "SELECT pg_advisory_unlock(id) FROM t WHERE id = 1"),
    ("SELECT pg_advisory_lock(7)", "SELECT pg_advisory_unlock_shared(7)"),
    ("LISTEN jobs", "UNLISTEN others"),
    ("BEGIN", "ROLLBACK TO SAVEPOINT a"),
    ("BEGIN", "ROLLBACK\nTO a"),
    ("BEGIN", "COMMIT PREPARED 'x'"),
    ("BEGIN", "COMMIT AND CHAIN"),
    ("BEGIN", "/*!999999 COMMIT */"),
    # MySQL runs what stands in these comments.
    ("/*! BEGIN */", "SELECT 1"),
    ("/* x */ /*!50000 START TRANSACTION */", "SELECT 1"),
    ("BEGIN; INSERT INTO t VALUES ('; COMMIT')", "SELECT 1"),
    ("SET autocommit = 0", "COMMIT"),
    ("SET wsrep_on = OFF", "SET sql_mode = ''"),
    # It is in a value, or is not run now.
    ("SELECT pg_advisory_lock(7)", "INSERT INTO t VALUES ('pg_advisory_unlock(7)')"),
    ("SELECT pg_advisory_lock(7)", "SELECT 'pg_advisory_unlock_all()'"),
    ("SELECT pg_advisory_lock(7)", "SELECT COALESCE(true, pg_advisory_unlock(7))"),
    ("SELECT pg_advisory_lock(7)", "PREPARE p AS SELECT pg_advisory_unlock(7)"),
    ("SELECT GET_LOCK('a', 0)", """SELECT "RELEASE_LOCK('a')" """),
    ("SELECT service_get_write_locks('a', 'b', 0)", "SELECT service_release_locks('b')"),
    ('LISTEN "a""b"', 'UNLISTEN "a""c"'),
    (("LISTEN %s", ["a"]), ("UNLISTEN %s", ["b"])),
    # PostgreSQL's documentation of DISCARD does not have these.
    ("SELECT pg_create_physical_replication_slot('s', true, true)", "DISCARD ALL"),
    ("SELECT pg_backup_start('x')", "DISCARD ALL"),
]
#: Something is taken beside what has a name, and not given back with that.
TOGETHER: list[tuple[Any, Any]] = [
    ("BEGIN; SET work_mem = '8MB'", "COMMIT"),
    ("SELECT pg_advisory_lock(7), set_config('a.b', 'c', false)", "SELECT pg_advisory_unlock(7)"),
    ("CREATE TEMP TABLE t AS SELECT pg_advisory_lock(7)", "SELECT pg_advisory_unlock(7)"),
    ("SELECT '/*', set_config('a.b', 'c', false), pg_advisory_lock(7), '*/'", "DISCARD ALL"),
    ("SET work_mem = '8MB'; LISTEN jobs", "UNLISTEN jobs"),
    ("PREPARE p AS SELECT pg_advisory_unlock(7)", "SELECT 1"),
    ("SET SESSION autocommit = OFF, sql_mode = ''", "SET autocommit = ON"),
    ("SET sql_mode = '', wsrep_on = @before", "SET @@session.wsrep_on=1;"),
    ("SELECT @a := 1, GET_LOCK('a', 0)", "DO RELEASE_LOCK('a')"),
]
FOR_THE_REQUEST = [
    *("SET @a = 1", "SET time_zone = 'UTC'", "SET ROLE a", "USE app", "PREPARE p FROM 'SELECT 1'"),
    *("CREATE TEMPORARY TABLE t (a int)", "HANDLER t OPEN", "CALL p()", "SELECT set_limit(0.5)"),
    # It is on; read; another session's.
    *("SET autocommit = 1, sql_mode = ''", "SET sql_mode = '', @@autocommit = ON, @a = 1"),
    *("SET @OLD_AUTOCOMMIT=@@AUTOCOMMIT", "SET GLOBAL autocommit = 0", "SET PERSIST wsrep_on=0"),
    *("UPDATE pg_settings SET setting = 'off' WHERE name = 'jit'", "DO $$ BEGIN END $$"),
]


def run(holdings: Holdings, statement: Any, params: Any = None) -> None:
    sql, params = statement if isinstance(statement, tuple) else (statement, params)
    if scan(sql) & STATE:
        holdings.sent(sql, params)
    holdings.answered(sql, params)


@pytest.mark.parametrize(("takes", "gives"), PAIRS)
def test_what_is_taken_stays_until_it_is_given_back(takes: Any, gives: Any) -> None:
    holdings = Holdings()
    run(holdings, takes)
    assert holdings
    assert not holdings.for_request
    holdings.end_request()
    assert holdings
    run(holdings, gives)
    assert not holdings


@pytest.mark.parametrize("sql", LISTENS)
def test_a_listen_is_held_wherever_it_stands(sql: str) -> None:
    holdings = Holdings()
    run(holdings, sql)
    holdings.end_request()
    assert holdings
    run(holdings, "UNLISTEN *")
    assert not holdings


@pytest.mark.parametrize(("takes", "gives"), NO_PAIRS)
def test_what_is_not_surely_given_back_is_held(takes: Any, gives: Any) -> None:
    holdings = Holdings()
    run(holdings, takes)
    run(holdings, gives)
    holdings.end_request()
    assert holdings


@pytest.mark.parametrize(("takes", "gives"), TOGETHER)
def test_what_is_taken_together_is_not_given_back_with_one_of_it(takes: Any, gives: Any) -> None:
    holdings = Holdings()
    run(holdings, takes)
    run(holdings, gives)
    assert holdings.for_request


@pytest.mark.parametrize(
    ("ends", "stands"),
    [
        # By Django.
        ([], True),
        ([], False),
        (["COMMIT"], True),
        ([b"END"], True),
        (["ROLLBACK"], False),
        (["ABORT"], False),
        (["ROLLBACK TO SAVEPOINT a", "COMMIT"], False),
        (["COMMIT AND CHAIN", "COMMIT"], True),
    ],
)
@pytest.mark.parametrize("in_block", [False, True])
@pytest.mark.parametrize("unlisten", ["UNLISTEN jobs", "UNLISTEN *"])
def test_a_listen_that_is_given_back_in_a_transaction_is_when_that_stands(
    ends: list[Any], stands: bool, in_block: bool, unlisten: str
) -> None:
    holdings = Holdings()
    for sql in ("LISTEN jobs", *([] if in_block else ["BEGIN"]), "SAVEPOINT a"):
        run(holdings, sql)
    holdings.answered(unlisten, None, in_transaction=in_block)
    assert holdings
    for sql in ends:
        run(holdings, sql)
    holdings.transaction_ended(stands or bool(ends))
    holdings.end_request()
    assert bool(holdings) is not stands


def test_a_listen_is_held_that_comes_after_what_gives_it_back() -> None:
    holdings = Holdings()
    for sql in ("LISTEN jobs", "UNLISTEN jobs", "LISTEN jobs"):
        holdings.sent(sql, None)
        holdings.answered(sql, None, in_transaction=True)
    holdings.transaction_ended(stands=True)
    assert holdings


@pytest.mark.parametrize("sql", FOR_THE_REQUEST)
def test_what_is_held_for_a_request_ends_with_it(sql: str) -> None:
    holdings = Holdings()
    run(holdings, sql)
    assert holdings
    holdings.end_request()
    assert not holdings
    assert holdings.earlier


def test_a_lock_that_was_taken_twice_is_given_back_twice() -> None:
    holdings = Holdings()
    for _ in range(2):
        run(holdings, "SELECT GET_LOCK('a', 0)")
        run(holdings, "BEGIN")
    run(holdings, "COMMIT")
    run(holdings, "SELECT RELEASE_LOCK('a')")
    assert holdings.for_life == {"lock 'a'": 1}
    run(holdings, "SELECT RELEASE_LOCK('a')")
    assert not holdings


def test_a_statement_that_failed_gives_nothing_back() -> None:
    """The lock may be held still: only an answer gives it back."""
    holdings = Holdings()
    run(holdings, "SELECT GET_LOCK('a', 0)")
    holdings.sent("SELECT RELEASE_LOCK('a')", None)
    assert holdings


#: What no server understands, or what is no text.
ODD = [None, 1, object(), b"\xff", "%s", "'", "GET_LOCK(", "GET_LOCK('a"]
#: Were its parts read again for each of them, a test would take minutes.
LONG = [
    *(f"SELECT GET_LOCK({name}, 0)" for name in ("1" * 5_000, "1" * 5_000 + "x", "'" * 5_001)),
    f"SELECT GET_LOCK({'(' * 5_000}, 0)",
    f"SELECT {'get_lock(%s' * 4_000}",
    f"SELECT get_lock({'::aaaaaa(' * 40}!)",
    f"SELECT pg_advisory_lock{'/* ' * 20_000}",
    f"FLUSH {'TABLE ' * 8_000}",
]


@pytest.mark.parametrize("sql", [*ODD, *LONG], ids=itertools.count())
def test_any_text_is_read_at_once_and_without_an_error(sql: Any) -> None:
    assert all(takes for takes, _name in changes(sql, None))
    list(changes(sql, [1]))


@pytest.mark.parametrize(
    ("sql", "taken"),
    [
        ("SELECT get_lock('a', 1), get_lock('a', 1)", ["lock 'a'", "lock 'a'"]),
        # What looks like a comment hides no lock.
        ("SELECT '--', pg_advisory_lock(7)\nFROM t", ["lock 7", "lock for each row"]),
        ("SELECT '/*', pg_advisory_lock(7), '*/'", ["lock 7"]),
        ("SELECT a #> '{b}', pg_advisory_lock(7)\nFROM t", ["lock 7", "lock for each row"]),
        # MySQL's comment goes on to the line's end, PostgreSQL's ends here.
        ("SELECT 1 -- x\r, pg_advisory_lock(7)\n", ["lock 7"]),
        ("-- x\rSELECT 1;\nSELECT get_lock('a', 0)", ["lock 'a'"]),
        # What one server takes for a comment gives no lock back.
        ("-- x\rSELECT release_lock('a')\n", []),
        ("-- x\rSELECT 1\nSELECT release_lock('a')", []),
    ],
)
def test_what_a_text_takes_is_seen_beside_comments(sql: str, taken: list[str]) -> None:
    assert list(changes(sql)) == [(True, name) for name in taken]


def test_parameters_that_cannot_be_read_give_nothing_back() -> None:
    holdings = Holdings()
    run(holdings, "SELECT GET_LOCK(%s, 0)", iter(["a"]))
    run(holdings, "SELECT RELEASE_LOCK(%s)", iter(["a"]))
    assert holdings


def all_holdings() -> list[Holdings]:
    found = []
    for for_request, for_life, by_django, earlier in itertools.product(
        (False, True), ({}, {"lock 'a'": 1}), (False, True), (False, True)
    ):
        holdings = Holdings()
        holdings.for_request, holdings.by_django = for_request, by_django
        holdings.for_life, holdings.earlier = dict(for_life), earlier
        found.append(holdings)
    return found


def test_a_copy_tells_what_is_missing_later() -> None:
    for before, after in itertools.product(all_holdings(), repeat=2):
        has_all = (
            after.for_request >= before.for_request
            and after.by_django >= before.by_django
            and after.for_life.keys() >= before.for_life.keys()
        )
        assert after.include(before.all()) is has_all


def test_a_lock_beside_a_comment_is_taken_and_given_back_once() -> None:
    held = Holdings()
    held.sent("SELECT pg_advisory_lock(7) /* x */ -- y\n", None)
    assert list(held.for_life.values()) == [1]
    held.answered("SELECT pg_advisory_unlock(7) /* x */", None)
    assert not held
