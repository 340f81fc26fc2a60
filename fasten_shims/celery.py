# SPDX-License-Identifier: Apache-2.0
"""
One request id from the code that enqueues a Celery task to the worker that runs it.

Through Celery's own signals. `init()` belongs into the worker's processes: call it in
a `worker_process_init` handler, or in the module that makes the app.
"""

from __future__ import annotations

from typing import Any, Final, TypeVar

from fasten.context import HEADER, current_request_id, extract, scope

__all__ = ["install"]

T = TypeVar("T")

_SLOT: Final = "_fasten_scope"


def install(app: T) -> T:
    """
    Carry request ids through the tasks of *app*; return it. Twice does nothing.
    """
    from celery import signals

    given: Any = app
    if getattr(given, "_fasten_installed", False):
        return app
    given._fasten_installed = True  # noqa: SLF001  (ours)
    # weak=False: nothing else holds these functions.
    signals.before_task_publish.connect(_sending, weak=False)
    signals.task_prerun.connect(_starting, weak=False)
    signals.task_postrun.connect(_ended, weak=False)
    return app


def _sending(headers: dict[str, Any] | None = None, **_: Any) -> None:
    rid = current_request_id()
    if rid is not None and isinstance(headers, dict):
        headers.setdefault(HEADER, rid)


def _starting(task: Any = None, **_: Any) -> None:
    request = task.request
    headers = request.headers if isinstance(request.headers, dict) else {}
    carried = getattr(request, HEADER, None) or headers.get(HEADER)
    if request.is_eager and carried is None:
        carried = current_request_id()
    opened = scope(extract({HEADER: carried}), method="task", client=task.name)
    opened.__enter__()
    # A stack: an eager task may run within another one.
    task.request.__dict__.setdefault(_SLOT, []).append(opened)


def _ended(task: Any = None, **_: Any) -> None:
    opened = task.request.__dict__.get(_SLOT)
    if opened:
        opened.pop().__exit__(None, None, None)
