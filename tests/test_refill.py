# SPDX-License-Identifier: Apache-2.0
"""
Stores that go back, as restored backups and failovers do, and are filled again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import fasten
from fasten.engine import Engine
from tests.backups import Backup
from tests.checker import rows_of
from tests.faults.heir import inherit
from tests.faults.oracle import faults_of, verify_code
from tests.outside import wait_until


@pytest.fixture
def start(store_dsn: str, tmp_path: Path) -> Any:
    """
    Return what starts the service.
    """

    def start_(**more: Any) -> Engine:
        given = {"service_id": "victim", "node_id": "n", "stdout": ""} | more
        return fasten.init(
            audit_dsn=store_dsn, spool_dir=str(tmp_path / "spool"), **given
        )

    return start_


def emit(*targets: str) -> list[str]:
    """
    Emit a row a target, of the three classes in turn, and see them stored.
    """
    codes = ("USER_CREATED", "BATCH_PROCESSED", "CONFIG_UPDATED")
    ids = [fasten.emit(codes[n % 3], target) for n, target in enumerate(targets)]
    assert fasten.flush(20)
    return ids


def restored(dsn: str) -> Iterator[dict[str, Any]]:
    """
    Yield what CHAIN_RESTORED rows say.
    """
    for row in rows_of(dsn):
        if row["code"] == "CHAIN_RESTORED" and row["domain"] == "fasten":
            yield json.loads(row["detail"])


def is_whole(dsn: str, ids: list[str]) -> bool:
    """
    Tell whether each row is there, once, and nothing speaks against the store.
    """
    rows = rows_of(dsn)
    mine = [row["id"] for row in rows if row["domain"] != "fasten"]
    assert sorted(ids) == sorted(mine)
    assert [] == faults_of(rows)
    return verify_code(rows, dsn) == 0


class TestOwn:
    def test_the_next_row_brings_back_the_lost_ones(
        self, start: Any, store_dsn: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        """
        What a running writer had stored is stored again, above the lost numbers.
        """
        start()
        ids = emit("a", "b", "c")
        backup = Backup(store_dsn)
        ids += emit(*(f"lost/{n}" for n in range(30)))
        before = {row["id"]: row["monotonic_seq"] for row in rows_of(store_dsn)}
        backup.restore()
        ids += emit("next")

        assert is_whole(store_dsn, ids)
        (said,) = restored(store_dsn)
        assert (4, max(before.values())) == (said["from_seq"], said["to_seq"])
        now = {row["id"]: row["monotonic_seq"] for row in rows_of(store_dsn)}
        assert all(now[id_] > said["to_seq"] for id_ in ids[3:])
        told = [text for text in caplog.messages if "went back" in text]
        assert 1 == len(told)

    def test_an_idle_process_notices(self, start: Any, store_dsn: str) -> None:
        """
        Without a new row the loss is found when the process looks round.
        """
        engine = start()
        ids = emit("a")
        backup = Backup(store_dsn)
        ids += emit("b", "c")
        backup.restore()
        engine.delivery.adopt_soon()
        wait_until(lambda: 3 <= len(rows_of(store_dsn)) - 1, 20)

        assert is_whole(store_dsn, ids)

    def test_another_file(self, start: Any, sqlite_dsn: str, store_dsn: str) -> None:
        """
        A SQLite file that is replaced under a process is opened, and filled.
        """
        if store_dsn != sqlite_dsn:
            pytest.skip("a file of SQLite is replaced")
        start()
        ids = emit("a")
        backup = Backup(store_dsn)
        ids += emit("b", "c")
        backup.replace()
        ids += emit("d")

        assert is_whole(store_dsn, ids)

    def test_to_nothing(self, start: Any, store_dsn: str) -> None:
        """
        A store whose tables are gone is made again, and filled.
        """
        start()
        backup = Backup(store_dsn)
        ids = emit("a", "b")
        backup.restore()
        ids += emit("c")

        assert is_whole(store_dsn, ids)

    def test_twice(self, start: Any, store_dsn: str) -> None:
        """
        The record of one restore is not undone by the next.
        """
        start()
        ids = emit("a")
        backup = Backup(store_dsn)
        ids += emit("b")
        backup.restore()
        ids += emit("c")
        backup.restore()
        ids += emit("d")

        assert is_whole(store_dsn, ids)
        spans = [(said["from_seq"], said["to_seq"]) for said in restored(store_dsn)]
        assert [(2, 2), (2, 5)] == spans

    def test_a_row_that_waits_for_the_store(self, start: Any, store_dsn: str) -> None:
        """
        A synchronous row finds it, too, and gets a number that was never used.
        """
        start(audit_store_failure_strategy="raise")
        fasten.emit("USER_CREATED", "a")
        backup = Backup(store_dsn)
        fasten.emit("USER_CREATED", "b")
        backup.restore()
        fasten.emit("USER_CREATED", "c")
        rows = rows_of(store_dsn)

        assert [1, 3, 4] == [row["monotonic_seq"] for row in rows]
        assert ["a", "victim/n", "c"] == [row["target"] for row in rows]
        assert 0 == verify_code(rows, store_dsn)


DYING = """
import os, sys
import fasten
from tests.faults.victim import settings_of

fasten.init(**settings_of(*sys.argv[1:3]))
for n in range(20):
    print(fasten.emit("USER_CREATED", f"{sys.argv[3]}/{n}"))
fasten.flush(20)
sys.stdout.flush()
os.kill(os.getpid(), 9)
"""


def test_rows_of_the_dead(store_dsn: str, tmp_path: Path, run_python: Any) -> None:
    """
    Journals that dead processes left, delivered minutes ago, fill the store again.
    """
    spool, backup = tmp_path / "spool", Backup(store_dsn)
    ids = run_python(DYING, store_dsn, str(spool), "a").stdout.split()
    inherit(store_dsn, spool)
    backup.restore()
    inherit(store_dsn, spool, rows=len(ids))

    assert is_whole(store_dsn, ids)
    assert 1 == len(list(restored(store_dsn)))
