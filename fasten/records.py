# SPDX-License-Identifier: Apache-2.0
"""
What a row of fasten's own is made of: domain `fasten`, class long, whoever made it.

Ids, times and texts come in as arguments; when such rows are made is for others.
"""

from __future__ import annotations

import attrs

from fasten.codes import Entry
from fasten.rows import Pending

__all__ = ["FASTEN", "Author", "own_row"]


@attrs.frozen(kw_only=True)
class Author:
    """
    Who stands in a row of fasten's own: fasten itself, or who had it do something.
    """

    actor: str = "fasten"
    actor_kind: str = "service"
    method: str = "sdk"
    tenant_id: str | None = None


FASTEN = Author()
"""fasten itself."""


def own_row(
    entry: Entry,
    target: str,
    detail: str,
    *,
    id: str,
    timestamp_us: int,
    request_id: str,
    author: Author = FASTEN,
) -> Pending:
    """
    Make the row that says that fasten did *entry* to *target*; *detail* is JSON text.
    """
    return Pending(
        id=id,
        timestamp_us=timestamp_us,
        code=entry.code,
        action=entry.action,
        severity=entry.severity,
        category=entry.category,
        domain="fasten",
        retention_class="long",
        outcome="success",
        actor=author.actor,
        actor_kind=author.actor_kind,
        on_behalf_of=None,
        tenant_id=author.tenant_id,
        client=None,
        target=target,
        method=author.method,
        reason=None,
        request_id=request_id,
        trace_id=None,
        span_id=None,
        detail=detail,
    )
