"""What a peer engine sends for each cursor is sent again when its connection is another.

Engines for tenants set the schema, the role or a variable in ``_cursor()`` or
``create_cursor()``: below our engine, as PEER_ENGINE, or over it, as a subclass of it.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from django.db import close_old_connections, transaction
from django.db.backends.mysql import base as mysql
from django.db.backends.postgresql import base as postgresql

from django_proxysql.backends.proxysql import base as ours
from tests.engine import ENGINE
from tests.servers.faultproxy import FaultProxy
from tests.site import Site, site
from tests.stories import Narrator

SET = {"postgresql": "SET app.tenant = 'acme'", "mysql": "SET time_zone = '+05:00'"}
ASK = {
    "postgresql": "SELECT current_setting('app.tenant', true)",
    "mysql": "SELECT @@session.time_zone",
}
ANSWER = {"postgresql": "acme", "mysql": "+05:00"}


class InCursor:
    """Sends it for each cursor."""

    def _cursor(self, name: Any = None) -> Any:
        cursor = super()._cursor(name) if name else super()._cursor()  # type: ignore[misc]
        if name is None:
            self.set_up(cursor)
        return cursor

    def set_up(self, cursor: Any) -> None:
        cursor.execute(SET[self.vendor])  # type: ignore[attr-defined]


class InCursorSilently(InCursor):
    """django-tenants keeps the errors of its SET to itself."""

    def set_up(self, cursor: Any) -> None:
        with contextlib.suppress(Exception):
            super().set_up(cursor)


class Once(InCursor):
    """Sends it once a connection, and forgets in close() that it has: django-tenants' limit."""

    is_set = False

    def close(self) -> None:
        self.is_set = False
        super().close()  # type: ignore[misc]

    def rollback(self) -> None:
        self.is_set = False
        super().rollback()  # type: ignore[misc]

    def set_up(self, cursor: Any) -> None:
        if not self.is_set:
            super().set_up(cursor)
            self.is_set = True


class InCreateCursor:
    def create_cursor(self, name: Any = None) -> Any:
        cursor = super().create_cursor(name)  # type: ignore[misc]
        if name is None:
            cursor.execute(SET[self.vendor])  # type: ignore[attr-defined]
        return cursor


@pytest.fixture(
    params=itertools.product(("below", "over"), (InCursor, InCursorSilently, InCreateCursor, Once)),
    ids=lambda param: f"{param[0]}-{param[1].__name__}",
)
def where(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture(params=["postgres", "mariadb"])
def tenants(
    request: pytest.FixtureRequest,
    where: tuple[str, type],
    fault_proxy: Callable[..., FaultProxy],
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Site]:
    side, made = where
    server = request.getfixturevalue(request.param)
    real = postgresql if request.param == "postgres" else mysql
    module = types.ModuleType("tenants_of_tests.base")
    package = types.ModuleType("tenants_of_tests")
    package.__path__ = []
    base = real.DatabaseWrapper if side == "below" else ours.DatabaseWrapper
    module.DatabaseWrapper = type("DatabaseWrapper", (made, base), {})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tenants_of_tests", package)
    monkeypatch.setitem(sys.modules, "tenants_of_tests.base", module)
    setting = {"PEER_ENGINE" if side == "below" else "ENGINE": "tenants_of_tests"}
    with site(server, fault_proxy, **setting) as found:
        found.sql("SELECT 1")
        yield found


def asked(tenants: Site, cursor: Any) -> Any:
    cursor.execute(ASK[tenants.connection.vendor])
    return cursor.fetchone()[0]


def is_set(tenants: Site, cursor: Any) -> bool:
    return bool(asked(tenants, cursor) == ANSWER[tenants.connection.vendor])


@pytest.mark.parametrize("happens", ["kill_idle", "cut after", "open"])
def test_a_cursor_that_outlives_its_connection_is_set_up_again(tenants: Site, happens: str) -> None:
    close_old_connections()
    with tenants.connection.cursor() as cursor:
        assert is_set(tenants, cursor)
        # What the engine sends is no session state, and no write.
        assert not tenants.session.holds
        tenants.session.wrote = False
        Narrator(tenants).tell(happens)
        cursor.execute("SELECT 1")
        assert is_set(tenants, cursor)
        assert tenants.replaced()


def test_a_new_cursor_after_a_loss_is_set_up(tenants: Site) -> None:
    tenants.kill_idle()
    with tenants.connection.cursor() as cursor:
        assert is_set(tenants, cursor)


def test_a_write_by_a_kept_cursor_runs_set_up(tenants: Site) -> None:
    with tenants.connection.cursor() as cursor:
        cursor.execute("SELECT 1")
        tenants.kill_idle()
        cursor.execute(f"INSERT INTO app_token (value) {ASK[tenants.connection.vendor]}")
    assert tenants.written() == [ANSWER[tenants.connection.vendor]]


def test_a_transaction_begun_again_runs_set_up(tenants: Site) -> None:
    with transaction.atomic(tenants.connection.alias), tenants.connection.cursor() as cursor:
        tenants.kill_idle()
        assert is_set(tenants, cursor)


def test_a_lock_is_not_lost_where_the_engine_hides_the_loss(tenants: Site) -> None:
    """What the engine kept to itself the application has not been shown."""
    lock = "SELECT GET_LOCK('a', 0)" if tenants.is_mysql else "SELECT pg_advisory_lock(7)"
    tenants.sql(lock)
    tenants.kill()
    with pytest.raises(Exception, match=r"\w"), tenants.connection.cursor() as cursor:
        cursor.execute("INSERT INTO app_token (value) VALUES ('under the lock')")
    assert tenants.written() == []


def test_the_engine_is_what_it_says(tenants: Site, where: Any) -> None:
    side, _ = where
    assert (tenants.connection.settings_dict["ENGINE"] == ENGINE) is (side == "below")
