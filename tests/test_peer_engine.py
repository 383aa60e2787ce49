"""An alias that serves as a peer: its own engine, but for what is asked without a connection."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import json
import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import django
import pytest
from django.core import checks
from django.core.exceptions import ImproperlyConfigured
from django.core.management import call_command
from django.db import Error, OperationalError, connections, transaction
from django.db.utils import load_backend

from django_proxysql import NotReady, balancers, inspection
from django_proxysql.backends.peer.base import DatabaseWrapper
from django_proxysql.conf.aliases import introduce_peers
from django_proxysql.conf.engines import PeerEngine
from django_proxysql.conf.keys import ENGINE, PEER_ALIAS_ENGINE
from django_proxysql.conf.reading import problems
from tests.app.models import Token
from tests.children import in_child
from tests.engine import MYSQL, POSTGRESQL, SQLITE, added, engine, mysql_peer, nodb_cursor
from tests.fakes import in_thread
from tests.servers.faultproxy import FaultProxy
from tests.servers.mariadb import Node
from tests.servers.postgresql import PostgreSQLNode
from tests.site import with_table
from tests.test_connecting import sockets

Pair = tuple[Node, Node]
Postgres = tuple[PostgreSQLNode, PostgreSQLNode]
Entries = dict[str, dict[str, Any]]


def alias(server: Any, engine: str = MYSQL, **settings: Any) -> dict[str, Any]:
    return {"ENGINE": engine, **mysql_peer(server), **settings}


def balancer(*peers: str, **settings: Any) -> dict[str, Any]:
    return {"ENGINE": ENGINE, "PEERS": list(peers), **settings}


def ask(connection: Any, statement: str = "SELECT @@port") -> Any:
    """Return the first value that a statement gives."""
    with connection.cursor() as cursor:
        cursor.execute(statement)
        return cursor.fetchone()[0]


@contextlib.contextmanager
def introduced(peers: Entries, **settings: Any) -> Iterator[None]:
    """Have these aliases, and a balancer over them that has made them known."""
    with added({**peers, "balanced": balancer(*peers, **settings)}):
        introduce_peers()
        yield


# Who has it


def test_aliases_that_are_peers_have_it(mariadb: Node) -> None:
    """They and no others; each is an instance of its own engine's class."""
    entries = {"peer0": alias(mariadb), "other": alias(mariadb), "balanced": balancer("peer0")}
    with added(entries):
        before = connections.databases["peer0"]
        introduce_peers()
        introduce_peers()
        assert connections.databases["peer0"] is before
        real = load_backend(MYSQL).DatabaseWrapper
        assert type(connections["other"]) is real
        peer = connections["peer0"]
        assert isinstance(peer, DatabaseWrapper)
        assert isinstance(peer, real)
        assert peer.settings_dict is before
        assert (peer.vendor, peer.alias) == ("mysql", "peer0")
        assert isinstance(peer.features, real.features_class)
        assert type(peer.ops) is real.ops_class
        for made in (copy.copy(peer), peer.copy(), peer.copy("another")):
            assert type(made) is type(peer)


def test_made_known_by_the_balancer(mariadb: Node) -> None:
    """Without the app, whichever connection to the balancer is made first makes them known."""
    with added({"balanced": balancer("peer0"), "peer0": alias(mariadb)}):
        assert not isinstance(connections.databases["peer0"]["ENGINE"], PeerEngine)
        assert connections["balanced"].alias == "balanced"
        assert isinstance(connections["peer0"], DatabaseWrapper)


def test_engine_is_what_the_user_wrote() -> None:
    """For code that compares, looks up, stores or copies it; only to Django's import it is ours."""
    one = PeerEngine(MYSQL, "balanced", "peer0")
    assert one == MYSQL
    assert {MYSQL: 1}[one] == 1
    assert "mysql" in one
    assert one.startswith("django.db")
    assert repr(one) == repr(MYSQL)
    assert json.dumps({"ENGINE": one}) == json.dumps({"ENGINE": MYSQL})
    assert type(one.path) is str
    for made in (copy.copy(one), copy.deepcopy(one), pickle.loads(pickle.dumps(one))):
        assert (made, made.balancer, made.peer) == (one, "balanced", "peer0")
    assert load_backend(one).DatabaseWrapper is DatabaseWrapper


