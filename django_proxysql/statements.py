"""What a statement's text says about running it: does it leave state, may it be run again?

Two questions at two prices. :func:`scan` is asked before every statement and
answers from a memo; it may see state where there is none, which costs a
replay, and must not miss any, which would cost a lock. :func:`is_provable_read`
and :func:`is_plain` are asked only after a loss, split the text with sqlparse's
lexer, and answer no whenever they are not sure.

Neither knows the server's dialect or its sql_mode: what they say holds for
MySQL and for PostgreSQL. What a text does not show they cannot see: views,
operators and casts that call functions, and functions of the application's
that are named like pure ones of the server's.
"""

from __future__ import annotations

import re
from typing import Any

from sqlparse import lexer

__all__ = [
    *("CALLS", "IDS", "READ", "RESULT", "SCOPED", "STATE"),
    *("CALL", "GAP", "is_plain", "is_provable_read", "kinds", "makes_ids", "scan", "writes"),
]

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

#: The memo of :func:`scan`, to be asked directly where a call costs too much.
kinds: dict[Any, int] = {}

_MEMO_SIZE = 2_000
#: Longer texts are scanned each time: that costs less than sending them.
_MEMO_LENGTH = 5_000
_LONG = 50_000

#: What may stand before a statement's first word. Comments that the servers
#: end at different places are not passed over: one in another, and those with
#: a bare carriage return.
_HEAD = re.compile(
    r"""(?:\s | \(
    | /\*(?!M?!) (?:(?!/\*).)*? \*/
    | (?:--|\#) [^\r\n]* \r?\n)*
    ([A-Za-z]+)?""",
    re.DOTALL | re.VERBOSE,
)
_COMMENT = re.compile(r"/\*.*?\*/|(?:--|#)[^\n]*\n", re.DOTALL)

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
#: What may stand between two words: spaces and comments, as either server ends them.
GAP = r"(?:\s|/\*(?:[^*]|\*(?!/))*\*/|\*/|(?:--|\#)(?:[^\r\n]*[\r\n]|[^\n]*\n))"
#: … and between a function's name and the parenthesis of its call.
CALL = rf"""["`]?{GAP}*\("""
_STATE = re.compile(
    rf"""(?:get_lock|release_lock|release_all_locks|service_\w+_locks
    # Those of a transaction end with it.
    | pg_(?:try_)?advisory_(?!xact)\w+
    | setseed|dblink\w*|pg_replication_origin_\w+
    | pg_(?:create|copy|drop)_\w*replication_slot | pg_(?:start_backup|backup_start)
    | pg_(?:stop_backup|backup_stop)
    # set_config, set_limit, set_user, and the application's own set_tenant.
    | \b(?:re)?set_\w+){CALL}
    # A temporary table, and not a column of that name.
    | \b(?:create|replace|local|global|drop){GAP}+temp(?:orary)?(?=\s|/|--|\#)
    | \binto{GAP}+temp(?:orary)?{GAP}+(?!values?\b|select\b|set\b|default\b|overriding\b|as\b
      |with\b|partition\b|using\b|from\b)[\w"`]
    | \bpg_temp(?:_\d+)?["`]?{GAP}*\.
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
    r"""\s*LOCK\s+(?:TABLE\s+)?(?!TABLES?\b)[\w".]+(?:\s*,\s*[\w".]+)*\s+IN\s+[A-Z ]+\s+MODE\b
    | \s*SET\s+(?:CONSTRAINTS\b | LOCAL\s+(?:\w+(?:\.\w+)?\s+TO\b | \w+\.\w+\s*=
    | (?:statement_timeout|lock_timeout|idle_in_transaction_session_timeout
    |transaction_timeout|work_mem|search_path|synchronous_commit|row_security|jit)\s*=))""",
    re.IGNORECASE | re.VERBOSE,
)
_CHAIN = re.compile(r"\bchain\b", re.IGNORECASE)
_ANALYZE = re.compile(r"\banaly[sz]e\b", re.IGNORECASE)
#: LAST_INSERT_ID(expression) in a write gives a value, and asks for none.
_IDS = re.compile(
    rf"""last_insert_id{CALL}{GAP}*\) | \blastval{CALL} | \bcurrval{CALL} | \.\s*currval\b
    | wsrep_last_(?:written|seen)\w*{CALL} | \bprevious{GAP}+value\b
    | @@(?:(?:session|local)\s*\.\s*)?`?(?:identity|(?:last_)?insert_id|last_gtid)""",
    re.IGNORECASE | re.VERBOSE,
)
_GIVEN_ID = re.compile(rf"last_insert_id{CALL}", re.IGNORECASE)
_RESULT = re.compile(
    rf"""(?:found_rows|row_count){CALL}
    | @@(?:(?:session|local)\s*\.\s*)?`?(?:warning_count|error_count)""",
    re.IGNORECASE | re.VERBOSE,
)
#: Who am I? Another connection's answer is another, and true.
_SELF = re.compile(
    rf"""(?:connection_id|pg_backend_pid){CALL}
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
    return (
        not isinstance(sql, str) or _head(sql) not in _MAKE_NO_IDS or _NEXT.search(sql) is not None
    )


