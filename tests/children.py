"""Work that is done in a forked child."""

from __future__ import annotations

import os
import select
import signal
import warnings
from collections.abc import Callable


def in_child(work: Callable[[], object], seconds: float = 20) -> str:
    """Return what ``work`` returns in a forked child; fail if it does not end in time."""
    read, write = os.pipe()
    with warnings.catch_warnings():
        # Forking with threads about is what is tested.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        try:
            os.write(write, str(work()).encode())
        except BaseException as exc:
            os.write(write, repr(exc).encode())
        finally:
            os._exit(0)
    os.close(write)
    try:
        ready, _, _ = select.select([read], [], [], seconds)
        assert ready, "the child hangs"
        return os.read(read, 1000).decode()
    finally:
        os.close(read)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
