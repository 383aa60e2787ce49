"""A process that sends one COMMIT and asks what became of it; its parent names where it waits.

``python -m tests.asking_process '{"peers": …, "engine": …, "token": …, …}'`` prints a moment's name
when it comes there, and goes on once it has read a line. At its end it prints how the block ended,
and how often the block's hook ran.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

#: The token is about to be sent; it was answered, and COMMIT is about to be sent in a packet of its
#: own; COMMIT's answer was lost, and the fence is about to be written; the fence was written in a
#: transaction that is not committed; the fence was answered.
MOMENTS = ("committing", "between", "fencing", "written", "answered")
COMMITTING, BETWEEN, FENCING, WRITTEN, ANSWERED = MOMENTS


class AskingProcess:
    """The process, for the one that started it.

    :param driver: "pymysql" or "psycopg2"; None: the one that Django takes by itself.
    """

    def __init__(
        self,
        peers: Sequence[Any],
        engine: str,
        token: bytes,
        *moments: str,
        driver: str | None = None,
        options: dict[str, Any] | None = None,
    ) -> None:
        about = {"peers": peers, "engine": engine, "token": token.hex(), "moments": moments}
        about["options"] = options or {}
        environment = {**os.environ, **({"TEST_DRIVER": driver} if driver else {})}
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, json.dumps(about)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def __enter__(self) -> AskingProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def reaches(self, moment: str) -> None:
        """Return when it waits at this moment, which must be its next."""
        assert self.line() == moment

    def line(self) -> str:
        """Return what it prints next."""
        return self._process.stdout.readline().strip()

    def goes_on(self) -> None:
        """Let it go on."""
        self._process.stdin.write("\n")
        self._process.stdin.flush()

    def freeze(self) -> None:
        """Stop it where it stands; return when it is stopped."""
        self._process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self._process.pid, os.WSTOPPED | os.WNOWAIT)

    def thaw(self) -> None:
        """Let it go on where it stood."""
        self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """End it by SIGKILL; nothing of it is run any more."""
        self._process.kill()
        self._process.communicate()


def main() -> None:
    about = json.loads(sys.argv[1])
    os.environ["DJANGO_SETTINGS_MODULE"] = "tests.django_settings"
    if "TEST_DRIVER" in os.environ:
        import tests.other_driver  # noqa: F401
    import django

    django.setup()
    from django.db import OperationalError, transaction

    from django_proxysql.backends import outcomes
    from django_proxysql.core import drivers, outcome, ready
    from django_proxysql.core.outcome import Outcome
    from django_proxysql.errors import CommitOutcomeUnknown
    from tests.engine import engine

    def waits(moment: str) -> None:
        if moment in about["moments"]:
            print(moment, flush=True)
            sys.stdin.readline()

    plain_commit = drivers.base.Driver.commit_after

    def commit_after(driver: Any, connection: Any, statement: str, together: bool) -> None:
        def commit() -> None:
            waits(BETWEEN)
            connection.commit()

        stopping = SimpleNamespace(cursor=connection.cursor, commit=commit)
        plain_commit(driver, stopping, statement, together)

    drivers.base.Driver.commit_after = commit_after  # type: ignore[method-assign]
    plain_insert, plain_rows, plain_verdict = outcome.insert, ready.rows, outcome.verdict

    def insert(*arguments: Any, is_fence: bool = False) -> str:
        waits(FENCING if is_fence else COMMITTING)
        return plain_insert(*arguments, is_fence)

    def rows(connection: Any, statement: str) -> Any:
        found = plain_rows(connection, statement)
        if "TRUE" in statement:
            waits(WRITTEN)
        return found

    def verdict(found: Outcome | None, age: float) -> Any:
        if found is not None:
            waits(ANSWERED)
        return plain_verdict(found, age)

    outcome.insert, ready.rows, outcome.verdict = insert, rows, verdict
    outcomes._tokens.next = lambda: bytes.fromhex(about["token"])  # type: ignore[method-assign]

    hooks: list[str] = []
    settings = {
        "PEER_ENGINE": about["engine"],
        "OPTIONS": about["options"],
        "COMMIT_OUTCOME": "record",
        "OUTCOME_DEADLINE": 60,
    }
    with engine(about["peers"], CONN_MAX_AGE=None, **settings) as connection:
        try:
            with transaction.atomic(connection.alias):
                transaction.on_commit(lambda: hooks.append(""), connection.alias)
                with connection.cursor() as cursor:
                    cursor.execute("INSERT INTO app_token (value) VALUES ('one')")
        except CommitOutcomeUnknown:
            end = "unknown"
        except OperationalError as exc:
            end = "rolled back" if "was rolled back" in str(exc) else repr(exc)
        else:
            end = "well"
    print(f"{end}, {len(hooks)}", flush=True)


if __name__ == "__main__":
    main()
