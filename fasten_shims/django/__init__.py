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
            watch = self._outermost(cell, request)
            try:
                response = self.get_response(request)
            except BaseException as error:
                watch.fail(error)
                raise
        return watch.answer(response)

    async def _answer_async(self, request: HttpRequest) -> Any:
        exchange = self._inside(request)
        if exchange is not None:
            return _routed(exchange, request, await self.get_response(request))
        with _open(request, self._asks) as cell:
            watch = self._outermost(cell, request)
            try:
                response = await self.get_response(request)
            except BaseException as error:
                watch.fail(error)
                raise
        return watch.answer(response)

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

    def _outermost(self, cell: Context, request: HttpRequest) -> _Watch:
        root = request.path.removesuffix(request.path_info)
        method = request.method or ""
        exchange = Exchange(cell, self._asks, method, request.path, root)
        server = getattr(request, "scope", None) or request.META
        server[KEY] = exchange
        self._join(exchange)
        return _Watch(exchange, request)

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


class _Watch:
    """
    What Django makes of one request, until it closes the request.
    """

    __slots__ = ("_exchange", "_request", "_response")

    def __init__(self, exchange: Exchange, request: HttpRequest) -> None:
        self._exchange, self._request = exchange, request
        self._response: Any = None

    def fail(self, error: BaseException) -> None:
        """
        Note an exception that not even Django caught.
        """
        self._exchange.route = _template(self._request)
        self._exchange.fail(error)

    def answer(self, response: Any) -> Any:
        """
        Put the id on *response*, and watch it until it has been sent.
        """
        exchange = self._exchange
        self._response = response
        exchange.route = _template(self._request)
        if exchange.is_stamped:
            response[HEADER] = exchange.cell.request_id
        if not response.streaming or getattr(response, "file_to_stream", None):
            exchange.is_complete = True
        elif response.is_async:
            response.streaming_content = self._pieces_async(response.streaming_content)
        else:
            response.streaming_content = self._pieces(response.streaming_content)
        if exchange.is_logged:
            # Django closes the request with the response that it sent in the end,
            # which need not be the one that this middleware saw.
            self._request.close = self._close
        return response

    def _close(self) -> None:
        self._measure()
        self._exchange.tell()
        del self._request.close  # so that request and watch do not hold each other
        self._request.close()

    def _measure(self) -> None:
        exchange, response = self._exchange, self._response
        exchange.status = exchange.status or response.status_code
        if not response.streaming:
            exchange.bytes = len(response.content)
        elif getattr(response, "file_to_stream", None):
            length = response.headers.get("Content-Length", "")
            exchange.bytes = int(length) if length.isdigit() else None

    def _pieces(self, pieces: Iterable[bytes]) -> Iterator[bytes]:
        """
        Make each piece in the request's scope: the middlewares have returned by then.
        """
        exchange, source = self._exchange, iter(pieces)
        try:
            while True:
                with resume(exchange.cell):
                    piece: Any = next(source, _END)
                if piece is _END:
                    break
                exchange.count(len(piece))
                yield piece
        except Exception as error:
            exchange.fail(error)
            raise
        exchange.is_complete = True

    async def _pieces_async(self, pieces: Any) -> AsyncIterator[bytes]:
        exchange = self._exchange
        try:
            async with aclosing(aiter(pieces)) as source:
                while True:
                    with resume(exchange.cell):
                        piece: Any = await anext(source, _END)
                    if piece is _END:
                        break
                    exchange.count(len(piece))
                    yield piece
        except Exception as error:
            exchange.fail(error)
            raise
        exchange.is_complete = True
