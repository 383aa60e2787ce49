"""The helper that gives other tests their load balancers."""

from __future__ import annotations

from pathlib import Path

import pytest
from django.db import connections

from django_proxysql import balancers
from tests.app.models import Token
from tests.engine import SQLITE, Clock, added, engine, sqlite_peer
from tests.fakes import in_thread


def test_engine_leaves_nothing_behind(tmp_path: Path) -> None:
    clock = Clock()
    of_thread = []

    def connect() -> None:
        connections["balanced"].ensure_connection()
        of_thread.append(connections["balanced"])

    with engine([sqlite_peer(tmp_path / "db")], PEER_ENGINE=SQLITE, clock=clock) as connection:
        with connection.schema_editor() as editor:
            editor.create_model(Token)
        Token.objects.using("balanced").create(value="one")
        assert Token.objects.using("balanced").get().value == "one"
        assert balancers["balanced"].clock is clock
        in_thread(connect)
    assert connection.connection is None
    assert of_thread[0].connection is None
    assert "balanced" not in connections.databases
    with pytest.raises(KeyError):
        balancers["balanced"]


def test_what_another_test_left_under_an_alias_is_not_taken_for_its_connection(
    tmp_path: Path,
) -> None:
    connections["second"] = object()
    with added({"second": {"ENGINE": SQLITE, "NAME": str(tmp_path / "db")}}):
        assert connections["second"].vendor == "sqlite"


def test_engine_stands_in_for_default(tmp_path: Path) -> None:
    before = connections["default"]
    peers = [sqlite_peer(tmp_path / "db")]
    with engine(peers, alias="default", PEER_ENGINE=SQLITE) as connection:
        assert connections["default"] is connection is not before
    assert connections["default"] is before
    assert connections.databases["default"] is before.settings_dict


def test_an_entry_whose_connection_cannot_be_closed_is_no_other_tests(tmp_path: Path) -> None:
    def fails() -> None:
        raise RuntimeError("not today")

    peers = [sqlite_peer(tmp_path / "db")]
    with pytest.raises(RuntimeError, match="not today"), engine(peers, PEER_ENGINE=SQLITE) as made:
        made.close = fails
    assert "balanced" not in connections.databases
    with pytest.raises(KeyError):
        balancers["balanced"]
