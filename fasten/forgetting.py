# SPDX-License-Identifier: Apache-2.0
"""
Erasing somebody by hand: in the store, and wherever else fasten can reach.

How fields of a stored row go is `repository.erasing`'s; what a running service does
about it by itself, `upkeep`'s.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID

import attrs

from fasten import spool
from fasten.chain import COMMITTED_FIELDS
from fasten.custody import Custody
from fasten.delivery import spool_directory
from fasten.engine import Engine, default
from fasten.errors import AuditStoreError, FastenError, InvalidAnchor
from fasten.settings import Dsn
from fasten.streams import json_line
from fasten.upkeep import pause_s, scrub_quarantine

if TYPE_CHECKING:
    from fasten.repository import Erased, Lagging, OutboxRepository
    from fasten.repository.erasures import Erasure

__all__ = ["Erasing", "Forgetting", "erase", "fields_to_erase", "read_ledger"]

FOLLOW_S: Final = 35.0
"""How long an erasure waits for the writers that hold files."""

BUSY_S: Final = 5.0
BATCH_ROWS: Final = 500
_POLL_S: Final = 0.2
Progress = Callable[[int, int], None]


def erase(
    *,
    actor: str | int | UUID | None = None,
    target: str | int | UUID | None = None,
    id: str | None = None,
    reason: str,
    fields: Iterable[str] = (),
    dry_run: bool = False,
    ledger: str | Path | None = None,
    timeout: float | None = None,
) -> Erasing:
    """
    Erase *fields* of an actor's, a target's, or one row; the chain stays valid.

    By default the field asked for and the detail go; of a row, all six that can.
    Waits up to *timeout* seconds, by default 35, for other writers to remove their
    files; look at `is_complete`. A *ledger* file takes what can be applied again after
    a restore.

    Raises:
        NotInitialized: `init()` was not called.
        AuditStoreError: the store cannot be reached now.
        InvalidAnchor: not exactly one subject is given, or a field cannot be erased.
        FastenError: the store refuses, or a legal hold does.
    """
    engine = default()
    engine.flush(5.0)
    with Custody(engine.settings, clock_us=engine.now_us).opened() as custody:
        done = Forgetting(custody, engine).erase(
            _subject(actor=actor, target=target, id=id),
            reason,
            fields=fields,
            is_dry=dry_run,
            ledger=None if ledger is None else Path(ledger),
            timeout_s=timeout,
        )
        engine.stored(done.stored, is_sealed=True)
        engine.checkpointed(done.notes)
    return done


def _subject(**given: str | int | UUID | None) -> tuple[str, str]:
    named = [(field, str(value)) for field, value in given.items() if value is not None]
    if len(named) != 1 or not named[0][1]:
        raise InvalidAnchor("give exactly one of actor=, target= and id= to erase")
    return named[0]


@attrs.define(kw_only=True)
class Erasing:
    """
    What an erasure did; all but *rows* and *by_class* tells what it could not do.

    *held* and *damaged* are ids of rows that stay, *lagging* the writers that may
    still hold a file, *unreached* where else the value may stand. *stored* are the
    records, as columns, *notes* the checkpoints made after.
    """

    rows: int = 0
    by_class: dict[str, int] = attrs.field(factory=dict)
    held: list[str] = attrs.field(factory=list)
    damaged: list[str] = attrs.field(factory=list)
    lagging: list[str] = attrs.field(factory=list)
    remains: list[str] = attrs.field(factory=list)
    unreached: list[str] = attrs.field(factory=list)
    is_dry: bool = False
    stored: list[tuple[Any, ...]] = attrs.field(factory=list)
    notes: list[str] = attrs.field(factory=list)

    @property
    def is_complete(self) -> bool:
        """
        Tell whether everything that fasten can reach is clear.
        """
        left = (self.held, self.damaged, self.lagging, self.remains)
        return self.is_dry or not any(left)

    def take(self, done: Erased) -> None:
        """
        Add what happened in the store.
        """
        self.rows += done.rows
        for name, number in done.by_class.items():
            self.by_class[name] = self.by_class.get(name, 0) + number
        self.held += done.held
        self.damaged += done.damaged
        self.stored += done.stored


class Forgetting:
    """
    What erases in the store of *custody*; *engine* is the one that runs beside it.
    """

    def __init__(self, custody: Custody, engine: Engine | None = None) -> None:
        from fasten.repository import Eraser

        custody.require()
        self._custody, self._engine = custody, engine
        self._settings = custody.settings
        self._repository = custody.repository
        self._eraser = Eraser(custody.repository, custody.writer)

    def erase(
        self,
        subject: tuple[str, str],
        reason: str,
        *,
        fields: Iterable[str] = (),
        is_dry: bool = False,
        ledger: Path | None = None,
        timeout_s: float | None = None,
        progress: Progress = lambda _done, _total: None,
    ) -> Erasing:
        """
        Erase a subject wherever it can be reached; or count its rows.

        Raises:
            InvalidAnchor: a field cannot be erased.
            FastenError: a legal hold keeps the subject.
            Exception: see `Custody.opened`.
        """
        field, value = subject
        named = fields_to_erase(field, fields)
        self._refuse_held(field, value)
        about = self._eraser.subject(field, value, named)
        found = self._eraser.count(about)
        total = sum(found.values())
        if is_dry:
            return Erasing(is_dry=True, rows=total, by_class=found)
        entry, is_new = self._eraser.announce(
            field, value, named, reason, is_renewed=bool(total)
        )
        if ledger is not None and is_new:
            _append_ledger(ledger, entry)
        steps = partial(self._eraser.erase, about, named, reason)
        done = self._run(steps, lambda rows: progress(rows, total))
        self._clear_up(entry.at_us, done, timeout_s)
        if self._engine is not None:
            self._engine.forget(lambda row: value in json_line(row))
        return done

    def apply_ledger(
        self,
        ledger: Path,
        *,
        timeout_s: float | None = None,
        progress: Progress = lambda _done, _total: None,
    ) -> Erasing:
        """
        Erase again what a ledger file tells: after a restore.

        Raises:
            OSError: the file cannot be read.
            FastenError: it is no ledger.
            Exception: see `Custody.opened`.
        """
        entries = read_ledger(ledger)
        steps = partial(self._eraser.apply_again, entries)
        done = self._run(steps, lambda rows: progress(rows, 0))
        newest_us = max((entry.at_us for entry in entries), default=0)
        self._clear_up(newest_us, done, timeout_s)
        return done

    def _run(
        self, steps: Callable[[Erased], Iterator[None]], progress: Callable[[int], None]
    ) -> Erasing:
        from fasten.repository import Erased

        rest_s = pause_s(self._repository.dsn)
        inner, done = Erased(), Erasing()
        for _ in steps(inner):
            progress(inner.rows)
            time.sleep(rest_s)
        done.take(inner)
        return done

    def _refuse_held(self, field: str, value: str) -> None:
        for hold in self._custody.holds():
            if (hold.field, hold.value) == (field, value):
                raise FastenError(
                    f"{field} is under legal hold {hold.id} ({hold.reason}); lift it "
                    "first: `fasten hold remove`"
                )

    # -- outside of the table --

    def _clear_up(self, at_us: int, done: Erasing, timeout_s: float | None) -> None:
        """
        Clear what stands outside the table, and list what cannot be cleared.
        """
        wait_s = FOLLOW_S if timeout_s is None else timeout_s
        deadline = time.monotonic() + wait_s
        delivery = self._engine.delivery if self._engine is not None else None
        if delivery is not None and delivery.upkeep is not None:
            delivery.upkeep.hurry()
        self._clear_spool(done)
        self._clear_outbox(done)
        done.lagging += [
            f"writer {each.id[:8]} of {each.service} on {each.node}"
            for each in self._wait(at_us, deadline)
        ]
        anchor = self._custody.anchor() if done.rows else None
        if anchor is not None:
            done.notes += [note for notes in anchor.run() for note in notes]
        if not self._truncate(time.monotonic() + BUSY_S):
            path = self._repository.dsn.path
            done.remains.append(f"{path}-wal, which somebody reads just now")
        done.unreached += self._unreached()

    def _wait(self, at_us: int, deadline: float) -> list[Lagging]:
        while True:
            lagging = self._eraser.lagging(at_us)
            if not lagging or time.monotonic() >= deadline:
                return lagging
            time.sleep(_POLL_S)

    def _truncate(self, deadline: float) -> bool:
        while not self._eraser.truncate_wal():
            if time.monotonic() > deadline:
                return False
            time.sleep(_POLL_S)
        return True

    def _unreached(self) -> list[str]:
        settings = self._settings
        told = ["backups of the store, and files exported from it"]
        if self._repository.database.is_postgres:
            told.append("Postgres: dead row versions until VACUUM, WAL and replicas")
        if "audit" in settings.stdout:
            told.append("lines that were printed and shipped")
        for name, dsn in (("sys", settings.sys_dsn), ("api", settings.api_dsn)):
            if dsn is not None:
                told.append(f"the durable {name} stream, until its rows expire")
        return told

    def _clear_spool(self, done: Erasing) -> None:
        """
        Deliver what dead writers left on this host, and remove their files.
        """
        from fasten.repository import GONE_US

        if not self._settings.spool:
            return
        directory = spool_directory(self._settings)
        service = self._settings.service_id
        store = self._repository.dsn.fingerprint
        dead = spool.adopt(directory, service=service, store=store)
        dead += spool.recall(directory, service=service, store=store)
        gone = [orphan.writer_id for orphan in dead if self._is_cleared(orphan, done)]
        self._eraser.follow(gone, GONE_US)
        with self._repository.database.reading() as connection:
            ledger = self._eraser.entries(connection)
        scrub_quarantine(directory, ledger)
        kept = spool.quarantined(directory)
        done.remains += sorted({str(e.path) for e in kept if ledger.among([e.row])})

    def _is_cleared(self, orphan: spool.Orphan, done: Erasing) -> bool:
        """
        Deliver a dead writer's rows and remove its files; false where that fails.
        """
        try:
            if not orphan.is_done:
                self._deliver(orphan)
            orphan.purge()
        except Exception as error:  # the store's, or the file system's
            orphan.release()
            problem = self._repository.database.problem(error).message
            done.remains.append(
                f"the spool of writer {orphan.writer_id[:8]}: {problem}"
            )
            return False
        return True

    def _deliver(self, orphan: spool.Orphan) -> None:
        from fasten.repository import Writer

        writer = Writer(orphan.writer_id, orphan.service, orphan.node)
        for batch in orphan.batches(orphan.acked, BATCH_ROWS):
            self._repository.append(writer, batch.rows, batch.last)
            self._record_lost(orphan.writer_id, batch.missing)
            orphan.ack(batch.last)

    def _record_lost(self, writer_id: str, missing: Iterable[tuple[int, int]]) -> None:
        details = [
            {"writer": writer_id, "from": first, "to": last, "count": last - first + 1}
            for first, last in missing
        ]
        records = [("AUDIT_ROWS_DROPPED", writer_id, detail) for detail in details]
        if records:
            self._custody.record(records)

    def _clear_outbox(self, done: Erasing) -> None:
        """
        Move what waits in the outbox: it meets the ledger on its way.
        """
        dsn = self._settings.outbox_dsn or self._repository.dsn
        if dsn.path is not None and not Path(dsn.path).exists():
            return
        outbox = self._outbox(dsn)
        try:
            for _ in range(1000):
                moved = outbox.move(BATCH_ROWS, _leave)
                if moved.is_busy:
                    time.sleep(_POLL_S)
                elif moved.first_id is None:
                    return
        except Exception as error:  # another database's driver's
            done.remains.append(f"the outbox: {outbox.problem(error).message}")
        finally:
            if outbox.database is not self._repository.database:
                outbox.database.release()

    def _outbox(self, dsn: Dsn) -> OutboxRepository:
        from fasten.repository import Database, OutboxRepository

        repository = self._repository
        if dsn == repository.dsn:
            return OutboxRepository(dsn, repository.database, repository)
        return OutboxRepository(dsn, Database(dsn, is_guest=True), repository)


def _leave(row: tuple[Any, ...], reason: str) -> None:
    raise AuditStoreError(f"row {row[0]} of the outbox cannot be stored: {reason}")


def fields_to_erase(field: str, given: Iterable[str]) -> tuple[str, ...]:
    """
    Return which fields go: those *given*, else the one asked for and the detail.

    Raises:
        InvalidAnchor: one of them cannot be erased.
    """
    named = tuple(sorted(set(given)))
    for name in named:
        if name not in COMMITTED_FIELDS:
            raise InvalidAnchor(
                f"{name!r} cannot be erased; {', '.join(COMMITTED_FIELDS)} can"
            )
    if named:
        return named
    return COMMITTED_FIELDS if field == "id" else tuple(sorted({field, "detail"}))


# --- ledger files ---------------------------------------------------------------------


def _append_ledger(path: Path, entry: Erasure) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry.to_dict()) + "\n")


def read_ledger(path: Path) -> list[Erasure]:
    """
    Read the entries of a ledger file.

    Raises:
        OSError: it cannot be read.
        FastenError: it is no ledger.
    """
    from fasten.repository.erasures import Erasure

    entries = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            entries.append(Erasure.from_dict(json.loads(line)))
        except ValueError:
            raise FastenError(
                f"{path}:{number} is no entry of a ledger of erasures"
            ) from None
    return entries
