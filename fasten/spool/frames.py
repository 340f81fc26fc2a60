# SPDX-License-Identifier: Apache-2.0
"""
The format of the journal, as bytes: rows, frames, and how they are accounted for.

A segment is a row of frames: magic, crc32, length, index, payload. Several segments
share one run of indexes; a reader merges them, and each index is a row, known to be
void, or missing. Where the bytes lie is told by `files`.
"""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Callable, Iterable, Iterator
from operator import itemgetter
from typing import Any, Final, NamedTuple
from zlib import crc32

import attrs

from fasten.rows import Pending

__all__ = [
    "ACK",
    "DOUBT",
    "FORMAT",
    "HEAD",
    "HEADER_SIZE",
    "INNER",
    "ROW",
    "ROW_MAGIC",
    "TIMESTAMP",
    "VOID",
    "Batch",
    "Frame",
    "Identity",
    "Reader",
    "Row",
    "Walk",
    "account",
    "add_range",
    "decode_frame",
    "encode_frame",
    "pack",
    "pack_header",
    "parse",
    "read_identity",
    "row_of",
    "unpack",
]

# --- rows as bytes ----------------------------------------------------------------

TIMESTAMP: Final = Pending._fields.index("timestamp_us")
"""Where in a row its time stands."""

Row = tuple[int, tuple[Any, ...]]
"""Index, and the row in `Pending` order."""


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
    # Written out: a backlog past the cache is read from here, row by row.
    # fmt: off
    (id_, us, code, action, severity, category, domain, class_, outcome, actor,
     actor_kind, behalf, tenant, client, target, method, reason, request_id,
     trace_id, span_id, detail) = payload.decode().split("\0")
    return (
        id_, int(us), code, action, severity, category, domain, class_, outcome, actor,
        actor_kind, behalf or None, tenant or None, client or None, target, method,
        reason or None, request_id, trace_id or None, span_id or None, detail,
    )
    # fmt: on


# --- frames -----------------------------------------------------------------------

ROW: Final = 0
"""A row."""

INNER: Final = 1
"""A row that was appended while the indexes of the DOUBT frames before it were open."""

VOID: Final = 2
"""The append of this index was broken off: there is no row."""

DOUBT: Final = 3
"""This index was open when the row above it was written."""

HEAD: Final = 8
"""The first frame of a segment: who wrote it; no index in it is below this one's."""

ACK: Final = 9
"""In the .ack file: everything up to this index is delivered."""

# 0xF5 occurs in no UTF-8 text: no payload can be taken for a frame.
_PREFIX: Final = b"\xf5FS"
_MAGIC: Final = {
    kind: _PREFIX + b"%d" % kind for kind in (ROW, INNER, VOID, DOUBT, HEAD, ACK)
}
_KIND: Final = {magic: kind for kind, magic in _MAGIC.items()}
_HEADER: Final = struct.Struct("<4sIIQ")

ROW_MAGIC: Final = _MAGIC[ROW]
"""What a row's frame begins with."""

HEADER_SIZE: Final = _HEADER.size
"""The bytes of a frame before its payload."""

pack_header: Final = _HEADER.pack_into
"""Write magic, crc, length and index, in this order, into a buffer at an offset."""

Frame = tuple[int, int, bytes]
"""Index, kind, payload: sorts by index, and a row before a doubt about it."""


def _seed(kind: int, index: int) -> int:
    # The crc runs over the payload from here, so it covers index and kind as well.
    # `Spool.append` has this by heart: a row's is its index, folded to 32 bits.
    return index ^ index >> 32 ^ kind << 28


def encode_frame(kind: int, index: int, payload: bytes = b"") -> bytes:
    """
    Return *payload* with its header.
    """
    check = crc32(payload, _seed(kind, index))
    return _HEADER.pack(_MAGIC[kind], check, len(payload), index) + payload


def decode_frame(data: bytes, at: int) -> Frame | None:
    """
    Return the frame that begins at *at*, or None if that is no whole frame.
    """
    if at + HEADER_SIZE > len(data):
        return None
    magic, check, length, index = _HEADER.unpack_from(data, at)
    kind = _KIND.get(magic)
    payload = data[at + HEADER_SIZE : at + HEADER_SIZE + length]
    if kind is None or len(payload) != length:
        return None
    if crc32(payload, _seed(kind, index)) != check:
        return None
    return index, kind, payload


def parse(data: bytes) -> tuple[list[Frame], int]:
    """
    Return every whole frame, also those past damage, and where the last one ends.
    """
    frames: list[Frame] = []
    end = 0
    at = data.find(_PREFIX)
    while at >= 0:
        frame = decode_frame(data, at)
        if frame is not None:
            frames.append(frame)
            end = at + HEADER_SIZE + len(frame[2])
        at = data.find(_PREFIX, at + 1 if frame is None else end)
    return frames, end


