"""A balancer's entry of DATABASES while it is read, and the problems found in it."""

from __future__ import annotations

import difflib
import functools
import itertools
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from django.core.checks import CheckMessage, Error, Warning

from ..core import drivers
from ..core.exceptions import ConfigError
from .engines import load_wrapper, peer_engine
from .keys import is_balancer, listed
from .merging import merged_settings

#: Of a URL, in whichever setting it stands: there may be a password in it.
_CREDENTIALS = re.compile(r"(?<=://).*@", re.DOTALL)

#: What a name may hold: it stands in logs, in metrics and on a command line.
_PEER_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:-]*", re.ASCII)


class Peer(NamedTuple):
    """A peer of an entry that can be read."""

    #: Its alias, PEER_NAME, or peer0, peer1 … by place.
    name: str
    #: What messages call it: its alias or its place.
    where: str
    is_alias: bool
    settings: Mapping[str, Any]
    #: What it is connected to with.
    merged: dict[str, Any]

    def __repr__(self) -> str:
        # Without the settings: there may be a password in them.
        return f"<Peer {self.name!r}, {self.where}>"


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
        self.listed = listed(settings.get("PEERS"))
        #: The dotted path of the peers' backend.
        self.engine = peer_engine(settings, databases)
        self.problems: list[CheckMessage] = []

    def add(self, id_: str, message: str, hint: str) -> None:
        """Note a problem: E… is an error's id, W… a warning's."""
        message = _CREDENTIALS.sub("…@", message)
        self.problems.append(
            (Error if id_.startswith("E") else Warning)(
                f"DATABASES[{self.alias!r}]: {message}", hint=hint, id=f"django_proxysql.{id_}"
            )
        )

    def read(self, id_: str, where: str, reader: Callable[..., Any], *args: Any) -> Any:
        """Return what ``reader`` does; note the ConfigError that it raises."""
        try:
            return reader(*args)
        except ConfigError as exc:
            self.add(id_, f"{exc.setting}{of_peer(where)} {exc.problem}.", exc.hint)

    @functools.cached_property
    def peers(self) -> list[Peer]:
        """Those of its peers that can be read."""
        taken = {peer if isinstance(peer, str) else given_name(peer) for peer in self.listed}
        found = []
        for position, peer in enumerate(self.listed):
            is_alias = isinstance(peer, str)
            settings = self.databases.get(peer) if is_alias else peer
            if not isinstance(settings, Mapping):
                continue
            name = peer if is_alias else given_name(peer)
            if name is None:
                places = itertools.count(position, len(self.listed))
                name = next(name for name in map("peer{}".format, places) if name not in taken)
                taken.add(name)
            where = peer if is_alias else f"PEERS[{position}]"
            merged = merged_settings(settings, self.settings, self.settings)
            found.append(Peer(name, where, is_alias, settings, merged))
        return found

    @functools.cached_property
    def wrapper(self) -> Any:
        """The DatabaseWrapper of the peers' backend; what is wrong with it is noted, and None."""
        if is_balancer({"ENGINE": self.engine}):
            self.add(
                "E003",
                "PEER_ENGINE is a load balancer itself.",
                "Give the backend of the databases, such as 'django.db.backends.mysql'.",
            )
            return None
        try:
            return load_wrapper(self.engine)
        except ConfigError as exc:
            setting = "PEER_ENGINE" if self.settings.get("PEER_ENGINE") else "ENGINE of the peers"
            self.add(
                "E013",
                f"{setting} {exc.problem}.",
                "Give the backend of the databases, and install its driver.",
            )

    @functools.cached_property
    def driver(self) -> drivers.Driver:
        """The driver of the peers' engine; one of which nothing is known if there is none."""
        return drivers.driver_of_engine(self.wrapper) if self.wrapper else drivers.generic

    @property
    def is_mysql(self) -> bool:
        """Whether the driver is one for MySQL and MariaDB."""
        return self.driver in (drivers.mysql, drivers.mysql_connector)

    @property
    def is_postgresql(self) -> bool:
        """Whether the driver is psycopg or psycopg2."""
        return self.driver is drivers.postgresql


def of_peer(where: str) -> str:
    """Return what follows a setting's name in a message; nothing for the balancer's own."""
    return f" of peer {where}" if where else ""


def given_name(peer: Any) -> str | None:
    """Return an inline peer's PEER_NAME, if it is one."""
    name = peer.get("PEER_NAME") if isinstance(peer, Mapping) else None
    return name if isinstance(name, str) and _PEER_NAME.fullmatch(name) else None


def did_you_mean(word: object, known: Iterable[str], cutoff: float = 0.6) -> str:
    """Return a hint at what is known and looks like ``word``; nothing if nothing does."""
    close = difflib.get_close_matches(str(word), list(known), n=1, cutoff=cutoff)
    return f"Did you mean {close[0]!r}?" if close else ""