def test_a_peer_of_two(mariadb: Node) -> None:
    """It is the first's; when that is there no longer, the other's."""
    entries = {"peer0": alias(mariadb), "one": balancer("peer0"), "two": balancer("peer0")}
    with added(entries):
        introduce_peers()
        given: Any = connections.databases["peer0"]["ENGINE"]
        assert given.balancer == "one"
        connections.databases["one"]["PEERS"] = [mysql_peer(mariadb)]
        introduce_peers()
        again: Any = connections.databases["peer0"]["ENGINE"]
        assert again.balancer == "two"


def test_named_by_hand() -> None:
    """The engine is not one to write into DATABASES."""
    with added({"peer0": {"ENGINE": PEER_ALIAS_ENGINE, "NAME": "x"}}):
        with pytest.raises(ImproperlyConfigured, match="is no ENGINE to name"):
            connections["peer0"].ensure_connection()
        connections["peer0"] = mock.Mock()


def test_engine_that_cannot_be_imported() -> None:
    """Django says what it says of any such alias: the ENGINE that the user wrote."""
    with introduced({"peer0": {"ENGINE": "nonesuch"}}):
        (problem,) = problems("balanced", connections.databases["balanced"], connections.databases)
        assert problem.id == "django_proxysql.E013"
        assert "ENGINE of the peers is 'nonesuch'" in problem.msg
        with pytest.raises(ImproperlyConfigured, match="'nonesuch' isn't an available"):
            connections["peer0"].ensure_connection()
        connections["peer0"] = mock.Mock()


def test_without_its_balancer(mariadb: Node) -> None:
    """A connection outlives its balancer's entry as a plain one."""
    with introduced({"peer0": alias(mariadb)}):
        peer = connections["peer0"]
        with mock.patch.dict(connections.databases):
            del connections.databases["balanced"]
            assert peer.features.connection is peer
            peer.ensure_connection()
            assert peer.mysql_is_mariadb


# What is asked, and of which server


@pytest.fixture
def dead_and_alive(mariadb_pair: Pair) -> Entries:
    """A balancer over two aliases, of which the first is down."""
    dead, alive = mariadb_pair
    dead.kill()
    return {"peer0": alias(dead), "peer1": alias(alive)}


def test_asks_no_dead_peer(dead_and_alive: Entries) -> None:
    """Features, types and the server's version, as Django's checks and migrations ask for them."""
    with introduced(dead_and_alive):
        peer = connections["peer0"]
        assert peer.features.has_select_for_update
        assert peer.features.supports_column_check_constraints is not None
        assert peer.data_types["AutoField"]
        assert peer.data_type_check_constraints is not None
        assert peer.mysql_is_mariadb
        assert peer.connection is None
        assert peer.features.connection is connections["balanced"]
        assert Token._meta.get_field("value").db_type(peer)
        # A connection to the peer is one to the peer.
        with pytest.raises(OperationalError, match="2002"):
            peer.cursor()
        with pytest.raises(OperationalError, match="2002"), peer.temporary_connection():
            pass


def said(connection: Any) -> list[Any]:
    """Return what a wrapper says of its server; not every Django has all of it."""
    names = ("mysql_version", "mysql_server_info", "mysql_is_mariadb", "display_name", "data_types")
    return [getattr(connection, name, None) for name in names]


@pytest.mark.parametrize("version", ["10.12.3-MariaDB", "8.4.9"])
def test_connected_it_is_asked_itself(mariadb_pair: Pair, version: str) -> None:
    """Of a MySQL among peers that are MariaDB nothing is MariaDB's any more."""
    first, second = mariadb_pair
    second.options.append(f"--version={version}")
    second.kill()
    second.start()
    with introduced({"peer0": alias(first), "peer1": alias(second, PRIORITY=1)}):
        peer, other = connections["peer1"], connections["balanced"]
        assert peer.features.connection is other
        # Asked before, it has what the balancer said, and what was concluded from it.
        assert said(peer) == said(other)
        peer.ensure_connection()
        assert peer.features.connection is peer
        own = real_wrapper(peer)
        try:
            assert said(peer) == said(own) != said(other)
        finally:
            own.close()
        # What it said is kept when it is closed.
        peer.close()
        assert said(peer) != said(other)


