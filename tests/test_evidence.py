# SPDX-License-Identifier: Apache-2.0
"""
Tests of verification: every edit is found, and nothing else is.
"""

from __future__ import annotations

import json
import tracemalloc
from base64 import b64encode
from collections.abc import Callable
from hashlib import sha256
from itertools import pairwise
from typing import Any, Final

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fasten import chain, evidence
from fasten.rows import AUDIT_COLUMNS, Pending, canonical_json
from tests.ledger import (
    CLASSES,
    INDEX,
    Ledger,
    edited,
    pending_of,
    resealed,
    value,
    wire_line,
)
from tests.outside import ROOT

ADVISORY: Final = ("stored_at", "shipped_at")
SEALED: Final = tuple(name for name in AUDIT_COLUMNS if name not in ADVISORY)
FORGED_KEY: Final = b64encode(bytes(32)).decode()


def busy_log() -> Ledger:
    """
    Return a log of 60 rows in 3 chains, swept, erased in, and with checkpoints.
    """
    log = Ledger(7)
    for number in range(64):
        log.emit("n1", CLASSES[number % 3])
    log.sweep("n1", {("shop", "n1", "short"): 5, ("shop", "n1", "medium"): 2})
    ids = [value(row, "id") for row in log.rows[4:7]]
    log.erase("n1", ids, ("actor", "detail"))
    log.emit("n1", "short")
    log.checkpoint()
    return log


BUSY: Final = busy_log()


def tampered_with(change: Callable[[Ledger], object]) -> evidence.Report:
    """
    Verify a copy of the busy log after *change*.
    """
    log = BUSY.copy()
    change(log)
    return log.verify()


def messages(report: evidence.Report) -> set[str]:
    """
    Return what was found, without where.
    """
    return {finding.message for finding in report.findings}


def with_row(log: Ledger, position: int, **changes: Any) -> Ledger:
    """
    Return a copy in which some columns of one row are other ones.
    """
    forged = log.copy()
    forged.rows[position] = edited(forged.rows[position], **changes)
    return forged


# --- what must not alarm -----------------------------------------------------------


class TestUntouched:
    def test_the_busy_log(self):
        """
        The log that the other tests edit is ok as it stands, and anchored.
        """
        report = BUSY.verify(require_anchor=True)

        assert (True, "ok", 0, ()) == (
            report.ok,
            report.status,
            report.exit_code,
            report.findings,
        )
        assert (60, 3) == (report.rows, len(report.chains))
        assert report.verdict == "ok, anchored, rows after the last checkpoint: 0"

    def test_an_empty_table(self):
        """
        Nothing is no finding.
        """
        report = Ledger().verify()

        assert report.verdict == (
            "ok, unanchored: shows accidents, not an attacker with write access"
        )

    def test_advisory_columns_may_change(self):
        """
        stored_at and shipped_at are outside the hash.
        """
        log = BUSY.copy()
        log.rows = [edited(row, stored_at=None, shipped_at="soon") for row in log.rows]

        assert log.verify().ok

    def test_a_chain_that_was_swept_empty(self):
        """
        The head of a chain without rows stands for it.
        """
        log = Ledger()
        log.emit("n1", "short", "short", "long")
        log.sweep("n1", {("shop", "n1", "short"): 2})

        assert log.verify().ok

    def test_a_sweep_under_way(self):
        """
        A record that is ahead of its deletions is no finding while the rows stand.
        """
        log = Ledger()
        log.emit("n1", *["short"] * 6)
        before = attrs.evolve(log.heads["shop", "n1", "short"])
        rows = list(log.rows)
        log.sweep("n1", {("shop", "n1", "short"): 4})
        half = [(value(r, "monotonic_seq"), value(r, "hash")) for r in rows[:2]]
        chain.cut(before, half)
        log.heads["shop", "n1", "short"] = before
        log.rows = rows[2:] + log.rows[2:]

        assert log.verify().ok
        assert evidence.verify_ndjson(log.lines()).ok

    def test_rows_that_fasten_lost_are_explained(self):
        """
        Dropped and quarantined rows are told, and no findings.
        """
        log = Ledger()
        log.record("n1", "AUDIT_ROWS_DROPPED", {"count": 3})
        log.record("n1", "AUDIT_ROWS_DROPPED", {"count": 2})
        log.record("n1", "AUDIT_ROW_QUARANTINED", {"id": "evt-1"})
        report = log.verify()

        assert (True, 5, 1) == (report.ok, report.dropped, report.quarantined)

    def test_records_of_records(self):
        """
        A sweep that deletes the records of others says again what they said.
        """
        log = Ledger()
        rows = log.emit("n1", "short", "short", "medium", "medium")
        log.erase("n1", [value(rows[2], "id")], ("actor",))
        log.sweep("n1", {("shop", "n1", "short"): 1})
        log.emit("n2", "long")
        log.sweep("n2", {("shop", "n1", "long"): 2})

        assert log.verify().ok
        assert evidence.verify_ndjson(log.lines()).ok

    def test_memory_does_not_grow_with_the_table(self):
        """
        Ten times the rows take no more memory to verify.
        """
        log = Ledger()
        log.emit("n1", *["short"] * 50)

        def peak(times: int) -> int:
            verifier = evidence.ChainVerifier(log.heads.values())
            tracemalloc.start()
            for _ in range(times):
                for row in log.rows:
                    verifier.feed(row)
            found = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            return found

        peak(1)

        assert peak(20) < 1.5 * peak(2)


NODES: Final = ("n1", "n2")
STEP: Final = st.one_of(
    st.tuples(
        st.just("emit"),
        st.sampled_from(NODES),
        st.lists(st.sampled_from(CLASSES), min_size=1, max_size=5),
    ),
    st.tuples(
        st.just("sweep"),
        st.sampled_from(NODES),
        st.dictionaries(
            st.tuples(
                st.just("shop"), st.sampled_from(NODES), st.sampled_from(CLASSES)
            ),
            st.integers(0, 6),
        ),
    ),
    st.tuples(
        st.just("erase"),
        st.sampled_from(NODES),
        st.integers(0, 2**16),
        st.sets(st.sampled_from(chain.COMMITTED_FIELDS), min_size=1),
    ),
    st.tuples(st.just("checkpoint")),
    st.tuples(st.just("backup")),
    st.tuples(st.just("restore")),
    st.tuples(st.just("dropped"), st.sampled_from(NODES)),
)


