"""What a statement's text says about running it: does it leave state, may it be run again?

Two questions at two prices. :func:`scan` is asked before every statement and
answers from a memo; it may see state where there is none, which costs a
replay, and must not miss any, which would cost a lock. :func:`is_provable_read`
and :func:`is_plain` are asked only after a loss, split the text with sqlparse's
lexer, and answer no whenever they are not sure.
"""

from __future__ import annotations

import re
from typing import Any

from sqlparse import lexer
from sqlparse import tokens as T

__all__ = ["READ", "SCOPED", "STATE", "is_plain", "is_provable_read", "kinds", "scan"]

#: Looks like a read. Only decides whether the socket is looked at first.
READ = 1
#: Leaves something in the session: the connection is sticky from here on.
STATE = 2
#: Asks for a result that lives in the connection, such as LAST_INSERT_ID().
SCOPED = 4

#: The memo of :func:`scan`, to be asked directly where a call costs too much.
kinds: dict[Any, int] = {}

_MEMO_SIZE = 2_000
_MEMO_LENGTH = 20_000

#: What may stand before a statement's first word.
_HEAD = re.compile(r"(?:\s|\(|/\*(?!M?!).*?\*/|--[^\n]*\n|#[^\n]*\n)*([A-Za-z]+)?", re.DOTALL)

_READ_HEADS = frozenset({"SELECT", "SHOW", "DESCRIBE", "DESC", "EXPLAIN", "VALUES", "TABLE"})
#: Statements that leave no state by their kind. Whatever else a statement may
#: start with is taken to leave some: BEGIN, SET, USE, CALL, LOCK, LISTEN, …
_STATELESS_HEADS = _READ_HEADS | {
    *("INSERT", "UPDATE", "DELETE", "REPLACE", "MERGE", "WITH", "TRUNCATE"),
    *("CREATE", "ALTER", "DROP", "RENAME", "COMMENT", "GRANT", "REVOKE", "REINDEX"),
    *("ANALYZE", "OPTIMIZE", "CHECK", "REPAIR", "VACUUM", "REFRESH", "NOTIFY", "KILL"),
    # Of a transaction, and gone with it. BEGIN and START are not here.
    *("SAVEPOINT", "RELEASE", "ROLLBACK", "COMMIT"),
}
_STATE = re.compile(
    r"""get_lock|release_lock|release_all_locks|pg_(?:try_)?advisory|set_config|setseed|dblink
    | \btemp(?:orary)?\b | \bwith\s+hold\b | \block\s+tables?\b | \bhandler\b
    # A user variable, not a system one and not PostgreSQL's @>.
    | (?<!@)@(?!@)[\w`'"$.] | :=
    # MySQL runs what stands in these comments.
    | /\*M?!
    # More than one statement: results may be left over.
    | ;\s*\S""",
    re.IGNORECASE | re.VERBOSE,
)
#: SETs that end with the transaction.
_LOCAL_SET = re.compile(r"\s*SET\s+(?:LOCAL|CONSTRAINTS)\b", re.IGNORECASE)
_SCOPED = re.compile(
    r"""last_insert_id|found_rows|row_count\s*\(|\blastval\b|\bcurrval\b|connection_id
    | pg_backend_pid | \bshow\s+(?:count|warnings|errors|profiles?|local|session)\b
    | @@(?:identity|insert_id|warning_count|error_count|pseudo_thread_id|rand_seed)""",
    re.IGNORECASE | re.VERBOSE,
)


def scan(sql: Any) -> int:
    """Return the flags READ, STATE and SCOPED of a statement, from the memo if it is there."""
    try:
        kind = kinds.get(sql)
    except TypeError:
        # Not hashable: a composed object of psycopg's, say.
        kind = None
    if kind is not None:
        return kind
    if isinstance(sql, bytes):
        sql = sql.decode("latin-1")
    if not isinstance(sql, str):
        return STATE
    kind = _scan(sql)
    if len(sql) <= _MEMO_LENGTH:
        if len(kinds) >= _MEMO_SIZE:
            # Text with values in it fills any memo. Starting again costs what
            # the first scan of each statement cost.
            kinds.clear()
        kinds[sql] = kind
    return kind


