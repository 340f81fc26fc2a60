# SPDX-License-Identifier: Apache-2.0
"""
Where a finished row of the sys and api streams goes, and how it is read back.

A ring for this process's own reader, a bounded queue for a durable store, and the
NDJSON lines on stdout, which audit rows share. How rows are made lives in
`processors` and `engine`; what a store does with them, in `repository`.
"""

from __future__ import annotations

import os
import select
import sys
import threading
import time
from _thread import start_new_thread
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import count, islice
from json import JSONEncoder
from queue import SimpleQueue
from typing import Any, Final

from fasten.context import is_stdout_reserved
from fasten.drain import Rows
from fasten.errors import InvalidQuery
from fasten.rows import (
    API_COLUMNS,
    AUDIT_COLUMNS,
    SYS_COLUMNS,
    ApiRow,
    AuditRow,
    Page,
    Query,
    SysRow,
    decode_cursor,
    encode_cursor,
)

__all__ = [
    "BoundedQueue",
    "Draft",
    "LineWriter",
    "Ring",
    "Row",
    "Stream",
    "finished",
    "json_line",
]

Row = dict[str, Any]
"""A row in wire form, `shape` first."""

Draft = tuple[Any, ...]
"""
A row still to be made: (function, request id, *arguments), all but the first its
arguments. Making rows is dear, and most are never read. The arguments belong to the
draft and do not change any more; a request id that is no text is not known yet.
"""


def finished(row: Row | Draft) -> Row:
    """
    Return *row* in wire form, made if it is a draft.
    """
    if isinstance(row, tuple):
        make, *given = row
        made: Row = make(*given)
        return made
    return row


# --- lines ------------------------------------------------------------------------

_encode: Final = JSONEncoder(
    ensure_ascii=False, separators=(",", ":"), allow_nan=False, default=repr
).encode


def json_line(row: Mapping[str, Any]) -> str:
    """
    Spell a row as one line of JSON, keys in the order they stand in.

    Values were cleaned by whoever recorded them. Should one have no JSON form after
    all, the line says so in its place.
    """
    try:
        return _encode(row)
    except Exception as error:  # a value's own repr may raise anything
        return _encode({str(key): _plain(value, error) for key, value in row.items()})


def _plain(value: object, error: Exception) -> object:
    if value is None or isinstance(value, str | int):
        return value
    return f"unprintable {type(value).__name__}: {type(error).__name__}"


PIPE_BUF: Final = getattr(select, "PIPE_BUF", 512)
"""Up to here a write to a pipe is never torn, whoever else writes to it."""

_PIECE: Final = 65_536
_BACKLOG: Final = 200
_LINGER_S: Final = 0.002
_PAUSE_S: Final = 0.001
_PAUSES: Final = 20


class _Tally:
    """
    A counter that threads and signal handlers may raise at the same time.
    """

    def __init__(self) -> None:
        # Re-entrant: a signal handler may interrupt its own thread in add().
        self._guard = threading.RLock()
        self.value = 0

    def add(self, number: int) -> None:
        """
        Count *number* more.
        """
        with self._guard:
            self.value += number


