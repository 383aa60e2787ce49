"""Three peers that can be taken away and brought back."""

from __future__ import annotations

import shutil
import tempfile
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

NAMES = ("peer0", "peer1", "peer2")

Databases = dict[str, dict[str, Any]]


class CannotRun(Exception):
    """The demo lacks something; the message says what, and where to get it."""


class Peers:
    """Three peers of one kind."""

    #: What they are, for the headline.
    kind: ClassVar[str]
    #: The peers that hold data of their own, and are to be filled one by one.
    to_fill: ClassVar[tuple[str, ...]]
    #: How a peer fails, and how it comes back, for the log.
    failing: ClassVar[str]
    restoring: ClassVar[str]

    def start(self, stack: ExitStack) -> Databases:
        """Make the peers and return their DATABASES entries; ``stack`` undoes what was made."""
        raise NotImplementedError

    def fail(self, name: str) -> None:
        """Take a peer away."""
        raise NotImplementedError

    def restore(self, name: str) -> None:
        """Bring a peer back, without waiting until it is there."""
        raise NotImplementedError


class SQLitePeers(Peers):
    """Three paths that lead to one file.

    Each peer is a link to the directory that holds the file. A peer whose link
    is gone is what a host that is gone is to a client: "unable to open database
    file". (Were the link to the file itself, SQLite would make a new, empty one.)
    """

    kind = "SQLite"
    to_fill = NAMES[:1]
    failing = "its path is taken away"
    restoring = "its path is there again"

    def start(self, stack: ExitStack) -> Databases:
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
        (self._folder / name).unlink()

    def restore(self, name: str) -> None:
        try:
            (self._folder / name).symlink_to("data", target_is_directory=True)
        except OSError as error:
            raise CannotRun(f"no link can be made in {self._folder}: {error}") from error


class MariaDBPeers(Peers):
    """Three MariaDB servers in a temporary directory, with the same rows in each.

    They do not replicate, so the site only reads.
    """

    kind = "MariaDB"
    to_fill = NAMES
    failing = "its server is killed"
    restoring = "its server is started again"

    def start(self, stack: ExitStack) -> Databases:
        options = _mysql_driver()
        try:
            # They run servers as Unix does; the SQLite peers need no Unix.
            from .servers import MariaDBNode, ServerError, start_together
        except ImportError as error:
            raise CannotRun(f"MariaDB peers need a Unix system ({error})") from error
        user, password = "shop", "demo"
        try:
            # Ended and removed by close(), and at the process's end in any case.
            self._nodes = {}
            for name in NAMES:
                self._nodes[name] = MariaDBNode(name)
                stack.callback(self._nodes[name].close)
            start_together(*self._nodes.values())
            for node in self._nodes.values():
                node.create_database("shop")
                node.create_user(user, password)
        except ServerError as error:
            raise CannotRun(str(error)) from error
        return {
            name: {
                "ENGINE": "django.db.backends.mysql",
                "NAME": "shop",
                "USER": user,
                "PASSWORD": password,
                "HOST": node.host,
                "PORT": node.port,
                "OPTIONS": options,
            }
            for name, node in self._nodes.items()
        }

    def fail(self, name: str) -> None:
        self._nodes[name].kill()

    def restore(self, name: str) -> None:
        self._nodes[name].start(wait=False)


def _mysql_driver() -> dict[str, Any]:
    """Import mysqlclient, or let PyMySQL stand in for it; return the OPTIONS that it needs.

    :raises CannotRun: neither is installed.
    """
    try:
        import_module("MySQLdb")
        return {}
    except ImportError as missing:
        try:
            pymysql: Any = import_module("pymysql")
        except ImportError:
            raise CannotRun(
                f"MariaDB peers need a driver ({missing}). Install mysqlclient, "
                'as in: pip install "django-proxysql[mysql]", or PyMySQL'
            ) from missing
        # Django asks for mysqlclient's version, which is not PyMySQL's.
        pymysql.version_info = (2, 2, 1, "final", 0)
        pymysql.install_as_MySQLdb()
        # It reads the system's certificates at each connect, which takes longer than all the rest.
        return {"ssl_disabled": True}


KINDS: dict[str, type[Peers]] = {"sqlite": SQLitePeers, "mariadb": MariaDBPeers}
