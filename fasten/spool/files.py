# SPDX-License-Identifier: Apache-2.0
"""
What lies in the spool's directory: locks, accounts of delivery, segments.

A writer has `<writer>.lock`, locked for life, `<writer>.ack`, and `<writer>.<n>.seg`
for each of its segments. What the bytes in them mean is told by `frames`.
"""

from __future__ import annotations

import errno
import mmap
import os
import re
import stat
import time
from contextlib import suppress
from pathlib import Path
from typing import Final, NamedTuple

import attrs

from fasten.spool.frames import (
    ACK,
    HEAD,
    Identity,
    decode_frame,
    encode_frame,
    read_identity,
)

try:
    import fcntl
except ImportError:  # pragma: no cover - no flock, so nobody could tell who is alive
    fcntl = None  # type: ignore[assignment]

__all__ = [
    "FIRST_SEGMENT",
    "FULL_SEGMENT",
    "HAS_LOCKS",
    "NAME",
    "SAFELY",
    "STEP",
    "TEMPORARY",
    "Ack",
    "Journal",
    "Segment",
    "claim_lock",
    "close_fd",
    "foreign",
    "is_at",
    "is_locked",
    "listing",
    "open_own",
    "read_ack",
    "read_head",
    "read_path",
    "segments_of",
    "sentence",
    "unlink",
    "unlock",
    "who_wrote",
    "write_ack",
]

FIRST_SEGMENT: Final = 256 * 1024
"""The size of a writer's first segments."""

FULL_SEGMENT: Final = 1024 * 1024
"""The size that they grow to."""

FAULTED: Final = 512 * 1024
"""How much is made present at once: 0.4 ms, and a busy caller then has 5 for itself."""

HAS_LOCKS: Final = fcntl is not None
"""Whether this platform can tell the dead from the living."""

# A name in the spool may be a link or a FIFO that somebody planted: never follow it,
# never wait for its other end.
SAFELY: Final = (
    getattr(os, "O_NOFOLLOW", 0)
    | getattr(os, "O_NONBLOCK", 0)
    | getattr(os, "O_CLOEXEC", 0)
)
"""Flags for opening a name that may not be what it seems."""

NAME: Final = re.compile(r"([0-9a-f]{32})\.(?:(\d{1,9})\.seg|(lock)|(ack))")
"""A writer's file: its id, and the number if it is a segment."""

TEMPORARY: Final = re.compile(r"[0-9a-f]{32}\.lock\.[0-9a-f]+")
"""A lock file on its way to its name."""

STEP: Final = 64 * 1024
"""The smallest segment; sizes are multiples of it."""

_NEW: Final = os.O_RDWR | os.O_CREAT | os.O_EXCL | SAFELY
_MADV_POPULATE_WRITE: Final = 23
_DONE: Final = b"done"
_MORE: Final = b"more"


def _read_fd(fd: int) -> bytes:
    return os.pread(fd, os.fstat(fd).st_size, 0)


def open_own(path: Path, flags: int = os.O_RDONLY) -> int:
    """
    Open a regular file of ours.

    Raises:
        OSError: it is something else, or not to be had.
    """
    fd = os.open(path, flags | SAFELY)
    fault = foreign(os.fstat(fd))
    if fault:
        os.close(fd)
        raise PermissionError(errno.EPERM, fault, str(path))
    return fd


def foreign(status: os.stat_result) -> str:
    """
    Say why a file is not one of ours; empty if it is.
    """
    if not stat.S_ISREG(status.st_mode):
        return "not a regular file"
    if status.st_uid != os.geteuid():
        return f"owned by uid {status.st_uid}, not by {os.geteuid()}"
    return ""


def read_path(path: Path) -> bytes:
    """
    Read a segment; one that is gone or not ours reads as empty.
    """
    try:
        fd = open_own(path)
    except OSError:
        return b""
    try:
        return _read_fd(fd)
    except OSError:
        return b""
    finally:
        os.close(fd)


def read_head(path: Path) -> tuple[Identity | None, int]:
    """
    Return who wrote a file and the lowest index in it (0 if it does not say).
    """
    try:
        fd = open_own(path)
    except OSError:
        return None, 0
    try:
        frame = decode_frame(os.pread(fd, 65_536, 0), 0)
    except OSError:
        frame = None
    finally:
        os.close(fd)
    if frame is None or frame[1] != HEAD:
        return None, 0
    return read_identity(frame[2]), frame[0]