class LineWriter:
    """
    Print lines on the process's stdout, without ever making a caller wait.

    Lines wait in memory, up to *capacity*; one daemon thread renders and writes
    them, whole, to whatever `sys.stdout` is at the time. A reader that stands still
    or is gone costs lines, counted in `dropped`, and nothing else. A line ends at
    U+000A only.
    """

    def __init__(self, capacity: int = 10_000) -> None:
        self._capacity = capacity
        self._reset()

    def _reset(self) -> None:
        # Row, text, or the lock that a flush() waits on.
        self._lines: deque[Any] = deque()
        self._wakes: SimpleQueue[None] = SimpleQueue()
        self._is_asleep = False
        self._is_running = False
        self._is_closed = False
        self._is_congested = False
        self._is_given_up = False
        self._starting = threading.Lock()
        self._ended = threading.Lock()
        # Held while lines are taken and written, so that no two threads do.
        self._writing = threading.Lock()
        self._lost = _Tally()
        self.written = 0

    @property
    def dropped(self) -> int:
        """
        Return how many lines were not printed.
        """
        return self._lost.value

    @property
    def depth(self) -> int:
        """
        Return how many lines wait.
        """
        return len(self._lines)

    def put(self, line: str | Row | Draft) -> None:
        """
        Queue a line: text without its end, or a row that is made and rendered later.

        Safe in signal handlers: no lock is waited for.
        """
        is_full = len(self._lines) >= self._capacity
        if self._is_closed or (is_full and not self._finds_room()):
            self._lost.add(1)
            return
        self._lines.append(line)
        self._wake()

    def _finds_room(self) -> bool:
        """
        Give the writer a moment, where it is merely slower than this caller.

        A busy loop can make lines faster than any thread beside it prints them.
        Whoever reads a pipe that stands still is waited for once, for 20 ms.
        """
        for _ in range(0 if self._is_congested else _PAUSES):
            time.sleep(_PAUSE_S)
            if len(self._lines) < self._capacity:
                return True
        self._is_congested = True
        return False

    def flush(self, timeout: float = 5.0) -> bool:
        """
        Wait until every line put before the call was written, or is lost.

        Returns:
            False when that took longer than *timeout* seconds.
        """
        if not self._is_running and not self._lines:
            return True
        deadline = time.monotonic() + timeout
        done = threading.Lock()
        done.acquire()
        self._lines.append(done)
        self._wake()
        if not self._is_running:
            self._write_here(deadline)
        return done.acquire(timeout=max(0.0, deadline - time.monotonic()))

    def close(self, timeout: float = 1.0) -> bool:
        """
        Write what waits within *timeout* seconds, and stop; drop what is left.

        Returns:
            True when nothing was left.
        """
        deadline = time.monotonic() + timeout
        self._is_closed = True
        is_done = self.flush(timeout)
        self._wakes.put(None)
        if is_done and self._is_running:
            is_done = self._ended.acquire(timeout=max(0.0, deadline - time.monotonic()))
        # A thread that hangs in a write must not come back to print later.
        self._is_given_up = not is_done
        self._drop_the_rest()
        return is_done

    def after_fork_in_child(self) -> None:
        """
        Start empty: the lines that wait are the parent's to write.
        """
        self._reset()

    # -- the thread ------------------------------------------------------------------

    def _wake(self) -> None:
        if not self._is_running:
            self._start()
        if self._is_asleep:
            self._is_asleep = False
            self._wakes.put(None)

    def _start(self) -> None:
        if not self._starting.acquire(blocking=False):
            return  # another thread is at it, or a signal handler interrupted this one
        try:
            if not self._is_running:
                self._ended.acquire(blocking=False)
                self._is_running = True
                # threading.Thread.start() waits on locks that a signal handler may
                # have interrupted.
                start_new_thread(self._run, ())
        except RuntimeError:
            # The interpreter is going down: close() writes in the calling thread.
            self._is_running = False
        finally:
            self._starting.release()

    def _run(self) -> None:
        threading.current_thread().name = "fasten-stdout"
        try:
            while True:
                with self._writing:
                    self._write_all(None)
                if self._is_closed and not self._lines:
                    return
                self._sleep()
        finally:
            self._is_running = False
            self._ended.release()

    def _write_here(self, deadline: float) -> None:
        """
        Write what waits in the calling thread: no other can start any more.
        """
        left = max(0.0, deadline - time.monotonic())
        if self._writing.acquire(timeout=left):
            try:
                self._write_all(deadline)
            finally:
                self._writing.release()

    def _sleep(self) -> None:
        self._is_asleep = True
        # Looked at again: whoever put a line before the flag was up did not wake us.
        if self._lines or self._is_closed:
            self._is_asleep = False
            return
        self._is_congested = False
        self._wakes.get()
        # A few lines in one write cost hardly more than one.
        time.sleep(_LINGER_S)

    def _write_all(self, deadline: float | None) -> None:
        """
        Write what waits, in pieces of whole lines.

        One piece is what a pipe takes without tearing it, so that processes can
        share one; a long backlog goes out in larger ones, because each write gives
        the interpreter away and gets it back only after 5 ms of a busy caller.
        """
        piece: list[bytes] = []
        size = 0
        for line in iter(self._next_line, None):
            if not isinstance(line, bytes):
                self._send(piece, deadline)
                piece, size = [], 0
                line.release()
                continue
            limit = _PIECE if len(self._lines) > _BACKLOG else PIPE_BUF
            if piece and size + len(line) > limit:
                self._send(piece, deadline)
                piece, size = [], 0
            piece.append(line)
            size += len(line)
        self._send(piece, deadline)

    def _next_line(self) -> Any:
        """
        Return the next line's bytes, a flush()'s lock, or None at the end.
        """
        while self._lines:
            try:
                line = self._lines.popleft()
            except IndexError:
                return None  # somebody else took it
            try:
                if isinstance(line, dict | tuple):
                    line = json_line(finished(line))
                if not isinstance(line, str):
                    return line
                # Lone surrogates come out as the JSON escapes that they are.
                return f"{line}\n".encode("utf-8", "backslashreplace")
            except Exception:  # a thread's top: one bad row costs itself
                self._lost.add(1)
        return None

    def _send(self, piece: list[bytes], deadline: float | None) -> None:
        if not piece:
            return
        try:
            is_sent = not self._is_given_up and _print(b"".join(piece), deadline)
        except Exception:  # closed, gone, or somebody's own stdout object that raises
            is_sent = False
        if is_sent:
            self.written += len(piece)
        else:
            self._lost.add(len(piece))

    def _drop_the_rest(self) -> None:
        while True:
            try:
                line = self._lines.popleft()
            except IndexError:
                return
            if isinstance(line, str | dict | tuple):
                self._lost.add(1)
            else:
                line.release()


