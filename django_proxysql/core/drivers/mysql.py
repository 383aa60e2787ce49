"""mysqlclient and PyMySQL, against MySQL, MariaDB, Galera, ProxySQL, MaxScale, MySQL Router.

The codes come from the servers' and Connector/C's own lists (``mysqld_error.h``,
``errmsg.h``); what each of them was seen to mean is tested in
``tests/test_faults.py``, and against real servers in ``tests/test_connecting.py``.
"""

from __future__ import annotations

import contextlib
import functools
import math
import re
import socket
import types
from collections.abc import Callable
from typing import Any

from .. import sockets
from ..faults import Fault
from .base import Driver, is_a, mark

#: Codes that mean the same wherever they turn up.
BY_CODE = {
    # The client's own: no socket, no TCP, no such host, out of sockets.
    **dict.fromkeys((2001, 2002, 2003, 2004, 2005), Fault.UNREACHABLE),
    # The server's while it is being connected to: bad host name, bad
    # handshake, host blocked, host not allowed, no thread, net read.
    **dict.fromkeys((1042, 1043, 1129, 1130, 1135, 1159), Fault.UNREACHABLE),
    # Database denied, user denied, unknown database, old protocol, unknown
    # plugin, socket plugin denied, password expired; and the client's own.
    **dict.fromkeys((1044, 1045, 1049, 1251, 1524, 1698, 1820, 1862), Fault.REFUSED),
    **dict.fromkeys((2049, 2054, 2059, 2061), Fault.REFUSED),
    # A broken init_connect, TLS required, account locked: MySQL's, after too many wrong
    # passwords, MariaDB's.
    **dict.fromkeys((1184, 3159, 3118, 3955, 4151), Fault.REFUSED),
    # Server shutting down, offline mode, read-only, ProxySQL without a backend.
    **dict.fromkeys((1053, 3032, 1836, 9001, 9002), Fault.NOT_READY),
    **dict.fromkeys((1040, 1203, 1226), Fault.OVERLOADED),
    **dict.fromkeys((2006, 2013, 2027, 2045, 2055), Fault.LOST),
    # 1153: the packet is larger than max_allowed_packet, and the server hangs up.
    **dict.fromkeys((1927, 3169, 1317, 1907, 1969, 3024, 1153), Fault.KILLED),
    **dict.fromkeys((1205, 1213, 1020, 1614, 3101), Fault.CONFLICT),
}

#: Codes that say something with these words in their text, and without them nothing.
BY_TEXT = {
    # Otherwise it is "Unknown command".
    1047: ("WSREP", Fault.NOT_READY),
    1180: ("Primary Component", Fault.NOT_READY),
    1815: ("Session creation failed", Fault.NOT_READY),
    1290: ("read-only", Fault.NOT_READY),
    # wait_timeout on MySQL; on MariaDB it names a table that does not exist.
    4031: ("disconnected by the server", Fault.KILLED),
}

#: Codes of an established connection that while connecting mean: not reached.
_LOST_WHILE_CONNECTING = frozenset({2006, 2012, 2013, 2026, 2027, 2055})

#: "Can't create … socket (24)": EMFILE, ENFILE and ENOMEM are this side's trouble.
_NO_DESCRIPTORS = re.compile(r"[(\[](?:Errno )?(?:24|23|12)[)\]]")

#: "Unknown server host 'db1' (-11)" ends in getaddrinfo's code, not in the system's.
#: These two say that the resolver itself had no descriptor or no memory left.
_RESOLVER_FAILED = {getattr(socket, name, None) for name in ("EAI_SYSTEM", "EAI_MEMORY")}
_CODE_AT_END = re.compile(r"\((-?\d+)\)(?:$| \[while connecting )")

#: In words of ProxySQL's own: another error may quote a value that the statement has.
_PROXYSQL_NO_BACKEND = re.compile(r"[^'\"`]*while reaching hostgroup")


def message_of(exc: BaseException) -> str:
    return str(exc.args[-1]) if exc.args else ""


#: What mysqlclient and PyMySQL take by name, and Django's engine in OPTIONS.
_OPTIONS = frozenset(
    # Both.
    "host user password passwd database db port unix_socket conv connect_timeout compress "
    "named_pipe init_command read_default_file read_default_group cursorclass use_unicode "
    "charset collation sql_mode client_flag ssl local_infile read_timeout write_timeout "
    "autocommit binary_prefix "
    # mysqlclient's.
    "auth_plugin ssl_mode multi_statements server_public_key_path local_infile_dir "
    "executemany_fallback "
    # PyMySQL's.
    "max_allowed_packet defer_connect auth_plugin_map bind_address program_name "
    "server_public_key ssl_ca ssl_cert ssl_disabled ssl_key ssl_key_password ssl_verify_cert "
    "ssl_verify_identity "
    # Django's.
    "isolation_level".split()
)