def is_at(path: Path, fd: int) -> bool:
    """
    Tell whether *path* still names the file behind *fd*.
    """
    try:
        there = path.stat(follow_symlinks=False)
    except OSError:
        return False
    return os.path.samestat(there, os.fstat(fd))


def try_lock(fd: int) -> bool:
    """
    Lock a file unless somebody else has; true on success.
    """
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


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _prefault(area: mmap.mmap) -> None:
    """
    Have every page there and writable, so that a copy never waits for one.
    """
    for start in range(0, len(area), FAULTED):
        end = min(start + FAULTED, len(area))
        try:
            area.madvise(_MADV_POPULATE_WRITE, start, end - start)
        except (AttributeError, OSError, ValueError):  # before Linux 5.14
            for at in range(start, end, mmap.PAGESIZE):
                area[at] = 0
        time.sleep(0)  # madvise keeps the GIL: let callers in between


def close_fd(fd: int) -> None:
    """
    Close a descriptor, if it is one.
    """
    if fd < 0:
        return
    with suppress(OSError):  # the descriptor is gone all the same
        os.close(fd)


@attrs.define(eq=False)
class Segment:
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
        """
        Return the bytes it takes on disk.
        """
        return self.size if self.is_mapped else self.used

    def read(self) -> bytes:
        """
        Return all of it; of an open one also where it was removed under us.
        """
        fd = self.fd
        return _read_fd(fd) if fd >= 0 else read_path(self.path)

    def close(self) -> None:
        """
        Close it, never unlock: after a fork it is the parent's too.
        """
        fd, self.fd = self.fd, -1
        area, self.area = self.area, None
        if area is not None:
            area.close()
        close_fd(fd)

    def remove(self) -> None:
        """
        Close and unlink it.
        """
        self.close()
        unlink(self.path)


def unlink(path: Path) -> None:
    """
    Remove a file, if it can be.
    """
    with suppress(OSError):  # then it counts against the limit, and survey names it
        path.unlink(missing_ok=True)


class SpoolFull(OSError):
    """
    FASTEN_SPOOL_MAX_BYTES is reached.
    """


class Journal:
    """
    The files of one writer: its lock, its ack, its segments.

    *is_power*: the names of segments outlive a power cut before they are written to.
    """

    def __init__(
        self, directory: Path, who: Identity, *, max_bytes: int, is_power: bool = False
    ) -> None:
        self.directory, self.who = directory, who
        self._max_bytes, self._is_power = max_bytes, is_power
        self._used = 0  # by all writers, when last measured, and what came since
        self._number = 0
        self._lock_fd = self._ack_fd = -1
        self._is_rooted = False  # whether the directory's own name was synced
        self.memory = b""

    def open(self, acked: int) -> None:
        """
        Create the files; again, if they were removed.

        Raises:
            OSError: the directory cannot be used.
        """
        self._is_rooted = False
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.lock()
        self.measure()
        path = self._path("ack")
        fd = os.open(path, os.O_RDWR | os.O_CREAT | SAFELY, 0o600)
        old, self._ack_fd = self._ack_fd, fd
        close_fd(old)
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
            unlink(temporary)
            raise
        old, self._lock_fd = self._lock_fd, fd
        close_fd(old)

    def is_locked(self) -> bool:
        """
        Tell whether the lock file is still there.
        """
        return is_at(self._path("lock"), self._lock_fd)

    def note(self, acked: int, *, is_done: bool) -> None:
        """
        Write down how far delivery got; losing it costs a replay, no row.
        """
        with suppress(OSError):
            write_ack(self._ack_fd, acked, is_done=is_done, memory=self.memory)

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
            raise SpoolFull(errno.EDQUOT, os.strerror(errno.EDQUOT))
        self._used += size

    def map(self, base: int, size: int) -> Segment:
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
            unlink(path)
            raise OSError(getattr(error, "errno", errno.ENOMEM), str(error)) from error
        return Segment(path, fd, base, size, len(head), area, is_mapped=True)

    def appendable(self, base: int, length: int) -> Segment:
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
            unlink(path)
            raise
        size = max(FULL_SEGMENT, length + len(head))
        return Segment(path, fd, base, size, len(head))

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
            try_lock(fd)
            if self._is_power:
                self._sync_new(path, fd)
            return path, fd

    def _sync_new(self, path: Path, fd: int) -> None:
        try:
            self._sync_names()
        except OSError:
            os.close(fd)
            unlink(path)
            raise

    def _sync_names(self) -> None:
        """
        Make the names of new files outlive a power cut, as their bytes do; at first
        also those of the directories above, which may be as new.
        """
        _sync_directory(self.directory)
        if not self._is_rooted:
            self._sync_ancestors()
            self._is_rooted = True

    def _sync_ancestors(self) -> None:
        device = self.directory.stat().st_dev
        for parent in self.directory.resolve().parents:
            if parent.stat().st_dev != device:
                return  # a mount point is not new
            with suppress(PermissionError):
                _sync_directory(parent)

    def close(self) -> None:
        """
        Close, never unlock: after a fork the lock is the parent's too.
        """
        close_fd(self._ack_fd)
        close_fd(self._lock_fd)
        self._lock_fd = self._ack_fd = -1

    def remove(self) -> None:
        """
        Unlink what is not a segment.
        """
        for name in ("ack", "lock"):
            unlink(self._path(name))

    def _path(self, suffix: str) -> Path:
        return self.directory / f"{self.who.writer}.{suffix}"


