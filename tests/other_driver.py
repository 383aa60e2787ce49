"""A plugin of pytest's: run tests with PyMySQL or psycopg2, in a process of its own.

``TEST_DRIVER=pymysql python -m pytest -p tests.other_driver …``
"""

from __future__ import annotations

import os
import sys

DRIVER = os.environ.get("TEST_DRIVER")

if DRIVER == "psycopg2":
    # Django then takes psycopg2.
    sys.modules["psycopg"] = None  # type: ignore[assignment]
elif DRIVER == "pymysql":
    import pymysql

    pymysql.install_as_MySQLdb()
    # Django wants a later mysqlclient than PyMySQL says it is.
    pymysql.version_info = (2, 2, 7, "final", 0)
