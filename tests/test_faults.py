"""What drivers' errors say about a peer: each code, at connect and on an established connection.

The errors are of the drivers' own classes. Where a driver is not installed, as Oracle's may not
be, a class of the same name and module stands in.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import importlib
import itertools
import pickle
import socket
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import django.core.exceptions
import django.db.utils
import psycopg
import psycopg2
import psycopg2.errors
import pymysql
import pytest
import sqlalchemy.exc

from django_proxysql import Fault, NoPeerAvailable, NotReady, errors
from django_proxysql.core import drivers
from django_proxysql.core.exceptions import ConfigError
from django_proxysql.core.faults import (
    Count,
    Judgement,
    Proof,
    Verdict,
    verdict_on,
)
from tests.fakes import running

MySQLdb = pytest.importorskip("MySQLdb")

UNREACHABLE, REFUSED, NOT_READY = Fault.UNREACHABLE, Fault.REFUSED, Fault.NOT_READY
OVERLOADED, LOST, KILLED = Fault.OVERLOADED, Fault.LOST, Fault.KILLED
LOCAL, CONFLICT, OTHER = Fault.LOCAL, Fault.CONFLICT, Fault.OTHER


def judged(exc: BaseException) -> tuple[Fault, Fault]:
    """Return what the error says at connect, and on an established connection."""
    return drivers.judge(exc, connecting=True).fault, drivers.judge(exc, connecting=False).fault


def later(exc: BaseException) -> Judgement:
    """Return all that the error says on an established connection."""
    return drivers.judge(exc, connecting=False)


def raised(function: Callable[[], object]) -> Exception:
    try:
        function()
    except Exception as exc:
        return exc
    raise AssertionError("nothing was raised")


def test_which_faults_count_and_which_try_the_next_peer() -> None:
    assert {fault for fault in Fault if fault.counts} == {UNREACHABLE, REFUSED, NOT_READY, LOST}
    assert {fault for fault in Fault if not fault.tries_next} == {LOCAL, CONFLICT, OTHER}


class TestVerdict:
    @pytest.mark.parametrize("fault", list(Fault))
    def test_every_combination(self, fault: Fault) -> None:
        """What follows from a failed attempt, for each fault and each circumstance."""
        for by_server, of_settings, is_callers, is_trial in itertools.product(
            [False, True], repeat=4
        ):
            judgement = Judgement(fault, "said", by_server=by_server, of_settings=of_settings)
            verdict = verdict_on(judgement, is_callers=is_callers, is_trial=is_trial)
            if fault is REFUSED and is_callers:
                expected = Verdict(False, Count.NO, REFUSED)
            elif fault in (UNREACHABLE, REFUSED, NOT_READY, LOST):
                expected = Verdict(True, Count.NOW, fault)
            elif fault in (OVERLOADED, KILLED):
                expected = Verdict(True, Count.NO, fault)
            elif of_settings:
                expected = Verdict(True, Count.NO, LOCAL)
            elif fault is OTHER and by_server and is_callers:
                expected = Verdict(True, Count.NO, REFUSED)
            elif fault is OTHER and by_server:
                expected = Verdict(True, Count.NOW if is_trial else Count.IF_ALONE, REFUSED)
            else:
                expected = Verdict(False, Count.NO, fault)
            assert verdict == expected


# The MySQL family

MYSQL_CLASSES = [MySQLdb.OperationalError, pymysql.err.OperationalError]
WSREP = "WSREP has not yet prepared node for application use"

#: Codes and texts, what they say at connect, and what on an established connection.
MYSQL: list[tuple[int, str, Fault, Fault]] = [
    # The client's own while connecting.
    *(
        (code, f"Can't connect to server on '10.0.0.{code}' (115)", UNREACHABLE, UNREACHABLE)
        for code in (2001, 2002, 2003, 2004, 2005)
    ),
    (2003, "Can't connect to MySQL server on 'db1' ([Errno -2] No such name)", UNREACHABLE, OTHER),
    (2012, "Error in server handshake", UNREACHABLE, OTHER),
    (2013, "Lost connection … 'reading initial communication packet'", UNREACHABLE, LOST),
    (2013, "Lost connection to server during query", UNREACHABLE, LOST),
    (2006, "Server has gone away", UNREACHABLE, LOST),
    (2026, "TLS/SSL error: Connection reset by peer", UNREACHABLE, LOST),
    (2027, "Received malformed packet", UNREACHABLE, LOST),
    (2045, "Can't open shared memory", LOST, LOST),
    (2055, "Lost connection to server at 'reading', system error: 104", UNREACHABLE, LOST),
    # The server's while it is being connected to.
    *(
        (code, "the server's", UNREACHABLE, UNREACHABLE)
        for code in (1042, 1043, 1129, 1130, 1135, 1159)
    ),
    # This side's trouble.
    (2001, "Can't create UNIX socket (24)", LOCAL, LOCAL),
    *((2004, f"Can't create TCP/IP socket ({number})", LOCAL, LOCAL) for number in (24, 23, 12)),
    (2002, "Can't create socket (24)", LOCAL, LOCAL),
    # getaddrinfo's own codes: no such host, no answer from DNS, the system's error, no memory.
    (2005, f"Unknown server host 'db1' ({socket.EAI_NONAME})", UNREACHABLE, UNREACHABLE),
    (2005, f"Unknown server host 'db1' ({socket.EAI_AGAIN})", UNREACHABLE, UNREACHABLE),
    (2005, f"Unknown server host 'db1' ({socket.EAI_SYSTEM})", LOCAL, LOCAL),
    (2005, f"Unknown server host 'db1' ({socket.EAI_MEMORY})", LOCAL, LOCAL),
    (2003, "Can't connect to MySQL server on 'db1' ([Errno 24] Too many open files)", LOCAL, LOCAL),
    (2002, "Can't connect to server on '10.0.0.24' (111)", UNREACHABLE, UNREACHABLE),
    (2002, "Can't connect to server on '10.0.0.1' (113)", UNREACHABLE, UNREACHABLE),
    # It does not want us.
    *(
        (code, "Access denied, and the like", REFUSED, REFUSED)
        for code in (1044, 1045, 1049, 1251, 1524, 1698, 1820, 1862, 2049, 2054, 2059, 2061)
    ),
    *((code, "Locked, and the like", REFUSED, REFUSED) for code in (1184, 3118, 3159, 3955, 4151)),
    (1045, "ProxySQL Error: Access denied for user 'app'@''", REFUSED, REFUSED),
    # It cannot do its work.
    (1047, WSREP, NOT_READY, NOT_READY),
    (1047, "Unknown command", OTHER, OTHER),
    (1180, "Got error … during COMMIT: Not connected to Primary Component", NOT_READY, NOT_READY),
    (1180, "Got error 28 'No space left on device' during COMMIT", OTHER, OTHER),
    (1053, "Server shutdown in progress", NOT_READY, NOT_READY),
    (3032, "The server is currently in offline mode", NOT_READY, NOT_READY),
    (9001, "Max connect timeout reached while reaching hostgroup 0", NOT_READY, NOT_READY),
    (9002, "Max connect failure while reaching hostgroup 0", NOT_READY, NOT_READY),
    (2013, "Max connect timeout reached while reaching hostgroup 1", UNREACHABLE, NOT_READY),
    (1062, "Duplicate entry 'while reaching hostgroup' for key 'name'", OTHER, OTHER),
    (1815, "Internal error: Session creation failed", NOT_READY, NOT_READY),
    (1815, "Internal error: something else", OTHER, OTHER),
    (1290, "The server is running with the --read-only option", NOT_READY, NOT_READY),
    (1290, "The server is running with the --secure-file-priv option", OTHER, OTHER),
    (1836, "Running in read only mode", NOT_READY, NOT_READY),
    (1792, "Cannot execute statement in a READ ONLY transaction", OTHER, OTHER),
    # It has no connection to spare.
    *((code, "too many", OVERLOADED, OVERLOADED) for code in (1040, 1203, 1226)),
    # Ended on purpose.
    *((code, "killed", KILLED, KILLED) for code in (1927, 3169, 1317, 1907, 1969, 3024)),
    (1153, "Got a packet bigger than 'max_allowed_packet' bytes", KILLED, KILLED),
    (4031, "The client was disconnected by the server because of inactivity", KILLED, KILLED),
    (4031, "Referenced trigger 't' for the given action time does not exist", OTHER, OTHER),
    # Two transactions met.
    *((code, "met another", CONFLICT, CONFLICT) for code in (1213, 1205, 1020, 1614, 3101)),
    # The application's own.
    (2014, "Commands out of sync; you can't run this command now", OTHER, OTHER),
    *((code, "a rule of ProxySQL's", OTHER, OTHER) for code in (9003, 9005, 9006, 1148)),
    (1054, "Unknown column 'x'", OTHER, OTHER),
    (1366, "Incorrect string value", OTHER, OTHER),
]


#: What else a judgement of an established connection says: what a trial must ask, whether one plain
#: statement did not run, whether it is the server's answer, whether it ended the connection.
SAYS: list[tuple[int, str, dict[str, Any]]] = [
    (1047, WSREP, {"question": "galera", "did_not_run": True}),
    (1047, "Unknown command", {"question": "galera"}),
    (1180, "Not connected to Primary Component", {"question": "galera"}),
    *((code, "Max connect timeout", {"question": "backend"}) for code in (9001, 9002)),
    (1290, "the --read-only option", {"question": "writable", "did_not_run": True}),
    (1836, "Running in read-only mode", {"question": "writable", "did_not_run": True}),
    (1290, "the --secure-file-priv option", {}),
    (1053, "Server shutdown in progress", {}),
    (1213, "Deadlock", {}),
    *((code, "Lost connection", {"is_answer": False}) for code in (2013, 2027, 0)),
    *((code, "killed", {}) for code in (1317, 1907, 1969, 3024)),
    *((code, "killed", {"is_killed": True}) for code in (1153, 1927, 3169)),
    (4031, "The client was disconnected by the server", {"is_killed": True}),
    (4031, "Referenced trigger 't'", {}),
]


BOTH = pytest.mark.parametrize("package", [MySQLdb, pymysql], ids=["mysqlclient", "PyMySQL"])


class TestMySQL:
    @pytest.mark.parametrize("cls", MYSQL_CLASSES, ids=["mysqlclient", "PyMySQL"])
    @pytest.mark.parametrize(
        ("code", "text", "connecting", "established"),
        MYSQL,
        ids=[f"{code}-{text[:20]}" for code, text, *_ in MYSQL],
    )
    def test_code(
        self, cls: type[Exception], code: int, text: str, connecting: Fault, established: Fault
    ) -> None:
        at_connect, later = judged(cls(code, text))
        assert at_connect is connecting
        # Codes of connecting are not met later; what they would say there is of no account.
        if established is not OTHER or not 2000 <= code < 2013:
            assert later is established

    @BOTH
    def test_closed_handle(self, package: Any) -> None:
        """InterfaceError(0, '') on a connection means that it is gone; other ones do not."""
        assert judged(package.InterfaceError(0, ""))[1] is LOST
        assert judged(package.InterfaceError())[1] is LOST
        assert judged(package.InterfaceError(42, "not yet"))[1] is OTHER

    @BOTH
    @pytest.mark.parametrize(
        "name", ["IntegrityError", "ProgrammingError", "DataError", "NotSupportedError"]
    )
    def test_errors_of_the_application_judge_no_peer(self, package: Any, name: str) -> None:
        assert judged(getattr(package, name)(1062, "Duplicate entry")) == (OTHER, OTHER)
        assert judged(getattr(package, name)("%d format: a number is required")) == (OTHER, OTHER)

    @BOTH
    def test_a_named_peer_changes_no_judgement(self, package: Any) -> None:
        """The resolver of this process has no memory left, for any host."""
        error = package.OperationalError(2005, f"Unknown server host 'db1' ({socket.EAI_MEMORY})")
        before = judged(error)
        drivers.name_peer(error, "to peer0 of 'default'")
        assert "peer0" in str(error)
        assert judged(error) == before == (Fault.LOCAL, Fault.LOCAL)

    @BOTH
    def test_class_is_of_no_account(self, package: Any) -> None:
        """mysqlclient gives codes that it does not know odd classes: the code decides."""
        for cls in (package.ProgrammingError, package.InternalError, package.NotSupportedError):
            assert judged(cls(1047, WSREP)) == (NOT_READY, NOT_READY)
            assert judged(cls(9001, "Max connect timeout")) == (NOT_READY, NOT_READY)

    @pytest.mark.parametrize(("code", "text", "says"), SAYS)
    def test_what_else_it_says(self, code: int, text: str, says: dict[str, Any]) -> None:
        found = later(MySQLdb.OperationalError(code, text))
        said = {name: getattr(found, name) for name in ("question", "is_answer", "is_killed")}
        said["did_not_run"] = found.proof is Proof.NOT_RUN
        nothing = {"question": "", "did_not_run": False, "is_answer": True, "is_killed": False}
        assert said == {**nothing, **says}


# PostgreSQL

#: SQLSTATEs, by what they say at connect.
SQLSTATES: dict[Fault, str] = {
    UNREACHABLE: "08001 08004 08006",
    REFUSED: "28000 28P01 3D000",
    NOT_READY: "57P03 25006",
    OVERLOADED: "53300",
    LOST: "08003 57P01 57P02",
    KILLED: "57014 57P05 25P03 25P04",
    CONFLICT: "40001 40P01",
    OTHER: "08007 40003 23505 42P01 42501 53100 25P02 XX000",
}


def by_psycopg(sqlstate: str, text: str = "as the server says") -> Exception:
    try:
        return psycopg.errors.lookup(sqlstate)(text)
    except KeyError:
        error = psycopg.OperationalError(text)
        error.sqlstate = sqlstate
        return error


def by_psycopg2(sqlstate: str, text: str = "as the server says") -> Exception:
    try:
        error = psycopg2.errors.lookup(sqlstate)(text)
    except KeyError:
        error = psycopg2.OperationalError(text)
    error.__setstate__({"pgcode": sqlstate})
    assert error.pgcode == sqlstate
    return error


def said_by(package: Any) -> Callable[..., Exception]:
    return by_psycopg if package is psycopg else by_psycopg2


#: What libpq writes, without a SQLSTATE, when a connect fails …
LIBPQ = 'connection to server at "127.0.0.1", port 5432 failed: '
CONNECT_TEXTS: list[tuple[str, Fault]] = [
    (LIBPQ + 'FATAL:  permission denied for database "shop"', REFUSED),
    (LIBPQ + 'FATAL:  role "app" is not permitted to log in', REFUSED),
    (LIBPQ + 'FATAL:  database "shop" is not currently accepting connections', REFUSED),
    (LIBPQ + 'FATAL:  PAM authentication failed for user "app"', REFUSED),
    (LIBPQ + 'FATAL:  pg_hba.conf rejects connection for host "10.0.0.9"', REFUSED),
    (LIBPQ + 'FATAL:  unrecognized configuration parameter "nonesuch"', OTHER),
    (LIBPQ + "Connection refused\n\tIs the server running on that host?", UNREACHABLE),
    ('could not translate host name "nohost" to address: Name not known', UNREACHABLE),
    (LIBPQ + "timeout expired", UNREACHABLE),
    ("connection timeout expired", UNREACHABLE),
    (LIBPQ + "server closed the connection unexpectedly", UNREACHABLE),
    (LIBPQ + "SSL error: certificate verify failed", UNREACHABLE),
    (LIBPQ + 'FATAL:  password authentication failed for user "app"', REFUSED),
    (LIBPQ + 'FATAL:  database "nobase" does not exist', REFUSED),
    (LIBPQ + 'FATAL:  role "none" does not exist', REFUSED),
    (LIBPQ + 'FATAL:  no pg_hba.conf entry for host "10.0.0.9"', REFUSED),
    (LIBPQ + "FATAL:  the database system is starting up", NOT_READY),
    (LIBPQ + "FATAL:  the database system is shutting down", NOT_READY),
    (LIBPQ + "FATAL:  the database system is in recovery mode", NOT_READY),
    (LIBPQ + "FATAL:  the database system is not yet accepting connections", NOT_READY),
    (LIBPQ + "FATAL:  sorry, too many clients already", OVERLOADED),
    (LIBPQ + "FATAL:  remaining connection slots are reserved", OVERLOADED),
    (LIBPQ + 'FATAL:  too many connections for role "app"', OVERLOADED),
    ("could not create socket: Too many open files", LOCAL),
]
#: … and when a connection is lost.
LOST_TEXTS = [
    "server closed the connection unexpectedly",
    "consuming input failed: server closed the connection unexpectedly",
    "consuming input failed: could not receive data from server: Connection reset by peer",
    "sending query failed: another command is already in progress",
    "could not send data to server: Broken pipe",
    "SSL connection has been closed unexpectedly",
    "SSL SYSCALL error: EOF detected",
    "terminating connection due to administrator command",
    "the connection is closed",
    "the connection is lost",
    "connection already closed",
]
#: What poolers say: the words, the SQLSTATE, and what it means.
POOLERS: list[tuple[str, str, Fault]] = [
    # PgBouncer
    ("no more connections allowed (max_client_conn)", "08P01", OVERLOADED),
    ("client connections exceeded (max_db_client_connections)", "08P01", OVERLOADED),
    ("query_wait_timeout", "08P01", OVERLOADED),
    ("server login has been failing, try again later (server_login_retry)", "08P01", NOT_READY),
    (
        "server login has been failing, cached error: failed (server_login_retry)",
        "08P01",
        NOT_READY,
    ),
    ("server login failed: wrong password type", "08P01", NOT_READY),
    ("client_login_timeout (server down)", "08P01", NOT_READY),
    ("no such database: tenant_7", "08P01", REFUSED),
    ("no such user", "08P01", REFUSED),
    ('database "shop" is disabled', "08P01", REFUSED),
    ("password authentication failed", "08P01", REFUSED),
    ("SASL authentication failed", "08P01", REFUSED),
    ("unsupported startup parameter: search_path", "08P01", REFUSED),
    ("server conn crashed?", "08P01", LOST),
    ("query timeout", "08P01", KILLED),
    ("idle transaction timeout", "08P01", KILLED),
    ("client_idle_timeout", "08P01", KILLED),
    # pgcat
    ("could not get connection from the pool - AllServersDown", "58000", NOT_READY),
    ('Pool down for database: "shop", user: "app"', "58000", NOT_READY),
    ('No pool configured for database: "x", user: "app"', "58000", REFUSED),
    ("checkout failure limit reached (3 / 3)", "58000", OVERLOADED),
    ("pool statement timeout", "58000", KILLED),
    ("error receiving data from server: SocketError(..)", "58000", LOST),
    ("terminating connection due to administrator command", "58000", LOST),
    # Odyssey
    ("odyssey: c1: failed to get remote server connection", "08006", NOT_READY),
    ("odyssey: c1: failed to connect to remote server s2", "08006", NOT_READY),
    ("odyssey: c1: Odyssey is gracefully shutting down", "08006", NOT_READY),
    ("odyssey: c1: remote server read/write error s2: eof", "08006", LOST),
    ("odyssey: c1: too many tcp connections (global client_max 9)", "53300", OVERLOADED),
    ("odyssey: c1: too many active clients for user (pool_size reached 5)", "53300", OVERLOADED),
    ("odyssey: c1: route for 'x.app' is not found", "3D000", REFUSED),
    ("odyssey: c1: user blocked: shop app", "28000", REFUSED),
    # pgpool-II
    ("Sorry, too many clients already", "53300", OVERLOADED),
    ("pgpool is not accepting any new connections", "08S01", NOT_READY),
    ("all backend nodes are down, pgpool requires at least one valid node", "XX000", NOT_READY),
    ("failed to create a backend 0 connection", "XX000", NOT_READY),
    ("unable to read message kind from backend", "XX000", LOST),
    ("connection terminated due to online recovery", "57000", LOST),
]
#: Words that a server has, too: they are a pooler's at connect alone.
LATER = {"password authentication failed": OTHER}
POSTGRES_PACKAGES = pytest.mark.parametrize(
    "package", [psycopg, psycopg2], ids=["psycopg", "psycopg2"]
)


class TestPostgreSQL:
    @pytest.mark.parametrize("made", [by_psycopg, by_psycopg2], ids=["psycopg", "psycopg2"])
    @pytest.mark.parametrize("fault", SQLSTATES)
    def test_sqlstate(self, made: Callable[[str], Exception], fault: Fault) -> None:
        for sqlstate in SQLSTATES[fault].split():
            established = LOST if sqlstate == "08006" else fault
            assert judged(made(sqlstate)) == (fault, established), sqlstate

    @POSTGRES_PACKAGES
    @pytest.mark.parametrize(
        ("text", "fault"), CONNECT_TEXTS, ids=[t[-30:] for t, _ in CONNECT_TEXTS]
    )
    def test_failed_connect(self, package: Any, text: str, fault: Fault) -> None:
        """libpq gives a failed connect no SQLSTATE: its words are read."""
        assert drivers.judge(package.OperationalError(text), connecting=True).fault is fault

    @POSTGRES_PACKAGES
    @pytest.mark.parametrize("text", LOST_TEXTS)
    def test_lost_connection(self, package: Any, text: str) -> None:
        """So are its words on a connection that is lost."""
        assert later(package.OperationalError(text)).fault is LOST

    @pytest.mark.parametrize(
        "sqlstate", ["08001", "08003", "08004", "08006", "57P01", "57P02", "57P03"]
    )
    def test_an_error_about_another_session_says_nothing_of_this_one(self, sqlstate: str) -> None:
        """postgres_fdw and dblink pass on what happens to a foreign server's session."""
        severity = psycopg.pq.DiagnosticField.SEVERITY_NONLOCALIZED
        made = psycopg.errors.lookup(sqlstate)
        goes_on = later(made("x", info={severity: b"ERROR"}))
        assert (goes_on.fault, goes_on.is_answer) == (OTHER, True)
        ends = later(made("x", info={severity: b"FATAL"}))
        assert (ends.fault is OTHER, ends.is_answer) == (False, False)

    @POSTGRES_PACKAGES
    @pytest.mark.parametrize(("text", "sqlstate", "connecting"), POOLERS)
    def test_pooler(self, package: Any, text: str, sqlstate: str, connecting: Fault) -> None:
        """Poolers have one code for everything: their words are read."""
        established = LATER.get(text, connecting)
        failed = package.OperationalError(f'connection to "10.0.0.1" failed: FATAL:  {text}')
        assert drivers.judge(failed, connecting=True).fault is connecting
        said = later(said_by(package)(sqlstate, text))
        assert said.fault is established
        assert said.question == ("backend" if established is NOT_READY else "")

    @POSTGRES_PACKAGES
    @pytest.mark.parametrize(
        ("text", "sqlstate", "proven"),
        [
            ("server login has been failing, try again later (server_login_retry)", "08P01", True),
            ("query_wait_timeout", "08P01", True),
            ("could not get connection from the pool - AllServersDown", "58000", True),
            ("odyssey: c1: failed to connect to remote server s1", "08006", True),
            ("server conn crashed?", "08P01", False),
            ("odyssey: c1: remote server read/write error s1", "08006", False),
            ("error receiving data from server: SocketError", "58000", False),
            ("query_wait_timeout", "P0001", False),
            ("text\nLINE 1: SELECT 'query_wait_timeout'", "08P01", False),
        ],
    )
    def test_statement_of_a_pooler_without_a_server(
        self, package: Any, text: str, sqlstate: str, proven: bool
    ) -> None:
        """A statement that waited for a server in vain was sent to none."""
        assert (later(said_by(package)(sqlstate, text)).proof is Proof.NOT_RUN) is proven

    def test_pgcat_says_one_thing_of_a_server_that_is_down_and_of_one_that_is_busy(self) -> None:
        """It bans a server that has no connection to spare, and so comes to AllServersDown."""
        said = by_psycopg("58000", "could not get connection from the pool - AllServersDown")
        assert later(said).may_be_busy
        assert not later(by_psycopg("08P01", "server_login_retry")).may_be_busy

    @pytest.mark.parametrize(("text", "sqlstate", "fault"), POOLERS)
    def test_server_that_says_a_poolers_words_is_no_pooler(
        self, text: str, sqlstate: str, fault: Fault
    ) -> None:
        """A function's RAISE, and postgres_fdw: any words, any SQLSTATE, and the session goes on.

        The server names the function of its source; a pooler names none.
        """

        def made(text: str, info: Any) -> Exception:
            error = psycopg.OperationalError(text, info=info)
            error.sqlstate = sqlstate
            return error

        field = psycopg.pq.DiagnosticField
        says = {field.SEVERITY: b"ERROR", field.SEVERITY_NONLOCALIZED: b"ERROR"}
        of_server = made(text, info={**says, field.SOURCE_FUNCTION: b"exec_stmt_raise"})
        plain = made("words of its own", info={**says, field.SOURCE_FUNCTION: b"f"})
        assert judged(of_server) == judged(plain)
        found = later(of_server)
        assert found.proof is not Proof.NOT_RUN
        assert (found.may_be_busy, found.question) == (False, "")
        # As pgcat and PgBouncer say it.
        assert later(made(text, info=says)).fault is LATER.get(text, fault)

    @POSTGRES_PACKAGES
    def test_text_of_a_statement_is_no_poolers(self, package: Any) -> None:
        text = "invalid message format\nLINE 1: SELECT 'no such database'"
        assert later(said_by(package)("08P01", text)).fault is OTHER

    @POSTGRES_PACKAGES
    def test_other_errors_without_a_sqlstate_judge_no_peer(self, package: Any) -> None:
        assert judged(package.ProgrammingError("the query has 1 placeholder")) == (OTHER, OTHER)
        assert judged(package.InterfaceError("cursor already closed"))[1] is OTHER
        assert judged(package.OperationalError("sending is not allowed in pipeline"))[1] is OTHER
        assert judged(package.DataError("integer out of range")) == (OTHER, OTHER)

    @POSTGRES_PACKAGES
    def test_statement_on_a_closed_connection_finds_it_lost(self, package: Any) -> None:
        assert judged(package.InterfaceError("connection already closed"))[1] is LOST

    @POSTGRES_PACKAGES
    def test_option_that_libpq_does_not_know_tries_no_other_peer(self, package: Any) -> None:
        exc = raised(lambda: package.connect("host=127.0.0.1 port=1 nonsense=1"))
        fault = drivers.judge(exc, connecting=True).fault
        assert not fault.counts
        assert not fault.tries_next

    def test_pool_of_ours_says_nothing_about_the_peer(self) -> None:
        for name in ("PoolTimeout", "TooManyRequests", "PoolClosed"):
            cls = type(name, (psycopg.OperationalError,), {"__module__": "psycopg_pool.errors"})
            assert judged(cls("no connection")) == (OVERLOADED, OVERLOADED)

    @pytest.mark.parametrize("made", [by_psycopg, by_psycopg2], ids=["psycopg", "psycopg2"])
    @pytest.mark.parametrize(
        ("sqlstate", "unknown"),
        [
            ("08007", True),
            ("40003", True),
            ("57P01", True),
            ("08006", True),
            ("XX000", True),
            ("40001", False),
            ("23505", False),
            ("25006", False),
        ],
    )
    def test_outcome_of_commit(
        self, made: Callable[[str], Exception], sqlstate: str, unknown: bool
    ) -> None:
        assert (later(made(sqlstate)).proof is Proof.UNDECIDED) is unknown

    @pytest.mark.parametrize(
        ("sqlstate", "severity", "unknown"),
        [
            # A full disk: PostgreSQL stops while it writes COMMIT's record, or has written it.
            ("53100", b"PANIC", True),
            ("53200", b"FATAL", True),
            ("53100", b"ERROR", False),
            # The session was ended before COMMIT came.
            ("25P03", b"FATAL", False),
            ("25P04", b"FATAL", False),
        ],
    )
    def test_outcome_of_commit_by_which_the_session_ended(
        self, sqlstate: str, severity: bytes, unknown: bool
    ) -> None:
        field = psycopg.pq.DiagnosticField.SEVERITY_NONLOCALIZED
        said = psycopg.errors.lookup(sqlstate)("x", info={field: severity})
        assert (later(said).proof is Proof.UNDECIDED) is unknown