class History:
    """
    A log to which things happen, with the notes that were carried off the host.
    """

    def __init__(self, seed: int) -> None:
        self.log = Ledger(seed)
        self.notes: list[str] = []
        self.backup = self.log.copy()

    def apply(self, name: str, *args: Any) -> None:
        """
        Let one thing happen.
        """
        log = self.log
        match name:
            case "emit":
                log.emit(args[0], *args[1])
            case "sweep":
                known = {k: n for k, n in args[1].items() if k in log.heads}
                log.checkpoint()
                log.sweep(args[0], known)
            case "erase":
                chosen = [r for i, r in enumerate(log.rows) if args[1] >> i % 16 & 1]
                ids = [value(row, "id") for row in chosen]
                log.erase(args[0], ids, tuple(args[2]))
            case "checkpoint":
                self.notes += log.checkpoint()
            case "backup":
                self.backup = log.copy()
            case "restore":
                log.restore(self.backup, *NODES)
            case "dropped":
                log.record(args[0], "AUDIT_ROWS_DROPPED", {"count": 1})


class TestHistories:
    @given(st.integers(0, 10**6), st.lists(STEP, max_size=14))
    @settings(max_examples=150)
    def test_untouched_histories_never_alarm(self, seed, steps):
        """
        Whatever was emitted, swept, erased, anchored or restored: no finding.
        """
        history = History(seed)
        for step in steps:
            history.apply(*step)
        log = history.log
        table = log.verify(given=history.notes)
        file = evidence.verify_ndjson(
            log.lines(), given=history.notes, verifiers=log.verifiers
        )

        assert [] == [str(finding) for finding in table.findings]
        assert {"unverifiable"} >= {f.status for f in file.findings}, file.findings

    @given(st.integers(0, 10**6), st.lists(STEP, max_size=10), st.data())
    @settings(max_examples=150)
    def test_any_edit_of_any_history_is_found(self, seed, steps, data):
        """
        One column of one row of a history is changed: verification says so.
        """
        history = History(seed)
        history.apply("emit", "n1", ["short"])
        for step in steps:
            history.apply(*step)
        log = history.log
        log.emit("n2", "medium")
        position = data.draw(st.integers(0, len(log.rows) - 1))
        name = data.draw(st.sampled_from(SEALED))
        new = data.draw(st.none() | st.text(max_size=5) | st.integers(-1, 5))
        if value(log.rows[position], name) == new:
            return

        assert not with_row(log, position, **{name: new}).verify().ok


# --- edits of rows -----------------------------------------------------------------


def variants(name: str, old: Any) -> list[Any]:
    """
    Return what an attacker may write over a value.
    """
    if name == "monotonic_seq":
        return [None, 0, -old, old + 1000, str(old), float(old), True]
    if old is None:
        return ["", "x", "null"]
    flipped = chr(ord(old[0]) ^ 1) + old[1:] if old else "x"
    return [None, "", flipped, old + " ", old[:-1] if old else " ", old.encode(), 1]


class TestColumns:
    @pytest.mark.parametrize("name", SEALED)
    def test_every_column_of_every_row(self, name):
        """
        Flipped, emptied, nulled, lengthened, cut, of another type: all are found.
        """
        missed = []
        for position, row in enumerate(BUSY.rows):
            nothing, *others = variants(name, value(row, name))
            # Each row is emptied, and gets one of the other edits in turn.
            missed += [
                (position, new)
                for new in (nothing, others[position % len(others)])
                if with_row(BUSY, position, **{name: new}).verify(stored=None).ok
            ]

        assert [] == missed

    @pytest.mark.parametrize("name", SEALED)
    def test_swapping_a_column_of_neighbours(self, name):
        """
        Two rows that exchange one value are found.
        """
        missed = []
        for position, (one, other) in enumerate(pairwise(BUSY.rows)):
            if value(one, name) == value(other, name):
                continue
            log = with_row(BUSY, position, **{name: value(other, name)})
            log = with_row(log, position + 1, **{name: value(one, name)})
            if log.verify(stored=None).ok:
                missed.append(position)

        assert [] == missed

    @pytest.mark.parametrize("position", [0, 5, 20, 57])
    def test_every_character_of_a_row(self, position):
        """
        Each single character of each column counts.
        """
        row = BUSY.rows[position]
        missed = []
        for name in SEALED:
            old = value(row, name)
            for at in range(len(old) if isinstance(old, str) else 0):
                new = f"{old[:at]}{chr(ord(old[at]) ^ 1)}{old[at + 1 :]}"
                link = evidence._examine(edited(row, **{name: new}))
                is_linked = name in ("prev_hash", *chain.HEADER_KEYS)
                if link.problem is None and not is_linked:
                    missed.append((name, at))
                elif link.problem is None:
                    missed.append((name, at, "header"))

        assert [] == missed

    def test_the_first_bad_row_is_named(self):
        """
        The finding has chain, number and id of the row.
        """
        position = next(
            i for i, r in enumerate(BUSY.rows) if value(r, "retention_class") == "long"
        )
        row = BUSY.rows[position]
        report = with_row(BUSY, position, outcome="denied").verify()
        (finding,) = report.findings

        assert finding == evidence.Finding(
            status="tampered",
            message="a column or the hash was edited",
            service_id="shop",
            source_node_id="n1",
            retention_class="long",
            from_seq=value(row, "monotonic_seq"),
            to_seq=value(row, "monotonic_seq"),
            row_id=value(row, "id"),
        )
        assert ("tampered", 1) == (report.status, report.exit_code)
        assert str(finding) == (
            f"tampered: shop/n1/long at {finding.from_seq} ({finding.row_id}): "
            "a column or the hash was edited"
        )

    @pytest.mark.parametrize("column", ["salt", "hash"])
    def test_a_nulled_seal_is_no_way_out(self, column):
        """
        A row without salt or hash is not one that cannot be checked: it is edited.
        """
        report = with_row(BUSY, 10, **{column: None, "actor": "nobody"}).verify()

        assert report.status == "tampered"
        assert f"the {column} was removed" in messages(report) | {
            "the hash was removed"
        }

    def test_all_seal_columns_nulled(self):
        """
        A row stripped of its seal is no row of an older form.
        """
        nothing = dict.fromkeys(
            ("canonical_form_id", "prev_hash", "hash", "salt", "commitment")
        )
        report = with_row(BUSY, 10, **nothing).verify()

        assert report.status == "tampered"
        assert "canonical_form_id is not a form of this table" in messages(report)

    @pytest.mark.parametrize(
        "text",
        [
            '{"a":1.0}',
            '{"a":1e2}',
            '{"a":-0}',
            '{"a": 1}',
            '{"b":1,"a":2}',
            '{"a":1,"a":1}',
            '{"a":9007199254740993}',
            '{"a":1000000000000000000000000}',
            '{"a":0.10}',
            '{"a":1E-7}',
            '{"a":"\\u0041"}',
            '{"a":"\\/"}',
            '{"a":"é\\u00e9"}',
            '{"a":NaN}',
            '{"a":1e999}',
            '{"\\ud83d\\ude00":1,"\ufb33":2}',
            "{",
            "",
            "[" * 100_000,
            '{"a":' * 50_000 + "1" + "}" * 50_000,
        ],
    )
    def test_a_stored_detail_has_one_spelling(self, text):
        """
        A detail whose text is not its own canonical form was not written by fasten.
        """
        assert not evidence._is_canonical(text)

    @pytest.mark.parametrize(
        "text",
        [
            "{}",
            '{"a":1}',
            '{"a":0.5,"b":1e-7,"c":1e+21,"d":100000000000000000000}',
            '{"a":9007199254740991,"b":"9007199254740993","c":-1234567890123456}',
            '{"":{"x":[null,true,false,"\u2028é😀"]}}',
            '{"a":{"\U0001f600":1,"\ufb33":2}}',
        ],
    )
    def test_canonical_details(self, text):
        """
        What emit writes is its own canonical form.
        """
        assert evidence._is_canonical(text)

    def test_another_spelling_of_the_same_detail(self):
        """
        A detail that reads the same, resealed by its own commitment, is found.
        """
        log = Ledger()
        forged = log.pending(detail='{"a":1.0}')
        log.append("n1", [forged])

        assert {"the stored detail is not canonical JSON"} == messages(log.verify())


