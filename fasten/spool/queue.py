# SPDX-License-Identifier: Apache-2.0
"""
The spool of this process: the queue of its rows, and the journal that holds them.

Rows are copied into a mapped segment. Those that cannot go there (a signal handler
inside `append`, a full segment) are written to one opened with O_APPEND, under the same
run of indexes. No byte is ever written twice.
"""

from __future__ import annotations

import errno
import mmap
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, suppress
from operator import itemgetter
from pathlib import Path
from typing import Any, Final, Literal, cast
from zlib import crc32

from fasten.spool.files import (
    FIRST_SEGMENT,
    FULL_SEGMENT,
    HAS_LOCKS,
    STEP,
    Journal,
    Segment,
    is_at,
    sentence,
)
from fasten.spool.frames import (
    DOUBT,
    FORMAT,
    HEADER_SIZE,
    INNER,
    ROW,
    ROW_MAGIC,
    TIMESTAMP,
    VOID,
    Batch,
    Frame,
    Identity,
    Reader,
    Row,
    Walk,
    account,
    add_range,
    encode_frame,
    pack,
    pack_header,
    parse,
    row_of,
)

__all__ = ["IDLE_S", "RETAIN_S", "Spool"]

RETAIN_S: Final = 900.0
"""How long an acknowledged segment stays, to refill a store that went back."""

IDLE_S: Final = 60.0
"""After this long without a row, a writer gives its spare segment back."""

_PART: Final = 1000  # frames that are written again in one write
_LOOK_S: Final = 1.0  # between two looks at the files, or two tries to reopen them
_NESTING: Final = 64  # signal handlers in handlers: how far rows get out of order
_CLOSED: Final = (TypeError, ValueError)  # what a closed mmap answers to a copy


class _LastLock:
    """
    A lock whose holder may be gone: daemon threads end where they are, unlocking
    nothing. What comes then (a `__del__`) is alone, and does not wait.
    """

    def __init__(self, lock: Any) -> None:
        self._lock = lock
        self._held: list[bool] = []  # by the thread that is inside

    def __enter__(self) -> bool:
        is_held: bool = self._lock.acquire(blocking=not sys.is_finalizing())
        self._held.append(is_held)
        return is_held

    def __exit__(self, *_: object) -> None:
        if self._held.pop():
            self._lock.release()


