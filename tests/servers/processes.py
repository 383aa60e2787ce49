"""Server processes that never outlive the Python process that started them.

Everything here is for throwaway servers: data in a temporary directory, free ports on loopback,
all of it gone at the end. What ends a run decides what cleans up after it:

=====================================  ===================================================
the run ends by                        the servers are ended by
=====================================  ===================================================
the end of a ``with`` block            ``ServerProcess.close()``
an exception, Ctrl-C, ``sys.exit()``   ``atexit``
SIGTERM                                ``atexit``, where ``exit_on_sigterm()`` was called,
                                       otherwise as below
SIGKILL, a crash of the interpreter    the kernel (Linux), which kills them when we die
=====================================  ===================================================
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from .ports import HOST, ServerError, ports
from .runs import current_run

Self = TypeVar("Self", bound="ServerProcess")

# Runs before the server does, in the server's own process: gives up root's rights, asks the kernel
# for a SIGKILL when we die, and becomes the server. In that order, since a process that changes its
# user loses the request (and so would a server that drops its rights itself, as mariadbd --user
# does). A program of its own and not Popen's preexec_fn, which is not safe where threads run.
_LAUNCHER = """
import os, sys
user, parent, *command = sys.argv[1:]
if sys.platform == "linux":
    import ctypes  # now: the other user may not be able to read our Python
    prctl = ctypes.CDLL(None, use_errno=True).prctl
if user:
    import pwd
    entry = pwd.getpwnam(user)
    os.setgroups([]); os.setgid(entry.pw_gid); os.setuid(entry.pw_uid)
if sys.platform == "linux":
    PR_SET_PDEATHSIG, SIGKILL = 1, 9
    prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0)
    if os.getppid() != int(parent):
        sys.exit("the parent died before the server was started")
