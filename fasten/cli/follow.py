# SPDX-License-Identifier: Apache-2.0
"""
Following a stream: what is new since the last look, each row once.

Stores number their audit rows in the order in which they came, so a row that waited
in a spool for an hour is new when it arrives. Where only pages can be had, from a
reader or of rows without a number, what was seen is compared instead.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final, Protocol

import attrs

from fasten.cli.command import NoAnswer, say
from fasten.cli.source import (
    NoStoreYet,
    Reader,
    Source,
    Store,
    all_rows,
    first_rows,
)
from fasten.cli.text import Row, json_text
from fasten.errors import AuditStoreError
from fasten.rows import Query, encode_cursor

if TYPE_CHECKING:
    from fasten.repository import AuditRepository

__all__ = ["follow"]

_DAY_US: Final = 86_400_000_000
_REMEMBERED: Final = 100_000


class Follower(Protocol):
    """
    Tells what is new in one stream.
    """

    def start(self, number: int) -> list[Row]:
        """
        Return the newest *number* rows, oldest first; what comes later is new.
        """

    def look(self) -> list[Row]:
        """
        Return what is new since the last look, in order.
        """


def follow(
    source: Source,
    query: Query,
    number: int,
    *,
    wait: Callable[[float], object] | None = None,
) -> Iterator[Row]:
    """
    Yield the newest *number* rows, then each new one as it comes; never ends.

    A source that goes away is waited for, and said so on stderr.

    Raises:
        AuditStoreError: it cannot be read to begin with.
        Failure: a reader refuses, or is none.
    """
    pause = wait or threading.Event().wait
    interval_s = 0.5 if isinstance(source, Store) else 1.0
    follower, rows = _start(source, query, number, pause)
    yield from rows
    failed_for_s = 0.0
    while True:
        pause(min(interval_s + failed_for_s, 5.0))
        try:
            rows = follower.look()
        except (AuditStoreError, NoAnswer) as error:
            if not failed_for_s:
                say(f"waiting: {error}")
            failed_for_s = failed_for_s * 2 or interval_s
            continue
        if failed_for_s:
            say("it is back")
            failed_for_s = 0.0
        yield from rows


def _start(
    source: Source, query: Query, number: int, pause: Callable[[float], object]
) -> tuple[Follower, list[Row]]:
    is_told = False
    while True:
        try:
            follower = _follower(source, query)
            return follower, follower.start(number)
        except AuditStoreError as error:
            # A service that has not emitted yet: as `tail -F` waits for a file. The
            # tables are there a moment after it.
            if not (isinstance(error, NoStoreYet) or is_told):
                raise
            if not is_told:
                say(f"waiting: {error}")
                is_told = True
            number = max(number, 1_000)
            pause(0.5)


def _follower(source: Source, query: Query) -> Follower:
    if query.stream != "audit":
        return PagesFollower(source, query)
    if isinstance(source, Store):
        return StoreFollower(source, query)
    page = source.page(attrs.evolve(query, limit=1))
    is_ring = page.completeness == "ring"
    return (PagesFollower if is_ring else ReaderFollower)(source, query)


class _Seen:
    """
    Remembers the ids of the last rows printed.
    """

    def __init__(self) -> None:
        self._ids: OrderedDict[str, None] = OrderedDict()

    def fresh(self, rows: list[Row]) -> list[Row]:
        """
        Return the rows not met before, and remember them.
        """
        found = []
        for row in rows:
            id_ = str(row["id"])
            if id_ not in self._ids:
                found.append(row)
            self._ids[id_] = None
        while len(self._ids) > _REMEMBERED:
            self._ids.popitem(last=False)
        return found


# --- audit rows of a store ----------------------------------------------------------


class StoreFollower:
    """
    Follows the numbers that a store gives its audit rows: no row can hide.
    """

    def __init__(
        self, store: Store, query: Query, now: Callable[[], int] = time.time_ns
    ) -> None:
        self._store, self._query = store, query
        self._repository: AuditRepository = store.repository  # type: ignore[assignment]
        self._positions: dict[tuple[str, str], int] = {}
        self._seen = _Seen()
        self._day_ago_us = now() // 1000 - _DAY_US
        self._stored_at = ""
        self._is_restored = False

    def start(self, number: int) -> list[Row]:
        """
        Return the newest *number* rows, oldest first.
        """
        # Positions first: a row stored in between is met twice, never missed.
        self._positions = self._store.read(self._repository.positions)
        rows, _ = first_rows(self._store, self._query, number)
        self._stored_at = _newest_store_time(rows)
        return self._seen.fresh(rows[::-1])

    def look(self) -> list[Row]:
        """
        Return the rows stored since the last look.
        """
        return self._seen.fresh(self._store.read(self._new))

    def _new(self) -> list[Row]:
        query = self._query
        ends = self._repository.positions()
        for place, position in self._positions.items():
            if ends.get(place, 0) < position:
                # The store went back: another file, or a restored backup. What it
                # numbers now is new, what it had before this command is not.
                self._positions[place] = 0
                self._is_restored = True
        if self._is_restored:
            since_us = max(self._day_ago_us, query.since_us or 0)
            query = attrs.evolve(query, since_us=since_us)
        rows, self._positions = self._repository.follow(self._positions, query)
        return [row for row in map(self._store.wire, rows) if self._is_new(row)]

    def _is_new(self, row: Row) -> bool:
        if not self._is_restored:
            return True
        return str(row.get("stored_at")) > self._stored_at


def _newest_store_time(rows: list[Row]) -> str:
    return max([str(row.get("stored_at") or "") for row in rows], default="")


# --- audit rows of a reader ---------------------------------------------------------


class ReaderFollower:
    """
    Follows audit rows by their ids, and counts them, so that late ones are noticed.

    A late row has an older id than what was printed. When there are more rows than
    were met, those born up to a day before the start are looked through for it.
    """

    def __init__(
        self, source: Source, query: Query, now: Callable[[], int] = time.time_ns
    ) -> None:
        self._source, self._query = source, query
        day_ago = now() // 1000 - _DAY_US
        self._window = attrs.evolve(query, since_us=max(day_ago, query.since_us or 0))
        self._seen = _Seen()
        self._last = ""
        self._stored_at = ""
        self._known = 0

    def start(self, number: int) -> list[Row]:
        """
        Return the newest *number* rows, oldest first.
        """
        self._known = self._count()
        rows, _ = first_rows(self._source, self._query, number)
        self._note(rows)
        return self._seen.fresh(rows[::-1])

    def look(self) -> list[Row]:
        """
        Return the rows that came since the last look, late ones last.
        """
        # Counted first: what comes in between is met below, before it is counted.
        total = self._count()
        fresh = self._seen.fresh(self._behind_last())
        self._known += len(fresh)
        if total > self._known:
            late = self._seen.fresh(self._late())
            fresh += late
            self._known = max(total, self._known + len(late))
        self._note(fresh)
        return fresh

    def _count(self) -> int:
        page = self._source.page(attrs.evolve(self._window, limit=1, count=True))
        return page.total or 0

    def _behind_last(self) -> list[Row]:
        if not self._last:
            return list(all_rows(self._source, attrs.evolve(self._window, order="asc")))
        cursor = encode_cursor("audit", self._last)
        query = attrs.evolve(self._query, order="asc", cursor=cursor)
        return list(all_rows(self._source, query))

    def _late(self) -> list[Row]:
        window = attrs.evolve(self._window, order="asc")
        rows = all_rows(self._source, window)
        return [r for r in rows if str(r.get("stored_at") or "") > self._stored_at]

    def _note(self, rows: list[Row]) -> None:
        self._last = max([self._last, *(str(row["id"]) for row in rows)])
        self._stored_at = self._stored_at or _newest_store_time(rows)


# --- rows without a number ----------------------------------------------------------

_PAGE: Final = 100
_WINDOW: Final = 2 * _PAGE


class PagesFollower:
    """
    Follows rows that have no id: sys and api rows, and those of a ring.

    The newest of them are read again at each look and compared with those of the look
    before, so that one which a database let in late, or a restarted service, is
    noticed. Workers behind one address answer in turn, each for itself: each has a
    window of its own.
    """

    def __init__(self, source: Source, query: Query) -> None:
        self._source = source
        self._query = attrs.evolve(query, order="desc", limit=_PAGE)
        self._windows: dict[str | None, list[str]] = {}
        self._newest = ""

    def start(self, number: int) -> list[Row]:
        """
        Return the newest *number* rows, oldest first.
        """
        rows, _ = first_rows(self._source, self._query, max(number, _WINDOW))
        self._windows[self._process()] = _texts(rows)
        self._newest = max([str(row.get("timestamp")) for row in rows], default="")
        return rows[:number][::-1]

    def look(self) -> list[Row]:
        """
        Return the rows that came since the last look.
        """
        rows, has_met = self._read_back()
        window = self._windows.get(self._process(), [])
        fresh = _without(window, rows)
        self._windows[self._process()] = (
            _moved(window, rows) if has_met else _texts(rows)
        )
        if not has_met:
            # Another process, or the rows of the last look are swept or overrun.
            fresh = [r for r in fresh if str(r.get("timestamp")) > self._newest]
        return fresh[::-1]

    def _read_back(self) -> tuple[list[Row], bool]:
        """
        Read from the newest row back to those that are known; tell if there are any.
        """
        rows: list[Row] = []
        query, process = self._query, None
        while True:
            page = self._source.page(query)
            if rows and self._process() != process:
                rows, query = [], self._query  # another worker: begin anew
                continue
            process = self._process()
            rows += page.rows
            met = _met(self._windows.get(process, []), rows)
            if len(met) >= _PAGE // 2 or page.next is None or not page.rows:
                # Behind the oldest row that is known there is nothing new.
                return (rows[: met[-1] + 1], True) if met else (rows, False)
            query = attrs.evolve(query, cursor=page.next, offset=0)

    def _process(self) -> str | None:
        return self._source.source if isinstance(self._source, Reader) else None


def _texts(rows: list[Row]) -> list[str]:
    return [json_text(row) for row in rows[:_WINDOW]]


def _moved(window: list[str], rows: list[Row]) -> list[str]:
    """
    Return the window after a look: *rows*, the last of which was known, and the rest.
    """
    oldest = window[::-1].index(json_text(rows[-1]))
    behind = window[len(window) - oldest :]
    return [*_texts(rows), *behind][:_WINDOW]


def _met(window: list[str], rows: list[Row]) -> list[int]:
    """
    Return which of *rows* were in the window, by their places.
    """
    known = set(window)
    return [place for place, row in enumerate(rows) if json_text(row) in known]


def _without(window: list[str], rows: list[Row]) -> list[Row]:
    left = Counter(window)
    fresh = []
    for row in rows:
        text = json_text(row)
        if left[text] > 0:
            left[text] -= 1
        else:
            fresh.append(row)
    return fresh