class Spool:
    """
    The queue of a process and its journal: rows wait here until they are delivered.

    Nothing is opened before the first `append` or `prepare`. *directory* None keeps
    rows in memory only. *store* is the fingerprint of where they are to go. *capacity*
    is how many rows are held in memory as well; past it the journal is the queue.
    *durability* `power` makes `append` wait for fdatasync.

    Any thread appends; one at a time takes, acknowledges and maintains.
    """

    def __init__(
        self,
        directory: Path | None,
        *,
        service: str,
        node: str,
        store: str,
        max_bytes: int = 256 * 1024 * 1024,
        capacity: int = 10_000,
        durability: Literal["process", "power"] = "process",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._directory = directory if HAS_LOCKS else None
        self._service, self._node, self._store = service, node, store
        self._max_bytes = max_bytes
        self.capacity = capacity
        self._is_power = durability == "power"
        self._clock = clock
        self._last = 0
        self._renew_locks()
        self._reset()

    def _renew_locks(self) -> None:
        # Guards the next index, the copy into the segment and the cache; held for
        # that and nothing else (and a write, where the copy is not possible).
        self._lock: AbstractContextManager[Any] = threading.RLock()
        # Held by whoever does the file work; callers never wait for it.
        self._tending = threading.Lock()
        # Held across fdatasync: who waits for it shares the next one. Never taken
        # by who holds _lock.
        self._syncing: AbstractContextManager[Any] = threading.RLock()

    def outlast_threads(self) -> None:
        """
        Wait for no thread that went with the interpreter: its locks stay locked.
        """
        self._lock, self._syncing = _LastLock(self._lock), _LastLock(self._syncing)

    def _reset(self) -> None:
        """
        Begin a new incarnation: another writer, nothing queued, nothing open.

        Numbers go on, so that none means one thing here and another there.
        """
        self.writer_id = os.urandom(16).hex()
        self._first = self._taken = self._acked = self._synced = self._last
        self._is_inside = False  # this thread is in the section that _lock guards
        self._halfway = 0  # the index that append is busy with
        self._asides: list[int] = []  # those of the appends that interrupted it
        self._voids: set[int] = set()  # indexes of appends that were broken off
        self._reset_queue()
        self._reset_files()

    def _reset_queue(self) -> None:
        self._cache: deque[Row] = deque()
        self._staged: list[Row] = []  # left the cache, not yet taken
        self._held: list[Row] = []  # taken, not yet acknowledged
        self._walk: Walk | None = None
        self._high_water = 0

    def _reset_files(self) -> None:
        self._journal: Journal | None = None
        self._memory = b""
        self._opening = 0  # how many appends are creating a file
        self._main: Segment | None = None  # rows are copied into this one,
        self._side: Segment | None = None  # else written to this one
        self._spare: Segment | None = None
        self._closed: list[Segment] = []
        # The main segment's, for append: it touches _area only if _limit leaves room.
        # _limit is 0 where anything is unusual.
        self._area = cast("mmap.mmap", None)
        self._offset = self._limit = 0
        self._maps = 0
        self._fault = self._sync_fault = ""
        self._is_broken = False
        self._unwritten_from = 0  # rows from here on may be in memory only
        self._memory_only = 0
        self._retry_at = self._look_at = self._provide_at = 0.0
        self._seen, self._touched_at = self._last, self._clock()
        if self._directory is None:
            self._is_broken = True
            self._retry_at = float("inf")
            self._fault = (
                "spool: no directory; rows are held in memory only and are lost when "
                "this process dies: set FASTEN_SPOOL_DIR to a writable directory"
            )

    # -- appending --------------------------------------------------------------------

    def append(self, payload: bytes, row: tuple[Any, ...]) -> int:
        """
        Journal a row and queue it; return its index, or 0 if there is no room for it.

        *payload* is `pack(row)`. Safe in signal handlers and `__del__`, also when they
        interrupt an append. Every statement between two calls is one that Python lets
        no signal handler into: that is what the order here rests on.
        """
        length = len(payload)
        lock = self._lock
        with lock:
            if self._is_inside:
                return self._append_aside(payload, row)
            self._is_inside = True
            try:
                start = self._offset
                body = start + HEADER_SIZE
                end = body + length
                if end > self._limit:
                    index = self._append_slowly(payload, row)
                else:
                    area, cache = self._area, self._cache
                    index = self._last + 1
                    self._last = self._halfway = index
                    self._offset = end
                    # The header goes last: a torn copy has none.
                    area[body:end] = payload
                    check = crc32(payload, index ^ index >> 32)
                    pack_header(area, start, ROW_MAGIC, check, length, index)
                    if len(cache) < self.capacity:
                        cache.append((index, row))
                    self._halfway = 0
            except BaseException as error:
                self._limit = 0
                if lock is self._lock or not isinstance(error, _CLOSED):
                    raise
                # A signal handler forked and came back here: in the child the
                # segment is closed, and the row is its parent's.
                return self._last
            finally:
                self._is_inside = False
        if self._is_power:
            self._sync_through(index)
        return index

    def _append_slowly(self, payload: bytes, row: tuple[Any, ...]) -> int:
        """
        Append where something is unusual: the first row, a full segment, trouble.
        """
        if self._directory is None and not (self._halfway or self._asides):
            return self._append_to_cache(row)
        self._settle()
        self._open()
        room = HEADER_SIZE + len(payload)
        spare = self._spare
        if spare is not None and self._left() < room <= spare.size - spare.used:
            self._promote(spare)
        if self._is_broken and self._left() < room and self._is_cache_full():
            return 0
        index = self._last + 1
        self._last = self._halfway = index
        if not self._keep(index, payload, row):
            self._limit = 0  # leaves a void index, for _settle
            return 0
        self._halfway = 0
        return index

    def _append_to_cache(self, row: tuple[Any, ...]) -> int:
        """
        Append where there is no journal to write to, and none was asked for.
        """
        if self._is_cache_full():
            return 0
        index = self._last + 1
        self._last = self._halfway = index
        self._cache.append((index, row))
        self._halfway = 0
        return index

    def _append_aside(self, payload: bytes, row: tuple[Any, ...]) -> int:
        """
        Append while this thread is inside another append, or tends the spool.
        """
        if self._is_broken and self._is_cache_full():
            return 0
        index = self._last + 1
        self._last = index
        self._asides.append(index)
        try:
            is_kept = self._keep(index, payload, row)
        except BaseException:
            self._limit = 0
            raise
        if not is_kept:
            self._limit = 0
            return 0
        self._asides.remove(index)
        if self._is_power:
            self._sync_aside()
        return index

    def _keep(self, index: int, payload: bytes, row: tuple[Any, ...]) -> bool:
        """
        Put a row where there is room; false if there is none.
        """
        open_ones = [i for i in (self._halfway, *self._asides) if 0 < i < index]
        frames = [encode_frame(DOUBT, i) for i in open_ones]
        frames.append(encode_frame(INNER if open_ones else ROW, index, payload))
        is_written = self._write(b"".join(frames), may_copy=self._halfway == index)
        if not is_written:
            self._memory_only += 1
            self._mark_unwritten(index)
        if self._is_cache_full():
            return is_written
        self._cache.append((index, row))
        return True

    def _mark_unwritten(self, index: int) -> None:
        # Not min(): a call would let a handler in, whose mark would be lost.
        if not self._unwritten_from or index < self._unwritten_from:
            self._unwritten_from = index

    def _write(self, data: bytes, *, may_copy: bool) -> bool:
        """
        Copy frames into the main segment, if that is free and has room, or else write
        them to the side; false if neither can be done.
        """
        start, main = self._offset, self._main
        end = start + len(data)
        if may_copy and main is not None and end <= self._limit:
            self._offset = end
            self._area[start + HEADER_SIZE : end] = data[HEADER_SIZE:]
            self._area[start : start + HEADER_SIZE] = data[:HEADER_SIZE]
            return True
        return self._write_aside(data)

    def _write_aside(self, data: bytes) -> bool:
        error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        for _ in range(2):
            if self._is_broken:
                return False
            try:
                self._open()
                side, journal = self._side_for(len(data)), self._journal
                if side is None or journal is None:
                    return False
                journal.spend(len(data))
                side.used += len(data)
                if os.write(side.fd, data) == len(data):
                    return True
            except OSError as trouble:
                error = trouble
            # What is there may be half a frame: leave it and begin another file.
            self._seal_side()
        self._fail(error)
        return False

    def _side_for(self, length: int) -> Segment | None:
        side = self._side
        if side is not None and side.used + length <= side.size:
            return side
        journal = self._journal
        if journal is None or self._opening > 1:
            return None
        self._opening += 1
        try:
            fresh = journal.appendable(self._base(), length)
        finally:
            self._opening -= 1
        self._seal_side()
        self._side = fresh
        return fresh

    def _left(self) -> int:
        return self._limit - self._offset

    def _is_cache_full(self) -> bool:
        return len(self._cache) >= self.capacity

    def _settle(self) -> None:
        """
        Journal that the indexes of interrupted appends are void, and go back to normal.
        """
        broken_off = [i for i in (self._halfway, *self._asides) if i]
        self._voids.update(broken_off)
        main = self._main
        if main is not None:
            self._limit = main.size
        for index in broken_off:
            self._write(encode_frame(VOID, index), may_copy=True)
            if index == self._halfway:
                self._halfway = 0
            else:
                self._asides.remove(index)
        # No call in this statement: nothing can break off in the middle of it.
        self._limit = main.size if main is not None and not self._asides else 0

    def _settled(self) -> int:
        """
        Return the highest index below which no append is half-way.
        """
        last = self._last  # read first: what comes later is above it
        return min([last, *(i - 1 for i in (self._halfway, *self._asides) if i)])

    def _base(self) -> int:
        return self._settled() + 1

    def _promote(self, spare: Segment) -> None:
        area = spare.area
        if area is None:
            return
        self._spare = None
        self._seal_main()
        self._main, self._area, self._offset = spare, area, spare.used
        self._limit = spare.size if not self._asides else 0

    def _seal_main(self) -> None:
        self._limit = 0
        main, self._main = self._main, None
        if main is not None:
            main.last = self._last
            self._closed.append(main)

    def _seal_side(self) -> None:
        side, self._side = self._side, None
        if side is not None:
            side.last = self._last
            self._closed.append(side)

    # -- opening ----------------------------------------------------------------------

    def prepare(self) -> None:
        """
        Open the journal now, so that the first row finds a segment ready.
        """
        with self._lock:
            if self._is_inside:
                return
            self._is_inside = True
            try:
                self._open()
            finally:
                self._is_inside = False
        self.maintain()

    def _open(self) -> None:
        # A handler that interrupts the opening opens too, but no handler inside that,
        # or a fast timer would never come to an end: its row waits in memory until
        # `maintain` writes it down.
        if self._journal is not None or self._is_broken or self._opening > 1:
            return
        self._opening += 1
        try:
            self._journal = self._new_journal()
        except OSError as error:
            self._fail(error)
        finally:
            self._opening -= 1

    def _new_journal(self) -> Journal:
        directory = self._directory
        if directory is None:
            raise FileNotFoundError(errno.ENOENT, "no directory")
        who = Identity(
            format=FORMAT,
            service=self._service,
            node=self._node,
            store=self._store,
            writer=self.writer_id,
        )
        journal = Journal(
            directory, who, max_bytes=self._max_bytes, is_power=self._is_power
        )
        journal.memory = self._memory
        try:
            journal.open(self._acked)
        except OSError:
            journal.close()
            raise
        return journal

    def _fail(self, error: OSError) -> None:
        self._is_broken = True
        self._fault = sentence(error, self._directory, self._max_bytes)
        self._retry_at = self._clock() + _LOOK_S

    # -- delivering -------------------------------------------------------------------

    def take(self, limit: int) -> Batch | None:
        """
        Return up to *limit* rows that follow those taken before, or None.

        They stay in the journal until `ack`. Where nothing but void indexes follows,
        those are acknowledged here.
        """
        with self._lock:
            if not self._is_inside and (self._halfway or self._asides):
                self._settle_alone()
            # The batch is closed here: up to *last* nothing is half-way, and what is
            # not in the first *ready* rows is in the journal, or void. In this order:
            # a row that slips in between (a `__del__`) must be above *last*.
            last = self._settled()
            ready = len(self._cache)
            cache = self._cache
        self._high_water = max(self._high_water, self.depth)
        self._stage(cache, ready, limit)
        batch = self._collect(last, limit)
        self._taken = batch.last
        self._voids.difference_update(
            [i for i in tuple(self._voids) if i <= batch.last]
        )
        if batch.rows or batch.missing:
            self._held += batch.rows
            return batch
        if batch.last > self._acked and not self._held:
            self.ack(batch.last)
        return None

    def _settle_alone(self) -> None:
        self._is_inside = True
        try:
            self._settle()
        finally:
            self._is_inside = False

    def _stage(self, cache: deque[Row], ready: int, limit: int) -> None:
        """
        Move rows from the cache to the stage, in order; a few more than are needed.
        """
        staged, pop = self._staged, cache.popleft
        for _ in range(min(ready, limit + _NESTING - len(staged))):
            staged.append(pop())
        staged.sort(key=itemgetter(0))

    def _collect(self, last: int, limit: int) -> Batch:
        missing: list[tuple[int, int]] = []
        staged, at = self._staged, self._taken
        used = self._run(staged, at, min(last - at, limit))
        rows, at = staged[:used], at + used
        while at < last and len(rows) < limit:
            while used < len(staged) and staged[used][0] <= at:
                used += 1  # its twin was read from the journal
            following = staged[used][0] if used < len(staged) else last + 1
            if following == at + 1:
                rows.append(staged[used])
                at = following
                used += 1
            elif at + 1 in self._voids:
                at += 1
            else:
                room = limit - len(rows)
                found = self._look_up(at, min(following - 1, last), last, room)
                rows += found.rows
                missing += found.missing
                at = found.last
        del staged[:used]
        return Batch(rows, at, missing)

    @staticmethod
    def _run(staged: list[Row], at: int, most: int) -> int:
        """
        Return how many rows follow *at* without a gap, as nearly all do; or 0.

        No index is staged twice: as many rows as numbers leave nothing out.
        """
        most = min(most, len(staged))
        is_whole = most > 0 and staged[0][0] == at + 1
        return most if is_whole and staged[most - 1][0] == at + most else 0

    def _look_up(self, at: int, end: int, bound: int, limit: int) -> Batch:
        """
        Read the rows above *at*, up to *end*, from the journal.
        """
        if self._walk is None or end > self._walk.bound:
            self._walk = Walk(self._reader(at, bound).frames(), bound)
        rows: list[Row] = []
        missing: list[tuple[int, int]] = []
        for frame in self._walk.upto(end):
            row = row_of(frame)
            if row is None or frame[0] <= at:
                continue
            if frame[0] > at + 1:
                self._add_missing(missing, at + 1, frame[0] - 1)
            at = frame[0]
            rows.append((at, row))
            if len(rows) == limit:
                return Batch(rows, at, missing)
        self._add_missing(missing, at + 1, end)
        return Batch(rows, end, missing)

    def _add_missing(
        self, missing: list[tuple[int, int]], first: int, end: int
    ) -> None:
        for void in sorted(i for i in tuple(self._voids) if first <= i <= end):
            add_range(missing, first, void - 1)
            first = void + 1
        add_range(missing, first, end)

    def _reader(self, after: int, bound: int) -> Reader:
        with self._lock:
            segments = [s for s in (self._main, self._side) if s is not None]
            segments += [s for s in self._closed if s.last > after]
        return Reader([(s.base, s.read) for s in segments], after, bound)

    def batches(self, after: int, limit: int) -> Iterator[Batch]:
        """
        Read again what is still in the journal above *after*, delivered or not.

        This is how a store that went back is refilled. What is gone because it was
        acknowledged long ago does not count as missing.
        """
        with self._lock:
            bound = self._settled()
        floor = max(self._acked, after)
        return account(self._reader(after, bound), after, floor, limit)

    def replay(self, after: int, limit: int) -> Iterator[Batch]:
        """
        Read again what was delivered above *after*, and keep it 15 minutes more.
        """
        now, end = self._clock(), self._acked
        for segment in tuple(self._closed):
            if segment.acked_at is not None:
                segment.acked_at = now
        for batch in self.batches(after, limit):
            rows = [row for row in batch.rows if row[0] <= end]
            if rows:
                yield Batch(rows, min(batch.last, end), [])

    def remember(self, memory: bytes) -> None:
        """
        Keep with the journal what this writer knows of its store.
        """
        self._memory = memory
        if self._journal is not None:
            self._journal.memory = memory
            self._journal.note(self._acked, is_done=False)

    def ack(self, index: int) -> None:
        """
        Note that everything up to *index* is delivered.
        """
        self._acked = max(self._acked, index)
        self._held = [row for row in self._held if row[0] > self._acked]
        self._mark(self._clock())
        if self._journal is not None:
            self._journal.note(self._acked, is_done=False)

    def _mark(self, now: float) -> None:
        for segment in tuple(self._closed):
            if segment.acked_at is None and segment.last <= self._acked:
                segment.acked_at = now

    # -- upkeep -----------------------------------------------------------------------

    def maintain(self) -> None:
        """
        Do the file work that callers must not wait for; often, and in one thread.

        Has the next segment ready, gives it back when idle, removes segments that are
        done with, and opens the journal again after trouble.
        """
        if not self._tending.acquire(blocking=False):
            return
        try:
            self._tend(self._clock())
        finally:
            self._tending.release()

    def provide(self) -> None:
        """
        Have the next segment ready, where it is not; for any thread, at any time.
        """
        journal = self._journal
        if journal is None or self._is_broken or self._spare is not None:
            return
        if self._clock() >= self._provide_at and self._tending.acquire(blocking=False):
            try:
                self._provide(journal, self._clock())
            finally:
                self._tending.release()

    def purge(self) -> None:
        """
        Remove every delivered segment now, however young: after an erasure, `seal`,
        deliver, `purge`.
        """
        if not self._tending.acquire(timeout=_LOOK_S):
            return
        try:
            self._purge()
        finally:
            self._tending.release()

    def seal(self) -> None:
        """
        Begin a new segment with the next row.
        """
        self._detach(self._main, self._side)

    def _detach(self, *segments: Segment | None) -> bool:
        """
        Seal *segments* if they are in use; false where this thread uses them now.
        """
        with self._lock:
            if self._is_inside:
                return False
            self._is_inside = True
            try:
                if self._main in segments:
                    self._seal_main()
                if self._side in segments:
                    self._seal_side()
                if self._spare in segments:
                    self._spare = None
            finally:
                self._is_inside = False
        return True

    def _tend(self, now: float) -> None:
        if self._journal is not None and now >= self._look_at:
            self._look_at = now + _LOOK_S
            self._look_after(self._journal)
        # At once: until then, what was in a file that is gone is in memory only.
        if now >= self._retry_at and (self._is_broken or self._unwritten_from):
            self._recover()
        journal = self._journal
        if journal is None:
            return
        self._mark(now)
        self._shut()
        for segment in tuple(self._closed):
            if segment.acked_at is not None and now - segment.acked_at >= RETAIN_S:
                self._remove(segment)
        self._provide(journal, now)

    def _shut(self) -> None:
        """
        Close what is sealed, so that a long backlog holds no descriptors.
        """
        with self._lock:
            # To hold the lock means that no append is about to write to one of these.
            if self._is_inside:
                return
            sealed = [s for s in self._closed if s.fd >= 0]
        for segment in sealed:
            if not (self._is_power and segment.is_dirty):
                segment.close()

    def _remove(self, segment: Segment) -> None:
        try:
            self._closed.remove(segment)
        except ValueError:
            return
        segment.remove()

    def _purge(self) -> None:
        self._mark(self._clock())
        for segment in tuple(self._closed):
            if segment.acked_at is not None:
                self._remove(segment)

    def _provide(self, journal: Journal, now: float) -> None:
        """
        Keep one segment ready while there are rows, none in quiet times.
        """
        if self._seen != self._last:
            self._seen, self._touched_at = self._last, now
        quiet = now - self._touched_at if self.depth == 0 else 0.0
        if quiet >= IDLE_S:
            self._give_back()
            if quiet >= RETAIN_S and (self._main or self._side):
                self.seal()
                self._purge()
                self._maps = 0
        elif now >= self._provide_at and not self._is_broken:
            if self._side is None:
                self._make_side(journal)
            if self._spare is None:
                self._provide_at = now + _LOOK_S
                self._make_spare(journal)

    def _make_side(self, journal: Journal) -> None:
        try:
            side = journal.appendable(self._base(), 0)
        except OSError:
            return  # the row that needs it will say so
        with self._lock:
            is_wanted = self._journal is journal and self._side is None
            if is_wanted:
                self._side = side
        if not is_wanted:
            side.remove()

    def _give_back(self) -> None:
        spare = self._spare
        if spare is not None and self._detach(spare):
            spare.remove()

    def _make_spare(self, journal: Journal) -> None:
        if not hasattr(os, "posix_fallocate"):
            return  # rows go to the side, each by a system call
        size = min(FIRST_SEGMENT << max(0, self._maps - 1), FULL_SEGMENT)
        size = max(STEP, min(size, self._max_bytes // 8 // STEP * STEP))
        try:
            self._make_room(journal, size)
            spare = journal.map(self._base(), size)
        except OSError as error:
            # Not broken: what is open may still have room, or a smaller write.
            self._fault = sentence(error, self._directory, self._max_bytes)
            return
        with self._lock:
            is_wanted = self._journal is journal  # not closed meanwhile
            if is_wanted:
                self._spare = spare
        if not is_wanted:
            spare.remove()
        self._maps += 1
        self._fault, self._provide_at = "", 0.0

    def _make_room(self, journal: Journal, size: int) -> None:
        """
        Near the limit, delivered segments go before their 15 minutes are over.
        """
        journal.measure()
        excess = journal.excess(size)
        if excess > 0 and self._left() < STEP:
            self._detach(self._main)  # nearly full: the next rows go to the side
            self._mark(self._clock())
        for segment in tuple(self._closed):
            if excess > 0 and segment.acked_at is not None:
                excess -= segment.length
                self._remove(segment)
        journal.measure()

    def _recover(self) -> None:
        """
        Open the journal after trouble, and write down what was in memory only.
        """
        rows: list[Row] = []
        try:
            # Until this is done, callers keep away from the files.
            journal = self._journal or self._new_journal()
            self._make_room(journal, FIRST_SEGMENT)
            side = journal.appendable(self._base(), 0)  # or the trouble is not over
            rows = self._reopen(journal, side)
            self._rewrite(journal, [(index, ROW, pack(row)) for index, row in rows])
        except OSError as error:
            if rows:
                self._mark_unwritten(rows[0][0])
            self._fail(error)
        else:
            self._fault = ""

    def _reopen(self, journal: Journal, side: Segment) -> list[Row]:
        """
        Let rows go to *side* from now on; return those that may be in memory only.
        """
        with self._lock:
            inside, self._is_inside = self._is_inside, True
            try:
                self._seal_side()
                self._journal, self._side = journal, side
                first, self._unwritten_from = self._unwritten_from, 0
                self._is_broken = False
                rows = [*self._held, *self._staged, *self._cache] if first else []
            finally:
                self._is_inside = inside
        return sorted((row for row in rows if row[0] >= first), key=itemgetter(0))

    def _rewrite(self, journal: Journal, frames: list[Frame]) -> None:
        """
        Write frames (ascending) again, into segments of their own.

        Raises:
            OSError: there is no room, or no trust in what was written.
        """
        while frames:
            part = frames[:_PART]
            frames = frames[_PART:]
            data = b"".join(
                encode_frame(kind, index, load) for index, kind, load in part
            )
            segment = journal.appendable(part[0][0], len(data))
            try:
                journal.spend(len(data))
                if os.write(segment.fd, data) != len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                if self._is_power:
                    os.fdatasync(segment.fd)
            except OSError:
                segment.remove()
                raise
            segment.used += len(data)
            segment.last, segment.is_dirty = part[-1][0], False
            self._closed.append(segment)

    def _look_after(self, journal: Journal) -> None:
        """
        See whether the files are still there: somebody may have tidied up.
        """
        if not journal.is_locked():
            try:
                journal.open(self._acked)
            except OSError as error:
                self._fail(error)
                return
        for segment in self._segments():
            if segment.fd >= 0 and not is_at(segment.path, segment.fd):
                self._rescue(journal, segment)
            elif segment.fd < 0 and segment.acked_at is None:
                self._miss(segment)

    def _miss(self, segment: Segment) -> None:
        """
        Where a file is gone that was closed, write down what memory has of it.
        """
        if not segment.path.exists() and segment in self._closed:
            self._closed.remove(segment)
            self._mark_unwritten(segment.base)

    def _rescue(self, journal: Journal, segment: Segment) -> None:
        if not self._detach(segment):
            return
        try:
            self._rewrite(journal, self._undelivered(segment, self._acked))
        except OSError as error:
            self._fail(error)  # its descriptor is kept: the next look tries again
            return
        if segment in self._closed:
            self._closed.remove(segment)
        segment.close()
        self._walk = None  # it may be about to read that one

    @staticmethod
    def _undelivered(segment: Segment, after: int) -> list[Frame]:
        frames, _ = parse(segment.read())
        return sorted(f for f in frames if f[1] <= DOUBT and f[0] > after)

    # -- durability power -------------------------------------------------------------

    def sync(self) -> None:
        """
        Wait until every row appended before this call would outlive a power cut.
        """
        self._sync_through(self._last)

    def _sync_through(self, index: int) -> None:
        # Whoever gets the lock syncs for all who wait for it: a group commit.
        with self._syncing:
            if self._synced < index:
                self._sync_all()

    def _sync_all(self) -> None:
        with self._lock:
            through = self._settled()
            in_use = (self._main, self._side)
            dirty = [s for s in (*in_use, *self._closed) if s and s.is_dirty]
        for segment in dirty:
            try:
                os.fdatasync(segment.fd)
            except OSError as error:
                self._distrust(segment, error)
            else:
                segment.is_dirty = segment in in_use
        self._synced = max(self._synced, through)

    def _sync_aside(self) -> None:
        # Inside another append: no lock to wait for, its holder may wait for ours.
        side = self._side
        if side is not None and side.fd >= 0:
            try:
                os.fdatasync(side.fd)
            except OSError as error:
                self._lose_power(error)

    def _distrust(self, segment: Segment, error: OSError) -> None:
        """
        Write the rows again elsewhere: after an error the kernel forgets which pages
        it failed to write, so a second fdatasync that succeeds says nothing.
        """
        journal = self._journal
        if journal is None or not self._detach(segment):
            self._lose_power(error)
            return
        segment.is_dirty = False
        try:
            self._rewrite(journal, self._undelivered(segment, self._synced))
        except OSError as second:
            self._lose_power(second)
        else:
            self._sync_fault = ""

    def _lose_power(self, error: OSError) -> None:
        self._sync_fault = (
            f"spool {self._directory}: fdatasync failed ({error.strerror or error}); "
            "rows outlive a crash of the process but not a power cut: check the disk"
        )

    # -- the end, and other beginnings ------------------------------------------------

    def close(self) -> None:
        """
        Leave what is not delivered to whoever adopts it; `append` would begin anew.
        """
        if self._unwritten_from and self._directory is not None:
            self._recover()
        with self._lock:
            if self._is_inside:
                return  # from a signal handler inside append: its row is not done yet
            journal, spare, segments = self._journal, self._spare, self._segments()
            was_used = self._last > self._first
            acked, is_done = self._acked, self._acked >= self._last
            self._reset()
        for segment in segments:
            if segment is spare or not was_used:
                segment.remove()
            else:
                segment.close()
        if journal is not None:
            journal.note(acked, is_done=is_done)
            if not was_used:
                journal.remove()
            journal.close()

    def after_fork_in_child(self) -> None:
        """
        Become another writer: rows, files and locks so far are the parent's.
        """
        journal, inherited = self._journal, self._segments()
        self._renew_locks()
        self._reset()
        for segment in inherited:
            segment.close()
        if journal is not None:
            journal.close()

    # -- numbers ----------------------------------------------------------------------

    @property
    def mode(self) -> Literal["disk", "memory"]:
        """
        Return where rows that come now are kept.
        """
        return "memory" if self._is_broken else "disk"

    @property
    def fault(self) -> str:
        """
        Return what is wrong with the spool and the cure; empty if nothing is.
        """
        return self._fault or self._sync_fault

    @property
    def last_index(self) -> int:
        """
        Return the highest index given out.
        """
        return self._last

    @property
    def acked(self) -> int:
        """
        Return the index through which everything is delivered.
        """
        return self._acked

    @property
    def depth(self) -> int:
        """
        Return how many rows wait, those being delivered included.
        """
        return self._last - self._acked

    @property
    def high_water(self) -> int:
        """
        Return the greatest depth so far.
        """
        return max(self._high_water, self.depth)

    @property
    def oldest_us(self) -> int | None:
        """
        Return the time of the oldest row that waits, if that is in memory.
        """
        for rows in (self._held, self._staged, self._cache):
            with suppress(IndexError):
                return int(rows[0][1][TIMESTAMP])
        return None

    def oldest_s(self, now_us: int | None = None) -> float:
        """
        Return the age of the oldest row that waits; 0 if none does.
        """
        oldest_us = self.oldest_us
        if oldest_us is None:
            return 0.0
        now_us = time.time_ns() // 1000 if now_us is None else now_us
        return max(0, now_us - oldest_us) / 1_000_000

    @property
    def spooled(self) -> int:
        """
        Return how many rows were journalled, of those appended so far.
        """
        if self._directory is None:
            return 0
        return self._last - self._first - self._memory_only

    @property
    def has_room(self) -> bool:
        """
        Tell whether a row that came now would be taken.
        """
        return not (self._is_broken and self._is_cache_full())

    @property
    def bytes_on_disk(self) -> int:
        """
        Return the size of this writer's segments.
        """
        return sum(segment.length for segment in self._segments())

    def _segments(self) -> list[Segment]:
        known = (self._main, self._side, self._spare, *tuple(self._closed))
        return [segment for segment in known if segment is not None]
