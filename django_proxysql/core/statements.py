"""What a statement's text says about running it: does it leave state, may it be run again?

Two questions at two prices. :func:`scan` is asked before every statement and
answers from a memo; it may see state where there is none, which costs a
replay, and must not miss any, which would cost a lock. :func:`is_provable_read`
and :func:`is_plain` are asked only after a loss, split the text with sqlparse's
lexer, and answer no whenever they are not sure.

:func:`scan` knows no dialect. The others are given one, for a function, an
operator or a keyword of one dialect may be anybody's function in another. They
do not know the server's sql_mode: what they say holds in each. What a text
does not show they cannot see: views whose functions write, PostgreSQL's
functions that are written like columns (``t.f``), and functions of the
application's that are named like built-in ones. What is taken for a read is
therefore run again in a READ ONLY transaction.

Longer than other files: a third of it is lists of words, which the patterns beside them use.
"""

from __future__ import annotations

import functools
import re
from typing import Any

from sqlparse import lexer

from .dialects import (
    AFTER_CALLS,
    BEFORE_BY,
    BEFORE_STRINGS,
    CAST_TO,
    INFIX,
    INFIX_OF_MYSQL,
    INFIX_OF_POSTGRESQL,
    KEEPS_SIGN,
    NO_FUNCTIONS,
    NO_OPERANDS,
    OF_MYSQL,
    OF_POSTGRESQL,
    OPERATORS,
    TYPES,
    functions_of,
)
from .dialects import PURE as _PURE

#: Looks like a read. Only decides whether the socket is looked at first.
READ = 1
#: Leaves something in the session, or takes it back: see :mod:`.holdings`.
STATE = 2
#: Asks for a result that lives in the connection, such as LAST_INSERT_ID().
SCOPED = 4
#: A read that calls a function which is not known to be pure: it may write.
CALLS = 8
#: Of SCOPED: asks for ids that earlier statements made: LAST_INSERT_ID(), currval().
IDS = 16
#: Of SCOPED: asks what the statement before did: ROW_COUNT(), SHOW WARNINGS.
RESULT = 32
#: May end the transaction that it is sent in, as MySQL's DDL does: see :func:`.texts.may_end`.
ENDS = 64

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