def _scan(sql: str) -> int:
    # Of a statement of megabytes the ends are looked at: the middle is values.
    text = sql if len(sql) <= _MEMO_LENGTH else f"{sql[:_MEMO_LENGTH]} {sql[-1_000:]}"
    found = _HEAD.match(text)
    head = (found.group(1) or "").upper() if found else ""
    kind = 0
    if head in _READ_HEADS:
        kind |= READ
    if (head not in _STATELESS_HEADS and not _LOCAL_SET.match(text)) or _STATE.search(text):
        kind |= STATE
    if _SCOPED.search(text):
        kind |= SCOPED
    return kind


# After a loss

#: sqlparse says nothing of its types.
_tokenize: Any = lexer.tokenize

_READ_LENGTH = 20_000
_PLAIN_LENGTH = 100_000

_PROVABLE_HEADS = frozenset({"SELECT", "SHOW", "DESCRIBE", "DESC", "EXPLAIN"})
_PLAIN_HEADS = frozenset({"SELECT", "INSERT", "UPDATE", "DELETE", "REPLACE"})

#: Substrings that no statement that is run again has in it: what the lexer and
#: a server may read differently (comments, escapes), and what assigns.
_NEVER = ("\\", "--", "/*", "*/", "#", ";", ":=", "$", "\0")
_USER_VARIABLE = re.compile(r"(?<!@)@(?!@)[\w`'\"$.]")
#: Words that make a SELECT more than a read.
_FORBIDDEN_IN_READS = frozenset(
    """INTO LOCK FOR ANALYZE ANALYSE NEXT PREVIOUS WITH PROCEDURE OUTFILE DUMPFILE
    INSERT UPDATE DELETE REPLACE MERGE CALL DO SET TRUNCATE EXECUTE COPY LOAD HANDLER
    CREATE ALTER DROP RENAME GRANT REVOKE BEGIN COMMIT ROLLBACK SAVEPOINT RELEASE USE KILL
    FLUSH RESET TEMP TEMPORARY WARNINGS ERRORS PROFILE PROFILES""".split()
)
_FORBIDDEN_IN_PLAIN = frozenset(
    """LOCK ANALYZE ANALYSE NEXT PREVIOUS WITH PROCEDURE OUTFILE DUMPFILE MERGE CALL
    TRUNCATE EXECUTE COPY LOAD HANDLER CREATE ALTER DROP RENAME GRANT REVOKE BEGIN COMMIT
    ROLLBACK SAVEPOINT RELEASE USE KILL FLUSH RESET TEMP TEMPORARY""".split()
)
_LOCKING = re.compile(
    r"\s+(?:FOR\s+(?:NO\s+KEY\s+UPDATE|UPDATE|KEY\s+SHARE|SHARE)"
    r"(?:\s+OF\s+[\w\"`.,\s]+?)?(?:\s+NOWAIT|\s+SKIP\s+LOCKED)?|LOCK\s+IN\s+SHARE\s+MODE)\s*$",
    re.IGNORECASE,
)
#: Words before a parenthesis that are no function.
_NO_FUNCTIONS = frozenset(
    """IN AND OR NOT EXISTS ON WHERE FROM JOIN SELECT DISTINCT BY HAVING WHEN THEN ELSE CASE
    UNION ALL ANY SOME EXCEPT INTERSECT BETWEEN LIKE ILIKE IS AS VALUES VALUE USING OVER
    FILTER WITHIN GROUP PARTITION LIMIT OFFSET INTERVAL SET RETURNING DEFAULT KEY CONFLICT
    LATERAL ROW ARRAY DIV XOR REGEXP RLIKE SIMILAR TO ESCAPE COLLATE EXPLAIN STRAIGHT_JOIN
    DATE TIME TIMESTAMP YEAR CHAR CHARACTER VARCHAR NCHAR BINARY VARBINARY DECIMAL NUMERIC
    FLOAT DOUBLE REAL INT INTEGER BIGINT SMALLINT SIGNED UNSIGNED BIT TEXT""".split()
)
#: Functions that change nothing and hang on nothing in the session.
_PURE = frozenset(
    """COUNT SUM AVG MIN MAX STD STDDEV STDDEV_POP STDDEV_SAMP VARIANCE VAR_POP VAR_SAMP
    BIT_AND BIT_OR BIT_XOR BOOL_AND BOOL_OR EVERY CORR COVAR_POP COVAR_SAMP REGR_SLOPE
    GROUP_CONCAT STRING_AGG ARRAY_AGG JSON_AGG JSONB_AGG JSON_ARRAYAGG JSON_OBJECTAGG
    ROW_NUMBER RANK DENSE_RANK PERCENT_RANK CUME_DIST NTILE LAG LEAD FIRST_VALUE LAST_VALUE
    NTH_VALUE COALESCE IFNULL NULLIF ISNULL IF NVL GREATEST LEAST CAST CONVERT TRY_CAST
    LOWER UPPER LCASE UCASE INITCAP LENGTH CHAR_LENGTH CHARACTER_LENGTH OCTET_LENGTH BIT_LENGTH
    CONCAT CONCAT_WS SUBSTRING SUBSTR MID TRIM LTRIM RTRIM BTRIM LPAD RPAD LEFT RIGHT REPEAT
    REVERSE SPACE STRPOS POSITION LOCATE INSTR TRANSLATE ASCII ORD CHR HEX UNHEX TO_HEX MD5 SHA
    SHA1 SHA2 SHA224 SHA256 SHA384 SHA512 CRC32 FIELD ELT FIND_IN_SET FORMAT STRCMP QUOTE
    SOUNDEX SPLIT_PART REGEXP_SUBSTR REGEXP_INSTR REGEXP_LIKE REGEXP_MATCHES REGEXP_REPLACE
    ABS CEIL CEILING FLOOR ROUND TRUNC MOD POW POWER SQRT CBRT EXP LN LOG LOG2 LOG10 SIGN PI
    RAND RANDOM SIN COS TAN COT ASIN ACOS ATAN ATAN2 DEGREES RADIANS
    NOW CURRENT_TIMESTAMP CURRENT_DATE CURRENT_TIME LOCALTIME LOCALTIMESTAMP UTC_DATE UTC_TIME
    UTC_TIMESTAMP CURDATE CURTIME STATEMENT_TIMESTAMP CLOCK_TIMESTAMP TRANSACTION_TIMESTAMP
    DATE_FORMAT TIME_FORMAT STR_TO_DATE TO_CHAR TO_DATE TO_NUMBER TO_TIMESTAMP DATE_TRUNC
    DATE_PART EXTRACT DATE_ADD DATE_SUB ADDDATE SUBDATE ADDTIME SUBTIME DATEDIFF TIMEDIFF
    TIMESTAMPDIFF TIMESTAMPADD AGE LAST_DAY MAKEDATE MAKETIME MAKE_DATE MAKE_INTERVAL
    MONTH DAY DAYOFMONTH DAYOFWEEK DAYOFYEAR WEEK WEEKDAY WEEKOFYEAR YEARWEEK QUARTER HOUR
    MINUTE SECOND MICROSECOND DAYNAME MONTHNAME UNIX_TIMESTAMP FROM_UNIXTIME FROM_DAYS TO_DAYS
    SEC_TO_TIME TIME_TO_SEC CONVERT_TZ TIMEZONE
    JSON_EXTRACT JSON_UNQUOTE JSON_CONTAINS JSON_CONTAINS_PATH JSON_VALUE JSON_QUERY JSON_VALID
    JSON_TYPE JSON_LENGTH JSON_KEYS JSON_OBJECT JSON_ARRAY JSON_OVERLAPS JSON_SEARCH
    JSONB_BUILD_OBJECT JSONB_BUILD_ARRAY JSONB_EXTRACT_PATH JSONB_EXTRACT_PATH_TEXT
    JSONB_ARRAY_LENGTH JSONB_TYPEOF JSONB_ARRAY_ELEMENTS TO_JSON TO_JSONB ROW_TO_JSON
    ARRAY_LENGTH ARRAY_POSITION CARDINALITY UNNEST GENERATE_SERIES TO_TSVECTOR TO_TSQUERY
    PLAINTO_TSQUERY PHRASETO_TSQUERY WEBSEARCH_TO_TSQUERY TS_RANK TS_RANK_CD TS_HEADLINE
    SETWEIGHT SIMILARITY WORD_SIMILARITY UNACCENT MATCH AGAINST VERSION INET_ATON INET_NTOA UUID
    GEN_RANDOM_UUID DATABASE CURRENT_DATABASE CURRENT_SCHEMA""".split()
)


