# SPDX-License-Identifier: Apache-2.0
"""
The crash-safe journal and queue of one process: append, read, adopt.

A row whose `append` returned is in the page cache of a file, so it outlives kill -9.
Delivering it lives in `drain`, storing it in `repository`; a file knows no SQL.

A segment `<writer>.<n>.seg` is a row of frames: magic, crc32, length, index, payload.
Most are mapped into memory and filled by copying; rows that cannot go there (a signal
handler inside `append`, a full segment) are written to one opened with O_APPEND, under
the same run of indexes. Readers merge by index and account for each one: it is a row,
known to be void, or missing. No byte is ever written twice.
"""

from __future__ import annotations

import errno
import json
import mmap
import os
import re
import stat
import struct
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, cast
from zlib import crc32

import attrs

from fasten.rows import Pending

try:
    import fcntl
except ImportError:  # pragma: no cover - no flock, so nobody could tell who is alive
    fcntl = None  # type: ignore[assignment]

__all__ = [
    "FORMAT",
    "RETAIN_S",
    "Batch",
    "Leftover",
    "Orphan",
    "Quarantined",
    "Spool",
    "adopt",
    "has_foreign",
    "pack",
    "quarantine",
    "quarantined",
    "recall",
    "survey",
    "unpack",
]

FORMAT: Final = 1
"""The newest format of a segment that this version reads, and the one it writes."""

RETAIN_S: Final = 900.0
"""How long an acknowledged segment stays, to refill a store that went back."""

IDLE_S: Final = 60.0
"""After this long without a row, a writer gives its spare segment back."""

FIRST_SEGMENT: Final = 256 * 1024
FULL_SEGMENT: Final = 1024 * 1024

_PART: Final = 1000  # frames that are written again in one write
_LOOK_S: Final = 1.0  # between two looks at the files, or two tries to reopen them
_NESTING: Final = 64  # signal handlers in handlers: how far rows get out of order


# --- rows as bytes ----------------------------------------------------------------

_FIELDS: Final = Pending._fields
_NULLABLE: Final = tuple(
    _FIELDS.index(name)
    for name in ("on_behalf_of", "tenant_id", "client", "reason", "trace_id", "span_id")
)
_TIMESTAMP: Final = _FIELDS.index("timestamp_us")


def pack(row: tuple[Any, ...]) -> bytes:
    """
    Join a row in `Pending` order with NUL; None becomes the empty string.

    Raises:
        ValueError: a field has no UTF-8 form; anchors are cleaned before.
    """
    return "\0".join(["" if field is None else str(field) for field in row]).encode()


def unpack(payload: bytes) -> tuple[Any, ...]:
    """
    Read what `pack` wrote.

    Raises:
        ValueError: *payload* is not a row.
    """
    fields: list[Any] = payload.decode().split("\0")
    if len(fields) != len(_FIELDS):
        raise ValueError(f"{len(fields)} fields where a row has {len(_FIELDS)}")
    fields[_TIMESTAMP] = int(fields[_TIMESTAMP])
    for position in _NULLABLE:
        fields[position] = fields[position] or None
    return tuple(fields)


# --- frames -----------------------------------------------------------------------

_PREFIX: Final = b"\xf5FS"
# 0xF5 occurs in no UTF-8 text: no payload can be taken for a frame.

_ROW: Final = 0
_INNER: Final = 1  # a row appended while the indexes of its _DOUBT frames were open
_VOID: Final = 2  # the append of this index was interrupted: there is no row
_DOUBT: Final = 3  # this index was open when a row above it was written
_HEAD: Final = 8  # first in a segment: who wrote it; no index in it is below its own
_ACK: Final = 9  # in the .ack file: everything up to this index is delivered
_MAGIC: Final = {
    kind: _PREFIX + b"%d" % kind for kind in (_ROW, _INNER, _VOID, _DOUBT, _HEAD, _ACK)
}
_KIND: Final = {magic: kind for kind, magic in _MAGIC.items()}
# The crc runs over the payload, from a seed made of index and kind: two seeds never
# give the same. A row's is the index alone, folded to 32 bits; append knows that.
_SEED: Final = {kind: kind << 28 for kind in _MAGIC}
_ROW_MAGIC: Final = _MAGIC[_ROW]

_HEADER: Final = struct.Struct("<4sIIQ")
_SIZE: Final = _HEADER.size
_pack_header: Final = _HEADER.pack_into
_CLOSED: Final = (TypeError, ValueError)  # what a closed mmap answers to a copy

_Frame = tuple[int, int, bytes]
"""Index, kind, payload: sorts by index, and a row before a doubt about it."""

_Row = tuple[int, tuple[Any, ...]]
"""Index, and the row in `Pending` order."""


def _frame(kind: int, index: int, payload: bytes = b"") -> bytes:
    check = crc32(payload, index ^ index >> 32 ^ _SEED[kind])
    return _HEADER.pack(_MAGIC[kind], check, len(payload), index) + payload