_READ_HEADS = frozenset({"SELECT", "SHOW", "DESCRIBE", "DESC", "EXPLAIN", "VALUES", "TABLE"})
_EXPLAIN_HEADS = frozenset({"EXPLAIN", "DESCRIBE", "DESC"})
#: Statements that leave no state by their kind. Whatever else a statement may
#: start with is taken to leave some: BEGIN, SET, USE, CALL, LOCK, LISTEN, …
_STATELESS_HEADS = _READ_HEADS | {
    *("INSERT", "UPDATE", "DELETE", "REPLACE", "MERGE", "WITH", "TRUNCATE"),
    *("CREATE", "ALTER", "DROP", "RENAME", "COMMENT", "GRANT", "REVOKE", "REINDEX"),
    *("ANALYZE", "OPTIMIZE", "CHECK", "REPAIR", "VACUUM", "REFRESH", "NOTIFY", "KILL"),
    # Of a transaction, and gone with it. BEGIN and START are not here.
    *("SAVEPOINT", "RELEASE", "ROLLBACK", "COMMIT"),
}
#: No transaction ends by these.
KEEPS_HEADS = _READ_HEADS | {
    *("INSERT", "UPDATE", "DELETE", "REPLACE", "MERGE", "WITH", "SAVEPOINT", "RELEASE", "NOTIFY"),
}
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
_STATE = re.compile(
    rf"""\b(?:get_lock|release_lock|release_all_locks|service_\w+_locks
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
    | ;\s*\S""",
    re.IGNORECASE | re.VERBOSE,
)
#: One of these is in each text that _STATE finds something in.
_STATE_HINTS = (
    *("lock", "advisory", "set_", "setseed", "dblink", "replication_", "backup", "temp"),
    *("@", ":=", "/*", 'u&"', ";"),
)
#: Locks and SETs that end with the transaction. MySQL's SET LOCAL is SET SESSION, but it
#: has no TO, and none of these variables.
_LOCAL = re.compile(
    r"""\s*LOCK\s+(?:TABLE\s+)?(?!TABLES?\b)[\w".]+(?:\s*,\s*[\w".]+)*\s+IN\s+(?:[A-Z]+\s+)+MODE\b
    | \s*SET\s+(?:CONSTRAINTS\b | LOCAL\s+(?:\w+(?:\.\w+)?\s+TO\b | \w+\.\w+\s*=
    | (?:statement_timeout|lock_timeout|idle_in_transaction_session_timeout
    |transaction_timeout|work_mem|search_path|synchronous_commit|row_security|jit)\s*=))""",
    re.IGNORECASE | re.VERBOSE,
)
_CHAIN = re.compile(r"\bchain\b", re.IGNORECASE)
_ANALYZE = re.compile(r"\banaly[sz]e\b", re.IGNORECASE)
#: LAST_INSERT_ID(expression) gives a value, and asks for none.
_IDS = re.compile(
    rf"""\blast_insert_id[`"]?(?:{_SPACE_OR_NONE}\((?:{_SPACE_OR_NONE}\)|{_MUCH})|{_MUCH})
    | \blastval{CALL} | \bcurrval{CALL} | \.\s*currval\b
    | \bwsrep_last_(?:written|seen)\w*{CALL} | \bprevious(?:{_GAP}value\b|{_MUCH})
    | @@(?:(?:session|local)\s*\.\s*)?`?(?:identity|(?:last_)?insert_id|last_gtid)""",
    re.IGNORECASE | re.VERBOSE,
)
_GIVEN_ID = re.compile(rf"\blast_insert_id{CALL}", re.IGNORECASE)
_RESULT = re.compile(
    rf"""\b(?:found_rows|row_count){CALL}
    | @@(?:(?:session|local)\s*\.\s*)?`?(?:warning_count|error_count)""",
    re.IGNORECASE | re.VERBOSE,
)
#: Who am I? Another connection's answer is another, and true.
_SELF = re.compile(
    rf"""\b(?:connection_id|pg_backend_pid){CALL}
    | @@(?:(?:session|local)\s*\.\s*)?`?(?:pseudo_thread_id|rand_seed|in_transaction)""",
    re.IGNORECASE | re.VERBOSE,
)
_SCOPED_HINTS = (
    *("last_insert_id", "found_rows", "lastval", "currval", "connection_id", "pg_backend_pid"),
    *("wsrep_last", "row_count", "previous", "@@"),
)
_SCOPED_SHOW = re.compile(
    r"\bshow\s+(?:count|warnings|errors|profiles?|local|session|status)\b", re.IGNORECASE
)

#: Statements that make no ids, unless they call for the next of a sequence.
_MAKE_NO_IDS = _READ_HEADS | {
    *("UPDATE", "DELETE", "TRUNCATE", "CREATE", "ALTER", "DROP", "RENAME", "COMMENT", "GRANT"),
    *("SET", "USE", "BEGIN", "START", "SAVEPOINT", "RELEASE", "ROLLBACK", "COMMIT", "LISTEN"),
    *("LOCK", "UNLOCK", "ANALYZE", "VACUUM", "NOTIFY", "GET"),
}
_NEXT = re.compile(rf"nextval|setval|\bnext\b|{_GIVEN_ID.pattern}", re.IGNORECASE)


def scan(sql: Any) -> int:
    """Return the flags READ, STATE and SCOPED of a statement, from the memo if it is there."""
    try:
        kind = kinds.get(sql)
    except TypeError:
        # Not hashable: a composed object of psycopg's, say.
        kind = None
    if kind is not None:
        return kind
    if isinstance(sql, str):
        text = sql
    elif isinstance(sql, bytes):
        text = sql.decode("latin-1")
    else:
        return STATE
    kind = _scan(text)
    if len(text) <= _MEMO_LENGTH:
        if len(kinds) >= _MEMO_SIZE:
            # Text with values in it fills any memo. Starting again costs what
            # the first scan of each statement cost.
            kinds.clear()
        kinds[sql] = kind
    return kind


def writes(kind: int) -> bool:
    """Return whether a statement of this kind may write."""
    return not kind & READ or bool(kind & CALLS)


def makes_ids(sql: Any) -> bool:
    """Return whether a statement may give LAST_INSERT_ID() or lastval() something to tell."""
    if isinstance(sql, bytes):
        sql = sql.decode("latin-1")
    if not isinstance(sql, str):
        return True
    # After a replacement each write asks.
    return _makes_ids(sql) if len(sql) <= _MEMO_LENGTH else _may_make_ids(sql)


