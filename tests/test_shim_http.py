# SPDX-License-Identifier: Apache-2.0
"""
The ASGI middlewares, behind uvicorn and in the hands of a test that plays server.

All servers at once are in `test_http_servers`.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import re
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import APIRouter, BackgroundTasks, Depends, FastAPI, Request, WebSocket
from fastapi.responses import PlainTextResponse, StreamingResponse
from hypothesis import example, given
from hypothesis import strategies as st
from litestar import Litestar
from litestar import get as litestar_get
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.responses import FileResponse
from starlette.responses import PlainTextResponse as Plain
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

import fasten
from fasten.context import accept
from fasten.shim.http import APILogger, RequestIDMiddleware, exception_handler, wrap
from tests.outside import wait_until
from tests.servers import HOSTILE, asgi_thread, attack, dial, pick

MINTED = re.compile(r"[0-9a-f]{12}7[0-9a-f]{3}[89ab][0-9a-f]{15}")
TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
ORDERS = {
    "as on the page": (RequestIDMiddleware, APILogger),
    "the other way round": (APILogger, RequestIDMiddleware),
}


def service(*middlewares: Any) -> FastAPI:
    """
    Return an application with *middlewares*, added in this order.
    """
    app = FastAPI()
    for middleware in middlewares or (RequestIDMiddleware, APILogger):
        app.add_middleware(middleware)
    return app


def get(app: Any, path: str, **options: Any) -> httpx.Response:
    """
    Have uvicorn serve *app* for one request.
    """
    with asgi_thread(app) as url, httpx.Client(base_url=url) as client:
        return client.get(path, **options)


def play(app: Any, *messages: dict[str, Any], **scope: Any) -> list[dict[str, Any]]:
    """
    Be the server: call *app* once, hand it *messages*, return what it sent.
    """
    return asyncio.run(play_async(app, *messages, **scope))


async def play_async(
    app: Any, *messages: dict[str, Any], **scope: Any
) -> list[dict[str, Any]]:
    """
    Be the server inside a running loop; after *messages* nothing more arrives.
    """
    sent: list[dict[str, Any]] = []
    waiting = list(messages or [{"type": "http.request", "body": b""}])

    async def receive() -> dict[str, Any]:
        if not waiting:
            await asyncio.Event().wait()
        return waiting.pop(0)

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    given = {"type": "http", "method": "GET", "path": "/", "headers": [], **scope}
    await app(given, receive, send)
    return sent


def ids_of(sent: list[dict[str, Any]]) -> list[str]:
    """
    Return the X-Request-ID headers of the first message.
    """
    pairs = sent[0].get("headers", [])
    return [value.decode() for name, value in pairs if name == b"x-request-id"]


async def plain(scope: Any, receive: Any, send: Any) -> None:
    """
    Answer 200 with two bytes, as a bare ASGI application.
    """
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"ok"})


class TestRequestId:
    @pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
    def test_takes_over_the_callers(self, fasten_trail, order):
        """
        Rows, log lines and the answer carry the id that the caller sent.
        """
        app = service(*order)

        @app.get("/")
        async def root() -> None:
            fasten.emit(code="USER_CREATED", target="u-1")
            fasten.log.info("created")

        answer = get(app, "/", headers={"X-Request-ID": "abc-123"})
        ids = {
            row["request_id"]
            for row in fasten_trail.audit + fasten_trail.sys + fasten_trail.api
        }

        assert (["abc-123"], {"abc-123"}) == (
            answer.headers.get_list("x-request-id"),
            ids,
        )
        assert (1, 1, 1) == (
            len(fasten_trail.audit),
            len(fasten_trail.sys),
            len(fasten_trail.api),
        )

    @pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
    def test_mints_where_there_is_none(self, fasten_trail, order):
        """
        A request without an id gets a new one, the same everywhere.
        """
        app = service(*order)

        @app.get("/")
        async def root() -> str | None:
            return fasten.current_request_id()

        answer = get(app, "/")
        rid = answer.headers["x-request-id"]

        assert MINTED.fullmatch(rid)
        assert (rid, rid) == (answer.json(), fasten_trail.api[0]["request_id"])

    @pytest.mark.parametrize("header", HOSTILE.values(), ids=HOSTILE)
    def test_attackers_inject_nothing(self, fasten_trail, header):
        """
        What is no id is replaced by a new one; nothing of it is repeated.
        """
        app = service()

        @app.get("/work/{token}")
        async def work() -> None:
            fasten.log.info("worked")

        with asgi_thread(app) as url:
            ids = attack(url, header)
        recorded = {row["request_id"] for row in fasten_trail.api + fasten_trail.sys}

        assert set(ids) == recorded
        assert len(ids) <= 1
        assert all(MINTED.fullmatch(rid) or rid == "a" for rid in ids)

    @given(st.binary(max_size=140))
    @example(b"x" * 128)
    @example(b"x" * 129)
    @example(b"orphan-x")
    @example("٣".encode())
    def test_an_id_is_taken_over_or_replaced(self, value):
        """
        Whatever bytes come, the answer holds them if they are an id, else a new one.
        """
        sent = play(RequestIDMiddleware(plain), headers=[(b"x-request-id", value)])
        (rid,) = ids_of(sent)

        assert rid == accept(value) or (accept(value) is None and MINTED.fullmatch(rid))

    @pytest.mark.parametrize("names", [[b"X-Request-ID"], [b"x-request-id"] * 3, []])
    def test_the_applications_own_header_is_replaced(self, names):
        """
        The answer names one id, whatever the application put there.
        """

        async def app(scope: Any, receive: Any, send: Any) -> None:
            headers = [(name, b"its-own") for name in names] + [(b"a", b"b")]
            await send(
                {"type": "http.response.start", "status": 200, "headers": headers}
            )

        sent = play(RequestIDMiddleware(app), headers=[(b"x-request-id", b"abc")])

        assert [(b"a", b"b"), (b"x-request-id", b"abc")] == sent[0]["headers"]

    def test_a_traceparent_will_do(self, fasten_trail):
        """
        Without an id of its own the request takes the trace's, and rows name it.
        """
        app = service()

        @app.get("/")
        async def root() -> None:
            fasten.emit(code="USER_CREATED", target="u-1")
            fasten.log.info("created")

        headers = {"traceparent": f"00-{TRACE}-{SPAN}-01", "X-Request-ID": "not an id"}
        answer = get(app, "/", headers=headers)
        rows = fasten_trail.audit + fasten_trail.sys + fasten_trail.api

        assert TRACE == answer.headers["x-request-id"]
        assert [(TRACE, TRACE, SPAN)] * 3 == pick(
            rows, "request_id", "trace_id", "span_id"
        )

    def test_an_id_comes_before_a_traceparent(self, fasten_trail):
        """
        The trace is noted, but the request goes by the caller's id.
        """
        headers = [
            (b"traceparent", f"00-{TRACE}-{SPAN}-01".encode()),
            (b"x-request-id", b"abc"),
        ]
        seen: list[Any] = []

        async def app(scope: Any, receive: Any, send: Any) -> None:
            seen.append(fasten.current())

        play(RequestIDMiddleware(app), headers=headers)

        assert [("abc", TRACE)] == [(c.request_id, c.trace_id) for c in seen]

    def test_a_public_edge_trusts_nobody(self, fasten_trail):
        """
        With FASTEN_TRUST_REQUEST_ID=off the id is ours; theirs stands in the api row.
        """
        fasten.init(service_id="edge", trust_request_id="off", stdout="")
        app = RequestIDMiddleware(APILogger(plain))
        sent = [
            play(app, headers=[(b"x-request-id", value)])
            for value in (b"theirs", b"no id")
        ]
        ids = [ids_of(each)[0] for each in sent]

        assert all(MINTED.fullmatch(rid) for rid in ids)
        assert ids == pick(fasten_trail.api, "request_id")
        assert ["theirs", None] == [
            row.get("client_request_id") for row in fasten_trail.api
        ]

    def test_a_new_engine_sets_the_switch_anew(self, fasten_trail):
        """
        The switch is that of the last `init()`.
        """
        fasten.init(service_id="edge", trust_request_id="off")
        fasten.init(service_id="inside")
        sent = play(RequestIDMiddleware(plain), headers=[(b"x-request-id", b"theirs")])

        assert ["theirs"] == ids_of(sent)

    def test_works_before_init(self):
        """
        A middleware without an engine still carries ids, and loses no request.
        """
        sent = play(APILogger(RequestIDMiddleware(plain)))

        assert [200, None] == [message.get("status") for message in sent]


PAGE = """
# app.py
import fasten
from fasten.shim.http import RequestIDMiddleware, APILogger

