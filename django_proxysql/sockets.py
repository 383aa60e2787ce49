"""A look at a connection's socket, and what it takes for a dead host to be noticed.

An idle connection has nothing to say: neither MySQL nor PostgreSQL sends
anything unasked but its farewell (or a notification that was asked for). So a
socket that can be read from before anything was sent is one that was closed,
nearly always; the driver's own ping decides. Seen with mysqlclient and psycopg
over TCP, unix sockets and TLS 1.3.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
from collections.abc import Callable

__all__ = ["harden", "watch"]

#: Linux's POLLRDHUP: the other side has closed its half.
_EVENTS = (
    (select.POLLIN | select.POLLHUP | select.POLLERR | getattr(select, "POLLRDHUP", 0))
    if hasattr(select, "poll")
    else 0
)


def watch(descriptor: int | None) -> Callable[[int], object] | None:
    """Return a function that tells, called with 0, whether the socket has something to say.

    What it returns is empty for a quiet socket; it costs about a microsecond
    and no round trip. None where there is no ``poll`` or no descriptor.

    The descriptor must not be looked at after an error of the driver's: the
    driver may have closed it, and the number belong to another connection.
    """
    if descriptor is None or descriptor < 0 or not _EVENTS:
        return None
    poll = select.poll()
    poll.register(descriptor, _EVENTS)
    return poll.poll


def harden(descriptor: int | None, seconds: float | None) -> None:
    """Have the kernel give a TCP connection up whose host has not answered for ``seconds``.

    Sets keepalive (an idle connection is probed after a third of the time)
    and, where the platform has it, TCP_USER_TIMEOUT (sent data that is not
    acknowledged). Without them a waiting statement fails after the kernel's
    15 minutes, or never. Unix sockets are left alone. Linux: tcp(7).
    """
    if descriptor is None or descriptor < 0 or seconds is None:
        return
    # A socket object closes what it is given, and Python's default timeout
    # makes it non-blocking, a mode that a duplicate shares: both are undone.
    duplicate = os.dup(descriptor)
    blocking = os.get_blocking(descriptor)
    with socket.socket(fileno=duplicate) as sock:
        os.set_blocking(descriptor, blocking)
        if sock.family not in (socket.AF_INET, socket.AF_INET6):
            return
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        probe = max(1, int(seconds / 3))
        for name, value in (
            ("TCP_KEEPIDLE", probe),
            ("TCP_KEEPINTVL", probe),
            ("TCP_KEEPCNT", 2),
            ("TCP_USER_TIMEOUT", max(1, int(seconds * 1000))),
        ):
            option = getattr(socket, name, None)
            if option is not None and not (
                name == "TCP_KEEPALIVE" and hasattr(socket, "TCP_KEEPIDLE")
            ):
                with contextlib.suppress(OSError):
                    sock.setsockopt(socket.IPPROTO_TCP, option, value)
