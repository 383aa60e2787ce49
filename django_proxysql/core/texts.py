"""What a statement's text is for a replay: a read, a write, a change of the schema, a setting.

Asked only after a loss, or before a COMMIT. The answer is no whenever it is not sure.
It is given a dialect, for a function, an operator or a keyword of one dialect may be
anybody's function in another. The server's sql_mode is not known: the answer holds in
each. What a text does not show it cannot see: views whose functions write,
PostgreSQL's functions that are written like columns (``t.f``), and functions of the
application's that are named like built-in ones. What is taken for a read is therefore
run again in a READ ONLY transaction.
"""

from __future__ import annotations

import enum
import re
from typing import Any

from sqlparse import lexer

from . import dialects
from .statements import MAKES_TEMPORARY, SCOPED, STATE, scan_text, shortened, without_tail

#: sqlparse says nothing of its types.
_tokenize: Any = lexer.tokenize

#: Of a text as it is, and once what repeats itself is left out.
_MOST = 100_000
_READ_LENGTH = 20_000
#: The lexer takes some 10 us for each, while somebody waits.
_MOST_TOKENS = 2_500


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


def text_of(sql: Any, dialect: str | None, params: Any = ()) -> Text:
    """Return what ``sql`` is on servers of ``dialect``; OTHER where that is not certain.

    :param dialect: "mysql", "mariadb" or "postgresql". None allows the functions and keywords of
        each: for a look, not for a replay.
    :param params: None: a % in the text is a % alone.
    """
    if not isinstance(sql, str):
        return Text.OTHER
    if params is None:
        sql = sql.replace("%", "%%")
    text = without_tail(sql)
    if len(sql) <= _MOST:
        short = shortened(text)
        is_read, is_plain = _judged(short, dialect)
        if is_read:
            return Text.READ
        # Inside a transaction that is started anew, its locks are taken anew.
        unlocked = without_lock(short)
        if len(short) <= _READ_LENGTH and unlocked != short and _judged(unlocked, dialect)[0]:
            return Text.LOCKING
        if is_plain:
            return Text.PLAIN
    if len(sql) > _READ_LENGTH or "\\" in sql:
        # Longer texts are values, and no setting.
        return Text.OTHER
    if _SETTING.fullmatch(text):
        return Text.SETTING
    if dialect == "postgresql":
        if _TRANSACTION_LOCK.fullmatch(text) or is_of_transaction(text):
            return Text.OF_TRANSACTION
        if _SCHEMA.match(text) and ";" not in text and not _NO_SCHEMA.search(text):
            return Text.SCHEMA
    return Text.OTHER


def is_of_transaction(sql: Any) -> bool:
    """Return whether ``sql`` sets something until PostgreSQL's transaction ends, and no longer."""
    return isinstance(sql, str) and _TRANSACTION_SETTING.fullmatch(without_tail(sql)) is not None


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
    rf"""SET\s+TRANSACTION\s[a-z\s,]+
    | SET\s+CONSTRAINTS\s[\w\s,".]+
    | SET\s+LOCAL\s+(?!{MAKES_TEMPORARY})
    \w+(?:\.\w+)?\s*(?:=|\bTO\b)\s*(?:'[^'%]*'|\w+|%s)(?:,\s*\w+)*""",
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


_LOCKING_LENGTH = 1_000
_LOCKING = re.compile(
    r"""(?<=\s)(?:FOR\s+(?:NO\s+KEY\s+UPDATE|UPDATE|KEY\s+SHARE|SHARE)
    (?:\s+OF\s+NAME(?:\.NAME)?(?:,\s*NAME(?:\.NAME)?)*)?(?:\s+NOWAIT|\s+SKIP\s+LOCKED)?
    | LOCK\s+IN\s+SHARE\s+MODE)$""".replace("NAME", r'(?:"\w+"|`\w+`|\w+)'),
    re.IGNORECASE | re.VERBOSE,
)


def without_lock(sql: str) -> str:
    """Return a SELECT without its FOR UPDATE or FOR SHARE, and what comes after that."""
    sql = without_tail(sql)
    end = max(0, len(sql) - _LOCKING_LENGTH)
    return sql[:end] + _LOCKING.sub("", sql[end:])


# Its tokens

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
#: Shape, text in capitals, and whether a space stands before it.
_Token = tuple[str, str, bool]

#: What no statement that is run again has outside of quotes: comments,
#: assignments, user variables.
_NEVER = re.compile(r"--|/\*|\*/|:=|(?<!@)@(?!@)[\w']|\#(?![>-])")
#: Sequences: in Oracle's sql_mode a column so named is one of MariaDB's. And
#: tables of MySQL's that are emptied by being read.
_SEQUENCES = re.compile(r"nextval|setval|innodb_cmp\w*_reset", re.IGNORECASE)
#: What asks PostgreSQL whether its transaction is READ ONLY, which a read that is run again is in.
_ASKS_WHETHER_READ_ONLY = re.compile(
    r"transaction_read_only|pg_settings|\bSHOW\s+ALL\b", re.IGNORECASE
)

