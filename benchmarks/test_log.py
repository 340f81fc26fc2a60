# SPDX-License-Identifier: Apache-2.0
"""
Row log: what `processors.chain()` adds to a structlog line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
from structlog.contextvars import bound_contextvars, merge_contextvars

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


@pytest.mark.parametrize(
    ("row", "rate"), [("log", 0.0), ("log/s", 500.0), ("log/keys", 0.0)]
)
def test_a_structlog_line_the_chain(
    benchmark: Any, figure: Callable[..., None], row: str, rate: float
) -> None:
    """
    Redaction, the copy into the ring and correlation, beside the line without them.

    That is S, which has no request id, service, node and tenant; in `log/keys` it is
    the line that has them too, in structlog's own way.
    """
    calls = int(rate) or CALLS
    fasten.init(service_id="bench", node_id="bench-1", stdout="")
    own = (merge_contextvars,) if row == "log/keys" else ()
    without, ours = structlog_line(*own), structlog_line(*chain())
    with fasten.bind(tenant_id="acme") as context, bound_contextvars(**_keys(context)):
        assert row != "log/keys" or _keys(context) == _added(own, chain())
        for number in range(ROUNDS):
            lines = [as_line(e) for e in events(calls, start=number * calls)]
            settle()
            bare = latencies_ns(without, lines, rate)
            settle()
            with_chain = latencies_ns(ours, lines, rate)
            figure(row, median(with_chain) / median(bare))
        benchmark.pedantic(ours, kwargs=lines[0], rounds=200, iterations=1)
    fasten.close()


def _keys(context: Any) -> dict[str, str]:
    return {
        "request_id": context.request_id,
        "service_id": "bench",
        "source_node_id": "bench-1",
        "tenant_id": "acme",
    }


def _added(*ways: Iterable[Any]) -> dict[str, Any]:
    """
    Return what each of several lists of processors adds to an event: the same.
    """
    events = []
    for processors in ways:
        event: Any = {}
        for processor in processors:
            event = processor(None, "info", event)
        events.append(event)

    assert events[1:] == events[:-1]
    return events[0]
