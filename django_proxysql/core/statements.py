"""What a statement's text says before it is sent: does it leave state, does it write?

:func:`scan` is asked before every statement, and answers from a memo. It may see
state where there is none, which costs a replay, and must not miss any, which would
cost a lock. It knows no dialect. What may be run again :mod:`.texts` says.
"""

from __future__ import annotations

import functools
import re
from typing import Any

from . import dialects

#: Looks like a read. Only decides whether the socket is looked at first.
READ = 1
#: Leaves something in the session, or takes it back: see :mod:`.holdings`.
STATE = 2
#: Asks for a result that lives in the connection, such as LAST_INSERT_ID().
SCOPED = 4
#: A read that may write: it calls a function which is not known to be pure, or is SELECT INTO.
CALLS = 8
#: Of SCOPED: asks for ids that earlier statements made: LAST_INSERT_ID(), currval().
IDS = 16
#: Of SCOPED: asks what the statement before did: ROW_COUNT(), SHOW WARNINGS.
RESULT = 32
#: May end the transaction that it is sent in, as MySQL's DDL does: see :func:`may_end`.
ENDS = 64
#: No statement's: of the ids that went with a connection. Its successor has inserted rows, which
#: need not have made an id there: see :func:`asks_for_inserted`.
UNSURE = 128
#: Of SCOPED: asks how many rows the last SELECT found, which writes leave as it is: FOUND_ROWS().
FOUND = 256
#: No statement's: of MySQL's sequences. The new connection has taken no value of one that it knows.
UNTAKEN = 512

#: The memo of :func:`scan`, to be asked directly where a call costs too much.
kinds: dict[Any, int] = {}

_MEMO_SIZE = 2_000
#: Longer texts are scanned each time: that costs less than sending them.
_MEMO_LENGTH = 5_000
_LONG = 50_000

#: What may stand before a statement's first word. Comments that the servers
#: end at different places are not passed over: one in another.
_HEAD = re.compile(
    r"""(?:\s | \(
    | /\*(?!M?!) (?:(?!/\*).)*? \*/
    | (?:--|\#) [^\n]* \n)*
    ([A-Za-z]+)?""",
    re.DOTALL | re.VERBOSE,
)
_COMMENT = re.compile(r"/\*(?:.*?\*/|.*)|(?:--|#)[^\n]*(?:\n|$)", re.DOTALL)

_EXPLAIN_HEADS = frozenset({"EXPLAIN", "DESCRIBE", "DESC"})
_READ_HEADS = _EXPLAIN_HEADS | {"SELECT", "SHOW", "VALUES", "TABLE"}
_WRITE_HEADS = frozenset({"INSERT", "UPDATE", "DELETE", "REPLACE", "MERGE", "WITH"})
_SCHEMA_HEADS = frozenset("TRUNCATE CREATE ALTER DROP RENAME COMMENT GRANT".split())
#: No transaction ends by these.
_KEEPS_HEADS = _READ_HEADS | _WRITE_HEADS | {"SAVEPOINT", "RELEASE", "NOTIFY"}
#: Statements that leave no state by their kind. Whatever else a statement may
#: start with is taken to leave some: BEGIN, SET, USE, CALL, LOCK, LISTEN, … Those of a
#: transaction are gone with it.
_STATELESS_HEADS = (
    _KEEPS_HEADS
    | _SCHEMA_HEADS
    | {
        *(
            "REVOKE",
            "REINDEX",
            "ANALYZE",
            "OPTIMIZE",
            "CHECK",
            "REPAIR",
            "VACUUM",
            "REFRESH",
            "KILL",
        ),
        *("ROLLBACK", "COMMIT"),
    }
)
#: Statements that make no ids, unless they call for the next of a sequence.
_MAKE_NO_IDS = (
    _READ_HEADS
    | _SCHEMA_HEADS
    | {
        *("UPDATE", "DELETE", "SET", "USE", "BEGIN", "START", "SAVEPOINT", "RELEASE", "ROLLBACK"),
        *("COMMIT", "LISTEN", "LOCK", "UNLOCK", "ANALYZE", "VACUUM", "NOTIFY", "GET"),
    }
)

