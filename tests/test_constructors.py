"""A constructor changes nothing but its own object. Read from the package's text."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import django_proxysql

ROOT = Path(django_proxysql.__file__).parent

#: Methods that change what they are called on.
CHANGING = frozenset(
    "add add_listener append appendleft clear connect discard extend insert pop popitem popleft "
    "put register remove setdefault start update".split()
)
#: Functions that take an object and leave it, and all else, as it is; or change that object.
HARMLESS = frozenset({"functools.update_wrapper", "object.__setattr__", "type"})

#: What its constructor does beside making the object, and why.
ALLOWED = {
    # To be found by a fork and by the process's end. Each is a list that keeps nothing alive.
    "Guarded": {"renew_in_child(self)"},
    "PeerGroup": {"renew_in_child(self)"},
    "RoundRobin": {"renew_in_child(self)"},
    "TrialTasks": {"renew_in_child(self)"},
    "Worker": {"_workers.add(self)"},
    "backends.peer.base.DatabaseWrapper": {"remember(self)"},
    # Django's copies of the settings carry the alias: see registry.register().
    "LoadBalancedMixin": {"register(settings_dict, alias)", "remember(self)"},
    # To be counted is what they are made for, and their end undoes it.
    "Checkout": {"_local.end", "peer._checkouts.add(serial)"},
    "_Hooks": {"note_named(self, session)"},
    # As prometheus_client's own collectors do; the argument says where.
    "Metrics": {"_all.add(self)", "registry.register(self)", "source.add_listener(self)"},
    "Telemetry": {"source.add_listener(self)"},
}


def root_of(node: ast.AST) -> str:
    """Return the name at the left end of ``a.b[c].d()``; "" if it is none."""
    while isinstance(node, (ast.Attribute, ast.Subscript, ast.Call)):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else ""


def made_here(function: ast.FunctionDef) -> set[str]:
    """Return the object, and the local names of what the constructor itself makes."""
    makes = (ast.Call, ast.Dict, ast.List, ast.Set, ast.DictComp, ast.ListComp, ast.SetComp)
    return {function.args.args[0].arg, "super"} | {
        target.id
        for node in ast.walk(function)
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and isinstance(node.value, makes)
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Name)
    }


def changes(function: ast.FunctionDef) -> Iterator[str]:
    """Yield what a constructor changes that it has not made, and what it shows its object to."""
    own, me = made_here(function), function.args.args[0].arg
    for node in ast.walk(function):
        if isinstance(node, (ast.Attribute, ast.Subscript)):
            if isinstance(node.ctx, (ast.Store, ast.Del)) and root_of(node) not in own:
                yield ast.unparse(node)
        elif isinstance(node, (ast.Global, ast.Nonlocal)):
            yield ast.unparse(node)
        elif isinstance(node, ast.Call):
            callee = ast.unparse(node.func)
            name = callee.rpartition(".")[2]
            # A class's name: an object that refers to this one.
            is_class = name.strip("_")[:1].isupper()
            shown = me == "self" and any(
                isinstance(argument, ast.Name) and argument.id == me for argument in node.args
            )
            is_constructor = name in ("__init__", "__new__") or callee in HARMLESS or is_class
            called_on = root_of(node.func) if isinstance(node.func, ast.Attribute) else ""
            is_change = bool(called_on) and name in CHANGING and called_on not in own
            if is_change or (shown and not is_constructor) or callee == "register":
                yield ast.unparse(node)


def found(text: str, module: str) -> dict[str, set[str]]:
    """Return what each class's constructor changes beside its own object."""
    result: dict[str, set[str]] = {}
    for cls in ast.walk(ast.parse(text)):
        for function in cls.body if isinstance(cls, ast.ClassDef) else ():
            if isinstance(function, ast.FunctionDef) and function.name in ("__init__", "__new__"):
                changed = set(changes(function))
                if changed and isinstance(cls, ast.ClassDef):
                    name = f"{module}.{cls.name}" if cls.name == "DatabaseWrapper" else cls.name
                    result[name] = changed
    return result


def test_a_constructor_changes_nothing_but_its_own_object() -> None:
    """What one does beside that is listed, with its reason; the list has nothing else."""
    everything: dict[str, set[str]] = {}
    for path in ROOT.rglob("*.py"):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        everything.update(found(path.read_text(encoding="utf-8"), module))
    assert everything == ALLOWED


@pytest.mark.parametrize(
    ("statement", "is_found"),
    [
        ("other.name = 1", True),
        ("other.names[0] = 1", True),
        ("del other.name", True),
        ("other.names.append(1)", True),
        ("known.add(self)", True),
        ("remember(self)", True),
        ("register(other, 'default')", True),
        ("global known", True),
        ("self.name = other.name", False),
        ("self.names[0] = 1", False),
        ("super().__init__(other)", False),
        ("Base(self)", False),
        ("made = set(); made.add(other)", False),
        ("self.names = []; self.names.append(1)", False),
    ],
)
def test_what_a_constructor_changes_elsewhere_is_found(statement: str, is_found: bool) -> None:
    text = f"class Thing:\n    def __init__(self, other):\n        {statement}\n"
    assert set(found(text, "")) == ({"Thing"} if is_found else set())
