# SPDX-License-Identifier: Apache-2.0
"""
What a sealed table, or a file of its rows, proves: verification and its report.

Streaming and pure: rows, heads, notes and keys come in as arguments. How rows are
sealed is `chain`'s; reading them in one snapshot is the caller's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from hashlib import sha256
from itertools import groupby
from typing import Any, Final, Literal, NamedTuple, NoReturn

import attrs

from fasten.chain import (
    COMMITTED_FIELDS,
    FORM,
    GENESIS,
    HEADER_KEYS,
    RECORD_CODES,
    RECORD_DOMAIN,
    ChainKey,
    Checkpoint,
    Cut,
    Frontier,
    Head,
    Note,
    Restored,
    Salt,
    Verifier,
    commitment_of,
    is_frontier,
    is_hash,
)
from fasten.rows import AUDIT_COLUMNS, canonical_json
from fasten.spill import Spill

__all__ = [
    "ChainReport",
    "ChainVerifier",
    "Finding",
    "Report",
    "Status",
    "verify_ndjson",
]

Status = Literal["ok", "tampered", "truncated", "missing", "unverifiable"]
"""What verification says of a chain, and in sum."""

_GRAVITY: Final = ("ok", "unverifiable", "missing", "truncated", "tampered")

Place = tuple[str, str]
"""(service_id, source_node_id)."""

_PLACE: Final = ("service_id", "source_node_id", "retention_class")

# --- the content of one row -----------------------------------------------------

_POSITIVE: Final = re.compile(r"[1-9][0-9]*\Z")
_LONG_NUMBER: Final = re.compile(r"[0-9]{16}")


class _Bad(Exception):
    """
    Something that verification found; caught where the row is known.
    """

    def __init__(self, message: str, status: Status = "tampered") -> None:
        super().__init__(message)
        self.message = message
        self.status = status


def _refuse(token: str) -> NoReturn:
    raise ValueError(f"{token} is not read here")


def _double(digits: str) -> float | int:
    # Up to 15 digits an int and its double are the same number.
    return int(digits) if len(digits) < 16 and digits != "-0" else float(digits)


_plain: Final = json.JSONDecoder(parse_float=_refuse, parse_constant=_refuse).decode
_doubles: Final = json.JSONDecoder(parse_int=_double, parse_constant=_refuse).decode
_compact: Final = json.JSONEncoder(
    sort_keys=True, separators=(",", ":"), ensure_ascii=False
).encode


def _is_canonical(text: str) -> bool:
    """
    Tell whether stored JSON is its own RFC 8785 form, numbers read as doubles.
    """
    try:
        # json's C code settles nearly every row: it differs from RFC 8785 in
        # fractions, in long numbers and in the order of keys beyond the BMP.
        if text.isascii() and not _LONG_NUMBER.search(text):
            return _compact(_plain(text)) == text
    except (ValueError, RecursionError):
        pass  # a fraction, or no JSON at all
    try:
        return canonical_json(_doubles(text)) == text
    except (ValueError, RecursionError):
        return False


def _as_detail(value: Any) -> str:
    """
    Spell a detail that was read from a file as the store holds it.

    Raises:
        ValueError: a number has no double.
    """
    return canonical_json(_doubles(canonical_json(value)))


def _check_commitment(row: Mapping[str, Any]) -> tuple[str, ...]:
    """
    Check the six committed fields; return those that were erased.
    """
    present = [field for field in COMMITTED_FIELDS if row[field] is not None]
    if row["salt"] is None:
        raise _Bad("the salt was removed")
    try:
        salt = Salt.read(row["salt"], present)
    except ValueError as error:
        raise _Bad(str(error)) from None
    if set(salt.keys) != set(present):
        raise _Bad("an erasable field was filled in or emptied")
    if row["detail"] is not None and not _is_canonical(row["detail"]):
        raise _Bad("the stored detail is not canonical JSON")
    leaves = {field: salt.leaf(field, row[field]) for field in present}
    if commitment_of({**salt.leaves, **leaves}) != row["commitment"]:
        raise _Bad("an erasable field, the salt or the commitment was edited")
    return tuple(salt.leaves)


def _header_hash(row: Mapping[str, Any], **instead: str) -> str:
    header = {key: row[key] for key in HEADER_KEYS} | instead
    return sha256(_compact(header).encode()).hexdigest()


_TEXTS: Final = tuple(
    name
    for name in AUDIT_COLUMNS
    # The last two are advisory: whatever stands in them is no alarm.
    if name not in ("monotonic_seq", "stored_at", "shipped_at")
)


def _check_row(row: Mapping[str, Any]) -> tuple[str, ...]:
    """
    Check what a row says by itself; return the fields that were erased.
    """
    for name in _TEXTS:
        value = row[name]
        if value is not None and type(value) is not str:
            raise _Bad(f"{name} is not text")
    if type(row["monotonic_seq"]) is not int or row["monotonic_seq"] < 1:
        raise _Bad("monotonic_seq is no number from 1")
    if row["canonical_form_id"] != FORM:
        raise _unknown_form(row)
    erased = _check_commitment(row)
    _check_header(row)
    return erased


def _check_header(row: Mapping[str, Any]) -> None:
    if row["hash"] is None:
        raise _Bad("the hash was removed")
    if _header_hash(row) != row["hash"]:
        raise _Bad("a column or the hash was edited")


def _unknown_form(row: Mapping[str, Any]) -> _Bad:
    form = row["canonical_form_id"]
    if form is None or not _POSITIVE.match(form) or int(form[:9]) <= int(FORM):
        return _Bad("canonical_form_id is not a form of this table")
    # A row of ours whose form was raised to get it out of sight still has our hash.
    if _header_hash(row, canonical_form_id=FORM) == row["hash"]:
        return _Bad("canonical_form_id was edited")
    return _Bad("a newer fasten sealed these rows; verify with that", "unverifiable")


class _Link(NamedTuple):
    """
    What is left of a row once its content was looked at: its place in the chain.
    """

    key: ChainKey
    seq: int
    id: str
    prev_hash: str | None
    hash: str
    problem: tuple[str, Status] | None = None
    erased: tuple[str, ...] = ()
    record: tuple[str, Mapping[str, Any]] | None = None


def _examine(columns: Sequence[Any], *, is_printed: bool = False) -> _Link:
    """
    Check one row by itself, given in the order of AUDIT_COLUMNS.

    *is_printed* means a line of stdout: it never had a salt.
    """
    row = dict(zip(AUDIT_COLUMNS, columns, strict=True))
    problem: tuple[str, Status] | None = None
    erased: tuple[str, ...] = ()
    try:
        if is_printed and row["salt"] is None and row["canonical_form_id"] == FORM:
            _check_header(row)
            raise _Bad("printed without salt: fields cannot be checked", "unverifiable")
        erased = _check_row(row)
    except _Bad as bad:
        problem = (bad.message, bad.status)
    except (ValueError, TypeError):
        problem = ("a column holds what was never stored", "tampered")
    service, node, class_ = (str(row[name]) for name in _PLACE)
    return _Link(
        (service, node, class_),
        _number(row["monotonic_seq"]),
        str(row["id"]),
        row["prev_hash"],
        _usable_hash(row),
        problem,
        erased,
        None if problem else _record(row),
    )


def _usable_hash(row: Mapping[str, Any]) -> str:
    """
    Return what the next row was linked to, so that one edit is one finding.
    """
    if is_hash(row["hash"]):
        return str(row["hash"])
    try:
        return _header_hash(row)
    except (ValueError, TypeError):
        return ""


def _record(row: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]] | None:
    """
    Return code and detail of a row that counts as evidence.
    """
    if row["domain"] != RECORD_DOMAIN or row["code"] not in RECORD_CODES:
        return None
    detail = json.loads(row["detail"]) if row["detail"] is not None else None
    return (row["code"], detail) if isinstance(detail, dict) else None


# --- reports --------------------------------------------------------------------


@attrs.frozen(kw_only=True)
class Finding:
    """
    One thing that verification found: what, and the first row or range it is at.

    *rows* counts the rows, or findings, of the same kind in one chain; *row_id* is
    the first one's. A finding about a whole node has no retention_class.
    """

    status: Status
    message: str
    service_id: str | None = None
    source_node_id: str | None = None
    retention_class: str | None = None
    from_seq: int | None = None
    to_seq: int | None = None
    row_id: str | None = None
    rows: int = 1

    def __str__(self) -> str:
        names = (self.service_id, self.source_node_id, self.retention_class)
        place = "/".join(name for name in names if name) or "log"
        span = ""
        if self.from_seq is not None:
            span = f" at {self.from_seq}"
            if self.to_seq not in (None, self.from_seq):
                span = f" from {self.from_seq} to {self.to_seq}"
        row = f" ({self.row_id})" if self.row_id else ""
        times = f", {self.rows} times" if self.rows > 1 else ""
        return f"{self.status}: {place}{span}{row}: {self.message}{times}"


@attrs.frozen(kw_only=True)
class ChainReport:
    """
    What verification says of one chain.

    *rows* were read, *count* ever sealed. *anchored_seq* and *anchored_count* are
    those of the newest good checkpoint; None without one. Chains of other SDKs have
    no retention class.
    """

    service_id: str
    source_node_id: str
    retention_class: str | None
    status: Status
    rows: int
    count: int | None
    seq: int
    anchored_seq: int | None = None
    anchored_count: int | None = None
    restored: tuple[tuple[int, int], ...] = ()

    @property
    def unanchored(self) -> int | None:
        """
        Return how many rows came after the newest good checkpoint.
        """
        if self.count is None:
            return None
        return self.count - (self.anchored_count or 0)

    def __str__(self) -> str:
        names = (self.service_id, self.source_node_id, self.retention_class)
        place = "/".join(name for name in names if name)
        parts = [f"{place}: {self.status}"]
        parts += [f"restored: {a}-{b} on record" for a, b in self.restored]
        if self.anchored_seq is None:
            parts.append("unanchored")
        else:
            parts.append(f"anchored up to {self.anchored_seq}")
        if self.unanchored:
            parts.append(f"rows after the last checkpoint: {self.unanchored}")
        return ", ".join(parts)


@attrs.frozen(kw_only=True)
class Report:
    """
    What verification says in sum; *findings* are empty only if it is `ok`.

    *dropped* and *quarantined* count rows that fasten itself says were lost: they
    are explained, and no findings.
    """

    status: Status
    findings: tuple[Finding, ...]
    chains: tuple[ChainReport, ...] = ()
    rows: int = 0
    dropped: int = 0
    quarantined: int = 0
    restored: tuple[Restored, ...] = ()

    @property
    def ok(self) -> bool:
        """
        Tell whether nothing was found.
        """
        return self.status == "ok"

    @property
    def exit_code(self) -> int:
        """
        Return 0 for ok, 3 for unverifiable, else 1.
        """
        return {"ok": 0, "unverifiable": 3}.get(self.status, 1)

    @property
    def is_anchored(self) -> bool:
        """
        Tell whether any chain is held by a good checkpoint.
        """
        return any(chain.anchored_seq is not None for chain in self.chains)

    @property
    def verdict(self) -> str:
        """
        Return the status with what it rests on, as one line.
        """
        parts: list[str] = [self.status]
        spans = {span for chain in self.chains for span in chain.restored}
        parts += [f"restored: {a}-{b} on record" for a, b in sorted(spans)]
        if self.is_anchored:
            rest = sum(chain.unanchored or 0 for chain in self.chains)
            parts.append(f"anchored, rows after the last checkpoint: {rest}")
        elif self.ok:
            parts.append(
                "unanchored: shows accidents, not an attacker with write access"
            )
        return ", ".join(parts)


# --- what verification keeps in mind ----------------------------------------------


@attrs.define
class _Tally:
    status: Status
    from_seq: int | None
    to_seq: int | None
    row_id: str | None
    rows: int = 0


class _Findings:
    """
    What was found so far; the same thing again in one chain is only counted.
    """

    def __init__(self) -> None:
        self._tallies: dict[tuple[tuple[str, ...], str], _Tally] = {}
        self._worst: dict[tuple[str, ...], Status] = {}

    def add(
        self,
        key: tuple[str, ...],
        status: Status,
        message: str,
        from_seq: int | None = None,
        to_seq: int | None = None,
        row_id: str | None = None,
    ) -> None:
        """
        Put a finding of a chain, of a (service, node) or of () on the list.
        """
        tally = self._tallies.get((key, message))
        if tally is None:
            tally = _Tally(status, from_seq, from_seq, row_id)
            self._tallies[key, message] = tally
        tally.to_seq = from_seq if to_seq is None else to_seq
        tally.rows += 1
        self._worst[key] = _worst((self.status(key), status))

    def of_row(self, link: _Link, message: str, status: Status = "tampered") -> None:
        """
        Put a finding about one row on the list.
        """
        self.add(link.key, status, message, link.seq, None, link.id)

    def status(self, key: tuple[str, ...]) -> Status:
        """
        Return the worst that was found in a chain, or about a node.
        """
        return self._worst.get(key, "ok")

    def all(self) -> tuple[Finding, ...]:
        """
        Return the findings in the order in which they came up.
        """
        return tuple(
            Finding(
                status=tally.status,
                message=message,
                **dict(zip(_PLACE, key, strict=False)),
                from_seq=tally.from_seq,
                to_seq=tally.to_seq,
                row_id=tally.row_id,
                rows=tally.rows,
            )
            for (key, message), tally in self._tallies.items()
        )


def _worst(statuses: Iterable[Status]) -> Status:
    return max(statuses, key=_GRAVITY.index, default="ok")


class _Records:
    """
    What fasten's own rows say about rows that are not there, or not whole, any more.

    *newest* is the cut of each chain that went furthest; *cuts* those that may be
    asked for, by their last hash: with *heads*, only the one that a head stands at.
    """

    def __init__(self, heads: Mapping[ChainKey, Head] | None) -> None:
        self.newest: dict[ChainKey, Cut] = {}
        self.cuts: dict[tuple[ChainKey, str], Cut] = {}
        self._heads = heads
        self.restored: list[Restored] = []
        self.lost = {"AUDIT_ROWS_DROPPED": 0, "AUDIT_ROW_QUARANTINED": 0}
        self._named: dict[str, set[str]] = {}
        self._unnamed: dict[str, tuple[set[str], ChainKey, int]] = {}

    def learn(self, code: str, detail: Mapping[str, Any]) -> None:
        """
        Take in one record.
        """
        match code:
            case "RETENTION_SWEEP_RAN":
                for said in _items(detail, "cuts"):
                    self._take_cut(Cut.read(said))
                # Records that a sweep has to delete, it says again.
                for said in _items(detail, "restored"):
                    self._take_restored(Restored.read(said))
                for said in _items(detail, "erased"):
                    self._take_names(said)
            case "CHAIN_RESTORED":
                self._take_restored(Restored.read(detail))
            case "AUDIT_ROW_ERASED":
                self._take_names(detail)
            case _:
                count = detail.get("count", 1)
                self.lost[code] += count if type(count) is int else 1

    def _take_cut(self, said: Cut | None) -> None:
        if said is None:
            return
        # Records of one chain may stand in the chains of several nodes, in any order.
        known = self.newest.get(said.key)
        if known is None or said.total > known.total:
            self.newest[said.key] = said
        if self._heads is not None:
            head = self._heads.get(said.key)
            if head is None or head.pruned_hash != said.last_hash:
                return
        self.cuts[said.key, said.last_hash] = said

    def _take_restored(self, said: Restored | None) -> None:
        if said is not None and said not in self.restored:
            self.restored.append(said)

    def _take_names(self, said: Any) -> None:
        if not isinstance(said, dict):
            return
        fields = {field for field in _items(said, "fields") if isinstance(field, str)}
        for id_ in _items(said, "ids"):
            if not isinstance(id_, str):
                continue
            if id_ not in self._unnamed:
                self._named.setdefault(id_, set()).update(fields)
                continue
            rest = self._unnamed[id_][0]
            rest -= fields
            if not rest:
                del self._unnamed[id_]

    def take_erased(self, link: _Link) -> None:
        """
        Remember a row with erased fields until a record names them.
        """
        rest = set(link.erased) - self._named.get(link.id, set())
        if rest:
            self._unnamed[link.id] = (rest, link.key, link.seq)

    def unnamed(self) -> Iterator[tuple[ChainKey, int, str, str]]:
        """
        Yield key, number, id and fields of rows whose erasure no record names.
        """
        for id_, (fields, key, seq) in self._unnamed.items():
            yield key, seq, id_, ", ".join(sorted(fields))

    def lost_numbers(self, place: Place) -> list[tuple[int, int]]:
        """
        Return the ranges that were lost when the store went back, in order.
        """
        return _union(
            (said.from_seq, said.to_seq)
            for said in self.restored
            if (said.service_id, said.source_node_id) == place
        )


def _items(detail: Mapping[str, Any], name: str) -> list[Any]:
    value = detail.get(name)
    return value if isinstance(value, list) else []


def _union(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


def _without(
    gaps: Iterable[tuple[int, int]], spans: Sequence[tuple[int, int]]
) -> Iterator[tuple[int, int]]:
    """
    Yield what of *gaps* lies in none of *spans*, which are in order.
    """
    for first, end in gaps:
        start = first
        for a, b in spans:
            if b < start or a > end:
                continue
            if a > start:
                yield start, a - 1
            start = b + 1
        if start <= end:
            yield start, end


class _Notes:
    """
    The checkpoints that can be trusted, and those that cannot.

    *unsigned* is the largest size that a note without a known signature claims;
    *doubtful* are those of them that the store itself holds. *stored_at* is the
    newest time in the store's own table, None if that was not read.
    """

    def __init__(self, verifiers: Iterable[Verifier], findings: _Findings) -> None:
        self.verifiers = tuple(verifiers)
        self.good: dict[ChainKey, list[Checkpoint]] = {}
        self.doubtful: dict[ChainKey, list[Checkpoint]] = {}
        self.unsigned: dict[ChainKey, int] = {}
        self.stored_at: dict[ChainKey, str] | None = None
        self._findings = findings

    def open(
        self, stored: Iterable[tuple[str, str]] | None, given: Iterable[str]
    ) -> None:
        """
        Read all notes and check who signed them.
        """
        if stored is not None:
            self.stored_at = {}
            for text, at in stored:
                key = self._open(text, is_stored=True)
                self.stored_at[key] = max(self.stored_at.get(key, ""), at)
        for text in given:
            self._open(text, is_stored=False)
        for checkpoints in (*self.good.values(), *self.doubtful.values()):
            # The next one to be reached stands at the end.
            checkpoints.sort(key=lambda checkpoint: -checkpoint.size)

    def _open(self, text: str, *, is_stored: bool) -> ChainKey:
        try:
            note = Note.parse(text)
        except (ValueError, AttributeError):
            self._findings.add((), "tampered", "a checkpoint cannot be read")
            return ("", "", "")
        said = note.checkpoint
        match note.verdict(self.verifiers):
            case "good":
                self.good.setdefault(said.key, []).append(said)
            case "bad":
                message = "a checkpoint was edited"
                self._findings.add(said.key, "tampered", message, said.seq)
            case "unknown":
                size = max(self.unsigned.get(said.key, 0), said.size)
                self.unsigned[said.key] = size
                if is_stored:
                    self.doubtful.setdefault(said.key, []).append(said)
        return said.key


@attrs.define(kw_only=True)
class _Chain:
    """
    Where verification stands in one chain; *frontier* is None while unknown.

    *first* is the number of the first row, *cut* counts the rows that were cut, the
    last of them number *cut_seq*.
    *absent* is what the node counted as missing when the last row was met. Once
    *is_broken*, counts say nothing any more: head and checkpoints are not asked.
    """

    key: ChainKey
    head: Head | None
    seq: int = 0
    hash: str = GENESIS
    frontier: Frontier | None = attrs.field(factory=Frontier)
    first: int = 0
    cut: int = 0
    cut_seq: int = 0
    rows: int = 0
    absent: int = 0
    is_broken: bool = False
    ahead: list[Checkpoint] = attrs.field(factory=list)
    doubtful: list[Checkpoint] = attrs.field(factory=list)
    disputed: list[Checkpoint] = attrs.field(factory=list)
    best: Checkpoint | None = None
    excused: list[tuple[int, int]] = attrs.field(factory=list)

    @property
    def count(self) -> int:
        """
        Return how many rows the chain ever had, up to here.
        """
        return self.frontier.size if self.frontier else 0

    def resume(self, seq: int, hash: str, frontier: Frontier) -> None:
        """
        Go on from a place that head or record vouch for.
        """
        self.seq, self.hash, self.frontier = seq, hash, frontier
        self.cut, self.cut_seq = frontier.size - self.rows, seq
        self.meet_checkpoints()

    def meet_checkpoints(self) -> None:
        """
        Hold the chain against the checkpoints of the size that it has now.
        """
        for said in self._reached(self.ahead):
            if (said.seq, said.root) == (self.seq, self._root()):
                self.best = said
            else:
                self.disputed.append(said)
        # These prove nothing, but the store must not contradict itself.
        for said in self._reached(self.doubtful):
            if (said.seq, said.root) != (self.seq, self._root()):
                self.disputed.append(said)

    def _reached(self, waiting: list[Checkpoint]) -> Iterator[Checkpoint]:
        while self.frontier and waiting and waiting[-1].size <= self.frontier.size:
            said = waiting.pop()
            # Below a cut there is nothing left to hold it against.
            if said.size == self.frontier.size:
                yield said

    def _root(self) -> bytes:
        return self.frontier.root() if self.frontier else b""


@attrs.define(kw_only=True)
class _Node:
    """
    Where verification stands in the numbers of one (service, node).

    *limit* is the highest number that a sweep may have cut: at or below it missing
    numbers are counted in *low*, above it they are listed in *gaps*.
    """

    limit: int
    chains: list[_Chain] = attrs.field(factory=list)
    last: int = 0
    low: int = 0
    absent: int = 0
    gaps: list[tuple[int, int]] = attrs.field(factory=list)
    gap: tuple[int, int] = (0, 0)

    def step(self, seq: int) -> None:
        """
        Move on to the next number that is there.
        """
        if seq > self.last + 1:
            self.gap = (self.last + 1, seq - 1)
            self.absent += seq - 1 - self.last
            self._miss(*self.gap)
        self.last = max(self.last, seq)

    def close(self) -> None:
        """
        Settle the limit, and count what was cut above the last row.
        """
        limit = max([self.limit, *(chain.cut_seq for chain in self.chains)])
        if limit > self.last:
            self._miss(self.last + 1, limit)
        if limit > self.limit:
            self.limit, gaps, self.gaps = limit, self.gaps, []
            for gap in gaps:
                self._miss(*gap)

    def _miss(self, start: int, end: int) -> None:
        self.low += max(0, min(end, self.limit) - start + 1)
        if end > self.limit:
            self.gaps.append((max(start, self.limit + 1), end))


# --- verification of a table ----------------------------------------------------


class ChainVerifier:
    """
    Check a table row by row, in memory that does not grow with the table.

    Feed the rows of each (service, node) in the order of monotonic_seq, read in one
    snapshot with the heads; then `finish()`. What grows is small: a few numbers for
    each stored checkpoint, an id for each row that a record of erasure names.
    """

    def __init__(
        self,
        heads: Iterable[Head] | None,
        *,
        nodes: Mapping[Place, int] | None = None,
        stored: Iterable[tuple[str, str]] | None = None,
        given: Iterable[str] = (),
        verifiers: Iterable[Verifier] = (),
        require_anchor: bool = False,
    ) -> None:
        """
        Take what stands beside the rows.

        *heads* is None for rows that have none. *nodes* maps (service, node) to the
        number in its node row. *stored* are the notes of the checkpoint table, each
        with the time at which it was stored; *given* are notes kept elsewhere.
        """
        self._heads = {head.key: head for head in heads or ()}
        self._node_seqs = dict(nodes) if nodes is not None else None
        self._require_anchor = require_anchor
        self._findings = _Findings()
        self._records = _Records(None if heads is None else self._heads)
        self._notes = _Notes(verifiers, self._findings)
        self._notes.open(stored, given)
        self._chains: dict[ChainKey, _Chain] = {}
        self._nodes: dict[Place, _Node] = {}
        self._rows = 0
        for key in self._heads:
            self._start(key)

    def feed(self, row: Sequence[Any]) -> None:
        """
        Check the next row, given in the order of AUDIT_COLUMNS, as the reader shows it.

        *detail* is the stored text, times are wire text.
        """
        link = _examine(row)
        if link.record is not None:
            self._records.learn(*link.record)
        self._join(link)

    def _join(self, link: _Link) -> None:
        self._rows += 1
        chain = self._chains.get(link.key) or self._begin(link)
        node = self._node(link.key[:2])
        if link.problem is not None:
            self._findings.of_row(link, *link.problem)
        if link.seq <= node.last:
            self._findings.of_row(link, "a number stands twice or out of order")
        node.step(link.seq)
        if link.prev_hash != chain.hash:
            chain.is_broken = True
            self._report_break(chain, node, link)
        chain.seq, chain.hash, chain.absent = link.seq, link.hash, node.absent
        chain.rows += 1
        chain.first = chain.first or link.seq
        self._count(chain, link)
        if link.erased:
            self._records.take_erased(link)

    def _report_break(self, chain: _Chain, node: _Node, link: _Link) -> None:
        """
        Say why a row is not linked to the one before: rows are gone, or it is not.
        """
        if node.absent > chain.absent:
            message = "rows are gone: the next one is linked to none that is here"
            self._findings.add(link.key, "missing", message, *node.gap, link.id)
        else:
            self._findings.of_row(link, "the row is not linked to the one before it")

    def _count(self, chain: _Chain, link: _Link) -> None:
        if chain.frontier is not None:
            chain.frontier.push(bytes.fromhex(link.hash))
            chain.meet_checkpoints()

    def _node(self, place: Place) -> _Node:
        node = self._nodes.get(place)
        if node is None:
            node = self._nodes[place] = _Node(limit=0)
        return node

    def _begin(self, link: _Link) -> _Chain:
        return self._start(link.key)

    def _start(self, key: ChainKey) -> _Chain:
        """
        Begin a chain where its sweeps ended.
        """
        head = self._heads.get(key)
        chain = _Chain(
            key=key,
            head=head,
            ahead=self._notes.good.get(key, []),
            doubtful=self._notes.doubtful.get(key, []),
        )
        self._chains[key] = chain
        node = self._node(key[:2])
        node.chains.append(chain)
        if head is not None:
            self._start_at(chain, head)
            # All heads are read before the first row: the limit is known in time.
            node.limit = max(node.limit, chain.cut_seq)
        return chain

    def _start_at(self, chain: _Chain, head: Head) -> None:
        problem = _head_problem(head)
        if problem is not None:
            self._findings.add(chain.key, "tampered", problem)
        if is_frontier(head.pruned_frontier, head.pruned_count):
            frontier = Frontier.read(head.pruned_frontier, head.pruned_count)
            chain.resume(_number(head.pruned_seq), head.pruned_hash, frontier)

    # -- the end --

    def finish(self) -> Report:
        """
        Hold what was read against heads, records and checkpoints; return the report.
        """
        self._start_unseen()
        for chain in self._chains.values():
            self._check_end(chain)
            if not chain.is_broken:
                self._check_checkpoints(chain)
            self._check_trust(chain)
        for key, seq, id_, fields in self._records.unnamed():
            message = f"{fields} erased, and no record says so"
            self._findings.add(key, "tampered", message, seq, None, id_)
        for place, node in self._nodes.items():
            if self._node_seqs is not None:
                self._check_node_row(place, node, self._node_seqs.get(place))
            self._check_numbers(place, node)
        return self._report()

    def _start_unseen(self) -> None:
        """
        Begin the chains that only a note, a record or a node row knows of.
        """
        for keys in (self._notes.good, self._notes.unsigned, self._records.newest):
            for key in keys:
                if key not in self._chains:
                    self._start(key)
        for place in self._node_seqs or ():
            self._node(place)

    def _check_end(self, chain: _Chain) -> None:
        head = chain.head
        if head is None:
            if chain.rows or chain.key in self._records.newest:
                message = "its head row is gone"
                self._findings.add(chain.key, "missing", message, chain.seq)
            return
        self._check_cut(chain, head)
        if chain.seq < _number(head.seq) and chain.count < _number(head.count):
            message = "the last rows are gone: the head has seen them"
            span = (chain.seq + 1, head.seq)
            self._findings.add(chain.key, "truncated", message, *span)
            return
        if chain.is_broken:
            return
        end = (chain.seq, chain.hash, chain.count, str(chain.frontier))
        if end != (head.seq, head.hash, head.count, head.frontier):
            message = "rows and head disagree: one of them was edited"
            self._findings.add(chain.key, "tampered", message, chain.seq)

    def _check_cut(self, chain: _Chain, head: Head) -> None:
        """
        Demand that the newest record of a sweep says what the head says.
        """
        pruned = _number(head.pruned_count)
        said = self._records.cuts.get((chain.key, head.pruned_hash))
        marks = (chain.key, head.pruned_seq, pruned, head.pruned_hash)
        if not pruned or said == (*marks, head.pruned_frontier):
            return
        newest = self._records.newest.get(chain.key)
        # A record that goes further stands for a sweep that is under way: the rows
        # that it has not deleted yet are here, and were checked.
        if newest is None or newest.total < pruned:
            message = "rows were cut from the front, and no record says so"
            span = (1, _number(head.pruned_seq))
            self._findings.add(chain.key, "missing", message, *span)
        elif newest.total == pruned:
            message = "the head's pruned-through is not what the record says"
            self._findings.add(chain.key, "tampered", message, newest.to_seq)

    def _check_checkpoints(self, chain: _Chain) -> None:
        for said in chain.disputed:
            if not self._is_excused(chain, said):
                message = "rows are not those that a checkpoint was made of"
                self._findings.add(chain.key, "tampered", message, 1, said.seq)
        for said in chain.ahead:
            if not self._is_excused(chain, said):
                self._report_shortage(chain, said)

    def _report_shortage(self, chain: _Chain, said: Checkpoint) -> None:
        """
        Say that a checkpoint has seen more rows than there are.
        """
        if chain.rows or chain.head is not None:
            message = "the last rows are gone: a checkpoint has seen them"
            span = (chain.seq + 1, said.seq)
            self._findings.add(chain.key, "truncated", message, *span)
        else:
            message = "the chain is gone: a checkpoint has seen it"
            self._findings.add(chain.key, "missing", message, 1, said.seq)

    def _is_excused(self, chain: _Chain, said: Checkpoint) -> bool:
        for stretch in self._records.restored:
            if stretch.explains(said):
                span = (stretch.from_seq, stretch.to_seq)
                chain.excused += [span] if span not in chain.excused else []
                return True
        return False

    def _check_trust(self, chain: _Chain) -> None:
        key, notes = chain.key, self._notes
        held = chain.best.size if chain.best else 0
        # Notes below a good one may be of a key that was rotated out.
        if notes.unsigned.get(key, 0) > held:
            message = "its checkpoints were signed by none of the given keys"
            if not notes.verifiers:
                message = "it has checkpoints, and no key to check them was given"
            self._findings.add(key, "unverifiable", message)
        elif self._require_anchor and not held and (chain.count or chain.rows):
            message = "no checkpoint holds this chain, and one is required"
            self._findings.add(key, "unverifiable", message)
        if chain.head is not None and notes.stored_at is not None:
            self._check_newest(chain.head, notes.stored_at.get(key, ""))

    def _check_newest(self, head: Head, stored_at: str) -> None:
        """
        Demand that the head names the time of the newest checkpoint in the store.
        """
        at = "" if head.checkpointed_at is None else str(head.checkpointed_at)
        if at > stored_at:
            message = "its newest checkpoint is gone from the store"
            self._findings.add(head.key, "missing", message)
        elif at < stored_at:
            message = "the time of its newest checkpoint is not in its head row"
            self._findings.add(head.key, "tampered", message)

    def _check_node_row(self, place: Place, node: _Node, seq: int | None) -> None:
        last = max(node.last, node.limit)
        if seq is None:
            if last:
                self._findings.add(place, "missing", "its node row is gone", last)
        elif type(seq) is not int:
            self._findings.add(place, "tampered", "the number of its node row is none")
        elif seq > last:
            message = "the last rows are gone: its node row has counted them"
            self._findings.add(place, "truncated", message, last + 1, seq)
        elif seq < last:
            message = "the node row counts fewer rows than there are"
            self._findings.add(place, "tampered", message, seq, last)

    def _check_numbers(self, place: Place, node: _Node) -> None:
        """
        Account for each number of a node that is not there.
        """
        node.close()
        # What a chain has said already is not said twice.
        if {self._findings.status(c.key) for c in node.chains} & _GONE:
            return
        spans = self._records.lost_numbers(place)
        known = sum(chain.cut for chain in node.chains)
        known += sum(max(0, min(b, node.limit) - a + 1) for a, b in spans)
        if node.low != known:
            message = f"{node.low} numbers are missing, records account for {known}"
            self._findings.add(place, "missing", message, 1, node.limit)
        for start, end in _without(node.gaps, spans):
            message = "numbers are missing, and no record says why"
            self._findings.add(place, "missing", message, start, end)

    def _report(self) -> Report:
        findings = self._findings.all()
        chains = [self._chain_report(c) for c in self._in_order()]
        return Report(
            status=_worst(finding.status for finding in findings),
            findings=findings,
            chains=tuple(chains),
            rows=self._rows,
            dropped=self._records.lost["AUDIT_ROWS_DROPPED"],
            quarantined=self._records.lost["AUDIT_ROW_QUARANTINED"],
            restored=tuple(self._records.restored),
        )

    def _in_order(self) -> list[_Chain]:
        # An edited key may be null or a number.
        return sorted(self._chains.values(), key=lambda c: [str(k) for k in c.key])

    def _chain_report(self, chain: _Chain) -> ChainReport:
        service, node, class_ = chain.key
        return ChainReport(
            service_id=service,
            source_node_id=node,
            retention_class=class_,
            status=self._findings.status(chain.key),
            rows=chain.rows,
            count=chain.count if chain.frontier is not None else None,
            seq=chain.seq,
            anchored_seq=chain.best.seq if chain.best else None,
            anchored_count=chain.best.size if chain.best else None,
            restored=tuple(chain.excused),
        )


_GONE: Final = {"missing", "truncated"}


def _number(value: object) -> int:
    return value if type(value) is int else 0


def _head_problem(head: Head) -> str | None:
    """
    Tell what of a head was never written by fasten.
    """
    numbers = (head.seq, head.count, head.pruned_seq, head.pruned_count)
    if not all(type(n) is int and n >= 0 for n in numbers):
        return "a number of its head row was edited"
    if head.pruned_count > head.count or head.pruned_seq > head.seq:
        return "its head row says that more was cut than there was"
    for seq, count, hash_, frontier in (
        (head.seq, head.count, head.hash, head.frontier),
        (head.pruned_seq, head.pruned_count, head.pruned_hash, head.pruned_frontier),
    ):
        if bool(seq) != bool(count):
            return "a number of its head row was edited"
        if not (is_hash(hash_) if count else hash_ == GENESIS):
            return "a hash of its head row was edited"
        if not is_frontier(frontier, count):
            return "a frontier of its head row was edited"
    return None


# --- verification of a file -----------------------------------------------------


def verify_ndjson(
    lines: Iterable[str],
    *,
    given: Iterable[str] = (),
    verifiers: Iterable[Verifier] = (),
    require_anchor: bool = False,
) -> Report:
    """
    Check the audit rows of an NDJSON file, in any order, of every published form.

    Lines of another shape are passed over; *given* are checkpoints. A file has no
    heads: only a checkpoint can tell that its last rows are gone. Rows that are many
    are sorted in a temporary file.
    """
    verifier = _FileVerifier(
        given=given, verifiers=verifiers, require_anchor=require_anchor
    )
    for number, line in enumerate(lines, 1):
        if line.strip():
            verifier.take(number, line)
    return verifier.finish()


class _FileVerifier(ChainVerifier):
    """
    Collect the rows of a file, then check them in the order of their chains.
    """

    def __init__(
        self,
        *,
        given: Iterable[str],
        verifiers: Iterable[Verifier],
        require_anchor: bool,
    ) -> None:
        super().__init__(
            None, given=given, verifiers=verifiers, require_anchor=require_anchor
        )
        self._links = Spill(lambda link: (link[0][:2], link[1]))
        self._old_links = Spill(lambda link: (link[0][1], link[1]))
        self._old_chains: list[ChainReport] = []

    def take(self, number: int, line: str) -> None:
        """
        Read one line; rows of other SDKs go to chains of their own.
        """
        try:
            self._sort(_read_line(line))
        except (ValueError, RecursionError):
            message = "a line cannot be read as one JSON object"
            self._findings.add((), "tampered", message, number)

    def _sort(self, row: dict[str, Any]) -> None:
        if row.get("shape", "audit") != "audit":
            return
        if row.get("canonical_form_id") in _OLD_FORMS:
            self._old_links.add(tuple(_examine_old(row)))
            return
        link = _examine_wire(row)
        if link.record is not None:
            self._records.learn(*link.record)
        self._links.add(tuple(link._replace(record=None)))

    def finish(self) -> Report:
        """
        Sort, link and report.
        """
        for link in self._links:
            self._join(_Link(*link))
        for _, links in groupby(self._old_links, key=lambda link: link[0][1]):
            self._join_old(_Link(*link) for link in links)
        report = super().finish()
        return attrs.evolve(report, chains=(*report.chains, *self._old_chains))

    # A file has no heads: where a chain starts is told by the record of its last cut.

    def _start(self, key: ChainKey) -> _Chain:
        chain = super()._start(key)
        said = self._records.newest.get(key)
        if said is not None:
            self._resume(chain, said)
        return chain

    def _begin(self, link: _Link) -> _Chain:
        chain = super()._start(link.key)
        if link.prev_hash != GENESIS:
            chain.hash, chain.frontier = str(link.prev_hash), None
            self._resume(chain, self._records.cuts.get((link.key, chain.hash)))
        return chain

    def _count(self, chain: _Chain, link: _Link) -> None:
        super()._count(chain, link)
        # A sweep may have been under way: its record runs ahead of what it deletes.
        if chain.frontier is None:
            said = self._records.cuts.get((link.key, link.hash))
            if said is not None and said.to_seq == link.seq:
                self._resume(chain, said)

    def _resume(self, chain: _Chain, said: Cut | None) -> None:
        if said is not None:
            frontier = Frontier.read(said.frontier, said.total)
            chain.resume(said.to_seq, said.last_hash, frontier)

    def _check_end(self, chain: _Chain) -> None:
        if chain.frontier is None:
            message = "the rows before are not here, and no record says they were cut"
            self._findings.add(chain.key, "missing", message, 1, chain.first - 1)

    def _report_shortage(self, chain: _Chain, said: Checkpoint) -> None:
        if chain.rows and chain.frontier is not None:
            super()._report_shortage(chain, said)
            return
        message = "a checkpoint is of rows that are not in the file"
        self._findings.add(chain.key, "unverifiable", message, said.seq)

    def _join_old(self, links: Iterable[_Link]) -> None:
        """
        Check a chain of one node: numbers from 1, none missing, each row linked.
        """
        rows, last, expected = 0, 0, GENESIS
        place: Place = ("", "")
        for found in links:
            place = found.key[:2] if not rows else place
            link = found._replace(key=(*place, ""))
            rows += 1
            if link.problem is not None:
                self._findings.of_row(link, *link.problem)
            if link.seq > last + 1:
                span = (last + 1, link.seq - 1)
                self._findings.add(link.key, "missing", "rows are gone", *span)
            elif link.seq <= last:
                self._findings.of_row(link, "a number stands twice or out of order")
            elif link.prev_hash != expected:
                message = "the row is not linked to the one before it"
                self._findings.of_row(link, message)
            last, expected = link.seq, link.hash
        self._rows += rows
        self._old_chains.append(self._old_report(place, rows, last))

    def _old_report(self, place: Place, rows: int, last: int) -> ChainReport:
        return ChainReport(
            service_id=place[0],
            source_node_id=place[1],
            retention_class=None,
            status=self._findings.status((*place, "")),
            rows=rows,
            count=last,
            seq=last,
        )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # Of two equal keys each reader keeps another one.
    read = dict(pairs)
    if len(read) < len(pairs):
        raise ValueError("a key stands twice")
    return read


_file_line: Final = json.JSONDecoder(object_pairs_hook=_unique).decode


def _read_line(line: str) -> dict[str, Any]:
    row: object = _file_line(line)
    if isinstance(row, dict):
        return row
    raise ValueError("not an object")


_ADVISORY: Final = {"shape", "shipped_at", "stored_at"}
_DETAIL: Final = AUDIT_COLUMNS.index("detail")


def _examine_wire(row: dict[str, Any]) -> _Link:
    """
    Check a row in wire form: the keys must be those of the form, no more, no fewer.
    """
    columns = [row.get(name) for name in AUDIT_COLUMNS]
    try:
        if columns[_DETAIL] is not None:
            columns[_DETAIL] = _as_detail(columns[_DETAIL])
    except (ValueError, RecursionError):
        columns[_DETAIL] = "no double"
    link = _examine(columns, is_printed="shape" in row)
    # A newer form has other keys; then `_examine` has said that it is newer.
    if link.problem is None and (row.keys() ^ set(AUDIT_COLUMNS)) - _ADVISORY:
        return link._replace(problem=("a key was added or removed", "tampered"))
    return link


# --- forms of other languages' SDKs ------------------------------------------------
# Their rules stand in conformance/chain-forms.md; we write neither.

_HASHED_1: Final = frozenset(
    {
        *("actor", "actor_kind", "action", "canonical_form_id", "category", "code"),
        *("detail", "domain", "id", "method", "monotonic_seq", "origin_id"),
        *("prev_hash", "request_id", "service_id", "severity", "shipped_at"),
        *("source_node_id", "target", "tenant_id", "timestamp", "wire_version"),
    }
)
_HASHED: Final = {
    "1": _HASHED_1,
    "2": _HASHED_1 - {"detail"} | {"detail_commitment"},
}
_OLD_FORMS: Final = (None, *_HASHED)
_TIMES: Final = ("timestamp", "shipped_at")


def _old_json(value: Any) -> bytes:
    # Exactly this call is the canonical JSON of both forms.
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return text.encode()


def _examine_old(row: Mapping[str, Any]) -> _Link:
    """
    Check a row of form "1" or "2"; one without a form is of form "1".
    """
    form = row.get("canonical_form_id") or "1"
    seq = row.get("monotonic_seq")
    message = ""
    if type(seq) is not int or seq < 1:
        message = "monotonic_seq is no number from 1"
    elif row.get("hash") not in tuple(_old_hashes(row, form)):
        message = "a key or the hash was edited"
    elif form == "2" and not _is_detail_committed(row):
        message = "the detail, its salt or its commitment was edited"
    return _Link(
        (str(row.get("service_id")), str(row.get("source_node_id")), ""),
        _number(seq),
        str(row.get("id")),
        row.get("prev_hash"),
        str(row.get("hash")),
        (message, "tampered") if message else None,
    )


def _old_hashes(row: Mapping[str, Any], form: str) -> Iterator[str]:
    """
    Yield the hashes that a row may have.
    """
    hashed = {key: row[key] for key in _HASHED[form] if key in row}
    if hashed.get("canonical_form_id") is None:
        hashed.pop("canonical_form_id", None)
    # An early SDK sealed form "1", too, with the times as on the wire.
    yield sha256(_old_json(hashed)).hexdigest()
    if form == "1":
        times = {key: _iso(hashed[key]) for key in _TIMES if key in hashed}
        yield sha256(_old_json(hashed | times)).hexdigest()


def _iso(value: Any) -> Any:
    try:
        return datetime.fromisoformat(value).astimezone(UTC).isoformat()
    except (ValueError, TypeError, OverflowError):
        return value


def _is_detail_committed(row: Mapping[str, Any]) -> bool:
    salt, detail = row.get("detail_salt"), row.get("detail")
    if salt is None and detail is None:
        return isinstance(row.get("detail_commitment"), str)
    if not isinstance(salt, str) or detail is None:
        return False
    salted = salt.encode("utf-8", "surrogatepass") + _old_json(detail)
    return sha256(salted).hexdigest() == row.get("detail_commitment")
