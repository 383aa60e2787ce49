"""A connect sends nothing that changes nothing, and leaves the session as the plain engine does."""

from __future__ import annotations

import functools
import os
import sys
import types
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from unittest import mock

import django
import pytest
from django.db import DatabaseError, OperationalError, connections
from django.db.backends.mysql import base
from django.test import override_settings

from django_proxysql import LoadBalancer, balancers
from django_proxysql.backends.proxysql.base import DatabaseWrapper as Ours
from django_proxysql.conf.merging import first_reading, merged_settings
from django_proxysql.core import drivers
from django_proxysql.core.config import BalancerConfig, PeerConfig
from django_proxysql.core.peer import Peer
from django_proxysql.registry import Registered
from tests.engine import MYSQL, added, engine, mysql_peer
from tests.fakes import in_thread
from tests.other_driver import run_again
from tests.servers.faultproxy import FaultProxy
from tests.servers.mariadb import Node

IS_PYMYSQL = os.environ.get("TEST_DRIVER") == "pymysql"
#: Earlier Djangos ask a server by several statements, and keep what they found in several places.
keeps_one_record = pytest.mark.skipif(
    django.VERSION < (3, 2), reason="what Django keeps of a server came with Django 3.2"
)
SESSION = (
    "SELECT @@autocommit, @@sql_mode, @@tx_isolation, @@character_set_client,"
    " @@collation_connection, @@sql_auto_is_null, @@time_zone, @@tx_read_only"
)


class Log:
    """The server's own log of what it was sent."""

    def __init__(self, node: Node) -> None:
        self.node = node
        node.set_global("log_output", "TABLE")
        node.sql("TRUNCATE mysql.general_log")
        node.set_global("general_log", "1")

    def of(self, connection: Any) -> list[str]:
        """Return what one connection has sent since it was greeted, but for this question."""
        with connection.cursor() as cursor:
            cursor.execute("SELECT CONNECTION_ID()")
            (number,) = cursor.fetchone()
        said = self.node.sql(
            "SELECT REPLACE(CONVERT(argument USING utf8mb4), '\\n', ' ') FROM mysql.general_log "
            f"WHERE thread_id = {number} AND command_type IN ('Query', 'Init DB') "
            "ORDER BY event_time"
        )
        return said.splitlines()[:-1]


@pytest.fixture
def log(mariadb: Node) -> Log:
    return Log(mariadb)


