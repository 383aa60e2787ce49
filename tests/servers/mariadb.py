"""MariaDB nodes with a database and users, which can be restored to what they were."""

from __future__ import annotations

import re
from collections.abc import Sequence

from django_proxysql.demo.servers import MariaDBNode, ServerError, quote_text

from . import ADMIN, ADMIN_PASSWORD, DATABASE, PASSWORD, USER
from .certificates import certificates_for

# Variables that change by the server's own work, or that only the start can set.
UNSETTABLE = ("gtid_", "wsrep_provider_options", "wsrep_cluster_address", "wsrep_start_position")


class Node(MariaDBNode):
    """A MariaDB node with DATABASE, the user USER and the all-powerful user ADMIN.

    With ``tls`` it has a certificate, and takes connections with and without TLS; ``ca`` is the
    path of the authority's certificate, for clients.
    """

    def __init__(self, name: str = "", options: Sequence[str] = (), tls: bool = False) -> None:
        super().__init__(name, options)
        self.ca = ""
        if tls:
            files = certificates_for(self)
            self.ca = str(files.ca)
            self.options += [
                f"--ssl-ca={files.ca}",
                f"--ssl-cert={files.certificate}",
                f"--ssl-key={files.key}",
            ]
        self._first_options = list(self.options)
        self._first_globals: dict[str, str] = {}

    def set_up(self) -> Node:
        """Make the database and the users, and remember the server's settings."""
        self.create_database(DATABASE)
        self.create_user(USER, PASSWORD)
        self.create_user(ADMIN, ADMIN_PASSWORD, grants="ALL PRIVILEGES ON *.*")
        self.remember_globals()
        return self

    def remember_globals(self) -> None:
        """Take the settings as they are for what restore() shall set back."""
        self._first_globals = self.globals()

    def globals(self) -> dict[str, str]:
        """The server's global variables, without those that follow from its work."""
        rows = (
            line.partition("\t")[::2] for line in self.sql("SHOW GLOBAL VARIABLES").splitlines()
        )
        return {name: value for name, value in rows if not name.startswith(UNSETTABLE)}

    def set_global(self, name: str, value: str | int) -> None:
        """SET GLOBAL, until the test's end."""
        text = str(value)
        literal = text if re.fullmatch(r"-?[0-9.]+", text) else quote_text(text)
        self.sql(f"SET GLOBAL {name} = {literal}")

    def restore(self) -> None:
        """Thaw, restart and set back what a test has changed."""
        if self.options != self._first_options:
            self.options[:] = self._first_options
            self.kill()
        super().restore()
        for name, value in self.globals().items():
            first = self._first_globals.get(name, value)
            if value != first:
                try:
                    self.set_global(name, first)
                except ServerError as error:
                    if "read only variable" not in str(error):
                        raise