def _may_make_ids(sql: str) -> bool:
    return head_of(sql) not in _MAKE_NO_IDS or _NEXT.search(sql) is not None


_makes_ids = functools.lru_cache(_MEMO_SIZE)(_may_make_ids)


def readings(text: str) -> tuple[str, ...]:
    """Return a text as each server reads its ends of lines: as a rule they read it alike.

    A bare carriage return ends a comment to PostgreSQL, and none to MySQL.
    """
    if "\r" not in text:
        return (text,)
    text = text.replace("\r\n", "\n")
    return (text.replace("\r", "\n"), text.replace("\r", " ")) if "\r" in text else (text,)


def head_of(text: str) -> str:
    """Return a statement's first word, in capitals; "" where it is not seen."""
    found = _HEAD.match(text)
    return (found.group(1) or "").upper() if found else ""


def _scan(text: str) -> int:
    if text.endswith(("/", ";")):
        text = without_tail(text)
    found = [_scan_reading(reading) for reading in readings(text)]
    # What one server may find there counts, and a read is one to both.
    return (found[0] | found[-1]) & ~READ | found[0] & found[-1] & READ


def _scan_reading(text: str) -> int:
    head = head_of(text)
    kind = 0
    lowered = text.lower()
    if head not in KEEPS_HEADS:
        kind |= ENDS
    if head in _READ_HEADS and not (head in _EXPLAIN_HEADS and _ANALYZE.search(text)):
        kind |= READ
        if _calls_unknown(text):
            kind |= CALLS
    if (
        (head not in _STATELESS_HEADS and not _LOCAL.match(text))
        or (head in ("COMMIT", "ROLLBACK") and _CHAIN.search(text))
        or (head in ("UPDATE", "WITH") and "pg_settings" in lowered)
        or _leaves_state(text, lowered)
    ):
        kind |= STATE
    return kind | _scoped(text, lowered, head)


def _scoped(text: str, lowered: str, head: str) -> int:
    scoped = 0
    if any(hint in lowered for hint in _SCOPED_HINTS):
        if _IDS.search(text):
            scoped |= SCOPED | IDS
        if _RESULT.search(text):
            scoped |= SCOPED | RESULT
        if _SELF.search(text) or _GIVEN_ID.search(text):
            scoped |= SCOPED
    if head == "GET" or (head == "SHOW" and _SCOPED_SHOW.search(_COMMENT.sub(" ", text))):
        scoped |= SCOPED | RESULT
    return scoped


def _leaves_state(text: str, lowered: str) -> bool:
    if not any(hint in lowered for hint in _STATE_HINTS):
        return False
    if len(text) > _LONG:
        text = _shortened(text)
        # Of a statement of megabytes the hint will do: it is full of values.
        return len(text) > _LONG or _STATE.search(text) is not None
    return _STATE.search(text) is not None


def _calls_unknown(text: str) -> bool:
    """Return whether a read calls a function that is not known to be pure.

    Less strict than the proof of a read: what it overlooks costs one node's
    catching up, and only where two servers read a text in two ways.
    """
    for schema, name in _CALLED.findall(text):
        if (schema and schema.lower() != "pg_catalog") or name.upper() not in _CALLED_PURE:
            return True
    return False


# After a loss

#: sqlparse says nothing of its types.
_tokenize: Any = lexer.tokenize

#: Of a text as it is, and once what repeats itself is left out.
_MOST = 100_000
_READ_LENGTH = 20_000
#: The lexer takes some 10 us for each, while somebody waits.
_MOST_TOKENS = 2_500

_PROVABLE_HEADS = frozenset({"SELECT", "SHOW", "DESCRIBE", "DESC", "EXPLAIN", "WITH"})
_PLAIN_HEADS = frozenset({"SELECT", "INSERT", "UPDATE", "DELETE", "REPLACE"})

#: A list of placeholders or numbers may be long, and much indented; one stands for all.
#: No quote is in what is left out, so that no quote changes its place.
_BLANKS = re.compile(r"[ \t]{2,}")
_PLACEHOLDERS = re.compile(r"(?<!%)%s(?:,[ ]?%s)+")
_NUMBERS = re.compile(r"(?<![\w.$])\d+(?:,[ ]?\d+)+(?![\w.$])", re.ASCII)
_ROWS = re.compile(r"\(%s\)(?:,[ ]?\(%s\))+")

