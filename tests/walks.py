"""Show the way of a connect, and of a lost read, through the code: ``python -m tests.walks``.

Each line is a function of the package, in the order of the first call, with the file it is in.
Real drivers and real sockets: the server is tests.servers.scripted.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import django_proxysql

ROOT = Path(django_proxysql.__file__).parent


class Walk(NamedTuple):
    """What one call goes through: (file, function) in the order of the first calls."""

    steps: list[tuple[str, str]]
    calls: int

    @property
    def files(self) -> list[str]:
        return list(dict.fromkeys(file for file, _ in self.steps))


def walk(work: Callable[[], Any]) -> Walk:
    """Do ``work`` and return which functions of the package it went through."""
    steps: dict[tuple[str, str], None] = {}
    calls = 0

    def note(frame: FrameType, event: str, _: Any) -> None:
        nonlocal calls
        if event == "call" and frame.f_code.co_filename.startswith(str(ROOT)):
            calls += 1
            code = frame.f_code
            file = str(Path(code.co_filename).relative_to(ROOT))
            steps[file, getattr(code, "co_qualname", code.co_name)] = None

    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
    return Walk(list(steps), calls)


def walks() -> dict[str, Walk]:
    """Walk with mysqlclient over two scripted servers: a connect, a read, a lost read."""
    import django

    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "tests.django_settings")
    django.setup()

    from django.db import connections

    from tests.engine import MYSQL, engine
    from tests.servers.scripted import Client, Hangup, Rows, ScriptedServer

    class Server(ScriptedServer):
        hangs_up = False

        def answer(self, client: Client, statement: str) -> Rows | None:
            if self.hangs_up and "42" in statement:
                raise Hangup
            return super().answer(client, statement)

    with Server() as one, Server() as two:
        peers = [
            {"ENGINE": MYSQL, "NAME": "test", "USER": "u", "HOST": s.host, "PORT": s.port}
            for s in (one, two)
        ]
        with engine(peers, STRATEGY="round_robin") as connection:
            # What is imported and learned once is no part of the way.
            connection.ensure_connection()
            connection.close()
            connection.ensure_connection()
            connection.close()
            found = {"a connect": walk(connection.connect)}

            def read() -> None:
                with connections[connection.alias].cursor() as cursor:
                    cursor.execute("SELECT 42")
                    cursor.fetchall()

            read()
            found["a read"] = walk(read)
            (one if connection.peer.name == "peer0" else two).hangs_up = True
            found["a lost read"] = walk(read)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.walks", description=__doc__)
    parser.add_argument("--short", action="store_true", help="one line a walk: how far it goes")
    options = parser.parse_args()
    for name, one in walks().items():
        print(f"{name}: {len(one.files)} files, {len(one.steps)} functions, {one.calls} calls")
        for file, function in () if options.short else one.steps:
            print(f"    {file:32} {function}")


if __name__ == "__main__":
    main()
