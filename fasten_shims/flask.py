# SPDX-License-Identifier: Apache-2.0
"""
Flask: both middlewares in one call, and callables that see Flask's request.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from fasten_shims._http import KEY, Asker, Asks
from fasten_shims.wsgi import APILogger, RequestIDMiddleware, rule

if TYPE_CHECKING:
    from flask import Flask

__all__ = ["APILogger", "RequestIDMiddleware", "init_app"]

_REQUEST = "werkzeug.request"


def init_app(
    app: Flask,
    *,
    skip: str | Iterable[str] = (),
    actor: Asker | None = None,
    tenant: Asker | None = None,
    client: Asker | None = None,
) -> None:
    """
    Give each request of *app* its id and its api row, but for the paths of *skip*.

    *actor*, *tenant* and *client* are functions of Flask's request, called when a row
    first wants to know; `g`, `session` and `current_user` can be read in them.
    """
    asks = Asks.checked(actor, tenant, client)
    logged = APILogger(app.wsgi_app, skip=skip)
    app.wsgi_app = RequestIDMiddleware(  # type: ignore[method-assign]
        logged, **{name: _of_request(ask) for name, ask in asks._asdict().items()}
    )
    app.teardown_request(_settle)


def _of_request(ask: Asker | None) -> Asker | None:
    if ask is None:
        return None

    def asked(environ: dict[str, Any]) -> object:
        request = environ.get(_REQUEST)
        return None if request is None else ask(request)

    return asked


def _settle(error: BaseException | None) -> None:  # noqa: ARG001  (Flask's signature)
    """
    Take what the api row needs while Flask's context still stands.
    """
    from flask import request

    exchange = request.environ.get(KEY)
    if exchange is not None and exchange.is_logged:
        exchange.route = exchange.route or rule(request.environ, exchange)
        cell = exchange.cell
        _ = cell.actor, cell.tenant_id, cell.client
