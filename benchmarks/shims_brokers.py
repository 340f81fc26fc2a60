# SPDX-License-Identifier: Apache-2.0
"""
Messages through brokers and task queues, bare and with a shim, the whole way.

Brokers are real ones, on loopback; whoever receives is a thread of this process, so
that its CPU time holds both ends.
"""

from __future__ import annotations

import asyncio
import queue
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from tests import brokers

__all__ = [
    "Pair",
    "amqp",
    "celery",
    "dramatiq",
    "huey",
    "kafka_aiokafka",
    "kafka_confluent",
    "mqtt_paho",
    "nats",
    "rq",
]

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
def kafka_aiokafka(_: Path) -> Iterator[Pair]:
    """
    A message to a mock cluster and back, by aiokafka.
    """
    import aiokafka

    from fasten_shims.kafka import Router, publish

    router, partition = Router(), aiokafka.TopicPartition("bench", 0)
    router.handler("bench")(lambda message, _: message.value)
    with brokers.kafka() as address, asyncio.Runner() as runner:

        async def opened() -> Any:
            producer = aiokafka.AIOKafkaProducer(bootstrap_servers=address)
            consumer = aiokafka.AIOKafkaConsumer(
                bootstrap_servers=address, enable_auto_commit=False
            )
            await producer.start()
            await consumer.start()
            await producer.partitions_for("bench")
            consumer.assign([partition])
            await consumer.seek_to_beginning(partition)
            return producer, consumer

        producer, consumer = runner.run(opened())

        async def bare() -> None:
            await producer.send_and_wait("bench", b"{}", partition=0)
            await consumer.getone()

        async def shim() -> None:
            await publish(producer, "bench", b"{}", partition=0)
            await router.dispatch(await consumer.getone())

        yield lambda: runner.run(bare()), lambda: runner.run(shim())
        runner.run(consumer.stop())
        runner.run(producer.stop())


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


def work() -> None:
    """
    Be a job that does nothing.
    """


@contextmanager
def rq(directory: Path) -> Iterator[Pair]:
    """
    A job into Redis, fetched from there and performed.
    """
    import rq as client
    from redis import Redis

    from fasten_shims import rq as shim

    with brokers.redis(directory) as port, Redis(port=port) as connection:

        def way(queue: Any) -> Callable[[], object]:
            def call() -> None:
                job = queue.enqueue(work)
                queue.job_class.fetch(job.id, connection=connection).perform()

            return call

        yield (
            way(client.Queue("bare", connection=connection)),
            way(shim.Queue("with", connection=connection)),
        )


@contextmanager
def huey(directory: Path) -> Iterator[Pair]:
    """
    A task into Redis, taken from there and executed.
    """
    from huey import RedisHuey

    from fasten_shims.huey import install

    with brokers.redis(directory) as port:

        def way(made: Any) -> Callable[[], object]:
            task = made.task()(work)

            def call() -> None:
                task()
                made.execute(made.dequeue())

            return call

        yield (
            way(RedisHuey("bare", port=port, results=False)),
            way(install(RedisHuey("with", port=port, results=False))),
        )


@contextmanager
def dramatiq(directory: Path) -> Iterator[Pair]:
    """
    A message by way of Redis to a worker in a thread of this process.
    """
    import dramatiq as client
    from dramatiq.brokers.redis import RedisBroker

    from fasten_shims.dramatiq import install

    arrived: queue.SimpleQueue[None] = queue.SimpleQueue()

    def received() -> None:
        arrived.put(None)

    with brokers.redis(directory) as port, ExitStack() as stack:

        def way(broker: Any) -> Callable[[], object]:
            actor = client.actor(
                lambda: arrived.put(None), broker=broker, actor_name="a"
            )
            worker = client.Worker(broker, worker_threads=1, worker_timeout=50)
            worker.start()
            stack.callback(broker.close)
            stack.callback(worker.stop)

            def call() -> None:
                actor.send()
                arrived.get(timeout=10)

            return call

        yield (
            way(RedisBroker(port=port, namespace="bare")),
            way(install(RedisBroker(port=port, namespace="with"))),
        )
