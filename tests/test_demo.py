"""``python -m django_proxysql demo``, run as a user runs it."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import urllib.parse
import urllib.request
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

DEMO = ("-m", "django_proxysql", "demo")
MARK = "DJANGO_PROXYSQL_TEST_OF_DEMO"

needs_proc = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks at /proc")


class Runs:
    """Runs the demo with a temporary directory and a mark by which its processes are known."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.mark = uuid.uuid4().hex
        unwanted = ("NO_COLOR", "TERM", "COLUMNS", "DJANGO_SETTINGS_MODULE")
        self.environ = {key: value for key, value in os.environ.items() if key not in unwanted}
        self.environ.update({"TMPDIR": str(directory), MARK: self.mark})

    def start(
        self, *arguments: str, stdout: int = subprocess.PIPE, **environ: str
    ) -> subprocess.Popen[str]:
        """Start Python in a process group of its own, as a shell starts a command."""
        return subprocess.Popen(
            [sys.executable, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=subprocess.PIPE,
            text=True,
            env={**self.environ, **environ},
            start_new_session=True,
        )

    def run(self, *arguments: str) -> tuple[int, str, str]:
        """Run Python to its end; return exit code, output and errors."""
        process = self.start(*arguments)
        out, err = process.communicate(timeout=60)
        return process.returncode, out, err

    def left_behind(self) -> list[str]:
        """Return files and processes that are still there."""
        left = [str(path) for path in self.directory.iterdir()]
        for entry in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if self.mark.encode() in entry.read_bytes():
                    left.append(f"process {entry.parent.name}")
        return left


@pytest.fixture
def demo() -> Iterator[Runs]:
    directory = Path(tempfile.mkdtemp(prefix="demo-", dir="/tmp"))
    directory.chmod(0o755)
    try:
        yield Runs(directory)
    finally:
        shutil.rmtree(directory)


def column(out: str, peer: str) -> Sequence[str]:
    """Return a peer's row in the summary: connects, share, failed, trials, opened, closed, out."""
    found = re.search(rf"^{peer} +(\d.*)$", out, re.MULTILINE)
    assert found, out
    return found[1].split()


def check_story(out: str) -> None:
    """Check a run's output: a peer failed and came back, and no request did."""
    assert re.search(r"^\d+ requests in \d+\.\d s \(\d+/s\), 0 errors$", out, re.MULTILINE), out
    for peer in ("peer0", "peer2"):
        connects, _, failed, trials, opened, closed, *_ = column(out, peer)
        assert int(connects) > 20
        assert (failed, trials, opened, closed) == ("0", "0", "0", "0")
    connects, _, failed, trials, opened, closed, out_for, _ = column(out, "peer1")
    assert int(connects) > 10
    assert int(failed) >= 1
    assert int(trials) >= 2
    assert (opened, closed) == ("1", "1")
    assert float(out_for) > 0

    parts = (
        "now peer1 fails",
        "WARNING default: circuit of peer1",
        "the trial of peer1, its circuit half-open, failed",
        "now peer1 is restored",
        "INFO default: circuit of peer1",
        "the trial of peer1, its circuit half-open, succeeded",
        "requests in",
        "docs/tutorial/index.rst",
    )
    position = 0
    for part in parts:
        position = out.find(part, position + 1)
        assert position > 0, f"{part!r} is missing or at the wrong place in\n{out}"
    # What was logged is said once.
    assert out.count("circuit of peer1") == 2


@needs_proc
def test_shows_a_peer_that_fails_and_comes_back(demo: Runs) -> None:
    code, out, err = demo.run(*DEMO, "--seconds", "6")
    assert (code, err) == (0, "")
    check_story(out)
    assert "peer1 open" in out
    # Not a terminal: one line a second, nothing but text.
    seconds = [int(at) for at in re.findall(r"^ +(\d+)\.\d s .* \| peer0 ", out, re.MULTILINE)]
    assert len(seconds) > 1
    assert seconds == sorted(set(seconds))
    assert "\x1b" not in out
    assert "\r" not in out
    lines = [line for line in out.splitlines() if line]
    assert sorted(set(lines)) == sorted(lines)
    # Percent, of what.
    assert re.search(r"made \d+ connects, \d+% of the last second's \| peer1 ", out)
    assert "peer    connects  of all  failed" in out
    assert demo.left_behind() == []


def test_first_line_is_written_before_anything_slow_is_begun(demo: Runs) -> None:
    """A user sees at once that it runs: Django is imported after the first line."""
    code, out, err = demo.run(
        "-c",
        "import runpy, sys\n"
        "class NotYet:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'django':\n"
        "            raise SystemExit('importing Django')\n"
        "sys.meta_path.insert(0, NotYet())\n"
        "sys.argv[1:] = ['demo']\n"
        "runpy.run_module('django_proxysql', run_name='__main__')\n",
    )
    assert out == "django-proxysql: a Django site on three SQLite peers, for 20 s\n"
    assert code == 1
    assert err == "importing Django\n"
    assert demo.left_behind() == []


def test_serves_the_status_page(demo: Runs) -> None:
    """While it runs, where it says; its buttons work, for it has no users."""
    # It is ended before.
    process = demo.start(*DEMO, "--seconds", "600")
    browser = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())
    try:
        said = next(line for line in process.stdout if line.startswith("status page: "))
        url = said.split()[-1]
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/status/", url)
        page = browser.open(url, timeout=60).read().decode()
        assert "Load balancer default" in page
        assert page.count("In use") > 2
        # Not the time of Chicago, which is Django's default.
        assert "(UTC)" in page
        token = re.search(r'name="csrfmiddlewaretoken" value="(\w+)"', page)
        assert token
        form = {
            "csrfmiddlewaretoken": token[1],
            "balancer": "default",
            "peer": "peer2",
            "action": "drain",
        }
        answer = browser.open(f"{url}peer/", urllib.parse.urlencode(form).encode(), timeout=60)
        assert answer.url == url
        page = answer.read().decode()
        assert "You drained peer2 (load balancer default)" in page
        assert "no new connections" in page
    finally:
        process.terminate()
        out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (143, "")
    assert "WARNING default: on the status page a visitor drained peer2" in out


