"""PEER_NAME: an inline peer's name, which it keeps when other peers come and go."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from django.core.management import call_command

from django_proxysql import balancers
from django_proxysql.conf.reading import problems
from tests.engine import SQLITE, engine, sqlite_peer

ENGINE = "django_proxysql.backends.proxysql"


def names_of(*peers: Any, databases: dict[str, Any] | None = None) -> list[str]:
    with engine([*peers], PEER_ENGINE=SQLITE, databases=databases) as connection:
        return list(balancers[connection.alias].peers)


def found(*peers: Any, **entry: Any) -> list[tuple[str, str]]:
    """Return the checks' ids, and the settings that they name."""
    databases = {
        "default": {"ENGINE": ENGINE, "PEER_ENGINE": SQLITE, "PEERS": [*peers], **entry},
        "direct": {"ENGINE": SQLITE, "NAME": "x", "PEER_NAME": "a"},
    }
    found = problems("default", databases["default"], databases)
    return [(str(p.id)[-4:], p.msg.split()[1]) for p in found]


def test_a_named_peer_has_its_name_and_the_others_have_their_place(tmp_path: Path) -> None:
    one, two, three = (sqlite_peer(tmp_path / name) for name in "abc")
    assert names_of(one, {**two, "PEER_NAME": "db2"}, three) == ["peer0", "db2", "peer2"]


def test_removing_the_first_peer_renames_no_named_peer(tmp_path: Path) -> None:
    peers = [{**sqlite_peer(tmp_path / name), "PEER_NAME": name} for name in ("a", "b", "c")]
    assert names_of(*peers[1:]) == ["b", "c"]


def test_a_place_that_is_another_peers_name_is_not_given_twice(tmp_path: Path) -> None:
    one, two = (sqlite_peer(tmp_path / name) for name in "ab")
    assert names_of({**one, "PEER_NAME": "peer1"}, two) == ["peer1", "peer3"]


def test_a_drain_and_the_list_of_peers_use_the_name(tmp_path: Path) -> None:
    peers = [{**sqlite_peer(tmp_path / n), "PEER_NAME": n} for n in ("east", "west")]
    with engine(peers, PEER_ENGINE=SQLITE) as connection:
        out = io.StringIO()
        call_command("peers", connection.alias, stdout=out)
        assert "east" in out.getvalue()
        balancers[connection.alias].drain("east")
        assert [p.name for p in balancers[connection.alias].group.undrained()] == ["west"]


@pytest.mark.parametrize("name", ["", " ", "a b", "a/b", "-a", 1, None.__class__, "ä", "a\n"])
def test_a_name_that_no_log_or_metric_can_hold_is_an_error(name: Any) -> None:
    assert ("E005", "PEER_NAME") in found({"NAME": "x", "PEER_NAME": name})


@pytest.mark.parametrize("name", ["a", "db-1.example:3306", "10.0.0.1", "_x"])
def test_a_good_name_is_no_problem(name: str) -> None:
    assert found({"NAME": "x", "PEER_NAME": name}) == []


def test_two_peers_of_one_name_are_an_error() -> None:
    one, two = {"NAME": "x", "PEER_NAME": "a"}, {"NAME": "y", "PEER_NAME": "a"}
    assert ("E011", "PEER_NAME") in found(one, two)
    assert ("E011", "PEER_NAME") in found("direct", {"NAME": "y", "PEER_NAME": "direct"})


def test_a_name_where_it_has_no_effect_is_a_warning() -> None:
    assert ("W004", "PEER_NAME") in found({"NAME": "x"}, PEER_NAME="a")
    assert ("W004", "PEER_NAME") in found("direct")
