# SPDX-License-Identifier: Apache-2.0
"""
One request id over AMQP 0-9-1: aio-pika, and whatever else keeps headers in a dict.

The id travels as the header `x-request-id`; `correlation_id` belongs to the
application's own replies and is left alone.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Final

import fasten.context
from fasten.context import Context, current_request_id, extract
from fasten_shims._messages import CLIENT_MAX
from fasten_shims._messages import Router as _Router

__all__ = ["Router", "dispatch", "handler", "publish", "scope"]

KEY: Final = "x-request-id"


async def publish(
    exchange: Any, message: Any, routing_key: str = "", **options: Any
) -> Any:
    """
    Publish an aio-pika *message* to *exchange*, with the current request id.

    An id that the message has stays. *options* are the exchange's own: mandatory,
    immediate, timeout. Returns what the exchange returns.
    """
    rid = current_request_id()
    if rid is not None:
        message.headers = {KEY: rid, **(message.headers or {})}
    return await exchange.publish(message, routing_key, **options)


def scope(message: Any) -> AbstractContextManager[Context]:
    """
    Open the scope of one incoming *message*, with its routing key as the client.
    """
    rid = extract(message.headers or {}, KEY)
    client = str(message.routing_key or "")[:CLIENT_MAX] or None
    return fasten.context.scope(rid, method="amqp", client=client)


def _topic_of(message: Any) -> str:
    return str(message.routing_key or "")


def _matches(pattern: str, routing_key: str) -> bool:
    """
    Tell whether *routing_key* falls under a topic exchange's *pattern*.

    `*` is one word, `#` any number of them.
    """
    return _match(_words(pattern), _words(routing_key))


def _words(key: str) -> list[str]:
    return key.split(".") if key else []


def _match(wanted: list[str], words: list[str]) -> bool:
    # reached[i]: what was read of the pattern so far takes exactly the first i words.
    reached = [True] + [False] * len(words)
    for part in wanted:
        if part == "#":
            start = reached.index(True) if True in reached else len(reached)
            reached = [i >= start for i in range(len(reached))]
        else:
            fits = [part in ("*", word) for word in words]
            reached = [False, *(a and b for a, b in zip(reached, fits, strict=False))]
    return reached[-1]


class Router(_Router):
    """
    Handlers by pattern of a topic exchange: `*` is one word, `#` any number of them.
    """

    def __init__(self) -> None:
        super().__init__(_topic_of, _matches, scope)


_default: Final = Router()
handler = _default.handler
dispatch = _default.dispatch
