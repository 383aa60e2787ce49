"""psycopg's pools: one a peer, whose emptiness says nothing about the peer."""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import django
import psycopg
import pytest
from django.db import OperationalError, transaction
from django.db.backends.signals import connection_created
from psycopg_pool import ConnectionPool, PoolTimeout

from django_proxysql import NoPeerAvailable
from django_proxysql.backends import pools, transactions
from django_proxysql.core.events import (
    CircuitOpened,
    Connected,
    ConnectFailed,
    ConnectionLost,
    ConnectionReplaced,
)
from django_proxysql.core.faults import Fault
from django_proxysql.registry import balancers
from tests.children import in_child
from tests.engine import POSTGRESQL, Clock, engine, nodb_cursor, postgres_peer
from tests.fakes import running, until
from tests.servers import DATABASE, PASSWORD, USER
from tests.servers.faultproxy import FaultProxy
from tests.servers.postgresql import PostgreSQLNode
from tests.site import until_seen
from tests.strikes import strikes

pytestmark = pytest.mark.skipif(
    django.VERSION < (5, 1), reason="Django's pools came with Django 5.1"
)

Pair = tuple[PostgreSQLNode, PostgreSQLNode]
Proxies = tuple[FaultProxy, FaultProxy]


def pooled(servers: Sequence[Any], pool: Any = None, own: Any = None, **settings: Any) -> Any:
    """A balancer whose connections come out of pools, its first peer before the others.

    :param own: what each peer has besides.
    """
    options = {"pool": pool or {"min_size": 1, "max_size": 2}}
    peers = [
        postgres_peer(one, **{"PRIORITY": priority, **(own or {})})
        for priority, one in enumerate(servers)
    ]
    return engine(peers, PEER_ENGINE=POSTGRESQL, OPTIONS=options, **settings)


def pool_of(connection: Any, peer: str = "peer0") -> ConnectionPool[Any]:
    """The one pool of a peer."""
    balancer = balancers[connection.alias]
    (known,) = (one for one in pools.pools_of(balancer)._pools if one.peer == peer)
    return known.pool  # type: ignore[no-any-return]


class Others:
    """Further connections to the same balancer, as other threads have them."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection
        self.made: list[Any] = []

    def connect(self) -> Any:
        wrapper = self._connection.copy()
        self.made.append(wrapper)
        wrapper.ensure_connection()
        return wrapper

    def try_to_connect(self) -> None:
        with contextlib.suppress(OperationalError):
            self.connect()

    def close(self) -> None:
        for wrapper in self.made:
            if wrapper.connection is not None:
                wrapper.inc_thread_sharing()
                wrapper.close()


Start = Callable[[Any], Others]


@pytest.fixture
def others() -> Iterator[Start]:
    with contextlib.ExitStack() as made:
        yield lambda connection: made.enter_context(contextlib.closing(Others(connection)))


def pid(connection: Any) -> int:
    return int(connection.connection.info.backend_pid)


def reconnect(connection: Any) -> None:
    connection.close()
    connection.ensure_connection()


def read(connection: Any) -> None:
    with connection.cursor() as cursor:
        cursor.execute("SELECT 1")


def asked_pid(connection: Any) -> int:
    """Return what the server says of it."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_backend_pid()")
        return int(cursor.fetchone()[0])


@pytest.fixture
def proxies(postgres: PostgreSQLNode, fault_proxy: Callable[..., FaultProxy]) -> Proxies:
    """Two ways to one server."""
    return fault_proxy(postgres), fault_proxy(postgres)


def die(proxy: FaultProxy) -> None:
    """End all of a peer's connections, and take no more."""
    proxy.refuse()
    proxy.drop_connections()


def listen(connection: Any) -> list[Any]:
    """What the balancer tells its listeners from now on."""
    events: list[Any] = []
    balancers[connection.alias].add_listener(events.append)
    return events


def of(kind: type, events: list[Any]) -> list[Any]:
    return [event for event in events if type(event) is kind]


def direct_connects() -> Any:
    """Counts the connections that are made past the pools."""
    return mock.patch.object(psycopg, "connect", wraps=psycopg.connect)


