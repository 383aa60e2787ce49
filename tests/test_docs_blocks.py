"""Every code block of the README and the docs runs, as far as a block can run by itself.

Python is executed, page by page and in order, so that a block may use what an earlier one has
made. What a site has of its own is a stand-in (:func:`site`), what would connect is a fake. All
names are looked up, also those in functions that no block calls. Commands are parsed by their own
parsers. What does not run stands in :data:`NOT_RUN`, with the reason.
"""

from __future__ import annotations

import argparse
import ast
import builtins
import configparser
import contextlib
import importlib.util
import json
import os
import re
import runpy
import shlex
import sys
import textwrap
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from django.core.management import get_commands, load_command_class
from django.core.management.base import CommandError
from django.db.utils import load_backend

from django_proxysql import LoadBalancer
from django_proxysql.conf import keys, reading
from django_proxysql.core.logger import logger
from tests.engine import configured, engine
from tests.fakes import Driver

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.rst", *sorted((ROOT / "docs").rglob("*.rst"))]
SQLITE = "django.db.backends.sqlite3"

pytestmark = pytest.mark.skipif(len(PAGES) == 1, reason="the docs are not here")

#: Blocks that are not run, by their page and first line, with the reason.
NOT_RUN = {
    ("README.rst", "00:59:26 WARNING"): "log lines; test_docs.py compares them with the log",
    ("reference/errors.rst", "No peer of 'default'"): "an error; test_docs.py raises it",
    ("explanation/sizing.rst", "connections of the site"): "arithmetic",
    ("explanation/sizing.rst", "connections of one peer"): "arithmetic",
    ("explanation/exactly-once.rst", "-- MySQL"): "test_outcome.py compares it with what is run",
    ("howto/redis.rst", "ACL SETUSER"): "test_sharing.py has a user with these rights",
    ("howto/galera.rst", "SET GLOBAL wsrep_desync"): "test_outside_django.py does it to a node",
    ("howto/galera.rst", "SELECT COUNT"): "test_outside_django.py asks a node",
    ("howto/proxysql.rst", "PROXYSQL PAUSE"): "ProxySQL's admin interface; HAProxy stands for it",
    ("howto/upgrade.rst", "PROXYSQL PAUSE"): "ProxySQL's admin interface; HAProxy stands for it",
    ("howto/neighbours.rst", '"ENGINE": "psqlextra'): "django-postgres-extra is not installed",
    ("howto/testing.rst", "GRANT ALL"): "test_project.py gives its user these rights",
    ("howto/testing.rst", "ALTER ROLE"): "the user of the tests' servers has this right",
    ("howto/testing.rst", "A test uses 'peer0'"): "an error; test_project.py raises it",
}
#: Programs of others, whose options are not ours to check.
THEIRS = {
    *(
        "apt-get",
        "build",
        "cat",
        "curl",
        "docker",
        "git",
        "exec",
        "export",
        "gunicorn",
        "mariadb",
        "promtool",
        "python3",
        "uvicorn",
        "uwsgi",
    ),
    # A virtual environment's, just made.
    *(".venv/bin/pip", ".venv/bin/python"),
}
#: What an entry has of which a page shows a part.
OF_PAGE = {"howto/postgresql.rst": {"PEER_ENGINE": "django.db.backends.postgresql"}}
#: Packages that may not be installed. Their names are stand-ins then.
OPTIONAL = {"asyncpg", "celery", "health_check", "gevent", "pymysql", "MySQLdb"}


@dataclass(frozen=True)
class Block:
    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def file(self) -> str:
        """The file that its first line names; otherwise empty."""
        found = re.match(r"# ([\w/.]+\.py)\b", self.text)
        return found[1] if found else ""

    @property
    def module(self) -> str:
        """What the site imports it as, if it is a file of the site's; otherwise empty."""
        if not self.file.startswith("shop/"):
            return ""
        return self.file[: -len(".py")].replace("/", ".")

    @property
    def reason(self) -> str | None:
        """Why it is not run."""
        for (page, first), reason in NOT_RUN.items():
            if (self.page, True) == (page, self.text.startswith(first)):
                return reason
        return None


def blocks(page: Path) -> Iterator[Block]:
    """Yield the code blocks of a page: those with a language, and the literal ones."""
    name = page.relative_to(ROOT).as_posix().replace("docs/", "", 1)
    lines = page.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines):
        found = re.fullmatch(r"( *)\.\. code-block:: (\w+)", line)
        is_literal = not found and line.endswith("::") and not line.lstrip().startswith("..")
        if not found and not is_literal:
            continue
        indent = len(line) - len(line.lstrip())
        body = []
        for other in lines[number + 1 :]:
            if other.strip() and len(other) - len(other.lstrip()) <= indent:
                break
            if not re.match(r" +:[\w-]+:", other):
                body.append(other)
        language = found[2] if found else "python"
        yield Block(name, number + 1, language, textwrap.dedent("\n".join(body)).strip() + "\n")


