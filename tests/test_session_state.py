"""What a session holds is never lost without an error; one that holds nothing may be replaced."""

from __future__ import annotations

from typing import Any
from unittest import mock

import django
import psycopg
import pytest
from django.db import OperationalError, connections, transaction
from django.db.backends.signals import connection_created
from django.db.utils import Error
from psycopg import sql

from tests.fakes import running
from tests.servers import DATABASE
from tests.site import Site
from tests.stories import Narrator, attempts, tell, told
from tests.test_holdings import LISTENS

#: What lives on after close_old_connections(), until it is given back.
FOR_LIFE = {
    "mariadb": [
        "SELECT GET_LOCK('a', 0)",
        "BEGIN",
        "SET autocommit = 0",
        "SET autocommit = NOT 1",
        "LOCK TABLES app_token WRITE",
        "FLUSH TABLES WITH READ LOCK",
        "START TRANSACTION",
        "XA START 'x'",
    ],
    "postgres": [
        "SELECT pg_advisory_lock(7)",
        "BEGIN",
        "LISTEN jobs",
        "SELECT pg_create_physical_replication_slot('of_a_test', true, true)",
    ],
}
FOR_THE_REQUEST = {
    "mariadb": [
        *("SET @a = 1", "SELECT @a := 1", "SET SESSION sort_buffer_size = 262144"),
        *("SET NAMES utf8mb4", "CREATE TEMPORARY TABLE t (id int)", "HANDLER app_token OPEN"),
        *("PREPARE p FROM 'SELECT 1'", "USE app", "CALL p()"),
    ],
    "postgres": [
        *("SELECT set_config('work_mem', '8MB', false)", "SET work_mem = '8MB'", "SET ROLE app"),
        *("CREATE TEMPORARY TABLE t (id int)", "CREATE TEMP TABLE t (id int)"),
        *("PREPARE p AS SELECT 1",),
    ],
}
QUESTIONS = {
    "mariadb": [
        *("SELECT LAST_INSERT_ID()", "SELECT FOUND_ROWS()", "SELECT ROW_COUNT()"),
        *("SHOW WARNINGS", "SHOW ERRORS", "SELECT @@identity", "SELECT CONNECTION_ID()"),
    ],
    "postgres": ["SELECT lastval()"],
}
DEADLOCK = "SIGNAL SQLSTATE '40001' SET MYSQL_ERRNO = 1213, MESSAGE_TEXT = 'Deadlock found'"
#: A loss is raised once.
SHOWN = "!SELECT 1; SELECT 2; replayed 0"


def each(held: dict[str, list[str]], promise: str, story: str) -> dict[str, Any]:
    """Return the rows of a story that each statement begins, on the server that it is for."""
    return {
        f"{promise}: {statement}": f"{server}: {statement}; {story}"
        for server, statements in held.items()
        for statement in statements
    }


