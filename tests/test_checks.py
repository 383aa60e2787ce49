"""What is wrong with a balancer's settings: said by the checks, and again at connect."""

from __future__ import annotations

import inspect
import io
import json
import logging
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import django
import MySQLdb.connections as mysqlclient
import psycopg
import pymysql
import pytest
from django.core import checks
from django.core.exceptions import ImproperlyConfigured
from django.core.management import call_command
from django.core.management.base import SystemCheckError
from django.db import connections
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.utils import load_backend

from django_proxysql import balancers
from django_proxysql.conf import keys
from django_proxysql.conf.keys import ENGINE
from django_proxysql.conf.reading import balancer_config, problems, stops_connections
from django_proxysql.core.drivers import driver_of_engine
from tests.children import run_python
from tests.engine import MYSQL, POSTGRESQL, SQLITE, added, engine

ROOT = Path(__file__).parent.parent

has_database_option = pytest.mark.skipif(
    django.VERSION < (3, 1), reason="check --database came with Django 3.1"
)

ONE = {"HOST": "10.0.0.1"}
TWO = {"HOST": "10.0.0.2"}
ALIASES = {
    "one": {"ENGINE": MYSQL, "HOST": "10.0.0.1", "PASSWORD": "sesame"},
    "two": {"ENGINE": MYSQL, "HOST": "10.0.0.2"},
    "slite": {"ENGINE": SQLITE, "NAME": "x"},
    "atomic": {"ENGINE": MYSQL, "HOST": "10.0.0.3", "ATOMIC_REQUESTS": True},
    "tested": {"ENGINE": MYSQL, "HOST": "10.0.0.4", "TEST": {"NAME": "tests"}},
    "keeping": {"ENGINE": MYSQL, "HOST": "10.0.0.6", "CONN_MAX_AGE": 60},
    "strategic": {"ENGINE": MYSQL, "HOST": "10.0.0.7", "STRATEGY": "round_robin"},
    "engineless": {"HOST": "10.0.0.5"},
    "nested": {"ENGINE": ENGINE, "PEERS": [{"HOST": "10.0.0.9"}]},
}

ABSENT = object()


def of_peer(**settings: Any) -> dict[str, Any]:
    """One inline peer that has these besides."""
    return {"PEERS": [{**ONE, **settings}]}


def on_postgresql(options: Any = None, **settings: Any) -> dict[str, Any]:
    return {"PEER_ENGINE": POSTGRESQL, "OPTIONS": options or {}, **settings}


