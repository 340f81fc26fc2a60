# SPDX-License-Identifier: Apache-2.0
"""
Rows in callers' own transactions: how they are taken in, and when they are moved on.

The SQL is in `fasten.repository`: `callers` and `insertion` write a row, `outbox`
moves it. The thread is the drainer's.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

from fasten.drain import Batch, Chore, Drainer, Rows

if TYPE_CHECKING:
    from fasten.repository import OutboxRepository
    from fasten.repository.insertion import Entry, Place

try:
    import fcntl
except ImportError:  # Windows: then each process looks after its own rows
    fcntl = None  # type: ignore[assignment]

__all__ = ["Held", "Mover", "Outbox", "Sign", "refuse_awaited"]

POLL_S: Final = 1.0
LOOKS_S: Final = (0.02, 0.03, 0.05, 0.1, 0.3, 0.5)
"""When the mover looks after a row was written: its commit may be seen any moment."""

REST_S: Final = 0.02
"""How long it rests between passes, and where another process is moving."""

BESIDE_S: Final = 5.0
"""How often a process looks that wrote rows lately, beside the one that polls."""

LATELY_S: Final = 60.0
BATCH_ROWS: Final = 500


class Held:
    """
    A stand-in for a connection that must be awaited: `aemit` takes the row from it.
    """

    def __init__(self, connection: Any) -> None:
        self.connection = connection
        self.row: tuple[Any, ...] | None = None


def refuse_awaited(connection: Any) -> None:
    """
    Refuse a connection that a plain call can do nothing with.

    Raises:
        TypeError: names `aemit`.
    """
    names = ((base.__module__, base.__name__) for base in type(connection).__mro__)
    if ("psycopg", "AsyncConnection") in names:
        raise TypeError(
            "a psycopg AsyncConnection must be awaited: use "
            "`await fasten.aemit(..., connection=connection)`"
        )


# --- who polls ------------------------------------------------------------------------


class Sign:
    """
    The file that says that an outbox is in use here; its lock says who polls.

    Without a directory (*path* None), or where locks are missing, everybody does.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path if fcntl is not None else None
        self._fd = -1
        self._is_held = False

    @property
    def is_put(self) -> bool:
        """
        Tell whether any process of this service used the outbox on this host.
        """
        return self._path is not None and self._path.exists()

    def put(self) -> None:
        """
        Say that the outbox is in use.
        """
        self._open(os.O_CREAT)

    def _open(self, more: int = 0) -> None:
        if self._fd >= 0 or self._path is None:
            return
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | more
        try:
            if more:
                self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._fd = os.open(self._path, flags, 0o600)
        except FileNotFoundError:
            return
        except OSError:  # no place for it: this process looks after its own rows
            self._path = None

    def hold(self) -> bool:
        """
        Tell whether this process is the one that polls; it stays it until it ends.
        """
        if self._is_held:
            return True
        self._open()
        if self._fd >= 0:
            with suppress(OSError):  # another has it
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._is_held = True
        return self._is_held or self._path is None

    def let_go(self) -> None:
        """
        Let another process poll.
        """
        if self._is_held:
            with suppress(OSError):
                fcntl.flock(self._fd, fcntl.LOCK_UN)
        self.after_fork_in_child()

    def after_fork_in_child(self) -> None:
        """
        Close what was inherited: to unlock it would take the parent's lock away.
        """
        fd, self._fd, self._is_held = self._fd, -1, False
        if fd >= 0:
            with suppress(OSError):
                os.close(fd)


# --- moving ---------------------------------------------------------------------------


class Judge(Protocol):
    """
    What tells which faults are of one row.
    """

    def __call__(self, error: BaseException) -> Any:
        """
        Return a fault with `kind` and `message`.
        """


