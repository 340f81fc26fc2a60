# SPDX-License-Identifier: Apache-2.0
"""
One request id per run of a scheduled job: APScheduler, `schedule`, cron, a plain loop.

A job has no caller to take an id from, so each run gets `scheduler-<run_id>`.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from time import perf_counter
from typing import Any, TypeVar, overload

import fasten
from fasten.context import Context, is_async, scope

__all__ = ["instrument"]

F = TypeVar("F", bound=Callable[..., Any])


@overload
def instrument(fn: F, /) -> F: ...


@overload
def instrument(
    *, code: str | None = None, target: str | None = None
) -> Callable[[F], F]: ...


def instrument(
    fn: F | None = None, /, *, code: str | None = None, target: str | None = None
) -> F | Callable[[F], F]:
    """
    Run the decorated job, sync or async, in a scope of its own.

    With *code* each run is recorded: one row when it starts and one when it ends,
    with its outcome and `duration_ms`; *target* is the job's name if not given. Inside
    a request the parent's id stays in the Context.
    """
    if fn is None:
        return lambda decorated: _instrumented(decorated, code, target)
    return _instrumented(fn, code, target)


def _instrumented(fn: F, code: str | None, target: str | None) -> F:
    name = target or str(getattr(fn, "__qualname__", type(fn).__name__))
    if is_async(fn):

        @wraps(fn)
        async def run_async(*args: Any, **kwargs: Any) -> Any:
            with _run(code, name):
                return await fn(*args, **kwargs)

        return run_async  # type: ignore[return-value]

    @wraps(fn)
    def run(*args: Any, **kwargs: Any) -> Any:
        with _run(code, name):
            return fn(*args, **kwargs)

    return run  # type: ignore[return-value]


@contextmanager
def _run(code: str | None, name: str) -> Iterator[Context]:
    rid = f"scheduler-{secrets.token_hex(8)}"
    with scope(rid, actor_kind="scheduler", method="scheduler") as ctx:
        if code is None:
            yield ctx
            return
        fasten.emit(code, name, outcome="unknown", detail={"phase": "started"})
        started = perf_counter()
        outcome = "failure"
        try:
            yield ctx
            outcome = "success"
        finally:
            took_ms = round((perf_counter() - started) * 1000, 3)
            detail = {"phase": "finished", "duration_ms": took_ms}
            fasten.emit(code, name, outcome=outcome, detail=detail)
