"""psycopg 3 and psycopg2, by SQLSTATE.

The classes are those of PostgreSQL's Appendix A; libpq's own errors carry none.

Longer than other files: the tables of codes and texts stand beside the methods that read them.
"""

from __future__ import annotations

import functools
import os
import re
import sys
from collections.abc import Callable
from typing import Any

from .. import sockets
from ..faults import Fault
from .base import Driver, is_a

_READ_ONLY_REFUSAL = "25006"
BY_SQLSTATE = {
    **dict.fromkeys(("08001", "08004"), Fault.UNREACHABLE),
    **dict.fromkeys(("28000", "28P01", "3D000"), Fault.REFUSED),
    "57P03": Fault.NOT_READY,
    _READ_ONLY_REFUSAL: Fault.NOT_READY,
    "53300": Fault.OVERLOADED,
    **dict.fromkeys(("08003", "08006", "57P01", "57P02"), Fault.LOST),
    **dict.fromkeys(("57014", "57P05", "25P03", "25P04"), Fault.KILLED),
    **dict.fromkeys(("40001", "40P01"), Fault.CONFLICT),
}

#: States of this session's end. As an ERROR they are about another one: postgres_fdw and dblink
#: pass on what happens to a foreign server's.
_ENDS = frozenset({"08001", "08003", "08004", "08006", "57P01", "57P02", "57P03"})

#: libpq gives a failed connect no SQLSTATE, whichever side refused it: it quotes the
#: server's line. (psycopg 3 fills ``sqlstate`` in, psycopg2 does not.)
#: The server speaks its own language here, so the quoted names decide first.
_QUOTED = {
    Fault.REFUSED: re.compile(
        r'no pg_hba\.conf entry|(?:database|role) ".*" does not exist|'
        r"password authentication failed|authentication failed for user|"
        r"pg_hba\.conf rejects|permission denied for database|is not permitted to log in|"
        r"is not currently accepting connections"
    ),
    Fault.NOT_READY: re.compile(
        r"the database system is (?:starting up|shutting down|in recovery)|"
        r"not (?:yet )?accepting connections"
    ),
    Fault.OVERLOADED: re.compile(r"too many (?:clients|connections)|remaining connection slots"),
    Fault.LOCAL: re.compile("Too many open files"),
}

#: What poolers say, by text: PgBouncer has one SQLSTATE for everything (08P01), pgcat another
#: (58000), and a failed connect of libpq's shows none. From the sources of PgBouncer 1.25,
#: pgcat 1.3, Odyssey 1.4 and pgpool-II 4.6; PgBouncer's were seen, too.
_POOLERS = {
    # The pooler has room for no more clients, or no server to spare for this one.
    Fault.OVERLOADED: re.compile(
        r"no more connections allowed|client connections exceeded|query_wait_timeout|"
        r"bouncer resources exhaustion|"
        # Odyssey
        r"too many (?:tcp connections|client tcp connections|active clients)|"
        r"soft out of memory|"
        # pgcat
        r"checkout failure limit reached"
    ),
    # It lets clients in and has no server.
    Fault.NOT_READY: re.compile(
        r"server login has been failing|server_login_retry|server login failed|"
        r"client_login_timeout \(server down\)|server shutting down|"
        # Odyssey
        r"failed to get remote server connection|failed to connect to remote server|"
        r"can't find suitable host|is gracefully shutting down|client routing failed|"
        # pgcat
        r"could not get connection from the pool|Pool down for database|"
        # pgpool-II
        r"pgpool is not accepting any new connections|all backend nodes are down|"
        r"failed to create a backend (?:\d+ )?connection|"
        r"unable to connect to backend"
    ),
    # It does not know what we ask for, or who we are.
    Fault.REFUSED: re.compile(
        r"no such database|no such user|database \".*\" is disabled|login rejected|"
        r"(?:SASL|certificate|\"trust\"|LDAP) authentication failed|SSL required|"
        r"unsupported (?:options )?startup parameter|"
        # Odyssey
        r"route for '.*' is not found|incorrect user|user blocked|"
        r"host based authentication rejected|SSL is required|"
        # pgcat
        r"No pool configured for"
    ),
    # The statement, or the connection, has lasted longer than it may.
    Fault.KILLED: re.compile(
        r"query[_ ]timeout|(?:idle )?transaction[_ ]timeout|client_idle_timeout|"
        r"admin forced disconnect|pool statement timeout|idle transaction timeout"
    ),
    # Its server is gone, or it is going itself.
    Fault.LOST: re.compile(
        r"server conn crashed|server connection closed|"
        r"error receiving data from server|terminating connection due to administrator|"
        r"remote server read/write error|unable to read (?:data from|message (?:kind|length))|"
        r"connection terminated due to online recovery"
    ),
}
_POOLERS_STATES = frozenset({None, "08P01", "08S01", "08006", "53200", "57000", "58000", "XX000"})

