# SPDX-License-Identifier: Apache-2.0
"""
The spools of dead processes, and what else lies about: adopt, recall, survey.

Who is dead is told by a lock that nobody holds. Rows that the store refused are kept
here too, in files of their own.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Container, Iterator
from contextlib import suppress
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

from fasten.spool.files import (
    NAME,
    SAFELY,
    TEMPORARY,
    claim_lock,
    close_fd,
    foreign,
    is_locked,
    listing,
    open_own,
    read_ack,
    read_head,
    read_path,
    segments_of,
    unlink,
    unlock,
    who_wrote,
    write_ack,
)
from fasten.spool.frames import (
    FORMAT,
    TIMESTAMP,
    Batch,
    Identity,
    Reader,
    Row,
    account,
    pack,
    row_of,
    unpack,
)
from fasten.spool.queue import IDLE_S, RETAIN_S

__all__ = [
    "Backlog",
    "Leftover",
    "Orphan",
    "Quarantined",
    "adopt",
    "amend_quarantined",
    "backlog",
    "drop_quarantined",
    "has_foreign",
    "memories",
    "quarantine",
    "quarantined",
    "recall",
    "survey",
]


class Orphan:
    """
    What a dead writer left, held under its lock.

    *acked* is how far its own account of deliveries goes; the store's may go further.
    """

    def __init__(self, directory: Path, who: Identity, lock_fd: int) -> None:
        self.writer_id, self.store = who.writer, who.store
        self.service, self.node = who.service, who.node
        self._directory = directory
        self._lock_fd = lock_fd
        ack = read_ack(self._ack_path)
        self.acked = self._seen = ack.through if ack else 0
        self.memory = ack.memory if ack else b""
        self.is_done = bool(ack and ack.is_done) or not self._segments
        self.done_at = ack.at if ack else 0.0
        self._account = ack.through if ack else None

    # Read where they are needed: of hundreds that are done, none is.
    @cached_property
    def _segments(self) -> list[Path]:
        return segments_of(self._directory, self.writer_id)

    @cached_property
    def _bases(self) -> list[int]:
        return [read_head(path)[1] for path in self._segments]

    @cached_property
    def _floor(self) -> int:
        # Without an account, what is gone from the front was delivered.
        if self._account is not None:
            return self._account
        return max(0, min(self._bases, default=0) - 1)

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
        reads = [partial(read_path, path) for path in self._segments]
        reader = Reader(zip(self._bases, reads, strict=True), after)
        for batch in account(reader, after, max(after, self._floor), limit):
            self._seen = max(self._seen, batch.last)
            yield batch

    def ack(self, index: int) -> None:
        """
        Note that everything up to *index* is delivered.
        """
        self.acked = max(self.acked, index)
        self._note(is_done=False)

    def remember(self, memory: bytes) -> None:
        """
        Keep with the journal what is known of the store, as its writer did.
        """
        self.memory = memory
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
            fd = os.open(self._ack_path, os.O_RDWR | os.O_CREAT | SAFELY, 0o600)
            try:
                write_ack(fd, self.acked, is_done=is_done, memory=self.memory)
            finally:
                os.close(fd)

    def purge(self) -> None:
        """
        Remove the files and let go.
        """
        for path in (*self._segments, self._ack_path, self._lock_path):
            unlink(path)
        self.release()

    @property
    def _lock_path(self) -> Path:
        return self._directory / f"{self.writer_id}.lock"

    def release(self) -> None:
        """
        Let go, as the files are: somebody else may adopt them.
        """
        fd, self._lock_fd = self._lock_fd, -1
        unlock(fd)

    def after_fork_in_child(self) -> None:
        """
        Forget it: it is still the parent's.
        """
        fd, self._lock_fd = self._lock_fd, -1
        close_fd(fd)


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
    names = [NAME.fullmatch(path.name) for path in listing(directory)]
    return any(name and name[2] for name in names)


def adopt(
    directory: Path,
    *,
    service: str,
    store: str | None,
    now: Callable[[], float] = time.time,
    kept: list[Orphan] | None = None,
    most: int = sys.maxsize,
) -> list[Orphan]:
    """
    Take over what dead writers of *service* left for *store*; None means any store.

    Those that were done 15 minutes ago are removed; those that are done since are let
    go, or put into *kept*. *most* of either: each holds a descriptor; it ends when so
    many are adopted, and who is left has a turn in a later look. *now* is in seconds
    since 1970.
    """
    adopted: list[Orphan] = []
    for orphan in _dead(directory, service, None) if most else ():
        is_meant = store in (None, orphan.store)
        if orphan.is_done and now() - orphan.done_at >= RETAIN_S:
            orphan.purge()
        elif is_meant and not orphan.is_done:
            adopted.append(orphan)
            if len(adopted) == most:
                break
        elif is_meant and orphan.is_done and kept is not None and len(kept) < most:
            kept.append(orphan)
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


def memories(directory: Path, *, service: str, store: str) -> list[bytes]:
    """
    Return what each writer here, dead or alive, knew of the store it delivers to.
    """
    found = []
    for path in listing(directory):
        name = NAME.fullmatch(path.name)
        if name is None or not name[4]:
            continue
        who, ack = who_wrote(directory, name[1]), read_ack(path)
        if who and ack and ack.memory and (who.service, who.store) == (service, store):
            found.append(ack.memory)
    return found


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
    for path in listing(directory):
        try:
            status = path.stat(follow_symlinks=False)
        except OSError:
            continue
        reason = foreign(status) or _objection(path, service, store)
        if reason:
            age_s = max(0.0, now() - status.st_mtime)
            leftovers.append(Leftover(path, reason, status.st_size, age_s))
    return leftovers


class Backlog(NamedTuple):
    """
    What waits in a spool: how many rows, and the time of the oldest.
    """

    rows: int
    oldest_us: int


def backlog(directory: Path, *, service: str, store: str) -> Backlog | None:
    """
    Return what waits for *store* here, of the living and the dead, or None.
    """
    times: list[int] = []
    names = [NAME.fullmatch(path.name) for path in listing(directory)]
    for writer in sorted({name[1] for name in names if name and name[2]}):
        who, ack = who_wrote(directory, writer), read_ack(directory / f"{writer}.ack")
        if who is None or (who.service, who.store) != (service, store):
            continue
        if ack is None or not ack.is_done:
            times += _waiting(directory, writer, ack.through if ack else 0)
    return Backlog(len(times), min(times)) if times else None


def _waiting(directory: Path, writer: str, after: int) -> list[int]:
    paths = segments_of(directory, writer)
    bases = [read_head(path)[1] for path in paths]
    reads = [partial(read_path, path) for path in paths]
    frames = Reader(zip(bases, reads, strict=True), after).frames()
    rows = {frame[0]: row for frame in frames if (row := row_of(frame)) is not None}
    return [int(row[TIMESTAMP]) for row in rows.values()]


def _objection(path: Path, service: str, store: str) -> str:
    named = NAME.fullmatch(path.name)
    if named is None or named[2] is None:
        return ""
    try:
        os.close(open_own(path))
    except OSError as error:
        return f"{error.strerror}; make it readable for uid {os.geteuid()}"
    writer = named[1]
    lock_fd = claim_lock(path.parent, writer)
    if lock_fd is None:
        return ""  # its writer lives
    os.close(lock_fd)
    who = who_wrote(path.parent, writer)
    if who is None:
        return "nothing tells any more whose rows these are; keep it for forensics"
    if who.format > FORMAT:
        return f"format {who.format} of a newer fasten; upgrade to deliver its rows"
    if who.service != service:
        return f"rows of service {who.service!r}; start it, or run its `fasten drain`"
    ack = read_ack(path.parent / f"{writer}.ack")
    if who.store != store and not (ack and ack.is_done):
        return "rows for another store; deliver them with `fasten drain --dsn DSN`"
    return ""


def _dead(directory: Path, service: str, store: str | None) -> Iterator[Orphan]:
    names = [NAME.fullmatch(path.name) for path in listing(directory)]
    # In any order: where there are more than can be taken at once, each has its turn.
    for writer in {name[1] for name in names if name}:
        who = who_wrote(directory, writer)
        if who is None or who.format > FORMAT:
            continue
        if who.service != service or store not in (None, who.store):
            continue
        lock_fd = claim_lock(directory, writer)
        if lock_fd is not None:
            yield Orphan(directory, who, lock_fd)


def quarantine(
    directory: Path,
    writer_id: str,
    row: Row,
    reason: str,
    *,
    service: str = "",
    node: str = "",
) -> bool:
    """
    Keep a row that the store refuses, in a file beside the segments; false if it
    cannot be written. *service* and *node* are its writer's.
    """
    entry = {
        "index": row[0],
        "reason": reason,
        "service": service,
        "node": node,
        "row": pack(row[1]).decode(),
    }
    line = json.dumps(entry).encode() + b"\n"
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | SAFELY
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

    *service* and *node* are empty where they were not known.
    """

    path: Path
    reason: str
    row: tuple[Any, ...]
    service: str = ""
    node: str = ""


