# SPDX-License-Identifier: Apache-2.0
"""
A log in memory: what a store, its sweeps, erasures and restores do to the rows.

It keeps what `repository` keeps, as plain lists and dicts, so that tests can edit any
of it. Real stores are tested where they are.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterable
from typing import Any, Final

import attrs

from fasten import chain, evidence
from fasten.rows import (
    AUDIT_COLUMNS,
    Pending,
    UlidMinter,
    canonical_json,
    parse_timestamp,
)

SEED: Final = "nWGxne/9WmC6hEr0kuwsxERJxWl7MmkZcDusAxyuf2A="
"""The secret key of RFC 8032, section 7.1, test 1: it signs the tests' checkpoints."""

START_US: Final = 1_764_000_000_123_456
CLASSES: Final = ("short", "medium", "long")
INDEX: Final = {name: index for index, name in enumerate(AUDIT_COLUMNS)}


def value(row: tuple[Any, ...], name: str) -> Any:
    """
    Return one column of a row.
    """
    return row[INDEX[name]]


def edited(row: tuple[Any, ...], **changes: Any) -> tuple[Any, ...]:
    """
    Return a row with other values in some columns.
    """
    return tuple(changes.get(n, v) for n, v in zip(AUDIT_COLUMNS, row, strict=True))


