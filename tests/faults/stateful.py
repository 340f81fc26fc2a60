# SPDX-License-Identifier: Apache-2.0
"""
Any order of events, against a small model: hypothesis starts services, has them emit,
fork, stop and crash, takes the store away, damages journals, drains and verifies.

The model is three sets: what was acknowledged, what was damaged, what is stored. The
services are real processes.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, ClassVar, Final

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from fasten.spool import files, frames
from tests.checker import rows_of
from tests.cli_runs import run
from tests.faults import heir
from tests.faults.grounds import Grounds, both
from tests.faults.oracle import Outcome, faults_of, told, verify_code
from tests.faults.stage import PATIENCE_S, Service, Stage, staged
from tests.outside import wait_until

__all__ = ["EXPERIMENTS", "any_order"]

STEPS: Final = 14
MOST_SERVICES: Final = 3


# --- the model -----------------------------------------------------------------------


class Life(RuleBasedStateMachine):
    """
    What may happen to services of one store, in any order.
    """

    stage: ClassVar[Stage]
    seen: ClassVar[list[tuple[int, int, int]]]

    def __init__(self) -> None:
        super().__init__()
        self.stage.clear()
        self.services: list[Service] = []
        self.born = 0
        self.damaged: set[str] = set()
        self.outage: ExitStack | None = None
        self.has_left = False

    # -- services --

    @initialize()
    def begin(self) -> None:
        """
        Start with one service.
        """
        self._start({})

    @precondition(lambda self: len(self.services) < MOST_SERVICES)
    @rule(
        durability=st.sampled_from(["process", "process", "power"]),
        capacity=st.sampled_from([10_000, 5]),
    )
    def start(self, durability: str, capacity: int) -> None:
        """
        Start a service: the next of one that died, or another beside it.
        """
        self._start({"durability": durability, "queue_capacity": capacity})

    def _start(self, given: dict[str, Any]) -> None:
        self.born += 1
        self.services.append(Service(self.stage, f"v{self.born}", **given))

    def _pick(self, number: int) -> Service:
        return self.services[number % len(self.services)]

    @precondition(lambda self: self.services)
    @rule(
        who=st.integers(0, 9), rows=st.integers(1, 40), size=st.sampled_from([9, 9000])
    )
    def emit(self, who: int, rows: int, size: int) -> None:
        """
        Have a service emit; rows of 9 kB fill segments.
        """
        self._pick(who).do("emit", rows, size)

    @precondition(lambda self: self.services)
    @rule(
        who=st.integers(0, 9),
        rows=st.integers(1, 5),
        end=st.sampled_from(["close", "exit", "kill"]),
    )
    def fork(self, who: int, rows: int, end: str) -> None:
        """
        Have a service fork a child, which emits and ends.
        """
        self.has_left = True

        assert "" == self._pick(who).do("fork", rows, end)

    @precondition(lambda self: self.services)
    @rule(who=st.integers(0, 9), rows=st.integers(0, 60))
    def crash(self, who: int, rows: int) -> None:
        """
        Kill a service: idle, delivering, or in the middle of emitting.
        """
        service = self._pick(who)
        goal = len(self.stage.acked()) + rows
        if rows:
            service.do("flood", 2)
        wait_until(lambda: len(self.stage.acked()) >= goal, PATIENCE_S)
        self._is_gone(service)
        service.kill()

    def _is_gone(self, service: Service) -> None:
        self.services.remove(service)
        self.has_left = True

    @precondition(lambda self: self.services)
    @rule(who=st.integers(0, 9))
    def stop(self, who: int) -> None:
        """
        Have a service close, within its 2 seconds, and exit.
        """
        service = self._pick(who)
        self._is_gone(service)
        start = time.monotonic()
        service.do("stop")

        assert time.monotonic() - start < 5
        service.wait()

    @precondition(lambda self: self.services and self.outage is None)
    @rule(who=st.integers(0, 9))
    def flush(self, who: int) -> None:
        """
        Have a service flush: then what it has acknowledged is stored.
        """
        assert self._pick(who).do("flush")

    # -- the world --

    @precondition(lambda self: self.outage is None)
    @rule()
    def lose_the_store(self) -> None:
        """
        Nobody can write to the store from now on.
        """
        self.outage = ExitStack()
        self.outage.enter_context(self.stage.away())

    @precondition(lambda self: self.outage is not None)
    @rule()
    def find_the_store(self) -> None:
        """
        The store is there again.
        """
        outage, self.outage = self.outage, None
        if outage is not None:
            outage.close()

    @precondition(lambda self: self.has_left)
    @rule(
        which=st.integers(0, 99), frame=st.integers(0, 999), bit=st.integers(0, 10**6)
    )
    def damage(self, which: int, frame: int, bit: int) -> None:
        """
        Flip a bit in what a dead process has left, anywhere but in its last row.
        """
        writers = sorted(heir.unsettled(self.stage.spool))
        if not writers:
            return
        writer = writers[which % len(writers)]
        lock = files.claim_lock(self.stage.spool, writer)
        if lock is None:
            return  # it lives, or somebody delivers what it left
        try:
            self.damaged |= _damage(self.stage.spool, writer, frame, bit)
        finally:
            files.unlock(lock)

    @precondition(lambda self: self.has_left and self.outage is None)
    @rule()
    def drain(self) -> None:
        """
        Deliver by hand what dead processes have left.
        """
        self.has_left = False
        done = run("drain", **self._environ())

        assert 0 == done.exit_code, done.output

    @precondition(lambda self: self.outage is None)
    @rule()
    def verify(self) -> None:
        """
        Whatever was delivered up to now, the store's chains hold.
        """
        if rows_of(self.stage.dsn):
            done = run("verify", **self._environ())

            assert 0 == done.exit_code, done.output

    def _environ(self) -> dict[str, str]:
        return {
            "FASTEN_SERVICE_ID": "victim",
            "FASTEN_NODE_ID": "n",
            "FASTEN_AUDIT_DSN": self.stage.way,
            "FASTEN_SPOOL_DIR": str(self.stage.spool),
            "FASTEN_STDOUT": "",
        }

    # -- the end of an example --

    def teardown(self) -> None:
        """
        Let the next process of the service deliver all there is, and compare.
        """
        self.find_the_store()
        for service in self.services:
            service.kill()
        self.stage.inherit()
        rows = rows_of(self.stage.dsn)
        stored = [row["id"] for row in rows]
        acked = {ack.id for ack in self.stage.acked()}

        dropped, aside = told(rows)
        self.seen.append((len(acked), len(stored), dropped))

        assert set() == acked - set(stored) - self.damaged
        assert len(set(stored)) == len(stored)
        assert (len(self.damaged - set(stored)), 0) == (dropped, aside)
        assert [] == faults_of(rows)
        assert not rows or verify_code(rows, self.stage.dsn) == 0


def _damage(folder: Path, writer: str, number: int, bit: int) -> set[str]:
    """
    Flip a bit of a frame; return the id of the row in it, if it is a row's.
    """
    found = [
        (frame[0], path, at, frame)
        for path in files.segments_of(folder, writer)
        for at, frame in _frames(path.read_bytes())
    ]
    last = max((index for index, *_ in found), default=0)
    whole = sorted((f for f in found if f[0] < last), key=lambda f: f[:3])
    if not whole:
        return set()
    _, path, at, frame = whole[number % len(whole)]
    length = 8 * (frames.HEADER_SIZE + len(frame[2]))
    data = bytearray(path.read_bytes())
    data[at + bit % length // 8] ^= 1 << bit % 8
    path.write_bytes(data)
    row = frames.row_of(frame)
    return set() if row is None else {row[0]}


def _frames(data: bytes) -> Iterator[tuple[int, frames.Frame]]:
    at = 0
    for frame in frames.parse(data)[0]:
        whole = frames.encode_frame(frame[1], frame[0], frame[2])
        at = data.index(whole, at)
        yield at, frame
        at += len(whole)


# --- the experiment ------------------------------------------------------------------


def any_order(
    grounds: Grounds, *, store: str, trials: int = 200, is_short: bool = False
) -> Outcome:
    """
    Play *trials* examples of STEPS events each; *is_short*: as found, not reduced.
    """
    phases = (Phase.generate,) if is_short else (Phase.generate, Phase.shrink)
    chosen = settings(
        max_examples=trials,
        stateful_step_count=STEPS,
        phases=phases,
        deadline=None,
        database=None,
        print_blob=False,
        suppress_health_check=list(HealthCheck),
    )
    start, faults = time.monotonic(), tuple[str, ...]()
    seen: list[tuple[int, int, int]] = []
    with staged(grounds, store) as stage:
        played = type("Played", (Life,), {"stage": stage, "seen": seen})
        try:
            run_state_machine_as_test(played, settings=chosen)
        except Exception as error:
            faults = (str(error), *getattr(error, "__notes__", ()))
    acked, stored, dropped = (sum(counts[n] for counts in seen) for n in range(3))
    found = Outcome(
        name=f"any order ({store})",
        trials=len(seen),
        emitted=acked,
        acked=acked,
        stored=stored,
        dropped=dropped,
        faults=faults,
    )
    return found.lasting(time.monotonic() - start)


EXPERIMENTS: Final = both("any-order", any_order)
"""The experiments of this module."""
