"""mysqlclient and PyMySQL, against MySQL, MariaDB, Galera, ProxySQL, MaxScale, MySQL Router.

The codes come from the servers' and Connector/C's own lists (``mysqld_error.h``,
``errmsg.h``); what each of them was seen to mean is tested in
``tests/test_faults_mysql.py`` against real servers.
"""

from __future__ import annotations

import math
import re
from typing import Any

from ..faults import Fault

MODULES = ("MySQLdb", "pymysql")

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
    **dict.fromkeys(
        # Server shutting down, offline mode, ProxySQL without a backend.
        (1053, 3032, 9001, 9002),
        Fault.NOT_READY,
    ),
    **dict.fromkeys((1040, 1203, 1226), Fault.OVERLOADED),
    **dict.fromkeys((2006, 2013, 2027, 2045, 2055), Fault.LOST),
    **dict.fromkeys((1927, 3169, 1317, 1907, 1969, 3024), Fault.KILLED),
    **dict.fromkeys((1205, 1213, 1020, 1614, 3101), Fault.CONFLICT),
}

#: Codes that say nothing until their text is read.
BY_TEXT = (
    # Without "WSREP" 1047 is "Unknown command".
    (1047, re.compile("WSREP"), Fault.NOT_READY),
    (1180, re.compile("Primary Component"), Fault.NOT_READY),
    (1815, re.compile("Session creation failed"), Fault.NOT_READY),
    (1290, re.compile("read-only"), Fault.NOT_READY),
    (1836, re.compile(""), Fault.NOT_READY),
    # 4031 is wait_timeout on MySQL; on MariaDB it names a table that does not exist.
    (4031, re.compile("disconnected by the server"), Fault.KILLED),
)

#: Codes of an established connection that while connecting mean: not reached.
_LOST_WHILE_CONNECTING = frozenset({2006, 2012, 2013, 2026, 2027, 2055})

#: "Can't create … socket (24)": EMFILE, ENFILE and ENOMEM are this side's trouble.
_NO_DESCRIPTORS = re.compile(r"[(\[](?:Errno )?(?:24|23|12)[)\]]")

_PROXYSQL_NO_BACKEND = "while reaching hostgroup"


def code_of(exc: BaseException) -> int | None:
    """Return the error's number, if it has one."""
    code = exc.args[0] if exc.args else None
    return code if isinstance(code, int) else None


def text_of(exc: BaseException) -> str:
    """Return the error's text."""
    return str(exc.args[1]) if len(exc.args) > 1 else str(exc)


def fault(exc: BaseException, connecting: bool) -> Fault:
    """Return what ``exc``, an error of this driver, says about the peer."""
    code, text = code_of(exc), text_of(exc)
    if code in (2001, 2002, 2003, 2004) and _NO_DESCRIPTORS.search(text):
        return Fault.LOCAL
    if connecting and code in _LOST_WHILE_CONNECTING:
        return Fault.UNREACHABLE
    # Under TLS a KILL, a reset and a read_timeout all come as 2026.
    if code == 2026:
        return Fault.LOST
    if _PROXYSQL_NO_BACKEND in text:
        return Fault.NOT_READY
    for textual_code, pattern, meaning in BY_TEXT:
        if code == textual_code and pattern.search(text):
            return meaning
    if code is not None and code in BY_CODE:
        return BY_CODE[code]
    # PyMySQL, and mysqlclient on a closed handle, raise InterfaceError(0, '').
    if type(exc).__name__ == "InterfaceError" and (code == 0 or not exc.args):
        return Fault.LOST
    return Fault.OTHER


def connect_options(params: Any, seconds: float) -> dict[str, Any]:
    """Return what limits one attempt to ``seconds``, where ``params`` does not.

    Whole seconds, at least one: the drivers take no fractions. PyMySQL's
    ``connect_timeout`` does not cover the handshake; see :func:`trial_options`.
    """
    if "connect_timeout" in params:
        return {}
    return {"connect_timeout": max(1, math.ceil(seconds))}


def trial_options(params: Any, seconds: float) -> dict[str, Any]:
    """Return what bounds a throw-away connection whose peer may freeze half-way.

    ``connect_timeout`` ends with the handshake: a server that freezes after
    authentication hangs ``SET NAMES`` for ever (seen with SIGSTOP).
    """
    whole = max(1, math.ceil(seconds))
    return {
        "connect_timeout": min(whole, params.get("connect_timeout", whole)),
        "read_timeout": whole,
        "write_timeout": whole,
    }
