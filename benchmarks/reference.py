# SPDX-License-Identifier: Apache-2.0
"""
What fasten is measured against, and the rows that both are fed.

S is one structlog JSON line to /dev/null, Q a raw `sqlite3` executemany and P a raw
COPY of 500 rows with the same columns, indexes and pragmas. See
benchmarks/README.md.
"""

from __future__ import annotations

import gc
import os
import platform
import sqlite3
import statistics
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from operator import attrgetter
from pathlib import Path
from typing import Any

import structlog

CODES = ("ORDER_PLACED", "PAYMENT_PROCESSED", "USER_UPDATED", "CONFIG_UPDATED")


def events(number: int, start: int = 0) -> Iterator[dict[str, Any]]:
    """
    Yield keyword arguments of `emit` in which no value was seen before.

    Repeated rows flatter whoever keeps memos.
    """
    for n in range(start, start + number):
        yield {
            "code": CODES[n % 4],
            "target": f"ord-{n * 7919 % 9_999_991}",
            "actor": f"u-{n * 104_729 % 99_991}",
            "detail": {
                "amount": n * 37 % 100_003 / 100,
                "currency": ("EUR", "USD", "GBP", "CHF")[n % 4],
                "items": n % 17,
                "note": f"left at door {n * 31}",
                "express": n % 3 == 0,
                "ship": {"city": f"town-{n % 8191}", "zip": str(10_000 + n % 89_999)},
            },
        }


_NULL = Path("/dev/null").open("w")  # noqa: SIM115  (as long as the process lives)


STAMPS = (
    structlog.processors.add_log_level,
    structlog.processors.TimeStamper(fmt="iso"),
)
"""What stands before the renderer in S."""


def structlog_logger(processors: Sequence[Any] = STAMPS) -> Any:
    """
    Return the logger whose `info` is S: it writes one JSON line to /dev/null.

    What `structlog.get_logger()` gives where nothing but the processors is configured,
    without the configuration, which `fasten.init()` would change. With other
    *processors* before its renderer the line is one like S.
    """
    return structlog.wrap_logger(
        structlog.WriteLogger(_NULL),
        processors=[*processors, structlog.processors.JSONRenderer()],
    )


def as_line(event: dict[str, Any]) -> dict[str, Any]:
    """
    Turn an emit's arguments into a log line's: the same values.
    """
    return {
        "event": event["code"],
        "target": event["target"],
        "actor": event["actor"],
        **event.get("detail", {}),
    }


def latencies_ns(
    owner: Any, name: str, arguments: Sequence[dict[str, Any]], rate: float = 0.0
) -> list[int]:
    """
    Time each call of *owner*'s method *name*; *rate* a second, or as fast as they go.

    It is looked up at each call, as in `log.info(...)` and `fasten.emit(...)`.
    """
    clock, method = time.perf_counter_ns, attrgetter(name)
    taken = []
    due = clock()
    for given in arguments:
        if rate:
            due += int(1e9 / rate)
            time.sleep(max(0.0, (due - clock()) / 1e9))
        before = clock()
        method(owner)(**given)
        taken.append(clock() - before)
    return taken


def percentile(values: Sequence[float], share: float) -> float:
    """
    Return the value below which *share* of the values lie.
    """
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


def median(values: Sequence[float]) -> float:
    """
    Return the median.
    """
    return float(statistics.median(values))


class RawSqlite:
    """
    Q: the same rows into a copy of the same tables, through `sqlite3` alone.
    """

    def __init__(self, store: Path, copy: Path) -> None:
        with sqlite3.connect(store) as source:
            ddl = [
                sql
                for (sql,) in source.execute(
                    "SELECT sql FROM sqlite_schema "
                    "WHERE tbl_name = 'audit_log' AND sql NOT NULL"
                )
            ]
        source.close()
        self._connection = sqlite3.connect(copy, isolation_level=None)
        for pragma in (
            "page_size = 8192",
            "auto_vacuum = INCREMENTAL",
            "journal_mode = WAL",
            "synchronous = FULL",
            "secure_delete = ON",
            "wal_autocheckpoint = 4000",
            "cache_size = -65536",
        ):
            self._connection.execute(f"PRAGMA {pragma}")
        for statement in ddl:
            self._connection.execute(statement)

    def insert(self, rows: Sequence[Sequence[Any]]) -> float:
        """
        Store rows by 500 a transaction; return rows per second.
        """
        marks = ", ".join("?" * len(rows[0]))
        insert = f"INSERT INTO audit_log VALUES ({marks})"
        before = time.perf_counter()
        for at in range(0, len(rows), 500):
            self._connection.execute("BEGIN IMMEDIATE")
            self._connection.executemany(insert, rows[at : at + 500])
            self._connection.execute("COMMIT")
        return len(rows) / (time.perf_counter() - before)

    def close(self) -> None:
        """
        Close the copy.
        """
        self._connection.close()


def raw_copy(connection: Any, table: str, rows: Sequence[str]) -> float:
    """
    P: COPY pre-joined rows by 500 a transaction; return rows per second.
    """
    before = time.perf_counter()
    for at in range(0, len(rows), 500):
        with (
            connection.transaction(),
            connection.cursor() as cursor,
            cursor.copy(f"COPY {table} FROM STDIN") as copy,
        ):
            copy.write("".join(rows[at : at + 500]))
    return len(rows) / (time.perf_counter() - before)


def machine() -> dict[str, Any]:
    """
    Say where and when figures were taken.
    """
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def settle() -> None:
    """
    Start the next measurement from a quiet heap.
    """
    gc.collect()