# SQLite


class TestSQLite:
    @pytest.mark.parametrize(
        ("exc", "fault"),
        [
            (sqlite3.OperationalError("unable to open database file"), UNREACHABLE),
            (sqlite3.OperationalError("disk I/O error"), UNREACHABLE),
            (sqlite3.DatabaseError("file is not a database"), REFUSED),
            (sqlite3.OperationalError("attempt to write a readonly database"), NOT_READY),
            (sqlite3.OperationalError("database is locked"), CONFLICT),
            (sqlite3.OperationalError("database table is locked: t"), CONFLICT),
            (sqlite3.OperationalError("no such table: t"), OTHER),
            (sqlite3.IntegrityError("UNIQUE constraint failed: t.id"), OTHER),
            (sqlite3.ProgrammingError("Cannot operate on a closed database."), OTHER),
        ],
    )
    def test_errors_are_known_by_their_words(self, exc: Exception, fault: Fault) -> None:
        assert judged(exc) == (fault, fault)

    def test_the_real_ones(self, tmp_path: Path) -> None:
        """They are what sqlite3 does say."""
        exc = raised(lambda: sqlite3.connect(tmp_path / "no" / "such.db"))
        assert judged(exc)[0] is UNREACHABLE
        (tmp_path / "text.db").write_text("This is no database." * 100)
        with contextlib.closing(sqlite3.connect(tmp_path / "text.db")) as connection:
            exc = raised(lambda: connection.execute("SELECT * FROM t"))
            assert judged(exc)[0] is REFUSED
        path = tmp_path / "real.db"
        with contextlib.closing(sqlite3.connect(path, timeout=0)) as one:
            one.execute("CREATE TABLE t (id)")
            one.execute("BEGIN IMMEDIATE")
            with contextlib.closing(sqlite3.connect(path, timeout=0)) as other:
                assert judged(raised(lambda: other.execute("BEGIN IMMEDIATE")))[1] is CONFLICT
            one.rollback()
        read_only = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
        with contextlib.closing(read_only) as connection:
            exc = raised(lambda: connection.execute("INSERT INTO t VALUES (1)"))
            assert judged(exc)[1] is NOT_READY


