# SPDX-License-Identifier: Apache-2.0
"""
WSGI: any application that a WSGI server runs.

Flask has a hook of its own that uses these (`flask`); Django has middlewares of its
own (`django`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, suppress
from contextvars import Context as Variables
from contextvars import copy_context
from functools import partial
from typing import Any, Final, cast

from fasten.context import Context
from fasten_shims._http import HEADER, KEY, Asker, Asks, Exchange, open_scope, skipper

__all__ = ["APILogger", "RequestIDMiddleware"]

Environ = dict[str, Any]
Headers = list[tuple[str, str]]
StartResponse = Callable[..., Callable[[bytes], object]]
App = Callable[[Environ, StartResponse], Iterable[bytes]]

_NAME: Final = HEADER.lower()


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

    def __call__(
        self, environ: Environ, start_response: StartResponse
    ) -> Iterable[bytes]:
        """
        Run the application for one request.
        """
        exchange = environ.get(KEY)
        if exchange is not None:
            exchange.ask(environ, self._asks)
            self._join(exchange)
            return self.app(environ, start_response)
        # The server's thread never sees the scope: what it does next is not ours.
        variables = copy_context()
        return variables.run(self._begin, environ, start_response, variables)

    def _begin(
        self, environ: Environ, start_response: StartResponse, variables: Variables
    ) -> Iterable[bytes]:
        # Never left: it ends with the copied variables, when the body is closed.
        cell = _open(environ, self._asks).__enter__()
        root = _text(environ.get("SCRIPT_NAME", ""))
        path = root + _text(environ.get("PATH_INFO", ""))
        exchange = Exchange(cell, self._asks, environ["REQUEST_METHOD"], path, root)
        environ[KEY] = exchange
        self._join(exchange)
        return _Wire(exchange, environ, start_response).run(self.app, variables)

    def _join(self, exchange: Exchange) -> None:
        raise NotImplementedError


class RequestIDMiddleware(_Middleware):
    """
    Give each request its id: the caller's X-Request-ID, or a new one.

    Everything emitted and logged on the request's behalf carries it, and so does the
    answer. *actor*, *tenant* and *client* are functions of the WSGI environ, called
    when a row first wants to know.
    """

    def _join(self, exchange: Exchange) -> None:
        exchange.is_stamped = True


class APILogger(_Middleware):
    """
    Record one api row for each request, but for the paths of *skip*.

    *skip* holds paths in which `*` stands for any text: `{"/health", "/static/*"}`.
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


def _open(environ: Environ, asks: Asks) -> AbstractContextManager[Context]:
    inbound = environ.get("HTTP_X_REQUEST_ID")
    return open_scope(
        # Servers join repeated headers with a comma, which no id may hold.
        () if inbound is None else (inbound,),
        environ.get("HTTP_TRACEPARENT"),
        client=environ.get("REMOTE_ADDR") or None,
        request=environ,
        asks=asks,
    )


def _text(value: str) -> str:
    """
    Read a path as the bytes it came as: WSGI hands them over as Latin-1.
    """
    if value.isascii():
        return value
    return value.encode("latin-1", "replace").decode("utf-8", "replace")


def _content_length(headers: Headers) -> int | None:
    for name, value in headers:
        if len(name) == 14 and name.lower() == "content-length":
            return int(value) if value.isdecimal() else None
    return None


def rule(environ: Environ, exchange: Exchange) -> str | None:
    """
    Return the rule that Flask, or another user of Werkzeug, matched.
    """
    found = getattr(environ.get("werkzeug.request"), "url_rule", None)
    template = getattr(found, "rule", None)
    if not isinstance(template, str):
        return None
    return _text(environ["SCRIPT_NAME"]).removeprefix(exchange.root) + template


class _Wire:
    """
    The answer of one request, on its way from the application to the server.
    """

    __slots__ = ("_environ", "_exchange", "_length", "_start_response")

    def __init__(
        self, exchange: Exchange, environ: Environ, start_response: StartResponse
    ) -> None:
        self._exchange, self._environ = exchange, environ
        self._start_response = start_response
        self._length: int | None = None

    def run(self, app: App, variables: Variables) -> Iterable[bytes]:
        """
        Call *app*, and return its answer so that its iteration is seen.
        """
        try:
            answer = app(self._environ, self.start_response)
        except BaseException as error:
            self._exchange.fail(error)
            raise
        wrapper = self._environ.get("wsgi.file_wrapper")
        if isinstance(wrapper, type) and isinstance(answer, wrapper):
            with suppress(AttributeError):  # one made in C takes no attributes
                self._watch(answer)
                return answer
        # Some servers take the length of a single piece for Content-Length.
        is_sized = hasattr(type(answer), "__len__")
        kind = _SizedBody if is_sized else _Body
        return kind(self, self._exchange, variables, answer)

    def start_response(
        self, status: str, headers: Headers, exc_info: Any = None
    ) -> Callable[[bytes], object]:
        """
        Hand the answer's status and headers to the server, with the id among them.
        """
        exchange = self._exchange
        exchange.status = int(status[:3])
        if exchange.is_stamped:
            headers = [pair for pair in headers if pair[0].lower() != _NAME]
            headers.append((HEADER, exchange.cell.request_id))
        self._length = _content_length(headers)
        if exchange.is_logged and exchange.route is None:
            # Flask takes its request out of the environ when it has answered.
            exchange.route = rule(self._environ, exchange)
        more = () if exc_info is None else (exc_info,)
        return partial(self._write, self._start_response(status, headers, *more))

    def _write(self, write: Callable[[bytes], object], piece: bytes) -> None:
        write(piece)
        self._exchange.count(len(piece))

    def is_full(self, piece: bytes) -> bool:
        """
        Count a piece of the body; tell whether Content-Length is reached with it.
        """
        self._exchange.count(len(piece))
        return self._exchange.bytes == self._length

    def end(self) -> None:
        """
        Note that the body has been taken to its end.
        """
        exchange = self._exchange
        exchange.is_complete = exchange.status is not None
        exchange.status = exchange.status or 500  # an application that said nothing
        exchange.tell()

    def _watch(self, file: Any) -> None:
        """
        Have the row recorded when *file* is closed.

        It stays what it is: the server knows a faster way to send such a one.
        """
        close = getattr(file, "close", None)

        def closed() -> None:
            self._exchange.bytes = self._length
            self.end()
            if close is not None:
                close()

        file.close = closed


class _Body:
    """
    An answer's body, each piece made under the request's own variables.

    Servers iterate when the application has returned, and some in another thread.
    """

    def __init__(
        self,
        wire: _Wire,
        exchange: Exchange,
        variables: Variables,
        answer: Iterable[bytes],
    ) -> None:
        self._wire, self._exchange, self._answer = wire, exchange, answer
        self._run = variables.run
        self._pieces = iter(answer)

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        exchange = self._exchange
        try:
            piece = self._run(next, self._pieces)
        except StopIteration:
            if not exchange.is_told:
                self._run(self._wire.end)
            raise
        except BaseException as error:
            self._run(exchange.fail, error)
            raise
        if self._wire.is_full(piece):
            # Not every server asks whether there is another piece.
            self._run(self._wire.end)
        return piece

    def close(self) -> None:
        """
        Close what the application returned; unread pieces make the row incomplete.
        """
        if not self._exchange.is_told:
            self._run(self._exchange.tell)
        close = getattr(self._answer, "close", None)
        if close is not None:
            self._run(close)


class _SizedBody(_Body):
    """
    A body whose number of pieces is known, as a list's is.
    """

    def __len__(self) -> int:
        return len(cast("list[bytes]", self._answer))
