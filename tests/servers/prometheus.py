"""A Prometheus that scrapes one site each second and evaluates rules of ours."""

from __future__ import annotations

import json
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

from .ports import ServerError, find_program
from .processes import ServerProcess


class Prometheus(ServerProcess):
    """Scrapes ``/metrics`` of ``target``, such as ``127.0.0.1:8000``, as the job shop."""

    kind = "prometheus"

    def __init__(self, target: str, rules: Path, name: str = "") -> None:
        super().__init__(name)
        self._target = target
        self._rules = rules

    def prepare(self) -> None:
        job = {"job_name": "shop", "static_configs": [{"targets": [self._target]}]}
        # JSON is YAML.
        (self.directory / "prometheus.yml").write_text(
            json.dumps(
                {
                    "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
                    "rule_files": [str(self._rules)],
                    "scrape_configs": [job],
                }
            )
        )

    def command(self) -> list[str]:
        return [
            find_program("prometheus", package="prometheus"),
            f"--config.file={self.directory / 'prometheus.yml'}",
            f"--storage.tsdb.path={self.directory / 'data'}",
            f"--web.listen-address={self.host}:{self.port}",
        ]

    def ready(self) -> bool:
        try:
            return super().ready() and bool(self._get("/-/ready"))
        except ServerError:
            return False

    def query(self, expr: str) -> list[dict[str, Any]]:
        """Return what an expression is now, a dict for each series."""
        parameters = urllib.parse.urlencode({"query": expr})
        found: list[dict[str, Any]] = self._data(f"/api/v1/query?{parameters}")["result"]
        return found

    def alerts(self) -> dict[str, dict[str, Any]]:
        """Return the alerting rules and how they are, by name."""
        groups = self._data("/api/v1/rules")["groups"]
        return {rule["name"]: rule for group in groups for rule in group["rules"]}

    def _data(self, path: str) -> Any:
        said = json.loads(self._get(path))
        assert said["status"] == "success", said
        return said["data"]

    def _get(self, path: str) -> bytes:
        try:
            with urllib.request.urlopen(f"http://{self.host}:{self.port}{path}", timeout=30) as it:
                return bytes(it.read())
        except OSError as exc:
            raise ServerError(f"{self.name}: {path}: {exc}") from exc
