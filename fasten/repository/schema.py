# SPDX-License-Identifier: Apache-2.0
"""
The tables of a repository: made, checked, migrated.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from fasten.repository.database import Database, SchemaProblem

__all__ = ["SCHEMA", "Schema"]

SCHEMA: Final = 1
"""The number of the newest migration; what this version writes."""


class Schema:
    """
    The tables of one repository: made, checked, migrated.
    """

    def __init__(self, database: Database, tables: Sequence[sa.Table]) -> None:
        self._database = database
        self._tables = tables
        self._is_ready = False

    def ensure(self) -> None:
        """
        Make what is missing, once; nothing runs against an up-to-date store.

        Raises:
            SchemaProblem: the tables cannot be made, or are newer than this version.
        """
        if self._is_ready:
            return
        if not self._exists():
            self._create()
        self._check_version()
        self._is_ready = True

    def forget(self) -> None:
        """
        Look again before the next write.
        """
        self._is_ready = False

    @property
    def _meta(self) -> sa.Table | None:
        return next((t for t in self._tables if t.name.endswith("_meta")), None)

    def _exists(self) -> bool:
        with self._database.transaction() as connection:
            inspector = sa.inspect(connection)
            return all(
                inspector.has_table(t.name, schema=t.schema) for t in self._tables
            )

    def _create(self) -> None:
        database = self._database
        try:
            with database.transaction() as connection:
                if database.is_postgres:
                    # Two processes that start together must not both make a table.
                    connection.execute(
                        sa.text(
                            "SELECT pg_advisory_xact_lock(hashtext('fasten schema'))"
                        )
                    )
                self._tables[0].metadata.create_all(connection, list(self._tables))
                self._write_version(connection)
        except sa.exc.ProgrammingError as error:
            raise SchemaProblem(
                f"{database.problem(error).message} (table {self._tables[0].fullname})"
            ) from None

    def _write_version(self, connection: Connection) -> None:
        if self._meta is None:
            return
        known = set(connection.execute(sa.select(self._meta.c.key)).scalars())
        for key, value in (("schema", str(SCHEMA)), ("min_writer", str(SCHEMA))):
            if key not in known:
                connection.execute(self._meta.insert().values(key=key, value=value))

    def _check_version(self) -> None:
        if self._meta is None:
            return
        with self._database.transaction() as connection:
            found = dict(
                connection.execute(
                    sa.select(self._meta.c.key, self._meta.c.value)
                ).all()
            )
        needed = int(found.get("min_writer", SCHEMA))
        if needed > SCHEMA:
            raise SchemaProblem(
                f"the store asks for writers of schema {needed}, this fasten writes "
                f"{SCHEMA}; upgrade fasten (rows are kept until then)"
            )
