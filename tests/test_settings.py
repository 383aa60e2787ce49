"""What DATABASES says is what the peers are connected to with, and nothing else."""

from __future__ import annotations

import functools
import gc
import pathlib
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
from django.db import OperationalError, connections
from django.db.backends.signals import connection_created
from django.test.utils import setup_databases, teardown_databases

from django_proxysql import balancers, registry
from django_proxysql.conf.entry import Entry
from django_proxysql.conf.keys import CONNECTION_KEYS, ENGINE
from django_proxysql.conf.merging import changed_keys, first_reading, merged_settings
from django_proxysql.conf.reading import balancer_config
from django_proxysql.registry import NoPeerAvailable
from tests import fakes
from tests.app.models import Token
from tests.engine import MYSQL, SQLITE, Clock, engine, forget, mysql_peer, nodb_cursor, sqlite_peer
from tests.servers import ADMIN, ADMIN_PASSWORD, DATABASE, PASSWORD, USER
from tests.servers.mariadb import Node
from tests.strikes import strikes

Pair = tuple[Node, Node]


def scalar(connection: Any, statement: str) -> Any:
    with connection.cursor() as cursor:
        cursor.execute(statement)
        return cursor.fetchone()[0]


def ports(connection: Any, connects: int) -> set[int]:
    """Return the ports of the servers that so many new connections lead to."""
    found = set()
    for _ in range(connects):
        connection.close()
        found.add(scalar(connection, "SELECT @@port"))
    return found


def in_thread(function: Callable[[], Any]) -> Any:
    """Return what ``function`` returns in a new thread, whose connections it then closes."""

    def run() -> Any:
        try:
            return function()
        finally:
            connections.close_all()

    return fakes.in_thread(run)


# Where peers come from


def test_settings_of_the_original(mariadb_pair: Pair) -> None:
    """The original's README settings work unchanged: PEERS names other aliases, each used."""
    peers = {f"peer{n}": {"ENGINE": MYSQL, **mysql_peer(mariadb_pair[n])} for n in (0, 1)}
    with engine(
        ["peer0", "peer1"], alias="default", databases=peers, CHECK_INTERVAL=30
    ) as connection:
        assert ports(connection, 40) == {node.port for node in mariadb_pair}
        assert list(balancers["default"].peers) == ["peer0", "peer1"]
        assert connection.alias == "default"
        assert connection.settings_dict["NAME"] == DATABASE


def test_inline_peers_are_laid_over_the_balancer(mariadb_pair: Pair) -> None:
    """A peer's dict is laid over the balancer's entry: what it leaves out is the balancer's."""
    peers = [{"PORT": node.port} for node in mariadb_pair]
    common = {"HOST": "127.0.0.1", "NAME": DATABASE, "USER": USER, "PASSWORD": PASSWORD}
    with engine(peers, STRATEGY="round_robin", **common) as connection:
        assert ports(connection, 2) == {node.port for node in mariadb_pair}


def test_options_are_merged_key_by_key(mariadb: Node) -> None:
    """OPTIONS are the balancer's, with the peer's keys laid over them; the dicts stay as given."""
    own = {"init_command": "SET @a = 'balancer'", "charset": "utf8mb4"}
    theirs = {"init_command": "SET @a = 'peer'"}
    peer = mysql_peer(mariadb, OPTIONS=theirs)
    with engine([peer], OPTIONS=own, CONNECT_TIMEOUT=3) as connection:
        assert scalar(connection, "SELECT @a") == "peer"
        assert scalar(connection, "SELECT @@character_set_client") == "utf8mb4"
    assert own == {"init_command": "SET @a = 'balancer'", "charset": "utf8mb4"}
    assert theirs == {"init_command": "SET @a = 'peer'"}


def test_name_is_filled_in(mariadb: Node) -> None:
    """A balancer without NAME has that of the first peer that has one, for Django to build on."""
    nameless = {"HOST": mariadb.host, "PORT": mariadb.port + 1}
    with engine([nameless, mysql_peer(mariadb)]) as connection:
        assert connection.settings_dict["NAME"] == DATABASE
        assert connections.databases["balanced"]["NAME"] == DATABASE
        assert connection.creation._get_test_db_name() == f"test_{DATABASE}"


