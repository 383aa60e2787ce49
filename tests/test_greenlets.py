"""gevent: circuits, counts and pins are greenlets' where they are threads' otherwise."""

from __future__ import annotations

import asyncio
import contextvars
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from django_proxysql import LoadBalancer

ROOT = Path(__file__).parent.parent
SCENES = [
    "struck_in_connect",
    "struck_in_a_trial",
    "tried_in_the_background",
    "counts_end_with_connections",
    "pinned",
    "mode_stays",
    "patched_late",
]


@pytest.mark.parametrize("scene", SCENES)
def test_under_gevent(scene: str) -> None:
    command = [sys.executable, "-m", "tests.greenlets", scene]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr


class TestPinnedTasks:
    """pinned() in asyncio's tasks, of which many share one thread."""

    @staticmethod
    def used(db: LoadBalancer) -> set[str]:
        return {db.connect(lambda attempt: attempt.peer.name) for _ in range(50)}

    def test_each_its_own(self) -> None:
        db = LoadBalancer({"db1": {}, "db2": {}})

        async def stay(name: str) -> set[str]:
            with db.pinned(db.peers[name]):
                await asyncio.sleep(0)
                seen = self.used(db)
                await asyncio.sleep(0)
                return seen | self.used(db)

        async def free() -> set[str]:
            await asyncio.sleep(0)
            return self.used(db)

        async def main() -> Any:
            return await asyncio.gather(stay("db1"), stay("db2"), free())

        assert asyncio.run(main()) == [{"db1"}, {"db2"}, {"db1", "db2"}]

    def test_in_the_threads_that_a_task_waits_for(self) -> None:
        sync = pytest.importorskip("asgiref.sync")
        db = LoadBalancer({"db1": {}, "db2": {}})

        async def main() -> Any:
            with db.pinned(db.peers["db1"]):
                there = await sync.sync_to_async(self.used, thread_sensitive=False)(db)
            return there, await sync.sync_to_async(self.used, thread_sensitive=False)(db)

        assert asyncio.run(main()) == ({"db1"}, {"db1", "db2"})

    def test_tasks_that_outlive_the_block(self) -> None:
        """A task that was begun in the block stays there for as long as the block lasts."""
        db = LoadBalancer({"db1": {}, "db2": {}})

        async def main() -> Any:
            over = asyncio.Event()

            async def outlive() -> set[str]:
                await over.wait()
                return self.used(db)

            with db.pinned(db.peers["db1"]):
                task = asyncio.ensure_future(outlive())
                await asyncio.sleep(0)
            over.set()
            return await task

        assert asyncio.run(main()) == {"db1", "db2"}

    def test_generator_that_ends_in_another_tasks_block_ends_its_own(self) -> None:
        """The garbage collector closes it, in whichever thread or task."""
        db = LoadBalancer({"db1": {}, "db2": {}})

        def stay() -> Iterator[None]:
            with db.pinned("db1"):
                yield

        abandoned = stay()
        contextvars.Context().run(next, abandoned)
        with db.pinned("db2"):
            abandoned.close()
            assert self.used(db) == {"db2"}
