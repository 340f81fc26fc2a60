# SPDX-License-Identifier: Apache-2.0
"""
The service in Flask.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from flask import Flask, Response, g

import fasten
from fasten.shim.flask import init_app
from tests.web import emit, here

fasten.init()

app = Flask(__name__)
init_app(app, skip={"/health"}, actor=lambda _: g.get("caller"))


@app.get("/work/<token>")
def work(token: str) -> str:
    emit(token)
    return here()


@app.get("/thread/<token>")
def thread(token: str) -> str:
    g.caller = f"actor-{token}"
    with ThreadPoolExecutor(1) as pool:
        elsewhere = pool.submit(fasten.carry(here)).result()
    emit(token)
    return here() + elsewhere


@app.get("/stream/<token>")
def stream(token: str) -> Response:
    def pieces() -> Iterator[str]:
        yield here()
        yield here()
        emit(token)

    return Response(pieces())


@app.get("/boom/<token>")
def boom(token: str) -> str:
    emit(token)
    raise ZeroDivisionError