class Mover:
    """
    The lane that moves rows from the outbox to the store: its source and delivery.

    A pass is over when nothing is left of what this process had written before it
    began; `flush` waits for one.
    """

    def __init__(
        self,
        repository: Callable[[], OutboxRepository],
        sign: Sign,
        drainer: Drainer,
        *,
        classify: Judge,
        aside: Callable[[tuple[Any, ...], str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._repository = repository
        self.sign = sign
        self._drainer = drainer
        self._classify, self._aside = classify, aside
        self._clock = clock
        # Guards the numbers below: callers ask, the drainer's thread answers.
        self._guard = threading.Lock()
        self._chore: Chore = drainer.every(
            POLL_S, self.tick, first_s=POLL_S, opens=False
        )
        self.moved = 0
        self._reset()

    def _reset(self) -> None:
        self._asked = self._done = 0
        self._newest = ""
        self._pass: tuple[int, str] | None = None
        self._is_over = False
        self._rest_until = 0.0
        self._limit = BATCH_ROWS
        self._looks: Iterator[float] = iter(())
        self._used_at: float | None = None
        self._beside_at = 0.0

    # -- callers' threads --

    @property
    def is_used(self) -> bool:
        """
        Tell whether this process wrote a row into any transaction.
        """
        return self._used_at is not None

    def use(self, id_: str) -> None:
        """
        Note that row *id_* is being written into a transaction.
        """
        if self._used_at is None:
            self.sign.put()
        self._used_at = self._clock()
        self._newest = max(self._newest, id_)

    def now(self) -> None:
        """
        Look: something was committed.
        """
        with self._guard:
            self._asked += 1
        self._wake_at(self._rest_until)

    def soon(self) -> None:
        """
        Look again and again for a second: something may be committed any moment.
        """
        first, *more = LOOKS_S
        self._looks = iter(more)
        self._wake_at(self._clock() + first)

    def hurry(self) -> None:
        """
        Make a pass without any rest before it: somebody waits for it.
        """
        self._rest_until = 0.0
        self.now()

    def _wake_at(self, due: float) -> None:
        # Where the thread will be up by then, it is left to sleep.
        if self._chore.due > due:
            self._chore.due = due
            self._drainer.wake()
        elif not self._drainer.is_running:
            self._drainer.wake()

    # -- the drainer's thread: a lane's source --

    @property
    def depth(self) -> int:
        """
        Return 1 while a pass is asked for.
        """
        return int(self._asked > self._done and self._clock() >= self._rest_until)

    @property
    def last_index(self) -> int:
        """
        Return the number of the pass that was asked for last.
        """
        return self._asked

    @property
    def acked(self) -> int:
        """
        Return the number of the last pass that is over.
        """
        return self._done

    def take(self, limit: int) -> Batch | None:  # noqa: ARG002  (a lane's source)
        """
        Begin a pass, or go on with it; its rows are in the database.
        """
        if not self.depth:
            return None
        if self._pass is None:
            self._pass = self._asked, self._newest
        return Rows([], self._pass[0], [])

    def ack(self, index: int) -> None:
        """
        Note that the pass is over, if it is.
        """
        if self._is_over:
            self._done, self._pass = index, None
            self._rest()

    def deliver(self, _batch: Batch) -> list[tuple[Any, ...]]:
        """
        Move some rows; return them, as columns.

        Raises:
            Exception: whatever the drivers say; nothing is lost.
        """
        self._is_over = False
        repository = self._repository()
        try:
            moved = repository.move(self._limit, self._aside)
        except Exception as error:  # looked at, and raised again if it is of no row
            fault = self._classify(error)
            if fault.kind != "row":
                raise
            self._narrow(repository, fault.message)
            return []
        self._limit = min(BATCH_ROWS, self._limit * 2)
        self.moved += len(moved.rows)
        if moved.is_busy:
            self._rest()
        else:
            self._judge(moved.first_id)
        return moved.rows

    def _narrow(self, repository: OutboxRepository, reason: str) -> None:
        """
        Take fewer rows until the poison one stands alone, then put it aside.
        """
        if self._limit > 1:
            self._limit //= 2
            return
        try:
            repository.set_aside_first(self._aside, reason)
        except ValueError as error:  # a fault of the row again: no reason to go round
            raise RuntimeError("a row can neither be stored nor set aside") from error
        self._limit = BATCH_ROWS

    def _rest(self) -> None:
        self._rest_until = self._clock() + REST_S
        if self._asked > self._done:
            self._chore.due = min(self._chore.due, self._rest_until)

    def _judge(self, first_id: str | None) -> None:
        ours = self._pass[1] if self._pass else ""
        self._is_over = first_id is None or first_id > ours
        if self._is_over and first_id is not None:
            with self._guard:
                self._asked += 1  # there may be more, of others

    def tick(self) -> None:
        """
        Look where it is time to: soon after a write, or each second if this polls.
        """
        now = self._clock()
        if now < self._rest_until:
            self._chore.due = min(self._chore.due, self._rest_until)
            return
        delay = next(self._looks, None)
        if delay is not None:
            self._chore.due = now + delay
        if (delay is not None or self._polls(now)) and self._asked == self._done:
            with self._guard:
                self._asked += 1

    def _polls(self, now: float) -> bool:
        used_at = self._used_at
        if used_at is None and not self.sign.is_put:
            return False
        if self.sign.hold():
            return True
        # The one that polls may be stopped, and hold the lock.
        if used_at is None or now - used_at > LATELY_S or now < self._beside_at:
            return False
        self._beside_at = now + BESIDE_S
        return True

    def after_fork_in_child(self) -> None:
        """
        Leave the parent's passes, and its place as the one that polls.
        """
        self.sign.after_fork_in_child()
        self._guard = threading.Lock()
        self._reset()


# --- taking in ------------------------------------------------------------------------


class Outbox:
    """
    What puts rows into callers' transactions.
    """

    def __init__(
        self,
        repository: Callable[[], OutboxRepository],
        mover: Mover,
        *,
        service: str,
        node: str,
    ) -> None:
        self._repository = repository
        self.mover = mover
        self._service, self._node = service, node
        self._locating = threading.Lock()
        self._place: Place | None = None

    def store(self, row: Sequence[Any], connection: Any) -> None:
        """
        Write *row* into the open transaction of *connection*.

        Raises:
            TypeError: *connection* is nothing that a row could be written through.
            AuditStoreError: it was not written; the transaction is as before.
        """
        from fasten.repository import callers

        callers.kind_of(connection)
        entry = self._entry(row)
        place = self._located(entry)
        try:
            callers.insert(connection, entry, place, self.mover)
        except callers.Misplaced as error:
            if not self._has_moved(place):
                raise place.refused(entry, error) from None
            self.store(row, connection)

    async def astore(self, row: Sequence[Any], connection: Any) -> None:
        """
        Write *row* as `store` does, through connections that must be awaited.

        Raises:
            TypeError: *connection* is nothing that a row could be written through.
            AuditStoreError: it was not written; the transaction is as before.
        """
        from fasten.repository import callers

        callers.kind_of(connection)
        entry = self._entry(row)
        place = await asyncio.to_thread(self._located, entry)
        try:
            await callers.ainsert(connection, entry, place, self.mover)
        except callers.Misplaced as error:
            if not await asyncio.to_thread(self._has_moved, place):
                raise place.refused(entry, error) from None
            await self.astore(row, connection)

    def _entry(self, row: Sequence[Any]) -> Entry:
        from fasten.repository.outbox import entry_of

        self.mover.use(str(row[0]))
        return entry_of(row, self._service, self._node)

    def _located(self, entry: Entry) -> Place:
        """
        Find the outbox, once; over a connection of fasten's own.
        """
        with self._locating:
            if self._place is not None:
                return self._place
            place = self._locate(entry)
            # A right that is missing may be granted any moment: asked again.
            self._place = place if place and place.may_insert else None
            return place or self._repository().place()

    def _locate(self, entry: Entry) -> Place | None:
        repository = self._repository()
        try:
            return repository.locate()
        except Exception as error:  # the driver's, or the schema's: judged
            if repository.problem(error).kind == "setup":
                raise repository.place().refused(entry, error) from None
        return None  # not to be asked now; the caller's own connection will tell

    def _has_moved(self, place: Place) -> bool:
        """
        Look again where the outbox is: it may have been made anew.
        """
        with self._locating, suppress(Exception):  # then what was known holds
            self._place = self._repository().locate()
        return self._place is not None and self._place != place

    def after_fork_in_child(self) -> None:
        """
        Take new locks; the parent's may be held.
        """
        self._locating = threading.Lock()
        self.mover.after_fork_in_child()