#: A statement that met one of these waited for a server, and was sent to none.
_WAITED = re.compile(
    r"server login has been failing|server_login_retry|query_wait_timeout|"
    r"client_login_timeout \(server down\)|no more connections allowed|"
    r"failed to get remote server connection|failed to connect to remote server|"
    r"could not get connection from the pool"
)

#: The severity before what a server answers to a connect.
_ANSWERED = re.compile(r"\b(?:FATAL|PANIC): ")

#: What the drivers raise of a socket's end and, by the last two, of bytes that libpq cannot read: a
#: pooler whose server is lost in the middle of an answer says so in the middle of it (seen).
_NO_ANSWER = ("OperationalError", "InterfaceError", "DatabaseError", "InternalError")

#: libpq's words for an option that it does not know or cannot read.
_BAD_OPTION = re.compile(
    r"invalid connection option|invalid dsn|invalid integer value|invalid port number|"
    r"invalid \w+ value: |missing \"=\" after"
)
_LOST_TEXT = re.compile(
    r"server closed the connection|connection already closed|the connection is (?:closed|lost)|"
    r"consuming input failed|sending (?:query|prepared query) failed|"
    r"could not (?:receive|send) data|terminating connection|"
    r"SSL connection has been closed|SSL SYSCALL error"
)


def _meaning(table: dict[Fault, re.Pattern[str]], text: str) -> Fault | None:
    return next((fault for fault, pattern in table.items() if pattern.search(text)), None)


def sqlstate_of(exc: BaseException) -> str | None:
    # psycopg 3 says sqlstate, psycopg2 pgcode.
    state = getattr(exc, "sqlstate", None) or getattr(exc, "pgcode", None)
    return state if isinstance(state, str) else None


def _severity(exc: BaseException) -> str | None:
    """Return the severity of the server's answer ``exc``."""
    # PostgreSQL's documentation, "Error and Notice Message Fields": the session goes on after an
    # ERROR; a FATAL or a PANIC ends it.
    found: str | None = getattr(getattr(exc, "diag", None), "severity_nonlocalized", None)
    return found


def _goes_on(exc: BaseException) -> bool:
    """Return whether the session goes on after the server's answer ``exc``."""
    return _severity(exc) == "ERROR"


#: What libpq takes by name (its documentation, up to 18), psycopg's connect(), and Django's
#: engine in OPTIONS.
_OPTIONS = frozenset(
    "host hostaddr port dbname user password passfile require_auth channel_binding "
    "connect_timeout client_encoding options application_name fallback_application_name "
    "keepalives keepalives_idle keepalives_interval keepalives_count tcp_user_timeout replication "
    "gssencmode gsslib gssdelegation krbsrvname sslmode requiressl sslnegotiation sslcompression "
    "sslcert sslkey sslkeylogfile sslpassword sslcertmode sslrootcert sslcrl sslcrldir sslsni "
    "requirepeer min_protocol_version max_protocol_version ssl_min_protocol_version "
    "ssl_max_protocol_version service servicefile target_session_attrs load_balance_hosts "
    "scram_client_key scram_server_key oauth_issuer oauth_client_id oauth_client_secret "
    "oauth_scope "
    # psycopg's.
    "conninfo dsn autocommit prepare_threshold context row_factory cursor_factory "
    "connection_factory database async async_ "
    # Django's.
    "isolation_level assume_role server_side_binding pool".split()
)


def _poolers_words(exc: BaseException, connecting: bool = False) -> str:
    """Return the words by which a pooler may have answered; "" if a server did.

    A function's own RAISE, postgres_fdw and dblink answer with any words and any SQLSTATE. Their
    ERROR names the function of the server's source that raised it, which no pooler does.
    """
    diagnostics = getattr(exc, "diag", None)
    is_servers = getattr(diagnostics, "source_function", None) is not None
    if sqlstate_of(exc) not in _POOLERS_STATES or (is_servers and _goes_on(exc)):
        return ""
    is_answer = not connecting or getattr(diagnostics, "severity", None) is not None
    # An answer goes on after its first line with the statement, which may quote anything. The
    # error of a failed connect has a line for each address.
    return str(exc).partition("\n")[0] if is_answer else str(exc)


