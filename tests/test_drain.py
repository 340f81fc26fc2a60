# SPDX-License-Identifier: Apache-2.0
"""
The drainer over real threads, and sources made of lists.
"""

from __future__ import annotations

import os
import threading
from typing import Any

import pytest

from fasten import drain
from fasten.drain import (
    Backoff,
    Drainer,
    Fault,
    Lane,
    Rewound,
    Rows,
    Ticket,
    Watchdog,
)
from tests.outside import wait_until


class Waiting:
    """
    A source of numbered rows.
    """

    def __init__(self, *rows: str) -> None:
        self.rows = list(enumerate(rows, 1))
        self.acked = 0
        self.last_index = len(rows)

    @property
    def depth(self) -> int:
        return len(self.rows)

    def take(self, limit: int) -> Rows | None:
        rows, self.rows = self.rows[:limit], self.rows[limit:]
        return Rows(rows, rows[-1][0], []) if rows else None

    def ack(self, index: int) -> None:
        self.acked = max(self.acked, index)


class Store:
    """
    A store that fails as it is told to, and says when it was asked.
    """

    def __init__(self, *faults: Fault | None) -> None:
        self.faults = list(faults)
        self.rows: list[str] = []
        self.poison = ""
        self.asked = threading.Semaphore(0)

    def deliver(self, batch: Any) -> None:
        self.asked.release()
        fault = self.faults.pop(0) if self.faults else None
        if fault is not None:
            raise Failed(fault)
        texts = [row for _, row in batch.rows]
        if self.poison in texts:
            raise Failed(Fault("row", "no such value"))
        self.rows += texts

    def deliver_tickets(self, rows: Any) -> None:
        self.deliver(Rows([(0, row) for row in rows], 0, []))


class Failed(Exception):
    """
    Carries the fault that a store was told to answer with.
    """

    def __init__(self, fault: Fault) -> None:
        super().__init__(fault.message)
        self.fault = fault


def classify(error: BaseException) -> Fault:
    """
    Return the fault inside.
    """
    return error.fault if isinstance(error, Failed) else Fault("transient", repr(error))


def lane_of(source: Waiting, store: Store, **options: Any) -> Lane:
    """
    Connect the two, with delays that a test can wait for.
    """
    return Lane(
        "test",
        source,
        store.deliver,
        classify,
        backoff=Backoff(0.001, 0.01),
        deliver_ticket=store.deliver_tickets,
        **options,
    )


DOWN = Fault("transient", "down")


class TestBackoff:
    def test_doubles_to_the_most(self) -> None:
        """
        Delays double up to the most, and start over after a success.
        """
        backoff = Backoff(1.0, 4.0, jitter=lambda: 1.0)

        delays = [backoff.next_s() for _ in range(4)]
        backoff.reset()

        assert [1.0, 2.0, 4.0, 4.0] == delays
        assert 1.0 == backoff.next_s()

    def test_jitter_keeps_a_floor(self) -> None:
        """
        Jitter never takes more than half of a delay.
        """
        backoff = Backoff(1.0, 4.0, jitter=lambda: 0.0)

        assert 0.5 == backoff.next_s()

    def test_many_attempts_do_not_overflow(self) -> None:
        """
        A store that is down for a year costs no exception.
        """
        backoff = Backoff(1.0, 4.0, jitter=lambda: 1.0)
        for _ in range(5000):
            backoff.next_s()

        assert 4.0 == backoff.next_s()