#: What may stand between two words, piece by piece: spaces and comments, as either server ends
#: them. There is one way only to read each piece.
_PIECE = (
    r"(?:\s+(?!\s)|/\*(?:[^*]|\*(?!/)){0,500}\*/|\*/"
    r"|(?:--|\#)[^\n]{0,500}\n)"
)
#: More than that is not read, or a text of names and comments would be read to its end for each
#: name. It is taken for what follows such a gap.
_MUCH = (
    rf"(?:{_PIECE}{{30}}"
    rf"|{_PIECE}{{0,29}}(?:/\*(?:[^*]|\*(?!/)){{501}}|(?:--|\#)[^\n]{{501}}))"
)
#: Between two words, where something must stand; and before a sign, where nothing need.
_GAP = rf"{_PIECE}{{1,30}}"
_SPACE_OR_NONE = rf"{_PIECE}{{0,30}}"
#: … and between a function's name and the parenthesis of its call.
CALL = rf"""["`]?(?:{_SPACE_OR_NONE}\(|{_MUCH})"""
#: Before the name of a variable of the session's own.
_OF_SESSION = r"@@(?:(?:session|local)\s*\.\s*)?`?"


def _pattern(text: str) -> re.Pattern[str]:
    return re.compile(text, re.IGNORECASE | re.VERBOSE)


_STATE = _pattern(rf"""
    \b(?:get_lock|release_lock|release_all_locks|service_\w+_locks
    # Those of a transaction end with it.
    | pg_(?:try_)?advisory_(?!xact)\w+
    | setseed|dblink\w*|pg_replication_origin_\w+
    | pg_(?:create|copy|drop)_\w*replication_slot | pg_(?:start_backup|backup_start)
    | pg_(?:stop_backup|backup_stop)
    # set_config, set_limit, set_user, and the application's own set_tenant.
    | (?:re)?set_\w+){CALL}
    # A temporary table, and not a column of that name.
    | \b(?:create|replace|local|global|drop)(?:{_GAP}temp(?:orary)?(?=\s|/|--|\#)|{_MUCH})
    | \binto(?:{_GAP}temp(?:orary)?(?:{_GAP}(?!values?\b|select\b|set\b|default\b|overriding\b
      |as\b|with\b|partition\b|using\b|from\b)[\w"`]|{_MUCH})|{_MUCH})
    | \bpg_temp(?:_\d+)?["`]?(?:{_SPACE_OR_NONE}\.|{_MUCH})
    # A user variable, not a system one and not PostgreSQL's @>.
    | (?<!@)@(?!@)[\w`'"$.] | :=
    # MySQL runs what stands in these comments.
    | /\*M?!
    # A name in PostgreSQL's escapes may be any of these names.
    | \bu&"
    # More than one statement: results may be left over.
    | ;\s*\S""")
#: One of these is in each text that _STATE finds something in.
_STATE_HINTS = (
    *("lock", "advisory", "set_", "setseed", "dblink", "replication_", "backup", "temp"),
    *("@", ":=", "/*", 'u&"', ";"),
)
#: By what CREATE TABLE makes a temporary table: it outlives the SET LOCAL.
MAKES_TEMPORARY = r"""search_path\s*(?:=|TO\b)\s*(?:['"]?pg_temp|%)"""
#: Locks and SETs that end with the transaction. MySQL's SET LOCAL is SET SESSION, but it
#: has no TO, and none of these variables.
_LOCAL = _pattern(rf"""
    \s*LOCK\s+(?:TABLE\s+)?(?!TABLES?\b)[\w".]+(?:\s*,\s*[\w".]+)*\s+IN\s+(?:[A-Z]+\s+)+MODE\b
    | \s*SET\s+(?:CONSTRAINTS\b | LOCAL\s+(?!{MAKES_TEMPORARY})
    (?:\w+(?:\.\w+)?\s+TO\b | \w+\.\w+\s*=
    | (?:statement_timeout|lock_timeout|idle_in_transaction_session_timeout
    |transaction_timeout|work_mem|search_path|synchronous_commit|row_security|jit)\s*=))""")
