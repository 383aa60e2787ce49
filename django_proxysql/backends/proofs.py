"""Questions that only a server can answer, before a statement is run again there.

Is what the statement changes undone by a rollback? They are asked by the driver's own connection:
none of them is a statement of the application's.
"""

from __future__ import annotations

from typing import Any

from ..core.ready import rows
from ..core.texts import names_in


def reads_anew(connection: Any, vendor: str) -> bool:
    """Return whether each statement of the transaction that is begun sees what is committed."""
    if vendor == "postgresql":
        [(level,)] = rows(connection, "SHOW transaction_isolation")
    else:
        # Its name has changed twice.
        names = "('tx_isolation', 'transaction_isolation')"
        levels = rows(connection, f"SHOW SESSION VARIABLES WHERE Variable_name IN {names}")
        level = levels[0][1]
    return str(level).replace("-", " ").lower() in ("read committed", "read uncommitted")


def is_undone(connection: Any, vendor: str, sql: str) -> bool:
    """Ask the server whether a rollback undoes all that ``sql`` may have changed.

    It names tables, whose names are among its words; what else its words name
    does no harm. Where the server does not show enough, the answer is no.

    :raises Exception: the driver's error.
    """
    names = sorted(names_in(sql))
    if vendor == "postgresql":
        [(is_plain,)] = rows(connection, _ONLY_POSTGRESQL)
        return bool(is_plain or rows(connection, _ITS_TABLES, {"names": names})[0][0])
    return _only_innodb(connection, names)


#: Extensions whose functions, in C as they are, do nothing outside of the transaction.
_HARMLESS = """'plpgsql', 'citext', 'hstore', 'pg_trgm', 'unaccent', 'uuid-ossp', 'pgcrypto',
 'btree_gin', 'btree_gist', 'intarray', 'ltree', 'cube', 'earthdistance', 'fuzzystrmatch',
 'isn', 'seg', 'bloom', 'dict_int', 'dict_xsyn', 'postgis', 'postgis_topology',
 'postgis_raster', 'postgis_sfcgal', 'address_standardizer', 'pgrouting', 'vector',
 'pg_stat_statements', 'moddatetime', 'refint', 'insert_username', 'tsm_system_rows',
 'tsm_system_time', 'pg_buffercache', 'pgrowlocks', 'pgstattuple', 'tablefunc'"""


def _foreign(catalog: str, row: str) -> str:
    """Return a condition: it came with no PostgreSQL, and with no harmless extension."""
    return f"""{row}.oid >= 16384 AND NOT EXISTS (
        SELECT 1 FROM pg_depend d JOIN pg_extension e ON e.oid = d.refobjid
        WHERE d.classid = '{catalog}'::regclass AND d.objid = {row}.oid AND d.deptype = 'e'
        AND d.refclassid = 'pg_extension'::regclass AND e.extname IN ({_HARMLESS}))"""  # noqa: S608 - of constants


#: Words of a function's text by which it may reach outside of its transaction: a statement that
#: it puts together, a program, a file, a large object, a sequence's value, another session, and
#: what PostgreSQL's own functions for administrators do.
_OUTSIDE = (
    r"\m(execute|copy|program|setval|lo_\w+|lowrite|dblink\w*|set_config|"
    r"pg_(terminate|cancel|reload|rotate|switch|logical|create|drop|read|write|ls|file|stat_reset|"
    r"replication|promote|wal|backup|start|stop|import|export)\w*)\M"
)

#: What a function in SQL or PL/pgSQL does to rows is undone with its transaction. What
#: works elsewhere (dblink, a foreign table, Python) needs a function in a language
#: that is not trusted, or one of the words above. The text of a function with a body in
#: standard SQL is not shown.
_ONLY_POSTGRESQL = f"""SELECT NOT EXISTS (
    SELECT 1 FROM pg_proc p JOIN pg_language l ON l.oid = p.prolang
    WHERE (NOT l.lanpltrusted OR p.prosrc = '' OR p.prosrc ~* '{_OUTSIDE}')
    AND {_foreign("pg_proc", "p")})"""  # noqa: S608

