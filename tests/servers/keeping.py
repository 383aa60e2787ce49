"""Servers that are started once, for all the tests that use them in turn."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Callable, TypeVar

T = TypeVar("T")


def restore(servers: Any) -> None:
    """Set a server back, or each of several."""
    for server in servers if isinstance(servers, tuple) else [servers]:
        server.restore()


class Keeper:
    """Keeps what was started from one test to the next, and ends it in the end.

    What cannot be started, or set back, is started anew for the next test: it fails one test, and
    not all that come later.
    """

    def __init__(self) -> None:
        self._kept: dict[Any, tuple[Any, contextlib.ExitStack]] = {}

    @contextlib.contextmanager
    def use(
        self,
        start: Callable[[contextlib.ExitStack], T],
        set_back: Callable[[T], None] = restore,
    ) -> Iterator[T]:
        """Lend for a ``with`` block what ``start`` returns, which is called where nothing is kept.

        :param start: its argument ends what is entered into it.
        """
        if start not in self._kept:
            with contextlib.ExitStack() as stack:
                self._kept[start] = start(stack), stack.pop_all()
        kept, stack = self._kept[start]
        try:
            yield kept
            set_back(kept)
        except BaseException:
            del self._kept[start]
            stack.close()
            raise

    def __enter__(self) -> Keeper:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.ExitStack() as every:
            for _, stack in self._kept.values():
                every.push(stack)
