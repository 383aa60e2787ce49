"""A proxy that passes on what it gets a little later, in a process of its own."""

from __future__ import annotations

import queue
import socket
import subprocess
import sys
import threading
import time

from tests.servers import Address


class Delay:
    """A proxy in front of ``target``: each way takes so many milliseconds longer."""

    def __init__(self, target: Address, milliseconds: float) -> None:
        where = (target.host, str(target.port), str(milliseconds / 1000))
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, *where], stdout=subprocess.PIPE, text=True
        )
        self.host = "127.0.0.1"
        self.port = 0

    def __enter__(self) -> Delay:
        self.port = int(self._process.stdout.readline())
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._process.kill()
        self._process.communicate()


def _pass_on(one: socket.socket, other: socket.socket, seconds: float) -> None:
    under_way: queue.SimpleQueue[tuple[float, bytes]] = queue.SimpleQueue()

    def arrive() -> None:
        # Each packet is under way by itself: a second one does not wait behind the first.
        try:
            while True:
                due, data = under_way.get()
                time.sleep(max(0.0, due - time.monotonic()))
                if not data:
                    other.shutdown(socket.SHUT_WR)
                    return
                other.sendall(data)
        except OSError:
            pass

    threading.Thread(target=arrive, daemon=True).start()
    data = b"-"
    while data:
        try:
            data = one.recv(65536)
        except OSError:
            data = b""
        under_way.put((time.monotonic() + seconds, data))


def _serve(host: str, port: int, seconds: float) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        print(listener.getsockname()[1], flush=True)
        while True:
            client, _ = listener.accept()
            server = socket.create_connection((host, port))
            for end in (client, server):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for ends in ((client, server), (server, client)):
                threading.Thread(target=_pass_on, args=(*ends, seconds), daemon=True).start()


if __name__ == "__main__":
    _serve(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]))
