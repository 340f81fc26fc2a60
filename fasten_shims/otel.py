# SPDX-License-Identifier: Apache-2.0
"""
Request ids on OpenTelemetry's spans, its trace and span ids on fasten's rows.

Spans, sampling and propagation stay with the SDK. Where a service knows traces only,
its `traceparent` gives the request id; and a trace that begins inside a request takes
the request's id, so that such a service hands the same one on.
"""

from __future__ import annotations

import re
from typing import Any, Final, TypeVar

from fasten.context import add_source, current, remove_source

__all__ = ["ATTRIBUTE", "install"]

T = TypeVar("T")

ATTRIBUTE: Final = "request_id"
"""The attribute of each span that starts in a scope."""

_TRACE_ID: Final = re.compile(r"(?!0{32})[0-9a-f]{32}")


def install(provider: T) -> T:
    """
    Join the spans of an SDK's TracerProvider with fasten's ids; return *provider*.

    Before the first tracer is taken from it: tracers keep the ids' generator that they
    were made with. Twice does nothing.

    Raises:
        TypeError: *provider* is not the SDK's: it has no span processors.
    """
    given: Any = provider
    if not hasattr(given, "add_span_processor"):
        raise TypeError(
            f"otel.install() needs a TracerProvider of opentelemetry-sdk, not "
            f"{type(given).__name__}; make one, install it, and hand it to "
            "opentelemetry.trace.set_tracer_provider()"
        )
    if not getattr(given, "_fasten_installed", False):
        given._fasten_installed = True  # noqa: SLF001  (ours)
        given.add_span_processor(_processor())
        given.id_generator = _generator(given.id_generator)
    # Once, however many providers: there is one current span.
    remove_source(_running)
    add_source(_running)
    return provider


def _processor() -> Any:
    from opentelemetry.sdk.trace import SpanProcessor

    class RequestIds(SpanProcessor):
        """
        Name the request on each span that starts in its scope.
        """

        # The SDK passes it by this name.
        def on_start(self, span: Any, parent_context: Any = None) -> None:  # noqa: ARG002
            cell = current()
            if cell is not None:
                span.set_attribute(ATTRIBUTE, cell.request_id)

    return RequestIds()


def _generator(before: Any) -> Any:
    from opentelemetry.sdk.trace.id_generator import IdGenerator

    class Adopting(IdGenerator):
        """
        Begin a trace under the ids of the scope, and elsewhere as *before* does.
        """

        def generate_span_id(self) -> int:
            return int(before.generate_span_id())

        def generate_trace_id(self) -> int:
            adopted = _scopes_trace()
            return int(adopted, 16) if adopted else int(before.generate_trace_id())

        def is_trace_id_random(self) -> bool:
            # Not known of an id that may have come off a wire. Older SDKs do not ask.
            ask = getattr(before, "is_trace_id_random", None)
            return ask is not None and _scopes_trace() is None and bool(ask())

    return Adopting()


def _scopes_trace() -> str | None:
    """
    Return the trace that this scope belongs to, or its request id if it may be one.
    """
    cell = current()
    if cell is None:
        return None
    if cell.trace_id is not None:
        return cell.trace_id
    digits = cell.request_id.replace("-", "").lower()
    return digits if _TRACE_ID.fullmatch(digits) else None


def _running() -> dict[str, str]:
    from opentelemetry.trace import get_current_span

    span = get_current_span()
    ids = span.get_span_context()
    if not ids.is_valid:
        return {}
    _name_request(span)
    return {"trace_id": f"{ids.trace_id:032x}", "span_id": f"{ids.span_id:016x}"}


def _name_request(span: Any) -> None:
    """
    Name the request on a server's span that started before the request had its scope.

    So do those of OpenTelemetry's HTTP middlewares, which stand outside of ours. A
    span round many messages belongs to none of them, and is left alone.
    """
    cell = current()
    if cell is None or cell.kind != "http" or not span.is_recording():
        return
    if ATTRIBUTE not in (getattr(span, "attributes", None) or ()):
        span.set_attribute(ATTRIBUTE, cell.request_id)
