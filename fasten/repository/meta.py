# SPDX-License-Identifier: Apache-2.0
"""
What a store knows of itself: the rows of `<table>_meta`, texts by key.

Which keys there are is told by those who put them: `schema`, `pruning`, `holds`.
"""

from __future__ import annotations

import json
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from fasten.repository.tables import upsert

__all__ = ["Meta", "clock"]


class Meta:
    """
    The meta table; all of it happens in its caller's transaction.
    """

    def __init__(self, table: sa.Table) -> None:
        self._table = table

    def get(self, connection: Connection, key: str, *, is_locked: bool = False) -> Any:
        """
        Return the JSON value of *key*, or None; *is_locked* keeps others from it.
        """
        query = sa.select(self._table.c.value).where(self._table.c.key == key)
        if is_locked:
            self._claim(connection, key)
            query = query.with_for_update()
        return _read(connection.execute(query).scalar())

    def _claim(self, connection: Connection, key: str) -> None:
        """
        Make a row to lock: two that find none would both believe to be the first.
        """
        insert = upsert(self._table, connection.dialect.name)
        connection.execute(
            insert.values(key=key, value="null").on_conflict_do_nothing()
        )

    def starting(self, connection: Connection, prefix: str) -> dict[str, Any]:
        """
        Return the values of all keys that start with *prefix*, by the rest of the key.
        """
        key = self._table.c.key
        query = sa.select(key, self._table.c.value).where(
            key >= prefix, key < f"{prefix}\U0010ffff"
        )
        found = connection.execute(query.order_by(key)).all()
        return {name[len(prefix) :]: _read(value) for name, value in found}

    def put(self, connection: Connection, key: str, value: Any) -> None:
        """
        Set *key* to a JSON value.
        """
        text = json.dumps(value, ensure_ascii=False, sort_keys=True)
        insert = upsert(self._table, connection.dialect.name)
        connection.execute(
            insert.values(key=key, value=text).on_conflict_do_update(
                index_elements=["key"], set_={"value": text}
            )
        )


def _read(text: str | None) -> Any:
    """
    Read a value; what somebody else wrote there is as good as nothing.
    """
    try:
        return None if text is None else json.loads(text)
    except (ValueError, RecursionError):
        return None


def clock(dialect: str) -> sa.ColumnElement[Any]:
    """
    Return the store's own time, as its columns hold it.
    """
    if dialect == "postgresql":
        return sa.func.clock_timestamp()
    return sa.literal_column("strftime('%Y-%m-%dT%H:%M:%f', 'now') || '000Z'")
