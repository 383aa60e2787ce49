"""PgBouncer, in front of a PostgreSQL server."""

from __future__ import annotations

import signal

from . import DATABASE, PASSWORD, USER, Address
from .ports import find_program
from .processes import ServerProcess


class PgBouncer(ServerProcess):
    """A pooler that knows the database DATABASE and the user USER, and nothing else.

    :param target: the server, or a proxy in front of it.
    :param options: settings of its ``[pgbouncer]`` section: ``max_client_conn=3``.
    """

    kind = "pgbouncer"
    #: It refuses to run as root.
    account = "postgres"
    stop_signal = signal.SIGINT

    def __init__(self, target: Address, name: str = "", **options: object) -> None:
        super().__init__(name)
        self.target = target
        self._options = options

    def prepare(self) -> None:
        settings = {
            "listen_addr": self.host,
            "listen_port": self.port,
            "unix_socket_dir": "",
            "auth_type": "plain",
            "auth_file": self.directory / "users",
            "pool_mode": "session",
            "ignore_startup_parameters": "extra_float_digits,options",
            **self._options,
        }
        database = f"host={self.target.host} port={self.target.port} dbname={DATABASE}"
        lines = [
            "[databases]",
            f"{DATABASE} = {database} user={USER} password={PASSWORD}",
            "[pgbouncer]",
            *(f"{key} = {value}" for key, value in settings.items()),
        ]
        (self.directory / "pgbouncer.ini").write_text("\n".join(lines) + "\n")
        (self.directory / "users").write_text(f'"{USER}" "{PASSWORD}"\n')

    def command(self) -> list[str]:
        program = find_program("pgbouncer", package="pgbouncer")
        return [program, str(self.directory / "pgbouncer.ini")]
