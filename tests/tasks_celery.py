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
app.conf.beat_schedule = {"tick": {"task": "tests.tasks_celery.tick", "schedule": 0.5}}
shim.install(app)
pool = fasten.ContextThreadPoolExecutor(4)


@worker_process_init.connect(weak=False)
def start(**_kwargs):
    """
    Start fasten once per worker process.
    """
    fasten.init()
    fasten.emit("CONFIG_UPDATED", "process", detail={"pid": os.getpid()})


@app.task
def place(order):
    """
    Record one row, and hand on to the next task.
    """
    fasten.emit("ORDER_PLACED", order, detail={"pid": os.getpid()})
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


@app.task
def follow(before, order):
    """
    Be the next of a chain; tell both ids.
    """
    fasten.emit("PAYMENT_PROCESSED", order)
    return before, fasten.current_request_id()


@app.task
def tick():
    """
    Be sent by beat.
    """
    fasten.emit("TRIGGER_FIRED", "tick")


@app.task
def pick(order):
    """
    Record a row here, and one in a thread.
    """
    fasten.emit("JOB_COMPLETED", order)
    pool.submit(fasten.emit, "BATCH_PROCESSED", order)


@app.task
def received(what, payload):
    """
    Record what came with a message of a forger.
    """
    fasten.emit("SENSOR_UPDATED", what, detail={"payload": payload})
