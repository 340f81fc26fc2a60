# SPDX-License-Identifier: Apache-2.0
"""
Sweeps: expired rows cut from the front of each chain, in steps that may end anywhere.

A sweep is planned first, recorded with its first cut, and then made in transactions
of 10,000 rows. From when periods hold is told by `periods`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import takewhile
from typing import Any, Final

import attrs
import sqlalchemy as sa
from sqlalchemy.engine import Connection

from fasten import chain
from fasten.chain import COMMITTED_FIELDS, RECORD_CODES, RECORD_DOMAIN, Head
from fasten.repository.anchoring import Anchor
from fasten.repository.audit import MOST_IDS, AuditRepository, Writer, first_key
from fasten.repository.database import SchemaProblem
from fasten.repository.erasing import Erased, Eraser
from fasten.repository.holds import Hold, covered
from fasten.repository.periods import Periods, Record
from fasten.repository.reading import microseconds
from fasten.repository.roles import function_name, has_function
from fasten.repository.tables import HEAD_COLUMNS, head_of
from fasten.retention import RetentionPolicy
from fasten.rows import AUDIT_COLUMNS

__all__ = ["SWEEP_ROWS", "Order", "Sweep", "SweepIsBusy", "Sweeper"]

SWEEP_ROWS: Final = 10_000
"""How many rows one transaction deletes: as long may writers have to wait."""

LEASE_S: Final = 15.0
"""How long a sweeper that does nothing any more keeps others out."""

BEHIND_HOLD: Final = "expired behind a legal hold"
_SECOND: Final = 1_000_000


class SweepIsBusy(Exception):
    """
    Another process sweeps this service's chains.
    """


@attrs.frozen(kw_only=True)
class Order:
    """
    What is asked of a sweep, and what time it is.

    *is_time_given* means that the caller answers for *now_us*; *is_forced* lets
    shorter periods hold at once. One that *is_explicit* is recorded even if nothing
    had expired. *streams* are counts of sys and api rows to record.
    """

    wanted: RetentionPolicy
    now_us: int
    interval_s: float
    is_time_given: bool = False
    is_forced: bool = False
    is_dry: bool = False
    is_explicit: bool = False
    streams: dict[str, int] = attrs.field(factory=dict)
    limit: int = SWEEP_ROWS


@attrs.define(kw_only=True)
class Sweep:
    """
    What a sweep did, or would do; all counts are of rows.

    *erased* are those past a held row, *held* counts the chains that stop at one;
    *missing* names rights. *stored* are its records, as columns, *notes*
    the checkpoints made.
    """

    deleted: int = 0
    by_class: dict[str, int] = attrs.field(factory=dict)
    erased: int = 0
    held: int = 0
    streams: dict[str, int] = attrs.field(factory=dict)
    is_dry: bool = False
    missing: list[str] = attrs.field(factory=list)
    stored: list[tuple[Any, ...]] = attrs.field(factory=list)
    notes: list[str] = attrs.field(factory=list)


@attrs.define(kw_only=True)
class _Cut:
    """
    How far one chain is to be cut: the head as it will be, and what is said of it.

    *held_at* is the number of the held row that stopped it.
    """

    head: Head
    from_seq: int = 0
    count: int = 0
    held_at: int | None = None

    @property
    def said(self) -> dict[str, Any]:
        """
        Return what the sweep's record says of this chain.
        """
        told = chain.restate(self.head)
        return {**told, "from_seq": self.from_seq, "count": self.count}


class Sweeper:
    """
    One sweep over the chains of a service; `run` it to its end, or leave it anywhere.

    *has_begun* once no other process can be in the way, *cut* counts rows as they go.
    """

    def __init__(
        self,
        repository: AuditRepository,
        writer: Writer,
        order: Order,
        *,
        anchor: Anchor | None = None,
    ) -> None:
        self._repository = repository
        self._writer, self._order = writer, order
        self._anchor = anchor
        self._audit = repository.tables.audit
        self._head = repository.tables.head
        self._periods = Periods(repository, writer.service)
        self._cutoffs: dict[str, int] = {}
        self._holds: list[Hold] = []
        self._only_shipped = False
        self._cuts: list[_Cut] = []
        self._lost: list[tuple[str, dict[str, Any]]] = []
        self._record_id: str | None = None
        self.has_begun, self.cut = False, 0
        self.done = Sweep(is_dry=order.is_dry, streams=dict(order.streams))

    def run(self) -> Iterator[None]:
        """
        Sweep; between two steps no transaction is open.

        Raises:
            SweepIsBusy: another process is at it.
            Exception: whatever the driver says; what was done so far stays.
        """
        self._repository.schema.ensure()
        self._begin()
        yield
        for head in self._heads():
            yield from self._plan(head)
        self._count()
        if self._order.is_dry:
            return
        yield from self._sign()
        while self._cut_some():
            yield
        yield from self._erase_behind_holds()
        if self.done.erased:
            yield from self._sign()
        self._end()

    # -- the beginning --

    def _begin(self) -> None:
        with self._repository.database.transaction() as connection:
            if not self._order.is_dry:
                self._take_lease(connection)
            now_us = self._time(connection)
            policy, records = self._policy(connection, now_us)
            self._cutoffs = policy.cutoffs(now_us)
            self._holds = self._repository.holds.active(connection)
            self._only_shipped = self._repository.meta.get(connection, "ships") is True
            self._record(connection, records)
        self.has_begun = True

    def _time(self, connection: Connection) -> int:
        order = self._order
        if order.is_time_given:
            return order.now_us
        if order.is_dry or order.is_forced:
            return min(order.now_us, self._periods.store_us(connection))
        grace_s = order.wanted.grace_s
        gap_s = 2 * max(grace_s, order.interval_s)
        return self._periods.trusted_us(
            connection, order.now_us, grace_s=grace_s, gap_s=gap_s
        )

    def _policy(
        self, connection: Connection, now_us: int
    ) -> tuple[RetentionPolicy, list[Record]]:
        order, is_forced = self._order, self._order.is_forced
        if order.is_dry:
            policy = self._periods.peek(
                connection, order.wanted, now_us, is_forced=is_forced
            )
            return policy, []
        return self._periods.settle(
            connection, order.wanted, now_us, is_forced=is_forced
        )

    def _record(self, connection: Connection, records: Sequence[Record]) -> None:
        if records and not self._order.is_dry:
            self.done.stored += self._repository.record_within(
                connection, self._writer, records
            )

    # -- one sweeper at a time --

    def give_up(self) -> None:
        """
        Let others sweep: this one is left where it is.

        Raises:
            Exception: whatever the driver says.
        """
        with self._repository.database.transaction() as connection:
            self._drop_lease(connection)

    def _drop_lease(self, connection: Connection) -> None:
        meta = self._repository.meta
        held = meta.get(connection, self._lease, is_locked=True)
        if isinstance(held, dict) and held.get("by") == self._writer.id:
            meta.put(connection, self._lease, None)

    @property
    def _lease(self) -> str:
        return f"sweep:{self._writer.service}"

    def _take_lease(self, connection: Connection) -> None:
        """
        Become the one that sweeps, or stay it.

        Raises:
            SweepIsBusy: somebody else is.
        """
        meta = self._repository.meta
        held = meta.get(connection, self._lease, is_locked=True)
        # Only now: whoever had the lock before us has read the clock later otherwise.
        now_us = self._periods.store_us(connection)
        if isinstance(held, dict) and held.get("by") != self._writer.id:
            until_us = held.get("until_us")
            # A lease of the far future was taken by a clock that is wrong.
            longest_us = 2 * LEASE_S * _SECOND
            if type(until_us) is int and 0 < until_us - now_us <= longest_us:
                raise SweepIsBusy(
                    "another process is sweeping; try again in "
                    f"{(until_us - now_us) / _SECOND:.0f} s"
                )
        until_us = now_us + round(LEASE_S * _SECOND)
        meta.put(connection, self._lease, {"by": self._writer.id, "until_us": until_us})

    def _end(self) -> None:
        with self._repository.database.transaction() as connection:
            self._drop_lease(connection)
            now_us = self._periods.store_us(connection)
            self._repository.meta.put(
                connection, f"swept:{self._writer.service}", now_us
            )
            tidy(connection, self._repository)
        if not self._repository.database.is_postgres:
            self._repository.database.run("PRAGMA incremental_vacuum(4000)")

    # -- the plan --

    def _heads(self) -> list[Head]:
        head = self._head.c
        query = sa.select(*(head[name] for name in HEAD_COLUMNS)).where(
            head.service_id == self._writer.service,
            head["count"] > head.pruned_count,
        )
        with self._repository.database.looking() as connection:
            found = list(map(head_of, connection.execute(query)))
        return sorted(found, key=lambda head: head.key)

    def _plan(self, head: Head) -> Iterator[None]:
        """
        Find how far a chain has expired, reading some rows in each step.
        """
        if head.retention_class not in self._cutoffs:
            return
        if not chain.is_frontier(head.pruned_frontier, head.pruned_count):
            raise SchemaProblem(
                f"the head of {'/'.join(head.key)} was edited; run `fasten verify`"
            )
        cut = _Cut(head=attrs.evolve(head))
        is_open = True
        while is_open:
            with self._repository.database.looking() as connection:
                # Most chains have nothing to give: one row tells.
                is_open = self._look(connection, cut, head.seq, 1)
                if is_open:
                    is_open = self._look(connection, cut, head.seq, self._order.limit)
            yield
        if cut.count or cut.held_at is not None:
            self._cuts.append(cut)

    def _look(
        self, connection: Connection, cut: _Cut, through: int, limit: int
    ) -> bool:
        """
        Move *cut* over up to *limit* rows; true if all have expired.
        """
        rows = self._oldest(connection, cut.head, through, limit)
        return self._take_expired(cut, rows) and len(rows) == limit

    def _oldest(
        self, connection: Connection, head: Head, through: int, limit: int
    ) -> list[Any]:
        """
        Return the next rows of a chain, *through* a number, up to the limit.
        """
        noted = self._repository.meta.get(connection, first_key(head))
        if type(noted) is int and noted > head.pruned_seq:
            rows = self._between(connection, head, noted - 1, through, limit)
            if rows and rows[0]["prev_hash"] == head.pruned_hash:
                return rows
        # What the chains of other classes have in between is read past.
        return self._between(connection, head, head.pruned_seq, through, limit)

    def _between(
        self,
        connection: Connection,
        head: Head,
        after: int,
        through: int,
        limit: int,
    ) -> list[Any]:
        audit = self._audit.c
        is_record = sa.and_(audit.domain == RECORD_DOMAIN, audit.code.in_(RECORD_CODES))
        query = (
            sa.select(
                audit.monotonic_seq,
                audit.hash,
                audit.prev_hash,
                audit.timestamp,
                audit.shipped_at,
                audit.target,
                audit.actor,
                audit.code,
                sa.case((is_record, audit.detail)).label("said"),
            )
            .where(
                *self._in_chain(head),
                audit.monotonic_seq > after,
                audit.monotonic_seq <= through,
            )
            .order_by(audit.monotonic_seq)
            .limit(limit)
        )
        return list(connection.execute(query).mappings())

    def _in_chain(self, head: Head) -> list[Any]:
        audit = self._audit.c
        return [
            audit.service_id == head.service_id,
            audit.source_node_id == head.source_node_id,
            audit.retention_class == head.retention_class,
        ]

    def _take_expired(self, cut: _Cut, rows: Sequence[Any]) -> bool:
        """
        Move *cut* over the rows that may go; true if all of them may.
        """
        gone = []
        for row in rows:
            if not self._has_expired(cut.head.retention_class, row):
                break
            if covered(self._holds, row):
                cut.held_at = row["monotonic_seq"]
                break
            gone.append(row)
        if gone:
            pairs = [(row["monotonic_seq"], row["hash"]) for row in gone]
            said = chain.cut(cut.head, pairs)
            cut.from_seq = cut.from_seq or said["from_seq"]
            cut.count += len(gone)
            self._lose(gone)
        return len(gone) == len(rows)

    def _has_expired(self, class_: str, row: Any) -> bool:
        if not chain.is_hash(row["hash"]):
            return False  # tampered with: verify has something to say about it
        if self._only_shipped and row["shipped_at"] is None:
            return False
        with suppress(ValueError):
            return microseconds(row["timestamp"]) < self._cutoffs[class_]
        return False

    def _lose(self, rows: Iterable[Any]) -> None:
        """
        Remember what records say that are about to go.
        """
        for row in rows:
            if row["said"] is not None:
                with suppress(ValueError):
                    said = json.loads(row["said"])
                    if isinstance(said, dict):
                        self._lost.append((row["code"], said))

    def _count(self) -> None:
        done = self.done
        for cut in self._cuts:
            name = cut.head.retention_class
            if cut.count:
                done.by_class[name] = done.by_class.get(name, 0) + cut.count
            done.held += cut.held_at is not None
        done.deleted = sum(done.by_class.values())

    def _sign(self) -> Iterator[None]:
        if self._anchor is not None and (self.done.deleted or self.done.erased):
            for notes in self._anchor.run():
                self.done.notes += notes
                yield

    # -- cutting --

    def _cut_some(self) -> bool:
        """
        Delete up to the limit, and say so the first time; true if there is more.
        """
        with self._repository.database.transaction() as connection:
            self._take_lease(connection)
            self._holds = self._repository.holds.active(connection)
            parts = self._next_parts()
            self._lock(connection, [cut for cut, _ in parts])
            if self._record_id is None and not self._record_sweep(connection):
                return False
            for cut, limit in parts:
                self._cut(connection, cut, limit)
        self._cuts = [cut for cut in self._cuts if cut.count or cut.held_at is not None]
        return any(cut.count for cut in self._cuts)

    def _next_parts(self) -> list[tuple[_Cut, int]]:
        parts = []
        left = self._order.limit
        for cut in self._cuts:
            if cut.count and left:
                number = min(cut.count, left)
                parts.append((cut, number))
                left -= number
        return parts

    def _lock(self, connection: Connection, cuts: Iterable[_Cut]) -> None:
        places = {cut.head.key[:2] for cut in cuts}
        places.add((self._writer.service, self._writer.node))
        # In one order, whoever locks: two that lock several cannot wait for each other.
        for service, node in sorted(places):
            self._repository.lock(connection, Writer("", service, node))

    def _record_sweep(self, connection: Connection) -> bool:
        """
        Record the whole sweep; false where there is nothing to record.
        """
        done = self.done
        has_done = done.deleted or any(done.streams.values())
        if not has_done and not self._order.is_explicit:
            return False
        detail = {
            "deleted": done.deleted,
            "by_class": done.by_class,
            "cuts": [cut.said for cut in self._cuts if cut.count],
            "restored": [],
            "erased": [],
        }
        if done.streams:
            detail["streams"] = done.streams
        if done.held:
            detail["held"] = done.held
        self._carry(connection, detail)
        record = ("RETENTION_SWEEP_RAN", self._writer.service, detail)
        stored = self._repository.record_within(connection, self._writer, [record])
        self._record_id = stored[0][1]
        done.stored += stored
        return True

    def _carry(self, connection: Connection, detail: dict[str, Any]) -> None:
        """
        Say again what the records said that this sweep deletes.
        """
        named = {(c["service"], c["node"], c["class"]) for c in detail["cuts"]}
        for code, said in self._lost:
            match code:
                case "RETENTION_SWEEP_RAN":
                    self._restate(connection, said, named, detail["cuts"])
                    detail["restored"] += _dicts(said, "restored")
                    detail["erased"] += _dicts(said, "erased")
                case "CHAIN_RESTORED":
                    detail["restored"].append(said)
                case "AUDIT_ROW_ERASED":
                    detail["erased"].append(said)
        kept = [self._still_there(connection, said) for said in detail["erased"]]
        detail["erased"] = [said for said in kept if said["ids"]]

    def _restate(
        self,
        connection: Connection,
        said: dict[str, Any],
        named: set[tuple[str, str, str]],
        cuts: list[dict[str, Any]],
    ) -> None:
        for old in _dicts(said, "cuts"):
            cut = chain.Cut.read(old)
            if cut is None or cut.key in named:
                continue
            head = self._read_head(connection, cut.key)
            if head is not None and head.pruned_count:
                named.add(cut.key)
                cuts.append(chain.restate(head))

    def _still_there(
        self, connection: Connection, said: dict[str, Any]
    ) -> dict[str, Any]:
        """
        Return a record of erasure about those of its rows that stay.
        """
        audit = self._audit.c
        ids = [id_ for id_ in said.get("ids") or () if isinstance(id_, str)]
        found = connection.execute(
            sa.select(
                audit.id,
                audit.service_id,
                audit.source_node_id,
                audit.retention_class,
                audit.monotonic_seq,
            ).where(audit.id.in_(ids))
        ).all()
        ends = {cut.head.key: cut.head.pruned_seq for cut in self._cuts}
        kept = {row[0] for row in found if row[4] > ends.get(tuple(row[1:4]), 0)}
        return {**said, "ids": [id_ for id_ in ids if id_ in kept]}

    def _read_head(
        self, connection: Connection, key: tuple[str, str, str]
    ) -> Head | None:
        head = self._head.c
        query = (
            sa.select(*(head[name] for name in HEAD_COLUMNS))
            .where(*self._at(key))
            .with_for_update()
        )
        found = connection.execute(query).first()
        return head_of(found) if found else None

    def _at(self, key: tuple[str, str, str]) -> list[Any]:
        head = self._head.c
        return [
            head.service_id == key[0],
            head.source_node_id == key[1],
            head.retention_class == key[2],
        ]

    def _cut(self, connection: Connection, cut: _Cut, limit: int) -> None:
        """
        Delete up to *limit* rows of one chain, and move its head's pruned-through.
        """
        head = self._read_head(connection, cut.head.key)
        if head is None or head.pruned_seq >= cut.head.pruned_seq:
            cut.count = 0  # somebody was here before
            return
        rows = self._oldest(connection, head, cut.head.pruned_seq, limit)
        held = [row for row in rows if covered(self._holds, row)]
        if held:
            # Put since the plan was made: what is in front of it may still go.
            cut.held_at = held[0]["monotonic_seq"]
            rows = rows[: rows.index(held[0])]
        if rows:
            self._delete(connection, head, rows)
        cut.count = 0 if held else cut.count - len(rows)
        self.cut += len(rows)

    def _delete(self, connection: Connection, head: Head, rows: Sequence[Any]) -> None:
        chain.cut(head, [(row["monotonic_seq"], row["hash"]) for row in rows])
        if has_function(connection, self._repository.dsn, "prune"):
            gone = self._call(connection, head)
        else:
            gone = self._delete_directly(connection, head, rows[0]["monotonic_seq"])
        if gone != len(rows):
            raise SchemaProblem(
                f"{len(rows)} rows of {'/'.join(head.key)} were to be deleted, and "
                f"{gone} were; run `fasten verify`"
            )

    def _call(self, connection: Connection, head: Head) -> int:
        name = function_name(self._repository.dsn, "prune")
        call = sa.text(
            f"SELECT {name}(:record, :service, :node, :class, :through, :frontier)"
        )
        service, node, class_ = head.key
        given = {
            "record": self._record_id,
            "service": service,
            "node": node,
            "class": class_,
            "through": head.pruned_seq,
            "frontier": head.pruned_frontier,
        }
        return int(connection.execute(call, given).scalar_one())

    def _delete_directly(self, connection: Connection, head: Head, first: int) -> int:
        # First of all the head: what it has passed may go, say the triggers.
        connection.execute(
            self._head.update()
            .where(*self._at(head.key))
            .values(
                pruned_seq=head.pruned_seq,
                pruned_hash=head.pruned_hash,
                pruned_count=head.pruned_count,
                pruned_frontier=head.pruned_frontier,
            )
        )
        seq = self._audit.c.monotonic_seq
        done = connection.execute(
            self._audit.delete().where(
                *self._in_chain(head), seq >= first, seq <= head.pruned_seq
            )
        )
        return int(done.rowcount)

    # -- behind a hold --

    def _erase_behind_holds(self) -> Iterator[None]:
        """
        Erase expired rows that a held row in front of them keeps from going.
        """
        eraser = Eraser(self._repository, self._writer)
        for cut in self._cuts:
            done = Erased()
            try:
                while cut.held_at is not None and self._erase_some(cut, eraser, done):
                    yield
            except sa.exc.ProgrammingError as error:
                self._note_missing(error)
            self.done.erased += done.rows
            self.done.stored += done.stored

    def _note_missing(self, error: sa.exc.ProgrammingError) -> None:
        """
        Go on without the right to erase; whoever sweeps is told.
        """
        if getattr(error.orig, "sqlstate", None) != "42501":
            raise error
        self.done.missing.append(
            f"EXECUTE on {function_name(self._repository.dsn, 'erase')}: expired rows "
            "behind a hold stay whole; sweep as a member of fasten_retention"
        )

    def _erase_some(self, cut: _Cut, eraser: Eraser, done: Erased) -> bool:
        """
        Erase the next expired rows behind a held one; true if there may be more.
        """
        class_ = cut.head.retention_class
        with self._repository.database.transaction() as connection:
            self._take_lease(connection)
            eraser.lock(connection)
            rows = self._behind(connection, cut)
            gone = list(
                takewhile(
                    lambda row: self._has_expired(
                        class_, dict(zip(AUDIT_COLUMNS, row, strict=True))
                    ),
                    rows,
                )
            )
            eraser.erase_rows(
                connection,
                [row for row in gone if row[_DOMAIN] != RECORD_DOMAIN],
                COMMITTED_FIELDS,
                BEHIND_HOLD,
                done,
            )
            if gone:
                self._mark_behind(connection, cut, gone[-1][_SEQ])
        return len(gone) == MOST_IDS

    def _behind(self, connection: Connection, cut: _Cut) -> list[Any]:
        audit = self._audit.c
        query = (
            sa.select(*(audit[name] for name in AUDIT_COLUMNS))
            .where(
                *self._in_chain(cut.head),
                audit.monotonic_seq > self._erased_through(connection, cut),
            )
            .order_by(audit.monotonic_seq)
            .limit(MOST_IDS)
            .with_for_update()
        )
        return list(connection.execute(query).all())

    def _behind_key(self, cut: _Cut) -> str:
        return f"behind:{'/'.join(cut.head.key)}"

    def _erased_through(self, connection: Connection, cut: _Cut) -> int:
        """
        Return how far an earlier sweep came, under the same holds.
        """
        said = self._repository.meta.get(connection, self._behind_key(cut))
        through = cut.held_at or 0
        if isinstance(said, dict) and said.get("holds") == self._hold_ids():
            known = said.get("through")
            return max(through, known) if type(known) is int else through
        return through

    def _hold_ids(self) -> list[str]:
        return sorted(hold.id for hold in self._holds)

    def _mark_behind(self, connection: Connection, cut: _Cut, through: int) -> None:
        said = {"through": through, "holds": self._hold_ids()}
        self._repository.meta.put(connection, self._behind_key(cut), said)


_SEQ: Final = AUDIT_COLUMNS.index("monotonic_seq")
_DOMAIN: Final = AUDIT_COLUMNS.index("domain")


def _dicts(said: dict[str, Any], name: str) -> list[dict[str, Any]]:
    value = said.get(name)
    return (
        [one for one in value if isinstance(one, dict)]
        if isinstance(value, list)
        else []
    )


# --- tidying up -----------------------------------------------------------------------


def tidy(connection: Connection, repository: AuditRepository) -> None:
    """
    Thin old checkpoints to one a day, and drop erasures that are about no row any more.
    """
    if has_function(connection, repository.dsn, "prune"):
        name = function_name(repository.dsn, "prune")
        connection.execute(sa.text(f"SELECT {name}()"))
        return
    for statement in _tidying(repository, connection):
        connection.execute(statement)


def _tidying(repository: AuditRepository, connection: Connection) -> Iterator[Any]:
    now_us = Periods(repository, "").store_us(connection)

    def ago(days: int) -> Any:
        return repository.moment(now_us - days * 86_400 * _SECOND)

    table = repository.tables.checkpoint
    later = table.alias("later")
    keys = ("service_id", "source_node_id", "retention_class")
    is_later = sa.and_(
        *(later.c[key] == table.c[key] for key in keys),
        later.c.created_at > table.c.created_at,
        _day(later.c.created_at, connection) == _day(table.c.created_at, connection),
    )
    yield table.delete().where(
        table.c.created_at < ago(30), sa.exists().where(is_later)
    )
    erasure, writer = repository.tables.erasure, repository.tables.writer
    waits = sa.exists().where(
        writer.c.updated_at > ago(30),
        sa.or_(
            writer.c.followed_at.is_(None),
            writer.c.followed_at < erasure.c.erased_at,
        ),
    )
    longest_s = _longest_s(repository, connection)
    if longest_s is not None:
        gone = repository.moment(now_us - longest_s * _SECOND)
        yield erasure.delete().where(erasure.c.erased_at < gone, sa.not_(waits))


def _longest_s(repository: AuditRepository, connection: Connection) -> int | None:
    """
    Return the longest period of any class and service; None if none is on record.

    What was born before an erasure that old has expired, wherever it waits: the entry
    is of no more use. A host may be away for long, with rows that nobody has seen.
    """
    said = repository.meta.starting(connection, "retention:").values()
    periods = [each.values() for each in said if isinstance(each, dict)]
    known = [s for values in periods for s in values if type(s) is int]
    return max(known, default=None)


def _day(column: Any, connection: Connection) -> Any:
    if connection.dialect.name == "postgresql":
        return sa.func.date_trunc("day", sa.func.timezone("UTC", column))
    return sa.func.substr(column, 1, 10)