@pytest.fixture
def engine_of_another(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Return what makes an engine of a DatabaseWrapper, and returns its name."""

    def make(wrapper: type, name: str = "engine_of_another") -> str:
        package, module = types.ModuleType(name), types.ModuleType(f"{name}.base")
        module.DatabaseWrapper = wrapper  # type: ignore[attr-defined]
        package.base = module  # type: ignore[attr-defined]
        package.__path__ = []
        monkeypatch.setitem(sys.modules, name, package)
        monkeypatch.setitem(sys.modules, f"{name}.base", module)
        return name

    return make


def plain(node: Node, **settings: Any) -> dict[str, Any]:
    return {"ENGINE": MYSQL, **mysql_peer(node), **settings}


def connected(alias: str) -> Any:
    connection = connections[alias]
    connection.ensure_connection()
    return connection


def test_a_connect_sends_what_the_plain_engine_sends_but_for_autocommit(
    mariadb: Node, log: Log
) -> None:
    with added({"plain": plain(mariadb)}), engine([mysql_peer(mariadb)]):
        theirs, ours = log.of(connected("plain")), log.of(connected("balanced"))
    assert [said for said in theirs if "autocommit" not in said.lower()] == ours
    assert len(theirs) - len(ours) == 2


#: The plain engine sends two statements at once to a server that has it on: not by PyMySQL.
AUTO_IS_NULL = [0] if IS_PYMYSQL else [0, 1]
LEVEL = "SET SESSION TRANSACTION ISOLATION LEVEL "
COMMAND = "SET tx_isolation='SERIALIZABLE', time_zone='+01:00'"
OPTIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "a level": {"isolation_level": "serializable"},
    "no level": {"isolation_level": None},
    "a command": {"init_command": COMMAND},
    "a file": {"read_default_file": "my.cnf"},
    "a collation": {"collation": "utf8mb4_bin"},
}


@pytest.fixture
def options(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Any]:
    found = dict(OPTIONS[request.param])
    if "read_default_file" in found:
        file = tmp_path / "my.cnf"
        file.write_text(f"[client]\ninit-command = {COMMAND}\n")
        found["read_default_file"] = str(file)
    return found


def session(connection: Any) -> tuple[Any, ...]:
    """Return how a session is set up, and what the wrapper knows of that."""
    with connection.cursor() as cursor:
        cursor.execute(SESSION)
        (found,) = cursor.fetchall()
    return (*found, connection.isolation_level, connection.autocommit)


def session_of(alias: str) -> tuple[Any, ...]:
    """Return how a new session is set up."""
    connection = connected(alias)
    try:
        return session(connection)
    finally:
        connection.close()


def assert_sessions_are_alike(theirs: dict[str, Any], peer: dict[str, Any], **ours: Any) -> None:
    """A plain alias' session is as a balancer's: where the server is known already, and where not.

    :param theirs: the plain alias' entry.
    :param ours: the balancer's settings, over one ``peer``.
    """
    with added({"plain": theirs}), engine([peer], **ours):
        assert len({session_of(alias) for alias in ("plain", *["balanced"] * 3)}) == 1


@pytest.mark.parametrize("options", OPTIONS, indirect=True)
@pytest.mark.parametrize("auto_is_null", AUTO_IS_NULL)
def test_the_isolation_level_ends_up_as_the_plain_engines(
    mariadb: Node, options: dict[str, Any], auto_is_null: int
) -> None:
    mariadb.set_global("sql_auto_is_null", auto_is_null)
    theirs = plain(mariadb, OPTIONS=options)
    assert_sessions_are_alike(theirs, mysql_peer(mariadb), OPTIONS=options)


@pytest.mark.parametrize("way", ["tls", "unix", "two statements a packet"])
def test_the_session_is_the_plain_engines_by_each_way(
    request: pytest.FixtureRequest, way: str
) -> None:
    node: Node = request.getfixturevalue("mariadb_tls" if way == "tls" else "mariadb")
    peer = mysql_peer(node)
    if way == "tls":
        peer["OPTIONS"] = {"ssl": {"ca": node.ca}}  # type: ignore[attr-defined]
    elif way == "unix":
        peer["HOST"] = str(node.socket)
    settings = {} if way in ("tls", "unix") else {"COMMIT_OUTCOME": "record"}
    assert_sessions_are_alike({"ENGINE": MYSQL, **peer}, peer, **settings)


@pytest.mark.parametrize("of_the_server", [0, 1])
@pytest.mark.parametrize("given", [None, True, False])
@pytest.mark.parametrize("setting", [True, False])
@pytest.mark.parametrize("first", ["", "SET autocommit=0", "SET autocommit=1, sql_mode='ANSI'"])
def test_autocommit_ends_up_as_the_plain_engines(
    mariadb: Node, of_the_server: int, given: bool | None, setting: bool, first: str
) -> None:
    options: dict[str, Any] = {} if given is None else {"autocommit": given}
    if first:
        options["init_command"] = first
    mariadb.set_global("autocommit", of_the_server)
    settings = {"AUTOCOMMIT": setting, "OPTIONS": options}
    assert_sessions_are_alike(plain(mariadb, **settings), mysql_peer(mariadb), **settings)


def asked_by_the_driver(log: Log, connection: Any) -> bool | None:
    """Return whether the driver asked for the isolation level; None: it was not set.

    It does where it sets the character set, in one statement; Django does afterwards.
    """
    connection.ensure_connection()
    said = [statement for statement in log.of(connection) if statement != COMMAND]
    connection.close()
    levels = [one for one in said if "ISOLATION" in one.upper()]
    assert len(levels) <= 1
    assert any("SET NAMES" in one for one in said)
    return "SET NAMES" in levels[0] if levels else None


@pytest.mark.parametrize("options", OPTIONS, indirect=True)
@pytest.mark.parametrize("auto_is_null", AUTO_IS_NULL)
def test_the_driver_asks_for_the_isolation_level_where_that_changes_nothing(
    mariadb: Node, log: Log, options: dict[str, Any], auto_is_null: int
) -> None:
    mariadb.set_global("sql_auto_is_null", auto_is_null)
    is_none = options.get("isolation_level", "") is None
    # PyMySQL runs it after SET NAMES, and Django's level comes last.
    others = (IS_PYMYSQL and "init_command" in options) or "collation" in options
    known = not (auto_is_null or others or django.VERSION < (3, 2))
    with engine([mysql_peer(mariadb)], OPTIONS=options) as connection:
        seen = [asked_by_the_driver(log, connection) for _ in range(3)]
    assert seen == ([None] * 3 if is_none else [False, known, known])


def known_as(peer: Peer, **changes: Any) -> None:
    """Have something else be known of a peer's server."""
    assert peer.server_facts is not None
    peer.server_facts = peer.server_facts._replace(**changes)


@keeps_one_record
@pytest.mark.parametrize("version", ["8.0.36", "10.11.6-MariaDB"])
def test_what_does_not_take_both_is_sent_one_by_one(mariadb: Node, log: Log, version: str) -> None:
    """A server that does not know the variable, say: each has a name of its own for it."""
    with engine([mysql_peer(mariadb)]) as connection:
        before = session_of("balanced")
        peer = balancers["balanced"].peers["peer0"]
        known_as(peer, facts={**peer.server_facts.facts, "version": version})
        connection.ensure_connection()
        said = log.of(connection)
        assert session(connection) == before
    assert len(said) == (1 if "MariaDB" in version else 3)


@keeps_one_record
def test_a_character_set_that_is_set_later_is_that_alone(mariadb: Node) -> None:
    """Code that has the driver's connection may do so: the isolation level stays what it is."""
    with engine([mysql_peer(mariadb)]) as connection:
        session_of("balanced")
        connection.ensure_connection()
        with connection.cursor() as cursor:
            cursor.execute("SET SESSION TRANSACTION ISOLATION LEVEL SERIALIZABLE")
            for name in ("latin1", "utf8mb4"):
                connection.connection.set_character_set(name)
                cursor.execute("SELECT @@character_set_client, @@tx_isolation, 'é'")
                assert cursor.fetchone() == (name, "SERIALIZABLE", "é")


def instead(function: Any, decorate: Any = lambda function: function) -> Any:
    """Return something else that does the same."""
    return decorate(lambda *args, **kwargs: function(*args, **kwargs))


connect = base.Database.connect
#: What is to see the statement, or gets a connection that is connected already.
ONLOOKERS: dict[str, Callable[[Any], AbstractContextManager[Any]]] = {
    "an execute_wrapper": lambda db: db.execute_wrapper(lambda execute, *args: execute(*args)),
    "a query log": lambda db: override_settings(DEBUG=True),
    # As Django Debug Toolbar puts it on the wrapper.
    "a tracer's cursor()": lambda db: mock.patch.object(db, "cursor", instead(db.cursor)),
    "a pool's connect()": lambda db: mock.patch.object(base.Database, "connect", instead(connect)),
    "a tracer's connect()": lambda db: mock.patch.object(
        base.Database, "connect", instead(connect, functools.wraps(connect))
    ),
}


@keeps_one_record
@pytest.mark.parametrize("onlooker", ONLOOKERS.values(), ids=ONLOOKERS)
def test_the_isolation_level_is_djangos_statement_where_there_are_onlookers(
    mariadb: Node, log: Log, onlooker: Callable[[Any], AbstractContextManager[Any]]
) -> None:
    with engine([mysql_peer(mariadb)]) as connection:
        asked_by_the_driver(log, connection)
        with onlooker(connection):
            assert asked_by_the_driver(log, connection) is False
        assert asked_by_the_driver(log, connection) is True


def test_a_failed_connect_leaves_no_isolation_level_unset(
    mariadb: Node, log: Log, fault_proxy: Callable[..., FaultProxy]
) -> None:
    """Code that calls get_new_connection() and init_connection_state() itself gets it set."""
    proxy = fault_proxy(mariadb)
    with engine([mysql_peer(proxy)], LAST_RESORT_INTERVAL=0) as connection:
        asked_by_the_driver(log, connection)
        proxy.refuse()
        with pytest.raises(OperationalError):
            connection.ensure_connection()
        proxy.forward()
        connection.connection = connection.get_new_connection(connection.get_connection_params())
        connection.init_connection_state()
        with connection.cursor() as cursor:
            cursor.execute("SELECT @@tx_isolation, @@GLOBAL.tx_isolation")
            assert cursor.fetchone() == ("READ-COMMITTED", "REPEATABLE-READ")


@pytest.mark.parametrize("is_cut", [False, True])
def test_an_error_of_the_isolation_level_is_one_by_django_and_by_the_driver(
    mariadb: Node,
    fault_proxy: Callable[..., FaultProxy],
    monkeypatch: pytest.MonkeyPatch,
    is_cut: bool,
) -> None:
    """Django asks first; then the wrapper knows the server, and the driver asks."""
    proxy, level = fault_proxy(mariadb), "read committed"
    if not is_cut:
        level = "strict"
        monkeypatch.setattr(base.DatabaseWrapper, "isolation_levels", {level})
    options = {"isolation_level": level}
    said: list[Any] = []
    with engine([mysql_peer(proxy)], OPTIONS=options, LAST_RESORT_INTERVAL=0) as connection:
        peer = balancers["balanced"].peers["peer0"]
        for marker in (LEVEL, "SET NAMES utf8mb4, ", "SET NAMES utf8mb4, "):
            if is_cut:
                proxy.cut_after(marker.encode())
            peer.breaker.close()
            with pytest.raises(DatabaseError) as raised:
                connection.ensure_connection()
            assert connection.connection is None
            # Though the error is kept, and with it all that its traceback refers to.
            proxy.wait_until_idle()
            circuit = peer.breaker.circuit
            said.append((type(raised.value), raised.value.args))
            said.append((circuit.state, circuit.fault, circuit.error, circuit.failures))
    assert said[0:2] == said[2:4] == said[4:6]


def test_a_trial_has_the_isolation_level_set_once(
    mariadb: Node, fault_proxy: Callable[..., FaultProxy]
) -> None:
    """A throw-away connection has no use for it."""
    proxy = fault_proxy(mariadb)
    with engine([mysql_peer(proxy)], LAST_RESORT_INTERVAL=0) as connection:
        session_of("balanced")
        balancers["balanced"].peers["peer0"].breaker.open()
        before = proxy.accepted
        proxy.packets.clear()
        connection.ensure_connection()
        assert proxy.accepted - before == 2
        assert sum(b"isolation" in packet.lower() for packet in proxy.packets) == 1


def overridden(wrapper: Any, method: str, does: Callable[..., Any]) -> Any:
    """Return an engine's class whose ``method`` does that, given itself and the plain one."""

    def theirs(self: Any, *args: Any, **kwargs: Any) -> Any:
        return does(self, getattr(super(made, self), method), *args, **kwargs)

    made = type("DatabaseWrapper", (wrapper,), {method: theirs})
    return made


def with_level(connection: Any) -> Any:
    connection.cursor().execute(f"{LEVEL}SERIALIZABLE")
    return connection


def opened(connection: Any, plain: Any, params: dict[str, Any]) -> Any:
    """Return a connection that is opened past Django's method."""
    ours = {"connect_timeout", "autocommit"}
    return connection.Database.connect(**{key: params[key] for key in params if key not in ours})


def adding(**params: Any) -> tuple[str, Callable[..., Any]]:
    return "get_connection_params", lambda self, plain: {**plain(), **params}


#: What the engines of others do, by the method that they do it in.
OTHERS: dict[str, tuple[str, Callable[..., Any]]] = {
    "add a command": adding(init_command=f"{LEVEL}SERIALIZABLE"),
    "add autocommit": adding(autocommit=True),
    "add no autocommit": adding(autocommit=False),
    "set after opening": ("get_new_connection", lambda self, plain, *a: with_level(plain(*a))),
    "open by themselves": ("get_new_connection", opened),
    "set with autocommit": (
        "_set_autocommit",
        lambda self, plain, on: (plain(on), with_level(self.connection)),
    ),
    "set before": (
        "init_connection_state",
        lambda self, plain: (with_level(self.connection), plain()),
    ),
    "set after": (
        "init_connection_state",
        lambda self, plain: (plain(), with_level(self.connection)),
    ),
}
#: Whether it lies over ours or under it.
PLACES: dict[str, Any] = {"ENGINE": Ours, "PEER_ENGINE": base.DatabaseWrapper}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("method", "does"), OTHERS.values(), ids=OTHERS)
def test_an_engine_of_another_ends_up_as_over_the_plain_engine(
    mariadb: Node,
    engine_of_another: Callable[..., str],
    method: str,
    does: Callable[..., Any],
    place: str,
) -> None:
    theirs = engine_of_another(overridden(base.DatabaseWrapper, method, does), "theirs")
    mine = engine_of_another(overridden(PLACES[place], method, does), "mine")
    entry = {**plain(mariadb), "ENGINE": theirs}
    assert_sessions_are_alike(entry, mysql_peer(mariadb), **{place: mine})


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("method", ["cursor", "make_cursor", "create_cursor"])
def test_an_engine_whose_cursors_are_its_own_sees_the_isolation_level(
    mariadb: Node, engine_of_another: Callable[..., str], method: str, place: str
) -> None:
    seen: list[str] = []

    def noting(self: Any, plain: Any, *args: Any) -> Any:
        cursor = plain(*args)
        execute = cursor.execute

        def noted(sql: str, *args: Any) -> Any:
            seen.append(sql)
            return execute(sql, *args)

        cursor.execute = noted
        return cursor

    made = engine_of_another(overridden(PLACES[place], method, noting))
    with engine([mysql_peer(mariadb)], **{place: made}) as connection:
        for _ in range(3):
            seen.clear()
            connection.ensure_connection()
            connection.close()
            assert any(LEVEL in sql for sql in seen)


