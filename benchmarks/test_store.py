# SPDX-License-Identifier: Apache-2.0
"""
Rows 7 to 9, 11 and 13: from emit to a sealed, indexed row that is committed.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fasten
from benchmarks.reference import RawSqlite, events, raw_copy, settle
from benchmarks.test_emit import running

ROWS = 30_000


def produce(start: int, rows: int = ROWS) -> float:
    """
    Emit from one tight loop and wait for the store; return rows per second.
    """
    given = list(events(rows, start=start))
    settle()
    before = time.perf_counter()
    for event in given:
        fasten.emit(**event)
    assert fasten.flush(120)
    return rows / (time.perf_counter() - before)


def sqlite_rows(path: Path, after: int = 0) -> list[tuple[Any, ...]]:
    """
    Read stored rows back, to feed the reference with the same.
    """
    connection = sqlite3.connect(path)
    try:
        return connection.execute(
            "SELECT * FROM audit_log WHERE monotonic_seq > ? ORDER BY monotonic_seq",
            (after,),
        ).fetchall()
    finally:
        connection.close()


def test_one_producer_sqlite(
    benchmark: Any, figure: Callable[..., None], tmp_path: Path
) -> None:
    """
    Row 7a and 13: durable rows a second from one producer, at the same table size.
    """
    store = tmp_path / "bench.db"
    with running():
        rates = [produce(number * ROWS) for number in range(4)]
    reference = RawSqlite(store, tmp_path / "raw.db")
    rows = sqlite_rows(store)
    for number, rate in enumerate(rates):
        part = rows[1 + number * ROWS : 1 + (number + 1) * ROWS]
        figure("7a", rate / reference.insert(part))
    reference.close()
    names = [
        d[0]
        for d in sqlite3.connect(store)
        .execute("SELECT * FROM audit_log LIMIT 1")
        .description
    ]
    sample = rows[100:1100]
    as_json = sum(len(json.dumps(dict(zip(names, row, strict=True)))) for row in sample)
    figure("13", store.stat().st_size / len(rows) / (as_json / len(sample)))
    benchmark.pedantic(lambda: None, rounds=1)


def test_one_producer_postgres(
    benchmark: Any, figure: Callable[..., None], durable_postgres: str
) -> None:
    """
    Row 8: durable rows a second from one producer, against COPY of the same rows.
    """
    import psycopg

    with running(audit_dsn=durable_postgres):
        rates = [produce(number * ROWS) for number in range(4)]
    with psycopg.connect(durable_postgres, autocommit=True) as connection:
        connection.execute("CREATE TABLE raw (LIKE audit_log INCLUDING ALL)")
        with connection.cursor().copy(
            "COPY (SELECT * FROM audit_log ORDER BY monotonic_seq) TO STDOUT"
        ) as copy:
            rows = (
                b"".join(bytes(part) for part in copy)
                .decode()
                .splitlines(keepends=True)
            )
        for number, rate in enumerate(rates):
            part = rows[1 + number * ROWS : 1 + (number + 1) * ROWS]
            figure("8", rate / raw_copy(connection, "raw", part))
    benchmark.pedantic(lambda: None, rounds=1)


def test_idle_latency(benchmark: Any, figure: Callable[..., None]) -> None:
    """
    Row 11: from one emit to its committed row, with nothing else going on.
    """
    with running():
        for event in events(40, start=10**6):
            time.sleep(0.02)
            before = time.perf_counter()
            fasten.emit(**event)
            assert fasten.flush(5)
            figure("11", (time.perf_counter() - before) * 1000)
    benchmark.pedantic(lambda: None, rounds=1)


@pytest.mark.slow
@pytest.mark.parametrize(("row", "size"), [("7b", 60_000), ("9", 600_000)])
def test_backlog_sqlite(
    benchmark: Any, figure: Callable[..., None], tmp_path: Path, row: str, size: int
) -> None:
    """
    Rows 7b and 9: a ready backlog is drained, fresh and at 600 k rows.
    """
    store = tmp_path / "bench.db"
    part = 20_000
    with running(queue_capacity=part * 2, spool_max_bytes="4GiB"):
        for start in range(0, size - 3 * part, part):
            produce(start, part)
        drained = []
        for number in range(3):
            with held_back():
                for event in events(part, start=size + number * part):
                    fasten.emit(**event)
            before = time.perf_counter()
            assert fasten.flush(120)
            drained.append(part / (time.perf_counter() - before))
    rows = sqlite_rows(store)
    reference = RawSqlite(store, tmp_path / "raw.db")
    reference.insert(rows[: -3 * part])
    for number, rate in enumerate(drained):
        at = len(rows) - (3 - number) * part
        figure(row, rate / reference.insert(rows[at : at + part]))
    reference.close()
    benchmark.pedantic(lambda: None, rounds=1)


class held_back:  # noqa: N801  (reads as a with-statement)
    """
    Keep the drainer from delivering, as a store that is busy does.
    """

    def __enter__(self) -> None:
        drainer = fasten.engine.default().delivery.drainer  # type: ignore[union-attr]
        self._lock = drainer._delivering
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()