class Ledger:
    """
    One table with everything that stands beside it.
    """

    def __init__(self, seed: int = 0, service: str = "shop") -> None:
        self.service = service
        self.random = random.Random(seed)
        self.mint = UlidMinter(self.random.randbytes)
        self.us = START_US
        self.emitted: dict[str, Pending] = {}
        self.rows: list[tuple[Any, ...]] = []
        self.heads: dict[tuple[str, str, str], chain.Head] = {}
        self.nodes: dict[tuple[str, str], int] = {}
        self.stored: list[tuple[str, str]] = []
        self.signer = chain.ed25519_signer(service, SEED)
        self.verifiers = [chain.ed25519_verifier(self.signer.vkey)]

    # -- what a service does --

    def pending(self, class_: str = "medium", **given: Any) -> Pending:
        """
        Make a row as emit leaves it, with values never seen before.
        """
        number = self.random.randrange(10**9)
        self.us += self.random.choice((1, 1000, 1_000_001))
        some = self.random.random() < 0.5
        detail: dict[str, Any] = {"n": number, "sku": f"W{number}"}
        if some:
            detail["ünï"] = [1.5, None, {"a": True}]
        values = {
            "id": self.mint(self.us * 1000),
            "timestamp_us": self.us,
            "code": self.random.choice(("ORDER_PLACED", "USER_CREATED")),
            "action": "placed",
            "severity": "info",
            "category": "commerce",
            "domain": "commerce",
            "retention_class": class_,
            "outcome": "success",
            "actor": f"user-{number}",
            "actor_kind": "user",
            "on_behalf_of": f'the "boss" {number}' if some else None,
            "tenant_id": "t1" if some else None,
            "client": f"10.0.0.{number % 255}" if some else None,
            "target": f"order/{number}",
            "method": "http",
            "reason": "weil\n\u2028es 😀 geht" if some else None,
            "request_id": f"{number:032x}",
            "trace_id": f"{number:032x}" if some else None,
            "span_id": f"{number:016x}" if some else None,
            "detail": canonical_json(detail),
        }
        return Pending(**values | given)

    def append(self, node: str, rows: Iterable[Pending]) -> list[tuple[Any, ...]]:
        """
        Store a batch of one node's writer.
        """
        batch = list(rows)
        place = (self.service, node)
        seq = self.nodes.get(place, 0)
        heads = {k[2]: h for k, h in self.heads.items() if k[:2] == place}
        sealed = chain.seal(
            batch,
            service=self.service,
            node=node,
            first_seq=seq + 1,
            heads=heads,
            salts=self.random.randbytes(chain.SALT_BYTES * len(batch)),
            stored_at="2026-01-01T00:00:00.000000Z",
        )
        self.heads |= {h.key: h for h in heads.values()}
        self.nodes[place] = seq + len(batch)
        self.rows += sealed
        self.emitted |= {row.id: row for row in batch}
        return sealed

    def emit(self, node: str, *classes: str) -> list[tuple[Any, ...]]:
        """
        Store one row for each of *classes*.
        """
        return self.append(node, [self.pending(class_) for class_ in classes])

    def record(self, node: str, code: str, detail: dict[str, Any]) -> None:
        """
        Store a row of fasten itself.
        """
        row = self.pending(
            "long", code=code, domain="fasten", detail=canonical_json(detail)
        )
        self.append(node, [row])

    # -- what an operator does --

    def of_chain(self, key: tuple[str, str, str]) -> list[tuple[Any, ...]]:
        """
        Return the rows of one chain that are there, in order.
        """
        names = ("service_id", "source_node_id", "retention_class")
        found = [r for r in self.rows if tuple(value(r, n) for n in names) == key]
        return sorted(found, key=lambda row: value(row, "monotonic_seq"))

    def sweep(self, node: str, counts: dict[tuple[str, str, str], int]) -> None:
        """
        Cut rows from the front of chains; *node*'s writer stores the record.
        """
        said = []
        gone: list[tuple[Any, ...]] = []
        for key, count in counts.items():
            old = self.of_chain(key)[:count]
            if old:
                pairs = [(value(r, "monotonic_seq"), value(r, "hash")) for r in old]
                said.append(chain.cut(self.heads[key], pairs))
                gone += old
        self.rows = [row for row in self.rows if row not in gone]
        detail = {"deleted": len(gone), "cuts": said}
        self.record(node, "RETENTION_SWEEP_RAN", detail | self._carried(gone, said))

    def _carried(
        self, gone: list[tuple[Any, ...]], said: list[dict[str, Any]]
    ) -> dict[str, Any]:
        """
        Say again what the records said that this sweep deletes.
        """
        carried: dict[str, Any] = {"restored": [], "erased": []}
        for row in gone:
            if value(row, "domain") != "fasten" or value(row, "detail") is None:
                continue
            detail = json.loads(value(row, "detail"))
            match value(row, "code"):
                case "RETENTION_SWEEP_RAN":
                    keys = {(c["service"], c["node"], c["class"]) for c in said}
                    for old in detail["cuts"]:
                        key = (old["service"], old["node"], old["class"])
                        if key not in keys:
                            keys.add(key)
                            said.append(chain.restate(self.heads[key]))
                    carried["restored"] += detail["restored"]
                    carried["erased"] += detail["erased"]
                case "CHAIN_RESTORED":
                    carried["restored"].append(detail)
                case "AUDIT_ROW_ERASED":
                    carried["erased"].append(detail)
        return carried

    def erase(self, node: str, ids: list[str], fields: tuple[str, ...]) -> None:
        """
        Erase fields of rows, and say so.
        """
        self.rows = [
            chain.erase(row, fields) if value(row, "id") in ids else row
            for row in self.rows
        ]
        detail = {"ids": ids, "fields": list(fields), "reason": "asked for"}
        self.record(node, "AUDIT_ROW_ERASED", detail)

    def checkpoint(self, at: str = "2026-01-01T00:00:00.000000Z") -> list[str]:
        """
        Sign and store what each chain is now; return the notes.
        """
        notes = []
        for head in self.heads.values():
            if head.count:
                notes.append(chain.Checkpoint.of(head).sign([self.signer]))
                head.checkpointed_at = at
        self.stored += [(note, at) for note in notes]
        return notes

    def copy(self) -> Ledger:
        """
        Return a copy of the store: a backup, or one to tamper with.
        """
        other = copy.copy(self)
        other.rows = list(self.rows)
        other.heads = {key: attrs.evolve(head) for key, head in self.heads.items()}
        other.nodes = dict(self.nodes)
        other.stored = list(self.stored)
        return other

    def restore(self, backup: Ledger, *nodes: str) -> None:
        """
        Go back to *backup*; the writers of *nodes* store again what they still have.
        """
        before, kept = self.copy(), backup.copy()
        self.rows, self.heads = kept.rows, kept.heads
        self.nodes, self.stored = kept.nodes, kept.stored
        for node in nodes:
            place = (self.service, node)
            lost = (self.nodes.get(place, 0) + 1, before.nodes.get(place, 0))
            if lost[0] <= lost[1]:
                self._store_again(before, node, lost)
        # Of two restores, the second must not undo the record of the first.
        for text in sorted(before.said_restored() - self.said_restored()):
            self.record(nodes[0], "CHAIN_RESTORED", json.loads(text))

    def said_restored(self) -> set[str]:
        """
        Return the details of all CHAIN_RESTORED rows, those that were swept included.
        """
        said: set[str] = set()
        for row in self.rows:
            detail = json.loads(value(row, "detail") or "{}")
            if value(row, "code") == "CHAIN_RESTORED":
                said.add(canonical_json(detail))
            said |= {canonical_json(one) for one in detail.get("restored", ())}
        return said

    def _store_again(self, before: Ledger, node: str, lost: tuple[int, int]) -> None:
        place = (self.service, node)
        self.nodes[place] = lost[1]
        there = {value(row, "id") for row in self.rows}
        gone = [
            self.emitted[value(row, "id")]
            for row in before.in_order()
            if value(row, "source_node_id") == node and value(row, "id") not in there
        ]
        # What a sweep or an erasure did, the backup has undone.
        undone = ("RETENTION_SWEEP_RAN", "AUDIT_ROW_ERASED")
        self.append(node, [row for row in gone if row.code not in undone])
        said = chain.Restored(
            service_id=self.service,
            source_node_id=node,
            from_seq=lost[0],
            to_seq=lost[1],
            chains={
                key[2]: (head.count, chain.Checkpoint.of(head).root)
                for key, head in before.heads.items()
                if key[:2] == place
            },
        )
        self.record(node, "CHAIN_RESTORED", said.detail())

    # -- what verify sees --

    def in_order(self) -> list[tuple[Any, ...]]:
        """
        Return the rows as a store hands them to the verifier.
        """

        def place(row: tuple[Any, ...]) -> tuple[str, str, float]:
            number = value(row, "monotonic_seq")
            return (
                str(value(row, "service_id")),
                str(value(row, "source_node_id")),
                number if isinstance(number, int | float) else 0,
            )

        return sorted(self.rows, key=place)

    def verify(self, given: Iterable[str] = (), **options: Any) -> evidence.Report:
        """
        Verify the table as it stands.
        """
        settings: dict[str, Any] = {
            "nodes": self.nodes,
            "stored": self.stored,
            "verifiers": self.verifiers,
        }
        verifier = evidence.ChainVerifier(
            self.heads.values(), given=given, **settings | options
        )
        for row in self.in_order():
            verifier.feed(row)
        return verifier.finish()

    def lines(self) -> list[str]:
        """
        Return the rows as `fasten export` writes them.
        """
        return [wire_line(row) for row in sorted(self.rows, key=lambda r: r[1])]


def wire_line(row: tuple[Any, ...]) -> str:
    """
    Spell a row as one line of NDJSON.
    """
    wire = dict(zip(AUDIT_COLUMNS, row, strict=True))
    if wire["detail"] is not None:
        wire["detail"] = json.loads(wire["detail"])
    return json.dumps(wire)


def pending_of(row: tuple[Any, ...]) -> Pending:
    """
    Return a stored row as it was before it was sealed.
    """
    read = dict(zip(AUDIT_COLUMNS, row, strict=True))
    read["timestamp_us"] = parse_timestamp(read["timestamp"])
    return Pending(**{field: read[field] for field in Pending._fields})


def resealed(log: Ledger, edit: Callable[[Pending], Pending | None]) -> Ledger:
    """
    Return the log as somebody leaves it who edits rows and seals all of them anew.
    """
    forged = log.copy()
    forged.rows, forged.heads, forged.nodes = [], {}, {}
    for row in log.in_order():
        changed = edit(pending_of(row))
        if changed is not None:
            forged.append(value(row, "source_node_id"), [changed])
    for key, head in forged.heads.items():
        head.checkpointed_at = log.heads[key].checkpointed_at
    return forged
