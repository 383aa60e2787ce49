"""Fixtures that start the servers that the tests ask for.

Each server is started once, by the first test that wants it (the ``…_session`` fixtures), and a
test gets it through a fixture that afterwards thaws, restarts and sets back what the test has hurt.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from django_proxysql.demo.servers import exit_on_sigterm, start_together
from tests.servers.mariadb import Node


def pytest_configure(config: pytest.Config) -> None:
    exit_on_sigterm()


@pytest.fixture(scope="session")
def mariadb_pair_session() -> Iterator[tuple[Node, Node]]:
    """Two MariaDB servers that know nothing of each other, with the same database and users."""
    first, second = Node("mariadb-1"), Node("mariadb-2")
    try:
        start_together(first, second)
        for node in (first, second):
            node.set_up().load_time_zones()
        yield first, second
    finally:
        first.close()
        second.close()


@pytest.fixture
def mariadb_pair(mariadb_pair_session: tuple[Node, Node]) -> Iterator[tuple[Node, Node]]:
    """Two MariaDB servers, restored after the test."""
    yield mariadb_pair_session
    for node in mariadb_pair_session:
        node.restore()


@pytest.fixture
def mariadb(mariadb_pair: tuple[Node, Node]) -> Node:
    """One MariaDB server: the first of the pair."""
    return mariadb_pair[0]


@pytest.fixture(scope="session")
def mariadb_third_session() -> Iterator[Node]:
    with Node("mariadb-3") as node:
        yield node.set_up()


@pytest.fixture
def mariadb_third(mariadb_third_session: Node) -> Iterator[Node]:
    """A third MariaDB server, beside the pair; restored after the test."""
    yield mariadb_third_session
    mariadb_third_session.restore()
