# SPDX-License-Identifier: Apache-2.0
"""
The Celery application of `test_shim_celery`: its worker runs this module.
"""

from __future__ import annotations

import os

from celery import Celery
from celery.signals import worker_process_init

import fasten
from fasten.shim import celery as shim

url = f"redis://127.0.0.1:{os.environ.get('TEST_REDIS_PORT', '0')}/0"
app = Celery("tasks", broker=url, backend=url)
app.conf.broker_connection_retry_on_startup = True
shim.install(app)


@worker_process_init.connect(weak=False)
def start(**_kwargs):
    """
    Start fasten once per worker process.
    """
    fasten.init()


@app.task
def place(order):
    """
    Record one row, and hand on to the next task.
    """
    fasten.emit("ORDER_PLACED", order)
    notify.delay(order)
    return fasten.current_request_id()


@app.task
def notify(order):
    """
    Record another row.
    """
    fasten.emit("JOB_COMPLETED", order)


@app.task(bind=True, max_retries=1)
def flaky(self, order):
    """
    Fail once, then record.
    """
    if self.request.retries == 0:
        raise self.retry(countdown=0)
    fasten.emit("BATCH_PROCESSED", order)
    return fasten.current_request_id()