class TestRows:
    @pytest.mark.parametrize("position", range(60))
    def test_deleted(self, position):
        """
        A row that is gone is missed, wherever it stood.
        """
        report = tampered_with(lambda log: log.rows.pop(position))
        first = {f.status for f in report.findings}

        assert report.exit_code == 1
        assert first & {"missing", "truncated"}

    @pytest.mark.parametrize("count", [1, 2, 7, 60])
    def test_a_cut_tail(self, count):
        """
        The last rows cannot be cut without the heads telling.
        """
        log = BUSY.copy()
        log.rows = log.in_order()[:-count]
        report = log.verify()

        assert report.exit_code == 1
        assert "the last rows are gone: the head has seen them" in messages(report)

    @pytest.mark.parametrize("count", [1, 2, 7, 59])
    def test_a_cut_front(self, count):
        """
        The first rows cannot be cut beyond what a record says.
        """
        log = BUSY.copy()
        log.rows = log.in_order()[count:]

        assert log.verify().exit_code == 1

    def test_the_missing_range_is_named(self):
        """
        The finding says between which numbers rows are gone.
        """
        log = Ledger()
        log.emit("n1", *["long"] * 9)
        del log.rows[3:6]
        (finding,) = log.verify().findings

        assert ("missing", 4, 6) == (finding.status, finding.from_seq, finding.to_seq)

    @pytest.mark.parametrize("position", range(0, 59, 3))
    def test_inserted(self, position):
        """
        A row that is not the chain's own is found: copied, or with a number of its own.
        """
        copied = tampered_with(
            lambda log: log.rows.insert(position, log.rows[position])
        )
        renumbered = tampered_with(
            lambda log: log.rows.append(edited(log.rows[position], monotonic_seq=999))
        )

        assert ("tampered", "tampered") == (copied.status, renumbered.status)

    def test_inserted_into_a_gap_that_a_sweep_left(self):
        """
        A forged row in the place of a swept one has no link to hold on to.
        """
        donor = Ledger(8)
        (row,) = donor.emit("n1", "short")

        assert tampered_with(lambda log: log.rows.append(row)).status == "tampered"

    @pytest.mark.parametrize("position", range(0, 57, 4))
    def test_two_rows_change_places(self, position):
        """
        Reordering means renumbering, and numbers are sealed.
        """

        def swap(log: Ledger) -> None:
            one, other = log.rows[position], log.rows[position + 3]
            a, b = value(one, "monotonic_seq"), value(other, "monotonic_seq")
            log.rows[position] = edited(one, monotonic_seq=b)
            log.rows[position + 3] = edited(other, monotonic_seq=a)

        assert tampered_with(swap).status == "tampered"

    def test_a_row_moved_to_another_class(self):
        """
        A chain that no head knows is missing its head.
        """
        report = tampered_with(
            lambda log: log.rows.__setitem__(
                9, edited(log.rows[9], retention_class="x")
            )
        )

        assert report.status == "tampered"
        assert "its head row is gone" in messages(report)

    def test_fed_out_of_order(self):
        """
        Rows that do not come in the order of their numbers are not believed.
        """
        log = Ledger()
        log.emit("n1", "short", "short")
        verifier = evidence.ChainVerifier(log.heads.values())
        for row in reversed(log.rows):
            verifier.feed(row)

        assert "a number stands twice or out of order" in messages(verifier.finish())

    def test_deleted_and_relinked_within_a_node(self):
        """
        Whoever deletes a row and links the rest anew leaves a number that nobody has.
        """
        log = Ledger()
        log.emit("n1", *["long"] * 6)
        rows = [pending_of(row) for row in log.rows]
        forged = Ledger()
        forged.append("n1", rows[:3])
        forged.nodes["shop", "n1"] = 4
        forged.append("n1", rows[4:])
        (finding,) = forged.verify().findings

        assert ("missing", 4, 4) == (finding.status, finding.from_seq, finding.to_seq)

    def test_deleted_and_relinked_below_a_sweep(self):
        """
        Below what was swept the counts tell.
        """
        forged = Ledger()
        forged.emit("n1", *["short"] * 4)
        forged.nodes["shop", "n1"] = 5
        forged.emit("n1", "short", "long", "long")
        forged.sweep("n1", {("shop", "n1", "short"): 5})

        assert "6 numbers are missing, records account for 5" in messages(
            forged.verify()
        )


# --- edits of what stands beside the rows --------------------------------------------