STORIES = {
    **each(
        {server: [*FOR_LIFE[server], *FOR_THE_REQUEST[server]] for server in FOR_LIFE},
        "loss is one error, however safe the statement, and what is new holds nothing",
        f"kill_idle; {SHOWN}; write after; read after; kill_idle; SELECT 3; replayed 0",
    ),
    **each(FOR_LIFE, "loss between requests is shown", f"request_ends; kill_idle; {SHOWN}"),
    **each(
        FOR_LIFE, "loss found at a request's end is shown", f"kill; dead; request_ends; {SHOWN}"
    ),
    # After an error Django asks whether the connection is usable, and closes it if not.
    **each(FOR_LIFE, "loss found by Django is shown", f"kill; erred; request_ends; {SHOWN}"),
    **each(FOR_LIFE, "loss found by the health check is shown", f"kill; health_check; {SHOWN}"),
    **each(
        FOR_LIFE,
        "drained peer is not left",
        "request_ends; drain; SELECT 1; request_ends; SELECT 1; stays",
    ),
    **each(
        FOR_LIFE,
        "peer whose circuit opens is not left",
        "request_ends; open; SELECT 1; request_ends; SELECT 1; stays",
    ),
    **each(
        FOR_LIFE,
        "max age ends the connection, as with the plain engine",
        "aged; request_ends; SELECT 1; other",
    ),
    **each(FOR_THE_REQUEST, "held until the request ends", "request_ends; kill_idle; SELECT 1"),
    "loss of a lock is one error before a block": (
        "all: LOCK; kill; !{ write one }; written; { write two }; written two"
    ),
    "loss found when the holder has gone is no error": (
        "mariadb: SET @a = 1; kill; request_ends; idle; SELECT 1"
    ),
    "constraint checks that are off are not lost": (
        "mariadb: !unchecked { kill; write one }; written; write two; kill; "
        "unchecked { write three }; kill; write four; written two three four"
    ),
    "connection that threads share is not replaced": (
        "all: shared { kill_idle; !SELECT 1 }; SELECT 1"
    ),
    # What is given back is held no more.
    "lock that was given back": (
        "mariadb: SELECT GET_LOCK('a', 0); SELECT RELEASE_LOCK('a'); kill_idle; SELECT 1"
    ),
    "answer about a lock is the application's, where a cursor does not go back": (
        "mariadb: SELECT GET_LOCK('a', 0); answer 1; held",
        {"unbuffered": True},
    ),
    "transaction by hand ends with rollback()": "all: BEGIN; rollback; kill_idle; SELECT 1",
    "transaction by SQL ends with COMMIT": (
        "all: BEGIN; read; write one; COMMIT; free; kill_idle; SELECT 1"
    ),
    "channel given back in a block": (
        "postgres: LISTEN jobs; { UNLISTEN jobs }; SELECT pg_listening_channels(); answer; free"
    ),
    "channel that a rollback takes again": (
        "postgres: LISTEN jobs; undone { UNLISTEN jobs }; SELECT pg_listening_channels(); "
        "answer jobs; held"
    ),
    "channel that a savepoint's rollback takes again": (
        "postgres: LISTEN jobs; { undone { UNLISTEN jobs } }; SELECT pg_listening_channels(); "
        "answer jobs; held"
    ),
    "channel that a COMMIT takes again which rolls back": (
        "postgres: LISTEN jobs; { UNLISTEN jobs; !SELECT 1 / 0 }; SELECT pg_listening_channels(); "
        f"answer jobs; kill_idle; {SHOWN}"
    ),
    "channel that a COMMIT by hand takes again which rolls back": (
        "postgres: LISTEN jobs; BEGIN; UNLISTEN jobs; !SELECT 1 / 0; COMMIT; "
        f"SELECT pg_listening_channels(); answer jobs; request_ends; kill_idle; {SHOWN}"
    ),
    "lock that no row has given back": (
        "postgres: SELECT pg_advisory_lock(7); SELECT pg_advisory_unlock(7) FROM app_token; "
        f"request_ends; kill_idle; {SHOWN}"
    ),
    "lock that a value names is not given back": (
        "postgres: SELECT pg_advisory_lock(7); SELECT 'pg_advisory_unlock(7)'; request_ends; "
        f"kill_idle; {SHOWN}"
    ),
    "setting that was made together with a lock": (
        "postgres: SELECT pg_advisory_lock(7), set_config('work_mem', '8MB', false); "
        f"SELECT pg_advisory_unlock(7); SHOW work_mem; answer 8MB; kill_idle; {SHOWN}"
    ),
    "replication slot that DISCARD leaves alone": (
        "postgres: SELECT pg_create_physical_replication_slot('of_a_test', true, true); "
        f"DISCARD ALL; SELECT slot_name FROM pg_replication_slots; answer of_a_test; kill_idle; "
        f"{SHOWN}"
    ),
    "table that is temporary by a search_path of the transaction's": (
        "postgres: { SET LOCAL search_path TO pg_temp; CREATE TABLE t (id int) }; "
        f"SELECT count(*) FROM t; answer 0; kill_idle; {SHOWN}"
    ),
    "search_path of a transaction's is no state": (
        "postgres: { SET LOCAL search_path TO public, pg_temp }; free"
    ),
    "lock of a transaction is no state": (
        "postgres: { SELECT pg_advisory_xact_lock(7) }; kill_idle; SELECT 1"
    ),
    **{
        f"column {name} is no state": (
            f"all: SELECT {name} FROM (SELECT 1 AS {name}) AS t; free; kill_idle; SELECT 1"
        )
        for name in ("temp", "connection_id", "get_lock")
    },
    # A peer whose circuit another thread has opened is left where that can do no harm.
    "peer is left before a transaction": "all: open; { left; write one }; written one",
    "peer is not left inside a transaction": (
        "all: { write one; open; write two; stays }; written one two"
    ),
    "peer is left after a write when the connection has idled": (
        "all: write one; open; read; stays; idle; read; left"
    ),
    "peer is not left with session state": "all: HOLD; open; SELECT 1; stays",
    # Answers that live in one connection are asked of no other.
    **{
        f"answer is not asked of another: {question}": (
            f"{server}: write one; kill_idle; !{question}; SELECT 1"
        )
        for server, questions in QUESTIONS.items()
        for question in questions
    },
    "answer that is lost is not asked again": "all: write one; CUT; !ASK; replayed 0",
    "answers after a replayed read": "all: write one; cut after; read one; asks",
    "answers after a replaced connection": "all: write one; kill_idle; read one; asks",
    "answers after a drain": "all: write one; idle; drain; read one; left; asks",
    "answers after a loss that was raised": (
        "all: write one; !{ SELECT value FROM app_token FOR UPDATE; kill; read }; read; asks"
    ),
    "answers after a replayed write": (
        "all: { cut after; write one; replayed 1 }; kill_idle; read one; asks"
    ),
    "answers inside a block": "all: write one; kill_idle; { read; unanswered }",
    "procedure that was called may hold anything": f"mariadb: call p; kill_idle; {SHOWN}",
    "update answers for its rows only": (
        "mariadb: write one; kill_idle; UPDATE app_token SET value = 'two'; SELECT ROW_COUNT(); "
        "answer 1; !ASK"
    ),
    "value of a sequence that an insert has not taken": (
        "mariadb: SELECT NEXTVAL(of_a_test); kill_idle; write one; !SELECT LASTVAL(of_a_test); "
        "!SELECT PREVIOUS VALUE FOR of_a_test; ASK; write two; !SELECT LASTVAL(of_a_test); "
        "SELECT NEXTVAL(of_a_test); "
        "SELECT LASTVAL(of_a_test) > 1; answer 1"
    ),
    # A block's COMMIT ends what SQL began before it, whatever the block does.
    **{
        f"block in what {begins} began ends no better than that, {how}": (
            f"mariadb: {begins}; write one; {marks}{{ {loss} }}; written{stands}; SELECT 1"
        )
        for begins in ("BEGIN", "SET autocommit = 0")
        for how, loss, marks, stands in (
            ("lost before", "kill", "!", ""),
            ("lost at COMMIT", "cut after", "!!", " one"),
        )
    },
    # Django asks once more, and closes what it finds lost.
    "loss between two questions at a request's end is shown": (
        f"mariadb: !RELEASE SAVEPOINT none; BEGIN; write one; cut reply 2; request_ends; {SHOWN}"
    ),
    "rows that were found on another connection": (
        "mariadb: SELECT SQL_CALC_FOUND_ROWS 5; kill_idle; write one; !SELECT FOUND_ROWS(); "
        "SHOW TABLES; !SELECT FOUND_ROWS(); read one; SELECT FOUND_ROWS(); answer 1"
    ),
    "rows that were found before the engine asks for an id": (
        "mariadb: write one; kill_idle; write two; read one two; "
        "INSERT INTO app_token (value) SELECT LAST_INSERT_ID(); !SELECT FOUND_ROWS()"
    ),
    "warnings of a read that was run again": (
        "mariadb: cut after; SELECT 1/0; replayed 1; !SHOW WARNINGS; write one; SELECT 1/0; "
        "SELECT @@warning_count; answer 1"
    ),
    # An INSERT need not make an id: a new connection's answer would be 0.
    "id that an insert has not made": (
        "mariadb: write one; kill_idle; INSERT INTO app_token VALUES (-1, 'two'); !ASK; "
        "!SELECT @@identity; SELECT ROW_COUNT(); write three; "
        "SELECT LAST_INSERT_ID() = MAX(id) FROM app_token; answer 1"
    ),
    "nothing was written in the next request": (
        "mariadb: write one; kill_idle; read; request_ends; ASK; answer 0"
    ),
    "who am I is answered": "all: write one; kill_idle; read; WHO",
}


