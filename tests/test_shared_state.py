"""What threads share is never gone through while another may change it: free-threaded Python.

There, and at each line of Python code in any Python, another thread may add to or take from a
container that is being gone through. So shared ones are copied in one step, or replaced as a whole.
"""

from __future__ import annotations

import ast
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import django_proxysql
from django_proxysql import Fault, LoadBalancer
from django_proxysql.backends.pools import Pools
from django_proxysql.core import runtime
from django_proxysql.core.balancer import wait_for_any
from django_proxysql.core.circuit import Lease
from tests.fakes import Driver, peers, raised_by, refused_by_host, running, until

ROOT = Path(django_proxysql.__file__).parent

#: What makes a container that can be changed.
MAKERS = {"dict", "set", "list", "deque", "defaultdict", "OrderedDict", "WeakSet"}
MAKERS |= {"WeakKeyDictionary", "WeakValueDictionary", "Counter"}

#: What goes through its argument in more than one step, by running Python code or by asking an
#: iterator: on free-threaded Python only list(), sorted() and the copy() of a container are one.
GOES_THROUGH = {"tuple", "set", "frozenset", "dict", "any", "all", "sum", "min", "max", "map"}
GOES_THROUGH |= {"zip", "enumerate", "filter", "iter", "reversed"}

#: Of these somebody has looked who else may change them: file, name, and why it holds.
FINE = {
    ("core.search", "_faults"): "one search's own",
    ("conf.reading", "_found"): "one reading's own",
    ("core.budget", "_notes"): "under the lock",
    ("core.holdings", "for_life"): "one session's own",
    ("core.budget", "_barred"): "under the lock",
    ("monitoring.history", "changes"): "under the lock",
    ("backends.pools", "_pools"): "replaced as a whole, never changed",
    ("backends.engines", "_geometries"): "not gone through",
    ("request", "_attributes"): "one request's own",
    ("request", "_contents"): "one request's own",
    ("retry", "_begun"): "one call's own",
}


def modules() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        # The demo is a program with a life of its own.
        if parts[0] != "demo":
            yield name, ast.parse(path.read_text())


def makes_container(node: ast.AST | None) -> bool:
    if isinstance(node, (ast.Dict, ast.List, ast.Set)):
        return True
    if isinstance(node, ast.Call):
        name = node.func.attr if isinstance(node.func, ast.Attribute) else ast.unparse(node.func)
        return name in MAKERS
    return False


def shared_names(tree: ast.Module) -> set[str]:
    """The names of attributes, and of a module's variables, that hold containers."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and makes_container(node.value):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                if isinstance(target, ast.Attribute):
                    found.add(target.attr)
                elif isinstance(target, ast.Name) and node in tree.body:
                    found.add(target.id)
    return found


def gone_through(tree: ast.Module) -> Iterator[ast.expr]:
    """What loops, comprehensions and such calls go through."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.For, ast.comprehension)):
            yield node.iter
        elif isinstance(node, ast.Starred):
            yield node.value
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            if node.func.id in GOES_THROUGH:
                yield from node.args
            elif node.func.id in ("list", "sorted"):
                # list() of a WeakSet, or of what is no view, runs Python code.
                continue


def name_of(expression: ast.expr) -> str:
    """The container's name in ``self._held``, ``_all``, ``self._peers.values()``; or ""."""
    if isinstance(expression, ast.Call) and isinstance(expression.func, ast.Attribute):
        if expression.func.attr not in ("values", "items", "keys"):
            return ""
        expression = expression.func.value
    if isinstance(expression, ast.Attribute):
        return expression.attr
    return expression.id if isinstance(expression, ast.Name) else ""


def test_no_shared_container_is_gone_through() -> None:
    """Every loop over a container that an object or module keeps goes over a copy of it."""
    wrong = []
    for module, tree in modules():
        # Django's dict of aliases is everybody's.
        names = shared_names(tree) | {"databases"}
        for expression in gone_through(tree):
            name = name_of(expression)
            constant = name.isupper() or name.lstrip("_").isupper()
            if name in names and not constant and (module, name) not in FINE:
                wrong.append(f"{module}:{expression.lineno}: {ast.unparse(expression)}")
    assert not wrong, "Take .copy(), or list() of a dict's view: " + "; ".join(wrong)


