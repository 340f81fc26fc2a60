# SPDX-License-Identifier: Apache-2.0
"""
OpenTelemetry: a real SDK that exports to memory.
"""

from __future__ import annotations

import asyncio
import json

import httpx
import pytest
from opentelemetry import trace
from opentelemetry.propagate import extract as otel_extract
from opentelemetry.propagate import inject as otel_inject
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

import fasten
from fasten.shim import extract, http, scope
from fasten_shims import otel
from tests.cli_runs import fasten_on, mounted, run, served

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
TRACEPARENT = f"00-{TRACE}-{SPAN}-03"


@pytest.fixture
def exported():
    """
    Install the shim on a provider of this test's own; yield (tracer, exporter).
    """
    provider, exporter = TracerProvider(shutdown_on_exit=False), InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    assert provider is otel.install(provider)
    assert provider is otel.install(provider)
    yield provider.get_tracer("test"), exporter
    fasten.context.remove_source(otel._running)
    provider.shutdown()


def finished(exporter):
    """
    Return the attributes of the exported spans, by name.
    """
    return {span.name: dict(span.attributes) for span in exporter.get_finished_spans()}


def ids_of(span):
    """
    Return (trace id, span id) as fasten writes them.
    """
    ids = span.get_span_context()
    return f"{ids.trace_id:032x}", f"{ids.span_id:016x}"


class TestSpans:
    def test_they_name_their_request(self, exported):
        """
        Spans that start in a scope carry its id, and those outside carry none.
        """
        tracer, exporter = exported
        with tracer.start_as_current_span("outside"):
            pass
        with fasten.bind("req-1"), tracer.start_as_current_span("outer"):
            with tracer.start_as_current_span("inner"):
                pass

        named = {"request_id": "req-1"}
        assert {"outside": {}, "outer": named, "inner": named} == finished(exporter)

    def test_a_trace_takes_the_requests_id(self, exported):
        """
        A trace that begins in a request has the request's id, if it may be one.
        """
        tracer, _ = exported
        uuid = "0193d1b4-7c1f-7a52-9b3e-0123456789ab"
        with fasten.bind() as ctx, tracer.start_as_current_span("minted") as span:
            assert ctx.request_id == ids_of(span)[0]
        with fasten.bind(uuid), tracer.start_as_current_span("a UUID") as span:
            assert uuid.replace("-", "") == ids_of(span)[0]
        with fasten.bind("req-1"), tracer.start_as_current_span("no trace id") as span:
            assert 32 == len(ids_of(span)[0])
        with scope("req-1", trace_id=TRACE), tracer.start_as_current_span("t") as span:
            assert TRACE == ids_of(span)[0]

    def test_only_random_ids_are_flagged_as_random(self, exported):
        """
        A sampler may not rely on an id that somebody may have chosen.
        """
        tracer, _ = exported
        with tracer.start_as_current_span("own") as own:
            assert own.get_span_context().trace_flags.random_trace_id
        with fasten.bind(), tracer.start_as_current_span("adopted") as adopted:
            assert not adopted.get_span_context().trace_flags.random_trace_id

    def test_a_servers_span_from_outside_of_the_scope(self, exported):
        """
        A span of a middleware outside of fasten's is named once the request is known.
        """
        tracer, exporter = exported

        async def application(_scope, _receive, send):
            fasten.log.info("served")
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b""})

        ours = http.RequestIDMiddleware(http.APILogger(application))

        async def instrumented(scope, receive, send):
            with tracer.start_as_current_span("server"):
                await ours(scope, receive, send)

        with fasten.testing.capture() as trail:
            answer = asyncio.run(get(instrumented, {}))

        rid = answer.headers["X-Request-ID"]
        assert {"server": {"request_id": rid}} == finished(exporter)
        (span,) = exporter.get_finished_spans()
        assert {ids_of(span)} == {
            (row["trace_id"], row["span_id"]) for row in trail.sys + trail.api
        }

    def test_a_span_round_many_messages_is_nobodys(self, exported):
        """
        The first of many messages does not give its id to the consumer's span.
        """
        tracer, exporter = exported
        with fasten.testing.capture(), tracer.start_as_current_span("batch"):
            for number in range(3):
                with scope(f"req-{number}", method="kafka"):
                    fasten.emit("ORDER_PLACED", "ord-1")

        assert {"batch": {}} == finished(exporter)


async def get(application, headers):
    """
    Ask an ASGI application once.
    """
    transport = httpx.ASGITransport(application)
    async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
        return await client.get("/", headers=headers)


