"""The status page and the health endpoint: who may see what, and what the buttons do.

The site's database is the balancer itself, as it is with its users.
"""

from __future__ import annotations

import dataclasses
import html
import itertools
import json
import logging
import os
import re
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from django.conf import settings
from django.contrib import messages
from django.core.checks import run_checks
from django.db import (
    InterfaceError,
    OperationalError,
    close_old_connections,
    connections,
    transaction,
)
from django.test import Client, RequestFactory, override_settings
from django.urls import reverse

from django_proxysql.conf.keys import ENGINE
from django_proxysql.conf.options import OPTIONS
from django_proxysql.core.balancer import LoadBalancer
from django_proxysql.core.circuit import CLOSED, HALF_OPEN, OPEN
from django_proxysql.core.events import BlockRetried, CommitResolved
from django_proxysql.core.faults import Fault
from django_proxysql.core.sharing import Fleet, Moment, Sharing
from django_proxysql.monitoring import views
from django_proxysql.monitoring.history import History
from django_proxysql.monitoring.status import (
    NONE,
    PeerStatus,
    balancer_status,
    fleet_changes,
    laid_over,
    status,
)
from django_proxysql.registry import balancers
from tests.django_settings import MIDDLEWARE
from tests.engine import SQLITE, Clock, added, engine, mysql_peer
from tests.fakes import bad_password, raised_by, refused_by_host
from tests.servers import DATABASE, PASSWORD, USER
from tests.servers.redis import RedisServer
from tests.shared_process import SharedProcess
from tests.status_site import ALONE, WITHOUT_ADMIN, Site, migrated, status_site
from tests.test_sharing import Process, SteppedLink, World

NAMES = ("peer0", "peer1", "peer2")
PAGE, OPERATE, HEALTHZ = "/peers/", "/peers/peer/", "/peers/healthz"


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database file with the apps' tables."""
    return migrated(tmp_path_factory.mktemp("status"))


@pytest.fixture
def world(redis_server: RedisServer) -> World:
    return World(redis_server.url)


@pytest.fixture
def site(tables: Path) -> Iterator[Site]:
    with status_site(tables, clock=Clock()) as made:
        yield made


def operate(client: Client, follow: bool = False, **data: str) -> Any:
    form = {"balancer": "default", "peer": "peer1", "action": "drain", **data}
    return client.post(OPERATE, form, follow=follow)


def drain(client: Client, peer: str = "peer1", **data: str) -> Any:
    return operate(client, peer=peer, **data)


def raising(error: type[Exception]) -> Any:
    def fails(*args: Any, **kwargs: Any) -> None:
        raise error("connection already closed")

    return fails


def drained(site: Site) -> list[str]:
    return [peer.name for peer in site.balancer.peers.values() if peer.drained]


def said(response: Any) -> list[str]:
    return [str(message) for message in messages.get_messages(response.wsgi_request)]


