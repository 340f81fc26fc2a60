# SPDX-License-Identifier: Apache-2.0
"""
A store that went back: who notices, and who stores again what it has lost.

A restored backup, or a failover that lost commits. What was delivered stays in the
journals for 15 minutes, those of dead processes included; from there it is appended
again, above every number that anybody here remembers. The record of it is written by
`repository.restoring`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

from fasten import spool
from fasten.chain import Memory, Restored
from fasten.drain import BATCH_ROWS, Drainer, Lane, Rewound

if TYPE_CHECKING:
    from fasten.repository import AuditRepository, StoreWentBack, Writer

__all__ = ["Journal", "Refill"]

logger = logging.getLogger("fasten")

REASON: Final = "the store does not know what was stored in it"


class Journal(Protocol):
    """
    What can be read again: the own spool, or that of a dead process.
    """

    def remember(self, memory: bytes) -> None:
        """
        Keep with the journal what is known of the store.
        """

    def replay(self, after: int, limit: int) -> Any:
        """
        Read again what was delivered above *after*.
        """


class Refill:
    """
    What looks after one process's part in it. All of it runs in the drainer's thread.

    *revive* makes a lane of a dead process's journal, from an index on.
    """

    def __init__(
        self,
        drainer: Drainer,
        lane: Lane,
        journal: spool.Spool,
        directory: Path,
        *,
        repository: Callable[[], AuditRepository],
        writer: Callable[[], Writer],
        shown: Callable[[list[tuple[Any, ...]]], None],
        revive: Callable[[spool.Orphan, int], None],
        place: tuple[str, str],
    ) -> None:
        self._drainer, self._lane, self._journal = drainer, lane, journal
        self._directory = directory
        self._repository, self._writer = repository, writer
        self._shown, self._revive = shown, revive
        self._service, self._store = place
        self._said: list[Restored] = []
        self._revived: dict[str, int] = {}

    # -- remembering --

    def keep(self, writer: Writer, journal: Journal) -> None:
        """
        Write down what is known of the writer's node, before it is committed.
        """
        memory = self._repository().memory(writer.service, writer.node)
        if memory is not None:
            journal.remember(memory.encode())

    # -- noticing --

    def back(self, writer: Writer, journal: Journal, error: StoreWentBack) -> Rewound:
        """
        Put the store's numbers right; return what has the rows delivered again.
        """
        self.record(writer)
        return Rewound(error.reached, journal.replay(error.reached, BATCH_ROWS))

    def record(self, writer: Writer) -> None:
        """
        Put it on record that the store went back, and go on above what was lost.

        Raises:
            Exception: whatever the driver says.
        """
        from fasten.repository import Restorer

        restorer = Restorer(self._repository(), writer)
        known = self._memories(writer)
        lost = restorer.restore(known, reason=REASON, before=self._said)
        if lost is not None:
            self._said.append(lost)
            logger.warning(
                "fasten audit: the store went back: numbers %d to %d of %s/%s are gone "
                "from it; what the spool still has of them is stored again",
                *(lost.from_seq, lost.to_seq, lost.service_id, lost.source_node_id),
            )
        self._shown(restorer.stored)

    def _memories(self, writer: Writer) -> Iterable[Memory]:
        place = (writer.service, writer.node)
        texts = spool.memories(
            self._directory, service=self._service, store=self._store
        )
        known = [Memory.decode(text) for text in texts]
        known.append(self._repository().memory(*place))
        return [m for m in known if m and (m.service_id, m.source_node_id) == place]

    def look(self, kept: Iterable[spool.Orphan]) -> None:
        """
        See whether the store still accounts for what was delivered to it: by this
        process, and by those of which *kept* is left.
        """
        from fasten.repository import Writer

        orphans = {orphan.writer_id: orphan for orphan in kept}
        try:
            ids = [*orphans, *([self._writer().id] if self._has_delivered else [])]
            if not ids:
                return
            with self._drainer.guard():
                marks = self._repository().watermarks(ids)
                self._look_at_own(marks.get(self._writer().id))
                lost = [i for i in orphans if self._is_lost(orphans[i], marks[i])]
                for place in {(orphans[i].service, orphans[i].node) for i in lost}:
                    self.record(Writer(self._writer().id, *place))
            for id_ in lost:
                self._revived[id_] = marks[id_]
                self._revive(orphans.pop(id_), marks[id_])
        finally:
            for orphan in orphans.values():
                orphan.release()

    @property
    def _has_delivered(self) -> bool:
        return self._lane.reached > 0 and self._journal.bytes_on_disk > 0

    def _look_at_own(self, mark: int | None) -> None:
        lane = self._lane
        if mark is None or mark >= lane.reached or lane.again is not None:
            return
        self.record(self._writer())
        lane.rewind(mark, self._journal.replay(mark, BATCH_ROWS))

    def _is_lost(self, orphan: spool.Orphan, mark: int) -> bool:
        # Broken-off appends at a journal's end are accounted for, and never stored:
        # once is enough.
        return mark < orphan.acked and self._revived.get(orphan.writer_id) != mark

    def after_fork_in_child(self) -> None:
        """
        Leave the parent's findings to the parent.
        """
        self._said, self._revived = [], {}
