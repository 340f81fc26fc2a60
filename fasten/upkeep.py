# SPDX-License-Identifier: Apache-2.0
"""
What a service does for its evidence beside delivering: sweeps, checkpoints, erasures.

All of it happens in the drainer's thread, in short steps between its deliveries. The
SQL is in `fasten.repository`; what an operator does by hand, in `custody`.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

from fasten import spool
from fasten.chain import Signer, ed25519_signer
from fasten.drain import Drainer, Lane
from fasten.errors import MissingExtra
from fasten.retention import RetentionPolicy
from fasten.rows import Pending
from fasten.settings import Dsn, Settings

if TYPE_CHECKING:
    from fasten.repository import AuditRepository, Sweeper, Writer
    from fasten.repository.erasures import Erasures

__all__ = ["ERASED", "Keeper", "Upkeep", "pause_s", "scrubbed", "signers_of"]

logger = logging.getLogger("fasten")

RETRY_S: Final = 60.0
"""How long after a failure a job is tried again."""

LOOK_S: Final = 30.0
"""How often a process that holds files looks for erasures: who erases waits 35 s."""

SOON_S: Final = 0.1
QUIET_S: Final = 3600.0
"""How often a process that stores nothing looks whether others' chains were signed."""

FILES_S: Final = 1000.0
"""This long after its last row a process may hold a file of it."""

ERASED: Final = "(erased)"
"""What stands in a row that the store never took, for what was erased."""


GIVE_WAY_S: Final = 0.12
"""SQLite's busy handler looks again within 0.1 s: so others get their turn."""


def pause_s(dsn: Dsn | None) -> float:
    """
    Return how long to leave a store alone between two steps.
    """
    return 0.0 if dsn is None or dsn.path is None else GIVE_WAY_S


class Keeper(Protocol):
    """
    What the jobs ask of the engine that they work for.
    """

    settings: Settings

    def stored(self, rows: Sequence[tuple[Any, ...]], *, is_sealed: bool) -> None:
        """
        Show rows, in the order of AUDIT_COLUMNS, that have arrived.
        """

    def checkpointed(self, notes: Sequence[str]) -> None:
        """
        Show checkpoints that were stored.
        """

    def forget(self, is_meant: Callable[[Mapping[str, Any]], bool]) -> None:
        """
        Let go of the rows in memory that *is_meant* picks.
        """


class Job:
    """
    Long work in short steps: one each time the drainer's thread has a moment.

    *begin* returns the steps; whatever they raise ends them, and is handed to *told*.
    """

    def __init__(
        self,
        drainer: Drainer,
        begin: Callable[[], Iterator[object]],
        told: Callable[[Exception], None],
        *,
        interval_s: float,
        first_s: float = 0.0,
        pause_s: float = 0.0,
    ) -> None:
        self._drainer, self._begin, self._told = drainer, begin, told
        self._pause_s = pause_s
        self._steps: Iterator[object] | None = None
        self.chore = drainer.every(interval_s, self.step, first_s=first_s)

    def step(self) -> None:
        """
        Take the next step, and come back soon if there may be another.
        """
        steps = self._steps = self._steps or self._begin()
        try:
            with self._drainer.guard():
                next(steps)
        except StopIteration:
            self._steps = None
        except Exception as error:  # the store's: told, and tried again
            self._steps = None
            self.chore.due = time.monotonic() + min(RETRY_S, self.chore.interval_s)
            self._told(error)
        else:
            self.chore.due = time.monotonic() + self._pause_s

    def finish(self) -> None:
        """
        Take all steps, one after the other.

        Raises:
            Exception: whatever a step raises.
        """
        for _ in self._begin():
            pass

    def stop(self) -> None:
        """
        Forget the steps that are left.
        """
        self._steps = None


