# SPDX-License-Identifier: Apache-2.0
"""
The service in FastAPI, with the middlewares as the landing page adds them.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from fastapi import BackgroundTasks, Depends, FastAPI
from fastapi.responses import PlainTextResponse, StreamingResponse

import fasten
from fasten.shim.http import APILogger, RequestIDMiddleware, wrap
from tests.web import emit, here

fasten.init()

inner = FastAPI()
inner.add_middleware(RequestIDMiddleware)
inner.add_middleware(APILogger, skip={"/health"})


def caller(token: str) -> None:
    """
    Name the caller from a sync dependency: FastAPI runs it in a thread.
    """
    fasten.identify(actor=f"actor-{token}")


@inner.get("/work/{token}", response_class=PlainTextResponse)
async def work(token: str, tasks: BackgroundTasks) -> str:
    lines = here()
    await asyncio.sleep(0)
    tasks.add_task(emit, token)
    return lines + here() + await asyncio.to_thread(here)


@inner.get(
    "/thread/{token}", response_class=PlainTextResponse, dependencies=[Depends(caller)]
)
def thread(token: str) -> str:
    emit(token)
    return here()


@inner.get("/stream/{token}")
async def stream(token: str) -> StreamingResponse:
    async def pieces() -> AsyncIterator[str]:
        yield here()
        await asyncio.sleep(0)
        yield here()
        emit(token)

    return StreamingResponse(pieces())


@inner.get("/boom/{token}")
async def boom(token: str) -> None:
    emit(token)
    raise ZeroDivisionError(token)


app = wrap(inner)
