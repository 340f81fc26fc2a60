# SPDX-License-Identifier: Apache-2.0
"""
One request id over MQTT: paho-mqtt 2 and aiomqtt.

The id travels as the user property `request_id` (MQTT 5) and as `_req` in payloads
that are JSON objects; arrays and binary payloads are left alone. Connecting and
subscribing stay with the client.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import logging
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Final, TypeVar

from fasten.context import Context, accept, current_request_id, scope
from fasten_shims import _messages

__all__ = ["Router", "attach", "dispatch", "handler", "publish", "publish_sync"]

logger = logging.getLogger("fasten")

KEY: Final = "_req"
PROPERTY: Final = "request_id"
MAX_JSON: Final = 256 * 1024
"""Payloads over this many bytes are neither searched for an id nor given one."""

H = TypeVar("H", bound=Callable[..., Any])

# --- sending ------------------------------------------------------------------------


async def publish(client: Any, topic: str, payload: Any = None, **options: Any) -> Any:
    """
    Publish through an aiomqtt or paho *client*, with the current request id.

    A dict is sent as JSON. *options* are the client's own: qos, retain, properties.
    """
    sent = publish_sync(client, topic, payload, **options)
    return await sent if inspect.isawaitable(sent) else sent


def publish_sync(client: Any, topic: str, payload: Any = None, **options: Any) -> Any:
    """
    Publish as `publish` does, through a paho *client*; return what it returns.
    """
    rid = current_request_id()
    if isinstance(payload, dict):
        payload = json.dumps(payload, separators=(",", ":"), ensure_ascii=False)
    if rid is not None:
        payload = _with_id(payload, rid)
        options = _with_property(client, options, rid)
    return client.publish(topic, payload, **options)


def _with_id(payload: Any, rid: str) -> Any:
    """
    Put `_req` first into the text of a JSON object; every other byte stays.
    """
    found = _json_object(payload)
    if found is None or KEY in found:
        return payload
    is_text = isinstance(payload, str)
    text = payload if is_text else payload.decode()
    head, _, rest = text.partition("{")
    comma = "," if found else ""
    text = f'{head}{{"{KEY}":"{rid}"{comma}{rest}'
    return text if is_text else text.encode()


def _json_object(payload: Any) -> dict[str, Any] | None:
    if not isinstance(payload, (str, bytes, bytearray)) or len(payload) > MAX_JSON:
        return None
    start = payload[:64].lstrip()[:1]
    if start not in ("{", b"{"):
        return None
    try:
        # Of bytes in UTF-8 only: json would read UTF-16, too.
        text = payload if isinstance(payload, str) else payload.decode()
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _with_property(client: Any, options: dict[str, Any], rid: str) -> dict[str, Any]:
    if not _speaks_5(client):
        return options
    from paho.mqtt.packettypes import PacketTypes
    from paho.mqtt.properties import Properties

    properties = options.get("properties") or Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
    if not any(name == PROPERTY for name, _ in _user_properties(properties)):
        # paho appends: the assignment adds this pair to those that are there.
        properties.UserProperty = (PROPERTY, rid)
    return {**options, "properties": properties}


def _speaks_5(client: Any) -> bool:
    paho = getattr(client, "_client", client)  # aiomqtt wraps one
    version = getattr(paho, "protocol", None) or getattr(paho, "_protocol", None)
    return version == 5 or getattr(version, "value", None) == 5


# --- receiving ----------------------------------------------------------------------


class Router(_messages.Router):
    """
    Handlers by topic filter, each called in the scope of its message.
    """

    def __init__(self) -> None:
        super().__init__(_topic_of, _matches, _scope_of)
        self._clients: list[Any] = []

    def handler(self, topic_filter: str) -> Callable[[H], H]:
        """
        Call the decorated function with (message, Context) for matching messages.

        *topic_filter* is MQTT's own, `+`, `#` and `$share/group/` included.
        """
        route = super().handler(topic_filter)

        def register(fn: H) -> H:
            for client in self._clients:
                client.message_callback_add(topic_filter, self._paho(fn))
            return route(fn)

        return register

    def attach(self, client: Any) -> None:
        """
        Let a paho *client* call the handlers, those registered later included.

        An exception is logged and paho's thread lives on.
        """
        self._clients.append(client)
        for topic_filter, fn in self._routes:
            client.message_callback_add(topic_filter, self._paho(fn))

    def _paho(self, fn: Callable[..., Any]) -> Callable[[Any, Any, Any], None]:
        def receive(_client: Any, _userdata: Any, message: Any) -> None:
            with _scope_of(message) as ctx:
                try:
                    _finish(fn(message, ctx))
                except Exception:  # in paho's own thread, which must live on
                    topic = message.topic
                    logger.exception("fasten mqtt: the handler of %r failed", topic)

        return receive


async def _awaited(work: Awaitable[Any]) -> None:
    await work


def _finish(done: Any) -> None:
    if inspect.isawaitable(done):
        asyncio.run(_awaited(done))


def _topic_of(message: Any) -> str:
    return str(message.topic)


def _scope_of(message: Any) -> AbstractContextManager[Context]:
    client = _topic_of(message)[: _messages.CLIENT_MAX]
    return scope(_id_of(message), method="mqtt", client=client)


def _id_of(message: Any) -> str | None:
    """
    Return the id a message carries: the property, then `_req`.
    """
    for name, value in _user_properties(getattr(message, "properties", None)):
        if name == PROPERTY and (rid := accept(value)) is not None:
            return rid
    found = _json_object(getattr(message, "payload", None))
    return None if found is None else accept(found.get(KEY))


def _user_properties(properties: Any) -> Iterator[tuple[str, str]]:
    pairs = getattr(properties, "UserProperty", None) or ()
    return (pair for pair in pairs if isinstance(pair, tuple) and len(pair) == 2)


def _matches(topic_filter: str, topic: str) -> bool:
    """
    Tell whether *topic* falls under a filter (MQTT 5, section 4.7).
    """
    wanted, levels = topic_filter.split("/"), topic.split("/")
    if wanted[0] == "$share":
        wanted = wanted[2:]
    if levels[0].startswith("$") and wanted[0] in ("+", "#"):
        return False
    for number, part in enumerate(wanted):
        if part == "#":
            return True
        if number >= len(levels) or part not in ("+", levels[number]):
            return False
    return len(wanted) == len(levels)


_default: Final = Router()
handler = _default.handler
attach = _default.attach
dispatch = _default.dispatch
