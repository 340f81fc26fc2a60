# SPDX-License-Identifier: Apache-2.0
"""
Tool calls of AI agents as audit rows: who called what, for whom, at what cost.

One TOOL_CALLED row per call, whatever its end: a result, a refusal, an error, a
cancellation. Arguments are recorded as a digest only, unless asked for.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import aclosing, contextmanager
from decimal import Decimal
from functools import wraps
from time import perf_counter
from types import TracebackType
from typing import Any, Final, Self, TypeVar, overload

import fasten
from fasten.context import Context, bind, current, is_async, resume, scope
from fasten_shims._streams import stepwise, stepwise_async

__all__ = ["Call", "Refused", "tool"]

F = TypeVar("F", bound=Callable[..., Any])

CODE: Final = "TOOL_CALLED"


class Refused(PermissionError):
    """
    Raise this in a tool that will not do what it was asked: the row says `denied`.
    """


class Call:
    """
    One tool call in progress; also the context manager that `tool(name)` returns.
    """

    def __init__(
        self,
        name: str,
        *,
        actor: str | None = None,
        arguments: object = None,
        with_arguments: bool = False,
    ) -> None:
        self.name = name
        self._actor = actor
        self._arguments, self._with_arguments = arguments, with_arguments
        self._used: dict[str, Any] = {}
        self._costs: list[float | str | Decimal] = []
        self._outcome = "success"
        self._reason: str | None = None

    def record(
        self,
        *,
        cost_usd: float | str | Decimal | None = None,
        tokens: int | None = None,
        model: str | None = None,
        **more: Any,
    ) -> None:
        """
        Note what the call used; a number given twice is added up.
        """
        if cost_usd is not None:
            self._costs.append(cost_usd)
        if tokens is not None:
            self._used["tokens"] = self._used.get("tokens", 0) + int(tokens)
        if model is not None:
            self._used["model"] = model
        self._used.update(more)

    def refuse(self, reason: str) -> None:
        """
        Note that the tool declined, for *reason*; the row's outcome is `denied`.
        """
        self._outcome, self._reason = "denied", reason

    def fail(self, reason: str) -> None:
        """
        Note that the tool failed without raising; the row's outcome is `failure`.
        """
        self._outcome, self._reason = "failure", reason

    def note(self, error: BaseException) -> None:
        """
        Note that *error* ended the call: what leaves the with-block is noted so.

        For whoever makes a result of an error.
        """
        if isinstance(error, PermissionError):
            self.refuse(str(error) or "refused")
        elif isinstance(error, (Exception, SystemExit)):
            self.fail(type(error).__name__)
        else:  # of asyncio, of trio, or by the keyboard
            self._outcome, self._reason = "unknown", "cancelled"

    def __enter__(self) -> Self:
        self._scope = _scope_of(self._actor)
        self._scope.__enter__()
        self._started = perf_counter()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self._end(error)
        finally:
            self._scope.__exit__(kind, error, trace)

    @contextmanager
    def as_stream(self) -> Iterator[Context]:
        """
        Record the with-block as one call; yield its Context, which is not set in it.

        For what is read step by step: `fasten_shims._streams` sets it for each.
        """
        with _scope_of(self._actor) as ctx:
            self._started = perf_counter()
        error: BaseException | None = None
        try:
            yield ctx
        except BaseException as caught:
            error = caught
            raise
        finally:
            with resume(ctx):
                self._end(error)

    def _end(self, error: BaseException | None) -> None:
        if error is not None:
            self.note(error)
        fasten.emit(
            CODE,
            self.name,
            outcome=self._outcome,
            reason=self._reason,
            method="agent_tool",
            detail=self._detail(),
        )

    def _detail(self) -> dict[str, Any]:
        detail: dict[str, Any] = {
            "duration_ms": round((perf_counter() - self._started) * 1000, 3),
            "cost_usd": _sum(self._costs),
            "tokens": None,
            "model": None,
            "args_sha256": _digest(self._arguments),
        }
        detail.update(self._used)
        if self._with_arguments:
            detail["arguments"] = self._arguments
        return detail


def _sum(costs: list[float | str | Decimal]) -> float | str | None:
    """
    Add up exactly: a float stands for the digits that it prints.
    """
    if not costs:
        return None
    total = sum((Decimal(str(cost)) for cost in costs), Decimal())
    is_number = all(isinstance(cost, (int, float)) for cost in costs)
    return float(total) if is_number else str(total)


def _digest(arguments: object) -> str:
    """
    Tell equal arguments from others; what JSON has no form for counts by its type.
    """
    try:
        text = json.dumps(arguments, sort_keys=True, default=_type_name)
    except Exception:  # keys that do not sort, cycles: a digest must not cost the call
        text = _type_name(arguments)
    return hashlib.sha256(text.encode()).hexdigest()


def _type_name(value: object) -> str:
    return f"<{type(value).__name__}>"


@contextmanager
def _scope_of(actor: str | None) -> Iterator[Context]:
    """
    Work as an agent: within the caller's scope if there is one, else in a new one.
    """
    around = current()
    if around is None:
        with scope(actor_kind="agent", method="agent_tool") as ctx:
            if actor is not None:
                ctx.actor = actor
            yield ctx
        return
    # Whoever the agent works for stays on the row; the agent itself is the actor.
    given: dict[str, Any] = {"actor_kind": "agent", "method": "agent_tool"}
    if actor is not None:
        given |= {"actor": actor, "on_behalf_of": around.on_behalf_of or around.actor}
    with bind(**given) as ctx:
        yield ctx


@overload
def tool(fn: F, /) -> F: ...


@overload
def tool(
    name: str | None = None,
    /,
    *,
    actor: str | None = None,
    with_arguments: bool = False,
) -> _Tool: ...


def tool(
    given: Any = None,
    /,
    *,
    actor: str | None = None,
    with_arguments: bool = False,
) -> Any:
    """
    Record a tool's calls, as a decorator (bare or with a name) or a with-statement.

    *actor* names the agent, in whose name nested calls are made too; the user it works
    for becomes `on_behalf_of`. *with_arguments* puts the arguments, redacted, on the
    row beside their digest.
    """
    if callable(given):
        return _Tool(None, actor, with_arguments=with_arguments)(given)
    return _Tool(given, actor, with_arguments=with_arguments)


class _Tool:
    """
    What `tool("name")` returns: a decorator, and a context manager for one call.
    """

    def __init__(
        self, name: str | None, actor: str | None, *, with_arguments: bool
    ) -> None:
        self._name, self._actor = name, actor
        self._with_arguments = with_arguments
        self._calls: list[Call] = []

    def __call__(self, fn: F) -> F:
        name = self._name or str(getattr(fn, "__name__", type(fn).__name__))
        if inspect.isgeneratorfunction(fn) or inspect.isasyncgenfunction(fn):
            return self._stream(fn, name)
        if is_async(fn):

            @wraps(fn)
            async def call_async(*args: Any, **kwargs: Any) -> Any:
                with self._call(name, args, kwargs):
                    return await fn(*args, **kwargs)

            return call_async  # type: ignore[return-value]

        @wraps(fn)
        def call(*args: Any, **kwargs: Any) -> Any:
            with self._call(name, args, kwargs):
                return fn(*args, **kwargs)

        return call  # type: ignore[return-value]

    def _stream(self, fn: F, name: str) -> F:
        """
        Wrap a tool that answers in pieces: its call ends with the last one.
        """
        if inspect.isasyncgenfunction(fn):

            @wraps(fn)
            async def stream_async(*args: Any, **kwargs: Any) -> Any:
                with self._call(name, args, kwargs).as_stream() as ctx:
                    steps = stepwise_async(fn(*args, **kwargs), ctx)
                    async with aclosing(steps):
                        async for piece in steps:
                            yield piece

            return stream_async  # type: ignore[return-value]

        @wraps(fn)
        def stream(*args: Any, **kwargs: Any) -> Any:
            with self._call(name, args, kwargs).as_stream() as ctx:
                return (yield from stepwise(fn(*args, **kwargs), ctx))

        return stream  # type: ignore[return-value]

    def _call(
        self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Call:
        return Call(
            name,
            actor=self._actor,
            arguments={"args": list(args), "kwargs": dict(kwargs)},
            with_arguments=self._with_arguments,
        )

    def __enter__(self) -> Call:
        call = Call(self._name or "tool", actor=self._actor)
        self._calls.append(call)
        return call.__enter__()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._calls.pop().__exit__(kind, error, trace)
