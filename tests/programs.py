"""Random programs of blocks, savepoints, hooks and retries, with faults, against an oracle.

::

    python -m tests.programs --seconds 600 --seed 1
    python -m tests.programs --on postgres --seed 1 --first 4711 --programs 1

A program is a few operations of one request: writes and reads in autocommit, atomic blocks with
nested blocks, savepoints and hooks, some of them run by ``retrying_atomic`` or as views of requests
under ATOMIC_REQUESTS. Meanwhile connections are cut at random packets: before them, in the middle,
after them, in the answer.

What must hold: **what was acknowledged stands exactly once, what was refused never, what is unknown
at most once**, and a block as a whole. A block's hooks run once, in their order, if it stands and
its outcome is known; else never. A request reads what it wrote. With ``COMMIT_OUTCOME: "record"``
no block's outcome is unknown.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import logging
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Union

import django
from django.db import Error, connections, transaction

from django_proxysql import CommitOutcomeUnknown, NoPeerAvailable, balancers, retrying_atomic
from tests.engine import (
    MYSQL,
    POSTGRESQL,
    added,
    engine,
    make_outcome_table,
    mysql_peer,
    rows_of,
    wait_until_alone,
)
from tests.servers.faultproxy import FaultProxy
from tests.servers.galera import GaleraCluster
from tests.servers.mariadb import Node
from tests.servers.postgresql import PostgreSQLNode

KINDS = ("mariadb", "postgres", "galera")
#: transaction.atomic, retrying_atomic, and requests of two kinds under ATOMIC_REQUESTS.
WAYS = ("atomic", "retrying", "decorator", "middleware")
ALIAS = "programs"
TABLE = "programs_row"


# Programs


class Write(NamedTuple):
    token: str


class Read(NamedTuple):
    """Of what was written before, in the block or the request."""


class Hook(NamedTuple):
    name: str
    robust: bool
    #: "notes", "raises", or "writes" a token of its own name.
    does: str


class Lose(NamedTuple):
    """The connection is lost now: it is idle."""


class Savepoint(NamedTuple):
    """By hand, in a block."""

    ops: tuple[Op, ...]
    rolls_back: bool


class Nested(NamedTuple):
    ops: tuple[Op, ...]
    raises: bool
    #: The code around it goes on after an error, the database's too.
    caught: bool


class Block(NamedTuple):
    ops: tuple[Op, ...]
    raises: bool
    #: What begins it, and may run it again: one of WAYS.
    way: str


Op = Union[Write, Read, Hook, Lose, Savepoint, Nested, Block]


class Fault(NamedTuple):
    """Where a connection is cut: at the nth packet from the program's beginning, or COMMIT."""

    proxy: int
    kind: str
    nth: int
    at_commit: bool
    #: Of the packet, or of its answer, that still pass.
    bytes: int


class Program(NamedTuple):
    ops: tuple[Op, ...]
    faults: tuple[Fault, ...]


