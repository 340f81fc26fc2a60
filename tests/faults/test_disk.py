# SPDX-License-Identifier: Apache-2.0
"""
Short forms of the experiments in `disk`.
"""

from __future__ import annotations

import pytest

from tests.faults import disk
from tests.faults.grounds import STORES, Grounds

# What stores and files do is the same for every interpreter.
pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("name", "trials"),
    [
        ("spool-odd-files", 1),
        ("spool-removed", 1),
        ("spool-damaged", 2),
        ("spool-cut", 1),
        ("spool-ulimit", 1),
    ],
)
def test_files(name: str, trials: int, grounds: Grounds) -> None:
    """
    Whatever happens to the files, each row is stored once, or owned up to.
    """
    outcome = disk.EXPERIMENTS[name](grounds, trials=trials)

    assert outcome.holds, outcome.line()


@pytest.mark.parametrize("name", ["spool-full", "sqlite-full"])
def test_full_disks(name: str, grounds: Grounds) -> None:
    """
    A full disk costs no row silently, and is forgotten once there is room.
    """
    if not disk.can_mount(grounds.folder):
        pytest.skip("a tmpfs cannot be mounted here")
    outcome = disk.EXPERIMENTS[name](grounds, trials=1)

    assert outcome.holds, outcome.line()


@pytest.mark.parametrize("store", STORES)
def test_poison(store: str, grounds: Grounds) -> None:
    """
    One refused row among many is put aside with a record; all others are stored.
    """
    outcome = disk.poison(grounds, store=store, trials=1)

    assert outcome.holds, outcome.line()
    assert outcome.quarantined


def test_a_crowd(grounds: Grounds) -> None:
    """
    Eight processes share one SQLite file.
    """
    outcome = disk.crowd(grounds, store="sqlite", trials=50)

    assert outcome.holds, outcome.line()
