# SPDX-License-Identifier: Apache-2.0
"""
The rows of a durable sys or api stream: appended, read, expired.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, Final, Literal

import attrs
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

__all__ = ["SEARCHED", "StreamRepository"]

SEARCHED: Final = 20_000
"""How many rows a page of a search for text looks at."""


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

        With *q* a page looks at no more than `SEARCHED` rows: it may hold few or
        none, and its `next` goes on from there.
        """
        source = self._searched(query) if query.q is not None else self.table
        conditions = self._conditions(query, source)
        with self.database.reading(query.within_s) as connection:
            found = connection.execute(self._select(query, source, conditions)).all()
            total = self._total(connection, query) if query.count else None
            after = found[query.limit - 1][0] if len(found) > query.limit else None
            if after is None and query.q is not None:
                after = self._end(connection, query, source)
        return Page(
            rows=[self._row(row) for row in found[: query.limit]],
            next=None if after is None else encode_cursor(self.stream, after),
            total=total,
        )

    def _total(self, connection: sa.Connection, query: Query) -> int | None:
        source: Any = self.table
        if query.q is not None:
            source = self._searched(attrs.evolve(query, cursor=None))
            if self._end(connection, query, source) is not None:
                return None
        conditions = self._conditions(query, source)
        counted = sa.select(sa.func.count()).select_from(source).where(*conditions)
        return int(connection.execute(counted).scalar_one())

    def _select(self, query: Query, source: Any, conditions: list[Any]) -> Any:
        return (
            sa.select(source)
            .where(*conditions, *self._after(query, source))
            .order_by(_in_order(query, source))
            .limit(query.limit + 1)
            .offset(query.offset or None)
        )

    def _after(self, query: Query, source: Any) -> list[Any]:
        if query.cursor is None:
            return []
        after = _position(self.stream, query.cursor)
        position = source.c.position
        return [position < after if query.order == "desc" else position > after]

    def _searched(self, query: Query) -> Any:
        """
        Return the next rows that all but *q* asks for, as a table to search in.
        """
        bare = attrs.evolve(query, q=None)
        return (
            sa.select(self.table)
            .where(*self._conditions(bare, self.table), *self._after(bare, self.table))
            .order_by(_in_order(query, self.table))
            .limit(SEARCHED)
            .subquery("searched")
        )

    @staticmethod
    def _end(connection: sa.Connection, query: Query, searched: Any) -> int | None:
        """
        Return the position at which a search stopped; None where no rows are left.
        """
        position = searched.c.position
        last = sa.func.min if query.order == "desc" else sa.func.max
        asked = sa.select(sa.func.count(), last(position)).select_from(searched)
        number, end = connection.execute(asked).one()
        return int(end) if number >= SEARCHED else None

    def _conditions(self, query: Query, table: Any) -> list[Any]:
        dsn = self.dsn
        conditions = [table.c[k] == v for k, v in query.filters.items()]
        conditions += scope(table, query)
        if query.since_us is not None:
            conditions.append(table.c.timestamp >= moment(dsn, query.since_us))
        if query.until_us is not None:
            conditions.append(table.c.timestamp < moment(dsn, query.until_us))
        if query.q is not None:
            # The fields are JSON text, in which quotes and line ends are escapes.
            spelt = json.dumps(query.q, ensure_ascii=False)[1:-1]
            conditions.append(
                table.c.event.icontains(query.q, autoescape=True)
                | table.c.fields.icontains(spelt, autoescape=True)
            )
        return conditions

    def _row(self, row: Any) -> SysRow | ApiRow:
        values = dict(zip(("position", *self._columns, "fields"), row, strict=True))
        del values["position"]
        values["fields"] = json.loads(values["fields"])
        if isinstance(values["timestamp"], datetime):
            values["timestamp"] = wire_time(values["timestamp"])
        return SysRow(**values) if self.stream == "sys" else ApiRow(**values)

    def sweep(
        self, before_us: int, limit: int = 10_000, service_id: str | None = None
    ) -> int:
        """
        Delete up to *limit* rows older than *before_us*; return how many.

        Of one service where *service_id* names it: services may share a table, and
        keep their rows for different times.
        """
        table = self.table
        expired = (
            sa.select(table.c.position)
            .where(table.c.timestamp < moment(self.dsn, before_us))
            .order_by(table.c.timestamp)
            .limit(limit)
        )
        if service_id is not None:
            expired = expired.where(table.c.service_id == service_id)
        with self.database.transaction() as connection:
            done = connection.execute(
                table.delete().where(table.c.position.in_(expired.scalar_subquery()))
            )
            return int(done.rowcount)


def _in_order(query: Query, source: Any) -> Any:
    position = source.c.position
    return position.desc() if query.order == "desc" else position


def _position(stream: str, cursor: str) -> int:
    key = decode_cursor(stream, cursor)
    if not (key.isdigit() and len(key) < 19):
        raise InvalidQuery("cursor is not from a page of this store", "cursor")
    return int(key)