ALL = {page: list(blocks(page)) for page in PAGES}
RUN = {page: [one for one in found if one.reason is None] for page, found in ALL.items()}


def of(*languages: str) -> list[Any]:
    """Return, page by page, the blocks in some languages, as a test's parameters."""
    of_page = (
        [one for one in found if one.language in languages] for found in RUN.values() if found
    )
    return [pytest.param(found, id=found[0].page) for found in of_page if found]


def test_every_block_is_found_and_has_one_way_to_be_run() -> None:
    marked = sum(page.read_text(encoding="utf-8").count(".. code-block::") for page in PAGES)
    found = [one for page in ALL.values() for one in page]
    assert marked <= len(found)
    assert len(found) > 100
    ways = {"python", "console", "shell", "sh", "yaml", "json", "ini", "dockerfile"}
    assert [str(one) for page in RUN.values() for one in page if one.language not in ways] == []


def test_no_reason_is_left_over() -> None:
    used = {one.reason for page in ALL.values() for one in page}
    assert set(NOT_RUN.values()) <= used


def test_a_reason_names_a_test_that_reads_the_page() -> None:
    for (page, _), reason in NOT_RUN.items():
        for name in re.findall(r"test_\w+(?:\.py)?", reason):
            reads = (ROOT / "tests" / name).read_text(encoding="utf-8")
            assert Path(page).name in reads, reason


def test_files_that_a_page_names_exist() -> None:
    name = re.compile(r"``((?:tests|docs)/[\w/.]+|test_\w+\.py)``|[<(]([\w/.-]+\.(?:rst|md))[>)]")
    named = [
        (page.name, found[1] or found[2])
        for page in {*PAGES, *ROOT.glob("*.rst"), *ROOT.glob("*.md")}
        for found in name.finditer(page.read_text(encoding="utf-8"))
    ]
    assert len(named) > 30
    folders = ROOT, ROOT / "tests"
    missing = [one for one in named if not any((folder / one[1]).exists() for folder in folders)]
    assert missing == []


def test_no_module_of_an_example_has_the_name_of_another_pages_package() -> None:
    modules = {one.module for page in ALL.values() for one in page if one.module}
    assert len(modules) > 3
    packages = {name.rpartition(".")[0] for name in modules}
    assert modules & packages == set()


# Python


def site() -> dict[str, Any]:
    """Return stand-ins for what is a site's own. All else a page imports."""
    its_own = (
        *("Account", "Order", "OrderView", "pager", "send_receipt"),
        *("order", "token"),
    )
    return {
        "pay": lambda order, token: None,
        **{name: mock.MagicMock(name=name) for name in its_own},
        "__name__": "docs",
    }


@contextlib.contextmanager
def environment() -> Iterator[None]:
    """Have the URLs that pages read in the environment, and a stand-in for django-environ."""
    urls = {
        "DATABASE_URL": "mysql://shop:secret@db1,db2/shop",
        **{f"DB{number}_URL": f"mysql://shop:secret@db{number}/shop" for number in (1, 2)},
    }
    django_environ: Any = ModuleType("environ")
    django_environ.Env = lambda: SimpleNamespace(
        read_env=lambda file: None, str=os.environ.__getitem__
    )
    with mock.patch.dict(os.environ, urls), pytest.MonkeyPatch.context() as patched:
        # Not by patch.dict(), which would forget what is imported meanwhile.
        patched.setitem(sys.modules, "environ", django_environ)
        yield


@contextlib.contextmanager
def nothing_connects(tmp_path: Path) -> Iterator[None]:
    """Have drivers connect to nothing, and the alias default lead to files."""
    connected = mock.AsyncMock(return_value=mock.AsyncMock())
    with contextlib.ExitStack() as stack:
        stack.enter_context(environment())
        for module in ("MySQLdb", "pymysql"):
            with contextlib.suppress(ImportError):
                driver = import_module(module)
                stack.enter_context(mock.patch.object(driver, "connect", Driver().connect))
        with contextlib.suppress(ImportError):
            connection = import_module("psycopg").AsyncConnection
            stack.enter_context(mock.patch.object(connection, "connect", connected))
        with contextlib.suppress(ImportError):
            client = import_module("prometheus_client")
            stack.enter_context(mock.patch.object(client, "start_http_server"))
        with contextlib.suppress(ImportError):
            # It cannot be undone.
            stack.enter_context(mock.patch.object(import_module("gevent.monkey"), "patch_all"))
        files = [{"NAME": str(tmp_path / "db.sqlite3")}]
        stack.enter_context(engine(files, alias="default", PEER_ENGINE=SQLITE))
        yield


