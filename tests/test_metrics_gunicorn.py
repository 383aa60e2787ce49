"""A real site under gunicorn with several workers: one page for all of them, by the docs' own code.

The site's first peer is dead, and always tried first. What the metrics say is held against what
the server that lives says of its connections.
"""

from __future__ import annotations

import functools
import json
import os
import re
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import django
import pytest
from prometheus_client.parser import text_string_to_metric_families

from django_proxysql.conf.keys import ENGINE
from tests import fakes
from tests.engine import mysql_peer
from tests.project import Project, get
from tests.servers import PASSWORD
from tests.servers.mariadb import Node
from tests.servers.ports import HOST
from tests.servers.prometheus import Prometheus
from tests.test_alerts import RULES, expressions
from tests.test_metrics import check, from_the_docs
from tests.web import Web, sessions

APP = "django_proxysql.monitoring.metrics"

SETTINGS = """
import json, pathlib
SECRET_KEY = "for tests only"
ALLOWED_HOSTS = ["*"]
DATABASES = json.loads(pathlib.Path(__file__).with_name("databases.json").read_text())
DEFAULT_AUTO_FIELD = "django.db.models.AutoField"
ROOT_URLCONF = "urls"
USE_TZ = True
"""

#: A page on which as many workers meet as are asked for: a worker that serves one request at a
#: time cannot serve two of those that wait for one another.
MEETING = """
import pathlib, time
from django.db import connection
from django.http import HttpResponse

def meet(request):
    with connection.cursor() as cursor:
        cursor.execute("SELECT 1")
    place = pathlib.Path(__file__).with_name(request.GET["place"])
    place.joinpath(str(os.getpid())).touch()
    deadline = time.monotonic() + 60
    while len(list(place.iterdir())) < int(request.GET["number"]):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return HttpResponse(str(os.getpid()))

urlpatterns.append(path("meet", meet))
"""

WSGI = """
from django.core.wsgi import get_wsgi_application
application = get_wsgi_application()
"""


class Site:
    """A site under gunicorn, in a directory of its own."""

    def __init__(self, root: Path, alive: Node, workers: int) -> None:
        self.root = root
        self.alive = alive
        self.workers = workers
        self.meetings = 0

    def write(self, apps: list[str], entry: dict[str, Any], urls: str) -> None:
        """Write the project's files."""
        files = {
            "settings.py": f"{SETTINGS}INSTALLED_APPS = {apps}\n",
            "urls.py": urls + MEETING,
            "wsgi.py": WSGI,
            "databases.json": json.dumps({"default": entry}),
            "gunicorn.conf.py": from_the_docs("child_exit"),
        }
        self.project = Project(self.root, files)

    def start(self, *options: str, multiprocess: bool = True) -> None:
        environment = {}
        if multiprocess:
            (self.root / "metrics").mkdir()
            environment["PROMETHEUS_MULTIPROC_DIR"] = str(self.root / "metrics")
        command = ("-m", "gunicorn", "--bind", "ADDRESS", "--workers", str(self.workers))
        self.web = Web(self.project, *command, *options, "wsgi", **environment)
        self.address = f"{HOST}:{self.web.port}"
        self.get("metrics")

    def get(self, path: str) -> bytes:
        return get(f"http://{self.address}/{path}", self.web.process)

    def meet(self) -> set[int]:
        """Have every worker serve one request; return their process ids."""
        self.meetings += 1
        place = f"meeting{self.meetings}"
        (self.root / place).mkdir()
        path = f"meet?place={place}&number={self.workers}"
        with ThreadPoolExecutor(self.workers) as pool:
            pids = set(pool.map(lambda _: int(self.get(path)), range(self.workers)))
        assert len(pids) == self.workers
        return pids

    def sums(self) -> Counter[str]:
        """Return the sums of the samples of ours by name and labels, over all workers."""
        found: Counter[str] = Counter()
        for family in text_string_to_metric_families(self.get("metrics").decode()):
            for sample in family.samples:
                words = [word for label, word in sorted(sample.labels.items()) if label != "alias"]
                name = sample.name.replace("django_proxysql_", "")
                found[" ".join([name, *words])] += sample.value
        return found

    def connections(self) -> int:
        """How many connections of the site's the server that lives has."""
        return len(sessions(self.alive))


#: Each look asks the site.
until = functools.partial(fakes.until, pause=0.05)


@pytest.fixture
def site(mariadb_pair: tuple[Node, Node], tmp_path: Path) -> Iterator[Site]:
    """A site of two workers that keep their connections; its first peer is dead."""
    dead, alive = mariadb_pair
    dead.kill()
    site = Site(tmp_path, alive, workers=2)
    site.write(
        ["django_proxysql", APP], entry(mariadb_pair), from_the_docs("MultiProcessCollector")
    )
    yield site
    site.web.stop()


def entry(pair: tuple[Node, Node], **more: Any) -> dict[str, Any]:
    dead, alive = pair
    peers = [mysql_peer(dead), mysql_peer(alive, PRIORITY=1)]
    return {"ENGINE": ENGINE, "PEERS": peers, "CONN_MAX_AGE": None, **more}


