# SPDX-License-Identifier: Apache-2.0
"""
The outbox: where rows wait that were written in callers' own transactions.

They come in through `callers`, and are moved from here into the audit table. Who
moves, and when, is told by `fasten.outbox`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any, Final, NamedTuple

import attrs
import sqlalchemy as sa
from sqlalchemy.engine import Connection

from fasten.errors import AuditStoreError
from fasten.repository.audit import AuditRepository, Writer
from fasten.repository.database import Database, Problem, SchemaProblem, is_missing
from fasten.repository.insertion import Entry, Place, dialect_of
from fasten.repository.schema import Schema
from fasten.repository.tables import audit_tables
from fasten.rows import Pending
from fasten.settings import Dsn

__all__ = ["Aside", "Moved", "OutboxRepository", "entry_of", "outbox_sql", "run_script"]

Aside = Callable[[tuple[Any, ...], str], None]
"""What keeps a row, in `Pending` order, that cannot be stored, and why; or raises."""


class Moved(NamedTuple):
    """
    What one move did: the stored rows, as columns, and the first id that was found.

    *first_id* is None where nothing waits; *is_busy* says that another is moving.
    """

    rows: list[tuple[Any, ...]]
    first_id: str | None = None
    is_busy: bool = False


class _Waiting(NamedTuple):
    id: str
    writer: Writer
    payload: str


def entry_of(row: Sequence[Any], service: str, node: str) -> Entry:
    """
    Spell *row*, in `Pending` order, as what stands in the outbox.
    """
    return Entry(row[0], service, node, _encode(row))


# One encoder: json.dumps makes a new one for each call with these arguments.
_encode: Final = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def _row_of(waiting: _Waiting) -> tuple[Any, ...]:
    """
    Read what `entry_of` wrote.

    Raises:
        ValueError: the payload is no row of the id that it has.
    """
    given = json.loads(waiting.payload)
    if not isinstance(given, list) or len(given) != len(Pending._fields):
        raise ValueError("the payload is no audit row")
    id_, timestamp_us, *others = given
    if id_ != waiting.id:
        raise ValueError("the payload has another id")
    if type(timestamp_us) is not int or not 0 <= timestamp_us < _END_US:
        raise ValueError("the payload has no time of this era")
    if not all(field is None or type(field) is str for field in others):
        raise ValueError("the payload holds values of a wrong type")
    if b"\0" in "".join(filter(None, others)).encode():
        raise ValueError("the payload holds a NUL")
    return tuple(given)


_END_US: Final = 253_402_300_800_000_000
"""The year 10000, in microseconds since 1970: what no store can hold."""

_ASK: Final = """
SELECT o.oid::bigint, current_database(), session_user,
    has_table_privilege(o.oid, 'SELECT') AND has_table_privilege(o.oid, 'DELETE'),
    has_table_privilege(o.oid, 'INSERT')