def real_wrapper(connection: Any) -> Any:
    """Return a wrapper of Django's own engine with the same settings."""
    wrapper = load_backend(MYSQL).DatabaseWrapper
    return wrapper({**connection.settings_dict, "ENGINE": MYSQL}, "plain")


@pytest.mark.parametrize("features_first", [False, True])
def test_asked_where_the_balancer_has_no_peer(mariadb: Node, features_first: bool) -> None:
    """READY_CHECK refuses them all: a peer that is up says of itself what it is."""
    entries = {"peer0": alias(mariadb), "peer1": alias(mariadb)}
    with introduced(entries, READY_CHECK="tests.test_peer_engine.not_ready"):
        peer = connections["peer0"]
        # Of the features one that the server is asked for, in every Django.
        if features_first:
            assert isinstance(peer.features.has_zoneinfo_database, bool)
        assert peer.mysql_is_mariadb
        assert peer.data_types["AutoField"]
        assert isinstance(peer.features.has_zoneinfo_database, bool)
        with pytest.raises(OperationalError):
            connections["balanced"].ensure_connection()
        assert ask(peer, "SELECT 1") == 1


def not_ready(connection: Any) -> None:
    """A READY_CHECK that none passes."""
    raise NotReady("not yet")


def test_features_can_be_patched(mariadb: Node) -> None:
    """As tests do: for the balancer's, whose they are, and for a while."""
    with introduced({"peer0": alias(mariadb)}):
        features = connections["peer0"].features
        with mock.patch.object(features, "has_bulk_insert", "patched"):
            assert connections["balanced"].features.has_bulk_insert == "patched"
            assert connections["peer0"].features.has_bulk_insert == "patched"
        assert connections["peer0"].features.has_bulk_insert is True
        assert "has_bulk_insert" not in vars(connections["balanced"].features)


def test_not_asked_of_a_broken_transaction(mariadb: Node) -> None:
    """In a transaction of the balancer's that has failed, the peer itself is asked."""
    with introduced({"peer0": alias(mariadb)}), transaction.atomic("balanced"):
        transaction.set_rollback(True, "balanced")
        assert connections["peer0"].features.connection is connections["peer0"]
        assert connections["peer0"].mysql_is_mariadb
        assert connections["peer0"].connection is None
        transaction.set_rollback(False, "balanced")


def test_each_thread_has_its_own(mariadb: Node) -> None:
    """Features come from the balancer's connection of the same thread."""
    found: list[Any] = []

    def ask() -> None:
        found.extend([connections["peer0"].features, connections["balanced"].features])
        connections.close_all()

    with introduced({"peer0": alias(mariadb)}):
        in_thread(ask)
        assert found[0].connection is found[1].connection is not connections["balanced"]


def test_balancer_with_an_error(mariadb: Node) -> None:
    """Where the balancer is misconfigured its peers are as they always were."""
    with introduced({"peer0": alias(mariadb)}, CHECK_INTERVAL=-1):
        peer = connections["peer0"]
        assert peer.features.connection is peer
        assert ask(peer, "SELECT 1") == 1


# Connecting


def test_queries_go_to_the_peer(mariadb_pair: Pair) -> None:
    """Each alias is its own server, and works as on the plain engine."""
    entries = {f"peer{n}": alias(node) for n, node in enumerate(mariadb_pair)}
    with introduced(entries):
        for number, node in enumerate(mariadb_pair):
            connection = connections[f"peer{number}"]
            assert ask(connection) == node.port
            with nodb_cursor(connection) as cursor:
                cursor.execute("SELECT @@port, DATABASE()")
                assert cursor.fetchone() == (node.port, None)
            with_table(connection)
            Token.objects.using(connection.alias).create(value="one")
            assert Token.objects.using(connection.alias).get().value == "one"


