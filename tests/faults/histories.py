# SPDX-License-Identifier: Apache-2.0
"""
Histories that nobody tampered with: whatever happened to a store, verify says ok.

In a history rows are emitted, replayed, swept, held, erased, signed; some sweeps are
killed. Several of them happen at once in one store, two nodes of each service; half
way the store goes back to a backup. An Outcome's *trials* are histories, its faults
are alarms.
"""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

from fasten import chain
from fasten.engine import audit_line
from fasten.evidence import Report
from fasten.proof import verify_file
from fasten.repository import SweepIsBusy
from fasten.repository.exporting import Export
from fasten.repository.pruning import Order, Sweeper
from fasten.repository.snapshot import snapshot
from fasten.repository.tables import head_of
from fasten.rows import Query
from tests.faults.grounds import Experiment, Grounds, both
from tests.faults.oracle import Outcome
from tests.ledger import CLASSES, SEED, Ledger, value
from tests.outside import ROOT, wait_until
from tests.stores import DAY, TABLES, Kept

__all__ = ["EXPERIMENTS", "live_untouched", "verify_beside_writers"]

AT_ONCE: Final = 8
"""How many histories happen in one store."""

ROUNDS: Final = 10
FIELDS: Final = ("actor", "target", "id")


class History:
    """
    One node of a service, to which things happen by chance.

    *said* remembers what its rows were before they were sealed, by number.
    """

    def __init__(self, kept: Kept, node: str, seed: int) -> None:
        self.kept = kept
        self.kept.maker = Ledger(seed, kept.maker.service)
        self.node = node
        self.dice = random.Random(seed)
        self.notes: list[str] = []
        self._index = 0
        self._batch: list[tuple[int, Any]] = []
        self._said: dict[int, Any] = {}
        self._hold: Any = None
        self._heads: list[chain.Head] = []
        self._reached = 0

    def step(self) -> None:
        """
        Let one thing happen.
        """
        things = (
            *(self.emit, self.emit, self.emit, self.replay, self.sweep, self.kill),
            *(self.hold, self.erase, self.sign, self.drop),
        )
        # Others are at it at the same moment, as they are in a fleet.
        with suppress(SweepIsBusy):
            self.dice.choice(things)()

    def emit(self) -> None:
        """
        Store a batch from the journal.
        """
        number = self.dice.randrange(1, 6)
        pending = [
            self.kept.maker.pending(self.dice.choice(CLASSES)) for _ in range(number)
        ]
        self._batch = list(enumerate(map(tuple, pending), self._index + 1))
        self._index += number
        self._remember(self._append(self._batch, self._index))

    def replay(self) -> None:
        """
        Store the last batch again, as after a crash; or as after a commit in doubt.
        """
        if not self._batch:
            return
        self._append(self._batch, self._index)
        there = set(self.kept.columns("id"))
        self._append([(0, row) for _, row in self._batch if row[0] in there], 0)

    def _append(
        self, rows: Sequence[tuple[int, Any]], last: int
    ) -> list[tuple[Any, ...]]:
        return self.kept.repository.append(self.kept.writer(self.node), rows, last)

    def _remember(self, stored: Sequence[tuple[Any, ...]]) -> None:
        known = {row[0]: row for _, row in self._batch}
        for row in stored:
            if value(row, "id") in known:
                self._said[value(row, "monotonic_seq")] = known[value(row, "id")]

    def sweep(self) -> None:
        """
        Let days go by, and delete what has expired.
        """
        self.kept.age(self.dice.randrange(60))
        self.kept.sweep(self.node, limit=self.dice.randrange(1, 8))

    def kill(self) -> None:
        """
        Begin to sweep, and be killed after some steps.
        """
        self.kept.age(self.dice.randrange(60))
        order = Order(
            wanted=self.kept.policy,
            now_us=self.kept.maker.us,
            interval_s=60.0,
            is_time_given=True,
            limit=2,
        )
        sweeper = Sweeper(self.kept.repository, self.kept.writer(self.node), order)
        for _ in zip(range(self.dice.randrange(1, 9)), sweeper.run(), strict=False):
            pass

    def hold(self) -> None:
        """
        Put a legal hold on what is there, or lift it.
        """
        if self._hold is not None:
            self.kept.lift(self._hold)
            self._hold = None
        elif self._said:
            row = self.dice.choice(list(self._said.values()))
            self._hold = self.kept.hold("target", row[14])

    def erase(self) -> None:
        """
        Erase somebody.
        """
        if self._said:
            row = self.dice.choice(list(self._said.values()))
            field = self.dice.choice(FIELDS)
            number = self.dice.randrange(1, 7)
            fields = self.dice.sample(chain.COMMITTED_FIELDS, number)
            subject = {"actor": row[9], "target": row[14], "id": row[0]}[field]
            self.kept.erase(field, subject, *fields)

    def sign(self) -> None:
        """
        Make checkpoints, and carry them off.
        """
        self.notes += self.kept.checkpoint()

    def drop(self) -> None:
        """
        Record a loss.
        """
        self.kept.record(self.node, "AUDIT_ROWS_DROPPED", {"count": 1})

    # -- a store that went back --

    def remember_heads(self) -> None:
        """
        Keep in mind how far the node has come: as every writer does.
        """
        with self.kept.repository.database.reading() as connection:
            table = self.kept.repository.tables.head
            found = connection.execute(table.select()).all()
        place = (self.kept.maker.service, self.node)
        heads = (head_of(row) for row in found)
        self._heads = [head for head in heads if head.key[:2] == place]
        self._reached = self._seq()

    def _seq(self) -> int:
        found = self.kept.sql(
            "SELECT seq FROM audit_log_node WHERE service_id = ? "
            "AND source_node_id = ?",
            *(self.kept.maker.service, self.node),
        )
        return found[0][0] if found else 0

    def return_to_work(self) -> None:
        """
        Find the store gone back: store again what it lost, and put it on record.
        """
        seq, place = self._seq(), (self.kept.maker.service, self.node)
        if seq >= self._reached:
            return
        lost = [row for number, row in self._said.items() if number > seq]
        if seq == 0:
            self.kept.repository.append(self.kept.writer(self.node), [], 0)
        self.kept.sql(
            "UPDATE audit_log_node SET seq = ? WHERE service_id = ? "
            "AND source_node_id = ?",
            *(self._reached, *place),
        )
        self._batch = [(0, row) for row in lost]
        self._remember(self._append(self._batch, 0))
        said = chain.Restored(
            service_id=place[0],
            source_node_id=place[1],
            from_seq=seq + 1,
            to_seq=self._reached,
            chains={
                head.retention_class: (head.count, chain.Checkpoint.of(head).root)
                for head in self._heads
            },
        )
        self.kept.record(self.node, "CHAIN_RESTORED", said.detail())


