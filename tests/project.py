"""A Django project in a directory of its own, whose commands and servers run as processes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.servers import PASSWORD

ROOT = Path(__file__).parent.parent

MANAGE = """
import multiprocessing, os, sys
import django
from django.core.management import execute_from_command_line
os.environ["DJANGO_SETTINGS_MODULE"] = "settings"
if __name__ == "__main__":
    if django.VERSION < (6,) and multiprocessing.get_start_method() == "forkserver":
        # Python 3.14's default, which Django's test runs do not know yet.
        multiprocessing.set_start_method("fork", force=True)
    execute_from_command_line(sys.argv)
"""


class Project:
    """A project's files, and the processes that run there."""

    def __init__(self, root: Path, files: Mapping[str, str]) -> None:
        self.root = root
        self.write({"manage.py": MANAGE, **files})

    def write(self, files: Mapping[str, str]) -> None:
        """Write files, by their paths in the project's directory."""
        for name, text in files.items():
            path = self.root / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(text.lstrip())

    def run(
        self, *args: str, environment: Mapping[str, str] | None = None, **kwargs: Any
    ) -> subprocess.Popen[str]:
        """Start Python with ``args`` in the project's directory."""
        whole = {
            **os.environ,
            "DJANGO_SETTINGS_MODULE": "settings",
            "PYTHONPATH": f"{self.root}{os.pathsep}{ROOT}",
            "PYTHONUNBUFFERED": "1",
            **(environment or {}),
        }
        return subprocess.Popen(
            [sys.executable, *args], cwd=self.root, env=whole, text=True, **kwargs
        )

    def start(self, *args: str) -> subprocess.Popen[str]:
        """Start a command of manage.py's; what it prints can be read from its stdout."""
        return self.run("manage.py", *args, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def manage(self, *args: str, status: int = 0, timeout: float = 180) -> str:
        """Return what a command prints; fail if it does not end with ``status``, in time."""
        return self.output_of(self.start(*args), status, timeout)

    def pytest(self, *args: str) -> str:
        """Return what pytest, with pytest-django, prints; fail if it does not succeed."""
        what = ["-m", "pytest", "-c", os.devnull, "--rootdir=.", "-p", "no:cacheprovider"]
        process = self.run(*what, *args, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        return self.output_of(process, 0)

    def python(self, script: str) -> str:
        """Return what a script prints that is run in the project; fail if it does not succeed."""
        process = self.run("-c", script, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        return self.output_of(process, 0)

    @staticmethod
    def output_of(process: subprocess.Popen[str], status: int, timeout: float = 180) -> str:
        try:
            output, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
            raise AssertionError(f"not in {timeout} s: {output}") from None
        assert process.returncode == status, output
        assert PASSWORD not in output
        return output

    def log(self) -> list[str]:
        """Return what django-proxysql logged since it was asked last."""
        path = self.root / "log"
        lines = path.read_text().splitlines()
        path.write_text("")
        return lines


def get(url: str, server: subprocess.Popen[str]) -> bytes:
    """Return what is at ``url``, as soon as its server listens."""
    while True:
        try:
            with urllib.request.urlopen(url, timeout=30) as answer:
                return bytes(answer.read())
        except urllib.error.HTTPError:
            raise
        except urllib.error.URLError:
            assert server.poll() is None, server.communicate()
            time.sleep(0.05)