# By the check's id: the settings beside one peer, words of the message, words of the hint.
MISTAKES: dict[str, list[tuple[dict[str, Any], str, str]]] = {
    "E001": [
        ({"PEERS": []}, "PEERS is empty", "at least one alias or dict"),
        ({"PEERS": ABSENT}, "PEERS is empty", "at least one alias or dict"),
        ({"PEERS": "one"}, "PEERS is a str", "at least one alias or dict"),
        ({"PEERS": {"PASSWORD": "sesame"}}, "PEERS is a dict", "at least one"),
        ({"PEERS": [ONE, [{"PASSWORD": "sesame"}]]}, "PEERS[1] is a list", "a dict"),
    ],
    "E002": [
        ({"PEERS": ["one", "tow"]}, "PEERS names 'tow'", "Did you mean 'two'?"),
        ({"PEERS": ["zzzzzz"]}, "no alias in DATABASES", "write the peer as a dict"),
    ],
    "E003": [
        ({"PEERS": ["one", "nested"]}, "PEERS names 'nested'", "databases behind it"),
        ({"PEER_ENGINE": ENGINE}, "PEER_ENGINE is a load balancer", MYSQL),
    ],
    "E004": [
        ({"PEERS": ["one", "slite"]}, "PEERS mixes engines: 'slite'", "have one engine"),
        ({"PEERS": ["one"], "PEER_ENGINE": SQLITE}, "'one' has the ENGINE", "one engine"),
        ({"PEERS": ["one", {"ENGINE": SQLITE}]}, "PEERS[1] has the ENGINE", "PEER_ENGINE for all"),
    ],
    "E005": [
        ({"CHECK_INTERVAL": "30"}, "CHECK_INTERVAL is '30'", "a number"),
        ({"CHECK_INTERVAL": 0}, "CHECK_INTERVAL is 0", "greater than 0"),
        ({"CHECK_INTERVAL": None}, "CHECK_INTERVAL is None", "a number"),
        ({"CONNECT_TIMEOUT": -1}, "CONNECT_TIMEOUT is -1", "greater than 0"),
        ({"CONNECT_TIMEOUT": float("nan")}, "CONNECT_TIMEOUT is nan", ""),
        ({"CONNECT_TIMEOUT": float("inf")}, "CONNECT_TIMEOUT is inf", ""),
        ({"CONNECT_TIMEOUT": True}, "CONNECT_TIMEOUT is True", "a number"),
        ({"CHECK_INTERVAL": 10**400}, "CHECK_INTERVAL is 1000", "greater than 0"),
        ({"TRIAL_TIMEOUT": 0}, "TRIAL_TIMEOUT is 0", "or None"),
        ({"CONNECT_DEADLINE": None}, "CONNECT_DEADLINE is None", ""),
        ({"LAST_RESORT_INTERVAL": -1}, "LAST_RESORT_INTERVAL is -1", ""),
        ({"REPLAY": "unsafe"}, "REPLAY is 'unsafe'", "'safe' or None"),
        ({"REPLAY": False}, "REPLAY is False", "'safe' or None"),
        ({"IDLE_CHECK": "1"}, "IDLE_CHECK is '1'", "or None"),
        ({"IDLE_CHECK": -0.5}, "IDLE_CHECK is -0.5", "or None"),
        ({"TCP_USER_TIMEOUT": 0}, "TCP_USER_TIMEOUT is 0", "or None"),
        ({"TCP_USER_TIMEOUT": True}, "TCP_USER_TIMEOUT is True", "a number"),
        ({"SYNCHRONOUS_PEERS": None}, "SYNCHRONOUS_PEERS is None", "False"),
        ({"SYNCHRONOUS_PEERS": 1}, "SYNCHRONOUS_PEERS is 1", "True or False"),
        ({"COMMIT_OUTCOME": True}, "COMMIT_OUTCOME is True", "'record'"),
        ({"OUTCOME_DEADLINE": 0}, "OUTCOME_DEADLINE is 0", "greater"),
        ({"OUTCOME_DEADLINE": 601}, "OUTCOME_DEADLINE is 601", "at most 600"),
        ({"TRIALS": "foreground"}, "TRIALS is 'foreground'", "'background'"),
        ({"TRIALS": None}, "TRIALS is None", "'inline' or"),
        ({"REBALANCE": -1}, "REBALANCE is -1", "or None"),
        ({"REBALANCE": "fast"}, "REBALANCE is 'fast'", "a number"),
        ({"BREAKER": 3}, "BREAKER is 3", "fail_max"),
        ({"BREAKER": {"fail_max": 0}}, "fail_max", "at least 1"),
        ({"BREAKER": {"failmax": 2}}, "unknown key 'failmax'", "fail_max"),
        (of_peer(WEIGHT=0), "WEIGHT of peer PEERS[0] is 0", "greater than 0"),
        (of_peer(PRIORITY=1.5), "PRIORITY of peer PEERS[0]", "whole number"),
        (of_peer(CHECK_INTERVAL="1"), "CHECK_INTERVAL of peer PEERS[0]", ""),
        (of_peer(BREAKER={"fail_max": "1"}), "of peer PEERS[0] is '1'", ""),
        ({"CONN_MAX_AGE": "60"}, "CONN_MAX_AGE is '60'", "seconds"),
        ({"CONN_MAX_AGE": True}, "CONN_MAX_AGE is True", "seconds"),
    ],
    "E006": [
        ({"CHECK_INTERVALL": 5}, "CHECK_INTERVALL", "mean CHECK_INTERVAL?"),
        ({"strategy": "x"}, "strategy is not a setting", "mean STRATEGY?"),
        ({"IDLE_CHEK": 5}, "IDLE_CHEK is not a", "mean IDLE_CHECK?"),
        ({"CHECK_INTERVAL_SECONDS": 5}, "is not a", "CHECK_INTERVAL?"),
        ({"FAIL_MAX": 3}, "FAIL_MAX is not a setting", "BREAKER"),
        (of_peer(fail_max=3), "fail_max of peer PEERS[0]", "BREAKER"),
        (of_peer(WEIGTH=2), "WEIGTH of peer PEERS[0]", "mean WEIGHT?"),
        (of_peer(HOTS="x"), "HOTS of peer PEERS[0]", "mean HOST?"),
    ],
    "E007": [
        ({"STRATEGY": "randon"}, "STRATEGY is 'randon'", "round_robin"),
        ({"STRATEGY": "tests.no.Such"}, "cannot be imported", "dotted path"),
        ({"STRATEGY": "tests.app.models.Token"}, "no order() method", ""),
    ],
    "E008": [
        ({"READY_CHECK": "writeable"}, "READY_CHECK is 'writeable'", "galera"),
        ({"READY_CHECK": 5}, "READY_CHECK is 5", "dotted path"),
        *(
            (
                {"READY_CHECK": name, "PEER_ENGINE": path},
                f"READY_CHECK is {name!r}, which is not for {path!r}",
                f"for {servers}.",
            )
            for name, path, servers in (
                ("galera", POSTGRESQL, "MySQL and MariaDB"),
                ("galera", SQLITE, "MySQL and MariaDB"),
                ("writable", SQLITE, "MySQL, MariaDB and PostgreSQL"),
            )
        ),
    ],
    "E009": [
        ({"PEERS": [{"HOST": "a,b"}]}, "HOST of peer PEERS[0]", "make each host a peer"),
        ({"HOST": "a,b", "PEERS": [{"PORT": 1}]}, "HOST of peer PEERS[0]", "each host a peer"),
        (on_postgresql({"host": "a,b"}), "OPTIONS['host'] of peer PEERS[0]", "each host a peer"),
        *(
            (settings, f"{setting} of peer PEERS[0] has a password in it", "from_url()")
            for url in ("mysql://shop:sesame@db1:3306/shop", "://shop:ses/ame@db1/sesame")
            for settings, setting in (
                (of_peer(HOST=url), "HOST"),
                (on_postgresql({"host": url}), "OPTIONS['host']"),
                (of_peer(NAME=url), "NAME"),
            )
        ),
        (of_peer(HOST="shop:sesame@db1"), "HOST of peer PEERS[0] has a password", "from_url()"),
    ],
    "E010": [
        ({"OPTIONS": {"connect_timeout": 2.5}}, "_timeout'] of peer PEERS[0] is 2.5", "whole"),
    ],
    "E011": [({"PEERS": ["one", "two", "one"]}, "PEERS names 'one' more than once", "a WEIGHT")],
    "E012": [
        ({"OPTIONS": "a=b"}, "OPTIONS is a str", "a dict"),
        (of_peer(OPTIONS=["a"]), "OPTIONS of peer PEERS[0] is a list", "dict"),
    ],
    "E013": [
        ({"PEER_ENGINE": "nonesuch"}, "PEER_ENGINE is 'nonesuch'", "driver"),
        ({"PEER_ENGINE": "nonesuch", "COMMIT_OUTCOME": "record"}, "PEER_ENGINE is", "driver"),
        ({"PEERS": ["engineless"]}, "ENGINE of the peers is", "the backend"),
    ],
    "E014": [
        ({"OPTIONS": {"pool": True}}, "OPTIONS['pool']", "CONN_MAX_AGE"),
        (
            {"PEERS": [ONE, TWO], "OPTIONS": {"pool_name": "shop"}},
            "OPTIONS['pool_name'] is 'shop' for 'peer0' and 'peer1'",
            "a name of its own",
        ),
    ],
    "E015": [
        ({"SHARED_STATE": "http://:sesame@host/0"}, "SHARED_STATE is no URL of a", "%40 for @"),
        ({"SHARED_STATE": "redis://host:sesame/0"}, "no URL", "redis://host"),
        ({"SHARED_STATE": "redis://h/0?ab=sesame"}, "option 'ab'", "prefix"),
    ],
    "W001": [
        ({"PEERS": [ONE, TWO, dict(ONE)]}, "PEERS has 'peer0' and 'peer2' at", "two shares"),
        ({"PEERS": ["one", {**ONE, "PORT": 3306}]}, "at one address, 10.0.0.1", "two shares"),
    ],
    "W002": [
        ({"PEERS": ["one", "atomic"]}, "'atomic' has ATOMIC_REQUESTS", "to 'balanced'"),
        ({"PEERS": ["one", "tested"]}, "'tested' has TEST", "Move TEST to 'balanced'"),
        ({"PEERS": ["one", "keeping"]}, "'keeping' has CONN_MAX_AGE", "to 'balanced', too"),
    ],
    "W003": [
        ({"PEERS": [ONE, TWO], "CONNECT_TIMEOUT": 2.5}, "CONNECT_TIMEOUT is 2.5", "becomes 3"),
        (on_postgresql(TRIAL_TIMEOUT=1), "TRIAL_TIMEOUT is 1", "becomes 2"),
    ],
    "W004": [
        ({"WEIGHT": 3}, "WEIGHT is a peer's setting", "into the peers"),
        ({"PEERS": [ONE, TWO], "HOST": "db"}, "HOST has no effect here", "Remove HOST"),
        ({"PEERS": ["one", TWO], "HOST": "db"}, "HOST has no effect here", "Remove HOST"),
        ({**of_peer(PORT="3307"), "PORT": 3308}, "PORT has no effect here", "leave it out"),
        ({**of_peer(USER="a"), "USER": "b"}, "USER has no effect here", "leave it out"),
        ({**of_peer(PASSWORD="sesame"), "PASSWORD": "x"}, "PASSWORD has no effect", "leave it"),
        (of_peer(SHARED_STATE="redis://h"), "SHARED_STATE of peer", "Move"),
        (of_peer(CONN_MAX_AGE=3), "CONN_MAX_AGE of peer", "to 'balanced'"),
        (of_peer(REPLAY=None), "REPLAY of peer", "to 'balanced'"),
        (of_peer(STRATEGY="random"), "STRATEGY of peer", "to 'balanced'"),
        (of_peer(PEER_ENGINE=MYSQL), "PEER_ENGINE of peer PEERS[0] has no", "to 'balanced'"),
        ({"PEERS": ["one", "strategic"]}, "STRATEGY of peer strategic", "to 'balanced'"),
        (of_peer(PRIO=3), "PRIO of peer PEERS[0] is not", "Leave it out"),
    ],
    "W006": [
        ({"TEST": {"MIRROR": "balanced"}}, "TEST['MIRROR'] leads back to where", "Name the alias"),
        ({"TEST": {"MIRROR": "nonesuch"}}, "leads to 'nonesuch', no alias", "A test run is"),
    ],
    "W008": [
        ({"OPTIONS": {"charst": "utf8"}}, "['charst'] of peer", "'charset'?"),
        ({"OPTIONS": {"xyzzy": 1}}, "['xyzzy'] of peer", "Leave it out"),
        (on_postgresql({"aplication_name": "x"}), "['aplication_name']", "'application_name'?"),
    ],
    "W009": [
        (
            {"OPTIONS": {"multi_statements": False}, "COMMIT_OUTCOME": "record"},
            "OPTIONS['multi_statements'] of peer peer0 is off",
            "Leave it out",
        ),
        ({"PEER_ENGINE": SQLITE, "COMMIT_OUTCOME": "record"}, "COMMIT_OUTCOME has", "Leave it out"),
    ],
}
if sys.version_info >= (3, 11):
    # What the extra [test] brings on these Pythons only.
    own_pool = "dj_db_conn_pool.backends.mysql"
    MISTAKES["E014"].append(({"PEER_ENGINE": own_pool}, f"{own_pool!r}, which", "CONN_MAX_AGE"))
