# SPDX-License-Identifier: Apache-2.0
"""
One request id between an MCP client and its servers, and a row for each tool call.

The id travels in `params._meta`. For the MCP Python SDK, 1 and 2: its servers of both
levels, and its client sessions.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from contextvars import ContextVar
from functools import partial, wraps
from typing import Any, Final, TypeVar

from fasten.context import (
    current_request_id,
    extract,
    reserve_stdout,
    scope,
)
from fasten_shims.agent import Call

__all__ = ["client", "server"]

T = TypeVar("T")

KEY: Final = "request_id"
"""The key of `params._meta` that holds an id."""
CALL: Final = "tools/call"
CLIENT_MAX: Final = 512

_RAISED: ContextVar[list[Exception] | None] = ContextVar("fasten_mcp", default=None)
"""What the tool of this call raised: the SDK makes a result of it."""

# --- serving ------------------------------------------------------------------------


def server(server: T, *, with_arguments: bool = False) -> T:
    """
    Run each request of an MCP *server* in the scope of its id; return the server.

    Each tool call leaves a TOOL_CALLED row; *with_arguments* puts the arguments,
    redacted, on it. Stdout may be the protocol's wire: fasten's own lines go to stderr
    from here on.
    """
    reserve_stdout()
    given: Any = server
    if getattr(given, "_fasten_installed", False):
        return server
    given._fasten_installed = True  # noqa: SLF001  (ours)
    if hasattr(given, "middleware"):
        # What others do is done in the scope; the row, in the span of OpenTelemetry.
        given.middleware.insert(0, _scoped)
        given.middleware.append(partial(_recorded, with_arguments=with_arguments))
        if hasattr(given, "call_tool"):  # of an MCPServer
            given.call_tool = _noting(given.call_tool)
    else:
        _install_1(given, with_arguments=with_arguments)
    return server


async def _scoped(ctx: Any, call_next: Callable[[Any], Awaitable[Any]]) -> Any:
    meta = _mapping(_mapping(ctx.params).get("_meta"))
    with _scope_of(meta, ctx.session):
        return await call_next(ctx)


async def _recorded(
    ctx: Any, call_next: Callable[[Any], Awaitable[Any]], *, with_arguments: bool
) -> Any:
    if ctx.method != CALL:
        return await call_next(ctx)
    name, arguments = (_mapping(ctx.params).get(key) for key in ("name", "arguments"))
    with _call(name, arguments, with_arguments=with_arguments) as call:
        return await _watched(call, call_next(ctx))


async def _watched(call: Call, answering: Awaitable[T]) -> T:
    """
    Await the answer to a *call*, and note how its tool ended.
    """
    raised: list[Exception] = []
    token = _RAISED.set(raised)
    try:
        result = await answering
    finally:
        _RAISED.reset(token)
    return _judged(call, result, raised)


def _noting(fn: Callable[..., Awaitable[T]]) -> Callable[..., Awaitable[T]]:
    """
    Return *fn*, which calls a tool, so that what it raises is known to `_watched`.
    """

    @wraps(fn)
    async def noting(*args: Any, **kwargs: Any) -> T:
        raised = _RAISED.get()
        try:
            result = await fn(*args, **kwargs)
        except Exception as error:
            if raised is not None:
                raised[:] = [_unwrapped(error)]
            raise
        if raised:
            raised.clear()  # of a tool that this one called, and did without
        return result

    return noting


def _unwrapped(error: Exception) -> Exception:
    """
    Return what a tool raised, without what the SDK puts around it.
    """
    cause = error.__cause__
    is_sdks = type(error).__module__.startswith("mcp.")
    if is_sdks and isinstance(cause, Exception):
        return _unwrapped(cause)
    return error


def _scope_of(meta: Mapping[str, Any], session: Any) -> Any:
    return scope(
        extract(meta, KEY),
        actor_kind="agent",
        method="agent_tool",
        client=_name_of(session),
    )


def _name_of(session: Any) -> str | None:
    """
    Return the name by which a server's client introduced itself.
    """
    params = getattr(session, "client_params", None)
    # Spelt so by SDK 2, and so by SDK 1.
    info = getattr(params, "client_info", None) or getattr(params, "clientInfo", None)
    name = getattr(info, "name", None)
    return name[:CLIENT_MAX] if isinstance(name, str) else None


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _call(name: object, arguments: object, *, with_arguments: bool) -> Call:
    known = name if isinstance(name, str) and name else "unknown"
    return Call(known, arguments=arguments or {}, with_arguments=with_arguments)


def _judged(call: Call, result: T, raised: list[Exception] | None = None) -> T:
    """
    Note a failure that came as a result, which is how tools of MCP fail.
    """
    answer: Any = getattr(result, "root", result)
    if isinstance(answer, Mapping):
        has_failed = answer.get("isError")
    else:
        has_failed = getattr(answer, "is_error", getattr(answer, "isError", False))
    if has_failed is True and raised:
        call.note(raised[0])
    elif has_failed is True:
        call.fail("tool_error")
    return result


def _install_1(given: Any, *, with_arguments: bool) -> None:
    inner = getattr(given, "_mcp_server", given)  # what a FastMCP of SDK 1 wraps
    inner.run = _run_1(inner, with_arguments=with_arguments)
    inner.call_tool = _registering_1(inner.call_tool)
    if inner is not given:
        tools = given._tool_manager  # noqa: SLF001  (its own is registered by now)
        tools.call_tool = _noting(tools.call_tool)


def _registering_1(register: Callable[..., Any]) -> Callable[..., Any]:
    """
    Wrap the decorator by which a server of SDK 1 is given what calls its tools.
    """

    @wraps(register)
    def call_tool(*args: Any, **kwargs: Any) -> Any:
        decorate = register(*args, **kwargs)
        return lambda fn: decorate(_noting(fn)) and fn

    return call_tool


def _run_1(inner: Any, *, with_arguments: bool) -> Callable[..., Awaitable[Any]]:
    """
    Wrap the handlers of a server of SDK 1 when it is run: then all are registered.
    """
    run, handlers = inner.run, inner.request_handlers
    ours: set[Any] = set()

    @wraps(run)
    async def run_wrapped(*args: Any, **kwargs: Any) -> Any:
        for kind, handler in handlers.items():
            if handler not in ours:
                made = _handler_1(inner, handler, with_arguments=with_arguments)
                handlers[kind] = made
                ours.add(made)
        return await run(*args, **kwargs)

    return run_wrapped


def _handler_1(
    inner: Any, handler: Callable[[Any], Awaitable[Any]], *, with_arguments: bool
) -> Callable[[Any], Awaitable[Any]]:
    @wraps(handler)
    async def handle(request: Any) -> Any:
        if request is None:  # the server asks itself which tools it has
            return await handler(request)
        params = request.params
        meta = getattr(getattr(params, "meta", None), "model_extra", None)
        with _scope_of(_mapping(meta), inner.request_context.session):
            if request.method != CALL:
                return await handler(request)
            call = _call(params.name, params.arguments, with_arguments=with_arguments)
            with call:
                return await _watched(call, handler(request))

    return handle


# --- calling ------------------------------------------------------------------------


def client(session: T, *, with_arguments: bool = False) -> T:
    """
    Send the current request id with the requests of an MCP client; return the client.

    *session* is a ClientSession, or an entered Client of SDK 2. Each tool call leaves a
    TOOL_CALLED row; *with_arguments* puts the arguments, redacted, on it.
    """
    inner: Any = getattr(session, "session", session)
    if getattr(inner, "_fasten_installed", False):
        return session
    inner._fasten_installed = True  # noqa: SLF001  (ours)
    inner.send_request = _sending(inner.send_request)
    inner.call_tool = _calling(inner.call_tool, with_arguments=with_arguments)
    return session


def _sending(send: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    @wraps(send)
    async def send_request(request: Any, *args: Any, **kwargs: Any) -> Any:
        return await send(_with_id(request), *args, **kwargs)

    return send_request


def _with_id(request: Any) -> Any:
    """
    Return *request* with the id in its `_meta`; one without parameters stays.
    """
    rid, root = current_request_id(), getattr(request, "root", request)
    params = getattr(root, "params", None)
    if rid is None or params is None:
        return request
    meta = params.meta
    known = meta if meta is None or isinstance(meta, dict) else meta.model_dump()
    made: Any = {KEY: rid, **(known or {})}
    if hasattr(params, "Meta"):  # of SDK 1, where it is a model
        made = params.Meta(**made)
    root = root.model_copy(update={"params": params.model_copy(update={"meta": made})})
    return type(request)(root) if hasattr(request, "root") else root


def _calling(
    call_tool: Callable[..., Awaitable[Any]], *, with_arguments: bool
) -> Callable[..., Awaitable[Any]]:
    @wraps(call_tool)
    async def call(name: str, arguments: Any = None, *args: Any, **kwargs: Any) -> Any:
        with _call(name, arguments, with_arguments=with_arguments) as row:
            return _judged(row, await call_tool(name, arguments, *args, **kwargs))

    return call
