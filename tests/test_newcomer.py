"""A new site on two Galera nodes, by the commands of docs/tutorial/five-commands.rst."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from urllib.parse import quote

import pytest

from tests.project import get
from tests.servers import PASSWORD, USER
from tests.servers.galera import GaleraCluster, GaleraNode
from tests.servers.ports import HOST, ports
from tests.test_docs_blocks import ALL, ROOT, commands

PAGE = ROOT / "docs" / "tutorial" / "five-commands.rst"

pytestmark = [
    pytest.mark.skipif(not PAGE.exists(), reason="the docs are not here"),
    pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not here"),
]


@contextlib.contextmanager
def running(
    command: str, root: Path, environment: Mapping[str, str]
) -> Iterator[subprocess.Popen[str]]:
    """Run a command in bash, and what it starts; end both."""
    process = subprocess.Popen(
        ["bash", "-c", f"exec {command}"], cwd=root, env=environment, text=True
    )
    try:
        yield process
    finally:
        process.terminate()
        process.wait(60)


@pytest.fixture
def nodes(galera: GaleraCluster) -> Iterator[list[GaleraNode]]:
    """Two nodes of a cluster, with an empty database ``shop``."""
    alive = galera.nodes[-1]
    alive.sql(f"CREATE DATABASE shop; GRANT ALL ON shop.* TO '{USER}'")
    yield galera.nodes[:2]
    alive.sql(f"DROP DATABASE shop; REVOKE ALL ON shop.* FROM '{USER}'")


@pytest.mark.server
def test_a_new_site_in_five_commands_survives_a_node(
    nodes: list[GaleraNode], tmp_path: Path
) -> None:
    urls, setting_up, asking = ALL[PAGE]
    *first, serving = setting_up.text.strip().splitlines()
    environment = {
        **os.environ,
        # The page's python and django-admin are those of this test.
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "PYTHONWARNINGS": "ignore",
    }
    environment.pop("DJANGO_SETTINGS_MODULE", None)
    for (_export, shown), node in zip(commands(urls), nodes):
        name, _, url = shown.partition("=")
        secret = f"{USER}:{quote(PASSWORD)}@"
        environment[name] = re.sub(r"shop:secret@[\d.]+", f"{secret}{node.host}:{node.port}", url)
    where = f"{HOST}:{ports.reserve()}"
    subprocess.run(
        ["bash", "-ec", "\n".join(first)], cwd=tmp_path, env=environment, timeout=120, check=True
    )
    ask = asking.text.replace("127.0.0.1:8000", where).replace(
        "curl ", "curl --silent --output page "
    )

    def status() -> str:
        answer = subprocess.run(
            ["bash", "-c", ask], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True
        )
        return answer.stdout.strip()

    def connections() -> int:
        return int(nodes[1].sql("SHOW GLOBAL STATUS LIKE 'Connections'").split()[-1])

    # Without a second process that waits for changes of its files.
    serving = serving.replace("127.0.0.1:8000", f"--noreload {where}")
    with running(serving, tmp_path, environment) as server:
        get(f"http://{where}/admin/login/", server)
        nodes[0].kill()
        before = connections()
        assert [status() for _ in range(4)] == ["200"] * 4
        # Each page has asked the database.
        assert connections() >= before + 4
