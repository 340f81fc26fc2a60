# SPDX-License-Identifier: Apache-2.0
"""
Short forms of the histories; `make faults ARGS="untouched verify"` tells many more.
"""

from __future__ import annotations

import pytest

from tests.faults import histories
from tests.faults.grounds import STORES, Grounds

# What stores and files do is the same for every interpreter.
pytestmark = pytest.mark.slow


@pytest.mark.parametrize("store", STORES)
def test_untouched_histories_never_alarm(store: str, grounds: Grounds) -> None:
    """
    Whatever was emitted, replayed, swept, held, erased, signed or restored.
    """
    outcome = histories.live_untouched(grounds, store=store, trials=16)

    assert () == outcome.faults
    assert outcome.stored > 20


@pytest.mark.parametrize("store", STORES)
def test_verify_beside_writers(store: str, grounds: Grounds) -> None:
    """
    Eight processes write meanwhile, rows are swept and erased: no alarm.
    """
    outcome = histories.verify_beside_writers(grounds, store=store, trials=4)

    assert () == outcome.faults
    assert 0 == outcome.verify
    assert outcome.emitted >= 8