def test_only_drivers_that_know_autocommit_are_given_it() -> None:
    assert drivers.mysql.session_options({}, True) == {"autocommit": True}
    assert drivers.mysql.session_options({"autocommit": False}, True) == {}
    others = (drivers.postgresql, drivers.sqlite, drivers.mysql_connector, drivers.generic)
    assert [driver.session_options({}, True) for driver in others] == [{}] * len(others)


def in_new_thread(log: Log) -> list[str]:
    """Return what a new thread's first connection sends."""

    def run() -> list[str]:
        connection = connected("balanced")
        try:
            return log.of(connection)
        finally:
            connection.close()

    found: list[str] = in_thread(run, seconds=60)
    return found


def asks(said: list[str]) -> bool:
    return any("VERSION()" in statement for statement in said)


def asked_ago(peer: Peer, seconds: float) -> None:
    if peer.server_facts is not None:
        known_as(peer, asked=peer.server_facts.asked - seconds)


def open_and_close(peer: Peer) -> None:
    peer.breaker.open()
    peer.breaker.close()


#: What happens to a peer, and whether the next thread asks it again what it is.
ASKED_ANEW: dict[str, tuple[Callable[[Peer], object], bool]] = {
    "nothing": (lambda peer: None, False),
    "its circuit opens": (open_and_close, True),
    "it is of another version": (lambda peer: known_as(peer, greeting="10.4.1-MariaDB"), True),
    "590 seconds": (lambda peer: asked_ago(peer, 590), False),
    # SET GLOBAL sql_mode reaches the next threads, as with the plain engine.
    "610 seconds": (lambda peer: asked_ago(peer, 610), True),
}


