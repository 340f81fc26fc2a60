# SPDX-License-Identifier: Apache-2.0
"""
Grounds for the short forms of the experiments.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.faults.grounds import Grounds


@pytest.fixture
def grounds(request: pytest.FixtureRequest, tmp_path: Path) -> Grounds:
    """
    Return an experiment's place; servers come up when they are asked for.
    """

    def fixture(name: str) -> Any:
        return request.getfixturevalue(name)

    return Grounds(
        folder=tmp_path,
        new_database=lambda: fixture("postgres_dsn"),
        new_server=lambda: fixture("private_postgres"),
    )
