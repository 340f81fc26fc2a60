# SPDX-License-Identifier: Apache-2.0
"""
One request id from the code that sends a Dramatiq message to the actor that gets it.

As a middleware; the id is an option of the message. `init()` belongs into the module
that makes the broker.
"""

from __future__ import annotations

from typing import Any, Final, TypeVar

from fasten.context import HEADER, current_request_id, extract, scope

__all__ = ["install"]

T = TypeVar("T")

_SLOT: Final = "_fasten_scope"


def install(broker: T) -> T:
    """
    Carry request ids through the messages of *broker*; return it. Twice does nothing.
    """
    given: Any = broker
    if getattr(given, "_fasten_installed", False):
        return broker
    given._fasten_installed = True  # noqa: SLF001  (ours)
    # First to start and last to end: what other middlewares send, retries and the
    # next message of a pipeline, is sent in the scope.
    first = type(given.middleware[0]) if given.middleware else None
    given.add_middleware(_middleware(), before=first)
    return broker


def _middleware() -> Any:
    from dramatiq.middleware import Middleware

    class RequestID(Middleware):
        def before_enqueue(self, _broker: Any, message: Any, _delay: Any) -> None:
            rid = current_request_id()
            if rid is not None:
                message.options.setdefault(HEADER, rid)

        def before_process_message(self, _broker: Any, message: Any) -> None:
            opened = scope(
                extract({HEADER: message.options.get(HEADER)}),
                method="task",
                client=message.actor_name,
            )
            # A retry sends the same message again: under this id.
            message.options[HEADER] = opened.__enter__().request_id
            message.__dict__[_SLOT] = opened

        def after_process_message(
            self,
            _broker: Any,
            message: Any,
            *,
            result: Any = None,  # noqa: ARG002  (Dramatiq's names)
            exception: Any = None,  # noqa: ARG002
        ) -> None:
            _leave(message)

        def after_skip_message(self, _broker: Any, message: Any) -> None:
            _leave(message)

    return RequestID()


def _leave(message: Any) -> None:
    opened = message.__dict__.pop(_SLOT, None)
    if opened is not None:
        opened.__exit__(None, None, None)
