"""Trials in the background under asyncio: tasks of a loop that connects, and of no other."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import threading
from collections.abc import Callable
from typing import Any

import pytest

from django_proxysql import AsyncLoadBalancer, LoadBalancer
from django_proxysql.core.tasks import TrialTasks
from tests.fakes import peers, refused_by_host, running, until
from tests.test_aio import World


def world_without_db1(**options: Any) -> World:
    """Return one whose first peer refuses connections."""
    world = World("db1", "db2", trials="background", **options)
    world.driver.down["db1"] = refused_by_host
    return world


def is_available(world: World, name: str = "db1") -> bool:
    return world.db.peers[name].breaker.is_available


async def until_true(condition: Callable[[], object], turns: int = 20_000) -> None:
    """Let the loop go on until the condition holds."""
    for _ in range(turns):
        if condition():
            return
        await asyncio.sleep(0.001)
    raise AssertionError("it never came true")


def others() -> set[Any]:
    """Return the loop's tasks but for the caller."""
    return asyncio.all_tasks() - {asyncio.current_task()}


def hangs_until(event: asyncio.Event) -> Callable[[], Any]:
    """Return what a server does that answers once the event is set."""

    async def wait() -> None:
        await event.wait()

    return wait


def cancel_others() -> None:
    """Cancel them, as at a loop's end; keep none."""
    for task in others():
        task.cancel()


def tasks_of(world: World) -> TrialTasks:
    """Return what makes the trials."""
    (found,) = (
        thing
        for thing in gc.get_objects()
        if isinstance(thing, TrialTasks) and thing._group is world.db.group
    )
    return found


async def due_soon(world: World) -> None:
    """Have db1's circuit open, its trial due, and the timer over."""
    assert (await world.db.connect()).host == "db2"
    world.clock.advance(31)
    world.db.group.schedule(news=True)


def test_idle_loop_makes_the_trials_that_are_due() -> None:
    """Nothing connects meanwhile. It runs in the loop's own thread, and leaves no task."""
    world = world_without_db1()
    threads: list[int] = []

    async def scene() -> None:
        connection = await world.db.connect()
        assert connection.host == "db2"
        # It waits by a timer: no task is there until the trial is due.
        await asyncio.sleep(0)
        assert others() == set()
        world.driver.down["db1"] = lambda: threads.append(threading.get_ident())
        world.clock.advance(31)
        # The loop is idle: only the timer can find that.
        await until_true(lambda: is_available(world))
        await until_true(lambda: not others())
        await connection.close()

    asyncio.run(scene())
    assert threads == [threading.get_ident()]
    world.assert_nothing_is_left()


def test_trial_that_fails_is_made_again() -> None:
    world = world_without_db1()

    async def scene() -> None:
        await due_soon(world)
        await until_true(lambda: world.driver.hosts.count("db1") == 2)
        # The clock goes on after it, or it would not be due again.
        await until_true(lambda: not others())
        assert not is_available(world)
        world.driver.down.clear()
        world.clock.advance(62)
        await until_true(lambda: is_available(world))

    asyncio.run(scene())


def test_trials_of_two_peers_go_on_at_once() -> None:
    world = World("db1", "db2", "db3", trials="background")

    async def scene() -> None:
        world.driver.down.update(db1=refused_by_host, db2=refused_by_host)
        assert (await world.db.connect()).host == "db3"
        go_on = asyncio.Event()
        world.driver.down.update(db1=hangs_until(go_on), db2=None)
        world.clock.advance(31)
        world.db.group.schedule(news=True)
        world.db.group.schedule(news=True)
        await asyncio.sleep(0)
        assert len(others()) == 2
        await until_true(lambda: is_available(world, "db2"))
        assert not is_available(world)
        assert len(others()) == 1
        go_on.set()
        await until_true(lambda: is_available(world))

    asyncio.run(scene())