class TestHeads:
    @pytest.mark.parametrize("class_", CLASSES)
    def test_a_missing_head(self, class_):
        """
        A chain without its head is not shorter: its head is missing.
        """
        report = tampered_with(lambda log: log.heads.pop(("shop", "n1", class_)))

        assert report.status == "missing"
        assert "its head row is gone" in messages(report)

    def test_a_chain_gone_with_its_head(self):
        """
        The numbers of a chain that vanished whole are missed.
        """
        log = BUSY.copy()
        log.heads.pop(("shop", "n1", "short"))
        log.rows = [r for r in log.rows if value(r, "retention_class") != "short"]

        assert log.verify(stored=None).status == "truncated"

    def test_all_of_a_node_gone_but_its_row(self):
        """
        The node row has counted what is gone.
        """
        log = BUSY.copy()
        log.heads, log.rows, log.stored = {}, [], []

        assert {"the last rows are gone: its node row has counted them"} == messages(
            log.verify()
        )

    @pytest.mark.parametrize(
        "name",
        [a.name for a in attrs.fields(chain.Head) if a.name != "checkpointed_at"],
    )
    @pytest.mark.parametrize("class_", CLASSES)
    def test_every_column(self, name, class_):
        """
        Raised, lowered, nulled, of another type, from another head: all are found.
        """
        key = ("shop", "n1", class_)
        old = getattr(BUSY.heads[key], name)
        others = [getattr(h, name) for h in BUSY.heads.values()]
        new = [None, "", "x", 0, 10**6, b"x", *others]
        new += [old + 1, old - 1, str(old)] if isinstance(old, int) else [old[:-1]]
        missed = []
        for one in new:
            log = BUSY.copy()
            log.heads[key] = attrs.evolve(log.heads[key], **{name: one})
            if one != old and log.verify(stored=None).ok:
                missed.append(one)

        assert [] == missed

    def test_head_and_tail_cut_together(self):
        """
        A tail cut with its head rolled back is told by the node row.
        """
        log = Ledger()
        log.emit("n1", *["long"] * 3)
        before = log.copy()
        log.emit("n1", "long")
        log.rows, log.heads = before.rows, before.heads
        (finding,) = log.verify().findings

        assert ("truncated", 4, 4) == (finding.status, finding.from_seq, finding.to_seq)

    def test_a_missing_node_row(self):
        """
        A node that has rows has a node row.
        """
        report = tampered_with(lambda log: log.nodes.clear())

        assert ("missing", {"its node row is gone"}) == (
            report.status,
            messages(report),
        )

    def test_a_node_row_set_back(self):
        """
        A number that would be given twice is told before it is.
        """
        report = tampered_with(lambda log: log.nodes.update({("shop", "n1"): 3}))

        assert {"the node row counts fewer rows than there are"} == messages(report)

    def test_pruned_through_without_a_record(self):
        """
        Rows deleted by hand, with the head brought in line, lack their record.
        """
        log = Ledger()
        rows = log.emit("n1", *["short"] * 4)
        chain.cut(
            log.heads["shop", "n1", "short"],
            [(value(r, "monotonic_seq"), value(r, "hash")) for r in rows[:2]],
        )
        del log.rows[:2]
        (finding,) = log.verify().findings

        assert ("missing", 1, 2) == (finding.status, finding.from_seq, finding.to_seq)
        assert finding.message == "rows were cut from the front, and no record says so"

    def test_pruned_further_than_the_record(self):
        """
        More rows than a sweep deleted cannot be passed off as its work.
        """
        log = BUSY.copy()
        key = ("shop", "n1", "short")
        more = log.of_chain(key)[:2]
        pairs = [(value(r, "monotonic_seq"), value(r, "hash")) for r in more]
        chain.cut(log.heads[key], pairs)
        log.rows = [row for row in log.rows if row not in more]

        assert "rows were cut from the front, and no record says so" in messages(
            log.verify()
        )

    def test_a_record_of_anybody_else_is_none(self):
        """
        RETENTION_SWEEP_RAN of domain `ops`, which anybody may emit, explains nothing.
        """
        log = Ledger()
        rows = log.emit("n1", *["short"] * 4)
        said = chain.cut(
            log.heads["shop", "n1", "short"],
            [(value(r, "monotonic_seq"), value(r, "hash")) for r in rows[:2]],
        )
        del log.rows[:2]
        detail = canonical_json({"cuts": [said]})
        row = log.pending(
            "long", code="RETENTION_SWEEP_RAN", domain="ops", detail=detail
        )
        log.append("n1", [row])

        assert log.verify().status == "missing"

    def test_a_record_with_other_marks(self):
        """
        Where record and head name another last hash, one of them is wrong.
        """
        log = Ledger()
        rows = log.emit("n1", *["short"] * 4)
        head = log.heads["shop", "n1", "short"]
        said = chain.cut(head, [(r[4], value(r, "hash")) for r in rows[:2]])
        del log.rows[:2]
        log.record(
            "n1", "RETENTION_SWEEP_RAN", {"cuts": [said | {"last_hash": "0" * 64}]}
        )

        assert {"the head's pruned-through is not what the record says"} == messages(
            log.verify()
        )

    @pytest.mark.parametrize(
        "detail",
        [{}, {"cuts": 1}, {"cuts": [1, {}]}, {"restored": [{}], "erased": [3]}],
    )
    def test_records_of_another_shape_do_no_harm(self, detail):
        """
        What fasten cannot have written is no evidence, and no error.
        """
        log = Ledger()
        for code in chain.RECORD_CODES:
            log.record(
                "n1", code, {**detail, "ids": [[1]], "fields": [{}], "count": "x"}
            )

        assert log.verify().ok


class TestErasure:
    def erased(self, record: dict[str, Any] | None, **more: Any) -> evidence.Report:
        log = Ledger()
        rows = log.emit("n1", "short", "long", "short")
        log.rows[1] = chain.erase(rows[1], ["actor", "detail"])
        if record is not None:
            detail = {"ids": [value(rows[1], "id")], **record}
            domain = more.get("domain", "fasten")
            row = log.pending(
                "long",
                code="AUDIT_ROW_ERASED",
                domain=domain,
                detail=canonical_json(detail),
            )
            log.append("n1", [row])
        return log.verify()

    def test_with_its_record(self):
        """
        A row that a record names, with its fields, is ok.
        """
        assert self.erased({"fields": ["detail", "actor"]}).ok

    def test_quiet(self):
        """
        An erasure that no record names is a finding, with row and fields.
        """
        (finding,) = self.erased(None).findings

        assert ("tampered", 2, "actor, detail erased, and no record says so") == (
            finding.status,
            finding.from_seq,
            finding.message,
        )

    @pytest.mark.parametrize(
        ("record", "domain"),
        [
            ({"fields": ["actor"]}, "fasten"),
            ({"fields": []}, "fasten"),
            ({}, "fasten"),
            ({"fields": ["actor", "detail"], "ids": ["evt-other"]}, "fasten"),
            ({"fields": ["actor", "detail"]}, "ops"),
        ],
    )
    def test_records_that_do_not_cover_it(self, record, domain):
        """
        A field, a row or a domain short: the erasure is as good as quiet.
        """
        assert self.erased(record, domain=domain).status == "tampered"

    def test_named_by_two_records(self):
        """
        One erasure after the other: each record names its fields.
        """
        log = Ledger()
        rows = log.emit("n1", "short")
        ids = [value(rows[0], "id")]
        log.erase("n1", ids, ("actor",))
        log.erase("n1", ids, ("detail", "target"))

        assert log.verify().ok

    def test_named_by_another_node(self):
        """
        Whichever node's chain the record stands in, it counts.
        """
        log = Ledger()
        rows = log.emit("n2", "short")
        log.emit("n1", "short")
        log.erase("n1", [value(rows[0], "id")], ("actor",))
        log.erase("n3", [value(rows[0], "id")], ("target",))

        assert log.verify().ok

    def test_named_before_it_was_stored(self):
        """
        A row that was still in a spool is stored erased, after the record.
        """
        log = Ledger()
        late = log.pending()
        log.record("n1", "AUDIT_ROW_ERASED", {"ids": [late.id], "fields": ["actor"]})
        (row,) = log.append("n1", [late])
        log.rows[-1] = chain.erase(row, ["actor"])

        assert log.verify().ok

    @pytest.mark.parametrize(
        ("old", "new"),
        [
            ('"leaves":{', '"leaves":{"reason":"' + "0" * 64 + '",'),
            ('{"keys"', '{ "keys"'),
            ('"actor":', '"actress":'),
            ('"leaves"', '"leafs"'),
        ],
    )
    def test_an_edited_salt(self, old, new):
        """
        What stands in the salt of an erased row is held against its commitment.
        """
        log = BUSY.copy()
        position = next(
            i for i, r in enumerate(log.rows) if str(value(r, "salt")).startswith("{")
        )
        salt = value(log.rows[position], "salt")
        assert old in salt
        report = with_row(log, position, salt=salt.replace(old, new)).verify()

        assert report.status == "tampered"

    def test_a_value_put_back_into_an_erased_row(self):
        """
        What was erased cannot be replaced by something else.
        """
        log = BUSY.copy()
        position = next(i for i, r in enumerate(log.rows) if value(r, "actor") is None)
        report = with_row(log, position, actor="somebody").verify()

        assert "an erasable field was filled in or emptied" in messages(report)

    def test_a_salt_that_only_looks_erased(self):
        """
        Keys without a single leaf hide nothing, and are no salt.
        """
        (row,) = Ledger().emit("n1", "short")
        salt = value(row, "salt")
        present = [f for f in chain.COMMITTED_FIELDS if value(row, f) is not None]
        keys = {f: k.hex() for f, k in chain.Salt.read(salt, present).keys.items()}
        log = Ledger()
        log.emit("n1", "short")
        forged = canonical_json({"keys": keys, "leaves": {}})

        assert {"the salt was edited"} == messages(
            with_row(log, 0, salt=forged).verify()
        )


