# SPDX-License-Identifier: Apache-2.0
"""
Where rows are stored and read: the tables, and the only SQL of fasten.

`Database` is one server or file, shared by the repositories on it. Nothing here
waits, sleeps or starts threads; `abort()` is what a watchdog may call.
"""

from __future__ import annotations

import json
import os
import socket
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

import attrs

from fasten import chain
from fasten.errors import InvalidQuery
from fasten.rows import (
    ALL_TENANTS,
    API_COLUMNS,
    AUDIT_COLUMNS,
    SYS_COLUMNS,
    ApiRow,
    AuditRow,
    Page,
    Query,
    SysRow,
    decode_cursor,
    encode_cursor,
    format_timestamp,
    parse_timestamp,
    ulid_ms,
    ulid_stamp,
)
from fasten.settings import Dsn

if TYPE_CHECKING:
    import sqlalchemy as sa
    from sqlalchemy.engine import Connection, Engine

__all__ = [
    "SCHEMA",
    "AuditRepository",
    "CommitUnanswered",
    "Database",
    "Problem",
    "SchemaProblem",
    "StreamRepository",
    "Writer",
]

SCHEMA: Final = 1
"""The number of the newest migration; what this version writes."""

PIECE_ROWS: Final = 64
INDEXED_CHARACTERS: Final = 128


class Problem(NamedTuple):
    """
    What a failed call means; see `fasten.drain.Fault`, which it becomes.
    """

    kind: Literal["transient", "row", "setup"]
    message: str
    is_ambiguous: bool = False


class SchemaProblem(Exception):
    """
    The store's tables are not what this version can write to; says the cure.
    """


class CommitUnanswered(Exception):
    """
    COMMIT was sent and nothing came back: the rows may be stored.
    """


@attrs.frozen
class Writer:
    """
    The process incarnation that a batch comes from: its rows carry its place.
    """

    id: str
    service: str
    node: str


# --- one server or file -----------------------------------------------------------


