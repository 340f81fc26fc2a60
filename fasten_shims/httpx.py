# SPDX-License-Identifier: Apache-2.0
"""
The current request id on outgoing requests of httpx, sync and async.
"""

from __future__ import annotations

from typing import Any, TypeVar

from fasten.context import HEADER, current_request_id

__all__ = ["install"]

T = TypeVar("T")


def install(client: T) -> T:
    """
    Send X-Request-ID with each request of an httpx *client*; return it.

    A header that the caller set stays.
    """
    given: Any = client
    if hasattr(given, "aclose"):
        given.event_hooks["request"].append(_add_async)
    else:
        given.event_hooks["request"].append(_add)
    return client


async def _add_async(request: Any) -> None:
    _add(request)


def _add(request: Any) -> None:
    rid = current_request_id()
    if rid is not None and HEADER not in request.headers:
        request.headers[HEADER] = rid
