# SPDX-License-Identifier: Apache-2.0
"""
Erasing in real stores: what is gone, what still verifies, and what was on its way.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psycopg
import pytest

from fasten.chain import COMMITTED_FIELDS
from fasten.repository.erasing import Erased
from fasten.repository.erasures import Erasure, Erasures, digest_of
from fasten.rows import AUDIT_COLUMNS
from tests.outside import wait_until
from tests.stores import Kept

CANARY = "canary-4711-ümläut"


@pytest.fixture
def kept(store_dsn: str) -> Iterator[Kept]:
    """
    Give a store with rows of one subject among others.
    """
    made = Kept(store_dsn)
    for _ in range(3):
        made.emit("n1", "short", "medium", "long")
        made.emit("n2", "medium", actor=CANARY)
        made.emit("n1", "long", target=CANARY)
    yield made
    made.close()


def named(kept: Kept) -> list[str]:
    """
    Return the ids that records of erasure name.
    """
    return [
        id_
        for detail in kept.details("AUDIT_ROW_ERASED")
        for id_ in json.loads(detail)["ids"]
    ]


class TestErase:
    def test_the_field_asked_for_and_the_detail_go(self, kept):
        """
        Nothing else does, of no other row.
        """
        ids = kept.columns("id", where=f"actor = '{CANARY}'")
        done = kept.erase("actor", CANARY)
        rows = kept.columns("id", "actor", "detail", "target", where="domain <> 'x'")

        assert (3, {"medium": 3}) == (done.rows, done.by_class)
        assert sorted(ids) == sorted(r[0] for r in rows if r[1] is None)
        assert sorted(ids) == sorted(r[0] for r in rows if r[2] is None)
        assert None not in [row[3] for row in rows]

    def test_the_chain_stays_valid(self, kept):
        """
        A record names the rows, and verification asks for it.
        """
        kept.erase("actor", CANARY)
        assert kept.verify().ok
        kept.sql("DELETE FROM audit_log WHERE code = 'AUDIT_ROW_ERASED'")

        assert any("erased" in str(f) for f in kept.verify().findings)

    def test_it_can_be_done_again(self, kept):
        """
        A second run finds nothing, and writes nothing.
        """
        kept.erase("actor", CANARY)
        before = kept.dump()
        done = kept.erase("actor", CANARY)

        assert 0 == done.rows
        assert before == kept.dump()

    def test_more_fields_of_the_same_rows_can_go_later(self, kept):
        """
        What was kept of a row is erased from what is left of its salt.
        """
        id_ = kept.columns("id", where=f"target = '{CANARY}'")[0]
        kept.erase("id", id_, "detail")
        kept.erase("id", id_, "actor", "target")
        kept.erase("id", id_, *COMMITTED_FIELDS)
        row = kept.columns(*COMMITTED_FIELDS, where=f"id = '{id_}'")[0]

        assert {None} == set(row)
        assert kept.verify().ok

    def test_records_keep_their_detail(self, kept):
        """
        It is the evidence that explains what is gone.
        """
        kept.erase("actor", CANARY)
        kept.erase("actor", "fasten")

        assert len(kept.details("AUDIT_ROW_ERASED")) == 2
        assert None not in kept.details("AUDIT_ROW_ERASED")
        assert kept.verify().ok

    def test_many_rows_go_in_steps(self, kept):
        """
        A record names 1,000 rows at the most.
        """
        kept.append("n3", [kept.maker.pending(actor=CANARY) for _ in range(2100)])
        done = kept.erase("actor", CANARY)
        sizes = [len(json.loads(d)["ids"]) for d in kept.details("AUDIT_ROW_ERASED")]

        assert 2103 == done.rows
        assert [103, 1000, 1000] == sorted(sizes)
        assert kept.verify().ok

    def test_held_rows_are_left_and_named(self, kept):
        """
        A legal hold outweighs a wish to be forgotten.
        """
        held = kept.columns("id", "target", where=f"actor = '{CANARY}'")[0]
        kept.hold("target", held[1])
        done = kept.erase("actor", CANARY)

        assert (2, [held[0]]) == (done.rows, done.held)
        assert 1 == len(kept.columns("id", where=f"actor = '{CANARY}'"))

    def test_a_row_with_a_damaged_salt_is_left_and_named(self, kept):
        """
        Its seal could not stay valid.
        """
        id_ = kept.columns("id", where=f"actor = '{CANARY}'")[0]
        kept.sql("UPDATE audit_log SET salt = 'x' WHERE id = ?", id_)
        done = kept.erase("actor", CANARY)

        assert (2, [id_]) == (done.rows, done.damaged)

    def test_no_trace_of_the_value_is_left_in_the_file(self, sqlite_dsn):
        """
        Not in the database's pages, not in its write-ahead log.
        """
        kept = Kept(sqlite_dsn)
        for number in range(20):
            kept.emit("n1", *["medium"] * 20)
            kept.emit(
                "n1",
                "long",
                actor=CANARY,
                target=f"{CANARY}-{number}" * (1 + number * 40 % 300),
                detail=json.dumps({"name": CANARY}),
            )
        kept.erase("actor", CANARY, *COMMITTED_FIELDS)

        assert kept.eraser.truncate_wal()
        for path in Path(str(kept.dsn.path)).parent.iterdir():
            assert CANARY.encode() not in path.read_bytes(), path
        assert kept.verify().ok
        kept.close()


class TestOnTheirWay:
    def test_rows_born_before_are_stored_erased(self, kept):
        """
        They were queued somewhere when the subject was erased.
        """
        late = [kept.maker.pending(actor=CANARY), kept.maker.pending()]
        kept.erase("actor", CANARY)
        stored = kept.append("n2", late)
        row = dict(zip(AUDIT_COLUMNS, stored[0], strict=True))

        assert (None, None) == (row["actor"], row["detail"])
        assert late[1].actor == stored[1][9]
        assert late[0].id in named(kept)
        assert "AUDIT_ROW_ERASED" == stored[2][5]
        assert kept.verify().ok

    def test_rows_born_later_are_kept(self, kept):
        """
        Whoever comes back is somebody new.
        """
        kept.erase("actor", CANARY)
        kept.maker.us = 4_000_000_000_000_000
        stored = kept.append("n2", [kept.maker.pending(actor=CANARY)])

        assert CANARY == stored[0][9]

    def test_held_rows_are_kept(self, kept):
        """
        A hold covers them from before they are stored.
        """
        kept.erase("actor", CANARY)
        kept.hold("code", "A_A")
        stored = kept.append("n2", [kept.maker.pending(actor=CANARY, code="A_A")])

        assert CANARY == stored[0][9]

    def test_the_ledger_holds_no_value(self, kept):
        """
        It has a digest only.
        """
        kept.erase("actor", CANARY, reason="asked")
        row = kept.sql("SELECT field, salt, digest, reason FROM audit_log_erasure")[0]

        assert ("actor", digest_of(row[1], CANARY), "asked") == (row[0], row[2], row[3])

    def test_entries_with_one_salt_cost_one_digest_a_row(self, kept):
        """
        Entries that stand at the same time share it.
        """
        for number in range(3):
            kept.erase("actor", f"nobody-{number}")
        salts = kept.sql("SELECT DISTINCT salt FROM audit_log_erasure")

        assert 1 == len(salts)

    def test_a_ledger_is_applied_again_after_a_restore(self, kept):
        """
        The rows are back, and go again, without anybody knowing the names.
        """
        backup = kept.dump()
        kept.erase("actor", CANARY)
        kept.erase("target", CANARY)
        with kept.repository.database.transaction() as connection:
            entries = kept.eraser.entries(connection).entries
        kept.load(backup)
        done = Erased()
        texts = [json.dumps(entry.to_dict()) for entry in entries]
        again = [Erasure.from_dict(json.loads(text)) for text in texts]
        for _ in kept.eraser.apply_again(again, done):
            pass

        assert 6 == done.rows
        assert [] == kept.columns("id", where=f"actor = '{CANARY}'")
        assert kept.verify().ok

    @pytest.mark.parametrize(
        "said", [None, [], {"field": "actor"}, {"field": "x", "fields": []}]
    )
    def test_what_is_no_entry_is_refused(self, said):
        """
        A ledger file is read by machines and edited by nobody.
        """
        with pytest.raises(ValueError, match="no entry"):
            Erasure.from_dict(said)

    def test_edited_fields_of_an_entry_mean_all(self):
        """
        Nobody keeps a name by making the ledger unreadable.
        """
        for text in ("", "[", '["x"]', "1"):
            entry = Erasure.read(("actor", "s", "d", text, None), 1)

            expected = COMMITTED_FIELDS if text else ("actor", "detail")
            assert expected == entry.fields

    def test_an_empty_ledger_is_about_nobody(self, kept):
        """
        Which costs an append next to nothing.
        """
        assert {} == Erasures().among([kept.maker.pending()])


def test_an_erasure_and_a_sweep_never_wait_for_each_other(postgres_dsn):
    """
    An erasure that waits for its node holds no row that a sweep deletes meanwhile.
    """
    kept, other = Kept(postgres_dsn), Kept(postgres_dsn, 1)
    kept.emit("n1", "short", actor=CANARY)
    kept.maker.us += 40 * 86_400_000_000
    with psycopg.connect(postgres_dsn) as first, ThreadPoolExecutor(1) as pool:
        first.execute("SELECT 1 FROM audit_log_node FOR UPDATE")
        erasing = pool.submit(_erase_again, other)
        wait_until(lambda: kept.sql(WAITING) == [(1,)], 10)
        first.execute("SET lock_timeout = '2s'")
        first.execute("SELECT 1 FROM audit_log FOR UPDATE")
        first.rollback()
        done = erasing.result()
    swept = kept.sweep().deleted
    other.close()
    kept.close()

    assert (1, 1) == (done, swept)


def _erase_again(kept: Kept) -> int:
    """
    Erase without a new entry in the ledger, which would wait for every node.
    """
    done, fields, eraser = Erased(), ("actor", "detail"), kept.eraser
    about = eraser.subject("actor", CANARY, fields)
    for _ in eraser.erase(about, fields, "asked for", done):
        pass
    return done.rows


WAITING = (
    "SELECT count(*) FROM pg_stat_activity "
    "WHERE datname = current_database() AND wait_event_type = 'Lock'"
)


class TestFollowing:
    def test_writers_that_stored_lately_have_to_follow(self, kept):
        """
        Each says so once its files are gone; who stored nothing for long has none.
        """
        rows = [(1, tuple(kept.maker.pending()))]
        for node in ("n1", "n2"):
            kept.repository.append(kept.writer(node), rows, 1)
            rows = [(1, tuple(kept.maker.pending()))]
        entry, _ = kept.eraser.announce("actor", CANARY, ("actor",), "asked")
        before = kept.eraser.lagging(entry.at_us)
        kept.eraser.follow(["writer of n1"], entry.at_us)
        after = kept.eraser.lagging(entry.at_us)
        much_later = kept.eraser.lagging(entry.at_us + 2_000_000_000)

        assert ["n1", "n2"] == [each.node for each in before]
        assert ["n2"] == [each.node for each in after]
        assert [] == much_later