class Database:
    """
    One SQLite file or Postgres server: connections, transactions, what errors mean.

    One connection writes and is kept until `release()`; readers have at most two,
    opened on use.
    """

    def __init__(self, dsn: Dsn) -> None:
        self.dsn = dsn
        self.is_postgres = dsn.backend == "postgresql"
        self._engine: Engine | None = None
        self._readers: Engine | None = None
        self._connection: Connection | None = None
        self._inherited: list[object] = []

    # -- connections --

    @property
    def engine(self) -> Engine:
        """
        Return the SQLAlchemy engine of the writing connection.
        """
        if self._engine is None:
            self._engine = self._make_engine(is_writer=True)
        return self._engine

    @property
    def readers(self) -> Engine:
        """
        Return the SQLAlchemy engine of the reading connections.
        """
        if self._readers is None:
            self._readers = self._make_engine(is_writer=False)
        return self._readers

    def _make_engine(self, *, is_writer: bool) -> Engine:
        # SQLAlchemy costs 0.1 s to import: a service pays it in the drainer.
        import sqlalchemy as sa

        connect = self._connect_postgres if self.is_postgres else self._connect_sqlite
        return sa.create_engine(
            "postgresql+psycopg://" if self.is_postgres else "sqlite://",
            creator=lambda: connect(is_writer=is_writer),
            poolclass=sa.pool.QueuePool,
            pool_size=1 if is_writer else 2,
            max_overflow=0,
            pool_pre_ping=self.is_postgres,
            pool_reset_on_return="rollback",
            hide_parameters=True,
        )

    def _connect_postgres(self, *, is_writer: bool) -> Any:
        import psycopg

        # Poolers strand prepared statements and refuse start-up options.
        given: dict[str, Any] = {"prepare_threshold": None}
        conninfo = self.dsn.conninfo()
        for name, value in (
            ("connect_timeout", "5"),
            ("application_name", "fasten"),
            ("target_session_attrs", "read-write" if is_writer else "any"),
        ):
            if f"{name}=" not in conninfo:
                given[name] = value
        return psycopg.connect(conninfo, **given)

    def _connect_sqlite(self, *, is_writer: bool) -> Any:
        import sqlite3
        from urllib.parse import quote

        path = str(self.dsn.path)
        is_new = is_writer and not os.path.exists(path)
        # Reading never creates a store: mode=ro fails where there is no file.
        mode = "rwc" if is_writer else "ro"
        connection = sqlite3.connect(
            f"file:{quote(path)}?mode={mode}",
            uri=True,
            isolation_level=None,
            check_same_thread=False,
            timeout=1.0,
            cached_statements=64,
        )
        try:
            _prepare_sqlite(connection, is_new=is_new, is_writer=is_writer)
        except BaseException:
            connection.close()
            raise
        _give_to_owner(Path(path))
        return connection

    @contextmanager
    def transaction(self) -> Iterator[Connection]:
        """
        Yield the writing connection inside one transaction, committed at the end.

        Raises:
            CommitUnanswered: the connection broke between COMMIT and its answer.
        """
        connection = self._writing()
        try:
            self._begin(connection)
            yield connection
        except BaseException:
            self._roll_back(connection)
            raise
        try:
            connection.commit()
        except BaseException as error:
            broken = self._is_broken(error)
            self._roll_back(connection)
            if broken:
                raise CommitUnanswered(type(error).__name__) from error
            raise

    def _writing(self) -> Connection:
        if self._connection is None or self._connection.closed:
            self._connection = self.engine.connect()
        return self._connection

    def _begin(self, connection: Connection) -> None:
        connection.begin()
        if self.is_postgres:
            # SET LOCAL, not start-up options: those break behind a pooler.
            connection.exec_driver_sql(
                "SET LOCAL lock_timeout = '10s'; SET LOCAL statement_timeout = '30s'; "
                "SET LOCAL idle_in_transaction_session_timeout = '60s'"
            )
        else:
            # Only writers take the lock at once; a global hook would make readers
            # lock them out.
            connection.exec_driver_sql("BEGIN IMMEDIATE")

    def _roll_back(self, connection: Connection) -> None:
        try:
            connection.rollback()
        except Exception:  # the connection is gone: so is its transaction
            self.release()
            return
        if connection.invalidated or self._is_closed(connection):
            self.release()

    @staticmethod
    def _is_closed(connection: Connection) -> bool:
        try:
            raw = connection.connection.driver_connection
        except Exception:  # whatever it is, it is no connection to go on with
            return True
        return bool(getattr(raw, "closed", False))

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """
        Yield a read-only connection.

        Raises:
            FileNotFoundError: there is no SQLite file yet; nothing is created.
        """
        if not self.is_postgres and not os.path.exists(str(self.dsn.path)):
            raise FileNotFoundError(f"there is no store at {self.dsn.path} yet")
        with self.readers.connect() as connection:
            if self.is_postgres:
                connection.exec_driver_sql(
                    "SET TRANSACTION READ ONLY; SET LOCAL statement_timeout = '30s'"
                )
            yield connection

    def release(self) -> None:
        """
        Close what is open; the next call opens it again.
        """
        connection, self._connection = self._connection, None
        if connection is not None:
            with suppress(Exception):  # closing a broken connection may raise
                connection.close()
        for engine in (self._engine, self._readers):
            if engine is not None:
                with suppress(Exception):
                    engine.dispose()

    def after_fork_in_child(self) -> None:
        """
        Leave the parent's connections alone, for ever.

        Closing an inherited SQLite connection drops the parent's POSIX locks, so
        they are kept in a list and never collected.
        """
        self._inherited += [self._connection, self._engine, self._readers]
        for engine in (self._engine, self._readers):
            if engine is not None:
                self._inherited.append(engine.pool)
                engine.dispose(close=False)
        self._connection = self._engine = self._readers = None

    def abort(self) -> None:
        """
        Break the running call from another thread: the watchdog's way out.
        """
        connection = self._connection
        if connection is None:
            return
        with suppress(Exception):  # it may have ended in this very moment
            raw = connection.connection.driver_connection
            if not self.is_postgres:
                raw.interrupt()  # type: ignore[union-attr]
                return
            # Shut a duplicate: closing libpq's own descriptor under it is unsafe.
            with socket.socket(fileno=os.dup(raw.pgconn.socket)) as duplicate:  # type: ignore[union-attr]
                duplicate.shutdown(socket.SHUT_RDWR)

    # -- what errors mean --

    def problem(self, error: BaseException) -> Problem:
        """
        Say what *error* means for the rows, and the cure, without any secret.
        """
        if isinstance(error, CommitUnanswered):
            return Problem(
                "transient", "the store did not answer COMMIT", is_ambiguous=True
            )
        if isinstance(error, SchemaProblem):
            return Problem("setup", str(error))
        original = getattr(error, "orig", None) or error
        if self.is_postgres:
            return _postgres_problem(original, self.dsn)
        return _sqlite_problem(original, self.dsn)

    def _is_broken(self, error: BaseException) -> bool:
        original = getattr(error, "orig", None) or error
        state = getattr(original, "sqlstate", None)
        return self.is_postgres and (state is None or state[:2] in ("08", "57"))


