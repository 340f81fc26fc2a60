# SPDX-License-Identifier: Apache-2.0
"""
Inserts that wait for their transaction's end: SQLAlchemy's async twins in plain calls.

`emit()` cannot await, so the insert is done where SQLAlchemy itself does I/O: as the
transaction commits. What is rolled back, savepoints included, is never inserted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final
from weakref import WeakKeyDictionary

import sqlalchemy as sa

from fasten.repository.insertion import Refusal

__all__ = ["catch_up", "in_connection", "in_session", "is_autocommit"]

Late = Callable[[Any], None]
"""One insert that is still to be done, given the session or connection."""


def is_autocommit(connection: sa.Connection) -> bool:
    """
    Tell whether each statement of *connection* is a transaction of its own.
    """
    level = connection.get_execution_options().get("isolation_level")
    if level is None:
        # What create_engine(isolation_level=) was given has no public name.
        level = getattr(connection.dialect, "_on_connect_isolation_level", None)
    return bool(level == "AUTOCOMMIT")


# --- sessions -------------------------------------------------------------------------

_of_sessions: Final[WeakKeyDictionary[Any, list[tuple[Any, Late]]]] = (
    WeakKeyDictionary()
)


def in_session(session: Any, late: Late) -> None:
    """
    Do *late* as the innermost transaction of *session* commits, if it does.
    """
    transaction = session.get_nested_transaction() or session.get_transaction()
    if transaction is None:
        transaction = session.begin()
    if session not in _of_sessions:
        _of_sessions[session] = []
        sa.event.listen(session, "before_commit", catch_up)
        sa.event.listen(session, "after_transaction_end", _forget)
    _of_sessions[session].append((transaction, late))


def catch_up(session: Any) -> None:
    """
    Do what waits for the innermost transaction of *session*, before anything else.
    """
    waiting = _of_sessions.get(session)
    if not waiting:
        return
    innermost = session.get_nested_transaction() or session.get_transaction()
    due = [late for transaction, late in waiting if transaction is innermost]
    waiting[:] = [each for each in waiting if each[0] is not innermost]
    for late in due:
        late(session)


def _forget(session: Any, transaction: Any) -> None:
    # What was not done before its transaction ended was rolled back with it.
    waiting = _of_sessions.get(session, [])
    waiting[:] = [each for each in waiting if each[0] is not transaction]


# --- connections ----------------------------------------------------------------------

_of_connections: Final[WeakKeyDictionary[Any, list[Late]]] = WeakKeyDictionary()


def in_connection(connection: sa.Connection, late: Late) -> None:
    """
    Do *late* before *connection* commits or sets another savepoint.

    So all that waits was handed in after the innermost savepoint was set, and any
    roll-back undoes all of it.

    Raises:
        Refusal: the connection commits each statement by itself.
    """
    if is_autocommit(connection):
        raise Refusal(
            "this AsyncConnection is in AUTOCOMMIT, so nothing would ever commit the "
            "row; use `await fasten.aemit(..., connection=connection)`"
        )
    if not connection.in_transaction():
        connection.begin()
    if connection not in _of_connections:
        _of_connections[connection] = []
        for event in ("commit", "prepare_twophase", "savepoint", "release_savepoint"):
            sa.event.listen(connection, event, _do)
        for event in ("rollback", "rollback_twophase", "rollback_savepoint"):
            sa.event.listen(connection, event, _drop)
    _of_connections[connection].append(late)


def _do(connection: Any, *_: Any) -> None:
    waiting = _of_connections.get(connection)
    if waiting:
        # Taken out first: an insert sets a savepoint, and would come back here.
        due, waiting[:] = list(waiting), []
        for late in due:
            late(connection)


def _drop(connection: Any, *_: Any) -> None:
    waiting = _of_connections.get(connection)
    if waiting:
        waiting.clear()
