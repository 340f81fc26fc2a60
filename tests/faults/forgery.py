# SPDX-License-Identifier: Apache-2.0
"""
Forgery: a store in the hands of somebody with its password, and whether verify tells.

Whoever forges has dropped triggers, keys and constraints first, and may rewrite
everything but the checkpoints that were carried off. An Outcome's *trials* are
forgeries; those that nobody noticed are its faults.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any, Final, NamedTuple

import attrs

from fasten import chain
from fasten.chain import ChainKey, Frontier, Head, Note
from fasten.evidence import Report
from fasten.repository.tables import HEAD_COLUMNS, head_of
from fasten.rows import AUDIT_COLUMNS
from tests.checker import digest
from tests.faults.grounds import Experiment, Grounds, both
from tests.faults.oracle import Outcome
from tests.ledger import CLASSES, Ledger, edited, value
from tests.stores import Kept

__all__ = ["EXPERIMENTS", "forge_columns", "forge_rows", "forge_sides"]

ADVISORY: Final = ("stored_at", "shipped_at")
"""Columns outside of the seal: whatever stands in them is no alarm."""

PLACE: Final = ("service_id", "source_node_id", "retention_class", "monotonic_seq")
"""Columns that move a row to another chain, or to another place in it."""

MOMENTS: Final = {*ADVISORY, "timestamp", "checkpointed_at", "created_at"}
"""Columns that hold a time of Postgres's own, not text."""

SIDES: Final = {
    "head": HEAD_COLUMNS,
    "node": ("service_id", "source_node_id", "seq"),
    "checkpoint": (
        *("service_id", "source_node_id", "retention_class"),
        *("size", "monotonic_seq", "root", "note", "created_at"),
    ),
}
"""What stands beside the rows, and counts as evidence."""


# --- edits of one value ---------------------------------------------------------------


class Edit(NamedTuple):
    """
    Another value for a column: SQL with one mark, and what stands for it.
    """

    sql: str
    value: Any


def edits_of(old: Any, column: str, *, is_sqlite: bool) -> Iterator[Edit]:
    """
    Yield other values: each byte flipped in two ways, cut, longer, empty, null.
    """
    yield Edit("?", None)
    if column in MOMENTS and not is_sqlite:
        at = old or datetime.now(UTC)
        yield from (Edit("?", at + step) for step in _STEPS)
    elif isinstance(old, int):
        yield from (Edit("?", new) for new in _numbers(old))
    elif is_sqlite:
        yield from _bytes(old)
    else:
        yield from (Edit("?", text) for text in _texts(old or ""))


_STEPS: Final = (
    *(timedelta(microseconds=n) for n in (-1, 1, 1000)),
    *(timedelta(seconds=n) for n in (-1, 1, 60, 3600, 86_400)),
    *(timedelta(days=n) for n in (31, 366)),
)


def _numbers(old: int) -> Iterator[int]:
    digits = str(old)
    for at, digit in enumerate(digits):
        yield int(f"{digits[:at]}{(int(digit) + 1) % 10}{digits[at + 1 :]}")
    yield from (old - 1, old + 10 ** len(digits), -old - 1)


def _texts(old: str) -> Iterator[str]:
    for at, character in enumerate(old):
        for mask in (1, 32):
            code = ord(character) ^ mask
            # Postgres takes no NUL and no surrogates.
            if code and not 0xD800 <= code < 0xE000:
                yield f"{old[:at]}{chr(code)}{old[at + 1 :]}"
    yield from (f"{old} ", f"{old}\t", *([old[:-1], old[1:], ""] if old else []))


def _bytes(old: bytes | None) -> Iterator[Edit]:
    raw = old or b""
    for at, byte in enumerate(raw):
        for mask in (1, 32):
            flipped = raw[:at] + bytes([byte ^ mask]) + raw[at + 1 :]
            yield Edit("CAST(? AS TEXT)", flipped)
    yield Edit("CAST(? AS TEXT)", raw + b" ")
    yield Edit("CAST(? AS TEXT)", raw + b"\0")
    yield Edit("?", raw)  # the same bytes, but no text
    if raw:
        yield from (Edit("CAST(? AS TEXT)", cut) for cut in (raw[:-1], raw[1:], b""))


