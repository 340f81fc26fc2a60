# SPDX-License-Identifier: Apache-2.0
"""
Checkpoints: what each chain is now, signed and kept beside it.

When to make them is told by `upkeep` and the command line; what they look like, by
`chain`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from fasten.chain import Checkpoint, Head, Signer, is_frontier
from fasten.repository.audit import AuditRepository, Writer
from fasten.repository.meta import clock
from fasten.repository.reading import microseconds, moment
from fasten.repository.tables import HEAD_COLUMNS, head_of

__all__ = ["Anchor"]

IDLE_S: Final = 86_400.0
"""After this long an idle chain is signed again: somebody is still at home."""

KEPT_S: Final = 30 * 86_400.0
"""After this long one checkpoint a day is kept."""


class Anchor:
    """
    What signs the chains of one service.
    """

    def __init__(
        self, repository: AuditRepository, service: str, signers: Sequence[Signer]
    ) -> None:
        self._repository = repository
        self._service = service
        self._signers = signers
        self._head = repository.tables.head
        self._table = repository.tables.checkpoint

    def run(self, *, interval_s: float = 0.0) -> Iterator[list[str]]:
        """
        Sign what has changed, a node in each step; yield the notes that were stored.

        A chain that was signed less than *interval_s* seconds ago waits: of several
        processes one does it.

        Raises:
            Exception: whatever the driver says; what was yielded is stored.
        """
        for node, _ in groupby(self._waiting(interval_s), key=lambda key: key[1]):
            yield self._sign_node(node, interval_s)

    def _waiting(self, interval_s: float) -> list[tuple[str, str, str]]:
        """
        Return the chains that may have to be signed, in order, without any lock.
        """
        with self._repository.database.looking() as connection:
            now_us = self._now_us(connection)
            heads = [
                head
                for head in self._heads(connection)
                if self._is_due(connection, head, now_us, interval_s)
            ]
        return sorted(head.key for head in heads)

    def _sign_node(self, node: str, interval_s: float) -> list[str]:
        with self._repository.database.transaction() as connection:
            # As appending does: the node's row first, then its heads.
            self._repository.lock(connection, Writer("", self._service, node))
            now_us = self._now_us(connection)
            at_node = self._head.c.source_node_id == node
            return [
                self._store(connection, head, now_us)
                for head in self._heads(connection, at_node)
                if self._is_due(connection, head, now_us, interval_s)
            ]

    def _heads(
        self, connection: Connection, *conditions: sa.ColumnElement[bool]
    ) -> list[Head]:
        head = self._head.c
        query = sa.select(*(head[name] for name in HEAD_COLUMNS)).where(
            head.service_id == self._service, head["count"] > 0, *conditions
        )
        heads = map(head_of, connection.execute(query))
        # An edited head is verify's to tell; nothing is signed for it.
        return [head for head in heads if is_frontier(head.frontier, head.count)]

    def _now_us(self, connection: Connection) -> int:
        now = clock(connection.dialect.name)
        return microseconds(connection.execute(sa.select(now)).scalar_one())

    def _is_due(
        self, connection: Connection, head: Head, now_us: int, interval_s: float
    ) -> bool:
        at: Any = head.checkpointed_at
        if at is None:
            return True
        age_s = (now_us - microseconds(at)) / 1_000_000
        if age_s < 0:
            age_s = IDLE_S  # a clock was set back: it may not stop the checkpoints
        if age_s < interval_s:
            return False
        return age_s >= IDLE_S or self._has_changed(connection, head)

    def _has_changed(self, connection: Connection, head: Head) -> bool:
        table = self._table.c
        query = (
            sa.select(table.size, table.root)
            .where(*self._of(head))
            .order_by(table.size.desc(), table.created_at.desc())
            .limit(1)
        )
        last = connection.execute(query).first()
        if last is None:
            return True
        return tuple(last) != (head.count, Checkpoint.of(head).root.hex())

    def _of(self, head: Head) -> list[sa.ColumnElement[bool]]:
        names = ("service_id", "source_node_id", "retention_class")
        pairs = zip(names, head.key, strict=True)
        return [self._table.c[name] == value for name, value in pairs]

    def _store(self, connection: Connection, head: Head, now_us: int) -> str:
        said = Checkpoint.of(head)
        note = said.sign(self._signers)
        at = moment(self._repository.dsn, now_us)
        service, node, class_ = head.key
        connection.execute(
            self._table.insert().values(
                service_id=service,
                source_node_id=node,
                retention_class=class_,
                size=said.size,
                monotonic_seq=said.seq,
                root=said.root.hex(),
                note=note,
                created_at=at,
            )
        )
        here = self._head.c
        connection.execute(
            self._head.update()
            .where(
                here.service_id == service,
                here.source_node_id == node,
                here.retention_class == class_,
            )
            .values(checkpointed_at=at)
        )
        return note

    # -- all of them --

    def newest(self) -> list[str]:
        """
        Return a note of each chain as it stands, in order.

        Raises:
            Exception: whatever the driver says.
        """
        with self._repository.database.reading() as connection:
            heads = self._heads(connection)
        return [
            Checkpoint.of(head).sign(self._signers)
            for head in sorted(heads, key=lambda head: head.key)
        ]
