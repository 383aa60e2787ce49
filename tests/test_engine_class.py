"""``load_backend(ENGINE).DatabaseWrapper`` is a backend's class, for those who ask no connection.

django-pgtrigger, psqlextra and others do so while Django starts.
"""

from __future__ import annotations

import copy
import pathlib
import pickle
import sys
from typing import Any
from unittest import mock

import pytest
from django.core.exceptions import ImproperlyConfigured
from django.db import connections
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.utils import load_backend

from django_proxysql.backends.peer.base import DatabaseWrapper as PeerWrapper
from django_proxysql.backends.proxysql.base import DatabaseWrapper
from django_proxysql.conf.aliases import introduce_peers
from django_proxysql.conf.keys import ENGINE, PEER_ALIAS_ENGINE
from tests.children import run_python
from tests.engine import MYSQL, POSTGRESQL, SQLITE, added, engine, sqlite_peer

#: What a backend's class is asked for.
ATTRIBUTES = (
    "vendor display_name Database features_class ops_class introspection_class data_types "
    "data_type_check_constraints data_types_suffix operators pattern_ops pattern_esc "
    "_limited_data_types get_database_version"
).split()
HELPERS = ["SchemaEditorClass", "client_class", "creation_class", "validation_class"]


class Own(DatabaseWrapper):
    """An engine of a project's own."""


def balancer(path: str = SQLITE, **settings: Any) -> dict[str, Any]:
    return {"ENGINE": ENGINE, "PEER_ENGINE": path, "PEERS": [{"NAME": ":memory:"}], **settings}


def assert_answers_as(cls: Any, path: str) -> None:
    real: Any = load_backend(path).DatabaseWrapper
    for name in ATTRIBUTES:
        assert getattr(cls, name, None) == getattr(real, name, None), name
    for name in HELPERS:
        assert issubclass(getattr(cls, name), getattr(real, name)), name


@pytest.mark.parametrize("path", [MYSQL, POSTGRESQL, SQLITE])
class TestAnswers:
    def test_as_the_peers_engine(self, path: str) -> None:
        with added({"balanced": balancer(path)}):
            cls = load_backend(ENGINE).DatabaseWrapper
            assert cls is DatabaseWrapper
            assert issubclass(cls, BaseDatabaseWrapper)
            assert_answers_as(cls, path)
            assert isinstance(connections["balanced"], cls)

    def test_where_the_engine_is_the_alias_peers_own(self, path: str) -> None:
        entries = {"own": {"ENGINE": path, "NAME": "x"}}
        with added({**entries, "balanced": {"ENGINE": ENGINE, "PEERS": ["own"]}}):
            introduce_peers()
            assert_answers_as(DatabaseWrapper, path)
            # What a settings dict of a peer names is one, too.
            named = load_backend(connections.databases["own"]["ENGINE"]).DatabaseWrapper
            assert named is PeerWrapper
            assert issubclass(named, BaseDatabaseWrapper)
            assert_answers_as(named, path)

    def test_a_project_s_own_engine(self, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """Two lines; it answers for its own balancer, whatever the first one's engine is."""
        module = type(sys)("tests.own_engine.base")
        module.DatabaseWrapper = Own  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "tests.own_engine.base", module)
        other = SQLITE if path != SQLITE else MYSQL
        entries = {
            "balanced": balancer(other),
            "second": {**balancer(path), "ENGINE": "tests.own_engine"},
        }
        with added(entries):
            assert_answers_as(DatabaseWrapper, other)
            assert_answers_as(Own, path)
            assert isinstance(connections["second"], Own)
            assert connections["second"].vendor == load_backend(path).DatabaseWrapper.vendor