@needs_proc
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_a_signal_ends_it_with_the_summary_so_far(demo: Runs, number: int, code: int) -> None:
    process = demo.start(*DEMO)
    lines = iter(process.stdout)
    for line in lines:
        if " | peer0 " in line:
            break
    os.killpg(process.pid, number)
    # A second Ctrl-C gives no traceback either.
    os.killpg(process.pid, number)
    out, err = "".join(lines), process.communicate(timeout=120)[1]
    assert (process.returncode, err) == (code, "")
    assert re.search(r"^\d+ requests in \d+\.\d s", out, re.MULTILINE)
    assert demo.left_behind() == []


@pytest.mark.parametrize("no_color", ["", "1"])
def test_on_a_terminal_the_table_is_drawn_in_place(demo: Runs, no_color: str) -> None:
    leader, follower = pty.openpty()
    process = demo.start(*DEMO, "--seconds", "4", stdout=follower, TERM="xterm", NO_COLOR=no_color)
    os.close(follower)
    written = b""
    # EIO is how a terminal says that no process writes any more.
    with contextlib.suppress(OSError):
        while chunk := os.read(leader, 65536):
            written += chunk
    os.close(leader)
    out, err = written.decode().replace("\r\n", "\n"), process.communicate(timeout=120)[1]
    assert (process.returncode, err) == (0, "")
    assert out.count("\x1b[8A\r\x1b[J\n") > 1
    coloured = re.findall(r"\x1b\[\d*m", out)
    assert bool(coloured) is not bool(no_color)
    plain = re.sub(r"\x1b\[\d*[mJA]", "", out)
    assert re.search(r"connects  failed  last second's connects\n", plain)
    assert "\x1b" not in plain
    check_story(plain.replace("\r", ""))
    assert re.search(r"^peer1 +open, trial in 0\.\d s +0 ", plain, re.MULTILINE)


def test_says_1_when_a_request_was_not_answered(demo: Runs) -> None:
    code, out, err = demo.run(
        "-c",
        "import sys\n"
        "from django_proxysql.demo import command, peers, run\n"
        "run.GRACE = 0\n"
        "take_away = peers.Peers.fail\n"
        "peers.Peers.fail = lambda self, name: [take_away(self, n) for n in peers.NAMES]\n"
        "sys.exit(command.main(['demo', '--seconds', '2']))",
    )
    assert (code, err) == (1, "")
    assert re.search(r"^\d+ requests in .*, [1-9]\d* errors$", out, re.MULTILINE)
    assert re.search(r"^  [1-9]\d* x HTTP 500 Internal Server Error$", out, re.MULTILINE)
    # A few of the errors in full, however many there were.
    assert out.count("NoPeerAvailable: No peer of 'default' can be reached. peer0 (") == 5


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("demo", "--seconds", "soon"), "'soon' is not a number of seconds"),
        (("demo", "--seconds", "0"), "0 is not a number of at least 2 seconds"),
        (("demo", "--seconds=-5"), "-5 is not a number of at least 2 seconds"),
        (("demo", "--seconds", "nan"), "nan is not a number of at least 2 seconds"),
    ],
)
def test_bad_arguments(
    capsys: pytest.CaptureFixture[str], arguments: Sequence[str], problem: str
) -> None:
    from django_proxysql.demo.command import main

    with pytest.raises(SystemExit) as info:
        main(arguments)
    assert info.value.code == 2
    assert problem in capsys.readouterr().err