#: Every token of the lexer's must be one of these, whole: then it begins and
#: ends where MySQL's and PostgreSQL's own lexers have it begin and end, in
#: every sql_mode. That takes backslashes being nowhere; names in backticks
#: without what PostgreSQL, to which a backtick is an operator, would read in
#: them; and no placeholder between quotes, where a value could end the quotes.
_SPACE = re.compile(r"[ \t\r\n\f]+")
_QUOTED = re.compile(r"""'(?:[^'%]|''|%%)*' | "(?:[^"%]|""|%%)*" | `[^`'"%()]+`""", re.VERBOSE)
_WORDS = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(?:[ \t\r\n\f]+[A-Za-z_][A-Za-z0-9_]*)*")
_ZONE = re.compile(r"AT\s+TIME\s+ZONE\s+'[^'%]*'", re.IGNORECASE)
_NUMBER = re.compile(r"-?(?:0[xX][0-9A-Fa-f]+|(?:\d+\.?\d*|\.\d+)(?:[eE]-?\d+)?)", re.ASCII)
_PLACEHOLDER = re.compile(r"%(?:\(\w+\))?s")
_SUBSCRIPT = re.compile(r"\[(?:%s|\d+|:|\s)*\]", re.ASCII)
_SIGN = re.compile(r"[(),.\[\]]|[-+*/<>=!~|&^?@#:]+|(?:%%)+")
#: A token's shape, and what is kept of it.
_WORD, _VALUE, _SIGNS = "word", "value", "sign"

#: What no statement that is run again has outside of quotes: comments,
#: assignments, user variables.
_NEVER = re.compile(r"--|/\*|\*/|:=|(?<!@)@(?!@)[\w']|\#(?![>-])")
#: Sequences: in Oracle's sql_mode a column so named is one of MariaDB's. And
#: tables of MySQL's that are emptied by being read.
_SEQUENCES = re.compile(r"nextval|setval|innodb_cmp\w*_reset", re.IGNORECASE)
#: Words that make a SELECT more than a read.
_FORBIDDEN_IN_READS = frozenset(
    """INTO LOCK FOR ANALYZE ANALYSE NEXT PREVIOUS FETCH PROCEDURE OUTFILE DUMPFILE
    INSERT UPDATE DELETE REPLACE MERGE CALL DO SET TRUNCATE EXECUTE COPY LOAD HANDLER
    CREATE ALTER DROP RENAME GRANT REVOKE BEGIN COMMIT ROLLBACK SAVEPOINT RELEASE USE KILL
    FLUSH RESET TEMP TEMPORARY WARNINGS ERRORS PROFILE PROFILES""".split()
)
_FORBIDDEN_IN_PLAIN = frozenset(
    """LOCK ANALYZE ANALYSE NEXT PREVIOUS WITH PROCEDURE OUTFILE DUMPFILE MERGE CALL
    TRUNCATE EXECUTE COPY LOAD HANDLER CREATE ALTER DROP RENAME GRANT REVOKE BEGIN COMMIT
    ROLLBACK SAVEPOINT RELEASE USE KILL FLUSH RESET TEMP TEMPORARY""".split()
)
_LOCKING_LENGTH = 1_000
_LOCKING = re.compile(
    r"""(?<=\s)(?:FOR\s+(?:NO\s+KEY\s+UPDATE|UPDATE|KEY\s+SHARE|SHARE)
    (?:\s+OF\s+NAME(?:\.NAME)?(?:,\s*NAME(?:\.NAME)?)*)?(?:\s+NOWAIT|\s+SKIP\s+LOCKED)?
    | LOCK\s+IN\s+SHARE\s+MODE)$""".replace("NAME", r'(?:"\w+"|`\w+`|\w+)'),
    re.IGNORECASE | re.VERBOSE,
)