class Generator:
    """Draws programs."""

    def __init__(self, seed: str, robust: bool, depth: int = 2) -> None:
        self._random = random.Random(seed)
        #: Tokens of one program are no other's: a node may show them late.
        self._prefix = seed.partition("-")[2]
        self._robust = robust
        self._depth = depth
        self._made = 0

    def program(self) -> Program:
        draw = self._random
        ops = tuple(self._top() for _ in range(draw.randint(1, 5)))
        return Program(ops, tuple(self._fault() for _ in range(draw.choice((0, 1, 1, 1, 2, 3)))))

    def _fault(self) -> Fault:
        draw = self._random
        at_commit = draw.random() < 0.4
        return Fault(
            proxy=draw.randrange(2),
            kind=draw.choice(("before", "within", "after", "reply")),
            nth=draw.choice((1, 1, 2)) if at_commit else draw.randint(1, 16),
            at_commit=at_commit,
            bytes=draw.choice((0, 1, 3, 4, 5, 7, 11, 20, 40, 80)),
        )

    def _name(self) -> str:
        self._made += 1
        return f"{self._prefix}-{self._made}"

    def _top(self) -> Op:
        draw = self._random
        kind = draw.choices(("block", "write", "read", "lose"), (6, 2, 1, 1))[0]
        if kind == "block":
            way = draw.choices(WAYS, (4, 4, 1, 1))[0]
            return Block(self._body(self._depth), draw.random() < 0.1, way)
        return self._simple(kind)

    def _simple(self, kind: str) -> Op:
        return {"write": Write(self._name()), "read": Read(), "lose": Lose()}[kind]

    def _body(self, depth: int) -> tuple[Op, ...]:
        return tuple(self._inner(depth) for _ in range(self._random.randint(0, 4)))

    def _inner(self, depth: int) -> Op:
        draw = self._random
        weights = (5, 3, 3, 1, 2 if depth else 0, 3 if depth else 0)
        kinds = ("write", "read", "hook", "lose", "savepoint", "nested")
        kind = draw.choices(kinds, weights)[0]
        if kind == "hook":
            does = draw.choices(("notes", "raises", "writes"), (6, 1, 2))[0]
            return Hook(self._name(), self._robust and draw.random() < 0.4, does)
        if kind == "savepoint":
            return Savepoint(self._body(depth - 1), draw.random() < 0.5)
        if kind == "nested":
            return Nested(self._body(depth - 1), draw.random() < 0.3, draw.random() < 0.6)
        return self._simple(kind)


# The oracle


class Violation(Exception):
    """Something that must never happen."""


@dataclass
class Ledger:
    """What the application saw."""

    #: Tokens that were acknowledged.
    stands: list[str] = field(default_factory=list)
    #: Tokens of writes in autocommit whose answer was an error.
    may_stand: set[str] = field(default_factory=set)
    #: Tokens of blocks whose outcome is unknown: all of them, or none.
    all_or_none: list[list[str]] = field(default_factory=list)

    def judge(self, rows: Counter[str]) -> None:
        """Compare it with what is in the table.

        :raises Violation: they do not agree.
        """
        known = set(self.stands) | self.may_stand | {t for one in self.all_or_none for t in one}
        for token in self.stands:
            if not rows[token]:
                raise Violation(f"{token} was acknowledged, and is lost")
        for token, count in rows.items():
            if count > 1:
                raise Violation(f"{token} stands {count} times")
            if token not in known:
                raise Violation(f"{token} was refused, and stands")
        for tokens in self.all_or_none:
            if len({rows[token] for token in tokens}) > 1:
                raise Violation(f"of the block of {tokens} a part stands")


class _ApplicationError(Exception):
    """An error of the application's own, in a block."""


class _HookError(Exception):
    """An error of the application's own, in a hook."""


