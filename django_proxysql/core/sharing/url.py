"""The setting SHARED_STATE: where a Redis is, and what is wrong with a URL."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit

from ..exceptions import ConfigError

#: What the keys begin with.
PREFIX = "django-proxysql"

#: Seconds for which the thread waits for Redis. No other thread waits for that as long.
TIMEOUT = 0.25


#: What a URL says that is for several servers, and what it is called.
_OTHER_KINDS = {"sentinel": "Redis Sentinel", "cluster": "a Redis Cluster"}


def _refuse_other_kinds(url: str) -> None:
    """Raise a ConfigError if the URL is for Redis Sentinel or a Redis Cluster."""
    scheme, _, rest = url.partition("://")
    hosts = rest.partition("?")[0].rpartition("@")[2].partition("/")[0]
    found = [name for word, name in _OTHER_KINDS.items() if word in scheme.lower()]
    if not found and "," in hosts and scheme != "unix":
        found = list(_OTHER_KINDS.values())
    if found:
        raise ConfigError(
            "SHARED_STATE",
            f"is a URL for {' or '.join(found)}, which cannot be used",
            "Give one address that leads to the Redis that takes the writes, such as "
            "'redis://host:6379/0'.",
        )


def checked_url(url: object) -> dict[str, Any]:
    """Return what to connect to Redis with, and under ``prefix`` what its keys begin with.

    :param url: the setting SHARED_STATE: ``redis://``, ``rediss://`` or ``unix://``.
    :raises ConfigError: it is no such URL, or the package redis is not installed. The message
        quotes nothing of it, for there may be a password in it.
    """
    problem = ConfigError(
        "SHARED_STATE",
        "is no URL of a Redis",
        "Give 'redis://host:6379/0', 'rediss://…' or 'unix:///path', with what is special in "
        "a password escaped (%40 for @).",
    )
    if not isinstance(url, str):
        raise problem
    _refuse_other_kinds(url)
    try:
        from redis.backoff import NoBackoff
        from redis.connection import AbstractConnection, SSLConnection, parse_url
        from redis.retry import Retry
    except ImportError as exc:
        raise ConfigError(
            "SHARED_STATE",
            f"takes the package redis, which cannot be imported ({type(exc).__name__})",
            'Install it: pip install "django-proxysql[redis]".',
        ) from None
    # redis-py has no annotation for it in some versions.
    parse: Callable[[str], dict[str, Any]] = parse_url
    try:
        parts = urlsplit(url)
        address = url.partition("?")[0]
        query = dict(parse_qsl(parts.query, keep_blank_values=True))
        prefix = query.pop("prefix", PREFIX)
        database = parts.path.strip("/")
        if parts.scheme == "unix":
            good = bool(parts.path)
        else:
            good = bool(parts.hostname) and (not database or database.isdigit())
        if not good or not prefix or parts.fragment or parts.port == 0:
            raise problem
        options: dict[str, Any] = parse(f"{address}?{urlencode(query)}")
    except ValueError:
        # urllib's message quotes the part that it stumbled on.
        raise problem from None
    known = {"db", "username", "password", "protocol"}
    if parts.scheme == "rediss":
        arguments = inspect.signature(SSLConnection.__init__).parameters
        known.update(name for name in arguments if name.startswith("ssl_"))
    unknown = sorted(set(query) - known)
    if any("@" in name for name in unknown):
        # The rest of a password with a question mark in it.
        raise problem
    if unknown:
        raise ConfigError(
            "SHARED_STATE",
            f"has the unknown option {unknown[0]!r}",
            "Known are prefix, db, username, password, protocol, and with rediss:// redis-py's "
            "ssl_… ones.",
        )
    if "protocol" in inspect.signature(AbstractConnection.__init__).parameters:
        # redis-py 8 would open with HELLO, which Redis 5 does not know. Scripts need no more.
        options.setdefault("protocol", 2)
    return {
        **options,
        "prefix": prefix,
        "socket_timeout": TIMEOUT,
        "socket_connect_timeout": TIMEOUT,
        # The next try is a second later, and the thread's own affair.
        "retry": Retry(NoBackoff(), 0),
    }
