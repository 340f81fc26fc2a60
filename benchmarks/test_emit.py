# SPDX-License-Identifier: Apache-2.0
"""
Rows 1-6 and 12: what an emit costs its caller, and that it is worth it.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import fasten
from benchmarks.reference import (
    as_line,
    events,
    latencies_ns,
    median,
    percentile,
    settle,
    structlog_logger,
)

ROUNDS = 7
CALLS = 2000


@contextmanager
def running(**settings: Any) -> Iterator[None]:
    """
    Run fasten on a SQLite file, with nothing printed.
    """
    given = {
        "service_id": "bench",
        "node_id": "bench-1",
        "audit_dsn": f"sqlite:///{Path.cwd()}/bench.db",
        "stdout": "",
    }
    fasten.init(**given | settings)
    try:
        # The first row opens the journal; a service pays that once.
        fasten.emit(code="ORDER_PLACED", target="warm-up")
        fasten.flush(30)
        yield
    finally:
        fasten.flush(60)
        fasten.close(60)


def rounds(
    *, bare: bool = False, rate: float = 0.0, calls: int = CALLS
) -> Iterator[tuple[list[int], list[int]]]:
    """
    Yield latencies of emit and of S, a round of each in turn.
    """
    log = structlog_logger()
    for number in range(ROUNDS):
        given = list(events(calls, start=number * calls))
        lines = [as_line(event) for event in given]
        if bare:
            for event in given:
                del event["detail"]
        settle()
        ours = latencies_ns(fasten, "emit", given, rate)
        fasten.flush(60)
        settle()
        yield ours, latencies_ns(log, "info", lines, rate)


def test_tight_loop(benchmark: Any, figure: Callable[..., None]) -> None:
    """
    Row 1: emit in a tight loop, values scanned, journal on.
    """
    with running():
        for ours, theirs in rounds():
            figure("1", median(ours) / median(theirs))
        one = next(events(1, start=10**6))
        benchmark.pedantic(fasten.emit, kwargs=one, rounds=200, iterations=1)


def test_without_detail(benchmark: Any, figure: Callable[..., None]) -> None:
    """
    Row 2: the same without detail, against the same S.
    """
    with running():
        for ours, theirs in rounds(bare=True):
            figure("2", median(ours) / median(theirs))
        benchmark.pedantic(
            fasten.emit, args=("ORDER_PLACED", "ord-1"), rounds=200, iterations=1
        )


def test_at_a_steady_rate(benchmark: Any, figure: Callable[..., None]) -> None:
    """
    Rows 3 and 4: emit at 500 a second, median and 99th percentile.
    """
    with running():
        for ours, theirs in rounds(rate=500, calls=500):
            figure("3", median(ours) / median(theirs))
            figure("4", percentile(ours, 0.99) / percentile(theirs, 0.99))
        benchmark.pedantic(
            fasten.emit, args=("ORDER_PLACED", "ord-1"), rounds=50, iterations=1
        )


def test_what_crash_safety_adds(benchmark: Any, figure: Callable[..., None]) -> None:
    """
    Row 5: emit with the journal, less emit without it.
    """
    log = structlog_logger()

    def measure(**settings: Any) -> list[float]:
        medians = []
        with running(**settings):
            for number in range(ROUNDS):
                given = list(events(CALLS, start=number * CALLS))
                settle()
                medians.append(median(latencies_ns(fasten, "emit", given)))
                fasten.flush(60)
        return medians

    lines = [as_line(event) for event in events(CALLS)]
    with_spool, without = measure(), measure(spool=False)
    line = median(latencies_ns(log, "info", lines))
    for one, other in zip(with_spool, without, strict=True):
        figure("5", (one - other) / line)
    benchmark.pedantic(lambda: None, rounds=1)


VICTIM = """
import os, sys, threading
import fasten
fasten.init(service_id="bench", node_id="n", audit_dsn=sys.argv[1], stdout="")
def emitting():
    while True:
        id = fasten.emit("ORDER_PLACED", "x", detail={"a": 1})
        os.write(1, f"{id}\\n".encode())
for _ in range(4):
    threading.Thread(target=emitting).start()
"""


def test_kill_nine(benchmark: Any, figure: Callable[..., None], tmp_path: Path) -> None:
    """
    Row 6: of the rows that 4 threads had an id for, those found after kill -9.
    """
    dsn = f"sqlite:///{tmp_path}/killed.db"
    acked: set[str] = set()
    for number in range(5):
        with subprocess.Popen(
            [sys.executable, "-c", VICTIM, dsn], stdout=subprocess.PIPE
        ) as victim:
            assert victim.stdout is not None
            head = victim.stdout.readline()
            threading.Timer(0.05 + 0.03 * number, victim.kill).start()
            whole = (head + victim.stdout.read()).decode().splitlines(keepends=True)
        acked.update(line.strip() for line in whole if line.endswith("\n"))
    fasten.init(service_id="bench", node_id="n", audit_dsn=dsn, stdout="")
    found = 0
    deadline = time.monotonic() + 60
    while found < len(acked) and time.monotonic() < deadline:
        fasten.flush(1)
        found = len(stored_ids(tmp_path / "killed.db") & acked)
    fasten.close()
    figure("6", found / len(acked))
    benchmark.pedantic(lambda: None, rounds=1)


def stored_ids(path: Path) -> set[str]:
    """
    Read the ids in a SQLite store.
    """
    import sqlite3

    connection = sqlite3.connect(path)
    try:
        return {row[0] for row in connection.execute("SELECT id FROM audit_log")}
    except sqlite3.OperationalError:
        return set()
    finally:
        connection.close()


@pytest.mark.slow
def test_four_threads(benchmark: Any, figure: Callable[..., None]) -> None:
    """
    Row 12: four threads' emits a second, against S's rate on one.
    """
    log = structlog_logger()
    with running():
        for number in range(ROUNDS):
            parts = [
                list(events(CALLS, start=(number * 4 + n) * CALLS)) for n in range(4)
            ]
            lines = [as_line(event) for event in events(CALLS)]
            settle()
            before = time.perf_counter()
            threads = [
                threading.Thread(target=lambda p=part: [fasten.emit(**e) for e in p])
                for part in parts
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            ours = 4 * CALLS / (time.perf_counter() - before)
            fasten.flush(60)
            before = time.perf_counter()
            for line in lines:
                log.info(**line)
            figure("12", ours / (CALLS / (time.perf_counter() - before)))
        benchmark.pedantic(lambda: None, rounds=1)
