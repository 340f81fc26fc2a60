# SPDX-License-Identifier: Apache-2.0
"""
One transaction told in steps, done through every kind of connection that emit takes.

A step is a word: `write 1` and `emit 1` do the business and record it, `save`, `undo`
and `keep` set, roll back and release a savepoint, `commit` and `roll back` end.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, Final

import psycopg
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

import fasten
from tests.checker import faults, rows_of
from tests.web.django_project import configure

__all__ = [
    "ASYNC",
    "SYNC",
    "WAYS",
    "Way",
    "business",
    "opened",
    "prepare",
    "stored",
    "waiting",
]

CODE: Final = "ORDER_PLACED"


class Base(DeclarativeBase):
    """
    The models of the business.
    """


class Order(Base):
    """
    An order.
    """

    __tablename__ = "orders"
    id: Mapped[int] = mapped_column(primary_key=True)


def prepare(dsn: str) -> None:
    """
    Make the table of the business.
    """
    with _plain(dsn) as connection:
        connection.execute("CREATE TABLE orders (id integer PRIMARY KEY)")


def business(dsn: str) -> list[int]:
    """
    Return the orders that were committed.
    """
    with _plain(dsn) as connection:
        return [
            row[0] for row in connection.execute("SELECT id FROM orders ORDER BY id")
        ]


def waiting(dsn: str) -> int:
    """
    Return how many rows are committed and not yet moved.
    """
    with _plain(dsn) as connection:
        counted = connection.execute("SELECT count(*) FROM audit_log_outbox")
        return int(counted.fetchone()[0])


def stored(dsn: str) -> list[tuple[str, str, Any]]:
    """
    Return code, target and detail of what is stored, once all is moved.
    """
    assert fasten.flush(20)
    page = fasten.query(order="asc", limit=1000)
    if page.rows:
        assert [] == faults(rows_of(dsn))
    return [(row.code, row.target, row.detail) for row in page.rows]


@contextmanager
def _plain(dsn: str) -> Iterator[Any]:
    if dsn.startswith("sqlite"):
        connection: Any = sqlite3.connect(path_of(dsn), isolation_level=None)
    else:
        connection = psycopg.connect(dsn, autocommit=True)
    try:
        yield connection
    finally:
        connection.close()


def path_of(dsn: str) -> str:
    """
    Return the file of a SQLite DSN.
    """
    return dsn.removeprefix("sqlite:///")


def url(dsn: str, *, is_async: bool = False) -> str:
    """
    Spell a DSN as SQLAlchemy does.
    """
    if dsn.startswith("sqlite"):
        return dsn.replace("sqlite:", "sqlite+aiosqlite:" if is_async else "sqlite:")
    return dsn.replace("postgres:", "postgresql+psycopg:").replace(
        "postgresql:", "postgresql+psycopg:"
    )


class Way:
    """
    A connection to the database of the business, of one kind.
    """

    stores = ("sqlite", "postgres")
    has_savepoints = True

    def __init__(self, dsn: str) -> None:
        self.dsn = dsn
        self.open()

    @staticmethod
    def load() -> None:
        """
        Do what a process does once, before its first connection.
        """

    def open(self) -> None:
        """
        Connect.
        """
        raise NotImplementedError

    def do(self, *steps: str) -> None:
        """
        Take the steps, one after the other.
        """
        for step in steps:
            word, _, number = step.rpartition(" ")
            if word in ("write", "emit"):
                getattr(self, word)(int(number))
            else:
                getattr(self, step.replace(" ", "_"))()

    @property
    def connection(self) -> Any:
        """
        Return what is handed to emit.
        """
        raise NotImplementedError

    def sql(self, sql: str) -> None:
        """
        Run one statement.
        """
        self.connection.execute(sql)

    def write(self, number: int) -> None:
        """
        Place an order.
        """
        self.sql(f"INSERT INTO orders (id) VALUES ({number})")

    def emit(self, number: int) -> None:
        """
        Record an order in the transaction that placed it.
        """
        fasten.emit(CODE, number, connection=self.connection)

    def save(self) -> None:
        """
        Set a savepoint.
        """
        self.sql("SAVEPOINT s")

    def undo(self) -> None:
        """
        Roll back to the savepoint.
        """
        self.sql("ROLLBACK TO SAVEPOINT s")

    def keep(self) -> None:
        """
        Release the savepoint.
        """
        self.sql("RELEASE SAVEPOINT s")

    def commit(self) -> None:
        """
        Commit.
        """
        self.connection.commit()

    def roll_back(self) -> None:
        """
        Roll everything back.
        """
        self.connection.rollback()

    def close(self) -> None:
        """
        Disconnect.
        """
        self.connection.close()


class Sqlite3(Way):
    """
    sqlite3 as it is by default: it begins a transaction before the first write.
    """

    stores = ("sqlite",)

    def open(self) -> None:
        self._raw = sqlite3.connect(path_of(self.dsn))

    @property
    def connection(self) -> Any:
        return self._raw


class Sqlite3Explicit(Sqlite3):
    """
    sqlite3 in autocommit, where the caller begins.
    """

    def open(self) -> None:
        self._raw = sqlite3.connect(path_of(self.dsn), isolation_level=None)
        self.again()

    def again(self) -> None:
        """
        Begin another transaction.
        """
        self._raw.execute("BEGIN")


class Psycopg(Way):
    """
    psycopg as it is by default.
    """

    stores = ("postgres",)

    def open(self) -> None:
        self._raw = psycopg.connect(self.dsn)

    @property
    def connection(self) -> Any:
        return self._raw


class PsycopgBlocks(Psycopg):
    """
    psycopg in autocommit, where transaction() blocks begin and end.
    """

    def open(self) -> None:
        self._raw = psycopg.connect(self.dsn, autocommit=True)
        self.again()

    def again(self) -> None:
        """
        Begin another transaction.
        """
        self._raw.execute("BEGIN")


class PsycopgPipeline(Psycopg):
    """
    psycopg inside a pipeline.
    """

    def open(self) -> None:
        super().open()
        self._pipeline = self._raw.pipeline()
        self._pipeline.__enter__()

    def commit(self) -> None:
        super().commit()
        with self._raw.pipeline():
            pass  # leaving an inner one waits for the answers

    def close(self) -> None:
        self._pipeline.__exit__(None, None, None)
        super().close()


class CoreConnection(Way):
    """
    A Connection of SQLAlchemy.
    """

    def open(self) -> None:
        self._engine = sa.create_engine(url(self.dsn))
        self._connection = self._engine.connect()
        self._nested: list[Any] = []

    @property
    def connection(self) -> Any:
        return self._connection

    def sql(self, sql: str) -> None:
        self.connection.execute(sa.text(sql))

    def save(self) -> None:
        self._nested.append(self.connection.begin_nested())

    def undo(self) -> None:
        self._nested.pop().rollback()

    def keep(self) -> None:
        self._nested.pop().commit()

    def close(self) -> None:
        super().close()
        self._engine.dispose()


class OrmSession(CoreConnection):
    """
    A Session of SQLAlchemy.
    """

    def open(self) -> None:
        super().open()
        self._connection.close()
        self._connection = Session(self._engine)  # type: ignore[assignment]


class DjangoConnection(Way):
    """
    Django's connection, inside atomic().
    """

    @staticmethod
    def load() -> None:
        """
        Set Django up; what that connected to is closed.
        """
        configure()
        from django.db import connections

        connections.close_all()

    def open(self) -> None:
        configure()
        from django.db import connections, transaction

        known = connections.settings["default"]
        if self.dsn.startswith("sqlite"):
            given = {"NAME": path_of(self.dsn)}
        else:
            info = psycopg.conninfo.conninfo_to_dict(self.dsn)
            given = {
                "ENGINE": "django.db.backends.postgresql",
                "NAME": info["dbname"],
                "HOST": info["host"],
                "PORT": info["port"],
                "USER": info["user"],
            }
        connections.settings["business"] = {**known, **given}
        self._connection = connections["business"]
        self._transaction = transaction
        self._atomic = [transaction.atomic(using="business")]
        self._atomic[0].__enter__()

    @property
    def connection(self) -> Any:
        return self._connection

    @staticmethod
    def handler() -> Any:
        """
        Return where Django keeps its connections.
        """
        from django.db import connections

        return connections

    def sql(self, sql: str) -> None:
        with self._connection.cursor() as cursor:
            cursor.execute(sql)

    def save(self) -> None:
        self._atomic.append(self._transaction.atomic(using="business"))
        self._atomic[-1].__enter__()

    def undo(self) -> None:
        self._leave(RuntimeError())

    def keep(self) -> None:
        self._leave(None)

    commit, roll_back = keep, undo

    def again(self) -> None:
        """
        Begin another transaction.
        """
        self._atomic = [self._transaction.atomic(using="business")]
        self._atomic[0].__enter__()

    def _leave(self, error: Exception | None) -> None:
        self._atomic.pop().__exit__(error and type(error), error, None)

    def close(self) -> None:
        from django.db import connections

        while self._atomic:
            self.undo()
        self._connection.close()
        del connections["business"]
        del connections.settings["business"]


class Async(Way):
    """
    Something that must be awaited, in a loop of its own.
    """

    def open(self) -> None:
        self._runner = asyncio.Runner()
        self._runner.run(self.aopen())

    async def aopen(self) -> None:
        """
        Connect.
        """
        raise NotImplementedError

    def run(self, made: Coroutine[Any, Any, Any]) -> Any:
        """
        Wait for a coroutine.
        """
        return self._runner.run(made)

    def sql(self, sql: str) -> None:
        self.run(self.connection.execute(sa.text(sql)))

    def emit(self, number: int) -> None:
        self.run(fasten.aemit(CODE, number, connection=self.connection))

    def commit(self) -> None:
        self.run(self.connection.commit())

    def roll_back(self) -> None:
        self.run(self.connection.rollback())

    def close(self) -> None:
        self.run(self.aclose())
        self._runner.close()

    async def aclose(self) -> None:
        """
        Disconnect.
        """
        await self.connection.close()


class PsycopgAsync(Async):
    """
    psycopg's AsyncConnection.
    """

    stores = ("postgres",)

    async def aopen(self) -> None:
        self._raw = await psycopg.AsyncConnection.connect(self.dsn)

    @property
    def connection(self) -> Any:
        return self._raw

    def sql(self, sql: str) -> None:
        self.run(self._raw.execute(sql))


class AsyncCoreConnection(Async):
    """
    SQLAlchemy's AsyncConnection, awaited.
    """

    async def aopen(self) -> None:
        self._engine = create_async_engine(url(self.dsn, is_async=True))
        self._connection: Any = await self._engine.connect()
        self._nested: list[Any] = []

    @property
    def connection(self) -> Any:
        return self._connection

    def save(self) -> None:
        async def begin() -> Any:
            return await self.connection.begin_nested()

        self._nested.append(self.run(begin()))

    def undo(self) -> None:
        self.run(self._nested.pop().rollback())

    def keep(self) -> None:
        self.run(self._nested.pop().commit())

    async def aclose(self) -> None:
        await super().aclose()
        await self._engine.dispose()


class AsyncOrmSession(AsyncCoreConnection):
    """
    SQLAlchemy's AsyncSession, awaited.
    """

    async def aopen(self) -> None:
        await super().aopen()
        await self._connection.close()
        self._connection = AsyncSession(self._engine)


class _Plainly(AsyncCoreConnection):
    def emit(self, number: int) -> None:
        async def plainly() -> None:
            fasten.emit(CODE, number, connection=self.connection)

        self.run(plainly())


class AsyncCorePlainly(_Plainly):
    """
    SQLAlchemy's AsyncConnection, through emit without await.
    """


class AsyncOrmPlainly(_Plainly, AsyncOrmSession):
    """
    SQLAlchemy's AsyncSession, through emit without await.
    """


SYNC: Final = (
    Sqlite3,
    Sqlite3Explicit,
    Psycopg,
    PsycopgBlocks,
    PsycopgPipeline,
    CoreConnection,
    OrmSession,
    DjangoConnection,
)
"""Each kind of connection that is not awaited."""

ASYNC: Final = (
    PsycopgAsync,
    AsyncCoreConnection,
    AsyncOrmSession,
    AsyncCorePlainly,
    AsyncOrmPlainly,
)
"""... and those that are."""

WAYS: Final[tuple[Callable[[str], Way], ...]] = (*SYNC, *ASYNC)


@contextmanager
def opened(way: Callable[[str], Way], dsn: str) -> Iterator[Way]:
    """
    Open a way for a with-block.
    """
    made = way(dsn)
    try:
        yield made
    finally:
        made.close()
