# SPDX-License-Identifier: Apache-2.0
"""
The reader as an ASGI application: what `router()` returns.
"""

from __future__ import annotations

import asyncio
from collections.abc import (
    Awaitable,
    Callable,
    Iterable,
    Iterator,
    MutableMapping,
)
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakKeyDictionary

from fasten.engine import Engine
from fasten.reader import wsgi
from fasten.reader.answers import Response, pieces
from fasten.reader.auth import Auth
from fasten.reader.routes import Headers, Reader

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIEnvironment

__all__ = ["Router"]

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

THREADS: Final = 4
"""
How many requests are answered at a time: the event loop's threads are not all ours,
and the reader has two connections.
"""


class Router:
    """
    The reader as an application to mount: ASGI itself, WSGI by its `wsgi`.
    """

    def __init__(self, auth: Auth = None, *, engine: Engine | None = None) -> None:
        self._reader = Reader(auth, engine=engine)
        # A semaphore belongs to one event loop; a process may run several in turn.
        self._turns: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Semaphore] = (
            WeakKeyDictionary()
        )

    def handle(
        self, method: str, path: str, query: str | bytes = b"", headers: Headers = ()
    ) -> Response:
        """
        Answer one request; see `Reader.handle`.
        """
        return self._reader.handle(method, path, query, headers)

    def wsgi(
        self, environ: WSGIEnvironment, start_response: StartResponse
    ) -> Iterable[bytes]:
        """
        Answer one WSGI request.
        """
        return wsgi.application(self._reader, environ, start_response)

    def django_view(self, request: Any, path: str = "") -> Any:
        """
        Answer one Django request; *path* is what the URL pattern captured.

        Where it captured nothing, the last part of the URL is the route.
        """
        from fasten.reader import django

        return django.answer(self._reader, request, path)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """
        Answer one ASGI connection.
        """
        match scope["type"]:
            case "http":
                await self._http(scope, receive, send)
            case "lifespan":
                await _lifespan(receive, send)
            case "websocket":
                # Closed before it is accepted: the server answers 403.
                await receive()
                await send({"type": "websocket.close", "code": 1000})

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        response = await self._in_a_thread(
            self._reader.handle,
            scope["method"],
            below_mount(scope),
            scope.get("query_string", b""),
            [(k.decode("latin-1"), v.decode("latin-1")) for k, v in scope["headers"]],
        )
        headers = [
            (k.lower().encode("latin-1"), v.encode("latin-1"))
            for k, v in response.headers
        ]
        await send(
            {
                "type": "http.response.start",
                "status": response.status,
                "headers": headers,
            }
        )
        if isinstance(response.body, bytes):
            await send(_body(response.body))
        else:
            await self._stream(response.body, receive, send)

    async def _stream(
        self, body: Iterator[bytes], receive: Receive, send: Send
    ) -> None:
        gone = asyncio.ensure_future(_disconnected(receive))
        try:
            async with aclosing(pieces(body, self._in_a_thread)) as read:
                async for piece in read:
                    if gone.done():
                        return
                    await send(_body(piece, more_body=True))
            await send(_body(b""))
        finally:
            gone.cancel()
            await asyncio.gather(gone, return_exceptions=True)

    async def _in_a_thread(self, call: Callable[..., Any], *given: Any) -> Any:
        loop = asyncio.get_running_loop()
        turns = self._turns.get(loop)
        if turns is None:
            turns = self._turns[loop] = asyncio.Semaphore(THREADS)
        async with turns:
            return await asyncio.to_thread(call, *given)


def _body(piece: bytes, *, more_body: bool = False) -> Message:
    return {"type": "http.response.body", "body": piece, "more_body": more_body}


def below_mount(scope: Scope) -> str:
    """
    Return the path behind the mount: frameworks leave the whole one in the scope.

    Of a prefix that a proxy took off only *root_path* knows: then the mount is its end.
    """
    path, root = str(scope["path"]), str(scope.get("root_path") or "").strip("/")
    while root:
        if path == f"/{root}" or path.startswith(f"/{root}/"):
            return path[len(root) + 1 :]
        root = root.partition("/")[2]
    return path


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _lifespan(receive: Receive, send: Send) -> None:
    """
    Take part in a server's start and stop: there is nothing to open or close.
    """
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return