# --- the exhibit ----------------------------------------------------------------------


class Exhibit:
    """
    A store without constraints, each of its rows numbered in a column of ours.
    """

    def __init__(self, kept: Kept, connection: Any) -> None:
        self.kept = kept
        self._connection = connection
        self._names = {
            name: f"{'audit_log' if name == 'audit' else f'audit_log_{name}'}"
            for name in ("audit", *SIDES)
        }
        if kept.is_sqlite:
            connection.text_factory = bytes
        for table in self._names.values():
            self._loosen(table)

    def _loosen(self, table: str) -> None:
        was, number = f"was_{table}", "row_number() OVER () AS exhibit"
        for statement in (
            f"ALTER TABLE {table} RENAME TO {was}",
            f"CREATE TABLE {table} AS SELECT *, {number} FROM {was}",
            f"DROP TABLE {was}",
            f"CREATE INDEX exhibit_{table} ON {table} (exhibit)",
        ):
            self._connection.execute(statement)

    def select(self, table: str, *columns: str) -> list[tuple[Any, ...]]:
        """
        Return columns of a table, in the order of its numbers.
        """
        names = ", ".join(columns)
        found = self._connection.execute(
            f"SELECT {names} FROM {self._names[table]} ORDER BY exhibit"
        )
        rows: list[tuple[Any, ...]] = found.fetchall()
        return rows

    def numbers(self, table: str, where: str = "true") -> list[int]:
        """
        Return the numbers of rows.
        """
        found = self._connection.execute(
            f"SELECT exhibit FROM {self._names[table]} WHERE {where} ORDER BY exhibit"
        )
        return [row[0] for row in found]

    @contextmanager
    def edited(self, table: str, column: str, edits: dict[int, Edit]) -> Iterator[None]:
        """
        Give rows, by their numbers, other values in a column, for a while.
        """
        old = dict(self.select(table, "exhibit", column))
        self._update(table, column, edits)
        yield
        text = "CAST(? AS TEXT)" if self.kept.is_sqlite else "?"
        back = {
            number: Edit(text if isinstance(old[number], bytes) else "?", old[number])
            for number in edits
        }
        self._update(table, column, back)

    def _update(self, table: str, column: str, edits: dict[int, Edit]) -> None:
        mark = "?" if self.kept.is_sqlite else "%s"
        cursor = self._connection.cursor()
        for sql in sorted({edit.sql for edit in edits.values()}):
            update = (
                f"UPDATE {self._names[table]} SET {column} = {sql} WHERE exhibit = ?"
            )
            given = [(e.value, n) for n, e in edits.items() if e.sql == sql]
            self._begin()
            cursor.executemany(update.replace("?", mark), given)
            self._connection.execute("COMMIT")

    def _begin(self) -> None:
        self._connection.execute("BEGIN")

    # -- as a whole --

    def ledger(self) -> Ledger:
        """
        Return what the store holds, to be forged in memory.
        """
        log = self.kept.maker.copy()
        log.rows = [self._wire(row) for row in self.select("audit", *AUDIT_COLUMNS)]
        heads = map(head_of, map(self._wire, self.select("head", *HEAD_COLUMNS)))
        log.heads = {head.key: head for head in heads}
        nodes = map(self._wire, self.select("node", *SIDES["node"]))
        log.nodes = {row[:2]: row[2] for row in nodes}
        notes = map(self._wire, self.select("checkpoint", "note", "created_at"))
        log.stored = [(row[0], row[1]) for row in notes]
        return log

    @staticmethod
    def text(value: Any) -> Any:
        """
        Return a value as text, as far as it is one.
        """
        return value.decode() if isinstance(value, bytes) else value

    @staticmethod
    def _wire(row: Sequence[Any]) -> tuple[Any, ...]:
        return tuple(
            v.decode()
            if isinstance(v, bytes)
            else v.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
            if isinstance(v, datetime)
            else v
            for v in row
        )

    def put(self, log: Ledger) -> None:
        """
        Make the store hold what *log* does.
        """
        self._begin()
        self._fill("audit", AUDIT_COLUMNS, log.rows)
        self._fill("head", HEAD_COLUMNS, map(attrs.astuple, log.heads.values()))
        nodes = [(*place, seq) for place, seq in log.nodes.items()]
        self._fill("node", SIDES["node"], nodes)
        self._fill("checkpoint", SIDES["checkpoint"], map(_note_row, log.stored))
        self._connection.execute("COMMIT")

    def _fill(
        self, table: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]
    ) -> None:
        name = self._names[table]
        mark = "?" if self.kept.is_sqlite else "%s"
        self._connection.execute(f"DELETE FROM {name}")
        self._connection.cursor().executemany(
            f"INSERT INTO {name} ({', '.join(columns)}) "
            f"VALUES ({', '.join([mark] * len(columns))})",
            list(rows),
        )


