"""What AsyncLoadBalancer promises: a driver that fails as told, cancellation at each await."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextvars
import gc
import selectors
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import tenacity

from django_proxysql import AsyncLoadBalancer, Fault, LoadBalancer, NoPeerAvailable, NotReady
from django_proxysql.core import aio
from django_proxysql.core.balancer import Attempt
from django_proxysql.core.events import CircuitOpened, PeersExhausted
from django_proxysql.core.exceptions import ConfigError
from tests.fakes import Clock, carried_on_by_tenacity, peers, raised_by, refused_by_host, running
from tests.fakes import Driver as SyncDriver
from tests.test_balancer import SCRIPTS, play
from tests.test_balancer import World as SyncWorld


class Connection:
    """What the fake driver's connect() returns: a socket, as long as it is open."""

    def __init__(self, driver: Driver, host: str) -> None:
        self.host = host
        self._driver = driver
        driver.sockets.add(self)

    async def close(self) -> None:
        self._driver.sockets.discard(self)
        await asyncio.sleep(0)

    def terminate(self) -> None:
        self._driver.sockets.discard(self)

    async def fetch(self, statement: str) -> list[Any]:
        await asyncio.sleep(0)
        return [("OFF", 1)]


class Driver:
    """A driver for asyncio whose servers fail as told, after a few awaits."""

    def __init__(self) -> None:
        self.down: dict[str, Any] = {}
        self.calls: list[dict[str, Any]] = []
        #: The connections that are open.
        self.sockets: set[Connection] = set()

    async def connect(self, **params: Any) -> Connection:
        self.calls.append(params)
        connection = Connection(self, params["host"])
        try:
            await asyncio.sleep(0)
            error = self.down.get(params["host"])
            if callable(error):
                error = error()
            if isinstance(error, Awaitable):
                error = await error
            if error is not None:
                raise error
            await asyncio.sleep(0)
        except BaseException:
            connection.terminate()
            raise
        return connection

    @property
    def hosts(self) -> list[str]:
        return [call["host"] for call in self.calls]