def text_of(response: Any) -> str:
    """What the page says, without its tags."""
    content = re.sub(r"<svg.*?</svg>", "", response.content.decode(), flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", content)).split())


class TestWhoMaySeeIt:
    def test_staff(self, site: Site) -> None:
        response = site.client(is_staff=True).get(PAGE)
        assert response.status_code == 200
        assert "no-store" in response["Cache-Control"]
        assert response["X-Frame-Options"] == "DENY"

    def test_anonymous_visitor(self, site: Site) -> None:
        """Is sent to the admin's login, and from there back."""
        response = Client().get(PAGE)
        assert (response.status_code, response["Location"]) == (
            302,
            "/admin/login/?next=%2Fpeers%2F",
        )
        assert drain(Client()).status_code == 302
        assert drained(site) == []

    @pytest.mark.parametrize(
        "attributes",
        [{}, {"is_superuser": True}, {"is_staff": True, "is_active": False}],
        ids=["no flag", "a superuser", "staff that is not active"],
    )
    def test_who_is_no_active_staff_sees_and_drains_nothing(
        self, site: Site, attributes: dict[str, bool]
    ) -> None:
        # Django's own backend does not know inactive users; one that does is no way in.
        with override_settings(
            AUTHENTICATION_BACKENDS=["django.contrib.auth.backends.AllowAllUsersModelBackend"]
        ):
            client = site.client(**attributes)
            response = client.get(PAGE)
            assert response.status_code == drain(client).status_code == 403
        assert "You are logged in as alice, which is no staff account." in text_of(response)
        assert "shop.sqlite3" not in response.content.decode()
        assert drained(site) == []

    def test_site_without_users(self, tables: Path) -> None:
        with status_site(tables, MIDDLEWARE=[]):
            response = Client().get(PAGE)
            assert response.status_code == 403
            assert "the site has no AuthenticationMiddleware" in text_of(response)

    def test_users_that_know_of_no_staff(self, site: Site) -> None:
        """A user model of the site's own need not have Django's flags."""
        request = RequestFactory().get(PAGE)
        request.user = SimpleNamespace(  # type: ignore[assignment]
            is_active=True, is_authenticated=True, get_username=lambda: "carol"
        )
        response = views.page(request)
        assert response.status_code == 403
        assert b"You are logged in as carol" in response.content

    def test_app_that_is_not_installed(self, tables: Path) -> None:
        """The admin's templates could not find ours: the page has its own frame then."""
        apps = [app for app in settings.INSTALLED_APPS if app != "django_proxysql"]
        with status_site(tables, INSTALLED_APPS=apps) as site:
            text = text_of(site.admin().get(PAGE))
            assert "django-proxysql Database peers" in text
            assert "Django administration" not in text

    def test_site_without_admin(self, tables: Path) -> None:
        """Shows the page in a frame of its own; the login is the site's, if there is one."""
        with status_site(
            tables, INSTALLED_APPS=WITHOUT_ADMIN, ROOT_URLCONF=ALONE, TEMPLATES=[]
        ) as site:
            response = Client().get("/ops/db/")
            assert response.status_code == 403
            assert "Log in first, with a staff account." in text_of(response)
            with override_settings(LOGIN_URL="ops:django_proxysql:healthz"):
                response = Client().get("/ops/db/")
                assert response["Location"] == "/ops/db/healthz?next=%2Fops%2Fdb%2F"
            client = site.admin()
            assert "All 3 peers usable" in text_of(client.get("/ops/db/"))
            form = {"balancer": "default", "peer": "peer0", "action": "drain"}
            response = client.post("/ops/db/peer/", form, follow=True)
            assert response.redirect_chain == [("/ops/db/", 302)]
            assert "You drained peer0 (load balancer default)" in text_of(response)
            assert drained(site) == ["peer0"]

    @pytest.mark.parametrize("error", [None, InterfaceError, OperationalError])
    def test_database_is_down(
        self, site: Site, monkeypatch: pytest.MonkeyPatch, error: type[Exception] | None
    ) -> None:
        """It is unknown then who asks: the page says so, whichever kind of error that is."""
        client = site.admin()
        if error is None:
            site.fail(*NAMES)
        else:
            monkeypatch.setattr(connections["default"], "cursor", raising(error))
        for response in (client.get(PAGE), drain(client)):
            assert response.status_code == 503
            assert "cannot tell whether you may see it" in text_of(response)
        assert drained(site) == []

    @pytest.mark.parametrize("error", [InterfaceError, OperationalError])
    def test_permissions_cannot_be_asked_for(
        self, site: Site, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
    ) -> None:
        """A user who cannot be shown to have it is taken not to have it."""
        from django.contrib.auth.models import User

        client = site.client(is_staff=True)
        monkeypatch.setattr(User, "has_perm", raising(error))
        with override_settings(DJANGO_PROXYSQL={"OPERATE_PERMISSION": "auth.change_user"}):
            assert client.get(PAGE).status_code == 200
            assert drain(client).status_code == 403
        assert drained(site) == []


class TestPage:
    def test_what_it_shows(self, site: Site) -> None:
        """Peers, state, last error, connections, share; process and host."""
        client = site.admin()
        assert '<p class="peers-headline good">' in client.get(PAGE).content.decode()
        site.clock.advance(60)
        site.fail("peer1")
        site.clock.advance(10)
        response = client.get(PAGE)
        assert '<p class="peers-headline warning">' in response.content.decode()
        text = text_of(response)
        assert f"Process {os.getpid()} on {socket.gethostname()} answers" in text
        assert "2 of 3 peers usable" in text
        peer1 = text.partition("peer1/shop.sqlite3")[2].partition("peer2")[0]
        assert re.match(
            r" Left alone open, next trial due in 20 s \d\d:\d\d:\d\d unable to open database file"
            rf" 0 (\d+%|{NONE}) Drain peer1 Retry now peer1",
            peer1,
        )
        peer0 = text.partition("peer0/shop.sqlite3")[2]
        assert re.match(rf" In use closed the start {NONE} \d+ (\d+%|{NONE}) Drain peer0", peer0)

    def test_connections_and_share(self, site: Site) -> None:
        client = site.admin()
        holds = [
            site.balancer.peers[name].check_out() for name in ("peer0", "peer0", "peer0", "peer1")
        ]
        text = text_of(client.get(PAGE))
        found = re.findall(rf"{NONE} (\d+) (\d+)% Drain", text)
        # The page's own connection, if it needs one, is counted.
        assert sum(int(number) for number, _ in found) in (4, 5)
        assert [share for _, share in found] == ["75", "25", "0"]
        del holds

    def test_the_pages_own_connection_is_no_share(self, site: Site) -> None:
        """A page that is the only one to use the database says nothing of shares."""
        client = site.admin()
        client.get(PAGE)
        text = text_of(client.get(PAGE))
        assert re.findall(rf"{NONE} \d+ (\S+) Drain", text) == [NONE] * 3

    def test_timeline(self, site: Site) -> None:
        """Is drawn into the page, and told in words."""
        client = site.admin()
        client.get(PAGE)
        site.clock.advance(600)
        site.fail("peer1")
        site.clock.advance(900)
        page = client.get(PAGE).content.decode()
        rows = re.findall(r"<g .*?</g>", page, re.DOTALL)
        assert len(rows) == 3
        bars = re.findall(r'class="bar bar-(\w+)" x="([\d.]+)%" .* width="([\d.]+)%"', rows[1])
        assert {state: round(float(width)) for state, _, width in bars} == {
            "unknown": 58,
            "closed": 17,
            "open": 25,
        }
        assert re.search(
            r"peer1 open since [\d:]{8}; before that closed since [\d:]{8}; before that unknown",
            text_of(client.get(PAGE)),
        )

    def test_what_the_engine_did_in_the_last_hour(self, site: Site, monkeypatch: Any) -> None:
        """COMMITs that were asked about are counted where the setting is; blocks anywhere."""
        client, name = site.admin(), site.balancer.name
        text = text_of(client.get(PAGE))
        assert "COMMIT" not in text
        assert "run again" not in text
        config = dataclasses.replace(site.balancer.config, commit_outcome="record")
        monkeypatch.setattr(site.balancer, "config", config)
        site.balancer.group.emit(BlockRetried(name, "shop.views.place", 2, "(1213)"))
        assert "No COMMIT was left unanswered." in text_of(client.get(PAGE))
        for outcome, later in (("unknown", 3000), ("committed", 700), ("rolled_back", 0)):
            site.balancer.group.emit(BlockRetried(name, "shop.views.place", 2, "(1213)"))
            site.balancer.group.emit(CommitResolved(name, "peer0", "", outcome, 0.1, "(2013)"))
            site.clock.advance(later)
        text = text_of(client.get(PAGE))
        assert "Blocks and views that were run again: 2." in text
        assert "what the engine found out: 1 committed, 1 rolled back." in text

    def test_shows_the_desired_state(self, site: Site) -> None:
        site.balancer.drain("peer1")
        site.fail("peer2")
        site.balancer.drain("peer2")
        text = text_of(site.admin().get(PAGE))
        assert "Drained no new connections; its circuit is open" in text
        assert text.count("Take back") == 2
        assert "Retry now" not in text
        assert "1 of 3 peers usable" in text

    def test_nothing_to_show(self, tmp_path: Path) -> None:
        """A site that has the page, and no load balancer yet."""
        with added({"default": {"ENGINE": SQLITE, "NAME": str(tmp_path / "plain")}}):
            assert status().balancers == []

    def test_wrong_settings(self, site: Site) -> None:
        """Are said on the page; the other balancers are shown."""
        with added({"broken": {"ENGINE": "django_proxysql.backends.proxysql", "PEERS": []}}):
            text = text_of(site.admin().get(PAGE))
            assert "Load balancer broken DATABASES['broken']: PEERS" in text
            assert "Load balancer default" in text

    def test_what_peers_say_is_no_markup(self, site: Site) -> None:
        failed = Exception("<script>alert(1)</script>")
        site.balancer.peers["peer1"].breaker.trip(failed, Fault.NOT_READY)
        page = site.admin().get(PAGE).content.decode()
        assert "<script>alert" not in page
        assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page

    def test_weights_and_priorities_where_they_differ(self, tmp_path: Path) -> None:
        peers = [{"NAME": str(tmp_path / "a"), "WEIGHT": 2.5}, {"NAME": str(tmp_path / "b")}]
        with engine(peers, PEER_ENGINE=SQLITE):
            (shown,) = [one for one in status().balancers if one.alias == "balanced"]
        assert shown.has_weights
        assert not shown.has_priorities
        assert [peer.weight for peer in shown.peers] == ["2.5", "1"]

    def test_languages_with_a_decimal_comma(self, tables: Path) -> None:
        """Do not get into the drawing, nor do thousands into numbers."""
        peers = [{"NAME": f"/nowhere/{number}"} for number in range(30)]
        many = {"ENGINE": ENGINE, "PEER_ENGINE": SQLITE, "PEERS": peers}
        with (
            status_site(
                tables, LANGUAGE_CODE="de", USE_THOUSAND_SEPARATOR=True, USE_L10N=True
            ) as site,
            added({"many": many}),
        ):
            page = site.admin().get(PAGE).content.decode()
        assert not re.findall(r'"\d+,\d+%?"', page)
        assert re.findall(r"translate\(0 (\d+)\)", page)[-1] == "1218"
        assert re.findall(r' height="(\d+)" role="img"', page) == ["148", "1282"]
        assert not re.findall(r' y2?="\d+\D\d+"', page)
        assert f"Process {os.getpid()}<" in page

    def test_opens_no_connection_by_itself(self, site: Site, monkeypatch: Any) -> None:
        """Where it need not ask who asks, it asks no database; nor does ATOMIC_REQUESTS."""
        monkeypatch.setattr(views, "_is_staff", lambda request: True)
        monkeypatch.setattr(views, "_may_operate", lambda request: True)
        monkeypatch.setitem(connections["default"].settings_dict, "ATOMIC_REQUESTS", True)
        monkeypatch.setitem(connections.databases["default"], "ATOMIC_REQUESTS", True)
        connections["default"].close()
        with override_settings(INSTALLED_APPS=WITHOUT_ADMIN, ROOT_URLCONF=ALONE, MIDDLEWARE=[]):
            assert Client().get("/ops/db/").status_code == 200
        assert connections["default"].connection is None
        assert sum(peer.connections for peer in site.balancer.peers.values()) == 0

    @pytest.mark.parametrize(
        ("name", "kind"), [("status.css", "text/css"), ("status.js", "text/javascript")]
    )
    def test_looks_and_script(self, site: Site, name: str, kind: str) -> None:
        """Are kept by browsers as long as they are the present ones."""
        page = site.admin().get(PAGE).content.decode()
        found = re.search(rf'"(/peers/{re.escape(name)}\?\w+)"', page)
        assert found
        response = Client().get(found[1])
        assert response["Content-Type"] == f"{kind}; charset=utf-8"
        assert "immutable" in response["Cache-Control"]
        assert Client().get(f"/peers/{name}?old")["Cache-Control"] == "no-cache"


class TestButtons:
    def test_drain_and_take_back(self, site: Site, caplog: pytest.LogCaptureFixture) -> None:
        """With a word for who did it, a line in the log, and one in the admin's."""
        from django.contrib.admin.models import LogEntry

        client = site.admin()
        response = drain(client)
        assert (response.status_code, response["Location"]) == (302, PAGE)
        assert drained(site) == ["peer1"]
        where = f"process {os.getpid()} on {socket.gethostname()}"
        (message,) = messages.get_messages(response.wsgi_request)
        assert str(message) == f"You drained peer1 (load balancer default), in {where} only."
        assert message.level == messages.SUCCESS
        (record,) = [r for r in caplog.records if "status page" in r.getMessage()]
        assert record.getMessage() == "default: on the status page alice drained peer1"
        assert record.levelno == logging.WARNING
        assert [vars(record)[key] for key in ("alias", "peer", "user")] == [
            "default",
            "peer1",
            "alice",
        ]
        entry = LogEntry.objects.get()
        assert entry.user.username == "alice"
        assert entry.object_repr == "peer1 of load balancer default"
        assert entry.change_message == f"Drained peer1, in {where} only."
        assert "peer1 of load balancer default" in text_of(client.get("/admin/"))

        text = text_of(operate(client, action="undrain", follow=True))
        assert "You took peer1 back into use" in text
        assert drained(site) == []
        assert LogEntry.objects.count() == 2

    def test_connections_leave_a_drained_peer(self, site: Site, on_mariadb: Any) -> None:
        """Of a real server: at the next statement outside a transaction, without harm."""
        client = site.admin()
        here = on_mariadb
        here.write("one")
        close_old_connections()
        before = here.connection.peer.name
        with transaction.atomic(here.connection.alias):
            here.write("two")
            site.clock.advance(5)
            response = operate(client, balancer="balanced", peer=before)
            assert said(response)[-1].startswith(f"You drained {before} ")
            here.write("three")
            assert here.connection.peer.name == before
        close_old_connections()
        assert here.read() == ["one", "two", "three"]
        assert here.connection.peer.name != before
        assert here.balancer.peers[before].connections == 0
        text = text_of(client.get(PAGE)).partition("Load balancer balanced")[2]
        assert re.search(
            rf"{before} \S+ Drained no new connections [\d:]+ {NONE} 0 (0%|{NONE}) ", text
        )

    def retry(self, client: Client) -> str:
        return said(operate(client, action="retry"))[-1]

    def test_retry_now(self, site: Site) -> None:
        """The trial is made at once, long before its interval is over, and keeps no connection."""
        client = site.admin()
        site.fail("peer1")
        assert self.retry(client) == (
            "You had peer1 tried, without success: unable to open database file "
            "(load balancer default)."
        )
        site.peers.restore("peer1")
        assert self.retry(client) == (
            "You had peer1 tried: it is in use again (load balancer default)."
        )
        assert site.balancer.peers["peer1"].breaker.current_state == CLOSED
        assert site.balancer.peers["peer1"].connections == 0

    def test_retry_of_one_in_doubt(self, site: Site) -> None:
        site.balancer.peers["peer1"].breaker.suspect("lost")
        assert "it is in use again" in self.retry(site.admin())
        assert site.balancer.peers["peer1"].is_available

    def test_retry_of_one_that_must_answer_twice(self, tables: Path) -> None:
        with status_site(tables, breaker={"success_threshold": 2}) as site:
            client = site.admin()
            site.fail("peer1")
            site.peers.restore("peer1")
            assert "it answered, and has to again before it is in use" in self.retry(client)
            assert "it is in use again" in self.retry(client)

    def test_retry_while_another_tries(self, site: Site) -> None:
        """Two at once are never made."""
        site.fail("peer1")
        permit = site.balancer.peers["peer1"].breaker.acquire(last_resort=0)
        assert "another trial of it is under way" in self.retry(site.admin())
        permit.released()

    def test_retry_while_another_process_tries(self, site: Site, redis_server: RedisServer) -> None:
        """… nor over all processes that share the circuit."""
        client = site.admin()
        config = dataclasses.replace(site.balancer.config, shared_state=redis_server.url)
        other: Any = LoadBalancer(config)
        site.fail("peer1")
        for balancer in (site.balancer, other):
            balancer.group.share(Sharing(balancer.group, SteppedLink(redis_server.url)))
            assert balancer.sharing.settle()
        assert other.sharing.may_try("peer1", by_hand=True) == 0
        site.peers.restore("peer1")
        assert self.retry(client) == (
            "You had peer1 not tried, for another process is trying it (load balancer default)."
        )
        assert site.balancer.peers["peer1"].breaker.current_state == OPEN
        # Its trial is over, and has said nothing.
        assert other.sharing.settle()
        assert "it is in use again" in self.retry(client)

    def test_retry_that_cannot_be_made(self, site: Site, monkeypatch: Any) -> None:
        """A mistake of this process's is said, and counts for nothing."""
        site.fail("peer1")
        monkeypatch.setattr(site.balancer, "opens", raising(OSError))
        assert "which could not be done: " in self.retry(site.admin())
        assert site.balancer.peers["peer1"].breaker.trial is None

    def test_retry_of_what_needs_none(self, site: Site) -> None:
        """A peer in use is not taken out of it for that."""
        client = site.admin()
        assert "had peer1 not tried, for its circuit is closed" in self.retry(client)
        assert site.balancer.peers["peer1"].breaker.is_available
        site.fail("peer1")
        site.balancer.drain("peer1")
        assert "had peer1 not tried, for it is drained" in self.retry(client)
        assert site.balancer.peers["peer1"].breaker.current_state == OPEN

    def test_last_peer(self, site: Site) -> None:
        """Is drained only by one who has been asked."""
        client = site.admin()
        drain(client, "peer0")
        drain(client, "peer1")
        response = drain(client, "peer2")
        assert response.status_code == 409
        text = text_of(response)
        assert "'peer2' is the last peer of 'default' that takes connections" in text
        assert "Nothing was changed. Drain peer2 all the same" in text
        assert 'data-refresh="0"' in response.content.decode()
        assert drained(site) == ["peer0", "peer1"]
        assert drain(client, "peer2", force="yes").status_code == 302
        assert drained(site) == ["peer0", "peer1", "peer2"]

    def test_without_token(self, site: Site) -> None:
        """Nothing is changed, also where Django's own middleware is off."""
        without = [entry for entry in MIDDLEWARE if "Csrf" not in entry]
        for middleware in (MIDDLEWARE, without):
            with override_settings(MIDDLEWARE=middleware):
                client = site.client(is_staff=True, is_superuser=True, enforce_csrf_checks=True)
                response = drain(client)
                assert response.status_code == 403
                assert "CSRF verification failed" in text_of(response)
                assert drained(site) == []
                page = client.get(PAGE).content.decode()
                found = re.search(r'name="csrfmiddlewaretoken" value="(\w+)"', page)
                assert found
                assert drain(client, csrfmiddlewaretoken=found[1]).status_code == 302
                assert drained(site) == ["peer1"]
                site.balancer.undrain("peer1")

    def test_staff_may_look(self, site: Site) -> None:
        client = site.client(is_staff=True)
        text = text_of(client.get(PAGE))
        assert "To drain a peer or to have it tried takes a superuser." in text
        assert "Actions" not in text
        response = drain(client)
        assert response.status_code == 403
        assert "You may look, but not drain That takes a superuser." in text_of(response)
        assert drained(site) == []

    def test_permission(self, site: Site) -> None:
        """A site may name one of its own."""
        from django.contrib.auth.models import Permission

        with override_settings(DJANGO_PROXYSQL={"OPERATE_PERMISSION": "auth.change_group"}):
            client = site.client(is_staff=True)
            assert "takes the permission auth.change_group" in text_of(client.get(PAGE))
            assert drain(client).status_code == 403
            assert drained(site) == []
            other = site.client(is_staff=True, username="bob")
            from django.contrib.auth.models import User

            User.objects.get(username="bob").user_permissions.add(
                Permission.objects.get(codename="change_group")
            )
            assert drain(other).status_code == 302
            assert drained(site) == ["peer1"]

    @pytest.mark.parametrize(
        ("form", "code", "text"),
        [
            ({"peer": "peer9"}, 404, "There is no load balancer 'default' with a peer 'peer9'"),
            ({"balancer": "else"}, 404, "There is no load balancer 'else'"),
            ({"action": "stop"}, 400, "It is drain, undrain or retry."),
            ({"action": ""}, 400, "It is drain, undrain or retry."),
        ],
    )
    def test_nonsense(self, site: Site, form: dict[str, str], code: int, text: str) -> None:
        response = operate(site.admin(), **form)
        assert response.status_code == code
        assert text in text_of(response)
        assert drained(site) == []

    def test_wrong_methods(self, site: Site) -> None:
        client = site.admin()
        assert client.get(OPERATE).status_code == 405
        assert client.post(PAGE).status_code == 405

    @pytest.mark.parametrize("error", [InterfaceError, OperationalError])
    def test_admin_log_that_cannot_be_written(
        self,
        site: Site,
        monkeypatch: Any,
        caplog: pytest.LogCaptureFixture,
        error: type[Exception],
    ) -> None:
        """The drain holds; the log says what could not be written."""
        from django.contrib.admin.models import LogEntry

        monkeypatch.setattr(LogEntry.objects, "create", raising(error))
        assert drain(site.admin()).status_code == 302
        assert drained(site) == ["peer1"]
        assert "default: the admin's log could not be written" in caplog.messages


class TestHealthz:
    def test_off_by_default(self, site: Site) -> None:
        assert OPTIONS["HEALTHZ"] is False
        assert Client().get(HEALTHZ).status_code == 404
        assert site.admin().get(HEALTHZ).status_code == 404

    @pytest.fixture
    def on(self, site: Site) -> Iterator[Site]:
        with override_settings(DJANGO_PROXYSQL={"HEALTHZ": True}):
            yield site

    def test_well(self, on: Site) -> None:
        response = Client().get(HEALTHZ)
        assert response.status_code == 200
        assert response["Content-Type"] == "application/json"
        assert "no-store" in response["Cache-Control"]
        assert json.loads(response.content) == {
            "status": "ok",
            "balancers": {"default": {"usable": 3, "peers": 3}},
        }
        assert Client().head(HEALTHZ).status_code == 200
        assert Client().post(HEALTHZ).status_code == 405

    def test_peers_that_are_not_usable(self, on: Site) -> None:
        """Drained or out; one in doubt is usable."""
        on.fail("peer0")
        on.balancer.drain("peer1")
        on.balancer.peers["peer2"].breaker.suspect()
        response = Client().get(HEALTHZ)
        assert response.status_code == 200
        assert response.json()["balancers"]["default"] == {"usable": 1, "peers": 3}
        on.fail("peer2")
        response = Client().get(HEALTHZ)
        assert response.status_code == 503
        assert response.json() == {
            "status": "unavailable",
            "balancers": {"default": {"usable": 0, "peers": 3}},
        }

    def test_one_balancer_of_several(self, on: Site) -> None:
        """That has no usable peer, or wrong settings, is enough."""
        with added({"broken": {"ENGINE": "django_proxysql.backends.proxysql", "PEERS": []}}):
            response = Client().get(HEALTHZ)
            assert response.status_code == 503
            assert response.json()["balancers"]["broken"] == {"usable": 0, "peers": 0}

    def test_opens_no_connection(self, on: Site, monkeypatch: Any) -> None:
        """Neither by itself, nor by ATOMIC_REQUESTS, nor for one who is logged in."""
        client = on.admin()
        connections["default"].close()
        monkeypatch.setitem(connections.databases["default"], "ATOMIC_REQUESTS", True)
        made: list[Any] = []
        on.balancer.add_listener(made.append)
        for asking in (client, Client()):
            assert asking.get(HEALTHZ).status_code == 200
        assert made == []

    def test_tells_no_addresses(self, on: Site) -> None:
        """To anyone not staff."""
        on.fail("peer0")
        for asking in (Client(), on.client()):
            response = asking.get(HEALTHZ, {"detail": "1"})
            assert list(response.json()) == ["status", "balancers"]
            assert "sqlite3" not in response.content.decode()
            assert "unable to open" not in response.content.decode()

    def test_tells_staff(self, on: Site) -> None:
        on.fail("peer0")
        response = on.client(is_staff=True).get(HEALTHZ, {"detail": "1"})
        answer = response.json()
        assert str(os.getpid()) in answer["process"]
        first = answer["balancers"]["default"]["states"][0]
        assert first.pop("address").endswith("peer0/shop.sqlite3")
        assert first.pop("connections") >= 0
        assert first == {
            "peer": "peer0",
            "circuit": "open",
            "suspect": False,
            "drained": False,
            "error": "unable to open database file",
        }

    def test_detail_while_the_database_is_down(self, on: Site) -> None:
        """Who asks is unknown: the answer is everybody's."""
        client = on.admin()
        on.fail(*NAMES)
        response = client.get(HEALTHZ, {"detail": "1"})
        assert response.status_code == 503
        assert list(response.json()) == ["status", "balancers"]


class TestAdmin:
    def test_link(self, site: Site) -> None:
        """Stands on the admin's index, although the app comes after the admin."""
        apps = settings.INSTALLED_APPS
        assert apps.index("django_proxysql") > apps.index("django.contrib.admin")
        index = site.admin().get("/admin/").content.decode()
        assert f'href="{reverse("django_proxysql:status")}"' in index
        assert "Status of the peers" in index
        assert "Users" in index

    def test_site_without_the_page(self, tables: Path) -> None:
        """Has no link to it."""
        with status_site(tables, ROOT_URLCONF="tests.status_urls_admin_only") as site:
            index = site.admin().get("/admin/").content.decode()
            assert "Users" in index
            assert "Status of the peers" not in index

    def test_index_of_the_sites_own(self, site: Site) -> None:
        """A template that somebody has chosen is left alone."""
        from django.apps import apps
        from django.contrib import admin

        ours = admin.site.index_template
        try:
            admin.site.index_template = "admin/index.html"
            apps.get_app_config("django_proxysql").ready()
            assert admin.site.index_template == "admin/index.html"
            admin.site.index_template = None
            apps.get_app_config("django_proxysql").ready()
            assert admin.site.index_template == ours
        finally:
            admin.site.index_template = ours


class TestOptions:
    @pytest.mark.parametrize(
        ("given", "complaint"),
        [
            ({"HEALTHZ": True, "OPERATE_PERMISSION": "shop.operate"}, None),
            ({}, None),
            ({"HEALTH": True}, "DJANGO_PROXYSQL has 'HEALTH', which is no option."),
            ({"HEALTHZ": "yes"}, "DJANGO_PROXYSQL['HEALTHZ'] is 'yes'."),
            ({"OPERATE_PERMISSION": "operate"}, "['OPERATE_PERMISSION'] is 'operate'."),
            ({"OPERATE_PERMISSION": 1}, "['OPERATE_PERMISSION'] is 1."),
            ([], "DJANGO_PROXYSQL is a list."),
        ],
    )
    def test_check(self, given: Any, complaint: str | None) -> None:
        with override_settings(DJANGO_PROXYSQL=given):
            found = [m for m in run_checks() if m.id == "django_proxysql.E017"]
        assert len(found) == (complaint is not None)
        assert all(complaint in message.msg and message.hint for message in found)

    @pytest.mark.parametrize("given", [[], {"HEALTHZ": "yes", "OPERATE_PERMISSION": 1}])
    def test_nonsense_opens_nothing(self, given: Any) -> None:
        """What the checks complain of is taken for not said."""
        from django_proxysql.conf.options import healthz_is_on, operate_permission

        with override_settings(DJANGO_PROXYSQL=given):
            assert not healthz_is_on()
            assert operate_permission() is None


def moment(peer: str, state: str, when: float) -> Moment:
    return Moment(peer, state, when, "")


class TestFleet:
    """With SHARED_STATE the page speaks for all."""

    @pytest.mark.parametrize(
        ("moments", "now", "changes"),
        [
            ([], CLOSED, [(0, CLOSED)]),
            ([], "drained", [(0, "drained")]),
            ([], OPEN, [(0, OPEN)]),
            ([(5, OPEN), (9, CLOSED)], CLOSED, [(0, CLOSED), (5, OPEN), (9, CLOSED)]),
            ([(9, CLOSED)], CLOSED, [(0, OPEN), (9, CLOSED)]),
            # A drain goes before what the circuit says, and hides it.
            (
                [(3, "drained"), (5, OPEN), (7, "undrained")],
                OPEN,
                [(0, CLOSED), (3, "drained"), (7, OPEN)],
            ),
            ([(7, "undrained")], CLOSED, [(0, "drained"), (7, CLOSED)]),
        ],
    )
    def test_changes(self, moments: Any, now: str, changes: Any) -> None:
        timeline = [moment("peer0", state, when) for when, state in moments]
        known = {"out": frozenset(["peer0"] if now == OPEN else [])}
        known["drained"] = frozenset(["peer0"] if now == "drained" else [])
        fleet = Fleet(3, {"peer0": 1}, (*timeline, moment("peer1", OPEN, 1)), **known)
        assert fleet_changes(fleet, "peer0") == changes

    def test_record_that_is_full(self) -> None:
        """What was before it is not known."""
        timeline = tuple(moment("peer1", OPEN, 100 + number) for number in range(500))
        assert fleet_changes(Fleet(1, {}, timeline), "peer0") == [(100, CLOSED)]

    @pytest.mark.parametrize(
        ("changes", "own", "both"),
        [
            # What all know, this process applied a little later.
            (
                [(0, CLOSED), (50, OPEN), (70, CLOSED)],
                [(10, CLOSED), (51, OPEN), (60, HALF_OPEN), (61, OPEN), (71, CLOSED)],
                [(0, CLOSED), (50, OPEN), (70, CLOSED)],
            ),
            # It alone was refused, or is: no other process has the peer for anything but in use.
            ([(0, CLOSED)], [(10, CLOSED), (95, OPEN)], [(0, CLOSED), (95, OPEN)]),
            (
                [(0, CLOSED)],
                [(10, CLOSED), (30, OPEN), (40, CLOSED)],
                [(0, CLOSED), (30, OPEN), (40, CLOSED)],
            ),
            # It was cut off, and withdrew what it had told.
            (
                [(0, CLOSED), (50, OPEN), (52, CLOSED)],
                [(10, CLOSED), (50, OPEN), (90, CLOSED)],
                [(0, CLOSED), (50, OPEN), (90, CLOSED)],
            ),
            # A trial is under way: it is out as long as it was.
            ([(0, CLOSED), (50, OPEN)], [(10, CLOSED), (51, OPEN), (99, HALF_OPEN)], None),
            # It has it back, and the others do not know that yet.
            (
                [(0, CLOSED), (50, OPEN)],
                [(10, CLOSED), (50, OPEN), (99, CLOSED)],
                [(0, CLOSED), (50, OPEN), (99, CLOSED)],
            ),
            # It has drained a peer that is out, while Redis was away.
            (
                [(0, CLOSED), (50, OPEN)],
                [(10, CLOSED), (50, OPEN), (60, "drained")],
                [(0, CLOSED), (50, OPEN), (60, "drained")],
            ),
            # A doubt is its own.
            ([(0, CLOSED)], [(10, CLOSED), (98, "suspect")], [(0, CLOSED), (98, "suspect")]),
            # It began to look when the record, which was full, did not yet reach back so far.
            ([(60, CLOSED)], [(10, OPEN), (70, CLOSED)], [(60, OPEN), (70, CLOSED)]),
        ],
    )
    def test_laid_over(self, changes: Any, own: Any, both: Any) -> None:
        """What this process keeps to itself is seen; what it knows from all is drawn once."""
        assert laid_over(changes, own, 100) == (changes if both is None else both)

    def test_refused(self, world: World) -> None:
        """A peer that refuses this process: since then, and not for ever."""
        one, other = world.processes(2)
        pages = [Page(world, process) for process in (one, other)]
        world.clock.advance(600)
        one.driver.down = {"db1": bad_password}
        one.connect()
        for process in (one, other):
            process.step()
        world.clock.advance(5)
        assert pages[0].told("db1") == [(5, OPEN), (None, CLOSED)]
        assert pages[0].since("db1") == 5
        assert pages[1].told("db1") == [(None, CLOSED)]
        assert pages[1].since("db1") is None

    def test_outage_of_everything(self, world: World) -> None:
        """All peers are down for everybody: no process publishes it, and each page shows it."""
        fleet = world.processes(2)
        pages = [Page(world, process) for process in fleet]
        world.clock.advance(600)
        world.down.update(db1=refused_by_host, db2=refused_by_host)
        for _ in range(120):
            for process in fleet:
                raised_by(process.connect)
                process.step()
            world.clock.advance(1)
        for page, name in itertools.product(pages, ("db1", "db2")):
            assert page.since(name) == 120
            assert page.told(name) == [(120, OPEN), (None, CLOSED)]
        world.down.clear()
        for _ in range(60):
            for process in fleet:
                process.connect()
                process.step()
            world.clock.advance(1)
        for page, name in itertools.product(pages, ("db1", "db2")):
            words = page.told(name)
            assert [word for _, word in words] == [CLOSED, OPEN, CLOSED]
            # The other one has its trial an interval after the last.
            assert (57 if name == "db1" else 25) <= words[0][0] <= 60
            assert words[1][0] == 180

    def test_clock_of_redis(self, world: World) -> None:
        """Another than this host's: a moment is drawn where this host's clock was then."""
        (one,) = world.processes(1)
        page = Page(world, one)
        world.jump = 500.0
        one.connect()
        world.down["db1"] = refused_by_host
        one.connect()
        one.step()
        world.clock.advance(60)
        assert page.told("db1") == [(60, OPEN), (None, CLOSED)]

    def test_processes(self, site: Site, redis_server: RedisServer, mariadb_pair: Any) -> None:
        """Real ones: their connections are summed, and a drain holds in all of them."""
        given = {"user": USER, "password": PASSWORD, "database": DATABASE}
        peers = {
            f"peer{number}": {"host": node.host, "port": node.port, **given}
            for number, node in enumerate(mariadb_pair)
        }
        url = redis_server.url
        entries = [mysql_peer(node) for node in mariadb_pair]
        client = site.admin()
        with ExitStack() as stack:
            stack.enter_context(engine(entries, alias="shop", SHARED_STATE=url))
            other = stack.enter_context(SharedProcess(peers=peers, name="shop", shared_state=url))
            balancer: Any = balancers["shop"]
            assert other.do("settle")
            assert balancer.sharing.settle(20)
            holds = [balancer.peers["peer0"].check_out() for _ in range(3)]
            assert balancer.sharing.settle(20)
            text = text_of(client.get(PAGE))
            assert "For all 2 processes that share its state" in text
            assert re.search(
                rf"peer0 127\.0\.0\.1:\d+ In use closed the start {NONE} 3 100% ", text
            )
            assert "A drain holds in all processes." in text
            (message,) = said(operate(client, balancer="shop"))
            assert message == (
                "You drained peer1 (load balancer shop), in all processes that share its state."
            )
            other.do("wait", "PeerDrained", "peer1")
            assert other.do("state")["drained"] == ["peer1"]
            other.do("undrain", "peer1")
            assert balancer.sharing.settle(20)
            text = text_of(client.get(PAGE))
            assert re.search(
                r"peer1 closed since [\d:]+; before that drained since [\d:]+; before that closed",
                text,
            )
            del holds

            redis_server.freeze()
            try:
                text = text_of(client.get(PAGE))
                assert "Redis does not answer: this is what process" in text
                (message,) = said(operate(client, balancer="shop"))
                assert "the others will follow when Redis answers again" in message
                assert balancer.peers["peer1"].drained
            finally:
                redis_server.thaw()


class Page:
    """What the page of one of the processes says, with times as seconds before now."""

    def __init__(self, world: World, process: Process) -> None:
        self.world = world
        self.db = process.db
        self.seen = History(world.clock)
        self.seen.look_at(self.db)
        # As the site's own does, which looks at balancers of settings.
        self.db.add_listener(lambda event: self.seen.look_at(self.db), connects=False)

    def _peer(self, name: str) -> PeerStatus:
        now = self.world.clock()
        peers = balancer_status(self.db, self.seen, now, now).peers
        return next(peer for peer in peers if peer.known.name == name)

    def _ago(self, moment: datetime | None) -> int | None:
        return None if moment is None else round(self.world.clock() - moment.timestamp())

    def since(self, name: str) -> int | None:
        return self._ago(self._peer(name).since)

    def told(self, name: str) -> list[Any]:
        return [(self._ago(moment), word) for moment, word in self._peer(name).story]
