# SPDX-License-Identifier: Apache-2.0
"""
Short forms of the experiments in `stateful`.
"""

from __future__ import annotations

import pytest

from tests.faults import stateful
from tests.faults.grounds import Grounds


@pytest.mark.parametrize(("store", "trials"), [("sqlite", 5), ("postgres", 2)])
def test_any_order(store: str, trials: int, grounds: Grounds) -> None:
    """
    Whatever happens to services in whatever order, no row is lost or stored twice, and
    what damage cost is on record.
    """
    outcome = stateful.any_order(grounds, store=store, trials=trials, is_short=True)

    assert outcome.holds, outcome.line()
