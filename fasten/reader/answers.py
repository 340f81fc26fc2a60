# SPDX-License-Identifier: Apache-2.0
"""
What the reader answers: responses, problem documents, pages of rows as JSON.

Which answer a request gets is for `routes`; how it travels, for `asgi` and `wsgi`.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import (
    AsyncGenerator,
    Awaitable,
    Callable,
    Iterable,
    Iterator,
    Mapping,
)
from contextlib import suppress
from http import HTTPStatus
from typing import Any, Final
from urllib.parse import quote

import attrs

from fasten.streams import json_line

__all__ = [
    "JSON",
    "NDJSON",
    "PROBLEM",
    "Listing",
    "Refusal",
    "Response",
    "document",
    "lines",
    "pieces",
    "problem",
]

JSON: Final = "application/json"
NDJSON: Final = "application/x-ndjson"
PROBLEM: Final = "application/problem+json"

_ALWAYS: Final = (
    # Who did what is nothing for a cache, nor for a browser to guess the type of.
    ("Cache-Control", "no-store"),
    ("X-Content-Type-Options", "nosniff"),
    ("Vary", "Accept, Authorization"),
)


@attrs.frozen
class Response:
    """
    An answer: *body* is bytes, or an iterator of them that is read once.
    """

    status: int
    headers: tuple[tuple[str, str], ...]
    body: bytes | Iterator[bytes] = b""

    @property
    def reason(self) -> str:
        """
        Return the status in words.
        """
        return HTTPStatus(self.status).phrase

    def header(self, name: str) -> str | None:
        """
        Return the value of a header, or None.
        """
        found = (v for k, v in self.headers if k.lower() == name.lower())
        return next(found, None)

    def without_body(self) -> Response:
        """
        Return the answer to HEAD: as to GET, with nothing behind the headers.
        """
        if not isinstance(self.body, bytes):
            _close(self.body)
        return attrs.evolve(self, body=b"")


def _close(body: Iterator[bytes]) -> None:
    close = getattr(body, "close", None)
    if close is not None:
        close()


class Refusal(Exception):
    """
    A request that gets a problem document instead of rows.
    """

    def __init__(
        self,
        status: int,
        detail: str,
        *,
        headers: Iterable[tuple[str, str]] = (),
        **members: str,
    ) -> None:
        super().__init__(detail)
        self.status, self.detail = status, detail
        self.headers, self.members = tuple(headers), members

    def response(self) -> Response:
        """
        Return the problem document.
        """
        return problem(self.status, self.detail, self.headers, **self.members)


def problem(
    status: int, detail: str, headers: Iterable[tuple[str, str]] = (), **members: str
) -> Response:
    """
    Return an RFC 9457 problem document; *members* are its extensions.
    """
    said = {
        "type": "about:blank",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "detail": detail,
        **members,
    }
    return _whole(status, PROBLEM, _encoded(json.dumps(said)), headers)


def document(value: Any) -> Response:
    """
    Return a JSON document.
    """
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), default=repr)
    return _whole(200, JSON, _encoded(text))


def _whole(
    status: int,
    content_type: str,
    body: bytes,
    headers: Iterable[tuple[str, str]] = (),
) -> Response:
    own = (("Content-Type", content_type), ("Content-Length", str(len(body))))
    return Response(status, (*own, *_ALWAYS, *headers), body)


def _encoded(text: str) -> bytes:
    # A lone surrogate comes out as the JSON escape that it is.
    return text.encode("utf-8", "backslashreplace")


# --- pages --------------------------------------------------------------------------


@attrs.frozen(kw_only=True)
class Listing:
    """
    A page of rows in wire form, and what its envelope says of them.

    *source* is `<node>/<pid>` where only one process answered: rows of a ring.
    """

    rows: list[Mapping[str, Any]]
    limit: int
    offset: int = 0
    next: str | None = None
    total: int | None = None
    completeness: str = "store"
    source: str | None = None

    def response(self) -> Response:
        """
        Return the page as one JSON document.
        """
        rows = ",".join(map(json_line, self.rows))
        said: dict[str, Any] = {"limit": self.limit, "offset": self.offset}
        said |= {"next": self.next, "total": self.total}
        said["completeness"] = self.completeness
        if self.source is not None:
            said["source"] = self.source
        rest = json.dumps(said, ensure_ascii=False, separators=(",", ":"))
        text = f'{{"rows":[{rows}],{rest[1:]}'
        return _whole(200, JSON, _encoded(text))

    @property
    def headers(self) -> tuple[tuple[str, str], ...]:
        """
        Return what an envelope would say, where there is none.
        """
        said = {
            "Fasten-Completeness": self.completeness,
            "Fasten-Source": self.source,
            "Fasten-Next": self.next,
            "Fasten-Total": None if self.total is None else str(self.total),
        }
        # A node may have any name; a header is ASCII.
        return tuple((k, quote(v, safe="/=")) for k, v in said.items() if v is not None)


def lines(first: Listing, rest: Iterator[Listing]) -> Response:
    """
    Return rows as NDJSON, a line each, page by page as they are read.
    """
    return Response(
        200,
        (("Content-Type", NDJSON), *_ALWAYS, *first.headers),
        _chunks(first, rest),
    )


def _chunks(first: Listing, rest: Iterator[Listing]) -> Iterator[bytes]:
    yield _chunk(first)
    for page in rest:
        yield _chunk(page)


def _chunk(page: Listing) -> bytes:
    return _encoded("".join(f"{json_line(row)}\n" for row in page.rows))


_END: Final = object()


async def pieces(
    body: Iterator[bytes],
    in_a_thread: Callable[..., Awaitable[Any]] = asyncio.to_thread,
) -> AsyncGenerator[bytes, None]:
    """
    Yield what *body* yields, each asked for in a thread: it reads from a store.
    """
    try:
        while (piece := await in_a_thread(next, body, _END)) is not _END:
            yield piece
    finally:
        close = getattr(body, "close", None)
        if close is not None:
            # Cancelled while a thread reads on: the generator ends with it.
            with suppress(ValueError):
                close()
