# SPDX-License-Identifier: Apache-2.0
"""
One row's way into the outbox through a driver: psycopg's connections and sqlite3's.

Which connection a caller has, and whose transaction it is in, is told by `callers`.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any, Final, NamedTuple

import attrs
import sqlalchemy as sa
from sqlalchemy import bindparam as p
from sqlalchemy.dialects import postgresql, sqlite

from fasten.errors import AuditStoreError
from fasten.repository.database import Database, SchemaProblem, is_missing
from fasten.settings import Dsn

__all__ = [
    "Entry",
    "Misplaced",
    "Place",
    "Refusal",
    "check_file",
    "dialect_of",
    "into_psycopg",
    "into_psycopg_async",
    "into_sqlite",
    "is_alone",
    "is_missing_table",
]


class Refusal(Exception):
    """
    The caller's connection or transaction cannot take the row; says the cure.
    """


class Misplaced(Refusal):
    """
    The caller's connection leads to another database than the outbox's DSN.
    """


class Entry(NamedTuple):
    """
    One row of the outbox, its position and time apart.
    """

    id: str
    service_id: str
    source_node_id: str
    payload: str


@attrs.frozen(slots=False)  # slots leave no place for what is computed once
class Place:
    """
    Where the outbox stands: what a caller's connection has to lead to.

    *database* and *oid* name the table on Postgres, None where nobody could be asked;
    *login* is whom fasten itself is there.
    """

    table: sa.Table
    dsn: Dsn
    database: str | None = None
    oid: int | None = None
    login: str | None = None
    may_insert: bool = True

    @cached_property
    def psycopg_sql(self) -> str:
        """
        Return the INSERT as psycopg takes it.
        """
        return _psycopg_sql(self)

    @cached_property
    def sqlite_sql(self) -> str:
        """
        Return the INSERT as sqlite3 takes it.
        """
        return _sqlite_sql(self.table)

    @cached_property
    def sqlite_ddl(self) -> str:
        """
        Return what makes the outbox of a SQLite file.
        """
        return str(self.creation.compile(dialect=_SQLITE))

    @cached_property
    def core(self) -> Any:
        """
        Return the INSERT as SQLAlchemy takes it.
        """
        return _core(self)

    @property
    def is_postgres(self) -> bool:
        """
        Tell which of the two kinds of database it is.
        """
        return self.dsn.path is None

    @property
    def name(self) -> str:
        """
        Return the table's name, with its schema.
        """
        return self.table.fullname

    def values(self, entry: Entry) -> tuple[Any, ...]:
        """
        Return what `psycopg_sql` takes.
        """
        guard = () if self.oid is None else (self.database, self.oid)
        return (*entry, *guard)

    def named_values(self, entry: Entry) -> dict[str, Any]:
        """
        Return what `core` takes.
        """
        guard = {} if self.oid is None else {"database": self.database, "oid": self.oid}
        return {**entry._asdict(), **guard}

    @property
    def creation(self) -> Any:
        """
        Return the DDL that makes the outbox of a SQLite file.
        """
        return sa.schema.CreateTable(self.table, if_not_exists=True)

    def cure(self, what: str) -> str:
        """
        Say *what* is wrong with the outbox, `{}`, and who can put it right.
        """
        return (
            f"{what.format(self.name)}; run `fasten init-db --outbox` as the owner of "
            "the database (--print-sql shows what it does)"
        )

    def refused(self, entry: Entry, error: BaseException) -> AuditStoreError:
        """
        Say why *entry* is not in the caller's transaction, and the cure.
        """
        return AuditStoreError(
            "the row was not written into the transaction of connection=: "
            f"{self._why(error)}",
            id=entry.id,
        )

    def _why(self, error: BaseException) -> str:
        original = getattr(error, "orig", None) or error
        if isinstance(original, (Refusal, SchemaProblem)):
            return str(original)
        if is_missing(original):
            return self.cure("the outbox {} is not to be found through it")
        if getattr(original, "sqlstate", None) == "42501":
            return (
                f"its role may not insert into {self.name}; as the owner: "
                f"GRANT INSERT ON {self.name} TO the role"
            )
        module = type(original).__module__.partition(".")[0]
        if module in ("psycopg", "sqlite3"):
            return Database(self.dsn).problem(original).message
        return f"{type(original).__name__}: {str(original).partition(chr(10))[0]:.200}"

    def misplaced(self, found: str) -> Misplaced:
        """
        Say that a connection leads to *found* instead.
        """
        wanted = "this Postgres database" if self.is_postgres else str(self.dsn.path)
        return Misplaced(
            f"connection= leads to {found}, and the outbox {self.name} is expected in "
            f"{wanted}; set FASTEN_OUTBOX_DSN to the database of your transactions "
            "(the default is FASTEN_AUDIT_DSN)"
        )


def dialect_of(backend: str) -> sa.Dialect:
    """
    Return how a backend spells things, without a connection to it.
    """
    known: dict[str, Any] = {"postgresql": postgresql, "sqlite": sqlite}
    made: sa.Dialect = known[backend].dialect()
    return made


_POSTGRES: Final = dialect_of("postgresql")
_SQLITE: Final = dialect_of("sqlite")
_COLUMNS: Final = (*Entry._fields, "created_at")
_NOW: Final = "strftime('%Y-%m-%dT%H:%M:%f', 'now') || '000Z'"


def _quoted(table: sa.Table, dialect: Any) -> str:
    return str(dialect.identifier_preparer.format_table(table))


def _psycopg_sql(place: Place) -> str:
    name = _quoted(place.table, _POSTGRES)
    given = ", ".join(["%s::text"] * len(Entry._fields))
    sql = (
        f"INSERT INTO {name} ({', '.join(_COLUMNS)}) SELECT {given}, clock_timestamp()"
    )
    if place.oid is None:
        return sql
    # Elsewhere it inserts nothing, which the row count tells at no cost.
    return (
        f"{sql} WHERE current_database() = %s AND '{name}'::regclass::oid = %s::bigint"
    )


def _sqlite_sql(table: sa.Table) -> str:
    into = f"INSERT INTO {_quoted(table, _SQLITE)} ({', '.join(_COLUMNS)})"
    return f"{into} VALUES (?, ?, ?, ?, {_NOW})"


def _core(place: Place) -> Any:
    """
    Build the INSERT for drivers that only SQLAlchemy knows how to speak to.
    """
    if not place.is_postgres:
        now: Any = sa.literal_column(_NOW)
        return place.table.insert().values(
            {name: p(name) for name in Entry._fields} | {"created_at": now}
        )
    text, big = sa.Text(), sa.BigInteger()
    # Drivers that send types with their values cannot guess these.
    given = [sa.cast(p(name), text) for name in Entry._fields]
    chosen = sa.select(*given, sa.func.clock_timestamp())
    if place.oid is not None:
        name = _quoted(place.table, _POSTGRES)
        here: Any = sa.literal_column(f"'{name}'::regclass::oid::bigint")
        chosen = chosen.where(
            sa.func.current_database() == sa.cast(p("database"), text),
            here == sa.cast(p("oid"), big),
        )
    return place.table.insert().from_select(_COLUMNS, chosen, include_defaults=False)


# --- sqlite3 --------------------------------------------------------------------------


def into_sqlite(raw: Any, entry: Entry, place: Place) -> None:
    """
    Insert through a sqlite3 connection.

    No savepoint: a statement that fails leaves a SQLite transaction as it was, and
    RELEASE of a savepoint outside a transaction would commit.

    Raises:
        Misplaced: the connection's file is another one.
        Exception: whatever sqlite3 says; the transaction is as before.
    """
    was_open = raw.in_transaction
    cursor = raw.cursor()
    try:
        _check_file(cursor, place)
        try:
            cursor.execute(place.sqlite_sql, entry)
        except Exception as error:  # looked at, and raised again if not ours
            if not is_missing_table(error):
                raise
            # SQLite knows no roles: who may write here may make the table. A roll-back
            # takes it along, and the next row makes it again.
            cursor.execute(place.sqlite_ddl)
            cursor.execute(place.sqlite_sql, entry)
    except BaseException:
        if not was_open and raw.in_transaction:
            raw.rollback()
        raise
    finally:
        cursor.close()


def is_missing_table(error: BaseException) -> bool:
    """
    Tell whether SQLite knows no outbox yet.
    """
    return "no such table" in str(getattr(error, "orig", None) or error)


def _check_file(cursor: Any, place: Place) -> None:
    if place.is_postgres:
        raise place.misplaced("a SQLite database")
    cursor.row_factory = None
    check_file(cursor.execute("PRAGMA database_list").fetchall(), place)


def check_file(databases: list[Any], place: Place) -> None:
    """
    Compare what PRAGMA database_list says with where the outbox is.

    Raises:
        Misplaced: it is another file, or none.
    """
    file = next((row[2] for row in databases if row[1] == "main"), "")
    if not file:
        raise place.misplaced("a SQLite database in memory")
    if file != place.dsn.path and not _is_same(file, str(place.dsn.path)):
        raise place.misplaced(f"the SQLite file {file}")


def _is_same(one: str, other: str) -> bool:
    try:
        return Path(one).samefile(other)
    except OSError:
        return False


# --- psycopg --------------------------------------------------------------------------

_SAVE: Final = "SAVEPOINT fasten_outbox"
_KEEP: Final = "RELEASE SAVEPOINT fasten_outbox"
_UNDO: Final = "ROLLBACK TO SAVEPOINT fasten_outbox"


def into_psycopg(raw: Any, entry: Entry, place: Place) -> None:
    """
    Insert through a psycopg connection, in one round trip, under a savepoint.

    Raises:
        Refusal: the transaction has failed already, or is another database's.
        Exception: whatever psycopg says; the transaction is as before.
    """
    from psycopg import ClientCursor

    _check_psycopg(raw, place)
    if _is_piped(raw):
        _into_pipeline(raw, entry, place)
        return
    was_idle, sql, at = _plan(raw, place)
    try:
        with ClientCursor(raw) as cursor:
            cursor.execute(sql, place.values(entry))
            for _ in range(at):
                cursor.nextset()
            _check_count(cursor.rowcount, place)
    except BaseException:
        _undo(raw, was_idle=was_idle)
        raise


def _plan(raw: Any, place: Place) -> tuple[bool, str, int]:
    """
    Return whether no transaction is open, what to send, and whose count tells.
    """
    was_idle = _status(raw) == _IDLE
    if is_alone(raw):
        return False, place.psycopg_sql, 0
    return was_idle, f"{_SAVE}; {place.psycopg_sql}; {_KEEP}", 1


def is_alone(raw: Any) -> bool:
    """
    Tell whether a statement now would be a transaction of its own.
    """
    return bool(raw.autocommit) and _status(raw) == _IDLE


def _check_psycopg(raw: Any, place: Place) -> None:
    """
    Refuse what cannot work before the transaction is touched.

    Raises:
        Refusal: says what it is, and the cure.
    """
    if not place.is_postgres:
        raise place.misplaced("a Postgres database")
    if _status(raw) == _FAILED:
        raise Refusal(
            "the transaction of connection= has failed before; roll it back, then "
            "emit again"
        )
    if not place.may_insert and raw.info.user == place.login:
        raise Refusal(
            f"the role of this connection may not insert into {place.name}; as its "
            f"owner: GRANT SELECT, INSERT, DELETE ON {place.name} TO the role"
        )


def _check_count(count: int, place: Place) -> None:
    if count == 0:
        raise place.misplaced("another Postgres database, or another schema")


def _undo(raw: Any, *, was_idle: bool) -> None:
    """
    Leave the caller's transaction as it was found.
    """
    if raw.broken or raw.closed:
        return
    if was_idle:
        raw.rollback()
    elif _status(raw) == _FAILED:
        raw.execute(f"{_UNDO}; {_KEEP}", prepare=False)


def _into_pipeline(raw: Any, entry: Entry, place: Place) -> None:
    # Leaving a pipeline inside the caller's waits for the answers: the only way to
    # know here and now whether the row is in.
    with raw.pipeline():
        pass
    _check_psycopg(raw, place)
    if is_alone(raw):
        with raw.pipeline():
            cursor = raw.execute(place.psycopg_sql, place.values(entry))
        _check_count(cursor.rowcount, place)
        return
    try:
        with raw.pipeline():
            raw.execute(_SAVE)
            cursor = raw.execute(place.psycopg_sql, place.values(entry))
            raw.execute(_KEEP)
        _check_count(cursor.rowcount, place)
    except BaseException:
        if _status(raw) == _FAILED:
            with raw.pipeline():
                raw.execute(_UNDO)
                raw.execute(_KEEP)
        raise


async def into_psycopg_async(raw: Any, entry: Entry, place: Place) -> None:
    """
    Insert through a psycopg AsyncConnection; otherwise as `into_psycopg`.

    Raises:
        Refusal: the transaction has failed already, or is another database's.
        Exception: whatever psycopg says; the transaction is as before.
    """
    from psycopg import AsyncClientCursor

    _check_psycopg(raw, place)
    if _is_piped(raw):
        raise Refusal(
            "aemit() cannot look into the pipeline of this connection; call it outside "
            "of `async with connection.pipeline()`"
        )
    was_idle, sql, at = _plan(raw, place)
    try:
        async with AsyncClientCursor(raw) as cursor:
            await cursor.execute(sql, place.values(entry))
            for _ in range(at):
                cursor.nextset()
            _check_count(cursor.rowcount, place)
    except BaseException:
        await _undo_async(raw, was_idle=was_idle)
        raise


async def _undo_async(raw: Any, *, was_idle: bool) -> None:
    if raw.broken or raw.closed:
        return
    if was_idle:
        await raw.rollback()
    elif _status(raw) == _FAILED:
        await raw.execute(f"{_UNDO}; {_KEEP}", prepare=False)


# Of psycopg.pq.TransactionStatus and PipelineStatus; named here so that a caller who
# has no psycopg pays for none.
_IDLE: Final = 0
_FAILED: Final = 3


def _status(raw: Any) -> int:
    return int(raw.info.transaction_status)


def _is_piped(raw: Any) -> bool:
    return bool(raw.info.pipeline_status)
