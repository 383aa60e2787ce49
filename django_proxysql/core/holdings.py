"""What a session holds that another would not have, and for how long.

Three lives, and one record of all that one session holds:

* *for the transaction*: ``SET LOCAL``, ``pg_advisory_xact_lock()``. It ends with the
  transaction, which is lost as a whole or not at all. It is not noted here.
* *for the request or task*: ``SET``, user variables, temporary tables, ``PREPARE``.
  ``close_old_connections()`` ends it.
* *for the connection's life*, until it is given back: locks, ``LISTEN``, a transaction
  that was begun by SQL. ``close_old_connections()`` does not end it.

The texts are read, for no server can be asked without a round trip. Something that
is noted and not held costs an error at the connection's loss. So a text that can be
read in two ways takes, and does not give back.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from .statements import (
    CALL,
    STATE,
    head_of,
    readings,
    scan_text,
    start_of,
    text_in,
    without_tail,
)


class Holdings:
    """What one session holds. Belongs to one thread at a time."""

    __slots__ = ("at_commit", "before", "by_django", "earlier", "for_life", "for_request")

    def __init__(self) -> None:
        #: ``SET``, a temporary table and the like.
        self.for_request = False
        #: Locks and the like, by name: how often each was taken and not given back.
        self.for_life: dict[str, int] = {}
        #: Of those, what was given back in the open transaction: a rollback takes it again.
        self.at_commit: list[str] = []
        #: Django's own ``foreign_key_checks=0`` is in force.
        self.by_django = False
        #: Something was held when the last statement that takes something was sent.
        self.before = True
        #: An earlier request left something that may still be there.
        self.earlier = False

    def __bool__(self) -> bool:
        """Whether a new connection in its place would lack something."""
        return self.for_request or self.by_django or bool(self.for_life)

    @property
    def transaction(self) -> bool:
        """Whether a transaction may be open that SQL has begun."""
        return "transaction" in self.for_life or "autocommit" in self.for_life

    def note_before(self) -> None:
        """Note whether something is held, before a statement that takes something is sent."""
        self.before = bool(self)

    def sent(self, sql: Any, params: Any) -> None:
        """Note what a statement takes. Call it before the statement is sent."""
        if text_in(sql) is None:
            self.for_life["what a statement took that cannot be read"] = 1
        taken, given = _sorted(changes(sql, params))
        for name in taken:
            # Of locks alone it matters how often: the servers count them, too.
            before = self.for_life.get(name, 0) if name.startswith("lock ") else 0
            self.for_life[name] = before + 1
            if name.startswith("listen "):
                self.at_commit.clear()
        if not (taken or given) or leaves_more(sql):
            self.takes_unknown()

    def answered(self, sql: Any, params: Any, in_transaction: bool = False) -> None:
        """Note what a statement has given back, once it has succeeded.

        :param in_transaction: a transaction of Django's is open, of which ``UNLISTEN`` is a part.
        """
        head = head_of(sql.decode("latin-1") if isinstance(sql, bytes) else str(sql))
        if head in ("ROLLBACK", "ABORT"):
            # Also one to a savepoint.
            self.at_commit.clear()
        for name in _sorted(changes(sql, params))[1]:
            if name == "transaction":
                self.transaction_ended(stands=head in ("COMMIT", "END"))
            elif name.startswith("listen ") and (in_transaction or "transaction" in self.for_life):
                self.at_commit.append(name)
            else:
                self._give_back(name)

    def transaction_ended(self, stands: bool) -> None:
        """Note that COMMIT or ROLLBACK was answered."""
        self.for_life.pop("transaction", None)
        given, self.at_commit = self.at_commit, []
        for name in given if stands else ():
            self._give_back(name)

    def refused(self, sql: Any, params: Any) -> None:
        """Note that a lock that was asked for was not granted."""
        for name in _sorted(changes(sql, params))[0]:
            self._give_back(name)

    def _give_back(self, name: str) -> None:
        if name.endswith("*"):
            for held in [one for one in self.for_life if one.startswith(name[:-1])]:
                del self.for_life[held]
            return
        left = self.for_life.pop(name, 0) - 1
        if left > 0:
            self.for_life[name] = left

    def end_request(self) -> None:
        self.earlier = self.earlier or bool(self)
        self.for_request = False

    def takes_unknown(self) -> None:
        """Note that something may have been taken by what was not seen."""
        self.for_request = True

    def switch_checks(self, off: bool) -> None:
        """Note that Django has switched foreign keys off (``foreign_key_checks=0``) or on."""
        self.by_django = off

    def all(self) -> dict[str, int]:
        """Return what is held now, and how often it was taken."""
        return {**self.for_life, "SET": self.for_request, "checks": self.by_django}

    def include(self, held: dict[str, int]) -> bool:
        """Return whether all that :meth:`all` has returned before is held now."""
        now = self.all()
        return all(now.get(name, 0) >= count for name, count in held.items())


def _sorted(found: Iterator[tuple[bool, str]]) -> tuple[list[str], list[str]]:
    pairs = list(found)
    return [name for takes, name in pairs if takes], [name for takes, name in pairs if not takes]


_COMMENT = re.compile(r"/\*(?!M?!)(?:.*?\*/|.*)|(?:--|#)[^\n]*\n", re.DOTALL)
_RUN = re.compile(r"/\*M?!\d*|\*/")
#: In PostgreSQL comments stand in one another. Deeper ones are not read.
_INNERMOST = re.compile(r"/\*(?:(?!/\*|\*/).)*\*/", re.DOTALL)
_DEPTH = 5
_MORE = re.compile(r";\s*(?=\S)")


def _switched(name: str) -> tuple[str, str, str]:
    """Return what takes and gives back a variable that is 1 where nothing is held.

    Whatever else it is set to may be 0: ``%s``, ``DEFAULT``, another variable.
    """
    to_on = rf"{name}`?\s*:?=\s*(?:1|on|true|'1'|'on')\s*"
    # Where it is named once, it is set to 1, read, or set for others.
    harmless = rf"""(?:(?!\b{name}\b).)*(?:\b{to_on}(?:[,;]|$)|=\s*@@(?:\w+\.)?`?{name}\b
        |(?:\bGLOBAL\s+|\bPERSIST(?:_ONLY)?\s+|@@(?:global|persist|persist_only)\.)`?{name}\b)
        (?!.*\b{name}\b)""".replace("\n        ", "")
    takes = rf"SET\b(?!{harmless}).*\b{name}\b"
    rest = rf"(?:,(?!.*\b{name}\b)|;?\s*$)"
    return name, takes, rf"SET\s+(?:SESSION\s+|LOCAL\s+|@@(?:(?:session|local)\.)?)?`?{to_on}{rest}"


def _nested(depth: int) -> str:
    """Return the pattern of one part of a call's arguments, calls within calls among them."""
    return r"[^()']|'[^']*'" + (rf"|\((?:{_nested(depth - 1)})*\)" if depth else "")


