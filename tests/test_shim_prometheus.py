# SPDX-License-Identifier: Apache-2.0
"""
Prometheus: the real client, its registry and both of its formats.
"""

from __future__ import annotations

import pytest
from prometheus_client import REGISTRY, CollectorRegistry, Counter, generate_latest
from prometheus_client.openmetrics.exposition import (
    generate_latest as generate_openmetrics,
)
from prometheus_client.openmetrics.parser import text_string_to_metric_families

import fasten
from fasten_shims import prometheus
from tests.cli_runs import fasten_on

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"


class TestExemplar:
    @pytest.mark.parametrize(
        ("rid", "trace_id", "names"),
        [
            ("a" * 32, None, ["request_id"]),
            ("a" * 32, TRACE, ["request_id", "trace_id"]),
            ("a" * 78, TRACE, ["request_id", "trace_id"]),
            ("a" * 79, TRACE, ["trace_id"]),
            ("a" * 118, None, ["request_id"]),
            ("a" * 119, None, []),
            ("a" * 128, TRACE, ["trace_id"]),
        ],
    )
    def test_it_stays_within_128_characters(self, rid, trace_id, names):
        """
        The client takes each; where both are too long the request id gives way.
        """
        registry = CollectorRegistry()
        counter = Counter("orders", "Orders.", registry=registry)
        with fasten.bind(rid, trace_id=trace_id):
            labels = prometheus.exemplar()
            counter.inc(exemplar=labels)
        text = generate_openmetrics(registry).decode()

        known = {"request_id": rid, "trace_id": trace_id}
        assert {name: known[name] for name in names} == labels
        for value in labels.values():
            assert value in text

    def test_outside_of_a_request_it_is_empty(self):
        """
        No request, no labels; the client takes that, too.
        """
        counter = Counter("orders", "Orders.", registry=CollectorRegistry())
        counter.inc(exemplar=prometheus.exemplar())

        assert {} == prometheus.exemplar()


def scrape(registry):
    """
    Return the samples of a scrape in the OpenMetrics format, by name.
    """
    text = generate_openmetrics(registry).decode()
    return {
        sample.name: sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


class TestInstall:
    def test_the_counters_are_those_of_stats(self, sqlite_dsn):
        """
        What was emitted and stored is counted, and the queue is measured.
        """
        registry = prometheus.install(CollectorRegistry())
        with fasten_on(sqlite_dsn, queue_capacity=500):
            for number in range(7):
                fasten.emit("ORDER_PLACED", f"ord-{number}")
            assert fasten.flush()
            found, stats = scrape(registry), fasten.stats()

        assert stats["emitted"] == found["fasten_emitted_total"] >= 7
        assert stats["stored"] == found["fasten_stored_total"] >= 7
        assert (0, 500) == (
            found["fasten_queue_depth"],
            found["fasten_queue_capacity"],
        )
        assert stats["high_water"] == found["fasten_queue_high_water"]
        assert (0, 1) == (found["fasten_dropped_total"], found["fasten_healthy"])

    def test_a_store_that_is_down_shows(self, tmp_path):
        """
        Rows that wait have a depth and an age, and health is 0.
        """
        registry = prometheus.install(CollectorRegistry())
        (tmp_path / "no-directory").write_text("")
        dsn = f"sqlite:///{tmp_path / 'no-directory' / 'audit.db'}"
        spool = str(tmp_path / "spool")
        fasten.init(service_id="svc", stdout="", audit_dsn=dsn, spool_dir=spool)
        fasten.emit("ORDER_PLACED", "ord-1")
        assert not fasten.flush(1.0)
        found = scrape(registry)

        assert found["fasten_queue_depth"] >= 1
        assert found["fasten_oldest_undelivered_seconds"] > 0
        assert 0 == found["fasten_healthy"]

    def test_a_scrape_never_fails(self):
        """
        Before init() a scrape has zeros, after close() the last counts.
        """
        registry = prometheus.install(CollectorRegistry())
        before = scrape(registry)
        fasten.init(service_id="svc", stdout="")
        fasten.emit("ORDER_PLACED", "ord-1")
        fasten.close()
        after = scrape(registry)

        assert 0 == before["fasten_emitted_total"] == before["fasten_healthy"]
        assert after["fasten_emitted_total"] >= 1

    def test_twice_is_once(self):
        """
        A second call changes nothing, on the default registry either.
        """
        registry = CollectorRegistry()

        assert registry is prometheus.install(prometheus.install(registry))
        assert 1 == generate_latest(registry).count(b"# TYPE fasten_healthy ")

    def test_without_a_registry_it_is_the_default_one(self):
        """
        `install()` serves what `prometheus_client.make_asgi_app()` serves.
        """
        assert REGISTRY is prometheus.install()

        try:
            assert b"fasten_emitted_total" in generate_latest(REGISTRY)
        finally:
            collector = REGISTRY._names_to_collectors["fasten_healthy"]
            REGISTRY.unregister(collector)
            del REGISTRY._fasten_installed