def _prepare_sqlite(connection: Any, *, is_new: bool, is_writer: bool) -> None:
    if is_new:
        # Both only take effect before the first table is made.
        connection.execute("PRAGMA page_size = 8192")
        connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
    if is_writer:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA secure_delete = ON")
        connection.execute("PRAGMA wal_autocheckpoint = 4000")
        connection.execute("PRAGMA cache_size = -65536")
    else:
        connection.execute("PRAGMA query_only = ON")
        # Opens the file, so that a -shm made now can be given to its owner.
        connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()


def _give_to_owner(path: Path) -> None:
    """
    Hand -wal and -shm that root made to the owner of the database file.

    An operator's `sudo fasten tail` must not lock the service out of its store.
    """
    if os.geteuid() != 0:
        return
    with suppress(OSError):
        owner = os.stat(path)
        for suffix in ("-wal", "-shm"):
            made = os.lstat(f"{path}{suffix}")
            if stat.S_ISREG(made.st_mode) and made.st_uid != owner.st_uid:
                os.chown(f"{path}{suffix}", owner.st_uid, owner.st_gid)


_POSTGRES_SETUP: Final = {
    "28P01": "the password was refused; correct it in the DSN",
    "28000": "the login was refused; check user, password and pg_hba.conf",
    "3D000": "the database does not exist; create it or correct the DSN",
    "3F000": "the schema does not exist; run `fasten init-db` as the owner",
    "42P01": "a table is missing; run `fasten init-db` as the owner",
    "42703": "a column is missing; run `fasten init-db` as the owner",
    "42501": "a right is missing; grant it (`fasten init-db --print-sql` lists all)",
}
_POSTGRES_TEXTS: Final = (
    # A refused connection carries no SQLSTATE, only the server's sentence.
    ("password authentication failed", "28P01"),
    ("no password supplied", "28P01"),
    ("no pg_hba.conf entry", "28000"),
    ("role \"", "28000"),
    ("database \"", "3D000"),
)


def _postgres_problem(error: BaseException, dsn: Dsn) -> Problem:
    state = getattr(error, "sqlstate", None) or _state_in_text(error)
    name = type(error).__name__
    if state in _POSTGRES_SETUP:
        return Problem("setup", f"Postgres {state}: {_POSTGRES_SETUP[state]}")
    if state is None:
        return Problem("transient", f"Postgres is not reachable ({name})")
    if state[:2] in ("22", "23", "54"):
        return Problem("row", f"Postgres {state} ({name}) refuses the row")
    if state == "25006":
        return Problem("transient", "Postgres 25006: the server is read-only now")
    return Problem("transient", f"Postgres {state} ({name})")


def _state_in_text(error: BaseException) -> str | None:
    text = str(error)
    for needle, state in _POSTGRES_TEXTS:
        if needle in text and "FATAL" in text:
            return state
    return None


def _sqlite_problem(error: BaseException, dsn: Dsn) -> Problem:
    text = str(error)
    code = getattr(error, "sqlite_errorname", "")
    where = f"SQLite at {dsn.path}"
    if "readonly" in text or code.startswith("SQLITE_READONLY"):
        return Problem("setup", f"{where} is read-only; let this user write to it")
    if "unable to open" in text:
        return Problem(
            "setup",
            f"{where} cannot be opened; the directory must exist and be writable",
        )
    if "no such table" in text or "no column" in text:
        return Problem("setup", f"{where}: {text}; run `fasten init-db`")
    if "not a database" in text:
        return Problem("setup", f"{where} is not a database; name another file")
    if "locked" in text or "busy" in text:
        return Problem("transient", f"{where} is locked by another writer")
    if "full" in text:
        return Problem("transient", f"the disk of {where} is full")
    if code.startswith(("SQLITE_TOOBIG", "SQLITE_CONSTRAINT", "SQLITE_MISMATCH")):
        return Problem("row", f"{where} refuses the row ({code})")
    if isinstance(error, (OverflowError, UnicodeError, ValueError)):
        return Problem("row", f"{where} refuses the row ({type(error).__name__})")
    return Problem("transient", f"{where}: {code or type(error).__name__}")


# --- tables -------------------------------------------------------------------------


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


