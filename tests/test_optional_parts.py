"""What is optional costs nothing where it is not used: it is not imported."""

from __future__ import annotations

import json

import pytest

from tests.children import run_python

OPTIONAL = {"redis", "prometheus_client", "opentelemetry", "sqlalchemy", "psycopg_pool"}

CONNECT = """
import json, sys
# It imports redis, where that is installed.
import pybreaker
before = set(sys.modules)
from tests.benchmarks import project
project.configure(["django_proxysql"])
connection = project.wrapper(**project.null(2))
with connection.cursor() as cursor:
    cursor.execute("SELECT 1")
print(json.dumps(sorted({name.partition(".")[0] for name in set(sys.modules) - before})))
"""


def test_engine_imports_no_part_that_is_not_used() -> None:
    imported = set(json.loads(run_python(CONNECT).stdout))
    assert "django_proxysql" in imported
    assert imported.isdisjoint(OPTIONAL)


@pytest.mark.parametrize(
    ("part", "library", "install"),
    [
        ("metrics", "prometheus_client", "django-proxysql[prometheus]"),
        ("opentelemetry", "opentelemetry", "django-proxysql[opentelemetry]"),
        ("health_check", "health_check", "django-health-check>=4"),
    ],
)
def test_error_without_a_library_says_what_to_install(
    part: str, library: str, install: str
) -> None:
    program = f"""
        import sys
        sys.modules[{library!r}] = None
        try:
            import django_proxysql.monitoring.{part}
        except ImportError as exc:
            print(exc)
        """
    assert f'pip install "{install}"' in run_python(program).stdout
