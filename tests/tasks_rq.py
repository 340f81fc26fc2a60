# SPDX-License-Identifier: Apache-2.0
"""
The jobs of `test_shim_rq`: its worker imports this module, and so do its jobs.
"""

from __future__ import annotations

import os

from redis import Redis
from rq import Retry, get_current_job

import fasten
from fasten.shim import rq as shim

connection = Redis(port=int(os.environ.get("TEST_REDIS_PORT", "0")))
queue = shim.Queue(connection=connection)

if "TEST_WORKER" in os.environ:
    # In the worker, before it forks: a job need not load what delivers its rows.
    import fasten.repository

    fasten.init()


def place(order):
    """
    Record one row, and hand on to the next job.
    """
    fasten.emit("ORDER_PLACED", order)
    queue.enqueue(notify, order)
    return fasten.current_request_id()


def notify(order):
    """
    Record another row.
    """
    fasten.emit("JOB_COMPLETED", order)


def flaky(order):
    """
    Fail once, ask to be called again once, then record.
    """
    job = get_current_job()
    if job.retries_left:
        raise ValueError("once")
    if not job.number_of_retries:
        return Retry(max=1)
    fasten.emit("BATCH_PROCESSED", order)
    return fasten.current_request_id()


def unbound():
    """
    Tell under which id a job runs.
    """
    return fasten.current_request_id()


def received(number):
    """
    Record that a message of a forger came.
    """
    fasten.emit("SENSOR_UPDATED", number)


def fails():
    """
    Fail, so that the callback is called.
    """
    raise ValueError("always")


def succeeded(job, *_):
    """
    Record that a job ended well.
    """
    fasten.emit("CONFIG_UPDATED", job.func_name)


def failed(job, *_):
    """
    Record that a job failed.
    """
    fasten.emit("CONFIG_UPDATED", job.func_name, outcome="failure")
