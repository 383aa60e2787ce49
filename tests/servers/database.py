"""What servers of MariaDB and PostgreSQL have in common: a data directory, options, TLS."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from .certificates import certificates_for
from .processes import ServerProcess
from .runs import template


class DatabaseServer(ServerProcess):
    """A database server whose data directory is a copy of one that was made once.

    ``options`` are added to its command line at each start, and may be changed in between. With
    ``tls`` it has a certificate, and takes connections with and without TLS; ``ca`` is the path of
    the authority's certificate, for clients.
    """

    tls_options: ClassVar[tuple[str, ...]]  # with the names of the certificate's files in braces

    def __init__(self, name: str = "", options: Sequence[str] = (), tls: bool = False) -> None:
        super().__init__(name)
        self.options = list(options)
        self.datadir = self.directory / "data"
        self.ca = ""
        if tls:
            files = certificates_for(self)
            self.ca = str(files.ca)
            self.options += [option.format(*files) for option in self.tls_options]
        self._first_options = list(self.options)

    def prepare(self) -> None:
        # Installing takes longer than starting; a copy of 30 MB takes next to no time.
        shutil.copytree(template(self.template, self.install), self.datadir)
        self.give(self.datadir)

    template: ClassVar[str]  # the name of what is copied

    def install(self, folder: Path) -> None:
        """Make a data directory in ``folder``, with the name ``data``."""
        raise NotImplementedError

    def restore(self) -> None:
        """Thaw, restart and set back what a test has changed."""
        if self.options != self._first_options:
            self.options[:] = self._first_options
            self.kill()
        super().restore()
