# SPDX-License-Identifier: Apache-2.0
"""
From a query to SQL, and from columns back to rows.

A question of one shape is spelled once; asked again, only its values are new.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy import bindparam as p

from fasten.repository.database import Database
from fasten.repository.tables import INDEXED_CHARACTERS, Statement, Tables, indexed
from fasten.rows import (
    ALL_TENANTS,
    AUDIT_COLUMNS,
    AuditRow,
    Page,
    Query,
    decode_cursor,
    encode_cursor,
    format_timestamp,
    parse_timestamp,
    ulid_stamp,
)
from fasten.settings import Dsn

__all__ = [
    "AuditReader",
    "audit_conditions",
    "audit_row",
    "audit_values",
    "microseconds",
    "moment",
    "scope",
    "wire_time",
]

_TIMES: Final = ("timestamp", "stored_at", "shipped_at")
_LONG: Final = ("target", "actor")
_MOST_SHAPES: Final = 256


class AuditReader:
    """
    Reads the audit table.
    """

    def __init__(self, tables: Tables, database: Database) -> None:
        self._audit, self._node = tables.audit, tables.node
        self._database, self._dsn = database, database.dsn
        self._known: dict[tuple[Any, ...], Statement] = {}

    def page(self, query: Query) -> Page:
        """
        Return one page of rows, by id: the order in which they were emitted.
        """
        with self._database.cursor(query.within_s) as cursor:
            values = self._values(cursor, query)
            found = self._select(query).fetch(cursor, {**values, **_bounds(query)})
            total = self._count(query).fetch(cursor, values) if query.count else None
        rows = [audit_row(row) for row in found[: query.limit]]
        more = len(found) > query.limit
        after = encode_cursor("audit", rows[-1].id) if more else None
        return Page(rows=rows, next=after, total=total[0][0] if total else None)

    def between(
        self,
        place: tuple[str, str],
        after: int,
        until: int,
        query: Query,
        *,
        stored_from_us: int = 0,
    ) -> list[AuditRow]:
        """
        Return the rows of a (service, node) numbered above *after*, up to *until*.

        Of those *limit* rows of *query*, stored at *stored_from_us* or later.
        """
        given = {
            "p_service": place[0],
            "p_node": place[1],
            "p_after": after,
            "p_until_seq": until,
            "p_stored_from": moment(self._dsn, stored_from_us),
            "p_limit": query.limit,
        }
        with self._database.cursor(query.within_s) as cursor:
            values = {**self._values(cursor, query), **given}
            found = self._between(query).fetch(cursor, values)
        return [audit_row(row) for row in found]

    def total(self, query: Query) -> int:
        """
        Return how many rows *query* matches, whatever the page.
        """
        with self._database.cursor(query.within_s) as cursor:
            found = self._count(query).fetch(cursor, self._values(cursor, query))
        return int(found[0][0])

    def _values(self, cursor: Any, query: Query) -> dict[str, Any]:
        ahead_ms = 0
        if query.until_us is not None:
            most = sa.func.coalesce(sa.func.max(self._node.c.ahead_ms), 0)
            asked = self._statement(("ahead",), lambda: sa.select(most))
            ahead_ms = asked.fetch(cursor, {})[0][0]
        return audit_values(self._dsn, query, ahead_ms=ahead_ms)

    # -- statements --

    def _select(self, query: Query) -> Statement:
        shape = (query.order, query.cursor is None, *_shape(query))
        return self._statement(shape, lambda: self._selected(query))

    def _count(self, query: Query) -> Statement:
        def counted() -> sa.Select[Any]:
            conditions = audit_conditions(self._audit, self._dsn, query)
            number = sa.select(sa.func.count()).select_from(self._audit)
            return number.where(*conditions)

        return self._statement(("count", *_shape(query)), counted)

    def _between(self, query: Query) -> Statement:
        def numbered() -> sa.Select[Any]:
            columns = self._audit.c
            return (
                sa.select(*(columns[c] for c in AUDIT_COLUMNS))
                .where(
                    columns.service_id == p("p_service"),
                    columns.source_node_id == p("p_node"),
                    columns.monotonic_seq > p("p_after"),
                    columns.monotonic_seq <= p("p_until_seq"),
                    columns.stored_at >= p("p_stored_from"),
                    *audit_conditions(self._audit, self._dsn, query),
                )
                .order_by(columns.monotonic_seq)
                .limit(p("p_limit"))
            )

        return self._statement(("between", *_shape(query)), numbered)

    def _statement(
        self, shape: tuple[Any, ...], spell: Callable[[], sa.Select[Any]]
    ) -> Statement:
        known = self._known.get(shape)
        if known is None:
            # There are more shapes than anybody asks for, but for who wants to fill
            # us up.
            if len(self._known) >= _MOST_SHAPES:
                self._known.clear()
            known = self._known[shape] = Statement(spell(), self._database.readers)
        return known

    def _selected(self, query: Query) -> sa.Select[Any]:
        key, is_desc = self._audit.c.id, query.order == "desc"
        conditions = audit_conditions(self._audit, self._dsn, query)
        if query.cursor is not None:
            conditions.append(key < p("p_after") if is_desc else key > p("p_after"))
        return (
            sa.select(*(self._audit.c[c] for c in AUDIT_COLUMNS))
            .where(*conditions)
            .order_by(key.desc() if is_desc else key)
            .limit(p("p_limit"))
            .offset(p("p_offset"))
        )


def _bounds(query: Query) -> dict[str, Any]:
    # One row more than asked for tells whether there is a page behind this one.
    bounds: dict[str, Any] = {"p_limit": query.limit + 1, "p_offset": query.offset}
    if query.cursor is not None:
        bounds["p_after"] = decode_cursor("audit", query.cursor)
    return bounds


def _shape(query: Query) -> tuple[Any, ...]:
    """
    Return what the text of a query depends on: everything but its values.
    """
    return (
        query.scope is ALL_TENANTS,
        query.scope is None,
        query.since_us is None,
        query.until_us is None,
        *query.filters,
    )


def audit_conditions(
    audit: sa.Table, dsn: Dsn, query: Query
) -> list[sa.ColumnElement[bool]]:
    """
    Spell filters, scope and window of *query*; their values are in `audit_values`.
    """
    conditions = [_equals(audit, dsn, name) for name in query.filters]
    conditions += scope(audit, query, p("p_scope"))
    if query.since_us is not None:
        conditions.append(audit.c.timestamp >= p("p_since"))
        # An id never stands for an earlier time than its row: this bound is safe.
        conditions.append(audit.c.id >= p("p_first_id"))
    if query.until_us is not None:
        conditions.append(audit.c.timestamp < p("p_until"))
        conditions.append(audit.c.id < p("p_last_id"))
    return conditions


def audit_values(dsn: Dsn, query: Query, *, ahead_ms: int) -> dict[str, Any]:
    """
    Return the values of what `audit_conditions` spells.

    *ahead_ms* is how far ids may run ahead of their timestamps.
    """
    values: dict[str, Any] = {}
    for name, value in query.filters.items():
        values[f"p_{name}"] = value
        if name in _TIMES:
            values[f"p_{name}"] = moment(dsn, parse_timestamp(str(value)))
        elif name in _LONG and dsn.backend == "postgresql":
            values[f"p_{name}_head"] = str(value)[:INDEXED_CHARACTERS]
    if isinstance(query.scope, str):
        values["p_scope"] = query.scope
    if query.since_us is not None:
        values["p_since"] = moment(dsn, query.since_us)
        values["p_first_id"] = _id_at(query.since_us // 1000)
    if query.until_us is not None:
        values["p_until"] = moment(dsn, query.until_us)
        values["p_last_id"] = _id_at(query.until_us // 1000 + ahead_ms + 1)
    return values


def _id_at(ms: int) -> str:
    return f"evt-{ulid_stamp(max(0, ms))}"


def _equals(table: sa.Table, dsn: Dsn, column: str) -> sa.ColumnElement[bool]:
    equal = table.c[column] == p(f"p_{column}")
    if column in _LONG and dsn.backend == "postgresql":
        head = indexed(table, dsn, column) == p(f"p_{column}_head")
        return sa.and_(head, equal)
    return equal


def scope(
    table: sa.Table, query: Query, tenant: Any = None
) -> list[sa.ColumnElement[bool]]:
    """
    Spell what the reader may see at all: its tenant's rows.

    *tenant* stands for the tenant's id where the text is used more than once.
    """
    if query.scope is ALL_TENANTS:
        return []
    if query.scope is None:
        return [table.c.tenant_id.is_(None)]
    return [table.c.tenant_id == (query.scope if tenant is None else tenant)]


def moment(dsn: Dsn, us: int) -> datetime | str:
    """
    Spell microseconds since 1970 as a store's columns do.
    """
    if dsn.backend == "postgresql":
        return datetime.fromisoformat(format_timestamp(us))
    return format_timestamp(us)


def audit_row(row: Sequence[Any]) -> AuditRow:
    """
    Build the typed row from the columns.
    """
    values = list(row)
    if type(values[_AT[0]]) is not str:
        for at in _AT:
            values[at] = values[at] and wire_time(values[at])
    if values[_DETAIL] is not None:
        values[_DETAIL] = _detail(values[_DETAIL])
    # A page has up to a thousand rows: the slots themselves take a third of the time
    # of an __init__ of 33 keywords, which would do the same.
    made = AuditRow.__new__(AuditRow)
    for put, value in zip(_SLOTS, values, strict=True):
        put(made, value)
    return made


_AT: Final = tuple(AUDIT_COLUMNS.index(name) for name in _TIMES)
_DETAIL: Final = AUDIT_COLUMNS.index("detail")
_SLOTS: Final = tuple(getattr(AuditRow, name).__set__ for name in AUDIT_COLUMNS)
_scan: Final = json.JSONDecoder().scan_once  # type: ignore[attr-defined]


def _detail(text: str) -> dict[str, Any]:
    """
    Read a detail; what somebody wrote there that is no object is wrapped, not raised
    over: one edited row must not hide the others.
    """
    try:
        value, end = _scan(text, 0)
    except (StopIteration, ValueError, RecursionError):
        end = -1
    if end != len(text):
        value = text
    return value if isinstance(value, dict) else {"value": value}


def microseconds(moment: datetime | str) -> int:
    """
    Read a time as a store's columns hold it, in microseconds since 1970.
    """
    return parse_timestamp(moment if isinstance(moment, str) else wire_time(moment))


def wire_time(moment: datetime) -> str:
    """
    Spell a Postgres timestamp as the wire does.
    """
    delta = moment - _EPOCH
    us = (delta.days * 86_400 + delta.seconds) * 1_000_000 + delta.microseconds
    return format_timestamp(us)


_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
