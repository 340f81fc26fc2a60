# SPDX-License-Identifier: Apache-2.0
"""
From a query to SQL, and from columns back to rows.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Final

import sqlalchemy as sa

from fasten.repository.tables import INDEXED_CHARACTERS, indexed
from fasten.rows import (
    ALL_TENANTS,
    AUDIT_COLUMNS,
    AuditRow,
    Query,
    decode_cursor,
    format_timestamp,
    parse_timestamp,
    ulid_stamp,
)
from fasten.settings import Dsn

__all__ = [
    "audit_conditions",
    "audit_row",
    "audit_select",
    "moment",
    "scope",
    "wire_time",
]


def audit_select(
    audit: sa.Table, dsn: Dsn, query: Query, *, ahead_ms: int
) -> sa.Select[Any]:
    """
    Select one row more than the page that *query* asks for, by id.
    """
    key = audit.c.id
    conditions = audit_conditions(audit, dsn, query, ahead_ms=ahead_ms)
    if query.cursor is not None:
        after = decode_cursor("audit", query.cursor)
        conditions.append(key < after if query.order == "desc" else key > after)
    return (
        sa.select(*(audit.c[c] for c in AUDIT_COLUMNS))
        .where(*conditions)
        .order_by(key.desc() if query.order == "desc" else key)
        .limit(query.limit + 1)
        .offset(query.offset or None)
    )


def audit_conditions(
    audit: sa.Table, dsn: Dsn, query: Query, *, ahead_ms: int
) -> list[sa.ColumnElement[bool]]:
    """
    Spell filters, scope and window of *query*.

    *ahead_ms* is how far ids may run ahead of their timestamps.
    """
    conditions = [_equals(audit, dsn, k, v) for k, v in query.filters.items()]
    conditions += scope(audit, query)
    if query.since_us is not None:
        conditions.append(audit.c.timestamp >= moment(dsn, query.since_us))
        # An id never stands for an earlier time than its row: this bound is safe.
        first_ms = max(0, query.since_us // 1000)
        conditions.append(audit.c.id >= f"evt-{ulid_stamp(first_ms)}")
    if query.until_us is not None:
        conditions.append(audit.c.timestamp < moment(dsn, query.until_us))
        last_ms = max(0, query.until_us // 1000 + ahead_ms + 1)
        conditions.append(audit.c.id < f"evt-{ulid_stamp(last_ms)}")
    return conditions


def _equals(table: sa.Table, dsn: Dsn, column: str, value: Any) -> Any:
    if column in ("timestamp", "stored_at", "shipped_at"):
        return table.c[column] == moment(dsn, parse_timestamp(value))
    equal = table.c[column] == value
    if column in ("target", "actor") and dsn.backend == "postgresql":
        head = indexed(table, dsn, column) == str(value)[:INDEXED_CHARACTERS]
        return sa.and_(head, equal)
    return equal


def scope(table: sa.Table, query: Query) -> list[sa.ColumnElement[bool]]:
    """
    Spell what the reader may see at all: its tenant's rows.
    """
    if query.scope is ALL_TENANTS:
        return []
    if query.scope is None:
        return [table.c.tenant_id.is_(None)]
    return [table.c.tenant_id == query.scope]


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
    values = dict(zip(AUDIT_COLUMNS, row, strict=True))
    for name in ("timestamp", "stored_at", "shipped_at"):
        if isinstance(values[name], datetime):
            values[name] = wire_time(values[name])
    if values["detail"] is not None:
        values["detail"] = json.loads(values["detail"])
    return AuditRow(**values)


def wire_time(moment: datetime) -> str:
    """
    Spell a Postgres timestamp as the wire does.
    """
    delta = moment - _EPOCH
    us = (delta.days * 86_400 + delta.seconds) * 1_000_000 + delta.microseconds
    return format_timestamp(us)


_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