if django.VERSION >= (5, 1):
    MISTAKES["E014"] += [
        (on_postgresql({"pool": pool}, **settings), f"OPTIONS['pool']{message}", hint)
        for pool, settings, message, hint in (
            (5, {}, " is a int", "True or a dict"),
            ({"conninfo": "x"}, {}, "['conninfo'] would be the same for every", "Leave it out"),
            ({"min_sise": 2}, {}, "['min_sise'] is nothing that psycopg's pool", "'min_size'?"),
            ({"check": "SELECT 1"}, {}, "['check'] is a str", "Give a function"),
            ({"min_size": 2}, {"CONN_MAX_AGE": 60}, " and CONN_MAX_AGE", "goes back to its pool"),
        )
    ]
else:
    MISTAKES["E014"].append(
        (on_postgresql(**of_peer(OPTIONS={"pool": True})), "['pool'] of peer PEERS[0]", "5.1")
    )

#: What a driver cannot take in one peer's settings: an error of the checks, and of that peer.
OF_ONE_PEER: list[Any] = [
    *(
        ({"PORT": port}, f"PORT of peer PEERS[0] is {port!r}", "from 1 to 65535")
        for port in ("abc", "3306/tcp", "33O6", 99999, "99999", -1, 3306.5, True, [3306])
    ),
    ({"HOST": 1}, "HOST of peer PEERS[0] is a int", "string"),
    ({"HOST": b"db1"}, "HOST of peer PEERS[0] is a bytes", "string"),
    ({"HOST": "10.0.0.1:3307"}, "HOST of peer PEERS[0] is '10.0.0.1:3307', with a port", "PORT"),
    ({"HOST": "db1.example:3307"}, "with a port", "PORT"),
    ({"HOST": "[::1]:3307"}, "with a port", "PORT"),
    ({"OPTIONS": {"host": "db1:3307"}}, "OPTIONS['host'] of peer", "PORT"),
    ({"OPTIONS": {"port": "3307"}}, "OPTIONS['port'] of peer PEERS[0] is '3307'", "65535"),
    ({"USER": 1}, "USER of peer PEERS[0] is a int", "string"),
    ({"NAME": 5}, "NAME of peer PEERS[0] is a int", "string"),
    (
        {"OPTIONS": {"isolation_level": "repeatable"}},
        "OPTIONS['isolation_level'] of peer PEERS[0] is 'repeatable'",
        "MySQL's levels",
    ),
    ({"PASSWORD": 5354}, "PASSWORD of peer PEERS[0] is a int", "string"),
    ({"OPTIONS": {"read_timeout": "5"}}, "OPTIONS['read_timeout'] of peer", "seconds"),
]