#: libpq's parameters, and the socket's options that they set.
_SOCKET_OPTIONS = {
    "keepalives": ("SO_KEEPALIVE",),
    # macOS has the second name.
    "keepalives_idle": ("TCP_KEEPIDLE", "TCP_KEEPALIVE"),
    "keepalives_interval": ("TCP_KEEPINTVL",),
    "keepalives_count": ("TCP_KEEPCNT",),
    "tcp_user_timeout": ("TCP_USER_TIMEOUT",),
}


def _may_be_in_a_file(params: Any) -> bool:
    """Return whether libpq reads parameters out of a service file."""
    return "service" in params or "PGSERVICE" in os.environ


@functools.cache
def _options_of(names: tuple[str, ...]) -> frozenset[str]:
    return frozenset(option for name in names for option in _SOCKET_OPTIONS[name])


@functools.cache
def _keepalive_parameters(seconds: float) -> dict[str, int]:
    values = {name: value for name, _, _, value in sockets.keepalive_options(seconds)}
    parameters = {
        name: values[option]
        for name, options in _SOCKET_OPTIONS.items()
        for option in options
        # libpq's own default; each parameter takes psycopg its time.
        if option in values and name != "keepalives"
    }
    if _libpq_version() < 120_000:
        # libpq takes no connection with a parameter that it does not know. (Release notes of 12)
        parameters.pop("tcp_user_timeout", None)
    return parameters


def _libpq_version() -> int:
    """Return the oldest libpq that is loaded: each driver may have one of its own."""
    psycopg, psycopg2 = sys.modules.get("psycopg"), sys.modules.get("psycopg2.extensions")
    versions = [] if psycopg is None else [psycopg.pq.version()]
    versions += [] if psycopg2 is None else [psycopg2.libpq_version()]
    return min(versions, default=0)


def is_psycopg2(connection: Any) -> bool:
    """Return whether ``connection`` is psycopg2's. aiomysql has the method, too."""
    return hasattr(connection, "get_transaction_status") and not hasattr(connection, "thread_id")


_OWN = frozenset({"psycopg", "psycopg_c", "psycopg_binary", "psycopg2", "django"})


#: Parameters that are on where a transaction may be READ ONLY by itself.
_READ_ONLY = ("default_transaction_read_only", "in_hot_standby")

#: libpq's PQTRANS_ACTIVE, PQTRANS_INTRANS and PQTRANS_INERROR.
_ACTIVE, _OPEN, _FAILED = 1, (1, 2, 3), 3


