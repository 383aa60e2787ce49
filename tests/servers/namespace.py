"""A host that can vanish: a network namespace, joined to this host by a pair of virtual cards."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

#: Runs in the namespace: takes connections there and passes them on to a unix socket, which is
#: reached from every namespace.
_FORWARDER = """
import asyncio, sys

async def copy(reader, writer):
    try:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    except OSError:
        pass
    finally:
        writer.close()

async def serve(reader, writer):
    there = await asyncio.open_unix_connection(sys.argv[1])
    await asyncio.gather(copy(reader, there[1]), copy(there[0], writer))

async def main():
    server = await asyncio.start_server(serve, sys.argv[2], 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()

asyncio.run(main())
"""


class Host:
    """A host of its own, at which a server's unix socket is reached by TCP."""

    def __init__(self, name: str, address: str, port: int) -> None:
        self.name = name
        self.host = address
        self.port = port

    def vanish(self) -> None:
        """From now on it is silent: what is sent to it is lost."""
        ip("-n", self.name, "link", "set", "there", "down")

    def come_back(self) -> None:
        ip("-n", self.name, "link", "set", "there", "up")


def why_not() -> str:
    """Why there can be no such host on this machine; empty if there can."""
    if not sys.platform.startswith("linux"):
        return "network namespaces are Linux's"
    if shutil.which("ip") is None:
        return "there is no ip: apt-get install iproute2"
    name = f"proxysql-try-{os.getpid()}"
    try:
        ip("netns", "add", name)
    except subprocess.CalledProcessError as error:
        return f"no network namespace can be made here (as root?): {error.stderr.strip()}"
    try:
        # Each in it: another process may try at this moment.
        card = ("there", "netns", name)
        ip("link", "add", "here", "netns", name, "type", "veth", "peer", "name", *card)
        # In a chroot a namespace can be made, and not entered.
        ip("-n", name, "link", "show")
    except subprocess.CalledProcessError as error:
        return f"no network cards can be made, or reached, here: {error.stderr.strip()}"
    finally:
        ip("netns", "delete", name)
    return ""


@contextlib.contextmanager
def host_for(unix_socket: str) -> Iterator[Host]:
    """Make a host that passes connections on to a unix socket."""
    number = random.randrange(2**15)
    name, card = f"proxysql-{os.getpid()}-{number}", f"psql{number}"
    # Addresses that are for tests of networks, RFC 2544.
    network = f"198.{18 + (number >> 14)}.{number >> 6 & 255}."
    mine, its = (f"{network}{(number & 63) * 4 + n}" for n in (1, 2))
    with contextlib.ExitStack() as stack:
        ip("netns", "add", name)
        # The cards go with it.
        stack.callback(ip, "netns", "delete", name)
        ip("link", "add", card, "type", "veth", "peer", "name", "there", "netns", name)
        ip("address", "add", f"{mine}/30", "dev", card)
        ip("link", "set", card, "up")
        ip("-n", name, "address", "add", f"{its}/30", "dev", "there")
        ip("-n", name, "link", "set", "there", "up")
        forwarder = subprocess.Popen(
            ["ip", "netns", "exec", name, sys.executable, "-c", _FORWARDER, unix_socket, its],
            stdout=subprocess.PIPE,
            text=True,
        )
        stack.callback(_end, forwarder)
        yield Host(name, its, int(forwarder.stdout.readline()))


def _end(process: subprocess.Popen[Any]) -> None:
    process.kill()
    process.wait()
    process.stdout.close()


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, timeout=30)