def ids(messages: list[checks.CheckMessage]) -> list[str]:
    return [m.id.partition(".")[2] for m in messages if (m.id or "").startswith("django_proxysql")]


def run_checks() -> list[checks.CheckMessage]:
    """Run the checks; of all aliases on ours only: Django's of MySQL may connect (from 6.1 on)."""
    # Before 3.1 Django's checks of databases are by a tag of their own.
    given = {"databases": ["default"]} if django.VERSION >= (3, 1) else {}
    return list(checks.run_checks(**given))


def ours() -> list[checks.CheckMessage]:
    return [m for m in run_checks() if (m.id or "").startswith("django_proxysql")]


def entry(settings: dict[str, Any]) -> dict[str, Any]:
    return {"ENGINE": ENGINE, **settings}


@pytest.mark.parametrize("key", ["HOST", "PORT", "USER", "PASSWORD"])
@pytest.mark.parametrize("peers", [[{}, {"own": 1}], ["bare"], ["bare", {"own": 1}]], ids=str)
def test_setting_that_one_peer_takes_is_no_mistake(key: str, peers: list[Any]) -> None:
    peers = [
        peer
        if isinstance(peer, str)
        else ({**ONE, "HOST": "h9", key: 7} if peer else {"OPTIONS": {}})
        for peer in peers
    ]
    bare = {"ENGINE": MYSQL, "NAME": "x"}
    with added({"bare": bare, "balanced": entry({"PEERS": peers, key: 1})}):
        said = [m.msg for m in run_checks() if m.id == "django_proxysql.W004"]
    assert said == []