def test_connect_timeout(fault_proxy: Callable[..., FaultProxy], mariadb: Node) -> None:
    """A peer that accepts and says nothing is given up after CONNECT_TIMEOUT; OPTIONS go first."""
    proxy = fault_proxy(mariadb)
    entries = {
        "peer0": alias(proxy, PASSWORD=lambda: mysql_peer(mariadb)["PASSWORD"]),
        "own": alias(proxy, OPTIONS={"connect_timeout": 2}),
    }
    with introduced(entries, CONNECT_TIMEOUT=1):
        assert connections["own"].get_connection_params()["connect_timeout"] == 2
        peer = connections["peer0"]
        assert peer.get_connection_params()["connect_timeout"] == 1
        assert ask(peer, "SELECT 1") == 1
        peer.close()
        proxy.accept_and_hang()
        with pytest.raises(OperationalError, match=r"2013|2002"):
            peer.ensure_connection()


def test_freezes_when_it_has_let_us_in(mariadb: Node) -> None:
    """A peer in doubt is tried by a connection that is thrown away and has a read timeout."""
    with introduced({"peer0": alias(mariadb)}, TRIAL_TIMEOUT=2):
        peer = connections["peer0"]
        with mock.patch.object(peer.Database, "connect", wraps=peer.Database.connect) as connect:
            peer.ensure_connection()
            peer.close()
            assert [call.kwargs.get("read_timeout") for call in connect.mock_calls] == [None]
            connect.reset_mock()
            balancers["balanced"].peers["peer0"].breaker.suspect("went away")
            peer.ensure_connection()
        assert [call.kwargs.get("read_timeout") for call in connect.mock_calls[:1]] == [2]
        assert "read_timeout" not in connect.mock_calls[-1].kwargs


def test_postgresql(postgres_pair: Postgres) -> None:
    """PostgreSQL: the dead peer is not asked, the other's timeout is libpq's."""
    dead, alive = postgres_pair
    dead.kill()
    entries = {"peer0": alias(dead, POSTGRESQL), "peer1": alias(alive, POSTGRESQL)}
    with introduced(entries, CONNECT_TIMEOUT=3):
        peer = connections["peer0"]
        assert peer.pg_version >= 150000
        assert peer.features.supports_transactions
        assert peer.connection is None
        with pytest.raises(OperationalError):
            peer.ensure_connection()
        assert connections["peer1"].get_connection_params()["connect_timeout"] == 3
        assert ask(connections["peer1"], "SELECT 1") == 1


@pytest.mark.skipif(
    not hasattr(load_backend(POSTGRESQL).DatabaseWrapper, "close_pool"),
    reason="pools came with Django 5.1",
)
def test_pool(postgres_pair: Postgres) -> None:
    """The balancer's pools are its own: a direct connection is made there and then."""
    dead, alive = postgres_pair
    dead.kill()
    passwords = mock.Mock(side_effect=lambda: mysql_peer(alive)["PASSWORD"])
    pool = {"pool": {"min_size": 1, "timeout": 1}}
    entries = {
        "peer0": alias(dead, POSTGRESQL, OPTIONS=pool),
        "peer1": alias(alive, POSTGRESQL, OPTIONS=pool, PASSWORD=passwords),
    }
    with introduced(entries, CONNECT_TIMEOUT=2):
        # The driver's own error, and not that a pool could not be filled in time.
        with pytest.raises(OperationalError, match="refused"):
            connections["peer0"].ensure_connection()
        peer = connections["peer1"]
        for count in (1, 2):
            assert ask(peer, "SELECT 1") == 1
            assert peer.pool is None
            assert passwords.call_count == count
            peer.close()
        peer.close_pool()
        assert connections["balanced"].pool is not None


def test_sqlite(tmp_path: Path) -> None:
    """SQLite: files have no timeout, and work."""
    entries = {"peer0": {"ENGINE": SQLITE, "NAME": str(tmp_path / "db")}}
    with added({**entries, "balanced": balancer("peer0")}):
        introduce_peers()
        with_table(connections["balanced"])
        Token.objects.using("peer0").create(value="one")
        assert Token.objects.using("balanced").get().value == "one"