_READ_HEADS = frozenset({"SELECT", "SHOW", "DESCRIBE", "DESC", "EXPLAIN", "WITH"})
_PLAIN_HEADS = frozenset({"SELECT", "INSERT", "UPDATE", "DELETE", "REPLACE"})
_FORBIDDEN = frozenset(
    """LOCK ANALYZE ANALYSE NEXT PREVIOUS PROCEDURE OUTFILE DUMPFILE MERGE CALL TRUNCATE EXECUTE
    COPY LOAD HANDLER CREATE ALTER DROP RENAME GRANT REVOKE BEGIN COMMIT ROLLBACK SAVEPOINT
    RELEASE USE KILL FLUSH RESET TEMP TEMPORARY""".split()
)
#: Words that make a SELECT more than a read.
_FORBIDDEN_IN_READS = _FORBIDDEN | set(
    "INTO FOR FETCH INSERT UPDATE DELETE REPLACE DO SET WARNINGS ERRORS PROFILE PROFILES".split()
)
_FORBIDDEN_IN_PLAIN = _FORBIDDEN | {"WITH"}


def _judged(text: str, dialect: str | None) -> tuple[bool, bool]:
    """Return whether running a text a second time changes nothing, as far as it can tell; and
    whether it is one plain statement, which a server runs as a whole or, by its error, not at all.
    """
    try:
        if "\\" in text or _SEQUENCES.search(text) or scan_text(text) & (STATE | SCOPED):
            return False, False
        tokens = _split(text, dialect)
        return (
            len(text) <= _READ_LENGTH
            and not (dialect == "postgresql" and _ASKS_WHETHER_READ_ONLY.search(text))
            and _all_allowed(tokens, _READ_HEADS, _FORBIDDEN_IN_READS, dialect)
        ), _all_allowed(tokens, _PLAIN_HEADS, _FORBIDDEN_IN_PLAIN, dialect)
    except Exception:
        # Whatever the lexer cannot read is not proven to be anything.
        return False, False


def _split(sql: str, dialect: str | None) -> list[_Token]:
    """Split a statement; into nothing if the servers might split it otherwise."""
    tokens: list[_Token] = []
    code: list[str] = []
    space = False
    last = ""
    for count, (_kind, value) in enumerate(_tokenize(sql)):
        if count > _MOST_TOKENS:
            return []
        if _SPACE.fullmatch(value):
            space = True
            code.append(value)
            continue
        if not space and _is_of_word(last[-1:]) and _is_of_word(value[:1]):
            # A number and a word, which some versions part where others do not.
            return []
        if not space and value[0] == "." and value != "." and not _SIGN.fullmatch(last or "("):
            # A table's name, and no number: app.2
            return []
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
            return []
        code.append(value)
        last = value
        space = False
    text = "".join(code)
    # To MySQL # begins a comment: one that nothing comes after is no harm.
    if _NEVER.search(text) or ("#" in text and "\n" in sql):
        return []
    return [] if dialect == "postgresql" and not _has_known_operators(text) else tokens


def _is_of_word(character: str) -> bool:
    return character.isalnum() or character == "_"


_OPERATOR = re.compile(r"[-+*/<>=~!@#%^&|`?:]+")


def _has_known_operators(text: str) -> bool:
    """Return whether all operators are PostgreSQL's own; others may call anybody's function."""
    for operator in _OPERATOR.findall(_PLACEHOLDER.sub("0", text).replace("%%", "%")):
        while operator[1:] and operator[-1] in "+-" and not dialects.KEEPS_SIGN & set(operator):
            # a *-1: PostgreSQL's lexer takes the sign for one of its own.
            operator = operator[:-1]
        if operator not in dialects.OPERATORS:
            return False
    return True


def _all_allowed(
    tokens: list[_Token], heads: frozenset[str], forbidden: frozenset[str], dialect: str | None
) -> bool:
    # Parentheses may stand before a SELECT: (SELECT …) UNION (SELECT …).
    start = next((i for i, token in enumerate(tokens) if token[1] != "("), None)
    if start is None or tokens[start][1] not in heads:
        return False
    into, columns = _places(tokens, start)
    for i in range(start + 1, len(tokens)):
        shape, text, _space = tokens[i]
        before = tokens[i - 1]
        if shape is _WORD:
            is_allowed = (text not in forbidden or _is_harmless(tokens, i)) and (
                text != "INTO" or i == into
            )
        elif text == "(":
            is_allowed = (i == columns or _opens_no_call(tokens, i, dialect)) and (
                before[1] != "CAST" or _casts_to_known(tokens, i)
            )
        elif text == "::":
            is_allowed = i + 1 < len(tokens) and tokens[i + 1][1] in dialects.CAST_TO
        else:
            # A string may be a value of a domain, as in ``mail 'x'``.
            is_allowed = (shape, text, dialect) != (_VALUE, "'", "postgresql") or (
                before[0] is _SIGNS or (before[0] is _WORD and before[1] in dialects.BEFORE_STRINGS)
            )
        if not is_allowed:
            return False
    return True