class TestPatched:
    """What an app puts in the place of a helper takes effect: before a connection, and after."""

    @pytest.mark.parametrize("early", [True, False])
    @pytest.mark.parametrize("cls", [DatabaseWrapper, PeerWrapper])
    def test_schema_editor(self, cls: Any, early: bool, tmp_path: pathlib.Path) -> None:
        # A file: Django never closes a database in memory.
        entries = {"own": {"ENGINE": SQLITE, "NAME": str(tmp_path / "db")}}
        balanced = {"ENGINE": ENGINE, "PEERS": ["own"]}
        alias = "own" if cls is PeerWrapper else "balanced"
        with added({**entries, "balanced": balanced}):
            introduce_peers()
            if not early:
                assert connections[alias].SchemaEditorClass

            class Mixin:
                """As django-pgtrigger's."""

            before = cls.SchemaEditorClass
            patched = type("DatabaseSchemaEditor", (Mixin, before), {})
            with mock.patch.object(cls, "SchemaEditorClass", patched):
                assert cls.SchemaEditorClass is patched
                connection = connections[alias]
                with connection.schema_editor() as editor:
                    assert isinstance(editor, Mixin)
                    assert isinstance(editor, before)
            with connections[alias].schema_editor() as editor:
                assert not isinstance(editor, Mixin)

    @pytest.mark.parametrize("early", [True, False])
    def test_on_the_peers_own_engine(self, early: bool) -> None:
        real: Any = load_backend(SQLITE).DatabaseWrapper
        with engine([sqlite_peer(":memory:")], PEER_ENGINE=SQLITE) as connection:
            if not early:
                assert connection.SchemaEditorClass
            patched = type("DatabaseSchemaEditor", (real.SchemaEditorClass,), {})
            with mock.patch.object(real, "SchemaEditorClass", patched):
                assert issubclass(connection.SchemaEditorClass, patched)
                assert issubclass(DatabaseWrapper.SchemaEditorClass, patched)
            assert not issubclass(connection.SchemaEditorClass, patched)

    def test_stays_on_one_peer(self) -> None:
        """A patched editor is ours all the same: a migration stays on one peer."""
        real: Any = load_backend(SQLITE).DatabaseWrapper
        plain = type("DatabaseSchemaEditor", (real.SchemaEditorClass,), {})
        peers = [sqlite_peer(":memory:"), sqlite_peer(":memory:")]
        with engine(peers, PEER_ENGINE=SQLITE, STRATEGY="round_robin") as connection:
            with (
                mock.patch.object(DatabaseWrapper, "SchemaEditorClass", plain),
                connection.schema_editor() as editor,
            ):
                assert isinstance(editor, plain)
                peer = connection.peer
                connection.close()
                connection.ensure_connection()
                assert connection.peer is peer
            # Django never closes a database in memory.
            connection.connection.close()

    @pytest.mark.parametrize("name", HELPERS)
    def test_of_a_subclass(self, name: str) -> None:
        """A project's own engine may name its own helpers."""
        real: Any = getattr(load_backend(SQLITE).DatabaseWrapper, name)
        mine = type("Mine", (real,), {})
        cls = type("DatabaseWrapper", (DatabaseWrapper,), {name: mine})
        with added({"balanced": balancer()}):
            made = cls(connections.databases["balanced"], "balanced")
            assert issubclass(getattr(made, name), mine)

    def test_other_attributes(self) -> None:
        with engine([sqlite_peer(":memory:")], PEER_ENGINE=SQLITE) as connection:
            with mock.patch.object(DatabaseWrapper, "display_name", "Shop"):
                assert connection.display_name == "Shop"
            assert connection.display_name == DatabaseWrapper.display_name == "SQLite"


class TestUnknown:
    """Where no settings say what the engine is there is an error, and only where it is used."""

    @pytest.mark.parametrize("cls", [DatabaseWrapper, PeerWrapper])
    def test_no_balancer(self, cls: Any) -> None:
        with pytest.raises(ImproperlyConfigured, match="engine of the peers is not known"):
            cls.vendor  # noqa: B018
        assert not hasattr(cls, "SchemaEditorClass")
        assert getattr(cls, "nonesuch", 5) == 5
        assert issubclass(cls, BaseDatabaseWrapper)
        assert cls.__name__ == "DatabaseWrapper"

    def test_a_balancer_whose_settings_are_wrong(self) -> None:
        with (
            added({"balanced": balancer("nonesuch")}),
            pytest.raises(ImproperlyConfigured, match=r"'balanced'.*nonesuch"),
        ):
            DatabaseWrapper.vendor  # noqa: B018

    def test_settings_that_are_not_configured(self) -> None:
        script = """
            from django_proxysql.backends.proxysql.base import DatabaseWrapper
            class Mine(DatabaseWrapper):
                pass
            for cls in (DatabaseWrapper, Mine):
                try:
                    cls.vendor
                except Exception as exc:
                    print(type(exc).__name__, "settings" in str(exc))
        """
        printed = run_python(script, DJANGO_SETTINGS_MODULE="").stdout
        assert printed == "EngineUnknown True\n" * 2

    def test_a_name_that_no_engine_has(self) -> None:
        with added({"balanced": balancer()}), pytest.raises(AttributeError, match="nonesuch"):
            DatabaseWrapper.nonesuch  # noqa: B018

    @pytest.mark.parametrize("path", [ENGINE, PEER_ALIAS_ENGINE])
    def test_our_own_engine_below_ours(self, path: str) -> None:
        with added({"balanced": balancer(path)}), pytest.raises(ImproperlyConfigured):
            connections["balanced"].ensure_connection()


class TestMade:
    """The class of a connection."""

    def test_makes_another_connection(self) -> None:
        with engine([sqlite_peer(":memory:")], PEER_ENGINE=SQLITE) as connection:
            cls = connection.__class__
            assert cls is type(connection)
            assert type(cls(connection.settings_dict, connection.alias)) is cls
            assert type(connection.copy()) is type(copy.copy(connection)) is cls
            assert copy.deepcopy(cls) is cls

    def test_can_be_pickled(self) -> None:
        with engine([sqlite_peer(":memory:")], PEER_ENGINE=SQLITE) as connection:
            for cls in (type(connection), DatabaseWrapper, PeerWrapper, Own):
                assert pickle.loads(pickle.dumps(cls)) is cls

    def test_can_be_subclassed(self) -> None:
        with engine([sqlite_peer(":memory:")], PEER_ENGINE=SQLITE) as connection:

            class Deeper(type(connection)):  # type: ignore[misc]
                display_name = "deeper"

            made = Deeper(connection.settings_dict, connection.alias)
            assert type(made) is Deeper
            assert Deeper.vendor == made.vendor == "sqlite"
            made.ensure_connection()
            # Django never closes a database in memory.
            made.connection.close()
            made.close()