def test_over_django_prometheus(mariadb: Node) -> None:
    """Another package's engine stays what it is below ours."""
    # What the extra [test] brings on one Python only.
    metrics = pytest.importorskip("django_prometheus.db").metrics
    path = "django_prometheus.db.backends.mysql"
    with introduced({"peer0": alias(mariadb, path)}):
        peer = connections["peer0"]
        assert isinstance(peer, load_backend(path).DatabaseWrapper)
        assert ask(peer, "SELECT 1") == 1
        assert metrics.connections_total.labels("peer0", "mysql")._value.get() == 1


# Forked


@pytest.mark.skipif(not hasattr(os, "fork"), reason="fork is Unix's")
@pytest.mark.server
@pytest.mark.parametrize(
    ("pair", "path", "function"),
    [
        ("mariadb_pair", MYSQL, "CONNECTION_ID()"),
        ("postgres_pair", POSTGRESQL, "pg_backend_pid()"),
    ],
)
def test_forked(pair: str, path: str, function: str, request: pytest.FixtureRequest) -> None:
    """A child leaves its parent's connection alone, and makes its own."""
    with introduced({"peer0": alias(request.getfixturevalue(pair)[0], path)}):
        peer = connections["peer0"]

        def number() -> Any:
            return ask(peer, f"SELECT {function}")

        mine = number()
        its = os.readlink(f"/proc/self/fd/{peer.connection.fileno()}")
        assert its in sockets()

        def work() -> str:
            is_there, other = its in sockets(), number()
            peer.close()
            return f"{is_there} {other != mine}"

        assert in_child(work) == "False True"
        assert number() == mine
        # In a transaction, which is the parent's.
        with transaction.atomic("peer0"):
            mine = number()

            def fail() -> str:
                try:
                    number()
                except Error:
                    return "error"
                return "no error"

            assert in_child(fail) == "error"
            assert number() == mine


@pytest.mark.skipif(not hasattr(os, "fork"), reason="fork is Unix's")
def test_forked_after_a_loss(mariadb: Node) -> None:
    """The number of a socket that the driver has closed may be another's: it is let alone."""
    with introduced({"peer0": alias(mariadb)}):
        peer = connections["peer0"]
        peer.ensure_connection()
        number = peer.connection.fileno()
        mariadb.sql(f"KILL {peer.connection.thread_id()}")
        with pytest.raises(OperationalError):
            ask(peer)
        with open(os.devnull, "rb") as file:
            # Whatever the driver says of its socket now: the number is a file's.
            taken = number if file.fileno() == number else os.dup2(file.fileno(), number)
            with mock.patch.object(peer._driver, "leave") as leave:
                assert in_child(lambda: f"{leave.call_count}") == "0"
            if taken != file.fileno():
                os.close(taken)


# The checks


def check(*databases: str) -> list[Any]:
    if django.VERSION < (3, 1):
        # Then Django asks all aliases, and only where migrate has it do so.
        found = [message for name in databases for message in connections[name].validation.check()]
    else:
        registry = checks.registry.registry
        # Apps that other tests have loaded stay registered, and connect to every alias.
        ours = {
            one for one in registry.registered_checks if one.__module__.startswith("django.core")
        }
        ours |= {one for one in registry.registered_checks if "proxysql" in one.__module__}
        with mock.patch.object(registry, "registered_checks", ours):
            found = checks.run_checks(databases=databases, tags=[checks.Tags.database])
    return [message for message in found if (message.id or "").startswith("django_proxysql")]


def test_check_of_a_dead_peer(dead_and_alive: Entries) -> None:
    """check --database of a peer that is down: a warning."""
    with introduced(dead_and_alive):
        (message,) = check("peer0", "peer1")
        assert (message.id, message.level) == ("django_proxysql.W007", checks.WARNING)
        assert "Peer 'peer0' cannot be reached" in message.msg
        assert "2002" in message.msg
        assert connections["peer1"].connection is None
        connections["peer1"].ensure_connection()
        assert check("peer1") == []
        assert connections["peer1"].connection is not None