FROM (SELECT to_regclass(:name)::oid AS oid) AS o
WHERE o.oid IS NOT NULL
"""


class OutboxRepository:
    """
    The outbox at *dsn*, and the audit store that its rows are moved to.

    Where both are one database, *audit* has the same `Database`, and a row leaves
    the one and enters the other in one transaction.
    """

    def __init__(self, dsn: Dsn, database: Database, audit: AuditRepository) -> None:
        self.dsn = dsn
        self.database = database
        self.audit = audit
        self.table = audit_tables(dsn).outbox

    @property
    def is_shared(self) -> bool:
        """
        Tell whether outbox and audit store are one database.
        """
        return self.audit.database is self.database

    # -- before a caller's transaction is touched --

    def place(self) -> Place:
        """
        Return what is known of the outbox without asking.
        """
        return Place(self.table, self.dsn)

    def locate(self) -> Place:
        """
        Find the outbox over a connection of our own, and make it where we may.

        A caller's connection is compared with what this returns. SQLite is not
        asked: its file has no roles, and a caller's transaction may hold its lock.

        Raises:
            SchemaProblem: it is missing, or a right on it is; says the cure.
            Exception: whatever the driver says; `problem` tells what it means.
        """
        if not self.database.is_postgres:
            return self.place()
        database = Database(self.dsn, is_guest=True)
        try:
            return self._located(database)
        finally:
            database.release()

    def _located(self, database: Database) -> Place:
        found = self._ask(database)
        if found is None:
            self._make(database)
            found = self._ask(database)
        if found is None:
            raise SchemaProblem(self.place().cure("the outbox {} is missing"))
        oid, name, login, may_move, may_insert = found
        if not may_move:
            raise SchemaProblem(
                f"the role of FASTEN_OUTBOX_DSN may not empty {self.table.fullname}; "
                f"as its owner: GRANT SELECT, INSERT, DELETE ON {self.table.fullname} "
                "TO the role"
            )
        return attrs.evolve(
            self.place(), database=name, oid=oid, login=login, may_insert=may_insert
        )

    def _ask(self, database: Database) -> Any:
        name = dialect_of("postgresql").identifier_preparer.format_table(self.table)
        with database.transaction() as connection:
            return connection.execute(sa.text(_ASK), {"name": name}).first()

    def _make(self, database: Database) -> None:
        try:
            if self.is_shared:
                AuditRepository(self.audit.dsn, database).schema.ensure()
            else:
                Schema(database, [self.table]).ensure()
        except SchemaProblem:
            raise SchemaProblem(
                self.place().cure(
                    "the outbox {} is missing, and our role may not make it"
                )
            ) from None

    # -- looking --

    def attempt(self) -> None:
        """
        Do to a SQLite file what a mover does, to no row: its outbox is made.

        Raises:
            Exception: whatever the driver says; `problem` tells what it means.
        """
        if not self.database.is_postgres:
            with self.database.transaction() as connection:
                connection.execute(self.place().creation)
                connection.execute(self.table.delete().where(sa.false()))

    def waiting(self) -> tuple[int, str | None]:
        """
        Return how many rows wait, and the first one's id; none without an outbox.
        """
        column = self.table.c.id
        asked = sa.select(sa.func.count(), sa.func.min(column)).select_from(self.table)
        try:
            with self._looking() as connection:
                found = connection.execute(asked).one()
        except (FileNotFoundError, sa.exc.DBAPIError) as error:
            if isinstance(error, FileNotFoundError) or is_missing(error):
                return 0, None
            raise
        return int(found[0]), found[1]

    # -- moving --

    def move(self, limit: int, aside: Aside) -> Moved:
        """
        Move up to *limit* rows, in the order in which they were emitted.

        Rows that nothing can be made of are handed to *aside*.

        Raises:
            Exception: whatever a driver says; nothing is lost, and nothing stored
                twice by another try. `problem` tells what it means.
        """
        if not self.database.is_postgres and not self._has_any():
            return Moved([])
        self.audit.schema.ensure()
        try:
            if self.is_shared:
                return self._move_here(limit, aside)
            return self._move_across(limit, aside)
        except _NoOutboxError:
            return Moved([])
        except _TakenAwayError:
            return Moved([], is_busy=True)

    def set_aside_first(self, aside: Aside, reason: str) -> None:
        """
        Hand the first row to *aside*, and delete it.

        Raises:
            Exception: whatever *aside* or the driver says; the row is still there.
        """
        with self.database.transaction() as connection:
            for waiting in self._waiting(connection, 1):
                self._hand_aside(aside, waiting, reason)
                self._delete(connection, [waiting.id])

    def problem(self, error: BaseException) -> Problem:
        """
        Say what *error*, of either database, means, and the cure.
        """
        original = getattr(error, "orig", None) or error
        is_sqlite = type(original).__module__ == "sqlite3"
        for database in (self.database, self.audit.database):
            if is_sqlite is not database.is_postgres:
                return database.problem(error)
        return self.database.problem(error)

    def _move_here(self, limit: int, aside: Aside) -> Moved:
        with self.database.transaction() as connection:
            if not self._claims(connection):
                return Moved([], is_busy=True)
            waiting = self._waiting(connection, limit)
            ids = [each.id for each in waiting]
            if self._delete(connection, ids) != len(ids):
                raise _TakenAwayError
            stored = self._append(connection, self._readable(waiting, aside))
        return Moved(stored, ids[0] if ids else None)

    def _move_across(self, limit: int, aside: Aside) -> Moved:
        with self._looking() as connection:
            waiting = self._waiting(connection, limit)
        if not waiting:
            return Moved([])
        good = self._readable(waiting, aside)
        with self.audit.database.transaction() as connection:
            for writer in sorted({each.writer for each, _ in good}, key=_place):
                self.audit.lock(connection, writer)
            # Whoever moved a row before us has stored it under the lock that we hold,
            # and then deleted it. Rows that still wait are looked up by their ids;
            # for those that do not, the row may have expired since.
            left = self._still_here([each.id for each, _ in good])
            stored = self._append(
                connection, [pair for pair in good if pair[0].id in left]
            )
        with self.database.transaction() as connection:
            self._delete(connection, [each.id for each in waiting])
        return Moved(stored, waiting[0].id)

    def _append(
        self, connection: Connection, good: list[tuple[_Waiting, tuple[Any, ...]]]
    ) -> list[tuple[Any, ...]]:
        stored: list[tuple[Any, ...]] = []
        # Nodes in one order, whoever moves: two movers cannot wait for each other.
        good = sorted(good, key=lambda pair: _place(pair[0].writer))
        for writer, pairs in groupby(good, key=lambda pair: pair[0].writer):
            rows = [row for _, row in pairs]
            stored += self.audit.append_within(connection, writer, rows)
        return stored

    def _readable(
        self, waiting: list[_Waiting], aside: Aside
    ) -> list[tuple[_Waiting, tuple[Any, ...]]]:
        good = []
        for each in waiting:
            try:
                good.append((each, _row_of(each)))
            except ValueError as error:
                self._hand_aside(aside, each, str(error))
        return good

    @staticmethod
    def _hand_aside(aside: Aside, waiting: _Waiting, reason: str) -> None:
        try:
            row = _row_of(waiting)
        except ValueError:
            row = _stand_in(waiting)
        aside(row, reason)

    def _claims(self, connection: Connection) -> bool:
        """
        Keep other movers out, until the transaction ends; false if there is one.

        Not FOR UPDATE SKIP LOCKED: that lets a second mover overtake the first, and
        needs the right to UPDATE. BEGIN IMMEDIATE is SQLite's own.
        """
        if not self.database.is_postgres:
            return True
        sql = "SELECT pg_try_advisory_xact_lock(hashtextextended(:name, 0))"
        name = f"fasten outbox {self.table.fullname}"
        return bool(connection.execute(sa.text(sql), {"name": name}).scalar_one())

    def _has_any(self) -> bool:
        """
        Look without the lock that a SQLite writer takes.
        """
        try:
            with self.database.reading() as connection:
                return bool(self._waiting(connection, 1))
        except (FileNotFoundError, _NoOutboxError):
            return False

    @contextmanager
    def _looking(self) -> Iterator[Connection]:
        """
        Read: on SQLite without keeping writers out.
        """
        ways = self.database
        with ways.transaction() if ways.is_postgres else ways.reading() as connection:
            yield connection

    def _waiting(self, connection: Connection, limit: int) -> list[_Waiting]:
        table = self.table.c
        query = (
            sa.select(table.id, table.service_id, table.source_node_id, table.payload)
            .order_by(table.id)
            .limit(limit)
        )
        try:
            found = connection.execute(query).all()
        except sa.exc.DBAPIError as error:
            if is_missing(error):
                raise _NoOutboxError from error
            raise
        return [_Waiting(row[0], Writer("", row[1], row[2]), row[3]) for row in found]

    def _still_here(self, ids: list[str]) -> frozenset[str]:
        column = self.table.c.id
        with self._looking() as connection:
            found = connection.execute(sa.select(column).where(column.in_(ids)))
            return frozenset(found.scalars())

    def _delete(self, connection: Connection, ids: list[str]) -> int:
        if not ids:
            return 0
        column = self.table.c.id
        done = connection.execute(self.table.delete().where(column.in_(ids)))
        return int(done.rowcount)


class _NoOutboxError(Exception):
    """
    There is no outbox, so nothing waits in it.
    """


class _TakenAwayError(Exception):
    """
    Somebody deleted rows that were about to be moved: look again.
    """


def _place(writer: Writer) -> tuple[str, str]:
    return writer.service, writer.node


def _stand_in(waiting: _Waiting) -> tuple[Any, ...]:
    """
    Keep what the outbox held, whatever it is, in the shape of a row.
    """
    values = dict.fromkeys(Pending._fields, "") | {
        "id": waiting.id,
        "timestamp_us": 0,
        "code": "INVALID_CODE",
        "detail": waiting.payload,
    }
    return tuple(Pending(**values))  # type: ignore[arg-type]


# --- setting up -----------------------------------------------------------------------


def outbox_sql(dsn: Dsn, *, mover: str = "", writers: Sequence[str] = ()) -> str:
    """
    Return the SQL that an owner runs in the database of the transactions.

    *mover* is the role of FASTEN_OUTBOX_DSN, *writers* are those of the transactions;
    a right for which no role is named is left as a comment. It may be run again.
    """
    table = audit_tables(dsn).outbox
    dialect = dialect_of(dsn.backend)
    made = sa.schema.CreateTable(table, if_not_exists=True).compile(dialect=dialect)
    lines = [f"{str(made).strip()};"]
    if dsn.backend != "postgresql":
        return f"{lines[0]}\n"
    quote = dialect.identifier_preparer.quote
    name = dialect.identifier_preparer.format_table(table)
    every = f"GRANT SELECT, INSERT, DELETE ON {name} TO"
    lines.append(
        f"{every} {quote(mover)};"
        if mover
        else f"-- {every} the role of FASTEN_OUTBOX_DSN;"
    )
    lines += [f"GRANT INSERT ON {name} TO {quote(writer)};" for writer in writers]
    roles = [role for role in (mover, *writers) if role]
    if dsn.schema and roles:
        names = ", ".join(quote(role) for role in roles)
        lines.append(f"GRANT USAGE ON SCHEMA {quote(dsn.schema)} TO {names};")
    return "\n".join(lines) + "\n"


def run_script(dsn: Dsn, sql: str) -> None:
    """
    Run statements as whoever *dsn* logs in as; all of them, or on Postgres none.

    Raises:
        AuditStoreError: the database refuses, or cannot be reached; says why.
    """
    database = Database(dsn, is_guest=True)
    try:
        with database.transaction() as connection:
            if database.is_postgres:
                connection.exec_driver_sql(sql)
            else:
                raw: Any = connection.connection.driver_connection
                raw.commit()  # a script of SQLite has transactions of its own
                raw.executescript(sql)
    except Exception as error:  # the driver's: told without the DSN
        problem = database.problem(error)
        raise AuditStoreError(f"nothing was set up: {problem.message}") from None
    finally:
        database.release()