def _head(text: str) -> str:
    found = _HEAD.match(text)
    return (found.group(1) or "").upper() if found else ""


def _scan(text: str) -> int:
    head = _head(text)
    kind = 0
    lowered = text.lower()
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
    return kind | _scoped(text, lowered, head, kind)


def _scoped(text: str, lowered: str, head: str, kind: int) -> int:
    scoped = 0
    if any(hint in lowered for hint in _SCOPED_HINTS):
        if _IDS.search(text) or (kind & READ and _GIVEN_ID.search(text)):
            scoped |= SCOPED | IDS
        if _RESULT.search(text):
            scoped |= SCOPED | RESULT
        if _SELF.search(text):
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

_PROVABLE_HEADS = frozenset({"SELECT", "SHOW", "DESCRIBE", "DESC", "EXPLAIN"})
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
#: Sequences. In Oracle's sql_mode a column so named is one of MariaDB's.
_SEQUENCES = re.compile(r"nextval|setval", re.IGNORECASE)
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
_LOCKING_LENGTH = 1_000
_LOCKING = re.compile(
    r"""(?<=\s)(?:FOR\s+(?:NO\s+KEY\s+UPDATE|UPDATE|KEY\s+SHARE|SHARE)
    (?:\s+OF\s+NAME(?:\.NAME)?(?:,\s*NAME(?:\.NAME)?)*)?(?:\s+NOWAIT|\s+SKIP\s+LOCKED)?
    | LOCK\s+IN\s+SHARE\s+MODE)$""".replace("NAME", r'(?:"\w+"|`\w+`|\w+)'),
    re.IGNORECASE | re.VERBOSE,
)
#: Words before a parenthesis that name no function in either language.
_NO_FUNCTIONS = frozenset(
    """IN AND OR NOT EXISTS ON WHERE FROM SELECT DISTINCT BY HAVING WHEN THEN ELSE CASE
    UNION ALL ANY SOME EXCEPT INTERSECT BETWEEN AS VALUES USING LIMIT OFFSET INTERVAL SET
    RETURNING DEFAULT LATERAL ROW TO COLLATE EXPLAIN MATCH""".split()
)
#: … if they stand between two operands.
_INFIX = frozenset("LIKE ILIKE REGEXP RLIKE IS DIV MOD XOR ESCAPE JOIN STRAIGHT_JOIN".split())
#: … after a call.
_AFTER_CALLS = frozenset({"OVER", "FILTER", "AGAINST"})
#: … after AS or ::.
_TYPES = frozenset(
    """CHAR CHARACTER VARCHAR VARYING NCHAR BINARY VARBINARY DECIMAL NUMERIC FLOAT DOUBLE REAL
    INT INTEGER BIGINT SMALLINT SIGNED UNSIGNED BIT TEXT DATETIME TIME TIMESTAMP TIMESTAMPTZ
    INTERVAL VECTOR""".split()
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
    SETWEIGHT SIMILARITY WORD_SIMILARITY UNACCENT VERSION INET_ATON INET_NTOA UUID
    GEN_RANDOM_UUID DATABASE CURRENT_DATABASE CURRENT_SCHEMA DATE TIME TIMESTAMP YEAR CHAR
    REPLACE TRUNCATE ANY_VALUE ENCODE DECODE DIGEST BIT_COUNT NUM_NONNULLS JSON_QUOTE
    JSON_MERGE_PATCH JSON_MERGE_PRESERVE JSON_ARRAY_LENGTH JSON_TYPEOF JSONB_AGG_STRICT
    JSONB_OBJECT_AGG JSONB_PATH_EXISTS JSONB_PATH_QUERY JSONB_PATH_QUERY_FIRST ARRAY_TO_STRING
    ARRAY_APPEND ARRAY_REMOVE STRING_TO_ARRAY LOWER_INF UPPER_INF LOWER_INC UPPER_INC ISEMPTY
    RANGE_MERGE TSRANGE TSTZRANGE DATERANGE INT4RANGE INT8RANGE NUMRANGE STRICT_WORD_SIMILARITY
    TRIGRAM_SIMILARITY MAKE_TIMESTAMP MAKE_TIME DATE_BIN JUSTIFY_DAYS JUSTIFY_HOURS TO_SECONDS
    ST_ASBINARY ST_ASEWKB ST_ASTEXT ST_ASEWKT ST_ASGEOJSON ST_ASKML ST_ASSVG ST_ASGML ST_GEOHASH
    ST_GEOMFROMTEXT ST_GEOMFROMWKB ST_GEOMFROMEWKB ST_GEOMFROMEWKT ST_GEOMFROMGEOJSON
    ST_GEOGFROMWKB ST_GEOMETRYFROMTEXT ST_CONTAINS ST_CONTAINSPROPERLY ST_COVEREDBY ST_COVERS
    ST_CROSSES ST_DISJOINT ST_EQUALS ST_INTERSECTS ST_OVERLAPS ST_RELATE ST_TOUCHES ST_WITHIN
    ST_DWITHIN ST_DFULLYWITHIN ST_DISTANCE ST_DISTANCESPHERE ST_DISTANCE_SPHERE
    ST_DISTANCESPHEROID ST_AREA ST_LENGTH ST_LENGTHSPHEROID ST_PERIMETER ST_NPOINTS ST_NUMPOINTS
    ST_NUMGEOMETRIES ST_ISVALID ST_ISEMPTY ST_ISCLOSED ST_SRID ST_TRANSFORM ST_CENTROID
    ST_POINTONSURFACE ST_ENVELOPE ST_BUFFER ST_UNION ST_INTERSECTION ST_DIFFERENCE
    ST_SYMDIFFERENCE ST_EXTENT ST_COLLECT ST_MAKELINE ST_MAKEVALID ST_X ST_Y ST_Z ST_SCALE
    ST_TRANSLATE ST_SNAPTOGRID ST_REVERSE ST_FORCE2D ST_AZIMUTH ST_CLOSESTPOINT
    ST_MAKEENVELOPE ST_MEMSIZE ST_GEOMETRYTYPE MBRCONTAINS MBRCOVEREDBY MBRDISJOINT MBREQUAL
    MBRINTERSECTS MBROVERLAPS MBRTOUCHES MBRWITHIN MBREQUALS MBRCOVERS""".split()
)


#: A call: its schema, and its name with what quotes it.
_CALLED = re.compile(
    r"""(?<![\w$])(?:([\w$]+)["`]?\s*\.\s*)?(["`]?[\w$]+["`]?)(?:\s|/\*[^*]*\*/)*\("""
)
_CALLED_PURE = _PURE | _NO_FUNCTIONS | _INFIX | _AFTER_CALLS | _TYPES | {"GROUP", "ARRAY"}


def is_provable_read(sql: Any, *, may_lock: bool = False) -> bool:
    """Return whether running ``sql`` a second time certainly changes nothing.

    :param may_lock: allow SELECT … FOR UPDATE or FOR SHARE: inside a
        transaction that is started anew, its locks are taken anew.
    """
    if not isinstance(sql, str) or len(sql) > _MOST:
        return False
    sql = _shortened(sql)
    if len(sql) > _READ_LENGTH:
        return False
    if may_lock:
        sql = sql.rstrip()
        end = max(0, len(sql) - _LOCKING_LENGTH)
        sql = sql[:end] + _LOCKING.sub("", sql[end:])
    return _judged(sql, _PROVABLE_HEADS, _FORBIDDEN_IN_READS)


def is_plain(sql: Any) -> bool:
    """Return whether ``sql`` is one plain SELECT, INSERT, UPDATE, DELETE or REPLACE.

    One that a server either runs as a whole or, by its error, not at all.
    """
    if not isinstance(sql, str) or len(sql) > _MOST:
        return False
    return _judged(_shortened(sql), _PLAIN_HEADS, _FORBIDDEN_IN_PLAIN)


def _shortened(sql: str) -> str:
    sql = _NUMBERS.sub("0", _BLANKS.sub(" ", sql))
    return _ROWS.sub("(%s)", _PLACEHOLDERS.sub("%s", sql))


def _judged(sql: str, heads: frozenset[str], forbidden: frozenset[str]) -> bool:
    try:
        if "\\" in sql or _SEQUENCES.search(sql) or _scan(sql) & (STATE | SCOPED):
            return False
        tokens = _split(sql)
        return tokens is not None and _all_allowed(tokens, heads, forbidden)
    except Exception:
        # Whatever the lexer cannot read is not proven to be anything.
        return False


#: Shape, text in capitals, and whether a space stands before it.
_Token = tuple[str, str, bool]


def _split(sql: str) -> list[_Token] | None:
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
            tokens.append((_VALUE, "'", space))
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
    return tokens


def _is_of_word(character: str) -> bool:
    return character.isalnum() or character == "_"


def _all_allowed(tokens: list[_Token], heads: frozenset[str], forbidden: frozenset[str]) -> bool:
    # Parentheses may stand before a SELECT: (SELECT …) UNION (SELECT …).
    start = next((i for i, token in enumerate(tokens) if token[1] != "("), None)
    if start is None or tokens[start][1] not in heads:
        return False
    into = columns = -1
    if tokens[start][1] in ("INSERT", "REPLACE"):
        into, columns = _column_list(tokens, start)
    for i in range(start + 1, len(tokens)):
        shape, text, _space = tokens[i]
        if shape is _WORD:
            if (text in forbidden and not _is_harmless(tokens, i)) or (
                text == "INTO" and i != into
            ):
                return False
        elif text == "(" and i != columns and not _opens_no_call(tokens, i):
            return False
    return True


def _is_harmless(tokens: list[_Token], i: int) -> bool:
    """Return whether a forbidden word is a function of that name, or part of a type's name."""
    word = tokens[i][1]
    following = tokens[i + 1 : i + 3]
    if word in ("REPLACE", "TRUNCATE"):
        return bool(following) and following[0] == (_SIGNS, "(", False)
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


def _opens_no_call(tokens: list[_Token], i: int) -> bool:
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
    if word in _NO_FUNCTIONS:
        return True
    if word in _TYPES and before[1] in ("AS", "::", "CHARACTER"):
        return True
    if word in _PURE and not tokens[i][2]:
        # With a space between, some of MySQL's are anybody's functions.
        return True
    if word in _INFIX:
        return _is_operand(before)
    if word in _AFTER_CALLS:
        return before[1] == ")"
    following = tokens[i + 1][1] if i + 1 < len(tokens) else ""
    return (word, before[1]) in (("GROUP", "WITHIN"), ("CONFLICT", "ON")) or (
        (word == "ARRAY" and following == "SELECT")
        or (word == "VALUE" and any(token[1] == "DUPLICATE" for token in tokens[:i]))
    )


def _is_operand(token: _Token) -> bool:
    shape, text, _space = token
    if shape is _SIGNS:
        return text in (")", "]")
    return shape is _VALUE or text not in _NO_FUNCTIONS
