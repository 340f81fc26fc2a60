# SPDX-License-Identifier: Apache-2.0
"""
Calls, jobs and metrics, bare and with a shim: what needs no broker.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from benchmarks.shims_brokers import Pair

__all__ = [
    "agent",
    "grpc",
    "grpc_aio",
    "httpx",
    "mcp",
    "otel",
    "prometheus",
    "requests",
    "scheduler",
    "subprocess",
]


@contextmanager
def agent(_: Path) -> Iterator[Pair]:
    """
    A tool that does nothing; through the shim it leaves an audit row.
    """
    from fasten.shim.agent import tool

    def search(text: str) -> str:
        return text

    recorded = tool("search")(search)
    yield lambda: search("shoes"), lambda: recorded("shoes")


@contextmanager
def scheduler(_: Path) -> Iterator[Pair]:
    """
    A job that does nothing.
    """
    from fasten.shim.scheduler import instrument

    def job() -> None:
        pass

    yield job, instrument(job)


@contextmanager
def httpx(_: Path) -> Iterator[Pair]:
    """
    A request of a client whose transport answers in memory.
    """
    import httpx as client

    from fasten.shim.httpx import install

    transport = client.MockTransport(lambda _: client.Response(200))
    with (
        client.Client(transport=transport) as bare,
        install(client.Client(transport=transport)) as shim,
    ):
        url = "http://shop.example/"
        yield lambda: bare.get(url), lambda: shim.get(url)


@contextmanager
def requests(_: Path) -> Iterator[Pair]:
    """
    A request of a session whose adapter answers in memory.
    """
    import requests as client

    from fasten.shim.requests import install

    class Memory(client.adapters.BaseAdapter):
        def send(self, request: Any, **_options: Any) -> Any:  # type: ignore[override]
            answer = client.Response()
            answer.status_code, answer.request, answer._content = 200, request, b""
            return answer

        def close(self) -> None:
            pass

    with client.Session() as bare, client.Session() as shim:
        for session in (bare, install(shim)):
            session.mount("http://", Memory())
            session.trust_env = False
        url = "http://shop.example/"
        yield lambda: bare.get(url), lambda: shim.get(url)


@contextmanager
def subprocess(_: Path) -> Iterator[Pair]:
    """
    A child process that does nothing; the environment is all that differs.
    """
    import subprocess as client

    from fasten.shim.subprocess import env

    yield (
        lambda: client.run(["true"], check=True),
        lambda: client.run(["true"], check=True, env=env()),
    )


def _served(request: bytes, _: object) -> bytes:
    return request


def _handlers(fn: Callable[..., Any]) -> Any:
    import grpc as client

    handler = client.unary_unary_rpc_method_handler(fn)
    return client.method_handlers_generic_handler("shop.Shop", {"place": handler})


@contextmanager
def grpc(_: Path) -> Iterator[Pair]:
    """
    A unary call to a server of this process, a thread for each side.
    """
    import grpc as client

    from fasten.shim.grpc import ClientInterceptor, ServerInterceptor

    with ExitStack() as stack:

        def way(server_side: list[Any], client_side: list[Any]) -> Callable[[], object]:
            server = client.server(ThreadPoolExecutor(1), interceptors=server_side)
            server.add_generic_rpc_handlers((_handlers(_served),))
            port = server.add_insecure_port("127.0.0.1:0")
            server.start()
            stack.callback(lambda: server.stop(None).wait(10))
            channel = stack.enter_context(client.insecure_channel(f"127.0.0.1:{port}"))
            made = client.intercept_channel(channel, *client_side)
            method = made.unary_unary("/shop.Shop/place")
            return lambda: method(b"{}", timeout=10)

        yield way([], []), way([ServerInterceptor()], [ClientInterceptor()])


@contextmanager
def grpc_aio(_: Path) -> Iterator[Pair]:
    """
    A unary call to an aio server of the same loop.
    """
    import grpc.aio as client

    from fasten.shim.grpc import AioServerInterceptor, aio_client_interceptors

    async def served(request: bytes, _: object) -> bytes:
        return request

    with asyncio.Runner() as runner:

        async def opened(server_side: list[Any], client_side: list[Any]) -> Any:
            server = client.server(interceptors=server_side)
            server.add_generic_rpc_handlers((_handlers(served),))
            port = server.add_insecure_port("127.0.0.1:0")
            await server.start()
            channel = client.insecure_channel(
                f"127.0.0.1:{port}", interceptors=client_side
            )
            return server, channel, channel.unary_unary("/shop.Shop/place")

        async def called(method: Any) -> None:
            await method(b"{}", timeout=10)

        ways = [
            runner.run(opened([], [])),
            runner.run(opened([AioServerInterceptor()], aio_client_interceptors())),
        ]
        bare, shim = (method for _, _, method in ways)
        yield lambda: runner.run(called(bare)), lambda: runner.run(called(shim))
        for server, channel, _method in ways:
            runner.run(channel.close())
            runner.run(server.stop(None))


@contextmanager
def mcp(_: Path) -> Iterator[Pair]:
    """
    A tool call from a client to a server in memory; a row on each side.
    """
    from anyio.from_thread import start_blocking_portal
    from mcp import Client
    from mcp.server.mcpserver import MCPServer

    from fasten.shim import mcp as shim

    def made() -> Any:
        server = MCPServer("shop")
        server.add_tool(search)
        return server

    with ExitStack() as stack:
        portal = stack.enter_context(start_blocking_portal())

        def way(server: Any, install: Callable[[Any], Any]) -> Callable[[], object]:
            opened = portal.wrap_async_context_manager(Client(server))
            call_tool = install(stack.enter_context(opened)).session.call_tool
            return lambda: portal.call(call_tool, "search", {"text": "shoes"})

        yield way(made(), lambda given: given), way(shim.server(made()), shim.client)


async def search(text: str) -> str:
    """
    Find something.
    """
    return text


@contextmanager
def otel(_: Path) -> Iterator[Pair]:
    """
    A span that is started and ended.
    """
    from opentelemetry.sdk.trace import TracerProvider

    from fasten.context import remove_source
    from fasten_shims import otel as shim

    def way(provider: Any) -> Callable[[], object]:
        tracer = provider.get_tracer("bench")

        def call() -> None:
            with tracer.start_as_current_span("work"):
                pass

        return call

    yield (
        way(TracerProvider(shutdown_on_exit=False)),
        way(shim.install(TracerProvider(shutdown_on_exit=False))),
    )
    remove_source(shim._running)


@contextmanager
def prometheus(_: Path) -> Iterator[Pair]:
    """
    A counter that is counted up, with an exemplar.
    """
    from prometheus_client import CollectorRegistry, Counter

    from fasten.shim.prometheus import exemplar

    counter = Counter("orders", "Orders.", registry=CollectorRegistry())
    yield counter.inc, lambda: counter.inc(exemplar=exemplar())
