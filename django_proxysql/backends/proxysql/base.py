"""ENGINE: ``django_proxysql.backends.proxysql``."""

from __future__ import annotations

from typing import Any

from django.db import DEFAULT_DB_ALIAS
from django.db.backends.base.base import BaseDatabaseWrapper

from ..engines import engine_class
from ..safepoints import SafePointsMixin

__all__ = ["DatabaseWrapper"]


class DatabaseWrapper(SafePointsMixin):
    """A load-balanced connection: an instance of this and of the peer engine's own class.

    Subclass it like any other backend's; the peer engine is mixed in when an
    instance is made, from what its settings say.
    """

    def __new__(
        cls,
        settings_dict: dict[str, Any] | None = None,
        alias: str = DEFAULT_DB_ALIAS,
        *args: Any,
        **kwargs: Any,
    ) -> DatabaseWrapper:
        # copy.copy() calls the finished class without arguments.
        if not issubclass(cls, BaseDatabaseWrapper):
            cls = engine_class(cls, settings_dict or {}, alias)
        return super().__new__(cls)