class Run:
    """One program, run through the engine."""

    def __init__(self, world: Any, records: bool) -> None:
        self.world = world
        self.records = records
        self.ledger = Ledger()
        #: Operations, and those that ended by an error.
        self.ops = 0
        self.errors = 0
        # Of the block that is open:
        self._tokens: list[str] = []
        self._hooks: list[tuple[int, Hook]] = []
        self._number = 0
        # … and what its hooks did.
        self._ran: list[tuple[int, Hook]] = []
        self._of_a_hook: BaseException | None = None

    def run(self, program: Program) -> None:
        """Run a program; what it saw is in the ledger.

        :raises Violation: it saw what cannot be.
        """
        for op in program.ops:
            self.ops += 1
            if isinstance(op, Block):
                self._block(op)
            elif isinstance(op, Write):
                self._autocommit_write(op.token)
            else:
                with contextlib.suppress(Error):
                    self._run((op,))

    # In autocommit

    def _autocommit_write(self, token: str) -> None:
        try:
            self.world.write(token)
        except Error:
            self.errors += 1
            self.ledger.may_stand.add(token)
        else:
            self.ledger.stands.append(token)

    # A block

    def _block(self, block: Block) -> None:
        self._ran, self._of_a_hook = [], None

        def body() -> None:
            self._number += 1
            self._tokens, self._hooks = [], []
            self._run(block.ops)
            if block.raises:
                raise _ApplicationError

        outcome = "done"
        try:
            if block.way == "atomic":
                with transaction.atomic(ALIAS):
                    body()
            elif block.way == "retrying":
                retrying_atomic(ALIAS, wait=lambda state: 0)(body)()
            else:
                from tests.program_requests import serve

                serve(body, block.way)
        except _ApplicationError:
            outcome = "refused"
        except CommitOutcomeUnknown as exc:
            outcome = "unknown" if exc is not self._of_a_hook else "done"
            if outcome == "unknown" and self.records:
                raise Violation("a block's outcome is unknown") from exc
        except (Error, _HookError) as exc:
            outcome = "done" if exc is self._of_a_hook else "refused"
        if block.raises and outcome == "done":
            raise Violation("a block that raised ended well")
        self._end(outcome)

    def _end(self, outcome: str) -> None:
        self.errors += outcome != "done"
        if outcome == "done":
            self.ledger.stands += self._tokens
            wanted = self._hooks
            if self._of_a_hook is not None:
                # The hooks after one that raised are not run.
                wanted = wanted[: len(self._ran)]
            if self._ran != wanted:
                raise Violation(f"the hooks {self._ran} ran, and not {wanted}")
            return
        if outcome == "unknown":
            self.ledger.all_or_none.append(self._tokens)
        if self._ran:
            raise Violation(f"of a block that was {outcome} the hooks {self._ran} ran")

    def _run(self, ops: Sequence[Op]) -> None:
        for op in ops:
            if isinstance(op, Write):
                self.world.write(op.token)
                self._tokens.append(op.token)
            elif isinstance(op, Read):
                self._read()
            elif isinstance(op, Hook):
                self._register(op)
            elif isinstance(op, Lose):
                self.world.lose()
            elif isinstance(op, Savepoint):
                self._savepoint(op)
            elif isinstance(op, Nested):
                self._nested(op)

    def _read(self) -> None:
        written = self._tokens if self.world.connection.in_atomic_block else self.ledger.stands
        found = self.world.count(written[-1]) if written else 1
        if found != 1:
            raise Violation(f"{written[-1]} was written, and is read {found} times")

    def _register(self, hook: Hook) -> None:
        number = self._number

        def run() -> None:
            self._ran.append((number, hook))
            try:
                if hook.does == "writes":
                    self._write_of_a_hook(hook.name)
                elif hook.does == "raises":
                    raise _HookError(hook.name)
            except Exception as exc:
                if not hook.robust:
                    self._of_a_hook = exc
                raise

        robust = {"robust": True} if hook.robust else {}
        transaction.on_commit(run, using=ALIAS, **robust)
        self._hooks.append((number, hook))

    def _write_of_a_hook(self, token: str) -> None:
        self.ledger.may_stand.add(token)
        self.world.write(token)
        self.ledger.may_stand.discard(token)
        self.ledger.stands.append(token)

    def _savepoint(self, op: Savepoint) -> None:
        before = len(self._tokens)
        sid = transaction.savepoint(ALIAS)
        self._run(op.ops)
        if op.rolls_back:
            # Django keeps the hooks: it knows the savepoints of nested blocks alone.
            transaction.savepoint_rollback(sid, ALIAS)
            del self._tokens[before:]
        else:
            transaction.savepoint_commit(sid, ALIAS)

    def _nested(self, op: Nested) -> None:
        before = len(self._tokens), len(self._hooks)
        try:
            with transaction.atomic(ALIAS):
                self._run(op.ops)
                if op.raises:
                    raise _ApplicationError
        except (Error, _ApplicationError):
            del self._tokens[before[0] :]
            del self._hooks[before[1] :]
            if not op.caught:
                raise


# What it runs on


