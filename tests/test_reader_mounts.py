# SPDX-License-Identifier: Apache-2.0
"""
The reader inside frameworks and behind real servers: where it is mounted, what arrives.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import threading
from functools import partial
from urllib.parse import quote

import httpx
import pytest
from django.core.handlers.asgi import ASGIHandler
from django.core.handlers.wsgi import WSGIHandler
from django.test import override_settings
from django.urls import path, re_path

import fasten
from fasten import reader
from fasten.reader.asgi import THREADS, below_mount
from fasten.shim.http import APILogger, RequestIDMiddleware
from tests.outside import require_binary
from tests.servers import asgi_thread, talk, wsgi_thread
from tests.web.django_project import configure

MOUNT = "/api/v1/logs"
LINES = {"Accept": "application/x-ndjson"}
TOKEN = "s3cret-token"


@pytest.fixture
def rows(sqlite_dsn):
    """
    Run fasten over a store that holds what the page's examples ask for.
    """
    fasten.init(
        service_id="shop",
        node_id="n-1",
        stdout="",
        audit_dsn=sqlite_dsn,
        reader_token=TOKEN,
    )
    with fasten.bind("a1b2c3d4", actor="admin"):
        fasten.emit("USER_CREATED", "u-42")
        fasten.emit("PIPELINE_DEPLOYED", "p-1")
        fasten.log.info("user_created")
        fasten.record_api(method="POST", path="/users", status=201)
    for number in range(500):
        fasten.emit("ORDER_PLACED", f"o-{number}")
    assert fasten.flush(20)


# --- frameworks -----------------------------------------------------------------------


def starlette(router):
    from starlette.applications import Starlette
    from starlette.routing import Mount

    return asgi_thread(Starlette(routes=[Mount(MOUNT, router)]))


def nested(router):
    from starlette.applications import Starlette
    from starlette.routing import Mount

    return asgi_thread(
        Starlette(routes=[Mount("/api", routes=[Mount("/v1/logs", router)])])
    )


def fastapi(router):
    from fastapi import FastAPI

    app = FastAPI()
    app.mount(MOUNT, router)
    return asgi_thread(app)


def behind_a_proxy(router):
    from starlette.applications import Starlette
    from starlette.routing import Mount

    app = Starlette(routes=[Mount(MOUNT, router)])

    async def stripped(scope, receive, send):
        await app({**scope, "root_path": "/public/shop"}, receive, send)

    return asgi_thread(stripped)


def litestar(router):
    from litestar import Litestar, asgi

    return asgi_thread(Litestar([asgi(MOUNT, is_mount=True, copy_scope=True)(router)]))


def uvicorn_root_path(router):
    return asgi_thread(router, root_path=MOUNT)


def flask(router):
    from flask import Flask
    from werkzeug.middleware.dispatcher import DispatcherMiddleware

    app = Flask(__name__)
    app.wsgi_app = DispatcherMiddleware(app.wsgi_app, {MOUNT: router.wsgi})
    return wsgi_thread(app)


FRAMEWORKS = [starlette, nested, fastapi, behind_a_proxy, litestar, flask]


def url_of(framework, base):
    """
    Return where the reader is.
    """
    return f"{base}{'' if framework is uvicorn_root_path else MOUNT}"


@pytest.fixture(params=[*FRAMEWORKS, uvicorn_root_path], ids=lambda f: f.__name__)
def mounted(request, rows):
    """
    Yield the URL of a reader that is mounted, one framework after the other.
    """
    with request.param(reader.router("none")) as base:
        yield url_of(request.param, base)


class TestFrameworks:
    @pytest.mark.parametrize(
        "path",
        [
            "/audit?request_id=a1b2c3d4",
            "/sys?request_id=a1b2c3d4",
            "/api?request_id=a1b2c3d4",
            "/correlate?request_id=a1b2c3d4",
            "/health",
            "/openapi.json",
        ],
    )
    def test_every_route(self, mounted, path):
        """
        Each route answers below the mount.
        """
        response = httpx.get(f"{mounted}{path}")

        assert 200 == response.status_code
        assert "application/json" == response.headers["content-type"]
        assert response.json().get("rows", True)

    def test_what_is_not_there(self, mounted):
        """
        An unknown route is the reader's own 404.
        """
        response = httpx.get(f"{mounted}/nope")

        assert 404 == response.status_code
        assert "application/problem+json" == response.headers["content-type"]

    def test_lines(self, mounted):
        """
        NDJSON has every row, through any server.
        """
        response = httpx.get(f"{mounted}/audit?code=ORDER_PLACED", headers=LINES)
        targets = [json.loads(line)["target"] for line in response.iter_lines()]

        assert [f"o-{number}" for number in reversed(range(500))] == targets

    def test_head(self, mounted):
        """
        HEAD has the length and no body.
        """
        response = httpx.head(f"{mounted}/audit")

        assert 200 == response.status_code
        assert b"" == response.content
        assert int(response.headers["content-length"]) > 1000

    @pytest.mark.parametrize("value", ["ü & ?=%", "a/b", "a+b c", "日本", "😀"])
    def test_any_text_arrives(self, mounted, value):
        """
        A parameter arrives as it was sent.
        """
        fasten.emit("USER_CREATED", value)
        fasten.flush(20)
        response = httpx.get(f"{mounted}/audit?target={quote(value, safe='')}")

        assert [value] == [row["target"] for row in response.json()["rows"]]

    def test_denies_by_default(self, rows):
        """
        Mounted as on the page, it lets in who carries the token.
        """
        for framework in FRAMEWORKS:
            with framework(reader.router()) as base:
                url = f"{base}{MOUNT}/audit"
                token = {"Authorization": f"Bearer {TOKEN}"}

                assert 401 == httpx.get(url).status_code
                assert 200 == httpx.get(url, headers=token).status_code

    @pytest.mark.parametrize(
        ("path", "root", "route"),
        [
            ("/audit", "", "/audit"),
            ("/audit", None, "/audit"),
            ("/api/v1/logs/audit", "/api/v1/logs", "/audit"),
            ("/api/v1/logs/audit", "/api/v1/logs/", "/audit"),
            ("/api/v1/logs/audit", "/public/api/v1/logs", "/audit"),
            ("/api/v1/logs", "/api/v1/logs", ""),
            ("/audit", "/api/v1/logs", "/audit"),
            ("/logs/logs/audit", "/logs/logs", "/audit"),
            ("/logs-2/audit", "/logs", "/logs-2/audit"),
        ],
    )
    def test_what_is_behind_the_mount(self, path, root, route):
        """
        root_path is taken off, as far as it is there.
        """

        assert route == below_mount({"path": path, "root_path": root})


urlpatterns = [
    path("logs/<path:path>", reader.router("none").django_view),
    re_path("^bare/", reader.router("none").django_view),
    path("own/<path:path>", reader.django_view),
]


class TestDjango:
    @pytest.fixture(autouse=True)
    def _django(self, rows):
        configure()
        with override_settings(ROOT_URLCONF=__name__, MIDDLEWARE=[]):
            self.servers = {
                "wsgi": partial(wsgi_thread, WSGIHandler()),
                "asgi": partial(asgi_thread, ASGIHandler()),
            }
            yield

    def test_as_a_wsgi_view(self):
        """
        The view answers every route, with its headers.
        """
        with self.servers["wsgi"]() as base:
            response = httpx.get(f"{base}/logs/audit?request_id=a1b2c3d4")
            missing = httpx.get(f"{base}/logs/nope/audit")

        assert ["p-1", "u-42"] == [row["target"] for row in response.json()["rows"]]
        assert "no-store" == response.headers["cache-control"]
        assert 404 == missing.status_code

    def test_a_pattern_that_captures_nothing(self):
        """
        The last part of the URL is the route.
        """
        with self.servers["wsgi"]() as base:
            response = httpx.get(f"{base}/bare/audit?target=u-42")

        assert 1 == len(response.json()["rows"])

    def test_the_default_view_wants_a_token(self):
        """
        `django_view` is `router()`: closed without FASTEN_READER_TOKEN.
        """
        with self.servers["wsgi"]() as base:
            token = {"Authorization": f"Bearer {TOKEN}"}
            without = httpx.get(f"{base}/own/audit")
            with_it = httpx.get(f"{base}/own/audit", headers=token)

        assert [401, 200] == [without.status_code, with_it.status_code]

    @pytest.mark.parametrize("kind", ["wsgi", "asgi"])
    def test_lines(self, kind):
        """
        Lines stream under both of Django's servers, without a warning.
        """
        with self.servers[kind]() as base:
            url = f"{base}/logs/audit?code=ORDER_PLACED"
            response = httpx.get(url, headers=LINES)

        assert 500 == len(response.text.splitlines())

    def test_a_value_that_is_not_utf_8(self):
        """
        Bytes that are no text are refused here as elsewhere.
        """
        with self.servers["wsgi"]() as base:
            answer = talk(
                base, b"GET /logs/audit?actor=%E9 HTTP/1.0\r\nHost: x\r\n\r\n"
            )

        assert b" 400 " in answer.splitlines()[0]


# --- the page -------------------------------------------------------------------------

PAGE = [
    'curl "http://$HOST/api/v1/logs/audit?request_id=a1b2c3d4"',
    'curl "http://$HOST/api/v1/logs/audit?code=PIPELINE_DEPLOYED&since=2026-04-20"',
    'curl "http://$HOST/api/v1/logs/audit?actor=admin&target=u-42&offset=0&limit=20"',
    'curl "http://$HOST/api/v1/logs/sys?request_id=a1b2c3d4"',
    'curl "http://$HOST/api/v1/logs/api?request_id=a1b2c3d4"',
]


class TestPage:
    @pytest.mark.parametrize("line", PAGE)
    @pytest.mark.parametrize("auth", ["none", "token"])
    def test_curl_lines(self, rows, line, auth):
        """
        Each curl line of the page runs as printed; with a token where one is set.
        """
        require_binary("curl", "curl")
        import fastapi

        app = fastapi.FastAPI()
        app.add_middleware(RequestIDMiddleware)
        app.add_middleware(APILogger)
        app.mount(MOUNT, reader.router("none") if auth == "none" else reader.router())
        if auth == "token":
            line += f' -H "Authorization: Bearer {TOKEN}"'
        with asgi_thread(app) as base:
            host = base.removeprefix("http://")
            ran = subprocess.run(
                ["bash", "-c", f"{line} -sS --fail"],
                env={"HOST": host, "PATH": "/usr/bin:/bin"},
                capture_output=True,
                check=True,
            )

        assert 1 <= len(json.loads(ran.stdout)["rows"]) <= 2

    def test_a_read_carries_the_requests_id(self, rows):
        """
        With the middleware around it, the record of a read has the request's id.
        """
        router = reader.router("none")
        with asgi_thread(RequestIDMiddleware(router)) as base:
            headers = {"X-Request-ID": "read-1"}
            httpx.get(f"{base}/audit", headers=headers)
        fasten.flush(20)
        (row,) = fasten.query(code="AUDIT_READ").rows

        assert ("read-1", "anonymous", "127.0.0.1") == (
            row.request_id,
            row.actor,
            row.client,
        )


# --- hostile requests -----------------------------------------------------------------

HOSTILE = [
    b"GET /audit?a=" + b"b" * 2**20 + b" HTTP/1.0\r\n\r\n",
    b"GET /audit?actor=" + b"%41" * 40_000 + b" HTTP/1.0\r\n\r\n",
    b"GET /audit?"
    + b"&".join(b"a%d=1" % n for n in range(5000))
    + b" HTTP/1.0\r\n\r\n",
    b"GET /audit?actor=\xe9 HTTP/1.0\r\n\r\n",
    b"GET /audit?actor=%E9 HTTP/1.0\r\n\r\n",
    b"GET /audit?actor=%00 HTTP/1.0\r\n\r\n",
    b"GET /audit?actor=%ED%A0%80 HTTP/1.0\r\n\r\n",
    b"GET /audit?% HTTP/1.0\r\n\r\n",
    b"GET /audit?limit=%EF%BC%91 HTTP/1.0\r\n\r\n",
    b"GET /audit?cursor=%F0%9F%98%80 HTTP/1.0\r\n\r\n",
    b"GET /%E9 HTTP/1.0\r\n\r\n",
    b"GET /%00 HTTP/1.0\r\n\r\n",
    b"GET /audit%0D%0ASet-Cookie:%20a=b HTTP/1.0\r\n\r\n",
    b"GET /audit/../../etc/passwd HTTP/1.0\r\n\r\n",
    b"GET //audit HTTP/1.0\r\n\r\n",
    b"GET /audit HTTP/1.0\r\nAccept: \xff\xfe\r\n\r\n",
    b"GET /audit HTTP/1.0\r\nAuthorization: Bearer \xff\xfe\r\n\r\n",
    b"GET /audit HTTP/1.0\r\nX-Request-ID: \xe9\xff\r\n\r\n",
    b"GET /audit HTTP/1.0\r\nX-Request-ID: " + b"a" * 5000 + b"\r\n\r\n",
    b"POST /audit HTTP/1.0\r\nContent-Length: 5\r\n\r\nhello",
    b"WOMBAT /audit HTTP/1.0\r\n\r\n",
]


class TestHostile:
    @pytest.mark.parametrize("kind", ["asgi", "wsgi"])
    def test_raw_requests(self, rows, kind):
        """
        Whatever comes over the socket, the answer is no 5xx, and injects nothing.
        """
        router = reader.router("none")
        serve, app = (
            (asgi_thread, router) if kind == "asgi" else (wsgi_thread, router.wsgi)
        )
        with serve(app) as base:
            answers = [talk(base, request) for request in HOSTILE]

        for request, answer in zip(HOSTILE, answers, strict=True):
            head = answer.partition(b"\r\n\r\n")[0]
            status = int(head.split(b" ", 2)[1])

            assert status < 500, request[:80]
            assert b"set-cookie" not in head.lower()


# --- ASGI, message by message ---------------------------------------------------------


def scope(path="/audit", **others):
    """
    Return an HTTP scope.
    """
    return {
        "type": "http",
        "method": "GET",
        "path": path,
        "root_path": "",
        "query_string": b"",
        "headers": [],
        **others,
    }


class Client:
    """
    The server's side of one request: hands out nothing, keeps what is sent.
    """

    def __init__(self, hang_up_after=None):
        self.sent = []
        self._hang_up_after = hang_up_after
        self._gone = asyncio.Event()
        self.has_body = asyncio.Event()

    async def receive(self):
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message):
        self.sent.append(message)
        if message["type"] == "http.response.body":
            self.has_body.set()
        if len(self.sent) == self._hang_up_after:
            self._gone.set()
            await asyncio.sleep(0)


class TestAsgi:
    def test_the_body_of_a_request_is_not_waited_for(self, rows):
        """
        A client that sends no body, or a slow one, gets its answer.
        """

        async def run():
            client = Client()
            await reader.router("none")(scope(), client.receive, client.send)
            return client.sent

        start, body = asyncio.run(run())

        assert 200 == start["status"]
        assert not body["more_body"]

    def test_who_hangs_up_is_read_to_no_more(self, rows):
        """
        After a disconnect no further page is read.
        """

        async def run():
            client = Client(hang_up_after=2)
            lines = scope(headers=[(b"accept", b"application/x-ndjson")])
            await reader.router("none")(lines, client.receive, client.send)
            return client.sent

        start, *pieces = asyncio.run(run())

        assert 200 == start["status"]
        assert 1 == len(pieces)

    def test_the_event_loop_is_not_blocked(self, rows):
        """
        Requests are answered in threads, a few at a time.
        """
        seen, most = set(), []
        lock, barrier = threading.Lock(), threading.Barrier(THREADS)
        running = []

        def auth(headers):
            with lock:
                seen.add(threading.current_thread())
                running.append(1)
                most.append(len(running))
            barrier.wait(20)
            with lock:
                running.pop()

        async def run():
            router = reader.router(auth=auth)
            clients = [Client() for _ in range(3 * THREADS)]
            await asyncio.gather(
                *(router(scope(), client.receive, client.send) for client in clients)
            )
            return [client.sent[0]["status"] for client in clients]

        assert [401] * 3 * THREADS == asyncio.run(run())
        assert threading.main_thread() not in seen
        assert THREADS == max(most)

    def test_one_router_serves_several_loops(self, rows):
        """
        A router outlives an event loop.
        """
        router = reader.router("none")

        async def run():
            clients = [Client() for _ in range(2 * THREADS)]
            await asyncio.gather(
                *(router(scope(), client.receive, client.send) for client in clients)
            )
            return {client.sent[0]["status"] for client in clients}

        assert [{200}, {200}] == [asyncio.run(run()) for _ in range(2)]

    def test_cancelling_a_stream(self, rows):
        """
        A request that is cancelled while a page is read ends quietly.
        """

        async def run():
            client = Client()
            lines = scope(headers=[(b"accept", b"application/x-ndjson")])
            router = reader.router("none")
            task = asyncio.create_task(router(lines, client.receive, client.send))
            await client.has_body.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

        asyncio.run(run())

    def test_lifespan(self):
        """
        As an application of its own it starts and stops with the server.
        """

        async def run():
            sent = []
            messages = iter(["lifespan.startup", "lifespan.shutdown"])

            async def receive():
                return {"type": next(messages)}

            async def send(message):
                sent.append(message["type"])

            await reader.router("none")({"type": "lifespan"}, receive, send)
            return sent

        assert [
            "lifespan.startup.complete",
            "lifespan.shutdown.complete",
        ] == asyncio.run(run())

    def test_websockets_are_closed(self):
        """
        The reader speaks HTTP; a websocket is closed before it is accepted.
        """

        async def run():
            sent = []

            async def receive():
                return {"type": "websocket.connect"}

            async def send(message):
                sent.append(message)

            await reader.router("none")({"type": "websocket"}, receive, send)
            return sent

        assert ["websocket.close"] == [
            message["type"] for message in asyncio.run(run())
        ]


class TestWsgi:
    def test_a_body_that_is_not_read_to_its_end(self, rows):
        """
        The server closes the body, and with it the reading.
        """
        started = []
        environ = {
            "REQUEST_METHOD": "GET",
            "PATH_INFO": "/audit",
            "HTTP_ACCEPT": "application/x-ndjson",
        }
        body = reader.router("none").wsgi(environ, lambda *given: started.append(given))
        first = next(iter(body))
        body.close()

        assert "200 OK" == started[0][0]
        assert 200 == len(first.splitlines())
        assert [] == list(body)

    def test_a_bare_environ(self):
        """
        What a server leaves out of the environ is not missed.
        """
        started = []
        body = reader.router("none").wsgi({}, lambda *given: started.append(given))

        assert "404 Not Found" == started[0][0]
        assert json.loads(b"".join(body))["status"] == 404
