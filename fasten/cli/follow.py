# SPDX-License-Identifier: Apache-2.0
"""
Following a stream: what is new since the last look, each row once.

Stores number their audit rows in the order in which they came, so a row that waited
in a spool for an hour is new when it arrives. Of rows without a number, those of
a ring and of sys and api, what was seen is compared instead.
"""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from typing import Final, Protocol

import attrs

from fasten.cli.command import NoAnswer, say
from fasten.cli.source import (
    NoStoreYet,
    Reader,
    Source,
    Store,
    first_rows,
)
from fasten.cli.text import Row, json_text
from fasten.errors import AuditStoreError
from fasten.rows import END, MAX_LIMIT, Query

__all__ = ["follow"]

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
    page = source.page(attrs.evolve(query, limit=1))
    is_ring = page.completeness == "ring"
    return (PagesFollower if is_ring else StoredFollower)(source, query)


# --- audit rows of a store ----------------------------------------------------------


class StoredFollower:
    """
    Follows audit rows in the order in which their store took them: none can hide.
    """

    def __init__(self, source: Source, query: Query) -> None:
        self._source, self._query = source, query
        self._seen = _Seen()
        self._cursor: str | None = None

    def start(self, number: int) -> list[Row]:
        """
        Return the newest *number* rows, oldest first.
        """
        # Its end first: a row stored in between is met twice, never missed.
        end = attrs.evolve(self._query, order="stored", cursor=END)
        self._cursor = self._source.page(end).next
        rows, _ = first_rows(self._source, self._query, number)
        return self._seen.fresh(rows[::-1])

    def look(self) -> list[Row]:
        """
        Return the rows stored since the last look.
        """
        asked = attrs.evolve(self._query, order="stored", limit=MAX_LIMIT)
        asked = attrs.evolve(asked, cursor=self._cursor)
        rows: list[Row] = []
        while True:
            page = self._source.page(asked)
            rows += page.rows
            if asked.is_last(page):
                break
            asked = attrs.evolve(asked, cursor=page.next)
        # Only now: a look that fails half-way is done again as a whole.
        self._cursor = asked.cursor
        return self._seen.fresh(sorted(rows, key=_id))


def _id(row: Row) -> str:
    return str(row["id"])


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
            id_ = _id(row)
            if id_ not in self._ids:
                found.append(row)
            self._ids[id_] = None
        while len(self._ids) > _REMEMBERED:
            self._ids.popitem(last=False)
        return found


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
