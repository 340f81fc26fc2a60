# SPDX-License-Identifier: Apache-2.0
"""
The actors of `test_shim_dramatiq`: its workers run this module.
"""

from __future__ import annotations

import os

import dramatiq
from dramatiq.brokers.redis import RedisBroker
from dramatiq.middleware import AsyncIO, CurrentMessage, Middleware, SkipMessage

import fasten
from fasten.shim import dramatiq as shim


class Skipping(Middleware):
    """
    Refuse some messages after the shim has opened their scope.
    """

    def before_process_message(self, _broker, message):
        """
        Skip what is to be skipped.
        """
        if message.actor_name == "skipped":
            raise SkipMessage


broker = RedisBroker(port=int(os.environ.get("TEST_REDIS_PORT", "0")))
broker.add_middleware(AsyncIO())
broker.add_middleware(CurrentMessage())
broker.add_middleware(Skipping())
shim.install(broker)
dramatiq.set_broker(broker)

if "TEST_WORKER" in os.environ:
    fasten.init()


@dramatiq.actor
def place(order):
    """
    Record one row, and hand on to the next actor.
    """
    fasten.emit("ORDER_PLACED", order)
    notify.send(order)


@dramatiq.actor
def notify(order):
    """
    Record another row.
    """
    fasten.emit("JOB_COMPLETED", order)
    return order


@dramatiq.actor(max_retries=1, min_backoff=1, max_backoff=1)
def flaky(order):
    """
    Fail once, then record.
    """
    message = CurrentMessage.get_current_message()
    fasten.emit("BATCH_PROCESSED", order, detail=message.options.get("retries", 0))
    if not message.options.get("retries"):
        raise ValueError("once")


@dramatiq.actor
async def soon(order):
    """
    Record a row from a coroutine.
    """
    fasten.emit("PAYMENT_PROCESSED", order)


@dramatiq.actor
def received(number, payload):
    """
    Record what came with a message of a forger.
    """
    fasten.emit("SENSOR_UPDATED", number, detail={"payload": payload})


@dramatiq.actor
def skipped(order):
    """
    Never run.
    """
