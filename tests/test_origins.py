"""A PEER_ENGINE that keeps connections by alias gives one peer's to all: that is found out.

Each engine here is one of somebody's own. What they are called says nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from django.core.exceptions import ImproperlyConfigured
from django.db import connections
from django.db.utils import load_backend

from django_proxysql.registry import balancers
from tests.engine import MYSQL, POSTGRESQL, engine, mysql_peer
from tests.servers.faultproxy import FaultProxy

Real = Any


def keeps_connections(real: Real) -> Any:
    """A list of idle connections an alias."""
    idle: dict[str, list[Any]] = {}

    class DatabaseWrapper(real):  # type: ignore[misc]
        def get_new_connection(self, params: dict[str, Any]) -> Any:
            kept = idle.setdefault(self.alias, [])
            return kept.pop() if kept else super().get_new_connection(params)

        def _close(self) -> None:
            idle[self.alias].append(self.connection)

    DatabaseWrapper.kept = idle
    return DatabaseWrapper


def keeps_arguments(real: Real) -> Any:
    """A factory an alias, made when it is first asked for, as geventpool's pools are."""
    factories: dict[str, Callable[[], Any]] = {}

    class DatabaseWrapper(real):  # type: ignore[misc]
        def get_new_connection(self, params: dict[str, Any]) -> Any:
            make = super().get_new_connection
            return factories.setdefault(self.alias, lambda: make(params))()

    return DatabaseWrapper


def keeps_past_django(real: Real) -> Any:
    """Has a connect() of its own, and never asks for a new connection while it has one."""
    kept: dict[str, Any] = {}

    class DatabaseWrapper(real):  # type: ignore[misc]
        def connect(self) -> None:
            if self.alias in kept:
                self.connection = kept[self.alias]
                self.set_autocommit(True)
            else:
                super().connect()
                kept[self.alias] = self.connection

        def _close(self) -> None:
            pass

    DatabaseWrapper.kept = kept
    return DatabaseWrapper


def keeps_the_first_peer_s(real: Real) -> Any:
    """A pool that is made with the wrapper, before anything is connected."""
    arguments: dict[str, Any] = {}

    class DatabaseWrapper(real):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            arguments.setdefault(self.alias, self.get_connection_params())

        def get_new_connection(self, params: dict[str, Any]) -> Any:
            return super().get_new_connection(arguments[self.alias])

    return DatabaseWrapper


@pytest.fixture(params=["mariadb", "postgres"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def nodes(kind: str, request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(f"{kind}_pair")


@pytest.fixture
def named(kind: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Any], str]]:
    """Give an engine's class a path to name it by; afterwards close what it has kept."""
    # Where django.contrib.postgres is, the alias that an engine sees is each peer's own.
    monkeypatch.delitem(sys.modules, "django.contrib.postgres.signals", raising=False)
    made: list[Any] = []

    def name(make: Callable[[Real], Any]) -> str:
        real = load_backend({"mariadb": MYSQL, "postgres": POSTGRESQL}[kind]).DatabaseWrapper
        wrapper = make(real)
        wrapper.__module__ = "shop.databases.base"
        made.append(wrapper)
        module = type(sys)("shop.databases.base")
        module.DatabaseWrapper = wrapper  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "shop.databases.base", module)
        return "shop.databases"

    yield name
    for wrapper in made:
        for kept in getattr(wrapper, "kept", {}).values():
            for connection in kept if isinstance(kept, list) else [kept]:
                connection.close()


def served_by(connection: Any) -> int:
    asks = "SELECT @@port" if connection.vendor == "mysql" else "SELECT inet_server_port()"
    with connection.cursor() as cursor:
        cursor.execute(asks)
        return int(cursor.fetchone()[0])


@pytest.mark.parametrize(
    "make", [keeps_connections, keeps_arguments, keeps_past_django, keeps_the_first_peer_s]
)
def test_is_never_taken_for_another_peer(make: Any, nodes: Any, named: Any) -> None:
    """No statement reaches a server that is not the peer's, and what is wrong is raised."""
    peers = [mysql_peer(node) for node in nodes]
    with engine(peers, PEER_ENGINE=named(make)) as connection:
        ports = {f"peer{n}": node.port for n, node in enumerate(nodes)}
        balancer = balancers["balanced"]
        errors = []
        for drained in ("peer1", "peer0", None):
            if drained is not None:
                balancer.drain(drained)
            try:
                assert served_by(connection) == ports[connection.peer.name]
            except ImproperlyConfigured as exc:
                errors.append(str(exc))
            connection.close()
            if drained is not None:
                balancer.undrain(drained)
        # Of the backend that hands out the first peer's it is known from the first connect on.
        assert len(errors) >= 2
        for word in ("'balanced'", "PEER_ENGINE", "peer0", "peer1", "shop.databases.base"):
            assert word in errors[0]
        assert {state.state for state in balancers["balanced"].snapshot()} == {"closed"}


@pytest.mark.parametrize("by_tunnel", [False, True])
def test_an_engine_that_keeps_nothing(
    nodes: Any, named: Any, fault_proxy: Callable[..., FaultProxy], by_tunnel: bool
) -> None:
    """Also by a tunnel: elsewhere than the settings say, each peer's to a place of its own."""
    ways = {node.port: (fault_proxy(node) if by_tunnel else node).port for node in nodes}

    def goes(real: Real) -> Any:
        class DatabaseWrapper(real):  # type: ignore[misc]
            def get_new_connection(self, params: dict[str, Any]) -> Any:
                return super().get_new_connection({**params, "port": ways[params["port"]]})

        return DatabaseWrapper

    peers = [mysql_peer(node) for node in nodes]
    with engine(peers, PEER_ENGINE=named(goes), STRATEGY="round_robin") as connection:
        seen = set()
        for _ in range(4):
            seen.add(served_by(connection))
            connection.close()
        assert seen == {node.port for node in nodes}


def test_two_peers_at_one_address(nodes: Any, named: Any) -> None:
    """A warning of the checks, and no error."""
    peers = [mysql_peer(nodes[0]), mysql_peer(nodes[0])]
    with engine(peers, PEER_ENGINE=named(keeps_connections), STRATEGY="round_robin") as connection:
        for _ in range(4):
            assert served_by(connection) == nodes[0].port
            connection.close()


def test_costs_nothing_with_django_s_own(nodes: Any, kind: str) -> None:
    path = {"mariadb": MYSQL, "postgres": POSTGRESQL}[kind]
    with engine([mysql_peer(nodes[0])], PEER_ENGINE=path):
        assert "OriginsMixin" not in [cls.__name__ for cls in type(connections["balanced"]).__mro__]
