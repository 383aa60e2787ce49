"""One URL that names several hosts, as libpq and MongoDB write it, read into a DATABASES entry.

The rules are libpq's (its manual, "Connection URIs"); docs/howto/one-url.rst lists them. Each part
is percent-decoded on its own, after the URL is split.

Any part but the scheme may hold a secret, or a piece of one that was not percent-encoded. So an
error names the part and never quotes it.
"""

from __future__ import annotations

import difflib
import ipaddress
import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import unquote_to_bytes

from .config import BalancerConfig, BreakerConfig, PeerConfig, check_field, settings_of
from .exceptions import ConfigError

_ENGINE = "django_proxysql.backends.proxysql"
_SQLITE = "django.db.backends.sqlite3"
_ENGINES = {
    "mysql": "django.db.backends.mysql",
    "mariadb": "django.db.backends.mysql",
    "mysqlgis": "django.contrib.gis.db.backends.mysql",
    "postgres": "django.db.backends.postgresql",
    "postgresql": "django.db.backends.postgresql",
    "pgsql": "django.db.backends.postgresql",
    "postgis": "django.contrib.gis.db.backends.postgis",
    "oracle": "django.db.backends.oracle",
    "sqlite": _SQLITE,
    "sqlite3": _SQLITE,
}

_BOOLEANS = {
    **dict.fromkeys(("true", "yes", "on", "1"), True),
    **dict.fromkeys(("false", "no", "off", "0"), False),
}


class _Wrong(Exception):
    """What is wrong with a URL: a problem and a remedy, without a word of its contents."""


#: Settings of a balancer.
_BALANCER = settings_of(BalancerConfig)
#: Settings of a peer: one value for all, or one for each host, in their order.
_PEER = settings_of(PeerConfig)
#: What BREAKER holds.
_BREAKER = settings_of(BreakerConfig)
#: Settings of Django, and whether each is a boolean.
_DJANGO = {
    "ATOMIC_REQUESTS": True,
    "AUTOCOMMIT": True,
    "CONN_HEALTH_CHECKS": True,
    "CONN_MAX_AGE": False,
    "DISABLE_SERVER_SIDE_CURSORS": True,
    "TIME_ZONE": False,
}
#: What MySQL's drivers take as a dict.
_TLS = {"ssl_ca": "ca", "ssl_cert": "cert", "ssl_key": "key"}
#: What has a place of its own in a URL.
_PLACES = {
    "USER": "before the @",
    "PASSWORD": "before the @",
    "DBNAME": "behind the first / that follows the hosts",
    "NAME": "behind the first / that follows the hosts",
    "PORT": "behind its host, as in db1:3306",
    "PEERS": "as hosts, as in mysql://db1,db2/name",
    "ENGINE": "as the scheme, or as peer_engine",
    "BREAKER": "as fail_max and success_threshold",
}
_KNOWN = ("PEER_ENGINE", "PEER_NAME", *_BALANCER, *_DJANGO, *_PEER, *_BREAKER)


def from_url(url: str, *more: str) -> dict[str, Any]:
    """Return the DATABASES entry of a URL that names one host or several.

    ::

        DATABASES = {"default": from_url(os.environ["DATABASE_URL"])}
        DATABASES = {"default": from_url(os.environ["DB1_URL"], os.environ["DB2_URL"])}

    Each host is a peer. The query holds settings of django-proxysql and Django in any case
    (``check_interval=30``, ``conn_max_age=60``); ``weight``, ``priority`` and ``check_interval``
    take one value for all hosts or one for each (``weight=2,1``), ``peer_name`` one for each;
    ``fail_max`` and
    ``success_threshold`` are those of BREAKER. Every other key is the driver's, and goes into
    OPTIONS. Durations are in seconds; ``none`` is None.

    ``sqlite:///shop.sqlite3`` (relative), ``sqlite:////var/lib/shop.sqlite3`` and
    ``sqlite://:memory:`` give an entry of Django's SQLite engine, for development: there is
    nothing to balance, and settings of django-proxysql are left out.

    :param url: ``scheme://user:password@host:port,host:port/name?key=value&…``.
    :param more: further URLs, each of further hosts: their peers may have a user, a password, a
        name and OPTIONS of their own. What is none of a peer's stands in the first URL.
    :returns: a new dict; add to it what a URL cannot say (``TEST``).
    :raises ConfigError: (a ValueError) the URL is wrong. The message says what is wrong with
        which part, and quotes nothing that may be a password.
    """
    entry: dict[str, Any] = {}
    for number, one in enumerate((url, *more), 1):
        if not isinstance(one, str):
            problem = f"was given a {type(one).__name__}"
            raise ConfigError("from_url()", problem, "Give a URL as a str.")
        try:
            found = _entry(one.strip())
            entry = _joined(entry, found) if entry else found
        except _Wrong as exc:
            problem, hint = exc.args
            which = f"Database URL {number}" if more else "The database URL"
            raise ConfigError(which, problem, hint) from None
    return _with_passwords(entry)


