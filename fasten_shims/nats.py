# SPDX-License-Identifier: Apache-2.0
"""
One request id over NATS and JetStream: nats-py.

The id travels as the header `X-Request-ID`. Connecting, subscribing and acknowledging
stay with the client.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Final

import fasten.context
from fasten.context import HEADER, Context, current_request_id, extract
from fasten_shims import _messages

__all__ = ["Router", "dispatch", "handler", "publish", "scope"]


async def publish(
    client: Any, subject: str, payload: bytes = b"", **options: Any
) -> Any:
    """
    Publish through a NATS *client* or its JetStream, with the current request id.

    An id among the headers stays. *options* are the client's own: reply, headers.
    Returns what the client returns.
    """
    rid = current_request_id()
    if rid is not None:
        options["headers"] = {HEADER: rid, **(options.get("headers") or {})}
    return await client.publish(subject, payload, **options)


def scope(message: Any) -> AbstractContextManager[Context]:
    """
    Open the scope of one incoming *message*, with its subject as the client.
    """
    client = _topic_of(message)[: _messages.CLIENT_MAX]
    rid = extract(message.headers or {})
    return fasten.context.scope(rid, method="nats", client=client)


def _topic_of(message: Any) -> str:
    return str(message.subject)


def _matches(wanted: str, subject: str) -> bool:
    """
    Tell whether *subject* falls under *wanted*: `*` is one token, `>` all that follow.
    """
    parts, tokens = wanted.split("."), subject.split(".")
    if parts[-1] == ">" and len(tokens) >= len(parts):
        tokens = [*tokens[: len(parts) - 1], ">"]
    if len(parts) != len(tokens):
        return False
    return all(part in ("*", token) for part, token in zip(parts, tokens, strict=True))


class Router(_messages.Router):
    """
    Handlers by subject: `*` is one token, `>` all that follow.

    `dispatch` is what `subscribe(subject, cb=...)` takes.
    """

    def __init__(self) -> None:
        super().__init__(_topic_of, _matches, scope)


_default: Final = Router()
handler = _default.handler
dispatch = _default.dispatch
