# SPDX-License-Identifier: Apache-2.0
"""
Erasing fields of stored rows, so that their seals stay valid, and saying so.

Whom an erasure is about while rows are on their way is in `erasures`; what follows it
outside the store, in `fasten.custody`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any, Final

import attrs
import sqlalchemy as sa
from sqlalchemy.engine import Connection

from fasten import chain
from fasten.chain import COMMITTED_FIELDS, RECORD_CODES, RECORD_DOMAIN
from fasten.repository.audit import MOST_IDS, AuditRepository, Writer, erasure_details
from fasten.repository.erasures import Erasure, Erasures, digest_of
from fasten.repository.holds import Hold, covered
from fasten.repository.meta import clock
from fasten.repository.reading import microseconds, moment
from fasten.repository.roles import function_name, has_function
from fasten.repository.tables import upsert
from fasten.rows import AUDIT_COLUMNS

__all__ = ["GONE_US", "Erased", "Eraser", "Lagging"]

_ID: Final = AUDIT_COLUMNS.index("id")
FRESH_S: Final = 300.0
"""An entry of the ledger that is younger still stands for the same erasure."""

GONE_US: Final = 253_402_300_799_999_999
"""The end of the year 9999: a writer that is dead and left no file has followed all."""

FOLLOW_S: Final = 1000.0
"""A writer that stored nothing for this long has no file left that it delivered."""


@attrs.define(kw_only=True)
class Erased:
    """
    What an erasure did: how many rows, which it had to leave, and its own rows.

    *held* and *damaged* are ids; *stored* are the records, as columns.
    """

    rows: int = 0
    by_class: dict[str, int] = attrs.field(factory=dict)
    held: list[str] = attrs.field(factory=list)
    damaged: list[str] = attrs.field(factory=list)
    stored: list[tuple[Any, ...]] = attrs.field(factory=list)


@attrs.frozen(kw_only=True)
class Lagging:
    """
    A writer that may still keep what was erased in a file of its host.
    """

    id: str
    service: str
    node: str


class Eraser:
    """
    What erases in one store, and records it in *writer*'s chain.
    """

    def __init__(self, repository: AuditRepository, writer: Writer) -> None:
        self._repository = repository
        self._writer = writer
        self._audit = repository.tables.audit
        self._ledger = repository.tables.erasure

    # -- stored rows --

    def subject(self, field: str, value: str, fields: Sequence[str]) -> Any:
        """
        Return the condition for rows that have something of *fields* to erase.
        """
        about = self._audit.c[field] == value
        return sa.and_(about, self.anything(fields))

    def anything(self, fields: Iterable[str]) -> Any:
        """
        Return the condition for rows of which one of *fields* is still there.
        """
        audit = self._audit.c
        of_record = sa.and_(audit.domain == RECORD_DOMAIN, audit.code.in_(RECORD_CODES))
        return sa.or_(
            *(
                # The detail of a record is evidence, and never goes.
                audit[field].is_not(None)
                if field != "detail"
                else sa.and_(audit.detail.is_not(None), sa.not_(of_record))
                for field in fields
            )
        )

    def count(self, condition: Any) -> dict[str, int]:
        """
        Return how many rows a condition is about, by class.
        """
        audit = self._audit.c
        counted = (
            sa.select(audit.retention_class, sa.func.count())
            .where(condition)
            .group_by(audit.retention_class)
        )
        with self._repository.database.reading() as connection:
            found = connection.execute(counted).all()
        return {row[0]: row[1] for row in found}

    def erase(
        self, condition: Any, fields: Sequence[str], reason: str, done: Erased
    ) -> Iterator[None]:
        """
        Erase *fields* of the rows of a condition, up to 1,000 in each step.

        Rows under a hold are left alone, and so are those whose salt is damaged.

        Raises:
            Exception: whatever the driver says; steps that were made stay.
        """
        after = ""
        while True:
            with self._repository.database.transaction() as connection:
                self.lock(connection)
                rows = self._next(connection, condition, after)
                if not rows:
                    return
                after = rows[-1][_ID]
                # The records of this very run may be about whom it erases, too.
                ours = {row[_ID] for row in done.stored}
                rows = [row for row in rows if row[_ID] not in ours]
                self.erase_rows(connection, rows, fields, reason, done)
            yield

    def lock(self, connection: Connection) -> None:
        """
        Keep other erasures out, and take the node of the record: before any row.

        A sweep takes nodes first, then rows: in the other order both would wait.
        """
        self._repository.meta.get(connection, "erasing", is_locked=True)
        self._repository.lock(connection, self._writer)

    def _next(self, connection: Connection, condition: Any, after: str) -> list[Any]:
        audit = self._audit.c
        query = (
            sa.select(*(audit[name] for name in AUDIT_COLUMNS))
            .where(condition, audit.id > after)
            .order_by(audit.id)
            .limit(MOST_IDS)
            # Two erasures of one row must not both start from what it is now.
            .with_for_update()
        )
        return list(connection.execute(query).all())

    def erase_rows(
        self,
        connection: Connection,
        rows: Iterable[Any],
        fields: Sequence[str],
        reason: str,
        done: Erased,
    ) -> None:
        """
        Erase *fields* of *rows*, as selected for update, in a caller's transaction.
        """
        holds = self._repository.holds.active(connection)
        changed = []
        for row in rows:
            new = self._without(row, fields, holds, done)
            if new is not None:
                changed.append(new)
        if changed:
            ids = [row[_ID] for row in changed]
            self._apply(connection, changed, ids, fields, reason, done)

    def _without(
        self, row: Any, fields: Sequence[str], holds: list[Hold], done: Erased
    ) -> tuple[Any, ...] | None:
        if covered(holds, dict(zip(AUDIT_COLUMNS, row, strict=True))):
            done.held.append(row[_ID])
            return None
        try:
            new = chain.erase(tuple(row), fields)
        except ValueError:
            done.damaged.append(row[_ID])
            return None
        return None if new == tuple(row) else new

    def _apply(
        self,
        connection: Connection,
        changed: Sequence[tuple[Any, ...]],
        ids: list[str],
        fields: Sequence[str],
        reason: str,
        done: Erased,
    ) -> None:
        """
        Store rows as `chain.erase` left them, and the record that names them.
        """
        details = list(erasure_details(ids, fields, reason))
        records = [("AUDIT_ROW_ERASED", ids[0], detail) for detail in details]
        stored = self._repository.record_within(connection, self._writer, records)
        done.stored += stored
        if has_function(connection, self._repository.dsn, "erase"):
            self._call(connection, stored, details)
        else:
            self._update(connection, changed)
        done.rows += len(changed)
        for row in changed:
            name = row[_CLASS]
            done.by_class[name] = done.by_class.get(name, 0) + 1

    def _call(
        self, connection: Connection, stored: list[Any], details: list[dict[str, Any]]
    ) -> None:
        name = function_name(self._repository.dsn, "erase")
        call = sa.text(f"SELECT {name}(:record, :ids, :fields)")
        for record, detail in zip(stored, details, strict=True):
            connection.execute(
                call,
                {
                    "record": record[_ID],
                    "ids": detail["ids"],
                    "fields": detail["fields"],
                },
            )

    def _update(
        self, connection: Connection, changed: Sequence[tuple[Any, ...]]
    ) -> None:
        audit = self._audit
        names = (*COMMITTED_FIELDS, "salt")
        update = (
            audit.update()
            .where(audit.c.id == sa.bindparam("row_id"))
            .values({name: sa.bindparam(f"new_{name}") for name in names})
        )
        given = []
        for row in changed:
            values = dict(zip(AUDIT_COLUMNS, row, strict=True))
            new = {f"new_{name}": values[name] for name in names}
            given.append({"row_id": values["id"], **new})
        connection.execute(update, given)

    # -- the ledger --

    def announce(
        self,
        field: str,
        value: str,
        fields: Sequence[str],
        reason: str,
        *,
        is_renewed: bool = True,
    ) -> tuple[Erasure, bool]:
        """
        Put an entry in the ledger, so that rows on their way are met; return it.

        Unless it *is_renewed*, one that is fresh stands for it; false then. Nobody
        appends meanwhile: rows stored before are visible to what comes next, rows
        stored later meet it.

        Raises:
            Exception: whatever the driver says.
        """
        self._repository.schema.ensure()
        with self._repository.database.transaction() as connection:
            self._lock_all(connection)
            now = connection.execute(
                sa.select(clock(connection.dialect.name))
            ).scalar_one()
            known = self.entries(connection).entries
            salt = known[0].salt if known else self._repository.entropy(16).hex()
            entry = Erasure(
                field=field,
                salt=salt,
                digest=digest_of(salt, value),
                at_us=microseconds(now),
                fields=tuple(sorted(fields)),
                reason=reason,
            )
            fresh = next((old for old in known if _is_same(entry, old)), None)
            if fresh is not None and not is_renewed:
                return fresh, False
            self.put(connection, entry)
        return entry, True

    def _lock_all(self, connection: Connection) -> None:
        node = self._repository.tables.node.c
        places = connection.execute(sa.select(node.service_id, node.source_node_id))
        for service, name in sorted({(row[0], row[1]) for row in places}):
            self._repository.lock(connection, Writer("", service, name))

    def entries(self, connection: Connection) -> Erasures:
        """
        Return the ledger.
        """
        names = ("field", "salt", "digest", "fields", "reason", "erased_at")
        found = connection.execute(sa.select(*(self._ledger.c[n] for n in names)))
        return Erasures(Erasure.read(row[:5], microseconds(row[5])) for row in found)

    def put(self, connection: Connection, entry: Erasure) -> None:
        """
        Store *entry*; one about the same again is brought up to date.
        """
        dsn = self._repository.dsn
        values = {
            "field": entry.field,
            "salt": entry.salt,
            "digest": entry.digest,
            "erased_at": moment(dsn, entry.at_us),
            "fields": json.dumps(list(entry.fields)),
            "reason": entry.reason,
        }
        if has_function(connection, dsn, "erase"):
            name = function_name(dsn, "erase")
            marks = ", ".join(f":{key}" for key in values)
            connection.execute(sa.text(f"SELECT {name}({marks})"), values)
            return
        insert = upsert(self._ledger, connection.dialect.name).values(values)
        later = {k: values[k] for k in ("erased_at", "fields", "reason")}
        connection.execute(
            insert.on_conflict_do_update(
                index_elements=["field", "salt", "digest"], set_=later
            )
        )

    def apply_again(self, entries: Sequence[Erasure], done: Erased) -> Iterator[None]:
        """
        Erase what the *entries* of a ledger are about: a restore brought it back.

        Raises:
            Exception: whatever the driver says; steps that were made stay.
        """
        self._repository.schema.ensure()
        with self._repository.database.transaction() as connection:
            for entry in entries:
                self.put(connection, entry)
        yield
        ledger = Erasures(entries)
        after = ""
        while True:
            with self._repository.database.transaction() as connection:
                self.lock(connection)
                rows = self._next(connection, sa.true(), after)
                if not rows:
                    return
                after = rows[-1][_ID]
                self._apply_entries(connection, rows, ledger, done)
            yield

    def _apply_entries(
        self, connection: Connection, rows: list[Any], ledger: Erasures, done: Erased
    ) -> None:
        # What one row has to lose goes at once: each step starts from the stored row.
        met: dict[tuple[tuple[str, ...], str], list[Any]] = {}
        for row in rows:
            found = ledger.about_stored(row)
            if found:
                named = {field for entry in found for field in entry.fields}
                reasons = sorted({entry.reason for entry in found})
                key = (tuple(sorted(named)), "; ".join(reasons))
                met.setdefault(key, []).append(row)
        for (fields, reason), about in met.items():
            self.erase_rows(connection, about, fields, reason, done)

    # -- who has to follow --

    def lagging(self, at_us: int) -> list[Lagging]:
        """
        Return the writers that have not followed the erasure of *at_us* yet.

        Those that stored nothing for a while have no file any more that holds what
        they delivered; what they did not deliver meets the ledger.
        """
        writer = self._repository.tables.writer.c
        dsn = self._repository.dsn
        since = moment(dsn, at_us - round(FOLLOW_S * 1_000_000))
        query = (
            sa.select(writer.writer_id, writer.service_id, writer.source_node_id)
            .where(
                writer.updated_at >= since,
                sa.or_(
                    writer.followed_at.is_(None),
                    writer.followed_at < moment(dsn, at_us),
                ),
            )
            .order_by(writer.service_id, writer.source_node_id, writer.writer_id)
        )
        with self._repository.database.reading() as connection:
            found = connection.execute(query).all()
        return [Lagging(id=row[0], service=row[1], node=row[2]) for row in found]

    def follow(self, writer_ids: Iterable[str], at_us: int) -> None:
        """
        Note that writers keep nothing any more of what was erased up to *at_us*.
        """
        writer = self._repository.tables.writer
        with self._repository.database.transaction() as connection:
            for id_ in sorted(writer_ids):
                connection.execute(
                    writer.update()
                    .where(writer.c.writer_id == id_)
                    .values(followed_at=moment(self._repository.dsn, at_us))
                )

    # -- files --

    def truncate_wal(self) -> bool:
        """
        Empty SQLite's write-ahead log, in which old pages stand; true once it is.
        """
        if self._repository.database.is_postgres:
            return True
        with suppress(sa.exc.OperationalError):  # busy: somebody reads
            found = self._repository.database.run("PRAGMA wal_checkpoint(TRUNCATE)")
            return bool(found) and found[0][0] == 0
        return False


_CLASS: Final = AUDIT_COLUMNS.index("retention_class")


def _is_same(entry: Erasure, other: Erasure) -> bool:
    """
    Tell whether *other* still stands for what *entry* asks for.
    """
    names = ("field", "salt", "digest")
    is_about_it = all(getattr(entry, n) == getattr(other, n) for n in names)
    is_fresh = 0 <= entry.at_us - other.at_us < FRESH_S * 1_000_000
    return is_about_it and is_fresh and set(entry.fields) <= set(other.fields)
