# SPDX-License-Identifier: Apache-2.0
"""
FastAPI with an audit trail.

    FASTEN_SERVICE_ID=shop FASTEN_AUDIT_DSN=sqlite:///./audit.db \
        uvicorn fastapi_app:app
"""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, FastAPI, Header

import fasten
from fasten.shim.http import APILogger, RequestIDMiddleware, exception_handler

fasten.init()  # reads the environment

app = FastAPI()
app.add_middleware(RequestIDMiddleware)  # mints or honours X-Request-ID
app.add_middleware(APILogger, skip={"/health"})  # one api row per request
app.add_exception_handler(Exception, exception_handler)  # a 500 names its id, too
app.mount("/api/v1/logs", fasten.reader.router())  # needs FASTEN_READER_TOKEN


def caller(x_user: Annotated[str, Header()] = "") -> None:
    """
    Name the caller: here stands your authentication.
    """
    fasten.identify(actor=x_user)


@app.post("/users/{name}", dependencies=[Depends(caller)])
def create(name: str) -> dict[str, str | None]:
    """
    Create a user; audit row, log line and api row share one request id.
    """
    fasten.emit(code="USER_CREATED", target=name, detail={"plan": "free"})
    fasten.log.info("user_created", user=name)
    return {"created": name, "request_id": fasten.current_request_id()}


@app.get("/health")
def health() -> str:
    """
    Tell whether rows are being delivered.
    """
    return str(fasten.health()["state"])