def _note_row(stored: tuple[str, str]) -> tuple[Any, ...]:
    said = Note.parse(stored[0]).checkpoint
    return (*said.key, said.size, said.seq, said.root.hex(), *stored)


@contextmanager
def exhibited(grounds: Grounds, store: str, fill: Callable[[Kept], None]) -> Any:
    """
    Yield an exhibit that *fill* has filled, and which verifies.
    """
    kept = Kept(grounds.dsn(store), grounds.seed)
    fill(kept)
    kept.close()
    with kept.plain() as connection:
        exhibit = Exhibit(kept, connection)
        report = kept.verify()
        if not report.ok:
            raise AssertionError(f"not forged yet, and found: {report.findings}")
        yield exhibit


class _Trials:
    """
    Forgeries that were tried, and those that nobody noticed.
    """

    def __init__(self, name: str, store: str) -> None:
        self.name = f"{name} ({'SQLite' if store == 'sqlite' else 'Postgres'})"
        self.number = 0
        self.survivors: list[str] = []

    def note(self, what: str, *, is_found: bool) -> None:
        """
        Count one.
        """
        self.number += 1
        if not is_found:
            self.survivors.append(what)

    def outcome(self, stored: int) -> Outcome:
        """
        Return what came of them all.
        """
        return Outcome(
            name=self.name,
            trials=self.number,
            stored=stored,
            faults=tuple(self.survivors),
        )


# --- every byte of every column of a row ----------------------------------------------


def forge_columns(
    grounds: Grounds, *, trials: int = 200, rounds: int | None = None, store: str
) -> Outcome:
    """
    Edit every byte of every column of *trials* rows, each in a chain of its own.

    It is done in all chains at once: each edit has to be found in the chain where it
    was made. *rounds* edits of each column are picked, or all.
    """
    dice = random.Random(grounds.seed)
    tried = _Trials("every byte of every column", store)
    with exhibited(grounds, store, lambda kept: _fill_chains(kept, trials)) as exhibit:
        targets = exhibit.numbers("audit", "source_node_id <> 'n1' AND code = 'A_A'")
        nodes = exhibit.select("audit", "exhibit", "source_node_id")
        homes = {number: exhibit.text(node) for number, node in nodes}
        for column in AUDIT_COLUMNS:
            edits = list(_rounds(exhibit, "audit", column, targets))
            picked = edits if rounds is None else dice.sample(edits, rounds)
            for chosen in picked:
                with exhibit.edited("audit", column, chosen):
                    report = exhibit.kept.verify()
                for number, edit in chosen.items():
                    tried.note(
                        f"{column} of row {number} as {edit}",
                        is_found=_is_told(report, column, homes[number]),
                    )
        return tried.outcome(len(exhibit.numbers("audit")))


