"""Real servers for the tests, each in a temporary directory, on free ports, started when asked for.

A test that needs a server fails where the server is not installed, with a message that names the
Debian package: a skipped test would let a fault pass unseen.
"""

from __future__ import annotations

from typing import Protocol

DATABASE = "app"
USER = "app"
PASSWORD = "app-secret"
ADMIN = "admin"
ADMIN_PASSWORD = "admin-secret"


class Address(Protocol):
    """Something to connect to: any server here, and the proxies."""

    host: str
    port: int
