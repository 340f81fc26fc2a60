# SPDX-License-Identifier: Apache-2.0
"""
One request id from the code that enqueues an RQ job to the worker that runs it.

`Queue` and `Job` stand in for RQ's own; workers are told by
`rq worker --job-class fasten.shim.rq.Job`. The id is in the job's `meta`. `init()`
belongs into the module of the jobs.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, wraps
from typing import TYPE_CHECKING, Any, Final

from fasten import MissingExtra, NotInitialized, flush, health
from fasten.context import HEADER, current_request_id, extract, scope

if TYPE_CHECKING:
    from rq import Queue
    from rq.job import Job

__all__ = ["Job", "Queue"]

_PID: Final = os.getpid()
_PATIENCE: Final = 20
"""Quarters of a second that the end of a job waits for a store that hangs."""


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _classes()[name]


@cache
def _classes() -> dict[str, Any]:
    try:
        import rq
        from rq.job import Job as _Job
    except ImportError:
        raise MissingExtra(
            "the rq shim needs the package rq; pip install 'fasten[rq]'"
        ) from None

    class Job(_Job):
        """
        A job of RQ that carries a request id in its `meta`.
        """

        __qualname__ = "Job"

        @classmethod
        def create(cls, *args: Any, **kwargs: Any) -> Any:
            job = super().create(*args, **kwargs)
            rid = current_request_id()
            if rid is not None:
                job.meta = {HEADER: rid, **job.meta}
            return job

        def perform(self) -> Any:
            with _scope_of(self):
                return super().perform()

        @property
        def success_callback(self) -> Any:
            return _scoped(self, super().success_callback)

        @property
        def failure_callback(self) -> Any:
            return _scoped(self, super().failure_callback)

    class Queue(rq.Queue):
        """
        A queue of RQ whose jobs carry request ids.
        """

        __qualname__ = "Queue"
        job_class = Job

    return {"Job": Job, "Queue": Queue}


def _scoped(job: Any, callback: Callable[..., Any] | None) -> Any:
    if callback is None or inspect.iscoroutinefunction(callback):
        return callback  # RQ refuses coroutines by a look at them

    @wraps(callback)
    def scoped(*args: Any) -> Any:
        with _scope_of(job):
            return callback(*args)

    return scoped


@contextmanager
def _scope_of(job: Any) -> Iterator[None]:
    meta = job.meta if isinstance(job.meta, dict) else {}
    carried = extract({HEADER: meta.get(HEADER)})
    try:
        with scope(carried, method="task", client=job.func_name) as ctx:
            # A retry saves the job again: under this id. What RQ could not read it
            # keeps as it came.
            if "unserialized" not in meta:
                job.meta = {**meta, HEADER: ctx.request_id}
            yield
    finally:
        if os.getpid() != _PID:
            _deliver()


def _deliver() -> None:
    # A work horse ends by os._exit: what it emitted would wait for the next one. Where
    # the store is down it does wait.
    try:
        for _ in range(_PATIENCE):
            if flush(0.25) or health()["state"] != "ok":
                return
    except NotInitialized:
        return
