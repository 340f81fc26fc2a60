# SPDX-License-Identifier: Apache-2.0
"""
The pytest plugin: fixtures over `capture()`.

pytest loads this file in every run of every project that installs fasten, so it
imports nothing but pytest until a fixture is used.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from fasten.testing import Clock, Trail


@pytest.fixture
def fasten_trail() -> Iterator[Trail]:
    """
    Give the test a Trail of the rows that it makes fasten record.
    """
    from fasten.testing import capture

    with capture() as trail:
        yield trail


@pytest.fixture
def fasten_clock(fasten_trail: Trail) -> Clock:
    """
    Give the test the clock that its rows are stamped by.
    """
    return fasten_trail.clock
