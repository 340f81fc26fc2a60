# SPDX-License-Identifier: Apache-2.0
"""
One request id from the code that enqueues a Huey task to the consumer that runs it.

A Huey message has no headers: the id travels as one more keyword argument, which is
taken off again before the task runs. So a consumer needs the shim before producers
have it. `init()` belongs into the module that makes the Huey.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, Final, TypeVar

from fasten.context import HEADER, current_request_id, extract, scope

__all__ = ["install"]

T = TypeVar("T")

KEY: Final = "_fasten_request_id"
"""The keyword argument that carries an id."""


def install(huey: T) -> T:
    """
    Carry request ids through the tasks of *huey*; return it. Twice does nothing.
    """
    from huey import signals

    given: Any = huey
    if getattr(given, "_fasten_installed", False):
        return huey
    given._fasten_installed = True  # noqa: SLF001  (ours)
    # A retry with a delay goes to the schedule, of which no signal tells in time.
    given.signal(signals.SIGNAL_ENQUEUED, signals.SIGNAL_RETRYING)(_sending)
    given.signal(signals.SIGNAL_EXECUTING)(_starting)
    given.execute = _scoped(given.execute)
    return huey


def _sending(_signal: str, task: Any, *_: Any) -> None:
    rid = current_request_id()
    if rid is not None:
        task.kwargs.setdefault(KEY, rid)


def _starting(_signal: str, task: Any, *_: Any) -> None:
    task.kwargs.pop(KEY, None)


def _scoped(execute: Callable[..., Any]) -> Callable[..., Any]:
    # Around the whole of it, not between its hooks: a task that is cancelled or
    # interrupted has no post-execute hook, and what it enqueues comes after that.
    @wraps(execute)
    def scoped(task: Any, *args: Any, **kwargs: Any) -> Any:
        carried = extract({HEADER: task.kwargs.get(KEY)})
        with scope(carried, method="task", client=task.name):
            return execute(task, *args, **kwargs)

    return scoped
