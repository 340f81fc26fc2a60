# SPDX-License-Identifier: Apache-2.0
"""
Exports: the rows of one moment, from where the export before ended.

How a row is spelled is the command line's; what a file of rows proves, `evidence`'s.
"""

from __future__ import annotations

import json
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Iterator, Sequence
from typing import Any, Final

import sqlalchemy as sa

from fasten.chain import Checkpoint, Head, Note, Signer, is_frontier
from fasten.errors import InvalidQuery
from fasten.repository.reading import audit_conditions, audit_values
from fasten.repository.snapshot import Snapshot
from fasten.rows import AUDIT_COLUMNS, Query
from fasten.settings import Dsn

__all__ = ["Export", "Positions", "decode_positions", "encode_positions"]

Positions = dict[tuple[str, str], int]
"""The number of the last row exported of each (service, node)."""


def encode_positions(positions: Positions) -> str:
    """
    Make the opaque cursor that stands for "after these rows".
    """
    said = [[*place, seq] for place, seq in sorted(positions.items())]
    text = json.dumps(said, ensure_ascii=False, separators=(",", ":"))
    return urlsafe_b64encode(f"x{text}".encode()).decode().rstrip("=")


def decode_positions(cursor: str) -> Positions:
    """
    Read what `encode_positions` made.

    Raises:
        InvalidQuery: it is no cursor of an export.
    """
    try:
        raw = cursor.encode("ascii")
        text = urlsafe_b64decode(raw + b"=" * (-len(raw) % 4)).decode()
        if text[:1] == "x":
            said = json.loads(text[1:])
            return {(str(s), str(n)): int(seq) for s, n, seq in said}
    except (ValueError, TypeError, RecursionError):
        pass
    raise InvalidQuery(
        "the cursor is not from an export; use the one that `fasten export` printed",
        "cursor",
    )


class Export:
    """
    The rows that *query* asks for, of one moment; *positions* move on with them.
    """

    def __init__(
        self, moment: Snapshot, dsn: Dsn, query: Query, positions: Positions
    ) -> None:
        self._moment, self._dsn, self._query = moment, dsn, query
        self._start = dict(positions)
        self.positions = dict(positions)
        self._heads = moment.heads()

    @property
    def total(self) -> int:
        """
        Return about how many rows there are, before any filter.
        """
        return self._moment.estimate(self._heads)

    @property
    def is_whole(self) -> bool:
        """
        Tell whether nothing is left out, so that checkpoints can be held against it.
        """
        query = self._query
        return not query.filters and query.since_us is None and query.until_us is None

    def rows(self) -> Iterator[tuple[Any, ...]]:
        """
        Yield the rows in the order of AUDIT_COLUMNS, by service, node and number.
        """
        query, audit = self._query, self._moment.audit
        conditions = [*audit_conditions(audit, self._dsn, query), *self._after(audit)]
        values = audit_values(self._dsn, query, ahead_ms=self._moment.ahead_ms())
        for row in self._moment.rows(*conditions, values=values):
            yield row
            if type(row[_SEQ]) is int:
                self.positions[row[_SERVICE], row[_NODE]] = row[_SEQ]

    def _after(self, audit: sa.Table) -> list[Any]:
        return [
            sa.not_(
                sa.and_(
                    audit.c.service_id == service,
                    audit.c.source_node_id == node,
                    audit.c.monotonic_seq <= seq,
                )
            )
            for (service, node), seq in self._start.items()
        ]

    def notes(self, signers: Sequence[Signer], service: str) -> list[str]:
        """
        Return a checkpoint of each chain: of *service* as it is, else the newest kept.
        """
        kept: dict[tuple[str, str, str], tuple[int, str]] = {}
        for text, _ in self._moment.notes():
            if text:
                said = Note.parse(text).checkpoint
                kept[said.key] = max(kept.get(said.key, (0, "")), (said.size, text))
        notes = {key: text for key, (_, text) in kept.items()}
        if signers:
            notes |= {
                head.key: Checkpoint.of(head).sign(signers)
                for head in self._heads
                if head.service_id == service and _is_sound(head)
            }
        return [notes[key] for key in sorted(notes)]


def _is_sound(head: Head) -> bool:
    return bool(head.count) and is_frontier(head.frontier, head.count)


_SERVICE: Final = AUDIT_COLUMNS.index("service_id")
_NODE: Final = AUDIT_COLUMNS.index("source_node_id")
_SEQ: Final = AUDIT_COLUMNS.index("monotonic_seq")