def _print(data: bytes, deadline: float | None) -> bool:
    """
    Write to the present stdout; false when *deadline* passed before the end.

    To stderr, where a shim reserved stdout for a protocol.

    The descriptor is written, not `sys.stdout.buffer`: a daemon thread that holds
    the buffer's lock at exit aborts the interpreter (bugs.python.org/issue42717).
    """
    out = sys.stderr if is_stdout_reserved() else sys.stdout
    if out is None:
        return False
    try:
        fd = out.fileno()
    except (AttributeError, OSError):  # io.UnsupportedOperation is an OSError
        out.write(data.decode())
        return True
    view = memoryview(data)
    place = _place(fd)
    while view:
        if deadline is not None and not _is_writable(fd, deadline):
            return False
        # After a stall: the number may have been closed, and be another file's now.
        if len(view) < len(data) and _place(fd) != place:
            return False
        try:
            sent = os.write(fd, view if deadline is None else view[:PIPE_BUF])
            view = view[sent:]
        except BlockingIOError:
            _is_writable(fd, time.monotonic() + 1.0 if deadline is None else deadline)
    return True


def _place(fd: int) -> tuple[int, int]:
    status = os.fstat(fd)
    return status.st_dev, status.st_ino


def _is_writable(fd: int, deadline: float) -> bool:
    left = deadline - time.monotonic()
    if left <= 0:
        return False
    if not hasattr(select, "poll"):
        return True
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    return bool(poll.poll(left * 1000))


# --- memory -----------------------------------------------------------------------

_SAMPLED: Final = 64
_ROW_BYTES: Final = 4_096


class Ring:
    """
    The last *size* rows of this process.

    Appending takes no lock. Every 64th row is weighed; when rows are so large that
    *size* of them would come to more than 4 KiB each, fewer are kept.
    """

    def __init__(self, size: int = 10_000) -> None:
        self._size = size
        self._rows: deque[tuple[int, Row | Draft]] = deque(maxlen=size)
        self._next = count(1).__next__
        self._weight = 0.0

    def __len__(self) -> int:
        return len(self._rows)

    def append(self, row: Row | Draft) -> None:
        """
        Keep *row*, and let go of the oldest one if there is no more room.
        """
        number = self._next()
        self._rows.append((number, row))
        if not number % _SAMPLED:
            self._weigh(row)

    def _weigh(self, row: Row | Draft) -> None:
        self._weight += (len(json_line(finished(row))) - self._weight) / 8
        if self._weight <= _ROW_BYTES:
            return
        most = max(1, int(self._size * _ROW_BYTES / self._weight))
        for _ in range(len(self._rows) - most):
            self._rows.popleft()

    def rows(self) -> list[Row]:
        """
        Return what is still here, oldest first, in wire form.
        """
        return [finished(row) for _, row in self._entries()]

    def clear(self) -> None:
        """
        Let go of all rows.
        """
        self._rows.clear()

    def forget(self, is_meant: Callable[[Row], bool]) -> int:
        """
        Let go of the rows that *is_meant* picks; return how many there were.
        """
        found = [entry for entry in self._entries() if is_meant(finished(entry[1]))]
        for entry in found:
            try:
                self._rows.remove(entry)
            except ValueError:  # it fell off the end meanwhile
                continue
        return len(found)

    def query(self, query: Query) -> Page:
        """
        Return one page of what is still here, in the order of recording.

        Raises:
            InvalidQuery: the cursor is not one of a ring's, or the order a store's.
        """
        if query.order == "stored":
            raise InvalidQuery(
                "order=stored is for rows of a store, and this is the ring of one "
                "process: set FASTEN_AUDIT_DSN, or use asc or desc",
                "order",
            )
        after = None if query.cursor is None else _position(query)
        is_desc = query.order == "desc"
        entries = self._entries()
        if is_desc:
            entries.reverse()
        total = None
        if query.count:
            total = sum(1 for _ in _matching(query, entries))
        if after is not None:
            entries = [
                e for e in entries if e[0] != after and (e[0] < after) is is_desc
            ]
        return _page(query, _matching(query, entries), total)

    def _entries(self) -> list[tuple[int, Row | Draft]]:
        while True:
            try:
                # Two threads may have appended in the other order than they counted.
                return sorted(self._rows, key=_number)
            except RuntimeError:  # the deque changed under the copy
                continue


