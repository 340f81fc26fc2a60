# SPDX-License-Identifier: Apache-2.0
"""
Short forms of the experiments in `death`.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.death import kill_at_random


@pytest.mark.parametrize("kind", ["plain", "signals", "del"])
def test_a_killed_victim_loses_nothing(kind: str, store_dsn: str, tmp_path: Path) -> None:
    """
    Rows whose emit returned before kill -9 are stored once, and no others are.
    """
    outcome = kill_at_random(store_dsn, tmp_path / "spool", trials=8, kind=kind)

    assert outcome.holds, outcome.line()
    assert outcome.acked > 100
