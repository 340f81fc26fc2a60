# SPDX-License-Identifier: Apache-2.0
"""
Short forms of the experiments in `death`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.checker import rows_of
from tests.faults import death
from tests.faults.grounds import STORES, Grounds
from tests.faults.heir import inherit


@pytest.mark.parametrize("store", STORES)
def test_a_killed_victim_loses_nothing(store: str, grounds: Grounds) -> None:
    """
    Rows whose emit returned before kill -9 are stored once, and no others are.
    """
    outcome = death.kill_at_random(grounds, store=store, trials=8)

    assert outcome.holds, outcome.line()
    assert outcome.acked > 50


@pytest.mark.parametrize("store", STORES)
def test_killed_at_each_step(store: str, grounds: Grounds) -> None:
    """
    Wherever on a row's way the process dies, the row is stored once.
    """
    outcome = death.kill_at_steps(grounds, store=store, trials=1)

    assert outcome.holds, outcome.line()


@pytest.mark.parametrize("store", STORES)
def test_other_ends(store: str, grounds: Grounds) -> None:
    """
    Nothing is lost by an exit, an abort, a signal or an exception, and none hangs.
    """
    outcome = death.die(grounds, store=store, trials=1)

    assert outcome.holds, outcome.line()


FROZEN = """
import sys, threading
import fasten
from fasten.spool import queue
from tests.faults.victim import settings_of

fasten.init(**settings_of(*sys.argv[1:]))
for target in ("first", "second"):  # from then on there is a mapped segment
    fasten.emit("USER_CREATED", target)
    assert fasten.flush(20)
inside = threading.Event()

def freeze(*_):
    queue.pack_header = known
    inside.set()
    threading.Event().wait()

known, queue.pack_header = queue.pack_header, freeze
threading.Thread(
    target=fasten.emit, args=("USER_CREATED", "half-way"), daemon=True
).start()
inside.wait()

class Late:
    def __del__(self):
        fasten.emit("USER_CREATED", "late")

sys.modules["late"] = Late()
"""


def test_emit_after_the_threads_are_gone(
    sqlite_dsn: str, tmp_path: Path, run_python: Any
) -> None:
    """
    A `__del__` at the very end does not wait for a thread that ended inside emit.
    """
    done = run_python(FROZEN, sqlite_dsn, str(tmp_path / "spool"), timeout=20)

    assert (0, "") == (done.returncode, done.stderr)
    inherit(sqlite_dsn, tmp_path / "spool")
    assert ["first", "second", "late"] == [row["target"] for row in rows_of(sqlite_dsn)]
