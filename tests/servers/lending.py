"""Servers that a test run lends to another, which one of its tests starts and waits for."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

from .runs import current_run

#: The variable that tells a run in which file its borrowed servers are.
LENT = "DJANGO_PROXYSQL_TEST_LENT"


def lend(**servers: Any) -> dict[str, str]:
    """Return the environment in which a run uses our servers. It cannot stop or start them.

    :param servers: what fixtures of these names return.
    """
    written = current_run().workspace.folder("lent") / "servers"
    written.write_bytes(pickle.dumps(servers))
    return {LENT: str(written)}


def borrowed(fixture: str) -> Any:
    """Return the servers that this run borrows for a fixture, or None."""
    if LENT not in os.environ:
        return None
    return pickle.loads(Path(os.environ[LENT]).read_bytes()).get(fixture)