class Upkeep:
    """
    The jobs of one engine's audit store.
    """

    def __init__(
        self,
        keeper: Keeper,
        drainer: Drainer,
        lane: Lane,
        *,
        journal: spool.Spool,
        directory: Path,
        repository: Callable[[], AuditRepository],
        writer: Callable[[], Writer],
        now_us: Callable[[], int],
    ) -> None:
        self._keeper, self._drainer, self._lane = keeper, drainer, lane
        self._settings = keeper.settings
        self._journal, self._directory = journal, directory
        self._repository, self._writer, self._now_us = repository, writer, now_us
        self._policy = RetentionPolicy.from_settings(self._settings)
        self._told: set[str] = set()
        self._signers: list[Signer] = []
        self._reset()
        interval_s = self._settings.retention_sweep_interval
        self._sweeping = self._job(self._sweep, interval_s)
        self._following = self._job(self._follow, LOOK_S, first_s=LOOK_S)
        self._signing: Job | None = None
        if self._settings.signing_key:
            interval_s = self._settings.checkpoint_interval
            self._signing = self._job(self._sign, interval_s, first_s=interval_s)
        drainer.farewell = self.farewell

    def _job(
        self,
        begin: Callable[[], Iterator[object]],
        interval_s: float,
        first_s: float = 0.0,
    ) -> Job:
        return Job(
            self._drainer,
            begin,
            self._tell,
            interval_s=interval_s,
            first_s=first_s,
            pause_s=pause_s(self._settings.audit_dsn),
        )

    def _reset(self) -> None:
        self._has_settled = False
        self._sweeper: Sweeper | None = None
        self._signed_at, self._signed_rows = float("-inf"), 0
        self._followed_us = 0
        self._target: tuple[int, int] | None = None
        self._rows, self._rows_at = 0, float("-inf")

    def after_fork_in_child(self) -> None:
        """
        Leave the parent's work to the parent.
        """
        for job in (self._sweeping, self._following, self._signing):
            if job is not None:
                job.stop()
        self._reset()

    def _tell(self, error: Exception) -> None:
        """
        Log what keeps a job from its work, once.
        """
        from fasten.repository import is_missing

        if is_missing(error):
            return  # nothing was stored yet
        problem = self._repository().database.problem(error)
        message = str(error) if isinstance(error, MissingExtra) else problem.message
        if message not in self._told:
            self._told.add(message)
            logger.warning("fasten upkeep: %s", message)

    @property
    def _is_unborn(self) -> bool:
        path = self._repository().dsn.path
        return path is not None and not Path(path).exists()

    # -- sweeps --

    def _sweep(self) -> Iterator[object]:
        """
        Put the periods on record, then sweep if it is time to.
        """
        from fasten.repository import Anchor, Order, Sweeper, SweepIsBusy

        if self._is_unborn:
            self._sweeping.chore.due = time.monotonic() + min(
                RETRY_S, self._sweeping.chore.interval_s
            )
            return
        wait_s = self._settle()
        yield None
        if wait_s > 0:
            self._sweeping.chore.due = time.monotonic() + wait_s
            return
        settings, repository = self._settings, self._repository()
        order = Order(
            wanted=self._policy,
            now_us=self._now_us(),
            interval_s=settings.retention_sweep_interval,
        )
        signers = self._keys()
        anchor = Anchor(repository, settings.service_id, signers) if signers else None
        sweeper = self._sweeper = Sweeper(
            repository, self._writer(), order, anchor=anchor
        )
        try:
            yield from sweeper.run()
        except SweepIsBusy:
            self._sweeper = None
            return  # another process is at it
        else:
            self._sweeper = None
        finally:
            self._keeper.stored(sweeper.done.stored, is_sealed=True)
            self._keeper.checkpointed(sweeper.done.notes)
        for right in sweeper.done.missing:
            logger.warning("fasten sweep: missing %s", right)

    def _settle(self) -> float:
        """
        Put the periods on record; return how long the next sweep is away.
        """
        from fasten.repository import Periods

        repository, service = self._repository(), self._settings.service_id
        periods = Periods(repository, service)
        with repository.database.transaction() as connection:
            now_us = min(self._now_us(), periods.store_us(connection))
            _, records = periods.settle(connection, self._policy, now_us)
            stored = repository.record_within(connection, self._writer(), records)
            swept_us = repository.meta.get(connection, f"swept:{service}")
        self._has_settled = True
        self._keeper.stored(stored, is_sealed=True)
        if type(swept_us) is not int:
            return 0.0
        interval_s = self._settings.retention_sweep_interval
        wait_s = (swept_us - now_us) / 1_000_000 + interval_s
        # One that was swept in the future was swept by a clock that is wrong. Of many
        # processes not all need look at the same moment.
        wait_s = min(wait_s, interval_s)
        return max(0.0, wait_s * (1 + random.random() / 20))  # noqa: S311  (no secret)

    # -- checkpoints --

    def _sign(self) -> Iterator[object]:
        from fasten.repository import Anchor

        now = time.monotonic()
        is_quiet = self._lane.delivered == self._signed_rows
        if self._is_unborn or (is_quiet and now - self._signed_at < QUIET_S):
            return
        anchor = Anchor(self._repository(), self._settings.service_id, self._keys())
        rows = self._lane.delivered
        # A little less than the interval: this process comes by once in it.
        for notes in anchor.run(interval_s=self._settings.checkpoint_interval / 2):
            self._keeper.checkpointed(notes)
            yield None
        self._signed_at, self._signed_rows = now, rows

    def _keys(self) -> list[Signer]:
        """
        Return what signs checkpoints; none where the package for it is missing.
        """
        if not self._signers:
            try:
                self._signers = signers_of(self._settings)
            except MissingExtra as error:
                self._tell(error)
        return self._signers

    # -- erasures --

    def hurry(self) -> None:
        """
        Look for erasures now: somebody waits for this process to follow.
        """
        self._followed_us = 0
        self._following.chore.due = 0.0
        self._drainer.wake()

    def _follow(self) -> Iterator[object]:
        """
        Once rows of before an erasure are delivered, remove the files that hold them.
        """
        if not self._may_hold_files():
            return
        newest = self._newest()
        if newest.newest_us <= self._followed_us:
            return
        if self._target is None or self._target[0] < newest.newest_us:
            self._journal.seal()
            self._target = newest.newest_us, self._journal.last_index
        at_us, index = self._target
        if self._journal.acked < index:
            self._following.chore.due = time.monotonic() + SOON_S
            return
        self._journal.purge()
        scrub_quarantine(self._directory, newest)
        self._keeper.forget(newest.mentions)
        yield None
        self._note_followed(at_us)

    def _may_hold_files(self) -> bool:
        now = time.monotonic()
        if self._rows != self._lane.delivered:
            self._rows, self._rows_at = self._lane.delivered, now
        has_any = self._journal.bytes_on_disk > 0 or self._journal.depth > 0
        return not self._is_unborn and (has_any or now - self._rows_at < FILES_S)

    def _newest(self) -> Erasures:
        from fasten.repository import Eraser

        repository = self._repository()
        with repository.database.transaction() as connection:
            return Eraser(repository, self._writer()).entries(connection)

    def _note_followed(self, at_us: int) -> None:
        from fasten.repository import GONE_US, Eraser

        dsn = self._settings.audit_dsn
        gone = spool.recall(
            self._directory,
            service=self._settings.service_id,
            store=dsn.fingerprint if dsn else "",
        )
        for orphan in gone:
            orphan.purge()
        eraser = Eraser(self._repository(), self._writer())
        eraser.follow([self._writer().id], at_us)
        eraser.follow([orphan.writer_id for orphan in gone], GONE_US)
        self._followed_us, self._target = at_us, None

    # -- the end --

    def farewell(self) -> None:
        """
        Leave the store in order: periods on record, the newest rows signed.
        """
        if self._lane.fault is not None or not self._lane.delivered or self._is_unborn:
            return
        with self._drainer.guard():
            if self._sweeper is not None:
                self._sweeper.give_up()
            if not self._has_settled:
                self._settle()
            if self._signing is not None:
                self._sign_all()

    def _sign_all(self) -> None:
        from fasten.repository import Anchor

        anchor = Anchor(self._repository(), self._settings.service_id, self._keys())
        for notes in anchor.run():
            self._keeper.checkpointed(notes)


