"""Peers that are not what they must be: each kind is a warning with its remedy."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from functools import partial
from types import SimpleNamespace
from typing import Any
from uuid import UUID

import MySQLdb
import pytest
from django.core.management import call_command
from MySQLdb.cursors import DictCursor

from django_proxysql.core import comparison
from django_proxysql.core.comparison import Facts, Source, mysql_facts, warnings
from django_proxysql.core.config import BalancerConfig, PeerConfig
from django_proxysql.inspection import inspect
from tests.engine import POSTGRESQL, engine, mysql_peer, postgres_peer
from tests.fakes import until
from tests.servers import ADMIN, ADMIN_PASSWORD, DATABASE, PASSWORD, USER
from tests.servers.galera import GaleraCluster
from tests.servers.mariadb import Node
from tests.servers.postgresql import PostgreSQLNode, postgresql_program
from tests.servers.processes import start_together

REPLICATES = (Source("10.0.0.1:3306", True, 0.0),)


def config(*priorities: int, **settings: Any) -> BalancerConfig:
    peers = tuple(
        PeerConfig(f"peer{place}", priority=priority) for place, priority in enumerate(priorities)
    )
    return BalancerConfig("default", peers, **settings)


def facts(place: int, **said: Any) -> Facts:
    return Facts(f"peer{place}", **{"server": f"db{place}:3306/{place}", "sources": (), **said})


def asked(source: Any = None, clock: Any = "1.5", cluster: str = "") -> Callable[[str], Any]:
    """Return how a MySQL server answers."""
    answers: dict[str, Any] = {
        "SELECT TIMESTAMPDIFF": {"now": clock},
        "SELECT @@global.sql_mode": {
            **dict.fromkeys(("sql_mode", "charset", "collation", "zone", "host"), "x"),
            **dict.fromkeys(("read_only", "port", "id"), 0),
        },
        "SHOW GLOBAL STATUS": {"variable_name": "", "value": cluster},
        "SHOW REPLICA STATUS": source,
    }

    def ask(statement: str) -> Any:
        row = next((row for text, row in answers.items() if statement.startswith(text)), None)
        return None if row is None else [row]

    return ask


def rows_of(cursor: Any, statement: str) -> Any:
    """Ask one question as ``manage.py peers`` does: None where the server refuses."""
    try:
        cursor.execute(statement)
    except Exception:
        return None
    names = [column[0].lower() for column in cursor.description]
    return [dict(zip(names, row)) for row in cursor.fetchall()]


def said_of(*known: Facts, asked: BalancerConfig | None = None) -> str:
    return "\n".join(warnings(asked or config(*(0 for _ in known)), known))


def replica(*source: Any, **said: Any) -> Facts:
    return facts(1, sources=(Source("10.0.0.1:3306", *source),), **said)


ONE_SERVER: dict[str, Any] = {"server": "db:3306/1", "sources": REPLICATES}
#: A stand-by that may lag, as the settings say.
STANDBY = config(0, 1, synchronous_peers=False)
LAGS = config(0, 0, synchronous_peers=False)
A, B = {"lineage": "a"}, {"lineage": "b"}

BOTH_REPLICATE = [facts(0, sources=REPLICATES), facts(1, sources=REPLICATES)]
STOPPED = replica(False, None, "Duplicate entry '7'")
MODES = ({"sql_mode": "ANSI", "zone": "UTC"}, {"sql_mode": "STRICT", "zone": "UTC"})

#: What the peers say, the settings if they matter, and a part of what they are warned of.
COMPARED: dict[str, tuple[list[Facts], BalancerConfig | None, str]] = {
    "nothing is known of them": ([Facts("peer0"), Facts("peer1")], None, ""),
    "proxies before one server": ([facts(0, **ONE_SERVER), facts(1, **ONE_SERVER)], None, ""),
    "a cluster": ([facts(0, **A), facts(1, **A)], None, ""),
    "one may not say whence": ([facts(0, **A), facts(1, sources=None, **B)], None, ""),
    "one may not say what it is": ([facts(0), facts(1, sources=None)], None, ""),
    "a stand-by with a priority of its own": (BOTH_REPLICATE, STANDBY, ""),
    "a replica without writes": ([facts(0), replica(True, 0.0, is_read_only=True)], LAGS, ""),
    "a cluster that replicates from another": (
        [facts(0, **A), replica(True, 0.0, **B)],
        STANDBY,
        "",
    ),
    "two writers that replicate": (BOTH_REPLICATE, None, "peer0 and peer1 are replicas that may"),
    "what is to be done": (BOTH_REPLICATE, None, "Give each stand-by a PRIORITY of its own, such"),
    "what else is": (BOTH_REPLICATE, None, "may lag. Set SYNCHRONOUS_PEERS: False, or a read"),
    "a replication that has stopped": (
        [facts(0), STOPPED],
        STANDBY,
        "peer1 no longer replicates from 10.0.0.1:3306: Duplicate entry '7'. Drain it until it",
    ),
    "a lag that is not known": ([facts(0), replica(True, None)], STANDBY, ""),
    "a lag of ten seconds": ([facts(0), replica(True, 10.0)], STANDBY, ""),
    "a lag of more": ([facts(0), replica(True, 11.0)], STANDBY, "peer1 is 11 s behind 10.0.0.1:"),
    "clusters with nothing in common": (
        [facts(0, **A), facts(1, **B), facts(2, **A)],
        None,
        "peer0 and peer2 and peer1 are not the same database",
    ),
    "no replication": ([facts(0), facts(1)], None, "peer0 and peer1 do not replicate to each"),
    "a clock a little behind": ([facts(0, clock=5.0, **A), facts(1, clock=4.1, **A)], None, ""),
    "a clock more than a second ahead": (
        [facts(0, clock=5.0, **A), facts(1, clock=6.5, **A)],
        None,
        "The clock of peer1 is 1.5 s ahead of that of peer0",
    ),
    "settings that differ": (
        [facts(0, settings=MODES[0], **A), *(facts(n, settings=MODES[1], **A) for n in (1, 2))],
        None,
        "The peers differ in their sql_mode: peer0: ANSI; peer1 and peer2: STRICT.",
    ),
}


@pytest.mark.parametrize("peers", COMPARED)
def test_what_peers_are_warned_of(peers: str) -> None:
    known, asked, says = COMPARED[peers]
    said = said_of(*known, asked=asked)
    assert said == says == "" or (says and says in said)


def test_a_node_that_has_joined_no_cluster_yet_has_no_lineage() -> None:
    assert mysql_facts("peer0", asked(cluster=f"{UUID(int=0)}")).lineage == ""


@pytest.mark.parametrize(("seconds", "is_known"), [(0.8, True), (3.0, False)])
def test_an_answer_that_is_late_says_nothing_of_the_clock(
    seconds: float, is_known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An overloaded server's clock may be right."""
    now = iter((100.0, 100.0 + seconds))
    monkeypatch.setattr(comparison, "time", SimpleNamespace(time=lambda: next(now)))
    assert (mysql_facts("peer0", asked(clock="100")).clock is not None) is is_known


