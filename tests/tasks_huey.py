# SPDX-License-Identifier: Apache-2.0
"""
The Huey of `test_shim_huey`: its consumer runs this module.
"""

from __future__ import annotations

import os

from huey import CancelExecution, RedisHuey

import fasten
from fasten.shim import huey as shim

PORT = int(os.environ.get("TEST_REDIS_PORT", "0"))
huey = shim.install(RedisHuey("tasks", port=PORT))
if "TEST_WORKER" in os.environ:
    fasten.init()


@huey.pre_execute()
def refuse(task):
    """
    Cancel what is to be cancelled, so that no post-execute hook follows.
    """
    if task.name == "cancelled":
        raise CancelExecution


@huey.task()
def place(order):
    """
    Record one row, and hand on to the next task.
    """
    fasten.emit("ORDER_PLACED", order)
    notify(order)
    return fasten.current_request_id()


@huey.task()
def notify(order, **more):
    """
    Record another row, with what it was called with.
    """
    fasten.emit("JOB_COMPLETED", order, detail=more)


@huey.task(retries=2, context=True)
def flaky(order, task=None):
    """
    Fail twice, once with a delay and once without, then record.
    """
    if task.retries == 2:
        task.retry_delay = 1
        raise ValueError("once")
    task.retry_delay = 0
    if task.retries == 1:
        raise ValueError("twice")
    fasten.emit("BATCH_PROCESSED", order)
    return fasten.current_request_id()


@huey.task()
def cancelled():
    """
    Never run.
    """


@huey.task()
def unbound():
    """
    Tell under which id a task runs.
    """
    return fasten.current_request_id()