#: Whole statements: a name, what takes it, and what gives it back.
_STATEMENTS = [
    (name, re.compile(rf"(?is){takes}"), re.compile(rf"(?is){gives}"))
    for name, takes, gives in (
        (
            "transaction",
            r"(?:BEGIN|START\s+TRANSACTION|XA\s+(?:START|BEGIN))\b"
            r"|(?:COMMIT|END|ABORT|ROLLBACK)\b.*\bAND\s+CHAIN\b",
            r"(?:COMMIT|END|ABORT|ROLLBACK|PREPARE\s+TRANSACTION|XA\s+(?:COMMIT|ROLLBACK))\b"
            r"(?!.*\b(?:TO|PREPARED)\b)",
        ),
        *map(_switched, ("autocommit", "wsrep_on")),
        (
            "tables",
            r"LOCK\s+TABLES\b|LOCK\s+TABLE\b.*\b(?:READ|WRITE)\b"
            r"|FLUSH\b(?=.*\bTABLES?\b).*\b(?:LOCK|EXPORT)\b",
            r"UNLOCK\s+TABLES?\b",
        ),
        ("instance", r"LOCK\s+INSTANCE\b", r"UNLOCK\s+INSTANCE\b"),
        ("backup", r"BACKUP\s+(?:STAGE\s+(?!END\b)|LOCK\b)", r"BACKUP\s+(?:STAGE\s+END|UNLOCK)\b"),
    )
]
_LISTEN = re.compile(r"(UN)?LISTEN\s+(\*|\"(?:[^\"]|\"\")+\"|[\w$]+|%\S+)", re.IGNORECASE)
#: A block of PostgreSQL's. What it takes a call for is read like any other call.
_BLOCK = re.compile(r"\s*DO\b.*\bLISTEN\b", re.IGNORECASE | re.DOTALL)
_DISCARD = re.compile(r"DISCARD\s+ALL\b", re.IGNORECASE)
_NAME = r"""(release_all_locks|pg_advisory_unlock_all
    |get_lock|release_lock|service_\w+_locks
    |pg_(?:try_)?advisory_(?:un)?lock(?:_shared)?
    |pg_(?:create|copy|drop)_\w*replication_slot
    |pg_(?:start_backup|backup_start|stop_backup|backup_stop))"""
