# SPDX-License-Identifier: Apache-2.0
"""
Checkpoints in real stores: when they are made, by whom, and what they hold.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fasten.chain import Note, ed25519_signer, ed25519_verifier
from fasten.repository.anchoring import Anchor
from tests.stores import Kept


@pytest.fixture
def kept(store_dsn: str) -> Iterator[Kept]:
    """
    Give a store with rows of two nodes.
    """
    made = Kept(store_dsn)
    made.emit("n1", "short", "medium", "long")
    made.emit("n2", "medium")
    yield made
    made.close()


def origins(notes: list[str]) -> list[str]:
    """
    Return what notes are of.
    """
    return sorted(Note.parse(note).checkpoint.origin for note in notes)


class TestAnchor:
    def test_each_chain_is_signed(self, kept):
        """
        A note for each, which verification finds in the store.
        """
        notes = kept.checkpoint()
        report = kept.verify()

        assert [
            "shop/n1/long",
            "shop/n1/medium",
            "shop/n1/short",
            "shop/n2/medium",
        ] == (origins(notes))
        assert report.ok
        assert report.is_anchored

    def test_only_what_changed_is_signed_again(self, kept):
        """
        An idle chain costs nothing.
        """
        kept.checkpoint()
        kept.emit("n2", "medium")

        assert ["shop/n2/medium"] == origins(kept.checkpoint())
        assert [] == kept.checkpoint()

    def test_an_idle_chain_is_signed_once_a_day(self, kept):
        """
        Somebody is still at home.
        """
        kept.checkpoint()
        day = (
            "strftime('%Y-%m-%dT%H:%M:%f', 'now', '-25 hours') || '000Z'"
            if kept.is_sqlite
            else "now() - interval '25 hours'"
        )
        kept.sql(f"UPDATE audit_log_checkpoint SET created_at = {day}")
        kept.sql(f"UPDATE audit_log_head SET checkpointed_at = {day}")

        assert 4 == len(kept.checkpoint())
        assert kept.verify().ok

    def test_one_process_signs_an_interval(self, kept):
        """
        A chain that somebody signed just now waits.
        """
        kept.checkpoint()
        kept.emit("n1", "short")
        anchor = Anchor(kept.repository, "shop", [kept.maker.signer])

        assert [] == [note for notes in anchor.run(interval_s=60) for note in notes]
        assert 1 == len([note for notes in anchor.run() for note in notes])

    def test_several_keys_sign(self, kept):
        """
        So that one can be replaced by the next.
        """
        other = ed25519_signer("shop", "A" * 43 + "=")
        anchor = Anchor(kept.repository, "shop", [kept.maker.signer, other])
        for _ in anchor.run():
            pass
        for signer in (kept.maker.signer, other):
            keys = [ed25519_verifier(signer.vkey)]

            assert kept.verify(verifiers=keys).is_anchored

    def test_another_services_chains_are_left_alone(self, kept):
        """
        A key speaks for the service that it is named after.
        """
        anchor = Anchor(kept.repository, "billing", [kept.maker.signer])

        assert [] == list(anchor.run())

    def test_an_edited_head_is_not_signed(self, kept):
        """
        It is verify's to tell.
        """
        kept.sql(
            "UPDATE audit_log_head SET frontier = 'aa' WHERE retention_class = 'long'"
        )

        assert "shop/n1/long" not in origins(kept.checkpoint())

    def test_all_of_them_are_signed_for_whoever_asks(self, kept):
        """
        `fasten checkpoint` tells every chain, also those that have not changed.
        """
        kept.checkpoint()
        anchor = Anchor(kept.repository, "shop", [kept.maker.signer])

        assert 4 == len(anchor.newest())


class TestDetection:
    @pytest.mark.parametrize("kind", ["cut tail", "stored notes gone", "resealed"])
    def test_a_note_kept_elsewhere_tells(self, kept, kind):
        """
        Whoever can write to the store cannot rewrite what was carried off.
        """
        backup = kept.dump()
        kept.emit("n1", "short", "medium")
        notes = kept.checkpoint()
        if kind == "stored notes gone":
            kept.sql("DELETE FROM audit_log_checkpoint")
            kept.sql("UPDATE audit_log_head SET checkpointed_at = NULL")
            assert kept.verify().ok
            kept.sql("DELETE FROM audit_log WHERE monotonic_seq = 5")
            kept.load({**kept.dump("audit"), "head": backup["head"]})
        elif kind == "cut tail":
            kept.load(backup)
        else:
            _reseal(kept)
        report = kept.verify(given=notes)

        assert 1 == report.exit_code

    @pytest.mark.parametrize("column", ["size", "monotonic_seq", "root", "note"])
    def test_an_edited_checkpoint_is_found(self, kept, column):
        """
        Columns beside a note say what it says.
        """
        kept.checkpoint()
        value = "2" if column in ("size", "monotonic_seq") else "'x'"
        kept.sql(
            f"UPDATE audit_log_checkpoint SET {column} = {value} "
            "WHERE source_node_id = 'n2'"
        )

        assert "tampered" == kept.verify().status

    def test_without_its_newest_checkpoint_a_head_tells(self, kept):
        """
        It names the time of it.
        """
        kept.checkpoint()
        kept.sql("DELETE FROM audit_log_checkpoint WHERE source_node_id = 'n2'")

        assert "missing" == kept.verify().status

    def test_without_a_key_nothing_can_be_told(self, kept):
        """
        Exit code 3.
        """
        kept.checkpoint()
        report = kept.verify(verifiers=[])

        assert ("unverifiable", 3) == (report.status, report.exit_code)

    def test_an_anchor_can_be_required(self, kept):
        """
        Also where there is no checkpoint at all.
        """
        assert kept.verify().ok
        assert "unverifiable" == kept.verify(require_anchor=True).status


def _reseal(kept: Kept) -> None:
    """
    Store the rows again with one of them edited, as if it had always been so.
    """
    from tests.ledger import pending_of

    rows = kept.dump("audit")["audit"]
    if not kept.is_sqlite:
        rows = [
            tuple(
                v.strftime("%Y-%m-%dT%H:%M:%S.%fZ") if hasattr(v, "strftime") else v
                for v in row
            )
            for row in rows
        ]
    kept.load({name: [] for name in ("audit", "head", "node", "checkpoint")})
    for row in sorted(rows, key=lambda row: (row[13], row[4])):
        forged = pending_of(row)._replace(actor="mallory")
        kept.append(row[13], [forged])
    assert kept.verify().ok
