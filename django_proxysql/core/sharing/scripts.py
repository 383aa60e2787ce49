"""What Redis does for the processes, each in one step that nothing else gets in between of.

The scripts, in the Lua files beside this one, keep Redis's time, compare versions and decide. They
are run by their SHA, so that they travel once.
"""

from __future__ import annotations

import hashlib
from pathlib import Path


def _lua(*names: str) -> str:
    folder = Path(__file__).parent
    return "\n".join((folder / f"{name}.lua").read_text(encoding="utf-8") for name in names)


#: Counts a process in, and says whether all is as it knows it: the whole round trip in peace.
HEARTBEAT = _lua("common", "heartbeat")

#: Compares what a process knows of circuits and drains with what is stored.
SYNC = _lua("common", "sync")

#: Adds up what all processes that were there lately have said.
FLEET = _lua("fleet")

#: What Redis knows a script by.
SHA = {script: hashlib.sha1(script.encode()).hexdigest() for script in (HEARTBEAT, SYNC, FLEET)}  # noqa: S324