def until_filled(pool: ConnectionPool[Any], number: int) -> None:
    """Wait until so many connections lie in a pool."""
    until(lambda: pool.get_stats()["pool_available"] >= number)


def until_one_waits(connection: Any) -> None:
    """Wait until somebody waits for a connection of the first peer's pool."""
    until(lambda: pool_of(connection).get_stats().get("requests_waiting"))


def state(peer: str = "peer0") -> str:
    return str(balancers["balanced"].peers[peer].breaker.current_state)


def shorten(connection: Any, *peers: str) -> None:
    """Have pools that are at work waited for no longer than it takes."""
    for peer in peers:
        pool_of(connection, peer).timeout = 0.1


ONE = {"min_size": 1, "max_size": 1}


class TestApart:
    """Each peer has its own pool, and so has whatever else is asked for."""

    def test_peers(self, postgres_pair: Pair, others: Start) -> None:
        """What was closed is used again, on the peer where it was."""
        with pooled(postgres_pair, ONE, {"PRIORITY": 0}, STRATEGY="round_robin") as one:
            one.ensure_connection()
            two = others(one).connect()
            assert {one.peer.name, two.peer.name} == {"peer0", "peer1"}
            first = {wrapper.peer.name: pid(wrapper) for wrapper in (one, two)}
            for wrapper in (one, two):
                assert wrapper.pool is pool_of(one, wrapper.peer.name)
                node = postgres_pair[int(wrapper.peer.name[-1])]
                assert wrapper.connection.info.port == node.port
            for wrapper in (one, two):
                wrapper.close()
            for wrapper in (one, two):
                wrapper.ensure_connection()
            assert {wrapper.peer.name: pid(wrapper) for wrapper in (one, two)} == first

    def test_a_peers_own_option(self, proxies: Proxies) -> None:
        """One peer has a pool, the other has none."""
        peers = [postgres_peer(proxies[0], OPTIONS={"pool": ONE}), postgres_peer(proxies[1])]
        with engine(peers, PEER_ENGINE=POSTGRESQL, STRATEGY="round_robin") as connection:
            found = {}
            for _ in range(4):
                connection.ensure_connection()
                found[connection.peer.name] = connection.pool
                connection.close()
            assert found == {"peer0": pool_of(connection), "peer1": None}

    def test_balancers(self, postgres: PostgreSQLNode) -> None:
        """Two balancers over the same server."""
        with pooled([postgres]) as one, pooled([postgres], alias="second") as two:
            one.ensure_connection()
            two.ensure_connection()
            assert pool_of(one) is not pool_of(two)
            two.close_pool()
            assert not pool_of(one).closed

    def test_other_databases(self, postgres: PostgreSQLNode) -> None:
        """A changed NAME has a pool of its own, and no database in particular has none."""
        postgres.create_database("elsewhere", USER)
        with pooled([postgres]) as connection:
            connection.ensure_connection()
            first = connection.pool
            connection.close()
            tenant = connection.copy()
            tenant.settings_dict["NAME"] = "elsewhere"
            tenant.ensure_connection()
            assert tenant.connection.info.dbname == "elsewhere"
            assert tenant.pool is not first
            tenant.close()
            connection.ensure_connection()
            assert connection.connection.info.dbname == DATABASE
            assert connection.pool is first
            with nodb_cursor(connection) as cursor:
                assert cursor.db.pool is None
            connection.close()
            connection.close_pool()
            assert first.closed
            # Nothing is connected to it any more.
            postgres.sql("DROP DATABASE elsewhere")

    def test_close_pool(self, postgres_pair: Pair, others: Start) -> None:
        """Closes the pools of all peers; the next connection comes out of a new one."""
        with pooled(postgres_pair, ONE, {"PRIORITY": 0}, STRATEGY="round_robin") as connection:
            connection.ensure_connection()
            others(connection).connect()
            before = [pool_of(connection, name) for name in ("peer0", "peer1")]
            connection.close()
            connection.close_pool()
            assert [pool.closed for pool in before] == [True, True]
            connection.ensure_connection()
            assert connection.pool not in before
            # As Django does when the time zone changes.
            connection.ensure_timezone()
            reconnect(connection)

    def test_closed_for_good_just_now(self, postgres: PostgreSQLNode) -> None:
        """A pool that is closed between its finding and its use is no failure of the peer's.

        Before its version 3.3, psycopg_pool says it as it says what the server does.
        """
        with pooled([postgres], CONN_MAX_AGE=0) as connection:
            connection.ensure_connection()
            connection.close()
            first = pool_of(connection)
            first.close()

            def closed(*args: Any) -> None:
                raise psycopg.OperationalError("pool has already been opened/closed")

            with mock.patch.object(first, "_check_open", closed):
                connection.ensure_connection()
            assert pool_of(connection) is not first
            assert state() == "closed"

    def test_while_others_connect(self, postgres: PostgreSQLNode, others: Start) -> None:
        """close_pool() in the middle of other threads' connects: they get new ones."""
        with pooled([postgres]) as connection:
            connection.ensure_connection()
            events = listen(connection)
            ended = threading.Event()

            def work() -> None:
                wrapper = others(connection).connect()
                try:
                    while not ended.is_set():
                        wrapper.close()
                        read(wrapper)
                finally:
                    wrapper.close()

            connection.close()
            with running(work, work):
                for _ in range(20):
                    connection.close_pool()
                ended.set()
            assert of(ConnectFailed, events) == []

    def test_closed_as_somebody_queues_up(
        self, postgres: PostgreSQLNode, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """psycopg's pool does not tell who queues up just after it was closed: on to a new one."""
        with pooled([postgres]) as connection:
            events = listen(connection)
            closed_now: list[ConnectionPool[Any]] = []
            check: Any = ConnectionPool._check_open_getconn

            def closed_after(self: ConnectionPool[Any]) -> None:
                check(self)
                if not closed_now:
                    closed_now.append(self)
                    connection.close_pool()

            monkeypatch.setattr(ConnectionPool, "_check_open_getconn", closed_after)
            connection.ensure_connection()
            assert closed_now[0].closed
            assert connection.pool is not closed_now[0]
            assert of(ConnectFailed, events) == []

    def test_changing_password(self, postgres: PostgreSQLNode) -> None:
        """A callable PASSWORD is asked at each connect of a pool's, and makes no pool by itself."""
        given: list[str] = []

        def password() -> str:
            given.append(f"{len(given)}")
            return PASSWORD

        with pooled([postgres], own={"PASSWORD": password}) as connection:
            connection.ensure_connection()
            pool = connection.pool
            asked = len(given)
            connection.connection.close()
            reconnect(connection)
            assert connection.pool is pool
            # Once for the attempt, and once in a worker, for the lost connection's successor.
            until(lambda: len(given) >= asked + 2)


class TestEmpty:
    """A pool that has nothing to give says nothing about its peer."""

    def test_next_peer_at_once(self, proxies: Proxies, others: Start) -> None:
        """As long as another peer has one to spare, no request waits."""
        with pooled(proxies, ONE) as connection:
            connection.ensure_connection()
            events = listen(connection)
            other = others(connection).connect()
            assert (connection.peer.name, other.peer.name) == ("peer0", "peer1")
            # What would have been waited for is CONNECT_TIMEOUT's 5 seconds.
            assert [type(event) for event in events] == [Connected]
            assert events[0].seconds < 4
            assert state() == "closed"

    def test_waits_where_nothing_else_is_left(self, proxies: Proxies, others: Start) -> None:
        """Every pool is empty: the first that comes has what is given back."""
        with pooled(proxies, ONE) as connection:
            more = others(connection)
            held = [more.connect(), more.connect()]
            with running(more.connect):
                until_one_waits(connection)
                pid_of_first = pid(held[0])
                held[0].close()
            (third,) = [wrapper for wrapper in more.made if wrapper not in held]
            assert pid(third) == pid_of_first

    def test_all_of_them(self, proxies: Proxies, others: Start) -> None:
        """The wait ends, and the error says why; no circuit opens."""
        with pooled(proxies, ONE) as connection:
            more = others(connection)
            more.connect(), more.connect()
            shorten(connection, "peer0", "peer1")
            events = listen(connection)
            with pytest.raises(NoPeerAvailable, match="get a connection after") as raised:
                connection.ensure_connection()
            assert isinstance(raised.value, OperationalError)
            assert isinstance(raised.value.__cause__, PoolTimeout)
            failed = of(ConnectFailed, events)
            assert [(event.peer, event.fault) for event in failed] == [
                ("peer0", Fault.OVERLOADED),
                ("peer1", Fault.OVERLOADED),
            ]
            states = {state.state for state in balancers["balanced"].snapshot()}
            assert (states, of(CircuitOpened, events)) == ({"closed"}, [])

    def test_and_dead(self, proxies: Proxies, others: Start) -> None:
        """The peer of an empty pool is asked before it is taken to be well: here it is not."""
        with pooled(proxies[:1], ONE) as connection:
            others(connection).connect()
            shorten(connection, "peer0")
            events = listen(connection)
            die(proxies[0])
            with pytest.raises(NoPeerAvailable):
                connection.ensure_connection()
            assert [event.fault for event in of(ConnectFailed, events)] == [Fault.UNREACHABLE]
            assert len(of(CircuitOpened, events)) == 1

    def test_too_many_are_waiting(self, proxies: Proxies, others: Start) -> None:
        """max_waiting: refused by our own pool, which counts for nothing either."""
        with pooled(proxies[:1], {**ONE, "max_waiting": 1}) as connection:
            more = others(connection)
            holder = more.connect()
            with running(more.connect):
                until_one_waits(connection)
                events = listen(connection)
                with pytest.raises(NoPeerAvailable, match="1 requests waiting"):
                    connection.ensure_connection()
                assert [event.fault for event in of(ConnectFailed, events)] == [Fault.OVERLOADED]
                holder.close()

    def test_the_crowd_asks_once(self, proxies: Proxies, others: Start) -> None:
        """A peer without connections so far is asked by one thread, not by each."""
        with pooled(proxies[:1], {"min_size": 1, "max_size": 8}) as connection:
            more = others(connection)
            proxies[0].freeze()
            with direct_connects() as direct, running(*[more.connect] * 8):
                until(lambda: len(more.made) == 8 and direct.call_count)
                proxies[0].thaw()
            assert all(wrapper.connection is not None for wrapper in more.made)
            assert direct.call_count == 1


class TestDeath:
    """What lies in a pool may have died there."""

    def test_peer(self, proxies: Proxies) -> None:
        """Found before it is handed out; the peer is asked, and the next one is used."""
        with pooled(proxies) as connection:
            connection.ensure_connection()
            raw, pool = connection.connection, connection.pool
            connection.close()
            events = listen(connection)
            die(proxies[0])
            until_seen(raw)
            connection.ensure_connection()
            assert connection.peer.name == "peer1"
            assert [event.fault for event in of(ConnectFailed, events)] == [Fault.UNREACHABLE]
            assert [event.peer for event in of(CircuitOpened, events)] == ["peer0"]
            # Its workers do not go on knocking at a dead door.
            until(lambda: pool.closed)

    def test_connections(self, proxies: Proxies) -> None:
        """The server was restarted: all are thrown away, none is an error, nothing counts."""
        size = {"min_size": 4, "max_size": 4}
        with pooled(proxies[:1], size) as connection:
            connection.ensure_connection()
            pool = connection.pool
            connection.close()
            until_filled(pool, 4)
            raw = list(pool._pool)
            events = listen(connection)
            proxies[0].drop_connections()
            for one in raw:
                until_seen(one)
            for _ in range(5):
                read(connection)
                connection.close()
            assert of(ConnectFailed, events) == of(ConnectionLost, events) == []

    def test_health_checks(self, proxies: Proxies) -> None:
        """CONN_HEALTH_CHECKS: each is asked, whatever its socket looks like, and none is waited
        for."""
        size = {"min_size": 3, "max_size": 3}
        with (
            pooled(proxies[:1], size, CONN_HEALTH_CHECKS=True) as connection,
            mock.patch.object(
                ConnectionPool, "check_connection", wraps=ConnectionPool.check_connection
            ) as check,
        ):
            connection.ensure_connection()
            reconnect(connection)
            assert check.call_count == 2

    def test_after_the_trial(self, proxies: Proxies) -> None:
        """A peer that is back has a fresh pool; its trial asks it directly."""
        clock = Clock()
        with pooled(proxies, clock=clock) as connection:
            connection.ensure_connection()
            first = connection.pool
            die(proxies[0])
            until_seen(connection.connection)
            read(connection)
            assert connection.peer.name == "peer1"
            connection.close()
            clock.advance(2)
            connection.ensure_connection()
            connection.close()
            assert state() == "open"
            proxies[0].forward()
            clock.advance(40)
            with direct_connects() as direct:
                connection.ensure_connection()
            assert direct.call_count == 1
            assert connection.peer.name == "peer0"
            assert connection.pool is not first
            assert state() == "closed"

    def test_drained(self, proxies: Proxies) -> None:
        """A drained peer keeps no connections in a pool."""
        with pooled(proxies) as connection:
            connection.ensure_connection()
            pool = connection.pool
            balancers["balanced"].drain("peer0")
            connection.close()
            until(lambda: not proxies[0].established)
            assert pool.closed
            connection.ensure_connection()
            assert connection.peer.name == "peer1"

    def test_fail_max(self, proxies: Proxies) -> None:
        """Each failed attempt counts one, none waits, until there are enough."""
        with pooled(proxies, BREAKER={"fail_max": 3}) as connection:
            connection.ensure_connection()
            raw = connection.connection
            connection.close()
            die(proxies[0])
            until_seen(raw)
            events = listen(connection)
            for _ in range(4):
                connection.ensure_connection()
                assert connection.peer.name == "peer1"
                connection.close()
            assert [event.count for event in of(ConnectFailed, events)] == [1, 2, 3]
            assert all(event.seconds < 4 for event in of(ConnectFailed, events))
            assert len(of(CircuitOpened, events)) == 1

    def test_threads_that_wait_learn_of_the_death(self, proxies: Proxies, others: Start) -> None:
        """One thread asks the peer; when it is dead, those that wait for the pool do not go on."""
        settings = {"BREAKER": {"fail_max": 5}, "CONNECT_TIMEOUT": 30, "CONNECT_DEADLINE": 40}
        with pooled(proxies[:1], ONE, **settings) as connection, direct_connects() as direct:
            more, events = others(connection), listen(connection)
            proxies[0].accept_and_hang()
            with running(more.try_to_connect):
                until(lambda: direct.call_count)
                with running(more.try_to_connect):
                    until_one_waits(connection)
                    die(proxies[0])
            failed = of(ConnectFailed, events)
            assert [event.fault for event in failed] == 2 * [Fault.UNREACHABLE]
            assert all(event.seconds < 20 for event in failed)
            assert of(CircuitOpened, events) == []


class TestPlaces:
    """A place in a pool is never lost: one would be missing until the process ends."""

    def test_lost_connections(self, proxies: Proxies) -> None:
        """A connection that is lost and replaced gives its place back."""
        with pooled(proxies, ONE) as connection:
            events = listen(connection)
            for _ in range(4):
                connection.ensure_connection()
                name = connection.peer.name
                proxies[int(name[-1])].drop_connections()
                until_seen(connection.connection)
                with transaction.atomic("balanced"):
                    read(connection)
                connection.close()
            assert len(of(ConnectionReplaced, events)) == 4
            assert of(ConnectFailed, events) == []

    def test_found_dead_when_it_is_closed(self, proxies: Proxies) -> None:
        """The loss goes unnoticed, and the pool takes it back: the next request gets another."""
        with pooled(proxies[:1], ONE) as connection:
            for _ in range(3):
                connection.ensure_connection()
                raw = connection.connection
                proxies[0].drop_connections()
                until_seen(raw)
                reconnect(connection)
                assert connection.connection is not raw
                read(connection)
                connection.close()

    def test_failed_attempts(self, proxies: Proxies, receive: Any) -> None:
        """A receiver that raises, an interrupt in our own code: the place is free again."""
        with pooled(proxies[:1], ONE) as connection:
            failing: list[int] = []

            def fail(**kwargs: Any) -> None:
                if failing:
                    raise ZeroDivisionError

            receive(connection_created, fail)
            for _ in range(2):
                failing.append(1)
                with pytest.raises(ZeroDivisionError):
                    connection.ensure_connection()
                failing.clear()
                for what in (
                    "django_proxysql.core.sockets.keepalive",
                    "django_proxysql.core.sockets.watch",
                ):
                    interrupted = mock.patch(what, side_effect=KeyboardInterrupt)
                    with interrupted, pytest.raises(KeyboardInterrupt):
                        connection.ensure_connection()
                    assert connection.connection is None
            connection.ensure_connection()

    @pytest.mark.parametrize("in_block", [False, True])
    def test_lost_connection_has_the_pools_only_place(
        self, proxies: Proxies, in_block: bool
    ) -> None:
        """It is given back first: all may be lost at once, and none would come free."""
        with pooled(proxies[:1], ONE) as connection:
            connection.ensure_connection()
            raw = connection.connection
            pool, done = raw._pool, []
            proxies[0].drop_connections()
            until_seen(raw)
            block = transaction.atomic("balanced") if in_block else contextlib.nullcontext()
            run = pool.run_task
            pool.run_task = lambda task: run(done.append(type(task).__name__) or task)
            with block:
                read(connection)
            assert connection.connection is not raw
            connection.close()
            # One for one: what was given back twice would be replaced by two.
            assert done.count("AddConnection") == 1

    @pytest.mark.parametrize("what", ["connect", "replace"])
    def test_interrupted_at_any_line(self, postgres: PostgreSQLNode, what: str) -> None:
        """Ctrl-C, or a task's time limit: the next connect need not wait for the place."""
        files = [str(path) for path in Path(str(pools.__file__)).parent.glob("*.py")]
        # From Python 3.11 on nothing asks for signals there.
        safe = ("try:", "return connection", "if pool is not None:", "connection._pool = pool")
        lost: list[str] = []
        with pooled([postgres], {**ONE, "timeout": 5}) as connection:
            for strike in strikes(files, least=50):
                if what == "replace":
                    connection.ensure_connection()
                    connection._session.lose()
                    strike.hits(functools.partial(read, connection))
                else:
                    strike.hits(connection.ensure_connection)
                connection.close()
                if strike.where.endswith(safe):
                    connection.close_pool()
                try:
                    connection.ensure_connection()
                except OperationalError:
                    lost.append(strike.where)
                    connection.close_pool()
                connection.close()
        assert lost == []

    def test_not_ready(self, postgres_pair: Pair) -> None:
        """A standby that fails its READY_CHECK: not counted as busy, and no place is lost."""
        postgres_pair[0].set_global("default_transaction_read_only = on")
        breaker = {"fail_max": 5}
        with pooled(postgres_pair, ONE, READY_CHECK="writable", BREAKER=breaker) as connection:
            events = listen(connection)
            for _ in range(3):
                connection.ensure_connection()
                assert connection.peer.name == "peer1"
                connection.close()
            assert [event.fault for event in of(ConnectFailed, events)] == 3 * [Fault.NOT_READY]

    def test_what_must_not_be_used_again(self, proxies: Proxies) -> None:
        """A connection left in the middle of BEGIN is in no pool afterwards."""
        with pooled(proxies[:1], ONE) as connection:
            connection.ensure_connection()
            before = pid(connection)
            begin = mock.patch.object(transactions, "begin", side_effect=KeyboardInterrupt)
            with begin, pytest.raises(KeyboardInterrupt), transaction.atomic("balanced"):
                pass
            reconnect(connection)
            assert pid(connection) != before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="fork is Unix's")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