#: A call: its schema, and its name with what quotes it.
_CALLED = re.compile(
    r"""(?<![\w$])(?:([\w$]+)["`]?\s*\.\s*)?(["`]?[\w$]+["`]?)(?:\s|/\*[^*]*\*/)*\("""
)
_CALLED_PURE = (
    (_PURE | NO_OPERANDS | AFTER_CALLS | TYPES | {"GROUP", "ARRAY"})
    | (INFIX | INFIX_OF_MYSQL | INFIX_OF_POSTGRESQL)
    | {"ESCAPE", "MATERIALIZED"}
    # They tell what the connection knows, and write no row.
    | {"LAST_INSERT_ID", "FOUND_ROWS", "ROW_COUNT", "CONNECTION_ID", "LASTVAL", "CURRVAL"}
    | {"PG_BACKEND_PID", "WSREP_LAST_SEEN_GTID", "WSREP_LAST_WRITTEN_GTID"}
) - {"FIRST", "ROWS", "RANGE", "GROUPS"}


def is_provable_read(sql: Any, *, may_lock: bool = False, dialect: str | None = None) -> bool:
    """Return whether running ``sql`` a second time changes nothing, as far as a text can tell.

    :param may_lock: allow SELECT … FOR UPDATE or FOR SHARE: inside a
        transaction that is started anew, its locks are taken anew.
    :param dialect: "mysql", "mariadb" or "postgresql". None allows the
        functions and keywords of each: for a look, not for a replay.
    """
    if not isinstance(sql, str) or len(sql) > _MOST:
        return False
    sql = _shortened(without_tail(sql))
    if len(sql) > _READ_LENGTH:
        return False
    if may_lock:
        sql = without_lock(sql)
    return _judged(sql, _PROVABLE_HEADS, _FORBIDDEN_IN_READS, dialect)


def without_lock(sql: str) -> str:
    """Return a SELECT without its FOR UPDATE or FOR SHARE, and what comes after that."""
    sql = without_tail(sql)
    end = max(0, len(sql) - _LOCKING_LENGTH)
    return sql[:end] + _LOCKING.sub("", sql[end:])


def is_plain(sql: Any, *, dialect: str | None = None) -> bool:
    """Return whether ``sql`` is one plain SELECT, INSERT, UPDATE, DELETE or REPLACE.

    One that a server either runs as a whole or, by its error, not at all.
    """
    if not isinstance(sql, str) or len(sql) > _MOST:
        return False
    return _judged(_shortened(without_tail(sql)), _PLAIN_HEADS, _FORBIDDEN_IN_PLAIN, dialect)


#: A comment that each server ends at the same place, and that none runs. No
#: placeholder is in it: a value could end it.
_REMARK = re.compile(r"/\*(?!\w{0,3}[!+])(?:[^*/%\\\r\n]|%%|/(?!\*))*\*/")
_REMARK_LENGTH = 2_000


def without_tail(sql: str) -> str:
    """Return a statement without what may come after it: a semicolon, a comment of sqlcommenter's.

    If it is no comment, for a quote or another comment was open, what is left
    is cut in the middle and is no statement to :func:`_split`.
    """
    sql = sql.rstrip(" \t\r\n\f")
    if sql.endswith(";"):
        sql = sql[:-1].rstrip(" \t\r\n\f")
    while sql.endswith("*/"):
        start = sql.rfind("/*", max(0, len(sql) - _REMARK_LENGTH))
        if start < 0 or not _REMARK.fullmatch(sql, start):
            break
        sql = sql[:start].rstrip(" \t\r\n\f")
    return sql


def _shortened(sql: str) -> str:
    sql = _NUMBERS.sub("0", _BLANKS.sub(" ", sql))
    return _ROWS.sub("(%s)", _PLACEHOLDERS.sub("%s", sql))


def _judged(
    sql: str, heads: frozenset[str], forbidden: frozenset[str], dialect: str | None
) -> bool:
    try:
        if "\\" in sql or _SEQUENCES.search(sql) or _scan(sql) & (STATE | SCOPED):
            return False
        tokens = _split(sql, dialect)
        return tokens is not None and _all_allowed(tokens, heads, forbidden, dialect)
    except Exception:
        # Whatever the lexer cannot read is not proven to be anything.
        return False


#: Shape, text in capitals, and whether a space stands before it.
_Token = tuple[str, str, bool]


