"""Connects to nothing, at once or after ``OPTIONS["seconds"]``."""

from __future__ import annotations

import time
import types
from typing import Any

from django.db import utils
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.backends.dummy import base as dummy


class Connection:
    """What the null driver's connect() returns."""

    def close(self) -> None:
        """Do nothing."""


def connect(host: str = "", seconds: float = 0.0) -> Connection:
    """Return a connection to nothing, after ``seconds`` of waiting."""
    if seconds:
        time.sleep(seconds)
    return Connection()


class Database(types.ModuleType):
    """The null driver's module; its errors are Django's."""

    connect = staticmethod(connect)


for _name in (
    "DataError",
    "OperationalError",
    "IntegrityError",
    "InternalError",
    "ProgrammingError",
    "NotSupportedError",
    "DatabaseError",
    "InterfaceError",
    "Error",
):
    setattr(Database, _name, getattr(utils, _name))


class DatabaseWrapper(BaseDatabaseWrapper):
    """Has a connect() that works, and nothing to do with the connection."""

    vendor = "null"
    display_name = "nothing"
    Database = Database("nulldriver")
    client_class = dummy.DatabaseClient
    creation_class = dummy.DatabaseCreation
    features_class = dummy.DummyDatabaseFeatures
    introspection_class = dummy.DatabaseIntrospection
    ops_class = dummy.DatabaseOperations

    def get_connection_params(self) -> dict[str, Any]:
        settings = self.settings_dict
        return {"host": settings["HOST"], **settings["OPTIONS"]}

    def get_new_connection(self, conn_params: dict[str, Any]) -> Any:
        return self.Database.connect(**conn_params)

    def init_connection_state(self) -> None:
        pass

    def _set_autocommit(self, autocommit: bool) -> None:
        pass
