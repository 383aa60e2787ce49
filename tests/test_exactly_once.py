"""``COMMIT_OUTCOME: "record"``: a COMMIT whose answer is lost is asked about, on real servers."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from django.db import OperationalError, transaction

from django_proxysql import retrying_atomic
from django_proxysql.core import outcome
from django_proxysql.core.events import CommitResolved
from django_proxysql.errors import CommitOutcomeUnknown
from tests.site import Site, site

#: What is in the packet of COMMIT, and in no AUTOCOMMIT. psycopg2 sends the token ahead.
COMMIT = b"COMMIT" if os.environ.get("TEST_DRIVER") == "psycopg2" else b"; COMMIT"


def run(connection: Any, *statements: str) -> list[Any]:
    """Run statements by Django's cursor; return the last one's rows."""
    with connection.cursor() as cursor:
        for statement in statements:
            cursor.execute(statement)
        return list(cursor.fetchall()) if cursor.description else []


def with_tokens(plain: Any) -> None:
    """Leave an empty table of tokens there."""
    run(plain, f"DROP TABLE IF EXISTS {outcome.TABLE}", outcome.creates(plain.vendor))


@contextlib.contextmanager
def recording(server: Any, fault_proxy: Callable[..., Any], **settings: Any) -> Iterator[Site]:
    with site(server, fault_proxy, **{"COMMIT_OUTCOME": "record", **settings}) as here:
        with_tokens(here.plain)
        yield here


@pytest.fixture(params=["mariadb", "postgres"])
def here(request: pytest.FixtureRequest, fault_proxy: Callable[..., Any]) -> Iterator[Site]:
    driver = os.environ.get("TEST_DRIVER")
    if driver and (driver == "psycopg2") is not (request.param == "postgres"):
        pytest.skip(f"{driver} is not {request.param}'s")
    with recording(request.getfixturevalue(request.param), fault_proxy) as made:
        yield made


def tokens(here: Site) -> list[bool]:
    """Who wrote each token that is there: True for a fence."""
    return [bool(fence) for (fence,) in run(here.plain, f"SELECT fence FROM {outcome.TABLE}")]


def resolved(here: Site) -> list[str]:
    return [event.outcome for event in here.events if type(event) is CommitResolved]


def block(here: Site, value: str) -> list[str]:
    """Write in a block; return what its hook saw, once for each time it ran."""
    ran: list[str] = []
    with transaction.atomic("balanced"):
        transaction.on_commit(lambda: ran.append(value), using="balanced")
        here.write(value)
    return ran


class TestVerdicts:
    def test_answered_commit_leaves_a_token(self, here: Site) -> None:
        assert block(here, "one") == ["one"]
        assert (here.written(), tokens(here), resolved(here)) == (["one"], [False], [])

    @pytest.mark.parametrize("how", ["after", "reply"])
    def test_committed_block_ends_well_and_runs_its_hooks_once(self, here: Site, how: str) -> None:
        here.read()
        if how == "after":
            here.here.cut_after(COMMIT)
        else:
            here.here.cut_reply(0, COMMIT)
        assert block(here, "one") == ["one"]
        assert (here.written(), tokens(here), resolved(here)) == (["one"], [False], ["committed"])
        assert block(here, "two") == ["two"]

    def test_rolled_back_block_says_so(self, here: Site) -> None:
        here.read()
        here.here.cut_before(COMMIT)
        with pytest.raises(OperationalError, match="was rolled back") as raised:
            block(here, "one")
        assert not isinstance(raised.value, CommitOutcomeUnknown)
        assert (here.written(), tokens(here), resolved(here)) == ([], [True], ["rolled_back"])
        assert block(here, "two") == ["two"]

    def test_unknown_where_nobody_can_tell_in_time(
        self, mariadb: Any, fault_proxy: Callable[..., Any]
    ) -> None:
        with recording(mariadb, fault_proxy, OUTCOME_DEADLINE=0.3) as here:
            here.read()
            here.here.cut_after(COMMIT)
            for proxy in here.proxies:
                proxy.refuse()
            with pytest.raises(CommitOutcomeUnknown):
                block(here, "one")
            assert (here.written(), resolved(here)) == (["one"], ["unknown"])


@pytest.mark.server
@pytest.mark.parametrize("driver", ["pymysql", "psycopg2"])
@pytest.mark.skipif("TEST_DRIVER" in os.environ, reason="this is that run")
def test_all_of_this_with(driver: str) -> None:
    pytest.importorskip(driver)
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "tests.other_driver", __file__],
        env={**os.environ, "TEST_DRIVER": driver},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout[-5000:]


class TestRunAgain:
    """retrying_atomic after a COMMIT whose answer is lost."""

    @pytest.mark.parametrize("how", ["before", "within", "after", "reply"])
    def test_a_block_stands_once_and_its_hooks_run_once(self, here: Site, how: str) -> None:
        here.read()
        runs: list[int] = []
        hooks: list[int] = []

        @retrying_atomic(here.connection.alias)
        def work() -> None:
            runs.append(1)
            run = len(runs)
            transaction.on_commit(lambda: hooks.append(run), using="balanced")
            here.write(f"run {run}")

        arguments = {"within": (20,), "reply": (0,)}.get(how, ())
        getattr(here.here, f"cut_{how}")(*arguments, matching=COMMIT)
        work()
        stands = 1 if how in ("after", "reply") else 2
        assert runs == [1] * stands
        assert hooks == [stands]
        assert here.written() == [f"run {stands}"]

    def test_a_commit_that_timed_out_and_was_not_done_is_run_again(
        self, mariadb: Any, fault_proxy: Callable[..., Any]
    ) -> None:
        options = {"read_timeout": 1}
        with recording(mariadb, fault_proxy, OPTIONS=options) as here:
            runs: list[int] = []
            here.read()
            frozen = here.here

            @retrying_atomic(here.connection.alias)
            def work() -> None:
                # Values that no test has used: beside a row that is deleted and not purged yet, the
                # open transaction's INSERT has the gap locked.
                values = ["frozen", "other"]
                here.write(values[len(runs)])
                if not runs:
                    frozen.freeze()
                runs.append(1)

            work()
            frozen.thaw()
            assert runs == [1, 1]
            assert here.written() == ["other"]
