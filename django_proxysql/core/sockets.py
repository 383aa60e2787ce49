"""A look at a connection's socket, and what it takes for a dead host to be noticed.

An idle connection has nothing to say: neither MySQL nor PostgreSQL sends
anything unasked but its farewell (or a notification that was asked for). So a
socket that can be read from before anything was sent is one that was closed,
nearly always; the driver's own ping decides. Seen with mysqlclient and psycopg
over TCP, unix sockets and TLS 1.3.
"""

from __future__ import annotations

import _socket
import _thread
import contextlib
import functools
import math
import os
import select
import socket
import sys
import threading
from collections.abc import Callable, Iterator

#: Linux's POLLRDHUP: the other side has closed its half.
_EVENTS = (
    (select.POLLIN | select.POLLHUP | select.POLLERR | getattr(select, "POLLRDHUP", 0))
    if hasattr(select, "poll")
    else 0
)

#: The most that Linux takes for TCP_KEEPIDLE and TCP_KEEPINTVL.
_MOST_SECONDS = 32_767


def descriptor(number: object) -> int | None:
    """Return ``number`` if it is a descriptor's: a connection that a test has mocked has none."""
    return number if type(number) is int and number >= 0 else None


def watch(descriptor: int | None) -> Callable[[int], object] | None:
    """Return a function that says, called with 0, whether the socket has something to say.

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


def keepalive(
    descriptor: int | None, seconds: float | None, leave: frozenset[str] = frozenset()
) -> float:
    """Have the kernel give a TCP connection up whose host has not answered for ``seconds``.

    By keepalive, for a connection that waits for an answer: two seconds at least. And, where the
    platform has it, by TCP_USER_TIMEOUT, for data that is not acknowledged. Without them a waiting
    statement fails after the kernel's 15 minutes, or never. Linux: tcp(7).

    :param seconds: None: nothing is set.
    :param leave: names of options that stay as they are: the driver's own settings say them.
    :returns: the seconds after which unacknowledged data ends the connection; infinity where
        there is no such limit, or none can be set.
    """
    if descriptor is None or descriptor < 0 or os.name != "posix":
        return math.inf
    try:
        sock = _copy_of(descriptor)
    except OSError:
        # No socket by that number, or no number left. The connection works.
        return math.inf
    try:
        if sock.family not in _INTERNET:
            return math.inf
        limit = None
        if seconds is not None:
            for name, level, option, value in keepalive_options(seconds):
                if name in leave:
                    continue
                try:
                    sock.setsockopt(level, option, value)
                except OSError:
                    continue
                if name == "TCP_USER_TIMEOUT":
                    limit = value / 1000
        if limit is None:
            limit = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) / 1000
        return limit or math.inf
    except (AttributeError, OSError):
        # macOS has no such option.
        return math.inf
    finally:
        sock.close()


def _copy_of(descriptor: int) -> _socket.socket:
    """Return a socket object of the connection's that closes no more than itself.

    :raises OSError: there is no socket by that number, or no number left.
    """
    # Python's default timeout makes a new socket object non-blocking, a mode that it shares with
    # the driver's.
    changes = _socket.getdefaulttimeout() is not None
    blocking = changes and os.get_blocking(descriptor)
    duplicate = os.dup(descriptor)
    try:
        # The C class below socket.socket, given what it would ask the kernel for: each connect
        # comes by here. gevent puts one of its own in its place in socket, which never blocks.
        return _socket.socket(-1, socket.SOCK_STREAM, 0, duplicate)
    except OSError:
        os.close(duplicate)
        raise
    finally:
        if changes:
            os.set_blocking(descriptor, blocking)


#: As the C class has them: members of an enumeration compare in Python.
_INTERNET = (int(socket.AF_INET), int(socket.AF_INET6))


@functools.cache
def keepalive_options(seconds: float) -> tuple[tuple[str, int, int, int], ...]:
    """Return names, levels, options and values, as far as the platform has them."""
    # The kernel asks a silent host after half the time, then ten times in what is
    # left. Linux gives up at the first probe that is due once TCP_USER_TIMEOUT
    # is over, not when it is over, nor by TCP_KEEPCNT; hence the many. A host
    # that answers is not asked again before the next half.
    whole = max(2, math.ceil(seconds))
    idle = min(whole // 2, _MOST_SECONDS)
    interval = min(max(1, (whole - idle) // 10), _MOST_SECONDS)
    values = {
        # macOS has another name for it.
        "TCP_KEEPIDLE" if hasattr(socket, "TCP_KEEPIDLE") else "TCP_KEEPALIVE": idle,
        "TCP_KEEPINTVL": interval,
        "TCP_KEEPCNT": min(math.ceil((whole - idle) / interval), 127),
        "TCP_USER_TIMEOUT": min(math.ceil(seconds * 1000), 2**31 - 1),
    }
    return (
        ("SO_KEEPALIVE", socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
        *(
            (name, socket.IPPROTO_TCP, getattr(socket, name), value)
            for name, value in values.items()
            if hasattr(socket, name)
        ),
    )


class Counter:
    """How much was sent over a TCP connection: whatever sent it, and by whichever way.

    It is the count of bytes that the other side has acknowledged, as the kernel knows it. A
    statement that was answered is acknowledged with its answer.

    Belongs to one thread at a time, as its connection does.

    :param descriptor: the connection's, which was answered just now.
    :raises OSError: nothing is known.
    """

    __slots__ = ("_arguments", "_descriptor", "_getsockopt", "_info", "_inode")

    def __init__(self, descriptor: int) -> None:
        found = _tcp_info()
        if found is None:
            raise OSError("no TCP_INFO")
        self._getsockopt, info, size_t, byref = found
        self._descriptor, self._info = descriptor, info()
        # The kernel writes there, at each call: made once.
        length = size_t(_UP_TO_ACKNOWLEDGED)
        self._arguments = (descriptor, _TCP, _TCP_INFO, byref(self._info), byref(length))
        # The number of a socket that was closed may be another's afterwards.
        self._inode = os.fstat(descriptor).st_ino

    def sent(self) -> int | None:
        """Return a number that grows with whatever is sent; None: unknown."""
        if self._getsockopt(*self._arguments):
            return None
        # 0: an older kernel, or something that only looks like Linux, does not count.
        return self._info.bytes_acked or None

    def is_still(self, sent: int) -> bool:
        """Return whether nothing was sent since :meth:`sent` returned ``sent``."""
        if self.sent() != sent:
            return False
        try:
            return os.fstat(self._descriptor).st_ino == self._inode
        except OSError:
            return False


#: As the C function has it: a member of an enumeration becomes a number in Python.
_TCP = int(socket.IPPROTO_TCP)
#: Linux's option, and how long its answer is up to tcpi_bytes_acked (Linux 4.1, <linux/tcp.h>).
_TCP_INFO, _UP_TO_ACKNOWLEDGED = 11, 128


def counter(descriptor: int | None) -> Counter | None:
    """Return what counts what is sent over a connection; None where nothing is known."""
    if descriptor is None:
        return None
    try:
        return Counter(descriptor)
    except OSError:
        return None


@functools.cache
def _tcp_info() -> tuple[Callable[..., int], type, type, Callable[..., object]] | None:
    """Return the C library's getsockopt() and what it is called with; None where there is none.

    Python's own needs a socket object, which closes what it is given.
    """
    if not sys.platform.startswith("linux"):
        return None
    try:
        import ctypes

        getsockopt = ctypes.CDLL(None).getsockopt
    except Exception:
        # A Python without ctypes.
        return None

    class Info(ctypes.Structure):
        _fields_ = [("before", ctypes.c_ubyte * 120), ("bytes_acked", ctypes.c_uint64)]

    return getsockopt, Info, ctypes.c_uint32, ctypes.byref


@contextlib.contextmanager
def limited(descriptor: int | None, seconds: float) -> Iterator[None]:
    """Have the socket shut down if the block takes longer: for drivers that wait without a limit.

    What the driver waits for then ends in its error for a lost connection.
    """
    bell = threading.Lock()
    bell.acquire()
    if descriptor is not None:
        # Its number is ours: the driver may close its own, and another connection get that.
        duplicate = _copy_of(descriptor)
        try:
            _thread.start_new_thread(_shut_down_unless, (bell, duplicate, seconds))
        except RuntimeError:
            # No thread can be started: nothing is limited.
            duplicate.close()
    try:
        yield
    finally:
        bell.release()


def _shut_down_unless(bell: threading.Lock, duplicate: _socket.socket, seconds: float) -> None:
    try:
        # A deadline may pass on the way here; to a lock, -1 means for ever.
        if not bell.acquire(timeout=max(0, min(seconds, threading.TIMEOUT_MAX))):
            duplicate.shutdown(socket.SHUT_RDWR)
    except OSError:
        # It has ended by itself.
        pass
    finally:
        duplicate.close()


def detach(descriptor: int) -> None:
    """Part this process from the connection at ``descriptor``; nothing is sent over it.

    Another process that has the connection too goes on with it.

    :raises OSError: there is no descriptor left.
    """
    # A socket without another end would raise SIGPIPE where it is not ignored.
    nothing = os.open(os.devnull, os.O_RDWR)
    try:
        os.dup2(nothing, descriptor, inheritable=False)
    finally:
        os.close(nothing)
