# SPDX-License-Identifier: Apache-2.0
"""
Sweeps over real stores: what goes, what stays, what is on record, and when it stops.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import attrs
import psycopg
import pytest

from fasten.repository import SchemaProblem
from fasten.repository.erasures import digest_of
from fasten.repository.periods import Periods
from fasten.repository.pruning import Order, Sweeper, SweepIsBusy
from tests.ledger import value
from tests.outside import wait_until
from tests.stores import DAY, Kept

YEAR = 365 * DAY


@pytest.fixture
def kept(store_dsn: str) -> Iterator[Kept]:
    """
    Give an empty store.
    """
    made = Kept(store_dsn)
    yield made
    made.close()


def detail(kept: Kept) -> dict[str, Any]:
    """
    Return the detail of the newest sweep's record.
    """
    found: dict[str, Any] = json.loads(kept.details("RETENTION_SWEEP_RAN")[-1])
    return found


def steps_of_a_sweep(dsn: str, longs: int) -> int:
    """
    Return how much work SQLite has with 5 rows that go, behind so many that stay.
    """
    steps = []
    kept = Kept(dsn)
    kept.emit("n1", *["long"] * longs)
    kept.emit("n1", *["short"] * 5)
    kept.age(31)
    with kept.repository.database.looking() as connection:
        raw: Any = connection.connection.driver_connection
        raw.set_progress_handler(lambda: steps.append(1), 100)
    assert kept.sweep().deleted == 5
    kept.close()
    return len(steps)


class TestSweep:
    def test_each_class_expires_by_its_own_period(self, kept):
        """
        After 31 days the short rows go, of every node of the service.
        """
        for _ in range(3):
            kept.emit("n1", "short", "medium", "long")
            kept.emit("n2", "short", "medium")
        kept.age(31)
        done = kept.sweep()

        assert {"short": 6} == done.by_class
        assert ["long", "medium"] == sorted(
            set(kept.columns("retention_class", where="domain <> 'fasten'"))
        )
        assert kept.verify().ok

    def test_rows_of_other_classes_are_not_read_past(self, tmp_path):
        """
        A sweep of a chain that begins late costs what it costs in a small store.
        """
        small, large = (
            steps_of_a_sweep(f"sqlite:///{tmp_path}/{longs}.db", longs)
            for longs in (10, 3000)
        )

        assert large < 2 * small

    @pytest.mark.parametrize("noted", [1, 4, 5, 6, 99, -1, "x", None])
    def test_where_a_chain_begins_is_only_a_hint(self, kept, noted):
        """
        Whatever stands in meta, the sweep takes the rows that are next.
        """
        kept.emit("n1", *["medium"] * 3, *["short"] * 4)
        kept.sql(
            "UPDATE audit_log_meta SET value = ? WHERE key = 'first:shop/n1/short'",
            json.dumps(noted),
        )
        kept.age(31)

        assert {"short": 4} == kept.sweep().by_class
        assert kept.verify().ok

    def test_a_chain_that_was_emptied_begins_anew(self, kept):
        """
        With its first row after a sweep, the number in meta moves on.
        """
        ask = "SELECT value FROM audit_log_meta WHERE key = 'first:shop/n1/short'"
        kept.emit("n1", "short", "short")
        first = kept.sql(ask)
        kept.age(31)
        kept.sweep()
        kept.emit("n1", "medium", "short", "short")

        assert [("1",)] == first
        assert kept.columns("monotonic_seq", where="retention_class = 'short'")[0] == (
            int(kept.sql(ask)[0][0])
        )
        kept.age(31)
        assert {"short": 2} == kept.sweep().by_class
        assert kept.verify().ok

    def test_one_record_tells_of_a_run(self, kept):
        """
        It counts what went, by class, and says how far each chain was cut.
        """
        kept.emit("n1", *["short"] * 5, "medium")
        kept.age(31)
        kept.sweep(limit=2)
        told = detail(kept)

        assert 1 == len(kept.details("RETENTION_SWEEP_RAN"))
        assert (5, {"short": 5}) == (told["deleted"], told["by_class"])
        assert [(1, 5, 5)] == [
            (cut["from_seq"], cut["to_seq"], cut["count"]) for cut in told["cuts"]
        ]

    def test_a_run_that_finds_nothing_is_on_record(self, kept):
        """
        That a sweep ran is worth knowing; unless it is one of many in the background.
        """
        kept.emit("n1", "short")
        kept.sweep()
        kept.sweep(is_explicit=False)

        assert [0] == [
            json.loads(d)["deleted"] for d in kept.details("RETENTION_SWEEP_RAN")
        ]

    def test_a_young_row_keeps_those_behind_it(self, kept):
        """
        A sweep cuts from the front: it never punches a hole.
        """
        kept.emit("n1", "short")
        kept.age(31)
        late = kept.maker.pending("short")
        kept.emit("n1", "short")
        kept.age(-31)
        kept.append("n1", [kept.maker.pending("short")])
        kept.age(31)

        assert 1 == kept.sweep().deleted
        assert late.id not in kept.columns("id")
        assert kept.verify().ok

    def test_an_emptied_chain_goes_on(self, kept):
        """
        Its head stays, and the next row is linked to the last that went.
        """
        kept.emit("n1", "short", "short")
        kept.age(31)
        kept.sweep()
        kept.emit("n1", "short")

        assert [4] == kept.columns("monotonic_seq", where="retention_class = 'short'")
        assert kept.verify().ok

    def test_another_service_is_left_alone(self, kept):
        """
        Services share a table, and keep their rows for different times.
        """
        kept.emit("n1", "short")
        kept.maker.service = "billing"
        kept.emit("n1", "short")
        kept.age(31)
        kept.sweep()

        assert ["shop"] == kept.columns("service_id", where="domain <> 'fasten'")

    def test_a_dry_run_changes_nothing(self, kept):
        """
        It counts, and leaves the store as it is.
        """
        kept.emit("n1", "short", "short")
        kept.age(31)
        before = kept.dump()
        done = kept.sweep(is_dry=True)

        assert {"short": 2} == done.by_class
        assert before == kept.dump()

    def test_records_that_go_are_said_again(self, kept):
        """
        Verification asks for the newest record that names a chain, however old.
        """
        kept.emit("n1", "short", "long")
        kept.emit("n2", "short")
        kept.age(31)
        kept.sweep("n2")
        kept.emit("n1", "long")
        kept.maker.us += 10 * YEAR * 1_000_000
        done = kept.sweep("n1")
        report = kept.verify()

        assert done.deleted >= 3
        assert 1 == len(kept.details("RETENTION_SWEEP_RAN"))
        assert ["n1", "n2"] == sorted(
            cut["node"] for cut in detail(kept)["cuts"] if not cut["count"]
        )
        assert [] == list(report.findings)

    def test_records_of_erasure_are_said_again(self, kept):
        """
        As long as a row is there whose erasure they explain.
        """
        stored = kept.emit("n1", "long")
        kept.erase("id", stored[0][1], "actor")
        kept.maker.service = "billing"
        held = kept.emit("n9", "long")
        kept.maker.service = "shop"
        kept.erase("id", held[0][1], "actor", "detail")
        kept.maker.us += 10 * YEAR * 1_000_000
        kept.sweep()

        assert [[held[0][1]]] == [said["ids"] for said in detail(kept)["erased"]]
        assert kept.verify().ok

    def test_tampered_rows_stay(self, kept):
        """
        A sweep removes no evidence: it stops where a hash is none.
        """
        kept.emit("n1", *["short"] * 3)
        kept.sql("UPDATE audit_log SET hash = 'x' WHERE monotonic_seq = 2")
        kept.age(31)

        assert 1 == kept.sweep().deleted
        assert "tampered" == kept.verify().status

    def test_unshipped_rows_stay(self, kept):
        """
        Where rows are replicated, none goes that was not.
        """
        kept.emit("n1", *["short"] * 3)
        kept.sql("INSERT INTO audit_log_meta (key, value) VALUES ('ships', 'true')")
        now = "strftime('%Y', 'now')" if kept.is_sqlite else "now()"
        kept.sql(f"UPDATE audit_log SET shipped_at = {now} WHERE monotonic_seq = 1")
        kept.age(31)

        assert 1 == kept.sweep().deleted


class TestSteps:
    @pytest.mark.parametrize("steps", range(1, 9))
    def test_a_killed_sweep_is_finished_by_the_next(self, kept, steps):
        """
        It may end after any step: the store verifies, and nothing is counted twice.
        """
        kept.emit("n1", *["short"] * 5, "medium")
        kept.emit("n2", *["short"] * 4)
        kept.age(31)
        order = _order(kept, limit=3)
        run = Sweeper(kept.repository, kept.writer(), order).run()
        for _, _ in zip(range(steps), run, strict=False):
            assert kept.verify().ok
        run.close()
        kept.sweep()

        assert [] == kept.columns("id", where="retention_class = 'short'")
        assert kept.verify().ok

    def test_no_transaction_is_longer_than_a_batch(self, kept):
        """
        Between two steps another writer gets its turn.
        """
        kept.emit("n1", *["short"] * 9)
        kept.age(31)
        other = Kept(kept.given, 1)
        sizes = []
        before = 9
        for _ in Sweeper(kept.repository, kept.writer(), _order(kept, limit=4)).run():
            other.emit("n1", "medium")
            left = len(kept.columns("id", where="retention_class = 'short'"))
            sizes.append(before - left)
            before = left
        other.close()

        assert 4 == max(sizes)
        assert kept.verify().ok

    def test_one_sweeps_at_a_time(self, kept):
        """
        A second sweeper is refused until the first has ended, or is gone for a while.
        """
        kept.emit("n1", *["short"] * 9)
        kept.age(31)
        first = Sweeper(kept.repository, kept.writer("n1"), _order(kept, limit=2)).run()
        next(first)
        with pytest.raises(SweepIsBusy, match="try again"):
            kept.sweep("n2")
        list(first)

        assert 0 == kept.sweep("n2").deleted

    def test_of_two_that_wait_for_the_lease_one_gets_it(self, postgres_dsn):
        """
        The other one finds it given, however long both have waited.
        """
        stores = [Kept(postgres_dsn, seed) for seed in range(3)]
        stores[0].emit("n1", "short")
        stores[0].sweep()
        given = []
        for _ in range(5):
            with ThreadPoolExecutor(2) as pool, psycopg.connect(postgres_dsn) as first:
                first.execute("SELECT 1 FROM audit_log_meta FOR UPDATE")
                begun = [pool.submit(_begins, kept) for kept in stores[1:]]
                wait_until(lambda: stores[0].sql(_WAITING) == [(2,)], 10)
                first.rollback()
                given.append(sorted(each.result() for each in begun))
            stores[0].sql(_GIVEN_BACK)
        for kept in stores:
            kept.close()

        assert [[False, True]] * 5 == given

    def test_a_lease_of_a_wrong_clock_is_no_lock(self, kept):
        """
        Nobody is kept out until the year 2036.
        """
        kept.emit("n1", "short")
        kept.sql(
            "INSERT INTO audit_log_meta (key, value) VALUES (?, ?)",
            "sweep:shop",
            json.dumps({"by": "somebody", "until_us": 4_000_000_000_000_000}),
        )
        kept.age(31)

        assert 1 == kept.sweep().deleted


class TestHolds:
    @pytest.mark.parametrize("field", ["target", "actor", "code"])
    def test_held_rows_stay(self, kept, field):
        """
        What is behind a held row is erased, and deleted once the hold ends.
        """
        rows = [
            kept.maker.pending("short", code=code) for code in ("A_A", "B_B", "A_A")
        ]
        kept.append("n1", [*rows, kept.maker.pending("short", code="C_C")])
        hold = kept.hold(field, getattr(rows[1], field))
        kept.age(31)
        done = kept.sweep()

        assert (1, 2) == (done.deleted, done.erased)
        assert ["whole", "erased", "erased"] == [
            "erased" if target is None else "whole"
            for target in kept.columns("target", where="retention_class = 'short'")
        ]
        assert kept.verify().ok
        kept.lift(hold)
        assert 3 == kept.sweep().deleted
        assert kept.verify().ok

    def test_what_was_erased_behind_a_hold_is_not_looked_at_again(self, kept):
        """
        A second sweep finds nothing to do; another hold makes it look again.
        """
        rows = kept.emit("n1", *["short"] * 4)
        kept.hold("target", rows[0][16])
        kept.age(31)
        counts = [kept.sweep().erased, kept.sweep().erased]
        kept.hold("actor", "nobody")
        counts.append(kept.sweep().erased)

        assert [3, 0, 0] == counts

    def test_a_hold_put_during_a_sweep_is_heeded(self, kept):
        """
        Each transaction looks at the holds again.
        """
        rows = kept.emit("n1", *["short"] * 6)
        kept.age(31)
        run = Sweeper(kept.repository, kept.writer(), _order(kept, limit=2)).run()
        while len(kept.columns("id", where="retention_class = 'short'")) == 6:
            next(run)
        kept.hold("target", rows[3][16])
        list(run)

        assert rows[3][1] in kept.columns("id")
        assert kept.verify().ok

    def test_a_hold_that_was_edited_holds_everything(self, kept):
        """
        Nothing goes because somebody made a hold unreadable.
        """
        kept.emit("n1", "short")
        kept.hold("target", "x")
        kept.sql("UPDATE audit_log_meta SET value = '{}' WHERE key LIKE 'hold:%'")
        kept.age(31)

        assert 0 == kept.sweep().deleted


class TestTidying:
    """
    What a sweep does besides, by the store's own clock.
    """

    def test_old_checkpoints_are_thinned_to_one_a_day(self, kept):
        """
        The last one of each day stays; those of the last 30 days all do.
        """
        for _ in range(6):
            kept.emit("n1", "medium")
            kept.checkpoint()
        days = ("40 10:00", "40 11:00", "40 12:00", "39 10:00", "2 10:00", "2 11:00")
        for size, text in enumerate(days, 1):
            kept.sql(
                "UPDATE audit_log_checkpoint SET created_at = ? WHERE size = ?",
                _days_ago(text),
                size,
            )
        kept.sweep()

        assert [(3,), (4,), (5,), (6,)] == kept.sql(
            "SELECT size FROM audit_log_checkpoint ORDER BY size"
        )

    def test_erasures_are_kept_while_rows_of_before_may_come(self, kept):
        """
        A host may be away for as long as a row is kept; after that they are dropped.
        """
        kept.sweep()
        for name in ("ann", "bob"):
            kept.erase("actor", name)
        _age_erasure(kept, "ann", 1096)
        _age_erasure(kept, "bob", 1094)
        kept.sweep()
        born = {"timestamp_us": 1_600_000_000_000_000}
        late = kept.emit("n1", "long", actor="bob", **born)
        entries = kept.sql("SELECT salt, digest FROM audit_log_erasure")

        assert [digest_of(entries[0][0], "bob")] == [digest for _, digest in entries]
        assert None is value(late[0], "actor")

    def test_a_writer_that_has_to_follow_keeps_them(self, kept):
        """
        However short the periods are.
        """
        kept.policy = attrs.evolve(kept.policy, short=DAY, medium=DAY, long=DAY)
        kept.sweep()
        row = tuple(kept.maker.pending())
        kept.repository.append(kept.writer(), [(1, row)], 1)
        kept.erase("actor", "ann")
        _age_erasure(kept, "ann", 3)
        kept.sweep()
        kept.sql("UPDATE audit_log_writer SET updated_at = ?", _days_ago("31 00:00"))
        counts = [len(kept.sql("SELECT 1 FROM audit_log_erasure"))]
        kept.sweep()
        counts.append(len(kept.sql("SELECT 1 FROM audit_log_erasure")))

        assert [1, 0] == counts


def _days_ago(text: str) -> str:
    days, _, clock = text.partition(" ")
    day = datetime.now(UTC) - timedelta(days=int(days))
    return f"{day:%Y-%m-%d}T{clock}:00.000000Z"


def _age_erasure(kept: Kept, name: str, days: int) -> None:
    """
    Let an entry of the ledger be of *days* ago.
    """
    found = kept.sql("SELECT salt, digest FROM audit_log_erasure")
    digest = next(d for salt, d in found if digest_of(salt, name) == d)
    kept.sql(
        "UPDATE audit_log_erasure SET erased_at = ? WHERE digest = ?",
        _days_ago(f"{days} 00:00"),
        digest,
    )


class TestPeriods:
    def test_the_first_sweep_writes_the_periods(self, kept):
        """
        They stand in the meta table, by service.
        """
        kept.sweep()
        stored = kept.sql(
            "SELECT value FROM audit_log_meta WHERE key = ?", "retention:shop"
        )

        assert kept.policy.to_dict() == json.loads(stored[0][0])

    def test_a_longer_period_holds_at_once(self, kept):
        """
        Nothing more is deleted by the shorter one.
        """
        kept.emit("n1", "short")
        kept.sweep()
        kept.policy = attrs.evolve(kept.policy, short=40 * DAY)
        kept.age(31)

        assert 0 == kept.sweep().deleted
        assert [] == kept.details("RETENTION_POLICY_CHANGED")

    def test_a_shorter_period_waits_for_the_grace(self, kept):
        """
        It is on record at once, and holds a day later.
        """
        kept.emit("n1", "short")
        kept.sweep()
        kept.policy = attrs.evolve(kept.policy, short=5 * DAY)
        kept.age(10)
        counts = [kept.sweep().deleted]
        kept.age(0.9)
        counts.append(kept.sweep().deleted)
        kept.age(0.2)
        counts.append(kept.sweep().deleted)
        told = [json.loads(d) for d in kept.details("RETENTION_POLICY_CHANGED")]

        assert [0, 0, 1] == counts
        assert [(30 * DAY, 5 * DAY)] == [
            (one["from"]["short"], one["to"]["short"]) for one in told
        ]

    def test_a_shorter_period_taken_back_begins_anew(self, kept):
        """
        The grace counts from when it was asked for last.
        """
        kept.emit("n1", "short")
        kept.sweep()
        before, short = kept.policy, attrs.evolve(kept.policy, short=5 * DAY)
        counts = []
        for policy, days in ((short, 10), (before, 2), (short, 2), (short, 0.5)):
            kept.policy = policy
            kept.age(days)
            counts.append(kept.sweep().deleted)

        assert [0, 0, 0, 0] == counts

    def test_force_lets_it_hold_at_once(self, kept):
        """
        `fasten sweep --now`.
        """
        kept.emit("n1", "short")
        kept.sweep()
        kept.policy = attrs.evolve(kept.policy, short=5 * DAY)
        kept.age(10)

        assert 1 == kept.sweep(is_forced=True).deleted
        assert 1 == len(kept.details("RETENTION_POLICY_CHANGED"))

    def test_edited_periods_stop_the_sweep(self, kept):
        """
        Nothing is deleted by a period that nobody can have meant.
        """
        kept.emit("n1", "short")
        kept.sweep()
        kept.sql(
            "UPDATE audit_log_meta SET value = ? WHERE key = ?",
            '{"short": 0, "medium": 1, "long": 1}',
            "retention:shop",
        )

        with pytest.raises(SchemaProblem, match="retention of class short"):
            kept.sweep()


class TestClock:
    """
    Rows are stored now by the store's clock; only the sweep's own clock is wrong.
    """

    @pytest.fixture
    def young(self, kept: Kept) -> Kept:
        """
        Give a store with a row of this moment, swept once.
        """
        kept.maker.us = _now_us(kept)
        kept.emit("n1", "short")
        kept.sweep(is_time_given=False)
        return kept

    def test_a_clock_ahead_of_the_store_deletes_nothing(self, young):
        """
        The earlier of both clocks counts.
        """
        young.age(3650)

        assert 0 == young.sweep(is_time_given=False).deleted

    def test_a_clock_that_jumped_has_to_stand_there_for_a_day(self, young):
        """
        Where both clocks are one, a jump is told from what was seen last.
        """
        seen = _trusted_days(young, 0.2, 3650, 3650.5, 3651.1)

        assert [0.2, 0.2, 0.2, 3651.1] == seen

    def test_a_clock_that_was_set_back_is_watched_again(self, young):
        """
        What it said before the next jump is trusted, and no more.
        """
        seen = _trusted_days(young, 3650, 0.5, 0.6, 3650, 3650.5)

        assert [0.0, 0.0, 0.0, 0.6, 0.6] == seen

    def test_a_job_that_runs_weekly_is_a_week_behind(self, young):
        """
        Long gaps cost no more than themselves.
        """
        seen = _trusted_days(young, 7, 14, 21, 28)

        assert [0.0, 7.0, 14.0, 21.0] == seen


def _begins(kept: Kept) -> bool:
    """
    Begin a sweep; false if it is refused.
    """
    writer = attrs.evolve(kept.writer(), id=kept.maker.random.randbytes(16).hex())
    try:
        next(Sweeper(kept.repository, writer, _order(kept)).run())
    except SweepIsBusy:
        return False
    return True


_GIVEN_BACK = "UPDATE audit_log_meta SET value = 'null' WHERE key = 'sweep:shop'"
_WAITING = (
    "SELECT count(*) FROM pg_stat_activity "
    "WHERE datname = current_database() AND wait_event_type = 'Lock'"
)


def _order(kept: Kept, **given: Any) -> Order:
    values: dict[str, Any] = {
        "now_us": kept.maker.us,
        "is_time_given": True,
        "interval_s": 60.0,
    }
    return Order(wanted=kept.policy, is_explicit=True, **values | given)


def _now_us(kept: Kept) -> int:
    kept.repository.schema.ensure()
    with kept.repository.database.transaction() as connection:
        return Periods(kept.repository, "shop").store_us(connection)


def _trusted_days(kept: Kept, *days: float) -> list[float]:
    """
    Return what is trusted, in days from now, as both clocks say one day, then another.
    """
    start = kept.maker.us
    return [(_trusted(kept, start, d) - start) // (DAY * 100_000) / 10 for d in days]


def _trusted(kept: Kept, start_us: int, days: float) -> int:
    now_us = start_us + round(days * DAY * 1_000_000)
    periods = Periods(kept.repository, "shop")
    periods.store_us = lambda _connection: now_us  # type: ignore[method-assign]
    with kept.repository.database.transaction() as connection:
        return periods.trusted_us(connection, now_us, grace_s=DAY, gap_s=2 * DAY)
