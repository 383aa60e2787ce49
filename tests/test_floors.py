"""The floors: each file imports from floors below its own, and the core knows no Django.

Read from the files' text, so that an import counts that only runs in some function, or that only a
type checker sees (``if TYPE_CHECKING:``).
"""

from __future__ import annotations

import ast
import re
import runpy
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

import django_proxysql
from tests.children import run_python

PACKAGE = "django_proxysql"
ROOT = Path(django_proxysql.__file__).parent

#: The house: each line a floor, what stands on it, and what that is. A file imports from the
#: floors below its own only; the files of a folder may import one another.
HOUSE = """
18  middleware
17  request
16  __main__ management retry             programs, and what users call
15  apps demo models monitoring signals
14  backends                              the engine
13  inspection
12  registry
11  conf
10  errors templatetags                   what knows Django
-----------------------------------------------------------------------------------------------
 9  core.aio core.balancer                AsyncLoadBalancer, LoadBalancer
 8  core.face core.sqlalchemy_engine core.tasks
 7  core.search core.sharing core.trials  what works on a group
 6  core.group                            what is known of the peers
 5  core.affinity core.rebalance core.strategies
 4  core.peer
 3  core.breaker core.logs
 2  core.budget core.comparison core.dispatch core.holdings core.permits core.ready core.reports
 2  core.outcome core.texts core.url
 1  core.circuit core.config core.drivers core.events core.runtime core.statements
 0  core core.dialects core.exceptions core.faults core.logger core.parameters
 0  core.sockets
                                          what imports nothing of ours
"""
FLOORS = {
    name: int(line[:2])
    for line in HOUSE.splitlines()
    if line[:2].strip().isdigit()
    for name in line[2:].partition("   ")[0].split()
}
DJANGO_LINE = 10

#: Nothing imports from its own floor, but for these.
ALLOWED: set[tuple[str, str]] = set()

#: Which files may import a library.
LIBRARIES = {
    "pybreaker": {"core.breaker"},
    "tenacity": {"core.aio", "core.balancer", "core.face", "management", "retry"},
    "redis": {"core.sharing"},
    "sqlalchemy": {"core.aio", "core.balancer", "core.sqlalchemy_engine"},
}


def module_of(path: Path) -> str:
    """Return the file's dotted name in the package: ``drivers.mysql``."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def sources() -> dict[str, str]:
    """The package's files: dotted name to text."""
    return {module_of(path): path.read_text() for path in ROOT.rglob("*.py")}


def file_of(module: str) -> str:
    """Return what has a floor: a file or folder of the package, and of the core."""
    first, _, rest = module.partition(".")
    return f"core.{rest.partition('.')[0]}" if first == "core" and rest else first


def is_package(module: str) -> bool:
    return not module or (ROOT / module.replace(".", "/")).is_dir()