@told(STORIES)
def test_story(request: Any, server: str, settings: dict[str, Any], text: str) -> None:
    node = request.getfixturevalue(server)
    if server == "mariadb":
        node.sql("CREATE OR REPLACE PROCEDURE p() DO 1", database=DATABASE)
        node.sql("CREATE OR REPLACE SEQUENCE of_a_test", database=DATABASE)
        node.sql("GRANT RELOAD, EXECUTE ON *.* TO 'app'@'%'")
    elif "slot" in text:
        node.sql("ALTER ROLE app REPLICATION")
    tell(request, server, settings, text)


def test_what_receivers_set_is_no_state(on_mariadb: Site, receive: Any) -> None:
    """What is set up at each connect is set up again on the next one."""

    def set_up(sender: Any, connection: Any, **_: Any) -> None:
        if connection is on_mariadb.connection:
            with connection.cursor() as cursor:
                cursor.execute("SET @receiver = 5")

    receive(connection_created, set_up)
    Narrator(on_mariadb).tell("connect; SELECT 1; kill_idle; SELECT 1; SELECT @receiver; answer 5")


def test_a_lock_that_callproc_takes_is_held(on_postgres: Site) -> None:
    """PostgreSQL's functions are called so."""
    with on_postgres.connection.cursor() as cursor:
        cursor.callproc("pg_advisory_lock", [7])
    narrator = Narrator(on_postgres)
    narrator.tell(f"request_ends; held; kill_idle; {SHOWN}")
    with on_postgres.connection.cursor() as cursor:
        cursor.callproc("pg_advisory_lock", [7])
        cursor.callproc("pg_advisory_unlock", [7])
    narrator.tell("request_ends; free; write one; kill_idle; read")
    with (
        on_postgres.connection.cursor() as cursor,
        pytest.raises(OperationalError, match="replaced"),
    ):
        cursor.callproc("lastval")


