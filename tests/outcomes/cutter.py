"""A proxy that cuts connections at COMMIT: before the packet, in its middle, or after it."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
import threading
from typing import Any

from tests.servers import Address
from tests.servers.ports import HOST

#: What is in the packet of a transaction's token and COMMIT, and in that of a fence.
COMMIT, FENCE = b"; COMMIT", b"TRUE"
#: What is in the packet of a token that goes ahead, and how that of its COMMIT ends.
TOKEN, COMMIT_ALONE = b", FALSE, ", (b"COMMIT\0", b"\x03COMMIT")
#: Seconds between the packet and the cut; the server may answer meanwhile, and its answer is
#: dropped.
DELAYS = (0.0, 0.0003, 0.0006, 0.001, 0.002, 0.005)


class Cutter:
    """In front of ``target``. Its connections end at their first COMMIT, by FIN or RST.

    :param fences: how many of a hundred fences lose their connection as well.
    """

    def __init__(self, target: Address, seed: int, fences: int = 10) -> None:
        self.target = target
        self.host = HOST
        self.port = 0
        self.cuts = 0
        self.is_on = True
        self.delays = DELAYS
        self.seed = seed
        self._random = random.Random(seed)
        self._fences = fences
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> Cutter:
        self._thread.start()
        self._server = asyncio.run_coroutine_threadsafe(
            asyncio.start_server(self._serve, HOST, 0), self._loop
        ).result(10)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    async def _stop(self) -> None:
        self._server.close()
        serving = asyncio.all_tasks() - {asyncio.current_task()}
        for task in serving:
            task.cancel()
        await asyncio.gather(*serving, return_exceptions=True)

    async def _serve(self, client: Any, to_client: Any) -> None:
        try:
            server, to_server = await asyncio.open_connection(self.target.host, self.target.port)
        except OSError:
            to_client.transport.abort()
            return
        back = asyncio.ensure_future(self._pass_on(server, to_client))
        has_token = False
        try:
            while data := await client.read(65536):
                has_token |= TOKEN in data
                if self.is_on and self._strikes(data, has_token):
                    self.cuts += 1
                    back.cancel()
                    await self._cut(data, to_server)
                    break
                to_server.write(data)
        except OSError:
            pass
        back.cancel()
        for side in (to_server, to_client):
            self._end(side)

    def _strikes(self, data: bytes, has_token: bool) -> bool:
        if COMMIT in data or (has_token and data.endswith(COMMIT_ALONE)):
            return True
        return FENCE in data and self._random.randrange(100) < self._fences

    async def _cut(self, data: bytes, to_server: Any) -> None:
        """Have the server get nothing of the packet, a part, or all of it some time before."""
        where = self._random.choice(("before", "middle", *["after"] * 6))
        if where == "middle":
            to_server.write(data[: self._random.randrange(1, len(data))])
        elif where == "after":
            to_server.write(data)
            await asyncio.sleep(self._random.choice(self.delays))

    def _end(self, side: Any) -> None:
        if self._random.random() < 0.5:
            with contextlib.suppress(OSError, AttributeError):
                lingering = struct.pack("ii", 1, 0)
                side.get_extra_info("socket").setsockopt(
                    socket.SOL_SOCKET, socket.SO_LINGER, lingering
                )
            side.transport.abort()
        else:
            side.close()

    async def _pass_on(self, server: Any, to_client: Any) -> None:
        with contextlib.suppress(OSError):
            while data := await server.read(65536):
                to_client.write(data)
        self._end(to_client)