def audit_tables(dsn: Dsn) -> Tables:
    """
    Build the Core tables of an audit DSN.
    """
    import sqlalchemy as sa

    metadata = sa.MetaData(schema=dsn.schema)
    text, big, moment = _types(dsn)
    numbers = {"monotonic_seq"}
    moments = {"timestamp", "stored_at", "shipped_at"}
    nullable = {
        *("on_behalf_of", "tenant_id", "client", "reason", "trace_id", "span_id"),
        *("shipped_at", "actor", "target", "detail"),
    }
    name = dsn.table

    def kind(column: str) -> Any:
        return big if column in numbers else moment if column in moments else text

    audit = sa.Table(
        name,
        metadata,
        *(
            sa.Column(c, kind(c), nullable=c in nullable, primary_key=c == "id")
            for c in AUDIT_COLUMNS
        ),
        # The name of this constraint tells a number used twice from an id met twice.
        sa.UniqueConstraint(
            "service_id", "source_node_id", "monotonic_seq", name=f"{name}_seq_key"
        ),
    )
    sa.Index(f"{name}_request_id_idx", audit.c.request_id)
    for column in ("target", "actor"):
        # With the id behind it, the newest page of a busy actor needs no sort.
        sa.Index(f"{name}_{column}_idx", _indexed(audit, dsn, column), audit.c.id)

    def side(suffix: str, *columns: sa.Column[Any]) -> sa.Table:
        return sa.Table(f"{name}_{suffix}", metadata, *columns)

    def column(label: str, type_: Any = text, **options: Any) -> sa.Column[Any]:
        return sa.Column(label, type_, nullable=options.pop("nullable", False), **options)

    def place() -> list[sa.Column[Any]]:
        return [
            column("service_id", primary_key=True),
            column("source_node_id", primary_key=True),
        ]

    return Tables(
        audit=audit,
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
        ),
        outbox=side(
            "outbox",
            sa.Column("position", _counter(dsn), primary_key=True, autoincrement=True),
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
            column("monotonic_seq", big),
            column("root"),
            column("note"),
            column("created_at", moment),
        ),
        erasure=side(
            "erasure",
            column("field", primary_key=True),
            column("salt", primary_key=True),
            column("digest", primary_key=True),
            column("erased_at", moment),
            column("reason", nullable=True),
            column("fields", nullable=True),
        ),
        meta=side("meta", column("key", primary_key=True), column("value")),
    )


def stream_table(dsn: Dsn, stream: str) -> sa.Table:
    """
    Build the Core table of a sys or api DSN.
    """
    import sqlalchemy as sa

    text, big, moment = _types(dsn)
    kinds = {"timestamp": moment, "status": big, "bytes": big}
    columns = SYS_COLUMNS if stream == "sys" else API_COLUMNS
    table = sa.Table(
        dsn.table,
        sa.MetaData(schema=dsn.schema),
        sa.Column("position", _counter(dsn), primary_key=True, autoincrement=True),
        *(
            sa.Column(
                c,
                sa.Float() if c == "duration_ms" else sa.Boolean()
                if c == "complete"
                else kinds.get(c, text),
            )
            for c in columns
        ),
        sa.Column("fields", text, nullable=False),
    )
    sa.Index(f"{dsn.table}_request_id_idx", table.c.request_id)
    sa.Index(f"{dsn.table}_timestamp_idx", table.c.timestamp)
    return table


def _types(dsn: Dsn) -> tuple[Any, Any, Any]:
    import sqlalchemy as sa

    if dsn.backend == "postgresql":
        # Byte order, whatever the database's locale: ids sort as they were minted.
        text = sa.Text(collation="C")
        return text, sa.BigInteger(), sa.DateTime(timezone=True)
    return sa.Text(), sa.Integer(), sa.Text()


def _counter(dsn: Dsn) -> Any:
    import sqlalchemy as sa

    return sa.BigInteger() if dsn.backend == "postgresql" else sa.Integer()


def _indexed(table: sa.Table, dsn: Dsn, column: str) -> Any:
    """
    Return what is indexed of a text that may be long.

    A Postgres index row holds 2,700 bytes; an anchor may have 16,384.
    """
    import sqlalchemy as sa

    if dsn.backend == "postgresql":
        return sa.func.left(table.c[column], sa.literal_column(str(INDEXED_CHARACTERS)))
    return table.c[column]


class _Statement:
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


# --- schema --------------------------------------------------------------------------


