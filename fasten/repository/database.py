# SPDX-License-Identifier: Apache-2.0
"""
One server or file: connections, transactions, and what its errors mean.

Nothing here waits, sleeps or starts threads; `abort()` is what a watchdog may call.
"""

from __future__ import annotations

import os
import socket
import stat
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from fasten.settings import Dsn

__all__ = ["CommitUnanswered", "Database", "Problem", "SchemaProblem", "is_missing"]

READ_S: Final = 30.0
POOL_S: Final = 5.0
STEPS: Final = 100_000
"""How many steps of a SQLite query there are between two looks at the clock."""


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


class Database:
    """
    One SQLite file or Postgres server: connections, transactions, what errors mean.

    One connection writes and is kept until `release()`; readers have at most two,
    opened on use. Where fasten *is_guest*, in a database of the business, it neither
    makes the file nor changes how it is kept.
    """

    def __init__(self, dsn: Dsn, *, is_guest: bool = False) -> None:
        self.dsn = dsn
        self._is_guest = is_guest
        self.is_postgres = dsn.backend == "postgresql"
        self._file = None if dsn.path is None else Path(dsn.path)
        self._engine: Engine | None = None
        self._readers: Engine | None = None
        self._connection: Connection | None = None
        self._inherited: list[object] = []
        self._opened: tuple[int, int] | None = None

    # -- connections --

    def load(self) -> None:
        """
        Load what connecting takes, and connect to nothing.
        """
        if self.is_postgres:
            import psycopg  # noqa: F401  (loaded, not used)

            import fasten.repository.patience  # noqa: F401
        self.engine.dialect  # noqa: B018  (SQLAlchemy loads it with the engine)

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
        connect = self._connect_postgres if self.is_postgres else self._connect_sqlite
        return sa.create_engine(
            "postgresql+psycopg://" if self.is_postgres else "sqlite://",
            creator=lambda: connect(is_writer=is_writer),
            poolclass=sa.pool.QueuePool,
            pool_size=1 if is_writer else 2,
            max_overflow=0,
            pool_timeout=POOL_S,
            pool_pre_ping=self.is_postgres,
            # Readers of SQLite begin no transaction: there is nothing to roll back.
            pool_reset_on_return="rollback" if is_writer or self.is_postgres else None,
            hide_parameters=True,
        )

    def _connect_postgres(self, *, is_writer: bool) -> Any:
        import psycopg

        from fasten.repository.patience import BoundedConnection

        given: dict[str, str] = {
            "connect_timeout": "5",
            "application_name": "fasten",
            "target_session_attrs": "read-write" if is_writer else "any",
        }
        # A watchdog sees to the writer; readers are many, and see to themselves.
        kind = psycopg.Connection if is_writer else BoundedConnection
        try:
            # Poolers strand prepared statements and refuse start-up options.
            return kind.connect(
                self.dsn.conninfo(),
                prepare_threshold=None,
                **_not_in(self.dsn.conninfo(), given),
            )
        except psycopg.Error as error:
            # The frames below have the password among their locals, and who shows
            # tracebacks may show those: the error goes on without them.
            error.__context__ = None
            raise error.with_traceback(None) from None

    def _connect_sqlite(self, *, is_writer: bool) -> Any:
        import sqlite3
        from urllib.parse import quote

        path = str(self.dsn.path)
        is_owner = is_writer and not self._is_guest
        is_new = is_owner and not Path(path).exists()
        # Reading never creates a store: mode=ro fails where there is no file.
        mode = "rwc" if is_owner else "rw" if is_writer else "ro"
        connection = sqlite3.connect(
            f"file:{quote(path)}?mode={mode}",
            uri=True,
            isolation_level=None,
            check_same_thread=False,
            timeout=2.5,
            cached_statements=64,
        )
        try:
            if is_owner:
                _own_sqlite(connection, is_new=is_new)
            _prepare_sqlite(connection, is_writer=is_writer)
        except BaseException:
            connection.close()
            raise
        _give_to_owner(Path(path))
        if is_writer:
            self._opened = _identity(path)
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
            self._begin(connection, is_writer=True)
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

    @contextmanager
    def looking(self) -> Iterator[Connection]:
        """
        Yield the writing connection to read with: that keeps no writer waiting.
        """
        connection = self._writing()
        try:
            self._begin(connection, is_writer=False)
            yield connection
        finally:
            self._roll_back(connection)

    def run(self, sql: str) -> Any:
        """
        Run a statement of SQLite outside of any transaction; return its rows.
        """
        raw: Any = self._writing().connection.driver_connection
        return raw.execute(sql).fetchall()

    def _writing(self) -> Connection:
        # A file that was replaced, or removed, takes rows that nobody reads again.
        if self._file is not None and self._opened != _identity(self._file):
            self.release()
        if self._connection is None or self._connection.closed:
            self._connection = self.engine.connect()
        return self._connection

    def _begin(self, connection: Connection, *, is_writer: bool) -> None:
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
            connection.exec_driver_sql("BEGIN IMMEDIATE" if is_writer else "BEGIN")

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
    def reading(self, within_s: float | None = None) -> Iterator[Connection]:
        """
        Yield a read-only connection, whose work is stopped after *within_s* seconds.

        Raises:
            FileNotFoundError: there is no SQLite file yet; nothing is created.
        """
        self._require_file()
        with self._lending() as readers, readers.connect() as connection:
            raw: Any = connection.connection.driver_connection
            try:
                self._bind(raw, within_s)
                yield connection
            finally:
                if self._is_lost(raw):
                    connection.invalidate()

    @contextmanager
    def cursor(self, within_s: float | None = None) -> Iterator[Any]:
        """
        Yield a driver's cursor that only reads: `reading` at a third of its cost.

        Raises:
            FileNotFoundError: there is no SQLite file yet; nothing is created.
        """
        self._require_file()
        with self._lending() as readers:
            proxy = readers.raw_connection()
            raw: Any = proxy.driver_connection
            try:
                self._bind(raw, within_s)
                yield raw.cursor()
            finally:
                if self._is_lost(raw):
                    proxy.invalidate()
                proxy.close()

    @contextmanager
    def _lending(self) -> Iterator[Engine]:
        """
        Close what comes back to a pool that was released while it was lent.

        `Engine.dispose` leaves that to the garbage collector, which warns of it.
        """
        readers = self.readers
        pool = readers.pool
        try:
            yield readers
        finally:
            if readers.pool is not pool:
                pool.dispose()

    def _bind(self, raw: Any, within_s: float | None) -> None:
        """
        Bound what a reading connection does next.
        """
        if self.is_postgres:
            read_s = within_s or READ_S
            # A little later than the server's own timeout, whose answer says more.
            raw.patience_s = read_s + 1.0
            raw.execute(
                "SET TRANSACTION READ ONLY; "
                f"SET LOCAL statement_timeout = {round(read_s * 1000)}"
            )
        elif within_s is not None:
            until = time.monotonic() + within_s
            raw.set_progress_handler(lambda: time.monotonic() > until, STEPS)

    def _is_lost(self, raw: Any) -> bool:
        """
        Unbind a reading connection; tell whether it is closed.
        """
        if self.is_postgres:
            raw.patience_s = type(raw).patience_s
            return bool(raw.closed)
        raw.set_progress_handler(None, 0)
        return False

    def apart(self) -> Any:
        """
        Return a driver's connection that only reads, for its caller alone to close.

        Raises:
            FileNotFoundError: there is no SQLite file yet; nothing is created.
        """
        if self.is_postgres:
            return self._connect_postgres(is_writer=False)
        self._require_file()
        return self._connect_sqlite(is_writer=False)

    def _require_file(self) -> None:
        if self._file is not None and not self._file.exists():
            raise FileNotFoundError(f"there is no store at {self._file} yet")

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
        if type(original).__module__.partition(".")[0] not in ("psycopg", "sqlite3"):
            return _unexpected(original)
        if self.is_postgres:
            return _postgres_problem(original)
        return _sqlite_problem(original, self.dsn)

    def _is_broken(self, error: BaseException) -> bool:
        original = getattr(error, "orig", None) or error
        state = getattr(original, "sqlstate", None)
        return self.is_postgres and (state is None or state[:2] in ("08", "57"))