def _places(tokens: list[_Token], start: int) -> tuple[int, int]:
    """Return where INTO may stand, and where a parenthesis opens no call whatever is before it.

    That is a list of columns: INSERT INTO a (b, c), WITH a (b, c) AS. Or of options: EXPLAIN (a).
    """
    head, i = tokens[start][1], start + 1
    if head == "EXPLAIN":
        return -1, i
    if head == "WITH":
        opening = i + 2 if tokens[i][1] == "RECURSIVE" else i + 1
        if tokens[opening][1] != "(":
            return -1, -1
        closing = next(j for j in range(opening, len(tokens)) if tokens[j][1] == ")")
        return -1, opening if tokens[closing + 1][1] == "AS" else -1
    if head not in ("INSERT", "REPLACE"):
        return -1, -1
    into = i + 1 if tokens[i][1] == "IGNORE" else i
    if tokens[into][1] != "INTO":
        return -1, -1
    # A name, and after each dot another: database.table, "schema"."table".
    name = into + 1
    while name + 2 < len(tokens) and tokens[name + 1][1] == ".":
        name += 2
    return into, name + 1


def _casts_to_known(tokens: list[_Token], opening: int) -> bool:
    """Return whether CAST(… AS type) names a type that is no domain."""
    depth = 0
    for i in range(opening, len(tokens)):
        text = tokens[i][1] if tokens[i][0] is not _VALUE else ""
        depth += (text == "(") - (text == ")")
        if depth == 0:
            return False
        if depth == 1 and text == "AS":
            return i + 1 < len(tokens) and tokens[i + 1][1] in dialects.CAST_TO
    return False


def _is_harmless(tokens: list[_Token], i: int) -> bool:
    """Return whether a forbidden word is a function of that name, or part of something else."""
    word = tokens[i][1]
    if word in ("REPLACE", "TRUNCATE"):
        return tokens[i + 1 : i + 2] == [(_SIGNS, "(", False)]
    following = [token[1] for token in tokens[i + 1 : i + 3]]
    if word == "FETCH":
        # FETCH FIRST 5 ROWS ONLY; without a number, 1.
        return following in (["FIRST", "0"], ["FIRST", "ROW"], ["FIRST", "ROWS"])
    return word == "WITH" and following == ["TIME", "ZONE"]


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
    return (
        word in dialects.NO_FUNCTIONS
        or _is_keyword(tokens, i, word, before, dialect)
        or (word in dialects.TYPES and before[1] in ("AS", "::", "CHARACTER"))
        # With a space between, some of MySQL's are anybody's functions.
        or (word in dialects.FUNCTIONS.get(dialect, ()) and not tokens[i][2])
        or (word in dialects.AFTER_CALLS and before[1] == ")")
        or (word, before[1]) == ("GROUP", "WITHIN")
    )


def _is_keyword(
    tokens: list[_Token], i: int, word: str, before: _Token, dialect: str | None
) -> bool:
    """Return whether a word of one dialect's, or at one place only, is no function here."""
    may_be_mysql, may_be_postgresql = dialect != "postgresql", dialect not in ("mysql", "mariadb")
    if (
        word in dialects.INFIX
        or (may_be_mysql and word in dialects.INFIX_OF_MYSQL)
        or (may_be_postgresql and word in dialects.INFIX_OF_POSTGRESQL)
    ):
        # Between two operands it is an operator.
        shape, text, _space = before
        if shape is _SIGNS:
            return text in (")", "]")
        return shape is _VALUE or text not in dialects.NO_OPERANDS
    if word == "CONFLICT":
        joins = any(token[1] == "JOIN" for token in tokens[:i])
        return before[1] == "ON" and not joins and tokens[0][1] == "INSERT"
    if word == "MATERIALIZED":
        # WITH a AS [NOT] MATERIALIZED (
        return before[1] == "AS" or [token[1] for token in tokens[i - 3 : i - 1]] == ["AS", "NOT"]
    if word == "BY" and before[1] in dialects.BEFORE_BY:
        return True
    if may_be_postgresql:
        if word in dialects.OF_POSTGRESQL or (word == "ARRAY" and tokens[i + 1][1] == "SELECT"):
            return True
    elif word in ("ANY", "SOME"):
        return before[0] is _SIGNS and before[1] not in ("(", ",", ")")
    elif word == "LATERAL":
        return dialect == "mysql"
    if may_be_mysql and word == "VALUE":
        return any(token[1] == "DUPLICATE" for token in tokens[:i])
    return may_be_mysql and word in dialects.OF_MYSQL
