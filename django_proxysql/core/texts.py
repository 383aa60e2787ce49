"""What a statement is for a replay, by its text and by its parameters.

Its text: a read, a write, a change of the schema, a setting. Asked only after a loss; see
:mod:`django_proxysql.core.statements`.

Its parameters: are they values, or may they be SQL? A driver quotes values. psycopg2's ``AsIs``, a
composed object of psycopg's and an adapter of the application's own can put any text into the
statement, which then is not what its text says.
"""

from __future__ import annotations

import datetime
import decimal
import enum
import re
import uuid
from collections.abc import Callable, Mapping
from typing import Any

from .statements import (
    KEEPS_HEADS,
    head_of,
    is_plain,
    is_provable_read,
    readings,
    without_tail,
)

#: Longer texts are values, and no setting.
_LENGTH = 20_000


class Text(enum.Enum):
    """What a statement's text is, for a replay."""

    #: Running it twice changes nothing.
    READ = "read"
    #: The same, but for locks that end with the transaction.
    LOCKING = "locking read"
    #: One plain statement: it runs as a whole or not at all.
    PLAIN = "plain write"
    #: PostgreSQL's CREATE, ALTER and the like, which are undone with the transaction.
    SCHEMA = "schema change"
    #: Sets or locks something until PostgreSQL's transaction ends, and no longer.
    OF_TRANSACTION = "of the transaction"
    #: Sets what a session that held nothing holds from here on, to a value in the text.
    SETTING = "setting"
    #: Anything else: nothing is known of it.
    OTHER = "other"


def text_of(sql: Any, dialect: str | None) -> Text:
    """Return what ``sql`` is on servers of ``dialect``; OTHER where that is not certain."""
    if is_provable_read(sql, dialect=dialect):
        return Text.READ
    if is_provable_read(sql, may_lock=True, dialect=dialect):
        return Text.LOCKING
    if is_plain(sql, dialect=dialect):
        return Text.PLAIN
    if not isinstance(sql, str) or len(sql) > _LENGTH or "\\" in sql:
        return Text.OTHER
    text = without_tail(sql)
    if _SETTING.fullmatch(text):
        return Text.SETTING
    if dialect == "postgresql":
        if _TRANSACTION_LOCK.fullmatch(text) or is_of_transaction(text):
            return Text.OF_TRANSACTION
        if _SCHEMA.match(text) and ";" not in text and not _NO_SCHEMA.search(text):
            return Text.SCHEMA
    return Text.OTHER


def with_parameters(sql: Any, params: Any) -> Any:
    """Return ``sql`` as it would be written with parameters: without any, a % is a % alone."""
    return sql.replace("%", "%%") if params is None and isinstance(sql, str) else sql


def is_of_transaction(sql: Any) -> bool:
    """Return whether ``sql`` sets something until PostgreSQL's transaction ends, and no longer."""
    return isinstance(sql, str) and _TRANSACTION_SETTING.fullmatch(without_tail(sql)) is not None


_BACK_TO_SAVEPOINT = re.compile(r"\s*ROLLBACK\s+(?:(?:WORK|TRANSACTION)\s+)?TO\b", re.IGNORECASE)
#: PostgreSQL's DDL is part of its transaction.
_ENDS_POSTGRESQL = frozenset(
    {"", "BEGIN", "START", "COMMIT", "END", "ROLLBACK", "ABORT", "PREPARE", "CALL", "EXECUTE"}
)
_KEEPS_MYSQL = frozenset({"SET", "USE", "DO", "SAVEPOINT", "RELEASE", "SIGNAL", "RESIGNAL"})
_TEMPORARY = re.compile(r"\s*(?:CREATE|DROP)\s+TEMPORARY\s+TABLE\b", re.IGNORECASE)
_SET_THAT_ENDS = re.compile(
    r"\b(?:autocommit|password|statement|default\b.*\brole)\b", re.IGNORECASE | re.DOTALL
)


def may_end(sql: Any, vendor: str) -> bool:
    """Return whether ``sql`` may end the transaction that it is sent in.

    For statements in which :func:`.statements.scan` has found STATE or ENDS.

    :param vendor: "mysql" or "postgresql", as Django says it.
    """
    if not isinstance(sql, (str, bytes)):
        return True
    text = sql.decode("latin-1") if isinstance(sql, bytes) else sql
    return any(_may_end(reading, vendor) for reading in readings(without_tail(text)))