@pytest.mark.parametrize("said", ["", "unknown", None])
def test_what_is_no_number_is_unknown(said: Any) -> None:
    """A server that speaks a dialect of its own is no worse for that."""
    mysql: Any = {"seconds_behind_master": said}
    (source,) = mysql_facts("peer0", asked(mysql, said)).sources or ()
    assert source.lag is None
    assert mysql_facts("peer0", asked(mysql, said)).clock is None


# On servers


def looks_of(*peers: dict[str, Any], status: int = 0, **settings: Any) -> str:
    """Return what ``manage.py peers`` prints of the peers, below its table."""
    out = io.StringIO()
    with engine(list(peers), alias="default", **settings):
        if status:
            with pytest.raises(SystemExit) as ended:
                call_command("peers", stdout=out)
            assert ended.value.code == status
        else:
            call_command("peers", stdout=out)
    printed = out.getvalue()
    assert PASSWORD not in printed
    return printed


@pytest.fixture(scope="module")
def replicas() -> Iterator[tuple[Node, Node]]:
    """Two MariaDB servers that replicate to each other, asynchronously."""
    with ExitStack() as stack:
        nodes = tuple(
            stack.enter_context(
                Node(f"replica-{number}", options=[f"--server-id={number}", "--log-bin"])
            )
            for number in (1, 2)
        )
        start_together(*nodes)
        for node in nodes:
            node.set_up()
            node.sql("RESET MASTER")
        for node, source in (nodes, nodes[::-1]):
            node.sql(
                f"CHANGE MASTER TO master_host='{source.host}', master_port={source.port}, "
                f"master_user='{ADMIN}', master_password='{ADMIN_PASSWORD}', "
                "master_use_gtid=slave_pos, master_connect_retry=1; START SLAVE"
            )
            node.sql(f"GRANT SLAVE MONITOR ON *.* TO '{USER}'")
        yield nodes  # type: ignore[misc]


@pytest.mark.server
def test_servers_that_replicate_to_each_other_are_a_warning(replicas: tuple[Node, Node]) -> None:
    peers = [mysql_peer(node) for node in replicas]
    printed = looks_of(*peers, status=1)
    assert printed.startswith("WARNING: default: all up, 2 warnings\n")
    assert "default: peer0 and peer1 are replicas that may lag, and several peers" in printed

    peers[1]["PRIORITY"] = 1
    printed = looks_of(*peers, SYNCHRONOUS_PEERS=False)
    assert printed.startswith("OK: default: all well\n")


