# SPDX-License-Identifier: Apache-2.0
"""
One request id over Kafka: confluent-kafka and aiokafka.

The id travels as the header `request_id`. Polling, committing and rebalancing stay
with the client.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any, Final

import fasten.context
from fasten.context import Context, current_request_id, extract
from fasten_shims import _messages

__all__ = ["Router", "dispatch", "dispatch_sync", "handler", "publish", "scope"]

KEY: Final = "request_id"


def publish(producer: Any, topic: str, value: Any = None, **options: Any) -> Any:
    """
    Send to *topic* with the current request id; return what the client returns.

    That is a coroutine of aiokafka, done once the broker has the message, and nothing
    of confluent-kafka. An id among the headers stays. *options* are the client's own:
    key, partition, headers.
    """
    send = getattr(producer, "send_and_wait", None) or producer.produce
    rid = current_request_id()
    if rid is not None:
        pairs = _pairs(options.get("headers"))
        if all(name != KEY for name, _ in pairs):
            pairs.append((KEY, rid.encode()))
        options["headers"] = pairs
    return send(topic, value, **options)


def scope(message: Any) -> AbstractContextManager[Context]:
    """
    Open the scope of one incoming *message*, with its topic as the client.
    """
    # Of several ids the first counts.
    headers = dict(reversed(_pairs(_read(message.headers))))
    client = _topic_of(message)[: _messages.CLIENT_MAX] or None
    return fasten.context.scope(extract(headers, KEY), method="kafka", client=client)


def _pairs(headers: Any) -> list[tuple[str, Any]]:
    pairs: Iterable[Any] = headers.items() if isinstance(headers, dict) else headers
    return list(pairs or ())


def _topic_of(message: Any) -> str:
    return str(_read(message.topic) or "")


def _read(value: Any) -> Any:
    """
    Read what is an attribute in aiokafka and a method in confluent-kafka.
    """
    return value() if callable(value) else value


class Router(_messages.Router):
    """
    Handlers by the name of a topic.
    """

    def __init__(self) -> None:
        super().__init__(_topic_of, str.__eq__, scope)


_default: Final = Router()
handler = _default.handler
dispatch = _default.dispatch
dispatch_sync = _default.dispatch_sync
