# SPDX-License-Identifier: Apache-2.0
"""
The rows of a durable sys or api stream: appended, read, expired.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, Literal

import sqlalchemy as sa

from fasten.errors import InvalidQuery
from fasten.repository.database import Database
from fasten.repository.reading import moment, scope, wire_time
from fasten.repository.schema import Schema
from fasten.repository.tables import stream_table
from fasten.rows import (
    API_COLUMNS,
    SYS_COLUMNS,
    ApiRow,
    Page,
    Query,
    SysRow,
    decode_cursor,
    encode_cursor,
    parse_timestamp,
)
from fasten.settings import Dsn

__all__ = ["StreamRepository"]


class StreamRepository:
    """
    Append, read and expire the rows of a durable sys or api stream.
    """

    def __init__(
        self, dsn: Dsn, stream: Literal["sys", "api"], database: Database | None = None
    ) -> None:
        self.dsn, self.stream = dsn, stream
        self.database = database or Database(dsn)
        self._table: sa.Table | None = None
        self._schema: Schema | None = None

    @property
    def table(self) -> sa.Table:
        """
        Return the Core table.
        """
        if self._table is None:
            self._table = stream_table(self.dsn, self.stream)
        return self._table

    @property
    def schema(self) -> Schema:
        """
        Return what makes and checks the table.
        """
        if self._schema is None:
            self._schema = Schema(self.database, [self.table])
        return self._schema

    @property
    def _columns(self) -> tuple[str, ...]:
        return SYS_COLUMNS if self.stream == "sys" else API_COLUMNS

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """
        Store rows in wire form, in one transaction.
        """
        if not rows:
            return
        self.schema.ensure()
        try:
            with self.database.transaction() as connection:
                connection.execute(self.table.insert(), [self._values(r) for r in rows])
        except Exception as error:  # looked at, and raised again
            if self.database.problem(error).kind == "setup":
                self.schema.forget()
            raise

    def _values(self, row: Mapping[str, Any]) -> dict[str, Any]:
        fixed = {c: row.get(c) for c in self._columns}
        fixed["timestamp"] = moment(self.dsn, parse_timestamp(row["timestamp"]))
        free = {k: v for k, v in row.items() if k not in fixed and k != "shape"}
        fixed["fields"] = json.dumps(free, ensure_ascii=False, separators=(",", ":"))
        return fixed

    def query(self, query: Query) -> Page:
        """
        Return one page of rows in the order in which they were stored.
        """
        position = self.table.c.position
        conditions = self._conditions(query)
        with self.database.reading(query.within_s) as connection:
            found = connection.execute(self._select(query, conditions)).all()
            total = None
            if query.count:
                counted = sa.select(sa.func.count(position)).where(*conditions)
                total = int(connection.execute(counted).scalar_one())
        rows = [self._row(row) for row in found[: query.limit]]
        more = len(found) > query.limit
        after = encode_cursor(self.stream, found[query.limit - 1][0]) if more else None
        return Page(rows=rows, next=after, total=total)

    def _select(self, query: Query, conditions: list[Any]) -> Any:
        position = self.table.c.position
        if query.cursor is not None:
            after = _position(self.stream, query.cursor)
            down = query.order == "desc"
            conditions = [*conditions, position < after if down else position > after]
        return (
            sa.select(self.table)
            .where(*conditions)
            .order_by(position.desc() if query.order == "desc" else position)
            .limit(query.limit + 1)
            .offset(query.offset or None)
        )

    def _conditions(self, query: Query) -> list[Any]:
        table, dsn = self.table, self.dsn
        conditions = [table.c[k] == v for k, v in query.filters.items()]
        conditions += scope(table, query)
        if query.since_us is not None:
            conditions.append(table.c.timestamp >= moment(dsn, query.since_us))
        if query.until_us is not None:
            conditions.append(table.c.timestamp < moment(dsn, query.until_us))
        if query.q is not None:
            conditions.append(
                table.c.event.icontains(query.q, autoescape=True)
                | table.c.fields.icontains(query.q, autoescape=True)
            )
        return conditions

    def _row(self, row: Any) -> SysRow | ApiRow:
        values = dict(zip(("position", *self._columns, "fields"), row, strict=True))
        del values["position"]
        values["fields"] = json.loads(values["fields"])
        if isinstance(values["timestamp"], datetime):
            values["timestamp"] = wire_time(values["timestamp"])
        return SysRow(**values) if self.stream == "sys" else ApiRow(**values)

    def sweep(self, before_us: int, limit: int = 10_000) -> int:
        """
        Delete up to *limit* rows older than *before_us*; return how many.
        """
        table = self.table
        expired = (
            sa.select(table.c.position)
            .where(table.c.timestamp < moment(self.dsn, before_us))
            .limit(limit)
        )
        with self.database.transaction() as connection:
            done = connection.execute(
                table.delete().where(table.c.position.in_(expired.scalar_subquery()))
            )
            return int(done.rowcount)


def _position(stream: str, cursor: str) -> int:
    key = decode_cursor(stream, cursor)
    if not (key.isdigit() and len(key) < 19):
        raise InvalidQuery("cursor is not from a page of this store", "cursor")
    return int(key)