@pytest.mark.server
def test_a_replica_that_has_stopped_is_a_warning(replicas: tuple[Node, Node]) -> None:
    replicas[1].sql("STOP SLAVE")
    try:
        peers = [mysql_peer(replicas[0]), mysql_peer(replicas[1], PRIORITY=1)]
        printed = looks_of(*peers, status=1, SYNCHRONOUS_PEERS=False)
        assert f"default: peer1 no longer replicates from 127.0.0.1:{replicas[0].port}" in printed
    finally:
        replicas[1].sql("START SLAVE")


@pytest.mark.server
def test_a_replica_that_lags_is_a_warning(replicas: tuple[Node, Node]) -> None:
    """It waits for a lock with a write that the other server has made an hour ago."""
    source, replica = replicas
    peers = [mysql_peer(source), mysql_peer(replica, PRIORITY=1)]
    source.sql("CREATE TABLE slow (x int)", database=DATABASE)
    until(lambda: replica.sql("SHOW TABLES LIKE 'slow'", database=DATABASE))
    admin = {"host": replica.host, "port": replica.port, "user": ADMIN, "password": ADMIN_PASSWORD}
    with closing(MySQLdb.connect(**admin, database=DATABASE)) as holder:
        holder.cursor().execute("LOCK TABLES slow WRITE")
        # A statement's event would have the time of its end.
        source.sql(
            "SET binlog_format = ROW, timestamp = UNIX_TIMESTAMP() - 3600;"
            "INSERT INTO slow VALUES (1)",
            database=DATABASE,
        )
        until(lambda: "Waiting for table metadata lock" in replica.sql("SHOW PROCESSLIST"))
        printed = looks_of(*peers, status=1, SYNCHRONOUS_PEERS=False)
    until(lambda: replica.sql("SELECT x FROM slow", database=DATABASE))
    source.sql("DROP TABLE slow", database=DATABASE)
    assert re.search(rf"default: peer1 is 36\d\d s behind 127.0.0.1:{source.port}\.", printed)


def test_a_user_without_the_right_to_see_replication_is_not_warned(
    mariadb_pair: tuple[Node, Node],
) -> None:
    assert looks_of(*(mysql_peer(node) for node in mariadb_pair)).startswith("OK: default")


def test_servers_with_nothing_in_common_are_a_warning(
    mariadb_pair: tuple[Node, Node],
) -> None:
    peers = [mysql_peer(node, USER=ADMIN, PASSWORD=ADMIN_PASSWORD) for node in mariadb_pair]
    assert "peer0 and peer1 do not replicate to each other" in looks_of(*peers, status=1)


def test_settings_that_differ_are_a_warning_on_mariadb(mariadb_pair: tuple[Node, Node]) -> None:
    mariadb_pair[1].set_global("sql_mode", "ANSI")
    printed = looks_of(*(mysql_peer(node) for node in mariadb_pair), status=1)
    assert "default: The peers differ in their sql_mode: peer0: " in printed


def test_versions_characters_and_zones_that_differ_are_a_warning(
    mariadb_pair: tuple[Node, Node],
) -> None:
    other = mariadb_pair[1]
    other.options += ["--version=11.8.2-MariaDB", "--default-time-zone=+05:00"]
    other.restart()
    other.sql(f"ALTER DATABASE {DATABASE} CHARACTER SET latin1")
    try:
        printed = looks_of(*map(mysql_peer, mariadb_pair), status=1)
    finally:
        other.sql(f"ALTER DATABASE {DATABASE} CHARACTER SET utf8mb4 COLLATE utf8mb4_general_ci")
    assert re.search(
        r"differ in their version: peer0: MariaDB 1.*; peer1: MariaDB 11\.8\.", printed
    )
    assert re.search(r"differ in their character set: peer0: utf8mb4,.*; peer1: latin1,", printed)
    assert re.search(r"differ in their time zone .*: peer0: [-:\d]+; peer1: 05:00:00\.", printed)


def test_clocks_apart_are_a_warning(mariadb_pair: tuple[Node, Node]) -> None:
    """The servers have this machine's clock; each new connection to one tells another time."""
    mariadb_pair[1].set_global("init_connect", "SET timestamp = UNIX_TIMESTAMP() + 3600")
    printed = looks_of(*map(mysql_peer, mariadb_pair), status=1)
    assert re.search(r"default: The clock of peer1 is 3\d{3}\.\d s ahead of that of peer0", printed)


