# SPDX-License-Identifier: Apache-2.0
"""
What each shim costs per message, beside the bare client it wraps.

One message at a time goes the whole way, through the real client and its broker, and
is handled; with the shim it carries an id and is handled in its scope. Both take
turns. What is compared is the CPU time of this process, all threads of it: others on
the machine change it little.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

import fasten
from benchmarks import shims_brokers, shims_calls
from benchmarks.reference import settle
from benchmarks.shims_brokers import Pair

ROUNDS = 30
CALLS = 25

SHIMS: tuple[Callable[[Path], AbstractContextManager[Pair]], ...] = tuple(
    getattr(module, name)
    for module in (shims_brokers, shims_calls)
    for name in module.__all__
    if name != "Pair"
)


@pytest.mark.parametrize("shim", SHIMS, ids=lambda shim: shim.__name__)
def test_a_message(
    shim: Callable[[Path], AbstractContextManager[Pair]],
    tmp_path: Path,
    cost: Callable[[str, float, float], None],
) -> None:
    """
    Both ways in turn, each round the mean of its calls.
    """
    fasten.init(service_id="bench", node_id="bench-1", stdout="")
    with shim(tmp_path) as (bare, through), fasten.bind():
        for call in (bare, through):
            call()
        settle()
        for _ in range(ROUNDS):
            cost(shim.__name__, took_ns(bare), took_ns(through))
    fasten.close()


def took_ns(call: Callable[[], object]) -> float:
    """
    Return the CPU time of a call, on whichever threads.
    """
    before = time.process_time_ns()
    for _ in range(CALLS):
        call()
    return (time.process_time_ns() - before) / CALLS
