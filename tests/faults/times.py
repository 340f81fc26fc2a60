# SPDX-License-Identifier: Apache-2.0
"""
Clocks that are wrong, and ids of many threads and processes.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import Final

from tests.faults import clocks
from tests.faults.grounds import Grounds, both
from tests.faults.oracle import Outcome, judge
from tests.faults.victim import Plan, Victim
from tests.outside import ROOT

__all__ = ["EXPERIMENTS", "THREADS", "many_ids", "wrong_clocks"]

THREADS: Final = 32
FORKS: Final = 8


def wrong_clocks(
    grounds: Grounds,
    *,
    store: str,
    trials: int = 5,
    names: Sequence[str] = clocks.NAMES,
) -> Outcome:
    """
    Restart a service *trials* times under each wrong clock: order and numbers hold.
    """
    dsn, acks = grounds.dsn(store), []
    start = time.monotonic()
    for trial in range(trials):
        for name in names:
            plan = Plan(
                dsn=dsn,
                spool=str(grounds.spool),
                name=f"v{trial}-{name.replace(' ', '-')}",
                threads=2,
                clock=name,
            )
            with Victim(plan, grounds.folder) as victim:
                victim.reaches(400)  # past the moment at which it goes wrong
                victim.stop()
                acks += victim.acks()
    count = trials * len(names)
    found = judge(f"wrong clocks ({store})", dsn, acks, trials=count)
    return found.lasting(time.monotonic() - start)


def many_ids(grounds: Grounds, *, trials: int = 1_000_000) -> Outcome:
    """
    Mint *trials* ids over 32 threads and 8 forks: none occurs twice, and each process's
    ascend.
    """
    done = subprocess.run(
        [sys.executable, "-m", __name__, str(trials)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    parts = [part.split() for part in done.stdout.split("\n\n") if part.strip()]
    ids = [id_ for part in parts for id_ in part]
    return Outcome(
        name=f"{THREADS} threads, {FORKS} forks: ids",
        trials=trials,
        emitted=trials,
        stored=len(ids),
        lost=max(0, trials - len(ids)),
        dup=len(ids) - len(set(ids)),
        faults=() if len(parts) == THREADS * FORKS else (f"{len(parts)} threads",),
    )


EXPERIMENTS: Final = {**both("clocks", wrong_clocks), "ids": many_ids}
"""The experiments of this module."""


# --- in the process that forks -------------------------------------------------------


def _mint(count: int) -> None:
    from fasten.rows import UlidMinter

    mint = UlidMinter()
    share = -(-count // (THREADS * FORKS))
    mint(time.time_ns())
    guard = threading.Lock()

    def minting() -> None:
        ids = [mint(time.time_ns()) for _ in range(share)]
        with guard:
            sys.stdout.write("\n".join(ids) + "\n\n")

    for number in range(FORKS):
        sys.stdout.flush()
        pid = os.fork()
        if pid:
            os.waitpid(pid, 0)  # one after the other: their outputs do not mix
            continue
        if number % 2:
            mint(time.time_ns())
        mint.reseed()
        threads = [threading.Thread(target=minting) for _ in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        sys.stdout.flush()
        os._exit(0)


if __name__ == "__main__":
    _mint(int(sys.argv[1]))