# Oracle

ORACLE: list[tuple[str, Fault, Fault]] = [
    ("DPY-6005: cannot connect to database", UNREACHABLE, OTHER),
    ("ORA-12541: TNS:no listener", UNREACHABLE, OTHER),
    ("ORA-12514: TNS:listener does not currently know of service", UNREACHABLE, OTHER),
    ("ORA-12170: TNS:Connect timeout occurred", UNREACHABLE, OTHER),
    ("ORA-01033: ORACLE initialization or shutdown in progress", UNREACHABLE, OTHER),
    ("ORA-01034: ORACLE not available", UNREACHABLE, OTHER),
    ("ORA-01017: invalid username/password; logon denied", REFUSED, OTHER),
    ("ORA-00028: your session has been killed", LOST, LOST),
    ("ORA-03113: end-of-file on communication channel", LOST, LOST),
    ("ORA-03114: not connected to ORACLE", LOST, LOST),
    ("ORA-03135: connection lost contact", LOST, LOST),
    ("DPY-4011: the database or network closed the connection", LOST, LOST),
    ("ORA-00060: deadlock detected while waiting for resource", CONFLICT, CONFLICT),
    ("ORA-08177: can't serialize access for this transaction", CONFLICT, CONFLICT),
    ("ORA-00942: table or view does not exist", OTHER, OTHER),
    ("ORA-00001: unique constraint violated", OTHER, OTHER),
    ("something without a number", OTHER, OTHER),
]


