# SPDX-License-Identifier: Apache-2.0
"""
The whole public surface, used as a program would: for type checkers, never executed.

`mypy --strict` and pyright in strict mode must find nothing here; `tests/test_typing`
sees to it that no public name is left out.
"""

from __future__ import annotations

import logging
import unittest
from collections.abc import Mapping
from concurrent.futures import Future
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
import structlog

import fasten
from fasten import (
    ApiRow,
    AuditRow,
    AuditStoreError,
    CodeConflict,
    Context,
    ContextThreadPoolExecutor,
    Engine,
    FastenError,
    InvalidAnchor,
    InvalidCodes,
    InvalidQuery,
    MissingExtra,
    NotInitialized,
    NotInScope,
    Page,
    QueueFull,
    SettingsError,
    SysRow,
    UnknownCode,
    processors,
    shim,
)
from fasten.codes import (
    ActorKind,
    Meta,
    Method,
    Outcome,
    Registry,
    RetentionClass,
    Severity,
)
from fasten.reader import ALL_TENANTS, Principal, bearer, router
from fasten.shim import Carrier, extract, inject, scope
from fasten.shim.django import orm
from fasten.shim.django.apps import FastenConfig
from fasten.shim.stdlib import LoggingHandler, install_record_factory
from fasten.testing import Clock, Trail, capture


def life() -> None:
    """
    Start, look at and stop fasten.
    """
    engine: Engine = fasten.init(
        service_id="shop", audit_dsn="sqlite:///./audit.db", queue_capacity=100
    )
    state: dict[str, Any] = fasten.health()
    counted: dict[str, Any] = fasten.stats()
    done: bool = fasten.flush(timeout=1.5) and fasten.close(2)
    version: str = fasten.__version__
    print(engine.settings.service_id, state["state"], counted, done, version)


def emitting() -> None:
    """
    Emit with every anchor, as text, number, UUID and enum.
    """
    first: str = fasten.emit("USER_CREATED", "u-42")
    fasten.emit("USER_UPDATED", "u-42", detail=fasten.changes({"a": 1}, {"a": 2}))
    fasten.emit(code="USER_CREATED", target=42, actor=UUID(int=1))
    fasten.emit(
        "ORDER_PLACED",
        "ord-9001",
        actor="admin",
        actor_kind=ActorKind.ADMIN,
        outcome=Outcome.DENIED,
        method=Method.UI,
        severity=Severity.WARN,
        detail={"amount": 12.5, "lines": [1, 2]},
        tenant_id="t-1",
        on_behalf_of="boss",
        reason="asked to",
        client="203.0.113.7",
        connection=None,
    )
    fasten.record_api(method="GET", path="/", status=200, duration_ms=1.5)
    print(first.upper())


async def emitting_later() -> None:
    """
    The twins for event loops.
    """
    later: str = await fasten.aemit("USER_CREATED", "u-42", actor="admin")
    page: Page = await fasten.aquery("audit", actor="admin")
    flushed: bool = await fasten.aflush(1.0)
    print(later, page.next, flushed)


def logging_lines() -> None:
    """
    The log object: methods, binding, positional arguments.
    """
    bound = fasten.log.bind(user_id="u-42")
    bound.debug("one")
    bound.info("two", count=2)
    bound.warn("three")
    bound.warning("four %s", "five")
    bound.error("six")
    bound.critical("seven")
    bound.exception("eight")
    bound.unbind("user_id").new(a=1).info("nine")
    logging.getLogger("fasten").setLevel(logging.WARNING)


def context() -> None:
    """
    Scopes, and what they hold.
    """
    with fasten.bind("a1b2c3d4", actor="u-1", trace_id="ab" * 16) as cell:
        held: Context = cell
        rid: str = held.request_id
        now: Context | None = fasten.current()
        same: str | None = fasten.current_request_id()
        fasten.identify(actor="u-1", actor_kind="user", tenant_id="t-1")
    with fasten.with_request_id() as other:
        print(other, rid, now, same, fasten.mint_request_id())
    carried = fasten.carry(length)
    number: int = carried("text")
    with ContextThreadPoolExecutor(max_workers=2) as pool:
        future: Future[int] = pool.submit(length, "text")
        print(number + future.result())
    fasten.add_source(trace)
    fasten.context.add_source(trace)