@keeps_one_record
@pytest.mark.parametrize(("happens", "is_asked"), ASKED_ANEW.values(), ids=ASKED_ANEW)
def test_a_new_thread_asks_what_the_server_is_only_where_that_may_have_changed(
    mariadb: Node, log: Log, happens: Callable[[Peer], object], is_asked: bool
) -> None:
    with engine([mysql_peer(mariadb)], LAST_RESORT_INTERVAL=0):
        assert asks(in_new_thread(log))
        peer = balancers["balanced"].peers["peer0"]
        happens(peer)
        before = peer.server_facts
        assert asks(in_new_thread(log)) is is_asked
        # Only who has asked says that it was asked now.
        assert (peer.server_facts is not before) is is_asked


@keeps_one_record
def test_a_peer_is_asked_anew_once_it_was_drained(mariadb: Node) -> None:
    with engine([mysql_peer(mariadb)]) as connection:
        balancer = balancers["balanced"]
        peer = balancer.peers["peer0"]
        connection.ensure_connection()
        assert peer.server_facts is not None
        balancer.drain(peer, force=True)
        assert peer.server_facts is None
        with balancer.pinned(peer):
            # A block that stays there comes to its end first, and asks the old server.
            connections["balanced"].copy().ensure_connection()
        balancer.undrain(peer)
        assert peer.server_facts is None


