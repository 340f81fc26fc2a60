# SPDX-License-Identifier: Apache-2.0
"""
The reader as a WSGI application: for Flask's DispatcherMiddleware, and any server.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from fasten.reader.routes import Reader

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIEnvironment

__all__ = ["application"]


def application(
    reader: Reader, environ: WSGIEnvironment, start_response: StartResponse
) -> Iterable[bytes]:
    """
    Answer one WSGI request; SCRIPT_NAME is the mount, PATH_INFO what is behind it.
    """
    response = reader.handle(
        environ.get("REQUEST_METHOD", "GET"),
        _text(environ.get("PATH_INFO", "")),
        # Strings of the environ hold bytes, as Latin-1 (PEP 3333).
        environ.get("QUERY_STRING", "").encode("latin-1", "replace"),
        _headers(environ),
    )
    start_response(f"{response.status} {response.reason}", list(response.headers))
    return [response.body] if isinstance(response.body, bytes) else response.body


def _text(given: str) -> str:
    return given.encode("latin-1", "replace").decode("utf-8", "replace")


def _headers(environ: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for name, value in environ.items():
        if name.startswith("HTTP_"):
            yield name[5:].replace("_", "-"), str(value)
