# SPDX-License-Identifier: Apache-2.0
"""
Row log: what `processors.chain()` adds to a structlog line.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import fasten
from benchmarks.reference import (
    as_line,
    events,
    latencies_ns,
    median,
    settle,
    structlog_line,
)
from fasten.processors import chain

ROUNDS = 9
CALLS = 2000


@pytest.mark.parametrize(("row", "rate"), [("log", 0.0), ("log/s", 500.0)])
def test_a_structlog_line_the_chain(
    benchmark: Any, figure: Callable[..., None], row: str, rate: float
) -> None:
    """
    Redaction, the copy into the ring and correlation, beside the bare line.
    """
    calls = int(rate) or CALLS
    fasten.init(service_id="bench", node_id="bench-1", stdout="")
    bare, ours = structlog_line(), structlog_line(*chain())
    with fasten.bind(tenant_id="acme"):
        for number in range(ROUNDS):
            lines = [as_line(e) for e in events(calls, start=number * calls)]
            settle()
            without = latencies_ns(bare, lines, rate)
            settle()
            with_chain = latencies_ns(ours, lines, rate)
            figure(row, median(with_chain) / median(without))
        benchmark.pedantic(ours, kwargs=lines[0], rounds=200, iterations=1)
    fasten.close()
