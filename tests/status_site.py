"""A site with Django's admin and the status page, whose database is three SQLite peers."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

from django.core.management import call_command
from django.db import connections
from django.test import Client, override_settings

from django_proxysql.demo.peers import Peers
from django_proxysql.monitoring.history import history
from django_proxysql.registry import balancers
from tests.django_settings import INSTALLED_APPS, MIDDLEWARE
from tests.engine import SQLITE, Clock, engine

#: The tests' apps without the admin.
WITHOUT_ADMIN = [app for app in INSTALLED_APPS if app != "django.contrib.admin"]

#: For ROOT_URLCONF.
WITH_ADMIN, ALONE = "tests.status_urls", "tests.status_urls_alone"


def strict_content_policy(get_response: Any) -> Any:
    """Middleware: nothing but what the site itself serves may be run, shown or fetched."""

    def middleware(request: Any) -> Any:
        response = get_response(request)
        response["Content-Security-Policy"] = "default-src 'self'; img-src 'self' data:"
        return response

    return middleware


class Site:
    """What a test of the page works with."""

    def __init__(self, peers: Peers, clock: Clock | None) -> None:
        self.peers = peers
        self.clock = clock
        self.balancer = balancers["default"]

    def client(self, **user: Any) -> Client:
        """Return a client of a user with these attributes, who is logged in."""
        from django.contrib.auth.models import User

        client = Client(enforce_csrf_checks=user.pop("enforce_csrf_checks", False))
        name = user.setdefault("username", "alice")
        known, _ = User.objects.get_or_create(username=name, defaults=user)
        client.force_login(known)
        return client

    def admin(self) -> Client:
        """Return a client of a superuser's."""
        return self.client(is_staff=True, is_superuser=True)

    def fail(self, *names: str) -> None:
        """Take peers away, and have that noticed."""
        connections["default"].close()
        for name in names:
            self.peers.fail(name)
            with contextlib.suppress(Exception):
                self.connect_to(name)

    def connect_to(self, name: str) -> None:
        """Make a connection with no other peer to go to than this."""
        peer = self.balancer.peers[name]
        wrapper = connections["default"].copy()
        with self.balancer.pinned(peer):
            wrapper.connect()
        wrapper.close()


def migrated(folder: Path) -> Path:
    """Make a database file with the tables of all apps; return its path."""
    found = folder / "migrated.sqlite3"
    with settings(), engine([{"NAME": str(found)}], alias="default", PEER_ENGINE=SQLITE):
        call_command("migrate", verbosity=0)
    return found


def settings(**changed: Any) -> Any:
    """Return the site's settings, for a ``with`` block."""
    chosen = {
        "MIDDLEWARE": [*MIDDLEWARE, "tests.status_site.strict_content_policy"],
        "ROOT_URLCONF": WITH_ADMIN,
        "ALLOWED_HOSTS": ["*"],
        "PASSWORD_HASHERS": ["django.contrib.auth.hashers.MD5PasswordHasher"],
        **changed,
    }
    return override_settings(**chosen)


@contextlib.contextmanager
def status_site(
    template: Path,
    *,
    clock: Clock | None = None,
    breaker: dict[str, int] | None = None,
    **changed: Any,
) -> Iterator[Site]:
    """Yield a :class:`Site`.

    :param template: what :func:`migrated` has made.
    :param clock: the balancer's, and the timeline's.
    :param breaker: the balancer's setting BREAKER.
    :param changed: settings of the site's own.
    """
    with ExitStack() as stack:
        peers = Peers()
        databases = peers.start(stack)
        entries = [{"NAME": entry["NAME"]} for entry in databases.values()]
        shutil.copy(template, Path(entries[0]["NAME"]))
        stack.enter_context(settings(**changed))
        settings_of_it = {"STRATEGY": "round_robin", "BREAKER": breaker or {}}
        stack.enter_context(
            engine(entries, alias="default", PEER_ENGINE=SQLITE, clock=clock, **settings_of_it)
        )
        fresh: dict[str, Any] = {"_rows": {}, "_counted": {}}
        if clock is not None:
            fresh.update(clock=clock, began=clock())
        stack.enter_context(mock.patch.multiple(history, **fresh))
        yield Site(peers, clock)