def _frame_at(data: bytes, at: int) -> _Frame | None:
    """
    Return the frame that begins at *at*, or None if that is no whole frame.
    """
    if at + _SIZE > len(data):
        return None
    magic, check, length, index = _HEADER.unpack_from(data, at)
    kind = _KIND.get(magic)
    payload = data[at + _SIZE : at + _SIZE + length]
    if kind is None or len(payload) != length:
        return None
    if crc32(payload, index ^ index >> 32 ^ _SEED[kind]) != check:
        return None
    return index, kind, payload


def _parse(data: bytes) -> tuple[list[_Frame], int]:
    """
    Return every whole frame, also those past damage, and where the last one ends.
    """
    frames: list[_Frame] = []
    end = 0
    at = data.find(_PREFIX)
    while at >= 0:
        frame = _frame_at(data, at)
        if frame is not None:
            frames.append(frame)
            end = at + _SIZE + len(frame[2])
        at = data.find(_PREFIX, at + 1 if frame is None else end)
    return frames, end


def _claim(data: bytes, end: int, last: int, size: int) -> int:
    """
    Return the index that the damaged end of a segment of *size* seems to have held.

    A frame that was being copied when its writer died claims nothing: its header is
    written last, and in that the index. Nor does one that was cut while being written
    to the end of a file, where *size* is 0.
    """
    if len(data) >= end + _SIZE:
        _, _, length, index = _HEADER.unpack_from(data, end)
        is_cut = size == 0 and end + _SIZE + length > len(data)
        if length and index and not is_cut:
            room = (max(size, len(data)) - end) // _SIZE
            return int(index) if last < index <= last + room else last + 1
    return last + 1 if len(data) < size else 0


class _Reader:
    """
    The frames of some segments in the order of their indexes.

    *segments* are pairs of the lowest index a segment may hold and what reads it. Each
    is read when the merge gets to that index: about two are in memory at a time.
    """

    def __init__(
        self,
        segments: Iterable[tuple[int, Callable[[], bytes]]],
        after: int,
        bound: int = sys.maxsize,
    ) -> None:
        self._segments = sorted(segments, key=itemgetter(0))
        self._after, self._bound = after, bound
        self.claimed = 0  # the highest index that the damaged end of a segment claims

    def frames(self) -> Iterator[_Frame]:
        ready: list[_Frame] = []  # the next one last
        for base, read in self._segments:
            while ready and ready[-1][0] < base:
                yield ready.pop()
            ready += self._load(read())
            ready.sort(reverse=True)
        while ready:
            yield ready.pop()

    def _load(self, data: bytes) -> list[_Frame]:
        frames, end = _parse(data)
        head = next((frame for frame in frames if frame[1] == _HEAD), (1, _HEAD, b""))
        who = _identity(head[2])
        size = who.size if who else 0
        last = max((f[0] for f in frames if f[1] != _HEAD), default=head[0] - 1)
        claim = _claim(data, end, last, size)
        if self.claimed < claim <= self._bound:
            self.claimed = claim
        return [
            f for f in frames if f[1] <= _DOUBT and self._after < f[0] <= self._bound
        ]


class _Walk:
    """
    Where the reading of a journal stands, between two batches.
    """

    def __init__(self, frames: Iterator[_Frame], bound: int) -> None:
        self.bound = bound
        self._frames = frames
        self._next = next(frames, None)

    def upto(self, end: int) -> Iterator[_Frame]:
        while self._next is not None and self._next[0] <= end:
            frame, self._next = self._next, next(self._frames, None)
            yield frame


class Batch(NamedTuple):
    """
    Rows to deliver together, as (index, row in `Pending` order), ascending.

    Every index up to *last* is in this batch or an earlier one, void, or *missing*:
    inclusive ranges that were journalled and cannot be found any more.
    """

    rows: list[_Row]
    last: int
    missing: list[tuple[int, int]]


def _row_of(frame: _Frame) -> tuple[Any, ...] | None:
    if frame[1] > _INNER:
        return None
    try:
        return unpack(frame[2])
    except ValueError:
        return None


def _batches(reader: _Reader, after: int, floor: int, limit: int) -> Iterator[Batch]:
    """
    Account for every index above *after*; up to *floor*, absence is no damage.
    """
    rows: list[_Row] = []
    missing: list[tuple[int, int]] = []
    doubted: list[int] = []
    at = after
    for frame in reader.frames():
        index, kind, _ = frame
        if index <= at:
            continue
        _add_range(missing, max(at, floor) + 1, index - 1)
        at = index
        row = _row_of(frame)
        if kind == _ROW:
            # Its append settled what was open before: what is not here was lost.
            missing += [(i, i) for i in doubted]
            doubted.clear()
        if row is not None:
            rows.append((index, row))
        elif kind == _DOUBT:
            doubted += [index] * (index > floor)
        elif kind != _VOID:
            _add_range(missing, index, index)
        if max(len(rows), len(missing)) >= limit:
            yield Batch(rows, at, missing)
            rows, missing = [], []
    _add_range(missing, max(at, floor) + 1, reader.claimed)
    if rows or missing or at > after:
        yield Batch(rows, max(at, reader.claimed), missing)


def _add_range(ranges: list[tuple[int, int]], first: int, last: int) -> None:
    if first > last:
        return
    if ranges and ranges[-1][1] == first - 1:
        ranges[-1] = (ranges[-1][0], last)
    else:
        ranges.append((first, last))


