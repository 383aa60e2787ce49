"""One URL that names several hosts: what it becomes, and what a wrong one says."""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import example, given
from hypothesis import strategies as some

from django_proxysql import from_url
from django_proxysql.conf.reading import problems
from django_proxysql.core.exceptions import ConfigError
from tests.engine import added
from tests.servers import DATABASE, PASSWORD, USER
from tests.servers.mariadb import Node

ENGINE = "django_proxysql.backends.proxysql"
MYSQL = "django.db.backends.mysql"
POSTGRESQL = "django.db.backends.postgresql"

#: A URL, and the entry that it stands for.
ENTRIES: dict[str, dict[str, Any]] = {
    "mysql://user:pw@db1:3306,db2:3307/shop": {
        "ENGINE": ENGINE,
        "PEER_ENGINE": MYSQL,
        "NAME": "shop",
        "USER": "user",
        "PASSWORD": "pw",
        "PEERS": [{"HOST": "db1", "PORT": 3306}, {"HOST": "db2", "PORT": 3307}],
    },
    "postgresql://[::1]:5432,db.example/shop": {
        "ENGINE": ENGINE,
        "PEER_ENGINE": POSTGRESQL,
        "NAME": "shop",
        "PEERS": [{"HOST": "::1", "PORT": 5432}, {"HOST": "db.example"}],
    },
    "postgres://u@%2Frun%2Fpg1,%2Frun%2Fpg2/shop": {
        "ENGINE": ENGINE,
        "PEER_ENGINE": POSTGRESQL,
        "NAME": "shop",
        "USER": "u",
        "PEERS": [{"HOST": "/run/pg1"}, {"HOST": "/run/pg2"}],
    },
    "postgresql:///shop?host=/run/pg": {
        "ENGINE": ENGINE,
        "PEER_ENGINE": POSTGRESQL,
        "NAME": "shop",
        "PEERS": [{"HOST": "/run/pg"}],
    },
    "postgresql:///shop?Host=%2Frun%2Fa%25b": {
        "ENGINE": ENGINE,
        "PEER_ENGINE": POSTGRESQL,
        "NAME": "shop",
        "PEERS": [{"HOST": "/run/a%b"}],
    },
    "mysql://db/shop?weight=2&unix_socket=/run/m.sock": {
        "ENGINE": ENGINE,
        "PEER_ENGINE": MYSQL,
        "NAME": "shop",
        "OPTIONS": {"unix_socket": "/run/m.sock"},
        "PEERS": [{"HOST": "db", "WEIGHT": 2}],
    },
    "mysql://a,b/shop?WEIGHT=2,0.5&priority=0,1&peer_name=1,none&fail_max=3&idle_check=none": {
        "ENGINE": ENGINE,
        "PEER_ENGINE": MYSQL,
        "NAME": "shop",
        "BREAKER": {"fail_max": 3},
        "IDLE_CHECK": None,
        "PEERS": [
            {"HOST": "a", "WEIGHT": 2, "PRIORITY": 0, "PEER_NAME": "1"},
            {"HOST": "b", "WEIGHT": 0.5, "PRIORITY": 1, "PEER_NAME": "none"},
        ],
    },
    "mariadb://a/shop?conn_max_age=60&atomic_requests=on&ssl_ca=/ca.pem&read_timeout=9&charset=x": {
        "ENGINE": ENGINE,
        "PEER_ENGINE": MYSQL,
        "NAME": "shop",
        "CONN_MAX_AGE": 60,
        "ATOMIC_REQUESTS": True,
        "OPTIONS": {"ssl": {"ca": "/ca.pem"}, "read_timeout": 9, "charset": "x"},
        "PEERS": [{"HOST": "a"}],
    },
    "mysql://a/s?peer_engine=site.mysql&synchronous_peers=false&shared_state=redis://:pw%40@r/0": {
        "ENGINE": ENGINE,
        "PEER_ENGINE": "site.mysql",
        "NAME": "s",
        "SYNCHRONOUS_PEERS": False,
        "SHARED_STATE": "redis://:pw@@r/0",
        "PEERS": [{"HOST": "a"}],
    },
    "sqlite:///shop.sqlite3": {"ENGINE": "django.db.backends.sqlite3", "NAME": "shop.sqlite3"},
    "sqlite:////var/shop.sqlite3?conn_max_age=5&check_interval=9&timeout=20&weight=2,1": {
        "ENGINE": "django.db.backends.sqlite3",
        "NAME": "/var/shop.sqlite3",
        "CONN_MAX_AGE": 5,
        "OPTIONS": {"timeout": 20},
    },
    "sqlite://:memory:": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"},
}


@pytest.mark.parametrize("url", ENTRIES)
def test_a_url_becomes_an_entry(url: str) -> None:
    assert from_url(url) == ENTRIES[url]


