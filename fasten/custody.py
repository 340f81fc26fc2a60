# SPDX-License-Identifier: Apache-2.0
"""
What an operator does to a store by hand: sweep, erase, hold, sign.

The library form of the CLI's commands; each works on connections of its own, beside
whatever engine is running. What a service does by itself is in `upkeep`.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import attrs

from fasten import spool
from fasten.chain import COMMITTED_FIELDS
from fasten.delivery import spool_directory
from fasten.engine import Engine, default
from fasten.errors import AuditStoreError, FastenError, InvalidAnchor
from fasten.records import FASTEN, Author
from fasten.retention import RetentionPolicy
from fasten.rows import Query, format_timestamp, parse_timestamp
from fasten.settings import Dsn, Settings
from fasten.streams import json_line
from fasten.upkeep import scrub_quarantine, signers_of

if TYPE_CHECKING:
    from fasten.repository import AuditRepository, OutboxRepository, Writer
    from fasten.repository.anchoring import Anchor
    from fasten.repository.erasing import Erased, Eraser, Lagging
    from fasten.repository.erasures import Erasure
    from fasten.repository.holds import Hold
    from fasten.repository.pruning import Sweep, Sweeper

__all__ = ["Custody", "Erasing", "erase", "sweep"]

FOLLOW_S: Final = 35.0
"""How long an erasure waits for the writers that hold files."""

BUSY_S: Final = 20.0
"""How long a sweep waits for another one: a killed one is in the way for 15 s."""

_POLL_S: Final = 0.2
Progress = Callable[[int, int], None]


def sweep(now: datetime | str | float | None = None) -> Sweep:
    """
    Delete what has expired in the stores of `init()`; return what went.

    *now* is a time to sweep as of (text, datetime, or seconds since 1970), for which
    the caller answers; True lets shorter periods hold at once.

    Raises:
        NotInitialized: `init()` was not called.
        AuditStoreError: the store cannot be reached now.
        FastenError: the store refuses, or another process is sweeping.
    """
    engine = default()
    with Custody(engine.settings, clock_us=engine.now_us).opened() as custody:
        given = None if now is None or now is True else _microseconds(now)
        done = custody.sweep(now_us=given, is_forced=now is True)
        engine.stored(done.stored, is_sealed=True)
        engine.checkpointed(done.notes)
    return done


def _microseconds(now: datetime | str | float) -> int:
    if isinstance(now, datetime):
        moment = now if now.tzinfo else now.replace(tzinfo=UTC)
        return (moment - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)
    if isinstance(now, str):
        return parse_timestamp(now)
    return round(now * 1_000_000)


def erase(
    *,
    actor: str | None = None,
    target: str | None = None,
    id: str | None = None,
    reason: str,
    fields: Iterable[str] = (),
    dry_run: bool = False,
    ledger: str | Path | None = None,
    timeout: float = FOLLOW_S,
) -> Erasing:
    """
    Erase *fields* of an actor's, a target's, or one row; the chain stays valid.

    By default the field asked for and the detail go; of a row, all six that can.
    Waits up to *timeout* seconds for other writers to remove their files; look at
    `is_complete`. A *ledger* file takes what can be applied again after a restore.

    Raises:
        NotInitialized: `init()` was not called.
        AuditStoreError: the store cannot be reached now.
        InvalidAnchor: not exactly one subject is given, or a field cannot be erased.
        FastenError: the store refuses, or a legal hold does.
    """
    engine = default()
    engine.flush(min(5.0, timeout))
    with Custody(engine.settings, clock_us=engine.now_us).opened() as custody:
        done = custody.erase(
            _subject(actor=actor, target=target, id=id),
            reason,
            fields=fields,
            is_dry=dry_run,
            ledger=None if ledger is None else Path(ledger),
            timeout_s=timeout,
            engine=engine,
        )
        engine.stored(done.stored, is_sealed=True)
        engine.checkpointed(done.notes)
    return done


def _subject(**given: str | None) -> tuple[str, str]:
    named = [(field, str(value)) for field, value in given.items() if value]
    if len(named) != 1:
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


class Custody:
    """
    An operator's hands on the stores of *settings*.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        dsn: Dsn | None = None,
        author: Author = FASTEN,
        clock_us: Callable[[], int] = lambda: time.time_ns() // 1000,
    ) -> None:
        self.settings = settings
        self.dsn = dsn or settings.audit_dsn
        self._author = attrs.evolve(author, tenant_id=settings.tenant_id)
        self._clock_us = clock_us
        self._known: AuditRepository | None = None
        self._writer_id = os.urandom(16).hex()

    @contextmanager
    def opened(self) -> Iterator[Custody]:
        """
        Use it in a with-block: what a driver raises is told without its DSN.

        Raises:
            AuditStoreError: the store cannot be reached now.
            FastenError: it refuses; says the cure.
        """
        from fasten.repository.pruning import SweepIsBusy

        try:
            yield self
        except FastenError:
            raise
        except SweepIsBusy as error:
            raise FastenError(str(error)) from None
        except OSError:
            raise
        except Exception as error:  # the driver's
            raise self._told(error) from None
        finally:
            if self._known is not None:
                self._known.database.release()

    def _told(self, error: Exception) -> FastenError:
        from fasten.repository import is_missing

        place = self.dsn.display if self.dsn else "the store"
        if is_missing(error):
            return AuditStoreError(f"there is nothing at {place} yet")
        problem = self.repository.database.problem(error)
        if problem.kind == "setup" and not _is_unreachable(problem.message):
            return FastenError(f"{place}: {problem.message}")
        return AuditStoreError(f"the store {place} cannot be used: {problem.message}")

    @property
    def repository(self) -> AuditRepository:
        """
        Return the audit store.

        Raises:
            AuditStoreError: there is none.
        """
        from fasten.repository import AuditRepository

        if self.dsn is None:
            raise AuditStoreError("there is no audit store; set FASTEN_AUDIT_DSN")
        if self._known is None:
            self._known = AuditRepository(self.dsn, author=self._author)
        return self._known

    @property
    def writer(self) -> Writer:
        """
        Return in whose chain the records are written.
        """
        from fasten.repository import Writer

        settings = self.settings
        return Writer(self._writer_id, settings.service_id, settings.node_id)

    def require(self) -> None:
        """
        Make sure that there is a store: an operator's slip must not create one.

        Raises:
            AuditStoreError: there is none.
        """
        path = self.repository.dsn.path
        if path is not None and not Path(path).exists():
            raise AuditStoreError(f"there is no store at {path} yet")

    # -- sweeping --

    def sweep(
        self,
        *,
        now_us: int | None = None,
        is_forced: bool = False,
        is_dry: bool = False,
        progress: Progress = lambda _done, _total: None,
    ) -> Sweep:
        """
        Delete what has expired of all three streams; or count it.

        Raises:
            Exception: see `opened`.
        """
        from fasten.repository.pruning import Order, Sweep, Sweeper

        settings = self.settings
        at_us = self._clock_us() if now_us is None else now_us
        streams = self._sweep_streams(at_us, is_dry=is_dry)
        if self.dsn is None:
            return Sweep(is_dry=is_dry, streams=streams)
        self.require()
        order = Order(
            wanted=RetentionPolicy.from_settings(settings),
            now_us=at_us,
            interval_s=settings.retention_sweep_interval,
            is_time_given=now_us is not None,
            is_forced=is_forced,
            is_dry=is_dry,
            is_explicit=True,
            streams=streams,
        )
        sweeper = Sweeper(self.repository, self.writer, order, anchor=self._anchor())
        self._exhaust(sweeper, progress)
        return sweeper.done

    @staticmethod
    def _exhaust(sweeper: Sweeper, progress: Progress) -> None:
        from fasten.repository.pruning import SweepIsBusy

        until = time.monotonic() + BUSY_S
        while True:
            try:
                for _ in sweeper.run():
                    progress(sweeper.cut, sweeper.done.deleted)
            except SweepIsBusy:
                # A sweep that was killed keeps others out for a moment.
                if sweeper.has_begun or time.monotonic() > until:
                    raise
                time.sleep(_POLL_S)
            else:
                return

    def _sweep_streams(self, now_us: int, *, is_dry: bool) -> dict[str, int]:
        settings = self.settings
        kept = {
            "sys": (settings.sys_dsn, settings.sys_retention_days),
            "api": (settings.api_dsn, settings.api_retention_days),
        }
        return {
            name: self._sweep_stream(
                name, dsn, now_us - days * 86_400_000_000, is_dry=is_dry
            )
            for name, (dsn, days) in kept.items()
            if dsn is not None
        }

    def _sweep_stream(
        self, name: str, dsn: Dsn, before_us: int, *, is_dry: bool
    ) -> int:
        from fasten.repository import Database, StreamRepository, is_missing
        from fasten.repository.pruning import SWEEP_ROWS

        if dsn.path is not None and not Path(dsn.path).exists():
            return 0
        database = Database(dsn)
        store = StreamRepository(dsn, name, database)  # type: ignore[arg-type]
        service = self.settings.service_id
        try:
            if is_dry:
                page = store.query(_expired(name, service, before_us))
                return page.total or 0
            gone = deleted = store.sweep(before_us, SWEEP_ROWS, service)
            while gone == SWEEP_ROWS:
                gone = store.sweep(before_us, SWEEP_ROWS, service)
                deleted += gone
        except Exception as error:  # the driver's: told by `opened`
            if is_missing(error):
                return 0
            raise
        else:
            return deleted
        finally:
            database.release()

    # -- checkpoints --

    def _anchor(self) -> Anchor | None:
        from fasten.repository.anchoring import Anchor

        signers = signers_of(self.settings)
        if not signers:
            return None
        return Anchor(self.repository, self.settings.service_id, signers)

    def checkpoint(self) -> list[str]:
        """
        Sign what has changed, and return a note of each chain of the service.

        Raises:
            FastenError: there is no key.
            Exception: see `opened`.
        """
        self.require()
        anchor = self._anchor()
        if anchor is None:
            raise FastenError(
                "FASTEN_SIGNING_KEY is not set; `fasten keygen` makes a key"
            )
        for _ in anchor.run():
            pass
        return anchor.newest()

    # -- holds --

    def holds(self) -> list[Hold]:
        """
        Return the legal holds that are in force.

        Raises:
            Exception: see `opened`.
        """
        self.require()
        with self.repository.database.reading() as connection:
            return self.repository.holds.active(connection)

    def hold(self, field: str, value: str, reason: str) -> Hold:
        """
        Put a legal hold: rows whose *field* is *value* stay as they are.

        Raises:
            Exception: see `opened`.
        """
        from fasten.repository.holds import Hold

        self.require()
        self.repository.schema.ensure()
        hold = Hold(
            id=os.urandom(4).hex(),
            field=field,
            value=value,
            reason=reason,
            by=self._author.actor,
            at=format_timestamp(self._clock_us()),
        )
        self._store_hold(hold, "added")
        return hold

    def lift(self, id: str) -> Hold:
        """
        Lift a legal hold.

        Raises:
            FastenError: there is none of this id.
            Exception: see `opened`.
        """
        found = next((hold for hold in self.holds() if hold.id == id), None)
        if found is None:
            raise FastenError(f"there is no hold {id!r}; `fasten hold list` names them")
        lifted = attrs.evolve(found, lifted_at=format_timestamp(self._clock_us()))
        self._store_hold(lifted, "removed")
        return lifted

    def _store_hold(self, hold: Hold, what: str) -> None:
        repository = self.repository
        detail = {"hold": what, "id": hold.id, "field": hold.field}
        record = ("RETENTION_POLICY_CHANGED", f"hold/{hold.id}", detail)
        with repository.database.transaction() as connection:
            repository.holds.put(connection, hold)
            repository.record_within(connection, self.writer, [record])

    # -- erasing --

    def erase(
        self,
        subject: tuple[str, str],
        reason: str,
        *,
        fields: Iterable[str] = (),
        is_dry: bool = False,
        ledger: Path | None = None,
        timeout_s: float = FOLLOW_S,
        engine: Engine | None = None,
        progress: Progress = lambda _done, _total: None,
    ) -> Erasing:
        """
        Erase a subject wherever it can be reached; or count its rows.

        Raises:
            InvalidAnchor: a field cannot be erased.
            FastenError: a legal hold keeps the subject.
            Exception: see `opened`.
        """
        from fasten.repository.erasing import Erased, Eraser

        field, value = subject
        named = fields_to_erase(field, fields)
        self.require()
        self._refuse_held(field, value)
        eraser = Eraser(self.repository, self.writer)
        about = eraser.subject(field, value, named)
        found = eraser.count(about)
        total = sum(found.values())
        done = Erasing(is_dry=is_dry)
        if is_dry:
            done.rows, done.by_class = total, found
            return done
        entry, is_new = eraser.announce(
            field, value, named, reason, is_renewed=bool(total)
        )
        if ledger is not None and is_new:
            _append_ledger(ledger, entry)
        inner = Erased()
        for _ in eraser.erase(about, named, reason, inner):
            progress(inner.rows, total)
        done.take(inner)
        self._clear_up(eraser, entry.at_us, done, timeout_s, engine)
        if engine is not None:
            engine.forget(lambda row: value in json_line(row))
        return done

    def apply_ledger(
        self,
        ledger: Path,
        *,
        timeout_s: float = FOLLOW_S,
        progress: Progress = lambda _done, _total: None,
    ) -> Erasing:
        """
        Erase again what a ledger file tells: after a restore.

        Raises:
            ValueError: the file is no ledger.
            Exception: see `opened`.
        """
        from fasten.repository.erasing import Erased, Eraser

        self.require()
        entries = read_ledger(ledger)
        eraser = Eraser(self.repository, self.writer)
        done, inner = Erasing(), Erased()
        for _ in eraser.apply_again(entries, inner):
            progress(inner.rows, 0)
        done.take(inner)
        newest_us = max((entry.at_us for entry in entries), default=0)
        self._clear_up(eraser, newest_us, done, timeout_s, None)
        return done

    def _refuse_held(self, field: str, value: str) -> None:
        for hold in self.holds():
            if (hold.field, hold.value) == (field, value):
                raise FastenError(
                    f"{field} is under legal hold {hold.id} ({hold.reason}); lift it "
                    "first: `fasten hold remove`"
                )

    def _clear_up(
        self,
        eraser: Eraser,
        at_us: int,
        done: Erasing,
        timeout_s: float,
        engine: Engine | None,
    ) -> None:
        """
        Clear what stands outside the table, and list what cannot be cleared.
        """
        deadline = time.monotonic() + timeout_s
        upkeep = engine.delivery.upkeep if engine and engine.delivery else None
        if upkeep is not None:
            upkeep.hurry()
        self._clear_spool(eraser, at_us, done)
        self._clear_outbox(done)
        lagging = self._wait(eraser, at_us, deadline)
        done.lagging += [
            f"writer {each.id[:8]} of {each.service} on {each.node}" for each in lagging
        ]
        anchor = self._anchor() if done.rows else None
        if anchor is not None:
            done.notes += [note for notes in anchor.run() for note in notes]
        if not self._truncate(eraser, time.monotonic() + 5.0):
            done.remains.append(f"{self.dsn.path}-wal, which somebody reads just now")  # type: ignore[union-attr]
        done.unreached += self._unreached()

    def _wait(self, eraser: Eraser, at_us: int, deadline: float) -> list[Lagging]:
        while True:
            lagging = eraser.lagging(at_us)
            if not lagging or time.monotonic() >= deadline:
                return lagging
            time.sleep(_POLL_S)

    @staticmethod
    def _truncate(eraser: Eraser, deadline: float) -> bool:
        while not eraser.truncate_wal():
            if time.monotonic() > deadline:
                return False
            time.sleep(_POLL_S)
        return True

    def _unreached(self) -> list[str]:
        settings = self.settings
        told = ["backups of the store, and files exported from it"]
        if self.dsn is not None and self.dsn.path is None:
            told.append("Postgres: dead row versions until VACUUM, WAL and replicas")
        if "audit" in settings.stdout:
            told.append("lines that were printed and shipped")
        for name, dsn in (("sys", settings.sys_dsn), ("api", settings.api_dsn)):
            if dsn is not None:
                told.append(f"the durable {name} stream, until its rows expire")
        return told

    # -- files of this host --

    def _clear_spool(self, eraser: Eraser, at_us: int, done: Erasing) -> None:
        """
        Deliver what dead writers left on this host, and remove their files.
        """
        dsn, settings = self.dsn, self.settings
        if dsn is None or not settings.spool:
            return
        directory = spool_directory(settings)
        service, store = settings.service_id, dsn.fingerprint
        dead = spool.adopt(directory, service=service, store=store)
        dead += spool.recall(directory, service=service, store=store)
        gone = []
        for orphan in dead:
            with suppress(OSError):
                if not orphan.is_done:
                    self._deliver(orphan)
                orphan.purge()
                gone.append(orphan.writer_id)
        eraser.follow(gone, at_us)
        with self.repository.database.reading() as connection:
            ledger = eraser.entries(connection)
        scrub_quarantine(directory, ledger)
        kept = [
            each for each in spool.quarantined(directory) if ledger.among([each.row])
        ]
        done.remains += sorted({str(each.path) for each in kept})

    def _deliver(self, orphan: spool.Orphan) -> None:
        from fasten.repository import Writer

        writer = Writer(orphan.writer_id, orphan.service, orphan.node)
        for batch in orphan.batches(orphan.acked, 500):
            self.repository.append(writer, batch.rows, batch.last)
            for first, last in batch.missing:
                self._record_lost(orphan.writer_id, first, last)
            orphan.ack(batch.last)

    def _record_lost(self, writer_id: str, first: int, last: int) -> None:
        detail = {
            "writer": writer_id,
            "from": first,
            "to": last,
            "count": last - first + 1,
        }
        record = ("AUDIT_ROWS_DROPPED", writer_id, detail)
        with self.repository.database.transaction() as connection:
            self.repository.record_within(connection, self.writer, [record])

    def _clear_outbox(self, done: Erasing) -> None:
        """
        Move what waits in the outbox: it meets the ledger on its way.
        """
        dsn = self.settings.outbox_dsn or self.dsn
        if dsn is None or (dsn.path is not None and not Path(dsn.path).exists()):
            return
        outbox = self._outbox(dsn)
        try:
            for _ in range(1000):
                moved = outbox.move(500, _leave)
                if moved.is_busy:
                    time.sleep(_POLL_S)
                elif moved.first_id is None:
                    return
        except Exception as error:  # another database's driver's
            problem = outbox.problem(error)
            done.remains.append(f"the outbox: {problem.message}")
        finally:
            if outbox.database is not self.repository.database:
                outbox.database.release()

    def _outbox(self, dsn: Dsn) -> OutboxRepository:
        from fasten.repository import Database, OutboxRepository

        repository = self.repository
        if dsn == self.dsn:
            return OutboxRepository(dsn, repository.database, repository)
        return OutboxRepository(dsn, Database(dsn, is_guest=True), repository)


def _leave(row: tuple[Any, ...], reason: str) -> None:
    raise AuditStoreError(f"row {row[0]} of the outbox cannot be stored: {reason}")


def _is_unreachable(message: str) -> bool:
    """
    Tell whether nobody got as far as the tables.
    """
    return any(text in message for text in ("password", "login", "does not exist"))


def _expired(name: str, service: str, before_us: int) -> Query:
    return Query(
        stream=name,  # type: ignore[arg-type]
        filters={"service_id": service},
        until_us=before_us,
        limit=1,
        count=True,
    )


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
        ValueError: it is no ledger.
    """
    from fasten.repository.erasures import Erasure

    entries = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            entries.append(Erasure.from_dict(json.loads(line)))
        except ValueError:
            raise ValueError(
                f"{path}:{number} is no entry of a ledger of erasures"
            ) from None
    return entries