class TestDelivery:
    def test_delivers_in_order(self) -> None:
        """
        Rows arrive in the order of their indexes, and are acknowledged.
        """
        source, store = Waiting(*map(str, range(1200))), Store()
        lane = lane_of(source, store)
        drainer = Drainer([lane])

        assert drainer.wait_for(lambda: source.acked == 1200, 10)
        assert [str(n) for n in range(1200)] == store.rows
        assert drainer.close(5)
        assert 1200 == lane.delivered

    def test_others_run_while_rows_are_freed(self) -> None:
        """
        Many rows are let go of in parts, once they were shown, with a turn between.
        """
        shown: list[int] = []
        turns: list[int] = []
        source = Waiting(*map(str, range(2000)))
        result = list(range(2000))
        lane = Lane(
            "test",
            source,
            lambda _batch: result,
            classify,
            settled=lambda rows: shown.append(len(rows)),
        )
        drainer = Drainer([lane], breathe=lambda: turns.append(len(result)))

        assert drainer.wait_for(lambda: source.acked == 2000, 10)
        assert drainer.close(5)
        assert ([2000], [1500, 1000, 500]) == (shown, turns)

    def test_retries_the_same_rows(self, caplog: pytest.LogCaptureFixture) -> None:
        """
        A transient fault is retried until it ends, with one line per change of state.
        """
        source, store = Waiting("a", "b"), Store(DOWN, DOWN, DOWN)
        lane = lane_of(source, store)
        drainer = Drainer([lane])

        assert drainer.wait_for(lambda: source.acked == 2, 10)
        drainer.close(5)
        assert ["a", "b"] == store.rows
        assert 3 == lane.retried
        assert lane.fault is None
        assert 2 == len(caplog.records)

    def test_sets_aside_the_one_poison_row(self) -> None:
        """
        Of a batch with a row that no store takes, all others are stored, in order.
        """
        source, store = Waiting(*map(str, range(100))), Store()
        store.poison = "42"
        aside: list[tuple[int, Any]] = []
        lane = lane_of(
            source, store, set_aside=lambda batch, _: aside.extend(batch.rows)
        )
        drainer = Drainer([lane])

        assert drainer.wait_for(lambda: source.acked == 100, 10)
        drainer.close(5)
        assert [(43, "42")] == aside
        assert [str(n) for n in range(100) if n != 42] == store.rows
        assert 1 == lane.quarantined

    def test_a_store_that_refuses_everything_keeps_its_rows(self) -> None:
        """
        Where the record of a refused row is refused, too, no row is put aside.
        """
        source = Waiting("a", "b", "c")
        refusal = Failed(Fault("row", "no such value"))

        def refuse(*_: Any) -> None:
            raise refusal

        lane = lane_of(source, Store(), set_aside=refuse)
        lane.deliver = refuse
        drainer = Drainer([lane])

        assert drainer.wait_for(lambda: lane.fault is not None, 10)
        drainer.close(1)
        assert lane.fault is not None
        assert "setup" == lane.fault.kind
        assert "every other" in lane.fault.message
        assert (0, 0, 0) == (source.acked, lane.delivered, lane.quarantined)

    def test_gaps_stay_with_their_half(self) -> None:
        """
        What a batch is missing is told with the rows around it, and once.
        """
        batch = Rows([(2, "a"), (5, "b"), (9, "c")], 12, [(1, 1), (3, 4), (10, 12)])

        left, right = Rows.halves(batch)

        assert Rows([(2, "a")], 4, [(1, 1), (3, 4)]) == left
        assert Rows([(5, "b"), (9, "c")], 12, [(10, 12)]) == right

    def test_a_rewound_source_serves_again(self) -> None:
        """
        What the store has lost comes again, before what was to come.
        """
        source, store = Waiting("a", "b"), Store()
        rewinds = iter([True])

        def deliver(batch: Any) -> None:
            if next(rewinds, False):
                raise Rewound(0, iter([Rows([(0, "x")], 0, [])]))
            store.deliver(batch)

        lane = lane_of(source, store)
        lane.deliver = deliver
        drainer = Drainer([lane])

        assert drainer.wait_for(lambda: source.acked == 2, 10)
        drainer.close(1)
        assert ["x", "a", "b"] == store.rows

    def test_a_store_is_well_again_without_a_row(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        """
        After a ticket has failed, the store is asked until it answers; one line each.
        """
        store = Store(*[DOWN] * 4)
        lane = lane_of(Waiting(), store)
        drainer = Drainer([lane])
        ticket = Ticket("x")
        drainer.submit(lane, ticket)

        assert ticket.wait(5)
        assert DOWN == ticket.fault
        assert drainer.wait_for(lambda: lane.fault is None, 10)
        drainer.close(1)
        assert 2 == len(caplog.records)

    def test_a_fault_is_told_once(self, caplog: pytest.LogCaptureFixture) -> None:
        """
        Faults that take turns are logged once each, until the store is well again.
        """
        starting = Fault("transient", "starting up")
        store = Store(DOWN, starting, DOWN, starting, DOWN)
        source = Waiting("a")
        drainer = Drainer([lane_of(source, store)])

        assert drainer.wait_for(lambda: source.acked == 1, 10)
        drainer.close(1)
        assert 3 == len(caplog.records)

    def test_a_lane_in_trouble_does_not_stop_another(self) -> None:
        """
        While one lane waits for its store, the next one is served.
        """
        stuck = lane_of(Waiting("x"), Store(*[DOWN] * 50))
        free_source, store = Waiting("y"), Store()
        drainer = Drainer([stuck, lane_of(free_source, store)])

        assert drainer.wait_for(lambda: free_source.acked == 1, 10)
        drainer.close(1)
        assert ["y"] == store.rows

    def test_an_unexpected_error_keeps_the_rows(self) -> None:
        """
        A classifier that fails itself costs no row.
        """

        def broken(_error: BaseException) -> Fault:
            raise RuntimeError

        source, store = Waiting("a"), Store(DOWN)
        lane = lane_of(source, store)
        lane.classify = broken
        drainer = Drainer([lane])
        drainer.wake()

        assert store.asked.acquire(timeout=5)
        assert drainer.wait_for(lambda: source.acked == 1, 10)
        drainer.close(5)
        assert ["a"] == store.rows


class TestLife:
    def test_nothing_starts_before_the_first_wake(self) -> None:
        """
        A drainer without rows has no thread.
        """
        drainer = Drainer([lane_of(Waiting(), Store())])

        assert not drainer.is_running
        assert drainer.close(1)

    def test_close_drains_what_waits(self) -> None:
        """
        Closing delivers the rows of a drainer that never ran.
        """
        source, store = Waiting("a", "b"), Store()
        drainer = Drainer([lane_of(source, store)])

        assert drainer.close(5)
        assert ["a", "b"] == store.rows

    def test_close_is_bounded_when_the_store_hangs(self) -> None:
        """
        A call that hangs keeps close() for its timeout, and keeps the rows.
        """
        source, gate = Waiting("a"), threading.Event()
        lane = lane_of(source, Store())
        lane.deliver = lambda _batch: gate.wait(30)
        drainer = Drainer([lane])
        drainer.wake()

        assert not drainer.close(0.1)
        assert 0 == source.acked
        gate.set()
        assert drainer.close(5)

    def test_close_while_down_tries_once(self) -> None:
        """
        With the store down, close() makes its attempt and returns.
        """
        source = Waiting("a")
        drainer = Drainer([lane_of(source, Store(*[DOWN] * 1000))])

        assert not drainer.close(5)
        assert 0 == source.acked

    def test_close_leaves_late_rows_to_the_thread(self) -> None:
        """
        What comes while a chore holds the thread up is tried by it: it can be left
        behind in a call, which the caller cannot.
        """
        source, store, by = Waiting(), Store(), list[threading.Thread]()
        lane = lane_of(source, store)
        drainer = Drainer([lane])
        begun = threading.Event()

        def deliver(batch: Any) -> None:
            by.append(threading.current_thread())
            store.deliver(batch)

        def chore() -> None:
            begun.set()
            wait_until(lambda: drainer._is_closing)
            source.rows = [(1, "late")]

        lane.deliver = deliver
        drainer.every(60, chore)
        drainer.start()
        begun.wait(5)

        assert drainer.close(5)
        assert ["late"] == store.rows
        assert threading.current_thread() not in by

    def test_close_asks_a_store_that_is_away_once(self) -> None:
        """
        Where no thread runs, the lanes of one store do not each wait for it.
        """
        stores = Store(DOWN), Store(DOWN)
        lanes = [lane_of(Waiting("a"), store) for store in stores]

        assert not Drainer(lanes).close(5)
        assert [True, False] == [s.asked.acquire(blocking=False) for s in stores]

    def test_runs_chores(self) -> None:
        """
        A chore runs in the thread, on its interval.
        """
        ran = threading.Semaphore(0)
        drainer = Drainer([lane_of(Waiting(), Store())])
        drainer.every(0.005, ran.release)
        drainer.start()

        assert all(ran.acquire(timeout=5) for _ in range(3))
        drainer.close(5)

    def test_a_failing_chore_stops_nothing(self) -> None:
        """
        A chore that raises runs again, and rows go on being delivered.
        """
        ran = threading.Semaphore(0)

        def fail() -> None:
            ran.release()
            raise RuntimeError

        source, store = Waiting("a"), Store()
        drainer = Drainer([lane_of(source, store)])
        drainer.every(0.005, fail)

        assert drainer.wait_for(lambda: source.acked == 1, 10)
        assert all(ran.acquire(timeout=5) for _ in range(2))
        drainer.close(5)

    def test_idle_is_told_once_things_are_quiet(self) -> None:
        """
        After a quiet while the idle callable runs: connections are let go there.
        """
        idle = threading.Semaphore(0)
        drainer = Drainer(
            [lane_of(Waiting("a"), Store())], idle=idle.release, idle_s=0.01
        )
        drainer.wake()

        assert idle.acquire(timeout=5)
        drainer.close(5)


class TestTickets:
    def test_answers_when_stored(self) -> None:
        """
        A ticket's caller is told that its row is stored.
        """
        store = Store()
        lane = lane_of(Waiting(), store)
        drainer = Drainer([lane])
        ticket = Ticket("now")
        drainer.submit(lane, ticket)

        assert ticket.wait(5)
        assert ticket.fault is None
        assert ["now"] == store.rows
        drainer.close(5)

    def test_answers_with_the_fault(self) -> None:
        """
        A ticket that failed is answered once and not tried again.
        """
        store = Store(DOWN)
        lane = lane_of(Waiting(), store)
        drainer = Drainer([lane])
        ticket = Ticket("now")
        drainer.submit(lane, ticket)

        assert ticket.wait(5)
        assert DOWN == ticket.fault
        drainer.close(5)
        assert [] == store.rows

    def test_one_bad_ticket_is_not_another_callers(self) -> None:
        """
        A row that no store takes fails its own caller only.
        """
        store = Store()
        store.poison = "bad"
        lane = lane_of(Waiting(), store)
        drainer = Drainer([lane])
        good, bad = Ticket("good"), Ticket("bad")
        lane.tickets.extend([good, bad])
        drainer.wake()

        assert good.wait(5)
        assert bad.wait(5)
        assert good.fault is None
        assert bad.fault is not None
        drainer.close(5)

    def test_withdrawn_is_never_delivered(self) -> None:
        """
        A ticket is either withdrawn or claimed, never both.
        """
        ticket = Ticket("late")

        assert ticket.withdraw()
        assert not ticket.claim()
        assert not ticket.withdraw()


class TestWatchdog:
    def test_aborts_a_call_past_its_deadline(self) -> None:
        """
        A call that hangs is broken from outside.
        """
        gate = threading.Event()
        watchdog = Watchdog(gate.set, 0.02)
        with watchdog.guard():
            assert gate.wait(5)
        assert 1 == watchdog.fired

    def test_a_nearer_deadline(self) -> None:
        """
        One guard may be stricter than the others.
        """
        fired = threading.Event()
        watchdog = Watchdog(fired.set, 60)

        with watchdog.guard(0.02):
            assert fired.wait(5)

    def test_a_forked_child_watches_anew(self) -> None:
        """
        In a child the parent's watching thread is not waited for.
        """
        fired = threading.Event()
        watchdog = Watchdog(fired.set, 30)
        with watchdog.guard():
            pid = os.fork()
            if pid == 0:
                watchdog.after_fork_in_child()
                with watchdog.guard(0.02):
                    os._exit(0 if fired.wait(5) else 1)

        assert 0 == os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def test_its_thread_goes_and_comes_again(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """
        Engines that are closed leave no thread behind; a later call is watched.
        """
        monkeypatch.setattr(drain, "REST_S", 0.01)
        fired = threading.Event()
        watchdog = Watchdog(fired.set, 0.5)
        with watchdog.guard():
            pass

        wait_until(lambda: watchdog._thread is None, 5)
        with watchdog.guard(0.02):
            assert fired.wait(5)

    def test_does_something_while_a_call_lasts(self) -> None:
        """
        What callers need meanwhile is seen to, again and again, though it may raise.
        """
        turns = threading.Semaphore(0)

        def meanwhile() -> None:
            turns.release()
            raise RuntimeError

        watchdog = Watchdog(lambda: None, 60, meanwhile)
        with watchdog.guard():
            assert turns.acquire(timeout=5)
            assert turns.acquire(timeout=5)

        assert 0 == watchdog.fired

    def test_leaves_a_quick_call_alone(self) -> None:
        """
        A call that returns in time is not touched, nor is the time between calls.
        """
        gate = threading.Event()
        watchdog = Watchdog(gate.set, 0.05)
        for _ in range(3):
            with watchdog.guard():
                pass

        assert not gate.wait(0.2)