def test_check_of_versions(mariadb_pair: Pair) -> None:
    """Peers that are not of one version: a warning, which names them."""
    first, second = mariadb_pair
    peers = [mysql_peer(node) for node in mariadb_pair]
    printed = io.StringIO()
    with engine(peers):
        assert check("balanced") == []
    for version, said in (("10.12.3-MariaDB", "MariaDB 10.12"), ("8.4.9", "MySQL 8.4")):
        second.options[:] = [*first.options, f"--version={version}"]
        second.kill()
        second.start()
        with engine(peers) as connection:
            (message,) = check("balanced")
            assert (message.id, message.level) == ("django_proxysql.W005", checks.WARNING)
            assert f"(peer0: MariaDB 10.11; peer1: {said})" in message.msg
            with pytest.raises(SystemExit):
                call_command("peers", "balanced", stdout=printed)
            differ = f"differ in their version: peer0: MariaDB 10.11; peer1: {said}."
            assert differ in printed.getvalue()
            # Nothing else is left behind: neither connections nor open circuits.
            # (Django 2.2's own check leaves the balancer's connection open.)
            connection.close()
            assert [state.connections for state in balancers["balanced"].snapshot()] == [0, 0]
            assert {state.state for state in balancers["balanced"].snapshot()} == {"closed"}


def test_check_of_versions_passes_by_what_is_down(mariadb_pair: Pair) -> None:
    """A peer that is dead or hangs is passed by, and its circuit is as it was."""
    first, second = mariadb_pair
    second.freeze()
    with engine([mysql_peer(node) for node in mariadb_pair], CONNECT_TIMEOUT=1):
        assert inspection.different_versions("balanced") == []
        assert {state.state for state in balancers["balanced"].snapshot()} == {"closed"}
    second.thaw()
    assert first.sql("SELECT 1").strip() == "1"


def test_check_of_versions_on_postgresql(postgres_pair: Postgres) -> None:
    """Minor versions of PostgreSQL make no difference."""
    found = mock.patch.object(inspection, "inspect")
    with engine([mysql_peer(node) for node in postgres_pair], PEER_ENGINE=POSTGRESQL):
        assert check("balanced") == []
        answered = inspection.inspect(["balanced"])["balanced"]
        for version, said in (("PostgreSQL 15.1", ""), ("PostgreSQL 16.2", "PostgreSQL 16")):
            other = dataclasses.replace(answered[1], version=version)
            with found as asked:
                asked.return_value = {"balanced": (answered[0], other)}
                messages = check("balanced")
            words = [f"(peer0: PostgreSQL 15; peer1: {said})"] if said else []
            assert [message.msg.partition("servers ")[2] for message in messages] == [
                f"{word}." for word in words
            ]


# Schema changes


def test_schema_editor_stays_on_one_peer(mariadb_pair: Pair) -> None:
    """However often the connection is closed, and though an operator drains the peer."""
    peers = [mysql_peer(node) for node in mariadb_pair]
    with engine(peers, STRATEGY="round_robin") as connection:
        before = ask(connection)
        with connection.schema_editor() as editor:
            for step in range(4):
                editor.execute("SELECT 1")
                assert ask(connection) == before
                if step == 1:
                    balancers["balanced"].drain(connection.peer)
                else:
                    connection.close()
        assert ask(connection) != before


def test_schema_editor_goes_where_its_first_statement_went(mariadb_pair: Pair) -> None:
    """Begun without a connection it stays on whichever peer it gets; a dead one it does not get."""
    dead, alive = mariadb_pair
    peers = [mysql_peer(node) for node in mariadb_pair]
    with engine(peers, STRATEGY="round_robin") as connection:
        dead.kill()
        with connection.schema_editor() as editor:
            for _ in range(3):
                editor.execute("SELECT 1")
                assert ask(connection) == alive.port
                connection.close()


