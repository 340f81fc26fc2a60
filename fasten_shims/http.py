# SPDX-License-Identifier: Apache-2.0
"""
ASGI: Starlette, FastAPI, Litestar, and whatever else speaks it.

What is the same for every kind of HTTP server lives in `_http`; Django has a module
of its own, as its middlewares are no ASGI applications.
"""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from contextlib import AbstractContextManager, suppress
from typing import TYPE_CHECKING, Any, Final

from fasten import NotInitialized, flush
from fasten.context import Context
from fasten_shims._http import (
    ABORTED,
    HEADER,
    KEY,
    Asker,
    Asks,
    Exchange,
    open_scope,
    skipper,
)

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

__all__ = ["APILogger", "RequestIDMiddleware", "exception_handler", "wrap"]

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_NAME: Final = HEADER.lower().encode()
_GOODBYE_S: Final = 1.5


class _Middleware:
    """
    Open the request's scope, unless a middleware around this one has done so.
    """

    def __init__(
        self,
        app: App,
        *,
        actor: Asker | None = None,
        tenant: Asker | None = None,
        client: Asker | None = None,
    ) -> None:
        self.app = app
        self._asks = Asks.checked(actor, tenant, client)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """
        Run the application for one request, websocket, or lifespan.
        """
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, _flushing(send))
            return
        exchange = scope.get(KEY)
        if exchange is not None:
            exchange.ask(scope, self._asks)
            self._join(exchange)
            await self.app(scope, receive, send)
            return
        with _open(scope, self._asks) as cell:
            # A websocket has no method of its own: it began as a GET.
            method, root = scope.get("method", "GET"), scope.get("root_path", "")
            exchange = Exchange(cell, self._asks, method, scope["path"], root)
            scope[KEY] = exchange
            self._join(exchange)
            await _Wire(exchange, scope, receive, send).run(self.app)

    def _join(self, exchange: Exchange) -> None:
        raise NotImplementedError


class RequestIDMiddleware(_Middleware):
    """
    Give each request its id: the caller's X-Request-ID, or a new one.

    Everything emitted and logged on the request's behalf carries it, and so does the
    answer. *actor*, *tenant* and *client* are functions of the ASGI scope, called
    when a row first wants to know.
    """

    def _join(self, exchange: Exchange) -> None:
        exchange.is_stamped = True


class APILogger(_Middleware):
    """
    Record one api row for each request, but for the paths of *skip*.

    *skip* holds paths in which `*` stands for any text: `{"/health", "/static/*"}`.
    A websocket is one row when it closes, with status 101.
    """

    def __init__(
        self,
        app: App,
        *,
        skip: str | Iterable[str] = (),
        actor: Asker | None = None,
        tenant: Asker | None = None,
        client: Asker | None = None,
    ) -> None:
        super().__init__(app, actor=actor, tenant=tenant, client=client)
        self._is_skipped = skipper(skip)

    def _join(self, exchange: Exchange) -> None:
        exchange.log(self._is_skipped)


def wrap(
    app: App,
    *,
    actor: Asker | None = None,
    tenant: Asker | None = None,
    client: Asker | None = None,
) -> RequestIDMiddleware:
    """
    Put RequestIDMiddleware around a whole application, for the server to run.

    `add_middleware` puts it inside: Starlette answers unhandled exceptions further
    out, with a 500 that lacks the id. Around the application nothing escapes it.
    """
    return RequestIDMiddleware(app, actor=actor, tenant=tenant, client=client)


async def exception_handler(
    request: Request,
    error: Exception,  # noqa: ARG001  (Starlette hands it over)
) -> Response:
    """
    Answer an unhandled exception as Starlette would, and name the request's id.

    For `app.add_exception_handler(Exception, exception_handler)`, where `wrap` is not
    wanted.
    """
    from starlette.responses import PlainTextResponse

    exchange = request.scope.get(KEY)
    headers = {} if exchange is None else {HEADER: exchange.cell.request_id}
    return PlainTextResponse("Internal Server Error", status_code=500, headers=headers)


def _flushing(send: Send) -> Send:
    """
    Deliver what waits when the lifespan ends.

    uvicorn then dies of the signal that it caught, and no exit handler runs.
    """

    async def sent(message: Message) -> None:
        if message["type"] == "lifespan.shutdown.complete":
            # Not `aflush`: trio has no asyncio threads, and nobody is served any more.
            with suppress(NotInitialized):
                flush(_GOODBYE_S)
        await send(message)

    return sent


def _open(scope: Scope, asks: Asks) -> AbstractContextManager[Context]:
    ids, traces = [], []
    for name, value in scope["headers"]:
        if name == _NAME:
            ids.append(value)
        elif name == b"traceparent":
            traces.append(value)
    peer = scope.get("client")
    return open_scope(
        ids,
        traces[0] if len(traces) == 1 else None,
        client=peer[0] if peer else None,
        request=scope,
        asks=asks,
    )