def length(text: str) -> int:
    """
    Count characters, in whatever thread.
    """
    return len(text)


def trace() -> dict[str, str]:
    """
    Say where a tracer stands.
    """
    return {"trace_id": "ab" * 16, "span_id": "cd" * 8}


def reading() -> None:
    """
    Queries, pages, rows.
    """
    page: Page = fasten.query("audit", order="asc", limit=10, actor="admin", since="2h")
    for row in page.rows:
        if isinstance(row, AuditRow):
            detail: dict[str, Any] | None = row.detail
            number: int | None = row.monotonic_seq
            print(row.code, row.actor, detail, number, row.to_dict()["hash"])
        elif isinstance(row, SysRow):
            print(row.level, row.event, row.fields)
        elif isinstance(row, ApiRow):
            print(row.status, row.duration_ms, row.bytes)
    print(page.next, page.completeness, page.total, len(fasten.trail("a1b2c3d4")))
    report = fasten.verify(key="shop+1234abcd+AbCd", require_anchor=True)
    print(report.ok, report.status, [str(finding) for finding in report.findings])


def codes() -> None:
    """
    Registering, loading, looking up.
    """
    fasten.codes.register(
        "shop",
        {
            "CART_FILLED": Meta(
                severity=Severity.WARN,
                retention_class="long",
                pii_in_detail=False,
                on_failure="raise",
                description="Somebody filled a cart.",
                detail={"items": "int", "note": "str?"},
            ),
            "CART_EMPTIED": Meta(..., retention_class=RetentionClass.SHORT),
        },
    )
    fasten.codes.load("fleet.codes.yaml")
    fasten.codes.reload()
    lines: list[str] = fasten.codes.dump()
    meta: Meta = fasten.codes.meta("CART_FILLED")
    own = Registry()
    own.register("shop", {"X_Y": meta})
    print(lines, meta.severity, meta.detail)


def errors(given: Mapping[str, Any]) -> None:
    """
    What may be raised, each also a child of a builtin.
    """
    try:
        fasten.emit(**given)
    except AuditStoreError as error:
        print(error.id, error.ambiguous)
    except InvalidQuery as error:
        print(error.parameter)
    except (UnknownCode, CodeConflict, InvalidCodes, InvalidAnchor) as error:
        print(error)
    except (NotInitialized, NotInScope, QueueFull, MissingExtra, SettingsError):
        raise
    except FastenError as error:
        base: Exception = error
        raise base from error


def faces() -> None:
    """
    Reader and shims.
    """
    mounted = router(auth=bearer({"secret": Principal("ops", tenant=ALL_TENANTS)}))
    same = fasten.reader.router(auth="none")
    print(mounted.wsgi, same)
    carrier = Headers()
    inject(carrier)
    with scope(extract(carrier)):
        print(fasten.current_request_id())
    print(fasten.shim.inject, fasten.processors.chain(), fasten.processors.SysTee())


async def messages(client: Any, message: Any) -> None:
    """
    Shims of brokers: publish, scope, handlers by topic.
    """
    router = shim.mqtt.Router()

    @router.handler("devices/+/setpoint")
    def on_setpoint(_message: Any, ctx: Context) -> str:
        return ctx.request_id

    @shim.mqtt.handler("devices/#")
    async def on_any(_message: Any, ctx: Context) -> None:
        print(ctx.client)

    said: str = on_setpoint(message, Context("a1b2c3d4"))
    router.attach(client)
    shim.mqtt.attach(client)
    await shim.mqtt.publish(client, "devices/42", {"celsius": 22.5}, qos=1)
    print(shim.mqtt.publish_sync(client, "devices/42", b"", retain=True), said, on_any)
    await shim.mqtt.dispatch(message)
    await shim.nats.publish(client, "orders.eu", b"{}", headers={"a": "b"})
    await shim.amqp.publish(client, message, "orders.eu", mandatory=True)
    print(shim.kafka.publish(client, "orders", b"{}", key=b"k"))
    await shim.nats.Router().dispatch(message)
    await shim.amqp.Router().dispatch(message)
    shim.kafka.Router().dispatch_sync(message)
    shim.nats.handler("orders.>")(print)
    shim.amqp.handler("orders.#")(print)
    shim.kafka.handler("orders")(print)
    await shim.nats.dispatch(message)
    await shim.amqp.dispatch(message)
    await shim.kafka.dispatch(message)
    shim.kafka.dispatch_sync(message)
    with shim.nats.scope(message) as first, shim.amqp.scope(message) as second:
        print(first.request_id, second.client)
    with shim.kafka.scope(message) as third:
        held: Context = third
        print(held)


