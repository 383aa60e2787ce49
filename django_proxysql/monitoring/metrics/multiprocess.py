"""The files of prometheus_client's multiprocess mode, read so that a broken one harms no page."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from prometheus_client import multiprocess

from ...core.logger import logger

if TYPE_CHECKING:
    from prometheus_client import Metric

#: The broken files that the log has named.
_named: set[str] = set()


class MultiProcessCollector(multiprocess.MultiProcessCollector):
    """prometheus_client's collector of the same name, which leaves out broken files.

    A process that is killed while it makes a file leaves it empty; a disk that is full cuts one
    off. prometheus_client's own collector then raises at each scrape, until the file is removed.
    Here the log names it once, as a ``WARNING``.
    """

    def collect(self) -> Iterable[Metric]:
        """Return the metrics of all processes."""
        files = glob.glob(os.path.join(self._path, "*.db"))
        try:
            return self._merged(files)
        except Exception:
            return self._merged([file for file in files if self._is_whole(file)])

    def _merged(self, files: list[str]) -> list[Any]:
        merge: Any = self.merge
        return list(merge(files, accumulate=True))

    def _is_whole(self, file: str) -> bool:
        try:
            self._merged([file])
        except FileNotFoundError:
            # Its process has ended, or was marked dead.
            return False
        except Exception as exc:
            if file not in _named:
                _named.add(file)
                logger.warning(
                    "The metrics leave out a broken file of Prometheus's multiprocess mode: %s "
                    "(%s: %s). A process was killed while it made the file, or the disk was full. "
                    "Remove the file.",
                    file,
                    type(exc).__name__,
                    exc,
                )
            return False
        return True
