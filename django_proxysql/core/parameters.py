"""What a statement's parameters are: values, or may they be SQL?

A driver quotes values. psycopg2's ``AsIs``, a composed object of psycopg's and an adapter of the
application's own can put any text into the statement, which then is not what its text says.
"""

from __future__ import annotations

import datetime
import decimal
import enum
import uuid
from collections.abc import Callable, Mapping
from typing import Any

#: Types whose values every driver quotes.
VALUES: frozenset[type] = frozenset(
    {
        *(type(None), bool, int, float, str, bytes, bytearray, memoryview, decimal.Decimal),
        *(datetime.datetime, datetime.date, datetime.time, datetime.timedelta, uuid.UUID),
    }
)

#: Types of drivers and of Django's that stand for a value, by module, and the attributes that have
#: it: what is in there is looked at, too.
_HOLDERS: dict[tuple[str, str], tuple[str, ...]] = {
    (module, name): attributes
    for module, names, attributes in [
        ("psycopg.types.numeric", "Int2 Int4 Int8 IntNumeric Oid Float4 Float8", ()),
        ("psycopg.types.json", "Json Jsonb", ("obj",)),
        ("psycopg2._json", "Json", ("adapted",)),
        ("django.db.backends.postgresql.psycopg_any", "Jsonb", ("adapted",)),
        ("psycopg.types.range", "Range", ("lower", "upper")),
        (
            *("psycopg2._range", "NumericRange DateRange DateTimeRange DateTimeTZRange"),
            ("lower", "upper"),
        ),
        ("psycopg.dbapi20", "Binary", ("obj",)),
        ("psycopg2.extensions", "Binary", ("adapted",)),
        ("psycopg2.extras", "Inet", ("addr",)),
        ("ipaddress", "IPv4Address IPv4Interface IPv4Network", ()),
        ("ipaddress", "IPv6Address IPv6Interface IPv6Network", ()),
        ("django.utils.safestring", "SafeString", ()),
        # Well-known bytes and texts of geometries, which they quote themselves.
        ("django.contrib.gis.db.backends.postgis.adapter", "PostGISAdapter", ()),
        ("django.contrib.gis.db.backends.base.adapter", "WKTAdapter", ()),
    ]
    for name in names.split()
}
_DEEP = 20
_MOST = 1_000_000


def are_values(params: Any, is_usual: Callable[[type], bool]) -> bool:
    """Return whether all parameters are plain values, which the driver quotes.

    :param params: None, a list, a tuple or a dict. An iterator has been used up by now.
    :param is_usual: says whether the driver turns a type's values into SQL in its own
        way, and not in one that the application has registered.
    """
    if params is None:
        return True
    if type(params) is dict:
        params = list(params.values())
    if not isinstance(params, (list, tuple)):
        return False
    return all(_is_value(value, is_usual) for value in params)


def _is_value(
    value: Any, is_usual: Callable[[type], bool], depth: int = 0, is_held: bool = False
) -> bool:
    """Return whether a parameter is a plain value.

    :param is_held: it is in another, such as a Json, and may be what JSON can say, and more.
    """
    cls = type(value)
    if depth > _DEEP:
        return False
    if cls in (list, tuple) or (cls is dict and is_held):
        items = [*value, *value.values()] if cls is dict else value
        return (is_held or is_usual(cls)) and all(
            _is_value(item, is_usual, depth + 1, is_held) for item in items
        )
    if cls in VALUES or (issubclass(cls, enum.Enum) and issubclass(cls, (str, int))):
        # A member of TextChoices is the text that it stands for.
        return not hasattr(cls, "__conform__") and is_usual(cls)
    holds = _HOLDERS.get((cls.__module__, cls.__qualname__))
    if holds is None or not is_usual(cls):
        return False
    return all(_is_value(getattr(value, name, cls), is_usual, depth + 1, True) for name in holds)


#: Types that put their text into the statement as it is.
_SQL = {("psycopg2.extensions", "AsIs")} | {
    (module, name)
    for module in ("psycopg.sql", "psycopg2.sql")
    for name in ("Composed", "SQL", "Identifier", "Literal", "Placeholder", "Composable")
}


def may_be_sql(params: Any, known: set[type], is_usual: Callable[[type], bool]) -> bool:
    """Return whether a parameter may put SQL of its own into the statement.

    Of statements on their way, and so less strict than :func:`are_values`: a
    type that the driver knows how to quote will do.

    :param known: types that cannot, to which those are added that are found.
    """
    if type(params) is dict:
        params = list(params.values())
    elif not isinstance(params, (list, tuple)):
        # One value, an iterator: not to be looked at twice.
        return type(params) not in known
    for value in params:
        cls = type(value)
        if cls in known:
            continue
        if cls in (list, tuple, dict):
            if may_be_sql(value, known, is_usual):
                return True
            continue
        if not is_usual(cls) or any(
            (base.__module__, base.__qualname__) in _SQL for base in cls.__mro__
        ):
            return True
        known.add(cls)
    return False


def are_small(params: Any, most: int = _MOST) -> bool:
    """Return whether parameters are there to be sent again, and hold at most ``most``.

    One 2006 can also mean a packet over max_allowed_packet.
    """
    if isinstance(params, Mapping):
        params = params.values()
    elif not isinstance(params, (list, tuple)):
        return params is None
    return sum(map(_size, params)) <= most


def _size(value: Any) -> int:
    """Return the length of the texts in a parameter, or in a row of executemany()'s."""
    if isinstance(value, (str, bytes, bytearray)):
        return len(value)
    if isinstance(value, Mapping):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        return 0
    return sum(map(_size, value))