@shim.scheduler.instrument
def nightly(table: str) -> int:
    """
    Be run by a scheduler; keep a signature.
    """
    return len(table)


@shim.scheduler.instrument(code="BATCH_PROCESSED", target="shipping")
async def hourly() -> None:
    """
    Be run by another one, and recorded.
    """


@shim.agent.tool("search", actor="agent-7", with_arguments=True)
def search(text: str, limit: int = 3) -> list[str]:
    """
    Be a tool, or refuse.
    """
    if not text:
        raise shim.agent.Refused("nothing to look for")
    return [text] * limit


@shim.agent.tool
async def ask(text: str) -> str:
    """
    Be a tool that is awaited.
    """
    return text


async def jobs_and_tools() -> None:
    """
    What was decorated is called as before.
    """
    count: int = nightly("audit_log")
    await hourly()
    found: list[str] = search("shoes", limit=count)
    answer: str = await ask(found[0])
    with shim.agent.tool("llm") as call:
        noted: shim.agent.Call = call
        noted.record(cost_usd=0.004, tokens=812, model="m-1")
        noted.refuse("not today")
        noted.fail("no answer")
        noted.note(ValueError(answer))


def task_queues(app: Any) -> None:
    """
    Shims of task queues.
    """
    print(shim.dramatiq.install(app), shim.huey.install(app), shim.celery.install(app))
    queue: shim.rq.Queue = shim.rq.Queue("orders", connection=app)
    job_class: type[shim.rq.Job] = shim.rq.Job
    print(queue, job_class)


def outgoing(text: str) -> None:
    """
    What goes out: a client that is installed on is still that client.
    """
    same: str = shim.httpx.install(text) + shim.requests.install(text)
    child: dict[str, str] = shim.subprocess.env({"PATH": "/bin"})
    with shim.subprocess.inherited() as ctx:
        print(same, child[shim.subprocess.VARIABLE] == ctx.request_id)


def metrics(provider: Any, registry: Any) -> None:
    """
    Traces and metrics.
    """
    labels: dict[str, str] = shim.prometheus.exemplar()
    print(shim.otel.install(provider), shim.otel.ATTRIBUTE, labels)
    print(shim.prometheus.install(), shim.prometheus.install(registry))


def webs(asgi: Any, wsgi: Any, flask: Any) -> None:
    """
    Middlewares of ASGI, WSGI and Flask.
    """
    logger = shim.http.APILogger(asgi, skip=["/health"], client=user_of)
    app = shim.http.RequestIDMiddleware(logger, actor=user_of, tenant=user_of)
    wrapped: shim.http.RequestIDMiddleware = shim.http.wrap(asgi, actor=user_of)
    print(app, wrapped, shim.http.exception_handler)
    logged = shim.wsgi.APILogger(wsgi, skip="/health")
    print(shim.wsgi.RequestIDMiddleware(logged, actor=user_of))
    print(shim.flask.RequestIDMiddleware(wsgi), shim.flask.APILogger(wsgi))
    shim.flask.init_app(flask, skip="/health", actor=user_of)


def user_of(request: Any) -> str | None:
    """
    Name whoever asks.
    """
    return str(request["user"]) if "user" in request else None


def frameworks(get_response: Any, sessions: Any) -> None:
    """
    Django's middlewares and application; what ORMs change.
    """
    inner = shim.django.APILogger(get_response, skip="/health")
    print(shim.django.RequestIDMiddleware(inner, actor=shim.django.username))
    options: dict[str, Any] = shim.django.options()
    print(options, FastenConfig.name)
    end = shim.sqlalchemy.install(
        sessions,
        {UUID: shim.sqlalchemy.Record("USER", exclude=["password"], fields=["email"])},
    )
    end()
    orm.install({UUID: orm.Record("USER", created="USER_CREATED", deleted=None)})()


