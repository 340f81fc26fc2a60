# SPDX-License-Identifier: Apache-2.0
"""
Callers' own connections: which kinds there are, and how a row joins their transaction.

A kind is told by the names of its classes: nothing is imported that the caller has
not loaded. How a driver takes the row is in `insertion`; where it goes, in `outbox`.
"""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final, Literal, Protocol
from weakref import WeakKeyDictionary

import sqlalchemy as sa

from fasten.repository import deferral
from fasten.repository.insertion import (
    Entry,
    Misplaced,
    Place,
    Refusal,
    check_file,
    into_psycopg,
    into_psycopg_async,
    into_sqlite,
    is_alone,
    is_missing_table,
)

__all__ = ["Misplaced", "Nudge", "ainsert", "insert", "kind_of"]

Kind = Literal[
    "sqlite3",
    "psycopg",
    "psycopg async",
    "connection",
    "async connection",
    "session",
    "async session",
    "scoped",
    "django",
]
"""What a caller may hand in; `scoped` stands for the session behind a registry."""

_KINDS: Final[dict[tuple[str, str], Kind]] = {
    ("sqlite3", "Connection"): "sqlite3",
    ("psycopg", "Connection"): "psycopg",
    ("psycopg", "AsyncConnection"): "psycopg async",
    ("sqlalchemy.engine.base", "Connection"): "connection",
    ("sqlalchemy.ext.asyncio.engine", "AsyncConnection"): "async connection",
    ("sqlalchemy.orm.session", "Session"): "session",
    ("sqlalchemy.ext.asyncio.session", "AsyncSession"): "async session",
    ("sqlalchemy.orm.scoping", "scoped_session"): "scoped",
    ("sqlalchemy.ext.asyncio.scoping", "async_scoped_session"): "scoped",
    ("django.db.backends.base.base", "BaseDatabaseWrapper"): "django",
    ("django.utils.connection", "ConnectionProxy"): "django",
}
_known: Final[dict[type, Kind | None]] = {}


class Nudge(Protocol):
    """
    What is told that rows may be waiting.
    """

    def now(self) -> None:
        """
        Look: something was committed.
        """

    def soon(self) -> None:
        """
        Look again and again for a second: something may be committed any moment.
        """


def kind_of(connection: Any) -> Kind:
    """
    Tell what *connection* is.

    Raises:
        TypeError: it is nothing that a row could be written through.
    """
    kind = _kind(connection)
    if kind is None:
        cls = type(connection)
        raise TypeError(
            f"connection= is a {cls.__module__}.{cls.__qualname__}; pass an open "
            "SQLAlchemy Connection or Session (or AsyncConnection, AsyncSession), a "
            "psycopg or sqlite3 connection, or Django's django.db.connection"
            + _hint(connection)
        )
    return kind


def _kind(connection: Any) -> Kind | None:
    cls = type(connection)
    if cls not in _known:
        names = ((base.__module__, base.__qualname__) for base in cls.__mro__)
        _known[cls] = next((_KINDS[name] for name in names if name in _KINDS), None)
    return _known[cls]


def _hint(given: Any) -> str:
    name = type(given).__name__
    if name in ("Cursor", "AsyncCursor", "ClientCursor", "ServerCursor"):
        return "; of a cursor that is its .connection"
    if name in ("Engine", "AsyncEngine"):
        return "; an engine has none of its own: use the one of engine.begin()"
    if name.endswith(("Pool", "sessionmaker")):
        return "; this only makes them: take one from it"
    return ""


def insert(connection: Any, entry: Entry, place: Place, nudge: Nudge) -> None:
    """
    Insert *entry* in the transaction of *connection*, which stays usable.

    Through SQLAlchemy's async twins, which cannot be waited for here, it is done as
    their transaction commits. What else must be awaited has been refused before.

    Raises:
        TypeError: the connection is of no kind that can be used.
        AuditStoreError: it did not take the row; says the cure.
        Misplaced: it leads to another database than *place*.
    """
    kind = kind_of(connection)
    if kind == "scoped":
        insert(connection(), entry, place, nudge)
        return
    with _explained(entry, place, also=Misplaced):
        _WAYS[kind](connection, entry, place, nudge)