def test_it_would_be_seen() -> None:
    """The test above sees what it is there for."""
    tree = ast.parse(
        "class A:\n"
        "    def __init__(self):\n        self._pools = {}\n"
        "    def has(self, x):\n        return any(x in y for y in tuple(self._pools.values()))\n"
    )
    assert shared_names(tree) == {"_pools"}
    assert "_pools" in [name_of(expression) for expression in gone_through(tree)]


#: How often each thread does it.
TIMES = 300


def busy(*targets: Callable[[int], object], times: int = TIMES) -> None:
    """Run each in two threads, again and again, all begun at one moment."""
    start = threading.Barrier(2 * len(targets))

    def repeated(target: Callable[[int], object]) -> Callable[[], None]:
        def run() -> None:
            start.wait(60)
            for number in range(times):
                target(number)

        return run

    with running(*[repeated(target) for target in targets for _ in range(2)]):
        pass


@pytest.mark.usefixtures("hurried")
class TestThreads:
    def test_what_a_fork_concerns(self) -> None:
        """They are listed while others are made and end."""
        living: runtime.Living[Any] = runtime.Living()

        class Thing:
            pass

        keep = [Thing() for _ in range(50)]
        for thing in keep:
            living.add(thing)
        busy(lambda n: living.add(Thing()), lambda n: len(living.all()))
        assert {id(thing) for thing in keep} <= {id(thing) for thing in living.all()}

    def test_leases(self) -> None:
        """A trial ends while others begin to wait for it."""
        leases = [Lease(1e9) for _ in range(TIMES)]
        busy(
            lambda n: leases[n].end(),
            lambda n: wait_for_any([leases[n]], 0),
        )

    def test_balancer(self) -> None:
        """Connects, failures, listeners, drains and looks at the peers at once; nothing raises."""
        driver = Driver()
        db = LoadBalancer(peers("db1", "db2", "db3"), driver.connect, check_interval=0.01)
        errors: list[BaseException] = []

        def connect(number: int) -> None:
            error = raised_by(lambda: db.connect().close())
            if isinstance(error, (RuntimeError, IndexError, KeyError, AttributeError)):
                errors.append(error)

        def fail(number: int) -> None:
            driver.down["db1"] = refused_by_host if number % 2 else None
            permit = db.peers["db2"].breaker.acquire()
            if permit is not None:
                permit.failed(refused_by_host(), Fault.UNREACHABLE)

        def listen(number: int) -> None:
            def listener(event: object) -> None:
                pass

            db.add_listener(listener)
            db.remove_listener(listener)

        def look(number: int) -> None:
            db.snapshot()
            repr(db)

        def drain(number: int) -> None:
            db.drain("db3", force=True)
            db.undrain("db3")

        before = len(db.group.listeners.dispatchers)
        busy(connect, fail, listen, look, drain, times=100)
        assert not errors
        assert len(db.group.listeners.dispatchers) == before
        # Where and when what was dropped ends is the interpreter's affair.
        until(
            lambda: driver.made.clear() or not any(one.connections for one in db.peers.values()),
        )


def test_pools_that_are_looked_through_stay_as_they_are() -> None:
    """A thread that looks through the pools goes through a tuple, which never changes."""

    class Closes:
        def close(self) -> None:
            pass

    pools = Pools()
    known = pools.find("db1", {"NAME": 1}, Closes)
    for change in (
        lambda: pools.find("db2", {"NAME": 2}, Closes),
        lambda: pools.find("db1", {"NAME": 3}, Closes),
        lambda: pools.take(lambda one: one is known),
        lambda: pools.retire("db2"),
        pools.close,
    ):
        looked_through = pools._pools
        before = list(looked_through)
        change()
        assert list(looked_through) == before
        assert pools._pools is not looked_through
    assert not pools.has(known)


def test_living_keeps_nothing_alive() -> None:
    """What is listed may end."""
    living: runtime.Living[Any] = runtime.Living()

    class Thing:
        pass

    thing = Thing()
    gone = weakref.ref(thing)
    living.add(thing)
    assert living.all() == [thing]
    del thing
    until(lambda: gone() is None)
    assert living.all() == []
