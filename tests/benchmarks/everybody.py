"""Connects, statements and blocks by everybody's engine, in one interleaved run.

``python -m tests.benchmarks.everybody`` prints a table, and draws it for the docs. Each
contender is a process of its own, on the same server; they work in turn, in another order each
round. Those of other packages get a virtual environment, into which pip installs them; one that
cannot be installed or run is named as such.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from tests.servers.haproxy import HAProxy
from tests.servers.mariadb import Node
from tests.servers.redis import RedisServer

from . import project
from .figures import machine
from .statement import one_core_each

ROOT = Path(__file__).parents[2]
CHART = ROOT / "docs" / "images" / "everybody.svg"
CONNECTOR = "mysql.connector.django"
AWS = "aws_advanced_python_wrapper.django.backends.mysql_connector"
#: What the others need besides Django, in an environment of their own.
PACKAGES = ("mysql-connector-python", "aws-advanced-python-wrapper")

#: What is measured, and what is done before it.
WORK: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "connect": (
        lambda connection: connection.ensure_connection(),
        # As Django does at a request's end.
        lambda connection: connection.close_if_unusable_or_obsolete(),
    ),
    "statement": (
        lambda connection: project.execute(connection, project.READ),
        lambda connection: connection.ensure_connection(),
    ),
    "atomic block": (
        lambda connection: project.block(connection, project.WRITE),
        lambda connection: connection.ensure_connection(),
    ),
}


class Contender(NamedTuple):
    """One engine, as its own documentation sets it up."""

    name: str
    #: Its entry in DATABASES, without the account.
    entry: dict[str, Any]
    #: Distributions that it uses, whose versions are printed.
    packages: Sequence[str]
    #: What makes it what it is, as it is printed.
    settings: str = ""


def contenders(node: Node, behind: HAProxy, redis: RedisServer) -> list[Contender]:
    here = {"HOST": node.host, "PORT": node.port}
    peers = {"ENGINE": project.ENGINE, "PEERS": [here, here]}
    return [
        Contender("Django", {"ENGINE": project.MYSQL, **here}, ["mysqlclient"]),
        Contender("django-proxysql", peers, ["mysqlclient"], "2 peers"),
        Contender(
            "… with PyMySQL",
            # It reads the system's certificates at each connect, also to a server without TLS.
            {**peers, "OPTIONS": {"ssl_disabled": True}},
            ["PyMySQL"],
            "2 peers, ssl_disabled",
        ),
        Contender(
            "… with SHARED_STATE and metrics",
            {**peers, "SHARED_STATE": redis.url},
            ["mysqlclient", "redis", "prometheus_client"],
            "2 peers",
        ),
        Contender(
            "Django behind HAProxy",
            {"ENGINE": project.MYSQL, "HOST": behind.host, "PORT": behind.ports["servers"]},
            ["mysqlclient"],
            "mode tcp, 2 servers",
        ),
        Contender("MySQL Connector/Python", {"ENGINE": CONNECTOR, **here}, PACKAGES[:1]),
        Contender(
            "AWS Advanced Python Wrapper",
            {"ENGINE": AWS, "OPTIONS": {"plugins": ""}, **here},
            PACKAGES[::-1],
            'plugins ""',
        ),
    ]


# The process that measures


class Worker:
    """A contender's process, and what its work took: each question has it do some work."""

    def __init__(self, contender: Contender, python: str) -> None:
        self.contender = contender
        #: By work, each time that it was done.
        self.seconds: dict[str, list[float]] = {work: [] for work in WORK}
        self.versions = ""
        #: Why there is nothing, if there is not.
        self.error = ""
        self._process = subprocess.Popen(
            [python, "-m", f"{__package__}.everybody", "--work", json.dumps(contender)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        with self._noting():
            self.versions = self._ask("versions")

    def work(self, work: str, times: int, counts: bool) -> None:
        """Do ``work`` so many times, if it has not failed yet."""
        if self.error:
            return
        with self._noting():
            seconds = json.loads(self._ask(f"{times} {work}"))
            if counts:
                self.seconds[work].extend(seconds)

    def percentile(self, work: str, of_100: int) -> float:
        ordered = sorted(self.seconds[work])
        return ordered[min(len(ordered) * of_100 // 100, len(ordered) - 1)]

    @contextmanager
    def _noting(self) -> Iterator[None]:
        try:
            yield
        except Exception as exc:
            self.error = str(exc)

    def _ask(self, question: str) -> str:
        # Of a process that has ended, what it said is the answer.
        with suppress(BrokenPipeError):
            self._process.stdin.write(question + "\n")
            self._process.stdin.flush()
        answer = self._process.stdout.readline().strip()
        if not answer:
            said = self._process.stderr.read().strip().splitlines()
            raise RuntimeError(said[-1] if said else "it ended")
        return answer

    def close(self) -> None:
        """End the process."""
        self._process.communicate(timeout=60)


def measure(rounds: int, times: int) -> list[Worker]:
    """Start the servers and everybody's processes, and have them work in turn."""
    elsewhere = environment()
    with ExitStack() as stack:
        [node] = stack.enter_context(project.mariadb())
        behind = stack.enter_context(HAProxy({"servers": [node, node]}))
        redis = stack.enter_context(RedisServer())
        # Workers are on the first core, as this process is, whose children they are.
        stack.enter_context(one_core_each(node))
        workers = []
        for contender in contenders(node, behind, redis):
            is_here = set(contender.packages).isdisjoint(PACKAGES)
            worker = Worker(contender, sys.executable if is_here else elsewhere or sys.executable)
            stack.callback(worker.close)
            workers.append(worker)
        for turn in range(-2, rounds):
            for work in WORK:
                # In another order each round, and none always after the same other.
                for worker in sorted(workers, key=lambda one: hash((turn, id(one)))):
                    worker.work(work, times, counts=turn >= 0)
        return workers


def environment() -> str | None:
    """Return the Python of an environment with the others' packages; None: there is none."""
    folder = Path(tempfile.gettempdir()) / "django-proxysql-everybody"
    python = folder / "bin" / "python"
    try:
        if not python.exists():
            subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        django = f"Django=={metadata.version('Django')}"
        # What this module imports, too.
        ours = ("pybreaker", "tenacity", "sqlparse", "PyMySQL")
        pip = [str(python), "-m", "pip", "install", "--quiet", django, *ours, *PACKAGES]
        subprocess.run(pip, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return str(python)


# A contender's process


def answer(contender: Contender) -> None:
    """Answer each line of stdin by one of stdout."""
    if "PyMySQL" in contender.packages:
        import pymysql

        pymysql.install_as_MySQLdb()
        # Django wants a later mysqlclient than PyMySQL says it is.
        pymysql.version_info = (2, 2, 7, "final", 0)
    counts = "prometheus_client" in contender.packages
    project.configure(["django_proxysql.monitoring.metrics"] if counts else [])
    connection = project.wrapper(**project.account(), **contender.entry)
    for line in sys.stdin:
        question = line.strip()
        if question == "versions":
            connection.ensure_connection()
            print(", ".join(f"{p} {metadata.version(p)}" for p in contender.packages), flush=True)
            continue
        times, _, name = question.partition(" ")
        work, before = WORK[name]
        seconds = []
        for _ in range(int(times)):
            before(connection)
            began = time.perf_counter()
            work(connection)
            seconds.append(time.perf_counter() - began)
        print(json.dumps(seconds), flush=True)
        connection.close_if_unusable_or_obsolete()


# Shown


def table(measured: Sequence[Worker]) -> str:
    """Return what each took, and its ratio to Django's own engine."""
    first = measured[0]
    head = f"{'':32}" + "".join(f"{f'{work}, us':>26}" for work in WORK)
    lines = [head, f"{'':32}" + f"{'p50':>9}{'p99':>9}{'ratio':>8}" * len(WORK)]
    for one in measured:
        line = f"{one.contender.name:32}"
        if one.error:
            lines.append(f"{line} not measured: {one.error}")
            continue
        for work in WORK:
            middle = one.percentile(work, 50)
            ratio = middle / first.percentile(work, 50)
            line += f"{middle * 1e6:9.0f}{one.percentile(work, 99) * 1e6:9.0f}{ratio:8.2f}"
        lines.append(line)
    lines.append("")
    for one in measured:
        said = "; ".join(filter(None, (one.versions, one.contender.settings)))
        lines.append(f"{one.contender.name}: {said or 'not installed'}")
    return "\n".join(lines)


def draw(measured: Sequence[Worker], file: Path) -> None:
    """Draw each one's median, in units of Django's own, and where its 99th percentile is."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot

    # Text stays text, and the same figures are the same file.
    pyplot.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "everybody", "font.size": 9})
    shown = [one for one in measured if not one.error]
    figure, plots = pyplot.subplots(1, len(WORK), figsize=(9, 0.5 + 0.35 * len(shown)), sharey=True)
    names = [one.contender.name for one in shown]
    for axes, work in zip(plots, WORK):
        plain = shown[0].percentile(work, 50)
        middle = [one.percentile(work, 50) / plain for one in shown]
        late = [one.percentile(work, 99) / plain for one in shown]
        colours = ["#1b7f79" if "proxysql" in n or n.startswith("…") else "#999999" for n in names]
        axes.barh(names, middle, color=colours)
        axes.plot(late, names, "|", color="#333333")
        axes.axvline(1, color="#333333", linewidth=0.5)
        axes.set_title(f"{work} (Django {plain * 1e6:.0f} µs)", fontsize=9)
        axes.grid(axis="x", linewidth=0.3)
    plots[0].invert_yaxis()
    figure.tight_layout()
    file.parent.mkdir(exist_ok=True)
    figure.savefig(file, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.everybody")
    parser.add_argument("--quick", action="store_true", help="few rounds: shows that it runs")
    parser.add_argument("--chart", type=Path, default=CHART, help="where to draw it")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        answer(Contender(*json.loads(options.work)))
        return
    print(machine(), flush=True)
    measured = measure(*((2, 3) if options.quick else (60, 10)))
    print(f"\n{table(measured)}")
    draw(measured, options.chart)


if __name__ == "__main__":
    main()