async def ainsert(connection: Any, entry: Entry, place: Place, nudge: Nudge) -> None:
    """
    Insert as `insert` does, at once also where that has to be awaited.

    Raises:
        TypeError: the connection is of no kind that can be used.
        AuditStoreError: it did not take the row; says the cure.
        Misplaced: it leads to another database than *place*.
    """
    kind = kind_of(connection)
    if kind == "scoped":
        await ainsert(connection(), entry, place, nudge)
    elif kind in _AWAITED:
        with _explained(entry, place, also=Misplaced):
            await _AWAITED[kind](connection, entry, place, nudge)
    else:
        insert(connection, entry, place, nudge)


@contextmanager
def _explained(
    entry: Entry, place: Place, also: type[Exception] = TypeError
) -> Iterator[None]:
    """
    Tell what a driver says in our words, without what it was given.
    """
    try:
        yield
    except (TypeError, also):
        raise
    except Exception as error:  # whichever driver's it is
        raise place.refused(entry, error) from None


# --- drivers --------------------------------------------------------------------------


def _into_sqlite3(raw: Any, entry: Entry, place: Place, nudge: Nudge) -> None:
    into_sqlite(raw, entry, place)
    nudge.soon() if raw.in_transaction else nudge.now()


def _into_psycopg(raw: Any, entry: Entry, place: Place, nudge: Nudge) -> None:
    into_psycopg(raw, entry, place)
    nudge.now() if is_alone(raw) else nudge.soon()


async def _into_psycopg_async(
    raw: Any, entry: Entry, place: Place, nudge: Nudge
) -> None:
    await into_psycopg_async(raw, entry, place)
    nudge.now() if is_alone(raw) else nudge.soon()


def _into_driver(raw: Any, entry: Entry, place: Place) -> bool:
    """
    Insert through the driver itself; false where it is one that we do not know.
    """
    kind = _kind(raw)
    if kind == "psycopg":
        into_psycopg(raw, entry, place)
    elif kind == "sqlite3":
        into_sqlite(raw, entry, place)
    return kind in ("psycopg", "sqlite3")


# --- SQLAlchemy -----------------------------------------------------------------------

_told: Final[WeakKeyDictionary[Any, Nudge]] = WeakKeyDictionary()
"""Connections and sessions whose commits are listened to, and who wants to know."""


def _into_connection(
    connection: sa.Connection, entry: Entry, place: Place, nudge: Nudge
) -> None:
    _insert_in(connection, entry, place)
    _listen(connection, "commit", nudge)
    nudge.now() if deferral.is_autocommit(connection) else nudge.soon()


def _into_session(session: Any, entry: Entry, place: Place, nudge: Nudge) -> None:
    deferral.catch_up(session)
    _insert_in(_connection_of(session), entry, place)
    _listen(session, "after_commit", nudge)


def _connection_of(session: Any) -> sa.Connection:
    try:
        found: sa.Connection = session.connection()
    except sa.exc.UnboundExecutionError:
        raise TypeError(
            "this Session is bound by mapper, so it has several connections; pass the "
            "one of your tables: session.connection(bind_arguments={'mapper': Model})"
        ) from None
    return found


def _insert_in(connection: sa.Connection, entry: Entry, place: Place) -> None:
    dialect = connection.dialect.name
    if dialect not in ("postgresql", "sqlite"):
        raise Refusal(
            f"{dialect} has no outbox: emit without connection= once the transaction "
            "has committed"
        )
    if not connection.in_transaction():
        # What any statement would do; the driver itself is spoken to from here on.
        connection.begin()
    if _into_driver(connection.connection.driver_connection, entry, place):
        return
    if (dialect == "postgresql") != place.is_postgres:
        raise place.misplaced(f"a {dialect} database")
    if dialect == "sqlite":
        _insert_in_sqlite(connection, entry, place)
    else:
        _insert_in_postgres(connection, entry, place)


def _insert_in_sqlite(connection: sa.Connection, entry: Entry, place: Place) -> None:
    found = connection.exec_driver_sql("PRAGMA database_list").all()
    check_file(list(found), place)
    try:
        connection.execute(place.core, place.named_values(entry))
    except sa.exc.OperationalError as error:
        if not is_missing_table(error):
            raise
        connection.execute(place.creation)
        connection.execute(place.core, place.named_values(entry))