OF_PSYCOPG_3 = pytest.mark.skipif(django.VERSION < (4, 2), reason="Django connects by psycopg2")


@OF_PSYCOPG_3
@pytest.mark.parametrize(
    ("takes", "gives"),
    [
        (sql.SQL("LISTEN {}").format(sql.Identifier("jobs")), "UNLISTEN jobs"),
        ("LISTEN jobs", sql.SQL("UNLISTEN {}").format(sql.SQL("jobs"))),
        (
            sql.SQL("SELECT pg_advisory_lock({})").format(sql.Literal(7)),
            sql.SQL("SELECT pg_advisory_unlock({})").format(sql.Literal(7)),
        ),
    ],
)
def test_what_a_composed_statement_takes_is_held(on_postgres: Site, takes: Any, gives: Any) -> None:
    narrator = Narrator(on_postgres)
    on_postgres.sql(takes)
    narrator.tell(f"request_ends; held; kill_idle; {SHOWN}")
    on_postgres.sql(takes)
    on_postgres.sql(gives)
    narrator.tell("request_ends; SELECT count(*) FROM pg_listening_channels(); answer 0; kill_idle")


def template(*parts: Any) -> Any:
    """Return t"…" of Python 3.14 and psycopg 3.3, or on an older Python what psycopg takes for it.

    :param parts: texts, and pairs of a value and its format.
    """
    compat = pytest.importorskip("psycopg._compat")
    if not hasattr(compat, "Template"):
        pytest.skip("needs psycopg 3.3")
    made = [
        part if isinstance(part, str) else compat.Interpolation(part[0], "", None, part[1])
        for part in parts
    ]
    if compat.Template.__module__ == "string.templatelib":
        return compat.Template(*made)
    interpolations = tuple(part for part in made if not isinstance(part, str))
    contents = {"interpolations": interpolations, "__iter__": lambda self: iter(made)}
    return object.__new__(type("Template", (compat.Template,), contents))