def run(block: Block, names: dict[str, Any]) -> None:
    """Execute a block, or look at the entry or the part of one that it shows."""
    tree = fragment(block.text)
    if tree is not None:
        look_at(block.page, eval(compile(tree, str(block), "eval"), names))
        return
    code = ast.parse(block.text)
    wanted = {name.split(".")[0] for name in imported(code)} & OPTIONAL
    try:
        for name in wanted:
            import_module(name)
    except ImportError:
        # Its names are stand-ins; the rest of the block is looked at all the same.
        for statement in list(code.body):
            if isinstance(statement, (ast.Import, ast.ImportFrom)):
                for alias in statement.names:
                    names.setdefault((alias.asname or alias.name).split(".")[0], mock.MagicMock())
                code.body.remove(statement)
    exec(compile(code, str(block), "exec"), names)
    for databases in [names["DATABASES"]] if "DATABASES = {" in block.text else []:
        look_at(block.page, databases)
    for app in names.get("INSTALLED_APPS", ()):
        if app is not ... and app != "health_check":
            import_module(app)
    for middleware in names.get("MIDDLEWARE", ()):
        if middleware is not ...:
            module, _, name = middleware.rpartition(".")
            assert hasattr(import_module(module), name), middleware
    assert unknown(code, names) == []


def fragment(text: str) -> ast.Expression | None:
    """Return a dict's inside as a dict; None if the block is no such thing."""
    if not text.startswith('"'):
        return None
    return ast.parse("{" + text + "}", mode="eval")


def imported(code: ast.Module) -> Iterator[str]:
    for node in ast.walk(code):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def look_at(page: str, shown: Mapping[str, Any]) -> None:
    """Have our own checks find nothing wrong with entries, or with a part of one."""
    shown = dict(shown)
    if not all(isinstance(entry, dict) and "ENGINE" in entry for entry in shown.values()):
        entry = {"PEERS": [{"HOST": "10.0.0.1"}], **OF_PAGE.get(page, {}), **shown}
        shown = {"default": {"ENGINE": keys.ENGINE, "NAME": "shop", **entry}}
    if len(shown) == 1:
        # The aliases that it names stand elsewhere.
        for name in [one for entry in shown.values() for one in entry.get("PEERS", ())]:
            if isinstance(name, str):
                shown[name] = {"ENGINE": "django.db.backends.mysql", "HOST": name}
    databases = configured(shown)
    for alias, entry in databases.items():
        if keys.is_balancer(entry):
            assert [str(one) for one in reading.problems(alias, entry, databases)] == []
            load_backend(entry["ENGINE"])


def unknown(code: ast.Module, names: Mapping[str, Any]) -> list[str]:
    """Return the names, and the attributes of modules, classes and of ours, that are nowhere."""
    made = {
        node.id
        for node in ast.walk(code)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    }
    made |= {node.arg for node in ast.walk(code) if isinstance(node, ast.arg)}
    made |= {node.name for node in ast.walk(code) if isinstance(node, ast.FunctionDef)}
    wrong = []
    for node in ast.walk(code):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            if not (node.id in names or node.id in made or hasattr(builtins, node.id)):
                wrong.append(node.id)
        elif isinstance(node, ast.Attribute):
            base = node.value
            thing: Any = None
            if isinstance(base, ast.Name) and base.id not in made:
                thing = names.get(base.id)
            elif isinstance(base, ast.Subscript) and getattr(base.value, "id", "") == "balancers":
                thing = LoadBalancer
            if isinstance(thing, (ModuleType, type)) and not hasattr(thing, node.attr):
                wrong.append(ast.unparse(node))
    return wrong