def running(tree: ast.AST) -> Iterator[ast.AST]:
    """Walk over what can run: everything outside ``if TYPE_CHECKING:``."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for other in node.orelse:
                yield other
                yield from running(other)
            continue
        yield node
        yield from running(node)


def imports(module: str, text: str) -> Iterator[str]:
    """Yield the full dotted name of all that the file imports."""
    # The package itself names all of Django's side for type checkers.
    for node in ast.walk(ast.parse(text)) if module else running(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                here = [PACKAGE, *module.split(".")] if module else [PACKAGE]
                up = node.level - 1 if is_package(module) else node.level
                base = ".".join([*here[: len(here) - up], *([base] if base else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def violations(files: Mapping[str, str]) -> list[str]:
    """Return a line for each import that goes up, across, over the line or past its file."""
    found = []
    for module, text in files.items():
        own = file_of(module)
        # The package itself only gathers the names of the core.
        floor = FLOORS[own] if own else DJANGO_LINE
        for name in imports(module, text):
            top, _, rest = name.partition(".")
            if top in LIBRARIES and own not in LIBRARIES[top]:
                found.append(f"{module or PACKAGE} imports {top}")
            elif top == "django" and (not own or floor < DJANGO_LINE):
                found.append(f"{module or PACKAGE} is above the Django line and imports {name}")
            elif top == PACKAGE:
                other = file_of(rest)
                if other in (own, "__version__") or (own, other) in ALLOWED:
                    continue
                if FLOORS.get(other, 0) >= floor:
                    found.append(
                        f"{module or PACKAGE} ({floor}) imports {other}, on no lower floor"
                    )
    return found


def test_every_file_has_its_floor() -> None:
    """A new file is given a floor: at least one above all that it imports."""
    for module, text in sources().items():
        own = file_of(module)
        used = {
            file_of(name.partition(".")[2])
            for name in imports(module, text)
            if name.startswith(f"{PACKAGE}.")
        }
        least = max((FLOORS[other] + 1 for other in used - {own} if other in FLOORS), default=0)
        assert not own or own in FLOORS, f"{module}: give it a floor, of at least {least}"


def test_imports_come_from_floors_below() -> None:
    assert violations(sources()) == []


@pytest.mark.parametrize(
    ("module", "text", "complaint"),
    [
        ("core.faults", "from .breaker import Circuit", "imports core.breaker, on no lower floor"),
        ("core.faults", "from . import breaker", "imports core.breaker, on no lower floor"),
        (
            "core.faults",
            "import django_proxysql.core.breaker",
            "imports core.breaker, on no lower floor",
        ),
        (
            "core.faults",
            "def f():\n    from .exceptions import NotReady",
            "imports core.exceptions",
        ),
        (
            "core.peer",
            "if TYPE_CHECKING:\n    from .balancer import LoadBalancer",
            "imports core.balancer",
        ),
        ("core.drivers.mysql", "from ..events import Event", "imports core.events"),
        ("core.drivers", "from ..breaker import Permit", "imports core.breaker"),
        ("core.balancer", "from django.db import connection", "above the Django line"),
        ("", "from .registry import balancers", "imports registry"),
        ("", "import django", "above the Django line"),
        ("core.balancer", "import pybreaker", "core.balancer imports pybreaker"),
        ("core.breaker", "from tenacity import Retrying", "core.breaker imports tenacity"),
        ("conf", "try:\n    from ..registry import x\nexcept ImportError:\n    pass", "registry"),
    ],
)
def test_is_not_blind(module: str, text: str, complaint: str) -> None:
    (found,) = violations({module: text})
    assert complaint in found


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("core.peer", "if TYPE_CHECKING:\n    from .breaker import PeerBreaker"),
        ("", "if TYPE_CHECKING:\n    from .registry import balancers"),
        ("core.drivers.mysql", "from . import generic\nfrom .generic import ping"),
        ("core.breaker", "import pybreaker\nfrom . import drivers\nfrom .faults import Fault"),
        ("registry", "from django.db import connections\nfrom .conf import x"),
    ],
)
def test_cries_no_wolf(module: str, text: str) -> None:
    assert violations({module: text}) == []


#: Run in a Python that finds no Django.
WITHOUT_DJANGO = """
    import sys

    class NoDjango:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] == "django":
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    sys.meta_path.insert(0, NoDjango())
    try:
        import django
    except ImportError:
        pass
    else:
        raise AssertionError("Django can be imported")
