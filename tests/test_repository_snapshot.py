# SPDX-License-Identifier: Apache-2.0
"""
A store in one snapshot, and what verification finds in it once somebody was at it.
"""

from __future__ import annotations

import sqlite3
import tracemalloc
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest

from fasten.errors import AuditStoreError
from fasten.repository import SchemaProblem
from fasten.repository.snapshot import snapshot
from fasten.rows import AUDIT_COLUMNS
from tests.stores import Kept, ways_to_edit

MIXED = ("medium", "long", "short", "medium", "medium")
ADVISORY = {"stored_at", "shipped_at"}


@pytest.fixture
def kept(store_dsn: str) -> Iterator[Kept]:
    """
    Give a store with a few rows of two nodes.
    """
    made = Kept(store_dsn)
    made.emit("n1", *MIXED)
    made.emit("n2", *MIXED)
    made.emit("n1", *MIXED)
    yield made
    made.close()


class TestSnapshot:
    def test_rows_come_as_they_were_sealed(self, kept):
        """
        Columns, times included, are spelled as the seal covered them.
        """
        stored = kept.emit("n3", "long")
        with snapshot(kept.dsn) as moment:
            found = [row for row in moment.rows() if row[13] == "n3"]

        assert stored == found

    def test_rows_are_in_the_order_of_their_numbers(self, kept):
        """
        Service, then node, then number: what the verifier is fed.
        """
        seq = AUDIT_COLUMNS.index("monotonic_seq")
        with snapshot(kept.dsn) as moment:
            places = [(row[12], row[13], row[seq]) for row in moment.rows()]

        assert sorted(places) == places
        assert 15 == len(places)

    def test_later_rows_are_not_in_it(self, kept):
        """
        Heads, nodes and rows are of one moment, whatever is written meanwhile.
        """
        with snapshot(kept.dsn) as moment:
            heads = {head.key: head.count for head in moment.heads()}
            kept.emit("n1", *MIXED)
            rows = list(moment.rows())
            after = {head.key: head.count for head in moment.heads()}

        assert heads == after
        assert 15 == len(rows)

    def test_a_store_that_is_not_there_says_so(self, sqlite_dsn):
        """
        Verifying makes no file.
        """
        with pytest.raises(AuditStoreError, match="no store at"):
            Kept(sqlite_dsn).verify()

    def test_memory_does_not_grow_with_the_table(self, store_dsn):
        """
        Four times the rows cost the same memory.
        """
        kept = Kept(store_dsn)
        peaks = []
        for batches in (2, 6):
            for _ in range(batches):
                kept.append("n1", [kept.maker.pending() for _ in range(1000)])
            tracemalloc.start()
            assert kept.verify().ok
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
        kept.close()

        assert peaks[1] < peaks[0] * 1.5


