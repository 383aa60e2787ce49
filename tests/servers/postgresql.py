"""PostgreSQL servers."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path
from typing import Any

from . import ADMIN, ADMIN_PASSWORD, DATABASE, PASSWORD, USER
from .database import DatabaseServer
from .ports import ServerError, find_program


class PostgreSQLNode(DatabaseServer):
    """One PostgreSQL server with DATABASE, the user USER, who owns it, and the superuser ADMIN.

    ``options`` are settings: ``["max_prepared_transactions=5"]``.
    """

    kind = template = "postgresql"
    account = "postgres"
    stop_signal = signal.SIGINT  # at SIGTERM it would wait until all clients have gone

    tls_options = ("ssl=on", "ssl_ca_file={0}", "ssl_cert_file={1}", "ssl_key_file={2}")

    def command(self) -> list[str]:
        settings = [
            f"listen_addresses={self.host}",
            f"port={self.port}",
            f"unix_socket_directories={self.directory}",
            # Not synchronous_commit=off: a SIGKILL would lose acknowledged writes. Without fsync it
            # loses none, for these are the kernel's by then.
            "fsync=off",
            "full_page_writes=off",
            "shared_buffers=32MB",
            "max_connections=100",
            "max_prepared_transactions=10",
            "max_wal_size=128MB",
            # Shared memory that a SIGKILL leaves behind goes with the data directory.
            "dynamic_shared_memory_type=mmap",
            "timezone=UTC",
            "log_timezone=UTC",
            *self.options,
        ]
        command = [postgresql_program("postgres"), "-D", str(self.datadir)]
        return command + [part for setting in settings for part in ("-c", setting)]

    def prepare(self) -> None:
        super().prepare()
        self.datadir.chmod(0o700)  # PostgreSQL insists

    def ready(self) -> bool:
        try:
            return super().ready() and self.sql("SELECT 1", timeout=5) == "1\n"
        except ServerError:
            return False

    def set_up(self) -> PostgreSQLNode:
        """Make the database and the users."""
        self.create_user(USER, PASSWORD, "CREATEDB")
        self.create_user(ADMIN, ADMIN_PASSWORD, "SUPERUSER")
        self.create_database(DATABASE, USER)
        return self

    def sql(self, statement: str, database: str = "postgres", timeout: float = 30.0) -> str:
        """Run statements, each in autocommit, as the superuser through the unix socket.

        Returns the rows, one a line, columns parted by tabs, without headings. Raises ServerError
        with the server's message, and if there is no answer within ``timeout`` seconds.
        """
        client = [
            postgresql_program("psql"),
            *["-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-U", "postgres"],
        ]
        where = ["-F", "\t", "-h", str(self.directory), "-p", str(self.port), "-d", database]
        return self.run([*client, *where], stdin=statement.encode(), timeout=timeout)

    def create_user(self, user: str, password: str, options: str = "") -> None:
        """Make a user who logs in with a password; ``options`` as in CREATE ROLE."""
        self.sql(f"CREATE ROLE {_name(user)} LOGIN {options} PASSWORD {_text(password)}")

    def create_database(self, name: str, owner: str) -> None:
        """Make an empty database, in the place of one that a failed test has left."""
        # Each is a transaction of its own.
        self.sql(f"DROP DATABASE IF EXISTS {_name(name)} WITH (FORCE)")
        self.sql(f"CREATE DATABASE {_name(name)} OWNER {_name(owner)}")

    def terminate_connections(self, user: str) -> int:
        """pg_terminate_backend for all connections of a user. Returns how many there were."""
        ended = self.sql(
            f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = {_text(user)}"
        )
        return ended.count("t")

    def set_global(self, setting: str) -> None:
        """ALTER SYSTEM SET ``setting`` (``name = value``) and reload, until the test's end."""
        self.sql(f"ALTER SYSTEM SET {setting}; SELECT pg_reload_conf()")

    def restore(self) -> None:
        super().restore()
        changed = self.datadir / "postgresql.auto.conf"
        if any(line and not line.startswith("#") for line in changed.read_text().splitlines()):
            self.sql("ALTER SYSTEM RESET ALL; SELECT pg_reload_conf()")

    def install(self, folder: Path) -> None:
        self.give(folder)
        command = [
            postgresql_program("initdb"),
            f"--pgdata={folder / 'data'}",
            *["--username=postgres", "--auth-local=trust", "--auth-host=scram-sha-256"],
            *["--encoding=UTF8", "--locale=C", "--no-sync", "--no-instructions"],
        ]
        # initdb refuses to run as root.
        who: dict[str, Any] = (
            {"user": self.run_as, "group": self.run_as, "extra_groups": []} if self.run_as else {}
        )
        self.run(command, cwd=folder, **who)


def postgresql_program(name: str) -> str:
    """The program of the newest PostgreSQL; Debian keeps them all off the PATH."""
    versions = sorted(
        Path("/usr/lib/postgresql").glob("*/bin"),
        key=lambda path: [int(part) for part in re.findall(r"\d+", path.parent.name)],
        reverse=True,
    )
    return find_program(name, package="postgresql", folders=[os.fspath(path) for path in versions])


def _name(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _text(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