class TestFork:
    """A child never touches its parent's pools."""

    def test_child(self, proxies: Proxies, others: Start) -> None:
        """It connects on its own, closes what it inherited, and its parent notices nothing."""
        with pooled(proxies[:1], {"min_size": 2, "max_size": 2}) as connection:
            connection.ensure_connection()
            pool = connection.pool
            until_filled(pool, 1)
            mine = pid(connection)
            parents = {mine, *(one.info.backend_pid for one in pool._pool)}

            def work() -> int:
                reconnect(connection)
                its = asked_pid(connection)
                connection.close()
                connection.close_pool()
                return its

            # A lock that no thread of the child holds, and that stays locked there.
            with pool._lock:
                its = int(in_child(work))
            assert its not in parents
            assert asked_pid(connection) == mine
            other = others(connection).connect()
            assert pid(other) in parents

    def test_in_the_middle_of_a_transaction(self, proxies: Proxies) -> None:
        """What the child closes there is not its own, nor is the pool that it came out of."""
        with pooled(proxies[:1], ONE) as connection:
            with transaction.atomic("balanced"):
                mine, pool = asked_pid(connection), connection.pool

                def work() -> str:
                    connection.close()
                    return str(connection.connection is None)

                with pool._lock:
                    assert in_child(work) == "True"
                assert asked_pid(connection) == mine
            reconnect(connection)
            assert pid(connection) == mine


