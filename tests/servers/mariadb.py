"""MariaDB servers in a temporary directory, which can be restored to what they were."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import pymysql
from pymysql.constants import CLIENT

from . import ADMIN, ADMIN_PASSWORD, DATABASE, PASSWORD, USER
from .database import DatabaseServer
from .ports import MissingProgram, ServerError, find_program

# All that an application's user needs, test databases included, and none of what would make it an
# administrator: those get the one connection above max_connections, and write to read-only servers.
APPLICATION_RIGHTS = (
    "SELECT, INSERT, UPDATE, DELETE, CREATE, DROP, REFERENCES, INDEX, ALTER, LOCK TABLES, "
    "CREATE TEMPORARY TABLES, CREATE VIEW, SHOW VIEW, CREATE ROUTINE, ALTER ROUTINE, EXECUTE, "
    "EVENT, TRIGGER, PROCESS, SHOW DATABASES ON *.*"
)


class MariaDBNode(DatabaseServer):
    """One MariaDB server."""

    kind = template = "mariadb"
    account = "mysql"
    charset: ClassVar[str] = "utf8mb4"
    tls_options = ("--ssl-ca={0}", "--ssl-cert={1}", "--ssl-key={2}")

    @property
    def socket(self) -> Path:
        return self.directory / "s"

    def command(self) -> list[str]:
        return [
            find_program("mariadbd", "mysqld", package="mariadb-server"),
            "--no-defaults",
            f"--datadir={self.datadir}",
            f"--tmpdir={self.directory}",
            f"--socket={self.socket}",
            f"--pid-file={self.directory / 'pid'}",
            f"--port={self.port}",
            f"--bind-address={self.host}",
            "--skip-name-resolve",
            f"--character-set-server={self.charset}",
            f"--collation-server={self.charset}_general_ci",
            # 1 waits for the disk at each commit; 0 loses acknowledged writes at a SIGKILL.
            "--innodb-flush-log-at-trx-commit=2",
            "--innodb-buffer-pool-size=64M",
            "--innodb-buffer-pool-dump-at-shutdown=OFF",
            "--innodb-buffer-pool-load-at-startup=OFF",
            "--innodb-log-file-size=8M",
            "--innodb-fast-shutdown=1",
            "--performance-schema=OFF",
            "--max-connections=300",
            *self.options,
        ]

    def install(self, folder: Path) -> None:
        _install(folder)

    def ready(self) -> bool:
        # Not by connecting to the port, which the server would log as an aborted connection: it
        # opens the port first and the socket next.
        if not self.socket.exists():
            return False
        try:
            return self.sql("SELECT 1", timeout=5) == "1\n"
        except ServerError:
            return False

    def sql(self, statement: str, database: str = "", timeout: float = 30.0) -> str:
        """Run statements as the server's root through its unix socket.

        Returns the rows, one a line, columns parted by tabs, without headings. Raises ServerError
        with the server's message, and if there is no answer within ``timeout`` seconds.
        """
        # In this process: a client of its own for each would take longer than most statements.
        try:
            with socket.socket(socket.AF_UNIX) as client:
                client.settimeout(timeout)
                client.connect(str(self.socket))
                # Not by pymysql.connect(), in whose place a test may have put something.
                connection = pymysql.connections.Connection(
                    user="root",
                    database=database or None,
                    read_timeout=timeout,
                    client_flag=CLIENT.MULTI_STATEMENTS,
                    ssl_disabled=True,
                    conv={},
                    autocommit=None,
                    defer_connect=True,
                )
                connection.connect(client)
                with contextlib.closing(connection):
                    cursor = connection.cursor()
                    cursor.execute(statement)
                    rows = list(cursor.fetchall())
                    while cursor.nextset():
                        rows += cursor.fetchall()
        except (OSError, pymysql.MySQLError) as error:
            raise ServerError(f"{self.name}: {error}") from error
        return "".join("\t".join(map(_shown, row)) + "\n" for row in rows)

    def script(self, statements: str, database: str) -> None:
        """Run what only the servers' own client understands: it has commands of its own."""
        client = find_program("mariadb", "mysql", package="mariadb-client")
        # By standard input: a command line has a limit, and is there for all to read.
        self.run(
            [client, "--no-defaults", "--user=root", f"--socket={self.socket}", database],
            stdin=statements.encode(),
            timeout=120,
        )

    def create_database(self, name: str) -> None:
        """Make an empty database, in the place of one that a failed test has left."""
        self.sql(f"CREATE OR REPLACE DATABASE {quote_name(name)}")

    def create_user(self, user: str, password: str, grants: str = APPLICATION_RIGHTS) -> None:
        """Make a user for connections from anywhere, or give an existing one this password.

        ``grants`` is what stands between GRANT and TO.
        """
        account = f"{quote_text(user)}@'%'"
        self.sql(
            f"CREATE OR REPLACE USER {account} IDENTIFIED BY {quote_text(password)};"
            f"GRANT {grants} TO {account}"
        )

    def _load_time_zones(self) -> None:
        """Fill the time zone tables, without which Django's date functions fail. About 1 s."""
        program = find_program(
            "mariadb-tzinfo-to-sql", "mysql_tzinfo_to_sql", package="mariadb-server"
        )
        if not Path("/usr/share/zoneinfo").is_dir():
            raise MissingProgram(
                "/usr/share/zoneinfo is missing. On Debian and Ubuntu: apt-get install tzdata"
            )
        statements = self.run([program, "/usr/share/zoneinfo"])
        self.script(statements, "mysql")

    def kill_connections(self, user: str) -> int:
        """KILL all connections of a user, as an operator does. Returns how many there were."""
        rows = self.sql("SELECT id, user FROM information_schema.processlist").splitlines()
        ids = [
            number for number, _, owner in (row.partition("\t") for row in rows) if owner == user
        ]
        for connection in ids:
            try:
                self.sql(f"KILL CONNECTION {connection}")
            except ServerError as error:
                if "Unknown thread id" not in str(error):  # it has ended by itself
                    raise
        return len(ids)


