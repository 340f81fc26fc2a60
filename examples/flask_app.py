# SPDX-License-Identifier: Apache-2.0
"""
Flask with an audit trail.

    FASTEN_SERVICE_ID=shop FASTEN_AUDIT_DSN=sqlite:///./audit.db \
        gunicorn --threads 4 flask_app:app
"""

from __future__ import annotations

from flask import Flask, Request
from werkzeug.middleware.dispatcher import DispatcherMiddleware

import fasten
from fasten.shim.flask import init_app

fasten.init()  # reads the environment


def actor(request: Request) -> str | None:
    """
    Name the caller from Flask's request: here stands your authentication.
    """
    return request.headers.get("X-User")


app = Flask(__name__)
app.wsgi_app = DispatcherMiddleware(  # type: ignore[method-assign]
    app.wsgi_app,
    {"/api/v1/logs": fasten.reader.router().wsgi},  # needs FASTEN_READER_TOKEN
)
init_app(app, skip={"/health"}, actor=actor)  # X-Request-ID, one api row per request


@app.post("/users/<name>")
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
