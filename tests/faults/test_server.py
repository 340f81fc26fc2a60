# SPDX-License-Identifier: Apache-2.0
"""
Short forms of the experiments in `server`.
"""

from __future__ import annotations

import pytest

from tests.faults import server
from tests.faults.grounds import Grounds

# What stores and files do is the same for every interpreter.
pytestmark = pytest.mark.slow

SHORT = {"reply-lost": 20, "commit-lost": 5, "cut": 5, "terminated": 5}


@pytest.mark.parametrize("way", [way for way in server.WAYS if way != "up"])
def test_on_the_way(way: str, grounds: Grounds) -> None:
    """
    Rows outlive it, health tells it and that it is over, and no secret gets out.
    """
    outcome = server.on_the_way(
        grounds, way=way, trials=SHORT.get(way, 1), is_bounded=False
    )

    assert outcome.holds, outcome.line()


def test_restarts(grounds: Grounds) -> None:
    """
    A server may restart in any way while rows come.
    """
    outcome = server.restarts(grounds, trials=1)

    assert outcome.holds, outcome.line()


def test_operators(grounds: Grounds) -> None:
    """
    What an operator has to mend is told with its cure, and rows wait for it.
    """
    outcome = server.operators(grounds, trials=1)

    assert outcome.holds, outcome.line()