@pytest.mark.parametrize("loop_goes_on", [False, True])
@pytest.mark.parametrize("error", [None, refused_by_host])
def test_cancelled_at_each_await_a_trial_leaves_nothing(error: Any, loop_goes_on: bool) -> None:
    """No permit, lease, socket or task; the next connect() has the trial made."""
    for turns in range(12):
        world = world_without_db1()

        async def scene(world: World = world, turns: int = turns) -> None:
            connection = await world.db.connect()
            world.driver.down["db1"] = error
            world.clock.advance(31)
            world.db.group.schedule(news=True)
            for _ in range(turns):
                await asyncio.sleep(0)
            cancel_others()
            await until_true(lambda: not others())
            await connection.close()
            del connection
            world.assert_nothing_is_left()
            if loop_goes_on:
                await after(world)

        async def after(world: World = world) -> None:
            # No news comes: a connect() finds it.
            world.driver.down.clear()
            world.clock.advance(31)
            await (await world.db.connect()).close()
            await until_true(lambda: is_available(world))

        asyncio.run(scene())
        if not loop_goes_on:
            asyncio.run(after())


def test_loop_that_is_closed_without_a_word_leaves_no_task(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """asyncio.run() cancels what is left; a loop that is closed by hand does not."""
    world = world_without_db1()
    loop = asyncio.new_event_loop()
    connection = loop.run_until_complete(world.db.connect())
    connection.terminate()
    loop.close()
    del loop, connection
    with caplog.at_level(logging.DEBUG, "asyncio"):
        gc.collect()
    assert not [
        record
        for record in caplog.records
        if record.levelno >= logging.WARNING and record.name == "asyncio"
    ]

    # The next loop takes over.
    async def scene() -> None:
        world.driver.down.clear()
        await due_soon(world)
        await until_true(lambda: is_available(world))

    asyncio.run(scene())


def test_loop_that_stops_in_the_middle_of_a_trial_keeps_no_lease() -> None:
    """It runs no longer, and was not closed: the next one that connects takes over."""
    # Its attempts are limited by the loop's clock, which goes on.
    world = world_without_db1(trial_timeout=15)
    loop = asyncio.new_event_loop()

    async def forever() -> None:
        await asyncio.Event().wait()

    async def begun() -> None:
        world.driver.down["db1"] = forever
        await due_soon(world)
        await until_true(lambda: world.db.peers["db1"].breaker.trial)

    world.driver.down["db1"] = refused_by_host
    loop.run_until_complete(world.db.connect())
    loop.run_until_complete(begun())
    world.driver.down.clear()

    async def scene() -> None:
        go_on = asyncio.Event()
        world.driver.down["db1"] = hangs_until(go_on)
        # The lease holds no longer than an attempt may take.
        world.clock.advance(31)
        assert (await world.db.connect()).host == "db2"
        await until_true(lambda: world.driver.hosts.count("db1") == 3)
        # What ends under the old loop does not concern the new one.
        await asyncio.get_running_loop().run_in_executor(None, end)
        assert tasks_of(world)._loop is asyncio.get_running_loop()
        go_on.set()
        await until_true(lambda: is_available(world))

    def end() -> None:
        for task in asyncio.all_tasks(loop):
            task.cancel()
            loop.run_until_complete(asyncio.wait([task]))
        loop.close()

    asyncio.run(scene())
    gc.collect()
    assert world.db.peers["db1"].breaker.trial is None


def test_circuit_opened_by_another_thread_wakes_the_loop() -> None:
    world = world_without_db1()
    sync = LoadBalancer.from_group(world.db.group, lambda **params: refuse(params["host"]))
    world.driver.down["db2"] = None

    def refuse(host: str) -> None:
        raise refused_by_host()

    async def scene() -> None:
        await world.db.connect()
        with pytest.raises(Exception, match="No peer"):
            await asyncio.get_running_loop().run_in_executor(None, sync.connect)
        assert not is_available(world, "db2")
        world.driver.down.clear()
        world.clock.advance(31)
        await until_true(lambda: is_available(world, "db1") and is_available(world, "db2"))

    asyncio.run(scene())


def test_without_a_loop_nothing_is_scheduled_and_requests_make_the_trials() -> None:
    """A synchronous face of the same group, where no loop runs."""
    db = AsyncLoadBalancer(peers("db1", "db2"), trials="background", strategy="round_robin")
    made: list[str] = []
    sync = LoadBalancer.from_group(db.group, lambda **params: made.append(params["host"]))
    sync.peers["db1"].breaker.open()
    sync.connect()
    assert made == ["db2"]


def test_pin_of_the_caller_is_not_the_trials() -> None:
    """A block that is to be pinned to what it connects to first is not pinned by a trial."""
    world = world_without_db1()

    async def scene() -> None:
        await world.db.connect()
        world.driver.down.clear()
        with world.db.pinned():
            world.clock.advance(31)
            world.db.group.schedule(news=True)
            await until_true(lambda: is_available(world))
            world.driver.down["db1"] = refused_by_host
            assert (await world.db.connect()).host == "db2"

    asyncio.run(scene())


def test_check_that_raises_is_logged_and_the_trial_comes_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    errors: list[BaseException] = [SystemExit(3), KeyError("check")]

    def check(connection: Any) -> None:
        if connection.host == "db1" and errors:
            raise errors.pop()

    world = world_without_db1(ready_check=check)

    async def scene() -> None:
        await due_soon(world)
        while not is_available(world):
            await asyncio.sleep(0)
            await until_true(lambda: not others())
            world.clock.advance(31)
            world.db.group.schedule(news=True)
        assert not errors

    async def first() -> None:
        assert (await world.db.connect()).host == "db2"

    asyncio.run(first())
    world.driver.down.clear()
    asyncio.run(scene())
    assert "The trial of default/db1 raised" in caplog.text


class Odd(BaseException):
    """No Exception, as gevent's and pytest's time-outs are none."""


@pytest.mark.parametrize("error", [OSError, SystemExit, Odd, KeyboardInterrupt])
def test_whatever_ends_a_trial_the_idle_loop_makes_the_next(error: type[BaseException]) -> None:
    """KeyboardInterrupt ends the loop once; what runs on it afterwards is not interrupted."""

    def check(connection: Any) -> None:
        if connection.host == "db1":
            raise error

    world = world_without_db1(ready_check=check)

    async def scene() -> None:
        await due_soon(world)
        world.driver.down.clear()
        await until_true(lambda: asked)
        await until_true(lambda: not others())

    async def goes_on() -> bool:
        await until_true(lambda: not tasks_of(world)._tasks)
        return tasks_of(world)._timer is not None

    asked: list[Any] = []
    world.db.add_listener(lambda event: asked.append(event) if getattr(event, "trial", 0) else 0)
    loop = asyncio.new_event_loop()
    try:
        with contextlib.suppress(KeyboardInterrupt):
            loop.run_until_complete(scene())
        assert asked
        assert loop.run_until_complete(goes_on())
    finally:
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()


def test_balancer_that_is_dropped_is_looked_after_no_more() -> None:
    async def scene() -> None:
        world = world_without_db1()
        await world.db.connect()
        world.clock.advance(31)
        await asyncio.sleep(0)
        found = [thing for thing in gc.get_objects() if isinstance(thing, TrialTasks)]
        assert found
        del world, found
        gc.collect()
        assert not [thing for thing in gc.get_objects() if isinstance(thing, TrialTasks)]
        await asyncio.sleep(0.01)

    gc.collect()
    asyncio.run(scene())


def test_in_a_child_the_loop_is_the_parents() -> None:
    world = world_without_db1()

    async def scene() -> None:
        await world.db.connect()
        tasks = tasks_of(world)
        assert tasks._loop is asyncio.get_running_loop()
        tasks.after_fork()
        assert tasks._loop is None
        await world.db.connect()
        assert tasks._loop is asyncio.get_running_loop()

    asyncio.run(scene())


def test_loops_in_several_threads_take_turns() -> None:
    world = world_without_db1()
    world.driver.down["db1"] = refused_by_host

    def loop() -> None:
        for _ in range(20):
            assert world.connect().host in ("db1", "db2")

    with running(*[loop] * 3):
        pass
    world.driver.down.clear()

    async def scene() -> None:
        await due_soon(world)
        await until_true(lambda: is_available(world))

    asyncio.run(scene())
    until(lambda: world.db.peers["db1"].breaker.trial is None)