class TestCheckpoints:
    def test_a_whole_table_sealed_anew(self):
        """
        Only a checkpoint can tell, and it does.
        """
        log = Ledger()
        log.emit("n1", *["long"] * 5)
        notes = log.checkpoint()
        log.emit("n1", "long")
        forged = resealed(
            log,
            lambda row: row._replace(actor="nobody") if row.target else row,
        )

        assert forged.verify(stored=None).ok
        assert forged.verify(stored=None, given=notes).status == "tampered"
        assert forged.verify().status == "tampered"

    def test_a_tail_cut_with_heads_and_nodes(self):
        """
        A table rolled back whole is shorter than its checkpoint.
        """
        log = Ledger()
        log.emit("n1", "long", "short")
        backup = log.copy()
        log.emit("n1", "long", "long")
        notes = log.checkpoint()
        (finding,) = backup.verify(given=notes).findings

        assert backup.verify().ok
        assert ("truncated", 2, 4) == (finding.status, finding.from_seq, finding.to_seq)

    def test_a_chain_gone_altogether(self):
        """
        A chain that only a checkpoint remembers is missing.
        """
        log = Ledger()
        log.emit("n1", "long")
        notes = log.checkpoint()
        (finding,) = Ledger().verify(given=notes).findings

        assert ("missing", "long") == (finding.status, finding.retention_class)

    def test_an_old_one_replayed(self):
        """
        An old checkpoint holds what it held; the rest is told to be unanchored.
        """
        log = Ledger()
        log.emit("n1", *["long"] * 5)
        notes = log.checkpoint()
        log.emit("n1", *["long"] * 3)
        report = log.verify(given=notes)
        (found,) = report.chains

        assert (True, 5, 3) == (report.ok, found.anchored_seq, found.unanchored)
        assert report.verdict == "ok, anchored, rows after the last checkpoint: 3"

    def test_the_newest_one_replaced_by_an_old_one(self):
        """
        The head knows when the newest checkpoint was stored.
        """
        log = Ledger()
        log.emit("n1", "long")
        log.checkpoint("2026-01-01T00:00:00.000000Z")
        log.emit("n1", "long")
        log.checkpoint("2026-01-02T00:00:00.000000Z")
        log.stored.pop()

        assert ("missing", {"its newest checkpoint is gone from the store"}) == (
            log.verify().status,
            messages(log.verify()),
        )

    def test_all_of_them_deleted(self):
        """
        An emptied checkpoint table is a finding.
        """
        report = tampered_with(lambda log: log.stored.clear())

        assert report.status == "missing"

    @pytest.mark.parametrize(
        ("old", "new"),
        [("\n1\n", "\n2\n"), ("monotonic_seq 1", "monotonic_seq 2"), ("=", "A=")],
    )
    def test_an_edited_one(self, old, new):
        """
        A note is signed, or it cannot be read.
        """
        log = Ledger()
        log.emit("n1", "long")
        (note,) = log.checkpoint()
        report = log.verify(stored=None, given=[note.replace(old, new, 1)])

        assert report.status == "tampered"

    def test_one_of_another_chain(self):
        """
        The origin is signed: a note cannot be passed off as another chain's.
        """
        log = Ledger()
        log.emit("n1", "long", "short")
        notes = log.checkpoint()
        other = [note.replace("/long\n", "/short\n", 1) for note in notes]

        assert log.verify(stored=None, given=other).status == "tampered"

    def test_a_foreign_key(self):
        """
        A log sealed anew and signed with another key cannot be verified.
        """
        log = Ledger()
        log.emit("n1", *["long"] * 3)
        forged = resealed(log, lambda row: row._replace(actor="nobody"))
        forged.signer = chain.ed25519_signer("shop", FORGED_KEY)
        forged.checkpoint()
        report = forged.verify()

        assert ("unverifiable", 3) == (report.status, report.exit_code)
        assert {"its checkpoints were signed by none of the given keys"} == messages(
            report
        )

    def test_no_key(self):
        """
        Checkpoints without a key to check them are no evidence.
        """
        report = BUSY.verify(verifiers=())

        assert ("unverifiable", 3) == (report.status, report.exit_code)
        assert {"it has checkpoints, and no key to check them was given"} == messages(
            report
        )

    def test_a_rotated_key(self):
        """
        Older notes of a key that is not given any more are no finding.
        """
        log = Ledger()
        log.emit("n1", "long")
        log.checkpoint()
        log.emit("n1", "long")
        log.signer = chain.ed25519_signer("shop", FORGED_KEY)
        log.checkpoint()
        new = [chain.ed25519_verifier(log.signer.vkey)]

        assert log.verify(verifiers=new).ok
        assert log.verify(verifiers=[*log.verifiers, *new]).ok

    def test_a_forged_newer_one(self):
        """
        A good old note does not vouch for a newer one of a foreign key.
        """
        log = Ledger()
        log.emit("n1", "long")
        log.checkpoint()
        log.emit("n1", "long")
        log.signer = chain.ed25519_signer("shop", FORGED_KEY)
        log.checkpoint()

        assert log.verify().status == "unverifiable"

    def test_required_and_not_there(self):
        """
        With require_anchor a log without checkpoints cannot be verified.
        """
        log = Ledger()
        log.emit("n1", "long")
        report = log.verify(require_anchor=True)

        assert (True, "unverifiable", 3) == (
            log.verify().ok,
            report.status,
            report.exit_code,
        )

    def test_the_store_must_not_contradict_itself(self):
        """
        A stored note of an unknown key proves nothing, but it must fit the rows.
        """
        log = Ledger()
        log.emit("n1", *["long"] * 3)
        log.checkpoint()
        forged = resealed(log, lambda row: row._replace(actor="nobody"))

        assert forged.verify(verifiers=()).status == "tampered"
        assert log.verify(verifiers=()).status == "unverifiable"

    def test_two_histories_of_one_size(self):
        """
        A signer that vouches for two histories is found out.
        """
        log = Ledger()
        log.emit("n1", *["long"] * 3)
        other = resealed(log, lambda row: row._replace(actor="nobody"))
        notes = log.checkpoint() + other.checkpoint()

        assert log.verify(given=notes).status == "tampered"

    def test_across_a_sweep(self):
        """
        Checkpoints of rows that were swept are passed over, later ones hold.
        """
        log = Ledger()
        log.emit("n1", *["short"] * 3)
        notes = log.checkpoint()
        log.emit("n1", *["short"] * 3)
        notes += log.checkpoint()
        log.sweep("n1", {("shop", "n1", "short"): 4})
        report = log.verify(given=notes)
        found = {c.retention_class: c.anchored_count for c in report.chains}

        assert (True, 6) == (report.ok, found["short"])

    def test_at_the_very_cut(self):
        """
        The checkpoint that was made before a sweep of everything still holds.
        """
        log = Ledger()
        log.emit("n1", *["short"] * 3)
        notes = log.checkpoint()
        log.sweep("n1", {("shop", "n1", "short"): 3})
        report = log.verify(given=notes)
        found = {c.retention_class: c.anchored_count for c in report.chains}

        assert (True, 3) == (report.ok, found["short"])

    def test_an_edited_frontier_in_head_and_cut(self):
        """
        What was swept stays under the root of every later checkpoint.
        """
        log = Ledger()
        log.emit("n1", *["short"] * 4)
        forged = resealed(log, lambda row: row._replace(actor="nobody"))
        cut = {("shop", "n1", "short"): 2}
        log.sweep("n1", cut)
        forged.sweep("n1", cut)
        notes = log.checkpoint()

        assert forged.verify(given=notes).status == "tampered"