@contextmanager
def _stores(dsn: str) -> Iterator[list[Kept]]:
    """
    Yield a store in the hands of several services, two nodes of each.
    """
    made = [Kept(dsn, 0, f"service {number // 2}") for number in range(AT_ONCE)]
    made[0].repository.schema.ensure()
    yield made
    for kept in made:
        kept.close()


def _empty(stores: Sequence[Kept]) -> None:
    first = stores[0]
    first.load({name: [] for name in TABLES if name != "meta"})
    first.sql("DELETE FROM audit_log_meta WHERE key NOT IN ('schema', 'min_writer')")
    for kept in stores:
        kept.forget()


# --- many of them ---------------------------------------------------------------------


def live_untouched(grounds: Grounds, *, trials: int = 5_000, store: str) -> Outcome:
    """
    Let *trials* histories happen, and verify the store again and again.
    """
    alarms, rows = list[str](), 0
    with _stores(grounds.dsn(store)) as stores:
        for seed in range(grounds.seed, grounds.seed + trials, AT_ONCE):
            _empty(stores)
            histories = [
                History(kept, f"n{1 + at % 2}", seed + at)
                for at, kept in enumerate(stores[: grounds.seed + trials - seed])
            ]
            for report in _live(histories, grounds):
                alarms += [f"seed {seed}: {finding}" for finding in report.findings]
                rows = max(rows, report.rows)
    name = "SQLite" if store == "sqlite" else "Postgres"
    return Outcome(
        name=f"untouched histories ({name})",
        trials=trials,
        stored=rows,
        verify=1 if alarms else 0,
        faults=tuple(alarms),
    )


def _live(histories: Sequence[History], grounds: Grounds) -> Iterator[Report]:
    """
    Let histories happen, two things at a time; yield what verify says of the store.
    """
    kept = histories[0].kept
    dice = random.Random(kept.maker.random.random())
    backup, gone_back = dice.randrange(ROUNDS), dice.randrange(ROUNDS)
    content = kept.dump()
    for number in range(ROUNDS):
        if number == backup:
            content = kept.dump()
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(History.step, histories))
        if number == gone_back >= backup:
            for history in histories:
                history.remember_heads()
            kept.load(content)
            for history in histories:
                history.kept.forget()
            for history in histories:
                history.return_to_work()
        if number % 3 == 0 or number == ROUNDS - 1:
            yield _verified(histories)
    yield _exported(histories, grounds)


