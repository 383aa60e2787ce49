"""The fault proxy fails at the very byte that a test names."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from typing import Callable

import MySQLdb
import pytest

from tests.fakes import until
from tests.servers import DATABASE, PASSWORD, USER, Address
from tests.servers.faultproxy import FaultProxy
from tests.servers.mariadb import Node

Proxies = Callable[..., FaultProxy]


class Upper:
    """A server that greets with HELLO and gives back what it gets in upper case."""

    def __init__(self) -> None:
        self.got: list[bytes] = []
        self.ends: list[str] = []  # how connections ended
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.host, self.port = self._listener.getsockname()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=[client], daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client:
            try:
                client.sendall(b"HELLO")
                while data := client.recv(65536):
                    self.got.append(data)
                    client.sendall(data.upper())
                self.ends.append("FIN")
            except ConnectionResetError:
                self.ends.append("RST")
            except BrokenPipeError:
                self.ends.append("broken pipe")

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


@pytest.fixture
def upper() -> Iterator[Upper]:
    server = Upper()
    yield server
    server.close()


@pytest.fixture
def open_client() -> Iterator[Callable[..., socket.socket]]:
    """Opens connections that wait a minute at most, and closes them in the end."""
    with contextlib.ExitStack() as stack:

        def connect(to: Address, greeting: bytes = b"HELLO") -> socket.socket:
            client = stack.enter_context(socket.create_connection((to.host, to.port), timeout=60))
            if greeting:
                assert client.recv(65536) == greeting
            return client

        yield connect


Open = Callable[..., socket.socket]


def ask(client: socket.socket, question: bytes) -> bytes:
    client.sendall(question)
    return client.recv(65536)


def is_silent(client: socket.socket, seconds: float = 0.1) -> bool:
    client.settimeout(seconds)
    try:
        client.recv(1)
    except socket.timeout:
        return True
    finally:
        client.settimeout(60)
    return False


def test_forward(upper: Upper, fault_proxy: Proxies, open_client: Open) -> None:
    """Bytes pass both ways, the proxy counts, and the server sees the client's end."""
    proxy = fault_proxy(upper)
    client = open_client(proxy)
    assert ask(client, b"one") == b"ONE"
    assert ask(client, b"two") == b"TWO"
    assert (proxy.accepted, proxy.established, proxy.client_packets) == (1, 1, 2)
    assert list(proxy.packets) == [b"one", b"two"]
    client.close()
    until(lambda: upper.ends == ["FIN"])


def test_slow_reader_loses_nothing(upper: Upper, fault_proxy: Proxies, open_client: Open) -> None:
    proxy = fault_proxy(upper)
    client = open_client(proxy)
    data = bytes(range(97, 123)) * 400_000
    sender = threading.Thread(target=client.sendall, args=[data])
    sender.start()
    time.sleep(0.3)
    received = bytearray()
    while len(received) < len(data):
        received += client.recv(65536)
    sender.join()
    assert received == data.upper()


def test_refuse_lets_old_ones_go_on(upper: Upper, fault_proxy: Proxies, open_client: Open) -> None:
    proxy = fault_proxy(upper)
    client = open_client(proxy)
    proxy.refuse()
    with pytest.raises(ConnectionRefusedError):
        open_client(proxy)
    assert ask(client, b"still") == b"STILL"
    proxy.forward()
    assert ask(open_client(proxy), b"new") == b"NEW"


def test_delay(upper: Upper, fault_proxy: Proxies, open_client: Open) -> None:
    """The greeting comes late, several wait at the same time, and what the client said is kept."""
    proxy = fault_proxy(upper)
    proxy.delay(0.5)
    start = time.monotonic()
    clients = [open_client(proxy, greeting=b"") for _ in range(50)]
    for client in clients:
        client.sendall(b"early")
    for client in clients:
        assert client.recv(5) == b"HELLO"
        assert client.recv(5) == b"EARLY"
    # One after the other they would take 25 s.
    assert 0.5 <= time.monotonic() - start < 20