def _insert_in_postgres(connection: sa.Connection, entry: Entry, place: Place) -> None:
    values = place.named_values(entry)
    if deferral.is_autocommit(connection):
        done = connection.execute(place.core, values)
    else:
        with connection.begin_nested():
            done = connection.execute(place.core, values)
    if done.rowcount == 0:
        raise place.misplaced("another Postgres database, or another schema")


def _listen(target: Any, event: str, nudge: Nudge) -> None:
    is_new = target not in _told
    _told[target] = nudge
    if is_new:
        sa.event.listen(target, event, _SAYS[event])


def _session_committed(session: Any) -> None:
    if (nudge := _told.get(session)) is not None:
        nudge.now()


def _connection_commits(connection: Any) -> None:
    # Told before COMMIT is sent: it is seen only in a moment.
    if (nudge := _told.get(connection)) is not None:
        nudge.soon()


_SAYS: Final[dict[str, Callable[[Any], None]]] = {
    "after_commit": _session_committed,
    "commit": _connection_commits,
}


def _defer_session(session: Any, entry: Entry, place: Place, nudge: Nudge) -> None:
    def late(inner: Any) -> None:
        with _explained(entry, place):
            _insert_in(_connection_of(inner), entry, place)

    deferral.in_session(session.sync_session, late)
    _listen(session.sync_session, "after_commit", nudge)


def _defer_connection(
    connection: Any, entry: Entry, place: Place, nudge: Nudge
) -> None:
    inner = connection.sync_connection
    if inner is None:
        raise Refusal("this AsyncConnection is not open yet; await its start() first")

    def late(inner: sa.Connection) -> None:
        with _explained(entry, place):
            _insert_in(inner, entry, place)

    deferral.in_connection(inner, late)
    _listen(inner, "commit", nudge)


async def _run_connection(
    connection: Any, entry: Entry, place: Place, nudge: Nudge
) -> None:
    await connection.run_sync(_into_connection, entry, place, nudge)


async def _run_session(session: Any, entry: Entry, place: Place, nudge: Nudge) -> None:
    await session.run_sync(_into_session, entry, place, nudge)


# --- Django ---------------------------------------------------------------------------


def _into_django(given: Any, entry: Entry, place: Place, nudge: Nudge) -> None:
    connection = given
    if not hasattr(type(given), "ensure_connection"):
        # The proxy `django.db.connection` stands for this thread's own connection.
        connection = sys.modules["django.db"].connections[given.alias]
    connection.validate_thread_sharing()
    connection.ensure_connection()
    if not _into_driver(connection.connection, entry, place):
        _insert_in_django(connection, entry, place)
    if connection.in_atomic_block or connection.get_autocommit():
        connection.on_commit(nudge.now)
    else:
        nudge.soon()


def _insert_in_django(connection: Any, entry: Entry, place: Place) -> None:
    """
    Insert through whatever driver it is: psycopg2, most likely.
    """
    vendor = connection.vendor
    if vendor != "postgresql" or not place.is_postgres:
        raise place.misplaced(f"a {vendor} database")
    saved = connection.savepoint()
    try:
        with connection.cursor() as cursor:
            cursor.execute(place.psycopg_sql, place.values(entry))
            if cursor.rowcount == 0:
                raise place.misplaced("another Postgres database, or another schema")
    except BaseException:
        if saved is not None:
            connection.savepoint_rollback(saved)
            connection.savepoint_commit(saved)
        raise
    if saved is not None:
        connection.savepoint_commit(saved)


_WAYS: Final[dict[str, Callable[[Any, Entry, Place, Nudge], None]]] = {
    "sqlite3": _into_sqlite3,
    "psycopg": _into_psycopg,
    "connection": _into_connection,
    "async connection": _defer_connection,
    "session": _into_session,
    "async session": _defer_session,
    "django": _into_django,
}
_AWAITED: Final[dict[str, Callable[[Any, Entry, Place, Nudge], Awaitable[None]]]] = {
    "psycopg async": _into_psycopg_async,
    "async connection": _run_connection,
    "async session": _run_session,
}