@pytest.mark.parametrize("found", of("python"))
def test_python_runs(found: list[Block], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = site()
    files: dict[str, dict[str, Any]] = {}
    with nothing_connects(tmp_path):
        try:
            for block in found:
                # A file has what its own blocks have made, and no other's.
                own = files.setdefault(block.file, site()) if block.file else names
                run(block, own)
                names.update(own)
                if block.module:
                    module = ModuleType(block.module)
                    vars(module).update(own)
                    monkeypatch.setitem(sys.modules, block.module, module)
        finally:
            collected = names.get("Metrics")
            if collected is not None:
                registry = import_module("prometheus_client").REGISTRY
                for collector in list(registry._collector_to_names):
                    if isinstance(collector, collected):
                        registry.unregister(collector)


# Commands


def commands(block: Block) -> Iterator[list[str]]:
    """Yield a block's commands, split into words."""
    text = block.text.replace("\\\n", " ")
    if block.language == "console":
        text = "\n".join(line[2:] for line in text.splitlines() if line.startswith("$ "))
    # What a command reads from its own lines.
    text = re.sub(r"<<(\w+)\n.*?^\1$", "", text, flags=re.DOTALL | re.MULTILINE)
    for line in text.splitlines():
        words = shlex.split(line, comments=True)
        while words:
            end = next((i for i, word in enumerate(words) if word in ("&&", ";")), len(words))
            command, words = words[:end], words[end + 1 :]
            while command and re.fullmatch(r"[A-Z_]+=.*", command[0]):
                command = command[1:]
            if command[:2] == ["chrt", "-r"]:
                command = command[3:]
            if command:
                yield command


class Parsed(Exception):
    """A command's arguments were understood."""


@contextlib.contextmanager
def only_parsed() -> Iterator[None]:
    """Have whatever parses its arguments end there. What it has set until then is put back."""
    parse = argparse.ArgumentParser.parse_args
    level = logger.level

    def parsed(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise Parsed(parse(self, *args, **kwargs))

    with mock.patch.dict(os.environ), warnings.catch_warnings():
        # The tests have imported some of these programs before.
        warnings.filterwarnings("ignore", message=".*found in sys.modules", category=RuntimeWarning)
        try:
            with mock.patch.object(argparse.ArgumentParser, "parse_args", parsed):
                yield
        finally:
            logger.setLevel(level)


def understood(words: list[str]) -> None:
    """Check one command: it exists, and has these options.

    :raises Exception: it does not.
    """
    program, *rest = words
    if words[:2] == ["python", "manage.py"] or program == "django-admin":
        name, *arguments = words[2:] if program == "python" else rest
        command = load_command_class(get_commands()[name], name)
        command.create_parser("manage.py", name).parse_args(arguments)
    elif words[:3] == ["python", "-m", "pytest"] or (words[:2] == ["bash", "tests/run"]):
        files = [word for word in rest if word.startswith("tests/")]
        assert [name for name in files if not (ROOT / name).exists()] == []
    elif words[:4] == ["python", "-X", "importtime", "-c"]:
        for name in words[4].replace("import ", "").split(", "):
            assert importlib.util.find_spec(name), name
    elif words[:2] == ["python", "-m"] and words[2] not in THEIRS:
        with only_parsed(), mock.patch.object(sys, "argv", [words[2], *words[3:]]):
            with pytest.raises((Parsed, SystemExit)) as ended:
                runpy.run_module(words[2], run_name="__main__", alter_sys=False)
            # 0 after --help.
            assert getattr(ended.value, "code", 0) == 0, words
    elif program == "tox":
        sections = re.findall(
            r"\[testenv:([\w-]+)(?:\{([^}]*)\})?\]", (ROOT / "tox.ini").read_text()
        )
        known = {base + factor for base, factors in sections for factor in factors.split(",")}
        assert rest[:1] == ["-e"]
        assert rest[1] in known
    elif program == "pip":
        extras = re.findall(r"django-proxysql\[(\w+)\]", " ".join(words))
        in_setup = (ROOT / "setup.py").read_text()
        assert [extra for extra in extras if f'"{extra}":' not in in_setup] == []
    else:
        program = words[2] if words[:2] == ["python", "-m"] else program
        assert program in THEIRS or (ROOT / program).exists(), words


@pytest.mark.parametrize("found", of("console", "shell", "sh"))
def test_commands_exist_with_these_options(found: list[Block]) -> None:
    seen = 0
    for block in found:
        for words in commands(block):
            try:
                understood(words)
            except (SystemExit, KeyError, CommandError) as exc:
                raise AssertionError(f"{block}: {shlex.join(words)}: {exc}") from exc
            seen += 1
    assert seen


# What others read


@pytest.mark.parametrize("found", of("yaml", "json", "ini", "dockerfile"))
def test_what_others_read_can_be_parsed(found: list[Block]) -> None:
    for block in found:
        if block.language == "json":
            assert json.loads(block.text)
        elif block.language == "ini":
            parser = configparser.ConfigParser()
            parser.read_string(block.text)
            assert parser.sections()
        elif block.language == "dockerfile":
            (code,) = re.findall(r'python -c "(.*)"', block.text)
            compile(code, str(block), "exec")
        else:
            yaml = pytest.importorskip("yaml")
            assert yaml.safe_load(block.text)