_CHAIN = _pattern(r"\bchain\b")
_ANALYZE = _pattern(r"\banaly[sz]e\b")
#: LAST_INSERT_ID(expression) gives a value, and asks for none.
_IDS = _pattern(rf"""
    \blast_insert_id[`"]?(?:{_SPACE_OR_NONE}\((?:{_SPACE_OR_NONE}\)|{_MUCH})|{_MUCH})
    | \b(?:lastval|currval){CALL} | \.\s*currval\b
    | \bwsrep_last_(?:written|seen)\w*{CALL} | \bprevious(?:{_GAP}value\b|{_MUCH})
    | {_OF_SESSION}(?:identity|(?:last_)?insert_id|last_gtid)""")
#: PostgreSQL makes a table of its name. MySQL's variables and files are none.
_INTO = _pattern(rf"""(?<![."`'])\binto\b(?!{_SPACE_OR_NONE}(?:@|(?:out|dump)file\b))""")
_GIVEN_ID = _pattern(rf"\blast_insert_id{CALL}")
_RESULT = _pattern(rf"\brow_count{CALL} | {_OF_SESSION}(?:warning_count|error_count)")
_FOUND = _pattern(rf"\bfound_rows{CALL}")
#: Who am I? Another connection's answer is another, and true.
_SELF = _pattern(
    rf"""\b(?:connection_id|pg_backend_pid){CALL}
    | {_OF_SESSION}(?:pseudo_thread_id|rand_seed|in_transaction)"""
)
_SCOPED_HINTS = (
    *("last_insert_id", "found_rows", "lastval", "currval", "connection_id", "pg_backend_pid"),
    *("wsrep_last", "row_count", "previous", "@@"),
)
_SCOPED_SHOW = _pattern(r"\bshow\s+(?:count|warnings|errors|profiles?|local|session|status)\b")
_NEXT = _pattern(rf"nextval|setval|\bnext\b|{_GIVEN_ID.pattern}")

#: A call: its schema, and its name with what quotes it.
_CALLED = _pattern(
    r"""(?<![\w$])(?:([\w$]+)["`]?\s*\.\s*)?(["`]?[\w$]+["`]?)(?:\s|/\*[^*]*\*/)*\("""
)
_CALLED_PURE = (
    (dialects.FUNCTIONS[None] | dialects.NO_OPERANDS | dialects.AFTER_CALLS | dialects.TYPES)
    | {"GROUP", "ARRAY", "ESCAPE", "MATERIALIZED"}
    # They tell what the connection knows, and write no row.
    | {"LAST_INSERT_ID", "FOUND_ROWS", "ROW_COUNT", "CONNECTION_ID", "LASTVAL", "CURRVAL"}
    | {"PG_BACKEND_PID", "WSREP_LAST_SEEN_GTID", "WSREP_LAST_WRITTEN_GTID"}
) - {"FIRST", "ROWS", "RANGE", "GROUPS"}


def scan(sql: Any) -> int:
    """Return the flags of a statement, from the memo if it is there."""
    try:
        kind = kinds.get(sql)
    except TypeError:
        # Not hashable: a composed object of psycopg's, say.
        kind = None
    if kind is not None:
        return kind
    text = text_in(sql)
    if text is None:
        return STATE
    kind = scan_text(text)
    if len(text) <= _MEMO_LENGTH:
        if len(kinds) >= _MEMO_SIZE:
            # Text with values in it fills any memo. Starting again costs what
            # the first scan of each statement cost.
            kinds.clear()
        kinds[sql] = kind
    return kind


def text_in(sql: Any) -> str | None:
    """Return a statement's text; None if it is anything but a text."""
    if isinstance(sql, bytes):
        return sql.decode("latin-1")
    return sql if isinstance(sql, str) else None


def writes(kind: int) -> bool:
    return not kind & READ or bool(kind & CALLS)


def makes_ids(sql: Any) -> bool:
    """Return whether a statement may give LAST_INSERT_ID() or lastval() something to tell."""
    text = text_in(sql)
    if text is None:
        return True
    # After a replacement each write asks.
    return (_makes_ids if len(text) <= _MEMO_LENGTH else _makes_ids.__wrapped__)(text)


