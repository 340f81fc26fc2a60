# SPDX-License-Identifier: Apache-2.0
"""
Audit rows: appended under the node's lock, numbered, sealed; and read.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, cached_property, partial
from operator import itemgetter
from typing import Any, Final

import attrs
import sqlalchemy as sa
from sqlalchemy import bindparam as p
from sqlalchemy.engine import Connection

from fasten import chain
from fasten.codes import registry
from fasten.context import current_request_id, sentinel
from fasten.records import FASTEN, Author, own_row
from fasten.repository.arrivals import Arrivals
from fasten.repository.database import Database, SchemaProblem
from fasten.repository.erasures import Erasure, Erasures
from fasten.repository.holds import Holds, covered
from fasten.repository.meta import Meta, clock
from fasten.repository.reading import (
    AuditReader,
    microseconds,
    moment,
    wire_time,
)
from fasten.repository.schema import Schema
from fasten.repository.tables import (
    HEAD_COLUMNS,
    Statement,
    Tables,
    audit_tables,
    head_of,
    upsert,
)
from fasten.rows import (
    AUDIT_COLUMNS,
    AuditRow,
    Page,
    Pending,
    Query,
    UlidMinter,
    canonical_json,
    ulid_ms,
    ulid_stamp,
)
from fasten.settings import Dsn

__all__ = [
    "MOST_IDS",
    "AuditRepository",
    "StoreWentBack",
    "Writer",
    "erasure_details",
    "first_key",
]

Load = Callable[[list[tuple[Any, ...]]], None]

PIECE_ROWS: Final = 32
"""So many rows are sealed, and inserted, before other threads get their turn."""
COPY_ROWS: Final = 16
"""The same where inserting them does not give up the interpreter for long."""
MOST_IDS: Final = 1000
"""How many rows one AUDIT_ROW_ERASED row names."""


@attrs.frozen
class Writer:
    """
    The process incarnation that a batch comes from: its rows carry its place.
    """

    id: str
    service: str
    node: str


class StoreWentBack(Exception):
    """
    The store does not know any more what this process has stored in it.

    *reached* is the index through which it still accounts for the writer's rows.
    """

    def __init__(self, reached: int) -> None:
        super().__init__(f"the store went back, to row {reached} of this writer")
        self.reached = reached


class AuditRepository:
    """
    Append, seal and read audit rows.
    """

    def __init__(
        self,
        dsn: Dsn,
        database: Database | None = None,
        *,
        entropy: Callable[[int], bytes] = os.urandom,
        author: Author = FASTEN,
    ) -> None:
        self.dsn = dsn
        self.database = database or Database(dsn)
        self.author = author
        self.entropy = entropy
        self._ulids, self._pid = UlidMinter(entropy), os.getpid()
        self._tables: Tables | None = None
        self._schema: Schema | None = None
        self._sql: dict[str, Statement] = {}
        # The highest number of each (service, node) that a commit has answered for,
        # and what this process has last made of it, committed or not.
        self._seen: dict[tuple[str, str], int] = {}
        self._noted: dict[tuple[str, str], tuple[int, list[chain.Head]]] = {}

    @property
    def tables(self) -> Tables:
        """
        Return the Core tables; plain SQL over them is supported.
        """
        if self._tables is None:
            self._tables = audit_tables(self.dsn)
        return self._tables

    def moment(self, us: int) -> Any:
        """
        Spell microseconds since 1970 as the columns do.
        """
        return moment(self.dsn, us)

    @cached_property
    def meta(self) -> Meta:
        """
        Return what the store knows of itself.
        """
        return Meta(self.tables.meta)

    @cached_property
    def holds(self) -> Holds:
        """
        Return the legal holds.
        """
        return Holds(self.meta)

    @property
    def schema(self) -> Schema:
        """
        Return what makes and checks the tables.
        """
        if self._schema is None:
            self._schema = Schema(
                self.database, attrs.astuple(self.tables, recurse=False)
            )
        return self._schema

    # -- appending --

    def append(
        self,
        writer: Writer,
        rows: Sequence[tuple[int, Any]],
        last: int,
        *,
        reached: int = 0,
        pause: Callable[[], None] = lambda: None,
        before_commit: Callable[[], None] = lambda: None,
    ) -> list[tuple[Any, ...]]:
        """
        Store a batch in one transaction; return the stored rows, as columns.

        Rows at or below the writer's watermark are in the store already and are
        left out. *last* 0 means that the rows have no place in a journal.
        *pause* is called between two pieces, *before_commit* when all rows are in, and
        may raise. *reached* is the index that the store has to account for.

        Raises:
            StoreWentBack: it does not.
            Exception: whatever the driver says; nothing is stored then, unless it
                is CommitUnanswered. `Database.problem` tells what it means.
        """
        self.schema.ensure()
        try:
            return self._append(
                writer, rows, last, frozenset(), reached, pause, before_commit
            )
        except Exception as error:  # looked at, and raised again if not ours
            if not self._is_known_id(error):
                self._look_again(error)
                raise
        known = self._known_ids([row[0] for _, row in rows])
        return self._append(writer, rows, last, known, reached, pause, before_commit)

    def _append(
        self,
        writer: Writer,
        rows: Sequence[tuple[int, Any]],
        last: int,
        known: frozenset[str],
        reached: int,
        pause: Callable[[], None],
        before_commit: Callable[[], None],
    ) -> list[tuple[Any, ...]]:
        with self.database.transaction() as connection:
            node = self._lock_node(connection, writer)
            mark = self._watermark(connection, writer) if last else -1
            place = (writer.service, writer.node)
            if (last and mark < reached) or node[0] < self._seen.get(place, 0):
                raise StoreWentBack(max(0, min(mark, reached)))
            fresh = [row for index, row in rows if index > mark or not last]
            if known:
                fresh = [row for row in fresh if row[0] not in known]
            sealed = self._add(connection, writer, node, fresh, pause)
            if last > mark and last:
                self._statement("mark").run(
                    connection,
                    writer_id=writer.id,
                    service_id=writer.service,
                    source_node_id=writer.node,
                    watermark=last,
                    updated_at=node[2],
                )
            before_commit()
        self._seen[place] = node[0] + len(sealed)
        return sealed

    def lock(self, connection: Connection, writer: Writer) -> int:
        """
        Keep others of the writer's node out, until the transaction ends; return its
        highest number.
        """
        return self._lock_node(connection, writer)[0]

    def memory(self, service: str, node: str) -> chain.Memory | None:
        """
        Return what this process knows of a node, at the most.
        """
        noted = self._noted.get((service, node))
        return None if noted is None else chain.Memory.of(service, node, *noted)

    def forget(self, service: str, node: str) -> None:
        """
        Take the node's numbers from the store: that it went back is on record.
        """
        self._seen.pop((service, node), None)

    def append_within(
        self, connection: Connection, writer: Writer, rows: Sequence[Any]
    ) -> list[tuple[Any, ...]]:
        """
        Store rows in a transaction that the caller holds; return them, as columns.

        Rows whose id is in the store already are left out.

        Raises:
            Exception: whatever the driver says; the transaction has to be rolled back.
        """
        node = self._lock_node(connection, writer)
        known = self._ids_among(connection, [row[0] for row in rows])
        fresh = [row for row in rows if row[0] not in known]
        return self._add(connection, writer, node, fresh)

    def record_within(
        self,
        connection: Connection,
        writer: Writer,
        records: Iterable[tuple[str, str, Mapping[str, Any]]],
    ) -> list[tuple[Any, ...]]:
        """
        Store rows of fasten's own, (code, target, detail), in a caller's transaction.

        Raises:
            Exception: whatever the driver says; the transaction has to be rolled back.
        """
        node = self._lock_node(connection, writer)
        rows = [
            self.own_row(code, target, said, node[2]) for code, target, said in records
        ]
        return self._add(connection, writer, node, rows)

    def own_row(
        self, code: str, target: str, detail: Mapping[str, Any], now: Any
    ) -> tuple[Any, ...]:
        """
        Make a row of fasten's own, of *now* by the store's clock.
        """
        registry.ensure()
        us = microseconds(now)
        return tuple(
            own_row(
                registry.entries[code],
                target,
                canonical_json(detail),
                id=self._next_id(us),
                timestamp_us=us,
                request_id=current_request_id() or sentinel(),
                author=self.author,
            )
        )

    def _next_id(self, us: int) -> str:
        if self._pid != os.getpid():  # forked: the parent counts on from here, too
            self._ulids.reseed()
            self._pid = os.getpid()
        return self._ulids(us * 1000)

    def _add(
        self,
        connection: Connection,
        writer: Writer,
        node: tuple[int, int, Any],
        fresh: list[Any],
        pause: Callable[[], None] = lambda: None,
    ) -> list[tuple[Any, ...]]:
        """
        Number, seal and insert rows; move the node and the heads on.
        """
        seq, ahead, now = node
        heads = self._heads(connection, writer)
        going_on = {name for name, head in heads.items() if not head.is_empty}
        doomed = self._doomed(connection, fresh)
        seal = partial(self._seal, connection, writer, heads, now, pause)
        sealed, worst = seal(fresh, seq, doomed)
        ahead = max(ahead, worst)
        if doomed:
            said = self._said_erased(doomed, now)
            sealed += seal(said, seq + len(sealed), {})[0]
            fresh = [*fresh, *said]
        end = seq + len(sealed)
        self._advance(connection, writer, heads, end, now, ahead, fresh)
        self._note_first(connection, heads, going_on, sealed)
        self._noted[writer.service, writer.node] = end, list(heads.values())
        return sealed

    def _doomed(
        self, connection: Connection, fresh: list[Any]
    ) -> dict[str, list[Erasure]]:
        """
        Return the erasures about rows that were on their way meanwhile, by their ids.
        """
        if not fresh:
            return {}
        # Entries stay for years; those of before the oldest row are about none of them.
        since = self.moment(min(map(_TIME, fresh)))
        found = self._statement("erasures").run(connection, since=since)
        ledger = Erasures(Erasure.read(row[:5], microseconds(row[5])) for row in found)
        doomed = ledger.among(fresh)
        if not doomed:
            return doomed
        holds = self.holds.active(connection)
        rows = {row[0]: dict(zip(Pending._fields, row, strict=True)) for row in fresh}
        return {k: found for k, found in doomed.items() if not covered(holds, rows[k])}

    def _said_erased(
        self, doomed: dict[str, list[Erasure]], now: Any
    ) -> list[tuple[Any, ...]]:
        """
        Make the records that name rows which are stored already erased.
        """
        named: dict[Erasure, list[str]] = {}
        for id_, entries in doomed.items():
            for entry in entries:
                named.setdefault(entry, []).append(id_)
        return [
            self.own_row("AUDIT_ROW_ERASED", ids[0], detail, now)
            for entry, ids in named.items()
            for detail in erasure_details(ids, entry.fields, entry.reason)
        ]

    def _lock_node(
        self, connection: Connection, writer: Writer
    ) -> tuple[int, int, Any]:
        """
        Lock the node's row; return its number, its clock offset and the time.
        """
        place = {"service_id": writer.service, "source_node_id": writer.node}
        found = self._statement("node").run(connection, **place).first()
        if found is None:
            self._statement("new_node").run(connection, **place)
            found = self._statement("node").run(connection, **place).first()
        return found[0], found[1], found[2]

    def _heads(self, connection: Connection, writer: Writer) -> dict[str, chain.Head]:
        found = self._statement("heads").run(
            connection, service_id=writer.service, source_node_id=writer.node
        )
        heads = [head_of(row) for row in found]
        for head in heads:
            self._refuse_edited(head)
        return {head.retention_class: head for head in heads}

    def _refuse_edited(self, head: chain.Head) -> None:
        # Nothing can be linked to it, and it is no row's fault.
        if not chain.is_frontier(head.frontier, head.count):
            raise SchemaProblem(
                f"the head of {'/'.join(head.key)} in {self.dsn.table} was edited; run "
                "`fasten verify`, then restore it from a backup"
            )

    def _watermark(self, connection: Connection, writer: Writer) -> int:
        found = (
            self._statement("watermark").run(connection, writer_id=writer.id).first()
        )
        return found[0] if found else 0

    def watermarks(self, writer_ids: Iterable[str]) -> dict[str, int]:
        """
        Return the `watermark` of each writer.
        """
        self.schema.ensure()
        with self.database.transaction() as connection:
            marks = {}
            for id_ in writer_ids:
                found = self._statement("watermark").run(connection, writer_id=id_)
                row = found.first()
                marks[id_] = row[0] if row else 0
        return marks

    def _seal(
        self,
        connection: Connection,
        writer: Writer,
        heads: dict[str, chain.Head],
        now: Any,
        pause: Callable[[], None],
        fresh: list[Any],
        seq: int,
        doomed: Mapping[str, list[Erasure]],
    ) -> tuple[list[tuple[Any, ...]], int]:
        """
        Seal and insert; return the rows, and by how much their ids run ahead.
        """
        sealed: list[tuple[Any, ...]] = []
        worst = 0
        with self._loader(connection) as load:
            size = COPY_ROWS if self.database.is_postgres else PIECE_ROWS
            for start in range(0, len(fresh), size):
                if start:
                    pause()
                piece = fresh[start : start + size]
                part = chain.seal(
                    piece,
                    service=writer.service,
                    node=writer.node,
                    first_seq=seq + start + 1,
                    heads=heads,
                    salts=self.entropy(chain.SALT_BYTES * len(piece)),
                    stored_at=now if isinstance(now, str) else wire_time(now),
                )
                if doomed:
                    part = [_without(row, doomed) for row in part]
                load(part)
                sealed += part
                worst = max(worst, _ahead_ms(piece))
        return sealed, worst

    @contextmanager
    def _loader(self, connection: Connection) -> Iterator[Load]:
        """
        Yield what inserts a piece: COPY on Postgres, one prepared INSERT on SQLite.
        """
        if not self.database.is_postgres:
            yield partial(self._insert, connection, _most_rows(connection))
            return

        cursor = connection.connection.cursor()
        table = self.tables.audit
        names = ", ".join(AUDIT_COLUMNS)
        target = connection.dialect.identifier_preparer.format_table(table)
        with cursor.copy(f"COPY {target} ({names}) FROM STDIN") as copy:
            yield lambda part: copy.write(_copy_text(part))
        cursor.close()

    def _insert(
        self, connection: Connection, most: int, part: list[tuple[Any, ...]]
    ) -> None:
        """
        Insert a piece on SQLite: a whole one by one statement.

        sqlite3 gives up the interpreter for each step of a statement; row by row, it
        would wait for each row's turn beside a busy thread.
        """
        sql = self._statement("insert").sql
        if len(part) == most:
            flat = tuple(itertools.chain.from_iterable(part))
            connection.exec_driver_sql(_many(sql, most), flat)
        else:
            connection.exec_driver_sql(sql, part)

    def _advance(
        self,
        connection: Connection,
        writer: Writer,
        heads: dict[str, chain.Head],
        seq: int,
        now: Any,
        ahead: int,
        fresh: list[Any],
    ) -> None:
        if not fresh:
            return
        place = {"service_id": writer.service, "source_node_id": writer.node}
        self._statement("move_node").run(
            connection,
            **place,
            new_seq=seq,
            new_ahead=ahead,
            updated_at=now,
        )
        for name in sorted({row[_CLASS] for row in fresh}):
            head = heads[name]
            self._statement("move_head").run(
                connection,
                **place,
                retention_class=name,
                new_seq=head.seq,
                new_hash=head.hash,
                new_count=head.count,
                new_frontier=head.frontier,
            )

    def _note_first(
        self,
        connection: Connection,
        heads: dict[str, chain.Head],
        going_on: set[str],
        sealed: list[tuple[Any, ...]],
    ) -> None:
        """
        Note where a chain that had no rows begins: a sweep need not search for it.
        """
        born = heads.keys() - going_on
        for row in sealed if born else ():
            class_ = row[_SEALED_CLASS]
            if class_ in born:
                born.discard(class_)
                self.meta.put(connection, first_key(heads[class_]), row[_SEQ])

    def _known_ids(self, ids: list[str]) -> frozenset[str]:
        with self.database.transaction() as connection:
            return self._ids_among(connection, ids)

    def _ids_among(self, connection: Connection, ids: list[str]) -> frozenset[str]:
        column = self.tables.audit.c.id
        found = connection.execute(sa.select(column).where(column.in_(ids)))
        return frozenset(found.scalars())

    def _is_known_id(self, error: BaseException) -> bool:
        """
        Tell whether a row's id is in the table already.

        Raises:
            SchemaProblem: it is the number that is taken, not the id: the head is
                behind its table, and skipping rows would hide it.
        """
        original = getattr(error, "orig", None) or error
        text = str(original)
        if getattr(original, "sqlstate", None) != "23505" and "UNIQUE" not in text:
            return False
        if f"{self.dsn.table}_seq_key" in text or "monotonic_seq" in text:
            raise SchemaProblem(
                f"the head of {self.dsn.table} is behind its table: a restored backup? "
                "run `fasten restored --reason TEXT`"
            ) from error
        return True

    def _look_again(self, error: BaseException) -> None:
        if self.database.problem(error).kind == "setup":
            self.schema.forget()

    # -- reading --

    def query(self, query: Query) -> Page:
        """
        Return one page of rows, by id: the order in which they were emitted.

        In the order `stored`, by number: a row that waited in a spool comes last.
        """
        if query.order == "stored":
            return Arrivals(self.tables, self.database, self._reader).page(query)
        return self._reader.page(query)

    @cached_property
    def _reader(self) -> AuditReader:
        return AuditReader(self.tables, self.database)

    def positions(self) -> dict[tuple[str, str], int]:
        """
        Return the highest number of each (service, node).
        """
        return Arrivals(self.tables, self.database, self._reader).ends(None)

    def newest(self, place: tuple[str, str], end: int, number: int) -> list[AuditRow]:
        """
        Return the *number* rows of a (service, node) up to *end*, oldest first.
        """
        query = Query(limit=number)
        return self._reader.between(place, max(0, end - number), end, query)

    # -- statements --

    def _statement(self, name: str) -> Statement:
        if not self._sql:
            engine = self.database.engine
            made = _append_statements(
                self.tables, is_postgres=self.database.is_postgres
            )
            self._sql = {k: Statement(v, engine) for k, v in made.items()}
        return self._sql[name]


_CLASS: Final = 7  # Pending.retention_class
_TIME: Final = itemgetter(1)  # Pending.timestamp_us
_ID: Final = AUDIT_COLUMNS.index("id")
_SEQ: Final = AUDIT_COLUMNS.index("monotonic_seq")
_SEALED_CLASS: Final = AUDIT_COLUMNS.index("retention_class")
_ENTRY: Final = ("field", "salt", "digest", "fields", "reason")


def first_key(head: chain.Head) -> str:
    """
    Return the key of meta under which the number stands from which a chain's rows are.
    """
    return f"first:{head.origin}"


def _without(
    row: tuple[Any, ...], doomed: Mapping[str, list[Erasure]]
) -> tuple[Any, ...]:
    """
    Return a sealed row without what its erasures name.
    """
    entries = doomed.get(row[_ID], ())
    return chain.erase(row, {field for entry in entries for field in entry.fields})


def erasure_details(
    ids: Sequence[str], fields: Iterable[str], reason: str
) -> Iterator[dict[str, Any]]:
    """
    Yield the details of the AUDIT_ROW_ERASED rows that name *ids*.
    """
    named = sorted(fields)
    for start in range(0, len(ids), MOST_IDS):
        part = list(ids[start : start + MOST_IDS])
        yield {"ids": part, "fields": named, "reason": reason}


def _append_statements(tables: Tables, *, is_postgres: bool) -> dict[str, Any]:

    dialect = "postgresql" if is_postgres else "sqlite"
    node, head, writer = tables.node, tables.head, tables.writer
    # On SQLite BEGIN IMMEDIATE holds the lock that FOR UPDATE takes on Postgres.
    now = clock(dialect)
    at_node = (node.c.service_id == p("service_id")) & (
        node.c.source_node_id == p("source_node_id")
    )
    at_head = (head.c.service_id == p("service_id")) & (
        head.c.source_node_id == p("source_node_id")
    )
    marked = upsert(writer, dialect).values(
        {c.name: p(c.name) for c in writer.c if c.name != "followed_at"}
    )
    return {
        "node": sa.select(node.c.seq, node.c.ahead_ms, now)
        .where(at_node)
        .with_for_update(),
        "new_node": upsert(node, dialect)
        .values(
            service_id=p("service_id"),
            source_node_id=p("source_node_id"),
            seq=sa.literal_column("0"),
            ahead_ms=sa.literal_column("0"),
            updated_at=now,
        )
        .on_conflict_do_nothing(),
        "heads": sa.select(*(head.c[c] for c in HEAD_COLUMNS))
        .where(at_head)
        .order_by(head.c.retention_class)
        .with_for_update(),
        "watermark": sa.select(writer.c.watermark).where(
            writer.c.writer_id == p("writer_id")
        ),
        "erasures": sa.select(
            *(tables.erasure.c[c] for c in (*_ENTRY, "erased_at"))
        ).where(tables.erasure.c.erased_at > p("since")),
        "insert": tables.audit.insert().values({c: p(c) for c in AUDIT_COLUMNS}),
        "move_node": node.update()
        .where(at_node)
        .values(seq=p("new_seq"), ahead_ms=p("new_ahead"), updated_at=p("updated_at")),
        "move_head": _moved_head(upsert(head, dialect), p),
        "mark": marked.on_conflict_do_update(
            index_elements=["writer_id"],
            set_={c: marked.excluded[c] for c in ("watermark", "updated_at")},
        ),
    }


def _moved_head(insert: Any, p: Callable[[str], Any]) -> Any:
    literal = sa.literal_column
    insert = insert.values(
        service_id=p("service_id"),
        source_node_id=p("source_node_id"),
        retention_class=p("retention_class"),
        seq=p("new_seq"),
        hash=p("new_hash"),
        count=p("new_count"),
        frontier=p("new_frontier"),
        pruned_seq=literal("0"),
        pruned_hash=literal(f"'{chain.GENESIS}'"),
        pruned_count=literal("0"),
        pruned_frontier=literal("''"),
    )
    return insert.on_conflict_do_update(
        index_elements=["service_id", "source_node_id", "retention_class"],
        set_={c: insert.excluded[c] for c in ("seq", "hash", "count", "frontier")},
    )


def _ahead_ms(rows: Iterable[Any]) -> int:
    """
    Return by how much ids run ahead of timestamps at the most, in milliseconds.
    """
    worst = last_ms = 0
    stamp = ""
    for row in rows:
        ms = row[1] // 1000
        if ms != last_ms:
            last_ms, stamp = ms, ulid_stamp(ms)
        if row[0][4:14] > stamp:
            worst = max(worst, ulid_ms(row[0]) - ms)
    return worst


def _most_rows(connection: Connection) -> int:
    """
    Return how many rows one INSERT of SQLite takes, no more than a piece.
    """
    import sqlite3

    raw: Any = connection.connection.driver_connection
    most: int = raw.getlimit(sqlite3.SQLITE_LIMIT_VARIABLE_NUMBER)
    return min(PIECE_ROWS, most // len(AUDIT_COLUMNS))


@cache
def _many(sql: str, rows: int) -> str:
    """
    Make an INSERT of one row one of *rows*.

    A failure may leave some of them, as what fails is rolled back: SQLite need not
    keep a copy of each page for that.
    """
    head, values, marks = sql.partition(" VALUES ")
    head = head.replace("INSERT INTO", "INSERT OR FAIL INTO", 1)
    return head + values + ", ".join([marks] * rows)


_COPY_ESCAPES: Final = str.maketrans(
    {"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r"}
)


def _copy_text(part: Sequence[tuple[Any, ...]]) -> str:
    """
    Spell rows in COPY's text format.
    """
    return "".join([_copy_line(row) for row in part])


def _copy_line(row: tuple[Any, ...]) -> str:
    fields = list(row)
    fields[_SEQ] = str(row[_SEQ])
    nulls = row.count(None)
    at = -1
    for _ in range(nulls):
        at = fields.index(None, at + 1)
        fields[at] = "\\N"
    line = "\t".join(fields)
    # Few rows hold anything to escape: counting what must stand there is cheap.
    if (
        line.count("\\") == nulls
        and line.count("\t") == len(row) - 1
        and "\n" not in line
        and "\r" not in line
    ):
        return f"{line}\n"
    escaped = [
        field if value is None else field.translate(_COPY_ESCAPES)
        for field, value in zip(fields, row, strict=True)
    ]
    return "\t".join(escaped) + "\n"