@pytest.mark.parametrize(
    ("settings", "timeouts"),
    [
        # Each attempt has it, but where the peer's OPTIONS have their own.
        ({"CONNECT_TIMEOUT": 3}, [3, 3, 7]),
        # A whole connect() ends with it, whatever an attempt may take.
        ({"CONNECT_TIMEOUT": 3, "CONNECT_DEADLINE": 5}, [3, 2]),
    ],
    ids=str,
)
def test_timeouts_are_the_drivers_option(settings: dict[str, Any], timeouts: list[int]) -> None:
    clock = Clock()
    seen = []

    def hang(**params: Any) -> Any:
        seen.append(params["connect_timeout"])
        clock.advance(params["connect_timeout"])
        raise connection.Database.OperationalError(2013, "Lost connection")

    peers: list[Any] = [{"HOST": "127.0.0.1", "PRIORITY": number} for number in range(3)]
    peers[2]["OPTIONS"] = {"connect_timeout": 7}
    with (
        engine(peers, clock=clock, **settings) as connection,
        mock.patch.object(connection.Database, "connect", hang),
        pytest.raises(NoPeerAvailable) as raised,
    ):
        connection.ensure_connection()
    assert seen == timeouts
    assert str(raised.value).count("tried just now") == len(timeouts)


# PASSWORD as a callable


def test_password_is_called_at_each_attempt(mariadb: Node) -> None:
    """A callable PASSWORD is called at each attempt, so that credentials may rotate."""
    passwords = ["wrong", PASSWORD]
    calls = []

    def password() -> str:
        calls.append(1)
        return passwords[0]

    clock = Clock()
    with engine([mysql_peer(mariadb, PASSWORD=password)], clock=clock) as connection:
        with pytest.raises(OperationalError) as raised:
            connection.ensure_connection()
        assert raised.value.args[0] == 1045
        passwords.pop(0)
        clock.advance(2)
        assert scalar(connection, "SELECT 1") == 1
        connection.close()
        connection.ensure_connection()
        assert len(calls) >= 3
        assert callable(connections.databases["balanced"]["PEERS"][0]["PASSWORD"])


def test_balancers_password_may_be_callable(mariadb: Node) -> None:
    """The balancer's PASSWORD may be callable too: also one that deepcopy copies."""
    peer = mysql_peer(mariadb)
    del peer["PASSWORD"]
    secret = functools.partial(str, PASSWORD)
    with engine([peer], PASSWORD=secret) as connection:
        connection.ensure_connection()
        other = connection.copy()
        other.ensure_connection()
        other.close()
        assert connection.settings_dict["PASSWORD"] is secret


def test_a_failing_password_callable_is_the_callers(mariadb: Node) -> None:
    """What a PASSWORD callable raises is raised as it is, at once, and no peer's fault."""

    def password() -> str:
        raise RuntimeError("the vault is sealed")

    with engine([mysql_peer(mariadb, PASSWORD=password)] * 2) as connection:
        with pytest.raises(RuntimeError, match="sealed"):
            connection.ensure_connection()
        assert {p.breaker.current_state for p in balancers["balanced"].peers.values()} == {"closed"}


def test_no_object_shows_a_password(mariadb: Node) -> None:
    """By its repr, which debuggers and error trackers show of whatever is at hand."""
    url = f"redis://shop:{PASSWORD}@127.0.0.1:1/0"
    # Kept, so that none of these has its number: what other tests have left behind is theirs.
    others = gc.get_objects()
    known = set(map(id, others))
    with engine([mysql_peer(mariadb)], SHARED_STATE=url, TRIALS="background") as connection:
        assert scalar(connection, "SELECT 1") == 1
        settings = connection.settings_dict
        entry = Entry("balanced", settings, connections.databases)
        assert entry.peers[0].merged["PASSWORD"] == PASSWORD
        ours = [
            one
            for one in gc.get_objects()
            if str(type(one).__module__).startswith("django_proxysql") and id(one) not in known
        ]
        assert balancers["balanced"] in ours
        assert {type(one) for one in ours if PASSWORD in repr(one)} == set()


# Several balancers


def test_balancers_have_their_own_peers_and_thresholds(mariadb_pair: Pair) -> None:
    """Two balancers over the same dead server share nothing: peers, thresholds, intervals."""
    dead, alive = (mysql_peer(node) for node in mariadb_pair)
    mariadb_pair[0].kill()
    with (
        engine([dead, alive], alias="left", CHECK_INTERVAL=5, STRATEGY="round_robin") as left,
        engine(
            [dead, {**alive, "BREAKER": {"success_threshold": 2}, "CHECK_INTERVAL": 7}],
            alias="right",
            BREAKER={"fail_max": 2},
            CHECK_INTERVAL=60,
            STRATEGY="round_robin",
        ) as right,
    ):
        for connection in (left, right):
            for _ in range(2):
                connection.ensure_connection()
                connection.close()
        circuits = [balancers[alias].peers["peer0"].breaker for alias in ("left", "right")]
        assert [circuit.current_state for circuit in circuits] == ["open", "closed"]
        assert [circuit.fail_max for circuit in circuits] == [1, 2]
        assert [circuit.reset_timeout for circuit in circuits] == [5, 60]
        other = balancers["right"].peers["peer1"].breaker
        assert (other.fail_max, other.success_threshold, other.reset_timeout) == (2, 2, 7)


