# SPDX-License-Identifier: Apache-2.0
"""
Starlette with an audit trail.

    FASTEN_SERVICE_ID=shop FASTEN_AUDIT_DSN=sqlite:///./audit.db \
        uvicorn starlette_app:app
"""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.routing import Mount, Route
from starlette.types import Scope

import fasten
from fasten.shim.http import APILogger, RequestIDMiddleware, wrap

fasten.init()  # reads the environment


def actor(scope: Scope) -> str | None:
    """
    Name the caller from the ASGI scope: here stands your authentication.
    """
    return dict(scope["headers"]).get(b"x-user", b"").decode() or None


async def create(request: Request) -> JSONResponse:
    """
    Create a user; audit row, log line and api row share one request id.
    """
    name = request.path_params["name"]
    fasten.emit(code="USER_CREATED", target=name, detail={"plan": "free"})
    fasten.log.info("user_created", user=name)
    return JSONResponse({"created": name, "request_id": fasten.current_request_id()})


async def health(_: Request) -> PlainTextResponse:
    """
    Tell whether rows are being delivered.
    """
    return PlainTextResponse(fasten.health()["state"])


app = wrap(  # the id is on every answer, also on a 500 that nobody handled
    Starlette(
        routes=[
            Route("/users/{name}", create, methods=["POST"]),
            Route("/health", health),
            Mount("/api/v1/logs", fasten.reader.router()),  # FASTEN_READER_TOKEN
        ],
        middleware=[
            Middleware(RequestIDMiddleware, actor=actor),
            Middleware(APILogger, skip={"/health"}),  # one api row per request
        ],
    )
)
