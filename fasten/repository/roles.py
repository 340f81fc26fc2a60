# SPDX-License-Identifier: Apache-2.0
"""
Who may do what in a store, as SQL for its owner: roles, functions, triggers.

On Postgres they hold against everybody but the owner and superusers. SQLite has no
roles: whoever can write to the file can drop its triggers, which only keep slips out.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.resources import files
from string import Template
from typing import Final

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from fasten.chain import COMMITTED_FIELDS, RECORD_CODES
from fasten.repository.insertion import dialect_of
from fasten.repository.schema import SCHEMA
from fasten.repository.tables import Tables, audit_tables, stream_table
from fasten.rows import AUDIT_COLUMNS
from fasten.settings import Dsn

__all__ = [
    "OWNER",
    "function_name",
    "has_function",
    "init_sql",
    "missing_rights",
    "missing_stream_rights",
    "owner_of",
    "stream_sql",
    "table_statements",
    "trigger_statements",
]

OWNER: Final = "fasten_owner"
"""The role that owns the tables: it runs DDL, and no service logs in as it."""

_DEFAULT_TABLE: Final = "audit_log"
_SEALED: Final = tuple(
    name
    for name in AUDIT_COLUMNS
    if name not in (*COMMITTED_FIELDS, "salt", "shipped_at")
)


def function_name(dsn: Dsn, verb: str) -> str:
    """
    Return the name of the function that may `prune` or `erase` in the store at *dsn*.

    It is `fasten_prune` for a table of the default name, else `<table>_prune`.
    """
    prefix = "fasten" if dsn.table == _DEFAULT_TABLE else dsn.table
    name = f"{prefix}_{verb}"
    return f'"{dsn.schema}"."{name}"' if dsn.schema else f'"{name}"'


_SIGNATURES: Final = {
    "prune": "(text,text,text,text,bigint,text)",
    "erase": "(text,text[],text[])",
}


def has_function(connection: Connection, dsn: Dsn, verb: str) -> bool:
    """
    Tell whether the owner has set up roles: then rows go through functions only.
    """
    if dsn.backend != "postgresql":
        return False
    signature = f"{function_name(dsn, verb)}{_SIGNATURES[verb]}"
    found = connection.execute(
        sa.text("SELECT to_regprocedure(:signature)"), {"signature": signature}
    )
    return found.scalar() is not None


def owner_of(connection: Connection, dsn: Dsn) -> tuple[bool, bool]:
    """
    Tell whether who is logged in owns the audit table, or is above every owner.
    """
    table = audit_tables(dsn).audit
    name = dialect_of("postgresql").identifier_preparer.format_table(table)
    asked = sa.text(
        "SELECT pg_has_role(c.relowner, 'MEMBER'), r.rolsuper "
        "FROM pg_class c, pg_roles r "
        "WHERE c.oid = to_regclass(:name) AND r.rolname = current_user"
    )
    found = connection.execute(asked, {"name": name}).first()
    return (bool(found[0]), bool(found[1])) if found else (False, False)


def missing_rights(connection: Connection, dsn: Dsn) -> list[str]:
    """
    Return what a service's role may not do and should, as the grants that are missing.
    """
    names = _names(dsn)
    wanted = [
        (right.strip(), names[table])
        for rights, tables in _RIGHTS
        for right in rights.split(",")
        for table in tables
    ]
    missing = [
        f"{right} ON {table}"
        for right, table in wanted
        if not _may(connection, right, table)
    ]
    if has_function(connection, dsn, "prune"):
        signatures = (_SIGNATURES["prune"], "()")
        calls = [f"{function_name(dsn, 'prune')}{each}" for each in signatures]
        may = "SELECT has_function_privilege(:call, 'EXECUTE')"
        missing += [
            f"EXECUTE ON FUNCTION {call}"
            for call in calls
            if not connection.execute(sa.text(may), {"call": call}).scalar()
        ]
    return missing


def missing_stream_rights(connection: Connection, dsn: Dsn, stream: str) -> list[str]:
    """
    Return what a service's role may not do to a sys or api table, and should.
    """
    table = stream_table(dsn, stream)
    name = dialect_of("postgresql").identifier_preparer.format_table(table)
    rights = [right.strip() for right in _STREAM_RIGHTS.split(",")]
    return [f"{each} ON {name}" for each in rights if not _may(connection, each, name)]


def _may(connection: Connection, right: str, table: str) -> bool:
    verb, _, column = right.partition(" ")
    if column:
        may = "SELECT has_column_privilege(:table, :column, :verb)"
    else:
        may = "SELECT has_table_privilege(:table, :verb)"
    given = {"table": table, "column": column.strip("()"), "verb": verb}
    return bool(connection.execute(sa.text(may), given).scalar())


# --- what the owner runs --------------------------------------------------------------


def init_sql(dsn: Dsn) -> str:
    """
    Return everything that the owner runs to set a store up; it may be run again.
    """
    statements = list(table_statements(dsn))
    if dsn.backend == "postgresql":
        statements = [_roles(dsn), *statements, _grants(dsn)]
    statements += trigger_statements(dsn)
    return "\n".join(f"{statement.strip()}\n" for statement in statements)


def stream_sql(dsn: Dsn, stream: str) -> str:
    """
    Return what the owner runs to set the table of a sys or api stream up.

    A service inserts its rows and deletes those that have expired.
    """
    table = stream_table(dsn, stream)
    statements = list(_made(table, dsn))
    if dsn.backend == "postgresql":
        name = dialect_of(dsn.backend).identifier_preparer.format_table(table)
        numbers = f"pg_get_serial_sequence('{name}', 'position')"
        grant = f"format('GRANT USAGE ON SEQUENCE %s TO fasten_app', {numbers})"
        statements = [
            *(_roles(dsn), *statements, *_owned(name)),
            f"GRANT {_STREAM_RIGHTS} ON {name} TO fasten_app;",
            f"DO $$ BEGIN EXECUTE {grant}; END $$;",
        ]
    return "\n".join(f"{statement.strip()}\n" for statement in statements)


def table_statements(dsn: Dsn) -> Iterator[str]:
    """
    Yield what makes the tables and says which schema they are of.
    """
    dialect = dialect_of(dsn.backend)
    for table in _all(audit_tables(dsn)):
        yield from _made(table, dsn)
    meta = dialect.identifier_preparer.format_table(audit_tables(dsn).meta)
    values = ", ".join(f"('{key}', '{SCHEMA}')" for key in ("schema", "min_writer"))
    into = f"INSERT INTO {meta} (key, value)"
    yield f"{into} VALUES {values} ON CONFLICT (key) DO NOTHING;"


def _made(table: sa.Table, dsn: Dsn) -> Iterator[str]:
    dialect = dialect_of(dsn.backend)
    made = sa.schema.CreateTable(table, if_not_exists=True)
    yield f"{str(made.compile(dialect=dialect)).strip()};"
    for index in sorted(table.indexes, key=lambda index: str(index.name)):
        made_index = sa.schema.CreateIndex(index, if_not_exists=True)
        yield f"{made_index.compile(dialect=dialect)};"


def trigger_statements(dsn: Dsn) -> list[str]:
    """
    Return what makes the functions and triggers, one statement each.
    """
    text = _template(f"{dsn.backend}.sql").substitute(_names(dsn))
    return [part for part in text.split("\n-- ;\n") if part.strip()]


def _all(tables: Tables) -> list[sa.Table]:
    names = ("audit", "node", "head", "writer", "outbox", "checkpoint", "erasure")
    return [getattr(tables, name) for name in (*names, "meta")]


def _template(name: str) -> Template:
    text = files("fasten.repository").joinpath("sql", name).read_text(encoding="utf-8")
    return Template(text.partition("\n\n")[2])  # behind its licence


def _schema(dsn: Dsn) -> str:
    # A SECURITY DEFINER function may not depend on anybody's search_path.
    return dsn.schema or "public"


def _names(dsn: Dsn) -> dict[str, str]:
    is_postgres = dsn.backend == "postgresql"
    quote = dialect_of(dsn.backend).identifier_preparer.quote_identifier
    within = f"{quote(_schema(dsn))}." if is_postgres else ""
    names = {
        table.name.removeprefix(dsn.table).lstrip("_") or "log": table.name
        for table in _all(audit_tables(dsn))
    }
    prefix = "fasten" if dsn.table == _DEFAULT_TABLE else dsn.table
    return {
        **{short: f"{within}{quote(name)}" for short, name in names.items()},
        "prune": f"{within}{quote(f'{prefix}_prune')}",
        "erase": f"{within}{quote(f'{prefix}_erase')}",
        "guard": f"{within}{quote(f'{dsn.table}_guard')}",
        "trigger": dsn.table,
        "owner": OWNER,
        "sealed_changed": "\n     OR ".join(
            f"NEW.{name} {_DIFFERS[dsn.backend]} OLD.{name}" for name in _SEALED
        ),
        "filled_in": "\n     OR ".join(
            f"NEW.{name} IS NOT NULL AND NEW.{name} {_DIFFERS[dsn.backend]} OLD.{name}"
            for name in COMMITTED_FIELDS
        ),
        "emptied": " OR ".join(
            f"(NEW.{name} IS NULL AND OLD.{name} IS NOT NULL)"
            for name in COMMITTED_FIELDS
        ),
        "committed": ", ".join(f"'{name}'" for name in COMMITTED_FIELDS),
        "records": ", ".join(f"'{name}'" for name in RECORD_CODES),
    }


_DIFFERS: Final = {"postgresql": "IS DISTINCT FROM", "sqlite": "IS NOT"}


# --- Postgres roles -------------------------------------------------------------------

_ROLES: Final = (OWNER, "fasten_app", "fasten_reader", "fasten_retention")
_MAKE_ROLE: Final = """DO $$$$ BEGIN
  IF NOT EXISTS (SELECT FROM pg_catalog.pg_roles WHERE rolname = '$role') THEN
    CREATE ROLE $role NOLOGIN;
  END IF;