_FUNCTION = re.compile(_NAME + CALL, re.IGNORECASE | re.VERBOSE)
#: A statement of nothing but such calls, each of which is run, and once. In a value, under a
#: condition, or for the rows of a table, it may be run or not.
_ONLY_CALLS = re.compile(
    r"(?:DO|CALL|SELECT(?:\s[\w\s.,*]+\sFROM)?)\s+ONE(?:\s*,\s*ONE)*(?:\s+FROM\s+DUAL)?[\s;]*".replace(
        "ONE",
        rf"""(?:pg_catalog\s*\.\s*)?["`]?{_NAME}["`]?\s*\(
        (?:{_nested(3)})*\)
        (?:\s*::\s*\w+)?(?:\s+(?:AS\s+)?[\w"`']+)?""",
    ),
    re.IGNORECASE | re.VERBOSE,
)
#: … in which each call is run once at most: not for the rows of a table, nor in a loop.
_ONE_ROW = re.compile(
    r"(?:SELECT|DO|CALL)\b(?!.*\b(?:FROM(?!\s+DUAL\b)|LOOP|generate_series|unnest)\b)",
    re.IGNORECASE | re.DOTALL,
)
_EACH_ROW = "lock for each row"
#: Each is read to the parenthesis that closes it.
_MOST_CALLS = 50
_PLACEHOLDER = re.compile(r"%(?:\((\w+)\))?s")
#: Arguments that are the same whenever they are written alike: values, and calls over values.
_SAME_AGAIN = re.compile(
    r"""(?:'[^'\\]*'|\d+(?!\w)|[-+]|,|\s|::\s*\w+\b|[A-Za-z_][\w.]*\s*\(|\)|<shared>)*"""
)


#: A statement that asks for one lock, without waiting for ever, and answers whether it is granted.
_ASKS = re.compile(
    r"\s*SELECT\s+(?:get_lock|pg_try_advisory_lock(?:_shared)?)\s*\([^()]*\)\s*(?:AS\s+\S+\s*)?;?\s*",
    re.IGNORECASE,
)


def asks_for_a_lock(sql: Any) -> bool:
    """Return whether a statement's one answer is whether a lock is granted."""
    return isinstance(sql, str) and _ASKS.fullmatch(sql) is not None


def changes(sql: Any, params: Any = None) -> Iterator[tuple[bool, str]]:
    """Yield what a statement takes for the connection's life, and what it gives back.

    :returns: pairs: whether it takes, and the name of what it takes or gives back. A
        name that ends in ``*`` gives back all that begin like it.
    """
    sql = text_in(sql)
    if sql is None:
        return
    found: set[str] = set()
    read = readings(sql)
    for text in read:
        pieces = _MORE.split(_COMMENT.sub(" ", text))
        # Where a semicolon may stand in a value, nothing is sure to be given back.
        is_sure = len(pieces) == len(read) == 1
        here = [
            (takes, name)
            for piece in pieces
            for takes, name in _changes(piece, params)
            if (takes or is_sure) and name not in found
        ]
        found.update(name for _takes, name in here)
        yield from here
    # What looks like a comment may be none: in a value, or an operator of PostgreSQL's. And MySQL
    # runs what stands in some.
    others = [sql] if _COMMENT.search(read[0]) else []
    others += [_RUN.sub(" ", _COMMENT.sub(" ", sql))] if _RUN.search(sql) else []
    bare = _without_comments(read[0])
    # As a server reads it that ends a comment where the first one in it ends: read above.
    others += _MORE.split(bare) if bare != _COMMENT.sub(" ", read[0]) else []
    if _BLOCK.match(bare):
        yield True, "listen in a block"
    for other in others:
        names = [name for takes, name in _changes(other, params) if takes and name not in found]
        # What says FROM may be a comment.
        yield from ((True, name) for name in names if set(names) != {_EACH_ROW})
        found.update(names)