def _identity(path: Path | str) -> tuple[int, int] | None:
    try:
        found = os.stat(path)  # noqa: PTH116  (each append does: half the cost)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def is_missing(error: BaseException) -> bool:
    """
    Tell whether *error* says that there is no such file or table.
    """
    original = getattr(error, "orig", None) or error
    return (
        isinstance(original, FileNotFoundError)
        or getattr(original, "sqlstate", None) == "42P01"
        or "no such table" in str(original)
    )


def _not_in(conninfo: str, given: Mapping[str, str]) -> dict[str, Any]:
    return {name: value for name, value in given.items() if f"{name}=" not in conninfo}


def _own_sqlite(connection: Any, *, is_new: bool) -> None:
    if is_new:
        # Both only take effect before the first table is made.
        connection.execute("PRAGMA page_size = 8192")
        connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA wal_autocheckpoint = 4000")


def _prepare_sqlite(connection: Any, *, is_writer: bool) -> None:
    if is_writer:
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA secure_delete = ON")
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
        owner = path.stat()
        for suffix in ("-wal", "-shm"):
            made = os.lstat(f"{path}{suffix}")
            if stat.S_ISREG(made.st_mode) and made.st_uid != owner.st_uid:
                os.chown(f"{path}{suffix}", owner.st_uid, owner.st_gid)


def _unexpected(error: BaseException) -> Problem:
    """
    Judge what no driver raised: a value that it cannot bind, a pool, a bug.
    """
    name = type(error).__name__
    if isinstance(error, (OverflowError, UnicodeError, ValueError)):
        return Problem("row", f"the row cannot be stored ({name})")
    if isinstance(error, OSError):
        return Problem("transient", f"the store is not reachable ({name})")
    if isinstance(error, sa.exc.TimeoutError):
        return Problem("transient", "both connections of readers are busy; try again")
    return Problem("transient", f"{name} in the store's code")


_TOO_LONG: Final = (
    "the call took too long and was stopped; narrow a query by request_id, target, "
    "actor or a window of time"
)


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
    ('role "', "28000"),
    ('database "', "3D000"),
)


def _postgres_problem(error: BaseException) -> Problem:
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
    if state == "57014":
        return Problem("transient", f"Postgres 57014: {_TOO_LONG}")
    return Problem("transient", f"Postgres {state} ({name})")


def _state_in_text(error: BaseException) -> str | None:
    text = str(error)
    if "session is read-only" in text or "server is in hot standby mode" in text:
        return "25006"  # libpq's own words, for target_session_attrs=read-write
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
    if code == "SQLITE_INTERRUPT":
        return Problem("transient", f"{where}: {_TOO_LONG}")
    if code.startswith(("SQLITE_TOOBIG", "SQLITE_CONSTRAINT", "SQLITE_MISMATCH")):
        return Problem("row", f"{where} refuses the row ({code})")
    return Problem("transient", f"{where}: {code or type(error).__name__}")
