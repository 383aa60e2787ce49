"""The alert rules and the dashboard that the docs hold, judged by promtool.

A test fails where promtool (Debian's package prometheus) is missing.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from django_proxysql import Fault
from django_proxysql.monitoring.metrics import Metrics
from tests.servers.ports import find_program
from tests.test_balancer import World

DOCS = Path(__file__).parent.parent / "docs"
RULES = DOCS / "monitoring" / "alerts.yml"
UNIT_TESTS = DOCS / "monitoring" / "alerts.test.yml"
DASHBOARD = DOCS / "monitoring" / "grafana.json"


def promtool(*arguments: object) -> subprocess.CompletedProcess[str]:
    program = find_program("promtool", package="prometheus")
    return subprocess.run(
        [program, *map(str, arguments)], capture_output=True, text=True, timeout=60
    )


def assert_passes(*arguments: object) -> str:
    done = promtool(*arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def samples() -> dict[str, dict[str, set[str]]]:
    """Return the names of all samples that there are, with each label's words."""
    world, registry = World("db1"), CollectorRegistry()
    metrics = Metrics(world.db, registry=registry)
    for outcome in ("success", "failure"):
        metrics._counted["connect_duration_seconds"].labels("default", "db1", outcome).observe(1)
    found: dict[str, dict[str, set[str]]] = {}
    for line in generate_latest(registry).decode().splitlines():
        if not line.startswith("#"):
            name = re.split("[{ ]", line)[0]
            for label, word in re.findall(r'(\w+)="([^"]*)"', line):
                found.setdefault(name, {}).setdefault(label, set()).add(word)
    return {name: labels for name, labels in found.items() if not name.endswith("_created")}


#: What Prometheus adds.
BY_PROMETHEUS = {"job", "instance"}


def unknown(expr: str) -> list[str]:
    """Return what an expression asks for that does not exist."""
    there = samples()
    found = []
    for name in re.findall(r"\bdjango_proxysql_\w+", expr):
        if name not in there:
            found.append(name)
    for name, selector in re.findall(r"\b(django_proxysql_\w+)\{([^}]*)\}", expr):
        for label, operator, word in re.findall(r'(\w+)(!?=~?)"([^"]*)"', selector):
            words = there.get(name, {}).get(label)
            if words is None:
                if label not in BY_PROMETHEUS:
                    found.append(f"{name}{{{label}}}")
            elif "~" not in operator and word not in words:
                found.append(f"{name}{{{label}={word}}}")
    by = re.findall(r"\b(?:by|ignoring|on) \(([^)]*)\)", expr)
    labels = {label for known in there.values() for label in known} | BY_PROMETHEUS
    found += [name for names in by for name in names.split(", ") if name not in labels]
    return found


def test_unknown_is_not_blind() -> None:
    assert unknown("sum by (alias) (django_proxysql_connections)") == []
    assert unknown("django_proxysql_connects") == ["django_proxysql_connects"]
    assert unknown('django_proxysql_connections{fault="lost"}') == [
        "django_proxysql_connections{fault}"
    ]
    assert unknown('django_proxysql_trials_total{outcome="good"}') == [
        "django_proxysql_trials_total{outcome=good}"
    ]
    assert unknown("sum by (balancer) (django_proxysql_connections)") == ["balancer"]


# Alerts


def alerts() -> dict[str, str]:
    """Return the text of each rule, by its alert."""
    text = RULES.read_text()
    parts = re.split(r"^      - alert: (\w+)\n", text, flags=re.MULTILINE)[1:]
    return dict(zip(parts[::2], parts[1::2]))


def test_rules_are_sound() -> None:
    assert_passes("check", "rules", "--lint=all", "--lint-fatal", RULES)


def test_rules_ask_for_what_there_is() -> None:
    assert unknown(RULES.read_text()) == []
    # Nothing else is asked for: whatever else goes by our name has been found above.
    assert all("django_proxysql_" in text for text in alerts().values())


def test_rules_pass_their_unit_tests() -> None:
    assert_passes("test", "rules", UNIT_TESTS)


@pytest.mark.parametrize("alert", list(alerts()))
def test_unit_tests_see_a_rule_that_is_wrong(alert: str, tmp_path: Path) -> None:
    """Each alert has a unit test in which it fires, and one in which it does not."""
    for condition in (" > -1e9", " > 1e9"):
        wrong = re.sub(r" (>|==) [\d.]+$", condition, alerts()[alert], count=1, flags=re.M)
        assert wrong != alerts()[alert]
        (tmp_path / RULES.name).write_text(RULES.read_text().replace(alerts()[alert], wrong))
        shutil.copy(UNIT_TESTS, tmp_path)
        done = promtool("test", "rules", tmp_path / UNIT_TESTS.name)
        assert done.returncode != 0
        assert f"alertname: {alert}," in done.stdout + done.stderr


# The dashboard


def dashboard() -> Any:
    return json.loads(DASHBOARD.read_text())


def expressions() -> list[str]:
    """Return the panels' expressions, as Grafana fills in their variables."""
    known = {"$job": "shop", "$alias": "default", "$__rate_interval": "1m"}
    found = []
    for panel in dashboard()["panels"]:
        for target in panel["targets"]:
            expr = target["expr"]
            # Each panel is of the job and the balancers that are chosen, and of no others.
            assert 'job=~"$job", alias=~"$alias"' in expr
            for name, word in known.items():
                expr = expr.replace(name, word)
            assert "$" not in expr
            found.append(expr)
    return found


def test_dashboard_is_understood_by_prometheus(tmp_path: Path) -> None:
    rules = [
        {"record": f"panel:{number}", "expr": expr} for number, expr in enumerate(expressions())
    ]
    # JSON is YAML.
    path = tmp_path / "rules.yml"
    path.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))
    assert f"{len(rules)} rules found" in assert_passes("check", "rules", path)


def test_dashboard_asks_for_what_there_is() -> None:
    queries = [variable.get("definition", "") for variable in dashboard()["templating"]["list"]]
    assert unknown("\n".join([*expressions(), *queries])) == []


def test_dashboard_shows_every_metric() -> None:
    text = "\n".join(expressions())
    # The histogram's sum and count are for those who want them.
    shown = {name for name in samples() if not re.search("_(sum|count)$", name)}
    assert set(re.findall(r"\bdjango_proxysql_\w+", text)) == shown


# The page


def test_page_has_each_metric_its_type_and_labels_and_no_other() -> None:
    registry = CollectorRegistry()
    metrics = Metrics(World("db1").db, registry=registry)
    there = {}
    for metric in metrics._metrics:
        (described,) = metric.describe()
        name = described.name.replace("django_proxysql_", "")
        name += "_total" * (described.type == "counter")
        own = [label for label in metric._labelnames if label not in ("alias", "peer")]
        there[name] = (described.type, *own)
    page = (DOCS / "howto" / "prometheus.rst").read_text()
    rows = re.findall(r"^``(\w+)`` +(counter|gauge|histogram) *(?:``(\w+)``)?", page, re.MULTILINE)
    assert {name: tuple(word for word in row if word) for name, *row in rows} == there
    assert {fault.value for fault in Fault} <= samples()["django_proxysql_connect_failures_total"][
        "fault"
    ]