#: Or else nothing that the statement names runs code of a user's: plain tables without
#: triggers, rules, policies, cascades, domains, or defaults and checks that call it.
_ITS_TABLES = f"""
WITH named AS (SELECT c.* FROM pg_class c
    WHERE c.relname = ANY(%(names)s) AND c.relnamespace NOT IN
        ('pg_catalog'::regnamespace, 'information_schema'::regnamespace)
    AND c.relkind NOT IN ('i', 'I', 'S', 't', 'c'))
SELECT EXISTS (SELECT 1 FROM named)
    AND NOT EXISTS (SELECT 1 FROM named n WHERE n.relkind <> 'r' OR n.relhasrules
        OR n.relrowsecurity OR n.relhassubclass)
    AND NOT EXISTS (SELECT 1 FROM pg_trigger g JOIN named n ON n.oid = g.tgrelid
        WHERE NOT g.tgisinternal)
    AND NOT EXISTS (SELECT 1 FROM pg_constraint k JOIN named n ON n.oid = k.confrelid
        WHERE k.confupdtype NOT IN ('a', 'r') OR k.confdeltype NOT IN ('a', 'r'))
    AND NOT EXISTS (SELECT 1 FROM pg_attribute a JOIN named n ON n.oid = a.attrelid
        JOIN pg_type y ON y.oid = a.atttypid WHERE y.typtype = 'd' AND NOT a.attisdropped)
    AND NOT EXISTS (SELECT 1 FROM pg_attrdef f JOIN named n ON n.oid = f.adrelid
        JOIN pg_depend u ON u.classid = 'pg_attrdef'::regclass AND u.objid = f.oid
            AND u.refclassid = 'pg_proc'::regclass
        JOIN pg_proc p ON p.oid = u.refobjid WHERE {_foreign("pg_proc", "p")})
    AND NOT EXISTS (SELECT 1 FROM pg_constraint k JOIN named n ON n.oid = k.conrelid
        JOIN pg_depend u ON u.classid = 'pg_constraint'::regclass AND u.objid = k.oid
            AND u.refclassid = 'pg_proc'::regclass
        JOIN pg_proc p ON p.oid = u.refobjid WHERE {_foreign("pg_proc", "p")})
    AND NOT EXISTS (SELECT 1 FROM pg_index i JOIN named n ON n.oid = i.indrelid
        WHERE i.indexprs IS NOT NULL OR i.indpred IS NOT NULL)
    AND NOT EXISTS (SELECT 1 FROM pg_proc p
        WHERE p.proname = ANY(%(names)s) AND {_foreign("pg_proc", "p")})
    AND NOT EXISTS (SELECT 1 FROM pg_type y WHERE y.typtype = 'd'
        AND y.typname = ANY(%(names)s) AND y.oid >= 16384)
    AND NOT EXISTS (SELECT 1 FROM pg_operator o WHERE {_foreign("pg_operator", "o")})
    AND NOT EXISTS (SELECT 1 FROM pg_event_trigger)"""  # noqa: S608


def _only_innodb(connection: Any, names: list[str]) -> bool:
    """Return whether every table named is InnoDB's, and none has a trigger.

    A rollback undoes what InnoDB has changed. Triggers are seen by those alone
    who have the right to make them.
    """
    tables = rows(connection, _TABLES, (names, names))
    if not tables or any(
        (kind, engine, bool(is_here)) != ("BASE TABLE", "InnoDB", True)
        for kind, engine, is_here in tables
    ):
        return False
    [(may_see, triggers)] = rows(connection, _TRIGGERS, (names,))
    return bool(may_see) and not triggers


_TABLES = """SELECT TABLE_TYPE, ENGINE, TABLE_SCHEMA = DATABASE() FROM information_schema.TABLES
    WHERE (TABLE_SCHEMA = DATABASE() OR TABLE_SCHEMA IN %s) AND TABLE_NAME IN %s"""
_GRANTEE = """CONCAT('''', REPLACE(CURRENT_USER(), '@', '''@'''), '''')"""
_TRIGGERS = f"""SELECT
    EXISTS (SELECT 1 FROM information_schema.USER_PRIVILEGES
        WHERE PRIVILEGE_TYPE = 'TRIGGER' AND GRANTEE = {_GRANTEE})
    OR EXISTS (SELECT 1 FROM information_schema.SCHEMA_PRIVILEGES
        WHERE PRIVILEGE_TYPE = 'TRIGGER' AND GRANTEE = {_GRANTEE}
        AND DATABASE() LIKE TABLE_SCHEMA),
    (SELECT COUNT(*) FROM information_schema.TRIGGERS WHERE EVENT_OBJECT_TABLE IN %s)"""  # noqa: S608
