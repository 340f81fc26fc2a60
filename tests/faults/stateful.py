# SPDX-License-Identifier: Apache-2.0
"""
Any order of events, against a small model: hypothesis starts services, has them emit,
fork, stop and crash, takes the store away, damages journals, drains and verifies.

The model is three sets: what was acknowledged, what was damaged, what is stored. The
services are processes, forked off a server that has loaded fasten once.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import shutil
import signal
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, ClassVar, Final

import attrs
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
from tests.faults.oracle import (
    Ack,
    Outcome,
    faults_of,
    read_acks,
    told,
    verify_code,
)
from tests.faults.proxy import Proxy
from tests.faults.server import ask
from tests.faults.victim import CODES, settings_of
from tests.outside import wait_until

__all__ = ["EXPERIMENTS", "any_order"]

PATIENCE_S: Final = 30.0
"""How long a service may take for an order."""

STEPS: Final = 14
MOST_SERVICES: Final = 3


# --- a service, in a process of its own ----------------------------------------------


class _Serving:
    """
    What a service does when it is told to.
    """

    def __init__(self, name: str, acks: str) -> None:
        self._name = name
        self._acks = os.open(acks, os.O_WRONLY | os.O_APPEND)
        self._numbers = itertools.count()

    def emit(self, rows: int, size: int) -> None:
        for _ in range(rows):
            self._emit("main", next(self._numbers), size)

    def _emit(self, thread: str, number: int, size: int) -> None:
        import fasten

        target = f"{self._name}/{thread}/{number}"
        detail = {"number": number, "padding": "x" * size}
        id_ = fasten.emit(CODES[number % 3], target, detail=detail)
        os.write(self._acks, f"{id_} {target} 0\n".encode())

    def flood(self) -> None:
        for thread in "ab":
            threading.Thread(target=self._flood, args=(thread,), daemon=True).start()

    def _flood(self, thread: str) -> None:
        for number in itertools.count():
            self._emit(thread, number, 50)
            time.sleep(0.0005)

    def fork(self, rows: int, end: str) -> str:
        pid = os.fork()
        if pid == 0:
            self._be_a_child(rows, end)
        try:
            wait_until(lambda: os.waitpid(pid, os.WNOHANG)[0], PATIENCE_S / 2)
        except TimeoutError:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return "a forked child hangs"
        return ""

    def _be_a_child(self, rows: int, end: str) -> None:
        import fasten

        self._name += f".{os.getpid()}"
        for number in range(rows):
            self._emit("child", number, 50)
        if end == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if end == "close":
            fasten.close(1)
        os._exit(0)

    def flush(self) -> bool:
        import fasten

        return fasten.flush(PATIENCE_S / 2)

    def stop(self) -> bool:
        import fasten

        return fasten.close()


def _serve(orders: Connection, name: str, acks: str, given: dict[str, Any]) -> None:
    import fasten

    fasten.init(**given)
    service = _Serving(name, acks)
    orders.send("")
    while True:
        order, *arguments = orders.recv()
        orders.send(getattr(service, order)(*arguments))
        if order == "stop":
            return


_FORKSERVER: Final = multiprocessing.get_context("forkserver")
_FORKSERVER.set_forkserver_preload(["tests.faults.loaded", __name__])


class Service:
    """
    One service, and the other end of its orders.
    """

    def __init__(self, name: str, acks: Path, **given: Any) -> None:
        self._orders, theirs = _FORKSERVER.Pipe()
        self._process = _FORKSERVER.Process(
            target=_serve, args=(theirs, name, str(acks), given), daemon=True
        )
        self._process.start()
        theirs.close()
        self._answer("start")

    def do(self, order: str, *arguments: Any) -> Any:
        """
        Have it do something; return what it answers.

        Raises:
            TimeoutError: it hangs.
        """
        self._orders.send((order, *arguments))
        return self._answer(order)

    def _answer(self, order: str) -> Any:
        if not self._orders.poll(PATIENCE_S):
            raise TimeoutError(f"a service hangs: {order}")
        return self._orders.recv()

    def kill(self) -> None:
        """
        Kill -9.
        """
        self._process.kill()
        self.wait()

    def wait(self) -> None:
        """
        Wait for its end.

        Raises:
            TimeoutError: it does not end.
        """
        self._process.join(PATIENCE_S)
        if self._process.is_alive():
            self._process.kill()
            raise TimeoutError("a service does not end")
        self._orders.close()


# --- the store, there and away -------------------------------------------------------


@contextmanager
def _locked(dsn: str) -> Iterator[None]:
    """
    Hold a SQLite file's lock, as somebody's forgotten transaction does.
    """
    connection = sqlite3.connect(dsn.removeprefix("sqlite:///"), timeout=PATIENCE_S)
    try:
        connection.execute("BEGIN IMMEDIATE")
        yield
    finally:
        connection.close()


@contextmanager
def _refused(proxy: Proxy) -> Iterator[None]:
    proxy.mode = "refuse"
    try:
        yield
    finally:
        proxy.mode = "pass"


@attrs.frozen
class Stage:
    """
    Where examples are played: *dsn* is the store's own, *way* that of services to it:
    to them it is the place whose rows a journal holds.
    """

    folder: Path
    dsn: str
    way: str
    away: Callable[[], Any]

    @property
    def spool(self) -> Path:
        """
        Return where the journals lie.
        """
        return self.folder / "spool"

    @property
    def acks(self) -> Path:
        """
        Return where services note what was acknowledged.
        """
        return self.folder / "acks"

    def clear(self) -> None:
        """
        Make it as it was before the first example.
        """
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        self.acks.touch()
        if not self.dsn.startswith("sqlite"):
            ask(self.dsn, "DROP SCHEMA public CASCADE", "CREATE SCHEMA public")


@contextmanager
def _stage(grounds: Grounds, store: str) -> Iterator[Stage]:
    folder = grounds.folder / "stage"
    if store == "sqlite":
        dsn = f"sqlite:///{folder / 'audit.db'}"
        yield Stage(folder, dsn, dsn, lambda: _locked(dsn))
        return
    dsn = grounds.dsn(store)
    with Proxy(dsn) as proxy:
        yield Stage(folder, dsn, proxy.dsn, lambda: _refused(proxy))


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
        all_given = settings_of(self.stage.way, self.stage.spool, **given)
        self.services.append(Service(f"v{self.born}", self.stage.acks, **all_given))

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
        goal = len(self._acks()) + rows
        if rows:
            service.do("flood")
        wait_until(lambda: len(self._acks()) >= goal, PATIENCE_S)
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

    def _acks(self) -> list[Ack]:
        with self.stage.acks.open(encoding="ascii") as file:
            return read_acks(file)

    def teardown(self) -> None:
        """
        Let the next process of the service deliver all there is, and compare.
        """
        self.find_the_store()
        for service in self.services:
            service.kill()
        _inherit(self.stage)
        rows = rows_of(self.stage.dsn)
        stored = [row["id"] for row in rows]
        acked = {ack.id for ack in self._acks()}

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


def _inherit(stage: Stage) -> None:
    process = _FORKSERVER.Process(
        target=heir.deliver, args=(stage.way, str(stage.spool)), daemon=True
    )
    process.start()
    process.join(2 * PATIENCE_S)
    is_alive = process.is_alive()
    if is_alive:
        process.kill()

    assert (False, 0) == (is_alive, process.exitcode), heir.unsettled(stage.spool)


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
    with _stage(grounds, store) as stage:
        played = type("Played", (Life,), {"stage": stage, "seen": seen})
        try:
            run_state_machine_as_test(played, settings=chosen)
        except Exception as error:
            faults = (str(error), *getattr(error, "__notes__", ()))
    acked, stored, dropped = (sum(counts[n] for counts in seen) for n in range(3))
    found = Outcome(
        name=f"any order ({store})",
        trials=len(seen),
        acked=acked,
        stored=stored,
        dropped=dropped,
        faults=faults,
    )
    return found.lasting(time.monotonic() - start)


EXPERIMENTS: Final = both("any-order", any_order)
"""The experiments of this module."""
