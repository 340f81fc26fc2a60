# SPDX-License-Identifier: Apache-2.0
"""
The victim: a service that emits, and notes each id once `emit` has returned.

Run as a script it is one; `Victim` is the experimenter's end of it. What happens to it
is told by the experiments.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Self

import attrs

from tests.faults import clocks, failpoints
from tests.faults.oracle import CANARY, Ack, read_acks
from tests.outside import ROOT, wait_until

__all__ = ["CODES", "Plan", "Report", "Victim", "detail", "emit_on", "settings_of"]

CODES: Final = ("USER_CREATED", "BATCH_PROCESSED", "CONFIG_UPDATED")
"""One of each retention class."""


def detail(number: int) -> dict[str, Any]:
    """
    Return a detail of 6 keys, one nested, with values never seen before, but for one
    that nobody may ever see.
    """
    return {
        "order_id": f"o-{number:09d}",
        "amount": number * 7 % 99_991,
        "api_key": CANARY,
        "note": f"part {number} of a longer delivery to somewhere",
        "items": {"sku": f"W-{number % 9973}", "count": number % 7},
        "is_gift": number % 5 == 0,
    }


def settings_of(dsn: str, directory: Path | str, **more: Any) -> dict[str, Any]:
    """
    Return what every victim of a store is started with, so that they are one service.
    """
    return {
        "service_id": "victim",
        "node_id": "n",
        "audit_dsn": dsn,
        "spool_dir": str(directory),
        "stdout": "",
        "reader_token": CANARY,
        **more,
    }


@attrs.frozen(kw_only=True)
class Plan:
    """
    What a victim does: *threads* emit every *pause_s* seconds until it is stopped.

    *most* rows a thread at the most. *points* are failpoints, as in `failpoints.arm`;
    *clock* is how its clock goes wrong, as in `clocks.named`. *retain_s* is how long
    the spool keeps what is delivered.
    """

    dsn: str
    spool: str
    name: str = "v"
    threads: int = 1
    pause_s: float = 0.002
    most: int = 10**9
    settings: Mapping[str, Any] = attrs.field(factory=dict)
    points: tuple[tuple[str, int, str], ...] = ()
    clock: str = ""
    retain_s: float | None = None
    setup: str = ""


# --- the experimenter's end ---------------------------------------------------------


@attrs.frozen(kw_only=True)
class Report:
    """
    What a victim said as it ended: its counters, and how long emits took beside the
    `json.dumps` of the same row, in nanoseconds, one pair a row.
    """

    stats: Mapping[str, Any]
    health: Mapping[str, Any]
    is_flushed: bool
    is_closed: bool
    exit_s: float


class Victim:
    """
    One victim in a process of its own; its files lie in *folder*.
    """

    def __init__(self, plan: Plan, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.plan, self._folder = plan, folder
        for name in ("acks", "states", "log", "references"):
            (folder / f"{plan.name}.{name}").touch()
        said = json.dumps(attrs.asdict(plan))
        with self._path("errors").open("wb") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, said, folder],
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )

    def _path(self, name: str) -> Path:
        return self._folder / f"{self.plan.name}.{name}"

    @property
    def pid(self) -> int:
        """
        Return its process id.
        """
        return self._process.pid

    def acks(self) -> list[Ack]:
        """
        Return what it has acknowledged so far.
        """
        with self._path("acks").open(encoding="ascii") as file:
            return read_acks(file)

    def reaches(self, rows: int, timeout: float = 30.0) -> None:
        """
        Wait until it has acknowledged *rows* more rows than now.

        Raises:
            TimeoutError: it has not.
        """
        path = self._path("acks")
        goal = path.read_bytes().count(b"\n") + rows
        wait_until(lambda: path.read_bytes().count(b"\n") >= goal, timeout)

    def states(self) -> list[tuple[float, str, str]]:
        """
        Return each change of its health: the monotonic time, the state, the reasons.
        """
        lines = self._path("states").read_text().splitlines()
        parts = [line.split(" ", 2) for line in lines]
        return [(float(at), state, reasons) for at, state, reasons in parts]

    def is_in(self, *states: str, timeout: float = 30.0) -> float:
        """
        Wait until its health is one of *states*; return the time when it became that.

        Raises:
            TimeoutError: it has not.
        """

        def since() -> float:
            known = self.states()
            return known[-1][0] if known and known[-1][1] in states else 0.0

        return wait_until(since, timeout)

    def log(self) -> list[str]:
        """
        Return the lines that fasten logged.
        """
        return self._path("log").read_text().splitlines()

    def references(self) -> list[int]:
        """
        Return the nanoseconds of a `json.dumps` of each row.
        """
        return [int(line) for line in self._path("references").read_text().split()]

    def texts(self) -> str:
        """
        Return everything that it has said, for the search for secrets.
        """
        return "\n".join(path.read_text(errors="replace") for path in self.files())

    def files(self) -> list[Path]:
        """
        Return the files that it writes to.
        """
        return sorted(self._folder.glob(f"{self.plan.name}.*"))

    def tells(self, name: str) -> str:
        """
        Return what it has written to one of them so far.
        """
        path = self._path(name)
        return path.read_text(errors="replace") if path.exists() else ""

    def stop(self, timeout: float = 60.0) -> Report:
        """
        Have it flush, close and exit; return what it said.

        Raises:
            RuntimeError: it exited with an error.
            subprocess.TimeoutExpired: it hangs; it was killed.
        """
        try:
            out, _ = self._process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise
        if self._process.returncode:
            raise RuntimeError(f"the victim failed:\n{self.errors()[-4000:]}")
        return Report(**json.loads(out.splitlines()[-1]))

    def signal(self, number: signal.Signals) -> None:
        """
        Send it a signal.
        """
        os.kill(self.pid, number)

    def wait(self, timeout: float = 30.0) -> int:
        """
        Wait for its end; return its exit code, negative for a signal.
        """
        return self._process.wait(timeout)

    def kill(self) -> None:
        """
        Kill -9.
        """
        self._process.kill()
        self._process.communicate()

    def errors(self) -> str:
        """
        Return its stderr.
        """
        return self._path("errors").read_text(errors="replace")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self.kill()


# --- the victim's own -----------------------------------------------------------------


def emit_on(name: str, acks: int, *, most: int = 10**9) -> Callable[[str, int], int]:
    """
    Return a function that emits row *number* of a thread and notes it in file *acks*.

    It returns the nanoseconds that `emit` took.
    """
    import fasten

    def emit(thread: str, number: int) -> int:
        target = f"{name}/{thread}/{number}"
        given = detail(number)
        code = CODES[number % 3]
        start = time.perf_counter_ns()
        id_ = fasten.emit(code, target, actor=f"user-{number}", detail=given)
        ns = time.perf_counter_ns() - start
        os.write(acks, f"{id_} {target} {ns}\n".encode())
        return ns

    return emit


def _open(folder: Path, plan: Plan, name: str) -> int:
    path = folder / f"{plan.name}.{name}"
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)


def _live(plan: Plan, folder: Path) -> None:
    import fasten

    logging.basicConfig(filename=folder / f"{plan.name}.log", level=logging.WARNING)
    if plan.retain_s is not None:
        failpoints.retain(plan.retain_s)
    for point in plan.points:
        failpoints.arm(*point)
    if plan.setup:
        exec(plan.setup, {"plan": plan, "folder": folder})
    given = settings_of(plan.dsn, plan.spool, **plan.settings)
    with clocks.named(plan.clock):
        fasten.init(**given)
        stopping = threading.Event()
        threads = [
            threading.Thread(target=_emitting, args=(plan, folder, str(n), stopping))
            for n in range(plan.threads)
        ]
        threads.append(
            threading.Thread(target=_watching, args=(plan, folder, stopping))
        )
        for thread in threads:
            thread.start()
        sys.stdin.read()
        stopping.set()
        for thread in threads:
            thread.join()
        _report()


def _emitting(plan: Plan, folder: Path, thread: str, stopping: threading.Event) -> None:
    emit = emit_on(plan.name, _open(folder, plan, "acks"))
    refer = _refer_on(plan, _open(folder, plan, "references"))
    for number in itertools.islice(itertools.count(), plan.most):
        # Whichever comes first after the pause finds the caches cold: they take turns.
        turns = (emit, refer) if number % 2 else (refer, emit)
        for turn in turns:
            turn(thread, number)
        if stopping.wait(plan.pause_s):
            return


def _refer_on(plan: Plan, references: int) -> Callable[[str, int], int]:
    """
    Return what times a `json.dumps` of the row that `emit_on` emits, and notes it.
    """

    def refer(thread: str, number: int) -> int:
        row = {"target": f"{plan.name}/{thread}/{number}", "detail": detail(number)}
        row |= {f"anchor_{n}": f"value {n} of {number}" for n in range(18)}
        start = time.perf_counter_ns()
        json.dumps(row)
        ns = time.perf_counter_ns() - start
        os.write(references, f"{ns}\n".encode())
        return ns

    return refer


def _watching(plan: Plan, folder: Path, stopping: threading.Event) -> None:
    import fasten

    states, known = _open(folder, plan, "states"), ""
    while not stopping.wait(0.02):
        health = fasten.health()
        said = f"{health['state']} {'; '.join(health['reasons'])}"
        if said != known:
            os.write(states, f"{time.monotonic()} {said}\n".encode())
            known = said


def _report() -> None:
    import fasten

    is_flushed = fasten.flush(30)
    stats, health = fasten.stats(), fasten.health()
    start = time.monotonic()
    is_closed = fasten.close()
    said = Report(
        stats=stats,
        health=health,
        is_flushed=is_flushed,
        is_closed=is_closed,
        exit_s=time.monotonic() - start,
    )
    sys.stdout.write(json.dumps(attrs.asdict(said)) + "\n")
    sys.stdout.flush()


@contextmanager
def victims(*plans: Plan, folder: Path) -> Iterator[list[Victim]]:
    """
    Run several at once.
    """
    running = [Victim(plan, folder) for plan in plans]
    try:
        yield running
    finally:
        for victim in running:
            victim.__exit__()


if __name__ == "__main__":
    _live(Plan(**json.loads(sys.argv[1])), Path(sys.argv[2]))
