"""A Redis server that keeps nothing on disk."""

from __future__ import annotations

from collections.abc import Sequence

from .certificates import certificates_for
from .ports import ServerError, find_program
from .processes import ServerProcess


def on_clock(script: str) -> str:
    """Return a script that has the time as :func:`on_the_clock` gives it, behind its argument."""
    return script.replace("redis.call('TIME')", "{ARGV[2], ARGV[3]}")


def on_the_clock(seconds: float) -> tuple[int, int]:
    """Return a time as Redis's TIME says it: seconds and microseconds."""
    return divmod(int(seconds * 1e6), 10**6)


class RedisServer(ServerProcess):
    """``options`` are added to its command line: ``["--maxclients", "5"]``.

    :param tls: listen with TLS on a second port, ``tls_port``; ``ca`` is the authority's.
    """

    kind = "redis"

    def __init__(self, name: str = "", options: Sequence[str] = (), tls: bool = False) -> None:
        super().__init__(name, port_count=2)
        self.options = list(options)
        if tls:
            self.tls_port = self.port + 1
            made = certificates_for(self)
            self.ca = made.ca
            self.options += f"--tls-port {self.tls_port} --tls-auth-clients no".split()
            self.options += f"--tls-ca-cert-file {made.ca} --tls-key-file {made.key}".split()
            self.options += ["--tls-cert-file", str(made.certificate)]

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

    def ask(self, *command: str, timeout: float = 30.0) -> str:
        """Run a Redis command and return its answer as redis-cli prints it."""
        client = find_program("redis-cli", package="redis-tools")
        return self.run([client, "-h", self.host, "-p", str(self.port), *command], timeout=timeout)

    def restore(self) -> None:
        """Thaw or restart the server, and empty it."""
        super().restore()
        self.ask("FLUSHALL")