fasten.init()                                      # reads env
app.add_middleware(RequestIDMiddleware)            # mints / honours X-Request-ID
app.add_middleware(APILogger, skip={"/health"}) # one api row per request

@app.post("/users")
async def create(u, actor):
    fasten.emit(code="USER_CREATED", target=u.id,
               actor=actor.id, detail={"email": u.email})
    fasten.log.info("user_created", user_id=u.id)
"""


class Users:
    """
    An application whose routes get a user and an actor, as the page takes for granted.
    """

    def __init__(self, app: FastAPI) -> None:
        self._app = app
        self.add_middleware = app.add_middleware

    def post(self, path: str) -> Any:
        """
        Make of the page's function a route of FastAPI's.
        """

        def decorate(create: Any) -> Any:
            @self._app.post(path)
            async def route(request: Request) -> None:
                given = SimpleNamespace(**await request.json())
                await create(given, SimpleNamespace(id="admin"))

            return create

        return decorate


class TestPage:
    def test_the_pages_snippet_runs_as_printed(self, fasten_trail, monkeypatch):
        """
        app.py of the landing page, to the letter: the request's id is on each stream.
        """
        monkeypatch.setenv("FASTEN_SERVICE_ID", "my-service")
        app = FastAPI()
        exec(compile(PAGE, "app.py", "exec"), {"app": Users(app)})

        @app.get("/health")
        async def health() -> None: ...

        with asgi_thread(app) as url, httpx.Client(base_url=url) as client:
            client.get("/health")
            user = {"id": "u-42", "email": "a@b.example"}
            answer = client.post("/users", json=user)
        (row,) = fasten_trail.api

        fasten_trail.assert_emitted("USER_CREATED", target="u-42", actor="admin")
        assert [("user_created", "u-42")] == pick(fasten_trail.sys, "event", "user_id")
        assert fasten_trail.assert_correlated(answer.headers["x-request-id"])
        assert ("POST", "/users", "/users", 200) == (
            row["method"],
            row["path"],
            row["route"],
            row["status"],
        )

    def test_without_options(self, fasten_trail):
        """
        `app.add_middleware(APILogger)` alone records, and leaves the answer alone.
        """
        app = Starlette(routes=[Route("/", lambda _: Plain("hello"))])
        app.add_middleware(APILogger)
        answer = get(app, "/")

        assert "x-request-id" not in answer.headers
        assert [5] == pick(fasten_trail.api, "bytes")


class TestCaller:
    @pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
    def test_a_sync_dependency_names_the_caller(self, fasten_trail, order):
        """
        FastAPI runs it in a thread: what it says holds for the route and the row.
        """
        app = service(*order)

        def dependency() -> None:
            fasten.identify(actor="ann", tenant_id="acme")

        @app.get("/", dependencies=[Depends(dependency)])
        async def root() -> None:
            fasten.emit(code="USER_CREATED", target="u-1")

        get(app, "/")
        rows = pick(fasten_trail.audit + fasten_trail.api, "actor", "tenant_id")

        assert [("ann", "acme")] * 2 == rows
        assert "user" == fasten_trail.audit[0]["actor_kind"]

    @pytest.mark.parametrize("is_outer", [True, False])
    def test_callables_are_asked_late(self, fasten_trail, is_outer):
        """
        They see what a middleware further in wrote into the ASGI scope.
        """
        asked = []

        def actor(scope: Any) -> str | None:
            asked.append(scope["path"])
            return scope.get("user")

        async def app(scope: Any, receive: Any, send: Any) -> None:
            fasten.log.info("early")
            asked.append("then")
            scope["user"] = "ann"
            fasten.emit(code="USER_CREATED", target="u-1")
            await plain(scope, receive, send)

        logged = APILogger(app)
        if is_outer:
            play(RequestIDMiddleware(logged, actor=actor))
        else:
            play(APILogger(RequestIDMiddleware(app, actor=actor)))

        assert ["ann"] * 2 == pick(fasten_trail.audit + fasten_trail.api, "actor")
        assert ["then", "/"] == asked

    def test_tenant_and_client_are_asked_too(self, fasten_trail):
        """
        A proxy's header names the client; without it the peer stays the client.
        """

        def client(scope: Any) -> str | None:
            return dict(scope["headers"]).get(b"x-real-ip", b"").decode() or None

        app = APILogger(plain, client=client, tenant=lambda scope: scope["path"][1:])
        for headers in ([(b"x-real-ip", b"203.0.113.7")], []):
            play(app, path="/acme", headers=headers, client=("10.0.0.1", 5))

        assert [("acme", "203.0.113.7"), ("acme", "10.0.0.1")] == pick(
            fasten_trail.api, "tenant_id", "client"
        )

    def test_nobody_named_is_anonymous(self, fasten_trail):
        """
        A callable that fails costs its answer, never the request.
        """
        app = APILogger(plain, actor=lambda scope: scope["user"])
        play(app, client=None)

        assert [("anonymous", None, 200)] == pick(
            fasten_trail.api, "actor", "client", "status"
        )

    def test_a_users_own_bind_does_not_rename_the_row(self, fasten_trail):
        """
        The api row is the request's, also where the answer is sent from a child scope.
        """

        async def app(scope: Any, receive: Any, send: Any) -> None:
            with fasten.bind("another", actor="job"):
                await plain(scope, receive, send)

        play(APILogger(app), headers=[(b"x-request-id", b"abc")])

        assert [("abc", "anonymous")] == pick(fasten_trail.api, "request_id", "actor")

    @pytest.mark.parametrize("middleware", ORDERS["as on the page"])
    @pytest.mark.parametrize("name", ["actor", "tenant", "client"])
    def test_what_cannot_be_asked_is_refused_at_once(self, middleware, name):
        """
        A coroutine function, or something else, is a mistake of the service's start.
        """

        async def actor(scope: Any) -> str:
            return "ann"

        class Actor:
            async def __call__(self, scope: Any) -> str:
                return "ann"

        for asker in (actor, Actor(), functools.partial(actor)):
            with pytest.raises(TypeError, match=r"identify\(\)"):
                middleware(plain, **{name: asker})
        with pytest.raises(TypeError, match=f"{name}='ann'"):
            middleware(plain, **{name: "ann"})


class TestApiRow:
    def test_routes_are_templates(self, fasten_trail):
        """
        The row names the route with its parameters' names, mounts and prefixes too.
        """
        app = service()
        router, sub = APIRouter(prefix="/r"), FastAPI()
        starlette = Starlette(routes=[Route("/p/{q:int}", lambda _: Plain(""))])

        @app.get("/users/{uid}")
        async def user(uid: str) -> None: ...

        @router.get("/x/{y}")
        async def included(y: int) -> None: ...

        @sub.get("/deep/{z}")
        async def mounted(z: int) -> None: ...

        app.include_router(router, prefix="/api")
        app.mount("/t/{tenant}/sub", sub)
        app.mount("/st", starlette)
        expected = {
            "/users/u-1": "/users/{uid}",
            "/api/r/x/3": "/api/r/x/{y}",
            "/t/acme/sub/deep/4": "/t/{tenant}/sub/deep/{z}",
            "/st/p/1": "/st/p/{q}",
            "/st/none": "/st/{path}",
            "/none": None,
        }
        with asgi_thread(app) as url, httpx.Client(base_url=url) as client:
            for path in expected:
                client.get(path)
            client.post("/users/u-1")

        assert [*expected.items(), ("/users/u-1", "/users/{uid}")] == pick(
            fasten_trail.api, "path", "route"
        )
        assert [200] * 4 + [404, 404, 405] == pick(fasten_trail.api, "status")

    def test_a_starlette_without_routes_in_the_scope(self, fasten_trail):
        """
        Before 1.0 only the endpoint is named: its route is looked up.
        """
        routes = [
            Mount("/m", routes=[Route("/x/{y}", lambda _: None)]),
            Mount("/n", routes=[Route("/a/{b}", plain_route)]),
            Route("/a/{b}", plain_route),
            Route("/c/{d}", plain_route),
        ]

        async def older(scope: Any, receive: Any, send: Any) -> None:
            scope |= {"router": Starlette(routes=routes).router}
            scope |= {"endpoint": plain_route, "root_path": scope["path"][:-4]}
            await plain(scope, receive, send)

        for path in ("/c/1", "/n/a/1"):
            play(APILogger(older), path=path)

        assert ["/c/{d}", "/n/a/{b}"] == pick(fasten_trail.api, "route")

    def test_litestar_says_it_itself(self, fasten_trail):
        """
        Litestar takes the same classes, and leaves its template in the scope.
        """

        @litestar_get("/orders/{number:int}")
        async def order() -> int:
            return 7

        middlewares = [RequestIDMiddleware, APILogger]
        app = Litestar([order], middleware=middlewares, logging_config=None)
        answer = get(app, "/orders/7")

        assert MINTED.fullmatch(answer.headers["x-request-id"])
        assert [("/orders/{number}", 200)] == pick(fasten_trail.api, "route", "status")

    def test_counts_the_bytes_that_were_sent(self, fasten_trail, tmp_path):
        """
        As they left: whole, in pieces, compressed, from a file; none for HEAD.
        """
        (tmp_path / "f.txt").write_bytes(b"f" * 100_000)
        app = Starlette(
            routes=[
                Route("/", lambda _: Plain("é")),
                Route("/pieces", lambda _: StreamingResponse(iter(["ab", "c"]))),
                Route("/zip", lambda _: Plain("z" * 5000)),
                Route("/file", lambda _: FileResponse(tmp_path / "f.txt")),
            ],
            middleware=[Middleware(APILogger), Middleware(GZipMiddleware)],
        )
        plain_only = {"Accept-Encoding": "identity"}
        with asgi_thread(app) as url, httpx.Client(base_url=url) as client:
            client.get("/", headers=plain_only)
            client.head("/", headers=plain_only)
            client.get("/pieces", headers=plain_only)
            client.get("/file", headers=plain_only)
            zipped = client.get("/zip", headers={"Accept-Encoding": "gzip"})

        assert [2, 0, 3, 100_000, int(zipped.headers["content-length"])] == pick(
            fasten_trail.api, "bytes"
        )
        assert all(row["complete"] for row in fasten_trail.api)

    @pytest.mark.parametrize(
        ("skip", "recorded"),
        [
            ((), ["/health", "/static/a/b.css", "/static", "/x.y/health"]),
            ({"/health", "/static/*"}, ["/static", "/x.y/health"]),
            ("/health", ["/static/a/b.css", "/static", "/x.y/health"]),
            (["*/health"], ["/static/a/b.css", "/static"]),
            (["/x?y/*", "/static"], ["/health", "/static/a/b.css", "/x.y/health"]),
        ],
    )
    def test_skips_paths(self, fasten_trail, skip, recorded):
        """
        A `*` stands for any text; nothing else is special.
        """
        app = APILogger(plain, skip=skip)
        for path in ("/health", "/static/a/b.css", "/static", "/x.y/health"):
            play(app, path=path)

        assert recorded == pick(fasten_trail.api, "path")

    def test_skips_paths_below_a_mount(self, fasten_trail):
        """
        Behind a prefix the pattern is that of the application itself, or the whole.
        """
        app = APILogger(plain, skip={"/health", "/v1/ready"})
        for path in ("/v1/health", "/v1/ready", "/v1/users"):
            play(app, path=path, root_path="/v1")

        assert ["/v1/users"] == pick(fasten_trail.api, "path")

    def test_a_pattern_that_is_no_path_is_refused(self):
        """
        A mistake in `skip=` shows when the service starts.
        """
        with pytest.raises(TypeError, match="skip= holds 7"):
            APILogger(plain, skip={7})  # type: ignore[arg-type]

    def test_the_query_string_stays_out(self, fasten_trail):
        """
        Secrets travel in query strings: neither path nor row repeats one.
        """
        app = service()
        get(app, "/none?token=canary")

        assert "canary" not in str(fasten_trail.api)

    def test_times_the_answer_and_not_what_comes_after(self, fasten_trail):
        """
        Background tasks run when the row is there already.
        """
        seen = []

        async def app(scope: Any, receive: Any, send: Any) -> None:
            await plain(scope, receive, send)
            seen.append(len(fasten_trail.api))

        play(APILogger(app))

        assert [1] == seen
        assert 0 < fasten_trail.api[0]["duration_ms"] < 10_000

    @pytest.mark.parametrize(
        ("kind", "size"), [("pathsend", None), ("zerocopysend", 7)]
    )
    def test_files_that_the_server_sends(self, fasten_trail, kind, size):
        """
        Extensions of ASGI end an answer, too; a size that is not said is not known.
        """

        async def app(scope: Any, receive: Any, send: Any) -> None:
            await send({"type": "http.response.start", "status": 200})
            await send({"type": f"http.response.{kind}", "path": "/f", "count": 7})

        play(APILogger(app))

        assert [(size, True)] == pick(fasten_trail.api, "bytes", "complete")


async def plain_route(request: Any) -> Plain:
    """
    Answer as a Starlette route.
    """
    return Plain("")


class TestFailure:
    @pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
    def test_an_unhandled_exception_is_a_500(self, fasten_trail, order):
        """
        The row says 500, and the exception leaves as it is.
        """
        error = ZeroDivisionError("mine")

        async def app(scope: Any, receive: Any, send: Any) -> None:
            raise error

        inner, outer = order
        with pytest.raises(ZeroDivisionError) as caught:
            play(outer(inner(app)))

        assert error is caught.value
        assert [(500, False, 0)] == pick(
            fasten_trail.api, "status", "complete", "bytes"
        )

    def test_a_200_that_breaks_is_a_500(self, fasten_trail):
        """
        The status line was sent before the body failed: still not a success.
        """
        app = service()

        @app.get("/")
        async def root() -> StreamingResponse:
            def pieces() -> Iterator[str]:
                yield "half"
                raise ZeroDivisionError

            return StreamingResponse(pieces())

        with pytest.raises(httpx.RemoteProtocolError):
            get(app, "/")

        assert [(500, False, 4)] == pick(
            fasten_trail.api, "status", "complete", "bytes"
        )

    def test_wrap_puts_the_id_on_the_last_resort(self, fasten_trail):
        """
        Around the whole application not even Starlette's own 500 lacks the id.
        """
        app = service()

        @app.get("/")
        async def root() -> None:
            raise ZeroDivisionError

        answer = get(wrap(app), "/", headers={"X-Request-ID": "abc"})
        (row,) = fasten_trail.api

        assert (500, ["abc"]) == (
            answer.status_code,
            answer.headers.get_list("x-request-id"),
        )
        assert ("abc", 500, True, len(answer.content)) == (
            row["request_id"],
            row["status"],
            row["complete"],
            row["bytes"],
        )

    def test_the_exception_handler_does_so_without_wrapping(self, fasten_trail):
        """
        Starlette runs it outside the user's middlewares; the id is in the scope.
        """
        app = service()
        app.add_exception_handler(Exception, exception_handler)

        @app.get("/")
        async def root() -> None:
            raise ZeroDivisionError

        answer = get(app, "/", headers={"X-Request-ID": "abc"})

        assert (500, "abc", "Internal Server Error") == (
            answer.status_code,
            answer.headers["x-request-id"],
            answer.text,
        )

    def test_the_exception_handler_without_middlewares(self):
        """
        Where no middleware was passed there is no id to name, and still an answer.
        """
        app = FastAPI()
        app.add_exception_handler(Exception, exception_handler)

        @app.get("/")
        async def root() -> None:
            raise ZeroDivisionError

        answer = get(app, "/")

        assert (500, None) == (answer.status_code, answer.headers.get("x-request-id"))

    @pytest.mark.parametrize(
        ("messages", "status"), [([{"type": "http.disconnect"}], 499), ([], 500)]
    )
    def test_an_application_that_answers_nothing(self, fasten_trail, messages, status):
        """
        The server says 500 for it; or nobody was there any more.
        """

        async def app(scope: Any, receive: Any, send: Any) -> None:
            await receive()

        play(APILogger(app), *messages)

        assert [(status, False)] == pick(fasten_trail.api, "status", "complete")

    @pytest.mark.parametrize(("has_begun", "status"), [(False, 499), (True, 200)])
    def test_a_cancelled_request_did_not_fail(self, fasten_trail, has_begun, status):
        """
        Its client left: the row says what was sent, and that it is not all.
        """

        async def app(scope: Any, receive: Any, send: Any) -> None:
            if has_begun:
                await send({"type": "http.response.start", "status": 200})
            waits.set()
            await asyncio.Event().wait()

        async def cancelled() -> None:
            task = asyncio.create_task(play_async(APILogger(app)))
            await waits.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

        waits = asyncio.Event()
        asyncio.run(cancelled())

        assert [(status, False)] == pick(fasten_trail.api, "status", "complete")

    def test_a_send_that_fails_is_a_client_that_left(self, fasten_trail):
        """
        ASGI 2.4 servers raise OSError; what the framework makes of it is no 500.
        """

        async def app(scope: Any, receive: Any, send: Any) -> None:
            await send({"type": "http.response.start", "status": 200})
            await send({"type": "http.response.body", "body": b"x", "more_body": True})

        async def send(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.body":
                raise BrokenPipeError

        scope = {"type": "http", "method": "GET", "path": "/", "headers": []}
        with pytest.raises(BrokenPipeError):
            asyncio.run(APILogger(app)(scope, None, send))  # type: ignore[arg-type]

        assert [(200, False)] == pick(fasten_trail.api, "status", "complete")


class TestStreams:
    def test_the_first_event_is_not_held_back(self, fasten_trail):
        """
        Server-sent events go out one by one: the first arrives before the second is.
        """
        app, arrived = service(), threading.Event()

        @app.get("/")
        async def root() -> StreamingResponse:
            async def events() -> Any:
                yield f"data: {fasten.current_request_id()}\n\n"
                await asyncio.to_thread(arrived.wait, 10)
                yield f"data: {arrived.is_set()}\n\n"

            return StreamingResponse(events(), media_type="text/event-stream")

        with asgi_thread(app) as url, httpx.stream("GET", url) as answer:
            lines = answer.iter_lines()
            first = next(lines)
            arrived.set()
            rest = [line for line in lines if line]

        assert f"data: {answer.headers['x-request-id']}" == first
        assert ["data: True"] == rest

    def test_a_client_that_leaves_makes_the_row_incomplete(self, fasten_trail):
        """
        Half an answer was sent, with status 200, and the row says both.
        """
        app, gone = service(), threading.Event()

        @app.get("/")
        async def root() -> StreamingResponse:
            async def pieces() -> Any:
                yield "first"
                await asyncio.to_thread(gone.wait, 10)
                for _ in range(1000):
                    yield "x" * 65536
                    await asyncio.sleep(0)

            return StreamingResponse(pieces())

        with asgi_thread(app) as url:
            with dial(url) as connection:
                connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
                connection.recv(65536)
            gone.set()
            wait_until(lambda: fasten_trail.api)

        assert [(200, False)] == pick(fasten_trail.api, "status", "complete")

    def test_background_tasks_keep_the_id(self, fasten_trail):
        """
        They run after the answer, on the request's behalf.
        """
        app, done = service(), threading.Event()

        def task() -> None:
            fasten.emit(code="USER_CREATED", target="u-1")
            done.set()

        @app.get("/")
        async def root(tasks: BackgroundTasks) -> None:
            tasks.add_task(task)

        answer = get(app, "/")
        done.wait(10)

        assert [answer.headers["x-request-id"]] == pick(
            fasten_trail.audit, "request_id"
        )

    def test_a_task_that_outlives_the_request_keeps_the_id(self, fasten_trail):
        """
        What a handler starts goes on under its id when the answer is long gone.
        """
        late: list[str | None] = []

        async def app(scope: Any, receive: Any, send: Any) -> None:
            tasks.append(asyncio.create_task(linger()))
            await plain(scope, receive, send)

        async def linger() -> None:
            await ended.wait()
            late.append(fasten.current_request_id())

        async def story() -> None:
            await play_async(
                RequestIDMiddleware(app), headers=[(b"x-request-id", b"abc")]
            )
            ended.set()
            await asyncio.gather(*tasks)

        tasks: list[Any] = []
        ended = asyncio.Event()
        asyncio.run(story())

        assert ["abc"] == late


class TestWebsockets:
    def echo(self) -> FastAPI:
        app = service()

        @app.websocket("/ws/{room}")
        async def room(socket: WebSocket) -> None:
            if "token" not in socket.query_params:
                await socket.close()
                return
            await socket.accept()
            await socket.send_text(fasten.current_request_id() or "")
            with contextlib.suppress(Exception):
                while True:
                    text = await socket.receive_text()
                    fasten.emit(code="USER_UPDATED", target=text)
                    if text == "crash":
                        break
                    await socket.send_bytes(text.encode())
            if text == "crash":
                raise ZeroDivisionError

        return app

    def test_the_handshake_and_all_messages_share_the_id(self, fasten_trail):
        """
        One connection is one request: its rows carry one id, its api row says 101.
        """
        with asgi_thread(self.echo()) as url:
            place = url.replace("http", "ws", 1) + "/ws/7?token=t"
            with connect(place, additional_headers={"X-Request-ID": "abc"}) as socket:
                first = socket.recv()
                for text in ("one", "two"):
                    socket.send(text)
                    socket.recv()
                named = socket.response.headers.get_all("x-request-id")
            wait_until(lambda: fasten_trail.api)
        (row,) = fasten_trail.api

        assert ("abc", ["abc"]) == (first, named)
        assert ["abc"] * 2 == pick(fasten_trail.audit, "request_id")
        assert ("GET", "/ws/7", "/ws/{room}", 101, 9, True) == (
            row["method"],
            row["path"],
            row["route"],
            row["status"],
            row["bytes"],
            row["complete"],
        )

    def test_a_refused_handshake_is_a_403(self, fasten_trail):
        """
        As the server answers a websocket that is closed before it was accepted.
        """
        with asgi_thread(self.echo()) as url, pytest.raises(InvalidStatus):
            connect(url.replace("http", "ws", 1) + "/ws/7").close()

        assert [403] == pick(fasten_trail.api, "status")

    def test_a_crash_is_a_500(self, fasten_trail):
        """
        Also when the handshake had succeeded.
        """
        with asgi_thread(self.echo()) as url:
            with connect(url.replace("http", "ws", 1) + "/ws/7?token=t") as socket:
                socket.recv()
                socket.send("crash")
                wait_until(lambda: fasten_trail.api)

        assert [(500, False)] == pick(fasten_trail.api, "status", "complete")

    @pytest.mark.parametrize(("code", "is_complete"), [(1000, True), (1006, False)])
    def test_a_broken_connection_is_no_goodbye(self, fasten_trail, code, is_complete):
        """
        Code 1006 says that nobody closed it.
        """

        async def app(scope: Any, receive: Any, send: Any) -> None:
            await send({"type": "websocket.accept"})
            await receive()

        message = {"type": "websocket.disconnect", "code": code}
        play(APILogger(app), message, type="websocket", method=None)

        assert [(101, is_complete)] == pick(fasten_trail.api, "status", "complete")

    def test_a_denial_has_its_own_status(self, fasten_trail):
        """
        Where a server lets the application answer the handshake, that counts.
        """

        async def app(scope: Any, receive: Any, send: Any) -> None:
            start = {"type": "websocket.http.response.start", "status": 401}
            await send({**start, "headers": []})
            await send({"type": "websocket.http.response.body", "body": b"no"})

        sent = play(RequestIDMiddleware(APILogger(app)), type="websocket")

        assert 1 == len(ids_of(sent))
        assert [(401, 2, True)] == pick(fasten_trail.api, "status", "bytes", "complete")


class TestManners:
    def test_lifespan_passes_through(self):
        """
        Start-up and shutdown are the application's; no id is made for them.
        """
        seen: list[Any] = []

        @contextlib.asynccontextmanager
        async def lifespan(app: Any) -> Any:
            seen.append(fasten.current())
            yield {"ready": True}
            seen.append("end")

        inner = FastAPI(lifespan=lifespan)
        inner.add_middleware(RequestIDMiddleware)
        inner.add_middleware(APILogger)

        @inner.get("/")
        async def root(request: Request) -> bool:
            return bool(request.state.ready)

        answer = get(wrap(inner), "/")

        assert (True, [None, "end"]) == (answer.json(), seen)

    def test_nothing_is_left_behind(self, fasten_trail):
        """
        After a request the task that served it belongs to nobody again.
        """

        async def app(scope: Any, receive: Any, send: Any) -> None:
            fasten.identify(actor="ann")
            if scope["path"] == "/boom":
                raise ZeroDivisionError
            await plain(scope, receive, send)

        async def story() -> list[Any]:
            left = []
            for path in ("/", "/boom", "/"):
                with contextlib.suppress(ZeroDivisionError):
                    await play_async(APILogger(RequestIDMiddleware(app)), path=path)
                left.append(fasten.current())
            return left

        assert [None] * 3 == asyncio.run(story())

    def test_a_users_middleware_may_stand_between(self, fasten_trail):
        """
        Also one of `BaseHTTPMiddleware`, which runs the application in a task.
        """
        app = FastAPI()
        app.add_middleware(RequestIDMiddleware)

        @app.middleware("http")
        async def between(request: Request, call_next: Any) -> Any:
            fasten.emit(code="USER_UPDATED", target="outside")
            return await call_next(request)

        app.add_middleware(APILogger)

        @app.get("/")
        async def root(tasks: BackgroundTasks) -> StreamingResponse:
            fasten.identify(actor="ann")
            return StreamingResponse(iter([fasten.current_request_id() or ""]))

        answer = get(app, "/")

        assert answer.text == answer.headers["x-request-id"]
        assert [(answer.text, "ann", 32)] == pick(
            fasten_trail.api, "request_id", "actor", "bytes"
        )
        assert [answer.text] == pick(fasten_trail.audit, "request_id")

    def test_threads_of_a_pool_are_clean(self, fasten_trail):
        """
        Sync routes share threads: none finds the request before it.
        """
        app = FastAPI()
        found: list[Any] = []

        def outside() -> None:
            found.append(fasten.current())

        class Bare:
            def __init__(self, app: Any) -> None:
                self.app = app

            async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
                is_request = scope["type"] == "http"
                if is_request:
                    await asyncio.to_thread(outside)
                await self.app(scope, receive, send)
                if is_request:
                    await asyncio.to_thread(outside)

        app.add_middleware(RequestIDMiddleware)
        app.add_middleware(Bare)

        @app.get("/", response_class=PlainTextResponse)
        def root() -> str:
            return fasten.current_request_id() or ""

        with asgi_thread(app) as url, httpx.Client(base_url=url) as client:
            same = [
                answer.text == answer.headers["x-request-id"]
                for answer in (client.get("/") for _ in range(20))
            ]

        assert [True] * 20 == same
        assert [None] * 40 == found

    def test_requests_in_one_loop_do_not_mix(self, fasten_trail):
        """
        A hundred requests take turns, and each stays itself.
        """

        async def app(scope: Any, receive: Any, send: Any) -> None:
            own = scope["path"][1:]
            seen = set()
            for _ in range(10):
                seen.add(fasten.current_request_id())
                await asyncio.sleep(0)
                fasten.identify(actor=own)
            wrong.extend(seen - {own})
            fasten.emit(code="USER_CREATED", target=own)
            await plain(scope, receive, send)

        async def story() -> None:
            served = APILogger(RequestIDMiddleware(app))
            await asyncio.gather(
                *(
                    play_async(
                        served, path=f"/r{n}", headers=[(b"x-request-id", b"r%d" % n)]
                    )
                    for n in range(100)
                )
            )

        wrong: list[Any] = []
        asyncio.run(story())
        rows = {
            (row["request_id"], row["target"], row["actor"])
            for row in fasten_trail.audit
        }

        assert [] == wrong
        assert {(f"r{n}",) * 3 for n in range(100)} == rows
        assert {f"r{n}" for n in range(100)} == {
            row["actor"] for row in fasten_trail.api
        }

    def test_a_request_leaves_no_garbage(self, run_python):
        """
        What the request held is freed when it ends, not when the collector comes.
        """
        # In a process of its own: other threads leave garbage, too.
        done = run_python("""
            import asyncio, gc
            from fasten.shim.http import APILogger, RequestIDMiddleware
            from fasten.testing import capture
            from tests.test_shim_http import plain, play_async

            async def story():
                app = RequestIDMiddleware(APILogger(plain))
                for _ in range(2):
                    gc.collect()
                    for n in range(50):
                        await play_async(app, path=f"/{n}")
                return gc.collect()

            gc.disable()
            with capture() as trail:
                print(asyncio.run(story()), len(trail.api))
        """)

        assert ("0 100\n", "") == (done.stdout, done.stderr)

    def test_static_files_pass(self, fasten_trail, tmp_path):
        """
        A mounted ASGI application is one like any other.
        """
        (tmp_path / "a.css").write_text("a{}")
        app = Starlette(
            routes=[Mount("/static", StaticFiles(directory=tmp_path))],
            middleware=[Middleware(RequestIDMiddleware), Middleware(APILogger)],
        )
        answer = get(app, "/static/a.css")

        assert 200 == answer.status_code
        assert [("/static/{path}", 3)] == pick(fasten_trail.api, "route", "bytes")