class TestRows:
    def test_they_name_the_running_span(self, exported, fasten_trail):
        """
        Audit, sys and api rows have the trace and span that they were made in.
        """
        tracer, _ = exported
        with fasten.bind(), tracer.start_as_current_span("work") as span:
            fasten.emit("ORDER_PLACED", "ord-1")
            fasten.log.info("placed")
            fasten.record_api(method="GET", path="/", status=200, duration_ms=1)
        rows = [*fasten_trail.audit, *fasten_trail.sys, *fasten_trail.api]

        assert 3 == len(rows)
        assert {ids_of(span)} == {(row["trace_id"], row["span_id"]) for row in rows}

    def test_outside_of_a_span_they_name_none(self, exported, fasten_trail):
        """
        Without a span there is neither trace nor span.
        """
        fasten.emit("ORDER_PLACED", "ord-1")

        row = fasten_trail.assert_emitted("ORDER_PLACED")
        assert (None, None) == (row["trace_id"], row["span_id"])

    def test_a_broken_sdk_costs_no_row(self, exported, fasten_trail):
        """
        A span that raises when it is asked is counted, and the row is recorded.
        """

        class Broken(trace.NonRecordingSpan):
            def get_span_context(self):
                raise RuntimeError

        with trace.use_span(Broken(trace.INVALID_SPAN_CONTEXT)):
            fasten.emit("ORDER_PLACED", "ord-1")

        fasten_trail.assert_emitted("ORDER_PLACED", times=1)

    def test_every_reader_finds_a_trace(self, exported, store_dsn):
        """
        query(), the command line and the reader over HTTP filter by trace id.
        """
        tracer, _ = exported
        with fasten_on(store_dsn):
            for target in ("ord-1", "ord-2"):
                with fasten.bind(), tracer.start_as_current_span("work") as span:
                    fasten.emit("ORDER_PLACED", target)
            assert fasten.flush()
            trace_id, _ = ids_of(span)
            page = fasten.query(trace_id=trace_id)
            listed = run(
                *("tail", "--trace-id", trace_id, "-o", "ndjson"),
                FASTEN_AUDIT_DSN=store_dsn,
                FASTEN_SERVICE_ID="svc",
            )
            reader = mounted(fasten.reader.router(auth="none").wsgi)
            with served(reader) as url:
                answer = httpx.get(
                    f"{url}/api/v1/logs/audit",
                    params={"trace_id": trace_id},
                    trust_env=False,
                )

        assert ["ord-2"] == [row.target for row in page.rows]
        assert "ord-2" == json.loads(listed.output)["target"]
        assert ["ord-2"] == [row["target"] for row in answer.json()["rows"]]


class TestTraceparent:
    def test_a_service_that_knows_traces_only(self, exported):
        """
        Its `traceparent` gives the id; from us it gets one that gives the same back.
        """
        tracer, _ = exported
        rid = extract({"traceparent": TRACEPARENT})
        outgoing = {}
        context = otel_extract({"traceparent": TRACEPARENT})
        with scope(rid) as ctx, tracer.start_as_current_span("work", context=context):
            otel_inject(outgoing)

        assert TRACE == ctx.request_id == extract(outgoing)
        assert TRACE == outgoing["traceparent"].split("-")[1]

    def test_a_request_that_begins_here(self, exported):
        """
        A minted id reaches a service that reads `traceparent` only.
        """
        tracer, _ = exported
        outgoing = {}
        with fasten.bind() as ctx, tracer.start_as_current_span("work"):
            otel_inject(outgoing)

        assert ctx.request_id == extract(outgoing)

    def test_over_http(self, exported, fasten_trail):
        """
        Without X-Request-ID the trace is the request, in spans, rows and the answer.
        """
        tracer, exporter = exported

        async def application(_scope, _receive, send):
            with tracer.start_as_current_span("work"):
                fasten.emit("ORDER_PLACED", "ord-1")
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b""})

        ours = http.RequestIDMiddleware(http.APILogger(application))
        answer = asyncio.run(get(ours, {"traceparent": TRACEPARENT}))
        row = fasten_trail.assert_emitted("ORDER_PLACED")
        (span,) = exporter.get_finished_spans()

        assert TRACE == answer.headers["X-Request-ID"] == row["request_id"]
        assert (TRACE, row["span_id"]) == ids_of(span)
        assert {"request_id": TRACE} == dict(span.attributes)


def test_what_is_no_sdk_is_told():
    """
    The API's own provider has nothing to install on; the message says what has.
    """
    with pytest.raises(TypeError, match="TracerProvider of opentelemetry-sdk"):
        otel.install(trace.NoOpTracerProvider())
