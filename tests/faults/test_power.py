# SPDX-License-Identifier: Apache-2.0
"""
Short forms of the experiments in `power`.
"""

from __future__ import annotations

from tests.faults import power
from tests.faults.grounds import Grounds


def test_power_cuts(grounds: Grounds) -> None:
    """
    With `durability=power` what was acknowledged outlives a disk that forgets all that
    was not synced.
    """
    outcome = power.power(grounds, store="sqlite", trials=3)

    assert outcome.holds, outcome.line()


def test_power_cuts_and_failing_syncs(grounds: Grounds) -> None:
    """
    It does where syncs fail: no second sync of the same pages is trusted.
    """
    outcome = power.power_and_errors(grounds, store="postgres", trials=3)

    assert outcome.holds, outcome.line()
