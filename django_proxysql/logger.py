"""The library's logger, and how to complain through it where nothing may be raised."""

from __future__ import annotations

import logging
from collections.abc import Mapping

__all__ = ["complain", "logger"]

logger = logging.getLogger("django_proxysql")


def complain(message: str, *args: object, extra: Mapping[str, object] | None = None) -> None:
    """Log the exception that is being handled, and raise nothing.

    For what a listener raises. The log handler itself may be what is broken,
    and it must not cost anybody a connection.

    :param extra: attributes of the record.
    """
    try:
        logger.exception(message, *args, extra=extra)
    except Exception:  # noqa: S110
        pass