def _fill_chains(kept: Kept, number: int) -> None:
    kept.emit("n1", "medium")
    for each in range(number):
        node, class_ = _name(each), CLASSES[each % 3]
        codes = ("B_B", "A_A", "B_B")
        rows = [kept.maker.pending(class_, code=code) for code in codes]
        kept.append(node, rows)
        if each % 5 == 0:
            fields = chain.COMMITTED_FIELDS[: 1 + each // 5 % 6]
            kept.erase("id", rows[1].id, *fields)


def _name(number: int) -> str:
    """
    Return a node's name that no edit of a byte turns into another one's.
    """
    digits = str.maketrans("0123456789", "acegikmoqs")
    return f"node {number:04d}".translate(digits)


def _rounds(
    exhibit: Exhibit, table: str, column: str, targets: Sequence[int]
) -> Iterator[dict[int, Edit]]:
    """
    Yield edits by row, until every value has had its own.
    """
    old = dict(exhibit.select(table, "exhibit", column))
    is_sqlite = exhibit.kept.is_sqlite
    waiting = {n: list(edits_of(old[n], column, is_sqlite=is_sqlite)) for n in targets}
    if old and all(old[n] is None for n in targets):
        waiting = {n: edits[1:] for n, edits in waiting.items()}  # it is null already
    for at in range(max(map(len, waiting.values()))):
        chosen = {n: edits[at] for n, edits in waiting.items() if at < len(edits)}
        chosen = {n: e for n, e in chosen.items() if (e.value, old[n]) != (None, None)}
        if table != "audit":
            yield from ({number: edit} for number, edit in chosen.items())
        elif chosen:
            yield chosen


def _is_told(report: Report, column: str, node: str) -> bool:
    """
    Tell whether an edit in a node was found there; whether not, of advisory columns.
    """
    if column in ADVISORY:
        return report.ok
    places = {(f.service_id, f.source_node_id) for f in report.findings}
    return ("shop", node) in places


# --- what stands beside the rows ------------------------------------------------------


def forge_sides(grounds: Grounds, *, trials: int = 10**6, store: str) -> Outcome:
    """
    Edit every byte of every head, node row and checkpoint; *trials* at the most.
    """
    tried = _Trials("every byte of head, node and checkpoint", store)
    with exhibited(grounds, store, fill_few) as exhibit:
        edits = [
            (table, column, edit)
            for table, columns in SIDES.items()
            for column in columns
            for edit in _rounds(exhibit, table, column, exhibit.numbers(table))
        ]
        if len(edits) > trials:
            edits = random.Random(grounds.seed).sample(edits, trials)
        newest = _newest_notes(exhibit)
        for table, column, edit in edits:
            ((number, new),) = edit.items()
            if (
                table == "checkpoint"
                and number not in newest
                and _is_vain(exhibit, column, new)
            ):
                continue
            with exhibit.edited(table, column, edit):
                is_found = not exhibit.kept.verify().ok
            tried.note(f"{table}.{column} of {number} as {new}", is_found=is_found)
        return tried.outcome(len(exhibit.numbers("audit")))


def _is_vain(exhibit: Exhibit, column: str, edit: Edit) -> bool:
    """
    Tell whether an edit of a checkpoint that is not the newest takes nothing away.

    When it was made proves nothing; one that reads as signed by another key is as good
    as gone, and below a good one that is what a rotated key leaves.
    """
    if column == "created_at":
        return True
    if column != "note" or edit.value is None:
        return False
    with suppress(ValueError, AttributeError):
        note = Note.parse(exhibit.text(edit.value))
        return note.verdict(exhibit.kept.maker.verifiers) == "unknown"
    return False


def _newest_notes(exhibit: Exhibit) -> set[int]:
    newest: dict[tuple[Any, ...], tuple[Any, int]] = {}
    names = ("service_id", "source_node_id", "retention_class", "created_at", "exhibit")
    for *key, at, number in exhibit.select("checkpoint", *names):
        newest[tuple(key)] = max(newest.get(tuple(key), (at, 0)), (at, number))
    return {number for _, number in newest.values()}


def fill_few(kept: Kept) -> None:
    """
    Fill a store with three chains of a node: swept, signed twice.
    """
    kept.emit("n1", *CLASSES, *CLASSES)
    kept.checkpoint()
    kept.age(31)
    kept.sweep()
    kept.emit("n1", *CLASSES)
    kept.checkpoint()
    kept.emit("n1", *CLASSES)  # which no checkpoint holds yet


def fill_busy(kept: Kept) -> None:
    """
    Fill a store with three nodes' rows: swept, held, erased in, restored, signed.
    """
    for number in range(4):
        for node in ("n1", "n2", "n3"):
            kept.emit(node, *CLASSES, CLASSES[number % 3])
    kept.checkpoint()
    kept.age(31)
    rows = kept.emit("n2", *CLASSES)
    kept.sweep()
    hold = kept.hold("target", value(rows[1], "target"))
    kept.erase("actor", value(rows[2], "actor"))
    kept.checkpoint()
    kept.lift(hold)
    kept.emit("n1", *CLASSES)
    kept.checkpoint()
    for node in ("n1", "n2", "n3"):
        kept.emit(node, *CLASSES)  # which no checkpoint holds yet


# --- rows and chains ------------------------------------------------------------------

Forgery = tuple[str, Ledger]


def forge_rows(grounds: Grounds, *, trials: int = 10**6, store: str) -> Outcome:
    """
    Delete, swap, insert, erase, seal anew, rewind: *trials* forgeries at the most.

    Those behind `elsewhere` are told by checkpoints that were carried off only.
    """
    tried = _Trials("rows, chains and records", store)
    with exhibited(grounds, store, fill_busy) as exhibit:
        log = exhibit.ledger()
        notes = [note for note, _ in log.stored]
        forged = [(f, ()) for attack in ATTACKS for f in attack(log)]
        forged += [(f, notes) for attack in ELSEWHERE for f in attack(log)]
        if len(forged) > trials:
            forged = random.Random(grounds.seed).sample(forged, trials)
        for (what, changed), given in forged:
            exhibit.put(changed)
            report: Report = exhibit.kept.verify(given=given)
            tried.note(what, is_found=not report.ok)
        exhibit.put(log)
        if not exhibit.kept.verify(given=notes).ok:
            tried.survivors.append("the untouched log alarms once it was put back")
        return tried.outcome(len(log.rows))


def _place(row: tuple[Any, ...]) -> tuple[str, int]:
    return value(row, "source_node_id"), value(row, "monotonic_seq")


def _with(log: Ledger, rows: Iterable[tuple[Any, ...]]) -> Ledger:
    forged = log.copy()
    forged.rows = list(rows)
    return forged


def deleted(log: Ledger) -> Iterator[Forgery]:
    """
    Delete each row, and each two neighbours of a chain.
    """
    for row in log.rows:
        rest = [r for r in log.rows if r is not row]
        yield f"deleted {_place(row)}", _with(log, rest)
    for key in log.heads:
        for one, other in pairwise(log.of_chain(key)):
            rest = [r for r in log.rows if r not in (one, other)]
            yield f"deleted {_place(one)} and {_place(other)}", _with(log, rest)


def cut(log: Ledger) -> Iterator[Forgery]:
    """
    Cut some rows, or all, from the front or the end of each chain.
    """
    for key in log.heads:
        rows = log.of_chain(key)
        for number in range(1, len(rows) + 1):
            for gone in (rows[:number], rows[-number:]):
                rest = [r for r in log.rows if r not in gone]
                yield f"cut {number} of {key}", _with(log, rest)


def swapped(log: Ledger) -> Iterator[Forgery]:
    """
    Let neighbours change places, or a single column.
    """
    for key in log.heads:
        for one, other in pairwise(log.of_chain(key)):
            for name in AUDIT_COLUMNS:
                a, b = value(one, name), value(other, name)
                if a == b or name in ADVISORY:
                    continue
                swap = {one: b, other: a}
                yield (
                    f"swapped {name} of {_place(one)} and {_place(other)}",
                    _with(log, [_swapped(r, name, swap) for r in log.rows]),
                )


def _swapped(
    row: tuple[Any, ...], name: str, swap: dict[tuple[Any, ...], Any]
) -> tuple[Any, ...]:
    return edited(row, **{name: swap[row]}) if row in swap else row


def inserted(log: Ledger) -> Iterator[Forgery]:
    """
    Insert a copy of each row behind the last, and one sealed to follow it.
    """
    for row in log.rows:
        node = value(row, "source_node_id")
        last = log.nodes["shop", node]
        for changes in (
            {"monotonic_seq": last + 1},
            {"monotonic_seq": last + 1, "id": f"evt-{'0' * 26}"},
            {"id": f"evt-{'0' * 26}"},
            {},
        ):
            forged = _with(log, [*log.rows, edited(row, **changes)])
            yield f"inserted {changes} of {_place(row)}", forged
        yield f"followed {_place(row)}", _followed(log, row)


def _followed(log: Ledger, row: tuple[Any, ...]) -> Ledger:
    """
    Return the log with a new row that is sealed as the one after *row*.
    """
    key = _key(row)
    head = attrs.evolve(
        log.heads[key], seq=value(row, "monotonic_seq"), hash=value(row, "hash")
    )
    sealed = chain.seal(
        [log.pending(key[2])],
        service=key[0],
        node=key[1],
        first_seq=value(row, "monotonic_seq") + 1,
        heads={key[2]: head},
        salts=bytes(16),
        stored_at=value(row, "stored_at"),
    )
    return _with(log, [*log.rows, *sealed])


def erased(log: Ledger) -> Iterator[Forgery]:
    """
    Erase each field of each row, and say so nowhere.
    """
    for row in log.rows:
        for field in chain.COMMITTED_FIELDS:
            bare = chain.erase(row, [field])
            if bare != row:
                rest = [bare if r is row else r for r in log.rows]
                yield f"erased {field} of {_place(row)}", _with(log, rest)


def pruned(log: Ledger) -> Iterator[Forgery]:
    """
    Cut each chain's front as a sweep does, and leave no record.
    """
    for key in log.heads:
        rows = log.of_chain(key)
        for number in range(1, len(rows) + 1):
            forged = _with(log, [r for r in log.rows if r not in rows[:number]])
            pairs = [(value(r, "monotonic_seq"), value(r, "hash")) for r in rows]
            chain.cut(forged.heads[key], pairs[:number])
            yield f"pruned {number} of {key}", forged


def dropped(log: Ledger) -> Iterator[Forgery]:
    """
    Empty each table, and take whole chains and nodes away.
    """
    for name in ("rows", "heads", "nodes", "stored"):
        forged = log.copy()
        setattr(forged, name, type(getattr(forged, name))())
        yield f"no {name}", forged
    for key in log.heads:
        yield f"without {key}", _without_chain(log, key)
    for place in log.nodes:
        forged = log.copy()
        for key in log.heads:
            if key[:2] == place:
                forged = _without_chain(forged, key)
        del forged.nodes[place]
        yield f"without {place}", forged


def _without_chain(log: Ledger, key: ChainKey) -> Ledger:
    gone = log.of_chain(key)
    forged = _with(log, [r for r in log.rows if r not in gone])
    del forged.heads[key]
    return forged


def sealed_anew(log: Ledger) -> Iterator[Forgery]:
    """
    Edit or delete each row that a checkpoint holds, and seal all that follows anew.
    """
    for row in _anchored(log):
        for what, new in (
            ("edited", edited(row, outcome="unknown")),
            ("deleted", None),
        ):
            forged = _relinked(log, row, new)
            yield f"sealed anew with {_place(row)} {what}", forged


def _anchored(log: Ledger) -> list[tuple[Any, ...]]:
    ends: dict[ChainKey, int] = {}
    for note, _ in log.stored:
        said = Note.parse(note).checkpoint
        ends[said.key] = max(ends.get(said.key, 0), said.seq)
    return [row for row in log.rows if _place(row)[1] <= ends.get(_key(row), 0)]


def _relinked(log: Ledger, row: tuple[Any, ...], new: tuple[Any, ...] | None) -> Ledger:
    """
    Return the log as if *row* had always been *new*: whatever can be told is told so.
    """
    forged = _with(log, [])
    for key in forged.heads:
        _take_back(forged, key)
    gone = 0
    for each in log.in_order():
        found = new if each is row else each
        node = value(each, "source_node_id")
        is_behind = node == value(row, "source_node_id")
        if found is None:
            gone = 1
            continue
        head = forged.heads[_key(found)]
        seq = value(found, "monotonic_seq") - gone * is_behind
        found = edited(found, monotonic_seq=seq, prev_hash=head.hash)
        found = edited(found, hash=digest(dict(zip(AUDIT_COLUMNS, found, strict=True))))
        forged.rows.append(found)
        _grow(head, found)
    forged.nodes["shop", value(row, "source_node_id")] -= gone
    return forged


def _key(row: tuple[Any, ...]) -> ChainKey:
    service, node, class_ = (value(row, name) for name in PLACE[:3])
    return (service, node, class_)


def _take_back(log: Ledger, key: ChainKey) -> None:
    """
    Let a head stand where its sweeps ended.
    """
    head = log.heads[key]
    head.seq, head.hash = head.pruned_seq, head.pruned_hash
    head.count, head.frontier = head.pruned_count, head.pruned_frontier


def _grow(head: Head, row: tuple[Any, ...]) -> None:
    """
    Let a head follow by one row.
    """
    frontier = Frontier.read(head.frontier, head.count)
    frontier.push(bytes.fromhex(value(row, "hash")))
    head.seq, head.hash = value(row, "monotonic_seq"), value(row, "hash")
    head.count, head.frontier = frontier.size, str(frontier)


def foreign_keys(log: Ledger) -> Iterator[Forgery]:
    """
    Sign every checkpoint with another key.
    """
    signer = chain.ed25519_signer("shop", f"{'A' * 43}=")
    forged = log.copy()
    forged.stored = [
        (Note.parse(note).checkpoint.sign([signer]), at) for note, at in log.stored
    ]
    yield "signed with another key", forged


def unsigned(log: Ledger) -> Iterator[Forgery]:
    """
    Seal everything anew, and remove the checkpoints that would tell.
    """
    for what, forged in sealed_anew(log):
        yield f"{what}, without checkpoints", _unanchored(forged)


def _unanchored(log: Ledger) -> Ledger:
    bare = log.copy()
    bare.stored = []
    for head in bare.heads.values():
        head.checkpointed_at = None
    return bare


def rewound(log: Ledger) -> Iterator[Forgery]:
    """
    Take each chain back to before a checkpoint, with head, node and checkpoints.
    """
    for note, _ in log.stored:
        said = Note.parse(note).checkpoint
        for seq in {said.seq - 1, said.seq // 2}:
            forged = _back_to(log, said.key[1], seq)
            if forged is not None:
                yield f"rewound {said.key[1]} to {seq}", forged


def _back_to(log: Ledger, node: str, seq: int) -> Ledger | None:
    """
    Return the log as it was when *node* had stored number *seq*; None if it is swept.
    """
    rest = [r for r in log.rows if _place(r)[0] != node or _place(r)[1] <= seq]
    forged = _with(log, rest)
    for key, head in forged.heads.items():
        if key[1] != node:
            continue
        if head.pruned_seq > seq:
            return None
        _take_back(forged, key)
        for row in forged.of_chain(key):
            _grow(head, row)
    forged.nodes["shop", node] = seq
    forged.heads = {key: head for key, head in forged.heads.items() if head.count}
    return _with_old_notes(forged)


def _with_old_notes(log: Ledger) -> Ledger:
    """
    Keep the checkpoints that still fit; let heads name the newest of them.
    """
    kept = []
    for note, at in log.stored:
        said = Note.parse(note).checkpoint
        head = log.heads.get(said.key)
        if head is not None and said.size <= head.count:
            kept.append((note, at))
    log.stored = kept
    for key, head in log.heads.items():
        times = [at for note, at in kept if Note.parse(note).checkpoint.key == key]
        head.checkpointed_at = max(times, default=None)
    return log


ATTACKS: Final = (
    *(deleted, cut, swapped, inserted, erased, pruned, dropped),
    *(sealed_anew, foreign_keys),
)
"""Forgeries that a store tells of by itself, or by the checkpoints in it."""

ELSEWHERE: Final = (unsigned, rewound)
"""Forgeries that nothing tells of but a checkpoint that was carried off."""

EXPERIMENTS: Final[dict[str, Experiment]] = {
    **both("forged-columns", forge_columns),
    **both("forged-sides", forge_sides),
    **both("forged-rows", forge_rows),
}