class _Wire:
    """
    The messages of one request, on their way between server and application.
    """

    __slots__ = ("_exchange", "_is_gone", "_receive", "_scope", "_send")

    def __init__(
        self, exchange: Exchange, scope: Scope, receive: Receive, send: Send
    ) -> None:
        self._exchange, self._scope = exchange, scope
        self._receive, self._send = receive, send
        self._is_gone = False

    async def run(self, app: App) -> None:
        """
        Run *app*, and record the row if the answer's end has not.
        """
        exchange = self._exchange
        try:
            await app(self._scope, self.receive, self.send)
        except BaseException as error:
            self._blame(error)
            raise
        if exchange.status is None:
            # The server answers in the application's place.
            exchange.status = ABORTED if self._is_gone else 500
        exchange.tell()

    async def receive(self) -> Message:
        """
        Take the server's next message, and notice when the client has left.
        """
        message = await self._receive()
        kind = message["type"]
        if kind == "http.disconnect":
            self._is_gone = True
        elif kind == "websocket.disconnect":
            # 1006: the connection broke; any other code is a way to say goodbye.
            self._is_gone = message.get("code") == 1006
            self._exchange.is_complete = not self._is_gone
        return message

    async def send(self, message: Message) -> None:
        """
        Hand the application's message to the server, with the id in its headers.
        """
        kind = message["type"]
        if kind in _HEADINGS:
            message = self._begin(message)
        try:
            await self._send(message)
        except OSError:
            # What servers raise when nobody listens any more (ASGI 2.4).
            self._is_gone = True
            raise
        if kind == "http.response.body":
            self._take(len(message.get("body", b"")), message)
        elif kind not in _HEADINGS:
            self._note(kind, message)

    def _begin(self, message: Message) -> Message:
        exchange = self._exchange
        exchange.status = message.get("status", 101)
        self._find_route()
        if not exchange.is_stamped:
            return message
        kept = [
            pair
            for pair in message.get("headers") or ()
            if len(pair[0]) != len(_NAME) or bytes(pair[0]).lower() != _NAME
        ]
        kept.append((_NAME, exchange.cell.request_id.encode()))
        return {**message, "headers": kept}

    def _take(self, size: int | None, message: Message) -> None:
        """
        Count a piece of the body; the last one ends the exchange.

        What the application does afterwards, its background tasks, takes no part in
        the row.
        """
        exchange = self._exchange
        exchange.count(size)
        if not message.get("more_body", False):
            exchange.is_complete = not self._is_gone
            exchange.tell()

    def _note(self, kind: str, message: Message) -> None:
        exchange = self._exchange
        if kind == "websocket.send":
            text = message.get("text")
            data = message.get("bytes") if text is None else text.encode()
            exchange.count(len(data or b""))
        elif kind == "websocket.close":
            self._find_route()
            exchange.status = exchange.status or 403
            exchange.is_complete = True
        elif kind == "websocket.http.response.body":
            exchange.count(len(message.get("body", b"")))
            exchange.is_complete = not message.get("more_body", False)
        elif kind == "http.response.zerocopysend":
            self._take(message.get("count"), message)
        elif kind == "http.response.pathsend":
            self._take(None, message)

    def _blame(self, error: BaseException) -> None:
        exchange = self._exchange
        if exchange.is_told:
            return  # it had answered before
        self._find_route()
        if self._is_gone and _is_parting(error):
            exchange.abort()
        else:
            exchange.fail(error)

    def _find_route(self) -> None:
        """
        Note the route's template, as Starlette, FastAPI or Litestar left it behind.
        """
        exchange, scope = self._exchange, self._scope
        if exchange.is_logged and exchange.route is None:
            template = scope.get("path_template") or _template(scope)
            if isinstance(template, str):
                exchange.route = _mounted(scope, exchange) + template


def _mounted(scope: Scope, exchange: Exchange) -> str:
    """
    Return the prefix of the mounts on the way, with the names of their parameters.
    """
    root = scope.get("root_path", "")
    if root == exchange.root or not exchange.path.startswith(root):
        return ""
    # The mounts' own come first in it, so of equal values the first one counts.
    params = reversed(scope.get("path_params", {}).items())
    names = {str(value): f"{{{name}}}" for name, value in params}
    parts = root.removeprefix(exchange.root).split("/")
    return "/".join(names.get(part, part) for part in parts)


_HEADINGS: Final = frozenset(
    ("http.response.start", "websocket.accept", "websocket.http.response.start")
)


def _is_parting(error: BaseException) -> bool:
    # If Starlette is not loaded the exception cannot be its own.
    requests = sys.modules.get("starlette.requests")
    return isinstance(error, (OSError, getattr(requests, "ClientDisconnect", OSError)))


def _template(scope: Scope) -> object:
    """
    Look in the places where frameworks leave the route of what they called.
    """
    endpoint = scope.get("endpoint")
    if endpoint is None:
        return None
    # A FastAPI router that was included keeps its own routes without the prefix;
    # what became of them stands in a context beside.
    included = (scope.get("fastapi") or {}).get("effective_route_context")
    places = (getattr(included, "starlette_route", None), included, scope.get("route"))
    for route in places:
        if (template := _leading_to(endpoint, route)) is not None:
            return template
    inner = scope["path"].removeprefix(scope.get("root_path", ""))
    return _find(endpoint, scope.get("router"), inner)


def _leading_to(endpoint: object, route: object) -> object:
    if getattr(route, "endpoint", None) is endpoint:
        return getattr(route, "path_format", None)
    # A mount in which nothing else matched: its own path is in `root_path` by now.
    return "/{path}" if getattr(route, "app", None) is endpoint else None


def _find(endpoint: object, router: object, path: str) -> object:
    """
    Find the route of *endpoint*: Starlette before 1.0 leaves none in the scope.

    *path* tells which, where several lead to it.
    """
    for route in getattr(router, "routes", None) or ():
        template = _leading_to(endpoint, route)
        if template == "/{path}" or (template and route.path_regex.match(path)):
            return template
        if (template := _find(endpoint, route, path)) is not None:
            return template
    return None