def _may_end(text: str, vendor: str) -> bool:
    if ";" in text:
        return True
    if _BACK_TO_SAVEPOINT.match(text):
        return False
    head = head_of(text)
    if vendor == "postgresql":
        return head in _ENDS_POSTGRESQL
    if head in _KEEPS_MYSQL:
        return head == "SET" and _SET_THAT_ENDS.search(text) is not None
    return head not in KEEPS_HEADS and not _TEMPORARY.match(text)


def may_make_read_only(sql: Any) -> bool:
    """Return whether ``sql`` may make the transaction READ ONLY that it is sent in.

    For statements in which :func:`.statements.scan` has found STATE or ENDS.
    """
    if not isinstance(sql, (str, bytes)):
        return True
    text = (sql.decode("latin-1") if isinstance(sql, bytes) else sql).lower()
    return "set_config" in text or ("read" in text and "only" in text)


_TIME = re.compile(
    r"\bnow\b|current_(?:date|time)|localtime|transaction_timestamp|\bage\b"
    r"|today|tomorrow|yesterday",
    re.IGNORECASE,
)


def tells_time(sql: str) -> bool:
    """Return whether a read may tell when PostgreSQL's transaction began."""
    return _TIME.search(sql) is not None


#: Values that are the same whenever they are set: no call, no other variable.
_SETTING = re.compile(
    r"""SET\s+(?:SESSION\s+|@@(?:session\.)?)?
    (?!(?:SESSION|LOCAL|GLOBAL|PERSIST|PERSIST_ONLY|autocommit|TRANSACTION|PASSWORD|CONSTRAINTS)\b)
    (?:
      (?:[a-z_]\w*(?:\.[a-z_]\w*)?|@[a-z_]\w*)\s*(?:=|\bTO\b)\s*VALUE(?:\s*,\s*VALUE)*
      | (?:NAMES|ROLE|TIME\s+ZONE)\s+VALUE(?:\s+COLLATE\s+VALUE)?
    )
    | (?:UN)?LISTEN\s+(?:[a-z_]\w*|"[^"%]+")
    | PREPARE\s+\w+\s+FROM\s+'[^'%]*'
    | PREPARE\s+\w+(?:\s*\([\w\s,]*\))?\s+AS\s+(?:SELECT|INSERT|UPDATE|DELETE)\b[^;%]*
    """.replace("VALUE", r"""(?:'[^'%]*'|"[^"%]*"|-?\d+(?:\.\d+)?|[a-z_]\w*|%s)"""),
    re.IGNORECASE | re.VERBOSE | re.ASCII,
)
_TRANSACTION_LOCK = re.compile(
    r"SELECT\s+pg_(?:try_)?advisory_xact_lock(?:_shared)?\((?:-?\d+|%s)(?:,\s*(?:-?\d+|%s))?\)",
    re.IGNORECASE | re.ASCII,
)
_TRANSACTION_SETTING = re.compile(
    r"""SET\s+TRANSACTION\s[a-z\s,]+
    | SET\s+CONSTRAINTS\s[\w\s,".]+
    | SET\s+LOCAL\s+\w+(?:\.\w+)?\s*(?:=|\bTO\b)\s*(?:'[^'%]*'|\w+|%s)(?:,\s*\w+)*""",
    re.IGNORECASE | re.VERBOSE | re.ASCII,
)
_SCHEMA = re.compile(r"(?:CREATE|ALTER|DROP|COMMENT|GRANT|REVOKE|TRUNCATE)\s", re.IGNORECASE)
#: What is done outside of the database, or at another.
_NO_SCHEMA = re.compile(
    r"\b(?:SUBSCRIPTION|SERVER|DATABASE|TABLESPACE|SYSTEM|FOREIGN|MAPPING|EXTENSION|LANGUAGE)\b"
    r"|\bCONCURRENTLY\b|--|/\*",
    re.IGNORECASE,
)

_WORD_OR_QUOTED = re.compile(r'[^\W\d][\w$]*|"((?:[^"]|"")+)"|`([^`]+)`')