def is_provable_read(sql: Any, *, may_lock: bool = False) -> bool:
    """Return whether running ``sql`` a second time certainly changes nothing.

    :param may_lock: allow SELECT … FOR UPDATE or FOR SHARE: inside a
        transaction that is started anew, its locks are taken anew.
    """
    if not isinstance(sql, str) or len(sql) > _READ_LENGTH:
        return False
    if may_lock:
        sql = _LOCKING.sub("", sql)
    return _judged(sql, _PROVABLE_HEADS, _FORBIDDEN_IN_READS)


def is_plain(sql: Any) -> bool:
    """Return whether ``sql`` is one plain SELECT, INSERT, UPDATE, DELETE or REPLACE.

    One that a server either runs as a whole or, by its error, not at all.
    """
    if not isinstance(sql, str) or len(sql) > _PLAIN_LENGTH:
        return False
    return _judged(sql, _PLAIN_HEADS, _FORBIDDEN_IN_PLAIN)


def _judged(sql: str, heads: frozenset[str], forbidden: frozenset[str]) -> bool:
    if any(part in sql for part in _NEVER) or _USER_VARIABLE.search(sql):
        return False
    if _SCOPED.search(sql) or _STATE.search(sql):
        return False
    try:
        tokens = [
            (kind, value)
            for kind, value in _tokenize(sql)
            if kind not in T.Whitespace and kind not in T.Newline
        ]
        return _all_allowed(tokens, heads, forbidden)
    except Exception:
        # Whatever the lexer cannot read is not proven to be anything.
        return False