class World:
    """A balancer over two fault proxies, and the servers behind them."""

    def __init__(self, servers: Sequence[Any], records: bool) -> None:
        self.servers = servers
        self.records = records
        self.is_galera = type(servers[0]).__name__.startswith("Galera")
        #: How deep savepoints go. With MariaDB 10.11 the other nodes leave the cluster where two,
        #: one in the other, are rolled back to before more is written: in SQL alone, with no fault.
        self.depth = 1 if self.is_galera else 2
        is_postgres = type(servers[0]).__name__.startswith("Postgre")
        self.engine = POSTGRESQL if is_postgres else MYSQL
        #: What is in the packet of COMMIT, and not in READ COMMITTED.
        self._commit = b"; COMMIT" if records else b"\x03COMMIT"
        if is_postgres:
            self._commit = b"COMMIT\x00"
        self._plain = {
            f"plain{n}": {"ENGINE": self.engine, **mysql_peer(server)}
            for n, server in enumerate(servers)
        }

    def __enter__(self) -> World:
        with contextlib.ExitStack() as stack:
            stack.enter_context(added(self._plain))
            self.plain = [connections[alias] for alias in self._plain]
            # To one server by two ways, or to two nodes. One ends connections by FIN, one by RST.
            behind = (self.servers[0], self.servers[-1])
            self.proxies = [
                stack.enter_context(FaultProxy(server, reset=n == 1))
                for n, server in enumerate(behind)
            ]
            self._make_tables()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stack.close()

    def _make_tables(self) -> None:
        number = "serial" if "postgres" in self.engine else "integer AUTO_INCREMENT"
        rows_of(
            self.plain[0],
            f"DROP TABLE IF EXISTS {TABLE}",
            f"CREATE TABLE {TABLE} (id {number} PRIMARY KEY, value varchar(64) NOT NULL)",
        )
        if self.records:
            make_outcome_table(self.plain[0])

    @contextlib.contextmanager
    def balanced(self) -> Iterator[None]:
        """Have a balancer of its own: the budget of replays is a new one."""
        settings = {"COMMIT_OUTCOME": "record"} if self.records else {}
        peers = [mysql_peer(proxy) for proxy in self.proxies]
        with engine(
            peers,
            alias=ALIAS,
            PEER_ENGINE=self.engine,
            ATOMIC_REQUESTS=True,
            CONN_MAX_AGE=None,
            CHECK_INTERVAL=0.05,
            LAST_RESORT_INTERVAL=0.05,
            **settings,
        ) as connection:
            self.connection = connection
            yield

    # What a program does

    def write(self, token: str) -> None:
        rows_of(self.connection, f"INSERT INTO {TABLE} (value) VALUES (%s)", params=[token])

    def count(self, token: str) -> int:
        query = f"SELECT count(*) FROM {TABLE} WHERE value = %s"
        ((count,),) = rows_of(self.connection, query, params=[token])
        return int(count)

    def lose(self) -> None:
        for proxy in self.proxies:
            proxy.drop_connections()

    # Around it

    def begin(self, faults: Sequence[Fault]) -> None:
        """Have an empty table, and the faults armed."""
        rows_of(self.plain[0], f"DELETE FROM {TABLE}")
        try:
            self.connection.ensure_connection()
        except NoPeerAvailable:
            # The last program has opened both circuits. Nothing waits for their trials here.
            for peer in balancers[ALIAS].peers.values():
                peer.breaker.close()
            self.connection.ensure_connection()
        for fault in faults:
            proxy = self.proxies[fault.proxy]
            matching = self._commit if fault.at_commit else b""
            some = [fault.bytes] if fault.kind in ("within", "reply") else []
            getattr(proxy, f"cut_{fault.kind}")(*some, matching=matching, nth=fault.nth)

    def end(self) -> None:
        """Leave no fault armed, and no connection."""
        for proxy in self.proxies:
            proxy.disarm()
        self.connection.close()

    def rows(self) -> Counter[str]:
        """What is in the table once the servers have done all that they were sent.

        :raises Violation: two nodes do not agree.
        """
        for proxy in self.proxies:
            proxy.wait_until_idle()
        for plain in self.plain:
            wait_until_alone(plain)
        wait = ["SET SESSION wsrep_sync_wait = 1"] if self.is_galera else []
        found = []
        for plain in self.plain:
            rows = rows_of(plain, *wait, f"SELECT value FROM {TABLE}")
            found.append(Counter(value for (value,) in rows))
            if self.is_galera:
                rows_of(plain, "SET SESSION wsrep_sync_wait = 0")
        if any(rows != found[0] for rows in found):
            raise Violation(f"the nodes have different rows: {found}")
        return found[0]


