"""AsyncLoadBalancer with real drivers and servers: psycopg, asyncpg, aiomysql and asyncmy."""

from __future__ import annotations

import asyncio
import gc
import importlib
import inspect
from collections.abc import Callable
from typing import Any

import pytest

from django_proxysql import AsyncLoadBalancer, Fault, NoPeerAvailable
from django_proxysql.core import aio
from tests.servers import DATABASE, PASSWORD, USER, Address
from tests.servers.faultproxy import FaultProxy
from tests.test_aio_trials import others, until_true
from tests.test_balancer import InOrder

#: How a driver connects, the fixture of its servers, and what it calls the database.
DRIVERS = {
    "psycopg": ("AsyncConnection.connect", "postgres", "dbname"),
    "asyncpg": ("connect", "postgres", "database"),
    "aiomysql": ("connect", "mariadb", "db"),
    "asyncmy": ("connect", "mariadb", "db"),
}


class Site:
    """A balancer of one driver over two fault proxies to one server."""

    def __init__(self, driver: str, connect: Any, database: str, proxies: list[FaultProxy]) -> None:
        self.driver, self.connect_function, self.database = driver, connect, database
        self.proxies = proxies

    def balancer(self, **options: Any) -> AsyncLoadBalancer:
        options.setdefault("strategy", InOrder)
        user = {"user": USER, "password": PASSWORD, self.database: DATABASE}
        return AsyncLoadBalancer(
            {
                f"db{number}": {"host": proxy.host, "port": proxy.port, **user}
                for number, proxy in enumerate(self.proxies, 1)
            },
            self.connect_function,
            **options,
        )


@pytest.fixture(params=DRIVERS)
def site(request: pytest.FixtureRequest, fault_proxy: Callable[[Address], FaultProxy]) -> Site:
    path, server, database = DRIVERS[request.param]
    connect: Any = pytest.importorskip(request.param)
    for name in path.split("."):
        connect = getattr(connect, name)
    node = request.getfixturevalue(server)
    return Site(request.param, connect, database, [fault_proxy(node), fault_proxy(node)])


async def close(connection: Any) -> None:
    closed = connection.close()
    if inspect.isawaitable(closed):
        await closed


async def connected_to(db: AsyncLoadBalancer) -> str:
    """Return the name of the peer that one more connection leads to, and that it answers."""
    connection = await db.connect()
    try:
        assert await aio._rows(connection, "SELECT 42") == [(42,)]
        (name,) = (peer.name for peer in db.peers.values() if peer.connections)
        return name
    finally:
        await close(connection)
        del connection
        gc.collect()


def test_dead_hanging_and_drained_peers_are_passed_by(site: Site) -> None:
    db = site.balancer(connect_timeout=30, connect_deadline=60)
    hasty = site.balancer(connect_timeout=3)

    async def scene() -> None:
        assert await connected_to(db) == "db1"
        site.proxies[0].refuse()
        assert await connected_to(db) == "db2"
        assert db.peers["db1"].breaker.circuit.fault is Fault.UNREACHABLE
        site.proxies[0].forward()
        assert await db.try_out("db1", now=True)
        assert await connected_to(db) == "db1"
        # It lets clients in and never answers.
        site.proxies[0].accept_and_hang()
        assert await connected_to(hasty) == "db2"
        assert "no connection within 3 s" in hasty.peers["db1"].breaker.circuit.error
        site.proxies[0].forward()
        assert await hasty.try_out("db1", now=True)
        db.drain("db1")
        assert await connected_to(db) == "db2"
        site.proxies[1].refuse()
        with pytest.raises(NoPeerAvailable, match="drained"):
            await db.connect()

    asyncio.run(scene())


def test_wrong_password_everywhere_is_the_drivers_own_error(site: Site) -> None:
    db = site.balancer()
    for peer in db.peers.values():
        peer.config.params["password"] = "wrong"  # type: ignore[index]
    driver = importlib.import_module(site.driver)
    with pytest.raises(Exception, match=r"(?i)password|denied") as caught:
        asyncio.run(db.connect())
    assert not isinstance(caught.value, NoPeerAvailable)
    assert driver.__name__ in str(type(caught.value).__mro__) or "pymysql" in str(caught.type)
    assert db.peers["db1"].breaker.circuit.fault is Fault.REFUSED


def test_writable_is_asked_by_each_driver(site: Site) -> None:
    db = site.balancer(ready_check="writable")
    assert asyncio.run(connected_to(db)) == "db1"


@pytest.mark.parametrize("site", ["psycopg"], indirect=True)
def test_ours_leave_no_transaction_behind(site: Site) -> None:
    async def scene() -> None:
        connection = await site.balancer(ready_check="writable").connect()
        await connection.set_autocommit(True)
        await connection.close()

    asyncio.run(scene())


def test_cancelled_at_many_moments_it_leaves_no_socket(site: Site) -> None:
    db = site.balancer()

    async def scene() -> None:
        for turns in range(40):
            task = asyncio.ensure_future(db.connect())
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task])
            if not task.cancelled():
                await close(task.result())
            del task
        gc.collect()
        assert [peer.connections for peer in db.peers.values()] == [0, 0]
        assert [peer.connecting for peer in db.peers.values()] == [0, 0]

    asyncio.run(scene())
    for proxy in site.proxies:
        proxy.wait_until_idle()


def test_background_trial_is_a_task_of_the_idle_loop(site: Site) -> None:
    db = site.balancer(trials="background", check_interval=0.2)

    async def scene() -> None:
        site.proxies[0].refuse()
        assert await connected_to(db) == "db2"
        site.proxies[0].forward()
        await until_true(lambda: db.peers["db1"].breaker.is_available)
        await until_true(lambda: not others())

    asyncio.run(scene())
    for proxy in site.proxies:
        proxy.wait_until_idle()


def test_sqlalchemys_asynchronous_engine_fails_over(site: Site) -> None:
    asyncio_of = pytest.importorskip("sqlalchemy.ext.asyncio")
    import sqlalchemy

    family = "postgresql" if "pg" in site.driver else "mysql"
    db = site.balancer()
    url = f"{family}+{site.driver}://"

    async def scene(engine: Any) -> None:
        async def answer() -> Any:
            async with engine.connect() as connection:
                return (await connection.execute(sqlalchemy.text("SELECT 42"))).scalar()

        try:
            assert await answer() == 42
            site.proxies[0].refuse()
            await engine.dispose()
            assert await answer() == 42
            site.proxies[1].refuse()
            await engine.dispose()
            with pytest.raises(Exception, match="No peer of"):
                await answer()
        finally:
            await engine.dispose()
            site.proxies[0].forward()
            site.proxies[1].forward()
            for peer in db.peers.values():
                peer.breaker.close()

    asyncio.run(scene(db.sqlalchemy_engine(url)))
    asyncio.run(scene(asyncio_of.create_async_engine(url, async_creator=db.connect)))


def test_trials_that_no_connect_makes_know_what_sqlalchemys_url_says(site: Site) -> None:
    pytest.importorskip("sqlalchemy.ext.asyncio")
    peers = {f"db{n}": {"host": one.host, "port": one.port} for n, one in enumerate(site.proxies)}
    db = AsyncLoadBalancer(peers, site.connect_function)
    family = "postgresql" if "pg" in site.driver else "mysql"
    engine = db.sqlalchemy_engine(f"{family}+{site.driver}://{USER}:{PASSWORD}@/{DATABASE}")

    async def scene() -> bool:
        async with engine.connect():
            pass
        await engine.dispose()
        db.peers["db1"].breaker.open()
        return await db.try_out("db1", now=True)

    assert asyncio.run(scene())