#: The protocol's SERVER_STATUS_IN_TRANS.
_IN_TRANSACTION = 1
#: The protocol's CLIENT_MULTI_STATEMENTS.
_MULTI_STATEMENTS = 1 << 16

#: Options of a socket that both drivers set while they connect.
_SET_ALREADY = frozenset({"SO_KEEPALIVE"})

#: The drivers' own methods in which an answer may be outstanding.
_IN_FLIGHT = frozenset(
    "_query query nextset _nextset _discard _do_get_result commit rollback autocommit "
    "_send_autocommit_mode _execute_command next_result ping select_db".split()
)


def _is_connector_c() -> bool:
    try:
        import MySQLdb

        version = str(MySQLdb.get_client_info())
    except Exception:
        return False
    # MariaDB's Connector/C counts 3.x (and once 10.x), MySQL's client 5, 8, 9.
    return version.startswith(("3.", "10."))


class MySQL(Driver):
    """mysqlclient and PyMySQL.

    What needs nothing here: an option that they do not know is Python's TypeError or ValueError;
    each statement is answered before the next; no argument sets a socket's options; what has been
    read is in the cursor; what the server said last is still known when a connection is lost.
    """

    MODULES = ("MySQLdb", "pymysql", "aiomysql", "asyncmy")
    WATCHED = True
    LEAVES = True
    #: MaxScale was seen to say 1290 of an INSERT whose row stood, and ProxySQL may send a statement
    #: a second time.
    SPLITS = True
    OPTIONS = _OPTIONS
    #: PyMySQL's does not cover the handshake; see :meth:`trial_options`.
    TIMEOUTS = ("connect_timeout",)
    ENDS_CONNECTION = (1153, 1927, 3169, 4031)

    def code_of(self, exc: BaseException) -> int | None:
        code = exc.args[0] if exc.args else None
        return code if isinstance(code, int) else None

    def fault(self, exc: BaseException, connecting: bool) -> Fault:
        code, text = self.code_of(exc), message_of(exc)
        if code in (2001, 2002, 2003, 2004) and _NO_DESCRIPTORS.search(text):
            return Fault.LOCAL
        if code == 2005:
            resolvers = _CODE_AT_END.search(text)
            if resolvers and int(resolvers[1]) in _RESOLVER_FAILED:
                return Fault.LOCAL
        if connecting and code in _LOST_WHILE_CONNECTING:
            return Fault.UNREACHABLE
        # Under TLS a KILL, a reset and a read_timeout all come as 2026.
        if code == 2026:
            return Fault.LOST
        if _PROXYSQL_NO_BACKEND.match(text):
            return Fault.NOT_READY
        if code in BY_TEXT:
            words, meaning = BY_TEXT[code]
            return meaning if words in text else Fault.OTHER
        if code in BY_CODE:
            return BY_CODE[code]
        if connecting and code is None and "Packet sequence number wrong" in text:
            # PyMySQL's: an answer that is none of the handshake's. (ProxySQL at its connection
            # limit, over TLS)
            return Fault.UNREACHABLE
        # PyMySQL, and mysqlclient on a closed handle, raise InterfaceError(0, '').
        if is_a(exc, "InterfaceError") and (code == 0 or not exc.args):
            return Fault.LOST
        return Fault.OTHER

    def session_options(self, params: Any, autocommit: bool) -> dict[str, Any]:
        # Without it both switch autocommit off (PEP 249), and Django on again: two round trips
        # that change nothing.
        return {} if "autocommit" in params else {"autocommit": autocommit}

    def opener(
        self, connect: Callable[..., Any], params: Any, level: str, version: str
    ) -> Callable[..., Any] | None:
        if (
            # A pool's connections are connected already, and a tracer is to see the statement.
            not _is_of_driver(connect, params)
            or params.get("charset") != _CHARSET
            or params.get("collation")
            # Before mysqlclient 2.1 Django takes this out of what it has opened.
            or params.get("conv", {}).get(bytes) is bytes
        ):
            return None
        return _opening(connect, level, "MariaDB" in version)

    def recording_options(self, params: Any) -> dict[str, Any]:
        if not self.takes_two(params):
            return {}
        # PyMySQL leaves it out, mysqlclient sets it by itself.
        return {"client_flag": params.get("client_flag", 0) | _MULTI_STATEMENTS}

    def takes_two(self, params: Any) -> bool:
        return bool(params.get("multi_statements", True))

    def commit_after(self, connection: Any, statement: str, together: bool) -> None:
        if not together:
            super().commit_after(connection, statement, together)
            return
        # mysqlclient's; PyMySQL reads the first result by itself.
        store = getattr(connection, "store_result", None)
        try:
            connection.query(f"{statement}; COMMIT")
            if store is not None:
                store()
        except Exception as exc:
            mark(exc, "of_first")
            raise
        if store is None:
            is_answered = connection._result.has_next
            if is_answered:
                connection.next_result()
        else:
            is_answered = connection.next_result() == 0
            if is_answered:
                store()
        if not is_answered:
            # Something in between has run the first statement alone.
            connection.commit()

    def greeting(self, connection: Any) -> str:
        return str(connection.get_server_info())

    def trial_options(self, params: Any, seconds: float) -> dict[str, Any]:
        # ``connect_timeout`` ends with the handshake: a server that freezes after authentication
        # hangs ``SET NAMES`` for ever (seen with SIGSTOP).
        whole = max(1, math.ceil(seconds))
        return {
            "connect_timeout": min(whole, params.get("connect_timeout", whole)),
            "read_timeout": whole,
            "write_timeout": whole,
        }

    def is_closed(self, connection: Any) -> bool:
        # By this side: the drivers know no more.
        return getattr(connection, "open", True) in (False, 0)

    def is_answer(self, exc: BaseException) -> bool:
        # The client's own codes are 2000 to 2999 (errmsg.h, CR_MIN_ERROR); 0 and none are
        # mysqlclient's own complaints.
        code = self.code_of(exc)
        return code is not None and code > 0 and not 2000 <= code < 3000

    def _is_read_only_refusal(self, exc: BaseException) -> bool:
        return (
            self.code_of(exc) in (1290, 1836)
            and self.fault(exc, connecting=False) is Fault.NOT_READY
        )

    def goes_on_without(self, exc: BaseException, by_server: bool) -> bool:
        # 1792: the transaction is READ ONLY.
        return self.code_of(exc) == 1792 or (by_server and self._is_read_only_refusal(exc))

    def proves_not_run(self, exc: BaseException) -> bool:
        # A server's own answer does; see SPLITS. 1180, 9001 and 9002 prove nothing.
        code = self.code_of(exc)
        if code == 2006:
            # Connector/C's for "not sent" (seen over TCP and TLS); other clients say it after
            # sending, too.
            return _is_connector_c()
        return (code == 1047 and "WSREP" in message_of(exc)) or self._is_read_only_refusal(exc)

    def outcome_is_unknown(self, exc: BaseException) -> bool:
        # A constraint that fails at COMMIT is an answer; anything less clear is not.
        return type(exc).__name__ not in ("IntegrityError", "DataError", "ProgrammingError")

    def may_be_busy(self, exc: BaseException) -> bool:
        return self.code_of(exc) in (9001, 9002) or bool(
            _PROXYSQL_NO_BACKEND.match(message_of(exc))
        )

    def question_of(self, exc: BaseException) -> str:
        code = self.code_of(exc)
        if code in (1047, 1180):
            return "galera"
        if self.may_be_busy(exc):
            return "backend"
        return "writable" if self._is_read_only_refusal(exc) else ""

    def fileno(self, connection: Any) -> int | None:
        # PyMySQL has no public one.
        number = getattr(connection, "fileno", None)
        return sockets.descriptor(number() if callable(number) else None)

    def socket_options(self, connection: Any, params: Any) -> frozenset[str]:
        return _SET_ALREADY

    def leave(self, connection: Any) -> None:
        # PyMySQL's, whatever it is wrapped in. As its destructor: close() would send COM_QUIT.
        force_close = getattr(connection, "_force_close", None)
        if callable(force_close):
            force_close()
        else:
            sockets.detach(connection.fileno())

    def ping(self, connection: Any) -> None:
        if hasattr(connection, "_force_close"):
            # PyMySQL's own default is to reconnect, and all session state is gone.
            connection.ping(reconnect=False)
        else:
            connection.ping()

    def leads_to(self, connection: Any) -> tuple[str, str] | None:
        host = getattr(connection, "host", None)
        if host is None:
            # mysqlclient: "db1 via TCP/IP". PyMySQL has the host.
            host, way, _ = str(connection.get_host_info()).partition(" via TCP/IP")
            host = host if way else None
        elif getattr(connection, "unix_socket", None):
            return None
        return (host, str(connection.port)) if isinstance(host, str) else None

    def is_unbuffered(self, params: Any) -> bool:
        cursorclass = params.get("cursorclass")
        return cursorclass is not None and any(
            cls.__name__ in ("SSCursor", "CursorUseResultMixIn")
            for cls in getattr(cursorclass, "__mro__", ())
        )

    def is_usual(self, connection: Any, cls: type) -> bool:
        # The option ``conv`` may name functions of the application's.
        encoder = connection.encoders.get(cls)
        if encoder is None:
            # It is quoted as a text.
            return True
        module = getattr(encoder, "__module__", None) or type(encoder.__self__).__module__
        return module.partition(".")[0] in ("MySQLdb", "pymysql", "django", "builtins")

    def in_transaction(self, connection: Any) -> bool | None:
        # PyMySQL keeps the last answer's status flags; they do not show reads. mysqlclient shows of
        # them only whether autocommit is on.
        flags = getattr(connection, "server_status", None)
        return True if type(flags) is int and flags & _IN_TRANSACTION else None

    def is_at_rest(self, connection: Any) -> bool:
        autocommit = getattr(connection, "get_autocommit", None)
        try:
            if callable(autocommit) and autocommit() in (False, 0):
                return False
        except Exception:  # noqa: S110 - mysqlclient's, of a connection that was closed
            pass
        return not self.in_transaction(connection)

    def counter(self, connection: Any) -> sockets.Counter | None:
        # PyMySQL has no public name for it. Without one nothing is known, and nothing done.
        of = connection if hasattr(connection, "fileno") else getattr(connection, "_sock", None)
        return sockets.counter(self.fileno(of))

    def is_in_step(self, connection: Any, exc: BaseException) -> bool:
        # Neither driver knows. Where it was raised decides: before the statement was sent, or after
        # its result was read.
        traceback = exc.__traceback__
        in_flight = False
        while traceback is not None:
            frame = traceback.tb_frame
            if frame.f_globals.get("__name__", "").startswith(("MySQLdb.", "pymysql.")):
                name = frame.f_code.co_name
                in_flight = name in _IN_FLIGHT or (in_flight and name != "_post_get_result")
            traceback = traceback.tb_next
        return not in_flight


