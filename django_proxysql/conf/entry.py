"""A balancer's entry of DATABASES while it is read, and a problem found in it."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..core import drivers
from ..core.exceptions import ConfigError
from .engines import load_wrapper, peer_engine
from .keys import listed
from .merging import merged_settings

#: The id of what a driver cannot take in one peer's settings.
_OF_ONE_PEER = "E018"

#: What a name may hold: it stands in logs, in metrics and on a command line.
_PEER_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:-]*", re.ASCII)


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with an entry of DATABASES."""

    #: The system check's id without its prefix: E… for errors, W… for warnings.
    id: str
    alias: str
    setting: str
    message: str
    hint: str

    @property
    def is_error(self) -> bool:
        """Whether the checks call it an error."""
        return self.id.startswith("E")

    @property
    def stops_connections(self) -> bool:
        """Whether no connection is made with it. One peer's typo does not stop the others."""
        return self.is_error and self.id != _OF_ONE_PEER

    def __str__(self) -> str:
        return f"DATABASES[{self.alias!r}]: {self.message} {self.hint}".rstrip()


class Entry:
    """A balancer's entry, and what the rules ask of it more than once."""

    def __init__(
        self,
        alias: str,
        settings: Mapping[str, Any],
        databases: Mapping[str, Mapping[str, Any]],
    ) -> None:
        self.alias = alias
        self.settings = settings
        self.databases = databases
        #: Its PEERS, as they are written.
        self.peers = listed(settings.get("PEERS"))
        #: The dotted path of the peers' backend.
        self.engine = peer_engine(settings, databases)

    def problem(self, id_: str, setting: str, message: str, hint: str) -> Problem:
        """Return a problem of this entry."""
        return Problem(id_, self.alias, setting, message, hint)

    def merged(self, peer: Mapping[str, Any]) -> dict[str, Any]:
        """Return what a peer is connected to with."""
        return merged_settings(peer, self.settings, self.settings)

    @functools.cached_property
    def named(self) -> list[tuple[str, Mapping[str, Any]]]:
        """Each usable peer with its name: alias, PEER_NAME, or peer0, peer1 … by place."""
        taken = {peer if isinstance(peer, str) else given_name(peer) for peer in self.peers}
        named: list[tuple[str, Mapping[str, Any]]] = []
        for position, peer in enumerate(self.peers):
            if isinstance(peer, str):
                if peer in self.databases:
                    named.append((peer, self.databases[peer]))
            elif isinstance(peer, Mapping):
                name = given_name(peer)
                if name is None:
                    name = f"peer{position}"
                    while name in taken:
                        position += len(self.peers)
                        name = f"peer{position}"
                    taken.add(name)
                named.append((name, peer))
        return named

    @functools.cached_property
    def driver(self) -> drivers.Driver:
        """The driver of the peers' engine; a guess by its name if it cannot be loaded."""
        try:
            return drivers.driver_of_engine(load_wrapper(self.engine))
        except ConfigError:
            named = {"mysql": drivers.mysql, "postg": drivers.postgresql}
            known = (driver for name, driver in named.items() if name in self.engine)
            return next(known, drivers.generic)

    @property
    def is_mysql(self) -> bool:
        """Whether the driver is one for MySQL and MariaDB."""
        return self.driver in (drivers.mysql, drivers.mysql_connector)

    @property
    def is_postgresql(self) -> bool:
        """Whether the driver is psycopg or psycopg2."""
        return self.driver is drivers.postgresql


def given_name(peer: Any) -> str | None:
    """Return an inline peer's PEER_NAME, if it is one."""
    name = peer.get("PEER_NAME") if isinstance(peer, Mapping) else None
    return name if isinstance(name, str) and _PEER_NAME.fullmatch(name) else None
