# SPDX-License-Identifier: Apache-2.0
"""
Row log: what `processors.chain()` adds to a structlog line.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from structlog.contextvars import bound_contextvars, merge_contextvars

import fasten
from benchmarks.reference import (
    STAMPS,
    as_line,
    events,
    latencies_ns,
    median,
    settle,
    structlog_logger,
)
from fasten.processors import chain

ROUNDS = 9
CALLS = 2000


@pytest.mark.parametrize(
    ("row", "rate"),
    [("log", 0.0), ("log/s", 500.0), ("log/keys", 0.0), ("log/behind", 0.0)],
)
def test_a_structlog_line_the_chain(
    benchmark: Any, figure: Callable[..., None], row: str, rate: float
) -> None:
    """
    A line of `[*chain(), renderer]`, beside one of structlog's own processors.

    That is S, which has no request id, service, node and tenant; in `log/keys` it is
    the same line, with them, in structlog's own way; in `log/behind`, too, and the
    chain stands behind the processors that have added level and time already.
    """
    calls = int(rate) or CALLS
    fasten.init(service_id="bench", node_id="bench-1", stdout="")
    merge = () if row in ("log", "log/s") else (merge_contextvars,)
    without = structlog_logger((*STAMPS, *merge))
    ours = structlog_logger((*(STAMPS if row == "log/behind" else ()), *chain()))
    with fasten.bind(tenant_id="acme") as context, bound_contextvars(**_keys(context)):
        assert not merge or _added(*STAMPS, *merge) == _added(*chain())
        for number in range(ROUNDS):
            lines = [as_line(e) for e in events(calls, start=number * calls)]
            settle()
            bare = latencies_ns(without, "info", lines, rate)
            settle()
            with_chain = latencies_ns(ours, "info", lines, rate)
            figure(row, median(with_chain) / median(bare))
        benchmark.pedantic(ours.info, kwargs=lines[0], rounds=200, iterations=1)
    fasten.close()


def _keys(context: Any) -> dict[str, str]:
    return {
        "request_id": context.request_id,
        "service_id": "bench",
        "source_node_id": "bench-1",
        "tenant_id": "acme",
    }


def _added(*processors: Any) -> dict[str, Any]:
    """
    Return what *processors* add to an event: of its time, that it is there.
    """
    event: Any = {}
    for processor in processors:
        event = processor(None, "info", event)
    return {**event, "timestamp": bool(event["timestamp"])}
