"""A server that speaks MySQL's protocol and answers what a test has written down.

For what stands behind no package of Debian's: ProxySQL, MaxScale. Real drivers connect to it::

    with MaxScale() as proxy:
        proxy.reader.read_only = True
        connection = MySQLdb.connect(host=proxy.host, port=proxy.port, user="app", passwd="x")

What the two proxies here do was seen on ProxySQL 2.7.1 and MaxScale 24.02.3: who answers which
statement, with what, and after how long. The waits are shorter: ``patience`` seconds.
"""

from __future__ import annotations

import contextlib
import itertools
import re
import socket
import struct
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from .ports import HOST

VERSION = "10.11.6-MariaDB"
NO_SERVER = "Max connect timeout reached while reaching hostgroup {} after 10000ms"
READ_ONLY = "The MariaDB server is running with the --read-only option so it cannot execute this"

#: CLIENT_LONG_PASSWORD, CONNECT_WITH_DB, PROTOCOL_41, TRANSACTIONS, SECURE_CONNECTION,
#: MULTI_STATEMENTS, MULTI_RESULTS, PLUGIN_AUTH.
_CAPABILITIES = 0x1 | 0x8 | 0x200 | 0x2000 | 0x8000 | 0x10000 | 0x20000 | 0x80000
_QUIT, _INIT_DB, _QUERY, _PING = 0x01, 0x02, 0x03, 0x0E