def test_balancers_is_a_mapping(tmp_path: pathlib.Path) -> None:
    """``balancers`` has the aliases that are load balancers, and no others."""
    one = sqlite_peer(tmp_path / "one")
    with engine(["one"], databases={"one": {"ENGINE": SQLITE, **one}}, alias="left"):
        assert list(balancers) == ["left"]
        assert len(balancers) == 1
        assert "left" in balancers
        assert "one" not in balancers
        assert "default" not in balancers
        with pytest.raises(KeyError):
            balancers["one"]
        assert balancers["left"] is balancers["left"]
        # A copied entry leads to the same circuits, by whichever alias.
        connections["left"]
        connections.databases["tenant"] = {**connections.databases["left"], "NAME": "x"}
        try:
            assert balancers["tenant"] is balancers["left"]
        finally:
            del connections.databases["tenant"]


def test_first_look_that_is_interrupted_is_followed_by_another(tmp_path: pathlib.Path) -> None:
    """At whichever line: what was noted of the settings until then is no half of them."""
    with engine([sqlite_peer(tmp_path / "one")], PEER_ENGINE=SQLITE):
        for strike in strikes([registry.__file__], least=30):
            forget()
            strike.hits(lambda: balancers["balanced"])
            assert balancers["balanced"].name == "balanced", strike.where


# The dict in django.db.connections


def test_settings_dict_is_never_replaced(mariadb_pair: Pair, receive: Any) -> None:
    """connection.settings_dict is DATABASES' own dict, also while connecting and failing."""
    seen = []

    def receiver(connection: Any, **kwargs: Any) -> None:
        seen.append(connection.settings_dict)

    mariadb_pair[0].kill()
    peers = [mysql_peer(mariadb_pair[0]), mysql_peer(mariadb_pair[1], PRIORITY=1)]
    with engine(peers) as connection:
        own = connections.databases["balanced"]
        before = dict(own)
        receive(connection_created, receiver)
        assert connection.settings_dict is own
        connection.ensure_connection()
        assert connection.peer.name == "peer1"
        assert seen == [own]
        assert seen[0] is own
        mariadb_pair[1].kill()
        connection.close()
        with pytest.raises(NoPeerAvailable):
            connection.ensure_connection()
        assert connection.settings_dict is own
        assert own == before


# NAME and the test runner


def test_rewritten_name_wins(mariadb_pair: Pair) -> None:
    """A NAME rewritten in place wins over every peer's, in this thread and in a new one."""
    for node in mariadb_pair:
        node.create_database("another_name")
        node.sql("GRANT ALL PRIVILEGES ON another_name.* TO 'app'@'%'")
    peers = [mysql_peer(node) for node in mariadb_pair]
    with engine(peers, STRATEGY="round_robin") as connection:
        assert scalar(connection, "SELECT DATABASE()") == DATABASE
        connection.close()
        connection.settings_dict["NAME"] = "another_name"
        for _ in range(2):
            assert scalar(connection, "SELECT DATABASE()") == "another_name"
            connection.close()
            name = in_thread(lambda: scalar(connections["balanced"], "SELECT DATABASE()"))
            assert name == "another_name"
        connection.settings_dict["NAME"] = DATABASE
        assert scalar(connection, "SELECT DATABASE()") == DATABASE


def test_every_rewritten_key_wins(mariadb: Node) -> None:
    """USER, PASSWORD and single OPTIONS that were rewritten win over the peer's, too."""
    peer = mysql_peer(mariadb, OPTIONS={"charset": "latin1", "init_command": "SET @a = 1"})
    with engine([peer]) as connection:
        settings = connection.settings_dict
        settings.update(USER=ADMIN, PASSWORD=ADMIN_PASSWORD, OPTIONS={"charset": "utf8mb4"})
        assert scalar(connection, "SELECT CURRENT_USER()") == f"{ADMIN}@%"
        assert scalar(connection, "SELECT @@character_set_client") == "utf8mb4"
        assert scalar(connection, "SELECT @a") == 1


@pytest.mark.parametrize("name", ["", None, DATABASE])
def test_unnamed_database(mariadb: Node, name: str | None) -> None:
    """_nodb_cursor connects without a database, though each peer has one."""
    with engine([mysql_peer(mariadb)], NAME=name) as connection:
        with nodb_cursor(connection) as cursor:
            cursor.execute("SELECT DATABASE(), @@port")
            assert cursor.fetchone() == (None, mariadb.port)
        assert scalar(connection, "SELECT DATABASE()") == DATABASE


