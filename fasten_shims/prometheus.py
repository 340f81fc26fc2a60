# SPDX-License-Identifier: Apache-2.0
"""
The current request on Prometheus' exemplars, and fasten's own counters as metrics.

Exemplars are part of the OpenMetrics format only. A scrape reads the counters of
one process: with several workers behind one port each must be scraped.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import fasten
from fasten.context import correlation, current_request_id

__all__ = ["exemplar", "install"]

MAX_EXEMPLAR: Final = 128
"""Characters of an exemplar's labels, names and values together (OpenMetrics 1.0)."""

_COUNTERS: Final = {
    "emitted": "Audit rows that emit() took.",
    "stored": "Audit rows that the store has committed.",
    "retried": "Batches that were sent again after an error of the store.",
    "spooled": "Audit rows written to the journal.",
    "replayed": "Audit rows of processes that died, delivered by this one.",
    "quarantined": "Rows that the store refuses, set aside.",
    "dropped": "Audit rows lost for want of room.",
    "moved": "Audit rows moved from the outbox to the store.",
    "mistakes": "Mistakes of callers that FASTEN_STRICT=off let through.",
}
_GAUGES: Final = {
    "queue_depth": ("depth", "Audit rows that wait for the store."),
    "queue_capacity": ("capacity", "Audit rows that the memory queue holds."),
    "queue_high_water": ("high_water", "The most rows that ever waited."),
    "oldest_undelivered_seconds": (
        "oldest_undelivered_s",
        "Age of the oldest row that waits for the store.",
    ),
}


def exemplar() -> dict[str, str]:
    """
    Return the labels of an exemplar: the current request's id and its trace's.

    `counter.inc(exemplar=exemplar())`. Where both are over 128 characters, names
    included, the request id gives way. Outside a request and a trace it is empty.
    """
    _, _, trace_id, _ = correlation()
    ids = {"request_id": current_request_id(), "trace_id": trace_id}
    labels = {name: value for name, value in ids.items() if value is not None}
    if _length(labels) > MAX_EXEMPLAR:
        labels.pop("request_id", None)
    return labels


def _length(labels: dict[str, str]) -> int:
    return sum(len(name) + len(value) for name, value in labels.items())


def install(registry: Any = None) -> Any:
    """
    Register fasten's metrics with *registry*, or with the default one; return it.

    A scrape never fails because of them: before `init()` all counters are 0. Twice
    does nothing.
    """
    if registry is None:
        from prometheus_client import REGISTRY as registry  # noqa: N811
    if not getattr(registry, "_fasten_installed", False):
        registry.register(_Collector())
        registry._fasten_installed = True  # noqa: SLF001  (ours)
    return registry


class _Collector:
    """
    Reads the counters anew at each scrape.
    """

    def describe(self) -> Iterator[Any]:
        """
        Yield the metrics without reading anything: asked when it is registered.
        """
        return _metrics({})

    def collect(self) -> Iterator[Any]:
        """
        Yield the metrics.
        """
        try:
            health = fasten.health()
        except Exception:  # before init(), after close(): a scrape must not fail
            health = {}
        return _metrics(health)


def _metrics(health: dict[str, Any]) -> Iterator[Any]:
    from prometheus_client.metrics_core import (
        CounterMetricFamily,
        GaugeMetricFamily,
    )

    for name, help_text in _COUNTERS.items():
        yield CounterMetricFamily(
            f"fasten_{name}", help_text, value=_number(health.get(name))
        )
    for name, (key, help_text) in _GAUGES.items():
        yield GaugeMetricFamily(
            f"fasten_{name}", help_text, value=_number(health.get(key))
        )
    yield GaugeMetricFamily(
        "fasten_healthy",
        "1 while rows are being delivered: health() says ok.",
        value=float(health.get("state") == "ok"),
    )


def _number(value: object) -> float:
    return float(value) if isinstance(value, (int, float)) else 0.0