class TestRestored:
    def lost(self) -> tuple[Ledger, list[str]]:
        log = Ledger()
        log.emit("n1", *["long"] * 3)
        backup = log.copy()
        log.emit("n1", *["long"] * 2)
        notes = log.checkpoint()
        log.emit("n1", "long")
        notes += log.checkpoint()
        log.restore(backup, "n1")
        return log, notes

    def test_on_record(self):
        """
        Numbers and checkpoints of a lost stretch are explained by its record.
        """
        log, notes = self.lost()
        report = log.verify(given=notes)

        assert report.verdict == (
            "ok, restored: 4-6 on record, "
            "unanchored: shows accidents, not an attacker with write access"
        )
        assert [(4, 6)] == [(r.from_seq, r.to_seq) for r in report.restored]

    def test_after_the_chain_has_grown_past_it(self):
        """
        A lost checkpoint of a size that the chain has again is still the old one.
        """
        log, notes = self.lost()
        log.emit("n1", *["long"] * 9)
        log.checkpoint()

        assert log.verify(given=notes).verdict == (
            "ok, restored: 4-6 on record, anchored, rows after the last checkpoint: 0"
        )

    def test_not_on_record(self):
        """
        Without the record the stretch is cut off.
        """
        log = Ledger()
        log.emit("n1", *["long"] * 3)
        backup = log.copy()
        log.emit("n1", "long")
        notes = log.checkpoint()

        assert backup.verify(given=notes).status == "truncated"

    def test_another_history_than_the_record_names(self):
        """
        A checkpoint of that size with another root is not excused.
        """
        log, notes = self.lost()
        forged = chain.Note.parse(notes[-1]).checkpoint
        other = attrs.evolve(forged, root=bytes(32)).sign([log.signer])

        assert log.verify(given=[other]).status == "tampered"

    def test_a_row_deleted_outside_the_stretch(self):
        """
        The record explains its own numbers only.
        """
        log, _ = self.lost()
        del log.rows[1]

        assert log.verify().status == "missing"


class TestForms:
    def test_a_newer_form(self):
        """
        Rows of a newer fasten cannot be verified by this one.
        """
        log = Ledger()
        log.emit("n1", "long", "long")
        row = edited(log.rows[1], canonical_form_id="4", hash="0" * 64)
        log.rows[1] = row
        head = log.heads["shop", "n1", "long"]
        frontier = chain.Frontier()
        for digest in (value(log.rows[0], "hash"), "0" * 64):
            frontier.push(bytes.fromhex(digest))
        head.hash, head.frontier = "0" * 64, str(frontier)
        report = log.verify()

        assert ("unverifiable", 3) == (report.status, report.exit_code)
        assert {"a newer fasten sealed these rows; verify with that"} == messages(
            report
        )

    def test_a_form_raised_to_get_a_row_out_of_sight(self):
        """
        A row whose hash is that of form 3 is of form 3.
        """
        report = with_row(BUSY, 12, canonical_form_id="4", actor="nobody").verify()

        assert ("tampered", {"canonical_form_id was edited"}) == (
            report.status,
            messages(report),
        )

    @pytest.mark.parametrize("form", [None, "", "0", "1", "2", "03", "3.0", "x", " 4"])
    def test_any_other_form(self, form):
        """
        Unknown forms, and those of other SDKs, have no place in our table.
        """
        report = with_row(BUSY, 12, canonical_form_id=form).verify()

        assert "tampered" == report.status
        assert {"canonical_form_id is not a form of this table"} == messages(report)


# --- files ---------------------------------------------------------------------------


def in_file(rows: list[dict[str, Any]], **options: Any) -> evidence.Report:
    """
    Verify wire rows as a file.
    """
    return evidence.verify_ndjson(map(json.dumps, rows), **options)


