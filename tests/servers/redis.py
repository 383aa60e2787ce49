"""A Redis server that keeps nothing on disk."""

from __future__ import annotations

from collections.abc import Sequence

from .ports import ServerError, find_program
from .processes import ServerProcess


class RedisServer(ServerProcess):
    """``options`` are added to its command line: ``["--maxclients", "5"]``."""

    kind = "redis"

    def __init__(self, name: str = "", options: Sequence[str] = ()) -> None:
        super().__init__(name)
        self.options = list(options)

    @property
    def url(self) -> str:
        return f"redis://{self.host}:{self.port}/0"

    def command(self) -> list[str]:
        program = find_program("redis-server", package="redis-server")
        settings = f"--port {self.port} --bind {self.host} --dir {self.directory} --appendonly no"
        return [program, *settings.split(), "--save", "", *self.options]

    def ready(self) -> bool:
        try:
            return super().ready() and self.ask("PING") == "PONG\n"
        except ServerError:
            return False

    def ask(self, *command: str, timeout: float = 5.0) -> str:
        """Run a Redis command and return its answer as redis-cli prints it."""
        client = find_program("redis-cli", package="redis-tools")
        return self.run([client, "-h", self.host, "-p", str(self.port), *command], timeout=timeout)

    def restore(self) -> None:
        """Thaw or restart the server, and empty it."""
        super().restore()
        self.ask("FLUSHALL")
