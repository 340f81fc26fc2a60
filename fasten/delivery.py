# SPDX-License-Identifier: Apache-2.0
"""
How an engine's rows get from the spool to their stores: the carriers, wired.

What a row is made of lives in `engine`; each carrier, in its own module.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

import attrs

from fasten import spool
from fasten.context import suppressed
from fasten.drain import (
    Batch,
    Chore,
    Drainer,
    Fault,
    Lane,
    Rows,
    Ticket,
    Watchdog,
)
from fasten.errors import AuditStoreError, InvalidQuery, MissingExtra
from fasten.losses import Losses
from fasten.outbox import Mover, Outbox, Sign
from fasten.records import Author
from fasten.refill import Journal, Refill
from fasten.rows import AUDIT_COLUMNS, WIRE_VERSION, Page, Pending, format_timestamp
from fasten.settings import Dsn, Settings
from fasten.streams import BoundedQueue
from fasten.upkeep import Keeper, Upkeep, signers_of

if TYPE_CHECKING:
    from fasten.repository import (
        AuditRepository,
        Database,
        OutboxRepository,
        StreamRepository,
        Writer,
    )

__all__ = ["Delivery", "Host", "spool_directory", "unsealed"]

logger = logging.getLogger("fasten")

WATCHDOG_S: Final = 12.0
TICKET_S: Final = 5.0
ADOPT_S: Final = 30.0
ADOPT_MOST: Final = 64
"""How many journals of dead processes are open at once."""
IDLE_S: Final = 30.0
FORK_S: Final = 0.5
"""How long a fork waits for SQLite to be at rest."""
LOAD_S: Final = 10.0
"""How long a fork waits for modules that are being loaded, once in a process."""
TEND_S: Final = 1.0
PAUSE_S: Final = 0.00005
SWEEP_FIRST_S: Final = 60.0
CLOCK_SLACK_S: Final = 3_600.0
_BESIDE: Final = ">"


class Host(Keeper, Protocol):
    """
    What a delivery asks of the engine that it works for.
    """

    def own_row(
        self, code: str, target: str, detail: Mapping[str, Any]
    ) -> tuple[Any, ...]:
        """
        Make a row of fasten's own, in `Pending` order.
        """

    def emit_own(self, code: str, target: str, detail: Mapping[str, Any]) -> str:
        """
        Record something that fasten itself did.
        """


class Delivery:
    """
    What carries an engine's rows: spool, queues, drainers and the stores they feed.

    Streams on one server share a drainer thread and a connection. Nothing is opened
    and no thread starts before the first row, unless a dead process left some.
    """

    def __init__(self, host: Host) -> None:
        settings = self._settings = host.settings
        self._host = host
        self._last_error: str | None = None
        self._replayed = 0
        self._set_aside_count = 0
        self._spool_fault = ""
        self._first_index = 0
        self._began = time.time(), time.monotonic()
        self._sweeps: dict[str, Chore] = {}
        self._unswept: dict[str, str] = {}
        self.directory = spool_directory(settings)
        self.spool = self._make_spool()
        self.losses = Losses(self.spool, host.own_row)
        self.queues: dict[str, BoundedQueue] = {}
        # Guards the first use of a store: the drainer's, or a reader's.
        self._opening = threading.Lock()
        # Held while SQLAlchemy and drivers are loaded, and across a fork.
        self._loading = threading.Lock()
        self._is_loaded = self._is_load_kept = False
        self._databases: dict[str, Database] = {}
        self._repositories: dict[str, Any] = {}
        self._drainers: dict[str, Drainer] = {}
        self.lane = self._audit_lane()
        self.drainer = self._drainer_for(settings.audit_dsn)
        self.drainer.lanes.append(self.lane)
        self._stream_lanes()
        self.outbox = self._make_outbox()
        self.upkeep = self._make_upkeep()
        self.refill = self._make_refill()
        self._adopting = self._make_adopting()
        self.drainer.every(TEND_S, self._tend, first_s=TEND_S, opens=False)

    # -- wiring --

    def _make_spool(self) -> spool.Spool:
        settings = self._settings
        return spool.Spool(
            self.directory if settings.spool and settings.audit_dsn else None,
            service=settings.service_id,
            node=settings.node_id,
            store=settings.audit_dsn.fingerprint if settings.audit_dsn else "",
            max_bytes=settings.spool_max_bytes,
            capacity=settings.queue_capacity,
            durability=settings.durability,
        )

    def _audit_lane(self) -> Lane:
        dsn = self._settings.audit_dsn
        if dsn is None:
            return Lane("audit", self.spool, self._deliver_nowhere, _no_problem)
        return Lane(
            "audit",
            self.spool,
            self._deliver_audit,
            self._classify(dsn),
            settled=self._arrived,
            set_aside=self._set_aside,
            deliver_ticket=self._deliver_ticket,
        )

    def _stream_lanes(self) -> None:
        dsns = {"sys": self._settings.sys_dsn, "api": self._settings.api_dsn}
        for name, dsn in dsns.items():
            if dsn is None:
                continue
            queue = self.queues[name] = BoundedQueue(self._settings.queue_capacity)
            drainer = self._drainer_for(dsn)
            drainer.lanes.append(
                Lane(name, queue, self._deliverer(name), self._classify(dsn))
            )
            interval_s = self._settings.retention_sweep_interval
            self._sweeps[name] = drainer.every(
                interval_s,
                partial(self._expire, name, dsn, drainer),
                first_s=min(interval_s, SWEEP_FIRST_S),
            )

    def _make_outbox(self) -> Outbox | None:
        """
        Wire what takes rows into callers' transactions and moves them on from there.
        """
        settings, dsn = self._settings, self._outbox_dsn
        if dsn is None:
            return None
        sign = self.directory / f"outbox-{dsn.fingerprint[:16]}.mover"
        drainer = self._drainer_for(dsn)
        mover = Mover(
            self._outbox_store,
            Sign(sign if settings.spool else None),
            drainer,
            classify=self._classify_outbox,
            aside=self._set_aside_moved,
        )
        drainer.lanes.append(
            Lane(
                "outbox",
                mover,
                mover.deliver,
                self._classify_outbox,
                settled=self._arrived,
            )
        )
        return Outbox(
            self._outbox_store,
            mover,
            service=settings.service_id,
            node=settings.node_id,
        )

    def _make_upkeep(self) -> Upkeep | None:
        """
        Wire what looks after the evidence in the store, if there is one.
        """
        if not self.has_store:
            return None
        return Upkeep(
            self._host,
            self.drainer,
            self.lane,
            journal=self.spool,
            directory=self.directory,
            repository=lambda: self.audit,
            writer=lambda: self.writer,
            now_us=self._now_us,
        )

    def _make_refill(self) -> Refill:
        return Refill(
            self.drainer,
            self.lane,
            self.spool,
            self.directory,
            repository=lambda: self.audit,
            writer=lambda: self.writer,
            shown=self._arrived,
            revive=self._revive,
            place=(self._settings.service_id, self._fingerprint),
        )

    def _make_adopting(self) -> Chore | None:
        if not self.has_store:
            return None
        return self.drainer.every(ADOPT_S, self.adopt)

    @property
    def _outbox_dsn(self) -> Dsn | None:
        """
        Return where callers' transactions are, if there is a store to move rows to.
        """
        settings = self._settings
        return settings.audit_dsn and (settings.outbox_dsn or settings.audit_dsn)

    def _classify_outbox(self, error: BaseException) -> Fault:
        return Fault(*self._outbox_store().problem(error))

    def _deliverer(self, name: str) -> Callable[[Batch], None]:
        def deliver(batch: Batch) -> None:
            self.stream_store(name).append([row for _, row in batch.rows])

        return deliver

    def _drainer_for(self, dsn: Dsn | None) -> Drainer:
        key = _server(dsn) if dsn else ""
        if key not in self._drainers:
            self._drainers[key] = self._make_drainer(key)
        return self._drainers[key]

    def _make_drainer(self, key: str) -> Drainer:
        if not key:
            return Drainer([], name="fasten-drain-audit", suppress=suppressed)
        provide = self.spool.provide
        return Drainer(
            [],
            name="fasten-drain-audit",
            watchdog=Watchdog(lambda: self._abort(key), WATCHDOG_S, provide),
            ticket_s=TICKET_S,
            suppress=suppressed,
            begin=self._load,
            turn=provide,
            breathe=self._breathe,
            idle=lambda: self._release(key),
            idle_s=IDLE_S,
        )

    def _classify(self, dsn: Dsn) -> Callable[[BaseException], Fault]:
        return lambda error: Fault(*self._database(dsn).problem(error))

    def _abort(self, key: str) -> None:
        for database in self._databases_of(key):
            database.abort()

    def _release(self, key: str) -> None:
        for database in self._databases_of(key):
            database.release()

    def _databases_of(self, key: str) -> list[Database]:
        """
        Return what the drainer of a server works with: the server, and its guests.
        """
        known = self._databases.items()
        return [found for name, found in known if name.partition(_BESIDE)[0] == key]

    # -- stores: opened, and SQLAlchemy loaded, at their first use --

    @property
    def has_store(self) -> bool:
        """
        Tell whether audit rows have somewhere to go.
        """
        return self._settings.audit_dsn is not None

    @property
    def audit(self) -> AuditRepository:
        """
        Return the audit store.
        """
        return self._repository("audit")  # type: ignore[no-any-return]

    def stream_store(self, name: str) -> StreamRepository:
        """
        Return the durable store of `sys` or `api`.
        """
        return self._repository(name)  # type: ignore[no-any-return]

    def _load(self) -> None:
        """
        Load SQLAlchemy and the drivers, in whichever thread is the first to need them.

        No fork falls into it: a child inherits the lock of a module that is half
        loaded, and nobody who lets go of it; its own import would wait for ever.
        """
        if self._is_loaded:
            return
        settings = self._settings
        with self._loading:
            for dsn in (settings.audit_dsn, settings.sys_dsn, settings.api_dsn):
                if dsn is not None:
                    self._database(dsn).load()
            with suppress(MissingExtra):  # told by who wants to sign
                signers_of(settings)
            self._is_loaded = True

    def _repository(self, name: str) -> Any:
        known = self._repositories.get(name)
        if known is not None:
            return known
        self._load()
        from fasten.repository import AuditRepository, StreamRepository

        dsn = getattr(self._settings, f"{name}_dsn")
        database = self._database(dsn)
        with self._opening:
            if name not in self._repositories:
                self._repositories[name] = (
                    AuditRepository(
                        dsn,
                        database,
                        author=Author(tenant_id=self._settings.tenant_id),
                    )
                    if name == "audit"
                    else StreamRepository(dsn, name, database)  # type: ignore[arg-type]
                )
            return self._repositories[name]

    def _database(self, dsn: Dsn) -> Database:
        from fasten.repository import Database

        with self._opening:
            return self._databases.setdefault(_server(dsn), Database(dsn))

    def _outbox_store(self) -> OutboxRepository:
        """
        Return the outbox; on a server of its own it has its own way to the audit store.
        """
        known: OutboxRepository | None = self._repositories.get("outbox")
        dsn, audit_dsn = self._outbox_dsn, self._settings.audit_dsn
        if known is not None or dsn is None or audit_dsn is None:
            return known  # type: ignore[return-value]  # there is one where it is asked
        from fasten.repository import AuditRepository, Database, OutboxRepository

        audit = self.audit
        key, there = _server(dsn), _server(audit_dsn)
        with self._opening:
            if key == there:
                database = self._databases[key]
            else:
                database = self._databases.setdefault(key, Database(dsn, is_guest=True))
                # A drainer's connections are its own: the audit store's is another's.
                twin = self._databases.setdefault(
                    f"{key}{_BESIDE}{there}", Database(audit_dsn)
                )
                audit = AuditRepository(audit_dsn, twin)
            made = OutboxRepository(dsn, database, audit)
            return self._repositories.setdefault("outbox", made)  # type: ignore[no-any-return]

    @property
    def writer(self) -> Writer:
        """
        Return who this process is to the store.
        """
        from fasten.repository import Writer

        settings = self._settings
        return Writer(self.spool.writer_id, settings.service_id, settings.node_id)

    def start(self) -> None:
        """
        Start at once where a dead process left rows, or somebody has to sign.
        """
        is_due = spool.has_foreign(self.directory) or self._settings.signing_key
        if self.has_store and is_due:
            self.drainer.start()
        if self.outbox is not None and self.outbox.mover.sign.is_put:
            self._drainer_for(self._outbox_dsn).start()

    # -- delivering: in the drainer's thread --

    def _deliver_audit(self, batch: Batch) -> list[tuple[Any, ...]]:
        stored = self._append(self.writer, batch, self.lane, self.spool)
        self.spool.maintain()
        return stored

    def _append(
        self, writer: Writer, batch: Batch, lane: Lane, journal: Journal
    ) -> list[tuple[Any, ...]]:
        """
        Store a batch, and the rows that say what it is missing.
        """
        reports = self.losses.reports(writer.id, batch)
        rows = sorted([*batch.rows, *reports], key=_index) if reports else batch.rows
        stored = self._store(writer, rows, batch, lane, journal)
        self.losses.found(batch, reports, stored)
        if lane.again is not None:
            self._replayed += len(stored)
        return stored

    def _store(
        self,
        writer: Writer,
        rows: Sequence[tuple[int, Any]],
        batch: Batch,
        lane: Lane,
        journal: Journal,
        keep: Callable[[], None] = lambda: None,
    ) -> list[tuple[Any, ...]]:
        """
        Store *rows*, which settle *batch*; *keep* what has to outlive the commit.

        Raises:
            Rewound: the store does not know any more what it had.
        """
        from fasten.repository import StoreWentBack

        def before_commit() -> None:
            keep()
            self.refill.keep(writer, journal)

        try:
            return self.audit.append(
                writer,
                rows,
                batch.last,
                reached=lane.reached,
                pause=self._between_pieces,
                before_commit=before_commit,
            )
        except StoreWentBack as error:
            raise self.refill.back(writer, journal, error) from None

    def _deliver_ticket(self, rows: Sequence[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
        from fasten.repository import StoreWentBack

        numbered = [(0, row) for row in rows]
        try:
            return self.audit.append(self.writer, numbered, 0)
        except StoreWentBack:
            self.refill.record(self.writer)
            return self.audit.append(self.writer, numbered, 0)

    def _deliver_nowhere(self, batch: Batch) -> None:
        """
        Show what has no store to go to.
        """
        rows = [unsealed(row, self._settings) for _, row in batch.rows]
        self._host.stored(rows, is_sealed=False)

    def _arrived(self, rows: list[tuple[Any, ...]]) -> None:
        self._host.stored(rows, is_sealed=True)

    def _between_pieces(self) -> None:
        self.spool.provide()
        if self.audit.database.is_postgres:  # SQLite works without the interpreter
            self._breathe()

    def _breathe(self) -> None:
        # A tight loop here delays other threads' wake-ups by milliseconds; when rows
        # pile up, delivering them comes first.
        if self.spool.depth * 2 < self._settings.queue_capacity:
            time.sleep(PAUSE_S)

    def _set_aside(self, batch: Batch, fault: Fault) -> list[tuple[Any, ...]]:
        return self._append_record(self.writer, self.lane, self.spool, batch, fault)

    def _append_record(
        self,
        writer: Writer,
        lane: Lane,
        journal: Journal,
        batch: Batch,
        fault: Fault,
    ) -> list[tuple[Any, ...]]:
        """
        Keep the one row of *batch* in a file; store a record in its place.

        The file is written when the record is in, and before it is committed: a store
        that refuses records, too, has nothing against the row.
        """
        self._last_error = fault.message
        (found,) = batch.rows
        index, row = found
        detail = {"id": row[0], "code": row[2], "reason": fault.message}
        record = self._host.own_row("AUDIT_ROW_QUARANTINED", str(row[0]), detail)
        reports = self.losses.reports(writer.id, batch)
        rows = sorted([*reports, (index, record)], key=_index)
        keep = partial(self._keep, writer, found, fault.message)
        stored = self._store(writer, rows, batch, lane, journal, keep)
        self.losses.found(batch, reports, stored)
        return stored

    def _keep(self, writer: Writer, row: tuple[int, Any], reason: str) -> None:
        """
        Keep a row that the store refuses in a file.

        Raises:
            SchemaProblem: it cannot be written down, so it has to stay where it is.
        """
        from fasten.repository import SchemaProblem

        if not spool.quarantine(
            self.directory,
            writer.id,
            row,
            reason,
            service=writer.service,
            node=writer.node,
        ):
            raise SchemaProblem(
                f"row {row[1][0]} cannot be stored ({reason}), nor kept in "
                f"{self.directory}; let this user write there"
            )

    def _set_aside_moved(self, row: tuple[Any, ...], reason: str) -> None:
        """
        Put a row of the outbox aside, which then is deleted there.

        Raises:
            SchemaProblem: it cannot be written down, so it has to stay.
        """
        self._keep(self.writer, (0, row), reason)
        self._last_error = reason
        self._set_aside_count += 1
        self._host.emit_own(
            "AUDIT_ROW_QUARANTINED",
            str(row[0]),
            {"id": row[0], "code": row[2], "reason": reason},
        )

    # -- dead writers --

    def adopt_soon(self) -> None:
        """
        Look for journals of dead processes now, in the drainer's thread.
        """
        if self._adopting is not None:
            self._adopting.due = 0.0
            self.drainer.wake()

    def adopt(self, *, of_any_store: bool = False) -> None:
        """
        Take over the journals of processes of this service that are gone.

        *of_any_store* takes also what was meant for another store.
        """
        self._retire_adopted()
        kept: list[spool.Orphan] | None = None if of_any_store else []
        for orphan in spool.adopt(
            self.directory,
            service=self._settings.service_id,
            store=None if of_any_store else self._fingerprint,
            now=time.time,
            kept=kept,
            most=max(0, ADOPT_MOST - len(self.adopted)),
        ):
            self._revive(orphan, orphan.acked)
        if len(self.adopted) >= ADOPT_MOST and self._adopting is not None:
            self._adopting.due = time.monotonic() + TEND_S  # there may be more
        if kept is not None:
            self.refill.look(kept)

    @property
    def adopted(self) -> list[tuple[spool.Orphan, Lane]]:
        """
        Return the journals that were taken over, and what delivers them.
        """
        return [
            (lane.source.orphan, lane)
            for lane in self.drainer.lanes
            if isinstance(lane.source, _OrphanSource)
        ]

    @property
    def _fingerprint(self) -> str:
        dsn = self._settings.audit_dsn
        return dsn.fingerprint if dsn else ""

    def _revive(self, orphan: spool.Orphan, after: int) -> None:
        """
        Deliver what a dead process's journal has above *after*.
        """
        from fasten.repository import Writer

        writer = Writer(orphan.writer_id, orphan.service, orphan.node)
        source = _OrphanSource(orphan, after)

        def deliver(batch: Batch) -> list[tuple[Any, ...]]:
            stored = self._append(writer, batch, lane, source)
            self._replayed += len(stored) * (lane.again is None)
            return stored

        def set_aside(batch: Batch, fault: Fault) -> list[tuple[Any, ...]]:
            return self._append_record(writer, lane, source, batch, fault)

        lane = Lane(
            f"audit replay {orphan.writer_id[:8]}",
            source,
            deliver,
            self._classify(self.audit.dsn),
            settled=self._arrived,
            set_aside=set_aside,
            reached=after,
        )
        self.drainer.lanes.append(lane)

    def _retire_adopted(self) -> None:
        for lane in list(self.drainer.lanes):
            source = lane.source
            if isinstance(source, _OrphanSource) and not lane.has_work:
                source.release()
                self.drainer.lanes.remove(lane)

    # -- the end of api and sys rows --

    def _expire(self, name: str, dsn: Dsn, drainer: Drainer) -> None:
        """
        Delete one batch of this service's rows; the next one behind what is waiting.
        """
        if dsn.path is not None and not Path(dsn.path).exists():
            return
        from fasten.repository import SWEEP_ROWS

        settings = self._settings
        days: int = getattr(settings, f"{name}_retention_days")
        before_us = self._now_us() - days * 86_400_000_000
        try:
            with drainer.guard():
                gone = self.stream_store(name).sweep(
                    before_us, SWEEP_ROWS, settings.service_id
                )
        except Exception as error:  # the store's: told once, tried again later
            self._tell_unswept(name, dsn, error)
            return
        self._unswept.pop(name, None)
        if gone == SWEEP_ROWS:
            self._sweeps[name].due = 0.0

    def _now_us(self) -> int:
        """
        Return the time, which a clock that was set ahead may not hurry on.
        """
        wall_s, steady_s = self._began
        since_s = time.monotonic() - steady_s
        return int(min(time.time(), wall_s + since_s + CLOCK_SLACK_S) * 1_000_000)

    def _tell_unswept(self, name: str, dsn: Dsn, error: Exception) -> None:
        from fasten.repository import is_missing

        message = self._database(dsn).problem(error).message
        if not is_missing(error) and self._unswept.get(name) != message:
            self._unswept[name] = message
            logger.warning("fasten %s: old rows cannot be deleted: %s", name, message)

    # -- upkeep --

    def _tend(self) -> None:
        """
        Look after the files, also while nothing is delivered, and after the drops.
        """
        if self.has_store:
            self.spool.maintain()
            self._tell_spool()
        self.losses.tell()

    def _tell_spool(self) -> None:
        """
        Log what is wrong with the journal, once, and that it is well again.
        """
        fault = self.spool.fault if self._settings.spool else ""
        if fault == self._spool_fault:
            return
        self._spool_fault = fault
        logger.warning("fasten audit: %s", fault or "the spool is in order again")

    # -- callers' threads --

    def wake_streams(self) -> None:
        """
        Let the drainers of durable sys and api streams look.
        """
        for drainer in self._drainers.values():
            is_resting = drainer.is_asleep or not drainer.is_running
            if is_resting and any(queue.depth for queue in self.queues.values()):
                drainer.wake()

    def store_now(self, row: tuple[Any, ...]) -> Fault | None:
        """
        Wait for the store's answer to one row; None when it is stored.
        """
        if self.drainer.is_this_thread:
            why = "emit was called by fasten's own thread, which cannot wait for itself"
            return Fault("transient", why)
        ticket = Ticket(row)
        self.drainer.submit(self.lane, ticket)
        if ticket.wait(TICKET_S):
            return ticket.fault
        if ticket.withdraw():
            known = self.lane.fault
            why = known.message if known else f"no answer in {TICKET_S:.0f} s"
            return Fault("transient", why)
        # It is in a transaction now: only the store knows.
        if ticket.wait(WATCHDOG_S):
            return ticket.fault
        return Fault("transient", "the store did not answer", is_ambiguous=True)

    def flush(self, timeout_s: float) -> bool:
        """
        Wait until what was queued before the call is stored.
        """
        deadline = time.monotonic() + timeout_s
        self._ask_outbox()
        targets = [
            (drainer, lane, lane.source.last_index)
            for drainer in self._drainers.values()
            for lane in tuple(drainer.lanes)
            if not isinstance(lane.source, _OrphanSource)
        ]
        for drainer, lane, target in targets:
            lane.retry_at = 0.0
            left = deadline - time.monotonic()
            if not drainer.wait_for(partial(_has_reached, lane, target), left):
                return False
        return True

    def _ask_outbox(self) -> None:
        if self.outbox is not None and self.outbox.mover.is_used:
            self.outbox.mover.hurry()

    def close(self, timeout_s: float) -> bool:
        """
        Stop all drainers within *timeout_s*; true when everything is stored.
        """
        deadline = time.monotonic() + timeout_s
        self._ask_outbox()
        self.losses.last_word()
        done = True
        for key, drainer in self._drainers.items():
            left = max(0.05, (deadline - time.monotonic()) * 0.75)
            done = drainer.close(left) and done
            if not drainer.is_running:
                self._release(key)
        if self.outbox is not None:
            self.outbox.mover.sign.let_go()
        if not self.drainer.is_running:
            for orphan, _ in self.adopted:
                orphan.release()
            if self.has_store and self.lane.reached:
                self.refill.keep(self.writer, self.spool)
            self.spool.close()
        return done

    def before_fork(self) -> None:
        """
        Keep SQLite's locks out of the child; a store that hangs is not waited for.
        """
        self._is_load_kept = self._loading.acquire(timeout=LOAD_S)
        deadline = time.monotonic() + FORK_S
        for drainer in self._of_files():
            drainer.before_fork(max(0.0, deadline - time.monotonic()))

    def after_fork_in_parent(self) -> None:
        """
        Go on.
        """
        is_kept, self._is_load_kept = self._is_load_kept, False
        if is_kept:
            self._loading.release()
        for drainer in self._of_files():
            drainer.after_fork_in_parent()

    def _of_files(self) -> list[Drainer]:
        known = self._drainers.items()
        return [drainer for key, drainer in known if key.startswith("/")]

    def after_fork_in_child(self) -> None:
        """
        Leave the parent's rows, files and connections to the parent.
        """
        self._opening = threading.Lock()
        self._loading = threading.Lock()
        self._is_load_kept = False
        self.spool.after_fork_in_child()
        self.losses.after_fork_in_child()
        self._first_index = self.spool.last_index
        self._replayed = self._set_aside_count = 0
        self._spool_fault = ""
        if self.outbox is not None:
            self.outbox.after_fork_in_child()
        if self.upkeep is not None:
            self.upkeep.after_fork_in_child()
        self.refill.after_fork_in_child()
        for queue in self.queues.values():
            queue.clear()
        for database in self._databases.values():
            database.after_fork_in_child()
        for drainer in self._drainers.values():
            for lane in tuple(drainer.lanes):
                if isinstance(lane.source, _OrphanSource):
                    lane.source.after_fork_in_child()
                    drainer.lanes.remove(lane)
            drainer.after_fork_in_child()

    # -- reading --

    def read(self, ask: Callable[[], Page], stream: str) -> Page:
        """
        Ask a store; say so when rows are still on their way to it.

        Raises:
            AuditStoreError: the store cannot be read now.
        """
        try:
            # What the driver logs of it must not become lines of the stream it reads.
            with suppressed():
                page = ask()
        except InvalidQuery:
            raise
        except Exception as error:  # the driver's: told without its DSN
            if self._is_unborn(error):
                return Page(rows=[], completeness="store-degraded")
            problem = self._database(getattr(self._settings, f"{stream}_dsn")).problem(
                error
            )
            raise AuditStoreError(
                f"the {stream} store cannot be read: {problem.message}"
            ) from None
        if any(
            lane.fault for drainer in self._drainers.values() for lane in drainer.lanes
        ):
            return attrs.evolve(page, completeness="store-degraded")
        return page

    def _is_unborn(self, error: BaseException) -> bool:
        """
        Tell whether the store is missing because nothing was stored in it yet.
        """
        from fasten.repository import is_missing

        return is_missing(error) and not self.lane.delivered

    # -- telling --

    def stats(self) -> dict[str, Any]:
        """
        Return the counters of the audit stream.
        """
        lanes = [lane for drainer in self._drainers.values() for lane in drainer.lanes]
        fault = self.lane.fault
        return {
            "emitted": self.spool.last_index - self._first_index + self.losses.unqueued,
            "stored": self.lane.delivered,
            "retried": sum(lane.retried for lane in lanes),
            "spooled": self.spool.spooled,
            "replayed": self._replayed,
            "quarantined": sum(lane.quarantined for lane in lanes)
            + self._set_aside_count,
            "moved": self.outbox.mover.moved if self.outbox else 0,
            "dropped": self.losses.dropped,
            "depth": self.spool.depth,
            "capacity": self.spool.capacity,
            "high_water": self.spool.high_water,
            "last_error": fault.message if fault else self._last_error,
            "oldest_undelivered_s": self.spool.oldest_s(),
        }

    def health(self) -> dict[str, Any]:
        """
        Say whether rows are being delivered, and if not, why.
        """
        reasons = [
            f"{lane.name}: {why}"
            for drainer in self._drainers.values()
            for lane in tuple(drainer.lanes)
            if (why := _trouble(drainer, lane))
        ]
        if self.losses.is_recent:
            reasons.append(
                f"audit: no room in spool and queue, {self.losses.unqueued} rows "
                "dropped so far"
            )
        return {
            "state": self._state(reasons),
            "reasons": reasons,
            "spool": self.spool.mode,
            **self.stats(),
        }

    def _state(self, reasons: list[str]) -> str:
        if self.losses.is_recent:
            return "failing"
        if not reasons:
            return "ok"
        if self.spool.mode == "memory":
            return "failing"
        fault = self.lane.fault
        return "degraded" if fault is None or fault.kind == "setup" else "spool_only"


def _trouble(drainer: Drainer, lane: Lane) -> str:
    """
    Say what keeps a lane from delivering; empty if nothing does.
    """
    if lane.fault is not None:
        return lane.fault.message
    busy_since = drainer.busy_since
    busy_s = 0.0 if busy_since is None else time.monotonic() - busy_since
    return f"the store has not answered for {busy_s:.0f} s" if busy_s > _HUNG_S else ""


def _index(row: tuple[int, Any]) -> int:
    return row[0]


_HUNG_S: Final = 10.0


class _OrphanSource:
    """
    A dead writer's journal as a lane's source.
    """

    def __init__(self, orphan: spool.Orphan, after: int) -> None:
        self.orphan = orphan
        self._after = after
        self._batches: Any = None
        self._is_read = False
        self._taken = 0
        self.acked = 0
        self.last_index = 0

    @property
    def depth(self) -> int:
        """
        Return 1 until the journal's end was met and delivered.
        """
        return 0 if self._is_read and self.acked >= self._taken else 1

    def take(self, limit: int) -> Batch | None:
        """
        Return the next batch of the journal, or None at its end.
        """
        if self._batches is None:
            self._batches = self.orphan.batches(self._after, limit)
        batch: Batch | None = next(self._batches, None)
        if batch is None:
            self._is_read = True
            self.orphan.done()
        else:
            self._taken = batch.last
        return batch

    def ack(self, index: int) -> None:
        """
        Note that the batch is delivered.
        """
        self.acked = max(self.acked, index)
        self.orphan.ack(index)

    def remember(self, memory: bytes) -> None:
        """
        Keep with the journal what is known of the store.
        """
        self.orphan.remember(memory)

    def replay(self, after: int, limit: int) -> Iterator[Batch]:
        """
        Read again what was delivered above *after*.
        """
        end = self.orphan.acked
        for batch in self.orphan.batches(after, limit):
            rows = [row for row in batch.rows if row[0] <= end]
            if rows:
                yield Rows(rows, min(batch.last, end), [])

    def release(self) -> None:
        """
        Let go of a journal that is delivered.
        """
        self.orphan.release()

    def after_fork_in_child(self) -> None:
        """
        Leave the journal to the parent: to hold its lock would keep it from others.
        """
        self.orphan.after_fork_in_child()


def spool_directory(settings: Settings) -> Path:
    """
    Return where the journals of a service stand.

    Beside the SQLite file; for Postgres below the XDG state directory.
    """
    if settings.spool_dir is not None:
        return Path(settings.spool_dir)
    dsn = settings.audit_dsn
    if dsn is not None and dsn.path is not None:
        return Path(f"{dsn.path}.spool")
    state = os.environ.get("XDG_STATE_HOME")
    base = Path(state) if state else Path("~/.local/state").expanduser()
    return base / "fasten" / settings.service_id


def _has_reached(lane: Lane, index: int) -> bool:
    return lane.source.acked >= index


def _server(dsn: Dsn) -> str:
    """
    Name what streams may share: one file, or one login on one server.
    """
    if dsn.path is not None:
        return dsn.path
    return sha256(dsn.conninfo().encode()).hexdigest()


def _no_problem(error: BaseException) -> Fault:
    return Fault("transient", f"{type(error).__name__} while printing")


def unsealed(row: Sequence[Any], settings: Settings) -> tuple[Any, ...]:
    """
    Lay a row out in columns where nothing numbers and seals it.
    """
    values = Pending(*row)._asdict()
    values["timestamp"] = format_timestamp(values.pop("timestamp_us"))
    values |= {
        "wire_version": WIRE_VERSION,
        "origin_id": values["id"],
        "service_id": settings.service_id,
        "source_node_id": settings.node_id,
    }
    return tuple(values.get(name) for name in AUDIT_COLUMNS)