def calls() -> None:
    """
    Interceptors of gRPC; MCP gives back what it gets.
    """
    print(shim.grpc.ServerInterceptor(), shim.grpc.ClientInterceptor())
    print(shim.grpc.AioServerInterceptor(), *shim.grpc.aio_client_interceptors())
    name: str = shim.mcp.server("what is given", with_arguments=True)
    print(name, shim.mcp.client(name))


def structlog_chain() -> None:
    """
    In a structlog of one's own, and without any.
    """
    structlog.configure(
        processors=[*processors.chain(), structlog.processors.JSONRenderer()]
    )
    structlog.configure(
        processors=[
            processors.redact,
            processors.SysTee(is_redacted=True, is_printed=False),
            processors.add_correlation,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
    )
    structlog.stdlib.ProcessorFormatter(
        processor=structlog.dev.ConsoleRenderer(),
        foreign_pre_chain=processors.chain(),
    )
    handler: logging.Handler = LoggingHandler(level=logging.INFO)
    before = install_record_factory()
    logging.setLogRecordFactory(before)
    logging.getLogger().addHandler(handler)


def evidence() -> None:
    """
    What an operator does from a program: sweep, erase, verify.
    """
    swept = fasten.sweep()
    fasten.sweep(now=datetime(2027, 1, 1, tzinfo=UTC))
    by_class: dict[str, int] = swept.by_class
    erased = fasten.erase(actor=42, reason="asked for", fields=["actor", "detail"])
    fasten.erase(id="evt-1", reason="asked for", dry_run=True, ledger="erased.ndjson")
    left: list[str] = [*erased.held, *erased.lagging, *erased.remains]
    report = fasten.verify(checkpoint="monday.note", key=["shop.vkey"])
    fasten.verify("export.ndjson", require_anchor=True)
    found: list[str] = [finding.message for finding in report.findings]
    print(by_class, left, erased.is_complete, report.ok, report.status, found)


def trails() -> None:
    """
    What a test asks of what was recorded, in a with-statement.
    """
    with capture(service_id="shop") as trail, fasten.testing.capture():
        found: dict[str, Any] = trail.assert_emitted(
            "USER_CREATED", times=1, target=42, since="2h", detail={"email": "a@b"}
        )
        trail.assert_not_emitted("USER_DELETED", actor="admin")
        rid: str = trail.assert_correlated()
        rows: list[dict[str, Any]] = [*trail.rows(actor="ann"), *trail.audit, found]
        clock: Clock = trail.clock
        clock.advance(1.5)
        clock.advance(timedelta(hours=1))
        trail.clear()
        print(rid, rows, trail.sys, trail.api, trail.report(), trail.mistakes())


@capture
def test_bare(number: int) -> int:
    """
    A decorated test keeps its signature.
    """
    return number


@capture(service_id="shop")
async def test_with_settings(trail: Trail) -> None:
    """
    So does a coroutine function, whose trail is given to it.
    """
    trail.assert_not_emitted("USER_DELETED")


class TestCase(unittest.TestCase):
    """
    A trail for each test of a class.
    """

    def setUp(self) -> None:
        """
        Open it; `unittest` closes it.
        """
        self.trail: Trail = self.enterContext(capture())


@pytest.mark.fasten(strict=False)
def test_fixtures(fasten_trail: Trail, fasten_clock: Clock) -> None:
    """
    The fixtures of the pytest plugin, and its mark.
    """
    fasten_clock.advance(-60)
    fasten_trail.assert_emitted("USER_CREATED")


class Headers(Carrier):
    """
    A transport's headers.
    """

    def __init__(self) -> None:
        self._held: dict[str, str] = {}

    def get(self, key: str) -> str | None:
        """
        Return a header.
        """
        return self._held.get(key)

    def set(self, key: str, value: str) -> None:
        """
        Set a header.
        """
        self._held[key] = value