class _Schema:
    """
    The tables of one repository: made, checked, migrated.
    """

    def __init__(self, database: Database, tables: Sequence[sa.Table]) -> None:
        self._database = database
        self._tables = tables
        self._is_ready = False

    def ensure(self) -> None:
        """
        Make what is missing, once; nothing runs against an up-to-date store.

        Raises:
            SchemaProblem: the tables cannot be made, or are newer than this version.
        """
        if self._is_ready:
            return
        if not self._exists():
            self._create()
        self._check_version()
        self._is_ready = True

    def forget(self) -> None:
        """
        Look again before the next write.
        """
        self._is_ready = False

    @property
    def _meta(self) -> sa.Table | None:
        return next((t for t in self._tables if t.name.endswith("_meta")), None)

    def _exists(self) -> bool:
        import sqlalchemy as sa

        with self._database.transaction() as connection:
            inspector = sa.inspect(connection)
            return all(inspector.has_table(t.name, schema=t.schema) for t in self._tables)

    def _create(self) -> None:
        import sqlalchemy as sa

        database = self._database
        try:
            with database.transaction() as connection:
                if database.is_postgres:
                    # Two processes that start together must not both make a table.
                    connection.execute(
                        sa.text("SELECT pg_advisory_xact_lock(hashtext('fasten schema'))")
                    )
                self._tables[0].metadata.create_all(connection, list(self._tables))
                self._write_version(connection)
        except sa.exc.ProgrammingError as error:
            raise SchemaProblem(
                f"{database.problem(error).message} (table {self._tables[0].fullname})"
            ) from None

    def _write_version(self, connection: Connection) -> None:
        import sqlalchemy as sa

        if self._meta is None:
            return
        known = set(connection.execute(sa.select(self._meta.c.key)).scalars())
        for key, value in (("schema", str(SCHEMA)), ("min_writer", str(SCHEMA))):
            if key not in known:
                connection.execute(self._meta.insert().values(key=key, value=value))

    def _check_version(self) -> None:
        import sqlalchemy as sa

        if self._meta is None:
            return
        with self._database.transaction() as connection:
            found = dict(
                connection.execute(sa.select(self._meta.c.key, self._meta.c.value)).all()  # type: ignore[arg-type]
            )
        needed = int(found.get("min_writer", SCHEMA))
        if needed > SCHEMA:
            raise SchemaProblem(
                f"the store asks for writers of schema {needed}, this fasten writes "
                f"{SCHEMA}; upgrade fasten (rows are kept until then)"
            )


