"""The pictures in the docs: ``python -m tests.screenshots docs/images``.

A page of the real site in the real browser, whose peers have had an eventful hour by a clock that
goes when the script moves it. None of them exists: the page connects to nothing.
"""

from __future__ import annotations

import logging
import os
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import django

PEERS = [{"HOST": f"10.0.0.{number}", "PORT": 3306, "NAME": "shop"} for number in (1, 2, 3)]

#: Width, height, colour scheme.
PICTURES = {
    "status-page.png": (1100, 870, "light"),
    "status-page-dark.png": (420, 1560, "dark"),
}


def alice_asks(get_response: Any) -> Any:
    """Middleware: a superuser asks that no database knows."""

    def middleware(request: Any) -> Any:
        from django_proxysql.demo.site import Visitor

        request.user = Visitor()
        request.user.get_username = lambda: "alice"
        return get_response(request)

    return middleware


def hour(balancer: Any, clock: Any) -> list[Any]:
    """Have an hour pass for the peers; return what holds their connections."""
    from django_proxysql.core.faults import Fault
    from django_proxysql.monitoring.history import history

    gone = OSError("(2002, \"Can't connect to server on '10.0.0.3' (115)\")")
    one, two, three = (balancer.peers[f"peer{number}"] for number in range(3))
    history.look_at(balancer)
    clock.advance(900)
    balancer.drain("peer0")
    clock.advance(420)
    balancer.undrain("peer0")
    clock.advance(300)
    two.breaker.trip(OSError("(1053, 'Server shutdown in progress')"), Fault.NOT_READY)
    clock.advance(31)
    trial(balancer, two, None)
    clock.advance(700)
    three.breaker.trip(gone, Fault.UNREACHABLE)
    for _ in range(18):
        clock.advance(30.5)
        trial(balancer, three, gone)
    clock.advance(17)
    return [one.check_out() for _ in range(11)] + [two.check_out() for _ in range(9)]


def trial(balancer: Any, peer: Any, error: Exception | None) -> None:
    """Make a trial that succeeds, or fails with that error, as the engine would tell of it."""
    from django_proxysql.core.events import Connected, ConnectFailed
    from django_proxysql.core.faults import Fault

    permit = peer.breaker.acquire(last_resort=0)
    about = (balancer.name, peer.name, peer.address, 0.1, True)
    if error is None:
        permit.succeeded()
        balancer.group.emit(Connected(*about))
    else:
        permit.failed(error, Fault.UNREACHABLE)
        balancer.group.emit(ConnectFailed(*about, Fault.UNREACHABLE, str(error), 1, False))


def main(folder: Path) -> None:
    """Make the pictures in that folder."""
    os.environ["DJANGO_SETTINGS_MODULE"] = "tests.django_settings"
    django.setup()
    logging.disable(logging.CRITICAL)

    from django.contrib.staticfiles.handlers import StaticFilesHandler
    from django.core.handlers.wsgi import WSGIHandler

    from django_proxysql.demo.site import HOST, serving
    from django_proxysql.monitoring.history import history, watch
    from django_proxysql.registry import balancers
    from tests.browser import browser
    from tests.engine import MYSQL, Clock, engine
    from tests.status_site import settings

    clock = Clock()
    with ExitStack() as stack:
        stack.enter_context(settings(MIDDLEWARE=["tests.screenshots.alice_asks"]))
        stack.enter_context(engine(PEERS, alias="default", PEER_ENGINE=MYSQL, clock=clock))
        history.clock, history.began = clock, clock()
        watch()
        stack.enter_context(mock.patch("socket.gethostname", return_value="web1"))
        held = hour(balancers["default"], clock)
        port = stack.enter_context(serving(StaticFilesHandler(WSGIHandler())))
        looker = stack.enter_context(browser())
        folder.mkdir(parents=True, exist_ok=True)
        for name, (width, height, scheme) in PICTURES.items():
            looker.prefer(scheme)
            looker.resize(width, height)
            looker.driver.get(f"http://{HOST}:{port}/peers/")
            looker.driver.save_screenshot(str(folder / name))
            print(folder / name)
        held.clear()


if __name__ == "__main__":
    main(Path(*sys.argv[1:]))
