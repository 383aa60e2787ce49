"""An exception at each line in turn, as Ctrl-C and tasks' time limits strike between any two."""

from __future__ import annotations

import _thread
import itertools
import linecache
import sys
import threading
from collections.abc import Callable, Collection, Iterator
from types import FrameType
from typing import Any

import pytest

from django_proxysql.core import (
    affinity,
    balancer,
    breaker,
    circuit,
    dispatch,
    group,
    permits,
    search,
)

#: The files that a circuit's life is in.
CIRCUITS = [str(module.__file__) for module in (breaker, circuit, permits)]
#: The files that a connect runs through.
CONNECTING = [
    *CIRCUITS,
    *(str(module.__file__) for module in (affinity, balancer, dispatch, group, search)),
]


class Injected(BaseException):
    """What is thrown into threads, as Celery's and debuggers' time-outs are."""


class Strike:
    """An exception at the ``step``-th line that some work runs of ``files``.

    Where a ``with`` block is left is no step: the interpreter asks for signals where functions are
    called and loops turn round, which it does not between the block's end and ``__exit__``.

    :param kept: gets what was raised, and with its traceback all frames; None: nothing does.
    """

    def __init__(
        self,
        step: int,
        files: Collection[str],
        error: type[BaseException] = Injected,
        kept: list[BaseException] | None = None,
    ) -> None:
        self._left = step
        self._files = files
        self._error = error
        self._kept = kept
        self._entered: set[tuple[int, int]] = set()
        #: The line that was struck; "": the work has no such line.
        self.where = ""
        self._is_over = threading.Event()

    def hits(self, work: Callable[[], object]) -> bool:
        """Run ``work``, and return whether it was struck."""
        sys.settrace(self._trace)
        try:
            work()
        except BaseException as exc:
            # Its traceback leads to this frame: they keep each other until the list is cleared.
            if self._kept is not None:
                self._kept.append(exc)
        finally:
            sys.settrace(None)
            self._is_over.set()
        return bool(self.where)

    def dooms_next_thread(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Have the thread that begins next struck."""
        start = _thread.start_new_thread

        def doomed(run: Any, args: Any) -> int:
            monkeypatch.setattr(_thread, "start_new_thread", start)
            return start(lambda: self.hits(lambda: run(*args)), ())

        monkeypatch.setattr(_thread, "start_new_thread", doomed)

    def wait(self) -> None:
        """Wait until the thread that is doomed has ended."""
        assert self._is_over.wait(60)

    def _trace(self, frame: FrameType, event: str, arg: object) -> Any:
        if frame.f_code.co_filename not in self._files:
            return None
        if event == "line":
            line = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
            if line.startswith("with "):
                key = (id(frame), frame.f_lineno)
                if key in self._entered:
                    return self._trace
                self._entered.add(key)
            self._left -= 1
            if self._left == 0:
                self.where = f"{frame.f_code.co_name}:{frame.f_lineno}: {line}"
                raise self._error
        return self._trace


def strikes(
    files: Collection[str],
    error: type[BaseException] = Injected,
    *,
    least: int,
    kept: list[BaseException] | None = None,
) -> Iterator[Strike]:
    """Yield a strike at the first line, one at the second, and so on, until one has not hit.

    :param least: how many lines the work has at least.
    """
    for step in itertools.count(1):
        strike = Strike(step, files, error, kept)
        yield strike
        if not strike.where:
            assert step > least
            return