# --- files ------------------------------------------------------------------------

# A name in the spool may be a link or a FIFO that somebody planted: never follow it,
# never wait for its other end.
_SAFELY: Final = (
    getattr(os, "O_NOFOLLOW", 0)
    | getattr(os, "O_NONBLOCK", 0)
    | getattr(os, "O_CLOEXEC", 0)
)
_NEW: Final = os.O_RDWR | os.O_CREAT | os.O_EXCL | _SAFELY
_NAME: Final = re.compile(r"([0-9a-f]{32})\.(?:(\d{1,9})\.seg|(lock)|(ack))")
_TEMPORARY: Final = re.compile(r"[0-9a-f]{32}\.lock\.[0-9a-f]+")
_MADV_POPULATE_WRITE: Final = 23
_STEP: Final = 64 * 1024


@attrs.frozen(kw_only=True)
class _Identity:
    """
    Whose rows a segment holds; *size* is 0 where it was not preallocated.
    """

    format: int
    service: str
    node: str
    store: str
    writer: str
    size: int = 0

    def frame(self, base: int = 0, size: int = 0) -> bytes:
        known = attrs.asdict(attrs.evolve(self, size=size))
        return _frame(_HEAD, base, json.dumps(known).encode())


def _identity(payload: bytes) -> _Identity | None:
    """
    Read a header; a newer format may have changed everything but its number.
    """
    try:
        known = json.loads(payload)
        texts = {
            k: str(known.get(k, "")) for k in ("service", "node", "store", "writer")
        }
        return _Identity(
            format=int(known["format"]), size=int(known.get("size", 0)), **texts
        )
    except (AttributeError, KeyError, TypeError, ValueError):
        return None


def _read_fd(fd: int) -> bytes:
    return os.pread(fd, os.fstat(fd).st_size, 0)


def _open_own(path: Path, flags: int = os.O_RDONLY) -> int:
    """
    Open a regular file of ours.

    Raises:
        OSError: it is something else, or not to be had.
    """
    fd = os.open(path, flags | _SAFELY)
    fault = _foreign(os.fstat(fd))
    if fault:
        os.close(fd)
        raise PermissionError(errno.EPERM, fault, str(path))
    return fd


def _foreign(status: os.stat_result) -> str:
    if not stat.S_ISREG(status.st_mode):
        return "not a regular file"
    if status.st_uid != os.geteuid():
        return f"owned by uid {status.st_uid}, not by {os.geteuid()}"
    return ""


def _read_path(path: Path) -> bytes:
    """
    Read a segment; one that is gone or not ours reads as empty.
    """
    try:
        fd = _open_own(path)
    except OSError:
        return b""
    try:
        return _read_fd(fd)
    except OSError:
        return b""
    finally:
        os.close(fd)


def _read_head(path: Path) -> tuple[_Identity | None, int]:
    """
    Return who wrote a file and the lowest index in it (0 if it does not say).
    """
    try:
        fd = _open_own(path)
    except OSError:
        return None, 0
    try:
        frame = _frame_at(os.pread(fd, 65_536, 0), 0)
    except OSError:
        frame = None
    finally:
        os.close(fd)
    if frame is None or frame[1] != _HEAD:
        return None, 0
    return _identity(frame[2]), frame[0]


def _is_at(path: Path, fd: int) -> bool:
    """
    Tell whether *path* still names the file behind *fd*.
    """
    try:
        there = path.stat(follow_symlinks=False)
    except OSError:
        return False
    return os.path.samestat(there, os.fstat(fd))


def _try_lock(fd: int) -> bool:
    # flock, not lockf: of those any close in the process would drop the lock.
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _usage(directory: Path) -> int:
    """
    Return the bytes that all writers together hold in *directory*.
    """
    total = 0
    for path in directory.iterdir():
        with suppress(FileNotFoundError):  # its owner has just retired it
            total += path.stat(follow_symlinks=False).st_size
    return total


def _prefault(area: mmap.mmap) -> None:
    """
    Have every page there and writable, so that a copy never waits for one.
    """
    for start in range(0, len(area), _STEP):
        try:
            area.madvise(_MADV_POPULATE_WRITE, start, _STEP)
        except (AttributeError, OSError, ValueError):  # before Linux 5.14
            for at in range(start, min(start + _STEP, len(area)), mmap.PAGESIZE):
                area[at] = 0
        time.sleep(0)  # madvise keeps the GIL: let callers in between


def _close_fd(fd: int) -> None:
    with suppress(OSError):  # the descriptor is gone all the same
        os.close(fd)


@attrs.define(eq=False)
class _Segment:
    """
    A segment that is being written, or has been and waits for its rows' delivery.

    *base* is the lowest index it may hold, *last* the highest one once it is sealed.
    *size* is what it may grow to; a mapped one has it from the beginning.
    """

    path: Path
    fd: int
    base: int
    size: int
    used: int
    area: mmap.mmap | None = None
    is_mapped: bool = False
    last: int = 0
    acked_at: float | None = None
    is_dirty: bool = True

    @property
    def length(self) -> int:
        return self.size if self.is_mapped else self.used

    def read(self) -> bytes:
        fd = self.fd  # works for a file that was renamed or removed under us, too
        return _read_fd(fd) if fd >= 0 else _read_path(self.path)

    def close(self) -> None:
        fd, self.fd = self.fd, -1
        area, self.area = self.area, None
        if area is not None:
            area.close()
        if fd >= 0:
            _close_fd(fd)

    def remove(self) -> None:
        self.close()
        _unlink(self.path)