@OF_PSYCOPG_3
def test_what_a_template_string_takes_is_held(on_postgres: Site) -> None:
    narrator = Narrator(on_postgres)
    on_postgres.sql(template("LISTEN ", ("jobs", "i")))
    narrator.tell(f"request_ends; held; kill_idle; {SHOWN}")
    on_postgres.sql(template("SELECT pg_advisory_lock(", (7, ""), ")"))
    on_postgres.sql("SELECT pg_advisory_unlock(7)")
    narrator.tell("request_ends; free")
    with transaction.atomic(on_postgres.connection.alias):
        on_postgres.sql(template("INSERT INTO app_token (value) VALUES (", ("one", ""), ")"))
        assert on_postgres.connection._transaction.is_whole
    assert on_postgres.read() == ["one"]
    # It is no read that would be run again.
    on_postgres.cut("reply")
    with pytest.raises(OperationalError):
        on_postgres.sql(template("SELECT ", (1, "")))


@OF_PSYCOPG_3
def test_a_statement_that_cannot_be_read_may_have_taken_anything(on_postgres: Site) -> None:
    """Not psycopg's: what another driver makes of an object of its own."""

    class Unreadable:
        def __init__(self, text: str) -> None:
            self.text = text

    def run(cursor: Any, statement: Any, *args: Any) -> Any:
        return plain(cursor, getattr(statement, "text", statement), *args)

    plain = psycopg.Cursor.execute
    with mock.patch.object(psycopg.Cursor, "execute", run):
        on_postgres.sql(Unreadable("LISTEN jobs"))
    Narrator(on_postgres).tell(f"request_ends; held; kill_idle; {SHOWN}")


@OF_PSYCOPG_3
def test_what_a_composed_statement_sets_for_its_transaction_ends_with_it(on_postgres: Site) -> None:
    with transaction.atomic(on_postgres.connection.alias):
        on_postgres.sql(sql.SQL("SET LOCAL search_path = {}").format(sql.Literal("tenant")))
        assert not on_postgres.connection._transaction.may_be_read_only
    assert not on_postgres.session.holds


def test_a_lock_that_was_taken_for_each_row_is_held_until_all_are_given_back(here: Site) -> None:
    lock, unlock, unlock_all = (
        ("GET_LOCK('a', 0)", "RELEASE_LOCK('a')", "RELEASE_ALL_LOCKS()")
        if here.is_mysql
        else ("pg_try_advisory_lock(7)", "pg_advisory_unlock(7)", "pg_advisory_unlock_all()")
    )
    for value in ("one", "two"):
        here.write(value)
    here.sql(f"SELECT {lock} FROM app_token")
    here.sql(f"SELECT {unlock}")
    assert not here.plainly(f"SELECT {lock}")[0][0]
    narrator = Narrator(here)
    narrator.tell("request_ends; held")
    here.sql(f"SELECT {unlock_all}")
    narrator.tell("free")
    assert here.plainly(f"SELECT {lock}")[0][0]


@pytest.mark.parametrize("takes", LISTENS)
def test_a_listen_is_held_wherever_it_stands(on_postgres: Site, takes: str) -> None:
    on_postgres.sql(takes)
    assert on_postgres.sql("SELECT pg_listening_channels()") == [("jobs",)]
    Narrator(on_postgres).tell(f"request_ends; held; kill_idle; {SHOWN}")


@pytest.mark.parametrize("alone", [True, False])
def test_a_lock_that_was_not_granted_is_not_held(here: Site, alone: bool) -> None:
    """One who asks for a lock again and again, in vain, stays free to leave a peer."""
    lock = "GET_LOCK('a', 0)" if here.is_mysql else "pg_try_advisory_lock(7)"
    with here.plain.cursor() as cursor:
        cursor.execute(f"SELECT {lock}")
        cursor.fetchall()
    try:
        ((granted, *_),) = here.sql(f"SELECT {lock}" if alone else f"SELECT {lock}, 1")
        assert not granted
        assert bool(here.session.holds) is not alone
    finally:
        here.plain.close()


def test_a_lock_that_was_granted_is_held(here: Site) -> None:
    lock = "GET_LOCK(%s, 0)" if here.is_mysql else "pg_try_advisory_lock(%s)"
    name: Any = "7" if here.is_mysql else 7
    assert here.sql(f"SELECT {lock} AS granted", [name]) in ([(1,)], [(True,)])
    assert here.session.holds


