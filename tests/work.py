"""Work that is run again: a function of retrying_atomic, or a view of one of its two kin."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from django.db import transaction
from django.http import HttpResponse
from django.test import Client, override_settings
from django.urls import path

from django_proxysql import retrying_atomic, retrying_request
from tests.site import Site

MIDDLEWARE = "django_proxysql.middleware.RetryingRequestMiddleware"


class Work:
    """Writes twice a run, and loses the connection in between in its first runs.

    :param lose: in the place of KILL.
    :param at_end: after the second write.
    """

    def __init__(
        self,
        here: Site,
        losses: int = 1,
        lose: Callable[[], object] | None = None,
        at_end: bool = False,
    ) -> None:
        self.here, self.losses, self.at_end = here, losses, at_end
        self.lose = lose or here.kill
        self.runs = 0
        #: The run whose hook ran, for each hook that did.
        self.hooks: list[int] = []

    def __call__(self, *_request: Any) -> HttpResponse:
        self.runs += 1
        run = self.runs
        transaction.on_commit(lambda: self.hooks.append(run), self.here.connection.alias)
        is_lost = run <= self.losses
        self.here.write(f"run {run}")
        if is_lost and not self.at_end:
            self.lose()
        self.here.write(f"run {run}, again")
        if is_lost and self.at_end:
            self.lose()
        return HttpResponse(f"result {run}")

    def retrying(self, **options: Any) -> str:
        """Run it by retrying_atomic; return its result."""
        response = retrying_atomic(self.here.connection.alias, **options)(self)()
        return str(response.content.decode())

    def stands_once(self, run: int) -> None:
        """Fail unless what this run has written stands, and nothing else, and its hook ran once."""
        assert self.here.written() == [f"run {run}", f"run {run}, again"]
        assert (self.runs, self.hooks) == (run, [run])


@contextlib.contextmanager
def serving(view: Any, way: str = "decorator", middleware: Any = ()) -> Iterator[Client]:
    """Yield a client of a site of that one view."""
    urls = ModuleType("urls_of_the_test")
    urls.urlpatterns = [  # type: ignore[attr-defined]
        path("", retrying_request(view) if way == "decorator" else view)
    ]
    chain = [*middleware, *([MIDDLEWARE] if way == "middleware" else [])]
    client = Client(enforce_csrf_checks=True, HTTP_X_CSRFTOKEN="a" * 32)
    client.cookies["csrftoken"] = "a" * 32
    sys.modules[urls.__name__] = urls
    with override_settings(ROOT_URLCONF=urls.__name__, MIDDLEWARE=chain):
        yield client
    del sys.modules[urls.__name__]


def run_by(way: str, work: Any, here: Site) -> Any:
    """Have work run by retrying_atomic ("function"), retrying_request or the middleware."""
    if way == "function":
        return retrying_atomic(here.connection.alias)(work)()
    with serving(work, way) as client:
        return client.get("/")
