# SPDX-License-Identifier: Apache-2.0
"""
Short forms of the forgeries; `make faults ARGS=forged` tries every one there is.
"""

from __future__ import annotations

import pytest

from tests.faults import forgery
from tests.faults.grounds import STORES, Grounds

# What stores and files do is the same for every interpreter.
pytestmark = pytest.mark.slow


@pytest.mark.parametrize("store", STORES)
def test_an_edited_column_is_found(store: str, grounds: Grounds) -> None:
    """
    In whichever column and row it is, in the chain where it is; advisory ones apart.
    """
    outcome = forgery.forge_columns(grounds, store=store, trials=10, rounds=1)

    assert () == outcome.faults
    assert outcome.trials > 250


@pytest.mark.parametrize("store", STORES)
def test_edits_beside_the_rows_are_found(store: str, grounds: Grounds) -> None:
    """
    Heads, node rows and checkpoints are evidence, too.
    """
    outcome = forgery.forge_sides(grounds, store=store, trials=30)

    assert () == outcome.faults
    assert outcome.trials > 20


@pytest.mark.parametrize("store", STORES)
def test_rows_that_come_and_go_are_found(store: str, grounds: Grounds) -> None:
    """
    Deleted, swapped, inserted, erased, sealed anew, rewound.
    """
    outcome = forgery.forge_rows(grounds, store=store, trials=30)

    assert () == outcome.faults
    assert 30 == outcome.trials