# --- the audit stream ------------------------------------------------------------------


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
    ) -> None:
        self.dsn = dsn
        self.database = database or Database(dsn)
        self._entropy = entropy
        self._tables: Tables | None = None
        self._schema: _Schema | None = None
        self._sql: dict[str, _Statement] = {}

    @property
    def tables(self) -> Tables:
        """
        Return the Core tables; plain SQL over them is supported.
        """
        if self._tables is None:
            self._tables = audit_tables(self.dsn)
        return self._tables

    @property
    def schema(self) -> _Schema:
        """
        Return what makes and checks the tables.
        """
        if self._schema is None:
            self._schema = _Schema(self.database, attrs.astuple(self.tables, recurse=False))
        return self._schema

    # -- appending --

    def append(
        self,
        writer: Writer,
        rows: Sequence[tuple[int, Any]],
        last: int,
        *,
        pause: Callable[[], None] = lambda: None,
    ) -> list[tuple[Any, ...]]:
        """
        Store a batch in one transaction; return the stored rows, as columns.

        Rows at or below the writer's watermark are in the store already and are
        left out. *last* 0 means that the rows have no place in a journal. *pause*
        is called between pieces, so that other threads get their turn.

        Raises:
            Exception: whatever the driver says; nothing is stored then, unless it
                is CommitUnanswered. `Database.problem` tells what it means.
        """
        self.schema.ensure()
        try:
            return self._append(writer, rows, last, frozenset(), pause)
        except Exception as error:  # looked at, and raised again if not ours
            if not self._is_known_id(error):
                self._look_again(error)
                raise
        known = self._known_ids([row[0] for _, row in rows])
        return self._append(writer, rows, last, known, pause)

    def _append(
        self,
        writer: Writer,
        rows: Sequence[tuple[int, Any]],
        last: int,
        known: frozenset[str],
        pause: Callable[[], None],
    ) -> list[tuple[Any, ...]]:
        with self.database.transaction() as connection:
            seq, ahead, now = self._lock_node(connection, writer)
            heads = self._heads(connection, writer)
            mark = self._watermark(connection, writer) if last else -1
            fresh = [row for index, row in rows if index > mark or not last]
            if known:
                fresh = [row for row in fresh if row[0] not in known]
            sealed = self._seal(connection, writer, fresh, seq, heads, now, pause)
            self._advance(connection, writer, heads, seq + len(sealed), now, ahead, fresh)
            if last > mark and last:
                self._statement("mark").run(
                    connection,
                    writer_id=writer.id,
                    service_id=writer.service,
                    source_node_id=writer.node,
                    watermark=last,
                    updated_at=now,
                )
        return sealed

    def _lock_node(self, connection: Connection, writer: Writer) -> tuple[int, int, Any]:
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
        return {
            row[2]: chain.Head(**dict(zip(_HEAD_COLUMNS, row, strict=True))) for row in found
        }

    def _watermark(self, connection: Connection, writer: Writer) -> int:
        found = self._statement("watermark").run(connection, writer_id=writer.id).first()
        return found[0] if found else 0

    def watermark(self, writer_id: str) -> int:
        """
        Return the highest index of *writer_id* that the store accounts for.
        """
        self.schema.ensure()
        with self.database.transaction() as connection:
            found = self._statement("watermark").run(connection, writer_id=writer_id)
            row = found.first()
        return row[0] if row else 0

    def _seal(
        self,
        connection: Connection,
        writer: Writer,
        fresh: list[Any],
        seq: int,
        heads: dict[str, chain.Head],
        now: Any,
        pause: Callable[[], None],
    ) -> list[tuple[Any, ...]]:
        sealed: list[tuple[Any, ...]] = []
        with self._loader(connection) as load:
            for start in range(0, len(fresh), PIECE_ROWS):
                if start:
                    pause()
                piece = fresh[start : start + PIECE_ROWS]
                part = chain.seal(
                    piece,
                    service=writer.service,
                    node=writer.node,
                    first_seq=seq + start + 1,
                    heads=heads,
                    salts=self._entropy(chain.SALT_BYTES * len(piece)),
                    stored_at=now if isinstance(now, str) else _wire_time(now),
                )
                load(part)
                sealed += part
        return sealed

    @contextmanager
    def _loader(
        self, connection: Connection
    ) -> Iterator[Callable[[list[tuple[Any, ...]]], None]]:
        """
        Yield what inserts a piece: COPY on Postgres, one prepared INSERT on SQLite.
        """
        sql = self._statement("insert").sql
        if not self.database.is_postgres:
            yield lambda part: connection.exec_driver_sql(sql, part) and None
            return
        cursor = connection.connection.cursor()
        table = self.tables.audit
        names = ", ".join(AUDIT_COLUMNS)
        target = connection.dialect.identifier_preparer.format_table(table)
        with cursor.copy(f"COPY {target} ({names}) FROM STDIN") as copy:  # type: ignore[attr-defined]
            yield lambda part: copy.write(_copy_text(part))
        cursor.close()

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
            new_ahead=max(ahead, _ahead_ms(fresh)),
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

    def _known_ids(self, ids: list[str]) -> frozenset[str]:
        import sqlalchemy as sa

        column = self.tables.audit.c.id
        with self.database.transaction() as connection:
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
        """
        with self.database.reading() as connection:
            statement = _audit_select(self, connection, query)
            found = connection.execute(statement).all()
            total = self._count(connection, query) if query.count else None
        rows = [_audit_row(row) for row in found[: query.limit]]
        more = len(found) > query.limit
        after = encode_cursor("audit", rows[-1].id) if more else None
        return Page(rows=rows, next=after, total=total)

    def _count(self, connection: Connection, query: Query) -> int:
        import sqlalchemy as sa

        conditions = _audit_conditions(self, connection, query)
        statement = sa.select(sa.func.count()).select_from(self.tables.audit)
        return int(connection.execute(statement.where(*conditions)).scalar_one())

    def positions(self) -> dict[tuple[str, str], int]:
        """
        Return the highest number of each (service, node): where a follower starts.
        """
        import sqlalchemy as sa

        node = self.tables.node
        with self.database.reading() as connection:
            found = connection.execute(
                sa.select(node.c.service_id, node.c.source_node_id, node.c.seq)
            ).all()
        return {(row[0], row[1]): row[2] for row in found}

    def follow(
        self, positions: Mapping[tuple[str, str], int], query: Query
    ) -> tuple[list[AuditRow], dict[tuple[str, str], int]]:
        """
        Return rows stored after *positions*, and the positions after them.

        Pages by number, not by time: a row that was spooled for an hour is new too.
        """
        ends = self.positions()
        rows: list[AuditRow] = []
        for place, end in ends.items():
            if end > positions.get(place, 0):
                rows += self._between(place, positions.get(place, 0), end, query)
        rows.sort(key=lambda row: row.id)
        return rows, {**positions, **ends}

    def _between(
        self, place: tuple[str, str], after: int, until: int, query: Query
    ) -> list[AuditRow]:
        import sqlalchemy as sa

        audit = self.tables.audit
        with self.database.reading() as connection:
            found = connection.execute(
                sa.select(*(audit.c[c] for c in AUDIT_COLUMNS))
                .where(
                    audit.c.service_id == place[0],
                    audit.c.source_node_id == place[1],
                    audit.c.monotonic_seq > after,
                    audit.c.monotonic_seq <= until,
                    *_audit_conditions(self, connection, query),
                )
                .order_by(audit.c.monotonic_seq)
            ).all()
        return [_audit_row(row) for row in found]

    def _ahead_ms(self, connection: Connection) -> int:
        import sqlalchemy as sa

        most = sa.func.coalesce(sa.func.max(self.tables.node.c.ahead_ms), 0)
        return int(connection.execute(sa.select(most)).scalar_one())

    # -- statements --

    def _statement(self, name: str) -> _Statement:
        if not self._sql:
            engine = self.database.engine
            made = _append_statements(self.tables, is_postgres=self.database.is_postgres)
            self._sql = {k: _Statement(v, engine) for k, v in made.items()}
        return self._sql[name]


_CLASS: Final = 7  # Pending.retention_class
_HEAD_COLUMNS: Final = (
    "service_id",
    "source_node_id",
    "retention_class",
    "seq",
    "hash",
    "count",
    "frontier",
    "pruned_seq",
    "pruned_hash",
    "pruned_count",
    "pruned_frontier",
    "checkpointed_at",
)


def _append_statements(tables: Tables, *, is_postgres: bool) -> dict[str, Any]:
    import sqlalchemy as sa
    from sqlalchemy import bindparam as p
    from sqlalchemy.dialects import postgresql, sqlite

    upsert = postgresql.insert if is_postgres else sqlite.insert
    node, head, writer = tables.node, tables.head, tables.writer
    # On SQLite BEGIN IMMEDIATE holds the lock that FOR UPDATE takes on Postgres.
    now = (
        sa.func.clock_timestamp()
        if is_postgres
        else sa.literal_column("strftime('%Y-%m-%dT%H:%M:%f', 'now') || '000Z'")
    )
    at_node = (
        (node.c.service_id == p("service_id"))
        & (node.c.source_node_id == p("source_node_id"))
    )
    at_head = (
        (head.c.service_id == p("service_id"))
        & (head.c.source_node_id == p("source_node_id"))
    )
    marked = upsert(writer).values({c.name: p(c.name) for c in writer.c})
    return {
        "node": sa.select(node.c.seq, node.c.ahead_ms, now)
        .where(at_node)
        .with_for_update(),
        "new_node": upsert(node)
        .values(
            service_id=p("service_id"),
            source_node_id=p("source_node_id"),
            seq=sa.literal_column("0"),
            ahead_ms=sa.literal_column("0"),
            updated_at=now,
        )
        .on_conflict_do_nothing(),
        "heads": sa.select(*(head.c[c] for c in _HEAD_COLUMNS))
        .where(at_head)
        .order_by(head.c.retention_class)
        .with_for_update(),
        "watermark": sa.select(writer.c.watermark).where(
            writer.c.writer_id == p("writer_id")
        ),
        "insert": tables.audit.insert().values({c: p(c) for c in AUDIT_COLUMNS}),
        "move_node": node.update()
        .where(at_node)
        .values(seq=p("new_seq"), ahead_ms=p("new_ahead"), updated_at=p("updated_at")),
        "move_head": _moved_head(upsert(head), p),
        "mark": marked.on_conflict_do_update(
            index_elements=["writer_id"],
            set_={c: marked.excluded[c] for c in ("watermark", "updated_at")},
        ),
    }


def _moved_head(insert: Any, p: Callable[[str], Any]) -> Any:
    import sqlalchemy as sa

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


_COPY_ESCAPES: Final = str.maketrans(
    {"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r"}
)


def _copy_text(part: Iterable[tuple[Any, ...]]) -> str:
    """
    Spell rows in COPY's text format.
    """
    lines = []
    for row in part:
        fields = ["\\N" if v is None else v if type(v) is str else str(v) for v in row]
        line = "\t".join(fields)
        # Few rows hold anything to escape: counting what must stand there is cheap.
        if (
            line.count("\\") != row.count(None)
            or line.count("\t") != len(row) - 1
            or "\n" in line
            or "\r" in line
        ):
            line = "\t".join(
                field if value is None else field.translate(_COPY_ESCAPES)
                for field, value in zip(fields, row, strict=True)
            )
        lines.append(line)
    lines.append("")
    return "\n".join(lines)


def _wire_time(moment: datetime) -> str:
    delta = moment - _EPOCH
    us = (delta.days * 86_400 + delta.seconds) * 1_000_000 + delta.microseconds
    return format_timestamp(us)


_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


# --- reading ----------------------------------------------------------------------


def _audit_select(
    repository: AuditRepository, connection: Connection, query: Query
) -> Any:
    import sqlalchemy as sa

    audit = repository.tables.audit
    key = audit.c.id
    conditions = _audit_conditions(repository, connection, query)
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


def _audit_conditions(
    repository: AuditRepository, connection: Connection, query: Query
) -> list[Any]:
    audit, dsn = repository.tables.audit, repository.dsn
    conditions = [_equals(audit, dsn, k, v) for k, v in query.filters.items()]
    conditions += _scope(audit, query)
    if query.since_us is not None:
        conditions.append(audit.c.timestamp >= _moment(dsn, query.since_us))
        # An id never stands for an earlier time than its row: this bound is safe.
        conditions.append(audit.c.id >= f"evt-{ulid_stamp(query.since_us // 1000)}")
    if query.until_us is not None:
        conditions.append(audit.c.timestamp < _moment(dsn, query.until_us))
        last_ms = query.until_us // 1000 + repository._ahead_ms(connection) + 1
        conditions.append(audit.c.id < f"evt-{ulid_stamp(last_ms)}")
    return conditions


def _equals(table: sa.Table, dsn: Dsn, column: str, value: Any) -> Any:
    import sqlalchemy as sa

    if column in ("timestamp", "stored_at", "shipped_at"):
        return table.c[column] == _moment(dsn, parse_timestamp(value))
    equal = table.c[column] == value
    if column in ("target", "actor") and dsn.backend == "postgresql":
        head = _indexed(table, dsn, column) == str(value)[:INDEXED_CHARACTERS]
        return sa.and_(head, equal)
    return equal


def _scope(table: sa.Table, query: Query) -> list[Any]:
    if query.scope is ALL_TENANTS:
        return []
    if query.scope is None:
        return [table.c.tenant_id.is_(None)]
    return [table.c.tenant_id == query.scope]


def _moment(dsn: Dsn, us: int) -> Any:
    if dsn.backend == "postgresql":
        return datetime.fromisoformat(format_timestamp(us))
    return format_timestamp(us)


def _audit_row(row: Sequence[Any]) -> AuditRow:
    values = dict(zip(AUDIT_COLUMNS, row, strict=True))
    for name in ("timestamp", "stored_at", "shipped_at"):
        if isinstance(values[name], datetime):
            values[name] = _wire_time(values[name])
    if values["detail"] is not None:
        values["detail"] = json.loads(values["detail"])
    return AuditRow(**values)


# --- the sys and api streams ---------------------------------------------------------


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
        self._schema: _Schema | None = None

    @property
    def table(self) -> sa.Table:
        """
        Return the Core table.
        """
        if self._table is None:
            self._table = stream_table(self.dsn, self.stream)
        return self._table

    @property
    def schema(self) -> _Schema:
        """
        Return what makes and checks the table.
        """
        if self._schema is None:
            self._schema = _Schema(self.database, [self.table])
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
        fixed["timestamp"] = _moment(self.dsn, parse_timestamp(row["timestamp"]))
        free = {k: v for k, v in row.items() if k not in fixed and k != "shape"}
        fixed["fields"] = json.dumps(free, ensure_ascii=False, separators=(",", ":"))
        return fixed

    def query(self, query: Query) -> Page:
        """
        Return one page of rows in the order in which they were stored.
        """
        import sqlalchemy as sa

        position = self.table.c.position
        conditions = self._conditions(query)
        with self.database.reading() as connection:
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
        import sqlalchemy as sa

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
        conditions += _scope(table, query)
        if query.since_us is not None:
            conditions.append(table.c.timestamp >= _moment(dsn, query.since_us))
        if query.until_us is not None:
            conditions.append(table.c.timestamp < _moment(dsn, query.until_us))
        if query.q is not None:
            conditions.append(
                table.c.event.icontains(query.q, autoescape=True)
                | table.c.fields.icontains(query.q, autoescape=True)
            )
        return conditions

    def _row(self, row: Any) -> SysRow | ApiRow:
        values = dict(row._mapping)
        del values["position"]
        values["fields"] = json.loads(values["fields"])
        if isinstance(values["timestamp"], datetime):
            values["timestamp"] = _wire_time(values["timestamp"])
        return SysRow(**values) if self.stream == "sys" else ApiRow(**values)

    def sweep(self, before_us: int, limit: int = 10_000) -> int:
        """
        Delete up to *limit* rows older than *before_us*; return how many.
        """
        import sqlalchemy as sa

        table = self.table
        expired = (
            sa.select(table.c.position)
            .where(table.c.timestamp < _moment(self.dsn, before_us))
            .limit(limit)
        )
        with self.database.transaction() as connection:
            done = connection.execute(
                table.delete().where(table.c.position.in_(expired.scalar_subquery()))
            )
            return int(done.rowcount)


def _position(stream: str, cursor: str) -> int:
    key = decode_cursor(stream, cursor)
    if not key.isdigit():
        raise InvalidQuery("cursor is not from a page of this store", "cursor")
    return int(key)
