"""Are the peers of a load balancer what they must be: equivalent, and in step?

:class:`Facts` is what one peer says of itself, asked for on a driver's own connection.
:func:`warnings` compares the peers of one balancer; it is a pure function of the facts and the
configuration. What a server does not say, for want of a right or of a word for it, is unknown,
and there is no warning about what is unknown.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Optional

from .config import BalancerConfig, address_in_words

#: Seconds by which a clock may differ: timestamps of one request are in order to the second.
CLOCKS_APART = 1.0
#: Seconds by which a replica may lag before it is worth a word.
LAG = 10.0

#: What a Galera node says before it has joined a cluster.
_NO_CLUSTER = "00000000-0000-0000-0000-000000000000"

#: Asks one question; returns rows by their columns' names, and None where the server refuses.
Ask = Callable[[str], Optional[Sequence[Mapping[str, Any]]]]


@dataclass(frozen=True)
class Source:
    """Where a server replicates from, asynchronously."""

    address: str
    is_running: bool
    #: Seconds by which it lags; None: unknown.
    lag: float | None = None
    #: Why it has stopped.
    error: str = ""


@dataclass(frozen=True)
class Facts:
    """What one peer says of itself; "" and None are unknown."""

    peer: str
    #: Which server it is. Two peers of one identity lead to one server.
    server: str = ""
    #: Which cluster or lineage its data belong to, where the server knows.
    lineage: str = ""
    sources: tuple[Source, ...] | None = None
    is_read_only: bool = False
    #: Seconds that its clock is ahead of ours.
    clock: float | None = None
    #: What must be equal on all peers, by its name.
    settings: Mapping[str, str] = field(default_factory=dict)


def warnings(config: BalancerConfig, facts: Iterable[Facts]) -> list[str]:
    """Return what is wrong with peers that are used together, each with its remedy."""
    known = list(facts)
    return [
        *_asynchronous(config, known),
        *_stopped_or_behind(known),
        *_strangers(known),
        *_clocks(known),
        *_settings(known),
    ]


def _asynchronous(config: BalancerConfig, known: Sequence[Facts]) -> Iterator[str]:
    replicas = [one for one in known if one.sources]
    servers = {one.server for one in known}
    is_one_server = len(servers) == 1 and "" not in servers
    if not replicas or is_one_server:
        return
    names = _named(one.peer for one in replicas)
    is_or_are = "is a replica" if len(replicas) == 1 else "are replicas"
    priorities = {peer.name: peer.priority for peer in config.peers}
    # Peers that take writes in one tier take them at once.
    writers = [one.peer for one in known if not one.is_read_only]
    tiers = [priorities.get(name, 0) for name in writers]
    if len(set(tiers)) < len(tiers):
        yield (
            f"{names} {is_or_are} that may lag, and several peers of one PRIORITY take writes: "
            "the data will drift apart. Give each stand-by a PRIORITY of its own, such as 1."
        )
    if config.synchronous_peers:
        yield (
            f"{names} {is_or_are} that may lag. "
            "Set SYNCHRONOUS_PEERS: False, or a read may miss what was written before it."
        )


def _stopped_or_behind(known: Sequence[Facts]) -> Iterator[str]:
    for one in known:
        for source in one.sources or ():
            if not source.is_running:
                why = f": {source.error}" if source.error else ""
                yield (
                    f"{one.peer} no longer replicates from {source.address}{why}. "
                    "Drain it until it does."
                )
            elif source.lag is not None and source.lag > LAG:
                yield f"{one.peer} is {source.lag:.0f} s behind {source.address}."


def _strangers(known: Sequence[Facts]) -> Iterator[str]:
    lineages = {one.lineage for one in known if one.lineage}
    if len(lineages) > 1:
        if any(one.sources != () for one in known if one.lineage):
            # One may replicate from the other, asynchronously, or may not say.
            return
        groups = [
            _named(one.peer for one in known if one.lineage == lineage)
            for lineage in sorted(lineages)
        ]
        yield (
            f"{' and '.join(groups)} are not the same database: their data have nothing in common. "
            "Peers must be equivalent; see which address is wrong."
        )
        return
    # Servers of their own, of which none replicates from anywhere.
    alone = all(one.server and one.sources == () and not one.lineage for one in known)
    if alone and len({one.server for one in known}) > 1:
        yield (
            f"{_named(one.peer for one in known)} do not replicate to each other: "
            "each is a database of its own. Peers must be equivalent."
        )


def _clocks(known: Sequence[Facts]) -> Iterator[str]:
    clocks = sorted((one.clock, one.peer) for one in known if one.clock is not None)
    if clocks and clocks[-1][0] - clocks[0][0] > CLOCKS_APART:
        apart = clocks[-1][0] - clocks[0][0]
        yield (
            f"The clock of {clocks[-1][1]} is {apart:.1f} s ahead of that of {clocks[0][1]}: "
            "NOW() depends on the peer. Have both follow one time server."
        )


def _settings(known: Sequence[Facts]) -> Iterator[str]:
    for name in dict.fromkeys(name for one in known for name in one.settings):
        values: dict[str, list[str]] = {}
        for one in known:
            value = one.settings.get(name, "")
            if value:
                values.setdefault(value, []).append(one.peer)
        if len(values) > 1:
            said = "; ".join(f"{_named(peers)}: {value}" for value, peers in values.items())
            yield f"The peers differ in their {name}: {said}."


def _named(names: Iterable[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last


# What a server is asked


def mysql_facts(peer: str, ask: Ask) -> Facts:
    # UNIX_TIMESTAMP(NOW(6)) is an hour off at times: local time comes twice when summer ends.
    clock = _clock(
        ask, "SELECT TIMESTAMPDIFF(MICROSECOND, '1970-01-01', UTC_TIMESTAMP(6)) / 1000000"
    )
    one = _row(
        ask,
        "SELECT @@global.sql_mode AS sql_mode, @@collation_database AS collation,"
        " @@character_set_database AS charset,"
        " CAST(TIMEDIFF(NOW(), UTC_TIMESTAMP()) AS CHAR) AS zone,"
        " @@server_id AS id, @@hostname AS host, @@port AS port",
    )
    read_only = value_of(ask, "SELECT @@global.read_only").upper()
    is_read_only = read_only not in ("", "0", "OFF")
    if not one:
        return Facts(peer, is_read_only=is_read_only, clock=clock)
    galera = _row(ask, "SHOW GLOBAL STATUS LIKE 'wsrep_cluster_state_uuid'").get("value")
    if galera == _NO_CLUSTER:
        galera = ""
    group = value_of(ask, "SELECT @@group_replication_group_name")
    return Facts(
        peer,
        server=f"{one['host']}:{one['port']}/{one['id']}",
        lineage=str(galera or group),
        sources=_mysql_sources(ask),
        is_read_only=is_read_only,
        clock=clock,
        settings={
            "sql_mode": ",".join(sorted(str(one["sql_mode"]).split(","))) or "none",
            "character set": f"{one['charset']}, {one['collation']}",
            "time zone (offset from UTC)": str(one["zone"]),
        },
    )


def _mysql_sources(ask: Ask) -> tuple[Source, ...] | None:
    # MariaDB has several, MySQL one statement for all; a refusal by both leaves it unknown.
    for statement in ("SHOW ALL REPLICAS STATUS", "SHOW REPLICA STATUS"):
        found = ask(statement)
        if found is not None:
            return tuple(map(_mysql_source, found))
    return None


def _mysql_source(row: Mapping[str, Any]) -> Source:
    # MariaDB says Slave_IO_Running and Master_Host, MySQL Replica_IO_Running and Source_Host.
    said = {
        name.replace("slave", "replica").replace("master", "source"): value
        for name, value in row.items()
    }
    lag = said.get("seconds_behind_source")
    running = (said.get("replica_io_running"), said.get("replica_sql_running"))
    return Source(
        address=address_in_words(said.get("source_host"), said.get("source_port")),
        is_running=all(one == "Yes" for one in running),
        lag=_number(lag),
        error=str(said.get("last_sql_error") or said.get("last_io_error") or ""),
    )


def postgresql_facts(peer: str, ask: Ask) -> Facts:
    clock = _clock(ask, "SELECT extract(epoch FROM clock_timestamp()) AS now")
    is_standby = value_of(ask, "SELECT pg_is_in_recovery() AS standby") == "True"
    one = _row(
        ask,
        "SELECT pg_encoding_to_char(encoding) AS encoding, datcollate AS collation,"
        " current_setting('TimeZone') AS zone, host(inet_server_addr()) AS host,"
        " inet_server_port() AS port FROM pg_database WHERE datname = current_database()",
    )
    return Facts(
        peer,
        server=address_in_words(one["host"], one["port"]) if one.get("host") else "",
        # Equal on a primary and all that were copied from it.
        lineage=value_of(ask, "SELECT system_identifier FROM pg_control_system()"),
        sources=_primary(ask) if is_standby else _publishers(ask),
        is_read_only=is_standby,
        clock=clock,
        settings=(
            {
                "character set": f"{one['encoding']}, {one['collation']}",
                "time zone": str(one["zone"]),
            }
            if "encoding" in one
            else {}
        ),
    )


def _publishers(ask: Ask) -> tuple[Source, ...] | None:
    # Logical replication. Where the publisher is only superusers see.
    subscriptions = ask(
        "SELECT s.subname AS name, s.subenabled AS enabled, max(w.pid) AS pid"
        " FROM pg_subscription s JOIN pg_database d ON d.oid = s.subdbid"
        " LEFT JOIN pg_stat_subscription w ON w.subname = s.subname AND w.relid IS NULL"
        " WHERE d.datname = current_database() GROUP BY 1, 2 ORDER BY 1"
    )
    if subscriptions is None:
        return None
    return tuple(
        Source(
            address=f"the publisher of its subscription {one['name']}",
            is_running=one["pid"] is not None,
            error="" if one["enabled"] else "the subscription is disabled",
        )
        for one in subscriptions
    )


def _primary(ask: Ask) -> tuple[Source, ...] | None:
    receivers = ask("SELECT status, sender_host, sender_port FROM pg_stat_wal_receiver")
    if receivers is None:
        return None
    lag = value_of(
        ask,
        "SELECT CASE WHEN pg_last_wal_receive_lsn() = pg_last_wal_replay_lsn() THEN 0"
        " ELSE extract(epoch FROM now() - pg_last_xact_replay_timestamp()) END AS lag",
    )
    one = receivers[0] if receivers else {}
    # Without the right to see it all a user sees that there is a receiver, and no more.
    host = one.get("sender_host")
    return (
        Source(
            address=address_in_words(host, one.get("sender_port")) if host else "its primary",
            is_running=bool(receivers) and one.get("status") in ("streaming", None),
            lag=_number(lag),
        ),
    )


def _row(ask: Ask, statement: str) -> Mapping[str, Any]:
    """Return the first row that a statement returns, or nothing."""
    answer = ask(statement)
    return answer[0] if answer else {}


def value_of(ask: Ask, statement: str) -> str:
    """Return the one value that a statement returns, or ""."""
    for value in _row(ask, statement).values():
        return "" if value is None else str(value)
    return ""


def _clock(ask: Ask, statement: str) -> float | None:
    before = time.time()
    said = _number(value_of(ask, statement))
    after = time.time()
    # The answer was true somewhere between the two. If they lie far apart it says nothing.
    if said is None or after - before > CLOCKS_APART:
        return None
    return said - (before + after) / 2


def _number(said: Any) -> float | None:
    """Return the number that a server says; None where it says something else."""
    try:
        return float(said)
    except (TypeError, ValueError):
        return None
