# SPDX-License-Identifier: Apache-2.0
"""
One request id through gRPC calls: interceptors of servers and channels, sync and aio.

The id is the metadata key `x-request-id`. A response stream is in its scope from the
first message to the last.
"""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import aclosing
from functools import cache, wraps
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from fasten import MissingExtra
from fasten.context import (
    Context,
    accept,
    current_request_id,
    extract,
    resume,
    scope,
)
from fasten_shims._streams import stepwise, stepwise_async

__all__ = [
    "AioServerInterceptor",
    "ClientInterceptor",
    "ServerInterceptor",
    "aio_client_interceptors",
]

KEY: Final = "x-request-id"

if TYPE_CHECKING:
    ServerInterceptor: Callable[[], Any]
    ClientInterceptor: Callable[[], Any]
    AioServerInterceptor: Callable[[], Any]


def __getattr__(name: str) -> Any:
    if name not in _FACTORIES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _FACTORIES[name]()


def _grpc() -> Any:
    try:
        import grpc.aio
    except ImportError:
        raise MissingExtra(
            "the grpc shim needs the package grpcio; pip install 'fasten[grpc]'"
        ) from None
    return grpc


# --- serving ------------------------------------------------------------------------


@cache
def _server_interceptor() -> Any:
    class ServerInterceptor(_grpc().ServerInterceptor):  # type: ignore[misc]
        """
        Run each call of a server in the scope of its request id.
        """

        def intercept_service(self, continuation: Any, details: Any) -> Any:
            with _scope_of(details) as ctx:
                handler = continuation(details)
            return _handler(handler, ctx)

    return ServerInterceptor


@cache
def _aio_server_interceptor() -> Any:
    class AioServerInterceptor(_grpc().aio.ServerInterceptor):  # type: ignore[misc]
        """
        Run each call of an aio server in the scope of its request id.
        """

        async def intercept_service(self, continuation: Any, details: Any) -> Any:
            with _scope_of(details) as ctx:
                handler = await continuation(details)
            return _handler(handler, ctx)

    return AioServerInterceptor


def _scope_of(details: Any) -> Any:
    return scope(_id_of(details.invocation_metadata), method="grpc")


def _id_of(metadata: Iterable[tuple[str, Any]] | None) -> str | None:
    """
    Return the first usable id of a call's metadata; a key may be there many times.
    """
    pairs = list(metadata or ())
    for key, value in pairs:
        if key == KEY and (rid := accept(value)) is not None:
            return rid
    return extract(dict(pairs), KEY)


def _handler(handler: Any, ctx: Context) -> Any:
    """
    Return a handler that does what *handler* does, within *ctx*.
    """
    if handler is None:  # of an unknown method
        return None
    requests = "stream" if handler.request_streaming else "unary"
    responses = "stream" if handler.response_streaming else "unary"
    kind = f"{requests}_{responses}"
    return getattr(_grpc(), f"{kind}_rpc_method_handler")(
        _behavior(getattr(handler, kind), ctx, is_stream=handler.response_streaming),
        request_deserializer=handler.request_deserializer,
        response_serializer=handler.response_serializer,
    )


def _behavior(
    behavior: Callable[..., Any], ctx: Context, *, is_stream: bool
) -> Callable[..., Any]:
    # gRPC looks at what kind of function it is: each is wrapped in one of its kind.
    if inspect.isasyncgenfunction(behavior):
        return _async_stream(behavior, ctx)
    if inspect.iscoroutinefunction(behavior):
        return _coroutine(behavior, ctx)

    @wraps(behavior)
    def call(request: Any, servicer: Any, *send: Any) -> Any:
        with _named(ctx, servicer):
            answer = behavior(request, servicer, *send)
        # With a callback to send with, the answer is nothing to go through.
        return stepwise(answer, ctx) if is_stream and not send else answer

    return call


def _named(ctx: Context, servicer: Any) -> Any:
    ctx.client = servicer.peer()
    return resume(ctx)


def _coroutine(behavior: Callable[..., Any], ctx: Context) -> Callable[..., Any]:
    @wraps(behavior)
    async def call(request: Any, servicer: Any) -> Any:
        with _named(ctx, servicer):
            return await behavior(request, servicer)

    return call


def _async_stream(behavior: Callable[..., Any], ctx: Context) -> Callable[..., Any]:
    @wraps(behavior)
    async def call(request: Any, servicer: Any) -> AsyncIterator[Any]:
        with _named(ctx, servicer):
            answers = behavior(request, servicer)
        async with aclosing(stepwise_async(answers, ctx)) as steps:
            async for answer in steps:
                yield answer

    return call


# --- calling ------------------------------------------------------------------------

_KINDS: Final = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")


class _CallDetails(NamedTuple):
    """
    What a client's interceptor hands on: gRPC has a type for it, but none to make.
    """

    method: Any
    timeout: Any
    metadata: Any
    credentials: Any
    wait_for_ready: Any
    compression: Any


@cache
def _client_interceptor() -> Any:
    grpc = _grpc()
    grpc.ClientCallDetails.register(_CallDetails)

    def intercept(continuation: Any, details: Any, request: Any) -> Any:
        return continuation(_with_id(details), request)

    bases = tuple(getattr(grpc, _base_of(kind)) for kind in _KINDS)
    methods = {f"intercept_{kind}": staticmethod(intercept) for kind in _KINDS}
    return type("ClientInterceptor", bases, methods)


def _base_of(kind: str) -> str:
    return f"{kind.title().replace('_', '')}ClientInterceptor"


def _with_id(details: Any) -> Any:
    pairs = _pairs_with_id(details)
    if pairs is None:
        return details
    kept = {name: getattr(details, name, None) for name in _CallDetails._fields}
    return _CallDetails(**{**kept, "metadata": pairs})


def _pairs_with_id(details: Any) -> tuple[Any, ...] | None:
    """
    Return a call's metadata with the id, or None where there is nothing to add.
    """
    rid = current_request_id()
    pairs = tuple(details.metadata or ())
    if rid is None or any(key == KEY for key, _ in pairs):
        return None
    return (*pairs, (KEY, rid))


@cache
def _aio_clients() -> tuple[Any, ...]:
    aio = _grpc().aio

    async def intercept(continuation: Any, details: Any, request: Any) -> Any:
        pairs = _pairs_with_id(details)
        if pairs is not None:
            details = details._replace(metadata=aio.Metadata(*pairs))
        return await continuation(details, request)

    def made(kind: str) -> Any:
        methods = {f"intercept_{kind}": staticmethod(intercept)}
        return type(_base_of(kind), (getattr(aio, _base_of(kind)),), methods)

    return tuple(made(kind) for kind in _KINDS)


def aio_client_interceptors() -> list[Any]:
    """
    Send the current request id with each call of an aio channel: its `interceptors=`.

    One for each kind of call, since an aio channel takes one for one kind only.

    Raises:
        MissingExtra: grpcio is not installed.
    """
    return [made() for made in _aio_clients()]


_FACTORIES: Final = {
    "AioServerInterceptor": _aio_server_interceptor,
    "ClientInterceptor": _client_interceptor,
    "ServerInterceptor": _server_interceptor,
}