def names_in(sql: str) -> set[str]:
    """Return all that may be a name in a statement: its words, and what it quotes.

    Each as it stands and in small letters. A table, a function or a type that
    the statement names is among them, and so is much else.
    """
    names: set[str] = set()
    for found in _WORD_OR_QUOTED.finditer(sql):
        name = (found.group(1) or "").replace('""', '"') or found.group(2) or found.group(0)
        names.update((name, name.lower()))
        # What looks like a string to one mode is a name to another.
        names.update(re.findall(r"\w+", name.lower()))
    return names


# Parameters

#: Types whose values every driver quotes.
VALUES: frozenset[type] = frozenset(
    {
        *(type(None), bool, int, float, str, bytes, bytearray, memoryview, decimal.Decimal),
        *(datetime.datetime, datetime.date, datetime.time, datetime.timedelta, uuid.UUID),
    }
)

#: Types of drivers and of Django's that stand for a value, by module, and the
#: attributes that have it: what is in there is looked at, too.
_HOLDERS: dict[tuple[str, str], tuple[str, ...]] = {
    **{
        ("psycopg.types.numeric", name): ()
        for name in ("Int2", "Int4", "Int8", "IntNumeric", "Oid", "Float4", "Float8")
    },
    ("psycopg.types.json", "Json"): ("obj",),
    ("psycopg.types.json", "Jsonb"): ("obj",),
    ("psycopg2._json", "Json"): ("adapted",),
    ("django.db.backends.postgresql.psycopg_any", "Jsonb"): ("adapted",),
    ("psycopg.types.range", "Range"): ("lower", "upper"),
    **{
        ("psycopg2._range", name): ("lower", "upper")
        for name in ("NumericRange", "DateRange", "DateTimeRange", "DateTimeTZRange")
    },
    ("psycopg.dbapi20", "Binary"): ("obj",),
    ("psycopg2.extensions", "Binary"): ("adapted",),
    ("psycopg2.extras", "Inet"): ("addr",),
    **{
        ("ipaddress", f"IPv{version}{kind}"): ()
        for version in (4, 6)
        for kind in ("Address", "Interface", "Network")
    },
    ("django.utils.safestring", "SafeString"): (),
    # Well-known bytes and texts of geometries, which they quote themselves.
    ("django.contrib.gis.db.backends.postgis.adapter", "PostGISAdapter"): (),
    ("django.contrib.gis.db.backends.base.adapter", "WKTAdapter"): (),
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
    return all(_is_value(value, is_usual, 0) for value in params)


def _is_value(value: Any, is_usual: Callable[[type], bool], depth: int) -> bool:
    cls = type(value)
    if depth > _DEEP:
        return False
    if cls in (list, tuple):
        return is_usual(cls) and all(_is_value(item, is_usual, depth + 1) for item in value)
    if cls in VALUES or (issubclass(cls, enum.Enum) and issubclass(cls, (str, int))):
        # A member of TextChoices is the text that it stands for.
        return not hasattr(cls, "__conform__") and is_usual(cls)
    holds = _HOLDERS.get((cls.__module__, cls.__qualname__))
    if holds is None or not is_usual(cls):
        return False
    return all(_is_data(getattr(value, name, cls), is_usual, depth + 1) for name in holds)


def _is_data(value: Any, is_usual: Callable[[type], bool], depth: int) -> bool:
    """Return whether a value is made of plain values: what JSON can say, and more."""
    if depth > _DEEP:
        return False
    if type(value) is dict:
        return all(
            _is_data(key, is_usual, depth + 1) and _is_data(item, is_usual, depth + 1)
            for key, item in value.items()
        )
    if type(value) in (list, tuple):
        return all(_is_data(item, is_usual, depth + 1) for item in value)
    return _is_value(value, is_usual, depth)


#: Types that put their text into the statement as it is.
_SQL = {
    ("psycopg2.extensions", "AsIs"),
    *(
        (module, name)
        for module in ("psycopg.sql", "psycopg2.sql")
        for name in ("Composed", "SQL", "Identifier", "Literal", "Placeholder", "Composable")
    ),
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
        if any((base.__module__, base.__qualname__) in _SQL for base in cls.__mro__):
            return True
        if not is_usual(cls):
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
