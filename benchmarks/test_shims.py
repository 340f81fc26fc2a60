# SPDX-License-Identifier: Apache-2.0
"""
What each shim costs per message, beside the bare client it wraps.

One message at a time goes the whole way, through the real client and its broker, and
is handled; with the shim it carries an id and is handled in its scope. Both take
turns, so that the noise of brokers is shared.
"""

from __future__ import annotations

import asyncio
import queue
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest

import fasten
from benchmarks.reference import median, settle
from tests import brokers

ROUNDS = 40
CALLS = 25

Pair = tuple[Callable[[], object], Callable[[], object]]
"""Send and handle one message: by the bare client, and through the shim."""


@contextmanager
def mqtt_paho(directory: Path) -> Iterator[Pair]:
    """
    A JSON object from a paho client to another one, MQTT 5.
    """
    import paho.mqtt.client as paho

    from fasten.shim.mqtt import publish_sync
    from fasten_shims.mqtt import Router

    arrived: queue.SimpleQueue[object] = queue.SimpleQueue()
    router = Router()
    router.handler("with")(lambda message, _: arrived.put(message))
    with brokers.mosquitto(directory) as port:
        client = paho.Client(
            paho.CallbackAPIVersion.VERSION2, protocol=paho.MQTTProtocolVersion.MQTTv5
        )
        client.on_subscribe = lambda *_: arrived.put("subscribed")
        client.message_callback_add("bare", lambda *_: arrived.put("message"))
        router.attach(client)
        client.connect("127.0.0.1", port)
        client.loop_start()
        client.subscribe([("bare", 0), ("with", 0)])
        arrived.get(timeout=10)

        def bare() -> None:
            client.publish("bare", '{"target_temp_c":22.5}')
            arrived.get(timeout=10)

        def shim() -> None:
            publish_sync(client, "with", '{"target_temp_c":22.5}')
            arrived.get(timeout=10)

        yield bare, shim
        client.disconnect()
        client.loop_stop()


@contextmanager
def nats(_: Path) -> Iterator[Pair]:
    """
    A message to a subscription of the same connection.
    """
    import nats as client

    from fasten_shims.nats import Router, publish

    router = Router()
    with brokers.nats() as port, asyncio.Runner() as runner:
        arrived: asyncio.Queue[object] = asyncio.Queue()

        async def received(message: Any) -> None:
            await arrived.put(message)

        async def opened() -> Any:
            connection = await client.connect(f"nats://127.0.0.1:{port}")
            await connection.subscribe("bare", cb=received)
            await connection.subscribe("with", cb=router.dispatch)
            return connection

        router.handler("with")(lambda message, _: received(message))
        connection = runner.run(opened())

        async def bare() -> None:
            await connection.publish("bare", b"{}")
            await arrived.get()

        async def shim() -> None:
            await publish(connection, "with", b"{}")
            await arrived.get()

        yield lambda: runner.run(bare()), lambda: runner.run(shim())
        runner.run(connection.close())


@contextmanager
def kafka_confluent(_: Path) -> Iterator[Pair]:
    """
    A message to a mock cluster and back, by confluent-kafka.
    """
    from confluent_kafka import Consumer, Producer, TopicPartition

    from fasten_shims.kafka import Router, publish

    router = Router()
    router.handler("bench")(lambda message, _: message.value())
    with brokers.kafka() as address:
        servers = {"bootstrap.servers": address}
        producer = Producer({**servers, "linger.ms": 0})
        consumer = Consumer({**servers, "group.id": "bench", "fetch.wait.max.ms": 1})
        consumer.assign([TopicPartition("bench", 0, 0)])

        def bare() -> None:
            producer.produce("bench", b"{}", partition=0)
            consumer.poll(10).value()

        def shim() -> None:
            publish(producer, "bench", b"{}", partition=0)
            router.dispatch_sync(consumer.poll(10))

        yield bare, shim
        consumer.close()


