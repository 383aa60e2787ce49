"""What this process has started: its servers, and the temporary directory of their data."""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import os
import queue
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import Future
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Callable

from .ports import ServerError

if TYPE_CHECKING:
    from .processes import ServerProcess

Job = Callable[[], None]

#: The variable that tells the processes we start where our templates are: they have the same.
TEMPLATES = "DJANGO_PROXYSQL_TEST_TEMPLATES"


class Workspace:
    """The temporary directory of one Python process; each server has a folder in it."""

    # Waits for the end of our process, which closes the pipe, and removes the directory. It stands
    # in for atexit when we are killed; the servers, which the kernel then kills, need a moment.
    _JANITOR = (
        'read -r word; [ "$word" = done ] || { sleep 1; rm -rf -- "$1"; sleep 1; rm -rf -- "$1"; }'
    )

    def __init__(self) -> None:
        self.path = Path(
            tempfile.mkdtemp(prefix="django-proxysql-", dir=_reachable_temporary_directory())
        )
        # mkdtemp makes it 0700, but servers that we start as another user must get in.
        self.path.chmod(0o755)
        self._janitor = subprocess.Popen(
            ["/bin/sh", "-c", self._JANITOR, "sh", str(self.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C in a terminal must not reach it
            cwd="/",
        )

    def folder(self, name: str) -> Path:
        """Make a new folder whose name begins with ``name``."""
        # Short, because a unix socket's path may have 107 characters at most.
        folder = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=self.path))
        folder.chmod(0o755)
        return folder

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            self._janitor.communicate(b"done\n" if not self.path.exists() else b"", timeout=10)


def _reachable_temporary_directory() -> str:
    """A temporary directory; as root one that others can enter, for servers run as other users."""
    for candidate in (tempfile.gettempdir(), "/tmp", "/var/tmp"):
        path = Path(candidate).resolve()
        if os.geteuid() != 0:
            return str(path)
        if path.is_dir() and all(
            folder.stat().st_mode & stat.S_IXOTH for folder in (path, *path.parents)
        ):
            return str(path)
    raise ServerError(
        "there is no temporary directory that a server running as another user can enter"
    )


class _Run:
    """What this process has started. A forked child has a run of its own, and leaves ours alone."""

    def __init__(self) -> None:
        self.owner = os.getpid()
        self.workspace = Workspace()
        if not Path(os.environ.get(TEMPLATES, "")).is_absolute():
            os.environ[TEMPLATES] = str(self.workspace.path)
        self.servers: list[ServerProcess] = []
        self._jobs: queue.SimpleQueue[tuple[Job, Future[None]]] = queue.SimpleQueue()
        threading.Thread(target=self._work, name="server-spawner", daemon=True).start()
        atexit.register(self.end)

    def spawn(self, job: Job) -> None:
        """Run ``job``, which starts a process, in a thread that lives as long as we do.

        The kernel takes the end of the *thread* that started a process for the death of its parent:
        a server restarted by a short-lived thread would be killed together with that thread.
        """
        future: Future[None] = Future()
        self._jobs.put((job, future))
        future.result()

    def _work(self) -> None:
        while True:
            job, future = self._jobs.get()
            try:
                job()
                future.set_result(None)
            except BaseException as error:
                future.set_exception(error)

    def end(self) -> None:
        if os.getpid() != self.owner:
            return
        for server in reversed(self.servers[:]):
            server.close()
        self.workspace.remove()


_run: _Run | None = None
_run_lock = threading.Lock()


def current_run() -> _Run:
    """The run of this process, made at the first use: importing this module starts nothing."""
    global _run
    with _run_lock:
        if _run is None or _run.owner != os.getpid():
            _run = _Run()
        return _run


def template(name: str, make: Callable[[Path], None]) -> Path:
    """Return a directory to copy; made once for this run and the runs that it starts.

    :param make: fills the folder ``data`` in the folder that it is given.
    """
    current_run()
    folder = Path(os.environ[TEMPLATES])
    made = folder / f"{name}-template"
    with open(folder / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.is_dir():
            unfinished = Path(tempfile.mkdtemp(prefix=f"{name}-template-", dir=folder))
            unfinished.chmod(0o755)
            make(unfinished)
            (unfinished / "data").rename(made)
    return made


def exit_on_sigterm() -> None:
    """Let SIGTERM end this process by SystemExit(143), so that ``with`` blocks and atexit run.

    For a program's main thread; in others it does nothing. A handler that somebody else has set
    is left in place.
    """

    def handler(signum: int, frame: FrameType | None) -> None:
        sys.exit(128 + signum)

    in_main_thread = threading.current_thread() is threading.main_thread()
    if in_main_thread and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, handler)
