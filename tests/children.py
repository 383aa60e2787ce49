"""Work that is done in another process: in a forked child, or in one of its own."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent


def in_child(work: Callable[[], object], seconds: float = 120) -> str:
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


def run_python(
    program: str, *arguments: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a program's text in a process that finds the package and the tests.

    :param environment: variables that it has beside ours.
    :raises AssertionError: it does not end well.
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), *arguments],
        env={**os.environ, **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done