def _split(sql: str, dialect: str | None) -> list[_Token] | None:
    """Split a statement; None if the servers might split it otherwise."""
    tokens: list[_Token] = []
    code: list[str] = []
    space = False
    last = ""
    for count, (_kind, value) in enumerate(_tokenize(sql)):
        if count > _MOST_TOKENS:
            return None
        if _SPACE.fullmatch(value):
            space = True
            code.append(value)
            continue
        if not space and _is_of_word(last[-1:]) and _is_of_word(value[:1]):
            # A number and a word, which some versions part where others do not.
            return None
        if _QUOTED.fullmatch(value):
            tokens.append((_VALUE, value[0], space))
            value = "''"
        elif _WORDS.fullmatch(value):
            for word in value.upper().split():
                tokens.append((_WORD, word, space))
                space = True
        elif _NUMBER.fullmatch(value) or _PLACEHOLDER.fullmatch(value):
            tokens.append((_VALUE, "0", space))
        elif _SIGN.fullmatch(value):
            tokens.append((_SIGNS, value, space))
        elif _SUBSCRIPT.fullmatch(value):
            tokens.append((_SIGNS, "]", space))
        elif _ZONE.fullmatch(value):
            tokens += [(_WORD, "ZONE", space), (_VALUE, "'", True)]
            value = " ''"
        else:
            return None
        code.append(value)
        last = value
        space = False
    text = "".join(code)
    # To MySQL # begins a comment: one that nothing comes after is no harm.
    if _NEVER.search(text) or ("#" in text and "\n" in sql):
        return None
    if dialect == "postgresql" and not _has_known_operators(text):
        return None
    return tokens


_OPERATOR = re.compile(r"[-+*/<>=~!@#%^&|`?:]+")


def _has_known_operators(text: str) -> bool:
    """Return whether all operators are PostgreSQL's own; others may call anybody's function."""
    for found in _OPERATOR.finditer(_PLACEHOLDER.sub("0", text).replace("%%", "%")):
        operator = found.group()
        while len(operator) > 1 and operator[-1] in "+-" and not KEEPS_SIGN & set(operator):
            # a *-1: PostgreSQL's lexer takes the sign for one of its own.
            operator = operator[:-1]
        if operator not in OPERATORS:
            return False
    return True


def _is_of_word(character: str) -> bool:
    return character.isalnum() or character == "_"


def _all_allowed(
    tokens: list[_Token], heads: frozenset[str], forbidden: frozenset[str], dialect: str | None
) -> bool:
    # Parentheses may stand before a SELECT: (SELECT …) UNION (SELECT …).
    start = next((i for i, token in enumerate(tokens) if token[1] != "("), None)
    if start is None or tokens[start][1] not in heads:
        return False
    into = columns = -1
    if tokens[start][1] in ("INSERT", "REPLACE"):
        into, columns = _column_list(tokens, start)
    elif tokens[start][1] == "WITH":
        columns = _list_of_with(tokens, start)
    elif tokens[start][1] == "EXPLAIN":
        columns = start + 1
    for i in range(start + 1, len(tokens)):
        shape, text, _space = tokens[i]
        if shape is _WORD:
            if (text in forbidden and not _is_harmless(tokens, i)) or (
                text == "INTO" and i != into
            ):
                return False
        elif text == "(":
            if i != columns and not _opens_no_call(tokens, i, dialect):
                return False
            if tokens[i - 1][1] == "CAST" and not _casts_to_known(tokens, i):
                return False
        elif (text == "::" and (i + 1 >= len(tokens) or tokens[i + 1][1] not in CAST_TO)) or (
            (shape is _VALUE and text == "'")
            and dialect == "postgresql"
            and not _is_no_cast(tokens[i - 1])
        ):
            return False
    return True


def _casts_to_known(tokens: list[_Token], opening: int) -> bool:
    """Return whether CAST(… AS type) names a type that is no domain."""
    depth = 0
    for i in range(opening, len(tokens)):
        text = tokens[i][1] if tokens[i][0] is not _VALUE else ""
        depth += (text == "(") - (text == ")")
        if depth == 0:
            return False
        if depth == 1 and text == "AS":
            return i + 1 < len(tokens) and tokens[i + 1][1] in CAST_TO
    return False


def _is_no_cast(before: _Token) -> bool:
    """Return whether a string after this token is no value of a domain, as in ``mail 'x'``."""
    shape, text, _space = before
    return shape is _SIGNS or (shape is _WORD and text in BEFORE_STRINGS)