def _claim(data: bytes, end: int, last: int, size: int) -> int:
    """
    Return the index that the damaged end of a segment of *size* seems to have held.

    A frame that was being copied when its writer died claims nothing: its header is
    written last, and in that the index. Nor does one that was cut while being written
    to the end of a file, where *size* is 0.
    """
    body = end + HEADER_SIZE
    if len(data) >= body:
        magic, check, length, index = _HEADER.unpack_from(data, end)
        is_cut = size == 0 and body + length > len(data)
        payload = data[body:] if is_cut else data[body : body + length]
        kind = _KIND.get(magic, ROW)
        if payload and crc32(payload, _seed(kind, last + 1)) == check:
            return last + 1  # only its header is damaged
        if length and index and not is_cut:
            room = (max(size, len(data)) - end) // HEADER_SIZE
            is_likely = last < index <= last + room
            return int(index) if is_likely else last + 1
    return last + 1 if len(data) < size else 0


# --- who wrote them ----------------------------------------------------------------

FORMAT: Final = 1
"""The newest format of a segment that this version reads, and the one it writes."""


@attrs.frozen(kw_only=True)
class Identity:
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
        """
        Return the first frame of a segment that holds no index below *base*.
        """
        known = attrs.asdict(attrs.evolve(self, size=size))
        return encode_frame(HEAD, base, json.dumps(known).encode())


def read_identity(payload: bytes) -> Identity | None:
    """
    Read a header; a newer format may have changed everything but its number.
    """
    try:
        known = json.loads(payload)
        texts = {
            k: str(known.get(k, "")) for k in ("service", "node", "store", "writer")
        }
        return Identity(
            format=int(known["format"]), size=int(known.get("size", 0)), **texts
        )
    except (AttributeError, KeyError, TypeError, ValueError):
        return None


# --- reading ----------------------------------------------------------------------


class Reader:
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

    def frames(self) -> Iterator[Frame]:
        """
        Read them; after the last one *claimed* is known.
        """
        ready: list[Frame] = []  # the next one last
        for base, read in self._segments:
            while ready and ready[-1][0] < base:
                yield ready.pop()
            ready += self._load(read())
            ready.sort(reverse=True)
        while ready:
            yield ready.pop()

    def _load(self, data: bytes) -> list[Frame]:
        frames, end = parse(data)
        head = next((frame for frame in frames if frame[1] == HEAD), (1, HEAD, b""))
        who = read_identity(head[2])
        size = who.size if who else 0
        last = max((f[0] for f in frames if f[1] != HEAD), default=head[0] - 1)
        claim = _claim(data, end, last, size)
        if self.claimed < claim <= self._bound:
            self.claimed = claim
        return [
            f for f in frames if f[1] <= DOUBT and self._after < f[0] <= self._bound
        ]


class Walk:
    """
    Where the reading of a journal stands, between two batches.
    """

    def __init__(self, frames: Iterator[Frame], bound: int) -> None:
        self.bound = bound
        self._frames = frames
        self._next = next(frames, None)

    def upto(self, end: int) -> Iterator[Frame]:
        """
        Go on reading, up to the index *end*.
        """
        while self._next is not None and self._next[0] <= end:
            frame, self._next = self._next, next(self._frames, None)
            yield frame


class Batch(NamedTuple):
    """
    Rows to deliver together, as (index, row in `Pending` order), ascending.

    Every index up to *last* is in this batch or an earlier one, void, or *missing*:
    inclusive ranges that were journalled and cannot be found any more.
    """

    rows: list[Row]
    last: int
    missing: list[tuple[int, int]]


def row_of(frame: Frame) -> tuple[Any, ...] | None:
    """
    Return the row in a frame; None where there is none, or not one of ours.
    """
    if frame[1] > INNER:
        return None
    try:
        return unpack(frame[2])
    except ValueError:
        return None


def account(reader: Reader, after: int, floor: int, limit: int) -> Iterator[Batch]:
    """
    Account for every index above *after*; up to *floor*, absence is no damage.
    """
    rows: list[Row] = []
    missing: list[tuple[int, int]] = []
    doubted: list[int] = []
    at = after
    for frame in reader.frames():
        index, kind, _ = frame
        if index <= at:
            continue
        add_range(missing, max(at, floor) + 1, index - 1)
        at = index
        row = row_of(frame)
        if kind == ROW:
            # Its append settled what was open before: what is not here was lost.
            missing += [(i, i) for i in doubted]
            doubted.clear()
        if row is not None:
            rows.append((index, row))
        elif kind == DOUBT:
            doubted += [index] * (index > floor)
        elif kind != VOID:
            add_range(missing, index, index)
        if max(len(rows), len(missing)) >= limit:
            yield Batch(rows, at, missing)
            rows, missing = [], []
    add_range(missing, max(at, floor) + 1, reader.claimed)
    if rows or missing or at > after:
        yield Batch(rows, max(at, reader.claimed), missing)


def add_range(ranges: list[tuple[int, int]], first: int, last: int) -> None:
    """
    Add the indexes from *first* to *last*, if any, to ascending inclusive ranges.
    """
    if first > last:
        return
    if ranges and ranges[-1][1] == first - 1:
        ranges[-1] = (ranges[-1][0], last)
    else:
        ranges.append((first, last))
