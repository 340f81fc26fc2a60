# SPDX-License-Identifier: Apache-2.0
"""
`drain` and `restored`: rows that wait in a spool, and stores that went back.
"""

from __future__ import annotations

import json
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

import fasten
from fasten import chain, spool
from fasten.spool import files
from tests.backups import Backup
from tests.checker import rows_of
from tests.cli_runs import fasten_on, run, run_program
from tests.faults.oracle import faults_of, told, verify_code
from tests.ledger import SEED
from tests.outside import wait_until

DYING = """
import os, sys
import fasten
from fasten.drain import Drainer

Drainer.start = lambda drainer: None
fasten.init()
for n in range(20):
    print(fasten.emit("USER_CREATED", f"u/{n}"))
sys.stdout.flush()
os.kill(os.getpid(), 9)
"""


@pytest.fixture
def left(store_dsn: str, monkeypatch: pytest.MonkeyPatch, run_python: Any) -> list[str]:
    """
    Have a process die with 20 rows in its spool; return their ids.
    """
    monkeypatch.setenv("FASTEN_AUDIT_DSN", store_dsn)
    monkeypatch.setenv("FASTEN_SERVICE_ID", "api-server")
    monkeypatch.setenv("FASTEN_NODE_ID", "host-01")
    monkeypatch.setenv("FASTEN_SPOOL_DIR", str(Path.cwd() / "spool"))
    done = run_python(DYING)
    assert -9 == done.returncode, done.stderr
    ids: list[str] = done.stdout.split()
    return ids


def ids_in(dsn: str) -> list[str]:
    """
    Return the ids of the rows in a store, fasten's own left out.
    """
    return [row["id"] for row in rows_of(dsn) if row["domain"] != "fasten"]


