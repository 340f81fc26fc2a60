# SPDX-License-Identifier: Apache-2.0
"""
What a running service does for its evidence: sweeps, checkpoints, erasures followed.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

import fasten
from fasten import spool
from fasten.chain import ed25519_signer, ed25519_verifier
from fasten.drain import Drainer
from fasten.upkeep import ERASED, Job, scrubbed
from tests.ledger import SEED
from tests.outside import run_python, wait_until
from tests.stores import Kept

CANARY = "canary-4711"
KEYS = [ed25519_verifier(ed25519_signer("shop", SEED).vkey)]
Start = Callable[..., fasten.Engine]


@pytest.fixture
def start(store_dsn: str, tmp_path: Path) -> Iterator[Start]:
    """
    Give what starts a service on a store, with settings of the test's own.
    """

    def started(**settings: Any) -> fasten.Engine:
        given = {
            "service_id": "shop",
            "node_id": "n1",
            "stdout": "",
            "audit_dsn": store_dsn,
            "spool_dir": str(tmp_path / "spool"),
        }
        return fasten.init(**given | settings)

    yield started
    fasten.close()


@pytest.fixture
def kept(store_dsn: str) -> Iterator[Kept]:
    """
    Give the store as an operator has it.
    """
    made = Kept(store_dsn)
    yield made
    made.close()


def emit(number: int = 1, code: str = "USER_CREATED", **given: Any) -> None:
    """
    Emit some rows, and have them stored.
    """
    for index in range(number):
        fasten.emit(code, f"t-{index}", **given)
    assert fasten.flush(10)


class TestJob:
    def test_steps_are_taken_one_at_a_time(self):
        """
        Deliveries come in between.
        """
        taken: list[int] = []
        drainer = Drainer([])
        job = Job(drainer, lambda: iter(_steps(taken, 3)), _fail, interval_s=60)
        counts = []
        for _ in range(4):
            job.chore.due = 1.0
            job.step()
            counts.append((len(taken), 1.0 < job.chore.due <= time.monotonic()))

        assert [(1, True), (2, True), (3, True), (3, False)] == counts

    def test_a_failure_is_told_and_tried_again(self):
        """
        From the beginning, after a while.
        """
        told: list[Exception] = []
        job = Job(Drainer([]), _broken, told.append, interval_s=3600)
        job.step()
        first = job.chore.due - time.monotonic()
        job.step()

        assert ["no store", "no store"] == [str(error) for error in told]
        assert 50 < first <= 60


def _steps(taken: list[int], number: int) -> Iterator[None]:
    for index in range(number):
        taken.append(index)
        yield


def _broken() -> Iterator[None]:
    raise OSError("no store")
    yield


def _fail(error: Exception) -> None:
    raise error


class TestSweep:
    def test_expired_rows_go_by_themselves(self, start, kept):
        """
        On the interval; the record and the periods are there to be read.
        """
        start(
            retention_sweep_interval="1s",
            audit_retention_class_short="1s",
            retention_grace="1s",
        )
        emit(5, "TRIGGER_FIRED")
        wait_until(lambda: not kept.columns("id", where="code = 'TRIGGER_FIRED'"), 15)
        told = json.loads(kept.details("RETENTION_SWEEP_RAN")[0])

        assert (5, {"short": 5}) == (told["deleted"], told["by_class"])
        assert kept.verify().ok

    def test_the_first_start_writes_the_periods(self, start, kept):
        """
        Also of a process that ends at once.
        """
        start(audit_retention_class_short=7)
        emit()
        fasten.close()
        periods = kept.sql(
            "SELECT value FROM audit_log_meta WHERE key = 'retention:shop'"
        )

        assert 7 * 86_400 == json.loads(periods[0][0])["short"]

    def test_a_process_that_stored_nothing_makes_no_store(self, tmp_path):
        """
        A signing key starts the thread, which has nothing to do yet.
        """
        path = tmp_path / "audit.db"
        fasten.init(
            service_id="shop",
            stdout="",
            audit_dsn=f"sqlite:///{path}",
            signing_key=SEED,
            checkpoint_interval="1s",
            retention_sweep_interval="1s",
        )
        fasten.close()

        assert not path.exists()

    def test_by_hand(self, start, kept):
        """
        `fasten.sweep(now=...)` answers for the time it is given.
        """
        start()
        emit(3, "TRIGGER_FIRED")
        nothing = fasten.sweep()
        later = datetime.now(UTC) + timedelta(days=31)
        done = [fasten.sweep(now=later), fasten.sweep(now=later.isoformat())]

        assert 0 == nothing.deleted
        assert [{"short": 3}, {}] == [each.by_class for each in done]
        assert fasten.verify().ok

    def test_a_clock_ahead_deletes_nothing(self, start, kept):
        """
        The store's clock is asked, too.
        """
        start()
        emit(2, "TRIGGER_FIRED")
        engine = fasten.engine.current()
        engine._clock_ns = lambda: time.time_ns() + 10 * 365 * 86_400 * 10**9
        done = fasten.sweep()

        assert 0 == done.deleted


class TestCheckpoints:
    def test_they_are_made_on_the_interval(self, start, kept, capfd):
        """
        Stored, and printed with the audit lines.
        """
        start(signing_key=SEED, checkpoint_interval="1s", stdout="audit")
        emit()
        wait_until(lambda: kept.sql("SELECT 1 FROM audit_log_checkpoint"), 15)
        fasten.close()
        lines = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
        notes = [line["note"] for line in lines if line["shape"] == "checkpoint"]

        assert kept.verify(given=notes, verifiers=KEYS).is_anchored
        assert notes

    def test_a_clean_exit_leaves_nothing_unanchored(self, start, kept):
        """
        Whatever the interval.
        """
        start(signing_key=SEED, checkpoint_interval="1h")
        emit(3)
        fasten.close()
        report = kept.verify(verifiers=KEYS, require_anchor=True)

        assert report.ok
        assert [0] == [chain.unanchored for chain in report.chains]

    def test_an_exit_waits_for_no_store(self, private_postgres):
        """
        Where the store hangs, the last checkpoint is left out.
        """
        fasten.init(
            service_id="shop",
            stdout="",
            audit_dsn=private_postgres.dsn(),
            signing_key=SEED,
        )
        emit()
        private_postgres.pause()
        began = time.monotonic()
        fasten.close(2.0)
        took = time.monotonic() - began
        private_postgres.resume()

        assert took < 3.5

    def test_a_program_that_just_ends(self, store_dsn, kept):
        """
        The exit handler signs, too.
        """
        done = run_python(
            """
            import fasten
            fasten.init()
            fasten.emit("USER_CREATED", "u-1")
            assert fasten.flush(30)
            """,
            env={
                "FASTEN_SERVICE_ID": "shop",
                "FASTEN_AUDIT_DSN": store_dsn,
                "FASTEN_STDOUT": "",
                "FASTEN_SIGNING_KEY": SEED,
            },
        )

        assert "" == done.stderr
        assert kept.verify(verifiers=KEYS, require_anchor=True).ok


class TestErase:
    def test_store_files_and_memory_are_clear(self, start, kept, tmp_path):
        """
        When it returns, nothing that this process can reach holds the name.
        """
        start()
        emit(3, actor=CANARY, detail={"name": CANARY})
        fasten.log.info("login", user=CANARY)
        fasten.record_api(method="GET", path="/", actor=CANARY)
        fasten.emit("USER_CREATED", "last", actor=CANARY)
        done = fasten.erase(actor=CANARY, reason="asked for")

        assert (4, True) == (done.rows, done.is_complete)
        assert [] == fasten.query("sys").rows
        assert [] == fasten.query("api").rows
        assert fasten.verify().ok
        assert [] == _holding(tmp_path)

    def test_a_subject_is_named_as_in_emit(self, start, kept):
        """
        By a text, a number or a UUID.
        """
        someone = UUID(int=7)
        start()
        emit(1, actor=0)
        emit(1, actor=someone)
        done = [fasten.erase(actor=who, reason="r").rows for who in (0, someone)]

        assert [1, 1] == done

    def test_rows_of_an_outage_are_stored_erased(self, start, kept, tmp_path):
        """
        They waited in a spool while the subject was erased.
        """
        running = start()
        emit()
        with running.delivery.drainer._delivering:
            fasten.emit("USER_CREATED", "u-1", actor=CANARY, detail={"name": CANARY})
            assert not fasten.flush(0.5)
            assert _holding(tmp_path / "spool")
            entry, _ = kept.eraser.announce(
                "actor", CANARY, ("actor", "detail"), "asked"
            )
        assert fasten.flush(20)
        _hurry()
        wait_until(lambda: not kept.eraser.lagging(entry.at_us), 10)

        assert [None] == kept.columns("actor", where="target = 'u-1'")
        assert [] == _holding(tmp_path)
        assert fasten.verify().ok

    def test_another_process_follows(self, start, kept, store_dsn, tmp_path):
        """
        A live process removes its files; whoever erases waits for it.
        """
        start()
        emit(2, actor=CANARY)
        erased = run_python(
            f"""
            from pathlib import Path
            from fasten.custody import Custody
            from fasten.forgetting import Forgetting
            from fasten.settings import Settings
            given = {{"service_id": "shop", "node_id": "n2", "audit_dsn": {store_dsn!r},
                      "spool_dir": {str(tmp_path / "spool")!r}, "stdout": ""}}
            settings = Settings.from_env({{}}, given, hostname="h", cwd=Path.cwd())
            with Custody(settings).opened() as custody:
                subject = ("actor", {CANARY!r})
                done = Forgetting(custody).erase(subject, "asked", timeout_s=0.2)
            print(done.rows, len(done.lagging))
            """
        )
        _hurry()
        wait_until(lambda: not _holding(tmp_path), 10)

        assert "2 1" == erased.stdout.strip()

    def test_the_quarantine_is_scrubbed(self, start, kept, tmp_path):
        """
        Rows that the store refused are kept without what was erased.
        """
        start()
        emit()
        row = tuple(kept.maker.pending(actor=CANARY, detail='{"a":1}'))
        spool.quarantine(tmp_path / "spool", "f" * 32, (1, row), "too long")
        done = fasten.erase(actor=CANARY, reason="asked for")
        kept_rows = list(spool.quarantined(tmp_path / "spool"))

        assert done.is_complete
        assert (ERASED, "{}") == (kept_rows[0].row[9], kept_rows[0].row[20])
        assert [] == _holding(tmp_path)

    def test_the_outbox_is_moved(self, start, kept):
        """
        A row in it meets the ledger on its way.
        """
        from fasten.repository.outbox import entry_of

        start()
        emit()
        entry = entry_of(kept.maker.pending(actor=CANARY), "shop", "n1")
        kept.sql(
            "INSERT INTO audit_log_outbox (id, service_id, source_node_id, payload, "
            "created_at) VALUES (?, ?, ?, ?, '2026-01-01T00:00:00.000000Z')",
            *entry,
        )
        done = fasten.erase(actor=CANARY, reason="asked for")

        assert done.is_complete
        assert [] == kept.sql("SELECT payload FROM audit_log_outbox")
        assert [None] == kept.columns("actor", where=f"id = '{entry.id}'")
        assert fasten.verify().ok

    @pytest.mark.parametrize(
        "subject",
        [
            {},
            {"actor": ""},
            {"actor": "a", "target": "b"},
            {"fields": ["code"], "id": "x"},
        ],
    )
    def test_what_cannot_be(self, start, subject):
        """
        One subject, and fields that can go.
        """
        start()
        emit()
        with pytest.raises(fasten.InvalidAnchor):
            fasten.erase(reason="r", **subject)

    def test_without_init(self):
        """
        There is no store to erase in.
        """
        for call in (lambda: fasten.erase(actor="a", reason="r"), fasten.sweep):
            with pytest.raises(fasten.NotInitialized):
                call()


def test_a_forked_child_keeps_up_by_itself(start, kept, tmp_path):
    """
    It has its own files, and follows for itself.
    """
    start()
    emit()
    child = os.fork()
    if child == 0:
        try:
            emit(2, actor=CANARY)
            # Its parent's files are the parent's to remove: nobody waits for it here.
            done = fasten.erase(actor=CANARY, reason="asked for", timeout=0.2)
            os._exit(0 if done.rows == 2 else 1)
        finally:
            os._exit(2)
    _, status = os.waitpid(child, 0)

    assert 0 == os.waitstatus_to_exitcode(status)
    assert kept.verify().ok


def test_fields_of_a_row_without_a_seal():
    """
    What may be null becomes null; what may not says that it was erased.
    """
    row = Kept("sqlite:///none.db").maker.pending(reason="r", client="c")
    bare = scrubbed(row, {"actor", "reason", "detail"})

    assert (ERASED, None, "c", "{}") == (bare[9], bare[16], bare[13], bare[20])


def _hurry() -> None:
    engine = fasten.engine.current()
    assert engine is not None
    assert engine.delivery is not None
    assert engine.delivery.upkeep is not None
    engine.delivery.upkeep.hurry()


def _holding(folder: Path) -> list[Path]:
    """
    Return the files below *folder* that hold the canary.
    """
    return [path for path in folder.rglob("*") if CANARY.encode() in _content(path)]


def _content(path: Path) -> bytes:
    # A file may be removed while it is looked for: then nothing is in it.
    with suppress(FileNotFoundError):
        return path.read_bytes() if path.is_file() else b""
    return b""