@functools.lru_cache(_MEMO_SIZE)
def _makes_ids(text: str) -> bool:
    return head_of(text) not in _MAKE_NO_IDS or _NEXT.search(text) is not None


def takes_next(sql: Any) -> bool:
    """Return whether a statement takes a sequence's next value, as far as its text says."""
    text = text_in(sql)
    return text is None or _NEXT.search(text) is not None


_INSERTED = re.compile("insert_id|identity", re.IGNORECASE)
_OF_SEQUENCES = re.compile("lastval|currval|previous", re.IGNORECASE)


def asks_for_taken(sql: Any) -> bool:
    """Return whether a statement asks for the value that was taken of a sequence last.

    For statements in which :func:`scan` has found IDS.
    """
    text = text_in(sql)
    return text is None or _OF_SEQUENCES.search(text) is not None


def asks_for_inserted(sql: Any) -> bool:
    """Return whether a statement asks for ids that INSERTs have made, and not for a sequence's.

    For statements in which :func:`scan` has found IDS.
    """
    text = text_in(sql)
    return text is None or _INSERTED.search(text) is not None


def readings(text: str) -> tuple[str, ...]:
    """Return a text as each server reads its ends of lines: as a rule they read it alike.

    A bare carriage return ends a comment to PostgreSQL, and none to MySQL.
    """
    if "\r" not in text:
        return (text,)
    text = text.replace("\r\n", "\n")
    return (text.replace("\r", "\n"), text.replace("\r", " ")) if "\r" in text else (text,)


def start_of(text: str) -> int:
    """Return where a statement's first word stands, or may stand."""
    found = _HEAD.match(text)
    return found.end() - len(found.group(1) or "") if found else 0


def head_of(text: str) -> str:
    """Return a statement's first word, in capitals; "" where it is not seen."""
    found = _HEAD.match(text)
    return (found.group(1) or "").upper() if found else ""


def scan_text(text: str) -> int:
    """Return the flags of a text, without the memo."""
    if text.endswith(("/", ";")):
        text = without_tail(text)
    found = [_scan_reading(reading) for reading in readings(text)]
    # What one server may find there counts, and a read is one to both.
    return (found[0] | found[-1]) & ~READ | found[0] & found[-1] & READ


def _scan_reading(text: str) -> int:
    head = head_of(text)
    lowered = text.lower()
    kind = 0 if head in _KEEPS_HEADS else ENDS
    if head in _READ_HEADS and not (head in _EXPLAIN_HEADS and _ANALYZE.search(text)):
        kind |= READ
        if _calls_unknown(text) or ("into" in lowered and _INTO.search(text)):
            kind |= CALLS
    if (
        (head not in _STATELESS_HEADS and not _LOCAL.match(text))
        or (head in ("COMMIT", "ROLLBACK") and _CHAIN.search(text))
        or (not kind & READ and "pg_settings" in lowered)
        or _leaves_state(text, lowered)
    ):
        kind |= STATE
    if any(hint in lowered for hint in _SCOPED_HINTS):
        if _IDS.search(text):
            kind |= SCOPED | IDS
        if _RESULT.search(text):
            kind |= SCOPED | RESULT
        if _FOUND.search(text):
            kind |= SCOPED | FOUND
        if _SELF.search(text) or _GIVEN_ID.search(text):
            kind |= SCOPED
    if head == "GET" or (head == "SHOW" and _SCOPED_SHOW.search(_COMMENT.sub(" ", text))):
        kind |= SCOPED | RESULT
    return kind


def _leaves_state(text: str, lowered: str) -> bool:
    if not any(hint in lowered for hint in _STATE_HINTS):
        return False
    if len(text) > _LONG:
        text = shortened(text)
    # Of a statement of megabytes the hint will do: it is full of values.
    return len(text) > _LONG or _STATE.search(text) is not None


def _calls_unknown(text: str) -> bool:
    """Return whether a read calls a function that is not known to be pure.

    Less strict than the proof of a read: what it overlooks costs one node's
    catching up, and only where two servers read a text in two ways.
    """
    return any(
        (schema and schema.lower() != "pg_catalog") or name.upper() not in _CALLED_PURE
        for schema, name in _CALLED.findall(text)
    )