# Many programs

#: Programs that one balancer is for.
_A_BALANCER = 20


@dataclass
class Tally:
    """What came of many programs."""

    programs: int = 0
    ops: int = 0
    errors: int = 0
    cuts: int = 0

    def __str__(self) -> str:
        return (
            f"{self.programs:,} programs, {self.ops:,} operations, {self.cuts:,} connections cut, "
            f"{self.errors:,} operations ended by an error, 0 violations"
        )


def run_programs(
    world: World,
    seed: int,
    first: int = 0,
    most: int | None = None,
    seconds: float | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Tally:
    """Run programs in a world, until there were so many or for so long.

    :param first: the number of the first program: with the seed it is what the program is made of.
    :raises Violation: with the program, and how it can be run again.
    """
    tally = Tally()
    until = None if seconds is None else time.monotonic() + seconds
    cut_before = sum(proxy.cuts for proxy in world.proxies)
    robust = django.VERSION >= (4, 2)
    numbers = itertools.count(first) if most is None else iter(range(first, first + most))
    while until is None or time.monotonic() < until:
        some = list(itertools.islice(numbers, _A_BALANCER))
        if not some:
            break
        with world.balanced():
            for number in some:
                program = Generator(f"{seed}-{number}", robust, world.depth).program()
                _run_one(world, program, tally, f"--seed {seed} --first {number} --programs 1")
        say(f"{tally.programs:,} programs")
    tally.cuts = sum(proxy.cuts for proxy in world.proxies) - cut_before
    return tally


def _run_one(world: World, program: Program, tally: Tally, again: str) -> None:
    run = Run(world, world.records)
    world.begin(program.faults)
    try:
        try:
            run.run(program)
        finally:
            world.end()
        run.ledger.judge(world.rows())
    except Exception as exc:
        said = exc if isinstance(exc, Violation) else repr(exc)
        how = f"Run it again: python -m tests.programs {again}"
        raise Violation(f"{said}\n{program}\n{how}") from exc
    tally.programs += 1
    tally.ops += run.ops
    tally.errors += run.errors


def main() -> int:
    os.environ["DJANGO_SETTINGS_MODULE"] = "tests.django_settings"
    django.setup()
    for name in ("django_proxysql", "django.db.backends.base", "django.request"):
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    parser = argparse.ArgumentParser(
        prog="python -m tests.programs",
        description="Run random programs with faults on real servers. Starts the servers.",
    )
    parser.add_argument("--on", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--seconds", type=float, help="for how long, in all (default: 60)")
    parser.add_argument("--programs", type=int, help="how many on each, at most")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--first", type=int, default=0, help="the number of the first program")
    parser.add_argument(
        "--outcome", choices=("none", "record"), nargs="+", default=["none", "record"]
    )
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    turns = [(kind, outcome) for kind in options.on for outcome in options.outcome]
    seconds = options.seconds or (60 if options.programs is None else None)
    failed = False
    with contextlib.ExitStack() as stack:
        servers = {kind: _start(kind, stack) for kind in options.on}
        for kind, outcome in turns:
            with World(servers[kind], outcome == "record") as world:
                try:
                    tally = run_programs(
                        world,
                        options.seed,
                        options.first,
                        options.programs,
                        None if seconds is None else seconds / len(turns),
                    )
                    print(f"{kind}, COMMIT_OUTCOME {outcome}: {tally}", flush=True)
                except Violation as exc:
                    failed = True
                    print(f"{kind}, COMMIT_OUTCOME {outcome}: {exc}", file=sys.stderr, flush=True)
    return int(failed)


def _start(kind: str, stack: contextlib.ExitStack) -> list[Any]:
    if kind == "galera":
        return list(stack.enter_context(GaleraCluster()))
    made = (PostgreSQLNode if kind == "postgres" else Node)(f"programs-{kind}")
    return [stack.enter_context(made).set_up()]


if __name__ == "__main__":
    sys.exit(main())
