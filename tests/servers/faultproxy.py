"""A TCP proxy that fails on demand, at a byte of one's choice.

    with FaultProxy(server) as proxy:
        connection = MySQLdb.connect(host=proxy.host, port=proxy.port, …)
        proxy.cut_after(b"COMMIT")          # the server gets the COMMIT, its answer is lost
        with pytest.raises(MySQLdb.OperationalError):
            connection.commit()
        proxy.wait_until_idle()             # now the server has done what it was sent

New connections are dealt with as the mode says that was set last: ``forward`` (the default),
``refuse``, ``accept_and_close``, ``accept_and_hang``, ``delay``. Established ones go on whatever
the mode; they are hurt by ``freeze``, ``drop_connections`` and the cuts. A cut strikes once, at the
n-th packet from now that a client sends and that contains ``matching``. A packet is what arrives in
one read: a statement, or with TLS some records (which match nothing but the empty string).
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import struct
import threading
import time
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Callable, TypeVar

from . import Address
from .ports import HOST, ports

_CHUNK = 65536
T = TypeVar("T")


@dataclass
class _Cut:
    """Where a connection is to be cut."""

    kind: str  # "before", "within" or "after" the packet, or in the "reply" to it
    matching: bytes
    nth: int
    bytes: int = 0  # that may still pass of what is cut


@dataclass(eq=False)
class _Side:
    """One socket of a connection, and what still has to be sent to it."""

    socket: socket.socket
    unsent: bytearray = field(default_factory=bytearray)
    ended: bool = False  # its peer will send nothing more
    end_when_sent: bool = False  # and gets nothing more from us


@dataclass(eq=False)
class _Connection:
    client: _Side
    server: _Side | None = None  # None: not connected (yet)
    connect_at: float | None = None  # when to connect to the server (monotonic seconds)
    reply_left: int | None = None  # bytes of the server's that may still pass; None: all
    draining: bool = False  # the client is gone, the server finishes what it was sent


class FaultProxy:
    """A proxy in front of ``target``. All its sockets belong to one thread, which the methods ask.

    ``accepted``, ``client_packets`` and ``cuts`` count since the start; ``packets`` holds the last
    1,000 client packets. With ``reset`` connections end by RST instead of FIN.
    """

    def __init__(self, target: Address, reset: bool = False) -> None:
        self.target = target
        self.host = HOST
        self.port = ports.reserve()
        self.reset = reset
        self.accepted = 0
        self.client_packets = 0
        self.cuts = 0
        self.packets: deque[bytes] = deque(maxlen=1000)
        self._mode = "forward"
        self._delay = 0.0  # seconds until a new connection goes on to the server
        self._frozen = False
        self._armed: list[_Cut] = []
        self._cut_handshake: int | None = None
        self._connections: list[_Connection] = []
        self._listener: socket.socket | None = None
        self._selector = selectors.DefaultSelector()
        self._jobs: deque[Callable[[], None]] = deque()
        self._waker, self._woken = socket.socketpair()
        self._thread: threading.Thread | None = None
        self._stopping = False

    # --- start and stop ---

    def start(self) -> FaultProxy:
        self._woken.setblocking(False)
        self._selector.register(self._woken, selectors.EVENT_READ, self._wake_up)
        self._listen()
        self._thread = threading.Thread(target=self._run, name="fault-proxy", daemon=True)
        self._thread.start()
        return self

    def stop(self) -> None:
        """Close everything. The proxy cannot be started again."""
        if self._stopping:
            return
        if self._thread is not None:
            self._ask(self._finish)
            self._thread.join(10)
        self._stopping = True
        self._selector.close()
        self._waker.close()
        self._woken.close()
        ports.release(self.port)

    def __enter__(self) -> FaultProxy:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    # --- modes: what happens to new connections ---

    def forward(self) -> None:
        """Pass everything on: ends all other modes, and freeze."""
        self._ask(lambda: self._set_mode("forward"))

    def refuse(self) -> None:
        """Close the port."""
        self._ask(lambda: self._set_mode("refuse"))

    def accept_and_close(self) -> None:
        """Accept, and close at once."""
        self._ask(lambda: self._set_mode("accept_and_close"))

    def accept_and_hang(self) -> None:
        """Accept, and never say a word. Such a connection stays so whatever comes later."""
        self._ask(lambda: self._set_mode("accept_and_hang"))

    def delay(self, seconds: float) -> None:
        """Accept, and connect to the server ``seconds`` later: a slow handshake."""
        self._ask(lambda: self._set_mode("delay", seconds))

    # --- faults of established connections ---

    def freeze(self) -> None:
        """Stop moving bytes, both ways, on all connections, new ones too, until thaw()."""
        self._ask(lambda: self._set_frozen(True))

    def thaw(self) -> None:
        """Let the bytes move again; none was lost."""
        self._ask(lambda: self._set_frozen(False))

    def has_unread(self) -> bool:
        """Return whether a client has sent what is not read: the proxy is frozen."""

        def job() -> bool:
            found = False
            for connection in self._connections:
                with contextlib.suppress(BlockingIOError):
                    found |= bool(connection.client.socket.recv(1, socket.MSG_PEEK))
            return found

        return self._ask(job)

    def drop_connections(self) -> int:
        """Close all connections, on both sides. Returns how many there were."""
        return self._ask(self._close_all)

    def cut_before(self, matching: bytes = b"", nth: int = 1) -> None:
        """Swallow the packet and close: the server does not see it."""
        self._arm(_Cut("before", matching, nth))

    def cut_within(self, after: int, matching: bytes = b"", nth: int = 1) -> None:
        """Pass ``after`` bytes of the packet on, at most all but one, and close the client's side.

        The server finds the packet cut off.
        """
        self._arm(_Cut("within", matching, nth, after))

    def cut_after(self, matching: bytes = b"", nth: int = 1) -> None:
        """Pass the packet on and close the client's side at once.

        The server is left to work in peace until it has seen the end of the client by itself; it
        does what the packet says. wait_until_idle() tells when it is through.
        """
        self._arm(_Cut("after", matching, nth))

    def cut_reply(self, after: int, matching: bytes = b"", nth: int = 1) -> None:
        """Let ``after`` bytes of the server's reply to the packet pass, and close at the next one.

        With 0 the connection is cut when the reply comes: then the server has done its work.
        """
        self._arm(_Cut("reply", matching, nth, after))

    def cut_handshake(self, after: int) -> None:
        """Let ``after`` bytes of the server's pass on the next new connection, and close."""
        self._ask(lambda: setattr(self, "_cut_handshake", after))

    def disarm(self) -> None:
        """Forget the cuts that have not struck yet."""

        def job() -> None:
            self._armed.clear()
            self._cut_handshake = None
            for connection in self._connections:
                if not connection.draining:
                    connection.reply_left = None

        self._ask(job)

    # --- what can be seen ---

    @property
    def established(self) -> int:
        """How many clients are connected, as far as the proxy has noticed."""
        return sum(
            not connection.draining and not connection.client.ended
            for connection in self._connections[:]
        )

    def wait_until_idle(self, timeout: float = 60.0) -> None:
        """Return when no connection is left; TimeoutError after ``timeout`` seconds."""
        deadline = time.monotonic() + timeout
        while self._connections:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{len(self._connections)} connections left after {timeout} s")
            time.sleep(0.005)
        # The last one is off the list before its client's side is closed.
        self._ask(lambda: None)

    # --- the thread ---

    def _arm(self, cut: _Cut) -> None:
        self._ask(lambda: self._armed.append(cut))

    def _ask(self, job: Callable[[], T]) -> T:
        """Have the thread run ``job``, and return what it returns: its effect is there."""
        if self._thread is None or self._stopping:
            raise RuntimeError("the proxy does not run")
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(job())
            except BaseException as error:
                future.set_exception(error)

        self._jobs.append(run)
        self._waker.send(b"!")
        return future.result(60)

    def _finish(self) -> None:
        self._stopping = True
        self._close_all()
        self._stop_listening()

    def _close_all(self) -> int:
        dropped = self.established
        for connection in self._connections[:]:
            self._close(connection)
        return dropped

    def _run(self) -> None:
        while not self._stopping:
            for key, events in self._selector.select(self._connect_due()):
                handler: Callable[[int], None] = key.data
                handler(events)

    def _wake_up(self, events: int) -> None:
        with contextlib.suppress(BlockingIOError):
            self._woken.recv(_CHUNK)
        while self._jobs:
            self._jobs.popleft()()

    def _set_mode(self, mode: str, delay: float = 0.0) -> None:
        # Who has connected by now is dealt with as the mode says until now.
        accepted = -1
        while accepted != self.accepted:
            accepted = self.accepted
            self._accept(0)
        self._mode, self._delay = mode, delay
        if mode == "refuse":
            self._stop_listening()
        elif self._listener is None:
            self._listen()
        if mode == "forward":
            self._set_frozen(False)

    def _listen(self) -> None:
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((self.host, self.port))
        listener.listen(128)
        listener.setblocking(False)
        self._listener = listener
        self._selector.register(listener, selectors.EVENT_READ, self._accept)

    def _stop_listening(self) -> None:
        if self._listener is not None:
            self._selector.unregister(self._listener)
            # close() alone would leave the port open where a forked child has it, too.
            with contextlib.suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
            self._listener = None

    def _accept(self, events: int) -> None:
        if self._listener is None:  # closed while this event was under way
            return
        try:
            client, _ = self._listener.accept()
        except OSError:
            return
        self.accepted += 1
        client.setblocking(False)
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection = _Connection(_Side(client))
        self._connections.append(connection)
        if self._mode == "accept_and_close":
            self._close(connection)
        elif self._mode == "accept_and_hang":
            self._watch(connection)
        else:
            connection.connect_at = time.monotonic() + self._delay
            if not self._delay and not self._frozen:
                self._connect(connection)

    def _connect_due(self) -> float | None:
        """Make the connections to the server that are due; return the seconds to the next."""
        waiting: float | None = None
        for connection in self._connections[:]:
            if connection.connect_at is None or self._frozen:
                continue
            left = connection.connect_at - time.monotonic()
            if left <= 0:
                self._connect(connection)
            else:
                waiting = left if waiting is None else min(waiting, left)
        return waiting

    def _connect(self, connection: _Connection) -> None:
        connection.connect_at = None
        try:
            server = socket.create_connection((self.target.host, self.target.port), timeout=5)
        except OSError:
            self._close(connection)
            return
        server.setblocking(False)
        server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.server = _Side(server)
        connection.reply_left, self._cut_handshake = self._cut_handshake, None
        self._watch(connection)

    def _set_frozen(self, frozen: bool) -> None:
        self._frozen = frozen
        for connection in self._connections:
            self._watch(connection)

    # --- one connection ---

    def _watch(self, connection: _Connection) -> None:
        """Tell the selector which events of the connection's sockets are of use now."""
        if connection.connect_at is not None:
            return  # what the client says meanwhile waits for the server
        for side, other in self._sides(connection):
            events = 0
            if not self._frozen:
                # A side is not read while the other cannot take it: bytes wait where they would
                # without a proxy.
                if not side.ended and not (other and other.unsent):
                    events |= selectors.EVENT_READ
                if side.unsent:
                    events |= selectors.EVENT_WRITE
            registered = side.socket in self._selector.get_map()
            if not events:
                if registered:
                    self._selector.unregister(side.socket)
                continue
            handler = self._handler(connection, side)
            if registered:
                self._selector.modify(side.socket, events, handler)
            else:
                self._selector.register(side.socket, events, handler)

    @staticmethod
    def _sides(connection: _Connection) -> list[tuple[_Side, _Side | None]]:
        """Both sides that are there, each with the one opposite."""
        client, server = connection.client, connection.server
        sides: list[tuple[_Side, _Side | None]] = [] if connection.draining else [(client, server)]
        if server is not None:
            sides.append((server, None if connection.draining else client))
        return sides

    def _handler(self, connection: _Connection, side: _Side) -> Callable[[int], None]:
        def handle(events: int) -> None:
            if connection not in self._connections or (
                connection.draining and side is connection.client
            ):
                return  # closed by an event just before
            try:
                if events & selectors.EVENT_WRITE:
                    self._send(side)
                if events & selectors.EVENT_READ:
                    self._receive(connection, side)
            except BlockingIOError:
                pass
            except OSError:
                self._close(connection)
            if connection in self._connections:
                self._watch(connection)

        return handle

    def _receive(self, connection: _Connection, side: _Side) -> None:
        data = side.socket.recv(_CHUNK)
        from_client = side is connection.client
        server = connection.server
        if not data and from_client and server is not None:
            side.ended = True
            server.end_when_sent = True
            self._send(server)
        elif not data:
            self._close(connection)
        elif connection.draining or server is None:
            pass  # no client is there to get it
        elif from_client:
            self._from_client(connection, data, server)
        else:
            self._from_server(connection, data)

    def _from_client(self, connection: _Connection, data: bytes, server: _Side) -> None:
        self.client_packets += 1
        self.packets.append(data)
        cut = self._struck(data)
        if cut is None:
            server.unsent += data
        elif cut.kind == "before":
            self.cuts += 1
            self._close(connection)
            return
        elif cut.kind == "reply":
            connection.reply_left = cut.bytes
            server.unsent += data
        else:
            self.cuts += 1
            server.unsent += data if cut.kind == "after" else data[:-1][: cut.bytes]
            # The server answers the packet before it sees the FIN that follows it. Were the answer
            # not read, it would get an RST, which might overtake what it has not read yet.
            server.end_when_sent = True
            connection.draining = True
            self._send(server)
            self._drop(connection.client)
            return
        self._send(server)

    def _from_server(self, connection: _Connection, data: bytes) -> None:
        passed = data[: connection.reply_left]
        if connection.reply_left is not None:
            connection.reply_left -= len(passed)
        connection.client.unsent += passed
        self._send(connection.client)
        if passed != data:
            self.cuts += 1
            self._close(connection)

    def _struck(self, data: bytes) -> _Cut | None:
        for cut in self._armed:
            if cut.matching in data:
                cut.nth -= 1
                if cut.nth == 0:
                    self._armed.remove(cut)
                    return cut
        return None

    def _send(self, side: _Side) -> None:
        if side.unsent:
            with contextlib.suppress(BlockingIOError):
                del side.unsent[: side.socket.send(side.unsent)]
        if side.end_when_sent and not side.unsent:
            side.end_when_sent = False
            with contextlib.suppress(OSError):
                side.socket.shutdown(socket.SHUT_WR)

    def _close(self, connection: _Connection) -> None:
        # The client's side last: a client that sees its end can rely on all the rest.
        if connection.server is not None:
            self._drop(connection.server)
        self._connections.remove(connection)
        if not connection.draining:
            self._drop(connection.client)

    def _drop(self, side: _Side) -> None:
        with contextlib.suppress(KeyError):
            self._selector.unregister(side.socket)
        if self.reset:
            # Lingering for 0 seconds makes close() send an RST.
            side.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        else:
            with contextlib.suppress(OSError):  # see _stop_listening
                side.socket.shutdown(socket.SHUT_RDWR)
        side.socket.close()
