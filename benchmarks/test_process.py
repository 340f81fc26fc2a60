# SPDX-License-Identifier: Apache-2.0
"""
Rows 10, 16, rss and memory: what a process that uses fasten notices of it.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fasten
from benchmarks.reference import events, percentile, settle
from benchmarks.test_emit import running
from benchmarks.test_store import held_back
from tests.outside import ROOT

BACKLOG = 20_000
QUEUED = 5_000

PEER = """
import socket, sys, time
peer = socket.socket(fileno=int(sys.argv[1]))
while peer.recv(1):
    time.sleep(0.001)
    peer.sendall(b"x")
"""


def waits_ms(
    peer: socket.socket, is_over: Callable[[], bool], least: int
) -> list[float]:
    """
    Time what a handler does: ask somebody else, and wait for the answer.
    """
    taken: list[float] = []
    while len(taken) < least or not is_over():
        before = time.perf_counter()
        peer.sendall(b"x")
        peer.recv(1)
        taken.append((time.perf_counter() - before) * 1000)
    return taken


@pytest.mark.slow
@pytest.mark.parametrize("row", ["10", "10p"])
def test_handlers_beside_a_drain(
    benchmark: Any, figure: Callable[..., None], row: str, durable_postgres: str
) -> None:
    """
    Row 10: what a busy drainer adds to the p99 of a handler that waits for I/O.
    """
    ours, theirs = socket.socketpair()
    where = {"audit_dsn": durable_postgres} if row == "10p" else {}
    with subprocess.Popen(
        [sys.executable, "-c", PEER, str(theirs.fileno())], pass_fds=[theirs.fileno()]
    ) as answering:
        waits_ms(ours, lambda: True, 200)
        with running(queue_capacity=10 * BACKLOG, **where):
            for number in range(3):
                with held_back():
                    for event in events(BACKLOG, start=number * BACKLOG):
                        fasten.emit(**event)
                    settle()
                    alone = waits_ms(ours, lambda: True, 500)
                is_drained = _is_drained()
                beside = waits_ms(ours, is_drained, 100)
                figure(row, percentile(beside, 0.99) - percentile(alone, 0.99))
        ours.close()
        theirs.close()
        answering.kill()
    benchmark.pedantic(lambda: None, rounds=1)


def _is_drained() -> Callable[[], bool]:
    spool = fasten.engine.default().delivery.spool  # type: ignore[union-attr]
    return lambda: spool.depth == 0


IMPORTING = """
import time
before = time.perf_counter()
import {}
print(time.perf_counter() - before)
"""


def import_s(name: str) -> float:
    """
    Import a package in new interpreters; return the seconds, the least of five.
    """
    command = [sys.executable, "-c", IMPORTING.format(name)]
    return min(float(subprocess.check_output(command)) for _ in range(5))


def test_import(benchmark: Any, figure: Callable[..., None]) -> None:
    """
    Row 16: importing fasten, beside importing structlog.
    """
    import_s("fasten"), import_s("structlog")
    for _ in range(5):
        figure("16", import_s("fasten") / import_s("structlog"))
    benchmark.pedantic(lambda: None, rounds=1)


def test_memory(benchmark: Any, figure: Callable[..., None]) -> None:
    """
    What a row that waits in the queue takes of the process's memory, in bytes.
    """
    with running():
        for number in range(3):
            given = list(events(QUEUED, start=number * QUEUED))
            with held_back():
                settle()
                tracemalloc.start()
                for event in given:
                    fasten.emit(**event)
                taken, _ = tracemalloc.get_traced_memory()
                tracemalloc.stop()
            fasten.flush(60)
            figure("mem", taken / QUEUED)
    benchmark.pedantic(lambda: None, rounds=1)


MEBIBYTE = 1024

RESIDENT = """
import gc, json, os, sys
from pathlib import Path

def resident():
    gc.collect()
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0])

said = [resident()]
import fasten
said.append(resident())
fasten.init(service_id="bench", stdout="", **json.loads(sys.argv[1]))
fasten.emit("ORDER_PLACED", "warm-up")
if sys.argv[3] == "up":
    assert fasten.flush(60)
said.append(resident())
from benchmarks.reference import events
for event in events(int(sys.argv[2])):
    fasten.emit(**event)
if sys.argv[3] == "up":
    assert fasten.flush(120)
said.append(resident())
spool = Path(fasten.engine.default().delivery.directory)
files = sum(path.stat().st_size for path in spool.glob("*.seg"))
print(*(at - said[0] for at in said[1:]), files)
os._exit(0)
"""
"""Kibibytes that are resident beyond those of a bare interpreter, after each step."""

SMALL = {
    "sys_ring_size": 1000,
    "api_ring_size": 1000,
    "queue_capacity": 1000,
    "spool_max_bytes": "32MiB",
    "max_detail_bytes": 16_384,
}
"""The settings that docs/operations.md has for a device of 512 MB."""


def resident(dsn: str, rows: int, store: str = "up", **settings: Any) -> list[float]:
    """
    Run a process that emits *rows* rows; return what it came to hold, in MiB: fasten
    imported, the first row stored, all rows emitted; last the bytes of its journal.
    """
    given = {"audit_dsn": dsn, "spool_dir": f"{Path.cwd()}/spool", **settings}
    command = [sys.executable, "-c", RESIDENT, json.dumps(given), str(rows), store]
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    *kibibytes, files = subprocess.check_output(command, env=environ).split()
    shutil.rmtree(given["spool_dir"])
    return [*(int(number) / MEBIBYTE for number in kibibytes), float(files)]


def test_resident(
    benchmark: Any, figure: Callable[..., None], durable_postgres: str
) -> None:
    """
    What a process holds for fasten: imported, one row on, 10,000 on, the store away.
    """
    for number in range(3):
        imported, first, later, _ = resident(f"sqlite:///r{number}.db", 10_000)
        figure("rss", imported)
        figure("rss s1", first)
        figure("rss s", later)
        _, first, later, _ = resident(durable_postgres, 10_000)
        figure("rss p1", first)
        figure("rss p", later)
        away = f"sqlite:///{Path.cwd()}/nowhere/r.db"
        *_, held, files = resident(away, 20_000, "away")
        figure("rss a", held)
        figure("spool", files / 20_000)
        figure("rss d", resident(away, 20_000, "away", **SMALL)[2])
    benchmark.pedantic(lambda: None, rounds=1)
