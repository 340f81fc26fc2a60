# SPDX-License-Identifier: Apache-2.0
"""
Forks: of a preloaded master, and at random instants while threads emit. Run as a
script it is that master.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Final

from tests.faults.death import PATIENCE_S
from tests.faults.grounds import Grounds, both
from tests.faults.heir import inherit
from tests.faults.oracle import Outcome, judge, read_acks
from tests.faults.victim import emit_on, settings_of
from tests.outside import ROOT, wait_until

__all__ = ["EXPERIMENTS", "fork"]

CHILDREN: Final = 8
ROWS: Final = 20


def fork(grounds: Grounds, *, store: str, trials: int = 40) -> Outcome:
    """
    Fork 8 children at random instants, *trials* times, while the parent's threads go on
    emitting; each child emits, some fork again, some end by a signal.
    """
    dsn, spool, acks = grounds.dsn(store), grounds.spool, grounds.folder / "acks"
    start = time.monotonic()
    given = (dsn, str(spool), str(acks), str(grounds.seed), str(trials))
    done = subprocess.run(
        [sys.executable, "-m", __name__, *given],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=120 + 60 * trials,
    )
    if done.returncode:
        raise RuntimeError(f"the master failed:\n{done.stderr[-4000:]}")
    inherit(dsn, spool)
    with acks.open(encoding="ascii") as file:
        found = judge(
            f"forks ({store})",
            dsn,
            read_acks(file),
            trials=trials * CHILDREN,
            hangs=done.stdout.count("hangs"),
            wrong=done.stdout.splitlines(),
        )
    return found.lasting(time.monotonic() - start)


EXPERIMENTS: Final = both("forks", fork)
"""The experiments of this module."""


# --- in the master --------------------------------------------------------------------


def _master(dsn: str, spool: str, acks: str, seed: str, trials: str) -> None:
    import fasten

    dice = random.Random(seed)
    fd = os.open(acks, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    fasten.init(**settings_of(dsn, spool))
    stopping = threading.Event()
    emit = emit_on("parent", fd)

    def emitting(thread: str) -> None:
        number = 0
        while not stopping.wait(0.003):
            emit(thread, number)
            number += 1

    threads = [threading.Thread(target=emitting, args=(str(n),)) for n in range(4)]
    for thread in threads:
        thread.start()
    for trial in range(int(trials)):
        children = {}
        for child in range(CHILDREN):
            stopping.wait(dice.random() * 0.02)
            chance = dice.random()
            pid = os.fork()
            if pid == 0:
                _child(f"{trial}.{child}", fd, chance)
            children[pid] = child
        _await(children)
    stopping.set()
    for thread in threads:
        thread.join()
    if not fasten.close(30):
        sys.stdout.write("the master could not deliver\n")


def _child(name: str, acks: int, chance: float) -> None:
    import fasten

    emit = emit_on(name, acks)
    for number in range(ROWS):
        emit("main", number)
    if chance < 0.2:
        os.kill(os.getpid(), 9)
    if chance < 0.4 and (pid := os.fork()):
        os.waitpid(pid, 0)
    elif chance < 0.4:
        emit_on(f"{name}.grandchild", acks)("main", 0)
    fasten.close(10)
    os._exit(0)


def _await(children: dict[int, int]) -> None:
    for pid in children:
        try:
            wait_until(lambda pid=pid: os.waitpid(pid, os.WNOHANG)[0], PATIENCE_S)  # type: ignore[misc]
        except TimeoutError:
            os.kill(pid, 9)
            os.waitpid(pid, 0)
            sys.stdout.write("a child hangs\n")


if __name__ == "__main__":
    Path(sys.argv[3]).touch()
    _master(*sys.argv[1:])