def _all_allowed(
    tokens: list[tuple[Any, str]], heads: frozenset[str], forbidden: frozenset[str]
) -> bool:
    # Parentheses may stand before a SELECT: (SELECT …) UNION (SELECT …).
    start = next((i for i, (_kind, value) in enumerate(tokens) if value != "("), None)
    if start is None or tokens[start][1].upper() not in heads:
        return False
    head = tokens[start][1].upper()
    columns = _column_list(tokens) if head in ("INSERT", "REPLACE") else None
    for i in range(start + 1, len(tokens)):
        kind, value = tokens[i]
        if kind in T.Error or kind in T.Comment:
            return False
        if kind in T.Literal or kind in T.Name.Placeholder:
            continue
        # "ORDER BY" and the like are one token to the lexer.
        words = value.upper().split()
        if forbidden.intersection(words):
            return False
        if "INTO" in words and (columns is None or i > columns):
            return False
        if value == "(" and i != columns and not _opens_no_call(tokens[i - 1]):
            return False
    return True


def _column_list(tokens: list[tuple[Any, str]]) -> int | None:
    """Return where an INSERT's column list opens, or its table's name ends."""
    words = [value.upper() for _kind, value in tokens]
    if "INTO" not in words:
        return None
    i = words.index("INTO") + 1
    # A name, and after each dot another: database.table, "schema"."table".
    while i + 2 < len(words) and words[i + 1] == ".":
        i += 2
    return i + 1


def _opens_no_call(before: tuple[Any, str]) -> bool:
    """Return whether a parenthesis after this token is no call of an unknown function."""
    kind, value = before
    word = value.upper().split()[-1] if value.split() else ""
    if word in _NO_FUNCTIONS or word in _PURE:
        return True
    if kind in T.Name or kind in T.Keyword or kind in T.Literal.String.Symbol:
        return False
    return not (word and (word[-1].isalnum() or word[-1] in '_"`]'))
