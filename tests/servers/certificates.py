"""A certificate authority of the tests' own, and a server certificate for 127.0.0.1."""

from __future__ import annotations

import shutil
import subprocess
import threading
from pathlib import Path
from typing import NamedTuple

from .ports import ServerError, find_program
from .processes import ServerProcess
from .runs import current_run

_lock = threading.Lock()


class Certificates(NamedTuple):
    """Files in PEM format."""

    ca: Path
    certificate: Path
    key: Path


def certificates() -> Certificates:
    """The certificates of this run, made when first asked for."""
    folder = current_run().workspace.path / "tls"
    made = Certificates(folder / "ca.pem", folder / "server.pem", folder / "server.key")
    with _lock:
        if not folder.is_dir():
            unfinished = current_run().workspace.folder("tls")
            _make(unfinished)
            unfinished.rename(folder)
    return made


def certificates_for(server: ServerProcess) -> Certificates:
    """A copy in the server's own folder, of which only the server can read the key."""
    copies = [Path(shutil.copy(path, server.directory)) for path in certificates()]
    made = Certificates(*copies)
    made.key.chmod(0o600)
    server.give(server.directory)
    return made


def _make(folder: Path) -> None:
    new_key = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes"
    # Python from 3.13 on wants the key's use and identifier in them, too.
    use = "-addext keyUsage=critical,keyCertSign,cRLSign"
    (folder / "names").write_text(
        "subjectAltName=IP:127.0.0.1,DNS:localhost\nauthorityKeyIdentifier=keyid\n"
    )
    for command in (
        f"req -x509 {new_key} -days 2 -subj /CN=Tests-CA {use} -keyout ca.key -out ca.pem",
        f"req {new_key} -subj /CN=127.0.0.1 -keyout server.key -out server.csr",
        "x509 -req -in server.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 2"
        " -extfile names -out server.pem",
    ):
        openssl = find_program("openssl", package="openssl")
        result = subprocess.run(
            [openssl, *command.split()], cwd=folder, stdin=subprocess.DEVNULL, capture_output=True
        )
        if result.returncode:
            raise ServerError(f"openssl {command}: {result.stderr.decode(errors='replace')}")