def test_no_pool_of_the_sort(postgres: PostgreSQLNode) -> None:
    """Without the option Django's methods do what they do: nothing."""
    with engine([postgres_peer(postgres)], PEER_ENGINE=POSTGRESQL) as connection:
        assert connection.pool is None
        connection.ensure_connection()
        assert connection.pool is None
        connection.close_pool()
        connection.close()


def test_unconnected(postgres: PostgreSQLNode) -> None:
    """As with Django's engine, the pool is there to be looked at before anything is connected."""
    with pooled([postgres]) as connection:
        pool = connection.pool
        assert pool.max_size == 2
        assert pool.name == "balanced/peer0"
        connection.ensure_connection()
        assert connection.pool is pool


class TestOwnCheck:
    """OPTIONS["pool"]["check"]: the site's own, of each connection that comes out of the pool."""

    def checked(self, nodes: Pair, check: Any, **settings: Any) -> Any:
        pool = {"min_size": 1, "max_size": 2, "timeout": 3, "check": check}
        return pooled(nodes, pool, **settings)

    @pytest.mark.parametrize("health_checks", [False, True])
    def test_is_called(self, postgres_pair: Pair, health_checks: bool) -> None:
        calls: list[Any] = []
        with self.checked(postgres_pair, calls.append, CONN_HEALTH_CHECKS=health_checks) as here:
            for number in range(1, 4):
                before = len(calls)
                here.ensure_connection()
                assert here.connection in calls[before:]
                assert here.peer.name == "peer0", number
                here.close()

    def test_a_pool_s_own(self, postgres_pair: Pair) -> None:
        """psycopg_pool's own function is one like any other."""
        with self.checked(postgres_pair, ConnectionPool.check_connection) as here:
            here.ensure_connection()
            reconnect(here)

    @pytest.mark.parametrize(("of", "then"), [("backend_pid", "peer0"), ("port", "peer1")])
    def test_that_fails(self, postgres_pair: Pair, of: str, then: str) -> None:
        """A connection that no longer passes is thrown away, and its peer gives another.

        What the check says of a connection that was made just now is the peer's answer.
        """
        bad: set[int] = set()

        def check(connection: Any) -> None:
            if getattr(connection.info, of) in bad:
                raise psycopg.OperationalError("this one is stale")

        with self.checked(postgres_pair, check) as here:
            here.ensure_connection()
            bad.add(getattr(here.connection.info, of))
            reconnect(here)
            assert getattr(here.connection.info, of) not in bad
            assert here.peer.name == then
            first = balancers[here.alias].snapshot()[0]
            opened = ("open", "this one is stale") if then == "peer1" else ("closed", "")
            assert (first.state, first.error) == opened

    @pytest.mark.parametrize(
        ("error", "raised", "circuits"),
        [
            (psycopg.OperationalError("no good"), NoPeerAvailable, "open"),
            # A mistake in it is the site's affair, and no peer is blamed.
            (KeyError("a mistake"), KeyError, "closed"),
        ],
    )
    def test_that_always_fails(
        self, postgres_pair: Pair, error: Exception, raised: type[Exception], circuits: str
    ) -> None:
        check = mock.Mock(side_effect=error)
        with self.checked(postgres_pair, check) as here:
            with pytest.raises(raised, match=error.args[0]):
                here.ensure_connection()
            assert {one.state for one in balancers[here.alias].snapshot()} == {circuits}
