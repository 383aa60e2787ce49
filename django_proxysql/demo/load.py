"""Clients that ask the site for pages over real sockets, and look at the answers."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPException

from .screen import Tally
from .site import HOST, PRODUCTS, name_of

CLIENTS = 8

#: Seconds after which a client gives a page up: more than any connect() may take.
PATIENCE = 30


@contextmanager
def asking(port: int, tally: Tally) -> Iterator[None]:
    """Have the clients ask the site on this port while the block runs."""
    ended = threading.Event()

    def client() -> None:
        while not ended.is_set():
            tally.answered(_ask(port))

    with ThreadPoolExecutor(CLIENTS, "client") as clients:
        try:
            for _ in range(CLIENTS):
                clients.submit(client)
            yield
        finally:
            ended.set()


def _ask(port: int) -> str:
    """Ask for one page; return what is wrong with the answer, or nothing."""
    number = random.randrange(PRODUCTS)
    client = HTTPConnection(HOST, port, timeout=PATIENCE)
    try:
        client.request("GET", f"/products/{number}/")
        answer = client.getresponse()
        body = answer.read()
        if answer.status != 200:
            return f"HTTP {answer.status} {answer.reason}"
        name = json.loads(body)["name"]
        return "" if name == name_of(number) else f"not what was asked for: {name!r}"
    except (OSError, HTTPException, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        client.close()
