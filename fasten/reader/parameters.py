# SPDX-License-Identifier: Apache-2.0
"""
The reader's routes and the parameters each of them takes; query strings, taken apart.

What a value means is for `Query.parse` to say.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Final
from urllib.parse import unquote_to_bytes

from fasten.errors import InvalidQuery
from fasten.reader.answers import Refusal
from fasten.rows import FILTERS, SHORT_FORMS

__all__ = ["MAX_QUERY_BYTES", "PAGING", "PARAMETERS", "parameters"]

PAGING: Final = ("limit", "offset", "cursor", "order", "count")
"""What says which rows of an answer are wanted, and how, but not which answer."""

PARAMETERS: Final[Mapping[str, tuple[str, ...]]] = {
    "/audit": (*FILTERS["audit"], *SHORT_FORMS, "since", "until", *PAGING),
    "/sys": (
        *("request_id", "level", "event", "logger", "service"),
        *("since", "until", "q", "limit", "offset", "cursor"),
    ),
    "/api": (
        *("request_id", "method", "path", "route", "status", "actor"),
        *("since", "until", "limit", "offset", "cursor"),
    ),
    # Only the id is needed: the rest is for who follows `next`.
    "/correlate": ("request_id", "limit", "cursor"),
    "/health": (),
    "/openapi.json": (),
}
"""Each route below the mount, and the names it knows."""

MAX_QUERY_BYTES: Final = 65_536


def parameters(route: str, query: bytes) -> dict[str, str]:
    """
    Read a query string; each name at most once.

    Raises:
        InvalidQuery: a name is unknown or repeated, or a value is empty or no UTF-8.
        Refusal: the query string is too long to look at.
    """
    if len(query) > MAX_QUERY_BYTES:
        raise Refusal(
            414,
            f"the query string has {len(query)} bytes; send {MAX_QUERY_BYTES} at most",
        )
    given: dict[str, str] = {}
    for item in query.split(b"&"):
        if not item:
            continue
        name, _, value = item.partition(b"=")
        key = _text(name, name.decode("latin-1")[:80])
        _check_name(route, key, given)
        given[key] = _text(value, key)
        if not given[key]:
            raise InvalidQuery(f"{key} is empty; leave it out or give it a value", key)
    return given


def _check_name(route: str, name: str, given: Mapping[str, str]) -> None:
    known = PARAMETERS[route]
    if name in given:
        raise InvalidQuery(f"{name} is given twice; give it once", name)
    if name in known:
        return
    shown = repr(name[:80])
    near = get_close_matches(name[:80], known, 1)
    if near:
        hint = f"did you mean {near[0]!r}?"
    elif known:
        hint = f"{route} takes {' '.join(known)}"
    else:
        hint = f"{route} takes none"
    raise InvalidQuery(f"unknown parameter {shown}; {hint}", name[:80])


_STRAY_PERCENT: Final = re.compile(rb"%(?![0-9A-Fa-f]{2})")


def _text(raw: bytes, name: str) -> str:
    if _STRAY_PERCENT.search(raw):
        raise InvalidQuery(f"{name!r} holds a % that escapes nothing; write %25", name)
    try:
        return unquote_to_bytes(raw.replace(b"+", b" ")).decode()
    except UnicodeDecodeError:
        raise InvalidQuery(f"{name!r} is not UTF-8", name) from None