def sentence(error: OSError, directory: Path | None, max_bytes: int) -> str:
    """
    Say what is wrong with the spool, and the cure.
    """
    what = f"spool {directory}: {error.strerror or error}"
    if isinstance(error, SpoolFull):
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


def listing(directory: Path) -> list[Path]:
    """
    Return what is in *directory*, nothing if it is none.
    """
    try:
        return sorted(directory.iterdir())
    except OSError:
        return []


def segments_of(directory: Path, writer: str) -> list[Path]:
    """
    Return a writer's segments.
    """
    try:
        # By their names: hundreds of writers may have left theirs here.
        with os.scandir(directory) as found:
            names = [file.name for file in found if file.name.startswith(writer)]
    except OSError:
        return []
    known = [NAME.fullmatch(name) for name in sorted(names)]
    return [
        directory / name[0] for name in known if name and name[2] and name[1] == writer
    ]


def who_wrote(directory: Path, writer: str) -> Identity | None:
    """
    Find a readable header: each file but the .ack begins with one.
    """
    who, _ = read_head(directory / f"{writer}.lock")
    if who is not None:
        return who
    heads = map(read_head, segments_of(directory, writer))
    return next((who for who, _ in heads if who is not None), None)


def claim_lock(directory: Path, writer: str) -> int | None:
    """
    Lock a dead writer's lock file and return it open; None if the writer lives.
    """
    path = directory / f"{writer}.lock"
    try:
        fd = open_own(path)
    except FileNotFoundError:
        return _replace_lock(path, segments_of(directory, writer))
    except OSError:
        return None
    # Another may have removed it between our open and our lock.
    if try_lock(fd) and is_at(path, fd):
        return fd
    os.close(fd)
    return None


def _replace_lock(path: Path, segments: list[Path]) -> int | None:
    """
    Where a lock file got lost, its writer lives if any segment is locked.
    """
    if not segments or any(is_locked(segment) for segment in segments):
        return None
    try:
        fd = os.open(path, _NEW, 0o600)
    except OSError:
        return None
    if try_lock(fd) and is_at(path, fd):
        return fd
    os.close(fd)
    return None


def unlock(fd: int) -> None:
    """
    Unlock and close: another process may hold the descriptor too, after a fork.
    """
    if fd >= 0:
        fcntl.flock(fd, fcntl.LOCK_UN)
        os.close(fd)


def is_locked(path: Path) -> bool:
    """
    Tell whether a process that lives holds the lock of a file.
    """
    try:
        fd = open_own(path)
    except OSError:
        return False
    is_free = try_lock(fd)
    os.close(fd)
    return not is_free


def write_ack(fd: int, acked: int, *, is_done: bool, memory: bytes = b"") -> None:
    """
    Write the one frame of an .ack file; *memory* is what the writer knew of its store.
    """
    said = (_DONE if is_done else _MORE) + memory
    os.pwrite(fd, encode_frame(ACK, acked, said), 0)


class Ack(NamedTuple):
    """
    A writer's account of its deliveries, and when it was written.
    """

    through: int
    is_done: bool
    at: float
    memory: bytes = b""


def read_ack(path: Path) -> Ack | None:
    """
    Return what an .ack file says, if it says anything.
    """
    try:
        fd = open_own(path)
    except OSError:
        return None
    try:
        frame, at = decode_frame(_read_fd(fd), 0), os.fstat(fd).st_mtime
    except OSError:
        return None
    finally:
        os.close(fd)
    if frame is None or frame[1] != ACK:
        return None
    said = frame[2]
    return Ack(frame[0], said.startswith(_DONE), at, said[len(_DONE) :])
