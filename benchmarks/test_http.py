# SPDX-License-Identifier: Apache-2.0
"""
Row 15: what both middlewares together add to a request.

The same request goes through a bare application and through both middlewares, of
ASGI and of WSGI, in this thread and without a server: sockets would drown it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import fasten
from benchmarks.reference import (
    as_line,
    events,
    latencies_ns,
    median,
    settle,
    structlog_logger,
)
from fasten.shim import http, wsgi

ROUNDS = 7
CALLS = 2000


def test_both_middlewares(benchmark: Any, figure: Callable[..., None]) -> None:
    """
    Row 15: ids read or minted in turn, headers of a browser, one api row each.
    """
    fasten.init(service_id="bench", node_id="bench-1", stdout="")
    log = structlog_logger()
    asgi_apps = bare_asgi, http.RequestIDMiddleware(http.APILogger(bare_asgi))
    wsgi_apps = bare_wsgi, wsgi.RequestIDMiddleware(wsgi.APILogger(bare_wsgi))
    for number in range(ROUNDS):
        lines = [as_line(event) for event in events(CALLS, start=number * CALLS)]
        settle()
        line = median(latencies_ns(log, "info", lines))
        for serve, apps in ((serve_asgi, asgi_apps), (serve_wsgi, wsgi_apps)):
            settle()
            bare, both = (serve(app, number * CALLS) for app in apps)
            figure("15", (both - bare) / line)
    benchmark.pedantic(serve_asgi, args=(asgi_apps[1], 0), rounds=3, iterations=1)
    fasten.close()


def serve_asgi(app: Any, start: int) -> float:
    """
    Return the median time of a request of *app*, in nanoseconds.
    """

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        pass

    async def serve() -> list[int]:
        taken = []
        for n in range(start, start + CALLS):
            scope = {
                "type": "http",
                "method": "GET",
                "path": f"/users/{n}",
                "headers": [*HEADERS, *([(b"x-request-id", b"r-%d" % n)] * (n % 2))],
                "client": ("203.0.113.7", 5000),
                "root_path": "",
            }
            before = time.perf_counter_ns()
            await app(scope, receive, send)
            taken.append(time.perf_counter_ns() - before)
        return taken

    return median(asyncio.run(serve()))


def serve_wsgi(app: Any, start: int) -> float:
    """
    Return the median time of a request of *app*, in nanoseconds.
    """
    taken = []
    for n in range(start, start + CALLS):
        environ = {
            "REQUEST_METHOD": "GET",
            "SCRIPT_NAME": "",
            "PATH_INFO": f"/users/{n}",
            "REMOTE_ADDR": "203.0.113.7",
            **{f"HTTP_{name.decode().upper()}": "" for name, _ in HEADERS},
            **({"HTTP_X_REQUEST_ID": f"r-{n}"} if n % 2 else {}),
        }
        before = time.perf_counter_ns()
        body = app(environ, start_response)
        for _ in body:
            pass
        if hasattr(body, "close"):
            body.close()
        taken.append(time.perf_counter_ns() - before)
    return median(taken)


HEADERS = [
    (b"host", b"shop.example"),
    (b"user-agent", b"Mozilla/5.0"),
    (b"accept", b"*/*"),
    (b"accept-encoding", b"gzip, br"),
    (b"accept-language", b"en"),
    (b"cookie", b"session=abc"),
    (b"connection", b"keep-alive"),
]
ANSWER = [(b"content-type", b"text/plain"), (b"content-length", b"2")]


async def bare_asgi(_: Any, receive: Any, send: Any) -> None:
    """
    Answer two bytes.
    """
    await receive()
    await send({"type": "http.response.start", "status": 200, "headers": ANSWER})
    await send({"type": "http.response.body", "body": b"ok", "more_body": False})


def bare_wsgi(_: Any, respond: Any) -> list[bytes]:
    """
    Answer two bytes.
    """
    respond("200 OK", [("Content-Type", "text/plain"), ("Content-Length", "2")])
    return [b"ok"]


def start_response(*_: Any) -> Any:
    """
    Take status and headers, as servers do.
    """
    return len
