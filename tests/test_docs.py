"""What the README and the docs say of settings, log lines and errors is what the code does."""

from __future__ import annotations

import ast
import inspect
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import MySQLdb
import pytest

import django_proxysql
from django_proxysql import LoadBalancer, NoPeerAvailable
from django_proxysql.conf import keys
from django_proxysql.conf.reading import balancer_config
from django_proxysql.core.config import BalancerConfig, BreakerConfig, PeerConfig
from django_proxysql.inspection import Inspection
from django_proxysql.management import look
from tests.fakes import Clock, Driver, OperationalError
from tests.test_docs_blocks import ALL, PAGES, environment

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.rst").read_text(encoding="utf-8")
ERRORS = ROOT / "docs/reference/errors.rst"

needs_docs = pytest.mark.skipif(len(PAGES) == 1, reason="the docs are not here")


def blocks(page: Path, language: str) -> list[str]:
    """Return the code blocks of a page, in one language."""
    return [block.text for block in ALL[page] if block.language == language]


# Settings


def settings_table() -> dict[str, str]:
    """Return the settings and their defaults, as the reference has them."""
    page = ROOT / "docs" / "reference" / "settings.rst"
    section = page.read_text(encoding="utf-8").partition("\nPeers\n=====")[0]
    lines = section.splitlines()
    first, second, _ = (
        len(rule) + 1 for rule in next(x for x in lines if x[:2] == "==" and " " in x).split()
    )
    rows = {line[:first].strip(): line[first : first + second].strip() for line in lines}
    return {
        name.strip("`"): default.strip("`")
        for name, default in rows.items()
        if name.startswith("``")
    }


def test_settings_table_names_every_setting_and_no_other() -> None:
    assert set(settings_table()) == {*keys.BALANCER_KEYS, *keys.PEER_KEYS}


def test_settings_table_has_the_defaults() -> None:
    table = settings_table()
    balancer = BalancerConfig("default", (PeerConfig("peer0"),))
    fields = {
        **{name: (balancer, field) for name, field in keys.BALANCER_FIELDS.items()},
        **{name: (balancer.peers[0], field) for name, field in keys.PEER_FIELDS.items()},
    }
    for name, (config, field) in fields.items():
        if name != "TRIAL_TIMEOUT":
            assert ast.literal_eval(table.pop(name)) == getattr(config, field), name
    assert balancer.trial_timeout is None
    breaker = BreakerConfig()
    assert table == {
        "PEERS": "required",
        "PEER_ENGINE": f'"{keys.DEFAULT_PEER_ENGINE}"',
        "BREAKER": f"{breaker.fail_max} and {breaker.success_threshold}",
        "PEER_NAME": "peer0``, ``peer1`` …",
        "TRIAL_TIMEOUT": "as ``CONNECT_TIMEOUT",
    }


def entries(page: Path) -> Iterator[dict[str, dict[str, Any]]]:
    """Yield each DATABASES of a page, whole or only an entry of it."""
    for block in blocks(page, "python"):
        known: dict[str, Any] = {}
        if "DATABASES = {" in block:
            with environment():
                exec(block, known)
            yield known["DATABASES"]
        elif re.match(r'"\w+": {\n', block):
            yield eval("{" + block + "}", known)


def all_entries() -> list[tuple[str, dict[str, dict[str, Any]]]]:
    return [(page.name, databases) for page in PAGES for databases in entries(page)]


@needs_docs
def test_examples_of_settings_are_found() -> None:
    """The examples are all looked at: none hides behind its form."""
    # Those of a shell block are run by the page's own test.
    text = "".join(block for page in PAGES for block in blocks(page, "python"))
    written = len(re.findall(rf'"ENGINE": "{keys.ENGINE}"|from_url\((?:os\.)?env', text))
    looked_at = [entry for _, databases in all_entries() for entry in databases.values()]
    assert sum(keys.is_balancer(entry) for entry in looked_at) == written > 8