@keeps_one_record
def test_a_wrapper_asks_a_server_of_another_version_anew(mariadb: Node, log: Log) -> None:
    """Not only the wrappers of other threads do."""
    with engine([mysql_peer(mariadb)]) as connection:
        for is_another, is_asked in ((False, True), (True, True), (False, False)):
            if is_another:
                known_as(balancers["balanced"].peers["peer0"], greeting="10.4.1-MariaDB")
            connection.close()
            connection.ensure_connection()
            assert asks(log.of(connection)) is is_asked


@keeps_one_record
def test_equal_peers_share_what_they_say_of_themselves(mariadb_pair: tuple[Node, Node]) -> None:
    with engine([mysql_peer(node) for node in mariadb_pair], STRATEGY="round_robin") as connection:
        for _ in mariadb_pair:
            connection.close()
            connection.copy().connect()
        first, second = balancers["balanced"].peers.values()
        assert first.server_facts.facts is second.server_facts.facts


def answers_of(connection: Any) -> tuple[Any, ...]:
    """Return how the session is set up, and what Django says of the server."""
    facts = connection.mysql_server_data, frozenset(connection.sql_mode)
    return (*session(connection), *facts, connection.features.is_sql_auto_is_null_enabled)


@keeps_one_record
def test_each_peer_is_what_the_plain_engine_says_of_it(mariadb_pair: tuple[Node, Node]) -> None:
    """To a wrapper that goes to peers that differ and back, and to new threads' wrappers."""
    mariadb_pair[1].set_global("sql_mode", "ANSI")
    if not IS_PYMYSQL:
        mariadb_pair[1].set_global("sql_auto_is_null", 1)
    plain_ones = {f"plain{n}": plain(node) for n, node in enumerate(mariadb_pair)}
    with added(plain_ones), engine([mysql_peer(node) for node in mariadb_pair]) as connection:
        theirs = {f"peer{n}": answers_of(connected(f"plain{n}")) for n in range(2)}
        assert theirs["peer0"] != theirs["peer1"]
        for name in ("peer0", "peer1", "peer0", "peer1", "peer1"):
            connection.close()
            with balancers["balanced"].pinned(name):
                for wrapper in (connection, connection.copy()):
                    wrapper.ensure_connection()
                    assert answers_of(wrapper) == theirs[name]