@pytest.mark.parametrize(
    ("id_", "settings", "message", "hint"),
    [(id_, *mistake) for id_, mistakes in MISTAKES.items() for mistake in mistakes],
)
def test_mistake_is_said_by_the_checks_and_at_connect(
    id_: str, settings: dict[str, Any], message: str, hint: str
) -> None:
    aliases = {alias: dict(values) for alias, values in ALIASES.items()}
    given = {"PEERS": [ONE], **settings}
    balanced = entry({key: value for key, value in given.items() if value is not ABSENT})
    with added({**aliases, "balanced": balanced}):
        # Never in the constructor.
        connection = connections["balanced"]
        found = ours()
        assert ids(found) == [id_]
        assert found[0].msg.startswith("DATABASES['balanced']: ")
        assert message in found[0].msg
        assert hint in (found[0].hint or "")
        assert found[0].level == (checks.ERROR if id_.startswith("E") else checks.WARNING)
        assert "sesame" not in str(found[0])
        if id_.startswith("E"):
            with pytest.raises(ImproperlyConfigured) as raised:
                connection.ensure_connection()
            assert str(raised.value).startswith(found[0].msg)
            assert str(raised.value).endswith(found[0].hint or "")
            if id_ in ("E003", "E013"):
                # Django's dummy backend, which stands in, has complaints of its own.
                with pytest.raises(ImproperlyConfigured, match="'balanced'"):
                    connection.cursor()
        else:
            balancer_config("balanced", connection.settings_dict, connections.databases)


@pytest.mark.parametrize(("settings", "message", "hint"), OF_ONE_PEER, ids=str)
@pytest.mark.parametrize("inline", [False, True], ids=["alias", "inline"])
def test_what_the_driver_cannot_take(
    settings: dict[str, Any], message: str, hint: str, inline: bool
) -> None:
    """The checks read each peer's settings as the driver will, and do not stop the other peers."""
    peer = {**ONE, **settings}
    aliases = {"wrong": {"ENGINE": MYSQL, **peer}}
    peers = [peer, TWO] if inline else ["wrong", TWO]
    with added({**aliases, "balanced": entry({"PEERS": peers})}):
        found = ours()
        assert ids(found) == ["E018"]
        assert message.replace("PEERS[0]", "PEERS[0]" if inline else "wrong") in found[0].msg
        assert hint in (found[0].hint or "")
        assert "5354" not in str(found[0])
        assert balancers["balanced"].peers.keys()


#: What a driver takes, and what psycopg does not, by the peers' engine.
TAKEN: list[Any] = [
    *((MYSQL, {"HOST": host}, True) for host in ("::1", "fe80::1%eth0", "/run/mysqld.sock", "")),
    *((MYSQL, {"PORT": port}, True) for port in (3307, "3307", " 3307 ", "", 0, None)),
    pytest.param(MYSQL, {"PASSWORD": lambda: "sesame"}, True, id="PASSWORD is called"),
    (MYSQL, {"OPTIONS": {"port": 3307, "read_timeout": 5, "isolation_level": ""}}, True),
    (POSTGRESQL, {"PORT": "abc"}, False),
    (POSTGRESQL, {"PORT": "5433"}, True),
    (POSTGRESQL, {"OPTIONS": {"port": "5433"}}, True),
    (POSTGRESQL, {"HOST": 1}, False),
    (POSTGRESQL, {"HOST": Path("/run/postgresql")}, True),
    (POSTGRESQL, {"HOST": "10.0.0.1:5433"}, False),
    (POSTGRESQL, {"NAME": 5}, False),
    (POSTGRESQL, {"PASSWORD": 5}, True),
    (POSTGRESQL, {"OPTIONS": {"isolation_level": 99}}, False),
    (POSTGRESQL, {"OPTIONS": {"isolation_level": psycopg.IsolationLevel.SERIALIZABLE}}, True),
]