def _number(entry: tuple[int, Row | Draft]) -> int:
    return entry[0]


def _position(query: Query) -> int:
    cursor = query.cursor or ""
    text = decode_cursor(query.stream, cursor)
    if not (text.isascii() and text.isdigit()):
        raise InvalidQuery(
            f"cursor {cursor[:80]!r} is from a page of the store, and this is the "
            "ring of one process; start again without it",
            "cursor",
        )
    return int(text)


def _matching(
    query: Query, entries: Iterable[tuple[int, Row | Draft]]
) -> Iterator[tuple[int, Row]]:
    rid = query.filters.get("request_id")
    for number, entry in entries:
        if rid is not None and isinstance(entry, tuple):
            # Most of a ring belongs to other requests: not worth making.
            known = entry[1]
            if known != rid and isinstance(known, str):
                continue
        row = finished(entry)
        if query.matches(row):
            yield number, row


def _page(query: Query, matching: Iterator[tuple[int, Row]], total: int | None) -> Page:
    first, last = query.offset, query.offset + query.limit + 1
    found = list(islice(matching, first, last))
    more = len(found) > query.limit
    shown = found[: query.limit]
    return Page(
        rows=[_typed(query.stream, row) for _, row in shown],
        next=encode_cursor(query.stream, shown[-1][0]) if more else None,
        completeness="ring",
        total=total,
    )


def _typed(stream: str, row: Row) -> AuditRow | SysRow | ApiRow:
    if stream == "audit":
        return AuditRow(**{name: row[name] for name in AUDIT_COLUMNS if name in row})
    columns = SYS_COLUMNS if stream == "sys" else API_COLUMNS
    fixed = {name: row.get(name) for name in columns}
    free = {k: v for k, v in row.items() if k not in fixed and k != "shape"}
    kind: Callable[..., SysRow | ApiRow] = SysRow if stream == "sys" else ApiRow
    return kind(**fixed, fields=free)


class BoundedQueue:
    """
    Rows on their way to a durable sys or api store: a source for the drainer.

    Holds *capacity* rows, those being delivered included. Beyond that the newest is
    dropped and counted: these streams have no journal.
    """

    def __init__(self, capacity: int = 10_000) -> None:
        self._capacity = capacity
        self.clear()

    def clear(self) -> None:
        """
        Start empty, as in a forked child: the rows are its parent's.
        """
        self._rows: deque[Row | Draft] = deque()
        self._taken = self._acked = 0
        self._lost = _Tally()

    @property
    def dropped(self) -> int:
        """
        Return how many rows found no room.
        """
        return self._lost.value

    @property
    def depth(self) -> int:
        """
        Return how many rows wait or are being delivered.
        """
        return len(self._rows) + self._taken - self._acked

    @property
    def last_index(self) -> int:
        """
        Return the index of the newest row.
        """
        return self._taken + len(self._rows)

    @property
    def acked(self) -> int:
        """
        Return the index up to which rows are delivered.
        """
        return self._acked

    def put(self, row: Row | Draft) -> bool:
        """
        Queue *row*; false when there was no room.
        """
        if self.depth >= self._capacity:
            self._lost.add(1)
            return False
        self._rows.append(row)
        return True

    def take(self, limit: int) -> Rows | None:
        """
        Return the next rows, at most *limit*, or None; for the drainer only.
        """
        number = min(limit, len(self._rows))
        if not number:
            return None
        first = self._taken + 1
        rows = [finished(self._rows.popleft()) for _ in range(number)]
        self._taken += number
        return Rows(list(enumerate(rows, first)), self._taken, [])

    def ack(self, index: int) -> None:
        """
        Note that everything up to *index* is delivered.
        """
        self._acked = max(self._acked, min(index, self._taken))


class Stream:
    """
    One of the streams sys and api: where its rows go, and its ring to read.

    *lines* prints them, *queue* takes them to a durable store; either may be None.
    """

    def __init__(
        self,
        name: str,
        ring: Ring,
        *,
        lines: LineWriter | None = None,
        queue: BoundedQueue | None = None,
    ) -> None:
        self.name, self.ring, self.lines, self.queue = name, ring, lines, queue

    def record(self, row: Row | Draft, *, is_printed: bool = True) -> None:
        """
        Take a redacted row in wire form, or a draft of one.
        """
        self.ring.append(row)
        if self.queue is not None:
            self.queue.put(row)
        if is_printed and self.lines is not None:
            self.lines.put(row)

    def after_fork_in_child(self) -> None:
        """
        Start empty: a ring answers for its own process only.
        """
        self.ring.clear()
        if self.queue is not None:
            self.queue.clear()
