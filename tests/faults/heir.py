# SPDX-License-Identifier: Apache-2.0
"""
The heir: the next process of the service, which delivers what the dead have left.

Run as a script it is one.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from fasten.spool.files import read_ack
from tests.checker import rows_of
from tests.faults.oracle import told_by
from tests.outside import ROOT

__all__ = ["deliver", "inherit", "unsettled"]


def inherit(
    dsn: str, directory: Path | str, timeout: float = 60.0, rows: int = 0
) -> None:
    """
    Start the next process of the service, and wait until it has delivered everything.

    *timeout* is how long it may get no further; *rows* have to be in the store.

    Raises:
        RuntimeError: it failed, or something is left, or a secret is in a journal.
    """
    if files := told_by(directory):
        raise RuntimeError(f"a secret stands in {files}")
    done = subprocess.run(
        [sys.executable, "-m", __name__, dsn, str(directory), str(timeout), str(rows)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"the heir failed:\n{done.stderr[-4000:]}")


def unsettled(directory: Path | str, own: str = "") -> set[str]:
    """
    Return the writers, *own* left out, whose journals are not delivered, as their
    accounts say.
    """
    folder = Path(directory)
    writers = {path.name.partition(".")[0] for path in folder.glob("*.seg")} - {own}
    accounts = {writer: read_ack(folder / f"{writer}.ack") for writer in writers}
    return {writer for writer, ack in accounts.items() if not (ack and ack.is_done)}


def deliver(dsn: str, directory: str, timeout: float = 60.0, rows: int = 0) -> None:
    """
    Be the next process of the service, as `inherit` says.

    Raises:
        RuntimeError: something is left.
    """
    import fasten
    from tests.faults.victim import settings_of

    engine = fasten.init(**settings_of(dsn, directory))
    delivery: Any = engine.delivery
    pause, moved, before = threading.Event(), time.monotonic(), (-1, -1)
    while (left := unsettled(directory, delivery.spool.writer_id)) or (
        rows and len(rows_of(dsn)) < rows
    ):
        now = len(left), delivery.stats()["replayed"]
        if now != before:  # slow is no fault: what counts is that it gets on
            moved, before = time.monotonic(), now
        elif time.monotonic() - moved > timeout:
            raise RuntimeError(f"{sorted(left)} left; {fasten.health()}")
        # Who was still dying while the engine looked is found when it looks again.
        delivery.adopt_soon()
        pause.wait(0.05)
    if not fasten.close(30):
        raise RuntimeError("the heir could not deliver its own rows")


if __name__ == "__main__":
    deliver(sys.argv[1], sys.argv[2], float(sys.argv[3]), int(sys.argv[4]))