def test_schema_editor_that_fails_ends_the_pin(mariadb_pair: Pair) -> None:
    """Whether it fails on the way in or inside, the thread is free afterwards."""
    peers = [mysql_peer(node) for node in mariadb_pair]
    with engine(peers) as connection:
        db = balancers["balanced"]
        with pytest.raises(OperationalError, match="1"), connection.schema_editor() as editor:
            assert db.group.affinity.pin() is not None
            raise OperationalError(1)
        assert db.group.affinity.pin() is None
        editor = connection.schema_editor()
        real = load_backend(MYSQL).DatabaseWrapper.SchemaEditorClass
        hit = mock.patch.object(real, "__enter__", side_effect=KeyboardInterrupt)
        with hit, pytest.raises(KeyboardInterrupt):
            editor.__enter__()
        assert db.group.affinity.pin() is None
        # Never left at all, as by an asynchronous exception.
        editor.__enter__()
        assert db.group.affinity.pin() is not None
        del editor
        assert db.group.affinity.pin() is None


def test_schema_editor_whose_peer_dies(mariadb_pair: Pair) -> None:
    """What is left of a migration does not go to another peer: an error."""
    peers = [mysql_peer(node) for node in mariadb_pair]
    with engine(peers) as connection:
        with pytest.raises(OperationalError), connection.schema_editor() as editor:
            editor.execute("SELECT 1")
            node = next(node for node in mariadb_pair if node.port == ask(connection))
            node.kill()
            connection.close()
            editor.execute("SELECT 1")
        # The next one goes elsewhere.
        with connection.schema_editor() as editor:
            editor.execute("SELECT 1")
            assert ask(connection) != node.port


# Mirrors


def test_chain_of_mirrors() -> None:
    """The last of a chain has the test database of its end, in whichever order they stand."""
    with added(
        {
            "last": balancer("peer0", TEST={"MIRROR": "middle"}, NAME="three"),
            "middle": balancer("peer1", TEST={"MIRROR": "first"}, NAME="two"),
            "first": {"ENGINE": ENGINE, "PEERS": [{"HOST": "c"}], "NAME": "one"},
            "peer0": {"ENGINE": MYSQL, "HOST": "a", "NAME": "three"},
            "peer1": {"ENGINE": MYSQL, "HOST": "b", "NAME": "two", "TEST": {"MIRROR": "last"}},
        }
    ):
        introduce_peers()
        assert connections.databases["peer0"]["TEST"]["MIRROR"] == "first"
        connections.databases["first"]["NAME"] = "test_one"
        for name in ("last", "middle", "peer0", "peer1"):
            link = connections[name].settings_dict["TEST"]["MIRROR"]
            connections[name].creation.set_as_test_mirror(connections[link].settings_dict)
            assert connections[name].settings_dict["NAME"] == "test_one"


@pytest.mark.parametrize("links", [["balanced"], ["other", "balanced"], ["other", "other"]])
def test_ring_of_mirrors(links: list[str]) -> None:
    """A chain that leads back is refused: each would be given the name of production."""
    entries = {
        "balanced": balancer("peer0", TEST={"MIRROR": links[0]}),
        "other": balancer("peer0", TEST={"MIRROR": links[-1]}),
        "peer0": {"ENGINE": MYSQL, "HOST": "a", "NAME": "production"},
    }
    with added(entries):
        introduce_peers()
        creation = connections["balanced"].creation
        with pytest.raises(ImproperlyConfigured, match="leads back to where it began"):
            creation.set_as_test_mirror(connections[links[0]].settings_dict)


def test_mirror_of_a_peer() -> None:
    """A balancer may have the test database of one of its peers, which the others then mirror."""
    entries = {
        "balanced": balancer("peer0", "peer1", TEST={"MIRROR": "peer1"}),
        "peer0": {"ENGINE": MYSQL, "HOST": "a", "NAME": "production"},
        "peer1": {"ENGINE": MYSQL, "HOST": "b", "NAME": "production"},
    }
    with added(entries):
        introduce_peers()
        assert connections.databases["peer0"]["TEST"]["MIRROR"] == "peer1"
        test = connections.databases["peer1"].setdefault("TEST", {})
        assert not test.get("MIRROR")
        # Its own TEST is then the one that counts.
        test["DEPENDENCIES"] = []
        assert problems("balanced", connections.databases["balanced"], connections.databases) == []
