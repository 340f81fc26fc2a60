# SPDX-License-Identifier: Apache-2.0
"""
The reader: rows over HTTP, for whoever may see them.

`app.mount("/api/v1/logs", fasten.reader.router())` mounts it; nobody gets in until
FASTEN_READER_TOKEN is set or `auth=` says who may.
"""

from __future__ import annotations

from typing import Any, Final

from fasten.engine import Engine
from fasten.reader.answers import Response
from fasten.reader.asgi import Router
from fasten.reader.auth import Auth, Authenticate, Bearer, Principal, bearer
from fasten.reader.routes import Headers, Reader
from fasten.rows import ALL_TENANTS

__all__ = [
    "ALL_TENANTS",
    "Auth",
    "Authenticate",
    "Bearer",
    "Headers",
    "Principal",
    "Reader",
    "Response",
    "Router",
    "bearer",
    "django_view",
    "handle",
    "router",
]

_own: Final = Router()


def router(auth: Auth = None, *, engine: Engine | None = None) -> Router:
    """
    Make the reader's application: ASGI, with a WSGI twin in its `wsgi`.

    *auth* None lets in who carries a FASTEN_READER_TOKEN; a `bearer({...})`, or its
    mapping, who carries one of those; a function of the request's headers, whom it
    returns a Principal for; "none", anybody. *engine* None means the one of `init()`,
    whenever that is called.

    Raises:
        TypeError: *auth* is nothing that could tell who asks.
    """
    return Router(auth, engine=engine)


def handle(
    method: str, path: str, query: str | bytes = b"", headers: Headers = ()
) -> Response:
    """
    Answer one request as `router()` does: FASTEN_READER_TOKEN tells who may ask.

    *path* is what stands behind the mount, as in "/audit".
    """
    return _own.handle(method, path, query, headers)


def django_view(request: Any, path: str = "") -> Any:
    """
    Answer one Django request as `router()` does.

    For `path("api/v1/logs/<path:path>", fasten.reader.django_view)`; with an `auth=`
    of your own, `router(auth=...).django_view` is the view.
    """
    return _own.django_view(request, path)
