"""What is to be done where a process has forked, also where Python is not told of it.

``os.register_at_fork`` is for forks by Python. uWSGI forks in C, and has Python's
preparations made in its workers only if it is told so (``py-call-uwsgi-fork-hooks``).
Otherwise it calls ``uwsgi.post_fork_hook`` there, and that does what is ours.
"""

from __future__ import annotations

import os
import sys
import weakref
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from .logger import complain

__all__ = ["Living", "attend", "register"]

_T = TypeVar("_T")

_in_child: list[Callable[[], object]] = []
#: The process in which all that has been done.
_home = os.getpid()
#: What uWSGI would have called without us.
_before_us: Callable[[], object] | None = None


class Living(Generic[_T]):
    """The objects that a fork concerns, none of which is kept alive by this.

    Not a WeakSet: to list that runs Python code, and fails where another thread adds meanwhile.
    """

    def __init__(self) -> None:
        self._references: set[weakref.ref[_T]] = set()

    def add(self, thing: _T) -> None:
        """Have ``thing`` listed for as long as it lives."""
        self._references.add(weakref.ref(thing, self._references.discard))

    def all(self) -> list[_T]:
        """Return those that live."""
        # The copy is made in one step, whichever threads add and discard.
        found = [reference() for reference in self._references.copy()]
        return [thing for thing in found if thing is not None]


def register(
    after_in_child: Callable[[], object],
    *,
    before: Callable[[], object] | None = None,
    after_in_parent: Callable[[], object] | None = None,
) -> None:
    """Have functions called at each fork, as by ``os.register_at_fork``.

    :param after_in_child: must do without ``before``, which C's forks do not have.
    """
    named = {
        "after_in_child": after_in_child,
        "before": before,
        "after_in_parent": after_in_parent,
    }
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(**{name: do for name, do in named.items() if do is not None})
    _in_child.append(after_in_child)


def attend() -> None:
    """Be told of uWSGI's forks, if this is uWSGI. Called again, it sees that this is still so."""
    global _before_us
    uwsgi: Any = sys.modules.get("uwsgi")
    if uwsgi is None:
        return
    chain = getattr(sys.modules.get("uwsgidecorators"), "postfork_chain", None)
    if chain is not None:
        # It has taken the hook for itself.
        if _unless_told not in chain:
            chain.insert(0, _unless_told)
        return
    known = getattr(uwsgi, "post_fork_hook", None)
    if known is not _hook:
        _before_us = known
        uwsgi.post_fork_hook = _hook


def _hook() -> None:
    _unless_told()
    if _before_us is not None:
        _before_us()


def _unless_told() -> None:
    if _home == os.getpid():
        # Python was told; or this process has loaded the application for itself.
        return
    _is_home()
    for do in _in_child.copy():
        try:
            do()
        except Exception:
            complain("After a fork something could not be renewed")


def _is_home() -> None:
    global _home
    _home = os.getpid()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_is_home)

attend()