def oracles_error(package: str) -> type[Exception]:
    try:
        return importlib.import_module(package).DatabaseError  # type: ignore[no-any-return]
    except ImportError:
        return type("DatabaseError", (Exception,), {"__module__": package})


class TestOracle:
    @pytest.mark.parametrize("package", ["oracledb", "cx_Oracle", "oracledb.exceptions"])
    @pytest.mark.parametrize(
        ("text", "connecting", "established"), ORACLE, ids=[text[:9] for text, *_ in ORACLE]
    )
    def test_number(self, package: str, text: str, connecting: Fault, established: Fault) -> None:
        assert judged(oracles_error(package)(text)) == (connecting, established)


# Anything else


def pep249(name: str) -> type[Exception]:
    return type(name, (Exception,), {"__module__": "somedriver"})


class TestAnyOtherDriver:
    @pytest.mark.parametrize(
        ("name", "connecting"),
        [
            ("OperationalError", UNREACHABLE),
            ("InterfaceError", UNREACHABLE),
            ("ProgrammingError", OTHER),
            ("DatabaseError", OTHER),
            ("SoftTimeLimitExceeded", OTHER),
        ],
    )
    def test_names(self, name: str, connecting: Fault) -> None:
        """PEP 249's names say something while connecting; afterwards nothing is assumed."""
        assert judged(pep249(name)("text")) == (connecting, OTHER)

    def test_subclass_of_one_of_them_is_one_of_them(self) -> None:
        mine = type("Timeout", (pep249("OperationalError"),), {"__module__": "somedriver"})
        assert judged(mine("text")) == (UNREACHABLE, OTHER)


