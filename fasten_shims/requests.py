# SPDX-License-Identifier: Apache-2.0
"""
The current request id on outgoing requests of a `requests` session.
"""

from __future__ import annotations

from typing import Any, TypeVar

from fasten.context import HEADER, current_request_id

__all__ = ["install"]

T = TypeVar("T")


def install(session: T) -> T:
    """
    Send X-Request-ID with each request of *session*; return it.

    A header that the caller set stays. The session's own `auth` is kept: this wraps
    the preparing of requests, for which requests has no hook.
    """
    given: Any = session
    prepare = given.prepare_request

    def prepare_request(request: Any) -> Any:
        prepared = prepare(request)
        rid = current_request_id()
        if rid is not None:
            prepared.headers.setdefault(HEADER, rid)
        return prepared

    given.prepare_request = prepare_request
    return session
