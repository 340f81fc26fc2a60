# SPDX-License-Identifier: Apache-2.0
"""
Handlers of messages by topic, and topics cut into words: what the message shims share.

How an id travels on a wire, and what a filter of its topics looks like, is each
shim's own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Final, TypeVar

from fasten.context import Context

__all__ = ["CLIENT_MAX", "Router"]

CLIENT_MAX: Final = 512
"""Characters of a topic that become the `client` of a row."""

H = TypeVar("H", bound=Callable[..., Any])


class Router:
    """
    Handlers by topic filter, each called in the scope of its message.
    """

    def __init__(
        self,
        topic_of: Callable[[Any], str],
        matches: Callable[[str, str], bool],
        scope_of: Callable[[Any], AbstractContextManager[Context]],
    ) -> None:
        self._topic_of, self._matches, self._scope_of = topic_of, matches, scope_of
        self._routes: list[tuple[str, Callable[..., Any]]] = []

    def handler(self, topic_filter: str) -> Callable[[H], H]:
        """
        Call the decorated function with (message, Context) for matching messages.
        """

        def register(fn: H) -> H:
            self._routes.append((topic_filter, fn))
            return fn

        return register

    async def dispatch(self, message: Any) -> None:
        """
        Call the handlers of one *message*, sync and async; what they raise leaves here.
        """
        for fn in self._handlers_of(message):
            with self._scope_of(message) as ctx:
                done = fn(message, ctx)
                if inspect.isawaitable(done):
                    await done

    def dispatch_sync(self, message: Any) -> None:
        """
        Call the handlers of one *message* as `dispatch` does, without an event loop.

        Raises:
            TypeError: a handler is a coroutine function, which needs `dispatch`.
        """
        for fn in self._handlers_of(message):
            if inspect.iscoroutinefunction(fn):
                raise TypeError(
                    f"the handler {fn.__qualname__!r} is a coroutine function; "
                    "await dispatch(message) instead of calling dispatch_sync"
                )
            with self._scope_of(message) as ctx:
                fn(message, ctx)

    def _handlers_of(self, message: Any) -> list[Callable[..., Any]]:
        topic = self._topic_of(message)
        return [fn for wanted, fn in self._routes if self._matches(wanted, topic)]
