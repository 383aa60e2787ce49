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


def found(*peers: Any, **entry: Any) -> list[tuple[str, str]]:
    """Return the checks' ids, and the settings that they name."""
    databases = {
        "default": {"ENGINE": ENGINE, "PEER_ENGINE": SQLITE, "PEERS": [*peers], **entry},
        "direct": {"ENGINE": SQLITE, "NAME": "x", "PEER_NAME": "a"},
    }
    found = problems("default", databases["default"], databases)
    return [(str(p.id)[-4:], p.msg.split()[1]) for p in found]


@pytest.mark.parametrize(
    ("given", "names"),
    [
        # Aliases keep their names, dicts are called peer and their place.
        (["", "peer1", ""], ["peer0", "peer1", "peer2"]),
        (["", "db2", ""], ["peer0", "db2", "peer2"]),
        # Where the first was removed.
        (["b", "c"], ["b", "c"]),
        # No name is given twice: neither an alias' nor another dict's.
        (["peer1", ""], ["peer1", "peer3"]),
        (["peer1", "peer2", ""], ["peer1", "peer2", "peer5"]),
    ],
)
def test_a_peer_has_its_own_name_or_is_called_by_its_place(
    tmp_path: Path, given: list[str], names: list[str]
) -> None:
    peers: list[Any] = []
    for name in given:
        own = {"PEER_NAME": name} if name else {}
        peers.append(name if name == "peer1" else sqlite_peer(tmp_path / f"{len(peers)}", **own))
    alias = {"ENGINE": SQLITE, **sqlite_peer(tmp_path / "alias")}
    with engine(peers, PEER_ENGINE=SQLITE, databases={"peer1": alias}) as connection:
        assert list(balancers[connection.alias].peers) == names


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