os.execv(command[0], command)
"""


class _BorrowedProcess:
    """The process of a server that another run has started."""

    returncode = None

    def __init__(self, pid: int) -> None:
        self.pid = pid

    def poll(self) -> int | None:
        return None if alive(self.pid) else -1


class ServerProcess:
    """One server: a folder, a port on loopback, a process to start, stop, kill, freeze and thaw.

    A subclass says how its server is started (``command``), what is made before the first start
    (``prepare``), and how to see that it answers (``ready``). Start it by ``start()`` or ``with``;
    it can be used from any thread, one call at a time.
    """

    kind: ClassVar[str] = "server"  # begins the folder's name
    account: ClassVar[str] = ""  # the user it runs as when we are root; "": as root
    environment: ClassVar[dict[str, str]] = {}
    start_timeout: float = 120.0  # seconds

    def __init__(self, name: str = "", port_count: int = 1) -> None:
        self.name = name or self.kind
        self.host = HOST
        self.run_as = self.account if os.geteuid() == 0 else ""
        if self.run_as:
            self._check_account()
        self.port = ports.reserve(port_count)  # the first of them
        run = current_run()
        self.directory = run.workspace.folder(self.kind)
        self.log_path = self.directory / "server.log"
        self.process: subprocess.Popen[bytes] | _BorrowedProcess | None = None
        self.frozen = False
        self.closed = False
        self.prepared = False
        self._owner = os.getpid()
        self.give(self.directory)
        run.servers.append(self)

    # what a subclass says

    def command(self) -> list[str]:
        """The server's command line, with the absolute path of the program."""
        raise NotImplementedError

    def prepare(self) -> None:
        """Make what the server needs before its first start."""

    def ready(self) -> bool:
        """Whether the server answers. Asked every 50 ms after the start."""
        try:
            with socket.create_connection((self.host, self.port), timeout=1):
                return True
        except OSError:
            return False

    # what its user does

    @property
    def pid(self) -> int:
        if self.process is None:
            raise ServerError(f"{self.name} has not been started")
        return self.process.pid

    @property
    def running(self) -> bool:
        """Whether the process exists (a frozen one does)."""
        return self.process is not None and self.process.poll() is None

    def start(self: Self, wait: bool = True) -> Self:
        """Start the server; with ``wait`` return when it answers. A running one is left alone."""
        if self.closed:
            raise ServerError(f"{self.name} is closed")
        if not self.running:
            self._check_not_borrowed()
            if not self.prepared:
                self.prepare()
                self.prepared = True
            command = self.command()
            current_run().spawn(lambda: self._open(command))
            self.frozen = False
        if wait:
            self.wait_until_ready()
        return self

    def wait_until_ready(self, timeout: float | None = None) -> None:
        """Return when it answers; after ``timeout`` seconds kill it and raise ServerError."""
        seconds = self.start_timeout if timeout is None else timeout
        deadline = time.monotonic() + seconds
        while True:
            if not self.running:
                code = self.process.returncode if self.process else None
                raise ServerError(
                    f"{self.name} ended by itself (exit code {code})\n{self.log_tail()}"
                )
            if self.ready():
                return
            if time.monotonic() > deadline:
                self.kill()
                raise ServerError(f"{self.name} gave no answer in {seconds} s\n{self.log_tail()}")
            time.sleep(0.05)

    def stop(self, timeout: float = 20.0) -> None:
        """An orderly shutdown (SIGTERM); after ``timeout`` seconds a SIGKILL."""
        if self.process is None or not self.running:
            return
        self._check_not_borrowed()
        if self.frozen:
            self.thaw()
        self.process.send_signal(self.stop_signal)
        try:
            self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()

    stop_signal: ClassVar[signal.Signals] = signal.SIGTERM

    def kill(self) -> None:
        """A crash (SIGKILL) of the server and its child processes. Works on a frozen one, too."""
        if self.process is not None and self.running:
            self._check_not_borrowed()
            gone = self._signal_all(signal.SIGKILL)
            self.process.wait(20)
            # A server that finds processes of its former self alive may refuse to start.
            deadline = time.monotonic() + 5
            while any(map(alive, gone)) and time.monotonic() < deadline:
                time.sleep(0.01)
        self.frozen = False

    def freeze(self) -> None:
        """Stop the server where it stands (SIGSTOP): it accepts connections, and stays silent."""
        self._signal_all(signal.SIGSTOP)
        self.frozen = True

    def thaw(self) -> None:
        """Let a frozen server go on (SIGCONT)."""
        self._signal_all(signal.SIGCONT)
        self.frozen = False

    def restart(self: Self) -> Self:
        """Stop the server, if it runs, and start it again: same port, same data."""
        self.stop()
        return self.start()

    def restore(self) -> None:
        """Make the server usable again: thaw a frozen one, start a dead one."""
        if self.running and self.frozen:
            self.thaw()
        if not self.running:
            self.start()

    def close(self) -> None:
        """Kill the server and remove its data and its ports. It cannot be started again."""
        if self.closed or os.getpid() != self._owner:  # a forked child leaves it alone
            return
        self.kill()
        self.closed = True
        shutil.rmtree(self.directory, ignore_errors=True)
        ports.release(self.port)
        with contextlib.suppress(ValueError):
            current_run().servers.remove(self)

    def __enter__(self: Self) -> Self:
        try:
            return self.start()
        except BaseException:
            self.close()
            raise

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        """What another process may know of the server; see lending.py."""
        return {**self.__dict__, "process": _BorrowedProcess(self.pid)}

    def __repr__(self) -> str:
        state = "frozen" if self.frozen else "running" if self.running else "down"
        return f"<{type(self).__name__} {self.name} {self.host}:{self.port} {state}>"

    # what helps a subclass

    def give(self, path: Path) -> None:
        """Make the user that the server runs as the owner of ``path`` (with all in it)."""
        if not self.run_as:
            return
        entry = pwd.getpwnam(self.run_as)
        for folder, _, files in os.walk(path):
            for name in (".", *files):
                os.chown(os.path.join(folder, name), entry.pw_uid, entry.pw_gid)
        os.chown(path, entry.pw_uid, entry.pw_gid)

    def run(
        self,
        command: Sequence[str],
        *,
        stdin: bytes | None = None,
        timeout: float = 60.0,
        **options: Any,
    ) -> str:
        """Run a client or a tool to its end (at most ``timeout`` seconds) and return its output."""
        try:
            result: subprocess.CompletedProcess[bytes] = subprocess.run(
                command,
                input=stdin,
                stdin=subprocess.DEVNULL if stdin is None else None,
                capture_output=True,
                timeout=timeout,
                env=self._clean_environment(),
                **options,
            )
        except subprocess.TimeoutExpired as error:
            raise ServerError(
                f"{self.name}: {command[0]} did not end within {timeout} s"
            ) from error
        if result.returncode:
            message = (
                result.stderr.decode(errors="replace").strip() or f"exit code {result.returncode}"
            )
            raise ServerError(f"{self.name}: {os.path.basename(command[0])}: {message}")
        return result.stdout.decode(errors="replace")

    def log_tail(self, lines: int = 25) -> str:
        """The end of the server's log."""
        try:
            return "\n".join(self.log_path.read_text(errors="replace").splitlines()[-lines:])
        except OSError:
            return "(no log)"

    def _clean_environment(self) -> dict[str, str]:
        """Ours without the variables by which clients would find other servers and passwords."""
        unwanted = ("MYSQL", "MARIADB", "PG")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(unwanted)}
        return {**kept, "LC_ALL": "C", **self.environment}

    def _open(self, command: list[str]) -> None:
        # Sets self.process itself: were it returned, a Ctrl-C in between would lose it.
        launch = [sys.executable, "-I", "-S", "-c", _LAUNCHER, self.run_as, str(os.getpid())]
        with open(self.log_path, "ab") as log:
            self.process = subprocess.Popen(
                launch + command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.directory,
                env=self._clean_environment(),
                start_new_session=True,  # Ctrl-C in a terminal ends us, and we end the servers
            )

    def _check_not_borrowed(self) -> None:
        if isinstance(self.process, _BorrowedProcess):
            raise ServerError(f"{self.name} is lent: only its owner stops and starts it")

    def _signal_all(self, number: signal.Signals) -> list[int]:
        """Signal the server, then its children: so it takes no action when they are signalled."""
        if not self.running:
            raise ServerError(f"{self.name} is not running")
        # First it is stopped, and so begins no child that would be missed. One of PostgreSQL's that
        # is left would wait for ever for a lock of a killed one, and no server start beside it.
        os.kill(self.pid, signal.SIGSTOP)
        deadline = time.monotonic() + 5
        while _state(self.pid) not in "TtZX" and time.monotonic() < deadline:
            time.sleep(0.001)
        pids = [self.pid, *descendants(self.pid)]
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        return pids

    def _check_account(self) -> None:
        try:
            pwd.getpwnam(self.run_as)
        except KeyError:
            raise ServerError(
                f"{self.name} must not run as root, and the user {self.run_as!r} does not exist"
            ) from None


def descendants(pid: int) -> list[int]:
    """The processes started by ``pid``, and by these, and so on (Linux; elsewhere none).

    Neither the process group nor the session will do: PostgreSQL's processes each have their own.
    """
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            # "pid (name) state ppid …", where the name may contain blanks and parentheses
            parent = int(entry.read_text(errors="replace").rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(entry.parent.name))

    def below(parent: int) -> Iterator[int]:
        for child in children.get(parent, ()):
            yield child
            yield from below(child)

    return list(below(pid))


def alive(pid: int) -> bool:
    """Whether a process runs. A dead one that no process has waited for does not (Linux)."""
    return _state(pid) not in "ZX"


def _state(pid: int) -> str:
    """A process' state in one letter, as ps shows it: "X" for one that is not there."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return "X"


def start_together(*servers: ServerProcess) -> None:
    """Start servers at the same time and return when all of them answer."""
    for server in servers:
        server.start(wait=False)
    for server in servers:
        server.wait_until_ready()