@needs_docs
def test_a_table_of_peers_has_the_addresses_of_its_pages_settings() -> None:
    compared = set()
    for page in PAGES:
        configs = [
            balancer_config(alias, entry, databases)
            for databases in entries(page)
            for alias, entry in databases.items()
            if keys.is_balancer(entry)
        ]
        known = {(config.name, one.name, one.address) for config in configs for one in config.peers}
        consoles = "\n".join(blocks(page, "console"))
        shown = set(re.findall(r"^(\w+) +(\w+) +(\S+) +(?:yes|no) ", consoles, re.MULTILINE))
        # The reference shows a table and no settings.
        if known and shown:
            assert shown <= known, page
            compared.add(page.name)
    assert {"README.rst", "galera.rst", "postgresql.rst", "upgrade.rst"} <= compared


# What is logged and raised


def as_it_is_shown() -> tuple[LoadBalancer, Driver, Clock]:
    """Return a balancer over the two servers of the README's log and the docs' error."""
    shown = ERRORS.read_text(encoding="utf-8")
    (one, port), (other, other_port) = re.findall(r"^ +peer[01] \(([\d.]+):(\d+)\)", shown, re.M)
    clock, driver = Clock(), Driver()
    balancer = LoadBalancer(
        {
            "peer0": {"host": one, "port": int(port)},
            "peer1": {"host": other, "port": int(other_port)},
        },
        # Both servers are on one host: they fail by their ports.
        lambda **params: driver.connect(**{**params, "host": params["port"]}),
        clock=clock,
        jitter=lambda: 0,
        strategy="round_robin",
    )
    return balancer, driver, clock


def no_answer() -> OperationalError:
    return OperationalError(2002, "Can't connect to server on '127.0.0.1' (115)")


def test_log_of_the_first_screen(caplog: pytest.LogCaptureFixture) -> None:
    """The README's two lines are what is logged of a peer's death and return, to the letter."""
    caplog.set_level(logging.INFO, "django_proxysql")
    balancer, driver, clock = as_it_is_shown()
    port = balancer.peers["peer1"].params["port"]
    driver.down[port] = no_answer
    for _ in range(4):
        balancer.connect()
    driver.down.clear()
    clock.advance(27)
    balancer.connect()
    logged = [f"{record.levelname} {record.getMessage()}" for record in caplog.records]
    assert logged == re.findall(r"^    \d\d:\d\d:\d\d (.*)$", README, re.MULTILINE)


def test_error_in_the_docs_is_that_of_a_balancer_without_peers() -> None:
    balancer, driver, _ = as_it_is_shown()
    for peer in balancer.peers.values():
        driver.down[peer.params["port"]] = no_answer
    with pytest.raises(NoPeerAvailable) as raised:
        balancer.connect()
    (shown,) = (block for block in blocks(ERRORS, "text") if block.startswith("No peer of"))
    assert str(raised.value) == " ".join(shown.split())


def looks_of(printed: str) -> dict[str, look.Look]:
    """Return what ``manage.py peers`` has found, from what it printed."""
    heading, *lines = printed.splitlines()
    starts = [found.start() for found in re.finditer(r"\S+", heading)]
    below = [line for line in lines if re.match(r"\w+: ", line)]
    looks: dict[str, look.Look] = {}
    for line in lines[: len(lines) - len(below)]:
        cells = [line[one:other].strip() for one, other in zip(starts, [*starts[1:], None])]
        said = dict(zip(heading.split(), cells))
        alias, peer = said["ALIAS"], said["PEER"]
        errors = [one for one in below if one.startswith(f"{alias}: {peer}: ")]
        latency, version, notes = said["LATENCY"], said["SERVER"], said.get("NOTES")
        found = Inspection(
            alias,
            peer,
            said["ADDRESS"],
            reachable=said["UP"] == "yes",
            latency=None if latency == "-" else float(latency.split()[0]) / 1000,
            version="" if version == "-" else version,
            ready=said["READY"] == "yes",
            notes=tuple(notes.split(", ")) if notes else (),
            error=errors[0].split(": ", 2)[2] if errors else "",
        )
        known: Any = None
        if "CIRCUIT" in said:
            is_drained = said["DRAINED"] == "yes"
            known = SimpleNamespace(state=said["CIRCUIT"], drained=is_drained, drain_refused=False)
        row = look.Row(found, known, int(said["CONNS"]) if known else None)
        before = looks[alias].rows if alias in looks else ()
        looks[alias] = look.Look([*before, row], known is not None, 1)
    return looks


