# SPDX-License-Identifier: Apache-2.0
"""
A real store in the hands of its services, its operators, and of whoever forges it.

What `ledger` is in memory, over SQLite or Postgres.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
import psycopg

from fasten.evidence import Report
from fasten.proof import verify_store
from fasten.repository import AuditRepository, Writer
from fasten.repository.anchoring import Anchor
from fasten.repository.erasing import Erased, Eraser
from fasten.repository.holds import Hold
from fasten.repository.pruning import Order, Sweep, Sweeper
from fasten.retention import RetentionPolicy
from fasten.settings import parse_dsn
from tests.ledger import Ledger

__all__ = ["TABLES", "Kept", "ways_to_edit"]

DAY = 86_400
TABLES = ("audit", "node", "head", "writer", "checkpoint", "erasure", "meta")
"""The tables of a store, as `Tables` names them; the outbox is no part of it."""


class Kept:
    """
    The store at *dsn*, and a ledger that makes up its rows and holds its key.
    """

    def __init__(self, dsn: str, seed: int = 0, service: str = "shop") -> None:
        self.given = dsn
        self.dsn = parse_dsn(dsn, cwd=Path.cwd())
        self.maker = Ledger(seed, service)
        self.is_sqlite = self.dsn.path is not None
        self.repository = AuditRepository(self.dsn)
        self.policy = RetentionPolicy(short=30 * DAY, medium=180 * DAY, long=1095 * DAY)

    def close(self) -> None:
        """
        Let go of the connections.
        """
        self.repository.database.release()

    # -- what a service does --

    def writer(self, node: str = "n1") -> Writer:
        """
        Return who stores rows of *node*.
        """
        return Writer(f"writer of {node}", self.maker.service, node)

    def append(self, node: str, rows: Sequence[Any]) -> list[tuple[Any, ...]]:
        """
        Store a batch of one node's writer.
        """
        return self.repository.append(
            self.writer(node), [(0, tuple(row)) for row in rows], 0
        )

    def emit(self, node: str, *classes: str, **given: Any) -> list[tuple[Any, ...]]:
        """
        Store one row for each of *classes*.
        """
        return self.append(node, [self.maker.pending(c, **given) for c in classes])

    def record(self, node: str, code: str, detail: dict[str, Any]) -> None:
        """
        Store a row of fasten itself.
        """
        self.repository.schema.ensure()
        with self.repository.database.transaction() as connection:
            self.repository.record_within(
                connection, self.writer(node), [(code, node, detail)]
            )

    # -- what an operator does --

    def sweep(self, node: str = "n1", **order: Any) -> Sweep:
        """
        Sweep at `now_us`: that of the ledger, unless another is given.
        """
        given = {"now_us": self.maker.us, "is_time_given": True, "interval_s": 60.0}
        given |= {"wanted": self.policy, "is_explicit": True}
        sweeper = Sweeper(self.repository, self.writer(node), Order(**given | order))
        for _ in sweeper.run():
            pass
        return sweeper.done

    def age(self, days: float) -> None:
        """
        Let days go by.
        """
        self.maker.us += round(days * 86_400_000_000)

    @property
    def eraser(self) -> Eraser:
        """
        Return what erases, on behalf of node n1.
        """
        return Eraser(self.repository, self.writer())

    def erase(
        self, field: str, value: str, *fields: str, reason: str = "asked for"
    ) -> Erased:
        """
        Erase *fields*, by default the one asked for and the detail.
        """
        named = fields or tuple(sorted({field, "detail"} - {"id"}))
        done = Erased()
        eraser = self.eraser
        about = eraser.subject(field, value, named)
        found = bool(eraser.count(about))
        eraser.announce(field, value, named, reason, is_renewed=found)
        for _ in eraser.erase(about, named, reason, done):
            pass
        return done

    def checkpoint(self) -> list[str]:
        """
        Sign what has changed; return the notes.
        """
        anchor = Anchor(self.repository, self.maker.service, [self.maker.signer])
        return [note for notes in anchor.run() for note in notes]

    def hold(self, field: str, value: str) -> Hold:
        """
        Put a legal hold.
        """
        hold = Hold(
            id=f"h-{field}-{value}"[:40],
            field=field,
            value=value,
            reason="court",
            by="ann",
            at="2026-01-01T00:00:00.000000Z",
        )
        self._put(hold)
        return hold

    def lift(self, hold: Hold) -> None:
        """
        Lift a hold.
        """
        self._put(attrs.evolve(hold, lifted_at="2026-02-01T00:00:00.000000Z"))

    def _put(self, hold: Hold) -> None:
        self.repository.schema.ensure()
        with self.repository.database.transaction() as connection:
            self.repository.holds.put(connection, hold)

    # -- what anybody with a password does --

    @contextmanager
    def plain(self) -> Iterator[Any]:
        """
        Connect as anybody would.
        """
        if self.is_sqlite:
            connection: Any = sqlite3.connect(
                str(self.dsn.path), isolation_level=None, timeout=10
            )
        else:
            connection = psycopg.connect(self.dsn.conninfo(), autocommit=True)
        try:
            yield connection
        finally:
            connection.close()

    def sql(self, text: str, *values: Any) -> list[tuple[Any, ...]]:
        """
        Run plain SQL, with `?` for each of *values*; return the rows that it gives.
        """
        with self.plain() as connection:
            if not self.is_sqlite:
                text = text.replace("?", "%s")
            cursor = connection.execute(
                text, values or None if not self.is_sqlite else values
            )
            return cursor.fetchall() if cursor.description else []

    def columns(self, *names: str, where: str = "true") -> list[Any]:
        """
        Return columns of the audit rows, by number; of one name its values.
        """
        found = self.sql(
            f"SELECT {', '.join(names)} FROM audit_log WHERE {where} "
            "ORDER BY service_id, source_node_id, monotonic_seq"
        )
        return [row[0] for row in found] if len(names) == 1 else found

    def details(self, code: str) -> list[str]:
        """
        Return the details of fasten's own rows of one code, as text, by number.
        """
        found: list[str] = self.columns(
            "detail", where=f"domain = 'fasten' AND code = '{code}'"
        )
        return found

    def dump(self, *names: str) -> dict[str, list[tuple[Any, ...]]]:
        """
        Return the content of some tables, or all, to put it back with `load`.
        """
        return {
            name: self.sql(
                f"SELECT {', '.join(self._table(name).c.keys())} "
                f"FROM {self._table(name).name}"
            )
            for name in names or TABLES
        }

    def load(self, dump: dict[str, list[tuple[Any, ...]]]) -> None:
        """
        Put back what `dump` returned.
        """
        with self.plain() as connection:
            for name, rows in dump.items():
                table = self._table(name)
                connection.execute(f"DELETE FROM {table.name}")
                names = ", ".join(table.c.keys())
                marks = ", ".join(["?" if self.is_sqlite else "%s"] * len(table.c))
                connection.cursor().executemany(
                    f"INSERT INTO {table.name} ({names}) VALUES ({marks})", rows
                )
        self.forget()

    def forget(self) -> None:
        """
        Go on as somebody who never saw what was there before.
        """
        for place in list(self.repository._seen):
            self.repository.forget(*place)

    def _table(self, name: str) -> Any:
        return getattr(self.repository.tables, name)

    # -- what it proves --

    def verify(self, given: Iterable[str] = (), **options: Any) -> Report:
        """
        Verify the store as it stands.
        """
        settings: dict[str, Any] = {"verifiers": self.maker.verifiers}
        return verify_store(self.dsn, given=given, **settings | options)


def ways_to_edit(value: Any) -> list[Any]:
    """
    Return other values for a text or number: a byte flipped, a byte gone, nothing.
    """
    if value is None:
        return ["x"]
    if isinstance(value, int):
        return [value + 1, value - 1]
    text = str(value)
    if not text:
        return ["x"]
    middle = len(text) // 2
    flipped = [
        f"{text[:i]}{chr(ord(text[i]) ^ 1)}{text[i + 1 :]}"
        for i in {0, middle, len(text) - 1}
    ]
    return [*flipped, text[:-1], f"{text} "]
