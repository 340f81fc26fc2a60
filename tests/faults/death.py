# SPDX-License-Identifier: Apache-2.0
"""
Death: victims that are killed at random instants, and what their heir stores.

One *range* process loads fasten once and forks a victim per trial, so that hundreds
of kills take seconds. Run as a script it is that range.
"""

from __future__ import annotations

import os
import random
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, Final

from tests.faults.oracle import Outcome, judge
from tests.outside import ROOT, wait_until

__all__ = ["kill_at_random"]

THREADS: Final = 4
CODES: Final = ("USER_CREATED", "BATCH_PROCESSED", "CONFIG_UPDATED")


def kill_at_random(
    dsn: str, directory: Path, *, trials: int, kind: str = "plain", seed: int = 0
) -> Outcome:
    """
    Kill *trials* victims with 4 emitting threads each; let an heir deliver the rest.

    *kind* `signals` adds emits from a signal handler, `del` from `__del__`.
    """
    done = subprocess.run(
        [sys.executable, "-m", __name__, dsn, str(directory), str(trials), kind, str(seed)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=60 + 2 * trials,
    )
    if done.returncode:
        raise RuntimeError(f"the range failed:\n{done.stderr}")
    store = "sqlite" if dsn.startswith("sqlite") else "postgres"
    acks = done.stdout.splitlines()
    return judge(f"kill -9, {kind}, {store}", dsn, acks, trials=trials)


# --- in the range ------------------------------------------------------------------


def _range(dsn: str, directory: str, trials: int, kind: str, seed: int) -> None:
    import sqlalchemy  # noqa: F401  (loaded before the forks, not in each)

    import fasten.repository  # noqa: F401

    dice = random.Random(seed)
    for trial in range(trials):
        sys.stdout.writelines(_one_victim(dsn, directory, f"{kind}{trial}", kind, dice))
    sys.stdout.flush()
    _inherit(dsn, directory)


def _settings(dsn: str, directory: str) -> dict[str, Any]:
    return {
        "service_id": "victim",
        "node_id": "n",
        "audit_dsn": dsn,
        "spool_dir": directory,
        "stdout": "",
    }


def _one_victim(
    dsn: str, directory: str, name: str, kind: str, dice: random.Random
) -> list[str]:
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        _live(dsn, directory, name, kind, writer)
    os.close(writer)
    select.select([reader], [], [], 30)  # the first acknowledgement
    time.sleep(dice.random() * 0.12)
    os.kill(pid, signal.SIGKILL)
    with open(reader, encoding="ascii") as pipe:
        lines = pipe.readlines()
    os.waitpid(pid, 0)
    return [line for line in lines if line.endswith("\n")]


def _live(dsn: str, directory: str, name: str, kind: str, writer: int) -> None:
    import fasten

    fasten.init(**_settings(dsn, directory))

    def emit(thread: str, number: int) -> None:
        target = f"{name}/{thread}/{number}"
        id_ = fasten.emit(CODES[number % 3], target, detail={"n": number, "x": "y" * 99})
        os.write(writer, f"{id_} {target}\n".encode())

    def emitting(thread: str) -> None:
        for number in range(10**9):
            emit(thread, number)
            time.sleep(0)

    for thread in range(THREADS):
        threading.Thread(target=emitting, args=(str(thread),), daemon=True).start()
    if kind == "signals":
        _emit_from_signals(emit)
    elif kind == "del":
        _emit_from_del(emit)
    emitting("main")


def _emit_from_signals(emit: Any) -> None:
    numbers = iter(range(10**9))
    signal.signal(signal.SIGALRM, lambda *_: emit("signal", next(numbers)))
    signal.setitimer(signal.ITIMER_REAL, 0.003, 0.003)


def _emit_from_del(emit: Any) -> None:
    numbers = iter(range(10**9))

    class Dying:
        def __del__(self) -> None:
            emit("del", next(numbers))

    def dying() -> None:
        while True:
            cycle = Dying()
            cycle.itself = cycle  # type: ignore[attr-defined]
            time.sleep(0.0005)

    threading.Thread(target=dying, daemon=True).start()


def _inherit(dsn: str, directory: str) -> None:
    """
    Be the next process of the service, until nothing is left to deliver.
    """
    import fasten

    engine = fasten.init(**_settings(dsn, directory))
    drainer = engine.delivery.drainer  # type: ignore[union-attr]
    # One pass finds them all: nobody dies any more. It makes a lane for each.
    wait_until(lambda: len(drainer.lanes) > 1, 30)
    wait_until(lambda: not any(lane.has_work for lane in drainer.lanes), 120)
    fasten.close(30)


if __name__ == "__main__":
    _range(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4], int(sys.argv[5]))
