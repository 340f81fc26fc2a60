# SPDX-License-Identifier: Apache-2.0
"""
The service in Starlette, with the middlewares the other way round.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.routing import Route

import fasten
from fasten.shim.http import APILogger, RequestIDMiddleware, exception_handler
from tests.web import emit, here

fasten.init()


async def work(request: Request) -> PlainTextResponse:
    lines = here()
    child = asyncio.create_task(asyncio.to_thread(here))
    emit(request.path_params["token"])
    return PlainTextResponse(lines + await child + here())


def thread(request: Request) -> PlainTextResponse:
    token = request.path_params["token"]
    fasten.identify(actor=f"actor-{token}")
    emit(token)
    return PlainTextResponse(here())


async def stream(request: Request) -> StreamingResponse:
    def pieces() -> Iterator[str]:
        yield here()
        yield here()
        emit(request.path_params["token"])

    return StreamingResponse(pieces())


async def boom(request: Request) -> None:
    emit(request.path_params["token"])
    raise ZeroDivisionError


app = Starlette(
    routes=[
        Route("/work/{token}", work),
        Route("/thread/{token}", thread),
        Route("/stream/{token}", stream),
        Route("/boom/{token}", boom),
    ],
    middleware=[Middleware(RequestIDMiddleware), Middleware(APILogger)],
    exception_handlers={Exception: exception_handler},
)
