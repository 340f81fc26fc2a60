# SPDX-License-Identifier: Apache-2.0
"""
Backups of a store, and their restoration while services run.
"""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import psycopg

__all__ = ["Backup"]


class Backup:
    """
    A backup of the store at *dsn*, taken as it is made.
    """

    def __init__(self, dsn: str) -> None:
        self._dsn = dsn
        path = dsn.removeprefix("sqlite:///")
        self._path = Path(path) if path != dsn else None
        self._tables: dict[str, list[tuple[Any, ...]]] = {}
        if self._path is None:
            self._read_postgres()
        elif self._path.exists():
            self._copy = self._path.with_suffix(".backup")
            with closing(sqlite3.connect(self._path)) as source:
                with closing(sqlite3.connect(self._copy)) as copy:
                    source.backup(copy)

    def _read_postgres(self) -> None:
        with psycopg.connect(self._dsn) as connection:
            connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
            for name in _names(connection):
                rows = connection.execute(f"SELECT * FROM {name}").fetchall()
                self._tables[name] = rows

    def restore(self) -> None:
        """
        Bring the store back to what it was, under whoever uses it.
        """
        if self._path is None:
            self._restore_postgres()
        elif not hasattr(self, "_copy"):
            self.replace()
        else:
            with closing(sqlite3.connect(self._copy)) as source:
                with closing(sqlite3.connect(self._path, timeout=60)) as store:
                    source.backup(store)

    def replace(self) -> None:
        """
        Put the old SQLite file in the place of the new one: nobody may be writing.
        """
        if self._path is None:
            raise TypeError("there is no file to replace")
        self._path.unlink(missing_ok=True)
        for suffix in ("-wal", "-shm"):
            Path(f"{self._path}{suffix}").unlink(missing_ok=True)
        if hasattr(self, "_copy"):
            self._path.write_bytes(self._copy.read_bytes())

    def _restore_postgres(self) -> None:
        while True:
            try:
                self._write_postgres()
            except psycopg.errors.DeadlockDetected:
                continue
            return

    def _write_postgres(self) -> None:
        with psycopg.connect(self._dsn) as connection:
            names = _names(connection)
            if names:  # as who appends does: the node's table first
                names.sort(key=lambda name: not name.endswith("_node"))
                connection.execute(f"LOCK TABLE {', '.join(names)}")
            for name in names:
                if name not in self._tables:
                    connection.execute(f"DROP TABLE {name}")
                    continue
                connection.execute(f"TRUNCATE {name}")
                for row in self._tables[name]:
                    marks = ", ".join(["%s"] * len(row))
                    connection.execute(f"INSERT INTO {name} VALUES ({marks})", row)


def _names(connection: Any) -> list[str]:
    found = connection.execute(
        "SELECT tablename FROM pg_tables WHERE schemaname = 'public'"
    ).fetchall()
    return [row[0] for row in found]