class Refusal(Exception):
    """An error packet."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(code, text)
        self.code = code
        self.text = text


class Hangup(Exception):
    """The connection is closed without a word."""


class Rows(NamedTuple):
    """A result."""

    names: Sequence[str]
    rows: Sequence[Sequence[Any]]


class Client:
    """One connection: what the server knows of it."""

    def __init__(self, thread_id: int) -> None:
        self.thread_id = thread_id
        self.in_transaction = False
        self.autocommit = True
        #: The threads that serve it in the servers behind a proxy, by server.
        self.threads: dict[object, int] = {}


class ScriptedServer:
    """A MySQL server by itself: it answers every statement, and as its attributes say."""

    def __init__(self, version: str = VERSION) -> None:
        self.version = version
        self.read_only = False
        #: Connections beyond this number are refused with 1040; None: none is.
        self.limit: int | None = None
        #: Errors to be answered, by a pattern that the statement matches.
        self.refusals: dict[str, Refusal] = {}
        #: What was said, in turn: (thread id, statement).
        self.said: list[tuple[int, str]] = []
        #: The statements that a server has run, and would keep.
        self.ran: list[str] = []
        self._ids = itertools.count(self._first_id)
        self._sockets: set[socket.socket] = set()
        self._closed = threading.Event()
        self._listener = socket.create_server((HOST, 0))
        self.host, self.port = HOST, self._listener.getsockname()[1]
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    _first_id = 11

    # What it answers

    def answer(self, client: Client, statement: str) -> Rows | None:
        """Return what a statement returns.

        :raises Refusal: the statement is refused.
        :raises Hangup: the connection ends.
        """
        return self.served(client, statement, self, client.thread_id)

    def served(self, client: Client, statement: str, server: Any, thread_id: int) -> Rows | None:
        """Return what ``server`` answers, whose thread ``thread_id`` this is."""
        text = statement.rstrip(";").upper()
        if text.startswith("SELECT"):
            columns = re.sub(" FOR UPDATE$", "", statement[len("SELECT") :], flags=re.IGNORECASE)
            return selected(columns, server, thread_id)
        if text.startswith("SHOW"):
            return Rows(["Variable_name", "Value"], [])
        if text.startswith(("INSERT", "UPDATE", "DELETE", "REPLACE")):
            if server.read_only:
                raise Refusal(1290, READ_ONLY + " statement")
            self.ran.append(statement)
        return None

    # Connections

    @property
    def connections(self) -> int:
        """How many connections there are."""
        return len(self._sockets)

    def statements(self, containing: str = "") -> list[str]:
        """Return what was said so far."""
        return [statement for _, statement in self.said if containing in statement]

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop, and close all connections."""
        self._closed.set()
        for one in [self._listener, *self._sockets]:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()
        for thread in self._threads:
            thread.join(10)

    def _accept(self) -> None:
        while not self._closed.is_set():
            try:
                connected, _ = self._listener.accept()
            except OSError:
                return
            self._sockets.add(connected)
            thread = threading.Thread(target=self._serve, args=(connected,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _serve(self, connected: socket.socket) -> None:
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        wire = _Wire(connected)
        try:
            client = Client(next(self._ids))
            if self.limit is not None and self.connections > self.limit:
                wire.refuse(Refusal(1040, "Too many connections"), client)
                return
            wire.greet(self.version, client.thread_id)
            wire.receive()
            wire.agree(client)
            while True:
                command = wire.receive(first=True)
                if not command or command[0] == _QUIT:
                    return
                if command[0] != _QUERY:
                    wire.agree(client)
                    continue
                statement = command[1:].decode("utf-8", "replace").strip()
                self.said.append((client.thread_id, statement))
                try:
                    answer = self._following(client, statement)
                except Refusal as refusal:
                    wire.refuse(refusal, client)
                    continue
                if answer is None:
                    wire.agree(client)
                else:
                    wire.result(answer, client)
        except (OSError, Hangup):
            pass
        finally:
            self._sockets.discard(connected)
            with contextlib.suppress(OSError):
                connected.shutdown(socket.SHUT_RDWR)
            wire.close()
            connected.close()

    def _following(self, client: Client, statement: str) -> Rows | None:
        """Answer, and keep track of the transaction."""
        text = statement.upper()
        if text.startswith(("START TRANSACTION", "BEGIN")):
            client.in_transaction = True
        for pattern, refusal in self.refusals.items():
            if re.search(pattern, statement, re.IGNORECASE):
                raise refusal
        answer = self.answer(client, statement)
        if text.startswith(("COMMIT", "ROLLBACK")) and " TO " not in text:
            client.in_transaction = False
        if text.replace(" ", "").startswith("SETAUTOCOMMIT="):
            client.autocommit = text.endswith("1")
            client.in_transaction = client.in_transaction and not client.autocommit
        elif not client.autocommit and not text.startswith(("SET", "COMMIT", "ROLLBACK")):
            client.in_transaction = True
        return answer


def selected(columns: str, server: Any, thread_id: int) -> Rows:
    """Return one row of what a server says of itself."""
    known: dict[str, Any] = {
        "CONNECTION_ID…": thread_id,
        "@@GLOBAL.READ_ONLY": int(server.read_only),
        "VERSION…": VERSION,
        "@@SQL_AUTO_IS_NULL": 0,
        "@@LOWER_CASE_TABLE_NAMES": 0,
        "@@SQL_MODE": "STRICT_TRANS_TABLES",
        "@@DEFAULT_STORAGE_ENGINE": "InnoDB",
        "@@VERSION_COMMENT LIMIT 1": "mariadb.org binary distribution",
    }
    if "@@maxscale_version" in columns.lower():
        raise Refusal(1193, "Unknown system variable 'maxscale_version'")
    while "(" in columns:
        # A call's arguments are no columns.
        columns = re.sub(r"\([^()]*\)", "…", columns)
    values = {}
    for column in columns.split(","):
        what, _, name = column.strip().partition(" AS ")
        values[name or what] = known.get(what.upper(), 1)
    return Rows(list(values), [list(values.values())])


class Behind:
    """A server behind a proxy."""

    def __init__(self, ids: int, read_only: bool = False) -> None:
        self.read_only = read_only
        #: Whether a proxy can reach it.
        self.up = True
        #: Whether all connections to it that a proxy may have are in use.
        self.busy = False
        self.ids = itertools.count(ids)


class _Proxy(ScriptedServer):
    """A proxy that sends writes to one server and reads to another."""

    def __init__(self, version: str = VERSION) -> None:
        self.writer: Behind | None = Behind(1000)
        self.reader: Behind | None = Behind(2000, read_only=True)
        #: Whether its servers' thread ids are its own.
        self.by_chance = False
        super().__init__(version)

    def at(self, client: Client, statement: str, server: Behind) -> Rows | None:
        """Have a server behind the proxy answer."""
        if self.by_chance:
            return self.served(client, statement, server, client.thread_id)
        if server not in client.threads:
            client.threads[server] = next(server.ids)
        return self.served(client, statement, server, client.threads[server])


class ProxySQL(_Proxy):
    """As ProxySQL with two query rules: ``^SELECT.*FOR UPDATE$`` to the writers, ``^SELECT`` to
    the readers. Ping, USE, SET and some questions it answers by itself."""

    def __init__(self, patience: float = 0.05) -> None:
        #: Seconds for which a statement waits for a server.
        self.patience = patience
        #: Called when an engine asks for an answer of the writers.
        self.on_question: Callable[[], object] = lambda: None
        #: Whether there is the first of the two rules.
        self.for_update_rule = True
        super().__init__("8.0.11")

    def answer(self, client: Client, statement: str) -> Rows | None:
        """Answer by the query rules."""
        if statement == "select @@version_comment limit 1":
            return Rows(["@@version_comment"], [["(ProxySQL)"]])
        if statement.upper() == "SELECT CONNECTION_ID()":
            return Rows(["CONNECTION_ID()"], [[client.thread_id]])
        if re.match("SET|COMMIT|ROLLBACK|USE", statement, re.IGNORECASE):
            return None
        locks = self.for_update_rule and re.search("FOR UPDATE$", statement, re.IGNORECASE)
        reads = re.match("SELECT", statement, re.IGNORECASE) and not (
            client.in_transaction or locks
        )
        server = self.reader if reads else self.writer
        if statement == "DO 1":
            self.on_question()
        if server is None or not server.up or server.busy:
            self._closed.wait(self.patience)
            # One may have become free meanwhile.
            server = self.reader if reads else self.writer
            if server is None or not server.up or server.busy:
                raise Refusal(9001, NO_SERVER.format(1 if reads else 0))
        return self.at(client, statement, server)


class MaxScale(_Proxy):
    """As MaxScale's readwritesplit: what is in a transaction, too, goes to the primary.

    It gives its own thread id in the greeting, and the version string is its server's.
    """

    #: As ``master_failure_mode=error_on_write`` has it where the way to the primary is cut.
    error_on_write = False

    def answer(self, client: Client, statement: str) -> Rows | None:
        """Answer as the router sends it."""
        if re.match("SET|USE", statement, re.IGNORECASE):
            return None
        reads = re.match("SELECT|SHOW", statement, re.IGNORECASE) and not (
            client.in_transaction or re.search("FOR UPDATE$", statement, re.IGNORECASE)
        )
        server = self.reader if reads else self.writer
        if server is None or not server.up:
            raise Hangup
        answer = self.at(client, statement, server)
        if self.error_on_write and re.match("INSERT|COMMIT", statement, re.IGNORECASE):
            # The server has run it; its answer never came.
            raise Refusal(1290, READ_ONLY + " statement")
        return answer


# The protocol


class _Wire:
    """One connection's packets."""

    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected
        self._file = connected.makefile("rb")
        self._sequence = 0

    def close(self) -> None:
        self._file.close()

    def receive(self, first: bool = False) -> bytes:
        """Return a packet; nothing at the end.

        :param first: it begins an exchange.
        """
        head = self._file.read(4)
        if len(head) < 4:
            return b""
        self._sequence = head[3] + 1
        return self._file.read(int.from_bytes(head[:3], "little"))

    def send(self, *packets: bytes) -> None:
        data = b""
        for packet in packets:
            data += len(packet).to_bytes(3, "little") + bytes([self._sequence % 256]) + packet
            self._sequence += 1
        self._socket.sendall(data)

    def greet(self, version: str, thread_id: int) -> None:
        salt = b"abcdefghijklmnopqrst"
        self.send(
            b"\x0a" + version.encode() + b"\0" + struct.pack("<I", thread_id) + salt[:8] + b"\0"
            + struct.pack("<H", _CAPABILITIES & 0xFFFF) + b"\x2d" + struct.pack("<H", 2)
            + struct.pack("<H", _CAPABILITIES >> 16) + bytes([21]) + bytes(10)
            + salt[8:] + b"\0" + b"mysql_native_password\0"
        )  # fmt: skip

    def agree(self, client: Client) -> None:
        self.send(b"\0\0\0" + _status(client) + b"\0\0")

    def refuse(self, refusal: Refusal, client: Client) -> None:
        self.send(b"\xff" + struct.pack("<H", refusal.code) + b"#HY000" + refusal.text.encode())

    def result(self, rows: Rows, client: Client) -> None:
        end = b"\xfe\0\0" + _status(client)
        columns = [
            _text("def") + _text("") * 3 + _text(name) + _text("") + b"\x0c"
            + struct.pack("<HIBHBH", 45, 1024, 8 if _is_number(rows, number) else 253, 0, 0, 0)
            for number, name in enumerate(rows.names)
        ]  # fmt: skip
        lines = [b"".join(_text(str(value)) for value in row) for row in rows.rows]
        self.send(bytes([len(columns)]), *columns, end, *lines, end)


def _status(client: Client) -> bytes:
    return struct.pack("<H", (2 if client.autocommit else 0) | (1 if client.in_transaction else 0))


def _text(value: str) -> bytes:
    data = value.encode()
    return bytes([len(data)]) + data


def _is_number(rows: Rows, number: int) -> bool:
    return bool(rows.rows) and isinstance(rows.rows[0][number], int)
