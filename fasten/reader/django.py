# SPDX-License-Identifier: Apache-2.0
"""
The reader as a Django view, under WSGI and ASGI.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fasten.reader.answers import pieces
from fasten.reader.routes import Reader

__all__ = ["answer"]


def answer(reader: Reader, request: Any, path: str) -> Any:
    """
    Answer one HttpRequest with an HttpResponse.
    """
    # The service brings Django along; fasten does not need it.
    from django.http import HttpResponse, StreamingHttpResponse

    query = request.META.get("QUERY_STRING", "")
    response = reader.handle(
        request.method,
        path or request.path_info.rstrip("/").rpartition("/")[2],
        query if isinstance(query, bytes) else query.encode("latin-1", "replace"),
        request.headers.items(),
    )
    made = (
        HttpResponse(response.body, status=response.status)
        if isinstance(response.body, bytes)
        else StreamingHttpResponse(
            _body(request, response.body), status=response.status
        )
    )
    for name, value in response.headers:
        made[name] = value
    return made


def _body(request: Any, body: Iterator[bytes]) -> Any:
    # Under ASGI Django would read a plain iterator to its end before it sends.
    return pieces(body) if hasattr(request, "scope") else body
