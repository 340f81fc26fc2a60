# SPDX-License-Identifier: Apache-2.0
"""
A store as it was at one moment: chains, checkpoints and rows, read without a pause.

Rows stream in the order in which they are verified, at constant memory. What they
prove is told by `fasten.evidence`.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final

import sqlalchemy as sa

from fasten.chain import Head, Note, Verifier
from fasten.evidence import ChainVerifier, Report
from fasten.repository.database import Database
from fasten.repository.insertion import dialect_of
from fasten.repository.tables import HEAD_COLUMNS, Tables, audit_tables, head_of
from fasten.rows import AUDIT_COLUMNS
from fasten.settings import Dsn

__all__ = ["Snapshot", "snapshot", "verify"]

FETCH_ROWS: Final = 500
PATIENCE_S: Final = 600.0
"""How long a server may take for the next rows: it may have to sort them first."""

Row = tuple[Any, ...]
Progress = Callable[[int, int], None]
"""Told how many rows were read, and about how many there are."""


class Snapshot:
    """
    One moment of the store at *dsn*; `snapshot()` opens it.
    """

    def __init__(self, dsn: Dsn, raw: Any) -> None:
        self._raw = raw
        self._is_postgres = dsn.backend == "postgresql"
        self._tables: Tables = audit_tables(dsn)
        self._dialect = dialect_of(dsn.backend)
        self._present = self._find_tables()
        if not self._present:
            raise FileNotFoundError(f"there is no table {self._tables.audit.fullname}")

    @property
    def audit(self) -> sa.Table:
        """
        Return the table that conditions for `rows` are about.
        """
        return self._tables.audit

    def _find_tables(self) -> set[str]:
        """
        Return which tables are there: somebody may have dropped one.
        """
        tables = self._tables
        asked = [tables.audit, tables.head, tables.node, tables.checkpoint]
        if not self._is_postgres:
            found = self._raw.execute("SELECT name FROM sqlite_schema").fetchall()
            return {t.name for t in asked} & {row[0] for row in found}
        return {t.name for t in asked if self._has_table(t)}

    def _has_table(self, table: sa.Table) -> bool:
        name = self._dialect.identifier_preparer.format_table(table)
        found = self._raw.execute("SELECT to_regclass(%s)", (name,)).fetchone()
        return bool(found and found[0] is not None)

    # -- beside the rows --

    def heads(self) -> list[Head]:
        """
        Return where each chain stands.
        """
        head = self._tables.head.c
        found = self._all(sa.select(*(head[name] for name in HEAD_COLUMNS)))
        return list(map(head_of, found))

    def nodes(self) -> dict[tuple[str, str], int]:
        """
        Return the number in each node's row.
        """
        node = self._tables.node.c
        found = self._all(sa.select(node.service_id, node.source_node_id, node.seq))
        return {(row[0], row[1]): row[2] for row in found}

    def ahead_ms(self) -> int:
        """
        Return how far ids run ahead of the times of their rows.
        """
        found = self._all(sa.select(self._tables.node.c.ahead_ms))
        return max((row[0] for row in found if type(row[0]) is int), default=0)

    def notes(self) -> list[tuple[str, str]]:
        """
        Return the stored checkpoints, each with the time at which it was stored.

        One whose columns are not what its note says comes back as no note at all.
        """
        table = self._tables.checkpoint.c
        said = [table[name] for name in _SAID]
        found = self._all(sa.select(table.note, table.created_at, *said))
        return [
            (row[0] if _is_told(row[0], row[2:]) else "", str(row[1])) for row in found
        ]

    def _all(self, query: sa.Select[Any]) -> list[Row]:
        if query.get_final_froms()[0].name not in self._present:  # type: ignore[attr-defined]
            return []
        found = self._raw.execute(self._sql(query)).fetchall()
        return [self._wire(row) for row in found]

    def _sql(self, query: sa.Select[Any]) -> str:
        return str(query.compile(dialect=self._dialect))

    # -- rows --

    def rows(
        self,
        *conditions: sa.ColumnElement[bool],
        values: Mapping[str, Any] | None = None,
    ) -> Iterator[Row]:
        """
        Yield rows in the order of AUDIT_COLUMNS, by service, node and number.

        Times are wire text, detail is the stored text. Text that is no UTF-8 comes
        back with lone surrogates in it. *values* are those of the conditions' own
        parameters.
        """
        audit = self._tables.audit
        if audit.name not in self._present:
            return iter(())
        query = (
            sa.select(*(audit.c[name] for name in AUDIT_COLUMNS))
            .where(*conditions)
            .order_by(audit.c.service_id, audit.c.source_node_id, audit.c.monotonic_seq)
        )
        compiled = query.compile(dialect=self._dialect)
        params = {**compiled.params, **(values or {})}
        if self._is_postgres:
            return self._stream(str(compiled), params)
        order: Sequence[str] = compiled.positiontup or ()
        return self._walk(str(compiled), [params[name] for name in order])

    def _walk(self, sql: str, values: Sequence[Any]) -> Iterator[Row]:
        """
        Read a SQLite table; again from where it is, if there is text in no encoding.
        """
        self._raw.text_factory = str
        done = 0
        try:
            for row in self._raw.execute(sql, values):
                done += 1
                yield row
        except sqlite3.OperationalError as error:
            if "decode" not in str(error):
                raise
        else:
            return
        self._raw.text_factory = _leniently
        cursor = self._raw.execute(sql, values)
        for _ in range(done):
            next(cursor)
        yield from cursor

    def _stream(self, sql: str, values: Mapping[str, Any]) -> Iterator[Row]:
        with self._raw.cursor(name="fasten_snapshot") as cursor:
            cursor.itersize = FETCH_ROWS
            cursor.execute(sql, values)
            for row in cursor:
                yield self._wire(row)

    def _wire(self, row: Row) -> Row:
        if not self._is_postgres:
            return tuple(row)
        return tuple(v.wire if type(v) is _Moment else v for v in row)

    def estimate(self, heads: Iterable[Head]) -> int:
        """
        Return about how many rows there are.
        """
        counts = [(head.count, head.pruned_count) for head in heads]
        return sum(a - b for a, b in counts if type(a) is int and type(b) is int)


_SAID: Final = (
    "service_id",
    "source_node_id",
    "retention_class",
    "size",
    "monotonic_seq",
    "root",
)


def _is_told(text: Any, columns: Sequence[Any]) -> bool:
    """
    Tell whether a note says what the columns beside it do.
    """
    try:
        said = Note.parse(text).checkpoint
    except (ValueError, AttributeError, TypeError):
        return False
    return tuple(columns) == (*said.key, said.size, said.seq, said.root.hex())


def _leniently(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogateescape")


# --- opening --------------------------------------------------------------------------


@contextmanager
def snapshot(dsn: Dsn) -> Iterator[Snapshot]:
    """
    Open the store at *dsn* as it is now; later writes are not seen in it.

    Raises:
        FileNotFoundError: there is no such file, or none of its tables.
        Exception: whatever the driver says; `Database.problem` tells what it means.
    """
    database = Database(dsn)
    raw = database.apart()
    try:
        if database.is_postgres:
            raw.patience_s = PATIENCE_S
            _begin_postgres(raw)
        else:
            raw.text_factory = _leniently
            raw.execute("BEGIN")
        yield Snapshot(dsn, raw)
    finally:
        raw.close()


class _Moment(str):
    """
    A timestamptz as the server spells it: also those that Python has no datetime for.
    """

    __slots__ = ()

    @property
    def wire(self) -> str:
        """
        Return it as wire text; what is no wire time stays as it is.
        """
        match = _SERVER_TIME.fullmatch(self)
        if match is None:
            return str(self)
        day, clock, fraction = match.groups(default="")
        return f"{day}T{clock}.{fraction:0<6}Z"


_SERVER_TIME: Final = re.compile(
    r"(\d{4}-\d\d-\d\d) (\d\d:\d\d:\d\d)(?:\.(\d{1,6}))?\+00"
)


def _begin_postgres(raw: Any) -> None:
    from psycopg import IsolationLevel
    from psycopg.adapt import Loader

    class MomentLoader(Loader):
        def load(self, data: Any) -> _Moment:
            return _Moment(bytes(data).decode())

    raw.adapters.register_loader("timestamptz", MomentLoader)
    raw.isolation_level = IsolationLevel.REPEATABLE_READ
    raw.read_only = True
    # One statement each: the first of them opens the transaction.
    for setting in (
        "TimeZone = 'UTC'",
        "DateStyle = 'ISO'",
        f"statement_timeout = {round(PATIENCE_S * 1000)}",
        "idle_in_transaction_session_timeout = 0",
    ):
        raw.execute(f"SET LOCAL {setting}")


# --- verifying ------------------------------------------------------------------------


def verify(
    dsn: Dsn,
    *,
    given: Iterable[str] = (),
    verifiers: Iterable[Verifier] = (),
    require_anchor: bool = False,
    progress: Progress = lambda _done, _total: None,
) -> Report:
    """
    Verify the store at *dsn*, as it is now; *given* are checkpoints kept elsewhere.

    Raises:
        FileNotFoundError: there is no such file, or none of its tables.
        Exception: whatever the driver says; `Database.problem` tells what it means.
    """
    with snapshot(dsn) as moment:
        heads = moment.heads()
        verifier = ChainVerifier(
            heads,
            nodes=moment.nodes(),
            stored=moment.notes(),
            given=given,
            verifiers=verifiers,
            require_anchor=require_anchor,
        )
        total = moment.estimate(heads)
        for done, row in enumerate(moment.rows(), 1):
            verifier.feed(row)
            if done % FETCH_ROWS == 0:
                progress(done, total)
        return verifier.finish()
