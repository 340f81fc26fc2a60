# SPDX-License-Identifier: Apache-2.0
"""
What could not be kept: counted exactly, and told in rows of fasten's own.

Rows that found no room are told as soon as there is some; those that a damaged journal
lost are told in the very transaction that passes over them. Where the rows go is
`delivery`'s.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import count
from typing import Any, Final

from fasten import spool
from fasten.drain import Batch
from fasten.rows import AUDIT_COLUMNS

__all__ = ["Losses", "MakeRow"]

logger = logging.getLogger("fasten")

RECENT_S: Final = 5.0
"""For how long after a drop a process counts as dropping."""

MakeRow = Callable[[str, str, Mapping[str, Any]], tuple[Any, ...]]
"""What makes a row of fasten's own of a code, a target and a detail."""


class _Tally:
    """
    A counter that threads, signal handlers and `__del__` may all advance.
    """

    def __init__(self) -> None:
        self._numbers = count()
        self.add = self._numbers.__next__  # one step to the interpreter; += is not

    @property
    def value(self) -> int:
        # The only look at a count() that neither advances it nor is deprecated.
        return int(repr(self._numbers)[len("count(") : -1])


class Losses:
    """
    The drops of one process, and the gaps that it found in journals.
    """

    def __init__(self, queue: spool.Spool, make_row: MakeRow) -> None:
        self._queue, self._make_row = queue, make_row
        self._reset()

    def _reset(self) -> None:
        self._drops = _Tally()
        self._told = self._found = 0
        self._at: float | None = None
        self._is_dropping = False
        # Guards *_told*: the drainer tells, and so does close().
        self._telling = threading.Lock()

    after_fork_in_child = _reset

    # -- callers' threads --

    def drop(self) -> None:
        """
        Count a row that found no room: exact, and safe when re-entered.
        """
        self._drops.add()
        self._at = time.monotonic()

    def refuse(self) -> None:
        """
        Note that a caller was told at once that there is no room.
        """
        self._at = time.monotonic()

    @property
    def unqueued(self) -> int:
        """
        Return how many rows found no room.
        """
        return self._drops.value

    @property
    def dropped(self) -> int:
        """
        Return how many rows are lost: the sum of what AUDIT_ROWS_DROPPED rows say.
        """
        return self._drops.value + self._found

    @property
    def is_recent(self) -> bool:
        """
        Tell whether rows are being dropped or refused in these seconds.
        """
        return self._at is not None and time.monotonic() - self._at < RECENT_S

    # -- the drainer's thread --

    def tell(self) -> None:
        """
        Queue the row that says how many were dropped, once there is room for it.
        """
        if not self._telling.acquire(blocking=False):
            return
        try:
            self._note_change()
            fresh = self._drops.value - self._told
            if fresh and self._queue.has_room:
                writer_id = self._queue.writer_id
                detail = {"writer": writer_id, "count": fresh}
                row = self._make_row("AUDIT_ROWS_DROPPED", writer_id, detail)
                # Not by way of `emit`: a report that finds no room is told later, and
                # is no drop itself.
                if self._queue.append(spool.pack(row), row):
                    self._told += fresh
        finally:
            self._telling.release()

    def _note_change(self) -> None:
        if self._is_dropping == self.is_recent:
            return
        self._is_dropping = not self._is_dropping
        if self._is_dropping:
            logger.warning(
                "fasten audit: no room in spool and queue, rows are dropped; %s",
                self._queue.fault or "see what keeps the store from taking rows",
            )
        else:
            logger.warning(
                "fasten audit: rows are kept again; %d were dropped", self.unqueued
            )

    def last_word(self) -> None:
        """
        Say how many drops no row could be written about, as the process goes.
        """
        self.tell()
        untold = self._drops.value - self._told
        if untold:
            logger.error(
                "fasten audit: %d rows were dropped, and no row could say so", untold
            )

    def reports(self, writer_id: str, batch: Batch) -> list[tuple[int, Any]]:
        """
        Make the rows that say what *batch* is missing, each at the end of its gap.

        They share the fate of the batch's other rows: at or below the watermark they
        were told before.
        """
        return [
            (last, self._make_row("AUDIT_ROWS_DROPPED", writer_id, said))
            for first, last in batch.missing
            for said in [_gap(writer_id, first, last)]
        ]

    def found(
        self, batch: Batch, reports: Sequence[tuple[int, Any]], stored: Iterable[Any]
    ) -> None:
        """
        Count what *batch* was missing, as far as it was not told before: as far as
        the reports are among the rows that were *stored*, as columns.
        """
        if not reports:
            return
        ids = {row[_ID] for row in stored}
        pairs = zip(batch.missing, reports, strict=True)
        self._found += sum(
            last - first + 1 for (first, last), (_, row) in pairs if row[0] in ids
        )


_ID: Final = AUDIT_COLUMNS.index("id")


def _gap(writer_id: str, first: int, last: int) -> dict[str, Any]:
    count_ = last - first + 1
    return {"writer": writer_id, "from": first, "to": last, "count": count_}