@pytest.mark.parametrize("options", [(), ("--preload",)], ids=["", "preload"])
def test_workers_add_up(site: Site, options: tuple[str, ...]) -> None:
    """Counts and gauges are sums over the workers, also after one was killed and replaced."""
    site.start(*options)
    pids = site.meet()
    sums = site.sums()
    assert sums["connects_total failure peer0"] == 2
    assert sums["connects_total success peer1"] == 2
    assert sums["connect_duration_seconds_count success peer1"] == 2
    assert sums["connect_failures_total unreachable peer0"] == 2
    assert sums["circuit_openings_total peer0"] == 2
    # The process that forks the workers is none of those that have a circuit.
    assert sums["circuit_state peer0 open"] == sums["circuit_state peer1 closed"] == 2
    assert sums["circuit_state peer0 closed"] == sums["circuit_state peer1 open"] == 0
    assert sums["connections peer1"] == site.connections() == 2

    # Connections that are kept are no new ones.
    assert site.meet() == pids
    assert site.sums()["connects_total success peer1"] == 2

    victim = min(pids)
    os.kill(victim, signal.SIGKILL)
    until(lambda: not list((site.root / "metrics").glob(f"gauge_live*_{victim}.db")))
    until(lambda: site.connections() == 1)
    sums = site.sums()
    assert sums["connects_total success peer1"] == 2
    assert sums["connections peer1"] == 1

    until(lambda: victim not in site.meet())
    sums = site.sums()
    assert sums["connects_total success peer1"] == 3
    assert sums["connect_failures_total unreachable peer0"] == 3
    assert sums["circuit_state peer0 open"] == sums["circuit_state peer1 closed"] == 2
    assert sums["connections peer1"] == site.connections() == 2
    assert check(site.get("metrics")) == ""

    site.web.stop()
    printed = site.web.log.read_text()
    assert "Traceback" not in printed
    assert "A listener of" not in printed
    assert PASSWORD not in printed


def test_connections_that_are_closed(mariadb_pair: tuple[Node, Node], site: Site) -> None:
    """A worker that closes its connection at a request's end says so then."""
    site.write(
        ["django_proxysql", APP],
        entry(mariadb_pair, CONN_MAX_AGE=0),
        from_the_docs("MultiProcessCollector"),
    )
    site.start()
    site.meet()
    # The answer is there before the request's end.
    until(lambda: site.connections() == 0)
    until(lambda: site.sums()["connections peer1"] == 0)
    assert site.sums()["connects_total success peer1"] == 2


@pytest.mark.parametrize(
    ("options", "kept"), [(("--threads", "4"), 1), (("--worker-class", "gevent"), 0)]
)
def test_one_worker(site: Site, options: tuple[str, ...], kept: int) -> None:
    """Without multiprocess mode the page is the one process's registry.

    A greenlet that ends leaves its connection to the garbage collector. It is not counted on.
    """
    site.workers = 1
    site.start(*options, multiprocess=False)
    site.meet()
    sums = site.sums()
    assert sums["connects_total success peer1"] == 1
    assert sums["circuit_state peer0 open"] == sums["circuit_state peer1 closed"] == 1
    until(lambda: site.sums()["connections peer1"] == kept)
    assert (
        check(b"\n".join(re.findall(rb".*django_proxysql_.*", site.get("metrics"))) + b"\n") == ""
    )


def test_prometheus(site: Site) -> None:
    """A Prometheus that scrapes the site: each panel shows something, each alert is evaluated."""
    site.start()
    victim = min(site.meet())
    with Prometheus(site.address, RULES) as prometheus:
        until(lambda: prometheus.query("django_proxysql_connects_total"))
        # Something is to happen while it looks.
        os.kill(victim, signal.SIGKILL)
        until(lambda: victim not in site.meet())
        until(lambda: all(map(prometheus.query, expressions())))
        made = 'django_proxysql_connects_total{job="shop", peer="peer1", outcome="success"}'
        until(lambda: [one["value"][1] for one in prometheus.query(made)] == ["3"])
        until(lambda: {rule["health"] for rule in prometheus.alerts().values()} == {"ok"})
        # The dead peer has been out for less than five minutes. (A rule that was evaluated before
        # the first metrics came is "ok", too.)
        until(lambda: prometheus.alerts()["DatabasePeerOut"]["state"] == "pending")
        states = {name: rule["state"] for name, rule in prometheus.alerts().items()}
        assert states.pop("DatabasePeerOut") == "pending"
        assert set(states.values()) == {"inactive"}


@pytest.mark.skipif(
    sys.version_info[:2] != (3, 11) or not (4, 2) <= django.VERSION < (6, 1),
    reason="django-prometheus knows Django 4.2 to 6.0; it is tested on Python 3.11",
)
@pytest.mark.parametrize("multiprocess", [True, False])
def test_beside_django_prometheus(
    mariadb_pair: tuple[Node, Node], site: Site, multiprocess: bool
) -> None:
    """Its view shows its metrics and ours, each once; its backend is the peers' engine."""
    site.workers = 2 if multiprocess else 1
    site.write(
        ["django_prometheus", "django_proxysql", APP],
        entry(mariadb_pair, PEER_ENGINE="django_prometheus.db.backends.mysql"),
        "import os\n"
        "from django.urls import include, path\n"
        'urlpatterns = [path("", include("django_prometheus.urls"))]\n',
    )
    site.start(multiprocess=multiprocess)
    site.meet()
    text = site.get("metrics").decode()
    names = re.findall(r"^# TYPE (\S+)", text, re.MULTILINE)
    assert len(names) == len(set(names))
    sums = site.sums()
    assert sums["connects_total success peer1"] == site.workers
    assert sums["connections peer1"] == site.connections() == site.workers
    assert sums["circuit_state peer0 open"] == site.workers
    # It counts attempts, and it does not know of peers.
    assert sums["django_db_new_connections_total mysql"] == 2 * site.workers
    assert sums["django_db_new_connection_errors_total mysql"] == site.workers
    assert sums["django_db_execute_total mysql"] >= site.workers