@pytest.fixture(params=[True, False], ids=["", "before Python 3.11"])
def counting(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks count how often they were cancelled, or they do not."""
    if request.param and not aio._TASKS_COUNT:
        pytest.skip("tasks count from Python 3.11 on")
    monkeypatch.setattr(aio, "_TASKS_COUNT", request.param)


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """A loop's time, which goes on only while the loop has nothing to do: no machine is too slow.

    And it goes on at once, for as long as the loop would wait.
    """
    clock = Clock()

    class Selector(selectors.DefaultSelector):
        def select(self, timeout: float | None = None) -> Any:
            clock.advance(max(timeout or 0, 0))
            return super().select(timeout and 0)

    monkeypatch.setattr(selectors, "DefaultSelector", Selector)
    monkeypatch.setattr(asyncio.SelectorEventLoop, "time", lambda loop: clock.now)
    return clock


class World(SyncWorld):
    """A balancer under asyncio, its driver, its clock and what it emitted."""

    face, drivers = AsyncLoadBalancer, Driver

    def connect(self, **how: Any) -> Any:
        return asyncio.run(self.db.connect(**how))

    def assert_nothing_is_left(self) -> None:
        assert self.driver.sockets == set()
        for peer in self.db.peers.values():
            assert peer.breaker.trial is None
            assert peer.connecting == 0
        if any(peer.connections for peer in self.db.peers.values()):
            gc.collect()
        assert [peer.connections for peer in self.db.peers.values()] == [0] * len(self.db.peers)


@pytest.mark.parametrize("promise", SCRIPTS)
def test_which_peers_a_connect_tries(promise: str) -> None:
    """As without asyncio."""
    play(SCRIPTS[promise], World)


def test_connection_is_counted_as_long_as_it_is_kept() -> None:
    world = World("db1")
    connection = world.connect()
    assert world.db.peers["db1"].connections == 1
    connection.terminate()
    del connection
    world.assert_nothing_is_left()


def test_tenacity_carries_on_after_the_first_failure() -> None:
    assert carried_on_by_tenacity(World("db1", "db2", "db3")) == [False, True, True]


@pytest.mark.usefixtures("hasty")
def test_hanging_peer_is_cancelled_after_connect_timeout() -> None:
    world = World("db1", "db2", connect_timeout=7)
    world.driver.down["db1"] = lambda: asyncio.sleep(3600)
    assert world.connect().host == "db2"
    circuit = world.db.peers["db1"].breaker.circuit
    assert (circuit.state, circuit.fault) == ("open", Fault.UNREACHABLE)
    assert " 7 s" in circuit.error


def test_waits_for_another_tasks_trial_without_blocking_the_loop() -> None:
    world = World("db1")
    world.due("db1")

    async def scene() -> list[str]:
        go_on, ticks = asyncio.Event(), 0

        async def slowly() -> None:
            await go_on.wait()

        world.driver.down["db1"] = slowly
        both = [asyncio.ensure_future(world.db.connect()) for _ in range(2)]
        while len(world.db.peers["db1"].breaker.trial.bells if world.driver.calls else ()) < 1:  # type: ignore[union-attr]
            ticks += 1
            await asyncio.sleep(0)
        assert ticks > 0
        assert len(world.driver.calls) == 1
        go_on.set()
        return [connection.host for connection in await asyncio.gather(*both)]

    assert asyncio.run(scene()) == ["db1", "db1"]


def test_thread_and_task_wait_for_each_other_on_one_group() -> None:
    made: list[str] = []
    sync = LoadBalancer(peers("db1"), lambda **params: made.append(params["host"]))
    db = AsyncLoadBalancer.from_group(sync.group, Driver().connect)
    assert db.peers is sync.peers
    trial = None

    async def scene() -> Any:
        nonlocal trial
        breaker = sync.peers["db1"].breaker
        breaker.half_open()
        trial = breaker.acquire()
        waits = asyncio.ensure_future(db.connect())
        while not trial.lease.bells:  # type: ignore[union-attr]
            await asyncio.sleep(0)
        # Its end comes in another thread.
        threading.Thread(target=trial.succeeded).start()  # type: ignore[union-attr]
        return await waits

    assert asyncio.run(scene()).host == "db1"
    sync.peers["db1"].breaker.open()
    with pytest.raises(ConfigError, match="group is a dict"):
        AsyncLoadBalancer.from_group({})  # type: ignore[arg-type]


def test_several_loops_in_threads_share_a_group() -> None:
    world = World("db1", "db2")
    world.driver.down["db1"] = refused_by_host
    hosts: list[str] = []

    def loop() -> None:
        for _ in range(20):
            hosts.append(world.connect().host)

    with running(*[loop] * 3):
        pass
    assert hosts == ["db2"] * 60
    assert len(world.told(CircuitOpened)) == 1


# Cancellation


def ready(connection: Any) -> Awaitable[None]:
    """A READY_CHECK that is a coroutine function."""
    return asyncio.sleep(0)


def out(world: World, error: Any = None) -> None:
    """Have the first peer's trial due."""
    world.due("db1")
    world.driver.down["db1"] = error


SCENES: dict[str, Callable[[World], None]] = {
    "first peer works": lambda world: None,
    "first peer fails": lambda world: world.driver.down.update(db1=refused_by_host),
    "trial": out,
    "trial that fails": lambda world: out(world, refused_by_host),
    "all fail": lambda world: world.driver.down.update(db1=refused_by_host, db2=refused_by_host),
    "not ready": lambda world: setattr(world.db.group, "ready_check", not_ready),
    "waits for a trial": lambda world: hold_the_trials(world),
}


async def not_ready(connection: Any) -> None:
    await asyncio.sleep(0)
    raise NotReady("it is not")


def hold_the_trials(world: World) -> None:
    world.due("db1", "db2")
    world.held = [peer.breaker.acquire() for peer in world.db.peers.values()]  # type: ignore[attr-defined]


@pytest.mark.parametrize("scene", SCENES)
@pytest.mark.parametrize("wait_for_peer", [0, 60])
def test_cancelled_at_each_await_it_leaves_nothing(scene: str, wait_for_peer: float) -> None:
    """No permit, no lease, no count and no socket; and the next connect() is none the worse."""
    awaits, was_cancelled = 0, True
    while was_cancelled and awaits < 30:
        world = World("db1", "db2", ready_check=ready, wait_for_peer=wait_for_peer)
        SCENES[scene](world)
        was_cancelled = asyncio.run(cancelled_at(awaits, world.db.connect()))
        for permit in getattr(world, "held", ()):
            assert permit.lease.bells == []
            permit.released()
        if was_cancelled:
            world.assert_nothing_is_left()
            assert not world.told(PeersExhausted)
        awaits += 1
        world.driver.down.clear()
        world.db.group.ready_check = None
        world.clock.advance(31)
        assert world.connect().host in ("db1", "db2")
    assert awaits > 3


async def cancelled_at(awaits: int, work: Any) -> bool:
    """Run a coroutine, cancel it at its await of that number; return whether it came so far."""
    task = asyncio.ensure_future(work)
    for _ in range(awaits):
        # A task goes one await further in each turn of the loop.
        await asyncio.sleep(0)
        if task.done():
            break
    if not task.done():
        task.cancel()
    try:
        await task
    except asyncio.CancelledError:
        return True
    except Exception:
        return False
    return False


def test_thousand_cancelled_connects_leave_nothing() -> None:
    """``python -m tests.benchmarks.asynchronous 10000`` does so with ten thousand."""
    from tests.benchmarks.asynchronous import cancelled

    assert cancelled(1000) == (0, 0, 0)


@pytest.mark.usefixtures("counting")
@pytest.mark.parametrize("first", ["caller", "limit"])
def test_cancelled_while_the_driver_ends_an_attempt_it_is_cancelled(
    first: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever of the caller and the limit comes first; a driver may take its time to end."""
    limits: list[Any] = []
    enter = aio._Limit.__enter__
    monkeypatch.setattr(aio._Limit, "__enter__", lambda self: limits.append(self) or enter(self))
    steps: list[str] = []
    goes_on: list[bool] = []

    async def hang() -> None:
        try:
            steps.append("hangs")
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            steps.append("ends")
            while not goes_on:
                await asyncio.sleep(0)
            raise

    async def step(name: str) -> None:
        while steps[-1:] != [name]:
            await asyncio.sleep(0)

    async def scene() -> None:
        task = asyncio.ensure_future(world.db.connect())
        await step("hangs")
        cancels = [task.cancel, limits[0]._cancel]
        for cancel in cancels if first == "caller" else reversed(cancels):
            cancel()
            await step("ends")
        with pytest.raises(asyncio.CancelledError):
            await task
        # The next one is limited as ever.
        task = asyncio.ensure_future(world.db.connect())
        await step("hangs")
        limits[-1]._cancel()
        await step("ends")
        goes_on.append(True)
        connection = await task
        assert connection.host == "db2"
        connection.terminate()

    world = World("db1", "db2")
    world.driver.down["db1"] = hang
    asyncio.run(scene())
    limits.clear()
    world.assert_nothing_is_left()


# What is asked, given and waited for


def test_ready_check_may_be_ours_a_function_or_a_coroutine_function() -> None:
    for check in (ready, lambda connection: None, "writable"):
        world = World("db1", ready_check=check)
        assert world.connect().host == "db1"
    world = World("db1", "db2", ready_check=not_ready)
    with pytest.raises(NoPeerAvailable, match="it is not"):
        world.connect()
    assert world.driver.sockets == set()


def test_password_may_be_a_coroutine_function() -> None:
    async def token() -> str:
        await asyncio.sleep(0)
        return "fresh"

    driver = Driver()
    db = AsyncLoadBalancer({"db1": {"host": "db1", "password": token}}, driver.connect)
    asyncio.run(db.connect())
    assert driver.calls[0]["password"] == "fresh"


@pytest.mark.usefixtures("hasty", "counting")
@pytest.mark.parametrize("end", ["connects", "is cancelled", "takes too long"])
def test_password_may_come_over_another_balancers_connection(end: str) -> None:
    """Each of the two connects has its own limit, in one task."""
    vault, driver = Driver(), Driver()
    secrets = AsyncLoadBalancer({"vault": {"host": "vault"}}, vault.connect, connect_timeout=10)

    async def password() -> str:
        await (await secrets.connect()).close()
        return "fresh"

    db = AsyncLoadBalancer(peers("db1", password=password), driver.connect, connect_timeout=5)

    async def scene() -> None:
        task = asyncio.ensure_future(db.connect())
        if end == "is cancelled":
            while not vault.calls:
                await asyncio.sleep(0)
            task.cancel()
        connection = await task
        assert task.cancel.__self__ is task
        connection.terminate()

    if end != "connects":
        vault.down["vault"] = lambda: asyncio.sleep(3600)
    errors = {"is cancelled": asyncio.CancelledError, "takes too long": NoPeerAvailable}
    assert type(raised_by(lambda: asyncio.run(scene()))) is errors.get(end, type(None))
    assert [call["password"] for call in driver.calls] == ["fresh"] * (end == "connects")
    assert vault.sockets == driver.sockets == set()


@pytest.mark.parametrize("is_coroutine", [True, False])
def test_wait_for_peer_looks_again_by_tenacitys_objects(is_coroutine: bool) -> None:
    slept: list[float] = []

    def sleep(seconds: float) -> Awaitable[None] | None:
        slept.append(seconds)
        world.clock.advance(31)
        world.driver.down.clear()
        return asyncio.sleep(0) if is_coroutine else None

    world = World("db1", stop=tenacity.stop_after_attempt(3), wait=lambda state: 7, sleep=sleep)
    world.driver.down["db1"] = refused_by_host
    assert world.connect().host == "db1"
    assert slept == [7]


def test_a_wait_in_vain_is_one_exhaustion() -> None:
    world = World("db1", stop=tenacity.stop_after_attempt(1))
    world.driver.down["db1"] = refused_by_host
    with pytest.raises(NoPeerAvailable):
        world.connect()
    assert len(world.told(PeersExhausted)) == 1


def test_try_out_makes_the_trial_and_keeps_no_connection() -> None:
    world = World("db1")
    world.open("db1")
    world.driver.down["db1"] = refused_by_host
    assert asyncio.run(world.db.try_out("db1", now=True)) is False
    world.driver.down.clear()
    assert asyncio.run(world.db.try_out("db1", now=True)) is True
    assert world.db.peers["db1"].breaker.current_state == "closed"
    assert world.driver.sockets == set()


def test_pinned_holds_for_the_task() -> None:
    world = World("db1", "db2", strategy="round_robin")

    async def scene() -> list[str]:
        with world.db.pinned("db2"):
            return [(await world.db.connect()).host for _ in range(4)]

    assert asyncio.run(scene()) == ["db2"] * 4


def test_connects_of_one_pinned_block_at_once_come_to_one_peer() -> None:
    world = World("db1", "db2", "db3", strategy="round_robin")

    async def scene() -> None:
        with world.db.pinned():
            made = await asyncio.gather(*(world.db.connect() for _ in range(3)))
        assert len({one.host for one in made}) == 1
        assert world.driver.sockets == set(made)

    asyncio.run(scene())
    assert sum(peer.connections for peer in world.db.peers.values()) <= 3
    assert world.states() == "closed closed closed"


@pytest.mark.usefixtures("hasty")
def test_open_one_gets_the_attempt_and_is_limited() -> None:
    world = World("db1", "db2", connect_timeout=7)

    async def open_one(attempt: Attempt) -> str:
        if attempt.peer.name == "db1":
            await asyncio.sleep(3600)
        return attempt.peer.name

    assert world.connect(open_one=open_one) == "db2"
    with pytest.raises(ConfigError, match="open_one is a int"):
        world.connect(open_one=3)


class Sharing:
    """What the group knows of other processes: nothing; the gate of a breaker speaks for them."""

    def start(self) -> None:
        pass

    def has_news(self) -> None:
        pass


def shared(*names: str, gate: Callable[[bool], float], **options: Any) -> World:
    """Return a world whose first peer's trial is due, and asks ``gate`` first."""
    world = World(*names, **options)
    world.due("db1")
    world.db.group.sharing = Sharing()  # type: ignore[assignment]
    world.db.peers["db1"].breaker.gate = gate
    return world


def test_trial_that_asks_other_processes_asks_in_a_thread() -> None:
    """Redis may take 50 ms to answer, and the loop goes on. A cancelled connect keeps no permit."""
    asked, go_on = threading.Event(), threading.Event()
    threads: list[int] = []

    def gate(by_hand: bool) -> float:
        threads.append(threading.get_ident())
        asked.set()
        assert go_on.wait(60)
        return 0.0

    world = shared("db1", "db2", gate=gate)

    async def scene() -> None:
        task = asyncio.ensure_future(world.db.connect())
        while not asked.is_set():
            await asyncio.sleep(0.001)
        # One asks; the others pass the peer by meanwhile.
        assert (await world.db.connect()).host == "db2"
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        go_on.set()

    asyncio.run(scene())
    assert len(threads) == 1
    assert threads != [threading.get_ident()]
    gc.collect()
    assert world.db.peers["db1"].breaker.trial is None
    assert world.db.peers["db1"].connecting == 0
    world.clock.advance(31)
    assert world.connect().host == "db1"


@pytest.mark.parametrize("held_back", [0.0, 5.0])
def test_trial_that_asks_other_processes_waits_for_no_thread_of_the_loops(held_back: float) -> None:
    """The executor's threads wait for this very connect(). Strategies and listeners run here."""
    here: list[Any] = []
    request: contextvars.ContextVar[str] = contextvars.ContextVar("request", default="")

    class Noting:
        def order(self, peers: Any) -> Any:
            here.append((threading.get_ident(), request.get()))
            return peers

    world = shared("db1", "db2", "db3", gate=lambda by_hand: held_back, strategy=Noting)
    world.db.add_listener(lambda event: here.append((threading.get_ident(), request.get())))
    world.driver.down["db1"] = refused_by_host

    async def connect() -> str:
        request.set("one")
        return str((await world.db.connect()).host)

    async def scene() -> list[str]:
        loop = asyncio.get_running_loop()
        loop.set_default_executor(concurrent.futures.ThreadPoolExecutor(2))

        def blocking() -> str:
            return asyncio.run_coroutine_threadsafe(connect(), loop).result(20)

        return await asyncio.gather(*(loop.run_in_executor(None, blocking) for _ in range(2)))

    assert set(asyncio.run(scene())) <= {"db2", "db3"}
    assert set(here) == {(threading.get_ident(), "one")}
    circuit = world.db.peers["db1"].breaker.circuit
    assert circuit.due == world.clock.now + (held_back or 30)


def test_answer_whose_bell_does_not_ring_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """An asynchronous exception may end the loop's callback that rings it."""
    monkeypatch.setattr(aio, "LOOK_AGAIN", 0.01)
    monkeypatch.setattr(aio._Bell, "_ring", lambda self: None)
    world = shared("db1", "db2", gate=lambda by_hand: 0.0)
    assert world.connect().host == "db1"


def test_trial_is_made_unasked_where_no_thread_can_be_started(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def no_thread(*_: Any) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("_thread.start_new_thread", no_thread)
    world = shared("db1", "db2", gate=lambda by_hand: 5.0)
    assert world.connect().host == "db1"


def test_bell_of_a_closed_loop_wakes_and_harms_no_task() -> None:
    async def bell() -> Any:
        return aio._Bell()

    with pytest.raises(RuntimeError):
        asyncio.run(bell()).release()


def test_connect_or_check_of_the_wrong_kind_is_an_error() -> None:
    driver = Driver()
    with pytest.raises(ConfigError, match=r"coroutine function.*Use AsyncLoadBalancer"):
        LoadBalancer(peers("db1"), driver.connect).connect()
    with pytest.raises(ConfigError, match="READY_CHECK is a coroutine function"):
        LoadBalancer(peers("db1"), SyncDriver().connect, ready_check=not_ready).connect()
    sync = SyncDriver()
    with pytest.raises(ConfigError, match=r"no coroutine function.*Use LoadBalancer"):
        asyncio.run(AsyncLoadBalancer(peers("db1"), sync.connect).connect())
    assert [connection.closed for connection in sync.made] == [True]