@contextmanager
def amqp(directory: Path) -> Iterator[Pair]:
    """
    A message through a topic exchange to a consumer on the same connection.
    """
    import aio_pika

    from fasten_shims.amqp import Router, publish

    router, body = Router(), aio_pika.Message
    with brokers.rabbitmq(directory) as port, asyncio.Runner() as runner:
        arrived: asyncio.Queue[object] = asyncio.Queue()

        async def received(message: Any) -> None:
            await arrived.put(message)

        async def opened() -> Any:
            url = f"amqp://guest:guest@127.0.0.1:{port}/"
            connection = await aio_pika.connect(url)
            channel = await connection.channel()
            exchange = await channel.declare_exchange(
                "bench", aio_pika.ExchangeType.TOPIC
            )
            for key, callback in (("bare", received), ("with", router.dispatch)):
                consumed = await channel.declare_queue(exclusive=True)
                await consumed.bind(exchange, key)
                await consumed.consume(callback, no_ack=True)
            return connection, exchange

        router.handler("with")(lambda message, _: received(message))
        connection, exchange = runner.run(opened())

        async def bare() -> None:
            await exchange.publish(body(b"{}"), "bare")
            await arrived.get()

        async def shim() -> None:
            await publish(exchange, body(b"{}"), "with")
            await arrived.get()

        yield lambda: runner.run(bare()), lambda: runner.run(shim())
        runner.run(connection.close())


@contextmanager
def celery(directory: Path) -> Iterator[Pair]:
    """
    A task by way of Redis to a worker in a thread of this process.
    """
    from celery import Celery, signals
    from celery.contrib.testing.worker import start_worker

    from fasten_shims import celery as shim

    with brokers.redis(directory) as port:
        app = shim.install(Celery("bench", broker=f"redis://127.0.0.1:{port}/0"))
        arrived: queue.SimpleQueue[None] = queue.SimpleQueue()

        @app.task
        def work() -> None:
            arrived.put(None)

        connected = [
            (signals.before_task_publish, shim._sending),
            (signals.task_prerun, shim._starting),
            (signals.task_postrun, shim._ended),
        ]

        is_installed = True

        def call(*, installed: bool) -> None:
            nonlocal is_installed
            if is_installed != installed:  # once a round
                for signal, receiver in connected:
                    change = signal.connect if installed else signal.disconnect
                    change(receiver, weak=False)
                is_installed = installed
            work.apply_async(ignore_result=True)
            arrived.get(timeout=10)

        with start_worker(app, perform_ping_check=False, pool="solo"):
            yield lambda: call(installed=False), lambda: call(installed=True)


@contextmanager
def agent(_: Path) -> Iterator[Pair]:
    """
    A tool that does nothing; through the shim it leaves an audit row.
    """
    from fasten.shim.agent import tool

    def search(text: str) -> str:
        return text

    recorded = tool("search")(search)
    yield lambda: search("shoes"), lambda: recorded("shoes")


@contextmanager
def scheduler(_: Path) -> Iterator[Pair]:
    """
    A job that does nothing.
    """
    from fasten.shim.scheduler import instrument

    def job() -> None:
        pass

    yield job, instrument(job)


@contextmanager
def httpx(_: Path) -> Iterator[Pair]:
    """
    A request of a client whose transport answers in memory.
    """
    import httpx as client

    from fasten.shim.httpx import install

    transport = client.MockTransport(lambda _: client.Response(200))
    with (
        client.Client(transport=transport) as bare,
        install(client.Client(transport=transport)) as shim,
    ):
        url = "http://shop.example/"
        yield lambda: bare.get(url), lambda: shim.get(url)


SHIMS: tuple[Callable[[Path], AbstractContextManager[Pair]], ...] = (
    *(mqtt_paho, nats, kafka_confluent, amqp, celery, agent, scheduler, httpx),
)


@pytest.mark.parametrize("shim", SHIMS, ids=lambda shim: shim.__name__)
def test_a_message(
    shim: Callable[[Path], AbstractContextManager[Pair]],
    tmp_path: Path,
    cost: Callable[[str, float, float], None],
) -> None:
    """
    Both ways in turn: the median of each round.
    """
    fasten.init(service_id="bench", node_id="bench-1", stdout="")
    with shim(tmp_path) as (bare, through), fasten.bind():
        for call in (bare, through):
            call()
        settle()
        for _ in range(ROUNDS):
            cost(shim.__name__, took_ns(bare), took_ns(through))
    fasten.close()


def took_ns(call: Callable[[], object]) -> float:
    """
    Return the median time of a call.
    """
    taken = []
    for _ in range(CALLS):
        before = time.perf_counter_ns()
        call()
        taken.append(time.perf_counter_ns() - before)
    return median(taken)