def test_freeze_and_thaw(upper: Upper, fault_proxy: Proxies, open_client: Open) -> None:
    """Frozen nothing moves on old and new connections; thawed nothing is missing."""
    proxy = fault_proxy(upper)
    old = open_client(proxy)
    proxy.freeze()
    new = open_client(proxy, greeting=b"")
    old.sendall(b"wait")
    assert is_silent(old)
    assert is_silent(new)
    assert upper.got == []
    proxy.thaw()
    assert old.recv(10) == b"WAIT"
    assert new.recv(10) == b"HELLO"


@pytest.mark.parametrize("reset", [False, True])
def test_drop_connections(
    upper: Upper, fault_proxy: Proxies, open_client: Open, reset: bool
) -> None:
    """All established connections end, by FIN or by RST, and new ones are served."""
    proxy = fault_proxy(upper, reset=reset)
    clients = [open_client(proxy) for _ in range(3)]
    assert proxy.drop_connections() == 3
    for client in clients:
        if reset:
            with pytest.raises(ConnectionResetError):
                client.recv(1)
        else:
            assert client.recv(1) == b""
    assert ask(open_client(proxy), b"new") == b"NEW"


@pytest.mark.parametrize(
    ("cut", "after", "passed", "answer"),
    [
        ("before", [], b"", b""),
        ("after", [], b"commit", b""),
        *(("within", [n], b"commit"[: min(n, 5)], b"") for n in (0, 3, 5, 100)),
        *(("reply", [n], b"commit", b"COMMIT"[:n]) for n in (0, 1, 3)),
    ],
)
def test_cut_strikes_once_at_a_byte(
    upper: Upper,
    fault_proxy: Proxies,
    open_client: Open,
    cut: str,
    after: list[int],
    passed: bytes,
    answer: bytes,
) -> None:
    """So much reaches the server and the client, who ends undisturbed; others are left alone."""
    proxy = fault_proxy(upper)
    getattr(proxy, f"cut_{cut}")(*after, b"commit")
    client = open_client(proxy)
    assert ask(client, b"insert") == b"INSERT"
    client.sendall(b"commit")
    with client.makefile("rb") as reply:
        assert reply.read() == answer
    client.close()
    # Its thread may be a moment behind the proxy.
    until(lambda: upper.ends)
    assert b"".join(upper.got) == b"insert" + passed
    assert cut == "reply" or upper.ends == ["FIN"]
    assert ask(open_client(proxy), b"commit") == b"COMMIT"
    assert proxy.cuts == 1


def test_nth_packet_is_cut(upper: Upper, fault_proxy: Proxies, open_client: Open) -> None:
    client = open_client(proxy := fault_proxy(upper))
    proxy.cut_before(nth=2)
    assert ask(client, b"one") == b"ONE"
    assert ask(client, b"two") == b""


def test_cut_handshake(upper: Upper, fault_proxy: Proxies, open_client: Open) -> None:
    """The greeting of the next new connection is cut short, and of that one only."""
    proxy = fault_proxy(upper)
    proxy.cut_handshake(2)
    with open_client(proxy, greeting=b"").makefile("rb") as greeting:
        assert greeting.read() == b"HE"
    open_client(proxy)


def test_cut_can_be_called_off(upper: Upper, fault_proxy: Proxies, open_client: Open) -> None:
    proxy = fault_proxy(upper)
    client = open_client(proxy)
    proxy.cut_before(b"x")
    proxy.cut_handshake(0)
    proxy.disarm()
    assert ask(client, b"x") == b"X"
    open_client(proxy)


def test_commit_sent_and_answer_lost(mariadb: Node, fault_proxy: Proxies) -> None:
    """On a real server: with cut_after the COMMIT is done, with cut_before it is not."""
    mariadb.sql("CREATE OR REPLACE TABLE cut (n INT)", DATABASE)
    proxy = fault_proxy(mariadb)
    for n, cut in enumerate((proxy.cut_before, proxy.cut_after)):
        connection = MySQLdb.connect(
            host=proxy.host, port=proxy.port, user=USER, password=PASSWORD, database=DATABASE
        )
        connection.cursor().execute("INSERT INTO cut VALUES (%s)", [n])
        cut(b"COMMIT")
        with pytest.raises(MySQLdb.OperationalError) as error:
            connection.query("COMMIT")
        assert error.value.args[0] == 2013
        proxy.wait_until_idle()
        connection.close()
    assert mariadb.sql("SELECT n FROM cut", DATABASE) == "1\n"
