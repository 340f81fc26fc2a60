# SPDX-License-Identifier: Apache-2.0
"""
What an operator does to a store by hand: set up, sweep, hold, sign.

The library form of the CLI's commands; each works on connections of its own, beside
whatever engine is running. Erasing is in `forgetting`; what a service does by itself,
in `upkeep`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import attrs

from fasten.engine import default
from fasten.errors import AuditStoreError, FastenError
from fasten.records import FASTEN, Author
from fasten.retention import RetentionPolicy
from fasten.rows import Query, format_timestamp, parse_timestamp
from fasten.settings import Dsn, Settings
from fasten.upkeep import pause_s, signers_of

if TYPE_CHECKING:
    from fasten.repository import (
        Anchor,
        AuditRepository,
        Sweep,
        Sweeper,
        Writer,
    )
    from fasten.repository.holds import Hold

__all__ = ["Custody", "sweep", "telling"]

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
        try:
            with telling(self.dsn):
                yield self
        finally:
            if self._known is not None:
                self._known.database.release()

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

    def set_up(self) -> None:
        """
        Make what is missing of the tables; of SQLite, the triggers too.

        Raises:
            Exception: see `opened`.
        """
        from fasten.repository.roles import trigger_statements

        repository = self.repository
        repository.schema.ensure()
        if not repository.database.is_postgres:
            for statement in trigger_statements(repository.dsn):
                repository.database.run(statement)

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
        from fasten.repository import Order, Sweep, Sweeper

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
        sweeper = Sweeper(self.repository, self.writer, order, anchor=self.anchor())
        self._exhaust(sweeper, progress)
        return sweeper.done

    def _exhaust(self, sweeper: Sweeper, progress: Progress) -> None:
        from fasten.repository import SweepIsBusy

        rest_s = pause_s(self.dsn)
        until = time.monotonic() + BUSY_S
        while True:
            try:
                for _ in sweeper.run():
                    progress(sweeper.cut, sweeper.done.deleted)
                    time.sleep(rest_s)
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
        from fasten.repository import SWEEP_ROWS, Database, StreamRepository, is_missing

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

    def anchor(self) -> Anchor | None:
        """
        Return what signs; None where there is no key.

        Raises:
            MissingExtra: `cryptography` is not installed.
        """
        from fasten.repository import Anchor

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
        anchor = self.anchor()
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

    def record(self, records: Iterable[tuple[str, str, Mapping[str, Any]]]) -> None:
        """
        Store rows of fasten's own: code, target and detail of each.

        Raises:
            Exception: see `opened`.
        """
        repository = self.repository
        with repository.database.transaction() as connection:
            repository.record_within(connection, self.writer, records)


@contextmanager
def telling(dsn: Dsn | None) -> Iterator[None]:
    """
    Tell in a with-block what drivers raise, without the DSN.

    Raises:
        AuditStoreError: the store cannot be reached now.
        FastenError: it refuses; says the cure.
    """
    from fasten.repository import SweepIsBusy

    try:
        yield
    except SweepIsBusy as error:
        raise FastenError(str(error)) from None
    except FileNotFoundError as error:
        if error.errno is not None:
            raise
        raise AuditStoreError(str(error)) from None  # a store that is not there
    except Exception as error:  # looked at, and raised again if it is no store's
        if dsn is None or not _is_of_store(error):
            raise
        raise _told(error, dsn) from None


def _is_of_store(error: Exception) -> bool:
    from fasten.repository import CommitUnanswered, SchemaProblem

    package = type(error).__module__.partition(".")[0]
    is_driver = package in ("psycopg", "sqlalchemy", "sqlite3")
    return is_driver or isinstance(error, (CommitUnanswered, SchemaProblem))


def _told(error: Exception, dsn: Dsn) -> FastenError:
    from fasten.repository import Database, is_missing

    if is_missing(error):
        return AuditStoreError(f"there is nothing at {dsn.display} yet")
    problem = Database(dsn).problem(error)
    if problem.kind == "setup" and not _is_unreachable(problem.message):
        return FastenError(f"{dsn.display}: {problem.message}")
    return AuditStoreError(f"the store {dsn.display} cannot be used: {problem.message}")


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