def test_cursors_that_give_dicts_are_asked_as_well(mariadb_pair: tuple[Node, Node]) -> None:
    options = {"cursorclass": DictCursor}
    peers = [mysql_peer(node, OPTIONS=options) for node in mariadb_pair]
    with engine(peers, alias="default"):
        found = inspect(["default"])["default"]
    assert [one.error for one in found] == ["", ""]
    servers = [one.facts.server for one in found if one.facts]
    assert [f":{node.port}/" in server for node, server in zip(mariadb_pair, servers)] == [True] * 2


def test_the_hour_that_comes_twice_shifts_no_clock(mariadb: Node) -> None:
    """Two servers in step, of which one tells the time of a place where summer has just ended."""
    where = {"host": mariadb.host, "port": mariadb.port, "user": USER, "password": PASSWORD}
    told = []
    for zone in ("+00:00", "Europe/Berlin"):
        for hour in (0, 1):
            with closing(MySQLdb.connect(**where)) as connection, connection.cursor() as cursor:
                # 2026-10-25 02:30 in Berlin, and 02:30 once more.
                cursor.execute(f"SET time_zone = '{zone}', timestamp = {1792888200 + hour * 3600}")
                found = mysql_facts("peer0", partial(rows_of, cursor))
            assert found.clock is not None
            told.append(found.clock - hour * 3600)
    assert max(told) - min(told) < 60


def test_galera_nodes_are_equivalent(galera: GaleraCluster) -> None:
    assert looks_of(*map(mysql_peer, galera.nodes)).startswith("OK: default: all well\n")


def test_a_postgresql_server_says_which_database_it_is(
    postgres_pair: tuple[PostgreSQLNode, PostgreSQLNode],
) -> None:
    """(The tests' servers are copies of one, so they are of one lineage.)"""
    peers = [postgres_peer(node) for node in postgres_pair]
    with engine(peers, alias="default", PEER_ENGINE=POSTGRESQL):
        (one, other) = (found.facts for found in inspect(["default"])["default"])
    assert one.lineage == other.lineage != ""
    assert one.server != other.server
    assert one.sources == ()
    assert abs(one.clock or 0) < 60
    assert one.settings["character set"].startswith("UTF8")


class StandBy(PostgreSQLNode):
    """Replicates from another server, as PostgreSQL's own tool sets it up."""

    def __init__(self, primary: PostgreSQLNode) -> None:
        super().__init__("stand-by")
        self.primary = primary

    def prepare(self) -> None:
        primary = self.primary
        where = f"host={primary.host} port={primary.port} user={ADMIN} password={ADMIN_PASSWORD}"
        how = ["--write-recovery-conf", "--checkpoint=fast", "--no-sync"]
        tool = postgresql_program("pg_basebackup")
        self.run([tool, *how, f"--dbname={where}", f"--pgdata={self.datadir}"])
        self.give(self.datadir)


@pytest.mark.server
def test_a_stand_by_of_postgresql_is_a_replica_that_may_lag_or_stop(
    postgres: PostgreSQLNode,
) -> None:
    with StandBy(postgres) as standby:
        peers = [postgres_peer(postgres), postgres_peer(standby, PRIORITY=1)]
        looks = partial(looks_of, *peers, PEER_ENGINE=POSTGRESQL)
        until(lambda: standby.sql("SELECT pid FROM pg_stat_wal_receiver"))
        printed = looks(status=1)
        assert "default: peer1 is a replica that may lag. Set SYNCHRONOUS_PEERS: False" in printed
        assert "standby" in printed

        assert looks(SYNCHRONOUS_PEERS=False).startswith("OK: default: all well\n")

        standby.set_global("primary_conninfo = ''")
        until(lambda: not standby.sql("SELECT pid FROM pg_stat_wal_receiver"))
        printed = looks(status=1, SYNCHRONOUS_PEERS=False)
        assert "default: peer1 no longer replicates from its primary" in printed


def test_a_subscriber_of_a_logical_replication_is_a_replica(postgres: PostgreSQLNode) -> None:
    postgres.sql(
        "CREATE SUBSCRIPTION shop_copy CONNECTION 'host=10.0.0.9' PUBLICATION p"
        " WITH (connect = false)",
        database=DATABASE,
    )
    try:
        with engine([postgres_peer(postgres)], alias="default", PEER_ENGINE=POSTGRESQL):
            (found,) = inspect(["default"])["default"]
    finally:
        postgres.sql("ALTER SUBSCRIPTION shop_copy SET (slot_name = NONE)", database=DATABASE)
        postgres.sql("DROP SUBSCRIPTION shop_copy", database=DATABASE)
    (source,) = found.facts.sources or ()
    assert source.address == "the publisher of its subscription shop_copy"
    assert (source.is_running, source.error) == (False, "the subscription is disabled")
    other = facts(1, lineage="another")
    said = said_of(found.facts, other)
    assert "peer0 is a replica that may lag" in said
    assert "nothing in common" not in said
