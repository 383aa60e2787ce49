"""Clients that ask the site for pages over real sockets, and look at the answers."""

from __future__ import annotations

import json
import random
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPException

from .site import HOST

CLIENTS = 8

#: Seconds after which a client gives a page up: more than any connect() may take.
PATIENCE = 30


class Load:
    """What the clients did."""

    def __init__(self) -> None:
        self.requests = 0
        #: The requests that were not answered well, by what was wrong.
        self.errors: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._ended = threading.Event()

    @contextmanager
    def on(self, port: int) -> Iterator[None]:
        """Ask the site on this port while the block runs."""
        with ThreadPoolExecutor(CLIENTS, "client") as clients:
            try:
                for _ in range(CLIENTS):
                    clients.submit(self._client, port)
                yield
            finally:
                self._ended.set()

    def _client(self, port: int) -> None:
        while not self._ended.is_set():
            problem = _ask(port)
            with self._lock:
                self.requests += 1
                if problem:
                    self.errors[problem] += 1


def _ask(port: int) -> str:
    """Ask for one page; return what is wrong with the answer, or nothing."""
    from .shop import PRODUCTS, name_of

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