def _joined(entry: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Return an entry with the peers of another in it."""
    if "PEERS" not in entry or entry["PEER_ENGINE"] != other.get("PEER_ENGINE"):
        raise _Wrong("is of another kind than the first", "Give URLs of one kind of server.")
    of_peers = ("NAME", "USER", "PASSWORD", "OPTIONS")
    own = {key: other[key] for key in of_peers if other.get(key, entry.get(key)) != entry.get(key)}
    others = other.keys() - {"PEERS", *of_peers}
    if any(other[key] != entry.get(key) for key in others):
        raise _Wrong("has settings that are no peer's", "Write them in the first URL.")
    if "USER" in own:
        # No user's password is sent as another's: see _with_passwords().
        own.setdefault("PASSWORD", other.get("PASSWORD"))
    return {**entry, "PEERS": entry["PEERS"] + [{**own, **peer} for peer in other["PEERS"]]}


def _with_passwords(entry: dict[str, Any]) -> dict[str, Any]:
    """Give each peer its password where one has a user of its own and none: None stands there."""
    peers = entry.get("PEERS", ())
    if not any(peer.get("PASSWORD", "") is None for peer in peers):
        return entry
    password = entry.pop("PASSWORD", None)
    for peer in peers:
        if peer.setdefault("PASSWORD", password) is None:
            del peer["PASSWORD"]
    return entry


def _entry(url: str) -> dict[str, Any]:
    scheme, separator, rest = url.partition("://")
    if not separator:
        raise _Wrong("has no scheme", "Write it as mysql://user:password@db1,db2/name.")
    engine = _ENGINES.get(scheme.lower())
    if engine is None:
        raise _Wrong("has a scheme that is not known", f"Known are: {', '.join(sorted(_ENGINES))}.")
    if "#" in rest:
        raise _Wrong("has a '#'", "Write it as %23, also within a password.")
    rest, _, query = rest.partition("?")
    # A setting may be a URL with a password of its own.
    is_odd = any(
        "@" in part and part.partition("=")[0].upper() not in _KNOWN for part in query.split("&")
    )
    if ("@" in query and "/" not in rest) or (is_odd and "@" not in rest):
        raise _Wrong(
            "has a '?' before its '@'",
            "Write it as %3F within a password, and an @ in a value as %40.",
        )
    given = dict(_pairs(query))
    if engine == _SQLITE:
        return _sqlite_entry(rest, given)
    authority, _, name = rest.partition("/")
    if not name:
        raise _Wrong(
            "names no database",
            "Write its name behind the hosts, as in mysql://db1,db2/name. "
            "Write a / within a password as %2F.",
        )
    credentials, at, hosts = authority.rpartition("@")
    user, _, password = credentials.partition(":")
    for key in [key for key in given if key.lower() == "host"]:
        if hosts:
            raise _Wrong("names hosts in two places", "Leave out the query's host.")
        # It is decoded already, and is decoded once more below.
        hosts = given.pop(key).replace("%", "%25").replace("/", "%2F")
    if not hosts:
        # One socket of the driver's own, as without HOST.
        peers: list[dict[str, Any]] = [{}]
    else:
        peers = [_peer(host, place, bool(at)) for place, host in enumerate(hosts.split(","), 1)]
    if "@" in name:
        raise _Wrong(
            "has a '/' before its '@'",
            "Write it as %2F within a password, and an @ in the database's name as %40.",
        )
    entry: dict[str, Any] = {
        "ENGINE": _ENGINE,
        "PEER_ENGINE": engine,
        "NAME": _decoded(name, "database's name"),
    }
    if user:
        entry["USER"] = _decoded(user, "user")
    if password:
        entry["PASSWORD"] = _decoded(password, "password")
    settings, options = _settings(given, peers)
    entry.update(settings)
    if "mysql" in entry["PEER_ENGINE"]:
        tls = {_TLS[key]: options.pop(key) for key in _TLS if key in options}
        if tls:
            options["ssl"] = tls
    if options:
        entry["OPTIONS"] = options
    entry["PEERS"] = peers
    return entry


def _settings(
    given: Mapping[str, str], peers: list[dict[str, Any]]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what a query sets, and its OPTIONS; lay what it says of each peer into ``peers``."""
    entry: dict[str, Any] = {}
    options: dict[str, Any] = {}
    breaker: dict[str, Any] = {}
    for key, text in given.items():
        setting = key.upper()
        if setting in _PLACES:
            raise _Wrong(f"has {key!r} in its query", f"Write it {_PLACES[setting]}.")
        if setting == "PEER_ENGINE":
            entry[setting] = text
        elif setting in _BALANCER:
            entry[setting] = _checked(BalancerConfig, key, text)
        elif setting in _DJANGO:
            entry[setting] = age = _value(key, text, _DJANGO[setting])
            # A nan would keep each connection for ever.
            if setting == "CONN_MAX_AGE" and (isinstance(age, str) or age != age):
                raise _Wrong(f"has a {key!r} that is no number", "Give seconds, or none.")
        elif setting in _PEER or setting == "PEER_NAME":
            _spread(peers, key, text)
        elif setting in _BREAKER:
            breaker[_BREAKER[setting].name] = _checked(BreakerConfig, key, text)
        else:
            _refuse_a_slip(key)
            options[key] = _option(text)
    if breaker:
        entry["BREAKER"] = breaker
    return entry, options


def _spread(peers: list[dict[str, Any]], key: str, text: str) -> None:
    """Hand out a setting of peers: one value for all, or one for each."""
    setting = key.upper()
    is_name = setting == "PEER_NAME"
    values = [part if is_name else _checked(PeerConfig, key, part) for part in text.split(",")]
    if not peers:
        # SQLite: nothing is balanced, whatever their number is.
        return
    if len(values) == 1 and not is_name:
        values *= len(peers)
    if len(values) != len(peers):
        hosts = "1 host" if len(peers) == 1 else f"{len(peers)} hosts"
        remedy = "one for each" if is_name else "one for all, or one for each"
        problem = f"has {len(values)} values of {key!r} for {hosts}"
        raise _Wrong(problem, f"Give {remedy}, in their order.")
    for peer, value in zip(peers, values):
        peer[setting] = value


def _value(key: str, text: str, is_boolean: bool = False) -> Any:
    """Return what a setting's text means."""
    lowered = text.lower()
    if is_boolean:
        if lowered not in _BOOLEANS:
            raise _Wrong(f"has a {key!r} that is neither true nor false", "Give one of the two.")
        return _BOOLEANS[lowered]
    if lowered == "none":
        return None
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            pass
    return text


def _checked(config: type, key: str, text: str) -> Any:
    """Return what a field's text means. The configuration judges it; its remedy is quoted."""
    # By way of capitals, as it was found: more letters than those of ASCII have these.
    name = key.upper().lower()
    value = _value(key, text, isinstance(getattr(config, name), bool))
    try:
        check_field(config, name, value)
    except ConfigError as exc:
        raise _Wrong(f"has a wrong {name!r}", exc.hint) from None
    return value


def _option(text: str) -> Any:
    """Return a driver's option. MySQL's drivers take a number for an int, never its digits."""
    if re.fullmatch(r"-?\d{1,18}", text, re.ASCII):
        return int(text)
    return {"true": True, "false": False}.get(text.lower(), text)


def _refuse_a_slip(key: str) -> None:
    """Refuse a key that looks like one of our settings: as an option it would mean nothing."""
    close = difflib.get_close_matches(key.upper(), _KNOWN, n=1, cutoff=0.8)
    # A driver's own read_timeout is near connect_timeout, and no slip.
    if close and abs(len(close[0]) - len(key)) <= 2 and key.lower() not in _LIKE_OURS:
        raise _Wrong(f"has {key!r}, which is no setting", f"Did you mean {close[0].lower()}?")


#: Options of drivers that look like settings of ours.
_LIKE_OURS = frozenset({"write_timeout", "read_timeout"})


def _pairs(query: str) -> Iterator[tuple[str, str]]:
    """Yield the query's keys and values, decoded."""
    seen: set[str] = set()
    for part in query.split("&"):
        if not part:
            continue
        name, equals, text = part.partition("=")
        key = _decoded(name, "query")
        if not equals or not key:
            raise _Wrong("has a part in its query that is no key=value", "Write & as %26.")
        if key.lower() in seen:
            raise _Wrong("has a key in its query twice", f"Leave one {key!r} out.")
        seen.add(key.lower())
        yield key, _decoded(text, f"value of {key!r}")


def _peer(text: str, place: int, is_behind_at: bool) -> dict[str, Any]:
    """Read one host and its port."""
    is_bracketed = text.startswith("[")
    if is_bracketed:
        host, bracket, port = text[1:].partition("]")
        colon, port = port[:1], port[1:]
        if not bracket or colon not in ("", ":"):
            raise _Wrong(f"has an open bracket in host {place}", "Write it as [::1]:3306.")
    else:
        host, colon, port = text.partition(":")
        if ":" in port:
            raise _Wrong(
                f"has more than one colon in host {place}",
                "Put an IPv6 address in brackets: [::1]:3306.",
            )
    host = _decoded(host, f"host {place}")
    if is_bracketed:
        try:
            ipaddress.IPv6Address(host)
        except ValueError:
            raise _Wrong(
                f"has no IPv6 address in the brackets of host {place}", "Write it as [::1]:3306."
            ) from None
    if not host:
        raise _Wrong(f"has no name for host {place}", "Leave out the comma, or the port.")
    if host.startswith("@") or "," in host or any(mark.isspace() for mark in host):
        raise _Wrong(f"has a mark in host {place} that no host has", "Percent-encode passwords.")
    peer: dict[str, Any] = {"HOST": host}
    if colon:
        if not re.fullmatch(r"\d{1,5}", port, re.ASCII) or not 0 < int(port) < 65536:
            remedy = "Give a number from 1 to 65535."
            if not is_behind_at:
                remedy += " A password that holds @, / or ? must be percent-encoded."
            raise _Wrong(f"has a port of host {place} that is none", remedy)
        peer["PORT"] = int(port)
    return peer


def _decoded(text: str, part: str) -> str:
    """Decode the percent-encoding of one part."""
    if re.search(r"%(?![0-9A-Fa-f]{2})", text):
        raise _Wrong(f"has a % in its {part} without two hex digits", "Write a % as %25.")
    try:
        decoded = unquote_to_bytes(text).decode("utf-8")
    except UnicodeError:
        # A variable of the environment that is not UTF-8 has lone surrogates (PEP 383).
        raise _Wrong(f"has a {part} that is not UTF-8", "Encode it in UTF-8.") from None
    if "\0" in decoded:
        raise _Wrong(f"has a %00 in its {part}", "Leave it out.")
    return decoded


def _sqlite_entry(path: str, given: Mapping[str, str]) -> dict[str, Any]:
    """Return an entry of Django's own engine: there is nothing to balance."""
    if path in ("", "/", ":memory:", "/:memory:"):
        name = ":memory:"
    elif path.startswith("/"):
        name = _decoded(path[1:], "path")
    else:
        raise _Wrong(
            "names a host, which SQLite has none of",
            "Write a relative path as sqlite:///db.sqlite3, an absolute one with four slashes.",
        )
    entry: dict[str, Any] = {"ENGINE": _SQLITE, "NAME": name}
    # Wrong values are wrong here, too: what is tried in development is what runs later.
    settings, options = _settings(given, [])
    entry.update({key: value for key, value in settings.items() if key in _DJANGO})
    if options:
        entry["OPTIONS"] = options
    return entry