class TestVerify:
    def test_untouched_store_is_ok(self, kept):
        """
        Nothing is found where nothing was done.
        """
        report = kept.verify()

        assert "ok" == report.status
        assert 15 == report.rows

    @pytest.mark.parametrize("column", [c for c in AUDIT_COLUMNS if c not in ADVISORY])
    def test_each_edited_column_is_found(self, kept, column):
        """
        A byte flipped, cut off or added, another number, null: each is named.
        """
        before = kept.dump("audit")
        id_, value = kept.columns("id", column, where="monotonic_seq = 3")[0]
        missed = []
        for edit in _edits(value):
            try:
                kept.sql(f"UPDATE audit_log SET {column} = ? WHERE id = ?", edit, id_)
            except (sqlite3.Error, psycopg.Error):
                continue  # the store itself refuses it
            if kept.verify().ok:
                missed.append(edit)
            kept.load(before)

        assert [] == missed
        assert kept.verify().ok

    @pytest.mark.parametrize("table", ["head", "node"])
    def test_each_edited_number_beside_the_rows_is_found(self, kept, table):
        """
        Heads and node rows are held against the rows, column by column.
        """
        kept.repository.database.release()
        names = getattr(kept.repository.tables, table).c.keys()
        missed = []
        before = kept.dump(table)
        for column in names:
            if column in ("checkpointed_at", "ahead_ms", "updated_at"):
                continue
            value = before[table][0][names.index(column)]
            for edit in ways_to_edit(value):
                kept.sql(
                    f"UPDATE audit_log_{table} SET {column} = ? WHERE {column} = ?",
                    edit,
                    value,
                )
                if kept.verify().ok:
                    missed.append((column, edit))
                kept.load(before)

        assert [] == missed

    @pytest.mark.parametrize("table", ["head", "node", "checkpoint"])
    def test_a_dropped_table_is_no_way_out(self, kept, table):
        """
        Without heads or node rows nothing is ok; without checkpoints it is unanchored.
        """
        kept.close()
        kept.sql(f"DROP TABLE audit_log_{table}")
        report = kept.verify()

        assert (table == "checkpoint") == report.ok

    def test_an_emptied_log_is_truncated(self, kept):
        """
        The heads have seen the rows.
        """
        kept.sql("DELETE FROM audit_log")

        assert "truncated" == kept.verify().status

    def test_swapped_rows_are_found(self, kept):
        """
        Numbers cannot be exchanged.
        """
        kept.sql(
            "UPDATE audit_log SET monotonic_seq = 100 - monotonic_seq "
            "WHERE monotonic_seq IN (4, 5)"
        )

        assert "tampered" == kept.verify().status

    @pytest.mark.parametrize("seq", [1, 4, 10])
    def test_a_deleted_row_is_named(self, kept, seq):
        """
        The first, one in the middle, the last.
        """
        kept.sql(
            "DELETE FROM audit_log WHERE source_node_id = 'n1' AND monotonic_seq = ?",
            seq,
        )
        report = kept.verify()

        assert report.status in ("missing", "truncated")
        assert any(
            finding.source_node_id == "n1" and (finding.from_seq or 0) <= seq
            for finding in report.findings
        )

    def test_an_edited_head_stops_the_writer(self, kept):
        """
        It is no row's fault: rows are kept, and the message names the cure.
        """
        kept.sql("UPDATE audit_log_head SET frontier = 'aa'")
        with pytest.raises(SchemaProblem, match="was edited; run `fasten verify`"):
            kept.emit("n1", "medium")

        assert "tampered" == kept.verify().status


class TestSqlite:
    def test_bytes_that_are_no_text_are_found(self, sqlite_dsn):
        """
        A flipped byte may leave no UTF-8: that is a finding, not a crash.
        """
        kept = Kept(sqlite_dsn)
        kept.emit("n1", *MIXED)
        kept.sql("UPDATE audit_log SET actor = CAST(x'ff61' AS TEXT)")
        report = kept.verify()
        kept.close()

        assert "tampered" == report.status
        assert 5 == report.rows

    @pytest.mark.parametrize("value", [b"\xff", 1.5, "abc", 2**62])
    def test_values_of_another_type_are_found(self, sqlite_dsn, value):
        """
        SQLite takes anything anywhere.
        """
        kept = Kept(sqlite_dsn)
        kept.emit("n1", *MIXED)
        for column in ("monotonic_seq", "detail", "id", "canonical_form_id"):
            before = kept.dump("audit")
            kept.sql(
                f"UPDATE audit_log SET {column} = ? WHERE monotonic_seq = 2", value
            )

            assert "tampered" == kept.verify().status
            kept.load(before)
        kept.close()


class TestPostgres:
    @pytest.mark.parametrize("at", ["infinity", "-infinity", "2026 BC", "0001-01-01"])
    def test_times_that_python_has_none_for_are_found(self, postgres_dsn, at):
        """
        The year 2026 before Christ reads like ours, and is not.
        """
        kept = Kept(postgres_dsn)
        kept.emit("n1", *MIXED)
        moment = "timestamp - interval '4051 years'" if at == "2026 BC" else f"'{at}'"
        kept.sql(f"UPDATE audit_log SET timestamp = {moment} WHERE monotonic_seq = 2")
        report = kept.verify()
        kept.close()

        assert "tampered" == report.status


def _edits(value: Any) -> list[Any]:
    if value is None:
        return ["x"]
    if isinstance(value, datetime):
        return [value + timedelta(microseconds=1), datetime(2000, 1, 1, tzinfo=UTC)]
    return [*ways_to_edit(value), None]