"""


def without_django(program: str, *arguments: str) -> str:
    """Return what ``program`` prints in a process in which ``import django`` fails."""
    script = textwrap.dedent(WITHOUT_DJANGO) + textwrap.dedent(program)
    return run_python(script, *arguments).stdout


def test_core_connects_without_django() -> None:
    modules = [f"{PACKAGE}.{name}" for name, floor in FLOORS.items() if floor < DJANGO_LINE]
    there = [m for m in modules if (ROOT / f"{m.partition('.')[2].replace('.', '/')}.py").exists()]
    assert len(there) > 10
    printed = without_django(
        """
        import importlib
        import sqlite3
        for module in sys.argv[1:]:
            importlib.import_module(module)
        from django_proxysql import (
            Fault, LoadBalancer, NoPeerAvailable, NotReady, Peer, PeerBreaker
        )

        db = LoadBalancer(
            {
                "gone": {"database": "/nowhere/at/all"},
                "here": {"database": ":memory:"},
            },
            connect=sqlite3.connect,
            strategy="round_robin",
        )
        for _ in range(4):
            print(db.connect().execute("SELECT 42").fetchone()[0], end=" ")
        print(db.peers["gone"].breaker.current_state, end=" ")
        assert not [name for name in sys.modules if name.partition(".")[0] == "django"]
        try:
            from django_proxysql import balancers
        except ImportError as exc:
            print(exc.name)
        """,
        *there,
    )
    assert printed == "42 42 42 42 open django\n"


def test_nothing_begins_at_import() -> None:
    printed = without_django(
        """
        import os
        import threading
        # What these open is theirs: ctypes leaves its library open in Python 3.15.
        import pybreaker, sqlparse, tenacity
        before = sorted(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else []
        import django_proxysql
        after = sorted(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else []
        print(threading.active_count(), before == after)
        """
    )
    assert printed == "1 True\n"


@pytest.mark.parametrize("shared", [False, True])
def test_redis_is_imported_where_state_is_shared_alone(shared: bool) -> None:
    """An engine that shares nothing imports neither redis nor what is ours for it.

    pybreaker imports redis for itself, where it is installed.
    """
    program = f"""
        import builtins
        import sys
        asked = set()
        real = builtins.__import__

        def noted(name, globals=None, *rest, **more):
            if name.partition(".")[0] == "redis":
                asked.add((globals or {{}}).get("__name__", "").partition(".")[0])
            return real(name, globals, *rest, **more)

        builtins.__import__ = noted
        import django
        from django.conf import settings
        entry = {{
            "ENGINE": "django_proxysql.backends.proxysql",
            "PEER_ENGINE": "django.db.backends.sqlite3",
            "PEERS": [{{"NAME": ":memory:"}}],
        }}
        if {shared}:
            entry["SHARED_STATE"] = "redis://127.0.0.1:1/0"
        settings.configure(DATABASES={{"default": entry}}, INSTALLED_APPS=["django_proxysql"])
        django.setup()
        from django.core.management import call_command
        from django.db import connection
        call_command("check")
        with connection.cursor() as cursor:
            cursor.execute("SELECT 1")
        print("django_proxysql" in asked, "django_proxysql.core.sharing" in sys.modules)
    """
    printed = run_python(program).stdout
    assert printed.splitlines()[-1] == f"{shared} {shared}"


@pytest.mark.skipif(not (ROOT.parent / "docs").exists(), reason="the docs are not here")
def test_picture_of_the_house_is_drawn_from_the_imports_of_today() -> None:
    """``python docs/house.py`` would draw what is there, and no import goes in a circle."""
    house = runpy.run_path(str(ROOT.parent / "docs" / "house.py"))
    drawn = house["draw"](house["rooms"]())
    assert house["PICTURE"].read_text(encoding="utf-8") == drawn
    with pytest.raises(ValueError, match="a circle among a, b"):
        house["floors"]({"a": {"b"}, "b": {"a"}, "c": set()})


def test_walks_go_through_both_sides_of_the_house() -> None:
    """The command for contributors shows a connect and a lost read."""
    program = "import runpy; runpy.run_module('tests.walks', run_name='__main__')"
    connect, _, lost = run_python(program).stdout.partition("a lost read: ")
    assert "core/search.py" in connect
    assert "may_replay" not in connect
    assert re.search("backends/decisions.py +may_replay", lost)