class PostgreSQL(Driver):
    """psycopg 3 and psycopg2.

    What needs nothing here: autocommit costs no round trip; Django asks the connection, and not
    the server, which version it has; ``connect_timeout`` covers the whole of a libpq connect; a
    pooler that is full says so in words of its own, and passes on what a server says; named cursors
    are known by their names.
    """

    MODULES = ("psycopg", "psycopg2", "psycopg_pool", "asyncpg")
    WATCHED = True
    LEAVES = True
    OPTIONS = _OPTIONS
    TIMEOUTS = ("connect_timeout",)
    #: libpq makes two of one.
    LEAST_TIMEOUT = 2
    ENDS_CONNECTION = ("57P05", "25P03", "25P04")

    def fault(self, exc: BaseException, connecting: bool) -> Fault:
        if is_a(exc, "PoolTimeout", "TooManyRequests", "PoolClosed"):
            # Our pool had nothing to give; the peer was not asked.
            return Fault.OVERLOADED
        state = sqlstate_of(exc)
        text = str(exc)
        if is_a(exc, "OperationalError", "InternalError", "DatabaseError"):
            meaning = _meaning(_POOLERS, _poolers_words(exc, connecting))
            if meaning is not None:
                return meaning
        if state == "08006" and connecting:
            return Fault.UNREACHABLE
        if state in _ENDS and not connecting and _goes_on(exc):
            return Fault.OTHER
        if state in BY_SQLSTATE:
            return BY_SQLSTATE[state]
        if connecting and self.is_option_error(exc):
            # libpq parsed the options and went nowhere.
            return Fault.LOCAL
        if state is not None or not is_a(exc, "OperationalError", "InterfaceError"):
            return Fault.OTHER
        if not connecting:
            return Fault.LOST if _LOST_TEXT.search(text.partition("\n")[0]) else Fault.OTHER
        if is_a(exc, "InterfaceError"):
            return Fault.OTHER
        # Without a meaning it was reached, and says what no table lists; or it was not reached.
        otherwise = Fault.OTHER if _ANSWERED.search(text) else Fault.UNREACHABLE
        return _meaning(_QUOTED, text) or otherwise

    def takes_two(self, params: Any) -> bool:
        # What is sent without parameters may be two statements.
        return True

    def may_write(self, connection: Any, asks: bool) -> bool:
        # A server says unasked what the session's default is, since PostgreSQL 14. What the
        # transaction itself is it says when it is asked.
        read_only = "readonly" if is_psycopg2(connection) else "read_only"
        if int(connection.info.transaction_status) == _FAILED:
            return False
        if getattr(connection, read_only, None) is True:
            return False
        if not (asks or any(connection.info.parameter_status(name) == "on" for name in _READ_ONLY)):
            return True
        with connection.cursor() as cursor:
            cursor.execute("SHOW transaction_read_only")
            return bool(cursor.fetchone()[0] == "off")

    def commit_after(self, connection: Any, statement: str, together: bool) -> None:
        # psycopg2 keeps its own count of transactions: a COMMIT that is not its own it would send
        # once more. In its pipeline mode psycopg sends no two statements as one.
        if not together or is_psycopg2(connection) or self.is_busy(connection):
            super().commit_after(connection, statement, together)
        else:
            connection.execute(f"{statement}; COMMIT", prepare=False).close()

    def code_of(self, exc: BaseException) -> str | None:
        return sqlstate_of(exc)

    def about(self, exc: BaseException) -> str:
        # The text names the constraint, which may have any name, and quotes values.
        return getattr(getattr(exc, "diag", None), "table_name", None) or str(exc)

    def owns(self, connection: Any) -> bool:
        """Return whether ``connection`` is a driver's of these, whatever it is wrapped in."""
        if hasattr(connection, "pgconn") or is_psycopg2(connection):
            return True
        return type(connection).__module__.startswith("asyncpg.")

    def ends_its_cursors(self, connection: Any) -> bool:
        return is_psycopg2(connection)

    def is_closed(self, connection: Any) -> bool:
        return bool(connection.closed)

    def is_option_error(self, exc: BaseException) -> bool:
        return sqlstate_of(exc) is None and _BAD_OPTION.search(str(exc)) is not None

    def is_answer(self, exc: BaseException) -> bool:
        state = sqlstate_of(exc)
        return state is not None and (_goes_on(exc) or not state.startswith(("08", "57P")))

    def proves_not_run(self, exc: BaseException) -> bool:
        is_refusal = sqlstate_of(exc) == _READ_ONLY_REFUSAL
        return is_refusal or _WAITED.search(_poolers_words(exc)) is not None

    def outcome_is_unknown(self, exc: BaseException) -> bool:
        state = sqlstate_of(exc)
        if state is None:
            return type(exc).__name__ in _NO_ANSWER
        if state in _ENDS and self.fault(exc, connecting=False) is Fault.OTHER:
            # A function's own ERROR, or a foreign server's: the session goes on, and the
            # transaction is rolled back.
            return False
        # 08007 transaction resolution unknown, 40003 statement completion unknown;
        # whatever else ended the connection came from somewhere in between.
        if state == "40003" or state.startswith(("08", "57P", "58", "XX")):
            return True
        # A disk that is full ends the server in the middle of COMMIT (53100), whose record may
        # be written by then. The time-outs end a session before COMMIT.
        return _severity(exc) in ("FATAL", "PANIC") and state not in self.ENDS_CONNECTION

    def question_of(self, exc: BaseException) -> str:
        if sqlstate_of(exc) == _READ_ONLY_REFUSAL:
            return "writable"
        # A pooler without a server lets clients in.
        return "backend" if _POOLERS[Fault.NOT_READY].search(_poolers_words(exc)) else ""

    def may_be_busy(self, exc: BaseException) -> bool:
        # pgcat's: it bans a server that has no connection to spare.
        return "could not get connection from the pool" in _poolers_words(exc)

    def fileno(self, connection: Any) -> int | None:
        return sockets.descriptor(connection.fileno())

    def leads_to(self, connection: Any) -> tuple[str, str] | None:
        host, port = connection.info.host, connection.info.port
        return (host, str(port)) if isinstance(host, str) and host else None

    def keepalive_options(self, params: Any, seconds: float) -> dict[str, Any]:
        if _may_be_in_a_file(params) or params.get("keepalives") is not None:
            # What is said here would go before the file. With keepalives=0 libpq sets none of them.
            return {}
        return {
            name: value
            for name, value in _keepalive_parameters(seconds).items()
            if params.get(name) is None
        }

    def socket_options(self, connection: Any, params: Any) -> frozenset[str]:
        given = {"keepalives": 1, **params}
        # With what keepalive_options() says nothing is left to ask.
        if not _SOCKET_OPTIONS.keys() <= given.keys() and _may_be_in_a_file(params):
            ask = getattr(connection, "get_dsn_parameters", None) or connection.info.get_parameters
            given = ask()
        return _options_of(tuple(name for name in _SOCKET_OPTIONS if given.get(name) is not None))

    def leave(self, connection: Any) -> None:
        sockets.detach(connection.fileno())

    def ping(self, connection: Any) -> None:
        # A transaction that has failed answers nothing but its end; what becomes
        # of it is a rollback either way.
        if int(connection.info.transaction_status) == _FAILED:
            return
        with connection.cursor() as cursor:
            cursor.execute("SELECT 1")

    def is_busy(self, connection: Any) -> bool:
        # psycopg 3 in its pipeline mode, where an error may be an earlier statement's.
        pgconn = getattr(connection, "pgconn", None)
        if pgconn is None:
            return False
        try:
            return int(pgconn.pipeline_status) != 0
        except Exception:
            # A libpq before 14 has no such mode.
            return False

    def as_text(self, connection: Any, sql: Any) -> Any:
        # psycopg.sql, psycopg2.sql: the only way to LISTEN on a channel that a variable names.
        try:
            if hasattr(sql, "as_string"):
                return sql.as_string(connection)
            if hasattr(sql, "interpolations"):
                # Python 3.14's t"…", which psycopg takes from 3.3 on.
                from psycopg.sql import as_string

                return as_string(sql, connection)
            return sql
        except Exception:
            # What it is made of cannot be quoted: it will not be sent.
            return sql

    def is_usual(self, connection: Any, cls: type) -> bool:
        # Applications may register adapters of their own, psycopg2's ``AsIs`` among them.
        if is_psycopg2(connection):
            from psycopg2 import extensions

            known = (extensions.adapters.get((c, extensions.ISQLQuote)) for c in cls.__mro__[:-1])
            adapter = next((one for one in known if one is not None), None)
            if adapter is None:
                # It quotes itself, if it is the driver's; nothing else can be sent.
                return cls.__module__.partition(".")[0] in _OWN
        else:
            from psycopg.adapt import PyFormat

            adapter = connection.adapters.get_dumper(cls, PyFormat.TEXT)
        return str(adapter.__module__).partition(".")[0] in _OWN

    def status(self, connection: Any) -> Callable[[], object] | None:
        # PQtransactionStatus, of which 0 is idle. Once a connection is lost libpq knows no longer.
        # No Python function is called: each statement asks.
        pgconn = getattr(connection, "pgconn", None)
        if pgconn is not None:
            return functools.partial(getattr, pgconn, "transaction_status")
        ask: Callable[[], object] | None = getattr(connection, "get_transaction_status", None)
        return ask

    def in_transaction(self, connection: Any) -> bool | None:
        known = self._number(connection)
        if known in _OPEN:
            return True
        return False if known == 0 else None

    def is_at_rest(self, connection: Any) -> bool:
        return (
            not self.in_transaction(connection)
            and getattr(connection, "autocommit", True) is not False
        )

    def counter(self, connection: Any) -> sockets.Counter | None:
        return None if self.is_closed(connection) else sockets.counter(self.fileno(connection))

    def is_in_step(self, connection: Any, exc: BaseException) -> bool:
        return self._number(connection) != _ACTIVE

    def _number(self, connection: Any) -> int | None:
        """Return libpq's number: psycopg has an enumeration of them, a mock none."""
        ask = self.status(connection)
        known = None if ask is None else ask()
        return int(known) if isinstance(known, int) else None


postgresql = PostgreSQL()
