# SPDX-License-Identifier: Apache-2.0
"""
Django: entries of MIDDLEWARE, for sync and async servers alike.

The application for INSTALLED_APPS, which calls `fasten.init()`, is in `apps`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, aclosing, suppress
from typing import TYPE_CHECKING, Any, Final

from fasten.context import Context, resume
from fasten_shims._http import HEADER, KEY, Asker, Asks, Exchange, open_scope, skipper

if TYPE_CHECKING:
    from django.http import HttpRequest

__all__ = ["APILogger", "RequestIDMiddleware", "options", "username"]

_END: Final = object()


def options() -> dict[str, Any]:
    """
    Return `settings.FASTEN` with its names in lower case and without prefix.

    `actor`, `tenant`, `client` (functions of the request, or dotted paths to them)
    and `skip` are the middlewares'; the others are arguments of `fasten.init()`.
    """
    from django.conf import settings

    given: Mapping[str, Any] = getattr(settings, "FASTEN", {})
    return {key.lower().removeprefix("fasten_"): given[key] for key in given}


def username(request: HttpRequest) -> str | None:
    """
    Return the name of the user who is logged in: the actor, unless told otherwise.
    """
    # An async view's user was loaded before it (see `_load_user`): there the lazy
    # `request.user` may not touch the database.
    for name in ("_acached_user", "user"):
        user = getattr(request, name, None)
        if user is not None and user.is_authenticated:
            return str(user.get_username())
    return None


class _Middleware:
    """
    Open the request's scope, unless a middleware around this one has done so.
    """

    sync_capable = True
    async_capable = True

    def __init__(
        self,
        get_response: Callable[[Any], Any],
        *,
        actor: Asker | None = None,
        tenant: Asker | None = None,
        client: Asker | None = None,
    ) -> None:
        from asgiref.sync import iscoroutinefunction, markcoroutinefunction

        self.get_response = get_response
        self._asks = _asks(actor=actor, tenant=tenant, client=client)
        self._is_async = iscoroutinefunction(get_response)
        if self._is_async:
            markcoroutinefunction(self)
        if self._asks.actor is username:
            self.process_view = _load_user_async if self._is_async else _load_user

    def __call__(self, request: HttpRequest) -> Any:
        """
        Answer one request, or return the coroutine that does.
        """
        if self._is_async:
            return self._answer_async(request)
        exchange = self._inside(request)
        if exchange is not None:
            return _routed(exchange, request, self.get_response(request))
        with _open(request, self._asks) as cell:
            exchange = self._outermost(cell, request)
            try:
                response = self.get_response(request)
            except BaseException as error:
                exchange.fail(error)
                raise
        return exchange.answer(response)

    async def _answer_async(self, request: HttpRequest) -> Any:
        exchange = self._inside(request)
        if exchange is not None:
            return _routed(exchange, request, await self.get_response(request))
        with _open(request, self._asks) as cell:
            exchange = self._outermost(cell, request)
            try:
                response = await self.get_response(request)
            except BaseException as error:
                exchange.fail(error)
                raise
        return exchange.answer(response)

    def _inside(self, request: HttpRequest) -> Exchange | None:
        """
        Join the exchange that stands around this middleware, if there is one.

        It may also be one of `shim.http` or `shim.wsgi` around all of Django.
        """
        server = getattr(request, "scope", None) or request.META
        exchange: Exchange | None = server.get(KEY)
        if exchange is not None:
            exchange.ask(request, self._asks)
            self._join(exchange)
        return exchange

    def _outermost(self, cell: Context, request: HttpRequest) -> _Exchange:
        exchange = _Exchange(cell, self._asks, request)
        server = getattr(request, "scope", None) or request.META
        server[KEY] = exchange
        self._join(exchange)
        return exchange

    def _join(self, exchange: Exchange) -> None:
        raise NotImplementedError


class RequestIDMiddleware(_Middleware):
    """
    Give each request its id: the caller's X-Request-ID, or a new one.

    Everything emitted and logged on the request's behalf carries it, and so does the
    answer. The actor is `request.user`, looked at when a row first wants to know;
    `settings.FASTEN` may name other functions of the request.
    """

    def _join(self, exchange: Exchange) -> None:
        exchange.is_stamped = True


class APILogger(_Middleware):
    """
    Record one api row for each request, but for the paths of *skip*.

    *skip* holds paths in which `*` stands for any text; by default it is that of
    `settings.FASTEN`.
    """

    def __init__(
        self,
        get_response: Callable[[Any], Any],
        *,
        skip: str | Iterable[str] | None = None,
        actor: Asker | None = None,
        tenant: Asker | None = None,
        client: Asker | None = None,
    ) -> None:
        super().__init__(get_response, actor=actor, tenant=tenant, client=client)
        self._is_skipped = skipper(options().get("skip", ()) if skip is None else skip)

    def _join(self, exchange: Exchange) -> None:
        exchange.log(self._is_skipped)


def _asks(**given: Asker | None) -> Asks:
    from django.utils.module_loading import import_string

    settings = {"actor": username, **options()}
    for name, asker in given.items():
        chosen = settings.get(name) if asker is None else asker
        given[name] = import_string(chosen) if isinstance(chosen, str) else chosen
    return Asks.checked(**given)


def _load_user(request: Any, view: Any, *_: Any) -> None:
    """
    Load the user before an async view, in which the lazy way is not allowed.
    """
    if _needs_user(request, view):
        with suppress(Exception):  # the view may do without; a row will ask again
            bool(request.user.is_authenticated)


async def _load_user_async(request: Any, view: Any, *_: Any) -> None:
    if _needs_user(request, view) and hasattr(request, "auser"):
        with suppress(Exception):
            await request.auser()


def _needs_user(request: Any, view: Any) -> bool:
    from asgiref.sync import iscoroutinefunction
    from django.conf import settings

    # Without a session there is nobody to load.
    is_known = settings.SESSION_COOKIE_NAME in request.COOKIES
    return is_known and hasattr(request, "user") and iscoroutinefunction(view)


def _open(request: HttpRequest, asks: Asks) -> AbstractContextManager[Context]:
    inbound = request.META.get("HTTP_X_REQUEST_ID")
    return open_scope(
        # Repeated headers are joined with a comma, which no id may hold.
        () if inbound is None else (inbound,),
        request.META.get("HTTP_TRACEPARENT"),
        client=request.META.get("REMOTE_ADDR") or None,
        request=request,
        asks=asks,
    )


def _routed(exchange: Exchange, request: HttpRequest, response: Any) -> Any:
    exchange.route = exchange.route or _template(request)
    return response


def _template(request: HttpRequest) -> str | None:
    template = getattr(request.resolver_match, "route", None)
    if not isinstance(template, str):
        return None
    return template if template.startswith("^") else f"/{template}"


class _Exchange(Exchange):
    """
    A request that Django answers; it ends when Django closes the request.
    """

    __slots__ = ("_request", "_response")

    def __init__(self, cell: Context, asks: Asks, request: HttpRequest) -> None:
        method = request.method or ""
        super().__init__(cell, asks, method, request.path, request.path_info)
        self._request = request
        self._response: Any = None

    def answer(self, response: Any) -> Any:
        """
        Put the id on *response*, and watch it until it has been sent.
        """
        self._response = response
        if self.is_stamped:
            response[HEADER] = self.cell.request_id
        if not response.streaming or getattr(response, "file_to_stream", None):
            self.is_complete = True
        elif response.is_async:
            response.streaming_content = self._pieces_async(response.streaming_content)
        else:
            response.streaming_content = self._pieces(response.streaming_content)
        if self.is_logged:
            self._watch()
        return response

    def _watch(self) -> None:
        close = self._request.close

        def closed() -> None:
            self._measure()
            self.tell()
            close()

        # Django closes the request with the response that it sent in the end, which
        # need not be the one that this middleware saw.
        self._request.close = closed

    def _measure(self) -> None:
        response = self._response
        self.status = self.status or response.status_code
        if not response.streaming:
            self.bytes = len(response.content)
        elif getattr(response, "file_to_stream", None):
            length = response.headers.get("Content-Length", "")
            self.bytes = int(length) if length.isdigit() else None

    def _pieces(self, pieces: Iterable[bytes]) -> Iterator[bytes]:
        """
        Make each piece in the request's scope: the middlewares have returned by then.
        """
        source = iter(pieces)
        try:
            while True:
                with resume(self.cell):
                    piece: Any = next(source, _END)
                if piece is _END:
                    break
                self.count(len(piece))
                yield piece
        except Exception as error:
            self.fail(error)
            raise
        self.is_complete = True

    async def _pieces_async(self, pieces: Any) -> AsyncIterator[bytes]:
        try:
            async with aclosing(aiter(pieces)) as source:
                while True:
                    with resume(self.cell):
                        piece: Any = await anext(source, _END)
                    if piece is _END:
                        break
                    self.count(len(piece))
                    yield piece
        except Exception as error:
            self.fail(error)
            raise
        self.is_complete = True

    def find_route(self) -> str | None:
        """
        Return the pattern that the URL resolver matched.
        """
        return _template(self._request)