class TestFiles:
    def test_an_export(self):
        """
        What was exported verifies, with its checkpoints, in any order.
        """
        lines = BUSY.lines()
        notes = [note for note, _ in BUSY.stored]
        report = evidence.verify_ndjson(
            [*lines[30:], "\n", *lines[:30]],
            given=notes,
            verifiers=BUSY.verifiers,
            require_anchor=True,
        )

        assert ((), 60) == (report.findings, report.rows)
        assert BUSY.verify().chains == report.chains

    @pytest.mark.parametrize("position", range(0, 60, 2))
    def test_a_deleted_line(self, position):
        """
        A line that is gone is missed; at the very end the checkpoint tells.
        """
        lines = [wire_line(row) for row in BUSY.in_order()]
        notes = [note for note, _ in BUSY.stored]
        del lines[position]
        report = evidence.verify_ndjson(lines, given=notes, verifiers=BUSY.verifiers)

        assert report.exit_code == 1

    @pytest.mark.parametrize("name", AUDIT_COLUMNS)
    def test_every_key(self, name):
        """
        Changed or removed, each key counts but the advisory ones.
        """
        rows = [json.loads(line) for line in BUSY.lines()]
        rows[20][name] = "other"
        changed = in_file(rows).ok
        del rows[20][name]

        assert (name in ADVISORY, name in ADVISORY) == (changed, in_file(rows).ok)

    def test_a_key_that_no_form_has(self):
        """
        What is not sealed must not stand among what is.
        """
        rows = [json.loads(line) for line in BUSY.lines()]
        rows[20]["approved_by"] = "alice"

        assert {"a key was added or removed"} == messages(in_file(rows))

    def test_a_file_that_begins_late(self):
        """
        Rows before the first must be named by a record.
        """
        log = Ledger()
        log.emit("n1", *["long"] * 4)
        report = evidence.verify_ndjson(log.lines()[2:])
        (finding,) = report.findings

        assert ("missing", 1, 2) == (finding.status, finding.from_seq, finding.to_seq)

    def test_a_checkpoint_of_rows_that_are_not_in_the_file(self):
        """
        A file may hold one node of many: it cannot say what became of others.
        """
        log = Ledger()
        log.emit("n1", "long")
        log.emit("n2", "long")
        notes = log.checkpoint()
        report = evidence.verify_ndjson(
            log.lines()[:1], given=notes, verifiers=log.verifiers
        )

        assert (
            "unverifiable",
            {"a checkpoint is of rows that are not in the file"},
        ) == (
            report.status,
            messages(report),
        )

    def test_a_cut_tail_is_told_by_a_checkpoint(self):
        """
        Without heads only a checkpoint knows of the last rows.
        """
        log = Ledger()
        log.emit("n1", *["long"] * 3)
        notes = log.checkpoint()
        lines = log.lines()[:-1]

        assert evidence.verify_ndjson(lines).ok
        assert (
            evidence.verify_ndjson(lines, given=notes, verifiers=log.verifiers).status
            == "truncated"
        )

    def test_lines_printed_by_a_service(self):
        """
        Stdout has no salts: links and headers can be checked, fields cannot.
        """
        log = Ledger()
        log.emit("n1", "long", "long")
        rows = [json.loads(line) for line in log.lines()]
        printed = [{"shape": "audit", **row, "salt": None} for row in rows]
        report = in_file([*printed, {"shape": "sys", "event": "x"}])
        edited_rows = [printed[0], {**printed[1], "code": "OTHER"}]

        assert ("unverifiable", 2) == (report.status, report.rows)
        assert in_file(edited_rows).status == "tampered"

    @pytest.mark.parametrize(
        "line", ["{", "[]", "1", "\ud800", '{"a":1,"a":2}', "[" * 9999]
    )
    def test_lines_that_are_no_rows(self, line):
        """
        A line that cannot be read is a finding with its number.
        """
        report = evidence.verify_ndjson([*BUSY.lines(), line])
        (finding,) = report.findings

        assert ("tampered", 61) == (finding.status, finding.from_seq)

    @pytest.mark.parametrize(
        "detail", [{"a": 1.0}, {"b": 1, "a": 2.5}, {"a": 1e20}, {"😀": 1, "\ufb33": 2}]
    )
    def test_details_survive_other_json_writers(self, detail):
        """
        However a JSON library spells numbers and sorts keys, the value is the same.
        """
        log = Ledger()
        log.append("n1", [log.pending(detail=canonical_json(detail))])
        row = json.loads(log.lines()[0])
        row["detail"] = detail

        assert in_file([row]).ok

    def test_an_unknown_form(self):
        """
        A row of a form that nobody published is rejected, never skipped.
        """
        rows = [json.loads(line) for line in log_of(3).lines()]
        rows[1]["canonical_form_id"] = "x"

        assert in_file(rows).status == "tampered"

    def test_nothing(self):
        """
        An empty file is ok.
        """
        assert evidence.verify_ndjson([]).ok


def log_of(count: int) -> Ledger:
    """
    Return a log of *count* rows in one chain.
    """
    log = Ledger()
    log.emit("n1", *["long"] * count)
    return log


VECTORS: Final = json.loads(
    (ROOT / "tests" / "conformance" / "chain-forms-1.json").read_text(encoding="utf-8")
)


def old_rows(count: int, form: str | None = "1", **extra: Any) -> list[dict[str, Any]]:
    """
    Seal rows as the SDKs of other languages do, by the text of chain-forms.md.
    """
    rows: list[dict[str, Any]] = []
    for seq in range(1, count + 1):
        row = dict(VECTORS[0]["wire_row"], monotonic_seq=seq, id=f"evt-{seq}", **extra)
        row["prev_hash"] = rows[-1]["hash"] if rows else "genesis"
        row["canonical_form_id"] = form
        if form is None:
            del row["canonical_form_id"]
        rows.append(old_sealed(row))
    return rows


def old_sealed(row: dict[str, Any], *, on_wire: bool = False) -> dict[str, Any]:
    """
    Add the hash of form "1" or "2" to a row.
    """

    def dumps(what: Any) -> bytes:
        return json.dumps(what, sort_keys=True, separators=(",", ":")).encode()

    hashed = dict(row)
    if row.get("canonical_form_id") == "2":
        salted = row["detail_salt"].encode() + dumps(row["detail"])
        row["detail_commitment"] = sha256(salted).hexdigest()
        hashed = {k: v for k, v in row.items() if k not in ("detail", "detail_salt")}
    elif not on_wire:
        hashed["timestamp"] = row["timestamp"].replace("Z", "+00:00")
    row["hash"] = sha256(dumps(hashed)).hexdigest()
    return row