@pytest.mark.parametrize(("path", "settings", "right"), TAKEN, ids=str)
def test_what_each_driver_takes_and_does_not(path: str, settings: Any, right: bool) -> None:
    balanced = {"PEERS": [{**ONE, "NAME": "shop", **settings}], "PEER_ENGINE": path}
    with added({"balanced": entry(balanced)}):
        assert ids(run_checks()) == ([] if right else ["E018"])


@pytest.mark.parametrize("engine_path", [MYSQL, POSTGRESQL])
def test_what_installed_drivers_take_by_name_is_known(engine_path: str) -> None:
    driver = driver_of_engine(load_backend(engine_path).DatabaseWrapper)
    known = driver.OPTIONS
    assert known is not None
    if engine_path == MYSQL:
        taken = set(inspect.signature(pymysql.connections.Connection.__init__).parameters) - {
            "self"
        }
        taken |= set(re.findall(r'kwargs2\.(?:pop|get)\("(\w+)"', inspect.getsource(mysqlclient)))
    else:
        taken = {option.keyword.decode() for option in psycopg.pq.Conninfo.get_defaults()}
        taken |= set(inspect.signature(psycopg.connect).parameters) - {"kwargs"}
    assert taken <= known


def test_right_settings_have_no_message() -> None:
    settings = {
        "NAME": "shop",
        "USER": "shop",
        "PASSWORD": lambda: "sesame",
        "PEERS": ["one", {"HOST": "10.0.0.7", "PORT": 3307, "WEIGHT": 0.5, "PRIORITY": 1}, "two"],
        "CHECK_INTERVAL": 0.5,
        "BREAKER": {"fail_max": 3},
        "STRATEGY": "django_proxysql.core.strategies.RoundRobin",
        "CONNECT_TIMEOUT": 2,
        "TRIAL_TIMEOUT": None,
        "CONNECT_DEADLINE": 1.5,
        "LAST_RESORT_INTERVAL": None,
        "READY_CHECK": "writable",
        "REPLAY": None,
        "IDLE_CHECK": 0,
        "SYNCHRONOUS_PEERS": False,
        "TCP_USER_TIMEOUT": 2.5,
        "SHARED_STATE": "rediss://shop:pass%40word@10.0.0.9:6380/3?prefix=shop",
        "TRIALS": "background",
        "REBALANCE": 0,
        "CONN_MAX_AGE": None,
        "ATOMIC_REQUESTS": True,
        "TEST": {"NAME": "test_shop"},
        "OPTIONS": {"connect_timeout": 3, "charset": "utf8mb4"},
        "REPLICA_OF": "something else's",
    }
    aliases = {alias: dict(values) for alias, values in ALIASES.items()}
    with added({**aliases, "balanced": entry(settings)}):
        assert ids(run_checks()) == []
        config = balancers["balanced"].config
        assert (config.replay, config.idle_check) == (None, 0)
        assert (config.synchronous_peers, config.tcp_user_timeout) == (False, 2.5)
        assert config.shared_state == settings["SHARED_STATE"]
        assert "word" not in repr(balancers["balanced"]) + repr(config)
        assert config.trials == "background"
    for setting in ("IDLE_CHECK", "TCP_USER_TIMEOUT"):
        with engine([ONE], **{setting: None}):
            assert ids(run_checks()) == []


def test_redis_missing_names_the_extra_it_comes_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "redis", None)
    monkeypatch.setitem(sys.modules, "redis.connection", None)
    with added({**ALIASES, "balanced": entry({"PEERS": [ONE], "SHARED_STATE": "redis://host"})}):
        (message,) = run_checks()
        assert message.id == "django_proxysql.E015"
        assert "SHARED_STATE takes the package redis" in message.msg
        assert 'pip install "django-proxysql[redis]"' in str(message.hint)
        with pytest.raises(ImproperlyConfigured, match="takes the package redis"):
            connections["balanced"].ensure_connection()