class TestDrain:
    def test_delivers_what_a_dead_process_left(
        self, left: list[str], store_dsn: str
    ) -> None:
        """
        No service has to start; a second run has nothing to do.
        """
        first, second = run("drain"), run("drain")

        assert (0, 0) == (first.exit_code, second.exit_code), first.output
        assert "delivered 20 rows of api-server/host-01" in first.stdout
        assert "delivered 0 rows in all\n" == second.stdout
        assert left == ids_in(store_dsn)
        assert [] == faults_of(rows_of(store_dsn))

    def test_damage_is_put_on_record(self, left: list[str], store_dsn: str) -> None:
        """
        A row that a damaged journal lost is told by the program, and all others go.
        """
        (segment,) = Path("spool").glob("*.seg")
        data = bytearray(segment.read_bytes())
        data[data.index(left[7].encode())] ^= 1
        segment.write_bytes(data)
        done = run_program("drain", "--timeout", "20s")

        assert (0, "") == (done.returncode, done.stderr)
        assert left[:7] + left[8:] == ids_in(store_dsn)
        assert (1, 0) == told(rows_of(store_dsn))

    def test_into_another_store(
        self, left: list[str], store_dsn: str, tmp_path: Path
    ) -> None:
        """
        With --dsn the rows go elsewhere, as JSON tells by writer.
        """
        other = f"sqlite:///{tmp_path / 'other.db'}"
        done = run("drain", "--dsn", other, "-o", "json")

        told = json.loads(done.stdout)
        assert (0, 20) == (done.exit_code, told["rows"]), done.output
        (writer,) = told["writers"]
        assert ("host-01", 20) == (writer["node"], writer["rows"])
        assert left == ids_in(other)
        assert [] == ids_in(store_dsn)

    def test_names_what_it_cannot_deliver(self, left: list[str]) -> None:
        """
        Files of a newer fasten stay, are named, and make the exit code 1.
        """
        (lock,) = Path("spool").glob("*.lock")
        newer = "f" * 32
        who = files.read_head(lock)[0]
        assert who is not None
        frame = chain.attrs.evolve(who, format=99, writer=newer).frame(1)
        Path(f"spool/{newer}.1.seg").write_bytes(frame)
        done = run("drain")

        assert 1 == done.exit_code
        assert "delivered 20 rows" in done.stdout
        assert "format 99 of a newer fasten; upgrade" in done.stderr

    def test_says_why_not(
        self, left: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        """
        A store that cannot be opened is told; the rows stay.
        """
        place = f"sqlite:///{tmp_path}/no/audit.db"
        done = run("drain", "--dsn", place, "--timeout", "1s")

        assert 1 == done.exit_code
        assert "rows are still in the spool" in done.stderr
        assert "delivered 0 rows in all" in done.stdout
        assert 20 == json.loads(run("drain", "-o", "json").stdout)["rows"]

    def test_bad_timeout(self, left: list[str]) -> None:
        """
        A duration that is none is wrong usage.
        """
        assert 2 == run("drain", "--timeout", "soon").exit_code


class TestQuarantine:
    def test_rows_go_back_once_the_store_takes_them(
        self, left: list[str], store_dsn: str, tmp_path: Path
    ) -> None:
        """
        Refused rows are stored when what refused them is gone, and leave the file.
        """
        run("drain")
        row = _pending(store_dsn, left[3])
        poison = (f"evt-{'0' * 25}1", *row[1:14], "poison", *row[15:])
        folder = Path("spool")
        for writer in ("d" * 32, "e" * 32):  # put aside twice: stored once
            assert spool.quarantine(folder, writer, (7, poison), "refused")
        done, again = run("drain", "--quarantine"), run("drain", "--quarantine")

        assert (0, 0) == (done.exit_code, again.exit_code), done.output
        assert "stored 1 row out of quarantine\n" == done.stdout
        assert "stored 0 rows out of quarantine\n" == again.stdout
        assert [poison[0]] == [i for i in ids_in(store_dsn) if i not in left]
        assert [] == list(folder.glob("*.quarantine"))

    def test_still_refused(
        self, left: list[str], sqlite_dsn: str, store_dsn: str
    ) -> None:
        """
        A row that is refused again stays where it is, and is named.
        """
        if store_dsn != sqlite_dsn:
            pytest.skip("the trigger of this test is SQLite's")
        run("drain")
        with closing(sqlite3.connect("audit.db")) as store:
            store.execute(
                "CREATE TRIGGER no BEFORE INSERT ON audit_log WHEN NEW.target = 'bad' "
                "BEGIN SELECT RAISE(ABORT, 'no'); END"
            )
        row = _pending(store_dsn, left[3])
        bad = (f"evt-{'0' * 25}2", *row[1:14], "bad", *row[15:])
        assert spool.quarantine(Path("spool"), "d" * 32, (7, bad), "refused")
        done = run("drain", "--quarantine", "-o", "json")

        assert 1 == done.exit_code
        told = json.loads(done.stdout)
        assert (0, [bad[0]]) == (told["stored"], [r["id"] for r in told["refused"]])
        assert 1 == len(list(spool.quarantined(Path("spool"))))


def _pending(dsn: str, id_: str) -> tuple[Any, ...]:
    from fasten.rows import Pending, parse_timestamp

    (row,) = [row for row in rows_of(dsn) if row["id"] == id_]
    row["timestamp_us"] = parse_timestamp(row["timestamp"])
    return tuple(row[name] for name in Pending._fields)


class TestRestored:
    def test_from_the_spool(self, left: list[str], store_dsn: str) -> None:
        """
        What a journal remembers is put on record, and verify says so.
        """
        backup = Backup(store_dsn)
        with fasten_on(store_dsn, spool_dir="spool", node_id="host-01"):
            fasten.emit("USER_CREATED", "a")
            # Who closes at once leaves the dead one's rows to the next.
            wait_until(lambda: len(left) == fasten.stats()["replayed"])
        backup.restore()
        with fasten_on(store_dsn, spool_dir="elsewhere", node_id="host-01"):
            fasten.emit("USER_CREATED", "b")  # knows nothing of what was there
        done = run("restored", "--reason", "disk of db-1")
        again = run("restored", "--reason", "disk of db-1")

        assert (0, 0) == (done.exit_code, again.exit_code), done.output
        assert "restored: 2-21 of api-server/host-01 on record\n" == done.stdout
        assert again.stdout.startswith("nothing is missing")
        rows = rows_of(store_dsn)
        (said,) = [json.loads(r["detail"]) for r in rows if "RESTORED" in r["code"]]
        assert "disk of db-1" == said["reason"]
        assert 0 == verify_code(rows, store_dsn)

    def test_from_a_checkpoint(
        self, left: list[str], store_dsn: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """
        Where no spool is left, a checkpoint that was kept elsewhere tells.
        """
        monkeypatch.setenv("FASTEN_SIGNING_KEY", SEED)
        backup = Backup(store_dsn)
        run("drain")
        assert 0 == run("checkpoint", "-o", "kept.note").exit_code
        backup.restore()
        shutil.rmtree("spool")
        with fasten_on(store_dsn, spool="off", node_id="host-01"):
            fasten.emit("USER_CREATED", "b")
        before = run("verify", "--checkpoint", "kept.note")
        done = run("restored", "--reason", "lost", "--checkpoint", "kept.note")
        after = run("verify", "--checkpoint", "kept.note")

        assert (1, 0, 0) == (before.exit_code, done.exit_code, after.exit_code), (
            done.output + after.output
        )
        assert "restored: 2-" in after.stdout

    def test_heads_behind_their_table(self, left: list[str], store_dsn: str) -> None:
        """
        Side tables of an older backup are moved on to the rows that are there.
        """
        run("drain")
        if not store_dsn.startswith("sqlite"):
            pytest.skip("one store is enough: the code is the same")
        with closing(sqlite3.connect("audit.db")) as store:
            store.execute("DELETE FROM audit_log_head")
            store.execute("UPDATE audit_log_node SET seq = 0")
            store.commit()
        done = run("restored", "--reason", "side tables were lost")
        with fasten_on(store_dsn, spool="off", node_id="host-01"):
            fasten.emit("USER_CREATED", "next")

        assert 0 == done.exit_code, done.output
        rows = rows_of(store_dsn)
        assert list(range(1, len(rows) + 1)) == [r["monotonic_seq"] for r in rows]
        assert 0 == verify_code(rows, store_dsn)

    def test_a_checkpoint_of_another_service(
        self, left: list[str], store_dsn: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """
        It says nothing of this one, and is refused.
        """
        monkeypatch.setenv("FASTEN_SIGNING_KEY", SEED)
        run("drain")
        assert 0 == run("checkpoint", "-o", "kept.note").exit_code
        monkeypatch.setenv("FASTEN_SERVICE_ID", "other")
        done = run("restored", "--reason", "x", "--checkpoint", "kept.note")

        assert 1 == done.exit_code
        assert "says nothing of service 'other'" in done.stderr