def test_balancers_of_other_servers_have_test_databases_of_their_own(mariadb_pair: Pair) -> None:
    """Two balancers with one NAME and other peers share no test database."""
    first, second = (
        [mysql_peer(node, USER=ADMIN, PASSWORD=ADMIN_PASSWORD)] for node in mariadb_pair
    )
    with engine(first, alias="default"), engine(second, alias="second"):
        config = setup_databases(verbosity=0, interactive=False, aliases={"default", "second"})
        try:
            for number, node in enumerate(mariadb_pair, 1):
                assert "test_app" in node.sql("SHOW DATABASES")
                Token.objects.using("second").create(value=str(number))
            assert Token.objects.using("default").count() == 0
        finally:
            teardown_databases(config, verbosity=0)


# The merge itself


def test_defaults_that_come_later_change_nothing() -> None:
    """Django before 4.1 fills in what an entry leaves out when its first connection is made."""
    bare = {"ENGINE": ENGINE, "PEERS": [{"HOST": "10.0.0.1", "NAME": "shop"}]}
    full = {**bare, **dict.fromkeys(CONNECTION_KEYS, ""), "OPTIONS": {}}
    for before, after in ((bare, full), (full, bare), (bare, bare)):
        assert changed_keys(after, first_reading(before)) == []
    assert changed_keys({**full, "NAME": None}, first_reading(bare)) == ["NAME"]


def test_asked_for_before_its_first_connection(mariadb: Node) -> None:
    """A balancer that is asked for first, as in an app's ready(), is the same one."""
    with engine([mysql_peer(mariadb)]):
        entry = connections.databases["balanced"]
        for key in CONNECTION_KEYS:
            # As Django before 4.1 has it until then.
            del entry[key]
        del connections["balanced"]
        forget()
        assert balancers["balanced"].peers["peer0"].address == f"127.0.0.1:{mariadb.port}"
        for key, default in (*dict.fromkeys(CONNECTION_KEYS, "").items(), ("OPTIONS", {})):
            entry[key] = entry.get(key) or default
        connections["balanced"].ensure_connection()
        assert entry["NAME"] == DATABASE


def test_merged_settings_prefer_what_was_changed() -> None:
    """Each key is the peer's, unless the balancer's is not what was first read."""
    first = {"NAME": "shop", "HOST": "", "OPTIONS": {"a": 1, "b": 1}}
    peer = {"NAME": "peers", "HOST": "h", "USER": "", "OPTIONS": {"a": 2, "b": 2, "c": 2}}
    own = {"NAME": "shop", "HOST": "", "USER": "u", "OPTIONS": {"a": 1, "b": 9, "d": 1}, "X": 1}
    assert merged_settings(peer, own, {**first, "USER": "u"}) == {
        "NAME": "peers",
        "HOST": "h",
        "USER": "u",
        "OPTIONS": {"a": 2, "b": 9, "c": 2, "d": 1},
        "X": 1,
    }
    own["NAME"] = "test_shop"
    assert merged_settings(peer, own, first)["NAME"] == "test_shop"
    # A path compares by what it says, not by being a path.
    paths = {"NAME": pathlib.Path("one")}, {"NAME": pathlib.Path("two")}
    assert merged_settings(peer, *paths)["NAME"] == pathlib.Path("one")


@pytest.mark.parametrize(
    ("settings", "address"),
    [
        ({"HOST": "10.0.0.1", "PORT": 3307}, "10.0.0.1:3307"),
        ({"OPTIONS": {"host": "10.0.0.1", "port": 3307}}, "10.0.0.1:3307"),
        ({"HOST": "10.0.0.1", "OPTIONS": {"port": 3307}}, "10.0.0.1:3307"),
        ({"PORT": "3307", "OPTIONS": {"host": "10.0.0.1"}}, "10.0.0.1:3307"),
        ({"PORT": "5433", "OPTIONS": {"hostaddr": "10.0.0.1"}}, "10.0.0.1:5433"),
        ({"OPTIONS": {"unix_socket": "/run/db.sock"}}, "/run/db.sock"),
        ({}, "shop"),
    ],
    ids=str,
)
def test_a_peers_address_is_where_it_leads(settings: dict[str, Any], address: str) -> None:
    """In logs, on pages, and among the processes that share what they know of it."""
    (peer,) = balancer_config("x", {"NAME": "shop", "PEERS": [settings]}, {}).peers
    assert peer.address == address


def test_params_hold_connection_settings_only() -> None:
    """What is kept of a peer is what it is connected to with."""
    entry = {"PEERS": [{"HOST": "h", "WEIGHT": 2, "USER": "u"}]}
    (peer,) = balancer_config("x", entry, {}).peers
    assert peer.params == {"HOST": "h", "USER": "u"}
    assert set(peer.params) <= set(CONNECTION_KEYS)
    assert peer.weight == 2