def _list_of_with(tokens: list[_Token], start: int) -> int:
    """Return where WITH's first name opens its list of columns, if it has one."""
    i = start + 1
    if tokens[i][1] == "RECURSIVE":
        i += 1
    opening = i + 1
    if tokens[opening][1] != "(":
        return -1
    closing = next(j for j in range(opening, len(tokens)) if tokens[j][1] == ")")
    return opening if tokens[closing + 1][1] == "AS" else -1


def _is_harmless(tokens: list[_Token], i: int) -> bool:
    """Return whether a forbidden word is a function of that name, or part of something else."""
    word = tokens[i][1]
    following = tokens[i + 1 : i + 3]
    if word in ("REPLACE", "TRUNCATE"):
        return bool(following) and following[0] == (_SIGNS, "(", False)
    if word == "FETCH":
        # FETCH FIRST 5 ROWS ONLY; without a number, 1.
        return (
            [token[1] for token in following[:1]] == ["FIRST"]
            and len(following) == 2
            and (following[1][1] in ("0", "ROW", "ROWS"))
        )
    return word == "WITH" and [token[1] for token in following] == ["TIME", "ZONE"]


def _column_list(tokens: list[_Token], start: int) -> tuple[int, int]:
    """Return where an INSERT has its INTO, and where its column list opens."""
    into = start + 2 if tokens[start + 1][1] == "IGNORE" else start + 1
    if tokens[into][1] != "INTO":
        return -1, -1
    i = into + 1
    # A name, and after each dot another: database.table, "schema"."table".
    while i + 2 < len(tokens) and tokens[i + 1][1] == ".":
        i += 2
    return into, i + 1


def _opens_no_call(tokens: list[_Token], i: int, dialect: str | None) -> bool:
    """Return whether the parenthesis at ``i`` opens no call of an unknown function."""
    shape, word, _space = tokens[i - 1]
    if shape is _VALUE:
        # "name"( is a call, and so is U&"name" UESCAPE '!'(.
        return False
    if shape is _SIGNS:
        return word not in (")", "]", ".", "::", ":")
    before = tokens[i - 2] if i > 1 else (_SIGNS, "", False)
    if before[1] == ".":
        # A function of somebody's schema, whatever its name.
        return False
    if word in NO_FUNCTIONS or _is_keyword(tokens, i, word, before, dialect):
        return True
    if word in TYPES and before[1] in ("AS", "::", "CHARACTER"):
        return True
    if word in functions_of(dialect) and not tokens[i][2]:
        # With a space between, some of MySQL's are anybody's functions.
        return True
    if word in AFTER_CALLS:
        return before[1] == ")"
    return (word, before[1]) == ("GROUP", "WITHIN")


def _is_keyword(
    tokens: list[_Token], i: int, word: str, before: _Token, dialect: str | None
) -> bool:
    """Return whether a word of one dialect's, or at one place only, is no function here."""
    if word in INFIX:
        return _is_operand(before)
    if word == "CONFLICT":
        joins = any(token[1] == "JOIN" for token in tokens[:i])
        return before[1] == "ON" and not joins and tokens[0][1] == "INSERT"
    if word == "BY" and before[1] in BEFORE_BY:
        return True
    if word == "MATERIALIZED":
        # WITH a AS [NOT] MATERIALIZED (
        return before[1] == "AS" or [token[1] for token in tokens[i - 3 : i - 1]] == ["AS", "NOT"]
    if dialect != "mysql" and dialect != "mariadb":
        if word in OF_POSTGRESQL:
            return True
        if word in INFIX_OF_POSTGRESQL:
            return _is_operand(before)
        if word == "ARRAY" and tokens[i + 1][1] == "SELECT":
            return True
    elif word in ("ANY", "SOME"):
        return before[0] is _SIGNS and before[1] not in ("(", ",", ")")
    elif word == "LATERAL":
        return dialect == "mysql"
    if dialect != "postgresql":
        if word in OF_MYSQL:
            return True
        if word in INFIX_OF_MYSQL:
            return _is_operand(before)
        if word == "VALUE":
            return any(token[1] == "DUPLICATE" for token in tokens[:i])
    return False


def _is_operand(token: _Token) -> bool:
    shape, text, _space = token
    if shape is _SIGNS:
        return text in (")", "]")
    return shape is _VALUE or text not in NO_OPERANDS
