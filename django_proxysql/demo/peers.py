"""Three peers that fail and recover: three paths to one SQLite file."""

from __future__ import annotations

import shutil
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

NAMES = ("peer0", "peer1", "peer2")

Databases = dict[str, dict[str, Any]]


class CannotRun(Exception):
    """The demo lacks something; the message says what."""


class Peers:
    """Three links to the directory that holds the file.

    A peer whose link is gone is to SQLite what a host that is gone is to a client: "unable to
    open database file". (Without the file behind a link, SQLite would make a new, empty one.)
    """

    def start(self, stack: ExitStack) -> Databases:
        """Make the peers and return their DATABASES entries; ``stack`` undoes what was made."""
        self._folder = Path(tempfile.mkdtemp(prefix="django-proxysql-demo-"))
        stack.callback(shutil.rmtree, self._folder, ignore_errors=True)
        (self._folder / "data").mkdir()
        for name in NAMES:
            self.restore(name)
        return {
            name: {
                "ENGINE": "django.db.backends.sqlite3",
                "NAME": str(self._folder / name / "shop.sqlite3"),
            }
            for name in NAMES
        }

    def fail(self, name: str) -> None:
        """Take a peer away."""
        (self._folder / name).unlink()

    def restore(self, name: str) -> None:
        """Bring a peer back."""
        try:
            (self._folder / name).symlink_to("data", target_is_directory=True)
        except OSError as error:
            raise CannotRun(f"no link can be made in {self._folder}: {error}") from error