def _unlink(path: Path) -> None:
    with suppress(OSError):  # then it counts against the limit, and survey names it
        path.unlink(missing_ok=True)


class _SpoolFull(OSError):
    """
    FASTEN_SPOOL_MAX_BYTES is reached.
    """


class _Journal:
    """
    The files of one writer: its lock, its ack, its segments.
    """

    def __init__(self, directory: Path, who: _Identity, *, max_bytes: int) -> None:
        self.directory, self.who = directory, who
        self._max_bytes = max_bytes
        self._used = 0  # by all writers, when last measured, and what came since
        self._number = 0
        self._lock_fd = self._ack_fd = -1

    def open(self, acked: int) -> None:
        """
        Create the files; again, if they were removed.

        Raises:
            OSError: the directory cannot be used.
        """
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.lock()
        self.measure()
        path = self._path("ack")
        fd = os.open(path, os.O_RDWR | os.O_CREAT | _SAFELY, 0o600)
        old, self._ack_fd = self._ack_fd, fd
        if old >= 0:
            _close_fd(old)
        self.note(acked, is_done=False)

    def lock(self) -> None:
        """
        Put a locked file in place: it is never seen there unlocked.
        """
        temporary = self._path(f"lock.{os.urandom(4).hex()}")
        fd = os.open(temporary, _NEW, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.write(fd, self.who.frame())
            temporary.rename(self._path("lock"))
        except OSError:
            os.close(fd)
            _unlink(temporary)
            raise
        self._lock_fd, old = fd, self._lock_fd
        if old >= 0:
            _close_fd(old)

    def is_locked(self) -> bool:
        return _is_at(self._path("lock"), self._lock_fd)

    def note(self, acked: int, *, is_done: bool) -> None:
        """
        Write down how far delivery got; losing it costs a replay, no row.
        """
        with suppress(OSError):
            _write_ack(self._ack_fd, acked, is_done=is_done)

    def measure(self) -> None:
        """
        Look what all writers hold: callers cannot wait for that.
        """
        self._used = _usage(self.directory)

    def excess(self, size: int) -> int:
        """
        Return the bytes by which *size* more would go over the limit.
        """
        return self._used + size - self._max_bytes

    def spend(self, size: int) -> None:
        """
        Account for *size* bytes more.

        Raises:
            OSError: that is over the limit.
        """
        if self.excess(size) > 0:
            raise _SpoolFull(errno.EDQUOT, os.strerror(errno.EDQUOT))
        self._used += size

    def map(self, base: int, size: int) -> _Segment:
        """
        Make a segment that rows are copied into; all of it exists beforehand, since
        a hole on a full disk is a SIGBUS.

        Raises:
            OSError: there is no room.
        """
        head = self.who.frame(base, size)
        path, fd = self._create(size, 0)
        try:
            os.posix_fallocate(fd, 0, size)
            area = mmap.mmap(fd, size)
            _prefault(area)
            area[: len(head)] = head
        except (OSError, ValueError) as error:
            os.close(fd)
            _unlink(path)
            raise OSError(getattr(error, "errno", errno.ENOMEM), str(error)) from error
        return _Segment(path, fd, base, size, len(head), area, is_mapped=True)

    def appendable(self, base: int, length: int) -> _Segment:
        """
        Make a segment that is written to by the system call, with room for *length*.

        Raises:
            OSError: there is no room.
        """
        head = self.who.frame(base)
        path, fd = self._create(len(head), os.O_APPEND)
        try:
            if os.write(fd, head) != len(head):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            os.close(fd)
            _unlink(path)
            raise
        size = max(FULL_SEGMENT, length + len(head))
        return _Segment(path, fd, base, size, len(head))

    def _create(self, size: int, flags: int) -> tuple[Path, int]:
        self.spend(size)
        while True:
            self._number += 1
            path = self._path(f"{self._number}.seg")
            try:
                fd = os.open(path, _NEW | flags, 0o600)
            except FileExistsError:  # a signal handler was here between two lines
                continue
            # Whoever adopts asks for the lock file; should that get lost, for this.
            _try_lock(fd)
            return path, fd

    def sync_names(self) -> None:
        """
        Make the names of new files outlive a power cut, as their bytes do.
        """
        fd = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def close(self) -> None:
        """
        Close, never unlock: after a fork the lock is the parent's too.
        """
        for fd in (self._ack_fd, self._lock_fd):
            if fd >= 0:
                _close_fd(fd)
        self._lock_fd = self._ack_fd = -1

    def remove(self) -> None:
        for name in ("ack", "lock"):
            _unlink(self._path(name))

    def _path(self, suffix: str) -> Path:
        return self.directory / f"{self.who.writer}.{suffix}"


def _write_ack(fd: int, acked: int, *, is_done: bool) -> None:
    os.pwrite(fd, _frame(_ACK, acked, b"done" if is_done else b"more"), 0)


def _sentence(error: OSError, directory: Path | None, max_bytes: int) -> str:
    """
    Say what is wrong with the spool, and the cure.
    """
    what = f"spool {directory}: {error.strerror or error}"
    if isinstance(error, _SpoolFull):
        return (
            f"spool {directory}: FASTEN_SPOOL_MAX_BYTES ({max_bytes}) is reached; "
            "raise it, or see what keeps the store from catching up"
        )
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT:
            return f"{what}; free space there, or set FASTEN_SPOOL_DIR elsewhere"
        case errno.EFBIG:
            return f"{what}; raise the file size limit (ulimit -f)"
        case errno.EMFILE | errno.ENFILE:
            return f"{what}; raise the limit of open files (ulimit -n)"
        case errno.ENOTDIR | errno.EEXIST:
            return f"{what}; set FASTEN_SPOOL_DIR to a directory"
    uid = os.geteuid() if hasattr(os, "geteuid") else "this user"
    return f"{what}; make it writable for uid {uid}, or set FASTEN_SPOOL_DIR elsewhere"


# --- the spool of this process ----------------------------------------------------


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
        self._directory = directory if fcntl is not None else None
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
        self._lock = threading.RLock()
        # Held by whoever does the file work; callers never wait for it.
        self._tending = threading.Lock()
        # Held across fdatasync: who waits for it shares the next one. Never taken
        # by who holds _lock.
        self._syncing = threading.RLock()

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
        self._cache: deque[_Row] = deque()
        self._staged: list[_Row] = []  # left the cache, not yet taken
        self._held: list[_Row] = []  # taken, not yet acknowledged
        self._walk: _Walk | None = None
        self._high_water = 0

    def _reset_files(self) -> None:
        self._journal: _Journal | None = None
        self._opening = 0  # how many appends are creating a file
        self._main: _Segment | None = None  # rows are copied into this one,
        self._side: _Segment | None = None  # else written to this one
        self._spare: _Segment | None = None
        self._closed: list[_Segment] = []
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
                body = start + _SIZE
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
                    _pack_header(area, start, _ROW_MAGIC, check, length, index)
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
        self._settle()
        self._open()
        room = _SIZE + len(payload)
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
        frames = [_frame(_DOUBT, i) for i in open_ones]
        frames.append(_frame(_INNER if open_ones else _ROW, index, payload))
        is_written = self._write(b"".join(frames), may_copy=self._halfway == index)
        if not is_written:
            self._memory_only += 1
            self._unwritten_from = self._unwritten_from or index
        if self._is_cache_full():
            return is_written
        self._cache.append((index, row))
        return True

    def _write(self, data: bytes, *, may_copy: bool) -> bool:
        """
        Copy frames into the main segment, if that is free and has room, or else write
        them to the side; false if neither can be done.
        """
        start, main = self._offset, self._main
        end = start + len(data)
        if may_copy and main is not None and end <= self._limit:
            self._offset = end
            self._area[start + _SIZE : end] = data[_SIZE:]
            self._area[start : start + _SIZE] = data[:_SIZE]
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

    def _side_for(self, length: int) -> _Segment | None:
        side = self._side
        if side is not None and side.used + length <= side.size:
            return side
        journal = self._journal
        if journal is None or self._opening > 1:
            return None
        self._opening += 1
        try:
            fresh = journal.appendable(self._base(), length)
            if self._is_power:
                journal.sync_names()
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
            self._write(_frame(_VOID, index), may_copy=True)
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

    def _promote(self, spare: _Segment) -> None:
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

    def _new_journal(self) -> _Journal:
        directory = self._directory
        if directory is None:
            raise FileNotFoundError(errno.ENOENT, "no directory")
        who = _Identity(
            format=FORMAT,
            service=self._service,
            node=self._node,
            store=self._store,
            writer=self.writer_id,
        )
        journal = _Journal(directory, who, max_bytes=self._max_bytes)
        try:
            journal.open(self._acked)
        except OSError:
            journal.close()
            raise
        return journal

    def _fail(self, error: OSError) -> None:
        self._is_broken = True
        self._fault = _sentence(error, self._directory, self._max_bytes)
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

    def _stage(self, cache: deque[_Row], ready: int, limit: int) -> None:
        """
        Move rows from the cache to the stage, in order; a few more than are needed.
        """
        staged, pop = self._staged, cache.popleft
        for _ in range(min(ready, limit + _NESTING - len(staged))):
            staged.append(pop())
        staged.sort(key=itemgetter(0))

    def _collect(self, last: int, limit: int) -> Batch:
        rows: list[_Row] = []
        missing: list[tuple[int, int]] = []
        staged, used, at = self._staged, 0, self._taken
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

    def _look_up(self, at: int, end: int, bound: int, limit: int) -> Batch:
        """
        Read the rows above *at*, up to *end*, from the journal.
        """
        if self._walk is None or end > self._walk.bound:
            self._walk = _Walk(self._reader(at, bound).frames(), bound)
        rows: list[_Row] = []
        missing: list[tuple[int, int]] = []
        for frame in self._walk.upto(end):
            row = _row_of(frame)
            if row is None or frame[0] <= at:
                continue
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
            _add_range(missing, first, void - 1)
            first = void + 1
        _add_range(missing, first, end)

    def _reader(self, after: int, bound: int) -> _Reader:
        with self._lock:
            segments = [s for s in (self._main, self._side) if s is not None]
            segments += [s for s in self._closed if s.last > after]
        return _Reader([(s.base, s.read) for s in segments], after, bound)

    def batches(self, after: int, limit: int) -> Iterator[Batch]:
        """
        Read again what is still in the journal above *after*, delivered or not.

        This is how a store that went back is refilled. What is gone because it was
        acknowledged long ago does not count as missing.
        """
        with self._lock:
            bound = self._settled()
        floor = max(self._acked, after)
        return _batches(self._reader(after, bound), after, floor, limit)

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

    def _detach(self, *segments: _Segment | None) -> bool:
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
        if self._seen != self._last:
            self._seen, self._touched_at = self._last, now
        if now >= self._retry_at and (self._is_broken or self._unwritten_from):
            self._recover()
        journal = self._journal
        if journal is None:
            return
        if now >= self._look_at:
            self._look_at = now + _LOOK_S
            self._look_after(journal)
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

    def _remove(self, segment: _Segment) -> None:
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

    def _provide(self, journal: _Journal, now: float) -> None:
        """
        Keep one segment ready while there are rows, none in quiet times.
        """
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

    def _make_side(self, journal: _Journal) -> None:
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

    def _make_spare(self, journal: _Journal) -> None:
        if not hasattr(os, "posix_fallocate"):
            return  # rows go to the side, each by a system call
        size = min(FIRST_SEGMENT << max(0, self._maps - 1), FULL_SEGMENT)
        size = max(_STEP, min(size, self._max_bytes // 8 // _STEP * _STEP))
        try:
            self._make_room(journal, size)
            spare = journal.map(self._base(), size)
            if self._is_power:
                journal.sync_names()
        except OSError as error:
            # Not broken: what is open may still have room, or a smaller write.
            self._fault = _sentence(error, self._directory, self._max_bytes)
            return
        with self._lock:
            is_wanted = self._journal is journal  # not closed meanwhile
            if is_wanted:
                self._spare = spare
        if not is_wanted:
            spare.remove()
        self._maps += 1
        self._fault, self._provide_at = "", 0.0

    def _make_room(self, journal: _Journal, size: int) -> None:
        """
        Near the limit, delivered segments go before their 15 minutes are over.
        """
        journal.measure()
        excess = journal.excess(size)
        if excess > 0 and self._left() < _STEP:
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
        first = self._unwritten_from
        try:
            # Until this is done, callers keep away from the files.
            journal = self._journal or self._new_journal()
            self._make_room(journal, FIRST_SEGMENT)
            side = journal.appendable(self._base(), 0)  # or the trouble is not over
            rows = self._reopen(journal, side)
            first = max(first, self._acked + 1)
            rows = sorted((row for row in rows if row[0] >= first), key=itemgetter(0))
            self._rewrite(journal, [(index, _ROW, pack(row)) for index, row in rows])
        except OSError as error:
            self._unwritten_from = first
            self._fail(error)
        else:
            self._fault = ""

    def _reopen(self, journal: _Journal, side: _Segment) -> list[_Row]:
        """
        Let rows go to *side* from now on; return those in memory until then.
        """
        with self._lock:
            inside, self._is_inside = self._is_inside, True
            try:
                self._seal_side()
                self._journal, self._side = journal, side
                self._is_broken, self._unwritten_from = False, 0
                return [*self._held, *self._staged, *self._cache]
            finally:
                self._is_inside = inside

    def _rewrite(self, journal: _Journal, frames: list[_Frame]) -> None:
        """
        Write frames (ascending) again, into segments of their own.

        Raises:
            OSError: there is no room, or no trust in what was written.
        """
        while frames:
            part = frames[:_PART]
            frames = frames[_PART:]
            data = b"".join(_frame(kind, index, load) for index, kind, load in part)
            segment = journal.appendable(part[0][0], len(data))
            try:
                journal.spend(len(data))
                if os.write(segment.fd, data) != len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                if self._is_power:
                    os.fdatasync(segment.fd)
                    journal.sync_names()
            except OSError:
                segment.remove()
                raise
            segment.used += len(data)
            segment.last, segment.is_dirty = part[-1][0], False
            self._closed.append(segment)

    def _look_after(self, journal: _Journal) -> None:
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
            if segment.fd >= 0 and not _is_at(segment.path, segment.fd):
                self._rescue(journal, segment)

    def _rescue(self, journal: _Journal, segment: _Segment) -> None:
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
    def _undelivered(segment: _Segment, after: int) -> list[_Frame]:
        frames, _ = _parse(segment.read())
        return sorted(f for f in frames if f[1] <= _DOUBT and f[0] > after)

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

    def _distrust(self, segment: _Segment, error: OSError) -> None:
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
                return int(rows[0][1][_TIMESTAMP])
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

    def _segments(self) -> list[_Segment]:
        known = (self._main, self._side, self._spare, *tuple(self._closed))
        return [segment for segment in known if segment is not None]


# --- the spools of dead processes -------------------------------------------------


class Orphan:
    """
    What a dead writer left, held under its lock.

    *acked* is how far its own account of deliveries goes; the store's may go further.
    """

    def __init__(self, directory: Path, who: _Identity, lock_fd: int) -> None:
        self.writer_id, self.service, self.node = who.writer, who.service, who.node
        self._directory = directory
        self._lock_fd = lock_fd
        self._segments = _segments_of(directory, who.writer)
        ack = _read_ack(self._ack_path)
        self.acked = self._seen = ack.through if ack else 0
        self.is_done = bool(ack and ack.is_done) or not self._segments
        self.done_at = ack.at if ack else 0.0
        # Without an account, what is gone from the front was delivered.
        bases = [_read_head(path)[1] for path in self._segments]
        self._floor = self.acked if ack else max(0, min(bases, default=0) - 1)
        self._bases = bases

    @property
    def _ack_path(self) -> Path:
        return self._directory / f"{self.writer_id}.ack"

    @property
    def bytes_on_disk(self) -> int:
        """
        Return the size of its segments.
        """
        return sum(path.stat().st_size for path in self._segments if path.exists())

    def batches(self, after: int, limit: int) -> Iterator[Batch]:
        """
        Read the rows above *after*; one index to the next, whatever file they are in.
        """
        reads = [partial(_read_path, path) for path in self._segments]
        reader = _Reader(zip(self._bases, reads, strict=True), after)
        for batch in _batches(reader, after, max(after, self._floor), limit):
            self._seen = max(self._seen, batch.last)
            yield batch

    def ack(self, index: int) -> None:
        """
        Note that everything up to *index* is delivered.
        """
        self.acked = max(self.acked, index)
        self._note(is_done=False)

    def done(self) -> None:
        """
        Note that everything read is delivered, and let go.

        The files go 15 minutes later, with somebody's `adopt`; or now, with `purge`.
        """
        self.acked = max(self.acked, self._seen)
        self._note(is_done=True)
        self.release()

    def _note(self, *, is_done: bool) -> None:
        with suppress(OSError):  # it costs a replay, no row
            fd = os.open(self._ack_path, os.O_RDWR | os.O_CREAT | _SAFELY, 0o600)
            try:
                _write_ack(fd, self.acked, is_done=is_done)
            finally:
                os.close(fd)

    def purge(self) -> None:
        """
        Remove the files and let go.
        """
        for path in (*self._segments, self._ack_path, self._lock_path):
            _unlink(path)
        self.release()

    @property
    def _lock_path(self) -> Path:
        return self._directory / f"{self.writer_id}.lock"

    def release(self) -> None:
        """
        Let go, as the files are: somebody else may adopt them.
        """
        fd, self._lock_fd = self._lock_fd, -1
        if fd >= 0:
            # Unlock, not just close: a forked child may hold the descriptor too.
            fcntl.flock(fd, fcntl.LOCK_UN)
            _close_fd(fd)

    def after_fork_in_child(self) -> None:
        """
        Forget it: it is still the parent's.
        """
        fd, self._lock_fd = self._lock_fd, -1
        if fd >= 0:
            _close_fd(fd)


class Leftover(NamedTuple):
    """
    A file in the spool that no process of this service and store takes care of.
    """

    path: Path
    reason: str
    size: int
    age_s: float


def has_foreign(directory: Path) -> bool:
    """
    Tell whether any segment is there, without opening one.
    """
    names = [_NAME.fullmatch(path.name) for path in _listing(directory)]
    return any(name and name[2] for name in names)


def adopt(
    directory: Path,
    *,
    service: str,
    store: str,
    now: Callable[[], float] = time.time,
) -> list[Orphan]:
    """
    Take over what dead writers of *service* left for *store*.

    Those that were done 15 minutes ago are removed. *now* is in seconds since 1970.
    """
    adopted = []
    for orphan in _dead(directory, service, store):
        if not orphan.is_done:
            adopted.append(orphan)
        elif now() - orphan.done_at >= RETAIN_S:
            orphan.purge()
        else:
            orphan.release()
    _tidy(directory, now())
    return adopted


def recall(directory: Path, *, service: str, store: str) -> list[Orphan]:
    """
    Take over what dead writers left that was delivered, and is kept for 15 minutes
    in case the store goes back.
    """
    recalled = []
    for orphan in _dead(directory, service, store):
        if orphan.is_done:
            recalled.append(orphan)
        else:
            orphan.release()
    return recalled


def survey(
    directory: Path,
    *,
    service: str,
    store: str,
    now: Callable[[], float] = time.time,
) -> list[Leftover]:
    """
    Name each file that `adopt` leaves alone, with the reason and the cure.
    """
    leftovers = []
    for path in _listing(directory):
        try:
            status = path.stat(follow_symlinks=False)
        except OSError:
            continue
        reason = _foreign(status) or _objection(path, service, store)
        if reason:
            age_s = max(0.0, now() - status.st_mtime)
            leftovers.append(Leftover(path, reason, status.st_size, age_s))
    return leftovers


def _objection(path: Path, service: str, store: str) -> str:
    named = _NAME.fullmatch(path.name)
    if named is None or named[2] is None:
        return ""
    try:
        os.close(_open_own(path))
    except OSError as error:
        return f"{error.strerror}; make it readable for uid {os.geteuid()}"
    writer = named[1]
    lock_fd = _claim_lock(path.parent, writer)
    if lock_fd is None:
        return ""  # its writer lives
    os.close(lock_fd)
    who = _who(path.parent, writer)
    if who is None:
        return "nothing tells any more whose rows these are; keep it for forensics"
    if who.format > FORMAT:
        return f"format {who.format} of a newer fasten; upgrade to deliver its rows"
    if who.service != service:
        return f"rows of service {who.service!r}; start it, or run its `fasten drain`"
    if who.store != store:
        return "rows for another store; deliver them with `fasten drain --dsn DSN`"
    return ""


def _listing(directory: Path) -> list[Path]:
    try:
        return sorted(directory.iterdir())
    except OSError:
        return []


def _segments_of(directory: Path, writer: str) -> list[Path]:
    names = [(path, _NAME.fullmatch(path.name)) for path in _listing(directory)]
    return [path for path, name in names if name and name[2] and name[1] == writer]


def _dead(directory: Path, service: str, store: str) -> Iterator[Orphan]:
    names = [_NAME.fullmatch(path.name) for path in _listing(directory)]
    for writer in sorted({name[1] for name in names if name}):
        who = _who(directory, writer)
        if who is None or who.format > FORMAT:
            continue
        if (who.service, who.store) != (service, store):
            continue
        lock_fd = _claim_lock(directory, writer)
        if lock_fd is not None:
            yield Orphan(directory, who, lock_fd)


def _who(directory: Path, writer: str) -> _Identity | None:
    """
    Find a readable header: each file but the .ack begins with one.
    """
    for path in (directory / f"{writer}.lock", *_segments_of(directory, writer)):
        who, _ = _read_head(path)
        if who is not None:
            return who
    return None


def _claim_lock(directory: Path, writer: str) -> int | None:
    """
    Lock a dead writer's lock file and return it open; None if the writer lives.
    """
    path = directory / f"{writer}.lock"
    try:
        fd = _open_own(path)
    except FileNotFoundError:
        return _replace_lock(path, _segments_of(directory, writer))
    except OSError:
        return None
    # Another may have removed it between our open and our lock.
    if _try_lock(fd) and _is_at(path, fd):
        return fd
    os.close(fd)
    return None


def _replace_lock(path: Path, segments: list[Path]) -> int | None:
    """
    Where a lock file got lost, its writer lives if any segment is locked.
    """
    if not segments or any(_is_locked(segment) for segment in segments):
        return None
    try:
        fd = os.open(path, _NEW, 0o600)
    except OSError:
        return None
    if _try_lock(fd) and _is_at(path, fd):
        return fd
    os.close(fd)
    return None


def _is_locked(path: Path) -> bool:
    try:
        fd = _open_own(path)
    except OSError:
        return False
    is_free = _try_lock(fd)
    os.close(fd)
    return not is_free


def quarantine(directory: Path, writer_id: str, row: _Row, reason: str) -> bool:
    """
    Keep a row that the store refuses, in a file beside the segments; false if it
    cannot be written.
    """
    entry = {"index": row[0], "reason": reason, "row": pack(row[1]).decode()}
    line = json.dumps(entry).encode() + b"\n"
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | _SAFELY
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(directory / f"{writer_id}.quarantine", flags, 0o600)
    except OSError:
        return False
    try:
        return os.write(fd, line) == len(line)
    except OSError:
        return False
    finally:
        os.close(fd)


class Quarantined(NamedTuple):
    """
    A row that was put aside, in `Pending` order, and the file that holds it.
    """

    path: Path
    reason: str
    row: tuple[Any, ...]


def quarantined(directory: Path) -> Iterator[Quarantined]:
    """
    Read the rows that were put aside; lines that cannot be read are left out.
    """
    for path in _listing(directory):
        if path.suffix != ".quarantine":
            continue
        for line in _read_path(path).splitlines():
            with suppress(KeyError, TypeError, ValueError):
                entry = json.loads(line)
                row = unpack(entry["row"].encode())
                yield Quarantined(path, str(entry["reason"]), row)


class _Ack(NamedTuple):
    through: int
    is_done: bool
    at: float


def _read_ack(path: Path) -> _Ack | None:
    try:
        fd = _open_own(path)
    except OSError:
        return None
    try:
        frame, at = _frame_at(os.pread(fd, 64, 0), 0), os.fstat(fd).st_mtime
    except OSError:
        return None
    finally:
        os.close(fd)
    if frame is None or frame[1] != _ACK:
        return None
    return _Ack(frame[0], frame[2] == b"done", at)


def _tidy(directory: Path, now: float) -> None:
    """
    Remove lock files that never got their name: their writer died before its first row.
    """
    for path in _listing(directory):
        if _TEMPORARY.fullmatch(path.name) and not _is_locked(path):
            try:
                is_old = now - path.stat(follow_symlinks=False).st_mtime > IDLE_S
            except OSError:
                continue
            if is_old:
                _unlink(path)