EXCEPTION WHEN duplicate_object OR unique_violation THEN
  NULL;  -- made meanwhile, for another database of this server
END $$$$;"""


def _roles(dsn: Dsn) -> str:
    schema = dialect_of("postgresql").identifier_preparer.quote_identifier(_schema(dsn))
    lines = [Template(_MAKE_ROLE).substitute(role=role) for role in _ROLES]
    lines += [
        "GRANT fasten_app TO fasten_retention;",
        f"CREATE SCHEMA IF NOT EXISTS {schema};",
        f"GRANT USAGE, CREATE ON SCHEMA {schema} TO {OWNER};",
        f"GRANT USAGE ON SCHEMA {schema} TO fasten_app, fasten_reader;",
    ]
    if dsn.schema is None:
        lines.append("SET search_path = public;")
    return "\n".join(lines)


def _grants(dsn: Dsn) -> str:
    names = _names(dsn)
    lines = []
    for table in ("log", "node", "head", "writer", "outbox", "checkpoint", "erasure"):
        lines += _owned(names[table])
    lines += _owned(names["meta"])
    for right, tables in _RIGHTS:
        on = ", ".join(names[table] for table in tables)
        lines.append(f"GRANT {right} ON {on} TO fasten_app;")
    return "\n".join(lines)


_RIGHTS: Final = (
    ("SELECT, INSERT", ("log", "checkpoint")),
    ("UPDATE (shipped_at)", ("log",)),
    ("SELECT, INSERT, UPDATE", ("node", "head", "writer", "meta")),
    ("SELECT, INSERT, DELETE", ("outbox",)),
    ("SELECT", ("erasure",)),
)
"""What the role of a service may do; functions do the rest."""

_STREAM_RIGHTS: Final = "SELECT, INSERT, DELETE"
"""The same, to the table of a sys or api stream."""


def _owned(table: str) -> list[str]:
    return [
        f"ALTER TABLE {table} OWNER TO {OWNER};",
        f"REVOKE ALL ON {table} FROM PUBLIC;",
        f"GRANT SELECT ON {table} TO fasten_reader;",
    ]