class TestServerSideCursor:
    """What ``iterator()`` runs is a statement like any other."""

    def test_a_lock_that_it_takes_is_held(self, on_postgres: Site) -> None:
        connection = on_postgres.connection
        with transaction.atomic(connection.alias), connection.chunked_cursor() as cursor:
            cursor.execute("SELECT pg_advisory_lock(%s)", [7])
            cursor.fetchall()
        Narrator(on_postgres).tell(f"request_ends; kill_idle; {SHOWN}")

    def test_it_asks_no_other_connection(self, on_postgres: Site) -> None:
        Narrator(on_postgres).tell("write one; kill_idle; read")
        cursor = on_postgres.connection.chunked_cursor()
        with pytest.raises(OperationalError, match="replaced"):
            cursor.execute("SELECT lastval()")
        cursor.close()


def test_many_updates_answer_for_their_rows_only(on_mariadb: Site) -> None:
    narrator = Narrator(on_mariadb)
    narrator.tell("write one; kill_idle")
    with on_mariadb.connection.cursor() as cursor:
        cursor.executemany("UPDATE app_token SET value = %s", [["two"]])
    narrator.tell("SELECT ROW_COUNT(); answer 1; !ASK; many three; ASK")
    assert narrator.rows != [(0,)]


class TestPinned:
    def test_to_the_present_peer(self, here: Site) -> None:
        with here.balancer.pinned():
            narrator = Narrator(here)
            narrator.tell("read; open; read; stays")
            here.connection.close()
            here.read()
            assert here.connection.peer is narrator.peer

    @pytest.mark.parametrize("chosen", [True, False])
    def test_to_another(self, here: Site, chosen: bool) -> None:
        """A connection to a peer that is out, unused in the block, decides nothing."""
        other = next(p for p in here.balancer.peers.values() if p is not here.connection.peer)
        if not chosen:
            here.connection.peer.breaker.open()
        with here.balancer.pinned(*[other] * chosen):
            here.read()
            assert here.connection.peer is other


def test_a_peer_that_another_thread_finds_gone_is_left(here: Site) -> None:
    """A peer that is gone is asked once, by one thread; the others do not ask it."""
    here.read()
    mine = here.connection.peer

    def other() -> None:
        wrapper = connections[here.connection.alias]
        try:
            with here.balancer.pinned(mine):
                wrapper.ensure_connection()
                here.here.refuse()
                wrapper.close()
                with pytest.raises(OperationalError):
                    wrapper.ensure_connection()
        finally:
            wrapper.close()

    with running(other):
        pass
    here.read()
    assert here.connection.peer is not mine


def test_a_replaced_connection_is_counted_where_it_leads_and_leaves_none_open(here: Site) -> None:
    Narrator(here).tell("read; kill_idle; read; cut_idle; write one; cut_idle; write two")
    counts = {name: peer.connections for name, peer in here.balancer.peers.items()}
    assert sum(counts.values()) == counts[here.connection.peer.name] == 1
    here.settle()
    assert here.sessions() == 1


class TestRetryingAtomic:
    """It does not run again without what was held when the first attempt began."""

    @pytest.mark.parametrize("held", ["LOCK", "HOLD", "CREATE TEMPORARY TABLE x (a int)"])
    def test_not_without_its_state(self, here: Site, held: str) -> None:
        Narrator(here).tell(held)
        with pytest.raises(Error):
            attempts(here, "write one; kill; write two")
        assert here.written() == []

    def test_with_what_the_function_takes_itself(self, here: Site) -> None:
        work = "LOCK; write one; {}write two"
        assert attempts(here, work.format("kill; "), work.format("")) == 2
        assert here.written() == ["one", "two"]

    def test_after_a_conflict_the_lock_is_held_still(self, on_mariadb: Site) -> None:
        on_mariadb.sql("SELECT GET_LOCK('a', 0)")
        assert attempts(on_mariadb, DEADLOCK, "write one") == 2

    def test_not_once_the_function_has_given_the_lock_back(self, on_mariadb: Site) -> None:
        on_mariadb.sql("SELECT GET_LOCK('a', 0)")
        with pytest.raises(OperationalError, match="Deadlock"):
            attempts(on_mariadb, f"SELECT RELEASE_LOCK('a'); {DEADLOCK}")