@needs_docs
def test_tables_of_peers_are_what_the_command_prints_of_these_peers() -> None:
    tables = [
        (page.name, text)
        for page in PAGES
        for text in blocks(page, "console")
        if "\nALIAS " in text
    ]
    assert len(tables) > 6
    for page, text in tables:
        _command, _, printed = text.partition("\n")
        # --watch begins each look with the time.
        printed = re.sub(r"^\d\d:\d\d:\d\d ", "", printed)
        looks = looks_of(printed.partition("\n")[2])
        again = look.table(looks, lambda _status, line: line, 1)
        assert printed.splitlines() == list(again), page


# Figures


@needs_docs
def test_figures_that_a_page_quotes_are_those_of_the_chaos_page() -> None:
    folder = ROOT / "docs/explanation"
    chaos = (folder / "chaos.rst").read_text(encoding="utf-8")
    quoting = (folder / "alternatives.rst").read_text(encoding="utf-8")
    figures = re.findall(r"\d+,\d{3}", quoting)
    assert figures
    assert [figure for figure in figures if figure not in chaos] == []


# Without Django


def test_example_without_django() -> None:
    """The README's example of the core runs as it is written, but for the servers."""
    (example,) = (block for block in blocks(PAGES[0], "python") if "connect=MySQLdb" in block)
    driver = Driver()
    with mock.patch.object(MySQLdb, "connect", driver.connect):
        names: dict[str, Any] = {}
        exec(example, names)
    balancer = names["db"]
    assert names["conn"] is driver.made[0]
    assert driver.hosts[0] in ("10.0.0.1", "10.0.0.2")
    assert {peer.breaker.fail_max for peer in balancer.peers.values()} == {3}
    assert {peer.breaker.reset_timeout for peer in balancer.peers.values()} == {30}


# The public names


def documented(thing: Any) -> Iterator[tuple[str, Any]]:
    """Yield what a class has that is public, and itself, by name."""
    yield thing.__name__, thing
    if isinstance(thing, type):
        for name, value in vars(thing).items():
            value = getattr(value, "fget", None) or getattr(value, "__func__", value)
            if not name.startswith("_") and inspect.isfunction(inspect.unwrap(value)):
                yield f"{thing.__name__}.{name}", value


@pytest.mark.parametrize(
    "name", [n for n in django_proxysql.__all__ if n not in ("balancers", "signals")]
)
def test_public_names_are_documented(name: str) -> None:
    """Every public name is in the docs' reference; it and all it has say what they are for."""
    thing = getattr(django_proxysql, name)
    assert re.search(
        rf"^\.\. auto\w+:: {name}$", (ROOT / "docs/reference/api.rst").read_text(), re.M
    )
    undocumented = [name for name, value in documented(thing) if not inspect.getdoc(value)]
    assert undocumented == []


@pytest.mark.parametrize(
    "name", ["LoadBalancer", "PeerBreaker", "retrying_atomic", "retrying_request"]
)
def test_parameters_are_documented(name: str) -> None:
    untold = []
    for where, value in documented(getattr(django_proxysql, name)):
        text = inspect.getdoc(value) or ""
        for parameter in inspect.signature(value).parameters.values():
            by_name = parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
            if by_name and parameter.name != "self":
                known = f":param {parameter.name}:", f"``{parameter.name}``"
                if not any(word in text for word in known):
                    untold.append(f"{where}({parameter.name})")
    assert untold == []