@pytest.mark.parametrize(
    ("package", "args"),
    [
        *((package, (2013, "Lost connection")) for package in (MySQLdb, pymysql)),
        *((package, ("server closed the connection",)) for package in (psycopg, psycopg2)),
    ],
)
def test_subclass_of_a_drivers_error_is_one(package: Any, args: tuple[Any, ...]) -> None:
    mine = type("Mine", (package.OperationalError,), {"__module__": "app"})
    assert judged(mine(*args)) == (UNREACHABLE, LOST)


class TestNoDrivers:
    @pytest.mark.parametrize(
        ("exc", "connecting", "established"),
        [
            (ConnectionRefusedError(errno.ECONNREFUSED, "refused"), UNREACHABLE, LOST),
            (ConnectionResetError(errno.ECONNRESET, "reset"), UNREACHABLE, LOST),
            (BrokenPipeError(errno.EPIPE, "pipe"), UNREACHABLE, LOST),
            (socket.gaierror(-2, "Name or service not known"), UNREACHABLE, OTHER),
            (socket.timeout("timed out"), UNREACHABLE, OTHER),
            (TimeoutError(errno.ETIMEDOUT, "Connection timed out"), UNREACHABLE, OTHER),
            (OSError(errno.EHOSTUNREACH, "No route to host"), UNREACHABLE, OTHER),
            (OSError(errno.ENETUNREACH, "Network is unreachable"), UNREACHABLE, OTHER),
            (TimeoutError(), OTHER, OTHER),
            (OSError(errno.EMFILE, "Too many open files"), LOCAL, LOCAL),
            (OSError(errno.ENFILE, "Too many open files in system"), LOCAL, LOCAL),
            (OSError(errno.ENOMEM, "Cannot allocate memory"), LOCAL, LOCAL),
            (FileNotFoundError(errno.ENOENT, "my.cnf"), OTHER, OTHER),
            (PermissionError(errno.EACCES, "key.pem"), OTHER, OTHER),
            (NotReady("wsrep_ready is OFF"), NOT_READY, NOT_READY),
            (ConfigError("PEERS", "is empty"), LOCAL, LOCAL),
            (NoPeerAvailable("another", ["db9: refused"]), OTHER, OTHER),
            (errors.NoPeerAvailable("another", ["db9: refused"]), OTHER, OTHER),
            (django.core.exceptions.ImproperlyConfigured("no"), LOCAL, LOCAL),
            (TypeError("'nonsense' is an invalid keyword argument"), OTHER, OTHER),
            (ValueError("no"), OTHER, OTHER),
            (KeyboardInterrupt(), OTHER, OTHER),
            (SystemExit(1), OTHER, OTHER),
            (GeneratorExit(), OTHER, OTHER),
            (asyncio.CancelledError(), OTHER, OTHER),
            (type("Timeout", (BaseException,), {"__module__": "gevent"})(), OTHER, OTHER),
        ],
        ids=lambda value: repr(value)[:30],
    )
    def test_exceptions(self, exc: BaseException, connecting: Fault, established: Fault) -> None:
        """What comes from sockets, settings and time-outs around us."""
        assert judged(exc) == (connecting, established)

    def test_password_service_that_cannot_be_reached_is_this_sides_trouble(self) -> None:
        def token() -> str:
            raise ConnectionRefusedError(errno.ECONNREFUSED, "the token service")

        assert judged(raised(lambda: drivers.password_from(token))) == (LOCAL, LOCAL)

    @pytest.mark.parametrize("inner", [MySQLdb.OperationalError, pymysql.err.OperationalError])
    def test_wrapped_errors_are_judged_by_the_drivers_inside(self, inner: type[Exception]) -> None:
        cause = inner(1047, WSREP)
        by_django = django.db.utils.OperationalError(*cause.args)
        by_django.__cause__ = cause
        by_sqlalchemy = sqlalchemy.exc.OperationalError("SELECT 1", {}, cause)
        for exc in (by_django, by_sqlalchemy):
            assert judged(exc) == (NOT_READY, NOT_READY)
            assert drivers.root_error(exc) is cause
            assert drivers.describe(exc) == str(cause)

    def test_error_that_django_raised_by_itself_says_nothing(self) -> None:
        assert judged(django.db.utils.InterfaceError("connection already closed"))[1] is OTHER