def _shown(value: str | bytes | None) -> str:
    """A value in a line of its own row: no tab, and no end of the line, is in it."""
    if isinstance(value, bytes):
        value = value.decode(errors="replace")
    return "NULL" if value is None else value.replace("\t", "\\t").replace("\n", "\\n")


def quote_name(name: str) -> str:
    """An identifier for an SQL statement of the MySQL family."""
    return "`" + name.replace("`", "``") + "`"


def quote_text(text: str) -> str:
    """A string for an SQL statement of the MySQL family."""
    return "'" + text.replace("\\", "\\\\").replace("'", "''") + "'"


# Variables that change by the server's own work, or that only the start can set.
UNSETTABLE = ("gtid_", "wsrep_provider_options", "wsrep_cluster_address", "wsrep_start_position")


class Node(MariaDBNode):
    """A MariaDB node with DATABASE, the user USER and the all-powerful user ADMIN."""

    def __init__(self, name: str = "", options: Sequence[str] = (), tls: bool = False) -> None:
        super().__init__(name, options, tls)
        self._first_globals: dict[str, str] = {}

    def set_up(self) -> Node:
        """Make the database and the users, and remember the server's settings."""
        self.create_database(DATABASE)
        self.create_user(USER, PASSWORD)
        self.create_user(ADMIN, ADMIN_PASSWORD, grants="ALL PRIVILEGES ON *.*")
        self.remember_globals()
        return self

    def remember_globals(self) -> None:
        """Take the settings as they are for what restore() shall set back."""
        self._first_globals = self.globals()

    def globals(self) -> dict[str, str]:
        """The server's global variables, without those that follow from its work."""
        # In one row: reading many takes this process longer than it takes the server.
        (row,) = self.sql(
            "SET SESSION group_concat_max_len = 1000000;"
            "SELECT GROUP_CONCAT(LOWER(variable_name), ' ', variable_value SEPARATOR '\n')"
            " FROM information_schema.global_variables"
        ).splitlines()
        pairs = (line.partition(" ")[::2] for line in row.split("\\n"))
        return {name: value for name, value in pairs if not name.startswith(UNSETTABLE)}

    def set_global(self, name: str, value: str | int) -> None:
        """SET GLOBAL, until the test's end."""
        text = str(value)
        literal = text if re.fullmatch(r"-?[0-9.]+", text) else quote_text(text)
        self.sql(f"SET GLOBAL {name} = {literal}")

    def restore(self) -> None:
        super().restore()
        for name, value in self.globals().items():
            first = self._first_globals.get(name, value)
            if value != first:
                try:
                    self.set_global(name, first)
                except ServerError as error:
                    if "read only variable" not in str(error):
                        raise


def _install(folder: Path) -> None:
    """Make a data directory, with the time zone tables filled."""
    find_program("mariadbd", "mysqld", package="mariadb-server")
    installer = find_program("mariadb-install-db", "mysql_install_db", package="mariadb-server")
    # Not ours: the server may run as a user who cannot write there.
    temporary = folder / "tmp"
    temporary.mkdir()
    temporary.chmod(0o1777)
    command = [
        installer,
        "--no-defaults",
        f"--datadir={folder / 'data'}",
        "--auth-root-authentication-method=normal",
        "--skip-test-db",
        "--innodb-log-file-size=8M",
        *(["--user=mysql"] if os.geteuid() == 0 else []),
    ]
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "TMPDIR": str(temporary)},
        start_new_session=True,
    )
    try:
        output = process.communicate()[0].decode(errors="replace")
    except BaseException:
        # It is a script: the server that it runs would go on.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise
    if process.returncode:
        raise ServerError(f"{installer} ended with exit code {process.returncode}\n{output}")
    node = MariaDBNode("mariadb-template")
    node.datadir = folder / "data"
    node.prepared = True
    with node:
        node._load_time_zones()
        node.stop()