def _without_comments(text: str) -> str:
    """Return a text as PostgreSQL reads it, where comments stand in one another."""
    for _ in range(_DEPTH):
        text = _INNERMOST.sub(" ", text)
    return _COMMENT.sub(" ", text)


def leaves_more(sql: Any) -> bool:
    """Return whether a statement leaves something that :func:`changes` has no name for."""
    text = text_in(sql)
    return text is None or any(
        _leaves_more(piece)
        for reading in readings(without_tail(text))
        for piece in _MORE.split(reading)
    )


def _leaves_more(piece: str) -> bool:
    text = piece[start_of(piece) :]
    if not _COMMENT.search(text):
        if any(takes.match(text) or gives.match(text) for _name, takes, gives in _STATEMENTS):
            # SET autocommit = 0, sql_mode = ''
            return "," in text and head_of(text) == "SET"
        if any(whole.match(text) for whole in (_LISTEN, _DISCARD)) or _ONLY_CALLS.fullmatch(text):
            return False
    return bool(scan_text(_FUNCTION.sub("f(", text)) & STATE)


def _changes(piece: str, params: Any) -> Iterator[tuple[bool, str]]:
    text = piece.lstrip(" \t\r\n\f(")
    for name, takes, gives in _STATEMENTS:
        if takes.match(text):
            yield True, name
        elif gives.match(text):
            yield False, name
    if _DISCARD.match(text):
        yield from ((False, "lock *"), (False, "listen *"))
    listen = _LISTEN.match(text)
    # A parameter may be another channel each time.
    if listen is not None and not (listen.group(1) and "%" in listen.group(2)):
        yield not listen.group(1), f"listen {listen.group(2)}"
    is_run = _ONLY_CALLS.fullmatch(text) is not None
    is_one = is_run or _ONE_ROW.match(text) is not None
    for count, call in enumerate(_FUNCTION.finditer(piece)):
        if count == _MOST_CALLS:
            yield True, "lock of an unknown name"
            return
        for one in _call(call.group(1).lower(), piece, call.end(), params):
            if one[0] or is_run:
                yield one
            if one[0] and not is_one and one[1].startswith("lock "):
                # How often is not known.
                yield True, _EACH_ROW


def _call(function: str, text: str, start: int, params: Any) -> Iterator[tuple[bool, str]]:
    if function in ("release_all_locks", "pg_advisory_unlock_all"):
        yield False, "lock *"
    elif "backup" in function:
        yield "start" in function, "backup"
    else:
        arguments = _arguments(text, start)
        takes = "release" not in function and "unlock" not in function and "drop" not in function
        kind = next((kind for kind in ("slot", "service") if kind in function), "lock")
        if kind != "lock" or "get_lock" in function or "release_lock" in function:
            # The first is its name; a second says how long to wait, or what is made.
            arguments = arguments[:1]
        elif function.endswith("shared"):
            arguments = ["<shared>", *arguments]
        if kind == "service" or "get_lock" in function or "release_lock" in function:
            # In MySQL these quote a value, too.
            arguments = [one.replace('"', "'") for one in arguments]
        name = _written_out(",".join(arguments), text, start, params)
        if name is not None:
            yield takes, f"{kind} {name}"
        elif takes:
            yield True, "lock of an unknown name"


def _arguments(text: str, start: int) -> list[str]:
    """Return the arguments of the call whose parenthesis opens before ``start``."""
    depth, quoted, begun, found = 0, False, start, []
    for i in range(start, len(text)):
        character = text[i]
        if character == "'":
            quoted = not quoted
        elif quoted:
            continue
        elif character == "(":
            depth += 1
        elif character == ")" and depth:
            depth -= 1
        elif character == ")" or (character == "," and not depth):
            found.append(text[begun:i].strip())
            begun = i + 1
            if character == ")":
                break
    return found


def _written_out(arguments: str, text: str, start: int, params: Any) -> str | None:
    """Return arguments with their parameters put in; None if they may differ next time."""
    position = len(_PLACEHOLDER.findall(text[:start]))

    def value(found: re.Match[str]) -> str:
        nonlocal position
        key = found.group(1)
        if key is None:
            key, position = position, position + 1
        return repr(params[key])

    try:
        written = _PLACEHOLDER.sub(value, arguments)
    except Exception:
        return None
    plain = _PLACEHOLDER.sub("0", arguments)
    return written if _SAME_AGAIN.fullmatch(plain) else None
