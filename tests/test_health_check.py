"""The check for django-health-check, by the real package's own view and command."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import django
import pytest
from django.core.management import call_command
from django.test import Client
from django.test.utils import override_settings
from django.urls import path

from django_proxysql import balancers
from tests.engine import SQLITE, Clock, engine, mysql_peer, sqlite_peer
from tests.servers import PASSWORD
from tests.servers.mariadb import Node

pytestmark = pytest.mark.skipif(
    django.VERSION < (5, 2) or sys.version_info < (3, 11),
    reason="django-health-check 4 is for Django 5.2 and later; installed from Python 3.11 on",
)

PATH = "django_proxysql.monitoring.health_check.Peers"
checks: list[Any] = []


async def health(request: Any) -> Any:
    """The view, with this test's checks."""
    from health_check.views import HealthCheckView

    return await HealthCheckView.as_view(checks=checks)(request)


urlpatterns = [path("health/", health, name="health_check")]


@pytest.fixture(autouse=True)
def site() -> Iterator[None]:
    with override_settings(ROOT_URLCONF=__name__, ALLOWED_HOSTS=["*"]):
        yield
    checks.clear()


def seen(**options: Any) -> tuple[int, str]:
    """Return the status and what is said of one check with these options."""
    checks[:] = [(PATH, options)]
    answer = Client().get("/health/?format=json")
    ((name, said),) = json.loads(answer.content).items()
    assert name == f"Peers(alias={options.get('alias', 'default')!r})"
    return answer.status_code, said


class Two:
    """A balancer over two files, the second of which can be taken away."""

    def __init__(self, root: Path) -> None:
        self.folder = root / "second"
        self.peers = [sqlite_peer(self.folder / "b"), sqlite_peer(root / "a", PRIORITY=1)]


def test_degraded(tmp_path: Path) -> None:
    """With one peer out the site works: only the strict check complains, and names it."""
    from django_proxysql.monitoring.health_check import Peers

    two = Two(tmp_path)
    with engine(two.peers, PEER_ENGINE=SQLITE):
        assert seen(alias="balanced") == (200, "OK")
        assert Peers("balanced").pretty_status() == "OK: peer0 open (unreachable)"
        assert seen(alias="balanced", strict=True) == (
            500,
            "Warning: some peers cannot be used: peer0 open (unreachable)",
        )


def test_drained_peer_is_nothing_to_complain_of(tmp_path: Path) -> None:
    peers = [sqlite_peer(tmp_path / name) for name in "ab"]
    with engine(peers, PEER_ENGINE=SQLITE):
        balancers["balanced"].drain("peer0")
        assert seen(alias="balanced", strict=True) == (200, "OK")


def test_none_left_and_back(tmp_path: Path) -> None:
    """It asks even if all circuits are open: in an idle process it is the one that finds out."""
    clock = Clock()
    two = Two(tmp_path)
    with engine(two.peers[:1], PEER_ENGINE=SQLITE, clock=clock) as connection:
        said = "Unavailable: no peer can be used: peer0 open (unreachable)"
        assert seen(alias="balanced") == (500, said)
        two.folder.mkdir()
        clock.advance(60)
        assert seen(alias="balanced", strict=True) == (200, "OK")
        # In a thread of its own, and closed again.
        assert connection.connection is None
        assert balancers["balanced"].peers["peer0"].connections == 0


def test_says_no_secrets(mariadb: Node) -> None:
    """No address, no user, no password: the page may be open to all."""
    with engine([mysql_peer(mariadb, PASSWORD="not-the-one")]):
        status, said = seen(alias="balanced")
    assert (status, said) == (500, "Unavailable: no peer can be used: peer0 open (refused)")
    assert PASSWORD not in said


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"alias": "default"}, "Unavailable: 'default' is no load balancer"),
        ({"alias": "nonesuch"}, "Unavailable: 'nonesuch' is no load balancer"),
        ({"alias": "balanced"}, "Unavailable: the load balancer's settings are wrong"),
    ],
)
def test_mistakes_in_settings_are_said(options: dict[str, Any], said: str) -> None:
    with engine([]):
        assert seen(**options) == (500, said)


def test_command_makes_the_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from health_check.management.commands.health_check import Command
    from health_check.views import HealthCheckView

    with engine([sqlite_peer(tmp_path / "a")], PEER_ENGINE=SQLITE):
        view = HealthCheckView.as_view(checks=[(PATH, {"alias": "balanced"})])
        urls = type(sys)("health_urls")
        vars(urls)["urlpatterns"] = [path("health/", view, name="health_check")]
        with override_settings(ROOT_URLCONF=urls), pytest.raises(SystemExit) as ended:
            call_command(Command(), "health_check", "--no-http")
    assert ended.value.code == 0
    assert "Peers(alias='balanced'): OK" in capsys.readouterr().out