@pytest.mark.parametrize("url", [url for url in ENTRIES if not url.startswith("sqlite")])
def test_the_checks_find_nothing_wrong_with_the_entry(url: str) -> None:
    entry = from_url(url)
    found = [str(p) for p in problems("default", entry, {"default": entry})]
    # An engine that only a test names cannot be loaded.
    assert [text for text in found if "site.mysql" not in text] == []


SECRET = "s3cr3t"

#: A wrong URL with a password in it, and a part of what is said of it.
WRONG = {
    "mysql:db1,db2/shop": "has no scheme",
    "mssql://db/shop": "scheme that is not known",
    f"mysql://u:{SECRET}@db": "names no database",
    f"mysql://u:{SECRET}@db/": "names no database",
    f"mysql://u:{SECRET}@a,,b/shop": "no name for host 2",
    f"mysql://u:{SECRET}@a,/shop": "no name for host 2",
    f"mysql://u:{SECRET}@:3306/shop": "no name for host 1",
    f"mysql://u:{SECRET}@a:0/shop": "a port of host 1",
    f"mysql://u:{SECRET}@a:70000/shop": "a port of host 1",
    f"mysql://u:{SECRET}@a:/shop": "a port of host 1",
    f"mysql://u:{SECRET}@a:12x/shop": "a port of host 1",
    f"mysql://u:{SECRET}@a:1:2/shop": "more than one colon in host 1",
    f"mysql://u:{SECRET}@[::1/shop": "open bracket in host 1",
    f"mysql://u:{SECRET}@[{SECRET}]:1/shop": "no IPv6 address",
    f"mysql://u:{SECRET}/x@db/shop": "a port of host 1",
    f"mysql://u:12/{SECRET}@db/shop": "has a '/' before its '@'",
    f"mysql://u:12/{SECRET}@db": "has a '/' before its '@'",
    f"mysql://u:{SECRET}\udce9@db/shop": "password that is not UTF-8",
    f"mysql://u:{SECRET}#x@db/shop": "has a '#'",
    f"mysql://u:{SECRET}?x=y@db/shop": "has a '?' before its '@'",
    f"mysql://u:12/{SECRET}?x=y@db/shop": "has a '?' before its '@'",
    f"mysql://u:1@a/{SECRET}@db/shop": "has a '/' before its '@'",
    f"mysql://u:{SECRET}%@db/shop": "a % in its password",
    f"mysql://u:{SECRET}%FF@db/shop": "password that is not UTF-8",
    f"mysql://u:{SECRET}%00@db/shop": "a %00 in its password",
    f"mysql://u:{SECRET}@a,b/shop?weight=1,2,3": "3 values of 'weight' for 2 hosts",
    f"mysql://u:{SECRET}@a,b/shop?peer_name=x": "Give one for each",
    f"mysql://u:{SECRET}@a/shop?weight={SECRET}": "a wrong 'weight'. Give a number",
    f"mysql://u:{SECRET}@a/shop?check_interval=-1": "a wrong 'check_interval'. Give a number",
    f"mysql://u:{SECRET}@a/shop?check_intervall=5": "Did you mean check_interval?",
    f"mysql://u:{SECRET}@a/shop?replay={SECRET}": "a wrong 'replay'",
    f"mysql://u:{SECRET}@a/shop?fail_max=0": "a wrong 'fail_max'",
    f"mysql://u:{SECRET}@a/shop?autocommit={SECRET}": "neither true nor false",
    f"mysql://u:{SECRET}@a/shop?conn_max_age={SECRET}": "a 'conn_max_age' that is no number",
    f"mysql://u:{SECRET}@a/shop?conn_max_age=nan": "a 'conn_max_age' that is no number",
    f"mysql://u:{SECRET}@a/shop?{SECRET}": "no key=value",
    f"mysql://u:{SECRET}@a/shop?x=1&X={SECRET}": "a key in its query twice",
    f"mysql://a/shop?password={SECRET}": "Write it before the @",
    f"mysql://a/shop?peers={SECRET}": "Write it as hosts",
    f"mysql://a/shop?Engine={SECRET}": "Write it as the scheme",
    f"mysql://u:{SECRET}@a/shop?host=b": "names hosts in two places",
    f"mysql://u:{SECRET}@a/shop?HOST=b": "names hosts in two places",
    f"sqlite://u:{SECRET}@a/shop": "names a host",
    f"sqlite:///shop.sqlite3?trials={SECRET}": "a wrong 'trials'",
    f"sqlite:///shop.sqlite3?weight={SECRET}": "a wrong 'weight'. Give a number",
    "sqlite:///shop.sqlite3?check_interval=30,-1": "a wrong 'check_interval'. Give a number",
}