def test_servers_told_apart_by_files_are_no_duplicates() -> None:
    files = [{"OPTIONS": {"read_default_file": f"/etc/{name}.cnf"}} for name in "ab"]
    sockets = [{"OPTIONS": {"unix_socket": f"/run/{name}.sock"}} for name in "ab"]
    ports = [{**ONE, "PORT": port} for port in (3306, "3307")]
    with engine([*files, *sockets, *ports]):
        assert ids(run_checks()) == []


@pytest.mark.parametrize(
    "url", ["mysql://shop:sesame@db1/shop", "://shop:se'sa\\mesame@sesame@db1"]
)
@pytest.mark.parametrize(
    ("settings", "found"),
    [
        (lambda url: {"PEERS": [{"HOST": url}] * 2}, ["E009", "E009", "W001"]),
        (lambda url: {"PEERS": [{"HOST": url}, ONE, dict(ONE)]}, ["E009", "W001"]),
        (lambda url: {"PEERS": [url, url]}, ["E002", "E002", "E011"]),
        (lambda url: {"PEERS": [ONE], "PEER_ENGINE": url}, ["E013"]),
        (lambda url: {"PEERS": [ONE], "STRATEGY": url}, ["E007"]),
        (lambda url: {"PEERS": [{**ONE, "PEER_NAME": url}]}, ["E005"]),
        (lambda url: {"PEERS": [{**ONE, url: 1}]}, ["W004"]),
    ],
)
def test_what_has_a_password_in_it_is_never_quoted(
    settings: Callable[[str], dict[str, Any]], found: list[str], url: str
) -> None:
    with added({"balanced": entry(settings(url))}):
        said = ours()
    assert ids(said) == found
    assert "sesame" not in str(said)


@pytest.mark.parametrize("path", [MYSQL, SQLITE, "django.db.backends.dummy"])
def test_peers_of_a_plain_engine_are_reported_and_make_no_balancer(path: str) -> None:
    """No tool says that all is well with peers which no connection is made to."""
    with added({"plain": {"ENGINE": path, "NAME": ":memory:", "PEERS": [ONE]}}):
        (message,) = ours()
        assert "plain" not in balancers
        assert isinstance(connections["plain"], BaseDatabaseWrapper)
    assert message.id == "django_proxysql.W004"
    assert message.msg == f"DATABASES['plain']: PEERS has no effect with the ENGINE {path!r}."
    assert f"{ENGINE!r} as ENGINE" in str(message.hint)


def test_no_remedy_leads_to_another_mistake() -> None:
    """PEERS of an alias peer is reported once; CONN_MAX_AGE is no remedy beside a pool."""
    aliased = {"ENGINE": POSTGRESQL, "HOST": "10.0.0.8", "NAME": "x", "CONN_MAX_AGE": 60}
    pooled = {"PEERS": ["aliased"], "OPTIONS": {"pool": True}}
    with added({"aliased": {**aliased, "PEERS": [ONE]}, "balanced": entry(pooled)}):
        said = [message for message in ours() if message.id != "django_proxysql.E014"]
    assert [message.msg.partition(" ")[0] for message in said] == ["DATABASES['aliased']:"]


def test_several_mistakes_are_all_shown_errors_first_each_once() -> None:
    settings = {
        "PEERS": [ONE, dict(ONE), "nonesuch"],
        "CHECK_INTERVAL": "30",
        "CONNECT_TIMEOUT": 0,
        "STRATEGYY": 1,
    }
    with added({"balanced": entry(settings)}):
        assert ids(checks.run_checks()) == ["E006", "E005", "E005", "E002", "W001"]


def test_each_balancer_has_its_own_messages() -> None:
    with added({"left": entry({"PEERS": []}), "right": entry({"PEERS": ["nonesuch"]})}):
        assert ids(checks.run_checks()) == ["E001", "E002"]


def run_check(*args: str) -> list[str]:
    """Return the ids that ``manage.py check`` prints."""
    output = io.StringIO()
    try:
        call_command("check", *args, stderr=output)
    except SystemCheckError as exc:
        output.write(str(exc))
    return [
        word.rstrip(")").partition(".")[2]
        for word in output.getvalue().replace("(", " ").split()
        if word.startswith("django_proxysql.")
    ]


@pytest.mark.parametrize(
    "args",
    [
        (),
        pytest.param(("--database", "balanced"), marks=has_database_option),
        pytest.param(("--database", "balanced", "--tag", "database"), marks=has_database_option),
    ],
)
def test_check_command_with_the_app(args: tuple[str, ...]) -> None:
    """With the app installed, check says a mistake once, with and without --database and --tag."""
    peers = [{"HOST": "10.0.0.1"}, {"HOST": "10.0.0.1"}]
    with engine(peers, PEER_ENGINE=SQLITE, NAME=":memory:"):
        assert run_check(*args) == ["W001"]
    # Nor does Django, on what is misconfigured: its own checks of MySQL would connect.
    with engine([], PEER_ENGINE=MYSQL):
        assert run_check(*args) == ["E001"]


