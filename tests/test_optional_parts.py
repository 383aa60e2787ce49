"""What is optional costs nothing where it is not used: it is not imported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

OPTIONAL = {"redis", "prometheus_client", "opentelemetry", "sqlalchemy", "psycopg_pool"}

CONNECT = """
import json, sys
# It imports redis, where that is installed.
import pybreaker
before = set(sys.modules)
from tests.benchmarks import project
project.configure(["django_proxysql"])
connection = project.wrapper("shop", **project.null(2))
with connection.cursor() as cursor:
    cursor.execute("SELECT 1")
print(json.dumps(sorted({name.partition(".")[0] for name in set(sys.modules) - before})))
"""


def test_engine_imports_no_part_that_is_not_used() -> None:
    done = subprocess.run(
        [sys.executable, "-c", CONNECT],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    imported = set(json.loads(done.stdout))
    assert "django_proxysql" in imported
    assert imported.isdisjoint(OPTIONAL)
