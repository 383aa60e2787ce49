"""What a forked child finds of its parent's connections, and what becomes of them there.

The child has a copy of every descriptor. Two processes that talk over one
connection get each other's answers, and a child that closes one says goodbye in
the parent's name: the server ends the session under the parent's hands. So in
the child /dev/null is laid over each inherited descriptor
(:func:`django_proxysql.core.sockets.detach`). Whatever the driver does with it
then, the parent's connection is untouched, and the child connects for itself.

Of drivers whose descriptor is not known (Oracle's, MySQL Connector/Python's)
the connections stay as they are, as with Django's own engines.

Python clears the other threads' thread-locals in the child, connections among
them, before it calls any hook. The connections are therefore held on to across
the fork, by :func:`_before`. Where there is no calling before the fork (uWSGI
forks in C), that goes for the forking thread's connections only.
"""

from __future__ import annotations

import threading
from typing import Any

from ..core import runtime
from ..core.logger import complain

_wrappers: runtime.Living[Any] = runtime.Living()

#: What is held across a fork, by the forking thread: two may be at it at once.
_held: dict[int, list[Any]] = {}


def remember(wrapper: Any) -> None:
    """Have ``wrapper._after_fork()`` called in whichever child it is inherited by."""
    _wrappers.add(wrapper)


def _before() -> None:
    _held[threading.get_ident()] = [(wrapper, wrapper.connection) for wrapper in _wrappers.all()]


def _in_parent() -> None:
    _held.pop(threading.get_ident(), None)


def _in_child() -> None:
    for wrapper in _wrappers.all():
        try:
            wrapper._after_fork()
        except Exception:
            complain("A connection of the parent's could not be left to it")
    _held.clear()


runtime.at_fork(_in_child, before=_before, after_in_parent=_in_parent)
