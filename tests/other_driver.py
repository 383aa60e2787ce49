"""A plugin of pytest's: run tests with PyMySQL or psycopg2, in a process of its own.

``TEST_DRIVER=pymysql python -m pytest -p tests.other_driver …``
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.servers.lending import lend

DRIVER = os.environ.get("TEST_DRIVER")

if DRIVER == "psycopg2":
    # Django then takes psycopg2.
    sys.modules["psycopg"] = None  # type: ignore[assignment]
elif DRIVER == "pymysql":
    import pymysql

    pymysql.install_as_MySQLdb()
    # Django wants a later mysqlclient than PyMySQL says it is.
    pymysql.version_info = (2, 2, 7, "final", 0)


#: The fixtures of the servers that a driver cannot connect to.
NOT_ITS = {
    "pymysql": {"postgres", "postgres_pair", "postgres_tls"},
    "psycopg2": {"mariadb", "mariadb_pair", "mariadb_tls", "galera"},
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep the tests that may connect with DRIVER: the others would be the same once more."""
    from tests.conftest import needed_by

    items[:] = [item for item in items if NOT_ITS[str(DRIVER)].isdisjoint(needed_by(item))]


def run_again(tests: str, driver: str, request: pytest.FixtureRequest, *servers: str) -> None:
    """Run a file's tests, or one of them, once more, with ``driver``.

    :param servers: the fixtures whose servers these tests borrow. Others they start themselves.
    :raises AssertionError: one of them fails.
    """
    lent = lend(**{name: request.getfixturevalue(name) for name in servers})
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", __name__, tests],
        env={**os.environ, **lent, "TEST_DRIVER": driver},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout[-5000:]
