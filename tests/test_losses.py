# SPDX-License-Identifier: Apache-2.0
"""
Losses: the counter is the truth, and so are the rows that tell it.
"""

from __future__ import annotations

import json
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import fasten
from fasten import spool
from fasten.drain import Rows
from fasten.engine import Engine
from fasten.losses import Losses
from fasten.rows import Pending
from fasten.spool import Spool
from tests.checker import faults, rows_of
from tests.faults.oracle import told
from tests.outside import wait_until


def make_row(code: str, target: str, detail: Any) -> tuple[Any, ...]:
    """
    Make a row of fasten's own as the engine does, with the target as its id.
    """
    values = dict.fromkeys(Pending._fields, "x") | {"code": code, "id": target}
    return tuple(Pending(**values | {"timestamp_us": 1, "detail": json.dumps(detail)}))


def memory_only(capacity: int) -> Spool:
    """
    Return a queue of so many rows that has no journal.
    """
    return Spool(None, service="s", node="n", store="", capacity=capacity)


def put(queue: Spool) -> int:
    """
    Queue a row.
    """
    row = make_row("USER_CREATED", "x", {})
    return queue.append(spool.pack(row), row)


class TestCounting:
    def test_threads_and_signal_handlers(self) -> None:
        """
        No drop is counted twice or forgotten, whatever interrupts it.
        """
        losses = Losses(memory_only(1), make_row)
        handled = []

        def handle(*_: object) -> None:
            handled.append(1)
            losses.drop()

        def dropping() -> None:
            for _ in range(20_000):
                losses.drop()

        before = signal.signal(signal.SIGALRM, handle)
        signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
        try:
            threads = [threading.Thread(target=dropping) for _ in range(4)]
            for thread in threads:
                thread.start()
            dropping()
            for thread in threads:
                thread.join()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)

        assert 100_000 + len(handled) == losses.dropped
        assert handled

    def test_takes_no_memory(self) -> None:
        """
        A million drops weigh as much as one.
        """
        losses = Losses(memory_only(1), make_row)
        for _ in range(1_000_000):
            losses.drop()

        assert 1_000_000 == losses.dropped

    def test_is_recent_for_seconds(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """
        Dropping is a state that ends some seconds after the last drop.
        """
        now = 100.0
        monkeypatch.setattr(time, "monotonic", lambda: now)
        losses = Losses(memory_only(1), make_row)
        assert not losses.is_recent
        losses.drop()
        assert losses.is_recent
        now += 5.1

        assert not losses.is_recent


class TestTelling:
    def test_a_report_without_room_is_no_drop(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        """
        The row that tells of drops waits for room; then it tells of all.
        """
        queue = memory_only(2)
        losses = Losses(queue, make_row)
        while put(queue):
            pass
        for _ in range(7):
            losses.drop()
        losses.tell()
        assert 2 == queue.depth
        batch = queue.take(10)
        assert batch is not None
        queue.ack(batch.last)
        losses.drop()
        losses.tell()
        losses.tell()
        told_rows = queue.take(10)

        assert told_rows is not None
        details = [json.loads(row[-1]) for _, row in told_rows.rows]
        assert [{"writer": queue.writer_id, "count": 8}] == details
        assert 8 == losses.dropped
        assert ["WARNING"] == [record.levelname for record in caplog.records]

    def test_the_last_word(self, caplog: pytest.LogCaptureFixture) -> None:
        """
        What no row could say is logged as the process goes.
        """
        queue = memory_only(1)
        losses = Losses(queue, make_row)
        assert put(queue)
        losses.drop()
        losses.last_word()

        assert "1 rows were dropped, and no row could say so" in caplog.messages[-1]

    def test_gaps_count_once(self) -> None:
        """
        A gap that was told before its batch came again counts no second time.
        """
        losses = Losses(memory_only(1), make_row)
        batch = Rows([], 9, [(2, 4), (7, 7)])
        reports = losses.reports("w" * 32, batch)

        assert [4, 7] == [index for index, _ in reports]
        stored = [("2", row[0], *row[1:]) for _, row in reports]  # id is column two
        losses.found(batch, reports, stored)
        losses.found(batch, reports, [])
        assert 4 == losses.dropped


def start(dsn: str, **settings: Any) -> Engine:
    """
    Start the default engine on a store.
    """
    given = {"service_id": "s", "node_id": "n", "stdout": "", **settings}
    return fasten.init(audit_dsn=dsn, **given)


def fill() -> list[str]:
    """
    Emit until a row is dropped; return the ids of all.
    """
    ids = []
    while not fasten.stats()["dropped"]:
        ids.append(fasten.emit("USER_CREATED", f"u/{len(ids)}"))
    return ids


class TestFull:
    def test_counted_and_told(self, tmp_path: Path) -> None:
        """
        Neither spool nor memory: each drop counts, health fails at once, rows tell.
        """
        store = tmp_path / "later" / "audit.db"
        dsn = f"sqlite:///{store}"
        start(dsn, spool="off", queue_capacity=50)
        ids = fill() + [fasten.emit("USER_CREATED", "more") for _ in range(20)]
        health = fasten.health()

        assert ("failing", len(ids)) == (health["state"], health["emitted"])
        assert health["dropped"] >= 1
        store.parent.mkdir()
        assert fasten.flush(20)
        fasten.close(10)
        rows = rows_of(dsn)
        kept = {row["id"] for row in rows if row["domain"] != "fasten"}
        assert kept <= set(ids)
        assert (len(ids) - len(kept), 0) == told(rows)
        assert fasten.stats()["dropped"] == len(ids) - len(kept)
        assert [] == faults(rows)

    def test_raise(self, tmp_path: Path) -> None:
        """
        Whoever asked to be told is told, and what was refused is no silent drop.
        """
        dsn = f"sqlite:///{tmp_path}/no/audit.db"
        start(dsn, spool="off", queue_capacity=3, on_full="raise")
        taken: list[str] = []

        def emitting() -> None:
            while len(taken) < 20_000:
                taken.append(fasten.emit("USER_CREATED", "u"))

        with pytest.raises(fasten.FastenError, match="no room"):
            emitting()
        health = fasten.health()
        assert ("failing", 0) == (health["state"], health["dropped"])
        assert len(taken) == health["emitted"]

    def test_block(self, tmp_path: Path) -> None:
        """
        Emit waits as long as it was told to, then drops and counts.
        """
        dsn = f"sqlite:///{tmp_path}/no/audit.db"
        start(dsn, spool="off", queue_capacity=3, on_full="block:150")
        began = time.monotonic()
        fill()

        assert 0.15 <= time.monotonic() - began < 10
        assert 1 == fasten.stats()["dropped"]


DYING = """
import os, sys
import fasten
from fasten.drain import Drainer

Drainer.start = lambda drainer: None
fasten.init(service_id="s", node_id="n", audit_dsn=sys.argv[1], stdout="",
    spool_dir=sys.argv[2])
for n in range(20):
    fasten.emit("USER_CREATED", f"u/{n}")
os.kill(os.getpid(), 9)
"""


class TestDamage:
    @pytest.mark.parametrize("bitten", [1, 3])
    def test_a_gap_is_told_once(
        self, bitten: int, store_dsn: str, tmp_path: Path, run_python: Any
    ) -> None:
        """
        Rows of a dead process that its journal lost are told by writer and range.
        """
        folder = tmp_path / "spool"
        run_python(DYING, store_dsn, str(folder))
        (journal,) = (p for p in folder.glob("*.seg") if b"u/5" in p.read_bytes())
        data = bytearray(journal.read_bytes())
        for number in range(5, 5 + bitten):
            data[data.index(f"u/{number}\0".encode())] ^= 0x40
        journal.write_bytes(data)
        engine = start(store_dsn, spool_dir=str(folder))
        wait_until(lambda: engine.stats()["replayed"] > 20 - bitten, 20)

        rows = rows_of(store_dsn)
        records = [r for r in rows if r["code"] == "AUDIT_ROWS_DROPPED"]
        writer = journal.name.partition(".")[0]
        expected = {"writer": writer, "from": 6, "to": 5 + bitten, "count": bitten}
        assert [expected] == [json.loads(row["detail"]) for row in records]
        assert bitten == engine.stats()["dropped"]
        assert [] == faults(rows)