def _verified(histories: Sequence[History]) -> Report:
    notes = [note for history in histories for note in history.notes]
    return histories[0].kept.verify(given=notes, verifiers=_keys(histories))


def _keys(histories: Sequence[History]) -> list[chain.Verifier]:
    return [key for history in histories for key in history.kept.maker.verifiers]


def _exported(histories: Sequence[History], grounds: Grounds) -> Report:
    """
    Export the store, and verify the file with its newest checkpoints alone.
    """
    dsn, path = histories[0].kept.dsn, grounds.folder / "export.ndjson"
    with snapshot(dsn) as moment, path.open("w", encoding="utf-8") as file:
        run = Export(moment, dsn, Query(stream="audit"), {})
        for row in run.rows():
            file.write(f"{audit_line(row, with_salt=True)}\n")
        notes = run.notes([], "")
    return verify_file(path, given=notes, verifiers=_keys(histories))


# --- while others write ---------------------------------------------------------------

WRITERS: Final = 8

_WRITERS: Final = """
import os, select, sys
import sqlalchemy, fasten, fasten.repository
dsn, spool, key, number = sys.argv[1:]
pids = []
for writer in range(int(number)):
    pid = os.fork()
    if pid:
        pids.append(pid)
        continue
    fasten.init(service_id="shop", node_id=f"n{writer % 3}", audit_dsn=dsn, stdout="",
                spool_dir=spool, signing_key=key, checkpoint_interval="1s")
    codes = ("TRIGGER_FIRED", "ORDER_PLACED", "USER_CREATED")
    emitted = 0
    while not select.select([sys.stdin], [], [], 0.01)[0]:
        fasten.emit(codes[emitted % 3], f"{writer}/{emitted}", actor=f"a{emitted % 50}")
        emitted += 1
    assert fasten.flush(60)
    fasten.close()
    os.write(1, f"{emitted}\\n".encode())
    os._exit(0)
for pid in pids:
    os.waitpid(pid, 0)
"""


def verify_beside_writers(
    grounds: Grounds, *, trials: int = 200, store: str
) -> Outcome:
    """
    Verify *trials* times while 8 processes write, and somebody sweeps and erases.
    """
    kept = Kept(grounds.dsn(store), grounds.seed)
    kept.repository.schema.ensure()
    alarms: list[str] = []
    with _writing(kept, grounds.spool) as emitted:
        wait_until(lambda: kept.verify().rows > WRITERS, 30)
        first = kept.verify().rows
        for number in range(trials):
            if number % 4 == 1:
                kept.erase("actor", f"a{number % 50}")
            elif number % 4 == 3:
                _sweep_old(kept)
            alarms += [str(finding) for finding in kept.verify().findings]
        last = kept.verify().rows
    report = kept.verify()
    kept.close()
    if last <= first:
        alarms.append("nobody wrote meanwhile")
    return Outcome(
        name=f"verify beside 8 writers ({'SQLite' if kept.is_sqlite else 'Postgres'})",
        trials=trials,
        emitted=sum(emitted),
        stored=report.rows,
        verify=report.exit_code,
        faults=tuple(alarms),
    )


def _sweep_old(kept: Kept) -> None:
    """
    Delete what is older than a second, if nobody else sweeps.
    """
    now_us = time.time_ns() // 1000 + (30 * DAY - 1) * 1_000_000
    with suppress(SweepIsBusy):
        kept.sweep("n0", now_us=now_us)


@contextmanager
def _writing(kept: Kept, spool: Path) -> Iterator[list[int]]:
    """
    Let 8 processes write in a with-block; yield how much each of them did, at its end.
    """
    emitted: list[int] = []
    arguments = [kept.given, str(spool), SEED, str(WRITERS)]
    with subprocess.Popen(
        [sys.executable, "-c", _WRITERS, *arguments],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        yield emitted
        told, _ = process.communicate("", 90)
        emitted += map(int, told.split())


EXPERIMENTS: Final[dict[str, Experiment]] = {
    **both("untouched", live_untouched),
    **both("verify-beside-writers", verify_beside_writers),
}