SITE_CHECK = """
import io, json, sys, django
from django.conf import settings
from django.core.management import call_command
from django.core.management.base import SystemCheckError
settings.configure(INSTALLED_APPS=json.loads(sys.argv[1]), DATABASES=json.loads(sys.argv[2]))
django.setup()
try:
    call_command("check", *sys.argv[3:], stderr=sys.stdout)
except SystemCheckError as exc:
    print(exc)
"""


@pytest.mark.parametrize("with_app", [True, False])
@pytest.mark.parametrize("with_database", [pytest.param(True, marks=has_database_option), False])
def test_check_command_without_the_app(with_app: bool, with_database: bool) -> None:
    """Without the app, check --database says the same, once; plain check needs the app."""
    databases = {
        "default": {
            "ENGINE": ENGINE,
            "PEERS": [{"NAME": "/tmp/x"}, {"NAME": "/tmp/x"}],
            "PEER_ENGINE": SQLITE,
        },
        "other": {"ENGINE": ENGINE, "PEERS": [], "PEER_ENGINE": SQLITE},
    }
    apps = ["django_proxysql"] if with_app else []
    args = ["--database", "default"] if with_database else []
    output = run_python(SITE_CHECK, json.dumps(apps), json.dumps(databases), *args).stdout
    assert output.count("django_proxysql.W001") == (with_app or with_database)
    assert output.count("django_proxysql.E001") == with_app


def test_checks_make_no_connection_no_log_say_no_password(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "django_proxysql")
    with engine([{"HOST": "10.255.255.1", "PASSWORD": "sesame", "HOTS": 1}]) as connection:
        assert "sesame" not in repr(checks.run_checks())
        assert connection.connection is None
    assert caplog.text == ""


def test_every_id_has_its_anchor_and_heading_in_the_docs_and_no_other() -> None:
    package = ROOT / "django_proxysql"
    said = {
        word for path in (package / "conf").glob("*.py") for word in _words(path) if is_id(word)
    }
    # Those that ask a server have tests of their own (tests/test_peer_engine.py).
    asking = {
        word.partition(".")[2]
        for name in ("backends/shims", "backends/tokens", "inspection")
        for word in _words(package / f"{name}.py")
        if word.startswith("django_proxysql.W")
    }
    assert asking == {"W005", "W007", "W010"}
    # The site's own setting, which is no alias': tests/test_status_page.py.
    asking.add("E017")
    docs = (ROOT / "docs" / "reference" / "checks.rst").read_text()
    anchors = {line[20:24] for line in docs.splitlines() if line.startswith(".. _django_proxysql.")}
    headings = {line[16:] for line in docs.splitlines() if line.startswith("django_proxysql.")}
    assert said | asking == anchors == headings
    assert said == {*MISTAKES, "E018"}


def _words(path: Path) -> list[str]:
    return path.read_text().replace('"', " ").split()


def is_id(word: str) -> bool:
    return len(word) == 4 and word[0] in "EW" and word[1:].isdigit()


def test_strange_entries_break_nothing() -> None:
    strange: list[Any] = [None, 0, 1.5, "", "x", ".x", [], [[]], {}, {"x": {}}, object(), b"x", {1}]
    for key in (*keys.BALANCER_KEYS, *keys.PEER_KEYS, *keys.CONNECTION_KEYS):
        for value in strange:
            for values in (
                entry({"PEERS": [ONE], key: value}),
                entry({"PEERS": [{**ONE, key: value}]}),
                entry({"PEERS": ["one", value]}),
            ):
                databases = {"one": dict(ALIASES["one"]), "balanced": values}
                found = problems("balanced", values, databases)
                if not any(map(stops_connections, found)):
                    balancer_config("balanced", values, databases)


@pytest.mark.parametrize("name", [["shop"], {"a": 1}, {"a"}, 5], ids=str)
@pytest.mark.parametrize("place", ["balancer", "alias", "inline"])
def test_a_name_that_is_no_string_is_reported_and_stops_no_wrapper(name: Any, place: str) -> None:
    named: Any = {"balancer": {}, "alias": {}, "inline": {}, place: {"NAME": name}}
    alias = {"ENGINE": MYSQL, **ONE, **named["alias"]}
    balanced = {"PEERS": ["aliased", {**TWO, **named["inline"]}], **named["balancer"]}
    with added({"aliased": alias, "balanced": entry(balanced)}):
        assert connections["balanced"].alias == "balanced"
        found = {message.id: message for message in run_checks()}
        assert set(found) == {"django_proxysql.E018"}
        assert f"is a {type(name).__name__}" in found["django_proxysql.E018"].msg
