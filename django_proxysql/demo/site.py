"""A Django site, set up in this process and served on a free port of loopback."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from socketserver import TCPServer, ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

import django
from django.conf import settings
from django.db import connections

from .peers import Databases

HOST = "127.0.0.1"

#: How many products there are.
PRODUCTS = 50


def set_up(databases: Databases, check_interval: float) -> None:
    """Set Django up with a load balancer over these peers."""
    settings.configure(
        DATABASES={
            "default": {
                "ENGINE": "django_proxysql.backends.proxysql",
                "PEERS": list(databases),
                "CHECK_INTERVAL": check_interval,
            },
            **databases,
        },
        INSTALLED_APPS=["django_proxysql"],
        MIDDLEWARE=[
            "django.middleware.csrf.CsrfViewMiddleware",
            "django.contrib.messages.middleware.MessageMiddleware",
            "django_proxysql.demo.site.everybody_is_staff",
        ],
        MESSAGE_STORAGE="django.contrib.messages.storage.cookie.CookieStorage",
        ROOT_URLCONF="django_proxysql.demo.shop",
        ALLOWED_HOSTS=[HOST],
        SECRET_KEY="demo",  # noqa: S106 (signs nothing)
        LOGGING_CONFIG=None,
        USE_TZ=True,
        TIME_ZONE="UTC",
    )
    django.setup()


class Visitor:
    """A visitor of the demo, which has no users and is served on loopback."""

    is_active = is_staff = is_superuser = is_authenticated = True
    is_anonymous = False
    pk = None

    def get_username(self) -> str:
        """Return who presses buttons, for the log."""
        return "a visitor"


def everybody_is_staff(get_response: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Middleware: let every visitor see the status page, and press its buttons."""

    def middleware(request: Any) -> Any:
        request.user = Visitor()
        return get_response(request)

    return middleware


def name_of(number: int) -> str:
    """Return the name that the product of this number has: a client can tell a right answer."""
    return f"Product no. {number}"


def fill(alias: str) -> None:
    """Make the table and its rows in a database."""
    connection = connections[alias]
    with connection.cursor() as cursor:
        cursor.execute("CREATE TABLE product (id integer PRIMARY KEY, name text)")
        rows = [(number, name_of(number)) for number in range(PRODUCTS)]
        cursor.executemany("INSERT INTO product VALUES (%s, %s)", rows)
    connection.close()


class _Server(ThreadingMixIn, WSGIServer):
    """A thread for each request; all of them have ended when it is closed."""

    daemon_threads = False
    request_queue_size = 128

    def server_bind(self) -> None:
        # WSGIServer's asks the resolver for our name, which can take seconds.
        TCPServer.server_bind(self)
        self.server_name, self.server_port = HOST, self.server_address[1]
        self.setup_environ()


class _Handler(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def serving(application: Any) -> Iterator[int]:
    """Serve a WSGI application while the block runs; gives the port."""
    with _Server((HOST, 0), _Handler) as server:
        server.set_app(application)
        thread = threading.Thread(target=server.serve_forever, args=(0.1,), name="site")
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()
