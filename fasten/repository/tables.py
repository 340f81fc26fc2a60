# SPDX-License-Identifier: Apache-2.0
"""
The Core tables of a DSN, and statements over them compiled once.

Plain SQL over these tables is supported API.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Final

import attrs
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import Connection, Engine

from fasten.chain import Head
from fasten.rows import API_COLUMNS, AUDIT_COLUMNS, SYS_COLUMNS
from fasten.settings import Dsn

__all__ = [
    "HEAD_COLUMNS",
    "INDEXED_CHARACTERS",
    "Statement",
    "Tables",
    "audit_tables",
    "head_of",
    "indexed",
    "stream_table",
    "upsert",
]

INDEXED_CHARACTERS: Final = 128
"""How much of a long text a Postgres index holds."""


@attrs.frozen
class Tables:
    """
    The audit table of one DSN and the side tables whose names follow from it.
    """

    audit: sa.Table
    node: sa.Table
    head: sa.Table
    writer: sa.Table
    outbox: sa.Table
    checkpoint: sa.Table
    erasure: sa.Table
    meta: sa.Table


HEAD_COLUMNS: Final = tuple(field.name for field in attrs.fields(Head))
"""The columns of the head table, in the order of the fields of `Head`."""

_NUMBERS: Final = {"monotonic_seq"}
_MOMENTS: Final = {"timestamp", "stored_at", "shipped_at"}
_NULLABLE: Final = {
    *("on_behalf_of", "tenant_id", "client", "reason", "trace_id", "span_id"),
    *("shipped_at", "actor", "target", "detail"),
}


def head_of(row: Sequence[Any]) -> Head:
    """
    Build a head from its columns, in the order of HEAD_COLUMNS.
    """
    return Head(**dict(zip(HEAD_COLUMNS, row, strict=True)))


def audit_tables(dsn: Dsn) -> Tables:
    """
    Build the Core tables of an audit DSN.
    """
    metadata = sa.MetaData(schema=dsn.schema)
    text, big, moment = _types(dsn)

    def column(
        name: str, kind: Any = text, *more: Any, **options: Any
    ) -> sa.Column[Any]:
        return sa.Column(name, kind, *more, **{"nullable": False, **options})

    def side(suffix: str, *columns: sa.Column[Any]) -> sa.Table:
        return sa.Table(f"{dsn.table}_{suffix}", metadata, *columns)

    def place() -> list[sa.Column[Any]]:
        return [
            column("service_id", primary_key=True),
            column("source_node_id", primary_key=True),
        ]

    return Tables(
        audit=_audit_table(dsn, metadata),
        node=side(
            "node",
            *place(),
            column("seq", big),
            # How far ids of this node run ahead of their timestamps: a clock that
            # stepped back. Bounds a search by time in the index of ids.
            column("ahead_ms", big),
            column("updated_at", moment),
        ),
        head=side(
            "head",
            *place(),
            column("retention_class", primary_key=True),
            column("seq", big),
            column("hash"),
            column("count", big),
            column("frontier"),
            column("pruned_seq", big),
            column("pruned_hash"),
            column("pruned_count", big),
            column("pruned_frontier"),
            column("checkpointed_at", moment, nullable=True),
        ),
        writer=side(
            "writer",
            column("writer_id", primary_key=True),
            column("service_id"),
            column("source_node_id"),
            column("watermark", big),
            column("updated_at", moment),
            # The newest erasure that the writer has followed, to its last file.
            column("followed_at", moment, nullable=True),
        ),
        outbox=side(
            "outbox",
            # An identity, unlike a serial, asks for no right on a sequence: INSERT on
            # the table is all that a business role needs.
            column("position", _counter(dsn), sa.Identity(), primary_key=True),
            column("id", unique=True),
            column("service_id"),
            column("source_node_id"),
            column("payload"),
            column("created_at", moment),
        ),
        checkpoint=side(
            "checkpoint",
            *place(),
            column("retention_class", primary_key=True),
            column("size", big, primary_key=True, autoincrement=False),
            # An idle chain is signed once a day at the same size.
            column("created_at", moment, primary_key=True),
            column("monotonic_seq", big),
            column("root"),
            column("note"),
        ),
        erasure=side(
            "erasure",
            column("field", primary_key=True),
            column("salt", primary_key=True),
            column("digest", primary_key=True),
            column("erased_at", moment),
            column("fields", nullable=True),
            column("reason", nullable=True),
        ),
        meta=side("meta", column("key", primary_key=True), column("value")),
    )


def _audit_table(dsn: Dsn, metadata: sa.MetaData) -> sa.Table:
    text, big, moment = _types(dsn)
    kinds = dict.fromkeys(_NUMBERS, big) | dict.fromkeys(_MOMENTS, moment)
    table = sa.Table(
        dsn.table,
        metadata,
        *(
            sa.Column(
                name,
                kinds.get(name, text),
                nullable=name in _NULLABLE,
                primary_key=name == "id",
            )
            for name in AUDIT_COLUMNS
        ),
        # Its name tells a number that was used twice from an id that was met twice.
        sa.UniqueConstraint(
            "service_id", "source_node_id", "monotonic_seq", name=f"{dsn.table}_seq_key"
        ),
    )
    sa.Index(f"{dsn.table}_request_id_idx", table.c.request_id)
    for name in ("target", "actor"):
        # With the id behind it, the newest page of a busy actor needs no sort.
        sa.Index(f"{dsn.table}_{name}_idx", indexed(table, dsn, name), table.c.id)
    return table


def stream_table(dsn: Dsn, stream: str) -> sa.Table:
    """
    Build the Core table of a sys or api DSN.
    """
    text, big, moment = _types(dsn)
    kinds = {
        "timestamp": moment,
        "status": big,
        "bytes": big,
        "duration_ms": sa.Float(),
        "complete": sa.Boolean(),
    }
    columns = SYS_COLUMNS if stream == "sys" else API_COLUMNS
    table = sa.Table(
        dsn.table,
        sa.MetaData(schema=dsn.schema),
        sa.Column("position", _counter(dsn), primary_key=True, autoincrement=True),
        *(sa.Column(name, kinds.get(name, text)) for name in columns),
        sa.Column("fields", text, nullable=False),
    )
    sa.Index(f"{dsn.table}_request_id_idx", table.c.request_id)
    sa.Index(f"{dsn.table}_timestamp_idx", table.c.timestamp)
    return table


def _types(dsn: Dsn) -> tuple[Any, Any, Any]:
    if dsn.backend == "postgresql":
        # Byte order, whatever the database's locale: ids sort as they were minted.
        text = sa.Text(collation="C")
        return text, sa.BigInteger(), sa.DateTime(timezone=True)
    return sa.Text(), sa.Integer(), sa.Text()


def _counter(dsn: Dsn) -> Any:
    return sa.BigInteger() if dsn.backend == "postgresql" else sa.Integer()


def indexed(table: sa.Table, dsn: Dsn, column: str) -> Any:
    """
    Return what is indexed of a text that may be long.

    A Postgres index row holds 2,700 bytes; an anchor may have 16,384.
    """
    if dsn.backend == "postgresql":
        return sa.func.left(table.c[column], sa.literal_column(str(INDEXED_CHARACTERS)))
    return table.c[column]


def upsert(table: sa.Table, dialect: str) -> Any:
    """
    Return an INSERT that knows ON CONFLICT, as both stores spell it.
    """
    return (postgresql if dialect == "postgresql" else sqlite).insert(table)


class Statement:
    """
    A Core statement compiled once and run through the driver: a fifth of the cost.
    """

    def __init__(self, statement: Any, engine: Engine) -> None:
        compiled = statement.compile(dialect=engine.dialect)
        self.sql = str(compiled)
        self._order: list[str] | None = compiled.positiontup
        self._fixed: dict[str, Any] = {
            k: v for k, v in compiled.params.items() if v is not None
        }

    def run(self, connection: Connection, **given: Any) -> Any:
        """
        Execute with the named values.
        """
        return connection.exec_driver_sql(self.sql, self._values(given))

    def fetch(self, cursor: Any, given: dict[str, Any]) -> list[Any]:
        """
        Return all rows, as the driver gives them: wrapping them costs more than
        finding them.
        """
        cursor.execute(self.sql, self._values(given))
        rows: list[Any] = cursor.fetchall()
        return rows

    def run_many(self, connection: Connection, given: Iterable[dict[str, Any]]) -> None:
        """
        Execute once for each set of named values.
        """
        for values in given:
            self.run(connection, **values)

    def _values(self, given: dict[str, Any]) -> Any:
        values = {**self._fixed, **given}
        if self._order is None:
            return values
        return tuple(values[name] for name in self._order)