@keeps_one_record
@pytest.mark.parametrize("differ", [False, True])
def test_a_wrapper_that_goes_between_peers_asks_each_once_whatever_the_age(
    mariadb_pair: tuple[Node, Node], differ: bool
) -> None:
    """As with the plain engine it is new threads that ask again."""
    if differ:
        mariadb_pair[1].set_global("sql_mode", "ANSI")
    logs = [Log(node) for node in mariadb_pair]
    with engine([mysql_peer(node) for node in mariadb_pair]) as connection:
        for n, is_asked in ((0, True), (1, True), (0, False), (1, False)):
            peer = balancers["balanced"].peers[f"peer{n}"]
            asked_ago(peer, 610)
            connection.close()
            with balancers["balanced"].pinned(peer):
                connection.ensure_connection()
                assert asks(logs[n].of(connection)) is is_asked


@keeps_one_record
def test_changed_options_are_not_taken_for_the_peers_own(mariadb: Node) -> None:
    """A wrapper whose settings were changed asks for itself, and shares nothing."""
    with engine([mysql_peer(mariadb)]) as connection:
        peer = balancers["balanced"].peers["peer0"]
        for is_known in (False, True):
            if is_known:
                connection.ensure_connection()
            known = peer.server_facts
            assert (known is not None) is is_known
            other = connections["balanced"].copy("balanced")
            other.settings_dict["OPTIONS"] = {"init_command": "SET sql_mode='ANSI'"}
            other.ensure_connection()
            assert "ANSI" in other.sql_mode
            other.close()
            assert peer.server_facts is known


