# SPDX-License-Identifier: Apache-2.0
"""
A store that went back: numbers are not used twice, and a record says what is gone.

Who notices, and who has the lost rows, is told by `fasten.refill`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from fasten.chain import Checkpoint, Frontier, Head, Memory, Restored
from fasten.repository.audit import AuditRepository, Writer
from fasten.repository.database import SchemaProblem
from fasten.repository.tables import HEAD_COLUMNS, head_of

__all__ = ["Restorer"]

PAGE: Final = 10_000


class Restorer:
    """
    What puts the numbers of *writer*'s node right, and records it in its chain.
    """

    def __init__(self, repository: AuditRepository, writer: Writer) -> None:
        self._repository, self._writer = repository, writer
        self.stored: list[tuple[Any, ...]] = []

    def restore(
        self,
        known: Iterable[Memory],
        *,
        reason: str,
        before: Iterable[Restored] = (),
    ) -> Restored | None:
        """
        Go on above every number that is *known*; return the stretch that is lost.

        None if nothing is. *before* are stretches that were on record: they are said
        again, as the record of them may be gone, too. What was written is in *stored*.

        Raises:
            SchemaProblem: rows stand above their head, and do not belong there.
            Exception: whatever the driver says; nothing is changed then.
        """
        repository, writer = self._repository, self._writer
        repository.schema.ensure()
        repository.forget(writer.service, writer.node)
        with repository.database.transaction() as connection:
            seq = repository.lock(connection, writer)
            heads = self._heads(connection)
            seq = self._catch_up(connection, heads, seq)
            most = Memory.joined([*known, *self._checkpointed(connection, seq)])
            if most is None or most.seq <= seq:
                return None
            lost = self._lost(most, heads, seq)
            self._move_node(connection, most.seq)
            target = f"{writer.service}/{writer.node}"
            said = {**lost.detail(), "reason": reason}
            again = [{**one.detail(), "reason": "said again"} for one in before]
            records = [("CHAIN_RESTORED", target, one) for one in (*again, said)]
            self.stored = repository.record_within(connection, writer, records)
        return lost

    def _lost(self, most: Memory, heads: Mapping[str, Head], seq: int) -> Restored:
        place = (self._writer.service, self._writer.node)
        there = Memory.of(*place, seq, heads.values()).chains
        return Restored(
            service_id=self._writer.service,
            source_node_id=self._writer.node,
            from_seq=seq + 1,
            to_seq=most.seq,
            chains={
                name: known
                for name, known in most.chains.items()
                if known != there.get(name)
            },
        )

    def _place(self, table: sa.Table) -> list[sa.ColumnElement[bool]]:
        writer = self._writer
        return [
            table.c.service_id == writer.service,
            table.c.source_node_id == writer.node,
        ]

    def _heads(self, connection: Connection) -> dict[str, Head]:
        table = self._repository.tables.head
        query = sa.select(*(table.c[name] for name in HEAD_COLUMNS))
        found = connection.execute(query.where(*self._place(table)).with_for_update())
        return {head.retention_class: head for head in map(head_of, found)}

    def _move_node(self, connection: Connection, seq: int) -> None:
        node = self._repository.tables.node
        connection.execute(node.update().where(*self._place(node)).values(seq=seq))

    def _checkpointed(self, connection: Connection, seq: int) -> Iterator[Memory]:
        """
        Yield what the checkpoints that the store still has say of lost numbers.
        """
        table = self._repository.tables.checkpoint
        columns = ("retention_class", "size", "root", "monotonic_seq")
        query = sa.select(*(table.c[name] for name in columns)).where(
            *self._place(table), table.c.monotonic_seq > seq
        )
        writer = self._writer
        for class_, size, root, number in connection.execute(query):
            said = Checkpoint(
                key=(writer.service, writer.node, class_),
                size=size,
                root=bytes.fromhex(root),
                seq=number,
            )
            yield Memory.told(said)

    # -- heads that are behind their table --

    def _catch_up(
        self, connection: Connection, heads: dict[str, Head], seq: int
    ) -> int:
        """
        Move heads on to the rows that stand above them; return the node's number.
        """
        start = seq
        while rows := self._above(connection, seq):
            for class_, number, prev_hash, digest in rows:
                head = self._follow(heads, class_, prev_hash)
                frontier = Frontier.read(head.frontier, head.count)
                frontier.push(bytes.fromhex(digest))
                head.frontier, head.count = str(frontier), head.count + 1
                head.seq, head.hash = number, digest
                seq = number
        if seq > start:
            self._move_node(connection, seq)
            for head in heads.values():
                self._move_head(connection, head)
        return seq

    def _above(self, connection: Connection, seq: int) -> list[Any]:
        table = self._repository.tables.audit
        columns = ("retention_class", "monotonic_seq", "prev_hash", "hash")
        query = (
            sa.select(*(table.c[name] for name in columns))
            .where(*self._place(table), table.c.monotonic_seq > seq)
            .order_by(table.c.monotonic_seq)
            .limit(PAGE)
        )
        return list(connection.execute(query))

    def _follow(self, heads: dict[str, Head], class_: str, prev_hash: str) -> Head:
        writer = self._writer
        head = heads.get(class_) or Head(
            service_id=writer.service,
            source_node_id=writer.node,
            retention_class=class_,
        )
        heads[class_] = head
        if head.hash != prev_hash:
            raise SchemaProblem(
                f"rows of {'/'.join(head.key)} stand above their head and do not "
                "follow it: restore the table and its side tables from one backup"
            )
        return head

    def _move_head(self, connection: Connection, head: Head) -> None:
        table = self._repository.tables.head
        columns = ("seq", "hash", "count", "frontier")
        moved = connection.execute(
            table.update()
            .where(*self._place(table), table.c.retention_class == head.retention_class)
            .values({name: getattr(head, name) for name in columns})
        )
        if not moved.rowcount:
            values = {name: getattr(head, name) for name in HEAD_COLUMNS}
            connection.execute(table.insert().values(values))