def signers_of(settings: Settings) -> list[Signer]:
    """
    Return what FASTEN_SIGNING_KEY signs with.

    Raises:
        MissingExtra: `cryptography` is not installed.
    """
    keys = settings.signing_key
    return [ed25519_signer(settings.service_id, key.reveal()) for key in keys]


# --- rows that the store refused ------------------------------------------------------


def scrub_quarantine(directory: Path, erasures: Erasures) -> int:
    """
    Erase what is to be forgotten from the rows that were put aside; return how many.
    """

    def scrub(row: tuple[Any, ...]) -> tuple[Any, ...] | None:
        entries = erasures.among([row]).get(row[0], ())
        fields = {field for entry in entries for field in entry.fields}
        return scrubbed(row, fields) if fields else None

    with suppress(OSError):  # not ours to read: whoever may will
        return spool.amend_quarantined(directory, scrub)
    return 0


def scrubbed(row: Sequence[Any], fields: set[str]) -> tuple[Any, ...]:
    """
    Return a row in `Pending` order, which has no seal, without *fields*.
    """
    values = Pending(*row)._asdict()
    for field in fields:
        values[field] = None if field in _NULLABLE else ERASED
    if "detail" in fields:
        values["detail"] = "{}"
    return tuple(Pending(**values))


_NULLABLE: Final = ("client", "on_behalf_of", "reason")