@pytest.mark.server
@pytest.mark.skipif("TEST_DRIVER" in os.environ, reason="this is that run")
def test_all_of_this_holds_with_pymysql(request: pytest.FixtureRequest) -> None:
    run_again(__file__, "pymysql", request, "mariadb_pair")


# What is made once


def test_a_peers_settings_are_merged_once_and_again_when_they_are_changed() -> None:
    """As long as nothing changes, a connect copies what the first one merged."""
    merged: list[object] = []
    own: dict[str, Any] = {"NAME": "shop", "HOST": "", "USER": "", "PORT": ""}
    own.update(PASSWORD=lambda: "fresh", OPTIONS={"charset": "utf8mb4"})
    db = LoadBalancer(BalancerConfig("x", (PeerConfig("db1", params={"HOST": "10.0.0.1"}),)))
    registered = Registered(db, first_reading(own), MYSQL, {})
    peer = db.peers["db1"]
    with mock.patch(
        "django_proxysql.registry.merged_settings",
        side_effect=lambda *a: merged.append(a) or merged_settings(*a),  # type: ignore[func-returns-value]
    ):
        for _ in range(3):
            settings = registered.to_connect_with(peer, own, "default")
            assert settings["HOST"] == "10.0.0.1"
            assert settings["PASSWORD"] == "fresh"
            # A driver may take its copy apart.
            settings["OPTIONS"].clear()
        assert len(merged) == 1
        # In place, as test runners do.
        own["NAME"] = "test_shop"
        assert registered.settings_for(peer, own, "default")["NAME"] == "test_shop"
        own["OPTIONS"]["charset"] = "latin1"
        assert registered.settings_for(peer, own, "default")["OPTIONS"] == {"charset": "latin1"}
        assert registered.settings_for(peer, own, "__no_db__")["NAME"] == "test_shop"
        assert len(merged) == 3