@pytest.mark.parametrize("url", WRONG)
def test_a_wrong_url_says_what_is_wrong_and_shows_no_password(url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_url(url)

    assert WRONG[url] in str(caught.value)
    assert caught.value.hint
    assert SECRET not in repr(caught.value)
    # Nor does a traceback that shows what an error came from.
    assert caught.value.__suppress_context__


def test_further_urls_name_further_peers() -> None:
    entry = from_url(
        "mysql://user:pw@db1/shop?check_interval=9&charset=utf8mb4",
        "mysql://user:pw@db2:3307,db3/shop?priority=1&check_interval=9",
        "mariadb://other:pw2@db4/shop2?charset=latin1",
    )
    own = {"NAME": "shop2", "USER": "other", "PASSWORD": "pw2", "OPTIONS": {"charset": "latin1"}}
    assert entry == {
        **from_url("mysql://user:pw@db1/shop?check_interval=9&charset=utf8mb4"),
        "PEERS": [
            {"HOST": "db1", "CHECK_INTERVAL": 9},
            {"HOST": "db2", "PORT": 3307, "PRIORITY": 1, "CHECK_INTERVAL": 9},
            {"HOST": "db3", "PRIORITY": 1, "CHECK_INTERVAL": 9},
            {"HOST": "db4", **own},
        ],
    }
    with added({"default": entry}):
        assert problems("default", entry, {"default": entry}) == []


def test_what_a_further_url_does_not_say_is_the_firsts_and_no_password_of_another_user() -> None:
    first = "mysql://user:pw@db1/shop?charset=utf8mb4"
    assert from_url(first, "mysql://db2/shop", "mysql://user@db3/shop") == {
        **from_url(first),
        "PEERS": [{"HOST": "db1"}, {"HOST": "db2"}, {"HOST": "db3"}],
    }
    entry = from_url(first, "mysql://other@db2/shop", "mysql://db3/shop", "mysql://b:pw@db4/shop")
    assert entry.pop("PEERS") == [
        {"HOST": "db1", "PASSWORD": "pw"},
        {"HOST": "db2", "USER": "other"},
        {"HOST": "db3", "PASSWORD": "pw"},
        {"HOST": "db4", "USER": "b", "PASSWORD": "pw"},
    ]
    assert "PASSWORD" not in entry


@pytest.mark.parametrize(
    ("second", "problem"),
    [
        ("postgresql://b/shop", "Database URL 2 is of another kind than the first"),
        ("sqlite:///shop.sqlite3", "Database URL 2 is of another kind than the first"),
        (f"mysql://u:{SECRET}@b/shop?weight=-1", "Database URL 2 has a wrong 'weight'"),
        (f"mysql://u:{SECRET}@b/s?strategy=round_robin", "Database URL 2 has settings that are no"),
        (
            f"mysql://u:{SECRET}@b/s?conn_max_age=5",
            "Database URL 2 has settings that are no peer's",
        ),
        (f"u:{SECRET}@b/shop", "Database URL 2 has no scheme"),
        (None, "was given a NoneType"),
    ],
)
def test_a_further_url_that_is_wrong_is_named_by_its_place(second: Any, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem) as caught:
        from_url("mysql://a/shop", second)
    assert SECRET not in repr(caught.value)
    with pytest.raises(ConfigError):
        from_url("sqlite:///shop.sqlite3", "mysql://a/shop")


def test_what_is_no_str_is_refused_by_its_type() -> None:
    with pytest.raises(ConfigError, match="was given a NoneType"):
        from_url(None)  # type: ignore[arg-type]


_TEXT = some.text(some.characters(exclude_categories=("Cs",), exclude_characters="\0"), min_size=1)


@given(user=_TEXT, password=_TEXT, name=_TEXT, value=_TEXT)
def test_every_text_survives_percent_encoding(
    user: str, password: str, name: str, value: str
) -> None:
    user, password, name, option = (
        quote(part, safe="") for part in (user, password, name, "v" + value)
    )
    entry = from_url(f"mysql://{user}:{password}@a,b/{name}?charset={option}")
    said = (entry["USER"], entry["PASSWORD"], entry["NAME"], entry["OPTIONS"]["charset"])
    assert tuple(quote(part, safe="") for part in said) == (user, password, name, option)


#: A variable of the environment that is not UTF-8 has lone surrogates (PEP 383).
# A letter whose capital is of ASCII.
@example("mysql://a/s?\u017ftrategy=random&\u017fuccess_threshold=2")
@given(some.text(some.characters(categories=("L", "P", "S", "N", "Z", "C")), max_size=60))
def test_any_text_gives_an_entry_or_a_config_error(text: str) -> None:
    for url in (text, f"mysql://{text}", f"postgresql://u:p@a/x?{text}"):
        try:
            from_url(url)
        except ConfigError:
            pass


def test_a_site_connects_by_one_url(mariadb_pair: tuple[Node, Node]) -> None:
    hosts = ",".join(f"{node.host}:{node.port}" for node in mariadb_pair)
    entry = from_url(
        f"mysql://{USER}:{quote(PASSWORD, safe='')}@{hosts}/{DATABASE}?strategy=round_robin"
    )
    with added({"balanced": entry}):
        from django.db import connections

        seen = set()
        for _ in range(2):
            with connections["balanced"].cursor() as cursor:
                cursor.execute("SELECT @@port")
                seen.add(cursor.fetchone()[0])
            connections["balanced"].close()
    assert seen == {node.port for node in mariadb_pair}
