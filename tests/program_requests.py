"""Requests through Django's handler whose view does what a program says (:mod:`tests.programs`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from django.http import HttpResponse
from django.test import Client, override_settings
from django.urls import path

from django_proxysql import retrying_request
from django_proxysql.middleware import RetryingRequestMiddleware
from django_proxysql.retry import Rules

__all__ = ["serve"]

#: What the view does that is served now.
_bodies: list[Callable[[], None]] = []


def _page(request: Any) -> HttpResponse:
    _bodies[-1]()
    return HttpResponse()


def _at_once(state: Any) -> float:
    return 0


class Middleware(RetryingRequestMiddleware):
    rules = Rules("Middleware", wait=_at_once)


urlpatterns = [
    path("decorator", retrying_request(_page, wait=_at_once)),
    path("middleware", _page),
]


def serve(body: Callable[[], None], how: str) -> None:
    """Serve a request whose view does this under ATOMIC_REQUESTS, and is run again.

    :param how: by the "decorator" or the "middleware".
    :raises Exception: what the last run raised.
    """
    chain = [f"{__name__}.Middleware"] if how == "middleware" else []
    _bodies.append(body)
    try:
        with override_settings(ROOT_URLCONF=__name__, MIDDLEWARE=chain):
            Client().get(f"/{how}")
    finally:
        _bodies.pop()