# What the drivers do say, without a server


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port on which nothing listens, and that no other process is given meanwhile."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        yield closed.getsockname()[1]


@pytest.fixture
def hanging_up() -> Iterator[int]:
    """A port that accepts connections and closes them at once."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    listener.accept()[0].close()

        with running(serve):
            yield listener.getsockname()[1]
            # What wakes accept() differs between systems; a connection does on all.
            listener.settimeout(0.1)
            with contextlib.suppress(OSError):
                socket.create_connection(listener.getsockname(), timeout=60).close()


CONNECTS: dict[str, Callable[..., object]] = {
    "mysqlclient": MySQLdb.connect,
    "PyMySQL": pymysql.connect,
    "psycopg": psycopg.connect,
    "psycopg2": psycopg2.connect,
}


@pytest.mark.parametrize("driver", list(CONNECTS))
@pytest.mark.parametrize("port", ["closed_port", "hanging_up"])
def test_each_driver_says_unreachable_where_nothing_listens_or_it_hangs_up(
    driver: str, port: str, request: pytest.FixtureRequest
) -> None:
    server = {"host": "127.0.0.1", "port": request.getfixturevalue(port)}
    exc = raised(lambda: CONNECTS[driver](**server, user="app", connect_timeout=5))
    assert drivers.judge(exc, connecting=True).fault is UNREACHABLE


#: As MySQL Connector/Python's: code, text with the code in it, SQLSTATE.
@pytest.mark.parametrize(
    ("name", "args", "connecting", "fault"),
    [
        ("DatabaseError", (2003, "2003: Can't connect to MySQL server", None), True, "UNREACHABLE"),
        ("ConnectionTimeoutError", (3024, "3024: timed out", None), True, "UNREACHABLE"),
        ("ConnectionTimeoutError", (3024, "3024: timed out", None), False, "OTHER"),
        ("InterfaceError", (2013, "2013: Lost connection", None), True, "UNREACHABLE"),
        ("DatabaseError", (1040, "1040 (08004): Too many", "08004"), True, "OVERLOADED"),
        ("ProgrammingError", (1045, "1045 (28000): Access denied", "28000"), True, "REFUSED"),
        ("DatabaseError", (1047, "1047: WSREP has not yet prepared", "08S01"), True, "NOT_READY"),
        ("OperationalError", (-1, "anything", None), True, "UNREACHABLE"),
        ("ProgrammingError", (1064, "1064 (42000): syntax", "42000"), False, "OTHER"),
    ],
)
def test_mysql_connector(name: str, args: tuple[Any, ...], connecting: bool, fault: str) -> None:
    error = type(name, (Exception,), {"__module__": "mysql.connector.errors"})
    assert drivers.judge(error(*args), connecting=connecting).fault.name == fault


def test_mysql_connector_is_bounded() -> None:
    """Its time-out has a name of its own; what OPTIONS say goes first, by either name."""
    driver = drivers.driver_of("mysql.connector")
    assert driver is drivers.driver_of("mysql.connector.django.base")
    assert driver.connect_options({}, 2.1) == {"connection_timeout": 3}
    assert driver.connect_options({}, 0.2) == {"connection_timeout": 1}
    for name in ("connection_timeout", "connect_timeout"):
        assert driver.connect_options({name: 7}, 2) == {}
    # A package of somebody's own that is called mysql is no driver.
    assert drivers.driver_of("mysql.helpers") is drivers.generic


def test_judged_error_is_pickled_without_its_judgement() -> None:
    """A process that has no django_proxysql can read it: a task's result, say."""
    error = MySQLdb.OperationalError(2013, "Lost connection")
    before = drivers.judge(error, connecting=False)
    pickled = pickle.dumps(error)
    assert b"django_proxysql.core" not in pickled
    there = pickle.loads(pickled)
    assert drivers.judgement_of(there) == before
    assert drivers.describe(there) == before.text