mysql = MySQL()


# Sessions that begin with an isolation level. The driver sends SET NAMES while it connects, and
# Django the level by a cursor of its own. One statement does both: a round trip less, no cursor.
# ProxySQL's parser and MaxScale's take it (by their sources), as they take what Rails sends.

#: Django's own; what it is in Python is "utf8".
_CHARSET = "utf8mb4"


def _is_of_driver(connect: Any, params: Any) -> bool:
    if type(connect) is types.FunctionType:
        # A decorated one has the driver's name in __module__.
        return bool(connect.__globals__.get("__name__") == "MySQLdb")
    # PyMySQL's is a class. It runs an init_command after SET NAMES; before 1.1 it sends no such.
    return (
        type(connect) is type
        and connect.__module__ == "pymysql.connections"
        and hasattr(connect, "set_character_set")
        and "init_command" not in params
    )


@functools.cache
def _opening(connect: Any, level: str, is_mariadb: bool) -> type:
    theirs: Any = connect
    if type(connect) is types.FunctionType:
        from MySQLdb import connections

        theirs = connections.Connection
    # MariaDB has the other name since 11.1, and this one still.
    variable = "tx_isolation" if is_mariadb else "transaction_isolation"
    both = f"SET NAMES {_CHARSET}, @@SESSION.{variable} = '{level.replace(' ', '-')}'"

    class Connection(theirs):  # type: ignore[misc]
        __module__, __qualname__ = theirs.__module__, theirs.__qualname__

        #: Of no pool. To look for what is not there takes longer than to find it.
        _pool = None
        _is_set_up = False

        def set_character_set(self, *args: Any) -> None:
            """Set both when the driver calls it, while it connects; later what the caller says."""
            if self._is_set_up:
                super().set_character_set(*args)
                return
            self._is_set_up = True
            try:
                if not self._takes_both():
                    super().set_character_set(*args)
                    self.query(f"SET SESSION TRANSACTION ISOLATION LEVEL {level}")
            except BaseException:
                # The error's traceback holds us, and with us the socket.
                with contextlib.suppress(Exception):
                    self.close()
                raise

        def _takes_both(self) -> bool:
            """Set both by one statement, where the driver and the server take that."""
            # The driver has told the server in the handshake, and quotes texts by it?
            if self.character_set_name() != _CHARSET:
                return False
            try:
                self.query(both)
            except Exception as exc:
                if not mysql.is_answer(exc):
                    raise
                # Something in between does not know the statement: one by one, as Django does.
                return False
            self.encoding = "utf8"
            return True

    return Connection