def quarantined(directory: Path) -> Iterator[Quarantined]:
    """
    Read the rows that were put aside, each once; what cannot be read is left out.
    """
    seen: set[str] = set()
    for path in listing(directory):
        if path.suffix != ".quarantine":
            continue
        for line in read_path(path).splitlines():
            with suppress(KeyError, TypeError, ValueError):
                entry = json.loads(line)
                row = unpack(entry["row"].encode())
                # A commit that was not answered has it put aside twice.
                if row[0] not in seen:
                    seen.add(row[0])
                    place = str(entry.get("service", "")), str(entry.get("node", ""))
                    yield Quarantined(path, str(entry["reason"]), row, *place)


def amend_quarantined(
    directory: Path, amend: Callable[[tuple[Any, ...]], tuple[Any, ...] | None]
) -> int:
    """
    Put other rows in the place of those that *amend* returns one for; return how many.

    The new line is written first, then the old one is blanked: no row is lost half-way.

    Raises:
        OSError: a file cannot be written.
    """
    amended = 0
    for path in listing(directory):
        if path.suffix == ".quarantine":
            at = 0
            for line in read_path(path).splitlines(keepends=True):
                amended += _amend_line(path, at, line, amend)
                at += len(line)
    return amended


def drop_quarantined(directory: Path, ids: Container[str]) -> None:
    """
    Blank the lines of rows that are not needed here any more, by their ids; files that
    are blank then, and of writers that are gone, are removed.

    Raises:
        OSError: a file cannot be written.
    """
    for path in listing(directory):
        if path.suffix != ".quarantine":
            continue
        at = 0
        for line in read_path(path).splitlines(keepends=True):
            if _id_in(line) in ids:
                with path.open("r+b", buffering=0) as file:
                    file.seek(at)
                    file.write(b" " * (len(line) - 1))
            at += len(line)
        # Whoever may write to it holds the lock of its writer.
        is_quiet = not (directory / f"{path.stem}.lock").exists()
        if is_quiet and not read_path(path).strip():
            unlink(path)


def _id_in(line: bytes) -> str:
    with suppress(KeyError, TypeError, ValueError):
        return str(unpack(json.loads(line)["row"].encode())[0])
    return ""


def _amend_line(
    path: Path,
    at: int,
    line: bytes,
    amend: Callable[[tuple[Any, ...]], tuple[Any, ...] | None],
) -> bool:
    with suppress(KeyError, TypeError, ValueError):
        entry = json.loads(line)
        row = amend(unpack(entry["row"].encode()))
        if row is None:
            return False
        entry["row"] = pack(row).decode()
        with path.open("r+b", buffering=0) as file:
            file.seek(0, os.SEEK_END)
            file.write(json.dumps(entry).encode() + b"\n")
            file.seek(at)
            file.write(b" " * (len(line) - 1))
        return True
    return False


def _tidy(directory: Path, now: float) -> None:
    """
    Remove lock files that never got their name: their writer died before its first row.
    """
    for path in listing(directory):
        if TEMPORARY.fullmatch(path.name) and not is_locked(path):
            try:
                is_old = now - path.stat(follow_symlinks=False).st_mtime > IDLE_S
            except OSError:
                continue
            if is_old:
                unlink(path)