class TestOldForms:
    @pytest.mark.parametrize("vector", VECTORS, ids=lambda v: v["name"])
    def test_published_vectors(self, vector):
        """
        Both published rows verify, and hash to the published bytes.
        """
        row = vector["wire_row"] | {"hash": vector["hash"]}
        report = in_file([row])

        assert (
            sha256(vector["hashed_bytes_utf8"].encode()).hexdigest() == vector["hash"]
        )
        assert ("ok", 1) == (report.status, report.rows)

    @pytest.mark.parametrize("vector", VECTORS, ids=lambda v: v["name"])
    @pytest.mark.parametrize("how", ["change", "delete"])
    def test_every_key_of_the_vectors(self, vector, how):
        """
        Each key of a published row counts.
        """
        missed = []
        for key in vector["wire_row"]:
            row = vector["wire_row"] | {"hash": vector["hash"]}
            row[key] = "other"
            if how == "delete":
                del row[key]
            if in_file([row]).ok:
                missed.append(key)

        assert [] == missed

    def test_a_whole_number_stays_a_float(self):
        """
        75 is not 75.0 in forms "1" and "2".
        """
        row = VECTORS[1]["wire_row"] | {"hash": VECTORS[1]["hash"]}
        row["detail"] = row["detail"] | {"setpoint": 75}

        assert not in_file([row]).ok

    def test_times_as_on_the_wire_get_a_second_chance(self):
        """
        An early SDK sealed form "1" with the times as printed.
        """
        row = dict(VECTORS[0]["wire_row"])

        assert in_file([old_sealed(row, on_wire=True)]).ok

    def test_form_two_gets_no_second_chance(self):
        """
        Form "2" hashes times as on the wire and in no other way.
        """
        row = dict(old_rows(1, "2", detail_salt="ab")[0])
        hashed = {
            k: v for k, v in row.items() if k not in ("detail", "detail_salt", "hash")
        }
        hashed["timestamp"] = row["timestamp"].replace("Z", "+00:00")
        text = json.dumps(hashed, sort_keys=True, separators=(",", ":"))
        row["hash"] = sha256(text.encode()).hexdigest()

        assert in_file([row]).status == "tampered"

    def test_a_row_without_a_form(self):
        """
        It is form "1", and its hash omits that key; filling it in breaks it.
        """
        rows = old_rows(3, None)
        filled = [row | {"canonical_form_id": "1"} for row in rows]

        assert in_file(rows).ok
        assert in_file([row | {"canonical_form_id": None} for row in rows]).ok
        assert in_file(filled).status == "tampered"

    @pytest.mark.parametrize("form", ["1", "2", None])
    def test_chains(self, form):
        """
        A chain verifies in any order of lines, and misses what is gone.
        """
        rows = old_rows(6, form, detail_salt="ab") if form == "2" else old_rows(6, form)
        without = {n: in_file(rows[:n] + rows[n + 1 :]).status for n in range(5)}

        assert in_file(rows[::-1]).ok
        assert dict.fromkeys(range(5), "missing") == without
        assert in_file([*rows, rows[2]]).status == "tampered"

    def test_relinked(self):
        """
        A row that does not name the one before it is found.
        """
        rows = old_rows(3)
        rows[1] = old_sealed(
            {k: v for k, v in rows[1].items() if k != "hash"} | {"prev_hash": "x"}
        )

        assert "the row is not linked to the one before it" in messages(in_file(rows))

    def test_form_two_detail(self):
        """
        The detail of form "2" is held against its commitment.
        """
        (row,) = old_rows(1, "2", detail_salt="ab")

        assert in_file([row]).ok
        assert not in_file([row | {"detail": {"qty": 4}}]).ok
        assert not in_file([row | {"detail_salt": "cd"}]).ok
        assert not in_file([row | {"detail_salt": "\ud800"}]).ok
        assert not in_file([row | {"detail_commitment": None}]).ok

    def test_form_two_erased(self):
        """
        Detail and salt both null are an erasure; one of them is an edit.
        """
        (row,) = old_rows(1, "2", detail_salt="ab")

        assert in_file([row | {"detail": None, "detail_salt": None}]).ok
        assert not in_file([row | {"detail": None}]).ok
        assert not in_file([row | {"detail_salt": None}]).ok

    def test_beside_ours(self):
        """
        One file may hold rows of several SDKs: each chain is checked for itself.
        """
        ours = [json.loads(line) for line in log_of(2).lines()]
        report = in_file([*ours, *old_rows(2)])
        found = [(c.service_id, c.retention_class, c.rows) for c in report.chains]

        assert [("shop", "long", 2), ("gateway", None, 2)] == found
        assert report.ok

    @pytest.mark.parametrize(
        "change", [{"monotonic_seq": "1"}, {"hash": []}, {"hash": None}]
    )
    def test_odd_values(self, change):
        """
        Whatever type an edited key has, it is a finding and no error.
        """
        assert in_file([old_rows(1)[0] | change]).status == "tampered"


class TestReport:
    def test_the_gravest_wins(self):
        """
        A log that was tampered with is not called missing or unverifiable.
        """
        log = with_row(BUSY, 30, actor="nobody")
        log.heads.pop(("shop", "n1", "short"))

        assert log.verify(verifiers=()).status == "tampered"
        assert {"missing", "tampered", "unverifiable"} >= {
            c.status for c in log.verify(verifiers=()).chains
        }

    def test_findings_of_a_kind_are_one(self):
        """
        A thousand edited rows are one finding with a range and a count.
        """
        log = BUSY.copy()
        log.rows = [edited(row, outcome="denied") for row in log.rows]
        report = log.verify(stored=None)
        found = [f for f in report.findings if f.retention_class == "long"]

        assert 1 == len(found)
        assert found[0].rows == len(log.of_chain(("shop", "n1", "long")))
        assert found[0].from_seq is not None
        assert found[0].to_seq is not None
        assert found[0].from_seq < found[0].to_seq
        assert "times" in str(found[0])

    def test_chains_tell_their_tail(self):
        """
        What no checkpoint holds is said for each chain.
        """
        log = Ledger()
        log.emit("n1", "long", "short")
        notes = log.checkpoint()
        log.emit("n1", "short")
        log.emit("n2", "long")
        found = [str(c) for c in log.verify(given=notes).chains]

        assert [
            "shop/n1/long: ok, anchored up to 1",
            "shop/n1/short: ok, anchored up to 2, rows after the last checkpoint: 1",
            "shop/n2/long: ok, unanchored, rows after the last checkpoint: 1",
        ] == found

    def test_places_of_findings(self):
        """
        A finding names chain, node or the log as a whole.
        """
        found = [
            str(evidence.Finding(status="missing", message="m")),
            str(
                evidence.Finding(
                    status="missing",
                    message="m",
                    service_id="s",
                    source_node_id="n",
                    from_seq=1,
                    to_seq=3,
                )
            ),
        ]

        assert ["missing: log: m", "missing: s/n from 1 to 3: m"] == found


def test_pending_of_a_row_seals_to_the_same_row():
    """
    The forger of these tests really makes what fasten would have made.
    """
    log = log_of(3)
    forged = resealed(log, lambda row: row)
    names = [n for n in chain.HEADER_KEYS if n not in ("commitment", "prev_hash")]

    assert [[row[INDEX[n]] for n in names] for row in log.rows] == [
        [row[INDEX[n]] for n in names] for row in forged.rows
    ]
    assert all(isinstance(pending_of(row), Pending) for row in log.rows)
