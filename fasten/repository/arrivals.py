# SPDX-License-Identifier: Apache-2.0
"""
Audit rows in the order in which a store took them, from where the page before ended.

A row that waited in a spool for a week comes last, whatever its time: every row has
a number on its node, and none is given twice.
"""

from __future__ import annotations

from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import Final

import attrs
import sqlalchemy as sa

from fasten.errors import InvalidQuery
from fasten.repository.database import Database
from fasten.repository.meta import clock
from fasten.repository.reading import AuditReader, microseconds
from fasten.repository.tables import Tables
from fasten.rows import END, AuditRow, Page, Query

__all__ = ["LOOKED_THROUGH", "UNSETTLED_US", "Arrivals"]

Place = tuple[str, str]
"""A (service, node): what numbers its rows by itself."""

LOOKED_THROUGH: Final = 50_000
"""How many numbers a page covers: a filter that finds little costs no more."""

UNSETTLED_US: Final = 60_000_000
"""By how much a row may be committed after others that were stored later."""

_KEY: Final = 6
_NUMBER: Final = 6
_TIME: Final = 8


@attrs.frozen(kw_only=True)
class _Position:
    """
    How far each place has been read, by a hash of its name.

    All that was stored up to *settled_us* has been read. Once the store has gone back
    (*is_restored*) that tells what is news there.
    """

    numbers: Mapping[bytes, int] = attrs.field(factory=dict)
    settled_us: int = 0
    is_restored: bool = False

    @property
    def stored_from_us(self) -> int:
        """
        Return from when on a row counts.
        """
        return self.settled_us if self.is_restored else 0

    def beside(self, ends: Mapping[Place, int]) -> _Position:
        """
        Return where to read on in a store that ends at *ends*.

        One that ends before this was restored from a backup, or is another file: its
        places are read anew.
        """
        known = {_key(place): end for place, end in ends.items()}
        kept = {k: n for k, n in self.numbers.items() if n <= known.get(k, 0)}
        if len(kept) == len(self.numbers):
            return self
        return attrs.evolve(self, numbers=kept, is_restored=True)

    def behind(self, rows: Sequence[AuditRow]) -> _Position:
        """
        Return the place behind *rows*, the last that the store has.
        """
        newest = [microseconds(row.stored_at) for row in rows if row.stored_at]
        settled_us = max([self.settled_us, *(us - UNSETTLED_US for us in newest)])
        return attrs.evolve(self, settled_us=settled_us, is_restored=False)

    def encode(self) -> str:
        """
        Make the opaque cursor that stands for this.

        Whoever takes it apart learns how many rows there are, as from the numbers in
        the rows, but no names.
        """
        raw = b"n" + bytes([self.is_restored]) + self.settled_us.to_bytes(_TIME)
        for key, number in sorted(self.numbers.items()):
            raw += key + number.to_bytes(_NUMBER)
        return urlsafe_b64encode(raw).decode().rstrip("=")

    @classmethod
    def decode(cls, cursor: str) -> _Position:
        """
        Read what `encode` made.

        Raises:
            InvalidQuery: it is no cursor of this order.
        """
        try:
            raw = urlsafe_b64decode(cursor.encode("ascii") + b"=" * (-len(cursor) % 4))
        except ValueError:
            raw = b""
        entries = raw[2 + _TIME :]
        if raw[:1] != b"n" or len(raw) < 2 + _TIME or len(entries) % (_KEY + _NUMBER):
            raise InvalidQuery(
                f"cursor {cursor[:80]!r} is not from a page with order=stored; use "
                "the `next` of the page before, `end`, or none to begin with",
                "cursor",
            )
        return cls(
            numbers=dict(_entries(entries)),
            settled_us=int.from_bytes(raw[2 : 2 + _TIME]),
            is_restored=bool(raw[1]),
        )


def _entries(raw: bytes) -> list[tuple[bytes, int]]:
    length = _KEY + _NUMBER
    pieces = [raw[at : at + length] for at in range(0, len(raw), length)]
    return [(piece[:_KEY], int.from_bytes(piece[_KEY:])) for piece in pieces]


def _key(place: Place) -> bytes:
    return sha256("\0".join(place).encode("utf-8", "surrogatepass")).digest()[:_KEY]


class Arrivals:
    """
    Reads the audit rows by their numbers, place by place.
    """

    def __init__(self, tables: Tables, database: Database, reader: AuditReader) -> None:
        self._node, self._database, self._reader = tables.node, database, reader

    def ends(self, within_s: float | None) -> dict[Place, int]:
        """
        Return the highest number of each place.
        """
        node = self._node.c
        asked = sa.select(node.service_id, node.source_node_id, node.seq)
        with self._database.reading(within_s) as connection:
            found = connection.execute(asked).all()
        return {(row[0], row[1]): row[2] for row in found}

    def page(self, query: Query) -> Page:
        """
        Return the rows behind the query's cursor, and always a next one.

        It is the same cursor once there is nothing behind it.

        Raises:
            InvalidQuery: the cursor is from elsewhere.
        """
        if query.cursor == END:
            return self._answer(query, [], self._end(query.within_s))
        position = (
            _Position() if query.cursor is None else _Position.decode(query.cursor)
        )
        ends = self.ends(query.within_s)
        rows, position = self._behind(position.beside(ends), ends, query)
        return self._answer(query, rows[query.offset :], position)

    def _answer(self, query: Query, rows: list[AuditRow], position: _Position) -> Page:
        total = self._reader.total(query) if query.count else None
        return Page(rows=rows, next=position.encode(), total=total)

    def _end(self, within_s: float | None) -> _Position:
        asked = sa.select(clock(self._database.dsn.backend))
        with self._database.reading(within_s) as connection:
            now = connection.execute(asked).scalar_one()
        numbers = {_key(place): end for place, end in self.ends(within_s).items()}
        return _Position(numbers=numbers, settled_us=microseconds(now))

    def _behind(
        self, position: _Position, ends: Mapping[Place, int], query: Query
    ) -> tuple[list[AuditRow], _Position]:
        wanted = query.offset + query.limit
        numbers, left = dict(position.numbers), LOOKED_THROUGH
        rows: list[AuditRow] = []
        for place, end in sorted(ends.items()):
            after = numbers.get(_key(place), 0)
            if after >= end:
                continue
            until = min(end, after + left)
            rows += self._reader.between(
                place,
                after,
                until,
                attrs.evolve(query, limit=wanted - len(rows)),
                stored_from_us=position.stored_from_us,
            )
            if len(rows) == wanted:
                numbers[_key(place)] = rows[-1].monotonic_seq or until
                break
            numbers[_key(place)] = until
            left -= until - after
            if not left:
                break
        moved = attrs.evolve(position, numbers=numbers)
        is_whole = all(numbers.get(_key(place)) == end for place, end in ends.items())
        return rows, moved.behind(rows) if is_whole else moved