#: A list of placeholders or numbers may be long, and much indented; one stands for all.
#: No quote is in what is left out, so that no quote changes its place.
_BLANKS = re.compile(r"[ \t]{2,}")
_PLACEHOLDERS = re.compile(r"(?<!%)%s(?:,[ ]?%s)+")
_NUMBERS = re.compile(r"(?<![\w.$])\d+(?:,[ ]?\d+)+(?![\w.$])", re.ASCII)
_ROWS = re.compile(r"\(%s\)(?:,[ ]?\(%s\))+")


def shortened(text: str) -> str:
    """Return a text with its lists cut short."""
    text = _NUMBERS.sub("0", _BLANKS.sub(" ", text))
    return _ROWS.sub("(%s)", _PLACEHOLDERS.sub("%s", text))


#: A comment that each server ends at the same place, and that none runs. No
#: placeholder is in it: a value could end it.
_REMARK = re.compile(r"/\*(?!\w{0,3}[!+])(?:[^*/%\\\r\n]|%%|/(?!\*))*\*/")
_REMARK_LENGTH = 2_000


def without_tail(text: str) -> str:
    """Return a statement without what may come after it: a semicolon, a comment of sqlcommenter's.

    If it is no comment, for a quote or another comment was open, what is left
    is cut in the middle and is no statement to :mod:`.texts`.
    """
    text = text.rstrip(" \t\r\n\f")
    if text.endswith(";"):
        text = text[:-1].rstrip(" \t\r\n\f")
    while text.endswith("*/"):
        start = text.rfind("/*", max(0, len(text) - _REMARK_LENGTH))
        if start < 0 or not _REMARK.fullmatch(text, start):
            break
        text = text[:start].rstrip(" \t\r\n\f")
    return text


# In a transaction

_BACK_TO_SAVEPOINT = _pattern(r"\s*ROLLBACK\s+(?:(?:WORK|TRANSACTION)\s+)?TO\b")
#: Their DDL is part of the transaction.
_KEEP_THEIR_DDL = ("postgresql", "sqlite")
_ENDS_POSTGRESQL = frozenset(
    {"", "BEGIN", "START", "COMMIT", "END", "ROLLBACK", "ABORT", "PREPARE", "CALL", "EXECUTE"}
)
_KEEPS_MYSQL = frozenset({"SET", "USE", "DO", "SAVEPOINT", "RELEASE", "SIGNAL", "RESIGNAL"})
_TEMPORARY = _pattern(r"\s*(?:CREATE|DROP)\s+TEMPORARY\s+TABLE\b")
_SET_THAT_ENDS = _pattern(r"\b(?:autocommit|password|statement|default\b[\s\S]*\brole)\b")


def may_end(sql: Any, vendor: str) -> bool:
    """Return whether ``sql`` may end the transaction that it is sent in.

    For statements in which :func:`scan` has found STATE or ENDS.

    :param vendor: "mysql", "postgresql" or another, as Django says it.
    """
    text = text_in(sql)
    if text is None:
        return True
    return any(_may_end(reading, vendor) for reading in readings(without_tail(text)))


def _may_end(text: str, vendor: str) -> bool:
    if ";" in text:
        return True
    if _BACK_TO_SAVEPOINT.match(text):
        return False
    head = head_of(text)
    if vendor in _KEEP_THEIR_DDL:
        return head in _ENDS_POSTGRESQL
    if head in _KEEPS_MYSQL:
        return head == "SET" and _SET_THAT_ENDS.search(text) is not None
    return head not in _KEEPS_HEADS and not _TEMPORARY.match(text)


def may_make_read_only(sql: Any) -> bool:
    """Return whether ``sql`` may make the transaction READ ONLY that it is sent in.

    For statements in which :func:`scan` has found STATE or ENDS.
    """
    text = text_in(sql)
    if text is None:
        return True
    text = text.lower()
    return "set_config" in text or ("read" in text and "only" in text)
