"""TCP ports on loopback for servers, and the programs that these are."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import socket
import threading
from collections.abc import Sequence
from pathlib import Path

HOST = "127.0.0.1"


class ServerError(RuntimeError):
    """A server could not be started, or did not do what it was asked to."""


class MissingProgram(ServerError):
    """A program is not installed; the message names the Debian package that has it."""


def find_program(*names: str, package: str, folders: Sequence[str] = ()) -> str:
    """Return the path of the first of these programs that is installed.

    Debian keeps servers in /usr/sbin, which is not on the PATH of an ordinary user.
    """
    path = os.pathsep.join(
        [os.environ.get("PATH", os.defpath), "/usr/local/sbin:/usr/sbin:/sbin", *folders]
    )
    for name in names:
        found = shutil.which(name, path=path)
        if found:
            return found
    raise MissingProgram(
        f"{' or '.join(names)} is not installed. On Debian and Ubuntu: apt-get install {package}"
    )


class PortPool:
    """Hands out TCP ports on loopback that stay ours while their server is down.

    A port from the kernel's ephemeral range will not do. While its server is stopped the kernel
    may give it to some outgoing connection, so that the server cannot start again; and a client
    that connects to a dead port in that range can be given that very port, and connect to itself.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._notes: dict[int, list[socket.socket]] = {}

    def reserve(self, count: int = 1) -> int:
        """Return the first of ``count`` consecutive free ports."""
        low, high = 10_000, _first_ephemeral_port() - count
        chooser = random.SystemRandom()
        with self._lock:
            for _ in range(2_000):
                first = chooser.randint(low, high)
                notes = self._try(range(first, first + count))
                if notes:
                    self._notes[first] = notes
                    return first
        raise ServerError(f"found no {count} free consecutive ports between {low} and {high}")

    def release(self, first: int) -> None:
        """Give the ports of one ``reserve()`` back."""
        with self._lock:
            for note in self._notes.pop(first, ()):
                note.close()

    @staticmethod
    def _try(ports: Sequence[int]) -> list[socket.socket]:
        """Reserve these ports, or none.

        The UDP socket of the same number is a note for other processes that use this class, saying
        that the TCP port is taken. It goes away with our process.
        """
        with contextlib.ExitStack() as stack:
            notes = []
            for port in ports:
                try:
                    note = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
                    note.bind((HOST, port))
                    with socket.socket() as attempt:
                        attempt.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                        attempt.bind((HOST, port))
                except OSError:
                    return []
                notes.append(note)
            stack.pop_all()
            return notes


def _first_ephemeral_port() -> int:
    try:
        return int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return 32_768


ports = PortPool()
