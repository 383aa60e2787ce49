"""HAProxy in TCP mode: stands for any load balancer or proxy in front of a server."""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence

from . import Address
from .ports import ServerError, find_program
from .processes import ServerProcess


class HAProxy(ServerProcess):
    """One frontend with a port of its own for each name; ``targets`` says what stands behind it.

    A frontend with several targets deals connections out in turn to those that accept TCP, looking
    every ``check_interval`` seconds; one with a single target passes on whatever happens.
    """

    kind = "haproxy"

    def __init__(
        self,
        targets: Mapping[str, Address | Sequence[Address]],
        name: str = "",
        check_interval: float = 0.5,
    ) -> None:
        super().__init__(name, port_count=len(targets))
        self.ports = {frontend: self.port + n for n, frontend in enumerate(targets)}
        self.stats_socket = self.directory / "stats"
        self._check_interval = check_interval
        self._targets = {
            frontend: list(behind) if isinstance(behind, Sequence) else [behind]
            for frontend, behind in targets.items()
        }

    def prepare(self) -> None:
        lines = [
            "global",
            f"  stats socket {self.stats_socket} mode 600 level admin",
            "  nbthread 1",
            "  maxconn 2000",
            "defaults",
            "  mode tcp",
            "  retries 0",
            "  timeout connect 2s",
            "  timeout client 1h",
            "  timeout server 1h",
        ]
        for frontend, behind in self._targets.items():
            lines += [
                f"frontend {frontend}",
                f"  bind {self.host}:{self.ports[frontend]}",
                f"  default_backend {frontend}-servers",
                f"backend {frontend}-servers",
                "  balance roundrobin",
            ]
            check = f" check inter {int(self._check_interval * 1000)} fall 1 rise 1"
            for n, target in enumerate(behind):
                server = f"  server s{n} {target.host}:{target.port}"
                lines.append(server + (check if len(behind) > 1 else ""))
        (self.directory / "haproxy.cfg").write_text("\n".join(lines) + "\n")

    def command(self) -> list[str]:
        program = find_program("haproxy", package="haproxy")
        return [program, "-db", "-f", str(self.directory / "haproxy.cfg")]

    def ready(self) -> bool:
        # Not by connecting to a frontend: its server would see it.
        try:
            return "Pid:" in self.ask("show info")
        except OSError:
            return False

    def ask(self, command: str) -> str:
        """Give a command to the stats socket and return the answer."""
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(5)
            client.connect(str(self.stats_socket))
            client.sendall(command.encode() + b"\n")
            with client.makefile("rb") as answer:
                return answer.read().decode().strip()

    def disable(self, frontend: str) -> None:
        """Close a frontend's port: new connections are refused, established ones go on."""
        self._tell(f"disable frontend {frontend}")

    def enable(self, frontend: str) -> None:
        """Open a disabled frontend again."""
        self._tell(f"enable frontend {frontend}")

    def shutdown_sessions(self, frontend: str) -> None:
        """Cut all established connections of a frontend."""
        for n in range(len(self._targets[frontend])):
            self._tell(f"shutdown sessions server {frontend}-servers/s{n}")

    def sessions(self, frontend: str) -> int:
        """How many connections of a frontend are established."""
        heading, *rows = self.ask("show stat").lstrip("# ").splitlines()
        names = heading.split(",")
        for row in rows:
            values = dict(zip(names, row.split(",")))
            if (values["pxname"], values["svname"]) == (frontend, "FRONTEND"):
                return int(values["scur"])
        raise ServerError(f"{self.name} has no frontend {frontend}")

    def _tell(self, command: str) -> None:
        answer = self.ask(command)
        if answer:  # HAProxy says nothing when all is well
            raise ServerError(f"{self.name}: {command}: {answer}")
